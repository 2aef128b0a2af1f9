"""A stand-in of a model hub: as much of its interface as its own client needs to push a repository, and fetch one."""

import base64
import hashlib
import http.server
import json
import re
import threading
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit


class Hub:
    """What the stand-in holds."""

    def __init__(self):
        #: owner/name -> commit -> path -> bytes; the last commit is that of the branch main.
        self.repositories = {}
        #: Requests that were answered: method and path.
        self.asked = []
        #: Whether requests need a token.
        self.closed = False
        self.tags = {}

    def commit(self, repository, files):
        """Add a commit of these files alone. Returns its SHA."""
        commits = self.repositories.setdefault(repository, {})
        sha = hashlib.sha1(f"{repository} {len(commits)}".encode()).hexdigest()
        commits[sha] = dict(files)
        return sha

    def files(self, repository, revision="main"):
        """The commit's SHA and its files."""
        commits = self.repositories[repository]
        sha = self.tags.get(revision, list(commits)[-1] if revision == "main" else revision)
        return sha, commits[sha]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def answer(self, value, status=200, **headers):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.begin()
        if path is None or path == "/":
            return self.answer({}) if path else None
        try:
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
                sha, files = self.hub.files(*found.groups())
                return self.answer({"id": found[1], "sha": sha, "siblings": [{"rfilename": name} for name in files]})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                _, files = self.hub.files(*found.groups())
                facts = [{"path": name, "size": len(data), "oid": name} for name, data in files.items()]
                return self.answer([{"type": "file", **one} for one in facts])
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                sha, files = self.hub.files(found[1], found[2])
                data = files[found[3]]
                return self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=sha)
        except KeyError as error:
            code = "RepoNotFound" if "/" in str(error.args[0]) else "RevisionNotFound"
            return self.answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)
        return self.answer({"error": "no such thing"}, 404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.begin()
        if path is None:
            return
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = name in self.hub.repositories
            self.hub.repositories.setdefault(name, {})
            if not there:
                self.hub.commit(name, {".gitattributes": b""})
            self.answer({"url": f"https://huggingface.co/{name}", "error": "there is one"}, 409 if there else 200)
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            _, files = self.hub.files(found[1])
            files = dict(files)
            for line in map(json.loads, body.decode().splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            sha = self.hub.commit(found[1], files)
            self.answer({"success": True, "commitOid": sha, "commitUrl": f"https://huggingface.co/{found[1]}/commit/{sha}"})
        else:
            self.answer({"error": path}, 404)

    def begin(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        if self.hub.closed and "Authorization" not in self.headers and path != "/":
            self.answer({"error": "Invalid username or password."}, 401)
            return None
        return path


@contextmanager
def listening():
    """The stand-in, and its address."""
    hub = Hub()
    handler = type("Own", (Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield hub, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
