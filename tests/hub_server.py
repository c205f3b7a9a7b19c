"""As much of the hub as a push asks for, on 127.0.0.1: what is sent to it is kept, and answered as the hub answers."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What a client has sent: `requests` (method, path, token), `created`, `files` by path in the order of commits."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, str]] = []
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.refuse: str | None = None  # a part of a path that is answered with 403
        self.address = ""


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub that lives as long as the context."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, self.path, self.headers.get("Authorization", "")))
        code, said = self.reply(body)
        content = json.dumps(said).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if code == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def reply(self, body: bytes) -> tuple[int, Any]:
        path = self.path.split("?")[0]
        if self.hub.refuse and self.hub.refuse in path:
            return 403, {"error": "this token may not write"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.hub.created.append(asked)
            return 200, {"url": f"{self.hub.address}/{asked['organization']}/{asked['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                    for f in files
                ]
            }
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            place = f"{self.hub.address}/upload/"
            return 200, {
                "transfer": "basic",
                "objects": [w | {"actions": {"upload": {"href": place + w["oid"]}}} for w in wanted],
            }
        if path.startswith("/upload/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/upload/")
            self.hub.large[path.removeprefix("/upload/")] = body
            return 200, {}
        if "/commit/" in path:
            self.commit([json.loads(line) for line in body.decode().splitlines()])
            repository = path.removeprefix("/api/models/").partition("/commit/")[0]
            return 200, {"commitUrl": f"{self.hub.address}/{repository}/commit/{40 * '0'}", "commitOid": 40 * "0"}
        return 404, {"error": "Entry not found"}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.large[value["oid"]]
