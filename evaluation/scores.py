"""Metrics from similarities and predictions: recalls, rankings, accuracy, F1. Pure functions.

Letters: Q queries, C candidates of a query, K most similar candidates, n images, m captions, E embedding.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from readers.triplets import Triplets

Metrics = dict[str, float]  # key -> share between 0 and 1

# The sampled protocol: queries, negatives of a query, and how often both are drawn
SAMPLED_QUERIES = 1000
SAMPLED_NEGATIVES = 100
SAMPLED_DRAWS = 5


def negatives_ranked_higher(sim: Tensor, positives: Tensor) -> Tensor:
    """Count the negatives that rank above the best positive of each query; 0 is a hit at rank 1.

    Ties and NaN count against the model, so equal features earn nothing. Without a positive the count is the largest
    integer, beyond every rank.
    sim (Q, C), positives (Q, C) bool -> (Q,)
    """
    best_positive = sim.masked_fill(~positives, -math.inf).max(dim=1, keepdim=True).values
    not_below = ~(sim < best_positive)
    count = (not_below & ~positives).sum(dim=1)
    return count.masked_fill(~positives.any(dim=1), torch.iinfo(count.dtype).max)


@dataclass
class Ranking:
    """The candidates of some queries, ranked by similarity."""

    protocol: str  # full_i2t, sampled_t2i, …
    ranks: Tensor  # (Q,): negatives that rank above the best positive
    top_pairs: Tensor  # (Q, K, 2): numbers of image and caption of the K most similar candidates
    top_positives: Tensor  # (Q, K) bool: whether these candidates are positives
    num_candidates: int  # C
    num_positives: Tensor  # (Q,): positives among all candidates

    def reranked(self, scores: Tensor) -> "Ranking":
        """Return the ranking with the K most similar candidates in the order of `scores` (Q, K), before all others."""
        top_ranks = negatives_ranked_higher(scores, self.top_positives)
        ranks = torch.where(self.top_positives.any(dim=1), top_ranks, self.ranks)
        return replace(self, protocol=f"rerank_{self.protocol}", ranks=ranks)

    def chance(self) -> Metrics:
        """Compute the recalls of a random order: R@k = 1 − binom(candidates − positives, k) / binom(candidates, k)."""
        recalls = {}
        for k in (1, 5, 10):
            misses = [math.comb(self.num_candidates - count, k) for count in self.num_positives.tolist()]
            top_k_sets = max(1, math.comb(self.num_candidates, k))
            recalls[f"{self.protocol}_r{k}"] = 1 - sum(misses) / (len(misses) * top_k_sets)
        return recalls


def rank_candidates(
    protocol: str,
    sim: Tensor,
    positives: Tensor,
    images: Tensor,
    captions: Tensor,
    top: int,
) -> Ranking:
    """Rank the candidates of each query by similarity.

    protocol: its name in metrics
    sim, positives: (Q, C)
    images, captions: numbers of the pair that a candidate stands for, broadcast to (Q, C)
    top: most similar candidates to keep for re-ranking
    """
    best = sim.topk(min(top, sim.shape[1]), dim=1).indices  # (Q, K)
    best_images = images.expand_as(sim).gather(1, best)
    best_captions = captions.expand_as(sim).gather(1, best)
    return Ranking(
        protocol,
        ranks=negatives_ranked_higher(sim, positives),
        top_pairs=torch.stack([best_images, best_captions], dim=2),
        top_positives=positives.gather(1, best),
        num_candidates=sim.shape[1],
        num_positives=positives.sum(dim=1),
    )


def full_rankings(
    image_feat: Tensor,
    text_feat: Tensor,
    image_products: Tensor,
    caption_products: Tensor,
    top: int = 0,
) -> list[Ranking]:
    """Rank all captions for each image, and all images for each caption. Positives are of the same product.

    image_feat (n, E), text_feat (m, E)
    image_products (n,), caption_products (m,)
    top: most similar candidates to keep for re-ranking
    -> full_i2t, full_t2i
    """
    images = torch.arange(len(image_feat))
    captions = torch.arange(len(text_feat))
    positives = image_products[:, None] == caption_products  # (n, m)
    i2t = rank_candidates("full_i2t", image_feat @ text_feat.T, positives, images[:, None], captions, top)
    t2i = rank_candidates("full_t2i", text_feat @ image_feat.T, positives.T, images, captions[:, None], top)
    return [i2t, t2i]


def sampled_candidates(
    image_products: np.ndarray,
    subcategories: np.ndarray,
    queries: int,
    negatives: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw query images and, for each, candidate captions; for its caption, candidate images.

    image_products (n,): number of the product of an image, and so of its caption
    subcategories (n,): of the images
    queries: images to draw
    negatives: wrong candidates of a query; those of its sub-category first, fewer if there are fewer
    -> query images (Q,), captions (Q, 1 + C), images (Q, 1 + C); the positive comes first
    """
    products, first_image = np.unique(image_products, return_index=True)
    query_images = rng.permutation(len(image_products))[:queries]
    captions, images = [], []
    for image in query_images:
        product, subcategory = image_products[image], subcategories[image]
        wrong_captions = draw_negatives(products != product, subcategories[first_image] == subcategory, rng)
        wrong_images = draw_negatives(image_products != product, subcategories == subcategory, rng)
        captions.append([product, *wrong_captions[:negatives]])
        images.append([image, *wrong_images[:negatives]])
    fewest = min(len(candidates) for candidates in images)  # products differ in their number of images
    images = [candidates[:fewest] for candidates in images]
    return torch.from_numpy(query_images), torch.tensor(captions), torch.tensor(images)


