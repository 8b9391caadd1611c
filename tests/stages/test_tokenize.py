"""Pairs become tokens on the workers, once for every training that reads them alike, whoever dies meanwhile."""

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
from mint_ray.stages.tokenize import PairsPart, TokenizingActor, TokensPart, tokenize_pairs
from mint_ray.students import load_model
from mint_ray.students.config import Student
from mint_ray.trainers.config import Arguments, TrainResources
from mint_ray.trainers.examples import StoredExamples
from mint_ray.trainers.tokenization import tokenize_pairs as to_tokens
from tests.tiny import save_tiny_student, tiny_tokenizer

pytestmark = [pytest.mark.ray]

NAMES = ["Noonan", "Marfan", "Kabuki", "Williams", "Rett"]


def make_pair(number: int, other: int) -> PreferencePair:
    """One pair of record `number`, whose note grows longer with it."""
    note = f"Patient {number}: " + "seizures and short stature, " * 2 * number
    return PreferencePair(
        prompt=[Message(role="user", content=f"{note}\n\nWhich diseases?")],
        chosen=[Message(role="assistant", content=f"1. {NAMES[number % 5]}")],
        rejected=[Message(role="assistant", content=f"1. {NAMES[(number + other + 1) % 5]} syndrome")],
        record_id=f"r{number}", split="train", teacher="t", sampler="hard", chosen_labels=["a"], rejected_labels=["b"],
        note_span=[0, len(note)],
    )  # fmt: skip


def make_pairs(numbers: range) -> list[PreferencePair]:
    """One to three pairs of each record."""
    return [make_pair(number, other) for number in numbers for other in range(1 + number % 3)]


def write_pairs(root: Path | str, train: list[PreferencePair], *, apart: bool = False) -> Artifact:
    """Parts of about four pairs; `apart` parts records too."""
    artifact = open_artifact(str(root), "pair", {"apart": apart, "rows": len(train)}, {})
    with artifact.write() as draft:
        together = None if apart else (lambda pair: pair.record_id)
        draft.write_rows(PreferencePair, "train", train, rows_per_part=4, together=together)
        draft.write_rows(PreferencePair, "validation", make_pairs(range(12, 14)))
    return artifact


