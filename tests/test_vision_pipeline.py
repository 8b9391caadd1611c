"""A whole run with a vision-language student that reads images only, from pixels to the report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

from mint_ray.artifacts import Artifact, open_artifact, read_part, verify
from mint_ray.cli import cli
from mint_ray.config.loader import UserError, load
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.lineage import AnswerRequest
from mint_ray.pipeline import run_pipeline
from mint_ray.records import Label, Prediction, Record, TokenizedRecord, from_table
from mint_ray.runtime.student_actors import RecordsRange, StudentActor
from tests.tiny import save_tiny_student
from tests.vision_students import save_tiny_vlm

COLORS = ["red", "green", "blue"]


def write_images(folder: Path, each: int = 8) -> None:
    rng = np.random.default_rng(0)
    for number in range(3 * each):
        pixels = rng.integers(0, 90, (36, 44, 3))
        pixels[..., number % 3] += 150
        path = folder / COLORS[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_spec(folder: Path, student: Path) -> Path:
    spec = folder / "spec.yaml"
    spec.write_text(f"""
task:
  kind: image_label
  question: Which color is this?
  names: [{{label_id: red, name: Red}}, {{label_id: green, name: Green}}, {{label_id: blue, name: Blue}}]
prepare:
  source: {{kind: image_folder, uri: {folder / "images"}}}
  splits: {{validation: 0.2, test: 0.3}}
fit:
  teacher: {{kind: import, path: "tests.teachers.color_teacher:ColorTeacher"}}
pair: {{sampler: {{kind: hard, top: 1}}}}
train:
  student: {{model_id: {student}, lora_rank: 2}}
  trainer: {{train_batch_size: 4, max_length: 512, max_steps: 2, logging_steps: 1}}
  resources: {{cpus_per_worker: 1, per_device_train_batch_size: 2, max_tokens_per_row: 600}}
evaluate:
  generation: {{max_new_tokens: 6, modes: [free, constrained, rank]}}
  resources: {{cpus_per_actor: 1, batch_size: 4}}
