"""MegaMoE: the layer as a torch module. Construction, weights, forward, end.

A forward is one kernel launch per rank: on a GPU, or on a CPU that executes the kernel's PTX
(`megamoe.machine`). The ranks are either one per process (`group`), each on a GPU of its own, or
all in this process (`world`): one, or several virtual ranks that share a GPU. Virtual ranks launch
side by side on streams of their own, so their CTAs must fit the GPU together.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megamoe import arguments, compile, custom_op, streams
from megamoe.backends import CPU_CTAS, Backend, CpuBackend, GpuBackend
from megamoe.config import MoEConfig, supports
from megamoe.faults import Limits
from megamoe.group import Group, where
from megamoe.health import Health
from megamoe.inputs import InputCheck, columns_of
from megamoe.reference import Weights
from megamoe.regions import layout_of
from megamoe.residents import ResidentWeights
from workspace.views import Workspace

Tensors = torch.Tensor | Sequence[torch.Tensor]


class MegaMoE(ResidentWeights):
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
            scale per token and per output channel; "fp8_mxfp4", tokens as in "fp8_block" and
            weights of 4 bits (e2m1) with a power of two per 32 columns, of which it holds a copy;
            "fp8_mxfp4_token", the same with one scale per token, faster with many tokens;
            "fp8_int4", as "fp8_mxfp4" with integers and a scale per row and 128 columns.
        device: "cuda", "cuda:1", "cpu" (slow), "meta" or a torch.device; default is the current
            GPU if there is one. On "meta" nothing is allocated and no other rank is asked until
            `to_empty(device=...)`, which is then what construction is elsewhere.
        num_sms: CTAs per rank, at most one per SM over all ranks of a GPU; default: all of them, on
            a CPU 2. With fewer than a GPU has, the rest stays free for other streams, also between
            launches.
        timeout_s: seconds that a wait inside a launch may take once all ranks have begun it, before
            it ends with LaunchTimeout; above 0 and at most a day.
        start_timeout_s: the same for all ranks and all CTAs to begin a launch, and to come to a
            recovery or a meeting: another rank may still compile or load.
        kernel_dir: directory of kernels built ahead of time.
        kernel_options: fields of `KernelConfig` to override. With `only` a launch does a part of
            the work, to be timed, and its outputs mean nothing.
        workspace: `workspace` of another layer of the same configuration, to share. Layers that
            share one run one after the other, and one's output is valid until the next runs.
        num_shared_experts: experts that every token goes to, of the same I (one of S * I columns is
            S of them: `megamoe.split_shared`). Every rank holds their weights behind those of its
            routed experts and computes its own tokens: y[t] += shared_weight * expert(x[t]).
        shared_weight: their factor, a finite float.
        activation_clamp: a float c > 0: SwiGLU takes min(gate, c) and up within -c..c; default:
            no clamp. NaN stays NaN.

    A layer, and all that share its workspace, are used by one thread and one stream at a time. It
    stays on its device with the dtypes that its weights have; it can be neither copied nor pickled,
    its `state_dict` can.

    Raises ValueError for an unsupported configuration, KernelError if no kernel can be had; with
    `group`, RanksDisagree (a ValueError) on every rank if one of them differs or cannot run.
    `ERRORS.md` beside this file says what to do about each.
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
        start_timeout_s: float = 300.0,
        kernel_dir: Path | str | None = None,
        kernel_options: dict | None = None,
        workspace: Workspace | None = None,
        activation_clamp: float | None = None,
        num_shared_experts: int = 0,
        shared_weight: float = 1.0,
    ):
        super().__init__()
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
            num_shared_experts=num_shared_experts,
        )
        self.limits = Limits(timeout_s, start_timeout_s)
        self.num_sms, self.activation_clamp = num_sms, activation_clamp
        self.shared_weight = shared_weight
        self._kernel_dir, self._kernel_options = kernel_dir, kernel_options
        self.workspace: Any = None  # a Workspace, unless the layer is closed or on "meta"
        self.backend: Backend | None = None
        self._finalizer: weakref.finalize | None = None
        self._closed, self._meetings = False, 0
        self._number = custom_op.register(self)
        self._begin(device, workspace)
        ranks_here = 1 if self.group else world
        self.num_local_experts = ranks_here * self.config.local_experts
        self._declare()

    def _begin(self, device: torch.device | str | None, workspace: Workspace | None) -> None:
        """Settle on a device, and unless that is "meta" allocate there, together with all ranks."""
        error = kernel = None
        try:
            kernel = self._settle(device, workspace)
        except Exception as caught:  # whatever it is, the other ranks must not wait for this one
            error = caught
        if self.group is not None and (error is not None or self.device.type != "meta"):
            shared = getattr(workspace, "name", None)
            self.group.agree(self._facts(error) | {"shared workspace": shared})
        if error is not None:
            raise error
        if self.device.type == "meta":
            return
        if workspace is None:
            workspace = Workspace(
                self.layout,
                self.device,
                group=self.group and self.group.process_group,
                name=self.group.prefix if self.group else "",
            )
            workspace.health = Health(workspace, self.group)
        self.workspace = workspace
        self._inputs = InputCheck(self.config, self.device, workspace)
        self._on_gpu = self.device.type == "cuda"
        self.backend = (GpuBackend if self._on_gpu else CpuBackend)(
            workspace,
            kernel,
            self.num_sms,
            self.limits,
            layer=self.group.number if self.group else 0,
            clamp=self.activation_clamp,
            shared_weight=self.shared_weight,
            yields=self._yields,
        )
        self._finalizer = weakref.finalize(self, _close, self.backend)
        self._finalizer.atexit = False  # the process ends, and CUDA with it

    def _settle(
        self, device: torch.device | str | None, workspace: Workspace | None
    ) -> compile.CompiledKernel | None:
        """Check everything that this process can check alone; the kernel, or None on "meta"."""
        supports(self.config)
        arguments.check_limits(self.limits)
        arguments.check_clamp(self.activation_clamp)
        arguments.check_shared_weight(self.shared_weight)
        arguments.check_num_sms(self.num_sms)
        self.device = arguments.resolve_device(device)
        self.kernel_config = arguments.kernel_config_of(
            self.config, self._kernel_options, self.device
        )
        self.layout = layout_of(self.config, self.kernel_config)
        ranks = [self.group.rank] if self.group else list(range(self.num_ranks))
        if self.device.type == "meta":
            if workspace is not None:
                raise ValueError("workspace is of a device, and device='meta' is none")
            return None
        if workspace is not None:
            members = self.group.members if self.group else None
            arguments.check_shared(workspace, self.layout, self.device, ranks, members)
        if self.device.type == "cpu":
            if self.group is not None:
                raise ValueError("group needs one GPU per process; on a CPU use world")
            self._yields, self.num_sms = False, self.num_sms or CPU_CTAS
        else:
            self._yields = self.num_sms is not None
            self.num_sms = arguments.check_gpu(
                self.device, self.kernel_config, self.num_sms, len(ranks)
            )
        on_cpu = self.device.type == "cpu"
        return compile.load(self.config, self.kernel_config, self._kernel_dir, cpu=on_cpu)

    def _facts(self, error: Exception | None) -> dict[str, object]:
        """What all ranks of a job must have in common."""
        facts: dict[str, object] = {
            "error": None if error is None else str(error),
            "gpu": None,
            "host": None,
        }
        if error is None:
            facts |= where(self.device) | arguments.fields_of(self.layout)
            facts["activation_clamp"] = self.activation_clamp
            facts["shared_weight"] = self.shared_weight
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
        num_shared_experts: int = 0,
    ) -> dict[str, int]:
        """Bytes that one rank's workspace would take, without allocating it or needing a GPU.

        Keys: the kinds of region ("counter", "padding", "data", "barrier"), "reset" (what is zero
        again between launches) and "total" (with alignment). Weights are extra: 6 * n * I * H bytes
        in BF16 for n local experts, half of it and the scales in FP8. Raises ValueError for an
        unsupported configuration.
        """
        config = MoEConfig(
            num_experts,
            top_k,
            hidden_size,
            intermediate_size,
            max_tokens_per_rank,
            world,
            precision,
            num_shared_experts,
        )
        supports(config)
        layout = layout_of(config, arguments.kernel_config_of(config, kernel_options))
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
        return self._running().workspace.local_ranks

    @property
    def first_local_expert(self) -> int:
        """Number of the first expert of this process; its `num_local_experts` follow each other."""
        return self.group.rank * self.config.local_experts if self.group else 0

    @property
    def nvlink_bytes(self) -> int | None:
        """Bytes that crossed ranks in the last forward; counted on a CPU only."""
        return self._running().nvlink_bytes

    def _settle_on(self, device: torch.device) -> None:
        self._begin(device, None)

    def _read(self, weights: list[Weights], tables: list[tuple]) -> None:
        if self.backend is not None:
            self.backend.set_weights(weights, tables)

    # ---------------------------------------------------------------- forward
    def forward(
        self,
        x: Tensors,
        topk_idx: Tensors,
        topk_weights: Tensors,
        x_scale: Tensors | None = None,
        out: Tensors | None = None,
        expert_counts: Tensors | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Plain tensors if one rank lives here, else one tensor per rank in every argument; T may
        differ per rank and be zero.

        x: [T, H] bfloat16, which the launch quantises if the precision has scales, or float8_e4m3fn
        with x_scale: float32 [T, H/128], or [T, 1] where a token has one scale. topk_idx: [T, K]
        int64 or int32, -1 masks a slot. topk_weights: [T, K] float32. out: [T, H] bfloat16, or
        None. expert_counts: int32 [E / W], or None; the rows that each routed expert of the rank
        receives are added to it.
        All are contiguous; x and out start at a multiple of 16 bytes, and what is written shares no
        memory with what is read, or with other outputs, of any rank of this process. Returns [T, H]
        per rank: `out`, or a buffer of the workspace that the next forward on it overwrites; a new
        tensor while torch traces, and where autograd could ask for a gradient, of which there is
        none (backward raises an error).

        Raises ValueError for wrong input; with a group the other ranks' launches then end with
        PeerFailed, which names this rank and the reason. On a GPU nothing waits for the launch: an
        expert id that is out of range (InvalidExpertError, a ValueError) is raised by
        `synchronize`, or by a later forward after it has launched; a launch that failed
        (LaunchFailed) by `synchronize`, or by a later forward in place of its launch.
        """
        arguments = x, topk_idx, topk_weights, x_scale, out, expert_counts
        single = isinstance(x, torch.Tensor)
        if custom_op.is_traced():
            ys = custom_op.trace(self._number, *columns_of(single, *arguments))
        else:
            ys = self.run(single, *arguments)
        if torch.is_grad_enabled():
            inputs = (x, topk_weights) if single else (*x, *topk_weights)
            ys = custom_op.end_gradients(ys, (*inputs, *self._parameters.values()))
        return ys[0] if single else ys

    def run(self, single: bool, *arguments) -> list[torch.Tensor]:
        """A forward behind `torch`: arguments of `forward`, `single` if they are plain; outputs by
        rank of this process. Other ranks are told of arguments that are refused.
        """
        try:
            backend = self._running()
            self._adopt_changes()
            rows = self._inputs.rows(single, *arguments)
        except Exception as error:
            if self.group is not None and self.backend is not None:
                self.backend.refuse(str(error))
            raise
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            self._captured = True
        return backend.forward(rows)

    # ---------------------------------------------------------------- failure and end
    def synchronize(self) -> None:
        """Wait for all launches; raise InvalidExpertError or LaunchFailed if one failed, of any
        layer of the workspace.

        After a launch that failed the next forward recovers the workspace first; with `group` that
        waits for every rank to do the same, at most `start_timeout_s`.
        """
        self._running().synchronize()

    def recover(self) -> None:
        """Return a workspace to its first state after a failed launch; collective with `group`.

        The next forward does it by itself; a CUDA graph does not. Raises MissingRank, naming the
        ranks that did not come within `start_timeout_s`; called again it goes on from there.
        """
        self._running().recover()

    def meet(self, timeout_s: float | None = None) -> None:
        """Wait on the host until every rank has come here as often as this one: before a first
        launch, say, that one rank reaches minutes before another. `timeout_s`: by default
        `start_timeout_s`. Raises MissingRank, naming who has not come. Without a group there is
        nobody to wait for.
        """
        self._running()
        if self.group is not None:
            limit = self.limits.start_timeout_s if timeout_s is None else timeout_s
            arguments.check_limits(Limits(limit, limit))
            self.group.meet(f"meeting/{self._meetings}", limit)
        self._meetings += 1

    def close(self) -> None:
        """Wait for running launches and give up memory, streams and weights; may be repeated.

        With a group every rank closes for itself: nothing is sent, no rank waits for another, and
        the process group may be destroyed before or after. Memory that peers have mapped comes back
        when they have closed too. A layer that is deleted without it does the same, and `with
        MegaMoE(...) as moe:` at the end of the block. Raises ValueError inside a graph capture,
        which cannot wait.
        """
        if self._finalizer is not None:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise ValueError("close() waits for launches, which a graph capture cannot")
            self._finalizer()
        self.workspace = self.backend = self._finalizer = None
        self._closed = True
        self._declare()  # no weights

    def __enter__(self) -> MegaMoE:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _running(self) -> Backend:
        """The backend; ValueError if the layer was closed or is on "meta"."""
        self._check_open()
        self._check_settled()
        assert self.backend is not None, "a layer that is open and on a device"
        return self.backend

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the layer was closed")

    def __reduce_ex__(self, protocol):
        if self.backend is not None:
            raise TypeError(
                "a MegaMoE layer can be neither copied nor pickled: it owns memory that other "
                "layers and ranks share. Save its state_dict(), and make another layer"
            )
        return super().__reduce_ex__(protocol)

    def extra_repr(self) -> str:
        config = self.config
        sizes = {
            "num_experts": config.num_experts,
            "top_k": config.top_k,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "max_tokens_per_rank": config.max_tokens_per_rank,
            "num_ranks": config.num_ranks,
            "precision": config.precision,
            "device": str(self.device),
        }
        if config.num_shared_experts:
            sizes["num_shared_experts"] = config.num_shared_experts
        return ", ".join(f"{name}={value!r}" for name, value in sizes.items())

    # ---------------------------------------------------------------- buffers
    def input_buffer(self, rank: int | None = None) -> torch.Tensor:
        """[max_tokens_per_rank, H] in symmetric memory, of the dtype that tokens travel in: an x of
        that dtype that starts there is not copied. Raises ValueError for a rank of another process.
        """
        return self._region("input_token_buffer", rank)

    def input_scale_buffer(self, rank: int | None = None) -> torch.Tensor:
        """[max_tokens_per_rank, S] float32 in symmetric memory, S scales per token: an x_scale that
        starts there is not copied. Raises ValueError if the precision has no scales.
        """
        if not self.config.recipe.tokens.has_scales:
            raise ValueError(f"precision={self.config.precision!r} has no scales")
        return self._region("input_scale_buffer", rank)[:, : self.config.token_scales]

    def _region(self, name: str, rank: int | None) -> torch.Tensor:
        ranks = self.local_ranks
        rank = ranks[0] if rank is None else rank
        if rank not in ranks:
            raise ValueError(f"rank={rank!r} is none of this process, which has {ranks}")
        return self.workspace.regions(rank)[name]


#: Backends of layers that ended where nobody can wait for their launches: inside a graph capture,
#: or by the garbage collector between the launches of virtual ranks. They go with the next layer.
_waiting: list = []


def _close(backend: Backend) -> None:
    """Let a backend go once its launches have ended."""
    _waiting.append(backend)
    if streams.half_launched():
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    while _waiting:
        _waiting.pop().close()
