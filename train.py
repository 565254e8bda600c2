"""Pretraining: one recipe per method, one flat loop.

A recipe is a function here and a row of RECIPE_DEFAULTS in engine/config.py, which sets what is not written out: how
batches are grouped and negatives chosen, focal ITC, distortion, framed texts. Its docstring counts the passes of a
step, in photos or captions; "to [CLS]" where the last fusion layer makes [CLS] alone.

    python train.py                                            tiny model, synthetic photos, a laptop
    python train.py --data fashiongen --root DIR               base model, FashionGen's files, a GPU
    python train.py --data jsonl --root DIR --preset tiny      one's own photos
    torchrun --nproc-per-node N train.py …                     N GPUs: see engine/ranks.py

What a run leaves in --out: config.json, metrics.jsonl (its keys: engine/log.py), curves.png, masks.png, last.pt.
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
from torch import Tensor

from data import build_dataset, telling_pieces, word_regions
from engine.batches import augmented, endless_batches, learn_vocabulary, report_cut_texts
from engine.checkpoints import begin, restore, save_checkpoint
from engine.config import (
    FREE_ON_RESUME,
    MAX_GRAD_NORM,
    TrainConfig,
    check_flags,
    ema_decay,
    grouping_of,
    learning_rate,
    parse_config,
)
from engine.flags import ConfigError, in_one_line
from engine.host import claimed
from engine.log import Metrics, Progress, StopSignals
from engine.precision import fitting_precision
from engine.ranks import Ranks, speak_up
from engine.run import FiniteWatch, Job, Logged, Losses, NonFiniteLoss, Run, Step, build_run
from engine.trust import read_tokenizer
from engine.weights import WeightsError, load_pretrained
from engine.wiring import (
    Teacher,
    add_matches,
    contrast,
    match_pairs,
    pick,
    restore_words,
    synchronize,
    teach,
    wrong_pairs,
)
from evaluation.pictures import draw_curves, draw_masks, first_photos
from evaluation.truth import truth, truth_in_words
from evaluation.validation import validate
from losses import accuracy, alignment_loss, cross_entropy, mim_loss
from masking import grad_cam, middle_layer, random_patch_mask, random_word_mask, soft_mask, split_patches, true_mask
from readers.dataset import DataError, PhotoDataset
from readers.prompts import DESCRIPTION
from sampler import GroupedBatchSampler


def albef(run: Run, batch: dict) -> tuple[Losses, Logged]:
    """ALBEF (Li et al. 2021): ITC + ITM + MLM with momentum soft targets.

    Passes: image B; text 2B (clean, masked); fusion 3B to [CLS] (B matching pairs, 2B wrong) and B of masked texts.
    Momentum: image B, text B; with alpha > 0 text and fusion B (masked) more.
    """
    config, model, ids, keep = run.config, run.model, batch["token_ids"], batch["attention_mask"]
    teacher = teach(run, batch)

    # mask, encode: clean and masked captions share one call
    word_mask = random_word_mask(batch["words"], config.mlm_ratio, run.generator)
    masked_ids, mlm_labels = run.corrupt(ids, word_mask)
    image_embeds = model.vision(batch["images"])
    text_embeds, masked_embeds = model.text(torch.cat([ids, masked_ids]), torch.cat([keep, keep])).chunk(2)

    # contrast
    itc = contrast(run, batch, model.project_image(image_embeds), model.project_text(text_embeds), teacher)

    # fuse: matching pairs and wrong ones, of which ITM reads [CLS] alone; masked texts with their photos
    photos = model.fusion.project_image_kv(image_embeds)
    pairs = add_matches(wrong_pairs(run, batch, itc, text_embeds, image_embeds, photos), text_embeds, keep)
    fused_cls = model.fusion(*pairs.inputs, cls_only=True)
    filled = model.fusion(masked_embeds, keep, photos)

    # losses
    losses, figures = {"itc": config.itc_weight * itc.loss}, {}
    losses["itm"], figures["itm_accuracy"] = match_pairs(run, fused_cls, pairs.labels)
    losses["mlm"], figures["mlm_accuracy"] = restore_words(run, batch, filled, masked_ids, mlm_labels, teacher)
    return losses, figures


def syncmask(run: Run, batch: dict) -> tuple[Losses, Logged]:
    """SyncMask (Song et al. 2024): ITC + ITM + MLM + MIM, both masks from the momentum model's cross-attention.

    Choices: how the attention becomes masks, the form of MIM (masked photo, clean text, a pass of its own), its weight.
    From RECIPE_DEFAULTS: grouped batches, semi-hard negatives.

    Passes: those of `albef`; image B of half of the patches (the visible ones), decoder B. Momentum, for the masks:
    text 2B and fusion 4B more (source masked), or fusion B (clean).
    """
    config, model, ids, keep = run.config, run.model, batch["token_ids"], batch["attention_mask"]
    teacher = teach(run, batch)

    # mask: what the momentum model finds in both, the photo and the text
    patch_mask, word_mask = choose_masks(run, batch, teacher)
    masked_ids, mlm_labels = run.corrupt(ids, word_mask)

    # encode: clean and masked captions share one call; of the masked photos only the visible patches
    visible, hidden = split_patches(patch_mask, config.mim_ratio)  # (B, K), (B, M)
    image_embeds = model.vision(batch["images"])
    visible_embeds = model.vision(batch["images"], visible)
    text_embeds, masked_embeds = model.text(torch.cat([ids, masked_ids]), torch.cat([keep, keep])).chunk(2)

    # contrast
    itc = contrast(run, batch, model.project_image(image_embeds), model.project_text(text_embeds), teacher)

    # fuse: matching pairs and wrong ones, of which ITM reads [CLS] alone; masked texts with their photos
    photos = model.fusion.project_image_kv(image_embeds)
    pairs = add_matches(wrong_pairs(run, batch, itc, text_embeds, image_embeds, photos), text_embeds, keep)
    fused_cls = model.fusion(*pairs.inputs, cls_only=True)
    filled = model.fusion(masked_embeds, keep, photos)
    # reconstruct: masked photos with their texts
    pixels = model.decoder(visible_embeds, visible, hidden, text_embeds, keep)

    # losses
    losses, figures = {"itc": config.itc_weight * itc.loss}, {}
    losses["itm"], figures["itm_accuracy"] = match_pairs(run, fused_cls, pairs.labels)
    losses["mlm"], figures["mlm_accuracy"] = restore_words(run, batch, filled, masked_ids, mlm_labels, teacher)
    losses["mim"] = run.ranks.mean(config.mim_weight * mim_loss(pixels, batch["images"], hidden), hidden.numel())
    return losses, figures


def softmask(run: Run, batch: dict) -> tuple[Losses, Logged]:
    """Text-driven soft masks (Park & Han 2023): focal ITC + ITM with a soft-masked photo as one more match + MLM, on
    masked text and distorted photos.

    Choice: ITC, ITM and MLM read one encoding of the masked text, so MLM needs no pass of its own. From
    RECIPE_DEFAULTS: focal ITC, distortion.

    Passes: image B; text B (masked; with --no-mask-text 2B); fusion B matching pairs, with attention, and 3B to [CLS]
    (2B wrong, B soft-masked); with --no-mask-text B of masked texts more. Momentum as `albef`.
    """
    config, model, ids, keep = run.config, run.model, batch["token_ids"], batch["attention_mask"]
    teacher = teach(run, batch)

    # mask, encode: the masked text serves all objectives; the momentum model sees the clean one
    word_mask = random_word_mask(batch["words"], config.mlm_ratio, run.generator)
    masked_ids, mlm_labels = run.corrupt(ids, word_mask)
    image_embeds = model.vision(batch["images"])
    masked_embeds = model.text(masked_ids, keep)
    text_embeds = masked_embeds if config.mask_text else model.text(ids, keep)

    # contrast
    itc = contrast(run, batch, model.project_image(image_embeds), model.project_text(text_embeds), teacher)

    # fuse: wrong pairs; matching ones; as one more match the photo without what one of the legible words is about
    photos = model.fusion.project_image_kv(image_embeds)
    pairs = wrong_pairs(run, batch, itc, text_embeds, image_embeds, photos)
    fused_cls = [model.fusion(*pairs.inputs, cls_only=True)]
    if config.soft_mask:
        matching, attentions = model.fusion(text_embeds, keep, photos, return_attention=True)
        legible = (batch["words"] > 0) & ~word_mask if config.mask_text else batch["words"] > 0
        soft_kv = model.fusion.project_image_kv(soften(run, legible, matching, attentions, image_embeds))
        fused_cls += [model.fusion(text_embeds, keep, soft_kv, cls_only=True)]
    else:
        matching = model.fusion(text_embeds, keep, photos)
    fused_cls = torch.cat([*fused_cls, matching[:, :1]])
    filled = matching if config.mask_text else model.fusion(masked_embeds, keep, photos)

    # losses
    losses, figures = {"itc": config.itc_weight * itc.loss}, {}
    itm_labels = torch.cat([pairs.labels, pairs.labels.new_ones(len(fused_cls) - len(pairs.labels))])
    losses["itm"], figures["itm_accuracy"] = match_pairs(run, fused_cls, itm_labels)
    losses["mlm"], figures["mlm_accuracy"] = restore_words(run, batch, filled, masked_ids, mlm_labels, teacher)
    return losses, figures


def fashionfine(run: Run, batch: dict) -> tuple[Losses, Logged]:
    """Fashion-FINE (Jin et al. 2024): focal ITC on features with local tokens in them (MAA, HNM-F) + ITM + the category
    symbol and phrases aligned with the photo (C-CmA) + MLM + replaced-token detection.

    As in the authors' code all objectives read one text, some of whose words are masked and some replaced, only online
    features have local tokens in them, and MLM has no soft targets. Choices: the momentum model reads the clean text;
    C-CmA's start. From RECIPE_DEFAULTS: focal ITC, framed texts.

    Passes: image B; text B (masked); fusion B matching pairs and 2B wrong ones to [CLS]. Momentum: image B, text B.
    """
    config, model, ids, keep = run.config, run.model, batch["token_ids"], batch["attention_mask"]
    teacher = teach(run, batch)

    # mask, encode: the corrupted text serves all objectives; the momentum model sees the clean one
    word_mask = random_word_mask(batch["words"], config.mlm_ratio, run.generator)
    masked_ids, mlm_labels, replaced = run.replace_words(ids, batch["words"], word_mask)
    image_embeds = model.vision(batch["images"])
    text_embeds = model.text(masked_ids, keep)

    # contrast: integrated features with momentum keys of [CLS] alone
    image_feat = model.image_feature(image_embeds)
    itc = contrast(run, batch, image_feat, model.text_feature(text_embeds, keep), teacher)

    # fuse: wrong pairs; matching ones, from which words are restored
    photos = model.fusion.project_image_kv(image_embeds)
    pairs = wrong_pairs(run, batch, itc, text_embeds, image_embeds, photos)
    matching = model.fusion(text_embeds, keep, photos)
    fused_cls = torch.cat([model.fusion(*pairs.inputs, cls_only=True), matching[:, :1]])

    # losses
    losses, figures = {"itc": config.itc_weight * itc.loss}, {}
    itm_labels = torch.cat([pairs.labels, torch.ones_like(ids[:, 0])])
    losses["itm"], figures["itm_accuracy"] = match_pairs(run, fused_cls, itm_labels)
    losses["mlm"], figures["mlm_accuracy"] = restore_words(run, batch, matching, masked_ids, mlm_labels)
    if config.model.alignment:
        # choice: ramped up, since from random weights its full pull gathers all features in one point
        alignment = alignment_loss(model.category_feature(text_embeds, keep), image_feat)
        losses["align"] = run.ranks.mean(run.ramp * alignment, len(ids))
    if config.model.detector:
        losses["rtd"], figures["replaced_recall"] = detect_replaced(run, batch, matching, masked_ids, replaced)
    return losses, figures


RECIPES: dict[str, Callable] = {"syncmask": syncmask, "softmask": softmask, "fashionfine": fashionfine, "albef": albef}


def soften(run: Run, words: Tensor, matching: Tensor, attentions: list[Tensor], image_embeds: Tensor) -> Tensor:
    """The image tokens (B, N, D) with the patches suppressed that one of the `words` (B, L), drawn at random, is about:
    ṽ_p = (1 − M_p) · v_p, the CLS as it is. A text without any such word leaves its photo as it is.

    By Grad-CAM of the model in training itself, on its `matching` tokens and their attentions, one a layer."""
    score = run.model.itm_logits(matching)[:, 1].sum()  # pairs are independent, so one gradient serves all
    maps = grad_cam(attentions[middle_layer(len(attentions))], score)
    any_word = words.any(dim=1, keepdim=True)
    word = torch.multinomial((words | ~any_word).float(), 1, generator=run.generator).squeeze(1)
    soft = soft_mask(maps, word) * any_word  # (B, P)
    return torch.cat([image_embeds[:, :1], image_embeds[:, 1:] * (1 - soft[..., None]).to(image_embeds.dtype)], dim=1)


TRUE_RATIO = 0.5  # share of the words that an image shows, which true masks hide (choice)


def choose_masks(run: Run, batch: dict, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Patch mask (B, P) and word mask (B, L) of a training batch: each random, synchronized or true, as configured."""
    config, words, where = run.config, batch["words"], dict(generator=run.generator, device=run.device)
    patch_mask = random_patch_mask(len(words), config.model.grid**2, config.mim_ratio, **where)
    word_mask = random_word_mask(words, config.mlm_ratio, run.generator)
    chosen, modes = {}, {config.patch_mask, config.word_mask}
    if "true" in modes:
        shares = config.mim_ratio, TRUE_RATIO
        chosen["true"] = true_mask(word_regions(batch, config.model.grid), words, *shares, run.generator)
    if "sync" in modes and run.step >= config.mask_warmup:
        chosen["sync"] = synchronize(run, batch, teacher, run.generator)[1:]
    if chosen:
        keep_random = torch.rand(len(words), 1, **where) < config.mask_hint
        if config.patch_mask in chosen:
            patch_mask = torch.where(keep_random, patch_mask, chosen[config.patch_mask][0])
        if config.word_mask in chosen:
            word_mask = torch.where(keep_random, word_mask, chosen[config.word_mask][1])
    return patch_mask, word_mask


