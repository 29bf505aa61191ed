"""The page over a made-up fleet: what real processes do not show on demand."""

import json
import time

import pytest

import stub

VIEWS = ["#/", "#/models", "#/decisions", "#/sessions", "#/sessions/x", "#/traces/x", "#/balancers",
         "#/upstreams/gpu-3"]


def open_live(visit, server, **options):
    page = visit(server.url, **options)
    page.is_live()
    return page


def test_shows_200_upstreams_and_keeps_their_rows(visit, serve):
    server = serve(upstreams=200)
    page = open_live(visit, server)
    page.wait_for("document.querySelectorAll('#fleet-rows tr').length === 200")
    page.page.evaluate("document.querySelectorAll('#fleet-rows tr').forEach((row) => (row.mark = 1))")
    server.burst = 30
    page.wait_for("document.querySelectorAll('.tile')[0].innerText.includes('so far')")
    page.wait_for("start => document.querySelector('#stream') && performance.now() > start + 2000",
                  page.page.evaluate("performance.now()"))
    rows = "[...document.querySelectorAll('#fleet-rows tr')]"
    kept = page.page.evaluate(f"{rows}.filter((row) => row.mark).length")
    assert kept == 200


def test_a_frame_of_200_upstreams_costs_little(visit, serve):
    server = serve(upstreams=200)
    page = open_live(visit, server)
    server.burst = 130
    page.wait_for("store.timeline.length > 120")
    # Whole frames: parse, take, render and lay out.
    script = """() => {
        const text = JSON.stringify(store.frame);
        for (let turn = 0; turn < 21; turn += 1) {
            const frame = JSON.parse(text);
            frame.time = store.frame.time + 1;
            for (const row of frame.upstreams) { row.requests += turn; row.active += turn; }
            store.take(frame);
            VIEWS.fleet.render();
            document.body.offsetHeight;
        }
    }"""
    milliseconds = page.processor_time(script) / 21
    print(f"one frame of 200 upstreams: {milliseconds:.1f} ms")
    assert milliseconds < 150


def test_sorts_and_filters(visit, serve):
    server = serve(upstreams=40)
    server.fleet.upstreams[17].update(state="down", reason="connection refused")
    page = open_live(visit, server)

    def first():
        return page.page.locator("#fleet-rows .name").first.inner_text()

    page.wait_for("document.querySelector('#fleet-rows .name').innerText === 'gpu-17'")
    assert "connection refused" in page.page.locator("#fleet-rows tr").first.inner_text()
    page.page.get_by_role("button", name="Upstream").click()
    page.wait_for("document.querySelector('#fleet-rows .name').innerText === 'gpu-0'")
    page.page.get_by_role("button", name="Upstream").click()
    page.wait_for("document.querySelector('#fleet-rows .name').innerText === 'gpu-39'")
    assert page.page.locator("th[aria-sort=descending]").inner_text().startswith("Upstream")
    page.page.get_by_label("Filter upstreams").fill("gpu-2")
    page.wait_for("document.querySelectorAll('#fleet-rows tr').length === 11")
    page.page.get_by_label("Filter upstreams").fill("")
    page.page.get_by_role("button", name="1 Down").click()
    page.wait_for("document.querySelectorAll('#fleet-rows tr').length === 1")
    assert first() == "gpu-17"
    page.page.get_by_label("Filter upstreams").fill("nothing like it")
    page.page.get_by_text("No upstream fits the filter.").wait_for()


def test_an_empty_fleet_is_explained(visit, serve):
    page = open_live(visit, serve(upstreams=0))
    page.page.get_by_text("There are no upstreams yet").wait_for()
    page.go("#/decisions")
    page.page.get_by_text("No request has come yet.").wait_for()


@pytest.mark.parametrize("view", VIEWS)
def test_hostile_texts_are_texts(visit, serve, view):
    server = serve(upstreams=5, hostile=True)
    page = open_live(visit, server)
    page.go(view.replace("gpu-3", "%3Cimg%20src%3Dx%20onerror%3D%22document.title%3D'broken'%22%3E-3"))
    page.page.wait_for_timeout(1500)
    if view not in ("#/balancers",):
        page.page.get_by_text("<img src=x onerror").first.wait_for(state="attached")
    assert page.page.evaluate("document.querySelectorAll('img, main b b').length") == 0
    assert "broken" not in page.page.title().replace(stub.HOSTILE, "")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 380])
