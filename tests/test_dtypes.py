"""Tensors that a family keeps in float32 stay so through everything; all else comes out in the type it went in.

The families are those of transformers with experts and such tensors."""

import pytest
import torch
from transformers import AutoConfig

import families
from families import model_types, tiny_model
from moe_nb.checkpoint import load_compressed_model, save_compressed_model
from moe_nb.compress import compress_model
from moe_nb.experts import find_experts
from moe_nb.export import export_to_hf_format
from moe_nb.hf_names import cast_model, model_class
from moe_nb.layer import CompressionConfig
from moe_nb.shards import load_tensors, open_source
from moe_nb.stream import compress_checkpoint, open_checkpoint

WIDER = {"hunyuan_v1_moe": dict(num_experts=4, moe_topk=2)}  # One expert by default
FEW = ["deepseek_v3", "ernie4_5_moe", "nemotron_h"]
CONFIG = CompressionConfig(rank=2, rounds=1)


@pytest.fixture(autouse=True)
def even_widths(monkeypatch):
    "Rows of a multiple of 16 bytes, which grouped products in bfloat16 ask for"
    for sizes in (families.SIZES, families.NONE):
        for key, value in sizes.items():
            if value == 12:
                monkeypatch.setitem(sizes, key, 16)


def kept_tensors(model):
    "Names of the tensors that are float32 in a model that was cast to bfloat16"
    state = model.state_dict().items()
    return [key for key, value in state if value.dtype == torch.float32]


def has_kept(model_type):
    "Whether a family has experts, and tensors that stay in float32"
    try:
        model = tiny_model(model_type, WIDER.get(model_type), device="meta")
    except Exception:
        return False  # the families notebook says why
    return bool(find_experts(model)) and bool(kept_tensors(cast_model(model, torch.bfloat16)))


def reloads(model_type, folder):
    "Whether transformers itself loads what it saved of a family"
    model = tiny_model(model_type, WIDER.get(model_type))
    model.save_pretrained(folder)
    found = loaded(folder, dtype=torch.float32).state_dict()
    return all(torch.equal(found[key], value) for key, value in model.state_dict().items())


def source_of(model_type, folder):
    "A random bfloat16 checkpoint in which every tensor that stays in float32 would be changed by rounding"
    model = cast_model(tiny_model(model_type, WIDER.get(model_type)), torch.bfloat16)
    kept = kept_tensors(model)
    assert kept
    state = model.state_dict()
    for key in kept:
        state[key].copy_(torch.rand(state[key].shape) * 0.2 + (6.9 if "bias" in key else 0))
    model.save_pretrained(folder)
    # transformers writes the type of the first tensor, which may be one of those that are kept
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(folder)
    return model


def loaded(folder, **options):
    "What transformers loads"
    chosen = model_class(AutoConfig.from_pretrained(folder))
    return chosen.from_pretrained(folder, **options)


def types(model):
    return {key: value.dtype for key, value in model.state_dict().items()}


def outside(model):
    "The tensors outside the experts"
    modules = tuple(find_experts(model))
    state = model.state_dict().items()
    return {key: value for key, value in state if not key.startswith(modules)}


def assert_same(found, expected):
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, (key, found[key].dtype, value.dtype)
        assert torch.equal(found[key], value), key


def check(model_type, folder):
    source_of(model_type, folder / "source")
    # as transformers loads it: some families set a value anew then
    source = loaded(folder / "source", dtype="auto")
    expected = outside(source)

    # compressed in a stream, and exported: what the source holds
    compress_checkpoint(folder / "source", folder / "streamed", CONFIG)
    export_to_hf_format(folder / "streamed", None, folder / "exported")
    stored, exported = open_source(folder / "source"), open_source(folder / "exported")
    assert {key: value.dtype for key, value in stored.items()} == {
        key: value.dtype for key, value in exported.items()
    }
    assert_same(loaded(folder / "exported", dtype="auto").state_dict(), expected)
    assert_same(load_compressed_model(folder / "streamed").state_dict(), expected)

    # compressed in memory, saved, loaded: factors of one type
    compressed, _ = compress_model(source, CONFIG)
    save_compressed_model(compressed, folder / "saved")
    again = load_compressed_model(folder / "saved")
    assert_same(again.state_dict(), expected)
    assert types(again) == types(compressed)


