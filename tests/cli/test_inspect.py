from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from mint_ray.artifacts import open_artifact
from mint_ray.cli import main
from mint_ray.records import Label
from tests.cli.commands import FRAMEWORKS, HEAVY, TABLE_HEADER, imported_by, mint_ray, write_spec


@pytest.mark.parametrize(
    ("source", "task", "overrides", "expected"),
    [
        ("{kind: hpo}", "{kind: rare_disease}", ["train.trainer.objective.bta=1"], ["train.trainer.objective.bta: unknown key", "'beta'"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["train.trainer.objective.beta=big"], ["train.trainer.objective.beta", "'big'"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["prepare.source.kind=hop"], ["prepare.source.kind: got 'hop'", "'hpo'"]),
        ("{kind: phenopackets, uri: none.jsonl}", "{kind: rare_disease}", [], ["none.jsonl: no such file"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["train.student.model_id=/none/here"], ["/none/here"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["train.student.model_id=bundled:smol"], ["bundled:smol"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["score.ablate=[voice]"], ["score.ablate: got 'voice'", "face"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["train.student.dtype=bfloat16", "train.resources.zero_stage=2"], ["needs trainer.bf16"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["train.student.dtype=bfloat16", "train.student.lora_rank=null"], ["needs zero_stage"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["train.trainer.kind=trl"], ["objective.nll_on"]),
        ("{kind: hpo, num_diseases: 5}", "{kind: rare_disease}", ["pair.sampler={kind: hard, top: 3}"], ["top 3 and bottom 3", "5"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["pair.sampler={kind: sibling, temperature: -1}"], ["pair.sampler: temperature", "got -1"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["pair.sampler={kind: mixture, members: [{sampler: {kind: hard, top: 9}}]}"], ["pair.sampler: top is set by the mixture"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["pair.sampler={kind: on_policy, student: out/train-0123456789ab}"], ["out/train-0123456789ab: no manifest.json"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["evaluate.generation.modes=[rank]"], ["evaluate.generation: modes must include free and no mode twice, got rank"]),
        ("{kind: hpo}", "{kind: rare_disease, labels: {ids: ['OMIM:1']}}", ["pair.sampler={kind: hard, top: 1}"], ["1"]),
        ("{kind: hpo, patients_per_disease: 1, num_diseases: 6}", "{kind: rare_disease}", [], ["split is empty"]),
    ],
)  # fmt: skip
def test_invalid_input_gets_one_line_and_code_2_before_any_work(
    folder: Path,
    source: str,
    task: str,
    overrides: list[str],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # in this process, because a new one would spend most of its time on imports
    logger = logging.getLogger("mint_ray")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(logger, name, getattr(logger, name))
    monkeypatch.setattr(sys, "argv", ["mint-ray", "check", str(write_spec(folder, source, task)), *overrides])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "".join(lines)
    [line] = [line for line in lines if line.startswith("mint-ray:")]
    for part in expected:
        assert part in line


def test_check_rejects_a_spec_without_importing_torch_or_ray(folder: Path) -> None:
    done, modules = imported_by("check", str(write_spec(folder, "{kind: phenopackets, uri: none.jsonl}")))
    assert done.returncode == 2
    assert "none.jsonl: no such file" in done.stderr
    assert not modules & FRAMEWORKS


def test_check_imports_neither_torch_nor_ray(folder: Path) -> None:
    spec = write_spec(folder, "{kind: hpo}", more="pair: {sampler: {kind: hard, top: 2}}\n")
    done, modules = imported_by("check", str(spec))
    assert done.returncode == 0, done.stderr
    assert "estimate for records of" in done.stdout
    assert not modules & FRAMEWORKS


def test_layers_are_merged_in_order_and_an_invalid_one_is_named(folder: Path) -> None:
    layers = []
    for name, text in {
        "few.yaml": "prepare: {source: {num_diseases: 5}}",
        "two.yaml": "pair: {sampler: {kind: hard, top: 2}}",
        "bad.yaml": "train: {resources: {zero_stage: 4}}",
    }.items():
        (folder / name).write_text(text)
        layers += ["--with", str(folder / name)]
    path = str(write_spec(folder, "{kind: hpo}"))
    done = mint_ray("check", path, *layers[:4])
    assert done.returncode == 0, done.stderr
    assert "5 labels" in done.stdout
    done = mint_ray("check", *layers, path)
    assert done.returncode == 2
    assert (
        f"mint-ray: {folder / 'bad.yaml'}: train.resources.zero_stage: input should be 0, 1, 2 or 3, got 4"
        in done.stderr
    )


def test_check_estimates_the_memory_of_training_the_spec_s_student(folder: Path) -> None:
    from tests.llamas import LLAMAS

    large = folder / "llama"
    LLAMAS["1b"].save_pretrained(large)
    # the estimate reads config.json alone
    for name in ("model.safetensors", "tokenizer.json"):
        (large / name).touch()
    full = [f"train.student.model_id={large}", "train.student.lora_rank=null", "train.trainer.max_length=500"]
    spec = write_spec(folder, "{kind: hpo, num_diseases: 8}")
    done = mint_ray("check", str(spec), *full, "train.resources.gpus_per_worker=1")
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    # a prompt with its longest completion, and the other completion, of at most 96 tokens
    assert line.startswith("estimate for records of 596 tokens: ")
    # 1,235,814,400 weights in float32, each with a gradient and two moments
    assert "GB of GPU memory per training worker (weights 4.94, gradients 4.94, optimizer 9.89, " in line
    assert line.endswith("4.94 GB of host memory")


def test_invalid_rows_are_counted_up_to_max_bad_share(folder: Path) -> None:
    table = folder / "cases.csv"
    good = [f"r{i},g{i},OMIM:{i % 2},HP:0001250;HP:0001249" for i in range(38)]
    table.write_text(TABLE_HEADER + "\n".join([*good, "r0,g0,OMIM:1,HP:0001250", "r99,g99,OMIM:1,HP:0001250"]) + "\n")
    source = f"{{kind: table, uri: {table}}}"
    spec = str(write_spec(folder, source, more="pair: {sampler: {kind: hard, top: 1}}\n"))
    done = mint_ray("check", spec, "prepare.max_bad_share=0.1")
    assert done.returncode == 0, done.stderr
    assert "39 records" in done.stdout
    assert "duplicate_record_id 1" in done.stdout
    done = mint_ray("check", spec, "prepare.max_bad_share=0.01")
    assert done.returncode == 2
    assert "r0" in done.stderr
    assert "1 of 40 rows are bad, more than max_bad_share 0.01" in done.stderr


def test_verify_reports_a_changed_file_without_importing_torch_or_ray(tmp_path: Path) -> None:
    artifact = open_artifact(str(tmp_path), "prepare", {}, {})
    with artifact.write() as draft:
        draft.write_rows(Label, "labels", [Label(label_id="a", name="A")])
    done, modules = imported_by("verify", artifact.uri)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{artifact.uri}: ok; 1 files, 1 rows\n"
    assert not modules & HEAVY
    [part] = Path(artifact.uri).rglob("*.parquet")
    part.write_bytes(b"changed")
    done, _ = imported_by("verify", artifact.uri)
    assert done.returncode == 1
    assert part.name in done.stderr


@pytest.mark.parametrize("verb", ["run", "compare", "sweep"])
def test_the_schema_describes_every_field(verb: str) -> None:
    schema = json.loads(mint_ray("schema", "--verb", verb).stdout)
    bare = [
        f"{name}.{key}"
        for name, part in schema["$defs"].items()
        for key, field in part.get("properties", {}).items()
        if "description" not in field
        and "$ref" not in field
        and "allOf" not in field
        and key not in ("kind", "resources")
        and "discriminator" not in field
    ]
    assert bare == []
