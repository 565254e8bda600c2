"""What is wrong, in words, for the mistakes that are easily made; the project's own tests then ask for the rest.

Each check takes the functions of an exercise and raises Mistake.
"""

from functools import cache

import torch

from data import build_tokenizer, normalise
from harness.config import parse_config
from harness.run import Run, build_run
from harness.wiring import teach
from masking import first_pieces, patch_count, word_counts
from photos.synthetic import Synthetic
from study.exercises.catalogue import Functions, Mistake

seeded = lambda seed=0: torch.Generator().manual_seed(seed)
# [CLS] a zip ##per of black silk . [SEP] with "of" and the full stop no words; a text of one word; one without any
WORDS = torch.tensor([[0, 2, 3, 3, 0, 6, 7, 8, 9, 0, 0], [0, 2] + [0] * 9, [0] * 11])


def want(right, message: str) -> None:
    """A sentence instead of an assertion."""
    if not right:
        raise Mistake(message)


def check(number: int, functions: Functions) -> None:
    """The check of an exercise; a stub is told from a mistake."""
    try:
        globals()[f"check_{number}"](*functions.values())
    except NotImplementedError:
        names = ", ".join(functions)
        raise Mistake(f"exercise {number} is not written yet: {names} in mine/ex{number}.py") from None


def only_words(mask, words) -> None:
    """What holds of any word mask, however many it masks."""
    want(mask.dtype == torch.bool and mask.shape == words.shape, "a word mask is boolean, (B, L), True = masked")
    want(not (mask & (words == 0)).any(),
         "tokens are masked that are no words, where `words` is 0: [CLS], [SEP], padding, punctuation")  # fmt: skip
    first = mask.gather(1, (words - 1).clamp(min=0)) & (words > 0)  # whether the word's first piece is
    want(torch.equal(mask, first), "one piece of a word is hidden and another not, which gives it away")


def right_counts(mask, words, ratio: float) -> None:
    """Exactly as many as `word_counts` says."""
    hidden, right = (mask & first_pieces(words)).sum(1).tolist(), word_counts(words, ratio).flatten().tolist()
    want(hidden == right, f"{hidden} words are masked, not {right}: max(1, round(ratio · words)) of each text, 0 where "
         "there are none, counted in words rather than tokens (`word_counts`)")  # fmt: skip


def check_1(random_word_mask) -> None:
    """Exact counts, whole words, drawn uniformly and anew in each row."""
    masks = [random_word_mask(WORDS, 0.5, seeded(seed)) for seed in range(30)]
    for mask in masks:
        only_words(mask, WORDS)
    of_six = {(mask & first_pieces(WORDS))[0].sum().item() for mask in masks}
    want(len(of_six) == 1, f"a coin for each word, or one argsort, which gives places, not ranks: {min(of_six)} to "
         f"{max(of_six)} of six words are masked from draw to draw. Rank one random number a word and take the first "
         "`word_counts`")  # fmt: skip
    right_counts(masks[0], WORDS, 0.5)
    want(len({str(mask) for mask in masks}) > 1, "the same words are masked whatever the generator")
    want(torch.equal(masks[3], random_word_mask(WORDS, 0.5, seeded(3))),
         "one generator, two masks: give it to torch.rand")  # fmt: skip
    want(len(random_word_mask(WORDS[:1].expand(9, -1), 0.5, seeded()).unique(dim=0)) > 1, "all texts get the same "
         "random numbers: draw (B, L) of them, not (L,)")  # fmt: skip
    try:
        counts = random_word_mask(WORDS > 0, 0.5, seeded()).sum(1).tolist()
    except RuntimeError:
        counts = None
    want(counts == [4, 1, 0], "a boolean `words`, in which every token is a word of its own, has to be numbered first: "
         "words * torch.arange(1, L + 1)")  # fmt: skip


