"""Compiled kernels: a tensor-free key, a disk cache, ahead-of-time building and loading.

A kernel is one shared library per configuration. Building needs nvidia-cutlass-dsl and a C
compiler, but no GPU; loading needs neither: the library exports a flat C entry that takes plain
integers, and finds the CUDA runtime that torch has already loaded. `load` looks in `kernel_dir`,
then in the cache, and builds into the cache if it can.

    python -m megamoe.compile --arch sm_90a --out kernels --num-experts 256 --top-k 8
        --hidden-size 7168 --intermediate-size 2048 --max-tokens-per-rank 8192 --num-ranks 8
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from megamoe import budget
from megamoe.config import KernelConfig, MoEConfig, select
from megamoe.dsl import HAVE_DSL

ARCHITECTURES = ("sm_90a",)
PREFIX = "megamoe"
#: Arguments of the C entry, in the order of `MegaMoEKernel.__call__`; the stream and a status word
#: follow.
ARGUMENTS = (
    ("symmetric_base", ctypes.c_int64),
    ("local_base", ctypes.c_int64),
    ("peers", ctypes.c_int64),
    ("w13", ctypes.c_int64),
    ("w2", ctypes.c_int64),
    ("w13_sf", ctypes.c_int64),
    ("w2_sf", ctypes.c_int64),
    ("x", ctypes.c_int64),
    ("topk_idx", ctypes.c_int64),
    ("topk_weights", ctypes.c_int64),
    ("y", ctypes.c_int64),
    ("expert_counts", ctypes.c_int64),
    ("record", ctypes.c_int64),
    ("timeout_ns", ctypes.c_int64),
    ("start_timeout_ns", ctypes.c_int64),
    ("rank", ctypes.c_int32),
    ("layer", ctypes.c_int32),
    ("num_tokens", ctypes.c_int32),
    ("wide_idx", ctypes.c_int32),
    ("dependents", ctypes.c_int32),
    ("clamp", ctypes.c_float),
    ("num_ctas", ctypes.c_int32),
    ("stream", ctypes.c_void_p),
    ("status", ctypes.c_int32),
)
SOURCES = (
    "megamoe/*.py",
    "megamoe/kernels/*.py",
    "megamoe/kernels/sm90/*.py",
    "workspace/*.py",
)
#: Modules that a kernel does not depend on.
HOST_ONLY = {
    "module.py",
    "inputs.py",
    "backends.py",
    "group.py",
    "arguments.py",
    "custom_op.py",
    "health.py",
    "residents.py",
    "streams.py",
    "compile.py",
    "reference.py",
    "weights.py",
    "__init__.py",
    "views.py",
    "symmetric.py",
}


class KernelNotFound(RuntimeError):
    """No built kernel for this configuration, and none can be built here."""


@functools.cache
def source_digest() -> str:
    """Digest of every source file that shapes the kernel: another version never loads a stale
    library.
    """
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(root.glob(pattern)):
            if path.name not in HOST_ONLY:
                digest.update(path.name.encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def kernel_name(config: MoEConfig, kernel: KernelConfig, arch: str = "sm_90a") -> str:
    """File stem of the kernel: readable prefix plus a digest of configurations and sources."""
    key = json.dumps(
        [dataclasses.asdict(config), dataclasses.asdict(kernel), arch, source_digest()],
        sort_keys=True,
    )
    return f"{PREFIX}-{config.precision}-{arch}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def cache_dir() -> Path:
    """Where kernels built on demand are kept: $MEGAMOE_CACHE_DIR, or megamoe in the user's cache
    directory.
    """
    return Path(os.environ.get("MEGAMOE_CACHE_DIR") or Path.home() / ".cache" / "megamoe")


def _check_dsl() -> None:
    if not HAVE_DSL:
        raise KernelNotFound(
            "nvidia-cutlass-dsl is not installed here, so kernels cannot be built; build them "
            "ahead of time elsewhere with 'python -m megamoe.compile' and pass kernel_dir="
        )


def trace(config: MoEConfig, kernel: KernelConfig, arch: str = "sm_90a", options: str = ""):
    """Compile with the DSL and return its compiled object. Raises KernelNotFound where the DSL is
    missing.
    """
    _check_dsl()
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Int64
    from cutlass.cute.runtime import make_fake_stream
    from cutlass.cutlass_dsl import CuTeDSL

    from megamoe.kernels.sm90.kernel import MegaMoEKernel

    fake = {
        ctypes.c_int64: Int64(0),
        ctypes.c_int32: Int32(0),
        ctypes.c_float: Float32(0.0),
        ctypes.c_void_p: make_fake_stream(),
    }
    arguments = [fake[kind] for _, kind in ARGUMENTS[:-1]]
    # The DSL takes the machine's architecture, or $CUTE_DSL_ARCH at its first import; for another
    # target than those it refuses to export. The version is pinned, so its own setting is a safe
    # place to say the target.
    CuTeDSL._get_dsl().envar.arch = arch
    return cute.compile(MegaMoEKernel(config, kernel), *arguments, options=options or None)


def _runtime_archive() -> str:
    """The DSL's small static runtime for CUDA 13."""
    import cutlass

    package = Path(cutlass.__file__).resolve().parents[2]
    for candidate in (package / "cu13", *sorted(package.glob("cu1*"), reverse=True)):
        archive = candidate / "lib" / "libcuda_dialect_runtime_static.a"
        if archive.exists():
            return str(archive)
    raise KernelNotFound(
        f"no libcuda_dialect_runtime_static.a under {package}; install nvidia-cutlass-dsl[cu13]"
    )


