"""Photograph a report's page as Chromium shows it: its top, light, and beside it its plots, dark.

    python tools/page_picture.py docs/report/report.html docs/report/page.png

Needs playwright and a Chromium, as tests/browsing.py says.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT, GAP = 1160, 1330, 16


def main() -> None:
    """Both, one picture."""
    page, picture = map(Path, sys.argv[1:3])
    chromium = os.environ.get("MMQ_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    shots = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme, part in (("light", ""), ("dark", "#load")):
            tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme)
            tab.goto(page.resolve().as_uri() + part)
            shots.append(Image.open(io.BytesIO(tab.screenshot())).convert("RGB"))
        browser.close()
    both = Image.new("RGB", (2 * WIDTH + GAP, HEIGHT), "#888888")
    for at, shot in enumerate(shots):
        both.paste(shot, (at * (WIDTH + GAP), 0))
    both.quantize(255, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    main()
