"""More ranks than GPUs: ranks r, r + D, ... of a layer on GPU r of D, all in one process."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from megamoe import compile
from megamoe.backends import GpuBackend
from megamoe.config import MoEConfig
from megamoe.faults import Limits
from megamoe.health import Health
from megamoe.reference import Weights
from megamoe.regions import layout_of
from megamoe.weights import empty_tile_scales, write_tile_scales
from tests.gpu import harness
from tests.gpu.configs import CONFIGS, split
from workspace import Workspace
from workspace.layout import SYMMETRIC
from workspace.symmetric import Allocation, in_process


def connect(devices: Sequence[torch.device]) -> None:
    """Let every GPU reach the memory of every other: torch does so at the first copy."""
    for a in devices:
        for b in devices:
            torch.empty(1, device=a).copy_(torch.empty(1, device=b))


class Spread:
    """A layer of `tests.gpu.configs` with its ranks spread over GPUs: a backend for the ranks of
    each, which forks and joins them as on one GPU, and real links between them.
    """

    def __init__(self, name: str, num_gpus: int):
        config, kernel = split(CONFIGS[name])
        self.layout = layout_of(config, kernel)
        self.ranks = [range(first, config.num_ranks, num_gpus) for first in range(num_gpus)]
        devices = [torch.device("cuda", index) for index in range(num_gpus)]
        connect(devices)
        memory = [in_process(self.layout, device).spaces for device in devices]
        spaces = {rank: memory[rank % num_gpus][rank] for rank in range(config.num_ranks)}
        bases = tuple(space[SYMMETRIC].data_ptr() for space in spaces.values())
        library = compile.load(config, kernel, os.environ.get("MEGAMOE_KERNEL_DIR"))
        weights = harness.weights_of(
            config.num_experts, config.hidden_size, config.intermediate_size, config.precision
        )
        local = config.local_experts
        self.backends, self.held = [], []
        for device, ranks in zip(devices, self.ranks, strict=True):
            here = Allocation({rank: spaces[rank] for rank in ranks}, bases)
            sms = torch.cuda.get_device_properties(device).multi_processor_count
            workspace = Workspace(self.layout, device, here)
            workspace.health = Health(workspace, None)
            limits = Limits(harness.TIMEOUT_S, harness.TIMEOUT_S)
            backend = GpuBackend(workspace, library, sms // len(ranks), limits)
            experts = [weights.of(slice(rank * local, (rank + 1) * local)) for rank in ranks]
            experts = [_on(device, part) for part in experts]
            tables = [_tables(config, part) for part in experts]
            backend.set_weights(experts, tables)
            self.backends.append(backend)
            self.held += experts, tables
        for device in devices:
            torch.cuda.synchronize(device)

    def place(self, inputs) -> list[list[list[torch.Tensor]]]:
        """(xs, ids, weights), lists by rank, as such lists for the ranks of every GPU."""
        return [
            [[part[rank].to(backend.device) for rank in ranks] for part in inputs]
            for backend, ranks in zip(self.backends, self.ranks, strict=True)
        ]

    def launch(self, placed) -> list[list[torch.Tensor]]:
        """Start a forward; outputs by GPU and by rank there."""
        outputs = []
        for backend, (xs, ids, weights) in zip(self.backends, placed, strict=True):
            rows = [(*row, None, None, None) for row in zip(xs, ids, weights, strict=True)]
            outputs.append(backend.forward(rows))
        return outputs

    def synchronize(self) -> None:
        for backend in self.backends:
            backend.synchronize()

    def by_rank(self, parts) -> list:
        """What `place` or `launch` gave for every GPU, one list in order of the ranks."""
        found = {
            rank: item
            for ranks, items in zip(self.ranks, parts, strict=True)
            for rank, item in zip(ranks, items, strict=True)
        }
        return [found[rank] for rank in sorted(found)]


def _tables(config: MoEConfig, weights: Weights) -> tuple:
    """Scales as the kernel reads them."""
    tables = empty_tile_scales(config, len(weights.w13), weights.w13.device)
    if tables is None:
        return weights.w13_scale, weights.w2_scale
    write_tile_scales(weights, *tables)
    return tables


def _on(device: torch.device, weights: Weights) -> Weights:
    return Weights(*(None if part is None else part.to(device) for part in weights))
