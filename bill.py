"""What engines may cost: an upper bound before anything is paid, a ledger of what was.

    at most:   engine                   requests    tokens in   tokens out  images to
    judge      gemini:gemini-2.5-pro      48,000  196,608,000  196,608,000  ...googleapis.com

Every command that asks a remote engine prints this table first. Images may be patients': they leave
this machine only with --images-may-leave. What was asked stands in RUN/replies/paid.jsonl, a row
for each engine and command, also of one that was stopped; medee.py run --max-requests counts it.

Where we depart from the paper, or it is silent: it tells no cost.
"""

import ipaddress
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import data

LETTERS = 3  # ours: of a token, for an upper bound; English has about four
PATCH = 28  # pixels of the side of an image token, as Qwen2.5-VL counts; others bill about as much
COUNTED = ("requests", "tokens in", "tokens out")


@dataclass(frozen=True)
class Cost:
    """What one engine may be asked at most in one role. figures: requests, tokens in and out."""

    role: str
    spec: str
    figures: tuple[int, int, int]
    images: int


def sizes(asks: Iterable) -> Iterator[tuple[int, int]]:
    """(characters, images) of every request that asks (asking.Ask) may take, one a sample."""
    for ask in asks:
        parts = [part for turn in ask.messages for part in data.parts_of(turn, 0)]
        letters = sum(len(part.get("text", "")) for part in parts)
        yield from [(letters, len(ask.images))] * len(ask.samples)


def cost(
    role: str, spec: str, sizes: Iterable[tuple[int, int]], attempts: int, longest: int, pixels: int
) -> Cost:
    """Of requests by (characters, images), each asked in so many attempts, each reply so long."""
    requests = tokens = images = 0
    for letters, shown in sizes:
        requests, images = requests + attempts, images + attempts * shown
        tokens += attempts * (letters // LETTERS + shown * pixels // PATCH**2)
    return Cost(role, spec, (requests, tokens, requests * longest), images)


def is_here(host: str) -> bool:
    """Whether a host is this machine."""
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    except ValueError:
        return host.rpartition(".")[2] == "localhost"


def is_remote(spec: str) -> bool:
    return spec.startswith(("http://", "https://", "gemini:"))


def host_of(spec: str) -> str:
    """The host that an engine's requests go to; "" for this machine."""
    google = os.environ.get("GOOGLE_GEMINI_BASE_URL") or "https://generativelanguage.googleapis.com"
    url = google if spec.startswith("gemini:") else spec if is_remote(spec) else "http://localhost"
    host = urlsplit(url).hostname or ""
    return "" if is_here(host) else host


def announce(costs: list[Cost], may_leave: bool) -> None:
    """Prints the table, where a remote engine is in it. Raises RowError where images would leave
    this machine and may not."""
    remote = [one for one in costs if is_remote(one.spec) and one.figures[0]]
    if not remote:
        return
    rows = []
    for one in remote:
        to = (host_of(one.spec) or "this machine") if one.images else "-"
        rows.append((one.role, one.spec, one.figures, to))
    rows.append(("all", "", tuple(map(sum, zip(*(one.figures for one in remote)))), ""))
    role, wide = max(8, *(len(row[0]) for row in rows)), max(len(row[1]) for row in rows)
    titles = "{:>12}{:>17}{:>17}".format(*COUNTED)
    print(f"\n{'at most:':<{role}}  {'engine':<{wide}}{titles}  images to")
    for name, spec, figures, to in rows:
        print(f"{name:<{role}}  {spec:<{wide}}{'{:>12,}{:>17,}{:>17,}'.format(*figures)}  {to}")
    print("  plus what is asked again after a failure, or with more room where thinking left none")
    hosts = sorted({row[3] for row in rows} - {"-", "", "this machine"})
    if hosts and not may_leave:
        leave = "if they may leave this machine, give --images-may-leave"
        raise data.RowError(f"images would be sent to {', '.join(hosts)}; {leave}")


def record(replies: Path, spec: str, tally: Counter) -> None:
    """Adds to the ledger what an engine was asked."""
    if tally["requests"]:
        replies.mkdir(parents=True, exist_ok=True)
        with open(replies / "paid.jsonl", "a", encoding="utf-8") as file:
            data.append_jsonl(file, [{"engine": spec, **{name: tally[name] for name in COUNTED}}])


def paid(replies: Path) -> Counter:
    """What was asked so far: requests, tokens in, tokens out."""
    total: Counter = Counter()
    for row in data.resume_jsonl(replies / "paid.jsonl"):
        total.update({name: row[name] for name in COUNTED})
    return total
