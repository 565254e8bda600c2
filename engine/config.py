"""The configuration of a pretraining run: fields, presets, schedules, and the command line."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch

from data import DataName
from engine.flags import ConfigError, OneLineParser, add_flags, check_device, check_ranges, check_readers, option
from losses import NegativeMode
from masking import MaskSource
from model import PRESETS, ModelConfig
from sampler import SEARCH_SIZE, SamplerMode

MaskMode = Literal["random", "sync", "oracle"]
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class LoopConfig:
    """What the loop reads: where it writes, how long, how fast, on what. Shared by pretraining and fine-tuning."""

    out: str | None = option(None, "output folder (default runs/<data>-<recipe or task>-<preset>)")
    resume: bool = option(False, "go on from last.pt in the output folder")
    seed: int = option(0, "of everything random", low=0, high=2**63 - 1)

    steps: int | None = option(None, "optimiser steps; either this or --epochs", low=1)
    epochs: int | None = option(None, "passes over the training photos", low=1)
    batch_size: int = option(64, "photos a batch, of all processes together", low=2)
    lr: float = option(1e-4, "peak learning rate", low=0)
    min_lr: float = option(1e-5, "learning rate at the end of the cosine", low=0)
    warmup: int = option(500, "steps of linear warm-up", low=0)
    weight_decay: float = option(0.02, "AdamW's, not on biases, norms, embeddings", low=0)
    ema_decay: float = option(0.995, "decay of the momentum model", low=0, high=1)
    alpha: float = option(0.4, "share of momentum soft targets, ramped up over the first epoch", low=0, high=1)
    queue_size: int = option(0, "momentum features kept as further ITC negatives", low=0)
    negatives: NegativeMode = option("similar", "choice of ITM negatives; hard and semihard also group the batches")
    itm_hard_ratio: float = option(1.0, "share of the ITM negatives chosen so; the others are random", low=0, high=1)
    itm_hard_warmup: int = option(0, "steps with random ITM negatives; in as many more the share grows to that", low=0)
    margin: float = option(0.0, "semihard: how much less similar than the own pair, as a cosine", low=0, high=2)
    crop_scale: float = option(0.5, "smallest area share of the random crop", low=0.01, high=1)
    distort: float = option(0.0, "strength of rotation, shear, blur and noise", low=0, high=1)
    focal_gamma: float = option(0.0, "γ of focal ITC: how much less the easy pairs count; 0: plain ITC", low=0)
    itc_weight: float = option(1.0, "weight of ITC in the loss", low=0)

    num_products: int = option(4000, "synthetic training products", low=2)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to run: cpu, cuda, cuda:1, …")
    precision: Precision = option("auto", "bf16: autocast; auto: bf16 where the GPU or the processor has it, else fp32")
    compile: bool = option(False, "torch.compile the layers")
    workers: int = option(0, "data loading processes, for each process that trains", low=0, high=1024)
    log_every: int = option(10, "steps between training lines in metrics.jsonl", low=1)
    val_every: int = option(200, "steps between validations, each with a checkpoint", low=1)
    val_products: int = option(1000, "held-out products to validate on, at most", low=2)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """A pretraining run. Every field is a flag; so is every field of `ModelConfig`."""

    data: DataName = option("synthetic", "data set")
    root: str | None = option(None, "folder of the data set (default data/<data>)")
    recipe: str = option("syncmask", "method: syncmask, softmask, fashionfine or albef")
    preset: Literal["tiny", "small", "base"] = option(
        "tiny", "sizes and schedule; unless given, synthetic: tiny, jsonl: small, fashiongen: base"
    )
    prompts: bool = option(False, "put the category symbol and attribute prompts around the descriptions to train on")
    mlm_ratio: float = option(0.15, "share of the words that MLM masks", low=0, high=1)
    mim_ratio: float = option(0.5, "share of the patches that MIM masks", low=0, high=1)
    mim_weight: float = option(1.0, "weight of MIM in the loss", low=0)
    patch_mask: MaskMode = option("sync", "how MIM chooses patches: at random, synchronized, from the ground truth")
    word_mask: MaskMode = option("sync", "how MLM chooses words: at random, synchronized, from the ground truth")
    mask_source: MaskSource = option("masked", "sync masks read the attention of masked words, or of the clean pair")
    word_pool: float = option(0.45, "share of the words, the best, of which sync masks draw", low=0, high=1)
    random_mask_prob: float = option(0.0, "share of the pairs that keep random masks", low=0, high=1)
    mask_warmup: int = option(0, "steps with random masks, until attention means something", low=0)
    soft_mask: bool = option(True, "one more match for ITM: the photo with what one word is about suppressed")
    mask_text: bool = option(True, "masked text for ITC and ITM too, not for MLM alone")

    vocab: str | None = option(None, "a BERT vocab.txt instead of a vocabulary trained on the captions")
    weights: tuple[str, ...] = option((), "published weights to start from: ViT, BERT (with --vocab), or ALBEF")


SCHEDULES = {
    # in so few steps soft targets only slow MLM down, ITM negatives drawn by similarity, of which many are false, undo
    # what the random ones have taught, the momentum model must follow closely, and retrieval wants more weight
    "tiny": dict(
        steps=680,
        lr=1e-3,
        min_lr=1e-5,
        warmup=50,
        ema_decay=0.95,
        alpha=0.0,
        mlm_ratio=0.5,
        negatives="random",
        itm_hard_ratio=0.5,
        itm_hard_warmup=100,
        mask_warmup=100,
        mim_weight=0.5,
        itc_weight=2.0,
        crop_scale=0.8,
        val_every=340,
    ),
    "small": dict(
        epochs=20,
        batch_size=128,
        lr=3e-4,
        queue_size=16384,
        mlm_ratio=0.3,
        itm_hard_warmup=1000,
        mask_warmup=1000,
        workers=4,
    ),
    # a checkpoint is 3.5 GB
    "base": dict(epochs=30, queue_size=65536, workers=8, itm_hard_warmup=1000, mask_warmup=2000, val_every=2000),
}
# What a recipe sets over its preset, and what it sets for one preset alone. All of syncmask's are choices, those of the
# model and of the masks made on the truth of the synthetic photos; no queue beside grouped batches, as GRIT-VLP.
RECIPE_DEFAULTS = {
    "syncmask": dict(
        mlm_ratio=0.3,
        random_mask_prob=0.2,
        negatives="semihard",
        margin=0.2,
        queue_size=0,
        registers=4,
        cls_context=False,
    ),
    "syncmask tiny": dict(patch_layer=2, mlm_ratio=0.5, word_pool=0.6),
    "softmask": dict(focal_gamma=2.0, distort=0.5),
    "softmask tiny": dict(mlm_ratio=0.3),  # half of the words, as otherwise, would leave ITC too little to read
    "fashionfine": dict(
        prompts=True, local_tokens=True, alignment=True, detector=True, focal_gamma=2.0, itc_weight=0.25, max_length=180
    ),
    "fashionfine tiny": dict(mlm_ratio=0.3, max_length=96),
    "fashionfine base": dict(epochs=10, lr=6e-5),
    "albef": {},
}
# Flags that one recipe alone reads.
RECIPE_FLAGS = {
    "syncmask": ("mim_weight", "patch_mask", "word_mask", "word_pool", "random_mask_prob", "mask_warmup"),
    "softmask": ("soft_mask", "mask_text"),
    "fashionfine": ("local_tokens", "alignment", "detector"),
}
DEFAULT_PRESET = {"synthetic": "tiny", "jsonl": "small", "fashiongen": "base"}
# What decides nothing of a run's result, and a resumed run may change. (The number of processes decides what is drawn.)
# --lr is free, or a run that has diverged could not go on from an earlier checkpoint.
FREE_ON_RESUME = {"out", "root", "resume", "device", "workers", "log_every", "lr"}
MAX_GRAD_NORM = 1.0


def parse_config(argv: list[str] | None = None) -> tuple[TrainConfig, set[str]]:
    """Command line -> config, names of the flags given. Precedence: defaults < preset < recipe < flags."""
    about = "Pretraining: one recipe per method, one flat loop."
    parser = OneLineParser("train.py", description=about, allow_abbrev=False)
    layers = SCHEDULES | RECIPE_DEFAULTS
    add_flags(parser, TrainConfig, layers)
    add_flags(parser.add_argument_group("sizes of the model (defaults: tiny's)"), ModelConfig, layers)
    given = vars(parser.parse_args(argv))
    config = layer_config(given)
    if not config.resume:  # otherwise the checkpoint has a say first
        check_flags(config, set(given))
    return config, set(given)


def layer_config(given: dict) -> TrainConfig:
    """defaults < preset < recipe < `given`, for the run and for its model."""
    data = given.get("data", "synthetic")
    preset = given.get("preset", DEFAULT_PRESET[data])
    recipe = given.get("recipe", TrainConfig.recipe)
    if recipe not in RECIPE_DEFAULTS or " " in recipe:
        names = [name for name in RECIPE_DEFAULTS if " " not in name]
        raise ConfigError(f"--recipe {recipe}: no such recipe; there are {', '.join(names)}")
    schedule = SCHEDULES[preset] | RECIPE_DEFAULTS[recipe] | RECIPE_DEFAULTS.get(f"{recipe} {preset}", {})
    if "steps" in given or "epochs" in given:  # the one replaces the other
        schedule |= {"steps": None, "epochs": None}
    if "vision_layers" in given:
        schedule.pop("patch_layer", None)  # was meant for the preset's number of layers
    layers = {"preset": preset, "out": f"runs/{data}-{recipe}-{preset}"} | schedule | given
    sizes = {spec.name for spec in fields(ModelConfig)}
    try:
        model = replace(PRESETS[preset], **{k: v for k, v in layers.items() if k in sizes})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    run = {k: tuple(v) if isinstance(v, list) else v for k, v in layers.items() if k not in sizes}
    return TrainConfig(model=model, **run)


def check_loop(config: LoopConfig, given: set[str]) -> None:
    """Raise ConfigError, in one line, for what neither pretraining nor fine-tuning can go by."""
    if config.steps and config.epochs:
        raise ConfigError("--steps and --epochs contradict each other; give one")
    if grouping_of(config) != "random" and config.batch_size >= SEARCH_SIZE:
        raise ConfigError(
            f"--batch-size {config.batch_size}: --negatives {config.negatives} needs less than {SEARCH_SIZE}"
        )
    if config.data == "synthetic" and config.root:
        raise ConfigError("--root is for data from files; synthetic photos are drawn")
    if config.data != "synthetic" and "num_products" in given:
        raise ConfigError(f"--num-products is for synthetic photos, not for {config.data}")
    check_ranges(config)
    check_device(config.device)


def check_flags(config: TrainConfig, given: set[str]) -> None:
    """Raise ConfigError, in one line, for values out of range and for flags that contradict each other."""
    check_loop(config, given)
    if config.vocab and "vocab_size" in given:
        raise ConfigError("--vocab-size contradicts --vocab, which brings its own size")
    check_readers("recipe", config.recipe, given, RECIPE_FLAGS)
    if config.recipe == "softmask" and config.soft_mask and config.model.fusion_layers == 1:
        raise ConfigError("--soft-mask needs two or more --fusion-layers; add --no-soft-mask")
    if "oracle" in (config.patch_mask, config.word_mask) and config.data != "synthetic":
        raise ConfigError(f"--patch-mask and --word-mask oracle: what photos show is not known of {config.data}")
    if config.prompts and config.model.max_length < 16:
        raise ConfigError(f"--max-length {config.model.max_length}: --prompts need 16 at least, or no word is left")
    if config.model.alignment and not config.prompts:
        raise ConfigError("--alignment needs --prompts, which bring the category symbol; give --no-alignment too")


def learning_rate(step: int, config: LoopConfig, total_steps: int) -> float:
    """Linear warm-up to `lr`, then half a cosine down to `min_lr`, reached with the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, total_steps - 1 - config.warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def grouping_of(config: LoopConfig) -> SamplerMode:
    """How the sampler composes batches: as the negatives are chosen, where these are hard or semi-hard."""
    return config.negatives if config.negatives in ("hard", "semihard") else "random"


def ema_decay(step: int, decay: float) -> float:
    """The momentum model follows closely at first, (1 + s)/(10 + s), until its decay is reached (choice)."""
    return min(decay, (1 + step) / (10 + step))


def itm_hard_share(step: int, config: LoopConfig) -> float:
    """Share of the ITM negatives that are chosen rather than drawn at random. A curriculum (our choice): with hard
    negatives from the first step on ITM does not leave chance; with nothing else it forgets the easy ones."""
    if not config.itm_hard_warmup:
        return config.itm_hard_ratio
    return config.itm_hard_ratio * min(1.0, max(0.0, step / config.itm_hard_warmup - 1))
