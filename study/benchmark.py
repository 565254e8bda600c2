"""What things cost, each measured in one run on one machine.

python study/benchmark.py passes                      encoder passes and multiply-adds of a step, by recipe, counted
python study/benchmark.py step [--preset base …]      a step of albef beside one put together from library parts
python study/benchmark.py step --against DIR …        the same beside the step of another checkout of this project
python study/benchmark.py profile --recipe R          the ten dearest operations of a step, and a trace to look at
python study/benchmark.py attention                   the fused kernel beside plain products, fp32 and bf16
python study/benchmark.py data [--data jsonl …]       photos a second through decoding and augmentation, by workers
python study/benchmark.py sampler                     composing one epoch of grouped batches for 260,000 photos

All but the last and attention take train.py's flags too: --preset, --recipe, --batch-size, --device, --precision, …
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Collate, augment, build_dataset, build_tokenizer, random_crops, to_device
from harness.config import TrainConfig, parse_config
from harness.flags import ConfigError
from harness.host import peak_memory_mib
from harness.run import Run
from masking import random_word_mask
from photos.dataset import DataError
from photos.fashiongen import FashionGen
from sampler import GroupedBatchSampler, SamplerMode
from study.steps import count_step, counted, now, open_step, our_step, reference_step
from train import RECIPES


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


ELSEWHERE = """
import os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "study")]
import benchmark
from harness.config import parse_config
run, batches = benchmark.open_step(parse_config(sys.argv[1:])[0], 2)
take = benchmark.our_step(run, {})
for number, _ in enumerate(sys.stdin):
    take(batches[number % 2])
    print("done", file=answers, flush=True)
