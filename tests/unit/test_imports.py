"""Imports flow one way, and the package imports where CuTe DSL is not installed."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from tests.nights import at_night

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("megamoe", "workspace", "perf")

#: From the bottom up: a module imports from its own layer or from layers before it.
LAYERS = [
    {"workspace.layout"},
    {"workspace.symmetric", "workspace.views", "workspace"},
    {"megamoe.progress"},
    {"megamoe.dsl", "megamoe.precision", "megamoe.architecture", "megamoe.signature",
     "megamoe.kernel_files", "megamoe.fourbit_layout"},
    {"megamoe.config", "megamoe.activation", "megamoe.fourbit"},
    {"megamoe.router_config"},
    {"megamoe.ordering"},
    {"megamoe.wire", "megamoe.budget", "megamoe.schedule", "megamoe.reference",
     "megamoe.weights", "megamoe.fourbit_pack", "megamoe.router_reference"},
    {"megamoe.regions"},
    {"megamoe.launch_shape", "megamoe.faults"},
    {"megamoe.group", "megamoe.inputs", "megamoe.arguments", "megamoe.custom_op"},
    {"megamoe.health", "megamoe.residents"},
    {"megamoe.kernels", "megamoe.machine"},
    {"megamoe.compile"},
    {"megamoe.streams", "megamoe.router"},
    {"megamoe.backends"},
    {"megamoe.module"},
    {"megamoe.checkpoint.files"},
    {"megamoe.checkpoint.names", "megamoe.checkpoint.model_config"},
    {"megamoe.checkpoint.encodings"},
    {"megamoe.checkpoint.conversions"},
    {"megamoe.checkpoint"},
    {"megamoe"},
    {"megamoe.integrations"},
    {"megamoe.machine.debug", "megamoe.machine.__main__"},
    {"perf.arguments"},
    {"perf.workload"},
    {"perf.recording"},
    {"perf.against"},
    {"perf.running"},
    {"perf.tracing"},
    {"perf.drawing"},
    {"perf.commands"},
    {"perf"},
]  # fmt: skip

#: Only these may know CuTe DSL.
DSL_MODULES = ("megamoe.dsl", "megamoe.kernels", "megamoe.compile")

#: Engines, each with the only module that may import it.
ENGINES = {"transformers": "megamoe.integrations.transformers"}

#: A module (or a package as a whole) that must not import another, whatever the layers say.
FORBIDDEN = [
    *((package, "tests") for package in PACKAGES),
    ("workspace", "megamoe"),
    ("workspace", "perf"),
    ("megamoe.machine", "megamoe.kernels"),
    ("megamoe.machine", "megamoe.schedule"),
    ("megamoe.machine", "megamoe.launch_shape"),
    ("megamoe.kernels", "megamoe.machine"),
    ("megamoe.reference", "megamoe.kernels"),
    ("megamoe.reference", "megamoe.machine"),
    ("megamoe.reference", "workspace"),
    ("megamoe.reference", "megamoe.schedule"),
    ("megamoe.kernels", "megamoe.reference"),
    ("megamoe.kernels", "megamoe.router_reference"),
    ("megamoe.router_reference", "megamoe.kernels"),
    ("megamoe.router", "megamoe.module"),
    ("megamoe.router", "megamoe.backends"),
]


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def part_of(module: str, whole: str) -> bool:
    return module == whole or module.startswith(whole + ".")


@cache
def imports_of(module: str) -> frozenset[str]:
    """Dotted names of everything that a module imports, at any depth of its source."""
    names = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: write imports in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full in SOURCES else node.module)
    return frozenset(names)


def ours(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in PACKAGES}


def layer_of(module: str) -> int:
    best = None
    for level, modules in enumerate(LAYERS):
        for whole in modules:
            # `megamoe` and `workspace` stand for their __init__ alone, other packages for all.
            exact = whole in ("megamoe", "workspace")
            if module == whole or (not exact and part_of(module, whole)):
                best = max(best or ("", 0), (whole, level), key=lambda found: len(found[0]))
    assert best is not None, f"{module} has no layer: give it one in LAYERS"
    return best[1]


@pytest.mark.parametrize("module", SOURCES)
def test_imports_only_from_its_layer_or_below(module):
    for name in ours(imports_of(module)):
        assert name in SOURCES, f"{module} imports {name}, which does not exist"
        assert layer_of(name) <= layer_of(module), f"{module} imports {name}, which lies above it"


@pytest.mark.parametrize("module,other", FORBIDDEN)
def test_forbidden_imports(module, other):
    for name in SOURCES:
        if part_of(name, module):
            found = [n for n in imports_of(name) if part_of(n, other)]
            assert not found, f"{name} imports {found}"


#: What only the folder of an architecture may name: its groups of warps and their registers.
OF_ARCHITECTURES = re.compile(r"warpgroup|setmax|_registers|SM90|wgmma", re.IGNORECASE)
NEUTRAL = [name for name, path in SOURCES.items() if path.parent == ROOT / "megamoe" / "kernels"]


@pytest.mark.parametrize("module", NEUTRAL)
def test_neutral_kernel_files_name_no_architecture(module):
    lines = SOURCES[module].read_text().splitlines()
    assert not [line for line in lines if OF_ARCHITECTURES.search(line)]


COMMANDS = [name for name in SOURCES if part_of(name, "perf.commands")]


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_import_no_command(module):
    """Nor the command line that knows them all."""
    others = {*COMMANDS, "perf.__main__"} - {module}
    assert not others & imports_of(module)


@pytest.mark.parametrize("module", SOURCES)
def test_only_kernels_and_their_builders_import_the_dsl(module):
    if any(part_of(module, allowed) for allowed in DSL_MODULES):
        return
    found = {n for n in imports_of(module) if n.split(".")[0] in ("cutlass", "cuda")}
    assert not found, f"{module} imports {found}"


@pytest.mark.parametrize("module", [name for name in SOURCES if part_of(name, "megamoe")])
def test_only_its_integration_imports_an_engine(module):
    found = {n.split(".")[0] for n in imports_of(module)} & ENGINES.keys()
    assert all(ENGINES[engine] == module for engine in found), f"{module} imports {found}"


def from_the_bottom_up() -> list[str]:
    """Every module behind those that it imports; CycleError if there is no such order."""
    graph = {module: ours(imports_of(module)) - {module} for module in SOURCES}
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_there_is_no_cycle():
    assert {*from_the_bottom_up()} >= {*SOURCES}


def test_foundations_do_not_import_torch():
    """Configuration, schedule and layout are integers: they load in a tool without torch."""
    for module in (
        "megamoe.config",
        "megamoe.router_config",
        "megamoe.precision",
        "megamoe.fourbit_layout",
        "megamoe.schedule",
        "workspace.layout",
        "megamoe.wire",
        "megamoe.regions",
    ):
        assert "torch" not in {n.split(".")[0] for n in imports_of(module)}


# Run in a fresh interpreter: hides the DSL as if it were not installed, then imports `modules`.
FRESH = """
import importlib, sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"hidden by the test: {{name}}", name=name)

