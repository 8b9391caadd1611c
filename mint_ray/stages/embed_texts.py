"""Embed the texts that can be matched to images without one, split like the records."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from mint_ray import lineage
from mint_ray.artifacts import Artifact, PartResult, read_part
from mint_ray.config.loader import UserError
from mint_ray.config.stages import MatchTexts, Prepare, Splits
from mint_ray.lineage import matching_of
from mint_ray.records import TEXT_ID, TEXT_SIMILARITY, CandidateText, Record, Split, TextEmbedding, from_table
from mint_ray.runtime.map_parts import Part, actor_pool, map_parts
from mint_ray.sources import BadRow, build_source
from mint_ray.teachers.config import TwoTower
from mint_ray.teachers.two_tower import TwoTowerEncoder
from mint_ray.telemetry import Progress


def embed_texts(root: str, config: Prepare, records: Artifact) -> Artifact:
    """Write tables `texts` (each wording once, with the split whose records can get it) and `embeddings`.

    The parts of both tables are parallel. Raises UserError as `select_texts` does.
    """
    matching = matching_of(config)
    artifact = lineage.embed_texts(root, config, records)
    if artifact.is_complete:
        return artifact
    resources = matching.resources
    texts, dropped = select_texts(config, records.rows(Record, "records"))
    with artifact.write() as draft:
        parts: list[Part] = []
        for number, start in enumerate(range(0, len(texts), config.rows_per_part)):
            name = f"part-{number:05d}.parquet"
            rows = texts[start : start + config.rows_per_part]
            draft.placed.append(artifact.write_part(f"texts/{name}", CandidateText, rows))
            parts.append(Part(path=f"embeddings/{name}", uri=artifact.file_uri(f"texts/{name}")))
        draft.counts["texts"] = len(texts)
        draft.counts.update(f"texts_{text.split}" for text in texts)
        draft.dropped.update(dropped)
        progress = Progress("embed_texts", len(texts), "texts")
        workers = actor_pool(EmbedActor, (artifact, matching.encoder), resources)
        for part in map_parts(artifact, parts, PartResult, workers):
            progress.advance(part.rows)
            draft.add_part(part)
    return artifact


def select_texts(config: Prepare, records: Sequence[Record]) -> tuple[list[CandidateText], Counter[str]]:
    """Return the texts that `records` can get, in the order of their ids, and the skipped rows by reason.

    A wording is kept once, under its smallest id; a wording that a record already has is skipped. Raises UserError if
    too many rows are bad, if no row has a text, or if a split has no record or no text.
    """
    matching = matching_of(config)
    name = f"prepare.match_texts: {getattr(matching.source, 'uri', matching.source.kind)}"
    wanting = [record for record in records if record.needs_text]
    if not wanting:
        raise UserError("prepare.match_texts: no record has an image and no text, so there is nothing to match")
    for record in records:
        for field in (TEXT_SIMILARITY, TEXT_ID):
            if field in record.fields:
                raise UserError(
                    f"prepare.match_texts: record {record.record_id!r}: fields.{field}: already set to "
                    f"{record.fields[field]!r}; this name is reserved for the matched text"
                )
    found, dropped, total = _read_texts(matching, config.max_bad_share, name)
    if not found:
        raise UserError(f"{name}: text: none of its {total:,} rows has one")
    known = {fold(record.text) for record in records if record.text is not None}
    split_of = {record.group_id: record.split for record in records}
    texts: list[CandidateText] = []
    for record in sorted(found, key=lambda record: record.record_id):
        wording = fold(record.text or "")
        if wording in known:
            dropped["same_wording"] += 1
            continue
        known.add(wording)
        split = split_of.get(record.group_id) or draw_split(record.group_id, config.splits, matching.seed)
        texts.append(
            CandidateText(text_id=record.record_id, group_id=record.group_id, split=split, text=record.text or "")
        )
    available = Counter(text.split for text in texts)
    for split, count in sorted(Counter(record.split for record in wanting).items()):
        if not available[split]:
            raise UserError(
                f"{name}: none of its {len(texts):,} texts is in the {split} split, whose {count:,} records need "
                "some; use more texts, smaller groups, another seed or other shares (prepare.splits)"
            )
    return texts, +dropped


def draw_split(group_id: str, shares: Splits, seed: int) -> Split:
    """Return the split of a group of texts, independent of the other groups."""
    draw = random.Random(f"texts:{seed}:{group_id}").random()
    if draw < shares.test:
        return "test"
    return "validation" if draw < shares.test + shares.validation else "train"


def fold(text: str) -> str:
    """Return the words of a text without case, punctuation, white space and Unicode variants, for comparison."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


class EmbedActor:
    """Actor that embeds one part of the texts at a time."""

    def __init__(self, artifact: Artifact, config: TwoTower) -> None:
        self.artifact, self.encoder = artifact, TwoTowerEncoder(config)

    def work(self, part: Part) -> PartResult:
        """Embed and write one part."""
        texts = from_table(CandidateText, read_part(part.uri))
        rows = [
            TextEmbedding(text_id=text.text_id, split=text.split, vector=vector.tolist())
            for text, vector in zip(texts, self.encoder.encode_texts([text.text for text in texts]), strict=True)
        ]
        file, rows = self.artifact.write_part_once(part.path, TextEmbedding, rows)
        return PartResult(path=part.path, rows=len(rows), files=[file])


def _read_texts(config: MatchTexts, max_bad_share: float, name: str) -> tuple[list[Record], Counter[str], int]:
    """Return the records with a text, the other rows by reason, and the number of rows."""
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
            # a text without a word counts as missing
            if row.text is not None and fold(row.text):
                found.append(row)
            else:
                dropped["no_text"] += 1
    if bad > max_bad_share * total:
        raise UserError(
            f"prepare.match_texts: {first_bad} ({bad} of {total} rows are bad, more than max_bad_share "
            f"{max_bad_share:g})"
        )
    if total == 0:
        raise UserError(f"{name}: has no records")
    return found, dropped, total
