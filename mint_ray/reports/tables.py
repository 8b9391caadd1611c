"""Tables of reports: one description, rendered as plain text, as Markdown and (`tables.html.j2`) as HTML."""

from __future__ import annotations

import dataclasses
import html
import io
import re
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from mint_ray.metrics import Estimate
from mint_ray.reports.formatting import format_interval, format_value

WIDTH = 100
"""Columns of a terminal."""
MIN_LABEL_WIDTH = 24
"""Columns that are reserved for the text columns of a table whose numbers need more than `WIDTH`."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a table."""

    text: str
    detail: str = ""
    """Interval or remark behind the text, set smaller on the page."""

    def __str__(self) -> str:
        return f"{self.text} {self.detail}".rstrip()


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table."""

    heading: str
    is_number: bool = True
    """Numbers are aligned right and contain no text of the user; the others are escaped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """One table: a heading, columns and rows."""

    title: str = ""
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    """Text below the table."""


def make_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str | Cell]],
    *,
    text_columns: Sequence[int] = (0,),
    title: str = "",
    note: str = "",
) -> Table:
    """Return a table; the columns of `text_columns` contain text, the others numbers."""
    return Table(
        title=title,
        columns=[Column(heading, is_number=index not in text_columns) for index, heading in enumerate(headings)],
        rows=[[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows],
        note=note,
    )


def estimate_cell(estimate: Estimate | None) -> Cell:
    """Return a cell such as `0.43 [0.31, 0.55]`, or `n/a`."""
    return Cell(format_value(estimate), format_interval(estimate))


def render_text(blocks: Iterable[str | Table]) -> str:
    """Render lines and tables as plain text, 100 columns wide and without colour codes."""
    target = io.StringIO()
    # names come from users: brackets and colons in them are neither markup nor emoji
    console = Console(
        file=target, width=WIDTH, force_terminal=False, color_system=None, markup=False, emoji=False, highlight=False
    )
    for block in blocks:
        if isinstance(block, str):
            console.print(block)
            continue
        for columns in _fitting_columns(block):
            if block.title:
                console.print(block.title)
            console.print(_rich_table(block, columns))
        if block.note:
            console.print(block.note)
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines()) + "\n"


def render_markdown(blocks: Iterable[str | Table]) -> str:
    """Render Markdown lines and tables as Markdown; a table's title becomes a heading of the second level."""
    lines: list[str] = []
    for block in blocks:
        if isinstance(block, str):
            lines += [block, ""]
            continue
        lines += [f"## {escape(block.title)}", ""] if block.title else []
        lines += [*markdown_lines(block), ""]
        lines += [escape(block.note), ""] if block.note else []
    return "\n".join(lines)


def markdown_lines(table: Table) -> list[str]:
    """Return the lines of a Markdown table, without title and note."""
    return [
        "| " + " | ".join(escape(column.heading) for column in table.columns) + " |",
        "|" + "".join("---:|" if column.is_number else "---|" for column in table.columns),
        *(
            "| "
            + " | ".join(
                str(cell) if column.is_number else escape(str(cell))
                for cell, column in zip(row, table.columns, strict=True)
            )
            + " |"
            for row in table.rows
        ),
    ]


def escape(text: str) -> str:
    """Return text that neither ends its Markdown cell nor becomes HTML or emphasis."""
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _fitting_columns(table: Table) -> Iterator[list[int]]:
    """Yield the columns of each part of a table that is too wide for a terminal; text columns are in every part."""
    numbers = [index for index, column in enumerate(table.columns) if column.is_number]
    others = [index for index, column in enumerate(table.columns) if not column.is_number]
    widest = max((_min_width(table, index) for index in numbers), default=1)
    count = max(1, (WIDTH - MIN_LABEL_WIDTH) // (widest + 2))
    for start in range(0, len(numbers) or 1, count):
        yield sorted([*others, *numbers[start : start + count]])


def _rich_table(table: Table, columns: Sequence[int]) -> RichTable:
    rendered = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for index in columns:
        column = table.columns[index]
        rendered.add_column(
            column.heading,
            justify="right" if column.is_number else "left",
            min_width=_min_width(table, index) if column.is_number else None,
            overflow="fold",
        )
    for row in table.rows:
        rendered.add_row(*(str(row[index]) for index in columns))
    return rendered


def _min_width(table: Table, index: int) -> int:
    """Return the width in which neither a cell of a column nor a word of its heading is broken."""
    return max(map(len, [*table.columns[index].heading.split(), *(str(row[index]) for row in table.rows)]))
