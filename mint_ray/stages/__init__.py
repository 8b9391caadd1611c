"""Stages: one module each, in the order of `STAGES`. Importing this package loads nothing else.

Tested by tests/test_plan.py.
"""

STAGES = {
    "prepare": "Read records, choose labels, split by group.",
    "embed_texts": "Embed the texts that can be matched to images.",
    "match_texts": "Give each image without a text the nearest text of its split.",
    "fit": "Fit the teacher.",
    "score": "Rank every label of every record with the teacher.",
    "shuffle_images": "Exchange images between records, for `pair.control: shuffled`.",
    "build_vlm": "Build a vision-language student from an encoder and a language model.",
    "rank": "Rank the labels with the students that the sampler needs.",
    "pair": "Sample preference pairs from the scores.",
    "tokenize": "Convert the pairs into the student's tokens.",
    "train": "Align the student on the pairs.",
    "retrieve": "Retrieve documents for the held-out records.",
    "choose_passages": "Choose the passages that a student reads, truncated to fit its prompt.",
    "answer": "Answer the held-out records with base and aligned student.",
    "benchmark": "Run lm-evaluation-harness on base and aligned student.",
    "evaluate": "Compute the metrics of every method on the held-out records.",
    "report": "Write the report of the run.",
}
"""Name of each stage, and what it does. A run has those that its spec requires (`mint_ray.plan`)."""
