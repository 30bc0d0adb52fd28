"A real headless browser, driven through its own DevTools protocol over two pipes; nothing to install but Chromium."

import base64
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"]  # fmt: skip


class Page:
    "One tab."

    def __init__(self, sending, receiving):
        self.sending, self.receiving, self.number, self.session, self.heard = sending, receiving, 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for room in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{room}.enable")

    def call(self, method: str, **params) -> dict:
        "A command of the protocol, and its result; events that come meanwhile are kept in `heard`."
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.sending.write(json.dumps(message).encode() + b"\0")
        self.sending.flush()
        while (found := self.read()).get("id") != self.number:
            self.heard.append(found)
        assert "error" not in found, found["error"]
        return found["result"]

    def read(self) -> dict:
        raw = bytearray()
        while (byte := self.receiving.read(1)) != b"\0":
            assert byte, "the browser is gone"
            raw += byte
        return json.loads(raw)

    def run(self, script: str):
        "The value of an expression in the page."
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str, patience: float = 20):
        "The value of an expression, once it is true."
        deadline = time.monotonic() + patience
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, script
            time.sleep(0.05)
        return value

    def open(self, url: str, width: int = 1100, height: int = 800, phone: bool = False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Page.navigate", url=url)
        self.until(f"document.readyState == 'complete' && location.href.startsWith({json.dumps(url)})")

    def type(self, text: str):
        "Type into what has the focus, and press Enter."
        self.call("Input.insertText", text=text)
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **enter)

    def picture(self, path: Path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(profile: Path):
    "A tab of a browser that is there for as long as it is needed."
    (ours, theirs), (back, out) = os.pipe(), os.pipe()
    script = f'exec "$0" "$@" 3<&{ours} 4>&{out}'
    command = ["bash", "-c", script, CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(command, pass_fds=(ours, out), stderr=subprocess.DEVNULL, start_new_session=True)
    os.close(ours)
    os.close(out)
    with open(theirs, "wb") as sending, open(back, "rb") as receiving:
        try:
            yield Page(sending, receiving)
            sending.write(b'{"id":0,"method":"Browser.close"}\0')
            sending.flush()
            process.wait(timeout=20)
        finally:
            process.kill()
            process.wait()
