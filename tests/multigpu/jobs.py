"""Jobs of the tests in which every rank does its part: each runs on every worker."""

from __future__ import annotations

import os
import random
import time

import numpy
import torch

from megamoe.integrations import experts
from megamoe.reference import Weights
from tests.experts import NAME, Experts
from tests.gpu import harness
from tests.multigpu import layer
from tests.multigpu.launcher import Context

MAX_DELAY_S = 0.02


def bits(tensor: torch.Tensor) -> numpy.ndarray:
    """The bytes of a bf16 tensor, as they travel between processes."""
    return tensor.contiguous().view(torch.int16).cpu().numpy()


def oracle(context: Context, name: str, routing: str, seed: int, tokens: int | None = None) -> None:
    """One forward over poisoned memory against the oracle."""
    moe = layer.shared(context, name)
    layer.poison_together(context, moe)
    inputs = layer.inputs_of(context, moe, routing, seed, tokens)
    layer.assert_correct(moe, layer.forward(moe, inputs), inputs)
    harness.assert_at_rest(moe)


def token_counts(context: Context, name: str, counts: list[int]) -> None:
    for tokens in counts:
        oracle(context, name, "uniform", tokens, tokens)
        context.meet()  # `at rest` looks at words that a peer's next launch writes


def outputs(context: Context, name: str, cases: list[tuple[str, int]]) -> list[numpy.ndarray]:
    """The bits of this rank's output of every (routing, seed)."""
    moe = layer.shared(context, name)
    return [bits(layer.forward(moe, layer.inputs_of(context, moe, *case))) for case in cases]


def virtual_outputs(context: Context, name: str, cases: list[tuple[str, int]]) -> list | None:
    """On rank 0: the same of all ranks, as virtual ranks of this one GPU with the same kernel."""
    if context.rank != 0:
        return None
    moe = layer.construct(context, name, group=None, world=context.world)
    moe.load_weights(*harness.weights_here(moe))
    return [
        [bits(y) for y in harness.forward(moe, *harness.inputs_of(moe, *case))] for case in cases
    ]


def input_buffer(context: Context, name: str) -> None:
    """An x that starts in symmetric memory (quantised, if the recipe has scales), int32 indices and
    `out`: the same bits.
    """
    moe = layer.shared(context, name)
    x, idx, weights = layer.inputs_of(context, moe, "masked", 3)
    expected = layer.forward(moe, (x, idx, weights))
    layer.poison_together(context, moe)
    rows, scale = x, None
    if moe.config.recipe.tokens.has_scales:
        [rows], [scale] = harness.quantized(moe, [x])
        scale = moe.input_scale_buffer()[: x.shape[0]].copy_(scale)
    staged = moe.input_buffer()[: x.shape[0]].copy_(rows)
    out = torch.full_like(x, float("nan"))
    assert moe(staged, idx.int(), weights, scale, out=out) is out
    moe.synchronize()
    assert torch.equal(out, expected)


def counted_rows(context: Context, name: str) -> None:
    """expert_counts: what every rank sent to the experts of this one."""
    moe = layer.shared(context, name)
    everyone = harness.inputs_of(moe, "masked", 4)
    x, idx, weights = (part[context.rank] for part in everyone)
    counts = torch.ones(moe.config.experts_per_rank, dtype=torch.int32, device=context.device)
    moe(x, idx, weights, expert_counts=counts)
    moe.synchronize()
    flat = torch.cat([ids.flatten() for ids in everyone[1]])
    rows = torch.bincount(flat[flat >= 0], minlength=moe.config.num_experts)
    assert torch.equal(counts, (1 + rows.view(context.world, -1)[context.rank]).int())