def check_cast(model_type, folder):
    "From float32 to bfloat16: as transformers loads it"
    tiny_model(model_type, WIDER.get(model_type)).save_pretrained(folder / "source")
    expected = outside(loaded(folder / "source", dtype=torch.bfloat16))
    config = CompressionConfig(rank=2, rounds=1, dtype="bfloat16")
    compressed, _ = compress_model(loaded(folder / "source", dtype=torch.float32), config)
    assert_same(compressed.state_dict(), expected)
    compress_checkpoint(folder / "source", folder / "streamed", config)
    streamed = load_compressed_model(folder / "streamed")
    assert_same(streamed.state_dict(), expected)
    assert types(streamed) == types(compressed)
    export_to_hf_format(folder / "streamed", None, folder / "exported")
    assert_same(loaded(folder / "exported", dtype="auto").state_dict(), expected)


def test_projection_that_is_stored_whole_has_the_type_of_the_others(tmp_path):
    "Its name, experts.gate.weight, holds that of a router, gate.weight"
    model = cast_model(tiny_model("ernie4_5_moe"), torch.bfloat16)
    config = CompressionConfig(rank=2, rounds=1, projections=["up_proj", "down_proj"])
    compressed, _ = compress_model(model, config)
    save_compressed_model(compressed, tmp_path / "saved")
    loaded_again = load_compressed_model(tmp_path / "saved")
    assert types(loaded_again) == types(compressed)
    cast = cast_model(cast_model(loaded_again, torch.float32), torch.bfloat16)
    assert types(cast) == types(compressed)


@pytest.mark.parametrize("model_type", FEW)
@pytest.mark.parametrize("what", [check, check_cast])
def test_family_keeps_its_types(model_type, what, tmp_path):
    what(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("what", [check, check_cast])
def test_every_family_keeps_its_types(what, tmp_path):
    families = [model_type for model_type in model_types() if has_kept(model_type)]
    assert set(FEW) <= set(families) and len(families) > 10
    failed = {}
    for model_type in families:
        try:
            if reloads(model_type, tmp_path / model_type / "plain"):
                what(model_type, tmp_path / model_type)
        except Exception as error:
            failed[model_type] = f"{type(error).__name__}: {str(error)[:300]}"
    assert not failed, failed


@pytest.mark.parametrize("stored", ["as it is loaded", "rounded"])
def test_streaming_reads_and_copies_types(tmp_path, stored):
    "Calibration in a stream computes with what transformers loads; the result holds what the source holds"
    model = source_of("deepseek_v3", tmp_path / "source")
    if stored == "rounded":
        model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    read = open_checkpoint(tmp_path / "source", CONFIG)
    load_tensors(read.model, read.tensors)
    expected = loaded(tmp_path / "source", dtype="auto")
    assert types(read.model) == types(expected)
    assert_same(read.model.state_dict(), expected.state_dict())
    compress_checkpoint(tmp_path / "source", tmp_path / "compressed", CONFIG)
    export_to_hf_format(tmp_path / "compressed", None, tmp_path / "exported")
    source, exported = (open_source(tmp_path / name) for name in ("source", "exported"))
    for key in source:
        assert source[key].dtype == exported[key].dtype, key
        assert "experts." in key or torch.equal(source[key][...], exported[key][...]), key


@torch.no_grad()
def test_router_chooses_the_same_experts(tmp_path):
    "A rounded correction bias sends tokens elsewhere"
    model = source_of("deepseek_v3", tmp_path / "source")
    first = next(iter(find_experts(model)))
    compress_checkpoint(tmp_path / "source", tmp_path / "compressed", CONFIG)
    export_to_hf_format(tmp_path / "compressed", None, tmp_path / "exported")
    ids = torch.arange(64).view(2, 32)

    def chosen(model):
        found = []
        hook = model.get_submodule(first).register_forward_pre_hook(
            lambda module, inputs: found.append(inputs[1].sort(-1).values)
        )
        model.eval()(ids, use_cache=False)
        hook.remove()
        return found[0]

    expected = chosen(model)
    assert torch.equal(chosen(load_compressed_model(tmp_path / "compressed")), expected)
    assert torch.equal(chosen(loaded(tmp_path / "exported", dtype="auto")), expected)
    rounded = model.get_submodule(first.removesuffix(".experts")).gate
    rounded.e_score_correction_bias.data = rounded.e_score_correction_bias.data.bfloat16().float()
    assert not torch.equal(chosen(model), expected)
