"""Checkpoints, last.pt and best.pt: what is in them, how runs go on from them, how tasks start from them."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from engine.config import FREE_ON_RESUME, LoopConfig, TrainConfig
from engine.flags import ConfigError, flag_of
from engine.run import NonFiniteLoss, Run, way_back
from engine.trust import does_not_fit, load_checkpoint
from model import ModelConfig


def save_checkpoint(run: Run, path: Path) -> None:
    """Have a checkpoint written by the first rank's `run.writer`, for all have the same; every rank calls this. Raises
    NonFiniteLoss for weights that are not finite: what is saved is a state that one can go back to.

    There is no random state to save: every step seeds itself from (seed, step), the sampler from (seed, epoch).
    """
    if not torch.stack([weight.isfinite().all() for weight in run.model.parameters()]).all():
        run.writer.wait()
        advice = way_back(path.with_name("last.pt"))
        raise NonFiniteLoss(f"step {run.step}: the weights are not finite any more; {advice}")
    sampler = run.sampler.state_dict()
    if not run.ranks.leads:
        return
    state = {
        "model": run.model.state_dict(),
        "momentum": run.momentum.model.state_dict(),
        "queue": run.queue.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "sampler": sampler,
        "data": run.data,
        "step": run.step,
        "seconds": run.seconds,
        "unreadable": sorted(run.unreadable),
        "config": asdict(run.config),
        "tokenizer": run.tokenizer.to_str(),
        "telling": run.telling,
    }
    run.writer.write(state, path, keep_older=path.name == "last.pt")


def config_from_dict(saved: dict, kind: type[LoopConfig] = TrainConfig) -> LoopConfig:
    """The config, of the class `kind`, that a checkpoint or a config.json holds."""
    if kind is TrainConfig and saved.get("task"):
        raise ConfigError(f"the run is a fine-tuning, --task {saved['task']} of finetune.py; this is for pretraining")
    try:
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        config = kind(**fields | {"model": ModelConfig(**saved["model"])})  # JSON has lists for tuples
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"the run was saved by another version of this code ({error})") from None
    return config


def resumed_config(
    config: LoopConfig, given: set[str], state: dict, check: Callable[[LoopConfig, set[str]], None]
) -> LoopConfig:
    """The checkpoint's config; a flag that would change the result is refused. `check` is the script's check_flags."""
    saved = config_from_dict(state["config"], type(config))
    free = FREE_ON_RESUME | {"lr"}  # or a run that has diverged could not go on from an earlier checkpoint
    for name in sorted(given - free - {"vocab_size"}):  # the saved size is what training it came to
        mine = getattr(config, name) if hasattr(config, name) else getattr(config.model, name)
        theirs = getattr(saved, name) if hasattr(saved, name) else getattr(saved.model, name)
        if mine != theirs and (name, mine) != ("precision", "auto"):  # what it took at the start is kept
            advice = "drop the flag, or start anew with another --out"
            raise ConfigError(f"{flag_of(name)} {mine} contradicts the run to resume, which has {theirs}; {advice}")
    given_now = {name: getattr(config, name) for name in (given & free) | {"out"}}
    merged = replace(saved, **(given_now | {"resume": True}))
    try:
        check(merged, set())
    except TypeError as error:  # a field of another type than this code gives it
        raise ConfigError(f"the run was saved by another version of this code ({error})") from None
    return merged


def restore(run: Run, state: dict) -> None:
    """Put a run where its checkpoint left off, and let go of the state, which is as large as the run itself. Raises
    ConfigError for a state that is not one of this run."""
    last = f"{run.config.out}/last.pt"
    if state["data"] != run.data:
        raise ConfigError(f"{last} was trained on other rows than the training split holds now")
    fill(run, state, last)
    try:
        run.queue.load_state_dict(state["queue"])
        # betas and weight decay come from the config, the moments from the checkpoint
        moments = {"state": state["optimizer"]["state"]}
        run.optimizer.load_state_dict(run.optimizer.state_dict() | moments)
        run.sampler.load_state_dict(state["sampler"])
        run.step, run.seconds, run.unreadable = int(state["step"]), float(state["seconds"]), set(state["unreadable"])
    except Exception as error:  # each part raises its own kind for a state that is not its own
        raise does_not_fit(last, error) from None
    if run.step > run.total_steps:
        raise ConfigError(f"{last} is at step {run.step} of {run.total_steps}")
    state.clear()


def fill(run: Run, state: dict, where: str | Path) -> None:
    """Load the weights of both models from a checkpoint into a run. Raises ConfigError."""
    try:
        run.model.load_state_dict(state["model"])
        run.momentum.model.load_state_dict(state["momentum"])
    except Exception as error:  # of names, shapes or types that are not the run's
        raise does_not_fit(where, error) from None


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
    """Load a checkpoint's weights into both models. Heads that the run does not have are left out, and a class head of
    its own stays as it was initialised. Raises ConfigError for weights that do not fit."""
    unused = ("class_head", "adapter", "phrases", "detector")
    mine, fills = run.model.state_dict(), {}
    for name, tensor in source["model"].items():
        if name in mine or not str(name).startswith(unused):
            fills[name] = tensor
    for name, tensor in mine.items():
        if name.startswith("class_head"):
            fills.setdefault(name, tensor)
    try:
        run.model.load_state_dict(fills)
    except Exception as error:  # of names, shapes or types that are not the model's
        raise does_not_fit(where, error) from None
    run.momentum.update(run.model, decay=0)
