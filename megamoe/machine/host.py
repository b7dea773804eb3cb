"""Kernel libraries on a CPU: linked with a CUDA runtime of our own, so that the host entry that a
GPU would run hands its launches to Python.

Nothing of the process takes part: the library holds the object, the DSL's static runtime and
`cudart.c`, and resolves its calls inside. The PTX lies beside it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

from megamoe.machine.decode import Code, decode
from megamoe.machine.faults import Fault
from megamoe.machine.ptx import parse

MARK = ".cpu"  # ends the name of such a kernel
#: Options of `cute.compile` that leave the PTX in a directory, with places in the source. Nothing
#: runs the machine code, so it is made in haste: the DSL cannot leave it out.
OPTIONS = "--keep-ptx --generate-line-info --ptxas-options -O0 --dump-dir {}"
#: What turns an object into such a library, besides objects and libraries.
LINK_OPTIONS = ("-w", "-Wl,-Bsymbolic", "-Wl,--exclude-libs,ALL")
RUNTIME_SOURCE = Path(__file__).parent / "cudart.c"
HOOK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip

#: Called with code, CTAs, bytes of the parameters and of dynamic shared memory.
OnLaunch = Callable[[Code, int, bytes, int], object]


@functools.cache
def codes_of(ptx: Path) -> dict[str, Code]:
    """The decoded kernels of a PTX file, by name."""
    text = ptx.read_text(errors="replace")
    return {name: decode(entry) for name, entry in parse(text).items()}


class Launches:
    """Gives the launches of a loaded library to `on_launch`, which may be replaced."""

    def __init__(self, library: ctypes.CDLL, ptx: Path):
        self.on_launch: OnLaunch | None = None
        self.codes = functools.partial(codes_of, ptx)  # kernels by name; tests put others here
        self._error: BaseException | None = None
        self._hook = HOOK(self._launched)  # kept: C holds a pointer to it
        library.machine_set_hook(self._hook)

    def _launched(self, kernel, sizes, shared, arguments) -> None:
        try:
            code = self.codes()[kernel.decode()]
            grid, block, cluster = sizes[0:3], sizes[3:6], sizes[6]
            if grid[1:] != [1, 1] or block[1:] != [1, 1] or cluster != 1:
                raise Fault(f"grid {grid}, block {block}, {cluster} CTAs a cluster: not modelled")
            code.entry.threads = block[0]
            parameters = bytearray(code.entry.param_bytes)
            for number, (offset, size) in enumerate(code.entry.params.values()):
                parameters[offset : offset + size] = ctypes.string_at(arguments[number], size)
            assert self.on_launch is not None, "nobody takes launches"
            self.on_launch(code, grid[0], bytes(parameters), shared)
        except BaseException as error:  # it must not cross C
            self._error = error

    def check(self) -> None:
        """Raise what went wrong in a launch that C called."""
        error, self._error = self._error, None
        if error is not None:
            raise error
