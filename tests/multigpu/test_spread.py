"""Eight and sixteen ranks on two or four GPUs equal as many virtual ranks on one, bit for bit."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from tests.gpu.harness import (
    assert_workspace_at_rest,
    forward,
    inputs_of,
    poison_workspace,
    shared_moe,
)
from tests.multigpu.conftest import missing
from tests.multigpu.spread import Spread
from tests.routing import ROUTINGS, seed_of

pytestmark = pytest.mark.gpu

NAMES = ("small8", "one_expert_per_rank", "sixteen_ranks", "stress8", "block_stress8")
LAUNCHES, CASES, BETWEEN_CHECKS = 2000, 12, 100


@functools.cache
def spread_of(name: str, num_gpus: int) -> Spread:
    reason = missing(num_gpus)
    if reason:
        pytest.skip(reason)
    return Spread(name, num_gpus)


def case(name: str, routing: str, seed: int):
    """(inputs, what one GPU computes from them)."""
    inputs = inputs_of(shared_moe(name), routing, seed)
    return inputs, forward(shared_moe(name), *inputs)


@pytest.mark.parametrize("num_gpus", [2, 4])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_results_equal_those_of_one_gpu(name, routing, num_gpus):
    spread = spread_of(name, num_gpus)
    inputs, expected = case(name, routing, seed_of(name, routing))
    for backend in spread.backends:
        poison_workspace(backend.workspace)
    spread.synchronize()  # a GPU that is done must not write into one that is still poisoned
    outputs = spread.launch(spread.place(inputs))
    spread.synchronize()
    for rank, output in enumerate(spread.by_rank(outputs)):
        assert torch.equal(output.to(expected[rank].device), expected[rank]), f"rank {rank}"
    for backend in spread.backends:
        assert_workspace_at_rest(backend.workspace)


@pytest.mark.slow
@pytest.mark.parametrize("num_gpus", [2, 4])
@pytest.mark.parametrize("name", ["stress8", "block_stress8"])
def test_many_launches(name, num_gpus):
    spread, choose = spread_of(name, num_gpus), random.Random(7)
    routings = list(ROUTINGS)
    cases = []
    for number in range(CASES):
        inputs, expected = case(name, routings[number % len(routings)], number)
        cases.append((spread.place(inputs), spread.place([expected])))
    wrong = [torch.zeros((), dtype=torch.int64, device=b.device) for b in spread.backends]
    for launch in range(LAUNCHES):
        placed, expected = choose.choice(cases)
        for gpu, outputs in enumerate(spread.launch(placed)):
            with torch.cuda.device(wrong[gpu].device):
                for output, right in zip(outputs, expected[gpu][0], strict=True):
                    wrong[gpu] += (output != right).any()
        if launch % BETWEEN_CHECKS == 0:
            spread.synchronize()
    spread.synchronize()
    assert [int(count) for count in wrong] == [0] * len(wrong)
    for backend in spread.backends:
        assert_workspace_at_rest(backend.workspace)
