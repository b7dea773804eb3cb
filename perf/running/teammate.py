"""A process of a team in a duel: `python -m perf.running.teammate FILE_DESCRIPTOR` (`teams`).

It may run with another version of `megamoe` than this `perf` was written for, so that what it uses
of it is little: `MegaMoE` and `quantize_weights`, and what `perf.workload.cases` does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from math import ceil
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

import megamoe
from perf.running.jobs import ALONE, Job, join, place_of
from perf.running.messages import Batch, Failed, Orders, Ready
from perf.running.timing import Prepared, prepare
from perf.running.together import time_batch_together
from perf.workload.cases import Case, make_rank_inputs, make_weights

#: Rows of an output that are compared with those of other contenders.
ROWS = 16
#: A batch has at most so many times the repetitions asked for, to be long enough for a sensor.
MOST = 10


def repetitions(reps: int, us: float, batch_us: float) -> int:
    """Of calls that take `us`: `reps`, or as many as last for `batch_us`, but no more than MOST
    times as many.
    """
    return min(max(reps, ceil(batch_us / us)), MOST * reps)


def weights_of(case: Case, device: str, experts: Sequence[int]) -> list[torch.Tensor]:
    """What `load_weights` takes, quantised expert by expert."""
    if case.precision == "bf16":
        return list(make_weights(case, device, experts))
    made = [
        megamoe.quantize_weights(*make_weights(case, device, range(e, e + 1)), case.precision)
        for e in experts
    ]
    columns = [list(column) for column in zip(*made, strict=True)]
    made.clear()
    weights = []
    while columns:  # one after the other: a tensor is held twice only while it is joined
        pieces = columns.pop(0)
        weights.append(torch.cat(pieces))
    return weights


class Held:
    """A layer with one call per token count, ready to be timed."""

    def __init__(self, orders: Orders, case: Case, job: Job, device: str):
        ranks = range(case.num_ranks) if job.alone else [job.rank]
        extra = {
            "kernel_dir": orders.kernel_dir,
            "num_sms": orders.num_sms,
            "num_shared_experts": case.model.num_shared_experts or None,  # others may know of none
        }
        self.moe = megamoe.MegaMoE(
            num_experts=case.model.num_experts,
            top_k=case.model.top_k,
            hidden_size=case.model.hidden,
            intermediate_size=case.model.intermediate,
            max_tokens_per_rank=orders.max_tokens,
            precision=case.precision,
            device=device,
            **({"world": case.num_ranks} if job.alone else {"group": dist.group.WORLD}),
            **{name: value for name, value in extra.items() if value is not None},
        )
        experts = case.experts_of(ranks)
        self.weights = weights_of(case, device, experts)  # the layer may not hold them itself
        self.moe.load_weights(*self.weights)
        self.calls: list[Prepared] = []
        self.inputs: list = []  # which captured graphs read
        self.reps: list[int] = []
        self.outputs = []
        for tokens in orders.tokens:
            inputs = [make_rank_inputs(case.with_tokens(tokens), rank, device) for rank in ranks]
            self.inputs.append(inputs)
            call = self._call(inputs)
            prepared = prepare(call, device, orders.mode, self.moe.synchronize)
            few = {"repetitions": orders.reps, "warmup": orders.warmup}
            times, outputs = time_batch_together(job, prepared, **few)
            self.calls.append(prepared)
            self.reps.append(repetitions(orders.reps, times.us_median, orders.batch_us))
            self.outputs.append(outputs[0][:ROWS].float().cpu().numpy())

    def _call(self, inputs: Sequence):
        columns = [[getattr(i, name) for i in inputs] for name in ("x", "topk_idx", "topk_weights")]
        if len(inputs) == 1:
            arguments = [column[0] for column in columns]
            return lambda: [self.moe(*arguments)]
        return lambda: self.moe(*columns)


def serve(line: Connection) -> None:
    """Answer batch after batch, until there is no other."""
    orders: Orders = line.recv()
    place = place_of(os.environ)
    job = join(place) if place else ALONE
    device = str(job.device) if place else orders.device
    with torch.no_grad():
        held = [Held(orders, case, job, device) for case in orders.cases]
        if device != "cpu":
            torch.cuda.empty_cache()  # other teams share the GPU
        line.send(Ready([one.outputs for one in held]))
        while (asked := line.recv()) is not None:
            entry, tokens = asked
            one = held[entry]
            times, _ = time_batch_together(
                job, one.calls[tokens], repetitions=one.reps[tokens], warmup=orders.warmup
            )
            line.send(Batch(times.us_median, times.load))
    if place:
        del held
        dist.barrier()
        dist.destroy_process_group()


def main(argv: Sequence[str]) -> None:
    line = Connection(int(argv[0]))
    try:
        serve(line)
    except (EOFError, KeyboardInterrupt):  # the duel ended first
        os._exit(1)
    except BaseException as error:
        reason = str(error).strip().partition("\n")[0]
        line.send(Failed(f"{type(error).__name__}: {reason}"))
        os._exit(1)  # peers may wait for this one


if __name__ == "__main__":
    main(sys.argv[1:])
