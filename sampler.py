"""Which images share a batch: grouped batch sampling, after GRIT-VLP (Byun et al. 2022, §3.2).

The first epoch is random. While an epoch runs, the features of its items are collected. Whenever a pool of them is
full, it is shuffled and cut into search blocks, and a greedy chain orders each block, so that similar items follow
each other. Consecutive items of the chains become the batches of the *next* epoch.

Letters: N items, B batch, E feature width, M items in a search block, G kinds of ids.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

SamplerMode = Literal["random", "hard", "semihard"]
SEARCH_SIZE = 1920  # items in a search block (GRIT-VLP's M)
POOL_BLOCKS = 4  # search blocks that are collected before they are shuffled together
SWAP_TRIALS = 100  # random items that an item which repeats an id of its batch is tried to be swapped with (our choice)


def chain(
    sim: np.ndarray,
    groups: np.ndarray,
    first: int,
    batch_size: int,
    mode: SamplerMode = "hard",
    margin: float = 0.0,
) -> np.ndarray:
    """Order the items of a search block greedily, from item `first` on:

        image of an item → the most similar caption of an unused one → the most similar image of an unused one → …

    hard      the most similar unused item (GRIT-VLP)
    semihard  the most similar one of those *less* similar than the anchor's own pair, by `margin` at least, against
              false negatives; FaceNet's lie inside its margin, not beyond it. SyncMask's exact rule is not published
              where we could read it (our choice)

    sim (M, M): cosines of image i and caption j, the items' own pairs on the diagonal · groups (G, M): an item is put
    off while it shares an id with one of the last batch_size − 1 items, so that a batch may be cut anywhere
    -> order (M,)
    """
    size = len(sim)
    window = max(1, batch_size - 1)
    to_captions, to_images = sim, np.ascontiguousarray(sim.T)
    limits = sim.diagonal() - margin
    same_id = items_with_same_id(groups)
    near = [0] * size  # how many of the last items share an id with each item
    penalty = np.zeros(size, dtype=np.float32)  # 10 while an item is near, which puts it behind all others; ∞ once used
    order = np.empty(size, dtype=np.int64)
    anchor = first
    for position in range(size):
        order[position] = anchor
        penalty[anchor] = np.inf
        for item in same_id[anchor]:
            near[item] += 1
            if near[item] == 1:
                penalty[item] += 10
        if position >= window:
            for item in same_id[order[position - window]]:
                near[item] -= 1
                if near[item] == 0:
                    penalty[item] -= 10
        scores = to_captions[anchor] if position % 2 == 0 else to_images[anchor]
        if mode == "semihard":
            # cosines lie in [−1, 1]: items below the limit come first, then the others, the least similar first
            scores = np.where(scores < limits[anchor], scores, -3 - scores)
        anchor = int((scores - penalty).argmax())
    return order


def items_with_same_id(ids: np.ndarray) -> list[set[int]]:
    """List for each item, a column of `ids` (G, X), the items with the same id in some row, itself among them."""
    same_id: list[set[int]] = [set() for _ in range(ids.shape[1])]
    for row in ids.tolist():
        members: dict[int, list[int]] = {}
        for item, name in enumerate(row):
            members.setdefault(name, []).append(item)
        for together in members.values():
            for item in together:
                same_id[item].update(together)
    return same_id


def repeats(ids: np.ndarray) -> list[int]:
    """List the positions in a batch whose item shares an id, in some row of `ids` (G, B), with an earlier item."""
    return [position for position, same_id in enumerate(items_with_same_id(ids)) if min(same_id) < position]


def resolve_conflicts(batches: list[np.ndarray], groups: np.ndarray, rng: np.random.Generator) -> int:
    """Swap items between batches, in place, until no batch holds two with the same id in a row of `groups` (G, N).

    Each item that repeats an id is swapped with the first that fits of `SWAP_TRIALS` random ones, or stays.
    -> how many items repeat an id of their batch in the end
    """

    def fits(item: int, batch: np.ndarray, position: int) -> bool:
        others = np.delete(batch, position)
        return not (groups[:, others] == groups[:, item, None]).any()

    for batch in batches:
        for position in repeats(groups[:, batch]):
            item = batch[position]
            if fits(item, batch, position):
                continue  # an earlier swap has mended it
            for _ in range(SWAP_TRIALS):
                other_batch = batches[rng.integers(len(batches))]
                other_position = rng.integers(len(other_batch))
                other = other_batch[other_position]
                if fits(other, batch, position) and fits(item, other_batch, other_position):
                    batch[position], other_batch[other_position] = other, item
                    break
    return sum(len(repeats(groups[:, batch])) for batch in batches)


class GroupedBatchSampler:
    """Give batches as lists of indices, every index once an epoch, deterministic in (seed, epoch, features).

    No batch holds two images of one product, or two identical captions, where a swap can avoid it; `conflicts` counts
    the items of the current epoch for which none could.

    groups: int (G, N), a row of product ids and a row of caption ids · mode: as `chain`, or random, without chains
    margin: a semihard negative is at least this much less similar than the anchor's own pair
    search_size: M, items in a search block
    process: rank and number of the processes. All of them compose the same batches and iterate over a share of each.
    The shares are equal: the fewer than world_size items that are left over in an epoch come first in the next one.

    The position inside an epoch is given, not counted: loader workers fetch ahead of training, so only the training
    loop knows how many batches were used. It calls `collect` after each batch and `set_epoch` to move on.
    """

    def __init__(
        self,
        groups: np.ndarray,
        batch_size: int,
        mode: SamplerMode = "random",
        margin: float = 0.0,
        seed: int = 0,
        search_size: int = SEARCH_SIZE,
        process: tuple[int, int] = (0, 1),
    ):
        self.groups = groups
        self.batch_size = batch_size
        self.mode = mode
        self.margin = margin
        self.seed = seed
        self.search_size = search_size
        self.rank, self.world_size = process
        self.dataset_size = groups.shape[1]
        self.epoch, self.first_batch = 0, 0
        self._left_over = np.arange(0)
        self._begin_epoch(np.arange(0))

    def __len__(self) -> int:
        """Batches in a whole epoch. Their sizes differ by world_size at most, so none is too small to learn from."""
        batches = -(-self.dataset_size // self.batch_size)
        return min(batches, self.dataset_size // self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches[self.first_batch :]:
            share = len(batch) // self.world_size
            yield batch[self.rank * share : (self.rank + 1) * share].tolist()

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Iterate over `epoch` next, from batch `first_batch` on. A new epoch is composed of what was collected."""
        if epoch != self.epoch:
            self._chain_pool()
            self.epoch = epoch
            self._begin_epoch(np.concatenate([np.arange(0), *self._chains]))
        self.first_batch = first_batch

    @torch.no_grad()
    def collect(self, indices: Tensor, image_feat: Tensor, text_feat: Tensor) -> None:
        """Remember the batch just trained on: indices (B,), unit-length features (B, E) and (B, E). They stay on their
        device until they are chained, since fetching them now would wait for it."""
        if self.mode == "random":
            return
        self._pool.append([indices, image_feat.half(), text_feat.half()])
        if sum(len(part[0]) for part in self._pool) >= self.search_size * POOL_BLOCKS:
            self._chain_pool()

    def _begin_epoch(self, chained: np.ndarray) -> None:
        """Cut what was left over, then what was chained, then the rest in random order, into batches."""
        rng = np.random.default_rng((1, self.seed, self.epoch))
        known = np.concatenate([self._left_over, chained])
        # an image that cannot be read is replaced by another, which is then collected twice
        first_seen = np.sort(np.unique(known, return_index=True)[1])
        rest = np.setdiff1d(np.arange(self.dataset_size), known)
        order = np.concatenate([known[first_seen], rng.permutation(rest)]).astype(np.int64)
        batches, self._left_over = self._cut(order)
        self.conflicts = resolve_conflicts(batches, self.groups, rng)
        self._batches = [batches[i] for i in rng.permutation(len(batches))]
        self._pool: list[list[Tensor]] = []  # of each batch that waits for a full pool: indices and features
        self._chains: list[np.ndarray] = []  # of each search block of this epoch its items, in order

    def _cut(self, order: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Cut items (N,) into batches that the processes share evenly. -> batches, what is left over"""
        share = self.dataset_size // self.world_size
        # batch k ends after ceil(k · share / batches) items of each process
        ends = -(-np.arange(1, len(self) + 1) * share // len(self)) * self.world_size
        *batches, left_over = np.split(order, ends)
        return batches, left_over

    def _chain_pool(self) -> None:
        """Shuffle what was collected, cut it into search blocks, and chain each."""
        if not self._pool:
            return
        indices = np.concatenate([batch[0].cpu().numpy() for batch in self._pool])
        image_feat = np.concatenate([batch[1].cpu().numpy() for batch in self._pool])
        text_feat = np.concatenate([batch[2].cpu().numpy() for batch in self._pool])
        self._pool = []
        rng = np.random.default_rng((2, self.seed, self.epoch, len(self._chains)))
        shuffled = rng.permutation(len(indices))
        for start in range(0, len(shuffled), self.search_size):
            block = shuffled[start : start + self.search_size]
            items = indices[block]
            sim = image_feat[block].astype(np.float32) @ text_feat[block].astype(np.float32).T  # (M, M)
            first = int(rng.integers(len(block)))
            order = chain(sim, self.groups[:, items], first, self.batch_size, self.mode, self.margin)
            self._chains.append(items[order])

    @property
    def order(self) -> np.ndarray:
        """All items of this epoch in their order."""
        return np.concatenate(self._batches)

    def state_dict(self) -> dict:
        """All that a resumed run needs, in tensors and plain numbers."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "first_batch": self.first_batch,
            "conflicts": self.conflicts,
            "order": torch.from_numpy(self.order),
            "sizes": [len(batch) for batch in self._batches],
            "left_over": torch.from_numpy(self._left_over),
            "pool": [[part.cpu() for part in batch] for batch in self._pool],
            "chains": [torch.from_numpy(part) for part in self._chains],
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`, also one of another number of processes."""
        self.seed, self.epoch, self.first_batch = state["seed"], state["epoch"], state["first_batch"]
        self.conflicts, self._pool = state["conflicts"], state["pool"]
        self._batches = [part.numpy() for part in state["order"].split(state["sizes"])]
        self._left_over = state["left_over"].numpy()
        if any(len(batch) % self.world_size for batch in self._batches):  # cut for another number of processes
            self._batches, self._left_over = self._cut(np.concatenate([*self._batches, self._left_over]))
        self._chains = [part.numpy() for part in state["chains"]]