def graph(context: Context, name: str, routings: list[str], tokens: int) -> None:
    """Replay equals eager with other contents, while hosts are late at random."""
    moe = layer.shared(context, name)
    delays = random.Random(context.rank)
    held = layer.inputs_of(context, moe, "uniform", 0, tokens)
    layer.forward(moe, held)
    replayed, out = layer.capture(moe, held)
    known = []
    for seed, routing in enumerate(routings):
        fresh = layer.inputs_of(context, moe, routing, seed + 20, tokens)
        expected = layer.forward(moe, fresh)
        layer.poison_together(context, moe)
        layer.refill(held, fresh)
        time.sleep(delays.uniform(0, MAX_DELAY_S))
        replayed.replay()
        moe.synchronize()
        assert torch.equal(out, expected), routing
        known.append((fresh, expected))

    wrong = torch.zeros((), dtype=torch.int64, device=context.device)
    for turn in range(4 * len(known)):
        fresh, expected = known[turn * 5 % len(known)]
        if turn % 3 == 0:
            time.sleep(delays.uniform(0, MAX_DELAY_S))
        if turn % 2:
            wrong += (moe(*fresh) != expected).any()
        else:
            layer.refill(held, fresh)
            replayed.replay()
            wrong += (out != expected).any()
    moe.synchronize()
    assert wrong.item() == 0, f"{wrong.item()} of alternating launches differ"
    harness.assert_at_rest(moe)


def first_launch_in_a_capture(context: Context, name: str) -> None:
    moe = layer.make(context, name)
    inputs = layer.inputs_of(context, moe, "skewed", 2)
    replayed, out = layer.capture(moe, inputs)
    replayed.replay()
    moe.synchronize()
    first = out.clone()
    layer.assert_correct(moe, first, inputs)
    assert torch.equal(layer.forward(moe, inputs), first)


def share_a_workspace(context: Context, name: str, rounds: int) -> None:
    """Two layers with other weights (the experts in reverse order) on one workspace."""
    first = layer.shared(context, name)
    second = layer.construct(context, name, workspace=first.workspace)
    assert second.workspace is first.workspace
    weights = harness.all_weights(first)
    backwards = torch.arange(first.config.num_experts - 1, -1, -1, device=context.device)
    flipped = (None if field is None else harness.take(field, backwards) for field in weights)
    layer.load_slice(second, context.rank, Weights(*flipped))
    last = first.config.num_experts - 1
    known = []
    for seed in range(3):
        inputs = x, idx, weights = layer.inputs_of(context, first, "masked", seed)
        reverse = (x, torch.where(idx >= 0, last - idx, idx), weights)
        expected = layer.forward(first, inputs), layer.forward(second, inputs)
        layer.assert_correct(first, expected[0], inputs)
        layer.assert_correct(first, expected[1], reverse)
        known.append((inputs, expected))
    wrong = torch.zeros((), dtype=torch.int64, device=context.device)
    for turn in range(rounds):
        inputs, expected = known[turn % len(known)]
        wrong += (first(*inputs) != expected[0]).any()
        wrong += (second(*inputs) != expected[1]).any()
    second.synchronize()
    first.synchronize()
    assert wrong.item() == 0
    harness.assert_at_rest(first)


def experts_of_a_model(context: Context, name: str, routings: list[str], free: bool) -> None:
    """Experts that every rank's model holds all, each rank running its share of them."""
    moe = layer.shared(context, name)
    weights = harness.all_weights(moe)
    module = Experts(weights.w13.clone(), weights.w2.clone())
    experts.OPTIONS[NAME] = experts.Options(
        max_tokens=moe.config.max_tokens_per_rank,
        group=torch.distributed.group.WORLD,
        kernel_dir=os.environ.get("MEGAMOE_KERNEL_DIR"),
        timeout_s=layer.TIMEOUT_S,
        start_timeout_s=layer.TIMEOUT_S,
        free_weights=free,
    )
    for seed, routing in enumerate(routings):
        inputs = layer.inputs_of(context, moe, routing, seed)
        layer.assert_correct(moe, module(*inputs), inputs)
    found = experts.fused_of(module)
    assert found is not None and found.moe is not None
    assert found.moe.num_local_experts == moe.config.local_experts
    assert free == (not module.gate_up_proj.numel())
    found.moe.synchronize()


def disagree(context: Context, name: str, odd_rank: int, other: str, changes: dict) -> dict:
    """One rank constructs `other` with `changes`; what every rank saw."""
    odd = context.rank == odd_rank
    seen = layer.attempt(
        lambda: layer.construct(context, other if odd else name, **(changes if odd else {}))
    )
    # The next module of the job is in step again.
    moe = layer.shared(context, name)
    layer.forward(moe, layer.inputs_of(context, moe, "uniform", 1))
    return seen
