"""A hub on loopback that serves folders as repositories, and misbehaves as told.

Two servers, as in the original: the hub, which knows names, sizes and who may read, and a storage on another
port, to which it redirects for large files. Both count what they are asked for and what they send.

    with HubImitation() as hub:
        hub.add("ibrahimhamamci/CT-RATE", folder, gated=True)
        hub.fault("a.nii.gz", "drop", 1000, times=2)
        ...  # HF_ENDPOINT=hub.url, HF_TOKEN=hub.token
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "5c0ffee" + 33 * "0"
LARGE = (".gz", ".pt", ".bin", ".safetensors")  # kept outside git, with a SHA-256


UPLOAD = re.compile(
    r"/api/repos/create|/api/validate-yaml|/api/models/(.+)/(?:preupload|commit)/main|/(.+)\.git/info/lfs/objects/batch"
)


class HubImitation:
    """Args: token: the one it knows."""

    def __init__(self, token="hf_imitation_of_a_token"):
        self.token = token
        self.accepted = True  # whether that account has accepted the terms of gated repositories
        self.fine_grained = False  # the token lacks the right to read gated repositories
        self.repositories = {}  # id -> (folder, type, gated)
        self.faults = defaultdict(list)
        self.pause = 0.0  # seconds between pieces of 1,000 bytes
        self.storage_saw_token = False
        self.uploads = None  # folder for repositories that are made
        self.made = {}  # id -> who may see it
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.forget()

    def add(self, repo_id, folder, repo_type="dataset", gated=False):
        self.repositories[repo_id] = Path(folder), repo_type, gated

    def forget(self):
        """Set all counts to zero."""
        self.requests = Counter()  # method and path
        self.sent = Counter()  # file name: bytes
        self.starts = defaultdict(list)  # file name: first byte of each answer

    def fault(self, name, kind, value=0, times=1, says="as it was told to"):
        """Spoil the next answers.

        Args:
            name: a file, or "/api" for all of the hub's questions.
            kind: "status" (answer with this number), "drop" or "reset" (break off after so many bytes), "wrong bytes".
            value: of that kind.
            times: how many answers.
            says: the hub's message with a status.
        """
        self.faults[name] += [(kind, value, says)] * times

    def take_fault(self, name):
        with self.lock:
            return self.faults[name].pop(0) if self.faults[name] else (None, 0, "")

    def __enter__(self):
        self.servers = [_start(self, _Hub), _start(self, _Storage)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)
        return self

    def __exit__(self, *_):
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()


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

    def serve(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            self.body += self.rfile.read(size + 2)[:-2]
        path = unquote(urlsplit(self.path).path)
        with self.imitation.lock:
            self.imitation.requests[f"{self.command} {path}"] += 1
        self.route(path)

    do_HEAD = do_GET = do_POST = do_PUT = serve

    def reply(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content_Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status, code, message):
        self.reply(status, {"error": message}, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def send_file(self, path, name, **headers):
        """The bytes of a file, from where they are asked for, with the fault whose turn it is."""
        hub = self.imitation
        kind, value, says = hub.take_fault(name)
        if kind == "status":
            self.reply(value, {"error": says})
            return
        data = path.read_bytes()
        if kind == "wrong bytes":
            data = bytes(255 - byte for byte in data)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.send_response(206 if start else 200)
        headers |= {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        for header, text in {"Content_Length": str(len(data) - start), **headers}.items():
            self.send_header(header.replace("_", "-"), text)
        self.end_headers()
        with hub.lock:
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
        self.close_connection = kind in ("drop", "reset")


class _Storage(_Handler):
    """Where large files lie; whoever has the signed address may read them."""

    def route(self, path):
        if self.headers.get("Authorization"):
            self.imitation.storage_saw_token = True
        repo_id, _, name = path.removeprefix("/").partition("//")
        if "signature" not in self.path:
            self.refuse(403, None, "the address is not signed")
        elif self.command == "PUT":
            (self.imitation.uploads / name).write_bytes(self.body)
            self.reply(200)
        else:
            self.send_file(self.imitation.repositories[repo_id][0] / name, name)


class _Hub(_Handler):
    """Names, sizes, and who may read."""

    def route(self, path):
        api = re.fullmatch(r"/api/(dataset|model)s/([^/]+/[^/]+)(?:/([^/]+))?(?:/([^/]+))?", path)
        resolve = re.fullmatch(r"/(?:(dataset)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.imitation.uploads and (found := UPLOAD.fullmatch(path)):
            self.take(path, found[1] or found[2]) if token == self.imitation.token else self.refuse(
                403, None, "no right"
            )
            return
        kind, status, says = self.imitation.take_fault("/api") if api or self.command == "HEAD" else 3 * [None]
        repo_type, repo_id, *rest = (api or resolve).groups()
        folder, known_type, gated = self.imitation.repositories.get(repo_id, (None, None, False))
        if token and token != self.imitation.token:
            self.refuse(401, None, "Invalid credentials in Authorization header")
        elif kind:
            self.reply(status, {"error": says})
        elif known_type != (repo_type or "model"):
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif api:
            self.answer_question(folder, repo_id, gated, rest[0])
        elif gated and not token:
            self.refuse(401, "GatedRepo", "Access is restricted. You must be authenticated to access it.")
        elif gated and self.imitation.fine_grained:
            self.refuse(403, "GatedRepo", "Enable access to gated repositories in your fine-grained token settings")
        elif gated and not self.imitation.accepted:
            self.refuse(403, "GatedRepo", "Access is restricted and you are not in the authorized list.")
        else:
            self.resolve(folder / rest[1], repo_id, rest[1])

    def take(self, path, repo_id):
        """What is uploaded: a repository is made, its card is looked at, files come in the commit or by the storage."""
        hub, (asked, *lines) = self.imitation, map(json.loads, self.body.splitlines())
        if path == "/api/repos/create":
            repo_id = f"{asked['organization']}/{asked['name']}"
            hub.made[repo_id] = asked.get("visibility")
            hub.add(repo_id, hub.uploads / repo_id, "model")
            (hub.uploads / repo_id).mkdir(parents=True, exist_ok=True)
            self.reply(200, {"url": f"{hub.url}/{repo_id}"})
        elif path == "/api/validate-yaml":
            wrong = [] if "\nlicense: " in asked["content"] else [{"message": "there is no license"}]
            self.reply(400 if wrong else 200, {"errors": wrong, "warnings": []})
        elif "/preupload/" in path:
            mode = {True: "lfs", False: "regular"}
            files = [{"path": f["path"], "uploadMode": mode[f["path"].endswith(LARGE)]} for f in asked["files"]]
            self.reply(200, {"files": [file | {"shouldIgnore": False} for file in files]})
        elif path.endswith("/batch"):
            there = f"{hub.storage_url}/{repo_id}//%s?signature=of-the-storage"
            found = [o | {"actions": {"upload": {"href": there % o["oid"]}}} for o in asked["objects"]]
            self.reply(200, {"transfer": "basic", "objects": found})
        else:
            for line in lines:
                file, to = line["value"], hub.uploads / repo_id / line["value"]["path"]
                if line["key"] == "lfsFile":
                    (hub.uploads / file["oid"]).rename(to)
                else:
                    to.write_bytes(base64.b64decode(file["content"]))
            self.reply(200, {"commitUrl": f"{hub.url}/{repo_id}/commit/{COMMIT}", "commitOid": COMMIT})

    def answer_question(self, folder, repo_id, gated, what):
        if what == "tree":
            self.reply(200, [_entry(folder, path) for path in sorted(folder.iterdir())])
        elif what == "paths-info":
            asked = [folder / name for name in parse_qs(self.body.decode())["paths"]]
            self.reply(200, [_entry(folder, path) for path in asked if path.exists()])
        else:
            self.reply(200, {"id": repo_id, "sha": COMMIT, "gated": "manual" if gated else False})

    def resolve(self, path, repo_id, name):
        if not path.is_file():
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        size, digest = str(path.stat().st_size), digest_of(path)
        if path.name.endswith(LARGE):
            where = f"{self.imitation.storage_url}/{repo_id}//{name}?signature=of-the-storage"
            linked = {"X_Linked_Size": size, "X_Linked_Etag": f'"{digest}"', "X_Repo_Commit": COMMIT}
            self.reply(302, Location=where, **linked)
        elif self.command == "HEAD":
            self.reply(200, ETag=f'"{digest}"', X_Repo_Commit=COMMIT, Content_Length=size)
        else:
            self.send_file(path, name, ETag=f'"{digest}"', X_Repo_Commit=COMMIT)


def _entry(folder, path):
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": 40 * "d"}
    size, digest = path.stat().st_size, digest_of(path)
    if path.name.endswith(LARGE):
        lfs = {"oid": digest, "size": size, "pointerSize": 134}
        return {"type": "file", "path": name, "size": size, "oid": 40 * "e", "lfs": lfs}
    return {"type": "file", "path": name, "size": size, "oid": digest}