def check_2(corrupt_words) -> None:
    """80/10/10, labels where something is masked."""
    ids = torch.randint(5, 1000, (100, 100), generator=seeded())
    clean, mask, allowed = ids.clone(), torch.rand(ids.shape, generator=seeded(1)) < 0.5, torch.arange(500, 1000)
    corrupted, labels = corrupt_words(ids, mask, 4, allowed, seeded())
    want(torch.equal(ids, clean), "token_ids itself is written into; the clean text is still needed (ITC, ITM)")
    want((labels[~mask] == -100).all(), "words that are not masked have labels: −100 there, or the loss asks the model "
         "for what it can read")  # fmt: skip
    want(torch.equal(labels[mask], clean[mask]), "the labels of masked words must be the original ids, not what "
         "replaces them")  # fmt: skip
    want(torch.equal(corrupted[~mask], clean[~mask]), "words change that are not masked")
    hidden, kept = (corrupted == 4)[mask].float().mean(), (corrupted == clean)[mask].float().mean()
    want(abs(hidden - 0.8) < 0.03 and abs(kept - 0.1) < 0.03, f"of the masked words {hidden:.0%} become [MASK] and "
         f"{kept:.0%} stay; it should be 80 and 10 %: cut one draw a word into three ranges")  # fmt: skip
    drawn = corrupted[mask & (corrupted != 4) & (corrupted != clean)]
    want(torch.isin(drawn, allowed).all(), "random words must come from word_ids, which has no special tokens")


def check_3(cooccurrence, pointing) -> None:
    """Shares and chances worked out by hand."""
    mask, candidates, shared = torch.tensor([[[1, 1, 1, 0, 0]], [[1, 1, 0, 1, 0]], [[1, 0, 1, 0, 1]]]).bool()
    found = cooccurrence(mask, candidates, shared)
    two = "cooccurrence returns two counts, hits and of how many: shares of batches of different size do not add up"
    want(isinstance(found, tuple) and len(found) == 2 and found[1] >= 1, two)
    want(found[1] == 2, f"of {found[1]} masked ones, should be 2: only masked candidates count, hit or not")
    want(found[0] == 1, f"{found[0]} hits, should be 1: masked, a candidate and shared")
    attention = torch.tensor([[[0.1, 0.7, 0.1, 0.1], [0.5, 0.3, 0.2, 0.0], [0.9, 0.1, 0.0, 0.0]]])
    regions = torch.tensor([[[1, 1, 1, 0], [0, 0, 1, 0], [1, 1, 1, 1]]]).bool()
    hits, expected, total = pointing(attention, regions, torch.tensor([[True, True, False]]))
    want(total == 2, f"pointing of {total} words, should be 2: only those that `words` marks")
    want(hits == 1, f"pointing has {hits} hits, should be 1: one most attended patch a word, and is it in its region?")
    want(abs(expected - 1) < 1e-6, f"a random patch would hit {expected:.2f} times, should be 1 (3/4 + 1/4): it hits a "
         "region as often as the region is large")  # fmt: skip


def check_4(same_pairs, itc_targets) -> None:
    """Right answers by product or caption; rows that sum to 1."""
    products, captions, keys = torch.tensor([7, 8]), torch.tensor([3, 4]), torch.tensor([[7, 8, 7, 9], [3, 4, 5, 4]])
    right = same_pairs(products, captions, *keys)
    want(right.shape == (2, 4) and right.dtype == torch.bool, f"right keys are (B, K) bool, not {tuple(right.shape)}")
    want(right[0, 2], "the second photo of a product counts as wrong: compare products, not positions")
    want(right[1, 3], "a key with the same caption to the letter counts as wrong, though nobody could tell it apart")
    want(right.sum() == 4, "a key is right where the product *or* the caption is the same, and nowhere else")
    want(torch.equal(same_pairs(products, captions), torch.eye(2).bool()), "without keys a batch is its own keys")
    sim_m = torch.tensor([[0.0, 0, 0, 0], [0, 9, 0, 0]])
    total = itc_targets(right, sim_m, 0.0)[0].sum()
    want(abs(total - 1) < 1e-5, f"targets of a product with two photos sum to {total:.1f}, not to 1: share 1 out among "
         "all right answers")  # fmt: skip
    soft = itc_targets(right, sim_m, 0.4)
    want(torch.allclose(soft.sum(1), torch.ones(2)), "soft targets do not sum to 1: sim_m are logits, softmax first")
    want(abs(soft[0, 1] - 0.4 / 4) < 1e-5, "alpha is the momentum model's share, 1 − alpha that of the known pairs")
    want(abs(soft[0, 2] - 0.4 / 4 - 0.6 / 2) < 1e-5, "right answers share 1 − alpha evenly, the second as much as "
         "the first")  # fmt: skip


