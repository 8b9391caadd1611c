"""Estimates are those of real models: counted tensors, saved activations, the state of real optimizers and engines."""

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

from mint_ray.layouts.images import unwrap_model
from mint_ray.layouts.lm_head import chunked_logps
from mint_ray.students.adapters import add_adapter, freeze_vision_tower
from mint_ray.students.config import Component, Student
from mint_ray.trainers.config import TrainerArguments, TrainResources
from mint_ray.trainers.memory import estimate_memory
from mint_ray.trainers.meta_model import shape_from_meta_model
from mint_ray.trainers.model_shape import LayerStack, ModelShape
from tests.llamas import LLAMAS
from tests.tiny import tiny_model


def make_student(**changes: Any) -> Student:
    return Student(**{"model_id": "llama", "dtype": "bfloat16"} | changes)


def with_adapter(model: nn.Module, student: Student, **more: Any) -> nn.Module:
    adapted: nn.Module = add_adapter(model, student, is_vlm=hasattr(model.config, "vision_config"), **more)
    return adapted


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# optimizer state and ZeRO


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_moments_are_those_of_adamw(adapter: bool, dtype: str) -> None:
    student = make_student(dtype=dtype, lora_rank=4 if adapter else None)
    model: nn.Module = tiny_model().to(getattr(torch, dtype))
    shape = shape_from_meta_model(model.config, student)
    if adapter:
        model = with_adapter(model, student)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert shape.num_trainable == sum(weight.numel() for weight in trained)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    state = sum(value.nbytes for entry in optimizer.state.values() for name, value in entry.items() if name != "step")
    memory = estimate_memory(shape, student, TrainerArguments(), TrainResources(), record_tokens=8)
    assert memory.optimizer == state
    assert memory.gradients == sum(weight.grad.nbytes for weight in trained)
    assert memory.weights == sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_model_states_are_those_of_the_paper(stage: int, gigabytes: float) -> None:
    # arXiv 1910.02054, figure 1: 7.5 billion weights, mixed precision, AdamW, 64 workers
    shape = ModelShape(
        num_parameters=7_500_000_000, num_trainable=7_500_000_000, vocab_size=1,
        text=LayerStack(num_layers=1, hidden_size=1, intermediate_size=1, num_heads=1, query_size=1, key_size=1),
    )  # fmt: skip
    resources = TrainResources(num_workers=64, zero_stage=stage)
    memory = estimate_memory(
        shape, make_student(lora_rank=None), TrainerArguments(bf16=True), resources, record_tokens=1
    )
    assert (memory.weights + memory.gradients + memory.optimizer) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_offloaded_state_moves_to_host_memory() -> None:
    student = make_student(lora_rank=None)
    shape = shape_from_meta_model(LLAMAS["1b"], student)

    def of(offload: str) -> Any:
        resources = TrainResources(num_workers=4, zero_stage=3, offload=offload)
        return estimate_memory(shape, student, TrainerArguments(bf16=True), resources, record_tokens=1024)

    kept, optimizer, parameters = of("none"), of("optimizer"), of("parameters")
    assert kept.optimizer == 12 * shape.num_trainable // 4
    assert optimizer.optimizer == parameters.optimizer == parameters.weights == 0
    assert optimizer.weights == kept.weights
    # AdamW's state and float32 gradients; and the weights themselves
    assert optimizer.host - kept.host == pytest.approx(16 * shape.num_trainable / 4)
    assert parameters.host - optimizer.host == pytest.approx(2 * shape.num_parameters / 4)
    # before the engine shards them, each worker has all weights
    assert parameters.initialization == 2 * shape.num_parameters
    assert parameters.total >= parameters.initialization


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
def test_a_forward_pass_saves_as_much_as_estimated(
    rank: int | None, dtype: str, bf16: bool, checkpointing: bool
) -> None:
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
    saved: dict[int, Any] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model(**a_batch(records, width, "cpu"))
    measured = sum(storage.nbytes() for storage in saved.values())
    resources = TrainResources(per_device_train_batch_size=records, gradient_checkpointing=checkpointing)
    memory = estimate_memory(
        shape_from_meta_model(config, student), student, TrainerArguments(bf16=bf16), resources, record_tokens=width
    )
    compute = 2 if bf16 else 4
    layer_gradients = 3 * compute * records * width * config.intermediate_size
    estimated = memory.activations - layer_gradients
    if checkpointing:
        # the forward pass does not save the layer that is recomputed
        all_layers = estimate_memory(
            shape_from_meta_model(config, student), student, TrainerArguments(bf16=bf16), TrainResources(per_device_train_batch_size=records),
            record_tokens=width,
        ).activations - layer_gradients  # fmt: skip
        estimated -= all_layers // layers
        assert measured == pytest.approx(estimated, rel=0.3)
    else:
        copies = memory.weights - sum(weight.nbytes for weight in model.parameters())
        assert measured == pytest.approx(estimated + copies, rel=0.06)


def a_batch(records: int, width: int, device: str) -> dict[str, Any]:
    """Return the arguments of a model in the shared-prefix layout: a 4-D mask, positions, and the logits to keep."""
    return {
        "input_ids": torch.zeros((records, width), dtype=torch.long, device=device),
        "attention_mask": torch.ones((records, 1, width, width), dtype=torch.bool, device=device),
        "position_ids": torch.zeros((records, width), dtype=torch.long, device=device),
        "use_cache": False,
        "logits_to_keep": 1,
    }


