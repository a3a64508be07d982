"""A headless Chromium for tests: pip install playwright, and a Chromium, which is Debian's `chromium`, the one of
`playwright install chromium`, or MMQ_CHROMIUM=/path. Tests that need it are skipped where either is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = os.environ.get("MMQ_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
HAS_BROWSER = importlib.util.find_spec("playwright") is not None and CHROMIUM is not None
needs_browser = pytest.mark.skipif(not HAS_BROWSER, reason="playwright or Chromium is not installed")


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser, as playwright's synchronous API has it."""
    api = importlib.import_module("playwright.sync_api")
    with api.sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()
