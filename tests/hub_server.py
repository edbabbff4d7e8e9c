"""A Hugging Face Hub on 127.0.0.1: repositories, the three steps of a commit, downloads, and faults on demand.

It speaks the part of the protocol that huggingface_hub uses for models and data sets without Xet: create, preupload, LFS batch,
PUT of each large file, commit; model info, tree and resolve. What it is sent it checks (token, hashes) and keeps.
"""

import base64
import functools
import hashlib
import json
import re
import socket
import struct
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from ruamel.yaml import YAML

REFUSED_TOKEN = {"X-Error-Message": "Invalid credentials in Authorization header"}


@dataclass
class Repo:
    private: bool
    files: dict = field(default_factory=dict)  # path -> bytes
    commits: list = field(default_factory=list)  # messages

    @property
    def sha(self):
        return hashlib.sha1(repr(sorted((path, oid(path, content)) for path, content in self.files.items())).encode()).hexdigest()


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" matches: a status, or one of two broken lines."""

    pattern: str
    action: int | str  # an HTTP status, "reset" in the middle of the body, or "lose the response"
    times: int = 1
    text: str = ""
    headers: dict = field(default_factory=dict)


class Hub:
    def __init__(self, token):
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # LFS
        self.faults: list[Fault] = []
        self.log: list[str] = []  # "METHOD path" of every request
        self.received = b""  # every body and path
        self.url = ""

    def fail(self, pattern, action, **details):
        self.faults.append(Fault(pattern, action, **details))

    def next_fault(self, request):
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.pattern, request):
                fault.times -= 1
                return fault
        return None

    def create(self, repo_id, private=False, files=None):
        self.repos[repo_id] = Repo(private, dict(files or {}))
        return self.repos[repo_id]


