"""What the commands share: one-line errors, types of arguments, and `--set name=value`, which reaches every number of
a config.

A command's numbers are one frozen dataclass, nested; a field's path is its names with dots between them,
`field.levels`. On the command line the last names are enough where they are unique: `--set levels=8`. Values are
checked against the field's type, and against each other by the dataclasses themselves (`__post_init__`).
"""
from __future__ import annotations

import argparse
import difflib
import math
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import get_args, get_origin, get_type_hints

import torch

from common.machine import spare_the_cpu
from common.processes import Interrupted, is_first, stoppable


# ---------------------------------------------------------------------------------------------- errors

OUT_OF_MEMORY = re.compile("can't allocate|not enough memory|out of memory|[Ss]torage size calculation overflowed")

LONGEST = 600  # characters of an error


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, exit code 2. What it returns says under `given` which flags stood
    there.
    """

    def __init__(self, doc: str = "", meant: Callable[[str], str] | None = None, **options):
        """doc: the docstring of a command; --help begins with its first line and ends with its examples, which are its
        indented lines.

        meant: what to do instead, in a few words, where a word stands there that is no flag's.
        """
        # The examples are to be copied, so they keep their lines.
        examples = "".join(f"\n  {line.strip()}" for line in doc.splitlines() if line.startswith("    "))
        super().__init__(description=doc.partition("\n")[0], epilog=examples and f"examples:{examples}",
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.meant = meant

    def parse_args(self, args: list[str] | None = None, namespace=None) -> argparse.Namespace:
        """The values of all flags."""
        words = sys.argv[1:] if args is None else args
        for flag, word in zip(["", *words], words):
            name, equals, value = word.partition("=")
            if not word.strip() or name.startswith("--") and equals and not value.strip():
                self.error(f"{word.strip() or flag or 'an argument'}: an empty value")
        parsed, stray = self.parse_known_args(words, namespace)
        if stray:
            advice = f"; {self.meant(stray[0])}" if self.meant and not stray[0].startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(stray)}{advice}")
        parsed.given = {word.partition("=")[0] for word in words if word.startswith("--")}
        return parsed

    def error(self, message: str):
        """Without the usage, which --help prints. Of several processes one says it."""
        if not is_first():
            sys.exit(2)
        _end_with(message)


def run(command: Callable, args: argparse.Namespace) -> None:
    """Call a command. Bad input ends in one line and exit code 2; Ctrl-C and SIGTERM in one that says what is saved,
    and 130 or 143.
    """
    spare_the_cpu()

    # A log shows every line at once, and any name in it.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")

    try:
        with stoppable():
            command(args)
    except (OSError, ValueError, FloatingPointError) as e:
        _end_with(str(e))
    except (MemoryError, RuntimeError) as e:
        # Torch has no exception of its own for the memory of a CPU.
        if isinstance(e, RuntimeError) and not OUT_OF_MEMORY.search(str(e)):
            raise
        _end_with(f"not enough memory ({str(e)[:120]}); smaller pictures, fewer views or lower numbers need less")
    except Interrupted as e:
        number = e.args[0]
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        saved = "".join(f"; {note}" for note in getattr(e, "__notes__", []))
        if is_first():
            print(f"stopped by {name}{saved}; the same command resumes from what is saved", file=sys.stderr)
        sys.exit(128 + number)


def _end_with(error: str) -> None:
    """One line, and the exit code of bad input. Of a long one, such as of a value of 5000 digits, the middle is left
    out.
    """
    line = " ".join(error.split())
    line = line if len(line) <= LONGEST else f"{line[:LONGEST * 2 // 3]} ... {line[-LONGEST // 3:]}"
    print("error:", line.encode(errors="backslashreplace").decode(), file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------- types of arguments

def positive(text: str) -> float:
    """A number above 0, for argparse."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def whole_number(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """A whole number from `least` to `most`, for argparse."""
    def parse(text: str) -> int:
        """What stands behind a flag."""
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)
    return parse


count = whole_number(1)
views = whole_number(0)  # 0 for all
seed = whole_number(0)


def words(text: str) -> tuple[str, ...]:
    """Words with commas between them, for argparse."""
    # Spaces behind commas do not matter.
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not words with commas between them")
    return parts


def device(text: str) -> str:
    """cpu or cuda, for argparse."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} sees no NVIDIA GPU here; cpu is the default then")
    return text


