"""A generative teacher gives the model's own log-probabilities of the names."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mint_ray.layouts import likelihood
from mint_ray.records import Label, Phenotype, Record
from mint_ray.teachers import ImageTeacher, build_teacher, teacher_inputs
from mint_ray.teachers.config import Generative
from mint_ray.teachers.generative import GenerativeImageTeacher, GenerativeTeacher
from tests.teachers.conformance import LABELS
from tests.tiny import save_tiny_student
from tests.vision_students import save_image, save_tiny_vlm

PROMPT = "{text} Findings: {phenotypes}. Which?"
RECORD = Record(
    record_id="r", group_id="g", text="A boy of four.", fields={"age": "P4Y"},
    phenotypes=[Phenotype(id="HP:1", label="Seizure"), Phenotype(id="HP:2", label="Cough", excluded=True)],
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_student(tmp_path_factory.mktemp("model"))


@pytest.fixture
def plain(model: Path, tmp_path: Path) -> Path:
    """Save the same model without a chat template."""
    folder = tmp_path / "plain"
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def fitted(folder: Path, labels: list[Label] = LABELS, **settings: str) -> GenerativeTeacher:
    teacher = GenerativeTeacher(Generative(model_id=str(folder), **({"prompt": PROMPT} | settings)))  # type: ignore[arg-type]
    teacher.fit(labels, [])
    return teacher


def one_by_one(folder: Path, text: str, answer: str) -> tuple[float, int]:
    """Return the log-probability of `answer` and EOS given `text`, from a pass of its own, and its number of tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logps = model(torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
    return sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)), len(tokens)


@pytest.mark.parametrize("length_normalization", ["mean", "sum"])
@pytest.mark.parametrize("per_pass", [256, 2])
def test_a_score_is_the_log_probability_of_the_name_and_eos(
    model: Path, monkeypatch: pytest.MonkeyPatch, length_normalization: str, per_pass: int
) -> None:
    monkeypatch.setattr(likelihood, "COMPLETIONS_PER_PASS", per_pass)
    row = fitted(model, length_normalization=length_normalization).score([RECORD])[0]
    text = "<|im_start|>user\nA boy of four. Findings: Seizure. Which?<|im_end|>\n<|im_start|>assistant\n"
    names = {label.label_id: label.name for label in LABELS}
    for label, score in zip(row.labels, row.scores, strict=True):
        total, tokens = one_by_one(model, text, names[label])
        assert score == pytest.approx(total / tokens if length_normalization == "mean" else total, abs=1e-4)


def test_a_model_without_a_chat_template_continues_plain_text(plain: Path) -> None:
    row = fitted(plain, length_normalization="sum").score([RECORD])[0]
    text = "A boy of four. Findings: Seizure. Which?"
    expected = {label.label_id: one_by_one(plain, text, f" {label.name}")[0] for label in LABELS}
    for label, score in zip(row.labels, row.scores, strict=True):
        assert score == pytest.approx(expected[label], abs=1e-4)


def test_a_name_is_scored_with_eos_and_so_differs_from_longer_names_that_begin_with_it(model: Path) -> None:
    labels = [Label(label_id="1", name="Noonan syndrome"), Label(label_id="2", name="Noonan syndrome 1")]
    row = fitted(model, labels, length_normalization="sum").score([RECORD])[0]
    text = "<|im_start|>user\nA boy of four. Findings: Seizure. Which?<|im_end|>\n<|im_start|>assistant\n"
    assert row.scores == pytest.approx(
        sorted((one_by_one(model, text, x.name)[0] for x in labels), reverse=True), abs=1e-4
    )


def test_a_record_with_an_empty_or_too_long_prompt_fails_with_a_reason(model: Path) -> None:
    empty = Record(record_id="e", group_id="g")
    long = dataclasses.replace(RECORD, text="seizures " * 3000)
    assert [row.reason for row in fitted(model).score([empty, long])] == ["empty_prompt", "prompt_too_long"]


def test_the_identity_is_a_sha256_of_the_folder_or_the_commit(model: Path, plain: Path) -> None:
    first, second = (teacher_inputs(Generative(model_id=str(folder))) for folder in (model, plain))
    assert first != second
    assert first == teacher_inputs(Generative(model_id=str(model)))
    commit = "0123456789" * 4
    assert teacher_inputs(Generative(model_id="someone/model", revision=commit)) == {"model": commit}


@pytest.fixture(scope="module", params=["llava", "mllama"])
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_vlm(tmp_path_factory.mktemp("vlm") / "model", request.param)


def image_teacher(folder: Path) -> GenerativeImageTeacher:
    found = build_teacher(
        Generative(model_id=str(folder), prompt="{text} Which?", show_image=True, length_normalization="sum")
    )
    assert isinstance(found, GenerativeImageTeacher)
    found.fit(LABELS, [])
    return found


def with_image(folder: Path, image_uri: str, answer: str) -> float:
    """Return the log-probability of `answer` and EOS given image and prompt, in a forward pass of its own."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    parts = [{"type": "image"}, {"type": "text", "text": "A boy of four. Which?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    image = Image.open(image_uri).convert("RGB")
    prompt_inputs = processor(text=[prompt], images=[image], return_tensors="pt")
    inputs = processor(text=[prompt + answer + "<|im_end|>"], images=[image], return_tensors="pt")
    with torch.no_grad():
        logps = model(**inputs).logits[0].double().log_softmax(-1)
    first, ids = prompt_inputs["input_ids"].shape[1], inputs["input_ids"][0]
    assert ids[:first].tolist() == prompt_inputs["input_ids"][0].tolist()
    return sum(float(logps[i - 1, ids[i]]) for i in range(first, len(ids)))


def test_an_image_teacher_scores_names_given_image_and_prompt(vlm: Path, tmp_path: Path) -> None:
    record = dataclasses.replace(RECORD, image_uri=save_image(tmp_path / "a.png", 1))
    row = image_teacher(vlm).score([record])[0]
    names = {label.label_id: label.name for label in LABELS}
    expected = [with_image(vlm, str(tmp_path / "a.png"), names[label]) for label in row.labels]
    assert row.scores == pytest.approx(expected, abs=1e-3)


def test_scores_depend_on_the_image_and_a_record_without_one_is_scored_by_the_prompt(vlm: Path, tmp_path: Path) -> None:
    teacher = image_teacher(vlm)
    images = [save_image(tmp_path / f"{seed}.png", seed) for seed in (1, 2)]
    records = [dataclasses.replace(RECORD, image_uri=uri) for uri in (*images, None)]
    first, second, text_only = teacher.score(records)
    assert isinstance(teacher, ImageTeacher)
    assert len({tuple(row.scores) for row in (first, second, text_only)}) == 3
    empty = dataclasses.replace(RECORD, text=None, image_uri=None)
    missing = dataclasses.replace(RECORD, image_uri=str(tmp_path / "gone.png"))
    image_only = dataclasses.replace(RECORD, text=None, image_uri=images[0])
    assert [row.reason for row in teacher.score([empty, missing, image_only])] == [
        "empty_prompt",
        "image_missing",
        None,
    ]
