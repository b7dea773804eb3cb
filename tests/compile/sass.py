"""Compile a configuration for sm_90a without a GPU and read PTX, SASS and resources."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megamoe import compile
from megamoe.config import KernelConfig, MoEConfig


@dataclass(frozen=True)
class Compiled:
    ptx: str
    sass: str
    resources: str

    def count(self, opcode: str) -> int:
        """Instructions of the SASS whose mnemonic is `opcode` (up to the first dot)."""
        return len(re.findall(rf"\b{opcode}\b", self.sass))


def tool(name: str) -> str:
    """A CUDA binary tool: from its wheel, or from PATH."""
    for path in map(Path, sys.path):
        found = path / "nvidia" / "cu13" / "bin" / name
        if found.exists():
            return str(found)
    return shutil.which(name) or name


def run_tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [tool(name), *arguments], capture_output=True, text=True, check=True
    ).stdout


def compile_kernel(config: MoEConfig, kernel: KernelConfig, directory: Path) -> Compiled:
    """The kernel of a layer, as `compile_program` does it."""
    return compile_program(compile.layer_program(config, kernel), directory)


def compile_program(program: compile.Program, directory: Path) -> Compiled:
    """Remarks of ptxas go to the standard streams of the process: read them with `capfd`."""
    program.make(options=f"--keep-ptx --keep-cubin --dump-dir {directory} remarks{{ptx}}")
    (ptx,) = directory.glob("*.ptx")
    (cubin,) = directory.glob("*.cubin")
    return Compiled(
        ptx=ptx.read_text(errors="replace"),
        sass=run_tool("nvdisasm", "-c", str(cubin)),
        resources=run_tool("cuobjdump", "--dump-resource-usage", str(cubin)),
    )
