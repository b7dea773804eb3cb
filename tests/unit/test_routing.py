"""The routings of the other tests are what their names say."""

from __future__ import annotations

import pytest
import torch

from tests.routing import MASKED, ROUTINGS, make_routing, ragged_tokens

SHAPES = [
    (1, 5, 2, 4),
    (2, 16, 3, 8),
    (8, 9, 4, 32),
    (4, 1, 6, 4),
    (2, 0, 2, 4),
    (8, 64, 8, 8),
    (2, 8, 1, 2),
]
CASES = [pytest.param(name, *shape, id=f"{name}-{shape}") for name in ROUTINGS for shape in SHAPES]


@pytest.mark.parametrize("name,world,tokens,top_k,experts", CASES)
def test_every_routing_is_well_formed(name, world, tokens, top_k, experts):
    all_idx, all_weights = make_routing(name, world, tokens, top_k, experts, seed=3)
    assert len(all_idx) == len(all_weights) == world
    for idx, weights in zip(all_idx, all_weights, strict=True):
        assert idx.dtype == torch.int64 and weights.dtype == torch.float32
        assert idx.is_contiguous() and weights.is_contiguous()
        assert idx.shape == weights.shape and idx.shape[1] == top_k
        assert idx.shape[0] <= tokens
        assert ((idx >= MASKED) & (idx < experts)).all()
        assert weights[idx != MASKED].isfinite().all() and (weights[idx != MASKED] > 0).all()
        assert weights[idx == MASKED].isnan().all()
    if name != "ragged":
        assert all(idx.shape[0] == tokens for idx in all_idx)


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_depends_on_the_seed_alone(name):
    first, first_weights = make_routing(name, 2, 16, 3, 8, seed=1)
    again, again_weights = make_routing(name, 2, 16, 3, 8, seed=1)
    assert all(map(torch.equal, first, again))
    for a, b in zip(first_weights, again_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if name not in ("all_to_one_expert", "all_masked"):
        other, _ = make_routing(name, 2, 16, 3, 8, seed=2)
        assert not all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True)
        )


def all_routing(name, world=8, tokens=64, top_k=4, experts=32):
    return torch.cat(make_routing(name, world, tokens, top_k, experts, seed=0)[0])


def repeats(idx):
    ordered = idx.sort(dim=1).values
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(dim=1)


@pytest.mark.parametrize("name", ["uniform", "skewed", "all_to_one_rank", "masked", "silent_rank"])
def test_tokens_name_distinct_experts(name):
    assert not repeats(all_routing(name)).any()


def test_names_are_true():
    assert repeats(all_routing("repeated_expert")).all()
    assert (all_routing("all_to_one_expert") == 31).all()
    assert (all_routing("all_to_one_rank") // 4 == 7).all()
    assert (all_routing("all_masked") == MASKED).all()
    assert (all_routing("silent_rank") // 4 != 0).all()
    masked = all_routing("masked") == MASKED
    assert 0.4 < masked.float().mean() < 0.8 and masked.all(dim=1).any()
    counts = all_routing("skewed").flatten().bincount(minlength=32)
    assert counts.max() > 4 * counts.float().mean()
    uniform = all_routing("uniform").flatten().bincount(minlength=32)
    assert uniform.min() > 0 and uniform.max() < 2 * uniform.float().mean()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("world", [1, 2, 8])
def test_ragged_counts(world, seed):
    counts = ragged_tokens(world, 20, seed)
    assert len(counts) == world and max(counts) == 20
    assert world == 1 or min(counts) == 0
    all_idx, _ = make_routing("ragged", world, 20, 2, 8 * world, seed)
    assert [idx.shape[0] for idx in all_idx] == counts


def test_unknown_name():
    with pytest.raises(KeyError):
        make_routing("no such routing", 1, 1, 1, 1)
