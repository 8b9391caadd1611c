"""A tiny student answers greedily whatever its batch, and its adapter survives a round trip."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mint_ray.config.loader import UserError
from mint_ray.records import Message
from mint_ray.students import Generation, Student, StudentGenerator, load_model, load_tokenizer, save_adapter
from tests.tiny import save_tiny_student

PROMPTS = [
    [Message(role="user", content=text)]
    for text in (
        "Which diseases fit this case best?",
        "A boy of four years with short stature, seizures and a broad nasal bridge was seen at the clinic. " * 3,
        "liver",
        "The most likely tissues are kidney, breast, colon and skin. Which of them is this?",
        "1. Noonan syndrome 2. Marfan syndrome",
    )
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_student(tmp_path / "student")


@pytest.fixture
def student(folder: Path) -> Student:
    return Student(model_id=str(folder), lora_rank=4, lora_alpha=8)


def greedy_ids(student: Student, prompt: list[Message], steps: int) -> list[int]:
    """Greedy decoding as the textbook has it: one prompt, no padding, no cache, the whole text again at every step."""
    tokenizer, model = load_tokenizer(student), load_model(student)
    text = tokenizer.apply_chat_template(
        [dataclasses.asdict(message) for message in prompt], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    new: list[int] = []
    with torch.inference_mode():
        for _ in range(steps):
            new.append(int(model(ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
    return new


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(torch.arange(3, 40).reshape(1, -1)).logits
    return logits


def train_a_little(model: Any) -> None:
    """Move every trainable weight; a fresh adapter changes nothing, since its second matrix is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


def test_an_answer_does_not_depend_on_its_batch(student: Student) -> None:
    generator = StudentGenerator(student, Generation(max_new_tokens=24), batch_size=4)
    together = generator.generate(PROMPTS)
    assert together == [generator.generate([prompt])[0] for prompt in PROMPTS]
    assert generator.generate(PROMPTS[::-1]) == together[::-1]
    assert len(set(together)) == len(PROMPTS)


def test_answers_are_those_of_textbook_greedy_decoding(student: Student) -> None:
    answers = StudentGenerator(student, Generation(max_new_tokens=12)).generate(PROMPTS)
    tokenizer = load_tokenizer(student)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = greedy_ids(student, prompt, 12)
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
        assert answer == tokenizer.decode(ids[:end], skip_special_tokens=True)


def test_an_answer_stops_before_the_end_token(folder: Path, student: Student) -> None:
    tokenizer = load_tokenizer(student)
    ids = greedy_ids(student, PROMPTS[0], 12)
    # the token that the student says fifth becomes an end token of the checkpoint
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, ids[4]]}))
    answer, other = StudentGenerator(student, Generation(max_new_tokens=12)).generate(PROMPTS[:2])
    assert ids[4] not in ids[:4]
    assert answer == tokenizer.decode(ids[:4], skip_special_tokens=True)
    assert other


def test_sampling_settings_of_the_checkpoint_are_not_followed(folder: Path, student: Student) -> None:
    before = StudentGenerator(student, Generation(max_new_tokens=12)).generate(PROMPTS)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "min_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert StudentGenerator(student, Generation(max_new_tokens=12)).generate(PROMPTS) == before


def test_no_prompts_give_no_answers(student: Student) -> None:
    assert StudentGenerator(student, Generation()).generate([]) == []


def test_a_prompt_beyond_the_context_is_refused(student: Student) -> None:
    generator = StudentGenerator(student, Generation(max_new_tokens=2040))
    with pytest.raises(UserError, match=r"2040 new ones exceed the model's context of 2048"):
        generator.generate(PROMPTS)


def test_only_the_adapter_learns(student: Student) -> None:
    model = load_model(student, trainable=True)
    learning = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(learning) == 2 * 7 * 2  # two layers of seven linear maps, two matrices each
    assert all("lora_" in name for name in learning)
    assert model.training


def test_every_weight_learns_without_a_rank(student: Student) -> None:
    model = load_model(dataclasses.replace(student, lora_rank=None), trainable=True)
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("lora_rank", [4, None])
def test_what_was_trained_answers_the_same_after_saving(
    student: Student, tmp_path: Path, lora_rank: int | None
) -> None:
    student = dataclasses.replace(student, lora_rank=lora_rank)
    base = logits_of(load_model(student))
    torch.manual_seed(0)
    model = load_model(student, trainable=True)
    train_a_little(model)
    trained = logits_of(model)

    save_adapter(model, load_tokenizer(student), tmp_path / "adapter")

    torch.testing.assert_close(logits_of(load_model(student, adapter=tmp_path / "adapter")), trained)
    assert not torch.allclose(trained, base, atol=1e-2)
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors" if lora_rank else "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt"))]


def test_training_resumes_from_a_saved_adapter(student: Student, tmp_path: Path) -> None:
    model = load_model(student, trainable=True)
    train_a_little(model)
    save_adapter(model, load_tokenizer(student), tmp_path / "adapter")
    resumed = load_model(student, adapter=tmp_path / "adapter", trainable=True)
    assert any(weight.requires_grad for weight in resumed.parameters())
    torch.testing.assert_close(logits_of(resumed), logits_of(model))


def test_an_adapter_names_its_base_as_the_config_does(student: Student, tmp_path: Path) -> None:
    save_adapter(load_model(student, trainable=True), load_tokenizer(student), tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == student.model_id


def test_an_adapter_of_the_other_kind_is_refused(student: Student, folder: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json, yet lora_rank is 4"):
        load_model(student, adapter=folder)


def test_a_student_without_a_chat_template_is_refused(student: Student, folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(student)
