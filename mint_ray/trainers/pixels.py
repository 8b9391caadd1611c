"""Show that what a student is taught depends on the image: give it another, or none, and see what changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor

from mint_ray.config.loader import UserError
from mint_ray.images import ImageError, Pixels, read_image
from mint_ray.layouts import Example, Layout
from mint_ray.layouts.choice import choose_layout
from mint_ray.models.vision_processor import FRAME, Sight
from mint_ray.objectives import Answers, build_objective
from mint_ray.objectives.config import Orpo
from mint_ray.records import PreferencePair
from mint_ray.students import Student, load_model, student_place
from mint_ray.trainers.tokenization import tokenize_pairs

UNCHANGED = 1e-6
"""What nothing but the pixels changes is computed alike to the last digit; a student that looks is far above this."""
GREY = 128


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What another image does to one pair."""

    image: str
    logps: float
    """Largest change of a token's log-probability in either answer."""
    gradients: float
    """Length of the change of the gradient of everything that learns, relative to that of the gradient."""

    @property
    def is_seen(self) -> bool:
        return min(self.logps, self.gradients) > UNCHANGED


def find_changes(student: Student, pairs: Iterable[PreferencePair], max_length: int) -> list[Change]:
    """What happens to the first pair whose image can be looked at when it is given that of the next one, or plain grey.

    Both are brought to the form of the pair's own image, so that the tokens stay and the pixels alone change. The loss
    is ORPO's. Raises UserError if no two pairs have images that can be looked at.
    """
    torch.manual_seed(0)
    sight = Sight(student_place(student))
    found = list(islice(((pair, pixels) for pair in pairs if (pixels := _pixels(pair)) is not None), 2))
    if len(found) < 2:
        raise UserError("no two records have images that can be looked at")
    (pair, own), (other, pixels) = found
    height, width = own.shape[:2]
    images = {
        f"that of record {other.record_id!r}": np.array(PillowImage.fromarray(pixels).resize((width, height))),
        "plain grey": np.full_like(own, GREY),
    }
    examples, tally = tokenize_pairs([pair], sight.tokenizer, max_length, "cut", sight)
    if not examples:
        raise UserError(f"record {pair.record_id!r} is left out: {', '.join(tally.dropped)}")
    example = sight.show(examples[0])
    model = load_model(student, trainable=True)
    sight.check(model, example)
    layout = choose_layout(model, [example])
    logps_N, gradient_W = _measure(model, layout, example)
    changes = []
    for name, image in images.items():
        changed_N, changed_W = _measure(
            model, layout, dataclasses.replace(example, image=sight.view(image, name).image)
        )
        changes.append(
            Change(
                image=name,
                logps=float((changed_N - logps_N).abs().max()),
                gradients=float((changed_W - gradient_W).norm() / gradient_W.norm()),
            )
        )
    return changes


def _pixels(pair: PreferencePair) -> Pixels | None:
    try:
        return None if pair.image_uri is None else read_image(pair.image_uri, FRAME)
    except ImageError:
        return None


def _measure(model: torch.nn.Module, layout: Layout, example: Example) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all scored tokens, and the gradient of all weights that learn, one behind the other."""
    model.eval()  # no dropout: nothing may change but the image
    model.zero_grad(set_to_none=True)
    batch = layout.lay_out([example], score_prompt=False)
    logps = layout.run(model, batch)
    sides = [
        Answers(sums_P=logps.sums_C[batch[side]], counts_P=logps.counts_C[batch[side]])
        for side in ("chosen_P", "rejected_P")
    ]
    loss = build_objective(Orpo()).pair_losses(*sides).mean() - sides[0].means_P.mean()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return logps.token_logps_N.detach(), torch.cat(gradients).double()
