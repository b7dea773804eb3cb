"""How a forward runs: by the emulator on CPU tensors, or by kernel launches on a GPU.

Both take a row of arguments per rank of this process (`inputs.NAMES`) and know nothing of
validation. The GPU backend launches once per rank; a single rank launches on the current stream,
several virtual ranks fork from it and join it again. Nothing here is recorded for autograd.
"""

from __future__ import annotations

import math

import torch

from megamoe import faults
from megamoe.compile import CompiledKernel
from megamoe.faults import Limits
from megamoe.reference import Weights
from megamoe.streams import Streams
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

    def set_weights(self, weights: list[Weights], tables: list[tuple]) -> None:
        """By rank: weights, and their scales as a kernel reads them, which the emulator does not.
        Scales are copied, so this follows every change of them.
        """
        self.emulator.load_weights(weights)

    @torch.no_grad()
    def forward(self, rows: list[tuple]) -> list[torch.Tensor]:
        xs, ids, weights, scales, outs, counts = zip(*rows, strict=True)
        experts, health = self.config.num_experts, self.workspace.health
        for rank, idx in enumerate(ids):
            bad = (idx < -1) | (idx >= experts)
            if bad.any():
                token, slot = bad.nonzero()[0].tolist()
                value = idx[token, slot].item()
                raise faults.InvalidExpertError(
                    faults.describe_invalid_expert(rank, token, slot, value, experts)
                )
        if self.failed or health.failed:
            self.recover()
        xs, weights = ([t.detach() for t in part] for part in (xs, weights))  # it keeps them
        self.failed = health.failed = True  # stays so if the launch raises
        outputs = self.emulator.launch(
            xs, ids, weights, seed=self.launches, x_scales=scales, expert_counts=counts
        )
        self.failed = health.failed = False
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
        self.failed = self.workspace.health.failed = False

    def close(self) -> None:
        """Nothing is ever pending."""


class GpuBackend:
    """Forward by one kernel launch per rank of this process.

    num_sms: CTAs per rank. layer: number of the layer, the same on every rank that shares the
    workspace. yields: leave the SMs that a launch does not use to other streams (a launch that
    waits for the one before it would hold them).
    """

    nvlink_bytes = None

    def __init__(
        self,
        workspace: Workspace,
        kernel: CompiledKernel,
        num_sms: int,
        limits: Limits,
        layer: int = 0,
        clamp: float | None = None,
        yields: bool = False,
    ):
        self.layout, self.workspace, self.device = workspace.layout, workspace, workspace.device
        self.health, self.limits = workspace.health, limits
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
        several = len(self.ranks) > 1
        self.streams = Streams(self.device, len(self.ranks)) if several else None
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
                num_ctas=num_sms,
            )

    def set_weights(self, weights: list[Weights], tables: list[tuple]) -> None:
        """By rank: weights, and (w13_sf, w2_sf) as the kernel reads them, or None. Launches read
        what they hold then; who calls keeps them alive.
        """
        for launcher, rank, (w13_sf, w2_sf) in zip(self.launchers, weights, tables, strict=True):
            launcher.set(
                w13=rank.w13.data_ptr(),
                w2=rank.w2.data_ptr(),
                w13_sf=0 if w13_sf is None else w13_sf.data_ptr(),
                w2_sf=0 if w2_sf is None else w2_sf.data_ptr(),
            )

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
        """Put x where peers can read it, unless the launch itself does, then launch; the output. A
        job of one rank without scales reads x itself.
        """
        if scale is not None:
            _copy_unless_there(self.staged_scales[index], scale)
        if scale is not None or (self.layout.config.num_ranks > 1 and not self.quantizes):
            _copy_unless_there(self.staged[index], x)
        y = self.outputs[index][: x.shape[0]] if out is None else out
        self.launch(index, x, idx, weight, y, stream.cuda_stream, scale is not None, counts)
        return y

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
        error = self.health.take_error(self.limits)
        if error is None:
            return
        if self.health.failed and self.health.group is None:
            self.recover()
        raise error

    def recover(self) -> None:
        self.health.recover(self.limits)

    def close(self) -> None:
        """Wait for running launches; they may still write records and read the workspace."""
        torch.cuda.synchronize(self.device)
        if self.streams is not None:
            self.streams.close()


def _copy_unless_there(buffer: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy rows to the start of a buffer, unless that is where they are. Autograd sees nothing."""
    if rows.data_ptr() != buffer.data_ptr():
        buffer[: rows.shape[0]].copy_(rows.detach())
