"""Work out how much memory a training worker will take from the shape of its student; nothing is loaded or run.

Left out: the CUDA context and its libraries (0.5 to 1 GB), NCCL's buffers, fragmentation, the validation (no gradients,
but its own batch size), layers that are no dense transformer (experts, convolutions), dropout, and what a compiled
attention kernel keeps for itself. A tenth of the card should stay free for them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mint_ray.layouts.head import CHUNK_BYTES
from mint_ray.students.adapters import lay_adapter, train_parts
from mint_ray.students.config import Student
from mint_ray.trainers.config import Arguments, TrainResources

FLOAT32, BFLOAT16 = 4, 2
LIVE_PARAMETERS = 1_000_000_000
"""Weights that ZeRO-3 holds whole at a time: DeepSpeed's default of `stage3_max_live_parameters`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """The transformer layers of a model, all of one size; widths in numbers per token."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    query_size: int
    """Heads times their width."""
    key_size: int
    """The same for keys (and values), of which there may be fewer heads."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What of a student its memory depends on."""

    parameters: int
    """Weights of the base model, embeddings included."""
    trained: int
    """Weights that get a gradient: those of the adapter, or all."""
    vocabulary: int
    text: Stack
    vision: Stack | None = None
    """Layers that look at the image, if they hand their tokens to cross-attention."""
    vision_is_trained: bool = False
    image_tokens: int = 0
    """Tokens of one record's image."""
    cross_layers: int = 0
    """Layers of the text that look at the image's tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one worker's device at the peak of a training step, and in the memory of its machine."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass, and a layer's own gradients."""
    head: int
    """Logits held at a time, and what their gradient takes."""
    buffers: int
    """What DDP or ZeRO need to exchange gradients and weights, and to step."""
    start: int
    """All weights at once: what an engine holds before ZeRO-3 has given each worker its part."""
    host: int
    """The student as it is loaded, and what is offloaded; the rest of the process is left out."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.head, self.buffers)
        return max(self.start, sum(parts))


def shape_of(model_config: Any, student: Student) -> Shape:
    """The shape of `student`, counted on a model without memory that is built from its `config.json`."""
    vision_config = getattr(model_config, "vision_config", None)
    family = AutoModelForCausalLM if vision_config is None else AutoModelForImageTextToText
    with torch.device("meta"):
        model = family.from_config(model_config)
        parameters = model.num_parameters()
        if student.lora_rank is not None:
            model = lay_adapter(model, student, sees=vision_config is not None, low_cpu_mem_usage=True)
        elif vision_config is not None:
            train_parts(model, student)
    trained = {name: weight.numel() for name, weight in model.named_parameters() if weight.requires_grad}
    text_config = model_config.get_text_config()
    shape = Shape(
        parameters=parameters,
        trained=sum(trained.values()),
        vocabulary=text_config.vocab_size,
        text=_stack(text_config),
    )
    crossed = getattr(text_config, "cross_attention_layers", None)
    if vision_config is None or not crossed:
        # other vision students write their image's tokens into the row, where max_length counts them
        return shape
    vision = _stack(vision_config)
    return dataclasses.replace(
        shape,
        vision=dataclasses.replace(vision, layers=vision.layers + getattr(vision_config, "num_global_layers", 0)),
        vision_is_trained=any("vision" in name for name in trained),
        image_tokens=((vision_config.image_size // vision_config.patch_size) ** 2 + 1) * vision_config.max_num_tiles,
        cross_layers=len(crossed),
    )


def estimate(
    shape: Shape, student: Student, config: Arguments, resources: TrainResources, *, record_tokens: int
) -> Memory:
    """The memory of one worker, when the fewest workers are there and every record has `record_tokens` tokens.

    `record_tokens` counts a prompt and all its completions, which share a row.

    Weights, gradients and AdamW: 2 + 2 + 12 bytes per weight in mixed precision, of which ZeRO shards 12, 14 or 16 over
    the workers (arXiv 1910.02054, section 3), here for the trained weights alone. Activations: the tensors that a
    decoder layer keeps, listed as in arXiv 2205.05198, section 4, for a layer with RMSNorm, rotary positions, a gated
    feed-forward and an attention kernel that keeps no scores.
    """
    engine = _Engine.of(shape, student, config, resources)
    workers, trained = resources.least_and_most_workers[0], shape.trained
    stage, offload = resources.zero_stage, resources.offload
    shards = {0: (1, 1, 1), None: (1, 1, 1), 1: (1, 1, workers), 2: (1, workers, workers), 3: (workers,) * 3}
    weight_shards, gradient_shards, moment_shards = shards[stage]
    whole = shape.parameters * engine.weight + (trained * engine.adapter if student.lora_rank is not None else 0)
    gradients = trained * engine.trained // gradient_shards
    optimizer = trained * engine.moments // moment_shards
    # DeepSpeed's AdamW steps on float32 copies of the gradients
    stepping = 0 if stage is None or engine.moments < 3 * FLOAT32 else FLOAT32 * trained // moment_shards
    # ZeRO exchanges gradients by way of two buckets, DDP by way of a second copy of them all
    buckets, copy = 2 * shape.text.hidden_size**2 * engine.weight, gradients if workers > 1 else 0
    exchange = buckets if stage else copy
    live = min(shape.parameters, LIVE_PARAMETERS) * engine.weight if stage == 3 else 0
    loaded = shape.parameters * (BFLOAT16 if student.dtype == "bfloat16" else FLOAT32)
    offloaded = 0
    if offload != "none":
        offloaded, optimizer, stepping = optimizer + stepping, 0, 0
        gradients = gradients if stage == 1 else 0
    if offload == "parameters":
        offloaded += whole // weight_shards
    return Memory(
        weights=(0 if offload == "parameters" else whole // weight_shards) + engine.copies,
        gradients=gradients,
        optimizer=optimizer,
        activations=_activations(shape, engine, config, resources, record_tokens),
        head=_head(shape, engine, config, resources),
        buffers=exchange + stepping + live,
        start=whole if stage == 3 else 0,
        host=loaded + offloaded,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Engine:
    """Bytes of one number, by what it is."""

    weight: int
    adapter: int
    trained: int
    compute: int
    moments: int
    """AdamW's two moments, and the float32 copy of a weight where DeepSpeed keeps one."""
    casts: bool
    """Whether a layer's inputs are turned into another format, which makes a copy for each linear map."""
    copies: int
    """bfloat16 copies of float32 weights, which autocast makes and the backward pass needs, in all."""
    full: bool

    @classmethod
    def of(cls, shape: Shape, student: Student, config: Arguments, resources: TrainResources) -> _Engine:
        full = student.lora_rank is None
        if resources.zero_stage is not None:
            # the engine turns every weight into bfloat16, or leaves them as they are
            size = BFLOAT16 if config.bf16 or student.dtype == "bfloat16" else FLOAT32
            has_copy = config.bf16 or resources.zero_stage > 0
            return cls(
                weight=size, adapter=size, trained=size, compute=size, casts=False, copies=0, full=full,
                moments=(3 if has_copy else 2) * FLOAT32,
            )  # fmt: skip
        weight = BFLOAT16 if student.dtype == "bfloat16" else FLOAT32
        compute = BFLOAT16 if config.bf16 else weight
        # PEFT keeps adapters in float32 beside a bfloat16 base
        trained = weight if full else FLOAT32
        copied = shape.parameters if weight != compute else 0
        copied += shape.trained if config.bf16 and not full else 0
        return cls(
            weight=weight, adapter=FLOAT32, trained=trained, compute=compute, full=full, moments=2 * trained,
            casts=weight != compute or trained != compute, copies=copied * BFLOAT16,
        )  # fmt: skip


