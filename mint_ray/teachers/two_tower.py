"""The two towers of a CLIP-family model: images and texts as vectors of one space."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from mint_ray.config.loader import UserError
from mint_ray.images import Frame, Seen
from mint_ray.teachers.config import Clip, TwoTowers
from mint_ray.teachers.linear_probe import Array

ROWS_PER_PASS = {"cpu": 1, "cuda": 64}
"""Rows of every forward pass, the last one filled up: arithmetic that always has one shape gives a record the same
vector in any company. On a CPU a single row keeps the cores as busy as many."""


class TwoTowerEncoder:
    """Embeds images and texts. Weights are read when the first of them is met."""

    def __init__(self, config: Clip | TwoTowers) -> None:
        self.config = config

    def look(self, images: Seen) -> Iterator[Array]:
        """One vector of norm 1 for each image that could be read, in order."""
        pixels = [image for image in images if isinstance(image, np.ndarray)]
        if not pixels:
            return iter(())
        return self._encode(self._see, {"pixels": torch.from_numpy(np.stack(pixels))})

    def read(self, texts: list[str]) -> Iterator[Array]:
        """One vector of norm 1 for each text, cut off where the model's text ends."""
        if not texts:
            return iter(())
        limit = min(self._tokenizer.model_max_length, self._model.config.text_config.max_position_embeddings)
        # all of one length, as SigLIP was trained; CLIP does not look behind the end
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        return self._encode(self._model.get_text_features, dict(tokens))

    @property
    def frame(self) -> Frame:
        """The form in which the model wants its images. Raises UserError for a form that is not square."""
        return self._form.frame

    @functools.cached_property
    def scale(self) -> float:
        """What the model multiplies a cosine by, to make a logit of it."""
        return float(self._model.logit_scale.detach().double().exp())

    def _see(self, pixels: torch.Tensor) -> Any:
        return self._model.get_image_features(pixel_values=self._form.to_values(pixels).to(self._model.dtype))

    @torch.inference_mode()
    def _encode(self, embed: Callable[..., Any], columns: dict[str, torch.Tensor]) -> Iterator[Array]:
        """One vector of norm 1 for each row of `columns`."""
        device = self._model.device
        rows, size = len(next(iter(columns.values()))), ROWS_PER_PASS.get(device.type, 1)
        passes = []
        for start in range(0, rows, size):
            part = {name: column[start : start + size] for name, column in columns.items()}
            filled = {
                name: torch.cat([column, column[-1:].expand(size - len(column), *column.shape[1:])]).to(device)
                for name, column in part.items()
            }
            passes.append(embed(**filled).pooler_output[: min(size, rows - start)].float().cpu())
        features_ND = torch.cat(passes).double().numpy()
        return iter(features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True))

    @functools.cached_property
    def _form(self) -> Form:
        return read_form(
            AutoImageProcessor.from_pretrained(
                self.config.model_id, revision=self.config.revision, trust_remote_code=False, backend="pil"
            ),
            self.config,
        )

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(
            self.config.model_id, revision=self.config.revision, trust_remote_code=False
        )

    @functools.cached_property
    def _model(self) -> Any:
        model = AutoModel.from_pretrained(
            self.config.model_id,
            revision=self.config.revision,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=getattr(torch, self.config.dtype),
        )
        for part in ("get_image_features", "get_text_features", "logit_scale"):
            if not hasattr(model, part):
                kind = model.config.model_type
                raise UserError(f"model_id: {self.config.model_id}: {kind} is no model of the CLIP family: no {part}")
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """How pixels become what the model was trained on."""

    frame: Frame
    shown: int
    """Height and width that the model sees, the middle of the frame."""
    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_values(self, pixels_NHWC: torch.Tensor) -> torch.Tensor:
        """Images of the frame's size as (N, 3, shown, shown)."""
        edge = (self.frame.size - self.shown) // 2
        middle = pixels_NHWC[:, edge : edge + self.shown, edge : edge + self.shown].float()
        mean, std = (torch.tensor(values, device=middle.device) for values in (self.mean, self.std))
        return ((middle * self.rescale - mean) / std).permute(0, 3, 1, 2)


def read_form(processor: Any, config: Clip | TwoTowers) -> Form:
    """From the settings of the model's own image processor. Raises UserError for a form that is not square."""
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
    normalise = processor.do_normalize
    return Form(
        frame=frame,
        shown=min(crop.get("height", edge), edge),
        rescale=processor.rescale_factor if processor.do_rescale else 1.0,
        mean=tuple(processor.image_mean) if normalise else (0.0,) * 3,
        std=tuple(processor.image_std) if normalise else (1.0,) * 3,
    )
