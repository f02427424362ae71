"""A model behind an API: parallel requests, and one remedy for each kind of failure (REMEDIES).

`RemoteEngine.complete` is the loop over the remedies. apis.py has the clients of two APIs.
A question that is refused, or that stays without text, gets a completion whose finish_reason says
so. No other failure is stored. The run stops where a remedy says so, after STRIKES such questions
in a row, or when the server asks for a wait of more than PATIENCE. What was completed by then is on
disk, and the same command goes on.

A wish is what every request asks for although a server may refuse it: several samples at once, a
whole completion instead of a stream, thoughts. After a completion without it all requests go
without it.

Where we depart from the paper, or it is silent: all numbers here are ours.
"""

import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from tqdm import tqdm

import data
from engines import bill
from engines.inference import Completion, Engine, Request, Sampling, Setup, Unavailable


class Remedy(NamedTuple):
    tries: int  # of one request that may fail in this way
    wait: float  # most seconds before the next try: 1, 2, 4 ... up to this
    change: str  # what the next try asks for
    at_last: str  # after the last try: the finish_reason, or "stop" for the run


TRIES = 8  # ours: of one request, whatever its failures
SAME, ROOM, LESS = "the same", "twice the room", "all but the wish"
# ours: paper silent; waits of 1, 2, 4 ... 60 s, each times .5 to 1, outlast an outage of a minute
REMEDIES = {
    #                       tries  wait  next try asks for  at last
    "busy":          Remedy(TRIES, 60.0, SAME,             "stop"),     # 429, 5xx, no connection
    "garbled":       Remedy(3,     1.0,  SAME,             "empty"),    # unreadable, or no text
    "no room":       Remedy(4,     0.0,  ROOM,             "length"),   # thinking used up all
    "too much room": Remedy(1,     0.0,  "",               "length"),   # a 4xx after more room
    "wish refused":  Remedy(TRIES, 0.0,  LESS,             "refused"),  # a 4xx to a wish
    "refused":       Remedy(1,     0.0,  "",               "refused"),  # any other 4xx
    "denied":        Remedy(1,     0.0,  "",               "stop"),     # wrong key or model, unpaid
}  # fmt: skip
DENIED = (401, 402, 403, 404)  # HTTP statuses
BUSY = (408, 409, 425, 429)  # and all from 500 on
# finish_reasons where the server may be at fault; "blocked" and "length" are about the question
TEXTLESS = ("refused", "empty")

PATIENCE = 600.0  # ours: seconds, the longest wait a server may ask for; daily limits ask for more
STRIKES = 8  # ours: after so many questions in a row without text, the server is at fault
SHOWN = 300  # ours: most characters shown of a failure, about two lines


class Garbled(Exception):
    """A completion that cannot be read, or has no text."""


class NoRoom(Exception):
    """Thinking used up the token limit, and no text was left."""


class Unanswered(Exception):
    """A question got only server errors while others were completed."""


