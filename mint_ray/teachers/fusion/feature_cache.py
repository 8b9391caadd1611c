"""Where the vectors of records come from while the network learns, and all that chance decides about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from mint_ray.config.loader import UserError
from mint_ray.images import REASONS, ImageError, Pixels, read_images
from mint_ray.records import Record
from mint_ray.teachers.config import Fusion
from mint_ray.teachers.fusion.augmentation import DRAWS
from mint_ray.teachers.fusion.distributed import device, share_of, total
from mint_ray.teachers.fusion.features import Parts, Read

Tensor = torch.Tensor

READERS = 8
"""Threads that read images: they wait for storage, and Pillow decodes without holding the others up."""
HELD_BYTES = 4_000_000_000
"""Most pixels that a process keeps from epoch to epoch; what does not fit is read again."""
ROWS_PER_PASS = 32
"""Rows that go forward and backward at a time where an encoder learns; gradients add up over a step."""


class Shelf:
    """Where the vectors of records come from: remembered where nothing changes them, worked out anew where it does."""

    def __init__(self, parts: Parts, records: Sequence[Record]) -> None:
        self.parts = parts
        self.read: Read = parts.read(records)
        self.train = sum(record.split == "train" for record in records)
        self.plain: dict[str, Tensor] = {}
        self.varied: dict[str, Tensor] = {}
        """Of a frozen image encoder, (training records, copies - 1, width)."""
        self.pixels: dict[int, Pixels] = {}
        for part in parts.names:
            if not bool(self.read.present[part][: self.train].any()):
                raise UserError(f"fusion.{part}: no training record has what it reads")

    def look(self, max_bad_share: float, tell: Callable[[int, int], None]) -> tuple[list[int], Counter[str]]:
        """Look at every image once; remember what frozen encoders make of it. The rows that can be used, and how many
        cannot, by reason. `tell(done, whole)` is called of the rows that fall to this process.

        Raises UserError naming the first image if more than `max_bad_share` of the rows cannot be used.
        """
        parts, count = self.parts, len(self.read.records)
        remembered = [part for part in parts.names if part not in ("fields", "findings") and not parts.learns(part)]
        seeing = parts.config.image or parts.config.joint
        copies = 1 if seeing is None else seeing.copies
        generator = torch.Generator().manual_seed(parts.config.seed)
        draws = torch.rand(self.train, max(copies - 1, 1), DRAWS, generator=generator)
        for part in remembered:
            width = parts.width(part)
            self.plain[part] = torch.zeros(count, width, device=device())
            if part != "text" and copies > 1:
                self.varied[part] = torch.zeros(self.train, copies - 1, width, device=device())
        wrong = torch.zeros(count, len(REASONS), device=device())
        first = ""
        mine = share_of(range(count))
        for start in range(0, len(mine), ROWS_PER_PASS):
            rows = mine[start : start + ROWS_PER_PASS]
            images = self.images(rows)
            for row, image in zip(rows, images, strict=True):
                if isinstance(image, ImageError):
                    wrong[row, REASONS.index(image.reason)] = 1
                    first = first or str(image)
            for part in remembered:
                with torch.no_grad():
                    self.plain[part][rows] = parts.vectors(part, self.read, rows, images)
                    learned = [k for k, row in enumerate(rows) if row < self.train]
                    if part in self.varied and learned:
                        some = [rows[k] for k in learned]
                        seen = [images[k] for k in learned]
                        for copy in range(copies - 1):
                            self.varied[part][some, copy] = parts.vectors(
                                part, self.read, some, seen, draws[some, copy]
                            )
            tell(start + len(rows), len(mine))
        for held in (*self.plain.values(), *self.varied.values(), wrong):
            total(held)
        reasons = Counter({reason: int(wrong[:, i].sum()) for i, reason in enumerate(REASONS) if wrong[:, i].any()})
        if reasons.total() > max_bad_share * count:
            told = ", ".join(f"{reason} {number}" for reason, number in sorted(reasons.items()))
            raise UserError(
                f"{first or 'fusion'} ({reasons.total()} of {count} records have an image that cannot be read, more "
                f"than max_bad_share {max_bad_share:g}: {told})"
            )
        bad = wrong.any(dim=1).tolist()
        return [row for row in range(count) if not bad[row]], reasons

    def images(self, rows: Sequence[int]) -> list[Pixels | ImageError | None]:
        """The images of some rows, kept if they will be wanted again and there is room."""
        frame = self.parts.frame
        if frame is None:
            return [None] * len(rows)
        wanted = [row for row in rows if row not in self.pixels]
        uris = [self.read.records[row].image_uri for row in wanted]
        with ThreadPoolExecutor(READERS) as threads:
            read = [found[0] for found in threads.map(lambda uri: read_images([uri], frame), uris)]
        found: dict[int, Pixels | ImageError | None] = dict(zip(wanted, read, strict=True))
        again = any(self.parts.learns(part) for part in ("image", "joint") if part in self.parts.names)
        room = HELD_BYTES // (3 * frame.size**2) - len(self.pixels)
        if again:
            fresh = [(row, image) for row, image in found.items() if isinstance(image, np.ndarray)]
            self.pixels |= dict(fresh[: max(room, 0)])
        return [found[row] if row in found else self.pixels[row] for row in rows]

    def vectors(self, rows: Sequence[int], draws: Draws | None) -> dict[str, Tensor]:
        """One vector of each row for each part; varied if there are draws."""
        made: dict[str, Tensor] = {}
        images: list[Pixels | ImageError | None] | None = None
        for part in self.parts.names:
            if part in self.plain:
                made[part] = self.plain[part][list(rows)]
                if draws is not None and part in self.varied:
                    # one of the copies, of which the first is the image as it is
                    copies = self.varied[part].shape[1] + 1
                    chosen = (draws.looks[list(rows), 0] * copies).long().to(device())
                    others = self.varied[part][list(rows), (chosen - 1).clamp(min=0)]
                    made[part] = torch.where((chosen > 0)[:, None], others, made[part])
            elif part == "findings" and draws is not None:
                systems = self.parts.findings.systems if self.parts.findings else frozenset()
                thinned = [draws.thinned(row, self.read.findings[row], systems) for row in rows]
                made[part] = self.parts.write_findings(thinned)
            elif part in ("fields", "findings"):
                made[part] = self.parts.vectors(part, self.read, rows, [])
            else:
                images = images if images is not None else self.images(rows)
                looks = None if draws is None or part == "text" else draws.looks[list(rows)]
                made[part] = self.parts.vectors(part, self.read, rows, images, looks)
        return made

    def present(self, rows: Sequence[int], hidden: Tensor | None = None) -> dict[str, Tensor]:
        """Which rows have which part; `hidden` (rows, parts) says what is hidden from the network."""
        found = {}
        for k, part in enumerate(self.parts.names):
            there = self.read.present[part][list(rows)]
            found[part] = (there if hidden is None else there & ~hidden[:, k]).to(device())
        return found


class Draws:
    """All that chance decides in one epoch, for every training record alike."""

    def __init__(self, config: Fusion, epoch: int, read: Read, train: int, rows: Sequence[int]) -> None:
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch + 1)
        self.config, self.epoch = config, epoch
        self.order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        self.looks = torch.rand(train, DRAWS, generator=generator)
        names = list(read.present)
        hidden = torch.rand(train, len(names), generator=generator) < config.modality_dropout
        # never all that a record has: one part, drawn as well, is spared
        chance = torch.rand(train, len(names), generator=generator)
        there = torch.stack([read.present[name][:train] for name in names], dim=1)
        spared = (chance * there).argmax(dim=1)
        hidden[torch.arange(train), spared] = False
        self.hidden = hidden
        self.share = torch.rand(train, generator=generator)
        self.generator = generator

    def thinned(self, row: int, findings: list[Any], systems: frozenset[int]) -> list[Any]:
        """A record's findings without some of them, as if it had been examined less; one always stays.

        Either any may go, as many as the record's luck says, or all but one organ system, or that system: `systems` are
        the places of those in what a finding fills.
        """
        if not self.config.finding_dropout or len(findings) < 2:
            return findings
        chance = np.random.default_rng([self.config.seed, self.epoch, row])
        if chance.random() < self.config.finding_dropout:
            own = [systems.intersection(places.tolist()) for places in findings]
            system = own[chance.integers(len(findings))]
            within = chance.random() < 0.5
            kept = [places for places, has in zip(findings, own, strict=True) if bool(system & has) == within]
            return kept or findings
        # uniform from none to twice the share, so that the mean is the share
        gone = chance.random(len(findings)) < 2 * self.config.finding_dropout * float(self.share[row])
        gone[chance.integers(len(findings))] = False
        return [places for places, out in zip(findings, gone, strict=True) if not out]

    def dropped(self, rows: int, width: int) -> Tensor | None:
        """What the fused numbers of the `rows` of a step are multiplied by."""
        if not self.config.dropout:
            return None
        kept = torch.rand(rows, width, generator=self.generator) >= self.config.dropout
        return (kept / (1 - self.config.dropout)).to(device())
