"""How a forward runs: by the emulator on CPU tensors, or by kernel launches on a GPU.

Both take lists with one entry per rank of this process and know nothing of validation. The GPU
backend launches once per rank; a single rank launches on the current stream, several virtual ranks
fork from it and join it again.
"""

from __future__ import annotations

import ctypes
import math

import torch

from megamoe import faults
from megamoe.compile import CompiledKernel
from megamoe.group import Group
from megamoe.reference import Weights
from megamoe.weights import tile_scales
from workspace.layout import LOCAL, SYMMETRIC
from workspace.views import Workspace

EMULATED_CTAS = 2


class EmulatorBackend:
    """Forward by the emulator."""

    def __init__(self, workspace: Workspace, clamp: float | None):
        from megamoe.emulator import Emulator  # only here: a GPU host has no use for it

        self.config, self.workspace = workspace.layout.config, workspace
        self.emulator = Emulator(workspace, num_ctas=EMULATED_CTAS, clamp=clamp)
        self.nvlink_bytes: int | None = None
        self.launches = 0
        # Our last launch: who shares the workspace recovers that, but not our memory model.
        self.failed = False

    def load_weights(self, weights: list[Weights]) -> None:
        self.emulator.load_weights(weights)

    def forward(self, xs, ids, weights, scales, outs, counts) -> list[torch.Tensor]:
        experts = self.config.num_experts
        for rank, idx in enumerate(ids):
            bad = (idx < -1) | (idx >= experts)
            if bad.any():
                token, slot = bad.nonzero()[0].tolist()
                value = idx[token, slot].item()
                raise faults.InvalidExpertError(
                    faults.describe_invalid_expert(rank, token, slot, value, experts)
                )
        if self.failed or self.workspace.failed:
            self.recover()
        self.failed = self.workspace.failed = True  # stays so if the launch raises
        outputs = self.emulator.launch(
            xs, ids, weights, seed=self.launches, x_scales=scales, expert_counts=counts
        )
        self.failed = self.workspace.failed = False
        self.launches += 1
        self.nvlink_bytes = self.emulator.nvlink_bytes
        return [
            output if out is None else out.copy_(output)
            for output, out in zip(outputs, outs, strict=True)
        ]

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def recover(self) -> None:
        self.emulator.recover()
        self.failed = self.workspace.failed = False


class GpuBackend:
    """Forward by one kernel launch per rank of this process."""

    nvlink_bytes = None

    def __init__(
        self,
        workspace: Workspace,
        kernel: CompiledKernel,
        num_sms: int,
        timeout_s: float,
        group: Group | None,
        clamp: float | None,
    ):
        self.layout, self.workspace, self.device = workspace.layout, workspace, workspace.device
        self.group, self.timeout_s = group, timeout_s
        kernel.to_device(self.device.index)
        self.ranks = workspace.local_ranks
        views = [workspace.regions(rank) for rank in self.ranks]
        self.outputs = [view["layer_output"] for view in views]
        self.staged = [view["input_token_buffer"] for view in views]
        config = self.layout.config
        self.quantizes = config.recipe.scaled
        self.staged_scales = []
        if self.quantizes:
            scales = config.token_scales
            self.staged_scales = [view["input_sf_buffer"][:, :scales] for view in views]
        with torch.inference_mode(False):  # made anywhere, zeroed anywhere
            shape = len(self.ranks), faults.RECORD_WORDS
            self.records = torch.zeros(shape, dtype=torch.int32, device="cpu").pin_memory()
        # Plain loads: a forward looks at every status and must not pay for a tensor operation.
        words = ctypes.c_int32 * faults.RECORD_WORDS
        self.status = [words.from_address(row.data_ptr()) for row in self.records]
        with torch.cuda.device(self.device):
            several = len(self.ranks) > 1
            self.streams = [torch.cuda.Stream() for _ in self.ranks] if several else []
            self.fork = torch.cuda.Event()
            self.joins = [torch.cuda.Event() for _ in self.streams]
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
                num_ctas=num_sms,
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

    def forward(self, xs, ids, weights, scales, outs, counts) -> list[torch.Tensor]:
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self.forward(xs, ids, weights, scales, outs, counts)
        reported = any(record[faults.STATUS] for record in self.status)
        if (reported or self.workspace.failed) and not torch.cuda.is_current_stream_capturing():
            self.synchronize()
            self.recover()
        ys = [
            output[: x.shape[0]] if out is None else out
            for output, out, x in zip(self.outputs, outs, xs, strict=True)
        ]
        current = torch.cuda.current_stream()
        ranks = list(zip(xs, ids, weights, ys, scales, counts, strict=True))
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

    def _stage_and_launch(
        self, index: int, stream: torch.cuda.Stream, x, idx, weight, y, scale, counts
    ) -> None:
        """Put x where peers can read it, unless the launch itself does, then launch. A job of one
        rank without scales reads x itself.
        """
        if scale is not None:
            _copy_unless_there(self.staged_scales[index], scale)
        if scale is not None or (self.layout.config.num_ranks > 1 and not self.quantizes):
            _copy_unless_there(self.staged[index], x)
        staged = scale is not None
        self.launch(index, x, idx, weight, y, stream.cuda_stream, staged, counts)

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

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)
        errors = [faults.error_of(record, self.layout) for record in self.records.tolist()]
        errors = [error for error in errors if error is not None]
        if not errors:
            return
        self.records.zero_()
        # The cause first: a wait of its own, then a peer's failure, then bad input.
        kinds = (faults.InvalidExpertError, faults.PeerFailed, faults.LaunchTimeout)
        errors.sort(key=lambda error: -kinds.index(type(error)))
        if isinstance(errors[0], faults.LaunchTimeout):
            self.workspace.failed = True
        if self.workspace.failed and self.group is None:
            self.recover()
        raise errors[0]

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


def _copy_unless_there(buffer: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy rows to the start of a buffer, unless that is where they are."""
    if rows.data_ptr() != buffer.data_ptr():
        buffer[: rows.shape[0]].copy_(rows)
