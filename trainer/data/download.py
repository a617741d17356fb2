"""One file over HTTP: resumed, retried, checked, and only then given its name.

Bytes gather in `NAME.part` beside the destination. A dropped connection continues there with a
Range request; the server's ETag lies in `NAME.part.etag`, so that a file that was published anew
in the meantime is not glued to the old half. Knows nothing of shards: the caller brings the check.
"""

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

from trainer.data.staging import CANNOT_WRITE
from trainer.errors import BackendError, DataError, UsageError

_CHUNK_BYTES = 1 << 20
_WHAT_TO_DO = (
    "check the network, or use `fairway data prepare` with text of your own, or set --base-url "
    "to a mirror"
)
_RETRIED_STATUS = (408, 425, 429, 500, 502, 503, 504)
# Everything a connection can break with; none of them says anything about the file.
_NETWORK_FAULTS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for a server. Attempts count anew whenever bytes have arrived."""

    timeout_s: float = 30.0
    attempts: int = 5
    backoff_s: float = 1.0

    def wait(self, failures: int) -> None:
        """Sleep before the next attempt: doubling, 30 s at most."""
        time.sleep(min(30.0, self.backoff_s * 2 ** (failures - 1)))


def read_small(url: str, patience: Patience, max_bytes: int) -> bytes:
    """Read a small file into memory, never from a cache."""
    for failures in range(1, patience.attempts + 1):
        try:
            with _open(url, patience, {"Cache-Control": "no-cache"}) as response:
                content = response.read(max_bytes + 1)
        except _NETWORK_FAULTS as error:
            _give_up_or_wait(url, error, failures, patience)
            continue
        if len(content) > max_bytes:
            raise DataError(f"{url}: larger than {max_bytes:,} bytes; check --repo and --base-url")
        return content
    raise AssertionError("the last failure raises")


def download(
    url: str,
    path: Path,
    check: Callable[[Path], None],
    patience: Patience,
    progress: Callable[[int, int], None],
) -> None:
    """Bring `url` to `path`, resuming what an earlier call left.

    `check` raises DataError on a file that is not what it should be; the file is then fetched once
    more from its beginning. `progress` is called with the bytes there and the bytes in all.
    """
    part = path.with_name(f"{path.name}.part")
    for is_last in (False, True):
        _complete(url, part, patience, progress)
        try:
            check(part)
        except DataError as error:
            _drop(part)
            if is_last:
                fault = str(error).removeprefix(f"{part}: ").partition(";")[0]
                raise DataError(
                    f"{path}: {url} serves a broken file ({fault}); set --base-url to a mirror"
                ) from error
            continue
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        _drop(part)
        return


def _complete(
    url: str, part: Path, patience: Patience, progress: Callable[[int, int], None]
) -> None:
    """Fill `part` until the server has no more."""
    failures, most = 0, _size(part)
    while True:
        try:
            if _continue(url, part, patience, progress):
                return
            fault: Exception = ConnectionError("the connection ended early")
        except _NETWORK_FAULTS as error:
            fault = error
        except OSError as error:
            if error.errno in CANNOT_WRITE:
                raise UsageError(
                    f"{part}: {error.strerror}; make room and run again, it resumes"
                ) from error
            fault = error
        failures = 1 if _size(part) > most else failures + 1
        most = max(most, _size(part))
        _give_up_or_wait(url, fault, failures, patience)


def _continue(
    url: str, part: Path, patience: Patience, progress: Callable[[int, int], None]
) -> bool:
    """Append what one connection gives; True once the file has the length the server told."""
    etag_path = part.with_name(f"{part.name}.etag")
    have = _size(part)
    headers = {}
    if have:
        headers["Range"] = f"bytes={have}-"
        if etag_path.is_file():
            headers["If-Range"] = etag_path.read_text()
    try:
        response = _open(url, patience, headers)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        error.close()
        # Nothing follows what is there: it is all of the file, or no part of this file.
        is_all = (error.headers.get("Content-Range") or "").endswith(f"/{have}")
        if not is_all:
            _drop(part)
        return is_all
    with response:
        span = response.headers.get("Content-Range") or ""
        if not span.startswith(f"bytes {have}-"):
            have = 0
        if response.status == 206 and not have:
            raise http.client.HTTPException(f"asked for the rest of a file, got {span!r}")
        total = have + int(response.headers.get("Content-Length") or 0)
        if total == have:
            raise DataError(f"{url}: the server tells no length; use a mirror that does")
        _keep_etag(etag_path, response.headers.get("ETag"))
        with part.open("ab" if have else "wb") as file:
            while chunk := response.read(_CHUNK_BYTES):
                file.write(chunk)
                have += len(chunk)
                progress(have, total)
        return have == total


def _keep_etag(path: Path, etag: str | None) -> None:
    # Only a strong one promises equal bytes; If-Range does not take the others.
    if etag and not etag.startswith("W/"):
        path.write_text(etag)
    else:
        path.unlink(missing_ok=True)


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(f"{part.name}.etag").unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _open(url: str, patience: Patience, headers: dict[str, str]) -> http.client.HTTPResponse:
    scheme, host, path, query, _ = urlsplit(url)
    if scheme not in ("http", "https") or not host:
        raise UsageError(f"{url}: not an http or https address; set --base-url to one")
    address = f"{scheme}://{host}{quote(path)}" + (f"?{query}" if query else "")
    request = urllib.request.Request(address, headers={"User-Agent": "fairway", **headers})
    return urllib.request.urlopen(request, timeout=patience.timeout_s)


def _give_up_or_wait(url: str, fault: Exception, failures: int, patience: Patience) -> None:
    """Sleep if another attempt makes sense; otherwise raise the one line for the user."""
    if isinstance(fault, urllib.error.HTTPError):
        fault.close()
        if fault.code == 404:
            raise UsageError(
                f"{url}: no such file (HTTP 404); check the variant, --repo and --base-url"
            ) from fault
        if fault.code not in _RETRIED_STATUS or failures >= patience.attempts:
            raise BackendError(f"{url}: HTTP {fault.code} {fault.reason}; {_WHAT_TO_DO}") from fault
    if failures >= patience.attempts:
        reason = getattr(fault, "reason", None) or str(fault) or type(fault).__name__
        raise BackendError(
            f"{url}: the network cannot be reached ({reason}) after {failures} attempts; "
            f"{_WHAT_TO_DO}"
        ) from fault
    patience.wait(failures)
