"""How a forward runs: by kernel launches on a GPU, or by the same launches on the machine that
executes the kernel's PTX on a CPU.

Both take lists with one entry per rank of this process and know nothing of validation; a launch gets
the same arguments from either. On a GPU a single rank launches on the current stream, several
virtual ranks fork from it and join it again.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from megamoe import faults
from megamoe.compile import CompiledKernel, cache_dir
from megamoe.group import Group
from megamoe.machine.memory import Region
from megamoe.reference import Weights
from megamoe.weights import tile_scales
from workspace.layout import DATA, LOCAL, SYMMETRIC, Layout
from workspace.views import Workspace

#: CTAs of a rank on a CPU unless asked otherwise.
CPU_CTAS = 2
CPU_ROLES = ("dispatch", "report", "load_weights", "load_tokens", *["math"] * 8)


class Backend:
    """Launches of the ranks of this process: arguments, staging of inputs, error records."""

    nvlink_bytes: int | None = None

    def __init__(
        self,
        workspace: Workspace,
        kernel: CompiledKernel,
        num_ctas: int,
        timeout_s: float,
        clamp: float | None,
        records: torch.Tensor,
    ):
        self.layout, self.workspace = workspace.layout, workspace
        self.ranks, self.records, self.timeout_s = workspace.local_ranks, records, timeout_s
        views = [workspace.regions(rank) for rank in self.ranks]
        self.outputs = [view["layer_output"] for view in views]
        self.staged = [view["input_token_buffer"] for view in views]
        config = self.layout.config
        self.quantizes = config.recipe.scaled
        self.staged_scales = []
        if self.quantizes:
            scales = config.token_scales
            self.staged_scales = [view["input_sf_buffer"][:, :scales] for view in views]
        # Plain loads: a forward looks at every status and must not pay for a tensor operation.
        words = ctypes.c_int32 * faults.RECORD_WORDS
        self.status = [words.from_address(row.data_ptr()) for row in self.records]
        self.launchers = [kernel.launcher() for _ in self.ranks]
        for index, (rank, launcher) in enumerate(zip(self.ranks, self.launchers, strict=True)):
            launcher.set(
                symmetric_base=workspace.allocation.base(rank, SYMMETRIC),
                local_base=workspace.allocation.base(rank, LOCAL),
                peers=workspace.peer_tables[rank].data_ptr(),
                record=self.records[index].data_ptr(),
                timeout_ns=int(timeout_s * 1e9),
                rank=rank,
                clamp=math.inf if clamp is None else clamp,
                num_ctas=num_ctas,
            )
        self.weights: list[tuple] = []  # by rank, what the launches read

    def load_weights(self, weights: list[Weights]) -> None:
        config = self.layout.config
        self.weights = [(rank, tile_scales(config, rank)) for rank in weights]
        for launcher, (rank, (w13_sf, w2_sf)) in zip(self.launchers, self.weights, strict=True):
            launcher.set(
                w13=rank.w13.data_ptr(),
                w2=rank.w2.data_ptr(),
                w13_sf=0 if w13_sf is None else w13_sf.data_ptr(),
                w2_sf=0 if w2_sf is None else w2_sf.data_ptr(),
            )

    def _ranks(self, xs, ids, weights, scales, outs, counts) -> tuple[list, list[tuple]]:
        """(outputs, what `_stage` and `launch` take by rank)"""
        ys = [
            output[: x.shape[0]] if out is None else out
            for output, out, x in zip(self.outputs, outs, xs, strict=True)
        ]
        return ys, list(zip(xs, scales, ids, weights, ys, counts, strict=True))

    def _stage(self, index: int, x, scale) -> bool:
        """Put x where peers can read it, unless the launch itself does; True if it is there
        quantised. A job of one rank without scales reads x itself.
        """
        if scale is not None:
            _copy_unless_there(self.staged_scales[index], scale)
        if scale is not None or (self.layout.config.num_ranks > 1 and not self.quantizes):
            _copy_unless_there(self.staged[index], x)
        return scale is not None

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

    def _reported(self) -> Exception | None:
        """The error that the records tell of, which are clear then."""
        errors = [faults.error_of(record, self.layout) for record in self.records.tolist()]
        errors = [error for error in errors if error is not None]
        if not errors:
            return None
        self.records.zero_()
        # The cause first: a wait of its own, then a peer's failure, then bad input.
        kinds = (faults.InvalidExpertError, faults.PeerFailed, faults.LaunchTimeout)
        errors.sort(key=lambda error: -kinds.index(type(error)))
        if isinstance(errors[0], faults.LaunchTimeout):
            self.workspace.failed = True
        return errors[0]


class CpuBackend(Backend):
    """Forward by the machine: the kernel's own PTX, all ranks in this process. A launch has ended
    when `forward` returns, so what it reports is raised there.

    `settings`: arguments of `Machine` for the forwards to come. `prepare`: called with the machine
    before it runs. `machine`: that of the last forward.
    """

    def __init__(
        self,
        workspace: Workspace,
        kernel: CompiledKernel,
        num_ctas: int,
        timeout_s: float,
        clamp: float | None,
    ):
        from megamoe.machine.machine import Machine  # only here: a GPU host has no use for it

        kernel.to_device(0)
        with torch.inference_mode(False):
            shape = len(workspace.local_ranks), faults.RECORD_WORDS
            records = torch.zeros(shape, dtype=torch.int32, device="cpu")
        super().__init__(workspace, kernel, num_ctas, timeout_s, clamp, records)
        self.kernel, self.settings, self.launches = kernel, {}, 0
        self.prepare = lambda machine: None
        self._machine = Machine
        self.machine: Machine | None = None

    def forward(self, *columns) -> list[torch.Tensor]:
        (ys,) = self.forward_many([columns])
        return ys

    def forward_many(self, forwards: list[tuple]) -> list[list[torch.Tensor]]:
        """Forwards in stream order on every rank, which meet only inside the launches."""
        if self.workspace.failed:
            self.recover()
        settings = {"roles": CPU_ROLES, "patient": True, "seed": self.launches} | self.settings
        machine = self.machine = self._machine(cache_dir(), len(self.ranks), **settings)
        all_ys = []
        for columns in forwards:
            ys, ranks = self._ranks(*columns)
            all_ys.append(ys)
            self._map(machine, ranks)
            for index, (x, scale, *rest) in enumerate(ranks):
                self._enqueue(machine, index, x, scale, *rest)
        self.prepare(machine)
        self.workspace.failed = True  # stays so if the machine raises
        machine.run()
        self.workspace.failed = False
        self.launches += 1
        self.nvlink_bytes = machine.remote_bytes
        self.synchronize()
        return all_ys

    def _map(self, machine, ranks: list[tuple]) -> None:
        """Everything that a launch may touch."""
        add, layout = machine.memory.add, self.layout
        for index, rank in enumerate(self.ranks):
            for space, span in self.workspace.allocation.spaces[rank].items():
                add(space, span, rank, regions_of(layout, space))
            stored, scales = self.weights[index]
            x, _, idx, weight, y, counts = ranks[index]
            named = dict(
                w13=stored.w13, w2=stored.w2, w13_sf=scales[0], w2_sf=scales[1], x=x, y=y,
                topk_idx=idx, topk_weights=weight, expert_counts=counts,
                peers=self.workspace.peer_tables[rank], record=self.records[index],
            )  # fmt: skip
            for name, tensor in named.items():
                add(f"{name} of rank {rank}", tensor)

    def _enqueue(self, machine, index: int, x, scale, idx, weight, y, counts) -> None:
        rank = self.ranks[index]
        if scale is not None or not self.quantizes:
            machine.call(functools.partial(self._stage, index, x, scale), rank)
        self.kernel.launches.on_launch = functools.partial(machine.launch, rank=rank)
        self.launch(index, x, idx, weight, y, 0, scale is not None, counts)
        self.kernel.launches.check()

    def synchronize(self) -> None:
        """Raise what the last launch reported."""
        error = self._reported()
        if error is not None:
            if self.workspace.failed:
                self.recover()
            raise error

    def recover(self) -> None:
        self.workspace.recover()
        self.records.zero_()
        self.workspace.failed = False


class GpuBackend(Backend):
    """Forward by one kernel launch per rank of this process."""

    def __init__(
        self,
        workspace: Workspace,
        kernel: CompiledKernel,
        num_sms: int,
        timeout_s: float,
        group: Group | None,
        clamp: float | None,
    ):
        self.device, self.group = workspace.device, group
        kernel.to_device(self.device.index)
        with torch.inference_mode(False):  # made anywhere, zeroed anywhere
            shape = len(workspace.local_ranks), faults.RECORD_WORDS
            records = torch.zeros(shape, dtype=torch.int32, device="cpu").pin_memory()
        super().__init__(workspace, kernel, num_sms, timeout_s, clamp, records)
        with torch.cuda.device(self.device):
            several = len(self.ranks) > 1
            self.streams = [torch.cuda.Stream() for _ in self.ranks] if several else []
            self.fork = torch.cuda.Event()
            self.joins = [torch.cuda.Event() for _ in self.streams]

    def forward(self, xs, ids, weights, scales, outs, counts) -> list[torch.Tensor]:
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self.forward(xs, ids, weights, scales, outs, counts)
        reported = any(record[faults.STATUS] for record in self.status)
        if (reported or self.workspace.failed) and not torch.cuda.is_current_stream_capturing():
            self.synchronize()
            self.recover()
        current = torch.cuda.current_stream()
        ys, ranks = self._ranks(xs, ids, weights, scales, outs, counts)
        if not self.streams:
            self._stage_and_launch(0, current, *ranks[0])
            return ys
        self.fork.record(current)
        for i, stream in enumerate(self.streams):
            stream.wait_event(self.fork)
            with torch.cuda.stream(stream):
                self._stage_and_launch(i, stream, *ranks[i])
                self.joins[i].record(stream)
        for join in self.joins:
            current.wait_event(join)
        return ys

    def _stage_and_launch(self, index: int, stream, x, scale, idx, weight, y, counts) -> None:
        staged = self._stage(index, x, scale)
        self.launch(index, x, idx, weight, y, stream.cuda_stream, staged, counts)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)
        error = self._reported()
        if error is not None:
            if self.workspace.failed and self.group is None:
                self.recover()
            raise error

    def recover(self) -> None:
        """Return the workspace to its first state; with a group every rank must come here.

        Between the two meetings no rank runs a launch and none has signalled yet.
        """
        torch.cuda.synchronize(self.device)
        if self.group is not None:
            self.group.meet(self.timeout_s)
        self.workspace.recover()
        self.records.zero_()
        torch.cuda.synchronize(self.device)
        if self.group is not None:
            self.group.meet(self.timeout_s)
        self.workspace.failed = False


def regions_of(layout: Layout, space: str) -> list[Region]:
    """The regions of a space as the machine names them. What a launch finds in those that the host
    fills or reads was not written in the same launch.
    """
    return [
        Region(r.name, r.offset, r.num_bytes, r.num_bytes // r.shape[0], r.kind == DATA and not (
            r.name.startswith("input_") or r.name.endswith("trace")
        ))
        for r in layout.of_space(space)
    ]  # fmt: skip


def _copy_unless_there(buffer: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy rows to the start of a buffer, unless that is where they are."""
    if rows.data_ptr() != buffer.data_ptr():
        buffer[: rows.shape[0]].copy_(rows)
