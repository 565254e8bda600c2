"""Checkpoints, last.pt and best.pt: what is in them, read without running code, gone on from."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from harness.config import FREE_ON_RESUME, LoopConfig, TrainConfig
from harness.flags import ConfigError, flag_of
from harness.run import NonFiniteLoss, Run
from model import ModelConfig


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """While two runs wrote into one folder, each would spoil the other's files: the second is refused. The claim, on a
    file that stays, ends with the process that holds it, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which, other than flock, loader workers do not inherit
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ConfigError(f"{out} is being written by process {file.read()}; choose another --out") from None
        except OSError:
            print(f"{out}: this file system has no locks, so another run into it would go unnoticed")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def save_checkpoint(run: Run, path: Path) -> None:
    """Have a checkpoint written by the first rank's `run.writer`, for all have the same; every rank calls this. Raises
    NonFiniteLoss for weights that are not finite: what is saved is a state that one can go back to.

    `rng` is all there is of random state: every step seeds itself from (seed, step), the sampler from (seed, epoch).
    """
    if not torch.stack([weight.isfinite().all() for weight in run.model.parameters()]).all():
        run.writer.wait()
        kept = f"{path} is the last good state" if path.exists() else "there is no checkpoint yet"
        raise NonFiniteLoss(f"step {run.step}: the weights are not finite any more; {kept}; try a lower --lr")
    sampler = run.sampler.state_dict()
    if not run.ranks.leads:
        return
    state = {
        "model": run.model.state_dict(),
        "momentum": run.momentum.model.state_dict(),
        "queue": run.queue.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "sampler": sampler,
        "rng": {"seed": run.config.seed, "step": run.step},
        "data": run.data,
        "step": run.step,
        "seconds": run.seconds,
        "unreadable": sorted(run.unreadable),
        "config": asdict(run.config),
        "tokenizer": run.tokenizer.to_str(),
        "telling": run.telling,
        "worth": run.worth.state_dict(),
    }
    run.writer.write(state, path)


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint without running pickled code. Raises ConfigError when it is not one of ours."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such checkpoint") from None
    except Exception:  # torch raises many kinds for a file that is not its own
        raise ConfigError(f"{path}: not a checkpoint of train.py") from None
    parts = {"model", "momentum", "queue", "optimizer", "sampler", "data", "config", "tokenizer", "step"}
    if not isinstance(state, dict) or not parts <= state.keys():
        raise ConfigError(f"{path}: not a checkpoint of train.py")
    return state


def config_from_dict(saved: dict, kind: type[LoopConfig] = TrainConfig) -> LoopConfig:
    """The config, of the class `kind`, that a checkpoint or a config.json holds."""
    if kind is TrainConfig and saved.get("task"):
        raise ConfigError(f"the run is a fine-tuning, --task {saved['task']} of finetune.py; this is for pretraining")
    try:
        return kind(**saved | {"model": ModelConfig(**saved["model"])})
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"the run was saved by another version of this code ({error})") from None


def resumed_config(
    config: LoopConfig, given: set[str], state: dict, check: Callable[[LoopConfig, set[str]], None]
) -> LoopConfig:
    """The checkpoint's config; a flag that would change the result is refused. `check` is the script's check_flags."""
    saved = config_from_dict(state["config"], type(config))
    for name in sorted(given - FREE_ON_RESUME - {"vocab_size"}):  # the saved size is what training it came to
        mine = getattr(config, name) if hasattr(config, name) else getattr(config.model, name)
        theirs = getattr(saved, name) if hasattr(saved, name) else getattr(saved.model, name)
        if mine != theirs and (name, mine) != ("precision", "auto"):  # what it took at the start is kept
            advice = "drop the flag, or start anew with another --out"
            raise ConfigError(f"{flag_of(name)} {mine} contradicts the run to resume, which has {theirs}; {advice}")
    free = {name: getattr(config, name) for name in (given & FREE_ON_RESUME) | {"out", "stop_at"}}
    merged = replace(saved, **(free | {"resume": True}))
    check(merged, set())
    if merged.stop_at and merged.stop_at <= state["step"]:
        raise ConfigError(f"--stop-at {merged.stop_at}: the run is at step {state['step']} already")
    return merged


def restore(run: Run, state: dict) -> None:
    """Put a run where its checkpoint left off, and let go of the state, which is as large as the run itself."""
    if state["data"] != run.data:
        raise ConfigError(f"{run.config.out}/last.pt was trained on other rows than the training split holds now")
    try:
        run.model.load_state_dict(state["model"])
        run.momentum.model.load_state_dict(state["momentum"])
        run.queue.load_state_dict(state["queue"])
        run.worth.load_state_dict(state["worth"])
    except RuntimeError:
        raise ConfigError(f"{run.config.out}/last.pt was saved by another version of this code") from None
    run.optimizer.load_state_dict(state["optimizer"])
    run.sampler.load_state_dict(state["sampler"])
    run.step, run.seconds, run.unreadable = state["step"], state["seconds"], set(state["unreadable"])
    state.clear()


def begin(
    config: LoopConfig, given: set[str], check: Callable[[LoopConfig, set[str]], None]
) -> tuple[LoopConfig, dict | None]:
    """The config to run by and, with --resume, the checkpoint to go on from. A run is never overwritten."""
    last = Path(config.out) / "last.pt"
    if config.resume:
        state = load_checkpoint(last)
        return resumed_config(config, given, state, check), state
    if last.exists():
        raise ConfigError(f"{config.out} holds a run already; add --resume to go on with it, or choose another --out")
    return config, None


def load_weights(run: Run, source: dict, where: str) -> None:
    """A checkpoint's weights into both models; the recognition head may be new, unused parts are left out."""
    try:
        report = run.model.load_state_dict(source["model"], strict=False)
    except RuntimeError as error:
        raise ConfigError(f"{where}: does not fit its own config ({str(error).splitlines()[-1].strip()})") from None
    unused = ("class_head", "adapter", "phrases", "detector")
    wrong = [name for name in report.missing_keys if not name.startswith("class_head")]
    if wrong := wrong + [name for name in report.unexpected_keys if not name.startswith(unused)]:
        raise ConfigError(f"{where}: does not fit its own config, {wrong[0]} and {len(wrong) - 1} more names")
    run.momentum.update(run.model, decay=0)
