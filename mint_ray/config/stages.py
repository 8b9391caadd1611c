"""Settings of the stages, from `prepare` to `evaluate`."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from mint_ray.config.loader import Resources, settings
from mint_ray.retrievers.config import Retrieval
from mint_ray.samplers import AnySampler, Hard
from mint_ray.sources.config import AnySource
from mint_ray.students.config import Generation, Student
from mint_ray.teachers.config import AnyTeacher, TwoTower
from mint_ray.teachers.config import Ontology as OntologyTeacher
from mint_ray.trainers.config import TrainerArguments, TrainResources

DECODE_TASKS_PER_ACTOR = 4


@settings
class Splits:
    """Shares of the records per split; groups are not divided; stratified by label."""

    validation: float = 0.1
    """Share of records (0 to 1) on which teacher and checkpoints are validated."""
    test: float = 0.2
    """Share of records (0 to 1) that only the evaluation reads."""
    seed: int = 0
    """Seed of the order in which groups are assigned."""

    def __post_init__(self) -> None:
        if self.validation < 0 or self.test < 0 or self.validation + self.test >= 1:
            raise ValueError(
                f"validation and test must leave records to train on, got {self.validation} and {self.test}"
            )


@settings
class ImageActorResources(Resources):
    """Cluster resources of actors that get their images decoded ahead; they change no row beyond rounding."""

    actors: int = 1
    """Number of actors; each loads the model and works on one part (`prepare.rows_per_part`) at a time."""
    cpus_per_actor: float = 1
    """CPUs per actor."""
    gpus_per_actor: float = 0
    """GPUs per actor; with a fraction several actors share one GPU."""
    decode_cpus: float = 1
    """CPUs per image-decoding task (in addition to those of the actors)."""
    decode_tasks: int | None = None
    """Maximum number of concurrent decoding tasks; null: 4 per actor. A GPU may need 16 or more."""

    def __post_init__(self) -> None:
        if self.actors < 1:
            raise ValueError(f"actors must be positive, got {self.actors}")
        if self.decode_tasks is not None and self.decode_tasks < 1:
            raise ValueError(f"decode_tasks must be positive, got {self.decode_tasks}")
        if self.decode_cpus <= 0:
            raise ValueError(f"decode_cpus must be positive, got {self.decode_cpus}")

    @property
    def max_decode_tasks(self) -> int:
        """Maximum number of concurrent decoding tasks."""
        return self.decode_tasks or DECODE_TASKS_PER_ACTOR * self.actors


@settings
class MatchTexts:
    """Matching of texts: a record with an image and no text gets the nearest text of another source.

    For image collections without reports, as in CLIP-IT (arXiv 2504.16181). Labels are not used.
    """

    source: AnySource
    """Source of the texts: records with `text`; only id, group and text are read."""
    encoder: TwoTower
    """Two-tower encoder whose cosine similarity ranks the texts. Long texts are truncated to its context length."""
    min_similarity: float | None = None
    """Cosine, -1 to 1, below which a record stays without a text; null: no minimum."""
    seed: int = 0
    """Seed that assigns groups of texts to splits, in the shares of `prepare.splits`: no held-out record can get a text
    that a training record can get. A group that also has records is assigned to their split."""
    resources: ImageActorResources = ImageActorResources()

    renamed_keys: ClassVar[dict[str, str]] = {"least_similarity": "min_similarity"}

    def __post_init__(self) -> None:
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise ValueError(f"min_similarity must lie in -1 to 1, got {self.min_similarity}")


@settings
class Prepare:
    """Source and splits of the records."""

    source: AnySource
    splits: Splits = Splits()
    max_bad_share: float = 0.05
    """Maximum share (0 to 1) of unreadable rows; above it the run stops."""
    rows_per_part: int = 1_000
    """Records per part: the work of one task of later stages, repeated if its worker dies."""
    match_texts: MatchTexts | None = None
    """Texts of another source for images without a text; null: none."""

    renamed_keys: ClassVar[dict[str, str]] = {"pair_texts": "match_texts"}

    def __post_init__(self) -> None:
        if self.rows_per_part < 1:
            raise ValueError(f"rows_per_part must be positive, got {self.rows_per_part}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must lie in 0 to 1, got {self.max_bad_share}")


@settings
class FitResources(Resources):
    """Cluster resources for fitting a teacher by gradient descent; they change nothing beyond rounding."""

    num_workers: int = 1
    """Number of data-parallel workers."""
    cpus_per_worker: float = 2
    """CPUs, and arithmetic threads, per worker."""
    gpus_per_worker: float = 0
    """GPUs per worker."""
    max_failures: int = 3
    """Maximum number of restarts from the last epoch after a worker failure."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be positive, got {self.num_workers}")


@settings
class Fit:
    """The teacher."""

    teacher: AnyTeacher = OntologyTeacher()
    resources: FitResources = FitResources()


@settings
class ScoreResources(ImageActorResources):
    """Cluster resources for scoring; they change no row."""

    batch_size: int = 64
    """Records per batch."""

    def __post_init__(self) -> None:
        ImageActorResources.__post_init__(self)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {self.batch_size}")


@settings
class Score:
    """Scoring of every label of every record by the teacher."""

    ablate: tuple[str, ...] = ()
    """Modalities to ablate, one at a time; scored on the held-out splits only."""
    resources: ScoreResources = ScoreResources()

    renamed_keys: ClassVar[dict[str, str]] = {"without": "ablate"}


