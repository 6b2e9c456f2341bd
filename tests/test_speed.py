"That every fast form of the experts computes what the materialised experts compute, in value and in gradient."

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_nb.fast_experts import FORMS, fastest, grouped_forward, loop_forward, pairs_forward
from moe_nb.shared_core import SharedCoreExperts, materialized, original_experts, random_experts

D, F, E, K = 64, 32, 6, 2
RANKS = {"ragged": [3, 0, 8, 1, 5, 2], "equal": [8] * E, "zero": [0] * E}
FAST = dict(loop=loop_forward, grouped=grouped_forward, pairs=pairs_forward)


def random_block(narrow="ragged", wide="ragged", shared=True):
    "Experts with random factors of the ranks of that name, the same ones on every call"
    torch.manual_seed(0)
    narrow, wide = RANKS[narrow], RANKS[wide]
    return random_experts(
        original_experts(D, F, E, K),
        gate=(narrow, wide),
        up=(narrow[::-1], wide),
        down=(narrow, wide[::-1]),
        shared_V=shared,
    )


def routed(case, dtype=torch.float32):
    "Inputs of one of the cases that go wrong most easily"
    torch.manual_seed(1)
    T = {"one": 1, "none": 0, "many": 300}.get(case, 12)
    x = torch.randn(T, D)
    weights, index = torch.randn(T, E).softmax(-1).topk(K)
    if case == "all to one":
        index = torch.tensor([[4, 1]]).expand(T, K)
    if case == "empty experts":
        index = index % 2 + 2
    if case == "beyond the last":
        index = torch.where(torch.rand(T, K) < 0.5, E, index)
    if case == "not contiguous":
        x = torch.randn(D, T).t()
        index = index.t().contiguous().t()
        weights = torch.rand(K, 2 * T).t()[::2]
    return x.to(dtype), index, weights.to(dtype)


def eager(experts):
    "The materialised experts, in the eager form of transformers"
    full = materialized(experts)
    full.config = copy.deepcopy(full.config)
    full.config._experts_implementation = "eager"
    return full


def reference(experts, x, index, weights):
    "What the materialised experts compute, in float32 or better"
    dtype = torch.promote_types(x.dtype, torch.float32)
    full = eager(copy.deepcopy(experts).to(dtype))
    # an index beyond the last stands for no expert: of weight 0 here, and unknown to transformers before 5.20
    return full(x.to(dtype), index.clamp_max(E - 1), weights.to(dtype))


def relative(a, b):
    "Relative difference"
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


CASES = [
    "some",
    "one",
    "none",
    "many",
    "all to one",
    "empty experts",
    "beyond the last",
    "not contiguous",
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize(
    "narrow, wide, shared",
    [
        ("ragged", "ragged", True),
        ("ragged", "ragged", False),
        ("zero", "equal", True),
        ("equal", "zero", True),
        ("zero", "zero", True),
    ],
)
@torch.no_grad()
def test_forms_equal_materialised_experts(narrow, wide, shared, form, case):
    experts, batch = random_block(narrow, wide, shared), routed(case)
    if case == "beyond the last":
        batch[2][batch[1] == E] = 0  # as transformers does it before its experts
    expected = reference(experts, *batch)
    result = FAST[form](experts, *batch)
    assert result.shape == expected.shape and result.dtype == batch[0].dtype
    assert relative(result, expected) < 1e-5


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("case", ["some", "one", "many"])
@torch.no_grad()
def test_bf16_is_as_near_as_the_original_in_bf16(form, case):
    "The error against float32 is no more than twice that of the materialised experts in bf16"
    experts = random_block().to(torch.bfloat16)
    batch = routed(case, torch.bfloat16)
    expected = reference(experts, *batch)
    error = relative(FAST[form](experts, *batch).float(), expected)
    usual_error = relative(eager(experts)(*batch).float(), expected)
    assert error < 2 * usual_error < 0.02


@pytest.mark.parametrize("case", ["some", "one", "all to one", "beyond the last"])
@pytest.mark.parametrize("form", ["grouped", "pairs", "checkpointed"])
@pytest.mark.parametrize(
    "narrow, wide, shared", [("ragged", "ragged", True), ("ragged", "equal", False)]
)
def test_gradients_equal_those_of_the_plain_form(narrow, wide, shared, form, case):
    experts = random_block(narrow, wide, shared).double()
    x, index, weights = routed(case, torch.float64)
    parameters = [p for p in experts.parameters() if p.numel()]

    def gradients(compute):
        own_x, own_weights = (value.clone().requires_grad_() for value in (x, weights))
        result = compute(experts, own_x, index, own_weights)
        (result * torch.arange(1.0, D + 1)).sum().backward()
        grads = [leaf.grad for leaf in (own_x, own_weights, *parameters)]
        experts.zero_grad(set_to_none=True)
        return grads

    def checkpointed(*args):
        return checkpoint(*args, use_reentrant=False)

    plain = gradients(SharedCoreExperts.plain_forward)
    assert all(g is not None for g in plain)
    for a, b in zip(gradients(FAST.get(form, checkpointed)), plain):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["shared_core", "shared_core_grouped", "shared_core_pairs"])
