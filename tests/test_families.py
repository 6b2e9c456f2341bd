"""Six families of transformers, of four layouts of experts, through everything.

The table of all families is nbs/experiments/families.ipynb."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import CAPABILITIES, TICK, prove, tiny_model
from moe_nb.export import export_to_hf_format, lost_tensors
from moe_nb.layer import CompressionConfig
from moe_nb.stream import compress_checkpoint

SIX = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_vl_moe", "nemotron_h"]


@pytest.mark.parametrize("family", SIX)
def test_family(family):
    row = prove(family)
    assert row["layers"] and all(row[name] == TICK for name in CAPABILITIES), row["reason"]
    assert row["difference"] < 1e-4


def image_text_in_fp8(folder, **quantization):
    "A tiny Qwen3-VL-MoE whose text model is in fp8, blocks cut short; what says so lies in the part for text"
    tiny_model("qwen3_vl_moe").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, value in list(tensors.items()):
        if name.startswith("model.language_model") and "proj" in name and value.ndim > 1:
            tensors[name] = (8 * value).to(torch.float8_e4m3fn)
            counts = [-(-size // 10) for size in value.shape[-2:]]
            tensors[f"{name}_scale_inv"] = torch.rand(*value.shape[:-2], *counts)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


def test_quantization_of_the_text_part_is_read(tmp_path):
    source, config = tmp_path / "source", CompressionConfig(ratio=0.7, rounds=1)
    image_text_in_fp8(source, quant_method="fp8", weight_block_size=[10, 10])
    compress_checkpoint(source, tmp_path / "compressed", config)
    export_to_hf_format(tmp_path / "compressed", None, tmp_path / "exported")
    assert lost_tensors(source, tmp_path / "exported") == {}
    for folder in ("compressed", "exported"):
        text = json.loads((tmp_path / folder / "config.json").read_text())["text_config"]
        assert "quantization_config" not in text


def test_quantization_of_the_text_part_is_refused(tmp_path):
    image_text_in_fp8(tmp_path / "source", quant_method="awq")
    with pytest.raises(ValueError, match="awq"):
        compress_checkpoint(tmp_path / "source", tmp_path / "new", CompressionConfig(ratio=0.7))
    assert not (tmp_path / "new").exists()
