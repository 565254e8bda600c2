"""Follow one image and its caption through the code, one stop a cell. docs/walkthrough.md explains each stop.

python tutorial/walkthrough.py                                  # random weights, seconds on a CPU
python tutorial/walkthrough.py --checkpoint tutorial/pretrained/syncmask    # a trained model, or last.pt of a run on
                                                                            # synthetic images

VS Code, PyCharm and Jupyter (with jupytext) run the script cell by cell.

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

from data import informative_pieces, normalise
from engine.batches import learn_vocabulary
from engine.config import ema_decay, itm_hard_share, parse_config, scored_share
from engine.flags import ConfigError, in_one_line, replace_unencodable
from engine.run import build_run
from evaluation.ground_truth import mask_metrics, momentum_features, split_block_into_batches, token_labels
from experiments.figures import open_run
from losses import itc_targets, mim_loss, mlm_loss, pick_negatives, positive_pairs
from masking import (
    average_attention,
    corrupt_words,
    itm_grad_cam,
    mask_precision,
    random_word_mask,
    score_clean_words,
    score_masked_words,
    soft_mask,
    split_patches,
    sync_mask,
)
from readers.dataset import DataError
from readers.synthetic import Synthetic
from train import compute_itc, encode_momentum, syncmask

replace_unencodable()
CHECKPOINT = ""  # last.pt of a run on synthetic images, or an exported folder; "": random weights
if "--checkpoint" in sys.argv:
    CHECKPOINT = sys.argv[-1]
PRODUCTS = 96
BATCH = 16  # the front and the back of one product, the fronts of the next fourteen products


def show(name: str, value: Tensor | float | str, remark: str = "") -> None:
    """Print a row of a table: a tensor by its shape, a number with three decimals, a text as it is."""
    if isinstance(value, Tensor) and value.ndim:
        value = str(tuple(value.shape))
    elif not isinstance(value, str):
        value = f"{value:.3f}"
    print(f"    {name:<22}{value:<20}{remark}".rstrip())


# %% The run
if CHECKPOINT:
    try:
        run, dataset = open_run(Path(CHECKPOINT), None, "cpu")
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"walkthrough.py: {in_one_line(error)}")
    if not isinstance(dataset, Synthetic):
        reason = f"{CHECKPOINT} was trained on {run.config.data}, whose ground truth is not known"
        sys.exit(f"walkthrough.py: {reason}; give --checkpoint of a run on synthetic images")
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

# %% 1. Ground truth
# The images are drawn by code, so it is known which words of a caption an image shows, and on which patches.
# R[b, w, p] = 1 if patch p of image b shows what token w names, else 0
print("1 ground truth")
_, fronts = np.unique(dataset.product_ids, return_index=True)  # the first image of each product
rows = [0, 1, *fronts[1 : BATCH - 1].tolist()]
dataset.with_ground_truth = True
batch = run.collate([dataset[row] for row in rows])
batch["images"] = normalise(batch["images"])
images = batch["images"]  # (B, 3, H, W)
token_ids = batch["token_ids"]  # (B, L)
attention_mask = batch["attention_mask"]  # (B, L)
maskable = batch["maskable"]  # (B, L)
labels = token_labels(batch, config.model.grid)
regions = labels.regions  # (B, L, P)
is_attribute = labels.attribute  # (B, L): the token names an attribute
is_shown = labels.visible  # (B, L): the image shows the attribute
num_maskable = len(maskable[0].unique()) - 1
show("images", images, "2 views of product 0, 14 other products")
show("token_ids", token_ids, f"caption 0: {attention_mask[0].sum()} tokens, then [PAD]")
show("maskable", maskable, f"caption 0: {num_maskable} words")
show("regions", regions, "R")
show("attributes shown", tokenizer.decode(token_ids[0, is_shown[0]].tolist()))
show("attributes not shown", tokenizer.decode(token_ids[0, is_attribute[0] & ~is_shown[0]].tolist()))

# %% 2. Attention
# Two encoders turn image and caption into tokens. In the fusion encoder each text token attends to the patches.
# A = softmax(q kᵀ / √(D / h))
print("2 attention")
image_embeds = model.vision(images)  # (B, N, D)
text_embeds = model.text(token_ids, attention_mask)  # (B, L, D)
image_kv = model.fusion.project_image_kv(image_embeds)
fused, attentions = model.fusion(text_embeds, attention_mask, image_kv, return_attention=True)
first_attention = average_attention(attentions[:1])  # (B, L, P), mean over heads
num_patches = first_attention.shape[2]
word_index = is_shown.byte().argmax(dim=1)  # (B,): the first token of each caption that its image shows
word = tokenizer.decode([token_ids[0, word_index[0]].item()])
row_sum = attentions[0][0, 0, word_index[0]].sum()
show("image_embeds", image_embeds, f"CLS and {num_patches} patches")
show("text_embeds", text_embeds)
show("A", attentions[0], f"first layer; each row sums to {row_sum:.3f}")
largest = first_attention[0, word_index[0]].max()
show("largest weight", largest, f"of '{word}'; uniform: {1 / (1 + num_patches):.3f}")
show("fused", fused, f"after {len(attentions)} layers")
fused_other = model.fusion(text_embeds, attention_mask, image_kv, image_index=torch.arange(BATCH).roll(2))
change = (fused - fused_other).norm() / fused.norm()
show("relative change", change, "of fused, with another image")

# %% 3. Momentum
# The momentum encoder is a moving average of the model. ITC takes its keys from it, and masks are made by it.
# θₘ ← d·θₘ + (1 − d)·θ
print("3 momentum")
image_embeds_m, image_feat_m, text_feat_m = encode_momentum(run, batch)
num_parameters = sum(parameter.numel() for parameter in model.parameters())
vocab_size = config.model.vocab_size
show("parameters", f"{num_parameters:,}", f"vocabulary: {vocab_size}")
for step in (0, 100, 10_000):
    show(f"d({step:,})", ema_decay(step, config.ema_decay))

# %% 4. ITC
# Image-text contrast (ITC) trains the encoders to give an image and its own caption similar features.
# s = f_image · f_text / τ,  L = −½ Σ over both directions of mean_b Σ_j y_bj log softmax(s)_bj
print("4 ITC")
image_feat = model.project_image(image_embeds)  # (B, E)
text_feat = model.project_text(text_embeds)  # (B, E)
itc, sim_i2t, sim_t2i = compute_itc(run, batch, image_feat, text_feat, image_feat_m, text_feat_m)
temp = model.temp.item()
positives = positive_pairs(batch["product_ids"], batch["caption_ids"])  # (B, B)
targets = itc_targets(positives, sim_i2t, alpha=0.0)
lowest_loss = torch.special.entr(targets).sum(dim=1).mean()
show("image_feat_m", image_feat_m, "keys, with unit norm")
show("sim_i2t", sim_i2t, f"τ = {temp:.3f}")
show("targets", targets, f"row 0: {targets[0, 0]:.1f} own caption, {targets[0, 1]:.1f} its copy from the other view")
show("loss", itc, f"uniform: ln {BATCH} = {math.log(BATCH):.3f}; lowest: {lowest_loss:.3f}")

# %% 5. Negatives
# Image-text matching (ITM) needs wrong pairs. They are chosen inside the batch by the cosines of ITC.
# random: uniform,  similar: drawn ∝ exp(s_bj),  hard: argmax_j s_bj,
# semihard: argmax of the j with s_bj < s_bb − margin,  all without the positives j
print("5 negatives")
cosines = sim_i2t[0] * temp
titles = [caption.split(".")[0] for caption in dataset.captions]
show("positives", positives, f"{positives.sum()}: {BATCH} own pairs, 2 between views")
show("own pair", cosines[0], "cosine")
for mode in ("random", "similar", "hard", "semihard"):
    negatives = pick_negatives(sim_i2t, positives, mode, generator.manual_seed(0), config.margin / temp)
    negative = rows[negatives[0]]
    show(mode, cosines[negatives[0]], f"product {dataset.product_ids[negative]}, '{titles[negative]}'")
show("share", itm_hard_share(run.step, config), f"of the negatives are {config.negatives}, others random")

# %% 6. MLM
# Masked language modelling (MLM) masks whole words. The model predicts them from the other words and the image.
# L = −mean over masked w of log p(w | image, other words)
print("6 MLM")
word_mask = random_word_mask(maskable, config.mlm_ratio, generator.manual_seed(0))
masked_ids, mlm_labels = corrupt_words(token_ids, word_mask, run.mask_id, run.replacement_ids, generator)
masked_embeds = model.text(masked_ids, attention_mask)
logits = model.mlm_logits(model.fusion(masked_embeds, attention_mask, image_kv)[word_mask])
mlm = mlm_loss(logits, mlm_labels[word_mask])
mask_share = (masked_ids == run.mask_id)[word_mask].float().mean()
kept_share = (masked_ids == token_ids)[word_mask].float().mean()
other_share = 1 - mask_share - kept_share
masked_words = tokenizer.decode(token_ids[0, word_mask[0]].tolist())
show("word_mask", word_mask, f"{config.mlm_ratio:.0%} of the words; caption 0: {masked_words}")
show("masked_ids", masked_ids, f"{mask_share:.0%} [MASK], {other_share:.0%} random, {kept_share:.0%} unchanged")
show("logits", logits, "masked tokens")
show("loss", mlm, f"uniform: ln {vocab_size} = {math.log(vocab_size):.3f}")

# %% 7. Word scores
# A word scores by how much its own image raises its log-probability. A random share of the words is masked and scored.
# score_w = log p(w | own image, c) − log p(w | another image, c),  c the caption in which all scored words are masked
print("7 word scores")
image_kv_m = momentum.fusion.project_image_kv(image_embeds_m)
scored = random_word_mask(maskable, scored_share(config), generator.manual_seed(0))  # (B, L)
attention, scores = score_masked_words(momentum, batch, image_kv_m, scored, run.mask_id)
is_candidate = is_attribute & (maskable > 0)  # (B, L): attribute words that may be masked
show("scored", scored, f"{scored_share(config):.0%} of the words; caption 0: {len(maskable[0, scored[0]].unique())}")
show("scores", scores, "nats")
show("attributes shown", scores[scored & is_candidate & is_shown].mean(), "mean")
show("attributes not shown", scores[scored & is_candidate & ~is_shown].mean(), "mean")

# %% 8. Synchronized masks
# SyncMask masks the words and the patches that image and caption have in common.
# words: half of all words, the scored ones with the highest score_w
# patches: half of all patches, with the highest score_p = Σ over masked w of softmax(score)_w A[w, p]
print("8 synchronized masks")
if config.mask_source == "clean":  # a run with --mask-source clean
    attention, scores = score_clean_words(momentum, batch, image_kv_m)
patch_mask, word_mask = sync_mask(attention, scores, maskable, config.mim_ratio, config.mlm_ratio)
masked_words = tokenizer.decode(token_ids[0, word_mask[0]].tolist())
show("attention", attention, "A of scored words; mean over heads, geometric mean over layers")
show("patch_mask", patch_mask, f"{patch_mask[0].sum()} of {num_patches} patches")
show("word_mask", word_mask, f"caption 0: {masked_words}")
is_named = regions.any(dim=1)  # (B, P): patches that show something that the caption names
hits, total = mask_precision(patch_mask, torch.ones_like(patch_mask), is_named)
show("patch precision", hits / total, f"random: {is_named.float().mean():.3f}")
hits, total = mask_precision(word_mask, is_candidate, is_shown)
show("word precision", hits / total, f"random: {is_shown[is_candidate].float().mean():.3f}")

# %% 9. MIM
# In masked image modelling (MIM) the ViT encodes the other patches. A decoder predicts the pixels of the masked ones.
# L = mean over masked p and their pixels of (x̂_p − (x_p − mean x_p) / std x_p)²
print("9 MIM")
ids_keep, ids_masked = split_patches(patch_mask, config.mim_ratio)
visible_embeds = model.vision(images, ids_keep)
pixels = model.decoder(visible_embeds, ids_keep, ids_masked, text_embeds, attention_mask)
mim = mim_loss(pixels, images, ids_masked)
show("ids_keep", ids_keep)
show("visible_embeds", visible_embeds, "with CLS")
show("pixels", pixels, "x̂")
show("loss", mim, "1 if x̂ = 0")

# %% 10. One training step
# One training step sums four losses. choose_masks calls sync_mask for four fifths of the pairs.
# L = 2·L_itc + L_itm + L_mlm + 0.5·L_mim
print("10 one training step")
generator.manual_seed(0)
losses, step_metrics = syncmask(run, batch)
show("itc", losses["itc"], f"{config.itc_weight:g}·L_itc")
show("itm", losses["itm"], "always p(match) = ½: 0.693; always ⅓, the share of matches: 0.637")
show("mlm", losses["mlm"])
show("mim", losses["mim"], f"{config.mim_weight:g}·L_mim")
show("sum", sum(losses.values()))
show("itm_batch_accuracy", step_metrics["itm_batch_accuracy"], f"of {3 * BATCH} pairs")

# %% 11. Grouped batches
# A greedy chain puts similar images into one batch: from an image to the nearest caption, then to its nearest image.
# hard: next = argmax_j s_bj over unused j,  semihard: over the unused j with s_bj < s_bb − margin
print("11 grouped batches")
block = np.flatnonzero(dataset.product_ids < PRODUCTS)
block = np.random.default_rng(0).permutation(block)
block_images, block_texts = momentum_features(run, dataset, block)
sim = block_images @ block_texts.T
groups = np.stack([dataset.product_ids[block], dataset.caption_ids[block]])
sim_negatives = sim.masked_fill(positive_pairs(*torch.from_numpy(groups)), -1)
show("sim", sim, f"images of {PRODUCTS} products")
for mode in ("random", "semihard", "hard"):
    batches = split_block_into_batches(sim, groups, mode, replace(config, batch_size=BATCH))
    nearest = []
    for items in batches:
        sim_in_batch = sim_negatives[items][:, items]
        nearest += [sim_in_batch.amax(dim=1), sim_in_batch.amax(dim=0)]  # of each image, of each caption
    show(mode, torch.cat(nearest).mean(), f"{len(batches)} batches")
chain = [titles[block[item]] for item in batches[0][:3]]
show("hard chain", " → ".join(chain))

# %% 12. Soft masks
# A soft mask suppresses the patches that one word is about. Grad-CAM of the logit ℓ of "match" finds these patches.
# G = mean over heads of A · max(0, ∂ℓ/∂A),  M = (G − min G) / (max G − min G + 1e-7),  ṽ_p = (1 − M_p)·v_p
print("12 soft masks")
cam = itm_grad_cam(model, attentions, fused)
mask = soft_mask(cam, word_index)
word_regions = regions[torch.arange(BATCH), word_index]  # (B, P)
show("Grad-CAM", cam, "middle layer")
show("M", mask, f"'{word}': {mask[0].min():.3f} to {mask[0].max():.3f}")
show("M on the region", mask[word_regions].mean(), f"elsewhere: {mask[~word_regions].mean():.3f}")

# %% 13. Does it work?
# The ground truth judges the masks of 48 products. The image gain counts right predictions of words.
# image_gain = accuracy with the own image − accuracy with another product's image
print("13 does it work?")
metrics = mask_metrics(run, dataset)
for key in ("patch_precision", "word_precision", "pointing_game"):
    show(key, metrics[key], f"random: {metrics[key + '_random']:.3f}")
show("image_gain", metrics["image_gain"], "chance: 0")
