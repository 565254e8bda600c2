"""Compare two pretraining runs: their final metrics and the differences.

python tutorial/exercises/compare.py runs/A runs/B [METRIC …]      only these metrics, for example photo_gain_detail
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from engine.log import final_metrics


def main(argv: list[str] | None = None) -> None:
    """Print a Markdown table: metric, both runs, B minus A."""
    parser = argparse.ArgumentParser("compare.py", description=__doc__.split("\n")[0])
    parser.add_argument("run_a", type=Path)
    parser.add_argument("run_b", type=Path)
    parser.add_argument("metrics", nargs="*", help="only these (default: all)")
    args = parser.parse_args(argv)
    a, b = final_metrics(args.run_a), final_metrics(args.run_b)
    if not (a and b):
        sys.exit(f"compare.py: {args.run_b if a else args.run_a}: the run is not there, or not finished")
    keys = args.metrics or [key for key in a if key in b and isinstance(a[key], float)]
    for key in keys:
        if key not in a or key not in b:
            sys.exit(f"compare.py: {key}: not among the metrics of both runs")
    print(f"| metric | {args.run_a.name} | {args.run_b.name} | difference |\n|---|---|---|---|")
    for key in keys:
        print(f"| {key} | {a[key]:.4g} | {b[key]:.4g} | {b[key] - a[key]:+.4g} |")


if __name__ == "__main__":
    main()
