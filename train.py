"""Pretraining. Each method is one function here, its recipe. RECIPE_DEFAULTS in engine/config.py has its settings that
differ from the preset.

    python train.py                                            tiny model, synthetic images, a laptop
    python train.py --data fashiongen --root DIR               base model, FashionGen's files, a GPU
    python train.py --data jsonl --root DIR --preset tiny      one's own photos
    torchrun --nproc-per-node N train.py …                     N GPUs: see engine/distributed.py

What a run leaves in --out: config.json, metrics.jsonl (its keys: docs/glossary.md), curves.png, masks.png, last.pt.

Letters: B batch, N image tokens (CLS, then P patches), L text tokens, D width, E shared embedding, K contrastive keys,
V vocabulary, M masked tokens or patches, P′ visible patches, p side of a patch in pixels. ids are token ids; ids_keep
and ids_masked are patch indices, as in MAE.
The suffix _m marks what the momentum encoder computes.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import build_dataset, informative_pieces, word_regions
from engine.batches import augmented, endless_batches, learn_vocabulary, report_truncated_captions
from engine.checkpoints import begin, read_tokenizer, restore, save_checkpoint
from engine.config import (
    MAX_GRAD_NORM,
    TrainConfig,
    check_flags,
    ema_decay,
    grouping_of,
    itm_hard_share,
    learning_rate,
    parse_config,
    scored_share,
)
from engine.distributed import any_process, average, gather, is_main_process, join_processes, rank, union, world_size
from engine.flags import ConfigError, in_one_line
from engine.log import peak_memory_mib, read_metrics, stop_signals, trim_metrics, write_metrics, write_text
from engine.run import Run, autocast, build_run, build_sampler
from engine.weights import load_pretrained
from evaluation.ground_truth import ground_truth_metrics
from evaluation.pictures import draw_curves, draw_masks, first_images
from evaluation.validation import metrics_table, validate
from losses import (
    accuracy,
    alignment_loss,
    cross_entropy,
    itc_loss,
    itc_targets,
    itm_loss,
    mim_loss,
    mlm_loss,
    pick_negatives,
    positive_pairs,
)
from masking import (
    corrupt_words,
    gather_masked,
    itm_grad_cam,
    oracle_mask,
    random_patch_mask,
    random_word_mask,
    replace_words,
    score_clean_words,
    score_masked_words,
    soft_mask,
    split_patches,
    sync_mask,
)
from readers.dataset import DataError, PairDataset
from readers.prompts import CAPTION_PREFIX

Values = dict[str, Tensor]  # scalars by name: the losses of a step, or metrics of a step


# --- recipes: what a method encodes, masks, pairs and fuses ---


def albef(run: Run, batch: dict) -> tuple[Values, Values]:
    """ALBEF (Li et al. 2021): ITC + ITM + MLM with momentum soft targets. -> losses, metrics"""
    model, ids, attention_mask = run.model, batch["token_ids"], batch["attention_mask"]
    image_embeds_m, image_feat_m, text_feat_m = encode_momentum(run, batch)

    # mask: random words
    word_mask = random_word_mask(batch["maskable"], run.config.mlm_ratio, run.generator)
    corrupted_ids, mlm_labels = corrupt_words(ids, word_mask, run.mask_id, run.replacement_ids, run.generator)

    # encode: captions and masked captions in one call
    image_embeds = model.vision(batch["images"])  # (B, N, D)
    both_ids, both_attention_mask = torch.cat([ids, corrupted_ids]), torch.cat([attention_mask, attention_mask])
    text_embeds, masked_embeds = model.text(both_ids, both_attention_mask).chunk(2)  # (B, L, D) each

    # ITC
    image_feat, text_feat = model.project_image(image_embeds), model.project_text(text_embeds)  # (B, E)
    itc, sim_i2t, sim_t2i = compute_itc(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

    # ITM: images with a wrong caption, captions with a wrong image, own pairs; the head reads [CLS] alone
    wrong_caption, wrong_image, itm_labels = sample_itm_negatives(run, batch, sim_i2t, sim_t2i)
    image_kv = model.fusion.project_image_kv(image_embeds)
    own = torch.arange(len(ids), device=run.device)
    pair_text_index = torch.cat([wrong_caption, own, own])
    pair_image_index = torch.cat([own, wrong_image, own])
    fused_cls = model.fusion(text_embeds, attention_mask, image_kv, pair_image_index, pair_text_index, cls_only=True)
    itm, itm_accuracy = compute_itm(run, fused_cls, itm_labels)

    # MLM: masked captions with their images
    fused = model.fusion(masked_embeds, attention_mask, image_kv)  # (B, L, D)
    fused_m = fuse_momentum(run, corrupted_ids, attention_mask, image_embeds_m)
    mlm, mlm_accuracy = compute_mlm(run, fused, mlm_labels, fused_m)

    losses = {"itc": run.config.itc_weight * itc, "itm": itm, "mlm": mlm}
    return losses, {"itm_batch_accuracy": itm_accuracy, "mlm_accuracy": mlm_accuracy}


def syncmask(run: Run, batch: dict) -> tuple[Values, Values]:
    """SyncMask (Song et al. 2024): ITC + ITM + MLM + MIM with synchronized masks; semi-hard negatives from batches of
    similar pairs (grouped batches, GRIT-VLP; both by `negatives="semihard"` in RECIPE_DEFAULTS). -> losses, metrics

    The recipe masks the words that the image helps most to predict (`masking.score_masked_words`), and the patches to
    which these words attend most (`masking.sync_mask`). Our choices: these scores; the MIM decoder reads the unmasked
    caption.
    """
    config, model, ids, attention_mask = run.config, run.model, batch["token_ids"], batch["attention_mask"]
    image_embeds_m, image_feat_m, text_feat_m = encode_momentum(run, batch)

    # mask: words and patches that the image and the caption have in common
    patch_mask, word_mask = choose_masks(run, batch, image_embeds_m)  # (B, P), (B, L)
    ids_keep, ids_masked = split_patches(patch_mask, config.mim_ratio)
    corrupted_ids, mlm_labels = corrupt_words(ids, word_mask, run.mask_id, run.replacement_ids, run.generator)

    # encode: captions and masked captions in one call; images whole, and their visible patches alone
    image_embeds = model.vision(batch["images"])  # (B, N, D)
    visible_embeds = model.vision(batch["images"], ids_keep)  # (B, 1 + P′, D)
    both_ids, both_attention_mask = torch.cat([ids, corrupted_ids]), torch.cat([attention_mask, attention_mask])
    text_embeds, masked_embeds = model.text(both_ids, both_attention_mask).chunk(2)  # (B, L, D) each

    # ITC
    image_feat, text_feat = model.project_image(image_embeds), model.project_text(text_embeds)  # (B, E)
    itc, sim_i2t, sim_t2i = compute_itc(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

    # ITM: images with a wrong caption, captions with a wrong image, own pairs; the head reads [CLS] alone
    wrong_caption, wrong_image, itm_labels = sample_itm_negatives(run, batch, sim_i2t, sim_t2i)
    image_kv = model.fusion.project_image_kv(image_embeds)
    own = torch.arange(len(ids), device=run.device)
    pair_text_index = torch.cat([wrong_caption, own, own])
    pair_image_index = torch.cat([own, wrong_image, own])
    fused_cls = model.fusion(text_embeds, attention_mask, image_kv, pair_image_index, pair_text_index, cls_only=True)
    itm, itm_accuracy = compute_itm(run, fused_cls, itm_labels)

    # MLM: masked captions with their unmasked images
    fused = model.fusion(masked_embeds, attention_mask, image_kv)  # (B, L, D)
    fused_m = fuse_momentum(run, corrupted_ids, attention_mask, image_embeds_m)
    mlm, mlm_accuracy = compute_mlm(run, fused, mlm_labels, fused_m)

    # MIM: masked images with their unmasked captions
    pixels = model.decoder(visible_embeds, ids_keep, ids_masked, text_embeds, attention_mask)  # (B, M, 3p²)
    mim = mim_loss(pixels, batch["images"], ids_masked)

    losses = {"itc": config.itc_weight * itc, "itm": itm, "mlm": mlm, "mim": config.mim_weight * mim}
    return losses, {"itm_batch_accuracy": itm_accuracy, "mlm_accuracy": mlm_accuracy}


def softmask(run: Run, batch: dict) -> tuple[Values, Values]:
    """Text-driven soft masks (Park & Han 2023): focal ITC + ITM with a soft-masked image as one more positive + MLM, on
    masked captions and distorted images. -> losses, metrics

    Our choice: with --mask-text, ITC, ITM and MLM read one encoding of the masked caption.
    """
    config, model, ids, attention_mask = run.config, run.model, batch["token_ids"], batch["attention_mask"]
    image_embeds_m, image_feat_m, text_feat_m = encode_momentum(run, batch)

    # mask: random words
    word_mask = random_word_mask(batch["maskable"], config.mlm_ratio, run.generator)
    corrupted_ids, mlm_labels = corrupt_words(ids, word_mask, run.mask_id, run.replacement_ids, run.generator)

    # encode: with --mask-text the masked caption serves all objectives; the keys of ITC are of the unmasked one
    image_embeds = model.vision(batch["images"])  # (B, N, D)
    masked_embeds = model.text(corrupted_ids, attention_mask)  # (B, L, D)
    text_embeds = masked_embeds if config.mask_text else model.text(ids, attention_mask)

    # ITC
    image_feat, text_feat = model.project_image(image_embeds), model.project_text(text_embeds)  # (B, E)
    itc, sim_i2t, sim_t2i = compute_itc(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

    # ITM: images with a wrong caption, captions with a wrong image, then soft-masked and own pairs, whose label is 1
    wrong_caption, wrong_image, itm_labels = sample_itm_negatives(run, batch, sim_i2t, sim_t2i)
    image_kv = model.fusion.project_image_kv(image_embeds)
    own = torch.arange(len(ids), device=run.device)
    pair_text_index = torch.cat([wrong_caption, own])
    pair_image_index = torch.cat([own, wrong_image])
    fused_cls = model.fusion(text_embeds, attention_mask, image_kv, pair_image_index, pair_text_index, cls_only=True)
    if config.soft_mask:
        # one more positive: the image with the patches of one word suppressed
        fused, attentions = model.fusion(text_embeds, attention_mask, image_kv, return_attention=True)
        words = batch["maskable"] > 0
        if config.mask_text:
            words = words & ~word_mask  # the attention of [MASK] is not this word's
        soft_embeds = apply_soft_mask(run, words, fused, attentions, image_embeds)
        soft_kv = model.fusion.project_image_kv(soft_embeds)
        soft_cls = model.fusion(text_embeds, attention_mask, soft_kv, cls_only=True)
        fused_cls = torch.cat([fused_cls, soft_cls])
        itm_labels = torch.cat([itm_labels, torch.ones_like(own)])
    else:
        fused = model.fusion(text_embeds, attention_mask, image_kv)
    fused_cls = torch.cat([fused_cls, fused[:, :1]])  # soft-masked and own pairs are all positives, in any order
    itm, itm_accuracy = compute_itm(run, fused_cls, itm_labels)

    # MLM: from the fused tokens of ITM if the caption was masked there
    if not config.mask_text:
        fused = model.fusion(masked_embeds, attention_mask, image_kv)  # (B, L, D)
    fused_m = fuse_momentum(run, corrupted_ids, attention_mask, image_embeds_m)
    mlm, mlm_accuracy = compute_mlm(run, fused, mlm_labels, fused_m)

    losses = {"itc": config.itc_weight * itc, "itm": itm, "mlm": mlm}
    return losses, {"itm_batch_accuracy": itm_accuracy, "mlm_accuracy": mlm_accuracy}


def fashionfine(run: Run, batch: dict) -> tuple[Values, Values]:
    """Fashion-FINE (Jin et al. 2024): focal ITC (HNM-F) on features with local tokens (MAA) + ITM + C-CmA + MLM + RTD.
    -> losses, metrics

    Local tokens are patches or words, pooled and mixed into the [CLS] feature; the momentum encoder's features have
    none. C-CmA aligns one more text feature with the image, a mixture of the category symbol, such as [shoes], and of
    phrases. RTD detects replaced tokens. As in the authors' code, all objectives read one caption, some of whose words
    are masked and some replaced, and MLM has no soft targets. Our choices: the momentum encoder reads the clean
    caption; the weight of C-CmA is ramped up.
    """
    config, model, ids, attention_mask = run.config, run.model, batch["token_ids"], batch["attention_mask"]
    image_embeds_m, image_feat_m, text_feat_m = encode_momentum(run, batch)

    # mask: random words, of which some are replaced
    word_mask = random_word_mask(batch["maskable"], config.mlm_ratio, run.generator)
    corrupted_ids, mlm_labels, replaced = replace_words(
        ids, batch["maskable"], word_mask, run.mask_id, run.replacement_ids, run.swaps, run.generator
    )

    # encode: one caption serves all objectives
    image_embeds = model.vision(batch["images"])  # (B, N, D)
    text_embeds = model.text(corrupted_ids, attention_mask)  # (B, L, D)

    # ITC: features with local tokens (MAA) against momentum keys of [CLS] alone
    image_feat, text_feat = model.image_feature(image_embeds), model.text_feature(text_embeds, attention_mask)  # (B, E)
    itc, sim_i2t, sim_t2i = compute_itc(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

    # ITM: images with a wrong caption, captions with a wrong image, own pairs
    wrong_caption, wrong_image, itm_labels = sample_itm_negatives(run, batch, sim_i2t, sim_t2i)
    image_kv = model.fusion.project_image_kv(image_embeds)
    own = torch.arange(len(ids), device=run.device)
    pair_text_index = torch.cat([wrong_caption, own])
    pair_image_index = torch.cat([own, wrong_image])
    fused = model.fusion(text_embeds, attention_mask, image_kv)  # (B, L, D)
    fused_cls = model.fusion(text_embeds, attention_mask, image_kv, pair_image_index, pair_text_index, cls_only=True)
    itm, itm_accuracy = compute_itm(run, torch.cat([fused_cls, fused[:, :1]]), itm_labels)

    # MLM: from the same fused tokens
    mlm, mlm_accuracy = compute_mlm(run, fused, mlm_labels)

    losses = {"itc": config.itc_weight * itc, "itm": itm, "mlm": mlm}
    metrics = {"itm_batch_accuracy": itm_accuracy, "mlm_accuracy": mlm_accuracy}
    if config.model.alignment:
        # our choice: ramped up, since from random weights its full pull gathers all features in one point
        losses["align"] = run.ramp * alignment_loss(model.category_feature(text_embeds, attention_mask), image_feat)
    if config.model.detector:
        readable = batch["is_caption"] & (corrupted_ids != run.mask_id)  # (B, L)
        losses["rtd"], metrics["replaced_recall"] = compute_rtd(run, fused, readable, replaced)
    return losses, metrics


RECIPES: dict[str, Callable] = {"syncmask": syncmask, "softmask": softmask, "fashionfine": fashionfine, "albef": albef}


# --- what recipes share: the momentum encoder, the objectives, the choice of masks ---


@torch.no_grad()
def encode_momentum(run: Run, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Encode the unmasked pairs with the momentum encoder.

    -> image_embeds_m (B, N, D), image_feat_m (B, E), text_feat_m (B, E)
    """
    momentum = run.momentum.model
    image_embeds_m = momentum.vision(batch["images"])
    text_embeds_m = momentum.text(batch["token_ids"], batch["attention_mask"])
    return image_embeds_m, momentum.project_image(image_embeds_m), momentum.project_text(text_embeds_m)


