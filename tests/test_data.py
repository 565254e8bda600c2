"""Tokenizer, informative words, collation with ground truth, augmentation."""

import json
import types
from dataclasses import replace

import pytest
import torch
from small import FAST
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertTokenizerFast

import data
from data import Collate, augment, build_tokenizer, random_crops, word_regions
from engine.batches import ReadableItems, augmented
from engine.config import parse_config
from readers.dataset import Unreadable
from readers.prompts import SYMBOLS

TEXTS = ["Long shirt in navy.", "Robe d'été, 100% coton—NEUF!", "unseenwordzz 日本 ß ½", "", "a" * 300, "it's  v-neck"]


def vocabulary(folder, words):
    """Write a vocabulary of these words to a file."""
    (folder / "vocab.txt").write_text("\n".join([*data.SPECIAL_TOKENS, *words]))
    return folder / "vocab.txt"


def test_tokenizer_equals_bert_tokenizer_fast(tmp_path, wardrobe):
    trained = build_tokenizer(wardrobe.captions + TEXTS[:2], 300, 32)
    words = sorted(trained.get_vocab(), key=trained.token_to_id)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    read = build_tokenizer([], 0, 32, vocab=tmp_path / "vocab.txt")
    texts = TEXTS + wardrobe.captions[:50]
    for tokenizer in (trained, read, data.Tokenizer.from_str(read.to_str())):
        # a vocabulary of the captions keeps their accents
        reference = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), strip_accents=tokenizer is not trained)
        expected = reference(texts, padding=True, truncation=True, max_length=32)
        encoded = data.tokenize(tokenizer, [("", text) for text in texts])
        assert encoded["token_ids"].tolist() == expected["input_ids"]
        assert encoded["attention_mask"].tolist() == expected["attention_mask"]
    assert not encoded["is_caption"][3].any() and encoded["is_caption"][0].sum() > 3
    assert not (encoded["is_caption"] & ~encoded["attention_mask"].bool()).any()


def saved_tokenizer(folder, model, **settings):
    """Write the tokenizer.json of a model. settings: its normalizer and pre_tokenizer, otherwise as BERT's"""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = settings.get("normalizer", normalizers.BertNormalizer(lowercase=True))
    tokenizer.pre_tokenizer = settings.get("pre_tokenizer", pre_tokenizers.BertPreTokenizer())
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("has_type", [True, False])
def test_a_published_tokenizer_json_gives_the_same_tokens(tmp_path, wardrobe, has_type):
    """As published: with a template, truncation and padding of its own; the first versions named no type of model."""
    trained = build_tokenizer(wardrobe.captions + TEXTS[:2], 300, 32)
    words = sorted(trained.get_vocab(), key=trained.token_to_id)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    reference = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    reference(TEXTS, padding="max_length", truncation=True, max_length=7)  # leaves both settings in the file
    folder = tmp_path / "minilm"
    reference.save_pretrained(folder)
    assert not (folder / "vocab.txt").exists()
    if not has_type:
        content = json.loads((folder / "tokenizer.json").read_text())
        del content["model"]["type"]
        (folder / "tokenizer.json").write_text(json.dumps(content))
    expected = reference(TEXTS, padding="max_length", truncation=True, max_length=32)["input_ids"]
    for vocab in (folder, folder / "tokenizer.json", tmp_path):
        tokenizer = build_tokenizer([], 0, 32, vocab=vocab)
        tokenizer.enable_padding(length=32)
        assert data.tokenize(tokenizer, [("", text) for text in TEXTS])["token_ids"].tolist() == expected


