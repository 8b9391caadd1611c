from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mint_ray.config.loader import UserError, from_data
from mint_ray.layouts import likelihood
from mint_ray.records import Label, Phenotype, Record
from mint_ray.teachers import Viewer, build_teacher
from mint_ray.teachers.config import Generative
from mint_ray.teachers.generative import GenerativeTeacher, GenerativeViewer, write_prompt
from tests.teachers.test_conformance import LABELS
from tests.tiny import save_tiny_student
from tests.vision_students import save_image, save_tiny_seeing

PROMPT = "{text} Findings: {findings}. Which?"
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
    """The same model, whose tokenizer has no chat template."""
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
    """Log-probability of `answer` and the end token behind `text`, in a plain pass of its own, and its tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logps = model(torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
    return sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)), len(tokens)


@pytest.mark.parametrize("normalise", ["mean", "sum"])
@pytest.mark.parametrize("per_pass", [256, 2])
def test_a_score_is_the_log_probability_of_the_name_and_the_end(
    model: Path, monkeypatch: pytest.MonkeyPatch, normalise: str, per_pass: int
) -> None:
    monkeypatch.setattr(likelihood, "COMPLETIONS_PER_PASS", per_pass)
    row = fitted(model, normalise=normalise).score([RECORD])[0]
    text = "<|im_start|>user\nA boy of four. Findings: Seizure. Which?<|im_end|>\n<|im_start|>assistant\n"
    names = {label.label_id: label.name for label in LABELS}
    for label, score in zip(row.labels, row.scores, strict=True):
        total, tokens = one_by_one(model, text, names[label])
        assert score == pytest.approx(total / tokens if normalise == "mean" else total, abs=1e-4)


def test_a_model_without_a_chat_template_goes_on_from_plain_text(plain: Path) -> None:
    row = fitted(plain, normalise="sum").score([RECORD])[0]
    text = "A boy of four. Findings: Seizure. Which?"
    expected = {label.label_id: one_by_one(plain, text, f" {label.name}")[0] for label in LABELS}
    for label, score in zip(row.labels, row.scores, strict=True):
        assert score == pytest.approx(expected[label], abs=1e-4)


def test_a_name_is_scored_with_its_end_so_that_it_differs_from_all_that_begin_with_it(model: Path) -> None:
    labels = [Label(label_id="1", name="Noonan syndrome"), Label(label_id="2", name="Noonan syndrome 1")]
    row = fitted(model, labels, normalise="sum").score([RECORD])[0]
    text = "<|im_start|>user\nA boy of four. Findings: Seizure. Which?<|im_end|>\n<|im_start|>assistant\n"
    assert row.scores == pytest.approx(
        sorted((one_by_one(model, text, x.name)[0] for x in labels), reverse=True), abs=1e-4
    )


def test_a_prompt_holds_what_the_template_names_and_no_more() -> None:
    assert write_prompt("{findings}|{absent}|{fields.age}|{fields.sex}", RECORD) == "Seizure|Cough|P4Y|"
    braces = dataclasses.replace(RECORD, text="{findings}")
    assert write_prompt("{text}", braces) == "{findings}"


def test_a_record_with_nothing_to_ask_about_or_too_much_fails_with_a_reason(model: Path) -> None:
    empty = Record(record_id="e", group_id="g")
    long = dataclasses.replace(RECORD, text="seizures " * 3000)
    assert [row.reason for row in fitted(model).score([empty, long])] == ["nothing_to_ask", "prompt_too_long"]


def test_its_identity_is_what_the_folder_holds(model: Path, plain: Path) -> None:
    assert fitted(model).inputs() == fitted(model).inputs() != fitted(plain).inputs()
    commit = "0123456789" * 4
    assert GenerativeTeacher(Generative(model_id="someone/model", revision=commit)).inputs() == {"model": commit}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_id": "someone/model"}, "no folder 'someone/model'; a model of the Hub needs its commit"),
        ({"model_id": "m", "revision": "main"}, "revision must be a commit of 40 hexadecimal digits, got 'main'"),
        ({"model_id": "m", "prompt": "{image}"}, "{image} is no part of a record; known: text, findings"),
        ({"model_id": "m", "prompt": "Which?"}, "holds nothing of the record"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        GenerativeTeacher(from_data(Generative, settings)).inputs()
    assert message in str(caught.value)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no \.safetensors"):
        fitted(tmp_path).inputs()


@pytest.fixture(scope="module", params=["llava", "mllama"])
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_seeing(tmp_path_factory.mktemp("seeing") / "model", request.param)


def viewer(folder: Path) -> GenerativeViewer:
    found = build_teacher(Generative(model_id=str(folder), prompt="{text} Which?", shows_image=True, normalise="sum"))
    assert isinstance(found, GenerativeViewer)
    found.fit(LABELS, [])
    return found


def with_image(folder: Path, image_uri: str, answer: str) -> float:
    """Log-probability of `answer` and the end token behind image and prompt, in a plain pass of its own."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    parts = [{"type": "image"}, {"type": "text", "text": "A boy of four. Which?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    image = Image.open(image_uri).convert("RGB")
    asked = processor(text=[prompt], images=[image], return_tensors="pt")
    said = processor(text=[prompt + answer + "<|im_end|>"], images=[image], return_tensors="pt")
    with torch.no_grad():
        logps = model(**said).logits[0].double().log_softmax(-1)
    first, ids = asked["input_ids"].shape[1], said["input_ids"][0]
    assert ids[:first].tolist() == asked["input_ids"][0].tolist()
    return sum(float(logps[place - 1, ids[place]]) for place in range(first, len(ids)))


def test_a_model_that_sees_scores_names_behind_the_image(seeing: Path, tmp_path: Path) -> None:
    record = dataclasses.replace(RECORD, image_uri=save_image(tmp_path / "a.png", 1))
    row = viewer(seeing).score([record])[0]
    names = {label.label_id: label.name for label in LABELS}
    expected = [with_image(seeing, str(tmp_path / "a.png"), names[label]) for label in row.labels]
    assert row.scores == pytest.approx(expected, abs=1e-3)


def test_another_image_gives_other_scores_and_none_is_asked_about_by_the_prompt_alone(
    seeing: Path, tmp_path: Path
) -> None:
    teacher = viewer(seeing)
    images = [save_image(tmp_path / f"{seed}.png", seed) for seed in (1, 2)]
    records = [dataclasses.replace(RECORD, image_uri=uri) for uri in (*images, None)]
    first, second, without = teacher.score(records)
    assert isinstance(teacher, Viewer)
    assert len({tuple(row.scores) for row in (first, second, without)}) == 3
    unread = dataclasses.replace(RECORD, text=None, image_uri=None)
    missing = dataclasses.replace(RECORD, image_uri=str(tmp_path / "gone.png"))
    alone = dataclasses.replace(RECORD, text=None, image_uri=images[0])
    assert [row.reason for row in teacher.score([unread, missing, alone])] == ["nothing_to_ask", "image_missing", None]


def test_a_model_that_reads_is_refused_where_images_are_to_be_shown(model: Path) -> None:
    with pytest.raises(UserError, match="reads text alone, and shows_image is set"):
        viewer(model).inputs()