@torch.no_grad()
def fuse_momentum(run: Run, corrupted_ids: Tensor, attention_mask: Tensor, image_embeds_m: Tensor) -> Tensor | None:
    """Fuse masked captions with their images in the momentum encoder, for the soft targets of MLM.

    -> (B, L, D), None without soft targets (alpha = 0)
    """
    if run.alpha == 0:
        return None
    momentum = run.momentum.model
    image_kv_m = momentum.fusion.project_image_kv(image_embeds_m)
    return momentum.fusion(momentum.text(corrupted_ids, attention_mask), attention_mask, image_kv_m)


def compute_itc(
    run: Run, batch: dict, image_feat: Tensor, text_feat: Tensor, image_feat_m: Tensor, text_feat_m: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ITC (ALBEF eq. 1, 2, 6): features (B, E) against momentum features of the batch and of the queue.

    The new keys then go into the queue. With hard or semi-hard negatives they also go to the sampler, which groups the
    next epoch by them.
    -> loss; sim_i2t, sim_t2i (B, B): logits of this process's images and captions
    """
    config, temp = run.config, run.model.temp
    keys = []
    new_keys = [gather(x) for x in (image_feat_m, text_feat_m, batch["product_ids"], batch["caption_ids"])]
    for new, old in zip(new_keys, run.queue, strict=True):
        keys.append(torch.cat([new, old]))
    image_keys, text_keys, key_products, key_captions = keys  # (K, E), (K, E), (K,), (K,)
    positives = positive_pairs(batch["product_ids"], batch["caption_ids"], key_products, key_captions)  # (B, K)
    # in full precision: at a temperature of 0.02, bf16 would round the logits to steps of a quarter
    with torch.autocast(run.device.type, enabled=False):
        sim_i2t, sim_t2i = image_feat @ text_keys.T / temp, text_feat @ image_keys.T / temp  # (B, K)
        with torch.no_grad():
            targets_i2t = itc_targets(positives, image_feat_m @ text_keys.T / temp, run.alpha)
            targets_t2i = itc_targets(positives, text_feat_m @ image_keys.T / temp, run.alpha)
        loss = itc_loss(sim_i2t, sim_t2i, targets_i2t, targets_t2i, config.focal_gamma)
    run.queue = [key[: config.queue_size] for key in keys]
    if run.sampler is not None and grouping_of(config) != "random":
        run.sampler.collect(gather(batch["rows"]), *new_keys[:2])
    first = rank() * len(image_feat)
    own = slice(first, first + len(image_feat))
    return loss, sim_i2t[:, own], sim_t2i[:, own]


def sample_itm_negatives(run: Run, batch: dict, sim_i2t: Tensor, sim_t2i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose for each image a wrong caption of the batch, and for each caption a wrong image.

    The choice follows --negatives with probability `itm_hard_share`; otherwise it is random.
    sim_i2t, sim_t2i (B, B): logits of this process's pairs
    -> wrong_caption (B,), wrong_image (B,)
    -> labels (3B,) of the pairs with wrong captions, with wrong images, and of the own pairs: 0 no match, 1 match,
       −100 where every other pair of the batch would match
    """
    config = run.config
    margin = config.margin / run.model.temp.detach()  # logits are cosines over the temperature
    positives = positive_pairs(batch["product_ids"], batch["caption_ids"])  # (B, B)
    negatives = []
    for sim in (sim_i2t, sim_t2i):
        chosen = pick_negatives(sim, positives, config.negatives, run.generator, margin)
        drawn = pick_negatives(sim, positives, "random", run.generator)
        dice = torch.rand(len(sim), device=run.device, generator=run.generator)
        negatives.append(torch.where(dice < itm_hard_share(run.step, config), chosen, drawn))
    wrong_caption, wrong_image = negatives
    impossible = torch.cat(negatives) < 0
    labels = torch.cat([torch.where(impossible, -100, 0), torch.ones_like(wrong_caption)])
    return wrong_caption.clamp(min=0), wrong_image.clamp(min=0), labels


def compute_itm(run: Run, fused_cls: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ITM (ALBEF eq. 4) of fused pairs (n, 1, D) with labels (n,). -> loss, accuracy"""
    logits = run.model.itm_logits(fused_cls)  # (n, 2)
    return itm_loss(logits, labels), accuracy(logits, labels)


def compute_mlm(run: Run, fused: Tensor, mlm_labels: Tensor, fused_m: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute MLM (ALBEF eq. 3, 7) from the fused tokens (B, L, D) of masked captions. -> loss, accuracy

    mlm_labels (B, L): −100 where not masked · fused_m (B, L, D): fused tokens of the momentum encoder, for soft targets
    """
    masked = mlm_labels != -100
    tokens, labels = gather_masked(masked, fused, mlm_labels)  # (M, D), (M,)
    logits, logits_m = run.model.mlm_logits(tokens), None  # (M, V)
    if fused_m is not None:
        (tokens_m,) = gather_masked(masked, fused_m)
        with torch.no_grad():
            logits_m = run.momentum.model.mlm_logits(tokens_m)
    return mlm_loss(logits, labels, logits_m, run.alpha), accuracy(logits, labels)


def compute_rtd(run: Run, fused: Tensor, readable: Tensor, replaced: Tensor) -> tuple[Tensor, Tensor]:
    """Compute replaced-token detection (Fashion-FINE) on fused tokens (B, L, D). -> loss, recall of the replaced words

    readable (B, L) bool: the tokens to classify, which are not [MASK] · replaced (B, L) bool: the replaced tokens
    """
    tokens, labels = gather_masked(readable, fused, replaced.long())
    logits = run.model.detector(tokens)  # (n, 2), n readable tokens
    of_replaced = labels.masked_fill(labels == 0, -100)
    return cross_entropy(logits, labels), accuracy(logits, of_replaced)


ORACLE_RATIO = 0.5  # our choice: oracle masks mask this share of the words that the image shows


def choose_masks(run: Run, batch: dict, image_embeds_m: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the masks of a batch by --patch-mask and --word-mask: random, synchronized or oracle.

    Each mode chooses words and patches together. If the flags differ, the patches of --patch-mask sync follow the words
    that sync would mask, although MLM masks others. A share of the pairs, --random-mask-prob, keeps random masks. For
    --mask-warmup steps random masks stand in for synchronized ones.
    -> patch mask (B, P), word mask (B, L)
    """
    config, generator = run.config, run.generator
    pairs = len(batch["maskable"])
    patch_mask = random_patch_mask(pairs, config.model.grid**2, config.mim_ratio, generator, run.device)
    word_mask = random_word_mask(batch["maskable"], config.mlm_ratio, generator)

    # masks are computed for the pairs of these rows alone
    shuffled = torch.randperm(pairs, generator=generator, device=run.device)
    rows = shuffled[round(config.random_mask_prob * pairs) :].sort().values  # (n,)
    part = {key: batch[key][rows] for key in ("token_ids", "attention_mask", "maskable")}
    modes = (config.patch_mask, config.word_mask)
    masks = {}
    if "oracle" in modes:
        regions = word_regions(batch, config.model.grid)[rows]
        masks["oracle"] = oracle_mask(regions, part["maskable"], config.mim_ratio, ORACLE_RATIO, generator)
    if "sync" in modes and run.step >= config.mask_warmup:
        momentum = run.momentum.model
        image_kv_m = momentum.fusion.project_image_kv(image_embeds_m[rows])
        if config.mask_source == "clean":
            attention, scores = score_clean_words(momentum, part, image_kv_m)
        else:
            scored = random_word_mask(part["maskable"], scored_share(config), generator)
            attention, scores = score_masked_words(momentum, part, image_kv_m, scored, run.mask_id)
        masks["sync"] = sync_mask(attention, scores, part["maskable"], config.mim_ratio, config.mlm_ratio)
    if config.patch_mask in masks:
        patch_mask[rows] = masks[config.patch_mask][0]
    if config.word_mask in masks:
        word_mask[rows] = masks[config.word_mask][1]
    return patch_mask, word_mask


def apply_soft_mask(run: Run, words: Tensor, fused: Tensor, attentions: list[Tensor], image_embeds: Tensor) -> Tensor:
    """Draw one of the tokens that `words` (B, L) marks, and suppress its patches: ṽ_p = (1 − M_p) · v_p; CLS stays.

    M_p is the token's soft mask (B, P). It is the Grad-CAM of the model in training, from its `fused` tokens and their
    attentions, one map per layer. A caption without such a token leaves its image unchanged.
    -> image_embeds (B, N, D)
    """
    maps = itm_grad_cam(run.model, attentions, fused)
    any_word = words.any(dim=1, keepdim=True)
    word = torch.multinomial((words | ~any_word).float(), 1, generator=run.generator).squeeze(1)
    mask = soft_mask(maps, word) * any_word  # (B, P)
    patches = image_embeds[:, 1:] * (1 - mask[..., None]).to(image_embeds.dtype)
    return torch.cat([image_embeds[:, :1], patches], dim=1)


# --- building a run, the loop, the command line ---


def train(config: TrainConfig, given: set[str] = frozenset(), stop_at: int | None = None) -> dict | None:
    """Train by `config`, or resume the run in --out. -> the final line of metrics; None after a signal or stop_at

    given: names of the fields whose flags were given · stop_at: save and stop after this step
    Under torchrun every process calls this. Raises ConfigError, DataError, NonFiniteLoss.
    """
    device = join_processes(config.device)
    config, state = begin(config, given, check_flags)
    settings = (config.model.image_size, config.seed, config.num_products)
    train_set = build_dataset(config.data, config.root, "train", *settings)
    val_set = build_dataset(config.data, config.root, "val", *settings)
    train_set.prompts = config.prompts
    if config.prompts:  # held-out captions as in the downstream tasks: prompts would give labels away
        val_set.caption_prefix = CAPTION_PREFIX
    train_set.with_ground_truth = "oracle" in (config.patch_mask, config.word_mask)
    print(f"train: {train_set.report()}\nval: {val_set.report()}")
    tokenizer = read_tokenizer(state) if state else learn_vocabulary(config, train_set)
    report_truncated_captions(train_set, tokenizer)

    run = build_run(config, train_set, tokenizer, device)
    run.sampler = build_sampler(run, train_set)
    if state:
        restore(run, state)
    else:
        run.informative = informative_pieces(tokenizer, train_set.captions)
    if config.weights and not run.step:
        report = load_pretrained(run.model, config.weights)
        if not config.vocab and report.kinds.keys() != {"ViT"}:
            raise ConfigError("--weights of text need --vocab: word embeddings belong to their vocabulary")
        print(report)
        run.momentum.update(run.model, decay=0)

    chance = {}  # the recalls of a random ranking

    def validate_run(run: Run) -> dict[str, float]:
        metrics, by_chance = validate(run, val_set)
        chance.update(by_chance)
        return metrics | ground_truth_metrics(run, train_set, val_set)

    print(f"{config.recipe}, {config.preset}")
    final = fit(run, train_set, RECIPES[config.recipe], validate_run, stop_at=stop_at)
    if final:
        print("\n".join(metrics_table(final, chance)))
    if is_main_process():
        draw_masks(run, val_set, first_images(val_set, 6), Path(config.out) / "masks.png")
    return final


def fit(
    run: Run,
    dataset: PairDataset,
    compute_losses: Callable[[Run, dict], tuple[Values, Values]],
    validate_run: Callable[[Run], dict[str, float]],
    select: str | None = None,
    patience: int = 0,
    stop_at: int | None = None,
) -> dict | None:
    """Train from run.step on: schedule → forward → backward → clip → step → EMA → log → validate → save.

    compute_losses: a recipe, or a task's losses · validate_run: metrics on held-out images
    select: the metric by which the best step is kept as best.pt · patience: stop after so many validations without
    a better one, 0: never · stop_at: save and stop after this step
    -> the final line of metrics.jsonl; None after a signal or stop_at. Raises NonFiniteLoss, DataError.
    """
    config, out = run.config, Path(run.config.out)
    size = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    machine = f"{run.device}, {world_size()} processes" if world_size() > 1 else run.device
    print(f"{size:.1f} M parameters, {run.total_steps} steps in {config.precision} on {machine}, into {out}/")
    if is_main_process():
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.json", json.dumps(asdict(config), indent=1) + "\n")
        trim_metrics(out / "metrics.jsonl", run.step)
    model = DistributedDataParallel(run.model, static_graph=True) if world_size() > 1 else run.model
    batches = endless_batches(run, dataset)
    images, seconds, stopping = 0, 0.0, False  # images and seconds since the last line of metrics
    reported = set(run.unreadable)  # unreadable images that were printed already
    bar = tqdm(total=run.total_steps, initial=run.step, unit=" steps", dynamic_ncols=True, smoothing=0.1)
    with bar, stop_signals(second_stops=world_size() == 1) as signals:
        while run.step < run.total_steps and not stopping and not stalled(run, patience):
            start = time.perf_counter()
            lr = learning_rate(run.step, config, run.total_steps)
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            run.seed_step()
            batch = next(batches)

            with autocast(run):  # model(f, …) calls f(…) in its forward, where DistributedDataParallel can act
                losses, metrics = model(compute_losses, run, augmented(run, batch))
            loss = sum(losses.values())
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRAD_NORM)
            check_finite(run, losses, grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.model.clamp_temp()
            run.momentum.update(run.model, ema_decay(run.step, config.ema_decay))

            run.step += 1
            run.sampler.set_epoch(*divmod(run.step, len(run.sampler)))
            took = time.perf_counter() - start
            run.seconds += took
            seconds += took
            images += len(batch["rows"]) * world_size()
            bar.update()
            run.unreadable |= set(batch["unreadable"])

            done = run.step == run.total_steps
            stopping = any_process(bool(signals) or run.step == stop_at, run.device) and not done
            if done or stopping or run.step % config.log_every == 0:
                means = average(losses | metrics | {"loss": loss, "grad_norm": grad_norm})
                run.unreadable = union(run.unreadable)
                for reason in sorted(run.unreadable - reported):
                    bar.write(f"cannot be read: {reason}")
                reported = set(run.unreadable)
                bar.set_postfix({name: f"{means[name]:.2f}" for name in losses})
                if is_main_process():
                    write_metrics(
                        out / "metrics.jsonl",
                        step=run.step,
                        epoch=run.step / run.epoch_steps,
                        **means,
                        lr=lr,
                        temp=run.model.temp.item(),
                        unreadable=len(run.unreadable),
                        conflicts=run.sampler.conflicts,
                        samples_per_second=images / seconds,
                    )
                images, seconds = 0, 0.0

            at_validation = done or run.step % config.val_every == 0
            if at_validation:
                run.validation = validate_run(run)
                run.model.train()
                if select and (not run.best_step or run.validation[select] > run.best_score):
                    run.best_step, run.best_score = run.step, run.validation[select]
                    save_checkpoint(run, out / "best.pt")
                if is_main_process():
                    write_metrics(out / "metrics.jsonl", step=run.step, **run.validation)
                shown = [f"{key} {value:.3f}" for key, value in run.validation.items() if key.startswith("val_")]
                bar.write(f"step {run.step}: " + "  ".join(shown))
            if at_validation or stopping:
                save_checkpoint(run, out / "last.pt")

    if is_main_process():
        draw_curves(read_metrics(out / "metrics.jsonl"), out / "curves.png")
    if stopping:
        why = " ".join(signals[:1]) or ("stop_at" if run.step == stop_at else "signal")
        print(f"stopped at step {run.step} ({why}); saved in {out}/last.pt; continue with --resume")
        return None
    print(f"done at step {run.step}, {run.seconds / 60:.1f} min of training; see {out}/curves.png")
    cost = {"seconds": run.seconds, "peak_memory_mib": peak_memory_mib(run.device)}
    final = {"step": run.step, "final": True, **run.validation, **cost}
    if is_main_process():
        write_metrics(out / "metrics.jsonl", **final)
    return final


def stalled(run: Run, patience: int) -> bool:
    """Return whether `patience` validations have passed since the best one; 0: never."""
    return bool(patience and run.best_step) and run.step - run.best_step >= patience * run.config.val_every


class NonFiniteLoss(RuntimeError):
    """A loss or the gradient became NaN or infinite; the last checkpoint is kept."""


def check_finite(run: Run, losses: Values, grad_norm: Tensor) -> None:
    """Raise NonFiniteLoss, before the weights change, where a loss or the gradient is not finite."""
    parts = losses | {"grad_norm": grad_norm}
    if torch.stack([part.detach() for part in parts.values()]).isfinite().all():
        return
    wrong = " and ".join(name for name, part in parts.items() if not part.isfinite())
    out = Path(run.config.out)
    last = out / "last.pt"
    advice = "there is no checkpoint yet; try a lower --lr"
    if last.exists():
        lines = [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
        steps_below = [line["step"] for line in lines if line["loss"] < lines[0]["loss"]]
        below = f"last below its start at step {steps_below[-1]}" if steps_below else "never below its start"
        saved_step = torch.load(last, mmap=True, weights_only=True)["step"]
        advice = f"the loss was {below}; {last} is of step {saved_step}: --resume with a lower --lr"
    raise NonFiniteLoss(f"step {run.step + 1}: {wrong} not finite; {advice}")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    try:
        config, given = parse_config(argv)
        train(config, given)
    except (ConfigError, DataError, NonFiniteLoss, OSError) as error:
        sys.stderr = sys.__stderr__  # processes other than the first are silent, but their errors must show
        sys.exit(f"train.py: {in_one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