def check_5(pick_negatives) -> None:
    """Never a forbidden column, also at low temperatures."""
    forbidden = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 1]]).bool()
    sim = torch.tensor([[9.0, 8, 2, 1], [8, 9, 1, 2], [0, 1, 9, 3], [1, 2, 3, 9]]) - 10
    best, least = torch.tensor([[2, 3, 3], [3, 2, 0]])
    cold = "at a low temperature the softmax is 1 for the own pair and 0 elsewhere; once that is zeroed, nothing is "
    cold += "left to draw by. Mask the logits before the softmax"
    nothing = "where every column is forbidden the answer is −1; a softmax of nothing but −∞ is NaN"

    def draws(rows: int, mode: str, scale: int, broken: str) -> torch.Tensor:
        asked, clean = (sim[:rows] * scale, forbidden[:rows]), sim[:rows] * scale
        try:
            drawn = torch.stack([pick_negatives(*asked, mode=mode, generator=seeded(s)) for s in range(20)])
        except RuntimeError as error:
            want("prob" not in str(error), f"{mode}: {broken}")  # as torch.multinomial says it
            raise
        want(torch.equal(asked[0], clean), f"{mode}: sim itself is written into; it is still needed: masked_fill")
        return drawn

    for mode, scale in (("hard", 1), ("random", 1000), ("similar", 1), ("similar", 1000)):
        drawn = draws(3, mode, scale, cold if scale > 1 else "there is NaN in the softmax, or nothing above 0")
        want(not (drawn == torch.arange(3)).any(), f"{mode}: a pair itself is drawn as its negative. −∞ where "
             "forbidden; 0 is much where all logits are negative")  # fmt: skip
        want(not forbidden[:3].gather(1, drawn.T).any(), f"{mode}: a forbidden column is drawn: another photo of the "
             "product, or the same caption")  # fmt: skip
        want(torch.equal(drawn, draws(3, mode, scale, cold)), f"{mode}: one generator, two draws: give it to "
             "torch.multinomial")  # fmt: skip
        want(mode != "hard" or (drawn == best).all(), "hard is the most similar allowed one")
        always = len(drawn[:, 0].unique()) == 1
        want(mode != "random" or not always, "random always draws the same: it is uniform, whatever `sim` says")
        if mode == "similar":
            want(scale == 1 or not (drawn == least).all(), "similar: the least similar is drawn; ∝ exp(sim), not "
                 "exp(−sim)")  # fmt: skip
            want(scale > 1 or not always, "similar is drawn, not always the same")
            want(scale == 1 or (drawn == best).all(), f"similar: not drawn ∝ exp(sim); or {cold}")
    for mode in ("hard", "random", "similar"):
        want((draws(4, mode, 1, nothing)[:, 3] == -1).all(), f"{mode}: {nothing}")


def check_6(pick_negatives) -> None:
    """Below the own pair, by the margin."""
    semihard = lambda row, **more: pick_negatives(
        torch.tensor([row] * 5), torch.tensor([[True] + [False] * 4] * 5), torch.full((5,), row[0]), mode="semihard",
        **more)[0]  # fmt: skip
    row = [0.8, 0.9, 0.75, 0.5, 0.1]
    want(semihard(row) != 0, "the pair itself is drawn as its negative: `forbidden` has the last word")
    want(semihard(row) != 1, "a negative more similar than the own pair: that is hard, and likely false; below the own "
         "pair, sim < own")  # fmt: skip
    want(semihard(row) != 4, "the least similar of those below is the easiest; of distances FaceNet takes the smallest "
         "above the own, so of cosines the largest below")  # fmt: skip
    want(semihard(row, margin=0.2) != 1, "the margin is on the wrong side: sim < own − margin, further from the anchor")
    want(semihard(row, margin=0.2) == 3, "with a margin of 0.2 and an own pair of 0.8, the most similar one below 0.6")
    want(semihard([0.0, 0.9, 0.75, 0.5, 0.1]) == 4, "none is below the own pair: then the least similar one")


def check_7(sync_mask) -> None:
    """Words by their score, patches by their attention."""
    words_by_score(sync_mask)
    patches_by_attention(sync_mask)


