"""Every mask: which words and which patches are hidden, how attention becomes a mask, what replaces a hidden word; and
how masks are measured against the truth.

Functions on tensors; one of them asks the momentum model. Masks are boolean, True = masked. `words` (B, L) says which
tokens may be masked, never [CLS], [SEP] or [PAD], and which of them are one word, masked together: see `which_words`.
Every draw takes a generator on the tensors' device.

Letters: B batch, L text tokens, N image tokens (CLS, then the P patches), h heads, V vocabulary.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model import VisionLanguageModel

MaskSource = Literal["masked", "clean"]


def mask_top(scores: Tensor, candidates: Tensor, counts: Tensor | int) -> Tensor:
    """The `counts` (B, 1) highest-scoring `candidates` (B, X) of each row of `scores` (B, X) -> mask (B, X)."""
    scores = scores.masked_fill(~candidates, float("-inf"))
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
    return (rank < counts) & candidates


def which_words(token_ids: Tensor, described: Tensor, continues: Tensor, telling: Tensor) -> Tensor:
    """The words that may be masked: of each token the place of its word's first piece, counted from 1; else 0. (B, L)

    choice: whole words, since a piece gives its siblings away, and only those with a piece that tells something:
    neither punctuation nor what stands in most descriptions, whatever the language.
    token_ids, described (B, L) part of a description · continues, telling (V,): what the vocabulary's pieces do
    """
    place = torch.arange(1, token_ids.shape[1] + 1, device=token_ids.device).expand_as(token_ids)
    start = place.masked_fill(continues[token_ids], 0).cummax(dim=1).values  # (B, L)
    tells = torch.zeros_like(start).scatter_reduce(1, start - 1, (telling[token_ids] & described).long(), "amax")
    return start * (described & tells.gather(1, start - 1).bool())


def first_pieces(words: Tensor) -> Tensor:
    """One token of each word. (B, L) -> (B, L) bool."""
    return words == torch.arange(1, words.shape[1] + 1, device=words.device)


def word_counts(words: Tensor, ratio: float) -> Tensor:
    """How many of the `words` (B, L) of each row to mask: max(1, round(ratio·words)), 0 where there are none. (B, 1)"""
    total = first_pieces(words).sum(dim=1, keepdim=True)
    return (total * ratio).round().long().clamp(min=1).minimum(total)


def mask_words(scores: Tensor, words: Tensor, ratio: float) -> Tensor:
    """The words of each row whose first pieces score highest, with all of their pieces; exact counts. -> (B, L)"""
    if words.dtype == torch.bool:  # every token a word of its own
        words = words * torch.arange(1, words.shape[1] + 1, device=words.device)
    first = mask_top(scores, first_pieces(words), word_counts(words, ratio))
    return first.gather(1, (words - 1).clamp(min=0)) & (words > 0)


def random_word_mask(words: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """A uniformly random share of the words of each row; exact counts (see `word_counts`). (B, L) -> (B, L)."""
    return mask_words(torch.rand(words.shape, device=words.device, generator=generator), words, ratio)


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


@torch.no_grad()
def clean_attention(
    momentum: VisionLanguageModel, batch: dict, image_kv: list[Tensor], text_embeds_m: Tensor
) -> list[Tensor]:
    """Compute the momentum encoder's cross-attention of the clean pair, the plainest reading of SyncMask.

    batch: attention_mask (B, L) · image_kv: by `FusionEncoder.project_image_kv` · text_embeds_m (B, L, D)
    -> one map (B, h, L, N) a fusion layer
    """
    _, attentions = momentum.fusion(text_embeds_m, batch["attention_mask"], image_kv, return_attention=True)
    return attentions


@torch.no_grad()
def masked_attention(
    momentum: VisionLanguageModel,
    batch: dict,
    image_kv: list[Tensor],
    mask_id: int,
    generator: torch.Generator | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Compute the momentum encoder's cross-attention of each word while the word is masked, and how well it is
    predicted (our choice). A word that is there needs not attend to the image; a masked word must. There are two
    passes, and each masks one random half of the words.

    log p(w | own image, rest of the caption),   log p(w | another image of the batch, rest of the caption)
    batch: token_ids, attention_mask, words (B, L) · image_kv: by `FusionEncoder.project_image_kv`
    -> one map (B, h, L, N) a fusion layer, log-probabilities (2, B, L)
    """
    ids, words = batch["token_ids"], batch["words"]
    first_half = random_word_mask(words, 0.5, generator)  # (B, L)
    second_half = (words > 0) & ~first_half
    masked = torch.cat([first_half, second_half])  # (2B, L)
    attention_mask = batch["attention_mask"].repeat(2, 1)
    text_embeds = momentum.text(ids.repeat(2, 1).masked_fill(masked, mask_id), attention_mask)  # (2B, L, D)

    own = torch.arange(len(ids), device=ids.device)
    other = own.roll(len(own) // 2)  # far off, since neighbours are alike in grouped batches
    fused, attentions = momentum.fusion(
        text_embeds, attention_mask, image_kv, image_index=own.repeat(2), return_attention=True
    )
    fused_other = momentum.fusion(text_embeds, attention_mask, image_kv, image_index=other.repeat(2))

    # of each word the row of the pass in which it was masked
    maps = []
    for attention in attentions:
        first_pass, second_pass = attention.chunk(2)  # (B, h, L, N) each
        maps.append(torch.where(first_half[:, None, :, None], first_pass, second_pass))
    log_p = []
    for tokens in (fused, fused_other):  # of all tokens: asking a GPU how many are words would make it wait
        first_pass, second_pass = tokens.chunk(2)
        logits = momentum.mlm_logits(torch.where(first_half[..., None], first_pass, second_pass))  # (B, L, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten(), reduction="none")
        log_p.append(-loss.view(ids.shape))
    return maps, torch.stack(log_p) * (words > 0)


@torch.no_grad()
def score_words(
    momentum: VisionLanguageModel,
    batch: dict,
    image_kv: list[Tensor],
    text_embeds_m: Tensor,
    mask_id: int,
    source: MaskSource,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute what `sync_mask` reads: the attention (B, L, P) of words to patches, and a score (B, L) of each word.

    source `masked`: a word scores by its image gain, log p(w | own image, rest) − log p(w | another image, rest)
    source `clean`: a word scores by how concentrated its attention is
    """
    if source == "clean":
        attention = average_attention(clean_attention(momentum, batch, image_kv, text_embeds_m))
        return attention, concentration(attention)
    attentions, log_p = masked_attention(momentum, batch, image_kv, mask_id, generator)
    return average_attention(attentions), log_p[0] - log_p[1]


def average_attention(attentions: list[Tensor]) -> Tensor:
    """What the layers agree on: the geometric mean over layers of the mean over heads, for the patches alone (choice).

    attentions: one map (B, h, L, N) a layer, image CLS first -> (B, L, P), detached
    """
    maps = torch.stack([attention.detach().float().mean(dim=1) for attention in attentions])  # (layers, B, L, N)
    return maps.clamp(min=1e-12).log().mean(dim=0).exp()[..., 1:]


def concentration(attention: Tensor) -> Tensor:
    """Scores of words by their attention (B, L, P), -> (B, L): the negative entropy over the patches, minus a penalty
    for attention that falls on no patch, but on the image CLS, or where layers do not agree (choice).

    Σ_p q log A[w, p] = −H(q) + log Σ_p A[w, p],   q = A[w, p] / Σ_p A[w, p]
    """
    attention = attention + 1e-12
    q = attention / attention.sum(dim=2, keepdim=True)
    return (q * attention.log()).sum(dim=2)


def sync_mask(
    attention: Tensor, scores: Tensor, words: Tensor, patch_ratio: float, word_ratio: float, pool: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Synchronized masks: the words with the highest scores, and the patches that these words attend to most (SyncMask,
    Song et al. 2024; how scores come out of the attention is our choice).

    attention (B, L, P), scores (B, L) of the words · words (B, L): which may be masked · patch_ratio, word_ratio:
    shares to mask · pool: share of the words, with the highest scores, of which the masked words are drawn; above
    word_ratio others are masked from epoch to epoch
    -> patch mask (B, P), word mask (B, L); exact counts, as the random masks'. CLS, [CLS], [SEP], [PAD] never.
    """
    best = mask_words(untied(scores, generator), words, max(pool, word_ratio))
    draws = torch.rand(best.shape, device=best.device, generator=generator)
    masked_words = mask_words(best + draws, words, word_ratio)
    # s_p = mean over masked words of A[w, p]
    total = masked_words.sum(dim=1, keepdim=True).clamp(min=1)
    patch_scores = (attention * masked_words[..., None]).sum(dim=1) / total  # (B, P)
    every_patch = torch.ones_like(patch_scores, dtype=torch.bool)
    count = patch_count(attention.shape[2], patch_ratio)
    return mask_top(untied(patch_scores, generator), every_patch, count), masked_words


def true_mask(
    regions: Tensor, words: Tensor, patch_ratio: float, word_ratio: float, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The masks that synchronized ones are meant to be, where it is known what a photo shows: a share of the words that
    it shows, and the patches that show them; where these are too few, other patches on what the text names, then any.

    regions (B, L, P): where the photo shows what a token names; nowhere if it does not · words (B, L) as elsewhere
    -> patch mask (B, P), exact counts; word mask (B, L), `word_ratio` of the visible words.
    """
    masked_words = random_word_mask(words * regions.any(dim=2), word_ratio, generator)
    on = lambda words: (regions & words[..., None]).any(dim=1).float()  # (B, P)
    draws = torch.rand(regions.shape[::2], device=regions.device, generator=generator)
    scores = 2 * on(masked_words) + on(words > 0) + draws
    everything = torch.ones_like(scores, dtype=torch.bool)
    return mask_top(scores, everything, patch_count(regions.shape[2], patch_ratio)), masked_words


def grad_cam(attention: Tensor, score: Tensor) -> Tensor:
    """Grad-CAM of the match logit with respect to cross-attention (ALBEF's grounding): A · max(0, ∂s/∂A).

    attention (B, h, L, N) in the graph of the score, a scalar; the graph is kept -> (B, h, L, N), detached
    """
    (gradient,) = torch.autograd.grad(score, attention, retain_graph=True)
    return (attention * gradient.clamp(min=0)).detach()


def middle_layer(layers: int) -> int:
    """The fusion layer that soft masks read, from 0 on: the third of six, as ALBEF's grounding (choice)."""
    return (layers + 1) // 2 - 1


def soft_mask(maps: Tensor, word_index: Tensor) -> Tensor:
    """How much each patch has to do with one word: what a soft mask suppresses (text-driven soft masks, Park & Han
    2023; the mean over heads and the normalisation are our choice).

    G = mean_h maps, in the row of the word, over the patches;   M = (G − min G) / (max G − min G + 1e-7)
    maps (B, h, L, N) by `grad_cam`, image CLS first; word_index (B,) -> (B, P) in [0, 1]
    """
    heat = maps.float()[torch.arange(len(maps), device=maps.device), :, word_index, 1:].mean(dim=1)  # (B, P)
    low, high = heat.amin(dim=1, keepdim=True), heat.amax(dim=1, keepdim=True)
    return (heat - low) / (high - low + 1e-7)


def untied(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    """Exact ties must not always fall to the first: with noise far below any real difference. (B, X) -> (B, X)."""
    floor = (1e-7 * scores.abs().amax(dim=1, keepdim=True)).clamp(min=1e-30)
    return scores + floor * torch.randn(scores.shape, device=scores.device, generator=generator)


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
    return torch.where((words > 0) & ~mask & (dice < 0.15) & (synonym >= 0), synonym, ids), labels, replaced
