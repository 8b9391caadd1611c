"""Rows of each format, read back by the rules of the tool that they are for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mint_ray.artifacts import Artifact
from mint_ray.config.loader import UserError
from mint_ray.exports import FORMATS, export_pairs
from mint_ray.records import Message, PreferencePair
from tests.exports.samples import TRAIN, VALIDATION, WITH_IMAGES, make_pair, write_pairs

Reading = tuple[list[tuple[str, str]], str, str]
"""Turns of the prompt, the chosen answer and the rejected one, as a tool understands a row."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_pairs(tmp_path_factory.mktemp("pairs"), TRAIN, VALIDATION)


def reading_of(pair: PreferencePair) -> Reading:
    return [(turn.role, turn.content) for turn in pair.prompt], pair.chosen[0].content, pair.rejected[0].content


def load(path: Path, cache: Path) -> list[dict[str, Any]]:
    """Load rows as all four tools do, with the JSON reader of `datasets`."""
    from datasets import load_dataset

    rows: list[dict[str, Any]] = load_dataset(
        "json", data_files=str(path), split="train", cache_dir=str(cache)
    ).to_list()
    return rows


def exported(pairs: Artifact, form: str, folder: Path) -> list[list[dict[str, Any]]]:
    assert export_pairs(pairs.uri, form, str(folder / "to")) == {"train": 7, "validation": 2}
    return [load(folder / "to" / f"{split}.jsonl", folder / "cache") for split in ("train", "validation")]


def test_trl_reads_its_rows(pairs: Artifact, tmp_path: Path) -> None:
    from trl.data_utils import apply_chat_template, is_conversational

    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    for rows, expected in zip(exported(pairs, "trl", tmp_path), (TRAIN, VALIDATION), strict=True):
        for row, pair in zip(rows, expected, strict=True):
            assert list(row) == ["prompt", "chosen", "rejected"]
            assert is_conversational(row)
            prompt, chosen, rejected = reading_of(pair)
            text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in prompt)
            assert apply_chat_template(row, tokenizer) == {
                "prompt": f"{text}<|im_start|>assistant\n",
                "chosen": f"{chosen}<|im_end|>\n",
                "rejected": f"{rejected}<|im_end|>\n",
            }


def read_as_ms_swift(row: dict[str, Any]) -> Reading:
    """Read a row: `messages` is required, `rejected_response` replaces its last turn, other keys are not read."""
    assert set(row) == {"messages", "rejected_response"}
    *prompt, answer = row["messages"]
    assert answer["role"] == "assistant"
    assert all(turn["role"] in ("system", "user", "assistant") for turn in prompt)
    assert "system" not in [turn["role"] for turn in prompt[1:]]
    return [(turn["role"], turn["content"]) for turn in prompt], answer["content"], row["rejected_response"]


def test_ms_swift_reads_its_rows(pairs: Artifact, tmp_path: Path) -> None:
    for rows, expected in zip(exported(pairs, "ms-swift", tmp_path), (TRAIN, VALIDATION), strict=True):
        assert [read_as_ms_swift(row) for row in rows] == [reading_of(pair) for pair in expected]


def read_as_llamafactory(row: dict[str, Any], columns: dict[str, str]) -> Reading:
    """Read a row by the columns of `dataset_info.json`: an odd number of turns, alternating human and gpt."""
    turns, chosen, rejected = (row[columns[name]] for name in ("messages", "chosen", "rejected"))
    assert len(turns) % 2 == 1
    assert [turn["from"] for turn in turns] == [("human", "gpt")[at % 2] for at in range(len(turns))]
    assert chosen["from"] == rejected["from"] == "gpt"
    system = [("system", row[columns["system"]])] if row[columns["system"]] else []
    prompt = [({"human": "user", "gpt": "assistant"}[turn["from"]], turn["value"]) for turn in turns]
    return system + prompt, chosen["value"], rejected["value"]


def test_llamafactory_reads_its_rows(pairs: Artifact, tmp_path: Path) -> None:
    exported(pairs, "llamafactory", tmp_path)
    info = json.loads((tmp_path / "to" / "dataset_info.json").read_text())
    assert list(info) == ["mint_ray_train", "mint_ray_validation"]
    for entry, expected in zip(info.values(), (TRAIN, VALIDATION), strict=True):
        assert (entry["formatting"], entry["ranking"]) == ("sharegpt", True)
        rows = load(tmp_path / "to" / entry["file_name"], tmp_path / "cache")
        assert [read_as_llamafactory(row, entry["columns"]) for row in rows] == [reading_of(pair) for pair in expected]


