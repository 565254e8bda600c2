"""Every mask: which words and which patches are hidden, how attention becomes a mask, what replaces a hidden word; and
how masks are measured against the truth.

Functions on tensors; one of them asks the momentum model. Masks are boolean, True = masked. `words` (B, L) marks the
tokens that may be masked at all: neither [CLS], [SEP] nor [PAD]. A word is a WordPiece token here, punctuation too.
Every draw takes a generator on the tensors' device.

Letters: B batch, L text tokens, N image tokens (CLS, then the P patches), h heads, V vocabulary.
"""

from typing import Literal

import torch
from torch import Tensor

from model import MomentumModel, Photos

HeadReduction = Literal["mean", "max"]
WordScore = Literal["max", "mass", "entropy"]
PatchScore = Literal["all", "masked"]
MaskSource = Literal["attention", "gradcam", "hidden"]


def mask_top(scores: Tensor, candidates: Tensor, counts: Tensor | int) -> Tensor:
    """The `counts` (B, 1) highest-scoring `candidates` (B, X) of each row of `scores` (B, X) -> mask (B, X)."""
    scores = scores.masked_fill(~candidates, float("-inf"))
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
    return (rank < counts) & candidates


def word_counts(words: Tensor, ratio: float) -> Tensor:
    """How many of the `words` (B, L) of each row to mask: max(1, round(ratio·words)), 0 where there are none. (B, 1)"""
    total = words.sum(dim=1, keepdim=True)
    return (total * ratio).round().long().clamp(min=1).minimum(total)


