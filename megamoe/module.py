"""MegaMoE: the layer as a Python object. Weights, workspace, forward, checks.

On a GPU a forward is one kernel launch per rank; on a machine without one the emulator runs the
same protocol. All ranks of `world` live in this process: one rank, or several virtual ranks that
share a GPU (their launches run side by side on streams of their own, so their CTAs must fit the GPU
together).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch

from megamoe import budget, compile, faults
from megamoe.config import MoEConfig, select, supports
from megamoe.weights import check_tensor, check_weights, interleave_gate_up
from workspace.layout import LOCAL, SYMMETRIC, layout_of
from workspace.views import Workspace

EMULATED_CTAS = 2
INDEX_DTYPES = (torch.int64, torch.int32)

Tensors = torch.Tensor | Sequence[torch.Tensor]


class MegaMoE:
    """One expert-parallel MoE layer, forward only: y[t] = sum_k weight[t, k] * expert[idx[t,
    k]](x[t]).

    Arguments (integers unless said otherwise):
        num_experts, top_k, hidden_size, intermediate_size: E, K, H, I; H and I are multiples of
        128, K <= 16.
        max_tokens_per_rank: largest T that any rank will pass; it sizes the workspace.
        world: number of ranks W; E must be divisible by it.
        precision: "bf16".
        device: "cuda", "cuda:1", "cpu" (emulated) or a torch.device; default is the current GPU if
        there is one.
        num_sms: CTAs per rank, at most one per SM over all ranks of a GPU; default shares the GPU
        evenly.
        timeout_s: seconds that any wait inside a launch may take before the launch ends with
        LaunchTimeout.
        kernel_dir: directory of kernels built ahead of time.
        kernel_options: fields of `KernelConfig` to override.

    Raises ValueError for an unsupported configuration.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        max_tokens_per_rank: int,
        world: int = 1,
        precision: str = "bf16",
        device: torch.device | str | None = None,
        num_sms: int | None = None,
        timeout_s: float = 30.0,
        kernel_dir: Path | str | None = None,
        kernel_options: dict | None = None,
    ):
        self.config = MoEConfig(
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            max_tokens_per_rank=max_tokens_per_rank,
            num_ranks=world,
            precision=precision,
        )
        supports(self.config)
        self.kernel_config = select(self.config, **(kernel_options or {}))
        supports(self.config, self.kernel_config)
        budget.check(self.config, self.kernel_config)
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s} must be > 0")
        self.timeout_s = timeout_s
        self.device = _resolve_device(device)
        backend = _Emulated if self.device.type == "cpu" else _OnGpu
        self.num_sms = num_sms
        self.layout = layout_of(self.config, self.kernel_config)
        if backend is _OnGpu:
            _check_gpu(self)
            kernel = compile.load(self.config, self.kernel_config, kernel_dir)
        self.workspace = Workspace(self.layout, self.device)
        self._backend = _Emulated(self) if backend is _Emulated else _OnGpu(self, kernel)
        self._weights_loaded = False

    @property
    def num_ranks(self) -> int:
        return self.config.num_ranks

    @property
    def nvlink_bytes(self) -> int | None:
        """Bytes that crossed ranks in the last forward; counted by the emulator only, None on a
        GPU.
        """
        return self._backend.nvlink_bytes

    def load_weights(self, w13: torch.Tensor, w2: torch.Tensor) -> None:
        """Take the experts of all ranks of this process, in checkpoint layout.

        w13: [E, 2I, H], gate rows then up rows; w2: [E, H, I]; dtype of the precision, contiguous,
        on the device. w13 is copied (interleaved); w2 is kept as it is and must not change. Raises
        ValueError otherwise.
        """
        check_weights(self.config, self.config.num_experts, self.device, w13, w2)
        local = self.config.experts_per_rank
        gate_up = interleave_gate_up(w13)
        self._backend.load_weights(list(gate_up.split(local)), list(w2.split(local)))
        self._weights_loaded = True

    def __call__(
        self, x: Tensors, topk_idx: Tensors, topk_weights: Tensors
    ) -> torch.Tensor | list[torch.Tensor]:
        """Forward. One tensor each if world == 1, else one per rank; T may differ per rank and be
        zero.

        x: [T, H] of the precision's token dtype; topk_idx: [T, K] int64 or int32, -1 masks a slot;
        topk_weights: [T, K] float32. Returns [T, H] per rank, in buffers of this object that the
        next forward overwrites.

        Raises ValueError for wrong input; on a GPU nothing waits for the launch, so an expert id
        that is out of range (InvalidExpertError, a ValueError) or a wait that timed out
        (LaunchTimeout) is raised by `synchronize`, or by a later forward.
        """
        single = isinstance(x, torch.Tensor)
        xs, ids, weights = (
            [item] if single else list(item) for item in (x, topk_idx, topk_weights)
        )
        self._check_inputs(xs, ids, weights)
        outputs = self._backend.forward(xs, ids, weights)
        return outputs[0] if single else outputs

    def synchronize(self) -> None:
        """Wait for all launches; raise InvalidExpertError or LaunchTimeout if one failed.

        After a timeout the workspace has been recovered: the next forward starts afresh.
        """
        self._backend.synchronize()

    def input_buffer(self, rank: int = 0) -> torch.Tensor:
        """[max_tokens_per_rank, H] in symmetric memory: x that lies here (its first T rows) is not
        copied again.
        """
        return self.workspace.regions(rank)["input_token_buffer"]

    def _check_inputs(self, xs, ids, weights) -> None:
        config = self.config
        if not self._weights_loaded:
            raise ValueError("weights are not loaded: call load_weights(w13, w2) first")
        for name, items in (("x", xs), ("topk_idx", ids), ("topk_weights", weights)):
            if len(items) != config.num_ranks:
                raise ValueError(
                    f"{name} holds {len(items)} tensors, expected one for each rank of "
                    f"world={config.num_ranks}"
                )
        token_dtype = getattr(torch, config.recipe.token)
        for rank, (x, idx, weight) in enumerate(zip(xs, ids, weights, strict=True)):
            where = f"[{rank}]" if config.num_ranks > 1 else ""
            if not isinstance(x, torch.Tensor) or x.dim() != 2:
                raise ValueError(f"x{where} must be a tensor of shape [T, {config.hidden_size}]")
            tokens = x.shape[0]
            if tokens > config.max_tokens_per_rank:
                raise ValueError(
                    f"x{where} has T={tokens} tokens > "
                    f"max_tokens_per_rank={config.max_tokens_per_rank}"
                )
            check_tensor(f"x{where}", x, (tokens, config.hidden_size), token_dtype, self.device)
            slots = (tokens, config.top_k)
            check_tensor(f"topk_weights{where}", weight, slots, torch.float32, self.device)
            dtype = (
                idx.dtype
                if isinstance(idx, torch.Tensor) and idx.dtype in INDEX_DTYPES
                else torch.int64
            )
            check_tensor(f"topk_idx{where}", idx, slots, dtype, self.device)


