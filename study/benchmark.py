"""What things cost.

python study/benchmark.py sampler                     composing one epoch of grouped batches for 260,000 photos
"""

import argparse
import sys
import time
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sampler import GroupedBatchSampler, SamplerMode
from train import peak_memory_mib


def sampler(items: int, width: int, block: int, batch: int, mode: SamplerMode, seed: int = 0) -> dict[str, float]:
    """Feed one epoch of random features to the sampler, four photos a product, and let it compose the next.

    -> seconds of composing, the most MiB that the process has held so far, and how many photos kept a conflict.
    """
    products = np.arange(items) // 4
    grouped = GroupedBatchSampler(items, batch, block, mode, products, products, seed)
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
    return {"seconds": seconds, "mib": peak_memory_mib(torch.device("cpu")), "conflicts": grouped.conflicts}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmark.py", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["sampler"])
    parser.add_argument("--items", type=int, nargs="+", default=[260_000], help="photos of the data set")
    parser.add_argument("--width", type=int, default=256, help="of the features, E")
    parser.add_argument("--block", type=int, default=1920, help="photos of a search block")
    parser.add_argument("--batch", type=int, default=128, help="photos of a batch")
    parser.add_argument("--mode", nargs="+", choices=get_args(SamplerMode), default=["hard", "semihard"])
    args = parser.parse_args(argv)
    if min(*args.items, args.width, args.block, args.batch) < 1:
        parser.error("--items, --width, --block and --batch: at least 1")
    print(f"{torch.get_num_threads()} threads; E {args.width}, search block {args.block}, batch {args.batch}")
    for items in args.items:
        for mode in args.mode:
            cost = sampler(items, args.width, args.block, args.batch, mode)
            print(f"{items:>9,} photos, {mode:8}: {cost['seconds']:6.1f} s, process at most "
                  f"{cost['mib']:,.0f} MiB, {cost['conflicts']} conflicts")  # fmt: skip


if __name__ == "__main__":
    main()
