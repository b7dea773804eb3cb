"""Who is routed where: named distributions of `topk_idx`, and recorded ones.

A routing is written `name`, `name:parameter` or as the path of a recorded file. ROUTINGS lists the
names; each function draws int32 [T, K] for one rank, with -1 for a masked slot, from the rank's own
generator, so the ids depend on seed, token count and rank only. A recorded file (.pt from
torch.save, or .npy) holds integer ids of shape [N, K], dealt to the ranks in order, or [W, N, K].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from perf.arguments import nearest

MASKED = -1
RECORDED_SUFFIXES = (".pt", ".npy")


@dataclass(frozen=True)
class Draw:
    """One rank's draw: T tokens with K slots each over E experts of W ranks."""

    tokens: int
    top_k: int
    num_experts: int
    num_ranks: int
    rank: int
    seed: int
    generator: torch.Generator
    device: torch.device

    @property
    def experts_per_rank(self) -> int:
        return self.num_experts // self.num_ranks

    def rand(self, *shape: int) -> torch.Tensor:
        """Uniform in 0..1."""
        return torch.rand(*shape, generator=self.generator, device=self.device)


def _top_scores(scores_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    return scores_TE.topk(top_k, dim=1).indices.to(torch.int32)


def _uniform(draw: Draw, num_experts: int, top_k: int) -> torch.Tensor:
    """Uniform over the first `num_experts` experts, with repeats only where they are fewer than
    K.
    """
    if num_experts >= top_k:
        return _top_scores(draw.rand(draw.tokens, num_experts), top_k)
    return torch.randint(
        num_experts, (draw.tokens, top_k), generator=draw.generator, device=draw.device,
        dtype=torch.int32,
    )  # fmt: skip


def _shared(draw: Draw, share: float, hot: torch.Tensor, cold) -> torch.Tensor:
    """Rows of `hot` for about `share` of the tokens, of `cold()` for the others."""
    if share == 1:
        return hot
    chosen = draw.rand(draw.tokens, 1) < share
    return torch.where(chosen, hot, cold())


def balanced(draw: Draw, parameter: None = None) -> torch.Tensor:
    """Uniform random experts, no expert twice in a token."""
    return _uniform(draw, draw.num_experts, draw.top_k)


def with_replacement(draw: Draw, parameter: None = None) -> torch.Tensor:
    """Uniform random experts; a token may name one expert in several slots."""
    shape = (draw.tokens, draw.top_k)
    return torch.randint(
        draw.num_experts, shape, generator=draw.generator, device=draw.device, dtype=torch.int32
    )


def zipf(draw: Draw, exponent: float) -> torch.Tensor:
    """The n-th most popular expert is drawn in proportion to 1 / n^exponent, without repeats
    (Gumbel top-k).

    Popularity is a permutation of the experts that depends on the seed alone, so that all ranks
    agree on it.
    """
    experts = draw.num_experts
    order = torch.randperm(experts, generator=torch.Generator().manual_seed(draw.seed))
    log_weight = -exponent * torch.log(1.0 + order.to(draw.device))
    noise = draw.rand(draw.tokens, experts).clamp_min(1e-20)
    return _top_scores(log_weight - torch.log(-torch.log(noise)), draw.top_k)


def hot_expert(draw: Draw, share: float) -> torch.Tensor:
    """The last expert takes slot 0 of that share of all tokens; every other slot is balanced over
    the other experts.
    """
    last = draw.num_experts - 1
    hot = torch.full((draw.tokens, 1), last, dtype=torch.int32, device=draw.device)
    if draw.top_k > 1:
        hot = torch.cat([hot, _uniform(draw, last, draw.top_k - 1)], dim=1)
    return _shared(draw, share, hot, lambda: _uniform(draw, last, draw.top_k))


def hot_rank(draw: Draw, share: float) -> torch.Tensor:
    """That share of all tokens sends every slot to rank 0, the others none: they are balanced over
    the other ranks. Repeats only where these have fewer than K experts. One rank takes all.
    """
    local = draw.experts_per_rank
    hot = _uniform(draw, local, draw.top_k)
    if draw.num_ranks == 1:
        return hot
    return _shared(
        draw, share, hot, lambda: local + _uniform(draw, draw.num_experts - local, draw.top_k)
    )


def masked(draw: Draw, share: float) -> torch.Tensor:
    """Balanced, then that share of the slots masked at random, and the first token of a rank
    whole.
    """
    topk_idx = balanced(draw)
    drop = draw.rand(*topk_idx.shape) < share
    drop[0] = True
    return topk_idx.masked_fill(drop, MASKED)


@dataclass(frozen=True)
class Routing:
    """A function of (draw, parameter); `default` None: takes no parameter."""

    draw: Callable[[Draw, Any], torch.Tensor]
    default: float | None = None
    low: float = 0.0
    high: float = 1.0


ROUTINGS = {
    "balanced": Routing(balanced),
    "random": Routing(with_replacement),
    "zipf": Routing(zipf, default=1.0, high=8.0),
    "hot-expert": Routing(hot_expert, default=1.0),
    "hot-rank": Routing(hot_rank, default=1.0),
    "masked": Routing(masked, default=0.5),
}

#: Names that command lines and stored rows may have for another.
ALIASES = {"skewed": "zipf"}

HELP = (
    f"{', '.join(ROUTINGS)}; zipf:1.2 (exponent), hot-expert:0.3 and hot-rank:0.6 (share of the "
    "tokens), masked:0.2 (share of the slots); or a recorded topk_idx file (.pt, .npy)"
)


def is_recorded(text: str) -> bool:
    """Whether `text` is the path of a recorded file rather than a name."""
    return text.endswith(RECORDED_SUFFIXES)


def parse(text: str) -> tuple[str, float | None]:
    """(name, parameter) of a named routing; ValueError if there is none such."""
    name, colon, value = text.partition(":")
    name = ALIASES.get(name, name)
    if name not in ROUTINGS:
        files = ", or a file that ends in " + " or ".join(RECORDED_SUFFIXES)
        raise ValueError(f"{text!r} is not a routing; {nearest(name, ROUTINGS)}{files}")
    routing = ROUTINGS[name]
    if not colon:
        return name, routing.default
    if routing.default is None:
        raise ValueError(f"{text!r}: {name} takes no parameter")
    try:
        parameter = float(value)
    except ValueError:
        raise ValueError(f"{text!r}: {value!r} is not a number") from None
    if not routing.low <= parameter <= routing.high:
        raise ValueError(f"{text!r}: {value} must be in {routing.low:g}..{routing.high:g}")
    return name, parameter


def canonical(text: str) -> str:
    """One spelling for one routing: no alias, no default parameter, no trailing zeros; a path as it
    is.
    """
    if is_recorded(text):
        return text
    name, parameter = parse(text)
    return name if parameter == ROUTINGS[name].default else f"{name}:{parameter:g}"


def label_of(text: str) -> str:
    """What a result row says: the canonical name, or file name and a digest of the recorded ids."""
    if not is_recorded(text):
        return canonical(text)
    digest = hashlib.sha256(recorded(text).contiguous().numpy().tobytes()).hexdigest()
    return f"{Path(text).name}#{digest[:8]}"


def may_mask(text: str) -> bool:
    """Whether slots may be masked."""
    if is_recorded(text):
        return bool((recorded(text) < 0).any())
    return parse(text)[0] == "masked"


@lru_cache(maxsize=4)
def recorded(path: str) -> torch.Tensor:
    """int64 ids of a recorded file, [N, K] or [W, N, K]; ValueError if it holds none."""
    try:
        if path.endswith(".npy"):
            import numpy

            array = numpy.load(path, allow_pickle=False)
        else:  # only what is stored whole, no sparse tensor for one, becomes an array
            array = torch.load(path, map_location="cpu", weights_only=True).numpy()
        ids = torch.from_numpy(array)
    except Exception as error:  # readers raise almost anything for a file of another kind
        reason = getattr(error, "strerror", None) or "it holds no array of integers"
        raise ValueError(f"routing {path} cannot be read: {reason}") from None
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"routing {path} must hold a tensor of integers")
    if ids.dtype == torch.bool or ids.dim() not in (2, 3):
        raise ValueError(f"routing {path} must hold integers of shape [N, K] or [W, N, K], "
                         f"not {ids.dtype} {list(ids.shape)}")  # fmt: skip
    return ids.to(torch.int64)


