"""The command `torchfilm`: its commands, their help, and how errors end.

Exit codes: 0; 2 with one line on stderr for whatever the user can mend; 130 for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from torchfilm.extras import needed
from torchfilm.version import VERSION

COMMANDS = {
    "data": ("make_data", "MakeData", "Generate scenes and questions, or demonstrations of an arm."),
    "train": ("train", "Train", "Train a system."),
    "eval": ("evaluate", "Evaluate", "Measure a trained system; without a path, the shipped one."),
    "compare": ("compare", "Compare", "Train FiLM and the alternatives alike, and set them side by side."),
    "inspect": ("inspect", "Inspect", "Draw what is inside a trained system, with the numbers behind."),
    "ask": ("ask", "Ask", "Ask a picture a question."),
    "serve": ("serve", "Serve", "Serve a page: ask, and turn γ and β; or tell an arm what to do."),
}
"""Name -> module in `commands`, class, what it does."""

EXAMPLES = """\
  torchfilm data clevr data-clevr --split train --scenes 2000
  torchfilm train visual_reasoning --recipe laptop --data data-clevr --out runs/first --minutes 15
  torchfilm eval visual_reasoning runs/first
  torchfilm ask data-clevr/images/train/CLEVR_train_000000.png "How many red cubes are left of the sphere?"
  torchfilm serve"""


@runtime_checkable
class Command(Protocol):
    """What each file in `commands` offers."""

    def __call__(self) -> None:
        """Do it."""
        ...


class UsageError(ValueError):
    """A command line that cannot be understood."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # γ and β on a terminal that has no such letters
            stream.reconfigure(errors="replace")
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        if command is not None:
            command()
    except KeyboardInterrupt:
        _complain("stopped")
        return 130
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_nan_in_training(error):
            raise
        _complain(_text(error))
        return 2
    return 0


def parse(arguments: Sequence[str]) -> Command | None:
    """The command that a command line asks for, with its options; None where it asked for help, now given."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return None
    if name == "--version":
        print(VERSION)
        return None
    check_known("command", name, COMMANDS)
    module, class_name, _ = COMMANDS[name]
    with needed("the command needs more packages", "systems,robots,serve"):
        import tyro

        found: Any = getattr(importlib.import_module(f"torchfilm.app.commands.{module}"), class_name)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                found,
                prog=f"torchfilm {name}",
                description=_paragraphs(found.__doc__),
                args=list(rest),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as end:
        if not end.code:
            return None
        raise UsageError(f"{_unboxed(complaint.getvalue())} Help: torchfilm {name} --help") from None


def check_known(kind: str, name: str, known: Iterable[str], *others: str) -> None:
    """Raise UsageError for a name that is not known, with the three of these and others closest to it."""
    known = list(known)
    if name not in known:
        nearest = difflib.get_close_matches(name, [*known, *others], n=3, cutoff=0.0)
        raise UsageError(f"unknown {kind} {name!r}; nearest: {', '.join(nearest)}")


def _help() -> str:
    lines = "\n".join(f"  {name:<9}{what}" for name, (_, _, what) in COMMANDS.items())
    return (
        "usage: torchfilm COMMAND ...\n\n"
        "Networks that listen: FiLM, and the systems built with it.\n\n"
        f"{lines}\n\n"
        f"Each command explains itself: torchfilm COMMAND --help. Examples:\n{EXAMPLES}"
    )


def _paragraphs(text: str) -> str:
    """A docstring as it is to be shown: lines joined, paragraphs kept."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _unboxed(text: str) -> str:
    """The parser's message on one line, without its frame, title and pointer to the help."""
    lines = [line.strip("│ ") for line in text.splitlines() if line.strip() and line[0] not in "╭╰"]
    rules = [i for i, line in enumerate(lines) if re.fullmatch("─+|-+", line)]
    first = 2 if rules and rules[0] == 1 and "╭" not in text else 0  # no frame: a title and a rule
    last = next((i for i in rules if i >= first), len(lines))
    message = " ".join(" ".join(lines[first:last]).split())
    message = re.sub(
        r": .*invalid literal for int\(\) with base 10: ", ": expected a whole number, got ", message
    )
    message = re.sub(r": .*could not convert string to float: ", ": expected a number, got ", message)
    return message if message.endswith(".") else f"{message}."


def _text(error: Exception) -> str:
    """An error on one line: what its lines list is divided by semicolons, and a sentence behind by a stop."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    text = re.sub(r"(?<=[^\s.,:;])\n(?=\s)", "; ", text)
    text = re.sub(r"(?<=[^\s.,:;])\n(?=[A-Z])", ". ", text)
    return " ".join(text.split())


def _is_nan_in_training(error: RuntimeError) -> bool:
    from torchfilm.training import NonFiniteError

    return isinstance(error, NonFiniteError)


def _complain(text: str) -> None:
    print(f"torchfilm: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
