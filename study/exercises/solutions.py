"""One solution each of exercises 9 and 10; those of 1 to 8 are the project's own functions."""

import torch
from torch import Tensor

from harness.run import Run
from harness.wiring import Teacher
from masking import hidden_words, mask_words, random_patch_mask, random_word_mask
from study.sources import predictions


@torch.no_grad()
def word_score(run: Run, batch: dict, generator: torch.Generator) -> Tensor:
    """Scores of words by which they are masked: the higher, the sooner. -> (B, L), finite

    run: a trained run, of which run.momentum and run.worth are of use
    batch: images (B, 3, H, W) uint8, token_ids, attention_mask, words (B, L), product_ids, caption_ids (B,); neither
    regions nor kinds, the truth
    """
    count, gain = run.worth.sums[:2]
    usual = (gain / count.clamp(min=1e-6))[batch["token_ids"]]  # what photos add to this token: which words to mask
    here = predictions(run, batch, generator)["gain over the average photo"]  # what this one adds: on which photos
    return usual + 0.01 * here.clamp(-3, 3)


def choose_masks(run: Run, batch: dict, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Which patches (B, P) and which words (B, L) of a training batch are hidden: the recipe `syncmask` with it in the
    place of `train.choose_masks`. Draws by run.generator; exact counts: config.mim_ratio of the patches,
    config.mlm_ratio of the words.

    batch: as `word_score`'s, images normalised · teacher: the clean pair as the momentum model sees it
    """
    config, words, where = run.config, batch["words"], dict(generator=run.generator, device=run.device)
    patch_mask = random_patch_mask(len(words), config.model.grid**2, config.mim_ratio, **where)
    answers = hidden_words(run.momentum, batch, teacher.photos, run.mask_id, run.generator, answers=True)[1]
    run.worth.update(batch["token_ids"], words, answers, run.ranks.sum)
    if run.step < config.mask_warmup:
        return patch_mask, random_word_mask(words, config.mlm_ratio, run.generator)
    # at random among the better half by what photos usually add to the token: no photo is asked what it shows
    count, gain = run.worth.sums[:2]
    telling = mask_words((gain / count.clamp(min=1e-6))[batch["token_ids"]], words, 0.5)
    draws = torch.rand(words.shape, **where)
    return patch_mask, mask_words(telling + draws, words, config.mlm_ratio)
