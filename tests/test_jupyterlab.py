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
from test_repository import NOTEBOOKS, ROOT, name, script

skipped = script("refresh").skipped
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


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
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **environment}
        )
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
        port, token = free.getsockname()[1], uuid.uuid4().hex
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        f"--ServerApp.root_dir={root}",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}",
    ]

    def address(path):
        return f"http://127.0.0.1:{port}{path}?token={token}"

    with started(
        command,
        folder,
        "lab",
        PYTHONPATH=str(ROOT),
        JUPYTER_CONFIG_DIR=str(folder / "config"),
        PYTHONWARNINGS="ignore:IProgress not found",
    ) as process:

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
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        channel = websocket.create_connection(
            next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page"),
            suppress_origin=True,
            timeout=60,
        )

        def send(method, **params):
            channel.send(json.dumps(dict(id=1, method=method, params=params)))
            while (reply := json.loads(channel.recv())).get("id") != 1:
                pass
            assert "error" not in reply, reply
            return reply["result"]

        yield send
        channel.close()


def value_of(send, expression):
    "What a JavaScript expression is in the page"
    result = send("Runtime.evaluate", expression=expression, returnByValue=True)
    assert "exceptionDetails" not in result, result
    return result["result"].get("value")


def click(send, selector, seconds=60):
    "Press and release the mouse on an element, once it is there"
    box = f"(e => e && (b => b.width && [b.x + b.width / 2, b.y + b.height / 2])(e.getBoundingClientRect()))(document.querySelector({json.dumps(selector)}))"
    x, y = wait_for(lambda: value_of(send, box), seconds, selector)
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        send(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button="none" if kind == "mouseMoved" else "left",
            clickCount=1,
        )


def choose(send, menu, command):
    "An item of the menu bar"
    click(
        send,
        f"#jp-MainMenu .lm-MenuBar-item:nth-child({('File', 'Edit', 'View', 'Run').index(menu) + 1})",
    )
    click(send, f".lm-Menu-item[data-command='{command}']")


def without_flagged(path, copy):
    "The notebook without its outputs and the cells that need hours, a GPU or a terminal"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [
        cell
        for cell in notebook.cells
        if cell.cell_type != "code" or not skipped(cell, {"slow", "cuda"})
    ]
    for cell in code_cells(notebook):
        cell.update(outputs=[], execution_count=None)
    nbformat.write(notebook, copy)


def code_cells(notebook):
    return [
        cell
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and "".join(cell["source"]).strip()
    ]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_runs_in_jupyterlab(notebook, tmp_path):
    "Opened by a browser and run whole from the menu: the last cell ends, none with an error, and the saved file has every output"
    root = tmp_path / "checkout"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", ".venv", "runs"))
    path = root / name(notebook)
    without_flagged(notebook, path)
    with (
        lab(root, tmp_path) as address,
        page(address("/lab/tree/" + name(notebook)), tmp_path) as send,
    ):
        wait_for(
            lambda: any(
                s["kernel"]["connections"] and s["kernel"]["execution_state"] == "idle"
                for s in json.load(urllib.request.urlopen(address("/api/sessions")))
            ),
            120,
            "the kernel",
        )
        choose(send, "Run", "runmenu:run-all")
        last = (
            "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].at(-1)?.innerText || ''"
        )
        failed = "document.querySelector('[data-mime-type=\"application/vnd.jupyter.error\"]')?.innerText"
        wait_for(
            lambda: re.match(r"\[\d+\]", value_of(send, last)) or value_of(send, failed),
            900,
            "the last cell",
        )
        assert not value_of(send, failed)
        (tmp_path / "screenshot.png").write_bytes(
            base64.b64decode(send("Page.captureScreenshot")["data"])
        )
        choose(send, "File", "docmanager:save")
        cells = wait_for(
            lambda: (
                (cells := code_cells(json.loads(path.read_text())))
                and cells[-1]["execution_count"]
                and cells
            ),
            60,
            "the saved notebook",
        )
    assert all(cell["execution_count"] for cell in cells)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [
        output
        for output in outputs
        if output["output_type"] == "stream" and "Warning" in "".join(output["text"])
    ]
    if notebook.stem == "quickstart":
        shown = [output["data"] for output in outputs if "data" in output]
        assert any("image/png" in data for data in shown) and any(
            "held-out perplexity" in "".join(data["text/plain"]) for data in shown
        )
