"""Pretraining: run config and command line, one recipe per method, one flat loop.

    python train.py                                            tiny model, synthetic photos, a laptop
    python train.py --data fashiongen --root DIR               base model, FashionGen's files, a GPU
    python train.py --data jsonl --root DIR --preset tiny      one's own photos
    torchrun --nproc-per-node N train.py …                     N GPUs: see Ranks

What a run leaves in --out: config.json, metrics.jsonl, curves.png, masks.png, last.pt. Keys of metrics.jsonl:

    step, epoch                 optimiser steps done; passes over the training photos
    loss, itc, itm, mlm, mim    the objective and its parts, of that step's batch; itc and mim times their weights
    rtd, align                  parts of recipe fashionfine: replaced-token detection; category alignment (C-CmA)
    lr, temp, grad_norm         learning rate; contrastive temperature; gradient norm before clipping
    itm_accuracy, mlm_accuracy  on that step's batch (matching pairs and negatives; masked words)
    replaced_recall             of that batch's replaced words, the share that was detected (fashionfine)
    unreadable                  photos left out so far because they could not be decoded
    conflicts                   photos that share a batch of this epoch with one of their product or caption
    samples_per_second          photos trained on a second since the last line
    val_i2t_r1 … val_t2i_r10    held-out retrieval recall, photo to text and text to photo, by product
    val_mlm_accuracy            masked words of held-out photos restored (the run's ratio of random words)
    val_unreadable              held-out photos left out because they could not be decoded
    val_itm_accuracy            held-out pairs told from random wrong ones; chance is 0.5
    On synthetic photos, whose truth is known, also these; each with its value for random masks (or a random patch, or
    random batches and negatives) beside it as …_random, and for the hardest batches and negatives as …_hard:
    word_cooccurrence           of the masked words that name an attribute, the share of which this photo shows it
    detail_cooccurrence         the same for the small attributes alone: neither garment nor colour nor pattern
    attribute_share             of all masked words, the share that name an attribute
    patch_cooccurrence          of the masked patches, the share on the region of an attribute that the text names
    pointing, pointing_whole    is the most attended patch of a visible word in its region? details; garment and cloth
    visible_word_accuracy       of random masked words that name what the photo shows, the share restored (no …_random)
    unseen_word_accuracy        the same of words that name what it does not show
    false_negative_rate         share of the chosen ITM negatives whose text in fact describes the photo
    negative_similarity         mean cosine of the chosen ITM negatives: their hardness
    final, seconds, peak_memory_mib   last line only: training time over all resumes, validation excluded; peak memory
                                (of the first process)
"""

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from data import augment, build_dataset, build_tokenizer, to_device
from harness.batches import endless_batches, report_cut_texts
from harness.checkpoints import begin, restore, save_checkpoint
from harness.config import FREE_ON_RESUME, TrainConfig, check_flags, ema_decay, learning_rate, parse_config
from harness.flags import ConfigError
from harness.log import Metrics, StopSignals, peak_memory_mib
from harness.ranks import Ranks, speak_up
from harness.run import Job, NonFiniteLoss, Run, Step, build_run, check_finite, seed_for
from harness.weights import WeightsError, load_pretrained
from harness.wiring import accuracies, accuracy, contrast, momentum_attention, wrong_pairs
from losses import alignment_loss, cross_entropy, itm_loss, mim_loss, mlm_loss
from masking import block_patch_mask, random_patch_mask, random_word_mask, soft_mask, sync_mask
from measures.pictures import PANELS, draw_curves, draw_masks, first_photos
from measures.truth import truth, truth_in_words
from measures.validation import validate
from photos.dataset import DataError, PhotoDataset
from photos.prompts import DESCRIPTION
from sampler import GroupedBatchSampler


