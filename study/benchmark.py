"""What things cost, each measured in one run on one machine.

python study/benchmark.py passes                      encoder passes and multiply-adds of a step, by recipe, counted
python study/benchmark.py step [--preset base …]      a step of albef beside one put together from library parts
python study/benchmark.py data [--data jsonl …]       photos a second through decoding and augmentation, by workers
python study/benchmark.py sampler                     composing one epoch of grouped batches for 260,000 photos

The first three take train.py's flags too: --preset, --recipe, --batch-size, --device, --precision, --compile, …
"""

import argparse
import contextlib
import copy
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import TOKEN_KEYS, Collate, augment, build_dataset, build_tokenizer, normalise, to_device
from harness.config import TrainConfig, parse_config
from harness.flags import ConfigError
from harness.log import peak_memory_mib
from harness.run import Run, autocast, build_run
from losses import itc_loss, itc_targets, itm_loss, mlm_loss
from masking import random_word_mask
from model import ModelConfig
from photos.dataset import DataError
from photos.fashiongen import FashionGen
from sampler import GroupedBatchSampler, SamplerMode
from train import RECIPES


def open_step(config: TrainConfig, batches: int, tokens: int = 0) -> tuple[Run, list[dict]]:
    """A run past its warm-ups, and batches of synthetic photos for it, on its device; texts padded to `tokens` tokens,
    unless the longest of a batch is longer."""
    products = 2 + batches * config.batch_size // 3
    dataset = build_dataset("synthetic", None, "train", config.model.image_size, config.seed, products, False)
    dataset.prompts = config.prompts
    spoken = [" ".join(dataset.text(row)[1::2]) for row in range(len(dataset))]
    tokenizer = build_tokenizer(spoken, config.model.vocab_size, config.model.max_length, config.vocab, config.prompts)
    unused = config.model.vocab_size - tokenizer.get_vocab_size()  # synthetic texts have but a few hundred words
    tokenizer.add_tokens([f"[unused{i}]" for i in range(unused)])
    run = build_run(config, dataset, tokenizer)
    run.step = 10**9  # past every warm-up
    run.generator = torch.Generator(run.device).manual_seed(config.seed)
    rows = np.random.default_rng(config.seed).permutation(len(dataset))[: batches * config.batch_size]
    found = []
    for chosen in rows.reshape(batches, -1):
        batch = to_device(Collate(tokenizer)([dataset[int(row)] for row in chosen]), run.device)
        missing = max(0, tokens - batch["token_ids"].shape[1])
        padded = {key: F.pad(batch[key], [0, missing]) for key in TOKEN_KEYS}
        found.append(batch | padded | {"images": normalise(batch["images"])})
    return run, found


def count_step(run: Run, batch: dict) -> dict[str, float]:
    """What a step of the run's recipe does per photo: how many photos or texts pass each part of the model, and of the
    momentum model (…_m); multiply-adds (in millions) forward and in the whole step; MiB kept for the backward pass.
    And how often a step would make the host wait for a GPU."""
    counts: dict[str, float] = {}
    count = len(batch["token_ids"])

    def counter(key: str) -> Callable:
        def hook(_module: nn.Module, args: tuple) -> None:
            counts[key] = counts.get(key, 0) + len(args[0]) / count

        return hook

    hooks = [
        getattr(model, part).register_forward_pre_hook(counter(part + suffix))
        for model, suffix in ((run.model, ""), (run.momentum, "_m"))
        for part in ("vision", "text", "fusion", "decoder")
    ]
    with counted() as flops:
        losses, _ = RECIPES[run.config.recipe](run, batch)
        counts["forward"] = flops.get_total_flops() / 2e6 / count
        sum(losses.values()).backward()
    counts["step"] = flops.get_total_flops() / 2e6 / count
    for hook in hooks:
        hook.remove()
    with Waits() as waits:
        our_step(run, {})(batch)
    counts["waits"] = len(waits.found)

    kept = {p.untyped_storage().data_ptr(): 0 for p in run.model.parameters()}  # these are there anyway

    def note(saved: Tensor) -> Tensor:
        kept.setdefault(saved.untyped_storage().data_ptr(), saved.untyped_storage().nbytes())
        return saved

    noted = torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved)
    with torch.compiler.set_stance("force_eager"), noted, autocast(run):
        RECIPES[run.config.recipe](run, batch)
    counts["kept"] = sum(kept.values()) / 2**20 / count
    run.optimizer.zero_grad()
    return counts


