"""Compiled kernels: a tensor-free key, a disk cache, ahead-of-time building and loading.

A kernel is one shared library per configuration, of a layer or of a router; a `Program` is what
building, finding and loading it takes. Building needs nvidia-cutlass-dsl and a C compiler, but no
GPU; loading needs neither: the library exports a flat C entry that takes plain integers, and finds
the CUDA runtime that torch has already loaded. `load` looks in `kernel_dir`, then in the cache, and
builds into the cache if it can. `kernel_files` says what may be loaded: what it refuses in
`kernel_dir` ends in its error, what is damaged in the cache is built again.

    python -m megamoe.compile --arch sm_90a --out kernels --num-experts 256 --top-k 8
        --hidden-size 7168 --intermediate-size 2048 --max-tokens-per-rank 8192 --num-ranks 8
    python -m megamoe.compile --out kernels --router num_experts=256 top_k=8 score=sigmoid
        num_groups=8 topk_groups=4 correction_bias=true
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megamoe import budget, kernel_files, router_config, signature
from megamoe.architecture import architecture_of, with_kernels
from megamoe.config import KernelConfig, MoEConfig, select
from megamoe.dsl import HAVE_DSL
from megamoe.kernel_files import DamagedKernel, KernelError, KernelFileError, KernelNotFound
from megamoe.machine import host
from megamoe.router_config import RouterConfig

PREFIX = "megamoe"
#: The field of an entry of a list that is a router.
ROUTER = "router"
SOURCES = (
    "megamoe/*.py",
    "megamoe/kernels/*.py",
    "megamoe/kernels/*/*.py",
    "megamoe/machine/cudart.c",
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
    "kernel_files.py",
    "reference.py",
    "router.py",
    "router_reference.py",
    "weights.py",
    "fourbit.py",
    "fourbit_pack.py",
    "progress.py",
    "__init__.py",
    "views.py",
    "symmetric.py",
}


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


@dataclass(frozen=True)
class Program:
    """A kernel to be built, found and loaded.

    label: what its files' names begin with, before the digest. facts: what its description holds of
    it, and its digest covers. arguments: of its C entry. make: given options of `cute.compile`,
    what the DSL compiles. text: the configuration, for messages.
    """

    label: str
    facts: dict
    arguments: tuple
    make: Callable
    text: str

    def name(self, cpu: bool = False) -> str:
        """File stem: readable prefix plus a digest of configurations and sources."""
        key = json.dumps([*self.facts.values(), source_digest()], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        return f"{PREFIX}-{self.label}-{digest}{host.MARK * cpu}"


def layer_program(config: MoEConfig, kernel: KernelConfig) -> Program:
    """The kernel of a layer."""
    return Program(
        label=f"{config.precision}-{kernel.arch}",
        facts={"config": dataclasses.asdict(config), "kernel": dataclasses.asdict(kernel)},
        arguments=signature.ARGUMENTS,
        make=functools.partial(compile_kernel, config, kernel),
        text=str(config),
    )


def router_program(config: RouterConfig, arch: str = KernelConfig.arch) -> Program:
    """The kernel of a router; ValueError if there is none."""
    config, arch = router_config.canonical(config), architecture_of(arch).name
    return Program(
        label=f"router-{arch}",
        facts={"router": dataclasses.asdict(config), "arch": arch},
        arguments=router_config.ARGUMENTS,
        make=functools.partial(compile_router, config, arch),
        text=str(config),
    )


def kernel_name(config: MoEConfig, kernel: KernelConfig, cpu: bool = False) -> str:
    """File stem of a layer's kernel."""
    return layer_program(config, kernel).name(cpu)


def cache_dir() -> Path:
    """Where kernels built on demand are kept: $MEGAMOE_CACHE_DIR, or megamoe in the user's cache
    directory.
    """
    if chosen := os.environ.get(kernel_files.CACHE_VARIABLE):
        return Path(chosen)
    try:
        return Path.home() / ".cache" / "megamoe"
    except RuntimeError as error:
        raise KernelFileError(
            f"no home directory to keep kernels in; set {kernel_files.CACHE_VARIABLE}"
        ) from error


def trust_kernels() -> bool:
    """Whether kernels are loaded that other users can have written: $MEGAMOE_TRUST_KERNELS is 1."""
    return os.environ.get(kernel_files.TRUST_VARIABLE) == "1"


