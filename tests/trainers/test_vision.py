"""Records with images: tokenised, kept, judged by the base student and trained on, through every part of the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from mint_ray.artifacts import open_artifact
from mint_ray.config.loader import UserError
from mint_ray.layouts import Example
from mint_ray.models.vision_processor import Sight
from mint_ray.objectives.config import Orpo
from mint_ray.records import Message, PreferencePair, TokenizedRecord
from mint_ray.students import Student, load_model, student_place
from mint_ray.trainers import build_trainer
from mint_ray.trainers.config import Arguments, TrainResources
from mint_ray.trainers.examples import InMemory, StoredExamples, to_row
from mint_ray.trainers.reference import Reference
from mint_ray.trainers.shared_prefix import FILLER, _Rows
from mint_ray.trainers.tokenization import tokenize_pairs
from tests.tiny import tiny_tokenizer
from tests.vision_students import save_image, save_tiny_seeing


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_seeing(tmp_path_factory.mktemp("student"), "idefics3")


@pytest.fixture(scope="module")
def student(folder: Path) -> Student:
    return Student(model_id=str(folder), lora_rank=2)


@pytest.fixture(scope="module")
def sight(student: Student) -> Sight:
    return Sight(student_place(student))


def make_pair(number: int, other: int, uri: str | None, note: str = "") -> PreferencePair:
    text = f"{note}Which tissue is number {number}?"
    return PreferencePair(
        prompt=[Message(role="system", content="You see."), Message(role="user", content=text)],
        chosen=[Message(role="assistant", content="1. liver")],
        rejected=[Message(role="assistant", content=f"1. skin {other}")],
        record_id=f"r{number}", split="train", teacher="t", sampler="hard", chosen_labels=["a"], rejected_labels=["b"],
        image_uri=uri, note_span=[0, len(note)] if note else None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[PreferencePair]:
    """One or two pairs of each of five records, whose images take two numbers of tokens."""
    place = tmp_path_factory.mktemp("images")
    uris = [save_image(place / f"{number}.png", number, 64, 64 - 34 * (number % 2)) for number in range(5)]
    return [make_pair(number, other, uris[number]) for number in range(5) for other in range(1 + number % 2)]


def tokenize(pairs: list[PreferencePair], sight: Sight, **options: Any) -> list[Example]:
    return tokenize_pairs(pairs, tiny_tokenizer(), sight=sight, **({"max_length": 400} | options))[0]


def test_a_prompt_has_the_tokens_of_its_image_and_keeps_its_uri(pairs: list[PreferencePair], sight: Sight) -> None:
    examples = tokenize(pairs, sight)
    assert [example.record_id for example in examples] == ["r0", "r1", "r2", "r3", "r4"]
    for example in examples:
        pair = next(pair for pair in pairs if pair.record_id == example.record_id)
        view = sight.look(pair.image_uri or "")
        assert example.image_uri == pair.image_uri
        assert example.image is None  # it would be held for the whole part
        assert example.prompt_ids == sight.encode(pair.prompt, view)
        assert example.prompt_ids.count(sight.token_id) == view.tokens
    assert len({example.prompt_ids.count(sight.token_id) for example in examples}) == 2


def test_what_cannot_be_looked_at_is_dropped_with_its_reason(
    pairs: list[PreferencePair], sight: Sight, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    bad = [
        make_pair(10, 0, str(tmp_path / "gone.png")),
        make_pair(11, 0, str(tmp_path / "broken.png")),
        make_pair(12, 0, None),
        make_pair(13, 0, pairs[0].image_uri, note="<image> "),
    ]
    examples, tally = tokenize_pairs([*bad, *pairs], tiny_tokenizer(), 400, sight=sight)
    assert len(examples) == 5
    assert tally.dropped == {"image_missing": 1, "image_unknown_format": 1, "no_image": 1, "image_word_in_text": 1}


def test_a_note_is_cut_and_an_image_is_not(pairs: list[PreferencePair], sight: Sight) -> None:
    note = "short stature and seizures, " * 60
    long = make_pair(20, 0, pairs[0].image_uri, note)
    [whole] = tokenize([long], sight, max_length=5000)
    [cut] = tokenize([long], sight, max_length=500, overlong="cut")
    assert len(cut.prompt_ids) < 500 < len(whole.prompt_ids)
    assert cut.prompt_ids.count(sight.token_id) == whole.prompt_ids.count(sight.token_id) > 0


def test_pairs_that_do_not_fit_are_refused(pairs: list[PreferencePair], sight: Sight) -> None:
    with pytest.raises(UserError, match="record 'r0': its pairs carry an image, and the student reads text alone"):
        tokenize_pairs(pairs, tiny_tokenizer(), 400)
    with pytest.raises(UserError, match="record 'r1': its pairs differ in their images"):
        tokenize([pairs[1], dataclasses.replace(pairs[2], image_uri=pairs[0].image_uri)], sight)


def test_an_answer_that_holds_the_token_of_an_image_is_refused(pairs: list[PreferencePair], tmp_path: Path) -> None:
    # Gemma 3 has one word for the place of an image, and another for its tokens
    sight = Sight(student_place(Student(model_id=str(save_tiny_seeing(tmp_path / "student", "gemma3")))))
    says = dataclasses.replace(pairs[0], chosen=[Message(role="assistant", content="1. <image_soft_token>")])
    with pytest.raises(UserError, match="record 'r0': an answer holds '<start_of_image>', the token of an image"):
        tokenize([says], sight)


def test_a_stored_record_is_looked_at_when_it_is_asked_for(
    pairs: list[PreferencePair], sight: Sight, tmp_path: Path
) -> None:
    artifact = open_artifact(str(tmp_path), "tokenize", {}, {})
    examples = tokenize(pairs, sight)
    with artifact.write() as draft:
        draft.write_rows(TokenizedRecord, "train", [to_row(example) for example in examples])
    blind, seeing = StoredExamples.of(artifact, "train"), StoredExamples.of(artifact, "train", sight)
    assert blind[2] == examples[2]
    shown = seeing[2]
    assert shown.image
    assert dataclasses.replace(shown, image=None) == examples[2]
    assert shown.image.inputs["pixel_values"].equal(sight.look(shown.image_uri or "").image.inputs["pixel_values"])


def test_the_base_student_judges_what_it_sees(pairs: list[PreferencePair], sight: Sight, student: Student) -> None:
    examples = tokenize(pairs, sight)
    resources = TrainResources(per_device_eval_batch_size=3, row_tokens=500)
    judged = Reference(student, Arguments(), resources, sight).judge(examples)
    model = load_model(student)
    for example, before in zip(judged, examples, strict=True):
        assert example.image is None
        view = sight.look(before.image_uri or "")
        for completion, logp in zip(example.completions, example.reference_logps or [], strict=True):
            ids = torch.tensor([example.prompt_ids + completion])
            with torch.no_grad():
                logps_TV = model(input_ids=ids, **view.image.inputs).logits[0].log_softmax(-1)
            rows = range(len(example.prompt_ids) - 1, ids.shape[1] - 1)
            expected = sum(float(logps_TV[row, ids[0, row + 1]]) for row in rows)
            assert logp == pytest.approx(expected, abs=1e-3)


class KeepGradients(TrainerCallback):
    """The gradients of every optimiser step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        )


