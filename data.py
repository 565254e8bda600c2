"""From items to batches: collation, augmentation, tokenizer; and the data sets by name.

Every data set is a list of rows, an image with a caption each (`readers/dataset.py`). Triplets are for text-guided
retrieval, statements for visual entailment: see docs/data.md. Images stay uint8 until they are on the training device.
There `augment` or `normalise` turns a whole batch to floats at once.

Letters: B items of a batch, S side of an image in pixels, P patches, L tokens of the longest text of a batch,
V vocabulary, K region masks of an image.
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from tokenizers import Encoding, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor
from tqdm import tqdm

from engine.flags import OneLineParser, in_one_line
from masking import maskable_words
from readers.convert import add_flags, convert_command
from readers.dataset import DataError, GroundTruth, PairDataset, ReportedSplit, Unreadable
from readers.fashiongen import fashiongen
from readers.files import read_text
from readers.jsonl import jsonl
from readers.karpathy import CaptionedName, karpathy
from readers.prompts import ATTRIBUTES, CAPTION_PREFIX, DIFFERENCE_PREFIX, SYMBOLS, Text
from readers.statements import snlive, synthetic_statements
from readers.synthetic import MIN_REGION, Synthetic
from readers.triplets import Triplets, fashioniq, synthetic_triplets
from readers.wardrobe import ATTRIBUTE_KINDS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ---------------------------------------------------------------- items -> a batch


NO_ATTRIBUTE = 0  # `region_index` of tokens that name no attribute
NOT_VISIBLE = 1  # `region_index` of tokens that name an attribute that the image does not show


@dataclass
class Collate:
    """A function that makes a batch of items. Items whose image cannot be read are left out.

    A batch holds these tensors, or `rows` and `unreadable` alone where no item is left:

        rows             int64 (B,)          row of each item in the data set
        unreadable       list of str         why images could not be read
        images           uint8 (B, 3, S, S)
        target_images    uint8 (B, 3, S, S)  of triplets, where the targets are published
        product_ids      int64 (B,)
        caption_ids      int64 (B,)
        token_ids        int64 (B, L)
        attention_mask   int64 (B, L)        1 = attend, 0 = padding
        is_caption       bool (B, L)         tokens of a caption or an attribute's value, not of prompts
        maskable         int64 (B, L)        number of the token's word, 0 where it is never masked

    and with ground truth:

        region_masks     uint8 (B, K, S, S)  two that are empty, then one for each attribute that the image shows
        region_index     int64 (B, L)        the region mask of a token: 0 names no attribute, 1 names one that the
                                             image does not show
        attribute_kinds  int64 (B, L)        index in ATTRIBUTE_KINDS plus 1, 0 names no attribute

    A word is numbered by the place of its first piece, counted from 1, as in masking.py. In this example "and" names no
    attribute, and the image does not show "wool":

        token            [CLS]  striped  and  zip  ##ped  wool  [SEP]
        place              1       2      3    4     5      6     7
        maskable           0       2      3    4     4      6     0
        region_index       0       2      0    3     3      1     0
        attribute_kinds    0       3      0    6     6     10     0

    tokenizer: by `build_tokenizer`
    informative: by `informative_pieces`; without it each token of a caption or value is a maskable word of its own
    """

    tokenizer: Tokenizer
    informative: tuple[Tensor, Tensor] | None = None

    def __call__(self, items: list[dict | Unreadable]) -> dict:
        """Make a batch of items, as `PairDataset` and `ReadableItems` give them."""
        readable = []
        unreadable = []
        for item in items:
            if isinstance(item, Unreadable):
                unreadable.append(item.reason)
            else:
                readable.append(item)
                unreadable += item.get("unreadable", [])  # images that this item replaces
        batch = {"rows": torch.tensor([item["row"] for item in readable], dtype=torch.long), "unreadable": unreadable}
        if not readable:
            return batch
        batch["images"] = torch.stack([item["image"] for item in readable])
        if "target_image" in readable[0]:
            batch["target_images"] = torch.stack([item["target_image"] for item in readable])
        batch["product_ids"] = torch.tensor([int(item["product_id"]) for item in readable])
        batch["caption_ids"] = torch.tensor([int(item["caption_id"]) for item in readable])
        encodings = encode(self.tokenizer, [item["text"] for item in readable])
        batch |= stack_encodings(encodings)
        if self.informative:
            continues, informative = self.informative
        else:
            informative = torch.ones(self.tokenizer.get_vocab_size(), dtype=torch.bool)
            continues = torch.zeros_like(informative)
        batch["maskable"] = maskable_words(batch["token_ids"], batch["is_caption"], continues, informative)
        if "ground_truth" in readable[0]:
            batch |= _collate_ground_truth(encodings, [item["ground_truth"] for item in readable])
        return batch


def _collate_ground_truth(encodings: list[Encoding], ground_truths: list[GroundTruth]) -> dict[str, Tensor]:
    """Make region_masks, region_index and attribute_kinds of a batch, see `Collate`."""
    size = ground_truths[0].size
    most_regions = max(len(ground_truth.regions) for ground_truth in ground_truths)
    region_masks = torch.zeros(len(ground_truths), 2 + most_regions, size, size, dtype=torch.uint8)
    region_index = torch.full((len(ground_truths), len(encodings[0].ids)), NO_ATTRIBUTE)
    attribute_kinds = torch.zeros_like(region_index)
    for b, (encoding, ground_truth) in enumerate(zip(encodings, ground_truths)):
        index_of = {}  # attribute -> region mask
        for index, key in enumerate(ground_truth.regions, start=2):
            index_of[key] = index
            region_masks[b, index] = torch.from_numpy(ground_truth.region(key))
        for token, (start, end) in enumerate(encoding.offsets):
            if encoding.word_ids[token] != 1:  # the caption is the second segment of a text
                continue
            for span in ground_truth.spans:
                if span.start <= start < end <= span.end:
                    region_index[b, token] = index_of.get(span.key, NOT_VISIBLE)
                    attribute_kinds[b, token] = 1 + ATTRIBUTE_KINDS.index(span.kind)
    return {"region_masks": region_masks, "region_index": region_index, "attribute_kinds": attribute_kinds}


def word_regions(batch: dict, grid: int) -> Tensor:
    """Compute which patches show what each token names, for a batch with ground truth. -> bool (B, L, P)

    Our choice: a region is visible if it covers at least MIN_REGION of the image. A patch p shows a region where
    coverage_p ≥ min(1/4, max_q coverage_q / 2),   coverage_p = share of the patch that the region covers

    grid: patches a side; S is a multiple of it
    """
    region_masks = batch["region_masks"].float()  # (B, K, S, S)
    patch_size = region_masks.shape[-1] // grid
    coverage = F.avg_pool2d(region_masks, patch_size).flatten(2)  # (B, K, P)
    threshold = (coverage.amax(dim=2, keepdim=True) / 2).clamp(max=0.25)
    is_visible = region_masks.mean(dim=(2, 3)) >= MIN_REGION  # (B, K)
    shows_region = (coverage >= threshold) & is_visible[..., None]  # (B, K, P)
    index = batch["region_index"][..., None].expand(-1, -1, shows_region.shape[2])  # (B, L, P)
    return shows_region.gather(1, index)


# ---------------------------------------------------------------- a batch on the device


def to_device(batch: dict, device: torch.device) -> dict:
    """Copy the tensors of a batch to a device, without waiting where their memory is pinned."""
    moved = dict(batch)
    for key, value in batch.items():
        if isinstance(value, Tensor):
            moved[key] = value.to(device, non_blocking=True)
    return moved


def normalise(images: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its deviation. uint8, or float in [0, 1], (B, 3, S, S) -> float"""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    mean, std = imagenet_mean_std(images.device)
    return (images - mean) / std


