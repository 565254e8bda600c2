"""Every mask: which words and which patches are hidden, and what a hidden word is replaced by.

Pure functions on tensors. Masks are boolean, True = masked. `words` (B, L) marks the tokens that may be
masked at all: neither [CLS], [SEP] nor [PAD]. Every draw takes a generator on the tensors' device.

Letters: B batch, L text tokens, P patches, V vocabulary.
"""

import torch
from torch import Tensor


def mask_top(scores: Tensor, candidates: Tensor, counts: Tensor) -> Tensor:
    """The `counts` (B,) highest-scoring `candidates` (B, X) of each row of `scores` (B, X) -> mask (B, X)."""
    scores = scores.masked_fill(~candidates, float("-inf"))
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
    return (rank < counts[:, None]) & candidates


def word_counts(words: Tensor, ratio: float) -> Tensor:
    """How many of the `words` (B, L) of each row to mask: max(1, round(ratio·words)), 0 where there are none."""
    total = words.sum(dim=1)
    return (total * ratio).round().long().clamp(min=1).minimum(total)


def random_word_mask(words: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """A uniformly random share of the words of each row; exact counts (see `word_counts`). (B, L) -> (B, L)."""
    scores = torch.rand(words.shape, device=words.device, generator=generator)
    return mask_top(scores, words, word_counts(words, ratio))


def corrupt_words(
    token_ids: Tensor,
    mask: Tensor,
    mask_id: int,
    word_ids: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """BERT's 80/10/10 rule (Devlin et al. 2019, §3.1): of the masked tokens 80 % become [MASK], 10 % a random
    one of `word_ids` (V',), 10 % stay.

    token_ids (B, L), mask (B, L) -> corrupted ids (B, L), labels (B, L) with −100 where not masked.
    """
    labels = token_ids.masked_fill(~mask, -100)
    dice = torch.rand(token_ids.shape, device=token_ids.device, generator=generator)
    drawn = torch.randint(len(word_ids), token_ids.shape, device=token_ids.device, generator=generator)
    ids = token_ids.masked_fill(mask & (dice < 0.8), mask_id)
    return torch.where(mask & (dice >= 0.9), word_ids[drawn], ids), labels
