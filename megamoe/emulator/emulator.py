"""The emulator: a CPU forward over all ranks that follows the launch protocol and checks it.

Owns the launch as the host sees it: staging, the kernel boundary as a fence, poison, and what is
left behind. W ranks x C CTAs run as coroutines over the real workspace; `seed` decides every
interleaving.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from megamoe.emulator import prologue, roles
from megamoe.emulator.combine import combine
from megamoe.emulator.errors import EmulatorError, NotAtRest
from megamoe.emulator.memory import Memory, Word
from megamoe.emulator.prologue import Cta, Traffic
from megamoe.emulator.report import report
from megamoe.emulator.runtime import Role, Runtime
from megamoe.emulator.state import CtaAgents, Launch, RankState, Shared
from megamoe.reference import Weights, scale_rows
from megamoe.weights import check_tensor, check_weights
from workspace.layout import SIGNAL_STRIDE
from workspace.views import Workspace


class Emulator:
    """Runs launches on a CPU workspace that holds all ranks.

    num_ctas: CTAs per rank.
    reset_regions: names that go back to zero between launches (default: those of the table).
    drop: label, or labels, of `OPERATIONS` to leave out; for tests.
    clamp: of SwiGLU, None for none.
    After a launch that raised, call `recover` before the next.
    """

    def __init__(
        self,
        workspace: Workspace,
        num_ctas: int = 2,
        reset_regions: Iterable[str] | None = None,
        drop: str | Iterable[str] | None = None,
        clamp: float | None = None,
    ):
        self.layout = workspace.layout
        self.config, self.kernel = self.layout.config, self.layout.kernel
        if self.kernel.only:
            raise ValueError(f"only={self.kernel.only!r} needs a GPU; the emulator runs all parts")
        if self.kernel.trace:
            raise ValueError("trace=True needs a GPU; the emulator leaves no marks")
        if workspace.local_ranks != list(range(self.config.num_ranks)):
            raise ValueError(
                f"workspace holds ranks {workspace.local_ranks}; the emulator needs all of them"
            )
        names = {r.name for r in self.layout.regions.values() if r.resets}
        self.reset_regions = names if reset_regions is None else set(reset_regions)
        if self.reset_regions - self.layout.regions.keys():
            raise ValueError(
                f"reset_regions={sorted(self.reset_regions)} names no region of the table"
            )
        self.dropped = (drop,) if isinstance(drop, str) else tuple(drop or ())
        self.workspace, self.num_ctas, self.clamp = workspace, num_ctas, clamp
        self.nvlink_bytes = 0
        self.invalid_experts: list[tuple[int, int, int]] = []
        self._weights: list[list[Weights]] = []  # by rank and local expert
        self._build()

    def _build(self) -> None:
        """Memory model and runtime over the workspace as it is now, which counts as ordered."""
        self.memory = Memory()
        self.runtime = Runtime(self.memory, self.dropped)
        num_ranks = self.config.num_ranks
        warps = self.kernel.num_math_warps
        places = []
        for rank in range(num_ranks):
            places.append((rank, -1, "host"))
            for cta in range(self.num_ctas):
                places += CtaAgents.places(rank, cta, warps)
        agents = iter(self.memory.build(places))
        self.ranks = [RankState(self.memory, self.workspace, rank) for rank in range(num_ranks)]
        for state in self.ranks:
            state.host = next(agents)
            state.cta_agents = [CtaAgents.take(agents, warps) for _ in range(self.num_ctas)]
        self._install_weights()
        self._failed = False

    def _install_weights(self) -> None:
        for state, experts in zip(self.ranks, self._weights, strict=False):
            state.experts = experts

    def load_weights(self, weights: list[Weights]) -> None:
        """Weights of the local experts by rank, in checkpoint layout. A launch reads what they hold
        then; only scales of weight blocks are copied, as for the kernel.
        """
        if len(weights) != self.config.num_ranks:
            raise ValueError(
                f"weights are given for {len(weights)} ranks, expected {self.config.num_ranks}"
            )
        for rank in weights:
            check_weights(self.config, self.config.experts_per_rank, torch.device("cpu"), rank)
        experts = range(self.config.experts_per_rank)
        self._weights = [[_by_channel(rank.of(expert)) for expert in experts] for rank in weights]
        self._install_weights()

    def launch(
        self,
        xs: list[torch.Tensor],
        topk_idx: list[torch.Tensor],
        topk_weights: list[torch.Tensor],
        seed: int = 0,
        poison: bool = True,
        x_scales: list[torch.Tensor | None] | None = None,
        expert_counts: list[torch.Tensor | None] | None = None,
    ) -> list[torch.Tensor]:
        """One forward on all ranks: [T_r, H] by rank.

        By rank, x is bf16, or quantised with its x_scales; expert_counts (int32 [e]) are added to.
        """
        launch = (xs, topk_idx, topk_weights, x_scales, expert_counts)
        return self.launch_many([launch], seed, poison)[0]

    def launch_many(
        self, launches: list[tuple], seed: int = 0, poison: bool = True
    ) -> list[list[torch.Tensor]]:
        """Forwards (xs, topk_idx, topk_weights) in stream order on every rank; each may add
        x_scales and expert_counts.

        Ranks meet only inside the kernels: one may be a launch ahead of another.
        """
        if self._failed:
            raise EmulatorError("the last launch failed; call recover() first")
        if len(self._weights) != self.config.num_ranks:
            raise EmulatorError("load_weights() comes before the first launch")
        per_launch = [self._inputs(*launch) for launch in launches]
        self._traffic = Traffic(0, [])
        self._failed = True
        self.runtime.start(seed)
        for state in self.ranks:
            self.runtime.spawn(
                self._host(state, [launch[state.rank] for launch in per_launch], poison)
            )
        self.runtime.run()
        self._failed = False
        self.nvlink_bytes = self._traffic.nvlink_bytes
        self.invalid_experts = sorted(self._traffic.invalid_experts)
        return [[launch.output for launch in ranks] for ranks in per_launch]

    def _inputs(
        self, xs, topk_idx, topk_weights, x_scales=None, expert_counts=None
    ) -> list[Launch]:
        config, cpu = self.config, torch.device("cpu")
        absent = [None] * config.num_ranks
        columns = {
            "xs": xs,
            "topk_idx": topk_idx,
            "topk_weights": topk_weights,
            "x_scales": x_scales or absent,
            "expert_counts": expert_counts or absent,
        }
        for name, tensors in columns.items():
            if len(tensors) != config.num_ranks:
                raise ValueError(
                    f"{name} is given for {len(tensors)} ranks, expected {config.num_ranks}"
                )
        launches = []
        for x, idx, weights, scale, counts in zip(*columns.values(), strict=True):
            num_tokens = x.shape[0]
            if num_tokens > config.max_tokens_per_rank:
                raise ValueError(
                    f"x has {num_tokens} tokens, max_tokens_per_rank={config.max_tokens_per_rank}"
                )
            token = torch.bfloat16 if scale is None else getattr(torch, config.recipe.token)
            check_tensor("x", x, (num_tokens, config.hidden_size), token, cpu)
            for name, tensor in (("topk_idx", idx), ("topk_weights", weights)):
                if tuple(tensor.shape) != (num_tokens, config.top_k):
                    expected = [num_tokens, config.top_k]
                    raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {expected}")
            launches.append(Launch(config.recipe, x, idx, weights, scale, counts, self.clamp))
        return launches

    def _host(self, state: RankState, launches: list[Launch], poison: bool) -> Role:
        """The stream of one rank: stage x, run the kernel, wait for its end."""
        memory, host = self.memory, state.host
        for launch in launches:
            yield
            agents = state.agents()
            state.number += 1
            state.launch = launch
            for agent in agents:
                agent.launch = state.number
            for data in state.data.values():
                data.forget_reads(host.clock)
            state.refill(self.reset_regions, poison)
            rows = slice(0, launch.num_tokens)
            if launch.num_tokens and launch.staged:
                state.data["input_token_buffer"].write(host, rows, launch.row_bits)
                if launch.scale_bits is not None:
                    state.data["input_sf_buffer"].write(host, rows, launch.scale_bits)
            memory.proxy_fence(host)  # a kernel boundary is a fence of every kind
            memory.hand_over(agents)
            for agent in agents:
                agent.clear()
            ended = Word(memory, "kernel_end", state.rank, 0, np.zeros(1, np.int64), 0)
            for index in range(self.num_ctas):
                self.runtime.spawn(self._cta(state, index, ended))
            while ended.value < self.num_ctas:
                yield host, ended, self.num_ctas
            memory.hand_over(agents)
            for agent in agents:
                memory.flush(agent, agent.time)
            output = np.empty((0, self.config.hidden_size), np.int16)
            if launch.num_tokens:
                output = state.data["layer_output"].read(host, rows)
            launch.output = torch.from_numpy(output).view(getattr(torch, self.config.recipe.output))

    def _cta(self, state: RankState, index: int, ended: Word) -> Role:
        """One CTA: count, the parallel roles, combine."""
        config, agents = self.config, state.cta_agents[index]
        shared = Shared(
            self.memory,
            state.rank,
            config.num_experts,
            config.experts_per_rank,
            self.kernel.block_m,
        )
        cta = Cta(
            index,
            self.num_ctas,
            self.runtime,
            self.ranks,
            state,
            agents,
            shared,
            self.reset_regions,
            self._traffic,
        )
        agents.enter_count()
        yield from prologue.count(cta)
        front = [
            roles.dispatch(cta), report(cta), roles.load_weights(cta), roles.load_tokens(cta)
        ]  # fmt: skip
        for role in front:
            self.runtime.spawn(self._counted(role, shared.front_ended))
        for warp in range(len(agents.math)):
            self.runtime.spawn(self._counted(roles.math(cta, warp), shared.math_ended))
        yield from combine(cta)
        while shared.front_ended.value < len(front):
            yield agents.leader, shared.front_ended, len(front)
        self.runtime.bump(ended)

    def _counted(self, role: Role, ended: Word) -> Role:
        yield from role
        self.runtime.bump(ended)

    def recover(self) -> None:
        """After a failed launch: zero counters, padding and barrier words; forget every clock."""
        self.workspace.recover()
        self._build()

    def assert_at_rest(self) -> None:
        """Raise `NotAtRest` unless every rank is as a finished launch leaves it."""
        epochs = {
            int(self.workspace.regions(state.rank)["nvlink_barrier_counter"][0])
            for state in self.ranks
        }
        problems = []
        for state in self.ranks:
            problems += [f"rank {state.rank}: {name} is not zero" for name in state.at_rest()]
            views = self.workspace.regions(state.rank)
            signals = views["nvlink_barrier_signal"].reshape(-1)[::SIGNAL_STRIDE].tolist()
            if set(signals) != epochs or len(epochs) != 1:
                problems.append(
                    f"rank {state.rank}: signals {signals} do not equal epochs {sorted(epochs)}"
                )
            if views["abort_flag"].any():
                problems.append(f"rank {state.rank}: abort_flag is set")
        problems += [
            f"{agent}: stores are held back"
            for agent in self.memory.agents
            if agent.pending or agent.bulk
        ]
        if problems:
            raise NotAtRest("; ".join(problems))


def _by_channel(expert: Weights) -> Weights:
    """Weights of one expert, scales by output channel: those of blocks are copied for it."""

    def rows(scale: torch.Tensor | None, channels: int) -> torch.Tensor | None:
        per_channel = scale is not None and scale.dim() == 1
        return scale.unsqueeze(1) if per_channel else scale_rows(scale, channels)

    w13, w2, w13_scale, w2_scale = expert
    return Weights(w13, w2, rows(w13_scale, w13.shape[0]), rows(w2_scale, w2.shape[0]))
