"""The files of a kernel on disk: what describes them, who may have written them, how they appear.

A kernel is a library `{name}.so` beside a description `{name}.json`, which holds the size and the
SHA-256 of each file of the kernel. Owns both, and the errors of whatever keeps a kernel from being
loaded. Invariants:

- Only bytes that the description names are loaded. (Code from a truncated library ends the process
  with a bus error, not with an exception.)
- A library is code: only what no other user can have written is loaded, as ssh does with its keys.
- Files appear whole, and writable by their owner alone, or not at all.

Neighbours: `compile` builds, finds and loads kernels; imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import hashlib
import json
import os
import pwd
import shlex
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

CACHE_VARIABLE = "MEGAMOE_CACHE_DIR"
TRUST_VARIABLE = "MEGAMOE_TRUST_KERNELS"
#: What building a kernel may write, many times over: an object file and a library, each of 0.2 MB
#: for the largest kernels (2026-11-27).
ROOM_BYTES = 4 << 20
#: A full disk, a quota and a limit on file sizes.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class KernelError(RuntimeError):
    """No kernel can be had for a configuration."""


class KernelNotFound(KernelError):
    """No built kernel for this configuration, and none can be built here."""


class KernelFileError(KernelError):
    """Files of a kernel, or the place where they are kept, cannot be used."""


class DamagedKernel(KernelFileError):
    """Files of a kernel are incomplete, changed, or of another version."""


class UntrustedKernel(KernelFileError):
    """Another user can have written files of a kernel."""


class KernelDirectoryError(OSError, KernelFileError):
    """A directory for kernels cannot be created, read or written, or has no room."""


def _directory_error(error: OSError, what: str) -> KernelDirectoryError:
    """`what` failed with `error`; says the way out."""
    return KernelDirectoryError(
        error.errno,
        f"{what}: {error.strerror}; choose another place ({CACHE_VARIABLE} for the cache of "
        "kernels, TMPDIR for temporary files)",
    )


def exists(path: Path) -> bool:
    """True if something has this name, in whatever state; KernelDirectoryError if it is hidden."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _directory_error(error, f"{path.parent} cannot be searched for kernels") from error
    return True


# --- Damage ---------------------------------------------------------------------------------------


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _described(path: Path) -> dict:
    """A description that holds what every description does; DamagedKernel otherwise."""
    try:
        description = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedKernel(f"{path} is no description of a kernel: {error}") from error
    wanted = {"files": dict, "entry": str, "arguments": list}
    for field, kind in wanted.items():
        if not isinstance(description, dict) or not isinstance(description.get(field), kind):
            raise DamagedKernel(f"{path} is no description of a kernel: it has no {field!r}")
    return description


def _check_digest(path: Path, description: dict) -> None:
    """Raise DamagedKernel unless the file is the one that was described."""
    facts = description["files"].get(path.name)
    if not isinstance(facts, dict) or not facts.keys() >= {"size", "sha256"}:
        raise DamagedKernel(f"{path} is not described beside it: its size and SHA-256 are missing")
    try:
        size = path.stat().st_size
        digest = _digest(path) if size == facts["size"] else None
    except OSError as error:
        raise DamagedKernel(f"{path} cannot be read: {error.strerror}") from error
    if size != facts["size"]:
        raise DamagedKernel(f"{path} is damaged: {size} bytes, not the {facts['size']} described")
    if digest != facts["sha256"]:
        raise DamagedKernel(f"{path} is damaged: its SHA-256 is not the one described")


def verified(
    directory: Path, name: str, suffix: str = ".so", *, trust: bool = False
) -> tuple[Path, dict]:
    """A file of a kernel, by a path without links to its directory, and the kernel's description.

    Raises DamagedKernel if either is missing or not what it was, and UntrustedKernel, unless
    `trust`, if another user can have written one.
    """
    directory = _resolved(directory)
    path, beside = directory / f"{name}{suffix}", directory / f"{name}.json"
    if not trust:
        check_trusted(directory, [_resolved(path), _resolved(beside)])
    else:
        _resolved(path)
    description = _described(beside)
    _check_digest(path, description)
    return path, description


def _resolved(path: Path) -> Path:
    try:
        return Path(os.path.realpath(path, strict=True))
    except FileNotFoundError as error:
        raise DamagedKernel(f"{path} is missing") from error
    except OSError as error:
        raise DamagedKernel(f"{path} cannot be read: {error.strerror}") from error


# --- Trust ----------------------------------------------------------------------------------------


