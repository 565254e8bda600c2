"""Batches of images and captions: endless ones to train on, whole data sets to encode.

Letters: B batch, N image tokens, L text tokens, D width, E shared embedding, n images or pairs, m captions.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from data import apply_crops, augment, build_tokenizer, encode, normalise, random_crops, to_device, tokenize
from engine.checkpoints import load_checkpoint, read_tokenizer
from engine.config import TrainConfig
from engine.log import ignore_signals, start_loading
from engine.run import Run, autocast
from readers.dataset import DataError, PairDataset, Unreadable
from readers.prompts import Text

CAPTION_BATCH = 256  # captions that are encoded together


class ReadableItems(Dataset):
    """The items of a data set, where the next readable image replaces one that cannot be read.

    So batches keep their size. The key `unreadable` of an item has the reasons for the images that it replaces.
    Reading an item raises DataError where a hundred images one after another cannot be read.
    """

    def __init__(self, dataset: PairDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict:
        unreadable = []
        while len(unreadable) < 100:
            item = self.dataset[row]
            if not isinstance(item, Unreadable):
                return item | {"unreadable": unreadable}
            unreadable.append(item.reason)
            row = (row + 1) % len(self.dataset)
        raise DataError(
            f"a hundred images one after another cannot be read, the last one: {unreadable[-1]}; check the files"
        )


def endless_batches(run: Run, dataset: PairDataset) -> Iterator[dict]:
    """Yield this process's share of the batches from the current step on, epoch after epoch, on its device.

    Raises DataError as `load_batches`.
    """
    loader = DataLoader(
        ReadableItems(dataset),
        batch_sampler=run.sampler,
        collate_fn=run.collate,
        num_workers=run.config.workers,
        pin_memory=run.device.type == "cuda",
        persistent_workers=run.config.workers > 0,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # otherwise a new iterator would change the generator that dropout uses
    )
    epoch, first_batch = divmod(run.step, len(run.sampler))
    while True:
        run.sampler.set_epoch(epoch, first_batch)
        for batch in load_batches(run, loader):
            yield to_device(batch, run.device)
        epoch, first_batch = epoch + 1, 0


def load_batches(run: Run, loader: DataLoader) -> Iterator[dict]:
    """Yield the batches of a loader once. All training and evaluation reads its batches here.

    Raises DataError where a hundred images one after another cannot be read, and where a data loading process fails.
    """
    try:
        yield from start_loading(loader)
    except DataError as error:
        # from a data loading process, the message is a traceback that ends with the message proper
        raise DataError(str(error).split("DataError: ")[-1].strip()) from None
    except (RuntimeError, OSError, EOFError) as error:
        if not loader.num_workers or str(error).startswith("Caught "):  # an error of our code
            raise
        reason = str(error).split("\n")[0] or type(error).__name__
        lack = "perhaps for lack of memory, shared memory or open files (ulimit -n)"
        is_resumable = run.sampler is not None and Path(run.config.out, "last.pt").exists()
        advice = "continue with --resume and" if is_resumable else "start again with"
        raise DataError(f"a data loading process failed ({reason}), {lack}; {advice} fewer --workers") from None


def augmented(run: Run, batch: dict) -> dict:
    """Crop, flip, distort and normalise the images of a batch at random. The region masks are cropped alike.

    batch: on the device, with uint8 images (B, 3, S, S)
    -> a new batch with float images
    """
    config, batch = run.config, dict(batch)
    for key in ("images", "target_images"):
        if key not in batch:
            continue
        crops = random_crops(len(batch[key]), config.crop_scale, run.generator, config.distort, run.device)
        batch[key] = augment(batch[key], crops, run.generator, config.distort)
        if "region_masks" in batch:
            batch["region_masks"] = apply_crops(batch["region_masks"], crops, "zeros")
    return batch


def learn_vocabulary(config: TrainConfig, dataset: PairDataset) -> Tokenizer:
    """Build the tokenizer of a new run: from --vocab if it is given, otherwise trained on the captions.

    Raises OSError and DataError where --vocab cannot be used.
    """
    vocab = config.vocab
    if vocab and zipfile.is_zipfile(vocab):
        vocab = read_tokenizer(load_checkpoint(vocab))
    captions = []
    if not vocab:
        for row in tqdm(range(len(dataset)), "reading captions", unit=" captions", leave=False, disable=None):
            segments = dataset.text(row)[1::2]  # the caption, and the values of prompts
            captions.append(" ".join(segments))
    return build_tokenizer(captions, config.model.vocab_size, config.model.max_length, vocab, config.prompts)


def report_truncated_captions(dataset: PairDataset, tokenizer: Tokenizer) -> None:
    """Print the share of training captions that are longer than --max-length, among about a thousand of them."""
    rows = range(0, len(dataset), max(1, len(dataset) // 1000))
    encodings = encode(tokenizer, [dataset.text(row) for row in rows])
    truncated = sum(bool(encoding.overflowing) for encoding in encodings)
    if truncated:
        percent = 100 * truncated / len(rows)
        max_length = tokenizer.truncation["max_length"]
        print(
            f"{percent:.0f} % of the training captions are longer than {max_length} tokens and are cut; "
            "raise --max-length to keep them"
        )


def images_of_first_products(dataset: PairDataset, count: int) -> Subset:
    """Select all images of the first `count` products."""
    return Subset(dataset, np.flatnonzero(dataset.product_ids < count).tolist())


def distinct_image_rows(dataset: PairDataset) -> np.ndarray:
    """Select one row for each image. -> (n,)"""
    if not dataset.several_captions:
        return np.arange(len(dataset))
    _, first_rows = np.unique(dataset.product_ids, return_index=True)
    return first_rows


def retrieval_captions(dataset: PairDataset, rows: np.ndarray) -> tuple[list[Text], Tensor, Tensor]:
    """Collect the captions by which some images are retrieved.

    These are one caption per product, from its first image; or, where an image has several captions, all of them.
    rows (n,): rows of the images
    -> captions (m); the product of each image (n,) and of each caption (m,), counted from 0 among these products
    """
    product_ids, first, image_products = np.unique(dataset.product_ids[rows], return_index=True, return_inverse=True)
    if dataset.several_captions:
        caption_rows = np.flatnonzero(np.isin(dataset.product_ids, product_ids))
        caption_products = np.searchsorted(product_ids, dataset.product_ids[caption_rows])
    else:
        caption_rows = rows[first]
        caption_products = np.arange(len(product_ids))
    captions = [dataset.text(row) for row in caption_rows]
    return captions, torch.from_numpy(image_products), torch.from_numpy(caption_products)


def encode_captions(run: Run, captions: list[Text]) -> Iterator[tuple[Tensor, Tensor]]:
    """Encode captions in order, CAPTION_BATCH at a time. -> text_embeds (B, L, D), attention_mask (B, L)"""
    tokens = to_device(tokenize(run.tokenizer, captions), run.device)
    starts = range(0, len(captions), CAPTION_BATCH)
    for start in tqdm(starts, "encoding captions", unit=" batches", leave=False, disable=None):
        token_ids = tokens["token_ids"][start : start + CAPTION_BATCH]
        attention_mask = tokens["attention_mask"][start : start + CAPTION_BATCH]
        with autocast(run):
            text_embeds = run.model.text(token_ids, attention_mask)
        yield text_embeds, attention_mask


@torch.no_grad()
def text_features(run: Run, captions: list[Text]) -> Tensor:
    """Compute unit-length features of captions. -> (m, E)

    Equal captions are encoded once, so that they get equal features and tie.
    """
    distinct = list(dict.fromkeys(captions))
    feats = []
    for text_embeds, attention_mask in encode_captions(run, distinct):
        with autocast(run):
            feats.append(run.model.text_feature(text_embeds, attention_mask))
    number_of = {caption: number for number, caption in enumerate(distinct)}
    return torch.cat(feats)[[number_of[caption] for caption in captions]]


def evaluation_batches(run: Run, dataset: Dataset, title: str) -> Iterator[dict]:
    """Yield all of a data set in order, on the device, with normalised images that are neither cropped nor flipped.

    Images that cannot be read are left out and printed.
    dataset: a PairDataset, or a Subset of one
    title: of the progress bar
    Raises DataError where no image can be read, and as `load_batches`.
    """
    loader = DataLoader(
        dataset,
        run.config.batch_size,
        collate_fn=run.collate,
        num_workers=run.config.workers,
        worker_init_fn=ignore_signals,
    )
    image_count = 0
    batches = load_batches(run, loader)
    for batch in tqdm(batches, title, len(loader), unit=" batches", leave=False, disable=None):
        for reason in set(batch["unreadable"]) - run.unreadable:
            tqdm.write(f"cannot be read: {reason}")
        run.unreadable |= set(batch["unreadable"])
        image_count += len(batch["rows"])
        if len(batch["rows"]):
            batch = to_device(batch, run.device)
            yield batch | {"images": normalise(batch["images"])}
    if not image_count:
        raise DataError("no image can be read; check --root and the files named above")


@torch.no_grad()
def image_features(run: Run, dataset: PairDataset) -> tuple[np.ndarray, Tensor]:
    """Compute unit-length features of all images that can be read. -> their rows (n,), features (n, E)

    Raises DataError where no image can be read.
    """
    rows, feats = [], []
    for batch in evaluation_batches(run, dataset, "encoding images"):
        with autocast(run):
            feats.append(run.model.image_feature(run.model.vision(batch["images"])))
        rows.append(batch["rows"].cpu().numpy())
    return np.concatenate(rows), torch.cat(feats)


@torch.no_grad()
def score_pairs_with_itm(run: Run, dataset: PairDataset, captions: list[Text], pairs: Tensor) -> Tensor:
    """Compute the ITM head's logit for "match" minus its logit for "no match" of some pairs. -> (n,)

    Each image and each caption is encoded once.
    pairs (n, 2): a row of `dataset` and the number of a caption
    Raises DataError where an image cannot be read.
    """
    model = run.model
    embeds, masks = [], []
    for text_embeds, attention_mask in encode_captions(run, captions):
        embeds.append(text_embeds)
        masks.append(attention_mask)
    text_embeds, attention_mask = torch.cat(embeds), torch.cat(masks)

    pairs = pairs.to(run.device)
    rows, image_of_pair = pairs[:, 0].unique(return_inverse=True)
    scores = torch.empty(len(pairs), device=run.device)
    start = 0  # images before this batch
    for batch in evaluation_batches(run, dataset.subset(rows.tolist()), "scoring pairs"):
        with autocast(run):
            image_kv = model.fusion.project_image_kv(model.vision(batch["images"]))
        end = start + len(batch["rows"])
        pairs_of_batch = ((image_of_pair >= start) & (image_of_pair < end)).nonzero().squeeze(1)
        for selected in pairs_of_batch.split(4 * run.config.batch_size):
            caption = pairs[selected, 1]
            image_index = image_of_pair[selected] - start
            with autocast(run):
                fused_cls = model.fusion(
                    text_embeds[caption], attention_mask[caption], image_kv, image_index, cls_only=True
                )
                logits = model.itm_logits(fused_cls)
            scores[selected] = (logits[:, 1] - logits[:, 0]).float()
        start = end
    if start < len(rows):
        raise DataError("an image that could be read before cannot be read again; check the files named above")
    return scores


def compose_queries(run: Run, batch: dict, references: Tensor, fused: bool) -> Tensor:
    """Compute unit-length queries of reference images and texts. -> (B, E)

    batch: with the texts
    references (B, N, D): the encoded reference images
    fused: the query is the projected fused [CLS], as after fine-tuning; otherwise the sum of both features
    """
    model, attention_mask = run.model, batch["attention_mask"]
    text_embeds = model.text(batch["token_ids"], attention_mask)
    if fused:
        image_kv = model.fusion.project_image_kv(references)
        return model.project_text(model.fusion(text_embeds, attention_mask, image_kv, cls_only=True))
    return F.normalize(model.image_feature(references) + model.text_feature(text_embeds, attention_mask), dim=-1)
