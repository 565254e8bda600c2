"""Grouped batches: every index once, chains by their definition, resumable anywhere, no repeats that can be avoided."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sampler import GroupedBatchSampler, chain, resolve_conflicts

MODES = ["random", "hard", "semihard"]


def features(size, seed=0, width=8):
    feats = torch.randn(2, size, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(feats, dim=2)


def unique_ids(size):
    """Make ids of items that share none."""
    return np.arange(size)[None]


def run_epoch(sampler, epoch, image_feat, text_feat, first_batch=0):
    """Read each batch, then collect it, as the training loop does. -> batches"""
    sampler.set_epoch(epoch, first_batch)
    batches = []
    for number, batch in enumerate(list(sampler), first_batch):
        batches.append(batch)
        sampler.collect(torch.tensor(batch), image_feat[batch], text_feat[batch])
        sampler.first_batch = number + 1
    return batches


@settings(max_examples=60)
@given(
    size=st.integers(1, 90),
    batch=st.integers(1, 20),
    search=st.integers(1, 20),
    views=st.integers(1, 4),
    mode=st.sampled_from(MODES),
)
def test_every_index_exactly_once_an_epoch(size, batch, search, views, mode):
    products = np.arange(size) // views
    sampler = GroupedBatchSampler(products[None], batch, mode, seed=1, search_size=search)
    image_feat, text_feat = features(size)
    for epoch in range(3):
        batches = run_epoch(sampler, epoch, image_feat, text_feat)
        assert sorted(i for b in batches for i in b) == list(range(size))
        sizes = [len(b) for b in batches]
        assert len(batches) == len(sampler) and max(sizes) <= batch and max(sizes) - min(sizes) <= 1
        assert sum(len(b) - len({products[i] for i in b}) for b in batches) == sampler.conflicts


@given(
    size=st.integers(3, 60), per_process=st.integers(1, 6), world_size=st.integers(1, 3), mode=st.sampled_from(MODES)
)
def test_processes_have_equal_shares_of_the_same_batches(size, per_process, world_size, mode):
    """Items that are left over in an epoch come in the next one."""
    image_feat, text_feat = features(size)
    samplers = [
        GroupedBatchSampler(unique_ids(size), per_process * world_size, mode, search_size=8, process=(rank, world_size))
        for rank in range(world_size)
    ]
    left_over = set()
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        seen = []
        for shares in zip(*samplers, strict=True):
            assert len({len(share) for share in shares}) == 1 and 1 <= len(shares[0]) <= per_process
            batch = [item for share in shares for item in share]
            for sampler in samplers:
                sampler.collect(torch.tensor(batch), image_feat[batch], text_feat[batch])
            seen += batch
        assert len(seen) == len(set(seen)) == size // world_size * world_size
        assert left_over <= set(seen) and len(samplers[0]) <= -(-size // (per_process * world_size))
        left_over = set(range(size)) - set(seen)


@pytest.mark.parametrize("world_size", [2, 3])
def test_another_number_of_processes_continues_with_equal_shares(world_size):
    single = GroupedBatchSampler(unique_ids(31), 6)
    saved = single.state_dict()
    samplers = [GroupedBatchSampler(unique_ids(31), 6, process=(rank, world_size)) for rank in range(world_size)]
    for sampler in samplers:
        sampler.load_state_dict(saved)
    shares = [share for sampler in samplers for share in sampler]
    assert all(shares) and len({len(sampler) for sampler in samplers}) == 1
    seen = [item for share in shares for item in share]
    assert len(seen) == len(set(seen)) == 31 // world_size * world_size
    assert samplers[0]._left_over.tolist() == sorted(set(range(31)) - set(seen))


def test_an_item_that_is_collected_twice_comes_once():
    """An unreadable image is replaced by another one, which is then collected twice."""
    image_feat, text_feat = features(40)
    sampler = GroupedBatchSampler(unique_ids(40), 8, "hard", search_size=5)
    for batch in list(sampler):
        batch[0] = batch[1]
        sampler.collect(torch.tensor(batch), image_feat[batch], text_feat[batch])
        sampler.collect(torch.tensor([7]), image_feat[[7]], text_feat[[7]])
    sampler.set_epoch(1)
    assert sorted(i for b in sampler for i in b) == list(range(40))


def test_conflicts_count_what_is_repeated_in_the_end():
    """Also where no swap fits an item at first, and the swap of another item then resolves its conflict."""
    products, captions = np.array([2, 2, 0, 4, 4, 3]), np.array([3, 3, 1, 1, 5, 5])
    for seed in range(50):
        sampler = GroupedBatchSampler(np.stack([products, captions]), 3, seed=seed)
        repeated = 0
        for a, b, c in sampler:
            pairs = (b, [a]), (c, [a, b])
            for item, earlier in pairs:
                repeated += any(products[item] == products[i] or captions[item] == captions[i] for i in earlier)
        assert repeated == sampler.conflicts


@pytest.mark.parametrize("mode", MODES)
def test_deterministic_in_seed_epoch_and_features(mode):
    def batches(seed=0, feature_seed=0):
        sampler = GroupedBatchSampler(unique_ids(60), 8, mode, seed=seed, search_size=8)
        return [run_epoch(sampler, epoch, *features(60, feature_seed)) for epoch in range(3)]

    assert batches() == batches() and batches() != batches(seed=1)
    assert (batches() == batches(feature_seed=1)) == (mode == "random")
    assert len({str(epoch) for epoch in batches()}) == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [(0, 3), (1, 0), (1, 4), (2, 7)])
def test_resumes_anywhere(mode, stop, tmp_path):
    """The state goes through a file that is opened without running pickled code, as checkpoints are."""
    image_feat, text_feat = features(60)
    given = np.arange(60)[None] // 3, 8, mode, 0.0, 2, 8
    uninterrupted, first = GroupedBatchSampler(*given), GroupedBatchSampler(*given)
    expected = [run_epoch(uninterrupted, epoch, image_feat, text_feat) for epoch in range(4)]
    epoch, batch = stop
    for earlier in range(epoch):
        run_epoch(first, earlier, image_feat, text_feat)
    first.set_epoch(epoch)
    for number, rows in enumerate(list(first)[:batch]):
        first.collect(torch.tensor(rows), image_feat[rows], text_feat[rows])
        first.set_epoch(epoch, number + 1)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = GroupedBatchSampler(*given)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run_epoch(second, epoch, image_feat, text_feat, batch) == expected[epoch][batch:]
    assert run_epoch(second, epoch + 1, image_feat, text_feat) == (expected + [None])[epoch + 1] or epoch == 3


def test_features_are_collected_under_autocast_too():
    image_feat, text_feat = features(60)
    plain, cast = (GroupedBatchSampler(unique_ids(60), 8, "hard", search_size=8) for _ in range(2))
    expected = [run_epoch(plain, epoch, image_feat, text_feat) for epoch in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        assert [run_epoch(cast, epoch, image_feat, text_feat) for epoch in range(2)] == expected


def test_items_that_were_never_collected_come_anyway():
    sampler = GroupedBatchSampler(unique_ids(40), 8, "hard", search_size=10)
    image_feat, text_feat = features(40)
    sampler.set_epoch(0)
    for batch in sampler:
        seen = [i for i in batch if i % 5]
        sampler.collect(torch.tensor(seen), image_feat[seen], text_feat[seen])
    sampler.set_epoch(1)
    assert sorted(i for b in sampler for i in b) == list(range(40))


def slow_chain(sim, ids, first, batch_size, mode, margin):
    """Order a search block by the definition of `chain`, item by item, with similarities in plain lists."""
    order, count = [first], len(sim)
    while len(order) < count:
        anchor, recent = order[-1], order[-max(1, batch_size - 1) :]
        to_text = len(order) % 2 == 1
        candidates = []
        for item in range(count):
            if item in order:
                continue
            value = sim[anchor][item] if to_text else sim[item][anchor]
            repeats = any(row[item] == row[other] for row in ids for other in recent)
            violates = mode == "semihard" and not value < sim[anchor][anchor] - margin
            candidates.append(((repeats, violates, value if violates else -value, item), item))
        order.append(min(candidates)[1])
    return order


@settings(max_examples=80)
@given(
    size=st.integers(1, 24),
    batch=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(MODES[1:]),
    margin=st.sampled_from([0.0, 0.2]),
    id_count=st.integers(1, 12),
)
def test_chain_equals_the_slow_definition(size, batch, seed, mode, margin, id_count):
    rng = np.random.default_rng(seed)
    sim = rng.uniform(-1, 1, (size, size)).astype(np.float32)
    ids, first = rng.integers(0, id_count, (2, size)), int(rng.integers(size))
    order = chain(sim, ids, first, batch, mode, margin)
    assert order.tolist() == slow_chain(sim.tolist(), ids.tolist(), first, batch, mode, np.float32(margin))


@pytest.mark.parametrize("mode", MODES[1:])
def test_chains_have_no_conflicts_where_other_items_are_left(mode):
    """Also where batches are cut elsewhere than every batch_size items."""
    image_feat, text_feat = features(205)
    products = np.arange(205) // 4
    order = chain((image_feat @ text_feat.T).numpy(), products[None], 0, 10, mode)
    order = order[:150]  # later, few items are left to choose from
    assert all(len(set(products[order[i : i + 10]])) == 10 for i in range(140))


def mean_negative_similarity(mode):
    """Compute the mean similarity of images to the captions of other items of their batch, in the second epoch."""
    generator = torch.Generator().manual_seed(0)
    text_feat = torch.nn.functional.normalize(torch.randn(400, 6, generator=generator), dim=1)
    image_feat = torch.nn.functional.normalize(text_feat + 0.25 * torch.randn(400, 6, generator=generator), dim=1)
    sampler = GroupedBatchSampler(unique_ids(400), 10, mode, search_size=100)
    run_epoch(sampler, 0, image_feat, text_feat)
    sampler.set_epoch(1)
    means = []
    for batch in sampler:
        sim = image_feat[batch] @ text_feat[batch].T
        means.append((sim.sum() - sim.trace()) / (len(batch) * (len(batch) - 1)))
    return float(torch.stack(means).mean())


def test_grouping_makes_batches_harder_and_semihard_less_so():
    random, hard, semihard = (mean_negative_similarity(mode) for mode in MODES)
    assert random + 0.2 < semihard < hard


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=30), batch=st.integers(1, 8), seed=st.integers(0, 999))
def test_resolving_conflicts_keeps_every_item_and_counts_what_is_left(sizes, batch, seed):
    products = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(products))
    batches = np.split(order, range(batch, len(order), batch))
    unresolved = resolve_conflicts(batches, products[None], rng)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(products)))
    assert sum(len(b) - len(set(products[b])) for b in batches) == unresolved


def test_conflicts_are_resolved_where_they_can_be():
    products = np.repeat(np.arange(50), 4)  # all four images of a product side by side, the worst start
    batches = np.split(np.arange(200), 20)
    assert resolve_conflicts(batches, products[None], np.random.default_rng(0)) == 0
    assert all(len(set(products[batch])) == 10 for batch in batches)
    same_ids = np.zeros((1, 6), int)
    assert resolve_conflicts(np.split(np.arange(6), 2), same_ids, np.random.default_rng(0)) == 4