def test_gradients_do_not_depend_on_how_images_are_batched_and_move_no_frozen_weight(
    pairs: list[PreferencePair], sight: Sight, student: Student, tmp_path: Path
) -> None:
    kept = []
    examples = [sight.show(example) for example in tokenize(pairs, sight)]
    for size, row_tokens in ((5, 600), (2, None)):
        torch.manual_seed(0)
        model = load_model(student, trainable=True)
        before = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
        gradients = KeepGradients()
        result = build_trainer(
            Arguments(objective=Orpo(nll_on="full"), max_steps=2, train_batch_size=5, max_grad_norm=0.0)
        ).run(
            model=model, tokenizer=sight.tokenizer, train=InMemory(examples), validation=InMemory(examples[:2]),
            output_dir=tmp_path / str(size), run_name="test", callbacks=[gradients], resume_from_checkpoint=None,
            resources=TrainResources(per_device_train_batch_size=size, row_tokens=row_tokens, gradient_checkpointing=size == 2),
        )  # fmt: skip
        assert result.layout == "shared_prefix"
        assert result.global_step == 2
        for name, weight in model.named_parameters():
            if name in before:
                assert torch.equal(weight, before[name]), name
                assert weight.grad is None, name
        kept.append(gradients.steps)
    for step, expected in zip(*kept, strict=True):
        assert step.keys() == expected.keys()
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in expected.values()))
        for name in expected:
            assert (step[name] - expected[name]).abs().max() / norm < 1e-4, name
    assert all("lora_" in name or "modules_to_save" in name for name in kept[0][0])


def test_a_worker_without_a_record_looks_at_an_image_all_the_same(pairs: list[PreferencePair], sight: Sight) -> None:
    # weights that look at images would have no gradient in its share of the step, and the others would wait for one
    examples = [sight.show(example) for example in tokenize(pairs, sight)]
    filler = _Rows(InMemory(examples), None)[FILLER]
    assert filler.image is examples[0].image
    assert filler.pairs == []


def test_trl_has_no_path_for_images(
    pairs: list[PreferencePair], sight: Sight, student: Student, tmp_path: Path
) -> None:
    examples = InMemory(tokenize(pairs, sight))
    with pytest.raises(UserError, match="trl has no path for images"):
        build_trainer(Arguments(kind="trl", objective=Orpo(nll_on="full"))).run(
            model=load_model(student), tokenizer=sight.tokenizer, train=examples, validation=InMemory([]),
            output_dir=tmp_path, resources=TrainResources(), run_name="test", callbacks=[], resume_from_checkpoint=None,
        )  # fmt: skip
