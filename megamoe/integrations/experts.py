"""The layer of an experts module: `gate_up_proj` and `down_proj` of a model, run by a `MegaMoE`.

`FusedExperts` is made for a module once and makes the layer on the first call, when sizes, device
and weights are there. Before every call it looks whether the weights are still those that the layer
has, and takes others if not. Layers of one model and shape share a workspace. What the layer
cannot compute is refused before anything is allocated.

A tracer sees `megamoe::experts`, which gets the weights as arguments and names the module by a
number. Neighbours: `transformers`, which calls it; `megamoe.custom_op` is its model.

Letters: T tokens, K top-k, E experts, H hidden size, I intermediate size.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamoe import custom_op
from megamoe.config import MoEConfig, supports
from megamoe.module import MegaMoE
from megamoe.precision import precision_of
from megamoe.reference import Weights
from megamoe.weights import quantize_weights

WEIGHTS = ("gate_up_proj", "down_proj")
#: What a module says of its experts, and what the layer needs it to be.
LAYOUT = {
    "has_gate": (True, "experts with a gate"),
    "has_bias": (False, "experts without biases"),
    "is_transposed": (False, "gate_up_proj [E, 2I, H] and down_proj [E, H, I]"),
    "is_concatenated": (True, "gate rows, then up rows"),
}
#: Gate and up values for which an activation is compared with SwiGLU, all pairs.
PROBE = (-1e6, -30.0, -8.5, -3.0, -0.5, 0.0, 0.5, 3.0, 8.5, 30.0, 1e6)


@dataclass(frozen=True)
class Options:
    """How the layers of a model are made; see `transformers.configure`."""

    precision: str = "bf16"
    max_tokens: int = 4096
    group: torch.distributed.ProcessGroup | None = None
    kernel_dir: Path | str | None = None
    num_sms: int | None = None
    timeout_s: float = 30.0
    start_timeout_s: float = 300.0
    kernel_options: dict | None = None
    free_weights: bool = False

    def __post_init__(self):
        precision_of(self.precision)
        tokens = self.max_tokens
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"max_tokens={tokens!r} must be an integer >= 1")
        if self.free_weights and not self.copies:
            raise ValueError(
                "free_weights=True needs a group or a precision other than 'bf16': else the layer "
                "reads the weights where they are"
            )

    @property
    def copies(self) -> bool:
        """Whether a layer can do without the module's own weights."""
        return self.group is not None or self.precision != "bf16"


# ---------------------------------------------------------------- what is supported


def check_module(module: torch.nn.Module, w13: Tensor, w2: Tensor) -> None:
    """Raise ValueError, naming the class and the attribute, unless the layer computes what the
    module does; `clamp_of` looks at its activation.
    """
    kind = type(module).__name__
    for name, (needed, what) in LAYOUT.items():
        value = getattr(module, name, needed)
        if value != needed:
            raise ValueError(f"{kind}.{name}={value!r}: megamoe supports only {what}")
    for name, tensor in zip(WEIGHTS, (w13, w2), strict=True):
        if tensor.dtype != torch.bfloat16:
            raise ValueError(
                f"{kind}.{name} has dtype {tensor.dtype}: megamoe needs torch.bfloat16; load the "
                "model with dtype=torch.bfloat16"
            )
        if tensor.dim() != 3:
            raise ValueError(
                f"{kind}.{name} has shape {list(tensor.shape)}: megamoe supports only "
                "gate_up_proj [E, 2I, H] and down_proj [E, H, I]"
            )
    experts, hidden, intermediate = w2.shape
    if w13.shape != (experts, 2 * intermediate, hidden):
        raise ValueError(
            f"{kind}.gate_up_proj has shape {list(w13.shape)}: megamoe supports only [E, 2I, H], "
            f"here {[experts, 2 * intermediate, hidden]}, beside down_proj {list(w2.shape)}"
        )
    if hidden % 128 or intermediate % 128:
        raise ValueError(
            f"{kind}.down_proj has shape {list(w2.shape)}: megamoe supports only hidden sizes and "
            f"intermediate sizes that are multiples of 128, here H={hidden}, I={intermediate}"
        )


