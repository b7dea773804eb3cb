"""What is measured: models, cases, and inputs and weights made from a seed on the device.

Inputs depend on the seed, the token count and the rank only; `routings` draws the expert ids.
Inputs have unit variance and the weights of each projection 1 / fan-in, so that every activation of
the layer stays of order one and bf16 errors compare across shapes. A case with `spread` scales
tokens, hidden rows and weights by powers of two that cancel: the answer is the same, but a scale
that covers more than 128 columns no longer fits all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megamoe.config import MoEConfig
from megamoe.precision import FP8_BLOCK, Precision, precision_of
from perf.workload import routings


@dataclass(frozen=True)
class Model:
    """Shape of one MoE layer. num_shared_experts: that every token goes to, beside its top_k."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    num_shared_experts: int = 0

    @property
    def experts(self) -> range:
        """Ids of all experts, the routed ones first."""
        return range(self.num_experts + self.num_shared_experts)

    @property
    def shared_experts(self) -> range:
        return self.experts[self.num_experts :]


MODELS = {
    model.name: model
    for model in (
        Model("pro", hidden=7168, intermediate=3072, num_experts=384, top_k=6),
        Model("flash", hidden=4096, intermediate=2048, num_experts=256, top_k=6),
        Model("v3", hidden=7168, intermediate=2048, num_experts=256, top_k=8),
        Model("mimo", hidden=6144, intermediate=2048, num_experts=384, top_k=8),
        Model("qwen3", hidden=4096, intermediate=1536, num_experts=128, top_k=8),
        Model("tiny", hidden=1024, intermediate=512, num_experts=32, top_k=4),
        Model("emulated", hidden=256, intermediate=256, num_experts=32, top_k=4),
    )
}


@dataclass(frozen=True)
class Case:
    """One point: a model on W ranks, `ranks_per_gpu` of them on each GPU, `tokens` on each rank.

    spread: blocks of 128 columns of tokens and hidden rows differ by up to 2^spread in magnitude.
    """

    model: Model
    num_ranks: int
    tokens: int
    ranks_per_gpu: int = 1
    routing: str = "balanced"
    precision: str = "bf16"
    seed: int = 0
    spread: int = 0

    def __post_init__(self):
        if self.model.top_k > self.model.num_experts:
            raise ValueError(
                f"top_k={self.model.top_k} is more than num_experts={self.model.num_experts}"
            )
        if self.num_ranks % self.ranks_per_gpu:
            raise ValueError(
                f"num_ranks={self.num_ranks} is not divisible by ranks_per_gpu={self.ranks_per_gpu}"
            )

    @property
    def num_gpus(self) -> int:
        return self.num_ranks // self.ranks_per_gpu

    @property
    def experts_per_rank(self) -> int:
        return self.model.num_experts // self.num_ranks

    @property
    def recipe(self) -> Precision:
        return precision_of(self.precision)

    def config(self, max_tokens: int) -> MoEConfig:
        """The layer's configuration for at most `max_tokens` tokens per rank."""
        return MoEConfig(
            num_experts=self.model.num_experts,
            top_k=self.model.top_k,
            hidden_size=self.model.hidden,
            intermediate_size=self.model.intermediate,
            max_tokens_per_rank=max_tokens,
            num_ranks=self.num_ranks,
            precision=self.precision,
            num_shared_experts=self.model.num_shared_experts,
        )

    def experts_of(self, ranks: Iterable[int]) -> Sequence[int]:
        """Ids of the experts that these ranks, one after the other, hold, in the order in which the
        layer takes them: of each rank the routed ones, then the shared ones.
        """
        count, shared = self.experts_per_rank, self.model.shared_experts
        return [
            expert
            for rank in ranks
            for expert in (*range(rank * count, (rank + 1) * count), *shared)
        ]

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of a row that say what ran (`recording.columns.Launched`)."""
        return {
            "num_ranks": self.num_ranks,
            "ranks_per_gpu": self.ranks_per_gpu,
            "model": self.model.name,
            "hidden": self.model.hidden,
            "intermediate": self.model.intermediate,
            "num_experts": self.model.num_experts,
            "top_k": self.model.top_k,
            "num_shared_experts": self.model.num_shared_experts,
            "tokens": self.tokens,
            "precision": self.precision,
            "routing": routings.label_of(self.routing),
        }

    def check_routing(self, max_tokens: int) -> None:
        """ValueError unless the routing can be drawn for up to `max_tokens` tokens per rank."""
        model = self.model
        routings.check(self.routing, self.num_ranks, max_tokens, model.num_experts, model.top_k)

    def with_tokens(self, tokens: int) -> Case:
        return replace(self, tokens=tokens)


@dataclass(frozen=True)
class Inputs:
    """Of one rank: x [T, H] bf16, topk_idx [T, K] int32, topk_weights [T, K] f32 that sum to 1."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def block_magnitudes(columns: int, spread: int, device: torch.device) -> torch.Tensor:
    """[columns] bf16: powers of two, 1 for the first 128 columns and 2^-spread for the last."""
    blocks = torch.arange(columns, device=device) // FP8_BLOCK
    exponents = blocks * spread // max(columns // FP8_BLOCK - 1, 1)
    return torch.exp2(-exponents.float()).bfloat16()


def make_rank_inputs(case: Case, rank: int, device: torch.device | str = "cpu") -> Inputs:
    """The inputs of one rank, on `device`."""
    device, dtype = torch.device(device), torch.bfloat16
    seed = (case.seed * 1_000_003 + case.tokens) * 1009 + rank
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(case.tokens, case.model.hidden, generator=generator, device=device).to(dtype)
    if case.spread:
        x *= block_magnitudes(case.model.hidden, case.spread, device)
    logits = torch.randn(case.tokens, case.model.top_k, generator=generator, device=device)
    model = case.model
    draw = routings.Draw(case.tokens, model.top_k, model.num_experts, case.num_ranks, rank,
                         case.seed, generator, device)  # fmt: skip
    return Inputs(x, routings.draw_ids(case.routing, draw), logits.softmax(dim=1))


def make_inputs(case: Case, device: torch.device | str = "cpu") -> list[Inputs]:
    """The inputs of every rank, on `device`."""
    return [make_rank_inputs(case, rank, device) for rank in range(case.num_ranks)]


def make_weights(
    case: Case, device: torch.device | str = "cpu", experts: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(w13 [n, 2I, H] gate then up, w2 [n, H, I]) of these experts, of all by default, drawn in
    bf16 on `device`: no float32 copy. An expert's weights depend on the seed and its number only.
    """
    device, model, dtype = torch.device(device), case.model, torch.bfloat16
    experts = model.experts if experts is None else experts
    hidden, inter = model.hidden, model.intermediate
    w13 = torch.empty(len(experts), 2 * inter, hidden, dtype=dtype, device=device)
    w2 = torch.empty(len(experts), hidden, inter, dtype=dtype, device=device)
    of_tokens = block_magnitudes(hidden, case.spread, device)
    of_hidden = block_magnitudes(inter, case.spread, device)
    for expert, gate_up, down in zip(experts, w13, w2, strict=True):
        generator = torch.Generator(device).manual_seed(case.seed * 1_000_003 + expert)
        gate_up.normal_(0.0, hidden**-0.5, generator=generator)
        down.normal_(0.0, inter**-0.5, generator=generator)
        if case.spread:
            gate_up /= of_tokens
            gate_up[inter:] *= of_hidden.unsqueeze(1)
            down /= of_hidden
    return w13, w2
