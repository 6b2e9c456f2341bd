"Distillation in processes of its own: killed and resumed, two instead of one, sharded."

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

import harness
from harness import kill_and_resume, shares, start_function
from moe_nb.checkpoint import load_compressed_model, save_compressed_model, verify_directory
from moe_nb.compress import compress_model
from moe_nb.distill import DistillationConfig, distill
from moe_nb.evaluate import model_and_tokenizer
from moe_nb.layer import CompressionConfig
from moe_nb.resume import (
    TRAINER_STATE,
    checkpoint_step,
    checkpoints,
    newest_checkpoint,
    stored_model,
)
from moe_nb.stream import compress_checkpoint
from moe_nb.tiny import load_tiny, tiny_path

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "nbs" / "experiments"
KILLS = 20


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    "The directory of a compressed model"
    model, tokenizer = load_tiny()
    config = CompressionConfig(ratio=0.25, rounds=1, align_width=0)
    compressed, _ = compress_model(model, config)
    path = tmp_path_factory.mktemp("student") / "student"
    return save_compressed_model(compressed, path, tokenizer)


def settings(student, output, **changes):
    "A short run as keywords of `DistillationConfig`"
    short = dict(
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
    )
    return short | changes


def weights(path):
    "The tensors of a model that hold numbers"
    state = stored_model(path).state_dict()
    return {name: value for name, value in state.items() if value.numel()}


def assert_same(one, two):
    "The weights in two directories are equal, bit for bit"
    ones, twos = weights(one), weights(two)
    assert ones.keys() == twos.keys()
    differ = [name for name in ones if not torch.equal(ones[name], twos[name])]
    assert not differ


def state_of(checkpoint):
    "The state of the Trainer in a checkpoint"
    return json.loads((checkpoint / TRAINER_STATE).read_text())


def history(checkpoint):
    "The lines of the log of a run"
    return [line for line in state_of(checkpoint)["log_history"] if "kl" in line]


# Killed


def log_of(options):
    "What the processes of a run print to"
    return Path(options["output_dir"]).parent / "log.txt"


def start(options):
    "A run in a process of its own"
    return start_function(lambda: distill(DistillationConfig(**options)), log=log_of(options))


def finish(options):
    "A run from where it is to its end"
    harness.finish(start(options), log_of(options))


def assert_complete(output):
    "Every checkpoint and everything that was published is whole, and the newest checkpoint is found"
    found = checkpoints(output)
    for path in found:
        verify_directory(path)
        assert state_of(path)["global_step"] == checkpoint_step(path)
        load_compressed_model(path, device_map={"": "cpu"})
    assert newest_checkpoint(output) == (found[-1] if found else None)
    for path in (output / "eval_queue").glob("step-*"):
        verify_directory(path)


@pytest.mark.slow
def test_kill_at_any_moment_and_resume(student, tmp_path):
    "After each of 20 kills every checkpoint loads, and the run ends with the weights of the one that was not killed"
    run = dict(per_device_train_batch_size=2, max_steps=80, save_steps=2, save_total_limit=2)
    options = settings(student, tmp_path / "killed", **run)
    output, reference = tmp_path / "killed", tmp_path / "reference"
    begun = time.time()
    finish(settings(student, reference, **run))
    seconds = time.time() - begun

    seen = set()

    def start_over():
        assert_same(output / "final", reference / "final")
        shutil.rmtree(output)

    def after_kill():
        assert_complete(output)
        found = checkpoints(output)
        seen.add(found[-1].name if found else None)

    begins = kill_and_resume(
        lambda: start(options),
        log=log_of(options),
        delay=shares(seconds, 0.05, 0.9),
        is_done=(output / "final").exists,
        start_over=start_over,
        after_kill=after_kill,
        kills=KILLS,
    )
    assert len(seen) > 5, f"the kills all fell on {seen}"
    assert_same(output / "final", reference / "final")
    assert not list(output.glob(".*"))
    assert (output / "eval_queue" / "TRAINING_DONE").is_file()
    assert len(list((output / "eval_queue").glob("step-*"))) == 40
    print(f"{KILLS} kills, at {sorted(map(str, seen))}, {begins} new beginnings")


# Two processes

# accelerate refuses to shard on the CPU; told that the two processes are devices, it does
SCRIPT = """
import json, os, sys
from accelerate.state import AcceleratorState, DistributedType, PartialState

sharded = "ACCELERATE_USE_FSDP" in os.environ
if sharded:
    init = PartialState.__init__

    def patched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = patched

from moe_nb.distill import DistillationConfig, distill

distill(DistillationConfig(**json.loads(sys.argv[1])))
if sharded:
    state = AcceleratorState()
    assert state.distributed_type == DistributedType.FSDP
    assert state.fsdp_plugin.fsdp_version == 2
"""


def fsdp2():
    "What `accelerate launch` makes of the example configuration: environment variables"
    text = (EXPERIMENTS / "accelerate_fsdp2.yaml").read_text()
    variables = dict(ACCELERATE_USE_FSDP="true")
    for name, value in yaml.safe_load(text)["fsdp_config"].items():
        text = str(value)
        variables[name.upper()] = text.lower() if isinstance(value, bool) else text
    return variables