@pytest.mark.parametrize("change", ["optimizer", "load", "to", "edit", "data"])
def test_next_forward_uses_new_values(form, change):
    experts, batch = random_block(), list(routed("some"))
    experts.template.config._experts_implementation = form
    with torch.no_grad():
        before = experts(*batch)
    if change == "optimizer":
        experts(*batch).square().sum().backward()
        torch.optim.SGD(experts.parameters(), lr=1e-2).step()
    if change == "load":
        other = random_block("equal").state_dict()
        values = {}
        for name, value in experts.state_dict().items():
            if "ranks" not in name:
                same_shape = other[name].shape == value.shape
                values[name] = other[name] if same_shape else value + 1
        experts.load_state_dict(values, strict=False)
    if change == "to":
        experts.to(torch.bfloat16).to(torch.float32)
        experts.gate.core.data.add_(0.1)
    if change == "edit":
        with torch.no_grad():
            experts.down.G[3] += 1
    if change == "data":
        experts.up.core = torch.nn.Parameter(torch.randn(F, D))
    with torch.no_grad():
        after = experts(*batch)
        assert relative(after, reference(experts, *batch)) < 1e-5
        assert relative(after, before) > 1e-4


def test_new_ranks_are_seen():
    experts, batch = random_block(), routed("some")
    with torch.no_grad():
        for form in FAST.values():
            form(experts, *batch)
        experts.gate.wide_ranks.copy_(torch.tensor(RANKS["ragged"][::-1]))
        experts.up.wide_ranks.copy_(torch.tensor(RANKS["ragged"][::-1]))
        expected = reference(experts, *batch)
        for form in FAST.values():
            assert relative(form(experts, *batch), expected) < 1e-5


def test_choice():
    "The loop without gradient, plain with one, plain for what the loop does not know"
    experts, (x, index, _) = random_block(), routed("some")
    assert fastest(experts, x, index) is SharedCoreExperts.plain_forward
    with torch.no_grad():
        assert fastest(experts, x, index) is loop_forward
        assert fastest(experts, x.double(), index) is SharedCoreExperts.plain_forward
        with torch.autocast("cpu", torch.bfloat16):
            assert fastest(experts, x, index) is SharedCoreExperts.plain_forward
        experts.layout = experts.layout._replace(has_bias=True)
        assert fastest(experts, x, index) is SharedCoreExperts.plain_forward


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_block(dtype):
    "One graph, with and without gradient, and new weights without compiling again"
    experts, batch = random_block().to(dtype), routed("some", dtype)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    compiled = torch.compile(experts, fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(*batch), experts.plain_forward(*batch)) < bound
        experts.down.core.mul_(2)
        assert relative(compiled(*batch), experts.plain_forward(*batch)) < bound
    parameters = [p for p in experts.parameters() if p.numel()]
    compiled(*batch).square().sum().backward()
    grads = [p.grad.clone() for p in parameters]
    experts.zero_grad()
    experts.plain_forward(*batch).square().sum().backward()
    for a, p in zip(grads, parameters):
        assert relative(a, p.grad) < 30 * bound
    torch._dynamo.reset()


@torch.no_grad()
def test_names_compute_the_same():
    experts, batch = random_block(), routed("some")
    expected = reference(experts, *batch)
    for name in ["eager", "grouped_mm", None, *FORMS]:
        experts.template.config._experts_implementation = name
        assert relative(experts(*batch), expected) < 1e-5