@contextmanager
def serve(token):
    hub = Hub(token)

    class BoundHandler(Handler):
        pass

    BoundHandler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)  # it looks so often whether it is to end
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_POST(self):
        self.answer()

    do_GET = do_HEAD = do_PUT = do_POST

    def answer(self):
        # A data set is a repository `dataset:OWNER/NAME`, at the same addresses as a model.
        self.path = re.sub(
            r"^(/api)?/datasets/",
            lambda found: f"{'/api/models' if found[1] else ''}/dataset:",
            unquote(urlsplit(self.path).path),
        )
        request = f"{self.command} {self.path}"
        self.hub.log.append(request)
        fault = self.hub.next_fault(request)
        size = int(self.headers.get("Content-Length") or 0)
        if fault and fault.action == "reset":
            self.rfile.read(size // 2)
            return self.reset()
        body = self.rfile.read(size)
        self.hub.received += self.path.encode() + body
        if fault and isinstance(fault.action, int):
            return self.reply(fault.action, {"error": fault.text} if fault.text else {}, fault.headers)
        self.silent = fault is not None
        if self.command != "PUT" and self.headers.get("Authorization") not in (None, f"Bearer {self.hub.token}"):
            return self.reply(401, {"error": "Invalid username or password."}, REFUSED_TOKEN)
        for method, pattern, handle in ROUTES:
            if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, self.path)):
                return handle(self, body, *match.groups())
        self.reply(404, {"error": f"no such page: {request}"})

    def reset(self):
        """Close as a crashed machine does: with RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def reply(self, status, values=None, headers=None, content=None):
        if getattr(self, "silent", False):
            return self.reset()
        content = json.dumps(values if values is not None else {}).encode() if content is None else content
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def repo(self, repo_id, write=False):
        """The repository, or None after an answer that says that there is none for this caller."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or ((repo.private or write) and self.headers.get("Authorization") is None):
            self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    # --- pages ---

    def create_repo(self, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        data = asked.get("type") == "dataset"
        repo_id = f"dataset:{name}" if data else name
        address = {"url": f"{self.hub.url}/{'datasets/' if data else ''}{name}", "name": name, "id": "0"}
        if self.headers.get("Authorization") is None:
            return self.reply(401, {"error": "Invalid username or password."}, REFUSED_TOKEN)
        if repo_id in self.hub.repos:
            return self.reply(409, {"error": "You already created this model repo", **address})
        self.hub.create(repo_id, asked.get("visibility") == "private", {".gitattributes": b"*.safetensors lfs\n"})
        return self.reply(200, address)

    def validate_yaml(self, body):
        _, front, _ = json.loads(body)["content"].split("---\n", 2)
        data = YAML(typ="safe").load(front)
        wrong = [key for key, value in data.items() if value is None or "/home/" in str(value)]
        errors = [{"message": f'"{key}" is not allowed'} for key in wrong]
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, body, repo_id):
        if repo := self.repo(repo_id):
            siblings = [{"rfilename": name} for name in repo.files]
            self.reply(
                200,
                {
                    "id": repo_id.removeprefix("dataset:"),
                    "private": repo.private,
                    "sha": repo.sha,
                    "siblings": siblings,
                    "tags": [],
                },
            )

    def preupload(self, body, repo_id):
        if repo := self.repo(repo_id, write=True):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": mode(file["path"]),
                    "shouldIgnore": False,
                    "oid": oid(file["path"], repo.files[file["path"]]) if file["path"] in repo.files else None,
                }
                for file in json.loads(body)["files"]
            ]
            self.reply(200, {"files": files})

    def lfs_batch(self, body, repo_id):
        if self.repo(repo_id, write=True):
            objects = [
                {"oid": item["oid"], "size": item["size"]}
                | ({} if item["oid"] in self.hub.blobs else {"actions": {"upload": {"href": self.blob_url(item)}}})
                for item in json.loads(body)["objects"]
            ]
            self.reply(200, {"transfer": "basic", "objects": objects})

    def blob_url(self, item):
        return f"{self.hub.url}/blobs/{item['oid']}"

    def put_blob(self, body, name):
        if hashlib.sha256(body).hexdigest() != name:
            return self.reply(400, {"error": "the content has another hash"})
        self.hub.blobs[name] = body
        return self.reply(200)

    def commit(self, body, repo_id):
        if not (repo := self.repo(repo_id, write=True)):
            return
        header, *operations = map(json.loads, body.splitlines())
        if header["value"].get("parentCommit", repo.sha) != repo.sha:
            return self.reply(412, {"error": "A commit has happened since. Please refresh and try again."})
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "deletedFile":
                del repo.files[value["path"]]
            elif operation["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                repo.files[value["path"]] = base64.b64decode(value["content"])
        repo.commits.append(header["value"]["summary"])
        self.reply(
            200,
            {"commitUrl": f"{self.hub.url}/{repo_id.replace('dataset:', 'datasets/')}/commit/{repo.sha}", "commitOid": repo.sha},
        )

    def tree(self, body, repo_id):
        if repo := self.repo(repo_id):
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
                for path, content in repo.files.items()
            ]
            self.reply(200, entries)

    def resolve(self, body, repo_id, path):
        if repo := self.repo(repo_id):
            commit = {"X-Repo-Commit": repo.sha}
            if path not in repo.files:
                return self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"} | commit)
            content = repo.files[path]
            self.reply(200, None, {"ETag": f'"{oid(path, content)}"'} | commit, content)


NAME = r"([^/]+/[^/]+)"
ROUTES = (
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"/api/models/{NAME}/preupload/main", Handler.preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/blobs/([0-9a-f]+)", Handler.put_blob),
    ("POST", f"/api/models/{NAME}/commit/main", Handler.commit),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/[^/]+", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/[^/]+", Handler.tree),
    ("GET", f"/{NAME}/resolve/[^/]+/(.+)", Handler.resolve),
)


def mode(path):
    return "lfs" if path.endswith((".safetensors", ".model", ".gguf")) else "regular"


@functools.lru_cache(maxsize=256)
def oid(path, content):
    """As the Hub gives it: sha256 of a large file, git's own hash of another."""
    return hashlib.sha256(content).hexdigest() if mode(path) == "lfs" else git_hash(content)


def git_hash(content):
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
