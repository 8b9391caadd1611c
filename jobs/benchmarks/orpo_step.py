"""Time the ORPO step of TRL's trainer and ours on the same pairs, weights and machine, in turns.

    python jobs/benchmarks/orpo_step.py --steps 5 --json
    python jobs/benchmarks/orpo_step.py --images --threads 1

A step is collate, forward, backward and optimiser step, with LoRA on all linear layers. That both compute the same is
what `tests/layouts/test_shared_prefix.py` shows; here the losses stand beside the times. `--device cuda` times a model
of the shape of Llama-3.2-1B in bfloat16, for which ours takes FlexAttention.

TRL's ORPOTrainer has no path for images. `--images` gives the student a tower of the shape of LLaVA-1.5's (arXiv
2310.03744: CLIP's ViT-L/14 at 336 pixels) with random weights, and times the layout with one row per answer, which
repeats image and prompt, against ours. On a GPU it stands before the shape of Llama-3.1-8B, in bfloat16, and
`--images mllama` takes the shape of Llama-3.2-11B-Vision, which looks at a tile of 560 pixels by cross-attention.
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

from mint_ray.layouts import Batch, Example, Image, Layout
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.masks import SPLIT, set_attention
from mint_ray.layouts.shared_prefix import SharedPrefixLayout
from mint_ray.objectives import Answers, build_objective
from mint_ray.objectives.config import NllOn, Orpo
from mint_ray.students import Student, load_model, load_tokenizer
from mint_ray.students.adapters import lay_adapter, rest

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
"""The shape of Llama-3.2-1B; its weights are random, for the speed does not depend on them."""
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
TOWER = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=SIDE,
    patch_size=PATCH,
)
"""The shape of CLIP's ViT-L/14 at 336 pixels."""
MLLAMA_11B = MllamaConfig(text_config=MllamaTextConfig(), vision_config=MllamaVisionConfig(image_size=560))
"""The shape of Llama-3.2-11B-Vision, which is what transformers takes where nothing is said, but for its images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Lengths in tokens of a record: a prompt and the answers of its pairs."""

    name: str
    prompt: int
    chosen: tuple[int, ...]
    """Of each pair, or a single one that all pairs have."""
    rejected: tuple[int, ...]

    def example(self, rng: random.Random, config: PretrainedConfig) -> Example:
        """Random tokens, behind an image of noise if the model of `config` sees."""
        image, slot = noise(config, rng.randrange(2**31)) if "vision_config" in config.sub_configs else (None, [])
        first = len(self.chosen)
        words = config.get_text_config().vocab_size - 1  # the last may stand for an image
        return Example(
            record_id="",
            prompt_ids=slot + [rng.randrange(words) for _ in range(self.prompt)],
            completions=[[rng.randrange(words) for _ in range(length)] for length in self.chosen + self.rejected],
            pairs=[(min(pair, first - 1), first + pair) for pair in range(len(self.rejected))],
            image=image,
        )


def noise(config: PretrainedConfig, seed: int) -> tuple[Image, list[int]]:
    """An image as the model of `config` takes it, and the tokens that stand for it.

    Pixels in [0, 1): (1, 3, side, side) for LLaVA; (1, 1, tiles, 3, side, side) for Mllama, of which the first is seen.
    """
    generator = torch.Generator().manual_seed(seed)
    if config.model_type == "llava":
        pixels, slot = torch.rand(1, 3, SIDE, SIDE, generator=generator), config.image_token_id
        return Image(inputs={"pixel_values": pixels}, token_id=slot), [slot] * IMAGE_TOKENS
    vision = config.vision_config
    pixels = torch.zeros(1, 1, vision.max_num_tiles, 3, vision.image_size, vision.image_size)
    pixels[:, :, 0] = torch.rand(pixels.shape[3:], generator=generator)
    inputs = {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.eye(vision.max_num_tiles, dtype=torch.long)[None, :1],
    }
    return Image(inputs=inputs, token_id=config.image_token_index), [config.image_token_index]


