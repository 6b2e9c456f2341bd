"""Compressed directories as vLLM serves them; what needs no vLLM is tested everywhere.

`make test-vllm` builds an environment with vLLM and runs all of it."""

import ast
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import tiny_model
from harness import exit_code, kill, start_command, until
from moe_nb.checkpoint import INDEXES, load_compressed_model, save_compressed_model
from moe_nb.compress import compress_model, store_as
from moe_nb.hf_format import METHOD
from moe_nb.layer import CompressionConfig
from moe_nb.serve import load_share, open_served, served_forward
from moe_nb.shared_core import compressed_experts
from moe_nb.sources import METADATA
from moe_nb.testing import fails
from moe_nb.tiny import load_tiny, tiny_text

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = (ROOT / "moe_nb/vllm_plugin.py").read_text(encoding="utf-8")
QUICK = CompressionConfig(ratio=0.6, rounds=1)


# Without vLLM


def test_entry_point_leads_to_a_function():
    "What settings.ini registers is there"
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    module, function = re.search(r"moe_nb=(moe_nb\.\w+):(\w+)", settings).groups()
    assert module == "moe_nb.vllm_plugin" and f"def {function}(" in PLUGIN
    assert f'"{METHOD}"' in PLUGIN


def test_entry_point_imports_what_vllm_has():
    "A model that is not compressed does not wait for this package"
    found = []
    for node in ast.parse(PLUGIN).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module if not node.level else "moe_nb")
    assert {name.split(".")[0] for name in found} == {"pathlib", "torch", "vllm"}


LAYOUTS = ["granitemoe", "mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "qwen3_vl_moe"]


@pytest.mark.parametrize("family", LAYOUTS)
@torch.inference_mode()
def test_sum_over_ranks_is_the_layer(family, tmp_path):
    "The experts of each rank, read from the files alone, add up to those of the loaded model"
    with torch.inference_mode(False):
        model, _ = compress_model(tiny_model(family), QUICK)
    save_compressed_model(model, tmp_path / "compressed")
    expected = compressed_experts(model)
    served = open_served(tmp_path / "compressed")
    assert sorted(served.layers.values()) == sorted(expected)
    for number, module in served.layers.items():
        experts = expected[module]
        d = experts.down.experts(experts.gate)[0][-1].shape[-1]
        x_Td, weight_TK = torch.randn(5, d), torch.rand(5, 2)
        index_TK = torch.tensor([[0, 3], [1, 2], [3, 2], [0, 1], [2, 0]])
        plain_Td = experts.plain_forward(x_Td, index_TK, weight_TK)
        for size in (1, 2, 4):
            shares = [load_share(served, number, r, size, dtype=torch.float32) for r in range(size)]
            parts = [served_forward(share, x_Td, weight_TK, index_TK.int()) for share in shares]
            torch.testing.assert_close(sum(parts), plain_Td)


def test_experts_beside_the_usual_are_refused(tmp_path):
    "Experts that return the token, and experts that weigh it before"
    for family, words in (("longcat_flash", "as it is"), ("llama4_text", "weighted before")):
        model, _ = compress_model(tiny_model(family), QUICK)
        folder = tmp_path / family
        save_compressed_model(model, folder)
        fails(lambda: open_served(folder), str(folder), words, "moe-nb export")


# With vLLM

HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed; `make test-vllm` installs it"),
]
ENVIRONMENT = dict(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # for the bytes of a model, asked of each rank
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)


def run(jobs, seconds=600, **environment):
    "The answers of vllm_run.py"
    command = [sys.executable, str(ROOT / "tests/vllm_run.py"), json.dumps(jobs)]
    done = subprocess.run(
        command,
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    answers = re.findall("^ANSWER (.*)$", done.stdout, re.M)
    assert len(answers) == len(jobs), done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(answer) for answer in answers]


def greedy(model, prompts, tokens):
    "What transformers writes after each prompt, all of one length"
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        for _ in range(tokens):
            logits = model(ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, len(prompts[0]) :].tolist()


