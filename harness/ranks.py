"""Several processes under torchrun that together do what one would."""

import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import TOKEN_KEYS
from harness.flags import ConfigError


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
            return x.index_select(0, wanted)  # not x[wanted], whose gradient threads sum up in any order
        wanted, order = wanted.sort()  # so that what one rank gives lies together
        asked = self.gather(wanted)
        rows = torch.tensor(self.rows, device=x.device)
        asking = torch.arange(self.count, device=x.device).repeat_interleave(rows)
        giving = torch.bucketize(asked, rows.cumsum(0), right=True)
        traffic = torch.bincount(asking * self.count + giving, minlength=self.count**2).view(self.count, -1).tolist()
        given, taken = [line[self.rank] for line in traffic], traffic[self.rank]
        mine = x.index_select(0, asked[giving == self.rank] - self.first)
        return Exchange.apply(mine, given, taken).index_select(0, order.argsort())

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
