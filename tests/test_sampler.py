"""Batches: every index once, seeded, resumable."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sampler import BatchSampler


@given(size=st.integers(1, 200), batch=st.integers(1, 40), epoch=st.integers(0, 5))
def test_every_index_once_an_epoch_and_resumable_anywhere(size, batch, epoch):
    sampler = BatchSampler(size, batch, seed=3)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(i for b in batches for i in b) == list(range(size))
    for first in range(len(batches) + 1):
        sampler.set_epoch(epoch, first)
        resumed = BatchSampler(size, batch)
        resumed.load_state_dict(sampler.state_dict())
        assert list(resumed) == batches[first:]


def test_epochs_and_seeds_differ():
    orders = set()
    for seed in (0, 1):
        sampler = BatchSampler(50, 10, seed)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            orders.add(str(list(sampler)))
    assert len(orders) == 4


def test_nothing_to_sample_is_refused():
    with pytest.raises(ValueError, match="nothing to sample"):
        BatchSampler(0, 4)
