"""What engines may cost: an upper bound before anything is asked, and a ledger of what was asked.

    at most:   engine                   requests    tokens in   tokens out  images to
    judge      gemini:gemini-2.5-pro      48,000  196,608,000  196,608,000  ...googleapis.com

Every command with a remote engine prints this table first. Images may be of patients: they leave
this machine only with --images-may-leave. RUN/replies/paid.jsonl has what was asked, beside the
completions that came of it; medee.py run --max-requests counts it.

Where we depart from the paper, or it is silent: it gives no cost.
"""

import ipaddress
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import data

CHARACTERS = 3  # ours: characters of a token, for an upper bound; English has about four
PATCH = 28  # Qwen2.5-VL: pixels on a side of an image token; other models are similar
COUNTED = ("requests", "tokens in", "tokens out")


@dataclass(frozen=True)
class Cost:
    """What one engine may be asked at most in one role. figures: as in COUNTED."""

    role: str
    spec: str
    figures: tuple[int, int, int]
    images: int


def sizes(requests: Iterable) -> Iterator[tuple[int, int]]:
    """(characters, images) of each sample of inference.Requests."""
    for request in requests:
        parts = [part for turn in request.messages for part in data.parts_of(turn, 0)]
        characters = sum(len(part.get("text", "")) for part in parts)
        yield from [(characters, len(request.images))] * len(request.samples)


def cost(
    role: str, spec: str, sizes: Iterable[tuple[int, int]], attempts: int, longest: int, pixels: int
) -> Cost:
    """The cost of requests of `sizes`: `attempts` of each, `longest` tokens a completion."""
    sizes = list(sizes)
    requests, images = attempts * len(sizes), attempts * sum(shown for _, shown in sizes)
    tokens = sum(size // CHARACTERS + shown * pixels // PATCH**2 for size, shown in sizes)
    return Cost(role, spec, (requests, attempts * tokens, requests * longest), images)


def is_remote(spec: str) -> bool:
    return spec.startswith(("http://", "https://", "gemini:"))


def host_of(spec: str) -> str:
    """The host that an engine's requests go to; "" for this machine."""
    google = os.environ.get("GOOGLE_GEMINI_BASE_URL") or "https://generativelanguage.googleapis.com"
    host = urlsplit(google if spec.startswith("gemini:") else spec).hostname or ""
    try:
        address = ipaddress.ip_address(host)
        here = address.is_loopback or address.is_unspecified
    except ValueError:
        here = host.rpartition(".")[2] == "localhost"
    return "" if here else host


def announce(costs: list[Cost], may_leave: bool) -> None:
    """Prints the table if it has a remote engine. Raises RowError if images would leave this
    machine without permission."""
    remote = [one for one in costs if is_remote(one.spec) and one.figures[0]]
    if not remote:
        return
    total = tuple(map(sum, zip(*(one.figures for one in remote))))
    role = max(8, *(len(one.role) for one in remote))
    wide = max(len(one.spec) for one in remote)
    titles = "{:>12}{:>17}{:>17}".format(*COUNTED)
    print(f"\n{'at most:':<{role}}  {'engine':<{wide}}{titles}  images to")
    for one in [*remote, Cost("all", "", total, 0)]:
        to = host_of(one.spec) or "this machine" if one.images else "-" if one.spec else ""
        figures = "{:>12,}{:>17,}{:>17,}".format(*one.figures)
        print(f"{one.role:<{role}}  {one.spec:<{wide}}{figures}  {to}")
    print("  plus what is asked again after a failure, or with more room where thinking left none")
    hosts = sorted({host_of(one.spec) for one in remote if one.images} - {""})
    if hosts and not may_leave:
        leave = "if they may leave this machine, give --images-may-leave"
        raise data.RowError(f"images would be sent to {', '.join(hosts)}; {leave}")


def record(completions: Path, spec: str, tally: Counter) -> None:
    """Adds to the ledger what an engine was asked."""
    if tally["requests"]:
        completions.mkdir(parents=True, exist_ok=True)
        with open(completions / "paid.jsonl", "a", encoding="utf-8") as file:
            data.append_jsonl(file, [{"engine": spec, **{name: tally[name] for name in COUNTED}}])


def paid(completions: Path) -> Counter:
    """What was asked so far: requests, tokens in, tokens out."""
    total: Counter = Counter()
    for row in data.resume_jsonl(completions / "paid.jsonl"):
        total.update({name: row[name] for name in COUNTED})
    return total
