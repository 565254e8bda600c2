"""Metrics against hand-worked cases and slow definitions; the truth about masks and negatives; search's words."""

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
    Ranking,
    full_rankings,
    match_rank,
    rank_candidates,
    recalls_of,
    sampled_candidates,
    scores_by_class,
    triplet_recalls,
)
from evaluation.validation import validate
from readers.dataset import PairDataset
from readers.synthetic import Synthetic
from readers.triplets import Triplets
from readers.wardrobe import COARSE, Detail, Product


def test_word_truth_is_the_truth_token_by_token(wardrobe, monkeypatch):
    tokenizer = data.build_tokenizer(wardrobe.captions, 400, 64)
    rows = list(range(0, 60, 5))
    monkeypatch.setattr(wardrobe, "with_ground_truth", True)
    known = token_labels(data.Collate(tokenizer)([wardrobe[row] for row in rows]), 8)
    encodings = data.encode(tokenizer, [wardrobe.text(row) for row in rows])
    assert known.attribute.shape == (12, len(encodings[0].ids)) and known.regions.shape == (*known.attribute.shape, 64)
    hidden = 0
    for b, row in enumerate(rows):
        truth = wardrobe.ground_truth(row)
        for i, ((start, end), special) in enumerate(zip(encodings[b].offsets, encodings[b].special_tokens_mask)):
            keys = [key for first, last, key, _ in truth.spans if first <= start and end <= last and not special]
            assert known.attribute[b, i] == bool(keys) and known.detail[b, i] == bool(keys and keys[0] not in COARSE)
            shown = [key for key in keys if key in truth.regions]
            assert known.visible[b, i] == bool(shown)
            if shown:
                cover = truth.region(shown[0]).reshape(8, 8, 8, 8).mean(axis=(1, 3)).ravel()
                expected = cover >= min(0.25, cover.max() / 2)
                assert known.regions[b, i].tolist() == expected.tolist()
            hidden += bool(keys) and not shown
    assert hidden > 10 and not (known.visible & ~known.attribute).any()


def test_match_rank_by_hand():
    """Ties count against the model, the best of several right ones counts, none right is a miss."""
    sim = torch.tensor([[0.9, 0.5, 0.1], [0.5, 0.5, 0.1], [0.2, 0.9, 0.3], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]])
    right = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    assert match_rank(sim, right)[:4].tolist() == [0, 1, 1, 0] and match_rank(sim, right)[4] > 10**9
    # what is equal or not a number earns nothing
    assert [match_rank(torch.full((1, 3), score), right[:1]).item() for score in (1.0, torch.nan)] == [2, 2]


def test_recalls_one_to_many_by_hand():
    """Two photos of product 0, one of product 1; the second photo of product 0 looks like product 1."""
    images, texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]]), torch.eye(2)
    rankings = full_rankings(images, texts, torch.tensor([0, 0, 1]), torch.arange(2), top=2)
    figures = recalls_of(rankings)
    assert figures["full_i2t_r1"] == pytest.approx(2 / 3) and figures["full_i2t_r5"] == 1
    assert figures["full_t2i_r1"] == 0.5  # text 1 finds the second photo of product 0 first
    assert figures["full_mean"] == pytest.approx((2 / 3 + 1 + 1 + 0.5 + 1 + 1) / 6)
    assert rankings[1].pairs.tolist() == [[[0, 0], [2, 0]], [[1, 1], [2, 1]]]
    assert rankings[1].positives.tolist() == [[True, False], [False, True]]


def test_full_rankings_agree_with_a_slow_definition():
    generator = torch.Generator().manual_seed(0)
    owner = torch.randint(0, 15, (60,), generator=generator)
    owner[:15] = torch.arange(15)
    images = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator), dim=1)
    texts = torch.nn.functional.normalize(torch.randn(15, 8, generator=generator), dim=1)
    figures = recalls_of(full_rankings(images, texts, owner, torch.arange(15)))
    sim = images @ texts.T  # (60, 15)
    for k in (1, 5, 10):
        texts_found = [owner[i] in sim[i].topk(k).indices for i in range(60)]
        photos_found = [t in owner[sim[:, t].topk(k).indices] for t in range(15)]
        assert figures[f"full_i2t_r{k}"] == pytest.approx(np.mean(texts_found))
        assert figures[f"full_t2i_r{k}"] == pytest.approx(np.mean(photos_found))


