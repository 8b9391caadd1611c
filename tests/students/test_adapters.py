"""What a student that sees learns, and what of it stays exactly as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mint_ray.config.loader import UserError
from mint_ray.layouts import Example
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.images import inner_model
from mint_ray.students import Student, load_model, load_processor, load_sight, save_adapter
from mint_ray.students.adapters import lay_adapter, rest, tell_parts
from mint_ray.students.config import Part
from tests.vision_students import FAMILIES, noise, save_tiny_seeing, tiny_seeing


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_seeing(tmp_path_factory.mktemp("student"))


def example(student: Student) -> Example:
    sight = load_sight(student)
    assert sight
    view = sight.view(noise(3), "noise")
    ids = sight.tokenizer(f"this{view.slot}is", add_special_tokens=False)["input_ids"]
    return Example(record_id="r", prompt_ids=ids, completions=[[5, 6], [7]], pairs=[(0, 1)], image=view.image)


PROJECTORS = {
    "llava": "model.multi_modal_projector", "idefics3": "model.connector", "smolvlm": "model.connector",
    "qwen2_vl": "model.visual.merger", "qwen2_5_vl": "model.visual.merger",
    "gemma3": "model.multi_modal_projector", "mllama": "model.multi_modal_projector",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_a_part(family: str) -> None:
    model, _ = tiny_seeing(family)
    part_of = tell_parts(model)
    found: dict[Part, set[str]] = {"language": set(), "projector": set(), "vision": set()}
    for name, _ in model.named_parameters():
        found[part_of(name)].add(name)
    assert {name for name in found["projector"] if not name.startswith(PROJECTORS[family])} == set()
    assert found["projector"]
    assert {name.split(".")[1] for name in found["vision"]} <= {"vision_tower", "visual", "vision_model"}
    assert found["vision"]
    assert {name.split(".")[1] for name in found["language"]} <= {"language_model", "text_model", "weight"}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "mllama"])
@pytest.mark.parametrize(
    ("lora_parts", "whole_parts"),
    [
        (("language",), ("projector",)),
        (("language", "vision"), ()),
    ],
)
def test_the_parts_that_are_named_learn_and_no_other(
    family: str, lora_parts: tuple[Part, ...], whole_parts: tuple[Part, ...]
) -> None:
    model, _ = tiny_seeing(family)
    part_of = tell_parts(model)
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    student = Student(model_id="x", lora_rank=2, lora_parts=lora_parts, whole_parts=whole_parts)
    adapted = lay_adapter(model, student, sees=True)
    learning: dict[str, set[str]] = {"lora": set(), "whole": set()}
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            own = name.removeprefix("base_model.model.")
            if "lora_" in own:
                learning["lora"].add(parts[own.partition(".lora_")[0] + ".weight"])
            else:
                learning["whole"].add(parts[own.replace("modules_to_save.default.", "")])
    assert learning == {"lora": set(lora_parts), "whole": set(whole_parts)}


def step(model: torch.nn.Module, student: Student) -> None:
    """One step of a wild optimiser, in training mode."""
    model.train()
    layout = ConcatenatedLayout()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    layout.run(model, layout.lay_out([example(student)], score_prompt=False)).sums_C.sum().backward()
    optimizer.step()


def test_what_does_not_learn_stays_bit_by_bit_and_is_given_no_gradient(folder: Path) -> None:
    student = Student(model_id=str(folder), lora_rank=2)
    model = load_model(student, trainable=True)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    step(model, student)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (weight.grad is not None), name
        if not weight.requires_grad:
            assert torch.equal(weight, before[name]), name
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("lora_B" in name for name in moved)
    assert any("modules_to_save" in name for name in moved)


@pytest.mark.parametrize("family", ["llava", "idefics3", "gemma3", "mllama"])
def test_a_projector_is_stepped_on_in_float32_beside_a_bfloat16_student(family: str, tmp_path: Path) -> None:
    student = Student(model_id=str(save_tiny_seeing(tmp_path, family)), lora_rank=2, dtype="bfloat16")
    model = load_model(student, trainable=True)
    step(model, student)
    learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("modules_to_save" in name for name in learning)
    for name, weight in learning.items():
        assert weight.dtype == torch.float32, name
        assert weight.grad is not None, name
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}


def test_what_sees_rests_in_training_without_dropout_or_activations(folder: Path) -> None:
    student = Student(model_id=str(folder), lora_rank=2)
    model = load_model(student, trainable=True).train()
    tower = inner_model(model).get_encoder("image")
    assert not any(module.training for module in tower.modules())
    assert model.training
    pixels = example(student).image
    assert pixels
    # gradients are asked for from the first layer on by whoever recomputes activations
    features = [tower(pixels.inputs["pixel_values"].clone().requires_grad_()).last_hidden_state for _ in range(2)]
    assert torch.equal(*features)  # its attention has a dropout of one half
    assert not features[0].requires_grad


def test_the_projector_learns_inside_a_tower_that_rests() -> None:
    model, _ = tiny_seeing("qwen2_5_vl")
    adapted = lay_adapter(model, Student(model_id="x", lora_rank=2), sees=True).train()
    rest(inner_model(adapted))
    tower = inner_model(adapted).get_encoder("image")
    assert not any(module.training for module in tower.blocks.modules())
    adapted.eval()
    adapted.train()
    assert not any(module.training for module in tower.blocks.modules())
    assert all(module.training for module in tower.merger.modules())
    pixels, grid = torch.randn(16, 384), torch.tensor([[1, 4, 4]])
    tower(pixels.requires_grad_(), grid_thw=grid).pooler_output.sum().backward()
    assert pixels.grad is None
    learning = {name for name, weight in adapted.named_parameters() if weight.grad is not None}
    assert learning
    assert all("merger.modules_to_save" in name for name in learning)


def test_what_sees_learns_where_it_is_told_to_down_to_its_first_layer(folder: Path) -> None:
    student = Student(model_id=str(folder), lora_rank=2, lora_parts=("vision",), whole_parts=())
    model = load_model(student, trainable=True)
    assert any(module.training for module in inner_model(model).get_encoder("image").modules())
    step(model, student)
    assert any(
        "layers.0" in name and weight.grad.abs().max() > 0
        for name, weight in model.named_parameters()
        if weight.grad is not None
    )
    grads = {
        name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.abs().max() > 0
    }
    assert grads
    assert all("vision_tower" in name for name in grads)


def test_without_a_rank_every_weight_of_the_parts_learns(folder: Path) -> None:
    model = load_model(Student(model_id=str(folder), lora_rank=None), trainable=True)
    part_of = tell_parts(model)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (part_of(name) != "vision"), name


@pytest.mark.parametrize("lora_rank", [2, None])
def test_what_was_trained_sees_the_same_after_saving(folder: Path, tmp_path: Path, lora_rank: int | None) -> None:
    student = Student(model_id=str(folder), lora_rank=lora_rank)
    torch.manual_seed(0)
    model = load_model(student, trainable=True)
    step(model, student)
    save_adapter(model, load_processor(student), tmp_path / "adapter")
    layout = ConcatenatedLayout()
    batch = layout.lay_out([example(student)], score_prompt=False)
    with torch.no_grad():
        trained = layout.run(model.eval(), batch).token_logps_N
        loaded = layout.run(load_model(student, adapter=tmp_path / "adapter"), batch).token_logps_N
        base = layout.run(load_model(student), batch).token_logps_N
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base, trained, atol=1e-2)
    assert (tmp_path / "adapter" / "processor_config.json").is_file()


def test_a_pattern_that_names_no_layer_of_the_parts_is_refused(folder: Path) -> None:
    student = Student(model_id=str(folder), lora_rank=2, target_modules=r".*vision_tower.*q_proj")
    with pytest.raises(UserError, match="names no layer of language"):
        load_model(student, trainable=True)


@pytest.mark.parametrize(
    ("parts", "message"),
    [({"lora_parts": ()}, "must name a part, got none"), ({"whole_parts": ("language",)}, "both name language")],
)
def test_parts_that_make_no_sense_are_refused(parts: dict[str, tuple[Part, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Student(model_id="x", **parts)  # type: ignore[arg-type]
