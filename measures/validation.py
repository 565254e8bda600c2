"""Held-out retrieval, matching and restored words while pretraining goes on."""

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Collate, normalise, to_device
from harness.batches import first_products, one_text_a_product, text_features
from harness.run import Run, autocast
from losses import forbidden_negatives, pick_negatives
from masking import random_word_mask
from measures.scores import full_rankings, recalls_of
from photos.dataset import DataError, PhotoDataset


@torch.no_grad()
def validate(run: Run, dataset: PhotoDataset) -> dict[str, float]:
    """Held-out retrieval, MLM and ITM accuracy, the same draws every time. No photo is cropped or flipped."""
    config, model, generator = run.config, run.model.eval(), torch.Generator().manual_seed(run.config.seed)
    loader = DataLoader(
        first_products(dataset, config.val_products), config.batch_size, collate_fn=Collate(run.tokenizer)
    )
    image_feat, rows, itm, mlm, unreadable = [], [], [], [], 0
    for batch in tqdm(loader, "validating", unit=" batches", leave=False, disable=None):
        unreadable += len(batch["unreadable"])
        if not len(batch["rows"]):
            continue
        rows.append(batch["rows"])
        batch["masked"] = random_word_mask(batch["words"], config.mlm_ratio, generator)
        forbidden = forbidden_negatives(batch["product_ids"], batch["caption_ids"])
        batch["wrong"] = pick_negatives(torch.zeros(forbidden.shape), forbidden, None, "random", generator)
        batch = to_device(batch, run.device)
        ids, keep, masked, wrong = (batch[key] for key in ("token_ids", "attention_mask", "masked", "wrong"))
        with autocast(run):
            image_embeds = model.encode_image(normalise(batch["images"]))
            both = torch.cat([ids, ids.masked_fill(masked, run.mask_id)]), torch.cat([keep, keep])
            text_embeds, masked_embeds = model.encode_text(*both).chunk(2)
            own = torch.arange(len(ids), device=run.device)
            order = torch.cat([own, wrong.clamp(min=0)])  # each photo with its own text, then with a wrong one
            fused_cls = model.fuse_cls(text_embeds[order], keep[order], image_embeds, own.repeat(2))
            matching, not_matching = model.itm_logits(fused_cls).argmax(-1).chunk(2)
            filled = model.fuse(masked_embeds, keep, image_embeds)
            mlm.append(model.mlm_logits(filled[masked]).argmax(-1) == ids[masked])
            image_feat.append(model.image_feature(image_embeds))
        itm.append(torch.cat([matching == 1, (not_matching == 0)[wrong >= 0]]))
    if not rows:
        raise DataError("no photo of the validation split could be read")
    texts, owner = one_text_a_product(dataset, torch.cat(rows).numpy())
    recalls = recalls_of([*full_rankings(torch.cat(image_feat).cpu(), text_features(run, texts).cpu(), owner)])
    figures = {key.removeprefix("full_"): value for key, value in recalls.items() if key != "full_mean"}
    figures["mlm_accuracy"], figures["itm_accuracy"] = (torch.cat(x).float().mean().item() for x in (mlm, itm))
    return {f"val_{key}": value for key, value in (figures | {"unreadable": unreadable}).items()}
