"""One image and its caption on their way through the code: the shapes and numbers of docs/walkthrough.md.

python tutorial/walkthrough.py                                  a model with random weights, seconds on a CPU
python tutorial/walkthrough.py --checkpoint runs/…/last.pt      a trained one (of synthetic products), the same images

With random weights every loss is near the loss of a model that knows nothing, or above it.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch import Tensor

from data import FREQUENT, normalise, telling_pieces
from engine.batches import learn_vocabulary
from engine.config import ema_decay, parse_config
from engine.flags import ConfigError
from engine.run import Run, build_run
from engine.wiring import contrast, synchronize, teach
from evaluation.truth import grouped, mask_truth, momentum_features, word_truth
from experiments.figures import open_run
from losses import NegativeMode, cross_entropy, itc_targets, mim_loss, pick_negatives, same_pairs
from masking import (
    average_attention,
    grad_cam,
    masked_attention,
    middle_layer,
    random_word_mask,
    soft_mask,
    split_patches,
)
from model import FeatureQueue
from readers.dataset import DataError
from readers.synthetic import Synthetic
from train import RECIPES

PRODUCTS = 96
BATCH = 16  # the image, another view of its product, the fronts of the next fourteen products


def show(name: str, value: Tensor | float | str, remark: str = "") -> None:
    """Print a tensor by its shape, a number to three digits, a string as it is."""
    if isinstance(value, Tensor) and value.ndim:
        value = f"({', '.join(map(str, value.shape))})"
    elif not isinstance(value, str):
        value = f"{value:.3f}"
    print(f"    {name:<20}{value:<20}{remark}".rstrip())


def read(run: Run, ids: Tensor) -> str:
    """Join tokens (X,) to words."""
    tokens = [run.tokenizer.id_to_token(number) for number in ids.tolist()]
    return " ".join(tokens).replace(" ##", "")


def seeded(run: Run) -> torch.Generator:
    """Begin the same random numbers, for this stop and for the recipes."""
    run.generator = torch.Generator().manual_seed(0)
    return run.generator


def walk(run: Run, dataset: Synthetic) -> None:
    """Print every stop, from the data to the question whether the masks help. The image followed is the first.

    Letters: B batch, L text tokens, N image tokens, P patches, h heads, D width, E shared embedding, V vocabulary."""
    dataset.truths = True
    run.config = replace(run.config, val_products=PRODUCTS // 2, precision="fp32")
    run.step = 10**6  # past every warm-up
    run.queue = FeatureQueue(0)  # or features of one stop would be keys of the next
    config, model = run.config, run.model.eval()
    begins = [caption.split(".")[0] for caption in dataset.captions]

    print("1 truth")
    rows = [int((dataset.product_ids == product).argmax()) for product in range(BATCH - 1)]
    rows.insert(1, rows[0] + 1)
    batch = run.collate([dataset[row] for row in rows])
    known = word_truth(batch, config.model.grid)
    batch["images"] = normalise(batch["images"])
    images, ids, keep, words = batch["images"], batch["token_ids"], batch["attention_mask"], batch["words"]
    regions, attribute, visible = known.regions, known.attribute, known.visible  # (B, L, P), (B, L), (B, L)
    show("images", images, "the image: product 0 from the front; then its back, 14 others")
    show("token_ids", ids, f"its caption: {int(keep[0].sum())} tokens with [CLS] and [SEP], the rest [PAD]")
    maskable = len(words[0].unique()) - 1
    show("words", words, f"{maskable} of its words may be masked: in no more than {FREQUENT:.0%} of the captions")
    show("regions", regions, "patches where the image shows what a token names")
    show("shown", read(run, ids[0, visible[0]]))
    show("named, not shown", read(run, ids[0, attribute[0] & ~visible[0]]))

    print("2 attention")
    image_embeds = model.vision(images)  # (B, N, D)
    text_embeds = model.text(ids, keep)  # (B, L, D)
    image_kv = model.fusion.project_image_kv(image_embeds)
    fused, attentions = model.fusion(text_embeds, keep, image_kv, return_attention=True)
    fused_elsewhere = model.fusion(text_embeds, keep, image_kv, torch.arange(BATCH).roll(2))
    heat = average_attention(attentions[:1])  # (B, L, P)
    place = visible[0].nonzero()[0, 0]
    patches = heat.shape[2]
    show("image_embeds", image_embeds, f"CLS and {patches} patches; {config.model.registers} registers are dropped")
    show("text_embeds", text_embeds)
    show("A", attentions[0], f"of the first fusion layer; each row sums to {attentions[0][0, 0, place].sum():.3f}")
    word = read(run, ids[0, place : place + 1])
    show("largest of a row", heat[0, place].max(), f"of '{word}', mean over heads; all alike {1 / patches:.3f}")
    show("fused", fused, f"after all {len(attentions)} layers")
    moved = (fused - fused_elsewhere).norm() / fused.norm()
    show("another image", moved, "moves the tokens by this share of their length")

    print("3 momentum")
    teacher = teach(run, batch)
    weights = sum(parameter.numel() for parameter in model.parameters())
    vocabulary = config.model.vocab_size
    show("weights", f"{weights:,}", f"of a vocabulary of {vocabulary}; as many again in the momentum encoder")
    for step in (0, 100, 10_000):
        show(f"decay, step {step:,}", ema_decay(step, config.ema_decay))

    print("4 ITC")
    itc = contrast(run, batch, model.project_image(image_embeds), model.project_text(text_embeds), teacher)
    forbidden = same_pairs(batch["product_ids"], batch["caption_ids"])  # (B, B)
    targets = itc_targets(forbidden, torch.zeros(BATCH, BATCH), 0.0)
    least = torch.special.entr(targets).sum(dim=1).mean()
    temp = model.temp.item()
    show("image_feat", teacher.image_feat, "of the momentum encoder: the keys; unit length")
    show("sim_i2t", itc.sim_i2t, f"cosines over the temperature, {temp:.3f}")
    show("targets", targets, f"row 0: {targets[0, 0]:.1f} itself, {targets[0, 1]:.1f} the other view")
    show("loss", itc.loss, f"ln {BATCH} = {math.log(BATCH):.3f} if all look alike; {least:.3f} at best")

    print("5 negatives")
    cosines = itc.sim_i2t[0] * temp
    show("forbidden", forbidden, f"{int(forbidden.sum())} pairs: the diagonal, and both views both ways")
    show("own pair", cosines[0], "cosine")
    for mode in get_args(NegativeMode):
        chosen = pick_negatives(itc.sim_i2t, forbidden, None, mode, seeded(run), config.margin / temp)[0]
        show(mode, cosines[chosen], f"cosine; '{begins[rows[chosen]]}'")
    show("hard_share", run.hard_share, f"are {config.negatives}, the others random")

    print("6 MLM")
    word_mask = random_word_mask(words, config.mlm_ratio, seeded(run))
    masked_ids, labels = run.corrupt(ids, word_mask)
    masked_embeds = model.text(masked_ids, keep)
    logits = model.mlm_logits(model.fusion(masked_embeds, keep, image_kv)[word_mask])
    loss = cross_entropy(logits, labels[word_mask])
    gone = (masked_ids == run.mask_id)[word_mask].float().mean()
    kept = (masked_ids == ids)[word_mask].float().mean()
    show("word_mask", word_mask, f"{config.mlm_ratio:.0%} of the words; here: {read(run, ids[0, word_mask[0]])}")
    of_masked = f"{gone:.0%} of the masked [MASK], {1 - gone - kept:.0%} another word, {kept:.0%} kept"
    show("masked_ids", masked_ids, of_masked)
    show("logits", logits, "of the masked tokens alone, over the vocabulary")
    show("loss", loss, f"ln {vocabulary} = {math.log(vocabulary):.3f} if all words were as likely")

    print("7 image gain")
    maps, log_p = masked_attention(run.momentum.model, batch, teacher.photos, run.mask_id, seeded(run))
    gains = log_p[0] - log_p[1]
    named = attribute & (words > 0)
    show("maps", maps[0], f"a row of each word's own pass, for each of {len(maps)} layers")
    show("gains", gains, "log p of a masked word with its image, minus with another image")
    show("of words shown", gains[named & visible].mean(), "mean gain, in nats")
    show("of words not shown", gains[named & ~visible].mean())

    print("8 sync_mask")
    attention, patch_mask, word_mask = synchronize(run, batch, teacher, seeded(run))
    on_named = regions.any(dim=1)  # (B, P)
    show("attention", attention, "mean over heads, geometric mean over layers")
    show("patch mask", patch_mask, f"{int(patch_mask[0].sum())} of {patches} patches")
    show("word mask", word_mask, f"of the image: {read(run, ids[0, word_mask[0]])}")
    right, chance = on_named[patch_mask].float().mean(), on_named.float().mean()
    show("right patches", right, f"lie on what the caption names; of all patches {chance:.3f}")
    right, chance = visible[word_mask & named].float().mean(), visible[named].float().mean()
    show("right words", right, f"of the masked attributes are shown; of all attributes {chance:.3f}")

    print("9 MIM")
    ids_keep, ids_masked = split_patches(patch_mask, config.mim_ratio)
    visible_embeds = model.vision(images, ids_keep)
    pixels = model.decoder(visible_embeds, ids_keep, ids_masked, text_embeds, keep)
    show("ids_keep", ids_keep, "indices of the patches that the ViT sees")
    show("visible_embeds", visible_embeds, "and CLS")
    show("pixels", pixels, "of the masked patches, three colours each")
    loss = mim_loss(pixels, images, ids_masked)
    show("loss", loss, "1 for grey: pixels have mean 0 and deviation 1 in each patch")

    print("10 syncmask")
    seeded(run)
    losses, figures = RECIPES["syncmask"](run, batch)
    remarks = {
        "itc": f"stop 4, times {config.itc_weight:g}",
        "itm": "undecided 0.693; knowing only that two in three are wrong 0.637",
        "mlm": "stop 6, with the words of this step",
        "mim": f"stop 9, times {config.mim_weight:g}",
    }
    for name, loss in losses.items():
        show(name, loss, remarks[name])
    show("sum", sum(losses.values()), "what is differentiated")
    show("itm_accuracy", figures["itm_accuracy"], f"of {3 * BATCH} pairs")

    print("11 grouped batches")
    block = (dataset.product_ids < PRODUCTS).nonzero()[0]
    image_feat, text_feat = momentum_features(run, dataset, block)
    sim = image_feat @ text_feat.T
    groups = np.stack([dataset.product_ids[block], dataset.caption_ids[block]])
    allowed = sim.masked_fill(same_pairs(*torch.from_numpy(groups)), -1)
    show("sim", sim, f"cosines of a search block: {len(block)} images of {PRODUCTS} products")
    for mode in ("random", "semihard", "hard"):
        batches = grouped(sim, groups, mode, replace(config, batch_size=BATCH))
        nearest = []
        for items in batches:
            cosines = allowed[items][:, items]
            nearest += [cosines.amax(dim=1), cosines.amax(dim=0)]  # of every image, then of every caption
        show(mode, torch.cat(nearest).mean(), f"cosine of the nearest negative, mean over {len(batches)} batches")
    chain = [begins[block[item]] for item in batches[0][:4]]
    show("its chain begins", " → ".join(chain))

    print("12 soft masks")
    layer = middle_layer(len(attentions))  # as train.soften reads it
    cam = grad_cam(attentions[layer], model.itm_logits(fused)[:, 1].sum())
    first = visible.byte().argmax(dim=1)  # the first word of each caption that its image shows
    mask = soft_mask(cam, first)
    about = regions[torch.arange(BATCH), first]
    show("Grad-CAM", cam, f"of the middle layer: of {len(attentions)}, number {layer + 1}")
    show("M", mask, f"of '{word}'; from {mask[0].min():.3f} to {mask[0].max():.3f}")
    show("on what it names", mask[about].mean(), f"mean of M there; elsewhere {mask[~about].mean():.3f}")

    print("13 does it work?")
    found = mask_truth(run, dataset)
    remarks = {
        "patch_cooccurrence": "masked patches, on something named",
        "word_cooccurrence": "masked attribute words, shown",
        "pointing": "detail words whose most attended patch is right",
    }
    for key, remark in remarks.items():
        show(key, found[key], f"{remark}; by chance {found[key + '_random']:.3f}")
    show("photo_gain", found["photo_gain"], "words predicted, minus those with another image")


def open_walk(checkpoint: Path | None) -> tuple[Run, Synthetic]:
    """Open a trained run, or make one with random weights and the vocabulary of the captions that are read."""
    if checkpoint:
        run, dataset = open_run(checkpoint, None, "cpu")
        if not isinstance(dataset, Synthetic):
            raise ConfigError(f"{checkpoint} was trained on {run.config.data}, whose truth is not known")
        return run, dataset
    config, _ = parse_config(["--precision", "fp32", "--device", "cpu"])
    dataset = Synthetic("val", PRODUCTS, config.model.image_size, progress=False)
    run = build_run(config, dataset, learn_vocabulary(config, dataset))
    run.telling = telling_pieces(run.tokenizer, dataset.captions)
    return run, dataset


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("walkthrough.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, help="last.pt of a run on synthetic photos; default: random weights")
    args = parser.parse_args(argv)
    try:
        run, dataset = open_walk(args.checkpoint)
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"walkthrough.py: {error}")
    walk(run, dataset)


if __name__ == "__main__":
    main()
