import copy

import pytest
import torch

from mint_ray.config.loader import UserError
from mint_ray.layouts import Example
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.masks import (
    PADDING,
    SPLIT_SDPA,
    attention_mask,
    dense_mask,
    get_attn_implementation,
    set_attn_implementation,
    shared_prefix_mask_mod,
)
from mint_ray.layouts.shared_prefix import SharedPrefixLayout
from tests.tiny import tiny_model
from tests.vision_students import tiny_vlm

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


def test_a_completion_attends_to_its_own_prefix_and_itself_only():
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
    assert dense_mask(PACKED, shared_prefix_mask_mod(PACKED))[0, 0].int().tolist() == expected


def test_a_window_is_measured_in_positions():
    # the token of the second completion has position 2, in column 4
    assert dense_mask(PACKED, shared_prefix_mask_mod(PACKED, window=2))[0, 0, :5].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 1, 0, 0, 0],
    ]


def test_a_mask_of_some_queries_equals_their_rows_of_the_full_mask():
    mask_mod = shared_prefix_mask_mod(PACKED)
    assert torch.equal(dense_mask(PACKED, mask_mod, torch.tensor([2, 4])), dense_mask(PACKED, mask_mod)[:, :, [2, 4]])


@pytest.mark.parametrize("max_tokens_per_row", [None, 20, 100])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", SPLIT_SDPA])
def test_every_attention_gives_the_log_probabilities_of_separate_rows(attention, max_tokens_per_row):
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
        set_attn_implementation(model, attention)
        layout = SharedPrefixLayout(max_tokens_per_row=max_tokens_per_row)
        # flex attention is compiled for GPUs; uncompiled it tests the mask all the same
        with torch.compiler.set_stance("force_eager"):
            actual = layout.compute_logps(model, layout.collate(EXAMPLES, score_prompt=True))
    torch.testing.assert_close(actual.token_logps, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.prompt_token_logps, torch.cat(expected_prompt), rtol=1e-5, atol=1e-5)
    assert actual.counts.tolist() == [3, 2, 4, 2, 1, 3]
    assert actual.prompt_counts.tolist() == [2, 0, 8]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention has no backward pass on CPUs")
def test_flex_attention_gives_the_gradients_of_sdpa_on_a_gpu():
    gradients = {}
    for attention in ("sdpa", "flex_attention"):
        model = tiny_model(head_dim=16).cuda()
        set_attn_implementation(model, attention)
        for max_tokens_per_row in (None, 20, 100):  # batches of different shapes
            layout = SharedPrefixLayout(max_tokens_per_row=max_tokens_per_row)
            batch = {name: tensor.cuda() for name, tensor in layout.collate(EXAMPLES, score_prompt=True).items()}
            model.zero_grad()
            logps = layout.compute_logps(model, batch)
            (logps.means.sum() + logps.prompt_sums.sum()).backward()
            found = torch.cat([weight.grad.flatten() for weight in model.parameters()])
            expected = gradients.setdefault(max_tokens_per_row, found)
            assert (found - expected).norm() < 1e-4 * expected.norm()


def test_split_attention_equals_sdpa_for_masks_of_transformers():
    model, split = tiny_model().eval(), tiny_model().eval()
    set_attn_implementation(split, SPLIT_SDPA)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    padded = {"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    with torch.no_grad():
        for arguments in ({}, padded):
            assert torch.equal(split(ids, **arguments).logits, model(ids, **arguments).logits)
        options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 2}
        assert torch.equal(split.generate(ids[:1], **options), model.generate(ids[:1], **options))


def test_split_attention_is_not_saved_with_a_model(tmp_path):
    model = tiny_model()
    set_attn_implementation(model, SPLIT_SDPA)
    model.save_pretrained(tmp_path)
    assert SPLIT_SDPA not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("window", [3, 9, 10, 11, 100], ids="window {}".format)
@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_shorter_and_longer_than_the_prefix_span_as_many_tokens_as_in_separate_rows(family, window):
    model = tiny_model(family=family, sliding_window=window).eval()
    plain = ConcatenatedLayout(logits="all")
    with torch.no_grad():
        expected = plain.compute_logps(model, plain.collate(EXAMPLES, score_prompt=True)).token_logps
        for attention in ("sdpa", SPLIT_SDPA):
            set_attn_implementation(model, attention)
            for layout in (SharedPrefixLayout(), SharedPrefixLayout(max_tokens_per_row=100)):
                actual = layout.compute_logps(model, layout.collate(EXAMPLES, score_prompt=True)).token_logps
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_model_with_sliding_and_full_layers_gets_a_mask_for_each():
    model = tiny_model(family="gemma3")
    batch = SharedPrefixLayout().collate(EXAMPLES, score_prompt=False)
    masks = attention_mask(model, batch)
    assert masks.keys() == {"full_attention", "sliding_attention"}
    assert masks["sliding_attention"].sum() < masks["full_attention"].sum()


def test_attention_without_custom_masks_raises_an_error_with_its_name():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="attn_implementation 'flash_attention_2'"):
        attention_mask(model, PACKED)
    other = tiny_model(family="qwen3")
    other.config = copy.deepcopy(other.config)
    other.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match="layer_types 'linear_attention'"):
        attention_mask(other, PACKED)


def test_setting_the_current_attention_changes_nothing():
    model = tiny_model()
    set_attn_implementation(model, "sdpa")
    assert get_attn_implementation(model) == "sdpa"


def test_layers_that_cannot_be_identified_keep_their_attention() -> None:
    model, _ = tiny_vlm("llava")
    language = model.model.language_model
    language.config = copy.deepcopy(language.config)
    with pytest.raises(UserError, match="LlavaForConditionalGeneration has no layers of its text config"):
        set_attn_implementation(model, "eager")
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