def detect_replaced(
    run: Run, batch: dict, fused: Tensor, masked_ids: Tensor, replaced: Tensor
) -> tuple[Tensor, Tensor]:
    """Replaced-token detection on the fused tokens (B, L, D) of all words that can be read. -> loss, recall."""
    legible = batch["described"] & (masked_ids != run.mask_id)
    fused, replaced = pick(legible, fused, replaced)
    logits, labels = run.model.detector(fused), replaced.long()
    found = labels.masked_fill(labels == 0, -100)
    loss = run.ranks.mean(cross_entropy(logits, labels), legible)
    return loss, run.ranks.mean(accuracy(logits, found), found >= 0)


def train(config: TrainConfig, given: set[str] = frozenset(), stop_at: int | None = None) -> dict | None:
    """Train as `config` says, or go on with what --out holds. -> the final line of metrics, None when stopped early.

    stop_at: save and stop after this step. Under torchrun every process calls this; the lines of all but the first lack
    the validation."""
    with claimed(Path(config.out)):
        return pretrain(*begin(config, given, check_flags), stop_at)


def pretrain(config: TrainConfig, state: dict | None, stop_at: int | None = None) -> dict | None:
    """`train` by a recipe, from the start or from a checkpoint's state."""
    ranks = Ranks.join(config.device)
    where = config.model.image_size, config.seed, config.products
    train_set, val_set = (build_dataset(config.data, config.root, split, *where) for split in ("train", "val"))
    if config.prompts:  # held-out texts as the downstream tasks give them: without what the prompts would tell
        train_set.prompts, val_set.lead = True, DESCRIPTION
    print(f"train: {train_set.report()}\nval: {val_set.report()}")
    tokenizer = read_tokenizer(state, f"{config.out}/last.pt") if state else learn_vocabulary(config, train_set)
    report_cut_texts(train_set, tokenizer)
    run = build_run(config, train_set, tokenizer, ranks)
    run.telling = telling_pieces(tokenizer, train_set.captions)
    train_set.truths = "true" in (config.patch_mask, config.word_mask)
    ranks.check_same("training photos or vocabularies", zlib.crc32(tokenizer.to_str().encode(), run.data))
    if config.weights and not state:
        report = load_pretrained(run.model, config.weights)
        if not config.vocab and report.kinds.keys() != {"ViT"}:
            raise ConfigError("--weights of text need --vocab: word embeddings belong to their vocabulary")
        print(report)
        run.momentum.update(run.model, decay=0)

    def held_out(run: Run) -> tuple[dict[str, float], list[str]]:
        (figures, chance), known = validate(run, val_set), truth(run, train_set, val_set) if ranks.leads else {}
        return figures | known, [*chance, *truth_in_words(known)]

    job = Job(f"{config.recipe}, {config.preset}", RECIPES[config.recipe], held_out)
    final = work(run, job, train_set, state, stop_at)
    if ranks.leads:
        draw_masks(run, val_set, first_photos(val_set, 6), Path(config.out) / "masks.png")
    return final


