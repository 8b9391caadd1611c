"""The processor of a vision-language model: images, prompts with placeholders, and errors."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mint_ray.config.loader import UserError
from mint_ray.images import ImageError, read_images
from mint_ray.layouts import Example
from mint_ray.models.pretrained import PretrainedModel
from mint_ray.models.vision_processor import FRAME, VisionProcessor
from mint_ray.records import Message
from mint_ray.students.config import Generation, Student
from mint_ray.students.constrained_decoding import AllowedAnswers
from mint_ray.students.generation import StudentGenerator
from mint_ray.students.loading import load_model
from tests.tiny import CHAT_TEMPLATE, save_tiny_student
from tests.vision_students import TEMPLATE, noise, save_image, save_tiny_vlm

PROMPT = [Message(role="system", content="You see."), Message(role="user", content="Which tissue?")]
SAVED = ["llava", "idefics3", "gemma3", "mllama"]
"""Families whose processors include no video processor, which would need torchvision."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny_vlm(tmp_path_factory.mktemp(family), family) for family in SAVED}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that a test may change."""
    return save_tiny_vlm(tmp_path / "student")


def load(folder: Path) -> VisionProcessor:
    return VisionProcessor(PretrainedModel(model_id=folder.name, path=str(folder)))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", SAVED)
