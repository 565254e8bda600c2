"""The configuration of fine-tuning, evaluation and search, and the command line."""

from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from data import build_dataset, build_statements, build_triplets
from engine.checkpoints import default_checkpoint, load_checkpoint
from engine.config import LoopConfig, check_loop
from engine.flags import ConfigError, OneLineParser, add_flags, check_flag_applies, flag_of, option
from model import ModelConfig
from readers.dataset import DataError, PairDataset, printable
from readers.prompts import CAPTION_PREFIX, DIFFERENCE_PREFIX

TaskName = Literal["retrieval", "tgir", "category", "subcategory", "entailment", "search"]
RECOGNITION = ("category", "subcategory", "entailment")
SEARCH_RESULTS = 10  # images that search shows
IMAGE_SETS = ("synthetic", "fashiongen", "jsonl")
MULTI_CAPTION_SETS = ("flickr30k", "coco")
TASK_DATA = {  # all other tasks: IMAGE_SETS
    "retrieval": (*IMAGE_SETS, *MULTI_CAPTION_SETS),
    "tgir": ("synthetic", "fashioniq"),
    "entailment": ("synthetic", "snlive"),
    "search": (*IMAGE_SETS, *MULTI_CAPTION_SETS, "fashioniq"),
}
TEST_SPLIT_SETS = (*MULTI_CAPTION_SETS, "fashioniq", "snlive")  # fashioniq's has no published targets
# pretraining settings that retrieval keeps
RETRIEVAL_SETTINGS = ("queue_size", "negatives", "itm_hard_ratio", "margin", "focal_gamma", "itc_weight")
TASK_FLAGS = {  # fields that only some tasks use
    "retrieval": (*RETRIEVAL_SETTINGS, "ema_decay", "alpha", "itm_hard_warmup", "rerank"),
    "category": ("modality", "freeze"),
    "subcategory": ("modality", "freeze"),
    "entailment": ("modality", "freeze"),
    "search": ("query", "image", "index", "rerank"),
}


@dataclass(frozen=True)
class FinetuneConfig(LoopConfig):
    """The settings of a fine-tuning, an evaluation or a search. Every field with a help text is a flag."""

    task: TaskName | None = option(None, "task to train and evaluate, or search")
    checkpoint: str | None = option(
        None,
        "last.pt or best.pt of a run, or a folder of experiments/export.py "
        "(default: of `python train.py`, else the trained model in tutorial/pretrained)",
    )
    data: Literal["synthetic", "fashiongen", "jsonl", "fashioniq", "flickr30k", "coco", "snlive"] | None = option(
        None, "data set (default: the checkpoint's)"
    )
    root: str | None = option(None, "folder of the data set (default: the checkpoint's, or data/<data>)")
    split: Literal["val", "train", "test"] = option("val", "split to evaluate or to search")
    eval_only: bool = option(False, "evaluate the checkpoint without training")
    from_scratch: bool = option(False, "train from random weights instead of the checkpoint's, as a baseline")
    held_out: float = option(
        0.1, "share of the training products that is held out to select the best step", low=0.001, high=0.9
    )
    patience: int = option(0, "validations without improvement after which training stops; 0: never", low=0)
    rerank: int = option(0, "number of most similar candidates that the ITM head re-ranks", low=0)
    modality: Literal["both", "image", "text"] = option("both", "input of recognition and entailment")
    query: str | None = option(None, "words to search for")
    image: str | None = option(None, "image file to search for; with --query, its words change the image")
    freeze: bool = option(False, "train the recognition head alone; with --modality image a linear probe")
    index: str | None = option(None, "file of image features for search; written if it does not exist")
    # read from the checkpoint, or counted; not flags
    checkpoint_task: str | None = None  # task that the checkpoint was fine-tuned for; None after pretraining alone
    preset: str = "tiny"
    prompts: bool = False  # pretraining used prompts; captions then get a prefix here, as in Fashion-FINE
    data_seed: int = 0  # seed of the data and its splits, from pretraining
    classes: tuple[str, ...] = ()  # of recognition, in the order of the head
    most_frequent: int = 0  # of the classes in training


# Fields of the training loop that are also used where nothing is trained.
EVALUATION_FIELDS = {"out", "seed", "batch_size", "num_products", "device", "precision", "workers"}
TRAINING_FIELDS = {spec.name for spec in fields(LoopConfig)} - EVALUATION_FIELDS
TRAINING_FIELDS |= {"from_scratch", "held_out", "patience", "freeze", "modality"}