def dsl_version() -> str | None:
    """Version of the DSL here, which shapes the machine code too; None where it is missing."""
    if not HAVE_DSL:
        return None
    import cutlass

    return cutlass.__version__


def _check_dsl() -> None:
    if not HAVE_DSL:
        raise KernelNotFound(
            "nvidia-cutlass-dsl is not installed here, so kernels cannot be built; build them "
            "ahead of time elsewhere with 'python -m megamoe.compile' and pass kernel_dir="
        )


def compile_kernel(config: MoEConfig, kernel: KernelConfig, options: str = ""):
    """Compile with the DSL and return its compiled object. Raises KernelNotFound where the DSL is
    missing.
    """
    _check_dsl()
    module = importlib.import_module(f"megamoe.kernels.{kernel.architecture.folder}.kernel")
    kinds = signature.HostArguments, signature.Arguments
    return _trace(module.MegaMoEKernel(config, kernel), kinds, kernel.arch, options)


def compile_router(config: RouterConfig, arch: str, options: str = ""):
    """The same of a router."""
    _check_dsl()
    module = importlib.import_module("megamoe.kernels.route")
    return _trace(module.RouterKernel(config), (router_config.RouterArguments,), arch, options)


def _trace(traceable: Callable, kinds: tuple[type, ...], arch: str, options: str):
    """Compile what takes classes of arguments (`signature.fields_of`) and a stream."""
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Int64
    from cutlass.cute.runtime import make_fake_stream
    from cutlass.cutlass_dsl import CuTeDSL

    fake: dict[type, object] = {
        ctypes.c_int64: Int64(0), ctypes.c_int32: Int32(0), ctypes.c_float: Float32(0.0),
    }  # fmt: skip
    taken = [kind(*[fake[c_type] for _, c_type in signature.fields_of(kind)]) for kind in kinds]
    # The DSL takes the machine's architecture, or $CUTE_DSL_ARCH at its first import; for another
    # target than those it refuses to export. Its versions are bounded, so its own setting is a safe
    # place to say the target.
    CuTeDSL._get_dsl().envar.arch = arch
    return cute.compile(traceable, *taken, make_fake_stream(), options=options or None)


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


