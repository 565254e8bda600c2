"""Search: the best images for words, for an image, or for an image changed by words."""

import hashlib
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from data import normalise, to_device, tokenize
from engine.batches import compose_queries, distinct_image_rows, image_features, itm_scores, text_features
from engine.checkpoints import load_weights, read_tokenizer
from engine.finetune_config import FOUND, FinetuneConfig, caption_prefix, open_data
from engine.flags import ConfigError
from engine.run import Run, autocast, build_run
from evaluation.pictures import draw_answers
from readers.dataset import DataError, PairDataset, pad_to_square, printable
from readers.files import open_image


def search(config: FinetuneConfig, source: dict) -> list[tuple[int, float]]:
    """Find the best images for a query and draw them on a sheet. -> rows and scores, the best first"""
    tokenizer = read_tokenizer(source)
    image = open_query_image(config)
    if config.query:
        check_words(tokenizer, config.query)
    dataset = open_data(config, config.split)
    print(f"{config.split}: {dataset.report()}")
    if dataset.several_captions:
        dataset = dataset.subset(distinct_image_rows(dataset))
    run = build_run(config, dataset, tokenizer)
    load_weights(run, source, config.checkpoint)
    run.model.eval()

    rows, image_feat = search_index(run, dataset)
    query = query_feature(run, caption_prefix(config), config.query, image, fused=config.start == "tgir")
    scores, best = (image_feat @ query).topk(min(len(rows), max(FOUND, config.rerank)))
    if config.rerank:
        captions = [(caption_prefix(config), config.query)]
        pairs = torch.stack([best.cpu(), torch.zeros(len(best), dtype=torch.long)], dim=1)
        logits, order = itm_scores(run, dataset.subset(rows), captions, pairs).sort(descending=True)
        scores, best = logits.sigmoid(), best[order]

    found = []
    for index, score in zip(best[:FOUND].tolist(), scores[:FOUND].tolist(), strict=True):
        row = int(rows[index])
        found.append((row, score))
        print(f"  {score:.3f}  {printable(dataset.name_of(row))}  {dataset.captions[row]}")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    asked = f"found {config.query or ''} {Path(config.image or '').stem}".lower()
    name = "-".join(re.findall(r"\w+", asked))[:60]
    answers = [(row, f"{score:.2f}", False) for row, score in found]
    draw_answers(dataset, [(config.query or "", image, answers[:5]), ("", None, answers[5:])], out / f"{name}.png")
    print(f"see {out / name}.png")
    return found


def open_query_image(config: FinetuneConfig) -> Image.Image | None:
    """Open --image as the model reads it. Raises DataError."""
    if not config.image:
        return None
    size = config.model.image_size
    try:
        return pad_to_square(open_image(Path(config.image), size), size)
    except OSError as error:
        raise DataError(f"--image {config.image}: {error}") from None


def check_words(tokenizer: Tokenizer, query: str) -> None:
    """Print which words of a query the vocabulary does not have. Raises DataError where it has none of them."""
    words = dict.fromkeys(re.findall(r"\w+", query))
    unknown = []
    for word in words:
        encoding = tokenizer.encode(word, add_special_tokens=False)
        pieces = sum(encoding.attention_mask)  # without padding
        if "[UNK]" in encoding.tokens or pieces == len(word) > 1:
            unknown.append(word)
    if len(unknown) == len(words):
        raise DataError(f"--query {query!r}: no word of it is in the model's vocabulary")
    if unknown:
        print(f"not in the vocabulary, spelt letter by letter: {', '.join(unknown)}")


@torch.no_grad()
def query_feature(run: Run, prefix: str, words: str | None, image: Image.Image | None, fused: bool) -> Tensor:
    """Encode words, an image, or both to a unit-length feature (E,)."""
    if image is None:
        return text_features(run, [(prefix, words)])[0]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(run.device)  # (1, 3, S, S)
    with autocast(run):
        image_embeds = run.model.vision(normalise(pixels))
        if not words:
            return run.model.image_feature(image_embeds)[0]
        batch = to_device(tokenize(run.tokenizer, [(prefix, words)]), run.device)
        return compose_queries(run, batch, image_embeds, fused)[0]


def search_index(run: Run, dataset: PairDataset) -> tuple[np.ndarray, Tensor]:
    """Rows (n,) and features (n, E) of all images, read from --index, or encoded and written there.

    Raises ConfigError for an index that is damaged, or of another checkpoint or data set.
    """
    if not run.config.index:
        return image_features(run, dataset)
    file = Path(run.config.index)
    with open(run.config.checkpoint, "rb") as checkpoint:
        weights = hashlib.file_digest(checkpoint, "sha256").hexdigest()
    names = [dataset.name_of(row) for row in range(len(dataset))]
    key = [weights, names, dataset.captions]
    if not file.exists():
        rows, image_feat = image_features(run, dataset)
        torch.save({"key": key, "rows": torch.from_numpy(rows), "features": image_feat.cpu()}, file)
        return rows, image_feat
    try:
        saved = torch.load(file, map_location=run.device, weights_only=True)
        fits = saved["key"] == key
    except Exception:  # torch raises many kinds for a file that is not its own
        raise ConfigError(f"--index {file}: damaged, or not an index; delete it, and it is written anew") from None
    if not fits:
        raise ConfigError(f"--index {file}: of another checkpoint or data set; give another file")
    return saved["rows"].cpu().numpy(), saved["features"]
