"""Teachers are fitted here, or by gradient descent in Ray Train workers, with the same result on any number of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mint_ray.artifacts import RUNS, Artifact
from mint_ray.config.loader import UserError
from mint_ray.config.stages import Fit, FitResources
from mint_ray.records import Phenotype, Record, TeacherScores
from mint_ray.stages.fit import fit_teacher
from mint_ray.teachers import Teacher, build_teacher
from mint_ray.teachers.config import Fusion, FusionImage, Ontology
from tests.encoders import SIZE, save_tiny_vit
from tests.stages.inputs import write_records
from tests.teachers.conformance import LABELS

TWO_WORKERS = FitResources(num_workers=2, cpus_per_worker=0.5, max_failures=0)
ONE_WORKER = FitResources(cpus_per_worker=0.5, max_failures=0)


def load(artifact: Artifact, config: Any) -> Teacher:
    teacher = build_teacher(config)
    teacher.load(Path(artifact.file_uri("teacher")))
    return teacher


def scores_by_label(rows: list[TeacherScores]) -> list[list[float]]:
    return [[row.scores[row.labels.index(label.label_id)] for label in LABELS] for row in rows]


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(30):
        label = number % 3
        uri = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 90 * label + 60, (SIZE, SIZE, 3), dtype=np.uint8)).save(uri)
        rows.append(
            Record(
                record_id=f"r{number:02d}",
                group_id=f"g{number}",
                label_id=LABELS[label].label_id,
                split="validation" if number % 5 == 4 else "train",
                image_uri=str(uri),
                fields={"age": str(10 * label + number % 7)},
                phenotypes=[Phenotype(id="HP:0001250", label="")] if label else [],
            )
        )
    return rows


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_fit_the_teacher_that_one_process_fits(
    ray_cluster: None, tmp_path: Path, records: list[Record]
) -> None:
    torch.set_num_threads(1)
    config = Fusion(
        image=FusionImage(model_id=str(save_tiny_vit(tmp_path / "vit")), trainable="last:1"),
        fields={"age": "number"}, phenotypes=True, hidden_size=16, num_train_epochs=3, train_batch_size=7,
    )  # fmt: skip
    prepared = write_records(tmp_path / "out", records, LABELS)
    artifact = fit_teacher(str(tmp_path / "out"), Fit(teacher=config, resources=TWO_WORKERS), prepared)

    alone = build_teacher(config)
    report = alone.fit(LABELS, records)
    assert artifact.manifest.counts == report.counts
    assert artifact.manifest.metrics == pytest.approx(report.metrics, abs=2e-3)
    shared = scores_by_label(load(artifact, config).score(records))
    np.testing.assert_allclose(shared, scores_by_label(alone.score(records)), atol=2e-3)
    # the number of workers does not change the name, and no checkpoint is left
    again = fit_teacher(str(tmp_path / "out"), Fit(teacher=config), prepared)
    assert again.name == artifact.name
    assert not (tmp_path / "out" / RUNS / artifact.name).exists()


@pytest.mark.ray
def test_epochs_of_a_teacher_that_is_trained_in_workers_are_logged(
    ray_cluster: None, tmp_path: Path, records: list[Record], caplog: pytest.LogCaptureFixture
) -> None:
    prepared = write_records(tmp_path / "out", records, LABELS)
    config = Fusion(fields={"age": "number"}, phenotypes=True, hidden_size=16, num_train_epochs=3, train_batch_size=7)
    with caplog.at_level("INFO"):
        artifact = fit_teacher(str(tmp_path / "out"), Fit(teacher=config, resources=TWO_WORKERS), prepared)
    assert artifact.is_complete
    assert "fit: 3 of 3 epochs" in caplog.text


@pytest.mark.ray
def test_a_user_error_of_a_worker_has_the_same_message_here(
    ray_cluster: None, tmp_path: Path, records: list[Record]
) -> None:
    prepared = write_records(tmp_path / "out", records, LABELS)
    config = Fit(teacher=Fusion(fields={"height": "number"}), resources=ONE_WORKER)
    with pytest.raises(UserError, match=r"^fusion\.fields: no training record has the field 'height' \(number\)$"):
        fit_teacher(str(tmp_path / "out"), config, prepared)


def test_a_teacher_without_gradient_descent_is_fitted_in_this_process(tmp_path: Path, records: list[Record]) -> None:
    artifact = fit_teacher(str(tmp_path), Fit(teacher=Ontology()), write_records(tmp_path, records, LABELS))
    assert artifact.manifest.counts["labels_with_profile"] == 3
    assert artifact.manifest.metrics == {}
    assert load(artifact, Ontology()).score(records[1:2])[0].status == "ok"
