"""MegaMoE: the layer as a Python object. Weights, workspace, forward, checks.

On a GPU a forward is one kernel launch per rank; on a machine without one the same launch executes
the kernel's PTX (`megamoe.machine`). The ranks are either one per process (`group`), each on a GPU of its own, or all in
this process (`world`): one, or several virtual ranks that share a GPU. Virtual ranks launch side by
side on streams of their own, so their CTAs must fit the GPU together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from megamoe import budget, compile
from megamoe.backends import CPU_CTAS, CpuBackend, GpuBackend
from megamoe.config import KernelConfig, MoEConfig, select, supports
from megamoe.group import Group, where
from megamoe.inputs import by_rank, check_inputs
from megamoe.reference import Weights
from megamoe.weights import check_weights
from workspace.layout import Layout, layout_of
from workspace.views import Workspace

MAX_TIMEOUT_S = 24 * 60 * 60.0

Tensors = torch.Tensor | Sequence[torch.Tensor]


class MegaMoE:
    """One expert-parallel MoE layer, forward only:
    y[t] = sum_k topk_weights[t, k] * expert[topk_idx[t, k]](x[t]).

    Arguments (integers unless said otherwise):
        num_experts, top_k, hidden_size, intermediate_size: E, K, H, I of the whole layer; H and I
            are multiples of 128, K <= 16.
        max_tokens_per_rank: largest T that any rank will pass; it sizes the workspace.
        world: number of ranks W, all in this process; E must be divisible by it.
        group: a torch.distributed process group with one process per GPU of this node, instead of
            `world`. Construction is then collective, and so is a forward.
        precision: "bf16"; "fp8_block", e4m3 with a scale per 128 columns of a token and per
            128 x 128 weights, as DeepSeek-V3 checkpoints have them; "fp8_channel", e4m3 with a
            scale per token and per output channel.
        device: "cuda", "cuda:1", "cpu" (executes the PTX) or a torch.device; default is the current GPU if
            there is one.
        num_sms: CTAs per rank, at most one per SM over all ranks of a GPU; default: all of them.
        timeout_s: seconds that a wait inside a launch may take before it ends with LaunchTimeout;
            above 0 and at most a day.
        kernel_dir: directory of kernels built ahead of time.
        kernel_options: fields of `KernelConfig` to override. With `only` a launch does a part of
            the work, to be timed, and its outputs mean nothing.
        workspace: `workspace` of another layer of the same configuration, to share. Layers that
            share one run one after the other, and one's output is valid until the next runs.
        activation_clamp: a float c > 0: SwiGLU takes min(gate, c) and up within -c..c; default:
            no clamp.

    A layer, and all that share its workspace, are used by one thread and one stream at a time.

    Raises ValueError for an unsupported configuration; with `group`, RanksDisagree (a ValueError)
    on every rank if one of them differs or cannot run.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        max_tokens_per_rank: int,
        world: int | None = None,
        group: torch.distributed.ProcessGroup | None = None,
        precision: str = "bf16",
        device: torch.device | str | None = None,
        num_sms: int | None = None,
        timeout_s: float = 30.0,
        kernel_dir: Path | str | None = None,
        kernel_options: dict | None = None,
        workspace: Workspace | None = None,
        activation_clamp: float | None = None,
    ):
        if group is not None and world is not None:
            raise ValueError(f"world={world} and group exclude each other")
        self.group = None if group is None else Group(group)
        world = self.group.size if self.group else (1 if world is None else world)
        self.config = MoEConfig(
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            max_tokens_per_rank=max_tokens_per_rank,
            num_ranks=world,
            precision=precision,
        )
        self.timeout_s, self.num_sms = timeout_s, num_sms
        self.activation_clamp = activation_clamp
        error = None
        try:
            kernel = self._settle(device, kernel_dir, kernel_options, workspace)
        except Exception as caught:  # whatever it is, the other ranks must not wait for this one
            error = caught
        if self.group is not None:
            shared = getattr(workspace, "name", None)
            self.group.agree(self._facts(error) | {"shared workspace": shared})
        if error is not None:
            raise error
        self.workspace = workspace or Workspace(
            self.layout,
            self.device,
            group=self.group and self.group.process_group,
            name=self.group.prefix if self.group else "",
        )
        common = self.workspace, kernel, self.num_sms, self.timeout_s
        if self.device.type == "cpu":
            self.backend = CpuBackend(*common, activation_clamp)
        else:
            self.backend = GpuBackend(*common, self.group, activation_clamp)
        self._weights_loaded = False

    def _settle(
        self, device, kernel_dir, kernel_options, workspace
    ) -> compile.CompiledKernel:
        """Check everything that this process can check alone; the kernel."""
        supports(self.config)
        self.kernel_config = _kernel_config(self.config, kernel_options)
        self.layout = layout_of(self.config, self.kernel_config)
        timeout_s, clamp, sms = self.timeout_s, self.activation_clamp, self.num_sms
        if not (_is_positive(timeout_s) and timeout_s <= MAX_TIMEOUT_S):
            raise ValueError(
                f"timeout_s={timeout_s!r} must be > 0 and at most {MAX_TIMEOUT_S:.0f} seconds"
            )
        if clamp is not None and not _is_positive(clamp):
            raise ValueError(
                f"activation_clamp={clamp!r} must be a finite float32 number > 0, or None"
            )
        if sms is not None and (isinstance(sms, bool) or not isinstance(sms, int) or sms < 1):
            raise ValueError(f"num_sms={sms!r} must be an integer >= 1, or None")
        self.device = _resolve_device(device)
        if workspace is not None:
            _check_shared(workspace, self.layout, self.device)
        if self.device.type == "cpu":
            if self.group is not None:
                raise ValueError("group needs one GPU per process; on a CPU use world")
            self.num_sms = self.num_sms or CPU_CTAS
            return compile.load(self.config, self.kernel_config, kernel_dir, cpu=True)
        ranks_here = 1 if self.group else self.config.num_ranks
        self.num_sms = _check_gpu(self.device, self.num_sms, ranks_here)
        return compile.load(self.config, self.kernel_config, kernel_dir)

    def _facts(self, error: Exception | None) -> dict[str, object]:
        """What all ranks of a job must have in common."""
        facts = {"error": None if error is None else str(error), "gpu": None, "host": None}
        if error is None:
            facts |= where(self.device) | _fields(self.layout)
            facts["activation_clamp"] = self.activation_clamp
            facts |= {"megamoe version": compile.source_digest(), "torch": torch.__version__}
        return facts

    @staticmethod
    def workspace_bytes(
        *,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        max_tokens_per_rank: int,
        world: int = 1,
        precision: str = "bf16",
        kernel_options: dict | None = None,
    ) -> dict[str, int]:
        """Bytes that one rank's workspace would take, without allocating it or needing a GPU.

        Keys: the kinds of region ("counter", "padding", "data", "barrier"), "reset" (what is zero
        again between launches) and "total" (with alignment). Weights are extra: 6 * e * I * H bytes
        in BF16, half of it and the scales in FP8. Raises ValueError for an unsupported
        configuration.
        """
        config = MoEConfig(
            num_experts,
            top_k,
            hidden_size,
            intermediate_size,
            max_tokens_per_rank,
            world,
            precision,
        )
        supports(config)
        layout = layout_of(config, _kernel_config(config, kernel_options))
        return layout.bytes_by_kind() | {
            "reset": layout.reset_bytes,
            "total": layout.total_bytes,
        }

    @property
    def num_ranks(self) -> int:
        """Ranks of the job (W)."""
        return self.config.num_ranks

    @property
    def local_ranks(self) -> list[int]:
        """Ranks that live in this process."""
        return self.workspace.local_ranks

    @property
    def nvlink_bytes(self) -> int | None:
        """Bytes that crossed ranks in the last forward; counted on a CPU only."""
        return self.backend.nvlink_bytes

    def load_weights(
        self,
        w13: torch.Tensor,
        w2: torch.Tensor,
        w13_scale: torch.Tensor | None = None,
        w2_scale: torch.Tensor | None = None,
    ) -> None:
        """Take the experts of the ranks of this process, in checkpoint layout.

        w13: [n, 2I, H], gate rows then up rows; w2: [n, H, I]; bfloat16, or float8_e4m3fn for the
        precisions with scales. w13_scale, w2_scale: float32, what the stored weights are multiplied
        by; for "fp8_block" [n, 2I/128, H/128] and [n, H/128, I/128], for "fp8_channel" [n, 2I] and
        [n, H]. `megamoe.quantize_weights` makes all four. n is E if all ranks live here, e = E / W
        with a process per rank (its experts are number rank * e and following).

        All are contiguous and on the device, and start at a multiple of 16 bytes. Raises
        ValueError, naming the tensor, otherwise. Weights are not copied: they must stay alive, and
        a forward reads what they hold then; only scales of weight blocks are laid out anew here.
        Whoever puts another tensor in their place (`parameter.data = ...`) loads them again.
        """
        weights = Weights(w13, w2, w13_scale, w2_scale)
        local, ranks = self.config.experts_per_rank, len(self.local_ranks)
        check_weights(self.config, local * ranks, self.device, weights)
        self.backend.load_weights(
            [weights.of(slice(i * local, (i + 1) * local)) for i in range(ranks)]
        )
        self._weights_loaded = True

    def __call__(
        self,
        x: Tensors,
        topk_idx: Tensors,
        topk_weights: Tensors,
        x_scale: Tensors | None = None,
        out: Tensors | None = None,
        expert_counts: Tensors | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Forward. Plain tensors if one rank lives here, else one tensor per rank in every
        argument; T may differ per rank and be zero.

        x: [T, H] bfloat16, which the launch quantises if the precision has scales, or float8_e4m3fn
        with x_scale: float32 [T, H/128], for "fp8_channel" [T, 1]. topk_idx: [T, K] int64 or int32,
        -1 masks a slot. topk_weights: [T, K] float32. out: [T, H] bfloat16, or None. expert_counts:
        int32 [e], or None; the rows that each expert of the rank receives are added to it.
        All are contiguous; x and out start at a multiple of 16 bytes, and an out shares no memory
        with the x of its rank or another out. Returns [T, H] per rank: `out`, or a buffer of the
        workspace that the next forward on it overwrites.

        Raises ValueError for wrong input. On a GPU nothing waits for the launch, so an expert id
        that is out of range (InvalidExpertError, a ValueError) or a wait that timed out
        (LaunchTimeout) is raised by `synchronize`, or by a later forward.
        """
        single = isinstance(x, torch.Tensor)
        arguments = {"x": x, "topk_idx": topk_idx, "topk_weights": topk_weights}
        xs, ids, weights = (by_rank(name, item, single) for name, item in arguments.items())
        optional = {"x_scale": x_scale, "out": out, "expert_counts": expert_counts}
        scales, outs, counts = (
            [None] * len(xs) if item is None else by_rank(name, item, single)
            for name, item in optional.items()
        )
        if not self._weights_loaded:
            raise ValueError("weights are not loaded: call load_weights(w13, w2) first")
        ranks, buffer_of = self.local_ranks, self.input_scale_buffer
        columns = xs, ids, weights, scales, outs, counts
        check_inputs(self.config, self.device, ranks, buffer_of, *columns)
        outputs = self.backend.forward(*columns)
        return outputs[0] if single else outputs

    def synchronize(self) -> None:
        """Wait for all launches; raise InvalidExpertError or LaunchTimeout if one failed.

        After a timeout the next forward recovers the workspace first; with `group` that waits for
        every rank to do the same, at most `timeout_s`.
        """
        self.backend.synchronize()

    def recover(self) -> None:
        """Return a workspace to its first state after a failed launch; collective with `group`.

        The next forward does it by itself; a CUDA graph does not. Raises MissingRank, naming the
        ranks that did not come within `timeout_s`.
        """
        self.backend.recover()

    def input_buffer(self, rank: int | None = None) -> torch.Tensor:
        """[max_tokens_per_rank, H] in symmetric memory, of the dtype that tokens travel in: an x of
        that dtype that starts there is not copied. Raises ValueError for a rank of another process.
        """
        return self._region("input_token_buffer", rank)

    def input_scale_buffer(self, rank: int | None = None) -> torch.Tensor:
        """[max_tokens_per_rank, S] float32 in symmetric memory, S scales per token: an x_scale that
        starts there is not copied. Raises ValueError if the precision has no scales.
        """
        if not self.config.recipe.scaled:
            raise ValueError(f"precision={self.config.precision!r} has no scales")
        return self._region("input_sf_buffer", rank)[:, : self.config.token_scales]

    def _region(self, name: str, rank: int | None) -> torch.Tensor:
        rank = self.local_ranks[0] if rank is None else rank
        if rank not in self.local_ranks:
            raise ValueError(f"rank={rank!r} is none of this process, which has {self.local_ranks}")
        return self.workspace.regions(rank)[name]


def _kernel_config(config: MoEConfig, options: dict | None) -> KernelConfig:
    """The kernel's configuration with `options`; ValueError if it is not legal or does not fit."""
    options = {} if options is None else options
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"kernel_options={options!r} must be a dict with names of fields as keys")
    kernel = select(config, **options)
    budget.check(config, kernel)
    return kernel


