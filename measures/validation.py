"""Held-out retrieval, matching and restored words while pretraining goes on."""

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Collate, normalise, to_device
from harness.batches import first_products, text_features
from harness.run import Run, autocast
from losses import forbidden_negatives, pick_negatives
from masking import random_word_mask
from measures.scores import retrieval_recalls
from photos.dataset import DataError, PhotoDataset


@torch.no_grad()
def validate(run: Run, dataset: PhotoDataset) -> dict[str, float]:
    """Held-out retrieval, MLM and ITM accuracy, the same draws every time. No photo is cropped or flipped."""
    generator = torch.Generator().manual_seed(run.config.seed)
    shown = first_products(dataset, run.config.val_products)
    loader = DataLoader(shown, run.config.batch_size, collate_fn=Collate(run.tokenizer))
    model = run.model.eval()
    images, products, itm, mlm, captions, unreadable = [], [], [], [], {}, 0
    for batch in tqdm(loader, "validating", unit=" batches", leave=False, disable=None):
        unreadable += len(batch["unreadable"])
        if not len(batch["rows"]):
            continue
        word_mask = random_word_mask(batch["words"], run.config.mlm_ratio, generator)
        forbidden = forbidden_negatives(batch["product_ids"], batch["caption_ids"])
        wrong = pick_negatives(
            torch.zeros_like(forbidden, dtype=torch.float), forbidden, mode="random", generator=generator
        )
        for product, row in zip(batch["product_ids"].tolist(), batch["rows"].tolist(), strict=True):
            captions.setdefault(product, row)  # the text of a product is that of its first photo
        batch, word_mask, wrong = to_device(batch, run.device), word_mask.to(run.device), wrong.to(run.device)
        keep, ids = batch["attention_mask"], batch["token_ids"]
        hidden = ids.masked_fill(word_mask, run.mask_id)
        with autocast(run):
            image_embeds = model.encode_image(normalise(batch["images"]))
            text_embeds, hidden_embeds = model.encode_text(torch.cat([ids, hidden]), torch.cat([keep, keep])).chunk(2)
            pair = torch.cat([text_embeds, text_embeds[wrong.clamp(min=0)], hidden_embeds])
            keeps, photos = torch.cat([keep, keep[wrong.clamp(min=0)], keep]), torch.arange(len(ids)).repeat(3)
            paired, filled = model.fuse(pair, keeps, image_embeds, photos=photos.to(run.device), only_cls=2 * len(ids))
            matching, not_matching = model.itm_logits(paired).argmax(-1).chunk(2)
            right = [(matching == 1).float(), (not_matching == 0).float()]
            restored = (model.mlm_logits(filled[word_mask]).argmax(-1) == ids[word_mask]).float()
            images.append(model.image_feature(image_embeds))
        itm.append(torch.cat([right[0], right[1][wrong >= 0]]))
        mlm.append(restored)
        products.append(batch["product_ids"])
    if not images:
        raise DataError("no photo of the validation split could be read")
    texts = text_features(run, [dataset.text(row) for row in captions.values()])
    known = torch.tensor(list(captions), device=run.device)
    recalls = retrieval_recalls(torch.cat(images), texts, torch.cat(products), known)
    figures = recalls | {"mlm_accuracy": torch.cat(mlm).mean().item(), "itm_accuracy": torch.cat(itm).mean().item()}
    figures["unreadable"] = unreadable
    return {f"val_{key}": value for key, value in figures.items()}
