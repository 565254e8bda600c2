"""Metrics from similarities and predictions: recalls, rankings, accuracy, F1. Pure functions.

Letters: Q queries, C candidates of a query, K best candidates that are kept, n images, m captions, E embedding.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from readers.triplets import Triplets

Metrics = dict[str, float]

QUERIES, NEGATIVES, DRAWS = 1000, 100, 5  # of the sampled protocol


def match_rank(sim: Tensor, positives: Tensor) -> Tensor:
    """Count the wrong candidates before the best right one: 0 is a hit at rank 1. sim, positives (Q, C) -> (Q,).

    Ties count against the model, so that equal features earn nothing. NaN counts against it, too. A row without a right
    candidate is beyond every rank.
    """
    best = sim.masked_fill(~positives, -math.inf).max(dim=1, keepdim=True).values
    not_below = ~(sim < best)
    rank = (not_below & ~positives).sum(dim=1)
    return rank.masked_fill(~positives.any(dim=1), torch.iinfo(rank.dtype).max)


@dataclass
class Ranking:
    """The candidates of some queries, ranked by similarity."""

    protocol: str  # full_i2t, sampled_t2i, …
    rank: Tensor  # (Q,): wrong candidates before the best right one
    pairs: Tensor  # (Q, K, 2): image and caption of the K most similar candidates
    positives: Tensor  # (Q, K): which of these are right
    candidates: int  # of each query
    positive_counts: Tensor  # (Q,): how many of all candidates are right

    def reranked(self, scores: Tensor) -> "Ranking":
        """Put the K best candidates in the order of `scores` (Q, K), before all others."""
        rank = torch.where(self.positives.any(dim=1), match_rank(scores, self.positives), self.rank)
        return replace(self, protocol=f"rerank_{self.protocol}", rank=rank)

    def chance(self) -> Metrics:
        """Compute the recalls of a random order: 1 − C(candidates − positives, k) / C(candidates, k)."""
        recalls = {}
        for k in (1, 5, 10):
            misses = [math.comb(self.candidates - count, k) for count in self.positive_counts.tolist()]
            possible = len(misses) * max(1, math.comb(self.candidates, k))
            recalls[f"{self.protocol}_r{k}"] = 1 - sum(misses) / possible
        return recalls


def rank_candidates(
    protocol: str,
    sim: Tensor,
    positives: Tensor,
    images: Tensor,
    captions: Tensor,
    top: int,
) -> Ranking:
    """Rank the candidates by similarity and keep the best `top` to be re-ranked.

    sim, positives (Q, C) · images, captions: the pair that each candidate stands for, broadcast to (Q, C)
    """
    best = sim.topk(min(top, sim.shape[1]), dim=1).indices  # (Q, K)
    best_images = images.expand_as(sim).gather(1, best)
    best_captions = captions.expand_as(sim).gather(1, best)
    return Ranking(
        protocol,
        rank=match_rank(sim, positives),
        pairs=torch.stack([best_images, best_captions], dim=2),
        positives=positives.gather(1, best),
        candidates=sim.shape[1],
        positive_counts=positives.sum(dim=1),
    )


def full_rankings(
    image_feat: Tensor, text_feat: Tensor, image_products: Tensor, text_products: Tensor, top: int = 0
) -> list[Ranking]:
    """Rank all captions for each image, and all images for each caption. Right is what is of the same product.

    image_feat (n, E), text_feat (m, E), image_products (n,), text_products (m,)
    """
    images = torch.arange(len(image_feat))
    captions = torch.arange(len(text_feat))
    same = image_products[:, None] == text_products  # (n, m)
    i2t = rank_candidates("full_i2t", image_feat @ text_feat.T, same, images[:, None], captions, top)
    t2i = rank_candidates("full_t2i", text_feat @ image_feat.T, same.T, images, captions[:, None], top)
    return [i2t, t2i]


def sampled_candidates(
    owner: np.ndarray, kinds: np.ndarray, queries: int, negatives: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw query images and, for each, the captions that it chooses from and the images that its caption chooses from.

    owner (n,): product, and so caption, of an image · kinds (n,): its sub-category
    -> query images (Q,), captions (Q, 1 + C), images (Q, 1 + C); the right candidate comes first
    """
    products, first_image = np.unique(owner, return_index=True)
    chosen = rng.permutation(len(owner))[:queries]
    captions, images = [], []
    for image in chosen:
        product, kind = owner[image], kinds[image]
        wrong_captions = draw_negatives(products != product, kinds[first_image] == kind, rng)
        wrong_images = draw_negatives(owner != product, kinds == kind, rng)
        captions.append([product, *wrong_captions[:negatives]])
        images.append([image, *wrong_images[:negatives]])
    fewest = min(len(row) for row in images)  # products differ in how many images they have
    images = [row[:fewest] for row in images]
    return torch.from_numpy(chosen), torch.tensor(captions), torch.tensor(images)


