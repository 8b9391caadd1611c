"""Time the free answers of a student, many prompts in a pass, against one prompt per call, in turns.

    python jobs/benchmarks/generate.py --json
    python jobs/benchmarks/generate.py --adapter out/rare_disease/train-0123456789ab/adapter --records 96 --json

One prompt per call is how the released code of MINT (https://arxiv.org/abs/2505.05736) asks its students. Both sides
have the same loaded model, the same prompts and as many threads as there are processors; the command fails if an answer
of the two differs. The base student's answers seldom end before `--max-new-tokens`; those of an aligned one, which
`--adapter` takes, do.
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
from mint_ray.students import StudentGenerator
from mint_ray.students.config import Generation, Student
from mint_ray.tasks import build_task
from mint_ray.tasks.config import RareDisease

LENGTH = 3
"""Names of an answer."""


def made_up_prompts(count: int, labels: int) -> list[list[Message]]:
    """What the student is asked about `count` patients."""
    with tempfile.TemporaryDirectory() as root:
        records = write_records(root, count, labels, rows_per_part=count)
        task = build_task(RareDisease(), records.rows(Label, "labels"), LENGTH)
        return [task.prompt(record) for record in records.rows(Record, "records")]


@torch.inference_mode()
def one_per_call(student: StudentGenerator, prompts: list[list[Message]]) -> list[str]:
    """The same greedy answers, a call of transformers' `generate` for each prompt."""
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
    "--model", default="bundled:smollm2-135m-instruct", show_default=True, help="As `train.student.model_id`."
)
@click.option("--adapter", type=click.Path(exists=True, path_type=Path), help="What the student has learned.")
@click.option("--records", default=64, show_default=True, help="Prompts.")
@click.option("--labels", default=20, show_default=True, help="Diseases that the patients have.")
@click.option("--batch-size", default=32, show_default=True, help="Prompts in a pass.")
@click.option("--max-new-tokens", default=48, show_default=True, help="Longest answer.")
@click.option("--rounds", default=3, show_default=True, help="Turns of each side; medians are compared.")
@click.option("--json", "as_json", is_flag=True, help="Make the last line one JSON object.")
def main(
    model: str, adapter: Path | None, records: int, labels: int, batch_size: int, max_new_tokens: int, rounds: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Time batched answers."""
    torch.set_num_threads(os.cpu_count() or 1)
    prompts = made_up_prompts(records, labels)
    student = StudentGenerator(
        Student(model_id=model), Generation(max_new_tokens=max_new_tokens), adapter, batch_size=batch_size
    )
    sides = {"batched": student.generate, "one_per_call": lambda asked: one_per_call(student, asked)}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    answers: dict[str, list[str]] = {}
    for answer in sides.values():
        answer(prompts[:2])
    for number in range(rounds):
        for side, answer in sides.items():
            started = time.perf_counter()
            answers[side] = answer(prompts)
            seconds[side].append(time.perf_counter() - started)
            click.echo(f"round {number}: {side} {seconds[side][-1]:.1f} s", err=True)
    same = sum(ours == theirs for ours, theirs in zip(*answers.values(), strict=True))
    median = {side: statistics.median(taken) for side, taken in seconds.items()}
    told: dict[str, Any] = {
        "records": records,
        "same_answers": same,
        "batch_size": batch_size,
        **{f"{side}_seconds": round(taken, 3) for side, taken in median.items()},
        "ratio": round(median["one_per_call"] / median["batched"], 3),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    click.echo(", ".join(f"{key} {value}" for key, value in told.items() if key != "load"))
    if as_json:
        click.echo(json.dumps(told))
    if same < records:
        raise click.ClickException(f"{records - same} of {records} answers differ")


if __name__ == "__main__":
    main()
