"""Vision-language students built from encoders and language models with random weights."""

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
from mint_ray.models.pretrained import PretrainedModel
from mint_ray.records import Message, PreferencePair
from mint_ray.students.build_vlm import (
    Caption,
    CaptionLoss,
    build_llava,
    num_steps,
    readable_captions,
    save_vlm,
    train_projector,
)
from mint_ray.students.config import Student
from mint_ray.trainers.image_dependence import measure_image_effects
from tests.encoders import PREPROCESSING, save_tiny_efficientnet, save_tiny_vit
from tests.teachers.tiny_clip import save_tiny_clip
from tests.tiny import save_tiny_student, tiny_model, tiny_tokenizer
from tests.vision_students import save_image

ENCODERS: dict[str, tuple[Callable[[Path], Path], int]] = {
    # tokens: a map of 2 x 2; 2 x 2 patches and CLS; 4 x 4 patches and CLS; 4 x 4 patches
    "efficientnet": (save_tiny_efficientnet, 4),
    "vit": (save_tiny_vit, 5),
    "clip": (save_tiny_clip, 17),
    "siglip": (lambda path: save_tiny_clip(path, "siglip"), 16),
}
TURNS = [
    {"role": "system", "content": "You are a pathologist."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which tissue?"}]},
]


def pretrained(path: Path) -> PretrainedModel:
    return PretrainedModel(model_id=path.name, path=str(path))


def random_image(value: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(value).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_student(tmp_path_factory.mktemp("parts") / "language")


def build(path: Path, language: Path, encoder: str = "efficientnet") -> tuple[Any, Any]:
    return build_llava(pretrained(ENCODERS[encoder][0](path / encoder)), pretrained(language), seed=0)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_works_and_the_saved_folder_loads(tmp_path: Path, language: Path, encoder: str) -> None:
    model, processor = build(tmp_path, language, encoder)
    save_vlm(model, processor, tmp_path / "vlm")
    reloaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "vlm", use_safetensors=True, attn_implementation="sdpa"
    )
    own_processor = AutoProcessor.from_pretrained(tmp_path / "vlm")
    ours, theirs = model.state_dict(), reloaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    text = own_processor.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    inputs = own_processor(text=[text], images=[random_image(0)], return_tensors="pt")
    assert int((inputs["input_ids"] == reloaded.config.image_token_id).sum()) == ENCODERS[encoder][1]
    with torch.no_grad():
        logits = reloaded.eval()(**inputs).logits
        other = reloaded(**own_processor(text=[text], images=[random_image(1)], return_tensors="pt")).logits
    assert bool(torch.isfinite(logits).all())
    assert float((logits[:, -1] - other[:, -1]).abs().max()) > 1e-3  # the image has an effect


@pytest.mark.parametrize("encoder", ["efficientnet", "clip"])
def test_the_image_changes_the_loss_and_the_gradient(tmp_path: Path, language: Path, encoder: str) -> None:
    save_vlm(*build(tmp_path, language, encoder), tmp_path / "vlm")
    uris = [save_image(tmp_path / f"{number}.png", number) for number in range(2)]
    pairs = [
        PreferencePair(
            prompt=[Message(role="user", content="Which tissue?")],
            chosen=[Message(role="assistant", content="liver")], rejected=[Message(role="assistant", content="skin")],
            record_id=uri, split="train", teacher="", sampler="", chosen_labels=[], rejected_labels=[], image_uri=uri,
        )
        for uri in uris
    ]  # fmt: skip
    changes = measure_image_effects(Student(model_id=str(tmp_path / "vlm"), lora_rank=2), pairs, 400)
    assert [change.is_visible for change in changes] == [True, True]
    assert min(change.max_logp_change for change in changes) > 1e-4


def test_text_without_images_gets_the_logits_of_the_language_model(tmp_path: Path, language: Path) -> None:
    model, processor = build(tmp_path, language)
    text_model = AutoModelForCausalLM.from_pretrained(language).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(language)("Which tissue is it?")["input_ids"]])
    assert processor.tokenizer("Which tissue is it?")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        logits, expected = model(input_ids=ids).logits, text_model(input_ids=ids).logits
    # the vocabulary has one more token, the image token
    torch.testing.assert_close(logits[..., :400], expected, atol=1e-5, rtol=1e-5)
    assert logits.shape[-1] == 401