class Waits(TorchDispatchMode):
    """Finds the operations inside that would make the host wait for a GPU: whose result has a size that only the data
    tell, whose numbers are asked for, or that copy numbers from Python's lists."""

    aten = torch.ops.aten
    asking = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten.lift_fresh,
              aten._unique2, aten.unique_dim, aten.unique_consecutive}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in (self.aten.index, self.aten.index_put, self.aten.index_put_) and any(
            place is not None and place.dtype == torch.bool for place in args[1]
        )
        by_count = func is self.aten.repeat_interleave.Tensor and not (kwargs or {}).get("output_size")
        if by_mask or by_count or func.overloadpacket in self.asking:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Counts the matrix products inside, those of attention too, whose fused kernels are not counted everywhere, and
    those of compiled modules, which otherwise would be hidden."""
    uncompiled = torch.compiler.set_stance("force_eager")
    with uncompiled, FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        yield flops


def passes(flags: list[str], tokens: int) -> None:
    """Print `count_step` of every recipe with these flags of train.py; a photo counts as one even where only its
    visible patches are encoded."""
    parts = ["vision", "text", "fusion", "decoder", "vision_m", "text_m", "fusion_m"]
    print("a photo: passes, multiply-adds in millions, MiB kept for the backward pass; a step: waits for a GPU")
    names = ["recipe", "tokens", *parts, "forward", "step", "MiB", "waits"]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for recipe in RECIPES:
        config, _ = parse_config([*flags, "--recipe", recipe])
        if tokens > config.model.max_length:
            raise ConfigError(f"--tokens {tokens}: the model reads {config.model.max_length}; see --max-length")
        run, (batch,) = open_step(config, 1, tokens)
        counts = count_step(run, batch)
        cells = [str(batch["token_ids"].shape[1])] + [f"{counts.get(part, 0):g}" for part in parts]
        cells += [f"{counts[key]:,.0f}" for key in ("forward", "step")]
        cells += [f"{counts['kept']:,.1f}", str(counts["waits"])]
        print(f"| {recipe} | " + " | ".join(cells) + " |")


class Reference(nn.Module):
    """ALBEF's model from Hugging Face's parts, with the sizes of ours; attention is theirs, "eager" or "sdpa"."""

    def __init__(self, config: ModelConfig, attention: str):
        from transformers import BertConfig, BertModel, ViTConfig, ViTModel
        from transformers.models.bert.modeling_bert import BertLayer, BertOnlyMLMHead

        super().__init__()
        sizes = dict(hidden_size=config.width, num_attention_heads=config.heads, intermediate_size=4 * config.width)
        vit = ViTConfig(
            **sizes, num_hidden_layers=config.vision_layers, image_size=config.image_size, patch_size=config.patch_size
        )
        drop = dict(hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout)
        bert = BertConfig(**sizes, **drop, num_hidden_layers=config.text_layers, vocab_size=config.vocab_size)
        vit._attn_implementation = bert._attn_implementation = attention
        cross = copy.deepcopy(bert)
        cross.is_decoder = cross.add_cross_attention = True
        self.vision, self.text = ViTModel(vit, add_pooling_layer=False), BertModel(bert, add_pooling_layer=False)
        self.fusion = nn.ModuleList(BertLayer(cross, layer_idx=i) for i in range(config.fusion_layers))
        for layer in self.fusion:
            layer.attention.self.is_causal = False
        self.vision_proj = nn.Linear(config.width, config.embed_dim)
        self.text_proj = nn.Linear(config.width, config.embed_dim)
        self.itm_head, self.mlm_head = nn.Linear(config.width, 2), BertOnlyMLMHead(bert)
        self.mlm_head.predictions.decoder.weight = self.text.embeddings.word_embeddings.weight
        self.temp = nn.Parameter(torch.tensor(0.07))

    def encode(self, images: Tensor, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """image_embeds (B, N, D), text_embeds (B, L, D), their features (B, E)."""
        image_embeds = self.vision(images).last_hidden_state
        text_embeds = self.text(ids, attention_mask=keep).last_hidden_state
        image_feat = F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)
        return image_embeds, text_embeds, image_feat, F.normalize(self.text_proj(text_embeds[:, 0]), dim=-1)

    def fuse(self, text_embeds: Tensor, keep: Tensor, image_embeds: Tensor) -> Tensor:
        """(B, L, D), (B, L), (B, N, D) -> (B, L, D)."""
        mask = (1.0 - keep[:, None, None, :].to(text_embeds.dtype)) * torch.finfo(text_embeds.dtype).min
        for layer in self.fusion:
            out = layer(text_embeds, attention_mask=mask, encoder_hidden_states=image_embeds)
            text_embeds = out[0] if isinstance(out, tuple) else out
        return text_embeds


def reference_step(run: Run, attention: str) -> Callable[[dict], Tensor]:
    """A step of ALBEF as public implementations write it: a pass for the matching pairs, one for the others, one for
    masked words; negatives drawn row by row; the vocabulary predicted for every token; plain AdamW; momentum copied one
    parameter after the other. The objectives are ours; its masks are drawn beforehand."""
    config = run.config
    torch.manual_seed(config.seed)
    model = Reference(run.model.config, attention).to(run.device).train()
    momentum = copy.deepcopy(model).requires_grad_(False)
    if config.compile:
        for part in (model.vision, model.text, *model.fusion, momentum.vision, momentum.text, *momentum.fusion):
            part.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)

    def negatives(sim: Tensor, same: Tensor) -> list[int]:
        weights = sim.detach().masked_fill(same, -1e4).softmax(dim=1)
        return [torch.multinomial(row, 1).item() for row in weights]

    def step(batch: dict) -> Tensor:
        images, ids, keep = batch["images"], batch["token_ids"], batch["attention_mask"]
        products = batch["product_ids"]
        masked_ids, labels = run.corrupt(ids, batch["mask"])
        with autocast(run):
            image_embeds, text_embeds, image_feat, text_feat = model.encode(images, ids, keep)
            with torch.no_grad():
                image_embeds_m, _, image_feat_m, text_feat_m = momentum.encode(images, ids, keep)
                targets_i2t, targets_t2i = (
                    itc_targets(products, products, a @ b.T / model.temp, run.alpha)
                    for a, b in ((image_feat_m, text_feat_m), (text_feat_m, image_feat_m))
                )
            sim_i2t, sim_t2i = image_feat @ text_feat_m.T / model.temp, text_feat @ image_feat_m.T / model.temp
            itc = itc_loss(sim_i2t, sim_t2i, targets_i2t, targets_t2i)
            same = products[:, None] == products[None]
            wrong_text, wrong_image = negatives(sim_i2t, same), negatives(sim_t2i, same)
            matching = model.fuse(text_embeds, keep, image_embeds)
            others = model.fuse(
                torch.cat([torch.stack([text_embeds[j] for j in wrong_text]), text_embeds]),
                torch.cat([torch.stack([keep[j] for j in wrong_text]), keep]),
                torch.cat([image_embeds, torch.stack([image_embeds[j] for j in wrong_image])]),
            )
            logits = model.itm_head(torch.cat([matching[:, 0], others[:, 0]]))
            itm = itm_loss(logits, torch.cat([products.new_ones(len(ids)), products.new_zeros(2 * len(ids))]))
            masked_embeds = model.text(masked_ids, attention_mask=keep).last_hidden_state
            words = model.mlm_head(model.fuse(masked_embeds, keep, image_embeds))  # (B, L, V)
            words_m = None
            if run.alpha > 0:
                with torch.no_grad():
                    masked_m = momentum.text(masked_ids, attention_mask=keep).last_hidden_state
                    words_m = momentum.mlm_head(momentum.fuse(masked_m, keep, image_embeds_m)).flatten(0, 1)
            mlm = mlm_loss(words.flatten(0, 1), labels.flatten(), words_m, run.alpha)
        loss = itc + itm + mlm
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        for ours, theirs in zip(momentum.parameters(), model.parameters(), strict=True):
            ours.data = ours.data * config.ema_decay + theirs.data * (1 - config.ema_decay)
        return loss

    return step


def our_step(run: Run, phases: dict[str, list[float]]) -> Callable[[dict], Tensor]:
    """The step of train.py's loop; seconds of its phases are noted in `phases`."""

    def step(batch: dict) -> Tensor:
        times = [now(run.device)]
        with autocast(run):
            losses, _ = RECIPES[run.config.recipe](run, batch)
        loss = sum(losses.values())
        times.append(now(run.device))
        loss.backward()
        times.append(now(run.device))
        nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.model.clamp_temp()
        run.momentum.update(run.model)
        times.append(now(run.device))
        for phase, start, end in zip(("forward", "backward", "update"), times, times[1:], strict=False):
            phases.setdefault(phase, []).append(end - start)
        return loss

    return step


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ceiling(run: Run, size: int, products: int = 4, repeats: int = 5) -> float:
    """Multiply-adds a second of large matrix products, in the run's precision on its device: the most to hope for."""
    dtype = torch.bfloat16 if run.config.precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=run.device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        start = now(run.device)
        for _ in range(products):
            a @ b
        best = min(best, now(run.device) - start)
    return products * size**3 / best