def test_chance_is_what_a_random_order_gives():
    none = torch.zeros(0)
    ranking = Ranking("x", torch.zeros(100), none, none, 20, torch.tensor([1] * 50 + [4] * 50))
    rng, hits = np.random.default_rng(0), {1: [], 5: [], 10: []}
    for _ in range(20_000):
        for right in (1, 4):
            best = rng.permutation(20)[:right].min()
            for k in hits:
                hits[k].append(best < k)
    for k, found in hits.items():
        assert ranking.chance()[f"x_r{k}"] == pytest.approx(np.mean(found), abs=0.01)
    assert Ranking("x", torch.zeros(1), none, none, 3, torch.tensor([1])).chance()["x_r5"] == 1


def test_reranking_orders_the_best_and_leaves_the_rest():
    sim = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1]])
    right = torch.zeros(3, 4, dtype=torch.bool)
    right[0, 1] = right[1, 3] = right[2, 0] = True
    ranking = rank_candidates("full_i2t", sim, right, torch.arange(3)[:, None], torch.arange(4), top=2)
    assert ranking.rank.tolist() == [1, 3, 0]
    assert ranking.pairs[1].tolist() == [[1, 0], [1, 1]]
    reranked = ranking.reranked(torch.tensor([[0.0, 5.0], [0.0, 5.0], [0.0, 5.0]]))
    assert reranked.rank.tolist() == [0, 3, 1] and reranked.protocol == "rerank_full_i2t"


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60))
def test_macro_f1_equals_a_second_implementation(pairs):
    """By confusion of labels, one against the rest; class 6 as the one that is never answered rightly is no exception."""
    right, answered = (torch.tensor(column) for column in zip(*pairs, strict=True))
    figures = scores_by_class(right, answered)
    assert set(figures) == {label for pair in pairs for label in pair}
    for label, (precision, recall, f1) in figures.items():
        tp = sum(a == label == b for a, b in pairs)
        fp = sum(a != label == b for a, b in pairs)
        fn = sum(a == label != b for a, b in pairs)
        p, r = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
        assert precision == pytest.approx(p) and recall == pytest.approx(r)
        assert f1 == pytest.approx(2 * p * r / (p + r) if p + r else 0)


def test_triplet_recalls_by_hand():
    """Two queries, two galleries: in the smaller one the wrong photo before the right one is missing."""
    photos = PairDataset([""] * 60, list(range(60)), images=[], image_size=32)
    triplets = Triplets(photos, [0, 1], [2, 3], ["a", "b"], ["dress"] * 2, [0, 1], {"dress": list(range(60))})
    assert triplets.galleries["dress"]["union"].tolist() == [0, 1, 2, 3]
    sim = torch.zeros(2, 60)
    sim[0, 2] = 1.0  # found at once
    sim[1, 3], sim[1, 10:21] = 0.5, 0.9  # eleven others before it
    small = sim[:, :4]
    asked = np.array([0, 1])
    ranked = [("dress", "original", sim, asked, np.arange(60)), ("dress", "union", small, asked, np.arange(4))]
    figures, chance = triplet_recalls(triplets, ranked)
    assert figures["dress_original_r1"] == figures["dress_original_r10"] == 0.5 and figures["dress_original_r50"] == 1
    assert figures["dress_union_r1"] == figures["mean_union_r1"] == 1
    assert chance["mean_original_r10"] == 10 / 60 and chance["dress_union_r1"] == 0.25


PRODUCTS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=2, max_size=30)