def work(run: Run, job: Job, dataset: PhotoDataset, state: dict | None, stop_at: int | None = None) -> dict | None:
    """The loop over `dataset`, from the start or from a checkpoint's state, with what it leaves in --out."""
    config, ranks, out = run.config, run.ranks, Path(run.config.out)
    run.sampler = GroupedBatchSampler(
        len(dataset),
        config.batch_size,
        mode=grouping_of(config),
        product_ids=dataset.product_ids,
        caption_ids=dataset.caption_ids,
        seed=config.seed,
        margin=config.margin,
        ranks=ranks,
    )
    if len(dataset) // len(run.sampler) < ranks.count:
        raise ConfigError(f"--batch-size {config.batch_size}: too few photos for {ranks.count} processes")
    resumed_step = None
    if state:
        restore(run, state)
        resumed_step = run.step
        decides = {name: value for name, value in asdict(config).items() if name not in FREE_ON_RESUME}
        ranks.check_same("flags or checkpoints", zlib.crc32(repr((run.step, decides)).encode()))
    size = f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.1f} M parameters"
    where = f"{run.device}" + (f", {ranks.count} processes" if ranks.count > 1 else "")
    print(f"{job.name}: {size}, {run.total_steps} steps on {where}, into {out}/")
    taken, why = fitting_precision(run.device)
    print(f"precision {config.precision}" + (f", {why}" if config.precision == taken else f"; auto takes {taken} here"))
    if ranks.leads:
        (out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    metrics = Metrics(out / "metrics.jsonl" if ranks.leads else Path(os.devnull), resumed_step)
    progress = Progress(run, metrics)
    try:
        with StopSignals(second_stops=ranks.count == 1) as stop:
            return loop(run, job, dataset, progress, stop, stop_at)
    finally:
        progress.bar.close()  # or an error would stand behind it
        if ranks.leads and any("loss" in line for line in metrics.lines):
            draw_curves(metrics.lines, out / "curves.png")


def loop(
    run: Run, job: Job, dataset: PhotoDataset, progress: Progress, stop: StopSignals, stop_at: int | None
) -> dict | None:
    """schedule → forward → backward → clip → step → EMA → log → save → validate, until the last step."""
    config, ranks, last = run.config, run.ranks, Path(run.config.out) / "last.pt"
    batches, forward = endless_batches(run, dataset), ranks.parallel(Step(run, job))
    metrics, watch = progress.metrics, FiniteWatch(run, last)
    validate_when_due(run, job, metrics, progress.say)  # a run may have been stopped between saving and validating
    while run.step < run.total_steps and not job.stalled(metrics.lines):  # only fine-tuning, in one process, stalls
        start, lr = time.perf_counter(), learning_rate(run.step, config, run.total_steps)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.seed_step()
        batch, values = next(batches), {}
        progress.left_out(batch["unreadable"])
        if all(ranks.rows):  # otherwise no photo of some rank's share could be read: the step is passed over
            losses, figures = forward(augmented(run, batch))
            loss = sum(losses.values())
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRAD_NORM)
            values = losses | figures | {"loss": loss, "grad_norm": grad_norm}
            watch.note(values)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            run.model.clamp_temp()
            run.momentum.update(run.model, ema_decay(run.step, config.ema_decay))
        elif len(run.unreadable) > len(dataset) // 2:
            raise DataError(f"most photos cannot be read, the last one: {batch['unreadable'][-1]}")
        run.step += 1
        run.sampler.set_epoch(*divmod(run.step, len(run.sampler)))

        done = run.step == run.total_steps
        stopping = ranks.on_any(not done and (bool(stop.caught) or run.step == stop_at))
        log, save = (done or stopping or not run.step % n for n in (config.log_every, config.val_every))
        watch.check(now=log or save)
        progress.count(sum(ranks.rows) if values else 0, time.perf_counter() - start)
        if values and log:
            progress.write(values, lr)
        if save:
            save_checkpoint(run, last)
        if stopping:
            run.writer.wait()
            return progress.stop("as asked" if run.step == stop_at else stop.caught or "signal")
        validate_when_due(run, job, metrics, progress.say)
    run.writer.wait()
    return progress.finish()


def validate_when_due(run: Run, job: Job, metrics: Metrics, say: Callable[[str], None]) -> None:
    """After every so many steps and after the last: write held-out figures, and keep the weights that are best."""
    if not run.step or (run.step < run.total_steps and run.step % run.config.val_every):
        return
    if run.ranks.first_says(metrics.validation(run.step)):
        return
    figures, remarks = job.validate(run)
    run.model.train()
    line = metrics.line(step=run.step, **figures)  # as those before it were written, or a tie would not be one
    if run.ranks.first_says(job.best_step([*metrics.lines, line]) == run.step):
        save_checkpoint(run, Path(run.config.out) / "best.pt")
        run.writer.wait()  # so that the line never lacks its weights
    if run.ranks.leads:
        metrics.write(**line)
        say(f"step {run.step}: " + "  ".join(f"{k[4:]} {v:.3f}" for k, v in figures.items() if k.startswith("val_")))
        for remark in remarks:
            say("    " + remark)
    run.ranks.wait()


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    try:
        config, given = parse_config(argv)
        train(config, given)
    except (ConfigError, DataError, WeightsError, NonFiniteLoss, OSError) as error:
        speak_up()
        sys.exit(f"train.py: {in_one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped before the first step")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
