"""Pretraining: run config and command line, one recipe per method, one flat loop.

    python train.py                                            tiny model, synthetic photos, a laptop
    python train.py --data fashiongen --root DIR               base model, FashionGen's files, a GPU
    python train.py --data jsonl --root DIR --preset tiny      one's own photos
    torchrun --nproc-per-node N train.py …                     N GPUs: see Ranks

What a run leaves in --out: config.json, metrics.jsonl, curves.png, masks.png, last.pt. Keys of metrics.jsonl:

    step, epoch                 optimiser steps done; passes over the training photos
    loss, itc, itm, mlm, mim    the objective and its parts, of that step's batch; itc and mim times their weights
    rtd, align                  parts of recipe fashionfine: replaced-token detection; category alignment (C-CmA)
    lr, temp, grad_norm         learning rate; contrastive temperature; gradient norm before clipping
    itm_accuracy, mlm_accuracy  on that step's batch (matching pairs and negatives; masked words)
    replaced_recall             of that batch's replaced words, the share that was detected (fashionfine)
    unreadable                  photos left out so far because they could not be decoded
    conflicts                   photos that share a batch of this epoch with one of their product or caption
    samples_per_second          photos trained on a second since the last line
    val_i2t_r1 … val_t2i_r10    held-out retrieval recall, photo to text and text to photo, by product
    val_mlm_accuracy            masked words of held-out photos restored (the run's ratio of random words)
    val_unreadable              held-out photos left out because they could not be decoded
    val_itm_accuracy            held-out pairs told from random wrong ones; chance is 0.5
    On synthetic photos, whose truth is known, also these; each with its value for random masks (or a random patch, or
    random batches and negatives) beside it as …_random, and for the hardest batches and negatives as …_hard:
    word_cooccurrence           of the masked words that name an attribute, the share of which this photo shows it
    detail_cooccurrence         the same for the small attributes alone: neither garment nor colour nor pattern
    attribute_share             of all masked words, the share that name an attribute
    patch_cooccurrence          of the masked patches, the share on the region of an attribute that the text names
    pointing, pointing_whole    is the most attended patch of a visible word in its region? details; garment and cloth
    visible_word_accuracy       of random masked words that name what the photo shows, the share restored (no …_random)
    unseen_word_accuracy        the same of words that name what it does not show
    false_negative_rate         share of the chosen ITM negatives whose text in fact describes the photo
    negative_similarity         mean cosine of the chosen ITM negatives: their hardness
    final, seconds, peak_memory_mib   last line only: training time over all resumes, validation excluded; peak memory
                                (of the first process)
"""

import argparse
import contextlib
import difflib
import json
import math
import os
import resource
import signal
import sys
import time
import types
import typing
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    ANTONYMS,
    DESCRIPTION,
    SYNONYMS,
    TOKEN_KEYS,
    Collate,
    DataError,
    DataName,
    PhotoDataset,
    Synthetic,
    Text,
    augment,
    build_dataset,
    build_tokenizer,
    encode,
    normalise,
    to_device,
    tokenize,
    word_ids,
    word_pairs,
    word_truth,
)
from losses import (
    NegativeMode,
    alignment_loss,
    cross_entropy,
    forbidden_negatives,
    itc_loss,
    itc_targets,
    itm_loss,
    mim_loss,
    mlm_loss,
    pick_negatives,
)
from masking import (
    HeadReduction,
    PatchScore,
    WordScore,
    block_patch_mask,
    cooccurrence,
    corrupt_words,
    pointing,
    random_patch_mask,
    random_word_mask,
    reduce_heads,
    replace_words,
    soft_mask,
    sync_mask,
)
from model import PRESETS, FeatureQueue, ModelConfig, MomentumModel, VisionLanguageModel, WeightsError, load_pretrained
from sampler import GroupedBatchSampler, SamplerMode, chain

PatchMask = Literal["random", "block", "sync"]
WordMask = Literal["random", "sync"]
MaskSource = Literal["attention", "gradcam", "hidden"]


class ConfigError(ValueError):
    """Flags that do not fit together, or a checkpoint that does not fit the flags."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


# ------------------------------------------------------------------------------- config and command line


def option(default, help: str, low: float | None = None, high: float | None = None, **metadata):
    """A config field with what the command line needs: help and the allowed range."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, **metadata})


@dataclass(frozen=True)
class LoopConfig:
    """What the loop reads: where it writes, how long, how fast, on what. Shared by pretraining and fine-tuning."""

    out: str | None = option(None, "output folder (default runs/<data>-<recipe or task>-<preset>)")
    resume: bool = option(False, "go on from last.pt in the output folder")
    stop_at: int | None = option(None, "save and stop after this step; --resume goes on", low=1)
    seed: int = option(0, "of everything random", low=0)

    steps: int | None = option(None, "optimiser steps; either this or --epochs", low=1)
    epochs: int | None = option(None, "passes over the training photos", low=1)
    batch_size: int = option(64, "photos a batch, of all processes together", low=2)
    accumulate: int = option(
        1, "batches a step; negatives still come from one batch (and the queue), so it only saves memory", low=1
    )
    lr: float = option(1e-4, "peak learning rate", low=0)
    final_lr: float = option(1e-5, "learning rate at the end of the cosine", low=0)
    warmup: int = option(500, "steps of linear warm-up", low=0)
    weight_decay: float = option(0.02, "AdamW's, not on biases, norms, embeddings", low=0)
    clip: float = option(1.0, "largest gradient norm", low=1e-9)
    ema_decay: float = option(0.995, "decay of the momentum model", low=0, high=1)
    alpha: float = option(
        0.4, "share of momentum soft targets in ITC and MLM, ramped up over the first epoch", low=0, high=1
    )
    queue: int = option(0, "momentum features kept as further ITC negatives", low=0)
    itm_negatives: NegativeMode = option("similar", "how ITM negatives are chosen in the batch")
    itm_share: float = option(1.0, "share of the ITM negatives chosen so; the others are random", low=0, high=1)
    itm_warmup: int = option(0, "steps with random ITM negatives; in as many more the share grows to that", low=0)
    sampler: SamplerMode = option("random", "how photos are grouped to batches, from the second epoch on")
    search_size: int = option(1920, "photos in which the grouping looks for similar ones", low=2)
    margin: float = option(
        0.0, "semihard groups and negatives: how much less similar than the own pair, as a cosine", low=0, high=2
    )
    crop_scale: float = option(0.5, "smallest area share of the random crop", low=0.01, high=1)
    color_jitter: float = option(0.0, "strength of colour jitter; 0, since captions name colours", low=0, high=1)
    distort: float = option(0.0, "strength of rotation, shear, blur and noise", low=0, high=1)
    focal_gamma: float = option(0.0, "γ of focal ITC: how much less the easy pairs count; 0: plain ITC", low=0)
    itc_weight: float = option(1.0, "weight of ITC in the loss", low=0)

    products: int = option(2500, "synthetic training products", low=2)
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to run: cpu, cuda, cuda:1, …")
    precision: Literal["fp32", "bf16"] = option("fp32", "bf16: autocast")
    compile: bool = option(False, "torch.compile the encoders")
    workers: int = option(0, "data loading processes, for each process that trains", low=0)
    log_every: int = option(10, "steps between training lines in metrics.jsonl", low=1)
    val_every: int = option(200, "steps between validations", low=1)
    val_products: int = option(1000, "held-out products to validate on, at most", low=2)
    save_every: int = option(200, "steps between checkpoints; one is also saved before each validation", low=1)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """A pretraining run. Every field is a flag; so is every field of `ModelConfig`."""

    data: DataName = option("synthetic", "data set")
    root: str | None = option(None, "folder of the data set (default data/<data>)")
    recipe: Literal["syncmask", "softmask", "fashionfine", "albef"] = option("syncmask", "method")
    preset: Literal["tiny", "small", "base"] = option(
        "tiny", "sizes and schedule; unless given, synthetic: tiny, jsonl: small, fashiongen: base"
    )
    prompts: bool = option(False, "put the category symbol and attribute prompts around the descriptions to train on")
    mlm_ratio: float = option(0.15, "share of the words that MLM masks", low=0, high=1)
    mim_ratio: float = option(0.5, "share of the patches that MIM masks", low=0, high=1)
    mim_weight: float = option(1.0, "weight of MIM in the loss", low=0)
    patch_mask: PatchMask = option("sync", "how MIM chooses patches: at random, in random blocks, synchronized")
    word_mask: WordMask = option("sync", "how MLM chooses words: at random, synchronized")
    mask_source: MaskSource = option(
        "hidden",
        "synchronized masks come from the momentum cross-attention (attention), from it times the gradient of the match"
        " logit (gradcam), or from that of each word while it is hidden (hidden)",
    )
    mask_layer: int = option(
        0, "fusion layer that is read, from 1 on; 0: what all agree on, for soft masks the middle one", low=0
    )
    mask_heads: HeadReduction = option("mean", "how its heads are put together")
    word_score: WordScore = option("entropy", "what makes a word worth masking, see masking.sync_mask")
    patch_score: PatchScore = option(
        "masked", "whose attention makes a patch worth masking: all words', the masked ones'"
    )
    mask_noise: float = option(0.1, "noise on the scores, in deviations of a row", low=0)
    mask_hint: float = option(0.0, "share of the pairs that keep random masks", low=0, high=1)
    mask_warmup: int = option(0, "steps with random masks, until attention means something", low=0)
    soft_mask: bool = option(True, "one more match for ITM: the photo with what one word is about suppressed")
    mask_text: bool = option(True, "masked text for ITC and ITM too, not for MLM alone")

    vocab: str | None = option(None, "a BERT vocab.txt instead of a vocabulary trained on the captions")
    vision_weights: str | None = option(None, "ViT weights to start from (Hugging Face, timm, DeiT, MAE naming)")
    text_weights: str | None = option(None, "BERT weights to start from; needs --vocab")
    weights: str | None = option(None, "a whole ALBEF checkpoint to start from; needs --vocab")


SCHEDULES = {
    # in so few steps soft targets only slow MLM down, and ITM negatives drawn by similarity, of which many are false,
    # undo what the random ones have taught
    "tiny": dict(steps=520, lr=1e-3, final_lr=1e-5, warmup=50, ema_decay=0.99, alpha=0.0, mlm_ratio=0.5,
                 itm_negatives="random", itm_share=0.5, itm_warmup=100, mask_warmup=100, mim_weight=0.5,
                 crop_scale=0.8),
    "small": dict(epochs=20, batch_size=128, lr=3e-4, queue=16384, mlm_ratio=0.3, itm_warmup=1000,
                  mask_warmup=1000, workers=4),
    "base": dict(epochs=30, queue=65536, workers=8, itm_warmup=1000, mask_warmup=2000),
}  # fmt: skip
# What a recipe sets over its preset, and what it sets for one preset alone. All of syncmask's are choices, those of the
# model and of the masks made on the truth of the synthetic photos; no queue beside grouped batches, as GRIT-VLP.
RECIPE_DEFAULTS = {
    "syncmask": dict(mlm_ratio=0.3, mask_hint=0.4, sampler="semihard", itm_negatives="semihard", margin=0.2, queue=0,
                     registers=4, cls_context=False),
    "syncmask tiny": dict(patch_layer=2),
    "softmask": dict(focal_gamma=2.0, distort=0.5, mask_source="gradcam"),
    "softmask tiny": dict(mlm_ratio=0.3),  # half of the words, as otherwise, would leave ITC too little to read
    "fashionfine": dict(prompts=True, local_image=0.05, local_text=0.25, alignment=True, detector=True,
                        focal_gamma=2.0, itc_weight=0.25, max_length=180),
    "fashionfine tiny": dict(mlm_ratio=0.3, max_length=96),
    "fashionfine base": dict(epochs=10, lr=6e-5),
    "albef": {},
}  # fmt: skip
# flags that only some recipes read
RECIPE_FLAGS = {
    "syncmask": {"mim_weight", "mim_layers", "patch_mask", "word_mask", "mask_noise", "mask_hint", "mask_warmup"},
    "softmask": {"soft_mask", "mask_text"},
    "fashionfine": {"local_image", "local_text", "alignment", "detector"},
}
DEFAULT_PRESET = {"synthetic": "tiny", "jsonl": "small", "fashiongen": "base"}
# What a resumed run may change: nothing that decides its result. (The number of processes decides what is drawn.)
FREE_ON_RESUME = {"out", "root", "resume", "stop_at", "device", "workers", "log_every", "save_every"}


