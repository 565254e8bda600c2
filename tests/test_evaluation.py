"""Metrics against cases worked by hand and slow definitions; masks, negatives and choices against the ground truth."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import FAST, batch_of, built

import data
from engine.config import parse_config
from engine.run import build_run
from evaluation import choice, ground_truth
from evaluation.ground_truth import mask_metrics, negative_metrics, token_labels
from evaluation.scores import (
    RankedTriplets,
    Ranking,
    full_rankings,
    negatives_ranked_higher,
    rank_candidates,
    recalls_of,
    sampled_candidates,
    scores_by_class,
    triplet_recalls,
)
from evaluation.validation import validate
from masking import concentration
from readers.dataset import PairDataset
from readers.synthetic import Synthetic
from readers.triplets import Triplets
from readers.wardrobe import COARSE, Detail, Product


def test_token_labels_are_the_ground_truth_token_by_token(wardrobe, monkeypatch):
    tokenizer = data.build_tokenizer(wardrobe.captions, 400, 64)
    rows = list(range(0, 60, 5))
    monkeypatch.setattr(wardrobe, "with_ground_truth", True)
    labels = token_labels(data.Collate(tokenizer)([wardrobe[row] for row in rows]), 8)
    encodings = data.encode(tokenizer, [wardrobe.text(row) for row in rows])
    assert labels.attribute.shape == (12, len(encodings[0].ids))
    assert labels.regions.shape == (*labels.attribute.shape, 64)
    invisible = 0
    for b, row in enumerate(rows):
        truth = wardrobe.ground_truth(row)
        for i, ((start, end), special) in enumerate(zip(encodings[b].offsets, encodings[b].special_tokens_mask)):
            keys = [key for first, last, key, _ in truth.spans if first <= start and end <= last and not special]
            assert labels.attribute[b, i] == bool(keys)
            assert labels.fine[b, i] == bool(keys and keys[0] not in COARSE)
            visible_keys = [key for key in keys if key in truth.regions]
            assert labels.visible[b, i] == bool(visible_keys)
            if visible_keys:
                coverage = truth.region(visible_keys[0]).reshape(8, 8, 8, 8).mean(axis=(1, 3)).ravel()
                expected = coverage >= min(0.25, coverage.max() / 2)
                assert labels.regions[b, i].tolist() == expected.tolist()
            invisible += bool(keys) and not visible_keys
    assert invisible > 10 and not (labels.visible & ~labels.attribute).any()


def test_ranks_by_hand():
    """Ties count against the model, the best of several positives counts, no positive is a miss."""
    sim = torch.tensor([[0.9, 0.5, 0.1], [0.5, 0.5, 0.1], [0.2, 0.9, 0.3], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    positives = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    ranks = negatives_ranked_higher(sim, positives)
    assert ranks[:4].tolist() == [0, 1, 1, 0] and ranks[4] > 10**9
    for score in (1.0, torch.nan):  # equal scores, and NaN, earn nothing
        assert negatives_ranked_higher(torch.full((1, 3), score), positives[:1]).item() == 2


def test_recalls_one_to_many_by_hand():
    """Two images of product 0, one of product 1; the second image of product 0 is similar to product 1."""
    image_feat, text_feat = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]]), torch.eye(2)
    rankings = full_rankings(image_feat, text_feat, torch.tensor([0, 0, 1]), torch.arange(2), top=2)
    metrics = recalls_of(rankings)
    assert metrics["full_i2t_r1"] == pytest.approx(2 / 3) and metrics["full_i2t_r5"] == 1
    assert metrics["full_t2i_r1"] == 0.5  # the best image for caption 1 is the second one of product 0
    assert metrics["full_mean"] == pytest.approx((2 / 3 + 1 + 1 + 0.5 + 1 + 1) / 6)
    assert rankings[1].top_pairs.tolist() == [[[0, 0], [2, 0]], [[1, 1], [2, 1]]]
    assert rankings[1].top_positives.tolist() == [[True, False], [False, True]]


def test_full_rankings_agree_with_a_slow_definition():
    generator = torch.Generator().manual_seed(0)
    image_products = torch.randint(0, 15, (60,), generator=generator)
    image_products[:15] = torch.arange(15)
    image_feat = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator), dim=1)
    text_feat = torch.nn.functional.normalize(torch.randn(15, 8, generator=generator), dim=1)
    metrics = recalls_of(full_rankings(image_feat, text_feat, image_products, torch.arange(15)))
    sim = image_feat @ text_feat.T  # (60, 15)
    for k in (1, 5, 10):
        i2t_hits = [image_products[i] in sim[i].topk(k).indices for i in range(60)]
        t2i_hits = [t in image_products[sim[:, t].topk(k).indices] for t in range(15)]
        assert metrics[f"full_i2t_r{k}"] == pytest.approx(np.mean(i2t_hits))
        assert metrics[f"full_t2i_r{k}"] == pytest.approx(np.mean(t2i_hits))


def test_chance_is_the_recall_of_a_random_order():
    none = torch.zeros(0)
    ranking = Ranking("x", torch.zeros(100), none, none, 20, torch.tensor([1] * 50 + [4] * 50))
    rng, hits = np.random.default_rng(0), {1: [], 5: [], 10: []}
    for _ in range(20_000):
        for positives in (1, 4):
            best = rng.permutation(20)[:positives].min()
            for k in hits:
                hits[k].append(best < k)
    for k, hits_at_k in hits.items():
        assert ranking.chance()[f"x_r{k}"] == pytest.approx(np.mean(hits_at_k), abs=0.01)
    assert Ranking("x", torch.zeros(1), none, none, 3, torch.tensor([1])).chance()["x_r5"] == 1


def test_reranking_orders_the_best_and_leaves_the_rest():
    sim = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1]])
    positives = torch.zeros(3, 4, dtype=torch.bool)
    positives[0, 1] = positives[1, 3] = positives[2, 0] = True
    ranking = rank_candidates("full_i2t", sim, positives, torch.arange(3)[:, None], torch.arange(4), top=2)
    assert ranking.ranks.tolist() == [1, 3, 0]
    assert ranking.top_pairs[1].tolist() == [[1, 0], [1, 1]]
    reranked = ranking.reranked(torch.tensor([[0.0, 5.0], [0.0, 5.0], [0.0, 5.0]]))
    assert reranked.ranks.tolist() == [0, 3, 1] and reranked.protocol == "rerank_full_i2t"


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60))
def test_macro_f1_equals_a_second_implementation(pairs):
    """By true and false positives of one class against the rest, for pairs of a label and a prediction."""
    labels, preds = (torch.tensor(column) for column in zip(*pairs, strict=True))
    scores = scores_by_class(labels, preds)
    assert set(scores) == {label for pair in pairs for label in pair}
    for label, (precision, recall, f1) in scores.items():
        tp = sum(true == label == pred for true, pred in pairs)
        fp = sum(true != label == pred for true, pred in pairs)
        fn = sum(true == label != pred for true, pred in pairs)
        p, r = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
        assert precision == pytest.approx(p) and recall == pytest.approx(r)
        assert f1 == pytest.approx(2 * p * r / (p + r) if p + r else 0)


def test_triplet_recalls_by_hand():
    """Two queries, two galleries: the smaller one lacks the images that rank above the target."""
    images = PairDataset([""] * 60, list(range(60)), images=[], image_size=32)
    triplets = Triplets(images, [0, 1], [2, 3], ["a", "b"], ["dress"] * 2, [0, 1], {"dress": list(range(60))})
    assert triplets.galleries["dress"]["union"].tolist() == [0, 1, 2, 3]
    sim = torch.zeros(2, 60)
    sim[0, 2] = 1.0  # the target is the most similar one
    sim[1, 3], sim[1, 10:21] = 0.5, 0.9  # eleven others are more similar
    queries = np.array([0, 1])
    ranked = [
        RankedTriplets("dress", "original", sim, queries, np.arange(60)),
        RankedTriplets("dress", "union", sim[:, :4], queries, np.arange(4)),
    ]
    metrics, chance = triplet_recalls(triplets, ranked)
    assert metrics["dress_original_r1"] == metrics["dress_original_r10"] == 0.5 and metrics["dress_original_r50"] == 1
    assert metrics["dress_union_r1"] == metrics["mean_union_r1"] == 1
    assert chance["mean_original_r10"] == 10 / 60 and chance["dress_union_r1"] == 0.25


PRODUCTS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=2, max_size=30)


@given(PRODUCTS, st.integers(1, 12), st.integers(0, 5))
def test_sampled_candidates_follow_their_definition(products, negatives, seed):
    """products: (sub-category, number of images) each."""
    image_products = np.repeat(np.arange(len(products)), [images for _, images in products])
    product_kinds = np.array([str(kind) for kind, _ in products])
    image_kinds = product_kinds[image_products]
    draws = [
        sampled_candidates(image_products, image_kinds, 8, negatives, np.random.default_rng(seed)) for _ in range(2)
    ]
    assert all(torch.equal(one, again) for one, again in zip(*draws, strict=True))
    query, captions, images = (drawn.numpy() for drawn in draws[0])
    assert len(query) == min(8, len(image_products)) and len(set(query)) == len(query)
    caption_products = np.arange(len(products))
    for candidates, products_of, positives in (
        (captions, caption_products, image_products[query]),
        (images, image_products, query),
    ):
        fewest = min((products_of != image_products[image]).sum() for image in query)
        assert candidates.shape == (len(query), 1 + min(negatives, fewest)) and (candidates[:, 0] == positives).all()
        for image, wrong in zip(query, candidates[:, 1:].tolist(), strict=True):
            assert len(set(wrong)) == len(wrong) and image_products[image] not in products_of[wrong]
            same_kind = [product_kinds[products_of[number]] == image_kinds[image] for number in wrong]
            others = products_of[products_of != image_products[image]]
            available = (product_kinds[others] == image_kinds[image]).sum()
            assert sum(same_kind) == min(len(wrong), available) and same_kind == sorted(same_kind, reverse=True)


def test_false_negatives_are_counted_by_hand(monkeypatch):
    """Four products seen from the front. 0: a blue shirt with stripes. 1: the same without stripes, so its caption fits
    image 0, but not the other way round. 2: the shirt in red. 3: a bag. Similarities are chosen so that the hardest
    negatives are 0 <-> 1 and 2 <-> 3, above the own pair, and the semi-hard ones 0 <-> 2 and 1 <-> 3."""
    stripes = {"chest": Detail("light", "stripes")}
    shirt = Product("shirt", "blue", None, "long", "collared", "buttoned", stripes, {})
    bag = Product("tote", "red", None, None, None, None, {}, {})
    products = [shirt, replace(shirt, details={}), replace(shirt, colour="red"), bag]
    dataset = Synthetic("train", 4, 64, progress=False)
    dataset.products, dataset.views = products, ["front"] * 4
    dataset.captions = [product.caption_and_spans()[0] for product in products]
    dataset.product_ids = dataset.caption_ids = torch.arange(4).numpy()
    own, above, below, far = 0.75, 0.9, 0.5, 0.1
    sim = torch.tensor(
        [[own, above, below, far], [above, own, far, below], [below, far, own, above], [far, below, above, own]]
    )
    flags = "--image-size 64 --patch-size 16 --batch-size 4 --negatives semihard"
    config, _ = parse_config([*FAST, *flags.split()])
    run = build_run(config, dataset, data.build_tokenizer(dataset.captions, 300, 64))
    monkeypatch.setattr(ground_truth, "momentum_features", lambda run, dataset, rows: (sim[rows], torch.eye(4)[rows]))
    metrics = negative_metrics(run, dataset)
    # hard: image 0 gets caption 1 (false), image 1 caption 0 (a true negative: it shows no stripes), 2 and 3 each
    # other's; captions the same way round: caption 1 gets image 0 (false)
    assert metrics["false_negative_rate_hard"] == pytest.approx(2 / 8)
    assert metrics["false_negative_rate"] == 0 and 0 <= metrics["false_negative_rate_random"] <= 1


def test_masks_by_perfect_attention_are_right(monkeypatch):
    """With the ground truth as attention every masked word and patch is right, and random masks are not."""
    flags = "--mim-ratio 0.05 --mlm-ratio 0.1 --mask-source clean --patch-size 4"
    run, dataset = built(*flags.split(), products=10)

    def perfect_attention(momentum, batch, *_):
        regions = token_labels(batch, 8).regions.float()
        return regions, concentration(regions)

    monkeypatch.setattr("evaluation.ground_truth.score_clean_words", perfect_attention)
    metrics = mask_metrics(run, dataset)
    for key in ("patch_precision", "word_precision", "pointing_game"):
        assert metrics[key] == 1 and 0 < metrics[key + "_random"] < 0.95, key


def test_a_model_that_ignores_the_image_has_no_image_gain(monkeypatch):
    run, dataset = built("--dropout", "0", products=12)
    run.informative = data.informative_pieces(run.tokenizer, dataset.captions)
    batch = batch_of(run, dataset, [dataset.product_ids.tolist().index(product) for product in range(6)])
    assert not torch.equal(*fused_with_own_and_other_image(run, batch))
    project = run.model.fusion.project_image_kv
    monkeypatch.setattr(run.model.fusion, "project_image_kv", lambda embeds: project(torch.zeros_like(embeds)))
    assert torch.equal(*fused_with_own_and_other_image(run, batch))
    metrics = mask_metrics(run, dataset) | validate(run, dataset)[0]
    for key in ("image_gain", "image_gain_fine", "image_gain_coarse", "val_image_gain"):
        assert metrics[key] == 0, key


def fused_with_own_and_other_image(run, batch):
    """Fuse each caption with its own image and with another product's image. -> (B, L, D) each"""
    image_kv = run.model.fusion.project_image_kv(run.model.vision(data.normalise(batch["images"])))
    text_embeds = run.model.text(batch["token_ids"], batch["attention_mask"])
    fused = run.model.fusion(text_embeds, batch["attention_mask"], image_kv)
    other = torch.arange(6).roll(1)
    fused_other = run.model.fusion(text_embeds, batch["attention_mask"], image_kv, image_index=other)
    return fused, fused_other


