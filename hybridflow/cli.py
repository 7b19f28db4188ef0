"""What the command lines share: errors as one line with exit status 2, and the run's options."""

import functools
import sys
from collections.abc import Callable

import tyro

from hybridflow.config import PRESETS, Config, validated
from hybridflow.errors import InputError

__all__ = ["command", "parse_config", "take_option"]


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Report an InputError of `main` as one line on standard error and exit with status 2."""

    @functools.wraps(main)
    def run() -> None:
        try:
            main()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return run


def take_option(args: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE` (the last one given), and the other arguments."""
    value, rest, arguments = None, [], iter(args)
    for argument in arguments:
        if argument == name:
            value = next(arguments, None)
            if value is None:
                raise InputError(f"{name}: got nothing, want a value")
        elif argument.startswith(name + "="):
            value = argument.removeprefix(name + "=")
        else:
            rest.append(argument)
    return value, rest


def preset(args: list[str]) -> tuple[Config, list[str]]:
    """The preset that --preset or --dataset names (digits without either), and the other arguments."""
    dataset, _ = take_option(args, "--dataset")
    name, args = take_option(args, "--preset")
    name = name or dataset or "digits"
    if name not in PRESETS:
        option = "--dataset" if name == dataset else "--preset"
        raise InputError(f"{option}: got {name!r}, want one of {', '.join(PRESETS)}")
    return PRESETS[name], args


def parse_config(defaults: Config, args: list[str], program: str, description: str) -> Config:
    """The defaults with what the arguments change, checked."""
    config = tyro.cli(Config, args=args, default=defaults, prog=program, description=description)
    return validated(config)
