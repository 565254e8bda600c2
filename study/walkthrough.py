"""One photo and its description on their way through the code: the shapes and numbers of docs/walkthrough.md.

python study/walkthrough.py                                  a model with random weights, seconds on a CPU
python study/walkthrough.py --checkpoint runs/…/last.pt      a trained one (of synthetic photos), the same photos

Random weights by default: every loss is then near what knowing nothing costs, which one can reckon, or above it.
The batch of sixteen: the photo, another photo of its product (its twin), and the fronts of the next fourteen products,
of which the first five differ from it in colour, in one detail or in both (its sisters).
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch import Tensor

from data import FREQUENT, normalise, telling_pieces
from harness.batches import learn_vocabulary
from harness.config import ema_decay, parse_config
from harness.flags import ConfigError
from harness.run import Run, build_run
from harness.wiring import contrast, synchronize, teach
from losses import cross_entropy, itc_targets, mim_loss, pick_negatives, same_pairs
from masking import (
    average_attention,
    cooccurrence,
    grad_cam,
    hidden_words,
    middle_layer,
    random_patch_mask,
    random_word_mask,
    soft_mask,
    split_patches,
)
from measures.truth import grouped, mask_truth, momentum_features, word_truth
from model import FeatureQueue
from photos.dataset import DataError
from photos.synthetic import Synthetic
from study.figures import open_run
from train import RECIPES

PRODUCTS, BATCH = 96, 16
NEGATIVES = "random", "similar", "hard", "semihard"
GROUPINGS = "random", "hard", "semihard"


class Walk:
    """A run, the batch that walks through it, and what several stops look at. The photo followed is the first one.

    Letters: B batch, L text tokens, N image tokens, P patches, h heads, D width, E shared embedding, V vocabulary."""

    def __init__(self, run: Run, dataset: Synthetic):
        dataset.truths, run.model = True, run.model.eval()
        # past every warm-up, in whichever state the weights are
        run.config, run.step = replace(run.config, val_products=PRODUCTS // 2, precision="fp32"), 10**6
        run.queue = FeatureQueue(0)  # or the first stops would be keys of the later ones
        self.run, self.model, self.dataset, self.temp = run, run.model, dataset, run.model.temp.item()
        fronts = [int((dataset.product_ids == product).argmax()) for product in range(BATCH - 1)]
        self.batch = run.collate([dataset[row] for row in (fronts[0], fronts[0] + 1, *fronts[1:])])
        self.known = word_truth(self.batch, run.config.model.grid)
        self.batch["images"] = normalise(self.batch["images"])
        self.ids, self.keep, self.words = (self.batch[key] for key in ("token_ids", "attention_mask", "words"))
        self.teacher = teach(run, self.batch)
        self.image_embeds = self.model.encode_image(self.batch["images"])  # (B, N, D)
        self.text_embeds = self.model.encode_text(self.ids, self.keep)  # (B, L, D)

    def draws(self) -> torch.Generator:
        """The same random numbers at every stop."""
        self.run.generator = torch.Generator().manual_seed(0)
        return self.run.generator

    @cached_property
    def itc(self):
        """Loss and logits of the batch against itself."""
        feats = self.model.project_image(self.image_embeds), self.model.project_text(self.text_embeds)
        return contrast(self.run, self.batch, *feats, self.teacher)

    @cached_property
    def sync(self) -> tuple[Tensor, Tensor, Tensor]:
        """Attention (B, L, P), patch mask (B, P), word mask (B, L)."""
        return synchronize(self.run, self.batch, self.teacher, self.draws())

    def spoken(self, mask: Tensor) -> str:
        """The followed photo's words that a mask (L,) marks."""
        tokens = [self.run.tokenizer.id_to_token(number) for number in self.ids[0, mask].tolist()]
        return " ".join(tokens).replace(" ##", "") or "none"

    def word(self, place: Tensor) -> str:
        """The followed photo's token at a place, quoted."""
        return repr(self.run.tokenizer.id_to_token(int(self.ids[0, place])))

    def begins(self, number: int) -> str:
        """How a text of the batch begins, quoted."""
        return repr(self.dataset.captions[int(self.batch["rows"][number])].split(".")[0])


