"""The command line: types of numeric flags, and how a script's main is run.

    add("--batch", type=flags.whole(1))                       1, 2, 3 ...
    add("--top-p", type=flags.number(above=0, high=1))        0 < x <= 1

argparse rejects a bad value with the name of its flag and exit code 2. A range is the widest that
the code behind the flag handles. A condition on several values is checked after parse_args, with
parser.error. `run_script(main)` runs every script.

Where we depart from the paper, or it is silent: it has no command line.
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


def number(
    low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> Callable[[str], float]:
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
    """The type of a sampling temperature: 0 (greedy), or 0.01 to 100. Between 0 and 0.01 vLLM
    samples at 0.01, or greedily. Logits divided by a tiny or huge number overflow in fp32."""
    value = number(0, 100)(word)
    if 0 < value < 0.01:
        raise argparse.ArgumentTypeError(f"must be 0, or a number of 0.01 or more, not {word!r}")
    return value


SEED = whole(0, 2**64 - 1)  # numpy takes no negative seed, torch at most 64 bits
PIXELS = whole(28 * 28, 16384 * 28 * 28)  # from one image token of Qwen to its processor's maximum
TILES = whole(1, 40)  # ours: InternVL's maximum; each image is compared with every grid up to it
SAMPLES = whole(1, 10_000)  # ours: all answers to one question are held in memory together
TOKENS = whole(1, 2**20)  # ours: a local engine allocates arrays for all of them at the start
RANK = whole(1, 8192)  # ours: the largest model's width; no update has a higher rank
ALPHA = number(above=0, high=1e6)  # ours: alpha / rank must be finite in fp32
RATE = number(above=0, high=1)  # ours: AdamW moves a weight by about the learning rate in one step
EPOCHS = number(above=0, high=1e6)  # ours: the number of steps must be finite


# --------------------------------------------------------------------------------------------------
# Running a script's main


class UserError(ValueError):
    """What a user or a machine did wrong; the text says what, where, and what to do. A script ends
    with this text and exit code 1 (run_script)."""


HERE = Path(__file__).resolve().parent.parent
_folder: Path | None = None  # where this process writes


def working_in(folder: Path) -> None:
    """Records where the script writes, for the message on Ctrl-C."""
    global _folder
    _folder = folder


def program() -> str:
    """What this process runs, as a user types it: sft.py, or -m clinic."""
    path = Path(sys.argv[0])
    if path.parent.parent != HERE:
        return path.name
    module = path.parent.name if path.name == "__main__.py" else f"{path.parent.name}.{path.stem}"
    return f"-m {module}"


def explain(error: Exception) -> str | None:
    """A user's or machine's error in one paragraph: what, where, what to do. None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({error}); give smaller batches, or more memory"
    if isinstance(error, UnicodeError):
        return f"a text that no file can hold or that is not UTF-8 ({error}); write it again"
    if type(error).__name__ == "SafetensorError":
        return f"{error}; check the disk and the path"
    if isinstance(error, OSError):
        where = f"{error.filename or _folder or ''}: ".removeprefix(": ")
        full = error.errno == errno.ENOSPC
        hint = "free some space; the same command goes on" if full else "check the path"
        return f"{where}{error.strerror or error}; {hint}"
    return None


def run_script(main: Callable[[list[str]], object]) -> NoReturn:
    """Runs a script's main on the command line and ends the process. An error of the user or the
    machine gives one paragraph and exit code 1 (2 for a wrong flag). A bug, or any error with
    --debug, gives a traceback."""
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    for stream in (sys.stdout, sys.stderr):  # a terminal shows the code of a character it lacks
        stream.reconfigure(errors="backslashreplace")
    code, message = 1, ""
    try:
        code = main(argv)
        sys.stdout.flush()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        kept = f"what is done is kept in {_folder}" if _folder else "nothing was begun"
        message = f"\nstopped; {kept}; the same command goes on"
    except BrokenPipeError:  # nobody reads our output any more, so no message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if "--debug" in sys.argv or not (message := explain(error)):
            raise
        if not isinstance(error, UserError):
            message = f"{program()}: {message}"
    if message:
        print(message, file=sys.stderr)
    if "RANK" in os.environ:
        # with several ranks, a thread may abort while Python exits; all data is on disk by then
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)
