"""What the layers of a workspace know of its launches: error records, failure, recovery.

A launch that fails leaves counters, barrier words and an error record behind, and these belong to
the workspace. So one `Health` stands beside it, whichever layer launched, noticed or recovers.

Recovery over several processes has two meetings: at "stopped" no rank runs a launch, at "clean"
every rank has zeroed its own header and none has signalled yet. A rank that misses a meeting tries
the same one again; it never zeroes twice, because another rank may have gone on and signalled it.
"""

from __future__ import annotations

import ctypes

import torch

from megamoe import faults
from megamoe.group import Group
from megamoe.regions import LayerLayout
from workspace.views import Workspace

#: Steps of a recovery, in order.
STOPPED, CLEAN = MEETINGS = ("stopped", "clean")


class Health:
    """Of one workspace: `failed` if a launch has failed and nobody has recovered yet.

    group: the processes that share the workspace, or None if all ranks live here.
    """

    def __init__(self, workspace: Workspace[LayerLayout], group: Group | None):
        self.workspace, self.group, self.failed = workspace, group, False
        self._recoveries = 0  # the same number on every rank once all are clean
        self._met = 0  # meetings of the current recovery that are behind us
        on_gpu = workspace.device.type == "cuda"
        with torch.inference_mode(False):  # made anywhere, zeroed anywhere
            shape = len(workspace.local_ranks), faults.RECORD_WORDS
            self.records = torch.zeros(shape, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
        # Plain loads: a forward looks at every status and must not pay for a tensor operation.
        words = ctypes.c_int32 * faults.RECORD_WORDS
        self._words = [words.from_address(row.data_ptr()) for row in self.records]

    @property
    def reported(self) -> bool:
        """Whether a launch has left a record; it may still run."""
        return any(words[faults.STATUS] for words in self._words)

    @property
    def broken(self) -> bool:
        """Whether a launch now would do nothing: one before it has failed."""
        harmless = faults.OK, faults.BAD_EXPERT
        return self.failed or any(words[faults.STATUS] not in harmless for words in self._words)

    def take_error(self, limits: faults.Limits) -> faults.MegaMoEError | None:
        """The worst of what the launches reported, which is then forgotten; for when none runs."""
        if not self.reported:
            return None
        reasons = self._reasons()
        layout = self.workspace.layout
        records = self.records.tolist()
        found = [faults.error_of(record, layout, limits, reasons) for record in records]
        errors = [error for error in found if error is not None]
        self.records.zero_()
        worst = max(errors, key=_gravity)
        self.failed = self.failed or isinstance(worst, faults.LaunchFailed)
        return worst

    def tell(self, reason: str) -> None:
        """Leave word for the other ranks why this one refuses its input, and count as failed: its
        launch will end theirs.
        """
        assert self.group is not None, "there is nobody else"
        self.failed = True
        self.group.leave(self._key("refused"), reason)

    def recover(self, limits: faults.Limits) -> None:
        """Return the workspace to its first state; with a group every rank must come here.

        Raises MissingRank, naming the ranks that did not come within start_timeout_s; the next
        call goes on where this one ended.
        """
        self._wait()
        while self._met < len(MEETINGS):
            if self.group is not None:
                self.group.meet(self._key(MEETINGS[self._met]), limits.start_timeout_s)
            if MEETINGS[self._met] == STOPPED:
                self.workspace.recover()
                self.records.zero_()
                self._wait()
            self._met += 1
        self._met = 0
        self._recoveries += 1
        self.failed = False

    def _wait(self) -> None:
        if self.workspace.device.type == "cuda":
            torch.cuda.synchronize(self.workspace.device)

    def _key(self, what: str) -> str:
        return f"recovery/{self._recoveries}/{what}"

    def _reasons(self) -> dict[int, str]:
        return {} if self.group is None else self.group.found(self._key("refused"))


def _gravity(error: faults.MegaMoEError) -> int:
    """What a rank found itself is the cause; then a peer's failure, then bad input."""
    kinds = faults.InvalidExpertError, faults.PeerFailed, faults.LaunchFailed
    return [isinstance(error, kind) for kind in kinds].index(True)
