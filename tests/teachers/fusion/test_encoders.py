"""Encoders preprocess and pool as their models were trained, and train only the chosen weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from mint_ray.config.loader import UserError
from mint_ray.teachers.config import FusionImage, FusionText, LanguageBlock
from mint_ray.teachers.fusion.encoders import ImageEncoder, TextEncoder, load_block, load_preprocessor
from tests.encoders import SIZE, save_tiny_bert, save_tiny_vit
from tests.tiny import save_tiny_student


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny_vit(tmp_path_factory.mktemp("vit"))


def pixels(count: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8))


def test_an_image_is_preprocessed_as_the_model_was_trained(vit: Path) -> None:
    preprocessor = load_preprocessor(FusionImage(model_id=str(vit), max_bytes=7))
    frame = preprocessor.frame
    assert (frame.size, frame.fit, frame.max_bytes) == (SIZE, "squash", 7)
    expected = (pixels().numpy().transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25
    torch.testing.assert_close(preprocessor(pixels()).contiguous(), torch.from_numpy(expected).float())


@pytest.mark.parametrize(
    ("settings", "size", "fit"),
    [
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}, 32, "crop"),
        ({"size": {"shortest_edge": 40}}, 40, "crop"),
        ({"size": 48}, 48, "squash"),
    ],
)
def test_the_frame_is_the_final_size_of_the_preprocessor(
    tmp_path: Path, settings: dict[str, object], size: int, fit: str
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    frame = load_preprocessor(FusionImage(model_id=str(tmp_path))).frame
    assert (frame.size, frame.fit) == (size, fit)


def test_pooling_is_the_mean_of_the_tokens_or_the_cls_token(vit: Path) -> None:
    model = AutoModel.from_pretrained(vit).eval()
    for pooling in ("mean", "cls"):
        config = FusionImage(model_id=str(vit), pooling=pooling)  # type: ignore[arg-type]
        preprocessor = load_preprocessor(config)
        with torch.no_grad():
            tokens = model(preprocessor(pixels())).last_hidden_state
            expected = tokens.mean(dim=1) if pooling == "mean" else tokens[:, 0]
            torch.testing.assert_close(ImageEncoder(config, preprocessor)(pixels()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("trainable", "layers"), [("frozen", []), ("last:1", ["1"]), ("all", ["0", "1"])])
def test_only_the_chosen_weights_are_trained(vit: Path, trainable: str, layers: list[str]) -> None:
    config = FusionImage(model_id=str(vit), trainable=trainable)
    encoder = ImageEncoder(config, load_preprocessor(config))
    trained = [name for name, weight in encoder.named_parameters() if weight.requires_grad]
    found = {part for name in trained for part in name.split(".") if part.isdigit()}
    assert sorted(found) == layers
    assert any("embeddings" in name for name in trained) == (trainable == "all")
    assert encoder.is_trainable == bool(layers)


def test_more_blocks_than_the_model_has_cannot_be_trained(vit: Path) -> None:
    config = FusionImage(model_id=str(vit), trainable="last:3")
    with pytest.raises(UserError, match="last:3: the encoder has 2 blocks"):
        ImageEncoder(config, load_preprocessor(config))


def test_padding_does_not_change_the_features_of_a_text(tmp_path: Path) -> None:
    encoder = TextEncoder(FusionText(model_id=str(save_tiny_bert(tmp_path))))
    short, long = (
        encoder.tokenizer.encode("A boy of four."),
        encoder.tokenizer.encode("He was seen at the clinic. " * 8),
    )
    with torch.no_grad():
        together = encoder(*encoder.tokenizer.pad([short, long]))
        single = [encoder(*encoder.tokenizer.pad([row]))[0] for row in (short, long)]
    torch.testing.assert_close(together, torch.stack(single), atol=1e-5, rtol=1e-5)


def test_a_block_of_a_language_model_is_loaded_and_stays_frozen(vit: Path, tmp_path: Path) -> None:
    student = save_tiny_student(tmp_path / "student")
    block = LanguageBlock(model_id=str(student), layer=-1)
    rotary, layer, hidden_size = load_block(block)
    language_model = AutoModelForCausalLM.from_pretrained(student).model.eval()
    hidden = torch.randn(1, 5, hidden_size, generator=torch.Generator().manual_seed(0))
    positions = rotary(hidden, position_ids=torch.arange(5)[None])
    mask = torch.zeros(1, 1, 5, 5)  # bidirectional attention
    with torch.no_grad():
        output = layer(hidden, attention_mask=None, position_embeddings=positions)
        expected = language_model.layers[1](hidden, attention_mask=mask, position_embeddings=positions)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)

    config = FusionImage(model_id=str(vit), language_block=block)
    encoder = ImageEncoder(config, load_preprocessor(config))
    trained = {name for name, weight in encoder.named_parameters() if weight.requires_grad}
    assert trained == {
        f"block.{name}.{leaf}" for name in ("input_projection", "output_projection") for leaf in ("weight", "bias")
    }
    encoder(pixels()).sum().backward()
    assert float(encoder.block.input_projection.weight.grad.abs().sum()) > 0


def test_a_layer_that_the_language_model_does_not_have_is_an_error(tmp_path: Path) -> None:
    student = save_tiny_student(tmp_path / "student")
    with pytest.raises(UserError, match="has 2 blocks, got 2"):
        load_block(LanguageBlock(model_id=str(student), layer=2))
