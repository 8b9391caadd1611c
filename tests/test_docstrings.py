"""Docstrings of modules, classes, functions and fields open with a noun phrase or a verb, not with a question word."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mint_ray"
REFUSED = {
    "As", "How", "Of", "So", "What", "When", "Where", "Whether", "Which", "Who", "Whom", "Whose",
}  # fmt: skip
"""First words that make a docstring an elliptic clause."""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and text of each string that documents a module, a class, a function, a field or a constant."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for statement in body:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def refused_openings(source: str) -> list[tuple[int, str]]:
    """Return line and first sentence of each docstring that opens with a refused word."""
    found = []
    for line, text in docstrings(ast.parse(source)):
        words = text.split()
        if words and words[0].strip("`'\",.:;()") in REFUSED:
            found.append((line, " ".join(words[:10])))
    return found


def test_refused_openings_are_found_wherever_a_docstring_stands() -> None:
    source = '''
"""What this module is for."""
LIMIT = 3
"""Of one task."""
class Part:
    """Whether it is there."""
    path: str
    """Part of the work, whatever that is."""
    def read(self) -> None:
        """So that it is read."""
        if self:
            """Whose file it is."""
def write() -> str:
    """Return what was written."""
    return "What is this?"
'''
    assert [line for line, _ in refused_openings(source)] == [2, 4, 6, 10, 12]


def test_no_docstring_opens_with_a_question_word() -> None:
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {text}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, text in refused_openings(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(["", *found])