def test_foils_differ_in_one_attribute_that_the_image_shows(wardrobe):
    rows = list(range(0, len(wardrobe), 9))
    kinds, positions, foils = choice.draw_foils(wardrobe, rows)
    assert (kinds, positions, foils) == choice.draw_foils(wardrobe, rows) and len(set(kinds)) >= 8
    assert len(set(zip(kinds, positions, strict=True))) == len(kinds)  # one foil of a kind per image
    for kind, position, foil in zip(kinds, positions, foils, strict=True):
        row = rows[position]
        siblings = wardrobe.product(row).siblings()
        sources = [(name, key) for name, key, sibling in siblings if sibling.caption_and_spans()[0] == foil]
        assert len(sources) == 1 and sources[0][0] == kind and sources[0][1] in wardrobe.regions[row]


@pytest.mark.parametrize(("own_score", "foil_score", "share"), [(1.0, 0.0, 1), (0.0, 1.0, 0), (0.5, 0.5, 0)])
def test_a_choice_is_right_where_the_own_caption_scores_higher(own_score, foil_score, share, monkeypatch):
    """Scores that are right, wrong, or tie; foils of the kind "neck" always score higher."""
    dataset = Synthetic("train", 30, 32, progress=False)
    images, products = dataset.subset((dataset.product_ids < 24).nonzero()[0]), 24
    kinds, _, foils = choice.draw_foils(dataset, images.image_index)
    foil_scores = [9.0 if kind == "neck" else foil_score for kind in kinds]
    encoded = []

    def text_features(run, captions):
        encoded.append(captions)
        return torch.tensor([own_score] * len(images) + foil_scores)[:, None]

    def score_pairs_with_itm(run, images, captions, pairs):
        is_own = [captions[caption] == images.text(image) for image, caption in pairs.tolist()]
        assert is_own == [True] * len(kinds) + [False] * len(kinds)
        return torch.tensor([own_score] * len(kinds) + foil_scores)

    def image_features(run, images):
        return np.arange(len(images)), torch.ones(len(images), 1)

    for stand_in in (image_features, text_features, score_pairs_with_itm):
        monkeypatch.setattr(choice, stand_in.__name__, stand_in)
    metrics = choice.choice_metrics(None, dataset, products)
    assert encoded == [[images.text(row) for row in range(len(images))] + [("", foil) for foil in foils]]
    fine_kinds = set(kinds) - {*COARSE}
    fine_share = pytest.approx(share * (len(fine_kinds) - 1) / len(fine_kinds))
    expected = {"choice_coarse": share, "choice_fine": fine_share}
    assert metrics == expected | {f"{key}_itm": value for key, value in expected.items()}
    dataset.regions = [{} for _ in dataset.regions]  # no image shows an attribute, so there are no foils
    assert choice.choice_metrics(None, dataset, products) == {}
