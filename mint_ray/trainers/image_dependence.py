"""A check that a vision-language student depends on its images, by replacing one with another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mint_ray.config.loader import UserError
from mint_ray.images import ImageError, Pixels, read_image
from mint_ray.layouts import Example, Layout
from mint_ray.layouts.choice import choose_layout
from mint_ray.models.pretrained import resolve_model
from mint_ray.models.vision_processor import FRAME, VisionProcessor
from mint_ray.objectives import build_objective, chosen_and_rejected
from mint_ray.objectives.config import Orpo
from mint_ray.records import PreferencePair
from mint_ray.students.config import Student
from mint_ray.students.loading import load_model
from mint_ray.trainers.tokenization import tokenize_pairs

UNCHANGED = 1e-6
"""Maximum change that counts as none. If only unused pixels change, results agree to the last digit; a student that
uses its images is far above this."""
GRAY = 128


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageEffect:
    """Effect of replacing the image of one pair."""

    image: str
    """Description of the other image."""
    max_logp_change: float
    """Largest change of any token's log-probability in either completion."""
    gradient_change: float
    """Norm of the change of the gradient of all trained weights, relative to the norm of the gradient."""

    @property
    def is_visible(self) -> bool:
        """True if the student depends on the image."""
        return min(self.max_logp_change, self.gradient_change) > UNCHANGED


def measure_image_effects(student: Student, pairs: Iterable[PreferencePair], max_length: int) -> list[ImageEffect]:
    """Return the effects of replacing the image of a pair by another record's image and by plain gray.

    The pair is the first with a readable image, the other record the second. Both images are resized to the size of the
    pair's own, so that the tokens stay the same and only pixels change. The loss is ORPO's. Raises UserError if fewer
    than two pairs have readable images.
    """
    torch.manual_seed(0)
    processor = VisionProcessor(resolve_model(student, "student"))
    readable = list(islice(((pair, pixels) for pair in pairs if (pixels := _read_pixels(pair)) is not None), 2))
    if len(readable) < 2:
        raise UserError("no two records have readable images")
    (pair, own), (other, pixels) = readable
    height, width = own.shape[:2]
    images = {
        f"that of record {other.record_id!r}": np.array(Image.fromarray(pixels).resize((width, height))),
        "plain gray": np.full_like(own, GRAY),
    }
    examples, counts = tokenize_pairs([pair], processor.tokenizer, max_length, "truncate", processor)
    if not examples:
        raise UserError(f"record {pair.record_id!r} is dropped: {', '.join(counts.dropped)}")
    example = processor.add_image(examples[0])
    model = load_model(student, trainable=True)
    processor.check_features(model, example)
    layout = choose_layout(model, [example])
    logps_N, gradient_W = _logps_and_gradient(model, layout, example)
    effects = []
    for name, image in images.items():
        replaced = dataclasses.replace(example, image=processor.process(image, name).inputs)
        replaced_N, replaced_W = _logps_and_gradient(model, layout, replaced)
        effects.append(
            ImageEffect(
                image=name,
                max_logp_change=float((replaced_N - logps_N).abs().max()),
                gradient_change=float((replaced_W - gradient_W).norm() / gradient_W.norm()),
            )
        )
    return effects


def _read_pixels(pair: PreferencePair) -> Pixels | None:
    try:
        return None if pair.image_uri is None else read_image(pair.image_uri, FRAME)
    except ImageError:
        return None


def _logps_and_gradient(model: torch.nn.Module, layout: Layout, example: Example) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of all scored tokens, and the gradient of all trained weights as one vector."""
    model.eval()  # no dropout: only the image may change
    model.zero_grad(set_to_none=True)
    batch = layout.collate([example], score_prompt=False)
    logps = layout.compute_logps(model, batch)
    chosen, rejected = chosen_and_rejected(logps, batch)
    loss = build_objective(Orpo()).pair_losses(chosen, rejected).mean() - chosen.means.mean()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return logps.token_logps.detach(), torch.cat(gradients).double()
