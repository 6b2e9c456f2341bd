"""That the kernels compute what the plain form computes in float64, and compile for a GPU.

Without a GPU the first part runs in a process of its own, in which Triton runs kernels as Python."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbdev.test
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton, which is made for Linux, is not installed")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from moe_nb import kernels
from moe_nb.compress import compress_model
from moe_nb.fast_experts import FUSED, fastest
from moe_nb.int8 import round_layer
from moe_nb.kernels import INTERPRETED, NAME, TUNED, Layer, triton_forward
from moe_nb.layer import CompressionConfig
from moe_nb.original_kernels import original_triton
from moe_nb.shared_core import SharedCoreExperts, original_experts, random_experts
from moe_nb.tiny import load_tiny

ROOT = Path(__file__).resolve().parent.parent
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
D, F, E, K = 40, 24, 5, 2  # No tile divides these
RANKS = {
    "ragged": ([5, 0, 18, 1, 33], [3, 20, 0, 7, 1]),
    "equal": ([16] * E, [16] * E),
    "zero": ([0] * E, [0] * E),
    "none to down": ([4] * E, [0] * E),
}
runs_kernels = pytest.mark.skipif(
    not (ON_GPU or INTERPRETED), reason="without a GPU these run in a process of their own"
)


def random_block(ranks="ragged", d=D, f=F):
    "Experts with random factors of the ranks of that name, the same ones on every call"
    torch.manual_seed(0)
    none = [0] * E
    inner, outer = RANKS[ranks]
    original = original_experts(d, f, E, K, device=DEVICE)
    wide = dict(gate=(none, inner), up=(none, inner), down=(none, outer))
    return random_experts(original, **wide).requires_grad_(False)


def routed(T, case="some", d=D):
    "Tokens, experts and weights of one of the cases that go wrong most easily"
    torch.manual_seed(1)
    weights, index = torch.randn(T, E).softmax(-1).topk(K)
    if case == "all to one":
        index = torch.tensor([[2, 4]]).expand(T, K)
    if case == "empty experts":
        index = index % 2 + 2
    if case == "out of range":
        index = torch.where(torch.rand(T, K) < 0.3, torch.tensor([E, -1]), index)
    if case == "no expert at all":
        index = torch.full_like(index, E)
    x_Td = torch.randn(T, d)
    if case == "not contiguous":
        x_Td, index = torch.randn(d, T).t(), index.t().contiguous().t()
    return tuple(value.to(DEVICE) for value in (x_Td, index, weights))


def expected(experts, x_Td, index, weights):
    "The plain form in float64; an index out of range stands for no expert"
    index = index.where(index >= 0, E)
    return copy.deepcopy(experts).double().plain_forward(x_Td.double(), index, weights.double())


def relative(a, b):
    "Relative difference"
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.skipif(ON_GPU or bool(INTERPRETED), reason="kernels run in this process")
def test_kernels_under_the_interpreter():
    "All tests of this file that run kernels"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    variables = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert " passed" in done.stdout


@runs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("name", ["14_kernels", "15_original_kernels"])
def test_cells_that_run_kernels(name, capsys, monkeypatch):
    "The notebooks, with the cells that are marked so"
    monkeypatch.setitem(FUSED, NAME, FUSED[NAME])  # which the notebook defines again
    skipped = ["slow"] if ON_GPU else ["slow", "cuda"]
    passed, _ = nbdev.test.test_nb(ROOT / "nbs" / f"{name}.ipynb", skip_flags=skipped)
    assert passed, capsys.readouterr().err


ODD = ("all to one", "empty experts", "out of range", "no expert at all", "not contiguous")
CASES = [("ragged", 3, case) for case in ("some", *ODD)]
CASES += [("ragged", 17, case) for case in ("some", "out of range")]
CASES += [("ragged", T, "some") for T in (0, 1, 64, 257)]
CASES += [(ranks, T, "some") for ranks in ("equal", "zero", "none to down") for T in (1, 17)]
CASES = [(*case, "float") for case in CASES]
CASES += [(*case, "int8") for case in (("ragged", 3, "some"), ("ragged", 17, "out of range"))]
CASES += [("ragged", T, "some", "int8") for T in (0, 1, 64)]
CASES += [("zero", T, "some", "int8") for T in (1, 17)]


@runs_kernels
@pytest.mark.parametrize("ranks, T, case, weights", CASES)
@torch.no_grad()
def test_forms_equal_the_plain_form(ranks, T, case, weights, monkeypatch):
    "Both of them for three tokens, the one that is taken for any other number"
    experts, batch = random_block(ranks), routed(T, case)
    if weights == "int8":
        round_layer(experts)
    reference = expected(experts, *batch)
    for most in (0, 16) if T == 3 else (16,):
        monkeypatch.setattr(kernels, "MOST_DECODED", most)
        result = triton_forward(experts, *batch)
        assert result.shape == reference.shape and result.dtype == batch[0].dtype
        assert relative(result, reference) < 1e-5


@runs_kernels
@torch.no_grad()
def test_any_sizes_compute_the_same(monkeypatch):
    "Tiles so small that every loop takes several steps, found in the table of tuned sizes"
    experts = random_block("ragged", d=72, f=56)
    small = dict(
        decode_inner=dict(BN=8, BK=32),
        decode_hidden=dict(BF=32, BR=16),
        decode_outer=dict(BD=16, BR=32),
        blocks=dict(BM=16),
        project=dict(BR=16, BK=32),
        project_back=dict(BR=16, BK=32),
        hidden=dict(BF=32, BR=16),
        expand=dict(BD=32, BR=16),
        sum=dict(BN=32),
    )
    used = []
    sizes_of = kernels.sizes_of
    monkeypatch.setattr(kernels, "sizes_of", lambda shape: used.append(shape) or sizes_of(shape))
    for T in (1, 20):
        batch = routed(T, "out of range", d=72)
        usual = triton_forward(experts, *batch)
        monkeypatch.setitem(TUNED, used[-1], small)
        tuned = triton_forward(experts, *batch)
        assert used[-1] == used[-2]
        reference = expected(experts, *batch)
        assert relative(usual, reference) < 1e-5 and relative(tuned, reference) < 1e-5


@runs_kernels
@torch.no_grad()
def test_same_bits_again():
    "Sums have a fixed order"
    experts = random_block()
    for T in (3, 17):
        batch = routed(T)
        assert torch.equal(triton_forward(experts, *batch), triton_forward(experts, *batch))


@runs_kernels
@torch.no_grad()
def test_generation_from_one_graph():
    "A layer of a compressed model, traced with all around it as one graph, with a static cache"
    model, _ = load_tiny()
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model, _ = compress_model(model, CompressionConfig(ratio=0.25, rounds=1))
    model = model.to(DEVICE)
    tokens = torch.tensor([[3, 5, 7]], device=DEVICE)

    def logits(**options):
        settings = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True)
        result = model.generate(tokens, return_dict_in_generate=True, **settings, **options)
        return torch.stack(result.logits)

    model.set_experts_implementation("shared_core_plain")
    reference = logits()
    model.set_experts_implementation(NAME)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert relative(logits(cache_implementation="static"), reference.double()) < 1e-4
    torch._dynamo.reset()


@torch.no_grad()
def test_choice():
    "The kernels on a GPU alone, and there for what they can compute"
    experts, batch = random_block(), routed(3)
    assert FUSED[NAME][1] is triton_forward
    assert (fastest(experts, *batch[:2]) is triton_forward) == ON_GPU
    if not (INTERPRETED or ON_GPU):
        with pytest.raises(ValueError, match="not on a GPU.*choose shared_core"):
            triton_forward(experts, *batch)
    with torch.enable_grad():
        assert fastest(experts, *batch[:2]) is not triton_forward
    experts.layout = experts.layout._replace(has_bias=True)
    assert fastest(experts, *batch[:2]) is SharedCoreExperts.plain_forward


@pytest.mark.skipif(bool(INTERPRETED), reason="once is enough")
def test_package_works_without_triton():
    "The form is there, and says what is missing when it is asked for by name"
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["triton"] = None
import torch, moe_nb.kernels
from moe_nb.hf_names import ALL_EXPERTS_FUNCTIONS
from moe_nb.shared_core import original_experts, random_experts
ranks = [0] * 3, [2] * 3
experts = random_experts(original_experts(8, 6, 3), gate=ranks, up=ranks, down=ranks)
batch = torch.randn(2, 8), torch.tensor([[0, 1], [2, 0]]), torch.ones(2, 2)
with torch.no_grad():
    experts(*batch)
    try:
        ALL_EXPERTS_FUNCTIONS[{NAME!r}](experts, *batch)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "Triton is not installed; choose shared_core" in done.stdout, done.stderr


POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compiled_for_h100(kernel, arguments, options):
    "A kernel compiled for that GPU as a launch with these arguments would compile it"
    bound = dict(zip(kernel.arg_names, arguments))
    bound |= {name: value for name, value in options.items() if name in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    rest = {name: value for name, value in options.items() if name not in bound}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=rest)


def stack_bytes(cubin, path):
    "Bytes of memory that a compiled kernel needs for what does not fit into registers"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", said)[1])


@pytest.mark.skipif(ON_GPU or bool(INTERPRETED), reason="compiles what it does not run")
@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
@pytest.mark.parametrize("T", [1, 512])
@torch.no_grad()
def test_kernels_compile_for_a_gpu(T, weights_dtype, monkeypatch, tmp_path):
    "For an H100, with the dimensions of Qwen3-30B-A3B, tokens in bfloat16: shared memory and registers suffice"
    launched = []

    def launch(self, *arguments, grid, warmup, **options):
        launched.append((self, arguments, options))

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    d, f, E, K, rank = 2048, 768, 128, 8, 80
    rank_E = torch.full((E,), rank, dtype=torch.int32)
    shapes = dict(gate_fd=(f, d), up_fd=(f, d), down_fd=(f, d))
    shapes |= dict(V_inner_Sd=(E * rank, d), V_outer_Sd=(E * rank, d))
    shapes |= {name: (E * rank, f) for name in ("G_gate_Sf", "G_up_Sf", "G_outer_Sf")}
    tensors = {name: torch.empty(shape, dtype=weights_dtype) for name, shape in shapes.items()}
    if weights_dtype == torch.int8:
        for name in ("gate_scale_f", "up_scale_f", "down_scale_f"):
            tensors[name] = torch.empty(f, dtype=torch.bfloat16)
        for name in ("inner_scale_S", "outer_scale_S"):
            tensors[name] = torch.empty(E * rank, dtype=torch.bfloat16)
    layer = Layer(**tensors, inner_rank_E=rank_E, outer_rank_E=rank_E)
    x_Td, weights = (torch.empty(T, n, dtype=torch.bfloat16) for n in (d, K))
    kernels.fused(x_Td, torch.zeros(T, K, dtype=torch.int64), weights, layer.tensors, "silu")
    rival = SimpleNamespace(
        gate_up_proj=torch.empty(E, 2 * f, d, dtype=torch.bfloat16),
        down_proj=torch.empty(E, d, f, dtype=torch.bfloat16),
    )
    original_triton(rival, x_Td, torch.zeros(T, K, dtype=torch.int64), weights)
    assert len(launched) == (3 + 2 if T == 1 else 8 + 5)
    for kernel, arguments, options in launched:
        made = compiled_for_h100(kernel, arguments, options)
        assert made.metadata.shared <= 227 * 1024, kernel
        assert stack_bytes(made.asm["cubin"], tmp_path / "cubin") == 0, kernel