class RemoteEngine(Engine):
    """A model behind an API. A subclass says how to ask (`call`) and which HTTP status a failure
    has (`status`)."""

    SEVERAL = "several samples at once"  # a wish
    WISH, REFUSED = "", ""  # the API's own wish, and a pattern of its refusal
    made = 0  # requests of this process to all engines: --max-requests bounds a command

    def __init__(self, spec: str, setup: Setup, key: str):
        self.spec, self.setup, self.key = spec, setup, key
        self.tally, self.lock, self.stopping = Counter(), threading.Lock(), threading.Event()
        self.wishes = {self.SEVERAL, self.WISH}  # without those that the server refused
        self.completed, self.proven = 0, False  # requests of this run; whether any of earlier runs
        self.strikes, self.complaint = 0, ""  # questions in a row without text; the last one's why

    def call(self, request: Request, sampling: Sampling, seed: int, wish: bool) -> list[Completion]:
        """One request, with WISH if `wish`. Returns at least one of the samples."""

    def status(self, error: Exception) -> int | None:
        """A failure's HTTP status; 0 for a broken connection; None if it is not the server's."""

    def answer(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Completion]]:
        """After a failure that stops the run, requests under way still end and are yielded, since
        they are paid for. Refused and empty completions are yielded only after one of another end,
        or at the end: a server that refuses everything must not leave a file of refusals."""
        images = any(request.images for request in requests)
        if images and bill.host_of(self.spec) and not self.setup.images_may_leave:
            raise Unavailable(f"{self.spec}: images would be sent; give --images-may-leave")
        self.stopping.clear()
        self.failure, self.later, held = None, [], []  # what stopped the run; what to ask again
        with self.ctrl_c(), ThreadPoolExecutor(self.setup.concurrency) as pool:
            if self.proven:  # refused ones that stand together would stop it again
                requests = random.sample(requests, len(requests))
            running = [pool.submit(self.all_samples, request, sampling) for request in requests]
            try:
                for future in as_completed(running):
                    completions = future.result()
                    ends = [one.finish_reason for one in completions]
                    self.tally.update(end for end in ends if end != "stop")
                    held += completions
                    if set(ends) - set(TEXTLESS):
                        yield held
                        held = []
            finally:  # also if the run is interrupted from outside
                self.stopping.set()
        if self.failure:
            raise self.failure
        if held and not self.completed and not self.proven:
            raise Unavailable(f"{self.spec}: not one question was answered; {self.complaint}")
        yield held
        if self.later:
            count = f"so it is with {len(self.later)} questions, all others are answered"
            raise Unavailable(f"{self.later[0]}; {count}; the same command asks them again")

    @contextmanager
    def ctrl_c(self) -> Iterator[None]:
        """The first Ctrl-C is a failure that stops the run; the second one is Python's."""

        def stop(*_) -> None:
            signal.signal(signal.SIGINT, before)
            self.failure = self.failure or KeyboardInterrupt()
            self.stopping.set()
            tqdm.write(f"{self.spec}: stopping when the requests under way have ended")

        before = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        ours = main and before is signal.default_int_handler
        if ours:
            signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            if ours:
                signal.signal(signal.SIGINT, before)

    def all_samples(self, request: Request, sampling: Sampling) -> list[Completion]:
        """All samples of a question, or those that came before the run was stopped."""
        completions, left = [], request.samples
        try:
            while left:  # a server may give fewer samples than it was asked for
                completions += self.complete(replace(request, samples=left), sampling)
                given = {one.sample for one in completions}
                left = tuple(k for k in left if k not in given)
        except Unanswered as error:
            self.later.append(error)
        except Exception as error:
            with self.lock:
                self.failure = self.failure or error
            self.stopping.set()
        return completions

    def complete(self, request: Request, sampling: Sampling) -> list[Completion]:
        """One request, retried as REMEDIES says. Returns at least one of the samples."""
        seed = data.sample_seed(sampling.seed, request.id, request.samples[0])
        wishes, before, failures, pause = set(self.wishes), self.completed, Counter(), 0.0
        for attempt in range(TRIES):
            if attempt:
                self.stopping.wait(pause)
            self.count_request(again=attempt > 0)
            samples = request.samples[: None if self.SEVERAL in wishes else 1]
            try:
                part = replace(request, samples=samples)
                completions = self.call(part, sampling, seed, self.WISH in wishes)
                self.learn(wishes)
                return completions
            except Exception as error:
                failure = error
            wish = self.refused_wish(wishes, samples, failure)
            kind = self.kind_of(failure, wish, roomy=failures["no room"] > 0)
            remedy, failures[kind] = REMEDIES[kind], failures[kind] + 1
            if failures[kind] == remedy.tries:
                break
            pause = min(remedy.wait, 2.0**attempt) * random.uniform(0.5, 1)
            pause = self.wait_named(failure) or pause
            if remedy.change == ROOM:
                sampling = replace(sampling, max_tokens=2 * sampling.max_tokens)
            if remedy.change == LESS:
                wishes.remove(wish)
        else:  # failures of several kinds: nothing is known of the question
            kind = "busy"
        return self.give_up(kind, request, sampling, failure, self.completed == before)

    def kind_of(self, error: Exception, wish: str | None, roomy: bool) -> str:
        """The kind of a failure, a key of REMEDIES. Raises an error that is not the server's, for
        example of an image that cannot be read."""
        if isinstance(error, Garbled | NoRoom):
            return "garbled" if isinstance(error, Garbled) else "no room"
        status = self.status(error)
        if status is None:
            raise error
        if status in DENIED:
            return "denied"
        if not 400 <= status < 500 or status in BUSY:
            return "busy"
        return "too much room" if roomy else "wish refused" if wish else "refused"

    def refused_wish(self, wishes: set[str], samples: tuple, error: Exception) -> str | None:
        """The wish that an error may be about, if any."""
        if self.WISH in wishes and re.search(self.REFUSED, str(error), re.IGNORECASE):
            return self.WISH
        return self.SEVERAL if len(samples) > 1 else None

    def give_up(
        self, kind: str, request: Request, sampling: Sampling, failure: Exception, alone: bool
    ) -> list[Completion]:
        """What is left to do after the last try. Raises Unavailable if the run must stop, and
        Unanswered if it was not `alone`: others were completed meanwhile."""
        shown, end = self.shown(failure), REMEDIES[kind].at_last
        if kind == "denied":
            check = "check the key and what is paid for, the address, and the model's name"
            raise Unavailable(f"{self.spec}: {shown}; {check}")
        if end == "stop":
            why = f"question {request.id} has no answer after {TRIES} tries; the last: {shown}"
            raise (Unavailable if alone else Unanswered)(f"{self.spec}: {why}")
        seeds = [(k, data.sample_seed(sampling.seed, request.id, k)) for k in request.samples]
        completions = [Completion(request.id, k, "", None, end, seed) for k, seed in seeds]
        if end == "length":
            return completions[:1]
        with self.lock:
            self.complaint = f"question {request.id} is {end}: {shown}"
            system = any(message["role"] == "system" for message in request.messages)
            if system and end == "refused" and re.search(r"\bsystem\b", shown, re.IGNORECASE):
                self.complaint += "; evaluate.py --prompt bare sends no system turn"
            self.strikes += 1
            if self.strikes >= STRIKES:
                row = f"{self.strikes} questions in a row have no answer"
                raise Unavailable(f"{self.spec}: {row}; {self.complaint}")
        tqdm.write(f"{self.spec}: {self.complaint}")
        return completions

    def learn(self, wishes: set[str]) -> None:
        """After a completion: later requests also go without the wishes that it went without."""
        with self.lock:
            self.completed, self.strikes = self.completed + 1, 0
            given_up, self.wishes = self.wishes - wishes, self.wishes & wishes
        for wish in given_up:
            tqdm.write(f"{self.spec}: refuses requests for {wish}; asked without from now on")

    def wait_named(self, error: Exception) -> float | None:
        """Seconds that the server asks us to wait, None if it does not say: Retry-After or Google's
        RetryInfo ("17s"). Raises Unavailable for more than PATIENCE."""
        headers = getattr(getattr(error, "response", None), "headers", {})
        info = re.search(r"'retryDelay': '([\d.]+)s'", str(error))
        value = headers.get("retry-after") or (info[1] if info else "")
        if not re.fullmatch(r"\d+(\.\d+)?", value):  # ours: dates are not read
            return None
        seconds = float(value)
        if seconds > PATIENCE:
            wait = f"the server asks for a wait of {seconds:.0f} s ({self.shown(error)})"
            raise Unavailable(f"{self.spec}: {wait}; after it, the same command goes on")
        return seconds

    def count_request(self, again: bool) -> None:
        """Raises Unavailable if no request may be sent."""
        with self.lock:
            if self.stopping.is_set():
                raise Unavailable(f"{self.spec}: stopped")
            if 0 < self.setup.max_requests <= RemoteEngine.made:
                made = f"{RemoteEngine.made} requests were made (--max-requests)"
                raise Unavailable(f"{self.spec}: {made}; the same command goes on")
            self.tally.update({"requests": 1, "again": int(again)})
            RemoteEngine.made += 1

    def count_tokens(self, prompt: int | None, completion: int | None) -> None:
        with self.lock:
            self.tally.update({"tokens in": prompt or 0, "tokens out": completion or 0})

    def shown(self, error: Exception) -> str:
        """A failure in a few words, without the key: some servers repeat all they were sent."""
        text = str(error).replace(self.key, "...") if self.key else str(error)
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= SHOWN else text[:SHOWN] + " ..."
