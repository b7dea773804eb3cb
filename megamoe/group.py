"""The processes of a job: agreement on the configuration, and a bounded meeting of all ranks.

One process per GPU, all on one node. Nothing here touches the GPU: ranks meet through the process
group's key-value store, so that a rank that has died is named after a timeout instead of hanging a
collective.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections import defaultdict
from datetime import timedelta

import torch
import torch.distributed as dist

from megamoe.faults import MegaMoEError

#: Layers made by this process, by the ranks that they are over: all of these must make theirs in
#: the same order.
_made: defaultdict[tuple[int, ...], itertools.count] = defaultdict(itertools.count)


class RanksDisagree(ValueError):
    """Ranks constructed their modules with different arguments; the message names rank and
    field.
    """


class MissingRank(MegaMoEError):
    """A rank did not come to a meeting in time; the message names it."""


class Group:
    """This process's place in a job, and what it does together with the other ranks of a layer.

    number: of the layer, among those over the same ranks, by whichever process group.

    Raises ValueError unless torch.distributed is initialised and `group` holds this process.
    """

    def __init__(self, group: dist.ProcessGroup):
        if not dist.is_initialized():
            raise ValueError("group needs torch.distributed: call init_process_group first")
        self.process_group = group
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise ValueError(
                f"group does not hold this process, which is rank {dist.get_rank()} of the job"
            )
        self.size = dist.get_world_size(group)
        name = getattr(group, "group_name", "world")
        self.number = next(_made[tuple(self.members)])
        self.prefix = f"megamoe/{name}/{self.number}"
        self._store = dist.distributed_c10d._get_default_store()

    @property
    def members(self) -> list[int]:
        """Ranks of the job, in the order of the group."""
        return dist.get_process_group_ranks(self.process_group)

    def agree(self, facts: dict[str, object]) -> None:
        """Collective: raise the same ValueError on every rank unless all passed equal `facts`.

        A fact named "error" that is not None (a rank could not even check its arguments) is raised
        on every rank. "gpu" and "host" say where a rank runs: GPUs must differ, hosts must not.
        """
        facts = {**facts, "serial": self.prefix}
        gathered: list = [None] * self.size
        dist.all_gather_object(gathered, facts, group=self.process_group)
        for rank, theirs in enumerate(gathered):
            if theirs["error"] is not None:
                raise RanksDisagree(f"rank {rank}: {theirs['error']}")
        first = gathered[0]
        for rank, theirs in enumerate(gathered):
            for name in first:
                if name not in ("gpu", "error") and theirs.get(name) != first[name]:
                    raise RanksDisagree(
                        f"ranks disagree on {name}: rank 0 has {first[name]!r}, "
                        f"rank {rank} has {theirs.get(name)!r}"
                    )
            for other in range(rank):
                if gathered[other]["gpu"] == theirs["gpu"]:
                    raise RanksDisagree(f"ranks {other} and {rank} share GPU {theirs['gpu']}")

    def meet(self, name: str, timeout_s: float) -> None:
        """Wait until every rank has come to the meeting of this name; MissingRank names who has
        not. A name is for one meeting, which may be tried again after it was missed.
        """
        keys = self._keys(name)
        try:
            self._store.set(keys[self.rank], "here")
            self._store.wait(keys, timedelta(seconds=timeout_s))
        except (RuntimeError, dist.DistError) as error:
            raise MissingRank(
                f"rank {self.rank} waited {timeout_s:g} s for {self._missing(keys)} at {name}"
            ) from error

    def leave(self, name: str, text: str) -> None:
        """Leave a text of this rank for the others, as far as the store can still be reached."""
        with contextlib.suppress(RuntimeError, dist.DistError):
            self._store.set(self._keys(name)[self.rank], text)

    def found(self, name: str) -> dict[int, str]:
        """The texts that ranks have left under this name, by rank."""
        texts = {}
        with contextlib.suppress(RuntimeError, dist.DistError):
            for rank, key in enumerate(self._keys(name)):
                if self._store.check([key]):
                    texts[rank] = self._store.get(key).decode()
        return texts

    def _keys(self, name: str) -> list[str]:
        return [f"{self.prefix}/{name}/{rank}" for rank in range(self.size)]

    def _missing(self, keys: list[str]) -> str:
        try:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        except (RuntimeError, dist.DistError):
            return "the process that hosts the store (rank 0, as a rule)"
        return f"ranks {missing}"


def where(device: torch.device) -> dict[str, object]:
    """The facts "host" and "gpu" of this process."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return {"host": socket.gethostname(), "gpu": uuid}