@cache
def imagenet_mean_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (3, 1, 1) of ImageNet's channels, copied to a device once."""
    mean = torch.tensor(IMAGENET_MEAN, device=device)
    std = torch.tensor(IMAGENET_STD, device=device)
    return mean[:, None, None], std[:, None, None]


def random_crops(
    count: int,
    min_scale: float = 0.5,
    generator: torch.Generator | None = None,
    distort: float = 0.0,
    device: torch.device | None = None,
) -> Tensor:
    """Draw random resized crops and flips, as affine maps from the crop to the image, both [−1, 1]².

    min_scale: a crop has min_scale to 1 of the image's area; its aspect is 3/4 to 4/3, so far as it fits
    distort: in [0, 1], strength of rotation (up to 30°) and shear
    -> float (count, 2, 3)
    """

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(count, device=device, generator=generator) * (high - low) + low

    area = draw(min_scale, 1.0)
    aspect = torch.exp(draw(math.log(3 / 4), math.log(4 / 3)))
    aspect = aspect.clamp(area, 1 / area)  # otherwise a side would be longer than the image
    width = (area * aspect).sqrt()
    height = (area / aspect).sqrt()
    x = draw(-1, 1) * (1 - width)  # centre of the crop
    y = draw(-1, 1) * (1 - height)
    flip = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    scale = torch.diag_embed(torch.stack([width * flip, height], dim=1))  # (B, 2, 2)
    centre = torch.stack([x, y], dim=1)[..., None]  # (B, 2, 1)
    if distort > 0:
        angle = draw(-1, 1) * distort * math.pi / 6
        shear = draw(-1, 1) * distort / 4
        rotation = torch.stack([angle.cos(), shear - angle.sin(), angle.sin(), angle.cos()], dim=1)  # and shear
        scale = rotation.view(-1, 2, 2) @ scale
    return torch.cat([scale, centre], dim=2)


