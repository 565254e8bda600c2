"""A run: its models, optimiser and place in the schedule; and the job that the loop does with it."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from data import ANTONYMS, SYNONYMS, Collate, word_ids, word_pairs
from engine.config import LoopConfig, TrainConfig
from engine.precision import fitting_precision
from engine.ranks import Ranks
from engine.writer import Writer
from losses import pick_negatives
from masking import corrupt_words, replace_words
from model import FeatureQueue, MomentumModel, VisionLanguageModel
from readers.dataset import PhotoDataset
from sampler import GroupedBatchSampler

LOSSES = ("itc", "itm", "mlm", "mim", "align", "rtd", "class")
Losses = dict[str, Tensor]
Logged = dict[str, Tensor]  # figures of a step, to be written down


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


@dataclass
class Run:
    """Everything a recipe, or a task of finetune.py, may use besides the batch."""

    config: TrainConfig  # or FinetuneConfig: what both have is LoopConfig
    tokenizer: Tokenizer
    model: VisionLanguageModel
    momentum: MomentumModel
    queue: FeatureQueue
    optimizer: torch.optim.Optimizer
    ranks: Ranks
    epoch_steps: int  # in one pass over the photos
    data: int  # fingerprint of the training photos
    telling: tuple[Tensor, Tensor] | None = None  # of a run that masks words, see data.telling_pieces
    sampler: GroupedBatchSampler | None = None  # of a run that trains
    step: int = 0
    seconds: float = 0.0
    writer: Writer = field(default_factory=Writer)
    unreadable: set[str] = field(default_factory=set)
    generator: torch.Generator | None = None  # of the step under way

    def __post_init__(self):
        self.device = self.ranks.device
        self.total_steps = self.config.steps or self.config.epochs * self.epoch_steps
        self.mask_id = self.tokenizer.token_to_id("[MASK]")
        self.word_ids = word_ids(self.tokenizer).to(self.device)
        self.antonyms, self.synonyms = (word_pairs(self.tokenizer, w).to(self.device) for w in (ANTONYMS, SYNONYMS))

    @property
    def collate(self) -> Collate:
        """Makes batches for this run."""
        return Collate(self.tokenizer, self.telling)

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
        share, warmup = self.config.itm_share, self.config.itm_warmup
        return share * min(1.0, max(0.0, self.step / warmup - 1)) if warmup else share

    def seed_step(self) -> None:
        """What a step draws depends on nothing before it, so that a resumed run draws the same."""
        seed = (self.config.seed * 1_000_003 + self.step + (self.ranks.rank << 40)) % 2**63
        torch.manual_seed(seed)  # dropout
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def negatives(self, sim: Tensor, forbidden: Tensor) -> Tensor:
        """`pick_negatives` of logits (B, K), as the config says at this step."""
        mode, margin = self.config.negatives, self.config.margin / self.model.temp.detach()
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


@dataclass(frozen=True)
class Job:
    """What the loop works on: pretraining by a recipe, or one of finetune.py's tasks."""

    name: str
    losses: Callable[[Run, dict], tuple[Losses, Logged]]
    validate: Callable[[Run], tuple[dict[str, float], list[str]]]  # figures, and lines for the eye
    select: str | None = None  # figure whose highest value is kept as best.pt
    patience: int = 0  # validations without a better one after which to stop; 0: never

    def best_step(self, lines: list[dict]) -> int | None:
        """Step of the best validation so far, the first of equals."""
        steps = [line for line in lines if self.select in line and not line.get("final")]
        return max(steps, key=lambda line: (line[self.select], -line["step"]))["step"] if steps else None

    def stalled(self, lines: list[dict]) -> bool:
        """Early stopping: has nothing become better for `patience` validations?"""
        if not self.patience or (best := self.best_step(lines)) is None:
            return False
        return len([line for line in lines if self.select in line and line["step"] > best]) >= self.patience


