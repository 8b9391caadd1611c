import logging

import pytest
import torch

from mint_ray.layouts import Example
from mint_ray.layouts.choice import choose_layout
from mint_ray.layouts.masks import SPLIT_SDPA, get_attn_implementation
from tests.tiny import tiny_model

EXAMPLES = [
    Example(record_id="a", prompt_ids=[5, 6, 7, 8, 9, 10], completions=[[8, 9], [10, 11]], pairs=[(0, 1)]),
    Example(record_id="b", prompt_ids=[12, 13, 14], completions=[[8, 9], [10, 11]], pairs=[(0, 1)]),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("family", "layout", "logits", "attention"),
    [
        ("llama", "shared_prefix", "chunked", SPLIT_SDPA),
        ("qwen3", "shared_prefix", "chunked", SPLIT_SDPA),
        ("gemma3", "shared_prefix", "chunked", SPLIT_SDPA),
        ("mistral", "shared_prefix", "chunked", SPLIT_SDPA),
        # logits divided, or capped, after the LM head
        ("granite", "shared_prefix", "selected", SPLIT_SDPA),
        ("gemma2", "shared_prefix", "selected", "eager"),
    ],
)
def test_a_model_gets_the_fastest_layout_that_it_supports(family, layout, logits, attention):
    model = tiny_model(family=family).train()
    chosen = choose_layout(model, EXAMPLES, max_tokens_per_row=64)
    assert (chosen.name, chosen.logits, get_attn_implementation(model)) == (layout, logits, attention)
    assert chosen.max_tokens_per_row == 64
    assert model.training


class Rounding(torch.nn.Module):
    """Logits with errors as large as those of a trained model in bfloat16, which depend on the shape of the batch."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config
        self.get_output_embeddings, self.set_attn_implementation = (
            inner.get_output_embeddings,
            inner.set_attn_implementation,
        )

    def forward(self, input_ids, **arguments):
        output = self.inner(input_ids, **arguments)
        noise = torch.randn(output.logits.shape, generator=torch.Generator().manual_seed(input_ids.numel()))
        output.logits = output.logits.float() + 0.1 * noise
        return output


def test_in_half_precision_rounding_is_distinguished_from_positions_that_do_not_restart():
    example = Example(
        record_id="a",
        prompt_ids=[3 + (7 * index) % 90 for index in range(60)],
        completions=[[4 + (5 * index) % 90 for index in range(40)], [6 + (11 * index) % 90 for index in range(40)]],
        pairs=[(0, 1)],
    )
    assert choose_layout(Rounding(tiny_model().bfloat16()), [example]).name == "shared_prefix"
    assert choose_layout(Rounding(OwnPositions().bfloat16()), [example]).name == "concatenated"


def test_the_choice_and_its_reason_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="mint_ray.layouts.choice"):
        choose_layout(tiny_model(family="granite"), EXAMPLES)
    assert "changes its logits after its output embeddings" in caplog.messages[0]
    assert caplog.messages[-1].startswith("layout: shared_prefix, selected logits")
    assert "agree within" in caplog.messages[-1]


class OwnPositions(torch.nn.Module):
    """A model that ignores position_ids."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_model()
        self.config = self.inner.config

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def set_attn_implementation(self, name):
        self.inner.set_attn_implementation(name)

    def forward(self, input_ids, position_ids=None, attention_mask=None, **arguments):
        return self.inner(input_ids, attention_mask=attention_mask, **arguments)


def test_a_model_that_ignores_positions_falls_back_to_the_concatenated_layout():
    model = OwnPositions()
    chosen = choose_layout(model, EXAMPLES)
    assert (chosen.name, chosen.logits, get_attn_implementation(model)) == ("concatenated", "chunked", "sdpa")


def test_a_model_that_only_returns_logits_gets_the_plainest_layout():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model()
            self.config = self.inner.config

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    chosen = choose_layout(Bare(), EXAMPLES)
    assert (chosen.name, chosen.logits) == ("concatenated", "all")
