"""One whole run of a student that is shown images and reads nothing else: pixels to report."""

from __future__ import annotations

import json
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
from mint_ray.pipeline import run_pipeline
from mint_ray.records import Label, Prediction, Record, TokenizedRecord, from_table
from mint_ray.stages.evaluate import Asked, RecordsRange, StudentActor
from tests.tiny import save_tiny_student
from tests.vision_students import save_tiny_seeing

COLOURS = ["red", "green", "blue"]


def write_images(folder: Path, each: int = 8) -> None:
    rng = np.random.default_rng(0)
    for number in range(3 * each):
        pixels = rng.integers(0, 90, (36, 44, 3))
        pixels[..., number % 3] += 150
        path = folder / COLOURS[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_spec(folder: Path, student: Path) -> Path:
    spec = folder / "seeing.yaml"
    spec.write_text(f"""
task:
  kind: image_label
  question: Which colour is this?
  names: [{{label_id: red, name: Red}}, {{label_id: green, name: Green}}, {{label_id: blue, name: Blue}}]
prepare:
  source: {{kind: image_folder, uri: {folder / "images"}}}
  splits: {{validation: 0.2, test: 0.3}}
fit:
  teacher: {{kind: import, path: "tests.teachers.colours:Colours"}}
pair: {{sampler: {{kind: hard, top: 1}}}}
train:
  student: {{model_id: {student}, lora_rank: 2}}
  trainer: {{train_batch_size: 4, max_length: 512, max_steps: 2, logging_steps: 1}}
  resources: {{cpus_per_worker: 1, per_device_train_batch_size: 2, row_tokens: 600}}
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
    folder = tmp_path_factory.mktemp("seeing")
    write_images(folder / "images")
    save_tiny_seeing(folder / "student")
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
def test_tokens_say_where_the_image_is_and_where_it_lies(done: dict[str, Artifact], folder: Path) -> None:
    rows = done["tokenize"].rows(TokenizedRecord, "train")
    word = json.loads((folder / "student" / "config.json").read_text())["image_token_index"]
    assert rows
    for row in rows:
        assert row.prompt_ids.count(word) == 16
        assert row.image_uri == f"{folder}/images/{row.record_id}"


@pytest.mark.ray
@pytest.mark.slow
def test_language_model_and_projector_learn_and_what_sees_rests(done: dict[str, Artifact]) -> None:
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
def test_every_way_to_answer_answers_every_record(done: dict[str, Artifact]) -> None:
    rows = done["evaluate"].rows(Prediction, "predictions")
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.method] = counts.get(row.method, 0) + 1
        if "ranked" in row.method:
            assert sorted(row.labels) == sorted(COLOURS)
            assert sum(row.scores) == pytest.approx(1.0)
        if "constrained" in row.method:
            assert row.labels[0] in COLOURS
            assert len(row.labels) == 1
    students = {name for name in counts if "student" in name}
    assert len(students) == 6
    assert len(set(counts.values())) == 1


@pytest.mark.parametrize(
    ("student", "shows", "message"),
    [
        ("reading", "true", "reads text alone, and the task shows images"),
        ("student", "false", "is made to see images, and the task shows none"),
    ],
)
def test_a_student_that_does_not_fit_the_task_is_refused(folder: Path, student: str, shows: str, message: str) -> None:
    save_tiny_student(folder / "reading")
    overrides = [f"task.shows_image={shows}", "task.told=[age]"]
    with pytest.raises(UserError, match=message):
        run_pipeline(config(folder, folder / student, *overrides), "tokenize")


def test_the_command_line_shows_that_pixels_reach_the_student(folder: Path) -> None:
    spec = write_spec(folder, folder / "student")
    done = CliRunner().invoke(cli, ["check", str(spec), "--pixels", "--root", str(folder / "out")])
    assert done.exit_code == 0, done.output
    assert "instead of its image that of record" in done.output
    assert "instead of its image plain grey: log-probabilities of tokens change by up to" in done.output


def test_the_command_line_says_when_they_do_not(folder: Path, tmp_path: Path) -> None:
    student = save_tiny_seeing(tmp_path / "student", "mllama")
    weights = load_file(student / "model.safetensors")
    # gates of a cross-attention that was never opened
    closed = {name: weight * 0 if "cross_attn_" in name else weight for name, weight in weights.items()}
    save_file(closed, student / "model.safetensors", metadata={"format": "pt"})
    spec = write_spec(folder, student)
    done = CliRunner().invoke(
        cli, ["check", str(spec), "--pixels", "--root", str(folder / "out"), "train.student.whole_parts=[]"]
    )
    assert done.exit_code == 1, done.output
    assert "the pixels do not reach the student" in done.output


def test_an_image_that_cannot_be_looked_at_is_not_answered_and_the_others_are(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    settings = config(folder, folder / "student")
    labels = [Label(label_id=colour, name=colour.title()) for colour in COLOURS]
    found = sorted((folder / "images").rglob("*.png"))
    uris = [str(found[0]), str(tmp_path / "gone.png"), None, str(found[1])]
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
        asked = Asked(
            student=settings.train.student, adapter=None, generation=settings.evaluate.generation, mode=mode,
            splits=("test",), task=settings.task, length=1,
        )  # fmt: skip
        artifact = open_artifact(str(tmp_path), "answer", asked.settings(), {})
        actor = StudentActor(artifact, asked, labels, settings.evaluate.resources)
        uri = records.file_uri(records.table_files("records")[0].path)
        made = actor.work(RecordsRange(path="answers/part.parquet", uri=uri, start=0, rows=4))
        rows = from_table(Prediction, read_part(artifact.file_uri("answers/part.parquet")))
        assert [row.record_id for row in rows] == ["r0", "r1", "r2", "r3"]
        assert [row.reason for row in rows][1:3] == ["image_missing", "no_image"]
        assert made.answers == 4
        assert made.dropped["image_missing"] == made.dropped["no_image"] == 1
        if mode == "rank":
            assert [len(row.labels) for row in rows] == [3, 0, 0, 3]
            assert rows[0].scores != rows[3].scores


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", ["null", "2", "3"])
def test_two_workers_learn_from_images_what_one_does(ray_cluster: None, folder: Path, zero_stage: str) -> None:
    def adapter(*overrides: str) -> dict[str, torch.Tensor]:
        # five records a step: in the second of its two micro-batches one worker has none
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
