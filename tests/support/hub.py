"""A server on loopback that speaks as much of the Hugging Face hub's protocol as uploads and downloads of files need.

Repositories are created, files are classified, large ones go through Git LFS, and a commit names them all. It checks
what the hub checks: the token, that a repository and a file to delete exist, and the digests of large files.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "0123456789" * 4
LFS_ENDINGS = (".safetensors", ".gguf", ".data")


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.requests: list[str] = []
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.messages: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "Entry" in content["error"] else "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        """A large file, to an address that needs no token, as the hub gives them."""
        content, oid = self.body(), self.path.rpartition("/")[2]
        self.server.requests.append(f"PUT {self.path}")
        if hashlib.sha256(content).hexdigest() != oid or "Authorization" in self.headers:
            self.answer({"error": "another digest, or a token for a stranger"}, 400)
            return
        self.server.objects[oid] = content
        self.answer({})

    def do_POST(self) -> None:
        body, hub = self.body(), self.server
        path = self.path.partition("?")[0]
        hub.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.answer({"transfer": "basic", "objects": [self.place(each) for each in json.loads(body)["objects"]]})
        else:
            _, _, _, owner, name, action, revision = path.split("/")
            files = hub.repositories.get(f"{owner}/{name}")
            if files is None or revision != "main":
                self.answer({"error": "Repository not found"}, 404)
            elif action == "preupload":
                self.answer({"files": [self.mode(each) for each in json.loads(body)["files"]]})
            elif action == "commit":
                self.commit(files, [json.loads(line) for line in body.splitlines()], f"{hub.url}/{owner}/{name}")

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "somebody-else":
            self.answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
            return
        status = 409 if name in self.server.repositories else 200
        self.server.repositories.setdefault(name, {})
        self.server.private.setdefault(name, asked.get("private", False))
        self.answer({"url": f"{self.server.url}/{name}"}, status)

    def place(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {**asked, "actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}}

    def mode(self, asked: dict[str, Any]) -> dict[str, Any]:
        large = asked["path"].endswith(LFS_ENDINGS)
        return {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}

    def commit(self, files: dict[str, bytes], lines: list[dict[str, Any]], url: str) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.answer({"commitUrl": f"{url}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        """The list of a repository's files, and the files; without the token, those of public repositories only."""
        self.server.requests.append(f"{self.command} {self.path}")
        name, files = self.named()
        parts = self.path.partition("?")[0].split("/")
        knows = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if files is None or (self.server.private.get(name) and not knows):
            self.answer({"error": "Repository not found"}, 404)
        elif parts[5:6] == ["tree"]:
            self.answer([{"type": "file", "path": each, "size": len(files[each]), "oid": ""} for each in sorted(files)])
        elif parts[1] == "api":
            self.answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in sorted(files)]})
        elif (content := files.get("/".join(parts[parts.index("resolve") + 2 :]))) is None:
            self.answer({"error": "Entry not found"}, 404)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    def named(self) -> tuple[str, dict[str, bytes] | None]:
        """The repository that a path names, and its files."""
        for name, files in self.server.repositories.items():
            if self.path.startswith((f"/api/models/{name}/", f"/{name}/resolve/")):
                return name, files
        return "", None


@contextmanager
def hub_of(token: str) -> Iterator[Hub]:
    with Hub(token) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
