"""Held-out retrieval, ITM and MLM accuracy while pretraining goes on."""

from collections import defaultdict

import torch
from torch import Tensor

from engine.batches import batches_of, first_products, text_features, texts_to_search
from engine.run import Run, autocast
from evaluation.scores import full_rankings, recalls_of
from losses import pick_negatives, same_pairs
from masking import random_word_mask
from readers.dataset import PhotoDataset


@torch.no_grad()
def validate(run: Run, dataset: PhotoDataset) -> tuple[dict[str, float], str]:
    """Measure retrieval, ITM and MLM on held-out products, with the same random draws every time.

    -> metrics, and a line with the recalls of a random order
    """
    run.model.eval()
    shown = first_products(dataset, run.config.val_products)
    outputs = defaultdict(list)
    for number, batch in enumerate(batches_of(run, shown, "validating")):
        generator = torch.Generator(run.device).manual_seed((run.config.seed * 1_000_003 + number) % 2**63)
        with autocast(run):
            predicted = predict_batch(run, batch, generator)
        outputs["rows"].append(batch["rows"].cpu())
        for key, value in predicted.items():
            outputs[key].append(value.cpu())
    outputs = {key: torch.cat(parts) for key, parts in outputs.items()}

    texts, image_products, text_products = texts_to_search(dataset, outputs["rows"].numpy())
    text_feat = text_features(run, texts).cpu()
    rankings = full_rankings(outputs["image_feat"], text_feat, image_products, text_products)
    metrics = {key.replace("full", "val"): value for key, value in recalls_of(rankings).items()}
    del metrics["val_mean"]
    chance = rankings[0].chance() | rankings[1].chance()
    by_chance = [f"{key.removeprefix('full_')} {value:.3f}" for key, value in chance.items()]

    mlm_accuracy = outputs["mlm_hits"].float().mean().item()
    mlm_accuracy_other = outputs["mlm_hits_other"].float().mean().item()
    metrics["val_mlm_accuracy"] = mlm_accuracy
    metrics["val_image_gain"] = mlm_accuracy - mlm_accuracy_other
    metrics["val_itm_accuracy"] = outputs["itm_hits"].float().mean().item()
    metrics["val_unreadable"] = len(shown) - len(outputs["rows"])
    return metrics, "by chance: " + "  ".join(by_chance)


def predict_batch(run: Run, batch: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """Predict, for a batch of held-out images, whether captions match them and which words are masked.

    -> image_feat (B, E); mlm_hits (M,): masked tokens predicted from their own image, mlm_hits_other (M,): from the
    image of another product; itm_hits (≤ 2B,): pairs that are told rightly to match or not
    """
    model = run.model
    ids, attention_mask = batch["token_ids"], batch["attention_mask"]  # (B, L)
    masked = random_word_mask(batch["maskable"], run.config.mlm_ratio, generator)  # (B, L)
    other = draw_other(batch, generator)
    has_other = other >= 0
    other = other.clamp(min=0)

    image_embeds = model.vision(batch["images"])
    image_kv = model.fusion.project_image_kv(image_embeds)
    text_embeds = model.text(ids, attention_mask)
    masked_embeds = model.text(ids.masked_fill(masked, run.mask_id), attention_mask)

    # ITM: each image with its own caption, then with one of another product
    matching = model.fusion(text_embeds, attention_mask, image_kv, cls_only=True)
    wrong = model.fusion(text_embeds[other], attention_mask[other], image_kv, cls_only=True)
    own_hits = model.itm_logits(matching).argmax(dim=1) == 1
    wrong_hits = model.itm_logits(wrong).argmax(dim=1) == 0

    # MLM: from the own image, then from one of another product
    labels = ids[masked]
    fused = model.fusion(masked_embeds, attention_mask, image_kv)
    fused_other = model.fusion(masked_embeds, attention_mask, image_kv, image_index=other)
    return {
        "image_feat": model.image_feature(image_embeds),
        "mlm_hits": model.mlm_logits(fused[masked]).argmax(dim=1) == labels,
        "mlm_hits_other": model.mlm_logits(fused_other[masked]).argmax(dim=1) == labels,
        "itm_hits": torch.cat([own_hits, wrong_hits[has_other]]),
    }


def draw_other(batch: dict, generator: torch.Generator) -> Tensor:
    """Draw for each pair of a batch another one, of another product. -> (B,), −1 where there is none"""
    forbidden = same_pairs(batch["product_ids"], batch["caption_ids"])
    return pick_negatives(torch.zeros_like(forbidden, dtype=torch.float), forbidden, "random", generator)
