"""Adapters of vision-language students: the components that are trained, and those that are frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mint_ray.config.loader import UserError
from mint_ray.layouts import Example
from mint_ray.layouts.concatenated import ConcatenatedLayout
from mint_ray.layouts.images import unwrap_model
from mint_ray.students.adapters import add_adapter, component_lookup, freeze_vision_tower
from mint_ray.students.config import Component, Student
from mint_ray.students.loading import load_model, load_processor, load_vision_processor, save_adapter
from tests.vision_students import FAMILIES, noise, save_tiny_vlm, tiny_vlm


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vlm(tmp_path_factory.mktemp("student"))


def example(student: Student) -> Example:
    vision_processor = load_vision_processor(student)
    assert vision_processor
    processed = vision_processor.process(noise(3), "noise")
    ids = vision_processor.tokenizer(f"this{processed.placeholder}is", add_special_tokens=False)["input_ids"]
    return Example(record_id="r", prompt_ids=ids, completions=[[5, 6], [7]], pairs=[(0, 1)], image=processed.inputs)


PROJECTORS = {
    "llava": "model.multi_modal_projector", "idefics3": "model.connector", "smolvlm": "model.connector",
    "qwen2_vl": "model.visual.merger", "qwen2_5_vl": "model.visual.merger",
    "gemma3": "model.multi_modal_projector", "mllama": "model.multi_modal_projector",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_belongs_to_a_component(family: str) -> None:
    model, _ = tiny_vlm(family)
    component_of = component_lookup(model)
    found: dict[Component, set[str]] = {"language": set(), "projector": set(), "vision": set()}
    for name, _ in model.named_parameters():
        found[component_of(name)].add(name)
    assert {name for name in found["projector"] if not name.startswith(PROJECTORS[family])} == set()
    assert found["projector"]
    assert {name.split(".")[1] for name in found["vision"]} <= {"vision_tower", "visual", "vision_model"}
    assert found["vision"]
    assert {name.split(".")[1] for name in found["language"]} <= {"language_model", "text_model", "weight"}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "mllama"])
@pytest.mark.parametrize(
    ("lora_components", "modules_to_save"),
    [
        (("language",), ("projector",)),
        (("language", "vision"), ()),
    ],
)
def test_the_named_components_are_trained_and_no_others(
    family: str, lora_components: tuple[Component, ...], modules_to_save: tuple[Component, ...]
) -> None:
    model, _ = tiny_vlm(family)
    component_of = component_lookup(model)
    components = {name: component_of(name) for name, _ in model.named_parameters()}
    student = Student(model_id="x", lora_rank=2, lora_components=lora_components, modules_to_save=modules_to_save)
    adapted = add_adapter(model, student, is_vlm=True)
    trained: dict[str, set[str]] = {"lora": set(), "full": set()}
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            own = name.removeprefix("base_model.model.")
            if "lora_" in own:
                trained["lora"].add(components[own.partition(".lora_")[0] + ".weight"])
            else:
                trained["full"].add(components[own.replace("modules_to_save.default.", "")])
    assert trained == {"lora": set(lora_components), "full": set(modules_to_save)}


def step(model: torch.nn.Module, student: Student) -> None:
    """Take one optimizer step with a large learning rate, in training mode."""
    model.train()
    layout = ConcatenatedLayout()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    layout.compute_logps(model, layout.collate([example(student)], score_prompt=False)).sums.sum().backward()
    optimizer.step()


def test_frozen_weights_stay_identical_and_get_no_gradient(folder: Path) -> None:
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
def test_the_projector_of_a_bfloat16_student_is_trained_in_float32(family: str, tmp_path: Path) -> None:
    student = Student(model_id=str(save_tiny_vlm(tmp_path, family)), lora_rank=2, dtype="bfloat16")
    model = load_model(student, trainable=True)
    step(model, student)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert any("modules_to_save" in name for name in trained)
    for name, weight in trained.items():
        assert weight.dtype == torch.float32, name
        assert weight.grad is not None, name
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}


def test_a_frozen_vision_tower_has_no_dropout_and_no_gradients_in_training(folder: Path) -> None:
    student = Student(model_id=str(folder), lora_rank=2)
    model = load_model(student, trainable=True).train()
    tower = unwrap_model(model).get_encoder("image")
    assert not any(module.training for module in tower.modules())
    assert model.training
    pixels = example(student).image
    assert pixels
    # gradient checkpointing makes the inputs of the first layer require gradients
    features = [tower(pixels.tensors["pixel_values"].clone().requires_grad_()).last_hidden_state for _ in range(2)]
    assert torch.equal(*features)  # its attention has a dropout of one half
    assert not features[0].requires_grad


def test_the_projector_inside_a_frozen_tower_is_trained() -> None:
    model, _ = tiny_vlm("qwen2_5_vl")
    adapted = add_adapter(model, Student(model_id="x", lora_rank=2), is_vlm=True).train()
    freeze_vision_tower(unwrap_model(adapted))
    tower = unwrap_model(adapted).get_encoder("image")
    assert not any(module.training for module in tower.blocks.modules())
    adapted.eval()
    adapted.train()
    assert not any(module.training for module in tower.blocks.modules())
    assert all(module.training for module in tower.merger.modules())
    pixels, grid = torch.randn(16, 384), torch.tensor([[1, 4, 4]])
    tower(pixels.requires_grad_(), grid_thw=grid).pooler_output.sum().backward()
    assert pixels.grad is None
    trained = {name for name, weight in adapted.named_parameters() if weight.grad is not None}
    assert trained
    assert all("merger.modules_to_save" in name for name in trained)


def test_a_trained_vision_tower_gets_gradients_in_its_first_layer(folder: Path) -> None:
    student = Student(model_id=str(folder), lora_rank=2, lora_components=("vision",), modules_to_save=())
    model = load_model(student, trainable=True)
    assert any(module.training for module in unwrap_model(model).get_encoder("image").modules())
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


def test_without_lora_every_weight_of_the_components_is_trained(folder: Path) -> None:
    model = load_model(Student(model_id=str(folder), lora_rank=None), trainable=True)
    component_of = component_lookup(model)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == (component_of(name) != "vision"), name


@pytest.mark.parametrize("lora_rank", [2, None])
def test_a_saved_student_computes_the_same_after_loading(folder: Path, tmp_path: Path, lora_rank: int | None) -> None:
    student = Student(model_id=str(folder), lora_rank=lora_rank)
    torch.manual_seed(0)
    model = load_model(student, trainable=True)
    step(model, student)
    save_adapter(model, load_processor(student), tmp_path / "adapter")
    layout = ConcatenatedLayout()
    batch = layout.collate([example(student)], score_prompt=False)
    with torch.no_grad():
        trained = layout.compute_logps(model.eval(), batch).token_logps
        loaded = layout.compute_logps(load_model(student, adapter=tmp_path / "adapter"), batch).token_logps
        base = layout.compute_logps(load_model(student), batch).token_logps
    torch.testing.assert_close(loaded, trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base, trained, atol=1e-2)
    assert (tmp_path / "adapter" / "processor_config.json").is_file()


def test_target_modules_that_match_no_layer_are_rejected(folder: Path) -> None:
    student = Student(model_id=str(folder), lora_rank=2, target_modules=r".*vision_tower.*q_proj")
    with pytest.raises(UserError, match="matches no layer of language"):
        load_model(student, trainable=True)
