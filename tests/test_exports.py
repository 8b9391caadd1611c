"""Exported files are read back by the rules of the tools they are for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mint_ray import storage
from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.cli import cli
from mint_ray.config.loader import UserError, dump
from mint_ray.config.stages import Train
from mint_ray.exports import FORMATS, export_pairs, export_student
from mint_ray.records import Message, PreferencePair
from mint_ray.students import Student, load_model, load_tokenizer, save_adapter, student_revision
from tests.tiny import save_tiny_student

Reading = tuple[list[tuple[str, str]], str, str]
"""Turns of the prompt, the better answer, the worse one: what a tool must understand of a pair."""


def make_pair(number: int, *, system: bool = True, turns: int = 1, last: str = "user") -> PreferencePair:
    prompt = [Message(role="system", content="Keep to the format.")] if system else []
    roles = ["user", "assistant"] * turns
    prompt += [Message(role=role, content=f"{role} {number}:\n“é”\u2028 {at}") for at, role in enumerate(roles[:-1])]
    prompt[-1] = Message(role=last, content=prompt[-1].content)
    return PreferencePair(
        prompt=prompt,
        chosen=[Message(role="assistant", content=f"1. 'Noonan {number}'")],
        rejected=[Message(role="assistant", content=f"1. 'Marfan {number}'")],
        record_id=f"r{number}", split="train", teacher="t", sampler="hard", chosen_labels=["a"], rejected_labels=["b"],
    )  # fmt: skip


TRAIN = [make_pair(number, system=number % 2 == 0, turns=1 + number % 3) for number in range(7)]
VALIDATION = [make_pair(number) for number in range(7, 9)]


def write_pairs(root: Path | str, train: list[PreferencePair], validation: list[PreferencePair]) -> Artifact:
    artifact = open_artifact(str(root), "pair", {}, {})
    with artifact.write() as draft:
        draft.write_rows(PreferencePair, "train", train, rows_per_part=3)
        draft.write_rows(PreferencePair, "validation", validation)
    return artifact


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_pairs(tmp_path_factory.mktemp("pairs"), TRAIN, VALIDATION)


def meant(pair: PreferencePair) -> Reading:
    return [(turn.role, turn.content) for turn in pair.prompt], pair.chosen[0].content, pair.rejected[0].content


def load(path: Path, cache: Path) -> list[dict[str, Any]]:
    """As all four tools do it: with the JSON reader of `datasets`."""
    from datasets import load_dataset

    rows: list[dict[str, Any]] = load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(cache)
    ).to_list()
    return rows


def exported(pairs: Artifact, form: str, folder: Path) -> list[list[dict[str, Any]]]:
    assert export_pairs(pairs.uri, form, str(folder / "to")) == {"train": 7, "validation": 2}
    return [load(folder / "to" / f"{split}.jsonl", folder / "cache") for split in ("train", "validation")]


def test_trl_reads_what_was_written_for_it(pairs: Artifact, tmp_path: Path) -> None:
    from trl.data_utils import apply_chat_template, is_conversational

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    for rows, expected in zip(exported(pairs, "trl", tmp_path), (TRAIN, VALIDATION), strict=True):
        for row, pair in zip(rows, expected, strict=True):
            assert list(row) == ["prompt", "chosen", "rejected"]
            assert is_conversational(row)
            prompt, chosen, rejected = meant(pair)
            text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in prompt)
            assert apply_chat_template(row, tokenizer) == {
                "prompt": f"{text}<|im_start|>assistant\n",
                "chosen": f"{chosen}<|im_end|>\n",
                "rejected": f"{rejected}<|im_end|>\n",
            }


def read_as_ms_swift(row: dict[str, Any]) -> Reading:
    """`messages` is required, `rejected_response` stands for the last turn of it, other keys are not taken."""
    assert set(row) == {"messages", "rejected_response"}
    *prompt, answer = row["messages"]
    assert answer["role"] == "assistant"
    assert all(turn["role"] in ("system", "user", "assistant") for turn in prompt)
    assert "system" not in [turn["role"] for turn in prompt[1:]]
    return [(turn["role"], turn["content"]) for turn in prompt], answer["content"], row["rejected_response"]


def test_ms_swift_reads_what_was_written_for_it(pairs: Artifact, tmp_path: Path) -> None:
    for rows, expected in zip(exported(pairs, "ms-swift", tmp_path), (TRAIN, VALIDATION), strict=True):
        assert [read_as_ms_swift(row) for row in rows] == [meant(pair) for pair in expected]


def read_as_llamafactory(row: dict[str, Any], columns: dict[str, str]) -> Reading:
    """Columns by `dataset_info.json`, tags by default; human at odd places, gpt at even ones, an odd number in all."""
    turns, chosen, rejected = (row[columns[name]] for name in ("messages", "chosen", "rejected"))
    assert len(turns) % 2 == 1
    assert [turn["from"] for turn in turns] == [("human", "gpt")[at % 2] for at in range(len(turns))]
    assert chosen["from"] == rejected["from"] == "gpt"
    system = [("system", row[columns["system"]])] if row[columns["system"]] else []
    told = [({"human": "user", "gpt": "assistant"}[turn["from"]], turn["value"]) for turn in turns]
    return system + told, chosen["value"], rejected["value"]


def test_llamafactory_reads_what_was_written_for_it(pairs: Artifact, tmp_path: Path) -> None:
    exported(pairs, "llamafactory", tmp_path)
    info = json.loads((tmp_path / "to" / "dataset_info.json").read_text())
    assert list(info) == ["mint_ray_train", "mint_ray_validation"]
    for said, expected in zip(info.values(), (TRAIN, VALIDATION), strict=True):
        assert (said["formatting"], said["ranking"]) == ("sharegpt", True)
        rows = load(tmp_path / "to" / said["file_name"], tmp_path / "cache")
        assert [read_as_llamafactory(row, said["columns"]) for row in rows] == [meant(pair) for pair in expected]


def read_as_alignment_handbook(row: dict[str, Any]) -> Reading:
    """distilabel's columns: both conversations are the prompt and one answer; `prompt` is the first user turn."""
    assert set(row) == {"prompt", "prompt_id", "chosen", "rejected"}
    assert row["chosen"][:-1] == row["rejected"][:-1]
    prompt = [(turn["role"], turn["content"]) for turn in row["chosen"][:-1]]
    assert row["prompt"] == next(content for role, content in prompt if role == "user")
    assert row["prompt_id"] == hashlib.sha256(row["prompt"].encode("utf-8")).hexdigest()
    assert row["chosen"][-1]["role"] == row["rejected"][-1]["role"] == "assistant"
    return prompt, row["chosen"][-1]["content"], row["rejected"][-1]["content"]