def test_axe_finds_nothing_serious(visit, serve, theme, width):
    server = serve(upstreams=6)
    rows = server.fleet.upstreams
    for at, state in enumerate(["down", "tripped", "suspect", "unknown", "draining"]):
        rows[at].update(state=state, reason="connection refused", drained=state == "draining")
    page = open_live(visit, server, theme=theme, width=width)
    server.burst = 12
    found = []
    for view in VIEWS:
        page.go(view)
        page.page.wait_for_timeout(700)
        found += [f"{view} {problem}" for problem in page.serious()]
        assert page.is_narrow(), view
    page.go("#/")
    page.page.get_by_label("Drain gpu-5", exact=True).click()
    found += [f"dialog {problem}" for problem in page.serious()]
    assert found == []


def test_the_switch_of_the_theme_stays(visit, serve):
    server = serve(upstreams=3)
    page = open_live(visit, server, theme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.page.evaluate(ground)
    page.page.locator("#theme label[title=Dark]").click()
    dark = page.page.evaluate(ground)
    assert dark != light
    page.page.reload()
    page.is_live()
    assert page.page.evaluate(ground) == dark


def test_asks_for_the_token_and_uses_it(visit, serve):
    server = serve(upstreams=3, token="open-sesame")
    page = visit(server.url)
    page.expected.append("401")
    dialog = page.page.get_by_role("dialog", name="Token of the admin listener")
    dialog.wait_for()
    page.page.get_by_label("Token", exact=True).last.fill("wrong")
    page.page.get_by_role("button", name="Use it").click()
    page.page.get_by_text("does not accept this token").wait_for()
    page.page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    assert page.text("#stream") == "Token needed"
    page.page.get_by_role("button", name="Enter the token").click()
    page.page.get_by_label("Token", exact=True).last.fill("open-sesame")
    page.page.keyboard.press("Enter")
    page.is_live()
    assert page.page.evaluate("[localStorage.length, Object.values(sessionStorage)]")[1] == ["open-sesame"]
    page.page.reload()
    page.is_live()
    page.page.get_by_role("button", name="Token", exact=True).click()
    page.page.get_by_role("button", name="Forget it").click()
    page.wait_for("document.querySelector('#stream').innerText === 'Token needed'")


def test_a_lost_stream_is_shown_and_comes_back(visit, serve):
    server = serve(upstreams=3)
    page = open_live(visit, server)
    page.expected.append("503")
    server.broken = True
    page.wait_for("document.querySelector('#stream').innerText === 'Reconnecting'")
    assert page.page.locator("body[data-stale]").count() == 1
    page.wait_for("document.querySelector('#announcer').innerText.includes('lost')")
    # The words of the balancer's error, and the age of what is shown.
    page.page.get_by_text("No live numbers: broken. The numbers are of").wait_for()
    # The page connects by itself half a second after a failure, or later: this test sees the button do it.
    page.wait_for("live.abort.signal.aborted && (clearTimeout(live.retry), true)")
    server.broken = False
    page.page.get_by_role("button", name="Try now").click()
    page.is_live()
    assert page.page.locator("#connection").is_hidden()
    page.wait_for("document.querySelector('#announcer').innerText.includes('back')")
    assert page.page.locator("body[data-stale]").count() == 0
    assert server.streams == 2


def test_a_silent_stream_counts_as_lost(visit, serve):
    server = serve(upstreams=3)
    page = open_live(visit, server)
    server.interval = 3600
    # The page connects again after half a second, and the next stream is silent as well.
    silent = "document.querySelector('#connection-text').innerText.includes('nothing came for 10 s.')"
    page.wait_for(f"{silent} && document.querySelector('#stream').innerText === 'Reconnecting'")


def test_drains_with_the_keyboard_alone(visit, serve):
    server = serve(upstreams=3)
    page = open_live(visit, server)
    page.page.get_by_label("Drain gpu-1", exact=True).focus()
    page.page.keyboard.press("Enter")
    page.page.get_by_role("dialog", name="Drain gpu-1?").wait_for()
    page.page.keyboard.press("Escape")
    page.page.get_by_role("dialog").wait_for(state="hidden")
    assert server.calls == []
    assert page.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Drain gpu-1"
    page.page.keyboard.press("Enter")
    page.page.keyboard.press("Enter")
    page.page.get_by_role("status").get_by_text("gpu-1 is draining.").wait_for()
    assert server.calls == [("PATCH", "gpu-1", {"drain": True})]
    page.page.get_by_label("Undrain gpu-1", exact=True).wait_for()


def test_sets_a_weight_and_reloads(visit, serve):
    server = serve(upstreams=3)
    page = open_live(visit, server)
    page.go("#/upstreams/gpu-2")
    page.page.get_by_role("button", name="Weight…").click()
    page.page.get_by_label("Weight", exact=True).fill("-1")
    page.page.get_by_role("button", name="Set the weight").click()
    assert server.calls == []
    page.page.get_by_label("Weight", exact=True).fill("2.5")
    page.page.get_by_role("button", name="Set the weight").click()
    page.page.get_by_text("The weight of gpu-2 is 2.5.").wait_for()
    page.go("#/balancers")
    page.page.get_by_role("button", name="Reload the configuration…").click()
    page.page.get_by_role("button", name="Reload", exact=True).click()
    page.page.get_by_text("Reloaded: changed balance.").wait_for()
    assert server.calls == [("PATCH", "gpu-2", {"weight": 2.5}), ("POST", "/admin/reload", None)]


def test_the_tab_key_reaches_everything_and_leaves(visit, serve):
    page = open_live(visit, serve(upstreams=2))
    names, focus = [], "document.activeElement"
    for _ in range(60):
        page.page.keyboard.press("Tab")
        name = page.page.evaluate(f"{focus}.getAttribute('aria-label') ?? {focus}.innerText")
        names.append(name)
        if len(names) > 5 and page.page.evaluate(f"{focus} === document.body"):
            break
    for wanted in ("Skip to the content", "Token", "Decisions", "Filter upstreams", "gpu-1", "Drain gpu-1"):
        assert wanted in names, names


def test_pausing_keeps_the_decisions_still(visit, serve):
    server = serve(upstreams=8)
    page = open_live(visit, server)
    page.go("#/decisions")
    page.page.locator("#decisions-list .pick").first.wait_for()
    page.page.get_by_role("button", name="Pause").click()
    before = page.text("#decisions-list")
    server.burst = 20
    page.wait_for("document.querySelector('#decisions-pause').innerText.match(/[1-9][0-9]* new/)")
    assert page.text("#decisions-list") == before
    page.page.get_by_role("button", name="Go on").click()
    page.wait_for("before => document.querySelector('#decisions-list').innerText !== before", before)


def test_2000_frames_leave_the_memory_flat(visit, serve):
    """Frames a second apart in the fleet's time: rings are full after 900, then nothing may grow."""
    server = serve(upstreams=20)
    page = open_live(visit, server)
    views = ["#/", "#/upstreams/gpu-3", "#/decisions", "#/balancers", "#/models", "#/sessions", "#/traces/x"]

    def drive(frames):
        """Frames as fast as the page takes them, while each view is opened and closed twice or more."""
        end, server.burst, turn = server.now + frames, frames, 0
        deadline = time.monotonic() + 240
        while page.page.evaluate("store.frame.time") < end - 1 or turn < 2 * len(views):
            assert time.monotonic() < deadline, "the page does not keep up"
            page.go(views[turn % len(views)])
            page.page.wait_for_timeout(150)
            turn += 1
        page.go("#/")
        page.page.wait_for_timeout(1200)
        return page.heap()

    warm = drive(1000)
    done = drive(2000)
    print(json.dumps({"after 1000 frames": warm, "after 3000 frames": done}))
    assert done[0] < warm[0] * 1.1 + 1_000_000
    assert done[1] < warm[1] * 1.1 + 100
    assert done[2] < warm[2] * 1.1 + 20
    assert page.page.evaluate("store.timeline.length") == 900
