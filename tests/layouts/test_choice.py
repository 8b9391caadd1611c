import logging

import pytest
import torch

from mint_ray.layouts import Example
from mint_ray.layouts.choice import choose_layout
from mint_ray.layouts.masks import SPLIT, attention_of
from tests.tiny import tiny_model

EXAMPLES = [
    Example(record_id="a", prompt_ids=[5, 6, 7, 8, 9, 10], completions=[[8, 9], [10, 11]], pairs=[(0, 1)]),
    Example(record_id="b", prompt_ids=[12, 13, 14], completions=[[8, 9], [10, 11]], pairs=[(0, 1)]),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("family", "layout", "head", "attention"),
    [
        ("llama", "shared_prefix", "chunked", SPLIT),
        ("qwen3", "shared_prefix", "chunked", SPLIT),
        ("gemma3", "shared_prefix", "chunked", SPLIT),
        ("mistral", "shared_prefix", "chunked", SPLIT),
        # logits divided, or capped, behind the head
        ("granite", "shared_prefix", "rows", SPLIT),
        ("gemma2", "shared_prefix", "rows", "eager"),
    ],
)
def test_a_model_gets_the_fastest_layout_that_serves_it(family, layout, head, attention):
    model = tiny_model(family=family).train()
    chosen = choose_layout(model, EXAMPLES, row_tokens=64)
    assert (chosen.name, chosen.head, attention_of(model)) == (layout, head, attention)
    assert chosen.row_tokens == 64
    assert model.training


class Rounding(torch.nn.Module):
    """Logits as far off as bfloat16 leaves those of a trained model, and otherwise for a batch of another shape."""

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


def test_in_half_precision_rounding_is_told_from_rules_of_the_model_s_own():
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
    assert "changes its logits behind its output embeddings" in caplog.messages[0]
    assert caplog.messages[-1].startswith("layout: shared_prefix, rows logits")
    assert "agree within" in caplog.messages[-1]


class OwnPositions(torch.nn.Module):
    """Hands the embeddings of its model on, and what else is asked for, but neither positions nor masks."""

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


def test_a_model_with_positions_of_its_own_falls_back_to_the_concatenated_layout():
    model = OwnPositions()
    chosen = choose_layout(model, EXAMPLES)
    assert (chosen.name, chosen.head, attention_of(model)) == ("concatenated", "chunked", "sdpa")


def test_a_model_that_gives_nothing_but_logits_gets_the_plainest_layout():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model()
            self.config = self.inner.config

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    chosen = choose_layout(Bare(), EXAMPLES)
    assert (chosen.name, chosen.head) == ("concatenated", "all")
