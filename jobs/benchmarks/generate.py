"""Time the free answers of a student in batches against one prompt per call.

    python jobs/benchmarks/generate.py --json
    python jobs/benchmarks/generate.py --adapter out/rare_disease/train-0123456789ab/adapter --records 96 --json

The released code of MINT (https://arxiv.org/abs/2505.05736) generates with one prompt per call. Both variants use the
same loaded model, the same prompts and all CPUs, and take turns; the command fails if an answer differs. Answers of the
base student are usually as long as `--max-new-tokens`; those of an aligned student (`--adapter`) end earlier.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from patients import write_records

from mint_ray.records import Label, Message, Record
from mint_ray.students.config import Generation, Student
from mint_ray.students.generation import StudentGenerator
from mint_ray.tasks import build_task
from mint_ray.tasks.config import RareDisease

NUM_LABELS = 3
"""Labels per answer."""


def simulated_prompts(count: int, labels: int) -> list[list[Message]]:
    """Return the prompts for `count` simulated patients."""
    with tempfile.TemporaryDirectory() as root:
        records = write_records(root, count, labels, rows_per_part=count)
        task = build_task(RareDisease(), records.rows(Label, "labels"), NUM_LABELS)
        return [task.prompt(record) for record in records.rows(Record, "records")]


@torch.inference_mode()
def one_per_call(student: StudentGenerator, prompts: list[list[Message]]) -> list[str]:
    """Return the same greedy answers, with one call of transformers' `generate` per prompt."""
    texts = []
    for prompt in prompts:
        messages = [dataclasses.asdict(message) for message in prompt]
        inputs = student.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(student.device)
        output_1T = student.model.generate(**inputs)
        texts.append(student.tokenizer.decode(output_1T[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@click.command()
@click.option(
    "--model", default="bundled:smollm2-135m-instruct", show_default=True, help="As in `train.student.model_id`."
)
@click.option("--adapter", type=click.Path(exists=True, path_type=Path), help="Folder of a trained adapter.")
@click.option("--records", default=64, show_default=True, help="Number of prompts.")
@click.option("--labels", default=20, show_default=True, help="Number of diseases.")
@click.option("--batch-size", default=32, show_default=True, help="Prompts per batch.")
@click.option("--max-new-tokens", default=48, show_default=True, help="Maximum tokens of an answer.")
@click.option("--rounds", default=3, show_default=True, help="Turns of each variant; medians are compared.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line.")
def main(
    model: str, adapter: Path | None, records: int, labels: int, batch_size: int, max_new_tokens: int, rounds: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Time batched answers against one prompt per call."""
    torch.set_num_threads(os.cpu_count() or 1)
    prompts = simulated_prompts(records, labels)
    student = StudentGenerator(
        Student(model_id=model), Generation(max_new_tokens=max_new_tokens), adapter, batch_size=batch_size
    )
    variants = {"batched": student.generate, "one_per_call": lambda some: one_per_call(student, some)}
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    answers: dict[str, list[str]] = {}
    for answer in variants.values():
        answer(prompts[:2])
    for number in range(rounds):
        for variant, answer in variants.items():
            started = time.perf_counter()
            answers[variant] = answer(prompts)
            seconds[variant].append(time.perf_counter() - started)
            click.echo(f"round {number}: {variant} {seconds[variant][-1]:.1f} s", err=True)
    same = sum(batched == single for batched, single in zip(*answers.values(), strict=True))
    median = {variant: statistics.median(times) for variant, times in seconds.items()}
    result: dict[str, Any] = {
        "records": records,
        "same_answers": same,
        "batch_size": batch_size,
        **{f"{variant}_seconds": round(taken, 3) for variant, taken in median.items()},
        "ratio": round(median["one_per_call"] / median["batched"], 3),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    click.echo(", ".join(f"{key} {value}" for key, value in result.items() if key != "load"))
    if as_json:
        click.echo(json.dumps(result))
    if same < records:
        raise click.ClickException(f"{records - same} of {records} answers differ")


if __name__ == "__main__":
    main()