def apply_crops(images: Tensor, crops: Tensor, padding: str = "border") -> Tensor:
    """Cut crops (B, 2, 3) out of images (B, C, S, S) and scale them to the same size. -> float (B, C, S, S)

    padding: of what is outside the image: "border" repeats its edge, "zeros"
    """
    points = F.affine_grid(crops, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), points, mode="bilinear", padding_mode=padding, align_corners=False)


def augment(images: Tensor, crops: Tensor, generator: torch.Generator | None = None, distort: float = 0.0) -> Tensor:
    """Crop, distort and normalise a batch of images on its device. uint8 (B, 3, S, S) -> float (B, 3, S, S)

    crops (B, 2, 3): by `random_crops`
    distort: in [0, 1], strength of blur and noise. Colours stay as they are, since captions name them (our choice).
    """
    pixels = apply_crops(images, crops) / 255
    if distort > 0:
        per_image = (len(images), 1, 1, 1)
        blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), "replicate"), 3, 1)
        blur_share = torch.rand(per_image, device=images.device, generator=generator) * distort
        pixels = torch.lerp(pixels, blurred, blur_share)
        noise = torch.randn(pixels.shape, device=images.device, generator=generator)
        noise_share = torch.rand(per_image, device=images.device, generator=generator) * distort
        pixels = (pixels + 0.1 * noise_share * noise).clamp(0, 1)
    return normalise(pixels)


# ---------------------------------------------------------------- texts -> tokens

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tokenize(tokenizer: Tokenizer, texts: list[Text]) -> dict[str, Tensor]:
    """Turn texts into token_ids int64, attention_mask int64 and is_caption bool, each (B, L), see `Collate`."""
    return stack_encodings(encode(tokenizer, texts))


def encode(tokenizer: Tokenizer, texts: list[Text]) -> list[Encoding]:
    """Tokenize texts, padded to the longest one.

    An Encoding has for each token its id, the number of its segment (`word_ids`, None for special tokens), and its
    place in the segment (`offsets`).
    """
    return tokenizer.encode_batch([list(text) for text in texts], is_pretokenized=True)


def stack_encodings(encodings: list[Encoding]) -> dict[str, Tensor]:
    """Stack encodings to token_ids, attention_mask and is_caption, as `tokenize`."""
    is_caption = []
    for encoding in encodings:
        # every second segment of a text is a caption or value, see readers/prompts.py
        is_caption.append([segment is not None and segment % 2 == 1 for segment in encoding.word_ids])
    return {
        "token_ids": torch.tensor([encoding.ids for encoding in encodings]),
        "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
        "is_caption": torch.tensor(is_caption),
    }


