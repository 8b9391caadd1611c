"""Pairs are tokenized on the workers, once for all trainings that read the same tokens, also after failures."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mint_ray.artifacts import Artifact, open_artifact, verify
from mint_ray.config.loader import UserError, replace
from mint_ray.config.stages import Train
from mint_ray.objectives.config import Dpo, Orpo
from mint_ray.records import Message, PreferencePair
from mint_ray.stages import tokenize as module
from mint_ray.stages.tokenize import PairsPart, TokenizingWorker, TokensPart, tokenize_pairs
from mint_ray.students.config import Student
from mint_ray.students.loading import load_model
from mint_ray.trainers.config import TrainerArguments, TrainResources
from mint_ray.trainers.examples import StoredExamples
from mint_ray.trainers.tokenization import tokenize_pairs as to_tokens
from tests.stages.inputs import interrupt_before_publishing, make_pair
from tests.tiny import save_tiny_student, tiny_tokenizer

pytestmark = [pytest.mark.ray]

NAMES = ["Noonan", "Marfan", "Kabuki", "Williams", "Rett"]


def make_noted_pair(number: int, other: int) -> PreferencePair:
    """Return one pair of record `number`, whose note is the longer the greater the number."""
    note = f"Patient {number}: " + "seizures and short stature, " * 2 * number
    return make_pair(
        number,
        f"{note}\n\nWhich diseases?",
        f"1. {NAMES[number % 5]}",
        f"1. {NAMES[(number + other + 1) % 5]} syndrome",
        note_span=[0, len(note)],
    )


def make_pairs(numbers: range) -> list[PreferencePair]:
    """Return one to three pairs of each record."""
    return [make_noted_pair(number, other) for number in numbers for other in range(1 + number % 3)]


def write_pairs(root: Path | str, train: list[PreferencePair], *, separate: bool = False) -> Artifact:
    """Write parts of about four pairs; with `separate`, the pairs of a record may be in two parts."""
    artifact = open_artifact(str(root), "pair", {"separate": separate, "rows": len(train)}, {})
    parts: list[list[PreferencePair]] = [[]]
    for pair in train:
        if len(parts[-1]) >= 4 and (separate or pair.record_id != parts[-1][-1].record_id):
            parts.append([])
        parts[-1].append(pair)
    with artifact.write() as draft:
        for number, rows in enumerate(parts):
            draft.placed.append(artifact.write_part(f"train/part-{number:05d}.parquet", PreferencePair, rows))
        draft.write_rows(PreferencePair, "validation", make_pairs(range(12, 14)))
    return artifact


def make_config(student: Path | str, **arguments: Any) -> Train:
    return Train(
        student=Student(model_id=str(student), lora_rank=2),
        trainer=TrainerArguments(**({"max_length": 200} | arguments)),
        resources=TrainResources(cpus_per_worker=1, per_device_eval_batch_size=3),
    )


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_pairs(tmp_path_factory.mktemp("pairs"), make_pairs(range(12)))


@pytest.fixture(scope="module")
def first(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, student: Path, pairs: Artifact) -> Artifact:
    return tokenize_pairs(str(tmp_path_factory.mktemp("first")), make_config(student), pairs)


def test_every_record_is_tokenized_as_in_one_process(first: Artifact) -> None:
    expected, stats = to_tokens(make_pairs(range(12)), tiny_tokenizer(), 200)
    found = StoredExamples.from_artifact(first, "train")
    assert [found[index] for index in range(len(found))] == expected
    assert 0 < stats.dropped["prompt_too_long"] < 12
    assert len(first.table_files("train")) > 2
    assert verify(first.uri) == []


def test_every_record_is_in_the_output_or_counted_with_a_reason(first: Artifact) -> None:
    counts, dropped = first.manifest.counts, first.manifest.dropped
    examples = StoredExamples.from_artifact(first, "train")
    rows = [examples[index] for index in range(len(examples))]
    assert counts["records_train"] == len(rows)
    assert counts["records_train"] + counts["records_validation"] + sum(dropped.values()) == 14
    assert counts["pairs_train"] == sum(len(row.pairs) for row in rows)
    assert counts["tokens_train"] == sum(len(row.prompt_ids) + sum(map(len, row.completions)) for row in rows)
    assert counts["truncated_train"] == counts["truncated_validation"] == 0


def test_truncated_records_are_counted_by_split(
    first: Artifact, tmp_path: Path, student: Path, pairs: Artifact
) -> None:
    tokens = tokenize_pairs(str(tmp_path), make_config(student, overlong="truncate"), pairs)
    assert tokens.manifest.dropped == {}
    assert tokens.manifest.counts["records_train"] == 12
    truncated = {split: tokens.manifest.counts[f"truncated_{split}"] for split in ("train", "validation")}
    assert truncated["validation"] == 2
    assert sum(truncated.values()) == first.manifest.dropped["prompt_too_long"]


def test_a_training_with_another_beta_does_not_run_the_stage_again(
    first: Artifact, pairs: Artifact, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "map_parts", lambda *_, **__: pytest.fail("the stage ran again"))
    config = replace(make_config(student), {"trainer.objective.beta": 0.9})
    assert tokenize_pairs(first.root, config, pairs).uri == first.uri


class DiesOnce(TokenizingWorker):
    """A worker whose process ends once, after it has written the second part and before it returns."""

    def work(self, part: PairsPart) -> TokensPart:
        result = super().work(part)
        marker = Path(self.artifact.root) / "died"
        if part.path == "train/part-00001.parquet" and not marker.exists():
            marker.touch()
            os._exit(1)
        return result


def test_a_worker_failure_changes_no_byte(
    first: Artifact, pairs: Artifact, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TokenizingWorker", DiesOnce)
    tokens = tokenize_pairs(str(tmp_path), make_config(student), pairs)
    assert (tmp_path / "died").exists()
    assert tokens.manifest.files == first.manifest.files
    assert tokens.manifest.counts == first.manifest.counts
    assert verify(tokens.uri) == []


def test_a_run_after_an_interruption_removes_files_that_are_not_its_own(
    first: Artifact, pairs: Artifact, student: Path, tmp_path: Path
) -> None:
    with interrupt_before_publishing("tokenize"):
        tokenize_pairs(str(tmp_path), make_config(student), pairs)
    folder = tmp_path / first.name
    assert (folder / "train").is_dir()
    (folder / "train" / "part-00099-000.parquet").write_text("from an older run")
    tokens = tokenize_pairs(str(tmp_path), make_config(student), pairs)
    assert tokens.manifest.files == first.manifest.files
    assert verify(tokens.uri) == []


def test_the_driver_reads_no_rows(
    ray_cluster: None, pairs: Artifact, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "read_part", lambda uri: pytest.fail(f"the driver read {uri}"))
    monkeypatch.setattr(Artifact, "rows", lambda *_: pytest.fail("the driver read rows"))
    assert tokenize_pairs(str(tmp_path), make_config(student), pairs).is_complete


def test_reference_logps_are_those_of_the_base_student(
    ray_cluster: None, pairs: Artifact, student: Path, tmp_path: Path
) -> None:
    # one actor takes both CPUs, and there is more work than one block
    config = replace(
        make_config(student, objective=Dpo()), {"resources.cpus_per_worker": 2, "resources.num_workers": 3}
    )
    tokens = tokenize_pairs(str(tmp_path), config, pairs)
    examples = StoredExamples.from_artifact(tokens, "train")
    assert len(examples) > 4
    model = load_model(Student(model_id=str(student)))
    for index in range(len(examples)):
        example = examples[index]
        assert example.reference_logps is not None
        for completion, logp in zip(example.completions, example.reference_logps, strict=True):
            ids = torch.tensor([example.prompt_ids + completion])
            with torch.no_grad():
                logps_TV = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), dim=-1)
            expected = logps_TV.gather(1, ids[0, 1:, None])[-len(completion) :].sum()
            assert logp == pytest.approx(float(expected), rel=1e-5)


def test_an_objective_without_a_reference_gets_no_reference_logps(first: Artifact) -> None:
    assert StoredExamples.from_artifact(first, "train")[0].reference_logps is None


def test_a_length_that_leaves_no_record_is_an_error_that_names_the_longest(
    ray_cluster: None, pairs: Artifact, student: Path, tmp_path: Path
) -> None:
    expected = r"^train\.trainer\.max_length: no training record has 9 tokens or fewer; the longest, 'r13', has \d+$"
    with pytest.raises(UserError, match=expected):
        tokenize_pairs(str(tmp_path), make_config(student, max_length=9), pairs)


def test_a_user_error_of_a_worker_has_the_same_message_here(ray_cluster: None, student: Path, tmp_path: Path) -> None:
    rows = make_pairs(range(6))
    rows[4] = dataclasses.replace(rows[4], rejected=[Message(role="assistant", content=" ")])
    with pytest.raises(UserError, match=r"^record 'r\d': rejected is empty$") as caught:
        tokenize_pairs(str(tmp_path), make_config(student), write_pairs(tmp_path, rows))
    assert type(caught.value) is UserError


def test_a_student_without_a_chat_template_is_named(ray_cluster: None, pairs: Artifact, tmp_path: Path) -> None:
    folder = save_tiny_student(tmp_path / "student")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"its tokenizer has no chat template; use an instruct model$"):
        tokenize_pairs(str(tmp_path), make_config(folder), pairs)


def test_a_record_with_pairs_in_two_parts_is_an_error(ray_cluster: None, student: Path, tmp_path: Path) -> None:
    # records of 1, 2, 3, 1, 2, 3 pairs in parts of four: r2 continues in the second
    pairs = write_pairs(tmp_path, make_pairs(range(6)), separate=True)
    with pytest.raises(
        UserError, match=r"record 'r2': its pairs are in train/part-00000\.parquet and train/part-00001"
    ):
        tokenize_pairs(str(tmp_path), make_config(student, objective=Orpo()), pairs)


@pytest.mark.s3
def test_workers_write_to_object_storage(s3_root: str, student: Path, first: Artifact) -> None:
    # in a process of its own, because workers get the credentials that their driver was started with
    write_pairs(s3_root, make_pairs(range(12)))
    command = [sys.executable, "-m", "tests.stages.test_tokenize", s3_root, str(student)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    tokens = open_artifact(s3_root, "tokenize", first.config, first.inputs)
    assert tokens.manifest.files == first.manifest.files
    assert verify(tokens.uri) == []
    stored, local = StoredExamples.from_artifact(tokens, "train"), StoredExamples.from_artifact(first, "train")
    assert [stored[index] for index in range(len(stored))] == [local[index] for index in range(len(local))]


if __name__ == "__main__":
    root, folder = sys.argv[1:]
    tokenize_pairs(root, make_config(folder), open_artifact(root, "pair", {"separate": False, "rows": 24}, {}))
