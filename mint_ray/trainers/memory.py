"""An estimate of the memory of a training worker from the shape of its student; nothing is loaded or run.

Not included: the CUDA context and its libraries (0.5 to 1 GB), NCCL's buffers, fragmentation, the validation (no
gradients, but its own batch size), layers other than dense transformer layers (experts, convolutions), dropout, and the
workspace of compiled attention kernels. Leave a tenth of the GPU's memory free for them.
"""

from __future__ import annotations

import dataclasses
import math

from mint_ray.layouts import LOGITS_CHUNK_BYTES
from mint_ray.students.config import Student
from mint_ray.trainers.config import TrainerArguments, TrainResources
from mint_ray.trainers.model_shape import LayerStack, ModelShape

FLOAT32, BFLOAT16 = 4, 2
LIVE_PARAMETERS = 1_000_000_000
"""Weights that ZeRO-3 gathers at a time: DeepSpeed's default of `stage3_max_live_parameters`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes on one worker's device at the peak of a training step, and in the host memory of its node."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Tensors that the forward pass saves for the backward pass, and the gradients of one layer."""
    logits: int
    """Logits in memory at a time, and their gradients."""
    buffers: int
    """Buffers in which DDP or ZeRO exchange gradients and weights, and those of the optimizer step."""
    initialization: int
    """All weights: ZeRO-3 starts with them on every worker before it shards them. 0 for other engines."""
    host: int
    """The student as it is loaded, and offloaded state; without other memory of the process."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.logits, self.buffers)
        return max(self.initialization, sum(parts))


def estimate_memory(
    shape: ModelShape, student: Student, config: TrainerArguments, resources: TrainResources, *, record_tokens: int
) -> MemoryEstimate:
    """Estimate the memory of one worker, for the minimum number of workers.

    Weights, gradients and AdamW take 2 + 2 + 12 bytes per weight in mixed precision, of which ZeRO shards 12, 14 or 16
    over the workers (arXiv 1910.02054, section 3); here only the trained weights have gradients and moments.
    Activations: the tensors that a decoder layer saves, listed as in arXiv 2205.05198, section 4, for a layer with
    RMSNorm, rotary positions, a gated feed-forward network and an attention kernel that saves no scores.

    Args:
        shape: Shape of the student.
        student: Settings of the student.
        config: Settings of the trainer.
        resources: Batch sizes, engine and kernels.
        record_tokens: Tokens of each record: a prompt and all its completions, which share a row.
    """
    precision = _Precision.of(shape, student, config, resources)
    workers, trainable = resources.worker_range[0], shape.num_trainable
    stage, offload = resources.zero_stage, resources.offload
    shards = {0: (1, 1, 1), None: (1, 1, 1), 1: (1, 1, workers), 2: (1, workers, workers), 3: (workers,) * 3}
    weight_shards, gradient_shards, moment_shards = shards[stage]
    weights = shape.num_parameters * precision.weight
    weights += trainable * precision.adapter if student.lora_rank is not None else 0
    gradients = trainable * precision.trained // gradient_shards
    optimizer = trainable * precision.moments // moment_shards
    # DeepSpeed's AdamW steps on float32 copies of the gradients
    stepping = 0 if stage is None or precision.moments < 3 * FLOAT32 else FLOAT32 * trainable // moment_shards
    # ZeRO exchanges gradients in two buckets, DDP in a second copy of all gradients
    buckets, copy = 2 * shape.text.hidden_size**2 * precision.weight, gradients if workers > 1 else 0
    exchange = buckets if stage else copy
    live = min(shape.num_parameters, LIVE_PARAMETERS) * precision.weight if stage == 3 else 0
    loaded = shape.num_parameters * (BFLOAT16 if student.dtype == "bfloat16" else FLOAT32)
    offloaded = 0
    if offload != "none":
        offloaded, optimizer, stepping = optimizer + stepping, 0, 0
        gradients = gradients if stage == 1 else 0
    if offload == "parameters":
        offloaded += weights // weight_shards
    return MemoryEstimate(
        weights=(0 if offload == "parameters" else weights // weight_shards) + precision.copies,
        gradients=gradients,
        optimizer=optimizer,
        activations=_activations(shape, precision, config, resources, record_tokens),
        logits=_logits(shape, precision, config, resources),
        buffers=exchange + stepping + live,
        initialization=weights if stage == 3 else 0,
        host=loaded + offloaded,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Precision:
    """Bytes per number, by kind of number."""

    weight: int
    adapter: int
    trained: int
    compute: int
    moments: int
    """AdamW's two moments, and DeepSpeed's float32 copy of a weight if there is one."""
    casts: bool
    """True if a layer's inputs are cast, which copies them for each linear layer."""
    copies: int
    """Bytes of all bfloat16 copies of float32 weights, which autocast makes and the backward pass needs."""
    full: bool
    """True if all weights are trained."""

    @classmethod
    def of(cls, shape: ModelShape, student: Student, config: TrainerArguments, resources: TrainResources) -> _Precision:
        full = student.lora_rank is None
        if resources.zero_stage is not None:
            # the engine converts every weight to bfloat16, or leaves them as they are
            size = BFLOAT16 if config.bf16 or student.dtype == "bfloat16" else FLOAT32
            has_copy = config.bf16 or resources.zero_stage > 0
            return cls(
                weight=size, adapter=size, trained=size, compute=size, casts=False, copies=0, full=full,
                moments=(3 if has_copy else 2) * FLOAT32,
            )  # fmt: skip
        weight = BFLOAT16 if student.dtype == "bfloat16" else FLOAT32
        compute = BFLOAT16 if config.bf16 else weight
        # PEFT keeps adapters in float32 on a bfloat16 base
        trained = weight if full else FLOAT32
        num_copied = shape.num_parameters if weight != compute else 0
        num_copied += shape.num_trainable if config.bf16 and not full else 0
        return cls(
            weight=weight, adapter=FLOAT32, trained=trained, compute=compute, full=full, moments=2 * trained,
            casts=weight != compute or trained != compute, copies=num_copied * BFLOAT16,
        )  # fmt: skip


