"""Makes the pictures of the dashboard in docs/images, of a real balancer under load:

    VLLM_LB_BIN=target/debug/vllm-lb .dev/venv/bin/python tests/browser/pictures.py
"""

import contextlib
import shutil
import sys

from playwright.sync_api import sync_playwright

import stub

ENGINES = 8
# As fast as one H100, with a cache that the conversations fill.
OPTIONS = ("--speed", "1", "--cache-tokens", "40000")
# What the pictures show as the name of the balancer.
HOST = "lb-0"
# Seconds of traffic before the first picture.
WARM_UP = 150
# The largest picture, in bytes.
MAX_BYTES = 200_000

IMAGES = stub.ROOT / "docs" / "images"


def trace_of(balancer):
    """A recorded call that was no stream: its tokens have their texts."""
    balancer.chat("Why is a warm cache worth more than an idle engine?", session="example", tokens=120)
    return balancer.json("sessions/example/traces")[0]["trace_id"]


def take(page, name, view, ready, theme="light", width=1280, height=860, wait=1.5):
    """A picture of a view, when it shows what `ready` selects."""
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=theme, reduced_motion="reduce")
    page.evaluate("view => { location.hash = view }", view)
    page.locator(ready).first.wait_for()
    page.locator("#stream[data-tone=good]").wait_for()
    page.wait_for_timeout(wait * 1000)
    path = IMAGES / f"dashboard-{name}.png"
    page.screenshot(path=path)
    size = path.stat().st_size
    print(f"{path.name}: {size} bytes")
    assert size < MAX_BYTES, f"{path} is larger than {MAX_BYTES} bytes"


def main():
    # The harness is on the path of the tests.
    sys.path.insert(0, str(stub.ROOT / "tests" / "sdk"))
    import watched

    with contextlib.ExitStack() as running:
        balancer = running.enter_context(watched.balancer(engines=ENGINES, options=OPTIONS, host=HOST))
        browser = running.enter_context(sync_playwright()).chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        running.callback(browser.close)
        running.enter_context(watched.Traffic(balancer, clients=36, tokens=160, pause=5.0, length=600))
        page = browser.new_page()
        page.goto(balancer.admin)
        page.wait_for_timeout(WARM_UP * 1000)
        balancer.kill("gpu-5")
        page.wait_for_timeout(4000)
        take(page, "light", "#/", "#fleet-rows tr")
        take(page, "dark", "#/upstreams/gpu-2", ".plot canvas", theme="dark")
        take(page, "decision", "#/decisions", "#decision .bars li")
        trace = trace_of(balancer)
        take(page, "trace", f"#/traces/{trace}", ".tokens .token")
        take(page, "narrow", "#/", "#fleet-rows tr", width=380, height=760)


if __name__ == "__main__":
    main()
