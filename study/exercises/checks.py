"""What is wrong, in words, for the mistakes that are easily made; the project's own tests then ask for the rest.

Each check takes the functions of an exercise and raises Mistake.
"""

import torch
from torch import Tensor

from masking import first_pieces, word_counts
from study.exercises.catalogue import Functions, Mistake

# [CLS] a zip ##per of black silk . [SEP] with "of" and the full stop no words; a text of one word; one without any
WORDS = torch.tensor([[0, 2, 3, 3, 0, 6, 7, 8, 9, 0, 0], [0, 2] + [0] * 9, [0] * 11])


def seeded(seed: int = 0) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


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


def masks_of(sync_mask, attention, scores, words, ratio: float, pool: float, seed: int) -> tuple[Tensor, Tensor]:
    """A quarter of the patches and `ratio` of the words."""
    return sync_mask(attention, scores, words, 0.25, ratio, pool, seeded(seed))


def check_7(sync_mask) -> None:
    """Words by their score, patches by their attention."""
    words_by_score(sync_mask)
    patches_by_attention(sync_mask)


def words_by_score(sync_mask) -> None:
    """Three words with scores, the first of three pieces."""
    words = torch.tensor([[0, 2, 2, 2, 5, 6, 0]])
    attention = torch.full((1, 7, 4), 0.25)
    scores = torch.tensor([[99.0, 3, 3, 3, 1, 2, 99]])

    def times_masked(ratio: float, pool: float, scores=scores) -> list[int]:
        masks = [masks_of(sync_mask, attention, scores, words, ratio, pool, seed)[1] for seed in range(20)]
        for mask in masks:
            only_words(mask, words)
            right_counts(mask, words, ratio)
        return torch.cat(masks)[:, [1, 4, 5]].sum(0).tolist()  # how often each word

    best, _, second = times_masked(0.67, 0.0)
    want(best, "the lowest scores are masked: it should be the highest")
    want(best == 20, "words are drawn from all of the text: first the best, then a draw among these alone. best + "
         "draws is above 1 in the mask `best`, and below 1 elsewhere")  # fmt: skip
    want(second == 20, "with a pool below word_ratio the best word_ratio are masked: max(pool, word_ratio), and "
         "that of the words, not of the tokens")  # fmt: skip
    best, worst, second = times_masked(0.34, 0.67)
    want(not worst, "a word is masked that is not in the pool, the best max(pool, word_ratio) of the words")
    want(best and second, "the pool is ignored: of the best two of three words one is to be drawn, and it is "
         "always the same")  # fmt: skip
    equal = times_masked(0.34, 0.0, torch.ones(1, 7))
    want(max(equal) < 20, "of equal scores it is always the same word: `untied` first")


def patches_by_attention(sync_mask) -> None:
    """Three words, of which the second has the highest score and attends to one patch alone."""
    words = torch.tensor([[0, 2, 3, 4, 0, 0]])
    scores = torch.tensor([[0.0, 1, 2, 1, 0, 0]])
    attention = torch.zeros(1, 6, 4)
    attention[..., 3] = 9.0  # special tokens attend to the last patch
    attention[0, 1] = torch.tensor([0.45, 0.45, 0.1, 0.0])
    attention[0, 2] = torch.tensor([0.0, 0.1, 0.6, 0.0])
    attention[0, 3] = torch.tensor([0.45, 0.45, 0.0, 0.1])

    def patches(attention=attention, words=words, seed: int = 0) -> Tensor:
        return masks_of(sync_mask, attention, scores, words, 0.34, 0.0, seed)[0]

    found = patches()
    want(
        found.shape == (1, 4) and found.sum() == 1, "a patch mask is (B, P), with exact counts: round(ratio · patches)"
    )
    want(not found[0, :2].any(), "the patch is masked that the other words attend to, or the least attended one: "
         "the highest mean attention of the words just masked")  # fmt: skip
    want(not found[0, 3], "the rows of [CLS], [SEP] and padding count: only the words just masked do")
    want(found[0, 2], "the patch is not masked that the words just masked attend to most")

    def varied(attention: Tensor, words: Tensor) -> bool:
        return len({str(patches(attention, words, seed)) for seed in range(20)}) > 1

    want(varied(torch.ones_like(attention), words), "of equal scores it is always the same patches: `untied` first")
    want(varied(attention, words * 0), "a text without a word has the same patches masked each time: 0 / 0 is NaN; "
         "divide by 1 at least")  # fmt: skip


def check_8(grad_cam, soft_mask) -> None:
    """Grad-CAM, then one word's row of it, scaled."""
    attention = (torch.rand(2, 2, 4, 6, generator=seeded()) + 0.1).requires_grad_()
    gradient = torch.randn(attention.shape, generator=seeded(1))
    score = (attention * gradient).sum()  # its gradient
    maps = grad_cam(attention, score)
    want(
        maps.shape == attention.shape,
        "a map has the shape of the attention, (B, h, L, N)",
    )
    want(not maps.requires_grad, "maps are detached: nothing is learnt through a soft mask")
    want((maps >= 0).all(), "a gradient that is negative speaks against the match and yet counts: max(0, ∂s/∂A) first "
         "(the ReLU of Grad-CAM)")  # fmt: skip
    right = (attention * gradient.clamp(min=0)).detach()
    want(torch.allclose(maps, right), "A · max(0, ∂s/∂A), for each head: the attention itself is a factor")
    try:
        score.backward()
    except RuntimeError:
        raise Mistake("the losses still need the graph of the score: retain_graph=True") from None
    word = torch.tensor([1, 2])
    found = soft_mask(maps, word)
    want(found.shape == (2, 5), "a soft mask is (B, P): the row of one word, without the image CLS in column 0")
    want(found.min() >= 0 and found.max() <= 1, "a soft mask lies between 0 and 1: (G − min G) / (max G − min G)")
    ends = torch.stack([found.amin(dim=1), found.amax(dim=1)])
    right_ends = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    want(torch.allclose(ends, right_ends, atol=1e-3), "each photo has a least and a most of its own: 0 and 1")
    own = right.mean(dim=1)[torch.arange(2), word, 1:]
    want(torch.equal(found.argsort(), own.argsort()), "the row of the word counts, word_index, as the mean over heads")
