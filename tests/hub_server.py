"""A hub on the loopback: what the Hugging Face Hub's client asks of it to read and write model repositories.

`Hub` holds repositories in memory and answers from threads of its own. Large files are redirected to a second port, as to a content
server, which never may see a token. Faults are switched on by name, to see what a person gets to read then.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
LARGE = (".safetensors", ".png", ".pt", ".pth", ".model")


@dataclass
class Repo:
    """One repository: its commits, newest last, each a mapping of file names to contents; gated or private as the hub means it.

    accepted: whether whoever the token belongs to has accepted the terms of a gated one.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    accepted: bool = False
    licence: str | None = "apache-2.0"

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs["main"] = name
        return name

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def described(name: str, content: bytes) -> dict:
    """A file as the interface lists it."""
    entry: dict = {"rfilename": name, "size": len(content), "blobId": blob_id(content)}
    if name.endswith(LARGE):
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


class Hub:
    """The server. ``with Hub() as hub``; hub.url is what HF_ENDPOINT should be.

    log: (method, path, Range header or None, whether a token came along) of every request. faults: name -> value: ``cut`` ends the
    connection after so many bytes of a large file, ``cuts`` how many times; ``stall`` seconds of silence inside a large file,
    ``stalls`` how often; ``slow`` seconds before any answer; ``status`` answers everything so; ``garble`` flips a byte;
    ``no_ranges`` ignores Range.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[tuple[str, str, str | None, bool]] = []
        self.faults: dict[str, float] = {}
        self._servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self, "content": c})) for c in (0, 1)
        ]
        self.url, self.content_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def __enter__(self) -> Hub:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def bytes_asked(self, ending: str) -> list[str | None]:
        """The Range headers of the requests for a large file that reached the content server."""
        return [
            ranges
            for method, path, ranges, _ in self.log
            if method == "GET" and path.startswith("/content/") and path.endswith(ending)
        ]


class Handler(BaseHTTPRequestHandler):
    """One connection. content: whether this is the content server."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    content: int

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: object = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str = "") -> None:
        self.answer(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code)

    def handle_any(self) -> None:
        with suppress(ConnectionError):  # whoever asked has gone
            self.dispatch()

    def dispatch(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = self.headers.get("Authorization")
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append((self.command, path, self.headers.get("Range"), token is not None))
        time.sleep(self.hub.faults.get("slow", 0))
        if status := int(self.hub.faults.get("status", 0)):
            return self.answer(status, {"error": "fault"})
        if self.content:
            return self.serve_content(path) if self.command == "GET" else self.store(path)
        if token is not None and token != f"Bearer {TOKEN}":
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        self.known = token is not None
        for method, pattern, reply in ROUTES:
            found = re.fullmatch(pattern, path)
            if self.command in method and found:
                return reply(self, *found.groups())
        return self.refuse(404, "", "no such page")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def repo(self, name: str, reading: bool = False) -> Repo | None:
        """The repository, or None after a refusal in the hub's words."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.known):
            self.refuse(404 if self.known else 401, "RepoNotFound", "Repository not found")
            return None
        if reading and repo.gated and not (self.known and repo.accepted):
            self.refuse(403 if self.known else 401, "GatedRepo", "Access to this repository is restricted")
            return None
        return repo

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        commit = repo.find(revision or "main")
        if commit is None and (revision or repo.commits):
            return self.refuse(404, "RevisionNotFound")
        files = repo.commits.get(commit or "", {})
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = [described(n, c) if blobs else {"rfilename": n} for n, c in files.items()]
        card = {"license": repo.licence} if repo.licence else {}
        facts = {"id": name, "sha": commit, "private": repo.private, "gated": "auto" if repo.gated else False, "tags": []}
        self.answer(200, {**facts, "siblings": siblings, "cardData": card, "downloads": 0, "likes": 0})

    def check(self, name: str) -> None:
        if self.repo(name, reading=True) is not None:
            self.answer(200)

    def tree(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        commit = repo.find(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        listed = [described(n, c) for n, c in repo.commits[commit].items()]
        rows = [{"type": "file", "path": e["rfilename"], "size": e["size"], "oid": e["blobId"]} for e in listed]
        for row, entry in zip(rows, listed, strict=True):
            if lfs := entry.get("lfs"):
                row["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 134}
        self.answer(200, rows)

    def resolve(self, name: str, revision: str, file: str) -> None:
        repo = self.repo(name, reading=True)
        if repo is None:
            return
        commit = repo.find(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound")
        if file not in repo.commits[commit]:
            return self.refuse(404, "EntryNotFound")
        content = repo.commits[commit][file]
        if not file.endswith(LARGE):
            return self.answer(200, content, ETag=f'"{blob_id(content)}"', X_Repo_Commit=commit, Accept_Ranges="bytes")
        digest = hashlib.sha256(content).hexdigest()
        self.hub.objects[digest] = content
        linked = {"X_Linked_Size": str(len(content)), "X_Linked_ETag": f'"{digest}"', "X_Repo_Commit": commit}
        self.answer(302, b"", Location=f"{self.hub.content_url}/content/{digest}/{file}", **linked)

    def serve_content(self, path: str) -> None:
        """A large file, whole or from a Range on, with the faults that are switched on."""
        faults, data = self.hub.faults, self.hub.objects[path.split("/")[2]]
        if faults.get("garble"):
            data = bytes([data[0] ^ 1]) + data[1:]
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(found[1]) if found and not faults.get("no_ranges") else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{path.split("/")[2]}"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        limit = int(faults.get("cut", 0))
        if limit and faults.get("cuts", 1) > 0 and len(data) - start > limit:
            faults["cuts"] = faults.get("cuts", 1) - 1
            self.wfile.write(data[start : start + limit])
            self.close_connection = True
            return
        middle = start + (len(data) - start) // 2
        self.wfile.write(data[start:middle])
        self.wfile.flush()
        if faults.get("stall") and len(data) > 200_000 and faults.setdefault("stalls", 99) > 0:
            faults["stalls"] -= 1
            time.sleep(faults["stall"])
        self.wfile.write(data[middle:])

    def store(self, path: str) -> None:
        digest = path.rpartition("/")[2]
        if hashlib.sha256(self.body).hexdigest() != digest:
            return self.answer(400, {"error": "hash"})
        self.hub.objects[digest] = self.body
        self.answer(200)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.known:
            return self.refuse(401, "", "Invalid username or password.")
        if asked["organization"] == "strangers":
            return self.refuse(403, "", "You don't have the rights to create a model under this namespace")
        if name in self.hub.repos:
            return self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(private=private)
        self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(200, {"url": f"{self.hub.url}/{name}", "id": name})

    def check_card(self) -> None:
        good = json.loads(self.body)["content"].startswith("---\n")
        self.answer(200 if good else 400, {"errors": [] if good else [{"message": "empty metadata"}], "warnings": []})

    def preupload(self, name: str, _revision: str) -> None:
        if self.repo(name) is not None:
            modes = [(f["path"], "lfs" if f["path"].endswith(LARGE) else "regular") for f in json.loads(self.body)["files"]]
            self.answer(200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None} for p, m in modes]})

    def batch(self, name: str) -> None:
        if self.repo(name) is None:
            return
        rows = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.content_url}/store/{wanted['oid']}", "header": {}}}
            rows.append({**wanted, **({} if wanted["oid"] in self.hub.objects else {"actions": upload})})
        self.answer(200, {"transfer": "basic", "objects": rows}, Content_Type="application/vnd.git-lfs+json")

    def take_commit(self, name: str, _revision: str) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        files = dict(repo.commits[repo.refs["main"]])
        for line in self.body.splitlines():
            row = json.loads(line)
            key, value = row["key"], row["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        commit = repo.commit(files)
        self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "pullRequestUrl": None})


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", Handler.tree),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", Handler.info),
    ("GET", rf"/api/models/{_NAME}/auth-check", Handler.check),
    ("GET", rf"/api/models/{_NAME}", Handler.info),
    ("GET HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.check_card),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", Handler.take_commit),
)
