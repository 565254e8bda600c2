"""Objectives against naive loops with gradients in float64, and the choice of negatives."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losses import (
    alignment_loss,
    itc_loss,
    itc_targets,
    itm_loss,
    mim_loss,
    mlm_loss,
    pick_negatives,
    positive_pairs,
)


def logits(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same_with_gradients(ours, naive, inputs):
    """The kernels work in float32 inside, so 1e-5."""
    torch.testing.assert_close(ours.double(), naive, atol=1e-5, rtol=1e-5)
    theirs = torch.autograd.grad(naive, inputs, retain_graph=True)
    for mine, other in zip(torch.autograd.grad(ours, inputs), theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_itc_loss_equals_a_loop(gamma):
    i2t, t2i = logits(4, 7), logits(4, 7)
    targets = [torch.rand(4, 7, dtype=torch.float64).softmax(1) for _ in range(2)]
    naive = 0
    for sim, target in ((i2t, targets[0]), (t2i, targets[1])):
        for b in range(4):
            total = sum(math.e ** sim[b, k] for k in range(7))
            for j in range(7):
                p = math.e ** sim[b, j] / total
                naive = naive - (1 - p) ** gamma * target[b, j] * torch.log(p) / 4 / 2
    same_with_gradients(itc_loss(i2t, t2i, *targets, gamma=gamma), naive, (i2t, t2i))


def test_focal_itc_below_1_has_gradients_where_a_pair_is_certain():
    sim = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    loss = itc_loss(sim, sim.T, torch.eye(2), torch.eye(2), gamma=0.5)
    loss.backward()
    assert loss.isfinite() and sim.grad.isfinite().all()


def test_alignment_loss_equals_a_loop():
    text, image = logits(5, 3), logits(5, 3)
    naive = 0
    for t, i in zip(text, image, strict=True):
        cosine = sum(t[d] * i[d] for d in range(3)) / (t.norm() * i.norm())
        naive = naive + (1 - (cosine + 1) / 2) / 5
    text_feat = text / text.norm(dim=1, keepdim=True)
    image_feat = image / image.norm(dim=1, keepdim=True)
    same_with_gradients(alignment_loss(text_feat, image_feat), naive, (text, image))


def test_itc_targets_spread_over_a_product_and_mix_in_momentum():
    right = torch.tensor([[True, False, True, False], [False, True, False, False]])
    sim_m = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3), 0.0, 0.0]])
    hard = itc_targets(right, sim_m, alpha=0.0)
    assert hard.tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0]]
    soft = itc_targets(right, sim_m, alpha=0.4)
    torch.testing.assert_close(soft[0], torch.tensor([0.4, 0.1, 0.4, 0.1]))
    torch.testing.assert_close(soft[1], torch.tensor([0.4 / 6, 0.6 + 0.4 / 2, 0.4 / 6, 0.4 / 6]))


def test_itm_loss_equals_a_loop_and_ignores_unlabelled_rows():
    rows, labels = logits(4, 2), torch.tensor([1, 0, -100, 0])
    naive = 0
    for row, label in zip(rows, labels, strict=True):
        if label >= 0:
            naive = naive - torch.log(math.e ** row[label] / (math.e ** row[0] + math.e ** row[1])) / 3
    same_with_gradients(itm_loss(rows, labels), naive, (rows,))


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_mlm_loss_equals_a_loop(alpha):
    rows, soft, labels = logits(5, 9), torch.randn(5, 9, dtype=torch.float64), torch.tensor([3, -100, 0, 8, -100])
    naive = 0
    for r in range(5):
        if labels[r] < 0:
            continue
        p, q = rows[r].exp() / rows[r].exp().sum(), soft[r].exp() / soft[r].exp().sum()
        naive = naive - ((1 - alpha) * p[labels[r]].log() + alpha * sum(q[v] * p[v].log() for v in range(9))) / 3
    same_with_gradients(mlm_loss(rows, labels, soft, alpha), naive, (rows,))


def test_mim_loss_equals_a_naive_loop_with_gradients():
    """Two photos of 2 × 2 patches of 3 pixels a side; a patch's pixels in the order row, column, colour."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    pixels = torch.randn(2, 2, 27, dtype=torch.float64, requires_grad=True)
    hidden = torch.tensor([[0, 2], [3, 1]])
    naive = 0
    for b, m in ((0, 0), (0, 1), (1, 0), (1, 1)):
        p = hidden[b, m].item()
        y, x = 3 * (p // 2), 3 * (p % 2)
        patch = torch.stack([images[b, c, y + i, x + j] for i in range(3) for j in range(3) for c in range(3)])
        patch = (patch - patch.mean()) / (((patch - patch.mean()) ** 2).mean() + 1e-6).sqrt()
        naive = naive + ((pixels[b, m] - patch) ** 2).mean() / 4
    same_with_gradients(mim_loss(pixels, images, hidden), naive, (pixels,))
    assert mim_loss(pixels[:, :0], images, hidden[:, :0]) == 0


def test_losses_without_a_label_are_zero_not_nan():
    nothing = torch.zeros(0, 5, requires_grad=True)
    assert mlm_loss(nothing, torch.zeros(0, dtype=torch.long), nothing, 0.4) == 0
    assert itm_loss(torch.randn(3, 2), torch.full((3,), -100)) == 0


def test_what_is_right_and_no_negative_has_the_same_product_or_the_same_caption():
    batch = torch.tensor([1, 1, 2, 3]), torch.tensor([5, 6, 5, 7])
    assert positive_pairs(*batch).int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    keys = torch.tensor([2, 9]), torch.tensor([0, 6])
    assert positive_pairs(*batch, *keys).int().tolist() == [[0, 0], [0, 1], [1, 0], [0, 0]]


@given(
    products=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    mode=st.sampled_from(["random", "similar", "hard"]),
    scale=st.sampled_from([1.0, 1e3, 1e6]),
    seed=st.integers(0, 2**31),
)
def test_negatives_are_always_allowed_or_absent(products, mode, scale, seed):
    """Also at temperatures where a softmax underflows to zero everywhere but at the positive."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(products)
    sim = torch.randn(len(ids), len(ids), generator=generator) + torch.eye(len(ids))
    positives = positive_pairs(ids, torch.arange(len(ids)))
    chosen = pick_negatives(sim * scale, positives, mode=mode, generator=generator)
    for b, j in enumerate(chosen.tolist()):
        if positives[b].all():
            assert j == -1
        else:
            assert j >= 0 and not positives[b, j]


def test_hard_takes_the_most_similar_and_similar_draws_by_softmax():
    sim = torch.tensor([[9.0, 1.0, 2.0, 1.0]]).expand(4, 4)
    positives = torch.eye(4).bool()
    assert pick_negatives(sim, positives, mode="hard").tolist() == [2, 0, 0, 0]
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([pick_negatives(sim, positives, mode="similar", generator=generator)[0] for _ in range(3000)])
    share = torch.bincount(draws, minlength=4) / 3000
    expected = torch.tensor([0.0, 1.0, math.e, 1.0]) / (2 + math.e)
    torch.testing.assert_close(share, expected, atol=0.03, rtol=0)
    uniform = torch.stack([pick_negatives(sim, positives, mode="random", generator=generator)[0] for _ in range(3000)])
    share = torch.bincount(uniform, minlength=4) / 3000
    torch.testing.assert_close(share, torch.tensor([0, 1, 1, 1]) / 3, atol=0.03, rtol=0)


@given(size=st.integers(2, 7), margin=st.sampled_from([0.0, 0.5, 9.0]), seed=st.integers(0, 2**31))
def test_semihard_equals_its_definition(size, margin, seed):
    generator = torch.Generator().manual_seed(seed)
    sim = torch.randn(size, size, generator=generator)
    positives = torch.eye(size).bool() | (torch.rand(size, size, generator=generator) < 0.2)
    for b, chosen in enumerate(pick_negatives(sim, positives, mode="semihard", margin=margin).tolist()):
        allowed = {j: sim[b, j].item() for j in range(size) if not positives[b, j]}
        below = {j: cosine for j, cosine in allowed.items() if cosine < sim[b, b] - margin}
        expected = max(below, key=below.get) if below else min(allowed, key=allowed.get, default=-1)
        assert chosen == expected