@torch.no_grad()
def clamp_of(module: torch.nn.Module, intermediate: int, device: torch.device) -> float | None:
    """`activation_clamp` with which the layer computes the module's `_apply_gate`.

    The method itself is asked: what it does with a clamp, and how its attributes are called,
    differs from model to model. Raises ValueError, naming the class, if it is neither SwiGLU nor
    SwiGLU of min(gate, c) and of up within -c..c with c one of the module's attributes.
    """
    kind, act_fn = type(module).__name__, getattr(module, "act_fn", None)
    apply_gate: Any = getattr(module, "_apply_gate", None)
    line = torch.tensor(PROBE, device=device)
    pairs = torch.zeros(2, intermediate, device=device)
    pairs[:, : len(PROBE) ** 2] = torch.cartesian_prod(line, line).T
    gate, up = pairs
    try:
        found = apply_gate(pairs.reshape(1, -1))[0].float()
    except Exception as error:
        raise ValueError(f"{kind}._apply_gate cannot be asked what it computes: {error}") from error
    values = [v for v in vars(module).values() if isinstance(v, (int, float))]
    limits = sorted({float(v) for v in values if not isinstance(v, bool) and v > 0})
    for clamp in (None, *limits):
        g, u = (gate, up) if clamp is None else (gate.clamp(max=clamp), up.clamp(-clamp, clamp))
        expected = torch.nn.functional.silu(g) * u
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
            return clamp
    raise ValueError(
        f"{kind}._apply_gate with act_fn={act_fn}: megamoe supports only SwiGLU, silu(gate) * up, "
        "plain or with min(gate, c) and up within -c..c"
    )


# ---------------------------------------------------------------- the layer of a module

#: By model, options, sizes and device: layers of one key share it. It lives as long as they do.
_workspaces: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


