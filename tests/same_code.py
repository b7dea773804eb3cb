"""Is the machine code of two versions the same? `python -m tests.same_code OLD NEW`

OLD and NEW are checkouts of the project, or revisions of this one. Every recipe is compiled for
sm_90a at three sizes, without a GPU, and instructions are compared one by one. Prints a line per
kernel, and where the first difference lies; exits with 1 if there is one. For changes that must not
change a kernel: names, structure, hosts.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.compile.sass import run_tool

ROOT = Path(__file__).resolve().parents[1]
#: Sizes as positional fields of `MoEConfig`, before the precision.
SIZES = {
    "pro_ep8": (384, 6, 7168, 3072, 32768, 8),
    "v3_ep1": (32, 8, 7168, 2048, 4096, 1),
    "odd_ep4": (8, 16, 384, 384, 96, 4),
}
PRECISIONS = ("bf16", "fp8_block", "fp8_channel", "fp8_mxfp4", "fp8_mxfp4_token", "fp8_int4")

#: Run with a tree of the project first on the path: compiles, leaving cubins in a directory each,
#: that of a recipe which the tree does not have yet empty.
COMPILE = """
import json, sys
from pathlib import Path
from megamoe import compile
from megamoe.config import MoEConfig, select
from megamoe.precision import PRECISIONS
for name, fields in json.loads(sys.argv[1]).items():
    directory = Path(sys.argv[2]) / name
    directory.mkdir(parents=True)
    if fields[-1] not in PRECISIONS:
        continue
    config = MoEConfig(*fields)
    make = getattr(compile, "compile_kernel", None) or compile.trace  # as it was called before
    make(config, select(config), options=f"--keep-cubin --dump-dir {directory}")
"""


def cubins_of(tree: Path, kernels: dict[str, tuple], directory: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tree), "CUTE_DSL_ARCH": "sm_90a"}
    command = [sys.executable, "-c", COMPILE, json.dumps(kernels), str(directory)]
    subprocess.run(command, cwd=directory, env=environment, check=True, stdout=subprocess.DEVNULL)


def instructions(directory: Path) -> list[str] | None:
    """Of the one kernel in a directory, with operands and without addresses or names; None if the
    tree has no such recipe.
    """
    cubins = list(directory.glob("*.cubin"))
    if not cubins:
        return None
    (cubin,) = cubins
    line = r"^\s*/\*\w{4,}\*/\s*(\S.*?)\s*(?:/\*.*)?$"
    return re.findall(line, run_tool("nvdisasm", "-c", str(cubin)), re.M)


def first_difference(old: list[str], new: list[str]) -> str:
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    changes = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    _, begin, end, other_begin, other_end = changes[0]
    was, now = old[begin:end][:2], new[other_begin:other_end][:2]
    return f"{len(changes)} places, the first at {begin}: {was} -> {now}"


def tree_of(what: str, scratch: Path) -> Path:
    """A directory as it is; a revision, checked out into `scratch`."""
    if Path(what).is_dir():
        return Path(what).resolve()
    tree = scratch / "tree" / re.sub(r"\W", "_", what)
    tree.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", what, "megamoe", "workspace"],
        check=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    subprocess.run(["tar", "x", "-C", str(tree)], input=archive.stdout, check=True)
    return tree


def compare(old: Path, new: Path, kernels: dict[str, tuple], scratch: Path) -> int:
    """Print a line per kernel; how many differ, of those that both have."""
    for name, tree in (("old", old), ("new", new)):
        (scratch / name).mkdir()
        cubins_of(tree, kernels, scratch / name)
    different = 0
    for name in kernels:
        before, after = (instructions(scratch / which / name) for which in ("old", "new"))
        if before is None or after is None:
            which = " and ".join(n for n, c in (("old", before), ("new", after)) if c is None)
            print(f"{name}: skipped, {which} has no such recipe", flush=True)
            continue
        same = before == after
        different += not same
        said = "the same" if same else first_difference(before, after)
        print(f"{name}: {len(before)} and {len(after)} instructions, {said}", flush=True)
    return different


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.same_code", description=__doc__)
    parser.add_argument("old", help="a checkout, or a revision of this one")
    parser.add_argument("new", help="the same")
    parser.add_argument("--sizes", default=",".join(SIZES), help="default: %(default)s")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="default: %(default)s")
    arguments = parser.parse_args(argv)
    kernels = {
        f"{size}-{precision}": (*SIZES[size], precision)
        for size in arguments.sizes.split(",")
        for precision in arguments.precisions.split(",")
    }
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        trees = [tree_of(what, scratch) for what in (arguments.old, arguments.new)]
        return int(compare(*trees, kernels, scratch) > 0)


if __name__ == "__main__":
    sys.exit(main())
