"""A Hugging Face Hub of one's own, on the loopback interface and the standard library: what a client pushes, it serves.

Faults are set per path of a repository (`Hub.faults`): "drop" breaks off in the middle of a file, "503" is a server
error, "gated" and "private" are what the Hub says of such repositories.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MAIN = "main"


@dataclass
class Repo:
    """Commits, oldest first: each its id and its files."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        """Adds files to the last commit's."""
        whole = {**(self.commits[-1][1] if self.commits else {}), **files}
        state = json.dumps([len(self.commits), {name: hashlib.sha1(data).hexdigest() for name, data in whole.items()}])
        self.commits.append((hashlib.sha1(state.encode()).hexdigest(), whole))
        return self.commits[-1][0]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Returns the commit of a revision."""
        if revision == MAIN:
            return self.commits[-1] if self.commits else ("0" * 40, {})
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Hub:
    """The server's state; ``tampered`` holds bytes that are served instead of a file's, under its ETag."""

    url: str = ""
    token: str = "hf_secret"
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[tuple[str, str], str] = field(default_factory=dict)
    tampered: dict[tuple[str, str], bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """The endpoints that huggingface_hub uses to create, push and download."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for the client to acknowledge its head
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Keeps the test's output clean."""

    def reply(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Sends bytes, or anything else as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str) -> None:
        """Sends an error as the Hub does."""
        self.reply({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def body(self) -> bytes:
        """Reads the request."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        """Creates, announces and commits."""
        data = self.body()
        path = self.path.split("?")[0]
        self.hub.requests.append(f"POST {path}")
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.hub.repos.setdefault(name, Repo(bool(asked.get("private"))))
            return self.reply({"url": f"{self.hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/[^/]+", path):
            files = json.loads(data)["files"]
            modes = [(f["path"], "lfs" if f["path"].endswith((".safetensors", ".bin")) else "regular") for f in files]
            return self.reply({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})
        if re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
            objects = json.loads(data)["objects"]
            return self.reply({"objects": [o | {"actions": self.upload_of(o["oid"])} for o in objects]})
        if path.startswith("/verify/"):
            return self.reply({})
        if match := re.fullmatch(r"/api/models/(.+)/commit/[^/]+", path):
            commit = self.hub.repos[match[1]].commit(dict(self.committed(data)))
            return self.reply({"commitOid": commit, "commitUrl": f"{self.hub.url}/{match[1]}/commit/{commit}"})
        return self.fail(404, "NotFound")

    def upload_of(self, oid: str) -> dict[str, dict[str, str]]:
        """Returns where a large file goes."""
        return {name: {"href": f"{self.hub.url}/{name}/{oid}"} for name in ("upload", "verify")}

    def committed(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """Reads the files of a commit."""
        for line in filter(None, data.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                yield value["path"], base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                yield value["path"], self.hub.objects[value["oid"]]

    def do_PUT(self) -> None:
        """Takes a large file."""
        data = self.body()
        assert hashlib.sha256(data).hexdigest() == self.path.rsplit("/", 1)[-1]
        self.hub.objects[self.path.rsplit("/", 1)[-1]] = data
        self.reply({})

    def do_HEAD(self) -> None:
        """As GET."""
        self.do_GET()

    def do_GET(self) -> None:
        """Serves files and descriptions."""
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if path == "/api/agent-harnesses":
            return self.reply({"standardEnvVars": [], "harnesses": {}})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self.describe(match[1], match[2] or MAIN)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            return self.list_files(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.serve(match[1], match[2], match[3])
        return self.fail(404, "NotFound")

    def commit_of(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Finds a commit, or says why not."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {self.hub.token}"):
            self.fail(401, "RepoNotFound")
            return None
        commit = repo.at(revision)
        if commit is None:
            self.fail(404, "RevisionNotFound")
        return commit

    def describe(self, name: str, revision: str) -> None:
        """Answers what is in a repository."""
        if commit := self.commit_of(name, revision):
            siblings = [{"rfilename": path} for path in commit[1]]
            self.reply({"id": name, "modelId": name, "sha": commit[0], "siblings": siblings, "private": False})

    def list_files(self, name: str, revision: str) -> None:
        """Answers what files a commit has."""
        if commit := self.commit_of(name, revision):
            files = ((path, data, hashlib.sha1(data).hexdigest()) for path, data in commit[1].items())
            self.reply([{"type": "file", "path": path, "size": len(data), "oid": oid} for path, data, oid in files])

    def serve(self, name: str, revision: str, path: str) -> None:
        """Sends a file, or a part of it, or what its fault says."""
        fault = self.hub.faults.get((name, path), "")
        if fault == "gated":
            return self.fail(403, "GatedRepo")
        commit = self.commit_of(name, revision)
        if commit is None:
            return None
        if fault == "503":
            return self.reply({"error": "busy"}, 503)
        if path not in commit[1]:
            return self.fail(404, "EntryNotFound")
        return self.send_file(commit[0], commit[1][path], self.hub.tampered.get((name, path)), fault)

    def send_file(self, commit: str, stated: bytes, tampered: bytes | None, fault: str) -> None:
        """Sends a file under the ETag of what was pushed."""
        data = stated if tampered is None else tampered
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{hashlib.sha256(stated).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        if fault == "drop" and self.command == "GET":
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.reply(data, status, headers)


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Runs a hub while the context lasts."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()


def environment(hub: Hub, home: str, **more: str) -> dict[str, str]:
    """Returns the environment variables of a client; they have to be set before huggingface_hub is imported."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": home,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        **more,
    }
