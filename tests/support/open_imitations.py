"""Public buckets and a record of Zenodo on loopback, which serve folders and count what they are asked for."""

import hashlib
import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        address = urlsplit(self.path)
        body, status = self.server.answer(unquote(address.path).strip("/"), parse_qs(address.query))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.md5(body).hexdigest()}"')
        self.send_header("Last-Modified", "Sat, 01 Jan 2000 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.server.sent[address.path.rpartition("/")[2]] += 1
            self.wfile.write(body)


@contextmanager
def _serving(answer):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads, server.answer, server.sent = True, answer, Counter()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def buckets(root):
    """S3 as far as s5cmd asks for it: folders of `root` are buckets; files that are `missing` are listed, not given."""

    def answer(path, query):
        if "prefix" in query:
            prefix, bucket = query["prefix"][0], root / path
            found = sorted(
                p for p in bucket.rglob("*") if p.is_file() and str(p.relative_to(bucket)).startswith(prefix)
            )
            contents = "".join(
                f"<Contents><Key>{escape(str(p.relative_to(bucket)))}</Key><Size>{p.stat().st_size}</Size>"
                "<LastModified>2000-01-01T00:00:00.000Z</LastModified><ETag>&quot;0&quot;</ETag></Contents>"
                for p in found
            )
            head = f"<Name>{path}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found)}</KeyCount>"
            return (
                f"<ListBucketResult>{head}<IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode(),
                200,
            )
        file = root / path
        if file.is_dir():  # is there such a bucket, and where?
            return b"", 200
        there = file.is_file() and file.name not in answer.missing
        return (file.read_bytes(), 200) if there else (b"<Error><Code>NoSuchKey</Code></Error>", 404)

    answer.missing = set()
    return _serving(answer)


def zenodo(root, record, licence="cc-by-nc-nd-4.0", token=None):
    """A record with the files in `root`; with a `token` they are given to who brings it."""

    def answer(path, query):
        brought = token is None or [token] in query.values()
        if path == f"api/records/{record}":
            told = dict(title="RAD-ChestCT Dataset", creators=[{"name": "Draelos, R. L."}])
            told |= dict(license={"id": licence}, access_right="restricted" if token else "open")
            files = [_entry(file, f"{answer.url}/api/records/{record}/files") for file in sorted(root.iterdir())]
            said = dict(doi=f"10.5281/zenodo.{record}", metadata=told) | (dict(files=files) if brought else {})
            return json.dumps(said).encode(), 200
        file = root / path.split("/")[-2]
        if not brought:
            return b"{}", 403
        data = file.read_bytes()
        return (data[: len(data) // 2] + data[: -(len(data) // 2)] if file.name in answer.spoilt else data), 200

    @contextmanager
    def serving():
        with _serving(answer) as server:
            answer.url, answer.spoilt = server.url, set()
            yield server

    return serving()


def _entry(file, folder):
    digest = hashlib.md5(file.read_bytes()).hexdigest()
    links = {"self": f"{folder}/{file.name}/content"}
    return dict(key=file.name, size=file.stat().st_size, checksum=f"md5:{digest}", links=links)
