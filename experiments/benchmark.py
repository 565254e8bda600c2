"""The cost of a training step on this machine.

python experiments/benchmark.py step --recipe syncmask   time by phase, peak memory
python experiments/benchmark.py passes                   inputs of each part of the model per pair of a batch
python experiments/benchmark.py operations               floating-point operations per pair of a batch

All take the flags of train.py: --preset, --recipe, --batch-size, --device, --precision, --compile, …
"""

import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import build_dataset, informative_pieces, to_device
from engine.batches import augmented, learn_vocabulary
from engine.config import MAX_GRAD_NORM, TrainConfig, parse_config
from engine.flags import ConfigError, OneLineParser, in_one_line
from engine.log import peak_memory_mib
from engine.run import Run, autocast, build_run
from readers.dataset import DataError
from train import RECIPES

PARTS = ("vision", "text", "fusion", "decoder")
MEASURES = {  # what to measure -> help
    "step": "step: time by phase, and memory",
    "passes": "passes: inputs of each part of the model",
    "operations": "operations: floating-point operations",
}


def open_run(config: TrainConfig) -> tuple[Run, list[dict]]:
    """Build a run whose step lies beyond all warm-ups, and the items of one batch of synthetic products.

    Raises ConfigError or DataError for flags that do not fit.
    """
    products = 2 + config.batch_size // 3
    dataset = build_dataset("synthetic", None, "train", config.model.image_size, config.seed, products)
    dataset.prompts = config.prompts
    dataset.with_ground_truth = "oracle" in (config.patch_mask, config.word_mask)
    tokenizer = learn_vocabulary(config, dataset)
    # synthetic captions have only a few hundred words; unused ones bring the vocabulary to its full size
    unused = config.model.vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"[unused{i}]" for i in range(unused)])
    run = build_run(config, dataset, tokenizer)
    run.informative = informative_pieces(tokenizer, dataset.captions)
    run.step = 10**9  # after all warm-ups
    run.generator = torch.Generator(run.device).manual_seed(config.seed)
    rows = np.random.default_rng(config.seed).permutation(len(dataset))[: config.batch_size]
    return run, [dataset[int(row)] for row in rows]


def synchronized_time(device: torch.device) -> float:
    """Wait until the device has finished its work. -> the time in seconds"""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_step(run: Run, items: list[dict]) -> dict[str, float]:
    """Take one step as the loop of train.py does. -> seconds by phase"""
    start = synchronized_time(run.device)
    batch = augmented(run, to_device(run.collate(items), run.device))
    loaded = synchronized_time(run.device)
    with autocast(run):
        losses, _ = RECIPES[run.config.recipe](run, batch)
    forward_done = synchronized_time(run.device)
    sum(losses.values()).backward()
    backward_done = synchronized_time(run.device)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRAD_NORM)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.model.clamp_temp()
    run.momentum.update(run.model, run.config.ema_decay)
    return {
        "data": loaded - start,
        "forward": forward_done - loaded,
        "backward": backward_done - forward_done,
        "update": synchronized_time(run.device) - backward_done,
    }


def time_steps(config: TrainConfig, repeats: int) -> None:
    """Print the median time of some steps by phase, and the peak memory. Raises as `open_run`."""
    run, items = open_run(config)
    seconds_by_phase = defaultdict(list)
    for number in tqdm(range(repeats + 2), "steps", leave=False, disable=None):
        for phase, seconds in take_step(run, items).items():
            if number >= 2:  # the first two warm up
                seconds_by_phase[phase].append(seconds)
    medians = {phase: float(np.median(seconds)) for phase, seconds in seconds_by_phase.items()}
    total = sum(medians.values())
    print(f"{config.recipe}, {config.preset}, batch {config.batch_size}, {run.config.precision}, {run.device}")
    print(f"median of {repeats} steps: {total:.3f} s per step, {config.batch_size / total:.1f} images per second")
    print("  " + ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in medians.items()))
    memory = peak_memory_mib(run.device)
    if memory:
        print(f"  peak memory {memory:,.0f} MiB")


def count_passes(run: Run, items: list[dict]) -> dict[str, float]:
    """Count the pairs, images or captions that pass each part of the model in a step, per pair of the batch.

    No pair keeps random masks here, since such a pair passes the momentum model less often.
    -> part -> inputs per pair; parts of the momentum model end with _m
    """
    run.config = replace(run.config, random_mask_prob=0.0)
    counts = Counter()

    def count_outputs(module, inputs, output, key):
        tokens = output[0] if isinstance(output, tuple) else output  # fusion may also return its attention
        counts[key] += len(tokens) / len(items)

    for model, suffix in ((run.model, ""), (run.momentum.model, "_m")):
        for part in PARTS:
            getattr(model, part).register_forward_hook(partial(count_outputs, key=part + suffix))
    take_step(run, items)
    return dict(counts)


def print_passes(flags: list[str]) -> None:
    """Print a Markdown table of `count_passes` for all recipes. An image counts as one even if few patches pass.

    flags: of train.py
    Raises ConfigError or DataError for flags that do not fit.
    """
    columns = [*PARTS, "vision_m", "text_m", "fusion_m"]
    print("| recipe | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for recipe in RECIPES:
        config, _ = parse_config([*flags, "--recipe", recipe])
        run, items = open_run(config)
        counts = count_passes(run, items)
        cells = [f"{counts.get(column, 0):g}" for column in columns]
        print(f"| {recipe} | " + " | ".join(cells) + " |")


def print_operations(flags: list[str]) -> None:
    """Print a Markdown table of the operations of a step, forward and backward, per pair of the batch.

    A multiply-add of a matrix product counts as two operations; other operations are not counted.
    flags: of train.py
    Raises ConfigError or DataError for flags that do not fit.
    """
    print("| recipe | preset | GFLOP per pair |\n|---|---|---|")
    for recipe in RECIPES:
        config, _ = parse_config([*flags, "--recipe", recipe])
        run, items = open_run(config)
        # plain attention, since the counter does not know the fused attention of a CPU
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as operations:
            take_step(run, items)
        print(f"| {recipe} | {config.preset} | {operations.get_total_flops() / len(items) / 1e9:.3g} |")


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Errors end the process with one line."""
    description = "Measure the cost of a training step on this machine. Other flags are those of train.py."
    parser = OneLineParser("benchmark.py", description=description)
    parser.add_argument("measure", choices=MEASURES, help="; ".join(MEASURES.values()))
    parser.add_argument("--repeats", type=int, default=10, help="number of steps to time (default 10)")
    args, flags = parser.parse_known_args(argv)
    try:
        if args.measure == "step":
            config, _ = parse_config(flags)
            time_steps(config, args.repeats)
        elif args.measure == "passes":
            print_passes(flags)
        else:
            print_operations(flags)
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"benchmark.py: {in_one_line(error)}")


if __name__ == "__main__":
    main()