def words_by_score(sync_mask) -> None:
    """Three words with scores of their own, the first of three pieces."""
    words, attention = torch.tensor([[0, 2, 2, 2, 5, 6, 0]]), torch.full((1, 2, 7, 5), 0.2)
    own = torch.tensor([[99.0, 3, 3, 3, 1, 2, 99]])

    def masked(ratio: float, pool: float, scores=own) -> list[int]:
        masks = [
            sync_mask(attention, words, 0.25, ratio, "mean", scores, "masked", pool, seeded(s))[1] for s in range(20)
        ]
        for mask in masks:
            only_words(mask, words)
            right_counts(mask, words, ratio)
        return torch.cat(masks)[:, [1, 4, 5]].sum(0).tolist()  # how often each word

    best, _, second = masked(0.67, 0.0)
    want(best, "word_score may be a tensor of scores: the highest are masked")
    want(best == 20, "words are drawn from all of the text: first the best, then a draw among these alone. best + "
         "draws is above 1 in the mask `best`, and below 1 elsewhere")  # fmt: skip
    want(second == 20, "with a pool below word_ratio the best word_ratio are masked: max(pool, word_ratio), and "
         "that of the words, not of the tokens")  # fmt: skip
    best, worst, second = masked(0.34, 0.67)
    want(not worst, "a word is masked that is not in the pool, the best max(pool, word_ratio) of the words")
    want(best and second, "the pool is ignored: of the best two of three words one is to be drawn, and it is "
         "always the same")  # fmt: skip
    want(max(masked(0.34, 0.0, torch.ones(1, 7))) < 20, "of equal scores it is always the same word: `untied` first")


def patches_by_attention(sync_mask) -> None:
    """Three words, of which the second looks at one patch alone."""
    words, attention = torch.tensor([[0, 2, 3, 4, 0, 0]]), torch.zeros(1, 2, 6, 5)
    ask = lambda attention, words, score="max", whose="masked", seed=0: sync_mask(
        attention, words, 0.25, 0.34, word_score=score, patch_score=whose, generator=seeded(seed))  # fmt: skip
    attention[0, :, 1] = torch.tensor([0.0, 0.4, 0.3, 0.2, 0.1])
    patches = ask(attention, words * torch.tensor([0, 1, 0, 0, 0, 0]))[0]
    want(patches.shape == (1, 4), f"the patch mask has {patches.shape[1]} columns, the photo 4 patches: drop the "
         "image CLS, column 0, before anything else")  # fmt: skip
    want(patches.sum() == 1, "counts are exact: round(ratio · patches)")
    want(not patches[0, 1], "the second best patch is masked: is it the last column that is dropped? CLS is the first")
    want(patches[0, 0], "the least attended patches are masked instead of the most attended")

    attention[..., 4] = 9.0  # special tokens look at the last patch
    attention[0, :, 1] = torch.tensor([0.0, 0.45, 0.45, 0.1, 0.0])
    attention[0, :, 2] = torch.tensor([0.4, 0.0, 0.0, 0.6, 0.0])
    attention[0, :, 3] = torch.tensor([0.0, 0.45, 0.45, 0.0, 0.1])
    for score in ("max", "entropy"):
        patches, masked = ask(attention, words, score)
        want(masked[0, 2] or score == "max", "word_score entropy: the third token looks at one patch and has to be "
             "masked. Σ_p q log A, q = A / Σ A, and 1e-12 added to A, since 0 · log 0 is NaN")  # fmt: skip
        want(masked[0, 2], f"word_score {score}: the third token looks at one patch and has to be masked. A row of a "
             "softmax sums to 1, so a row's sum over patches only says how little falls on the image CLS")  # fmt: skip
        want(patches[0, 2], "patch_score masked: only the attention of the words just masked counts")
    want(ask(attention, words, whose="all")[0][0, :2].any(),
         "patch_score all: the mean over all words, without the rows of [CLS], [SEP] and padding")  # fmt: skip
    on_cls = attention.clone()
    on_cls[0, :, 2] = torch.tensor([0.98, 0.0, 0.0, 0.02, 0.0])
    want(not ask(on_cls, words, "entropy")[1][0, 2], "word_score entropy: a word is masked that looks at hardly any "
         "patch, but at one: −H(q) alone; add log Σ A, the penalty for what falls on no patch")  # fmt: skip
    varied = lambda *asked: len({str(ask(*asked, seed=seed)[0]) for seed in range(20)}) > 1
    want(varied(torch.ones_like(attention), words), "of equal scores it is always the same patches: `untied` first")
    want(varied(attention, words * 0), "a text without a word has the same patches masked each time: 0 / 0 is NaN; "
         "divide by 1 at least")  # fmt: skip


