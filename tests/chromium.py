"""A Chromium for the tests of our pages; they are skipped with a reason where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "LLMCO2_CHROMIUM"
# For people to look at; git ignores it.
PICTURES = Path(__file__).resolve().parents[1] / "build" / "observability"


def executable() -> str:
    """Path of a Chromium; skips the test without one."""
    path = os.environ.get(VARIABLE) or shutil.which("chromium")
    if path is None:
        pytest.skip(f"no Chromium: neither {VARIABLE} nor a command chromium (apt install chromium)")
    return path


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser of Playwright; skips the test without Playwright or without a Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = executable()
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()