def test_what_is_written_for_distilabel_is_what_its_own_steps_write(pairs: Artifact, tmp_path: Path) -> None:
    for rows, expected in zip(exported(pairs, "distilabel", tmp_path), (TRAIN, VALIDATION), strict=True):
        assert [read_as_alignment_handbook(row) for row in rows] == [meant(pair) for pair in expected]


SEEN = [
    dataclasses.replace(make_pair(number, system=number % 2 == 0, turns=1 + number % 2), image_uri=f"images/{number}.jpg")
    for number in range(4)
]  # fmt: skip


def exported_with_images(form: str, folder: Path) -> list[dict[str, Any]]:
    artifact = write_pairs(folder, SEEN, [])
    assert export_pairs(artifact.uri, form, str(folder / "to")) == {"train": 4}
    return load(folder / "to" / "train.jsonl", folder / "cache")


def test_trl_puts_the_image_ahead_of_the_first_user_turn(tmp_path: Path) -> None:
    from trl.data_utils import prepare_multimodal_messages

    for row, pair in zip(exported_with_images("trl", tmp_path), SEEN, strict=True):
        assert list(row) == ["prompt", "chosen", "rejected", "images"]
        blocks = [
            (turn["role"], block.get("image", block.get("text")))
            for turn in prepare_multimodal_messages(row["prompt"], images=row["images"])
            for block in turn["content"]
        ]
        assert blocks == with_image(pair)


def with_image(pair: PreferencePair) -> list[tuple[str, str | None]]:
    first = [turn.role for turn in pair.prompt].index("user")
    blocks: list[tuple[str, str | None]] = [(turn.role, turn.content) for turn in pair.prompt]
    return [*blocks[:first], ("user", pair.image_uri), *blocks[first:]]


def read_placeholders(turns: list[tuple[str, str]], images: list[str]) -> list[tuple[str, str | None]]:
    """As ms-swift and LLaMA-Factory do: each placeholder takes the next image, and none may be left of either."""
    blocks: list[tuple[str, str | None]] = []
    left = list(images)
    for role, content in turns:
        before, *rest = content.split("<image>")
        if before:
            blocks.append((role, before))
        for text in rest:
            blocks += [(role, left.pop(0)), (role, text)]
    assert left == []
    return blocks


