"""What the network reads of records: one vector for each part, through its code or its encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mint_ray.images import Frame, ImageError, Pixels, Seen
from mint_ray.records import Record
from mint_ray.teachers.config import Augmentation, Fusion
from mint_ray.teachers.fusion.distributed import device
from mint_ray.teachers.fusion.encoders import ImageEncoder, JointEncoder, TextEncoder, look_of
from mint_ray.teachers.fusion.tabular import FieldsCode, FindingsCode
from mint_ray.teachers.generative import write_prompt

Tensor = torch.Tensor

PER_PASS = {"cpu": 4, "cuda": 64}
"""Images or texts in one pass through an encoder; a pass is always filled up, so that what a record is read as does not
depend on its neighbours. Small on a processor, whose cache then holds what a layer hands to the next."""


@dataclasses.dataclass(frozen=True)
class Read:
    """Some records, as far as they can be written down without an encoder."""

    records: Sequence[Record]
    present: dict[str, Tensor]
    """For each part the N records that have it, as (N,) booleans."""
    fields: Tensor | None
    findings: list[list[np.ndarray[Any, np.dtype[np.int64]]]]
    tokens: list[list[int] | None]


class Parts(nn.Module):
    """The codes and encoders of the parts that the settings name."""

    def __init__(self, config: Fusion, fields: FieldsCode | None, findings: FindingsCode | None) -> None:
        super().__init__()
        self.config, self.fields, self.findings = config, fields, findings
        self._widths: dict[str, int] = {}
        self.image = None if config.image is None else ImageEncoder(config.image, look_of(config.image))
        self.text = None if config.text is None else TextEncoder(config.text)
        self.joint = None if config.joint is None else JointEncoder(config.joint, look_of(config.joint))

    @classmethod
    def learn(cls, config: Fusion, records: Sequence[Record]) -> Parts:
        """Codes from the records of the training split."""
        fields = FieldsCode.learn(config.fields, records) if config.fields else None
        return cls(config, fields, FindingsCode.learn(records) if config.findings else None)

    @property
    def names(self) -> list[str]:
        return part_names(self.config)

    @property
    def frame(self) -> Frame | None:
        seeing = self.image or self.joint
        return None if seeing is None else seeing.look.frame

    @property
    def augmentation(self) -> Augmentation | None:
        seeing = self.config.image or self.config.joint
        return None if seeing is None else seeing.augmentation

    def learns(self, part: str) -> bool:
        """Whether the part's encoder has weights that change."""
        encoder = getattr(self, part, None)
        return isinstance(encoder, nn.Module) and bool(encoder.learns)

    def read(self, records: Sequence[Record]) -> Read:
        present: dict[str, Tensor] = {}
        rows: Tensor | None = None
        found: list[list[np.ndarray[Any, np.dtype[np.int64]]]] = []
        tokens: list[list[int] | None] = []
        reader, template = self._reader()
        if reader is not None:
            texts = [write_prompt(template, record) for record in records]
            tokens = [None if text is None else reader.encode(text) for text in texts]
        shown = torch.tensor([record.image_uri is not None for record in records], dtype=torch.bool)
        written = torch.tensor([row is not None for row in tokens], dtype=torch.bool)
        if self.image is not None:
            present["image"] = shown
        if self.text is not None:
            present["text"] = written
        if self.joint is not None:
            present["joint"] = shown | written
        if self.fields is not None:
            numbers, known = self.fields.write(records)
            rows, present["fields"] = torch.from_numpy(numbers), torch.from_numpy(known)
        if self.findings is not None:
            found = [self.findings.places(record) for record in records]
            present["findings"] = torch.tensor([bool(places) for places in found], dtype=torch.bool)
        return Read(records, present, rows, found, tokens)

    def vectors(self, part: str, read: Read, rows: Sequence[int], images: Seen, draws: Tensor | None = None) -> Tensor:
        """(rows, width) of one part; `images` are those of `rows`, and `draws` (rows, DRAWS) vary them.

        A row that lacks the part is anything finite.
        """
        if part == "fields" and read.fields is not None:
            return read.fields[list(rows)].to(device())
        if part == "findings":
            return self.write_findings([read.findings[row] for row in rows])
        encoder = getattr(self, part)
        there = [k for k, row in enumerate(rows) if bool(read.present[part][row])]
        groups: dict[int, list[int]] = {}
        for k in there:
            row_tokens = read.tokens[rows[k]] if part != "image" else None
            bucket = 0 if row_tokens is None else encoder.tokens.bucket(row_tokens)
            groups.setdefault(bucket, []).append(k)
        made: list[Tensor] = []
        order: list[int] = []
        step = PER_PASS[device().type]
        for bucket in sorted(groups):
            for start in range(0, len(groups[bucket]), step):
                some = groups[bucket][start : start + step]
                padded = some + [some[-1]] * (step - len(some))
                varied = None if draws is None else draws[padded].to(device())
                made.append(self._pass(part, encoder, read, rows, padded, images, varied)[: len(some)])
                order += some
        if not order:
            return torch.zeros(len(rows), self.width(part), device=device())
        vectors = torch.cat(made)
        out = vectors.new_zeros(len(rows), vectors.shape[1])
        return out.index_copy(0, torch.tensor(order, device=vectors.device), vectors)

    def write_findings(self, findings: Sequence[Sequence[np.ndarray[Any, np.dtype[np.int64]]]]) -> Tensor:
        if self.findings is None:
            raise ValueError("this teacher reads no findings")
        return torch.from_numpy(self.findings.write(findings).toarray()).to(device())

    def width(self, part: str) -> int:
        if part == "fields" and self.fields is not None:
            return self.fields.width
        if part == "findings" and self.findings is not None:
            return self.findings.width
        if part not in self._widths:
            blank = Read([], {}, None, [], [None])
            with torch.no_grad():
                self._widths[part] = self._pass(part, getattr(self, part), blank, [0], [0], [None], None).shape[1]
        return self._widths[part]

    def _pass(
        self,
        part: str,
        encoder: Callable[..., Tensor],
        read: Read,
        rows: Sequence[int],
        some: Sequence[int],
        images: Seen,
        draws: Tensor | None,
    ) -> Tensor:
        pixels = tokens = mask = None
        if part in ("image", "joint"):
            pixels = self._stack([images[k] for k in some])
        if part in ("text", "joint"):
            reader, _ = self._reader()
            empty = reader.encode("")
            tokens, mask = (x.to(device()) for x in reader.pad([read.tokens[rows[k]] or empty for k in some]))
        if part == "image":
            return encoder(pixels, draws, self.augmentation)
        if part == "text":
            return encoder(tokens, mask)
        shown = torch.tensor([images[k] is not None for k in some], device=device())
        return encoder(pixels, shown, tokens, mask, draws, self.augmentation)

    def _stack(self, images: Sequence[Pixels | ImageError | None]) -> Tensor:
        size = self.frame.size if self.frame else 0
        blank = np.zeros((size, size, 3), dtype=np.uint8)
        stacked = np.stack([image if isinstance(image, np.ndarray) else blank for image in images])
        return torch.from_numpy(stacked).to(device())

    def _reader(self) -> tuple[Any, str]:
        if self.text is not None and self.config.text is not None:
            return self.text.tokens, self.config.text.template
        if self.joint is not None and self.config.joint is not None:
            return self.joint.tokens, self.config.joint.template
        return None, ""


def part_names(config: Fusion) -> list[str]:
    """The parts that the settings name, in a fixed order."""
    named: Mapping[str, Any] = {
        "image": config.image,
        "text": config.text,
        "joint": config.joint,
        "fields": config.fields,
        "findings": config.findings,
    }
    return [part for part, value in named.items() if value]
