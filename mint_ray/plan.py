"""The stages of a run in order: what each reads, what it writes, and whether it has to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mint_ray import lineage, storage
from mint_ray.artifacts import MANIFEST, RUNS, Artifact, Manifest, find_artifact, read_manifest
from mint_ray.config.loader import UserError, iter_leaves
from mint_ray.config.pipeline import PipelineConfig
from mint_ray.lineage import AnswerRequest, EvaluationInputs
from mint_ray.records import Method
from mint_ray.stages import STAGES
from mint_ray.students.config import Student

Done = dict[str, Artifact]
"""Outputs of a run by the key of their step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One output of a run: the stage that writes it and the steps that it reads."""

    stage: str
    variant: str = ""
    """Distinguishes the outputs of a stage that writes several, such as the method of an answer."""
    artifact: Artifact
    needs: tuple[str, ...]
    """Keys of the steps that are complete before this one runs."""
    details: Any = None
    """`AnswerRequest` of a stage that loads a student, `EvaluationInputs` of `evaluate`, rankings of `pair`."""

    @property
    def key(self) -> str:
        """Name of the step within its run: `train`, `answer/aligned-rank`."""
        return f"{self.stage}/{self.variant}" if self.variant else self.stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One line of a plan."""

    key: str
    artifact: str
    """URI of the output."""
    state: Literal["complete", "resume", "run"]
    """`resume`: an earlier attempt was interrupted; its finished parts and checkpoints are used."""
    reasons: list[str]
    """Settings and inputs that differ from the most similar earlier output of the stage, and needed steps that run.
    Empty for a complete step."""


def plan_steps(config: PipelineConfig, last: str = "report") -> dict[str, Step]:
    """Return the steps that a run up to the stage `last` needs, by key, in order.

    Raises UserError for a missing input, and if the spec does not ask for the stage.
    """
    steps = _Steps(config).build()
    wanted = {key for key, step in steps.items() if step.stage == last}
    if not wanted:
        raise UserError(f"{last}: this spec has no such stage ({STAGES[last].rstrip('.')})")
    for key, step in reversed(steps.items()):
        if key in wanted:
            wanted.update(step.needs)
    return {key: step for key, step in steps.items() if key in wanted}


def explain_plan(config: PipelineConfig, last: str = "report") -> list[PlannedStep]:
    """Return every step of a run with its state and, for those that run, the reasons."""
    steps = plan_steps(config, last)
    names = storage.list_names(storage.absolute(config.root))
    unfinished = set(storage.list_names(storage.join(storage.absolute(config.root), RUNS)))
    planned: dict[str, PlannedStep] = {}
    for key, step in steps.items():
        name = step.artifact.name
        is_complete = name in names and step.artifact.is_complete
        reasons = [] if is_complete else _reasons(step, steps, names, planned)
        state: Any = "complete" if is_complete else "resume" if name in unfinished else "run"
        planned[key] = PlannedStep(key=key, artifact=step.artifact.uri, state=state, reasons=reasons)
    return list(planned.values())


def _reasons(step: Step, steps: Mapping[str, Step], names: list[str], planned: Mapping[str, PlannedStep]) -> list[str]:
    """Return why a step runs: what differs from the most similar finished output of its stage, and inputs that run."""
    reads = {steps[need].artifact.name for need in step.needs}
    found: list[list[str]] = []
    for name in names:
        uri = storage.join(step.artifact.root, name)
        if name.rpartition("-")[0] == step.stage and storage.exists(storage.join(uri, MANIFEST)):
            found.append(_differences(read_manifest(uri), step.artifact, reads))
    if not found:
        return ["no earlier output"]
    return [*min(found, key=len), *(f"{need} runs" for need in step.needs if planned[need].state != "complete")]


