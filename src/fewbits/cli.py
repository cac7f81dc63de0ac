"""The command line: a thin reader of the commands' dataclasses."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console
from tyro.conf import AvoidSubcommands, FlagCreatePairsOff, OmitArgPrefixes, PositionalRequiredArgs, subcommand

from . import commands
from .deploy import ParityError
from .training import TrainingError

DESCRIPTION = "Low-bit vision networks, taught by the float network they came from: quantize, teach, ship."

ERRORS = (ValueError, TypeError, OSError, TrainingError, ParityError, ImportError, MemoryError)
"""What a user can cause: one clear line and exit code 1, no traceback. Wrong usage is exit code 2."""


def _command(config: Any, name: str, help_: str) -> Any:
    # These types are made at run time, from the table of commands, where a type checker cannot follow.
    annotated: Any = Annotated
    positional: Any = PositionalRequiredArgs
    command = annotated[config, subcommand(name=name, description=help_)]
    # A run folder is named as it is: fewbits export runs/x. What train and compare need are options with names.
    return command if issubclass(config, commands.Train) else positional[command]


def parse(arguments: Sequence[str] | None = None) -> Any:
    """Read the command line into the dataclass of its command.

    Raises:
        ValueError: a value that its dataclass refuses.
        SystemExit: wrong usage, which tyro explains; or help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                _commands(),
                args=list(arguments) if arguments is not None else None,
                prog="fewbits",
                description=DESCRIPTION,
                config=(OmitArgPrefixes, FlagCreatePairsOff, AvoidSubcommands),
            )
    except SystemExit as left:
        # tyro takes what a dataclass says of its fields for wrong usage, under names of its own.
        if (refused := _own_error(left)) is not None:
            raise refused from None
        sys.stderr.write(said.getvalue())
        raise


def _own_error(error: BaseException) -> ValueError | None:
    """The ValueError behind ``error`` that this package raised, if there is one."""
    cause = error.__context__
    while cause is not None:
        raised_in = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(cause.__traceback__)][-1]
        if isinstance(cause, ValueError) and raised_in.startswith(f"{__package__}."):
            return cause
        cause = cause.__context__
    return None


def _commands() -> Any:
    choices = [
        _command(config, name, (config.__doc__ or "").split("\n\n    Args:")[0])
        for name, (config, _) in commands.COMMANDS.items()
    ]
    union: Any = choices[0]
    for choice in choices[1:]:
        union = union | choice
    return union


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 with a message; wrong usage leaves with 2."""
    console = Console(stderr=True)
    config = None
    warnings.showwarning = lambda message, *rest, **more: console.print(f"warning: {message}", style="yellow")
    try:
        config = parse(arguments)
        run: Callable[[Any], Any] = next(f for c, f in commands.COMMANDS.values() if type(config) is c)
        run(config)
    except ERRORS as error:
        console.print(f"fewbits: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 1
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        message = "there is not enough memory for this batch; lower --batch-size, or keep it and raise --accumulate"
        console.print(f"fewbits: {message} ({str(error).splitlines()[0]})", style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        how = "" if isinstance(config, commands.Compare) else " and --resume"
        console.print(f"stopped; continue with the same command{how}", style="yellow")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