def check_8(soft_mask, soften) -> None:
    """Scaled Grad-CAM of one word, of the middle layer."""
    attention, word = torch.rand(2, 2, 4, 6, generator=seeded()) + 0.1, torch.tensor([1, 2])
    gradient = torch.randn(attention.shape, generator=seeded(1))
    found = soft_mask(attention, gradient, word)
    want(found.shape == (2, 5), "a soft mask is (B, P): the row of one word, without the image CLS in column 0")
    want(found.min() >= 0 and found.max() <= 1, "a soft mask lies between 0 and 1: (G − min G) / (max G − min G)")
    want(not soft_mask(attention, -gradient.abs(), word).any(), "a gradient that is negative throughout speaks against "
         "the match and yet something is masked: max(0, ∂s/∂A) first (the ReLU of Grad-CAM)")  # fmt: skip
    apart = torch.tensor([[1.0, -9, 0, 0, 0, 0], [0, 9, 2, 0, 0, 0]])[None, :, None].expand(2, 2, 4, 6)
    want(soft_mask(torch.ones_like(apart), apart, word)[0, 0] == 1, "the ReLU comes before the mean over heads, or "
         "heads cancel out")  # fmt: skip
    run, batch = small_run()
    embeds = run.model.encode_image(batch["images"])
    text = run.model.encode_text(batch["token_ids"], batch["attention_mask"])
    matching, attentions = run.model.fusion(text, batch["attention_mask"], embeds, return_attention=True)
    soft = soften(run, batch["words"] > 0, matching, attentions, embeds)
    want(torch.equal(soft[:, 0], embeds[:, 0]), "the image CLS, token 0, must stay as it is")
    empty = "nothing is suppressed. In the last fusion layer only the row of [CLS] reaches the match logit, so the "
    empty += "gradient in every word's row is 0: read a layer before it, as --mask-layer says"
    want(not torch.equal(soft, embeds), empty)


def check_9(word_score) -> None:
    """A score for every word, which reads no truth."""
    run, batch = small_run()
    score = word_score(run, batch | {"images": batch["pixels"]}, seeded())
    want(score.shape == batch["words"].shape, f"a score for every token: {tuple(batch['words'].shape)}")
    want(score.isfinite().all(), "scores must be finite, also where there is no word: mask_words leaves those out")
    again = word_score(run, batch | {"images": batch["pixels"]}, seeded())
    want(torch.equal(score, again), "one generator, two results: give it to everything that draws")


def check_10(choose_masks) -> None:
    """Masks of the shares asked for, of words that may be masked."""
    run, batch = small_run()
    words, patches = batch["words"], run.config.model.grid**2
    for step in (0, run.config.mask_warmup):
        run.step = step
        run.seed_step()
        patch_mask, word_mask = choose_masks(run, batch, teach(run, batch))
        right = [patch_count(patches, run.config.mim_ratio)] * len(words)
        want(patch_mask.sum(1).tolist() == right, f"{patch_mask.sum(1).tolist()} patches are masked, not {right}: "
             "split_patches needs mim_ratio of them, in every photo")  # fmt: skip
        only_words(word_mask, words)
        right_counts(word_mask, words, run.config.mlm_ratio)


@cache
def small_run() -> tuple[Run, dict]:
    """An untrained model of two fusion layers and a batch, images normalised, pixels not."""
    sizes = "--image-size 32 --width 32 --heads 2 --vision-layers 2 --text-layers 1 --fusion-layers 2 --embed-dim 16"
    config, _ = parse_config([*sizes.split(), "--vocab-size", "300", "--precision", "fp32", "--device", "cpu"])
    dataset = Synthetic("train", 12, 32, progress=False)
    run = build_run(config, dataset, build_tokenizer(dataset.captions, 300, 64))
    batch = run.collate([dataset[row] for row in range(0, 24, 3)])
    return run, batch | {"pixels": batch["images"], "images": normalise(batch["images"])}
