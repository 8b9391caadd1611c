"""Hand on what a run made: pairs in the columns of other trainers, an aligned student in the form of the Hub."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mint_ray import storage
from mint_ray.artifacts import Manifest, read_manifest, read_part
from mint_ray.config.loader import UserError, from_data
from mint_ray.images import CELL
from mint_ray.records import Message, PreferencePair, from_table
from mint_ray.reports.card import CARD
from mint_ray.reports.model_card import describe_student
from mint_ray.students import Student, check_student, student_revision

SPLITS = ("train", "validation")
DATASET_INFO = "dataset_info.json"
PLACEHOLDER = "<image>"
"""Where ms-swift and LLaMA-Factory put an image into a turn."""


def export_pairs(uri: str, form: str, to: str) -> dict[str, int]:
    """Write one JSONL file per split that has pairs, part by part, below `to`; returns pairs by split.

    `llamafactory` adds the `dataset_info.json` by which the files are named there. Nothing is written below `to`
    before every pair has been read. Raises UserError for an unknown format, an artifact that holds no pairs, a target
    that holds something, or a pair that the format cannot hold.
    """
    if form not in FORMATS:
        raise UserError(f"format: got {form!r}; expected one of {', '.join(FORMATS)}")
    manifest = read_manifest(uri)
    if manifest.stage != "pair":
        raise UserError(f"{uri}: a {manifest.stage} artifact; only pairs are exported")
    _check_empty(to)
    counts, seen = {}, False
    with tempfile.TemporaryDirectory(prefix="mint-ray-") as folder:
        for split in SPLITS:
            count, with_images = _write_split(uri, manifest, split, FORMATS[form], Path(folder))
            if count:
                counts[split] = count
            seen |= with_images
        if form == "llamafactory":
            (Path(folder) / DATASET_INFO).write_text(json.dumps(_dataset_info(list(counts), seen), indent=2))
        # what tells of the files comes after them
        for path in sorted(Path(folder).iterdir(), key=lambda path: (path.name == DATASET_INFO, path.name)):
            storage.upload(str(path), storage.join(to, path.name))
    return counts


def export_student(uri: str, to: str, *, merge: bool, evaluated: str | None = None) -> None:
    """Write the student of a train artifact below `to`, as `from_pretrained` reads it, with tokenizer and model card.

    `merge` lays what was learned into the base weights, which must be at hand; without it the folder holds the low-rank
    weights alone. `evaluated` is the URI of an evaluate artifact of this student, whose metrics the card then tells.
    Raises UserError for another artifact, a target that holds something, or a base that is not the one trained on.
    """
    manifest = read_manifest(uri)
    if manifest.stage != "train":
        hint = "; pairs take a format" if manifest.stage == "pair" else ""
        raise UserError(f"{uri}: a {manifest.stage} artifact holds no student{hint}")
    student = from_data(Student, manifest.config["train"]["student"], where=uri)
    if student.lora_rank is None and not merge:
        raise UserError(f"{uri}: every weight was trained, so there is no adapter to be had apart")
    measured = read_manifest(evaluated) if evaluated else None
    name = storage.absolute(uri).rpartition("/")[2]
    if measured and (measured.stage != "evaluate" or measured.inputs["student"] != name):
        raise UserError(f"{evaluated}: no evaluation of {name}")
    _check_empty(to)
    if merge and student.lora_rank is not None:
        check_student(student)
        if student_revision(student) != manifest.inputs["student"]:
            raise UserError(f"model_id: {student.model_id}: its weights are not those that {name} was trained on")
    with tempfile.TemporaryDirectory(prefix="mint-ray-") as scratch:
        learned, folder = Path(scratch) / "learned", Path(scratch) / "student"
        storage.download_folder(storage.join(uri, "adapter"), str(learned))
        if merge and student.lora_rank is not None:
            from mint_ray.students import load_model, load_processor, save_adapter

            save_adapter(load_model(student, adapter=learned), load_processor(student), folder)
        else:
            learned.rename(folder)
        (folder / CARD).write_text(describe_student(uri, manifest, merged=merge, evaluate=measured), encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        # what tells of the files comes after them
        for path in sorted(files, key=lambda path: path.name == CARD):
            storage.upload(str(path), storage.join(to, path.relative_to(folder).as_posix()))


def to_trl(pair: PreferencePair) -> dict[str, Any]:
    """TRL's conversational preference columns with an explicit prompt (huggingface.co/docs/trl/dataset_formats).

    Its collators put `images` ahead of the first user turn themselves.
    """
    return {
        "prompt": _turns(pair.prompt), "chosen": _turns(pair.chosen), "rejected": _turns(pair.rejected), **_images(pair)
    }  # fmt: skip


def to_ms_swift(pair: PreferencePair) -> dict[str, Any]:
    """ms-swift's standard columns: the conversation with the better answer, and the worse one as text.

    swift.readthedocs.io/en/latest/Customization/Custom-dataset.html, "DPO/ORPO/CPO/SimPO/RM" and "Multimodal".
    """
    return {
        "messages": [*_turns(_placed(pair)), {"role": "assistant", "content": _answer(pair, pair.chosen)}],
        "rejected_response": _answer(pair, pair.rejected),
        **_images(pair),
    }


def to_llamafactory(pair: PreferencePair) -> dict[str, Any]:
    """LLaMA-Factory's sharegpt preference columns; turns alternate and the last is the human's, or it skips the row.

    github.com/hiyouga/LLaMA-Factory, data/README.md, "Sharegpt Format", "Preference Dataset", "Multimodal Image
    Dataset".
    """
    system, turns = _system_apart(_placed(pair))
    # an odd number of turns, the first and the last of them the user's
    if [turn.role for turn in turns] != [("user", "assistant")[number % 2] for number in range(len(turns) | 1)]:
        raise UserError(
            f"record {pair.record_id!r}: prompt: user and assistant must take turns and the user come last, got "
            f"{', '.join(turn.role for turn in turns)}"
        )
    names = {"user": "human", "assistant": "gpt"}
    return {
        "conversations": [{"from": names[turn.role], "value": turn.content} for turn in turns],
        "system": system,
        "chosen": {"from": "gpt", "value": _answer(pair, pair.chosen)},
        "rejected": {"from": "gpt", "value": _answer(pair, pair.rejected)},
        **_images(pair),
    }


def to_distilabel(pair: PreferencePair) -> dict[str, Any]:
    """What distilabel's FormatTextGenerationDPO and FormatChatGenerationDPO write, ratings and model names left out.

    `prompt` is the text of the first user turn, `prompt_id` its sha256; both answers stand behind the whole
    conversation (distilabel.argilla.io, components gallery).
    """
    if pair.image_uri is not None:
        raise UserError(f"record {pair.record_id!r}: it is shown an image, and distilabel's columns have none")
    asked = next((turn.content for turn in pair.prompt if turn.role == "user"), None)
    if asked is None:
        raise UserError(f"record {pair.record_id!r}: prompt: no user turn")
    return {
        "prompt": asked,
        "prompt_id": hashlib.sha256(asked.encode()).hexdigest(),
        "chosen": [*_turns(pair.prompt), *_turns(pair.chosen)],
        "rejected": [*_turns(pair.prompt), *_turns(pair.rejected)],
    }


FORMATS: dict[str, Callable[[PreferencePair], dict[str, Any]]] = {
    "trl": to_trl,
    "ms-swift": to_ms_swift,
    "llamafactory": to_llamafactory,
    "distilabel": to_distilabel,
}
"""One row of each format from one pair."""


def _check_empty(to: str) -> None:
    if storage.exists(to) and (found := storage.list_files(to)):
        raise UserError(f"{to}: not empty, it holds {found[0]}")


def _write_split(
    uri: str, manifest: Manifest, split: str, to_row: Callable[[PreferencePair], dict[str, Any]], folder: Path
) -> tuple[int, bool]:
    """Pairs written, and whether any of them shows an image."""
    # a file without a line is none that a JSON reader takes
    if not any(file.rows for file in manifest.files if file.path.startswith(f"{split}/")):
        return 0, False
    count, seen = 0, False
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
        for pair in _pairs(uri, manifest, split):
            lines.write(json.dumps(to_row(pair), ensure_ascii=False) + "\n")
            count += 1
            seen |= pair.image_uri is not None
    return count, seen


def _pairs(uri: str, manifest: Manifest, split: str) -> Iterator[PreferencePair]:
    for file in manifest.files:
        if file.path.startswith(f"{split}/"):
            yield from from_table(PreferencePair, read_part(storage.join(uri, file.path)))


def _dataset_info(splits: list[str], seen: bool) -> dict[str, Any]:
    columns = {"messages": "conversations", "system": "system", "chosen": "chosen", "rejected": "rejected"}
    if seen:
        columns["images"] = "images"
    return {
        f"mint_ray_{split}": {
            "file_name": f"{split}.jsonl",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": columns,
        }
        for split in splits
    }


def _turns(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _images(pair: PreferencePair) -> dict[str, list[str]]:
    """The column of images, where the pair shows one."""
    if pair.image_uri is None:
        return {}
    if CELL.fullmatch(pair.image_uri):
        raise UserError(
            f"record {pair.record_id!r}: its image is a cell of a table, {pair.image_uri}; other trainers read files"
        )
    return {"images": [pair.image_uri]}


def _placed(pair: PreferencePair) -> list[Message]:
    """The prompt with a placeholder for the image ahead of the first user turn."""
    if pair.image_uri is None:
        return pair.prompt
    for turn in (*pair.prompt, *pair.chosen, *pair.rejected):
        if PLACEHOLDER in turn.content:
            raise UserError(f"record {pair.record_id!r}: its {turn.role} turn says {PLACEHOLDER}, which stands for one")
    first = next((number for number, turn in enumerate(pair.prompt) if turn.role == "user"), None)
    if first is None:
        raise UserError(f"record {pair.record_id!r}: prompt: no user turn to show the image in")
    shown = dataclasses.replace(pair.prompt[first], content=PLACEHOLDER + pair.prompt[first].content)
    return [*pair.prompt[:first], shown, *pair.prompt[first + 1 :]]


def _answer(pair: PreferencePair, answer: list[Message]) -> str:
    if [message.role for message in answer] != ["assistant"]:
        roles = ", ".join(message.role for message in answer)
        raise UserError(f"record {pair.record_id!r}: chosen and rejected must be one assistant turn each, got {roles}")
    return answer[0].content


def _system_apart(prompt: list[Message]) -> tuple[str, list[Message]]:
    if prompt and prompt[0].role == "system":
        return prompt[0].content, prompt[1:]
    return "", prompt
