"""Export an aligned student in the format of the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mint_ray import lineage, storage
from mint_ray.artifacts import Manifest, find_artifact, read_manifest
from mint_ray.config.loader import UserError
from mint_ray.exports.pairs import check_empty
from mint_ray.models.pretrained import check_model
from mint_ray.reports.dataset_card import CARD
from mint_ray.reports.model_card import render_model_card


def export_student(uri: str, to: str, *, merge: bool, evaluated: str | None = None) -> None:
    """Write the student of a train artifact with its tokenizer and a model card, for `from_pretrained`.

    Args:
        uri: URI of a train artifact.
        to: URI of a new or empty folder.
        merge: Merge the adapter into the base weights, which must be available; otherwise write the adapter alone.
        evaluated: URI of an evaluate artifact of this student, whose metrics are included in the model card.

    Raises:
        UserError: It is another artifact, the target is not empty, or the base weights are not those of the training.
    """
    manifest = read_manifest(uri)
    if manifest.stage != "train":
        hint = "; to export pairs, set a format" if manifest.stage == "pair" else ""
        raise UserError(f"{uri}: expected a train artifact, got a {manifest.stage} artifact{hint}")
    student, built = lineage.trained_student(find_artifact(uri, "train"))
    if student.lora_rank is None and not merge:
        raise UserError(f"{uri}: the student was trained in full and has no adapter")
    name = storage.absolute(uri).rpartition("/")[2]
    evaluation = _read_evaluation(evaluated, name) if evaluated else None
    check_empty(to)
    needs_merge = merge and student.lora_rank is not None
    if needs_merge:
        if built is None:
            check_model(student)
        if lineage.student_identity(student, built) != manifest.inputs["student"]:
            raise UserError(f"model_id: {student.model_id}: its weights are not those that {name} was trained on")
    with tempfile.TemporaryDirectory(prefix="mint-ray-") as scratch:
        trained, folder = Path(scratch) / "trained", Path(scratch) / "student"
        storage.download_folder(storage.join(uri, "adapter"), str(trained))
        if needs_merge:
            from mint_ray.students.loading import load_model, load_processor, save_adapter

            base = lineage.resolve_student(student, built)
            save_adapter(load_model(base, adapter=trained), load_processor(base), folder)
        else:
            trained.rename(folder)
        card = render_model_card(uri, manifest, merged=merge, evaluate=evaluation)
        (folder / CARD).write_text(card, encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        # the card is uploaded after the files that it describes
        for path in sorted(files, key=lambda path: path.name == CARD):
            storage.upload(str(path), storage.join(to, path.relative_to(folder).as_posix()))


def _read_evaluation(uri: str, student: str) -> Manifest:
    manifest = read_manifest(uri)
    if manifest.stage != "evaluate" or manifest.inputs["student"] != student:
        raise UserError(f"{uri}: not an evaluation of {student}")
    return manifest