def at(name: str, value: Tensor | float | str, remark: str = "") -> str:
    """A line: a tensor by its shape, a number to three digits."""
    if isinstance(value, Tensor) and value.ndim:
        value = f"({', '.join(map(str, value.shape))})"
    elif not isinstance(value, str):
        value = f"{value:.3f}"
    return f"    {name:<20}{value:<20}{remark}".rstrip()


def truth(w: Walk) -> Iterator[str]:
    """What the photo shows, and what its text names."""
    attribute, visible = w.known.attribute[0], w.known.visible[0]
    yield at("images", w.batch["images"], "the photo: product 0 from the front; then its back, 14 others")
    yield at("token_ids", w.ids, f"its text: {int(w.keep[0].sum())} tokens with [CLS] and [SEP], the rest [PAD]")
    words = len(set(w.words[0].tolist()) - {0})
    yield at("words", w.words, f"{words} of its words may be masked: in no more than {FREQUENT:.0%} of the texts")
    yield at("regions", w.known.regions, "where the photo shows what a token names, by patches")
    yield at("shown", w.spoken(visible))
    yield at("named, not shown", w.spoken(attribute & ~visible))


def attention(w: Walk) -> Iterator[str]:
    """Cross-attention: a row a word, a column an image token."""
    a = w.model.fusion(w.text_embeds, w.keep, w.image_embeds, return_attention=True)[1][0]
    word = w.known.visible[0].nonzero()[0, 0]
    heat = average_attention([a])
    patches, registers = heat.shape[2], w.model.config.registers
    yield at("image_embeds", w.image_embeds, f"CLS and {patches} patches; {registers} registers are dropped")
    yield at("text_embeds", w.text_embeds)
    yield at("A", a, f"of the first fusion layer; each row sums to {a[0, 0, word].sum():.3f}")
    looks = "looks at it, too" if w.model.config.cls_context else "does not look at it"
    yield at("column of CLS", a[..., 0].max(), f"the text {looks} (cls_context)")
    largest = heat[0, word].max()
    yield at("largest of a row", largest, f"of {w.word(word)}, mean over heads; all alike {1 / patches:.3f}")


def fusion(w: Walk) -> Iterator[str]:
    """Text tokens that have looked at the photo."""
    photos = w.model.look(w.image_embeds)
    fused, cls = w.model.fuse(w.text_embeds, w.keep, photos), w.model.fuse_cls(w.text_embeds, w.keep, photos)
    elsewhere = w.model.fuse(w.text_embeds, w.keep, photos, torch.arange(BATCH).roll(2))
    yield at("keys and values", photos[0], f"of each photo, made once for each of {len(photos)} layers")
    yield at("fused", fused)
    yield at("[CLS] alone", cls, f"at less cost; off by {(cls - fused[:, :1]).abs().max():.3f}")
    yield at("another photo", (fused - elsewhere).norm() / fused.norm(), "moves the tokens by so much of their length")


def momentum(w: Walk) -> Iterator[str]:
    """The average of the model's weights, and how it follows."""
    ours, theirs = (torch.cat([x.flatten() for x in m.parameters()]) for m in (w.model, w.teacher.model.model))
    cosine = (w.teacher.image_feat * w.model.project_image(w.image_embeds)).sum(dim=1).mean()
    vocabulary = f"of a vocabulary of {w.run.config.model.vocab_size}"
    yield at("weights", f"{len(ours):,}", f"{vocabulary}; as many again in the momentum model")
    for step in (0, 100, 10_000):
        yield at(f"decay, step {step:,}", ema_decay(step, w.run.config.ema_decay))
    distance = (ours - theirs).norm() / ours.norm()
    yield at("distance", distance, "of the average from the model, as a share of its length")
    yield at("cosine", cosine, "of the image features of both")