""")
    return spec


def config(folder: Path, student: Path, *overrides: str) -> PipelineConfig:
    loaded: PipelineConfig = load(
        PipelineConfig, write_spec(folder, student), [f"root={folder / 'out'}", *overrides], ()
    )
    return loaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    write_images(folder / "images")
    save_tiny_vlm(folder / "student")
    return folder


@pytest.fixture(scope="module")
def done(ray_cluster: None, folder: Path) -> dict[str, Artifact]:
    return run_pipeline(config(folder, folder / "student"))


@pytest.mark.ray
@pytest.mark.slow
def test_every_stage_leaves_an_artifact_that_verifies(done: dict[str, Artifact]) -> None:
    for artifact in done.values():
        assert verify(artifact.uri) == []
    assert done["train"].manifest.metrics["layout"] == "shared_prefix"
    assert done["train"].manifest.metrics["steps"] == 2


@pytest.mark.ray
@pytest.mark.slow
def test_tokenized_records_have_image_tokens_and_uris(done: dict[str, Artifact], folder: Path) -> None:
    rows = done["tokenize"].rows(TokenizedRecord, "train")
    image_token = json.loads((folder / "student" / "config.json").read_text())["image_token_index"]
    assert rows
    for row in rows:
        assert row.prompt_ids.count(image_token) == 16
        assert row.image_uri == f"{folder}/images/{row.record_id}"


@pytest.mark.ray
@pytest.mark.slow
def test_language_model_and_projector_are_trained_and_the_encoder_is_frozen(done: dict[str, Artifact]) -> None:
    saved = load_file(Path(done["train"].uri) / "adapter" / "adapter_model.safetensors")
    assert any("language_model" in name for name in saved)
    assert any("multi_modal_projector" in name for name in saved)
    assert not any("vision_tower" in name for name in saved)
    assert any(weight.abs().max() > 0 for name, weight in saved.items() if "lora_B" in name)
    assert {"processor_config.json", "tokenizer.json"} <= {
        path.name for path in (Path(done["train"].uri) / "adapter").iterdir()
    }


@pytest.mark.ray
@pytest.mark.slow
def test_every_mode_answers_every_record(done: dict[str, Artifact]) -> None:
    rows = done["evaluate"].rows(Prediction, "predictions")
    counts = Counter((row.student, row.mode) for row in rows)
    for row in rows:
        if row.mode == "rank" and row.student != "teacher":
            assert sorted(row.labels) == sorted(COLORS)
            assert sum(row.scores) == pytest.approx(1.0)
        if row.mode == "constrained":
            assert row.labels[0] in COLORS
            assert len(row.labels) == 1
    students = {name for name in counts if name[0] != "teacher"}
    assert students == {(student, mode) for student in ("base", "aligned") for mode in ("free", "constrained", "rank")}
    assert len(set(counts.values())) == 1


@pytest.mark.parametrize(
    ("student", "shows", "message"),
    [
        ("text", "true", "takes no images, but the task shows them"),
        ("student", "false", "is a vision-language model, but the task shows no images"),
    ],
)
def test_a_student_that_does_not_fit_the_task_is_rejected(folder: Path, student: str, shows: str, message: str) -> None:
    save_tiny_student(folder / "text")
    overrides = [f"task.show_image={shows}", "task.visible_fields=[age]"]
    with pytest.raises(UserError, match=message):
        run_pipeline(config(folder, folder / student, *overrides), "tokenize")


def test_check_reports_the_effect_of_the_image(folder: Path) -> None:
    spec = write_spec(folder, folder / "student")
    done = CliRunner().invoke(cli, ["check", str(spec), "--pixels", "--root", str(folder / "out")])
    assert done.exit_code == 0, done.output
    assert "image replaced by that of record" in done.output
    assert "image replaced by plain gray: token log-probabilities change by up to" in done.output


def test_check_fails_if_the_image_has_no_effect(folder: Path, tmp_path: Path) -> None:
    student = save_tiny_vlm(tmp_path / "student", "mllama")
    weights = load_file(student / "model.safetensors")
    # cross-attention whose gates are closed
    closed = {name: weight * 0 if "cross_attn_" in name else weight for name, weight in weights.items()}
    save_file(closed, student / "model.safetensors", metadata={"format": "pt"})
    spec = write_spec(folder, student)
    done = CliRunner().invoke(
        cli, ["check", str(spec), "--pixels", "--root", str(folder / "out"), "train.student.modules_to_save=[]"]
    )
    assert done.exit_code == 1, done.output
    assert "the student ignores the image" in done.output


def test_records_without_a_readable_image_are_not_answered(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    settings = config(folder, folder / "student")
    labels = [Label(label_id=colour, name=colour.title()) for colour in COLORS]
    found = sorted((folder / "images").rglob("*.png"))
    uris = [str(found[0]), str(tmp_path / "missing.png"), None, str(found[1])]
    records = open_artifact(str(tmp_path), "prepare", {}, {})
    with records.write() as draft:
        draft.write_rows(
            Record,
            "records",
            [
                Record(record_id=f"r{number}", group_id="g", split="test", image_uri=uri)
                for number, uri in enumerate(uris)
            ],
        )
    for mode in ("free", "rank"):
        request = AnswerRequest(
            student=settings.train.student, generation=settings.evaluate.generation, mode=mode, task=settings.task,
            num_labels=1,
        )  # fmt: skip
        artifact = open_artifact(str(tmp_path), "answer", request.settings(), {})
        actor = StudentActor(artifact, request, labels, settings.evaluate.resources)
        uri = records.file_uri(records.table_files("records")[0].path)
        made = actor.work(RecordsRange(path="answers/part.parquet", uri=uri, start=0))
        rows = from_table(Prediction, read_part(artifact.file_uri("answers/part.parquet")))
        assert [row.record_id for row in rows] == ["r0", "r1", "r2", "r3"]
        assert [row.reason for row in rows][1:3] == ["image_missing", "no_image"]
        assert made.counts["answers"] == 4
        assert made.dropped["image_missing"] == made.dropped["no_image"] == 1
        if mode == "rank":
            assert [len(row.labels) for row in rows] == [3, 0, 0, 3]
            assert rows[0].scores != rows[3].scores


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", ["null", "2", "3"])
def test_two_workers_train_on_images_as_one_does(ray_cluster: None, folder: Path, zero_stage: str) -> None:
    def adapter(*overrides: str) -> dict[str, torch.Tensor]:
        # five records per step: in the second of two micro-batches one worker has none
        settings = config(folder, folder / "student", "train.trainer.train_batch_size=5", *overrides)
        uri = run_pipeline(settings, "train")["train"].uri
        return load_file(Path(uri) / "adapter" / "adapter_model.safetensors")

    expected = adapter()
    found = adapter(
        f"root={folder / f'workers-{zero_stage}'}", "train.resources.num_workers=2",
        f"train.resources.zero_stage={zero_stage}", "train.resources.max_failures=0",
    )  # fmt: skip
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-5)
