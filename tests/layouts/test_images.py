"""Completions after a shared prompt with an image have the log-probabilities and gradients that they have alone.

The concatenated layout is the reference: each completion in its own row after its prompt and image, with the model's
own masks and positions. The reference itself is compared with the model called on the inputs of its processor.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mint_ray.config.loader import UserError
from mint_ray.layouts import Batch, Example, ImageInputs, Layout
from mint_ray.layouts.choice import choose_layout
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.images import IMAGE
from mint_ray.layouts.masks import SPLIT_SDPA, set_attn_implementation
from mint_ray.layouts.shared_prefix import SharedPrefixLayout
from mint_ray.models.vision_processor import TEXT_INPUTS
from mint_ray.students.adapters import add_adapter
from mint_ray.students.config import Student
from tests.vision_students import FAMILIES, noise, tiny_vlm

SHAPES = [(40, 48), (64, 30), (32, 32)]
"""Height and width of three images that have different numbers of tokens in Idefics3 and Qwen, and of tiles in Mllama."""

SIMILAR = ("smolvlm", "qwen2_vl")
"""Families that differ from another one only in their name or their vision encoder."""
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name in SIMILAR else name for name in FAMILIES]

LAYOUTS = {
    "split attention": (SharedPrefixLayout(), SPLIT_SDPA),
    "one mask": (SharedPrefixLayout(), "sdpa"),
    "eager attention": (SharedPrefixLayout(), "eager"),
    "packed into rows of two": (SharedPrefixLayout(max_tokens_per_row=110), SPLIT_SDPA),
    "packed into one row": (SharedPrefixLayout(max_tokens_per_row=1000), "sdpa"),
    "selected logits": (SharedPrefixLayout(logits="selected"), "sdpa"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@functools.cache
def processed(family: str, seed: int, height: int, width: int) -> tuple[ImageInputs, str]:
    """Return the model inputs for an image, and its placeholder in the prompt."""
    _, processor = FAMILIES[family]()
    made = processor(
        images=[noise(seed, height, width)], text=[processor.image_token], return_text_replacement_offsets=True
    )
    offsets = made.pop("text_replacement_offsets", None)
    inputs = {
        name: torch.as_tensor(value) for name, value in made.convert_to_tensors("pt").items() if name not in TEXT_INPUTS
    }
    slot = offsets[0][0]["replacement"] if offsets else processor.image_token
    return ImageInputs(tensors=inputs, token_id=processor.image_token_ids[0]), slot


@functools.cache
def records(family: str) -> list[Example]:
    """Return three records with different prompts and images, several pairs and completions shared by pairs."""
    _, processor = FAMILIES[family]()
    examples = []
    completions = [
        [[11, 12, 13, 14], [15, 16, 17, 18, 19, 20], [11, 12, 21]],
        [[22, 23], [24, 25, 26]],
        [[27, 28, 29, 30, 31], [32, 33], [34, 35, 36]],
    ]
    pairs = [[(0, 1), (0, 2), (2, 1)], [(0, 1)], [(0, 1), (0, 2)]]
    for number, (height, width) in enumerate(SHAPES):
        image, slot = processed(family, number, height, width)
        text = "see " * number + "this" + slot + "which tissue" + " is it" * number
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        examples.append(
            Example(
                record_id=f"r{number}", prompt_ids=[1, *ids], completions=completions[number], pairs=pairs[number],
                image=image,
            )
        )  # fmt: skip
    return examples


@functools.cache
def exact(family: str) -> Any:
    """Return the model in float64, except for norms and positions, which transformers computes in float32."""
    return tiny_vlm(family)[0].double().eval()


@dataclasses.dataclass(frozen=True)
class Measured:
    logps: torch.Tensor
    prompt_logps: torch.Tensor
    gradients: dict[str, torch.Tensor]


def measure(
    model: Any, layout: Layout, examples: list[Example], tamper: Callable[[Batch], Batch] = lambda batch: batch
) -> Measured:
    """Return token log-probabilities, and the gradient of a weighted sum of them, so that errors do not cancel."""
    batch = tamper(layout.collate(examples, score_prompt=True))
    model.zero_grad(set_to_none=True)
    logps = layout.compute_logps(model, batch)
    tokens_N, prompts_N = logps.token_logps, logps.prompt_token_logps
    weights_N = torch.linspace(1, 2, len(tokens_N), dtype=tokens_N.dtype)
    ((tokens_N * weights_N).sum() + 0.1 * prompts_N.sum()).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return Measured(tokens_N.detach(), prompts_N.detach(), gradients)


@functools.cache
def reference(family: str) -> Measured:
    model = exact(family)
    set_attn_implementation(model, "sdpa")
    return measure(model, ConcatenatedLayout(logits="all"), records(family))


def largest_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest error of any gradient, relative to the largest gradient."""
    assert actual.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(float((actual[name] - expected[name]).abs().max()) for name in expected) / scale


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", EVERY)
def test_a_shared_prefix_gives_the_log_probabilities_and_gradients_of_separate_rows(family: str, layout: str) -> None:
    model, expected = exact(family), reference(family)
    chosen, attention = LAYOUTS[layout]
    set_attn_implementation(model, attention)
    actual = measure(model, chosen, records(family))
    torch.testing.assert_close(actual.logps, expected.logps, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.prompt_logps, expected.prompt_logps, rtol=0, atol=1e-5)
    assert largest_error(actual.gradients, expected.gradients) < 1e-5


