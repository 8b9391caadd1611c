"""Model card of an aligned student: base model, training data, training, evaluation and intended use."""

from __future__ import annotations

import re
from typing import Any

from mint_ray import storage
from mint_ray.artifacts import Manifest, package_versions
from mint_ray.metrics.methods import read_methods
from mint_ray.reports.dataset_card import UNKNOWN, find_section, license_of, read_input, trace_records
from mint_ray.reports.tables import markdown_lines
from mint_ray.reports.templates import render_card
from mint_ray.reports.text import results_table

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DIGEST = re.compile("[0-9a-f]{64}")


def render_model_card(uri: str, train: Manifest, *, merged: bool, evaluate: Manifest | None = None) -> str:
    """Return the model card of a train artifact's student in the Hub's format: YAML metadata, then Markdown.

    License, citation, teacher and sampler come from the artifacts that it was made from, in the same root; they are
    unknown if these are missing. Credentials are removed, as from the dataset card.

    Args:
        uri: URI of the train artifact.
        train: Its manifest.
        merged: True if the adapter is merged into the base model, or the model was trained in full.
        evaluate: Manifest of an evaluation of this student, for the table of metrics.
    """
    root = storage.absolute(uri).rpartition("/")[0]
    tokens = read_input(root, train, "tokens")
    pairs = read_input(root, tokens, "pairs")
    origin = trace_records(root, read_input(root, pairs, "records"))
    teacher = read_input(root, read_input(root, pairs, "scores"), "teacher")
    student: dict[str, Any] = train.config["train"]["student"]
    model_id = student["model_id"]
    source = find_section(origin, "prepare", "source")
    of_pairs = [pairs] if pairs else []
    return render_card(
        "model_card.md.j2",
        name=storage.absolute(uri).rpartition("/")[2],
        merged=merged,
        full=student["lora_rank"] is None,
        model_id=model_id,
        # the metadata accepts only ids of the Hub; a folder can look like one, but its weights have a digest
        on_hub=bool(HUB_ID.fullmatch(model_id)) and not DIGEST.fullmatch(train.inputs["student"]),
        revision=student["revision"],
        weights=train.inputs["student"],
        license=license_of(source.get("license")),
        source=source,
        records=tokens and pairs and pairs.inputs.get("records", UNKNOWN),
        pairs=tokens and tokens.inputs.get("pairs", UNKNOWN),
        counts=pairs.counts if pairs else {},
        teacher=find_section([teacher] if teacher else [], "fit", "teacher"),
        sampler=find_section(of_pairs, "pair", "sampler"),
        task=find_section(of_pairs, "task"),
        student=student,
        trainer=train.config["train"]["trainer"],
        outcome=train.metrics,
        table=_results(evaluate) if evaluate else [],
        evaluated=evaluate.counts if evaluate else {},
        versions=package_versions(),
    )


def _results(evaluate: Manifest) -> list[str]:
    estimates = {method.title: found for method, found in read_methods(evaluate.metrics).items()}
    table = results_table(estimates, evaluate.config["evaluate"]["confidence"])
    return markdown_lines(table) if table else []
