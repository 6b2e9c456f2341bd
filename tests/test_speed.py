"That every fast form of the experts computes what the materialised experts compute, in value and in gradient."

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moe_nb.fast_experts import FORMS, fastest, grouped_forward, loop_forward, pairs_forward
from moe_nb.shared_core import SharedCore, SharedCoreExperts, materialized

D, F, E, K = 64, 32, 6, 2
RANKS = {"ragged": [3, 0, 8, 1, 5, 2], "equal": [8] * E, "zero": [0] * E}
FAST = dict(loop=loop_forward, grouped=grouped_forward, pairs=pairs_forward)


def random_core(narrow, wide, V=True):
    R, S = sum(narrow), sum(wide)
    return SharedCore(
        core=torch.randn(F, D) / D**0.5,
        P=torch.randn(R, F) / F,
        Q=torch.randn(R, F) / F,
        G=torch.randn(S, F) / F,
        V=torch.randn(S, D) / D**0.5 if V else None,
        narrow_ranks=torch.tensor(narrow, dtype=torch.int32),
        wide_ranks=torch.tensor(wide, dtype=torch.int32),
    )


def random_experts(narrow="ragged", wide="ragged", shared=True):
    torch.manual_seed(0)
    narrow, wide = RANKS[narrow], RANKS[wide]
    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K
    )
    return SharedCoreExperts(
        Qwen3MoeExperts(config),
        gate=random_core(narrow, wide),
        up=random_core(narrow[::-1], wide, V=not shared),
        down=random_core(narrow, wide[::-1]),
    ).eval()


def routed(case, dtype=torch.float32):
    "Inputs of one of the cases that go wrong most easily"
    torch.manual_seed(1)
    T = {"one": 1, "none": 0, "many": 300}.get(case, 12)
    x, (weights, index) = torch.randn(T, D), torch.randn(T, E).softmax(-1).topk(K)
    if case == "all to one":
        index = torch.tensor([[4, 1]]).expand(T, K)
    if case == "empty experts":
        index = index % 2 + 2
    if case == "beyond the last":
        index = torch.where(torch.rand(T, K) < 0.5, E, index)
    if case == "not contiguous":
        x, index, weights = (
            torch.randn(D, T).t(),
            index.t().contiguous().t(),
            torch.rand(K, 2 * T).t()[::2],
        )
    return x.to(dtype), index, weights.to(dtype)


def reference(experts, x, index, weights):
    "The materialised experts, in the eager form of transformers; float32 or better"
    wide = copy.deepcopy(experts).to(torch.promote_types(x.dtype, torch.float32))
    full = materialized(wide)
    full.config = copy.deepcopy(full.config)
    full.config._experts_implementation = "eager"
    return full(x.to(full.down_proj.dtype), index, weights.to(full.down_proj.dtype))


def relative(a, b):
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
    experts, batch = random_experts(narrow, wide, shared), routed(case)
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
    experts = random_experts().to(torch.bfloat16)
    batch = routed(case, torch.bfloat16)
    expected = reference(experts, *batch)
    full = materialized(experts)
    full.config = copy.deepcopy(full.config)
    full.config._experts_implementation = "eager"
    assert (
        relative(FAST[form](experts, *batch).float(), expected)
        < 2 * relative(full(*batch).float(), expected)
        < 0.02
    )


@pytest.mark.parametrize("case", ["some", "one", "all to one", "beyond the last"])
@pytest.mark.parametrize("form", ["grouped", "pairs", "checkpointed"])
@pytest.mark.parametrize(
    "narrow, wide, shared", [("ragged", "ragged", True), ("ragged", "equal", False)]
)
def test_gradients_equal_those_of_the_plain_form(narrow, wide, shared, form, case):
    experts, (x, index, weights) = (
        random_experts(narrow, wide, shared).double(),
        routed(case, torch.float64),
    )

    def gradients(compute):
        leaves = [
            x.clone().requires_grad_(),
            weights.clone().requires_grad_(),
            *(p for p in experts.parameters() if p.numel()),
        ]
        (compute(experts, leaves[0], index, leaves[1]) * torch.arange(1.0, D + 1)).sum().backward()
        grads = [leaf.grad for leaf in leaves]
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
    experts, batch = random_experts(), list(routed("some"))
    experts.template.config._experts_implementation = form
    with torch.no_grad():
        before = experts(*batch)
    if change == "optimizer":
        experts(*batch).square().sum().backward()
        torch.optim.SGD(experts.parameters(), lr=1e-2).step()
    if change == "load":
        other = random_experts("equal").state_dict()  # other ranks too, where the sum is the same
        experts.load_state_dict(
            {
                name: other[name] if other[name].shape == value.shape else value + 1
                for name, value in experts.state_dict().items()
                if "ranks" not in name
            },
            strict=False,
        )
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
        assert relative(after, reference(experts, *batch)) < 1e-5 and relative(after, before) > 1e-4


def test_new_ranks_are_seen():
    experts, batch = random_experts(), routed("some")
    with torch.no_grad():
        for form in FAST.values():
            form(experts, *batch)
        experts.gate.wide_ranks.copy_(torch.tensor(RANKS["ragged"][::-1]))
        experts.up.wide_ranks.copy_(torch.tensor(RANKS["ragged"][::-1]))
        expected = reference(experts, *batch)
        assert all(relative(form(experts, *batch), expected) < 1e-5 for form in FAST.values())


def test_choice():
    "The loop without gradient, plain with one, plain for what the loop does not know"
    experts, (x, index, _) = random_experts(), routed("some")
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
    experts, batch = random_experts().to(dtype), routed("some", dtype)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    compiled = torch.compile(experts, fullgraph=True)
    with torch.no_grad():
        assert relative(compiled(*batch), experts.plain_forward(*batch)) < bound
        experts.down.core.mul_(2)
        assert relative(compiled(*batch), experts.plain_forward(*batch)) < bound
    compiled(*batch).square().sum().backward()
    grads = [p.grad.clone() for p in experts.parameters() if p.numel()]
    experts.zero_grad()
    experts.plain_forward(*batch).square().sum().backward()
    assert all(
        relative(a, p.grad) < 30 * bound
        for a, p in zip(grads, (p for p in experts.parameters() if p.numel()))
    )
    torch._dynamo.reset()


@torch.no_grad()
def test_names_compute_the_same():
    experts, batch = random_experts(), routed("some")
    expected = reference(experts, *batch)
    for name in ["eager", "grouped_mm", None, *FORMS]:
        experts.template.config._experts_implementation = name
        assert relative(experts(*batch), expected) < 1e-5