def _is_positive(value: object) -> bool:
    """True for a number above 0 that is finite in float32."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= torch.finfo(torch.float32).max


def _fields(layout: Layout) -> dict[str, object]:
    """Every field of the two configurations."""
    kernel = dataclasses.asdict(layout.kernel)
    return dataclasses.asdict(layout.config) | {f"kernel.{k}": v for k, v in kernel.items()}


def _check_shared(workspace: Workspace, layout: Layout, device: torch.device) -> None:
    """Raise ValueError, naming the fields that differ, unless the workspace is one of this layout
    on this device.
    """
    if not isinstance(workspace, Workspace):
        raise ValueError(f"workspace must be that of another layer, got {type(workspace).__name__}")
    has = _fields(workspace.layout) | {"device": str(workspace.device)}
    needed = _fields(layout) | {"device": str(device)}
    differ = [name for name in needed if has[name] != needed[name]]
    if differ:
        raise ValueError(
            "workspace is of another layer: "
            + ", ".join(f"{name}={has[name]!r}, not {needed[name]!r}" for name in differ)
        )


def _resolve_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is no device of torch: use 'cuda' or 'cpu'") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"device={str(device)!r} is not supported; use 'cuda' or 'cpu'")
    if not torch.cuda.is_available():
        raise ValueError(
            f"device={str(device)!r}, but torch sees no GPU; use device='cpu'"
        )
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"device={str(device)!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return device


def _check_gpu(device: torch.device, num_sms: int | None, ranks_here: int) -> int:
    """CTAs per rank; ValueError unless this GPU can hold all CTAs of all its ranks at once."""
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        raise ValueError(
            f"device={device} has compute capability {capability}, the kernel needs (9, 0)"
        )
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    per_rank = sms // ranks_here if num_sms is None else num_sms
    if not 1 <= per_rank * ranks_here <= sms:
        raise ValueError(
            f"num_sms={per_rank} for each of {ranks_here} ranks on {device} must add up to 1..{sms}"
        )
    return per_rank
