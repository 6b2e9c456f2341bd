"Forms of the factors through the whole package: budget, distillation, saving, export, older versions."

import copy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from harness import kill_after, shares, start_function
from moe_nb import checkpoint, hf_format
from moe_nb.checkpoint import load_compressed_model, save_compressed_model
from moe_nb.compress import compress_model, store_as
from moe_nb.distill import DistillationConfig, distill
from moe_nb.evaluate import perplexity
from moe_nb.export import export_to_hf_format
from moe_nb.fast_experts import FORMS
from moe_nb.hf_format import modules_of, store_layer, stored_form
from moe_nb.layer import CompressionConfig
from moe_nb.resume import CompleteTrainer
from moe_nb.serve import open_served
from moe_nb.shared_core import compressed_experts, original_experts, random_experts
from moe_nb.stream import compress_checkpoint
from moe_nb.text import token_sequences
from moe_nb.tiny import load_tiny, tiny_path, tiny_text

RATIO = 0.3
BYTE_RATIO = 0.05  # Of fp32, as the model is in memory


def compressed(weights):
    "The embedded model compressed without data, its tokenizer and the statistics"
    model, tokenizer = load_tiny()
    budget = dict(byte_ratio=BYTE_RATIO) if weights == "packed" else dict(ratio=RATIO)
    config = CompressionConfig(**budget, rounds=1, weights=weights, dtype="bfloat16")
    _, statistics = compress_model(model, config)
    return model, tokenizer, statistics


@pytest.fixture(scope="module", params=["int8", "interpolative", "packed"])
def form(request):
    return request.param


@pytest.fixture(scope="module")
def directory(form, tmp_path_factory):
    "Where the model in this form lies"
    model, tokenizer, _ = compressed(form)
    return save_compressed_model(model, tmp_path_factory.mktemp(form) / "student", tokenizer)


def form_at(path):
    return stored_form(modules_of(load_compressed_model(path).config))


def test_budget_is_one_of_stored_numbers(form):
    model, _, statistics = compressed(form)
    _, _, plain = compressed("float")
    found = 0
    for layer in compressed_experts(model).values():
        parts = layer.projections().values()
        found += sum(sum(part.counts.values()) for part in parts)
        found += 3 * len(layer.layout.weights)  # shapes
    assert found == statistics.expert_params_compressed
    if form == "interpolative":  # larger ranks for the same numbers
        assert 0.99 * RATIO < statistics.expert_compression_ratio <= RATIO
        assert statistics.mean_relative_error < 0.95 * plain.mean_relative_error
    else:
        share = dict(int8=0.51, packed=2.02 * BYTE_RATIO / RATIO)[form]
        assert statistics.expert_bytes_compressed < share * plain.expert_bytes_compressed


BYTES = CompressionConfig(byte_ratio=0.125, rounds=1, refine_steps=0)


def test_budget_of_bytes_is_kept():
    model = load_tiny()[0].bfloat16()  # as it is in the files
    _, statistics = compress_model(model, BYTES)
    stored = sum(
        value.nbytes
        for layer in compressed_experts(model).values()
        for value in layer.state_dict().values()
    )
    assert stored == statistics.expert_bytes_compressed
    share = stored / statistics.expert_bytes_original
    assert 0.99 * BYTES.byte_ratio < share <= BYTES.byte_ratio
    bits = model.model.layers[0].mlp.experts.gate.wide_bits
    assert len(bits.unique()) > 2  # each direction its own


@pytest.mark.slow
def test_bytes_layer_by_layer_as_in_memory(tmp_path):
    model, tokenizer = load_tiny()
    model.bfloat16()
    sequences = token_sequences(tokenizer, tiny_text("calibration"), limit=8)
    compress_model(model, BYTES, sequences)
    compress_checkpoint(tiny_path(), tmp_path / "streamed", BYTES, sequences)
    streamed = load_compressed_model(tmp_path / "streamed")
    assert form_at(tmp_path / "streamed") == "packed"
    sizes = []
    for stored in (model, streamed):
        layers = compressed_experts(stored).values()
        sizes.append(sum(v.nbytes for layer in layers for v in layer.state_dict().values()))
    assert abs(sizes[0] / sizes[1] - 1) < 0.001
    text = tiny_text("heldout")[:10]
    found = [perplexity(stored, tokenizer, text) for stored in (model, streamed)]
    assert abs(found[0] / found[1] - 1) < 0.01  # sums from disk are rounded otherwise


def test_student_learns_and_keeps_its_form(directory, form, tmp_path):
    config = DistillationConfig(
        teacher_model=str(tiny_path()),
        student_model_path=str(directory),
        output_dir=str(tmp_path / "run"),
        block_steps=2,
        max_steps=6,
        save_steps=3,
        max_tokens=8192,
        training_args=dict(use_cpu=True, disable_tqdm=True),
    )
    final = distill(config)
    before, after = load_compressed_model(directory), load_compressed_model(final)
    assert form_at(final) == form
    bits = [
        m.config.quantization_config.statistics["expert_bits_per_weight"] for m in (before, after)
    ]
    assert bits[0] == bits[1]
    _, tokenizer = load_tiny()
    text = tiny_text("heldout")[:10]
    assert perplexity(after, tokenizer, text) < 0.98 * perplexity(before, tokenizer, text)
    for step in (tmp_path / "run").glob("checkpoint-*"):  # plain, so that a run can go on
        assert form_at(step) == "float"


