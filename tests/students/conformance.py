"""Conformance suite of students: what every model has to do to be aligned and evaluated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from mint_ray.images import Pixels
from mint_ray.layouts import Example
from mint_ray.layouts.choice import choose_layout
from mint_ray.models.pretrained import check_model, model_identity
from mint_ray.records import Message
from mint_ray.students.checks import check_images
from mint_ray.students.config import Generation, Student
from mint_ray.students.constrained_decoding import AllowedAnswers
from mint_ray.students.generation import Images, StudentGenerator
from mint_ray.students.loading import load_model, load_processor, load_tokenizer, load_vision_processor, save_adapter

PROMPTS = [[Message(role="user", content=text)] for text in ("Which?", "Which tissue is this one here?", "liver")]
ANSWERS = AllowedAnswers(labels=("a", "b", "c"), length=2, to_text=lambda labels: f"It is {', then '.join(labels)}.")


def assert_conforms(folder: Path, scratch: Path, images: Sequence[Pixels] | None = None) -> None:
    """Run the suite on the model in `folder`.

    Args:
        folder: A model with tokenizer and, if it takes images, processor, as `from_pretrained` reads it.
        scratch: An empty folder for a trained adapter.
        images: An image per prompt for a vision-language student.
    """
    student = Student(model_id=str(folder), lora_rank=2)
    check_model(student)
    check_images(student, show_image=images is not None)
    assert model_identity(student, "student") == model_identity(student, "student")
    _check_answers(student, images)
    for trained in (student, dataclasses.replace(student, lora_rank=None)):
        _check_training(trained, scratch / f"rank-{trained.lora_rank}", images)


def _check_answers(student: Student, pixels: Sequence[Pixels] | None) -> None:
    """Answers in every mode are deterministic and do not depend on the batch; constrained ones are allowed."""
    generator = StudentGenerator(student, Generation(max_new_tokens=6), answers=ANSWERS, batch_size=2)
    images: Images = None
    if pixels is not None:
        images = [generator.process_image(prompt, one, "test") for prompt, one in zip(PROMPTS, pixels, strict=True)]
    for ask in (generator.generate, generator.generate_constrained, generator.rank):
        together = list(ask(PROMPTS, images))
        singly = [ask([prompt], images and images[i : i + 1])[0] for i, prompt in enumerate(PROMPTS)]
        assert together == singly, ask.__name__
    allowed = {ANSWERS.to_text([one, other]) for one in "abc" for other in "abc" if one != other}
    assert {text.strip() for text in generator.generate_constrained(PROMPTS, images)} <= allowed
    assert all(len(scores) == 3 for scores in generator.rank(PROMPTS, images))


def _check_training(student: Student, folder: Path, pixels: Sequence[Pixels] | None) -> None:
    """A step changes exactly the trainable weights, and what is saved computes the same after loading."""
    torch.manual_seed(0)
    model = load_model(student, trainable=True)
    example = _example(student, pixels)
    layout = choose_layout(model, [example])
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    assert trainable
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model.train()
    layout.compute_logps(model, layout.collate([example], score_prompt=False)).sums.sum().backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(trainable, lr=0.1).step()
    for name, weight in model.named_parameters():
        assert weight.requires_grad or torch.equal(weight, before[name]), name
    assert any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    save_adapter(model, load_processor(student), folder)
    batch = layout.collate([example], score_prompt=False)
    with torch.no_grad():
        expected = layout.compute_logps(model.eval(), batch).token_logps
        found = layout.compute_logps(load_model(student, adapter=folder), batch).token_logps
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _example(student: Student, pixels: Sequence[Pixels] | None) -> Example:
    image = None
    if pixels is None:
        tokenizer = load_tokenizer(student)
        turns = [dataclasses.asdict(message) for message in PROMPTS[0]]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    else:
        vision_processor = load_vision_processor(student)
        assert vision_processor
        processed = vision_processor.process(pixels[0], "test")
        ids, image = vision_processor.encode(PROMPTS[0], processed), processed.inputs
    return Example(record_id="r", prompt_ids=ids, completions=[[5, 6], [7]], pairs=[(0, 1)], image=image)
