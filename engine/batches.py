"""Photos and texts on their way into the model: endless batches to train on, whole data sets to encode."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import augment, build_tokenizer, cut, encode, normalise, random_crops, to_device, tokenize
from engine.config import TrainConfig
from engine.host import own_session
from engine.ranks import Ranks
from engine.run import Run, autocast
from readers.dataset import DataError, PhotoDataset
from readers.prompts import Text
from sampler import GroupedBatchSampler


@dataclass
class Share:
    """Of every batch of a sampler the part that is one rank's to load."""

    sampler: GroupedBatchSampler
    ranks: Ranks

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.ranks.part, self.sampler)


def endless_batches(run: Run, dataset: PhotoDataset) -> Iterator[dict]:
    """This rank's share of the batches from the current step on, epoch after epoch, on its device."""
    loader = DataLoader(
        dataset,
        batch_sampler=Share(run.sampler, run.ranks),
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
        run.ranks.check_same("batches", zlib.crc32(run.sampler.order))
        try:
            for batch in loader:
                yield run.ranks.agree(to_device(batch, run.device))
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            died = "a data loading process died, for want of memory perhaps"
            raise DataError(f"{died}; --resume goes on from {run.config.out}/last.pt, with fewer --workers") from None
        epoch, first_batch = epoch + 1, 0


def augmented(run: Run, batch: dict) -> dict:
    """The batch with its photos cropped, flipped and normalised, each at random, and the truth with them."""
    config, drawn = run.config, {}
    for key in ("images", "target_images"):
        if key in batch:
            crops = random_crops(len(batch[key]), config.crop_scale, run.generator, config.distort, run.device)
            drawn[key] = augment(batch[key], crops, run.generator, config.distort)
            if "planes" in batch:
                drawn["planes"] = cut(batch["planes"], crops, "zeros")
    return batch | drawn


def learn_vocabulary(config: TrainConfig, dataset: PhotoDataset) -> Tokenizer:
    """The tokenizer of a new run: trained on the texts of its photos, unless --vocab gives one."""
    rows = range(0 if config.vocab else len(dataset))
    bar = tqdm(rows, "reading texts", unit=" texts", leave=False, disable=None)
    spoken = [" ".join(dataset.text(row)[1::2]) for row in bar]
    sizes = config.model.vocab_size, config.model.max_length
    return build_tokenizer(spoken, *sizes, config.vocab, config.prompts)


def first_products(dataset: PhotoDataset, count: int) -> torch.utils.data.Subset:
    """All photos of the first `count` products."""
    return torch.utils.data.Subset(dataset, (dataset.product_ids < count).nonzero()[0].tolist())


def report_cut_texts(dataset: PhotoDataset, tokenizer: Tokenizer, sample: int = 1000) -> None:
    """Say it where texts are longer than the model reads."""
    texts = [dataset.text(row) for row in range(0, len(dataset), max(1, len(dataset) // sample))]
    if cut := sum(bool(encoding.overflowing) for encoding in encode(tokenizer, texts)):
        longest = tokenizer.truncation["max_length"]
        print(f"{100 * cut / len(texts):.0f} % of the training texts are cut at {longest} tokens; see --max-length")


def different_photos(dataset: PhotoDataset) -> np.ndarray:
    """Rows that have each photo once. -> (n,)."""
    return np.unique(dataset.product_ids, return_index=True)[1] if dataset.several else np.arange(len(dataset))


def texts_to_search(dataset: PhotoDataset, rows: np.ndarray) -> tuple[list[Text], Tensor, Tensor]:
    """What photos, some rows (n,), are to be told by: one text a product, that of its first photo; where photos have
    several captions, all of these. -> texts, of which product each photo is (n,), and of which each text (m,)."""
    _, first, owner = np.unique(dataset.product_ids[rows], return_index=True, return_inverse=True)
    lines, told = rows[first], np.arange(len(first))
    if dataset.several:
        lines = np.flatnonzero(np.isin(dataset.product_ids, dataset.product_ids[rows]))
        told = np.unique(dataset.product_ids[lines], return_inverse=True)[1]
    return [dataset.text(row) for row in lines], torch.from_numpy(owner), torch.from_numpy(told)


@torch.no_grad()
def text_features(run: Run, texts: list[Text]) -> Tensor:
    """Unit-length features (n, E). Every wording is encoded once: identical texts get identical features and tie."""
    wordings, feats = list(dict.fromkeys(texts)), []
    for start in tqdm(range(0, len(wordings), 256), "encoding texts", unit=" batches", leave=False, disable=None):
        encoded = to_device(tokenize(run.tokenizer, wordings[start : start + 256]), run.device)
        with autocast(run):
            text_embeds = run.model.text(encoded["token_ids"], encoded["attention_mask"])
            feats.append(run.model.text_feature(text_embeds, encoded["attention_mask"]))
    number = {wording: i for i, wording in enumerate(wordings)}
    return torch.cat(feats)[[number[text] for text in texts]]


def batches_of(run: Run, dataset: PhotoDataset, what: str) -> Iterator[dict]:
    """All of a data set in order, on the device, photos normalised and neither cropped nor flipped."""
    workers = dict(num_workers=run.config.workers, worker_init_fn=own_session)
    loader = DataLoader(dataset, run.config.batch_size, collate_fn=run.collate, **workers)
    for batch in tqdm(loader, what, unit=" batches", leave=False, disable=None):
        for reason in set(batch["unreadable"]) - run.unreadable:
            tqdm.write(f"left out: {reason}")
        run.unreadable |= set(batch["unreadable"])
        if len(batch["rows"]):
            batch = to_device(batch, run.device)
            yield batch | {"images": normalise(batch["images"])}


@torch.no_grad()
def photo_features(run: Run, dataset: PhotoDataset) -> tuple[np.ndarray, Tensor]:
    """Rows that could be decoded (n,), and unit-length features of their photos (n, E)."""
    rows, feats = [np.arange(0)], []
    for batch in batches_of(run, dataset, "encoding photos"):
        with autocast(run):
            feats.append(run.model.image_feature(run.model.vision(batch["images"])))
        rows.append(batch["rows"].cpu().numpy())
    if not feats:
        raise DataError("no photo could be read")
    return np.concatenate(rows), torch.cat(feats)


@torch.no_grad()
def match_scores(run: Run, photos: PhotoDataset, texts: list[Text], pairs: Tensor) -> Tensor:
    """The ITM head's logit for "match" over "no match", of pairs (n, 2) of a row of `photos` and a text. -> (n,).

    Each photo and each text is encoded once.
    """
    encoded = to_device(tokenize(run.tokenizer, texts), run.device)
    ids, keep = encoded["token_ids"], encoded["attention_mask"]
    with autocast(run):
        text_embeds = torch.cat([run.model.text(i, k) for i, k in zip(ids.split(256), keep.split(256), strict=True)])
    rows, place = pairs[:, 0].unique(return_inverse=True)
    order, scores = place.argsort(), torch.empty(len(pairs), device=run.device)
    place, done = place[order].to(run.device), 0
    asked, seen = pairs[order, 1].to(run.device), 0
    for batch in batches_of(run, photos.part(rows.numpy()), "matching"):
        with autocast(run):
            image_embeds = run.model.vision(batch["images"])
            until = int(torch.searchsorted(place, seen + len(image_embeds)))
            for at in torch.arange(done, until, device=run.device).split(4 * run.config.batch_size):
                if not len(at):
                    continue
                t, which = asked[at], place[at] - seen
                first, last = which[0], which[-1]  # photos are in order: of most batches a few are asked for
                shown = image_embeds[first : last + 1]
                image_kv = run.model.fusion.project_image_kv(shown)
                fused_cls = run.model.fusion(text_embeds[t], keep[t], image_kv, which - first, cls_only=True)
                logits = run.model.itm_logits(fused_cls)
                scores[at] = (logits[:, 1] - logits[:, 0]).float()
        seen, done = seen + len(image_embeds), until
    if done < len(pairs):
        raise DataError("a photo that could be read before could not be read again")
    result = torch.empty_like(scores)
    result[order.to(run.device)] = scores
    return result
