"Distillation in processes of its own: killed and resumed, two instead of one, sharded."

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from moe_nb.layer import CompressionConfig
from moe_nb.compress import compress_model
from moe_nb.checkpoint import load_compressed_model, save_compressed_model, verify_directory
from moe_nb.distill import DistillationConfig, distill
from moe_nb.stream import STATE
from moe_nb.resume import checkpoints, newest_checkpoint, stored_model
from moe_nb.tiny import load_tiny, tiny_path

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = tmp_path_factory.mktemp("student") / "student"
    model, tokenizer = load_tiny()
    return save_compressed_model(
        compress_model(model, CompressionConfig(ratio=0.25, rounds=1, align_width=0))[0],
        path,
        tokenizer,
    )


def settings(student, output, **changes):
    "A short run as keywords of `DistillationConfig`"
    return dict(
        dict(
            teacher_model=str(tiny_path()),
            student_model_path=str(student),
            output_dir=str(output),
            block_steps=5,
            block_tokens=4096,
            max_length=64,
            max_tokens=32768,
            max_steps=6,
            save_steps=3,
            logging_steps=1,
            training_args="{use_cpu: true, disable_tqdm: true}",
        ),
        **changes,
    )


def weights(path):
    return {name: value for name, value in stored_model(path).state_dict().items() if value.numel()}


def history(path):
    return [line for line in json.loads((path / STATE).read_text())["log_history"] if "kl" in line]


# Killed


def child(options):
    os.setsid()
    with open(Path(options["output_dir"]).parent / "log.txt", "a") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        distill(DistillationConfig(**options))


def start(options):
    process = multiprocessing.get_context("fork").Process(target=child, args=(options,))
    process.start()
    return process


def finish(options):
    process = start(options)
    process.join(600)
    assert process.exitcode == 0, (Path(options["output_dir"]).parent / "log.txt").read_text()[
        -3000:
    ]


@pytest.mark.slow
def test_kill_at_any_moment_and_resume(student, tmp_path):
    "After each of 20 kills every checkpoint loads, and the run ends with the weights of the one that was not killed"
    run = dict(per_device_train_batch_size=2, max_steps=80, save_steps=2, save_total_limit=2)
    reference, output = settings(student, tmp_path / "reference", **run), tmp_path / "killed"
    begun = time.time()
    finish(reference)
    seconds, draw, kills, seen, begins = time.time() - begun, random.Random(0), 0, set(), 0
    while kills < 20:
        if (output / "final").exists():  # finished before the last kill: from the start again
            assert all(
                torch.equal(value, weights(output / "final")[name])
                for name, value in weights(Path(reference["output_dir"]) / "final").items()
            )
            shutil.rmtree(output)
            begins += 1
        process = start(settings(student, output, **run))
        process.join(draw.uniform(0.05, 0.9) * seconds)
        if not process.is_alive():
            assert process.exitcode == 0, (tmp_path / "log.txt").read_text()[-3000:]
            continue
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        found = checkpoints(output)
        for path in found:
            assert verify_directory(path) and json.loads((path / STATE).read_text())[
                "global_step"
            ] == int(path.name.split("-")[1])
            load_compressed_model(path, device_map={"": "cpu"})
        assert newest_checkpoint(output) == (found[-1] if found else None)
        seen.add(found[-1].name if found else None)
        for path in (output / "eval_queue").glob("step-*"):
            verify_directory(path)
    finish(settings(student, output, **run))
    assert len(seen) > 5, f"the kills all fell on {seen}"
    ended = weights(output / "final")
    assert all(
        torch.equal(value, ended[name])
        for name, value in weights(Path(reference["output_dir"]) / "final").items()
    )
    assert (
        not list(output.glob(".*"))
        and (output / "eval_queue" / "TRAINING_DONE").is_file()
        and len(list((output / "eval_queue").glob("step-*"))) == 40
    )
    print(f"{kills} kills, at {sorted(map(str, seen))}, {begins} new beginnings")


