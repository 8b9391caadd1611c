"""Every number is compared with TRL's trainers: log-probabilities of tokens, loss and gradients alike.

A loss alone would pass broken code: without the restart of positions it moves by 2.5e-6 while gradients move by 7e-2.
"""

import dataclasses
import functools

import pytest
import torch

from mint_ray.layouts import Example
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.masks import PADDING, PREFIX, SPLIT, set_attention
from mint_ray.layouts.shared_prefix import SharedPrefixLayout
from mint_ray.objectives import Answers, build_objective
from mint_ray.objectives.config import Dpo, Orpo
from tests.layouts.reference import BETA, DpoReference, Measured, OrpoReference, exact_model, gradients, largest_error
from tests.tiny import tiny_model

SERVED = ["llama", "qwen3", "gemma", "gemma3", "mistral"]


def record(name, prompt, completions, pairs):
    """An example with token ids that a first token of its own sets apart."""
    start = 3 + 40 * ord(name[0]) % 300
    return Example(
        record_id=name,
        prompt_ids=[start + (7 * index) % 37 for index in range(prompt)],
        completions=[[3 + (29 * token + start) % 390 for token in completion] for completion in completions],
        pairs=pairs,
    )


CASES = {
    "one pair": [record("a", 12, [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10, 11]], [(0, 1)])],
    "several pairs of one record, answers used again": [
        record("b", 14, [[1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11, 12, 13, 14]], [(0, 1), (0, 2), (3, 0), (3, 2)])
    ],
    "answers that begin alike, and one that another begins with": [
        record("c", 9, [[1, 2, 3, 4], [1, 2, 5, 6, 7], [1, 2, 3]], [(0, 1), (2, 1), (0, 2)]),
    ],
    "a merge across the end of the prompt in one answer": [
        # "...Mar" + "fan" is one token in the one answer; in the other the prompt's last token stands alone
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
    "shared prefix, split attention": (SharedPrefixLayout(), SPLIT),
    "shared prefix, one mask": (SharedPrefixLayout(), "sdpa"),
    "shared prefix, packed, split attention": (SharedPrefixLayout(row_tokens=45), SPLIT),
    "shared prefix, packed into one row": (SharedPrefixLayout(row_tokens=1000), "sdpa"),
    "shared prefix, logits by rows": (SharedPrefixLayout(head="rows"), "sdpa"),
    "concatenated": (ConcatenatedLayout(), "sdpa"),
    "concatenated, all logits": (ConcatenatedLayout(head="all"), "sdpa"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def orpo(tmp_path_factory):
    return functools.cache(lambda family: OrpoReference(tiny_model(family=family), tmp_path_factory.mktemp("trl")))


def run(layout, model, examples, *, nll_on="full", tamper=lambda batch: batch):
    batch = tamper(layout.lay_out(examples, score_prompt=nll_on == "full"))
    logps = layout.run(model, batch)
    tokens_C = logps.token_logps_N.detach().split(logps.counts_C.tolist())
    token_logps = torch.cat([tokens_C[index] for side in ("chosen_P", "rejected_P") for index in batch[side]])
    sides = [
        Answers(
            sums_P=logps.sums_C[batch[side]],
            counts_P=logps.counts_C[batch[side]],
            reference_sums_P=batch["reference_C"][batch[side]] if "reference_C" in batch else None,
        )
        for side in ("chosen_P", "rejected_P")
    ]
    nll = -sides[0].sums_P.sum() - logps.prompt_sums_B[batch["record_P"]].sum()
    return sides, nll / batch["nll_tokens"], token_logps


def measure(layout, model, examples, *, nll_on="full", tamper=lambda batch: batch):
    """What `OrpoReference.measure` measures."""
    objective = build_objective(Orpo(beta=BETA, nll_on=nll_on))
    model.zero_grad(set_to_none=True)
    (chosen, rejected), nll, token_logps = run(layout, model, examples, nll_on=nll_on, tamper=tamper)
    loss = objective.nll_weight * nll + objective.pair_losses(chosen, rejected).mean()
    loss.backward()
    return Measured(loss.item(), token_logps, gradients(model))


def model_with(family, attention):
    model = tiny_model(family=family).train()
    set_attention(model, attention)
    return model


# padded on the left TRL scores the first token of a prompt too, as if the padding before it predicted it
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
            set_attention(model, attention)
            (chosen, rejected), nll, token_logps = run(layout, model, examples)
            loss = nll + chosen.means_P.sum() - 2 * rejected.means_P.sum()
            loss.backward()
            assert loss.item() == pytest.approx(expected.loss, rel=1e-10), (case, name)
            torch.testing.assert_close(token_logps, expected.token_logps, rtol=0, atol=1e-10)
            assert largest_error(gradients(model), expected.gradients) < 1e-10, (case, name)


@pytest.mark.parametrize("case", CASES)
def test_dpo_sums_loss_and_gradients_equal_those_of_trl(case, tmp_path):
    reference = DpoReference(tiny_model(), tiny_model(seed=1), tmp_path)
    expected, sums, base_sums = reference.measure(CASES[case])
    for layout, attention in LAYOUTS.values():
        # the base student's log-probabilities, by the same layout, travel with the examples
        with torch.no_grad():
            logps = layout.run(tiny_model(seed=1), layout.lay_out(CASES[case], score_prompt=False))
        examples = with_reference(CASES[case], logps.sums_C.tolist())
        model = model_with("llama", attention)
        (chosen, rejected), _, _ = run(layout, model, examples, nll_on="completion")
        loss = build_objective(Dpo(beta=BETA)).pair_losses(chosen, rejected).mean()
        loss.backward()
        torch.testing.assert_close(torch.cat([chosen.sums_P, rejected.sums_P]).detach(), sums, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            torch.cat([chosen.reference_sums_P, rejected.reference_sums_P]), base_sums, rtol=1e-5, atol=0
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
    """The first token of each completion is predicted by the token before the one that should."""
    starts = batch["counts_C"].cumsum(0) - batch["counts_C"]
    source = batch["source_N"].clone()
    for start in starts.tolist():
        before = (batch["cells_M"] == batch["cells_M"][source[start]] - 1).nonzero()
        source[start] = before[0, 0]
    return batch | {"source_N": source}


BROKEN = {
    "no position restart": (no_position_restart, SharedPrefixLayout(), "sdpa", "one pair"),
    "no segment mask": (no_segment_mask, SharedPrefixLayout(), "sdpa", "one pair"),
    "no mask behind the prefix": (no_mask_behind_the_prefix, SharedPrefixLayout(), SPLIT, "one pair"),
    "wrong first row": (first_token_read_one_column_back, SharedPrefixLayout(), "sdpa", "one pair"),
    "no record mask": (
        no_record_mask,
        SharedPrefixLayout(row_tokens=1000),
        "sdpa",
        "records of different lengths",
    ),
    "no position restart, packed": (
        no_position_restart,
        SharedPrefixLayout(row_tokens=1000),
        "sdpa",
        "records of different lengths",
    ),
}


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_wrong_layout_is_told_from_trl_by_log_probabilities_and_gradients(orpo, broken, family):
    tamper, layout, attention, case = BROKEN[broken]
    if broken == "no mask behind the prefix" and family in ("gemma3", "mistral"):
        pytest.skip("a window shorter than the prefix takes a mask for every column")
    expected = orpo(family).measure(CASES[case])
    actual = measure(layout, model_with(family, attention), CASES[case], tamper=tamper)
    assert (actual.token_logps - expected.token_logps).abs().max() > 1e-3
    assert largest_error(actual.gradients, expected.gradients) > 1e-3


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_a_window_counted_in_columns_is_told_from_trl(orpo, family):
    case = CASES["several pairs of one record, answers used again"]
    expected = orpo(family).measure(case)
    model = model_with(family, "sdpa")
    model.config.sliding_window = 10**6
    actual = measure(SharedPrefixLayout(), model, case)
    assert (actual.token_logps - expected.token_logps).abs().max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_likelihood_of_the_completion_alone_is_told_from_trl(orpo, case):
    expected = orpo("llama").measure(CASES[case])
    actual = measure(SharedPrefixLayout(), tiny_model(), CASES[case], nll_on="completion")
    assert abs(actual.loss - expected.loss) > 1e-3
    assert largest_error(actual.gradients, expected.gradients) > 1e-2


@pytest.mark.parametrize("row_tokens", [None, 30, 45, 1000])
def test_results_come_back_in_the_order_given(row_tokens):
    layout, model = SharedPrefixLayout(row_tokens=row_tokens), tiny_model()
    with torch.no_grad():
        together = layout.run(model, layout.lay_out(PACKED, score_prompt=True))
        alone = [layout.run(model, layout.lay_out([example], score_prompt=True)) for example in PACKED]
    for name in ("token_logps_N", "prompt_token_logps_N"):
        torch.testing.assert_close(
            getattr(together, name), torch.cat([getattr(logps, name) for logps in alone]), rtol=1e-5, atol=1e-5
        )
    assert together.prompt_counts_B.tolist() == [10, 0, 24, 4]


def test_packing_fills_rows_with_the_longest_record_first():
    # records of 20, 10, 30 and 13 tokens
    lengths = [SharedPrefixLayout().lay_out([example], score_prompt=False)["row_tokens"].item() for example in PACKED]
    assert lengths == [20, 10, 30, 13]
    batch = SharedPrefixLayout(row_tokens=45).lay_out(PACKED, score_prompt=True)
    rows = [sorted({*row.tolist()} - {PADDING}) for row in batch["records"]]
    assert rows == [[2, 3], [0, 1]]
    assert batch["input_ids"].shape == (2, 43)
    assert batch["row_tokens"] == 73
    again = SharedPrefixLayout(row_tokens=45).lay_out(PACKED, score_prompt=True)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_a_record_longer_than_a_row_has_a_row_of_its_own():
    batch = SharedPrefixLayout(row_tokens=23).lay_out(PACKED, score_prompt=True)
    assert [sorted({*row.tolist()} - {PADDING}) for row in batch["records"]] == [[2], [0], [1, 3]]


def test_what_stands_in_the_padding_changes_nothing():
    layout, model = SharedPrefixLayout(row_tokens=45), tiny_model()
    batch = layout.lay_out(PACKED, score_prompt=True)
    padding = batch["records"] == PADDING
    assert padding.any()
    other = batch | {"input_ids": batch["input_ids"].masked_fill(padding, 77)}
    with torch.no_grad():
        for attention in ("sdpa", SPLIT, "eager"):
            set_attention(model, attention)
            assert torch.equal(layout.run(model, batch).token_logps_N, layout.run(model, other).token_logps_N)


def test_a_prompt_is_run_once_and_a_completion_of_several_pairs_too():
    (example,) = CASES["several pairs of one record, answers used again"]
    batch = SharedPrefixLayout().lay_out([example], score_prompt=True)
    assert batch["row_tokens"] == 14 + 3 + 4 + 2 + 5
    assert batch["nll_tokens"] == 4 * 13 + 3 + 3 + 5 + 5


def test_tokens_that_all_answers_begin_with_are_run_once():
    (example,) = CASES["answers that begin alike, and one that another begins with"]
    batch = SharedPrefixLayout().lay_out([example], score_prompt=False)
    assert batch["row_tokens"] == 9 + 2 + 2 + 3 + 1


def test_logits_are_asked_for_only_where_a_token_is_scored():
    example = Example(record_id="a", prompt_ids=[5] * 20, completions=[[8, 9], [10, 11, 12]], pairs=[(0, 1)])
    batch = SharedPrefixLayout().lay_out([example], score_prompt=False)
    # the prefix's last token, then every completion token but each last one
    assert batch["cells_M"].tolist() == [19, 20, 22, 23]


def test_a_single_answer_needs_no_mask_at_all():
    example = Example(record_id="a", prompt_ids=[5, 6], completions=[[8, 9]], pairs=[(0, 0)])
    batch = SharedPrefixLayout().lay_out([example], score_prompt=True)
    assert len(batch["masked_Q"]) == 0
    model = model_with("llama", SPLIT)
    with torch.no_grad():
        actual = SharedPrefixLayout().run(model, batch).token_logps_N
        logps = tiny_model()(torch.tensor([[5, 6, 8, 9]])).logits[0, 1:3].log_softmax(-1)
    torch.testing.assert_close(actual, torch.stack([logps[0, 8], logps[1, 9]]), rtol=1e-5, atol=1e-5)
