"""A Hub on this machine: what huggingface_hub asks of it when a folder is uploaded without Xet, and no more."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

OWNER, TOKEN, READS = "me", "hf_writes", "hf_reads"
LICENSES = {"apache-2.0", "mit", "other"}
ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Hub:
    """Repositories by id; a branch is the contents of its files by name."""

    url: str = ""
    public: dict[str, bool] = field(default_factory=dict)
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by SHA-256."""
    commits: list[tuple[str, str, str]] = field(default_factory=list)
    """Repository, branch, message."""
    sent: list[str] = field(default_factory=list)
    """SHA-256 of large files, each time that one came."""
    fails_after: int | None = None
    """Large files that it takes before it fails."""

    def create(self, repo: str, *, public: bool) -> None:
        self.public[repo], self.branches[repo, "main"] = public, {}


def faults_of(card: str) -> list[str]:
    """As the Hub has them, for a few keys."""
    found = yaml.safe_load(card.split("---")[1]) if card.startswith("---\n") else {}
    bases = found.get("base_model", [])
    wrong = [f'"license" must be one of {sorted(LICENSES)}'] if found.get("license", "other") not in LICENSES else []
    return wrong + ['"base_model" with no id'] * (not all(ID.fullmatch(base) for base in ([bases] if isinstance(bases, str) else bases)))


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: Any, **headers: str) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = b""
            while size := int(self.rfile.readline(), 16):
                parts += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return parts

        def allowed(self, owner: str) -> bool:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token not in (TOKEN, READS):
                self.answer(401, {"error": "Invalid username or password."})
            elif token == READS or owner != OWNER:
                self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
            return token == TOKEN and owner == OWNER

        def do_GET(self) -> None:
            repo = self.path.removeprefix("/api/models/").partition("?")[0].partition("/revision")[0]
            if repo not in hub.public:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            else:
                self.answer(200, {"id": repo, "private": not hub.public[repo], "sha": "0" * 40, "siblings": [], "tags": []})

        def do_PUT(self) -> None:
            data = self.body()
            if hub.fails_after is not None and len(hub.sent) >= hub.fails_after:
                self.answer(400, {"error": "interrupted"})
                return
            hub.sent.append(hashlib.sha256(data).hexdigest())
            hub.stored[hub.sent[-1]] = data
            self.answer(200, {})

        def do_POST(self) -> None:
            data = self.body()
            if self.path == "/api/validate-yaml":
                faults = [{"message": fault} for fault in faults_of(json.loads(data)["content"])]
                self.answer(400 if faults else 200, {"errors": faults, "warnings": []})
            elif self.path == "/api/repos/create":
                self.create(json.loads(data))
            elif found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
                self.batch(found[1], json.loads(data))
            elif found := re.fullmatch(r"/api/models/([^/]+)/([^/]+)/(preupload|commit|branch)/([^/?]+).*", self.path):
                if self.allowed(found[1]):
                    getattr(self, found[3])(f"{found[1]}/{found[2]}", found[4], data)
            else:
                self.answer(404, {"error": f"no {self.path}"})

        def create(self, given: dict[str, Any]) -> None:
            owner = given["organization"] or OWNER
            repo = f"{owner}/{given['name']}"
            if self.allowed(owner):
                status = 409 if repo in hub.public else 200
                if status == 200:
                    hub.create(repo, public=given.get("visibility") != "private" and not given.get("private"))
                self.answer(status, {"url": f"{hub.url}/{repo}"})

        def branch(self, repo: str, name: str, _data: bytes) -> None:
            status = 409 if (repo, name) in hub.branches else 201
            hub.branches.setdefault((repo, name), dict(hub.branches[repo, "main"]))
            self.answer(status, {})

        def preupload(self, _repo: str, _branch: str, data: bytes) -> None:
            files = json.loads(data)["files"]
            modes = ["lfs" if file["path"].endswith(".safetensors") or file["size"] > 100_000 else "regular" for file in files]
            named = [{"path": file["path"], "uploadMode": mode, "shouldIgnore": False} for file, mode in zip(files, modes, strict=True)]
            self.answer(200, {"files": named})

        def batch(self, repo: str, given: dict[str, Any]) -> None:
            if not self.allowed(repo.partition("/")[0]):
                return
            upload = {each["oid"]: {"actions": {"upload": {"href": f"{hub.url}/large/{each['oid']}"}}} for each in given["objects"]}
            missing = ((each, {} if each["oid"] in hub.stored else upload[each["oid"]]) for each in given["objects"])
            self.answer(200, {"transfer": "basic", "objects": [{**each, **actions} for each, actions in missing]})

        def commit(self, repo: str, branch: str, data: bytes) -> None:
            for line in data.decode().splitlines():
                key, value = (entry := json.loads(line))["key"], entry["value"]
                if key == "header":
                    hub.commits.append((repo, branch, value["summary"]))
                elif key == "lfsFile":
                    hub.branches[repo, branch][value["path"]] = hub.stored[value["oid"]]
                else:
                    hub.branches[repo, branch][value["path"]] = base64.b64decode(value["content"])
            self.answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{'a' * 40}", "commitOid": "a" * 40, "hookOutput": ""})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
