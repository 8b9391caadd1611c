"""Write the model card of an aligned student: what it is, what it learned from, and what it is not for."""

from __future__ import annotations

import re
from typing import Any

from mint_ray import storage
from mint_ray.artifacts import MANIFEST, Manifest, package_versions, read_manifest
from mint_ray.metrics import Estimate
from mint_ray.reports.card import UNKNOWN, license_of, markdown_template, without_access
from mint_ray.reports.summary import RESEARCH_USE, RunSummary, show, title_of
from mint_ray.reports.text import escape

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DIGEST = re.compile("[0-9a-f]{64}")


def describe_student(uri: str, train: Manifest, *, merged: bool, evaluate: Manifest | None = None) -> str:
    """The card of the student in the train artifact at `uri`, in the Hub's form: a YAML head, then Markdown.

    License, citation, teacher and sampler are found by the names of the artifacts that went into it, beside it; what is
    not there any more is called unknown. `evaluate` gives the table of metrics. URIs and settings lose what gives
    access, as in the card of the pairs.
    """
    root = storage.absolute(uri).rpartition("/")[0]
    tokens = _input(root, train, "tokens")
    pairs = _input(root, tokens, "pairs")
    records = _input(root, pairs, "records")
    scores = _input(root, pairs, "scores")
    teacher = _input(root, scores, "teacher")
    student: dict[str, Any] = train.config["train"]["student"]
    model_id = student["model_id"]
    source = without_access(_section(records, "prepare", "source"))
    return markdown_template("student.md.j2").render(
        research_use=RESEARCH_USE,
        name=storage.absolute(uri).rpartition("/")[2],
        merged=merged,
        whole=student["lora_rank"] is None,
        model_id=model_id,
        # the head takes ids of the Hub alone; a folder can be called a/b too, but is known by a digest
        on_hub=bool(HUB_ID.fullmatch(model_id)) and not DIGEST.fullmatch(train.inputs["student"]),
        revision=student["revision"],
        weights=train.inputs["student"],
        license=license_of(source.get("license")),
        source=source,
        records=tokens and pairs and pairs.inputs.get("records", UNKNOWN),
        pairs=tokens and tokens.inputs.get("pairs", UNKNOWN),
        counts=pairs.counts if pairs else {},
        teacher=without_access(_section(teacher, "fit", "teacher")),
        sampler=without_access(_section(pairs, "pair", "sampler")),
        task=without_access(_section(pairs, "task")),
        student=student,
        trainer=train.config["train"]["trainer"],
        outcome=train.metrics,
        table=_table(evaluate) if evaluate else [],
        evaluated=evaluate.counts if evaluate else {},
        versions=package_versions(),
    )


def _table(evaluate: Manifest) -> list[str]:
    methods = {
        method: {name: Estimate(**value) for name, value in measured.items()}
        for method, measured in evaluate.metrics.items()
    }
    names = RunSummary(title="", methods=methods).metrics
    rows = [[title_of(name), *(show(found.get(name)) for found in methods.values())] for name in names]
    head, *body = ["| " + " | ".join(map(escape, row)) + " |" for row in [["metric", *methods], *rows]]
    return [head, "|---|" + "---:|" * len(methods), *body]


def _input(root: str, manifest: Manifest | None, name: str) -> Manifest | None:
    """The manifest of what went into another artifact under this name, if it lies beside it."""
    if manifest is None or name not in manifest.inputs:
        return None
    uri = storage.join(root, manifest.inputs[name])
    return read_manifest(uri) if storage.exists(storage.join(uri, MANIFEST)) else None


def _section(manifest: Manifest | None, *keys: str) -> dict[str, Any]:
    section: Any = manifest.config if manifest else {}
    for key in keys:
        section = section.get(key, {})
    found: dict[str, Any] = section
    return found
