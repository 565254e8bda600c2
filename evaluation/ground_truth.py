"""What masks and negatives are worth, where the data set knows the ground truth: on synthetic images."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from data import word_regions
from engine.batches import batches_of, first_products
from engine.config import TrainConfig, grouping_of
from engine.run import Run, autocast
from evaluation.choice import choices
from evaluation.validation import draw_other
from losses import NegativeMode, pick_negatives, positive_pairs
from masking import mask_precision, pointing_game, random_patch_mask, random_word_mask, score_words, sync_mask
from readers.dataset import PairDataset
from readers.synthetic import Synthetic
from readers.wardrobe import COARSE
from sampler import SEARCH_SIZE, SamplerMode, chain

CHOICE_PRODUCTS = 120  # held-out products whose images choose between captions
PARTS = 3  # passes in which the words of a caption are masked, one after the other


class TokenLabels(NamedTuple):
    """What is known of a batch, token by token. Letters: B batch, L text tokens, P patches."""

    attribute: Tensor  # (B, L): names an attribute, visible in this image or not
    detail: Tensor  # (B, L): names a fine attribute, visible in this image or not
    visible: Tensor  # (B, L): names an attribute that this image shows
    regions: Tensor  # (B, L, P): where this image shows it; nowhere where it does not


def token_labels(batch: dict, grid: int) -> TokenLabels:
    """Label the tokens of a batch of a data set with `with_ground_truth`. Tokens of frames name no attribute."""
    kinds = batch["attribute_kinds"]
    regions = word_regions(batch, grid)
    return TokenLabels(kinds > 0, kinds > len(COARSE), regions.any(dim=2), regions)


def ground_truth_metrics(run: Run, train_set: PairDataset, val_set: PairDataset) -> dict[str, float]:
    """Measure masks, the choice between captions, and negatives, where both data sets know the ground truth."""
    if not (isinstance(train_set, Synthetic) and isinstance(val_set, Synthetic)):
        return {}
    return mask_metrics(run, val_set) | choices(run, val_set, CHOICE_PRODUCTS) | negative_metrics(run, train_set)


@torch.no_grad()
def mask_metrics(run: Run, dataset: Synthetic) -> dict[str, float]:
    """Measure synchronized masks of held-out images against what the images show, random masks, and the image gain.

    The masks are made as the config says, whether the run trains with them or not.
    """
    generator = torch.Generator(run.device).manual_seed(run.config.seed)
    run.model.eval()
    dataset.with_ground_truth = True
    hits, totals = Counter(), Counter()
    for batch in batches_of(run, first_products(dataset, run.config.val_products), "masks against the truth"):
        for key, (hit, total) in count_mask_hits(run, batch, generator).items():
            hits[key] += hit.item()
            totals[key] += total.item()
    dataset.with_ground_truth = False
    return {key: hits[key] / max(1, totals[key]) for key in hits}


def count_mask_hits(run: Run, batch: dict, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """Count, for each metric of `mask_metrics`, the hits in a batch and how many there could be."""
    config, maskable = run.config, batch["maskable"]
    known = token_labels(batch, config.model.grid)
    attention, patch_mask, word_mask = synchronized_masks(run, batch, generator)
    random_patches = random_patch_mask(len(maskable), config.model.grid**2, config.mim_ratio, generator, run.device)
    random_words = random_word_mask(maskable, config.mlm_ratio, generator)
    named = known.regions.any(dim=1)  # (B, P): patches that show something that the caption names
    every_patch = torch.ones_like(named)
    hits, expected, total = pointing_game(attention, known.regions, known.visible & known.detail)

    gain = image_gain(run, batch, generator)
    shown = known.visible & (maskable > 0)
    fine = shown & known.detail
    coarse = shown & ~known.detail
    return {
        "patch_precision": mask_precision(patch_mask, every_patch, named),
        "word_precision": mask_precision(word_mask, known.attribute, known.visible),
        "patch_precision_random": mask_precision(random_patches, every_patch, named),
        "word_precision_random": mask_precision(random_words, known.attribute, known.visible),
        "image_gain": (gain[shown].sum(), shown.sum()),
        "image_gain_fine": (gain[fine].sum(), fine.sum()),
        "image_gain_coarse": (gain[coarse].sum(), coarse.sum()),
        "pointing_game": (hits, total),
        "pointing_game_random": (expected, total),
    }


def image_gain(run: Run, batch: dict, generator: torch.Generator) -> Tensor:
    """Mask every word once, together with 1 / PARTS of the others, and predict it from two images.

    -> (B, L): 1 where the prediction is right from its own image alone, −1 from that of another product alone, else 0
    """
    model, maskable = run.model, batch["maskable"]
    ids, attention_mask = batch["token_ids"], batch["attention_mask"]
    part_of = torch.randint(PARTS, maskable.shape, generator=generator, device=run.device)
    part_of = part_of.gather(1, (maskable - 1).clamp(min=0))  # all pieces of a word in the same
    other = draw_other(batch, generator).clamp(min=0)

    gain = torch.zeros_like(maskable)
    with autocast(run):
        image_kv = model.fusion.project_image_kv(model.vision(batch["images"]))
        for part in range(PARTS):
            masked = (maskable > 0) & (part_of == part)
            text_embeds = model.text(ids.masked_fill(masked, run.mask_id), attention_mask)
            fused = model.fusion(text_embeds, attention_mask, image_kv)
            fused_other = model.fusion(text_embeds, attention_mask, image_kv, image_index=other)
            hits = model.mlm_logits(fused[masked]).argmax(dim=1) == ids[masked]
            hits_other = model.mlm_logits(fused_other[masked]).argmax(dim=1) == ids[masked]
            gain[masked] = hits.long() - hits_other.long()
    return gain


@torch.no_grad()
def synchronized_masks(run: Run, batch: dict, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Make the synchronized masks that the config asks for. -> attention (B, L, P), patch mask (B, P), word mask (B, L)

    batch: as `batches_of` gives it, with normalised images
    """
    config, momentum = run.config, run.momentum.model
    with autocast(run):
        image_kv_m = momentum.fusion.project_image_kv(momentum.vision(batch["images"]))
        text_embeds_m = momentum.text(batch["token_ids"], batch["attention_mask"])
        attention, scores = score_words(
            momentum, batch, image_kv_m, text_embeds_m, run.mask_id, config.mask_source, generator
        )
    patch_mask, word_mask = sync_mask(
        attention, scores, batch["maskable"], config.mim_ratio, config.mlm_ratio, config.word_pool, generator
    )
    return attention, patch_mask, word_mask


