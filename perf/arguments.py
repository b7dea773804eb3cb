"""Command-line pieces shared by the commands: a parser whose errors are one line, and the types of
option values.

Every message about a bad value names the option and the value and offers the nearest valid choices.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn

MAX_TOKENS = 1 << 20


def nearest(value: str, choices: Iterable[object]) -> str:
    """What to offer instead of `value`: similar names or the closest numbers, else all choices."""
    names = [str(choice) for choice in choices]
    if value.lstrip("-").isdigit() and all(name.isdigit() for name in names):
        near = sorted(names, key=lambda name: abs(int(name) - int(value)))[:2]
    else:
        near = difflib.get_close_matches(value.lower(), names, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names)}"


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, exit status 2, and suggestions for unknown options."""

    def __init__(self, *args, **kwargs):
        self.option_names: list[str] = []
        self.commands = None
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def add_argument(self, *args, **kwargs):
        action = super().add_argument(*args, **kwargs)
        self.option_names.extend(name for name in action.option_strings if name.startswith("--"))
        return action

    def add_subparsers(self, **kwargs):
        self.commands = super().add_subparsers(**kwargs)
        return self.commands

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = self.commands.choices[parsed.command] if self.commands else self
            option = unknown[0].split("=")[0]
            command.error(f"unknown argument {option}; {nearest(option, command.option_names)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def option(text: str | Callable[[type], str], *flags: str, default: object = None, **how) -> Any:
    """A field of a command's options that its command line has, by default as `--name`; a flag
    without dashes is an argument. text: its help, or what makes it of the class of options. how:
    for argparse. A field that is none, as where a subclass declares it anew, keeps its default.
    """
    return field(default=default, metadata={"text": text, "flags": flags, "how": how})


def switches(texts: dict[str, str]) -> Any:
    """A field that holds the name of the switch that was given, `--name`, of {name: help}."""
    return field(default=None, metadata={"switches": texts})


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """The options that `kind` declares; help ends in the default, unless it says so itself."""
    for one in fields(kind):
        for name, text in one.metadata.get("switches", {}).items():
            parser.add_argument(
                f"--{name}", dest=one.name, action="store_const", const=name, help=text
            )
        if "text" not in one.metadata:
            continue
        text, flags, how = (one.metadata[name] for name in ("text", "flags", "how"))
        flags = flags or (f"--{one.name.replace('_', '-')}",)
        shown = ",".join(one.default) if isinstance(one.default, tuple) else one.default
        text = text if isinstance(text, str) else text(kind)
        silent = shown is None or shown is False or shown == "" or "default: " in text
        text += "" if silent else f" (default: {shown})"
        parser.add_argument(*flags, default=one.default, help=text, **how)


def read_options(kind: type, args: argparse.Namespace) -> Any:
    """`kind` with what the command line says."""
    declared = [one.name for one in fields(kind) if one.metadata]
    return kind(**{name: getattr(args, name) for name in declared})


def check_writable(
    option: str, path: str | Path, parents: bool = False, directory: bool = False
) -> None:
    """ValueError, naming the option, unless a file can be written there, or files into it if it is
    a `directory`. With `parents` directories that do not exist will be made.
    """
    place = full = Path(path).absolute()
    if not directory and not place.exists():
        place = place.parent
    while parents and not place.exists():
        place = place.parent
    problem = ""
    if directory or place != full:
        problem = "" if place.is_dir() else f"{place} is no directory"
    elif place.is_dir():
        problem = "it is a directory"
    if not problem and not os.access(place, os.W_OK):
        problem = f"no permission to write {place}"
    if problem:
        raise ValueError(f"{option} {path} cannot be written: {problem}")


def check_no_results(option: str, path: str | Path, read: Iterable[str | Path] = ()) -> None:
    """ValueError, naming the option, if what is written there would replace result rows: a CSV
    file, or one of the files to `read`.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv" or path.resolve() in {Path(one).resolve() for one in read}:
        raise ValueError(f"{option} {path} would overwrite results: name another file")


def path_name(text: str) -> str:
    """Option type: a path. An empty one is a variable of the shell that nobody set."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no path")
    return text


def one_of(choices: Collection[str]) -> Callable[[str], str]:
    """Option type: one of these names."""

    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not valid; {nearest(text, choices)}")
        return text

    return parse


def names(choices: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Option type: a comma-separated list of these names, in which `-` may stand for `_`; without
    repeats.
    """
    name = one_of(choices)

    def parse(text: str) -> tuple[str, ...]:
        return tuple(
            dict.fromkeys(name(part.strip().replace("-", "_")) for part in text.split(","))
        )

    return parse


def checked(function: Callable[[str], object]) -> Callable[[str], object]:
    """Option type: what `function` makes of the text; its ValueError is the message."""

    def parse(text: str) -> object:
        try:
            return function(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def integer(
    low: int = 1, high: int | None = None, choices: Iterable[int] | None = None
) -> Callable[[str], int]:
    """Option type: an integer in low..high, or one of `choices`."""
    allowed = None if choices is None else list(choices)

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if allowed is not None and value not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is not valid; {nearest(text, allowed)}")
        if value < low or (high is not None and value > high):
            bound = f">= {low}" if high is None else f"in {low}..{high}"
            raise argparse.ArgumentTypeError(f"{value} must be {bound}")
        return value

    return parse


def percent(text: str) -> float:
    """Option type: `3` or `3%` is 0.03; in 0..1000."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of percent") from None
    if not 0 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text} must be in 0..1000 percent")
    return value / 100


def token_counts(text: str) -> list[int]:
    """Option type: `1,8,64`, or `1:4096` (doubling, both ends included), or a mix of both."""
    number = integer(1, MAX_TOKENS)
    counts: list[int] = []
    for part in text.split(","):
        first, colon, last = part.partition(":")
        begin = number(first)
        end = number(last) if colon else begin
        if end < begin:
            raise argparse.ArgumentTypeError(f"{part!r} counts down; did you mean {end}:{begin}?")
        while begin < end:
            counts.append(begin)
            begin *= 2
        counts.append(end)
    return list(dict.fromkeys(counts))
