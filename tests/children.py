"""Runs a function in a process of its own: one that may be killed, or gives up its privileges."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress

#: A user that exists nowhere.
STRANGER = 12345


def in_child(function: Callable[[], object], *, as_stranger: bool = False) -> str:
    """What the function returns, as text; AssertionError if it raises or its process is killed.
    `as_stranger` is without privileges: as root another user, else this one.
    """
    return collect(start(function, as_stranger=as_stranger))


def start(function: Callable[[], object], *, as_stranger: bool = False) -> tuple[int, int]:
    """Begin `in_child`; `collect` ends it."""
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return process, read
    status = 1
    try:
        if as_stranger and os.geteuid() == 0:
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
        text = str(function())
        status = 0
    except BaseException:
        text = traceback.format_exc()
    with suppress(OSError):
        os.write(write, text.encode()[:60_000])  # what a pipe holds
    os._exit(status)


def collect(child: tuple[int, int]) -> str:
    process, read = child
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    ended = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    assert status == 0, f"child: {ended}\n{text}"
    return text