def itc(w: Walk) -> Iterator[str]:
    """Image-text contrast."""
    right = same_pairs(w.batch["product_ids"], w.batch["caption_ids"])
    targets = itc_targets(right, torch.zeros(BATCH, BATCH), 0.0)
    least = torch.special.entr(targets).sum(dim=1).mean()
    yield at("image_feat", w.teacher.image_feat, "of the momentum model: the keys; unit length")
    yield at("sim_i2t", w.itc.sim_i2t, f"cosines over the temperature, {w.temp:.3f}")
    yield at("targets", targets, f"row 0: {targets[0, 0]:.1f} itself, {targets[0, 1]:.1f} its twin")
    yield at("loss", w.itc.loss, f"ln {BATCH} = {math.log(BATCH):.3f} if all look alike; {least:.3f} at best")


def negatives(w: Walk) -> Iterator[str]:
    """Which wrong text the photo gets for ITM."""
    forbidden = same_pairs(w.batch["product_ids"], w.batch["caption_ids"])
    cosines = w.itc.sim_i2t * w.temp
    yield at("forbidden", forbidden, f"{int(forbidden.sum())} pairs: the diagonal, and the twins both ways")
    yield at("own pair", cosines[0, 0], "cosine")
    for mode in NEGATIVES:
        margin = w.run.config.margin / w.temp
        chosen = int(pick_negatives(w.itc.sim_i2t, forbidden, None, mode, w.draws(), margin)[0])
        yield at(mode, cosines[0, chosen], f"cosine; {w.begins(chosen)}")
    config = w.run.config
    rising = f"; none until step {config.itm_warmup}, then rising to step {2 * config.itm_warmup}"
    remark = f"are {config.negatives}, the others random"
    yield at("hard_share", w.run.hard_share, remark + rising * (config.itm_warmup > 0))


def mlm(w: Walk) -> Iterator[str]:
    """Masked language modelling: restore hidden words from the rest and the photo."""
    mask = random_word_mask(w.words, w.run.config.mlm_ratio, w.draws())
    ids, labels = w.run.corrupt(w.ids, mask)
    gone, kept = (ids == w.run.mask_id)[mask].float().mean(), (ids == w.ids)[mask].float().mean()
    fused = w.model.fuse(w.model.encode_text(ids, w.keep), w.keep, w.image_embeds)
    logits = w.model.mlm_logits(fused[mask])
    yield at("word_mask", mask, f"{w.run.config.mlm_ratio:.0%} of the words; here: {w.spoken(mask[0])}")
    yield at("masked_ids", ids, f"{gone:.0%} of the masked [MASK], {1 - gone - kept:.0%} another word, {kept:.0%} kept")
    yield at("logits", logits, "of the masked tokens alone, over the vocabulary")
    alike = f"ln {logits.shape[1]} = {math.log(logits.shape[1]):.3f} if all words were as likely"
    yield at("loss", cross_entropy(logits, labels[mask]), alike)


def recipe(w: Walk, name: str) -> Iterator[str]:
    """The losses of a whole step."""
    w.draws()
    losses, figures = RECIPES[name](w.run, w.batch)
    counting = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3
    weight = w.run.config.itc_weight
    remarks = {"itc": "stop 5" + f", times {weight:g}" * (weight != 1), "mlm": "stop 7, with the words of this step",
               "itm": f"undecided {math.log(2):.3f}; knowing only that two in three are wrong {counting:.3f}",
               "mim": f"stop 11, times {w.run.config.mim_weight}"}  # fmt: skip
    for key, loss in losses.items():
        yield at(key, loss, remarks[key])
    yield at("sum", sum(losses.values()), "what is differentiated")
    yield at("itm_accuracy", figures["itm_accuracy"], f"of {3 * BATCH} pairs")


