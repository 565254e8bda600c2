"""One image and its caption on their way through the code, one stop a cell: see docs/walkthrough.md.

python tutorial/walkthrough.py                                  a model with random weights, seconds on a CPU
python tutorial/walkthrough.py --checkpoint runs/…/last.pt      a trained one (of synthetic products), the same images

VS Code, PyCharm and Jupyter (with jupytext) run it cell by cell: change a line, run its cell, see what moves.

Letters: B batch, L text tokens, N image tokens, P patches, h heads, D width, E shared embedding, V vocabulary.
"""

# %% Imports
import math
import sys
from dataclasses import replace
from pathlib import Path

# the root of the checkout: VS Code runs cells in tutorial/
sys.path.insert(0, "." if Path("train.py").exists() else "..")
import numpy as np
import torch
from tokenizers import decoders
from torch import Tensor

from data import MAX_DOC_FREQ, informative_pieces, normalise
from engine.batches import learn_vocabulary
from engine.config import ema_decay, itm_hard_share, parse_config
from engine.flags import ConfigError
from engine.run import build_run
from evaluation.ground_truth import grouped, mask_metrics, momentum_features, token_labels
from experiments.figures import open_run
from losses import itc_targets, mim_loss, mlm_loss, pick_negatives, positive_pairs
from masking import (
    average_attention,
    corrupt_words,
    itm_grad_cam,
    masked_attention,
    random_word_mask,
    score_words,
    soft_mask,
    split_patches,
    sync_mask,
)
from readers.dataset import DataError
from readers.synthetic import Synthetic
from train import compute_itc, encode_momentum, syncmask

CHECKPOINT = ""  # last.pt of a run on synthetic images; "": random weights
if "--checkpoint" in sys.argv:
    CHECKPOINT = sys.argv[-1]
PRODUCTS = 96
BATCH = 16  # the image, another view of its product, the fronts of the next fourteen products


def show(name: str, value: Tensor | float | str, remark: str = "") -> None:
    """Print a tensor by its shape, a number to three digits, text as it is."""
    if isinstance(value, Tensor) and value.ndim:
        value = str(tuple(value.shape))
    elif not isinstance(value, str):
        value = f"{value:.3f}"
    print(f"    {name:<20}{value:<20}{remark}".rstrip())


# %% The run
if CHECKPOINT:
    try:
        run, dataset = open_run(Path(CHECKPOINT), None, "cpu")
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"walkthrough.py: {error}")
    if not isinstance(dataset, Synthetic):
        sys.exit(f"walkthrough.py: {CHECKPOINT} was trained on {run.config.data}, whose ground truth is not known")
else:
    config, _ = parse_config(["--device", "cpu"])
    dataset = Synthetic("val", PRODUCTS, config.model.image_size, progress=False)
    run = build_run(config, dataset, learn_vocabulary(config, dataset))
    run.informative = informative_pieces(run.tokenizer, dataset.captions)

