import copy

import pytest
import torch

from mint_ray.config.loader import UserError
from mint_ray.layouts import Example
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.masks import PADDING, SPLIT, attention_mask, attention_of, dense, set_attention, visibility
from mint_ray.layouts.shared_prefix import SharedPrefixLayout
from tests.tiny import tiny_model
from tests.vision_students import tiny_seeing

EXAMPLES = [
    Example(record_id="a", prompt_ids=[5, 6, 7], completions=[[8, 9, 10], [8, 9], [8, 11, 12, 13]], pairs=[(0, 1)]),
    Example(record_id="b", prompt_ids=[5], completions=[[20, 21]], pairs=[]),
    Example(record_id="c", prompt_ids=[30] * 9, completions=[[31], [32, 33, 34]], pairs=[(1, 0)]),
]
PACKED = {
    "input_ids": torch.zeros((1, 8)),
    "records": torch.tensor([[0, 0, 0, 0, 0, 1, 1, PADDING]]),
    "segments": torch.tensor([[0, 0, 1, 1, 2, 0, 1, PADDING]]),
    "position_ids": torch.tensor([[0, 1, 2, 3, 2, 0, 1, 0]]),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_a_completion_sees_its_own_prefix_and_itself_only():
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]
    assert dense(PACKED, visibility(PACKED))[0, 0].int().tolist() == expected


def test_a_window_is_counted_in_positions():
    # the second completion's token stands at position 2, in column 4
    assert dense(PACKED, visibility(PACKED, window=2))[0, 0, :5].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 1, 0, 0, 0],
    ]


def test_rows_asked_for_are_the_rows_of_the_whole_mask():
    rule = visibility(PACKED)
    assert torch.equal(dense(PACKED, rule, torch.tensor([2, 4])), dense(PACKED, rule)[:, :, [2, 4]])


@pytest.mark.parametrize("row_tokens", [None, 20, 100])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", SPLIT])
def test_every_attention_gives_the_log_probabilities_of_rows_run_alone(attention, row_tokens):
    model = tiny_model().eval()
    expected, expected_prompt = [], []
    with torch.no_grad():
        for example in EXAMPLES:
            for index, completion in enumerate(example.completions):
                ids = torch.tensor([example.prompt_ids + completion])
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
                expected.append(logps[len(example.prompt_ids) - 1 :])
                if index == 0:
                    expected_prompt.append(logps[: len(example.prompt_ids) - 1])
        set_attention(model, attention)
        layout = SharedPrefixLayout(row_tokens=row_tokens)
        # flex attention is compiled for GPUs; without a compiler it still says whether the mask is right
        with torch.compiler.set_stance("force_eager"):
            actual = layout.run(model, layout.lay_out(EXAMPLES, score_prompt=True))
    torch.testing.assert_close(actual.token_logps_N, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.prompt_token_logps_N, torch.cat(expected_prompt), rtol=1e-5, atol=1e-5)
    assert actual.counts_C.tolist() == [3, 2, 4, 2, 1, 3]
    assert actual.prompt_counts_B.tolist() == [2, 0, 8]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has no backward pass on processors")
def test_flex_attention_gives_the_gradients_of_sdpa_on_a_gpu():
    gradients = {}
    for attention in ("sdpa", "flex_attention"):
        model = tiny_model(head_dim=16).cuda()
        set_attention(model, attention)
        for row_tokens in (None, 20, 100):  # shapes of their own, one after the other
            layout = SharedPrefixLayout(row_tokens=row_tokens)
            batch = {name: tensor.cuda() for name, tensor in layout.lay_out(EXAMPLES, score_prompt=True).items()}
            model.zero_grad()
            logps = layout.run(model, batch)
            (logps.means_C.sum() + logps.prompt_sums_B.sum()).backward()
            found = torch.cat([weight.grad.flatten() for weight in model.parameters()])
            expected = gradients.setdefault(row_tokens, found)
            assert (found - expected).norm() < 1e-4 * expected.norm()


def test_split_attention_is_sdpa_where_no_mask_of_ours_is_given():
    model, split = tiny_model().eval(), tiny_model().eval()
    set_attention(split, SPLIT)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    padded = {"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    with torch.no_grad():
        for arguments in ({}, padded):
            assert torch.equal(split(ids, **arguments).logits, model(ids, **arguments).logits)
        options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 2}
        assert torch.equal(split.generate(ids[:1], **options), model.generate(ids[:1], **options))


def test_split_attention_is_not_written_into_a_saved_model(tmp_path):
    model = tiny_model()
    set_attention(model, SPLIT)
    model.save_pretrained(tmp_path)
    assert SPLIT not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("window", [3, 9, 10, 11, 100], ids="window {}".format)
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_shorter_and_longer_than_the_prefix_reach_as_far_as_in_rows_of_one_answer(family, window):
    model = tiny_model(family=family, sliding_window=window).eval()
    plain = ConcatenatedLayout(head="all")
    with torch.no_grad():
        expected = plain.run(model, plain.lay_out(EXAMPLES, score_prompt=True)).token_logps_N
        for attention in ("sdpa", SPLIT):
            set_attention(model, attention)
            for layout in (SharedPrefixLayout(), SharedPrefixLayout(row_tokens=100)):
                actual = layout.run(model, layout.lay_out(EXAMPLES, score_prompt=True)).token_logps_N
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_sliding_and_full_layers_gets_a_mask_for_each():
    model = tiny_model(family="gemma3")
    batch = SharedPrefixLayout().lay_out(EXAMPLES, score_prompt=False)
    masks = attention_mask(model, batch)
    assert masks.keys() == {"full_attention", "sliding_attention"}
    assert masks["sliding_attention"].sum() < masks["full_attention"].sum()


def test_attention_that_takes_no_mask_is_refused_by_name():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="attn_implementation 'flash_attention_2'"):
        attention_mask(model, PACKED)
    other = tiny_model(family="qwen3")
    other.config = copy.deepcopy(other.config)
    other.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match="layer_types 'linear_attention'"):
        attention_mask(other, PACKED)


def test_setting_the_attention_that_a_model_has_leaves_it():
    model = tiny_model()
    set_attention(model, "sdpa")
    assert attention_of(model) == "sdpa"


def test_layers_that_nobody_can_tell_apart_keep_their_attention() -> None:
    model, _ = tiny_seeing("llava")
    language = model.model.language_model
    language.config = copy.deepcopy(language.config)
    with pytest.raises(UserError, match="LlavaForConditionalGeneration has no layers of its text config"):
        set_attention(model, "eager")
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
