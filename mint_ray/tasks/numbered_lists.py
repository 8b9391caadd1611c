"""Answers as a header and a numbered list of names: write, parse, and match the names with labels."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

from mint_ray.config.loader import UserError
from mint_ray.records import Label
from mint_ray.tasks import Answer

NUMBERED = re.compile(r"^\W*(\d{1,3})\s*[.):]\s*(.*)$")
QUOTES = {"'": "'", '"': '"', "`": "`", "‘": "’", "“": "”", "«": "»", "’": "’", "”": "”"}  # fmt: skip


def write_request(what: str, header: str, length: int) -> str:
    """Return the instruction `what` with the skeleton of an answer that lists `length` names."""
    skeleton = "\n".join(f"{number}. ''" for number in range(1, length + 1))
    return f"{what}, best first, exactly as:\n{header}\n{skeleton}"


def write_list(header: str, names: Iterable[str]) -> str:
    """Return the answer that lists `names` in order."""
    return "\n".join([header, *(f"{number}. '{name}'" for number, name in enumerate(names, start=1))])


def parse_list(text: str, header: str, length: int, match: Callable[[str], str]) -> Answer:
    """Parse the names of a generated answer; `match` returns the label id of a name, or "" if it is no label."""
    if not text.strip():
        return Answer(reason="empty")
    names = list(_iter_names(text, header))
    if not names:
        return Answer(reason="no_list")
    if len(names) > length:
        # a longer list has more chances of containing the true label
        return Answer(reason="too_many")
    return Answer(labels=[match(name) for name in names], names=names)


def index_names(labels: Iterable[Label], normalize: Callable[[str], str]) -> dict[str, str]:
    """Return the label id of each normalized name, synonym and id. Raises UserError if two labels share one."""
    by_name: dict[str, str] = {}
    for label in labels:
        for name in (label.name, label.label_id, *label.synonyms):
            key = normalize(name)
            if by_name.setdefault(key, label.label_id) != label.label_id:
                raise UserError(f"labels {by_name[key]} and {label.label_id} are both called {name!r}")
    return by_name


def describe_random_lists(length: int, labels: int) -> str:
    """Return a sentence on how often a random list of `length` out of `labels` contains the true label."""
    share = min(1.0, length / max(1, labels))
    return f"A random list of {length} of the {labels} labels contains the true one in {share:.1%} of cases."


def fold_accents(name: str) -> str:
    """Return the name in lower case and without accents."""
    return "".join(c for c in unicodedata.normalize("NFKD", name.casefold()) if not unicodedata.combining(c))


def _iter_names(text: str, header: str) -> Iterator[str]:
    """Yield the names of the first numbered list, after the header if there is one."""
    words = map(re.escape, re.split(r"[ _-]+", header.rstrip(":")))
    parts = re.split(rf"{'[ _-]'.join(words)}\W*?:", text, flags=re.IGNORECASE)
    for line in (parts[1] if len(parts) > 1 else parts[0]).splitlines():
        if match := NUMBERED.match(line.strip()):
            yield _unquote(match[2].strip())


def _unquote(entry: str) -> str:
    """Return the quoted name at the start of an entry, or the entry without emphasis and final punctuation."""
    entry = entry.strip("*_ ").rstrip(".,; ")
    closing = QUOTES.get(entry[:1])
    if closing is None:
        return entry
    inside = entry[1:]
    if inside.endswith(closing):
        return inside[:-1].strip()
    # an apostrophe inside the name is followed by a letter, a closing quote is not
    end = re.search(rf"{re.escape(closing)}(?!\w)", inside)
    return (inside[: end.start()] if end else inside).strip()
