"Streaming in processes of its own: killed and resumed, shared between processes."
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_nb.checkpoint import METADATA
from moe_nb.shards import work_folder
from moe_nb.tiny import tiny_path

ROOT = Path(__file__).resolve().parent.parent


def command(output, processes=1, name="compress", **options):
    "The command line of a small run"
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"] if processes > 1 else []
    defaults = dict(model=tiny_path(), ratio=.25, rounds=2, calibration="none") if name == "compress" else {}
    flags = {**defaults, "output_dir": output, **options}
    return [sys.executable, *launch, "-m", "moe_nb.cli", name, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


def start(*args, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.Popen(command(*args, **options), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(*args, **options):
    process = start(*args, **options)
    text = process.communicate(timeout=600)[0]
    assert process.returncode == 0, text[-3000:]
    return text


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    output = tmp_path_factory.mktemp("reference") / "compressed"
    finish(output)
    return contents(output)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_share_the_layers(reference, tmp_path, processes):
    finish(tmp_path / "compressed", processes)
    assert contents(tmp_path / "compressed") == reference
    assert [path.name for path in tmp_path.iterdir()] == ["compressed"]


@pytest.mark.slow
def test_processes_share_an_export(tmp_path):
    finish(tmp_path / "compressed")
    finish(tmp_path / "one", name="export", model=tmp_path / "compressed")
    finish(tmp_path / "two", 2, name="export", model=tmp_path / "compressed")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_processes_share_the_layers_after_calibration(tmp_path):
    options = dict(calibration="embedded", calibration_tokens=4096, refine_steps=10)
    finish(tmp_path / "one", **options)
    finish(tmp_path / "two", 2, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_kill_at_any_moment_and_resume(tmp_path):
    "20 runs killed at random, each going on where the one before was killed, give the bytes of an undisturbed run"
    output, draw, kills, begins, layers = tmp_path / "compressed", random.Random(0), 0, 0, []
    begun = time.time()
    finish(tmp_path / "timed", rounds=16)
    seconds, reference = time.time() - begun, contents(tmp_path / "timed")
    while kills < 20:
        if (output / METADATA).is_file():  # complete before the last kill: from the start again
            assert contents(output) == reference
            shutil.rmtree(output)
            begins += 1
        process = start(output, rounds=16)
        try: text, _ = process.communicate(timeout=draw.uniform(.5, 1) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            layers.append(len(list((work_folder(output) / "journal").glob("*.json"))))
        else: assert process.returncode == 0, text[-3000:]
    finish(output, rounds=16)
    assert contents(output) == reference and sorted(path.name for path in tmp_path.iterdir()) == ["compressed", "timed"]
    print(f"{kills} kills with {layers} layers done, {begins} new beginnings")
