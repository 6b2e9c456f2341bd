"Streaming in processes of its own: killed and resumed, shared between processes."

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import finish, kill_and_resume, shares, start_command
from moe_nb.checkpoint import METADATA, load_compressed_model
from moe_nb.files import work_folder
from moe_nb.hf_names import Fp8Dequantize
from moe_nb.tiny import tiny_path

ROOT = Path(__file__).resolve().parent.parent
LOGS = tempfile.TemporaryDirectory()
LOG = Path(LOGS.name) / "log.txt"


def command(output, processes=1, name="compress", **options):
    "The command line of a small run"
    launch = []
    if processes > 1:
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launch += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    flags = dict(output_dir=output, **options)
    if name == "compress":
        flags = dict(model=tiny_path(), ratio=0.25, rounds=2, calibration="none") | flags
    words = [sys.executable, *launch, "-m", "moe_nb.cli", name]
    for flag, value in flags.items():
        words += [f"--{flag}", str(value)]
    return words


def environment():
    "Where the commands find the package, on one thread"
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def start(*args, **options):
    "Start a small run"
    return start_command(command(*args, **options), LOG, environment())


def run(*args, **options):
    "A small run from its beginning to its end"
    finish(start(*args, **options), LOG)


def contents(folder):
    "File -> bytes, of a whole directory"
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def weights(folder):
    "The same for its safetensors alone"
    files = contents(folder).items()
    return {name: data for name, data in files if name.endswith(".safetensors")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    output = tmp_path_factory.mktemp("reference") / "compressed"
    run(output)
    return contents(output)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_share_the_layers(reference, tmp_path, processes):
    run(tmp_path / "compressed", processes)
    assert contents(tmp_path / "compressed") == reference
    assert [path.name for path in tmp_path.iterdir()] == ["compressed"]


def test_the_adam_recipe_runs_from_the_command_line(tmp_path):
    run(tmp_path / "adam", method="adam", steps=2, layers=0)
    loaded = load_compressed_model(tmp_path / "adam")
    assert all(value.isfinite().all() for value in loaded.parameters())


@pytest.mark.slow
def test_processes_share_an_export(tmp_path):
    run(tmp_path / "compressed")
    run(tmp_path / "one", name="export", model=tmp_path / "compressed")
    run(tmp_path / "two", 2, name="export", model=tmp_path / "compressed")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_processes_share_the_layers_after_calibration(tmp_path):
    options = dict(calibration="embedded", calibration_tokens=4096, refine_steps=10)
    run(tmp_path / "one", **options)
    run(tmp_path / "two", 2, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def fp8_blocks(value, block=32):
    "A matrix in fp8 and the scale of each block"
    blocks = value.float().unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    values = (blocks / scales[:, None, :, None]).reshape(value.shape).to(torch.float8_e4m3fn)
    return values, scales


def fp8_twins():
    "The tensors of the embedded model in fp8, and those that they stand for in bf16"
    twins = {"bf16": load_file(tiny_path() / "model.safetensors")}
    twins["fp8"] = dict(twins["bf16"])
    for name, value in list(twins["bf16"].items()):
        if "_proj.weight" in name:
            values, scales = fp8_blocks(value)
            stored = {"weight": values, "weight_scale_inv": scales}
            read = Fp8Dequantize(None).convert(stored)["weight"]
            read = read[0] if isinstance(read, list) else read  # before 5.20
            twins["bf16"][name] = read.bfloat16()
            twins["fp8"] |= {name: values, f"{name}_scale_inv": scales}
    return twins


def test_fp8_is_read_as_what_it_stands_for(tmp_path):
    "A checkpoint in fp8 and the same one in bf16 give the same compressed model"
    for name, tensors in fp8_twins().items():
        shutil.copytree(tiny_path(), tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="fp8", weight_block_size=[32, 32])
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    for name in ("bf16", "fp8"):
        run(tmp_path / f"from-{name}", model=tmp_path / name, rounds=1)
    assert weights(tmp_path / "from-bf16") == weights(tmp_path / "from-fp8")
    loaded = load_compressed_model(tmp_path / "from-fp8")
    assert loaded.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16


def test_source_on_a_read_only_mount(reference, tmp_path):
    source = tmp_path / "mounted"
    source.mkdir()
    mount = f"mount --bind {tiny_path()} {source} && mount -o remount,ro,bind {source}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system does not let us mount")
    compress = shlex.join(command(tmp_path / "compressed", model=source))
    script = f"{mount} && ! touch {source}/new && {compress}"
    inside = ["unshare", "-rm", "sh", "-c", script]
    subprocess.run(inside, check=True, capture_output=True, env=environment())
    expected = {name: data for name, data in reference.items() if name.endswith(".safetensors")}
    assert weights(tmp_path / "compressed") == expected


def test_output_on_another_file_system(reference, tmp_path):
    "Nothing goes through the temporary directory: the work lies beside the output"
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    with tempfile.TemporaryDirectory(dir=other) as folder:
        folder = Path(folder)
        run(folder / "compressed")
        assert contents(folder / "compressed") == reference
        run(folder / "exported", name="export", model=folder / "compressed")
        assert sorted(path.name for path in folder.iterdir()) == ["compressed", "exported"]


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
    output, timed = tmp_path / "compressed", tmp_path / "timed"
    begun = time.time()
    run(timed, **options)
    seconds = time.time() - begun
    reference = contents(timed)
    pieces_done = []

    def count_pieces():
        pieces_done.append(len(list((work_folder(output) / "journal").glob("*.json"))))

    def start_over():
        assert contents(output) == reference
        shutil.rmtree(output)

    beginnings = kill_and_resume(
        lambda: start(output, **options),
        log=LOG,
        delay=shares(seconds, 0.5, 1),
        is_done=(output / METADATA).is_file,
        start_over=start_over,
        after_kill=count_pieces,
    )
    assert contents(output) == reference
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compressed", "timed"]
    print(f"{len(pieces_done)} kills with {pieces_done} pieces done, {beginnings} new beginnings")
