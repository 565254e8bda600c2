"""What a training step costs, measured on one machine.

python experiments/benchmark.py step --recipe syncmask   time by phase, memory
python experiments/benchmark.py passes                   images and captions that pass each part of the model in a step

Both take the flags of train.py: --preset, --recipe, --batch-size, --device, --precision, --compile, …
"""

import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from tqdm import tqdm

from data import build_dataset, to_device
from engine.batches import augmented, learn_vocabulary
from engine.config import MAX_GRAD_NORM, TrainConfig, parse_config
from engine.flags import ConfigError, OneLineParser
from engine.log import peak_memory_mib
from engine.run import Run, autocast, build_run
from readers.dataset import DataError
from train import RECIPES

PARTS = ("vision", "text", "fusion", "decoder")


def open_run(config: TrainConfig) -> tuple[Run, list[dict]]:
    """Build a run past its warm-ups, and the items of one batch of synthetic products."""
    products = 2 + config.batch_size // 3
    dataset = build_dataset("synthetic", None, "train", config.model.image_size, config.seed, products)
    dataset.prompts = config.prompts
    dataset.with_ground_truth = "oracle" in (config.patch_mask, config.word_mask)
    tokenizer = learn_vocabulary(config, dataset)
    unused = config.model.vocab_size - tokenizer.get_vocab_size()  # synthetic captions have a few hundred words only
    tokenizer.add_tokens([f"[unused{i}]" for i in range(unused)])
    run = build_run(config, dataset, tokenizer)
    run.step = 10**9
    run.generator = torch.Generator(run.device).manual_seed(config.seed)
    rows = np.random.default_rng(config.seed).permutation(len(dataset))[: config.batch_size]
    return run, [dataset[int(row)] for row in rows]


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_step(run: Run, items: list[dict]) -> dict[str, float]:
    """Take one step as the loop of train.py does. -> seconds by phase."""
    start = now(run.device)
    batch = augmented(run, to_device(run.collate(items), run.device))
    loaded = now(run.device)
    with autocast(run):
        losses, _ = RECIPES[run.config.recipe](run, batch)
    computed = now(run.device)
    sum(losses.values()).backward()
    differentiated = now(run.device)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRAD_NORM)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.model.clamp_temp()
    run.momentum.update(run.model, run.config.ema_decay)
    return {
        "data": loaded - start,
        "forward": computed - loaded,
        "backward": differentiated - computed,
        "update": now(run.device) - differentiated,
    }


def time_steps(config: TrainConfig, repeats: int) -> None:
    """Print medians of some steps."""
    run, items = open_run(config)
    phases = defaultdict(list)
    for number in tqdm(range(repeats + 2), "steps", leave=False, disable=None):
        for phase, seconds in take_step(run, items).items():
            if number >= 2:  # the first two warm up
                phases[phase].append(seconds)
    medians = {phase: float(np.median(times)) for phase, times in phases.items()}
    total = sum(medians.values())
    print(f"{config.recipe}, {config.preset}, batch {config.batch_size}, {run.config.precision}, {run.device}")
    print(f"medians of {repeats} steps: {total:.3f} s a step, {config.batch_size / total:.1f} images a second")
    print("  " + ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in medians.items()))
    if peak := peak_memory_mib(run.device):
        print(f"  at most {peak:,.0f} MiB")


def count_passes(run: Run, items: list[dict]) -> dict[str, float]:
    """Count what passes each part of the model, and of the momentum model (…_m), per pair of a step.

    No pair keeps random masks here, since a pair that does passes the momentum model less often.
    """
    run.config = replace(run.config, random_mask_prob=0.0)
    counts = Counter()
    for model, suffix in ((run.model, ""), (run.momentum.model, "_m")):
        for part in PARTS:

            def count(_module, _inputs, output, key=part + suffix):
                tokens = output[0] if isinstance(output, tuple) else output  # fusion may also put out its attention
                counts[key] += len(tokens) / len(items)

            getattr(model, part).register_forward_hook(count)
    take_step(run, items)
    return dict(counts)


def print_passes(flags: list[str]) -> None:
    """Print `count_passes` of all recipes; an image counts as one even where few of its patches pass."""
    columns = [*PARTS, *(f"{part}_m" for part in PARTS[:-1])]
    print("| recipe | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for recipe in RECIPES:
        counts = count_passes(*open_run(parse_config([*flags, "--recipe", recipe])[0]))
        print(f"| {recipe} | " + " | ".join(f"{counts.get(column, 0):g}" for column in columns) + " |")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = OneLineParser("benchmark.py", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["step", "passes"])
    parser.add_argument("--repeats", type=int, default=10, help="steps to time (default 10)")
    args, flags = parser.parse_known_args(argv)
    try:
        if args.what == "step":
            time_steps(parse_config(flags)[0], args.repeats)
        else:
            print_passes(flags)
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"benchmark.py: {error}")


if __name__ == "__main__":
    main()
