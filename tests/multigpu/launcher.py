"""Functions on W processes: a pool of workers that stay, so that a test does not pay for their
start.

`Pool.run(function, **kwargs)` calls `function(context, **kwargs)` on every worker and returns the
results by rank, or raises for the first rank that failed. Nothing here waits without a limit: a
worker that dies is reported at once, one that does not answer is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

HOST = "127.0.0.1"
START_S, TASK_S, MEET_S = 120.0, 60.0, 30.0
#: After the first failure of a task the other ranks get this long to end it.
GRACE_S = 15.0
SET_PARENT_DEATH_SIGNAL = 1  # prctl
#: What workers without a GPU find imported: they are forked from a process that has it.
PRELOADED = ("tests.multigpu.launcher", "megamoe")


class WorkerFailed(RuntimeError):
    """A worker raised; the message has its rank and traceback. `secondary`: another one began."""

    def __init__(self, message: str, secondary: bool = False):
        super().__init__(message)
        self.secondary = secondary


class WorkerDied(WorkerFailed):
    """A worker's process ended."""


class WorkerTimeout(WorkerFailed):
    """Workers did not answer in time and were killed."""


class PeerGone(RuntimeError):
    """Raised in a worker that waits for another one that has failed."""


@dataclass(frozen=True)
class Died:
    """In place of the result of a worker that was allowed to die."""

    exitcode: int | None


@dataclass
class Context:
    """A worker's place. `cache` is kept between tasks, but not after a task that failed."""

    rank: int
    world: int
    device: torch.device
    store: dist.Store
    cache: dict = field(default_factory=dict)
    task: int = 0
    _meetings: int = 0

    def begin(self, task: int, fresh: bool) -> None:
        self.task, self._meetings = task, 0
        if fresh:
            self.cache.clear()

    def failed_key(self) -> str:
        return f"task/{self.task}/failed"

    def meet(self, timeout_s: float = MEET_S) -> None:
        """Barrier of the hosts; touches no GPU. Ends with PeerGone if another rank fails."""
        self._meetings += 1
        keys = [f"task/{self.task}/meet/{self._meetings}/{rank}" for rank in range(self.world)]
        self.store.set(keys[self.rank], "here")
        deadline = time.monotonic() + timeout_s
        while not self.store.check(keys):
            if self.store.check([self.failed_key()]):
                raise PeerGone(f"rank {self.rank}: another rank failed before the meeting")
            if time.monotonic() > deadline:
                missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                raise PeerGone(f"rank {self.rank}: ranks {missing} did not meet in {timeout_s} s")
            time.sleep(0.0002)

    def healthy(self) -> bool:
        """False if the GPU of this process can no longer be used."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:
                return False
        return True


def forked_from_preloaded():
    """The context of multiprocessing for workers without a GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _client(port: int) -> dist.TCPStore:
    return dist.TCPStore(HOST, port, is_master=False, timeout=timedelta(seconds=START_S))


def setup_cpu(rank: int, world: int, port: int) -> Context:
    """No process group."""
    return Context(rank, world, torch.device("cpu"), _client(port))


def _join(backend: str, rank: int, world: int, port: int, **options) -> None:
    # The parent holds the store, as an agent like torchrun does: it outlives every rank.
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("job", _client(port)),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=START_S),
        **options,
    )


def setup_gloo(rank: int, world: int, port: int) -> Context:
    _join("gloo", rank, world, port)
    return setup_cpu(rank, world, port)


def setup_nccl(rank: int, world: int, port: int) -> Context:
    """One GPU per process."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    _join("nccl", rank, world, port, device_id=device)
    return Context(rank, world, device, _client(port))


def _call(context: Context, message: tuple, pipe: connection.Connection) -> None:
    task, fresh, function, kwargs = message
    context.begin(task, fresh)
    try:
        pipe.send(("ok", function(context, **kwargs)))
    except Exception as error:
        text = traceback.format_exc()
        pipe.send(("error", text, context.healthy(), isinstance(error, PeerGone)))
        # Only now: the answers of those who hear of it come after the cause.
        context.store.set(context.failed_key(), str(context.rank))


def _serve(rank: int, world: int, setup: Callable, port: int, pipe) -> None:
    """A worker's life. It leaves by os._exit: a collective farewell would wait for the dead."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    try:
        context = setup(rank, world, port)
        pipe.send(("ok", os.getpid()))
    except Exception:
        pipe.send(("error", traceback.format_exc(), False, False))
        os._exit(1)
    with contextlib.suppress(EOFError):
        while (message := pipe.recv()) is not None:
            _call(context, message, pipe)
    os._exit(0)


