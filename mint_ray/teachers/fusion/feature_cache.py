"""Cache of the features of frozen encoders, and the random numbers of an epoch.

Tested by tests/teachers/fusion/test_teacher.py and tests/teachers/fusion/test_feature_cache.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from mint_ray.config.loader import UserError
from mint_ray.images import REASONS, ImageError, Images, Pixels, read_images
from mint_ray.records import Record
from mint_ray.teachers.config import Fusion
from mint_ray.teachers.fusion.augmentation import NUM_DRAWS
from mint_ray.teachers.fusion.distributed import all_reduce_sum, device, shard
from mint_ray.teachers.fusion.features import TABULAR, ModalityEncoders, RecordInputs
from mint_ray.teachers.fusion.tabular import Columns

Tensor = torch.Tensor

MAX_PIXEL_BYTES = 4_000_000_000
"""Maximum size of the decoded images that a process caches between epochs; others are read again."""
ROWS_PER_PASS = 32
"""Records in one forward and backward pass of a trained encoder; gradients are accumulated over a step."""


class FeatureCache:
    """Features of the records to train and validate on: cached for frozen encoders, computed for trained ones."""

    def __init__(self, encoders: ModalityEncoders, records: Sequence[Record]) -> None:
        """Read everything but the images; records of the training split come first.

        Raises:
            UserError: No training record has one of the modalities.
        """
        self.encoders = encoders
        self.inputs: RecordInputs = encoders.read_records(records)
        self.num_train = sum(record.split == "train" for record in records)
        self.features: dict[str, Tensor] = {}
        """Features (N, size) of each frozen encoder."""
        self.augmented_features: dict[str, Tensor] = {}
        """Features (training records, num_augmentations - 1, size) of augmented images, of each frozen encoder."""
        self.pixels: dict[int, Pixels] = {}
        for modality in encoders.names:
            if not bool(self.inputs.present[modality][: self.num_train].any()):
                raise UserError(f"fusion.{modality}: no training record has this input")

    def build(
        self, max_bad_share: float, report_progress: Callable[[int, int], None]
    ) -> tuple[list[int], Counter[str]]:
        """Read every image once and cache the features of frozen encoders.

        Args:
            max_bad_share: Maximum share of records whose image cannot be read.
            report_progress: Function called with the numbers of records done and in total, of this process's share.

        Returns:
            The rows that can be used, and the number of the others by reason.

        Raises:
            UserError: More than `max_bad_share` of the records have an unreadable image; it names the first one.
        """
        frozen = [name for name in self.encoders.names if name not in TABULAR and not self.encoders.is_trainable(name)]
        num_records, draws = len(self.inputs.records), self._allocate(frozen)
        failures = torch.zeros(num_records, len(REASONS), device=device())
        first_error = ""
        own_rows = shard(range(num_records))
        for start in range(0, len(own_rows), ROWS_PER_PASS):
            rows = own_rows[start : start + ROWS_PER_PASS]
            images = self.read_images(rows)
            for row, image in zip(rows, images, strict=True):
                if isinstance(image, ImageError):
                    failures[row, REASONS.index(image.reason)] = 1
                    first_error = first_error or str(image)
            for modality in frozen:
                self._cache_features(modality, rows, images, draws)
            report_progress(start + len(rows), len(own_rows))
        for tensor in (*self.features.values(), *self.augmented_features.values(), failures):
            all_reduce_sum(tensor)
        reasons = Counter(
            {reason: int(failures[:, i].sum()) for i, reason in enumerate(REASONS) if failures[:, i].any()}
        )
        if reasons.total() > max_bad_share * num_records:
            counts = ", ".join(f"{reason} {number}" for reason, number in sorted(reasons.items()))
            raise UserError(
                f"{first_error or 'fusion'} ({reasons.total()} of {num_records} records have an image that cannot be "
                f"read, more than max_bad_share {max_bad_share:g}: {counts})"
            )
        failed = failures.any(dim=1).tolist()
        return [row for row in range(num_records) if not failed[row]], reasons

    def read_images(self, rows: Sequence[int]) -> list[Pixels | ImageError | None]:
        """Return the images of some rows; those of trained encoders are cached as long as there is room."""
        frame = self.encoders.frame
        if frame is None:
            return [None] * len(rows)
        missing = [row for row in rows if row not in self.pixels]
        images = read_images([self.inputs.records[row].image_uri for row in missing], frame)
        found: dict[int, Pixels | ImageError | None] = dict(zip(missing, images, strict=True))
        if any(self.encoders.is_trainable(name) for name in ("image", "joint") if name in self.encoders.names):
            room = MAX_PIXEL_BYTES // (3 * frame.size**2) - len(self.pixels)
            decoded = [(row, image) for row, image in found.items() if isinstance(image, np.ndarray)]
            self.pixels |= dict(decoded[: max(room, 0)])
        return [found[row] if row in found else self.pixels[row] for row in rows]

    def get_features(self, rows: Sequence[int], epoch: EpochRandomness | None) -> dict[str, Tensor]:
        """Return the features of some rows for each modality; augmented if the randomness of an epoch is given."""
        features: dict[str, Tensor] = {}
        images: list[Pixels | ImageError | None] | None = None
        for modality in self.encoders.names:
            if modality in self.features:
                features[modality] = self._cached(modality, rows, epoch)
            elif modality == "phenotypes" and epoch is not None:
                systems = self.encoders.phenotypes.organ_systems if self.encoders.phenotypes else frozenset()
                kept = [epoch.drop_phenotypes(row, self.inputs.phenotypes[row], systems) for row in rows]
                features[modality] = self.encoders.encode_phenotypes(kept)
            elif modality in TABULAR:
                features[modality] = self.encoders.encode(modality, self.inputs, rows, [])
            else:
                images = images if images is not None else self.read_images(rows)
                draws = None if epoch is None or modality == "text" else epoch.augmentation[list(rows)]
                features[modality] = self.encoders.encode(modality, self.inputs, rows, images, draws)
        return features

    def get_present(self, rows: Sequence[int], hidden: Tensor | None = None) -> dict[str, Tensor]:
        """Return the mask (rows,) of each modality; `hidden` (rows, modalities) hides some of them."""
        masks = {}
        for k, modality in enumerate(self.encoders.names):
            mask = self.inputs.present[modality][list(rows)]
            masks[modality] = (mask if hidden is None else mask & ~hidden[:, k]).to(device())
        return masks

    def _allocate(self, frozen: Sequence[str]) -> Tensor:
        """Allocate the cache; return the random numbers (training records, augmentations, NUM_DRAWS) of the images."""
        image_config = self.encoders.config.image or self.encoders.config.joint
        num_augmented = 0 if image_config is None else image_config.num_augmentations - 1
        for modality in frozen:
            size = self.encoders.feature_size(modality)
            self.features[modality] = torch.zeros(len(self.inputs.records), size, device=device())
            if modality != "text" and num_augmented:
                self.augmented_features[modality] = torch.zeros(self.num_train, num_augmented, size, device=device())
        generator = torch.Generator().manual_seed(self.encoders.config.seed)
        return torch.rand(self.num_train, max(num_augmented, 1), NUM_DRAWS, generator=generator)

    @torch.no_grad()
    def _cache_features(self, modality: str, rows: Sequence[int], images: Images, draws: Tensor) -> None:
        self.features[modality][rows] = self.encoders.encode(modality, self.inputs, rows, images)
        train = [k for k, row in enumerate(rows) if row < self.num_train]
        if modality not in self.augmented_features or not train:
            return
        train_rows, train_images = [rows[k] for k in train], [images[k] for k in train]
        for i in range(self.augmented_features[modality].shape[1]):
            self.augmented_features[modality][train_rows, i] = self.encoders.encode(
                modality, self.inputs, train_rows, train_images, draws[train_rows, i]
            )

    def _cached(self, modality: str, rows: Sequence[int], epoch: EpochRandomness | None) -> Tensor:
        features = self.features[modality][list(rows)]
        if epoch is None or modality not in self.augmented_features:
            return features
        # one of the cached versions, the first of which is the original
        num_versions = self.augmented_features[modality].shape[1] + 1
        version = (epoch.augmentation[list(rows), 0] * num_versions).long().to(device())
        augmented = self.augmented_features[modality][list(rows), (version - 1).clamp(min=0)]
        return torch.where((version > 0)[:, None], augmented, features)


class EpochRandomness:
    """All random numbers of one epoch, the same in every process and for any sharding of the records."""

    def __init__(self, config: Fusion, epoch: int, inputs: RecordInputs, num_train: int, rows: Sequence[int]) -> None:
        """Draw the numbers.

        Args:
            config: Settings of the teacher.
            epoch: Number of the epoch, from 0.
            inputs: Inputs of all records, training records first.
            num_train: Number of training records.
            rows: Training records to learn from.
        """
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch + 1)
        self.config, self.epoch = config, epoch
        self.order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        self.augmentation = torch.rand(num_train, NUM_DRAWS, generator=generator)
        modalities = list(inputs.present)
        hidden = torch.rand(num_train, len(modalities), generator=generator) < config.modality_dropout
        # one of the modalities that a record has, chosen at random, is never hidden
        priority = torch.rand(num_train, len(modalities), generator=generator)
        present = torch.stack([inputs.present[modality][:num_train] for modality in modalities], dim=1)
        hidden[torch.arange(num_train), (priority * present).argmax(dim=1)] = False
        self.hidden = hidden
        """Modalities hidden from the network, (training records, modalities)."""
        self.phenotype_share = torch.rand(num_train, generator=generator)
        """Relative share of phenotypes to drop, (training records,)."""
        self.generator = generator

    def drop_phenotypes(self, row: int, phenotypes: list[Columns], organ_systems: frozenset[int]) -> list[Columns]:
        """Return a record's phenotypes without some of them, as after a shorter examination; one always remains.

        Either any of them are dropped, or all but those of one organ system, or those of that system.
        """
        rate = self.config.phenotype_dropout
        if not rate or len(phenotypes) < 2:
            return phenotypes
        rng = np.random.default_rng([self.config.seed, self.epoch, row])
        if rng.random() < rate:
            systems = [organ_systems.intersection(columns.tolist()) for columns in phenotypes]
            system = systems[rng.integers(len(phenotypes))]
            keep_system = rng.random() < 0.5
            kept = [
                columns
                for columns, own_systems in zip(phenotypes, systems, strict=True)
                if bool(system & own_systems) == keep_system
            ]
            return kept or phenotypes
        # uniform between none and twice the rate, so that the mean is the rate
        dropped = rng.random(len(phenotypes)) < 2 * rate * float(self.phenotype_share[row])
        dropped[rng.integers(len(phenotypes))] = False
        return [columns for columns, drop in zip(phenotypes, dropped, strict=True) if not drop]

    def dropout_mask(self, num_rows: int, hidden_size: int) -> Tensor | None:
        """Return the factors (num_rows, hidden_size) of the fused features of a step; None without dropout.

        Not nn.Dropout: every process computes a share of the rows of the same mask.
        """
        if not self.config.dropout:
            return None
        kept = torch.rand(num_rows, hidden_size, generator=self.generator) >= self.config.dropout
        return (kept / (1 - self.config.dropout)).to(device())
