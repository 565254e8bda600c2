"""Which items share a batch. Deterministic in (seed, epoch), and resumable in the middle of an epoch."""

from collections.abc import Iterator

import numpy as np


class BatchSampler:
    """Batches in a seeded random order: an iterable of index lists, every index exactly once an epoch.

    The position inside an epoch is given, not counted: loader workers fetch ahead of training, so only the
    training loop knows how many batches were really used. It calls `set_epoch(epoch, first_batch)`.
    """

    def __init__(self, dataset_size: int, batch_size: int, seed: int = 0):
        if dataset_size < 1 or batch_size < 1:
            raise ValueError(f"nothing to sample: {dataset_size} items in batches of {batch_size}")
        self.dataset_size, self.batch_size, self.seed = dataset_size, batch_size, seed
        self.epoch, self.first_batch = 0, 0

    def __len__(self) -> int:
        """Batches in a whole epoch; the last one may be smaller."""
        return -(-self.dataset_size // self.batch_size)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Iterate over `epoch` next, from batch `first_batch` on."""
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.dataset_size)
        for start in range(self.first_batch * self.batch_size, self.dataset_size, self.batch_size):
            yield order[start : start + self.batch_size].tolist()

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "first_batch": self.first_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed = state["seed"]
        self.set_epoch(state["epoch"], state["first_batch"])