def check(text: str, num_ranks: int, tokens: int, num_experts: int, top_k: int) -> None:
    """ValueError unless the routing can be drawn for this many tokens on every rank."""
    if not is_recorded(text):
        name, parameter = parse(text)
        partly = parameter is not None and parameter < 1
        if name == "hot-expert" and partly and num_experts == 1:
            raise ValueError(f"routing {text} needs another expert than the hot one, num_experts=1")
        return
    ids = recorded(text)
    if ids.shape[-1] != top_k:
        raise ValueError(f"routing {text} has {ids.shape[-1]} choices per token, top_k={top_k}")
    if ids.dim() == 3 and ids.shape[0] != num_ranks:
        raise ValueError(f"routing {text} is of {ids.shape[0]} ranks, num_ranks={num_ranks}")
    held = ids.shape[1] if ids.dim() == 3 else ids.shape[0] // num_ranks
    if held < tokens:
        raise ValueError(f"routing {text} holds {held} tokens for each of {num_ranks} ranks, "
                         f"fewer than the {tokens} asked for")  # fmt: skip
    low, high = int(ids.min()), int(ids.max())
    if low < MASKED or high >= num_experts:
        raise ValueError(f"routing {text} has expert ids {low}..{high}, "
                         f"must be in {MASKED}..{num_experts - 1}")  # fmt: skip


def draw_ids(text: str, draw: Draw) -> torch.Tensor:
    """int32 [T, K] of one rank on its device."""
    if not is_recorded(text):
        name, parameter = parse(text)
        return ROUTINGS[name].draw(draw, parameter).contiguous()
    check(text, draw.num_ranks, draw.tokens, draw.num_experts, draw.top_k)
    ids = recorded(text)
    begin = 0 if ids.dim() == 3 else draw.rank * draw.tokens
    ids = ids[draw.rank] if ids.dim() == 3 else ids
    return ids[begin : begin + draw.tokens].to(draw.device, torch.int32).contiguous()
