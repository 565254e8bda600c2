"""Every mask: what may be masked, random, synchronized, soft and oracle masks, what replaces a masked word, and how
masks are measured against the ground truth.

Functions on tensors. Masks are boolean, True = masked; soft masks lie in [0, 1]. Every draw takes a generator on the
tensors' device.

Letters: B batch, L text tokens, N image tokens (CLS, then the P patches), h heads, D width, V vocabulary, M masked
tokens or patches, P′ visible patches, X tokens or patches. The suffix _m marks what the momentum encoder computes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import VisionLanguageModel

# What may be masked. `maskable` (B, L) gives each token the place of its word's first piece, counted from 1, or 0 where
# the token must stay. Tokens with the same number are one word, masked together:
#
#     token   [CLS]  a  ##b  c  [SEP]
#     place     1    2   3   4    5
#     maskable  0    2   2   4    0


def maskable_words(token_ids: Tensor, is_caption: Tensor, continues: Tensor, informative: Tensor) -> Tensor:
    """Number the words that may be masked. -> `maskable` (B, L): the place of the token's word, or 0

    Our choice: words are chosen whole, since one piece gives the others away; and only words with an informative piece.
    token_ids (B, L) · is_caption (B, L) bool: tokens of the caption itself
    continues (V,) bool: pieces of the vocabulary that continue a word
    informative (V,) bool: pieces with a letter or digit that are not in too many captions (`data.informative_pieces`)
    """
    place = torch.arange(1, token_ids.shape[1] + 1, device=token_ids.device).expand_as(token_ids)
    first_place = place.masked_fill(continues[token_ids], 0).cummax(dim=1).values  # of the token's word, (B, L)
    informative_piece = (informative[token_ids] & is_caption).long()
    informative_word = torch.zeros_like(first_place).scatter_reduce(1, first_place - 1, informative_piece, "amax")
    is_maskable = is_caption & informative_word.gather(1, first_place - 1).bool()
    return first_place * is_maskable


def first_pieces(maskable: Tensor) -> Tensor:
    """Mark one token of each word, the first. (B, L) -> (B, L) bool."""
    return maskable == torch.arange(1, maskable.shape[1] + 1, device=maskable.device)


def word_counts(maskable: Tensor, ratio: float) -> Tensor:
    """Count the words of each row to mask: max(1, round(ratio · words)), 0 where there is no word. (B, L) -> (B, 1)"""
    total = first_pieces(maskable).sum(dim=1, keepdim=True)
    return (total * ratio).round().long().clamp(min=1).minimum(total)


def patch_count(patches: int, ratio: float) -> int:
    """Count the patches of an image to mask: round(ratio · patches), leaving one at least."""
    return min(round(ratio * patches), patches - 1)


def topk_mask(scores: Tensor, candidates: Tensor, counts: Tensor | int) -> Tensor:
    """Mask the `counts` (B, 1) highest-scoring `candidates` (B, X) of each row of `scores` (B, X). -> (B, X)"""
    scores = scores.masked_fill(~candidates, float("-inf"))
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
    return (rank < counts) & candidates


def mask_words(scores: Tensor, maskable: Tensor, ratio: float) -> Tensor:
    """Mask the words whose first pieces score highest, with all of their pieces; exact counts. (B, L) -> (B, L)"""
    masked_first = topk_mask(scores, first_pieces(maskable), word_counts(maskable, ratio))
    masked_word = masked_first.gather(1, (maskable - 1).clamp(min=0))
    return masked_word & (maskable > 0)


def mask_patches(scores: Tensor, ratio: float) -> Tensor:
    """Mask the patches that score highest; exact counts. (B, P) -> (B, P)"""
    every_patch = torch.ones_like(scores, dtype=torch.bool)
    return topk_mask(scores, every_patch, patch_count(scores.shape[1], ratio))


def gather_masked(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Gather the tokens where a mask (B, L) is True from some tensors (B, L, …), as x[mask] does. -> (M, …) each

    The CPU waits only once for the GPU to count them, and not again in the backward pass.
    """
    masked = mask.flatten().nonzero().squeeze(1)
    return [x.flatten(0, 1).index_select(0, masked) for x in tensors]