def build_tokenizer(
    captions: list[str],
    vocab_size: int,
    max_length: int,
    vocab: str | Path | Tokenizer | None = None,
    prompts: bool = False,
) -> Tokenizer:
    """Build a WordPiece tokenizer as BERT's, which adds [CLS] and [SEP], truncates and pads.

    vocab: a `vocab.txt` or `tokenizer.json` of a BERT that lower-cases, a folder with one, or the tokenizer of a run;
        otherwise a vocabulary of up to vocab_size tokens is trained on the captions
    max_length: tokens after which a text is truncated; texts are padded to the longest one of a batch
    prompts: add the category symbols as the last tokens. A trained vocabulary also holds each word of the prompts.
    Raises OSError where `vocab` cannot be read, DataError where it is not the vocabulary of a lower-casing BERT.
    """
    special_tokens = list(SPECIAL_TOKENS)
    prompt_words = []
    if prompts:
        special_tokens += [f"[{symbol}]" for symbol in SYMBOLS]
        all_prompts = " ".join([CAPTION_PREFIX, DIFFERENCE_PREFIX, "sub", *ATTRIBUTES])
        prompt_words = list(dict.fromkeys(all_prompts.split()))
    if isinstance(vocab, Tokenizer):
        tokenizer = vocab
    elif vocab:
        tokenizer = _bert_tokenizer(*_read_vocabulary(vocab))
    else:
        words = _train_vocabulary(captions, vocab_size, prompt_words)
        tokenizer = _bert_tokenizer(words, strip_accents=False)
    tokenizer.add_special_tokens(special_tokens)
    cls_id = tokenizer.token_to_id("[CLS]")
    sep_id = tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep_id), ("[CLS]", cls_id))
    tokenizer.enable_truncation(max_length)
    # Few different lengths are faster on a CPU. The step divides max_length, so padding never exceeds it.
    step = math.gcd(8, max_length)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]", pad_to_multiple_of=step)
    return tokenizer


def _bert_tokenizer(words: list[str], strip_accents: bool) -> Tokenizer:
    """Build a tokenizer that splits texts as BERT's does.

    words: its vocabulary, in order of id
    strip_accents: as BERT's uncased vocabulary needs. A trained vocabulary keeps accents: some scripts spell with them
    """
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    bert_normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=strip_accents)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), bert_normalizer])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


VOCABULARY_ADVICE = "give the vocab.txt or tokenizer.json of a WordPiece tokenizer that lower-cases, as BERT's"


