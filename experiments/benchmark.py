"""What a training step costs, measured on one machine.

python experiments/benchmark.py step --recipe syncmask   time by phase, memory, share of a matrix product's rate
python experiments/benchmark.py passes                   images and captions that pass each part of the model in a step

Both take the flags of train.py: --preset, --recipe, --batch-size, --device, --precision, --compile, …
"""

import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import Collate, build_dataset, build_tokenizer, to_device
from engine.batches import augmented
from engine.config import MAX_GRAD_NORM, TrainConfig, parse_config
from engine.flags import ConfigError, OneLineParser
from engine.host import peak_memory_mib
from engine.run import Run, autocast, build_run
from readers.dataset import DataError
from train import RECIPES


def open_run(config: TrainConfig) -> tuple[Run, list[dict]]:
    """Build a run past its warm-ups, and the items of one batch of synthetic products."""
    where = config.model.image_size, config.seed, 2 + config.batch_size // 3
    dataset = build_dataset("synthetic", None, "train", *where)
    dataset.prompts, dataset.truths = config.prompts, "true" in (config.patch_mask, config.word_mask)
    captions = [" ".join(dataset.text(row)[1::2]) for row in range(len(dataset))]
    sizes = config.model.vocab_size, config.model.max_length
    tokenizer = build_tokenizer(captions, *sizes, config.vocab, config.prompts)
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
    config, times = run.config, [now(run.device)]
    batch = augmented(run, to_device(Collate(run.tokenizer)(items), run.device))
    times.append(now(run.device))
    with autocast(run):
        losses, _ = RECIPES[config.recipe](run, batch)
    times.append(now(run.device))
    sum(losses.values()).backward()
    times.append(now(run.device))
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRAD_NORM)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.model.clamp_temp()
    run.momentum.update(run.model)
    times.append(now(run.device))
    phases = ("data", "forward", "backward", "update")
    return {phase: end - start for phase, start, end in zip(phases, times, times[1:], strict=False)}


def ceiling(run: Run, size: int = 4096, repeats: int = 5) -> float:
    """Measure the multiply-adds a second of a large matrix product in the run's precision: the most to hope for."""
    dtype = torch.bfloat16 if run.config.precision == "bf16" else torch.float32
    a = torch.randn(size, size, device=run.device, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        start = now(run.device)
        a @ a
        seconds.append(now(run.device) - start)
    return size**3 / min(seconds)


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
    peak = peak_memory_mib(run.device)  # before anything else is in memory
    eager, plain = torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH)  # or some are not counted
    with eager, plain, FlopCounterMode(display=False) as flops:
        take_step(run, items)
    rate, top = flops.get_total_flops() / 2 / total, ceiling(run)
    print(f"{config.recipe}, {config.preset}, batch {config.batch_size}, {run.config.precision}, {run.device}")
    print(f"medians of {repeats} steps: {total:.3f} s a step, {config.batch_size / total:.1f} images a second")
    print("  " + ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in medians.items()))
    print(f"  at most {peak:,.0f} MiB" if peak else "  memory is not known on this system")
    print(f"  {rate / 1e9:,.1f} G multiply-adds a second, {100 * rate / top:.0f} % of a large matrix product")


def count_passes(run: Run, items: list[dict]) -> dict[str, float]:
    """Count what passes each part of the model, and of the momentum model (…_m), per pair of a step."""
    counts = Counter()
    hooks = []
    for model, suffix in ((run.model, ""), (run.momentum.model, "_m")):
        for part in ("vision", "text", "fusion", "decoder"):

            def count(_module, args, key=part + suffix):
                counts[key] += len(args[0]) / len(items)

            hooks.append(getattr(model, part).register_forward_pre_hook(count))
    take_step(run, items)
    for hook in hooks:
        hook.remove()
    return dict(counts)


def print_passes(flags: list[str]) -> None:
    """Print `count_passes` of all recipes; an image counts as one even where few of its patches pass."""
    for recipe in RECIPES:
        counts = count_passes(*open_run(parse_config([*flags, "--recipe", recipe])[0]))
        print(f"{recipe}: " + ", ".join(f"{part} {count:g}" for part, count in counts.items()))


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = OneLineParser("benchmark.py", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["step", "passes"])
    parser.add_argument("--repeats", type=int, default=10, help="steps to time (default 10)")
    args, flags = parser.parse_known_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: at least 1")
    if unread := {"--data", "--root", "--weights"} & set(flags):
        parser.error(f"{min(unread)}: steps are taken on synthetic images, from random weights")
    try:
        if args.what == "step":
            time_steps(parse_config(flags)[0], args.repeats)
        else:
            print_passes(flags)
    except (ConfigError, DataError, OSError) as error:
        sys.exit(f"benchmark.py: {error}")


if __name__ == "__main__":
    main()