class Step(nn.Module):
    """A job's losses as the forward pass of one module, for DistributedDataParallel to take hold of."""

    def __init__(self, run: Run, job: Job):
        super().__init__()
        self.model, self.run, self.job = run.model, run, job

    def forward(self, batch: dict) -> tuple[Losses, Logged]:
        """Losses, and figures to log."""
        with autocast(self.run):
            return self.job.losses(self.run, batch)


def autocast(run: Run) -> contextlib.AbstractContextManager:
    """bf16 where it is asked for, otherwise nothing."""
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.precision == "bf16")


def build_optimizer(model: VisionLanguageModel, config: LoopConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: not on biases, norms, embeddings, tokens or the temperature."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        table = any(part in name for part in ("embeddings", "position_embed", "_token", "registers"))
        (rest if table or parameter.ndim < 2 else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), fused=True)


def build_run(config: LoopConfig, dataset: PhotoDataset, tokenizer: Tokenizer, ranks: Ranks | None = None) -> Run:
    """Model with random weights, momentum model, queue and optimiser of a new run, on its device."""
    torch.manual_seed(config.seed)
    ranks = ranks or Ranks(torch.device(config.device))
    if config.precision == "auto":
        config = replace(config, precision=ranks.first_says(fitting_precision(ranks.device)[0]))
    config = replace(config, model=replace(config.model, vocab_size=tokenizer.get_vocab_size()))
    model = VisionLanguageModel(config.model).to(ranks.device).train()
    momentum = MomentumModel(model, config.ema_decay)
    if config.compile:
        # a layer is asked in more forms than the default of 8: with and without photos, gradients, all tokens
        torch._dynamo.config.recompile_limit = 32
        for part in (*(p for m in (model, momentum.model) for p in (m.vision, m.text, m.fusion)), model.decoder):
            for layer in part.layers:
                layer.compile(dynamic=True)
    queue = FeatureQueue(config.queue).to(ranks.device)
    epoch_steps, optimizer = -(-len(dataset) // config.batch_size), build_optimizer(model, config)
    run = Run(config, tokenizer, model, momentum, queue, optimizer, ranks, epoch_steps, dataset.fingerprint())
    return run


def way_back(last: Path) -> str:
    """What to do when a run has diverged."""
    if not last.exists():
        return "there is no checkpoint yet; try a lower --lr"
    before = last.with_stem(f"{last.stem}-2")
    older = f"; should it fail again, put {before.name} in its place" if before.exists() else ""
    return f"{last} is the last good state: --resume with a lower --lr{older}"


class FiniteWatch:
    """Lets no update through whose gradient is NaN or infinite, and says so a step later: asking a GPU at once would
    make the host wait until it has done all that it was given."""

    def __init__(self, run: Run, last: Path):
        self.run, self.last, self.noted = run, last, []

    def note(self, values: dict[str, Tensor]) -> None:
        """Between the backward pass and the update: its values, loss and grad_norm among them."""
        sound = values["grad_norm"].isfinite()
        self.run.optimizer.found_inf = (~sound).float()  # on the device the fused AdamW leaves the weights as they are
        answer = (sound & values["loss"].isfinite()).to("cpu", non_blocking=True)
        there = torch.cuda.Event() if self.run.device.type == "cuda" else None
        if there:
            there.record()
        values = {key: value.detach() for key, value in values.items()}
        self.noted.append((self.run.step + 1, values, answer, there))

    def check(self, now: bool) -> None:
        """Raise NonFiniteLoss for a step before the last; `now`, as before a checkpoint, for the last, too. All ranks
        have the same gradient, so all raise at once."""
        known, self.noted = self.noted[: None if now else -1], [] if now else self.noted[-1:]
        for step, values, answer, there in known:
            if there:
                there.synchronize()
            if not answer:
                self.run.writer.wait()
                parts = [key for key in values if key in (*LOSSES, "grad_norm")]
                wrong = [key for key in parts if not values[key].isfinite()]
                told = ", ".join(f"{key} {value:.3g}" for key, value in values.items())
                raise NonFiniteLoss(f"step {step}: {' and '.join(wrong)} not finite ({told}); {way_back(self.last)}")
