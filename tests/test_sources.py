"""A model is found where it lies, whole, by everything that reads one; and all of it comes out again."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3MoeConfig,
    pipeline,
)

from moe_nb.checkpoint import load_compressed_model, save_compressed_model
from moe_nb.compress import compress_model
from moe_nb.distill import DistillationConfig, load_student, load_teacher, run_identity
from moe_nb.evaluate import model_and_tokenizer
from moe_nb.export import EXPORT_RECORD, export_to_hf_format
from moe_nb.layer import CompressionConfig
from moe_nb.plan import make_plan
from moe_nb.report import plot_report, report
from moe_nb.sources import METADATA
from moe_nb.stream import compress_checkpoint
from moe_nb.tiny import load_tiny, tiny_path

CONFIG = CompressionConfig(ratio=0.25, rounds=1, layers=[0])
BESIDE = ["LICENSE", "configuration_x.py", "preprocessor_config.json", "tokenizer.model"]
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def unregistered(monkeypatch):
    "Code that a test trusts is forgotten after it"
    monkeypatch.setattr(Qwen3MoeConfig, "_auto_class", None)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "A checkpoint with code, a processor and a licence beside its weights"
    folder = tmp_path_factory.mktemp("models") / "source"
    shutil.copytree(tiny_path(), folder)
    described = json.loads((folder / "config.json").read_text())
    described["auto_map"] = {"AutoConfig": "configuration_x.XConfig"}
    (folder / "config.json").write_text(json.dumps(described))
    for name in BESIDE:
        (folder / name).write_text("{}")
    code = "from transformers import Qwen3MoeConfig as XConfig\n"
    (folder / "configuration_x.py").write_text(code)
    return folder


@pytest.fixture(scope="module")
def compressed(source):
    folder = source.parent / "compressed"
    compress_checkpoint(source, folder, CONFIG)
    return folder


def cached(folder, root, name):
    "Put `folder` into a cache of huggingface_hub at `root` as the model `name`: files are links to blobs"
    repository = root / f"models--{name.replace('/', '--')}"
    for part in ("refs", "blobs"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    for number, file in enumerate(path for path in folder.rglob("*") if path.is_file()):
        blob = repository / "blobs" / str(number)
        shutil.copy(file, blob)
        link = repository / "snapshots" / "abc" / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repository / "snapshots" / "abc"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty cache of huggingface_hub"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("named", ["hub id", "snapshot", "home"])
def test_everything_takes_every_name(compressed, hub, tmp_path, monkeypatch, named):
    snapshot = cached(compressed, hub, "me/small")
    teacher = cached(tiny_path(), hub, "me/teacher")
    monkeypatch.setenv("HOME", str(compressed.parent))
    names = {"hub id": "me/small", "snapshot": str(snapshot), "home": "~/compressed"}
    model = names[named]
    original = {"hub id": "me/teacher", "snapshot": str(teacher), "home": "~/source"}[named]

    expected = load_compressed_model(compressed).state_dict()
    found = load_compressed_model(model)
    assert all(torch.equal(found.state_dict()[key], value) for key, value in expected.items())
    save_compressed_model(found, tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= set(BESIDE)

    export_to_hf_format(model, original, tmp_path / "exported")
    assert (tmp_path / "exported" / "LICENSE").is_file()
    assert "total parameters" in report(model)
    plot_report(model)
    assert len(model_and_tokenizer(model, device_map="cpu")[1]) > 1
    settings = DistillationConfig(
        teacher_model=original, student_model_path=model, output_dir=str(tmp_path / "run")
    )
    assert run_identity(settings)["student_sha256"]
    load_student(settings)
    load_teacher(settings, torch.device("cpu"))
    make_plan(original, CONFIG)
    compress_checkpoint(original, tmp_path / "again", CONFIG)


def test_transformers_takes_a_compressed_hub_id(compressed, hub):
    "`from_pretrained` and a pipeline, by id alone"
    cached(compressed, hub, "me/small")
    model = AutoModelForCausalLM.from_pretrained("me/small")
    expected = load_compressed_model(compressed).state_dict()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())
    writer = pipeline("text-generation", model="me/small", device="cpu")
    (written,) = writer("Return", max_new_tokens=4, do_sample=False)
    ids = writer.tokenizer("Return", return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert written["generated_text"] == writer.tokenizer.decode(generated[0])


def test_everything_beside_the_weights_comes_out(source, compressed, tmp_path):
    export_to_hf_format(compressed, None, tmp_path / "exported")
    model, _ = compress_model(load_compressed_model(compressed).dequantize(), CONFIG)
    save_compressed_model(model, tmp_path / "saved")
    for folder in (compressed, tmp_path / "exported", tmp_path / "saved"):
        lost = {path.name for path in source.iterdir()} - {path.name for path in folder.iterdir()}
        assert lost <= {"model.safetensors"}
        for name in (*BESIDE, "tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
        AutoTokenizer.from_pretrained(folder)
    listed = json.loads((compressed / METADATA).read_text())["files"]
    exported = json.loads((tmp_path / "exported" / EXPORT_RECORD).read_text())["files"]
    assert set(BESIDE) <= set(listed) and set(BESIDE) <= set(exported)


def test_code_that_is_gone_is_not_named(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / "configuration_x.py").unlink()
    compress_checkpoint(tmp_path / "source", tmp_path / "compressed", CONFIG)
    AutoConfig.from_pretrained(tmp_path / "compressed", trust_remote_code=True)
    assert "auto_map" not in json.loads((tmp_path / "compressed" / "config.json").read_text())


def test_another_tokenizer_takes_the_place_of_all_of_its_files(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    other = AutoTokenizer.from_pretrained(tiny_path())  # from elsewhere
    compress_checkpoint(tmp_path / "source", tmp_path / "compressed", CONFIG, tokenizer=other)
    assert not (tmp_path / "compressed" / "tokenizer.model").exists()
    assert (tmp_path / "compressed" / "tokenizer.json").is_file()


def test_a_damaged_tokenizer_is_carried_as_it_is(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{")
    compress_checkpoint(tmp_path / "source", tmp_path / "compressed", CONFIG)
    assert (tmp_path / "compressed" / "tokenizer.json").read_text() == "{"


def test_no_tokenizer_is_made_up(source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        (tmp_path / "source" / name).unlink()
    compress_checkpoint(tmp_path / "source", tmp_path / "compressed", CONFIG)
    export_to_hf_format(tmp_path / "compressed", None, tmp_path / "exported")
    for folder in ("compressed", "exported"):
        assert not list((tmp_path / folder).glob("*token*"))
    with pytest.raises(ValueError, match="has no tokenizer"):
        model_and_tokenizer(tmp_path / "exported")
    export_to_hf_format(tmp_path / "compressed", tiny_path(), tmp_path / "with_original")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "with_original")) > 1


def test_an_original_that_can_not_be_reached_is_an_error_where_it_is_needed(source, tmp_path, hub):
    shutil.copytree(source, tmp_path / "source")
    compress_checkpoint(tmp_path / "source", tmp_path / "whole", CONFIG)
    for path in (tmp_path / "source").glob("tokenizer*"):
        path.unlink()
    compress_checkpoint(tmp_path / "source", tmp_path / "bare", CONFIG)
    export_to_hf_format(tmp_path / "whole", "nobody/nothing", tmp_path / "exported")
    with pytest.raises(OSError, match="can not be reached"):
        export_to_hf_format(tmp_path / "bare", "nobody/nothing", tmp_path / "not_exported")
    assert not (tmp_path / "not_exported").exists()


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/elsewhere.safetensors"])
def test_no_reader_follows_a_name_out_of_the_directory(source, compressed, tmp_path, file):
    for folder in (source, compressed):
        shutil.copytree(folder, tmp_path / folder.name)
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = dict(metadata={}, weight_map={"lm_head.weight": file})
    (tmp_path / "source" / INDEX).write_text(json.dumps(index))
    inside = json.loads((tmp_path / "compressed" / INDEX).read_text())
    inside["weight_map"] |= dict.fromkeys(list(inside["weight_map"])[:1], file)
    (tmp_path / "compressed" / INDEX).write_text(json.dumps(inside))
    for read in (
        lambda: load_compressed_model(tmp_path / "compressed"),
        lambda: export_to_hf_format(tmp_path / "compressed", None, tmp_path / "exported"),
        lambda: report(tmp_path / "compressed"),
        lambda: compress_checkpoint(tmp_path / "source", tmp_path / "again", CONFIG),
    ):
        with pytest.raises(ValueError, match="leaves the directory"):
            read()
    assert not (tmp_path / "exported").exists() and not (tmp_path / "again").exists()


def test_wrapped_models_are_saved_as_what_is_inside(tmp_path):
    model, tokenizer = load_tiny()
    model, _ = compress_model(torch.compile(model, backend="eager"), CONFIG)
    expected = model.state_dict()
    wrapped = torch.compile(torch.nn.DataParallel(model), backend="eager")
    save_compressed_model(wrapped, tmp_path / "saved", tokenizer)
    save_compressed_model(
        wrapped, tmp_path / "gathered", tokenizer, state_dict=dict(wrapped.state_dict())
    )
    for folder in ("saved", "gathered"):
        found = load_compressed_model(tmp_path / folder).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


class PeftModel(torch.nn.Module):
    "As PEFT wraps a model"

    def __init__(self, model):
        super().__init__()
        self.base_model = torch.nn.ModuleDict(dict(model=model))
        self.peft_config = {"default": None}


def test_adapters_are_refused_before_anything_is_lost(tmp_path):
    model, tokenizer = load_tiny()
    untouched = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="merge_and_unload"):
        compress_model(PeftModel(model), CONFIG)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in untouched.items())
    model, _ = compress_model(model, CONFIG)
    save_compressed_model(model, tmp_path / "saved", tokenizer)
    attention = model.model.layers[0].self_attn
    attention.q_proj.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(2)))
    for adapted in (model, PeftModel(model)):
        with pytest.raises(ValueError, match="not merged"):
            save_compressed_model(adapted, tmp_path / "saved", tokenizer)
    load_compressed_model(tmp_path / "saved")


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_all_files_have_the_mode_of_new_files(source, tmp_path, mask):
    before = os.umask(mask)
    try:
        compress_checkpoint(source, tmp_path / "streamed", CONFIG)
        export_to_hf_format(tmp_path / "streamed", None, tmp_path / "exported")
        save_compressed_model(load_compressed_model(tmp_path / "streamed"), tmp_path / "saved")
    finally:
        os.umask(before)
    files = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {oct(0o666 & ~mask)}