@given(PRODUCTS, st.integers(1, 12), st.integers(0, 5))
def test_sampled_candidates_follow_their_definition(products, negatives, seed):
    """products: (sub-category, photos) each."""
    owner = np.repeat(np.arange(len(products)), [photos for _, photos in products])
    kind_of = [str(kind) for kind, _ in products]
    kinds = np.array([kind_of[product] for product in owner])
    kind_of = kinds[np.unique(owner, return_index=True)[1]]
    draws = [sampled_candidates(owner, kinds, 8, negatives, np.random.default_rng(seed)) for _ in range(2)]
    assert all(torch.equal(one, again) for one, again in zip(*draws, strict=True))
    query, captions, images = (drawn.numpy() for drawn in draws[0])
    assert len(query) == min(8, len(owner)) and len(set(query)) == len(query)
    for lists, owner_of, rights in ((captions, np.arange(len(products)), owner[query]), (images, owner, query)):
        fewest = min((owner_of != owner[photo]).sum() for photo in query)
        assert lists.shape == (len(query), 1 + min(negatives, fewest)) and (lists[:, 0] == rights).all()
        for photo, wrong in zip(query, lists[:, 1:].tolist(), strict=True):
            assert len(set(wrong)) == len(wrong) and owner[photo] not in owner_of[wrong]
            alike = [kind_of[owner_of[candidate]] == kinds[photo] for candidate in wrong]
            there = sum(kind_of[o] == kinds[photo] for o in owner_of if o != owner[photo])
            assert sum(alike) == min(len(wrong), there) and alike == sorted(alike, reverse=True)


def test_false_negatives_are_counted_by_hand(monkeypatch):
    """Four products seen from the front. 0: a blue shirt with stripes. 1: the same without it, so its text fits photo 0,
    but not the other way round. 2: the shirt in red. 3: a bag. Similarities are chosen so that the hardest negatives
    are 0 <-> 1 and 2 <-> 3, above the own pair, and the semi-hard ones 0 <-> 2 and 1 <-> 3."""
    stripes = {"chest": Detail("light", "stripes")}
    shirt = Product("shirt", "blue", None, "long", "collared", "buttoned", stripes, {})
    bag = Product("tote", "red", None, None, None, None, {}, {})
    products = [shirt, replace(shirt, details={}), replace(shirt, colour="red"), bag]
    dataset = Synthetic("train", 4, 64, progress=False)
    dataset.products, dataset.views = products, ["front"] * 4
    dataset.captions = [product.caption_and_spans()[0] for product in products]
    dataset.product_ids = dataset.caption_ids = torch.arange(4).numpy()
    own, above, below, far = 0.75, 0.9, 0.5, 0.1
    rows = [own, above, below, far], [above, own, far, below], [below, far, own, above], [far, below, above, own]
    sim = torch.tensor(rows)
    flags = "--image-size 64 --patch-size 16 --batch-size 4 --negatives semihard"
    config, _ = parse_config([*FAST, *flags.split()])
    state = build_run(config, dataset, data.build_tokenizer(dataset.captions, 300, 64))
    monkeypatch.setattr(ground_truth, "momentum_features", lambda run, dataset, rows: (sim[rows], torch.eye(4)[rows]))
    figures = negative_metrics(state, dataset)
    # hard: photo 0 gets text 1 (false), photo 1 text 0 (true negative: it shows no stripes), 2 and 3 each other's;
    # texts the same way round: text 1 gets photo 0 (false)
    assert figures["false_negative_rate_hard"] == pytest.approx(2 / 8)
    assert figures["false_negative_rate"] == 0 and 0 <= figures["false_negative_rate_random"] <= 1


def test_mask_truth_of_a_model_that_looks_at_the_right_place(monkeypatch):
    """With the truth itself as attention every mask and every word is right; beside it what random masks get."""
    flags = "--mim-ratio 0.05 --mlm-ratio 0.1 --mask-source clean --word-pool 0 --patch-size 4"
    state, dataset = built(*flags.split(), products=10)

    def attention(momentum, batch, *_):
        regions = token_labels(batch, 8).regions.float()
        return [torch.nn.functional.pad(regions, (1, 0))[:, None]]

    monkeypatch.setattr("masking.clean_attention", attention)
    figures = mask_metrics(state, dataset)
    for key in ("patch_precision", "word_precision", "pointing_game"):
        assert figures[key] == 1 and 0 < figures[key + "_random"] < 0.95, key


