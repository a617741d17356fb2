"""A small real HTTP server of a FineWeb export, with the faults that a network has."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

PREFIX = "/datasets/owner/export/resolve/main/datasets/"


@dataclass
class Export:
    """What the server holds and does. Paths are relative to the export's root."""

    files: dict[str, bytes] = field(default_factory=dict)
    drop_after: dict[str, int] = field(default_factory=dict)  # once, after so many bytes
    statuses: dict[str, list[int]] = field(default_factory=dict)  # answered first, one by one
    ranges_work: bool = True
    seen: list[tuple[str, str | None]] = field(default_factory=list)  # path, Range header
    url: str = ""

    def put_manifest(self, **stats: int) -> None:
        """Describe the files as the published manifests do."""
        name = "fineweb10B_sp1024"
        entry = {
            "name": name,
            "tokenizer_name": "sp_bpe_1024",
            "path": f"datasets/{name}",
            "stats": stats,
        }
        model = {"name": "sp_bpe_1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}
        self.files["manifest.json"] = json.dumps(
            {"datasets": [entry], "tokenizers": [model]}
        ).encode()

    def fetched(self) -> list[str]:
        """Names of the files asked for, in order, without the manifest."""
        names = [path.rpartition("/")[2] for path, _ in self.seen]
        return [name for name in names if name != "manifest.json"]


class _Handler(BaseHTTPRequestHandler):
    export: Export

    def do_GET(self) -> None:
        path = self.path.removeprefix(PREFIX)
        asked = self.headers.get("Range")
        self.export.seen.append((path, asked))
        if waiting := self.export.statuses.get(path):
            self._answer(waiting.pop(0), b"", {})
            return
        if path not in self.export.files:
            self._answer(404, b"", {})
            return
        content = self.export.files[path]
        etag = f'"{hash(content)}"'
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if not self.export.ranges_work or self.headers.get("If-Range", etag) != etag:
            start = 0
        if start and start >= len(content):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        extra = {"Content-Range": span} if start else {}
        self._answer(206 if start else 200, content[start:], {"ETag": etag, **extra}, path)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], path: str = "") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: self.export.drop_after.pop(path, len(body))])

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: pytest shows what the client makes of it."""


@contextmanager
def serving(export: Export) -> Iterator[Export]:
    """Serve an export on a free local port."""
    handler = type("Handler", (_Handler,), {"export": export})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    export.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield export
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
