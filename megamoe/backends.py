"""How a forward runs: by kernel launches on a GPU, or by the same launches, of PTX, on a CPU.

Both take a row of arguments per rank of this process (`inputs.NAMES`), know nothing of validation
and launch once per rank with the same arguments. On a GPU a single rank launches on the current
stream, several virtual ranks fork from it and join it again. Nothing here is recorded for autograd.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from megamoe import faults
from megamoe.budget import budget_of
from megamoe.compile import CompiledKernel, cache_dir
from megamoe.faults import Limits
from megamoe.health import Health
from megamoe.machine.memory import Region
from megamoe.ordering import FRONTEND, MATH, explanations
from megamoe.reference import Weights
from megamoe.regions import LayerLayout
from megamoe.streams import Streams
from workspace.layout import DATA, LOCAL, SYMMETRIC, Layout
from workspace.views import Workspace

#: CTAs of a rank on a CPU unless asked otherwise.
CPU_CTAS = 2


class Backend:
    """Launches of the ranks of this process: arguments, staging of inputs, errors.

    num_ctas: CTAs per rank. layer: number of the layer, the same on every rank that shares the
    workspace. yields: leave the SMs that a launch does not use to other streams (a launch that
    waits for the one before it would hold them).
    """

    nvlink_bytes: int | None = None

    def __init__(
        self,
        workspace: Workspace[LayerLayout],
        kernel: CompiledKernel,
        num_ctas: int,
        limits: Limits,
        layer: int = 0,
        clamp: float | None = None,
        shared_weight: float = 1.0,
        yields: bool = False,
    ):
        self.layout, self.workspace, self.device = workspace.layout, workspace, workspace.device
        self.health: Health = workspace.health
        self.limits = limits
        self.kernel, self.ranks = kernel, workspace.local_ranks
        kernel.to_device(self.device.index or 0)
        views = [workspace.regions(rank) for rank in self.ranks]
        self.outputs = [view["layer_output"] for view in views]
        self.staged = [view["input_token_buffer"] for view in views]
        config = self.layout.config
        self.quantizes = config.recipe.tokens.has_scales
        self.staged_scales = []
        if self.quantizes:
            scales = config.token_scales
            self.staged_scales = [view["input_scale_buffer"][:, :scales] for view in views]
        self.launchers = [kernel.launcher() for _ in self.ranks]
        for index, (rank, launcher) in enumerate(zip(self.ranks, self.launchers, strict=True)):
            base = workspace.allocation.base(rank, LOCAL)
            launcher.set(
                symmetric_base=workspace.allocation.base(rank, SYMMETRIC),
                local_base=base,
                peers=workspace.peer_tables[rank].data_ptr(),
                w13=base,  # until there are weights: a launch that refuses its input reads none
                w2=base,
                record=self.health.records[index].data_ptr(),
                timeout_ns=int(limits.timeout_s * 1e9),
                start_timeout_ns=int(limits.start_timeout_s * 1e9),
                rank=rank,
                layer=layer,
                dependents=int(not yields),
                clamp=math.inf if clamp is None else clamp,
                shared_weight=shared_weight,
                num_ctas=num_ctas,
            )

    def set_weights(self, weights: list[Weights], tables: list[tuple]) -> None:
        """By rank: weights, and (w13_scales, w2_scales) as the kernel reads them, or None. Launches
        read what they hold then; who calls keeps them alive.
        """
        for launcher, rank, (w13_scales, w2_scales) in zip(
            self.launchers, weights, tables, strict=True
        ):
            launcher.set(
                w13=rank.w13.data_ptr(),
                w2=rank.w2.data_ptr(),
                w13_scales=0 if w13_scales is None else w13_scales.data_ptr(),
                w2_scales=0 if w2_scales is None else w2_scales.data_ptr(),
            )

    def _stage(self, index: int, x, scale) -> None:
        """Put x where peers can read it, unless the launch itself does. A job of one rank without
        scales reads x itself.
        """
        if scale is not None:
            _copy_unless_there(self.staged_scales[index], scale)
        if scale is not None and self.layout.config.recipe.weights.packed:
            self.staged[index][: x.shape[0]].copy_(in_places(x.detach()))
        elif scale is not None or (self.layout.config.num_ranks > 1 and not self.quantizes):
            _copy_unless_there(self.staged[index], x)

    def _output(self, index: int, x, out) -> torch.Tensor:
        return self.outputs[index][: x.shape[0]] if out is None else out

    def launch(
        self, index: int, x, idx, weight, y, stream: int, staged: bool = False, counts=None
    ) -> None:
        """Launch one rank of this process on a raw stream handle. `staged`: the quantised input is
        in its buffers. Without scales x must be staged too if there are several ranks.
        """
        self.launchers[index](
            stream,
            x=0 if staged else x.data_ptr(),
            topk_idx=idx.data_ptr(),
            topk_weights=weight.data_ptr(),
            y=y.data_ptr(),
            expert_counts=0 if counts is None else counts.data_ptr(),
            num_tokens=x.shape[0],
            wide_idx=int(idx.dtype == torch.int64),
        )

    def _raise_reported(self) -> None:
        """Raise what launches reported, of which none runs, and recover where that can be done."""
        error = self.health.take_error(self.limits)
        if error is None:
            return
        if self.health.failed and self.health.group is None:
            self.recover()
        raise error

    def recover(self) -> None:
        self.health.recover(self.limits)

    def forward(self, rows: list[tuple]) -> list[torch.Tensor]:
        """Outputs by rank of this process."""
        raise NotImplementedError

    def refuse(self, reason: str) -> None:
        """In place of a forward whose input this rank of several processes refuses."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait for all launches; raise what they reported."""
        raise NotImplementedError

    def close(self) -> None:
        """Wait for running launches; nothing is launched any more."""
        raise NotImplementedError