def _link(compiler: str, objects: list[str], library: Path) -> None:
    """Link a shared library; KernelNotFound with the last words of the compiler if it fails."""
    command = [compiler, "-O2", "-fPIC", "-shared", "-s", "-o", str(library), *objects]
    command += ["-ldl", "-lrt", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise KernelNotFound(
            f"{compiler} failed with status {done.returncode} to link {library.name}: {said[-1]}"
        )


def build(
    config: MoEConfig, kernel: KernelConfig, out_dir: Path | str, arch: str = "sm_90a"
) -> Path:
    """Build the kernel into `out_dir` (atomically) and return the library's path. Needs no GPU.

    Raises ValueError for a configuration or architecture that is not supported, KernelNotFound
    where the DSL or a C compiler is missing.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch={arch!r} is not supported; choose one of {list(ARCHITECTURES)}")
    budget.check(config, kernel)
    _check_dsl()  # before the compiler: without the DSL that would be of no use
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise KernelNotFound("no C compiler (cc or gcc) on PATH to link the kernel")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    name = kernel_name(config, kernel, arch)
    compiled = trace(config, kernel, arch)
    with tempfile.TemporaryDirectory(dir=out_dir) as scratch:
        compiled.export_to_c(file_path=scratch, file_name=PREFIX, function_prefix=PREFIX)
        header = (Path(scratch) / f"{PREFIX}.h").read_text()
        entry = re.search(rf"void (_mlir_{PREFIX}__mlir_ciface_\w+)\(", header).group(1)
        library = Path(scratch) / f"{name}.so"
        objects = [str(Path(scratch) / f"{PREFIX}.o"), _runtime_archive()]
        _link(compiler, objects, library)
        described = {
            "entry": entry,
            "arch": arch,
            "config": dataclasses.asdict(config),
            "kernel": dataclasses.asdict(kernel),
            "arguments": [argument for argument, _ in ARGUMENTS],
        }
        description = Path(scratch) / f"{name}.json"
        description.write_text(json.dumps(described, indent=1))
        os.replace(description, out_dir / description.name)
        os.replace(library, out_dir / library.name)
    return out_dir / f"{name}.so"


@functools.cache
def cuda_runtime() -> ctypes.CDLL:
    """The CUDA runtime of the process, visible to kernel libraries from now on."""
    import torch

    version = (torch.version.cuda or "13").split(".")[0]
    name = f"libcudart.so.{version}"
    try:
        return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        for path in map(Path, sys.path):
            for found in path.glob(f"nvidia/*/lib/{name}"):
                return ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)
        raise KernelNotFound(
            f"{name} was not found; the kernel needs the CUDA runtime that comes with torch"
        ) from None


class CompiledKernel:
    """A loaded kernel library. `launcher()` gives a call with its arguments packed in place."""

    def __init__(self, path: Path):
        cuda_runtime()
        self.path = path
        description = json.loads(path.with_suffix(".json").read_text())
        if description["arguments"] != [name for name, _ in ARGUMENTS]:
            raise KernelNotFound(f"{path} was built for other arguments; build it again")
        self._library = ctypes.CDLL(str(path))
        self._entry = getattr(self._library, description["entry"])
        self._module = ctypes.c_void_p()
        self._module_pointer = ctypes.pointer(self._module)
        self._devices: set[int] = set()
        self._call("cuda_init", ctypes.pointer(self._module_pointer))

    def _call(self, function: str, *pointers) -> None:
        status = ctypes.c_int32(0)
        packed = [
            ctypes.cast(pointer, ctypes.c_void_p) for pointer in (*pointers, ctypes.pointer(status))
        ]
        getattr(self._library, f"_mlir_{PREFIX}_{function}")(
            (ctypes.c_void_p * len(packed))(*packed)
        )
        if status.value:
            raise RuntimeError(
                f"{self.path.name}: {function} failed with CUDA error {status.value}"
            )

    def to_device(self, device: int) -> None:
        """Load the code onto a device; once per device, before its first launch and outside graph
        capture.
        """
        if device not in self._devices:
            index = ctypes.c_int32(device)
            self._call(
                "cuda_load_to_device", ctypes.pointer(self._module_pointer), ctypes.pointer(index)
            )
            self._devices.add(device)

    def launcher(self) -> Launcher:
        return Launcher(self._entry)


class Launcher:
    """Arguments of one rank, packed once; set those that change, then call with the stream
    handle.
    """

    def __init__(self, entry):
        self._entry = entry
        self.values = {name: kind(0) for name, kind in ARGUMENTS}
        addresses = [
            ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in self.values.values()
        ]
        self._packed = (ctypes.c_void_p * len(addresses))(*addresses)
        self._count = ctypes.c_int32(len(addresses))

    def set(self, **arguments: int) -> None:
        for name, value in arguments.items():
            self.values[name].value = value

    def __call__(self, stream: int, **arguments: int) -> None:
        """Set `arguments` and enqueue the launch on `stream` (a raw handle), whose device must be
        current. Raises RuntimeError if CUDA refuses it.
        """
        self.set(**arguments)
        self.values["stream"].value = stream
        self._entry(self._packed, self._count)
        if self.values["status"].value:
            raise RuntimeError(
                f"kernel launch failed with CUDA error {self.values['status'].value}"
            )


@functools.cache
def _load_library(path: Path) -> CompiledKernel:
    return CompiledKernel(path)


def load(
    config: MoEConfig,
    kernel: KernelConfig,
    kernel_dir: Path | str | None = None,
    arch: str = "sm_90a",
) -> CompiledKernel:
    """The kernel of this configuration: from `kernel_dir`, from the cache, or built into the cache.

    Raises KernelNotFound, with the way out, where none exists and none can be built.
    """
    name = kernel_name(config, kernel, arch)
    directories = [Path(kernel_dir)] if kernel_dir is not None else []
    for directory in (*directories, cache_dir()):
        path = directory / f"{name}.so"
        if path.exists():
            return _load_library(path.resolve())
    if kernel_dir is not None and not HAVE_DSL:
        raise KernelNotFound(
            f"{kernel_dir} holds no {name}.so for {config}, and it cannot be built here"
        )
    return _load_library(build(config, kernel, cache_dir(), arch).resolve())


def _configs_of(arguments: argparse.Namespace) -> list[tuple[MoEConfig, KernelConfig]]:
    if arguments.list:
        entries = json.loads(Path(arguments.list).read_text())
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"--list {arguments.list} must hold a JSON list of objects")
    else:
        fields = {field.name for field in dataclasses.fields(MoEConfig)}
        entries = [
            {
                name: value
                for name, value in vars(arguments).items()
                if name in fields and value is not None
            }
        ]
    configs = []
    for entry in entries:
        overrides = entry.pop("kernel", {})
        config = MoEConfig(**entry)
        configs.append((config, select(config, **overrides)))
    return configs


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megamoe.compile", description="Build kernels ahead of time."
    )
    parser.add_argument("--arch", default="sm_90a", help=f"one of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--out", required=True, help="directory for the libraries")
    parser.add_argument(
        "--list", help="JSON file: a list of objects with the fields below, and optionally 'kernel'"
    )
    parser.add_argument("--num-experts", type=int)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--intermediate-size", type=int)
    parser.add_argument("--max-tokens-per-rank", type=int)
    parser.add_argument("--num-ranks", type=int, default=1)
    parser.add_argument("--precision", default="bf16")
    arguments = parser.parse_args(argv)
    try:
        for config, kernel in _configs_of(arguments):
            path = Path(arguments.out) / f"{kernel_name(config, kernel, arguments.arch)}.so"
            if not path.exists():
                build(config, kernel, arguments.out, arguments.arch)
            print(f"{path}  {config}", flush=True)
    except (TypeError, ValueError, OSError, KernelNotFound) as error:
        print(
            f"megamoe.compile: {error}".replace("MoEConfig.__init__()", "configuration"),
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