def make_config(student: Path | str, **arguments: Any) -> Train:
    return Train(
        student=Student(model_id=str(student), lora_rank=2),
        trainer=Arguments(**({"max_length": 200} | arguments)),
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


def test_every_record_is_there_as_it_is_tokenised_alone(first: Artifact) -> None:
    expected, tally = to_tokens(make_pairs(range(12)), tiny_tokenizer(), 200)
    found = StoredExamples.of(first, "train")
    assert [found[index] for index in range(len(found))] == expected
    assert 0 < tally.dropped["prompt_too_long"] < 12
    assert len(first.table_files("train")) > 2
    assert verify(first.uri) == []


def test_what_went_in_came_out_or_has_a_reason(first: Artifact) -> None:
    counts, dropped = first.manifest.counts, first.manifest.dropped
    examples = StoredExamples.of(first, "train")
    rows = [examples[index] for index in range(len(examples))]
    assert counts["records_train"] == len(rows)
    assert counts["records_train"] + counts["records_validation"] + sum(dropped.values()) == 14
    assert counts["pairs_train"] == sum(len(row.pairs) for row in rows)
    assert counts["tokens_train"] == sum(len(row.prompt_ids) + sum(map(len, row.completions)) for row in rows)
    assert counts["cut_train"] == counts["cut_validation"] == 0


def test_a_cut_is_counted_by_split(ray_cluster: None, tmp_path: Path, student: Path, pairs: Artifact) -> None:
    made = tokenize_pairs(str(tmp_path), make_config(student, overlong="cut"), pairs)
    dropped = tokenize_pairs(str(tmp_path), make_config(student), pairs)
    assert made.manifest.dropped == {}
    assert made.manifest.counts["records_train"] == 12
    cut = {split: made.manifest.counts[f"cut_{split}"] for split in ("train", "validation")}
    assert cut["validation"] == 2
    assert sum(cut.values()) == dropped.manifest.dropped["prompt_too_long"]


def test_trainings_that_read_the_same_tokens_share_them(
    first: Artifact, pairs: Artifact, student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "map_parts", lambda *_, **__: pytest.fail("the stage ran again"))
    same = {
        "trainer.objective.beta": 0.9, "trainer.learning_rate": 1.0, "trainer.seed": 5, "trainer.max_steps": 3,
        "student.lora_rank": 8, "student.dtype": "bfloat16", "resources.num_workers": 7,
    }  # fmt: skip
    config = replace(make_config(student), same)
    assert tokenize_pairs(first.root, config, pairs).uri == first.uri


def test_what_changes_the_rows_changes_the_name(
    pairs: Artifact, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def note(artifact: Artifact, *_: Any) -> list[TokensPart]:
        names.append(artifact.name)
        raise UserError("no need to run")

    monkeypatch.setattr(module, "_tokenize", note)
    changes: list[dict[str, Any]] = [
        {},
        {"trainer.max_length": 201},
        {"trainer.overlong": "cut"},
        {"trainer.objective": {"kind": "dpo"}},
        {"trainer.objective": {"kind": "dpo"}, "student.dtype": "bfloat16"},
        {"trainer.objective": {"kind": "dpo"}, "trainer.bf16": True},
    ]
    for change in changes:
        with pytest.raises(UserError, match="no need"):
            tokenize_pairs(str(tmp_path), replace(make_config(student), change), pairs)
    assert len(set(names)) == len(changes)


class DiesOnce(TokenizingActor):
    """Its worker is killed when it has written the second part, before it could say so."""

    def work(self, part: PairsPart) -> TokensPart:
        done = super().work(part)
        marker = Path(self.artifact.root) / "died"
        if part.path == "train/part-00001.parquet" and not marker.exists():
            marker.touch()
            os._exit(1)
        return done


def test_a_worker_that_dies_changes_no_byte(
    first: Artifact, pairs: Artifact, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TokenizingActor", DiesOnce)
    made = tokenize_pairs(str(tmp_path), make_config(student), pairs)
    assert (tmp_path / "died").exists()
    assert made.manifest.files == first.manifest.files
    assert made.manifest.counts == first.manifest.counts
    assert verify(made.uri) == []


def test_a_run_after_one_that_died_is_as_if_it_had_not_been(
    first: Artifact, pairs: Artifact, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Artifact, "_publish", die)
        tokenize_pairs(str(tmp_path), make_config(student), pairs)
    left = tmp_path / first.name
    assert (left / "train").is_dir()
    (left / "train" / "part-00099-000.parquet").write_text("left by an older run")
    made = tokenize_pairs(str(tmp_path), make_config(student), pairs)
    assert made.manifest.files == first.manifest.files
    assert verify(made.uri) == []


def test_the_driver_reads_no_rows(
    ray_cluster: None, pairs: Artifact, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "read_part", lambda uri: pytest.fail(f"the driver read {uri}"))
    monkeypatch.setattr(Artifact, "rows", lambda *_: pytest.fail("the driver read rows"))
    assert tokenize_pairs(str(tmp_path), make_config(student), pairs).is_complete


def test_reference_logps_are_those_of_the_base_student(
    ray_cluster: None, pairs: Artifact, student: Path, tmp_path: Path
) -> None:
    # one actor takes both processors, and there is more work than one block
    config = replace(
        make_config(student, objective=Dpo()), {"resources.cpus_per_worker": 2, "resources.num_workers": 3}
    )
    made = tokenize_pairs(str(tmp_path), config, pairs)
    examples = StoredExamples.of(made, "train")
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


def test_no_reference_is_worked_out_where_none_is_asked_for(first: Artifact) -> None:
    assert StoredExamples.of(first, "train")[0].reference_logps is None


def test_a_length_that_leaves_nothing_is_refused_with_the_longest_record(
    ray_cluster: None, pairs: Artifact, student: Path, tmp_path: Path
) -> None:
    expected = r"^train\.trainer\.max_length: no record to train on has 9 tokens or fewer; the longest, 'r13', has \d+$"
    with pytest.raises(UserError, match=expected):
        tokenize_pairs(str(tmp_path), make_config(student, max_length=9), pairs)


def test_an_error_on_a_worker_is_one_line_here(ray_cluster: None, student: Path, tmp_path: Path) -> None:
    rows = make_pairs(range(6))
    rows[4] = dataclasses.replace(rows[4], rejected=[Message(role="assistant", content=" ")])
    with pytest.raises(UserError, match=r"^record 'r\d': rejected is empty$") as caught:
        tokenize_pairs(str(tmp_path), make_config(student), write_pairs(tmp_path, rows))
    assert type(caught.value) is UserError


def test_a_student_without_a_chat_template_is_named(ray_cluster: None, pairs: Artifact, tmp_path: Path) -> None:
    folder = save_tiny_student(tmp_path / "student")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"its tokenizer has no chat template; take an instruct model$"):
        tokenize_pairs(str(tmp_path), make_config(folder), pairs)


def test_a_record_that_lies_in_two_parts_is_refused(ray_cluster: None, student: Path, tmp_path: Path) -> None:
    # records of 1, 2, 3, 1, 2, 3 pairs in parts of four: r2 goes on in the second
    apart = write_pairs(tmp_path, make_pairs(range(6)), apart=True)
    with pytest.raises(
        UserError, match=r"record 'r2': its pairs lie in train/part-00000\.parquet and train/part-00001"
    ):
        tokenize_pairs(str(tmp_path), make_config(student, objective=Orpo()), apart)


@pytest.mark.s3
def test_workers_write_to_object_storage(s3_root: str, student: Path, first: Artifact) -> None:
    # in a process of its own: workers get the credentials that their driver started with
    write_pairs(s3_root, make_pairs(range(12)))
    command = [sys.executable, "-m", "tests.stages.test_tokenize", s3_root, str(student)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    made = open_artifact(s3_root, "tokenize", first.config, first.inputs)
    assert made.manifest.files == first.manifest.files
    assert verify(made.uri) == []
    stored, local = StoredExamples.of(made, "train"), StoredExamples.of(first, "train")
    assert [stored[index] for index in range(len(stored))] == [local[index] for index in range(len(local))]


if __name__ == "__main__":
    root, folder = sys.argv[1:]
    tokenize_pairs(root, make_config(folder), open_artifact(root, "pair", {"apart": False, "rows": 24}, {}))