# Our choices, except Fashion-FINE's learning rates, epochs and weight decay for retrieval and tgir at `base`.
SCHEDULES = {
    "tiny": dict(steps=200, lr=5e-4, min_lr=1e-5, warmup=20, ema_decay=0.99, alpha=0.0, crop_scale=0.8, val_every=50),
    "tiny tgir": dict(steps=300, lr=1e-3),
    "tiny category": dict(steps=600, lr=1e-3, patience=4),
    "tiny subcategory": dict(steps=600, lr=1e-3, patience=4),
    "tiny entailment": dict(steps=600, lr=3e-4),  # with 1e-3 the loss may not fall
    "small": dict(epochs=10, batch_size=128, lr=1e-4, min_lr=1e-6, workers=4),
    "base": dict(epochs=10, lr=3e-5, min_lr=1e-6, workers=8),
    "base retrieval": dict(epochs=30, lr=1e-5),
    "base tgir": dict(min_lr=1e-7, weight_decay=0.3),
}


def parse_config(argv: list[str] | None = None) -> tuple[FinetuneConfig, set[str], dict]:
    """Parse the command line of finetune.py. Precedence: defaults < checkpoint < preset and task < flags.

    -> the config; names of the fields whose flags were given; the parts of the checkpoint that a task starts from
    Raises ConfigError for flags that contradict each other or the checkpoint; a flag that cannot be parsed ends the
    process.
    """
    parser = OneLineParser("finetune.py", description="Downstream tasks, and search.", allow_abbrev=False)
    add_flags(parser, FinetuneConfig, SCHEDULES)
    given = vars(parser.parse_args(argv))
    if not given.get("task"):
        raise ConfigError("--task is missing; choose retrieval, tgir, category, subcategory, entailment or search")
    if given.get("resume") and (given.get("eval_only") or given["task"] == "search"):
        raise ConfigError("--resume continues a training; drop it, since --eval-only and --task search do not train")
    path = given.get("checkpoint") or str(default_checkpoint())
    if given.get("resume") and "out" in given:  # last.pt holds all settings that came from the first checkpoint
        path = f"{given['out']}/last.pt"
    elif "checkpoint" not in given:
        print(f"checkpoint: {path}")
    checkpoint = load_checkpoint(path)
    source = {part: checkpoint[part] for part in ("model", "tokenizer", "config", "step")}  # the rest is large
    try:
        config = layer_config({"checkpoint": path, **given}, source["config"])
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: saved by another version of this code ({error}); train the model anew") from None
    if not config.resume:  # a resumed run is checked once its config is read from the checkpoint
        check_start(config)
        check_flags(config, set(given))
    return config, set(given), source


def layer_config(given: dict, saved: dict) -> FinetuneConfig:
    """Build the config: defaults < checkpoint < preset and task < flags.

    given: field -> value, of the flags that were given
    saved: field -> value, the config of the checkpoint
    Raises KeyError, TypeError or ValueError for a checkpoint of another version of this code.
    """
    task, preset = given["task"], saved["preset"]
    data = given.get("data", saved["data"])
    model = ModelConfig(**saved["model"])
    uses_local_tokens = model.local_tokens and task != "tgir"  # tgir compares [CLS] alone, as in Fashion-FINE
    values = {
        "preset": preset,
        "num_products": saved["num_products"],
        "prompts": saved["prompts"],
        "model": replace(model, local_tokens=uses_local_tokens, alignment=False, detector=False),
        "data": data,
        "root": saved["root"] if data == saved["data"] else None,
        "checkpoint_task": saved.get("task"),
        "data_seed": saved.get("data_seed", saved["seed"]),
        "classes": tuple(printable(str(name)) for name in saved.get("classes", ())),
        "most_frequent": saved["most_frequent"] if saved.get("classes") else 0,
        "modality": saved.get("modality", "both"),
    }
    if task == "retrieval":
        for name in RETRIEVAL_SETTINGS:
            values[name] = saved[name]
    values.update(SCHEDULES[preset])
    values.update(SCHEDULES.get(f"{preset} {task}", {}))
    if "steps" in given or "epochs" in given:  # the given one replaces the preset's
        values.update(steps=None, epochs=None)
    values.update(given)
    config = FinetuneConfig(**values)
    return config if config.out else replace(config, out=default_folder(config))