def step(config: TrainConfig, repeats: int) -> None:
    """Time our step, and for albef the reference's, turn about; print medians, their ratio and where time goes. Without
    the queue, which the reference does not have."""
    config = replace(config, queue=0)
    run, batches = open_step(config, 2)
    for batch in tqdm(batches, "warming up", leave=False, disable=None):
        batch["mask"] = random_word_mask(batch["words"], config.mlm_ratio, run.generator)
        our_step(run, {})(batch)
    peak = peak_memory_mib(run.device)  # before anything else is in memory
    counts, phases = count_step(run, batches[0]), {}
    steps = {"ours": our_step(run, phases)}
    if config.recipe == "albef":
        # public implementations of ALBEF write attention out; the library's default is the fused kernel
        steps |= {f"library parts, {how}": reference_step(run, how) for how in ("eager", "sdpa")}
    work = dict.fromkeys(steps, counts["step"])
    for name in tqdm(steps.keys() - {"ours"}, "counting", leave=False, disable=None):
        with counted() as flops:
            steps[name](batches[0])
        work[name] = flops.get_total_flops() / 2e6 / config.batch_size
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in tqdm(range(repeats + 2), "steps", disable=None):  # the first two warm up
        for name, take in steps.items():
            start = now(run.device)
            take(batches[number % 2])
            seconds[name].append(now(run.device) - start)
    size, side = config.batch_size, 8192 if run.device.type == "cuda" else 2048
    top = ceiling(run, side)
    medians = {name: float(np.median(times[2:])) for name, times in seconds.items()}
    how = [run.config.precision, *(["compiled"] if config.compile else []), f"{run.device}"]
    how = ", ".join([*how, f"{torch.get_num_threads()} threads"])
    print(f"{config.recipe}, {config.preset}, batch {size}, {how}; medians of {repeats} steps")
    for name, median in medians.items():
        print(f"  {name:20} {median:8.3f} s a step, {size / median:8.1f} photos a second, "
              f"{median / medians['ours']:.2f} x ours; {work[name]:,.0f} M multiply-adds a photo")  # fmt: skip
    parts = ", ".join(f"{phase} {np.median(times[2:]):.3f} s" for phase, times in phases.items())
    rate = counts["step"] * 1e6 * size / medians["ours"]
    print(f"  ours: {parts}; at most {peak:,.0f} MiB")
    print(f"  ours: {rate / 1e9:,.1f} G multiply-adds a second, {100 * rate / top:.0f} % of the {top / 1e9:,.1f} G of "
          f"a {side} x {side} matrix product")  # fmt: skip


