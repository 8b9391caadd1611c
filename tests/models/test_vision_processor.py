"""What a student that sees is given: an image by its URI, room for it in the prompt, and reasons where neither is."""

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
from mint_ray.images import ImageError
from mint_ray.layouts import Example
from mint_ray.models.vision_processor import Sight
from mint_ray.records import Message
from mint_ray.students import (
    Answers,
    Generation,
    Student,
    StudentGenerator,
    check_sight,
    check_student,
    load_model,
    student_place,
)
from tests.tiny import CHAT_TEMPLATE, save_tiny_student
from tests.vision_students import TEMPLATE, save_image, save_tiny_seeing

PROMPT = [Message(role="system", content="You see."), Message(role="user", content="Which tissue?")]
SAVED = ["llava", "idefics3", "gemma3", "mllama"]
"""Families whose processors come without one for videos, which takes torchvision."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny_seeing(tmp_path_factory.mktemp(family), family) for family in SAVED}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One that a test may spoil."""
    return save_tiny_seeing(tmp_path / "student")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", SAVED)
def test_a_prompt_is_what_the_processor_makes_of_text_and_image(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    sight = Sight(student_place(Student(model_id=str(folders[family]))))
    uri = save_image(tmp_path / "a.png", 1, 64, 30)
    view = sight.look(uri)
    parts = [
        {"role": "system", "content": [{"type": "text", "text": "You see."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which tissue?"}]},
    ]
    text = sight.processor.apply_chat_template(parts, add_generation_prompt=True)
    whole = sight.processor(images=[Image.open(uri)], text=[text], add_special_tokens=False, return_tensors="pt")
    assert sight.encode(PROMPT, view) == whole["input_ids"][0].tolist()
    for name, tensor in view.image.inputs.items():
        torch.testing.assert_close(tensor, whole[name])


@pytest.mark.parametrize("family", SAVED)
def test_the_model_makes_as_many_features_as_the_prompt_has_room_for(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    student = Student(model_id=str(folders[family]))
    sight, model = Sight(student_place(student)), load_model(student)
    uri = save_image(tmp_path / "a.png", 1, 64, 30)
    view = sight.look(uri)
    example = Example(record_id="r", prompt_ids=sight.encode(PROMPT, view), completions=[[5]], pairs=[], image_uri=uri)
    shown = sight.show(example)
    assert shown.image
    sight.check(model, shown)
    if family == "mllama":
        return
    more = dataclasses.replace(shown, prompt_ids=[*shown.prompt_ids, sight.token_id])
    with pytest.raises(UserError, match=rf"room for {view.tokens + 1} tokens .* its model makes {view.tokens}"):
        sight.check(model, more)


def test_an_image_that_has_come_to_take_other_tokens_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    sight = Sight(student_place(Student(model_id=str(folders["idefics3"]))))
    uri = save_image(tmp_path / "a.png", 1, 64, 30)
    ids = sight.encode(PROMPT, sight.look(uri))
    example = Example(record_id="r7", prompt_ids=ids, completions=[[5]], pairs=[], image_uri=uri)
    assert sight.show(example).image
    save_image(tmp_path / "a.png", 1, 60, 60)
    with pytest.raises(UserError, match=r"record 'r7': .*a\.png: takes 20 image tokens, its prompt has 12"):
        sight.show(example)
    Path(uri).unlink()
    with pytest.raises(UserError, match=r"record 'r7': cannot be looked at any more: .*a\.png: no such file"):
        sight.show(example)


@pytest.mark.parametrize(
    ("size", "mode"), [((1, 1), "RGB"), ((900, 3), "RGB"), ((31, 57), "L"), ((40, 40), "RGBA"), ((40, 40), "1")]
)
@pytest.mark.parametrize("family", SAVED)
def test_images_of_every_size_and_mode_are_looked_at(
    family: str, folders: dict[str, Path], tmp_path: Path, size: tuple[int, int], mode: str
) -> None:
    sight = Sight(student_place(Student(model_id=str(folders[family]))))
    Image.new(mode, size).save(tmp_path / "a.png")
    view = sight.look(str(tmp_path / "a.png"))
    assert sight.encode(PROMPT, view).count(sight.token_id) == view.tokens > 0


def test_reasons_are_told(folders: dict[str, Path], tmp_path: Path) -> None:
    sight = Sight(student_place(Student(model_id=str(folders["llava"]))))
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(ImageError) as error:
        sight.look(str(tmp_path / "b.png"))
    assert error.value.reason == "image_unknown_format"
    view = sight.look(save_image(tmp_path / "a.png", 1))
    with pytest.raises(ImageError) as error:
        sight.render([Message(role="user", content="What is <image>?")], view)
    assert error.value.reason == "image_word_in_text"


def test_a_template_without_a_place_for_an_image_is_refused(folder: Path, tmp_path: Path) -> None:
    view = Sight(student_place(Student(model_id=str(folder)))).look(save_image(tmp_path / "a.png", 1))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("WORD", ""))
    with pytest.raises(UserError, match="has no place for an image"):
        Sight(student_place(Student(model_id=str(folder)))).render(PROMPT, view)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    with pytest.raises(UserError, match="takes no parts of a message"):
        Sight(student_place(Student(model_id=str(folder))))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        Sight(student_place(Student(model_id=str(folder))))


def test_a_template_that_takes_no_system_turn_beside_an_image_gets_it_in_the_users(
    folder: Path, tmp_path: Path
) -> None:
    # as that of Llama 3.2 Vision
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusing + TEMPLATE.replace("WORD", "<image>"))
    sight = Sight(student_place(Student(model_id=str(folder))))
    text = sight.render(PROMPT, sight.look(save_image(tmp_path / "a.png", 1)), add_generation_prompt=True)
    slot = "<image>" * 16
    assert text == f"<|im_start|>user\n{slot}\nYou see.\n\nWhich tissue?<|im_end|>\n<|im_start|>assistant\n"


def test_a_processor_of_another_model_is_refused(folder: Path) -> None:
    edit(folder / "config.json", image_token_index=7)
    with pytest.raises(UserError, match="its processor's image token is 400, its model's is 7"):
        Sight(student_place(Student(model_id=str(folder))))


def test_a_folder_without_a_processor_is_refused_before_anything_is_loaded(folder: Path) -> None:
    check_student(Student(model_id=str(folder)))
    (folder / "processor_config.json").unlink()
    with pytest.raises(UserError, match="no processor of images"):
        check_student(Student(model_id=str(folder)))


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed: nothing is missing")
def test_a_processor_that_also_takes_videos_names_the_extra_it_needs(tmp_path: Path) -> None:
    folder = save_tiny_seeing(tmp_path / "student", "qwen2_vl")
    video = {"video_processor_type": "Qwen2VLVideoProcessor"}
    edit(folder / "processor_config.json", processor_class="Qwen2VLProcessor", video_processor=video)
    edit(folder / "tokenizer_config.json", processor_class="Qwen2VLProcessor")
    with pytest.raises(UserError, match=r"pip install 'mint-ray\[vision\]': .*Torchvision"):
        Sight(student_place(Student(model_id=str(folder))))


def test_who_sees_is_shown_images_and_who_reads_is_not(folder: Path, tmp_path: Path) -> None:
    seeing, reading = Student(model_id=str(folder)), Student(model_id=str(save_tiny_student(tmp_path / "reading")))
    check_sight(seeing, shows_image=True)
    check_sight(reading, shows_image=False)
    with pytest.raises(UserError, match="reads text alone, and the task shows images"):
        check_sight(reading, shows_image=True)
    with pytest.raises(UserError, match="is made to see images, and the task shows none"):
        check_sight(seeing, shows_image=False)


@pytest.mark.parametrize("family", SAVED)
def test_answers_depend_on_the_image_and_not_on_the_batch(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    student = Student(model_id=str(folders[family]))
    answers = Answers(labels=("a", "b", "c"), length=1, write=lambda ids: f"It is '{ids[0]}'")
    asked = StudentGenerator(student, Generation(max_new_tokens=8), answers=answers, batch_size=3)
    prompts = [[Message(role="user", content=text)] for text in ("Which?", "Which tissue is this one here?", "Which?")]
    views = [
        asked.look(prompt, save_image(tmp_path / f"{number}.png", number, 40, 40 + 20 * number))
        for number, prompt in enumerate(prompts)
    ]
    one_by_one = [asked.generate([prompt], [view])[0] for prompt, view in zip(prompts, views, strict=True)]
    assert asked.generate(prompts, views) == one_by_one
    assert one_by_one[0] != one_by_one[2]
    chosen = asked.choose(prompts, views)
    assert chosen == [asked.choose([prompt], [view])[0] for prompt, view in zip(prompts, views, strict=True)]
    assert {text[:7] for text in chosen} == {"It is '"}
    ranked = asked.rank(prompts, views)
    assert ranked[0] != pytest.approx(ranked[2], abs=1e-3)