def test_image_tokens_are_replaced_by_projected_features(tmp_path: Path, language: Path) -> None:
    model, processor = build(tmp_path, language)
    network = AutoModel.from_pretrained(tmp_path / "efficientnet").eval()
    text = processor.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[random_image(0)], return_tensors="pt")
    embeddings: list[torch.Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: embeddings.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
        map_CHW = network(inputs["pixel_values"]).last_hidden_state[0]
        expected = model.model.multi_modal_projector(map_CHW.flatten(1).T)
    hook.remove()
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    torch.testing.assert_close(embeddings[0][0][is_image], expected, atol=1e-5, rtol=1e-5)


def test_images_are_normalized_as_for_the_encoder(tmp_path: Path, language: Path) -> None:
    _, processor = build(tmp_path, language)
    flat = np.full((64, 64, 3), [255, 128, 0], dtype=np.uint8)
    values = processor.image_processor([flat], return_tensors="pt")["pixel_values"][0, :, 5, 5]
    expected = [(value / 255 - 0.5) / 0.25 for value in (255, 128, 0)]
    torch.testing.assert_close(values, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_messages_of_plain_text_are_rendered_as_before(tmp_path: Path, language: Path) -> None:
    _, processor = build(tmp_path, language)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    own = AutoTokenizer.from_pretrained(language)
    assert processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) == own.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=False
    )


def test_only_the_projector_is_trained_and_it_learns_the_captions(tmp_path: Path, language: Path) -> None:
    model, processor = build(tmp_path, language, "vit")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shades = {"dark": 20, "pale": 230}
    train = [Caption(image_uri=shade, text=name) for shade, name in (("dark", "liver"), ("pale", "kidney"))]
    objective = CaptionLoss(
        model,
        processor,
        "What?",
        lambda captions: ((one, np.full((32, 32, 3), shades[one.image_uri], np.uint8)) for one in captions),
    )
    swapped = [Caption(image_uri=one.image_uri, text=other.text) for one, other in zip(train, train[::-1], strict=True)]
    first = objective.mean_loss(train, 2)
    counts: list[int] = []
    settings: dict[str, Any] = {"learning_rate": 0.02, "epochs": 60, "batch_size": 2, "seed": 0}
    train_projector(objective, train, **settings, on_batch=counts.append)
    assert counts == [2] * num_steps(60, len(train), 2) == [2] * 60
    assert objective.mean_loss(train, 1, counts.append) < first - 1
    assert counts[60:] == [1, 1]
    # the captions depend on the images
    assert objective.mean_loss(swapped, 2) > objective.mean_loss(train, 2) + 1
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {
        f"model.multi_modal_projector.linear_{layer}.{leaf}" for layer in (1, 2) for leaf in ("weight", "bias")
    }


def test_the_loss_covers_the_captions_tokens_only(tmp_path: Path, language: Path) -> None:
    model, processor = build(tmp_path, language)
    objective = CaptionLoss(model, processor, "What?")
    both = [Caption(image_uri="0", text="liver"), Caption(image_uri="1", text="a kidney of a patient")]
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    losses: list[torch.Tensor] = []
    for one in both:
        inputs = processor(
            text=[f"{text}{one.text}<|im_end|>"], images=[random_image(int(one.image_uri))], return_tensors="pt"
        )
        name = processor.tokenizer(f"{one.text}<|im_end|>")["input_ids"]
        with torch.no_grad():
            logps = model(**inputs).logits[0].log_softmax(-1)
        losses += [-logps[-len(name) - 1 + place, token] for place, token in enumerate(name)]
    loss = objective.loss([(one, random_image(int(one.image_uri))) for one in both]).detach()
    assert float(loss) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)


def test_the_same_seed_draws_the_same_projector(tmp_path: Path, language: Path) -> None:
    vision = pretrained(save_tiny_vit(tmp_path / "vit"))
    one, same, other = (build_llava(vision, pretrained(language), seed)[0] for seed in (0, 0, 1))
    weight = [model.model.multi_modal_projector.linear_1.weight for model in (one, same, other)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])


def test_unsuitable_encoders_and_language_models_are_rejected(tmp_path: Path, language: Path) -> None:
    encoder = save_tiny_vit(tmp_path / "vit")
    plain = save_tiny_student(tmp_path / "plain")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(plain)
    with pytest.raises(UserError, match="plain: its tokenizer has no chat template"):
        build_llava(pretrained(encoder), pretrained(plain), 0)
    scaled = tmp_path / "scaled"
    tiny_model(family="granite").save_pretrained(scaled)
    tiny_tokenizer().save_pretrained(scaled)
    with pytest.raises(UserError, match="scaled: transforms its logits, which LLaVA does not"):
        build_llava(pretrained(encoder), pretrained(scaled), 0)
    settings = PREPROCESSING | {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}}
    (encoder / "preprocessor_config.json").write_text(json.dumps(settings | {"do_center_crop": False}))
    with pytest.raises(UserError, match="vit: its images differ in size"):
        build_llava(pretrained(encoder), pretrained(language), 0)


def test_captions_with_unreadable_images_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    uris = [save_image(tmp_path / "good.png", 0), str(tmp_path / "broken.png"), str(tmp_path / "missing.png")]
    captions = [Caption(image_uri=uri, text="liver") for uri in uris]
    readable, dropped = readable_captions(captions)
    assert readable == captions[:1]
    assert dropped == {"image_unknown_format": 1, "image_missing": 1}
