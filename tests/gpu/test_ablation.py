"""The parts of a launch alone: they end, leave counters at rest, and do their part."""

from __future__ import annotations

import pytest
import torch

from megamoe import reference
from megamoe.backends import in_places
from megamoe.config import COMBINE, DISPATCH, GEMMS
from perf.commands.ablation import FILL
from tests.gpu.configs import ALONE
from tests.gpu.harness import assert_at_rest, forward, inputs_of, make_moe, poison, quantized
from workspace.layout import COUNTER, RESET_KINDS

pytestmark = pytest.mark.gpu

#: One launch each: the next of its kind finds what the last left.
ROUTINGS = ("uniform", "skewed", "masked")


def alone(part: str) -> list[str]:
    """The configurations of a part whose ring holds every row."""
    return [name for name in ALONE if ALONE[name]["kernel"] == {"only": part}]


def launches(name: str):
    """(layer, inputs, outputs) after each of three launches."""
    moe = make_moe(name)
    only = moe.kernel_config.only
    poison(moe)
    FILL.get(only, lambda moe: None)(moe)
    for seed, routing in enumerate(ROUTINGS):
        inputs = inputs_of(moe, routing, seed)
        outputs = forward(moe, *inputs)
        assert_at_rest(moe, [COUNTER] if only == DISPATCH else RESET_KINDS)
        yield moe, inputs, outputs


def received(moe, ids, rank: int, expert: int) -> torch.Tensor:
    """[N, 2] (source rank, token) of the rows that a local expert receives."""
    expert += rank * moe.config.experts_per_rank
    return torch.cat(
        [
            torch.stack([torch.full_like(tokens, source), tokens], dim=1)
            for source, idx in enumerate(ids)
            for tokens in [(idx == expert).nonzero()[:, 0]]
        ]
    )


def real_rows(moe, ids, rank: int):
    """(expert, rows of its pool) of every local expert with rows, in the order of the pool."""
    first, block = 0, moe.kernel_config.block_m
    for expert in range(moe.config.local_experts):
        count = len(received(moe, ids, rank, expert))
        yield expert, slice(first, first + count)
        first += -(-count // block) * block


def multiset(*columns: torch.Tensor) -> list[bytes]:
    """The rows of tensors side by side, in an order of their own."""
    packed = [column.clone(memory_format=torch.contiguous_format) for column in columns]
    parts = [column.view(torch.uint8).cpu().numpy() for column in packed]
    return sorted(b"".join(part[i].tobytes() for part in parts) for i in range(len(parts[0])))


@pytest.mark.parametrize("name", ALONE)
def test_a_part_ends_and_leaves_counters_at_rest(name):
    assert len(list(launches(name))) == len(ROUTINGS)


@pytest.mark.parametrize("name", alone(DISPATCH))
def test_dispatch_puts_every_row_into_its_experts_blocks(name):
    for moe, (xs, ids, _), _ in launches(name):
        stored, scales = (xs, []) if not moe.config.recipe.tokens.has_scales else quantized(moe, xs)
        if moe.config.recipe.weights.packed:
            stored = [in_places(rows) for rows in stored]
        for rank in moe.local_ranks:
            regions = moe.workspace.regions(rank)
            pools = [regions["l1_token_buffer"]]
            if scales:
                pools.append(regions["l1_scale_buffer"].transpose(1, 2).flatten(0, 1))
            for expert, rows in real_rows(moe, ids, rank):
                sources = received(moe, ids, rank, expert).tolist()
                if not sources:
                    continue
                wanted = [
                    torch.stack(
                        [side[source][token].view(torch.uint8) for source, token in sources]
                    )
                    for side in (stored, scales)
                    if side
                ]
                assert multiset(*(pool[rows] for pool in pools)) == multiset(*wanted)


@pytest.mark.parametrize("name", alone(COMBINE))
def test_combine_adds_what_the_slots_hold(name):
    for moe, (_, ids, _), outputs in launches(name):
        for rank, idx, out in zip(moe.local_ranks, ids, outputs, strict=True):
            slots = moe.workspace.regions(rank)["combine_output"][: idx.shape[0]]
            assert torch.equal(out, reference.combine(slots, idx).to(out.dtype))


@pytest.mark.parametrize("name", alone(GEMMS))
def test_gemms_store_hidden_rows_and_no_row_of_fc2(name):
    for moe, (_, ids, _), _ in launches(name):
        for rank in moe.local_ranks:
            regions = moe.workspace.regions(rank)
            hidden = regions["fc1_output"].float()
            for _, rows in real_rows(moe, ids, rank):
                assert hidden[rows].isfinite().all() and hidden[rows].any(dim=1).all()
            assert regions["combine_output"].isnan().all()  # as it was poisoned
