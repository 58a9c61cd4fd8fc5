"""What no option of any command may be, refused in one place before the command begins."""

import math
import re
from collections.abc import Container, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from toolchain.cli.options import MAX_SEED
from toolchain.errors import SenteiError
from toolchain.ranks.launch import several

# The commands that several processes can share, which torchrun or the like has started.
_IN_SEVERAL_RANKS = ("prune", "heal")
_EMPTY_VALUE = re.compile(r"--[a-z-]+=")


class CheckedCommand(TyperCommand):
    """A command without empty arguments, undecodable text and numbers that nothing can be computed with."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Checks the words as they were given, and the numbers that they became.

        Raises:
            SenteiError: One of them can mean nothing.
        """
        # What follows -- on the line of sentei serve is another program's.
        own = args[: args.index("--")] if ctx.allow_extra_args and "--" in args else args
        _check_words(own, {name for each in self.params if not getattr(each, "is_flag", True) for name in each.opts})
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            given = ctx.params.get(parameter.name or "")
            for value in given if isinstance(given, list | tuple) else [given]:
                _check_value(_shown(parameter), value)
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Joins the other processes of the job first, if a launcher has started several.

        Raises:
            SenteiError: The command works in one process, or the others cannot be reached.
        """
        if several():
            # Below the root command alone: sentei plan has commands of its own.
            if ctx.info_name not in _IN_SEVERAL_RANKS or ctx.parent.parent is not None:
                raise SenteiError(
                    f"sentei {ctx.info_name} works in one process, and several were started (WORLD_SIZE is set).",
                    f"Start it without torchrun; sentei {' and '.join(_IN_SEVERAL_RANKS)} can use several.",
                )
            from toolchain.ranks.joining import join

            join()
        return super().invoke(ctx)


class CheckedTyper(typer.Typer):
    """A Typer app whose commands are :class:`CheckedCommand`."""

    def command(self, name: str | None = None, **settings: Any) -> Any:
        """See :meth:`typer.Typer.command`."""
        return super().command(name, **{"cls": CheckedCommand, **settings})


def _check_words(words: Sequence[str], with_value: Container[str]) -> None:
    """An empty word is most often an unset variable, and as a path it would mean the working directory."""
    for before, word in pairwise(["", *words]):
        if not word or _EMPTY_VALUE.fullmatch(word):
            raise _empty(word[:-1] or (before if before in with_value else "An argument"))
        try:
            word.encode("utf-8")
        except UnicodeEncodeError as error:
            shown = word.encode("utf-8", "backslashreplace").decode()
            raise SenteiError(
                f"'{shown}' is not UTF-8 text.", "Type it in UTF-8; a file of such a name has to be renamed."
            ) from error


def _check_value(name: str, value: object) -> None:
    if isinstance(value, Path) and not str(value).strip():
        raise _empty(name)
    if isinstance(value, float) and not math.isfinite(value):
        raise SenteiError(f"{name} {value} is not a finite number.", "Give a number such as 0.5.")
    if isinstance(value, int) and abs(value) > MAX_SEED:
        raise SenteiError(f"{name} {value} is out of range.", f"The most that sentei takes is {MAX_SEED}.")


def _empty(name: str) -> SenteiError:
    return SenteiError(f"{name} is empty.", "Give a value; perhaps a variable of your shell is not set.")


def _shown(parameter: Any) -> str:
    """An option as it is written, or an argument's name."""
    return max(parameter.opts, key=len) if parameter.param_type_name == "option" else str(parameter.metavar)


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option, by its parameter's name, stands on the command line."""
    source = context.get_parameter_source(name)
    # By name: Typer brings a click of its own, whose enumeration is not that of click.
    return source is not None and source.name == "COMMANDLINE"


def first_given(context: typer.Context, *names: str) -> str | None:
    """The first of these parameters that stands on the command line, as people write it."""
    return next((f"--{name.replace('_', '-')}" for name in names if is_given(context, name)), None)