sys.meta_path.insert(0, Hide())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in {hidden!r} else find_spec(name, package))

for module in {modules!r}:
    if {alone!r}:
        for name in list(sys.modules):
            if name.split(".")[0] in {packages!r}:
                del sys.modules[name]
    importlib.import_module(module)
{body}
"""


def run_fresh(modules, hidden=(), body="", alone=False):
    """`alone`: each module is imported with nothing of ours loaded before it."""
    code = FRESH.format(
        modules=list(modules), hidden=hidden, packages=PACKAGES, body=body, alone=alone
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def importable(module: str) -> bool:
    """Not a script, not a kernel (a kernel is CuTe DSL code and needs it), and of no engine."""
    if module.endswith("__main__") or module in ENGINES.values():
        return False
    return not part_of(module, "megamoe.kernels")


def test_everything_but_kernels_imports_without_the_dsl():
    """As on a serving host that loads ahead-of-time kernels."""
    body = """
from megamoe import dsl, schedule
assert not dsl.HAVE_DSL and not dsl.tracing()
assert schedule.ceil_div(5, 4) == 2
assert not [name for name in sys.modules if name.split(".")[0] == "cutlass"]
"""
    run_fresh(filter(importable, from_the_bottom_up()), hidden=("cutlass",), body=body)


def test_public_names_import_without_the_dsl():
    body = """
import megamoe, workspace
for package in (megamoe, workspace):
    for name in package.__all__:
        assert getattr(package, name) is not None, name
"""
    run_fresh(["megamoe", "workspace"], hidden=("cutlass", "cuda"), body=body)


@pytest.mark.parametrize("engine,module", ENGINES.items())
def test_an_integration_says_what_it_needs(engine, module):
    body = f"""
try:
    importlib.import_module({module!r})
except ImportError as error:
    assert "pip install 'megamoe[{engine}]'" in str(error), error
else:
    raise AssertionError("imported without its engine")
"""
    run_fresh(["megamoe.integrations"], hidden=(engine,), body=body)


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, at_night(True)])
def test_every_module_imports_first(alone):
    """No import order is needed. From the bottom up a module finds loaded only what stands below
    it, and there is no cycle; at night each one is imported alone.
    """
    modules = [m for m in from_the_bottom_up() if not m.endswith("__main__")]
    run_fresh([m for m in modules if m not in ENGINES.values()], alone=alone)


def test_the_version_is_that_of_pyproject():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    found = importlib.import_module("megamoe").__version__
    assert found in (declared, "unknown")  # a source tree that nobody installed
