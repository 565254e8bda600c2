"""Held-out retrieval, matching and restored words while pretraining goes on."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import normalise, to_device
from engine.batches import first_products, text_features, texts_to_search
from engine.host import own_session
from engine.run import Run, autocast
from evaluation.scores import full_rankings, recalls_of
from losses import pick_negatives, same_pairs
from masking import random_word_mask
from readers.dataset import DataError, PhotoDataset


@torch.no_grad()
def validate(run: Run, dataset: PhotoDataset) -> tuple[dict[str, float], list[str]]:
    """Held-out retrieval, MLM and ITM accuracy, the same draws every time. No photo is cropped or flipped. Every rank
    takes its share of the batches, and the first one, to whom the figures are given, ranks photos and texts.
    -> figures, and in a line what chance would give."""
    config, ranks = run.config, run.ranks
    run.model.eval()
    shown = first_products(dataset, config.val_products)
    batches = [rows.tolist() for rows in torch.arange(len(shown)).split(min(config.batch_size, 64))]  # some for each
    mine, found = range(len(batches))[ranks.rank :: ranks.count], [None] * len(batches)
    loader = DataLoader(
        shown, batch_sampler=[batches[number] for number in mine], collate_fn=run.collate,
        num_workers=config.workers, worker_init_fn=own_session,
    )  # fmt: skip
    bar = tqdm(loader, "validating", unit=" batches", leave=False, disable=None)
    for number, batch in zip(mine, bar, strict=True):
        found[number] = len(batch["unreadable"]), []
        if not len(batch["rows"]):
            continue
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + number)
        batch["masked"] = random_word_mask(batch["words"], config.mlm_ratio, generator)
        forbidden = same_pairs(batch["product_ids"], batch["caption_ids"])
        batch["wrong"] = pick_negatives(torch.zeros(forbidden.shape), forbidden, None, "random", generator)
        batch = to_device(batch, run.device)
        with autocast(run):
            found[number][1].extend(part.cpu() for part in (batch["rows"], *held_out_batch(run, batch)))
    merged = ranks.merge(found)
    if not ranks.leads:
        return {}, []
    if not any(parts for _, parts in merged):
        raise DataError("no photo of the validation split could be read")
    parts = zip(*(parts for _, parts in merged if parts), strict=True)
    rows, image_feat, mlm, elsewhere, itm = map(torch.cat, parts)
    texts, *owners = texts_to_search(dataset, rows.numpy())
    rankings = [*full_rankings(image_feat, text_features(run, texts).cpu(), *owners)]
    recalls = recalls_of(rankings)
    figures = {key.removeprefix("full_"): value for key, value in recalls.items() if key != "full_mean"}
    share = lambda hits: hits.float().mean().item()
    figures |= {"mlm_accuracy": share(mlm), "photo_gain": share(mlm) - share(elsewhere), "itm_accuracy": share(itm)}
    figures["unreadable"] = sum(unreadable for unreadable, _ in merged)
    chance = {key: value for ranking in rankings for key, value in ranking.chance().items()}
    by_chance = "  ".join(f"{key.removeprefix('full_')} {chance[key]:.3f}" for key in recalls if key in chance)
    return {f"val_{key}": value for key, value in figures.items()}, [f"by chance: {by_chance}"]


def held_out_batch(run: Run, batch: dict) -> tuple[Tensor, ...]:
    """Of a batch with `masked` words and, for each photo, a `wrong` one of another product: image_feat (B, E); which
    masked words are restored from their photo, and which from the wrong one; which pairs of photo and text, matching
    and wrong ones, are told rightly."""
    model, own = run.model, torch.arange(len(batch["rows"]), device=run.device)
    ids, keep, masked, wrong = (batch[key] for key in ("token_ids", "attention_mask", "masked", "wrong"))
    elsewhere = wrong.clamp(min=0)
    image_embeds = model.vision(normalise(batch["images"]))
    both = torch.cat([ids, ids.masked_fill(masked, run.mask_id)]), torch.cat([keep, keep])
    text_embeds, masked_embeds = model.text(*both).chunk(2)
    photos = model.fusion.project_image_kv(image_embeds)
    order = torch.cat([own, elsewhere])  # each photo with its own text, then with a wrong one
    fused_cls = model.fusion(text_embeds[order], keep[order], photos, own.repeat(2), cls_only=True)
    matching, not_matching = model.itm_logits(fused_cls).argmax(-1).chunk(2)
    filled = model.fusion(masked_embeds, keep, photos), model.fusion(masked_embeds, keep, photos, elsewhere)
    restored = [model.mlm_logits(fused[masked]).argmax(-1) == ids[masked] for fused in filled]
    told = torch.cat([matching == 1, (not_matching == 0)[wrong >= 0]])
    return model.image_feature(image_embeds), *restored, told
