"""Take the two pictures of a sweep's MLflow page that README shows.

    python -m benchmarks.screenshot_mlflow --home .fairway --sweep SWEEP_ID --out docs/images

serves the embedded store with the command that users are given, opens the sweep's links in a
headless Chromium, waits until the page stands, and writes mlflow-charts.png and mlflow-table.png.
Talks to Chromium over its DevTools protocol; every address but loopback is blocked.
"""

import argparse
import asyncio
import base64
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from service.paths import Paths
from service.tracking import DEFAULT_PORT, default_uri, sync, ui_command

START_S, LOAD_S = 120.0, 60.0
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
SIZE = (1600, 1200)
# Each shows up only once its part of the page is drawn.
CHARTS_STAND = (
    "document.querySelector('.axis text.label') && document.querySelector('.scatterlayer .point')"
)
TABLE_STANDS = "document.querySelectorAll('[role=row]').length >= 3"

# On its first visit the page opens a chat that covers a quarter of it.
_NO_ASSISTANT = (
    "try { localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true') }"
    " catch (error) {}"
)


def find_chromium() -> str | None:
    """Return the path of an installed Chromium."""
    return next((path for name in CHROMIUMS if (path := shutil.which(name))), None)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(paths: Paths) -> Iterator[str]:
    """Serve the embedded store by `ui_command`; yields the server's address."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = ["bash", "-c", ui_command(paths, port=port)]
        server = subprocess.Popen(
            command,
            cwd=folder,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for_health(server, address)
            yield address
        finally:
            _stop(server)


def _wait_for_health(server: "subprocess.Popen[bytes]", address: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with code {server.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise TimeoutError(f"{address}/health did not answer in {START_S:.0f} s")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process with the session it leads."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=15)
            return
        except ProcessLookupError:
            process.wait(timeout=15)
            return
        except subprocess.TimeoutExpired:
            continue


class Browser:
    """One page of a headless Chromium. Use as `async with`."""

    def __init__(self, executable: str) -> None:
        self._executable = executable

    async def __aenter__(self) -> "Browser":
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        width, height = SIZE
        self._process = subprocess.Popen(
            [
                self._executable,
                *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update"),
                *("--disable-sync", "--hide-scrollbars", f"--window-size={width},{height}"),
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                f"--user-data-dir={self._folder.name}",
                "--remote-debugging-port=0",
                "about:blank",
            ],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = await self._port()
            self._session = aiohttp.ClientSession()
            async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [page for page in await answer.json() if page["type"] == "page"]
            address = pages[0]["webSocketDebuggerUrl"]
            self._socket = await self._session.ws_connect(address, max_msg_size=0)
        except BaseException:
            _stop(self._process)
            raise
        self._num_calls = 0
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        await self.call("Page.enable")
        await self.call("Page.addScriptToEvaluateOnNewDocument", source=_NO_ASSISTANT)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._socket.close()
        await self._session.close()
        _stop(self._process)
        self._folder.cleanup()

    async def _port(self) -> int:
        file = Path(self._folder.name, "DevToolsActivePort")
        deadline = time.monotonic() + START_S
        while not (file.is_file() and file.read_text().strip()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self._executable} did not start")
            await asyncio.sleep(0.1)
        return int(file.read_text().split()[0])

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one DevTools command and return its result."""
        self._num_calls += 1
        await self._socket.send_json(
            {"id": self._num_calls, "method": method, "params": parameters}
        )
        while True:
            answer = await self._socket.receive_json(timeout=LOAD_S)
            if answer.get("id") == self._num_calls:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    async def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript in the page; the value must be plain data."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    async def open(self, address: str, stands: str, *, settle_s: float = 1.5) -> None:
        """Load a page and wait until `stands` is true and the page had time to settle."""
        await self.call("Page.navigate", url="about:blank")
        await self.call("Page.navigate", url=address)
        deadline = time.monotonic() + LOAD_S
        while not await self.evaluate(f"Boolean({stands})"):
            if time.monotonic() > deadline:
                text = await self.evaluate("document.body.innerText")
                raise TimeoutError(f"{address}: not there after {LOAD_S:.0f} s; it says: {text}")
            await asyncio.sleep(0.25)
        await asyncio.sleep(settle_s)

    async def text(self) -> str:
        """Return what the page says."""
        return str(await self.evaluate("document.body.innerText"))

    async def save(self, path: Path) -> None:
        """Write a PNG of the window."""
        picture = await self.call("Page.captureScreenshot", format="png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(picture["data"]))


async def _take(executable: str, pictures: dict[Path, tuple[str, str]]) -> None:
    async with Browser(executable) as browser:
        for path, (address, stands) in pictures.items():
            await browser.open(address, stands, settle_s=4.0)
            await browser.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--sweep", required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    executable = find_chromium()
    if executable is None:
        sys.exit(f"no Chromium found; install one of {', '.join(CHROMIUMS)}")
    paths = Paths(given.home)
    projection = sync(paths, given.sweep, default_uri(paths))
    with serving(paths) as address:
        own = f"http://127.0.0.1:{DEFAULT_PORT}"
        charts = projection.link.replace(own, address)
        table = projection.table_link.replace(own, address)
        pictures = {
            given.out / "mlflow-charts.png": (charts, CHARTS_STAND),
            given.out / "mlflow-table.png": (table, TABLE_STANDS),
        }
        asyncio.run(_take(executable, pictures))


if __name__ == "__main__":
    main()
