"""Columns of other trainers: one function per tool that converts a preference pair to a row of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

from mint_ray.config.loader import UserError
from mint_ray.images import CELL
from mint_ray.records import Message, PreferencePair

PLACEHOLDER = "<image>"
"""Placeholder of an image in a turn, for ms-swift and LLaMA-Factory."""


def to_trl(pair: PreferencePair) -> dict[str, Any]:
    """Return TRL's conversational preference columns with an explicit prompt (huggingface.co/docs/trl/dataset_formats).

    TRL's collators place `images` before the first user turn.
    """
    return {
        "prompt": _turns(pair.prompt),
        "chosen": _turns(pair.chosen),
        "rejected": _turns(pair.rejected),
        **_images(pair),
    }


def to_ms_swift(pair: PreferencePair) -> dict[str, Any]:
    """Return ms-swift's standard columns: the conversation with the chosen answer, and the rejected one as text.

    swift.readthedocs.io/en/latest/Customization/Custom-dataset.html, "DPO/ORPO/CPO/SimPO/RM" and "Multimodal".
    """
    return {
        "messages": [*_turns(_with_placeholder(pair)), {"role": "assistant", "content": _answer(pair, pair.chosen)}],
        "rejected_response": _answer(pair, pair.rejected),
        **_images(pair),
    }


def to_llamafactory(pair: PreferencePair) -> dict[str, Any]:
    """Return LLaMA-Factory's sharegpt preference columns.

    github.com/hiyouga/LLaMA-Factory, data/README.md, "Sharegpt Format", "Preference Dataset", "Multimodal Image
    Dataset". Raises UserError if the turns do not alternate or the last is not the user's: LLaMA-Factory would skip
    the row.
    """
    system, turns = _split_system(_with_placeholder(pair))
    # an odd number of turns; the first and the last are the user's
    if [turn.role for turn in turns] != [("user", "assistant")[number % 2] for number in range(len(turns) | 1)]:
        raise UserError(
            f"record {pair.record_id!r}: prompt: turns of user and assistant must alternate, ending with the user, got "
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
    """Return the columns of distilabel's FormatTextGenerationDPO and FormatChatGenerationDPO, without ratings.

    `prompt` is the text of the first user turn and `prompt_id` its sha256; both answers follow the whole conversation
    (distilabel.argilla.io, components gallery).
    """
    if pair.image_uri is not None:
        raise UserError(f"record {pair.record_id!r}: the prompt has an image, and distilabel has no column for it")
    prompt = next((turn.content for turn in pair.prompt if turn.role == "user"), None)
    if prompt is None:
        raise UserError(f"record {pair.record_id!r}: prompt: no user turn")
    return {
        "prompt": prompt,
        "prompt_id": hashlib.sha256(prompt.encode()).hexdigest(),
        "chosen": [*_turns(pair.prompt), *_turns(pair.chosen)],
        "rejected": [*_turns(pair.prompt), *_turns(pair.rejected)],
    }


FORMATS: dict[str, Callable[[PreferencePair], dict[str, Any]]] = {
    "trl": to_trl,
    "ms-swift": to_ms_swift,
    "llamafactory": to_llamafactory,
    "distilabel": to_distilabel,
}
"""Name of a format to the function that converts a pair to one of its rows."""


def _turns(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _images(pair: PreferencePair) -> dict[str, list[str]]:
    """Return the column of images; no column for a pair without an image."""
    if pair.image_uri is None:
        return {}
    if CELL.fullmatch(pair.image_uri):
        raise UserError(
            f"record {pair.record_id!r}: the image is a cell of a table, {pair.image_uri}; other trainers read files"
        )
    return {"images": [pair.image_uri]}


def _with_placeholder(pair: PreferencePair) -> list[Message]:
    """Return the prompt with a placeholder for the image before the first user turn."""
    if pair.image_uri is None:
        return pair.prompt
    for turn in (*pair.prompt, *pair.chosen, *pair.rejected):
        if PLACEHOLDER in turn.content:
            raise UserError(
                f"record {pair.record_id!r}: the {turn.role} turn contains {PLACEHOLDER}, the placeholder of an image"
            )
    first = next((number for number, turn in enumerate(pair.prompt) if turn.role == "user"), None)
    if first is None:
        raise UserError(f"record {pair.record_id!r}: prompt: no user turn for the image")
    with_image = dataclasses.replace(pair.prompt[first], content=PLACEHOLDER + pair.prompt[first].content)
    return [*pair.prompt[:first], with_image, *pair.prompt[first + 1 :]]


def _answer(pair: PreferencePair, answer: list[Message]) -> str:
    if [message.role for message in answer] != ["assistant"]:
        roles = ", ".join(message.role for message in answer)
        raise UserError(f"record {pair.record_id!r}: chosen and rejected must be one assistant turn each, got {roles}")
    return answer[0].content


def _split_system(prompt: list[Message]) -> tuple[str, list[Message]]:
    if prompt and prompt[0].role == "system":
        return prompt[0].content, prompt[1:]
    return "", prompt
