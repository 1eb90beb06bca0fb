"""What all command lines share: parsing with hints, errors in one line, an orderly end on Ctrl-C, models' options."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from common.checks import near_miss
from common.errors import UserError
from common.files import parse_yaml
from common.settings import PRESETS, SettingsFiles, method_name
from common.starting import EXIT_INTERRUPTED

EXIT_USER_ERROR = 2


class Interrupted(Exception):
    """Ctrl-C during a run; the message says what is complete and where."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s and name the nearest option.

    Args:
        prog: the command as it is typed.
        description, epilog: shown before and after the options, line by line as they are.
        **options: of `argparse.ArgumentParser`.
    """

    def __init__(self, prog: str, description: str = "", epilog: str = "", **options: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    @classmethod
    def of_module(cls, name: str, doc: str) -> Parser:
        """The parser of `python -m <name>`, whose docstring is what the command says of itself, examples included."""
        return cls(f"python -m {name}", doc.strip())

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        """Parse all of `args`.

        Raises:
            UserError: an option is unknown, lacks its value or has one of the wrong kind.
        """
        arguments = list(sys.argv[1:] if args is None else args)
        known = self._long_options()
        for word in (argument.split("=")[0] for argument in arguments if " " not in argument):
            # First of all: a mistyped option would else be told as the lack of the one that was meant.
            if word.startswith("--") and word not in known:
                raise UserError(f"unknown option {word!r}; {near_miss(word, known)}")
        parsed, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            if unknown[0].startswith("-"):
                raise UserError(f"unknown option {unknown[0]!r}; see {self.prog} --help")
            raise UserError(
                f"{unknown[0]!r} belongs to no option; put values with spaces in quotes, see {self.prog} --help"
            )
        return parsed

    def _long_options(self) -> list[str]:
        """All of them, subcommands' included."""
        found = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [option for parser in action.choices.values() for option in parser._long_options()]
        return list(dict.fromkeys(found))


class OptionGroups(NamedTuple):
    """Where a model adds options of its own."""

    what: argparse._ArgumentGroup
    how: argparse._ArgumentGroup


def add_run_options(parser: Parser, frames: str, model: str, without: str) -> OptionGroups:
    """Add what every model's command understands; options that are left out keep what the YAML file says.

    Args:
        parser: to add to.
        frames: which numbers of frames there can be.
        model: what `--model` takes.
        without: what `--no-compare` leaves out.
    """
    what = parser.add_argument_group("what to show")
    what.add_argument("--prompt", metavar="TEXT", help="what the video shows")
    what.add_argument("--image", metavar="FILE", help="picture that the video starts with")
    what.add_argument("--video", metavar="FILE", help="video to continue; --num-frames counts its overlap")
    what.add_argument("--num-frames", type=whole_number, metavar="N", help=f"frames of the whole video, {frames}")
    what.add_argument("--height", type=whole_number, metavar="N", help="pixels, a multiple of 16")
    what.add_argument("--width", type=whole_number, metavar="N", help="pixels, a multiple of 16")
    what.add_argument("--seed", type=whole_number, metavar="N", help="seed of the noise")
    how = parser.add_argument_group("how to make it")
    how.add_argument("--preset", metavar="NAME", help=f"one of {', '.join(PRESETS)} (default: slow)")
    how.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of all settings, see configs/, or a run's summary.json"
    )
    how.add_argument("--model", metavar="ID_OR_PATH", help=model)
    how.add_argument("--steps", type=whole_number, metavar="N", help="denoising steps")
    how.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other setting of the YAML file, such as cache.threshold=0.15 or compile=true; may be repeated",
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--output",
        type=folder,
        metavar="DIR",
        help="folder for results (outputs/<time>-<model>-<method>); those of an earlier run move to DIR/earlier-<n>",
    )
    where.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    where.add_argument("--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16")
    where.add_argument("--offload", metavar="HOW", help="none, model or group")
    where.add_argument("--no-compare", action="store_true", help=f"only the method: {without}")
    return OptionGroups(what, how)


def generate_command(
    parser: Parser, files: SettingsFiles, load_job: Callable[[], type], argv: Sequence[str] | None
) -> int:
    """Run a command that generates a video, and return its exit code.

    Args:
        parser: with the options of `add_run_options`, and others that are named as the settings they change.
        files: where the settings come from.
        load_job: imports the model's `Job`, late: a mistyped option is answered without waiting for its libraries.
        argv: the command line; None takes that of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def main() -> None:
        args = parser.parse_args(arguments)
        options = _options(args, files)
        settings, config = files.load(args.config, args.preset, args.model, options)
        method = method_name(settings, config, args.preset, options)
        command = shlex.join([*parser.prog.split(), *arguments])
        load_job()(settings, method, config, args.output, command, compare=not args.no_compare).run()

    return run_command(main)


def _options(args: argparse.Namespace, files: SettingsFiles) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(files.settings)} - {"model"}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    return {**given, **dict(parse_assignment(text) for text in args.set)}


def folder(text: str) -> Path:
    """An option's value as a folder. An empty one, of an unset variable of the shell, is not taken for this folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} names no folder; give one, or . for this one")
    return Path(text)


def whole_number(text: str) -> int:
    """An option's value as a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def count(text: str) -> int:
    """An option's value as a whole number of at least 1."""
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is outside its range; allowed: at least 1")
    return value


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
        return key.strip(), parse_yaml(value)
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