def test_trainer_refuses_what_it_would_not_train(directory, tmp_path):
    model = load_compressed_model(directory)
    trainer = CompleteTrainer(model, TrainingArguments(str(tmp_path / "run"), use_cpu=True))
    with pytest.raises(ValueError, match="store_as"):
        trainer.train()


def test_saved_loaded_and_exported(directory, tmp_path):
    model = load_compressed_model(directory)
    save_compressed_model(model, tmp_path / "again")
    for file in directory.glob("layer_*/*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(directory)).read_bytes()
    export_to_hf_format(directory, None, tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    model.dequantize()
    for name, value in exported.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_forms_are_the_same_model(directory, form):
    model = load_compressed_model(directory, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(ids).logits
        store_as(model, "float")
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        store_as(model, form)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-2, atol=1e-2)
    for name, value in load_compressed_model(directory).state_dict().items():
        if form != "interpolative":  # other rows may be kept, but levels come back
            assert torch.equal(model.state_dict()[name].to(value.dtype), value), name


def test_offloaded_to_disk(directory, tmp_path):
    "Stored tensors that begin anywhere in memory"
    expected = load_compressed_model(directory)
    places = {name: "cpu" for name, _ in expected.model.named_children() if name != "layers"}
    device_map = {f"model.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(4)}
    model = load_compressed_model(directory, device_map=device_map, offload_folder=tmp_path)
    for tokens in (1, 5):
        ids = torch.arange(tokens)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    "d, f, dtype", [(40, 24, torch.bfloat16), (33, 7, torch.float32), (40, 24, torch.float16)]
)
@torch.no_grad()
def test_odd_widths(form, d, f, dtype):
    torch.manual_seed(0)
    ranks = [0] * 4, [1, 0, 5, 3]
    layer = random_experts(original_experts(d, f, 4), gate=ranks, up=ranks, down=ranks).to(dtype)
    batch = (
        torch.randn(3, d).to(dtype),
        torch.tensor([[0, 2], [3, 1], [2, 0]]),
        torch.rand(3, 2).to(dtype),
    )
    wide = [value.double() if value.is_floating_point() else value for value in batch]
    expected = copy.deepcopy(layer).double().plain_forward(*wide)
    store_layer(layer, form)
    names = ["shared_core", "shared_core_plain"]
    if d % 8 == 0:  # as the grouped product of torch wants it
        names += ["shared_core_grouped", "shared_core_pairs"]
    for name in names:
        error = (FORMS[name](layer, *batch).double() - expected).norm() / expected.norm()
        assert error < (0.3 if form == "packed" else 0.03), name


def test_unknown_form_is_refused(directory):
    model = load_compressed_model(directory)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match="weights must be one of float, int8, interpolative, packed; got 'int4'"
    ):
        store_as(model, "int4")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_older_package_refuses_it(directory, form, monkeypatch):
    "As a version does that knows only the formats before this one"
    version = hf_format.FACTOR_FORMS[form]
    for module in (checkpoint, hf_format):
        monkeypatch.setattr(module, "FORMAT_VERSION", version - 1)
    said = f"format version {version} is newer than {version - 1}.*upgrade moe_nb"
    for load in (load_compressed_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=said):
            load(directory)


FILE = "layer_2/up_proj.safetensors"


def flip(file):
    "Change one bit"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def cut(file):
    "Lose the end"
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damaged_directory_is_refused(directory, tmp_path, damage):
    shutil.copytree(directory, tmp_path / "damaged")
    damage(tmp_path / "damaged" / FILE)
    with pytest.raises((ValueError, FileNotFoundError), match=FILE):
        load_compressed_model(tmp_path / "damaged")


def test_process_without_the_package_gets_an_error(directory):
    code = (
        "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, directory], capture_output=True, text=True)
    assert done.returncode and "size mismatch" in done.stderr.lower()


def test_killed_while_saving(directory, tmp_path):
    "The old directory is there until the new one is complete"
    model, expected = load_compressed_model(directory), {}
    for name, value in model.state_dict().items():
        expected[name] = value.clone()
    begun = time.monotonic()
    target, log = tmp_path / "student", tmp_path / "log"
    save_compressed_model(model, target)
    moment = shares(time.monotonic() - begun, 0.05, 0.9)
    killed = 0
    for _ in range(3):
        child = start_function(save_compressed_model, model, target, log=log)
        killed += kill_after(child, moment(), log)
        for name, value in load_compressed_model(target).state_dict().items():
            assert torch.equal(value, expected[name]), name
    assert killed
    save_compressed_model(model, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "student"]


def test_serving_takes_it_or_refuses_it_by_name(directory, form):
    if form != "packed":
        assert open_served(directory).layers
        return
    with pytest.raises(ValueError, match="stored in the form packed.*moe-nb export"):
        open_served(directory)