WORDS = {word: number for number, word in enumerate([*data.SPECIAL_TOKENS, "red", "##s", "dress"])}
CASED = {word: number for number, word in enumerate([*data.SPECIAL_TOKENS, "Red", "##s", "Dress"])}
BERT_MODEL = models.WordPiece(WORDS, unk_token="[UNK]")


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (models.BPE(WORDS, []), {}, "a BPE tokenizer; give the vocab.txt or tokenizer.json of a WordPiece"),
        (models.Unigram([(word, -1.0) for word in WORDS], 1), {}, "a Unigram tokenizer; "),
        (models.WordLevel(WORDS, unk_token="[UNK]"), {}, "a WordLevel tokenizer; "),
        (
            BERT_MODEL,
            {"normalizer": normalizers.BertNormalizer(lowercase=False)},
            "a cased WordPiece tokenizer, it splits",
        ),
        (BERT_MODEL, {"normalizer": None}, "a cased WordPiece tokenizer"),
        (BERT_MODEL, {"normalizer": normalizers.Lowercase()}, "not BERT's tokenizer, it splits"),
        (BERT_MODEL, {"pre_tokenizer": pre_tokenizers.WhitespaceSplit()}, "not BERT's tokenizer"),
        (BERT_MODEL, {"pre_tokenizer": None}, "not BERT's tokenizer"),
        (models.WordPiece(CASED, unk_token="[UNK]"), {}, "a cased vocabulary, with words such as 'Red'"),
        (models.WordPiece(WORDS | {"far": 99}, unk_token="[UNK]"), {}, "its ids have gaps"),
        (
            models.WordPiece(WORDS, unk_token="[UNK]", continuing_subword_prefix="@"),
            {},
            "its pieces do not begin with ##",
        ),
        (models.WordPiece({"<unk>": 0, "red": 1}, unk_token="<unk>"), {}, r"it lacks \[PAD\], \[UNK\]"),
    ],
)
def test_another_tokenizer_is_refused_with_its_kind(tmp_path, model, settings, message):
    saved_tokenizer(tmp_path, model, **settings)
    for vocab in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(data.DataError, match=f"tokenizer.json: .*{message}"):
            build_tokenizer([], 0, 32, vocab=vocab)


def test_what_is_no_vocabulary_is_refused(tmp_path):
    with pytest.raises(data.DataError, match="holds neither tokenizer.json nor vocab.txt"):
        build_tokenizer([], 0, 32, vocab=tmp_path)
    (tmp_path / "vocab.json").write_text('{"red": 0}')  # of a BPE tokenizer
    with pytest.raises(data.DataError, match="vocab.json: not a tokenizer.json"):
        build_tokenizer([], 0, 32, vocab=tmp_path / "vocab.json")
    with pytest.raises(data.DataError, match="vocab.txt: a cased vocabulary, with words such as 'Red'"):
        build_tokenizer([], 0, 32, vocab=vocabulary(tmp_path, ["Red", "dress", "Shirt"]))


def test_captions_are_padded_to_the_longest_of_the_batch_only(wardrobe):
    tokenizer = build_tokenizer(wardrobe.captions, 300, 64)
    batch = Collate(tokenizer)([wardrobe[i] for i in range(4)])
    longest, length = batch["attention_mask"].sum(1).max(), batch["token_ids"].shape[1]
    assert longest <= length < longest + 8 and length % 8 == 0 and length < 64
    odd = build_tokenizer(wardrobe.captions, 300, 12)  # lengths go in steps that end at the longest
    assert {data.tokenize(odd, [("", text)])["token_ids"].shape[1] for text in ("a", 40 * "red ")} <= {4, 8, 12}


def test_prompts_are_never_masked_and_the_symbol_stands_at_position_1(wardrobe, monkeypatch):
    monkeypatch.setattr(wardrobe, "prompts", True)
    texts = [wardrobe.text(row) for row in range(len(wardrobe))]
    tokenizer = build_tokenizer([" ".join(text[1::2]) for text in texts], 600, 128, prompts=True)
    again = build_tokenizer([" ".join(text[1::2]) for text in texts], 600, 128, prompts=True)
    assert again.to_str() == tokenizer.to_str() and tokenizer.get_vocab_size() <= 600 + len(SYMBOLS)
    special = {tokenizer.token_to_id(token) for token in data.SPECIAL_TOKENS}
    symbols = {tokenizer.token_to_id(f"[{symbol}]") for symbol in SYMBOLS}
    assert min(symbols) == tokenizer.get_vocab_size() - 9
    assert not symbols & set(data.replacement_ids(tokenizer).tolist())
    batch = data.tokenize(tokenizer, texts[:30])
    for text, ids, is_caption in zip(texts, batch["token_ids"].tolist(), batch["is_caption"].tolist(), strict=False):
        assert tokenizer.id_to_token(ids[1]) == text[0].split()[0] and ids[1] in symbols
        tokens = [tokenizer.id_to_token(i) for i in ids]
        outside = [token for token, inside in zip(tokens, is_caption, strict=True) if not inside and token != "[PAD]"]
        prompt_words = " ".join(text[0::2]).split()
        assert outside == ["[CLS]", *prompt_words, "[SEP]"]  # and every word of a prompt is one token
        assert not {i for i, inside in zip(ids, is_caption, strict=True) if inside} & (special | symbols)


