"""From items to batches: collation, augmentation, tokenizer; and the data sets by name.

Every data set is a list of *photos* (rows); several photos show one product and share its one description. Triplets
are for text-guided retrieval, statements for entailment: see docs/data.md. Photos stay uint8 until they are on the
training device, where `augment` or `normalise` turns a whole batch to floats at once.

Dimensions: B photos of a batch · S side of a photo in pixels · P patches of a photo · L tokens of the longest text of a
batch · V tokens of the vocabulary · K planes of a photo, one for each attribute that it shows, after two empty ones
"""

import math
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

from masking import maskable_words
from readers.dataset import DataError, GroundTruth, PairDataset, ReportedSplit, Unreadable
from readers.fashiongen import fashiongen
from readers.jsonl import jsonl
from readers.karpathy import CaptionedName, karpathy
from readers.prompts import ATTRIBUTES, DESCRIPTION, DIFFERENCE, SYMBOLS, Text
from readers.statements import snlive, synthetic_statements
from readers.synthetic import Synthetic
from readers.triplets import Triplets, fashioniq, synthetic_triplets
from readers.wardrobe import KINDS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ---------------------------------------------------------------- items -> a batch


@dataclass
class Collate:
    """Makes a batch of dataset items: `images` uint8 (B, 3, S, S), of triplets also `target_images`, what `tokenize`
    gives (B, L), `product_ids`, `caption_ids`, `rows` (B,), and `unreadable`, the reasons for photos that cannot be
    read.

    `maskable` (B, L): see `masking.maskable_words`; informative: what `informative_pieces` gives, default every token
    An item whose photo cannot be read is left out; a batch of none has just `rows` and `unreadable`.
    Items with ground truth bring `region_masks` uint8 (B, K, S, S), one for each attribute that an image shows, after
    two empty ones; `region_index` (B, L), the region mask of a token: 0 where it names no attribute, 1 where the image
    does not show the attribute; and `kinds` (B, L), the number of the kind in KINDS, counted from 1, else 0.
    """

    tokenizer: Tokenizer
    informative: tuple[Tensor, Tensor] | None = None

    def __call__(self, items: list[dict | Unreadable]) -> dict:
        unreadable = [item.reason for item in items if isinstance(item, Unreadable)]
        items = [item for item in items if isinstance(item, dict)]
        for item in items:
            unreadable += item.get("unreadable", [])  # in whose place the item stands
        batch = {"rows": torch.tensor([item["row"] for item in items], dtype=torch.long), "unreadable": unreadable}
        if not items:
            return batch
        batch["images"] = torch.stack([item["image"] for item in items])
        if "target_image" in items[0]:
            batch["target_images"] = torch.stack([item["target_image"] for item in items])
        batch["product_ids"] = torch.tensor([int(item["product_id"]) for item in items])
        batch["caption_ids"] = torch.tensor([int(item["caption_id"]) for item in items])
        encodings = encode(self.tokenizer, [item["text"] for item in items])
        batch |= _tensors(encodings)
        every = torch.ones(self.tokenizer.get_vocab_size(), dtype=torch.bool)
        continues, informative = self.informative or (~every, every)
        batch["maskable"] = maskable_words(batch["token_ids"], batch["is_caption"], continues, informative)
        if "ground_truth" in items[0]:
            batch |= _collate_ground_truth(encodings, [item["ground_truth"] for item in items])
        return batch