class OneLineParser(argparse.ArgumentParser):
    """Refuses with one line instead of a page of usage, and suggests the flag that was meant."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            flag = message.split()[2].split("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
            close = difflib.get_close_matches(flag, known, n=1)
            message = f"unknown flag {flag}" + (f"; did you mean {close[0]}?" if close else "; see --help")
        self.exit(2, f"{self.prog}: {message}\n")


def add_flags(parser: argparse.ArgumentParser, config_class: type, layers: dict[str, dict]) -> None:
    """One flag for each field of a config dataclass; a flag that is not given leaves no trace.

    layers: what overrides the defaults under which name, for --help alone."""
    hints = typing.get_type_hints(config_class)
    for spec in fields(config_class):
        if "help" not in spec.metadata:
            continue
        flag, kind = "--" + spec.name.replace("_", "-"), hints[spec.name]
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kind = next(part for part in typing.get_args(kind) if part is not type(None))
        defaults = [str(spec.default)] if spec.default is not None else []
        defaults += [f"{name} {layer[spec.name]}" for name, layer in layers.items() if spec.name in layer]
        text = spec.metadata["help"] + (f" (default {', '.join(defaults)})" if defaults else "")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        elif typing.get_origin(kind) is Literal:
            parser.add_argument(flag, choices=typing.get_args(kind), default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, type=kind, metavar=kind.__name__, default=argparse.SUPPRESS, help=text)


def check_ranges(config: LoopConfig) -> None:
    """Raise ConfigError for a field outside the range its metadata gives, or for two lengths of the run."""
    if config.steps and config.epochs:
        raise ConfigError("--steps and --epochs contradict each other; give one")
    if config.sampler != "random" and config.search_size <= config.batch_size:
        raise ConfigError(f"--search-size {config.search_size} groups nothing unless it is above --batch-size")
    for spec in fields(config):
        value, low, high = getattr(config, spec.name), spec.metadata.get("low"), spec.metadata.get("high")
        if value is None or (low is None and high is None):
            continue
        if not (low if low is not None else -math.inf) <= value <= (high if high is not None else math.inf):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"--{spec.name.replace('_', '-')} {value}: must be {bounds}")


def parse_config(argv: list[str] | None = None) -> tuple[TrainConfig, set[str]]:
    """Command line -> config, names of the flags given. Precedence: defaults < preset < recipe < flags."""
    parser = OneLineParser("train.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    layers = SCHEDULES | RECIPE_DEFAULTS
    add_flags(parser, TrainConfig, layers)
    add_flags(parser.add_argument_group("sizes of the model (defaults: tiny's)"), ModelConfig, layers)
    given = vars(parser.parse_args(argv))
    config = layer_config(given)
    if not config.resume:  # otherwise the checkpoint has a say first
        check_flags(config, given)
    return config, set(given)


def layer_config(given: dict) -> TrainConfig:
    """defaults < preset < recipe < `given`, for the run and for its model."""
    data = given.get("data", "synthetic")
    preset = given.get("preset", DEFAULT_PRESET[data])
    recipe = given.get("recipe", TrainConfig.recipe)
    schedule = SCHEDULES[preset] | RECIPE_DEFAULTS[recipe] | RECIPE_DEFAULTS.get(f"{recipe} {preset}", {})
    if "steps" in given or "epochs" in given:  # the one replaces the other
        schedule.pop("steps", None), schedule.pop("epochs", None)
    if "vision_layers" in given:
        schedule.pop("patch_layer", None)  # was meant for the preset's number of layers
    layers, sizes = schedule | given, {spec.name for spec in fields(ModelConfig)}
    try:
        model = replace(PRESETS[preset], **{k: v for k, v in layers.items() if k in sizes})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    run = {k: v for k, v in layers.items() if k not in sizes}
    config = TrainConfig(**{"preset": preset, "model": model, **run})
    return config if config.out else replace(config, out=f"runs/{config.data}-{config.recipe}-{preset}")


def check_flags(config: TrainConfig, given: dict) -> None:
    """Raise ConfigError, in one line, for values out of range and for flags that contradict each other."""
    check_ranges(config)
    if config.data == "synthetic" and config.root:
        raise ConfigError("--root is for data from files; synthetic photos are drawn")
    if config.data != "synthetic" and "products" in given:
        raise ConfigError(f"--products is for synthetic photos, not for {config.data}")
    if config.vocab and "vocab_size" in given:
        raise ConfigError("--vocab-size contradicts --vocab, which brings its own size")
    if (config.text_weights or config.weights) and not config.vocab:
        raise ConfigError("--text-weights and --weights need --vocab: word embeddings belong to their vocabulary")
    if config.weights and (config.text_weights or config.vision_weights):
        raise ConfigError("--weights contradicts --vision-weights and --text-weights; it holds both")
    for recipe, flags in RECIPE_FLAGS.items():
        if foreign := sorted(flags & set(given)) if config.recipe != recipe else None:
            raise ConfigError(f"--{foreign[0].replace('_', '-')} is for --recipe {recipe}, not for {config.recipe}")
    deepest = config.model.fusion_layers
    if config.mask_layer > deepest:
        raise ConfigError(f"--mask-layer {config.mask_layer}: there are {deepest} fusion layers")
    if config.mask_source == "gradcam":  # only [CLS] of the last layer reaches the match logit
        if deepest == 1:
            raise ConfigError("--mask-source gradcam needs two --fusion-layers, since it cannot read the last")
        if config.mask_layer == deepest:
            raise ConfigError(f"--mask-layer {deepest}: --mask-source gradcam cannot read the last layer")
        if config.compile:
            raise ConfigError("--compile contradicts --mask-source gradcam, which needs the gradient inside the fusion")
    if config.recipe == "softmask" and config.soft_mask and not 0 <= config.mask_layer < deepest > 1:
        raise ConfigError("soft masks need a --mask-layer before the last of two or more --fusion-layers")
    if config.prompts and config.model.max_length < 16:
        raise ConfigError(f"--max-length {config.model.max_length}: --prompts need 16 at least, or no word is left")
    if config.model.alignment and not config.prompts:
        raise ConfigError("--alignment needs --prompts, which bring the category symbol; give --no-alignment too")
    check_device(config.device)


def check_device(name: str) -> None:
    """Raise ConfigError for a device that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: no such kind of device; try cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: cpu or cuda")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"--device {name}: no such GPU on this machine; try --device cpu")


# ------------------------------------------------------------------------------------- several processes


class Exchange(torch.autograd.Function):
    """Rows (n, …) sent to the ranks, so many to each; gradients come back the same way (PyTorch deprecates its own)."""

    @staticmethod
    def forward(ctx, x: Tensor, given: list[int], taken: list[int]) -> Tensor:
        ctx.given, ctx.taken = given, taken
        received = x.new_empty(sum(taken), *x.shape[1:])
        dist.all_to_all_single(received, x.contiguous(), taken, given)
        return received

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return Exchange.apply(grad, ctx.taken, ctx.given), None, None