def _link(compiler: str, objects: list[str], library: Path, options: tuple = ()) -> None:
    """Link a shared library; KernelNotFound with the last words of the compiler if it fails."""
    command = [compiler, "-O2", "-fPIC", "-shared", "-s", *options, "-o", str(library), *objects]
    command += ["-ldl", "-lrt", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise KernelNotFound(
            f"{compiler} failed with status {done.returncode} to link {library.name}: {said[-1]}"
        )


def build(config: MoEConfig, kernel: KernelConfig, out_dir: Path | str, cpu: bool = False) -> Path:
    """Build the kernel into `out_dir` (atomically) and return the library's path. Needs no GPU.
    `cpu`: not for a GPU but for `megamoe.machine`, with the PTX beside it.

    Raises ValueError for a configuration that is not supported, KernelNotFound where the DSL or a C
    compiler is missing, KernelDirectoryError where `out_dir` cannot be written or has no room.
    """
    budget.check(config, kernel)
    return build_program(layer_program(config, kernel), out_dir, cpu)


def build_program(program: Program, out_dir: Path | str, cpu: bool = False) -> Path:
    """The same of any program."""
    facts = program.facts | {"arguments": _names(program.arguments)}
    return build_library(program.make, Path(out_dir), program.name(cpu), facts, cpu)


def _names(arguments: tuple) -> list[str]:
    return [argument for argument, _ in arguments]


def build_library(make: Callable, out_dir: Path, name: str, facts: dict, cpu: bool = False) -> Path:
    """Link what `make` compiles (an object of the DSL) into `out_dir`, with a description that
    holds `facts`; the library's path. For a CPU `make` is given options of `cute.compile`. Raises
    as `build` does.
    """
    _check_dsl()  # before the compiler: without the DSL that would be of no use
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise KernelNotFound("no C compiler (cc or gcc) on PATH to link the kernel")
    with kernel_files.scratch_in(out_dir) as scratch:
        compiled = make(*[host.OPTIONS.format(scratch)] * cpu)
        kernel_files.check_room(out_dir)  # again: compiling takes a while
        object_file = scratch / f"{PREFIX}.o"
        object_file.write_bytes(compiled.dump_to_object(PREFIX))
        objects = [str(object_file), _runtime_archive()]
        suffixes: list[str] = [".so"]
        options: tuple[str, ...] = ()
        if cpu:
            objects, options = [*objects, str(host.RUNTIME_SOURCE)], host.LINK_OPTIONS
            (ptx,) = scratch.glob("*.ptx")
            ptx.rename(scratch / f"{name}.ptx")
            suffixes.append(".ptx")
        _link(compiler, objects, scratch / f"{name}.so", options)
        entry = f"_mlir_{PREFIX}__mlir_ciface_{compiled.function_name}"
        facts = {**facts, "entry": entry, "dsl": dsl_version()}
        kernel_files.install(scratch, out_dir, name, facts, suffixes)
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
    """A loaded kernel library. `launcher()` gives a call with its arguments packed in place, which
    are those of the layer's kernel unless others are given. `launches`: where a library for a CPU
    hands them over.
    """

    def __init__(self, path: Path, entry: str, arguments: tuple = signature.ARGUMENTS):
        cpu = path.stem.endswith(host.MARK)
        if not cpu:
            cuda_runtime()
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self.launches = host.Launches(self._library, path.with_suffix(".ptx")) if cpu else None
        self._entry, self._arguments = getattr(self._library, entry), arguments
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
        return Launcher(self._entry, self._arguments)


class Launcher:
    """Arguments of one rank, packed once; set those that change, then call with the stream
    handle.
    """

    def __init__(self, entry, arguments: tuple = signature.ARGUMENTS):
        self._entry = entry
        self.values = {name: kind(0) for name, kind in arguments}
        addresses = [
            ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in self.values.values()
        ]
        self._packed = (ctypes.c_void_p * len(addresses))(*addresses)
        self._count = ctypes.c_int32(len(addresses))

    def set(self, **arguments: float) -> None:
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
def _load_library(path: Path, sha256: str, entry: str, arguments: tuple) -> CompiledKernel:
    """A library once per process; `sha256` tells apart what one path held at different times."""
    return CompiledKernel(path, entry, arguments)


def _load_verified(program: Program, path: Path, description: dict) -> CompiledKernel:
    sha256 = description["files"][path.name]["sha256"]
    return _load_library(path, sha256, description["entry"], program.arguments)


def _find(program: Program, directory: Path, cpu: bool, trust: bool) -> tuple[Path, dict]:
    """`kernel_files.verified`, of a library that takes these arguments."""
    path, description = kernel_files.verified(directory, program.name(cpu), trust=trust)
    if description["arguments"] != _names(program.arguments):
        raise DamagedKernel(f"{path} was built for other arguments")
    return path, description


def _find_built(
    program: Program, directory: Path, cpu: bool, trust: bool
) -> tuple[Path, dict] | None:
    """A kernel that was built earlier; None, after a warning if it is damaged, where it must be
    built: if there is none, or another version of the DSL has built it.
    """
    if not kernel_files.exists(directory / f"{program.name(cpu)}.so"):
        return None
    try:
        path, description = _find(program, directory, cpu, trust)
    except DamagedKernel as error:
        if not HAVE_DSL:
            raise
        warnings.warn(f"{error}; building it again", RuntimeWarning, stacklevel=3)
        return None
    fits = not HAVE_DSL or description.get("dsl") == dsl_version()
    return (path, description) if fits else None


def load(
    config: MoEConfig,
    kernel: KernelConfig,
    kernel_dir: Path | str | None = None,
    cpu: bool = False,
) -> CompiledKernel:
    """The kernel of this layer: from `kernel_dir`, from the cache, or built into the cache. `cpu`:
    see `build`.

    Raises KernelNotFound, with the way out, where none exists and none can be built;
    UntrustedKernel for files that other users can write, unless $MEGAMOE_TRUST_KERNELS is 1;
    DamagedKernel for damaged ones in `kernel_dir` (in the cache they are built again, if that is
    possible); KernelDirectoryError if a directory cannot be used. All are KernelError.
    """
    return load_program(layer_program(config, kernel), kernel_dir, cpu)


def load_program(
    program: Program, kernel_dir: Path | str | None = None, cpu: bool = False
) -> CompiledKernel:
    """The same of any program."""
    name, trust = program.name(cpu), trust_kernels()
    if kernel_dir is not None:
        kernel_dir = Path(kernel_dir)
        if any(kernel_files.exists(kernel_dir / f"{name}.{suffix}") for suffix in ("so", "json")):
            return _load_verified(program, *_find(program, kernel_dir, cpu, trust))
    cache = cache_dir()
    if found := _find_built(program, cache, cpu, trust):
        return _load_verified(program, *found)
    if kernel_dir is not None and not HAVE_DSL:
        raise KernelNotFound(
            f"{kernel_dir} holds no {name}.so for {program.text}, and it cannot be built here"
        )
    _check_dsl()
    kernel_files.make_directory(cache)
    if not trust:
        kernel_files.check_trusted(cache.resolve())
    build_program(program, cache, cpu)
    return _load_verified(program, *_find(program, cache, cpu, trust))


def _configs_of(
    arguments: argparse.Namespace, arch: str = KernelConfig.arch
) -> list[tuple[MoEConfig, KernelConfig]]:
    """The layers that are asked for; `arch` unless an entry of the list names another."""
    return [_layer_of(entry, arch) for entry in _entries(arguments) if ROUTER not in entry]


def _entries(arguments: argparse.Namespace) -> list[dict]:
    """A dict per kernel that is asked for: the fields of a MoEConfig and optionally "kernel", or
    "router" with the fields of a RouterConfig.
    """
    if arguments.list:
        entries = json.loads(Path(arguments.list).read_text())
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"--list {arguments.list} must hold a JSON list of objects")
        return entries
    if arguments.router:
        return [{ROUTER: dict(arguments.router)}]
    fields = {field.name for field in dataclasses.fields(MoEConfig)}
    given = vars(arguments).items()
    return [{name: value for name, value in given if name in fields and value is not None}]