def _read_vocabulary(path: str | Path) -> tuple[list[str], bool]:
    """Read the words of a `vocab.txt`, of a `tokenizer.json`, or of a folder with one of them, in order of id.

    -> words; whether their tokenizer strips accents, which a `vocab.txt` does not say (our choice: few words have one)
    Raises OSError where the file cannot be read.
    Raises DataError for another file, and for a tokenizer that does not split texts as BERT's lower-casing one.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in ("tokenizer.json", "vocab.txt") if (path / name).is_file()]
        if not files:
            raise DataError(f"{path}: holds neither tokenizer.json nor vocab.txt; {VOCABULARY_ADVICE}")
        path = files[0]
    content = read_text(path)
    if path.suffix == ".json":
        words, strips_accents = _words_of_tokenizer(path, content)
    else:
        words = content.rstrip("\n").split("\n")
        without_accents = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
        accented = sum(without_accents.normalize_str(word) != word for word in words)  # of BERT's uncased vocabulary 0
        strips_accents = accented <= len(words) / 50
    missing = [token for token in SPECIAL_TOKENS if token not in words]
    if missing:
        raise DataError(f"{path}: not a BERT vocabulary, it lacks {', '.join(missing)}; {VOCABULARY_ADVICE}")
    if len(words) == len(SPECIAL_TOKENS):
        raise DataError(f"{path}: it has no word but the special tokens; give another file")
    duplicates = [word for word, count in Counter(words).items() if count > 1]
    if duplicates:
        raise DataError(f"{path}: {duplicates[0]!r} stands on several lines, so ids would have gaps; keep one of them")
    capitalized = [word for word in words if word != word.lower() and not word.startswith("[")]
    if len(capitalized) > len(words) / 10:
        raise DataError(f"{path}: a cased vocabulary, with words such as {capitalized[0]!r}; {VOCABULARY_ADVICE}")
    return words, strips_accents


def _words_of_tokenizer(path: Path, content: str) -> tuple[list[str], bool]:
    """Return the words of a `tokenizer.json`, in order of id, and whether it strips accents.

    Raises DataError for a tokenizer of another kind than BERT's lower-casing WordPiece.
    """
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library has no narrower kind
        raise DataError(f"{path}: not a tokenizer.json ({error}); {VOCABULARY_ADVICE}") from None
    kind = type(tokenizer.model).__name__
    if kind != "WordPiece":
        raise DataError(f"{path}: a {kind} tokenizer; {VOCABULARY_ADVICE}")
    ids = tokenizer.get_vocab()
    words = sorted(ids, key=ids.get)
    if max(ids.values(), default=-1) != len(ids) - 1 or tokenizer.model.continuing_subword_prefix != "##":
        raise DataError(f"{path}: its ids have gaps, or its pieces do not begin with ##; {VOCABULARY_ADVICE}")
    probe = "Robe d'Été, 日本!"
    splits = _split(tokenizer, probe)
    strips_accents = "ete" in splits
    if splits != _split(_bert_tokenizer(words, strips_accents), probe):
        name = "a cased WordPiece tokenizer" if "Robe" in splits else "not BERT's tokenizer"
        raise DataError(f"{path}: {name}, it splits {probe!r} into {splits}; {VOCABULARY_ADVICE}")
    return words, strips_accents


def _split(tokenizer: Tokenizer, text: str) -> list[str]:
    """Split a text to words, as a tokenizer does before it looks for their pieces."""
    if tokenizer.normalizer:
        text = tokenizer.normalizer.normalize_str(text)
    if not tokenizer.pre_tokenizer:
        return [text]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _train_vocabulary(captions: list[str], size: int, prompt_words: list[str]) -> list[str]:
    """Train a WordPiece vocabulary on captions. It is deterministic and includes the prompt words.

    -> words in order of id
    """
    tokenizer = _bert_tokenizer(["[UNK]"], strip_accents=False)
    texts = sorted(set(captions))
    letters = set(tokenizer.normalizer.normalize_str(" ".join(texts)))
    # The trainer numbers the letters inside words in the order of a randomly seeded hash map, and breaks ties between
    # merges by these numbers. It is deterministic where these letters come first, as special tokens.
    inner_letters = ["##" + letter for letter in sorted(letters - {" "})]
    special_tokens = [*SPECIAL_TOKENS, *inner_letters, *prompt_words]
    trainer = WordPieceTrainer(vocab_size=size, min_frequency=2, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)


def replacement_ids(tokenizer: Tokenizer) -> Tensor:
    """List the ids that may replace a masked word: all but special tokens. -> int64 (V',)"""
    special_ids = tokenizer.get_added_tokens_decoder()
    return torch.tensor([i for i in range(tokenizer.get_vocab_size()) if i not in special_ids])


MAX_DOC_FREQ = 0.75  # words in a larger share of the captions are not masked (our choice)


def informative_pieces(tokenizer: Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Find the pieces of the vocabulary that `masking.maskable_words` needs.

    continues: pieces that continue a word, such as ##per
    informative: pieces with a letter or digit, except [UNK], that occur in at most MAX_DOC_FREQ of the distinct
        captions
    -> continues, informative, bool (V,) each
    """
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    distinct_captions = list(dict.fromkeys(captions))
    doc_counts = torch.zeros(len(pieces))
    for start in tqdm(range(0, len(distinct_captions), 1000), "counting words", leave=False, disable=None):
        part = distinct_captions[start : start + 1000]
        for encoding in tokenizer.encode_batch(part, add_special_tokens=False):
            doc_counts[list(set(encoding.ids))] += 1
    continues = torch.tensor([piece.startswith("##") for piece in pieces])
    is_word = torch.tensor([piece != "[UNK]" and any(letter.isalnum() for letter in piece) for piece in pieces])
    is_infrequent = doc_counts <= MAX_DOC_FREQ * len(distinct_captions)
    return continues, is_word & is_infrequent


# `masking.replace_words` swaps words by these lists. Our choice: they are short; FashionSAP looks words up in WordNet.
ANTONYMS = (
    "long short, black white, light dark, wide slim, loose fitted, high low, front back, top bottom, upper lower, "
    "inner outer, left right, full half, round square, thick thin, soft hard, warm cool, matte glossy, single double, "
    "open closed, mini maxi, men women, boys girls, male female, summer winter, spring fall, formal casual, day night"
)
SYNONYMS = (
    "pants trousers, sweater jumper, jacket coat, pattern print, logo emblem, crew round, zip zipper, trim border, "
    "dotted spotted, checked plaid, tee tshirt, grey gray, fall autumn, sneakers trainers, bag purse, shoes footwear, "
    "collar neckline"
)


def word_pairs(tokenizer: Tokenizer, pairs: str) -> Tensor:
    """Find for each token id the id of its partner in a list of pairs, such as ANTONYMS. -> int64 (V,), −1 without one

    Only words that are one token have a partner. The token also has it where it begins a longer word. Of several pairs
    with a word the first counts.
    """
    partner = torch.full((tokenizer.get_vocab_size(),), -1)
    for pair in pairs.split(", "):
        first, second = pair.split()
        first_id = tokenizer.token_to_id(first)
        second_id = tokenizer.token_to_id(second)
        if first_id is None or second_id is None:
            continue
        if partner[first_id] < 0:
            partner[first_id] = second_id
        if partner[second_id] < 0:
            partner[second_id] = first_id
    return partner


# ---------------------------------------------------------------- data sets by name

DataName = Literal["synthetic", "fashiongen", "jsonl"]
VAL_PRODUCTS = 300  # products of the synthetic validation split


def build_dataset(
    name: str,
    root: str | Path | None,
    split: ReportedSplit,
    image_size: int,
    seed: int = 0,
    products: int = 4000,
) -> PairDataset:
    """Open a split of a data set of image-caption pairs.

    name: a DataName or CaptionedName
    root: folder of the files, by default `data/<name>`; `synthetic` has none
    image_size: side of the images in pixels
    seed: of the synthetic products, and of the split by product where the files have none
    products: synthetic products of the training split; the validation split has VAL_PRODUCTS
    Raises DataError or OSError where the data cannot be used.
    """
    if name == "synthetic":
        return Synthetic(split, products if split == "train" else VAL_PRODUCTS, image_size, seed)
    if name in get_args(CaptionedName):
        return karpathy(_folder(name, root), name, split, image_size)
    if name == "fashiongen":
        return fashiongen(_folder(name, root), split, image_size)
    return jsonl(_folder(name, root), split, image_size, seed)


def build_triplets(
    name: str,
    root: str | Path | None,
    split: ReportedSplit,
    image_size: int,
    seed: int = 0,
    products: int = 4000,
) -> Triplets:
    """Open a split of `synthetic` triplets or of `fashioniq`. Arguments and errors are as of `build_dataset`.

    Synthetic validation has 2 · VAL_PRODUCTS products.
    """
    if name == "synthetic":
        return synthetic_triplets(split, products if split == "train" else 2 * VAL_PRODUCTS, image_size, seed)
    return fashioniq(_folder(name, root), split, image_size)


def build_statements(
    name: str,
    root: str | Path | None,
    split: ReportedSplit,
    image_size: int,
    seed: int = 0,
    products: int = 4000,
) -> PairDataset:
    """Open a split of `synthetic` statements or of `snlive`. Arguments and errors are as of `build_dataset`."""
    if name == "synthetic":
        return synthetic_statements(split, products if split == "train" else VAL_PRODUCTS, image_size, seed)
    return snlive(_folder(name, root), split, image_size)


def _folder(name: str, root: str | Path | None) -> Path:
    """Return the folder of a data set's files. Raises DataError where there is no such folder."""
    folder = Path(root or f"data/{name}")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of the {name} files with --root")
    return folder


# ---------------------------------------------------------------- the command line


def main(argv: list[str] | None = None) -> None:
    """Run the command line, `python data.py convert`. Errors end the process with one line."""
    parser = OneLineParser("data.py", description="Convert a table to a folder for --data jsonl.", allow_abbrev=False)
    parser.add_argument("command", choices=["convert"])
    add_flags(parser)
    flags = parser.parse_args(argv)
    try:
        print(convert_command(flags))
    except (DataError, OSError) as error:
        sys.exit(f"data.py: {in_one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped")
    print(f"next: python train.py --data jsonl --root {flags.out} --preset tiny --epochs 10")


if __name__ == "__main__":
    main()
