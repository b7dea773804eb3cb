"""MegaMoE: a fused expert-parallel mixture-of-experts layer. Imports without a GPU and without CuTe
DSL.
"""

import importlib
import importlib.metadata

_PUBLIC = {
    "DamagedKernel": "megamoe.kernel_files",
    "InvalidExpertError": "megamoe.faults",
    "KernelConfig": "megamoe.config",
    "KernelDirectoryError": "megamoe.kernel_files",
    "KernelError": "megamoe.kernel_files",
    "KernelFileError": "megamoe.kernel_files",
    "KernelNotFound": "megamoe.kernel_files",
    "LaunchFailed": "megamoe.faults",
    "LaunchTimeout": "megamoe.faults",
    "LayerMismatch": "megamoe.faults",
    "MegaMoE": "megamoe.module",
    "MegaMoEError": "megamoe.faults",
    "MissingRank": "megamoe.group",
    "MoEConfig": "megamoe.config",
    "NotRecovered": "megamoe.faults",
    "PeerFailed": "megamoe.faults",
    "RanksDisagree": "megamoe.group",
    "UntrustedKernel": "megamoe.kernel_files",
    "quantize_weights": "megamoe.weights",
    "route": "megamoe.router",
    "split_shared": "megamoe.weights",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    """Public names are imported on first use: tools that need only the integers load no torch."""
    if name == "__version__":  # declared in pyproject.toml alone
        try:
            return importlib.metadata.version("megamoe")
        except importlib.metadata.PackageNotFoundError:  # a source tree that nobody installed
            return "unknown"
    if name not in _PUBLIC:
        raise AttributeError(f"module 'megamoe' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
