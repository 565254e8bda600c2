"""Figures from similarities and answers: recalls, rankings, accuracy, F1. Pure functions."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from readers.triplets import Triplets

Figures = dict[str, float]


def match_rank(sim: Tensor, positive: Tensor) -> Tensor:
    """How many wrong candidates come before the best right one: 0 is a hit at rank 1. sim, positive (Q, C) -> (Q,).

    Ties count against the model, so that equal features earn nothing, and so does what is not a number. A row without a
    right candidate is beyond every rank.
    """
    best = sim.masked_fill(~positive, -math.inf).max(dim=1, keepdim=True).values
    rank = (~(sim < best) & ~positive).sum(dim=1)
    return rank.masked_fill(~positive.any(dim=1), torch.iinfo(rank.dtype).max)


@dataclass
class Ranking:
    """Queries with how they were ranked by similarity. Letters: Q queries, C candidates, K best ones kept."""

    protocol: str  # full_i2t, sampled_t2i, …
    rank: Tensor  # (Q,): wrong candidates before the best right one
    pairs: Tensor  # (Q, K, 2): photo and text of the best K by similarity, to be re-ranked
    right: Tensor  # (Q, K)
    sizes: Tensor  # (Q, 2): candidates, and right ones among them

    @staticmethod
    def of(protocol: str, sim: Tensor, right: Tensor, photos: Tensor, texts: Tensor, top: int) -> "Ranking":
        """sim, right (Q, C); photos, texts (Q, C) or broadcast to it."""
        best = sim.topk(min(top, sim.shape[1]), dim=1).indices
        pairs = torch.stack([photos.expand_as(sim).gather(1, best), texts.expand_as(sim).gather(1, best)], dim=2)
        sizes = torch.stack([torch.full((len(sim),), sim.shape[1]), right.sum(dim=1)], dim=1)
        return Ranking(protocol, match_rank(sim, right), pairs, right.gather(1, best), sizes)

    @staticmethod
    def sampled(way: str, lists: Tensor, image_feat: Tensor, text_feat: Tensor, owner: Tensor, top: int) -> "Ranking":
        """Of candidate lists (Q, 1 + C): the query's photo, then for i2t the texts, for t2i the photos to choose from,
        the right one first."""
        query, choice = lists[:, :1], lists[:, 1:]
        photos, texts = (query, choice) if way == "i2t" else (choice, owner[query])
        sim = (image_feat[photos] * text_feat[texts]).sum(dim=2)
        right = torch.zeros_like(sim, dtype=torch.bool)
        right[:, 0] = True
        return Ranking.of(f"sampled_{way}", sim, right, photos, texts, top)

    def reranked(self, scores: Tensor) -> Tensor:
        """Ranks (Q,) when the best K are put in the order of `scores` (Q, K), before all others."""
        return torch.where(self.right.any(dim=1), match_rank(scores, self.right), self.rank)

    def chance(self) -> Figures:
        """Recalls of a random order: 1 − C(n − right, k) / C(n, k)."""
        counts = Counter(map(tuple, self.sizes.tolist()))
        miss = lambda n, right, k: math.comb(n - right, k) / math.comb(n, k) if k <= n else 0.0
        share = lambda k: sum(times * (1 - miss(n, right, k)) for (n, right), times in counts.items()) / len(self.rank)
        return {f"{self.protocol}_r{k}": share(k) for k in (1, 5, 10)}


def full_rankings(
    image_feat: Tensor, text_feat: Tensor, of_photo: Tensor, of_text: Tensor, top: int = 0
) -> Iterator[Ranking]:
    """Every photo (n, E) against the texts (m, E), every text against all photos. of_photo (n,), of_text (m,): the
    product; right is what is of the same."""
    photos, texts = torch.arange(len(image_feat)), torch.arange(len(text_feat))
    same = of_photo[:, None] == of_text  # (n, m)
    i2t = [
        Ranking.of("full_i2t", image_feat[p] @ text_feat.T, same[p], p[:, None], texts, top) for p in photos.split(1024)
    ]
    t2i = [
        Ranking.of("full_t2i", text_feat[t] @ image_feat.T, same.T[t], photos, t[:, None], top)
        for t in texts.split(1024)
    ]
    for parts in (i2t, t2i):
        joined = (torch.cat([getattr(part, key) for part in parts]) for key in ("rank", "pairs", "right", "sizes"))
        yield Ranking(parts[0].protocol, *joined)


def sampled_candidates(
    owner: np.ndarray, kinds: np.ndarray, queries: int, negatives: int, rng: np.random.Generator
) -> dict[str, Tensor]:
    """One draw of the sampled protocol: random query photos, and for each the right text (i2t), or itself as the right
    photo of its text (t2i), before `negatives` of other products of the same sub-category, topped up from others where
    there are too few. owner (n,): product of a photo; kinds (n,): its sub-category.
    -> {"i2t": (Q, 1 + C), "t2i": (Q, 1 + C)}: photo, right candidate, wrong ones."""
    chosen, lists = rng.permutation(len(owner))[:queries], {"i2t": [], "t2i": []}
    products, first = np.unique(owner, return_index=True)
    for photo in chosen:
        for way, owners, kinds_of, right in (
            ("i2t", products, kinds[first], owner[photo]), ("t2i", owner, kinds, photo)
        ):  # fmt: skip
            others = np.flatnonzero(owners != owner[photo])
            alike = kinds_of[others] == kinds[photo]
            pool = np.concatenate([rng.permutation(others[alike]), rng.permutation(others[~alike])])
            lists[way].append(np.concatenate([[photo, right], pool[:negatives]]))
    shortest = {way: min(map(len, rows)) for way, rows in lists.items()}
    return {way: torch.from_numpy(np.stack([row[: shortest[way]] for row in rows])) for way, rows in lists.items()}


def sampled_rankings(
    image_feat: Tensor, text_feat: Tensor, owner: Tensor, kinds: np.ndarray, queries: int, negatives: int, draws: int,
    seed: int, top: int = 0,
) -> tuple[list[Ranking], Figures]:  # fmt: skip
    """Some draws of the sampled protocol; owner (n,): the text of each photo. -> a ranking for each draw and way, and
    by way which share of the wrong candidates is of the query's sub-category."""
    rankings, alike = [], {"i2t": [], "t2i": []}
    kind_of = {"i2t": kinds[np.unique(owner, return_index=True)[1]], "t2i": kinds}
    for draw in tqdm(range(draws), "drawing candidates", unit=" draws", leave=False, disable=None):
        rng = np.random.default_rng((6, seed, draw))
        for way, lists in sampled_candidates(owner.numpy(), kinds, queries, negatives, rng).items():
            rankings.append(Ranking.sampled(way, lists, image_feat, text_feat, owner, top))
            alike[way].append((kind_of[way][lists[:, 2:]] == kinds[lists[:, :1]]).mean())
    return rankings, {way: float(np.mean(shares)) for way, shares in alike.items()}