class _Steps:
    """Builder of the steps of one config, one method per phase of a run."""

    def __init__(self, config: PipelineConfig) -> None:
        self.config, self.root = config, config.root
        self.steps: dict[str, Step] = {}

    def build(self) -> dict[str, Step]:
        config = self.config
        records = self._records()
        fit = self._add("fit", lineage.fit(self.root, config.fit, records.artifact), records)
        scores = lineage.score(self.root, config.score, config.task, fit.artifact, records.artifact)
        score = self._add("score", scores, fit, records)
        shown = records
        if config.pair.control == "shuffled":
            shown = self._add("shuffle_images", lineage.shuffle_images(self.root, records.artifact), records)
        built = None
        if config.build_vlm is not None:
            artifact = lineage.build_vlm(self.root, config.build_vlm, shown.artifact)
            built = self._add("build_vlm", artifact, shown)
        train = self._train(shown, score, built)
        self._evaluate(shown, score, built, train)
        inputs = {key: step.artifact for key, step in self.steps.items()}
        self._add("report", lineage.report(self.root, config.title, inputs), *self.steps.values())
        return self.steps

    def _add(self, stage: str, artifact: Artifact, *needs: Step, variant: str = "", details: Any = None) -> Step:
        keys = tuple(dict.fromkeys(step.key for step in needs))
        step = Step(stage=stage, variant=variant, artifact=artifact, needs=keys, details=details)
        self.steps[step.key] = step
        return step

    def _records(self) -> Step:
        config = self.config
        records = self._add("prepare", lineage.prepare(self.root, config.prepare, config.task))
        if config.prepare.match_texts is None:
            return records
        texts = self._add("embed_texts", lineage.embed_texts(self.root, config.prepare, records.artifact), records)
        matched = lineage.match_texts(self.root, config.prepare, config.task, records.artifact, texts.artifact)
        return self._add("match_texts", matched, records, texts)

    def _train(self, shown: Step, score: Step, built: Step | None) -> Step:
        config, built_artifact = self.config, built.artifact if built else None
        rankings: dict[str | None, Step] = {}
        for uri in sorted(config.pair.sampler.required_students, key=str):
            request = self._ranking_request(uri, built_artifact)
            rankings[uri] = self._add(
                "rank",
                lineage.rank(self.root, request, shown.artifact),
                # the scores: a teacher below its gate ends the run before a student works
                *(step for step in (shown, score, built) if step),
                variant=request.adapter.name if request.adapter else "base",
                details=request,
            )
        ranked = {uri: step.artifact for uri, step in rankings.items()}
        pairs = lineage.pair(self.root, config.pair, config.task, shown.artifact, score.artifact, ranked)
        pair = self._add("pair", pairs, shown, score, *rankings.values(), details=ranked)
        students = [built] if built else []
        tokens = lineage.tokenize(self.root, config.train, pair.artifact, built_artifact)
        tokenize = self._add("tokenize", tokens, pair, *students)
        trained = lineage.train(self.root, config.train, tokenize.artifact, built_artifact)
        return self._add("train", trained, tokenize, *students)

    def _ranking_request(self, uri: str | None, built: Artifact | None) -> AnswerRequest:
        student, adapter = self.config.train.student, None
        if uri is not None:
            # a student of another run brings its own base weights
            adapter = find_artifact(uri, "train")
            student, built = lineage.trained_student(adapter)
        request = self._request(student, built, adapter)
        return dataclasses.replace(request, mode="rank", splits=("train", "validation"))

    def _evaluate(self, shown: Step, score: Step, built: Step | None, train: Step) -> None:
        config, root = self.config.evaluate, self.root
        answers: dict[Method, Step] = {}
        passages: dict[str, Step] = {}
        benchmarks: dict[str, Step] = {}
        retrieve = None
        if config.retrieval is not None:
            found = lineage.retrieve(root, config, self.config.task, shown.artifact)
            retrieve = self._add("retrieve", found, shown)
        requests: list[tuple[AnswerRequest, list[Step]]] = []
        for adapter in (None, train):
            needs = [step for step in (adapter, built) if step]
            request = self._request(
                self.config.train.student, built.artifact if built else None, adapter.artifact if adapter else None
            )
            student = request.method.student
            requests.append((request, needs))
            if retrieve is not None:
                chosen = lineage.choose_passages(root, config, request, shown.artifact, retrieve.artifact)
                shared = next((step for step in passages.values() if step.artifact == chosen), None)
                passages[student] = shared or self._add(
                    "choose_passages", chosen, shown, retrieve, *needs, variant=student, details=request
                )
                requests.append((dataclasses.replace(request, passages=chosen), [*needs, passages[student]]))
            if config.harness is not None:
                results = lineage.benchmark(root, config.harness, request)
                benchmarks[student] = self._add("benchmark", results, *needs, variant=student, details=request)
        for mode in config.generation.modes:
            for each, needs in requests:
                request = dataclasses.replace(each, mode=mode)
                answered = lineage.answer(root, request, shown.artifact)
                answers[request.method] = self._add(
                    "answer", answered, shown, *needs, variant=request.method.key, details=request
                )
        inputs = EvaluationInputs(
            records=shown.artifact,
            scores=score.artifact,
            student=train.artifact,
            answers={method: step.artifact for method, step in answers.items()},
            passages={student: step.artifact for student, step in passages.items()},
            benchmarks={student: step.artifact for student, step in benchmarks.items()},
        )
        metrics = lineage.evaluate(root, config, self.config.task, self.config.pair.sampler, inputs)
        steps = [shown, score, train, *passages.values(), *answers.values(), *benchmarks.values()]
        self._add("evaluate", metrics, *steps, details=inputs)

    def _request(self, student: Student, built: Artifact | None, adapter: Artifact | None) -> AnswerRequest:
        return AnswerRequest(
            student=student,
            built=built,
            adapter=adapter,
            generation=self.config.evaluate.generation,
            splits=(self.config.evaluate.split,),
            task=self.config.task,
            num_labels=self.config.pair.sampler.top,
        )


def _differences(earlier: Manifest, artifact: Artifact, reads: set[str]) -> list[str]:
    before, after = dict(iter_leaves(earlier.config)), dict(iter_leaves(artifact.config))
    changes = [
        f"{path}: {before.get(path, 'not set')!r} -> {after.get(path, 'not set')!r}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path)
    ]
    return changes + [
        f"{role} changed"
        for role in dict.fromkeys([*earlier.inputs, *artifact.inputs])
        if earlier.inputs.get(role) != artifact.inputs.get(role) and artifact.inputs.get(role) not in reads
    ]
