"""The arguments of a layer, checked before anything is allocated or another rank is asked."""

from __future__ import annotations

import dataclasses
from typing import TypeGuard

import torch

from megamoe import budget
from megamoe.architecture import with_kernels
from megamoe.config import KernelConfig, MoEConfig, select
from megamoe.faults import Limits
from megamoe.regions import LayerLayout
from workspace.views import Workspace

MAX_TIMEOUT_S = 24 * 60 * 60.0


def kernel_config_of(
    config: MoEConfig, options: dict | None, device: torch.device | None = None
) -> KernelConfig:
    """The kernel's configuration with `options`, for the architecture of `device` if that is a GPU;
    ValueError if it is not legal or does not fit.
    """
    options = {} if options is None else options
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"kernel_options={options!r} must be a dict with names of fields as keys")
    if device is not None and device.type == "cuda":
        options = {"arch": arch_of(device)} | options
    kernel = select(config, **options)
    budget.check(config, kernel)
    return kernel


def is_positive(value: object) -> bool:
    """True for a number above 0 that is finite in float32."""
    return is_finite(value) and value > 0


def is_finite(value: object) -> TypeGuard[float]:
    """True for a number that is finite in float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= torch.finfo(torch.float32).max


def check_limits(limits: Limits) -> None:
    for name, value in dataclasses.asdict(limits).items():
        if not (is_positive(value) and value <= MAX_TIMEOUT_S):
            raise ValueError(
                f"{name}={value!r} must be > 0 and at most {MAX_TIMEOUT_S:.0f} seconds"
            )


def check_clamp(clamp: float | None) -> None:
    if clamp is not None and not is_positive(clamp):
        raise ValueError(f"activation_clamp={clamp!r} must be a finite float32 number > 0, or None")


def check_shared_weight(weight: float) -> None:
    if not is_finite(weight):
        raise ValueError(f"shared_weight={weight!r} must be a finite float32 number")


def check_num_sms(sms: int | None) -> None:
    if sms is not None and (isinstance(sms, bool) or not isinstance(sms, int) or sms < 1):
        raise ValueError(f"num_sms={sms!r} must be an integer >= 1, or None")


def fields_of(layout: LayerLayout) -> dict[str, object]:
    """Every field of the two configurations."""
    kernel = dataclasses.asdict(layout.kernel)
    return dataclasses.asdict(layout.config) | {f"kernel.{k}": v for k, v in kernel.items()}


def check_shared(
    workspace: object,
    layout: LayerLayout,
    device: torch.device,
    ranks: list[int],
    members: list | None,
) -> None:
    """Raise ValueError, naming what differs, unless the workspace is one of this layout on this
    device, for the same ranks here and, with a group, the same processes (`members`) over all.
    """
    if not isinstance(workspace, Workspace):
        raise ValueError(f"workspace must be that of another layer, got {type(workspace).__name__}")
    group = getattr(workspace.health, "group", None)
    has = fields_of(workspace.layout) | {
        "device": str(workspace.device),
        "ranks of this process": workspace.local_ranks,
        "ranks of the group": None if group is None else group.members,
    }
    needed = fields_of(layout) | {
        "device": str(device),
        "ranks of this process": ranks,
        "ranks of the group": members,
    }
    differ = [name for name in needed if has[name] != needed[name]]
    if differ:
        raise ValueError(
            "workspace is of another layer: "
            + ", ".join(f"{name}={has[name]!r}, not {needed[name]!r}" for name in differ)
        )
    if workspace.health is None:
        raise ValueError("workspace is of no layer: pass the `workspace` of one")


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device of a layer; by default torch's own default if that is a GPU or "meta", else the
    current GPU if there is one.
    """
    if device is None:
        default = torch.get_default_device()
        usual = "cuda" if torch.cuda.is_available() else "cpu"
        device = default if default.type in ("cuda", "meta") else usual
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is no device of torch: use 'cuda' or 'cpu'") from error
    if device.type in ("cpu", "meta"):
        return torch.device(device.type)
    if device.type != "cuda":
        raise ValueError(f"device={str(device)!r} is not supported; use 'cuda' or 'cpu'")
    if not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}, but torch sees no GPU; use device='cpu'")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.index >= torch.cuda.device_count():
        raise ValueError(f"device={str(device)!r}, but torch sees {torch.cuda.device_count()} GPUs")
    return device


def arch_of(device: torch.device) -> str:
    """Name of the architecture of a GPU; ValueError if no kernel is for it."""
    capability = torch.cuda.get_device_capability(device)
    for row in with_kernels():
        if row.capability == capability:
            return row.name
    legal = ", ".join(f"{row.capability} ({row.name})" for row in with_kernels())
    raise ValueError(
        f"device={device} has compute capability {capability}, kernels are for {legal}"
    )


def check_gpu(
    device: torch.device, kernel: KernelConfig, num_sms: int | None, ranks_here: int
) -> int:
    """CTAs per rank; ValueError unless this GPU runs this kernel and can hold all CTAs of all its
    ranks at once.
    """
    capability, needed = torch.cuda.get_device_capability(device), kernel.architecture.capability
    if capability != needed:
        raise ValueError(
            f"device={device} has compute capability {capability}, arch={kernel.arch!r} needs "
            f"{needed}"
        )
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    per_rank = sms // ranks_here if num_sms is None else num_sms
    if not 1 <= per_rank * ranks_here <= sms:
        raise ValueError(
            f"num_sms={per_rank} for each of {ranks_here} ranks on {device} must add up to 1..{sms}"
        )
    return per_rank