SHAPES = (
    Shape(name="prompt 500, answers 95/135, one pair", prompt=500, chosen=(95,), rejected=(135,)),
    Shape(name="prompt 500, answers 30, one chosen against four", prompt=500, chosen=(30,), rejected=(30,) * 4),
    Shape(name="prompt 500, answers 30, four pairs all distinct", prompt=500, chosen=(30,) * 4, rejected=(30,) * 4),
    Shape(name="prompt 1000, answers 10, one pair", prompt=1000, chosen=(10,), rejected=(10,)),
)

IMAGE_SHAPES = (
    Shape(name="image, prompt 64, answers 20, one pair", prompt=64, chosen=(20,), rejected=(20,)),
    Shape(
        name="image, prompt 64, answers 20, four pairs all distinct", prompt=64, chosen=(20,) * 4, rejected=(20,) * 4
    ),
)


@dataclasses.dataclass(kw_only=True)
class Runner:
    """One way to take the step, with LoRA weights of its own, and what its steps took."""

    name: str
    model: nn.Module
    collate: Callable[[list[Example]], dict[str, Any]]
    loss: Callable[[nn.Module, dict[str, Any]], Tensor]
    tokens: Callable[[dict[str, Any]], int]
    """Tokens that a batch takes through the model, padding included."""
    step_tokens: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    """Of all threads: what stays comparable, with one thread, while others use the machine."""
    peaks: list[int] = dataclasses.field(default_factory=list)
    """Most bytes held in the step beyond those held before it."""
    losses: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW([w for w in self.model.parameters() if w.requires_grad], lr=1e-4)

    def step(self, examples: list[Example], device: torch.device) -> None:
        held = start_peak(device)
        started, cpu_started = time.perf_counter(), time.process_time()
        batch = self.collate(examples)
        batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = self.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())  # on a GPU it waits for the step to end
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu_started)
        self.peaks.append(read_peak(device) - held)
        self.step_tokens = self.tokens(batch)


def start_peak(device: torch.device) -> int:
    """Forget the memory peak so far; bytes held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier step gave back counts as free
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def read_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def our_runner(name: str, model: nn.Module, layout: Layout, nll_on: NllOn) -> Runner:
    objective = build_objective(Orpo(beta=BETA, nll_on=nll_on))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logps = layout.run(model, batch)
        sides = [
            Answers(sums_P=logps.sums_C[batch[side]], counts_P=logps.counts_C[batch[side]])
            for side in ("chosen_P", "rejected_P")
        ]
        nll = -sides[0].sums_P.sum() - logps.prompt_sums_B[batch["record_P"]].sum()
        return nll / batch["nll_tokens"] + objective.pair_losses(*sides).mean()

    return Runner(
        name=name,
        model=model,
        collate=lambda examples: layout.lay_out(examples, score_prompt=nll_on == "full"),
        loss=loss,
        tokens=lambda batch: batch["input_ids"].numel(),
    )


def trl_runner(model: nn.Module, tokenizer: Any, folder: str, device: torch.device) -> Runner:
    """TRL's own loss and collator; the tokens come from `pair_features`, not from the one text it is built with."""
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
    """What TRL's `tokenize_row` makes of a pair."""
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
    """The student with LoRA weights away from their start, where half of them would get no gradient."""
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


def build_seeing(student: Student, family: str, device: torch.device) -> nn.Module:
    """A tower that rests before one that learns by LoRA; weights are random, but for LLaVA's student on processors."""
    torch.manual_seed(0)
    text = load_model(student) if family == "llava" and device.type != "cuda" else None
    config: Any = MLLAMA_11B
    if family == "llava":
        told = text.config if text else LLAMA_8B
        config = LlavaConfig(vision_config=TOWER, text_config=told, image_token_id=told.vocab_size - 1)
    with device:
        model = AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, attn_implementation="sdpa"
        )
    if text:
        model.model.language_model, model.lm_head = text.model, text.lm_head
    adapted = lay_adapter(model, student, sees=True)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=1e-3)
    adapted.train()
    rest(model)
    return adapted.to(device)


