"""The page over a real balancer and real processes of the simulated engine."""

import contextlib
import functools
import http.server
import threading

import pytest

import stub
import watched


def state_of(name):
    """The script that reads the state in an upstream's row."""
    row = f"[...document.querySelectorAll('#fleet-rows tr')].find((row) => row.dataset.name === '{name}')"
    return f"({row})?.querySelector('.c-state').innerText.trim()"


def open_live(visit, balancer, **options):
    page = visit(balancer.admin, **options)
    page.is_live()
    return page


def test_loads_with_one_request_for_the_page_and_none_to_another_host(visit, balancers):
    balancer = balancers()
    requested = []
    page = visit(balancer.admin)
    page.page.on("request", lambda request: requested.append(request.url))
    page.page.reload()
    page.is_live()
    page.go("#/decisions")
    page.page.get_by_text("No request has come yet.").wait_for()
    paths = {url.removeprefix(balancer.admin).split("?")[0] for url in requested}
    assert paths == {"", "admin/live", "admin/config"}


def test_the_served_page_is_the_one_of_the_sources(balancers):
    balancer = balancers(engines=1)
    with watched.get(balancer.admin) as answer:
        assert (answer.read(), answer.headers["content-security-policy"]) == stub.page()


@contextlib.contextmanager
def other_site(folder):
    """Serves a folder as another site than 127.0.0.1; gives its URL."""

    class QuietHandler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(QuietHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://localhost:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_page_of_another_site_gets_nothing_and_its_links_are_followed(browser, balancers, tmp_path):
    balancer = balancers(engines=1)
    (tmp_path / "index.html").write_text(f'<a href="{balancer.admin}admin/upstreams">a link</a>')
    with other_site(tmp_path) as url, contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(url)
        for path in ("admin/live", "admin/overview", "admin/upstreams", "metrics"):
            target = balancer.admin + path
            with page.expect_response(target) as answer:
                page.evaluate("url => fetch(url, {mode: 'no-cors'}).then(() => null, () => null)", target)
            assert answer.value.status == 403, path
        page.get_by_text("a link").click()
        page.wait_for_url(balancer.admin + "**")
        assert "gpu-0" in page.content()


def test_shows_at_once_that_an_upstream_is_killed(visit, balancers):
    balancer = balancers(engines=3)
    page = open_live(visit, balancer)
    page.wait_for(f"{state_of('gpu-1')} === 'Ready'")
    balancer.kill("gpu-1")
    page.wait_for(f"{state_of('gpu-1')} === 'Down'")
    assert page.page.locator("#fleet-rows .name").first.inner_text() == "gpu-1"
    page.page.get_by_text("1 upstream down: gpu-1.").wait_for()
    page.wait_for("document.querySelector('#announcer').innerText.includes('gpu-1 is')")
    assert page.text("#ready") == "Ready 2/3"
    page.page.get_by_label("Show what needs attention: down").click()
    page.wait_for("document.querySelectorAll('#fleet-rows tr').length === 1")


def test_numbers_move_with_traffic(visit, balancers):
    balancer = balancers(engines=2)
    page = open_live(visit, balancer)
    with watched.Traffic(balancer, clients=3):
        page.wait_for("parseFloat(document.querySelector('.tile-value').innerText) > 0")
        page.wait_for("store.totals.rate('output_tokens') > 0")
        # A conversation that goes on is cached: the engine reports it, and the balancer predicted it.
        page.wait_for("store.totals.share('reported_tokens', 'compared_tokens') > 0.3")
        page.wait_for("store.totals.share('predicted_tokens', 'compared_tokens') > 0.3")
        page.go("#/upstreams/gpu-0")
        page.page.locator(".plot canvas").first.wait_for()
        page.go("#/models")
        page.wait_for("document.querySelector('#view-models tbody th').innerText === 'sim'")
        counted = page.page.locator("#view-models tbody td").nth(1).inner_text()
        assert int(counted.replace(",", "")) > 0
    shown = page.page.evaluate("store.frame.totals.requests")
    assert 0 < shown <= balancer.overview()["totals"]["requests"]


def test_drains_one_by_click_and_brings_it_back(visit, balancers):
    balancer = balancers(engines=2)
    page = open_live(visit, balancer)
    page.page.get_by_label("Drain gpu-0", exact=True).click()
    dialog = page.page.get_by_role("dialog", name="Drain gpu-0?")
    dialog.get_by_role("button", name="Drain").click()
    page.page.get_by_role("status").get_by_text("gpu-0 is draining.").wait_for()
    page.wait_for(f"{state_of('gpu-0')} === 'Draining'")
    for turn in range(6):
        balancer.chat(f"Hello {turn}")
    rows = {row["name"]: row for row in balancer.overview()["upstreams"]}
    assert (rows["gpu-0"]["requests"], rows["gpu-1"]["requests"]) == (0, 6)
    page.page.get_by_label("Undrain gpu-0", exact=True).click()
    page.page.get_by_role("button", name="Undrain", exact=True).click()
    page.wait_for(f"{state_of('gpu-0')} === 'Ready'")


def test_explains_a_decision(visit, balancers):
    balancer = balancers(engines=3)
    words = "Tell me about load balancers. " * 400
    balancer.chat(words)
    balancer.chat(words)
    page = open_live(visit, balancer)
    page.go("#/decisions")
    page.page.locator("#decisions-list .pick").nth(1).wait_for()
    page.page.locator("#decisions-list .pick").first.click()
    decision = balancer.json("admin/decisions?limit=1")[0]
    page.page.get_by_role("heading", name=f"{decision['upstream']} was chosen").wait_for()
    said = page.text("#decision")
    assert decision["reason"] == "prefix"
    assert "Without this cache another upstream would have won." in said
    page.page.locator("#decision .bars li").nth(2).wait_for()
    assert page.page.locator("#decision .bars li.chosen").count() == 1
    # All bars have one scale.
    tracks = "[...document.querySelectorAll('.bars .track')]"
    assert page.page.evaluate(f"new Set({tracks}.map((one) => one.offsetWidth)).size") == 1
    # The pieces of the bars are the terms of the cost by the knobs of the running configuration.
    assert page.page.locator("#decision .t-missing").count() >= 3
    assert page.page.locator("#decision .t-whole").count() == 0
    page.page.locator("#decision summary").click()
    table = page.page.get_by_role("table", name="The terms as numbers")
    assert table.get_by_role("row").count() == 4
    assert str(decision["prompt_tokens"]) in said.replace(",", "")


@pytest.mark.parametrize("stream", [False, True])
def test_opens_a_recorded_call_and_reads_its_tokens(visit, balancers, stream):
    balancer = balancers(engines=1)
    balancer.chat("Hello <b>there</b>", session="s/1", stream=stream)
    page = open_live(visit, balancer)
    page.page.get_by_role("link", name="Sessions").click()
    page.page.get_by_role("link", name="s/1").click()
    page.page.locator("#view-sessions tbody a").first.click()
    page.page.get_by_role("heading", name="Recorded call").wait_for()
    page.page.get_by_text("Hello <b>there</b>").wait_for()
    trace = balancer.json("sessions/s%2F1/traces")[0]
    tokens = page.page.get_by_role("option")
    assert tokens.count() == len(trace["logprobs"]) == 12
    levels = page.page.evaluate("[...document.querySelectorAll('[role=option]')].map((one) => one.className)")
    bounds = [(-0.105361, 0), (-0.510826, 1), (-1.203973, 2), (-2.302586, 3), (float("-inf"), 4)]
    expected = [next(level for least, level in bounds if value >= least) for value in trace["logprobs"]]
    assert levels == [f"token level-{level}" for level in expected]
    tokens.nth(0).focus()
    page.page.keyboard.press("ArrowRight")
    said = page.text(".reading")
    assert f"log-probability {trace['logprobs'][1]:.3f}" in said.replace("−", "-")
    assert f"id {trace['completion_token_ids'][1]}" in said
    tokens.nth(4).hover()
    assert f"log-probability {trace['logprobs'][4]:.3f}" in page.text(".reading")
    assert page.page.get_by_role("link", name="gpu-0").get_attribute("href") == "#/upstreams/gpu-0"


def test_the_list_of_sessions_explains_itself_without_a_store(visit, balancers):
    page = open_live(visit, balancers(engines=1, traces={"store": "none"}))
    page.expected.append("501")
    page.go("#/sessions")
    page.page.get_by_text("No calls are recorded").wait_for()


def test_needs_the_token_of_the_configuration(visit, balancers):
    balancer = balancers(engines=1, token="open-sesame")
    page = visit(balancer.admin)
    page.expected.append("401")
    page.page.get_by_role("dialog", name="Token of the admin listener").wait_for()
    page.page.get_by_label("Token", exact=True).last.fill("open-sesame")
    page.page.keyboard.press("Enter")
    page.is_live()
    page.go("#/upstreams/gpu-0")
    page.page.get_by_role("button", name="Weight…").click()
    page.page.get_by_label("Weight", exact=True).fill("3")
    page.page.keyboard.press("Enter")
    page.page.get_by_text("The weight of gpu-0 is 3.").wait_for()


def test_reloads_and_shows_the_problems_of_a_file(visit, balancers):
    balancer = balancers(engines=1)
    page = open_live(visit, balancer)
    page.go("#/balancers")

    def reload():
        page.page.get_by_role("button", name="Reload the configuration…").click()
        page.page.get_by_role("button", name="Reload", exact=True).click()

    reload()
    page.page.get_by_text("Reloaded: nothing has changed.").wait_for()
    page.expected.append("422")
    balancer.file.write_text("listen: [")
    reload()
    page.page.get_by_role("alert").get_by_text("everything stays as it was").wait_for()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_works_at_380_pixels_and_passes_axe(visit, balancers, theme):
    balancer = balancers(engines=3)
    page = open_live(visit, balancer, width=380, theme=theme)
    with watched.Traffic(balancer, clients=3):
        page.wait_for("store.totals.rate('requests') > 0")
    trace = balancer.json("sessions/talk-0/traces?limit=1")[0]["trace_id"]
    found = []
    for view in ["#/", "#/upstreams/gpu-1", "#/models", "#/decisions", "#/sessions", "#/sessions/talk-0",
                 f"#/traces/{trace}", "#/balancers"]:
        page.go(view)
        page.page.wait_for_timeout(1200)
        assert page.is_narrow(), view
        found += [f"{view} {problem}" for problem in page.serious()]
    assert found == []
    # Everything that the wide page can do is here, too.
    page.go("#/")
    page.page.get_by_label("Drain gpu-2", exact=True).click()
    page.page.get_by_role("dialog", name="Drain gpu-2?").get_by_role("button", name="Drain").click()
    page.wait_for(f"{state_of('gpu-2')} === 'Draining'")


def test_comes_back_when_the_balancer_was_restarted(visit, balancers):
    balancer = balancers(engines=1)
    page = open_live(visit, balancer)
    page.expected += ["ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_EMPTY_RESPONSE",
                      "ERR_CONNECTION_RESET"]
    before = page.page.evaluate("store.frame.balancer.started")
    balancer.restart()
    page.wait_for("before => store.frame.balancer.started !== before", before)
    page.is_live()
    assert page.page.evaluate("store.timeline.length") < 10
