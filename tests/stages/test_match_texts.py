"""Images are given the nearest text of another source, and no held-out image one that training can see."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from mint_ray import storage
from mint_ray.artifacts import Artifact, open_artifact, read_part, verify
from mint_ray.config.loader import UserError
from mint_ray.config.stages import PairTexts, PairTextsResources, Prepare, Splits
from mint_ray.models.pretrained import identity_of
from mint_ray.records import Label, Record, from_table
from mint_ray.sources.config import Table
from mint_ray.stages.embed_texts import EmbedActor, Part, Text, draw_split, fold, gather_texts, select_texts
from mint_ray.stages.match_texts import ImageDecoder, PairActor, check_texts, find_nearest, pair_texts
from mint_ray.stages.prepare import prepare_records, select_records
from mint_ray.stages.report import source_notes
from mint_ray.tasks.config import AnyTask, ImageLabel, NamedLabel, RareDisease
from mint_ray.teachers.config import TwoTowers
from mint_ray.teachers.two_tower import TwoTowerEncoder
from tests.teachers.clips import MEAN, SIZE, STD, TOKENS, save_tiny_clip
from tests.tiny import save_tiny_student

pytestmark = [pytest.mark.ray]

LABELS = ("mel", "nv", "bcc")
NAMES = tuple(NamedLabel(label_id=label, name=name) for label, name in zip(LABELS, ("a", "b", "c"), strict=True))
SPLITS = ("train", "train", "validation", "test")
IMAGES, TEXTS, ROWS_PER_PART = 16, 40, 6
BROKEN, MISSING, HAS_TEXT, NO_IMAGE = 3, 5, 8, 9


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_images(folder: Path, labels: Mapping[int, str] | None = None, name: str = "images.jsonl") -> Path:
    """Sixteen records, one of which has a text of its own, one no image, and two an image that cannot be read."""
    rows = []
    for number in range(IMAGES):
        image = folder / f"{number}.png"
        draw = np.random.default_rng(number)
        Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(image)
        if number == BROKEN:
            image.write_bytes(b"not an image")
        if number == MISSING:
            image.unlink()
        row: dict[str, Any] = {
            "record_id": f"r{number:02d}",
            "group_id": f"g{number}",
            "label_id": (labels or {}).get(number, LABELS[number % 3]),
            "split": SPLITS[number % 4],
            "image_uri": str(image),
        }
        if number == NO_IMAGE:
            del row["image_uri"]
        if number in (HAS_TEXT, NO_IMAGE):
            row["text"] = f"The own words of {number}."
        rows.append(row)
    return write_rows(folder / name, rows)


def write_texts(folder: Path, name: str = "texts.jsonl", **more: str) -> Path:
    words = ["dark", "pale", "round", "ragged", "large", "small", "blue", "flat", "raised"]
    rows = []
    for number in range(TEXTS):
        some = np.random.default_rng(2000 + number).permutation(words)[:5]
        rows.append({"record_id": f"t{number:02d}", "group_id": f"p{number // 2}", "text": " ".join(some)})
    return write_rows(folder / name, rows + [{"record_id": key, "text": text} for key, text in more.items()])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_images(folder)
    # the words of t00 in another dress, the own words of a record, and what says nothing
    first = json.loads(write_texts(folder).read_text().split("\n")[0])["text"]
    write_texts(folder, t98=f" {first.upper()}! ", t97="the OWN words of 8", t99="...")
    return folder


def configure(
    data: Path, clip: Path, *, images: str = "images.jsonl", texts: str = "texts.jsonl", **more: Any
) -> Prepare:
    return Prepare(
        source=Table(uri=str(data / images)),
        splits=Splits(validation=0.3, test=0.3),
        rows_per_part=ROWS_PER_PART,
        pair_texts=PairTexts(
            source=Table(uri=str(data / texts)), encoder=TwoTowers(model_id=str(clip)), **more
        ),
    )  # fmt: skip


TASK = ImageLabel(names=NAMES)


def run(root: Path, config: Prepare, task: AnyTask = TASK) -> Artifact:
    return pair_texts(str(root), config, task, prepare_records(str(root), config, task))


@pytest.fixture(scope="module")
def paired(ray_cluster: None, data: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(tmp_path_factory.mktemp("root"), configure(data, clip))


def pair_alone(root: Path, config: Prepare, task: AnyTask = TASK) -> tuple[list[Record], Counter[str]]:
    """What the actors make of it one after the other in this process, and what they count."""
    pairing = config.pair_texts
    assert pairing is not None
    records = prepare_records(str(root), config, task)
    texts = gather_texts(str(root), config, records)
    embedded, artifact = (open_artifact(str(root), stage, {"alone": True}, {}) for stage in ("embed", "prepare"))
    with embedded.write() as draft:
        for file in texts.table_files("texts"):
            part = Part(path=file.path.replace("texts", "embeddings"), uri=texts.file_uri(file.path))
            draft.placed += EmbedActor(embedded, pairing.encoder).work(part).files
    actor = PairActor(artifact, pairing, task, records.rows(Label, "labels"), texts, embedded)
    decoder = ImageDecoder(TwoTowerEncoder(pairing.encoder).frame)
    rows: list[Record] = []
    dropped: Counter[str] = Counter()
    for file in records.table_files("records"):
        part = Part(path=file.path, uri=records.file_uri(file.path))
        dropped.update(actor.work(part, decoder.work(part)).dropped)
        rows += from_table(Record, read_part(artifact.file_uri(file.path)))
    return rows, dropped


def pool(data: Path, clip: Path) -> list[Text]:
    config = configure(data, clip)
    return select_texts(config, select_records(config, TASK).records)[0]


@torch.no_grad()
def compare_one_by_one(clip: Path, images: list[str], texts: list[str]) -> torch.Tensor:
    """Cosine of each image and each text, as the published model computes it."""
    model, tokenizer = AutoModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    looks, reads = [], []
    for image in images:
        values = (np.asarray(Image.open(image)).astype(np.float64) / 255 - MEAN) / STD
        pixels = torch.tensor(values, dtype=torch.float32).permute(2, 0, 1)[None]
        looks.append(model.get_image_features(pixel_values=pixels).pooler_output)
    for text in texts:
        tokens = tokenizer([text], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
        reads.append(model.get_text_features(**tokens).pooler_output)
    return torch.nn.functional.cosine_similarity(torch.stack(looks), torch.cat(reads)[None], dim=-1)


def test_each_image_has_the_text_that_the_model_itself_finds_nearest_in_its_split(
    paired: Artifact, data: Path, clip: Path
) -> None:
    texts = pool(data, clip)
    given = [record for record in paired.rows(Record, "records") if "text_id" in record.fields]
    assert len(given) == IMAGES - 4
    cosines = compare_one_by_one(clip, [record.image_uri or "" for record in given], [text.text for text in texts])
    for record, row in zip(given, cosines.tolist(), strict=True):
        similar = {text: value for text, value in zip(texts, row, strict=True) if text.split == record.split}
        best = max(similar, key=lambda text: similar[text])
        assert record.fields["text_id"] == best.text_id
        assert record.text == best.text
        assert float(record.fields["text_similarity"]) == pytest.approx(similar[best], abs=1e-4)
    assert len({record.fields["text_id"] for record in given}) > 3


def test_records_that_need_no_text_or_whose_image_cannot_be_read_stay_as_they_were(
    paired: Artifact, data: Path, clip: Path
) -> None:
    before = select_records(configure(data, clip), TASK).records
    after = paired.rows(Record, "records")
    for number in (BROKEN, MISSING, HAS_TEXT, NO_IMAGE):
        assert after[number] == before[number]
    for old, new in zip(before, after, strict=True):
        assert dataclasses.replace(new, text=old.text, fields=old.fields) == old
    assert paired.manifest.dropped["without text: image_missing"] == 1
    assert paired.manifest.dropped["without text: image_unknown_format"] == 1
    assert [file.rows for file in paired.table_files("records")] == [6, 6, 4]
    assert [label.label_id for label in paired.rows(Label, "labels")] == list(LABELS)
    assert verify(paired.uri) == []


def test_what_was_done_is_counted(paired: Artifact) -> None:
    counts = paired.manifest.counts
    given = [record for record in paired.rows(Record, "records") if "text_id" in record.fields]
    assert counts["records_given_text"] == len(given)
    assert counts["texts_given"] == len({record.fields["text_id"] for record in given})
    assert (counts["records_train"], counts["records_validation"], counts["records_test"]) == (8, 4, 4)
    assert (counts["texts"], counts["groups"], counts["labels"]) == (TEXTS, IMAGES, 3)
    assert paired.manifest.dropped["texts: same_wording"] == 2
    assert paired.manifest.dropped["texts: no_text"] == 1
    cosines = [float(record.fields["text_similarity"]) for record in given]
    assert paired.manifest.metrics["text_similarity"]["mean"] == pytest.approx(np.mean(cosines), abs=1e-4)


def test_no_wording_and_no_group_of_texts_is_in_two_splits(paired: Artifact, data: Path, clip: Path) -> None:
    splits_of: dict[str, set[str]] = {}
    for text in pool(data, clip):
        splits_of.setdefault(text.group_id, set()).add(text.split)
        splits_of.setdefault(fold(text.text), set()).add(text.split)
    assert all(len(splits) == 1 for splits in splits_of.values())
    seen: dict[str, set[str]] = {}
    for record in paired.rows(Record, "records"):
        if record.text is not None:
            seen.setdefault(fold(record.text), set()).add(record.split)
    assert all(len(splits) == 1 for splits in seen.values())


def test_a_group_of_texts_falls_by_its_name_and_the_seed_in_the_shares_asked_for() -> None:
    names = [f"p{number}" for number in range(4000)]
    shares = Splits(validation=0.1, test=0.3)
    drawn = [draw_split(name, shares, 0) for name in names]
    assert drawn.count("validation") / 4000 == pytest.approx(0.1, abs=0.02)
    assert drawn.count("test") / 4000 == pytest.approx(0.3, abs=0.03)
    assert drawn != [draw_split(name, shares, 1) for name in names]


def test_texts_of_a_group_that_records_have_fall_where_these_are(data: Path, clip: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_texts(tmp_path).read_text().splitlines()]
    for number, row in enumerate(rows[:IMAGES]):
        row["group_id"] = f"g{number}"
    write_rows(tmp_path / "texts.jsonl", rows)
    config = dataclasses.replace(
        configure(data, clip),
        pair_texts=PairTexts(
            source=Table(uri=str(tmp_path / "texts.jsonl")), encoder=TwoTowers(model_id=str(clip))
        ),
    )  # fmt: skip
    texts, _ = select_texts(config, select_records(config, TASK).records)
    assert [text.split for text in texts[:IMAGES]] == [SPLITS[number % 4] for number in range(IMAGES)]


def test_of_texts_as_near_as_each_other_the_first_is_taken() -> None:
    texts_MD = np.array([[0.0, 1.0], [0.6, 0.8], [1.0, 0.0], [0.6, 0.8 + 1e-9]])
    images_ND = np.array([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0], [np.sqrt(0.5), -np.sqrt(0.5)]])
    places, cosines = find_nearest(images_ND, texts_MD)
    assert places == [1, 2, 0, 2]
    assert cosines == pytest.approx([1, 1, 1, np.sqrt(0.5)], abs=1e-6)


def test_images_compared_in_many_blocks_have_what_each_has_alone() -> None:
    draw = np.random.default_rng(0)
    images_ND, texts_MD = draw.normal(size=(150, 8)), draw.normal(size=(31, 8))
    places, _ = find_nearest(images_ND, texts_MD)
    assert places == [int(np.argmax([image_D @ text_D for text_D in texts_MD])) for image_D in images_ND]


def test_another_run_in_one_process_makes_the_same_rows(
    paired: Artifact, data: Path, clip: Path, tmp_path: Path
) -> None:
    rows, _ = pair_alone(tmp_path, configure(data, clip))
    assert rows == paired.rows(Record, "records")


def test_other_resources_make_the_same_artifact(paired: Artifact, data: Path, clip: Path) -> None:
    resources = PairTextsResources(actors=2, cpus_per_actor=0.5, decode_cpus=0.25, decode_tasks=2)
    again = run(Path(paired.root), configure(data, clip, resources=resources))
    assert again.name == paired.name
    assert again.manifest.config["prepare"]["pair_texts"]["resources"]["actors"] == 1


def test_the_report_says_whose_texts_these_are(data: Path, clip: Path) -> None:
    config = configure(data, clip)
    assert source_notes(dataclasses.replace(config, pair_texts=None)) == []
    assert [str(clip) in note for note in source_notes(config)] == [True]


def test_labels_dealt_out_otherwise_change_no_text_and_a_floor_leaves_out_what_lies_below(
    paired: Artifact, data: Path, clip: Path, tmp_path: Path
) -> None:
    write_images(data, {number: LABELS[(number * 7 + 1) % 3] for number in range(IMAGES)}, "dealt.jsonl")
    before = paired.rows(Record, "records")
    cosines = sorted(float(record.fields["text_similarity"]) for record in before if record.fields)
    floor = (cosines[3] + cosines[4]) / 2
    after, dropped = pair_alone(tmp_path, configure(data, clip, images="dealt.jsonl", least_similarity=floor))
    assert [record.label_id for record in after] != [record.label_id for record in before]
    for old, new in zip(before, after, strict=True):
        near = bool(old.fields) and float(old.fields["text_similarity"]) >= floor
        kept = (old.text, old.fields) if near or not old.fields else (None, {})
        assert (new.text, new.fields) == kept
    assert dropped["without text: below_least_similarity"] == 4


def test_a_record_whose_new_text_names_its_label_in_the_note_is_left_out(clip: Path, tmp_path: Path) -> None:
    write_images(tmp_path, {number: "OMIM:163950" if number % 2 else "OMIM:130070" for number in range(IMAGES)})
    rows = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    for row in rows:
        row["label_name"] = "Noonan syndrome" if row["label_id"] == "OMIM:163950" else "Marfan syndrome"
    write_rows(tmp_path / "images.jsonl", rows)
    texts = [{"record_id": f"t{i:02d}", "text": f"A child with Noonan syndrome, seen {i} times."} for i in range(20)]
    write_rows(tmp_path / "texts.jsonl", texts)
    made, dropped = pair_alone(tmp_path / "root", configure(tmp_path, clip), RareDisease())
    left = [row["record_id"] for row in rows]
    gone = [f"r{n:02d}" for n in range(IMAGES) if n % 2 and n not in (BROKEN, MISSING, HAS_TEXT, NO_IMAGE)]
    assert [record.record_id for record in made] == [key for key in left if key not in gone]
    assert dropped["note_names_diagnosis"] == len(gone)


def test_the_same_records_are_read_with_and_without_pairing(paired: Artifact, data: Path, clip: Path) -> None:
    config = configure(data, clip)
    plain = prepare_records(paired.root, dataclasses.replace(config, pair_texts=None), TASK)
    assert prepare_records(paired.root, config, TASK).name == plain.name
    assert paired.manifest.inputs["records"] == plain.name
    assert pair_texts(paired.root, dataclasses.replace(config, pair_texts=None), TASK, plain) == plain


def test_texts_and_encoder_are_part_of_what_the_records_are_known_by(paired: Artifact, data: Path, clip: Path) -> None:
    inputs = paired.manifest.inputs
    assert inputs["encoder"] == identity_of(str(clip), None)
    for name in ("images.jsonl", "texts.jsonl"):
        assert inputs[str(data / name)] == storage.sha256(str(data / name))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"^prepare\.pair_texts: .*ages\.csv:2: record 'a' has nothing in any of text, .* \(1 of 1 rows are bad"),
        ({"fields.age": "age"}, r"^prepare\.pair_texts: .*ages\.csv: text: none of its 1 rows has one$"),
    ],
)
def test_a_table_without_a_text_is_named(
    data: Path, clip: Path, tmp_path: Path, columns: dict[str, str], message: str
) -> None:
    (tmp_path / "ages.csv").write_text("record_id,age\na,P3Y\n")
    config = configure(data, clip)
    assert config.pair_texts is not None
    source = Table(uri=str(tmp_path / "ages.csv"), columns=columns)
    config = dataclasses.replace(config, pair_texts=dataclasses.replace(config.pair_texts, source=source))
    with pytest.raises(UserError, match=message):
        select_texts(config, select_records(config, TASK).records)


def test_a_mapped_text_column_that_is_not_there_is_named(data: Path, clip: Path) -> None:
    config = configure(data, clip)
    assert config.pair_texts is not None
    source = Table(uri=str(data / "texts.jsonl").replace("jsonl", "csv"), columns={"text": "report"})
    Path(source.uri).write_text("record_id,text\na,b\n")
    config = dataclasses.replace(config, pair_texts=dataclasses.replace(config.pair_texts, source=source))
    with pytest.raises(UserError, match=r"texts\.csv: no column 'report'; found record_id, text$"):
        select_texts(config, select_records(config, TASK).records)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_id": "x"}, r"record 'r00': fields\.text_id: is there already, with 'x'"),
        ({"text": "t"}, r"no record has an image and no text, so there is nothing to pair"),
    ],
)
def test_records_that_cannot_be_paired_are_named(data: Path, clip: Path, changes: dict[str, str], message: str) -> None:
    config = configure(data, clip)
    records = [
        dataclasses.replace(record, text=changes["text"])
        if "text" in changes
        else dataclasses.replace(record, fields=changes)
        for record in select_records(config, TASK).records
    ]
    with pytest.raises(UserError, match=message):
        select_texts(config, records)


def test_a_split_for_which_there_is_no_text_is_named(data: Path, clip: Path) -> None:
    config = dataclasses.replace(configure(data, clip), splits=Splits(validation=0, test=0.3))
    with pytest.raises(UserError, match="texts falls to the validation split, whose 4 records need some"):
        select_texts(config, select_records(config, TASK).records)


def test_an_unknown_model_and_one_without_two_towers_are_named_before_any_work(data: Path, tmp_path: Path) -> None:
    nowhere, llama = (
        configure(data, place).pair_texts for place in (tmp_path / "nowhere", save_tiny_student(tmp_path / "llama"))
    )
    assert nowhere is not None
    assert llama is not None
    with pytest.raises(UserError, match=r"^prepare\.pair_texts: model_id: no folder '.*nowhere'; a model of the Hub"):
        check_texts(nowhere)
    with pytest.raises(UserError, match="llama is no model of the CLIP family: no vision_config"):
        check_texts(llama)
