"""The command line, `python -m perf <command> ...`.

A command is a module with SUMMARY, the dataclass `Options` (`arguments.option`) and `run(options)`,
which returns the exit status. It may have EPILOG, which ends its help.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from perf.arguments import Parser, add_options, nearest, read_options
from perf.commands import (
    ablation,
    accuracy,
    ceilings,
    compare,
    duel,
    engine,
    publish,
    report,
    router,
    sweep,
    trace,
    zeroing,
)
from perf.running.processes import ONE_LINE

#: By name. A new command is one more module.
COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        sweep,
        compare,
        duel,
        report,
        ceilings,
        accuracy,
        zeroing,
        ablation,
        trace,
        engine,
        router,
        publish,
    )
}


def parser() -> Parser:
    """The whole command line."""
    top = Parser(prog="python -m perf", description="Measure the MoE layer.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        texts = {"description": module.SUMMARY, "epilog": getattr(module, "EPILOG", None)}
        command = commands.add_parser(name, help=module.SUMMARY, **texts)
        add_options(command, module.Options)
        command.set_defaults(fail=command.error)
    return top


def options_of(argv: Sequence[str]) -> object:
    """The options of the command that `argv` names."""
    args = parser().parse_args(argv)
    return read_options(COMMANDS[args.command].Options, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status, 130 after an interrupt. Bad arguments and the rest of
    `processes.ONE_LINE`: one line on stderr, SystemExit(2).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    top = parser()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        top.error(f"{argv[0]!r} is not a command; {nearest(argv[0], COMMANDS)}")
    args = top.parse_args(argv)
    command = COMMANDS[args.command]
    try:
        return command.run(read_options(command.Options, args))
    except ONE_LINE as error:
        return args.fail(str(error))  # which ends the process
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
