"""Checks that every sampler must pass; `test_conformance.py` runs them on each."""

from __future__ import annotations

import dataclasses

from mint_ray.records import TeacherScores
from mint_ray.samplers import EMPTY_CONTEXT, Sampler, SamplerContext, difficulty

LABELS = [f"L{i}" for i in range(12)]
SCORES = TeacherScores(
    record_id="r", split="train", teacher="t", labels=LABELS, scores=[1.0 - i / 11 for i in range(12)]
)


def check_pairs(
    sampler: Sampler, scores: TeacherScores, truth: str | None, context: SamplerContext = EMPTY_CONTEXT
) -> None:
    """Assert that the pairs of one record are repeatable, distinct, of the right lengths, and of the task's labels.

    `chosen` and `rejected` are disjoint, or have the same labels in another order.
    """
    pairs = sampler.draw(scores, truth, context)
    assert pairs == sampler.draw(scores, truth, context)
    assert len(pairs) <= sampler.pairs_per_record
    assert len({(*chosen, *rejected) for chosen, rejected in pairs}) == len(pairs)
    for chosen, rejected in pairs:
        assert (len(chosen), len(rejected)) == (sampler.top, sampler.num_rejected)
        assert len(set(chosen)) == len(chosen)
        assert len(set(rejected)) == len(rejected)
        assert set(chosen).isdisjoint(rejected) or (set(chosen) == set(rejected) and chosen != rejected)
        assert set(chosen + rejected) <= set(scores.labels)
        assert 0 <= difficulty(scores, chosen, rejected) <= 1
        if truth and sampler.truth_first:
            assert chosen[0] == truth


def check_sampler(sampler: Sampler, context: SamplerContext = EMPTY_CONTEXT) -> None:
    """Assert the rest of the interface: the label count that suffices, the seed, and the declared requirements.

    `context` has a ranking of each required student for the records "0" to "8".
    """
    records = [dataclasses.replace(SCORES, record_id=str(number)) for number in range(9)]
    for scores in records:
        check_pairs(sampler, scores, LABELS[0], context)
    assert any(sampler.draw(scores, LABELS[0], context) for scores in records)
    few = dataclasses.replace(
        SCORES, labels=LABELS[: sampler.min_labels - 1], scores=SCORES.scores[: sampler.min_labels - 1]
    )
    assert sampler.draw(few, LABELS[0], context) == []
    sampler.check_num_labels(sampler.min_labels)
    by_seed = [
        [dataclasses.replace(sampler, seed=seed).draw(scores, LABELS[0], context) for scores in records]
        for seed in range(5)
    ]
    assert any(pairs != by_seed[0] for pairs in by_seed) == sampler.is_random
    fields = {"confusions": context.confusions, "siblings": context.siblings}
    assert all(fields[name] for name in sampler.requires), "the test gives what the sampler requires"
    assert sampler.required_students <= context.student_rankings.keys()
    for scores in records:
        member = sampler.for_record(scores.record_id)
        assert member.draw(scores, LABELS[0], context) == sampler.draw(scores, LABELS[0], context)
        for _, rejected in member.draw(scores, LABELS[0], context):
            assert 0 <= member.count_fallbacks(scores.record_id, rejected, context) <= len(rejected)
