"""A run: its models, optimiser and place in the schedule."""

import contextlib
import ctypes
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import ANTONYMS, SYNONYMS, Collate, replacement_ids, word_pairs
from engine.config import LoopConfig, TrainConfig, grouping_of
from engine.distributed import rank, world_size
from engine.flags import ConfigError
from model import EMBED_DIM, MomentumModel, VisionLanguageModel
from readers.dataset import PairDataset
from sampler import GroupedBatchSampler


@dataclass
class Run:
    """All that a recipe, or a task of finetune.py, uses besides the batch."""

    config: TrainConfig  # or FinetuneConfig: what both have is LoopConfig
    tokenizer: Tokenizer
    model: VisionLanguageModel
    momentum: MomentumModel
    queue: list[Tensor]  # older ITC keys, the newest first: image_feat, text_feat (K, E), product, caption ids (K,)
    optimizer: torch.optim.Optimizer
    device: torch.device
    epoch_steps: int  # in one pass over the images
    data: int  # checksum of the captions, attributes and product ids of the training split
    informative: tuple[Tensor, Tensor] | None = None  # continues, informative: see data.informative_pieces
    sampler: GroupedBatchSampler | None = None  # of a run that trains
    generator: torch.Generator | None = None  # of the step under way

    step: int = 0
    seconds: float = 0.0  # of training, over all resumes
    unreadable: set[str] = field(default_factory=set)
    validation: dict[str, float] = field(default_factory=dict)  # the last one
    best_step: int = 0  # 0: there was none yet
    best_score: float = 0.0

    def __post_init__(self):
        self.total_steps = self.config.steps or self.config.epochs * self.epoch_steps
        self.mask_id = self.tokenizer.token_to_id("[MASK]")
        self.replacement_ids = replacement_ids(self.tokenizer).to(self.device)
        antonyms, synonyms = word_pairs(self.tokenizer, ANTONYMS), word_pairs(self.tokenizer, SYNONYMS)
        self.swaps = torch.stack([antonyms, synonyms]).to(self.device)  # (2, V), see masking.replace_words

    @property
    def collate(self) -> Collate:
        """The function that makes batches for this run."""
        return Collate(self.tokenizer, self.informative)

    @property
    def ramp(self) -> float:
        """The ramp from 0 to 1 over the first epoch, linear."""
        return min(1.0, self.step / self.epoch_steps)

    @property
    def alpha(self) -> float:
        """The share of the momentum soft targets, ramped up over the first epoch (ALBEF)."""
        return self.config.alpha * self.ramp

    def seed_step(self) -> None:
        """Seed the random draws of a step by its number, so that a resumed run draws the same numbers."""
        seed = (self.config.seed * 1_000_003 + self.step + (rank() << 40)) % 2**63
        torch.manual_seed(seed)  # dropout
        self.generator = torch.Generator(self.device).manual_seed(seed)


def autocast(run: Run) -> contextlib.AbstractContextManager:
    """Return the context of a forward pass: autocast to bf16 with `--precision bf16`."""
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.precision == "bf16")


def fitting_precision(device: torch.device) -> str:
    """Return the precision for `--precision auto`: bf16 where the device multiplies bf16 itself, fp32 elsewhere."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has = torch.cpu.get_capabilities()
    fast = has.get("amx_bf16") or has.get("avx512_bf16")  # others compute in bf16, but slower than in fp32
    return "bf16" if fast and torch.backends.mkldnn.is_available() else "fp32"


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next tensors (our choice; nothing changes elsewhere).

    By default glibc gives large blocks back to the system, and the system clears new pages for the next tensor. With a
    vocabulary of 30,522 words this is a third of a training step on a CPU.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_max = -1, -4  # their numbers in malloc.h
        libc.mallopt(trim_threshold, -1)  # never give the end of the heap back
        libc.mallopt(mmap_max, 0)  # and take every block from the heap


def build_optimizer(model: VisionLanguageModel, config: LoopConfig) -> torch.optim.AdamW:
    """Build AdamW with weight decay on matrices alone: not on biases, norms, embeddings, tokens or the temperature."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_table = any(part in name for part in ("embeddings", "position_embed", "_token"))
        if is_table or parameter.ndim < 2:
            others.append(parameter)
        else:
            decayed.append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), fused=True)


def build_run(
    config: LoopConfig, dataset: PairDataset, tokenizer: Tokenizer, device: torch.device | None = None
) -> Run:
    """Build a new run: a model with random weights, its momentum model, an empty queue and the optimiser."""
    torch.manual_seed(config.seed)
    device = device or torch.device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    if config.precision == "auto":
        config = replace(config, precision=fitting_precision(device))
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.get_vocab_size()))
    model = VisionLanguageModel(config.model).to(device).train()
    momentum = MomentumModel(model)
    if config.compile:
        compile_layers(model)
        compile_layers(momentum.model)
    features, ids = torch.zeros(0, EMBED_DIM, device=device), torch.zeros(0, dtype=torch.long, device=device)
    return Run(
        config=config,
        tokenizer=tokenizer,
        model=model,
        momentum=momentum,
        queue=[features, features, ids, ids],
        optimizer=build_optimizer(model, config),
        device=device,
        epoch_steps=-(-len(dataset) // config.batch_size),
        data=dataset.fingerprint(),
    )


def compile_layers(model: VisionLanguageModel) -> None:
    """Compile the transformer layers by torch.compile."""
    # a layer is called in more forms than the default of 8: with and without image, gradient, all tokens
    torch._dynamo.config.recompile_limit = 32
    for part in (model.vision, model.text, model.fusion, model.decoder):
        for layer in part.layers:
            layer.compile(dynamic=True)


def build_sampler(run: Run, dataset: PairDataset) -> GroupedBatchSampler:
    """Build the sampler of a run that trains.

    Raises ConfigError where the processes cannot share a batch evenly.
    """
    config = run.config
    if config.batch_size % world_size():
        raise ConfigError(f"--batch-size {config.batch_size}: {world_size()} processes cannot share it evenly")
    if len(dataset) < world_size():
        raise ConfigError(f"{len(dataset)} images are too few for {world_size()} processes")
    return GroupedBatchSampler(
        np.stack([dataset.product_ids, dataset.caption_ids]),
        config.batch_size,
        mode=grouping_of(config),
        margin=config.margin,
        seed=config.seed,
        process=(rank(), world_size()),
    )