class FusedExperts:
    """The layer of one experts module, which it does not keep alive."""

    def __init__(self, module: torch.nn.Module):
        self.module = weakref.ref(module)
        self.moe: MegaMoE | None = None
        self.options: Options | None = None
        self._made_for: tuple = ()
        self._loaded: tuple = ()
        self._freed = False

    def forward(
        self, options: Options, x: Tensor, idx: Tensor, weights: Tensor, w13: Tensor, w2: Tensor
    ) -> Tensor:
        """x: bfloat16 [..., H]; idx: integers [T, K], those >= E name no expert; weights: floating
        [T, K]; w13, w2: the module's weights. A new tensor like x.
        """
        if x.dtype != torch.bfloat16:
            raise ValueError(
                f"{self._kind()} got hidden_states of {x.dtype}: megamoe needs torch.bfloat16; "
                "load the model with dtype=torch.bfloat16 and call it without autocast"
            )
        top_k = idx.shape[-1]
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        moe = self._ready(options, top_k, w13, w2)
        if not out.numel() and options.group is None:
            return out
        hidden = x.shape[-1]
        xs, ys = x.reshape(-1, hidden).contiguous(), out.view(-1, hidden)
        if idx.dtype not in (torch.int32, torch.int64):
            idx = idx.long()
        idx = idx.masked_fill(idx >= moe.config.num_experts, -1).reshape(-1, top_k).contiguous()
        weights = weights.float().reshape(-1, top_k).contiguous()
        for part in parts_of(len(xs), options):
            moe(xs[part], idx[part], weights[part], out=ys[part])
        return out

    def close(self) -> None:
        """Give the layer's memory back; a later call makes another."""
        if self._freed:
            raise ValueError(f"{self._kind()} has only the layer's weights: free_weights=True")
        if self.moe is not None:
            self.moe.close()
        self.moe, self._made_for, self._loaded = None, (), ()

    def _kind(self) -> str:
        return type(self.module()).__name__

    def _ready(self, options: Options, top_k: int, w13: Tensor, w2: Tensor) -> MegaMoE:
        """The layer with these weights."""
        if self._freed and not w13.numel() + w2.numel():
            if options is not self.options or top_k != self._made_for[0]:
                raise ValueError(
                    f"{self._kind()} cannot have another layer: free_weights=True has freed its "
                    "weights; load the model again"
                )
            assert self.moe is not None
            return self.moe
        made_for = (top_k, w13.shape, w2.shape, w13.dtype, w2.dtype, w13.device, w2.device)
        with torch.inference_mode(False), torch.no_grad():
            if self.moe is None or options is not self.options or made_for != self._made_for:
                self._refuse_in_capture(w13)
                self._make(options, top_k, w13, w2)
                self._made_for, self.options, self._loaded = made_for, options, ()
            loaded = tuple(map(_place_of if options.precision == "bf16" else _state_of, (w13, w2)))
            if loaded != self._loaded:
                if options.copies:
                    self._refuse_in_capture(w13)
                self._load(options, w13, w2)
                self._loaded = loaded
                if options.free_weights:
                    self._free()
        assert self.moe is not None
        return self.moe

    def _refuse_in_capture(self, w13: Tensor) -> None:
        if w13.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{self._kind()} has no layer with these weights yet, and none can be made while a "
                "CUDA graph is captured: run the model once before"
            )

    def _make(self, options: Options, top_k: int, w13: Tensor, w2: Tensor) -> None:
        module, kind = self.module(), self._kind()
        assert module is not None, "a module that is called is alive"
        check_module(module, w13, w2)
        experts, hidden, intermediate = w2.shape
        world = 1 if options.group is None else options.group.size()
        if options.group is not None and getattr(module, "_is_expert_parallel", False):
            raise ValueError(
                f"{kind}._is_expert_parallel=True: with a group megamoe splits the experts itself; "
                "load the model without an expert-parallel plan, or configure no group"
            )
        config = MoEConfig(
            experts, top_k, hidden, intermediate, options.max_tokens, world, options.precision
        )
        try:
            supports(config)
        except ValueError as error:
            raise ValueError(f"{kind}: {error}") from error
        clamp = clamp_of(module, intermediate, w13.device)
        self.moe = None  # before another takes memory
        owner = getattr(module, "config", module)
        key = id(owner), id(options), config, w13.device
        self.moe = MegaMoE(
            num_experts=experts,
            top_k=top_k,
            hidden_size=hidden,
            intermediate_size=intermediate,
            max_tokens_per_rank=options.max_tokens,
            world=None if options.group is not None else 1,
            group=options.group,
            precision=options.precision,
            device=w13.device,
            num_sms=options.num_sms,
            timeout_s=options.timeout_s,
            start_timeout_s=options.start_timeout_s,
            kernel_dir=options.kernel_dir,
            kernel_options=options.kernel_options,
            workspace=_workspaces.get(key),
            activation_clamp=clamp,
        )
        _workspaces[key] = self.moe.workspace

    def _load(self, options: Options, w13: Tensor, w2: Tensor) -> None:
        assert self.moe is not None
        given = [self._own(name, tensor) for name, tensor in zip(WEIGHTS, (w13, w2), strict=True)]
        if options.group is not None:
            local = self.moe.num_local_experts
            begin = options.group.rank() * local
            given = [tensor[begin : begin + local] for tensor in given]
            if options.free_weights and options.precision == "bf16":
                given = [tensor.clone() for tensor in given]
        held = Weights(*given)
        if options.precision != "bf16":
            held = quantize_weights(given[0], given[1], options.precision)
        self.moe.load_weights(*held, replace=True)

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        """The module's own parameter if that is what `tensor` is a view of: when it moves, the
        memory that it leaves is not held.
        """
        mine = getattr(self.module(), name, None)
        same = isinstance(mine, Tensor) and _place_of(mine) == _place_of(tensor)
        return mine if same and mine is not None else tensor

    def _free(self) -> None:
        """Free the module's weights, of which the layer has what it needs."""
        for name in WEIGHTS:
            parameter = getattr(self.module(), name)
            parameter.data = parameter.data.new_empty(0)
        self._freed = True


