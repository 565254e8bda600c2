"""Does a photo tell its own text from one that differs in one thing that the photo shows?"""

from collections import defaultdict
from collections.abc import Iterator
from difflib import SequenceMatcher

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import tokenize
from harness.batches import batches_of, match_scores, photo_features, text_features
from harness.run import Run, autocast
from photos.dataset import PhotoDataset
from photos.prompts import Text
from photos.synthetic import Synthetic
from photos.wardrobe import WHOLE


@torch.no_grad()
def choices(run: Run, dataset: Synthetic, products: int) -> dict[str, float]:
    """By kind of attribute the share of the photos, of the first `products` products, whose own text scores higher than
    one that differs in a single value; by cosine similarity, by the matching head, and by the MLM head, which is to
    restore the words that differ. Chance is 0.5, ties are wrong.

    choice_<kind>, choice_<kind>_matching and _restoring, and as means over the kinds that are details detail_choice(…).
    """
    part = dataset.part((dataset.product_ids < products).nonzero()[0])
    kinds, rows, others = trials(dataset, part.source)
    if not rows:
        return {}
    texts = [part.text(row) for row in range(len(part))] + [(dataset.lead, other) for other in others]
    own, other = torch.tensor(rows), torch.arange(len(others)) + len(part)
    image_feat, text_feat = photo_features(run, part)[1], text_features(run, texts)
    cosine = lambda text: (image_feat[own] * text_feat[text]).sum(dim=1)
    similar = cosine(own) > cosine(other)
    pairs = torch.stack([own.repeat(2), torch.cat([own, other])], dim=1)
    matched = match_scores(run, part, texts, pairs).chunk(2)
    own, other = [texts[row] for row in rows], texts[len(part) :]
    restored = restoring_scores(run, part, own + other, other + own, rows * 2).chunk(2)
    shares = _shares(kinds, similar, "") | _shares(kinds, matched[0] > matched[1], "_matching")
    return shares | _shares(kinds, restored[0] > restored[1], "_restoring")


def trials(dataset: Synthetic, rows: list[int]) -> tuple[list[str], list[int], list[str]]:
    """For each of some rows and each kind of attribute that its photo shows one wrong text, the same ones every time.
    -> kinds, which of the rows, texts."""
    found = []
    for number, row in enumerate(rows):
        rng, options = np.random.default_rng((11, row)), defaultdict(list)
        for kind, key, variant in dataset.products[dataset.rows[row][0]].variants():
            if key in dataset.regions[row]:
                options[kind].append(variant)
        for kind, variants in options.items():
            found.append((kind, number, variants[int(rng.integers(len(variants)))].caption_and_spans()[0]))
    return tuple(map(list, zip(*found, strict=True))) if found else ([], [], [])


@torch.no_grad()
def restoring_scores(run: Run, photos: PhotoDataset, texts: list[Text], rivals: list[Text], rows: list[int]) -> Tensor:
    """How well a photo and the rest of a text restore the words that its rival has not: their mean log-probability when
    all of them are hidden at once (masked language models as judges: Salazar et al. 2020).

    texts, rivals: n each · rows: which of `photos`, n -> (n,); 0 where nothing differs
    """
    token_ids, keep, differing = (x.to(run.device) for x in differing_words(run, texts, rivals))
    scores = torch.zeros(len(texts), device=run.device)
    for at, fused in fused_with(run, photos, token_ids.masked_fill(differing, run.mask_id), keep, rows):
        hidden, words = differing[at], token_ids[at]
        with autocast(run):
            log_p = -F.cross_entropy(run.model.mlm_logits(fused[hidden]).float(), words[hidden], reduction="none")
        scores.index_add_(0, at[hidden.nonzero()[:, 0]], log_p)
    return scores / differing.sum(dim=1).clamp(min=1)


def differing_words(run: Run, texts: list[Text], rivals: list[Text]) -> tuple[Tensor, Tensor, Tensor]:
    """Of some texts token ids, attention mask, and True at the words that the rival of each has not, (n, L) each."""
    encoded, other = (tokenize(run.tokenizer, said) for said in (texts, rivals))
    unpadded = ([ids[keep].tolist() for ids, keep in zip(e["token_ids"], e["attention_mask"].bool(), strict=True)]
                for e in (encoded, other))  # fmt: skip
    differing = torch.zeros_like(encoded["token_ids"], dtype=torch.bool)
    for text, (mine, others) in enumerate(zip(*unpadded, strict=True)):
        for what, start, end, _, _ in SequenceMatcher(None, mine, others, autojunk=False).get_opcodes():
            differing[text, start:end] = what != "equal"
    return encoded["token_ids"], encoded["attention_mask"], differing


@torch.no_grad()
def fused_with(
    run: Run, photos: PhotoDataset, token_ids: Tensor, keep: Tensor, rows: list[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every text (n, L) fused with its photo: of `photos`, as the n `rows` say; each is encoded once for all its texts.
    -> a part at a time, which texts (k,) and their fused tokens (k, L, D)."""
    which, first = torch.tensor(rows, device=run.device), 0
    for batch in batches_of(run, photos, "fusing"):
        with autocast(run):
            seen = run.model.look(run.model.encode_image(batch["images"]))
        asked = torch.where((first <= which) & (which < first + len(batch["rows"])))[0]
        for at in asked.split(2 * run.config.batch_size) if len(asked) else ():
            with autocast(run):
                text_embeds = run.model.encode_text(token_ids[at], keep[at])
                fused = run.model.fuse(text_embeds, keep[at], seen, which[at] - first)
            yield at, fused
        first += len(batch["rows"])


def _shares(kinds: list[str], right: Tensor, end: str) -> dict[str, float]:
    by_kind = defaultdict(list)
    for kind, hit in zip(kinds, right.tolist(), strict=True):
        by_kind[kind].append(hit)
    shares = {kind: float(np.mean(hits)) for kind, hits in by_kind.items()}
    details = [share for kind, share in shares.items() if kind not in WHOLE]
    figures = {f"choice_{kind}{end}": share for kind, share in shares.items()}
    return figures | ({f"detail_choice{end}": float(np.mean(details))} if details else {})