@pytest.mark.parametrize("family", EVERY)
def test_a_separate_row_gives_the_log_probabilities_of_the_processor_s_inputs(family: str) -> None:
    model = exact(family)
    set_attn_implementation(model, "sdpa")
    _, processor = FAMILIES[family]()
    example = records(family)[1]
    text = "<|im_start|>see this" + processor.image_token + "which tissue is it" + "a liver"
    inputs = processor(images=[noise(1, *SHAPES[1])], text=[text], return_tensors="pt", add_special_tokens=False)
    ids = inputs["input_ids"][0].tolist()
    with torch.no_grad():
        logits_TV = model(**inputs).logits[0].log_softmax(-1)
        example = dataclasses.replace(example, prompt_ids=ids[:-5], completions=[ids[-5:]], pairs=[(0, 0)])
        logps = ConcatenatedLayout().compute_logps(model, ConcatenatedLayout().collate([example], score_prompt=False))
    expected = torch.stack([logits_TV[-6 + index, token] for index, token in enumerate(ids[-5:])])
    torch.testing.assert_close(logps.token_logps, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", EVERY)
def test_another_image_or_a_blank_one_changes_log_probabilities_and_gradients_of_the_adapter(family: str) -> None:
    expected = reference(family)
    student = Student(model_id=family, lora_rank=2, modules_to_save=())
    model = add_adapter(tiny_vlm(family)[0].double().eval(), student, is_vlm=True)
    example = records(family)[0]
    other, _ = processed(family, 7, *SHAPES[0])
    blank = {name: tensor * 0 + 0.01 if name == "pixel_values" else tensor for name, tensor in other.tensors.items()}
    alone = measure(model, SharedPrefixLayout(), [example])
    torch.testing.assert_close(alone.logps, expected.logps[: len(alone.logps)], rtol=0, atol=1e-6)
    assert all("lora_" in name for name in alone.gradients)
    for image in (other, dataclasses.replace(other, tensors=blank)):
        changed = measure(model, SharedPrefixLayout(), [dataclasses.replace(example, image=image)])
        assert (changed.logps - alone.logps).abs().max() > 1e-3
        assert largest_error(changed.gradients, alone.gradients) > 1e-3


def images_in_the_order_of_records(batch: Batch) -> Batch:
    """Return the batch with images in the order of the records instead of the rows."""
    return batch | {
        name: tensor.flip(0) if name.startswith(IMAGE) and "grid" not in name else tensor
        for name, tensor in batch.items()
    }


def no_position_restart(batch: Batch) -> Batch:
    return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}


