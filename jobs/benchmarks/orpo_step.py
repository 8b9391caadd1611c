"""Time the ORPO step of TRL's trainer and of the shared-prefix layout on the same pairs, weights and machine.

    python jobs/benchmarks/orpo_step.py --steps 5 --json
    python jobs/benchmarks/orpo_step.py --images --threads 1

A step is collate, forward, backward and optimizer step, with LoRA on all linear layers; the variants take turns. Equal
results are tested by `tests/layouts/test_shared_prefix.py`; the losses are printed next to the times. `--device cuda`
times a model with the shape of Llama-3.2-1B in bfloat16, with FlexAttention for the shared-prefix layout.

TRL's ORPOTrainer does not support images. `--images` adds a vision encoder with the shape of LLaVA-1.5's (arXiv
2310.03744: CLIP's ViT-L/14 at 336 pixels) and random weights, and times the layout with one row per completion, which
repeats image and prompt, against the shared prefix. On a GPU the language model has the shape of Llama-3.1-8B, in
bfloat16; `--images mllama` takes the shape of Llama-3.2-11B-Vision, with cross-attention to a tile of 560 pixels.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import gc
import json
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MllamaConfig,
    PretrainedConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from mint_ray.layouts import Batch, Example, ImageInputs, Layout
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.masks import SPLIT_SDPA, set_attn_implementation
from mint_ray.layouts.shared_prefix import SharedPrefixLayout
from mint_ray.objectives import build_objective, chosen_and_rejected, nll_sum
from mint_ray.objectives.config import NllOn, Orpo
from mint_ray.students.adapters import add_adapter, freeze_vision_tower
from mint_ray.students.config import Student
from mint_ray.students.loading import load_model, load_tokenizer

BETA = 0.5
SIDE, PATCH = 336, 14
IMAGE_TOKENS = (SIDE // PATCH) ** 2
LLAMA_1B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
"""The shape of Llama-3.2-1B; the weights are random, because the speed does not depend on them."""
LLAMA_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
)
"""The shape of Llama-3.1-8B."""
VISION_ENCODER = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=SIDE,
    patch_size=PATCH,
)
"""The shape of CLIP's ViT-L/14 at 336 pixels."""
MLLAMA_11B = MllamaConfig(text_config=MllamaTextConfig(), vision_config=MllamaVisionConfig(image_size=560))
"""The shape of Llama-3.2-11B-Vision: the default of transformers except for the image size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Lengths in tokens of a record: its prompt and the completions of its pairs."""

    name: str
    prompt: int
    chosen: tuple[int, ...]
    """Chosen completion of each pair, or a single one that all pairs share."""
    rejected: tuple[int, ...]
    """Rejected completion of each pair."""

    def example(self, rng: random.Random, config: PretrainedConfig) -> Example:
        """Return random tokens, after an image of noise for a vision-language model."""
        is_vlm = "vision_config" in config.sub_configs
        image, placeholder = noise(config, rng.randrange(2**31)) if is_vlm else (None, [])
        first = len(self.chosen)
        words = config.get_text_config().vocab_size - 1  # the last may be the image token
        return Example(
            record_id="",
            prompt_ids=placeholder + [rng.randrange(words) for _ in range(self.prompt)],
            completions=[[rng.randrange(words) for _ in range(length)] for length in self.chosen + self.rejected],
            pairs=[(min(pair, first - 1), first + pair) for pair in range(len(self.rejected))],
            image=image,
        )


def noise(config: PretrainedConfig, seed: int) -> tuple[ImageInputs, list[int]]:
    """Return the model inputs of a random image, and its image tokens in the prompt.

    Pixels are in [0, 1): (1, 3, side, side) for LLaVA; (1, 1, tiles, 3, side, side) for Mllama, which uses the first.
    """
    generator = torch.Generator().manual_seed(seed)
    if config.model_type == "llava":
        pixels, token = torch.rand(1, 3, SIDE, SIDE, generator=generator), config.image_token_id
        return ImageInputs(tensors={"pixel_values": pixels}, token_id=token), [token] * IMAGE_TOKENS
    vision = config.vision_config
    pixels = torch.zeros(1, 1, vision.max_num_tiles, 3, vision.image_size, vision.image_size)
    pixels[:, :, 0] = torch.rand(pixels.shape[3:], generator=generator)
    inputs = {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.eye(vision.max_num_tiles, dtype=torch.long)[None, :1],
    }
    return ImageInputs(tensors=inputs, token_id=config.image_token_index), [config.image_token_index]


