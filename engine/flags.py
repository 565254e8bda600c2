"""Command-line flags made from the fields of a config dataclass: help texts, ranges, refusals in one line."""

import argparse
import difflib
import math
import sys
import types
import typing
from dataclasses import field, fields
from typing import Literal

import torch

from readers.dataset import DataError


class ConfigError(DataError):
    """An error of flags that contradict each other, or of a checkpoint that does not fit the flags."""


def in_one_line(error: Exception) -> str:
    """Return the message of an error for the user; an error of the operating system becomes "file: reason"."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    return str(error)


def option(default, help: str, low: float | None = None, high: float | None = None):
    """Declare a config field with its default, its help text and its allowed range [low, high]."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def flag_of(name: str) -> str:
    """Return the flag of a config field: --batch-size for batch_size."""
    return "--" + name.replace("_", "-")


def replace_unencodable() -> None:
    """Print a question mark for each letter that the terminal, or a file in place of it, cannot encode."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, and suggests the flag that was probably meant."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        replace_unencodable()  # here, since every command line has a parser

    def error(self, message: str):
        """Print the error in one line and exit with status 2."""
        if message.startswith("unrecognized arguments: "):
            flag = message.split()[2].split("=")[0]
            similar_flags = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            advice = f"did you mean {similar_flags[0]}?" if similar_flags else "see --help"
            message = f"unknown flag {flag}; {advice}"
        self.exit(2, f"{self.prog}: {message}\n")


def add_flags(parser: argparse.ArgumentParser, config_class: type, overrides: dict[str, dict]) -> None:
    """Add a flag for each field of a config dataclass that has a help text. A flag that is not given sets nothing.

    parser: gets the flags
    config_class: its fields are declared by `option`
    overrides: name of a preset or recipe -> the defaults that it changes; for the help texts alone
    """
    type_hints = typing.get_type_hints(config_class)
    for spec in fields(config_class):
        if "help" not in spec.metadata:
            continue
        defaults = []
        if spec.default not in (None, ()):
            defaults.append(str(spec.default))
        for name, changed in overrides.items():
            if spec.name in changed:
                defaults.append(f"{name} {changed[spec.name]}")
        help_text = spec.metadata["help"]
        if defaults:
            help_text += f" (default {', '.join(defaults)})"
        settings = _argument_settings(type_hints[spec.name])
        parser.add_argument(flag_of(spec.name), default=argparse.SUPPRESS, help=help_text, **settings)


def _argument_settings(hint: type) -> dict:
    """Return the settings of `add_argument` for a field of this type."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # T | None
        hint = typing.get_args(hint)[0]
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is tuple:
        return {"nargs": "+", "metavar": "FILE"}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    return {"type": hint, "metavar": hint.__name__}


def check_ranges(config) -> None:
    """Check that every field of a config dataclass lies in its range.

    Raises ConfigError where a field is outside the range that `option` declares, or is NaN or infinite.
    """
    for spec in fields(config):
        value = getattr(config, spec.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag_of(spec.name)} {value}: must be a finite number")
        low, high = spec.metadata.get("low"), spec.metadata.get("high")
        if value is None or low is None:
            continue
        if high is None and value < low:
            raise ConfigError(f"{flag_of(spec.name)} {value}: must be at least {low}")
        if high is not None and not low <= value <= high:
            raise ConfigError(f"{flag_of(spec.name)} {value}: must be between {low} and {high}")


def check_flag_applies(kind: str, selected: str, given: set[str], applicable: dict[str, tuple[str, ...]]) -> None:
    """Check that no given flag is for other recipes or tasks only.

    kind: "recipe" or "task"
    selected: the recipe or task of this run
    given: names of the fields whose flags were given
    applicable: recipe or task -> names of the fields that it and only some others use
    Raises ConfigError where a given flag has no effect on this recipe or task.
    """
    for name in sorted(given):
        users = [user for user, names in applicable.items() if name in names]
        if users and selected not in users:
            raise ConfigError(f"{flag_of(name)} is for --{kind} {' or '.join(users)}, not for {selected}; drop it")


def check_device(name: str) -> None:
    """Check that this machine has a device.

    Raises ConfigError where it does not.
    """
    devices = {"cpu"} | {f"cuda:{number}" for number in range(torch.cuda.device_count())}
    if torch.cuda.is_available():
        devices.add("cuda")
    if torch.backends.mps.is_available():
        devices.add("mps")
    if name not in devices:
        raise ConfigError(f"--device {name}: not on this machine; choose {' or '.join(sorted(devices))}")
