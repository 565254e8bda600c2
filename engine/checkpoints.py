"""Checkpoints, last.pt and best.pt: their contents, resuming a run, and loading weights for a task or from an export.

A file is written completely or not at all, so after a kill at any moment there is a complete checkpoint. It is read as
data: no pickled code is run, and the checksums of the archive reveal damage.
"""

import contextlib
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
from engine.weights import load_pretrained
from model import ModelConfig, VisionLanguageModel
from readers.dataset import DataError, printable
from readers.files import explain_failure, read_json, read_text

# fields of Run that are saved unchanged
RUN_FIELDS = ("step", "seconds", "validation", "best_step", "best_score", "data", "queue", "informative")
CHECKPOINT_KEYS = {*RUN_FIELDS, "model", "momentum", "optimizer", "sampler", "unreadable", "config", "tokenizer"}
HEADS = ("class_head", "adapter", "phrases", "detector")  # parts of the model that not every run has
DEFAULT_RUN = Path("runs/synthetic-syncmask-tiny/last.pt")  # of train.py without flags
TRAINED_MODEL = Path(__file__).parent.parent / "tutorial/pretrained/syncmask"  # comes with this code


def write_atomically(state: dict, path: Path, keep_older: bool = False) -> None:
    """Write a checkpoint, or other tensors, to a file beside `path`, then rename it.

    keep_older: the previous checkpoint stays, last.pt as last-2.pt
    Raises OSError where the file cannot be written; the previous checkpoint is then unchanged.
    """
    scratch = path.with_name(f".{path.name}.part")
    older = path.with_stem(f"{path.stem}-2")
    try:
        with open(scratch, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_older and path.exists():
            older.unlink(missing_ok=True)
            try:
                os.link(path, older)  # a second name, so that `path` exists at every moment
            except (OSError, AttributeError):  # a file system, or an operating system, without links
                shutil.copyfile(path, older)
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        reason = str(error.__context__ or error).splitlines()[0]
        unchanged = "; the previous file is unchanged" if path.exists() else ""
        raise OSError(None, f"cannot be written ({reason}){unchanged}", str(path)) from None
    finally:
        scratch.unlink(missing_ok=True)


def save_checkpoint(run: Run, path: Path) -> None:
    """Save all that a run needs to be resumed, in the main process only.

    Random states are not saved: a step is seeded by (seed, step), the sampler by (seed, epoch).
    Raises OSError where the file cannot be written.
    """
    if not is_main_process():
        return
    state = {name: getattr(run, name) for name in RUN_FIELDS}
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


def default_checkpoint() -> Path:
    """Return the checkpoint of one's own default run if there is one, else the model that comes with this code."""
    return DEFAULT_RUN if DEFAULT_RUN.exists() else TRAINED_MODEL


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint without running pickled code. -> its parts, by CHECKPOINT_KEYS

    path: a file, or a folder that experiments/export.py has written (see `load_export`)
    Raises ConfigError where it does not exist, cannot be read, is damaged, or is no checkpoint.
    """
    if os.path.isdir(path):
        return load_export(Path(path))
    try:
        # torch.save writes a zip archive with a checksum for each tensor, which torch.load does not check
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such checkpoint; check the path") from None
    except Exception as error:  # zipfile and torch raise many kinds of errors for other files
        damage = "damaged, or not a checkpoint of train.py; use an earlier one (last-2.pt), or copy it again"
        raise ConfigError(f"{path}: {explain_failure(path, error, damage)}") from None
    if not isinstance(state, dict) or not state.keys() >= CHECKPOINT_KEYS:
        raise ConfigError(f"{path}: not a checkpoint, or one of another version of this code; train the model anew")
    return state


def load_export(folder: Path) -> dict:
    """Read a folder of experiments/export.py. -> the parts of a checkpoint that evaluation and fine-tuning use

    The momentum encoder gets the weights of the model, since an export has no others.
    Raises ConfigError where the folder is no export, or is damaged.
    """
    try:
        config = read_json(folder / "config.json")
        model = VisionLanguageModel(ModelConfig(**config["config"]["model"]))
        informative = []
        for token_ids in config["informative"]:
            flags = torch.zeros(model.config.vocab_size, dtype=torch.bool)
            flags[token_ids] = True
            informative.append(flags)
        tokenizer = Tokenizer.from_str(read_text(folder / "tokenizer.json")).to_str()
    except Exception as error:  # tokenizers raises plain Exception
        reason = printable(" ".join(str(error).split()))[:200]
        raise ConfigError(
            f"{folder}: not a complete folder of experiments/export.py ({reason}); give last.pt or best.pt of a run"
        ) from None
    try:
        report = load_pretrained(model, [folder / "model.safetensors"])
    except DataError as error:
        raise ConfigError(str(error)) from None
    if report.missing or report.skipped:
        raise ConfigError(f"{folder}: model.safetensors does not fit config.json ({report}); export the model anew")
    weights = model.state_dict()
    return {
        "model": weights,
        "momentum": weights,
        "config": config["config"],
        "tokenizer": tokenizer,
        "informative": informative,
        "step": config["step"],
    }


def read_tokenizer(state: dict) -> Tokenizer:
    """Build the tokenizer that a checkpoint holds."""
    return Tokenizer.from_str(state["tokenizer"])


def config_from_dict(saved: dict, kind: type[LoopConfig] = TrainConfig) -> LoopConfig:
    """Build the config that a checkpoint or a config.json holds.

    saved: field -> value
    kind: TrainConfig or FinetuneConfig
    Raises ConfigError for the config of another kind of run, or of another version of this code.
    """
    if kind is TrainConfig and saved.get("task"):
        raise ConfigError(f"the run is a fine-tuning of finetune.py --task {saved['task']}; give a run of train.py")
    if kind is not TrainConfig and not saved.get("task"):
        raise ConfigError("the run is a pretraining; continue it by train.py --resume")
    values = {}
    for name, value in saved.items():
        values[name] = tuple(value) if isinstance(value, list) else value  # JSON has lists for tuples
    try:
        values["model"] = ModelConfig(**saved["model"])
        return kind(**values)
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"the run was saved by another version of this code ({error}); train the model anew"
        ) from None


def begin(
    config: LoopConfig,
    given: set[str],
    check: Callable[[LoopConfig, set[str]], None],
) -> tuple[LoopConfig, dict | None]:
    """Return the config to run by and, with --resume, the checkpoint to continue from. A run is never overwritten.

    Without --vocab, a checkpoint among --weights also gives the vocabulary.
    config: by the flags of the command line
    given: names of the fields whose flags were given
    check: the script's check_flags
    Raises ConfigError where the output folder already has a run, has none to resume, or one that the flags contradict.
    """
    last = Path(config.out) / "last.pt"
    if config.resume:
        state = load_checkpoint(last)
        return resumed_config(config, given, state, check), state
    if last.exists():
        raise ConfigError(f"{config.out} holds a run already; add --resume to continue it, or choose another --out")
    if isinstance(config, TrainConfig) and not config.vocab:
        for file in config.weights:
            with contextlib.suppress(ConfigError):  # published weights
                load_checkpoint(file)
                config = replace(config, vocab=file)
    return config, None


def resumed_config(
    config: LoopConfig,
    given: set[str],
    state: dict,
    check: Callable[[LoopConfig, set[str]], None],
) -> LoopConfig:
    """Return the config of the checkpoint, with the given flags that do not change the result.

    config, given, check: as in `begin`
    state: the checkpoint
    Raises ConfigError for a flag that would change the result.
    """
    saved = config_from_dict(state["config"], type(config))
    for name in sorted(given - FREE_ON_RESUME - {"vocab_size"}):  # the saved size is that of the trained vocabulary
        given_value = field_value(config, name)
        saved_value = field_value(saved, name)
        if name == "precision" and given_value == "auto":  # the precision chosen at the start is kept
            continue
        if given_value != saved_value:
            raise ConfigError(
                f"{flag_of(name)} {given_value} contradicts the run to resume, which has {saved_value}; "
                "drop the flag, or start anew with another --out"
            )
    changes = {name: getattr(config, name) for name in given & FREE_ON_RESUME}
    changes["out"] = config.out
    changes["resume"] = True
    merged = replace(saved, **changes)
    check(merged, set())
    return merged


def field_value(config: LoopConfig, name: str) -> object:
    """Return the value of a field of a config or of its model."""
    return getattr(config, name) if hasattr(config, name) else getattr(config.model, name)


def restore(run: Run, state: dict) -> None:
    """Set a run to the state of its checkpoint, in place. The checkpoint is emptied.

    Raises ConfigError where the training data has changed since.
    """
    if state["data"] != run.data:
        raise ConfigError(
            f"{run.config.out}/last.pt was trained on other rows than the training split holds now; "
            "restore the data, or start anew with another --out"
        )
    run.model.load_state_dict(state["model"])
    run.momentum.model.load_state_dict(state["momentum"])
    # betas and weight decay come from the config, the moments from the checkpoint
    moments = {"state": state["optimizer"]["state"]}
    run.optimizer.load_state_dict(run.optimizer.state_dict() | moments)
    run.sampler.load_state_dict(state["sampler"])
    for name in RUN_FIELDS:
        setattr(run, name, state[name])
    run.queue = [keys.to(run.device) for keys in run.queue]
    run.unreadable = set(state["unreadable"])
    state.clear()  # it is as large as the run itself


def load_weights(run: Run, source: dict, path: str) -> None:
    """Load the weights of a checkpoint into the model and the momentum model, in place.

    Heads that the model does not have are left out. A class head that the checkpoint does not have stays as it is.
    source: the checkpoint
    path: its file, for messages
    Raises ConfigError for weights that do not fit.
    """
    current = run.model.state_dict()
    weights = {}
    for name, tensor in source["model"].items():
        if name in current or not str(name).startswith(HEADS):
            weights[name] = tensor
    for name, tensor in current.items():
        if name.startswith("class_head"):
            weights.setdefault(name, tensor)
    try:
        run.model.load_state_dict(weights)
    except RuntimeError as error:  # with a line for each name or shape that differs
        reason = printable(" ".join(str(error).split()))[:200]
        raise ConfigError(f"{path}: the weights do not fit this model ({reason}); give another checkpoint") from None
    run.momentum.update(run.model, decay=0)
