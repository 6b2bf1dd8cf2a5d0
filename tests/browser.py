"""Headless Chromium on a pair of pipes: as much of the DevTools protocol as the tests of the pages need.

    JSON + NUL → fd 3 → Chromium → fd 4 → JSON + NUL: replies by id, events by session

Sandboxed frames run in processes of their own and get a session each. What a frame said before its session began is
told again to the session, what it requested is not: `Browser.requests` asks the frames, too.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60  # seconds: far more than anything here takes, so that a busy machine fails no test
OPTIONS = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-component-update --remote-debugging-pipe"
WATCHED = ("Runtime.enable", "Log.enable", "Page.enable", "Network.enable")
ATTACH = {"autoAttach": True, "waitForDebuggerOnStart": False, "flatten": True}
CODES = {"Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One Chromium with one page at a time; a context manager that always kills it.

    Attributes
    ----------
    opened : list of str
        Addresses given to `open`.
    messages : list of str
        Errors and warnings of the console, uncaught exceptions and log entries of all frames.
    """

    def __enter__(self) -> Browser:
        self.profile = Path(tempfile.mkdtemp(prefix="skipkv-chromium-"))
        # Above 4, so that moving one to 3 or 4 overwrites none of the others.
        pairs = [[fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in pair] for pair in (os.pipe(), os.pipe())]
        (its_in, self.write_end), (self.read_end, its_out) = pairs
        log = os.open(self.profile / "log", os.O_CREAT | os.O_WRONLY)
        moves = [(os.POSIX_SPAWN_DUP2, *pair) for pair in ((its_in, 3), (its_out, 4), (log, 1), (log, 2))]
        command = [CHROMIUM, *OPTIONS.split(), f"--user-data-dir={self.profile}"]
        self.pid = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=moves, setpgroup=0)
        for fd in (its_in, its_out, log):
            os.close(fd)
        self.buffer, self.count, self.replies, self.target = b"", 0, {}, ""
        self.opened, self.messages, self.seen = [], [], set()
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.write_end), os.close(self.read_end)
        shutil.rmtree(self.profile, ignore_errors=True)

    def open(self, path: Path, width: int = 1200, height: int = 900, dark: bool = False) -> Frame:
        """The main frame of a file, loaded; the page before it is closed."""
        if self.target:
            self.seen = self.requests()
            self.call("Target.closeTarget", targetId=self.target)
        self.contexts, self.loaded, self.scheme = {}, set(), "dark" if dark else "light"
        self.target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", self.session, **size)
        self.opened.append(path.as_uri())
        self.call("Page.navigate", self.session, url=path.as_uri())
        self.until(lambda: self.session in self.loaded, f"{path} has not loaded")
        return Frame(self, self.target)

    def requests(self) -> set[str]:
        """Addresses that any frame requested, its own included."""
        listed = "performance.getEntriesByType('resource').map((entry) => entry.name)"
        return self.seen.union(*(Frame(self, frame).evaluate(listed) for frame in self.contexts))

    def forget(self) -> None:
        """Begin anew with what was opened, said and requested."""
        if self.target:
            self.call("Target.closeTarget", targetId=self.target)
        self.target, self.contexts, self.opened, self.messages, self.seen = "", {}, [], [], set()

    def colours(self, scheme: str, session: str = "") -> None:
        """``light`` or ``dark``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", session or self.session, features=features)

    def mouse(self, *kinds: str, at: tuple[float, float], **more: Any) -> None:
        """``Pressed``, ``Moved``, ``Released``, ``Wheel`` at a point of the window."""
        for kind in kinds:
            button = {"button": "left", "buttons": 1, "clickCount": 1} if kind in ("Pressed", "Released") else {}
            event = {"type": f"mouse{kind}", "x": at[0], "y": at[1], **button, **more}
            self.call("Input.dispatchMouseEvent", self.session, **event)

    def key(self, name: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            names = {"key": name, "code": name, "windowsVirtualKeyCode": CODES[name]}
            self.call("Input.dispatchKeyEvent", self.session, type=kind, **names)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", self.session)["data"]))

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """What the browser replies to a command."""
        number = self.send(method, session, **params)
        self.until(lambda: number in self.replies, f"no reply to {method}")
        reply = self.replies.pop(number)
        assert "error" not in reply, f"{method}: {reply['error']}"
        return reply["result"]

    def send(self, method: str, session: str = "", **params: Any) -> int:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        left = json.dumps(message).encode() + b"\0"
        while left:
            left = left[os.write(self.write_end, left) :]
        return self.count

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Take in replies and events until ``done()``."""
        end = time.monotonic() + PATIENCE
        while not done():
            ready = select.select([self.read_end], [], [], max(0.0, end - time.monotonic()))[0]
            part = os.read(self.read_end, 1 << 20) if ready else b""
            why = "Chromium has ended" if ready else f"{PATIENCE} s have passed"
            assert part, f"{what}: {why}\n{(self.profile / 'log').read_text(errors='replace')[-2000:]}"
            *whole, self.buffer = (self.buffer + part).split(b"\0")
            for message in map(json.loads, whole):
                if "method" in message:
                    self._event(message["method"], message.get("sessionId", ""), message["params"])
                else:
                    self.replies[message["id"]] = message

    def _event(self, name: str, session: str, params: dict[str, Any]) -> None:
        if name == "Target.attachedToTarget":
            found = params["sessionId"]
            self.colours(self.scheme, found)
            self.send("Target.setAutoAttach", found, **ATTACH)
            for command in WATCHED:
                self.send(command, found)
        elif name == "Runtime.executionContextCreated":
            # The latest of a frame counts: navigating makes a new one.
            self.contexts[params["context"]["auxData"]["frameId"]] = session, params["context"]["id"]
        elif name == "Page.loadEventFired":
            self.loaded.add(session)
        elif name == "Network.requestWillBeSent":
            self.seen.add(params["request"]["url"])
        elif name in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.messages.append(json.dumps(params))
        elif name == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.messages.append(json.dumps(params))


