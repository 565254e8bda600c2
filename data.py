"""The door to all photos; tokenizer, collation and augmentation.

Every dataset is a list of *photos* (rows). Several photos show one product and share its one description.

    synthetic    garments drawn here, with the ground truth of what every photo shows
    fashiongen   FashionGen's two HDF5 files, as distributed
    jsonl        one's own photos: one JSON object a line

For text-guided retrieval there are *triplets*: a reference photo, a text that says what differs, the target photo.

    synthetic    fronts of drawn garments that differ in one or two attributes
    fashioniq    FashionIQ's captions, image splits and photos, as distributed

A description is read as it is, or framed as FashionSAP and Fashion-FINE read it (`PhotoDataset.text`).

For retrieval also photos with several captions each, `flickr30k` and `coco` in Karpathy's splits. For entailment there
are *statements* about photos:

    synthetic    what a drawn garment shows, contradicts, or cannot tell
    snlive       SNLI-VE's, about photos of Flickr30k

Photos are decoded to uint8 squares and stay uint8 until they are on the training device, where `augment` or
`normalise` turns a whole batch to floats at once.

    python data.py export-fashiongen DIR --items N     synthetic items in FashionGen's own HDF5 layout
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Encoding, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor
from tqdm import tqdm

from masking import which_words
from readers.dataset import DataError, PhotoDataset, Truth, Unreadable
from readers.families import synthetic_triplets
from readers.fashiongen import FashionGen, export_fashiongen
from readers.fashioniq import fashioniq
from readers.jsonl import Jsonl
from readers.karpathy import CaptionedName, Karpathy
from readers.prompts import ATTRIBUTES, DESCRIPTION, DIFFERENCE, SYMBOLS, Text
from readers.snlive import snlive
from readers.statements import Statements, synthetic_statements
from readers.synthetic import Synthetic
from readers.triplets import Triplets
from readers.wardrobe import KINDS

DataName = Literal["synthetic", "fashiongen", "jsonl"]
TripletName = Literal["synthetic", "fashioniq"]
StatementName = Literal["synthetic", "snlive"]
ReportedSplit = Literal["train", "val", "test"]
VAL_PRODUCTS = 300  # synthetic products held out of training
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_dataset(
    name: DataName | CaptionedName, root: str | Path | None, split: ReportedSplit, image_size: int, seed: int = 0,
    products: int = 4000, progress: bool = True,
) -> PhotoDataset:  # fmt: skip
    """Open a split of a data set. Raises DataError with one clear line when it cannot be used.

    root: folder of the files (default `data/<name>`; `synthetic` has none) · image_size: side in pixels
    seed: of the synthetic set, and of the split by product where the data has none
    products: synthetic products in the training split; validation has VAL_PRODUCTS
    """
    if split == "test" and name not in get_args(CaptionedName):
        raise DataError(f"{name} has no test split")
    if name == "synthetic":
        return Synthetic(split, products if split == "train" else VAL_PRODUCTS, image_size, seed, progress)
    folder = _folder(name, root)
    if name in get_args(CaptionedName):
        return Karpathy(folder, name, split, image_size)
    return FashionGen(folder, split, image_size) if name == "fashiongen" else Jsonl(folder, split, image_size, seed)


def build_triplets(
    name: TripletName, root: str | Path | None, split: ReportedSplit, image_size: int,
    seed: int = 0, products: int = 4000, progress: bool = True,
) -> Triplets:  # fmt: skip
    """Open a split of a set of triplets; arguments and errors as `build_dataset`. test: of `fashioniq` alone."""
    if name == "synthetic":
        return synthetic_triplets(split, products if split == "train" else 2 * VAL_PRODUCTS, image_size, seed, progress)
    return fashioniq(_folder(name, root), split, image_size)


def build_statements(
    name: StatementName, root: str | Path | None, split: ReportedSplit, image_size: int, seed: int = 0,
    products: int = 4000, progress: bool = True,
) -> Statements:  # fmt: skip
    """Open a split of a set of statements; arguments and errors as `build_dataset`. test: of `snlive` alone."""
    if name == "synthetic":
        products = products if split == "train" else VAL_PRODUCTS
        return synthetic_statements(split, products, image_size, seed, progress)
    return snlive(_folder(name, root), split, image_size)


def _folder(name: str, root: str | Path | None) -> Path:
    folder = Path(root or f"data/{name}")
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; say with --root where the {name} files are")
    return folder


SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def build_tokenizer(
    captions: list[str], vocab_size: int, max_length: int, vocab: str | Path | None = None, frames: bool = False
) -> Tokenizer:
    """A lower-casing WordPiece tokenizer, the same as BERT's: from `vocab` (a BERT `vocab.txt`), otherwise trained
    on `captions`. It adds [CLS] and [SEP], cuts at `max_length` tokens and pads to the longest of a batch,
    rounded up to a multiple of 8 where `max_length` is one.

    frames: the category symbols are tokens too, the last ones, and the words of prompts are whole in the vocabulary.
    """
    if vocab is None:
        prompts = " ".join([DESCRIPTION, DIFFERENCE, "sub", *ATTRIBUTES]).split() if frames else []
        words = _train_vocabulary(captions, vocab_size, list(dict.fromkeys(prompts)))
    else:
        try:
            words = [word.rstrip("\r") for word in Path(vocab).read_text(encoding="utf-8").rstrip("\n").split("\n")]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{vocab}: cannot be read as a vocab.txt ({error})") from None
    missing = [token for token in SPECIAL_TOKENS if token not in words]
    if missing:
        raise DataError(f"{vocab}: not a BERT vocab.txt, it lacks {', '.join(missing)}")
    if len(words) == len(SPECIAL_TOKENS):
        raise DataError(f"{vocab or 'the captions'}: there is no word in it but the special tokens")
    if len(set(words)) < len(words):
        twice = next(word for i, word in enumerate(words) if word in words[:i])
        raise DataError(f"{vocab}: the same word stands on two lines, {twice!r}")
    tokenizer = _bert_style(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    cls, sep, pad = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, *(f"[{symbol}]" for symbol in SYMBOLS if frames)])
    tokenizer.enable_truncation(max_length)
    # lengths in steps of 8: odd ones, new ones each time, cost a CPU more than the padding (experiments/results.md)
    tokenizer.enable_padding(pad_id=pad, pad_token="[PAD]", pad_to_multiple_of=math.gcd(8, max_length))
    return tokenizer


def word_ids(tokenizer: Tokenizer) -> Tensor:
    """The ids of everything but the special tokens, for random replacements. -> (V',)."""
    special = tokenizer.get_added_tokens_decoder()
    return torch.tensor([i for i in range(tokenizer.get_vocab_size()) if i not in special])


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
        one, other = (tokenizer.token_to_id(word) for word in pair.split())
        for a, b in ((one, other), (other, one)):
            if a is not None and b is not None and table[a] < 0:
                table[a] = b
    return table


def _bert_style(model: WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _train_vocabulary(captions: list[str], size: int, whole: list[str]) -> list[str]:
    """The WordPiece vocabulary of some captions, and of `whole` words, in order of id; the same one every time."""
    tokenizer = _bert_style(WordPiece({"[UNK]": 0}, unk_token="[UNK]"))

    def readable(caption: str) -> str:
        """Without words of over 100 letters: they will be [UNK], and the trainer takes for ever over them."""
        if not re.search(r"\S{101}", caption):
            return caption
        words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(caption))
        return " ".join(word for word, _ in words if len(word) <= 100)

    texts = sorted(set(map(readable, captions)))
    letters = sorted(set("".join(map(tokenizer.normalizer.normalize_str, texts))) - set(" "))
    # The trainer numbers letters inside words in the order of a randomly seeded hash map, and breaks ties between
    # merges by number: listing those letters first, as special tokens, is what makes it reproducible.
    inner = ["##" + letter for letter in letters]
    trainer = WordPieceTrainer(
        vocab_size=size, min_frequency=2, special_tokens=[*SPECIAL_TOKENS, *inner, *whole], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)


def encode(tokenizer: Tokenizer, texts: list[Text]) -> list[Encoding]:
    """Token by token, padded to the longest: `word_ids` says of which piece of its text, `offsets` where in it."""
    return tokenizer.encode_batch([_as_words(text) for text in texts], is_pretokenized=True)


def _as_words(text: Text) -> list[str]:
    """The pieces of a text. In descriptions, every second piece, what reads like a special token is none."""
    return [re.sub(r"\[(?=\w+\])", "(", piece) if number % 2 else piece for number, piece in enumerate(text)]


# of a batch (B, L) each, padded with 0; `tokenize` gives the first three
TOKEN_KEYS = ("token_ids", "attention_mask", "described", "words", "word_planes", "kinds")


def tokenize(tokenizer: Tokenizer, texts: list[Text]) -> dict[str, Tensor]:
    """-> token_ids, attention_mask (1 = keep) and described (True = of a description, not of a frame), each (B, L)."""
    return _tensors(encode(tokenizer, texts))


def _tensors(encodings: list[Encoding]) -> dict[str, Tensor]:
    described = [[piece is not None and piece % 2 == 1 for piece in e.word_ids] for e in encodings]
    columns = [e.ids for e in encodings], [e.attention_mask for e in encodings], described
    return dict(zip(TOKEN_KEYS, map(torch.tensor, columns), strict=False))


FREQUENT = 0.75  # words in a larger share of the captions tell nothing, and are not masked (choice)


def telling_pieces(tokenizer: Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """For `masking.which_words`: pieces that continue a word; those that are no punctuation and stand in no more than
    the share FREQUENT of the different captions. -> (V,), (V,) bool."""
    pieces = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    wordings, counts = list(dict.fromkeys(captions)), torch.zeros(len(pieces))
    for start in tqdm(range(0, len(wordings), 1000), "counting words", leave=False, disable=None):
        for encoding in tokenizer.encode_batch(wordings[start : start + 1000], add_special_tokens=False):
            counts[list(set(encoding.ids))] += 1
    spelt = torch.tensor([any(letter.isalnum() for letter in piece) for piece in pieces])
    return torch.tensor([piece.startswith("##") for piece in pieces]), spelt & (counts <= FREQUENT * len(wordings))


@dataclass
class Collate:
    """Makes a batch of dataset items: `images` uint8 (B, 3, S, S), of triplets also `target_images`, the tokenised
    texts padded to the longest, `product_ids`, `caption_ids`, `rows` (B,), and `unreadable`, the reasons for photos
    left out. Where none is left there are just these last two.

    `words` (B, L) may be masked, see `masking.which_words`; telling: what `telling_pieces` gives, or every token may
    Items with the truth bring `planes` (B, K, S, S), where attributes are on the photo; `word_planes` (B, L), which of
    them shows what a token names: the first, empty, if it names nothing, the second, also empty, if the photo does not
    show it; and `kinds` (B, L), which of KINDS it is, counted from 1, else 0.
    """

    tokenizer: Tokenizer
    telling: tuple[Tensor, Tensor] | None = None

    def __call__(self, items: list[dict | Unreadable]) -> dict:
        good = [item for item in items if isinstance(item, dict)]
        unreadable = [item.reason for item in items if isinstance(item, Unreadable)]
        if not good:
            return {"rows": torch.zeros(0, dtype=torch.long), "unreadable": unreadable}
        targets = [item["target_image"] for item in good if "target_image" in item]
        encodings = encode(self.tokenizer, [item["text"] for item in good])
        texts = _tensors(encodings)
        every = torch.zeros(self.tokenizer.get_vocab_size(), dtype=torch.bool)
        texts["words"] = which_words(texts["token_ids"], texts["described"], *(self.telling or (every, ~every)))
        if "truth" in good[0]:
            texts |= _truth(encodings, [item["truth"] for item in good])
        return {
            "images": torch.stack([item["image"] for item in good]),
            **({"target_images": torch.stack(targets)} if targets else {}),
            **texts,
            "product_ids": torch.tensor([int(item["product_id"]) for item in good]),
            "caption_ids": torch.tensor([int(item["caption_id"]) for item in good]),
            "rows": torch.tensor([item["row"] for item in good]),
            "unreadable": unreadable,
        }


def _truth(encodings: list[Encoding], truths: list[Truth]) -> dict[str, Tensor]:
    size, tokens = truths[0].size, len(encodings[0].ids)
    planes = torch.zeros(len(truths), 2 + max(len(truth.regions) for truth in truths), size, size, dtype=torch.uint8)
    word_planes, kinds = (torch.zeros(len(truths), tokens, dtype=torch.long) for _ in range(2))
    for b, (truth, encoding) in enumerate(zip(truths, encodings, strict=True)):
        numbers = {key: number for number, key in enumerate(truth.regions, start=2)}
        for key, number in numbers.items():
            planes[b, number] = torch.from_numpy(truth.region(key))
        for token, (piece, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
            for first, last, key, kind in truth.spans:
                if piece == 1 and first <= start < end <= last:
                    word_planes[b, token], kinds[b, token] = numbers.get(key, 1), 1 + KINDS.index(kind)
    return {"planes": planes, "word_planes": word_planes, "kinds": kinds}


def word_regions(batch: dict, grid: int) -> Tensor:
    """Where a photo shows what its words name, by patches. -> (B, L, P) bool, nowhere for what it does not show.

    A region counts as seen from 0.3 % of the photo on; a patch is on it that it covers by a quarter, or by half as much
    as the patch that it covers most."""
    planes, word_planes = batch["planes"].float(), batch["word_planes"]
    cover = F.avg_pool2d(planes, planes.shape[-1] // grid).flatten(2)  # (B, K, P)
    seen = planes.mean(dim=(2, 3)) >= 0.003
    on = (cover >= (cover.amax(dim=2, keepdim=True) / 2).clamp(max=0.25)) & seen[..., None]
    return on.gather(1, word_planes[..., None].expand(-1, -1, on.shape[2]))


def to_device(batch: dict, device: torch.device) -> dict:
    """The batch with its tensors on `device`, copied without waiting where memory is pinned."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def normalise(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W), or float in [0, 1] -> float, minus ImageNet's mean and over its deviation."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = imagenet(images.device)
    return (images - mean) / std


@cache
def imagenet(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3, 1, 1) of ImageNet's channels, copied to a device once."""
    return tuple(torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))


def random_crops(
    count: int, min_scale: float = 0.5, generator: torch.Generator | None = None, distort: float = 0.0,
    device: torch.device | None = None,
) -> Tensor:  # fmt: skip
    """Random resized crops (area share min_scale … 1, aspect 3/4 … 4/3) and flips, with distort > 0 also rotated (up to
    30° at 1) and sheared. -> affine maps (count, 2, 3) from the crop to the photo, both [−1, 1]²."""
    draw = lambda low, high: torch.rand(count, device=device, generator=generator) * (high - low) + low
    area, aspect = draw(min_scale, 1.0), torch.exp(draw(np.log(3 / 4), np.log(4 / 3)))
    aspect = aspect.clamp(area, 1 / area)  # or a side would be longer than the photo
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()
    x, y = draw(-1, 1) * (1 - width), draw(-1, 1) * (1 - height)  # centre of the crop; the photo is [−1, 1]²
    flip = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(x)
    theta = torch.stack([torch.stack([width * flip, zero, x], 1), torch.stack([zero, height, y], 1)], 1)  # (B, 2, 3)
    if distort > 0:
        angle, shear = draw(-1, 1) * distort * np.pi / 6, draw(-1, 1) * distort / 4
        turn = torch.stack([angle.cos(), shear - angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
        theta = torch.cat([turn @ theta[:, :, :2], theta[:, :, 2:]], 2)
    return theta


def cut(images: Tensor, crops: Tensor, padding: str = "border") -> Tensor:
    """The crops (B, 2, 3) of images (B, C, S, S) -> float (B, C, S, S)."""
    points = F.affine_grid(crops, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), points, mode="bilinear", padding_mode=padding, align_corners=False)


def augment(images: Tensor, crops: Tensor, generator: torch.Generator | None = None, distort: float = 0.0) -> Tensor:
    """`random_crops` of a whole batch. images uint8 (B, 3, S, S) -> normalised float (B, 3, S, S), on the same device.

    distort: strength of random blur and noise; captions name colours, which stay.
    """
    pixels = cut(images, crops) / 255
    if distort > 0:
        share = lambda: torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator) * distort
        pixels = torch.lerp(pixels, F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), "replicate"), 3, 1), share())  # blur
        noise = torch.randn(pixels.shape, device=images.device, generator=generator)
        pixels = (pixels + 0.1 * share() * noise).clamp(0, 1)
    return normalise(pixels)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("data.py", description="Write synthetic items in FashionGen's HDF5 layout.")
    parser.add_argument("command", choices=["export-fashiongen"])
    parser.add_argument("folder", type=Path, help="where to write; made if it is not there")
    parser.add_argument("--items", type=int, default=200, help="training products (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn products (default 0)")
    args = parser.parse_args(argv)
    if args.items < 1:
        parser.error("--items: at least 1")
    try:
        export_fashiongen(args.folder, args.items, seed=args.seed)
    except (DataError, OSError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
