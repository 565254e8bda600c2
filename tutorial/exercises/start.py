"""Eight exercises that check themselves: tutorial/exercises/README.md.

python tutorial/exercises/start.py 3              writes the stub of exercise 3 into tutorial/exercises/mine/ex3.py
python -m pytest tutorial/exercises -k ex3        checks what you wrote there
python tutorial/exercises/start.py 3 --hint       the idea; --hint 2 pseudo-code, --hint 3 where the solution stands
"""

import argparse
import ast
import importlib
import inspect
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tutorial.exercises.catalogue import EXERCISES, file_of

HEAD = '''"""Exercise {number}: README.md. Check it: python -m pytest tutorial/exercises -k ex{number}"""

from __future__ import annotations

import torch
from torch import Tensor
'''


def stub(number: int) -> str:
    """Write the signatures and docstrings of an exercise, and as comments the functions to read."""
    exercise = EXERCISES[number]
    text = HEAD.format(number=number)
    if exercise.read:
        text += f"\nfrom {exercise.module} import {', '.join(exercise.read)}\n"
    for function in exercise.solution().values():
        source = inspect.getsource(function)
        docstring = ast.parse(source).body[0].body[0]
        head = source.splitlines()[: docstring.end_lineno]
        text += "\n\n" + "\n".join(head) + "\n    raise NotImplementedError\n"
    if exercise.read:
        text += "\n\n# To read; do not open the file that it is from, the solution stands beside it.\n"
    for name in exercise.read:
        source = inspect.getsource(getattr(importlib.import_module(exercise.module), name))
        text += "#\n" + textwrap.indent(source, "# ")
    return text


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("start.py", description=__doc__.split("\n")[0])
    parser.add_argument("number", type=int, choices=EXERCISES, metavar="N", help=f"exercise, 1 to {len(EXERCISES)}")
    parser.add_argument("--hint", type=int, nargs="?", const=1, choices=(1, 2, 3), help="idea, pseudo-code, place")
    args = parser.parse_args(argv)
    if args.hint:
        hints = Path(__file__).with_name("hints.md").read_text().split("\n## ")
        print(next(text for text in hints if text.startswith(f"{args.number}.{args.hint} ")).strip())
        return
    path = file_of(args.number)
    if path.exists():
        sys.exit(f"start.py: {path} is there already; delete it to begin anew")
    path.parent.mkdir(exist_ok=True)
    path.write_text(stub(args.number))
    exercise = EXERCISES[args.number]
    print(f"{path}: write {', '.join(exercise.write)}; then python -m pytest tutorial/exercises -k ex{args.number}")
    print(f"Leave {exercise.module}.py closed: the solution is there.")


if __name__ == "__main__":
    main()