def copy_of(model: nn.Module, attention: str) -> nn.Module:
    """The same model with LoRA weights of its own; the frozen ones are shared."""
    frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    twin = copy.deepcopy(model, frozen)
    set_attention(twin, attention)
    return twin


def measure(shape: Shape, runners: list[Runner], *, records: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Let the runners take turns over the same records; their first turn is not counted."""
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
                # forward and, for the inputs alone, backward: two multiply-adds per frozen weight and token
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
    lines = [row["name"]]
    for run in row["runs"]:
        mfu = f" {run['tflops'] / peak_tflops:6.1%} MFU" if peak_tflops else ""
        lines.append(
            f"  {run['name']:34} {run['tokens']:6} tokens {run['seconds']:8.3f} s"
            f" {run['pairs_per_second']:8.2f} pairs/s"
            f"{mfu} {run['peak_mib']:7} MiB {run['ratio']:6.2f}x ({run['cpu_ratio']:.2f}x of processor time)"
            f"  loss {run['loss']:.6f} ({run['loss_difference']:.1e})"
        )
    return "\n".join(lines)


@click.command()
@click.option("--steps", default=5, help="Counted steps of each runner and shape.")
@click.option("--records", default=1, help="Records in a step.")
@click.option("--shape", "wanted", default="", help="Only the shapes whose name holds this.")
@click.option("--model-id", default="bundled:smollm2-135m-instruct", help="Student on the processor, in float32.")
@click.option(
    "--images",
    type=click.Choice(["llava", "mllama"]),
    is_flag=False,
    flag_value="llava",
    help="Students that see, one row per answer against ours.",
)
@click.option("--device", default="cpu", help="cpu or cuda.")
@click.option("--attention", help="Of ours; split sdpa unless given, on a GPU flex_attention.")
@click.option("--threads", type=int, help="Arithmetic threads; all processors unless given.")
@click.option("--peak-tflops", type=float, help="What the device can do, to print how much of it is used.")
@click.option("--json", "as_json", is_flag=True, help="Make the last line one JSON object.")
def main(
    steps: int,
    records: int,
    wanted: str,
    model_id: str,
    images: str | None,
    device: str,
    attention: str | None,
    threads: int | None,
    peak_tflops: float | None,
    as_json: bool,
) -> None:
    """Time the ORPO step of TRL's trainer and ours on the same pairs, weights and machine, in turns."""
    place = torch.device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    student = Student(model_id=model_id, lora_rank=16)
    if images == "mllama" and place.type != "cuda":
        raise click.UsageError("--images mllama: its eleven billion weights take --device cuda")
    model = build_seeing(student, images, place) if images else build_model(student, place)
    attention = attention or ("flex_attention" if place.type == "cuda" else SPLIT)
    ours = {
        "ours, NLL on all tokens as TRL": (SharedPrefixLayout(), "full"),
        "ours, NLL on the answer": (SharedPrefixLayout(), "completion"),
        "ours as TRL, logits not in chunks": (SharedPrefixLayout(head="rows"), "full"),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in IMAGE_SHAPES if images else SHAPES:
            if wanted not in shape.name:
                continue
            if images:
                runners = [
                    our_runner("one row per answer", copy_of(model, "sdpa"), ConcatenatedLayout(), "completion"),
                    our_runner("ours", copy_of(model, attention), SharedPrefixLayout(), "completion"),
                ]
            else:
                runners = [trl_runner(copy_of(model, "sdpa"), load_tokenizer(student), folder, place)]
                runners += [our_runner(name, copy_of(model, attention), *how) for name, how in ours.items()]
            rows.append(measure(shape, runners, records=records, steps=steps, device=place))
            click.echo(describe(rows[-1], peak_tflops))
    if as_json:
        machine = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
        click.echo(json.dumps({"shapes": rows, **machine}))


if __name__ == "__main__":
    main()
