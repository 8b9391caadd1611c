"""Documents, and records with notes about them, for the tests of `retrieve` and `choose_passages`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from mint_ray.artifacts import Artifact
from mint_ray.config.loader import from_data
from mint_ray.config.stages import Evaluate
from mint_ray.records import Label, Record
from mint_ray.retrievers import Document
from mint_ray.tasks import build_task
from mint_ray.tasks.config import RareDisease
from tests.stages.inputs import write_records

DOCUMENTS = [
    Document(
        document_id="n",
        title="Noonan syndrome",
        text=" ".join(["Short stature and a broad nasal bridge."] * 6),
        label_id="N",
    ),
    Document(
        document_id="m", title="Marfan syndrome", text="Tall stature, seizures never, long fingers.", label_id="M"
    ),
    Document(document_id="k", title="Kabuki syndrome", text="Short stature, seizures at times.", label_id="K"),
]
LABELS = [Label(label_id=str(document.label_id), name=document.title) for document in DOCUMENTS]
NOTES = [
    "A boy with short stature and seizures.",
    "A girl with long fingers.",
    "A broad nasal bridge.",
    "Nothing of it.",
]
RECORDS = [
    Record(record_id=f"r{i}", group_id=f"g{i}", label_id=LABELS[i % 3].label_id, split="test", text=note)
    for i, note in enumerate(NOTES)
] + [Record(record_id="r4", group_id="g4", label_id="M", split="train", text="A boy.")]
TASK, NUM_LABELS = RareDisease(), 1
PROMPTS = [build_task(TASK, LABELS, NUM_LABELS).prompt(record) for record in RECORDS]


def retrieval_config(folder: Path, *, max_new_tokens: int = 16, **settings: Any) -> Evaluate:
    """Write the documents into a new folder, and return settings that retrieve them; `settings` of `Retrieval`."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(dataclasses.asdict(document)) for document in DOCUMENTS]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    documents = {"kind": "table", "uri": str(folder / "documents.jsonl")}
    data = {
        "generation": {"max_new_tokens": max_new_tokens},
        "retrieval": {"documents": documents, **settings},
        "resources": {"cpus_per_actor": 1},
    }
    return from_data(Evaluate, data)


def write_noted_records(root: Path, rows_per_part: int = 100) -> Artifact:
    """Write the records with their notes."""
    return write_records(root, RECORDS, LABELS, rows_per_part=rows_per_part)
