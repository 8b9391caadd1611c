"""Write the dataset card of a pair artifact: what the pairs are, where they come from, and how they are loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pyarrow.parquet as pq
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from mint_ray import storage
from mint_ray.artifacts import MANIFEST, Artifact, Draft, File, Manifest, package_versions, read_manifest
from mint_ray.records import PreferencePair, from_dict, schema_of
from mint_ray.reports.summary import RESEARCH_USE
from mint_ray.reports.text import escape

CARD = "README.md"
SPLITS = ("train", "validation")
UNKNOWN = "unknown"

MEANINGS = {
    "prompt": "the conversation up to the answer: all that the student sees",
    "chosen": "the preferred answer, one turn",
    "rejected": "the answer it is preferred to, one turn",
    "record_id": "the record that the pair was drawn from; one record can have several pairs",
    "split": "the split of the record; records of one group (a person, a publication) are in one split",
    "teacher": "the kind of teacher whose scores decided",
    "sampler": "the rule by which labels were chosen and rejected",
    "chosen_labels": "ids of the labels that `chosen` lists, in order",
    "rejected_labels": "ids of the labels that `rejected` lists, in order",
    "chosen_scores": "the teacher's score of each label of `chosen_labels`",
    "rejected_scores": "the teacher's score of each label of `rejected_labels`",
    "difficulty": "how little the teacher prefers chosen to rejected, 0 (easy) to 1 (hard)",
    "image_uri": "the image that the student sees ahead of the first user turn; null: it sees none",
    "note_span": "[start, end) of the record's note in the last turn of the prompt, in characters; null: not there",
}
"""What each column of the pairs holds."""

HUB_LICENSES = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0",
    "isc", "lppl-1.3c", "ms-pl", "mpl-2.0", "odc-by", "odbl", "openrail++", "osl-3.0", "postgresql", "ofl-1.1",
    "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "unknown",
}  # fmt: skip
"""What the Hub takes as `license`; any other is `other` with a name (huggingface.co/docs/hub/repositories-licenses)."""

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
         (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
SECRET = re.compile(r"(^|_)(key|token|secret|password|credentials?)$", re.IGNORECASE)
HIDDEN = "(hidden)"


def describe_pairs(artifact: Artifact, draft: Draft, records: Artifact, scores: Artifact) -> str:
    """The card of the pairs in `draft`, in the Hub's form: a YAML head, then Markdown. Call it when all else is there.

    License and citation are what `records` was prepared with, unknown otherwise. URIs lose user, password and query,
    and settings that are called a key, token, secret or password their value.
    """
    files = [file for file in [*draft.files(), *draft.placed] if file.rows is not None]
    rows = {split: sum(file.rows or 0 for file in files if file.path.startswith(f"{split}/")) for split in SPLITS}
    prepared = without_access(records.manifest.config.get("prepare", {}))
    source = prepared.get("source", {})
    described = _teacher(scores)
    return markdown_template("pairs.md.j2").render(
        research_use=RESEARCH_USE,
        license=license_of(source.get("license")),
        size=next((name for most, name in SIZES if sum(rows.values()) < most), "n>1B"),
        columns=[(field.name, field.type, MEANINGS[field.name]) for field in schema_of(PreferencePair)],
        rows=rows,
        dropped={stage: counts for stage, counts in _dropped(draft, records, scores).items() if counts},
        name=artifact.name,
        sampler=without_access(artifact.config.get("pair", {}).get("sampler", {})),
        task=without_access(artifact.config.get("task", {})),
        source=source,
        texts=(prepared.get("pair_texts") or {}).get("source"),
        source_inputs=without_access(records.manifest.inputs),
        records=records,
        scores=scores,
        teacher=without_access(described.config.get("fit", {}).get("teacher", {})) if described else {},
        teacher_name=scores.manifest.inputs.get("teacher", UNKNOWN),
        teacher_inputs=without_access(described.inputs) if described else {},
        example=_example(artifact, draft, files),
        versions=package_versions(),
    )


def markdown_template(name: str) -> Template:
    """A card's template, with the filters that keep text what it is."""
    environment = Environment(
        loader=PackageLoader("mint_ray.reports", "."),
        autoescape=False,  # noqa: S701  # Markdown: `escape` and fences keep text what it is
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(escape=escape, fence=fence)
    return environment.get_template(name)


def _teacher(scores: Artifact) -> Manifest | None:
    uri = storage.join(scores.root, scores.manifest.inputs.get("teacher", UNKNOWN))
    return read_manifest(uri) if storage.exists(storage.join(uri, MANIFEST)) else None


def _dropped(draft: Draft, records: Artifact, scores: Artifact) -> dict[str, Mapping[str, int]]:
    return {
        "records, when read": records.manifest.dropped,
        "records, when scored": scores.manifest.dropped,
        "records, when drawn from": dict(sorted(draft.dropped.items())),
    }


def _example(artifact: Artifact, draft: Draft, files: list[File]) -> PreferencePair | None:
    """The first pair there is; None of an artifact without pairs."""
    held = sorted((file for file in files if file.rows and file.path.startswith(SPLITS)), key=lambda file: file.path)
    if not held:
        return None
    staged = draft.folder / held[0].path
    with storage.open_input(str(staged) if staged.exists() else artifact.file_uri(held[0].path)) as stream:
        first = next(pq.ParquetFile(stream).iter_batches(batch_size=1))
    return from_dict(PreferencePair, first.to_pylist()[0])


def license_of(given: str | None) -> dict[str, str]:
    """The head's `license`, with a `license_name` where the Hub knows none of that name."""
    if not given:
        return {"license": UNKNOWN}
    if given.lower() in HUB_LICENSES:
        return {"license": given.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", given.lower()).strip("-") or UNKNOWN}


def without_access(value: Any, key: str = "") -> Any:
    """`value` without what gives access: the values of secret keys; user, password, query and fragment of URIs."""
    if isinstance(value, Mapping):
        return {without_access(name): without_access(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_access(item, key) for item in value]
    if value is not None and SECRET.search(key):
        return HIDDEN
    if isinstance(value, str) and re.match(r"\w[\w+.-]*://", value):
        parts = urlsplit(value)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return value


def fence(value: Any) -> str:
    """Text as it stands, or plain data as JSON, in a block that nothing in it can end."""
    language = "text" if isinstance(value, str) else "json"
    text = value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)
    ticks = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", text))]))
    return f"{ticks}{language}\n{text}\n{ticks}"