def _resolve_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r} is not supported; use 'cuda' or 'cpu'")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"device={str(device)!r}, but torch sees no GPU; use device='cpu' for the emulator"
            )
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def _check_gpu(moe: MegaMoE) -> None:
    """Settle num_sms; raise ValueError unless this GPU can hold all CTAs of all ranks at once."""
    capability = torch.cuda.get_device_capability(moe.device)
    if capability != (9, 0):
        raise ValueError(
            f"device={moe.device} has compute capability {capability}, the kernel needs (9, 0)"
        )
    sms = torch.cuda.get_device_properties(moe.device).multi_processor_count
    if moe.num_sms is None:
        moe.num_sms = sms // moe.num_ranks
    if not 1 <= moe.num_sms * moe.num_ranks <= sms:
        raise ValueError(
            f"num_sms={moe.num_sms} x world={moe.num_ranks} must be in 1..{sms}, "
            f"the SMs of {moe.device}"
        )


class _Emulated:
    """Forward by the emulator, on CPU tensors."""

    def __init__(self, moe: MegaMoE):
        from megamoe.emulator import Emulator  # only here: a GPU host has no use for it

        self.config = moe.config
        self.emulator = Emulator(moe.workspace, num_ctas=EMULATED_CTAS)
        self.nvlink_bytes: int | None = None
        self.launches = 0

    def load_weights(self, w13: list[torch.Tensor], w2: list[torch.Tensor]) -> None:
        self.emulator.load_weights(w13, w2)

    def forward(self, xs, ids, weights) -> list[torch.Tensor]:
        experts = self.config.num_experts
        for rank, idx in enumerate(ids):
            bad = (idx < -1) | (idx >= experts)
            if bad.any():
                token, slot = bad.nonzero()[0].tolist()
                raise ValueError(
                    faults.describe_invalid_expert(
                        rank, token, slot, idx[token, slot].item(), experts
                    )
                )
        outputs = self.emulator.launch(xs, ids, weights, seed=self.launches)
        self.launches += 1
        self.nvlink_bytes = self.emulator.nvlink_bytes
        return outputs

    def synchronize(self) -> None:
        pass