@pytest.mark.parametrize("layout, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_example_configurations_are_accelerates(layout, kind):
    config = load_config_from_file(str(EXPERIMENTS / f"accelerate_{layout}.yaml"))
    assert str(config.distributed_type).endswith(kind)
    assert config.num_processes == 8


def launch(options, processes, **variables):
    "A run in several processes, with these environment variables"
    script = Path(options["output_dir"]).with_suffix(".py")
    script.write_text(SCRIPT)
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nproc_per_node={processes}",
        "--master_port=0",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
        str(script),
        json.dumps(options),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


def largest_difference(a, b):
    "Between two sets of weights"
    return max((a[name] - b[name]).abs().max() for name in a)


def assert_equal_to_rounding(one, two, student):
    "Losses and gradient norms within 1e-3, weights within a hundredth of what the training moved"
    for a, b in zip(history(one / "checkpoint-6"), history(two / "checkpoint-6"), strict=True):
        for name in ("loss", "kl", "ce", "grad_norm"):
            assert abs(a[name] / b[name] - 1) < 1e-3, (name, a, b)
    ended = weights(one / "final")
    moved = largest_difference(ended, weights(student))
    assert moved > 1e-3
    assert largest_difference(ended, weights(two / "final")) < 1e-2 * moved


@pytest.fixture(scope="module")
def one(student, tmp_path_factory):
    "The run in one process"
    output = tmp_path_factory.mktemp("one") / "run"
    finish(settings(student, output, per_device_train_batch_size=4))
    return output


def test_two_processes_equal_one(student, one, tmp_path):
    "The block-wise stage is the same computation, whichever process does it; the global one is equal to rounding"
    two = tmp_path / "two"
    launch(settings(student, two, per_device_train_batch_size=2), 2)
    assert_equal_to_rounding(one, two, student)
    for layer in range(4):
        file = Path("blocks") / f"layer_{layer}.safetensors"
        assert (one / file).read_bytes() == (two / file).read_bytes()
    random_states = {path.name for path in (two / "checkpoint-6").glob("rng_state*")}
    assert random_states == {"rng_state_0.pth", "rng_state_1.pth"}


@pytest.mark.slow
def test_sharded_processes_equal_one(student, one, tmp_path):
    "FSDP2 over two processes: the same training, complete checkpoints, and a resume that gives the same weights"
    output = tmp_path / "sharded"
    options = settings(student, output, per_device_train_batch_size=2)
    launch(options, 2, **fsdp2())
    assert_equal_to_rounding(one, output, student)
    verify_directory(output / "checkpoint-3")
    assert not list((output / "checkpoint-3").glob("pytorch_model*"))
    shutil.move(output / "final", tmp_path / "ended")
    shutil.rmtree(output / "checkpoint-6")
    launch(options, 2, **fsdp2())
    assert_same(output / "final", tmp_path / "ended")


# Models that see, and conversations


def image_text_model(folder):
    "A small random Qwen3-VL-MoE in bf16, with the embedded tokenizer"
    text = dict(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        head_dim=16,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]),
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        out_hidden_size=32,
        deepstack_visual_indexes=[0],
        num_position_embeddings=16,
    )
    torch.manual_seed(0)
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    Qwen3VLMoeForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    load_tiny()[1].save_pretrained(folder)


def test_image_text_model_learns_from_text(tmp_path):
    "Both stages; the class, the vision tower and the data type stay"
    source, compressed = tmp_path / "source", tmp_path / "compressed"
    image_text_model(source)
    compress_checkpoint(source, compressed, CompressionConfig(ratio=0.9, rounds=1))
    changes = dict(teacher_model=str(source), dataset="embedded", max_tokens=4096)
    final = distill(DistillationConfig(**settings(compressed, tmp_path / "run", **changes)))
    before, after = stored_model(compressed), stored_model(final)
    assert type(after) is Qwen3VLMoeForConditionalGeneration and after.dtype == torch.bfloat16
    assert type(model_and_tokenizer(source, device_map="cpu")[0]) is type(after)
    old, new = weights(compressed), weights(final)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys() and before.dtype == after.dtype
    assert any("experts" in name for name in changed)
    assert not any("visual" in name for name in changed)
    ids = torch.arange(1, 40)[None]
    assert after(ids).logits.isfinite().all()


def test_conversations_and_other_models_text(student, tmp_path):
    "Chat data go through the template of the student's tokenizer; for a model of somebody else the text is a choice"
    own, run = tmp_path / "own", tmp_path / "run"
    shutil.copytree(student, own)
    tokenizer = load_tiny()[1]
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
    )
    tokenizer.save_pretrained(own)
    talk = [{"role": "user", "content": "What is a list?"}]
    talk.append({"role": "assistant", "content": "A list is a sequence of items. " * 40})
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 4))
    short = dict(block_steps=0, max_steps=1, save_steps=1, max_length=32)
    chat = settings(own, run, dataset=str(tmp_path / "chat.jsonl"), **short)
    assert distill(DistillationConfig(**chat)) == run / "final"
    # the tokenizer of the plain student has no template
    plain = chat | dict(student_model_path=str(student), output_dir=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="chat template"):
        distill(DistillationConfig(**plain))

    image_text_model(tmp_path / "other")
    other = settings(student, tmp_path / "none", teacher_model=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="--dataset is needed.*embedded"):
        distill(DistillationConfig(**other))
    with pytest.raises(FileNotFoundError, match=r"texts\.txt: no such file"):
        distill(DistillationConfig(**other | dict(dataset="texts.txt")))
    assert not (tmp_path / "none").exists()