def _place_of(tensor: Tensor) -> Any:
    return tensor.data_ptr()


def _state_of(tensor: Tensor) -> Any:
    """Where a tensor is and how often torch has counted a write to it."""
    if tensor.is_inference():
        raise ValueError(
            "weights that are to be quantised are inference tensors, whose changes torch does not "
            "count: load the model outside of torch.inference_mode()"
        )
    return tensor.data_ptr(), tensor._version


def parts_of(tokens: int, options: Options) -> list[slice]:
    """Tokens by launch: as few launches as `max_tokens` allows, and as even as can be. With a group
    one, as every rank must launch as often; more tokens than it takes are refused by the layer,
    which tells the other ranks.
    """
    launches = 1 if options.group is not None else max(-(-tokens // options.max_tokens), 1)
    size = max(-(-tokens // launches), 1)
    return [slice(begin, begin + size) for begin in range(0, max(tokens, 1), size)]


# ---------------------------------------------------------------- by number, for tracers

#: Options by name of an implementation.
OPTIONS: dict[str, Options] = {}
#: By the `id` of a module, while it lives.
_fused: dict[int, FusedExperts] = {}


def fused_of(module: torch.nn.Module) -> FusedExperts | None:
    """What was enrolled for a module, if it was."""
    return _fused.get(id(module))


@torch.compiler.assume_constant_result
def enrol(number: int) -> bool:
    """Make the `FusedExperts` of the module with this `id`, unless there is one.

    Tracers know an `id` and guard it; a module, which they would have to call a constant, not all
    of them take (torch 2.11). Who calls holds the module.
    """
    if number not in _fused:
        module = ctypes.cast(number, ctypes.py_object).value
        _fused[number] = FusedExperts(module)
        end = weakref.finalize(module, _fused.pop, number, None)
        end.atexit = False  # the process ends, and CUDA with it
    return True


@torch.library.custom_op("megamoe::experts", mutates_args=())
def experts_op(
    x: Tensor, idx: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, name: str, number: int
) -> Tensor:
    """`FusedExperts.forward` of module number `number` under implementation `name`."""
    found = _fused.get(number)
    if found is None:
        raise ValueError(f"experts module {number} of this process is gone: compile the model anew")
    return found.forward(OPTIONS[name], x, idx, weights, w13, w2)


@experts_op.register_fake
def _(x, idx, weights, w13, w2, name, number):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def forward(name: str, module: torch.nn.Module, x: Tensor, idx: Tensor, weights: Tensor) -> Tensor:
    """The experts of a module under implementation `name`: see `FusedExperts.forward`."""
    w13, w2 = (getattr(module, weight, None) for weight in WEIGHTS)
    if w13 is None or w2 is None:
        raise ValueError(_without_weights(module))
    number = id(module)
    enrol(number)
    with torch.no_grad():
        if custom_op.is_traced():
            y = torch.ops.megamoe.experts(x, idx, weights, w13, w2, name, number)
        else:
            y = _fused[number].forward(OPTIONS[name], x, idx, weights, w13, w2)
    if torch.is_grad_enabled():
        (y,) = custom_op.end_gradients([y], (x, weights, w13, w2))
    return y


def _without_weights(module: torch.nn.Module) -> str:
    kind = type(module).__name__
    if not getattr(module, "has_gate", True):
        return f"{kind}.has_gate=False: megamoe supports only {LAYOUT['has_gate'][1]}"
    return f"{kind} has no {' and '.join(WEIGHTS)}, which megamoe reads"