def _stack(config: Any) -> Stack:
    heads = getattr(config, "num_attention_heads", None) or config.attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Stack(
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=heads,
        query_size=heads * width,
        key_size=(getattr(config, "num_key_value_heads", None) or heads) * width,
    )


def _rows(config: Arguments, resources: TrainResources, record_tokens: int) -> tuple[int, int]:
    """Rows and tokens per row of one forward pass in training."""
    share = math.ceil(config.train_batch_size / resources.least_and_most_workers[0])
    records = min(resources.per_device_train_batch_size, share)
    if config.kind == "trl":
        return 2 * records, config.max_length
    together = max(1, (resources.row_tokens or 0) // record_tokens)
    return math.ceil(records / together), min(together, records) * record_tokens


def _activations(
    shape: Shape, engine: _Engine, config: Arguments, resources: TrainResources, record_tokens: int
) -> int:
    rows, width = _rows(config, resources, record_tokens)
    text, compute = shape.text, engine.compute
    masked = resources.attn_implementation != "flex_attention"
    per_layer = rows * width * _kept(text, engine, keys=width if masked else 0, repeats=masked)
    if resources.attn_implementation == "eager":
        # what every head attends to, in float32 as the softmax leaves it and as the product takes it
        per_layer += rows * width * width * text.heads * (FLOAT32 + compute)
    # the largest gradients at a time: of the gated product and of both its factors
    passing = rows * width * compute * 3 * text.intermediate_size
    if resources.gradient_checkpointing:
        boundary = rows * width * text.hidden_size * engine.weight
        kept = text.layers * boundary + per_layer
    else:
        kept = text.layers * per_layer
    last_norm = rows * width * text.hidden_size * (FLOAT32 + compute)
    return kept + passing + last_norm + _image_activations(shape, engine, config, resources, rows, width)


def _kept(stack: Stack, engine: _Engine, *, keys: int, repeats: bool) -> int:
    """Bytes that one layer keeps of one token; `keys` is the width of an additive mask, 0 where there is none."""
    hidden, inner, query, compute = stack.hidden_size, stack.intermediate_size, stack.query_size, engine.compute
    # RMSNorm squares in float32; where its own weight learns it keeps its result too
    norms = 2 * hidden * (FLOAT32 + (engine.weight if engine.full else 0))
    inputs = compute * ((5 * hidden + query) if engine.casts else 2 * hidden)
    # queries and the result; keys and values, repeated for every head unless the kernel does that itself; log-sum-exp
    attention = compute * 2 * (query + (query if repeats else stack.key_size)) + FLOAT32 * stack.heads
    # a boolean mask is turned into an additive one in every layer (PyTorch's scaled_dot_product_attention)
    mask = compute * keys
    # gate, its SiLU, up, and their product
    return norms + inputs + attention + mask + 4 * compute * inner


def _image_activations(
    shape: Shape, engine: _Engine, config: Arguments, resources: TrainResources, rows: int, width: int
) -> int:
    if shape.vision is None:
        return 0
    text, vision, compute = shape.text, shape.vision, engine.compute
    tokens = rows * shape.image_tokens
    # LayerNorm's inputs, queries, keys, values and their result, GELU's input; and the inputs of what is trained
    per_token = 2 * vision.hidden_size + 4 * vision.query_size + vision.intermediate_size
    per_token += 2 * vision.hidden_size + vision.intermediate_size if shape.vision_is_trained else 0
    # one that rests keeps nothing for a backward pass (`students.parts.rest`), and holds a layer at a time
    tower = tokens * compute * per_token * (vision.layers if shape.vision_is_trained else 1)
    tower += rows * compute * shape.image_tokens**2
    # keys and values of the image, normalised and repeated, and the mask of text against image
    crossing = tokens * (compute * (2 * text.query_size + 3 * text.key_size) + FLOAT32 * text.key_size)
    crossing += tokens * compute * text.hidden_size * (2 if engine.casts else 0)
    crossing += rows * width * compute * shape.image_tokens
    at_a_time = 1 if resources.gradient_checkpointing else shape.cross_layers
    return tower + tokens * compute * text.hidden_size + at_a_time * crossing


def _head(shape: Shape, engine: _Engine, config: Arguments, resources: TrainResources) -> int:
    if config.kind == "trl":
        rows, width = _rows(config, resources, 0)
        # every logit, once more in float32, its log-softmax and its gradient
        return rows * width * shape.vocabulary * (engine.compute + 3 * FLOAT32)
    if not engine.full:
        # a chunk of logits in float32, and in the model's own format where that is another
        return CHUNK_BYTES + (CHUNK_BYTES // 2 if engine.compute == BFLOAT16 else 0)
    # logits, their float32 form, and the gradients of both; and the gradient of the head's weight by one chunk
    return 4 * CHUNK_BYTES + shape.vocabulary * shape.text.hidden_size * engine.compute
