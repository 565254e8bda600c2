"""Search: the best photos for words, for a photo, or for a photo changed by words."""

import hashlib
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from data import encode, normalise, to_device, tokenize
from engine.batches import different_photos, match_scores, photo_features, text_features
from engine.checkpoints import load_weights
from engine.finetune_config import FOUND, FinetuneConfig
from engine.flags import ConfigError
from engine.run import Run, autocast, build_run
from engine.splits import lead_of, open_photos
from engine.trust import read_tokenizer
from engine.wiring import compose
from engine.writer import whole_file
from evaluation.pictures import draw_answers
from readers.dataset import DataError, PhotoDataset, legible, square
from readers.files import open_photo


def search(config: FinetuneConfig, source: dict) -> list[tuple[int, float]]:
    """The best photos for words, for a photo, or for a photo changed by words, on a sheet. -> rows and scores."""
    photo, tokenizer = None, read_tokenizer(source, config.checkpoint)
    if config.image:
        try:
            photo = square(open_photo(Path(config.image), config.model.image_size), config.model.image_size)
        except OSError as error:
            raise DataError(f"--image {config.image}: {error}") from None
    if config.query:
        check_words(tokenizer, lead_of(config), config.query)
    dataset = open_photos(config, config.split)
    print(f"{config.split}: {dataset.report()}")
    if dataset.several:
        dataset = dataset.part(different_photos(dataset))
    run = build_run(config, dataset, tokenizer)
    load_weights(run, source, config.checkpoint)
    run.model.eval()
    rows, feats = photo_index(run, dataset, source)
    query = query_feature(run, lead_of(config), config.query, photo, fused=config.start == "tgir")
    scores, best = (feats @ query).topk(min(len(rows), max(FOUND, config.rerank)))
    if config.rerank:
        pairs = torch.stack([best.cpu(), torch.zeros(len(best), dtype=torch.long)], dim=1)
        asked = [(lead_of(config), config.query)]
        matched, order = match_scores(run, dataset.part(rows), asked, pairs).sort(descending=True)
        scores, best = matched.sigmoid(), best[order]
    found = [(int(rows[i]), s) for i, s in zip(best.tolist(), scores.tolist(), strict=True)][:FOUND]
    for row, score in found:
        print(f"  {score:.3f}  {legible(dataset.name_of(row))}  {dataset.captions[row]}")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    words = "-".join(re.findall(r"\w+", f"found {config.query or ''} {Path(config.image or '').stem}".lower()))
    path = out / f"{words[:60]}.png"
    draw_answers(dataset, [(config.query or "", photo, [(row, f"{s:.2f}", False) for row, s in found])], path)
    print(f"see {path}")
    return found


def check_words(tokenizer: Tokenizer, lead: str, text: str) -> None:
    """Raise DataError for a query that the vocabulary has no word of; say what else of it is not read as it stands."""
    words, unknown = dict.fromkeys(re.findall(r"\w+", text)), dict.fromkeys(unknown_words(tokenizer, text))
    if len(unknown) == len(words):
        raise DataError(f"--query {text!r}: no word of it is in the model's vocabulary")
    if unknown:
        print(f"not in the vocabulary, spelt letter by letter: {', '.join(unknown)}")
    if encode(tokenizer, [(lead, text)])[0].overflowing:
        print(f"--query is longer than the model reads, and cut after {tokenizer.truncation['max_length']} tokens")


def unknown_words(tokenizer: Tokenizer, text: str) -> list[str]:
    """Words that the vocabulary can only spell letter by letter, or not at all."""
    unknown = []
    for word in re.findall(r"\w+", text):
        encoding = tokenizer.encode(word, add_special_tokens=False)
        pieces = encoding.tokens[: sum(encoding.attention_mask)]  # without padding
        spelt = len(pieces) > 1 and all(len(piece.removeprefix("##")) == 1 for piece in pieces)
        if spelt or "[UNK]" in pieces:
            unknown.append(word)
    return unknown


@torch.no_grad()
def query_feature(run: Run, lead: str, text: str | None, photo: Image.Image | None, fused: bool) -> Tensor:
    """The unit-length feature (E,) of words, of a photo, or of both."""
    if photo is None:
        return text_features(run, [(lead, text)])[0]
    batch = to_device(tokenize(run.tokenizer, [(lead, text)]), run.device) if text else None
    with autocast(run):
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].to(run.device)
        embeds = run.model.vision(normalise(pixels))
        return compose(run, batch, embeds, fused)[0] if text else run.model.image_feature(embeds)[0]


def photo_index(run: Run, dataset: PhotoDataset, source: dict) -> tuple[np.ndarray, Tensor]:
    """Rows (n,) and features (n, E) of all photos, read from --index, or encoded and written there.

    Raises ConfigError for an index that is damaged, or of another checkpoint or data set.
    """
    file = run.config.index and Path(run.config.index)
    if not file:
        return photo_features(run, dataset)
    names = "\n".join(dataset.name_of(row) for row in range(len(dataset)))
    key = [source["step"], weights_hash(run.model), dataset.fingerprint(), zlib.crc32(names.encode())]
    if file.exists():
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            found, rows, feats = saved["key"], saved["rows"].numpy(), saved["features"].to(run.device)
        except Exception:  # torch raises many kinds for a file that is not its own
            raise ConfigError(f"--index {file}: damaged, or not an index; delete it, and it is written anew") from None
        if found != key:
            raise ConfigError(f"--index {file}: of another checkpoint or data set; give another file")
        return rows, feats
    rows, feats = photo_features(run, dataset)
    with whole_file(file) as opened:
        torch.save({"key": key, "rows": torch.from_numpy(rows), "features": feats.cpu()}, opened)
    return rows, feats


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of all weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
