"""A headless Chromium without a network, driven through its own protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp

from tests.profiling.boards import end

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)

# What is on a page is in shadow roots and in frames of the same origin, too.
_WALK = """
function everything(root, found) {
  for (const element of root.querySelectorAll('*')) {
    found.push(element);
    if (element.shadowRoot) everything(element.shadowRoot, found);
    if (element.tagName === 'IFRAME' && element.contentDocument) everything(element.contentDocument, found);
  }
  return found;
}
function all(selector) { return everything(document, []).filter(element => element.matches(selector)); }
function visible(element) { return element.getClientRects().length > 0; }
"""


class Page:
    """A page of the browser."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket, self._numbers = loop, socket, count(1)

    def goto(self, url: str) -> None:
        """Opens an address as a new document."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """The value of an expression, which may use `all(selector)` and `visible(element)`."""
        found = self._call("Runtime.evaluate", expression=f"{{{_WALK}\n{script}}}", returnByValue=True)
        if "exceptionDetails" in found:
            raise AssertionError(f"{script}: {found['exceptionDetails']['exception'].get('description')}")
        return found["result"].get("value")

    def until(self, script: str, *, seconds: float = 60.0) -> Any:
        """The first value that says anything."""
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            found = self.evaluate(script)
            if found:
                return found
            time.sleep(0.25)
        raise AssertionError(f"within {seconds:.0f} s the page did not come to show: {script}\n{self.text()[:2000]}")

    def text(self) -> str:
        """The words on the page."""
        words = "[...element.childNodes].filter(node => node.nodeType == 3).map(node => node.data.trim())"
        shown = "all('*').filter(element => !element.matches('style, script') && visible(element))"
        return str(self.evaluate(f"{shown}.flatMap(element => {words}).filter(word => word).join('\\n')"))

    def screenshot(self, path: Path) -> None:
        """What is seen of it."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **parameters: Any) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(self._ask(method, parameters), 60.0))

    async def _ask(self, method: str, parameters: dict[str, Any]) -> Any:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            answer = json.loads(await self._socket.receive_str())
            if answer.get("id") == number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]


@contextmanager
def chromium(folder: Path, *, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """Runs Chromium with its profile in a folder; ended and waited for afterwards."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={folder}",
        f"--window-size={width},{height}",
        "--remote-debugging-port=0",
        "about:blank",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    loop = asyncio.new_event_loop()
    try:
        port = _port(folder / "DevToolsActivePort", process)
        session = loop.run_until_complete(_session())
        try:
            yield Page(loop, loop.run_until_complete(_connected(session, port, width, height)))
        finally:
            loop.run_until_complete(session.close())
    finally:
        loop.close()
        end(process)


def _port(path: Path, process: subprocess.Popen[Any]) -> str:
    for _ in range(300):
        if path.exists() and path.read_text().count("\n"):
            return path.read_text().splitlines()[0]
        assert process.poll() is None, f"Chromium ended with {process.returncode}"
        time.sleep(0.1)
    raise AssertionError("Chromium has not begun to listen within 30 s")


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


async def _connected(
    session: aiohttp.ClientSession, port: str, width: int, height: int
) -> aiohttp.ClientWebSocketResponse:
    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
        pages = [page for page in await answer.json() if page["type"] == "page"]
    socket = await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    await socket.send_json({"id": 0, "method": "Emulation.setDeviceMetricsOverride", "params": metrics})
    return socket
