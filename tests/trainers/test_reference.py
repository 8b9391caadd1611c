"""Log-probabilities under the base student are those of its plain forward pass, independent of batching."""

from __future__ import annotations

import pytest
import torch

from mint_ray.layouts import Example
from mint_ray.students.config import Student
from mint_ray.students.loading import load_model
from mint_ray.trainers.config import TrainerArguments, TrainResources
from mint_ray.trainers.reference import ReferenceModel
from tests.tiny import save_tiny_student

EXAMPLES = [
    Example(record_id="a", prompt_ids=[1, 50, 60, 70], completions=[[5, 6, 7], [8], [9, 10]], pairs=[(0, 1), (0, 2)]),
    Example(record_id="b", prompt_ids=[1, 20], completions=[[30, 31], [32]], pairs=[(0, 1)]),
    Example(record_id="c", prompt_ids=list(range(1, 40)), completions=[[41, 42]], pairs=[(0, 0)]),
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    torch.set_num_threads(1)
    return Student(model_id=str(save_tiny_student(tmp_path_factory.mktemp("student"))))


@pytest.mark.parametrize("resources", [{}, {"per_device_eval_batch_size": 2}, {"max_tokens_per_row": 64}])
def test_each_completion_has_its_log_probability_under_the_base_student(
    student: Student, resources: dict[str, int]
) -> None:
    model = load_model(student)
    found = ReferenceModel(student, TrainerArguments(), TrainResources(**resources)).add_reference_logps(EXAMPLES)  # type: ignore[arg-type]
    assert [example.record_id for example in found] == ["a", "b", "c"]
    for example, before in zip(found, EXAMPLES, strict=True):
        assert example.completions == before.completions
        for completion, logp in zip(example.completions, example.reference_logps or [], strict=True):
            ids = torch.tensor([example.prompt_ids + completion])
            with torch.no_grad():
                logps_TV = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), dim=-1)
            expected = logps_TV.gather(1, ids[0, 1:, None])[-len(completion) :].sum()
            assert logp == pytest.approx(float(expected), rel=1e-5)


def test_the_reference_model_computes_in_the_precision_of_the_trainer(student: Student) -> None:
    exact, rounded = (
        ReferenceModel(student, TrainerArguments(bf16=bf16), TrainResources())
        .add_reference_logps(EXAMPLES)[0]
        .reference_logps
        or []
        for bf16 in (False, True)
    )
    model = load_model(student)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits_TV = model(input_ids=torch.tensor([[1, 50, 60, 70, 8]])).logits[0, :-1].float()
    expected = float(torch.log_softmax(logits_TV, dim=-1)[-1, 8])
    assert rounded[1] == pytest.approx(expected, abs=0.02)
    assert rounded != exact


def test_no_examples_give_no_examples(student: Student) -> None:
    assert ReferenceModel(student, TrainerArguments(), TrainResources()).add_reference_logps([]) == []
