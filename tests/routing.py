"""Hard routings by name: what the top-k of every rank may look like when it is least convenient.

`make_routing` returns, for every rank, `topk_idx` int64 [T, K] (-1 masked) and `topk_weights`
float32 [T, K]. The weight of a masked slot is NaN, because nobody may read it. Results depend on
the arguments alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch

MASKED = -1


def seed_of(*parts: str) -> int:
    """The same in every process, unlike `hash`."""
    return zlib.crc32("/".join(parts).encode()) % 1000


def _distinct(num_tokens: int, top_k: int, probability_E: torch.Tensor, rng) -> torch.Tensor:
    """[T, K] draws; without repeats while there are enough experts with a chance."""
    if num_tokens == 0:
        return torch.empty(0, top_k, dtype=torch.int64)
    repeats = int((probability_E > 0).sum()) < top_k
    return torch.multinomial(probability_E.expand(num_tokens, -1), top_k, repeats, generator=rng)


def _uniform(world, rank, tokens, top_k, experts, rng):
    return _distinct(tokens, top_k, torch.ones(experts), rng)


def _skewed(world, rank, tokens, top_k, experts, rng):
    """A few experts take most rows (Zipf, exponent 1.5); they do not lie on one rank."""
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(experts))
    probability = torch.empty(experts)
    probability[order] = 1.0 / torch.arange(1, experts + 1) ** 1.5
    return _distinct(tokens, top_k, probability, rng)


def _all_to_one_expert(world, rank, tokens, top_k, experts, rng):
    """Every slot of every rank names the last expert: the largest count that one expert can see."""
    return torch.full((tokens, top_k), experts - 1, dtype=torch.int64)


def _all_to_one_rank(world, rank, tokens, top_k, experts, rng):
    """Every slot goes to the experts of the last rank."""
    probability = torch.zeros(experts)
    probability[experts - experts // world :] = 1.0
    return _distinct(tokens, top_k, probability, rng)


def _masked(world, rank, tokens, top_k, experts, rng):
    """Half of the slots are masked, at any position; every fourth token is masked altogether."""
    idx = _distinct(tokens, top_k, torch.ones(experts), rng)
    idx[torch.rand(tokens, top_k, generator=rng) < 0.5] = MASKED
    idx[::4] = MASKED
    return idx


def _all_masked(world, rank, tokens, top_k, experts, rng):
    return torch.full((tokens, top_k), MASKED, dtype=torch.int64)


def _silent_rank(world, rank, tokens, top_k, experts, rng):
    """Rank 0 receives nothing (with one rank: nobody receives anything)."""
    if world == 1:
        return _all_masked(world, rank, tokens, top_k, experts, rng)
    probability = torch.ones(experts)
    probability[: experts // world] = 0.0
    return _distinct(tokens, top_k, probability, rng)


def _repeated_expert(world, rank, tokens, top_k, experts, rng):
    """The last slot of a token names the expert of its first slot again."""
    idx = _distinct(tokens, top_k, torch.ones(experts), rng)
    idx[:, -1] = idx[:, 0]
    return idx


_MAKERS: dict[str, Callable] = {
    "uniform": _uniform,
    "skewed": _skewed,
    "all_to_one_expert": _all_to_one_expert,
    "all_to_one_rank": _all_to_one_rank,
    "masked": _masked,
    "all_masked": _all_masked,
    "ragged": _uniform,
    "silent_rank": _silent_rank,
    "repeated_expert": _repeated_expert,
}

ROUTINGS = tuple(_MAKERS)


def ragged_tokens(world: int, tokens: int, seed: int) -> list[int]:
    """Token counts of a ragged launch: the largest is `tokens`, one is zero (two ranks or more)."""
    rng = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, tokens + 1, (world,), generator=rng).tolist()
    counts[seed % world] = tokens
    if world > 1:
        counts[(seed + 1) % world] = 0
    return counts


def make_routing(
    name: str, world: int, tokens: int, top_k: int, experts: int, seed: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(topk_idx per rank, topk_weights per rank); all ranks have `tokens` tokens unless ragged."""
    counts = ragged_tokens(world, tokens, seed) if name == "ragged" else [tokens] * world
    all_idx, all_weights = [], []
    for rank in range(world):
        rng = torch.Generator().manual_seed(1009 * seed + rank)
        idx = _MAKERS[name](world, rank, counts[rank], top_k, experts, rng)
        weights = torch.rand(idx.shape, generator=rng) + 0.1
        weights = weights / weights.sum(dim=-1, keepdim=True)
        weights[idx == MASKED] = float("nan")
        all_idx.append(idx)
        all_weights.append(weights)
    return all_idx, all_weights
