"""A server on this machine, for shards behind a URL."""

import http.server
import shutil
import threading
from functools import partial

import pytest


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """The URL of a server on this machine that hands out ``tmp_path``."""
    if shutil.which("curl") is None:
        pytest.skip("webdataset fetches shards with curl, which is not installed")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
