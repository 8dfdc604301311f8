"""A hub on loopback that serves folders as repositories, and misbehaves as told.

Two servers, as in the original: the hub, which knows names, sizes and who may read, and a storage on another
port, to which it redirects for large files. Both count what they are asked for and what they send.

    with HubImitation() as hub:
        hub.add("ibrahimhamamci/CT-RATE", folder, gated=True)
        hub.drop("a.nii.gz", after=1000, times=2)
        ...  # endpoint=hub.url, token=hub.token
"""

import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "5c0ffee" + 33 * "0"
LARGE = (".gz", ".pt", ".bin")  # kept outside git, with a SHA-256


@dataclass
class Repository:
    folder: Path
    repo_type: str = "dataset"
    gated: bool = False
    commit: str = COMMIT


@dataclass
class Fault:
    """What happens to the next `times` answers with a file's bytes."""

    kind: str
    times: int
    value: int = 0
    headers: dict = field(default_factory=dict)
    says: str = ""


class HubImitation:
    """Args: token: the one it knows; accepted: whether that account has accepted the terms of gated repositories."""

    def __init__(self, token="hf_imitation_of_a_token", accepted=True):
        self.token, self.accepted = token, accepted
        self.repositories = {}
        self.faults = defaultdict(list)  # file name, or an address under /api -> Faults in turn
        self.fine_grained = False  # the token lacks the right to read gated repositories
        self.no_ranges = False  # whole files only
        self.pause = 0.0  # seconds between pieces of 1,000 bytes
        self.extra = {}  # file name -> fields that replace those of paths-info
        self.forget()

    def add(self, repo_id, folder, repo_type="dataset", gated=False):
        self.repositories[repo_id] = Repository(Path(folder), repo_type, gated)
        return self

    def forget(self):
        """Set all counts to zero."""
        self.requests = Counter()  # method and path
        self.gets = Counter()  # file name: answers with bytes that were begun
        self.sent = Counter()  # file name: bytes
        self.starts = defaultdict(list)  # file name: first byte of each answer
        self.storage_saw_token = False

    # --- misbehaviour -------------------------------------------------------------------------------------

    def drop(self, name, after, times=1, reset=False):
        """Break the connection after some bytes: closed politely, or reset."""
        self.faults[name].append(Fault("reset" if reset else "drop", times, after))

    def wrong_bytes(self, name, times=1):
        self.faults[name].append(Fault("wrong bytes", times))

    def wrong_size(self, name, by, times=1, announced=True):
        """Store more (by > 0) or fewer bytes than the hub says; `announced`: with a Content-Length."""
        self.faults[name].append(Fault("wrong size" if announced else "unannounced size", times, by))

    def answer(self, name, status, times=1, says="as it was told to", **headers):
        """Answer with a status; `name` is a file, or "/api" for all of the hub's questions."""
        self.faults[name].append(Fault("status", times, status, headers, says))

    def take_fault(self, name):
        with self.lock:
            queue = self.faults[name]
            while queue and queue[0].times == 0:
                queue.pop(0)
            if not queue:
                return None
            queue[0].times -= 1
            return queue[0]

    # --- life ------------------------------------------------------------------------------------------------

    def __enter__(self):
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.servers = [_start(self, _Hub), _start(self, _Storage)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)
        return self

    def __exit__(self, *_):
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()


