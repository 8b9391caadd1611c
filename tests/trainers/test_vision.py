"""Records with images through tokenization, storage, the reference model and training."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import mint_ray.images
from mint_ray.artifacts import Artifact, open_artifact
from mint_ray.config.loader import UserError
from mint_ray.layouts import Example
from mint_ray.models.pretrained import resolve_model
from mint_ray.models.vision_processor import VisionProcessor
from mint_ray.objectives.config import Orpo
from mint_ray.records import Message, PreferencePair, TokenizedRecord
from mint_ray.students.config import Student
from mint_ray.students.loading import load_model
from mint_ray.trainers import TrainingRun, TrainResult, build_trainer
from mint_ray.trainers.config import TrainerArguments, TrainResources
from mint_ray.trainers.examples import Examples, InMemoryExamples, StoredExamples, to_row
from mint_ray.trainers.reference import ReferenceModel
from mint_ray.trainers.shared_prefix import PLACEHOLDER, _ExampleDataset
from mint_ray.trainers.tokenization import tokenize_pairs
from tests.tiny import tiny_tokenizer
from tests.vision_students import save_image, save_tiny_vlm


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread for thread in set(threading.enumerate()) - before if "ThreadPool" in thread.name]
    for thread in left:
        thread.join(timeout=10)
    assert not [thread for thread in left if thread.is_alive()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vlm(tmp_path_factory.mktemp("student"), "idefics3")


@pytest.fixture(scope="module")
def student(folder: Path) -> Student:
    return Student(model_id=str(folder), lora_rank=2)


@pytest.fixture(scope="module")
def vision_processor(student: Student) -> VisionProcessor:
    return VisionProcessor(resolve_model(student, "student"))


def make_pair(number: int, other: int, uri: str | None, note: str = "") -> PreferencePair:
    text = f"{note}Which tissue is number {number}?"
    return PreferencePair(
        prompt=[Message(role="system", content="You see."), Message(role="user", content=text)],
        chosen=[Message(role="assistant", content="1. liver")],
        rejected=[Message(role="assistant", content=f"1. skin {other}")],
        record_id=f"r{number}", split="train", teacher="t", sampler="hard", chosen_labels=["a"], rejected_labels=["b"],
        image_uri=uri, note_span=[0, len(note)] if note else None,
    )  # fmt: skip


def make_pairs(folder: Path) -> list[PreferencePair]:
    """Return one or two pairs of each of five records; their images have two different numbers of tokens."""
    uris = [save_image(folder / f"{number}.png", number, 64, 64 - 34 * (number % 2)) for number in range(5)]
    return [make_pair(number, other, uris[number]) for number in range(5) for other in range(1 + number % 2)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[PreferencePair]:
    return make_pairs(tmp_path_factory.mktemp("images"))


def tokenize(pairs: list[PreferencePair], vision_processor: VisionProcessor, **options: Any) -> list[Example]:
    options = {"max_length": 400} | options
    return tokenize_pairs(pairs, tiny_tokenizer(), vision_processor=vision_processor, **options)[0]


def store(folder: Path, examples: list[Example]) -> Artifact:
    """Write examples as the training split of an artifact."""
    artifact = open_artifact(str(folder), "tokenize", {}, {})
    with artifact.write() as draft:
        draft.write_rows(TokenizedRecord, "train", [to_row(example) for example in examples])
    return artifact


# tokenization


def test_a_prompt_has_the_tokens_of_its_image_and_the_example_its_uri(
    pairs: list[PreferencePair], vision_processor: VisionProcessor
) -> None:
    examples = tokenize(pairs, vision_processor)
    token_id = vision_processor.image_token_id
    assert [example.record_id for example in examples] == ["r0", "r1", "r2", "r3", "r4"]
    for example in examples:
        pair = next(pair for pair in pairs if pair.record_id == example.record_id)
        processed = vision_processor.read(pair.image_uri or "")
        assert example.image_uri == pair.image_uri
        assert example.image is None  # all images of a part would not fit into memory
        assert example.prompt_ids == vision_processor.encode(pair.prompt, processed)
        assert example.prompt_ids.count(token_id) == processed.num_tokens
    assert len({example.prompt_ids.count(token_id) for example in examples}) == 2


def test_a_record_with_an_unreadable_image_is_dropped_with_its_reason(
    pairs: list[PreferencePair], vision_processor: VisionProcessor, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    bad = [
        make_pair(10, 0, str(tmp_path / "gone.png")),
        make_pair(11, 0, str(tmp_path / "broken.png")),
        make_pair(12, 0, None),
        make_pair(13, 0, pairs[0].image_uri, note="<image> "),
    ]
    examples, counts = tokenize_pairs([*bad, *pairs], tiny_tokenizer(), 400, vision_processor=vision_processor)
    assert len(examples) == 5
    reasons = ["image_missing", "image_unknown_format", "no_image", "image_token_in_text"]
    assert counts.dropped == dict.fromkeys(reasons, 1)


def test_a_note_is_truncated_and_an_image_is_not(
    pairs: list[PreferencePair], vision_processor: VisionProcessor
) -> None:
    note = "short stature and seizures, " * 60
    long = make_pair(20, 0, pairs[0].image_uri, note)
    [full] = tokenize([long], vision_processor, max_length=5000)
    [truncated] = tokenize([long], vision_processor, max_length=500, overlong="truncate")
    assert len(truncated.prompt_ids) < 500 < len(full.prompt_ids)
    token_id = vision_processor.image_token_id
    assert truncated.prompt_ids.count(token_id) == full.prompt_ids.count(token_id) > 0


def test_invalid_images_of_pairs_raise_an_error(pairs: list[PreferencePair], vision_processor: VisionProcessor) -> None:
    with pytest.raises(UserError, match="record 'r0': its pairs have an image, but the student is a text student"):
        tokenize_pairs(pairs, tiny_tokenizer(), 400)
    with pytest.raises(UserError, match="record 'r1': its pairs have different images"):
        tokenize([pairs[1], dataclasses.replace(pairs[2], image_uri=pairs[0].image_uri)], vision_processor)


def test_a_completion_with_the_image_token_raises_an_error(pairs: list[PreferencePair], tmp_path: Path) -> None:
    # Gemma 3 has one token for the place of an image, and another for its content
    gemma = Student(model_id=str(save_tiny_vlm(tmp_path / "student", "gemma3")))
    vision_processor = VisionProcessor(resolve_model(gemma, "student"))
    pair = dataclasses.replace(pairs[0], chosen=[Message(role="assistant", content="1. <image_soft_token>")])
    with pytest.raises(UserError, match="record 'r0': a completion contains the image token '<start_of_image>'"):
        tokenize([pair], vision_processor)


# storage and decoding ahead


def test_a_stored_record_has_its_image_when_it_is_read(
    pairs: list[PreferencePair], vision_processor: VisionProcessor, tmp_path: Path
) -> None:
    examples = tokenize(pairs, vision_processor)
    artifact = store(tmp_path, examples)
    text_only = StoredExamples.from_artifact(artifact, "train")
    stored = StoredExamples.from_artifact(artifact, "train", vision_processor)
    assert text_only[2] == stored.read(2) == examples[2]
    example = stored[2]
    assert example.image
    assert dataclasses.replace(example, image=None) == examples[2]
    expected = vision_processor.read(example.image_uri or "").inputs.tensors["pixel_values"]
    assert example.image.tensors["pixel_values"].equal(expected)


def test_batches_get_the_images_that_single_examples_get(
    pairs: list[PreferencePair], vision_processor: VisionProcessor, tmp_path: Path
) -> None:
    stored = StoredExamples.from_artifact(store(tmp_path, tokenize(pairs, vision_processor)), "train", vision_processor)
    indices = [[3, 1], [0], [4, 2, 3]]
    batches = list(stored.add_images(([stored.read(i) for i in batch] for batch in indices), max_ahead=2))
    assert [[example.record_id for example in batch] for batch in batches] == [["r3", "r1"], ["r0"], ["r4", "r2", "r3"]]
    for batch, expected in zip(batches, indices, strict=True):
        for example, index in zip(batch, expected, strict=True):
            alone = stored[index].image
            assert example.image
            assert alone
            assert example.image.tensors.keys() == alone.tensors.keys()
            assert all(tensor.equal(alone.tensors[name]) for name, tensor in example.image.tensors.items())


def test_threads_decode_a_bounded_number_of_images_ahead_and_stop_when_closed(
    pairs: list[PreferencePair], vision_processor: VisionProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = StoredExamples.from_artifact(store(tmp_path, tokenize(pairs, vision_processor)), "train", vision_processor)
    decoded: list[str] = []
    decode = mint_ray.images.decode_image

    def record(content: bytes, frame: Any, name: str) -> Any:
        decoded.append(threading.current_thread().name)
        return decode(content, frame, name)

    monkeypatch.setattr(mint_ray.images, "decode_image", record)
    batches = stored.add_images(([stored.read(index % 5)] for index in range(100)), max_ahead=3)
    for taken in (1, 2):
        next(batches)
        deadline = time.monotonic() + 10
        while len(decoded) < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        # while this thread does something else, three further images are decoded, and no more
        assert len(decoded) == taken + 3
    assert threading.current_thread().name not in decoded
    batches.close()  # type: ignore[attr-defined]


# reference model


def test_the_reference_model_computes_log_probabilities_with_the_image(
    pairs: list[PreferencePair], vision_processor: VisionProcessor, student: Student
) -> None:
    examples = tokenize(pairs, vision_processor)
    resources = TrainResources(per_device_eval_batch_size=3, max_tokens_per_row=500)
    found = ReferenceModel(student, TrainerArguments(), resources, vision_processor).add_reference_logps(examples)
    model = load_model(student)
    for example, before in zip(found, examples, strict=True):
        assert example.image is None
        processed = vision_processor.read(before.image_uri or "")
        for completion, logp in zip(example.completions, example.reference_logps or [], strict=True):
            ids = torch.tensor([example.prompt_ids + completion])
            with torch.no_grad():
                logps_TV = model(input_ids=ids, **processed.inputs.tensors).logits[0].log_softmax(-1)
            rows = range(len(example.prompt_ids) - 1, ids.shape[1] - 1)
            expected = sum(float(logps_TV[row, ids[0, row + 1]]) for row in rows)
            assert logp == pytest.approx(expected, abs=1e-3)


# training


class KeepGradients(TrainerCallback):
    """The gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        )


