"""All tests that need a GPU in one go: `python -m tests.run_gpu [--kernel-dir DIR] [options]`.

Further options go to pytest; tests for more GPUs than there are skip themselves.
`python -m tests.run_gpu --build DIR` builds every kernel that they use, on a machine without a GPU;
carry DIR to one that has GPUs but no DSL.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

from megamoe import compile
from tests.gpu.configs import CONFIGS as ONE_GPU
from tests.gpu.configs import ROUTERS
from tests.gpu.kernels import library
from tests.multigpu.configs import CONFIGS as SEVERAL_GPUS

HERE = Path(__file__).parent


def build(directory: str) -> int:
    """Build the kernels of all configurations; the exit status of `megamoe.compile`."""
    with tempfile.TemporaryDirectory() as scratch:
        entries = Path(scratch) / "configs.json"
        routers = [{"router": fields} for fields in ROUTERS.values()]
        entries.write_text(json.dumps([*ONE_GPU.values(), *SEVERAL_GPUS.values(), *routers]))
        status = compile.main(["--list", str(entries), "--out", directory])
        entries.write_text(json.dumps(routers))  # whose bits are compared with those of a CPU
        status = status or compile.main(["--cpu", "--list", str(entries), "--out", directory])
    if status == 0:
        for name in library.NAMES:
            print(library.build(Path(directory), name), flush=True)
    return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.run_gpu", description=__doc__)
    parser.add_argument("--build", metavar="DIR", help="build the kernels into DIR and stop")
    parser.add_argument("--kernel-dir", metavar="DIR", help="kernels built ahead of time")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.build:
        return build(arguments.build)
    if arguments.kernel_dir:
        os.environ["MEGAMOE_KERNEL_DIR"] = str(Path(arguments.kernel_dir).resolve())
    return int(pytest.main([str(HERE / "gpu"), str(HERE / "multigpu"), "-q", *rest]))


if __name__ == "__main__":
    sys.exit(main())
