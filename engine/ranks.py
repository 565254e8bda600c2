"""Several processes under torchrun that together do what one would."""

import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data import TOKEN_KEYS
from engine.flags import ConfigError


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


class Route(NamedTuple):
    """How rows travel between the ranks, as one of them sees it."""

    mine: Tensor  # which of its rows it sends, to the first rank's question first
    given: list[int]  # how many to each rank
    taken: list[int]  # how many from each
    order: Tensor  # (B,) where among those that come each of the wanted ones is


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
    hosts: dist.ProcessGroup | None = None  # over Gloo: what it exchanges need not wait for a GPU
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
        hosts, patient = (dist.new_group(backend="gloo", timeout=timedelta(hours=hours)) for hours in (0.5, 6))
        return cls(where, dist.get_rank(), count, [0] * count, hosts, patient)

    @property
    def leads(self) -> bool:
        """Whether it is this one that writes and speaks."""
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
        mine = torch.tensor([len(batch["rows"]), longest, len(batch["unreadable"])])
        all_of_them = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(all_of_them, mine, self.hosts)
        self.rows, lengths, unreadable = torch.stack(all_of_them).T.tolist()
        if any(unreadable):
            reasons: list = [None] * self.count
            dist.all_gather_object(reasons, batch["unreadable"], self.hosts)
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

    def routes(self, *wanted: Tensor) -> list[Tensor | Route]:
        """How rows of the whole batch come here from the ranks that have them, for each of some `wanted` (B,). Asking
        who sends how many makes the host wait for its GPU, once a step."""
        if self.count == 1:
            return list(wanted)
        orders = [rows.argsort() for rows in wanted]  # so that what one rank gives lies together
        asked = [self.gather(rows[order]) for rows, order in zip(wanted, orders, strict=True)]
        ends = self.put(np.cumsum(self.rows))
        asking = self.put(np.repeat(np.arange(self.count), self.rows))
        giving = [torch.bucketize(rows, ends, right=True) for rows in asked]
        ways = [asking * self.count + ranks for ranks in giving]
        traffic = [way.new_zeros(self.count**2).index_add(0, way, torch.ones_like(way)) for way in ways]
        routes, size = [], (len(wanted), self.count, self.count)
        for number, lines in enumerate(torch.stack(traffic).view(size).tolist()):
            given, taken = [line[self.rank] for line in lines], lines[self.rank]
            mine = (giving[number] != self.rank).byte().argsort(stable=True)[: sum(given)]
            routes.append(Route(asked[number][mine] - self.first, given, taken, orders[number].argsort()))
        return routes

    def fetch(self, x: Tensor, route: Tensor | Route) -> Tensor:
        """The rows of x (B, …) that a route of `routes` is about; gradients go back the way they came. Less travels
        than in gathering: what a rank receives does not grow with their number."""
        if self.count == 1:
            return x.index_select(0, route)  # not x[route], whose gradient threads sum up in any order
        return Exchange.apply(x.index_select(0, route.mine), route.given, route.taken).index_select(0, route.order)

    def put(self, numbers: np.ndarray) -> Tensor:
        """Numbers on the device, without waiting for it."""
        host = torch.from_numpy(numbers)
        return (host.pin_memory() if self.device.type == "cuda" else host).to(self.device, non_blocking=True)

    def mean(self, value: Tensor, terms: Tensor | int) -> Tensor:
        """A mean over so many `terms` (or the True ones) of this rank, weighted so that the plain mean of all ranks'
        values, which is what DistributedDataParallel makes of gradients, is the mean over all terms of all ranks."""
        if self.count == 1:
            return value
        mine = terms.sum().float() if isinstance(terms, Tensor) else torch.full((), float(terms), device=self.device)
        total = mine.clone()
        dist.all_reduce(total)
        return value * (self.count * mine / total.clamp(min=1))

    def sum(self, x: Tensor) -> Tensor:
        """x (…) of all ranks added up, in place."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

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
        flags = torch.tensor([flag], dtype=torch.int)
        dist.all_reduce(flags, group=self.hosts)
        return bool(flags.item())

    def wait(self) -> None:
        """Until all are here, however long it takes."""
        if self.count > 1:
            dist.barrier(self.patient)

    def first_says(self, what):
        """What the first rank has there."""
        said = [what]
        if self.count > 1:
            dist.broadcast_object_list(said, group=self.hosts)
        return said[0]

    def merge(self, parts: list) -> list:
        """A list of which each rank made some entries, and has None for the others, whole."""
        if self.count == 1:
            return parts
        lists: list = [None] * self.count
        dist.all_gather_object(lists, parts, self.patient)
        return [next(part for part in versions if part is not None) for versions in zip(*lists, strict=True)]

    def check_same(self, what: str, number: int) -> None:
        """Raise ConfigError where ranks do not have the same number."""
        if self.on_any(self.first_says(number) != number):
            raise ConfigError(f"{what} differ from process to process; are flags, data and --out the same everywhere?")

    def parallel(self, step: nn.Module) -> nn.Module:
        """The same step, whose backward pass also averages gradients over the ranks."""
        # static_graph: most recipes leave the MIM decoder unused, but each step uses what the first one did
        return DistributedDataParallel(step, static_graph=True) if self.count > 1 else step