def speak_up() -> None:
    """Give a silent process its voice back, for an error."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


@dataclass
class Ranks:
    """The processes that torchrun started, as one of them sees them. Each has the whole model and a share of every
    batch, and together they do what one process would with the whole batch; the random draws alone differ.

    Alone a process is rank 0 of 1, and nothing here does anything. Where one rank cannot read a single photo of its
    share, all pass over the batch.
    """

    device: torch.device = torch.device("cpu")
    rank: int = 0
    count: int = 1
    rows: list[int] = field(default_factory=lambda: [0])  # photos of the batch under way, rank by rank
    patient: dist.ProcessGroup | None = None  # for waiting longer than a collective may take

    @classmethod
    def join(cls, device: str) -> "Ranks":
        """Meet the others: over NCCL with a GPU each, over Gloo on CPUs. All but the first fall silent."""
        where = torch.device(device)
        if not dist.is_torchelastic_launched():
            return cls(where)
        count, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
        if where.type == "cuda":
            if where.index is not None:
                raise ConfigError(f"--device {device}: torchrun gives each process its own GPU; say cuda")
            if local >= torch.cuda.device_count():
                raise ConfigError(f"torchrun started more processes than there are GPUs, {torch.cuda.device_count()}")
            where = torch.device("cuda", local)
            torch.cuda.set_device(where)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
            if dist.get_rank():
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                sys.excepthook = lambda *error: (speak_up(), sys.__excepthook__(*error))
        patient = dist.new_group(backend="gloo", timeout=timedelta(hours=6))
        return cls(where, dist.get_rank(), count, [0] * count, patient)

    @property
    def leads(self) -> bool:
        """Whether it is this one that validates, writes and speaks."""
        return self.rank == 0

    @property
    def first(self) -> int:
        """Where this rank's rows begin in the whole batch."""
        return sum(self.rows[: self.rank])

    def part(self, batch: list[int]) -> list[int]:
        """This rank's share of a batch of indices."""
        start, stop = (len(batch) * rank // self.count for rank in (self.rank, self.rank + 1))
        return batch[start:stop]

    def agree(self, batch: dict) -> dict:
        """This rank's share of a batch as it enters the step: texts as long as the longest of all ranks, everyone's
        unreadable photos; how many rows there are is noted in `rows`."""
        if self.count == 1:
            self.rows = [len(batch["rows"])]
            return batch
        longest = batch["token_ids"].shape[1] if len(batch["rows"]) else 0
        mine = torch.tensor([len(batch["rows"]), longest, len(batch["unreadable"])], device=self.device)
        all_of_them = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(all_of_them, mine)
        self.rows, lengths, unreadable = torch.stack(all_of_them).T.tolist()
        if any(unreadable):
            reasons: list = [None] * self.count
            dist.all_gather_object(reasons, batch["unreadable"])
            batch["unreadable"] = sum(reasons, [])
        texts = {key: F.pad(batch[key], [0, max(lengths) - longest]) for key in TOKEN_KEYS if key in batch}
        return batch | texts

    def gather(self, x: Tensor) -> Tensor:
        """x (B, …) of every rank, one after the other; without gradients."""
        if self.count == 1:
            return x
        most = max(self.rows)  # ranks may differ by a row, collectives may not
        parts = [x.new_empty(most, *x.shape[1:]) for _ in self.rows]
        dist.all_gather(parts, F.pad(x, [0, 0] * (x.ndim - 1) + [0, most - len(x)]))
        return torch.cat([part[:rows] for part, rows in zip(parts, self.rows, strict=True)])

    def fetch(self, x: Tensor, wanted: Tensor) -> Tensor:
        """Rows `wanted` (B,) of the whole batch of x (B, …), each from the rank that has it; gradients go back there.
        Less travels than in gathering: what a rank receives does not grow with their number."""
        if self.count == 1:
            return x[wanted]
        wanted, order = wanted.sort()  # so that what one rank gives lies together
        asked = self.gather(wanted)
        rows = torch.tensor(self.rows, device=x.device)
        asking = torch.arange(self.count, device=x.device).repeat_interleave(rows)
        giving = torch.bucketize(asked, rows.cumsum(0), right=True)
        traffic = torch.bincount(asking * self.count + giving, minlength=self.count**2).view(self.count, -1).tolist()
        given, taken = [line[self.rank] for line in traffic], traffic[self.rank]
        return Exchange.apply(x[asked[giving == self.rank] - self.first], given, taken)[order.argsort()]

    def mean(self, value: Tensor, terms: Tensor | int) -> Tensor:
        """A mean over so many `terms` (or the True ones) of this rank, weighted so that the plain mean of all ranks'
        values, which is what DistributedDataParallel makes of gradients, is the mean over all terms of all ranks."""
        if self.count == 1:
            return value
        mine = torch.as_tensor(terms, device=self.device).sum().float()
        total = mine.clone()
        dist.all_reduce(total)
        return value * (self.count * mine / total.clamp(min=1))

    def average(self, values: dict[str, Tensor]) -> dict[str, float]:
        """The plain mean of each over all ranks."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        if self.count > 1:
            dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.count).tolist(), strict=True))

    def on_any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if self.count == 1:
            return flag
        flags = torch.tensor([flag], device=self.device, dtype=torch.int)
        dist.all_reduce(flags)
        return bool(flags.item())

    def wait(self) -> None:
        """Until all are here, however long it takes."""
        if self.count > 1:
            dist.barrier(self.patient)

    def first_says(self, what):
        """What the first rank has there."""
        said = [what]
        if self.count > 1:
            dist.broadcast_object_list(said)
        return said[0]

    def check_same(self, what: str, number: int) -> None:
        """Raise ConfigError where ranks do not have the same number."""
        if self.on_any(self.first_says(number) != number):
            raise ConfigError(f"{what} differ from process to process; are flags, data and --out the same everywhere?")

    def parallel(self, step: nn.Module) -> nn.Module:
        """The same step, whose backward pass also averages gradients over the ranks."""
        # static_graph: most recipes leave the MIM decoder unused, but each step uses what the first one did
        return DistributedDataParallel(step, static_graph=True) if self.count > 1 else step


# ---------------------------------------------------------------------------------------------- the run


@dataclass
class Run:
    """Everything a recipe, or a task of finetune.py, may use besides the batch."""

    config: TrainConfig  # or finetune.py's: what both have is LoopConfig
    tokenizer: Tokenizer
    model: VisionLanguageModel
    momentum: MomentumModel
    queue: FeatureQueue
    optimizer: torch.optim.Optimizer
    device: torch.device
    total_steps: int
    epoch_steps: float  # optimiser steps in one pass over the photos
    data: int = 0  # fingerprint of the training photos
    step: int = 0
    seconds: float = 0.0
    unreadable: set[str] = field(default_factory=set)
    generator: torch.Generator | None = None
    features: tuple[Tensor, Tensor] | None = None  # of the batch under way, for the sampler
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self):
        self.mask_id = self.tokenizer.token_to_id("[MASK]")
        self.word_ids = word_ids(self.tokenizer).to(self.device)
        self.antonyms, self.synonyms = (word_pairs(self.tokenizer, w).to(self.device) for w in (ANTONYMS, SYNONYMS))

    @property
    def ramp(self) -> float:
        """From 0 to 1 over the first epoch, linearly."""
        return min(1.0, self.step / self.epoch_steps)

    @property
    def alpha(self) -> float:
        """Share of the momentum soft targets, ramped up over the first epoch (ALBEF)."""
        return self.config.alpha * self.ramp

    @property
    def hard_share(self) -> float:
        """Share of the ITM negatives that are chosen rather than drawn at random. A curriculum (choice): with hard
        ones from the first step on ITM does not leave chance, and with nothing but hard ones it forgets the easy."""
        warmup = self.config.itm_warmup
        return self.config.itm_share * min(1.0, max(0.0, (self.step - warmup) / max(1, warmup)) if warmup else 1.0)

    def negatives(self, sim: Tensor, forbidden: Tensor) -> Tensor:
        """`pick_negatives` of logits (B, K), as the config says at this step."""
        mode, margin = self.config.itm_negatives, self.config.margin / self.model.temp.detach()
        own_pair = sim.diagonal(self.ranks.first)  # the batch's columns begin with those of the ranks before
        chosen = pick_negatives(sim, forbidden, own_pair, mode, self.generator, margin)
        drawn = pick_negatives(sim, forbidden, None, "random", self.generator)
        hard = torch.rand(len(sim), device=sim.device, generator=self.generator) < self.hard_share
        return torch.where(hard, chosen, drawn)

    def corrupt(self, token_ids: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """`corrupt_words` with this run's vocabulary and generator."""
        return corrupt_words(token_ids, word_mask, self.mask_id, self.word_ids, self.generator)

    def replace_words(self, token_ids: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`replace_words` with this run's vocabulary and generator."""
        tables = self.mask_id, self.word_ids, self.antonyms, self.synonyms
        return replace_words(token_ids, words, word_mask, *tables, self.generator)


# ------------------------------------------------------------------------------------------- the recipes


def albef(run: Run, batch: dict) -> tuple[dict[str, Tensor], dict[str, float | Tensor]]:
    """ALBEF (Li et al. 2021): ITC + ITM + MLM with momentum soft targets. -> losses, figures to log.

    Forward passes a step, in photos or captions: image B; text 2B (clean, masked); fusion 4B in one call (B matching,
    2B not, B masked; for the first 3B, which only ITM reads, the last layer makes [CLS] alone). Momentum: image B, text
    2B, fusion B (masked); text and fusion of the masked half only while alpha > 0.
    """
    config, model, momentum = run.config, run.model, run.momentum
    ids, keep = batch["token_ids"], batch["attention_mask"]
    count = len(ids)

    # encode: clean and masked captions share one call
    word_mask = random_word_mask(batch["words"], config.mlm_ratio, run.generator)
    masked_ids, mlm_labels = run.corrupt(ids, word_mask)
    image_embeds = model.encode_image(batch["images"])
    text_embeds, masked_embeds = model.encode_text(torch.cat([ids, masked_ids]), torch.cat([keep, keep])).chunk(2)
    with torch.no_grad():
        image_embeds_m = momentum.encode_image(batch["images"])
        text_embeds_m = momentum.encode_text(ids, keep)

    # contrast
    image_feat, text_feat = model.project_image(image_embeds), model.project_text(text_embeds)
    image_feat_m, text_feat_m = momentum.project_image(image_embeds_m), momentum.project_text(text_embeds_m)
    itc, sim_i2t, sim_t2i = contrast(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

    # fuse: matching pairs, each photo with a wrong text, each text with a wrong photo, masked text with its photo
    wrong = wrong_pairs(run, batch, sim_i2t, sim_t2i, text_embeds, image_embeds)
    own = torch.arange(count, device=run.device)
    paired, filled = model.fuse(
        torch.cat([text_embeds, wrong.text_embeds, text_embeds, masked_embeds]),
        torch.cat([keep, wrong.keep, keep, keep]),
        wrong.photos,
        photos=torch.cat([own, own, wrong.places, own]),
        only_cls=3 * count,
    )

    # losses
    itm_labels = torch.cat([torch.ones_like(own), wrong.labels])
    itm_logits = model.itm_logits(paired)
    chosen = mlm_labels != -100
    mlm_logits, labels = model.mlm_logits(filled[chosen]), mlm_labels[chosen]  # (M, V), (M,)
    mlm_logits_m = None
    if run.alpha > 0:
        with torch.no_grad():
            fused_m = momentum.fuse(momentum.encode_text(masked_ids, keep), keep, image_embeds_m)
            mlm_logits_m = momentum.mlm_logits(fused_m[chosen])
    losses = {
        "itc": itc,
        "itm": run.ranks.mean(itm_loss(itm_logits, itm_labels), itm_labels >= 0),
        "mlm": run.ranks.mean(mlm_loss(mlm_logits, labels, mlm_logits_m, run.alpha), chosen),
    }
    return losses, accuracies(run, itm_logits, itm_labels, mlm_logits, labels)


def syncmask(run: Run, batch: dict) -> tuple[dict[str, Tensor], dict[str, float | Tensor]]:
    """SyncMask (Song et al. 2024): ITC + ITM + MLM + MIM, both masks from the momentum model's cross-attention.

    Choices: how the attention becomes masks, the form of MIM (masked photo, clean text, a pass of its own), its weight.
    Forward passes a step, in photos or captions: image B, and half of the patches of B (visible ones); text 2B (clean,
    masked); fusion 4B in one call (B matching, 2B not, B masked); decoder B. Momentum: image B, text B, and for the
    masks text and fusion 2B (source hidden) or fusion B (the others); with alpha > 0 text and fusion B more.
    """
    config, model, momentum = run.config, run.model, run.momentum
    ids, keep = batch["token_ids"], batch["attention_mask"]
    count = len(ids)

    # mask: what the momentum model finds in both, the photo and the text
    with torch.no_grad():
        image_embeds_m = momentum.encode_image(batch["images"])
        text_embeds_m = momentum.encode_text(ids, keep)
    patch_mask, word_mask = choose_masks(run, batch, image_embeds_m, text_embeds_m)
    masked_ids, mlm_labels = run.corrupt(ids, word_mask)

    # encode: clean and masked captions share one call; of the masked photos only the visible patches
    visible = (~patch_mask).nonzero()[:, 1].view(count, -1)  # (B, K)
    image_embeds = model.encode_image(batch["images"])
    visible_embeds = model.encode_image(batch["images"], visible)
    text_embeds, masked_embeds = model.encode_text(torch.cat([ids, masked_ids]), torch.cat([keep, keep])).chunk(2)

    # contrast
    image_feat, text_feat = model.project_image(image_embeds), model.project_text(text_embeds)
    image_feat_m, text_feat_m = momentum.project_image(image_embeds_m), momentum.project_text(text_embeds_m)
    itc, sim_i2t, sim_t2i = contrast(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

    # fuse: matching pairs, each photo with a wrong text, each text with a wrong photo, masked text with its photo
    wrong = wrong_pairs(run, batch, sim_i2t, sim_t2i, text_embeds, image_embeds)
    own = torch.arange(count, device=run.device)
    paired, filled = model.fuse(
        torch.cat([text_embeds, wrong.text_embeds, text_embeds, masked_embeds]),
        torch.cat([keep, wrong.keep, keep, keep]),
        wrong.photos,
        photos=torch.cat([own, own, wrong.places, own]),
        only_cls=3 * count,
    )
    # reconstruct: masked photo with its text
    pixels = model.reconstruct_patches(visible_embeds, visible, text_embeds, keep)

    # losses
    itm_labels = torch.cat([torch.ones_like(own), wrong.labels])
    itm_logits = model.itm_logits(paired)
    chosen = mlm_labels != -100
    mlm_logits, labels = model.mlm_logits(filled[chosen]), mlm_labels[chosen]  # (M, V), (M,)
    mlm_logits_m = None
    if run.alpha > 0:
        with torch.no_grad():
            fused_m = momentum.fuse(momentum.encode_text(masked_ids, keep), keep, image_embeds_m)
            mlm_logits_m = momentum.mlm_logits(fused_m[chosen])
    losses = {
        "itc": itc,
        "itm": run.ranks.mean(itm_loss(itm_logits, itm_labels), itm_labels >= 0),
        "mlm": run.ranks.mean(mlm_loss(mlm_logits, labels, mlm_logits_m, run.alpha), chosen),
        "mim": run.ranks.mean(config.mim_weight * mim_loss(pixels, batch["images"], patch_mask), patch_mask),
    }
    return losses, accuracies(run, itm_logits, itm_labels, mlm_logits, labels)


def softmask(run: Run, batch: dict) -> tuple[dict[str, Tensor], dict[str, float | Tensor]]:
    """Text-driven soft masks (Park & Han 2023): focal ITC + ITM with a soft-masked photo as one more match + MLM, on
    masked text and distorted photos. -> losses, figures to log.

    Choice: ITC, ITM and MLM read one encoding of the masked text, so MLM needs no pass of its own.
    Forward passes a step, in photos or captions: image B; text B (masked; with --no-mask-text 2B); fusion B matching,
    with its attention, and 3B in one call (2B not, B soft-masked; with --no-mask-text B masked more). Momentum: image
    B, text B; with alpha > 0 text and fusion B more.
    """
    config, model, momentum = run.config, run.model, run.momentum
    ids, keep = batch["token_ids"], batch["attention_mask"]
    count = len(ids)

    # encode: the masked text serves all objectives; the momentum model sees the clean one
    word_mask = random_word_mask(batch["words"], config.mlm_ratio, run.generator)
    masked_ids, mlm_labels = run.corrupt(ids, word_mask)
    image_embeds = model.encode_image(batch["images"])
    masked_embeds = model.encode_text(masked_ids, keep)
    text_embeds = masked_embeds if config.mask_text else model.encode_text(ids, keep)
    with torch.no_grad():
        image_embeds_m = momentum.encode_image(batch["images"])
        text_embeds_m = momentum.encode_text(ids, keep)

    # contrast
    image_feat, text_feat = model.project_image(image_embeds), model.project_text(text_embeds)
    image_feat_m, text_feat_m = momentum.project_image(image_embeds_m), momentum.project_text(text_embeds_m)
    itc, sim_i2t, sim_t2i = contrast(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

    # fuse: matching pairs; each photo with a wrong text, each text with a wrong photo; and, as far as switched on, the
    # photo without what one word is about, and masked text with its photo
    wrong = wrong_pairs(run, batch, sim_i2t, sim_t2i, text_embeds, image_embeds)
    own = torch.arange(count, device=run.device)
    matching = model.fuse(text_embeds, keep, image_embeds, return_attention=config.soft_mask)
    matching, attentions = matching if config.soft_mask else (matching, [])
    pairs, photos = [(wrong.text_embeds, wrong.keep, own), (text_embeds, keep, wrong.places)], wrong.photos
    if config.soft_mask:
        readable = batch["words"] & ~word_mask if config.mask_text else batch["words"]
        pairs += [(text_embeds, keep, own + len(photos))]
        photos = torch.cat([photos, soften(run, readable, matching, attentions, image_embeds)])
    only_cls = len(pairs) * count
    if not config.mask_text:
        pairs += [(masked_embeds, keep, own)]
    texts, keeps, seen = map(torch.cat, zip(*pairs, strict=True))
    paired, filled = model.fuse(texts, keeps, photos, photos=seen, only_cls=only_cls)
    filled = matching if config.mask_text else filled  # from where masked words are predicted

    # losses
    itm_labels = torch.cat([torch.ones_like(own), wrong.labels, own.new_ones(count * config.soft_mask)])
    itm_logits = model.itm_logits(torch.cat([matching[:, :1], paired]))
    chosen = mlm_labels != -100
    mlm_logits, labels = model.mlm_logits(filled[chosen]), mlm_labels[chosen]  # (M, V), (M,)
    mlm_logits_m = None
    if run.alpha > 0:
        with torch.no_grad():
            fused_m = momentum.fuse(momentum.encode_text(masked_ids, keep), keep, image_embeds_m)
            mlm_logits_m = momentum.mlm_logits(fused_m[chosen])
    losses = {
        "itc": itc,
        "itm": run.ranks.mean(itm_loss(itm_logits, itm_labels), itm_labels >= 0),
        "mlm": run.ranks.mean(mlm_loss(mlm_logits, labels, mlm_logits_m, run.alpha), chosen),
    }
    return losses, accuracies(run, itm_logits, itm_labels, mlm_logits, labels)


def fashionfine(run: Run, batch: dict) -> tuple[dict[str, Tensor], dict[str, float | Tensor]]:
    """Fashion-FINE (Jin et al. 2024): focal ITC on features with local tokens in them (MAA, HNM-F) + ITM + the category
    symbol and phrases aligned with the photo (C-CmA) + MLM + replaced-token detection. -> losses, figures to log.

    As in the authors' code all objectives read one text, some of whose words are masked and some replaced, and only
    online features have local tokens in them. Choices: the momentum model reads the clean text; C-CmA's start.
    Forward passes a step, in photos or captions: image B; text B (masked); fusion 3B in one call (B matching, 2B not).
    Momentum: image B, text B.
    """
    config, model, momentum = run.config, run.model, run.momentum
    ids, keep = batch["token_ids"], batch["attention_mask"]
    count = len(ids)

    # encode: the corrupted text serves all objectives; the momentum model sees the clean one
    word_mask = random_word_mask(batch["words"], config.mlm_ratio, run.generator)
    masked_ids, mlm_labels, replaced = run.replace_words(ids, batch["words"], word_mask)
    image_embeds = model.encode_image(batch["images"])
    text_embeds = model.encode_text(masked_ids, keep)
    with torch.no_grad():
        image_embeds_m = momentum.encode_image(batch["images"])
        text_embeds_m = momentum.encode_text(ids, keep)

    # contrast: integrated features with momentum keys of [CLS] alone
    image_feat, text_feat = model.image_feature(image_embeds), model.text_feature(text_embeds, keep)
    image_feat_m, text_feat_m = momentum.project_image(image_embeds_m), momentum.project_text(text_embeds_m)
    itc, sim_i2t, sim_t2i = contrast(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

    # fuse: matching pairs, each photo with a wrong text, each text with a wrong photo
    wrong = wrong_pairs(run, batch, sim_i2t, sim_t2i, text_embeds, image_embeds)
    own = torch.arange(count, device=run.device)
    paired, matching = model.fuse(
        torch.cat([wrong.text_embeds, text_embeds, text_embeds]),
        torch.cat([wrong.keep, keep, keep]),
        wrong.photos,
        photos=torch.cat([own, wrong.places, own]),
        only_cls=2 * count,
    )

    # losses: masked words are predicted, and replaced ones detected, from the matching pairs
    itm_labels = torch.cat([torch.ones_like(own), wrong.labels])
    itm_logits = model.itm_logits(torch.cat([matching[:, :1], paired]))
    chosen = mlm_labels != -100
    mlm_logits, labels = model.mlm_logits(matching[chosen]), mlm_labels[chosen]  # (M, V), (M,)
    losses = {
        "itc": itc,
        "itm": run.ranks.mean(itm_loss(itm_logits, itm_labels), itm_labels >= 0),
        "mlm": run.ranks.mean(mlm_loss(mlm_logits, labels), chosen),
    }
    figures = accuracies(run, itm_logits, itm_labels, mlm_logits, labels)
    if config.model.alignment:
        # choice: ramped up, since from random weights its full pull gathers all features in one point
        alignment = alignment_loss(model.category_feature(text_embeds, keep), image_feat)
        losses["align"] = run.ranks.mean(run.ramp * alignment, count)
    if config.model.detector:
        legible = batch["words"] & (masked_ids != run.mask_id)
        rtd_logits, rtd_labels = model.replaced_logits(matching[legible]), replaced[legible].long()
        losses["rtd"] = run.ranks.mean(cross_entropy(rtd_logits, rtd_labels), legible)
        found = rtd_labels.masked_fill(rtd_labels == 0, -100)
        figures["replaced_recall"] = run.ranks.mean(accuracy(rtd_logits, found), found >= 0)
    return losses, figures


RECIPES: dict[str, Callable] = {"syncmask": syncmask, "softmask": softmask, "fashionfine": fashionfine, "albef": albef}


def soften(run: Run, words: Tensor, matching: Tensor, attentions: list[Tensor], image_embeds: Tensor) -> Tensor:
    """The image tokens (B, N, D) with the patches suppressed that one of the `words` (B, L), drawn at random, is about:
    ṽ_p = (1 − M_p) · v_p, the CLS as it is. A text without any such word leaves its photo as it is."""
    attention = attentions[(run.config.mask_layer or (len(attentions) + 1) // 2) - 1]
    score = run.model.itm_logits(matching)[:, 1].sum()
    (gradient,) = torch.autograd.grad(score, attention, retain_graph=True)
    any_word = words.any(dim=1, keepdim=True)
    word = torch.multinomial((words | ~any_word).float(), 1, generator=run.generator).squeeze(1)
    soft = soft_mask(attention, gradient, word) * any_word  # (B, P)
    return torch.cat([image_embeds[:, :1], image_embeds[:, 1:] * (1 - soft[..., None]).to(image_embeds.dtype)], dim=1)


def choose_masks(run: Run, batch: dict, image_embeds_m: Tensor, text_embeds_m: Tensor) -> tuple[Tensor, Tensor]:
    """Patch mask (B, P) and word mask (B, L) of a training batch, each random or synchronized as the config says."""
    config, words, rows = run.config, batch["words"], len(batch["words"])
    grid, where = config.model.grid, dict(generator=run.generator, device=run.device)
    if config.patch_mask == "block":
        patch_mask = block_patch_mask(rows, grid, config.mim_ratio, **where)
    else:
        patch_mask = random_patch_mask(rows, grid**2, config.mim_ratio, **where)
    word_mask = random_word_mask(words, config.mlm_ratio, run.generator)
    if run.step < config.mask_warmup or "sync" not in (config.patch_mask, config.word_mask):
        return patch_mask, word_mask
    attention = momentum_attention(run, batch, image_embeds_m, text_embeds_m, run.generator)
    sync_patches, sync_words = sync_mask(
        attention, words, config.mim_ratio, config.mlm_ratio, config.mask_heads, config.word_score,
        config.patch_score, config.mask_noise, run.generator,
    )  # fmt: skip
    keep_random = torch.rand(rows, 1, **where) < config.mask_hint
    if config.patch_mask == "sync":
        patch_mask = torch.where(keep_random, patch_mask, sync_patches)
    if config.word_mask == "sync":
        word_mask = torch.where(keep_random, word_mask, sync_words)
    return patch_mask, word_mask


def momentum_attention(
    run: Run, batch: dict, image_embeds_m: Tensor, text_embeds_m: Tensor, generator: torch.Generator | None
) -> Tensor:
    """The momentum model's cross-attention that the masks are made of, (B, h, L, N), after `config.mask_source`.

    attention  A, of the clean pair: the plainest reading of SyncMask
    gradcam    A · max(0, ∂ match logit / ∂A), of the clean pair (Grad-CAM, as in ALBEF's grounding)
    hidden     row w of A while word w is hidden: a word that is there needs not look at the photo, a hidden one must.
               Two passes, each with one random half of the words hidden (choice)
    """
    config, momentum, words = run.config, run.momentum, batch["words"]
    ids, keep = batch["token_ids"], batch["attention_mask"]
    if config.mask_source == "hidden":
        half = random_word_mask(words, 0.5, generator)
        hidden = torch.stack([half, words & ~half])  # (2, B, L)
        with torch.no_grad():
            keep, image_embeds_m = keep.repeat(2, 1), image_embeds_m.repeat(2, 1, 1)
            text = momentum.encode_text(ids.masked_fill(hidden, run.mask_id).flatten(0, 1), keep)
            _, attentions = momentum.fuse(text, keep, image_embeds_m, return_attention=True)
        first, second = read_layer(attentions, config.mask_layer, config.mask_heads).chunk(2)
        return torch.where(half[:, None, :, None], first, second)
    gradcam = config.mask_source == "gradcam"
    # compiled code would lose the way from the match logit back to the attention
    with torch.set_grad_enabled(gradcam), torch.compiler.set_stance("force_eager" if gradcam else "default"):
        text = text_embeds_m.detach().requires_grad_(gradcam)
        fused, attentions = momentum.fuse(text, keep, image_embeds_m, return_attention=True)
        if gradcam:
            attentions = attentions[:-1]  # of the last layer only [CLS] reaches the match logit
            gradients = torch.autograd.grad(momentum.itm_logits(fused)[:, 1].sum(), attentions)
            attentions = [a * gradient.clamp(min=0) for a, gradient in zip(attentions, gradients, strict=True)]
    return read_layer(attentions, config.mask_layer, config.mask_heads)


def read_layer(attentions: list[Tensor], layer: int, heads: HeadReduction) -> Tensor:
    """Of attention maps (B, h, L, N) that of one layer, from 1 on; or for 0 what all layers agree on, (B, 1, L, N):
    their geometric mean, heads reduced first, since those of different layers have nothing to do with each other."""
    if layer:
        return attentions[layer - 1].detach()
    attentions = [a.detach().float() for a in attentions]
    maps = torch.stack([a.mean(dim=1) if heads == "mean" else a.amax(dim=1) for a in attentions])
    return maps.clamp(min=1e-12).log().mean(dim=0).exp()[:, None]


class WrongPairs(typing.NamedTuple):
    """ITM negatives of a batch, from all ranks' photos and texts: each photo's wrong text, each text's wrong photo."""

    text_embeds: Tensor  # (B, L, D)
    keep: Tensor  # (B, L)
    photos: Tensor  # image tokens (C, N, D): the batch's own, and with several ranks after them each text's wrong one
    places: Tensor  # (B,) the row of `photos` that is each text's wrong one
    labels: Tensor  # (2B,) 0, or −100 where every other pair would match: first the wrong texts, then the wrong photos


def wrong_pairs(
    run: Run, batch: dict, sim_i2t: Tensor, sim_t2i: Tensor, text_embeds: Tensor, image_embeds: Tensor
) -> WrongPairs:
    """Choose negatives by logits (B, K) of the batch's photos to all ranks' texts, and of its texts to all photos."""
    ranks, keep = run.ranks, batch["attention_mask"]
    forbidden = forbidden_negatives(ranks.gather(batch["product_ids"]), ranks.gather(batch["caption_ids"]))
    forbidden = forbidden[ranks.first :][: len(keep)]  # (B, K)
    text, photo = run.negatives(sim_i2t, forbidden), run.negatives(sim_t2i, forbidden)
    labels = torch.where(torch.cat([text, photo]) < 0, -100, 0)
    text, photo = text.clamp(min=0), photo.clamp(min=0)
    photos = image_embeds
    if ranks.count > 1:
        photos = torch.cat([image_embeds, ranks.fetch(image_embeds, photo)])
        photo = torch.arange(len(photo), 2 * len(photo), device=run.device)
    return WrongPairs(ranks.fetch(text_embeds, text), ranks.gather(keep)[text], photos, photo, labels)


def contrast(
    run: Run, batch: dict, image_feat: Tensor, text_feat: Tensor, image_feat_m: Tensor, text_feat_m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """ITC of online features against momentum keys (in-batch, then the queue), which it then pushes. All (B, E).

    -> weighted loss, and the logits (B, K) photo to text and text to photo of the batch, all ranks' part of it, for
    choosing ITM negatives.
    """
    temp = run.model.temp
    with torch.no_grad():
        new = [run.ranks.gather(x) for x in (image_feat_m, text_feat_m, batch["product_ids"])]
        image_keys, text_keys, products = map(torch.cat, zip(new, run.queue.filled(), strict=True))  # (K, E), …, (K,)
    # in full precision: at a temperature of 0.02, bf16 would round the logits to steps of a quarter
    with torch.autocast(run.device.type, enabled=False):
        sim_i2t, sim_t2i = image_feat @ text_keys.T / temp, text_feat @ image_keys.T / temp  # (B, K)
        with torch.no_grad():
            targets = lambda sim_m: itc_targets(batch["product_ids"], products, sim_m, run.alpha)
            targets_i2t = targets(image_feat_m @ text_keys.T / temp)
            targets_t2i = targets(text_feat_m @ image_keys.T / temp)
        loss = itc_loss(sim_i2t, sim_t2i, targets_i2t, targets_t2i, run.config.focal_gamma)
    run.queue.push(*new)
    run.features = new[:2]
    in_batch = len(new[0])
    loss = run.ranks.mean(run.config.itc_weight * loss, len(image_feat))
    return loss, sim_i2t[:, :in_batch], sim_t2i[:, :in_batch]


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the labelled rows (label ≥ 0) whose highest logit is the label's."""
    right = (logits.argmax(dim=-1) == labels) & (labels >= 0)
    return right.sum() / (labels >= 0).sum().clamp(min=1)


def accuracies(run: Run, itm_logits: Tensor, itm_labels: Tensor, mlm_logits: Tensor, labels: Tensor) -> dict:
    """Figures that every recipe logs."""
    return {
        "itm_accuracy": run.ranks.mean(accuracy(itm_logits, itm_labels), itm_labels >= 0),
        "mlm_accuracy": run.ranks.mean(accuracy(mlm_logits, labels), labels >= 0),
    }


# -------------------------------------------------------------------------------------------- validation


def match_rank(sim: Tensor, positive: Tensor) -> Tensor:
    """How many wrong candidates come before the best right one: 0 is a hit at rank 1. sim, positive (Q, C) -> (Q,).

    Ties count against the model, so that equal features earn nothing, and so does what is not a number. A row without a
    right candidate is beyond every rank.
    """
    best = sim.masked_fill(~positive, -math.inf).max(dim=1, keepdim=True).values
    rank = (~(sim < best) & ~positive).sum(dim=1)
    return rank.masked_fill(~positive.any(dim=1), torch.iinfo(rank.dtype).max)


def retrieval_recalls(
    image_feat: Tensor, text_feat: Tensor, image_products: Tensor, text_products: Tensor, ranks: tuple = (1, 5, 10)
) -> dict[str, float]:
    """Full-protocol recall: every photo (n, E) against one text per product (m, E), and every text against all photos.

    A text hits with the best-ranked photo of its product. -> {"i2t_r1": share, …, "t2i_r10": share}
    """

    def one_way(queries: Tensor, keys: Tensor, query_products: Tensor, key_products: Tensor) -> Tensor:
        chunks = zip(queries.split(1024), query_products.split(1024), strict=True)
        return torch.cat([match_rank(q @ keys.T, own[:, None] == key_products[None, :]) for q, own in chunks])

    i2t = one_way(image_feat, text_feat, image_products, text_products)
    t2i = one_way(text_feat, image_feat, text_products, image_products)
    return {f"{way}_r{k}": (r < k).float().mean().item() for way, r in (("i2t", i2t), ("t2i", t2i)) for k in ranks}


@torch.no_grad()
def text_features(run: Run, texts: list[Text]) -> Tensor:
    """Unit-length features (n, E). Every wording is encoded once: identical texts get identical features and tie."""
    wordings, feats = list(dict.fromkeys(texts)), []
    for start in tqdm(range(0, len(wordings), 256), "encoding texts", unit=" batches", leave=False, disable=None):
        encoded = to_device(tokenize(run.tokenizer, wordings[start : start + 256]), run.device)
        with autocast(run):
            text_embeds = run.model.encode_text(encoded["token_ids"], encoded["attention_mask"])
            feats.append(run.model.text_feature(text_embeds, encoded["attention_mask"]))
    number = {wording: i for i, wording in enumerate(wordings)}
    return torch.cat(feats)[[number[text] for text in texts]]


@torch.no_grad()
def validate(run: Run, dataset: PhotoDataset) -> dict[str, float]:
    """Held-out retrieval, MLM and ITM accuracy, the same draws every time. No photo is cropped or flipped."""
    generator = torch.Generator().manual_seed(run.config.seed)
    shown = first_products(dataset, run.config.val_products)
    loader = DataLoader(shown, run.config.batch_size, collate_fn=Collate(run.tokenizer))
    model = run.model.eval()
    images, products, itm, mlm, captions, unreadable = [], [], [], [], {}, 0
    for batch in tqdm(loader, "validating", unit=" batches", leave=False, disable=None):
        unreadable += len(batch["unreadable"])
        if not len(batch["rows"]):
            continue
        word_mask = random_word_mask(batch["words"], run.config.mlm_ratio, generator)
        forbidden = forbidden_negatives(batch["product_ids"], batch["caption_ids"])
        wrong = pick_negatives(
            torch.zeros_like(forbidden, dtype=torch.float), forbidden, mode="random", generator=generator
        )
        for product, row in zip(batch["product_ids"].tolist(), batch["rows"].tolist(), strict=True):
            captions.setdefault(product, row)  # the text of a product is that of its first photo
        batch, word_mask, wrong = to_device(batch, run.device), word_mask.to(run.device), wrong.to(run.device)
        keep, ids = batch["attention_mask"], batch["token_ids"]
        hidden = ids.masked_fill(word_mask, run.mask_id)
        with autocast(run):
            image_embeds = model.encode_image(normalise(batch["images"]))
            text_embeds, hidden_embeds = model.encode_text(torch.cat([ids, hidden]), torch.cat([keep, keep])).chunk(2)
            pair = torch.cat([text_embeds, text_embeds[wrong.clamp(min=0)], hidden_embeds])
            keeps, photos = torch.cat([keep, keep[wrong.clamp(min=0)], keep]), torch.arange(len(ids)).repeat(3)
            paired, filled = model.fuse(pair, keeps, image_embeds, photos=photos.to(run.device), only_cls=2 * len(ids))
            matching, not_matching = model.itm_logits(paired).argmax(-1).chunk(2)
            right = [(matching == 1).float(), (not_matching == 0).float()]
            restored = (model.mlm_logits(filled[word_mask]).argmax(-1) == ids[word_mask]).float()
            images.append(model.image_feature(image_embeds))
        itm.append(torch.cat([right[0], right[1][wrong >= 0]]))
        mlm.append(restored)
        products.append(batch["product_ids"])
    if not images:
        raise DataError("no photo of the validation split could be read")
    texts = text_features(run, [dataset.text(row) for row in captions.values()])
    known = torch.tensor(list(captions), device=run.device)
    recalls = retrieval_recalls(torch.cat(images), texts, torch.cat(products), known)
    figures = recalls | {"mlm_accuracy": torch.cat(mlm).mean().item(), "itm_accuracy": torch.cat(itm).mean().item()}
    figures["unreadable"] = unreadable
    return {f"val_{key}": value for key, value in figures.items()}


def first_products(dataset: PhotoDataset, count: int) -> torch.utils.data.Subset:
    """All photos of the first `count` products."""
    return torch.utils.data.Subset(dataset, (dataset.product_ids < count).nonzero()[0].tolist())


# ------------------------------------------------------------------------- validation: truth and pictures


def truth(run: Run, train_set: PhotoDataset, val_set: PhotoDataset) -> dict[str, float]:
    """What masks and negatives are worth, where the data set knows it: `mask_truth` and `negative_truth`."""
    if not (isinstance(train_set, Synthetic) and isinstance(val_set, Synthetic)):
        return {}
    return mask_truth(run, val_set) | negative_truth(run, train_set)


@torch.no_grad()
def mask_truth(run: Run, dataset: Synthetic) -> dict[str, float]:
    """Synchronized masks of held-out photos against what the photos show; beside each figure that of random masks.

    They are made as the config says, whether the run trains with them or not, without noise, warm-up and hint.
    """
    config, generator = run.config, torch.Generator(run.device).manual_seed(run.config.seed)
    grid, sums = config.model.grid, {}

    def add(key: str, hits: Tensor, total: Tensor) -> None:
        before = sums.get(key, (0, 0))
        sums[key] = before[0] + hits.item(), before[1] + total.item()

    shown = first_products(dataset, config.val_products)
    loader = DataLoader(shown, config.batch_size, collate_fn=Collate(run.tokenizer))
    for batch in tqdm(loader, "masks against the truth", unit=" batches", leave=False, disable=None):
        known = word_truth(dataset, batch["rows"].tolist(), run.tokenizer, grid)
        attribute, detail, visible = (t.to(run.device) for t in (known.attribute, known.detail, known.visible))
        regions = known.regions.to(run.device)
        named = regions.any(dim=1)  # (B, P)
        batch = to_device(batch, run.device)
        attention, patch_mask, word_mask = shown_masks(run, batch, generator)
        random_patches = random_patch_mask(len(named), grid**2, config.mim_ratio, generator, run.device)
        random_words = random_word_mask(batch["words"], config.mlm_ratio, generator)
        for suffix, patches, words in (("", patch_mask, word_mask), ("_random", random_patches, random_words)):
            add("patch_cooccurrence" + suffix, *cooccurrence(patches, torch.ones_like(named), named))
            add("word_cooccurrence" + suffix, *cooccurrence(words, attribute, visible))
            add("detail_cooccurrence" + suffix, *cooccurrence(words, attribute & detail, visible))
            add("attribute_share" + suffix, *cooccurrence(words, batch["words"], attribute))
        hidden = batch["token_ids"].masked_fill(random_words, run.mask_id)
        with autocast(run):
            text_embeds = run.model.encode_text(hidden, batch["attention_mask"])
            image_embeds = run.model.encode_image(normalise(batch["images"]))
            fused = run.model.fuse(text_embeds, batch["attention_mask"], image_embeds)
        for key, words in (("visible", random_words & visible), ("unseen", random_words & attribute & ~visible)):
            right = run.model.mlm_logits(fused[words]).argmax(-1) == batch["token_ids"][words]
            add(f"{key}_word_accuracy", right.sum(), words.sum())
        heat = reduce_heads(attention, config.mask_heads)
        for key, words in (("pointing", visible & detail), ("pointing_whole", visible & ~detail)):
            hits, expected, total = pointing(heat, regions, words)
            add(key, hits, total)
            add(key + "_random", expected, total)
    return {key: hits / max(1, total) for key, (hits, total) in sums.items()}


def shown_masks(run: Run, batch: dict, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention (B, h, L, N) and synchronized masks (B, P), (B, L) of photos that are neither cropped nor flipped."""
    config, momentum = run.config, run.momentum
    with autocast(run), torch.no_grad():
        image_embeds_m = momentum.encode_image(normalise(batch["images"]))
        text_embeds_m = momentum.encode_text(batch["token_ids"], batch["attention_mask"])
        attention = momentum_attention(run, batch, image_embeds_m, text_embeds_m, generator)
    return attention, *sync_mask(
        attention, batch["words"], config.mim_ratio, config.mlm_ratio, config.mask_heads, config.word_score,
        config.patch_score, generator=generator,
    )  # fmt: skip


def shown_soft_masks(run: Run, batch: dict, generator: torch.Generator) -> list[tuple[str, Tensor, Tensor]]:
    """Title, soft mask (B, P) and the random word (B, L) that it is of; nothing where there is one fusion layer."""
    layers, words = run.config.model.fusion_layers, batch["words"]
    if layers == 1:
        return []
    gradcam = replace(run, config=replace(run.config, mask_source="gradcam", mask_layer=(layers + 1) // 2))
    with autocast(run), torch.no_grad():
        image_embeds_m = run.momentum.encode_image(normalise(batch["images"]))
        text_embeds_m = run.momentum.encode_text(batch["token_ids"], batch["attention_mask"])
    heat = momentum_attention(gradcam, batch, image_embeds_m, text_embeds_m, None)  # A · max(0, ∂s/∂A)
    word = torch.multinomial((words | ~words.any(dim=1, keepdim=True)).float(), 1, generator=generator)  # (B, 1)
    mask = soft_mask(heat, torch.ones_like(heat), word.squeeze(1))
    return [("soft", mask, torch.zeros_like(words).scatter(1, word, True) & words)]


def skill(figures: dict[str, float], key: str) -> float:
    """How far `key` is on the way from what random masks get to perfect: (value − random) / (1 − random)."""
    return (figures[key] - figures[key + "_random"]) / max(1e-9, 1 - figures[key + "_random"])


def truth_in_words(figures: dict[str, float]) -> list[str]:
    """The truth for the eye: one line for the masks as skill over random ones, one for the negatives."""
    if not figures:
        return []
    times = lambda key: figures[key] / max(1e-9, figures[key + "_random"])
    three = lambda key: " / ".join(f"{figures[key + suffix]:.3f}" for suffix in ("", "_random", "_hard"))
    patches, words, details = (skill(figures, f"{what}_cooccurrence") for what in ("patch", "word", "detail"))
    return [
        f"masks, skill over random ones: patches {patches:.2f}, words {words:.2f}, of details {details:.2f}; "
        f"pointing to details {times('pointing'):.1f} x chance, to the rest {times('pointing_whole'):.1f} x",
        f"negatives, chosen / random / hard: false {three('false_negative_rate')}, "
        f"similarity {three('negative_similarity')}",
    ]


@torch.no_grad()
def negative_truth(run: Run, dataset: Synthetic) -> dict[str, float]:
    """How many ITM negatives are false, and how similar to the anchor they are: batches grouped and negatives chosen
    by the config's modes, at random, and hard. Over some search blocks of training photos; chosen negatives alone,
    without the random ones that `itm_share` mixes in."""
    config, rng = run.config, np.random.default_rng(run.config.seed)
    rows = rng.permutation(len(dataset))[: 4 * config.search_size]
    loader = DataLoader(torch.utils.data.Subset(dataset, rows.tolist()), 128, collate_fn=Collate(run.tokenizer))
    images, texts = [], []
    for batch in tqdm(loader, "negatives against the truth", unit=" batches", leave=False, disable=None):
        batch = to_device(batch, run.device)
        with autocast(run):
            images.append(run.momentum.project_image(run.momentum.encode_image(normalise(batch["images"]))))
            embeds = run.momentum.encode_text(batch["token_ids"], batch["attention_mask"])
            texts.append(run.momentum.project_text(embeds))
    image_feat, text_feat = torch.cat(images).cpu(), torch.cat(texts).cpu()
    generator, figures = torch.Generator().manual_seed(config.seed), {}
    for suffix, grouping, picking in (("", config.sampler, config.itm_negatives), ("_random", "random", "random"),
                                      ("_hard", "hard", "hard")):  # fmt: skip
        false, similarity = [], []
        for block in np.split(np.arange(len(rows)), range(config.search_size, len(rows), config.search_size)):
            sim = image_feat[block] @ text_feat[block].T  # (M, M)
            groups = np.stack([dataset.product_ids[rows[block]], dataset.caption_ids[rows[block]]])
            order = np.arange(len(block))
            if grouping != "random":
                order = chain(sim.numpy(), groups, 0, config.batch_size, grouping, config.margin)
            for batch in torch.from_numpy(order).split(config.batch_size):
                own = sim[batch][:, batch]
                forbidden = forbidden_negatives(*(torch.from_numpy(ids)[batch] for ids in groups))
                for scores, flipped in ((own, False), (own.T, True)):
                    logits = scores / run.model.temp.item() if picking == "similar" else scores
                    wrong = pick_negatives(logits, forbidden, None, picking, generator, config.margin)
                    for anchor, j in ((a, j) for a, j in enumerate(wrong.tolist()) if j >= 0):
                        photo, text = (rows[block[batch[k]]] for k in ((j, anchor) if flipped else (anchor, j)))
                        false.append(dataset.describes(int(dataset.product_ids[text]), int(photo)))
                        similarity.append(scores[anchor, j].item())
        figures["false_negative_rate" + suffix] = float(np.mean(false)) if false else 0.0
        figures["negative_similarity" + suffix] = float(np.mean(similarity)) if similarity else 0.0
    return figures


# ------------------------------------------------------------------------------------------ the machinery


def autocast(run: Run) -> contextlib.AbstractContextManager:
    """bf16 where it is asked for, otherwise nothing."""
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.precision == "bf16")


def learning_rate(step: int, config: LoopConfig, total_steps: int) -> float:
    """Linear warm-up to `lr`, then half a cosine down to `final_lr`, reached with the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, total_steps - 1 - config.warmup)
    return config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def ema_decay(step: int, decay: float) -> float:
    """The momentum model follows closely at first, (1 + s)/(10 + s), until its decay is reached (choice)."""
    return min(decay, (1 + step) / (10 + step))


def build_optimizer(model: VisionLanguageModel, config: LoopConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on biases, norms, embeddings, tokens or the temperature."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        table = any(part in name for part in ("embeddings", "position_embed", "_token", "registers"))
        (rest if table or parameter.ndim < 2 else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), fused=True)


def seed_for(seed: int, step: int, rank: int = 0) -> int:
    """A seed for one step: what a step draws depends on nothing before it, so a resumed run draws the same."""
    return (seed * 1_000_003 + step + (rank << 40)) % 2**63


def build_run(config: LoopConfig, dataset: PhotoDataset, tokenizer: Tokenizer, ranks: Ranks | None = None) -> Run:
    """Model with random weights, momentum model, queue and optimiser of a new run, on its device."""
    torch.manual_seed(config.seed)
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.get_vocab_size()))
    ranks = ranks or Ranks(torch.device(config.device))
    device = ranks.device
    model = VisionLanguageModel(config.model)
    model.to(device).train()
    momentum = MomentumModel(model, config.ema_decay)
    if config.compile:
        for part in (model.vision, model.text, model.fusion, momentum.vision, momentum.text, momentum.fusion):
            part.compile()
    epoch_steps = -(-len(dataset) // config.batch_size) / config.accumulate
    total = config.steps or max(1, round(config.epochs * epoch_steps))
    queue = FeatureQueue(config.queue, config.model.embed_dim).to(device)
    return Run(
        config,
        tokenizer,
        model,
        momentum,
        queue,
        build_optimizer(model, config),
        device,
        total,
        epoch_steps,
        dataset.fingerprint(),
        ranks=ranks,
    )


def save_checkpoint(run: Run, sampler: GroupedBatchSampler, path: Path) -> None:
    """Write last.pt whole or not at all: to a file beside it, flushed to the disk, then renamed over it. The first rank
    does, for all have the same.

    `rng` is all there is of random state: every step seeds itself from (seed, step), the sampler from (seed, epoch).
    """
    if not run.ranks.leads:
        return
    state = {
        "model": run.model.state_dict(),
        "momentum": run.momentum.model.state_dict(),
        "queue": run.queue.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "sampler": sampler.state_dict(),
        "rng": {"seed": run.config.seed, "step": run.step},
        "data": run.data,
        "step": run.step,
        "seconds": run.seconds,
        "unreadable": sorted(run.unreadable),
        "config": asdict(run.config),
        "tokenizer": run.tokenizer.to_str(),
    }
    scratch = path.with_name(f".{path.name}.part")
    with open(scratch, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


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
    config: LoopConfig, given: set[str], state: dict, check: Callable[[LoopConfig, dict], None]
) -> LoopConfig:
    """The checkpoint's config; a flag that would change the result is refused. `check` is the script's check_flags."""
    saved = config_from_dict(state["config"], type(config))
    for name in sorted(given - FREE_ON_RESUME - {"vocab_size"}):  # the saved size is what training it came to
        mine = getattr(config, name) if hasattr(config, name) else getattr(config.model, name)
        theirs = getattr(saved, name) if hasattr(saved, name) else getattr(saved.model, name)
        if mine != theirs:
            flag = name.replace("_", "-")
            advice = "drop the flag, or start anew with another --out"
            raise ConfigError(f"--{flag} {mine} contradicts the run to resume, which has {theirs}; {advice}")
    free = {name: getattr(config, name) for name in (given & FREE_ON_RESUME) | {"out", "stop_at"}}
    merged = replace(saved, **(free | {"resume": True}))
    check(merged, {})
    if merged.stop_at and merged.stop_at <= state["step"]:
        raise ConfigError(f"--stop-at {merged.stop_at}: the run is at step {state['step']} already")
    return merged


def restore(run: Run, sampler: GroupedBatchSampler, state: dict) -> None:
    """Put a run where its checkpoint left off."""
    run.model.load_state_dict(state["model"])
    run.momentum.model.load_state_dict(state["momentum"])
    run.queue.load_state_dict(state["queue"])
    run.optimizer.load_state_dict(state["optimizer"])
    sampler.load_state_dict(state["sampler"])
    run.step, run.seconds, run.unreadable = state["step"], state["seconds"], set(state["unreadable"])


class Metrics:
    """metrics.jsonl: one JSON object a line. A resumed run drops the lines after its checkpoint."""

    def __init__(self, path: Path, resumed_step: int | None = None):
        lines = []
        if resumed_step is not None and path.exists():
            lines = [line for line in map(_json_or_none, path.read_text().splitlines()) if line]
            lines = [line for line in lines if line["step"] <= resumed_step and not line.get("final")]
        self.path, self.lines = path, lines
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def validation(self, step: int) -> dict[str, float]:
        """The held-out figures written for `step`, or nothing."""
        found = [line for line in self.lines if line["step"] == step and any(key.startswith("val_") for key in line)]
        return {key: value for line in found for key, value in line.items() if key != "step"}

    def write(self, **figures) -> None:
        line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in figures.items()}
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def _json_or_none(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # a line that a killed run left half written
        return None


TRUTHS = ("patch_cooccurrence", "word_cooccurrence", "pointing")
PANELS = {
    "loss": ["itc", "itm", "mlm", "mim", "rtd", "align"],
    "held-out recall": [f"val_{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)],
    "held-out accuracy": ["val_itm_accuracy", "val_mlm_accuracy", "visible_word_accuracy"],
    "held-out truth of the masks": [key + end for key in TRUTHS for end in ("", "_random")],
}


def draw_curves(lines: list[dict], path: Path, panels: dict[str, list[str]] = PANELS) -> None:
    """curves.png: for each of the panels, title -> keys of metrics.jsonl, what there is of these over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = {key: [(line["step"], line[key]) for line in lines if key in line] for key in sum(panels.values(), [])}
    panels = {title: [key for key in keys if curves[key]] for title, keys in panels.items()}
    panels = {title: keys for title, keys in panels.items() if keys}
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (title, keys) in zip(axes[0], panels.items(), strict=True):
        for key in keys:
            style = {"linestyle": ":", "color": axis.lines[-1].get_color()} if key.endswith("_random") else {}
            marker = "." if len(curves[key]) < 20 else None
            axis.plot(*zip(*curves[key], strict=True), label=key.removeprefix("val_"), marker=marker, **style)
        axis.set(title=title, xlabel="step", ylim=(0, 1.02) if "held-out" in title else (0, None))
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


INK, PAPER, GREY = (30, 30, 34), (255, 255, 255), (150, 150, 156)


def first_photos(dataset: PhotoDataset, count: int) -> list[int]:
    """One photo of each of the first `count` products: the first of one, the second of the next, and so on."""
    owners = dataset.product_ids
    views = [(owners == product).nonzero()[0] for product in range(min(count, int(owners.max()) + 1))]
    return [int(rows[number % len(rows)]) for number, rows in enumerate(views)]


def letters(size: int) -> ImageFont.FreeTypeFont:
    """The font that matplotlib brings: Pillow's own has no accents."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def draw_masks(run: Run, dataset: PhotoDataset, rows: list[int], path: Path, side: int = 150) -> None:
    """masks.png: for each photo the patches and words that random and that synchronized masks would hide, and what a
    soft mask of one random word, marked in its text, would suppress."""
    batch = Collate(run.tokenizer)([dataset[row] for row in rows])
    if not len(batch["rows"]):  # none can be decoded
        return
    images, texts = batch["images"], [dataset.text(row) for row in batch["rows"].tolist()]
    batch, grid, line = to_device(batch, run.device), run.config.model.grid, 2 * side + 60
    generator = torch.Generator(run.device).manual_seed(run.config.seed)
    _, patches, words = shown_masks(run, batch, generator)
    masks = [
        ("random", random_patch_mask(len(images), grid**2, run.config.mim_ratio, generator, run.device),
         random_word_mask(batch["words"], run.config.mlm_ratio, generator)),
        ("synchronized", patches, words),
        *shown_soft_masks(run, batch, generator),
    ]  # fmt: skip
    font, text_left = letters(14), (len(masks) + 1) * (side + 10) + 10
    page = Image.new("RGB", (text_left + len(masks) * line, 30 + len(images) * 5 * side), PAPER)
    pen, top = ImageDraw.Draw(page), 30
    for column, (title, _, _) in enumerate(masks):
        pen.text((side * (column + 1) + 10 * (column + 2), 8), title, INK, font)
        pen.text((text_left + line * column, 8), f"{title}: words", INK, font)
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        photo = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC)
        page.paste(photo, (10, top))
        bottom = top + side
        for column, (_, patch_mask, word_mask) in enumerate(masks):
            hidden = (patch_mask[i].float() * 255).byte().view(grid, grid).cpu().numpy()
            cover = Image.fromarray(hidden).resize((side, side), Image.Resampling.NEAREST)
            page.paste(Image.composite(Image.new("RGB", photo.size, GREY), photo, cover),
                       (side * (column + 1) + 10 * (column + 2), top))  # fmt: skip
            corner = (text_left + line * column, top)
            end = draw_text(pen, font, text, run.tokenizer, word_mask[i].tolist(), corner, line - 20)
            bottom = max(bottom, end)
        top = bottom + 10
    page.crop((0, 0, page.width, top)).save(path)


def draw_text(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    text: Text,
    tokenizer: Tokenizer,
    mask: list[bool],
    corner: tuple[int, int],
    width: int,
) -> int:
    """The text from `corner` on, broken at `width` pixels, its masked tokens blacked out but legible. -> its foot"""
    (x, y), end, encoding = corner, (1, 0), encode(tokenizer, [text])[0]
    for piece, (start, stop), masked in zip(encoding.word_ids, encoding.offsets, mask, strict=False):
        if piece is None:  # [CLS], [SEP]
            continue
        x += 5 if (piece, start) > end else 0
        size = font.getlength(text[piece][start:stop])
        if x + size > corner[0] + width:
            x, y = corner[0], y + 22
        if masked:
            pen.rectangle((x - 1, y, x + size + 1, y + 19), INK)
        pen.text((x, y), text[piece][start:stop], PAPER if masked else INK, font)
        x, end = x + size + 1, (piece, stop)
    return y + 22


class StopSignals:
    """Ctrl-C and SIGTERM ask for a stop after the step under way; a second one stops at once, unless torchrun is there:
    it may pass on a signal that has already come."""

    def __init__(self, second_stops: bool):
        self.second_stops = second_stops

    def __enter__(self) -> "StopSignals":
        self.caught: str | None = None
        self._before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _catch(self, number: int, _frame) -> None:
        self.caught = signal.Signals(number).name
        if self.second_stops:
            signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _own_session(_worker: int) -> None:
    """Ctrl-C and signals to the process group reach the main process only, which then ends its loader workers."""
    os.setsid()


@dataclass
class Share:
    """Of every batch of a sampler the part that is one rank's to load."""

    sampler: GroupedBatchSampler
    ranks: Ranks

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.ranks.part, self.sampler)


def endless_batches(dataset: PhotoDataset, sampler: GroupedBatchSampler, run: Run) -> Iterator[dict]:
    """Batches from the current step on, epoch after epoch."""
    loader = DataLoader(
        dataset,
        batch_sampler=Share(sampler, run.ranks),
        collate_fn=Collate(run.tokenizer),
        num_workers=run.config.workers,
        pin_memory=run.device.type == "cuda",
        persistent_workers=run.config.workers > 0,
        worker_init_fn=_own_session,
        generator=torch.Generator(),  # its own, or making an iterator would draw from the one dropout uses
    )
    epoch, first_batch = divmod(run.step * run.config.accumulate, len(sampler))
    while True:
        sampler.set_epoch(epoch, first_batch)
        run.ranks.check_same("batches", zlib.crc32(sampler.state_dict()["order"].numpy()))
        yield from loader
        epoch, first_batch = epoch + 1, 0


def peak_memory_mib(device: torch.device) -> float:
    """Most memory this process held: on the GPU if it trains there, otherwise resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True)
class Job:
    """What the loop works on: pretraining by a recipe, or one of finetune.py's tasks."""

    name: str
    losses: Callable[[Run, dict], tuple[dict[str, Tensor], dict[str, float | Tensor]]]  # and figures to log
    validate: Callable[[Run], tuple[dict[str, float], list[str]]]  # figures, and lines for the eye
    panels: dict[str, list[str]]  # of curves.png
    select: str | None = None  # figure whose highest value is kept as best.pt
    patience: int = 0  # validations without a better one after which to stop; 0: never

    def best_step(self, lines: list[dict]) -> int | None:
        """Step of the best validation so far, the first of equals."""
        steps = [line for line in lines if self.select in line and not line.get("final")]
        return max(steps, key=lambda line: (line[self.select], -line["step"]))["step"] if steps else None

    def stalled(self, lines: list[dict]) -> bool:
        """Early stopping: has nothing become better for `patience` validations?"""
        best = self.best_step(lines)
        later = [line for line in lines if self.select in line and best is not None and line["step"] > best]
        return 0 < self.patience <= len(later)


def train(config: TrainConfig, given: set[str] = frozenset()) -> dict | None:
    """Train as `config` says, or go on with what --out holds. -> the final line of metrics, None when stopped early.

    Under torchrun every process calls this; the lines of all but the first lack the validation."""
    config, state = begin(config, given, check_flags)
    ranks = Ranks.join(config.device)
    train_set, val_set = (
        build_dataset(config.data, config.root, split, config.model.image_size, config.seed, config.products)
        for split in ("train", "val")
    )
    if config.prompts:  # held-out texts as the downstream tasks give them: without what the prompts would tell
        train_set.prompts, val_set.lead = True, DESCRIPTION
    print(f"train: {train_set.report()}\nval: {val_set.report()}")
    if state:
        tokenizer = Tokenizer.from_str(state["tokenizer"])
    else:
        rows = tqdm(
            range(0 if config.vocab else len(train_set)), "reading texts", unit=" texts", leave=False, disable=None
        )
        spoken = [" ".join(train_set.text(row)[1::2]) for row in rows]
        sizes = config.model.vocab_size, config.model.max_length
        tokenizer = build_tokenizer(spoken, *sizes, config.vocab, config.prompts)
    report_cut_texts(train_set, tokenizer)
    run = build_run(config, train_set, tokenizer, ranks)
    ranks.check_same("training photos or vocabularies", zlib.crc32(tokenizer.to_str().encode(), run.data))
    if not state and (config.vision_weights or config.text_weights or config.weights):
        print(load_pretrained(run.model, config.vision_weights, config.text_weights, config.weights))
        run.momentum.update(run.model, decay=0)

    def held_out(run: Run) -> tuple[dict[str, float], list[str]]:
        figures, known = validate(run, val_set), truth(run, train_set, val_set)
        return figures | known, truth_in_words(known)

    job = Job(f"{config.recipe}, {config.preset}", RECIPES[config.recipe], held_out, PANELS)
    final = work(run, job, train_set, state)
    if ranks.leads:
        draw_masks(run, val_set, first_photos(val_set, 6), Path(config.out) / "masks.png")
    return final


def report_cut_texts(dataset: PhotoDataset, tokenizer: Tokenizer, sample: int = 1000) -> None:
    """Say it where texts are longer than the model reads."""
    texts = [dataset.text(row) for row in range(0, len(dataset), max(1, len(dataset) // sample))]
    if cut := sum(bool(encoding.overflowing) for encoding in encode(tokenizer, texts)):
        longest = tokenizer.truncation["max_length"]
        print(f"{100 * cut / len(texts):.0f} % of the training texts are cut at {longest} tokens; see --max-length")


def begin(
    config: LoopConfig, given: set[str], check: Callable[[LoopConfig, dict], None]
) -> tuple[LoopConfig, dict | None]:
    """The config to run by and, with --resume, the checkpoint to go on from. A run is never overwritten."""
    last = Path(config.out) / "last.pt"
    if config.resume:
        state = load_checkpoint(last)
        return resumed_config(config, given, state, check), state
    if last.exists():
        raise ConfigError(f"{config.out} holds a run already; add --resume to go on with it, or choose another --out")
    return config, None


def work(run: Run, job: Job, dataset: PhotoDataset, state: dict | None) -> dict | None:
    """The loop over `dataset`, from the start or from a checkpoint's state, with what it leaves in --out."""
    config, out = run.config, Path(run.config.out)
    sampler = GroupedBatchSampler(
        len(dataset), config.batch_size, config.search_size, config.sampler, dataset.product_ids,
        dataset.caption_ids, config.seed, margin=config.margin,
    )  # fmt: skip
    if len(dataset) // len(sampler) < run.ranks.count:
        raise ConfigError(f"--batch-size {config.batch_size}: too few photos for {run.ranks.count} processes")
    resumed_step = None
    if state:
        if state["data"] != run.data:
            raise ConfigError(f"{out}/last.pt was trained on other rows than the training split holds now")
        restore(run, sampler, state)
        resumed_step = run.step
        decides = {name: value for name, value in asdict(config).items() if name not in FREE_ON_RESUME}
        run.ranks.check_same("flags or checkpoints", zlib.crc32(repr((run.step, decides)).encode()))
        state.clear()  # the checkpoint is as large as the run itself
    if run.ranks.leads:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(run.config), indent=1) + "\n")
    metrics = Metrics(out / "metrics.jsonl" if run.ranks.leads else Path(os.devnull), resumed_step)
    parameters = sum(p.numel() for p in run.model.parameters())
    size = f"{parameters / 1e6:.1f} M parameters"
    where = f"{run.device}" + (f", {run.ranks.count} processes" if run.ranks.count > 1 else "")
    print(f"{job.name}: {size}, {run.total_steps} steps on {where}, into {out}/")
    try:
        with StopSignals(second_stops=run.ranks.count == 1) as stop:
            return loop(run, job, dataset, sampler, metrics, stop)
    finally:
        if run.ranks.leads and any("loss" in line for line in metrics.lines):
            draw_curves(metrics.lines, out / "curves.png", job.panels)


def check_finite(ranks: Ranks, totals: dict[str, Tensor], step: int, last: Path) -> None:
    """Raise NonFiniteLoss before a loss or gradient that is NaN or infinite reaches the weights."""
    if ranks.on_any(not (totals["loss"].isfinite() and totals["grad_norm"].isfinite())):
        parts = ", ".join(f"{key} {value:.3g}" for key, value in ranks.average(totals).items())
        kept = f"{last} is the last good state" if last.exists() else "there is no checkpoint yet"
        raise NonFiniteLoss(f"step {step}: the loss or its gradient is not finite ({parts}); {kept}; try a lower --lr")


class Step(nn.Module):
    """A job's losses as the forward pass of one module, for DistributedDataParallel to take hold of."""

    def __init__(self, run: Run, job: Job):
        super().__init__()
        self.model, self.run, self.job = run.model, run, job

    def forward(self, batch: dict) -> tuple[dict[str, Tensor], dict[str, float | Tensor]]:
        """Losses, and figures to log."""
        with autocast(self.run):
            return self.job.losses(self.run, batch)


def record_validation(
    run: Run, job: Job, sampler: GroupedBatchSampler, metrics: Metrics, say: Callable[[str], None]
) -> None:
    """Validate: write the figures, and the weights where they are the best so far."""
    figures, remarks = job.validate(run)
    run.model.train()
    line = {"step": run.step, **figures}
    if job.best_step([*metrics.lines, line]) == run.step:  # first, so that the line never lacks its weights
        save_checkpoint(run, sampler, Path(run.config.out) / "best.pt")
    metrics.write(**line)
    say(f"step {run.step}: " + "  ".join(f"{k[4:]} {v:.3f}" for k, v in figures.items() if k.startswith("val_")))
    for remark in remarks:
        say("    " + remark)


def loop(
    run: Run, job: Job, dataset: PhotoDataset, sampler: GroupedBatchSampler, metrics: Metrics, stop: StopSignals
) -> dict | None:
    """validate → schedule → forward → backward → clip → step → EMA → log → checkpoint, until the last step."""
    config, ranks, last = run.config, run.ranks, Path(run.config.out) / "last.pt"
    batches, forward = endless_batches(dataset, sampler, run), ranks.parallel(Step(run, job))
    seen, took = 0, 0.0
    bar = tqdm(total=run.total_steps, initial=run.step, unit=" steps", dynamic_ncols=True, smoothing=0.1)
    while True:
        done = run.step == run.total_steps
        due = run.step and (done or run.step % config.val_every == 0)
        if ranks.leads and due and not metrics.validation(run.step):
            record_validation(run, job, sampler, metrics, bar.write)
        if due:
            ranks.wait()
        if ranks.on_any(done or job.stalled(metrics.lines)):
            break

        start, lr = time.perf_counter(), learning_rate(run.step, config, run.total_steps)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(seed_for(config.seed, run.step, ranks.rank))  # dropout
        run.generator = torch.Generator(run.device).manual_seed(seed_for(config.seed, run.step, ranks.rank))

        totals: dict[str, Tensor] = {}
        for _ in range(config.accumulate):
            batch = ranks.agree(to_device(next(batches), run.device))
            for reason in set(batch["unreadable"]) - run.unreadable:
                bar.write(f"left out: {reason}")
            run.unreadable |= set(batch["unreadable"])
            if not all(ranks.rows):
                continue
            seen += sum(ranks.rows)
            for key in [key for key in ("images", "target_images") if key in batch]:
                batch[key] = augment(batch[key], config.crop_scale, config.color_jitter, run.generator, config.distort)
            losses, figures = forward(batch)
            loss = sum(losses.values()) / config.accumulate
            loss.backward()
            if config.sampler != "random":
                sampler.collect(ranks.gather(batch["rows"]), *run.features)
            for key, value in (losses | figures | {"loss": sum(losses.values())}).items():
                totals[key] = totals.get(key, 0) + value.detach() / config.accumulate
        if not totals:  # not one photo of this step, or of one rank's share, could be read
            if len(run.unreadable) > len(dataset) // 2:
                raise DataError(f"most photos cannot be read, the last one: {batch['unreadable'][-1]}")
            run.step += 1
            bar.update()
            continue
        totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip)
        check_finite(ranks, totals, run.step + 1, last)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.model.clamp_temp()
        run.momentum.update(run.model, ema_decay(run.step, config.ema_decay))
        run.step += 1
        sampler.set_epoch(*divmod(run.step * config.accumulate, len(sampler)))

        bar.update()
        run.seconds, took = run.seconds + time.perf_counter() - start, took + time.perf_counter() - start
        done = run.step == run.total_steps
        stopping = ranks.on_any(not done and (bool(stop.caught) or run.step == config.stop_at))
        if run.step % config.log_every == 0 or done or stopping:
            values = ranks.average(totals)
            metrics.write(step=run.step, epoch=run.step / run.epoch_steps, **values, lr=lr, temp=run.model.temp.item(),
                          unreadable=len(run.unreadable), conflicts=sampler.conflicts,
                          samples_per_second=seen / took)  # fmt: skip
            bar.set_postfix({k: f"{values[k]:.2f}" for k in losses} | {"photos/s": f"{seen / took:.0f}"})
            seen, took = 0, 0.0
        if run.step % config.save_every == 0 or run.step % config.val_every == 0 or done or stopping:
            save_checkpoint(run, sampler, last)
        if stopping:
            bar.close()
            why = "--stop-at" if run.step == config.stop_at else stop.caught or "signal"
            print(f"stopped at step {run.step} ({why}); saved in {last}, go on with --resume")
            return None
    bar.close()
    cost = {"seconds": run.seconds, "peak_memory_mib": peak_memory_mib(run.device)}
    final = {"step": run.step, "final": True, **metrics.validation(run.step), **cost}
    metrics.write(**final)
    print(f"done at step {run.step}, {run.seconds / 60:.1f} min of training; see {last.parent}/curves.png")
    return final


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    try:
        config, given = parse_config(argv)
        train(config, given)
    except (ConfigError, DataError, WeightsError, NonFiniteLoss, OSError) as error:
        speak_up()
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped before the first step")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
