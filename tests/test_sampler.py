"""Grouped batches: every index once, chains by their definition, resumable anywhere, no avoidable repeats."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sampler import Alone, GroupedBatchSampler, chain, separate

MODES = ["random", "hard", "semihard"]


def features(size, seed=0, width=8):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.nn.functional.normalize(torch.randn(size, width, generator=generator), dim=1)
    return draw(), draw()


def run_epoch(sampler, epoch, image_feat, text_feat, first_batch=0):
    """What the training loop does: read each batch, then collect it. -> the batches."""
    sampler.set_epoch(epoch, first_batch)
    batches = []
    for number, batch in enumerate(list(sampler), first_batch):
        batches.append(batch)
        sampler.collect(torch.tensor(batch), image_feat[batch], text_feat[batch])
        sampler.first_batch = number + 1
    return batches


@settings(max_examples=60)
@given(
    size=st.integers(1, 90), batch=st.integers(1, 20), search=st.integers(1, 40), pool=st.integers(1, 3),
    views=st.integers(1, 4), mode=st.sampled_from(MODES),
)  # fmt: skip
def test_every_index_exactly_once_an_epoch(size, batch, search, pool, views, mode):
    products = np.arange(size) // views
    sampler = GroupedBatchSampler(size, batch, search, mode, products, products, seed=1, pool_blocks=pool)
    image_feat, text_feat = features(size)
    for epoch in range(3):
        batches = run_epoch(sampler, epoch, image_feat, text_feat)
        assert sorted(i for b in batches for i in b) == list(range(size))
        sizes = [len(b) for b in batches]
        assert len(batches) == len(sampler) and max(sizes) <= batch and max(sizes) - min(sizes) <= 1
        repeats = sum(len(b) - len({products[i] for i in b}) for b in batches)
        assert repeats <= sampler.conflicts


def test_conflicts_count_what_is_repeated_in_the_end():
    """One of these photos finds no other place at first, until another one's swap frees its batch."""
    products, captions = np.array([2, 2, 0, 4, 4, 3]), np.array([3, 3, 1, 1, 5, 5])
    sampler = GroupedBatchSampler(6, 5, 6, "random", products, captions, seed=3434)
    repeats = sum(len(b) - len({ids[i] for i in b}) for b in sampler for ids in (products, captions))
    assert repeats == sampler.conflicts == 0


@pytest.mark.parametrize("mode", MODES)
def test_deterministic_in_seed_epoch_and_features(mode):
    def batches(seed=0, feature_seed=0):
        sampler = GroupedBatchSampler(60, 8, 16, mode, seed=seed)
        return [run_epoch(sampler, epoch, *features(60, feature_seed)) for epoch in range(3)]

    assert batches() == batches() and batches() != batches(seed=1)
    assert (batches() == batches(feature_seed=1)) == (mode == "random")
    assert len({str(epoch) for epoch in batches()}) == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [(0, 3), (1, 0), (1, 4), (2, 7)])