def random_word_mask(words: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """A uniformly random share of the words of each row; exact counts (see `word_counts`). (B, L) -> (B, L)."""
    scores = torch.rand(words.shape, device=words.device, generator=generator)
    return mask_top(scores, words, word_counts(words, ratio))


def patch_count(patches: int, ratio: float) -> int:
    """How many of the patches of a photo to mask: round(ratio·patches), leaving one at least."""
    return min(round(ratio * patches), patches - 1)


def random_patch_mask(
    rows: int, patches: int, ratio: float, generator: torch.Generator | None = None, device: torch.device | None = None
) -> Tensor:
    """A uniformly random share of the patches of each photo, exact counts (see `patch_count`). -> (rows, patches)."""
    scores = torch.rand(rows, patches, device=device, generator=generator)
    return mask_top(scores, torch.ones_like(scores, dtype=torch.bool), patch_count(patches, ratio))


def split_patches(patch_mask: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Numbers of the patches that a mask (B, P) made with this ratio leaves (B, K), and of those that it hides (B, M).
    Sorted, not searched for: a GPU need not be asked how many there are."""
    patches = patch_mask.shape[1]
    return patch_mask.byte().argsort(dim=1, stable=True).tensor_split([patches - patch_count(patches, ratio)], dim=1)


def momentum_attention(
    momentum: MomentumModel, batch: dict, photos: Photos, text_embeds_m: Tensor, source: MaskSource, mask_id: int,
    generator: torch.Generator | None = None,
) -> list[Tensor]:  # fmt: skip
    """The momentum model's cross-attention that masks are made of: one map (B, h, L, N) a fusion layer, detached.

    attention  A, of the clean pair: the plainest reading of SyncMask
    gradcam    A · max(0, ∂ match logit / ∂A), of the clean pair (Grad-CAM, as in ALBEF's grounding), from every layer
               except the last, where only the row of [CLS] reaches the match logit
    hidden     row w of A while word w is hidden: a word that is there needs not look at the photo, a hidden one must.
               Two passes, each with one random half of the words hidden (choice)

    batch: token_ids, attention_mask, words (B, L) · the clean pair: photos, by `momentum.look`, text_embeds_m (B, L, D)
    """
    ids, keep, words = batch["token_ids"], batch["attention_mask"], batch["words"]
    if source == "hidden":
        half = random_word_mask(words, 0.5, generator)
        hidden = torch.stack([half, words & ~half])  # (2, B, L)
        with torch.no_grad():
            keep, rows = keep.repeat(2, 1), torch.arange(len(ids), device=ids.device).repeat(2)
            text = momentum.encode_text(ids.masked_fill(hidden, mask_id).flatten(0, 1), keep)
            _, attentions = momentum.fusion(text, keep, photos, return_attention=True, rows=rows)
        return [torch.where(half[:, None, :, None], *a.chunk(2)) for a in attentions]  # each row of its own pass
    if source == "attention":
        with torch.no_grad():
            return momentum.fusion(text_embeds_m, keep, photos, return_attention=True)[1]
    with torch.enable_grad():
        text = text_embeds_m.detach().requires_grad_()
        fused, attentions = momentum.fusion(text, keep, photos, return_attention=True)
        gradients = torch.autograd.grad(momentum.itm_logits(fused)[:, 1].sum(), attentions[:-1])
    return [(a * g.clamp(min=0)).detach() for a, g in zip(attentions[:-1], gradients, strict=True)]


def read_layer(attentions: list[Tensor], layer: int, heads: HeadReduction) -> Tensor:
    """One layer of the attention maps (B, h, L, N), numbered from 1; or with 0 what all layers agree on, (B, 1, L, N):
    their geometric mean, heads reduced first, since those of different layers have nothing to do with each other."""
    if layer:
        return attentions[layer - 1]
    maps = torch.stack([a.float().mean(dim=1) if heads == "mean" else a.float().amax(dim=1) for a in attentions])
    return maps.clamp(min=1e-12).log().mean(dim=0).exp()[:, None]


def reduce_heads(attention: Tensor, heads: HeadReduction = "mean") -> Tensor:
    """Attention to the patches alone, the column of the image CLS dropped. (B, h, L, N) -> (B, L, P)."""
    patches = attention[..., 1:].detach().float()
    return patches.mean(dim=1) if heads == "mean" else patches.amax(dim=1)


def sync_mask(
    attention: Tensor, word_mask: Tensor, patch_ratio: float, word_ratio: float, heads: HeadReduction = "mean",
    word_score: WordScore = "entropy", patch_score: PatchScore = "masked", noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Synchronized masks: the words and the patches where text and photo have most to do with each other (SyncMask,
    Song et al. 2024; how scores come out of the attention is our choice).

    attention (B, h, L, N): cross-attention of the text tokens to the image tokens, CLS first
    word_mask (B, L): the words that may be masked · patch_ratio, word_ratio: shares to mask
    noise: standard deviation of what is added to the scores of a row, in standard deviations of the row: ties and
    near-ties fall differently from epoch to epoch
    -> patch mask (B, P), word mask (B, L); exact counts, as the random masks'. CLS, [CLS], [SEP], [PAD] never.

    word_score    max      the most that the word attends to any one patch
                  mass     what it attends to the patches that all words together attend to most
                  entropy  how concentrated its attention is: the negative entropy over the patches, minus a penalty for
                           attention that falls on no patch (but on the image CLS, or where layers do not agree)
    patch_score   all      how much the words attend to the patch, on average
                  masked   the same of the words just masked: they and the patches are hidden together
    """
    a = reduce_heads(attention, heads)  # (B, L, P)
    patches = patch_count(a.shape[2], patch_ratio)
    everything = torch.ones_like(a[:, 0], dtype=torch.bool)
    # s_p = mean over words of A[w, p]
    mean_over = lambda words: (a * words[..., None]).sum(dim=1) / words.sum(dim=1, keepdim=True).clamp(min=1)
    if word_score == "max":
        word_scores = a.amax(dim=2)  # (B, L)
    elif word_score == "mass":
        word_scores = (a * mask_top(mean_over(word_mask), everything, patches)[:, None]).sum(dim=2)
    else:
        # Σ_p q log A[w, p] = −H(q) + log Σ_p A[w, p],  q = A[w, p] / Σ_p A[w, p]
        q = (a + 1e-12) / (a + 1e-12).sum(dim=2, keepdim=True)
        word_scores = (q * (a + 1e-12).log()).sum(dim=2)
    word_scores = _jitter(word_scores, word_mask, noise, generator)
    masked_words = mask_top(word_scores, word_mask, word_counts(word_mask, word_ratio))
    patch_scores = mean_over(masked_words if patch_score == "masked" else word_mask)  # (B, P)
    return mask_top(_jitter(patch_scores, everything, noise, generator), everything, patches), masked_words


def soft_mask(attention: Tensor, gradient: Tensor, word_index: Tensor) -> Tensor:
    """How much each patch has to do with one word, by Grad-CAM of the match logit s: what a soft mask suppresses
    (text-driven soft masks, Park & Han 2023; the mean over heads and the normalisation are our choice).

    G = mean_h A · max(0, ∂s/∂A), in the row of the word, over the patches;   M = (G − min G) / (max G − min G + 1e-7)
    attention, gradient (B, h, L, N), image CLS first; word_index (B,) -> (B, P) in [0, 1], detached.
    """
    maps = (attention * gradient.clamp(min=0)).detach().float()
    heat = maps[torch.arange(len(maps), device=maps.device), :, word_index, 1:].mean(dim=1)  # (B, P)
    low, high = heat.amin(dim=1, keepdim=True), heat.amax(dim=1, keepdim=True)
    return (heat - low) / (high - low + 1e-7)


def _jitter(scores: Tensor, candidates: Tensor, noise: float, generator: torch.Generator | None) -> Tensor:
    count = candidates.sum(dim=1, keepdim=True).clamp(min=1)
    mean = (scores * candidates).sum(dim=1, keepdim=True) / count
    deviation = (((scores - mean) ** 2 * candidates).sum(dim=1, keepdim=True) / count).sqrt()
    # even without noise exact ties must not always fall to the first: a floor far below any real difference
    floor = (1e-7 * scores.abs().amax(dim=1, keepdim=True)).clamp(min=1e-30)
    draws = torch.randn(scores.shape, device=scores.device, generator=generator)
    return scores + draws * (noise * deviation + floor)


def cooccurrence(mask: Tensor, candidates: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Of the masked `candidates`, how many are `shared` by photo and text. All (B, X) -> hits, of how many.

    Words: candidates name an attribute, shared ones name one that this photo shows. Patches: all are candidates,
    shared ones lie on the region of an attribute that the text names.
    """
    masked = mask & candidates
    return (masked & shared).sum(), masked.sum()


def pointing(attention: Tensor, regions: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pointing game (Zhang et al. 2016): is the most attended patch of a word in the word's region?

    attention (B, L, P), regions (B, L, P), words (B, L) with a region -> hits, hits expected of a random patch,
    of how many words.
    """
    hit = regions.gather(2, attention.argmax(dim=2, keepdim=True)).squeeze(2)
    return (hit & words).sum(), regions.float().mean(dim=2)[words].sum(), words.sum()


def corrupt_words(
    token_ids: Tensor, mask: Tensor, mask_id: int, word_ids: Tensor, generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """BERT's 80/10/10 rule (Devlin et al. 2019, §3.1): of the masked tokens 80 % become [MASK], 10 % a random
    one of `word_ids` (V',), 10 % stay.

    token_ids (B, L), mask (B, L) -> corrupted ids (B, L), labels (B, L) with −100 where not masked.
    """
    labels = token_ids.masked_fill(~mask, -100)
    dice = torch.rand(token_ids.shape, device=token_ids.device, generator=generator)
    drawn = torch.randint(len(word_ids), token_ids.shape, device=token_ids.device, generator=generator)
    ids = token_ids.masked_fill(mask & (dice < 0.8), mask_id)
    return torch.where(mask & (dice >= 0.9), word_ids[drawn], ids), labels


def replace_words(
    token_ids: Tensor, words: Tensor, mask: Tensor, mask_id: int, word_ids: Tensor, antonyms: Tensor,
    synonyms: Tensor, generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`corrupt_words` for replaced-token detection (after FashionSAP, Han et al. 2023): of the masked tokens that it
    replaces, half become their antonym instead of a random word; of the `words` (B, L) left alone, 15 % become their
    synonym, which is no replacement to detect. Choices: synonyms anywhere, not in the value of one prompt alone; a
    token without an antonym keeps the random word.

    antonyms, synonyms (V,): token id -> token id, −1 where there is none
    -> corrupted ids (B, L), MLM labels (B, L) with −100 where not masked, replaced (B, L) bool.
    """
    ids, labels = corrupt_words(token_ids, mask, mask_id, word_ids, generator)
    replaced = mask & (ids != token_ids) & (ids != mask_id)
    dice = torch.rand(token_ids.shape, device=token_ids.device, generator=generator)
    antonym, synonym = antonyms[token_ids], synonyms[token_ids]
    ids = torch.where(replaced & (dice < 0.5) & (antonym >= 0), antonym, ids)
    return torch.where(words & ~mask & (dice < 0.15) & (synonym >= 0), synonym, ids), labels, replaced