class Peak(TorchDispatchMode):
    """Bytes of all live tensors, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._tracked = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.track(*(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)))
        return out

    def track(self, *tensors: Tensor) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage not in self._tracked:
                self._tracked[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.live)

    def _release(self, size: int) -> None:
        self.live -= size


class Efficient(torch.autograd.Function):
    """The memory of an attention kernel that saves no scores (PyTorch's memory-efficient one, on CUDA), without values."""

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
    """Return the peak in addition to the weights of a forward and backward pass in bfloat16, on the meta device."""
    family = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        model = family.from_config(config)
        if student.lora_rank is not None:
            model = with_adapter(model, student, low_cpu_mem_usage=True)
        # like DeepSpeed's engine
        model.to(torch.bfloat16)
    model.train()
    if hasattr(config, "vision_config"):
        freeze_vision_tower(unwrap_model(model))
    if resources.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    peak = Peak()
    peak.track(*model.parameters(), *model.buffers())
    weights = peak.live
    with efficient_attention(monkeypatch), peak:
        model(**inputs).logits.float().sum().backward()
    return peak.peak - weights


@pytest.mark.parametrize(
    ("name", "rank", "checkpointing"),
    [("1b", 16, False), ("1b", 16, True), ("1b", None, True), ("8b", 16, False), ("8b", 16, True)],
)
def test_a_step_of_a_real_shape_stays_within_the_estimate(
    name: str, rank: int | None, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, width = 4, 1024
    student = make_student(lora_rank=rank)
    resources = TrainResources(zero_stage=1, per_device_train_batch_size=records, gradient_checkpointing=checkpointing)
    peak = peak_of_a_step(LLAMAS[name], student, resources, a_batch(records, width, "meta"), monkeypatch)
    shape = shape_from_meta_model(LLAMAS[name], student)
    memory = estimate_memory(shape, student, TrainerArguments(bf16=True), resources, record_tokens=width)
    # a tied embedding gets its gradient in two parts, which `logits` includes
    second = 2 * shape.vocab_size * shape.text.hidden_size if rank is None else 0
    estimated = memory.gradients + memory.activations + second
    assert peak <= 1.01 * estimated
    assert estimated <= 1.15 * peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora_components", [("language",), ("language", "vision")])
def test_a_step_with_images_stays_within_the_estimate(
    lora_components: tuple[Component, ...], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, width = 2, 512
    config, student = LLAMAS["11b_vision"], make_student(lora_components=lora_components)
    resources = TrainResources(zero_stage=1, per_device_train_batch_size=records, gradient_checkpointing=checkpointing)
    tiles = {
        "pixel_values": torch.zeros((records, 1, 4, 3, 560, 560), dtype=torch.bfloat16, device="meta"),
        "aspect_ratio_ids": torch.ones((records, 1), dtype=torch.long, device="meta"),
        "aspect_ratio_mask": torch.ones((records, 1, 4), dtype=torch.long, device="meta"),
        "cross_attention_mask": torch.ones((records, width, 1, 4), dtype=torch.long, device="meta"),
    }
    peak = peak_of_a_step(config, student, resources, a_batch(records, width, "meta") | tiles, monkeypatch)
    memory = estimate_memory(
        shape_from_meta_model(config, student), student, TrainerArguments(bf16=True), resources, record_tokens=width
    )
    assert memory.gradients + memory.activations == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_takes_as_much_as_estimated_for_any_number_of_rows(dtype: str, trained: bool) -> None:
    hidden, vocabulary = 64, 32_000
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    student = make_student(lora_rank=None if trained else 4, dtype=dtype)
    estimated = estimate_memory(
        shape_from_meta_model(config, student), student, TrainerArguments(), TrainResources(), record_tokens=8
    ).logits
    head = nn.Linear(hidden, vocabulary, bias=False, dtype=getattr(torch, dtype)).requires_grad_(trained)
    for rows in (2500, 5000):
        rows_MH = torch.zeros(rows, hidden, dtype=head.weight.dtype, requires_grad=True)
        index_N = torch.arange(rows)
        peak = Peak()
        peak.track(rows_MH, head.weight, index_N)
        before = peak.live
        with peak:
            chunked_logps(head, head.forward, rows_MH, index_N, index_N).sum().backward()
        head.weight.grad = None
        # the gradient of the weight is not part of `logits`
        assert peak.peak - before - (head.weight.nbytes if trained else 0) == pytest.approx(estimated, rel=0.06)


# batches


def activations(**resources: Any) -> int:
    student = make_student()
    shape = shape_from_meta_model(tiny_model().config, student)
    config = TrainerArguments(train_batch_size=resources.pop("train_batch_size", 64), bf16=True)
    return estimate_memory(shape, student, config, TrainResources(**resources), record_tokens=100).activations


def test_activations_grow_with_the_records_of_a_forward_pass() -> None:
    assert activations(per_device_train_batch_size=8) == 2 * activations(per_device_train_batch_size=4)
    # a step of four records has forward passes of four
    assert activations(per_device_train_batch_size=8, train_batch_size=4) == activations(per_device_train_batch_size=4)
    assert activations(per_device_train_batch_size=8, train_batch_size=8, num_workers=(2, 8)) == activations(
        per_device_train_batch_size=4
    )


def test_packing_widens_the_mask_and_a_kernel_without_a_mask_takes_less() -> None:
    rows = {"per_device_train_batch_size": 8}
    assert activations(**rows, max_tokens_per_row=400) > activations(**rows)
    flexible = {"attn_implementation": "flex_attention", **rows}
    assert activations(**flexible, max_tokens_per_row=400) == activations(**flexible) < activations(**rows)
    assert activations(attn_implementation="eager", **rows) > activations(**rows)
