"""Masks: exact counts, only words, the 80/10/10 rule."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from masking import corrupt_words, mask_top, random_word_mask

WORDS = torch.tensor(
    [
        [0, 1, 1, 1, 1, 1, 1, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],  # a caption without a word
    ]
).bool()


@given(ratio=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_random_word_mask_has_exact_counts_and_masks_only_words(ratio, seed):
    mask = random_word_mask(WORDS, ratio, torch.Generator().manual_seed(seed))
    assert not (mask & ~WORDS).any()
    assert mask.sum(1).tolist() == [max(1, round(6 * ratio)), 1, 0]


def test_random_word_mask_is_seeded_and_uniform():
    draw = lambda seed: random_word_mask(WORDS, 0.5, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(3), draw(3))
    share = torch.stack([draw(seed) for seed in range(2000)]).float().mean(0)[0, 1:7]
    assert ((share - 0.5).abs() < 0.05).all()


def test_mask_top_takes_the_highest_candidates():
    scores = torch.tensor([[5.0, 4, 3, 2], [1, 2, 3, 4]])
    candidates = torch.tensor([[False, True, True, True], [True, True, True, False]])
    assert mask_top(scores, candidates, torch.tensor([2, 1])).int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 0]]


def test_corruption_is_80_10_10_and_labels_the_masked_only():
    ids = torch.randint(5, 1000, (200, 100))
    mask = torch.rand(ids.shape) < 0.5
    corrupted, labels = corrupt_words(ids, mask, 4, torch.arange(5, 1000), torch.Generator().manual_seed(0))
    assert torch.equal(labels[mask], ids[mask]) and (labels[~mask] == -100).all()
    assert torch.equal(corrupted[~mask], ids[~mask])
    masked, kept = (corrupted == 4)[mask].float().mean(), (corrupted == ids)[mask].float().mean()
    assert abs(masked - 0.8) < 0.02 and abs(kept - 0.1) < 0.02
    drawn = corrupted[mask & (corrupted != 4) & (corrupted != ids)]
    assert drawn.min() >= 5 and drawn.max() < 1000 and len(drawn.unique()) > 500
