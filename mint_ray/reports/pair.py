"""Write a preference pair as a person reads it."""

from __future__ import annotations

from itertools import zip_longest

from mint_ray.records import PreferencePair


def describe_pair(pair: PreferencePair) -> str:
    """A pair as a person reads it: the prompt, the answers side by side, the labels with the teacher's scores."""
    hardness = "" if pair.difficulty is None else f", difficulty {pair.difficulty:.2f}"
    prompt = [f"[{message.role}] {message.content}" for message in pair.prompt]
    if pair.image_uri is not None:
        first = next((i for i, message in enumerate(pair.prompt) if message.role == "user"), len(prompt))
        prompt.insert(first, f"[image] {pair.image_uri}")
    chosen, rejected = (
        "\n".join(message.content for message in answer).splitlines() for answer in (pair.chosen, pair.rejected)
    )
    good, bad = (
        [f"{score:8.4f}  {label}" for label, score in zip(labels, scores, strict=True)]
        for labels, scores in ((pair.chosen_labels, pair.chosen_scores), (pair.rejected_labels, pair.rejected_scores))
    )
    rows = [
        ("CHOSEN", "REJECTED"),
        *zip_longest(chosen, rejected, fillvalue=""),
        ("teacher's score", "teacher's score"),
        *zip_longest(good, bad, fillvalue=""),
    ]
    width = max(len(left) for left, _ in rows)
    table = [f"{left:{width}}  |  {right}".rstrip() for left, right in rows]
    return "\n".join([f"--- {pair.record_id}: {pair.sampler} of {pair.teacher}{hardness}", *prompt, "", *table])