def closed_port():
    """Address of a port on which nobody listens."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{opened.getsockname()[1]}"


def _start(imitation, handler):
    class Server(ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

        def handle_error(self, request, client_address):
            pass  # clients that leave are a part of the tests

    server = Server(("127.0.0.1", 0), type("Handler", (handler,), {"imitation": imitation}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


def digest_of(path):
    """The name a hub has for a file's content: SHA-256 of large files, git's SHA-1 of others."""
    data = path.read_bytes()
    if path.name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    imitation: HubImitation

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.serve()

    def do_GET(self):
        self.serve()

    def do_POST(self):
        self.serve()

    def serve(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        with self.imitation.lock:
            self.imitation.requests[f"{self.command} {path}"] += 1
        self.route(path)

    def reply(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content_Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code, message):
        headers = {"X_Error_Message": message} | ({"X_Error_Code": code} if code else {})
        self.reply(status, {"error": message}, **headers)

    def send_file(self, path, name, **headers):
        """The bytes of a file, from where they are asked for, with the fault whose turn it is."""
        hub, fault = self.imitation, self.imitation.take_fault(name)
        kind, value = (fault.kind, fault.value) if fault else (None, 0)
        if kind == "status":
            self.reply(value, {"error": fault.says}, **fault.headers)
            return
        data = path.read_bytes()
        if kind == "wrong bytes":
            data = bytes(255 - byte for byte in data)
        elif kind in ("wrong size", "unannounced size"):
            data = data + value * b"+" if value > 0 else data[:value]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and not hub.no_ranges else 0
        if start and start >= len(data):
            self.reply(416, Content_Range=f"bytes */{len(data)}")
            return
        self.send_response(206 if start else 200)
        if start:
            total = "*" if kind == "unannounced size" else len(data)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{total}")
        for header, text in headers.items():
            self.send_header(header.replace("_", "-"), text)
        if kind == "unannounced size":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        with hub.lock:
            hub.gets[name] += 1
            hub.starts[name].append(start)
        stop = start + value if kind in ("drop", "reset") else len(data)
        for at in range(start, min(stop, len(data)), 1000):
            piece = data[at : min(at + 1000, stop)]
            self.wfile.write(piece)
            with hub.lock:
                hub.sent[name] += len(piece)
            if hub.pause and hub.closing.wait(hub.pause):
                break
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if kind in ("drop", "reset", "unannounced size"):
            self.close_connection = True


class _Storage(_Handler):
    """Where large files lie; whoever has the signed address may read them."""

    def route(self, path):
        if self.headers.get("Authorization"):
            self.imitation.storage_saw_token = True
        repo_id, _, name = path.removeprefix("/").partition("//")
        if "signature" not in self.path:
            self.refuse(403, None, "the address is not signed")
        else:
            self.send_file(self.imitation.repositories[repo_id].folder / name, name)


class _Hub(_Handler):
    """Names, sizes, and who may read."""

    def route(self, path):
        api = re.fullmatch(r"/api/(dataset|model)s/([^/]+/[^/]+)(?:/([^/]+))?(?:/([^/]+))?(?:/(.*))?", path)
        resolve = re.fullmatch(r"/(?:(dataset)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != self.imitation.token:
            self.refuse(401, None, "Invalid credentials in Authorization header")
            return
        fault = self.imitation.take_fault("/api") if api or path.startswith("/api/") else None
        if fault:
            self.reply(fault.value, {"error": fault.says}, **fault.headers)
        elif path == "/api/whoami-v2":
            self.reply(200, {"name": "someone", "type": "user"}) if token else self.refuse(401, None, "Log in")
        elif not (api or resolve):
            self.refuse(404, None, "no such address")
        else:
            repo_type, repo_id, *rest = (api or resolve).groups()
            repository = self.imitation.repositories.get(repo_id)
            if repository is None or repository.repo_type != (repo_type or "model"):
                self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            elif api:
                self.answer_question(repository, repo_id, *rest, token)
            else:
                self.resolve(repository, repo_id, *rest, token)

    def may_read(self, repository, token):
        if not repository.gated:
            return True
        if not token:
            self.refuse(401, "GatedRepo", "Access is restricted. You must be authenticated to access it.")
        elif self.imitation.fine_grained:
            self.refuse(403, "GatedRepo", "Enable access to gated repositories in your fine-grained token settings")
        elif not self.imitation.accepted:
            self.refuse(403, "GatedRepo", "Access is restricted and you are not in the authorized list.")
        else:
            return True
        return False

    def answer_question(self, repository, repo_id, what, revision, below, token):
        if revision not in (None, "main", repository.commit):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif what in (None, "revision"):
            info = {"id": repo_id, "sha": repository.commit, "gated": "manual" if repository.gated else False}
            self.reply(200, info)
        elif what == "auth-check":
            if self.may_read(repository, token):
                self.reply(200, {})
        elif what == "tree":
            folder = repository.folder / (below or "")
            if not folder.is_dir():
                self.refuse(404, "EntryNotFound", "Entry not found")
                return
            found = folder.rglob("*") if "recursive=true" in self.path.lower() else folder.iterdir()
            self.reply(200, [self.entry(repository, path) for path in sorted(found)])
        elif what == "paths-info":
            asked = [repository.folder / name for name in parse_qs(self.body.decode())["paths"]]
            self.reply(200, [self.entry(repository, path) for path in asked if path.exists()])
        else:
            self.refuse(404, None, "no such question")

    def entry(self, repository, path):
        name = path.relative_to(repository.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": 40 * "d"}
        entry = {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest_of(path)}
        if path.name.endswith(LARGE):
            entry |= {"oid": 40 * "e", "lfs": {"oid": digest_of(path), "size": entry["size"], "pointerSize": 134}}
        return entry | self.imitation.extra.get(name, {})

    def resolve(self, repository, repo_id, revision, name, token):
        path = repository.folder / name
        if not self.may_read(repository, token):
            return
        if revision not in ("main", repository.commit):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif not path.is_file():
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif path.name.endswith(LARGE):
            size, digest = path.stat().st_size, digest_of(path)
            where = f"{self.imitation.storage_url}/{repo_id}//{name}?signature=of-the-storage"
            linked = {"X_Linked_Size": str(size), "X_Linked_Etag": f'"{digest}"', "X_Repo_Commit": repository.commit}
            self.reply(302, Location=where, **linked)
        elif self.command == "HEAD":
            size = str(path.stat().st_size)
            self.reply(200, ETag=f'"{digest_of(path)}"', X_Repo_Commit=repository.commit, Content_Length=size)
        else:
            self.send_file(path, name, ETag=f'"{digest_of(path)}"', X_Repo_Commit=repository.commit)
