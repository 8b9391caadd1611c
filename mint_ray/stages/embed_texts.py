"""Gather the texts that images without one can be given, split them as the records are, and embed them."""

from __future__ import annotations

import dataclasses
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from mint_ray.artifacts import Artifact, File, open_artifact, read_part
from mint_ray.config.loader import UserError, dump
from mint_ray.config.stages import PairTexts, Prepare, Splits
from mint_ray.models.pretrained import identity_of
from mint_ray.records import Record, Split, from_table
from mint_ray.runtime.map_parts import map_parts
from mint_ray.sources import BadRow, build_source
from mint_ray.teachers.config import TwoTowers
from mint_ray.teachers.two_tower import TwoTowerEncoder
from mint_ray.telemetry import Progress

SIMILARITY, TEXT_ID = "text_similarity", "text_id"
"""Coded fields of a record that was given a text."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """One text that records of a split can be given."""

    text_id: str
    group_id: str
    split: Split
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Embedding:
    """What the encoder makes of a text, of norm 1."""

    text_id: str
    split: Split
    vector: list[float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of the texts or of the records: the work of one task."""

    path: str
    """Of the part that is written."""
    uri: str
    """Of the part that is read."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MadePart:
    """What a task made of a part."""

    path: str
    read: int
    files: list[File]
    given: int
    """Records that were given a text."""
    dropped: dict[str, int]
    """Records that were given none, or were left out for what it says, by reason."""


def gather_texts(root: str, config: Prepare, records: Artifact) -> Artifact:
    """Table `texts`: every wording once, in the order of its id, with the split whose records can be given it."""
    pairing = pairing_of(config)
    settings = {"source": dump(pairing)["source"], "seed": pairing.seed, "splits": dump(config.splits)}
    settings |= {"max_bad_share": config.max_bad_share, "rows_per_part": config.rows_per_part}
    inputs = {"records": records.name, **build_source(pairing.source).inputs()}
    artifact = open_artifact(root, "texts", settings, inputs)
    if artifact.is_complete:
        return artifact
    with artifact.write() as draft:
        texts, dropped = select_texts(config, records.rows(Record, "records"))
        draft.counts["texts"] = draft.write_rows(Text, "texts", texts, rows_per_part=config.rows_per_part)
        draft.counts.update(f"texts_{text.split}" for text in texts)
        draft.dropped.update(dropped)
    return artifact


def embed_texts(root: str, config: Prepare, texts: Artifact) -> Artifact:
    """Table `embeddings`, parallel to the parts of `texts`."""
    pairing = pairing_of(config)
    encoder = pairing.encoder
    inputs = {"texts": texts.name, "encoder": identity_of(encoder.model_id, encoder.revision)}
    artifact = open_artifact(root, "embed", {"encoder": dump(encoder)}, inputs)
    if artifact.is_complete:
        return artifact
    resources, parts = pairing.resources, parts_of(texts, "texts", "embeddings")
    progress = Progress("embed", texts.manifest.counts["texts"], "texts")
    actors = min(resources.actors, len(parts))
    with artifact.write() as draft:
        for part in map_parts(
            artifact,
            parts,
            MadePart,
            EmbedActor,
            (artifact, encoder),
            actors=(actors, actors),
            cpus=resources.cpus_per_actor,
            gpus=resources.gpus_per_actor,
        ):
            progress.advance(part.read)
            draft.placed += part.files
            draft.counts["texts"] += part.read
    return artifact


def select_texts(config: Prepare, records: Sequence[Record]) -> tuple[list[Text], Counter[str]]:
    """The texts that `records` can be given, and how many rows of the source are none, by reason.

    A wording stands once, under its least id; one that a record has of its own is left out. Raises UserError if too
    many rows are bad, no row has a text, or no record or no text is there for a split.
    """
    pairing = pairing_of(config)
    name = f"prepare.pair_texts: {getattr(pairing.source, 'uri', pairing.source.kind)}"
    wanting = [record for record in records if needs_text(record)]
    if not wanting:
        raise UserError("prepare.pair_texts: no record has an image and no text, so there is nothing to pair")
    for record in records:
        for field in (SIMILARITY, TEXT_ID):
            if field in record.fields:
                raise UserError(
                    f"prepare.pair_texts: record {record.record_id!r}: fields.{field}: is there already, with "
                    f"{record.fields[field]!r}; that name is for how the record was paired"
                )
    found, dropped, total = _read_texts(pairing, config.max_bad_share, name)
    if not found:
        raise UserError(f"{name}: text: none of its {total:,} rows has one")
    taken = {fold(record.text) for record in records if record.text is not None}
    split_of = {record.group_id: record.split for record in records}
    texts: list[Text] = []
    for record in sorted(found, key=lambda record: record.record_id):
        wording = fold(record.text or "")
        if wording in taken:
            dropped["same_wording"] += 1
            continue
        taken.add(wording)
        split = split_of.get(record.group_id) or draw_split(record.group_id, config.splits, pairing.seed)
        texts.append(Text(text_id=record.record_id, group_id=record.group_id, split=split, text=record.text or ""))
    there = Counter(text.split for text in texts)
    for split, count in sorted(Counter(record.split for record in wanting).items()):
        if not there[split]:
            raise UserError(
                f"{name}: none of its {len(texts):,} texts falls to the {split} split, whose {count:,} records need "
                "some; it wants more texts, smaller groups, another seed or other shares (prepare.splits)"
            )
    return texts, +dropped


def needs_text(record: Record) -> bool:
    """Whether a record has an image and no text."""
    return record.image_uri is not None and record.text is None


def draw_split(group_id: str, shares: Splits, seed: int) -> Split:
    """Where a group of texts falls, whatever other groups there are."""
    draw = random.Random(f"texts:{seed}:{group_id}").random()
    if draw < shares.test:
        return "test"
    return "validation" if draw < shares.test + shares.validation else "train"


def fold(text: str) -> str:
    """The words of a text, by which it is known: case, punctuation, spaces and the forms of a letter are folded."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