def negative_metrics(run: Run, dataset: Synthetic) -> dict[str, float]:
    """Measure how many ITM negatives are false, over some search blocks of training images.

    Batches are grouped and negatives are chosen by the config's modes, at random, and hard. The random negatives that
    `itm_hard_ratio` mixes in do not count.
    """
    config = run.config
    generator = torch.Generator().manual_seed(config.seed)
    rows = np.random.default_rng(config.seed).permutation(len(dataset))[: 4 * SEARCH_SIZE]
    image_feat, text_feat = momentum_features(run, dataset, rows)
    modes = {"": (grouping_of(config), config.negatives), "_random": ("random", "random"), "_hard": ("hard", "hard")}
    metrics = {}
    for suffix, (grouping, picking) in modes.items():
        false = []
        for start in range(0, len(rows), SEARCH_SIZE):
            block = slice(start, start + SEARCH_SIZE)
            sim = image_feat[block] @ text_feat[block].T  # (M, M)
            groups = np.stack([dataset.product_ids[rows[block]], dataset.caption_ids[rows[block]]])
            for batch in grouped(sim, groups, grouping, config):
                false += false_negatives(run, dataset, rows[block][batch], sim[batch][:, batch], picking, generator)
        metrics[f"false_negative_rate{suffix}"] = float(np.mean(false)) if false else 0.0
    return metrics


@torch.no_grad()
def momentum_features(run: Run, dataset: PairDataset, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Encode some rows (n,) with the momentum model. -> image_feat, text_feat (n, E), on the CPU"""
    momentum = run.momentum.model
    image_feat, text_feat = [], []
    for batch in batches_of(run, Subset(dataset, rows.tolist()), "negatives against the truth"):
        with autocast(run):
            image_embeds = momentum.vision(batch["images"])
            text_embeds = momentum.text(batch["token_ids"], batch["attention_mask"])
            image_feat.append(momentum.project_image(image_embeds).cpu())
            text_feat.append(momentum.project_text(text_embeds).cpu())
    return torch.cat(image_feat), torch.cat(text_feat)


def grouped(sim: Tensor, groups: np.ndarray, grouping: SamplerMode, config: TrainConfig) -> list[np.ndarray]:
    """Divide a search block, sim (M, M), into batches as the sampler would. -> item numbers of each batch"""
    order = np.arange(len(sim))
    if grouping != "random":
        order = chain(sim.numpy(), groups, 0, config.batch_size, grouping, config.margin)
    return np.split(order, range(config.batch_size, len(order), config.batch_size))


def false_negatives(
    run: Run, dataset: Synthetic, rows: np.ndarray, sim: Tensor, picking: NegativeMode, generator: torch.Generator
) -> list[bool]:
    """Choose the negatives of a batch, some rows (B,), by its cosines, sim (B, B). -> of each: is it a false one?"""
    temp, margin = run.model.temp.item(), run.config.margin
    product_ids, caption_ids = dataset.product_ids[rows], dataset.caption_ids[rows]
    positives = positive_pairs(torch.from_numpy(product_ids), torch.from_numpy(caption_ids))
    own = torch.arange(len(rows))
    captions = pick_negatives(sim / temp, positives, picking, generator, margin / temp)
    images = pick_negatives(sim.T / temp, positives, picking, generator, margin / temp)
    images, captions = torch.cat([own, images]), torch.cat([captions, own])
    false = []
    for image, caption in zip(images.tolist(), captions.tolist(), strict=True):
        if min(image, caption) >= 0:  # −1 where there is none
            false.append(dataset.caption_matches(int(product_ids[caption]), int(rows[image])))
    return false
