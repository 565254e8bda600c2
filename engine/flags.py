"""Flags out of the fields of a config dataclass: help, ranges, one-line refusals."""

import argparse
import difflib
import math
import types
import typing
from dataclasses import field, fields
from typing import Literal

import torch

from readers.dataset import DataError


class ConfigError(DataError):
    """Flags that do not fit together, or a checkpoint that does not fit the flags."""


def in_one_line(error: Exception) -> str:
    """What an error says to the user; of the system's own, which file it is about and what is wrong."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    return str(error)


def option(default, help: str, low: float | None = None, high: float | None = None):
    """A config field with what the command line needs: help and the allowed range."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


class OneLineParser(argparse.ArgumentParser):
    """Refuses with one line instead of a page of usage, and suggests the flag that was meant."""

    def error(self, message: str):
        """Print one line and exit with status 2."""
        if message.startswith("unrecognized arguments: "):
            flag = message.split()[2].split("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            message = f"unknown flag {flag}; " + (f"did you mean {close[0]}?" if close else "see --help")
        self.exit(2, f"{self.prog}: {message}\n")


def add_flags(parser: argparse.ArgumentParser, config_class: type, layers: dict[str, dict]) -> None:
    """Add one flag for each field of a config dataclass; a flag that is not given leaves no trace.

    layers: what overrides the defaults under which name, for --help alone"""
    hints = typing.get_type_hints(config_class)
    for spec in fields(config_class):
        if "help" not in spec.metadata:
            continue
        kind = hints[spec.name]
        if typing.get_origin(kind) in (types.UnionType, typing.Union):  # T | None
            kind = typing.get_args(kind)[0]
        if kind is bool:
            settings = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is tuple:
            settings = {"nargs": "+", "metavar": "FILE"}
        elif typing.get_origin(kind) is Literal:
            settings = {"choices": typing.get_args(kind)}
        else:
            settings = {"type": kind, "metavar": kind.__name__}
        defaults = [] if spec.default in (None, ()) else [str(spec.default)]
        defaults += [f"{name} {layer[spec.name]}" for name, layer in layers.items() if spec.name in layer]
        text = spec.metadata["help"] + (f" (default {', '.join(defaults)})" if defaults else "")
        parser.add_argument(flag_of(spec.name), default=argparse.SUPPRESS, help=text, **settings)


def check_ranges(config) -> None:
    """Raise ConfigError for a field of a config dataclass outside the range that its metadata gives."""
    for spec in fields(config):
        value = getattr(config, spec.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{flag_of(spec.name)} {value}: must be a finite number")
        low, high = spec.metadata.get("low"), spec.metadata.get("high")
        if value is not None and low is not None and not low <= value <= (high or math.inf):
            limits = f"between {low} and {high}" if high else f"at least {low}"
            raise ConfigError(f"{flag_of(spec.name)} {value}: must be {limits}")


def check_readers(kind: str, mine: str, given: set[str], flags: dict[str, tuple[str, ...]]) -> None:
    """Raise ConfigError for a given flag that others of this `kind` (recipe, task) read and `mine` does not.

    flags: who reads which fields that not all read"""
    for name in sorted(given):
        readers = [reader for reader, names in flags.items() if name in names]
        if readers and mine not in readers:
            raise ConfigError(f"{flag_of(name)} is for --{kind} {' or '.join(readers)}, not for {mine}")


def check_device(name: str) -> None:
    """Raise ConfigError for a device that is not there."""
    there = {"cpu"} | {f"cuda:{number}" for number in range(torch.cuda.device_count())}
    there |= {"cuda"} if torch.cuda.is_available() else set()
    there |= {"mps"} if torch.backends.mps.is_available() else set()
    if name not in there:
        raise ConfigError(f"--device {name}: not on this machine, which has {', '.join(sorted(there))}")