"""


@contextlib.contextmanager
def step_of(folder: Path, config: TrainConfig, flags: list[str]) -> Iterator[Callable[[dict], None]]:
    """The step of another checkout of this project, in a process of its own, on the same photos and texts: a function
    that has it take one."""
    if not (folder / "study" / "benchmark.py").exists():
        raise ConfigError(f"--against {folder}: no checkout of this project")
    command = [sys.executable, "-c", ELSEWHERE, *flags, "--queue", str(config.queue)]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        ) as other,
    ):

        def take(_batch: dict) -> None:
            """A step of the other checkout, on a batch of its own."""
            try:
                print(file=other.stdin, flush=True)
                answer = other.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                said.seek(0)
                raise ConfigError(f"--against {folder}: {[*said.read().splitlines(), 'it ended'][-2:][0]}")

        try:
            yield take
        finally:
            other.kill()


def step(config: TrainConfig, repeats: int, others: dict[str, Callable[[dict], None]]) -> None:
    """Time our step, for albef the reference's, and any `others`, turn about; print medians, their ratio and where time
    goes. Without the queue, which the reference does not have."""
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
    steps |= others
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
        made = f"; {work[name]:,.0f} M multiply-adds a photo" if name in work else ""
        print(f"  {name:20} {median:8.3f} s a step, {size / median:8.1f} photos a second, "
              f"{median / medians['ours']:.2f} x ours{made}")  # fmt: skip
    parts = ", ".join(f"{phase} {np.median(times[2:]):.3f} s" for phase, times in phases.items())
    rate = counts["step"] * 1e6 * size / medians["ours"]
    print(f"  ours: {parts}; at most {peak:,.0f} MiB")
    print(f"  ours: {rate / 1e9:,.1f} G multiply-adds a second, {100 * rate / top:.0f} % of the {top / 1e9:,.1f} G of "
          f"a {side} x {side} matrix product")  # fmt: skip


def profile(config: TrainConfig, steps: int, out: Path) -> None:
    """Print the ten operations that a step spends most in, and write a trace of some steps."""
    run, batches = open_step(config, 2)
    take = our_step(run, {})
    for batch in batches:  # warms up
        take(batch)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (run.device.type == "cuda")
    with torch.profiler.profile(activities=activities) as trace:
        for number in tqdm(range(steps), "profiling", unit=" steps", leave=False, disable=None):
            take(batches[number % 2])
    host = run.device.type == "cpu"
    spent = lambda line: line.self_cpu_time_total if host else line.self_device_time_total
    lines = sorted(trace.key_averages(), key=spent, reverse=True)
    total = sum(map(spent, lines))
    print(f"{config.recipe}, {config.preset}, batch {config.batch_size}, {run.config.precision}, {run.device}: "
          f"{total / steps / 1e6:.3f} s of operations a step")  # fmt: skip
    for line in lines[:10]:
        print(f"  {100 * spent(line) / total:5.1f} %  {spent(line) / steps / 1e3:8.1f} ms in "
              f"{line.count / steps:6.0f} calls  {line.key[:80]}")  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(out))
    print(f"see {out}: open it at ui.perfetto.dev or chrome://tracing")


ATTENTIONS = {  # texts or photos, heads, queries, keys, width of a head
    "tiny, ViT": (64, 4, 69, 69, 32),
    "tiny, text to photo": (192, 4, 41, 64, 32),
    "base, ViT": (4, 12, 257, 257, 64),
    "base, text to photo": (12, 12, 80, 257, 64),
    "384 pixels": (2, 12, 577, 577, 64),
}


def attentions(repeats: int) -> None:
    """Print milliseconds of the fused kernel and of plain products (see `model.Attention`), forward and in all."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v

    def milliseconds(do: Callable) -> float:
        do()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            do()
            times.append(time.perf_counter() - start)
        return 1e3 * float(np.median(times))

    forms = [(dtype, form) for dtype in (torch.float32, torch.bfloat16) for form in ("fused", "plain")]
    print(f"{torch.get_num_threads()} threads; forward / forward and backward, milliseconds")
    print("| shape | " + " | ".join(f"{form} {str(dtype)[6:]}" for dtype, form in forms) + " |\n" + "|---" * 5 + "|")
    for name, (rows, heads, queries, keys, width) in tqdm(ATTENTIONS.items(), leave=False, disable=None):
        cells = []
        for dtype, form in forms:
            # heads lie side by side, as linear layers leave them
            q, k, v = (torch.randn(rows, n, heads, width, dtype=dtype).transpose(1, 2).requires_grad_()
                       for n in (queries, keys, keys))  # fmt: skip
            attend = F.scaled_dot_product_attention if form == "fused" else plain
            with torch.no_grad():
                forward = milliseconds(lambda attend=attend, q=q, k=k, v=v: attend(q, k, v))
            whole = milliseconds(lambda attend=attend, q=q, k=k, v=v: attend(q, k, v).sum().backward())
            cells.append(f"{forward:.1f} / {whole:.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |")


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
        crops = random_crops(len(images), config.crop_scale, generator, config.distort, device)
        augment(images, crops, generator, config.distort)
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
    """Feed one epoch of random features to the sampler, four photos a product, and let it compose the next; its thread
    is waited for after each batch.

    -> seconds of composing the first, random epoch, of chaining the grouped one and of cutting it into batches, the
    most MiB that the process has held so far, and how many photos kept a conflict.
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
        wait(grouped._chaining)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    grouped._chain_pool()  # the last one, which is not full
    wait(grouped._chaining)
    seconds, start = seconds + time.perf_counter() - start, time.perf_counter()
    grouped.set_epoch(1)
    cut = time.perf_counter() - start
    cost = {"first": first, "seconds": seconds, "cut": cut, "conflicts": grouped.conflicts}
    return cost | {"mib": peak_memory_mib(torch.device("cpu"))}


def samplers(args: argparse.Namespace) -> None:
    """Print `sampler` for each size and mode, and how its time grows: seconds ∝ photos^exponent."""
    print(f"{torch.get_num_threads()} threads; E {args.width}, search block {args.block}, batch {args.batch}")
    for mode in args.mode:
        seconds = []
        for items in args.items:
            cost = sampler(items, args.width, args.block, args.batch, mode)
            seconds.append(cost["seconds"])
            print(f"{items:>9,} photos, {mode:8}: chained in {cost['seconds']:6.1f} s, cut in {cost['cut']:5.1f} s, "
                  f"the random epoch {cost['first']:5.1f} s, process at most {cost['mib']:,.0f} MiB, "
                  f"{cost['conflicts']} conflicts")  # fmt: skip
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
    what = parser.add_subparsers(dest="what", required=True, metavar="{passes,step,profile,attention,data,sampler}")

    def add(name: str, description: str) -> argparse.ArgumentParser:
        defaults = argparse.ArgumentDefaultsHelpFormatter
        return what.add_parser(name, description=description, allow_abbrev=False, formatter_class=defaults)

    more = "; train.py's flags (see its --help) work too, the recipe is albef unless given"
    counts = add("passes", "passes and multiply-adds of each recipe; train.py's flags work too, but for --recipe")
    counts.add_argument("--tokens", type=number(1), default=1, help="pad shorter texts to so many tokens")
    steps = add("step", "a step, for albef beside one from library parts" + more)
    steps.add_argument("--repeats", type=number(1), default=10, help="steps to time")
    steps.add_argument("--against", type=Path, help="another checkout of this project, whose step is timed too")
    dearest = add("profile", "the dearest operations of a step, and a trace" + more)
    dearest.add_argument("--steps-traced", type=number(1), default=4, help="steps in the trace")
    dearest.add_argument("--trace", type=Path, default=Path("runs/trace.json"), help="where to write it")
    kernels = add("attention", "the fused kernel of attention beside plain products, on this CPU")
    kernels.add_argument("--repeats", type=number(1), default=9, help="times that each is done")
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
    if args.what in ("sampler", "attention") and flags:
        parser.error(f"unknown flag {flags[0]}")
    if args.what == "sampler" and args.block <= args.batch:
        parser.error(f"--block {args.block} groups nothing unless it is above --batch")
    try:
        if args.what == "sampler":
            return samplers(args)
        if args.what == "attention":
            return attentions(args.repeats)
        if args.what == "passes":
            if "--recipe" in flags:
                raise ConfigError("--recipe: passes counts all of them")
            return passes(flags, args.tokens)
        flags = [*(["--recipe", "albef"] if "--recipe" not in flags else []), *flags]
        config, _ = parse_config(flags)
        if config.resume:
            raise ConfigError("--resume: nothing is trained here")
        with contextlib.ExitStack() as stack:
            if args.what == "step":
                config, others = replace(config, queue=0), {}
                if args.against:
                    others[str(args.against)] = stack.enter_context(step_of(args.against, config, flags))
                step(config, args.repeats, others)
            elif args.what == "profile":
                profile(config, args.steps_traced, args.trace)
            else:
                if args.chunk or args.gzip is not None:
                    config = stack.enter_context(packed(config, args.chunk or 1, args.gzip))
                data(config, args.by_workers, args.batches, args.steps_timed)
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"benchmark.py: {error}")


if __name__ == "__main__":
    main()