def job(folder, prompts, tokens=48, **options):
    "One job of vllm_run.py"
    options = dict(model=str(folder), dtype="float32") | options
    return dict(options=options, prompts=prompts, tokens=tokens)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    "The embedded model, compressed: folder, prompts, what transformers writes after them"
    folder = tmp_path_factory.mktemp("served") / "compressed"
    model, tokenizer = load_tiny()
    compress_model(model, CompressionConfig(ratio=0.3, rounds=1))
    save_compressed_model(model, folder, tokenizer)
    texts = [text for text in tiny_text("heldout") if len(tokenizer(text).input_ids) > 8]
    prompts = [tokenizer(text).input_ids[:8] for text in texts[:12]]
    model = load_compressed_model(folder, device_map={"": "cpu"}, dtype=torch.float32)
    return folder, prompts, greedy(model, prompts, 48)


SIZES = dict(hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1)
RANDOM_PROMPTS = torch.randint(1, 120, (12, 6), generator=torch.Generator().manual_seed(0)).tolist()
FAMILIES = ["qwen2_moe", "mixtral", "olmoe", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe"]


def without_tensor(folder, ending):
    "Take a tensor out of the weights outside the experts, and out of every list of them"
    file = folder / "non_moe_weights.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith(ending)]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((folder / INDEXES["safetensors"]).read_text())
    del index["weight_map"][name]
    (folder / INDEXES["safetensors"]).write_text(json.dumps(index))
    metadata = json.loads((folder / METADATA).read_text())
    for path in (file, folder / INDEXES["safetensors"]):
        metadata["files"][path.name]["size"] = path.stat().st_size
    (folder / METADATA).write_text(json.dumps(metadata))


@contextmanager
def server(folder):
    "vLLM's server of a model on a free port of this machine; yields a function that asks it"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    log = folder.parent / "server.log"
    child = start_command(command, log, os.environ | ENVIRONMENT)

    def ask(path, order=None):
        "The answer to one request"
        body = None if order is None else json.dumps(dict(model=str(folder)) | order).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, head)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read() or "null")

    def is_up():
        assert exit_code(child, 0) is None, log.read_text()[-3000:]
        try:
            ask("/health")
        except OSError:
            time.sleep(1)
            return False
        return True

    try:
        until(is_up, seconds=300)
        yield ask
    finally:
        kill(child)


