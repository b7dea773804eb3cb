"""A trap of traced Python that no compiler reports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "megamoe" / "kernels"


def bound(node: ast.AST) -> set[str]:
    return {
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }


def reused(function: ast.FunctionDef) -> set[str]:
    """Variables of unrolled loops that the function also assigns or takes as arguments.

    Inside a branch that is taken at run time such a loop changes the other variable for the
    threads that take it.
    """
    loops = [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.For)
        and isinstance(node.iter, ast.Call)
        and getattr(node.iter.func, "id", "") == "range_constexpr"
    ]
    unrolled = {name for loop in loops for name in bound(loop.target)}
    others = {argument.arg for argument in function.args.args}
    for node in ast.walk(function):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                others |= bound(target)
    return unrolled & others


FUNCTIONS = [
    pytest.param(node, id=f"{path.stem}.{node.name}")
    for path in sorted(KERNELS.rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_unrolled_loop_has_a_variable_of_its_own(function):
    assert not reused(function)


def test_a_loop_that_reuses_a_variable_is_found():
    source = "def f(a):\n  b = a\n  if a:\n    for b in range_constexpr(2):\n      g(b)\n"
    assert reused(ast.parse(source).body[0]) == {"b"}
