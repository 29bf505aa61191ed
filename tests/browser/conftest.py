"""Fixtures of the browser tests: a headless Chromium, pages that watch what they do, and servers to show.

The browser is the system's: CHROMIUM names it where it is not `chromium`. Tests that need processes that die
run real ones by the harness of the SDK tests; the others have the stub of stub.py.
"""

import contextlib
import os
import pathlib
import shutil
import sys

import pytest
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "sdk"))

import stub  # noqa: E402
import watched  # noqa: E402

# What Chromium itself would request: updates, lists of bad sites.
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--no-first-run",
         "--enable-precise-memory-info", "--js-flags=--expose-gc"]


@pytest.fixture(scope="session")
def browser():
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert program, "there is no chromium: install it, or run ./dev setup"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield running
        running.close()


@pytest.fixture
def visit(browser):
    """Opens pages: visit(url, width=..., theme=...). At the end each must have been quiet."""
    with contextlib.ExitStack() as opened:
        pages = []

        def open_page(url, width=1280, height=900, theme="light", **options):
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=theme,
                reduced_motion="reduce",
                **options,
            )
            opened.callback(context.close)
            page = watched.WatchedPage(context.new_page(), url)
            pages.append(page)
            page.page.goto(url)
            return page

        yield open_page
        for page in pages:
            page.check()


@pytest.fixture
def serve():
    """Starts stubs: serve(upstreams=..., hostile=..., token=...)."""
    with contextlib.ExitStack() as running:
        yield lambda **fields: running.enter_context(stub.serving(**fields))


@pytest.fixture
def balancers():
    """Starts real balancers over real engines: see watched.balancer."""
    with contextlib.ExitStack() as running:
        yield lambda **fields: running.enter_context(watched.balancer(**fields))