def test_ms_swift_finds_the_image_where_its_placeholder_stands(tmp_path: Path) -> None:
    for row, pair in zip(exported_with_images("ms-swift", tmp_path), SEEN, strict=True):
        images = row.pop("images")
        turns, chosen, rejected = read_as_ms_swift(row)
        assert read_placeholders(turns, images) == with_image(pair)
        assert (chosen, rejected) == meant(pair)[1:]


def test_llamafactory_finds_the_image_where_its_placeholder_stands(tmp_path: Path) -> None:
    rows = exported_with_images("llamafactory", tmp_path)
    info = json.loads((tmp_path / "to" / "dataset_info.json").read_text())
    columns = info["mint_ray_train"]["columns"]
    for row, pair in zip(rows, SEEN, strict=True):
        turns, chosen, rejected = read_as_llamafactory(row, columns)
        assert read_placeholders(turns, row[columns["images"]]) == with_image(pair)
        assert (chosen, rejected) == meant(pair)[1:]


@pytest.mark.parametrize("form", FORMATS)
def test_a_split_without_pairs_gets_no_file(tmp_path: Path, form: str) -> None:
    artifact = write_pairs(tmp_path, TRAIN, [])
    assert export_pairs(artifact.uri, form, str(tmp_path / "to")) == {"train": 7}
    names = {path.name for path in (tmp_path / "to").iterdir()}
    assert names == {"train.jsonl"} | ({"dataset_info.json"} if form == "llamafactory" else set())


@pytest.mark.parametrize(
    ("form", "pair", "message"),
    [
        ("llamafactory", make_pair(3, turns=2, last="assistant"), "record 'r3': prompt: user and assistant must take"),
        ("llamafactory", make_pair(3, last="system"), "the user come last, got system"),
        ("distilabel", make_pair(3, last="assistant"), "record 'r3': prompt: no user turn"),
        ("distilabel", SEEN[3], "record 'r3': it is shown an image, and distilabel's columns have none"),
        ("trl", dataclasses.replace(SEEN[3], image_uri="a.parquet#column=image&row=3"), "'r3': its image is a cell"),
        ("ms-swift", dataclasses.replace(SEEN[3], prompt=SEEN[3].prompt[1:2]), "'r3': prompt: no user turn to show"),
        (
            "llamafactory",
            dataclasses.replace(SEEN[3], chosen=[Message(role="assistant", content="1. '<image>'")]),
            "record 'r3': its assistant turn says <image>",
        ),
    ],
)
def test_a_pair_that_a_format_cannot_hold_is_named_and_nothing_is_written(
    tmp_path: Path, form: str, pair: PreferencePair, message: str
) -> None:
    artifact = write_pairs(tmp_path, [*TRAIN, pair], [])
    with pytest.raises(UserError, match=message):
        export_pairs(artifact.uri, form, str(tmp_path / "to"))
    assert not (tmp_path / "to").exists()


