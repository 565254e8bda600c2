"""Grouped batch sampling: similar items share a batch. After GRIT-VLP (Byun et al. 2022, §3.2).

The first epoch is random. While an epoch runs, the features of its items are collected in a pool. Whenever the pool
is full, it is shuffled and cut into search blocks, and a greedy chain orders the items of each block so that similar
items follow each other. Consecutive items of the chains become the batches of the *next* epoch.

An item is a row of the data set: an image and its caption. An id is a product or a caption. Two items of a batch that
share an id are positives, so neither can be the other's negative. Batches should therefore not repeat an id.

Letters: N items, B batch, E feature width, M items in a search block, G kinds of ids (products and captions).
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

SamplerMode = Literal["random", "hard", "semihard"]
SEARCH_SIZE = 1920  # items in a search block (GRIT-VLP's M)
POOL_BLOCKS = 4  # search blocks in a full pool
SWAP_TRIALS = 100  # random items that an item which repeats an id may be swapped with (our choice)


def chain(
    sim: np.ndarray,
    ids: np.ndarray,
    first: int,
    batch_size: int,
    mode: SamplerMode = "hard",
    margin: float = 0.0,
) -> np.ndarray:
    """Order the items of a search block greedily, from item `first` on.

        image of an item → the most similar caption of an unused item → the most similar image of an unused item → …

    The anchor is the last item of the chain.
    hard      the most similar unused item (GRIT-VLP)
    semihard  the most similar unused item that is less similar than the anchor's own pair, by more than `margin`.
              It is less often a false negative than the hard one. FaceNet's semi-hard negatives lie inside the margin,
              not beyond it. SyncMask's exact rule is not published where we could read it (our choice).

    An item that shares an id with one of the last batch_size − 1 items is taken only if no other item is left. So a
    batch may be cut anywhere.

    sim float32 (M, M): cosine of image i and caption j, own pairs on the diagonal · ids int (G, M)
    -> order int64 (M,)
    """
    size = len(sim)
    window = max(1, batch_size - 1)
    to_captions = sim
    to_images = np.ascontiguousarray(sim.T)
    limits = sim.diagonal() - margin
    same_id = items_with_same_id(ids)
    recent_counts = [0] * size  # for each item: how many of the last `window` items share an id with it
    # Subtracted from the cosines. 10: shares an id with a recent item, so all others come first. ∞: used.
    penalty = np.zeros(size, dtype=np.float32)
    order = np.empty(size, dtype=np.int64)
    anchor = first
    for position in range(size):
        order[position] = anchor
        penalty[anchor] = np.inf
        for item in same_id[anchor]:
            recent_counts[item] += 1
            if recent_counts[item] == 1:
                penalty[item] += 10
        if position >= window:
            leaving = order[position - window]  # is no longer recent
            for item in same_id[leaving]:
                recent_counts[item] -= 1
                if recent_counts[item] == 0:
                    penalty[item] -= 10
        scores = to_captions[anchor] if position % 2 == 0 else to_images[anchor]
        if mode == "semihard":
            # cosines lie in [−1, 1], so items above the limit come last, the least similar of them first
            scores = np.where(scores < limits[anchor], scores, -3 - scores)
        anchor = int((scores - penalty).argmax())
    return order


def items_with_same_id(ids: np.ndarray) -> list[set[int]]:
    """List for each item the items that share an id with it, itself among them. ids (G, N) -> N sets"""
    same_id: list[set[int]] = [set() for _ in range(ids.shape[1])]
    for ids_of_kind in ids.tolist():
        items_of: dict[int, list[int]] = {}
        for item, item_id in enumerate(ids_of_kind):
            items_of.setdefault(item_id, []).append(item)
        for items in items_of.values():
            for item in items:
                same_id[item].update(items)
    return same_id


def repeated_positions(ids: np.ndarray) -> list[int]:
    """List the positions in a batch whose item shares an id with an earlier item. ids (G, B)"""
    positions = []
    for position, same_id in enumerate(items_with_same_id(ids)):
        if min(same_id) < position:
            positions.append(position)
    return positions


def resolve_conflicts(batches: list[np.ndarray], ids: np.ndarray, rng: np.random.Generator) -> int:
    """Swap items between batches, in place, so that no batch repeats an id. ids (G, N)

    An item that repeats an id is swapped with the first suitable one of SWAP_TRIALS random items, or stays.
    -> how many items repeat an id of their batch in the end
    """

    def fits(item: int, batch: np.ndarray, position: int) -> bool:
        others = np.delete(batch, position)
        return not (ids[:, others] == ids[:, item, None]).any()

    for batch in batches:
        for position in repeated_positions(ids[:, batch]):
            item = batch[position]
            if fits(item, batch, position):
                continue  # an earlier swap has resolved the conflict
            for _ in range(SWAP_TRIALS):
                other_batch = batches[rng.integers(len(batches))]
                other_position = rng.integers(len(other_batch))
                other = other_batch[other_position]
                if fits(other, batch, position) and fits(item, other_batch, other_position):
                    batch[position] = other
                    other_batch[other_position] = item
                    break
    return sum(len(repeated_positions(ids[:, batch])) for batch in batches)


class GroupedBatchSampler:
    """A batch sampler: lists of items, each item once an epoch, deterministic in (seed, epoch, features).

    No batch repeats a product or a caption where a swap can avoid it. `conflicts` counts the items of the current epoch
    that repeat one.

    ids: int (G, N), a row of product ids and a row of caption ids
    batch_size: B, of all processes together
    mode: as `chain`, or random, without chains
    margin: a semihard negative is less similar than the anchor's own pair by more than this
    search_size: M, items in a search block
    process: rank and number of the processes. All processes compose the same batches, and each iterates over an equal
    share of every batch. Up to world_size − 1 items are left over in an epoch; the next epoch has them for certain.

    Loader workers fetch batches ahead of training, so the training loop counts the batches that were used. It calls
    `collect` after each batch, and `set_epoch` to move on.
    """

    def __init__(
        self,
        ids: np.ndarray,
        batch_size: int,
        mode: SamplerMode = "random",
        margin: float = 0.0,
        seed: int = 0,
        search_size: int = SEARCH_SIZE,
        process: tuple[int, int] = (0, 1),
    ):
        self.ids = ids
        self.batch_size = batch_size
        self.mode = mode
        self.margin = margin
        self.seed = seed
        self.search_size = search_size
        self.rank, self.world_size = process
        self.dataset_size = ids.shape[1]
        self.epoch = 0
        self.first_batch = 0
        self._left_over = np.arange(0)
        self._begin_epoch(np.arange(0))

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch. No batch is small: sizes differ by world_size at most."""
        batches = -(-self.dataset_size // self.batch_size)
        return min(batches, self.dataset_size // self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Give this process's share of each batch, from `first_batch` on."""
        for batch in self._batches[self.first_batch :]:
            share = len(batch) // self.world_size
            yield batch[self.rank * share : (self.rank + 1) * share].tolist()

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Move to a batch of an epoch. A new epoch is composed of what was collected in the epoch before."""
        if epoch != self.epoch:
            self._chain_pool()
            self.epoch = epoch
            self._begin_epoch(np.concatenate([np.arange(0), *self._chains]))
        self.first_batch = first_batch

    @torch.no_grad()
    def collect(self, indices: Tensor, image_feat: Tensor, text_feat: Tensor) -> None:
        """Collect the batch that was just trained on. indices (B,), unit-length image_feat, text_feat (B, E)

        The tensors stay on their device until they are chained, since copying them now would wait for the device.
        """
        if self.mode == "random":
            return
        self._pool.append([indices, image_feat.half(), text_feat.half()])
        if sum(len(batch[0]) for batch in self._pool) >= self.search_size * POOL_BLOCKS:
            self._chain_pool()

    def _begin_epoch(self, chained: np.ndarray) -> None:
        """Cut the items of a new epoch into batches: left-over items, chained items, the rest in random order."""
        rng = np.random.default_rng((1, self.seed, self.epoch))
        ordered = np.concatenate([self._left_over, chained])
        # an unreadable image is replaced by another one, which is then collected twice: the first time counts
        _, first_positions = np.unique(ordered, return_index=True)
        ordered = ordered[np.sort(first_positions)]
        rest = np.setdiff1d(np.arange(self.dataset_size), ordered)
        order = np.concatenate([ordered, rng.permutation(rest)]).astype(np.int64)
        batches, self._left_over = self._cut(order)
        self.conflicts = resolve_conflicts(batches, self.ids, rng)
        self._batches = [batches[i] for i in rng.permutation(len(batches))]
        self._pool: list[list[Tensor]] = []  # indices and features of each batch that was collected
        self._chains: list[np.ndarray] = []  # ordered items of each search block

    def _cut(self, order: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Cut items (N,) into batches that the processes share evenly. -> batches, left-over items"""
        share = self.dataset_size // self.world_size  # items of a process in an epoch
        # batch k ends after ceil(k · share / batches) items of each process
        ends = -(-np.arange(1, len(self) + 1) * share // len(self)) * self.world_size
        *batches, left_over = np.split(order, ends)
        return batches, left_over

    def _chain_pool(self) -> None:
        """Shuffle the pool, cut it into search blocks, and chain the items of each block."""
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
            order = chain(sim, self.ids[:, items], first, self.batch_size, self.mode, self.margin)
            self._chains.append(items[order])

    @property
    def order(self) -> np.ndarray:
        """All items of this epoch in their order."""
        return np.concatenate(self._batches)

    def state_dict(self) -> dict:
        """Return what a resumed run needs, in tensors and plain numbers."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "first_batch": self.first_batch,
            "conflicts": self.conflicts,
            "order": torch.from_numpy(self.order),
            "sizes": [len(batch) for batch in self._batches],
            "left_over": torch.from_numpy(self._left_over),
            "pool": [[tensor.cpu() for tensor in batch] for batch in self._pool],
            "chains": [torch.from_numpy(items) for items in self._chains],
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`, whatever its number of processes."""
        self.seed = state["seed"]
        self.epoch = state["epoch"]
        self.first_batch = state["first_batch"]
        self.conflicts = state["conflicts"]
        self._pool = state["pool"]
        self._chains = [items.numpy() for items in state["chains"]]
        self._batches = [items.numpy() for items in state["order"].split(state["sizes"])]
        self._left_over = state["left_over"].numpy()
        if any(len(batch) % self.world_size for batch in self._batches):  # cut for another number of processes
            items = np.concatenate([*self._batches, self._left_over])
            self._batches, self._left_over = self._cut(items)
