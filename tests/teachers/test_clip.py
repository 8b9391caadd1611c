"""A CLIP teacher gives the scores of the transformers model; probes and temperatures improve them."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from mint_ray.config.loader import UserError
from mint_ray.images import ImageError, read_image
from mint_ray.records import Label, Record, TeacherScores
from mint_ray.teachers import ImageTeacher, build_teacher, teacher_inputs
from mint_ray.teachers.clip import ClipTeacher
from mint_ray.teachers.config import Clip
from mint_ray.teachers.two_tower import build_transform
from tests.teachers.tiny_clip import MEAN, SIZE, STD, save_tiny_clip
from tests.tiny import save_tiny_student

LABELS = [
    Label(label_id="nv", name="nevus", synonyms=["mole"]),
    Label(label_id="mel", name="melanoma"),
    Label(label_id="df", name="dermatofibroma"),
]
TEMPLATES = ("a photo of {}.", "{}, seen through a dermatoscope")


@pytest.fixture(scope="module", params=["clip", "siglip"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_clip(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save five images of noise, of the model's own size, and a file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "bad.png").write_bytes(b"no image")
    return folder


def record(number: int, image: Path | None = None, **changes: Any) -> Record:
    return Record(record_id=f"r{number}", group_id=f"g{number}", image_uri=image and str(image), **changes)


def fitted(folder: Path, records: list[Record] = [], **settings: Any) -> ClipTeacher:  # noqa: B006
    teacher = ClipTeacher(Clip(model_id=str(folder), **({"templates": TEMPLATES} | settings)))
    teacher.fit(LABELS, records)
    return teacher


def scores(row: TeacherScores) -> list[float]:
    """Return the scores in the order of the labels."""
    by_label = dict(zip(row.labels, row.scores, strict=True))
    return [by_label[label.label_id] for label in LABELS]


def pixel_values(image: Path) -> torch.Tensor:
    values = np.asarray(Image.open(image)).astype(np.float64) / 255
    return torch.tensor((values - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)[None]


def test_zero_shot_scores_are_those_of_the_model(model: Path, images: Path) -> None:
    labels = [dataclasses.replace(label, synonyms=[]) for label in LABELS]
    teacher = ClipTeacher(Clip(model_id=str(model)))
    teacher.fit(labels, [])
    reference, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    texts = tokenizer(
        [f"a photo of {label.name}." for label in labels], padding="max_length", truncation=True, return_tensors="pt"
    )
    rows = teacher.score([record(number, images / f"{number}.png") for number in range(3)])
    for number, row in enumerate(rows):
        with torch.no_grad():
            logits = reference(**texts, pixel_values=pixel_values(images / f"{number}.png")).logits_per_image[0]
        assert scores(row) == pytest.approx(logits.log_softmax(-1).tolist(), abs=2e-5)
        assert row.scores == sorted(row.scores, reverse=True)
    assert len({tuple(row.labels) + tuple(row.scores) for row in rows}) == 3


def test_a_label_is_the_mean_of_its_names_in_all_templates(clip: Path, images: Path) -> None:
    reference, tokenizer = AutoModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)

    def embed(text: str) -> torch.Tensor:
        vector = reference.get_text_features(**tokenizer([text], return_tensors="pt")).pooler_output[0]
        return vector / vector.norm()

    with torch.no_grad():
        names = [
            torch.stack([embed(t.replace("{}", n)) for n in (x.name, *x.synonyms) for t in TEMPLATES]) for x in LABELS
        ]
        means = torch.stack([vectors.mean(0) / vectors.mean(0).norm() for vectors in names])
        image = reference.get_image_features(pixel_values=pixel_values(images / "0.png")).pooler_output[0]
        expected = (math.exp(2.0) * means @ (image / image.norm())).log_softmax(-1).tolist()
    assert [len(vectors) for vectors in names] == [4, 2, 2]
    assert scores(fitted(clip).score([record(0, images / "0.png")])[0]) == pytest.approx(expected, abs=2e-5)


def test_image_and_text_are_averaged_with_weights_and_either_is_sufficient(clip: Path, images: Path) -> None:
    teacher = fitted(clip, text_template="{text} {fields.age}", text_weight=0.25)
    image, both, text = teacher.score(
        [
            record(1, images / "1.png"),
            record(2, images / "1.png", text="a dark mole", fields={"age": "45"}),
            record(3, text="a dark mole", fields={"age": "45"}),
        ]
    )
    pooled = torch.tensor([0.75 * i + 0.25 * t for i, t in zip(scores(image), scores(text), strict=True)])
    assert scores(both) == pytest.approx(pooled.log_softmax(-1).tolist(), abs=1e-5)
    assert scores(image) != scores(text)


def test_the_text_is_ignored_without_a_template(clip: Path, images: Path) -> None:
    teacher = fitted(clip)
    image, image_and_text = teacher.score(
        [record(1, images / "1.png"), record(2, images / "1.png", text="a dark mole")]
    )
    assert scores(image) == scores(image_and_text)
    assert [row.reason for row in teacher.score([record(3, text="a dark mole")])] == ["no_input"]


def test_a_record_without_input_or_with_a_broken_image_fails_with_the_reason(clip: Path, images: Path) -> None:
    teacher = fitted(clip, text_template="{text}")
    rows = teacher.score(
        [
            record(1, images / "bad.png", text="a mole"),
            record(2, images / "1.png"),
            record(3),
            record(4, images / "gone.png"),
        ]
    )
    assert [row.reason for row in rows] == ["image_unknown_format", None, "no_input", "image_missing"]
    assert [row.status for row in rows] == ["failed", "ok", "failed", "failed"]


@pytest.mark.parametrize("size", [1, 4])
def test_the_scores_of_a_record_do_not_depend_on_its_batch(
    clip: Path, images: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("mint_ray.teachers.two_tower.ROWS_PER_PASS", {"cpu": size})
    teacher = fitted(clip, text_template="{text}")
    records = [record(number, images / f"{number}.png", text="a mole" if number % 2 else None) for number in range(5)]
    together = teacher.score(records)
    assert [teacher.score([single])[0] for single in records] == together
    assert teacher.score(records[::-1]) == together[::-1]
    assert pickle.loads(pickle.dumps(teacher)).score(records) == together  # noqa: S301


def test_images_can_be_decoded_elsewhere(clip: Path, images: Path) -> None:
    teacher = build_teacher(Clip(model_id=str(clip)))
    assert isinstance(teacher, ImageTeacher)
    teacher.fit(LABELS, [])
    assert (teacher.frame().size, teacher.frame().fit) == (SIZE, "crop")
    pixels = np.asarray(Image.open(images / "2.png"))
    rows = teacher.score_images([record(1), record(2), record(3)], [pixels, ImageError("image_corrupt", "x"), None])
    assert scores(rows[0]) == scores(teacher.score([record(1, images / "2.png")])[0])
    assert [row.reason for row in rows[1:]] == ["image_corrupt", "no_input"]


@pytest.mark.parametrize("margin", [0, 8])
def test_pixels_are_those_of_the_model_s_own_processor(model: Path, tmp_path: Path, margin: int) -> None:
    settings = json.loads((model / "preprocessor_config.json").read_text())
    if margin and "crop_size" in settings:
        settings["size"] = SIZE + margin
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    down, across = np.mgrid[0:100, 0:160]
    pixels = np.stack([down * 2, across, 255 - down - across // 2], axis=-1).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    own = AutoImageProcessor.from_pretrained(folder, backend="pil")
    expected = own(Image.open(tmp_path / "wide.png"), return_tensors="pt")["pixel_values"]
    transform = build_transform(own, Clip(model_id=str(folder)))
    values = transform(torch.from_numpy(read_image(str(tmp_path / "wide.png"), transform.frame))[None])
    assert values.shape == expected.shape == (1, 3, SIZE, SIZE)
    # cropped and scaled in another order: up to half a pixel apart, 2 of 255 where pixels change fastest
    assert (values - expected).abs().max() < 6 / 255 / min(STD)
    assert (values - expected).abs().mean() < 2 / 255 / min(STD)


def color_records(folder: Path, split: str, count: int, noise: float, first: int = 0) -> list[Record]:
    """Return records of red, green and blue images with noise; each color is a label."""
    rng = np.random.default_rng([count, first])
    records = []
    for number in range(count):
        tint = np.zeros(3)
        tint[number % 3] = 60.0
        pixels = np.clip(110 + tint + rng.normal(0, noise, (SIZE, SIZE, 3)) + rng.normal(0, noise / 4, 3), 0, 255)
        path = folder / f"{split}{first + number}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        records.append(record(first + number, path, label_id=LABELS[number % 3].label_id, split=split))
    return records


def accuracy(teacher: ClipTeacher, records: list[Record]) -> float:
    rows = teacher.score(records)
    return sum(row.labels[0] == case.label_id for row, case in zip(rows, records, strict=True)) / len(records)


def test_a_probe_separates_colors_that_zero_shot_does_not(clip: Path, tmp_path: Path) -> None:
    train, validation = color_records(tmp_path, "train", 45, 8.0), color_records(tmp_path, "validation", 30, 8.0, 100)
    test = color_records(tmp_path, "test", 30, 8.0, 200)
    teacher = ClipTeacher(Clip(model_id=str(clip), mode="linear_probe"))
    blank = record(900, label_id="nv", split="train")
    report = teacher.fit(LABELS, [*train, *validation, *test, blank, record(901, label_id="other", split="train")])
    assert report.counts == {
        "labels": 3, "image_train_records": 45, "image_train_labels": 3, "image_calibration_records": 30,
    }  # fmt: skip
    assert report.dropped == {"no_input": 1, "no_label": 1}
    assert accuracy(teacher, test) > 0.9 > 0.6 > accuracy(fitted(clip), test)
    saved = tmp_path / "saved"
    saved.mkdir()
    teacher.save(saved)
    loaded = ClipTeacher(teacher.config)
    loaded.load(saved)
    assert loaded.score(test) == teacher.score(test)
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}


def test_a_probe_of_the_text_adds_what_the_image_lacks(clip: Path, images: Path) -> None:
    words = ("red spot", "blue spot", "no spot")
    cases = [
        record(
            i,
            images / "0.png",
            text=words[i % 3],
            label_id=LABELS[i % 3].label_id,
            split=("train", "validation")[i // 12],
        )
        for i in range(24)
    ]
    teacher = fitted(clip, cases, mode="linear_probe", text_template="{text}")
    assert accuracy(teacher, cases) == 1.0
    text_only = [dataclasses.replace(case, image_uri=None) for case in cases]
    assert accuracy(teacher, text_only) == 1.0
    assert accuracy(teacher, [dataclasses.replace(case, text=None) for case in cases]) < 0.5


def test_a_temperature_increases_the_likelihood_of_the_validation_labels(clip: Path, tmp_path: Path) -> None:
    validation, test = color_records(tmp_path, "validation", 30, 20.0), color_records(tmp_path, "test", 6, 20.0, 100)
    plain, calibrated = fitted(clip), fitted(clip, validation)
    unlabelled = fitted(clip, [dataclasses.replace(case, label_id=None) for case in validation])
    off = fitted(clip, validation, calibrate=False)

    def loss(teacher: ClipTeacher) -> float:
        index = {label.label_id: i for i, label in enumerate(LABELS)}
        rows = teacher.score(validation)
        return -sum(scores(row)[index[case.label_id or ""]] for row, case in zip(rows, validation, strict=True))

    assert loss(calibrated) < loss(plain)
    assert plain.score(test) == unlabelled.score(test) == off.score(test)
    assert [row.labels for row in plain.score(test)] == [row.labels for row in calibrated.score(test)]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "with an image; there are none among 0 records .dropped: none"),
        (["bad"], "with an image; there are none among 1 records .dropped: image_unknown_format 1"),
        (
            ["train"],
            "linear_probe chooses inverse_regularization on labelled validation records with an image; there are none",
        ),
    ],
)
def test_a_probe_without_training_or_validation_records_is_an_error(
    clip: Path, images: Path, records: list[str], message: str
) -> None:
    paths = {"train": images / "1.png", "bad": images / "bad.png"}
    cases = [record(1, paths[name], label_id="nv", split="train") for name in records]
    with pytest.raises(UserError, match=message):
        fitted(clip, cases, mode="linear_probe")


def test_a_given_regularization_needs_no_validation_and_a_label_without_records_is_last(
    clip: Path, images: Path
) -> None:
    cases = [record(i, images / f"{i}.png", label_id=LABELS[i % 2].label_id, split="train") for i in range(4)]
    teacher = fitted(clip, cases, mode="linear_probe", inverse_regularization=100.0)
    assert {row.labels[-1] for row in teacher.score(cases)} == {"df"}


def test_a_model_without_two_towers_is_an_error(tmp_path: Path) -> None:
    folder = save_tiny_student(tmp_path / "llama")
    teacher = ClipTeacher(Clip(model_id=str(folder), text_template="{text}"))
    teacher.fit(LABELS, [])
    with pytest.raises(UserError, match=r"llama is no model of the CLIP family: no get_image_features"):
        teacher.score_images([record(1, text="a mole")], [None])


def test_images_that_are_not_square_are_an_error(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    shutil.copytree(clip, folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"size": {"height": 16, "width": 32}, "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="its images are not square: size"):
        ClipTeacher(Clip(model_id=str(folder))).frame()


def test_the_identity_is_a_sha256_of_the_folder_or_the_commit(clip: Path) -> None:
    assert len(teacher_inputs(Clip(model_id=str(clip)))["model"]) == 64
    assert teacher_inputs(Clip(model_id="vinid/plip", revision="0" * 40)) == {"model": "0" * 40}
