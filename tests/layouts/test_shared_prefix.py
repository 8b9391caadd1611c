"""Log-probabilities of tokens, losses and gradients are those of TRL's trainers.

The loss alone would not detect errors: without the restart of positions it changes by 2.5e-6, gradients by 7e-2.
"""

import dataclasses
import functools

import pytest
import torch

from mint_ray.layouts import Example
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.masks import PADDING, PREFIX, SPLIT_SDPA, set_attn_implementation
from mint_ray.layouts.shared_prefix import SharedPrefixLayout
from mint_ray.objectives import CompletionLogps, build_objective
from mint_ray.objectives.config import Dpo, Orpo
from tests.layouts.reference import BETA, DpoReference, Measured, OrpoReference, exact_model, gradients, largest_error
from tests.tiny import tiny_model

SERVED = ["llama", "qwen3", "gemma", "gemma3", "mistral"]


def record(name, prompt, completions, pairs):
    """Return an example whose token ids depend on its name."""
    start = 3 + 40 * ord(name[0]) % 300
    return Example(
        record_id=name,
        prompt_ids=[start + (7 * index) % 37 for index in range(prompt)],
        completions=[[3 + (29 * token + start) % 390 for token in completion] for completion in completions],
        pairs=pairs,
    )


CASES = {
    "one pair": [record("a", 12, [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]], [(0, 1)])],
    "several pairs of one record, completions shared": [
        record("b", 14, [[1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11, 12, 13, 14]], [(0, 1), (0, 2), (3, 0), (3, 2)])
    ],
    "completions with a common start, and one that is the start of another": [
        record("c", 9, [[1, 2, 3, 4], [1, 2, 5, 6, 7], [1, 2, 3]], [(0, 1), (2, 1), (0, 2)]),
    ],
    "a merge across the end of the prompt in one completion": [
        # "...Mar" + "fan" is one token in one completion; in the other the prompt ends with "...Mar"
        record("d", 8, [[60, 2, 3], [61, 62, 4, 5]], [(0, 1)]),
        record("d", 8, [[60, 9, 8, 7], [61, 62, 4, 5]], [(0, 1), (1, 0)]),
    ],
    "records of different lengths": [
        record("e", 11, [[1, 2, 3], [4, 5, 6, 7, 8, 9]], [(0, 1)]),
        record("f", 1, [[10, 11, 12, 13, 14, 15, 16], [17, 18]], [(0, 1)]),
        record("g", 25, [[1, 2], [3, 4, 5]], [(1, 0)]),
        record("h", 5, [[20, 21, 22], [23, 24, 25], [26, 27]], [(0, 1), (0, 2)]),
    ],
}
PACKED = CASES["records of different lengths"]

