"""Features of frozen encoders are cached, and the random numbers of an epoch do not depend on the sharding."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mint_ray.config.loader import UserError
from mint_ray.records import Phenotype, Record
from mint_ray.teachers.config import Fusion, FusionImage
from mint_ray.teachers.fusion import feature_cache
from mint_ray.teachers.fusion.feature_cache import EpochRandomness, FeatureCache
from mint_ray.teachers.fusion.features import ModalityEncoders
from tests.encoders import SIZE, save_tiny_vit

TERMS = ("HP:0001166", "HP:0001083", "HP:0001631", "HP:0009777")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cache")
    save_tiny_vit(folder / "vit")
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def make_records(folder: Path) -> list[Record]:
    """Return four training records and two validation records, each with an image and four phenotypes."""
    return [
        Record(
            record_id=f"r{number}",
            group_id=f"g{number}",
            split="train" if number < 4 else "validation",
            image_uri=str(folder / f"{number}.png"),
            phenotypes=[Phenotype(id=term, label="") for term in TERMS],
        )
        for number in range(6)
    ]


def make_cache(folder: Path, records: list[Record] | None = None, **settings: Any) -> FeatureCache:
    image = {"num_augmentations": 3} | {key: settings.pop(key) for key in ("trainable",) if key in settings}
    config = Fusion(image=FusionImage(model_id=str(folder / "vit"), **image), phenotypes=True, **settings)
    records = make_records(folder) if records is None else records
    cache = FeatureCache(
        ModalityEncoders.fit(config, [record for record in records if record.split == "train"]), records
    )
    cache.build(0.5, lambda done, total: None)
    return cache


def make_epoch(cache: FeatureCache, epoch: int = 0) -> EpochRandomness:
    return EpochRandomness(cache.encoders.config, epoch, cache.inputs, cache.num_train, range(cache.num_train))


def test_a_frozen_encoder_runs_once_per_version_of_an_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(folder)
    assert cache.features["image"].shape[0] == 6
    assert cache.augmented_features["image"].shape[:2] == (4, 2)
    direct = cache.encoders.encode("image", cache.inputs, range(6), cache.read_images(range(6)))
    torch.testing.assert_close(cache.features["image"], direct)
    versions = torch.cat([cache.features["image"][:4, None], cache.augmented_features["image"]], dim=1)
    monkeypatch.setattr(cache.encoders, "encode", lambda *arguments: pytest.fail("the encoder ran again"))
    seen = set()
    for epoch in range(12):
        features = cache.get_features(range(4), make_epoch(cache, epoch))["image"]
        for row in range(4):
            distances = (versions[row] - features[row]).abs().amax(dim=1)
            assert float(distances.min()) == 0
            seen.add((row, int(distances.argmin())))
    assert seen == {(row, version) for row in range(4) for version in range(3)}


def test_a_trained_encoder_is_not_cached_but_its_images_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(folder, trainable="last:1")
    assert not cache.features
    assert sorted(cache.pixels) == list(range(6))
    first, second = (cache.get_features([0, 1], make_epoch(cache, epoch))["image"] for epoch in (0, 1))
    assert not torch.allclose(first, second)
    monkeypatch.setattr(feature_cache, "MAX_PIXEL_BYTES", 2 * 3 * SIZE**2)
    assert len(make_cache(folder, trainable="last:1").pixels) == 2


def test_unreadable_images_are_counted_and_too_many_are_an_error(folder: Path) -> None:
    records = make_records(folder)
    records[1] = dataclasses.replace(records[1], image_uri=str(folder / "missing.png"))
    cache = make_cache(folder, records)
    progress: list[tuple[int, int]] = []
    usable, reasons = cache.build(0.5, lambda done, total: progress.append((done, total)))
    assert (usable, dict(reasons)) == ([0, 2, 3, 4, 5], {"image_missing": 1})
    assert progress == [(6, 6)]
    with pytest.raises(
        UserError, match=r"missing\.png.*1 of 6 records .* more than max_bad_share 0\.1: image_missing 1"
    ):
        cache.build(0.1, lambda done, total: None)


def test_an_input_that_no_training_record_has_is_an_error(folder: Path) -> None:
    records = make_records(folder)
    records = [dataclasses.replace(record, image_uri=None) for record in records[:4]] + records[4:]
    with pytest.raises(UserError, match=r"fusion\.image: no training record has this input"):
        make_cache(folder, records)


def test_a_modality_is_never_hidden_from_a_record_without_another_one(folder: Path) -> None:
    records = make_records(folder)
    records[0] = dataclasses.replace(records[0], phenotypes=[])
    cache = make_cache(folder, records, modality_dropout=0.9)
    for epoch in range(30):
        hidden = make_epoch(cache, epoch).hidden
        assert not hidden[0, 0]
        assert not hidden.all(dim=1).any()
    present = cache.get_present([0, 1], torch.tensor([[False, False], [True, False]]))
    assert {name: mask.tolist() for name, mask in present.items()} == {
        "image": [True, False],
        "phenotypes": [False, True],
    }


def test_phenotypes_are_dropped_at_the_rate_on_average_and_one_remains(folder: Path) -> None:
    cache = make_cache(folder, phenotype_dropout=0.3)
    phenotypes, systems = cache.inputs.phenotypes[0], cache.encoders.phenotypes.organ_systems
    kept = [len(make_epoch(cache, epoch).drop_phenotypes(0, phenotypes, systems)) for epoch in range(400)]
    assert min(kept) >= 1
    assert set(kept) == {1, 2, 3, 4}
    assert len(cache.inputs.phenotypes[0]) == 4
    none = make_cache(folder, phenotype_dropout=0.0)
    assert make_epoch(none).drop_phenotypes(0, phenotypes, systems) is phenotypes


def test_the_random_numbers_of_an_epoch_are_reproducible(folder: Path) -> None:
    cache = make_cache(folder)
    first, again, other = make_epoch(cache), make_epoch(cache), make_epoch(cache, 1)
    assert first.order == again.order
    assert sorted(first.order) == [0, 1, 2, 3]
    torch.testing.assert_close(first.augmentation, again.augmentation)
    torch.testing.assert_close(first.dropout_mask(4, 8), again.dropout_mask(4, 8))
    assert not torch.equal(first.augmentation, other.augmentation)
    mask = make_epoch(cache).dropout_mask(1_000, 8)
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.1)
