"""A Hub on loopback: enough of the Hugging Face HTTP API for huggingface_hub to list and download models.

with hub_server({"owner/name": folder}) as hub:
    subprocess.run([...], env={**os.environ, "HF_ENDPOINT": hub.url})
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", COMMIT)


@dataclass
class Hub:
    """What the server serves, and what it was asked.

    Args:
        url: for HF_ENDPOINT.
        repos: repository id -> folder.
        gated: ids that need the token.
        token: the only token that the Hub accepts.
        requests: "METHOD path" of every request so far.
        answer: a status that every request gets instead (an outage), or None.
        corrupt: names of files whose content arrives with one bit flipped; size and digests stay.
    """

    url: str
    repos: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    token: str = "hf_right"
    requests: list[str] = field(default_factory=list)
    answer: int | None = None
    corrupt: set[str] = field(default_factory=set)

    def downloads(self) -> list[str]:
        """Names of the files whose content was fetched."""
        got = [line for line in self.requests if line.startswith("GET ") and "/resolve/" in line]
        return sorted(line.split("/resolve/", 1)[1].split("/", 1)[1] for line in got)


@contextmanager
def hub_server(repos: Mapping[str, Path], *, gated: set[str] | None = None) -> Iterator[Hub]:
    """Serve folders as Hub models on an ephemeral port until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", dict(repos), gated or set())
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def is_large(path: Path) -> bool:
    """Whether the Hub would keep the file outside of git, and declare its SHA-256."""
    return path.suffix in (".safetensors", ".bin")


def large_file(path: Path, digest_key: str) -> dict[str, object]:
    content = path.read_bytes()
    return {digest_key: hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}


def git_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._error(404, "NotFound")

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.answer:
            return self._error(self.hub.answer, "")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:])
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._error(404, "NotFound")

    def _refused(self, repo: str, revision: str) -> bool:
        authorization = self.headers.get("authorization")
        if authorization not in (None, f"Bearer {self.hub.token}"):
            self._error(401, "", message="Invalid credentials in Authorization header")
        elif repo not in self.hub.repos:
            self._error(401 if authorization is None else 404, "RepoNotFound")
        elif repo in self.hub.gated and authorization is None:
            self._error(401, "GatedRepo")
        elif revision not in REVISIONS:
            self._error(404, "RevisionNotFound")
        else:
            return False
        return True

    def _api(self, repo: str, rest: list[str]) -> None:
        """/api/models/<repo>[/revision/<revision>] and /api/models/<repo>/tree/<revision>."""
        revision = rest[1] if len(rest) > 1 else "main"
        if self._refused(repo, revision):
            return
        root = self.hub.repos[repo]
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if rest[:1] == ["tree"]:
            self._json(
                [
                    {
                        "type": "file",
                        "path": path.relative_to(root).as_posix(),
                        "size": path.stat().st_size,
                        "oid": git_id(path.read_bytes()),
                        **({"lfs": large_file(path, "oid")} if is_large(path) else {}),
                    }
                    for path in files
                ]
            )
        else:
            siblings = [
                {
                    "rfilename": path.relative_to(root).as_posix(),
                    "size": path.stat().st_size,
                    "blobId": git_id(path.read_bytes()),
                    **({"lfs": large_file(path, "sha256")} if is_large(path) else {}),
                }
                for path in files
            ]
            self._json({"id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if self._refused(repo, revision):
            return
        path = self.hub.repos[repo] / name
        if ".." in name.split("/") or not path.is_file():
            self._error(404, "EntryNotFound")
            return
        data = path.read_bytes()
        start = 0
        if (asked := self.headers.get("range", "")).startswith("bytes="):
            start = int(asked.removeprefix("bytes=").split("-")[0] or 0)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        etag = hashlib.sha256(data).hexdigest() if is_large(path) else git_id(data)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if name in self.hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._body(data[start:])

    def _json(self, value: object) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._body(json.dumps(value).encode())

    def _error(self, status: int, code: str, *, message: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self._body(b"{}")

    def _body(self, data: bytes) -> None:
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
