"""A layer on the machine for tests: kernel, random inputs, comparison with the oracle."""

from __future__ import annotations

import torch

from megamoe import MegaMoE, reference
from megamoe.precision import precision_of
from megamoe.reference import Weights
from megamoe.weights import quantize_weights
from tests.routing import make_routing

#: By how hidden rows are stored. In BF16 a unit in the last place: products that are added in
#: another order move a rounding here and there. In FP8 such a rounding, of an element of the hidden
#: row, moves it by a sixteenth. A wrong row is off by forty times as much or more.
MAX_RELATIVE_ERROR = {"bfloat16": 2**-8, "float8_e4m3fn": 2**-6}


def max_relative_error(precision: str) -> float:
    """With 4-bit weights twice that of FP8: a rank with two rows was seen to have one such element
    that was most of its row.
    """
    recipe = precision_of(precision)
    return MAX_RELATIVE_ERROR[recipe.hidden.storage] * (2 if recipe.weights.packed else 1)


#: Two tile columns in FC1 and FC2, a ring of two pool blocks that is used three times over.
RING = dict(world=2, tokens=8, experts=12, hidden=384, inner=256, overrides={"pool_blocks": 2})


class WrongResult(AssertionError):
    """A launch that ended without an error and gave wrong numbers."""


class Layer:
    """One layer over `world` ranks of two CTAs; `check` runs a launch and compares every rank.
    Settings are of `Machine`.
    """

    def __init__(
        self,
        world: int,
        tokens: int = 8,
        top_k: int = 2,
        experts: int | None = None,
        hidden: int = 128,
        inner: int = 128,
        precision: str = "bf16",
        num_ctas: int = 2,
        clamp: float | None = None,
        overrides: dict | None = None,
        **settings,
    ):
        self.experts, self.clamp = experts or 2 * world, clamp
        self.moe = MegaMoE(
            num_experts=self.experts, top_k=top_k, hidden_size=hidden, intermediate_size=inner,
            max_tokens_per_rank=tokens, world=world, precision=precision, device="cpu",
            num_sms=num_ctas, activation_clamp=clamp, kernel_options=overrides,
        )  # fmt: skip
        self.config, self.workspace = self.moe.config, self.moe.workspace
        self.backend = self.moe.backend
        self.backend.settings = {"checks": True, "policy": "random"} | settings
        self.random = torch.Generator().manual_seed(world * 1000 + hidden)
        w13 = self._draw(self.experts, 2 * inner, hidden) / hidden**0.5
        w2 = self._draw(self.experts, hidden, inner) / inner**0.5
        self.weights = Weights(w13, w2)
        if self.config.recipe.weights.has_scales:
            self.weights = quantize_weights(w13, w2, precision)
        self.moe.load_weights(*self.weights)

    def spread_scales(self) -> None:
        """Scales of weights that differ by up to 16 from one to the next: a wrong one shows."""
        scales = []
        for scale in self.weights[2:]:
            if scale is not None:
                exponents = torch.randint(-2, 3, scale.shape, generator=self.random)
                scale = scale + exponents if scale.dtype == torch.uint8 else scale * 2.0**exponents
                scales.append(scale.to(self.weights[2].dtype))
        self.weights = Weights(*self.weights[:2], *scales)
        self.moe.load_weights(*self.weights)

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.random).bfloat16()

    def inputs(self, routing: str, seed: int) -> tuple[list, list, list]:
        """(xs, topk_idx, topk_weights) of one launch."""
        config = self.config
        idx, weights = make_routing(
            routing, config.num_ranks, config.max_tokens_per_rank, config.top_k, self.experts, seed
        )
        return [self._draw(len(rows), config.hidden_size) for rows in idx], idx, weights

    def forward(self, inputs: tuple, seed: int = 0) -> list[torch.Tensor]:
        self.backend.settings["seed"] = seed
        return self.backend.forward(self.rows(*inputs))

    @staticmethod
    def rows(xs, idx, weights, outs=None) -> list[tuple]:
        """Arguments of a forward by rank."""
        nothing = [None] * len(xs)
        return list(zip(xs, idx, weights, nothing, outs or nothing, nothing, strict=True))

    def compare(self, outputs: list[torch.Tensor], inputs: tuple[list, list, list]) -> None:
        for rank, (out, x, idx, weights) in enumerate(zip(outputs, *inputs, strict=True)):
            expected = reference.moe_forward(
                x, idx, weights, *self.weights, precision=self.config.precision, clamp=self.clamp
            )
            error = reference.relative_error(out, expected)
            if not error <= max_relative_error(self.config.precision):
                raise WrongResult(f"rank {rank}: relative error {error}")

    def check(self, routing: str, seed: int) -> list[torch.Tensor]:
        """One launch whose inputs and interleaving follow from the seed."""
        inputs = self.inputs(routing, seed)
        outputs = self.forward(inputs, seed)
        self.compare(outputs, inputs)
        return outputs

    def check_many(self, routings: list[str], seed: int) -> None:
        """Launches back to back, in which ranks meet only inside the kernels."""
        launches = [self.inputs(routing, seed + n) for n, routing in enumerate(routings)]
        outs = [[torch.empty_like(x) for x in xs] for xs, _, _ in launches]
        self.backend.settings["seed"] = seed
        self.backend.forward_many(
            [self.rows(*inputs, out) for inputs, out in zip(launches, outs, strict=True)]
        )
        for outputs, inputs in zip(outs, launches, strict=True):
            self.compare(outputs, inputs)

    def assert_at_rest(self) -> None:
        """Every rank is as a finished launch leaves it."""
        for rank in self.moe.local_ranks:
            views = self.workspace.regions(rank)
            left = [
                r.name for r in self.moe.layout.regions.values() if r.resets and views[r.name].any()
            ]
            assert not left, f"rank {rank}: {left} are not zero"
            signals = views["nvlink_barrier_signal"][:, 0]
            assert (signals == views["nvlink_barrier_counter"][0]).all()
            assert not views["abort_flag"].any()