def recalls_of(rankings: list[Ranking], ranks: list[Tensor] | None = None) -> Figures:
    """R@1/5/10 of each protocol and direction, the mean over both and, of several draws, the mean over these. `ranks`:
    other ranks (Q,) than those by similarity, one a ranking."""
    shares = {}
    for ranking, rank in zip(rankings, ranks or [ranking.rank for ranking in rankings], strict=True):
        for k in (1, 5, 10):
            shares.setdefault(f"{ranking.protocol}_r{k}", []).append((rank < k).float().mean().item())
    figures = {key: float(np.mean(values)) for key, values in shares.items()}
    spread = {f"{key}_std": float(np.std(values)) for key, values in shares.items() if len(values) > 1}
    for name in dict.fromkeys(ranking.protocol.split("_")[0] for ranking in rankings):
        means = [value for key, value in figures.items() if key.startswith(f"{name}_")]
        spread[f"{name}_mean"] = float(np.mean(means))
    return figures | spread


# subset, protocol, similarities (Q, C), triplets (Q,), the gallery's rows of `photos` (C,)
RankedTriplets = tuple[str, str, Tensor, np.ndarray, np.ndarray]


def triplet_recalls(dataset: Triplets, ranked: Iterable[RankedTriplets]) -> tuple[Figures, Figures]:
    """R@1, R@10, R@50 by subset and gallery, and their mean over subsets; and what chance would give."""
    figures, chance = {}, {}
    for subset, protocol, sim, triplets, rows in ranked:
        rank = match_rank(sim, torch.from_numpy(dataset.targets[triplets][:, None] == rows))
        for k in (1, 10, 50):
            figures[f"{subset}_{protocol}_r{k}"] = (rank < k).float().mean().item()
            chance[f"{subset}_{protocol}_r{k}"] = min(1.0, k / len(rows))
    for values in (figures, chance):
        for end in dict.fromkeys(key.split("_", 1)[1] for key in list(values)):
            values[f"mean_{end}"] = float(np.mean([v for key, v in values.items() if key.endswith(end)]))
    return figures, chance


def recognition_scores(right: Tensor, answered: Tensor) -> Figures:
    """Accuracy, and macro-F1: the mean of F1 over the classes that occur among the right or the answered (n,)."""
    f1 = [f1 for _, _, f1 in scores_by_class(right, answered).values()]
    return {"accuracy": (right == answered).float().mean().item(), "macro_f1": float(np.mean(f1))}


def most_confused(right: Tensor, answered: Tensor, count: int) -> Tensor:
    """Of the classes that occur among the right or the answered (n,) those in most errors, `count` at most, sorted."""
    missed = right != answered
    errors = torch.cat([right[missed], answered[missed]]).bincount(
        minlength=int(torch.cat([right, answered]).max()) + 1
    )
    occurs = torch.cat([right, answered]).unique()
    return occurs[errors[occurs].argsort(descending=True, stable=True)[:count]].sort().values


def scores_by_class(right: Tensor, answered: Tensor) -> dict[int, tuple[float, float, float]]:
    """Precision, recall, F1 of every class that occurs among the right or the answered (n,).

    F1 = 2·hits / (right + answered); a ratio of nothing to nothing counts as 0.
    """
    classes = int(torch.cat([right, answered]).max()) + 1
    hits = right[right == answered].bincount(minlength=classes)
    there, said = right.bincount(minlength=classes), answered.bincount(minlength=classes)
    ratio = lambda a, b: (a / b).item() if b else 0.0
    return {
        c: (ratio(hits[c], said[c]), ratio(hits[c], there[c]), ratio(2 * hits[c], there[c] + said[c]))
        for c in range(classes)
        if there[c] + said[c]
    }