class CpuBackend(Backend):
    """Forward by the machine, with all ranks in this process. A launch has ended when `forward`
    returns, so what it reports is raised there.

    `settings`: arguments of `Machine` for the forwards to come. `prepare`: called with the machine
    before it runs. `machine`: that of the last forward.
    """

    def __init__(self, *args, **options):
        from megamoe.machine.machine import Machine  # only here: a GPU host has no use for it

        super().__init__(*args, **options)
        self.settings, self.launches, self.prepare = {}, 0, lambda machine: None
        parts = budget_of(self.layout.config, self.layout.kernel).parts.values()
        self.shared = [
            Region(part.name, part.offset, part.num_bytes, part.num_bytes // part.num_items)
            for part in parts
        ]
        self._machine, self.machine = Machine, None

    def set_weights(self, weights: list[Weights], tables: list[tuple]) -> None:
        super().set_weights(weights, tables)
        self.weights = [
            {"w13": rank.w13, "w2": rank.w2, "w13_scales": w13_scales, "w2_scales": w2_scales}
            for rank, (w13_scales, w2_scales) in zip(weights, tables, strict=True)
        ]

    def forward(self, rows: list[tuple]) -> list[torch.Tensor]:
        (ys,) = self.forward_many([rows])
        return ys

    def forward_many(self, forwards: list[list[tuple]]) -> list[list[torch.Tensor]]:
        """Forwards in stream order on every rank, which meet only inside the launches."""
        if self.health.failed:
            self.recover()
        settings: dict[str, Any] = {
            "roles": (*FRONTEND, *[MATH] * self.layout.kernel.num_math_warps),
            "shared": self.shared, "notes": explanations(), "patient": True,
        }  # fmt: skip
        settings |= {"seed": self.launches} | self.settings
        machine = self.machine = self._machine(cache_dir(), len(self.ranks), **settings)
        all_ys = [
            [self._enqueue(machine, index, *row) for index, row in enumerate(rows)]
            for rows in forwards
        ]
        self.prepare(machine)
        self.health.failed = True  # stays so if the machine raises
        machine.run()
        machine.memory.let_go()
        self.health.failed = False
        self.launches += 1
        self.nvlink_bytes = machine.remote_bytes
        self.synchronize()
        return all_ys

    def _enqueue(self, machine, index: int, x, idx, weight, scale, out, counts) -> torch.Tensor:
        rank, y = self.ranks[index], self._output(index, x, out)
        add = machine.memory.add
        for space, span in self.workspace.allocation.spaces[rank].items():
            add(space, span, rank, regions_of(self.layout, space))
        named = self.weights[index] | dict(
            x=x, y=y, topk_idx=idx, topk_weights=weight, expert_counts=counts,
            peers=self.workspace.peer_tables[rank], record=self.health.records[index],
        )  # fmt: skip
        for name, tensor in named.items():
            add(f"{name} of rank {rank}", tensor)
        if scale is not None or not self.quantizes:
            machine.call(functools.partial(self._stage, index, x, scale), rank)
        launches = self.kernel.launches
        assert launches is not None, "a kernel for a GPU"
        launches.on_launch = functools.partial(machine.launch, rank=rank)
        self.launch(index, x, idx, weight, y, 0, scale is not None, counts)
        launches.on_launch = None  # the kernel outlives the machine
        launches.check()
        return y

    def synchronize(self) -> None:
        """Raise what the last launch reported."""
        self._raise_reported()

    def close(self) -> None:
        """Nothing is ever pending."""


class GpuBackend(Backend):
    """Forward by one kernel launch per rank of this process."""

    def __init__(self, workspace: Workspace, *args, **options):
        super().__init__(workspace, *args, **options)
        several = len(self.ranks) > 1
        self.streams = Streams(self.device, len(self.ranks)) if several else None

    def forward(self, rows: list[tuple]) -> list[torch.Tensor]:
        """Launch; then raise what an earlier launch reported of its input. After a launch that
        failed, raise that first, or recover: a launch would do nothing.
        """
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self.forward(rows)
        reported = self.health.reported
        if (reported or self.health.failed) and torch.cuda.is_current_stream_capturing():
            reported = False
        elif reported or self.health.failed:
            if self.health.broken and reported:
                self.synchronize()
            if self.health.failed:
                self.recover()
        current = torch.cuda.current_stream()
        if self.streams is None:
            ys = [self._stage_and_launch(0, current, *rows[0])]
        else:
            fork = self.streams.fork(current)
            ys = [self._stage_and_launch(index, stream, *rows[index]) for index, stream in fork]
            self.streams.join(current)
        if reported:
            self.synchronize()
        return ys

    def _stage_and_launch(
        self, index: int, stream: torch.cuda.Stream, x, idx, weight, scale, out, counts
    ) -> torch.Tensor:
        self._stage(index, x, scale)
        y = self._output(index, x, out)
        self.launch(index, x, idx, weight, y, stream.cuda_stream, scale is not None, counts)
        return y

    def refuse(self, reason: str) -> None:
        """In place of a forward whose input this rank refuses: end the launch of the other ranks,
        which tell their callers the reason. Behind what the current stream holds already.
        """
        with torch.cuda.device(self.device):
            if self.health.broken or torch.cuda.is_current_stream_capturing():
                return  # they know, or nothing is launched
            self.health.tell(reason)
            stream = torch.cuda.current_stream().cuda_stream
            self.launchers[0](stream, x=0, expert_counts=0, num_tokens=faults.NO_INPUT)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)
        self._raise_reported()

    def close(self) -> None:
        """Wait for running launches; they may still write records and read the workspace."""
        torch.cuda.synchronize(self.device)
        if self.streams is not None:
            self.streams.close()


def regions_of(layout: Layout, space: str) -> list[Region]:
    """The regions of a space as the machine names them. What a launch finds in those that the host
    writes was not written in the same launch.
    """
    return [
        Region(r.name, r.offset, r.num_bytes, r.row_bytes, r.kind == DATA and not r.host_writes)
        for r in layout.of_space(space)
    ]


def in_places(tokens_TH: torch.Tensor) -> torch.Tensor:
    """A copy of quantised tokens with columns where packed weights have them
    (`fourbit_layout.place_of`).
    """
    digits = tokens_TH.view(torch.uint8).unflatten(1, (-1, 4, 4, 2, 4))  # t, s, khalf, b
    return digits.permute(0, 1, 3, 4, 2, 5).flatten(1).view(tokens_TH.dtype)


def _copy_unless_there(buffer: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy rows to the start of a buffer, unless that is where they are. Autograd sees nothing."""
    if rows.data_ptr() != buffer.data_ptr():
        buffer[: rows.shape[0]].copy_(rows.detach())