def read_as_alignment_handbook(row: dict[str, Any]) -> Reading:
    """Read distilabel's columns: both conversations are the prompt and one answer; `prompt` is the first user turn."""
    assert set(row) == {"prompt", "prompt_id", "chosen", "rejected"}
    assert row["chosen"][:-1] == row["rejected"][:-1]
    prompt = [(turn["role"], turn["content"]) for turn in row["chosen"][:-1]]
    assert row["prompt"] == next(content for role, content in prompt if role == "user")
    assert row["prompt_id"] == hashlib.sha256(row["prompt"].encode("utf-8")).hexdigest()
    assert row["chosen"][-1]["role"] == row["rejected"][-1]["role"] == "assistant"
    return prompt, row["chosen"][-1]["content"], row["rejected"][-1]["content"]


def test_distilabel_rows_equal_those_of_its_own_steps(pairs: Artifact, tmp_path: Path) -> None:
    for rows, expected in zip(exported(pairs, "distilabel", tmp_path), (TRAIN, VALIDATION), strict=True):
        assert [read_as_alignment_handbook(row) for row in rows] == [reading_of(pair) for pair in expected]


def exported_with_images(form: str, folder: Path) -> list[dict[str, Any]]:
    artifact = write_pairs(folder, WITH_IMAGES, [])
    assert export_pairs(artifact.uri, form, str(folder / "to")) == {"train": 4}
    return load(folder / "to" / "train.jsonl", folder / "cache")


def test_trl_places_the_image_before_the_first_user_turn(tmp_path: Path) -> None:
    from trl.data_utils import prepare_multimodal_messages

    for row, pair in zip(exported_with_images("trl", tmp_path), WITH_IMAGES, strict=True):
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
    """Read images as ms-swift and LLaMA-Factory do: each placeholder takes the next image, and all are used."""
    blocks: list[tuple[str, str | None]] = []
    unused = list(images)
    for role, content in turns:
        before, *rest = content.split("<image>")
        if before:
            blocks.append((role, before))
        for text in rest:
            blocks += [(role, unused.pop(0)), (role, text)]
    assert unused == []
    return blocks


def test_ms_swift_places_the_image_at_its_placeholder(tmp_path: Path) -> None:
    for row, pair in zip(exported_with_images("ms-swift", tmp_path), WITH_IMAGES, strict=True):
        images = row.pop("images")
        turns, chosen, rejected = read_as_ms_swift(row)
        assert read_placeholders(turns, images) == with_image(pair)
        assert (chosen, rejected) == reading_of(pair)[1:]


def test_llamafactory_places_the_image_at_its_placeholder(tmp_path: Path) -> None:
    rows = exported_with_images("llamafactory", tmp_path)
    info = json.loads((tmp_path / "to" / "dataset_info.json").read_text())
    columns = info["mint_ray_train"]["columns"]
    for row, pair in zip(rows, WITH_IMAGES, strict=True):
        turns, chosen, rejected = read_as_llamafactory(row, columns)
        assert read_placeholders(turns, row[columns["images"]]) == with_image(pair)
        assert (chosen, rejected) == reading_of(pair)[1:]


@pytest.mark.parametrize(
    ("form", "pair", "message"),
    [
        (
            "llamafactory",
            make_pair(3, turns=2, last="assistant"),
            "record 'r3': prompt: turns of user and assistant must",
        ),
        ("llamafactory", make_pair(3, last="system"), "ending with the user, got system"),
        ("distilabel", make_pair(3, last="assistant"), "record 'r3': prompt: no user turn"),
        ("distilabel", WITH_IMAGES[3], "record 'r3': the prompt has an image, and distilabel"),
        (
            "trl",
            dataclasses.replace(WITH_IMAGES[3], image_uri="a.parquet#column=image&row=3"),
            "'r3': the image is a cell",
        ),
        (
            "ms-swift",
            dataclasses.replace(WITH_IMAGES[3], prompt=WITH_IMAGES[3].prompt[1:2]),
            "'r3': prompt: no user turn for the image",
        ),
        (
            "llamafactory",
            dataclasses.replace(WITH_IMAGES[3], chosen=[Message(role="assistant", content="1. '<image>'")]),
            "record 'r3': the assistant turn contains <image>",
        ),
    ],
)
def test_a_pair_that_a_format_cannot_represent_is_an_error_and_nothing_is_written(
    tmp_path: Path, form: str, pair: PreferencePair, message: str
) -> None:
    artifact = write_pairs(tmp_path, [*TRAIN, pair], [])
    with pytest.raises(UserError, match=message):
        export_pairs(artifact.uri, form, str(tmp_path / "to"))
    assert not (tmp_path / "to").exists()


def test_every_format_is_tested_here() -> None:
    assert set(FORMATS) == {"trl", "ms-swift", "llamafactory", "distilabel"}


def test_a_new_format_is_one_function_and_one_entry(
    pairs: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "labels", lambda pair: {"id": pair.record_id, "chosen": pair.chosen_labels})
    assert export_pairs(pairs.uri, "labels", str(tmp_path)) == {"train": 7, "validation": 2}
    lines = (tmp_path / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"id": pair.record_id, "chosen": ["a"]} for pair in VALIDATION]
