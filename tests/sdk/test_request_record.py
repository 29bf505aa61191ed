"""The record of each request that `log.requests` puts into the log."""

import json
import urllib.request

import pytest

from spans import CHAT, chat, ended, ends, fetch, over


def requests_done(logged):
    return [json.loads(line) for line in logged.splitlines() if '"request done"' in line]


@pytest.mark.parametrize("on", [True, False])
def test_one_record_for_each_request(engine, on):
    with ends(over(engine, {}, log={"requests": on})) as (running, raised):
        running.send(body=chat(stream=True), x_request_id="streamed", x_session_id="conversation-2")
        running.send(body=chat() | {"model": "unknown"}, x_request_id="refused")
        fetch(urllib.request.Request(running.admin + "/admin/upstreams"))
        ended(running, 20)
    done = requests_done(str(raised.value))
    if not on:
        assert done == []
        return
    records = {record["id"]: record for record in done}
    # The checks of the harness are requests too.
    assert {record["path"] for record in done} == {CHAT, "/health"}
    streamed, refused = records["streamed"], records["refused"]
    assert streamed["level"] == refused["level"] == "info"
    said = (streamed["upstream"], streamed["session"], streamed["outcome"])
    assert said == ("gpu-0", "conversation-2", "ok")
    phases = ["body_wait_ms", "queue_ms", "connect_ms", "send_ms", "prefill_ms", "stream_ms"]
    assert all(streamed[name] >= 0 for name in phases)
    assert sum(streamed[name] for name in phases) <= streamed["total_ms"] + 1
    assert streamed["max_gap_ms"] <= streamed["stream_ms"]
    assert streamed["output_tokens"] == 8
    assert (refused["status"], refused["outcome"]) == (404, "client_error")
    # The record of a model that no upstream serves named no model at all.
    assert (refused["model"], refused["client_model"]) == ("", "unknown")
    assert (streamed["model"], "client_model" in streamed) == ("sim", False)
    assert "output_tokens" not in refused, "what is unknown is left out"
