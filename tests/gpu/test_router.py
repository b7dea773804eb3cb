"""The router on a GPU: models' sizes against the definition, graphs, and a layer behind it."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest
import torch

import megamoe
from megamoe import router_reference
from megamoe.router_config import RouterConfig
from tests.gpu.configs import ROUTERS
from tests.gpu.harness import assert_correct, inputs_of, poison, shared_moe
from tests.routers import ABSOLUTE, RELATIVE, arguments_for, empty, exact, on_the_machine

pytestmark = pytest.mark.gpu

KERNEL_DIR = os.environ.get("MEGAMOE_KERNEL_DIR")
CONFIGS = {name: RouterConfig(**fields) for name, fields in ROUTERS.items()}
#: Choices, in float32, that are nearer than this may be taken for equal.
NEAR = 2e-6


def route(config: RouterConfig, logits: torch.Tensor, **given):
    names = "score", "softmax_over", "num_groups", "topk_groups", "renormalize"
    settings = {name: getattr(config, name) for name in names}
    return megamoe.route(logits, config.top_k, kernel_dir=KERNEL_DIR, **settings, **given)


def assert_same(config: RouterConfig, got, given: dict) -> None:
    """The definition's experts, but for tokens that rounding decides, which are few; of the others
    the same weights.
    """
    idx, weights = exact(config, **given)
    same = (got[0].long() == idx).all(dim=1)
    assert same.float().mean() > 0.995
    torch.testing.assert_close(
        got[1][same].double(), weights[same], rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True
    )
    for row in (~same).nonzero()[:, 0].tolist():
        mine, theirs = got[0][row].tolist(), idx[row].tolist()
        assert len(set(mine)) == config.top_k
        choice = router_reference.scores_of(config, given["logits"][row, None].double())[0]
        if config.correction_bias:
            choice = choice + given["correction_bias"]
        if config.num_groups == 1:  # else another group may have been kept
            assert (choice[mine] - choice[theirs]).abs().max() < NEAR


@pytest.mark.parametrize("tokens", [1, 2, 3, 133, 4096])
@pytest.mark.parametrize("name", CONFIGS)
def test_against_the_definition(name, tokens):
    config = CONFIGS[name]
    given = arguments_for(config, tokens, seed=tokens, device="cuda")
    given["routed_scaling_factor"] = 2.5
    got = route(config, **given)
    assert got[0].dtype == torch.int64
    assert_same(config, got, given)
    as_int32 = route(config, **given, idx_dtype=torch.int32)
    assert torch.equal(as_int32[0].long(), got[0]) and torch.equal(as_int32[1], got[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bits_of_a_gpu_are_those_of_the_machine(name):
    """Experts and weights: whatever is approximate is corrected behind it."""
    config = CONFIGS[name]
    given = arguments_for(config, 16, seed=5)
    here = on_the_machine(config, checks=False, **given)
    there = route(config, **{name: tensor.cuda() for name, tensor in given.items()})
    assert torch.equal(here[0], there[0].cpu()) and torch.equal(here[1], there[1].cpu())


@pytest.mark.parametrize("name", [name for name in CONFIGS if not CONFIGS[name].hashed])
def test_equals_nan_and_infinities(name):
    config = CONFIGS[name]
    given = arguments_for(config, 300, seed=6, device="cuda")
    logits = torch.randint(0, 4, given["logits"].shape, device="cuda").float()
    some = torch.rand(logits.shape, device="cuda")
    logits[:50] = logits[:50].masked_fill(some[:50] < 0.02, math.nan)
    logits[50:100] = logits[50:100].masked_fill(some[50:100] < 0.98, -math.inf)
    logits[100:150] = logits[100:150].masked_fill(some[100:150] < 0.02, math.inf)
    logits[150], logits[151], logits[152] = math.nan, -math.inf, 0.0
    given["logits"] = logits.to(given["logits"].dtype)
    if config.correction_bias:
        given["correction_bias"] = torch.zeros(config.num_experts, device="cuda")
    got, expected = route(config, **given), exact(config, **given)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(
        got[1].double(), expected[1], rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True
    )
    assert all(len(set(row)) == config.top_k for row in got[0].tolist())


def test_a_graph_reads_logits_and_the_number_of_tokens_anew():
    config = CONFIGS["v3"]
    given = arguments_for(config, 64, seed=7, device="cuda")
    number = torch.tensor([64], dtype=torch.int32, device="cuda")
    out = empty(config, 64, torch.int32, "cuda")
    route(config, **given, num_tokens=number, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        route(config, **given, num_tokens=number, out=out)
    for seed, count in ((8, 64), (9, 17), (10, 0)):
        given["logits"].copy_(arguments_for(config, 64, seed=seed, device="cuda")["logits"])
        number.fill_(count)
        for part in out:
            part.fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        assert (out[0][count:] == -1).all() and (out[1][count:] == 0).all()
        assert_same(config, out, given | {"num_tokens": number})


def test_a_capture_needs_a_kernel_that_has_run():
    config = replace(CONFIGS["v3"], top_k=7)
    given = arguments_for(config, 4, seed=0, device="cuda")
    message = "call it once before a graph is captured"
    with (
        pytest.raises(RuntimeError, match=message),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        route(config, **given)
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["small1", "block1"])
def test_a_layer_behind_the_router_in_a_graph(name):
    """The layer begins beside the router, and waits for it."""
    moe = shared_moe(name)
    [x], _, _ = inputs_of(moe, "uniform", seed=11, tokens=100)
    config = CONFIGS["small"]
    assert (config.num_experts, config.top_k) == (moe.config.num_experts, moe.config.top_k)
    given = arguments_for(config, 100, seed=12, device="cuda")
    number = torch.tensor([100], dtype=torch.int32, device="cuda")

    def forward():
        idx, weights = route(config, **given, num_tokens=number)
        return idx, weights, moe(x, idx, weights)

    forward()
    moe.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        idx, weights, y = forward()
    for seed, count in ((13, 100), (14, 61), (15, 100)):
        given["logits"].copy_(arguments_for(config, 100, seed=seed, device="cuda")["logits"])
        number.fill_(count)
        poison(moe)
        idx.fill_(-1)
        graph.replay()
        moe.synchronize()
        assert (idx[:count] >= 0).all() and (idx[count:] == -1).all()
        assert_same(config, (idx, weights), given | {"num_tokens": number})
        assert_correct(moe, [y], [x], [idx], [weights])