class TestVllm:
    pytestmark = needs_vllm

    def test_writes_what_transformers_writes(self, embedded):
        "Compiled, eager, and built from the classes of transformers"
        folder, prompts, expected = embedded
        compiled, eager, backend = run(
            [
                job(folder, prompts, enforce_eager=False),
                job(folder, prompts),
                job(folder, prompts, model_impl="transformers"),
            ],
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
        )
        for answer in (compiled, eager, backend):
            assert answer.get("texts") == expected, answer.get("error")

    def test_other_forms_of_the_factors(self, embedded, tmp_path):
        "Integers stay integers, three of four bytes less than in float32; the interpolative form is put together"
        folder, prompts, _ = embedded
        forms, jobs, expected = ["int8", "interpolative"], [job(folder, prompts)], []
        for form in forms:
            model = load_compressed_model(folder, device_map={"": "cpu"}, dtype=torch.float32)
            store_as(model, form)
            save_compressed_model(model, tmp_path / form)
            jobs.append(job(tmp_path / form, prompts, skip_tokenizer_init=True))
            expected.append(greedy(model, prompts, 48))
        plain, *others = run(jobs, VLLM_ENABLE_V1_MULTIPROCESSING="0")
        for answer, texts in zip(others, expected):
            assert answer.get("texts") == texts, answer.get("error")
        full, integers, expanded = (sum(answer["bytes"]) for answer in (plain, *others))
        layers = compressed_experts(load_compressed_model(folder)).values()
        numbers = sum(p.numel() for layer in layers for p in layer.parameters())
        assert full - integers > 0.9 * 3 * numbers and expanded == full

    @pytest.mark.parametrize("expert_parallel", [False, True])
    def test_two_ranks(self, embedded, expert_parallel):
        "The same text, and half of the factors on each rank"
        folder, prompts, expected = embedded
        two = dict(tensor_parallel_size=2, enable_expert_parallel=expert_parallel)
        (answer,) = run([job(folder, prompts, **two)])
        assert answer.get("texts") == expected, answer.get("error")
        assert len(answer["bytes"]) == 2

    def test_answers_over_http(self, embedded):
        "A server as `vllm serve` starts it, with no flag that concerns compression; asked as OpenAI's is"
        folder, prompts, expected = embedded
        with server(folder) as ask:
            for ids, text in zip(prompts, expected):
                order = dict(prompt=ids, max_tokens=48, temperature=0, ignore_eos=True)
                answer = ask("/v1/completions", order | dict(return_token_ids=True))
                assert answer["choices"][0]["token_ids"] == text

    def test_families(self, tmp_path):
        "A random model of each family writes what transformers writes"
        jobs, expected = [], []
        for family in FAMILIES:
            model, _ = compress_model(tiny_model(family, SIZES), QUICK)
            folder = tmp_path / family
            save_compressed_model(model, folder)
            jobs.append(job(folder, RANDOM_PROMPTS, skip_tokenizer_init=True))
            expected.append(greedy(model, RANDOM_PROMPTS, 48))
        answers = run(jobs, VLLM_ENABLE_V1_MULTIPROCESSING="0")
        for family, answer, texts in zip(FAMILIES, answers, expected):
            assert answer.get("texts") == texts, (family, answer.get("error"))

    def test_what_is_wrong_is_said(self, embedded, tmp_path):
        "One error each, before anything is served; an unsupported vLLM is named"
        folder, prompts, _ = embedded
        cases = {}

        def case(name, *words):
            cases[name] = words
            shutil.copytree(folder, tmp_path / name)
            return tmp_path / name

        file = (
            case("cut", "layer_1/up_proj.safetensors", "incomplete") / "layer_1/up_proj.safetensors"
        )
        file.write_bytes(file.read_bytes()[:-1000])
        shutil.rmtree(case("missing", "layer_2/", "missing") / "layer_2")
        without_tensor(
            case("forgotten", "nothing was read", "qkv_proj"), "layers.1.self_attn.k_proj.weight"
        )
        unserved, _ = compress_model(tiny_model("longcat_flash"), QUICK)
        save_compressed_model(unserved, tmp_path / "unserved")
        cases["unserved"] = ("as it is", "moe-nb export")
        model = load_compressed_model(folder, device_map={"": "cpu"})
        save_compressed_model(model, tmp_path / "pt", weights_format="pt")
        cases["pt"] = (".pt", "moe-nb export")
        jobs = [job(tmp_path / name, prompts, skip_tokenizer_init=True) for name in cases]
        answers = run(jobs, VLLM_ENABLE_V1_MULTIPROCESSING="0")
        for words, answer in zip(cases.values(), answers):
            assert all(word in answer["error"] for word in words), answer

    def test_another_version_is_refused(self, embedded):
        "By name, where a compressed model is asked for"
        folder, _, _ = embedded
        program = (
            "import vllm; vllm.__version__ = '0.31.0'\n"
            f"from vllm import LLM; LLM({str(folder)!r}, max_model_len=64)"
        )
        environment = os.environ | ENVIRONMENT
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.returncode and "found 0.31.0" in done.stderr, done.stderr[-2000:]

    def test_registering_takes_no_time(self):
        "Below 50 ms beside what vLLM imports, and without the rest of this package"
        program = (
            "import sys, time, vllm, vllm.engine.arg_utils\n"
            "before, start = set(sys.modules), time.perf_counter()\n"
            "from moe_nb.vllm_plugin import register; register(); register()\n"
            "print('TOOK', time.perf_counter() - start, *set(sys.modules) - before)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        took, *imported = re.search("^TOOK (.*)$", done.stdout, re.M)[1].split()
        assert set(imported) == {"moe_nb", "moe_nb.vllm_plugin"} and float(took) < 0.05