LAYOUTS = {
    "shared prefix, split attention": (SharedPrefixLayout(), SPLIT_SDPA),
    "shared prefix, one mask": (SharedPrefixLayout(), "sdpa"),
    "shared prefix, packed, split attention": (SharedPrefixLayout(max_tokens_per_row=45), SPLIT_SDPA),
    "shared prefix, packed into one row": (SharedPrefixLayout(max_tokens_per_row=1000), "sdpa"),
    "shared prefix, selected logits": (SharedPrefixLayout(logits="selected"), "sdpa"),
    "concatenated": (ConcatenatedLayout(), "sdpa"),
    "concatenated, all logits": (ConcatenatedLayout(logits="all"), "sdpa"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def orpo(tmp_path_factory):
    return functools.cache(lambda family: OrpoReference(tiny_model(family=family), tmp_path_factory.mktemp("trl")))


def run(layout, model, examples, *, nll_on="full", tamper=lambda batch: batch):
    batch = tamper(layout.collate(examples, score_prompt=nll_on == "full"))
    logps = layout.compute_logps(model, batch)
    tokens_C = logps.token_logps.detach().split(logps.counts.tolist())
    token_logps = torch.cat([tokens_C[index] for side in ("chosen_P", "rejected_P") for index in batch[side]])
    sides = [
        CompletionLogps(
            sums=logps.sums[batch[side]],
            counts=logps.counts[batch[side]],
            reference_sums=batch["reference_C"][batch[side]] if "reference_C" in batch else None,
        )
        for side in ("chosen_P", "rejected_P")
    ]
    nll = -sides[0].sums.sum() - logps.prompt_sums[batch["record_P"]].sum()
    return sides, nll / batch["nll_tokens"], token_logps


def measure(layout, model, examples, *, nll_on="full", tamper=lambda batch: batch):
    """Return what `OrpoReference.measure` returns."""
    objective = build_objective(Orpo(beta=BETA, nll_on=nll_on))
    model.zero_grad(set_to_none=True)
    (chosen, rejected), nll, token_logps = run(layout, model, examples, nll_on=nll_on, tamper=tamper)
    loss = objective.nll_weight * nll + objective.pair_losses(chosen, rejected).mean()
    loss.backward()
    return Measured(loss.item(), token_logps, gradients(model))


def model_with(family, attention):
    model = tiny_model(family=family).train()
    set_attn_implementation(model, attention)
    return model


# with padding on the left TRL also scores the first token of a prompt, as if the padding predicted it
@pytest.mark.parametrize(
    ("nll_on", "pad_left"),
    [("full", False), ("completion", False), ("completion", True)],
    ids=["full", "completion", "completion, padded left"],
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", SERVED)
def test_log_probabilities_loss_and_gradients_equal_those_of_trl(orpo, family, case, nll_on, pad_left):
    expected = orpo(family).measure(CASES[case], nll_on=nll_on, pad_left=pad_left)
    for name, (layout, attention) in LAYOUTS.items():
        actual = measure(layout, model_with(family, attention), CASES[case], nll_on=nll_on)
        assert actual.loss == pytest.approx(expected.loss, rel=1e-5), name
        torch.testing.assert_close(actual.token_logps, expected.token_logps, rtol=1e-5, atol=1e-5)
        assert largest_error(actual.gradients, expected.gradients) < 1e-5, name


@pytest.mark.parametrize("family", SERVED)
def test_float64_models_agree_with_trl_to_ten_digits(family, tmp_path):
    reference = OrpoReference(exact_model(family), tmp_path)
    for case, examples in CASES.items():
        expected = reference.measure_linear(examples)
        for name, (layout, attention) in LAYOUTS.items():
            model = exact_model(family)
            set_attn_implementation(model, attention)
            (chosen, rejected), nll, token_logps = run(layout, model, examples)
            loss = nll + chosen.means.sum() - 2 * rejected.means.sum()
            loss.backward()
            assert loss.item() == pytest.approx(expected.loss, rel=1e-10), (case, name)
            torch.testing.assert_close(token_logps, expected.token_logps, rtol=0, atol=1e-10)
            assert largest_error(gradients(model), expected.gradients) < 1e-10, (case, name)


@pytest.mark.parametrize("case", CASES)
def test_dpo_sums_loss_and_gradients_equal_those_of_trl(case, tmp_path):
    reference = DpoReference(tiny_model(), tiny_model(seed=1), tmp_path)
    expected, sums, base_sums = reference.measure(CASES[case])
    for layout, attention in LAYOUTS.values():
        # the examples contain the reference log-probabilities, computed with the same layout
        with torch.no_grad():
            logps = layout.compute_logps(tiny_model(seed=1), layout.collate(CASES[case], score_prompt=False))
        examples = with_reference(CASES[case], logps.sums.tolist())
        model = model_with("llama", attention)
        (chosen, rejected), _, _ = run(layout, model, examples, nll_on="completion")
        loss = build_objective(Dpo(beta=BETA)).pair_losses(chosen, rejected).mean()
        loss.backward()
        torch.testing.assert_close(torch.cat([chosen.sums, rejected.sums]).detach(), sums, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            torch.cat([chosen.reference_sums, rejected.reference_sums]), base_sums, rtol=1e-5, atol=0
        )
        assert loss.item() == pytest.approx(expected.loss, rel=1e-5)
        assert largest_error(gradients(model), expected.gradients) < 1e-5


def with_reference(examples, sums):
    sums = iter(sums)
    return [
        dataclasses.replace(example, reference_logps=[next(sums) for _ in example.completions]) for example in examples
    ]


def no_position_restart(batch):
    return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}


def no_segment_mask(batch):
    return batch | {"segments": batch["segments"].clamp(max=PREFIX)}


def no_mask_behind_the_prefix(batch):
    return batch | {"masked_Q": batch["masked_Q"][:0]}


def no_record_mask(batch):
    return batch | {"records": batch["records"].clamp(max=0)}


def first_token_read_one_column_back(batch):
    """Return the batch in which the first token of each completion is predicted one token too early."""
    starts = batch["counts_C"].cumsum(0) - batch["counts_C"]
    source = batch["source_N"].clone()
    for start in starts.tolist():
        before = (batch["positions_M"] == batch["positions_M"][source[start]] - 1).nonzero()
        source[start] = before[0, 0]
    return batch | {"source_N": source}


BROKEN = {
    "no position restart": (no_position_restart, SharedPrefixLayout(), "sdpa", "one pair"),
    "no segment mask": (no_segment_mask, SharedPrefixLayout(), "sdpa", "one pair"),
    "no mask behind the prefix": (no_mask_behind_the_prefix, SharedPrefixLayout(), SPLIT_SDPA, "one pair"),
    "wrong first row": (first_token_read_one_column_back, SharedPrefixLayout(), "sdpa", "one pair"),
    "no record mask": (
        no_record_mask,
        SharedPrefixLayout(max_tokens_per_row=1000),
        "sdpa",
        "records of different lengths",
    ),
    "no position restart, packed": (
        no_position_restart,
        SharedPrefixLayout(max_tokens_per_row=1000),
        "sdpa",
        "records of different lengths",
    ),
}


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_wrong_layout_differs_from_trl_in_log_probabilities_and_gradients(orpo, broken, family):
    tamper, layout, attention, case = BROKEN[broken]
    if broken == "no mask behind the prefix" and family in ("gemma3", "mistral"):
        pytest.skip("a window shorter than the prefix takes a mask for every column")
    expected = orpo(family).measure(CASES[case])
    actual = measure(layout, model_with(family, attention), CASES[case], tamper=tamper)
    assert (actual.token_logps - expected.token_logps).abs().max() > 1e-3
    assert largest_error(actual.gradients, expected.gradients) > 1e-3


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_window_measured_in_columns_differs_from_trl(orpo, family):
    case = CASES["several pairs of one record, completions shared"]
    expected = orpo(family).measure(case)
    model = model_with(family, "sdpa")
    model.config.sliding_window = 10**6
    actual = measure(SharedPrefixLayout(), model, case)
    assert (actual.token_logps - expected.token_logps).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_the_likelihood_of_the_completion_alone_differs_from_trl(orpo, case):
    expected = orpo("llama").measure(CASES[case])
    actual = measure(SharedPrefixLayout(), tiny_model(), CASES[case], nll_on="completion")
    assert abs(actual.loss - expected.loss) > 1e-3
    assert largest_error(actual.gradients, expected.gradients) > 1e-2


@pytest.mark.parametrize("max_tokens_per_row", [None, 30, 45, 1000])
def test_results_are_in_the_order_of_the_examples(max_tokens_per_row):
    layout, model = SharedPrefixLayout(max_tokens_per_row=max_tokens_per_row), tiny_model()
    with torch.no_grad():
        together = layout.compute_logps(model, layout.collate(PACKED, score_prompt=True))
        alone = [layout.compute_logps(model, layout.collate([example], score_prompt=True)) for example in PACKED]
    for name in ("token_logps", "prompt_token_logps"):
        torch.testing.assert_close(
            getattr(together, name), torch.cat([getattr(logps, name) for logps in alone]), rtol=1e-5, atol=1e-5
        )
    assert together.prompt_counts.tolist() == [10, 0, 24, 4]


def test_packing_fills_rows_with_the_longest_record_first():
    # records of 20, 10, 30 and 13 tokens
    lengths = [SharedPrefixLayout().collate([example], score_prompt=False)["num_tokens"].item() for example in PACKED]
    assert lengths == [20, 10, 30, 13]
    batch = SharedPrefixLayout(max_tokens_per_row=45).collate(PACKED, score_prompt=True)
    rows = [sorted({*row.tolist()} - {PADDING}) for row in batch["records"]]
    assert rows == [[2, 3], [0, 1]]
    assert batch["input_ids"].shape == (2, 43)
    assert batch["num_tokens"] == 73
    again = SharedPrefixLayout(max_tokens_per_row=45).collate(PACKED, score_prompt=True)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_a_record_longer_than_a_row_has_its_own_row():
    batch = SharedPrefixLayout(max_tokens_per_row=23).collate(PACKED, score_prompt=True)
    assert [sorted({*row.tolist()} - {PADDING}) for row in batch["records"]] == [[2], [0], [1, 3]]


def test_the_tokens_of_the_padding_change_nothing():
    layout, model = SharedPrefixLayout(max_tokens_per_row=45), tiny_model()
    batch = layout.collate(PACKED, score_prompt=True)
    padding = batch["records"] == PADDING
    assert padding.any()
    other = batch | {"input_ids": batch["input_ids"].masked_fill(padding, 77)}
    with torch.no_grad():
        for attention in ("sdpa", SPLIT_SDPA, "eager"):
            set_attn_implementation(model, attention)
            assert torch.equal(
                layout.compute_logps(model, batch).token_logps, layout.compute_logps(model, other).token_logps
            )


def test_a_prompt_runs_once_and_so_does_a_completion_of_several_pairs():
    (example,) = CASES["several pairs of one record, completions shared"]
    batch = SharedPrefixLayout().collate([example], score_prompt=True)
    assert batch["num_tokens"] == 14 + 3 + 4 + 2 + 5
    assert batch["nll_tokens"] == 4 * 13 + 3 + 3 + 5 + 5


def test_tokens_that_all_completions_start_with_run_once():
    (example,) = CASES["completions with a common start, and one that is the start of another"]
    batch = SharedPrefixLayout().collate([example], score_prompt=False)
    assert batch["num_tokens"] == 9 + 2 + 2 + 3 + 1


def test_logits_are_computed_only_where_they_predict_a_scored_token():
    example = Example(record_id="a", prompt_ids=[5] * 20, completions=[[8, 9], [10, 11, 12]], pairs=[(0, 1)])
    batch = SharedPrefixLayout().collate([example], score_prompt=False)
    # the last token of the prefix, then every token of the completions except their last
    assert batch["positions_M"].tolist() == [19, 20, 22, 23]


def test_a_single_completion_needs_no_mask():
    example = Example(record_id="a", prompt_ids=[5, 6], completions=[[8, 9]], pairs=[(0, 0)])
    batch = SharedPrefixLayout().collate([example], score_prompt=True)
    assert len(batch["masked_Q"]) == 0
    model = model_with("llama", SPLIT_SDPA)
    with torch.no_grad():
        actual = SharedPrefixLayout().compute_logps(model, batch).token_logps
        logps = tiny_model()(torch.tensor([[5, 6, 8, 9]])).logits[0, 1:3].log_softmax(-1)
    torch.testing.assert_close(actual, torch.stack([logps[0, 8], logps[1, 9]]), rtol=1e-5, atol=1e-5)