@contextlib.contextmanager
def packed(config: TrainConfig, chunk: int, gzip: int | None) -> Iterator[TrainConfig]:
    """The config, reading a copy of FashionGen's training file with so many photos in an HDF5 chunk, packed so."""
    if config.data != "fashiongen":
        raise ConfigError("--chunk and --gzip pack the photos of --data fashiongen")
    path = FashionGen(Path(config.root or "data/fashiongen"), "train", config.model.image_size).path
    with tempfile.TemporaryDirectory() as folder:
        with h5py.File(path) as source, h5py.File(Path(folder, path.name), "w") as file:
            photos = source["input_image"]
            chunks, part = (min(chunk, len(photos)), *photos.shape[1:]), 32 * chunk
            target = file.create_dataset("input_image", photos.shape, "uint8", chunks=chunks, compression=gzip)
            for start in tqdm(range(0, len(photos), part), "packing", leave=False, disable=None):
                target[start : start + part] = photos[start : start + part]
            for key in source.keys() - {"input_image"}:
                file[key] = source[key][:]
        yield replace(config, root=folder)


def data(config: TrainConfig, workers: list[int], batches: int, steps: int) -> None:
    """What a data set holds in memory, and photos a second through decoding and collation by so many workers, through
    transfer and augmentation, and through the step that they are for."""
    tracemalloc.start()
    dataset = build_dataset(config.data, config.root, "train", config.model.image_size, config.seed, config.products)
    held = tracemalloc.get_traced_memory()[0] / len(dataset)
    tracemalloc.stop()
    dataset.prompts = config.prompts
    print(f"{dataset.report()}\n  {held:,.0f} bytes of memory a photo, in each process")
    sizes = config.model.vocab_size, config.model.max_length
    tokenizer = build_tokenizer(dataset.captions[:5000], *sizes, config.vocab, config.prompts)
    order = np.random.default_rng(config.seed).permutation(len(dataset))
    rates = {}
    for count in [max(workers), *workers]:  # the first round brings the files into memory
        ahead = max(1, 2 * count)  # batches that workers make before they are asked for: not counted
        rows = np.resize(order, ((batches + ahead), config.batch_size)).tolist()
        loader = DataLoader(dataset, batch_sampler=rows, collate_fn=Collate(tokenizer), num_workers=count)
        reader = iter(tqdm(loader, f"reading with {count} workers", unit=" batches", leave=False, disable=None))
        for _ in range(ahead):
            next(reader)
        seen, filled, start = 0, [], time.perf_counter()
        for batch in reader:
            seen += len(batch["rows"])
            filled.append(batch["attention_mask"].float().mean().item())
        rates[count] = seen / (time.perf_counter() - start)
    print(
        f"  texts fill {100 * np.mean(filled):.0f} % of the tokens up to a batch's longest, batch {config.batch_size}"
    )
    for count in workers:
        print(f"  decode and collate, {count:2} workers: {rates[count]:9,.0f} photos a second")
    device, generator = torch.device(config.device), torch.Generator(config.device).manual_seed(0)
    seconds = []
    for _ in range(batches + 1):
        start = now(device)
        images = to_device(batch, device)["images"]
        augment(images, config.crop_scale, generator, config.distort)
        seconds.append(now(device) - start)
    rate = len(batch["rows"]) / float(np.median(seconds[1:]))
    print(f"  transfer and augment, {device}: {rate:9,.0f} photos a second")
    run, (batch,) = open_step(config, 1)
    take, seconds = our_step(run, {}), []
    for _ in tqdm(range(steps + 1), "steps", disable=None):  # the first warms up
        start = now(device)
        take(batch)
        seconds.append(now(device) - start)
    rate = config.batch_size / float(np.median(seconds[1:]))
    print(f"  a step of {config.recipe}, {config.preset}, {device}: {rate:9,.1f} photos a second")


