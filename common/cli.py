"""What both models' command lines share: parsing with hints, errors in one line, an orderly end on Ctrl-C."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import yaml

from common.checks import near_miss
from common.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class Interrupted(Exception):
    """Ctrl-C during a run; the message says what is complete and where."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s and name the nearest option."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            usage=f"{prog} [options]",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        """Parse all of `args`.

        Raises:
            UserError: an option is unknown, lacks its value or has one of the wrong kind.
        """
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            if not word.startswith("-"):
                raise UserError(
                    f"{word!r} belongs to no option; put values with spaces in quotes, see {self.prog} --help"
                )
            options = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
            raise UserError(f"unknown option {word!r}; {near_miss(word, options)}")
        return parsed


def whole_number(text: str) -> int:
    """An option's value as a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    """An option's value as a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def parse_assignment(text: str) -> tuple[str, object]:
    """`key=value` of a `--set` option, the value read as YAML: `cache.threshold=0.15` -> `("cache.threshold", 0.15)`.

    Raises:
        UserError: there is no `=`, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text!r} is not of the form KEY=VALUE, as in --set cache.threshold=0.15")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text!r}: the value is not valid YAML; put text with ':' or '[' in quotes") from error


def run_command(main: Callable[[], None]) -> int:
    """Run a command and turn how it ended into an exit code: 0, 2 for bad input, 130 for Ctrl-C."""
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return EXIT_USER_ERROR
    except Interrupted as error:
        sys.stderr.write(f"\ninterrupted: {error}\n")
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted: nothing was written\n")
        return EXIT_INTERRUPTED
    return 0
