"""Photos and texts on their way into the model: endless batches to train on, whole data sets to encode."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import apply_crops, augment, build_tokenizer, encode, normalise, random_crops, to_device, tokenize
from engine.config import TrainConfig
from engine.log import own_session
from engine.run import Run, autocast
from readers.dataset import DataError, PairDataset, Unreadable
from readers.prompts import Text


class ReadableItems(Dataset):
    """The items of a data set. In place of an image that cannot be read the next one comes that can be, so that batches
    keep their size; the item then says so in `unreadable`."""

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
        raise DataError(f"a hundred images after each other cannot be read, the last one: {unreadable[-1]}")


def endless_batches(run: Run, dataset: PairDataset) -> Iterator[dict]:
    """This process's share of the batches from the current step on, epoch after epoch, on its device."""
    loader = DataLoader(
        ReadableItems(dataset),
        batch_sampler=run.sampler,
        collate_fn=run.collate,
        num_workers=run.config.workers,
        pin_memory=run.device.type == "cuda",
        persistent_workers=run.config.workers > 0,
        worker_init_fn=own_session,
        generator=torch.Generator(),  # its own, or making an iterator would draw from the one dropout uses
    )
    epoch, first_batch = divmod(run.step, len(run.sampler))
    while True:
        run.sampler.set_epoch(epoch, first_batch)
        try:
            for batch in loader:
                yield to_device(batch, run.device)
        except DataError as error:  # from a loading process it brings a traceback, of which it is the last line
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            died = "a data loading process died, for want of memory perhaps"
            raise DataError(f"{died}; go on with --resume and fewer --workers") from None
        epoch, first_batch = epoch + 1, 0


def augmented(run: Run, batch: dict) -> dict:
    """The batch with its images cropped, flipped and normalised, each at random, and the ground truth with them."""
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
    """The tokenizer of a new run: trained on its captions, unless --vocab gives one."""
    captions = []
    if not config.vocab:
        for row in tqdm(range(len(dataset)), "reading texts", unit=" texts", leave=False, disable=None):
            captions.append(" ".join(dataset.text(row)[1::2]))
    sizes = config.model.vocab_size, config.model.max_length
    return build_tokenizer(captions, *sizes, config.vocab, config.prompts)