class _OnGpu:
    """Forward by one kernel launch per rank; several ranks fork from the current stream and join it
    again.
    """

    nvlink_bytes = None

    def __init__(self, moe: MegaMoE, kernel: compile.CompiledKernel):
        config, workspace = moe.config, moe.workspace
        self.layout, self.workspace, self.device = moe.layout, workspace, moe.device
        kernel.to_device(moe.device.index)
        ranks = range(config.num_ranks)
        shape = (config.max_tokens_per_rank, config.hidden_size)
        dtype = getattr(torch, config.recipe.output)
        self.outputs = [torch.empty(shape, dtype=dtype, device=moe.device) for _ in ranks]
        self.staged = [workspace.regions(rank)["input_token_buffer"] for rank in ranks]
        self.records = torch.zeros(
            config.num_ranks, faults.RECORD_WORDS, dtype=torch.int32
        ).pin_memory()
        # Plain loads: a forward looks at every status and must not pay for a tensor operation.
        words = ctypes.c_int32 * faults.RECORD_WORDS
        self.status = [words.from_address(row.data_ptr()) for row in self.records]
        with torch.cuda.device(moe.device):
            self.streams = [torch.cuda.Stream() for _ in ranks] if len(ranks) > 1 else []
            self.fork = torch.cuda.Event()
            self.joins = [torch.cuda.Event() for _ in self.streams]
        self.launchers = [kernel.launcher() for _ in ranks]
        for rank, launcher in enumerate(self.launchers):
            launcher.set(
                symmetric_base=workspace.allocation.base(rank, SYMMETRIC),
                local_base=workspace.allocation.base(rank, LOCAL),
                peers=workspace.peer_tables[rank].data_ptr(),
                y=self.outputs[rank].data_ptr(),
                record=self.records[rank].data_ptr(),
                timeout_ns=int(moe.timeout_s * 1e9),
                rank=rank,
                num_ctas=moe.num_sms,
            )
        self.weights: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def load_weights(self, w13: list[torch.Tensor], w2: list[torch.Tensor]) -> None:
        self.weights = (w13, w2)
        for launcher, gate_up, down in zip(self.launchers, w13, w2, strict=True):
            launcher.set(w13=gate_up.data_ptr(), w2=down.data_ptr())

    def forward(self, xs, ids, weights) -> list[torch.Tensor]:
        failed = any(record[faults.STATUS] for record in self.status)
        if failed and not torch.cuda.is_current_stream_capturing():
            self.synchronize()
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self.forward(xs, ids, weights)
        current = torch.cuda.current_stream()
        if not self.streams:
            self._launch(0, xs[0], ids[0], weights[0], current.cuda_stream)
        else:
            self.fork.record(current)
            for rank, stream in enumerate(self.streams):
                stream.wait_event(self.fork)
                with torch.cuda.stream(stream):
                    self._stage(rank, xs[rank])
                    self._launch(rank, xs[rank], ids[rank], weights[rank], stream.cuda_stream)
                    self.joins[rank].record(stream)
            for join in self.joins:
                current.wait_event(join)
        return [output[: x.shape[0]] for output, x in zip(self.outputs, xs, strict=True)]

    def _stage(self, rank: int, x: torch.Tensor) -> None:
        """Put x where peers can read it. A single rank reads x itself and needs no copy."""
        staged = self.staged[rank][: x.shape[0]]
        if x.data_ptr() != staged.data_ptr():
            staged.copy_(x)

    def _launch(self, rank: int, x, idx, weight, stream: int) -> None:
        self.launchers[rank](
            stream,
            x=x.data_ptr(),
            topk_idx=idx.data_ptr(),
            topk_weights=weight.data_ptr(),
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
        if any(isinstance(error, faults.LaunchTimeout) for error in errors):
            self.workspace.recover()
            torch.cuda.synchronize(self.device)
        errors.sort(key=lambda error: not isinstance(error, faults.LaunchTimeout))
        raise errors[0]
