"""A server on the loopback interface that speaks the hub's protocol, and fails as it is told to."""

import hashlib
import json
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "5f" * 20


class Server:
    """files: path -> content of the repository `owner/data`; faults: path (or "info", "tree") -> what happens to its
    next requests, one word each:

    drop:N the connection ends after N bytes; short:N only N bytes are announced and sent; long: one byte too many;
    corrupt: a byte is changed; NNN or NNN:SECONDS a status, with Retry-After; whole: the range is not heeded; html (of
    info and tree): a page for people comes.
    """

    def __init__(self, files, page=3):
        self.files, self.page, self.pause = dict(files), page, 0.0
        self.faults = defaultdict(list)
        self.requests = []  # (method, path, the range that was asked for)
        self.listed = {}  # path -> (size, sha256) where the listing lies
        self.served = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                server.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def row(self, path):
        content = self.files[path]
        size, sha256 = self.listed.get(path, (len(content), hashlib.sha256(content).hexdigest()))
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        row = {"type": "file", "path": path, "size": size, "oid": git}
        if not path.endswith((".model", ".md")):  # as git-lfs keeps large files
            row["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
        return row

    def answer(self, handler):
        url = urlsplit(handler.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.requests.append((path, handler.headers.get("Range")))
        if path == "/api/datasets/owner/data/revision/main":
            self.api(handler, "info", {"id": "owner/data", "sha": COMMIT, "siblings": [], "private": False})
        elif path == f"/api/datasets/owner/data/tree/{COMMIT}":
            at = int(query.get("cursor", ["0"])[0])
            rows = [{"type": "directory", "path": "datasets", "oid": "0" * 40, "size": 0}]
            rows += [self.row(name) for name in sorted(self.files)]
            more = f"{self.endpoint}{url.path}?recursive=true&cursor={at + self.page}"
            link = {"Link": f'<{more}>; rel="next"'} if at + self.page < len(rows) else {}
            self.api(handler, "tree", rows[at : at + self.page], link)
        elif path.startswith(stem := f"/datasets/owner/data/resolve/{COMMIT}/"):
            self.resolve(handler, path.removeprefix(stem))
        elif path.startswith("/cdn/"):
            assert "authorization" not in handler.headers or "127.0.0.1" in handler.headers["host"]
            self.content(handler, path.removeprefix("/cdn/"))
        else:
            self.send(handler, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def api(self, handler, what, answer, headers=()):
        fault = self.next_fault(what)
        if fault == "html":
            self.send(handler, 200, b"<html>log in first</html>", {"Content-Type": "text/html"})
        elif fault:
            self.status(handler, fault)
        else:
            self.send(handler, 200, json.dumps(answer).encode(), {"Content-Type": "application/json", **dict(headers)})

    def resolve(self, handler, name):
        if name not in self.files:
            self.send(handler, 404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
            return
        row = self.row(name)
        if "lfs" not in row:
            self.content(handler, name)
            return
        headers = {
            "Location": f"/cdn/{name}",
            "X-Linked-Size": str(row["size"]),
            "X-Linked-ETag": f'"{row["lfs"]["oid"]}"',
            "X-Repo-Commit": COMMIT,
        }
        self.send(handler, 302, b"", headers)

    def content(self, handler, name):
        body, fault, start, status = self.files[name], self.next_fault(name), 0, 200
        if fault[:3].isdecimal():
            self.status(handler, fault)
            return
        asked = handler.headers.get("Range")
        if asked and fault != "whole":
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
        word, _, number = fault.partition(":")
        if word == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        if word == "long":
            body += b"x"
        part = body[start:]
        headers = {"ETag": '"x"', "X-Repo-Commit": COMMIT}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if word == "short":
            part = part[: int(number)]
        if word == "long":  # without a length: nothing but the reader's own count tells it
            headers |= {"Connection": "close", "Content-Length": ""}
        if word != "drop":
            self.send(handler, status, part, headers)
            return
        self.send(handler, status, part, headers, stop=int(number))

    def send(self, handler, status, body, headers, stop=None):
        handler.send_response(status)
        said = {"Content-Length": str(len(body)), **headers}
        for key, value in said.items():
            if value:
                handler.send_header(key, value)
        handler.end_headers()
        body = body if stop is None else body[:stop]
        try:
            step = 4096 if self.pause else 1 << 20
            for at in range(0, len(body), step):
                handler.wfile.write(body[at : at + step])
                self.served += len(body[at : at + step])
                time.sleep(self.pause)
        except OSError:
            handler.close_connection = True
        if stop is not None or said["Content-Length"] == "":
            handler.wfile.flush()
            handler.close_connection = True

    def status(self, handler, fault):
        code, _, wait = fault.partition(":")
        self.send(handler, int(code), b"slow down", {"Retry-After": wait} if wait else {})

    def next_fault(self, name):
        return self.faults[name].pop(0) if self.faults[name] else ""
