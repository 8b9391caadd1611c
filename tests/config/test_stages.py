"""Settings of the stages: values out of range, and keys of earlier versions, are errors of one line."""

from __future__ import annotations

from typing import Any

import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.config.stages import (
    BuildVlm,
    Evaluate,
    FitResources,
    Gate,
    Harness,
    ImageActorResources,
    MatchTexts,
    Prepare,
    Pretrained,
    Score,
    ScoreResources,
    Splits,
    Train,
)

SOURCE = {"kind": "hpo"}
STUDENT = {"model_id": "some/model"}


@pytest.mark.parametrize(
    ("section", "data", "old", "new"),
    [
        (Prepare, {"source": SOURCE}, "pair_texts", "match_texts"),
        (MatchTexts, {"source": SOURCE, "encoder": {"model_id": "m"}}, "least_similarity", "min_similarity"),
        (Score, {}, "without", "ablate"),
        (Gate, {}, "top_10_accuracy", "top_k_accuracy"),
        (Evaluate, {}, "general", "harness"),
    ],
)
def test_an_old_key_is_an_error_that_names_the_new_one(
    section: type[Any], data: dict[str, Any], old: str, new: str
) -> None:
    with pytest.raises(UserError, match=rf"^config: {old}: unknown key .*; did you mean '{new}'\?$"):
        from_data(section, {**data, old: None})


@pytest.mark.parametrize(
    ("section", "data", "message"),
    [
        (Splits, {"validation": 0.6, "test": 0.5}, "must leave records to train on, got 0.6 and 0.5"),
        (Splits, {"test": -0.1}, "must leave records to train on, got 0.1 and -0.1"),
        (ImageActorResources, {"actors": 0}, "actors must be positive, got 0"),
        (ImageActorResources, {"decode_tasks": 0}, "decode_tasks must be positive, got 0"),
        (ImageActorResources, {"decode_cpus": 0}, "decode_cpus must be positive, got 0"),
        (ScoreResources, {"batch_size": 0}, "batch_size must be positive, got 0"),
        (ScoreResources, {"actors": 0}, "actors must be positive, got 0"),
        (FitResources, {"num_workers": 0}, "num_workers must be positive, got 0"),
        (
            MatchTexts,
            {"source": SOURCE, "encoder": {"model_id": "m"}, "min_similarity": 1.5},
            "min_similarity must lie in -1 to 1, got 1.5",
        ),
        (Prepare, {"source": SOURCE, "rows_per_part": 0}, "rows_per_part must be positive, got 0"),
        (Prepare, {"source": SOURCE, "max_bad_share": 2}, "max_bad_share must lie in 0 to 1, got 2"),
        (Pretrained, {"model_id": "a/b", "revision": "main"}, "commit of 40 hexadecimal digits, got 'main'"),
        (BuildVlm, {"learning_rate": 0}, "learning_rate must be positive, got 0"),
        (BuildVlm, {"train_batch_size": 0}, "train_batch_size must be positive, got 0"),
        (Harness, {"tasks": []}, "tasks must name at least one task"),
        (Harness, {"tasks": ["a"], "limit": 0}, "limit must be positive, got 0"),
        (Harness, {"tasks": ["a"], "num_fewshot": -1}, "num_fewshot must not be negative, got -1"),
        (Evaluate, {"confidence": 1}, "confidence must lie between 0 and 1, got 1"),
        (Evaluate, {"resamples": 0}, "resamples must be positive, got 0"),
        (
            Train,
            {"student": {**STUDENT, "dtype": "bfloat16", "lora_rank": None}},
            "bfloat16 with lora_rank null needs zero_stage 1, 2 or 3",
        ),
        (
            Train,
            {"student": {**STUDENT, "dtype": "bfloat16"}, "resources": {"zero_stage": 2}},
            "bfloat16 with zero_stage needs trainer.bf16: true",
        ),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_it(section: type[Any], data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_data(section, data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_decoding_tasks_follow_the_number_of_actors_unless_they_are_set() -> None:
    assert ImageActorResources(actors=3).max_decode_tasks == 12
    assert ImageActorResources(actors=3, decode_tasks=2).max_decode_tasks == 2
