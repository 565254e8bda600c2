"""Checkpoints, last.pt and best.pt: what is in them, how runs go on from them, how tasks start from them.

A file is written whole or not at all, so a kill at any moment leaves a whole checkpoint. It is read as data: no pickled
code is run, and damage is found by the archive's checksums.
"""

import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from engine.config import FREE_ON_RESUME, LoopConfig, TrainConfig
from engine.distributed import is_main_process
from engine.flags import ConfigError, flag_of
from engine.run import Run
from model import ModelConfig
from readers.dataset import printable

# fields of Run that are saved as they are
SIMPLE = ("step", "seconds", "validation", "best_step", "best_score", "data", "queue", "informative")
PARTS = {*SIMPLE, "model", "momentum", "optimizer", "sampler", "unreadable", "config", "tokenizer"}


def write_atomically(state: dict, path: Path, keep_older: bool = False) -> None:
    """Write a checkpoint beside `path`, then rename it. keep_older: the version before stays, as `last-2.pt`."""
    scratch, older = path.with_name(f".{path.name}.part"), path.with_stem(f"{path.stem}-2")
    try:
        with open(scratch, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_older and path.exists():
            older.unlink(missing_ok=True)
            try:
                os.link(path, older)  # at no moment is `path` itself away
            except (OSError, AttributeError):  # a file system, or a system, without links
                shutil.copyfile(path, older)
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        reason = str(error.__context__ or error).splitlines()[0]
        raise OSError(None, f"{reason}; what was there before is whole", str(path)) from None
    finally:
        scratch.unlink(missing_ok=True)


def save_checkpoint(run: Run, path: Path) -> None:
    """Write all that a run needs to go on, from the first process. Random states are not among it: every step seeds
    itself from (seed, step), the sampler from (seed, epoch)."""
    if not is_main_process():
        return
    state = {name: getattr(run, name) for name in SIMPLE}
    state |= {
        "model": run.model.state_dict(),
        "momentum": run.momentum.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "sampler": run.sampler.state_dict(),
        "unreadable": sorted(run.unreadable),
        "config": asdict(run.config),
        "tokenizer": run.tokenizer.to_str(),
    }
    write_atomically(state, path, keep_older=path.name == "last.pt")


def load_checkpoint(path: str | Path) -> dict:
    """Read the parts of a checkpoint without running pickled code. Raises ConfigError, in one line.

    torch.save writes a zip archive with a checksum for each tensor. torch.load does not check it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            intact = archive.testzip() is None
        state = torch.load(path, map_location="cpu", weights_only=True) if intact else None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such checkpoint") from None
    except Exception:  # zipfile and torch raise many kinds for a file that is not their own
        intact = False
    if not intact:
        raise ConfigError(f"{path}: damaged, or not a checkpoint of train.py; take the one before, or copy it again")
    if not isinstance(state, dict) or not state.keys() >= PARTS:
        raise ConfigError(f"{path}: not a checkpoint of train.py, or of another version of this code")
    return state


def read_tokenizer(state: dict) -> Tokenizer:
    """The tokenizer of a checkpoint."""
    return Tokenizer.from_str(state["tokenizer"])


def config_from_dict(saved: dict, kind: type[LoopConfig] = TrainConfig) -> LoopConfig:
    """The config, of the class `kind`, that a checkpoint or a config.json holds. Raises ConfigError for another."""
    if kind is TrainConfig and saved.get("task"):
        raise ConfigError(f"the run is a fine-tuning, --task {saved['task']} of finetune.py; this is for pretraining")
    if kind is not TrainConfig and not saved.get("task"):
        raise ConfigError("the run is a pretraining, which train.py goes on with")
    try:
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        return kind(**fields | {"model": ModelConfig(**saved["model"])})  # JSON has lists for tuples
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"the run was saved by another version of this code ({error})") from None


def begin(
    config: LoopConfig, given: set[str], check: Callable[[LoopConfig, set[str]], None]
) -> tuple[LoopConfig, dict | None]:
    """The config to run by and, with --resume, the checkpoint to go on from. A run is never overwritten.

    check: the script's check_flags"""
    last = Path(config.out) / "last.pt"
    if config.resume:
        state = load_checkpoint(last)
        return resumed_config(config, given, state, check), state
    if last.exists():
        raise ConfigError(f"{config.out} holds a run already; add --resume to go on with it, or choose another --out")
    return config, None


def resumed_config(
    config: LoopConfig, given: set[str], state: dict, check: Callable[[LoopConfig, set[str]], None]
) -> LoopConfig:
    """The checkpoint's config; a flag that would change the result is refused."""
    saved = config_from_dict(state["config"], type(config))
    for name in sorted(given - FREE_ON_RESUME - {"vocab_size"}):  # the saved size is what training it came to
        mine = getattr(config, name) if hasattr(config, name) else getattr(config.model, name)
        theirs = getattr(saved, name) if hasattr(saved, name) else getattr(saved.model, name)
        if mine != theirs and (name, mine) != ("precision", "auto"):  # what it took at the start is kept
            advice = "drop the flag, or start anew with another --out"
            raise ConfigError(f"{flag_of(name)} {mine} contradicts the run to resume, which has {theirs}; {advice}")
    given_now = {name: getattr(config, name) for name in (given & FREE_ON_RESUME) | {"out"}}
    merged = replace(saved, **(given_now | {"resume": True}))
    check(merged, set())
    return merged


def restore(run: Run, state: dict) -> None:
    """Put a run where its checkpoint left off. Raises ConfigError if the data set has changed since."""
    if state["data"] != run.data:
        raise ConfigError(f"{run.config.out}/last.pt was trained on other rows than the training split holds now")
    run.model.load_state_dict(state["model"])
    run.momentum.model.load_state_dict(state["momentum"])
    # betas and weight decay come from the config, the moments from the checkpoint
    moments = {"state": state["optimizer"]["state"]}
    run.optimizer.load_state_dict(run.optimizer.state_dict() | moments)
    run.sampler.load_state_dict(state["sampler"])
    for name in SIMPLE:
        setattr(run, name, state[name])
    run.queue = [part.to(run.device) for part in run.queue]
    run.unreadable = set(state["unreadable"])
    state.clear()  # it is as large as the run itself


def load_weights(run: Run, source: dict, where: str) -> None:
    """Load a checkpoint's weights into both models. Heads that the run does not have are left out, and a class head of
    its own stays as it was initialised. Raises ConfigError for weights that do not fit."""
    own = run.model.state_dict()
    weights = {}
    for name, tensor in source["model"].items():
        if name in own or not str(name).startswith(("class_head", "adapter", "phrases", "detector")):
            weights[name] = tensor
    for name, tensor in own.items():
        if name.startswith("class_head"):
            weights.setdefault(name, tensor)
    try:
        run.model.load_state_dict(weights)
    except RuntimeError as error:  # of names or shapes that are not the model's, a line for each
        reason = printable(" ".join(str(error).split()))[:200]
        raise ConfigError(f"{where}: does not fit this run ({reason})") from None
    run.momentum.update(run.model, decay=0)
