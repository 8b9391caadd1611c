from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from mint_ray.layouts.head import chunked_logps
from mint_ray.layouts.images import inner_model
from mint_ray.students.adapters import lay_adapter, rest
from mint_ray.students.config import Part, Student
from mint_ray.trainers.config import Arguments, TrainResources
from mint_ray.trainers.memory import Shape, Stack, estimate, shape_of
from tests.llamas import LLAMAS, PARAMETERS
from tests.tiny import tiny_model


def make_student(**changes: Any) -> Student:
    return Student(**{"model_id": "llama", "dtype": "bfloat16"} | changes)


def with_adapter(model: nn.Module, student: Student, **more: Any) -> nn.Module:
    sees = hasattr(model.config, "vision_config")
    adapted: nn.Module = lay_adapter(model, student, sees=sees, **more)
    return adapted


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# counts


@pytest.mark.parametrize("name", LLAMAS)
def test_weights_are_as_many_as_the_hub_counts(name: str) -> None:
    shape = shape_of(LLAMAS[name], make_student(lora_rank=None, lora_parts=("language", "vision")))
    assert shape.parameters == PARAMETERS[name]
    assert shape.trained == PARAMETERS[name]


@pytest.mark.parametrize("name", ["1b", "3b", "8b"])
def test_an_adapter_on_all_linear_layers_has_rank_times_inputs_plus_outputs(name: str) -> None:
    config, rank = LLAMAS[name], 16
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    maps = [
        (hidden, query),
        (hidden, key),
        (hidden, key),
        (query, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
    expected = config.num_hidden_layers * sum(rank * (inputs + outputs) for inputs, outputs in maps)
    assert shape_of(config, make_student(lora_rank=rank)).trained == expected


def test_a_tower_that_the_adapter_leaves_alone_is_not_trained() -> None:
    both = shape_of(LLAMAS["11b_vision"], make_student(lora_parts=("language", "vision")))
    text = shape_of(LLAMAS["11b_vision"], make_student())
    assert (both.vision_is_trained, text.vision_is_trained) == (True, False)
    assert text.trained < both.trained
    # four tiles of 40 x 40 patches, each with a token for itself
    assert text.image_tokens == 4 * 1601


# optimiser state and what ZeRO makes of it


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_moments_are_those_of_a_real_adamw(adapter: bool, dtype: str) -> None:
    student = make_student(dtype=dtype, lora_rank=4 if adapter else None)
    model: nn.Module = tiny_model().to(getattr(torch, dtype))
    shape = shape_of(model.config, student)
    if adapter:
        model = with_adapter(model, student)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert shape.trained == sum(weight.numel() for weight in trained)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    state = sum(value.nbytes for entry in optimizer.state.values() for name, value in entry.items() if name != "step")
    memory = estimate(shape, student, Arguments(), TrainResources(), record_tokens=8)
    assert memory.optimizer == state
    assert memory.gradients == sum(weight.grad.nbytes for weight in trained)
    assert memory.weights == sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_model_states_are_those_of_the_paper(stage: int, gigabytes: float) -> None:
    # arXiv 1910.02054, figure 1: 7.5 billion weights, mixed precision, AdamW, 64 workers
    shape = Shape(
        parameters=7_500_000_000, trained=7_500_000_000, vocabulary=1,
        text=Stack(layers=1, hidden_size=1, intermediate_size=1, heads=1, query_size=1, key_size=1),
    )  # fmt: skip
    resources = TrainResources(num_workers=64, zero_stage=stage)
    memory = estimate(shape, make_student(lora_rank=None), Arguments(bf16=True), resources, record_tokens=1)
    assert (memory.weights + memory.gradients + memory.optimizer) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_what_is_offloaded_moves_to_the_machine() -> None:
    student = make_student(lora_rank=None)
    shape = shape_of(LLAMAS["1b"], student)

    def of(offload: str) -> Any:
        resources = TrainResources(num_workers=4, zero_stage=3, offload=offload)
        return estimate(shape, student, Arguments(bf16=True), resources, record_tokens=1024)

    kept, optimizer, parameters = of("none"), of("optimizer"), of("parameters")
    assert kept.optimizer == 12 * shape.trained // 4
    assert optimizer.optimizer == parameters.optimizer == parameters.weights == 0
    assert optimizer.weights == kept.weights
    # AdamW's state and float32 gradients; and the weights themselves
    assert optimizer.host - kept.host == pytest.approx(16 * shape.trained / 4)
    assert parameters.host - optimizer.host == pytest.approx(2 * shape.parameters / 4)
    # before the engine deals them out, each worker has all weights
    assert parameters.start == 2 * shape.parameters
    assert parameters.total >= parameters.start


# activations


@pytest.mark.parametrize(
    ("rank", "dtype", "bf16"),
    [
        (None, "float32", False),
        (None, "float32", True),
        (8, "float32", False),
        (8, "float32", True),
        (8, "bfloat16", True),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_forward_pass_keeps_what_was_said(rank: int | None, dtype: str, bf16: bool, checkpointing: bool) -> None:
    width, records, layers = 96, 2, 4
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=704, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    student = make_student(lora_rank=rank, dtype=dtype)
    model: nn.Module = LlamaForCausalLM(config).to(getattr(torch, dtype))
    if rank is not None:
        model = with_adapter(model, student)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model(**a_batch(records, width, "cpu"))
    measured = sum(storage.nbytes() for storage in kept.values())
    resources = TrainResources(per_device_train_batch_size=records, gradient_checkpointing=checkpointing)
    memory = estimate(shape_of(config, student), student, Arguments(bf16=bf16), resources, record_tokens=width)
    compute = 2 if bf16 else 4
    passing = 3 * compute * records * width * config.intermediate_size
    said = memory.activations - passing
    if checkpointing:
        # the one layer that is worked out again is not kept by the forward pass
        all_layers = estimate(
            shape_of(config, student), student, Arguments(bf16=bf16), TrainResources(per_device_train_batch_size=records),
            record_tokens=width,
        ).activations - passing  # fmt: skip
        said -= all_layers // layers
        assert measured == pytest.approx(said, rel=0.3)
    else:
        copies = memory.weights - sum(weight.nbytes for weight in model.parameters())
        assert measured == pytest.approx(said + copies, rel=0.06)


def a_batch(records: int, width: int, device: str) -> dict[str, Any]:
    """What our layout hands to a model: a 4-D mask, positions, and which logits are wanted."""
    return {
        "input_ids": torch.zeros((records, width), dtype=torch.long, device=device),
        "attention_mask": torch.ones((records, 1, width, width), dtype=torch.bool, device=device),
        "position_ids": torch.zeros((records, width), dtype=torch.long, device=device),
        "use_cache": False,
        "logits_to_keep": 1,
    }


class Peak(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(*(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)))
        return out

    def see(self, *tensors: Tensor) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage not in self._seen:
                self._seen[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.most = max(self.most, self.live)

    def _gone(self, size: int) -> None:
        self.live -= size


class Efficient(torch.autograd.Function):
    """What an attention kernel without scores takes and keeps (PyTorch's memory-efficient one, on CUDA); no numbers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, width, size = query.shape
        out = query.new_empty(batch, width, heads, size).transpose(1, 2)
        additive = [] if mask is None else [mask if mask.dtype != torch.bool else mask.to(query.dtype)]
        ctx.save_for_backward(
            query, key, value, out, query.new_empty(batch, heads, width, dtype=torch.float32), *additive
        )
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


@contextmanager
def efficient_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        out: Tensor = Efficient.apply(query, key, value, attn_mask)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", attend)
        yield


def peak_of_a_step(
    config: Any, student: Student, resources: TrainResources, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> int:
    """Most bytes beside the weights in a forward and backward pass in bfloat16, on tensors without memory."""
    family = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        model = family.from_config(config)
        if student.lora_rank is not None:
            model = with_adapter(model, student, low_cpu_mem_usage=True)
        # as DeepSpeed's engine does
        model.to(torch.bfloat16)
    model.train()
    if hasattr(config, "vision_config"):
        rest(inner_model(model))
    if resources.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    peak = Peak()
    peak.see(*model.parameters(), *model.buffers())
    weights = peak.live
    with efficient_attention(monkeypatch), peak:
        model(**inputs).logits.float().sum().backward()
    return peak.most - weights


@pytest.mark.parametrize(
    ("name", "rank", "checkpointing"),
    [("1b", 16, False), ("1b", 16, True), ("1b", None, True), ("8b", 16, False), ("8b", 16, True)],
)
def test_a_whole_step_of_a_real_shape_stays_within_the_estimate(
    name: str, rank: int | None, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, width = 4, 1024
    student = make_student(lora_rank=rank)
    resources = TrainResources(zero_stage=1, per_device_train_batch_size=records, gradient_checkpointing=checkpointing)
    peak = peak_of_a_step(LLAMAS[name], student, resources, a_batch(records, width, "meta"), monkeypatch)
    shape = shape_of(LLAMAS[name], student)
    memory = estimate(shape, student, Arguments(bf16=True), resources, record_tokens=width)
    # a tied embedding gets its gradient in two parts, which `head` counts
    second = 2 * shape.vocabulary * shape.text.hidden_size if rank is None else 0
    said = memory.gradients + memory.activations + second
    assert peak <= 1.01 * said
    assert said <= 1.15 * peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora_parts", [("language",), ("language", "vision")])
def test_a_step_with_images_stays_within_the_estimate(
    lora_parts: tuple[Part, ...], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, width = 2, 512
    config, student = LLAMAS["11b_vision"], make_student(lora_parts=lora_parts)
    resources = TrainResources(zero_stage=1, per_device_train_batch_size=records, gradient_checkpointing=checkpointing)
    tiles = {
        "pixel_values": torch.zeros((records, 1, 4, 3, 560, 560), dtype=torch.bfloat16, device="meta"),
        "aspect_ratio_ids": torch.ones((records, 1), dtype=torch.long, device="meta"),
        "aspect_ratio_mask": torch.ones((records, 1, 4), dtype=torch.long, device="meta"),
        "cross_attention_mask": torch.ones((records, width, 1, 4), dtype=torch.long, device="meta"),
    }
    peak = peak_of_a_step(config, student, resources, a_batch(records, width, "meta") | tiles, monkeypatch)
    memory = estimate(shape_of(config, student), student, Arguments(bf16=True), resources, record_tokens=width)
    assert memory.gradients + memory.activations == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_takes_what_was_said_whatever_the_rows(dtype: str, trained: bool) -> None:
    hidden, vocabulary = 64, 32_000
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    student = make_student(lora_rank=None if trained else 4, dtype=dtype)
    said = estimate(shape_of(config, student), student, Arguments(), TrainResources(), record_tokens=8).head
    head = nn.Linear(hidden, vocabulary, bias=False, dtype=getattr(torch, dtype)).requires_grad_(trained)
    for rows in (2500, 5000):
        rows_MH = torch.zeros(rows, hidden, dtype=head.weight.dtype, requires_grad=True)
        index_N = torch.arange(rows)
        peak = Peak()
        peak.see(rows_MH, head.weight, index_N)
        before = peak.live
        with peak:
            chunked_logps(head, head.forward, rows_MH, index_N, index_N).sum().backward()
        head.weight.grad = None
        # what grows with the rows is of their width, not the vocabulary's, and the weight's gradient is no head
        assert peak.most - before - (head.weight.nbytes if trained else 0) == pytest.approx(said, rel=0.06)


# rows


def activations(**resources: Any) -> int:
    student = make_student()
    shape = shape_of(tiny_model().config, student)
    config = Arguments(train_batch_size=resources.pop("train_batch_size", 64), bf16=True)
    return estimate(shape, student, config, TrainResources(**resources), record_tokens=100).activations


def test_activations_grow_with_the_records_that_pass_together_and_no_further() -> None:
    assert activations(per_device_train_batch_size=8) == 2 * activations(per_device_train_batch_size=4)
    # a step of four records has no eight to pass together
    assert activations(per_device_train_batch_size=8, train_batch_size=4) == activations(per_device_train_batch_size=4)
    assert activations(per_device_train_batch_size=8, train_batch_size=8, num_workers=(2, 8)) == activations(
        per_device_train_batch_size=4
    )


def test_packing_widens_the_mask_and_a_kernel_without_one_takes_less() -> None:
    rows = {"per_device_train_batch_size": 8}
    assert activations(**rows, row_tokens=400) > activations(**rows)
    flexible = {"attn_implementation": "flex_attention", **rows}
    assert activations(**flexible, row_tokens=400) == activations(**flexible) < activations(**rows)
    assert activations(attn_implementation="eager", **rows) > activations(**rows)