class Pool:
    """W workers, ready after construction. Raises WorkerFailed if one cannot start.

    `broken` is None, or says why the pool can take no more tasks.
    """

    def __init__(self, world: int, setup: Callable, start_timeout_s: float = START_S):
        self.world, self.broken, self._task, self._fresh = world, None, 0, False
        self.store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        # A process that has used CUDA must not fork, and GPU tests set variables for their workers.
        spawns = setup is setup_nccl
        context = multiprocessing.get_context("spawn") if spawns else forked_from_preloaded()
        self._pipes, self._processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, setup, self.store.port, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        try:
            self._collect("start", start_timeout_s, ())
        except WorkerFailed:
            self._kill("it did not start")
            raise

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def run(
        self, function: Callable, *, timeout_s: float = TASK_S, may_die: tuple = (), **kwargs
    ) -> list:
        """`function(context, **kwargs)` of every rank; `function` must be importable by name.

        A rank in `may_die` that ends its process gives `Died`; the pool is then broken, but its
        survivors still answer to `close`.
        """
        if self.broken:
            raise WorkerFailed(f"the pool is broken: {self.broken}")
        self._task += 1
        message = (self._task, self._fresh, function, kwargs)
        self._fresh = False
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # of a dead worker: `_collect` finds it
                pipe.send(message)
        return self._collect(function.__name__, timeout_s, may_die)

    def close(self, timeout_s: float = 10.0) -> list[int | None]:
        """End all workers; their exit codes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        deadline = time.monotonic() + timeout_s
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._kill(self.broken or "it was closed")
        return [process.exitcode for process in self._processes]

    def _kill(self, why: str) -> None:
        self.broken = why
        for end in ("terminate", "kill"):
            for process in self._processes:
                if process.is_alive():
                    getattr(process, end)()
            for process in self._processes:
                process.join(3.0)

    def _collect(self, name: str, timeout_s: float, may_die: tuple) -> list:
        """One answer per rank; raises for the first failure once all have answered or time is
        up.
        """
        results, failure = {}, None
        deadline = time.monotonic() + timeout_s
        while len(results) < self.world:
            pending = [rank for rank in range(self.world) if rank not in results]
            waiting = [self._pipes[rank] for rank in pending]
            waiting += [self._processes[rank].sentinel for rank in pending]
            ready = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                late = f"ranks {pending} did not answer {name}"
                self._kill(late)
                if failure is not None:
                    failure.add_note(f"then {late} and were killed")
                raise failure or WorkerTimeout(f"{late} in {timeout_s} s and were killed")
            for rank in pending:
                process = self._processes[rank]
                if self._pipes[rank] not in ready and process.sentinel not in ready:
                    continue
                result, error = self._answer(rank, name)
                results[rank] = result
                if isinstance(result, Died):
                    self.broken = f"rank {rank} died in {name}"
                    if rank in may_die:
                        continue
                if error is not None:
                    self.store.set(f"task/{self._task}/failed", str(rank))
                    if failure is None or (failure.secondary and not error.secondary):
                        failure = error
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if failure is not None:
            self._fresh = True
            if isinstance(failure, WorkerDied):
                self._kill(str(failure))
            raise failure
        return [results[rank] for rank in range(self.world)]

    def _answer(self, rank: int, name: str) -> tuple[object, WorkerFailed | None]:
        """(result, error) of a worker that has answered or ended."""
        try:
            if self._pipes[rank].poll():
                kind, value, *more = self._pipes[rank].recv()
                if kind == "ok":
                    return value, None
                healthy, secondary = more
                if not healthy:
                    self.broken = f"rank {rank} cannot go on after {name}"
                text = f"rank {rank} failed in {name}:\n{value}"
                return None, WorkerFailed(text, secondary)
        except (EOFError, OSError):
            pass
        process = self._processes[rank]
        process.join(5.0)
        died = Died(process.exitcode)
        return died, WorkerDied(f"rank {rank} died in {name} with exit code {died.exitcode}")


class Jobs:
    """A pool that starts on first use, and again after it broke."""

    #: Starts that may fail in a row: a machine where none works must not be asked by every test.
    MAX_FAILED_STARTS = 2

    def __init__(self, world: int, setup: Callable):
        self.world, self._setup = world, setup
        self._pool: Pool | None = None
        self._failed_starts = 0

    def run(self, function: Callable, **options) -> list:
        if self._pool is not None and self._pool.broken:
            self.close()
        if self._pool is None:
            if self._failed_starts >= self.MAX_FAILED_STARTS:
                raise WorkerFailed(f"{self._failed_starts} pools of {self.world} did not start")
            self._failed_starts += 1
            self._pool = Pool(self.world, self._setup)
            self._failed_starts = 0
        return self._pool.run(function, **options)

    def close(self) -> list[int | None]:
        """Exit codes of the workers, if any ran."""
        pool, self._pool = self._pool, None
        return [] if pool is None else pool.close()
