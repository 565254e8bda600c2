"""Begin an exercise, or show a hint. The exercises: tutorial/exercises/README.md.

python tutorial/exercises/start.py 3            # writes the stub of exercise 3, tutorial/exercises/mine/ex3.py
python -m pytest tutorial/exercises -k ex3      # checks what you wrote there
python tutorial/exercises/start.py 3 --hint     # the idea; --hint 2: pseudo-code; --hint 3: the solution's place
"""

import ast
import importlib
import inspect
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.flags import OneLineParser, in_one_line
from engine.log import write_text
from tutorial.exercises.catalogue import EXERCISES, stub_path

HEAD = '''"""Exercise {number} of tutorial/exercises/README.md.

Check it:   python -m pytest tutorial/exercises -k ex{number}
Get a hint: python tutorial/exercises/start.py {number} --hint
"""

from __future__ import annotations

import torch
from torch import Tensor
'''
TO_READ = "# Read these functions here. Do not open {module}.py: the solution is there, too."


def build_stub(number: int) -> str:
    """Build the text of a stub: the signatures and docstrings to complete, then the functions to read as comments."""
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
        text += "\n\n" + TO_READ.format(module=exercise.module) + "\n"
    for name in exercise.read:
        source = inspect.getsource(getattr(importlib.import_module(exercise.module), name))
        commented = textwrap.indent("\n" + source, "# ", lambda line: True)
        text += "\n".join(line.rstrip() for line in commented.splitlines()) + "\n"
    return text


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Exits with a message where the stub exists already."""
    parser = OneLineParser("start.py", description=__doc__.split("\n")[0])
    parser.add_argument("number", type=int, choices=EXERCISES, metavar="N", help=f"exercise, 1 to {len(EXERCISES)}")
    levels = "show a hint: 1 the idea (default), 2 pseudo-code, 3 the solution's place"
    parser.add_argument("--hint", type=int, nargs="?", const=1, choices=(1, 2, 3), help=levels)
    args = parser.parse_args(argv)
    if args.hint:
        hints = Path(__file__).with_name("hints.md").read_text(encoding="utf-8").split("\n## ")
        print(next(hint for hint in hints if hint.startswith(f"{args.number}.{args.hint} ")).strip())
        return
    path = stub_path(args.number)
    if path.exists():
        sys.exit(f"start.py: {path} exists already; delete it to begin anew")
    try:
        path.parent.mkdir(exist_ok=True)
        write_text(path, build_stub(args.number))
    except OSError as error:
        sys.exit(f"start.py: {in_one_line(error)}; work in a copy of the project that you may write to")
    exercise = EXERCISES[args.number]
    print(f"{path}: write {', '.join(exercise.write)}; then python -m pytest tutorial/exercises -k ex{args.number}")
    print(f"Do not open {exercise.module}.py: the solution is there.")


if __name__ == "__main__":
    main()
