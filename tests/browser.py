"""A result's page in a real browser, beside the suite: `python tests/browser.py [--page FILE] [--shots DIR]`.

Chromium without a window, from Debian's packages, is driven by its DevTools protocol through a pipe. It opens the page
of a toy (made here in few iterations, or `--page`) from `file://` at the size of a desktop, light, and of a phone,
dark. Mouse, finger and keys turn the object; each screenshot must differ from the one before, and after a whole turn be
the first one again. Nothing may be asked of the network, nothing may be thrown or logged. Exit code 1 where any of that
fails.

Without Chromium it is installed (root and apt only). Where that cannot be, one line says why, and the exit code is 0
only with `--if-possible`.
"""
from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageChops, ImageStat

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"desktop": (1280, 900, "light", False), "phone": (390, 844, "dark", True)}
SECONDS = 120  # that any answer may take


def find_chromium() -> str | None:
    """The browser's path; it is installed where it is missing and that is possible."""
    found = shutil.which("chromium")
    if found is None and shutil.which("apt-get") and os.geteuid() == 0:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["apt-get", "update"], **quiet)
        subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", "chromium"], **quiet)
        found = shutil.which("chromium")
    return found


class Browser:
    """Chromium with one tab, and what it said."""

    def __init__(self, path: str, profile: str):
        # Commands go to its file descriptor 3, answers come from 4; each message ends in a zero byte.
        to_browser, self.commands = os.pipe()
        self.answers, from_browser = os.pipe()
        command = [path, "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--use-angle=swiftshader",
                   "--enable-unsafe-swiftshader", "--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"]
        redirect = f"exec \"$@\" 3<&{to_browser} 4>&{from_browser}"
        self.process = subprocess.Popen(["bash", "-c", redirect, "bash", *command], pass_fds=(to_browser, from_browser),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.buffer = b""
        self.count = 0
        self.session = None
        self.events = []

        # The tab.
        tab = next(x for x in self.call("Target.getTargets")["targetInfos"] if x["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=tab["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        """Send a command and wait for its answer; events that come before it are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def read(self) -> dict:
        """The next message."""
        while b"\0" not in self.buffer:
            more = os.read(self.answers, 2**20)
            if not more:
                raise RuntimeError("Chromium has ended")
            self.buffer += more
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def run(self, script: str):
        """What an expression in the page is, awaited."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def open(self, page: Path, width: int, height: int, colors: str, touch: bool) -> None:
        """Show a page at a size, in dark or light colors, standing still."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if touch else 1,
                  mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": colors},
                                                          {"name": "prefers-reduced-motion", "value": "reduce"}])
        self.call("Page.navigate", url=page.resolve().as_uri())
        began = time.monotonic()
        while not self.run("!!document.querySelector('canvas[aria-valuenow]')"):
            if time.monotonic() - began > SECONDS:
                raise RuntimeError("the page does not become ready")
            time.sleep(0.2)

    def shot(self, element: str | None = None) -> Image.Image:
        """What is to be seen of the whole page, or of an element."""
        # Two frames later, what was drawn last has arrived.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        area = {}
        if element:
            box = self.run(f"(({{x, y, width, height}}) => [x + scrollX, y + scrollY, width, height])"
                           f"(document.querySelector('{element}').getBoundingClientRect())")
            area = {"clip": dict(zip(("x", "y", "width", "height"), box), scale=1)}
        png = self.call("Page.captureScreenshot", captureBeyondViewport=True, **area)["data"]
        return Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")

    def middle(self, element: str) -> tuple[float, float]:
        """Where in the window an element's middle is."""
        return tuple(self.run(f"document.querySelector('{element}').scrollIntoView({{block: 'center'}}), "
                              f"(({{x, y, width, height}}) => [x + width / 2, y + height / 2])"
                              f"(document.querySelector('{element}').getBoundingClientRect())"))

    def drag(self, element: str, dx: float, dy: float, touch: bool) -> None:
        """Move the mouse or a finger over an element, from its middle."""
        x, y = self.middle(element)
        places = [(x + dx * i / 4, y + dy * i / 4) for i in range(5)]
        if touch:
            kinds = ["touchStart", *["touchMove"] * 4]
            for kind, (x, y) in zip(kinds, places):
                self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            return
        kinds = ["mousePressed", *["mouseMoved"] * 4]
        for kind, (x, y) in zip(kinds, places):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    def press(self, element: str, key: str, times: int = 1) -> None:
        """Press a key on an element."""
        self.run(f"document.querySelector('{element}').focus()")
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two pictures' pixels, of 255."""
    return sum(ImageStat.Stat(ImageChops.difference(a, b)).mean) / 3


def check(browser: Browser, page: Path, name: str, shots: Path) -> list[str]:
    """Use a page at one size: what is wrong with it."""
    width, height, colors, touch = SIZES[name]
    wrong = []
    browser.events.clear()
    browser.open(page, width, height, colors, touch)
    browser.shot().save(shots / f"{name}.png")
    frames = browser.run("turntable.frames")
    overflow = browser.run("document.documentElement.scrollWidth - innerWidth")
    if overflow > 0:
        wrong.append(f"the page is {overflow} pixels wider than the window")

    # What turns it, one after the other, and then a whole turn.
    for canvas in ("#picture", "#mesh"):
        actions = {
            "a drag aside": lambda: browser.drag(canvas, 90, 0, touch),
            "a drag down": lambda: browser.drag(canvas, 0, 80, touch),
            "the key right": lambda: browser.press(canvas, "ArrowRight", 2),
            "the key down": lambda: browser.press(canvas, "ArrowDown", 2),
        }
        seen = [browser.shot(canvas)]
        for what, action in actions.items():
            action()
            seen.append(browser.shot(canvas))
            seen[-1].save(shots / f"{name}{canvas.replace('#', '_')}_{len(seen)}.png")
            if difference(seen[-1], seen[-2]) < 1:
                wrong.append(f"{what} does not turn {canvas}")
        browser.press(canvas, "ArrowRight", frames)
        if difference(browser.shot(canvas), seen[-1]) > 0.2:
            wrong.append(f"{canvas} is another one after a whole turn")

    # Each choice shows something else.
    for element, canvas in (("#layers label:nth-child(2)", "#picture"), ("#paints label:nth-child(2)", "#mesh"),
                            ("#cameras", "#mesh"), ("#inputs button", "#mesh"),
                            ("#methods label:nth-child(2)", "#targets"), ("#targets input", "#targets"),
                            ("#spin", "#mesh")):
        before = browser.shot(canvas)
        x, y = browser.middle(element)
        for kind in ("mousePressed", "mouseReleased"):
            browser.call("Input.dispatchMouseEvent", type=kind, x=x + 9, y=y, button="left", clickCount=1)
        time.sleep(0.3)
        after = browser.shot(canvas)
        after.save(shots / f"{name}_{element.split()[0][1:]}.png")
        if difference(before, after) < 0.05:
            wrong.append(f"{element} changes nothing in {canvas}")

    # Everything has words, and nothing was fetched, thrown or logged.
    wordless = browser.run("[...document.querySelectorAll('img, canvas, svg, input')].filter(x => "
                           "!(x.alt || x.ariaLabel || x.labels?.length)).length")
    if wordless:
        wrong.append(f"{wordless} elements have no words for those who do not see them")
    for event in browser.events:
        url = event["params"].get("request", {}).get("url", "")
        fetched = event["method"] == "Network.requestWillBeSent" and not url.startswith(("file:", "data:"))
        if fetched or event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            wrong.append(f"{event['method']}: {json.dumps(event['params'])[:300]}")
    return wrong


def make_page(folder: Path) -> Path:
    """The page of a toy after few iterations."""
    subprocess.run([sys.executable, ROOT / "distill.py", "--out", folder, "--iterations", "40", "--targets", "2",
                    "--set", "viewpoints=8", "sample_steps=5", "turntable_frames=12"], check=True, cwd=ROOT)
    return folder / "index.html"


def main() -> None:
    """Entry point."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--page", type=Path, help="an index.html instead of a new one")
    p.add_argument("--shots", type=Path, help="folder for the screenshots")
    p.add_argument("--if-possible", action="store_true", help="exit with 0 where there is no Chromium")
    args = p.parse_args()
    path = find_chromium()
    if path is None:
        print("tests/browser.py: no Chromium, and it could not be installed (it takes root, apt-get and a network)")
        sys.exit(0 if args.if_possible else 1)

    # One browser, several sizes.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = args.page or make_page(Path(folder) / "toy")
        shots = args.shots or Path(folder)
        shots.mkdir(parents=True, exist_ok=True)
        browser = Browser(path, f"{folder}/profile")
        wrong = {name: check(browser, page, name, shots) for name in SIZES}
        browser.call("Browser.close")
        browser.process.wait()
        for name, lines in wrong.items():
            print(f"{name}: {'; '.join(lines) or 'well'}")
        print(f"{page.stat().st_size / 1e6:.1f} MB")
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