def report_truncated_captions(dataset: PairDataset, tokenizer: Tokenizer) -> None:
    """Print how many of a thousand training captions are longer than the model reads."""
    rows = range(0, len(dataset), max(1, len(dataset) // 1000))
    encodings = encode(tokenizer, [dataset.text(row) for row in rows])
    longer = sum(bool(encoding.overflowing) for encoding in encodings)
    if longer:
        longest = tokenizer.truncation["max_length"]
        print(
            f"{100 * longer / len(rows):.0f} % of the training captions are cut at {longest} tokens; see --max-length"
        )


def first_products(dataset: PairDataset, count: int) -> torch.utils.data.Subset:
    """All photos of the first `count` products."""
    return torch.utils.data.Subset(dataset, (dataset.product_ids < count).nonzero()[0].tolist())


def distinct_image_rows(dataset: PairDataset) -> np.ndarray:
    """Rows that have each photo once. -> (n,)."""
    return np.unique(dataset.product_ids, return_index=True)[1] if dataset.several_captions else np.arange(len(dataset))


def texts_to_search(dataset: PairDataset, rows: np.ndarray) -> tuple[list[Text], Tensor, Tensor]:
    """The captions that images, some rows (n,), are retrieved by: one a product, that of its first image; where images
    have several captions, all of these. -> captions (m), the product of each image (n,) and of each caption (m,)"""
    products = dataset.product_ids[rows]
    kinds, first, image_products = np.unique(products, return_index=True, return_inverse=True)
    caption_rows, text_products = rows[first], np.arange(len(kinds))
    if dataset.several_captions:
        caption_rows = np.flatnonzero(np.isin(dataset.product_ids, products))
        text_products = np.searchsorted(kinds, dataset.product_ids[caption_rows])
    captions = [dataset.text(row) for row in caption_rows]
    return captions, torch.from_numpy(image_products), torch.from_numpy(text_products)


def encoded_texts(run: Run, texts: list[Text]) -> Iterator[tuple[Tensor, Tensor]]:
    """All texts in order, in parts of up to 256. -> text_embeds (B, L, D), attention_mask (B, L)"""
    encoded = to_device(tokenize(run.tokenizer, texts), run.device)
    for start in tqdm(range(0, len(texts), 256), "encoding texts", unit=" batches", leave=False, disable=None):
        attention_mask = encoded["attention_mask"][start : start + 256]
        with autocast(run):
            text_embeds = run.model.text(encoded["token_ids"][start : start + 256], attention_mask)
        yield text_embeds, attention_mask


@torch.no_grad()
def text_features(run: Run, texts: list[Text]) -> Tensor:
    """Unit-length features (n, E). Every wording is encoded once: identical texts get identical features and tie."""
    wordings, feats = list(dict.fromkeys(texts)), []
    for text_embeds, attention_mask in encoded_texts(run, wordings):
        with autocast(run):
            feats.append(run.model.text_feature(text_embeds, attention_mask))
    number = {wording: i for i, wording in enumerate(wordings)}
    return torch.cat(feats)[[number[text] for text in texts]]


def batches_of(run: Run, dataset: PairDataset, what: str) -> Iterator[dict]:
    """All of a data set in order, on the device, photos normalised and neither cropped nor flipped. Raises DataError
    if there is no image that can be read."""
    workers = dict(num_workers=run.config.workers, worker_init_fn=own_session)
    loader = DataLoader(dataset, run.config.batch_size, collate_fn=run.collate, **workers)
    images = 0
    for batch in tqdm(loader, what, unit=" batches", leave=False, disable=None):
        for reason in set(batch["unreadable"]) - run.unreadable:
            tqdm.write(f"cannot be read: {reason}")
        run.unreadable |= set(batch["unreadable"])
        images += len(batch["rows"])
        if len(batch["rows"]):
            batch = to_device(batch, run.device)
            yield batch | {"images": normalise(batch["images"])}
    if not images:
        raise DataError("no image could be read")


@torch.no_grad()
def image_features(run: Run, dataset: PairDataset) -> tuple[np.ndarray, Tensor]:
    """Rows that could be decoded (n,), and unit-length features of their photos (n, E)."""
    rows, feats = [], []
    for batch in batches_of(run, dataset, "encoding photos"):
        with autocast(run):
            feats.append(run.model.image_feature(run.model.vision(batch["images"])))
        rows.append(batch["rows"].cpu().numpy())
    return np.concatenate(rows), torch.cat(feats)


@torch.no_grad()
def itm_scores(run: Run, dataset: PairDataset, texts: list[Text], pairs: Tensor) -> Tensor:
    """The ITM head's logit for "match" minus that for "no match", of pairs (n, 2) of a row and a text. -> (n,)

    Each image and each text is encoded once.
    """
    model = run.model
    text_embeds, attention_mask = map(torch.cat, zip(*encoded_texts(run, texts), strict=True))
    pairs = pairs.to(run.device)
    rows, image_of = pairs[:, 0].unique(return_inverse=True)
    scores = torch.empty(len(pairs), device=run.device)
    first = 0  # number of the batch's first image
    for batch in batches_of(run, dataset.subset(rows.tolist()), "matching"):
        with autocast(run):
            image_kv = model.fusion.project_image_kv(model.vision(batch["images"]))
        end = first + len(batch["rows"])
        of_batch = ((image_of >= first) & (image_of < end)).nonzero().squeeze(1)
        for pair in of_batch.split(4 * run.config.batch_size):
            text, image_index = pairs[pair, 1], image_of[pair] - first
            with autocast(run):
                fused_cls = model.fusion(text_embeds[text], attention_mask[text], image_kv, image_index, cls_only=True)
                logits = model.itm_logits(fused_cls)
            scores[pair] = (logits[:, 1] - logits[:, 0]).float()
        first = end
    if first < len(rows):
        raise DataError("a photo that could be read before could not be read again")
    return scores


def compose_queries(run: Run, batch: dict, references: Tensor, fused: bool) -> Tensor:
    """Unit-length queries (B, E) of photos, encoded (B, N, D), and texts: after fine-tuning the projected fused [CLS],
    before it the sum of both features."""
    model, attention_mask = run.model, batch["attention_mask"]
    text_embeds = model.text(batch["token_ids"], attention_mask)
    if fused:
        image_kv = model.fusion.project_image_kv(references)
        return model.project_text(model.fusion(text_embeds, attention_mask, image_kv, cls_only=True))
    return F.normalize(model.image_feature(references) + model.text_feature(text_embeds, attention_mask), dim=-1)