def sampler(items: int, width: int, block: int, batch: int, mode: SamplerMode, seed: int = 0) -> dict[str, float]:
    """Feed one epoch of random features to the sampler, four photos a product, and let it compose the next.

    -> seconds of composing the first, random epoch, and of the grouped one, the most MiB that the process has held so
    far, and how many photos kept a conflict.
    """
    products = np.arange(items) // 4
    start = time.perf_counter()
    grouped = GroupedBatchSampler(items, batch, block, mode, products, products, seed)
    first = time.perf_counter() - start
    generator = torch.Generator().manual_seed(seed)
    seconds = 0.0
    for indices in tqdm(list(grouped), f"{mode} batches of {items:,} photos", unit=" batches", disable=None):
        # a photo and its text look alike, as those of a model in training
        text_feat = torch.randn(len(indices), width, generator=generator)
        image_feat = text_feat + torch.randn(text_feat.shape, generator=generator)
        features = F.normalize(image_feat, dim=1), F.normalize(text_feat, dim=1)
        start = time.perf_counter()
        grouped.collect(torch.tensor(indices), *features)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    grouped.set_epoch(1)
    seconds += time.perf_counter() - start
    cost = {"first": first, "seconds": seconds, "conflicts": grouped.conflicts}
    return cost | {"mib": peak_memory_mib(torch.device("cpu"))}


