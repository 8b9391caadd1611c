import pytest
import torch

from mint_ray.config.loader import UserError
from mint_ray.layouts import Example, bookkeeping, chosen_only

EXAMPLE = Example(
    record_id="a",
    prompt_ids=[1, 2, 3],
    completions=[[4], [5, 6], [7, 8, 9], [10]],
    pairs=[(2, 0), (2, 1), (1, 3)],
    reference_logps=[-1.0, -2.0, -3.0, -4.0],
)
FILLER = Example(record_id="", prompt_ids=[1], completions=[[4], [5]], pairs=[])


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
def test_a_malformed_example_is_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        example(**fields)


def test_the_chosen_completions_alone_keep_their_pairs_and_reference():
    kept = chosen_only(EXAMPLE)
    assert kept.completions == [[5, 6], [7, 8, 9]]
    assert kept.pairs == [(1, 1), (1, 1), (0, 0)]
    assert kept.reference_logps == [-2.0, -3.0]
    assert chosen_only(example()).reference_logps is None


def test_the_likelihood_of_the_chosen_is_over_the_same_tokens_without_the_rejected():
    whole = bookkeeping([EXAMPLE], score_prompt=True, row_tokens=0)
    kept = bookkeeping([chosen_only(EXAMPLE)], score_prompt=True, row_tokens=0)
    assert whole["nll_tokens"] == kept["nll_tokens"] == (3 + 3 + 2) + 3 * 2
    assert whole["pairs"] == kept["pairs"] == 3


def test_reference_log_probabilities_reach_the_batch_and_fillers_get_zeros():
    batch = bookkeeping([FILLER, EXAMPLE], score_prompt=False, row_tokens=0)
    assert batch["reference_C"].tolist() == [0, 0, -1, -2, -3, -4]
    assert batch["reference_C"].dtype == torch.float32
    assert batch["chosen_P"].tolist() == [4, 4, 3]


def test_a_reference_that_one_record_lacks_is_no_reference():
    assert "reference_C" not in bookkeeping([EXAMPLE, example()], score_prompt=False, row_tokens=0)
