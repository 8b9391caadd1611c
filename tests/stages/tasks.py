"""A task of lm-evaluation-harness on disk: YAML and JSONL, nothing from anywhere."""

from __future__ import annotations

import json
from pathlib import Path

QUESTIONS = [
    ("The sky is", ["blue", "made of stone", "a kind of fish"], 0),
    ("Two and two make", ["nine", "four", "a boy of four years"], 1),
    ("A dog can", ["bark", "1. Noonan syndrome", "read"], 0),
    ("Liver and kidney are", ["rivers", "organs", "months"], 1),
]


def save_local_task(folder: Path) -> Path:
    """Write the task `sky_and_sums` of four questions with three choices into `folder`."""
    folder.mkdir()
    lines = [json.dumps({"question": q, "choices": choices, "answer": a}) for q, choices, a in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "sky_and_sums.yaml").write_text(f"""
task: sky_and_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "questions.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
""")
    return folder
