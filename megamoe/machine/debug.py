"""Looking into a launch: stops at source lines and at changes, registers, fragments as tiles.

    python -m megamoe.machine --tokens 4 --at mainloop.py:73 --tile --warp 4
    python -m megamoe.machine --ranks 2 --watch "l1_arrival_count[0]" --seed 7 --checks

runs a forward of a small random layer. The same from Python, for any machine: see `Debugger`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

import numpy as np
import torch

from megamoe.machine import report
from megamoe.machine.decode import NUMBER, STOPS
from megamoe.machine.faults import MachineError
from megamoe.machine.machine import POLICIES, Machine, Warp

Action = Callable[[Warp], None]


class Debugger:
    """Stops of a machine that has its launches but does not run yet."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self._at: dict[str, tuple[Action, int | None]] = {}
        self._watching: Action | None = None
        machine.on_break = self._stopped

    def at(self, place: str, action: Action, warp: int | None = None) -> int:
        """Call `action` whenever a warp (or only number `warp` of a CTA) comes to a line of source,
        "file.py:12". Returns how many instructions begin that line; ValueError if none does.
        """
        found = 0
        for code in self.machine.launched():
            before = None
            for index, instr in enumerate(code.origin):
                if str(instr.place) == place and before != instr.place:
                    code.instructions["flags"][index] |= STOPS
                    found += 1
                before = instr.place
        if not found:
            raise ValueError(f"no instruction begins at {place}")
        self._at[place] = action, warp
        return found

    def watch(self, name: str, action: Action, rank: int = 0) -> None:
        """Call `action` after every store by a warp to a row of a region, "name[index]"."""
        found = re.fullmatch(r"(\w+)\[(\d+)\]", name)
        for segment in self.machine.memory.segments:
            for region in segment.regions:
                if found and segment.rank == rank and region.name == found[1]:
                    low = segment.base + region.begin + int(found[2]) * region.row_bytes
                    self.machine.watch(low, low + region.row_bytes)
                    self._watching = action
                    return
        raise ValueError(f"{name} is no row of a region of rank {rank}")

    def clear(self) -> None:
        """Leave no stops in the code, which other machines share."""
        for code in self.machine.launched():
            code.instructions["flags"] &= ~np.uint16(STOPS)

    def _stopped(self, warp: Warp) -> None:
        stops = warp.code.instructions["flags"][warp.state.pc] & STOPS
        action, only = self._at.get(str(warp.instr.place), (None, None)) if stops else (None, None)
        if action is None:
            action, only = self._watching, None
        if action and only in (None, warp.index):
            action(warp)


def sums_of(warp: Warp) -> np.ndarray:
    """The accumulator of the next product that the warp comes to, or else the last before, as the
    tile that it is: float32 [16, columns].
    """
    ops = warp.code.instructions["op"]
    products = np.flatnonzero(ops == NUMBER["mma"])
    if not len(products):
        raise ValueError("the kernel has no products")
    later = products[products >= warp.state.pc]
    x = int(warp.code.instructions["x"][later[0] if len(later) else products[-1]])
    columns = int(warp.code.extra[x + 1])
    rows = warp.rows()[warp.code.extra[x + 2 : x + 2 + columns // 2]].view(np.float32)
    register, lane = np.arange(columns // 2)[:, None], np.arange(32)
    tile = np.zeros((16, columns), np.float32)
    row = lane // 4 + 8 * (register >> 1 & 1)
    tile[row, 8 * (register >> 2) + 2 * (lane % 4) + (register & 1)] = rows
    return tile


def _layer(args: argparse.Namespace):
    from megamoe import MegaMoE, quantize_weights

    experts, hidden, inner = args.experts, args.hidden, args.intermediate
    moe = MegaMoE(
        num_experts=experts, top_k=args.top_k, hidden_size=hidden, intermediate_size=inner,
        max_tokens_per_rank=args.tokens, world=args.ranks, precision=args.precision, device="cpu",
    )  # fmt: skip
    rng = torch.Generator().manual_seed(args.seed)
    w13 = (torch.randn(experts, 2 * inner, hidden, generator=rng) / hidden**0.5).bfloat16()
    w2 = (torch.randn(experts, hidden, inner, generator=rng) / inner**0.5).bfloat16()
    quantized = moe.config.recipe.weights.has_scales
    moe.load_weights(*(quantize_weights(w13, w2, args.precision) if quantized else (w13, w2)))
    xs = [torch.randn(args.tokens, hidden, generator=rng).bfloat16() for _ in range(args.ranks)]
    logits = [torch.randn(args.tokens, experts, generator=rng) for _ in range(args.ranks)]
    topk = [rows.softmax(-1).topk(args.top_k) for rows in logits]
    return moe, (xs, [t.indices for t in topk], [t.values for t in topk])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megamoe.machine", description="A small forward, looked into."
    )
    sizes = dict(ranks=1, experts=4, top_k=2, hidden=128, intermediate=128, tokens=8, seed=0)
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--policy", choices=POLICIES, default="random")
    parser.add_argument("--checks", action="store_true", help="follow the order of accesses")
    parser.add_argument("--at", metavar="FILE:LINE", help="stop where a warp comes to this line")
    parser.add_argument("--warp", type=int, help="of a CTA: only its stops")
    parser.add_argument("--show", metavar="REGISTER", action="append", default=[])
    parser.add_argument("--tile", action="store_true", help="print the accumulator there")
    parser.add_argument("--watch", metavar="REGION[ROW]", help="stop where a row is stored to")
    parser.add_argument("--rank", type=int, default=0, help="whose row")
    args = parser.parse_args(argv)
    moe, inputs = _layer(args)

    def look(warp: Warp) -> None:
        print(f"{warp}: {report.where(warp.instr)}: {report.text_of(warp.instr.place)}")
        for name in args.show:
            print(f"  {name} = {warp.register(name).tolist()}")
        if args.tile:
            print(sums_of(warp))

    def changed(warp: Warp) -> None:
        low, high = moe.backend.machine.watched
        words = moe.backend.machine.memory.at(low, high - low).view(np.int32)[:8].tolist()
        instr = warp.code.origin[warp.state.what]
        print(f"{warp}: {report.where(instr)}: {args.watch} = {words}")

    def prepare(machine: Machine) -> Debugger:
        debugger = Debugger(machine)
        if args.at:
            debugger.at(args.at, look, args.warp)
        if args.watch:
            debugger.watch(args.watch, changed, args.rank)
        return debugger

    moe.backend.settings = {"policy": args.policy, "seed": args.seed, "checks": args.checks}
    moe.backend.prepare = prepare
    try:
        moe(*inputs) if args.ranks > 1 else moe(*(item[0] for item in inputs))
    except (MachineError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{moe.backend.machine.steps} instructions, {moe.nvlink_bytes} bytes between ranks")
    return 0
