"""Every number is compared with TRL's ORPOTrainer, loss, token log-probabilities and gradients alike."""

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from mint_ray.layouts import Example
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.shared_prefix import PADDING, PREFIX, SharedPrefixLayout, visible
from mint_ray.loading import UserError
from mint_ray.objectives import odds_ratio_losses, orpo_loss
from mint_ray.records import Message, PreferencePair
from mint_ray.trainers.shared_prefix import choose_layout
from mint_ray.trainers.tokenization import tokenize_pairs
from tests.tiny import tiny_model, tiny_tokenizer

BETA = 0.5
NOTE = "A boy of four years with short stature and seizures."
CASES = {
    "one pair": [("a", NOTE, "1. Noonan syndrome", "1. Rett syndrome 2. Marfan syndrome")],
    "several pairs of one record": [
        ("a", NOTE, "1. Noonan syndrome", "1. Rett syndrome 2. Marfan syndrome"),
        ("a", NOTE, "1. Noonan syndrome", "Kabuki"),
        ("a", NOTE, "1. Noonan syndrome 2. Kabuki", "liver, kidney, breast"),
    ],
    "rows of different lengths": [
        ("a", NOTE, "1. Noonan syndrome", "1. Rett syndrome 2. Marfan syndrome"),
        ("a", NOTE, "Kabuki", "1. Rett syndrome 2. Marfan syndrome"),
        ("b", "A cough.", "Williams syndrome, and nothing else", "Rett"),
        ("c", NOTE + " " + NOTE, "The skin.", "The lung."),
    ],
}


def to_pair(record_id, prompt, chosen, rejected):
    return PreferencePair(
        prompt=[Message(role="system", content="Answer."), Message(role="user", content=prompt)],
        chosen=[Message(role="assistant", content=chosen)],
        rejected=[Message(role="assistant", content=rejected)],
        record_id=record_id,
        split="train",
        teacher="",
        sampler="",
        chosen_labels=[],
        rejected_labels=[],
    )


class Reference:
    """TRL's trainer over the same pairs: its loss, mean log-probabilities per completion and gradients."""

    def __init__(self, pairs, folder):
        rows = [dataclasses.asdict(pair) for pair in pairs]
        self.trainer = ORPOTrainer(
            model=tiny_model(),
            args=ORPOConfig(output_dir=str(folder), beta=BETA, max_length=2048, report_to="none", use_cpu=True),
            train_dataset=Dataset.from_list(
                [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
            ),
            processing_class=tiny_tokenizer(),
        )
        batch = self.trainer.data_collator(list(self.trainer.train_dataset))
        model = self.trainer.model
        loss, self.metrics = self.trainer.get_batch_loss_metrics(model, batch)
        loss.backward()
        self.loss = loss.item()
        self.gradients = {name: weight.grad for name, weight in model.named_parameters()}
        with torch.no_grad():
            chosen_P, rejected_P = self.trainer.concatenated_forward(model, batch)[:2]
        self.logps = torch.cat([chosen_P, rejected_P])


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request, tmp_path_factory):
    torch.set_num_threads(1)
    pairs = [to_pair(*row) for row in CASES[request.param]]
    examples, dropped = tokenize_pairs(pairs, tiny_tokenizer(), max_length=2048)
    assert not dropped
    return examples, Reference(pairs, tmp_path_factory.mktemp("trl"))


def measure(layout, examples, *, score_prompt=True, tamper=lambda batch: batch):
    """Loss, mean log-probabilities of chosen then rejected, gradients."""
    model = tiny_model()
    batch = tamper(layout.lay_out(examples, score_prompt=score_prompt))
    logps = layout.run(model, batch)
    chosen_P, rejected_P = logps.means_C[batch["chosen_P"]], logps.means_C[batch["rejected_P"]]
    nll_sum = -logps.sums_C[batch["chosen_P"]].sum() - logps.prompt_sums_B[batch["record_P"]].sum()
    losses_P = odds_ratio_losses(chosen_P, rejected_P)
    loss = orpo_loss(nll_sum, batch["nll_tokens"], losses_P, batch["pairs"], BETA)
    loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    return loss.item(), torch.cat([chosen_P, rejected_P]).detach(), gradients


def largest_gradient_error(gradients, reference):
    """Relative to the norm of the whole gradient."""
    norm = torch.sqrt(sum((gradient**2).sum() for gradient in reference.values()))
    assert gradients.keys() == reference.keys()
    return max(((gradients[name] - reference[name]).abs().max() / norm).item() for name in reference)


@pytest.mark.parametrize("layout", [SharedPrefixLayout(), ConcatenatedLayout()], ids=lambda layout: layout.name)
def test_loss_log_probabilities_and_gradients_equal_those_of_trl(case, layout):
    examples, reference = case
    loss, logps, gradients = measure(layout, examples)
    assert loss == pytest.approx(reference.loss, rel=1e-5)
    torch.testing.assert_close(logps, reference.logps, rtol=1e-5, atol=0)
    assert largest_gradient_error(gradients, reference.gradients) < 1e-5


def no_position_restart(batch):
    return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}


def no_segment_mask(batch):
    return batch | {"segments": batch["segments"].clamp(max=PREFIX)}