def draw_negatives(wrong: np.ndarray, same_kind: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """List the wrong candidates in random order, those of the query's sub-category first. Both masks (n,)."""
    alike = np.flatnonzero(wrong & same_kind)
    others = np.flatnonzero(wrong & ~same_kind)
    return np.concatenate([rng.permutation(alike), rng.permutation(others)])


def sampled_rankings(
    image_feat: Tensor, text_feat: Tensor, owner: Tensor, kinds: np.ndarray, seed: int, top: int = 0
) -> tuple[list[Ranking], float]:
    """Rank by the sampled protocol: a query has one right candidate and up to NEGATIVES wrong ones, those of the same
    sub-category first.

    image_feat (n, E), text_feat (m, E) · owner (n,): the caption of an image · kinds (n,): its sub-category
    -> i2t and t2i of each of DRAWS draws; which share of the wrong candidates is of the query's sub-category
    """
    _, first_image = np.unique(owner, return_index=True)
    text_kinds = kinds[first_image]
    rankings, same_kind = [], []
    for draw in range(DRAWS):
        rng = np.random.default_rng((6, seed, draw))
        query, captions, images = sampled_candidates(owner.numpy(), kinds, QUERIES, NEGATIVES, rng)
        image, caption = query[:, None], owner[query][:, None]  # (Q, 1)

        sim = (image_feat[image] * text_feat[captions]).sum(dim=2)  # (Q, 1 + C)
        first = (torch.arange(sim.shape[1]) == 0).expand_as(sim)
        rankings.append(rank_candidates("sampled_i2t", sim, first, image, captions, top))
        same_kind.append((text_kinds[captions[:, 1:]] == kinds[image]).mean())

        sim = (image_feat[images] * text_feat[caption]).sum(dim=2)
        first = (torch.arange(sim.shape[1]) == 0).expand_as(sim)
        rankings.append(rank_candidates("sampled_t2i", sim, first, images, caption, top))
        same_kind.append((kinds[images[:, 1:]] == kinds[image]).mean())
    return rankings, float(np.mean(same_kind))


def recalls_of(rankings: list[Ranking]) -> Metrics:
    """Compute R@1/5/10 of each protocol and direction, and their mean over both directions.

    Several draws of a protocol give the mean over the draws and, as …_std, the standard deviation.
    """
    ranks = defaultdict(list)  # protocol -> (Q,) of each draw
    for ranking in rankings:
        ranks[ranking.protocol].append(ranking.rank)
    metrics = {}
    by_name = defaultdict(list)  # full, sampled, … -> recalls of both directions
    for protocol, draws in ranks.items():
        name = protocol.rsplit("_", 1)[0]
        for k in (1, 5, 10):
            recalls = [(rank < k).float().mean().item() for rank in draws]
            metrics[f"{protocol}_r{k}"] = float(np.mean(recalls))
            by_name[name].append(metrics[f"{protocol}_r{k}"])
            if len(draws) > 1:
                metrics[f"{protocol}_r{k}_std"] = float(np.std(recalls))
    for name, recalls in by_name.items():
        metrics[f"{name}_mean"] = float(np.mean(recalls))
    return metrics


# subset, protocol, similarities (Q, C), triplets (Q,), the gallery's rows of `image_set` (C,)
RankedTriplets = tuple[str, str, Tensor, np.ndarray, np.ndarray]


def triplet_recalls(dataset: Triplets, ranked: Iterable[RankedTriplets]) -> tuple[Metrics, Metrics]:
    """Compute R@1, R@10, R@50 by subset and gallery, and their mean over subsets. -> metrics, what chance would give"""
    metrics, chance = {}, {}
    for subset, protocol, sim, triplets, rows in ranked:
        targets = dataset.targets[triplets]
        rank = match_rank(sim, torch.from_numpy(targets[:, None] == rows))
        for k in (1, 10, 50):
            key = f"{subset}_{protocol}_r{k}"
            metrics[key] = (rank < k).float().mean().item()
            chance[key] = min(1.0, k / len(rows))
    return metrics | mean_over_subsets(metrics), chance | mean_over_subsets(chance)


def mean_over_subsets(metrics: Metrics) -> Metrics:
    """Average the values whose keys differ in the subset, their first part, alone. -> mean_…"""
    values = defaultdict(list)
    for key, value in metrics.items():
        _, end = key.split("_", 1)
        values[f"mean_{end}"].append(value)
    return {key: float(np.mean(parts)) for key, parts in values.items()}


def recognition_scores(labels: Tensor, preds: Tensor) -> Metrics:
    """Compute the accuracy, and macro-F1: the mean of F1 over the classes that occur in labels or preds (n,)."""
    f1_scores = [f1 for _, _, f1 in scores_by_class(labels, preds).values()]
    return {"accuracy": (labels == preds).float().mean().item(), "macro_f1": float(np.mean(f1_scores))}


def scores_by_class(labels: Tensor, preds: Tensor) -> dict[int, tuple[float, float, float]]:
    """Compute precision, recall and F1 of each class that occurs in labels or preds (n,).

    F1 = 2·hits / (labelled + predicted); precision is 0 where nothing is predicted, recall where nothing is labelled
    """
    scores = {}
    for label in torch.cat([labels, preds]).unique().tolist():
        labelled = (labels == label).sum()
        predicted = (preds == label).sum()
        hits = ((labels == label) & (preds == label)).sum()
        precision = hits / predicted.clamp(min=1)
        recall = hits / labelled.clamp(min=1)
        f1 = 2 * hits / (labelled + predicted)
        scores[label] = precision.item(), recall.item(), f1.item()
    return scores