def _collate_ground_truth(encodings: list[Encoding], truths: list[GroundTruth]) -> dict[str, Tensor]:
    """-> planes, region_index and kinds, see `Collate`."""
    size = truths[0].size
    most = max(len(truth.regions) for truth in truths)
    region_masks = torch.zeros(len(truths), 2 + most, size, size, dtype=torch.uint8)
    region_index = torch.zeros(len(truths), len(encodings[0].ids), dtype=torch.long)
    kinds = torch.zeros_like(region_index)
    for b, truth in enumerate(truths):
        mask_of = {}
        for number, key in enumerate(truth.regions, start=2):
            mask_of[key] = number
            region_masks[b, number] = torch.from_numpy(truth.region(key))
        for token, (start, end) in enumerate(encodings[b].offsets):
            if encodings[b].word_ids[token] != 1:  # the description is the second piece of its text
                continue
            for first, last, key, kind in truth.spans:
                if first <= start < end <= last:
                    region_index[b, token] = mask_of.get(key, 1)
                    kinds[b, token] = 1 + KINDS.index(kind)
    return {"region_masks": region_masks, "region_index": region_index, "kinds": kinds}


def word_regions(batch: dict, grid: int) -> Tensor:
    """Where a photo shows what its words name, by patches. -> (B, L, P) bool, nowhere for what it does not show.

    A region counts as seen from 0.3 % of the photo on; a patch is on it that it covers by a quarter, or by half as much
    as the patch that it covers most."""
    region_masks = batch["region_masks"].float()
    cover = F.avg_pool2d(region_masks, region_masks.shape[-1] // grid).flatten(2)  # (B, K, P)
    enough = (cover.amax(dim=2, keepdim=True) / 2).clamp(max=0.25)
    seen = region_masks.mean(dim=(2, 3)) >= 0.003  # (B, K)
    on = (cover >= enough) & seen[..., None]
    plane = batch["region_index"][..., None].expand(-1, -1, on.shape[2])  # (B, L, P)
    return on.gather(1, plane)


# ---------------------------------------------------------------- a batch on the device


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on `device`, copied without waiting where memory is pinned."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, S, S), or float in [0, 1] -> float, minus ImageNet's mean and over its deviation."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = imagenet(images.device)
    return (images - mean) / std


@cache
def imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3, 1, 1) of ImageNet's channels, copied to a device once."""
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
    """Random resized crops (area share min_scale … 1, aspect 3/4 … 4/3) and flips, with distort > 0 also rotated (up to
    30° at 1) and sheared. -> affine maps (B, 2, 3) from the crop to the photo, both [−1, 1]²."""

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(count, device=device, generator=generator) * (high - low) + low

    area = draw(min_scale, 1.0)
    aspect = torch.exp(draw(math.log(3 / 4), math.log(4 / 3)))
    aspect = aspect.clamp(area, 1 / area)  # or a side would be longer than the photo
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
        turn = torch.stack([angle.cos(), shear - angle.sin(), angle.sin(), angle.cos()], dim=1)
        scale = turn.view(-1, 2, 2) @ scale
    return torch.cat([scale, centre], dim=2)


def apply_crops(images: Tensor, crops: Tensor, padding: str = "border") -> Tensor:
    """The crops (B, 2, 3) of images (B, C, S, S) -> float (B, C, S, S)."""
    points = F.affine_grid(crops, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), points, mode="bilinear", padding_mode=padding, align_corners=False)


def augment(images: Tensor, crops: Tensor, generator: torch.Generator | None = None, distort: float = 0.0) -> Tensor:
    """`random_crops` of a whole batch. images uint8 (B, 3, S, S) -> normalised float (B, 3, S, S), on the same device.

    distort: strength of random blur and noise; captions name colours, which stay.
    """
    pixels = apply_crops(images, crops) / 255
    if distort > 0:
        each = (len(images), 1, 1, 1)
        blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), "replicate"), 3, 1)
        blur = torch.rand(each, device=images.device, generator=generator) * distort
        pixels = torch.lerp(pixels, blurred, blur)
        noise = torch.randn(pixels.shape, device=images.device, generator=generator)
        strength = torch.rand(each, device=images.device, generator=generator) * distort
        pixels = (pixels + 0.1 * strength * noise).clamp(0, 1)
    return normalise(pixels)