@dataclass(frozen=True)
class Frame:
    """A document: the page's own or that of a frame in it, whose element is ``owner`` of ``outer``."""

    browser: Browser
    id: str
    outer: Frame | None = None
    owner: str = ""

    def _run(self, expression: str, **options: Any) -> dict[str, Any]:
        session, context = self.browser.contexts[self.id]
        reply = self.browser.call("Runtime.evaluate", session, expression=expression, contextId=context, **options)
        assert "exceptionDetails" not in reply, f"{expression}: {reply['exceptionDetails']}"
        return reply["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript, awaited if it is a promise."""
        return self._run(expression, awaitPromise=True, returnByValue=True).get("value")

    def wait(self, condition: str) -> None:
        """Until an expression of JavaScript is true."""
        end = time.monotonic() + PATIENCE
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"{PATIENCE} s have passed, not yet true: {condition}"
            time.sleep(0.02)

    def frame(self, i: int) -> Frame:
        """The document of the i-th frame inside this one."""
        owner = f"document.querySelectorAll('iframe')[{i}]"
        element, session = self._run(owner)["objectId"], self.browser.contexts[self.id][0]
        found = self.browser.call("DOM.describeNode", session, objectId=element)["node"]["frameId"]
        self.browser.until(lambda: found in self.browser.contexts, f"{owner} has not loaded")
        return Frame(self.browser, found, self, owner)

    def reach(self) -> None:
        """Until the mouse reaches this frame: Chromium hands events to the outer one until it has composed both."""
        self.evaluate("addEventListener('mousemove', () => (window.reached = true), { capture: true, once: true })")
        end = time.monotonic() + PATIENCE
        while not self.evaluate("window.reached"):
            assert time.monotonic() < end, f"{PATIENCE} s have passed, the mouse does not reach {self.owner}"
            for x in (1, 2):  # a mouse that rests does not move
                self.browser.mouse("Moved", at=self.point(f"[{x}, 1]"))

    def point(self, place: str) -> tuple[float, float]:
        """Where in the window a point is: an expression of [x, y] in this document's own window."""
        x, y = self.evaluate(place)
        if not self.outer:
            return x, y
        box = "{}.getBoundingClientRect()".replace("{}", self.owner)
        return self.outer.point(
            f"[{box}.left + {self.owner}.clientLeft + {x}, {box}.top + {self.owner}.clientTop + {y}]"
        )

    def middle(self, element: str) -> tuple[float, float]:
        """The middle of an element, or of its first line."""
        return self.point(
            f"(({{left, top, width, height}}) => [left + width / 2, top + height / 2])({element}.getClientRects()[0])"
        )
