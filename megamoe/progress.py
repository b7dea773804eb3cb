"""One line on stderr that says how far a long command is: overwritten on a terminal, appended
elsewhere.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Counts steps out of `total`; silent where `total` is 0, and without a stderr."""

    def __init__(self, total: int, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self.total, self.step = 0 if self.stream is None else total, 0
        self.begin = time.monotonic()
        self._width = 0

    def start(self, what: str) -> None:
        """Say which step begins."""
        if not self.total:
            return
        self.clear()
        self.step += 1
        seconds = time.monotonic() - self.begin
        line = f"[{self.step}/{self.total}] {what}, {seconds:.0f} s so far"
        if self.stream.isatty():
            self._width = len(line)
            self.stream.write(line)
        else:
            self.stream.write(f"{line}\n")
        self.stream.flush()

    def clear(self) -> None:
        """Take the line off a terminal, so that other output can stand there."""
        if self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self.stream.flush()
            self._width = 0
