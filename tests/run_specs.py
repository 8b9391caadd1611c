"""Configs of runs for the tests of lineage and plan: a student without weights, which no stage loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mint_ray.config.loader import from_data, replace
from mint_ray.config.pipeline import PipelineConfig


def save_empty_model(folder: Path, name: str = "model") -> str:
    """Write a folder whose files look like those of a pretrained model; return its path."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(name)
    return str(folder)


def make_config(folder: Path, changes: dict[str, Any] | None = None) -> PipelineConfig:
    """Return the config of a run with a student below `folder`, with the values at dotted paths changed."""
    if not (folder / "student").exists():
        save_empty_model(folder / "student")
    data = {
        "root": str(folder / "out"),
        "task": {"kind": "rare_disease"},
        "prepare": {"source": {"kind": "hpo", "num_diseases": 8, "patients_per_disease": 6}},
        "score": {"ablate": ["face"]},
        "pair": {"sampler": {"kind": "hard", "top": 2}},
        "train": {"student": {"model_id": str(folder / "student")}},
        "evaluate": {"generation": {"modes": ["free", "rank"]}},
    }
    config = from_data(PipelineConfig, data)
    return replace(config, changes) if changes else config


def matching(folder: Path, **settings: Any) -> dict[str, Any]:
    """Return changes of a config that match texts to images; `settings` are those of `prepare.match_texts`."""
    if not (folder / "encoder").exists():
        save_empty_model(folder / "encoder")
        (folder / "texts.jsonl").write_text('{"record_id": "t", "text": "words"}\n')
    source = {"kind": "table", "uri": str(folder / "texts.jsonl")}
    return {"prepare.match_texts": {"source": source, "encoder": {"model_id": str(folder / "encoder")}, **settings}}


def building(folder: Path, **settings: Any) -> dict[str, Any]:
    """Return changes of a config that build its student; `settings` are those of `build_vlm`."""
    if not (folder / "vision").exists():
        save_empty_model(folder / "vision")
        save_empty_model(folder / "language")
    models = {name: {"model_id": str(folder / name)} for name in ("vision", "language")}
    return {"train.student.model_id": "built", "build_vlm": {**models, **settings}}
