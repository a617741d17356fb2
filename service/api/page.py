"""The web page: the static files of service/web, and plotly's own script from its package."""

import gzip
import hashlib
import importlib.metadata
import importlib.util
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response

from service.api.problems import Refusal

WEB = Path(__file__).parent.parent / "web"
TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
}
LIBRARY = "plotly.min.js"
# plotly sets styles as it draws and makes pictures from blobs; nothing comes from elsewhere.
_POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_WEEK_S = 7 * 24 * 3600


def router() -> APIRouter:
    """`/` and `/ui/...`; open to all, for there is nothing in them but the page itself."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    def index(request: Request) -> Response:
        return _file(request, "index.html")

    @routes.get(f"/ui/{LIBRARY}")
    def library(request: Request) -> Response:
        tag, packed = _library()
        headers = {
            "ETag": tag,
            "Cache-Control": f"public, max-age={_WEEK_S}",
            "Vary": "Accept-Encoding",
        }
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            return Response(packed, media_type="text/javascript", headers=headers)
        return Response(gzip.decompress(packed), media_type="text/javascript", headers=headers)

    @routes.get("/ui/{name}")
    def file(name: str, request: Request) -> Response:
        return _file(request, name)

    return routes


def _file(request: Request, name: str) -> Response:
    """A file of the page, which is flat: no name leads out of the folder."""
    path = WEB / name
    if "/" in name or "\\" in name or "\0" in name or path.suffix not in TYPES:
        raise Refusal(404, "there is no such file in the page")
    try:
        content = path.read_bytes()
    except OSError:  # not there, a folder, or longer than a name can be
        raise Refusal(404, "there is no such file in the page; the API is at /api/v1") from None
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache", "Content-Security-Policy": _POLICY}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=TYPES[path.suffix], headers=headers)


@cache
def _library() -> tuple[str, bytes]:
    """plotly's script, packed, and a tag that changes with its version."""
    spec = importlib.util.find_spec("plotly")
    assert spec is not None
    assert spec.origin is not None
    script = Path(spec.origin).parent / "package_data" / LIBRARY
    version = importlib.metadata.version("plotly")
    return f'"plotly-{version}"', gzip.compress(script.read_bytes(), compresslevel=6, mtime=0)
