"""The baseline made of DeepEP and DeepGEMM, over torch stand-ins for the calls that it makes."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megamoe import reference
from perf.against import deepep
from perf.against.experts import MAX_FP8_ERROR, dequantise
from perf.running import session
from perf.running.contenders import baseline_contenders
from perf.running.timing import EAGER
from perf.workload.cases import Case, Model, make_rank_inputs
from perf.workload.stored import make_layer_weights
from tests.unit.perf_helpers import error_line, pretend_gpu

FP8 = torch.float8_e4m3fn
EXPERTS, TOP_K, HIDDEN = 6, 3, 256
#: Codes of hidden rows flip, because gate and up are rounded to bf16: no error of the wiring.
FLIPS = 0.03


class FakeBuffer:
    """DeepEP's buffer of one rank, which sends to itself, in another order."""

    def __init__(self, group, num_nvl_bytes, num_rdma_bytes):
        assert num_nvl_bytes == 2 * HIDDEN and num_rdma_bytes == 0

    @staticmethod
    def get_dispatch_config(num_ranks):
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda row_bytes, ranks: row_bytes)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx, num_experts):
        assert topk_idx.dtype == torch.int64
        is_in_rank = (topk_idx >= 0).any(dim=1, keepdim=True)
        to_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return is_in_rank.sum(dim=0).int(), None, to_expert, is_in_rank, None

    def dispatch(
        self,
        x,
        *,
        topk_idx,
        topk_weights,
        num_tokens_per_rank,
        is_token_in_rank,
        num_tokens_per_expert,
        expert_alignment,
    ):
        data, scales = x
        assert data.dtype == FP8 and scales.shape == (data.shape[0], HIDDEN // 128)
        assert scales.dtype == topk_weights.dtype == torch.float32
        assert data.is_contiguous() and scales.is_contiguous()
        sent = is_token_in_rank[:, 0].nonzero()[:, 0].flip(0)
        assert sent.numel() == num_tokens_per_rank.item()
        align = expert_alignment
        counts = [-(-count // align) * align for count in num_tokens_per_expert.tolist()]
        rows = data.view(torch.uint8)[sent].view(FP8), scales[sent]
        handle = sent, data.shape[0]
        return rows, topk_idx[sent], topk_weights[sent], counts, handle, None

    def combine(self, x, handle):
        sent, num_tokens = handle
        assert x.dtype == torch.bfloat16 and x.shape == (sent.numel(), HIDDEN)
        assert x.is_contiguous()
        return x.new_zeros(num_tokens, HIDDEN).index_copy_(0, sent, x), None, None


def grouped_gemm(a, b, d, m_indices):
    """DeepGEMM's grouped product; a tile belongs to the expert of its first row, and rows without
    an expert come out as NaN.
    """
    (a, a_scales), (b, b_scales) = a, b
    (rows, depth), (_, width, _) = a.shape, b.shape
    assert a.dtype == b.dtype == FP8 and d.dtype == torch.bfloat16 and d.shape == (rows, width)
    assert a_scales.shape == (rows, depth // 128)
    assert b_scales.shape == (b.shape[0], width // 128, depth // 128)
    assert a_scales.dtype == b_scales.dtype == torch.float32
    assert m_indices.dtype == torch.int32 and m_indices.shape == (rows,)
    assert all(tensor.is_contiguous() for tensor in (a, b, d, a_scales, b_scales, m_indices))
    assert rows and rows % 128 == 0
    for first in range(0, rows, 128):
        tile = slice(first, first + 128)
        expert = int(m_indices[first])
        assert expert >= 0 and set(m_indices[tile].tolist()) <= {expert, -1}
        product = dequantise(a[tile], a_scales[tile]) @ dequantise(b[expert], b_scales[expert]).T
        d[tile] = product.to(d.dtype)
    d[m_indices < 0] = float("nan")


@pytest.fixture
def fakes(monkeypatch):
    modules = {"deep_ep": {"Buffer": FakeBuffer}}
    modules["deep_gemm"] = {"m_grouped_fp8_gemm_nt_contiguous": grouped_gemm}
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def case_of(tokens: int, routing: str = "balanced") -> Case:
    model = Model("small", HIDDEN, intermediate=128, num_experts=EXPERTS, top_k=TOP_K)
    return Case(model, num_ranks=1, tokens=tokens, routing=routing, precision="fp8_block")


def routing_of(name: str, drawn: torch.Tensor) -> torch.Tensor:
    ids = drawn.clone()
    if name == "holes":  # also a token without any expert
        ids[::3, 1] = -1
        ids[5] = -1
    elif name == "uneven":  # one expert fills tiles, one has a row, three have none
        ids[:] = torch.tensor([4, -1, 2])
        ids[1:, 2] = -1
        ids[7, 1] = 0
    elif name == "twice":  # one expert in two slots of a token
        ids[:, 1] = ids[:, 0]
    elif name == "nothing":
        ids[:] = -1
    return ids


@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("routing", ["drawn", "holes", "uneven", "twice", "nothing"])
def test_is_the_layer_but_for_flipped_codes(routing, clamp, fakes):
    case = case_of(tokens=200)
    weights, inputs = make_layer_weights(case), make_rank_inputs(case, 0)
    ids = routing_of(routing, inputs.topk_idx)
    layer = deepep.DeepEpDeepGemm(*weights[:2], num_ranks=1, scales=weights[2:], clamp=clamp)
    out = layer(inputs.x, ids, inputs.topk_weights)
    expected = reference.moe_forward(
        inputs.x, ids, inputs.topk_weights, *weights, precision=case.precision, clamp=clamp
    )
    assert out.shape == expected.shape and out.dtype == expected.dtype
    assert reference.relative_error(out, expected) < FLIPS < MAX_FP8_ERROR
    assert not out[(ids < 0).all(dim=1)].any()


def test_weights_are_not_copied(fakes):
    weights = make_layer_weights(case_of(tokens=1))
    layer = deepep.DeepEpDeepGemm(*weights[:2], num_ranks=1, scales=weights[2:])
    held = layer.w13[0], layer.w2[0], layer.w13[1], layer.w2[1]
    assert all(one is other for one, other in zip(held, weights, strict=True))


def test_the_contender_takes_the_quantised_weights_alone(fakes, monkeypatch):
    case = case_of(tokens=9, routing="masked")
    weights = make_layer_weights(case)
    job = SimpleNamespace(alone=False, size=1)
    plan = SimpleNamespace(case=case, baselines=(deepep.NAME,), mode="graph", device="cpu")
    monkeypatch.setattr("perf.running.contenders.make_weights", None)
    (contender,) = baseline_contenders(plan, job, weights, case.model.experts)
    assert (contender.impl, contender.mode) == (deepep.NAME, EAGER)
    assert contender.max_error == MAX_FP8_ERROR
    inputs = make_rank_inputs(case, 0)
    (out,) = contender.prepare([inputs])()
    expected = reference.moe_forward(
        inputs.x, inputs.topk_idx, inputs.topk_weights, *weights, precision=case.precision
    )
    assert reference.relative_error(out, expected) < FLIPS


@pytest.mark.parametrize(
    ("precision", "processes", "verify", "reason"),
    [
        ("bf16", True, True, "needs --precision fp8_block, not bf16"),
        ("fp8_channel", True, True, "not fp8_channel"),
        ("fp8_block", False, True, "torchrun"),
        ("fp8_block", True, False, "--verify"),
    ],
)
def test_where_it_is_not_offered(precision, processes, verify, reason, fakes):
    deepep.check_available("fp8_block", True, True)
    with pytest.raises(ValueError, match=reason):
        deepep.check_available(precision, processes, verify)


@pytest.mark.parametrize("missing", deepep.MODULES)
@pytest.mark.parametrize("name", ["deepep-deepgemm", "deepep_deepgemm"])
def test_a_missing_module_is_a_line_before_anything_starts(
    name, missing, fakes, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, missing, None)  # importing it raises ImportError
    pretend_gpu(monkeypatch, count=2)
    monkeypatch.setattr(session, "joined", None)
    for variable, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(variable, value)
    assert f"needs the module {missing}:" in error_line(
        ["sweep", "--device", "cuda", "--precision", "fp8_block", "--baseline", name], capsys
    )


def test_without_torchrun_the_command_says_so(capsys):
    assert "torchrun" in error_line(
        ["sweep", "--precision", "fp8_block", "--baseline", "deepep-deepgemm"], capsys
    )