def test_resumes_anywhere(mode, stop, tmp_path):
    """Through a file that is opened without running pickled code, as checkpoints are."""
    image_feat, text_feat = features(60)
    make = lambda: GroupedBatchSampler(60, 8, 16, mode, np.arange(60) // 3, seed=2, pool_blocks=2)
    whole, first = make(), make()
    expected = [run_epoch(whole, epoch, image_feat, text_feat) for epoch in range(4)]
    epoch, batch = stop
    for earlier in range(epoch):
        run_epoch(first, earlier, image_feat, text_feat)
    first.set_epoch(epoch)
    for number, rows in enumerate(list(first)[:batch]):
        first.collect(torch.tensor(rows), image_feat[rows], text_feat[rows])
        first.set_epoch(epoch, number + 1)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run_epoch(second, epoch, image_feat, text_feat, batch) == expected[epoch][batch:]
    assert run_epoch(second, epoch + 1, image_feat, text_feat) == (expected + [None])[epoch + 1] or epoch == 3


def test_features_are_collected_under_autocast_too():
    image_feat, text_feat = features(60)
    plain, cast = (GroupedBatchSampler(60, 8, 16, "hard", pool_blocks=2) for _ in range(2))
    expected = [run_epoch(plain, epoch, image_feat, text_feat) for epoch in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        assert [run_epoch(cast, epoch, image_feat, text_feat) for epoch in range(2)] == expected


class Recorder(Alone):
    """One process, which notes what it has chained."""

    def __init__(self):
        self.noted = []

    def merge(self, parts):
        self.noted.append(parts)
        return parts


class Share:
    """One of three processes, which gets the blocks of the others from a recording."""

    count = 3

    def __init__(self, rank, recording):
        self.rank, self.recording, self.chained = rank, iter(recording), 0

    def merge(self, parts):
        whole = next(self.recording)
        for part, there in zip(parts, whole, strict=True):
            assert part is None or np.array_equal(part, there)
        self.chained += sum(part is not None for part in parts)
        return whole


def test_processes_share_the_chaining_and_compose_the_same_batches():
    image_feat, text_feat = features(90)
    make = lambda ranks: GroupedBatchSampler(90, 8, 16, "semihard", seed=2, pool_blocks=2, ranks=ranks)

    def epochs(sampler):
        return [run_epoch(sampler, epoch, image_feat, text_feat) for epoch in range(3)]

    expected, shares = epochs(make(alone := Recorder())), [Share(rank, alone.noted) for rank in range(3)]
    assert all(epochs(make(share)) == expected for share in shares)
    counts = [share.chained for share in shares]
    assert sum(counts) == sum(map(len, alone.noted)) and max(counts) - min(counts) <= 2


def test_photos_that_were_never_collected_come_anyway():
    sampler = GroupedBatchSampler(40, 8, 10, "hard")
    image_feat, text_feat = features(40)
    sampler.set_epoch(0)
    for batch in sampler:
        seen = [i for i in batch if i % 5]
        sampler.collect(torch.tensor(seen), image_feat[seen], text_feat[seen])
    sampler.set_epoch(1)
    assert sorted(i for b in sampler for i in b) == list(range(40))


def slow_chain(sim, groups, first, batch_size, mode, margin):
    """The definition, item by item: similarities in plain lists, no tricks."""
    order, count = [first], len(sim)
    while len(order) < count:
        anchor, avoid = order[-1], order[-max(1, batch_size - 1) :]
        to_text = len(order) % 2 == 1
        candidates = []
        for item in range(count):
            if item in order:
                continue
            value = sim[anchor][item] if to_text else sim[item][anchor]
            repeats = any(g[item] == g[other] for g in groups for other in avoid)
            violates = mode == "semihard" and not value < sim[anchor][anchor] - margin
            candidates.append(((repeats, violates, value if violates else -value, item), item))
        order.append(min(candidates)[1])
    return order


@settings(max_examples=80)
@given(size=st.integers(1, 24), batch=st.integers(1, 9), seed=st.integers(0, 10**6), mode=st.sampled_from(MODES[1:]),
       margin=st.sampled_from([0.0, 0.2]), kinds=st.integers(1, 12))  # fmt: skip
def test_chain_equals_the_slow_definition(size, batch, seed, mode, margin, kinds):
    rng = np.random.default_rng(seed)
    sim = rng.uniform(-1, 1, (size, size)).astype(np.float32)
    groups, first = rng.integers(0, kinds, (2, size)), int(rng.integers(size))
    ours = chain(sim, groups, first, batch, mode, margin)
    assert ours.tolist() == slow_chain(sim.tolist(), groups.tolist(), first, batch, mode, np.float32(margin))


@pytest.mark.parametrize("mode", MODES[1:])
def test_chains_need_no_separation_where_there_is_room(mode):
    """Also where batches are cut elsewhere than every batch_size items."""
    image_feat, text_feat = features(205)
    products = np.arange(205) // 4
    order = chain((image_feat @ text_feat.T).numpy(), products[None], 0, 10, mode)[:150]  # the tail runs out of choice
    assert all(len(set(products[order[i : i + 10]])) == 10 for i in range(140))


def neighbours_similarity(mode):
    """Mean similarity of photos to the texts of the others in their batch, in the second epoch."""
    generator = torch.Generator().manual_seed(0)
    text_feat = torch.nn.functional.normalize(torch.randn(400, 6, generator=generator), dim=1)
    image_feat = torch.nn.functional.normalize(text_feat + 0.25 * torch.randn(400, 6, generator=generator), dim=1)
    sampler = GroupedBatchSampler(400, 10, 100, mode)
    run_epoch(sampler, 0, image_feat, text_feat)
    sampler.set_epoch(1)
    found = []
    for batch in sampler:
        sim = image_feat[batch] @ text_feat[batch].T
        found.append((sim.sum() - sim.trace()) / (len(batch) * (len(batch) - 1)))
    return float(torch.stack(found).mean())


def test_grouping_makes_batches_harder_and_semihard_less_so():
    random, hard, semihard = (neighbours_similarity(mode) for mode in MODES)
    assert random + 0.2 < semihard < hard


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=30), batch=st.integers(1, 8), seed=st.integers(0, 999))
def test_separate_keeps_every_item_and_counts_what_is_left(sizes, batch, seed):
    products = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(products))
    stuck = separate(order, np.arange(len(order)) // batch, products[None], rng)
    assert sorted(order.tolist()) == list(range(len(products)))
    cut = [order[i : i + batch] for i in range(0, len(order), batch)]
    assert sum(len(b) - len(set(products[b])) for b in cut) <= stuck


def test_separate_finds_room_where_there_is_some():
    products = np.repeat(np.arange(50), 4)  # all four photos side by side, the worst start
    order = np.arange(200)
    assert separate(order, np.arange(200) // 10, products[None], np.random.default_rng(0)) == 0
    assert all(len(set(products[order[i : i + 10]])) == 10 for i in range(0, 200, 10))
    assert (
        separate(np.arange(6), np.arange(6) // 3, np.zeros((1, 6), int), np.random.default_rng(0)) == 4
    )  # nowhere to go


def test_nothing_to_sample_is_refused():
    with pytest.raises(ValueError, match="nothing to sample"):
        GroupedBatchSampler(0, 4)