def no_segment_mask(batch: Batch) -> Batch:
    return batch | {"segments": batch["segments"].clamp(max=0)}


def nothing_seen(batch: Batch) -> Batch:
    """Return the batch without the marks of image tokens: plain positions, plain masks."""
    return batch | {"is_image": torch.zeros_like(batch["is_image"])}


def everything_crossed(batch: Batch) -> Batch:
    """Return the batch in which tokens ahead of the image attend to it too, and to tiles that it does not have."""
    return batch | {f"{IMAGE}cross_attention_mask": torch.ones_like(batch[f"{IMAGE}cross_attention_mask"])}


BROKEN: dict[str, tuple[Callable[[Batch], Batch], list[str]]] = {
    "images in another order": (images_in_the_order_of_records, ["llava", "gemma3", "mllama"]),
    "no position restart": (no_position_restart, list(FAMILIES)),
    "no segment mask": (no_segment_mask, list(FAMILIES)),
    "no image positions or masks": (nothing_seen, ["qwen2_vl", "qwen2_5_vl", "gemma3"]),
    "everything looks at the image": (everything_crossed, ["mllama"]),
}


@pytest.mark.parametrize(
    ("broken", "family"),
    [(broken, family) for broken, (_, families) in BROKEN.items() for family in families if family not in SIMILAR],
)
def test_a_wrong_layout_differs_from_the_reference(broken: str, family: str) -> None:
    model, expected = exact(family), reference(family)
    set_attn_implementation(model, "sdpa")
    actual = measure(model, SharedPrefixLayout(max_tokens_per_row=1000), records(family), BROKEN[broken][0])
    assert (actual.logps - expected.logps).abs().max() > 1e-3
    assert largest_error(actual.gradients, expected.gradients) > 1e-3


@pytest.mark.parametrize("family", EVERY)
def test_every_family_supports_the_shared_prefix(family: str) -> None:
    model = tiny_vlm(family)[0].train()
    chosen = choose_layout(model, records(family)[:1], max_tokens_per_row=1000)
    assert (chosen.name, chosen.logits) == ("shared_prefix", "chunked")
    with torch.no_grad():
        actual = chosen.compute_logps(model.eval(), chosen.collate(records(family), score_prompt=False))
    torch.testing.assert_close(actual.token_logps.double(), reference(family).logps, rtol=0, atol=1e-4)


def test_image_tokens_run_once_for_all_completions_and_are_not_scored() -> None:
    [example, *_] = records("llava")
    batch = SharedPrefixLayout().collate([example], score_prompt=True)
    assert batch["is_image"].sum() == 16
    assert batch[f"{IMAGE}pixel_values"].shape[0] == 1
    assert ConcatenatedLayout().collate([example], score_prompt=True)[f"{IMAGE}pixel_values"].shape[0] == 3
    assert batch["prompt_counts_B"].tolist() == [len(example.prompt_ids) - 1 - 16]


def test_with_cross_attention_every_record_has_its_own_row() -> None:
    batch = SharedPrefixLayout(max_tokens_per_row=1000).collate(records("mllama"), score_prompt=False)
    assert batch["input_ids"].shape[0] == 3
    assert (
        SharedPrefixLayout(max_tokens_per_row=1000).collate(records("llava"), score_prompt=False)["input_ids"].shape[0]
        == 1
    )


def test_a_record_without_an_image_among_others_raises_an_error_with_its_id() -> None:
    blind = dataclasses.replace(records("llava")[1], record_id="blind", image=None)
    with pytest.raises(UserError, match="record 'blind': has no image"):
        SharedPrefixLayout().collate([records("llava")[0], blind], score_prompt=False)
