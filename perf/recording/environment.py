"""When, from what source and where something is measured."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
#: What stands in `gpu` where a CPU executed the kernel.
EMULATION = "cpu emulation"


def _output_of(*command: str, where: Path = REPOSITORY) -> str | None:
    """First line that a command prints, or None if it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else None


def source_version() -> tuple[str, int | None]:
    """(commit, dirty) from MEGAMOE_COMMIT=<commit>[-dirty], which a copy of a checkout on another
    machine needs, else from git, else unknown.
    """
    stated = os.environ.get("MEGAMOE_COMMIT", "")
    if stated:
        return stated.removesuffix("-dirty"), int(stated.endswith("-dirty"))
    return _of_git(REPOSITORY)


def version_of(tree: Path) -> tuple[str, int | None]:
    """`source_version` of another checkout: "unknown" if git does not know it as one."""
    if tree == REPOSITORY:
        return source_version()
    top = _output_of("git", "rev-parse", "--show-toplevel", where=tree)
    return _of_git(tree) if top and Path(top).resolve() == tree.resolve() else ("unknown", None)


def _of_git(tree: Path) -> tuple[str, int | None]:
    commit = _output_of("git", "rev-parse", "HEAD", where=tree)
    if not commit:
        return "unknown", None
    changes = _output_of("git", "status", "--porcelain", "--untracked-files=no", where=tree)
    return commit, None if changes is None else int(bool(changes))


def _dsl_version() -> str:
    try:
        return importlib.metadata.version("nvidia-cutlass-dsl")
    except importlib.metadata.PackageNotFoundError:
        return "aot"  # kernels were compiled ahead of time


def _driver_version() -> str:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return _output_of(*query) or "unknown"


def environment(device: torch.device | str) -> dict[str, Any]:
    """The columns of a row that say when, from what source and where it was measured."""
    commit, dirty = source_version()
    on_gpu = torch.device(device).type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else EMULATION,
        "driver": _driver_version() if on_gpu else "",
        "torch": torch.__version__,
        "dsl": _dsl_version(),
    }