# Random masks


def random_word_mask(maskable: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Mask words of each row, drawn uniformly, as many as `word_counts` says. (B, L) -> (B, L)"""
    scores = torch.rand(maskable.shape, device=maskable.device, generator=generator)
    return mask_words(scores, maskable, ratio)


def random_patch_mask(
    rows: int,
    patches: int,
    ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Mask patches of each image, drawn uniformly, as many as `patch_count` says. -> (rows, patches)"""
    scores = torch.rand(rows, patches, device=device, generator=generator)
    return mask_patches(scores, ratio)


def split_patches(patch_mask: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """List the indices of the patches that a mask (B, P) leaves, and of those that it masks. -> (B, P′), (B, M)

    ratio: the share that the mask was made with. Sorting, unlike nonzero(), does not make the CPU wait for the GPU.
    """
    patches = patch_mask.shape[1]
    kept = patches - patch_count(patches, ratio)
    kept_first = patch_mask.byte().argsort(dim=1, stable=True)
    return kept_first[:, :kept], kept_first[:, kept:]


# Synchronized masks: a score ranks the words, and the attention of the chosen words ranks the patches


@torch.no_grad()
def score_masked_words(
    momentum: VisionLanguageModel,
    batch: dict,
    image_kv_m: list[Tensor],
    masked: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor]:
    """Score words while they are masked, by how much the image helps to predict them (our choice).

    score_w = log p(w | own image, c) − log p(w | another image, c)
    w is a token of a masked word, c the caption in which this word and others are masked. A word is ranked by the score
    of its first token (`mask_words`).
    The attention is read in this pass, too, since only a masked word has to attend to the image.

    batch: token_ids, attention_mask (B, L) · image_kv_m: by `FusionEncoder.project_image_kv` of the momentum encoder
    masked (B, L) bool: the words to score
    -> attention (B, L, P) of tokens to patches; scores (B, L), −∞ where not masked
    """
    ids, attention_mask = batch["token_ids"], batch["attention_mask"]
    text_embeds_m = momentum.text(ids.masked_fill(masked, mask_id), attention_mask)  # (B, L, D)
    own = torch.arange(len(ids), device=ids.device)
    another = own.roll(len(own) // 2)  # far away in the batch, since neighbours are similar in grouped batches
    fused_m, attentions = momentum.fusion(text_embeds_m, attention_mask, image_kv_m, return_attention=True)
    fused_other_m = momentum.fusion(text_embeds_m, attention_mask, image_kv_m, image_index=another)

    tokens, tokens_other, labels = gather_masked(masked, fused_m, fused_other_m, ids)  # (M, D), (M, D), (M,)
    log_p = -F.cross_entropy(momentum.mlm_logits(tokens).float(), labels, reduction="none")  # (M,)
    log_p_other = -F.cross_entropy(momentum.mlm_logits(tokens_other).float(), labels, reduction="none")
    scores = torch.full(ids.shape, -torch.inf, device=ids.device)
    scores = scores.masked_scatter(masked, log_p - log_p_other)
    return average_attention(attentions), scores


@torch.no_grad()
def score_clean_words(momentum: VisionLanguageModel, batch: dict, image_kv_m: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Score words by how concentrated their attention is in the unmasked pair: the plainest reading of SyncMask.

    batch, image_kv_m: as `score_masked_words` -> attention (B, L, P), scores (B, L)
    """
    text_embeds_m = momentum.text(batch["token_ids"], batch["attention_mask"])
    _, attentions = momentum.fusion(text_embeds_m, batch["attention_mask"], image_kv_m, return_attention=True)
    attention = average_attention(attentions)
    return attention, concentration(attention)


def average_attention(attentions: list[Tensor]) -> Tensor:
    """Average attention over heads (mean), then over layers (geometric mean, high only where all agree; our choice).

    attentions: one map (B, h, L, N) per layer, image CLS first -> (B, L, P), detached
    """
    layers = [attention.detach().float().mean(dim=1) for attention in attentions]  # (B, L, N) each
    log_mean = torch.stack(layers).clamp(min=1e-12).log().mean(dim=0)
    return log_mean.exp()[..., 1:]


def concentration(attention: Tensor) -> Tensor:
    """Score words by how concentrated their attention (B, L, P) is. -> (B, L)

    Our choice: the negative entropy over the patches, plus the logarithm of their total attention. The total is low
    where much attention falls on the image CLS, or where the layers disagree.

    Σ_p q log A[w, p] = −H(q) + log Σ_p A[w, p],   q = A[w, p] / Σ_p A[w, p]
    """
    attention = attention + 1e-12
    q = attention / attention.sum(dim=2, keepdim=True)
    return (q * attention.log()).sum(dim=2)


def sync_mask(
    attention: Tensor,
    scores: Tensor,
    maskable: Tensor,
    patch_ratio: float,
    word_ratio: float,
) -> tuple[Tensor, Tensor]:
    """Mask the words with the highest scores, and the patches that these words attend to most (SyncMask, Song et al.
    2024). How words (`score_masked_words`) and patches get their scores is our choice.

    score_p = Σ_w softmax(score)_w A[w, p], over the tokens w of the masked words
    So the attention of the best words counts most. With `score_masked_words`, exp(score) is a likelihood ratio: own
    image against another image.

    attention A (B, L, P), scores (B, L): of the words · maskable (B, L): words that may be masked
    patch_ratio, word_ratio: shares to mask
    -> patch mask (B, P), word mask (B, L), with the exact counts of the random masks
    """
    word_mask = mask_words(scores, maskable, word_ratio)
    lowest = torch.finfo(scores.dtype).min  # not −∞, whose softmax is NaN where no word is masked
    weights = scores.masked_fill(~word_mask, lowest).softmax(dim=1)  # (B, L)
    patch_scores = (weights[..., None] * attention).sum(dim=1)  # (B, P)
    return mask_patches(patch_scores, patch_ratio), word_mask


# Soft masks: cross-attention and its gradient -> how much each patch has to do with one word


def grad_cam(attention: Tensor, score: Tensor) -> Tensor:
    """Compute Grad-CAM of a score with respect to cross-attention (ALBEF's grounding): A · max(0, ∂s/∂A).

    score: a scalar, computed from attention (B, h, L, N); its graph is kept -> (B, h, L, N), detached
    """
    (gradient,) = torch.autograd.grad(score, attention, retain_graph=True)
    return (attention * gradient.clamp(min=0)).detach()


def middle_layer(layers: int) -> int:
    """Choose the fusion layer that soft masks read, counted from 0: the third of six, as ALBEF's grounding."""
    return (layers + 1) // 2 - 1


def itm_grad_cam(model: VisionLanguageModel, attentions: list[Tensor], fused: Tensor) -> Tensor:
    """Compute Grad-CAM of the ITM logit of "match" with respect to the cross-attention of the middle fusion layer.

    attentions: one map (B, h, L, N) per layer · fused (B, L, D): fused tokens of the pairs -> (B, h, L, N), detached
    """
    logits = model.itm_logits(fused)  # (B, 2), from [CLS]
    match_logits = logits[:, 1]
    attention = attentions[middle_layer(len(attentions))]
    return grad_cam(attention, match_logits.sum())  # pairs are independent, so one gradient serves all


def soft_mask(maps: Tensor, word_index: Tensor) -> Tensor:
    """Scale the Grad-CAM of one word to a soft mask (Park & Han 2023). -> M (B, P) in [0, 1]

    Our choice: the mean over heads and the normalisation.
    G_p = mean over heads of maps[word, p];   M = (G − min G) / (max G − min G + 1e-7)
    maps (B, h, L, N) by `grad_cam`, image CLS first · word_index (B,): the token of the word
    """
    rows = torch.arange(len(maps), device=maps.device)
    heat = maps.float()[rows, :, word_index, 1:].mean(dim=1)  # (B, P)
    low = heat.amin(dim=1, keepdim=True)
    high = heat.amax(dim=1, keepdim=True)
    return (heat - low) / (high - low + 1e-7)


# Oracle masks: from the ground truth


def oracle_mask(
    regions: Tensor, maskable: Tensor, patch_ratio: float, word_ratio: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Make ideal synchronized masks from the ground truth of what an image shows.

    They mask a share of the words that the image shows, and the patches that show them. If these patches are too few,
    patches of other words are added, then random ones.
    regions (B, L, P) bool: where the image shows what a token names · maskable (B, L): what may be masked
    -> patch mask (B, P), exact counts; word mask (B, L), `word_ratio` of the visible words
    """
    visible_words = torch.where(regions.any(dim=2), maskable, 0)  # all pieces of a word have its region
    word_mask = random_word_mask(visible_words, word_ratio, generator)
    shows_masked = (regions & word_mask[..., None]).any(dim=1).float()  # (B, P)
    shows_any = (regions & (maskable > 0)[..., None]).any(dim=1).float()
    draws = torch.rand(shows_any.shape, device=regions.device, generator=generator)
    patch_mask = mask_patches(2 * shows_masked + shows_any + draws, patch_ratio)
    return patch_mask, word_mask


# What replaces a masked word


def corrupt_words(
    token_ids: Tensor,
    mask: Tensor,
    mask_id: int,
    replacement_ids: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply BERT's 80/10/10 rule (Devlin et al. 2019, §3.1): of the masked tokens 80 % become [MASK], 10 % a random
    one of `replacement_ids` (V',), 10 % stay.

    token_ids (B, L), mask (B, L) -> corrupted ids (B, L), labels (B, L) with −100 where not masked
    """
    labels = token_ids.masked_fill(~mask, -100)
    dice = torch.rand(token_ids.shape, device=token_ids.device, generator=generator)
    drawn = torch.randint(len(replacement_ids), token_ids.shape, device=token_ids.device, generator=generator)
    ids = token_ids.masked_fill(mask & (dice < 0.8), mask_id)
    return torch.where(mask & (dice >= 0.9), replacement_ids[drawn], ids), labels


def replace_words(
    token_ids: Tensor,
    maskable: Tensor,
    mask: Tensor,
    mask_id: int,
    replacement_ids: Tensor,
    swaps: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Corrupt words for replaced-token detection (after FashionSAP, Han et al. 2023), as `corrupt_words` does, but:

    of the masked tokens that are replaced, half become their antonym instead of a random word (our choice: without an
    antonym, the random word stays);
    each `maskable` (B, L) token that is not masked becomes its synonym with probability 0.15, if it has one (our
    choice: anywhere, not in one attribute's value alone). It does not count as replaced.

    swaps (2, V): the antonym and the synonym of each token id, −1 where there is none
    -> corrupted ids (B, L), MLM labels (B, L) with −100 where not masked, replaced (B, L) bool
    """
    ids, labels = corrupt_words(token_ids, mask, mask_id, replacement_ids, generator)
    replaced = mask & (ids != token_ids) & (ids != mask_id)
    antonym, synonym = swaps[:, token_ids]  # (B, L) each
    dice = torch.rand(token_ids.shape, device=token_ids.device, generator=generator)
    to_antonym = replaced & (dice < 0.5) & (antonym >= 0)
    to_synonym = (maskable > 0) & ~mask & (dice < 0.15) & (synonym >= 0)
    ids = torch.where(to_antonym, antonym, ids)
    ids = torch.where(to_synonym, synonym, ids)
    return ids, labels, replaced


# Measuring masks


def mask_precision(mask: Tensor, candidates: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Count how many of the masked `candidates` are `shared` by image and caption. All (B, X) -> hits, of how many

    Words: candidates name an attribute, shared ones name one that this image shows. Patches: all are candidates,
    shared ones lie on the region of an attribute that the caption names.
    """
    masked = mask & candidates
    return (masked & shared).sum(), masked.sum()


def pointing_game(attention: Tensor, regions: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Play the pointing game (Zhang et al. 2016): is the most attended patch of a word in the word's region?

    attention (B, L, P), regions (B, L, P), words (B, L) with a region
    -> hits, hits expected of a random patch, of how many words
    """
    most_attended = attention.argmax(dim=2, keepdim=True)
    hit = regions.gather(2, most_attended).squeeze(2)  # (B, L)
    by_chance = regions.float().mean(dim=2)
    return (hit & words).sum(), by_chance[words].sum(), words.sum()