def test_word_pairs_are_tokens_of_the_vocabulary(tmp_path):
    tokenizer = build_tokenizer([], 0, 32, vocab=vocabulary(tmp_path, ["long", "short", "wide", "tall"]))
    assert data.word_pairs(tokenizer, "long short, wide narrow, tall short").tolist() == [-1] * 5 + [6, 5, -1, 6]
    assert len(data.ANTONYMS.split(", ")) > 20 and all(len(pair.split()) == 2 for pair in data.SYNONYMS.split(", "))


def test_informative_pieces_by_hand(tmp_path, monkeypatch):
    """Six captions, two of them equal: "at" is in all, "red" in three of the five distinct ones, "v" in one, often."""
    words = ["at", "red", "v", "zip", "##per", "##s", ".", "-", "front", "##%"]
    tokenizer = build_tokenizer([], 0, 32, vocab=vocabulary(tmp_path, words))
    captions = ["Red zipper at front.", "Red zips at front.", "Red Ω v-v v-v at front.", "Zip at front.", "Zip at."]
    captions.insert(2, captions[0])

    def pieces_at(max_doc_freq):
        monkeypatch.setattr(data, "MAX_DOC_FREQ", max_doc_freq)
        return data.informative_pieces(tokenizer, captions)

    def names(pieces):
        return [word for word, piece in zip(words, pieces[len(data.SPECIAL_TOKENS) :], strict=True) if piece]

    continues, informative = pieces_at(0.6)
    assert continues.shape == informative.shape == (len(words) + 5,)
    assert not informative[tokenizer.token_to_id("[UNK]")]
    assert names(continues) == ["##per", "##s", "##%"] and names(informative) == ["red", "v", "##per", "##s"]
    assert names(pieces_at(0.8)[1]) == ["red", "v", "zip", "##per", "##s", "front"]  # 4 of 5: no more than the share
    assert "at" in names(pieces_at(1.0)[1]) and "." not in names(pieces_at(1.0)[1])
    item = {"image": torch.zeros(3, 8, 8, dtype=torch.uint8), "product_id": 0, "caption_id": 0, "row": 0}
    item["text"] = ("[UNK]", "Red zipper at front. V-v.")
    batch = Collate(tokenizer, pieces_at(0.6))([item])
    # [CLS] [UNK] red zip ##per at front . v - v . [SEP]: a word whose second piece is informative is masked whole
    assert batch["maskable"][0, :13].tolist() == [0, 0, 3, 4, 4, 0, 0, 0, 9, 0, 11, 0, 0]
    assert batch["is_caption"][0, :13].tolist() == [False] * 2 + [True] * 10 + [False]
    maskable = Collate(tokenizer)([item])["maskable"][0, :13].tolist()
    assert maskable == [0, 0, *range(3, 13), 0]  # without `informative`, each piece is a word


def test_a_batch_has_the_ground_truth_that_the_items_have(wardrobe, monkeypatch):
    tokenizer = build_tokenizer(wardrobe.captions, 400, 64)
    plain = Collate(tokenizer)([wardrobe[row] for row in range(6)])
    monkeypatch.setattr(wardrobe, "with_ground_truth", True)
    batch = Collate(tokenizer)([wardrobe[row] for row in range(6)])
    assert all(torch.equal(batch[key], plain[key]) for key in plain if key != "unreadable")
    assert "region_masks" not in plain
    assert batch["region_masks"].dtype == torch.uint8 and batch["region_masks"].shape[2:] == (64, 64)
    assert not batch["region_masks"][:, :2].any()  # of no attribute, and of attributes that are not visible
    for grid in (4, 8, 16):
        regions = word_regions(batch, grid)
        assert regions.shape == (*batch["region_index"].shape, grid**2)
        assert not regions[batch["region_index"] < 2].any() and regions[batch["region_index"] >= 2].any(dim=1).all()


@pytest.mark.parametrize(("words", "message"), [([], "no word but the special"), (["red", "red"], "'red' stands on")])
def test_a_vocabulary_without_words_or_with_gaps_is_refused(tmp_path, words, message):
    with pytest.raises(data.DataError, match=f"vocab.txt: .*{message}"):
        build_tokenizer([], 0, 32, vocab=vocabulary(tmp_path, words))


