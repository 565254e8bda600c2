"""Measures that need the ground truth of synthetic images: masks, image gain, choice of captions, false negatives.

Letters: B batch, L text tokens, P patches, M items of a search block, E embedding, n rows.
"""

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from data import word_regions
from engine.batches import evaluation_batches, images_of_first_products
from engine.config import TrainConfig, grouping_of, scored_share
from engine.run import Run, autocast
from evaluation.choice import choice_metrics
from evaluation.validation import draw_other_products
from losses import NegativeMode, pick_negatives, positive_pairs
from masking import (
    mask_precision,
    pointing_game,
    random_patch_mask,
    random_word_mask,
    score_clean_words,
    score_masked_words,
    sync_mask,
)
from readers.dataset import PairDataset
from readers.synthetic import Synthetic
from readers.wardrobe import COARSE
from sampler import SEARCH_SIZE, SamplerMode, chain

CHOICE_PRODUCTS = 120  # held-out products whose images are tested on foils
MASK_PASSES = 3  # passes of `image_gain`, each of which masks one part of the words
NEGATIVE_BLOCKS = 4  # search blocks in which false negatives are counted


class TokenLabels(NamedTuple):
    """The ground truth of a batch, token by token."""

    attribute: Tensor  # (B, L) bool: the token names an attribute, whether the image shows it or not
    fine: Tensor  # (B, L) bool: the token names a fine attribute, whether the image shows it or not
    visible: Tensor  # (B, L) bool: the token names an attribute that this image shows
    regions: Tensor  # (B, L, P) bool: the patches that show the token's attribute, none where it is not visible


def token_labels(batch: dict, grid: int) -> TokenLabels:
    """Label the tokens of a batch by the ground truth. Tokens of prompts name no attribute.

    batch: of a data set with `with_ground_truth`
    grid: patches along a side of the image
    """
    kinds = batch["attribute_kinds"]  # from 1 on, the coarse ones first
    regions = word_regions(batch, grid)
    return TokenLabels(attribute=kinds > 0, fine=kinds > len(COARSE), visible=regions.any(dim=2), regions=regions)


def ground_truth_metrics(run: Run, train_set: PairDataset, val_set: PairDataset) -> dict[str, float]:
    """Measure masks, the choice between captions, and negatives. -> {} where the data has no ground truth"""
    if not (isinstance(train_set, Synthetic) and isinstance(val_set, Synthetic)):
        return {}
    metrics = mask_metrics(run, val_set)
    metrics.update(choice_metrics(run, val_set, CHOICE_PRODUCTS))
    metrics.update(negative_metrics(run, train_set))
    return metrics


@torch.no_grad()
def mask_metrics(run: Run, dataset: Synthetic) -> dict[str, float]:
    """Measure synchronized masks of held-out images against the ground truth, beside random masks, and the image gain.

    The masks are made by the settings of the run, even if it does not train with them.
    Raises DataError where no image can be read.
    """
    generator = torch.Generator(run.device).manual_seed(run.config.seed)
    images = images_of_first_products(dataset, run.config.val_products)
    run.model.eval()
    dataset.with_ground_truth = True
    hits, totals = Counter(), Counter()
    for batch in evaluation_batches(run, images, "comparing masks with the ground truth"):
        for key, (batch_hits, batch_total) in count_mask_hits(run, batch, generator).items():
            hits[key] += batch_hits.item()
            totals[key] += batch_total.item()
    dataset.with_ground_truth = False
    return {key: hits[key] / max(1, totals[key]) for key in hits}


