"""Dataset card of a pair artifact: content, provenance and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pyarrow.parquet as pq

from mint_ray import storage
from mint_ray.artifacts import MANIFEST, Artifact, Draft, File, Manifest, package_versions, read_manifest
from mint_ray.records import PreferencePair, from_dict, schema_of
from mint_ray.reports.templates import render_card

CARD = "README.md"
SPLITS = ("train", "validation")
UNKNOWN = "unknown"

COLUMN_MEANINGS = {
    "prompt": "conversation before the answer: the input of the student",
    "chosen": "preferred answer, one turn",
    "rejected": "answer that is not preferred, one turn",
    "record_id": "record of the pair; one record can have several pairs",
    "split": "split of the record; all records of one group (a person, a publication) are in one split",
    "teacher": "kind of teacher whose scores define the preference",
    "sampler": "sampler that selected the chosen and the rejected labels",
    "chosen_labels": "ids of the labels that `chosen` lists, in order",
    "rejected_labels": "ids of the labels that `rejected` lists, in order",
    "chosen_scores": "the teacher's score of each label of `chosen_labels`",
    "rejected_scores": "the teacher's score of each label of `rejected_labels`",
    "difficulty": "0 (easy) to 1 (hard): 1 minus the teacher's relative preference for chosen over rejected",
    "image_uri": "image of a vision-language student, placed before the first user turn; null for a text student",
    "note_span": "[start, end) of the record's note in the last turn of the prompt, in characters; null if not there",
}
"""Meaning of each column of the pairs."""

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
"""Values of `license` on the Hub (huggingface.co/docs/hub/repositories-licenses); others become `other` with a name."""

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
         (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
SECRET = re.compile(r"(^|_)(key|token|secret|password|credentials?)$", re.IGNORECASE)
HIDDEN = "(hidden)"


def render_dataset_card(artifact: Artifact, draft: Draft, records: Artifact, scores: Artifact) -> str:
    """Return the dataset card of the pairs in `draft` in the Hub's format: YAML metadata, then Markdown.

    Call it after all other files are written. License and citation are those that `records` was prepared with, or
    unknown. Credentials are removed: user, password and query of URIs, and the values of settings that are called key,
    token, secret or password.

    Args:
        artifact: The pair artifact.
        draft: Its files.
        records: The records of the pairs.
        scores: The teacher's scores of these records.
    """
    files = [file for file in [*draft.files(), *draft.placed] if file.rows is not None]
    rows = {split: sum(file.rows or 0 for file in files if file.path.startswith(f"{split}/")) for split in SPLITS}
    origin = trace_records(records.root, records.manifest)
    prepared, matching = find_section(origin, "prepare"), find_section(origin, "match_texts")
    source = prepared.get("source", {})
    teacher = read_input(scores.root, scores.manifest, "teacher")
    return render_card(
        "dataset_card.md.j2",
        license=license_of(source.get("license")),
        size=next((name for limit, name in SIZES if sum(rows.values()) < limit), "n>1B"),
        columns=[(field.name, field.type, COLUMN_MEANINGS[field.name]) for field in schema_of(PreferencePair)],
        rows=rows,
        dropped={stage: counts for stage, counts in _dropped(draft, origin, scores).items() if counts},
        name=artifact.name,
        sampler=without_credentials(artifact.config.get("pair", {}).get("sampler", {})),
        task=without_credentials(artifact.config.get("task", {})),
        source=source,
        texts=matching.get("source"),
        source_inputs=without_credentials(origin[-1].inputs),
        records=records,
        scores=scores,
        teacher=find_section([teacher] if teacher else [], "fit", "teacher"),
        teacher_name=scores.manifest.inputs.get("teacher", UNKNOWN),
        teacher_inputs=without_credentials(teacher.inputs) if teacher else {},
        example=_example(artifact, draft, files),
        versions=package_versions(),
    )


def trace_records(root: str, records: Manifest | None) -> list[Manifest]:
    """Return the manifests of records and of the records that they were derived from; those of `prepare` are last."""
    found = []
    while records is not None:
        found.append(records)
        records = read_input(root, records, "records")
    return found


def read_input(root: str, manifest: Manifest | None, role: str) -> Manifest | None:
    """Return the manifest of an artifact's input by its role, or None if it is not in the same root."""
    if manifest is None or role not in manifest.inputs:
        return None
    uri = storage.join(root, manifest.inputs[role])
    return read_manifest(uri) if storage.exists(storage.join(uri, MANIFEST)) else None


def find_section(manifests: Sequence[Manifest], *keys: str) -> dict[str, Any]:
    """Return a section of the first config that has it, without credentials; an empty one if none has it."""
    for manifest in manifests:
        section: Any = manifest.config
        for key in keys:
            section = section.get(key) if isinstance(section, Mapping) else None
        if section is not None:
            return dict(without_credentials(section))
    return {}


def _dropped(draft: Draft, origin: Sequence[Manifest], scores: Artifact) -> dict[str, Mapping[str, int]]:
    return {
        **{f"records, in {manifest.stage}": manifest.dropped for manifest in reversed(origin)},
        "records, in score": scores.manifest.dropped,
        "records, in pair": dict(sorted(draft.dropped.items())),
    }


def _example(artifact: Artifact, draft: Draft, files: list[File]) -> PreferencePair | None:
    """Return the first pair; None if there are no pairs."""
    with_rows = sorted(
        (file for file in files if file.rows and file.path.startswith(SPLITS)), key=lambda file: file.path
    )
    if not with_rows:
        return None
    staged = draft.folder / with_rows[0].path
    with storage.open_input(str(staged) if staged.exists() else artifact.file_uri(with_rows[0].path)) as stream:
        first = next(pq.ParquetFile(stream).iter_batches(batch_size=1))
    return from_dict(PreferencePair, first.to_pylist()[0])


def license_of(given: str | None) -> dict[str, str]:
    """Return the metadata `license`, with a `license_name` for a license that the Hub does not list."""
    if not given:
        return {"license": UNKNOWN}
    if given.lower() in HUB_LICENSES:
        return {"license": given.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", given.lower()).strip("-") or UNKNOWN}


def without_credentials(value: Any, key: str = "") -> Any:
    """Return `value` without values of secret keys, and without user, password, query and fragment of URIs."""
    if isinstance(value, Mapping):
        return {without_credentials(name): without_credentials(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_credentials(item, key) for item in value]
    if value is not None and SECRET.search(key):
        return HIDDEN
    if isinstance(value, str) and re.match(r"\w[\w+.-]*://", value):
        parts = urlsplit(value)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return value
