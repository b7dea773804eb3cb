"""An emulated layer for tests: workspace, emulator, random inputs, comparison with the oracle."""

from __future__ import annotations

import torch

from megamoe import reference
from megamoe.config import MoEConfig, select
from megamoe.emulator import Emulator
from megamoe.reference import Weights
from megamoe.weights import quantize_weights
from tests.routing import make_routing
from workspace import Workspace, layout_of

#: One unit in the last place of bfloat16: products of other shapes add in another order, and move
#: a rounding here and there. A wrong row is off by a hundred times as much.
MAX_RELATIVE_ERROR = {"bf16": 2**-8, "fp8_block": 2**-7, "fp8_channel": 2**-7}


class WrongResult(AssertionError):
    """A launch that ended without an error and gave wrong numbers."""


class Layer:
    """One layer over `world` emulated ranks; `check` runs a launch and compares every rank."""

    def __init__(
        self,
        world: int,
        tokens: int = 5,
        top_k: int = 2,
        experts: int | None = None,
        hidden: int = 128,
        inner: int = 128,
        num_ctas: int = 2,
        overrides: dict | None = None,
        precision: str = "bf16",
        **emulator,
    ):
        self.experts = experts or 2 * world
        self.config = MoEConfig(self.experts, top_k, hidden, inner, tokens, world, precision)
        self.layout = layout_of(self.config, select(self.config, **(overrides or {})))
        self.workspace = Workspace(self.layout)
        self.emulator = Emulator(self.workspace, num_ctas, **emulator)
        self.random = torch.Generator().manual_seed(world * 1000 + hidden)
        w13 = self._draw(self.experts, 2 * inner, hidden) / hidden**0.5
        w2 = self._draw(self.experts, hidden, inner) / inner**0.5
        self.weights = Weights(w13, w2)
        if self.config.recipe.scaled:
            self.weights = quantize_weights(w13, w2, precision)
        local = self.config.experts_per_rank
        self.emulator.load_weights(
            [self.weights.of(slice(r * local, (r + 1) * local)) for r in range(world)]
        )

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).bfloat16()

    def inputs(self, routing: str, seed: int) -> tuple[list, list, list]:
        """(xs, topk_idx, topk_weights) of one launch."""
        config = self.config
        idx, weights = make_routing(
            routing, config.num_ranks, config.max_tokens_per_rank, config.top_k, self.experts, seed
        )
        return [self._draw(len(rows), config.hidden_size) for rows in idx], idx, weights

    def expected(self, inputs: tuple[list, list, list]) -> list[torch.Tensor]:
        return [
            reference.moe_forward(
                x,
                idx,
                weights,
                *self.weights,
                precision=self.config.precision,
                clamp=self.emulator.clamp,
            )  # fmt: skip
            for x, idx, weights in zip(*inputs, strict=True)
        ]

    def compare(self, outputs: list[torch.Tensor], inputs: tuple[list, list, list]) -> None:
        for rank, (out, expected) in enumerate(zip(outputs, self.expected(inputs), strict=True)):
            error = reference.relative_error(out, expected)
            if not error <= MAX_RELATIVE_ERROR[self.config.precision]:
                raise WrongResult(f"rank {rank}: relative error {error}")

    def check(self, routing: str, seed: int) -> list[torch.Tensor]:
        """One launch whose inputs and interleaving follow from the seed."""
        inputs = self.inputs(routing, seed)
        outputs = self.emulator.launch(*inputs, seed=seed)
        self.compare(outputs, inputs)
        return outputs

    def check_many(self, routings: list[str], seed: int) -> None:
        """Launches back to back, in which ranks meet only inside the kernels."""
        launches = [self.inputs(routing, seed + n) for n, routing in enumerate(routings)]
        for outputs, inputs in zip(
            self.emulator.launch_many(launches, seed=seed), launches, strict=True
        ):
            self.compare(outputs, inputs)
