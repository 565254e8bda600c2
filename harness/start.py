"""Imported before anything else by what is run: while libraries load, which takes seconds, Ctrl-C ends the program
without a traceback. `main` then takes the signal back."""

import signal
import sys
from pathlib import Path

if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent.parent:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
