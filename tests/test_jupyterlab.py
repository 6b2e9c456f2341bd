"The first notebook that people open, opened and run as they do: by the server of JupyterLab and a kernel that it starts."
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import pytest
import websocket  # comes with jupyter_server

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def lab(folder):
    "JupyterLab on a free port, without a browser; yields a function that asks its server"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, token = free.getsockname()[1], uuid.uuid4().hex
    log = open(folder / "lab.log", "wb")
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={folder}", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def ask(address, **body):
        request = urllib.request.Request(f"http://127.0.0.1:{port}{address}", json.dumps(body).encode() if body else None, {"Authorization": f"token {token}"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.read().decode()

    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                ask("/api/status")
                break
            assert process.poll() is None, (folder / "lab.log").read_text()
            time.sleep(.5)
        yield ask, f"ws://127.0.0.1:{port}", [f"Authorization: token {token}"]
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def execute(channel, session, source):
    "Run one cell; what it showed"
    header = dict(msg_id=uuid.uuid4().hex, session=session, username="", msg_type="execute_request", version="5.3")
    channel.send(json.dumps(dict(header=header, parent_header={}, metadata={}, channel="shell", content=dict(code=source, silent=False, store_history=True, allow_stdin=False, stop_on_error=True))))
    outputs = []
    while True:
        message = json.loads(channel.recv())
        if message["parent_header"].get("msg_id") != header["msg_id"]:
            continue
        if message["msg_type"] in ("execute_result", "display_data", "stream"):
            outputs.append(message["content"])
        assert message["msg_type"] != "error", f"{source}\n{message['content']['ename']}: {message['content']['evalue']}"
        if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            return outputs


@pytest.mark.slow
def test_quickstart_runs_in_jupyterlab(tmp_path):
    "JupyterLab serves its page and the notebook; every cell runs in the kernel of its session, the figure comes last"
    shutil.copy(ROOT / "nbs/tutorials/quickstart.ipynb", tmp_path)
    with lab(tmp_path) as (ask, address, header):
        assert "<title>JupyterLab</title>" in ask("/lab/tree/quickstart.ipynb")
        cells = json.loads(ask("/api/contents/quickstart.ipynb"))["content"]["cells"]
        kernel = json.loads(ask("/api/sessions", name="quickstart", path="quickstart.ipynb", type="notebook", kernel=dict(name="python3")))["kernel"]["id"]
        session = uuid.uuid4().hex
        channel = websocket.create_connection(f"{address}/api/kernels/{kernel}/channels?session_id={session}", header=header, timeout=900)
        shown = [execute(channel, session, "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]
        channel.close()
    assert any("image/png" in output.get("data", {}) for outputs in shown for output in outputs)
    assert any("held-out perplexity" in output.get("data", {}).get("text/plain", "") for outputs in shown for output in outputs)
