"""Write an answer as a header and a numbered list of names, read one back, and find the labels that it names."""

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
    """What is wanted, and the skeleton of an answer that lists `length` names."""
    skeleton = "\n".join(f"{number}. ''" for number in range(1, length + 1))
    return f"{what}, best first, exactly as:\n{header}\n{skeleton}"


def write_list(header: str, names: Iterable[str]) -> str:
    """The answer that lists `names` in order."""
    return "\n".join([header, *(f"{number}. '{name}'" for number, name in enumerate(names, start=1))])


def read_list(text: str, header: str, length: int, match: Callable[[str], str]) -> Answer:
    """The names of a generated answer, and what `match` makes of each: a label id, or "" for a name that is none."""
    if not text.strip():
        return Answer(reason="empty")
    names = list(_listed(text, header))
    if not names:
        return Answer(reason="no_list")
    if len(names) > length:
        # a longer list has more chances to be right than were asked for
        return Answer(reason="too_many")
    return Answer(labels=[match(name) for name in names], names=names)


def index_names(labels: Iterable[Label], normalise: Callable[[str], str]) -> dict[str, str]:
    """Label id by normalised name, synonym and id. Raises UserError if two labels share one."""
    by_name: dict[str, str] = {}
    for label in labels:
        for name in (label.name, label.label_id, *label.synonyms):
            key = normalise(name)
            if by_name.setdefault(key, label.label_id) != label.label_id:
                raise UserError(f"labels {by_name[key]} and {label.label_id} are both called {name!r}")
    return by_name


def without_accents(name: str) -> str:
    """The name with case and accents folded."""
    return "".join(c for c in unicodedata.normalize("NFKD", name.casefold()) if not unicodedata.combining(c))


def _listed(text: str, header: str) -> Iterator[str]:
    """The names of the first numbered list, after the header if there is one."""
    words = map(re.escape, re.split(r"[ _-]+", header.rstrip(":")))
    parts = re.split(rf"{'[ _-]'.join(words)}\W*?:", text, flags=re.IGNORECASE)
    for line in (parts[1] if len(parts) > 1 else parts[0]).splitlines():
        if match := NUMBERED.match(line.strip()):
            yield _unquoted(match[2].strip())


def _unquoted(entry: str) -> str:
    """The quoted name an entry opens with, or else the entry without emphasis and a closing full stop."""
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
