import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mint_ray.config.loader import UserError
from mint_ray.layouts import Example
from mint_ray.layouts import lm_head as lm_head_module
from mint_ray.layouts.lm_head import chunked_logps
from mint_ray.layouts.masks import SPLIT_SDPA, set_attn_implementation
from mint_ray.layouts.shared_prefix import SharedPrefixLayout
from tests.layouts.reference import gradients, largest_error
from tests.tiny import tiny_model

EXAMPLES = [
    Example(record_id="a", prompt_ids=[5, 6, 7], completions=[[8, 9, 10], [8, 9], [8, 11, 12, 13]], pairs=[(0, 1)]),
    Example(record_id="b", prompt_ids=[30] * 9, completions=[[31], [32, 33, 34]], pairs=[(1, 0)]),
]
CHUNKED, PLAIN = SharedPrefixLayout(), SharedPrefixLayout(logits="all")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=[1, 3, 1000], ids="chunks of {} rows".format)
def rows_per_chunk(request, monkeypatch):
    monkeypatch.setattr(lm_head_module, "LOGITS_CHUNK_BYTES", request.param * 400 * 4)


def linear(*, bias, trained, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Linear(16, 400, bias=bias).to(dtype).requires_grad_(trained)


def scored_rows(dtype=torch.float64):
    """Return ten rows, and 14 tokens in arbitrary order, several of them predicted by one row."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(10, 16, generator=generator).to(dtype).requires_grad_()
    source = torch.tensor([9, 0, 0, 0, 5, 1, 2, 3, 4, 6, 7, 8, 8, 2])
    return rows, source, torch.randint(400, (14,), generator=generator)


def by_hand(head, rows, source, target):
    return head(rows).log_softmax(-1)[source, target]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_chunked_log_probabilities_equal_log_softmax_with_its_gradients(rows_per_chunk, bias, trained):
    results = []
    for function in (by_hand, lambda head, *rest: chunked_logps(head, head.forward, *rest)):
        head = linear(bias=bias, trained=trained)
        rows, source, target = scored_rows()
        logps = function(head, rows, source, target)
        (logps * torch.arange(1.0, 15)).sum().backward()
        results.append([logps, rows.grad, *(weight.grad for weight in head.parameters() if trained)])
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_large_logits_neither_overflow_nor_underflow(rows_per_chunk):
    head = linear(bias=False, trained=False, dtype=torch.float32)
    rows, source, target = scored_rows(torch.float32)
    far = 1000 * rows.detach()
    expected = by_hand(linear(bias=False, trained=False), far.double(), source, target)
    actual = chunked_logps(head, head.forward, far, source, target).double()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-3)


def run(layout, model):
    model.zero_grad()
    logps = layout.compute_logps(model, layout.collate(EXAMPLES, score_prompt=True))
    (logps.means.sum() + logps.prompt_sums.sum()).backward()
    return logps, gradients(model)


def lora(model, **options):
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return adapted


def checkpointed():
    model = tiny_model().train()
    set_attn_implementation(model, SPLIT_SDPA)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


MODELS = {
    "every weight trained": tiny_model,
    "tied embeddings": lambda: tiny_model(tie_word_embeddings=True),
    "LoRA": lambda: lora(tiny_model(), target_modules="all-linear"),
    "LoRA on the head": lambda: lora(tiny_model(), target_modules=["lm_head", "q_proj"]),
    "head in modules_to_save": lambda: lora(tiny_model(), target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "gradient checkpointing": checkpointed,
}


@pytest.mark.parametrize("kind", MODELS)
def test_chunked_logits_give_the_results_of_all_logits(rows_per_chunk, kind):
    expected, expected_gradients = run(PLAIN, MODELS[kind]())
    actual, actual_gradients = run(CHUNKED, MODELS[kind]())
    torch.testing.assert_close(actual.token_logps, expected.token_logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.prompt_token_logps, expected.prompt_token_logps, rtol=1e-5, atol=1e-5)
    assert largest_error(actual_gradients, expected_gradients) < 1e-5


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_under_autocast_log_probabilities_are_float32(frozen):
    def model():
        made = tiny_model()
        made.lm_head.requires_grad_(not frozen)
        return made

    _, expected_gradients = run(PLAIN, model())
    with torch.autocast("cpu", torch.bfloat16):
        plain, plain_gradients = run(PLAIN, model())
        actual, actual_gradients = run(CHUNKED, model())
    assert actual.token_logps.dtype == torch.float32
    # from the same rounded logits
    torch.testing.assert_close(actual.token_logps, plain.token_logps, rtol=1e-5, atol=1e-5)
    assert largest_error(actual_gradients, expected_gradients) < 2 * largest_error(plain_gradients, expected_gradients)


def test_a_wrapped_model_runs_the_hooks_of_its_wrapper(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        _, expected = run(CHUNKED, tiny_model())
        for find_unused in (False, True):  # with True, DDP applies a function to the output
            wrapped = nn.parallel.DistributedDataParallel(tiny_model(), find_unused_parameters=find_unused)
            hooked = []
            wrapped.register_comm_hook(hooked, count)
            _, actual = run(CHUNKED, wrapped)
            assert hooked
            assert largest_error({name.removeprefix("module."): g for name, g in actual.items()}, expected) < 1e-6
    finally:
        torch.distributed.destroy_process_group()


def count(buckets, bucket):
    buckets.append(bucket)
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_the_hooks_of_the_head_run_once_for_all_chunks(monkeypatch):
    # DeepSpeed gathers a sharded weight in the first and frees it in the second
    monkeypatch.setattr(lm_head_module, "LOGITS_CHUNK_BYTES", 400 * 4)
    model, calls = tiny_model(), []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.lm_head.register_forward_hook(lambda *_: calls.append("behind"))
    run(CHUNKED, model)
    assert calls == ["before", "behind"]


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_logits_changed_after_the_head_raise_an_error_if_chunked_and_work_if_selected(family):
    model = tiny_model(family=family)
    with pytest.raises(UserError, match="changes its logits after its output embeddings"):
        run(CHUNKED, model)
    assert "forward" not in vars(model.lm_head)
    expected, expected_gradients = run(PLAIN, model)
    actual, actual_gradients = run(SharedPrefixLayout(logits="selected"), model)
    torch.testing.assert_close(actual.token_logps, expected.token_logps, rtol=1e-5, atol=1e-5)
    assert largest_error(actual_gradients, expected_gradients) < 1e-5


def test_a_model_without_a_linear_head_raises_an_error():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model()
            self.config = self.inner.config

    with pytest.raises(UserError, match="Wrapped: its output embeddings are not a linear layer"):
        run(CHUNKED, Wrapped())


def test_a_replaced_forward_of_the_head_is_called_and_restored():
    model = tiny_model()
    model.lm_head.requires_grad_(False)
    own = model.lm_head.forward
    model.lm_head.forward = mine = lambda hidden: 2 * own(hidden)
    expected, expected_gradients = run(PLAIN, model)
    actual, actual_gradients = run(CHUNKED, model)
    assert model.lm_head.forward is mine
    torch.testing.assert_close(actual.token_logps, expected.token_logps, rtol=1e-5, atol=1e-5)
    assert largest_error(actual_gradients, expected_gradients) < 1e-5


def peak_bytes(function):
    """Return the peak of memory allocated by `function`, including allocations inside kernels."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    allocated = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def chunked(head, rows, source, target):
    return chunked_logps(head, head.forward, rows, source, target)


def loss_peak(logps, vocabulary, tokens, trained):
    """Return the peak of forward and backward, without the gradient of a trained head and the buffer added to it."""
    head = nn.Linear(8, vocabulary, bias=False).requires_grad_(trained)
    rows = torch.randn(tokens, 8, requires_grad=True)
    source, target = torch.arange(tokens), torch.randint(vocabulary, (tokens,))
    peak = peak_bytes(lambda: logps(head, rows, source, target).sum().backward())
    return peak - (2 * head.weight.nbytes if trained else 0)


@pytest.mark.parametrize(("trained", "blocks"), [(False, 1), (True, 4)], ids=["frozen", "trained"])
def test_the_memory_of_the_loss_depends_neither_on_the_vocabulary_nor_on_the_number_of_tokens(
    trained, blocks, monkeypatch
):
    block = 2 * 2**20
    monkeypatch.setattr(lm_head_module, "LOGITS_CHUNK_BYTES", block)
    sizes = [(vocabulary, tokens) for vocabulary in (8_192, 65_536) for tokens in (64, 256)]
    peaks = [loss_peak(chunked, *size, trained) for size in sizes]
    assert max(peaks) < (blocks + 0.25) * block
    # measured in the same way, the plain form grows to several times all its logits
    plain = [loss_peak(by_hand, *size, trained) for size in sizes]
    assert plain[-1] > 65_536 * 256 * 4 > 10 * plain[0]