def count_mask_hits(run: Run, batch: dict, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """Count the hits in a batch for each metric of `mask_metrics`. -> key -> hits, and the largest possible number"""
    config, maskable = run.config, batch["maskable"]
    labels = token_labels(batch, config.model.grid)
    attention, patch_mask, word_mask = synchronized_masks(run, batch, generator)
    random_patches = random_patch_mask(len(maskable), config.model.grid**2, config.mim_ratio, generator, run.device)
    random_words = random_word_mask(maskable, config.mlm_ratio, generator)
    described = labels.regions.any(dim=1)  # (B, P): patches that show something that the caption names
    all_patches = torch.ones_like(described)
    hits, random_hits, total = pointing_game(attention, labels.regions, labels.visible & labels.fine)

    gain = image_gain(run, batch, generator)
    visible = labels.visible & (maskable > 0)
    fine = visible & labels.fine
    coarse = visible & ~labels.fine
    return {
        "patch_precision": mask_precision(patch_mask, all_patches, described),
        "word_precision": mask_precision(word_mask, labels.attribute, labels.visible),
        "patch_precision_random": mask_precision(random_patches, all_patches, described),
        "word_precision_random": mask_precision(random_words, labels.attribute, labels.visible),
        "image_gain": (gain[visible].sum(), visible.sum()),
        "image_gain_fine": (gain[fine].sum(), fine.sum()),
        "image_gain_coarse": (gain[coarse].sum(), coarse.sum()),
        "pointing_game": (hits, total),
        "pointing_game_random": (random_hits, total),
    }


def image_gain(run: Run, batch: dict, generator: torch.Generator) -> Tensor:
    """Predict every word of a batch with its own image and with another product's image.

    Each of MASK_PASSES passes masks its part of the words, so every word is masked once.
    -> (B, L): 1 where only the prediction with the own image is right, −1 where only the other one is, else 0
    """
    model, maskable = run.model, batch["maskable"]
    ids, attention_mask = batch["token_ids"], batch["attention_mask"]
    pass_of = torch.randint(MASK_PASSES, maskable.shape, generator=generator, device=run.device)
    pass_of = pass_of.gather(
        1, (maskable - 1).clamp(min=0)
    )  # all pieces of a word are masked in its first piece's pass
    other = draw_other_products(batch, generator).clamp(min=0)

    gain = torch.zeros_like(maskable)
    with autocast(run):
        image_kv = model.fusion.project_image_kv(model.vision(batch["images"]))
        for number in range(MASK_PASSES):
            masked = (maskable > 0) & (pass_of == number)
            text_embeds = model.text(ids.masked_fill(masked, run.mask_id), attention_mask)
            fused = model.fusion(text_embeds, attention_mask, image_kv)
            fused_other = model.fusion(text_embeds, attention_mask, image_kv, image_index=other)
            hits = model.mlm_logits(fused[masked]).argmax(dim=1) == ids[masked]
            hits_other = model.mlm_logits(fused_other[masked]).argmax(dim=1) == ids[masked]
            gain[masked] = hits.long() - hits_other.long()
    return gain


@torch.no_grad()
def synchronized_masks(run: Run, batch: dict, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Make synchronized masks by the settings of the run, from the momentum encoder.

    batch: from `evaluation_batches`, with normalised images
    -> attention (B, L, P) of tokens to patches; patch mask (B, P), word mask (B, L)
    """
    config, momentum, maskable = run.config, run.momentum.model, batch["maskable"]
    with autocast(run):
        image_kv_m = momentum.fusion.project_image_kv(momentum.vision(batch["images"]))
        if config.mask_source == "clean":
            attention, scores = score_clean_words(momentum, batch, image_kv_m)
        else:
            scored = random_word_mask(maskable, scored_share(config), generator)
            # a second pass masks the other words, so that attention is of each word while it is masked
            others = (maskable > 0) & ~scored
            attention, scores = score_masked_words(momentum, batch, image_kv_m, scored, run.mask_id)
            attention_others, _ = score_masked_words(momentum, batch, image_kv_m, others, run.mask_id)
            attention = torch.where(others[..., None], attention_others, attention)
    patch_mask, word_mask = sync_mask(attention, scores, maskable, config.mim_ratio, config.mlm_ratio)
    return attention, patch_mask, word_mask


def negative_metrics(run: Run, dataset: Synthetic) -> dict[str, float]:
    """Measure the share of ITM negatives that are false, over some search blocks of training images.

    The random negatives that `itm_hard_ratio` mixes in do not count.
    -> false_negative_rate by the settings of the run; keys with _random are for random batches and negatives, keys with
    _hard for hard ones
    Raises DataError where no image can be read.
    """
    config = run.config
    generator = torch.Generator().manual_seed(config.seed)
    rows = np.random.default_rng(config.seed).permutation(len(dataset))[: NEGATIVE_BLOCKS * SEARCH_SIZE]
    image_feat, text_feat = momentum_features(run, dataset, rows)
    modes = {  # suffix of the key -> how batches are grouped, how negatives are chosen
        "": (grouping_of(config), config.negatives),
        "_random": ("random", "random"),
        "_hard": ("hard", "hard"),
    }
    metrics = {}
    for suffix, (grouping, negatives) in modes.items():
        is_false = []
        for start in range(0, len(rows), SEARCH_SIZE):
            block_rows = rows[start : start + SEARCH_SIZE]
            sim = image_feat[start : start + SEARCH_SIZE] @ text_feat[start : start + SEARCH_SIZE].T  # (M, M)
            ids = np.stack([dataset.product_ids[block_rows], dataset.caption_ids[block_rows]])
            for items in split_block_into_batches(sim, ids, grouping, config):
                batch_sim = sim[items][:, items]
                is_false += judge_negatives(run, dataset, block_rows[items], batch_sim, negatives, generator)
        metrics[f"false_negative_rate{suffix}"] = float(np.mean(is_false)) if is_false else 0.0
    return metrics


@torch.no_grad()
def momentum_features(run: Run, dataset: PairDataset, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Encode some pairs with the momentum encoder.

    rows: (n,)
    -> image_feat (n, E), text_feat (n, E), both on the CPU
    Raises DataError where no image can be read.
    """
    momentum = run.momentum.model
    image_feat, text_feat = [], []
    for batch in evaluation_batches(run, Subset(dataset, rows.tolist()), "comparing negatives with the ground truth"):
        with autocast(run):
            image_embeds = momentum.vision(batch["images"])
            text_embeds = momentum.text(batch["token_ids"], batch["attention_mask"])
            image_feat.append(momentum.project_image(image_embeds).cpu())
            text_feat.append(momentum.project_text(text_embeds).cpu())
    return torch.cat(image_feat), torch.cat(text_feat)


def split_block_into_batches(
    sim: Tensor, ids: np.ndarray, grouping: SamplerMode, config: TrainConfig
) -> list[np.ndarray]:
    """Split a search block into batches, as the sampler does.

    sim: cosines of images and captions (M, M)
    ids: of products and captions (2, M)
    grouping: how similar items come together
    config: for the batch size and the margin
    -> the item numbers of each batch
    """
    order = np.arange(len(sim))
    if grouping != "random":
        order = chain(sim.numpy(), ids, 0, config.batch_size, grouping, config.margin)
    return np.split(order, range(config.batch_size, len(order), config.batch_size))


def judge_negatives(
    run: Run,
    dataset: Synthetic,
    rows: np.ndarray,
    sim: Tensor,
    negatives: NegativeMode,
    generator: torch.Generator,
) -> list[bool]:
    """Choose the ITM negatives of a batch, and mark those that are false by the ground truth.

    rows: the batch (B,)
    sim: cosines of its images and captions (B, B)
    negatives: how negatives are chosen
    -> for each negative, whether it is false: its caption in fact describes its image
    """
    temp, margin = run.model.temp.item(), run.config.margin
    product_ids, caption_ids = dataset.product_ids[rows], dataset.caption_ids[rows]
    positives = positive_pairs(torch.from_numpy(product_ids), torch.from_numpy(caption_ids))
    own = torch.arange(len(rows))
    wrong_captions = pick_negatives(sim / temp, positives, negatives, generator, margin / temp)
    wrong_images = pick_negatives(sim.T / temp, positives, negatives, generator, margin / temp)
    images = torch.cat([own, wrong_images])
    captions = torch.cat([wrong_captions, own])
    is_false = []
    for image, caption in zip(images.tolist(), captions.tolist(), strict=True):
        if min(image, caption) >= 0:  # −1 where there is none
            is_false.append(dataset.caption_matches(int(product_ids[caption]), int(rows[image])))
    return is_false
