"""The router: the kernel on a CPU against its definition, the definition against loops and against
the routers of models, and what `route` refuses.
"""

from __future__ import annotations

import math

import pytest
import torch

import megamoe
from megamoe import compile
from megamoe.dsl import HAVE_DSL
from megamoe.machine.machine import Machine
from megamoe.router_config import RouterConfig, canonical
from tests.routers import (
    CONFIGS,
    GPT_OSS,
    ODD,
    QWEN3,
    V3,
    V4,
    V4_HASHED,
    arguments_for,
    assert_same_routing,
    empty,
    enqueue,
    exact,
    on_the_machine,
)

pytestmark = pytest.mark.usefixtures("one_thread")
needs_the_dsl = [
    pytest.mark.compile,
    pytest.mark.skipif(not HAVE_DSL, reason="the kernel is built here"),
]


def on_a_device(function):
    for mark in needs_the_dsl:
        function = mark(function)
    return function


LEARNED = {name: config for name, config in CONFIGS.items() if not config.hashed}


# --- The kernel against its definition ------------------------------------------------------------


@on_a_device
@pytest.mark.parametrize("name", CONFIGS)
def test_the_kernel(name):
    config, tokens = CONFIGS[name], 61  # the last CTA has one
    given = arguments_for(config, tokens, seed=1) | {"routed_scaling_factor": 2.5}
    got = on_the_machine(config, **given)
    assert_same_routing(got, exact(config, **given))
    as_int32 = on_the_machine(config, dtype=torch.int32, **given)
    assert torch.equal(as_int32[0].long(), got[0]) and torch.equal(as_int32[1], got[1])


@on_a_device
@pytest.mark.parametrize("name", LEARNED)
def test_the_lowest_of_equals_comes_first(name):
    """Experts and groups, of few values."""
    config = LEARNED[name]
    given = arguments_for(config, 40, seed=2)
    rng = torch.Generator().manual_seed(2)
    given["logits"] = torch.randint(0, 4, given["logits"].shape, generator=rng).to(
        given["logits"].dtype
    )
    given["logits"][0] = 1.0
    given["logits"][1] = -0.0  # equal to the others
    given["logits"][1, ::3] = 0.0
    if config.correction_bias:
        given["correction_bias"] = torch.zeros(config.num_experts)
    got = on_the_machine(config, **given)
    assert got[0][:2].tolist() == 2 * [list(range(config.top_k))]
    assert_same_routing(got, exact(config, **given))


@on_a_device
@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_scores_to_the_last_places(score):
    """Alone: their sum does not hide what all of them have in common."""
    config = RouterConfig(16, 16, score, renormalize=False, hashed=True)
    logits = torch.linspace(-86, 86, 40 * 16).reshape(40, 16)
    logits[20:] /= 20
    logits[39] = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e30, 1e-30, -1e-30, -1e30] * 2)
    table = torch.arange(16)[None]
    ids = torch.zeros(40, dtype=torch.int64)
    got = on_the_machine(config, logits, tid2eid=table, input_ids=ids)[1]
    _, expected = exact(config, logits, tid2eid=table, input_ids=ids)
    torch.testing.assert_close(got.double(), expected, rtol=2.5e-7, atol=0)


@on_a_device
def test_lanes_without_an_expert_choose_nothing():
    """Groups of three experts in four lanes: the fourth is not the first of the next group."""
    config = RouterConfig(24, 6, "sigmoid", num_groups=8, topk_groups=2, correction_bias=True)
    bias = torch.full((24,), -math.inf)
    bias[[0, 6, 7]] = 0.0  # one in the first group, two in the third
    given = {"logits": torch.zeros(3, 24), "correction_bias": bias}
    got = on_the_machine(config, **given)
    assert got[0].tolist() == 3 * [[0, 6, 7, 1, 2, 8]]
    assert_same_routing(got, exact(config, **given))


