"""A browser without a screen, asked through a page that holds the page under test in a frame of the width wanted.

A window cannot be narrower than 500 pixels; a frame can, and media queries go by the frame. The outer page may look
into the frame (both are files), and writes what it sees into itself, which the browser prints.
"""

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
FLAGS += ("--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--allow-file-access-from-files")
LIGHT, DARK = "--blink-settings=preferredColorScheme=1", "--blink-settings=preferredColorScheme=0"

# One frame after the other, each put in before the outer page's own `load`, which waits for it.
_LOOK = """const seen = []; function next() { const width = widths.shift();
  if (!width) { said.textContent = JSON.stringify(seen); return }
  const frame = document.createElement('iframe'); frame.width = width; frame.height = 800;
  frame.onload = () => { const w = frame.contentWindow, d = w.document; seen.push({
    width: d.documentElement.clientWidth, needs: d.documentElement.scrollWidth,
    ms: w.performance.getEntriesByType('navigation')[0].domComplete,
    fetched: w.performance.getEntriesByType('resource').map(e => e.name),
    ids: [...d.querySelectorAll('[id]')].map(e => e.id),
    lost: [...d.querySelectorAll('use, a[href^="#"]')].map(e => e.getAttribute('xlink:href') || e.getAttribute('href'))
      .filter(h => !d.getElementById(h.slice(1))),
    nameless: [...d.querySelectorAll('svg')].filter(e => !e.getAttribute('aria-label')).length,
    pictures: d.querySelectorAll('svg').length, text: d.body.innerText }); next() };
  frame.src = page; document.body.append(frame) } next()"""


@dataclass(frozen=True)
class Seen:
    """What the frames showed, and what the browser's console said."""

    frames: list[dict[str, Any]]
    console: list[str]


def look(page: Path, widths: list[int]) -> Seen:
    """Opens a page in frames of these widths, one after the other."""
    with tempfile.TemporaryDirectory() as place:
        outer = Path(place) / "outer.html"
        told = f"const page = {json.dumps(page.as_uri())}, widths = {json.dumps(widths)};"
        outer.write_text(f"<!doctype html><body><pre id=said></pre><script>{told}{_LOOK}</script>")
        done = _chromium(place, "--enable-logging=stderr", "--dump-dom", outer.as_uri())
    found = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(json.loads(unescape(found[1])), console)


def shot(page: Path, picture: Path, width: int, height: int, scheme: str = LIGHT) -> None:
    """A picture of a frame of this size; to the right of a frame under 500 pixels there is some room."""
    with tempfile.TemporaryDirectory() as place:
        outer = Path(place) / "outer.html"
        frame = f'<iframe src="{escape(page.as_uri())}" width="{width}" height="{height}"></iframe>'
        style = "body { margin: 0; overflow: hidden } iframe { border: 0; display: block }"
        outer.write_text(f"<!doctype html><style>{style}</style>{frame}")
        window = f"--window-size={width},{height}"
        done = _chromium(place, "--hide-scrollbars", window, scheme, f"--screenshot={picture}", outer.as_uri())
    assert picture.exists(), done.stderr


def _chromium(place: str, *words: str) -> "subprocess.CompletedProcess[str]":
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={place}/profile", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