def test_prompt_and_image_equal_those_of_the_transformers_processor(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    processor = load(folders[family])
    uri = save_image(tmp_path / "a.png", 1, 64, 30)
    image = processor.read(uri)
    parts = [
        {"role": "system", "content": [{"type": "text", "text": "You see."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which tissue?"}]},
    ]
    text = processor.processor.apply_chat_template(parts, add_generation_prompt=True)
    expected = processor.processor(images=[Image.open(uri)], text=[text], add_special_tokens=False, return_tensors="pt")
    assert processor.encode(PROMPT, image) == expected["input_ids"][0].tolist()
    for name, tensor in image.inputs.tensors.items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize("family", SAVED)
def test_the_model_makes_one_feature_per_image_token(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    student = Student(model_id=str(folders[family]))
    processor, model = load(folders[family]), load_model(student)
    uri = save_image(tmp_path / "a.png", 1, 64, 30)
    image = processor.read(uri)
    example = Example(
        record_id="r", prompt_ids=processor.encode(PROMPT, image), completions=[[5]], pairs=[], image_uri=uri
    )
    shown = processor.add_image(example)
    assert shown.image
    processor.check_features(model, shown)
    if family == "mllama":
        return
    more = dataclasses.replace(shown, prompt_ids=[*shown.prompt_ids, processor.image_token_id])
    with pytest.raises(
        UserError, match=rf"reserves {image.num_tokens + 1} tokens .* its model makes {image.num_tokens}"
    ):
        processor.check_features(model, more)


def test_an_image_that_has_changed_since_tokenization_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    processor = load(folders["idefics3"])
    uri = save_image(tmp_path / "a.png", 1, 64, 30)
    ids = processor.encode(PROMPT, processor.read(uri))
    example = Example(record_id="r7", prompt_ids=ids, completions=[[5]], pairs=[], image_uri=uri)
    assert processor.add_image(example).image
    save_image(tmp_path / "a.png", 1, 60, 60)
    with pytest.raises(UserError, match=r"record 'r7': .*a\.png needs 20 image tokens, its prompt has 12"):
        processor.add_image(example)
    Path(uri).unlink()
    with pytest.raises(UserError, match=r"record 'r7': the image cannot be read any more: .*a\.png: no such file"):
        processor.add_image(example)


@pytest.mark.parametrize(
    ("size", "mode"), [((1, 1), "RGB"), ((900, 3), "RGB"), ((31, 57), "L"), ((40, 40), "RGBA"), ((40, 40), "1")]
)
@pytest.mark.parametrize("family", SAVED)
def test_images_of_every_size_and_mode_are_processed(
    family: str, folders: dict[str, Path], tmp_path: Path, size: tuple[int, int], mode: str
) -> None:
    processor = load(folders[family])
    Image.new(mode, size).save(tmp_path / "a.png")
    image = processor.read(str(tmp_path / "a.png"))
    assert processor.encode(PROMPT, image).count(processor.image_token_id) == image.num_tokens > 0


def test_errors_have_reasons(folders: dict[str, Path], tmp_path: Path) -> None:
    processor = load(folders["llava"])
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(ImageError) as error:
        processor.read(str(tmp_path / "b.png"))
    assert error.value.reason == "image_unknown_format"
    image = processor.read(save_image(tmp_path / "a.png", 1))
    with pytest.raises(ImageError) as error:
        processor.render([Message(role="user", content="What is <image>?")], image)
    assert error.value.reason == "image_token_in_text"


def test_a_template_without_images_is_rejected(folder: Path, tmp_path: Path) -> None:
    image = load(folder).read(save_image(tmp_path / "a.png", 1))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE_TOKEN", ""))
    with pytest.raises(UserError, match="does not support images"):
        load(folder).render(PROMPT, image)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    with pytest.raises(UserError, match="takes only text as message content"):
        load(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load(folder)


def test_a_system_message_that_the_template_rejects_moves_to_the_user_message(folder: Path, tmp_path: Path) -> None:
    # like the template of Llama 3.2 Vision
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusing + TEMPLATE.replace("IMAGE_TOKEN", "<image>"))
    processor = load(folder)
    text = processor.render(PROMPT, processor.read(save_image(tmp_path / "a.png", 1)), add_generation_prompt=True)
    placeholder = "<image>" * 16
    assert text == f"<|im_start|>user\n{placeholder}\nYou see.\n\nWhich tissue?<|im_end|>\n<|im_start|>assistant\n"


def test_the_processor_of_another_model_is_rejected(folder: Path) -> None:
    edit(folder / "config.json", image_token_index=7)
    with pytest.raises(UserError, match="image token of the processor is 400, of the model 7"):
        load(folder)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed: nothing is missing")
def test_a_processor_for_videos_names_the_extra_that_it_needs(tmp_path: Path) -> None:
    folder = save_tiny_vlm(tmp_path / "student", "qwen2_vl")
    video = {"video_processor_type": "Qwen2VLVideoProcessor"}
    edit(folder / "processor_config.json", processor_class="Qwen2VLProcessor", video_processor=video)
    edit(folder / "tokenizer_config.json", processor_class="Qwen2VLProcessor")
    with pytest.raises(UserError, match=r"pip install 'mint-ray\[vision\]': .*Torchvision"):
        load(folder)


@pytest.mark.parametrize("family", SAVED)
def test_answers_depend_on_the_image_and_not_on_the_batch(family: str, folders: dict[str, Path]) -> None:
    student = Student(model_id=str(folders[family]))
    answers = AllowedAnswers(labels=("a", "b", "c"), length=1, to_text=lambda ids: f"It is '{ids[0]}'")
    generator = StudentGenerator(student, Generation(max_new_tokens=8), answers=answers, batch_size=3)
    prompts = [[Message(role="user", content=text)] for text in ("Which?", "Which tissue is this one here?", "Which?")]
    images = [
        generator.process_image(prompt, noise(number, 40, 40 + 20 * number), "noise")
        for number, prompt in enumerate(prompts)
    ]
    one_by_one = [generator.generate([prompt], [image])[0] for prompt, image in zip(prompts, images, strict=True)]
    assert generator.generate(prompts, images) == one_by_one
    assert one_by_one[0] != one_by_one[2]
    chosen = generator.generate_constrained(prompts, images)
    assert chosen == [
        generator.generate_constrained([prompt], [image])[0] for prompt, image in zip(prompts, images, strict=True)
    ]
    assert {text[:7] for text in chosen} == {"It is '"}
    ranked = generator.rank(prompts, images)
    assert ranked[0] != pytest.approx(ranked[2], abs=1e-3)


def test_an_image_can_be_decoded_ahead(folders: dict[str, Path], tmp_path: Path) -> None:
    processor = load(folders["llava"])
    uri = save_image(tmp_path / "a.png", 1)
    ids = processor.encode(PROMPT, processor.read(uri))
    example = Example(record_id="r7", prompt_ids=ids, completions=[[5]], pairs=[], image_uri=uri)
    [decoded, missing] = read_images([uri, str(tmp_path / "missing.png")], FRAME)
    read, given = processor.add_image(example).image, processor.add_image(example, decoded).image
    assert read
    assert given
    torch.testing.assert_close(given.tensors, read.tensors, rtol=0, atol=0)
    with pytest.raises(
        UserError, match=r"record 'r7': the image cannot be read any more: .*missing\.png: no such file"
    ):
        processor.add_image(example, missing)


def test_an_image_that_a_prompt_cannot_have_has_a_reason(folders: dict[str, Path], tmp_path: Path) -> None:
    generator = StudentGenerator(Student(model_id=str(folders["llava"])), Generation())
    [broken] = read_images([str(tmp_path / "missing.png")], FRAME)
    for pixels, reason in ((None, "no_image"), (broken, "image_missing")):
        with pytest.raises(ImageError) as error:
            generator.process_image(PROMPT, pixels, "x")
        assert error.value.reason == reason
    with pytest.raises(ImageError) as error:
        generator.process_image([Message(role="user", content="What is <image>?")], noise(1), "x")
    assert error.value.reason == "image_token_in_text"
    text_student = StudentGenerator(Student(model_id=str(save_tiny_student(tmp_path / "text"))), Generation())
    with pytest.raises(ValueError, match="a text student takes no images"):
        text_student.process_image(PROMPT, noise(1), "x")
