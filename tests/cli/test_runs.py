from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mint_ray.cli import VERBS, cli, main
from mint_ray.config.loader import dump, from_data, load
from mint_ray.config.specs import config_class
from tests.specs import verb_of

JOBS = sorted((Path(__file__).parent.parent / "jobs").glob("*.yaml"))
HEAVY = {"torch", "ray", "transformers", "trl", "peft", "deepspeed", "optuna"}


def mint_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from mint_ray.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def spec(folder: Path, source: str, task: str = "{kind: rare_disease}", more: str = "") -> Path:
    path = folder / "spec.yaml"
    student = folder / "student"
    path.write_text(
        f"root: {folder / 'out'}\ntask: {task}\nprepare: {{source: {source}}}\n"
        f"train: {{student: {{model_id: {student}}}}}\n{more}"
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import save_tiny_student

    place = tmp_path_factory.mktemp("cli")
    save_tiny_student(place / "student")
    return place


@pytest.mark.parametrize("module", ["mint_ray.config.pipeline", "mint_ray.cli"])
def test_configs_and_the_command_line_load_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {sorted(HEAVY)!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_shipped_spec_loads(path: Path) -> None:
    cls = config_class(verb_of(path))
    config = load(cls, path)
    assert from_data(cls, dump(config)) == config


@pytest.mark.parametrize("verb", ["run", "compare", "sweep"])
def test_schema_describes_every_field(verb: str) -> None:
    done = mint_ray("schema", "--verb", verb)
    schema = json.loads(done.stdout)
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


ROWS = "record_id,group_id,label_id,phenotypes\n"


@pytest.mark.parametrize(
    ("source", "task", "overrides", "expected"),
    [
        ("{kind: hpo}", "{kind: rare_disease}", ["train.trainer.objective.bta=1"], ["train.trainer.objective.bta: unknown key", "'beta'"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["train.trainer.objective.beta=big"], ["train.trainer.objective.beta", "'big'"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["prepare.source.kind=hop"], ["prepare.source.kind: got 'hop'", "'hpo'"]),
        ("{kind: phenopackets, uri: none.jsonl}", "{kind: rare_disease}", [], ["none.jsonl: no such file"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["train.student.model_id=/none/here"], ["/none/here"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["train.student.model_id=bundled:smol"], ["bundled:smol"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["score.without=[voice]"], ["score.without: got 'voice'", "face"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["train.student.dtype=bfloat16", "train.resources.zero_stage=2"], ["needs trainer.bf16"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["train.student.dtype=bfloat16", "train.student.lora_rank=null"], ["needs zero_stage"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["train.trainer.kind=trl"], ["objective.nll_on"]),
        ("{kind: hpo, diseases: 5}", "{kind: rare_disease}", ["pair.sampler={kind: hard, top: 3}"], ["top 3 and bottom 3", "5"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["pair.sampler={kind: sibling, temperature: -1}"], ["pair.sampler: temperature", "got -1"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["pair.sampler={kind: mixture, members: [{sampler: {kind: hard, top: 9}}]}"], ["pair.sampler: top is the mixture's to say, 3; its hard says 9"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["pair.sampler={kind: on_policy, student: out/train-0123456789ab}"], ["out/train-0123456789ab: no manifest.json"]),
        ("{kind: hpo}", "{kind: rare_disease}", ["evaluate.generation.modes=[rank]"], ["evaluate.generation: modes must name free, and each mode once, got rank"]),
        ("{kind: hpo}", "{kind: rare_disease, labels: {ids: ['OMIM:1']}}", ["pair.sampler={kind: hard, top: 1}"], ["1"]),
        ("{kind: hpo, patients_per_disease: 1, diseases: 6}", "{kind: rare_disease}", [], ["split is empty"]),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_code_2_before_any_work(
    folder: Path,
    source: str,
    task: str,
    overrides: list[str],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # in this process, for most of a process' time goes into imports
    logger = logging.getLogger("mint_ray")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(logger, name, getattr(logger, name))
    monkeypatch.setattr(sys, "argv", ["mint-ray", "check", str(spec(folder, source, task)), *overrides])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "".join(lines)
    [line] = [line for line in lines if line.startswith("mint-ray:")]
    for part in expected:
        assert part in line


def test_layers_are_laid_over_the_spec_in_order_and_a_bad_one_is_named(folder: Path) -> None:
    layers = []
    for name, text in {
        "few.yaml": "prepare: {source: {diseases: 5}}",
        "two.yaml": "pair: {sampler: {kind: hard, top: 2}}",
        "bad.yaml": "train: {resources: {zero_stage: 4}}",
    }.items():
        (folder / name).write_text(text)
        layers += ["--with", str(folder / name)]
    path = str(spec(folder, "{kind: hpo}"))
    done = mint_ray("check", path, *layers[:4])
    assert done.returncode == 0, done.stderr
    assert "5 labels" in done.stdout
    done = mint_ray("check", *layers, path)
    assert done.returncode == 2
    assert (
        f"mint-ray: {folder / 'bad.yaml'}: train.resources.zero_stage: input should be 0, 1, 2 or 3, got 4"
        in done.stderr
    )


@pytest.mark.parametrize("verb", [*VERBS, "check", "compare"])
def test_every_verb_that_takes_a_spec_takes_layers(verb: str, folder: Path) -> None:
    result = CliRunner().invoke(cli, [verb, str(folder / "spec.yaml"), "--with", str(folder / "none.yaml")])
    assert str(result.exception).endswith("none.yaml: no such file")


def test_check_estimates_the_memory_of_training_for_the_student_at_hand(folder: Path) -> None:
    from tests.llamas import LLAMAS

    large = folder / "llama"
    LLAMAS["1b"].save_pretrained(large)
    # what lies in the other files is not read
    for name in ("model.safetensors", "tokenizer.json"):
        (large / name).touch()
    full = [f"train.student.model_id={large}", "train.student.lora_rank=null", "train.trainer.max_length=500"]
    done = mint_ray("check", str(spec(folder, "{kind: hpo, diseases: 8}")), *full, "train.resources.gpus_per_worker=1")
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    # a prompt with its longest answer, and the other answer, of at most 96 tokens
    assert line.startswith("estimated, for records of 596 tokens: a training worker takes ")
    # 1,235,814,400 weights in float32, each with a gradient and two moments
    assert "of GPU (weights 4.94, gradients 4.94, optimizer 9.89, " in line
    assert line.endswith("its machine holds 4.94 GB for it")


def test_the_object_is_the_last_line_whatever_is_printed_at_exit(folder: Path) -> None:
    table = folder / "few.csv"
    table.write_text(ROWS + "\n".join(f"r{i},g{i},OMIM:{i % 2},HP:0001250" for i in range(12)) + "\n")
    path = spec(folder, f"{{kind: table, uri: {table}}}", more="pair: {sampler: {kind: hard, top: 1}}\n")
    code = "import atexit; atexit.register(print, 'late'); from mint_ray.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "prepare", str(path), "--json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("late\n")
    assert list(json.loads(done.stdout.splitlines()[-1])["artifacts"]) == ["prepare"]


def test_rows_that_are_bad_are_counted_until_there_are_too_many(folder: Path) -> None:
    table = folder / "cases.csv"
    good = [f"r{i},g{i},OMIM:{i % 2},HP:0001250;HP:0001249" for i in range(38)]
    table.write_text(ROWS + "\n".join([*good, "r0,g0,OMIM:1,HP:0001250", "r99,g99,OMIM:1,HP:0001250"]) + "\n")
    source = f"{{kind: table, uri: {table}}}"
    sampler = "pair: {sampler: {kind: hard, top: 1}}\n"
    done = mint_ray("check", str(spec(folder, source, more=sampler)), "prepare.max_bad_share=0.1")
    assert done.returncode == 0, done.stderr
    assert "39 records" in done.stdout
    assert "duplicate_record_id 1" in done.stdout
    done = mint_ray("check", str(spec(folder, source, more=sampler)), "prepare.max_bad_share=0.01")
    assert done.returncode == 2
    assert "r0" in done.stderr
    assert "1 of 40 rows are bad, more than max_bad_share 0.01" in done.stderr
