from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from mint_ray.config.loader import UserError
from mint_ray.teachers.config import Augmentation, FusionImage, FusionText, LanguageBlock
from mint_ray.teachers.fusion.augmentation import DRAWS, vary
from mint_ray.teachers.fusion.encoders import ImageEncoder, TextEncoder, load_block, look_of
from tests.encoders import SIZE, save_tiny_bert, save_tiny_vit
from tests.tiny import save_tiny_student


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_vit(tmp_path_factory.mktemp("vit"))


def pixels(count: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8))


def test_an_image_is_framed_and_scaled_as_the_model_was_trained(vit: Path) -> None:
    look = look_of(FusionImage(model_id=str(vit), max_bytes=7))
    assert (look.frame.size, look.frame.fit, look.frame.max_bytes) == (SIZE, "squash", 7)
    expected = (pixels().numpy().transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25
    torch.testing.assert_close(look.prepare(pixels()).contiguous(), torch.from_numpy(expected).float())


@pytest.mark.parametrize(
    ("said", "size", "fit"),
    [
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}, 32, "crop"),
        ({"size": {"shortest_edge": 40}}, 40, "crop"),
        ({"size": 48}, 48, "squash"),
    ],
)
def test_the_frame_is_what_the_preprocessor_ends_with(
    tmp_path: Path, said: dict[str, object], size: int, fit: str
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    frame = look_of(FusionImage(model_id=str(tmp_path))).frame
    assert (frame.size, frame.fit) == (size, fit)


def test_pooling_is_the_mean_of_the_tokens_or_the_first(vit: Path) -> None:
    model = AutoModel.from_pretrained(vit).eval()
    for pooling in ("mean", "first"):
        config = FusionImage(model_id=str(vit), pooling=pooling)  # type: ignore[arg-type]
        look = look_of(config)
        with torch.no_grad():
            tokens = model(look.prepare(pixels())).last_hidden_state
            expected = tokens.mean(dim=1) if pooling == "mean" else tokens[:, 0]
            torch.testing.assert_close(ImageEncoder(config, look)(pixels()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("train", "layers"), [("frozen", []), ("last:1", ["1"]), ("all", ["0", "1"])])
def test_only_the_weights_that_are_to_learn_can(vit: Path, train: str, layers: list[str]) -> None:
    config = FusionImage(model_id=str(vit), train=train)
    encoder = ImageEncoder(config, look_of(config))
    learning = [name for name, weight in encoder.named_parameters() if weight.requires_grad]
    found = {part for name in learning for part in name.split(".") if part.isdigit()}
    assert sorted(found) == layers
    assert any("embeddings" in name for name in learning) == (train == "all")
    assert encoder.learns == bool(layers)


def test_more_blocks_than_there_are_cannot_learn(vit: Path) -> None:
    config = FusionImage(model_id=str(vit), train="last:3")
    with pytest.raises(UserError, match="last:3: the encoder has 2 blocks"):
        ImageEncoder(config, look_of(config))


def test_the_padding_of_a_text_changes_nothing(tmp_path: Path) -> None:
    encoder = TextEncoder(FusionText(model_id=str(save_tiny_bert(tmp_path))))
    short, long = encoder.tokens.encode("A boy of four."), encoder.tokens.encode("He was seen at the clinic. " * 8)
    with torch.no_grad():
        together = encoder(*encoder.tokens.pad([short, long]))
        alone = [encoder(*encoder.tokens.pad([row]))[0] for row in (short, long)]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_one_block_of_a_language_model_is_read_and_stays_frozen(vit: Path, tmp_path: Path) -> None:
    student = save_tiny_student(tmp_path / "student")
    block = LanguageBlock(model_id=str(student), layer=-1)
    rotary, layer, width = load_block(block)
    whole = AutoModelForCausalLM.from_pretrained(student).model.eval()
    hidden = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(0))
    positions = rotary(hidden, position_ids=torch.arange(5)[None])
    mask = torch.zeros(1, 1, 5, 5)  # nothing is hidden: attention in both directions
    with torch.no_grad():
        made = layer(hidden, attention_mask=None, position_embeddings=positions)
        expected = whole.layers[1](hidden, attention_mask=mask, position_embeddings=positions)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)

    config = FusionImage(model_id=str(vit), language_block=block)
    encoder = ImageEncoder(config, look_of(config))
    learning = {name for name, weight in encoder.named_parameters() if weight.requires_grad}
    assert learning == {f"block.{name}.{leaf}" for name in ("into", "out") for leaf in ("weight", "bias")}
    encoder(pixels()).sum().backward()
    assert float(encoder.block.into.weight.grad.abs().sum()) > 0


def test_a_layer_that_the_language_model_lacks_is_named(tmp_path: Path) -> None:
    student = save_tiny_student(tmp_path / "student")
    with pytest.raises(UserError, match="has 2 blocks, got 2"):
        load_block(LanguageBlock(model_id=str(student), layer=2))


def test_turns_and_mirrors_move_pixels_and_change_none() -> None:
    image = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    how = Augmentation(crop=1.0, colour=0.0)
    flat = {
        tuple(torch.rot90(x, turns, (2, 3)).flatten().tolist()) for x in (image, image.flip(3)) for turns in range(4)
    }
    seen = set()
    for flip in (0.2, 0.7):
        for turn in (0.1, 0.3, 0.6, 0.9):
            draws = torch.full((1, DRAWS), 0.5)
            draws[0, :2] = torch.tensor([flip, turn])
            made = vary(image, draws, how)
            nearest = min(flat, key=lambda x: float((torch.tensor(x) - made.flatten()).abs().max()))
            torch.testing.assert_close(made.flatten(), torch.tensor(nearest), atol=1e-5, rtol=1e-5)
            seen.add(nearest)
    assert seen == flat


def test_a_crop_shows_a_part_of_the_image_and_nothing_beyond() -> None:
    ramp = torch.arange(64.0).div(63).expand(1, 3, 64, 64)
    how = Augmentation(flip=False, turn=False, crop=0.5, colour=0.0)
    draws = torch.full((1, DRAWS), 0.5)
    draws[0, 2:5] = torch.tensor([0.0, 1.0, 0.5])  # the smallest window, at the right edge
    made = vary(ramp, draws, how)[0, 0, 32]
    assert float(made[0]) == pytest.approx(0.5, abs=0.02)
    assert float(made[-1]) == pytest.approx(1.0, abs=0.02)