# ---------------------------------------------------------------- texts -> tokens

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tokenize(tokenizer: Tokenizer, texts: list[Text]) -> dict[str, Tensor]:
    """-> token_ids, attention_mask (1 = keep) and described (True = of a description, not of a frame), each (B, L)."""
    return _tensors(encode(tokenizer, texts))


def encode(tokenizer: Tokenizer, texts: list[Text]) -> list[Encoding]:
    """Token by token, padded to the longest: `word_ids` says of which piece of its text, `offsets` where in it."""
    return tokenizer.encode_batch([list(text) for text in texts], is_pretokenized=True)


def _tensors(encodings: list[Encoding]) -> dict[str, Tensor]:
    is_caption = []
    for encoding in encodings:
        is_caption.append([piece is not None and piece % 2 == 1 for piece in encoding.word_ids])
    return {
        "token_ids": torch.tensor([encoding.ids for encoding in encodings]),
        "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
        "is_caption": torch.tensor(is_caption),
    }


def build_tokenizer(
    captions: list[str], vocab_size: int, max_length: int, vocab: str | Path | None = None, frames: bool = False
) -> Tokenizer:
    """A WordPiece tokenizer as BERT's: from `vocab` (a BERT `vocab.txt`), otherwise trained on `captions`. It adds
    [CLS] and [SEP], cuts at `max_length` tokens and pads to the longest of a batch, in steps of 8.

    frames: the category symbols are tokens too, the last ones, and the words of prompts are whole in the vocabulary.
    """
    special = list(SPECIAL_TOKENS)
    whole = []
    if frames:
        special += [f"[{symbol}]" for symbol in SYMBOLS]
        whole = list(dict.fromkeys(" ".join([DESCRIPTION, DIFFERENCE, "sub", *ATTRIBUTES]).split()))
    words = _read_vocabulary(vocab) if vocab else _train_vocabulary(captions, vocab_size, whole)
    tokenizer = _bert_style(words)
    tokenizer.add_special_tokens(special)
    cls, sep, pad = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]", "[PAD]")]
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    tokenizer.enable_truncation(max_length)
    # in steps of 8: odd lengths, new ones each time, cost a CPU more than the padding (experiments/results.md)
    tokenizer.enable_padding(pad_id=pad[1], pad_token=pad[0], pad_to_multiple_of=math.gcd(8, max_length))
    return tokenizer


def _bert_style(words: list[str]) -> Tokenizer:
    """A tokenizer with these words, in order of id."""
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _read_vocabulary(path: str | Path) -> list[str]:
    """The words of a BERT `vocab.txt`, one a line. Raises DataError for another file."""
    words = Path(path).read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    missing = [token for token in SPECIAL_TOKENS if token not in words]
    if missing:
        raise DataError(f"{path}: not a BERT vocab.txt, it lacks {', '.join(missing)}")
    if len(words) == len(SPECIAL_TOKENS):
        raise DataError(f"{path}: it holds no word but the special tokens")
    twice = [word for word, count in Counter(words).items() if count > 1]
    if twice:
        raise DataError(f"{path}: {twice[0]!r} stands on several lines, so ids would have gaps; keep one of them")
    return words


def _train_vocabulary(captions: list[str], size: int, whole: list[str]) -> list[str]:
    """The WordPiece vocabulary of some captions, and of `whole` words, in order of id; the same one every time."""
    tokenizer = _bert_style(["[UNK]"])
    texts = sorted(set(captions))
    letters = set(tokenizer.normalizer.normalize_str("".join(texts)))
    # The trainer numbers letters inside words in the order of a randomly seeded hash map, and breaks ties between
    # merges by number: listing those letters first, as special tokens, is what makes it reproducible.
    inner = ["##" + letter for letter in sorted(letters - {" "})]
    special = [*SPECIAL_TOKENS, *inner, *whole]
    trainer = WordPieceTrainer(vocab_size=size, min_frequency=2, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)