def _layer_of(entry: dict, arch: str) -> tuple[MoEConfig, KernelConfig]:
    overrides = {"arch": arch} | entry.get("kernel", {})
    config = MoEConfig(**{name: value for name, value in entry.items() if name != "kernel"})
    return config, select(config, **overrides)


def _program_of(entry: dict, arch: str) -> Program:
    if ROUTER not in entry:
        config, kernel = _layer_of(entry, arch)
        budget.check(config, kernel)
        return layer_program(config, kernel)
    if set(entry) - {ROUTER, "arch"} or not isinstance(entry[ROUTER], dict):
        raise ValueError(f"{entry} must hold {ROUTER!r}, an object, and besides at most 'arch'")
    return router_program(RouterConfig(**entry[ROUTER]), entry.get("arch", arch))


def _assignment(text: str) -> tuple[str, object]:
    """`name=value` of the command line; a value is JSON, or else a text."""
    name, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megamoe.compile", description="Build kernels ahead of time."
    )
    targets = ", ".join(row.name for row in with_kernels())
    parser.add_argument("--arch", default=KernelConfig.arch, help=f"one of {targets}")
    parser.add_argument("--out", required=True, help="directory for the libraries")
    parser.add_argument(
        "--list", help="JSON file: a list of objects with the fields below, and optionally 'kernel'"
    )
    parser.add_argument(
        "--router",
        nargs="+",
        type=_assignment,
        metavar="FIELD=VALUE",
        help="the fields of a RouterConfig; in a list an object with 'router'",
    )
    parser.add_argument("--num-experts", type=int)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--intermediate-size", type=int)
    parser.add_argument("--max-tokens-per-rank", type=int)
    parser.add_argument("--num-ranks", type=int, default=1)
    parser.add_argument("--num-shared-experts", type=int, default=0)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--cpu", action="store_true", help="for device='cpu', not for a GPU")
    arguments = parser.parse_args(argv)
    try:
        out = Path(arguments.out)
        for program in [_program_of(entry, arguments.arch) for entry in _entries(arguments)]:
            if _find_built(program, out, arguments.cpu, trust=True) is None:
                build_program(program, out, arguments.cpu)
            print(f"{out / program.name(arguments.cpu)}.so  {program.text}", flush=True)
    except (TypeError, ValueError, OSError, KernelError) as error:
        said = re.sub(r"\w+Config\.__init__\(\)", "configuration", str(error))
        print(f"megamoe.compile: {said}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
