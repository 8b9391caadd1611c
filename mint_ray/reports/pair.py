"""Preference pair as plain text."""

from __future__ import annotations

from itertools import zip_longest

from mint_ray.records import PreferencePair


def render_pair(pair: PreferencePair) -> str:
    """Render a pair as plain text: prompt, both answers in two columns, and labels with the teacher's scores."""
    difficulty = "" if pair.difficulty is None else f", difficulty {pair.difficulty:.2f}"
    prompt = [f"[{message.role}] {message.content}" for message in pair.prompt]
    if pair.image_uri is not None:
        first = next((i for i, message in enumerate(pair.prompt) if message.role == "user"), len(prompt))
        prompt.insert(first, f"[image] {pair.image_uri}")
    chosen, rejected = (
        "\n".join(message.content for message in answer).splitlines() for answer in (pair.chosen, pair.rejected)
    )
    chosen_scores, rejected_scores = (
        [f"{score:8.4f}  {label}" for label, score in zip(labels, scores, strict=True)]
        for labels, scores in ((pair.chosen_labels, pair.chosen_scores), (pair.rejected_labels, pair.rejected_scores))
    )
    rows = [
        ("CHOSEN", "REJECTED"),
        *zip_longest(chosen, rejected, fillvalue=""),
        ("teacher's score", "teacher's score"),
        *zip_longest(chosen_scores, rejected_scores, fillvalue=""),
    ]
    width = max(len(left) for left, _ in rows)
    table = [f"{left:{width}}  |  {right}".rstrip() for left, right in rows]
    header = f"--- {pair.record_id}: sampler {pair.sampler}, teacher {pair.teacher}{difficulty}"
    return "\n".join([header, *prompt, "", *table])
