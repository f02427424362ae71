"""The command line: types of numeric flags, and what surrounds every main.

argparse refuses a value that cannot work, by its flag, with exit code 2:

    add("--batch", type=flags.whole(1))                       1, 2, 3 ...
    add("--cap", type=flags.whole(0))                         a count, 0 included
    add("--distance", type=flags.whole(0, 64))                a bounded count
    add("--jaccard", type=flags.number(0, 1))                 0 <= x <= 1
    add("--top-p", type=flags.number(above=0, high=1))        0 < x <= 1

A range is the widest that the code behind the flag handles. Ranges that several scripts share stand
below. A condition on several values of one flag is checked after parse_args, with parser.error.

`run_script(main)` ends every script: a mistake of the user becomes one paragraph and exit code 1, a
fault of ours a traceback. With --debug everything is a traceback.

Where we depart from the paper, or it is silent: it has no command line. All of this is ours.
"""

import argparse
import errno
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

LARGEST = 2**63 - 1  # a larger number overflows in range() and in tensors
INF = math.inf


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """The type of a whole number from low to high, both included."""

    def read(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            value = low - 1
        if low <= value <= high:
            return value
        bounds = f"{low} or more" if high == LARGEST and value < low else f"{low} to {high}"
        raise argparse.ArgumentTypeError(f"must be a whole number of {bounds}, not {word!r}")

    return read


def number(low: float = -INF, high: float = INF, above: float = -INF) -> Callable[[str], float]:
    """The type of a finite number: low and high are included in the range, `above` is not."""
    bounds = {f"above {above:g}": above, f"of {low:g} or more": low, f"of at most {high:g}": high}
    wanted = " and ".join(text for text, bound in bounds.items() if math.isfinite(bound))

    def read(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and low <= value <= high and above < value:
            return value
        raise argparse.ArgumentTypeError(f"must be a finite number {wanted}, not {word!r}")

    return read


def temperature(word: str) -> float:
    """The type of a sampling temperature: 0, which is greedy, or 0.01 to 100. Between 0 and
    0.01 vLLM samples at 0.01, or greedily. Logits over a tiny or huge number overflow in fp32."""
    value = number(0, 100)(word)
    if 0 < value < 0.01:
        raise argparse.ArgumentTypeError(f"must be 0, or a number of 0.01 or more, not {word!r}")
    return value


SEED = whole(0, 2**64 - 1)  # numpy takes no negative seed, torch none of more than 64 bits
PIXELS = whole(28 * 28, 16384 * 28 * 28)  # one image token of Qwen, and its processor's own maximum
TILES = whole(1, 40)  # ours: InternVL's own maximum; an image is compared with all grids up to it
SAMPLES = whole(1, 10_000)  # ours: all answers to one question are held in memory together
TOKENS = whole(1, 2**20)  # ours: a local engine makes room for all of them before the first
RANK = whole(1, 8192)  # ours: the largest model's width, which no update's rank exceeds
ALPHA = number(above=0, high=1e6)  # ours: alpha / rank must be finite in fp32
RATE = number(above=0, high=1)  # ours: AdamW moves a weight by about the learning rate in one step
EPOCHS = number(above=0, high=1e6)  # ours: the number of steps must be finite


# ---------------------------------------------------------------------------------------------------------------
# Around every main

HINTS = {  # what to do about an operating system's error
    errno.ENOSPC: "free some space; the same command goes on",
    errno.EACCES: "check who may read and write there",
    errno.EROFS: "choose a place that can be written",
}


_folder: Path | None = None  # where this process writes


def working_in(folder: Path) -> None:
    """Says where the script writes, for whoever interrupts it."""
    global _folder
    _folder = folder


def explain(error: Exception) -> str | None:
    """What a user or a machine caused, in one paragraph: what, where, what to do. None for a fault of ours."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({error}); give smaller batches, or more memory"
    if isinstance(error, UnicodeError):
        return f"a text that no file can hold or that is not UTF-8 ({error}); write it again"
    if type(error).__name__ == "SafetensorError" or "Symlink loop" in str(error):
        return f"{error}; check the disk and the path"
    if isinstance(error, OSError):
        where = f"{error.filename or _folder or ''}: ".removeprefix(": ")
        return f"{where}{error.strerror or error}; {HINTS.get(error.errno, 'check the path')}"
    return None


def run_script(main: Callable[[list[str]], object]) -> NoReturn:
    """Runs a script's main on the command line and ends the process. A mistake of the user or the machine ends it with one
    paragraph and exit code 1 (2 for a wrong flag); a traceback is for our own faults, or for --debug."""
    try:
        run_main(main)
    except SystemExit as end:
        if "RANK" not in os.environ:
            raise
        # of several ranks: threads of the process group may abort while Python clears up, and all is on disk
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if isinstance(end.code, str) else end.code or 0)


def run_main(main: Callable[[list[str]], object]) -> NoReturn:
    """Runs a main and raises SystemExit with what it ended in."""
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter gets its number
        stream.reconfigure(errors="backslashreplace")
    try:
        for word in argv:
            word.encode()  # a path that is not UTF-8 could not be recorded
        code = main(argv)
        sys.stdout.flush()
        raise SystemExit(code)
    except KeyboardInterrupt:
        kept = f"what is done is kept in {_folder}" if _folder else "nothing was begun"
        raise SystemExit(f"\nstopped; {kept}; the same command goes on") from None
    except BrokenPipeError:  # whoever read our output has gone, and nobody reads this
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if "--debug" in sys.argv or not (said := explain(error)):
            raise
        raise SystemExit(f"{Path(sys.argv[0]).name}: {said}") from None
