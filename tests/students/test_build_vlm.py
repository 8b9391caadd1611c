"""Students that see, joined of parts with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from mint_ray.config.loader import UserError
from mint_ray.models.pretrained import Place
from mint_ray.records import Message, PreferencePair
from mint_ray.students import Student
from mint_ray.students.build_vlm import Caption, Captions, join_models, save_joined, steps_of, train_projector
from mint_ray.trainers.pixels import find_changes
from tests.encoders import PREPROCESSING, save_tiny_efficientnet, save_tiny_vit
from tests.teachers.clips import save_tiny_clip
from tests.tiny import save_tiny_student, tiny_model, tiny_tokenizer
from tests.vision_students import save_image

ENCODERS: dict[str, tuple[Callable[[Path], Path], int]] = {
    # tokens: a map of 2 x 2; 2 x 2 patches and one for the whole; 4 x 4 and one; 4 x 4
    "efficientnet": (save_tiny_efficientnet, 4),
    "vit": (save_tiny_vit, 5),
    "clip": (save_tiny_clip, 17),
    "siglip": (lambda path: save_tiny_clip(path, "siglip"), 16),
}
TURNS = [
    {"role": "system", "content": "You are a pathologist."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which tissue?"}]},
]


def place(path: Path) -> Place:
    return Place(model_id=path.name, path=str(path))


def picture(value: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(value).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("parts") / "language")


def join(path: Path, language: Path, encoder: str = "efficientnet") -> tuple[Any, Any]:
    return join_models(place(ENCODERS[encoder][0](path / encoder)), place(language), seed=0)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_any_encoder_joins_and_what_is_saved_is_an_ordinary_folder(
    tmp_path: Path, language: Path, encoder: str
) -> None:
    model, processor = join(tmp_path, language, encoder)
    save_joined(model, processor, tmp_path / "joined")
    again = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "joined", use_safetensors=True, attn_implementation="sdpa"
    )
    reader = AutoProcessor.from_pretrained(tmp_path / "joined")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    text = reader.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    inputs = reader(text=[text], images=[picture(0)], return_tensors="pt")
    assert int((inputs["input_ids"] == again.config.image_token_id).sum()) == ENCODERS[encoder][1]
    with torch.no_grad():
        logits = again.eval()(**inputs).logits
        other = again(**reader(text=[text], images=[picture(1)], return_tensors="pt")).logits
    assert bool(torch.isfinite(logits).all())
    assert float((logits[:, -1] - other[:, -1]).abs().max()) > 1e-3  # the image is seen


@pytest.mark.parametrize("encoder", ["efficientnet", "clip"])
def test_pixels_reach_a_joined_student_that_learns(tmp_path: Path, language: Path, encoder: str) -> None:
    save_joined(*join(tmp_path, language, encoder), tmp_path / "joined")
    uris = [save_image(tmp_path / f"{number}.png", number) for number in range(2)]
    pairs = [
        PreferencePair(
            prompt=[Message(role="user", content="Which tissue?")],
            chosen=[Message(role="assistant", content="liver")], rejected=[Message(role="assistant", content="skin")],
            record_id=uri, split="train", teacher="", sampler="", chosen_labels=[], rejected_labels=[], image_uri=uri,
        )
        for uri in uris
    ]  # fmt: skip
    changes = find_changes(Student(model_id=str(tmp_path / "joined"), lora_rank=2), pairs, 400)
    assert [change.is_seen for change in changes] == [True, True]
    assert min(change.logps for change in changes) > 1e-4


def test_text_alone_is_answered_as_by_the_language_model(tmp_path: Path, language: Path) -> None:
    model, processor = join(tmp_path, language)
    alone = AutoModelForCausalLM.from_pretrained(language).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(language)("Which tissue is it?")["input_ids"]])
    assert processor.tokenizer("Which tissue is it?")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        said, expected = model(input_ids=ids).logits, alone(input_ids=ids).logits
    # one token more, the image's own
    torch.testing.assert_close(said[..., :400], expected, atol=1e-5, rtol=1e-5)
    assert said.shape[-1] == 401


def test_where_the_image_stands_the_projected_tokens_of_the_encoder_do(tmp_path: Path, language: Path) -> None:
    model, processor = join(tmp_path, language)
    network = AutoModel.from_pretrained(tmp_path / "efficientnet").eval()
    text = processor.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[picture(0)], return_tensors="pt")
    seen: list[torch.Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
        map_CHW = network(inputs["pixel_values"]).last_hidden_state[0]
        expected = model.model.multi_modal_projector(map_CHW.flatten(1).T)
    hook.remove()
    there = inputs["input_ids"][0] == model.config.image_token_id
    torch.testing.assert_close(seen[0][0][there], expected, atol=1e-5, rtol=1e-5)


def test_images_are_scaled_as_the_encoder_was_trained_on_them(tmp_path: Path, language: Path) -> None:
    _, processor = join(tmp_path, language)
    flat = np.full((64, 64, 3), [255, 128, 0], dtype=np.uint8)
    values = processor.image_processor([flat], return_tensors="pt")["pixel_values"][0, :, 5, 5]
    expected = [(value / 255 - 0.5) / 0.25 for value in (255, 128, 0)]
    torch.testing.assert_close(values, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_turns_of_plain_text_read_as_before(tmp_path: Path, language: Path) -> None:
    _, processor = join(tmp_path, language)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    own = AutoTokenizer.from_pretrained(language)
    assert processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) == own.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False
    )


def test_the_projector_alone_learns_to_name_what_is_seen(tmp_path: Path, language: Path) -> None:
    model, processor = join(tmp_path, language, "vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shades = {"dark": 20, "pale": 230}
    train = [Caption(image_uri=shade, name=name) for shade, name in (("dark", "liver"), ("pale", "kidney"))]
    captions = Captions(model, processor, "What?", lambda uri: np.full((32, 32, 3), shades[uri], np.uint8))
    swapped = [Caption(image_uri=one.image_uri, name=other.name) for one, other in zip(train, train[::-1], strict=True)]
    first = captions.measure(train, 2)
    told: list[int] = []
    settings: dict[str, Any] = {"learning_rate": 0.02, "epochs": 60, "batch_size": 2, "seed": 0}
    train_projector(captions, train, **settings, tell=told.append)
    assert told == [2] * steps_of(60, len(train), 2) == [2] * 60
    assert captions.measure(train, 1, told.append) < first - 1
    assert told[60:] == [1, 1]
    # it is what the images show that was learned, and not what names there are
    assert captions.measure(swapped, 2) > captions.measure(train, 2) + 1
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {
        f"model.multi_modal_projector.linear_{layer}.{leaf}" for layer in (1, 2) for leaf in ("weight", "bias")
    }


def test_a_captions_loss_is_that_of_its_name_alone(tmp_path: Path, language: Path) -> None:
    model, processor = join(tmp_path, language)
    captions = Captions(model, processor, "What?", lambda uri: picture(int(uri)))
    both = [Caption(image_uri="0", name="liver"), Caption(image_uri="1", name="a kidney of a patient")]
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    lost: list[torch.Tensor] = []
    for one in both:
        inputs = processor(
            text=[f"{text}{one.name}<|im_end|>"], images=[picture(int(one.image_uri))], return_tensors="pt"
        )
        name = processor.tokenizer(f"{one.name}<|im_end|>")["input_ids"]
        with torch.no_grad():
            logps = model(**inputs).logits[0].log_softmax(-1)
        lost += [-logps[-len(name) - 1 + place, token] for place, token in enumerate(name)]
    assert float(captions.loss(both)) == pytest.approx(float(torch.stack(lost).mean()), abs=1e-4)


def test_the_same_seed_draws_the_same_projector(tmp_path: Path, language: Path) -> None:
    vision = place(save_tiny_vit(tmp_path / "vit"))
    one, same, other = (join_models(vision, place(language), seed)[0] for seed in (0, 0, 1))
    weight = [model.model.multi_modal_projector.linear_1.weight for model in (one, same, other)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])


def test_parts_that_do_not_go_together_are_errors_of_the_user(tmp_path: Path, language: Path) -> None:
    encoder = save_tiny_vit(tmp_path / "vit")
    plain = save_tiny_student(tmp_path / "plain")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(plain)
    with pytest.raises(UserError, match="plain: its tokenizer has no chat template"):
        join_models(place(encoder), place(plain), 0)
    scaled = tmp_path / "scaled"
    tiny_model(family="granite").save_pretrained(scaled)
    tiny_tokenizer().save_pretrained(scaled)
    with pytest.raises(UserError, match="scaled: does something to its logits that a Llava does not"):
        join_models(place(encoder), place(scaled), 0)
    said = PREPROCESSING | {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}}
    (encoder / "preprocessor_config.json").write_text(json.dumps(said | {"do_center_crop": False}))
    with pytest.raises(UserError, match="vit: its images are not all of one size"):
        join_models(place(encoder), place(language), 0)
