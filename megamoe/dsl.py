"""The one place that knows whether CuTe DSL is installed.

Integer logic (`schedule`, `megamoe.wire`) is written once as `@dsl.jit` functions over integers.
While a kernel is being traced they emit device code; called anywhere else they are the plain Python
they look like, which is what the unit tests execute. Where nvidia-cutlass-dsl is
not installed (a serving host that loads ahead-of-time kernels) only the plain form exists.

Neighbours: imported by `schedule`, `megamoe.wire` and `kernels`; imports nothing of ours.
"""

from __future__ import annotations

import functools
import importlib.util
import types

HAVE_DSL = importlib.util.find_spec("cutlass") is not None

if HAVE_DSL:
    import cutlass.cute as _cute
    from cutlass._mlir import ir as _ir


def tracing() -> bool:
    """True while CuTe DSL is tracing a kernel in this thread (an MLIR insertion point is
    active).
    """
    if not HAVE_DSL:
        return False
    try:
        return _ir.InsertionPoint.current is not None  # type: ignore[attr-defined]
    except ValueError:
        return False


def jit(function):
    """Decorator: device code while tracing, plain Python otherwise.

    It must be spelled ``@dsl.jit``: the DSL finds the functions to rewrite by the attribute name
    ``jit``. The plain form is a copy, because the DSL replaces the code object of the original when
    it first traces it.
    """
    plain = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    traced = _cute.jit(function) if HAVE_DSL else plain

    @functools.wraps(function)
    def call(*args):
        return traced(*args) if tracing() else plain(*args)

    return call