@settings
class BuildVlmResources(Resources):
    """Cluster resources for building the student; they change nothing beyond rounding."""

    cpus: float = 2
    """CPUs, and arithmetic threads, of the single task."""
    gpus: float = 0
    """GPUs of the single task."""


@settings
class Pretrained:
    """Pretrained weights of the Hub or in a folder."""

    model_id: str
    """Bundled model, folder of safetensors, or id on the Hugging Face Hub."""
    revision: str | None = None
    """Commit on the Hub, all 40 digits; null for other models."""

    def __post_init__(self) -> None:
        if self.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision must be a commit of 40 hexadecimal digits, got {self.revision!r}")


@settings
class BuildVlm:
    """Vision-language student that is built from an image encoder and a language model (LLaVA-style).

    A projector between the two is trained to caption the training images with the names of their labels; encoder and
    language model are frozen.
    """

    vision: Pretrained = Pretrained(model_id="bundled:efficientnet-lite0")
    """Image encoder: any that transformers' AutoModel loads and whose features are tokens or a feature map."""
    language: Pretrained = Pretrained(model_id="bundled:smollm2-135m-instruct")
    """Causal language model with a chat template."""
    question: str = "What does this image show?"
    """Question after the image; the name of the label is the answer."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    num_train_epochs: float = 2.0
    """Number of passes over the training images."""
    train_batch_size: int = 16
    """Images per step."""
    seed: int = 0
    """Seed of the projector's initial weights and the order of the images."""
    resources: BuildVlmResources = BuildVlmResources()

    def __post_init__(self) -> None:
        for name in ("learning_rate", "num_train_epochs", "train_batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@settings
class Gate:
    """Minimum validation metrics of the teacher; below one of them no pairs are drawn. No minimum by default."""

    renamed_keys: ClassVar[dict[str, str]] = {"top_10_accuracy": "top_k_accuracy"}

    top_1_accuracy: float | None = None
    """Minimum share of records whose true label the teacher ranks first."""
    top_k_accuracy: float | None = None
    """Minimum share of records whose true label is among the teacher's first ten."""
    coverage: float | None = None
    """Minimum share of records that the teacher could score."""


@settings
class Pair:
    """Sampling of preference pairs from scores."""

    sampler: AnySampler = Hard()
    gate: Gate = Gate()
    control: Literal["swapped", "relabelled", "shuffled"] | None = None
    """Negative control, which measures what a method gains from invalid pairs; null: none. `swapped` exchanges chosen
    and rejected for a random half of the records, `relabelled` maps every label to the name of another one, `shuffled`
    shows the student the image of another record of the split, in training and evaluation."""


@settings
class Train:
    """Training of the student."""

    student: Student
    trainer: TrainerArguments = TrainerArguments()
    resources: TrainResources = TrainResources()

    def __post_init__(self) -> None:
        if self.student.dtype == "bfloat16" and not self.trainer.bf16 and self.resources.zero_stage is not None:
            raise ValueError("student.dtype bfloat16 with zero_stage needs trainer.bf16: true")
        if self.student.dtype == "bfloat16" and self.student.lora_rank is None and not self.resources.zero_stage:
            raise ValueError("student.dtype bfloat16 with lora_rank null needs zero_stage 1, 2 or 3 for float32 copies")


@settings
class EvaluateResources(Resources):
    """Cluster resources for answering; they change no answer."""

    actors: int = 1
    """Number of actors; each loads one student."""
    cpus_per_actor: float = 2
    """CPUs, and arithmetic threads, per actor."""
    gpus_per_actor: float = 0
    """GPUs per actor."""
    batch_size: int = 16
    """Prompts per batch."""


@settings
class Harness:
    """General benchmarks for base and aligned student, by lm-evaluation-harness (extra `harness`)."""

    tasks: tuple[str, ...]
    """Names of harness tasks, groups or tags; most load their data from the Hugging Face Hub."""
    folder: str | None = None
    """Folder with your own tasks (YAML), on every node of the cluster; the harness's own are then not available. Code
    that they reference (`!function`) is executed."""
    limit: int | None = None
    """Number of questions per task, the first ones; null: all."""
    num_fewshot: int | None = None
    """Number of few-shot examples; null: the task's own default."""
    apply_chat_template: bool = False
    """True for questions in the student's chat template, false for plain text."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks must name at least one task")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be positive, got {self.limit}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot must not be negative, got {self.num_fewshot}")


@settings
class Evaluate:
    """Comparison of base and aligned student on held-out records."""

    split: Literal["validation", "test"] = "test"
    """Split to evaluate on; a sweep compares its trials on `validation`, so that `test` stays unseen."""
    generation: Generation = Generation()
    retrieval: Retrieval | None = None
    """Retrieved passages ahead of each note (RAG), as additional methods; null: none."""
    harness: Harness | None = None
    """General benchmarks, which measure what alignment costs; null: none."""
    confidence: float = 0.95
    """Confidence level of the bootstrap intervals, 0 to 1."""
    resamples: int = 1000
    """Number of bootstrap resamples, drawn over groups."""
    seed: int = 0
    """Seed of the bootstrap."""
    resources: EvaluateResources = EvaluateResources()

    renamed_keys: ClassVar[dict[str, str]] = {"general": "harness"}

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {self.confidence}")
        if self.resamples < 1:
            raise ValueError(f"resamples must be positive, got {self.resamples}")