def first_token_read_one_column_back(batch):
    """Every completion's first own token is predicted by the row before it rather than by the end of the prefix."""
    rows, columns = batch["cell_row_M"], batch["columns_K"][batch["cell_column_M"]]
    sources, segments = batch["source_N"].clone(), batch["segments"]
    width = segments.shape[1]
    for index in range(len(sources)):
        row, column = rows[sources[index]], columns[sources[index]]
        is_last_of_prefix = segments[row, column] == PREFIX and (
            column + 1 == width or segments[row, column + 1] != PREFIX
        )
        if is_last_of_prefix:
            previous = (rows == row) & (columns == column - 1)
            sources[index] = int(previous.nonzero()[0, 0])
    return batch | {"source_N": sources}


@pytest.mark.parametrize("tamper", [no_position_restart, no_segment_mask, first_token_read_one_column_back])
def test_a_wrong_layout_is_told_from_trl_by_log_probabilities_and_gradients(case, tamper):
    examples, reference = case
    _, logps, gradients = measure(SharedPrefixLayout(), examples, tamper=tamper)
    assert ((logps - reference.logps) / reference.logps).abs().max() > 1e-4
    assert largest_gradient_error(gradients, reference.gradients) > 1e-4


def test_likelihood_of_the_completion_alone_is_told_from_trl(case):
    examples, reference = case
    loss, _, gradients = measure(SharedPrefixLayout(), examples, score_prompt=False)
    assert abs(loss - reference.loss) > 1e-2
    assert largest_gradient_error(gradients, reference.gradients) > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_token_log_probabilities_equal_those_of_rows_run_alone(attention):
    examples = [
        Example(record_id="a", prompt_ids=[5, 6, 7], completions=[[8, 9, 10], [8, 9], [8, 11, 12, 13]], pairs=[(0, 1)]),
        Example(record_id="b", prompt_ids=[5], completions=[[20, 21]], pairs=[]),
        Example(record_id="c", prompt_ids=[30] * 9, completions=[[31], [32, 33, 34]], pairs=[(1, 0)]),
    ]
    model = tiny_model()
    model.set_attn_implementation(attention)
    layout = SharedPrefixLayout()
    batch = layout.lay_out(examples, score_prompt=True)
    expected, expected_prompt = [], []
    with torch.no_grad():
        actual = layout.run(model, batch)
        for example in examples:
            for index, completion in enumerate(example.completions):
                ids = torch.tensor([example.prompt_ids + completion])
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
                expected.append(logps[len(example.prompt_ids) - 1 :])
                if index == 0:
                    expected_prompt.append(logps[: len(example.prompt_ids) - 1])
    torch.testing.assert_close(actual.token_logps_N, torch.cat(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(actual.prompt_token_logps_N, torch.cat(expected_prompt), rtol=1e-5, atol=1e-6)
    assert actual.counts_C.tolist() == [3, 2, 4, 2, 1, 3]
    assert actual.prompt_counts_B.tolist() == [2, 0, 8]


def test_a_batch_gives_the_log_probabilities_of_its_rows_one_by_one():
    examples, _ = tokenize_pairs(
        [to_pair(*row) for row in CASES["rows of different lengths"]], tiny_tokenizer(), max_length=2048
    )
    layout, model = SharedPrefixLayout(), tiny_model()
    with torch.no_grad():
        together = layout.run(model, layout.lay_out(examples, score_prompt=True))
        alone = [layout.run(model, layout.lay_out([example], score_prompt=True)) for example in examples]
    torch.testing.assert_close(
        together.token_logps_N, torch.cat([logps.token_logps_N for logps in alone]), rtol=1e-5, atol=1e-6
    )


def test_a_prompt_is_run_once_and_a_repeated_completion_too():
    examples, _ = tokenize_pairs(
        [to_pair(*row) for row in CASES["several pairs of one record"]], tiny_tokenizer(), max_length=2048
    )
    (example,) = examples
    assert len(example.completions) == 5
    assert example.pairs == [(0, 1), (0, 2), (3, 4)]
    batch = SharedPrefixLayout().lay_out(examples, score_prompt=True)
    assert batch["row_tokens"] <= len(example.prompt_ids) + sum(len(completion) for completion in example.completions)


def test_logits_are_kept_only_where_a_token_is_scored():
    example = Example(record_id="a", prompt_ids=[5] * 20, completions=[[8, 9], [10, 11, 12]], pairs=[(0, 1)])
    batch = SharedPrefixLayout().lay_out([example], score_prompt=False)
    # the prefix's last token, then every completion token but each last one
    assert batch["columns_K"].tolist() == [19, 20, 22, 23]


def test_a_completion_sees_the_prefix_and_itself_only():
    segments = torch.tensor([[PADDING, 0, 0, 1, 1, 2, PADDING]])
    expected = [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 0],
    ]
    assert visible(segments)[0, 0, :-1].int().tolist() == expected


def test_an_empty_completion_is_refused_by_name():
    with pytest.raises(UserError, match="'case-7': a completion has no tokens"):
        Example(record_id="case-7", prompt_ids=[1], completions=[[2], []], pairs=[(0, 1)])


def test_a_model_with_positions_of_its_own_falls_back_to_the_concatenated_layout():
    class OwnPositions(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny_model()
            self.config = copy.deepcopy(self.model.config)

        def forward(self, position_ids=None, **arguments):
            return self.model(**arguments)

    examples = [Example(record_id="a", prompt_ids=[5, 6, 7], completions=[[8, 9], [10, 11]], pairs=[(0, 1)])]
    assert choose_layout(tiny_model(), examples).name == "shared_prefix"
    assert choose_layout(OwnPositions(), examples).name == "concatenated"
