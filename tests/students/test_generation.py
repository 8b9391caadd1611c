"""Generation: answers do not depend on the batch, and equal plain greedy decoding."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from mint_ray.config.loader import UserError
from mint_ray.records import Message
from mint_ray.students.config import Generation, Student
from mint_ray.students.generation import StudentGenerator
from mint_ray.students.loading import load_model, load_tokenizer
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
    """Decode greedily without padding or cache: the whole text runs again at every step."""
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


def test_an_answer_does_not_depend_on_the_batch(student: Student) -> None:
    generator = StudentGenerator(student, Generation(max_new_tokens=24), batch_size=4)
    together = generator.generate(PROMPTS)
    assert together == [generator.generate([prompt])[0] for prompt in PROMPTS]
    assert generator.generate(PROMPTS[::-1]) == together[::-1]
    assert len(set(together)) == len(PROMPTS)


def test_answers_equal_plain_greedy_decoding(student: Student) -> None:
    answers = StudentGenerator(student, Generation(max_new_tokens=12)).generate(PROMPTS)
    tokenizer = load_tokenizer(student)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = greedy_ids(student, prompt, 12)
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
        assert answer == tokenizer.decode(ids[:end], skip_special_tokens=True)


def test_an_answer_ends_before_eos(folder: Path, student: Student) -> None:
    tokenizer = load_tokenizer(student)
    ids = greedy_ids(student, PROMPTS[0], 12)
    # the fifth token of the answer becomes an EOS token of the checkpoint
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, ids[4]]}))
    answer, other = StudentGenerator(student, Generation(max_new_tokens=12)).generate(PROMPTS[:2])
    assert ids[4] not in ids[:4]
    assert answer == tokenizer.decode(ids[:4], skip_special_tokens=True)
    assert other


def test_sampling_settings_of_the_checkpoint_are_ignored(folder: Path, student: Student) -> None:
    before = StudentGenerator(student, Generation(max_new_tokens=12)).generate(PROMPTS)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "min_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert StudentGenerator(student, Generation(max_new_tokens=12)).generate(PROMPTS) == before


def test_no_prompts_give_no_answers(student: Student) -> None:
    assert StudentGenerator(student, Generation()).generate([]) == []


def test_a_prompt_that_exceeds_the_context_is_rejected(student: Student) -> None:
    generator = StudentGenerator(student, Generation(max_new_tokens=2040))
    with pytest.raises(UserError, match=r"2040 new tokens exceed the model's context of 2048"):
        generator.generate(PROMPTS)
