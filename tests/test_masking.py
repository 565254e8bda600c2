"""Masks: exact counts, only words, the 80/10/10 rule; synchronized masks by hand; what masks are measured by."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import batch_of, built

import data
from masking import (
    average_attention,
    concentration,
    corrupt_words,
    first_pieces,
    grad_cam,
    itm_grad_cam,
    mask_precision,
    mask_words,
    maskable_words,
    oracle_mask,
    pointing_game,
    random_word_mask,
    replace_words,
    score_clean_words,
    score_masked_words,
    soft_mask,
    sync_mask,
    word_counts,
)

# every token a word of its own; a caption of one word; one without a word
WORDS = torch.tensor([[0, 2, 3, 4, 5, 6, 7, 0], [0, 2, 0, 0, 0, 0, 0, 0], [0] * 8])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_random_word_mask_is_seeded_and_uniform():
    masks = torch.stack([random_word_mask(WORDS, 0.5, seeded(seed)) for seed in range(2000)])
    assert torch.equal(masks[3], random_word_mask(WORDS, 0.5, seeded(3)))
    share = masks.float().mean(0)[0, 1:7]
    assert ((share - 0.5).abs() < 0.05).all()


# token ids in 0 … 7: what they do in a made-up vocabulary. 0 is padding and [CLS], 1 a full stop, 2 a frequent word
CONTINUES = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]).bool()
TELLING = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0]).bool()
TEXTS = st.lists(st.integers(1, 7), max_size=12)


def tokens_of(texts):
    """Texts as a batch, each described from its second token on, the first of which begins a word. -> ids, described."""
    length = 2 + max(map(len, texts))
    ids, is_caption = torch.zeros(2, len(texts), length, dtype=torch.long)
    for b, text in enumerate(texts):
        text = [t - 4 if i == 0 and CONTINUES[t] else t for i, t in enumerate(text)]
        ids[b, 1 : 1 + len(text)], is_caption[b, 1 : 1 + len(text)] = torch.tensor(text, dtype=torch.long), 1
    return ids, is_caption.bool()


def words_slowly(text, is_caption):
    """[places of the pieces] of each word of one text, and which of them may be masked."""
    found = []
    for place, token in enumerate(text):
        if CONTINUES[token] and found:
            found[-1].append(place)
        else:
            found.append([place])
    return [places for places in found if is_caption[places[0]] and any(TELLING[text[place]] for place in places)]


@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_which_words_equals_a_slow_definition(texts):
    ids, is_caption = tokens_of(texts)
    words = maskable_words(ids, is_caption, CONTINUES, TELLING)
    for b in range(len(texts)):
        expected = [0] * ids.shape[1]
        for places in words_slowly(ids[b].tolist(), is_caption[b]):
            for place in places:
                expected[place] = 1 + places[0]
        assert words[b].tolist() == expected
    assert torch.equal(first_pieces(words).sum(1), torch.tensor([len(set(row) - {0}) for row in words.tolist()]))


@given(st.lists(TEXTS, min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 2**31), st.booleans())
def test_masks_hide_all_pieces_of_a_word_or_none_and_count_words(texts, ratio, seed, synchronized):
    words = maskable_words(*tokens_of(texts), CONTINUES, TELLING)
    if synchronized:
        attention = torch.rand(*words.shape, 9, generator=seeded(seed))
        scores = concentration(attention)
        patch_mask, mask = sync_mask(attention, scores, words, ratio, ratio)
        assert patch_mask.sum(1).tolist() == [min(round(9 * ratio), 8)] * len(texts)
    else:
        mask = random_word_mask(words, ratio, seeded(seed))
    counts = []
    for row, masked in zip(words.tolist(), mask.tolist(), strict=True):
        hidden = {word for word, hide in zip(row, masked, strict=True) if hide}
        assert 0 not in hidden and [word in hidden for word in row] == masked
        total = len(set(row) - {0})
        assert len(hidden) == min(total, max(1, round(total * ratio)))
        counts.append([len(hidden)])
    assert word_counts(words, ratio).tolist() == counts


def test_mask_words_goes_by_the_first_piece():
    words = torch.tensor([[0, 2, 2, 4, 5, 5, 0]])
    scores = torch.tensor([[9.0, 1.0, 8.0, 2.0, 3.0, 0.0, 9.0]])
    assert mask_words(scores, words, 0.34).tolist() == [[False] * 4 + [True] * 2 + [False]]


@given(st.lists(TEXTS, min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**31))
def test_true_masks_hide_visible_words_and_their_patches_first(texts, patch_ratio, word_ratio, seed):
    """Half of the words are shown, each on some of 16 patches, all pieces of a word on the same."""
    words = maskable_words(*tokens_of(texts), CONTINUES, TELLING)
    share = torch.rand(*words.shape, 1, generator=seeded(seed)) / 4
    shown = torch.rand(*words.shape, 16, generator=seeded(seed)) < share
    shown &= torch.rand(*words.shape, 1, generator=seeded(seed + 1)) < 0.5
    regions = shown.gather(1, (words - 1).clamp(min=0)[..., None].expand(-1, -1, 16)) & (words > 0)[..., None]
    patch_mask, word_mask = oracle_mask(regions, words, patch_ratio, word_ratio, seeded(seed))
    assert patch_mask.sum(1).tolist() == [min(round(patch_ratio * 16), 15)] * len(texts)
    visible = words * regions.any(dim=2)
    assert not word_mask[visible == 0].any()
    for b in range(len(texts)):
        there, hidden = (set(row.tolist()) - {0} for row in (visible[b], visible[b][word_mask[b]]))
        assert len(hidden) == min(len(there), max(1, round(word_ratio * len(there))))
        assert {word for word, hide in zip(words[b].tolist(), word_mask[b].tolist()) if hide} == hidden
        of_masked, of_any = regions[b][word_mask[b]].any(dim=0), regions[b].any(dim=0)
        masked = patch_mask[b]
        assert not (masked & ~of_masked).any() or not (of_masked & ~masked).any()  # those of the masked words first
        assert not (masked & ~of_any).any() or not (of_any & ~masked).any()  # then what other words name
    again = oracle_mask(regions, words, patch_ratio, word_ratio, seeded(seed))
    assert all(map(torch.equal, again, (patch_mask, word_mask)))


def test_sync_mask_by_hand():
    """One pair, two heads, [CLS] + three words + [SEP] + [PAD], image CLS + four patches."""
    words = torch.tensor([[0, 2, 3, 4, 0, 0]])
    attention = torch.zeros(1, 2, 6, 5)
    # CLS column first; it and the rows of special tokens must not count
    attention[0, :, 0] = attention[0, :, 4] = attention[0, :, 5] = torch.tensor([0.0, 1.0, 0, 0, 0])
    attention[0, :, 1] = torch.tensor([0.80, 0.02, 0.02, 0.02, 0.14])  # little on patches, but concentrated
    attention[0, :, 2] = torch.tensor([0.00, 0.25, 0.25, 0.25, 0.25])  # spread evenly
    attention[0, 0, 3] = torch.tensor([0.10, 0.00, 0.52, 0.38, 0.00])
    attention[0, 1, 3] = torch.tensor([0.10, 0.00, 0.00, 0.40, 0.50])

    def masks():
        read = average_attention([attention])
        return [mask[0].int().tolist() for mask in sync_mask(read, concentration(read), words, 0.5, 0.34)]

    # the patches of the masked word alone, the third: 0, 0.26, 0.39, 0.25
    # entropy: −0.94 − 1.61 for the little, concentrated attention, −1.39 evenly spread, −1.08 − 0.11 for the third
    assert masks() == [[0, 1, 1, 0], [0, 0, 0, 1, 0, 0]]
    attention[0, :, 2] = torch.tensor([0.00, 0.00, 0.00, 0.99, 0.01])  # now all on one patch
    assert masks() == [[0, 0, 1, 1], [0, 0, 1, 0, 0, 0]]
    attention[0, :, 2] = torch.tensor([0.99, 0.00, 0.00, 0.01, 0.00])  # nearly nothing, though on one patch
    assert masks()[1] == [0, 0, 0, 1, 0, 0]


@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(0, 2**31))
def test_patches_are_scored_by_the_attention_of_masked_words_weighted_by_their_scores(texts, seed):
    """Against a loop; a caption without a word gets a patch mask, too."""
    words = maskable_words(*tokens_of(texts), CONTINUES, TELLING)
    attention = torch.rand(*words.shape, 9, generator=seeded(seed)).double()
    scores = torch.randn(words.shape, generator=seeded(seed)).double()
    patch_mask, word_mask = sync_mask(attention, scores, words, 0.5, 0.5)
    for b in range(len(words)):
        masked = word_mask[b].nonzero().flatten().tolist()
        patch_scores = sum(scores[b, w].exp() * attention[b, w] for w in masked) if masked else attention[b].sum(0)
        assert patch_mask[b].sum() == 4
        assert patch_scores[patch_mask[b]].min() >= patch_scores[~patch_mask[b]].max()


def test_words_are_scored_by_their_own_image_and_by_another():
    """Against one pass for each of some words, with the same other words masked."""
    state, dataset = built("--fusion-layers", "2")
    batch = batch_of(state, dataset, range(6))
    momentum, attention_mask, words = state.momentum.model, batch["attention_mask"], batch["maskable"]
    image_kv = momentum.fusion.project_image_kv(momentum.vision(data.normalise(batch["images"])))
    masked = random_word_mask(words, 0.5, seeded(3))
    _, scores = score_masked_words(momentum, batch, image_kv, masked, state.mask_id)
    assert torch.equal(scores.isinf(), ~masked)
    text_embeds = momentum.text(batch["token_ids"].masked_fill(masked, state.mask_id), attention_mask)
    for b, word in masked.nonzero()[::7].tolist():
        images = torch.tensor([b, (b + 3) % 6])
        fused = momentum.fusion(text_embeds[[b, b]], attention_mask[[b, b]], image_kv, images)
        log_p = momentum.mlm_logits(fused[:, word]).log_softmax(-1)[:, batch["token_ids"][b, word]]
        torch.testing.assert_close(scores[b, word], log_p[0] - log_p[1], atol=1e-4, rtol=1e-3)


def test_only_scored_words_are_masked_where_they_are_enough():
    scores = torch.rand(WORDS.shape).masked_fill(~random_word_mask(WORDS, 0.5, seeded(1)), -torch.inf)
    word_mask = sync_mask(torch.rand(*WORDS.shape, 4), scores, WORDS, 0.5, 0.5)[1]
    first = first_pieces(WORDS) & word_mask
    assert first.any() and not scores[first].isinf().any()


def test_cooccurrence_by_hand():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]]).bool()
    candidates = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]]).bool()
    shared = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]]).bool()
    hits, total = mask_precision(mask, candidates, shared)
    assert (hits, total) == (2, 3)


def test_pointing_by_hand():
    """Word 0 points into its region, word 1 beside it, word 2 has none, word 3 is not asked about."""
    attention = torch.tensor([[[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]]])
    regions = torch.tensor([[[1, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]]]).bool()
    hits, expected, total = pointing_game(attention, regions, torch.tensor([[True, True, False, False]]))
    assert (hits, total) == (1, 2) and expected == pytest.approx(2 / 3 + 1 / 3)


def test_corruption_is_80_10_10_and_labels_the_masked_only():
    ids = torch.randint(5, 1000, (200, 100), generator=seeded(1))
    mask = torch.rand(ids.shape, generator=seeded(2)) < 0.5
    corrupted, labels = corrupt_words(ids, mask, 4, torch.arange(5, 1000), seeded(0))
    assert torch.equal(labels[mask], ids[mask]) and (labels[~mask] == -100).all()
    assert torch.equal(corrupted[~mask], ids[~mask])
    masked, kept = (corrupted == 4)[mask].float().mean(), (corrupted == ids)[mask].float().mean()
    assert math.isclose(masked, 0.8, abs_tol=0.02) and math.isclose(kept, 0.1, abs_tol=0.02)
    drawn = corrupted[mask & (corrupted != 4) & (corrupted != ids)]
    assert drawn.min() >= 5 and drawn.max() < 1000 and len(drawn.unique()) > 500


def test_replaced_words_are_known_and_synonyms_are_not_among_them():
    """Even ids have their antonym 1000 above, odd ones none; ids from 500 on have their synonym 2000 above."""
    ids = torch.randint(5, 1000, (300, 100), generator=seeded(1))
    words = torch.rand(ids.shape, generator=seeded(3)) < 0.8
    mask = words & (torch.rand(ids.shape, generator=seeded(2)) < 0.5)
    every = torch.arange(1000)
    antonyms, synonyms = torch.where(every % 2 == 0, every + 1000, -1), torch.where(every >= 500, every + 2000, -1)
    swaps = torch.stack([antonyms, synonyms])
    corrupted, labels, replaced = replace_words(ids, words, mask, 4, torch.arange(5, 1000), swaps, seeded(0))
    assert torch.equal(labels[mask], ids[mask]) and (labels[~mask] == -100).all()
    assert torch.equal(replaced, mask & (corrupted != ids) & (corrupted != 4))
    assert math.isclose(replaced[mask].float().mean(), 0.1, abs_tol=0.02)
    opposite = corrupted[replaced] == ids[replaced] + 1000
    even = ids[replaced] % 2 == 0
    assert not opposite[~even].any() and math.isclose(opposite[even].float().mean(), 0.5, abs_tol=0.06)
    changed = ~mask & (corrupted != ids)
    assert torch.equal(corrupted[changed], ids[changed] + 2000) and (words[changed] & (ids[changed] >= 500)).all()
    share = changed.sum() / (words & ~mask & (ids >= 500)).sum()
    assert math.isclose(share, 0.15, abs_tol=0.02)


def test_soft_mask_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(3, 2, 5, 7, generator=generator, requires_grad=True)
    gradient = torch.randn(3, 2, 5, 7, generator=generator)
    word = torch.tensor([1, 4, 2])
    mask = soft_mask(grad_cam(attention, (attention * gradient).sum()), word)  # whose gradient is `gradient`
    assert not mask.requires_grad and mask.shape == (3, 6)
    for b in range(3):
        heat = torch.zeros(6)
        for head in range(2):
            for patch in range(6):
                place = b, head, word[b], patch + 1
                heat[patch] += attention[place].item() * max(0.0, gradient[place].item()) / 2
        expected = (heat - heat.min()) / (heat.max() - heat.min() + 1e-7)
        torch.testing.assert_close(mask[b], expected, atol=1e-5, rtol=0)
    against = -(attention * gradient.abs()).sum()  # nothing speaks for the match
    assert not soft_mask(grad_cam(attention, against), word).any()


def test_grad_cam_of_the_itm_logit_is_empty_in_the_last_layer():
    """There the ITM head reads the row of [CLS] alone."""
    state, dataset = built("--fusion-layers", "3")
    batch, model = batch_of(state, dataset, range(4)), state.model
    text_embeds = model.text(batch["token_ids"], batch["attention_mask"])
    image_kv = model.fusion.project_image_kv(model.vision(data.normalise(batch["images"])))
    fused, attentions = model.fusion(text_embeds, batch["attention_mask"], image_kv, return_attention=True)
    maps = itm_grad_cam(model, attentions, fused)
    assert maps[:, :, 1:].any()
    last = itm_grad_cam(model, attentions[2:], fused)
    assert last[:, :, 0].any() and not last[:, :, 1:].any()


@pytest.mark.parametrize("source", ["masked", "clean"])
def test_a_masked_word_attends_by_the_rest_of_the_pair(source):
    """So another word in its place changes its row of the clean attention alone."""
    state, dataset = built("--fusion-layers", "2")
    batch = batch_of(state, dataset, range(6))
    word = batch["maskable"][0].nonzero()[0].item()
    momentum = state.momentum.model
    image_kv = momentum.fusion.project_image_kv(momentum.vision(data.normalise(batch["images"])))

    def attention(token_ids):
        changed = batch | {"token_ids": token_ids}
        if source == "masked":
            masked = batch["maskable"] > 0
            return score_masked_words(momentum, changed, image_kv, masked, state.mask_id)[0]
        return score_clean_words(momentum, changed, image_kv)[0]

    ids = batch["token_ids"]
    other_ids = ids.clone()
    other_ids[0, word] = (ids[0, word] + 7) % 200 + 5
    before, after = attention(ids), attention(other_ids)
    assert before.shape == (6, ids.shape[1], 16)
    same = torch.allclose(before[0, word], after[0, word], rtol=1e-3, atol=0)
    assert same == (source == "masked")


def test_layers_are_read_where_they_agree():
    one, two = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    expected = (one.mean(1) * two.mean(1)).sqrt()[..., 1:]
    torch.testing.assert_close(average_attention([one, two]), expected)