def hidden(w: Walk) -> Iterator[str]:
    """The momentum model's attention of each word while it is hidden, and what the photo adds to it."""
    maps, answers = hidden_words(w.run.momentum, w.batch, w.teacher.photos, w.run.mask_id, w.draws())
    gains = answers[0] - answers[1]
    attribute, visible = w.known.attribute, w.known.visible
    shown = gains[visible & (w.words > 0)].mean()
    unshown = gains[attribute & ~visible & (w.words > 0)].mean()
    yield at("both halves", torch.stack([w.ids, w.ids]), "the texts twice, each word hidden in one of both")
    yield at("maps", maps[0], f"a row of each word's own pass, for each of {len(maps)} layers")
    yield at("gains", gains, "log p of a hidden word with its photo, over another one")
    yield at("of words shown", shown, "mean gain, in nats")
    yield at("of words not shown", unshown)


def share(mask: Tensor, candidates: Tensor, shared: Tensor) -> float:
    """Of the masked candidates, the share that photo and text have in common."""
    hits, total = cooccurrence(mask, candidates, shared)
    return float(hits / total)


def sync(w: Walk) -> Iterator[str]:
    """Synchronized masks."""
    attention, patches, words = w.sync
    config, draws = w.run.config, w.draws()
    random_patches = random_patch_mask(*patches.shape, config.mim_ratio, draws)
    random_words = random_word_mask(w.words, config.mlm_ratio, draws)
    named = w.known.regions.any(dim=1)  # (B, P)
    yield at("attention", attention, "mean over heads, geometric mean over layers")
    yield at("patch mask", patches, f"{int(patches[0].sum())} of {patches.shape[1]} patches")
    yield at("word mask", words, f"of the photo: {w.spoken(words[0])}")
    right, chance = (share(mask, torch.ones_like(mask), named) for mask in (patches, random_patches))
    yield at("right patches", right, f"lie on what the text names; of a random mask {chance:.3f}")
    right, chance = (share(mask, w.known.attribute, w.known.visible) for mask in (words, random_words))
    yield at("right words", right, f"of the masked attributes are shown; of a random mask {chance:.3f}")


def mim(w: Walk) -> Iterator[str]:
    """Masked image modelling: restore hidden patches from the others and the text."""
    visible, gone = split_patches(w.sync[1], w.run.config.mim_ratio)
    embeds = w.model.encode_image(w.batch["images"], visible)
    pixels = w.model.reconstruct_patches(embeds, visible, gone, w.text_embeds, w.keep)
    yield at("visible", visible, "numbers of the patches that the ViT sees")
    yield at("visible_embeds", embeds, "and CLS")
    yield at("pixels", pixels, "of the hidden patches, three colours each")
    loss = mim_loss(pixels, w.batch["images"], gone)
    yield at("loss", loss, "1 for grey: pixels have mean 0 and deviation 1 in each patch")


def batches(w: Walk) -> Iterator[str]:
    """Grouped batches: which photos share one."""
    rows = (w.dataset.product_ids < PRODUCTS).nonzero()[0]
    image_feat, text_feat = momentum_features(w.run, w.dataset, rows)
    similar, groups = image_feat @ text_feat.T, np.stack([w.dataset.product_ids[rows], w.dataset.caption_ids[rows]])
    yield at("sim", similar, f"cosines of a search block: {len(rows)} photos of {PRODUCTS} products")
    forbidden = same_pairs(*map(torch.from_numpy, groups))
    for mode in GROUPINGS:
        made = grouped(similar, groups, mode, replace(w.run.config, batch_size=BATCH))
        nearest = []
        for items in made:
            cosines = similar[items][:, items].masked_fill(forbidden[items][:, items], -1)
            nearest += [cosines.amax(dim=1), cosines.amax(dim=0)]  # of every photo, then of every text
        mean = torch.cat(nearest).mean()
        yield at(mode, mean, f"cosine of the nearest negative, mean over {len(made)} batches")
        if mode == "hard":
            begun = [w.dataset.captions[rows[item]].split(".")[0] for item in made[0][:4]]
            yield at("its chain begins", " → ".join(map(repr, begun)))


