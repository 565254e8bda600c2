"""Eight exercises that check themselves: tutorial/exercises/README.md.

python tutorial/exercises/start.py 3              writes the stub of exercise 3 into tutorial/exercises/mine/ex3.py
python -m pytest tutorial/exercises -k ex3        checks what you wrote there
python tutorial/exercises/start.py 3 --hint       the idea; --hint 2 pseudo-code, --hint 3 where the solution stands
"""

import argparse
import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engine.flags import OneLineParser
from tutorial.exercises import catalogue
from tutorial.exercises.catalogue import EXERCISES, HELPERS, file_of, named

HEAD = '''"""Exercise {number}: README.md. Check it: python -m pytest tutorial/exercises -k ex{number}"""

from __future__ import annotations

import torch
from torch import Tensor

{given}
'''


def stub(number: int) -> str:
    """Signature and docstring of the real functions, and nothing in them; below, as comments, what is to be read."""
    parts = [HEAD.format(number=number, given=HELPERS.get(number, "")).rstrip() + "\n"]
    for function in EXERCISES[number].solution.values():
        source = textwrap.dedent(inspect.getsource(function))
        docstring = ast.parse(source).body[0].body[0]
        parts.append("\n".join(source.splitlines()[: docstring.end_lineno]) + "\n    raise NotImplementedError\n")
    if reads := EXERCISES[number].reads:
        parts.append("# To read; do not open the file that it is from, the solution stands beside it.")
        sources = "\n\n".join(map(inspect.getsource, named(reads).values()))
        parts.append(textwrap.indent(sources, "# ", lambda line: True).replace("# \n", "#\n"))
    return "\n\n".join(parts)


def hint(number: int, level: int) -> str:
    """The text under its heading in hints.md."""
    text = (Path(__file__).parent / "hints.md").read_text()
    return re.search(rf"^## {number}\.{level} .*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[0].strip()


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = OneLineParser("start.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, choices=EXERCISES, metavar="N", help=f"exercise, 1 to {len(EXERCISES)}")
    parser.add_argument("--again", action="store_true", help="write the stub anew, over what you wrote")
    parser.add_argument("--hint", type=int, nargs="?", const=1, choices=(1, 2, 3), help="idea, pseudo-code, place")
    args = parser.parse_args(argv)
    if args.hint:
        print(hint(args.number, args.hint))
        return
    path = file_of(args.number)
    if path.exists() and not args.again:
        sys.exit(f"start.py: {path} is there already; --again writes the stub over it")
    catalogue.MINE.mkdir(exist_ok=True)
    path.write_text(stub(args.number))
    exercise = EXERCISES[args.number]
    names = ", ".join(exercise.solution)
    print(f"{path}: write {names}; then python -m pytest tutorial/exercises -k ex{args.number}")
    files = sorted({path.rsplit(".", 1)[0].replace(".", "/") + ".py" for path in exercise.solves})
    shown = " What is to be read of it stands in the stub." if exercise.reads else ""
    print(f"Leave {' and '.join(files)} closed: the solution is there.{shown}")


if __name__ == "__main__":
    main()