def add_device(parser: argparse._ActionsContainer) -> None:
    """The flag --device."""
    parser.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
                        metavar="{cpu,cuda}", help="default: cuda if there is one")


# ---------------------------------------------------------------------------------------------- settings

BOOLS = {"true": True, "false": False, "1": True, "0": False}


def add_settings(parser: argparse._ActionsContainer, config: type) -> None:
    """The flag --set, for the fields of a config."""
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", dest="settings",
                        help=f"any field of {config.__name__}, nested ones by a dot: a.b=8")


def apply_settings(config, settings: list[str], fixed=None):
    """A frozen dataclass with settings such as "field.levels=8" applied, all at once.

    `fixed` is a config that a weights file brings along: its fields are named as such where a setting names
    one. Raises `ValueError` with one line for an unknown or ambiguous name, a value of another type, and values that
    do not fit together.
    """
    types = field_types(type(config))
    # What is meant: a path and a value of its type for each setting.
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: not of the form NAME=VALUE")
        path = _find(name, types, fixed)
        values[path] = _parse(path, text, types[path])

    # All at once, so that the dataclasses check the outcome and not the way to it.
    try:
        return _replaced(config, values)
    except (ArithmeticError, ValueError) as e:
        raise ValueError(f"--set {' '.join(settings)}: {e}") from None


def field_types(config: type, prefix: str = "") -> dict[str, type]:
    """Every number of a config class: dotted path -> type."""
    # Nested dataclasses are looked into, everything else is a number.
    types = {}
    for name, kind in get_type_hints(config).items():
        if is_dataclass(kind):
            types.update(field_types(kind, f"{prefix}{name}."))
        else:
            types[prefix + name] = kind
    return types


def _find(name: str, types: dict[str, type], fixed) -> str:
    """The path that a name stands for: itself, or the only one that ends in it."""
    # Known, by its whole path or by its end.
    if name in types:
        return name
    paths = [path for path in types if path.endswith(f".{name}")]
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise ValueError(f"--set {name}: stands in several places; say which: {', '.join(paths)}")

    # Unknown here: a number of the weights file's, or a slip of the pen.
    architecture = [] if fixed is None else field_types(type(fixed))
    if any(path == name or path.endswith(f".{name}") for path in architecture):
        raise ValueError(f"--set {name}: part of the architecture, which the weights file fixes")
    ends = [path.split(".")[-1] for path in types]
    near = difflib.get_close_matches(name.split(".")[-1], ends, 3, 0.5)
    near = [path for path in types if path.split(".")[-1] in near]
    suggestion = f"; near are {', '.join(near)}" if near else ""
    raise ValueError(f"--set {name}: no such field{suggestion}")


def _parse(path: str, text: str, kind):
    """A value of a field's type from text: true or false, a number, a word, or several with commas between them."""
    # As many as the type of a tuple says, or any number of them.
    if get_origin(kind) is tuple:
        parts = text.split(",")
        kinds = get_args(kind)
        if kinds[-1] is not Ellipsis and len(parts) != len(kinds):
            raise ValueError(f"--set {path}={text}: {len(kinds)} values with commas between them are needed")
        return tuple(_parse(path, part, kinds[0]) for part in parts)

    try:
        value = BOOLS[text.lower()] if kind is bool else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError("NaN and infinity pass comparisons that a config makes")
        return value
    except (KeyError, ValueError):
        words = {bool: "true or false", int: "a whole number", float: "a number"}
        raise ValueError(f"--set {path}={text}: {text!r} is not {words.get(kind, kind.__name__)}") from None


def _replaced(config, values: dict):
    """The config with values by path; nested dataclasses are rebuilt from the inside."""
    # A field is either a dataclass, some of whose numbers change, or a number.
    changes = {}
    for field in fields(config):
        old = getattr(config, field.name)
        inner = {path.partition(".")[2]: value for path, value in values.items() if path.startswith(f"{field.name}.")}
        if inner:
            changes[field.name] = _replaced(old, inner)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return replace(config, **changes)
