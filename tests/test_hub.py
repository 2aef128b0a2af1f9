"""A hub that cannot be reached is told within seconds; everything else is left to the hub's client."""

import http.server
import threading

import pytest
from huggingface_hub import constants

from vs2_plugin import hub
from vs2_plugin.hub import chain, require_hub


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """How long was waited before each attempt. The hub's cache is empty, and nothing listens at its address."""
    pauses = []
    monkeypatch.setattr(hub.time, "sleep", pauses.append)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return pauses


@pytest.fixture
def server():
    """A hub that is overloaded."""

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(503)
            self.end_headers()

        def log_message(self, *words):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Busy) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_a_hub_without_a_way_to_it_is_told_after_three_attempts(asked):
    with pytest.raises(ConnectionError, match=r"no way to http://127.0.0.1:9 \(.*refused\), tried for .* and org/name"):
        require_hub("org/name")
    assert asked == [0, 1, 2]


def test_a_hub_that_answers_whatever_it_says_is_left_to_its_client(asked, monkeypatch, server):
    monkeypatch.setattr(constants, "ENDPOINT", server)
    require_hub("org/name")
    assert asked == [0]


def test_one_good_attempt_is_enough(asked, monkeypatch, server):
    def sleep(seconds):
        asked.append(seconds)
        if seconds:
            monkeypatch.setattr(constants, "ENDPOINT", server)

    monkeypatch.setattr(hub.time, "sleep", sleep)
    require_hub("org/name")
    assert asked == [0, 1]


@pytest.mark.parametrize("error", [TimeoutError("slow"), ConnectionResetError(104, "reset"), ValueError("odd")])
def test_what_may_pass_is_left_to_the_client(error, asked, monkeypatch):
    class Session:
        def head(self, *given, **options):
            raise RuntimeError("wrapped") from error

    monkeypatch.setattr(hub, "get_session", Session)
    require_hub("org/name")
    assert asked == [0]


def test_nothing_is_asked_where_the_answer_is_of_no_use(asked, monkeypatch, tmp_path):
    for cache in ("cache", "other"):
        file = tmp_path / cache / "models--org--name" / "snapshots" / "0f" / "weights.bin"
        file.parent.mkdir(parents=True)
        file.touch()
    require_hub("org/name")
    require_hub("org/name", str(tmp_path / "other"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    require_hub("org/another")
    assert asked == []


def test_a_chain_of_exceptions_ends():
    first, second = ValueError(1), ValueError(2)
    first.__cause__, second.__context__ = second, first
    assert list(chain(first)) == [first, second]