def default_folder(config: FinetuneConfig) -> str:
    """Return the output folder of a run without --out, named after its data, its task and some flags."""
    name = f"runs/{config.data}-{config.task}"
    if config.modality != "both":
        name += f"-{config.modality}"
    for flag in ("freeze", "from_scratch", "eval_only"):
        if getattr(config, flag):
            name += f"-{flag}"
    return f"{name}-{config.preset}"


def check_start(config: FinetuneConfig) -> None:
    """Check that the task can start from the checkpoint.

    Raises ConfigError where it cannot.
    """
    start, flag = config.checkpoint_task, f"--checkpoint {config.checkpoint}"
    if config.task == "search":
        if start in RECOGNITION:
            raise ConfigError(f"{flag}: was fine-tuned for {start}, not for search; give a pretraining checkpoint")
        if start == "tgir" and not config.image:
            raise ConfigError(f"{flag}: was fine-tuned for tgir, so search needs --image, too")
    elif start and not (config.eval_only and start == config.task):
        raise ConfigError(
            f"{flag}: is fine-tuned already; add --task {start} --eval-only, or give a pretraining checkpoint"
        )
    elif not start and config.eval_only and config.task in RECOGNITION:
        raise ConfigError(f"{flag}: has no classes yet; fine-tune it first, without --eval-only")
    elif start in RECOGNITION and not len(config.classes) == config.model.classes > config.most_frequent >= 0:
        sizes = f"{len(config.classes)} names of classes for a head of {config.model.classes}"
        raise ConfigError(f"{flag}: has {sizes}; give another checkpoint")


def check_flags(config: FinetuneConfig, given: set[str]) -> None:
    """Check the config of a fine-tuning, an evaluation or a search.

    given: names of the fields whose flags were given
    Raises ConfigError for values out of range and for flags that contradict each other.
    """
    check_loop(config, given)
    usable_data = TASK_DATA.get(config.task, IMAGE_SETS)
    if config.data not in usable_data:
        raise ConfigError(f"--task {config.task} needs --data {' or '.join(usable_data)}, not {config.data}")
    check_flag_applies("task", config.task, given, TASK_FLAGS)
    if config.task == "search" or config.eval_only:
        for name in sorted(given & TRAINING_FIELDS):
            raise ConfigError(f"{flag_of(name)} is for training; drop it, since --eval-only and search do not train")
    if config.split == "train" and config.task != "search":
        raise ConfigError("--split train is for --task search only, since metrics on training data mean nothing")
    if config.split == "test" and config.data not in TEST_SPLIT_SETS:
        raise ConfigError(f"--split test is for --data {' or '.join(TEST_SPLIT_SETS)}; use --split val")
    if config.task == "search" and not (config.query or config.image):
        raise ConfigError("--task search needs --query, --image or both")
    if config.rerank and config.image:
        raise ConfigError("--rerank contradicts --image, since the ITM head scores images with words alone; drop one")


def open_data(config: FinetuneConfig, split: str) -> PairDataset:
    """Open a split for the task: images, triplets or statements. Recognition leaves out images without a label.

    Raises DataError where the data cannot be used or no image has a label.
    """
    build = build_dataset
    if config.task == "tgir" or config.data == "fashioniq":
        build = build_triplets
    elif config.task == "entailment":
        build = build_statements
    dataset = build(config.data, config.root, split, config.model.image_size, config.data_seed, config.num_products)
    if config.task == "search" and config.data == "fashioniq":
        dataset = dataset.image_set
    elif config.task in ("category", "subcategory"):
        whole = dataset
        labelled_rows = np.flatnonzero([bool(label) for label in labels_of(config, dataset)])
        if not len(labelled_rows):
            raise DataError(f"no image of the {split} split has a {config.task}; add labels, or choose another --task")
        dataset = dataset.subset(labelled_rows)
        dataset.problems, dataset.notes = whole.problems, whole.notes
    dataset.caption_prefix = caption_prefix(config)
    return dataset


def labels_of(config: FinetuneConfig, dataset: PairDataset) -> list[str]:
    """Return the label of each row: its sub-category or category. The category of a statement is its label."""
    return dataset.subcategories if config.task == "subcategory" else dataset.categories


def caption_prefix(config: FinetuneConfig) -> str:
    """Return the words before each caption, "" where pretraining used no prompts."""
    if not config.prompts:
        return ""
    return DIFFERENCE_PREFIX if "tgir" in (config.task, config.checkpoint_task) else CAPTION_PREFIX