class EmbedActor:
    """Holds the encoder on a worker and embeds the texts of one part after the other."""

    def __init__(self, artifact: Artifact, config: TwoTowers) -> None:
        self.artifact, self.encoder = artifact, TwoTowerEncoder(config)

    def work(self, part: Part) -> MadePart:
        texts = from_table(Text, read_part(part.uri))
        rows = [
            Embedding(text_id=text.text_id, split=text.split, vector=vector.tolist())
            for text, vector in zip(texts, self.encoder.read([text.text for text in texts]), strict=True)
        ]
        file, rows = self.artifact.write_part_once(part.path, Embedding, rows)
        return MadePart(path=part.path, read=len(texts), files=[file], given=0, dropped={})


def _read_texts(config: PairTexts, max_bad_share: float, name: str) -> tuple[list[Record], Counter[str], int]:
    """Records with a text, what else there was by reason, and how many rows in all."""
    found: list[Record] = []
    dropped: Counter[str] = Counter()
    first_bad, bad, total = "", 0, 0
    seen: set[str] = set()
    for row in build_source(config.source).read():
        total += 1
        if isinstance(row, BadRow):
            dropped[row.reason] += 1
            bad, first_bad = bad + 1, first_bad or row.message
        elif row.record_id in seen:
            dropped["duplicate_record_id"] += 1
            bad, first_bad = bad + 1, first_bad or f"record_id: {row.record_id!r} occurs more than once"
        else:
            seen.add(row.record_id)
            # what has no word is no text
            if row.text is not None and fold(row.text):
                found.append(row)
            else:
                dropped["no_text"] += 1
    if bad > max_bad_share * total:
        raise UserError(
            f"prepare.pair_texts: {first_bad} ({bad} of {total} rows are bad, more than max_bad_share "
            f"{max_bad_share:g})"
        )
    if total == 0:
        raise UserError(f"{name}: holds no records")
    return found, dropped, total


def parts_of(artifact: Artifact, table: str, made: str) -> list[Part]:
    """The work on each part of `table`, from which a part of table `made` is written."""
    return [
        Part(path=file.path.replace(f"{table}/", f"{made}/", 1), uri=artifact.file_uri(file.path))
        for file in artifact.table_files(table)
    ]


def pairing_of(config: Prepare) -> PairTexts:
    """The setting that asks for texts."""
    if config.pair_texts is None:
        raise ValueError("prepare.pair_texts is not set")
    return config.pair_texts
