"""Requests to a server that is slow, busy or broken."""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gift_lightning.vllm_client import RefusedError, VLLMClient


@contextmanager
def answering(*script):
    """A server that answers by the script: a status, "silence", or "cut" for a lost connection."""
    calls, let_go = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            what = script[min(len(calls), len(script) - 1)]
            calls.append(time.monotonic())
            if what == "silence":
                let_go.wait(60)
            if isinstance(what, str):
                self.close_connection = True
                return
            body = b'{"error": {"message": "no room\\nat all"}}'
            self.send_response(what)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_address[1]}", calls
    finally:
        let_go.set()
        made.shutdown()
        made.server_close()


def test_what_passes_is_tried_again():
    with answering(500, "cut", "silence", 200) as (url, calls):
        assert VLLMClient(url, 0.5, 3).get("/x") == {"error": {"message": "no room\nat all"}}
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("what", "why"), [(503, "status 503: no room"), ("silence", "timed out"), ("cut", "Remote")]
)
def test_what_does_not_pass_is_one_error_within_a_bound(what, why):
    start = time.monotonic()
    with (
        answering(what) as (url, calls),
        pytest.raises(RuntimeError, match=rf"fails at /x, asked 3 times .*{why}"),
    ):
        VLLMClient(url, 0.5, 2).get("/x")
    assert len(calls) == 3 and time.monotonic() - start < 20


def test_nobody_there_is_one_error():
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1:9 fails at /health\b.*refused"):
        VLLMClient("http://127.0.0.1:9", 5, 1).get("/health")


def test_a_busy_server_is_asked_again():
    with answering(429, 408, 200) as (url, calls):
        VLLMClient(url, 5, 2).get("/x")
    assert len(calls) == 3


def test_a_wrong_request_is_not_repeated():
    with (
        answering(400) as (url, calls),
        pytest.raises(RefusedError, match=r"refuses /x \(status 400: no room\): look at its log"),
    ):
        VLLMClient(url, 5, 3).get("/x")
    assert len(calls) == 1