def test_the_next_image_replaces_an_unreadable_one(wardrobe):
    tokenizer = build_tokenizer(wardrobe.captions, 300, 64)
    items = [Unreadable(f"{row}.png: gone") if row in (1, 2, 149) else wardrobe[row] for row in range(150)]
    readable = ReadableItems(items)
    batch = Collate(tokenizer)([readable[row] for row in (0, 1, 3, 149)])
    assert batch["rows"].tolist() == [0, 3, 3, 0] and len(batch["token_ids"]) == 4
    assert batch["unreadable"] == ["1.png: gone", "2.png: gone", "149.png: gone"]
    with pytest.raises(data.DataError, match="a hundred images .* cannot be read, the last one: gone"):
        ReadableItems([Unreadable("gone")] * 3)[0]


def test_word_regions_by_hand():
    """Region masks of 8 × 8 pixels on 2 × 2 patches, of 16 pixels each."""
    region_masks = torch.zeros(1, 6, 8, 8)
    region_masks[0, 2, :4, :4] = 1  # the whole first patch, and a quarter of the second: one row of four
    region_masks[0, 2, 0, 4:] = 1
    region_masks[0, 3, :3, :4] = 1  # three quarters of the first, and less than a quarter of the second: three pixels
    region_masks[0, 3, 0, 4:7] = 1
    # three pixels of one patch, which are the most; half as much in another, two pixels, counts, one pixel does not
    region_masks[0, 4, 4, :3] = 1
    region_masks[0, 4, 4, 4:6] = 1
    region_masks[0, 4, 0, 7] = 1
    region_masks[0, 5, 0, 0] = 0.1  # hardly in the image, after a crop
    region_index = torch.tensor([[0, 1, 2, 3, 4, 5, 2]])
    rows = word_regions({"region_masks": region_masks, "region_index": region_index}, 2)[0].int().tolist()
    assert rows == [[0] * 4, [0] * 4, [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0] * 4, [1, 1, 0, 0]]


@pytest.mark.parametrize("distort", ["0", "1"])
def test_the_ground_truth_follows_crop_and_flip(distort):
    """A region mask that equals a white shape on black still does after cropping, flipping and rotating."""
    shapes = torch.zeros(16, 32, 32)
    for number, shape in enumerate(shapes):
        shape[6 + number % 4 : 20, 2 : 9 + number] = 1
    region_masks = torch.stack([torch.zeros_like(shapes), torch.zeros_like(shapes), shapes], dim=1).byte()
    batch = {"images": (shapes * 255).byte()[:, None].expand(-1, 3, -1, -1), "region_masks": region_masks}
    config = parse_config([*FAST, "--crop-scale", "0.4", "--distort", distort])[0]
    run = types.SimpleNamespace(config=config, generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
    cropped = augmented(run, batch)
    mean, std = data.imagenet_mean_std(torch.device("cpu"))
    difference = ((cropped["images"] * std + mean).mean(dim=1) - cropped["region_masks"][:, 2]).abs()
    assert difference.max() < 1e-5 if distort == "0" else difference.mean() < 0.06
    assert not cropped["region_masks"][:, :2].any()
    assert len(cropped["region_masks"][:, 2].flatten(1).unique(dim=0)) == 16
    run.config = replace(config, crop_scale=1.0, distort=0.0)
    uncropped = augmented(run, batch)["region_masks"][:, 2]
    flipped = sum(torch.allclose(*pair, atol=1e-5) for pair in zip(uncropped, shapes.flip(-1), strict=True))
    unflipped = sum(torch.allclose(*pair, atol=1e-5) for pair in zip(uncropped, shapes, strict=True))
    assert 2 < flipped < 14 and unflipped + flipped == 16


def test_augment_crops_the_given_share_and_flips_half():
    """Pixel values are x positions, so they show the range and direction of a crop."""
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(400, 3, 64, 64)
    generator = torch.Generator().manual_seed(0)
    out = augment(ramp, random_crops(400, 0.5, generator), generator)
    mean, std = data.imagenet_mean_std(torch.device("cpu"))
    values = (out * std + mean)[:, 0, 32] * 255
    width = (values[:, -1] - values[:, 0]) / 252
    assert abs((width < 0).float().mean() - 0.5) < 0.1
    assert width.abs().min() > 0.6 and width.abs().max() < 1.01 and width.abs().std() > 0.05
    assert values.min() >= 0 and values.max() <= 255


def test_a_vocabulary_lacks_no_special_token(tmp_path):
    (tmp_path / "vocab.txt").write_text("red\ndress\n")
    with pytest.raises(data.DataError, match=r"vocab.txt: not a BERT vocabulary, it lacks \[PAD\], \[UNK\]"):
        build_tokenizer([], 60, 32, vocab=tmp_path / "vocab.txt")