SHAPES = (
    Shape(name="prompt 500, completions 95/135, one pair", prompt=500, chosen=(95,), rejected=(135,)),
    Shape(name="prompt 500, completions 30, one chosen, four rejected", prompt=500, chosen=(30,), rejected=(30,) * 4),
    Shape(name="prompt 500, completions 30, four distinct pairs", prompt=500, chosen=(30,) * 4, rejected=(30,) * 4),
    Shape(name="prompt 1000, completions 10, one pair", prompt=1000, chosen=(10,), rejected=(10,)),
)

IMAGE_SHAPES = (
    Shape(name="image, prompt 64, completions 20, one pair", prompt=64, chosen=(20,), rejected=(20,)),
    Shape(
        name="image, prompt 64, completions 20, four distinct pairs", prompt=64, chosen=(20,) * 4, rejected=(20,) * 4
    ),
)


@dataclasses.dataclass(kw_only=True)
class Runner:
    """One variant of the step with its own LoRA weights, and the measurements of its steps."""

    name: str
    model: nn.Module
    collate: Callable[[list[Example]], dict[str, Any]]
    loss: Callable[[nn.Module, dict[str, Any]], Tensor]
    tokens: Callable[[dict[str, Any]], int]
    """Function that returns the number of tokens of a batch, padding included."""
    step_tokens: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    """CPU time of all threads; with one thread it is comparable even on a shared machine."""
    peaks: list[int] = dataclasses.field(default_factory=list)
    """Peak memory of each step in bytes, beyond the memory before it."""
    losses: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW([w for w in self.model.parameters() if w.requires_grad], lr=1e-4)

    def step(self, examples: list[Example], device: torch.device) -> None:
        """Run one step and record its measurements."""
        allocated = reset_peak(device)
        started, cpu_started = time.perf_counter(), time.process_time()
        batch = self.collate(examples)
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = self.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())  # synchronizes with a GPU
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu_started)
        self.peaks.append(read_peak(device) - allocated)
        self.step_tokens = self.tokens(batch)


def reset_peak(device: torch.device) -> int:
    """Reset the memory peak and return the current memory in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def read_peak(device: torch.device) -> int:
    """Return the memory peak since `reset_peak` in bytes."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def layout_runner(name: str, model: nn.Module, layout: Layout, nll_on: NllOn) -> Runner:
    """Return the step with one of our layouts."""
    objective = build_objective(Orpo(beta=BETA, nll_on=nll_on))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logps = layout.compute_logps(model, batch)
        chosen, rejected = chosen_and_rejected(logps, batch)
        nll = nll_sum(chosen, logps, batch) / batch["nll_tokens"]
        return nll + objective.pair_losses(chosen, rejected).mean()

    return Runner(
        name=name,
        model=model,
        collate=lambda examples: layout.collate(examples, score_prompt=nll_on == "full"),
        loss=loss,
        tokens=lambda batch: batch["input_ids"].numel(),
    )


