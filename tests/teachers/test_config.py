"""Invalid settings of teachers are errors that name key and value; renamed keys and placeholders name the new one."""

from __future__ import annotations

from typing import Any

import pytest

from mint_ray.config.loader import UserError, from_data
from mint_ray.teachers.config import Clip, Ensemble, Fusion, Generative, Imported, Ontology, TwoTower

ONTOLOGY = {"teacher": {"kind": "ontology"}}


def error_of(cls: type[Any], data: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        from_data(cls, data)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("cls", "data", "new"),
    [
        (Ontology, {"unknown_frequency": 0.5}, "default_frequency"),
        (Generative, {"model_id": "m", "shows_image": True}, "show_image"),
        (Generative, {"model_id": "m", "normalise": "sum"}, "length_normalization"),
        (Clip, {"model_id": "m", "c": 1.0}, "inverse_regularization"),
        (Fusion, {"findings": True}, "phenotypes"),
        (Fusion, {"phenotypes": True, "width": 8}, "hidden_size"),
        (Fusion, {"phenotypes": True, "finding_dropout": 0.4}, "phenotype_dropout"),
        (Fusion, {"phenotypes": True, "epochs": 20}, "num_train_epochs"),
        (Fusion, {"phenotypes": True, "patience": 5}, "early_stopping_patience"),
        (Fusion, {"phenotypes": True, "batch_size": 32}, "train_batch_size"),
        (Fusion, {"image": {"copies": 4}}, "num_augmentations"),
        (Fusion, {"image": {"train": "all"}}, "trainable"),
        (Fusion, {"text": {"train": "all"}}, "trainable"),
        (Fusion, {"joint": {"model_id": "m", "copies": 4}}, "num_augmentations"),
        (Fusion, {"image": {"augmentation": {"flip": False}}}, "horizontal_flip"),
        (Fusion, {"image": {"augmentation": {"turn": False}}}, "rotate90"),
        (Fusion, {"image": {"augmentation": {"crop": 1.0}}}, "min_crop_scale"),
        (Fusion, {"image": {"augmentation": {"colour": 0.0}}}, "color_jitter"),
    ],
)
def test_a_renamed_key_is_an_error_that_names_the_new_one(cls: type[Any], data: dict[str, Any], new: str) -> None:
    assert f"did you mean {new!r}?" in error_of(cls, data)


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (Ontology, {"default_frequency": 0.0}, "default_frequency must be above 0 and at most 1, got 0.0"),
        (Ontology, {"absent_weight": -1.0}, "absent_weight must not be negative, got -1.0"),
        (Generative, {"model_id": "m", "revision": "main"}, "revision must be a commit of 40 hexadecimal digits, got 'main'"),
        (Generative, {"model_id": "m", "prompt": "{image}"}, "unknown placeholder {image}; known: {text}, {phenotypes}"),
        (Generative, {"model_id": "m", "prompt": "{findings}"}, "unknown placeholder {findings}; did you mean {phenotypes}?"),
        (Generative, {"model_id": "m", "prompt": "{absent}"}, "did you mean {excluded_phenotypes}?"),
        (Generative, {"model_id": "m", "prompt": "Which?"}, "prompt: no placeholder for a part of the record"),
        (Clip, {"model_id": "m", "revision": "main"}, "revision must be a commit of 40 hexadecimal digits, got 'main'"),
        (Clip, {"model_id": "m", "templates": []}, "templates must not be empty"),
        (Clip, {"model_id": "m", "templates": ["a photo"]}, "expected one {} for the label's name, got 'a photo'"),
        (Clip, {"model_id": "m", "text_template": "{image}"}, "text_template: unknown placeholder {image}"),
        (Clip, {"model_id": "m", "text_weight": 1.0}, "text_weight must be between 0 and 1, got 1.0"),
        (Clip, {"model_id": "m", "inverse_regularization": 0.0}, "must be positive and finite, got 0.0"),
        (Clip, {"model_id": "m", "max_bytes": 0}, "max_bytes must be positive, got 0"),
        (TwoTower, {"model_id": "m", "max_pixels": 0}, "max_pixels must be positive, got 0"),
        (Fusion, {}, "no input; give image, text, joint, fields or phenotypes"),
        (Fusion, {"phenotypes": True, "hidden_size": 0}, "hidden_size must be positive, got 0"),
        (Fusion, {"phenotypes": True, "learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        (Fusion, {"phenotypes": True, "dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        (Fusion, {"phenotypes": True, "max_bad_share": 2.0}, "max_bad_share must be between 0 and 1, got 2.0"),
        (Fusion, {"image": {"trainable": "some"}}, "trainable must be frozen, all or last:N, got 'some'"),
        (Fusion, {"image": {"num_augmentations": 0}}, "num_augmentations must be positive, got 0"),
        (Fusion, {"image": {"pooling": "first"}}, "input should be 'mean', 'cls' or 'pooler', got 'first'"),
        (Fusion, {"image": {"augmentation": {"min_crop_scale": 0.0}}}, "min_crop_scale must be above 0 and at most 1"),
        (Fusion, {"image": {"augmentation": {"color_jitter": 1.0}}}, "color_jitter must be at least 0 and below 1"),
        (Fusion, {"image": {}, "joint": {"model_id": "m"}}, "joint reads image and text itself"),
        (Fusion, {"text": {"template": "{gene}"}}, "template: unknown placeholder {gene}"),
        (Imported, {"path": "package.module"}, "path must be package.module:Class, got 'package.module'"),
        (Ensemble, {"members": [ONTOLOGY]}, "members must be two or more, got 1"),
        (Ensemble, {"members": [ONTOLOGY | {"weight": 0}] * 2}, "weight must be positive and finite, got 0"),
        (Ensemble, {"members": [ONTOLOGY | {"temperature": -1}] * 2}, "temperature must be positive and finite, got -1"),
        (Ensemble, {"members": [ONTOLOGY | {"weight": 1}] * 2, "weights": "learned"}, "learned, but a member has a weight"),
        (Ensemble, {"members": [{"teacher": {"kind": "ontolgy"}}] * 2}, "got 'ontolgy'; did you mean 'ontology'?"),
    ],
)  # fmt: skip
def test_invalid_settings_are_named(cls: type[Any], data: dict[str, Any], message: str) -> None:
    # an ensemble of two invalid members has two lines
    with pytest.raises(UserError) as caught:
        from_data(cls, data)
    assert message in str(caught.value)
