"""The arguments of a launch, declared once: what the C entry of a kernel library takes, what the
kernel's host function is traced with, and what the roles see.

The C entry takes every field of `HostArguments`, then every field of `Arguments`, the stream and a
status word: plain integers but for the clamp, addresses in bytes. CuTe DSL takes a frozen dataclass
apart in the same order; here nothing of it is needed, for a host that only loads kernels has none.
"""

from __future__ import annotations

import typing
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Annotated

#: A number to the roles, and its type in the C entry.
I64 = Annotated[int, c_int64]
I32 = Annotated[int, c_int32]
F32 = Annotated[float, c_float]


@dataclass(frozen=True)
class HostArguments:
    """What only the host side of a launch reads: for tensor maps, and the grid."""

    w13: I64  # weight [n, 2I, H] of the local experts, shared ones last
    w2: I64  # weight [n, H, I]
    num_ctas: I32


@dataclass(frozen=True)
class Arguments:
    """What the roles of a launch read, in the order of the kernel's parameters."""

    symmetric_base: I64
    local_base: I64
    peers: I64  # int64 [W]: symmetric base of every rank
    w13_scales: I64  # by tile (`weights.write_tile_scales`) or by channel; 0 without
    w2_scales: I64
    x: I64  # token [T, H]; recipes with scales: bfloat16 [T, H] to quantise, or 0 if staged
    topk_idx: I64  # int32 or int64 [T, K]
    topk_weights: I64  # float32 [T, K]
    y: I64  # output [T, H]
    expert_counts: I64  # int32 [E / W] that received rows are added to, or 0
    record: I64  # host-visible error record
    timeout_ns: I64  # of a wait, once all ranks have begun
    start_timeout_ns: I64  # of a wait for CTAs and ranks to begin
    rank: I32
    layer: I32  # number of the layer, the same on every rank
    num_tokens: I32  # or faults.NO_INPUT
    wide_idx: I32  # 1 if topk_idx holds int64
    dependents: I32  # 1 if the next kernel of the stream may begin beside this launch
    clamp: F32  # of gate and up before SwiGLU; infinite: none
    shared_weight: F32  # in place of a router weight, of shared experts


def fields_of(arguments: type) -> tuple[tuple[str, type], ...]:
    """(name, C type) of every field of a class of arguments, in order."""
    hints = typing.get_type_hints(arguments, include_extras=True)
    return tuple((name, hint.__metadata__[0]) for name, hint in hints.items())


#: Arguments of the C entry, in order.
ARGUMENTS = (
    *fields_of(HostArguments), *fields_of(Arguments), ("stream", c_void_p), ("status", c_int32),
)  # fmt: skip