def train(
    folder: Path, student: Student, train: Examples, validation: Examples, callbacks: Any = (), **resources: Any
) -> tuple[TrainResult, torch.nn.Module]:
    torch.manual_seed(0)
    model = load_model(student, trainable=True)
    config = TrainerArguments(
        objective=Orpo(nll_on="full"), max_steps=2, train_batch_size=5, max_grad_norm=0.0, logging_steps=1
    )
    run = TrainingRun(
        model=model, tokenizer=tiny_tokenizer(), train=train, validation=validation, output_dir=folder,
        resources=TrainResources(**resources), run_name="test", callbacks=callbacks,
    )  # fmt: skip
    return build_trainer(config).train(run), model


def test_gradients_do_not_depend_on_how_images_are_batched_and_move_no_frozen_weight(
    pairs: list[PreferencePair], vision_processor: VisionProcessor, student: Student, tmp_path: Path
) -> None:
    kept = []
    examples = [vision_processor.add_image(example) for example in tokenize(pairs, vision_processor)]
    torch.manual_seed(0)
    loaded = load_model(student, trainable=True)
    before = {name: weight for name, weight in loaded.named_parameters() if not weight.requires_grad}
    for size, max_tokens_per_row in ((5, 600), (2, None)):
        gradients = KeepGradients()
        result, model = train(
            tmp_path / str(size), student, InMemoryExamples(examples), InMemoryExamples(examples[:2]), [gradients],
            per_device_train_batch_size=size, max_tokens_per_row=max_tokens_per_row, gradient_checkpointing=size == 2,
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


def test_images_decoded_ahead_give_the_same_run_as_images_in_memory(
    pairs: list[PreferencePair], vision_processor: VisionProcessor, student: Student, tmp_path: Path
) -> None:
    examples = tokenize(pairs, vision_processor)
    stored = StoredExamples.from_artifact(store(tmp_path, examples), "train", vision_processor)
    # one window, in which both kinds of examples must come in the same order
    in_memory = InMemoryExamples([vision_processor.add_image(example) for example in examples])
    in_memory.order = stored.order  # type: ignore[method-assign]
    kept, logs = [], []
    for name, source in (("stored", stored), ("memory", in_memory)):
        gradients = KeepGradients()
        result, _ = train(tmp_path / name, student, source, source, [gradients], per_device_train_batch_size=2)
        kept.append(gradients.steps)
        logs.append([{key: row[key] for key in row if "loss" in key} for row in result.log_history])
    assert logs[0] == logs[1]
    assert any("eval_loss" in row for row in logs[0])
    for step, expected in zip(*kept, strict=True):
        assert all(torch.equal(step[name], expected[name]) for name in expected)


def test_an_image_that_is_gone_ends_training_with_its_record_and_uri(
    vision_processor: VisionProcessor, student: Student, tmp_path: Path
) -> None:
    pairs = make_pairs(tmp_path)
    stored = StoredExamples.from_artifact(store(tmp_path, tokenize(pairs, vision_processor)), "train", vision_processor)
    uri = next(pair.image_uri for pair in pairs if pair.record_id == "r3")
    Path(str(uri)).unlink()
    with pytest.raises(UserError, match=rf"record 'r3': the image cannot be read any more: {uri}: no such file"):
        train(tmp_path / "run", student, stored, InMemoryExamples([]), per_device_train_batch_size=2)


def test_the_placeholder_of_a_worker_without_a_record_has_an_image(
    pairs: list[PreferencePair], vision_processor: VisionProcessor, tmp_path: Path
) -> None:
    # otherwise trained weights that process images would have no gradient, for which the other workers would wait
    examples = tokenize(pairs, vision_processor)
    stored = StoredExamples.from_artifact(store(tmp_path, examples), "train", vision_processor)
    in_memory = InMemoryExamples([vision_processor.add_image(example) for example in examples])
    for source in (stored, in_memory):
        placeholder = _ExampleDataset(source, None)[PLACEHOLDER]
        [[example]] = source.add_images(iter([[placeholder]]), max_ahead=1)
        assert example.image
        assert example.pairs == []


def test_trl_does_not_support_images(
    pairs: list[PreferencePair], vision_processor: VisionProcessor, student: Student, tmp_path: Path
) -> None:
    run = TrainingRun(
        model=load_model(student), tokenizer=vision_processor.tokenizer, output_dir=tmp_path, run_name="test",
        train=InMemoryExamples(tokenize(pairs, vision_processor)), validation=InMemoryExamples([]),
        resources=TrainResources(),
    )  # fmt: skip
    with pytest.raises(UserError, match="trl does not support images"):
        build_trainer(TrainerArguments(kind="trl", objective=Orpo(nll_on="full"))).train(run)