def trl_runner(model: nn.Module, tokenizer: Any, folder: str, device: torch.device) -> Runner:
    """Return the step with TRL's loss and collator; the tokens are those of `pair_features`, not of its data set."""
    trainer = ORPOTrainer(
        model=model,
        args=ORPOConfig(
            output_dir=folder, beta=BETA, max_length=4096, report_to="none", use_cpu=device.type == "cpu", bf16=False
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )
    return Runner(
        name="TRL ORPOTrainer",
        model=model,
        collate=lambda examples: trainer.data_collator([row for example in examples for row in pair_features(example)]),
        loss=trainer.compute_loss,
        tokens=lambda batch: trainer.concatenated_inputs(batch)["concatenated_input_ids"].numel(),
    )


def pair_features(example: Example) -> list[dict[str, list[int]]]:
    """Return the pairs in the columns of TRL's `tokenize_row`."""
    rows = []
    for pair in example.pairs:
        row = {"prompt_input_ids": example.prompt_ids, "prompt_attention_mask": [1] * len(example.prompt_ids)}
        for side, index in zip(("chosen", "rejected"), pair, strict=True):
            ids = example.prompt_ids + example.completions[index]
            row[f"{side}_input_ids"] = ids
            row[f"{side}_attention_mask"] = [1] * len(ids)
            row[f"{side}_labels"] = [-100] * len(example.prompt_ids) + example.completions[index]
        rows.append(row)
    return rows


def build_model(student: Student, device: torch.device) -> nn.Module:
    """Return the student with LoRA weights other than the initial ones, half of which would get no gradient."""
    torch.manual_seed(0)
    if device.type == "cuda":
        with device:
            base = AutoModelForCausalLM.from_config(LLAMA_1B, dtype=torch.bfloat16, attn_implementation="sdpa")
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))
    else:
        model = load_model(student, trainable=True)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=1e-3)
    return model.to(device).train()


def build_vlm(student: Student, family: str, device: torch.device) -> nn.Module:
    """Return a frozen vision encoder with a language model that has LoRA weights.

    All weights are random, except those of the language model for LLaVA on a CPU.
    """
    torch.manual_seed(0)
    text = load_model(student) if family == "llava" and device.type != "cuda" else None
    config: Any = MLLAMA_11B
    if family == "llava":
        text_config = text.config if text else LLAMA_8B
        config = LlavaConfig(
            vision_config=VISION_ENCODER, text_config=text_config, image_token_id=text_config.vocab_size - 1
        )
    with device:
        model = AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, attn_implementation="sdpa"
        )
    if text:
        model.model.language_model, model.lm_head = text.model, text.lm_head
    adapted = add_adapter(model, student, is_vlm=True)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=1e-3)
    adapted.train()
    freeze_vision_tower(model)
    return adapted.to(device)


def copy_of(model: nn.Module, attention: str) -> nn.Module:
    """Return a copy of the model with its own LoRA weights; frozen weights are shared."""
    frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    copied = copy.deepcopy(model, frozen)
    set_attn_implementation(copied, attention)
    return copied


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command line."""

    steps: int
    records: int
    shape: str
    model_id: str
    images: str | None
    device: str
    attn_implementation: str | None
    threads: int | None
    peak_tflops: float | None
    as_json: bool


def build_runners(model: nn.Module, student: Student, options: Options, folder: str) -> list[Runner]:
    """Return the variants to compare, the reference first."""
    device = torch.device(options.device)
    attention = options.attn_implementation or ("flex_attention" if device.type == "cuda" else SPLIT_SDPA)
    if options.images:
        return [
            layout_runner("one row per completion", copy_of(model, "sdpa"), ConcatenatedLayout(), "completion"),
            layout_runner("shared prefix", copy_of(model, attention), SharedPrefixLayout(), "completion"),
        ]
    variants: dict[str, tuple[Layout, NllOn]] = {
        "shared prefix, NLL on all tokens": (SharedPrefixLayout(), "full"),
        "shared prefix, NLL on completion": (SharedPrefixLayout(), "completion"),
        "shared prefix, logits not chunked": (SharedPrefixLayout(logits="selected"), "full"),
    }
    runners = [trl_runner(copy_of(model, "sdpa"), load_tokenizer(student), folder, device)]
    return runners + [layout_runner(name, copy_of(model, attention), *variant) for name, variant in variants.items()]


def measure(shape: Shape, runners: list[Runner], *, records: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Run the variants in turns on the same records; the first turn is a warm-up."""
    for step in range(steps + 1):
        rng = random.Random(f"{shape.name}:{step}")
        examples = [shape.example(rng, runners[0].model.config) for _ in range(records)]
        for runner in runners:
            runner.step(examples, device)
    pairs = records * len(shape.rejected)
    weights = sum(w.numel() for name, w in runners[0].model.named_parameters() if "lora" not in name)
    reference, cpu_reference = (statistics.median(times[1:]) for times in (runners[0].seconds, runners[0].cpu_seconds))
    row: dict[str, Any] = {"name": shape.name, "runs": []}
    for runner in runners:
        seconds, cpu_seconds = (statistics.median(times[1:]) for times in (runner.seconds, runner.cpu_seconds))
        row["runs"].append(
            {
                "name": runner.name,
                "tokens": runner.step_tokens,
                "seconds": round(seconds, 4),
                "cpu_seconds": round(cpu_seconds, 4),
                "pairs_per_second": round(pairs / seconds, 3),
                # forward, and backward for the inputs alone: two multiply-adds per frozen weight and token
                "tflops": round(4 * weights * runner.step_tokens / seconds / 1e12, 3),
                "peak_mib": round(max(runner.peaks[1:]) / 2**20),
                "ratio": round(reference / seconds, 2),
                "cpu_ratio": round(cpu_reference / cpu_seconds, 2),
                "loss": runner.losses[0],
                "loss_difference": max(
                    abs(ours - theirs) for ours, theirs in zip(runner.losses, runners[0].losses, strict=True)
                ),
            }
        )
    row["ratio"] = row["runs"][1]["ratio"]
    return row


