"""Settings of the stages, from records to the report."""

from __future__ import annotations

import re
from typing import Literal

from mint_ray.config.loader import settings
from mint_ray.retrievers.config import Retrieval
from mint_ray.samplers import AnySampler, Hard
from mint_ray.sources.config import AnySource
from mint_ray.students.config import Generation, Student
from mint_ray.teachers.config import AnyTeacher, TwoTowers
from mint_ray.teachers.config import Ontology as OntologyTeacher
from mint_ray.trainers.config import Arguments, TrainResources


@settings
class Splits:
    """Shares of the records, given out by whole groups, label by label."""

    validation: float = 0.1
    """Share on which teacher and checkpoints are judged."""
    test: float = 0.2
    """Share that nothing but the evaluation reads."""
    seed: int = 0
    """Seed of the order in which groups are given out."""

    def __post_init__(self) -> None:
        if self.validation < 0 or self.test < 0 or self.validation + self.test >= 1:
            raise ValueError(f"validation and test must leave a share to train, got {self.validation} and {self.test}")


@settings
class PairTextsResources:
    """What embedding asks of the cluster; changes no row beyond rounding."""

    actors: int = 1
    """Actors that each hold the encoder; each works on one part of the texts or records at a time."""
    cpus_per_actor: float = 1
    """Processors of one actor."""
    gpus_per_actor: float = 0
    """GPUs of one actor; a fraction lets several share one."""
    decode_cpus: float = 1
    """Processors of one task that decodes the images of a part ahead of the actors, beside theirs."""
    decode_tasks: int | None = None
    """Most of these tasks at a time; null: 4 for each actor."""

    def __post_init__(self) -> None:
        if self.actors < 1:
            raise ValueError(f"actors must be positive, got {self.actors}")
        if self.decode_tasks is not None and self.decode_tasks < 1:
            raise ValueError(f"decode_tasks must be positive, got {self.decode_tasks}")
        if self.decode_cpus <= 0:
            raise ValueError(f"decode_cpus must be positive, got {self.decode_cpus}")


@settings
class PairTexts:
    """Give each record that has an image and no text the nearest text of another source (CLIP-IT, arXiv 2504.16181),
    where no reports of the images exist. No label is looked at."""

    source: AnySource
    """Where the texts come from: records with `text`, of which nothing but id, group and text is read."""
    encoder: TwoTowers
    """Whose cosine tells how near a text is to an image; of a long text it reads the beginning."""
    least_similarity: float | None = None
    """Cosine, -1 to 1, below which a record stays without a text; null: none."""
    seed: int = 0
    """Seed by which groups of texts are given to the splits, in the shares of `prepare.splits`: no held-out record gets
    a text that a training record can get. A group that records have as well goes where these are."""
    resources: PairTextsResources = PairTextsResources()

    def __post_init__(self) -> None:
        if self.least_similarity is not None and not -1 <= self.least_similarity <= 1:
            raise ValueError(f"least_similarity must lie in -1 to 1, got {self.least_similarity}")


@settings
class Prepare:
    """Where records come from, and how they are split."""

    source: AnySource
    splits: Splits = Splits()
    max_bad_share: float = 0.05
    """Share of unreadable rows (0 to 1) above which the run stops."""
    rows_per_part: int = 1_000
    """Records in one part: the work of one task of later stages, and what is done again if its worker dies."""
    pair_texts: PairTexts | None = None
    """Texts of another source for images that have none; null: none."""

    def __post_init__(self) -> None:
        if self.rows_per_part < 1:
            raise ValueError(f"rows_per_part must be positive, got {self.rows_per_part}")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share must lie in 0 to 1, got {self.max_bad_share}")


@settings
class FitResources:
    """What fitting asks of the cluster, for a teacher that learns by gradient descent; changes nothing beyond
    rounding."""

    num_workers: int = 1
    """Processes that share the work."""
    cpus_per_worker: float = 2
    """Processors, and arithmetic threads, of one process."""
    gpus_per_worker: float = 0
    """GPUs of one process."""
    max_failures: int = 3
    """How often the run is picked up from its last epoch after a process died."""

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"num_workers must be positive, got {self.num_workers}")


@settings
class Fit:
    """Who teaches."""

    teacher: AnyTeacher = OntologyTeacher()
    resources: FitResources = FitResources()


@settings
class ScoreResources:
    """What scoring asks of the cluster; changes no row."""

    actors: int = 1
    """Actors that each hold one teacher; each works on one part of the records (`prepare.rows_per_part`) at a time."""
    cpus_per_actor: float = 1
    """Processors of one actor."""
    gpus_per_actor: float = 0
    """GPUs of one actor; a fraction lets several share one."""
    batch_size: int = 64
    """Records scored at a time."""
    decode_cpus: float = 1
    """Processors of one task that reads and decodes the images of a part ahead of the actors, beside theirs; for
    teachers that look at images."""
    decode_tasks: int | None = None
    """Most of these tasks at a time; null: 4 for each actor. A GPU may want 16 or more."""

    def __post_init__(self) -> None:
        if self.actors < 1 or self.batch_size < 1:
            raise ValueError(f"actors and batch_size must be positive, got {self.actors} and {self.batch_size}")
        if self.decode_tasks is not None and self.decode_tasks < 1:
            raise ValueError(f"decode_tasks must be positive, got {self.decode_tasks}")
        if self.decode_cpus <= 0:
            raise ValueError(f"decode_cpus must be positive, got {self.decode_cpus}")


