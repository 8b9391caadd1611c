"""Features of records: one vector per modality, from a tabular encoder or a pretrained one.

Tested by tests/teachers/fusion/test_teacher.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mint_ray.images import Frame, ImageError, Images, Pixels
from mint_ray.records import Record
from mint_ray.teachers.config import Augmentation, Fusion
from mint_ray.teachers.fusion.distributed import device
from mint_ray.teachers.fusion.encoders import (
    Encoder,
    ImageEncoder,
    JointEncoder,
    PaddingTokenizer,
    TextEncoder,
    load_preprocessor,
)
from mint_ray.teachers.fusion.tabular import Columns, FieldsEncoder, PhenotypeEncoder
from mint_ray.teachers.templates import render_nonempty

Tensor = torch.Tensor

ROWS_PER_PASS = {"cpu": 4, "cuda": 64}
"""Images or texts in one pass of an encoder, by device. A pass is always padded to this size, so that the features of a
record do not depend on its batch. It is small on a CPU, to keep the activations in the cache."""

TABULAR = ("fields", "phenotypes")
"""Modalities without a pretrained encoder, whose features are scaled by their own encoder."""


@dataclasses.dataclass(frozen=True)
class RecordInputs:
    """Inputs of some records ahead of the pretrained encoders; images are read later."""

    records: Sequence[Record]
    present: dict[str, Tensor]
    """Mask (N,) of the records that have it, for each modality."""
    fields: Tensor | None
    """Features of the coded fields, (N, size)."""
    phenotypes: list[list[Columns]]
    """Columns that each phenotype of each record sets."""
    tokens: list[list[int] | None]
    """Token ids of each record's text."""


