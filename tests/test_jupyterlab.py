"The notebooks as people open them: in JupyterLab, by a browser. `-k quickstart` runs the first one alone."

import base64
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid

import nbformat
import pytest
import websocket  # comes with jupyter_server
from nbdev.config import get_config
from test_repository import NOTEBOOKS, ROOT, name, script

skipped = script("refresh").skipped
FLAGS = frozenset(get_config().tst_flags.split())
BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, BROWSERS), None)


def wait_for(condition, seconds, what):
    "The first truthy value of `condition()`"
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} seconds"
        time.sleep(0.5)
    return value


@contextlib.contextmanager
def started(command, folder, name, **environment):
    "A process that is stopped at the end; its output in a file of `folder`"
    environment = {**os.environ, **environment}
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


@contextlib.contextmanager
def lab(root, folder):
    "JupyterLab on a free port, without a browser; yields a function that gives the address of a path"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = uuid.uuid4().hex
    command = [
        *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"),
        f"--ServerApp.root_dir={root}",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
    ]

    tracker = folder / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')  # else cells out of sight are not in the page
    environment = dict(
        PYTHONPATH=str(ROOT),
        JUPYTER_CONFIG_DIR=str(folder / "config"),
        JUPYTERLAB_SETTINGS_DIR=str(folder / "settings"),
        PYTHONWARNINGS="ignore:IProgress not found",
    )

    def address(path):
        return f"http://127.0.0.1:{port}{path}?token={token}"

    with started(command, folder, "lab", **environment) as process:

        def answers():
            assert process.poll() is None, (folder / "lab.log").read_text()
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(address("/api"), timeout=5)

        wait_for(answers, 60, "JupyterLab")
        yield address


@contextlib.contextmanager
def page(address, folder):
    "Headless Chromium at an address; yields a function that sends one command of its DevTools protocol"
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1400,1600",
        address,
    ]
    with started(command, folder, "chromium"):
        port_file = folder / "profile/DevToolsActivePort"
        wait_for(lambda: port_file.exists() and port_file.read_text(), 60, "Chromium")
        port = port_file.read_text().split()[0]
        targets = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        tab = next(target for target in targets if target["type"] == "page")
        channel = websocket.create_connection(
            tab["webSocketDebuggerUrl"], suppress_origin=True, timeout=60
        )

        def send(method, **params):
            channel.send(json.dumps(dict(id=1, method=method, params=params)))
            reply = json.loads(channel.recv())
            while reply.get("id") != 1:  # an event
                reply = json.loads(channel.recv())
            assert "error" not in reply, reply
            return reply["result"]

        yield send
        channel.close()


def value_of(send, expression):
    "What a JavaScript expression is in the page"
    result = send("Runtime.evaluate", expression=expression, returnByValue=True)
    assert "exceptionDetails" not in result, result
    return result["result"].get("value")


MIDDLE = """(element => {
    if (!element) return null;
    const box = element.getBoundingClientRect();
    return box.width && [box.x + box.width / 2, box.y + box.height / 2];
})(document.querySelector(SELECTOR))"""


def click(send, selector, seconds=60):
    "Press and release the mouse on an element, once it is there"
    middle = MIDDLE.replace("SELECTOR", json.dumps(selector))
    x, y = wait_for(lambda: value_of(send, middle), seconds, selector)
    mouse = dict(x=x, y=y, clickCount=1)
    send("Input.dispatchMouseEvent", type="mouseMoved", button="none", **mouse)
    send("Input.dispatchMouseEvent", type="mousePressed", button="left", **mouse)
    send("Input.dispatchMouseEvent", type="mouseReleased", button="left", **mouse)


MENUS = ("File", "Edit", "View", "Run")


def choose(send, menu, command):
    "An item of the menu bar"
    place = MENUS.index(menu) + 1
    click(send, f"#jp-MainMenu .lm-MenuBar-item:nth-child({place})")
    click(send, f".lm-Menu-item[data-command='{command}']")


def code_cells(notebook):
    "Its cells of code that are not empty"
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [cell for cell in cells if "".join(cell["source"]).strip()]


def without_flagged(path, copy):
    "The notebook without its outputs and the cells that need hours, a GPU, vLLM or Triton's interpreter"
    flags = FLAGS - {"slow"} if path.stem == "quickstart" else FLAGS  # there it is a minute
    notebook = nbformat.read(path, as_version=4)
    kept = []
    for cell in notebook.cells:
        if cell.cell_type != "code" or not skipped(cell, flags):
            kept.append(cell)
    notebook.cells = kept
    for cell in code_cells(notebook):
        cell.update(outputs=[], execution_count=None)
    nbformat.write(notebook, copy)


def kernel_is_idle(sessions):
    "Whether JupyterLab is connected to a kernel that waits"
    for session in sessions:
        kernel = session["kernel"]
        if kernel["connections"] and kernel["execution_state"] == "idle":
            return True
    return False


LAST = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].at(-1)?.innerText || ''"
FAILED = "document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')?.innerText"


def run_all(send, address):
    "Run all cells from the menu, and wait for the last one"
    sessions = address("/api/sessions")
    wait_for(lambda: kernel_is_idle(json.load(urllib.request.urlopen(sessions))), 120, "the kernel")
    choose(send, "Run", "runmenu:run-all")
    wait_for(
        lambda: re.match(r"\[\d+\]", value_of(send, LAST)) or value_of(send, FAILED),
        900,
        "the last cell",
    )
    assert not value_of(send, FAILED)


def saved_cells(send, path):
    "Save the notebook from the menu; its code cells as the file has them"
    choose(send, "File", "docmanager:save")

    def complete():
        cells = code_cells(json.loads(path.read_text()))
        return cells and cells[-1]["execution_count"] and cells

    return wait_for(complete, 60, "the saved notebook")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_runs_in_jupyterlab(notebook, tmp_path):
    "Run whole from the menu: the last cell ends, none with an error, and the saved file has every output"
    root = tmp_path / "checkout"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", ".venv", "runs"))
    path = root / name(notebook)
    without_flagged(notebook, path)
    with (
        lab(root, tmp_path) as address,
        page(address("/lab/tree/" + name(notebook)), tmp_path) as send,
    ):
        run_all(send, address)
        screenshot = send("Page.captureScreenshot")["data"]
        (tmp_path / "screenshot.png").write_bytes(base64.b64decode(screenshot))
        cells = saved_cells(send, path)
    assert all(cell["execution_count"] for cell in cells)
    shown = []
    for output in (output for cell in cells for output in cell["outputs"]):
        assert output["output_type"] != "error"
        if output["output_type"] == "stream":
            assert "Warning" not in "".join(output["text"])
        shown.append(output.get("data", {}))
    if notebook.stem == "quickstart":
        texts = ["".join(data.get("text/plain", "")) for data in shown]
        assert any("image/png" in data for data in shown)
        assert any("held-out perplexity" in text for text in texts)