run.config = replace(run.config, val_products=PRODUCTS // 2, workers=0, precision="fp32")
config = run.config
model = run.model.eval()
momentum = run.momentum.model
tokenizer = run.tokenizer
tokenizer.decoder = decoders.WordPiece()  # joins the pieces of a word
generator = run.generator = torch.Generator()  # seeded anew at each stop
run.step = 10**6  # past every warm-up

# %% 1. Truth
# The walk follows the first image of a batch. The image is drawn, so it is known what it shows and where.
# R[b, w, p] = 1 where patch p of image b shows what token w names
print("1 truth")
_, fronts = np.unique(dataset.product_ids, return_index=True)  # the first image of each product
rows = [0, 1, *fronts[1 : BATCH - 1].tolist()]
dataset.with_ground_truth = True
batch = run.collate([dataset[row] for row in rows])
truth = token_labels(batch, config.model.grid)
batch["images"] = normalise(batch["images"])
images, ids, attention_mask, words = batch["images"], batch["token_ids"], batch["attention_mask"], batch["maskable"]
regions, attribute, visible = truth.regions, truth.attribute, truth.visible  # (B, L, P), (B, L), (B, L)
maskable = len(words[0].unique()) - 1
show("images", images, "the image: product 0 from the front; then its back, 14 others")
show("token_ids", ids, f"its caption: {attention_mask[0].sum()} tokens with [CLS] and [SEP], the rest [PAD]")
show("words", words, f"{maskable} of its words may be masked: in no more than {MAX_DOC_FREQ:.0%} of the captions")
show("regions", regions, "patches where the image shows what a token names")
show("shown", tokenizer.decode(ids[0, visible[0]].tolist()))
show("named, not shown", tokenizer.decode(ids[0, attribute[0] & ~visible[0]].tolist()))

# %% 2. Attention
# Two encoders turn image and caption into tokens. In the fusion encoder each text token attends to the image.
# A = softmax(q kᵀ / √(D / h))
print("2 attention")
image_embeds = model.vision(images)  # (B, N, D)
text_embeds = model.text(ids, attention_mask)  # (B, L, D)
image_kv = model.fusion.project_image_kv(image_embeds)
fused, attentions = model.fusion(text_embeds, attention_mask, image_kv, return_attention=True)
heat = average_attention(attentions[:1])  # (B, L, P)
patches = heat.shape[2]
first_shown = visible.byte().argmax(dim=1)  # (B,): the first token of each caption that its image shows
place = first_shown[0]
word = tokenizer.decode([ids[0, place].item()])
show("image_embeds", image_embeds, f"CLS and {patches} patches; {config.model.registers} registers are dropped")
show("text_embeds", text_embeds)
show("A", attentions[0], f"of the first fusion layer; each row sums to {attentions[0][0, 0, place].sum():.3f}")
show("largest of a row", heat[0, place].max(), f"of '{word}', mean over heads; all alike {1 / patches:.3f}")
show("fused", fused, f"after all {len(attentions)} layers")
fused_other = model.fusion(text_embeds, attention_mask, image_kv, image_index=torch.arange(BATCH).roll(2))
moved = (fused - fused_other).norm() / fused.norm()
show("another image", moved, "moves the tokens by this share of their length")

# %% 3. Momentum
# The momentum encoder is a slow average of the model. It gives ITC its keys, and the masks their attention.
# θₘ ← d·θₘ + (1 − d)·θ
print("3 momentum")
image_embeds_m, text_embeds_m, image_feat_m, text_feat_m = encode_momentum(run, batch)
weights = sum(parameter.numel() for parameter in model.parameters())
vocabulary = config.model.vocab_size
show("weights", f"{weights:,}", f"of a vocabulary of {vocabulary}; as many again in the momentum encoder")
for step in (0, 100, 10_000):
    show(f"decay, step {step:,}", ema_decay(step, config.ema_decay))

# %% 4. ITC
# In image-text contrast the own caption of an image shall be the nearest caption of the batch, and vice versa.
# s = f_image · f_text / τ,  L = −½ Σ over both directions of mean_b Σ_j y_bj log softmax(s)_bj
print("4 ITC")
image_feat = model.project_image(image_embeds)  # (B, E)
text_feat = model.project_text(text_embeds)  # (B, E)
itc, sim_i2t, sim_t2i = compute_itc(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)
temp = model.temp.item()
positives = positive_pairs(batch["product_ids"], batch["caption_ids"])  # (B, B)
targets = itc_targets(positives, sim_i2t, alpha=0.0)
least = torch.special.entr(targets).sum(dim=1).mean()
show("image_feat", image_feat_m, "of the momentum encoder: the keys; unit length")
show("sim_i2t", sim_i2t, f"cosines over the temperature, {temp:.3f}")
show("targets", targets, f"row 0: {targets[0, 0]:.1f} itself, {targets[0, 1]:.1f} the other view")
show("loss", itc, f"ln {BATCH} = {math.log(BATCH):.3f} if all look alike; {least:.3f} at best")

# %% 5. Negatives
# Image-text matching needs wrong pairs. They are chosen inside the batch by the cosines of ITC.
# hard: argmax_j s_bj,  semihard: argmax of those with s_bj < s_bb − margin,  both without positives j
print("5 negatives")
cosines = sim_i2t[0] * temp
titles = [caption.split(".")[0] for caption in dataset.captions]
show("positives", positives, f"{positives.sum()} pairs: the diagonal, and both views both ways")
show("own pair", cosines[0], "cosine")
for mode in ("random", "similar", "hard", "semihard"):
    chosen = pick_negatives(sim_i2t, positives, mode, generator.manual_seed(0), config.margin / temp)
    show(mode, cosines[chosen[0]], f"cosine; '{titles[rows[chosen[0]]]}'")
show("hard_share", itm_hard_share(run.step, config), f"are {config.negatives}, the others random")

# %% 6. MLM
# Masked language modelling masks whole words. The model predicts them from the other words and the image.
# L = −mean over masked w of log p(w | the other words, image)
print("6 MLM")
random_mask = random_word_mask(words, config.mlm_ratio, generator.manual_seed(0))
masked_ids, mlm_labels = corrupt_words(ids, random_mask, run.mask_id, run.replacement_ids, generator)
masked_embeds = model.text(masked_ids, attention_mask)
logits = model.mlm_logits(model.fusion(masked_embeds, attention_mask, image_kv)[random_mask])
mlm = mlm_loss(logits, mlm_labels[random_mask])
gone = (masked_ids == run.mask_id)[random_mask].float().mean()
kept = (masked_ids == ids)[random_mask].float().mean()
masked_words = tokenizer.decode(ids[0, random_mask[0]].tolist())
show("word_mask", random_mask, f"{config.mlm_ratio:.0%} of the words; here: {masked_words}")
show("masked_ids", masked_ids, f"{gone:.0%} of the masked [MASK], {1 - gone - kept:.0%} another word, {kept:.0%} kept")
show("logits", logits, "of the masked tokens alone, over the vocabulary")
show("loss", mlm, f"ln {vocabulary} = {math.log(vocabulary):.3f} if all words were as likely")

# %% 7. Image gain
# A word is worth masking if its own image helps to predict it. The momentum encoder masks each word once.
# gain_w = log p(w | image, rest) − log p(w | another image, rest)
print("7 image gain")
image_kv_m = momentum.fusion.project_image_kv(image_embeds_m)
maps, log_p = masked_attention(momentum, batch, image_kv_m, run.mask_id, generator.manual_seed(0))
gains = log_p[0] - log_p[1]
named = attribute & (words > 0)
show("maps", maps[0], f"a row of each word's own pass, for each of {len(maps)} layers")
show("gains", gains, "log p of a masked word with its image, minus with another image")
show("of words shown", gains[named & visible].mean(), "mean gain, in nats")
show("of words not shown", gains[named & ~visible].mean())

# %% 8. sync_mask
# SyncMask masks the words and the patches that image and caption have in common, together.
# score_w = gain_w: half of the words, drawn from the best 60 %
# score_p = mean over masked w of A[w, p]: the best half of the patches
print("8 sync_mask")
generator.manual_seed(0)
attention, scores = score_words(momentum, batch, image_kv_m, text_embeds_m, run.mask_id, config.mask_source, generator)
patch_mask, word_mask = sync_mask(
    attention, scores, words, config.mim_ratio, config.mlm_ratio, config.word_pool, generator
)
show("attention", attention, "mean over heads, geometric mean over layers")
show("patch mask", patch_mask, f"{patch_mask[0].sum()} of {patches} patches")
show("word mask", word_mask, f"of the image: {tokenizer.decode(ids[0, word_mask[0]].tolist())}")
on_named = regions.any(dim=1)  # (B, P)
right = on_named[patch_mask].float().mean()
chance = on_named.float().mean()
show("right patches", right, f"lie on what the caption names; of all patches {chance:.3f}")
right = visible[word_mask & named].float().mean()
chance = visible[named].float().mean()
show("right words", right, f"of the masked attributes are shown; of all attributes {chance:.3f}")

# %% 9. MIM
# In masked image modelling the ViT sees half of the patches. A decoder predicts the others from these and the caption.
# L = mean over masked p and their pixels of (x̂_p − (x_p − mean x_p) / std x_p)²
print("9 MIM")
ids_keep, ids_masked = split_patches(patch_mask, config.mim_ratio)
visible_embeds = model.vision(images, ids_keep)
pixels = model.decoder(visible_embeds, ids_keep, ids_masked, text_embeds, attention_mask)
mim = mim_loss(pixels, images, ids_masked)
show("ids_keep", ids_keep, "indices of the patches that the ViT sees")
show("visible_embeds", visible_embeds, "and CLS")
show("pixels", pixels, "of the masked patches, three colours each")
show("loss", mim, "1 for grey: pixels have mean 0 and deviation 1 in each patch")

# %% 10. syncmask
# A step of SyncMask sums four losses. The words and patches to mask are chosen by choose_masks.
# L = 2 · L_itc + L_itm + L_mlm + 0.5 · L_mim
print("10 syncmask")
generator.manual_seed(0)
losses, metrics = syncmask(run, batch)
show("itc", losses["itc"], f"stop 4, times {config.itc_weight:g}")
show("itm", losses["itm"], "undecided 0.693; knowing only that two in three are wrong 0.637")
show("mlm", losses["mlm"], "stop 6, with the words of this step")
show("mim", losses["mim"], f"stop 9, times {config.mim_weight:g}")
show("sum", sum(losses.values()), "what is differentiated")
show("itm_accuracy", metrics["itm_accuracy"], f"of {3 * BATCH} pairs")

# %% 11. Grouped batches
# Grouped batches hold similar images. A chain goes from an image to the nearest caption, then to its nearest image.
# hard: next = argmax_j s_bj over unused j,  semihard: over those with s_bj < s_bb − margin
print("11 grouped batches")
block = np.flatnonzero(dataset.product_ids < PRODUCTS)
block_images, block_texts = momentum_features(run, dataset, block)
sim = block_images @ block_texts.T
groups = np.stack([dataset.product_ids[block], dataset.caption_ids[block]])
allowed = sim.masked_fill(positive_pairs(*torch.from_numpy(groups)), -1)
show("sim", sim, f"cosines of a search block: {len(block)} images of {PRODUCTS} products")
for mode in ("random", "semihard", "hard"):
    batches = grouped(sim, groups, mode, replace(config, batch_size=BATCH))
    nearest = []
    for items in batches:
        inside = allowed[items][:, items]
        nearest += [inside.amax(dim=1), inside.amax(dim=0)]  # of every image, then of every caption
    show(mode, torch.cat(nearest).mean(), f"cosine of the nearest negative, mean over {len(batches)} batches")
chain = [titles[block[item]] for item in batches[0][:4]]
show("its chain begins", " → ".join(chain))

# %% 12. Soft masks
# A soft mask suppresses what one word is about, by Grad-CAM of the match logit ℓ. The pair still counts as a match.
# G = mean over heads of A · max(0, ∂ℓ/∂A),  M = (G − min G) / (max G − min G),  ṽ_p = (1 − M_p)·v_p
print("12 soft masks")
cam = itm_grad_cam(model, attentions, fused)
mask = soft_mask(cam, first_shown)
about = regions[torch.arange(BATCH), first_shown]
show("Grad-CAM", cam, "of the middle fusion layer")
show("M", mask, f"of '{word}'; from {mask[0].min():.3f} to {mask[0].max():.3f}")
show("on what it names", mask[about].mean(), f"mean of M there; elsewhere {mask[~about].mean():.3f}")

# %% 13. Does it work?
# The ground truth judges the masks of more products. In the end the image has to help to predict words.
# image_gain = share predicted with the own image − share predicted with another product's
print("13 does it work?")
found = mask_metrics(run, dataset)
for key, remark in (
    ("patch_precision", "masked patches, on something named"),
    ("word_precision", "masked attribute words, shown"),
    ("pointing_game", "detail words whose most attended patch is right"),
):
    show(key, found[key], f"{remark}; by chance {found[key + '_random']:.3f}")
show("image_gain", found["image_gain"], "words predicted, minus those with another image")
