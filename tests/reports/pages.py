"""Parsing and layout of HTML pages, for tests."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

HOSTILE = '<script>alert("1")</script> --> & $x_1$ [bold]'
"""Text that would run as a script, end a comment, start a formula or become markup if it were not escaped."""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """Tags with their attributes, and the visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def loads_nothing(self) -> bool:
        """True if the page has no script and no reference to another file."""
        return not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in self.tags}


def lay_out(page: str, width: int, folder: Path) -> tuple[int, int, int]:
    """Return scroll width, client width and height of a page in a browser window of that width."""
    inside = html.escape(page)
    outside = folder / "outside.html"
    # a browser window has a minimum width, a frame does not
    outside.write_text(
        f'<iframe id="f" style="border:0;width:{width}px;height:900px" srcdoc="{inside}"></iframe><p id="out"></p>'
        "<script>onload = () => { const page = document.getElementById('f').contentDocument.documentElement;"
        "document.getElementById('out').textContent ="
        " `scroll ${page.scrollWidth} client ${page.clientWidth} high ${page.scrollHeight}`; }</script>",
        encoding="utf-8",
    )
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=15000", "--window-size=1400,1000"]
    done = subprocess.run(
        [*command, "--dump-dom", outside.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    found = re.search(r"scroll (\d+) client (\d+) high (\d+)", done.stdout)
    assert found is not None, done.stdout[-500:]
    scroll, client, high = map(int, found.groups())
    return scroll, client, high
