"""Two-tower encoder: a CLIP-family model that embeds images and texts as unit vectors of one space.

Tested by tests/teachers/test_clip.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from mint_ray.config.loader import UserError
from mint_ray.images import Frame, Images
from mint_ray.models.pretrained import PretrainedModel, resolve_model
from mint_ray.teachers.config import Clip, TwoTower

Floats = NDArray[np.float64]

ROWS_PER_PASS = {"cpu": 1, "cuda": 64}
"""Rows of a forward pass by device; the last pass is padded. With a constant shape the embedding of a record does not
depend on its batch. On a CPU one row keeps the cores as busy as many."""


class TwoTowerEncoder:
    """Encoder of images and texts. Weights are loaded for the first of them."""

    def __init__(self, config: Clip | TwoTower) -> None:
        self.config = config

    def encode_images(self, images: Images) -> Iterator[Floats]:
        """Return a unit vector for each image that could be read, in order."""
        pixels = [image for image in images if isinstance(image, np.ndarray)]
        if not pixels:
            return iter(())
        return self._encode(self._image_features, {"pixels": torch.from_numpy(np.stack(pixels))})

    def encode_texts(self, texts: list[str]) -> Iterator[Floats]:
        """Return a unit vector for each text, truncated to the model's context length."""
        if not texts:
            return iter(())
        limit = min(self._tokenizer.model_max_length, self._model.config.text_config.max_position_embeddings)
        # all of one length, as SigLIP was trained; CLIP ignores what follows the end token
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        return self._encode(self._model.get_text_features, dict(tokens))

    @property
    def frame(self) -> Frame:
        """Form of the images. Raises UserError if they are not square."""
        return self._transform.frame

    @functools.cached_property
    def logit_scale(self) -> float:
        """Factor with which the model turns a cosine similarity into a logit."""
        return float(self._model.logit_scale.detach().double().exp())

    def _image_features(self, pixels: torch.Tensor) -> Any:
        return self._model.get_image_features(pixel_values=self._transform(pixels).to(self._model.dtype))

    @torch.inference_mode()
    def _encode(self, embed: Callable[..., Any], columns: dict[str, torch.Tensor]) -> Iterator[Floats]:
        """Return a unit vector for each row of `columns`, the arguments of `embed`."""
        device = self._model.device
        num_rows, size = len(next(iter(columns.values()))), ROWS_PER_PASS.get(device.type, 1)
        passes = []
        for start in range(0, num_rows, size):
            batch = {name: column[start : start + size] for name, column in columns.items()}
            padded = {
                name: torch.cat([column, column[-1:].expand(size - len(column), *column.shape[1:])]).to(device)
                for name, column in batch.items()
            }
            passes.append(embed(**padded).pooler_output[: min(size, num_rows - start)].float().cpu())
        features_ND = torch.cat(passes).double().numpy()
        return iter(features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True))

    @functools.cached_property
    def _pretrained(self) -> PretrainedModel:
        return resolve_model(self.config, "other")

    @functools.cached_property
    def _transform(self) -> ImageTransform:
        processor = AutoImageProcessor.from_pretrained(
            self._pretrained.path, revision=self._pretrained.revision, trust_remote_code=False, backend="pil"
        )
        return build_transform(processor, self.config)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(
            self._pretrained.path, revision=self._pretrained.revision, trust_remote_code=False
        )

    @functools.cached_property
    def _model(self) -> Any:
        model = AutoModel.from_pretrained(
            self._pretrained.path,
            revision=self._pretrained.revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=getattr(torch, self.config.dtype),
        )
        for attribute in ("get_image_features", "get_text_features", "logit_scale"):
            if not hasattr(model, attribute):
                kind = model.config.model_type
                raise UserError(
                    f"model_id: {self.config.model_id}: {kind} is no model of the CLIP family: no {attribute}"
                )
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Center crop, rescaling and normalization of decoded images, as the model was trained."""

    frame: Frame
    crop_size: int
    """Height and width of the center crop of the frame."""
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels_NHWC: torch.Tensor) -> torch.Tensor:
        """Return images of the frame's size as (N, 3, crop_size, crop_size)."""
        edge = (self.frame.size - self.crop_size) // 2
        cropped = pixels_NHWC[:, edge : edge + self.crop_size, edge : edge + self.crop_size].float()
        mean, std = (torch.tensor(values, device=cropped.device) for values in (self.mean, self.std))
        return ((cropped * self.rescale_factor - mean) / std).permute(0, 3, 1, 2)


def build_transform(processor: Any, config: Clip | TwoTower) -> ImageTransform:
    """Return the transform of the model's own image processor. Raises UserError if its images are not square."""
    size, crop = dict(processor.size), dict(processor.crop_size or {}) if processor.do_center_crop else {}
    edge = size.get("shortest_edge") or size.get("height")
    if edge is None or size.get("width", edge) != size.get("height", edge) or crop.get("width") != crop.get("height"):
        raise UserError(f"model_id: {config.model_id}: its images are not square: size {size}, crop {crop}")
    frame = Frame(
        size=edge,
        fit="crop" if "shortest_edge" in size else "squash",
        max_bytes=config.max_bytes,
        max_pixels=config.max_pixels,
    )
    normalizes = processor.do_normalize
    return ImageTransform(
        frame=frame,
        crop_size=min(crop.get("height", edge), edge),
        rescale_factor=processor.rescale_factor if processor.do_rescale else 1.0,
        mean=tuple(processor.image_mean) if normalizes else (0.0,) * 3,
        std=tuple(processor.image_std) if normalizes else (1.0,) * 3,
    )
