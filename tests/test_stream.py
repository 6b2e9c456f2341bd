"Streaming in processes of its own: killed and resumed, shared between processes."

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from moe_nb.hf_names import Fp8Dequantize

from moe_nb.checkpoint import METADATA, load_compressed_model
from moe_nb.files import work_folder
from moe_nb.tiny import tiny_path

ROOT = Path(__file__).resolve().parent.parent


def command(output, processes=1, name="compress", **options):
    "The command line of a small run"
    launch = (
        [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0",
        ]
        if processes > 1
        else []
    )
    defaults = (
        dict(model=tiny_path(), ratio=0.25, rounds=2, calibration="none")
        if name == "compress"
        else {}
    )
    flags = {**defaults, "output_dir": output, **options}
    return [
        sys.executable,
        *launch,
        "-m",
        "moe_nb.cli",
        name,
        *(part for name, value in flags.items() for part in (f"--{name}", str(value))),
    ]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def start(*args, **options):
    return subprocess.Popen(
        command(*args, **options),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(*args, **options):
    process = start(*args, **options)
    text = process.communicate(timeout=600)[0]
    assert process.returncode == 0, text[-3000:]
    return text


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


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


def fp8_blocks(value, block=32):
    "A matrix in fp8 and the scale of each block"
    blocks = value.float().unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    return (blocks / scales[:, None, :, None]).reshape(value.shape).to(torch.float8_e4m3fn), scales


def test_fp8_is_read_as_what_it_stands_for(tmp_path):
    "A checkpoint in fp8 and the same one in bf16 give the same compressed model"
    plain = load_file(tiny_path() / "model.safetensors")
    scaled = {name: fp8_blocks(value) for name, value in plain.items() if "_proj.weight" in name}
    read = {
        name: Fp8Dequantize(None)
        .convert({"weight": values, "weight_scale_inv": scales})["weight"]
        .bfloat16()
        for name, (values, scales) in scaled.items()
    }
    sources = {
        "bf16": plain | read,
        "fp8": plain
        | {name: values for name, (values, _) in scaled.items()}
        | {f"{name}_scale_inv": scales for name, (_, scales) in scaled.items()},
    }
    for name, tensors in sources.items():
        shutil.copytree(tiny_path(), tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    (tmp_path / "fp8" / "config.json").write_text(
        json.dumps(
            dict(config, quantization_config=dict(quant_method="fp8", weight_block_size=[32, 32]))
        )
    )
    for name in sources:
        finish(tmp_path / f"from-{name}", model=tmp_path / name, rounds=1)
    weights = [
        {
            name: data
            for name, data in contents(tmp_path / f"from-{source}").items()
            if name.endswith(".safetensors")
        }
        for source in sources
    ]
    assert weights[0] == weights[1]
    assert (
        load_compressed_model(tmp_path / "from-fp8").model.layers[0].self_attn.q_proj.weight.dtype
        == torch.bfloat16
    )


def test_source_on_a_read_only_mount(reference, tmp_path):
    source = tmp_path / "mounted"
    source.mkdir()
    mount = f"mount --bind {tiny_path()} {source} && mount -o remount,ro,bind {source}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system does not let us mount")
    run = shlex.join(command(tmp_path / "compressed", model=source))
    subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && ! touch {source}/new && {run}"],
        check=True,
        capture_output=True,
        env=environment(),
    )
    assert {
        name: data
        for name, data in contents(tmp_path / "compressed").items()
        if name.endswith(".safetensors")
    } == {name: data for name, data in reference.items() if name.endswith(".safetensors")}


def test_output_on_another_file_system(reference, tmp_path):
    "Nothing goes through the temporary directory: the work lies beside the output"
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=other) as folder:
        finish(Path(folder) / "compressed")
        assert contents(Path(folder) / "compressed") == reference
        finish(Path(folder) / "exported", name="export", model=Path(folder) / "compressed")
        assert sorted(path.name for path in Path(folder).iterdir()) == ["compressed", "exported"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(rounds=16),
        dict(rounds=6, calibration="embedded", calibration_tokens=4096, refine_steps=10),
    ],
)
def test_kill_at_any_moment_and_resume(tmp_path, options):
    "20 runs killed at random, each going on where the one before was killed, give the bytes of an undisturbed run"
    output, draw, kills, begins, layers = tmp_path / "compressed", random.Random(0), 0, 0, []
    begun = time.time()
    finish(tmp_path / "timed", **options)
    seconds, reference = time.time() - begun, contents(tmp_path / "timed")
    while kills < 20:
        if (output / METADATA).is_file():  # complete before the last kill: from the start again
            assert contents(output) == reference
            shutil.rmtree(output)
            begins += 1
        process = start(output, **options)
        try:
            text, _ = process.communicate(timeout=draw.uniform(0.5, 1) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            layers.append(len(list((work_folder(output) / "journal").glob("*.json"))))
        else:
            assert process.returncode == 0, text[-3000:]
    finish(output, **options)
    assert contents(output) == reference and sorted(path.name for path in tmp_path.iterdir()) == [
        "compressed",
        "timed",
    ]
    print(f"{kills} kills with {layers} layers done, {begins} new beginnings")
