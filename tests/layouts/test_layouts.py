import pytest
import torch

from mint_ray.config.loader import UserError
from mint_ray.layouts import Example, chosen_only
from mint_ray.layouts.batches import pair_tensors

EXAMPLE = Example(
    record_id="a",
    prompt_ids=[1, 2, 3],
    completions=[[4], [5, 6], [7, 8, 9], [10]],
    pairs=[(2, 0), (2, 1), (1, 3)],
    reference_logps=[-1.0, -2.0, -3.0, -4.0],
)
PLACEHOLDER = Example(record_id="", prompt_ids=[1], completions=[[4], [5]], pairs=[])


def example(**fields):
    return Example(**{"record_id": "case-7", "prompt_ids": [1], "completions": [[2], [3]], "pairs": [(0, 1)]} | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_ids": []}, "'case-7': the prompt has no tokens"),
        ({"completions": [[2], []]}, "'case-7': a completion has no tokens"),
        ({"pairs": [(0, 2)]}, r"'case-7': pair \(0, 2\) of 2 completions"),
        ({"reference_logps": [-1.0]}, "'case-7': 1 reference_logps for 2 completions"),
    ],
)
def test_a_malformed_example_raises_an_error_with_its_id(fields, message):
    with pytest.raises(UserError, match=message):
        example(**fields)


def test_chosen_completions_keep_their_pairs_and_reference():
    kept = chosen_only(EXAMPLE)
    assert kept.completions == [[5, 6], [7, 8, 9]]
    assert kept.pairs == [(1, 1), (1, 1), (0, 0)]
    assert kept.reference_logps == [-2.0, -3.0]
    assert chosen_only(example()).reference_logps is None


def test_the_likelihood_counts_the_same_tokens_without_the_rejected_completions():
    full = pair_tensors([EXAMPLE], score_prompt=True, num_tokens=0)
    kept = pair_tensors([chosen_only(EXAMPLE)], score_prompt=True, num_tokens=0)
    assert full["nll_tokens"] == kept["nll_tokens"] == (3 + 3 + 2) + 3 * 2
    assert full["pairs"] == kept["pairs"] == 3


def test_reference_log_probabilities_are_in_the_batch_and_placeholders_get_zeros():
    batch = pair_tensors([PLACEHOLDER, EXAMPLE], score_prompt=False, num_tokens=0)
    assert batch["reference_C"].tolist() == [0, 0, -1, -2, -3, -4]
    assert batch["reference_C"].dtype == torch.float32
    assert batch["chosen_P"].tolist() == [4, 4, 3]


def test_a_batch_has_no_reference_if_one_record_has_none():
    assert "reference_C" not in pair_tensors([EXAMPLE, example()], score_prompt=False, num_tokens=0)
