"""Which photos share a batch: grouped batch sampling, after GRIT-VLP (Byun et al. 2022, §3.2).

While an epoch runs, the features of its photos are collected. Whenever a pool of them is full, it is shuffled and cut
into search blocks, in a thread beside training and shared out among processes; inside a block a greedy chain

    photo of an item → the most similar text of an unused one → the most similar photo of an unused one → …

orders the items, and consecutive members of the chains become the batches of the *next* epoch. The first epoch is
random. "Most similar" depends on the mode:

    random     no chains, every epoch
    hard       the most similar unused item (GRIT-VLP)
    semihard   the most similar one of those *less* similar than the anchor's own pair, by a margin at least, against
               false negatives; FaceNet's lie inside its margin, not beyond it. SyncMask's exact rule is not published
               where we could read it (choice)

Letters: N items, B batch, E feature width, M search block.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import Tensor

SamplerMode = Literal["random", "hard", "semihard"]
SEARCH_SIZE = 1920  # items in a search block (GRIT-VLP's M)


class Alone:
    """The one process of a run that has no others: see `engine.ranks.Ranks`, which may take its place."""

    rank, count = 0, 1

    @staticmethod
    def merge(parts: list) -> list:
        """A list whose entries were made by one process or another, whole."""
        return parts


class GroupedBatchSampler:
    """An iterable of index lists: every index exactly once an epoch, deterministic in (seed, epoch, features).

    No batch holds two photos of one product, or two identical captions, where a swap can avoid it; `conflicts` counts
    the photos of the current epoch for which none could.

    search_size: M, items in a search block · pool_blocks: blocks collected before they are shuffled together
    product_ids, caption_ids: (N,), default all different
    margin: a semihard negative is at least this much less similar than the anchor's own pair
    ranks: the processes that share the chaining; `set_epoch` and `state_dict` are then for all to call

    The position inside an epoch is given, not counted: loader workers fetch ahead of training, so only the training
    loop knows how many batches were used. It calls `collect` after each batch and `set_epoch` to move on.
    """

    def __init__(
        self, dataset_size: int, batch_size: int, search_size: int = SEARCH_SIZE, mode: SamplerMode = "random",
        product_ids: np.ndarray | None = None, caption_ids: np.ndarray | None = None, seed: int = 0,
        pool_blocks: int = 4, margin: float = 0.0, ranks: Alone | None = None,
    ):  # fmt: skip
        if min(dataset_size, batch_size, search_size, pool_blocks) < 1:
            raise ValueError(
                f"nothing to sample: {dataset_size} items, batches of {batch_size}, blocks of {search_size}"
            )
        self.dataset_size, self.batch_size, self.search_size = dataset_size, batch_size, search_size
        self.mode, self.seed, self.pool_blocks, self.margin = mode, seed, pool_blocks, margin
        self.ranks, self._thread = ranks or Alone(), ThreadPoolExecutor(1, "chaining")
        groups = (np.arange(dataset_size) if ids is None else np.asarray(ids) for ids in (product_ids, caption_ids))
        self.groups = np.stack(list(groups))  # (2, N)
        self.epoch, self.first_batch = 0, 0
        self._begin_epoch(np.arange(0))

    def __len__(self) -> int:
        """Batches in a whole epoch. Their sizes differ by one at most, so none is too small to learn from."""
        return -(-self.dataset_size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches[self.first_batch :]:
            yield batch.tolist()

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Iterate over `epoch` next, from batch `first_batch` on. A new epoch is composed of what was collected."""
        if epoch != self.epoch:
            self._chain_pool()
            chained = self._gather_chains()
            self.epoch = epoch
            self._begin_epoch(np.concatenate([np.arange(0), *chained]))
        self.first_batch = first_batch

    @torch.no_grad()
    def collect(self, indices: Tensor, image_feat: Tensor, text_feat: Tensor) -> None:
        """Remember the batch just trained on: indices (B,), unit-length features (B, E) and (B, E). They stay on their
        device until they are chained, for fetching them now would wait for it."""
        if self.mode == "random":
            return
        self._pool.append([indices, image_feat.half(), text_feat.half()])
        if sum(len(part[0]) for part in self._pool) >= self.search_size * self.pool_blocks:
            self._chain_pool()

    def _begin_epoch(self, chained: np.ndarray) -> None:
        """Cut what was chained, then in random order what was not, into batches, and forget the last epoch."""
        rng = np.random.default_rng((1, self.seed, self.epoch))
        rest = np.setdiff1d(np.arange(self.dataset_size), chained)
        order = np.concatenate([chained, rng.permutation(rest)]).astype(np.int64)
        batch_of = np.arange(self.dataset_size) * len(self) // self.dataset_size
        self.conflicts = separate(order, batch_of, self.groups, rng)
        batches = np.split(order, np.flatnonzero(np.diff(batch_of)) + 1)
        self._batches = [batches[i] for i in rng.permutation(len(batches))]
        self._pool: list[list[Tensor]] = []
        self._chains: list[np.ndarray] = []  # what was chained of the epoch under way
        self._chaining: list[Future] = []  # and what is being chained, a pool each
        self._blocks = 0  # how many search blocks that is

    def _chain_pool(self) -> None:
        if self._pool:
            where = self._pool[-1][0].device  # what was collected before a resumption is on the CPU
            with torch.autocast(where.type, enabled=False):  # which has no half precision on a CPU
                pool = [torch.cat([x.to(where) for x in part]) for part in zip(*self._pool, strict=True)]
            self._pool = []
            self._chaining.append(self._thread.submit(self._chain_blocks, pool, self._blocks))
            self._blocks += -(-len(pool[0]) // self.search_size)

    def _chain_blocks(self, pool: list[Tensor], number: int) -> list[np.ndarray | None]:
        """The items of a pool's search blocks in order, from block `number` on; None for the blocks of other ranks."""
        indices, image_feat, text_feat = (part.cpu().numpy() for part in pool)
        rng, chains = np.random.default_rng((2, self.seed, self.epoch, number)), []
        shuffled = rng.permutation(len(indices))
        for start in range(0, len(shuffled), self.search_size):
            block = shuffled[start : start + self.search_size]
            first, items = int(rng.integers(len(block))), indices[block]
            if (number + len(chains)) % self.ranks.count != self.ranks.rank:
                chains.append(None)
                continue
            sim = image_feat[block].astype(np.float32) @ text_feat[block].astype(np.float32).T  # (M, M)
            order = chain(sim, self.groups[:, items], first, self.batch_size, self.mode, self.margin)
            chains.append(items[order])
        return chains

    def _gather_chains(self) -> list[np.ndarray]:
        """All that was handed over to be chained, by all ranks, once it is done."""
        new = [block for pool in self._chaining for block in pool.result()]
        self._chains, self._chaining = self._chains + self.ranks.merge(new), []
        return self._chains

    @property
    def order(self) -> np.ndarray:
        """All items (N,) in the order of this epoch."""
        return np.concatenate(self._batches)

    def state_dict(self) -> dict:
        """All that a resumed run needs, in tensors and plain numbers; waits for what is being chained."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "first_batch": self.first_batch,
            "conflicts": self.conflicts,
            "order": torch.from_numpy(self.order),
            "sizes": [len(batch) for batch in self._batches],
            "pool": [[part.cpu() for part in batch] for batch in self._pool],
            "chains": [torch.from_numpy(part) for part in self._gather_chains()],
        }

    def load_state_dict(self, state: dict) -> None:
        self.seed, self.epoch, self.first_batch = state["seed"], state["epoch"], state["first_batch"]
        self.conflicts, self._pool = state["conflicts"], state["pool"]
        self._batches = [part.numpy() for part in state["order"].split(state["sizes"])]
        self._chains = [part.numpy() for part in state["chains"]]
        self._chaining, self._blocks = [], len(self._chains)


def chain(
    sim: np.ndarray, groups: np.ndarray, first: int, batch_size: int, mode: SamplerMode = "hard",
    margin: float = 0.0,
) -> np.ndarray:  # fmt: skip
    """Order the items of a search block greedily, from item `first` on.

    sim (M, M): photo i to text j, its diagonal the items' own pairs · groups (G, M): an item is put off while one of
    its group ids is among the last batch_size − 1 items, so that a batch may be cut anywhere. -> order (M,).
    """
    count, window = len(sim), max(1, batch_size - 1)
    rows = sim, np.ascontiguousarray(sim.T)  # photo to texts, text to photos
    limits = sim.diagonal() - margin
    kin = sharing(groups)
    near = [0] * count  # how many of the last items an item shares an id with
    penalty = np.zeros(count, dtype=np.float32)  # added to the scores: −10 while near, −∞ once used
    order = np.empty(count, dtype=np.int64)
    anchor = first
    for position in range(count):
        if position:
            scores = rows[(position + 1) % 2][anchor]
            if mode == "semihard":
                # cosines lie in [−1, 1]: those that qualify come first, then the rest, least violating first
                scores = np.where(scores < limits[anchor], scores, -3 - scores)
            anchor = int((scores + penalty).argmax())
        order[position], penalty[anchor] = anchor, -np.inf
        for item in kin[anchor]:
            near[item] += 1
            if near[item] == 1:
                penalty[item] -= 10
        for item in kin[order[position - window]] if position >= window else ():
            near[item] -= 1
            if near[item] == 0:
                penalty[item] += 10
    return order


def sharing(groups: np.ndarray) -> list[set[int]]:
    """For each item the items, itself among them, that have its id in a row of `groups` (G, M)."""
    kin: list[set[int]] = [set() for _ in range(groups.shape[1])]
    for ids in groups.tolist():
        together: dict[int, list[int]] = {}
        for item, name in enumerate(ids):
            together.setdefault(name, []).append(item)
        for members in together.values():
            for item in members:
                kin[item].update(members)
    return kin


def separate(order: np.ndarray, batch_of: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> int:
    """Swap items of `order` (N,) between batches, in place, until no batch holds two with the same id in a row of
    `groups` (G, N), each item with a random one of all that fit. -> how many repeat an id of their batch in the end.

    batch_of (N,): the batch that each position of `order` belongs to.
    """

    def repeated() -> np.ndarray:
        """Positions (N,) whose item shares an id with an earlier one of its batch."""
        found = np.zeros(len(order), dtype=bool)
        for ids in groups:
            again = np.ones(len(order), dtype=bool)
            again[np.unique(batch_of * (int(ids.max()) + 1) + ids[order], return_index=True)[1]] = False
            found |= again
        return found

    place = np.empty(groups.shape[1], dtype=np.int64)  # the position of each item
    place[order] = np.arange(len(order))
    by_id = [(np.argsort(ids, kind="stable"), np.sort(ids)) for ids in groups]

    def kin(items: np.ndarray) -> np.ndarray:
        """Positions of all that share an id with one of the items."""
        found = []
        for (items_by_id, ids), own in zip(by_id, groups, strict=True):
            next_one, past = np.searchsorted(ids, own[items]), np.searchsorted(ids, own[items], "right")
            while len(next_one):
                found.append(items_by_id[next_one])
                more = next_one + 1 < past
                next_one, past = next_one[more] + 1, past[more]
        return place[np.concatenate(found)]

    for position in repeated().nonzero()[0]:
        start, stop = np.searchsorted(batch_of, [batch_of[position], batch_of[position] + 1])
        item, others = order[position], np.delete(order[start:stop], position - start)
        if not (groups[:, others] == groups[:, item, None]).any():
            continue  # an earlier swap has already mended it
        # no place for it: where something clashes with those who stay here, and batches where it would clash itself
        closed = [kin(others)]
        for batch in np.unique(batch_of[kin(order[position, None])]):
            closed.append(np.arange(*np.searchsorted(batch_of, [batch, batch + 1])))
        closed = np.unique(np.concatenate(closed))
        if len(closed) == len(order):
            continue
        # one of the open positions, by its number among them
        there = rng.choice(len(order) - len(closed))
        there += np.searchsorted(closed - np.arange(len(closed)), there, "right")
        order[position], order[there] = order[there], order[position]
        place[order[[position, there]]] = position, there
    return int(repeated().sum())