@settings
class Score:
    """How the teacher is asked."""

    without: tuple[str, ...] = ()
    """Modalities to leave out, one at a time, to see what each is worth; scored on the held-out splits only."""
    resources: ScoreResources = ScoreResources()


@settings
class JoinResources:
    """What joining asks of the cluster; changes nothing beyond rounding."""

    cpus: float = 2
    """Processors, and arithmetic threads, of the one task that does it."""
    gpus: float = 0
    """GPUs of that task."""


@settings
class Published:
    """Weights that someone has published, or that lie in a folder."""

    model_id: str
    """A bundled model, a folder of safetensors, or an id of the Hugging Face Hub."""
    revision: str | None = None
    """Commit of a model of the Hub, all 40 digits."""

    def __post_init__(self) -> None:
        if self.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision must be a commit of 40 hexadecimal digits, got {self.revision!r}")


@settings
class Join:
    """Make a student that sees, of a vision encoder and a language model, where no finished one is at hand. Between
    them stands a projector, which is trained on the names of what the training images show, all else being held."""

    vision: Published = Published(model_id="bundled:efficientnet-lite0")
    """The encoder: any that transformers' AutoModel reads and whose features are tokens or a map."""
    language: Published = Published(model_id="bundled:smollm2-135m-instruct")
    """The language model: any causal one with a chat template."""
    question: str = "What does this image show?"
    """What stands behind the image; the name of its label is the answer."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    num_train_epochs: float = 2.0
    """Passes over the training images."""
    train_batch_size: int = 16
    """Images per step."""
    seed: int = 0
    """Of the projector's first weights and the order of the images."""
    resources: JoinResources = JoinResources()

    def __post_init__(self) -> None:
        for name in ("learning_rate", "num_train_epochs", "train_batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@settings
class Gate:
    """Floors under which a teacher is not let near a student, on the validation split; none by default."""

    top_1_accuracy: float | None = None
    """Least share of records whose true label the teacher ranks first."""
    top_10_accuracy: float | None = None
    """Least share of records whose true label is among its first ten."""
    coverage: float | None = None
    """Least share of records that the teacher could score at all."""


@settings
class Pair:
    """How scores become pairs."""

    sampler: AnySampler = Hard()
    gate: Gate = Gate()
    control: Literal["swapped", "relabelled", "shuffled"] | None = None
    """Spoil the pairs on purpose, to see what a method makes of nothing: `swapped` exchanges chosen and rejected for a
    random half of the records, `relabelled` gives every label the name of another, always the same one, `shuffled`
    shows the student the image of another record of the split, from its captions to its test."""


@settings
class Train:
    """Who learns, and how."""

    student: Student
    trainer: Arguments = Arguments()
    resources: TrainResources = TrainResources()

    def __post_init__(self) -> None:
        if self.student.dtype == "bfloat16" and not self.trainer.bf16 and self.resources.zero_stage is not None:
            raise ValueError("student.dtype bfloat16 with zero_stage needs trainer.bf16: true")
        if self.student.dtype == "bfloat16" and self.student.lora_rank is None and not self.resources.zero_stage:
            raise ValueError("student.dtype bfloat16 with lora_rank null needs zero_stage 1, 2 or 3 for float32 copies")


@settings
class EvaluateResources:
    """What generation asks of the cluster; changes no answer."""

    actors: int = 1
    """Actors that each hold one student."""
    cpus_per_actor: float = 2
    """Processors, and arithmetic threads, of one actor."""
    gpus_per_actor: float = 0
    """GPUs of one actor."""
    batch_size: int = 16
    """Prompts answered at a time."""


@settings
class General:
    """What base and aligned student are asked beside the task, by lm-evaluation-harness (extra `harness`)."""

    tasks: tuple[str, ...]
    """Names of its tasks, groups or tags. Their data come from the Hugging Face Hub, unless they say otherwise."""
    folder: str | None = None
    """Folder with tasks of your own (YAML), on every machine of the cluster; the harness's are then not known. What
    they call (`!function`) is run."""
    limit: int | None = None
    """Questions asked of each task, the first so many; null: all."""
    num_fewshot: int | None = None
    """Examples ahead of each question; null: as the task has it."""
    apply_chat_template: bool = False
    """Ask as the student's chat template has a user ask, rather than in plain text."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks must name at least one task")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be positive, got {self.limit}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot must not be negative, got {self.num_fewshot}")


METRIC_SECTIONS = ("retrieval", "general")
"""Keys of the metrics in the manifest of `evaluate` under which there is no method but a section of its own."""


@settings
class Evaluate:
    """How base and aligned student are compared on the test split."""

    split: Literal["validation", "test"] = "test"
    """Whose records are asked; a sweep compares its trials on `validation`, so that `test` stays unseen."""
    generation: Generation = Generation()
    retrieval: Retrieval | None = None
    """Let both students answer once more with passages to read ahead of each note, as methods of their own."""
    general: General | None = None
    """Ask both students questions that have nothing to do with the task, to see what aligning costs."""
    confidence: float = 0.95
    """Level of the bootstrap intervals."""
    resamples: int = 1000
    """Bootstrap samples, drawn over groups."""
    seed: int = 0
    """Seed of the bootstrap."""
    resources: EvaluateResources = EvaluateResources()

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {self.confidence}")
        if self.resamples < 1:
            raise ValueError(f"resamples must be positive, got {self.resamples}")
