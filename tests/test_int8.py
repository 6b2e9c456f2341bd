"Integer factors through the whole package: distilled, refused where they can not be used, read by no older version."

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from moe_nb import checkpoint, hf_format
from moe_nb.checkpoint import load_compressed_model, save_compressed_model
from moe_nb.compress import compress_model, store_as
from moe_nb.distill import DistillationConfig, distill
from moe_nb.evaluate import perplexity
from moe_nb.hf_format import has_integers, modules_of
from moe_nb.layer import CompressionConfig
from moe_nb.resume import CompleteTrainer
from moe_nb.tiny import load_tiny, tiny_path, tiny_text


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    "The embedded model compressed without data, in integers, and where it lies"
    model, tokenizer = load_tiny()
    config = CompressionConfig(ratio=0.3, rounds=1, weights="int8", dtype="bfloat16")
    compress_model(model, config)
    return save_compressed_model(model, tmp_path_factory.mktemp("int8") / "student", tokenizer)


def bits(path):
    return load_compressed_model(path).config.quantization_config.statistics[
        "expert_bits_per_weight"
    ]


def test_student_in_integers_learns_and_stays_in_integers(directory, tmp_path):
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
    assert has_integers(modules_of(after.config))
    assert bits(final) == bits(directory)
    _, tokenizer = load_tiny()
    text = tiny_text("heldout")[:10]
    assert perplexity(after, tokenizer, text) < 0.98 * perplexity(before, tokenizer, text)
    for step in (tmp_path / "run").glob("checkpoint-*"):  # numbers, so that a run can go on
        assert not has_integers(modules_of(load_compressed_model(step).config))
        assert bits(step) > 1.9 * bits(final)


def test_trainer_refuses_what_has_no_gradient(directory, tmp_path):
    model = load_compressed_model(directory)
    trainer = CompleteTrainer(model, TrainingArguments(str(tmp_path / "run"), use_cpu=True))
    with pytest.raises(ValueError, match="store_as"):
        trainer.train()


def test_numbers_and_integers_are_the_same_model(directory):
    model = load_compressed_model(directory, dtype=torch.float32)
    ids = torch.arange(40)[None]
    expected = model(ids).logits
    store_as(model, "float")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    store_as(model, "int8", torch.bfloat16)
    for name, value in load_compressed_model(directory).state_dict().items():
        assert torch.equal(model.state_dict()[name].to(value.dtype), value), name


def test_older_package_refuses_integers(directory, monkeypatch):
    "As a version does that knows the first format alone"
    for module in (checkpoint, hf_format):
        monkeypatch.setattr(module, "FORMAT_VERSION", 1)
    for load in (load_compressed_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="format version 2 is newer than 1.*upgrade moe_nb"):
            load(directory)