def check_trusted(directory: Path, files: Iterable[Path] = ()) -> None:
    """Raise UntrustedKernel if a user other than root and that of this process can write one of
    `files` or `directory` (all without links), or put another in its place.
    """
    inside = {directory, *files}
    above = {parent for place in inside for parent in place.parents} - inside
    found, ways = [], []
    trusted = {0, os.geteuid()}
    for place in sorted(inside | above):
        status = place.stat()
        quoted = shlex.quote(str(place))
        if status.st_uid not in trusted:
            found.append(f"{place} belongs to {_user(status.st_uid)}")
            ways.append(f"chown {os.geteuid()} {quoted}")
        writers = _other_writers(status, trusted)
        sticky = status.st_mode & stat.S_ISVTX  # only the owner of a name there replaces it
        if writers and not (sticky and place in above):
            found.append(f"{place} (mode {stat.S_IMODE(status.st_mode):04o}) is open to {writers}")
            ways.append(f"a directory of your own in {place}" if sticky else f"chmod go-w {quoted}")
    if found:
        raise UntrustedKernel(
            f"kernels of {directory} are not loaded, because other users can write them: "
            f"{'; '.join(found)}. Way out: {'; '.join(ways)}; or {TRUST_VARIABLE}=1 in the "
            "environment to trust those users with your account"
        )


def _user(uid: int) -> str:
    with contextlib.suppress(KeyError):
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    return f"uid {uid}"


def _other_writers(status: os.stat_result, trusted: set[int]) -> str | None:
    """Who may write, besides the owner: everybody, a group, or None."""
    if status.st_mode & stat.S_IWOTH:
        return "everybody"
    if not status.st_mode & stat.S_IWGRP:
        return None
    try:
        group = grp.getgrgid(status.st_gid)
    except KeyError:
        return f"group {status.st_gid}"
    # A user's private group, as where umask is 002: it has the user's name and no other member.
    names = set()
    for uid in trusted:
        with contextlib.suppress(KeyError):
            names.add(pwd.getpwuid(uid).pw_name)
    private = (
        group.gr_name in names
        and names.issuperset(group.gr_mem)
        and all(a.pw_uid in trusted for a in pwd.getpwall() if a.pw_gid == group.gr_gid)
    )
    return None if private else f"group {group.gr_name}"


# --- Writing --------------------------------------------------------------------------------------


def make_directory(directory: Path, mode: int = 0o700) -> None:
    """Create a directory and the parents that it lacks; KernelDirectoryError if that fails."""
    try:
        for place in reversed((directory, *directory.parents)):
            if not place.is_dir():
                with contextlib.suppress(FileExistsError):
                    place.mkdir(mode)
        if not directory.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        raise _directory_error(error, f"{directory} cannot be a directory for kernels") from error


def check_room(directory: Path) -> None:
    """Raise KernelDirectoryError unless a kernel can be written to `directory` and, by the
    compiler, to the directory of temporary files. LLVM ends the process where it cannot.
    """
    for place in (directory, None):
        try:
            place = place or Path(tempfile.gettempdir())
            with tempfile.TemporaryFile(dir=place) as probe:
                probe.write(bytes(ROOM_BYTES))
        except OSError as error:
            full = error.errno in NO_ROOM
            what = f"no room in {place}" if full else f"{place} cannot be written"
            raise _directory_error(error, f"{what} to build a kernel") from error


def _no_room(error: BaseException | None) -> OSError | None:
    """What says in a chain of exceptions that there is no room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def scratch_in(directory: Path) -> Iterator[Path]:
    """A directory for a build in `directory`, gone afterwards.

    A build that fails for want of room raises KernelDirectoryError, whatever the tool that met it
    says; other failures stay as they are.
    """
    make_directory(directory, 0o755)
    check_room(directory)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".build-") as scratch:
        try:
            yield Path(scratch)
        except Exception as failure:
            if isinstance(failure, KernelDirectoryError):
                raise
            check_room(directory)  # a linker says it only in the words of its language
            if reason := _no_room(failure):
                what = f"no room in {directory} to build a kernel"
                raise _directory_error(reason, what) from failure
            raise


def install(
    scratch: Path, directory: Path, name: str, facts: dict, suffixes: Iterable[str] = (".so",)
) -> None:
    """Describe the files `{name}{suffix}` of `scratch`, by `facts` too, and move them to
    `directory`. The library comes last: a kernel whose library is there is complete.
    """
    paths = [scratch / f"{name}{suffix}" for suffix in suffixes]
    files = {path.name: {"size": path.stat().st_size, "sha256": _digest(path)} for path in paths}
    description = scratch / f"{name}.json"
    description.write_text(json.dumps({"files": files} | facts, indent=1))
    for path in (description, *reversed(paths)):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~OTHERS_WRITE)
        os.replace(path, directory / path.name)