def draw_negatives(wrong: np.ndarray, same_subcategory: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """List the wrong candidates in random order, those of the query's sub-category first.

    wrong, same_subcategory: (X,) bool, of all candidates
    -> numbers of candidates
    """
    related = np.flatnonzero(wrong & same_subcategory)
    others = np.flatnonzero(wrong & ~same_subcategory)
    return np.concatenate([rng.permutation(related), rng.permutation(others)])


def sampled_rankings(
    image_feat: Tensor,
    text_feat: Tensor,
    image_products: Tensor,
    subcategories: np.ndarray,
    seed: int,
    top: int = 0,
) -> tuple[list[Ranking], float]:
    """Rank by the sampled protocol: one positive and up to SAMPLED_NEGATIVES negatives per query.

    Negatives of the query's sub-category come first.
    image_feat (n, E), text_feat (m, E)
    image_products (n,): number of the product of an image, and so of its caption
    subcategories (n,): of the images
    seed: of the draws
    top: most similar candidates to keep for re-ranking
    -> i2t and t2i of each draw; the share of negatives that are of the query's sub-category
    """
    _, first_image = np.unique(image_products, return_index=True)
    caption_subcategories = subcategories[first_image]
    rankings, shares = [], []
    for draw in range(SAMPLED_DRAWS):
        rng = np.random.default_rng((6, seed, draw))
        query, captions, images = sampled_candidates(
            image_products.numpy(), subcategories, SAMPLED_QUERIES, SAMPLED_NEGATIVES, rng
        )
        image, caption = query[:, None], image_products[query][:, None]  # (Q, 1)

        sim = (image_feat[image] * text_feat[captions]).sum(dim=2)  # (Q, 1 + C)
        is_first = (torch.arange(sim.shape[1]) == 0).expand_as(sim)
        rankings.append(rank_candidates("sampled_i2t", sim, is_first, image, captions, top))
        shares.append((caption_subcategories[captions[:, 1:]] == subcategories[image]).mean())

        sim = (image_feat[images] * text_feat[caption]).sum(dim=2)
        is_first = (torch.arange(sim.shape[1]) == 0).expand_as(sim)
        rankings.append(rank_candidates("sampled_t2i", sim, is_first, images, caption, top))
        shares.append((subcategories[images[:, 1:]] == subcategories[image]).mean())
    return rankings, float(np.mean(shares))


def recalls_of(rankings: list[Ranking]) -> Metrics:
    """Compute R@1, R@5 and R@10 of each protocol and direction, and their mean over both directions.

    A protocol with several draws gives the mean over the draws and, as …_std, the standard deviation.
    """
    draws_by_protocol = defaultdict(list)  # full_i2t, … -> ranks (Q,) of each draw
    for ranking in rankings:
        draws_by_protocol[ranking.protocol].append(ranking.ranks)
    metrics = {}
    recalls_by_name = defaultdict(list)  # full, sampled, … -> recalls of both directions
    for protocol, draws in draws_by_protocol.items():
        name = protocol.rsplit("_", 1)[0]
        for k in (1, 5, 10):
            recalls = [(ranks < k).float().mean().item() for ranks in draws]
            metrics[f"{protocol}_r{k}"] = float(np.mean(recalls))
            recalls_by_name[name].append(metrics[f"{protocol}_r{k}"])
            if len(draws) > 1:
                metrics[f"{protocol}_r{k}_std"] = float(np.std(recalls))
    for name, recalls in recalls_by_name.items():
        metrics[f"{name}_mean"] = float(np.mean(recalls))
    return metrics


class RankedTriplets(NamedTuple):
    """The queries of a subset, compared with a gallery."""

    subset: str
    gallery: str  # original or union
    sim: Tensor  # (Q, C)
    triplets: np.ndarray  # (Q,): rows of the queries
    rows: np.ndarray  # (C,): rows of the gallery in `image_set`


def triplet_recalls(dataset: Triplets, ranked: Iterable[RankedTriplets]) -> tuple[Metrics, Metrics]:
    """Compute R@1, R@10 and R@50 by subset and gallery, and their mean over subsets.

    -> metrics; the recalls of a random order, under the same keys
    """
    metrics, chance = {}, {}
    for subset, gallery, sim, triplets, rows in ranked:
        targets = dataset.targets[triplets]
        ranks = negatives_ranked_higher(sim, torch.from_numpy(targets[:, None] == rows))
        for k in (1, 10, 50):
            key = f"{subset}_{gallery}_r{k}"
            metrics[key] = (ranks < k).float().mean().item()
            chance[key] = min(1.0, k / len(rows))
    metrics.update(mean_over_subsets(metrics))
    chance.update(mean_over_subsets(chance))
    return metrics, chance


def mean_over_subsets(metrics: Metrics) -> Metrics:
    """Average the values of keys that differ in their first part only, the subset. -> mean_…"""
    values_by_key = defaultdict(list)
    for key, value in metrics.items():
        _, suffix = key.split("_", 1)
        values_by_key[f"mean_{suffix}"].append(value)
    return {key: float(np.mean(values)) for key, values in values_by_key.items()}


def recognition_scores(labels: Tensor, preds: Tensor) -> Metrics:
    """Compute the accuracy, and macro-F1: the mean F1 of the classes that occur in labels or preds (n,)."""
    f1_scores = [scores.f1 for scores in scores_by_class(labels, preds).values()]
    return {"accuracy": (labels == preds).float().mean().item(), "macro_f1": float(np.mean(f1_scores))}


class ClassScores(NamedTuple):
    """The scores of one class, between 0 and 1."""

    precision: float
    recall: float
    f1: float


def scores_by_class(labels: Tensor, preds: Tensor) -> dict[int, ClassScores]:
    """Compute precision, recall and F1 of each class that occurs in labels or preds (n,).

    F1 = 2 · hits / (labelled + predicted); precision is 0 for a class never predicted, recall 0 for one without labels
    """
    scores = {}
    for label in torch.cat([labels, preds]).unique().tolist():
        labelled = (labels == label).sum()
        predicted = (preds == label).sum()
        hits = ((labels == label) & (preds == label)).sum()
        precision = hits / predicted.clamp(min=1)
        recall = hits / labelled.clamp(min=1)
        f1 = 2 * hits / (labelled + predicted)
        scores[label] = ClassScores(precision.item(), recall.item(), f1.item())
    return scores