# Two processes

# accelerate refuses to shard on the CPU; told that the two processes are devices, it does
SCRIPT = """
import json, os, sys
from accelerate.state import DistributedType, PartialState
if "ACCELERATE_USE_FSDP" in os.environ:
    init = PartialState.__init__
    def patched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU: self.distributed_type = DistributedType.MULTI_GPU
    PartialState.__init__ = patched
from moe_nb.distill import DistillationConfig, distill
distill(DistillationConfig(**json.loads(sys.argv[1])))
if "ACCELERATE_USE_FSDP" in os.environ:
    from accelerate.state import AcceleratorState
    assert AcceleratorState().distributed_type == DistributedType.FSDP and AcceleratorState().fsdp_plugin.fsdp_version == 2
"""


def fsdp2():
    "What `accelerate launch` makes of the example configuration"
    values = yaml.safe_load((ROOT / "nbs" / "experiments" / "accelerate_fsdp2.yaml").read_text())[
        "fsdp_config"
    ]
    return dict(
        ACCELERATE_USE_FSDP="true",
        **{
            name.upper(): str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in values.items()
        },
    )


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_example_configurations_are_accelerates(layout):
    config = load_config_from_file(str(ROOT / "nbs" / "experiments" / f"accelerate_{layout}.yaml"))
    assert (
        str(config.distributed_type).endswith("FSDP" if layout == "fsdp2" else "MULTI_GPU")
        and config.num_processes == 8
    )


def launch(options, processes, **environment):
    script = Path(options["output_dir"]).with_suffix(".py")
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            "--master_port=0",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0",
            str(script),
            json.dumps(options),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def equal_to_rounding(one, two, student):
    "Losses and gradient norms within 1e-3, weights within a hundredth of what the training moved"
    for a, b in zip(history(one / "checkpoint-6"), history(two / "checkpoint-6"), strict=True):
        assert all(
            abs(a[name] / b[name] - 1) < 1e-3 for name in ("loss", "kl", "ce", "grad_norm")
        ), (a, b)
    a, b, before = weights(one / "final"), weights(two / "final"), weights(student)
    moved = max((a[name] - before[name]).abs().max() for name in a)
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-2 * moved and moved > 1e-3
    return a, b


@pytest.fixture(scope="module")
def one(student, tmp_path_factory):
    "The run in one process"
    options = settings(
        student, tmp_path_factory.mktemp("one") / "run", per_device_train_batch_size=4
    )
    finish(options)
    return Path(options["output_dir"])


def test_two_processes_equal_one(student, one, tmp_path):
    options = settings(student, tmp_path / "two", per_device_train_batch_size=2)
    launch(options, 2)
    two = Path(options["output_dir"])
    equal_to_rounding(one, two, student)
    for layer in range(
        4
    ):  # the block-wise stage is the same computation, whichever process does it
        assert (one / "blocks" / f"layer_{layer}.safetensors").read_bytes() == (
            two / "blocks" / f"layer_{layer}.safetensors"
        ).read_bytes()
    assert {path.name for path in (two / "checkpoint-6").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


@pytest.mark.slow
def test_sharded_processes_equal_one(student, one, tmp_path):
    "FSDP2 over two processes: the same training, complete checkpoints, and a resume that gives the same weights"
    options = settings(student, tmp_path / "sharded", per_device_train_batch_size=2)
    launch(options, 2, **fsdp2())
    output = Path(options["output_dir"])
    _, ended = equal_to_rounding(one, output, student)
    assert verify_directory(output / "checkpoint-3") and not list(
        (output / "checkpoint-3").glob("pytorch_model*")
    )
    for path in (output / "final", output / "checkpoint-6"):
        shutil.rmtree(path)
    launch(options, 2, **fsdp2())
    resumed = weights(output / "final")
    assert all(torch.equal(value, resumed[name]) for name, value in ended.items())