def hard_rows(config: RouterConfig, seed: int) -> torch.Tensor:
    """Rows with NaN, infinities, huge and tiny values."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, config.num_experts, generator=rng)
    some = torch.rand(logits.shape, generator=rng)
    logits[0], logits[1], logits[2] = math.nan, -math.inf, math.inf
    logits[3:9] = logits[3:9].masked_fill(some[3:9] < 0.05, math.nan)
    logits[9:15] = logits[9:15].masked_fill(some[9:15] < 0.95, -math.inf)
    logits[15:18] = logits[15:18].masked_fill(some[15:18] < 0.1, math.inf)
    logits[18:24] = logits[18:24].masked_fill(some[18:24] < 0.3, -math.nan)
    logits[24:28] *= 30.0
    logits[28:32] *= 1e-30
    logits[32:36] *= 1e30
    return logits.to(getattr(torch, config.logits))


@on_a_device
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_nan_and_infinities(name):
    """No expert twice, none out of range, and what the definition says."""
    config = CONFIGS[name]
    given = arguments_for(config, 40, seed=3)
    given["logits"] = hard_rows(config, seed=3)
    if config.correction_bias:  # in steps, so that rounding of scores decides nothing
        given["correction_bias"] = (given["correction_bias"] * 8).round() / 4
        given["correction_bias"][5] = math.nan
        given["correction_bias"][6] = -math.inf
    got = on_the_machine(config, **given)
    idx = got[0]
    assert idx.min() >= 0 and idx.max() < config.num_experts
    assert all(len(set(row)) == config.top_k for row in idx.tolist())
    expected = exact(config, **given)
    # Scores that saturate in float32 are equal there, and the lowest index comes first.
    saturates = config.correction_bias or config.num_groups > 1
    rows = [r for r in range(40) if not (saturates and r in range(24, 36))]
    mine = idx[rows], got[1][rows]
    # A softmax of large logits has the rounding of their differences in its exponents.
    assert_same_routing(mine, tuple(part[rows] for part in expected), relative=5e-6)


@on_a_device
@pytest.mark.parametrize("name", ["v3", "v4_hashed", "gpt_oss"])
@pytest.mark.parametrize("how", ["number", "tensor", "mask", "tensor and mask"])
def test_padding_has_no_expert(name, how):
    config = CONFIGS[name]
    given = arguments_for(config, 11, seed=4)
    given["logits"][7:] = math.nan  # nobody looks
    if how == "number":
        given["num_tokens"] = 7
    if "tensor" in how:
        given["num_tokens"] = torch.tensor([7], dtype=torch.int32)
    if "mask" in how:
        given["mask"] = torch.arange(11) < (5 if how == "tensor and mask" else 7)
        given["mask"][2] = False
    got = on_the_machine(config, **given)
    padding = torch.arange(11) >= 7 if "mask" not in how else ~given["mask"]
    assert (got[0][padding] == -1).all() and (got[1][padding] == 0).all()
    assert (got[0][~padding] >= 0).all()
    assert_same_routing(got, exact(config, **given))


@on_a_device
@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.int64, torch.int32)])
def test_a_table_names_experts_or_nobody(dtypes):
    """Ids and entries out of range have no expert and no part in the sum."""
    given = arguments_for(V4_HASHED, 9, seed=5)
    given["tid2eid"][3, 1] = -1
    given["tid2eid"][4] = V4_HASHED.num_experts
    given["tid2eid"][5, 0] = 1 << 30
    given["input_ids"] = torch.tensor([3, 4, 5, -1, 50, 49, 0, -(1 << 30), 1 << 30])
    if dtypes[0] == torch.int64:
        given["tid2eid"][5, 2] = (1 << 32) + 1  # not 1
        given["input_ids"][6] = 1 << 32
    given["tid2eid"] = given["tid2eid"].to(dtypes[0])
    given["input_ids"] = given["input_ids"].clamp(max=2**31 - 1).to(dtypes[1])
    if dtypes[1] == torch.int64:
        given["input_ids"][6] = 1 << 32
    got = on_the_machine(V4_HASHED, **given)
    assert_same_routing(got, exact(V4_HASHED, **given))
    assert (got[0][0] >= 0).tolist() == [True, False, True, True, True, True]
    assert (got[0][[1, 3, 4]] == -1).all()
    assert got[1].sum(1)[[0, 5]].tolist() == pytest.approx([1.0, 1.0])


@on_a_device
def test_rows_with_a_gap_between_them():
    given = arguments_for(V3, 6, seed=6)
    wide = torch.full((6, V3.num_experts + 20), math.nan)
    wide[:, 4:-16] = given["logits"]
    given["logits"] = wide[:, 4:-16]
    assert_same_routing(on_the_machine(V3, **given), exact(V3, **given))


@on_a_device
def test_a_launch_waits_for_the_one_before_though_it_begins_beside_it():
    """The experts of one launch are the table of the next; with the race detector."""
    first, second = arguments_for(V4, 8, seed=7), arguments_for(V4_HASHED, 5, seed=7)
    idx, weights = empty(V4, 8)
    second |= {"tid2eid": idx, "input_ids": torch.tensor([0, 7, 3, 1, 6])}
    out = empty(V4_HASHED, 5)
    machine = Machine(compile.cache_dir(), checks=True)
    enqueue(machine, V4, out=(idx, weights), **first)
    enqueue(machine, V4_HASHED, out=out, **second)
    machine.run()
    assert_same_routing((idx, weights), exact(V4, **first))
    assert_same_routing(out, exact(V4_HASHED, **second))


# --- The definition -------------------------------------------------------------------------------


def scalar(score: str, logit: float) -> float:
    if score == "sigmoid":
        return 1.0 / (1.0 + math.exp(-logit))
    return math.sqrt(math.log1p(math.exp(logit)))


@pytest.mark.parametrize("name", ["v3", "v4"])
def test_the_definition_against_loops(name):
    """From the papers: biased scores choose, groups are judged by their two best."""
    config = CONFIGS[name]
    given = arguments_for(config, 12, seed=8)
    idx, weights = exact(config, **given, routed_scaling_factor=2.5)
    size = config.group_size
    for token, row in enumerate(given["logits"].tolist()):
        scores = [scalar(config.score, logit) for logit in row]
        biased = [s + b for s, b in zip(scores, given["correction_bias"].tolist(), strict=True)]
        groups = [sum(sorted(biased[g * size : g * size + size])[-2:])
                  for g in range(config.num_groups)]  # fmt: skip
        kept = sorted(range(config.num_groups), key=lambda g: -groups[g])[: config.topk_groups]
        left = [e for e in range(config.num_experts) if e // size in kept]
        chosen = sorted(left, key=lambda e: -biased[e])[: config.top_k]
        assert idx[token].tolist() == chosen
        total = sum(scores[e] for e in chosen)
        expected = [2.5 * scores[e] / total for e in chosen]
        assert weights[token].tolist() == pytest.approx(expected)


def test_softmax_over_all_and_over_the_chosen():
    given = arguments_for(QWEN3, 5, seed=9)
    rows = given["logits"].double().softmax(1).topk(QWEN3.top_k)
    got = exact(QWEN3, **given)
    assert torch.equal(got[0], rows.indices)
    torch.testing.assert_close(got[1], rows.values / rows.values.sum(1, keepdim=True))
    plain = exact(RouterConfig(128, 16, renormalize=False), **given)
    torch.testing.assert_close(plain[1], rows.values)
    chosen = exact(canonical(RouterConfig(128, 16, softmax_over="chosen")), **given)
    torch.testing.assert_close(chosen[1], got[1])  # the same number in another way


@pytest.mark.parametrize("name", CONFIGS)
def test_route_on_a_cpu_is_the_definition(name):
    config = CONFIGS[name]
    given = arguments_for(config, 20, seed=10)
    settings = dict(
        score=config.score, softmax_over=config.softmax_over, num_groups=config.num_groups,
        topk_groups=config.topk_groups, renormalize=config.renormalize,
        num_tokens=18, routed_scaling_factor=1.5,
    )  # fmt: skip
    got = megamoe.route(given.pop("logits"), config.top_k, **settings, **given)
    given = arguments_for(config, 20, seed=10)
    expected = exact(config, **given, num_tokens=18, routed_scaling_factor=1.5)
    assert got[0].dtype == torch.int64 and got[1].dtype == torch.float32
    assert_same_routing(got, expected)
    logits = given.pop("logits").requires_grad_()
    out = empty(config, 20, torch.int32)
    again = megamoe.route(logits, config.top_k, out=out, **settings, **given)
    assert again[0] is out[0] and again[1] is out[1] and not out[1].requires_grad
    assert_same_routing(out, (got[0], got[1]))


@pytest.mark.parametrize("name", ["v3", "v4_hashed"])
def test_a_compiled_model_routes_as_an_eager_one(name):
    """Without a break in the graph; the operator says what it writes."""
    config = CONFIGS[name]
    given = arguments_for(config, 12, seed=11)
    settings = dict(score=config.score, num_groups=config.num_groups,
                    topk_groups=config.topk_groups)  # fmt: skip

    def model(logits, number, **given):
        idx, weights = megamoe.route(
            logits * 2, config.top_k, num_tokens=number, **settings, **given
        )
        return idx + 1, weights * 3

    logits = given.pop("logits")
    for number in (9, torch.tensor([5], dtype=torch.int32)):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got, expected = compiled(logits, number, **given), model(logits, number, **given)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- Arguments ------------------------------------------------------------------------------------

LOGITS = torch.zeros(4, 64)
BIAS = torch.zeros(64)
TABLE = torch.zeros(9, 4, dtype=torch.int32)
IDS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logits": [1.0]}, "logits must be a tensor [T, E], got list"),
        ({"logits": torch.zeros(4)}, "logits must be a tensor [T, E], got [4]"),
        ({"logits": LOGITS.half()}, "logits='float16' is not supported"),
        ({"logits": torch.zeros(4, 513)}, "num_experts=513 must be in 1..512"),
        ({"logits": torch.zeros(4, 0)}, "num_experts=0 must be in 1..512"),
        ({"logits": LOGITS.T.contiguous().T}, "neighbouring columns, their strides are (1, 4)"),
        ({"logits": torch.zeros(4, 66)[:, 1:65]}, "begin at multiples of 8 bytes"),
        ({"logits": LOGITS.to("meta")}, "logits are on meta"),
        ({"top_k": 17}, "top_k=17 must be in 1..16"),
        ({"top_k": 0}, "top_k=0 must be in 1..16"),
        ({"top_k": 2.0}, "top_k=2.0 must be an integer"),
        ({"score": "relu"}, "score='relu' is not supported; choose one of ['softmax', "),
        ({"softmax_over": "some"}, "softmax_over='some' is not supported"),
        ({"softmax_over": "chosen", "score": "sigmoid"}, "score='sigmoid' does not go with"),
        ({"softmax_over": "chosen", "correction_bias": BIAS}, "correction_bias does not go with"),
        ({"softmax_over": "chosen", "num_groups": 8}, "num_groups=8 does not go with"),
        ({"renormalize": 1}, "renormalize=1 must be True or False"),
        ({"num_groups": 3}, "num_groups=3 must be a power of two in 1..32"),
        ({"num_groups": 64}, "num_groups=64 must be a power of two in 1..32"),
        ({"num_groups": 8, "logits": torch.zeros(4, 60)}, "num_experts=60 is not divisible by"),
        ({"num_groups": 32, "logits": torch.zeros(4, 32)}, "num_groups=32 leaves groups of 1"),
        ({"num_groups": 8, "topk_groups": 9}, "topk_groups=9 must be in 1..8"),
        ({"num_groups": 32, "topk_groups": 1}, "top_k=4 is more than the 2 experts of topk_gr"),
        ({"correction_bias": BIAS[1:]}, "correction_bias has shape [63], expected [64]"),
        ({"correction_bias": BIAS.double()}, "correction_bias has dtype float64, expected float32"),
        ({"correction_bias": torch.zeros(65)[1:]}, "correction_bias must have rows that begin"),
        ({"correction_bias": torch.zeros(64, 2)[:, 0]}, "correction_bias must be contiguous"),
        ({"routed_scaling_factor": "2"}, "routed_scaling_factor='2' must be a number"),
        ({"num_tokens": 5}, "num_tokens=5 must be in 0..4"),
        ({"num_tokens": 2.0}, "num_tokens=2.0 must be an integer or a tensor"),
        ({"num_tokens": torch.tensor([1])}, "num_tokens has dtype int64, expected int32"),
        ({"num_tokens": torch.zeros(2, dtype=torch.int32)}, "num_tokens has shape [2]"),
        ({"mask": torch.ones(4)}, "mask has dtype float32, expected bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask has shape [3], expected [4]"),
        ({"tid2eid": TABLE}, "tid2eid and input_ids go together"),
        ({"input_ids": IDS}, "tid2eid and input_ids go together"),
        ({"tid2eid": TABLE[:, :3], "input_ids": IDS}, "tid2eid has shape [9, 3], expected [9, 4]"),
        ({"tid2eid": TABLE[:0], "input_ids": IDS}, "tid2eid has no row"),
        ({"tid2eid": TABLE.float(), "input_ids": IDS}, "tid2eid has dtype float32, expected int32"),
        ({"tid2eid": TABLE, "input_ids": IDS[:3]}, "input_ids has shape [3], expected [4]"),
        ({"tid2eid": TABLE, "input_ids": IDS, "correction_bias": BIAS}, "does not go with tid2eid"),
        ({"tid2eid": TABLE, "input_ids": IDS, "num_groups": 2}, "does not go with tid2eid"),
        ({"idx_dtype": torch.int16}, "idx_dtype=torch.int16 must be torch.int64 or torch.int32"),
        ({"out": LOGITS}, "out must be a pair"),
        ({"out": (IDS, BIAS)}, "out[0], topk_idx, has shape [4], expected [4, 4]"),
        ({"out": (TABLE[:4], BIAS)}, "out[1], topk_weights, has shape [64], expected [4, 4]"),
        ({"out": (TABLE[:4], TABLE[:4])}, "out[1], topk_weights, has dtype int32"),
    ],
)  # fmt: skip
def test_what_is_refused(given, message):
    arguments = {"logits": LOGITS, "top_k": 4} | given
    with pytest.raises(ValueError) as caught:
        megamoe.route(**arguments)
    assert message in str(caught.value)


def test_no_tokens():
    idx, weights = megamoe.route(torch.zeros(0, 64), 4)
    assert idx.shape == weights.shape == (0, 4)


def test_one_kernel_for_routers_that_do_the_same():
    names = {
        compile.router_program(config).name()
        for config in (
            RouterConfig(64, 4, softmax_over="chosen"),
            RouterConfig(64, 4, softmax_over="chosen", renormalize=False),
            RouterConfig(64, 4),
            RouterConfig(64, 4, num_groups=8, topk_groups=8),
        )
    }
    assert len(names) == 2
    assert all(name.startswith("megamoe-router-sm_90a-") for name in names)


def test_bytes_of_a_load_fit_every_lane():
    for experts in range(1, 513):
        for groups in (1, 2, 4, 8, 16, 32):
            for item in (2, 4):
                config = RouterConfig(experts, 1, num_groups=groups)
                if experts % groups or config.group_size < 2:
                    continue
                size = config.load_bytes(item)
                lanes, held = config.lanes_per_group, config.experts_per_lane
                assert lanes * held >= config.group_size
                assert held * item % size == config.group_size * item % size == 0
                assert size >= item or item == 4 and size == 4


def test_models_load_sixteen_bytes():
    assert RouterConfig(256, 8, num_groups=8, topk_groups=4).load_bytes(4) == 16
    assert RouterConfig(384, 6).load_bytes(4) == 16 and RouterConfig(256, 8).load_bytes(2) == 16
    assert RouterConfig(ODD.num_experts, 4).load_bytes(2) == 2
    assert GPT_OSS.load_bytes(4) == 4