def test_a_target_that_holds_something_is_refused(pairs: Artifact, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty, it holds .*mine\.txt"):
        export_pairs(pairs.uri, "trl", str(tmp_path))
    (tmp_path / "empty").mkdir()
    assert export_pairs(pairs.uri, "trl", str(tmp_path / "empty"))["train"] == 7


def test_only_finished_pairs_and_known_formats_are_exported(pairs: Artifact, tmp_path: Path) -> None:
    other = open_artifact(str(tmp_path), "score", {}, {})
    with other.write():
        pass
    for uri, form, message in (
        (other.uri, "trl", "a score artifact; only pairs"),
        (str(tmp_path / "none"), "trl", r"none: no manifest\.json"),
        (pairs.uri, "alpaca", "format: got 'alpaca'; expected one of trl, ms-swift"),
    ):
        with pytest.raises(UserError, match=message):
            export_pairs(uri, form, str(tmp_path / "to"))


def test_the_command_tells_counts(pairs: Artifact, tmp_path: Path) -> None:
    to = str(tmp_path / "to")
    done = CliRunner().invoke(cli, ["export", pairs.uri, "--format", "ms-swift", "--to", to])
    assert done.output.splitlines() == ["train: 7", "validation: 2", f"ms-swift: {to}"]


@pytest.mark.s3
def test_pairs_go_from_object_storage_to_object_storage(s3_root: str) -> None:
    artifact = write_pairs(s3_root, TRAIN, VALIDATION)
    to = f"{s3_root}/to"
    export_pairs(artifact.uri, "llamafactory", to)
    assert [uri.removeprefix(to) for uri in storage.list_files(to)] == [
        "/dataset_info.json",
        "/train.jsonl",
        "/validation.jsonl",
    ]
    assert len(storage.read_bytes(f"{to}/train.jsonl").splitlines()) == 7
    with pytest.raises(UserError, match="not empty"):
        export_pairs(artifact.uri, "llamafactory", to)


@pytest.fixture(scope="module", params=[4, None], ids=["adapter", "whole"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Student]:
    """A train artifact of a tiny student, or of all its weights, and what its evaluation would leave."""
    root = tmp_path_factory.mktemp("trained")
    student = Student(model_id=str(save_tiny_student(root / "base")), lora_rank=request.param, lora_alpha=8)
    inputs = {"tokens": "tokenize-0", "student": student_revision(student)}
    artifact = open_artifact(str(root), "train", {"train": dump(Train(student=student))}, inputs)
    with artifact.write() as draft:
        model = load_model(student, trainable=True)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        save_adapter(model, load_tokenizer(student), draft.folder / "adapter")
    with open_artifact(str(root), "evaluate", {}, {"student": artifact.name}).write() as draft:
        draft.counts.update(records=6, groups=5)
        draft.metrics["aligned student"] = {"readable": {"value": 0.5, "low": 0.25, "high": 0.75}}
    return artifact, student


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.arange(3, 40).reshape(1, -1)).logits
    return logits


def test_an_exported_student_is_read_without_us_and_is_the_one_that_was_trained(
    trained: tuple[Artifact, Student], tmp_path: Path
) -> None:
    artifact, student = trained
    learned = load_model(student, adapter=Path(artifact.file_uri("adapter")))
    export_student(artifact.uri, str(tmp_path / "merged"), merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", use_safetensors=True)
    torch.testing.assert_close(logits_of(merged), logits_of(learned))
    assert not torch.allclose(logits_of(merged), logits_of(load_model(student)), atol=1e-2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.get_vocab() == load_tokenizer(student).get_vocab()
    assert tokenizer.chat_template == load_tokenizer(student).chat_template
    assert not [path for path in (tmp_path / "merged").iterdir() if "adapter" in path.name or path.suffix == ".bin"]
    assert "every weight of which was aligned" in (tmp_path / "merged" / "README.md").read_text() or student.lora_rank


def test_low_rank_weights_are_left_apart_where_there_are_any(trained: tuple[Artifact, Student], tmp_path: Path) -> None:
    artifact, student = trained
    if student.lora_rank is None:
        with pytest.raises(UserError, match="every weight was trained, so there is no adapter to be had apart"):
            export_student(artifact.uri, str(tmp_path / "adapter"), merge=False)
        assert not (tmp_path / "adapter").exists()
        return
    export_student(artifact.uri, str(tmp_path / "adapter"), merge=False)
    laid = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student.model_id), tmp_path / "adapter")
    torch.testing.assert_close(
        logits_of(laid), logits_of(load_model(student, adapter=Path(artifact.file_uri("adapter"))))
    )
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "Research use only; not a diagnostic device." in card


def test_a_student_is_exported_from_the_command_line_with_its_metrics(
    trained: tuple[Artifact, Student], tmp_path: Path
) -> None:
    artifact, _ = trained
    [evaluated] = Path(artifact.root).glob("evaluate-*")
    to = str(tmp_path / "to")
    done = CliRunner().invoke(cli, ["export", artifact.uri, "--to", to, "--evaluate", str(evaluated)])
    assert done.exception is None, done.exception
    assert done.stdout.splitlines()[-1] == f"student: {to}"
    assert "| Readable answers | 0.50" in (tmp_path / "to" / "README.md").read_text()


def test_what_cannot_be_exported_as_a_student_is_told_before_anything_is_written(
    trained: tuple[Artifact, Student], pairs: Artifact, tmp_path: Path
) -> None:
    artifact, student = trained
    other = open_artifact(str(tmp_path), "evaluate", {}, {"student": "train-0"})
    with other.write():
        pass
    moved = open_artifact(str(tmp_path), "train", artifact.config, {**artifact.inputs, "student": "ab" * 32})
    with moved.write() as draft:
        draft.write_text("adapter/nothing.txt", "")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    cases: list[tuple[str, str, str | None, str]] = [
        (pairs.uri, "to", None, "a pair artifact holds no student; pairs take a format"),
        (artifact.uri, "to", other.uri, f"no evaluation of {artifact.name}"),
        (artifact.uri, "full", None, "not empty"),
    ]
    if student.lora_rank is not None:
        cases.append((moved.uri, "to", None, f"its weights are not those that {moved.name} was trained on"))
    for uri, to, evaluated, message in cases:
        with pytest.raises(UserError, match=message):
            export_student(uri, str(tmp_path / to), merge=True, evaluated=evaluated)
    assert not (tmp_path / "to").exists()
