"""Records of GA4GH Phenopackets, version 2 (https://phenopacket-schema.readthedocs.io)."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from google.protobuf.json_format import ParseDict, ParseError
from phenopackets.schema.v2 import Phenopacket
from phenopackets.schema.v2.core.individual_pb2 import Sex
from phenopackets.schema.v2.core.interpretation_pb2 import GenomicInterpretation

from mint_ray import storage
from mint_ray.config.loader import UserError, one_line
from mint_ray.ontology import load_ontology
from mint_ray.records import Phenotype, Record
from mint_ray.sources import BadRow
from mint_ray.sources.config import Phenopackets

SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".zip")


class PhenopacketsSource:
    """One record per phenopacket; the publication is the group."""

    def __init__(self, config: Phenopackets) -> None:
        self.config = config
        found = storage.list_files(config.uri)
        self.files = [uri for uri in found if uri.endswith(SUFFIXES)]
        if not self.files:
            raise UserError(f"{config.uri}: no file ending in {', '.join(SUFFIXES)}")
        self._names: dict[str, Counter[str]] = {}

    def inputs(self) -> dict[str, str]:
        """Return the sha256 of the file, or one digest of all files of a folder."""
        if len(self.files) == 1:
            return {self.config.uri: storage.sha256(self.files[0])}
        # a single digest: a manifest should not list thousands of files
        lines = [f"{uri.removeprefix(self.config.uri)} {storage.sha256(uri)}\n" for uri in self.files]
        return {self.config.uri: hashlib.sha256("".join(lines).encode()).hexdigest()}

    def read(self) -> Iterator[Record | BadRow]:
        """Yield one row per phenopacket, in the order of the files. Raises UserError for a file that cannot be read."""
        names: dict[str, Counter[str]] = defaultdict(Counter)
        seen: dict[str, str] = {}
        for uri in self.files:
            for location, content in _documents(uri):
                row = _row(location, content, names)
                if isinstance(row, Record) and row.record_id in seen:
                    first = seen[row.record_id]
                    message = f"{location}: id: {row.record_id!r} was already used at {first}"
                    row = BadRow(location, "duplicate_record_id", message)
                elif isinstance(row, Record):
                    seen[row.record_id] = location
                yield row
        self._names = dict(names)

    def labels(self) -> dict[str, list[str]]:
        """Return the names of each disease, most frequent first; reads all files if `read` was not called."""
        if not self._names:
            for _ in self.read():
                pass
        return {label_id: [name for name, _ in names.most_common()] for label_id, names in self._names.items()}


def _documents(uri: str) -> Iterator[tuple[str, bytes]]:
    """Yield the JSON documents of one file with their locations."""
    try:
        with storage.open_input(uri) as stream:
            if uri.endswith(".json"):
                yield uri, stream.read()
            elif uri.endswith(".zip"):
                with zipfile.ZipFile(stream) as archive:
                    for member in sorted(archive.namelist()):
                        if member.endswith(".json"):
                            yield f"{uri}:{member}", archive.read(member)
            else:
                # Arrow's stream does not iterate over lines
                plain = io.BufferedReader(stream)  # type: ignore[type-var]
                lines = gzip.GzipFile(fileobj=stream) if uri.endswith(".gz") else plain
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{uri}:{number}", line
    except (EOFError, OSError, zlib.error, zipfile.BadZipFile, pa.ArrowInvalid) as error:
        raise UserError(f"{uri}: cannot be read: {one_line(error)}") from error


def _row(location: str, content: bytes, names: dict[str, Counter[str]]) -> Record | BadRow:
    try:
        data = json.loads(content)
    except ValueError as error:  # bad syntax or bad UTF-8
        return BadRow(location, "not_json", f"{location}: not JSON: {one_line(error)}")
    if isinstance(data, dict) and "phenopacket" in data:
        data = data["phenopacket"]
    if not isinstance(data, dict):
        return BadRow(location, "not_a_phenopacket", f"{location}: expected an object, got {type(data).__name__}")
    try:
        packet = ParseDict(data, Phenopacket(), ignore_unknown_fields=False)
    except ParseError as error:
        return BadRow(location, "not_a_phenopacket", f"{location}: {str(error).splitlines()[0]}")
    if not packet.id:
        return BadRow(location, "not_a_phenopacket", f"{location}: id: required, and not given")
    return _record(location, packet, names)


def _record(location: str, packet: Any, names: dict[str, Counter[str]]) -> Record | BadRow:
    diagnoses = {d.id: d.label for d in _diagnoses(packet)}
    if not diagnoses:
        return BadRow(
            location, "no_diagnosis", f"{location}: interpretations: phenopacket {packet.id!r} names no disease"
        )
    if len(diagnoses) > 1:
        message = f"{location}: interpretations: phenopacket {packet.id!r} has several diseases: {', '.join(diagnoses)}"
        return BadRow(location, "several_diagnoses", message)
    phenotypes = _phenotypes(packet)
    if all(phenotype.excluded for phenotype in phenotypes):
        message = f"{location}: phenotypicFeatures: phenopacket {packet.id!r} has no observed finding"
        return BadRow(location, "no_phenotypes", message)
    citations = _citations(packet)
    [(label_id, name)] = diagnoses.items()
    names[label_id][name or label_id] += 1
    return Record(
        record_id=packet.id,
        group_id=citations[0] if citations else f"subject:{packet.subject.id or packet.id}",
        label_id=label_id,
        phenotypes=phenotypes,
        fields=_fields(packet),
        citations=citations,
    )


def _diagnoses(packet: Any) -> list[Any]:
    interpreted = [item.diagnosis.disease for item in packet.interpretations if item.diagnosis.disease.id]
    return interpreted or [item.term for item in packet.diseases if item.term.id and not item.excluded]


def _citations(packet: Any) -> list[str]:
    references = [reference.id for reference in packet.meta_data.external_references]
    return list(dict.fromkeys(reference for reference in references if reference.startswith("PMID:")))


def _phenotypes(packet: Any) -> list[Phenotype]:
    """Return each finding once, in order; a finding that was observed at any time counts as observed."""
    ontology = load_ontology()
    found: dict[str, Phenotype] = {}
    for feature in packet.phenotypic_features:
        term_id = ontology.resolve(feature.type.id) or feature.type.id
        if not term_id or (term_id in found and not found[term_id].excluded):
            continue
        label = ontology.names.get(term_id) or feature.type.label or term_id
        if term_id not in found or not feature.excluded:
            found[term_id] = Phenotype(id=term_id, label=label, excluded=feature.excluded)
    return list(found.values())


def _fields(packet: Any) -> dict[str, str]:
    genes = {
        _gene(item): None
        for interpretation in packet.interpretations
        for item in interpretation.diagnosis.genomic_interpretations
        if item.interpretation_status != GenomicInterpretation.InterpretationStatus.REJECTED
    }
    sex = packet.subject.sex
    values = {
        "age": packet.subject.time_at_last_encounter.age.iso8601duration,
        "sex": Sex.Name(sex) if sex in (Sex.FEMALE, Sex.MALE) else "",
        "gene": ";".join(gene for gene in genes if gene),
    }
    return {name: value for name, value in values.items() if value}


def _gene(item: Any) -> str:
    return str(item.variant_interpretation.variation_descriptor.gene_context.symbol or item.gene.symbol)
