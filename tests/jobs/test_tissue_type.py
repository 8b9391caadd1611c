"""The specs of vision-language students: equal settings per method, and runs on synthetic images with random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mint_ray.compare.plan import plan_methods
from mint_ray.compare.run import run_comparison
from mint_ray.config.comparison import ComparisonConfig
from mint_ray.config.loader import load
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.images import Frame, read_image
from mint_ray.metrics.methods import read_methods
from mint_ray.pipeline import run_pipeline
from mint_ray.records import Method, Prediction, PreferencePair, Record
from mint_ray.tasks.config import PANNUKE
from tests.encoders import save_tiny_efficientnet
from tests.sources.histology import aperio, colour_of, save_fold
from tests.teachers.tiny_clip import save_tiny_clip
from tests.tiny import save_tiny_student
from tests.vision_students import save_tiny_vlm

JOBS = Path(__file__).parents[2] / "jobs"
TISSUES = [tissue.label_id for tissue in PANNUKE]
ORGANS = {"lung": (200, 60, 60), "breast": (60, 190, 60), "kidney": (60, 60, 200), "prostate": (200, 190, 60)}
"""Organs, and the color of their tissue."""
ONE_CPU = [
    "train.resources.cpus_per_worker=1",
    "evaluate.resources.cpus_per_actor=1",
    "evaluate.generation.max_new_tokens=8",
    "train.trainer.max_steps=2",
    "train.trainer.max_length=2048",
]


@pytest.mark.parametrize("name", ["tissue_type.small", "skin_lesion"])
def test_the_methods_of_a_comparison_have_equal_settings_and_one_control_has_shuffled_images(name: str) -> None:
    methods = plan_methods(load(ComparisonConfig, JOBS / f"{name}.yaml"))
    assert [(method.name, method.role, method.differences) for method in methods] == [
        ("orpo", "method", []), ("sft", "method", []), ("orpo, images shuffled", "control", []),
    ]  # fmt: skip
    assert methods[2].configs[0].pair.control == "shuffled"


def test_the_preset_of_its_student_can_be_merged_over_the_papers_application() -> None:
    config = load(PipelineConfig, JOBS / "tissue_type.yaml", [], [JOBS / "presets" / "11b_vision.yaml"])
    assert config.train.student.model_id == "meta-llama/Llama-3.2-11B-Vision-Instruct"
    assert (config.train.student.dtype, config.train.trainer.bf16) == ("bfloat16", True)
    assert config.train.resources.gpus_per_worker == 1
    assert config.pair.sampler.top == 5


@pytest.mark.slow
@pytest.mark.ray
def test_the_papers_second_application_runs_with_random_models_of_its_architectures(
    tmp_path: Path, ray_cluster: None
) -> None:
    save_fold(tmp_path / "pannuke" / "fold1", TISSUES * 2, size=64, nuclei=[1, 2] * 19)
    save_fold(tmp_path / "pannuke" / "fold2", TISSUES, size=64)
    save_fold(tmp_path / "pannuke" / "fold3", TISSUES[:5], size=64)
    config = load(
        PipelineConfig,
        JOBS / "tissue_type.yaml",
        [
            f"root={tmp_path / 'out'}",
            f"prepare.source.uri={tmp_path / 'pannuke'}",
            f"fit.teacher.model_id={save_tiny_clip(tmp_path / 'plip')}",
            f"train.student.model_id={save_tiny_vlm(tmp_path / 'llama', 'mllama')}",
            "train.student.revision=null",
            "train.student.dtype=float32",
            "train.trainer.bf16=false",
            "train.trainer.train_batch_size=4",
            *ONE_CPU,
        ],
    )
    done = run_pipeline(config)
    records = done["prepare"].rows(Record, "records")
    assert done["prepare"].manifest.counts["labels"] == 19
    assert [done["prepare"].manifest.counts[f"records_{split}"] for split in ("train", "validation", "test")] == [
        38,
        19,
        5,
    ]
    assert {record.fields["nuclei"] for record in records if record.split == "train"} == {"1", "2"}
    pairs = done["pair"].rows(PreferencePair, "train")
    seen = {record.record_id: record for record in records}
    assert len(pairs) == 38
    for pair in pairs:
        assert len(pair.chosen_labels) == len(pair.rejected_labels) == 5
        color = read_image(str(pair.image_uri), Frame(size=64)).mean((0, 1))
        assert np.abs(color - colour_of(str(seen[pair.record_id].label_id))).max() < 15
    measured = read_methods(done["evaluate"].manifest.metrics)
    assert (
        measured[Method(student="teacher")]["top_1_accuracy"].value > 0.5
    )  # one color each, and a linear probe on them
    methods = {row.method.key for row in done["evaluate"].rows(Prediction, "predictions")}
    assert methods == {"teacher", "base", "base-rank", "aligned", "aligned-rank"}
    assert done["train"].manifest.metrics["steps"] == 2


@pytest.mark.slow
@pytest.mark.ray
def test_a_built_student_learns_from_tiles_and_one_with_shuffled_images_does_not(
    tmp_path: Path, ray_cluster: None
) -> None:
    config = load(
        ComparisonConfig,
        JOBS / "tissue_type.small.yaml",
        [
            f"root={tmp_path / 'out'}",
            *save_images(tmp_path),
            "task.labels.min_groups=1",
            "prepare.source.tile_size=50",
            f"fit.teacher.image.model_id={save_tiny_efficientnet(tmp_path / 'encoder')}",
            "fit.teacher.image.num_augmentations=1",
            "fit.teacher.num_train_epochs=2",
            "fit.resources.cpus_per_worker=1",
            f"build_vlm.vision.model_id={tmp_path / 'encoder'}",
            f"build_vlm.language.model_id={save_tiny_student(tmp_path / 'language')}",
            "build_vlm.resources.cpus=1",
            "build_vlm.num_train_epochs=20",
            "build_vlm.train_batch_size=8",
            "methods={'orpo': {}, 'orpo, images shuffled': {'pair.control': 'shuffled'}}",
            *ONE_CPU,
            # a model that is not pretrained needs all weights trained
            "train.student.lora_rank=null",
            "train.trainer.learning_rate=3e-3",
            "train.trainer.max_steps=120",
            "train.trainer.train_batch_size=8",
            "train.trainer.early_stopping_patience=9",
        ],
    )
    compared = run_comparison(config)
    assert compared.failed == {}
    summary: dict[str, Any] = json.loads((Path(compared.report.uri) / "comparison.json").read_text())
    rows = {(row["name"] or row["method"]["student"], row["method"]["mode"]): row for row in summary["rows"]}
    top_1 = {key: row["estimates"]["top_1_accuracy"]["value"] for key, row in rows.items()}
    assert top_1["orpo", "rank"] > 0.6
    # four labels: the chance level is a quarter
    assert top_1["orpo, images shuffled", "rank"] < 0.5
    assert rows["orpo", "free"]["role"] == "method"
    assert {rows["orpo, images shuffled", mode]["role"] for mode in ("free", "rank")} == {"control"}
    assert rows["base", "free"]["role"] == "baseline"
    assert any("Control shuffled" in note for note in summary["notes"])
    # the control has its own records, captions and answers, and shares the teacher's scores
    stages = [path.name.split("-")[0] for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert {stage: stages.count(stage) for stage in ("score", "shuffle_images", "build_vlm", "train")} == {
        "score": 1, "shuffle_images": 1, "build_vlm": 2, "train": 2,
    }  # fmt: skip


def save_images(folder: Path) -> list[str]:
    """Write images of six patients per organ, in the organ's color and with nuclei; return the overrides of the spec."""
    lines = ["image,organ_from_tcga_tss,split"]
    for kind in ("images", "masks", "xml"):
        (folder / kind).mkdir()
    for organ, color in ORGANS.items():
        for patient in range(6):
            name = f"TCGA-{organ[:2].upper()}-{patient:04d}-01Z-00-DX1"
            draw = np.random.default_rng(list(name.encode()))
            pixels = np.clip(draw.normal(color, 25, (100, 100, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
            corners = [(x, y) for x in (10, 30, 60, 80) for y in (10, 60)]
            squares = [[(x, y), (x + 9, y), (x + 9, y + 9), (x, y + 9)] for x, y in corners]
            (folder / "xml" / f"{name}.xml.gz").write_bytes(aperio(squares))
            lines.append(f"{name},{organ},published")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    (folder / "masks" / "none.png").write_bytes(b"")
    source = "prepare.source"
    return [
        f"{source}.images.uri={folder / 'images.csv'}",
        f"{source}.images.images={folder}/images/{{}}.png",
        f"{source}.masks={folder}/masks/{{}}.png",
        f"{source}.contours={folder}/xml/{{}}.xml.gz",
    ]
