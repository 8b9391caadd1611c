"""The transformers class of a model, and configs of architectures that are registered here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mint_ray.config.loader import UserError
from mint_ray.models.architectures import auto_class, load_config
from mint_ray.models.pretrained import PretrainedModel
from tests.teachers.tiny_clip import save_tiny_clip
from tests.tiny import save_tiny_student
from tests.vision_students import save_tiny_vlm


def model(folder: Path) -> PretrainedModel:
    return PretrainedModel(model_id=folder.name, path=str(folder))


def test_text_and_vision_language_models_have_their_auto_class(tmp_path: Path) -> None:
    assert auto_class(model(save_tiny_student(tmp_path / "text"))) is AutoModelForCausalLM
    assert auto_class(model(save_tiny_vlm(tmp_path / "vlm"))) is AutoModelForImageTextToText


def test_a_model_of_images_that_generates_no_text_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_id: clip: a clip model does not generate text"):
        auto_class(model(save_tiny_clip(tmp_path / "clip")))


def test_an_unknown_architecture_is_rejected_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(UserError, match="unheard_of") as caught:
        load_config(model(tmp_path))
    assert "\n" not in str(caught.value)


def test_configs_of_convolutional_towers_load_only_after_they_are_registered(tmp_path: Path) -> None:
    # in its own process: registration lasts as long as the process
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mint_ray_convolutional_tower", "hidden_size": 7}))
    code = """
import sys
from transformers import AutoConfig
from mint_ray.models.architectures import load_config
from mint_ray.models.pretrained import PretrainedModel
import mint_ray.models.vision_towers
try:
    AutoConfig.from_pretrained(sys.argv[1])
except ValueError:
    print("unknown")
for _ in range(2):
    print(load_config(PretrainedModel(model_id="x", path=sys.argv[1])).hidden_size)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["unknown", "7", "7"]