class ModalityEncoders(nn.Module):
    """The tabular and pretrained encoders of the modalities that the settings name."""

    def __init__(self, config: Fusion, fields: FieldsEncoder | None, phenotypes: PhenotypeEncoder | None) -> None:
        super().__init__()
        self.config, self.fields, self.phenotypes = config, fields, phenotypes
        self._feature_sizes: dict[str, int] = {}
        self.image = None if config.image is None else ImageEncoder(config.image, load_preprocessor(config.image))
        self.text = None if config.text is None else TextEncoder(config.text)
        self.joint = None if config.joint is None else JointEncoder(config.joint, load_preprocessor(config.joint))

    @classmethod
    def fit(cls, config: Fusion, records: Sequence[Record]) -> ModalityEncoders:
        """Return the encoders, with the tabular ones fitted on the records of the training split."""
        fields = FieldsEncoder.fit(config.fields, records) if config.fields else None
        return cls(config, fields, PhenotypeEncoder.fit(records) if config.phenotypes else None)

    @property
    def names(self) -> list[str]:
        """Names of the modalities, in a fixed order."""
        return modality_names(self.config)

    @property
    def frame(self) -> Frame | None:
        """Form of the images; None if no encoder reads them."""
        encoder = self.image or self.joint
        return None if encoder is None else encoder.preprocessor.frame

    @property
    def augmentation(self) -> Augmentation | None:
        """Augmentation of the images; None if no encoder reads them."""
        config = self.config.image or self.config.joint
        return None if config is None else config.augmentation

    def is_trainable(self, modality: str) -> bool:
        """Return True if the modality's encoder has weights that are trained."""
        encoder = getattr(self, modality, None)
        return isinstance(encoder, Encoder) and encoder.is_trainable

    def read_records(self, records: Sequence[Record]) -> RecordInputs:
        """Return the inputs of some records: tabular features, tokens, and which modalities are present."""
        present: dict[str, Tensor] = {}
        field_rows: Tensor | None = None
        phenotypes: list[list[Columns]] = []
        tokens: list[list[int] | None] = []
        tokenizer, template = self._tokenizer()
        if tokenizer is not None:
            texts = [render_nonempty(template, record) for record in records]
            tokens = [None if text is None else tokenizer.encode(text) for text in texts]
        has_image = torch.tensor([record.image_uri is not None for record in records], dtype=torch.bool)
        has_text = torch.tensor([row is not None for row in tokens], dtype=torch.bool)
        if self.image is not None:
            present["image"] = has_image
        if self.text is not None:
            present["text"] = has_text
        if self.joint is not None:
            present["joint"] = has_image | has_text
        if self.fields is not None:
            numbers, has_fields = self.fields.transform(records)
            field_rows, present["fields"] = torch.from_numpy(numbers), torch.from_numpy(has_fields)
        if self.phenotypes is not None:
            phenotypes = [self.phenotypes.columns(record) for record in records]
            present["phenotypes"] = torch.tensor([bool(columns) for columns in phenotypes], dtype=torch.bool)
        return RecordInputs(records, present, field_rows, phenotypes, tokens)

    def encode(
        self, modality: str, inputs: RecordInputs, rows: Sequence[int], images: Images, draws: Tensor | None = None
    ) -> Tensor:
        """Return the features (rows, size) of one modality; rows without it hold any finite numbers.

        Args:
            modality: Name of the modality.
            inputs: Inputs of all records.
            rows: Indices of the records to encode.
            images: Decoded images of `rows`.
            draws: Random numbers (rows, NUM_DRAWS) of the image augmentation; None for no augmentation.
        """
        if modality == "fields" and inputs.fields is not None:
            return inputs.fields[list(rows)].to(device())
        if modality == "phenotypes":
            return self.encode_phenotypes([inputs.phenotypes[row] for row in rows])
        features: list[Tensor] = []
        order: list[int] = []
        size = ROWS_PER_PASS[device().type]
        for bucket in self._length_buckets(modality, inputs, rows):
            for start in range(0, len(bucket), size):
                batch = bucket[start : start + size]
                padded = batch + [batch[-1]] * (size - len(batch))
                batch_draws = None if draws is None else draws[padded].to(device())
                tokens = [inputs.tokens[rows[k]] for k in padded] if modality != "image" else []
                encoded = self._encode_batch(modality, [images[k] for k in padded], tokens, batch_draws)
                features.append(encoded[: len(batch)])
                order += batch
        if not order:
            return torch.zeros(len(rows), self.feature_size(modality), device=device())
        vectors = torch.cat(features)
        out = vectors.new_zeros(len(rows), vectors.shape[1])
        return out.index_copy(0, torch.tensor(order, device=vectors.device), vectors)

    def encode_phenotypes(self, phenotypes: Sequence[Sequence[Columns]]) -> Tensor:
        """Return the features (records, size) of the phenotypes given by the columns that they set."""
        if self.phenotypes is None:
            raise ValueError("this teacher reads no phenotypes")
        return torch.from_numpy(self.phenotypes.transform(phenotypes).toarray()).to(device())

    def feature_size(self, modality: str) -> int:
        """Return the size of a modality's features."""
        if modality == "fields" and self.fields is not None:
            return self.fields.size
        if modality == "phenotypes" and self.phenotypes is not None:
            return self.phenotypes.size
        if modality not in self._feature_sizes:
            with torch.no_grad():
                self._feature_sizes[modality] = self._encode_batch(modality, [None], [None], None).shape[1]
        return self._feature_sizes[modality]

    def _length_buckets(self, modality: str, inputs: RecordInputs, rows: Sequence[int]) -> list[list[int]]:
        """Return the indices into `rows` of the records that have the modality, grouped by the length of their text."""
        buckets: dict[int, list[int]] = {}
        for k, row in enumerate(rows):
            if not inputs.present[modality][row]:
                continue
            tokens = inputs.tokens[row] if modality != "image" else None
            bucket = 0 if tokens is None else getattr(self, modality).tokenizer.length_bucket(tokens)
            buckets.setdefault(bucket, []).append(k)
        return [buckets[bucket] for bucket in sorted(buckets)]

    def _encode_batch(
        self, modality: str, images: Images, tokens: Sequence[list[int] | None], draws: Tensor | None
    ) -> Tensor:
        """Return the features of one padded batch; missing images are black, missing texts empty."""
        encoder: Any = getattr(self, modality)
        if modality == "image":
            features: Tensor = encoder(self._stack(images), draws, self.augmentation)
            return features
        tokenizer: PaddingTokenizer = encoder.tokenizer
        empty = tokenizer.encode("")
        ids, mask = (tensor.to(device()) for tensor in tokenizer.pad([row or empty for row in tokens]))
        if modality == "text":
            features = encoder(ids, mask)
            return features
        has_image = torch.tensor([image is not None for image in images], device=device())
        features = encoder(self._stack(images), has_image, ids, mask, draws, self.augmentation)
        return features

    def _stack(self, images: Sequence[Pixels | ImageError | None]) -> Tensor:
        size = self.frame.size if self.frame else 0
        blank = np.zeros((size, size, 3), dtype=np.uint8)
        stacked = np.stack([image if isinstance(image, np.ndarray) else blank for image in images])
        return torch.from_numpy(stacked).to(device())

    def _tokenizer(self) -> tuple[PaddingTokenizer | None, str]:
        """Return the tokenizer of the text or joint encoder and the template of its text; None if there is neither."""
        if self.text is not None and self.config.text is not None:
            return self.text.tokenizer, self.config.text.template
        if self.joint is not None and self.config.joint is not None:
            return self.joint.tokenizer, self.config.joint.template
        return None, ""


def modality_names(config: Fusion) -> list[str]:
    """Return the names of the modalities that the settings name, in a fixed order."""
    settings: Mapping[str, Any] = {
        "image": config.image,
        "text": config.text,
        "joint": config.joint,
        "fields": config.fields,
        "phenotypes": config.phenotypes,
    }
    return [modality for modality, value in settings.items() if value]