def describe(row: dict[str, Any], peak_tflops: float | None) -> str:
    """Return the measurements of one shape as text."""
    lines = [row["name"]]
    for run in row["runs"]:
        mfu = f" {run['tflops'] / peak_tflops:6.1%} MFU" if peak_tflops else ""
        lines.append(
            f"  {run['name']:34} {run['tokens']:6} tokens {run['seconds']:8.3f} s"
            f" {run['pairs_per_second']:8.2f} pairs/s"
            f"{mfu} {run['peak_mib']:7} MiB {run['ratio']:6.2f}x ({run['cpu_ratio']:.2f}x of CPU time)"
            f"  loss {run['loss']:.6f} ({run['loss_difference']:.1e})"
        )
    return "\n".join(lines)


@click.command()
@click.option("--steps", default=5, help="Number of timed steps per variant and shape.")
@click.option("--records", default=1, help="Records per step.")
@click.option("--shape", default="", help="Run only shapes whose name contains this text.")
@click.option("--model-id", default="bundled:smollm2-135m-instruct", help="Student on the CPU, in float32.")
@click.option(
    "--images",
    type=click.Choice(["llava", "mllama"]),
    is_flag=False,
    flag_value="llava",
    help="Time vision-language students: one row per completion against the shared prefix.",
)
@click.option("--device", default="cpu", help="cpu or cuda.")
@click.option(
    "--attn-implementation",
    help="Attention of the shared-prefix layout (default: split sdpa; on a GPU flex_attention).",
)
@click.option("--threads", type=int, help="Arithmetic threads (default: all CPUs).")
@click.option("--peak-tflops", type=float, help="Peak TFLOPS of the device, to print the utilization (MFU).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def main(**given: Any) -> None:
    """Time the ORPO step of TRL's trainer and of the shared-prefix layout."""
    options = Options(**given)
    device = torch.device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.images == "mllama" and device.type != "cuda":
        raise click.UsageError("--images mllama: a model of eleven billion weights needs --device cuda")
    student = Student(model_id=options.model_id, lora_rank=16)
    model = build_vlm(student, options.images, device) if options.images else build_model(student, device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in IMAGE_SHAPES if options.images else SHAPES:
            if options.shape not in shape.name:
                continue
            runners = build_runners(model, student, options, folder)
            rows.append(measure(shape, runners, records=options.records, steps=options.steps, device=device))
            click.echo(describe(rows[-1], options.peak_tflops))
    if options.as_json:
        machine = {"device": options.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        click.echo(json.dumps({"shapes": rows, **machine}))


if __name__ == "__main__":
    main()