def samplers(args: argparse.Namespace) -> None:
    """Print `sampler` for each size and mode, and how its time grows: seconds ∝ photos^exponent."""
    print(f"{torch.get_num_threads()} threads; E {args.width}, search block {args.block}, batch {args.batch}")
    for mode in args.mode:
        seconds = []
        for items in args.items:
            cost = sampler(items, args.width, args.block, args.batch, mode)
            seconds.append(cost["seconds"])
            print(f"{items:>9,} photos, {mode:8}: {cost['seconds']:6.1f} s, the random epoch {cost['first']:5.1f} s, "
                  f"process at most {cost['mib']:,.0f} MiB, {cost['conflicts']} conflicts")  # fmt: skip
        if len(set(args.items)) > 1:
            slope = np.polyfit(np.log(args.items), np.log(seconds), 1)[0]
            print(f"{'':9} growth of {mode}: photos to the power of {slope:.2f}")


def number(low: int) -> Callable[[str], int]:
    """For argparse: a whole number of at least `low`."""

    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} on")
        return int(text)

    return parse


def build_parser() -> argparse.ArgumentParser:
    """The command line, but for train.py's flags."""
    parser = argparse.ArgumentParser(
        "benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="{passes,step,data,sampler}")

    def add(name: str, description: str) -> argparse.ArgumentParser:
        defaults = argparse.ArgumentDefaultsHelpFormatter
        return what.add_parser(name, description=description, allow_abbrev=False, formatter_class=defaults)

    more = "; train.py's flags (see its --help) work too, the recipe is albef unless given"
    counts = add("passes", "passes and multiply-adds of each recipe; train.py's flags work too, but for --recipe")
    counts.add_argument("--tokens", type=number(1), default=1, help="pad shorter texts to so many tokens")
    steps = add("step", "a step, for albef beside one from library parts" + more)
    steps.add_argument("--repeats", type=number(1), default=10, help="steps to time")
    photos = add("data", "photos a second through reading, augmentation and a step" + more)
    photos.add_argument("--by-workers", type=number(0), nargs="+", default=[0, 1, 2], help="numbers of workers to try")
    photos.add_argument("--chunk", type=number(1), help="photos in an HDF5 chunk, of a copy of FashionGen's file")
    photos.add_argument("--gzip", type=int, choices=range(10), help="pack them, at this level")
    photos.add_argument("--batches", type=number(1), default=20, help="batches to read")
    photos.add_argument("--steps-timed", type=number(1), default=3, help="steps to time beside it")
    grouped = add("sampler", "seconds, memory and left-over conflicts of composing grouped batches")
    grouped.add_argument("--items", type=number(1), nargs="+", default=[260_000], help="photos of the data set")
    grouped.add_argument("--width", type=number(1), default=256, help="of the features, E")
    grouped.add_argument("--block", type=number(2), default=1920, help="photos of a search block (--search-size)")
    grouped.add_argument("--batch", type=number(1), default=128, help="photos of a batch (--batch-size)")
    modes = get_args(SamplerMode)
    grouped.add_argument("--mode", nargs="+", choices=modes, default=["hard", "semihard"], help="of grouping")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = build_parser()
    args, flags = parser.parse_known_args(argv)
    if args.what == "sampler" and flags:
        parser.error(f"unknown flag {flags[0]}")
    if args.what == "sampler" and args.block <= args.batch:
        parser.error(f"--block {args.block} groups nothing unless it is above --batch")
    try:
        if args.what == "sampler":
            return samplers(args)
        if args.what == "passes":
            if "--recipe" in flags:
                raise ConfigError("--recipe: passes counts all of them")
            return passes(flags, args.tokens)
        config, _ = parse_config([*(["--recipe", "albef"] if "--recipe" not in flags else []), *flags])
        if config.resume:
            raise ConfigError("--resume: nothing is trained here")
        if args.what == "step":
            step(config, args.repeats)
        else:
            packing = args.chunk or args.gzip is not None
            with packed(config, args.chunk or 1, args.gzip) if packing else contextlib.nullcontext(config) as config:
                data(config, args.by_workers, args.batches, args.steps_timed)
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"benchmark.py: {error}")


if __name__ == "__main__":
    main()