def soft(w: Walk) -> Iterator[str]:
    """A soft mask: Grad-CAM of one word suppresses what it is about."""
    matching, maps = w.model.fusion(w.text_embeds, w.keep, w.image_embeds, return_attention=True)
    layer = middle_layer(len(maps))  # as train.soften reads it
    cam = grad_cam(maps[layer], w.model.itm_logits(matching)[:, 1].sum())
    word = w.known.visible.byte().argmax(dim=1)  # the first word of each text that its photo shows
    mask = soft_mask(cam, word)
    tokens = w.image_embeds[:, 1:] * (1 - mask[..., None])
    about = w.known.regions[torch.arange(BATCH), word]
    yield at("Grad-CAM", cam, f"of the middle layer: of {len(maps)}, number {layer + 1}")
    yield at("M", mask, f"of {w.word(word[0])}; from {mask[0].min():.3f} to {mask[0].max():.3f}")
    yield at("on what it names", mask[about].mean(), f"mean of M there; elsewhere {mask[~about].mean():.3f}")
    yield at("patch tokens", tokens, "(1 - M) times what they were; the CLS stays")


def works(w: Walk) -> Iterator[str]:
    """What masks are worth, on the photos of half of the products."""
    found, products = mask_truth(w.run, w.dataset), w.run.config.val_products
    of = f"of {(w.dataset.product_ids < products).sum()} photos"
    for key, remark in (("patch_cooccurrence", "masked patches, on something named"),
                        ("word_cooccurrence", "masked attribute words, shown"),
                        ("pointing", "detail words whose most attended patch is right")):  # fmt: skip
        yield at(key, found[key], f"{of}: {remark}; by chance {found[key + '_random']:.3f}")
    yield at("photo_gain", found["photo_gain"], f"{of}: words restored, over those with a wrong photo")


STOPS: list[tuple[str, Callable[[Walk], Iterator[str]]]] = [
    ("truth", truth), ("attention", attention), ("fusion", fusion), ("momentum", momentum), ("ITC", itc),
    ("negatives", negatives), ("MLM", mlm), ("albef", partial(recipe, name="albef")), ("hidden words", hidden),
    ("sync_mask", sync), ("MIM", mim), ("syncmask", partial(recipe, name="syncmask")), ("grouped batches", batches),
    ("soft masks", soft), ("does it work?", works),
]  # fmt: skip


def open_walk(checkpoint: Path | None, seed: int = 0) -> Walk:
    """A trained run, or one with random weights and the vocabulary of the texts that are looked at."""
    if checkpoint:
        run, dataset = open_run(checkpoint, None, "cpu")
        if not isinstance(dataset, Synthetic):
            raise ConfigError(f"{checkpoint} was trained on {run.config.data}, whose truth is not known")
        return Walk(run, dataset)
    config = parse_config(["--precision", "fp32", "--device", "cpu"])[0]
    dataset = Synthetic("val", PRODUCTS, config.model.image_size, progress=False)
    run = build_run(replace(config, seed=seed), dataset, learn_vocabulary(config, dataset))
    run.telling = telling_pieces(run.tokenizer, dataset.captions)
    return Walk(run, dataset)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("walkthrough.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, help="last.pt of a run on synthetic photos; default: random weights")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed}: 0 or more, below 2**63")
    try:
        walk = open_walk(args.checkpoint, args.seed)
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"walkthrough.py: {error}")
    for number, (name, stop) in enumerate(STOPS, start=1):
        print("\n".join([f"{number} {name}", *stop(walk)]))


if __name__ == "__main__":
    main()