def replacement_ids(tokenizer: Tokenizer) -> Tensor:
    """The ids of everything but the special tokens, for random replacements. -> (V',)."""
    special = tokenizer.get_added_tokens_decoder()
    return torch.tensor([i for i in range(tokenizer.get_vocab_size()) if i not in special])


MAX_DOC_FREQ = 0.75  # words in a larger share of the captions tell nothing, and are not masked (choice)


def informative_pieces(tokenizer: Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """For `masking.maskable_words`: the pieces that continue a word; the pieces that are no punctuation and stand in no
    more than the share MAX_DOC_FREQ of the different captions. -> (V,), (V,) bool"""
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    wordings = list(dict.fromkeys(captions))
    counts = torch.zeros(len(pieces))
    for start in tqdm(range(0, len(wordings), 1000), "counting words", leave=False, disable=None):
        for encoding in tokenizer.encode_batch(wordings[start : start + 1000], add_special_tokens=False):
            counts[list(set(encoding.ids))] += 1
    continues = torch.tensor([piece.startswith("##") for piece in pieces])
    spelt = torch.tensor([any(letter.isalnum() for letter in piece) for piece in pieces])
    return continues, spelt & (counts <= MAX_DOC_FREQ * len(wordings))


# choice: a few words instead of WordNet, which FashionSAP looks them up in
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
    """For each token the one that it forms a pair with in a list such as ANTONYMS, −1 where there is none. -> (V,).

    Only words that are one token count (also where a longer word begins with it); of several pairs the first."""
    table = torch.full((tokenizer.get_vocab_size(),), -1)
    for pair in pairs.split(", "):
        one, other = [tokenizer.token_to_id(word) for word in pair.split()]
        if one is None or other is None:
            continue
        if table[one] < 0:
            table[one] = other
        if table[other] < 0:
            table[other] = one
    return table


# ---------------------------------------------------------------- data sets by name

DataName = Literal["synthetic", "fashiongen", "jsonl"]
VAL_PRODUCTS = 300  # synthetic products held out of training


def build_dataset(
    name: str, root: str | Path | None, split: ReportedSplit, image_size: int, seed: int = 0, products: int = 4000
) -> PairDataset:
    """Open a split of a data set, a DataName or CaptionedName. Raises DataError or OSError when it cannot be used.

    root: folder of the files (default `data/<name>`; `synthetic` has none) · image_size: side in pixels
    seed: of the synthetic set, and of the split by product where the data has none
    products: synthetic products in the training split; validation has VAL_PRODUCTS
    """
    if name == "synthetic":
        return Synthetic(split, products if split == "train" else VAL_PRODUCTS, image_size, seed)
    if name in get_args(CaptionedName):
        return karpathy(_folder(name, root), name, split, image_size)
    if name == "fashiongen":
        return fashiongen(_folder(name, root), split, image_size)
    return jsonl(_folder(name, root), split, image_size, seed)


def build_triplets(
    name: str, root: str | Path | None, split: ReportedSplit, image_size: int, seed: int = 0, products: int = 4000
) -> Triplets:
    """Open a split of `synthetic` triplets or of `fashioniq`; arguments and errors as `build_dataset`."""
    if name == "synthetic":
        return synthetic_triplets(split, products if split == "train" else 2 * VAL_PRODUCTS, image_size, seed)
    return fashioniq(_folder(name, root), split, image_size)


def build_statements(
    name: str, root: str | Path | None, split: ReportedSplit, image_size: int, seed: int = 0, products: int = 4000
) -> PairDataset:
    """Open a split of `synthetic` statements or of `snlive`; arguments and errors as `build_dataset`."""
    if name == "synthetic":
        return synthetic_statements(split, products if split == "train" else VAL_PRODUCTS, image_size, seed)
    return snlive(_folder(name, root), split, image_size)


def _folder(name: str, root: str | Path | None) -> Path:
    folder = Path(root or f"data/{name}")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; say with --root where the {name} files are")
    return folder