def albef(run: Run, batch: dict) -> tuple[dict[str, Tensor], dict[str, float | Tensor]]:
    """ALBEF (Li et al. 2021): ITC + ITM + MLM with momentum soft targets. -> losses, figures to log.

    Forward passes a step, in photos or captions: image B; text 2B (clean, masked); fusion 4B in one call (B matching,
    2B not, B masked; for the first 3B, which only ITM reads, the last layer makes [CLS] alone). Momentum: image B, text
    2B, fusion B (masked); text and fusion of the masked half only while alpha > 0.
    """
    config, model, momentum = run.config, run.model, run.momentum
    ids, keep = batch["token_ids"], batch["attention_mask"]
    count = len(ids)

    # encode: clean and masked captions share one call
    word_mask = random_word_mask(batch["words"], config.mlm_ratio, run.generator)
    masked_ids, mlm_labels = run.corrupt(ids, word_mask)
    image_embeds = model.encode_image(batch["images"])
    text_embeds, masked_embeds = model.encode_text(torch.cat([ids, masked_ids]), torch.cat([keep, keep])).chunk(2)
    with torch.no_grad():
        image_embeds_m = momentum.encode_image(batch["images"])
        text_embeds_m = momentum.encode_text(ids, keep)

    # contrast
    image_feat, text_feat = model.project_image(image_embeds), model.project_text(text_embeds)
    image_feat_m, text_feat_m = momentum.project_image(image_embeds_m), momentum.project_text(text_embeds_m)
    itc, sim_i2t, sim_t2i = contrast(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

    # fuse: matching pairs, each photo with a wrong text, each text with a wrong photo, masked text with its photo
    wrong = wrong_pairs(run, batch, sim_i2t, sim_t2i, text_embeds, image_embeds)
    own = torch.arange(count, device=run.device)
    paired, filled = model.fuse(
        torch.cat([text_embeds, wrong.text_embeds, text_embeds, masked_embeds]),
        torch.cat([keep, wrong.keep, keep, keep]),
        wrong.photos,
        photos=torch.cat([own, own, wrong.places, own]),
        only_cls=3 * count,
    )

    # losses
    itm_labels = torch.cat([torch.ones_like(own), wrong.labels])
    itm_logits = model.itm_logits(paired)
    chosen = mlm_labels != -100
    mlm_logits, labels = model.mlm_logits(filled[chosen]), mlm_labels[chosen]  # (M, V), (M,)
    mlm_logits_m = None
    if run.alpha > 0:
        with torch.no_grad():
            fused_m = momentum.fuse(momentum.encode_text(masked_ids, keep), keep, image_embeds_m)
            mlm_logits_m = momentum.mlm_logits(fused_m[chosen])
    losses = {
        "itc": itc,
        "itm": run.ranks.mean(itm_loss(itm_logits, itm_labels), itm_labels >= 0),
        "mlm": run.ranks.mean(mlm_loss(mlm_logits, labels, mlm_logits_m, run.alpha), chosen),
    }
    return losses, accuracies(run, itm_logits, itm_labels, mlm_logits, labels)


def syncmask(run: Run, batch: dict) -> tuple[dict[str, Tensor], dict[str, float | Tensor]]:
    """SyncMask (Song et al. 2024): ITC + ITM + MLM + MIM, both masks from the momentum model's cross-attention.

    Choices: how the attention becomes masks, the form of MIM (masked photo, clean text, a pass of its own), its weight.
    Forward passes a step, in photos or captions: image B, and half of the patches of B (visible ones); text 2B (clean,
    masked); fusion 4B in one call (B matching, 2B not, B masked); decoder B. Momentum: image B, text B, and for the
    masks text and fusion 2B (source hidden) or fusion B (the others); with alpha > 0 text and fusion B more.
    """
    config, model, momentum = run.config, run.model, run.momentum
    ids, keep = batch["token_ids"], batch["attention_mask"]
    count = len(ids)

    # mask: what the momentum model finds in both, the photo and the text
    with torch.no_grad():
        image_embeds_m = momentum.encode_image(batch["images"])
        text_embeds_m = momentum.encode_text(ids, keep)
    patch_mask, word_mask = choose_masks(run, batch, image_embeds_m, text_embeds_m)
    masked_ids, mlm_labels = run.corrupt(ids, word_mask)

    # encode: clean and masked captions share one call; of the masked photos only the visible patches
    visible = (~patch_mask).nonzero()[:, 1].view(count, -1)  # (B, K)
    image_embeds = model.encode_image(batch["images"])
    visible_embeds = model.encode_image(batch["images"], visible)
    text_embeds, masked_embeds = model.encode_text(torch.cat([ids, masked_ids]), torch.cat([keep, keep])).chunk(2)

    # contrast
    image_feat, text_feat = model.project_image(image_embeds), model.project_text(text_embeds)
    image_feat_m, text_feat_m = momentum.project_image(image_embeds_m), momentum.project_text(text_embeds_m)
    itc, sim_i2t, sim_t2i = contrast(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

    # fuse: matching pairs, each photo with a wrong text, each text with a wrong photo, masked text with its photo
    wrong = wrong_pairs(run, batch, sim_i2t, sim_t2i, text_embeds, image_embeds)
    own = torch.arange(count, device=run.device)
    paired, filled = model.fuse(
        torch.cat([text_embeds, wrong.text_embeds, text_embeds, masked_embeds]),
        torch.cat([keep, wrong.keep, keep, keep]),
        wrong.photos,
        photos=torch.cat([own, own, wrong.places, own]),
        only_cls=3 * count,
    )
    # reconstruct: masked photo with its text
    pixels = model.reconstruct_patches(visible_embeds, visible, text_embeds, keep)

    # losses
    itm_labels = torch.cat([torch.ones_like(own), wrong.labels])
    itm_logits = model.itm_logits(paired)
    chosen = mlm_labels != -100
    mlm_logits, labels = model.mlm_logits(filled[chosen]), mlm_labels[chosen]  # (M, V), (M,)
    mlm_logits_m = None
    if run.alpha > 0:
        with torch.no_grad():
            fused_m = momentum.fuse(momentum.encode_text(masked_ids, keep), keep, image_embeds_m)
            mlm_logits_m = momentum.mlm_logits(fused_m[chosen])
    losses = {
        "itc": itc,
        "itm": run.ranks.mean(itm_loss(itm_logits, itm_labels), itm_labels >= 0),
        "mlm": run.ranks.mean(mlm_loss(mlm_logits, labels, mlm_logits_m, run.alpha), chosen),
        "mim": run.ranks.mean(config.mim_weight * mim_loss(pixels, batch["images"], patch_mask), patch_mask),
    }
    return losses, accuracies(run, itm_logits, itm_labels, mlm_logits, labels)


def softmask(run: Run, batch: dict) -> tuple[dict[str, Tensor], dict[str, float | Tensor]]:
    """Text-driven soft masks (Park & Han 2023): focal ITC + ITM with a soft-masked photo as one more match + MLM, on
    masked text and distorted photos. -> losses, figures to log.

    Choice: ITC, ITM and MLM read one encoding of the masked text, so MLM needs no pass of its own.
    Forward passes a step, in photos or captions: image B; text B (masked; with --no-mask-text 2B); fusion B matching,
    with its attention, and 3B in one call (2B not, B soft-masked; with --no-mask-text B masked more). Momentum: image
    B, text B; with alpha > 0 text and fusion B more.
    """
    config, model, momentum = run.config, run.model, run.momentum
    ids, keep = batch["token_ids"], batch["attention_mask"]
    count = len(ids)

    # encode: the masked text serves all objectives; the momentum model sees the clean one
    word_mask = random_word_mask(batch["words"], config.mlm_ratio, run.generator)
    masked_ids, mlm_labels = run.corrupt(ids, word_mask)
    image_embeds = model.encode_image(batch["images"])
    masked_embeds = model.encode_text(masked_ids, keep)
    text_embeds = masked_embeds if config.mask_text else model.encode_text(ids, keep)
    with torch.no_grad():
        image_embeds_m = momentum.encode_image(batch["images"])
        text_embeds_m = momentum.encode_text(ids, keep)

    # contrast
    image_feat, text_feat = model.project_image(image_embeds), model.project_text(text_embeds)
    image_feat_m, text_feat_m = momentum.project_image(image_embeds_m), momentum.project_text(text_embeds_m)
    itc, sim_i2t, sim_t2i = contrast(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

    # fuse: matching pairs; each photo with a wrong text, each text with a wrong photo; and, as far as switched on, the
    # photo without what one word is about, and masked text with its photo
    wrong = wrong_pairs(run, batch, sim_i2t, sim_t2i, text_embeds, image_embeds)
    own = torch.arange(count, device=run.device)
    matching = model.fuse(text_embeds, keep, image_embeds, return_attention=config.soft_mask)
    matching, attentions = matching if config.soft_mask else (matching, [])
    pairs, photos = [(wrong.text_embeds, wrong.keep, own), (text_embeds, keep, wrong.places)], wrong.photos
    if config.soft_mask:
        readable = batch["words"] & ~word_mask if config.mask_text else batch["words"]
        pairs += [(text_embeds, keep, own + len(photos))]
        photos = torch.cat([photos, soften(run, readable, matching, attentions, image_embeds)])
    only_cls = len(pairs) * count
    if not config.mask_text:
        pairs += [(masked_embeds, keep, own)]
    texts, keeps, seen = map(torch.cat, zip(*pairs, strict=True))
    paired, filled = model.fuse(texts, keeps, photos, photos=seen, only_cls=only_cls)
    filled = matching if config.mask_text else filled  # from where masked words are predicted

    # losses
    itm_labels = torch.cat([torch.ones_like(own), wrong.labels, own.new_ones(count * config.soft_mask)])
    itm_logits = model.itm_logits(torch.cat([matching[:, :1], paired]))
    chosen = mlm_labels != -100
    mlm_logits, labels = model.mlm_logits(filled[chosen]), mlm_labels[chosen]  # (M, V), (M,)
    mlm_logits_m = None
    if run.alpha > 0:
        with torch.no_grad():
            fused_m = momentum.fuse(momentum.encode_text(masked_ids, keep), keep, image_embeds_m)
            mlm_logits_m = momentum.mlm_logits(fused_m[chosen])
    losses = {
        "itc": itc,
        "itm": run.ranks.mean(itm_loss(itm_logits, itm_labels), itm_labels >= 0),
        "mlm": run.ranks.mean(mlm_loss(mlm_logits, labels, mlm_logits_m, run.alpha), chosen),
    }
    return losses, accuracies(run, itm_logits, itm_labels, mlm_logits, labels)


def fashionfine(run: Run, batch: dict) -> tuple[dict[str, Tensor], dict[str, float | Tensor]]:
    """Fashion-FINE (Jin et al. 2024): focal ITC on features with local tokens in them (MAA, HNM-F) + ITM + the category
    symbol and phrases aligned with the photo (C-CmA) + MLM + replaced-token detection. -> losses, figures to log.

    As in the authors' code all objectives read one text, some of whose words are masked and some replaced, and only
    online features have local tokens in them. Choices: the momentum model reads the clean text; C-CmA's start.
    Forward passes a step, in photos or captions: image B; text B (masked); fusion 3B in one call (B matching, 2B not).
    Momentum: image B, text B.
    """
    config, model, momentum = run.config, run.model, run.momentum
    ids, keep = batch["token_ids"], batch["attention_mask"]
    count = len(ids)

    # encode: the corrupted text serves all objectives; the momentum model sees the clean one
    word_mask = random_word_mask(batch["words"], config.mlm_ratio, run.generator)
    masked_ids, mlm_labels, replaced = run.replace_words(ids, batch["words"], word_mask)
    image_embeds = model.encode_image(batch["images"])
    text_embeds = model.encode_text(masked_ids, keep)
    with torch.no_grad():
        image_embeds_m = momentum.encode_image(batch["images"])
        text_embeds_m = momentum.encode_text(ids, keep)

    # contrast: integrated features with momentum keys of [CLS] alone
    image_feat, text_feat = model.image_feature(image_embeds), model.text_feature(text_embeds, keep)
    image_feat_m, text_feat_m = momentum.project_image(image_embeds_m), momentum.project_text(text_embeds_m)
    itc, sim_i2t, sim_t2i = contrast(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)

    # fuse: matching pairs, each photo with a wrong text, each text with a wrong photo
    wrong = wrong_pairs(run, batch, sim_i2t, sim_t2i, text_embeds, image_embeds)
    own = torch.arange(count, device=run.device)
    paired, matching = model.fuse(
        torch.cat([wrong.text_embeds, text_embeds, text_embeds]),
        torch.cat([wrong.keep, keep, keep]),
        wrong.photos,
        photos=torch.cat([own, wrong.places, own]),
        only_cls=2 * count,
    )

    # losses: masked words are predicted, and replaced ones detected, from the matching pairs
    itm_labels = torch.cat([torch.ones_like(own), wrong.labels])
    itm_logits = model.itm_logits(torch.cat([matching[:, :1], paired]))
    chosen = mlm_labels != -100
    mlm_logits, labels = model.mlm_logits(matching[chosen]), mlm_labels[chosen]  # (M, V), (M,)
    losses = {
        "itc": itc,
        "itm": run.ranks.mean(itm_loss(itm_logits, itm_labels), itm_labels >= 0),
        "mlm": run.ranks.mean(mlm_loss(mlm_logits, labels), chosen),
    }
    figures = accuracies(run, itm_logits, itm_labels, mlm_logits, labels)
    if config.model.alignment:
        # choice: ramped up, since from random weights its full pull gathers all features in one point
        alignment = alignment_loss(model.category_feature(text_embeds, keep), image_feat)
        losses["align"] = run.ranks.mean(run.ramp * alignment, count)
    if config.model.detector:
        legible = batch["words"] & (masked_ids != run.mask_id)
        rtd_logits, rtd_labels = model.replaced_logits(matching[legible]), replaced[legible].long()
        losses["rtd"] = run.ranks.mean(cross_entropy(rtd_logits, rtd_labels), legible)
        found = rtd_labels.masked_fill(rtd_labels == 0, -100)
        figures["replaced_recall"] = run.ranks.mean(accuracy(rtd_logits, found), found >= 0)
    return losses, figures


RECIPES: dict[str, Callable] = {"syncmask": syncmask, "softmask": softmask, "fashionfine": fashionfine, "albef": albef}


def soften(run: Run, words: Tensor, matching: Tensor, attentions: list[Tensor], image_embeds: Tensor) -> Tensor:
    """The image tokens (B, N, D) with the patches suppressed that one of the `words` (B, L), drawn at random, is about:
    ṽ_p = (1 − M_p) · v_p, the CLS as it is. A text without any such word leaves its photo as it is."""
    attention = attentions[(run.config.mask_layer or (len(attentions) + 1) // 2) - 1]
    score = run.model.itm_logits(matching)[:, 1].sum()
    (gradient,) = torch.autograd.grad(score, attention, retain_graph=True)
    any_word = words.any(dim=1, keepdim=True)
    word = torch.multinomial((words | ~any_word).float(), 1, generator=run.generator).squeeze(1)
    soft = soft_mask(attention, gradient, word) * any_word  # (B, P)
    return torch.cat([image_embeds[:, :1], image_embeds[:, 1:] * (1 - soft[..., None]).to(image_embeds.dtype)], dim=1)


def choose_masks(run: Run, batch: dict, image_embeds_m: Tensor, text_embeds_m: Tensor) -> tuple[Tensor, Tensor]:
    """Patch mask (B, P) and word mask (B, L) of a training batch, each random or synchronized as the config says."""
    config, words, rows = run.config, batch["words"], len(batch["words"])
    grid, where = config.model.grid, dict(generator=run.generator, device=run.device)
    if config.patch_mask == "block":
        patch_mask = block_patch_mask(rows, grid, config.mim_ratio, **where)
    else:
        patch_mask = random_patch_mask(rows, grid**2, config.mim_ratio, **where)
    word_mask = random_word_mask(words, config.mlm_ratio, run.generator)
    if run.step < config.mask_warmup or "sync" not in (config.patch_mask, config.word_mask):
        return patch_mask, word_mask
    attention = momentum_attention(run, batch, image_embeds_m, text_embeds_m, run.generator)
    sync_patches, sync_words = sync_mask(
        attention, words, config.mim_ratio, config.mlm_ratio, config.mask_heads, config.word_score,
        config.patch_score, config.mask_noise, run.generator,
    )  # fmt: skip
    keep_random = torch.rand(rows, 1, **where) < config.mask_hint
    if config.patch_mask == "sync":
        patch_mask = torch.where(keep_random, patch_mask, sync_patches)
    if config.word_mask == "sync":
        word_mask = torch.where(keep_random, word_mask, sync_words)
    return patch_mask, word_mask


def train(config: TrainConfig, given: set[str] = frozenset()) -> dict | None:
    """Train as `config` says, or go on with what --out holds. -> the final line of metrics, None when stopped early.

    Under torchrun every process calls this; the lines of all but the first lack the validation."""
    config, state = begin(config, given, check_flags)
    ranks = Ranks.join(config.device)
    train_set, val_set = (
        build_dataset(config.data, config.root, split, config.model.image_size, config.seed, config.products)
        for split in ("train", "val")
    )
    if config.prompts:  # held-out texts as the downstream tasks give them: without what the prompts would tell
        train_set.prompts, val_set.lead = True, DESCRIPTION
    print(f"train: {train_set.report()}\nval: {val_set.report()}")
    if state:
        tokenizer = Tokenizer.from_str(state["tokenizer"])
    else:
        rows = tqdm(
            range(0 if config.vocab else len(train_set)), "reading texts", unit=" texts", leave=False, disable=None
        )
        spoken = [" ".join(train_set.text(row)[1::2]) for row in rows]
        sizes = config.model.vocab_size, config.model.max_length
        tokenizer = build_tokenizer(spoken, *sizes, config.vocab, config.prompts)
    report_cut_texts(train_set, tokenizer)
    run = build_run(config, train_set, tokenizer, ranks)
    ranks.check_same("training photos or vocabularies", zlib.crc32(tokenizer.to_str().encode(), run.data))
    if not state and (config.vision_weights or config.text_weights or config.weights):
        print(load_pretrained(run.model, config.vision_weights, config.text_weights, config.weights))
        run.momentum.update(run.model, decay=0)

    def held_out(run: Run) -> tuple[dict[str, float], list[str]]:
        figures, known = validate(run, val_set), truth(run, train_set, val_set)
        return figures | known, truth_in_words(known)

    job = Job(f"{config.recipe}, {config.preset}", RECIPES[config.recipe], held_out, PANELS)
    final = work(run, job, train_set, state)
    if ranks.leads:
        draw_masks(run, val_set, first_photos(val_set, 6), Path(config.out) / "masks.png")
    return final


def work(run: Run, job: Job, dataset: PhotoDataset, state: dict | None) -> dict | None:
    """The loop over `dataset`, from the start or from a checkpoint's state, with what it leaves in --out."""
    config, out = run.config, Path(run.config.out)
    sampler = GroupedBatchSampler(
        len(dataset), config.batch_size, config.search_size, config.sampler, dataset.product_ids,
        dataset.caption_ids, config.seed, margin=config.margin,
    )  # fmt: skip
    if len(dataset) // len(sampler) < run.ranks.count:
        raise ConfigError(f"--batch-size {config.batch_size}: too few photos for {run.ranks.count} processes")
    resumed_step = None
    if state:
        if state["data"] != run.data:
            raise ConfigError(f"{out}/last.pt was trained on other rows than the training split holds now")
        restore(run, sampler, state)
        resumed_step = run.step
        decides = {name: value for name, value in asdict(config).items() if name not in FREE_ON_RESUME}
        run.ranks.check_same("flags or checkpoints", zlib.crc32(repr((run.step, decides)).encode()))
        state.clear()  # the checkpoint is as large as the run itself
    if run.ranks.leads:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(asdict(run.config), indent=1) + "\n")
    metrics = Metrics(out / "metrics.jsonl" if run.ranks.leads else Path(os.devnull), resumed_step)
    parameters = sum(p.numel() for p in run.model.parameters())
    size = f"{parameters / 1e6:.1f} M parameters"
    where = f"{run.device}" + (f", {run.ranks.count} processes" if run.ranks.count > 1 else "")
    print(f"{job.name}: {size}, {run.total_steps} steps on {where}, into {out}/")
    try:
        with StopSignals(second_stops=run.ranks.count == 1) as stop:
            return loop(run, job, dataset, sampler, metrics, stop)
    finally:
        if run.ranks.leads and any("loss" in line for line in metrics.lines):
            draw_curves(metrics.lines, out / "curves.png", job.panels)


def record_validation(
    run: Run, job: Job, sampler: GroupedBatchSampler, metrics: Metrics, say: Callable[[str], None]
) -> None:
    """Validate: write the figures, and the weights where they are the best so far."""
    figures, remarks = job.validate(run)
    run.model.train()
    line = {"step": run.step, **figures}
    if job.best_step([*metrics.lines, line]) == run.step:  # first, so that the line never lacks its weights
        save_checkpoint(run, sampler, Path(run.config.out) / "best.pt")
    metrics.write(**line)
    say(f"step {run.step}: " + "  ".join(f"{k[4:]} {v:.3f}" for k, v in figures.items() if k.startswith("val_")))
    for remark in remarks:
        say("    " + remark)


def loop(
    run: Run, job: Job, dataset: PhotoDataset, sampler: GroupedBatchSampler, metrics: Metrics, stop: StopSignals
) -> dict | None:
    """validate → schedule → forward → backward → clip → step → EMA → log → checkpoint, until the last step."""
    config, ranks, last = run.config, run.ranks, Path(run.config.out) / "last.pt"
    batches, forward = endless_batches(dataset, sampler, run), ranks.parallel(Step(run, job))
    seen, took = 0, 0.0
    bar = tqdm(total=run.total_steps, initial=run.step, unit=" steps", dynamic_ncols=True, smoothing=0.1)
    while True:
        done = run.step == run.total_steps
        due = run.step and (done or run.step % config.val_every == 0)
        if ranks.leads and due and not metrics.validation(run.step):
            record_validation(run, job, sampler, metrics, bar.write)
        if due:
            ranks.wait()
        if ranks.on_any(done or job.stalled(metrics.lines)):
            break

        start, lr = time.perf_counter(), learning_rate(run.step, config, run.total_steps)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(seed_for(config.seed, run.step, ranks.rank))  # dropout
        run.generator = torch.Generator(run.device).manual_seed(seed_for(config.seed, run.step, ranks.rank))

        totals: dict[str, Tensor] = {}
        for _ in range(config.accumulate):
            batch = ranks.agree(to_device(next(batches), run.device))
            for reason in set(batch["unreadable"]) - run.unreadable:
                bar.write(f"left out: {reason}")
            run.unreadable |= set(batch["unreadable"])
            if not all(ranks.rows):
                continue
            seen += sum(ranks.rows)
            for key in [key for key in ("images", "target_images") if key in batch]:
                batch[key] = augment(batch[key], config.crop_scale, config.color_jitter, run.generator, config.distort)
            losses, figures = forward(batch)
            loss = sum(losses.values()) / config.accumulate
            loss.backward()
            if config.sampler != "random":
                sampler.collect(ranks.gather(batch["rows"]), *run.features)
            for key, value in (losses | figures | {"loss": sum(losses.values())}).items():
                totals[key] = totals.get(key, 0) + value.detach() / config.accumulate
        if not totals:  # not one photo of this step, or of one rank's share, could be read
            if len(run.unreadable) > len(dataset) // 2:
                raise DataError(f"most photos cannot be read, the last one: {batch['unreadable'][-1]}")
            run.step += 1
            bar.update()
            continue
        totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.clip)
        check_finite(ranks, totals, run.step + 1, last)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.model.clamp_temp()
        run.momentum.update(run.model, ema_decay(run.step, config.ema_decay))
        run.step += 1
        sampler.set_epoch(*divmod(run.step * config.accumulate, len(sampler)))

        bar.update()
        run.seconds, took = run.seconds + time.perf_counter() - start, took + time.perf_counter() - start
        done = run.step == run.total_steps
        stopping = ranks.on_any(not done and (bool(stop.caught) or run.step == config.stop_at))
        if run.step % config.log_every == 0 or done or stopping:
            values = ranks.average(totals)
            metrics.write(step=run.step, epoch=run.step / run.epoch_steps, **values, lr=lr, temp=run.model.temp.item(),
                          unreadable=len(run.unreadable), conflicts=sampler.conflicts,
                          samples_per_second=seen / took)  # fmt: skip
            bar.set_postfix({k: f"{values[k]:.2f}" for k in losses} | {"photos/s": f"{seen / took:.0f}"})
            seen, took = 0, 0.0
        if run.step % config.save_every == 0 or run.step % config.val_every == 0 or done or stopping:
            save_checkpoint(run, sampler, last)
        if stopping:
            bar.close()
            why = "--stop-at" if run.step == config.stop_at else stop.caught or "signal"
            print(f"stopped at step {run.step} ({why}); saved in {last}, go on with --resume")
            return None
    bar.close()
    cost = {"seconds": run.seconds, "peak_memory_mib": peak_memory_mib(run.device)}
    final = {"step": run.step, "final": True, **metrics.validation(run.step), **cost}
    metrics.write(**final)
    print(f"done at step {run.step}, {run.seconds / 60:.1f} min of training; see {last.parent}/curves.png")
    return final


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    try:
        config, given = parse_config(argv)
        train(config, given)
    except (ConfigError, DataError, WeightsError, NonFiniteLoss, OSError) as error:
        speak_up()
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped before the first step")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