def _batch_shape(config: TrainerArguments, resources: TrainResources, record_tokens: int) -> tuple[int, int]:
    """Return the rows, and the tokens per row, of one forward pass in training."""
    records_per_worker = math.ceil(config.train_batch_size / resources.worker_range[0])
    records = min(resources.per_device_train_batch_size, records_per_worker)
    if config.kind == "trl":
        return 2 * records, config.max_length
    records_per_row = max(1, (resources.max_tokens_per_row or 0) // record_tokens)
    return math.ceil(records / records_per_row), min(records_per_row, records) * record_tokens


def _activations(
    shape: ModelShape, precision: _Precision, config: TrainerArguments, resources: TrainResources, record_tokens: int
) -> int:
    rows, width = _batch_shape(config, resources, record_tokens)
    text, compute = shape.text, precision.compute
    masked = resources.attn_implementation != "flex_attention"
    per_layer = rows * width * _saved_per_token(text, precision, keys=width if masked else 0, repeats=masked)
    if resources.attn_implementation == "eager":
        # the scores of every head: in float32 from the softmax, and cast for the product
        per_layer += rows * width * width * text.num_heads * (FLOAT32 + compute)
    # the largest gradients at a time: of the gated product and of both its factors
    layer_gradients = rows * width * compute * 3 * text.intermediate_size
    if resources.gradient_checkpointing:
        boundary = rows * width * text.hidden_size * precision.weight
        saved = text.num_layers * boundary + per_layer
    else:
        saved = text.num_layers * per_layer
    last_norm = rows * width * text.hidden_size * (FLOAT32 + compute)
    return saved + layer_gradients + last_norm + _image_activations(shape, precision, resources, rows, width)


def _saved_per_token(stack: LayerStack, precision: _Precision, *, keys: int, repeats: bool) -> int:
    """Return the bytes that one layer saves per token.

    `keys` is the width of an additive mask, 0 without one; with `repeats` keys and values are repeated for every head.
    """
    hidden, inner, query, compute = stack.hidden_size, stack.intermediate_size, stack.query_size, precision.compute
    # RMSNorm squares in float32; if its own weight is trained it saves its result too
    norms = 2 * hidden * (FLOAT32 + (precision.weight if precision.full else 0))
    inputs = compute * ((5 * hidden + query) if precision.casts else 2 * hidden)
    # queries and the result; keys and values; log-sum-exp
    attention = compute * 2 * (query + (query if repeats else stack.key_size)) + FLOAT32 * stack.num_heads
    # a boolean mask is converted to an additive one in every layer (PyTorch's scaled_dot_product_attention)
    mask = compute * keys
    # gate, its SiLU, up, and their product
    return norms + inputs + attention + mask + 4 * compute * inner


def _image_activations(
    shape: ModelShape, precision: _Precision, resources: TrainResources, rows: int, width: int
) -> int:
    if shape.vision is None:
        return 0
    text, vision, compute = shape.text, shape.vision, precision.compute
    tokens = rows * shape.image_tokens
    # LayerNorm's inputs, queries, keys, values and their result, GELU's input; and the inputs of trained layers
    per_token = 2 * vision.hidden_size + 4 * vision.query_size + vision.intermediate_size
    per_token += 2 * vision.hidden_size + vision.intermediate_size if shape.trains_vision else 0
    # a frozen encoder saves nothing (`students.adapters.freeze_vision_tower`), and needs one layer at a time
    encoder = tokens * compute * per_token * (vision.num_layers if shape.trains_vision else 1)
    encoder += rows * compute * shape.image_tokens**2
    # keys and values of the image, normalized and repeated, and the mask of text against image
    cross_attention = tokens * (compute * (2 * text.query_size + 3 * text.key_size) + FLOAT32 * text.key_size)
    cross_attention += tokens * compute * text.hidden_size * (2 if precision.casts else 0)
    cross_attention += rows * width * compute * shape.image_tokens
    num_saved = 1 if resources.gradient_checkpointing else shape.num_cross_attention_layers
    return encoder + tokens * compute * text.hidden_size + num_saved * cross_attention


def _logits(shape: ModelShape, precision: _Precision, config: TrainerArguments, resources: TrainResources) -> int:
    if config.kind == "trl":
        rows, width = _batch_shape(config, resources, 0)
        # every logit, a float32 copy, its log-softmax and its gradient
        return rows * width * shape.vocab_size * (precision.compute + 3 * FLOAT32)
    if not precision.full:
        # a chunk of logits in float32, and in the model's own format if that is another
        return LOGITS_CHUNK_BYTES + (LOGITS_CHUNK_BYTES // 2 if precision.compute == BFLOAT16 else 0)
    # logits, their float32 copy, the gradients of both, and the gradient of the head's weight by one chunk
    return 4 * LOGITS_CHUNK_BYTES + shape.vocab_size * shape.text.hidden_size * precision.compute