def test_a_model_that_ignores_the_photo_has_no_photo_gain(monkeypatch):
    state, dataset = built("--dropout", "0", products=12)
    state.informative = data.informative_pieces(state.tokenizer, dataset.captions)
    batch = batch_of(state, dataset, [dataset.product_ids.tolist().index(product) for product in range(6)])
    assert not torch.equal(*restored_logits(state, batch))
    project = state.model.fusion.project_image_kv
    monkeypatch.setattr(state.model.fusion, "project_image_kv", lambda embeds: project(torch.zeros_like(embeds)))
    assert torch.equal(*restored_logits(state, batch))
    figures = mask_metrics(state, dataset) | validate(state, dataset)[0]
    for key in ("image_gain", "image_gain_fine", "image_gain_coarse", "val_image_gain"):
        assert figures[key] == 0, key


def restored_logits(state, batch):
    """What is answered for every token, from the own photo and from that of another product."""
    photos = state.model.fusion.project_image_kv(state.model.vision(data.normalise(batch["images"])))
    text_embeds = state.model.text(batch["token_ids"], batch["attention_mask"])
    own = state.model.fusion(text_embeds, batch["attention_mask"], photos)
    other = state.model.fusion(text_embeds, batch["attention_mask"], photos, image_index=torch.arange(6).roll(1))
    return own, other


def test_trials_are_texts_that_differ_in_one_thing_that_the_photo_shows(wardrobe):
    rows = list(range(0, len(wardrobe), 9))
    kinds, numbers, texts = choice.draw_foils(wardrobe, rows)
    assert (kinds, numbers, texts) == choice.draw_foils(wardrobe, rows) and len(set(kinds)) >= 8
    assert len(set(zip(kinds, numbers, strict=True))) == len(kinds)  # one of a kind and photo
    for kind, number, text in zip(kinds, numbers, texts, strict=True):
        row = rows[number]
        siblings = wardrobe.product(row).siblings()
        found = [(name, key) for name, key, sibling in siblings if sibling.caption_and_spans()[0] == text]
        assert len(found) == 1 and found[0][0] == kind and found[0][1] in wardrobe.regions[row]


@pytest.mark.parametrize(("better", "worse", "share"), [(1.0, 0.0, 1), (0.0, 1.0, 0), (0.5, 0.5, 0)])
def test_choices_are_right_where_the_own_text_scores_higher(better, worse, share, monkeypatch):
    """A score that knows which texts are right, one that is always wrong, one that ties; of necks always wrong."""
    dataset = Synthetic("train", 30, 32, progress=False)
    part, products = dataset.subset((dataset.product_ids < 24).nonzero()[0]), 24
    kinds, _, others = choice.draw_foils(dataset, part.image_index)
    asked = []

    def text_features(run, texts):
        asked.append(texts)
        scores = [better] * len(part) + [9.0 if kind == "neck" else worse for kind in kinds]
        return torch.tensor(scores)[:, None]

    def itm_scores(run, photos, texts, pairs):
        own = [texts[text] == photos.text(photo) for photo, text in pairs.tolist()]
        assert own == [True] * len(kinds) + [False] * len(kinds)
        wrong = [9.0 if kind == "neck" else worse for kind in kinds]
        return torch.tensor([better] * len(kinds) + wrong)

    def image_features(run, photos):
        return np.arange(len(photos)), torch.ones(len(photos), 1)

    for stand_in in (image_features, text_features, itm_scores):
        monkeypatch.setattr(choice, stand_in.__name__, stand_in)
    figures = choice.choices(None, dataset, products)
    assert asked == [[part.text(row) for row in range(len(part))] + [("", text) for text in others]]
    details = set(kinds) - {*COARSE}
    fine = pytest.approx(share * (len(details) - 1) / len(details))
    expected = {"choice_coarse": share, "choice_fine": fine}
    assert figures == expected | {f"{key}_itm": value for key, value in expected.items()}
    dataset.regions = [{} for _ in dataset.regions]  # nothing is shown, so there is nothing to choose
    assert choice.choices(None, dataset, products) == {}
