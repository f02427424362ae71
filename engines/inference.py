"""What is asked of an engine, what comes back, and how nothing is asked twice.

    Request (question, images, which samples)  ->  engine.answer  ->  Completion (text, token ids,
    why it ended)  ->  a row of JSONL

Every sample has its own seed, a hash of (seed, question, k). `complete_all` writes each completion
as it comes, and asks only for what its file does not hold: a killed rollout of a week resumes, and
a remote model is paid once. `ask_yes_no` asks for a verdict in JSON; an unreadable completion is
retried, and in the end counts as no verdict. `engines/__init__.py` lists the engines; all have the
flags of Setup.

Where we depart from the paper, or it is silent: how models are asked is all ours.
"""

import json
import re
import time
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

import data
from command import flags, stage
from engines import bill

READ_ATTEMPTS = 3  # ours: paper silent


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p 1 keeps the whole distribution; max_tokens bounds the
    response, stop token included."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """One question: messages up to the response, image files, and the numbers of its samples."""

    id: str
    messages: list[dict]
    images: list[Path]
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One response. finish_reason is "stop"; "length" where the token limit cut it off; "overlong"
    where the prompt left no room for it; of a remote engine also "blocked" (by a safety filter),
    "refused" (the request was) or "empty" (no text, however often it was asked). seed: of a remote
    engine that of the request, which may be for several samples. token_ids end with
    the stop token if there was one. token_logps: their log-probabilities in nats, at temperature 1
    over the whole vocabulary. Both are None where the engine does not give them. reasoning: a
    remote engine's thinking, if given apart."""

    id: str
    sample: int
    text: str
    token_ids: list[int] | None
    finish_reason: str
    seed: int
    reasoning: str = ""
    token_logps: list[float] | None = None

    @property
    def logp(self) -> float | None:
        """log p(y | q, I): the sum over the tokens, in nats."""
        return None if self.token_logps is None else sum(self.token_logps)


class Engine(Protocol):
    spec: str
    proven: bool  # its file has completions already, so a refusal is about the question
    tally: Counter  # shown beside the progress bar: tokens, requests asked again, ...

    def answer(self, requests: list[Request], sampling: Sampling) -> Iterator[list[Completion]]:
        """Lists of completions, in any order, until every sample of every request has one. An
        empty list says that the engine is alive, and `tally` is shown."""

    def close(self) -> None:
        """Frees the GPUs for the next engine; this one cannot answer any more."""


class Unavailable(flags.UserError):
    """An engine cannot answer, or no longer. Completions are kept; the same command goes on."""


def flag(default: int, kind: Callable | None, said: str):
    """A field of Setup, with the flag's words for argparse. kind: its type; None for a switch."""
    how = {"type": kind, "default": default} if kind else {"action": "store_true"}
    return field(default=default, metadata={**how, "help": said})


@dataclass(frozen=True)
class Setup:
    """How engines run: the flags that every script with an engine has. All defaults are ours."""

    # the same as in model.py
    pixels: int = flag(768 * 768, flags.PIXELS, "most pixels of an image; as in training")
    tiles: int = flag(1, flags.TILES, "InternVL: most tiles of an image; as in training")
    batch: int = flag(0, flags.whole(0), "most samples at once of a local engine; 0: its own")
    # each replica is a process with its own model
    replicas: int = flag(0, flags.whole(0, 256), "processes of a local engine; 0: one a GPU group")
    tensor_parallel: int = flag(1, flags.whole(1), "GPUs that share one vllm: engine (72B: 4)")
    # OpenAI's client opens at most 1000 connections
    concurrency: int = flag(16, flags.whole(1, 1000), "requests at once to a remote engine")
    max_requests: int = flag(0, flags.whole(0), "most requests to remote engines; 0: no limit")
    images_may_leave: bool = flag(False, None, "let images be sent to engines on other machines")


# flags that change the speed, or whether it may run, but not the result
FREE = ("batch", "replicas", "tensor_parallel", "concurrency", "max_requests", "images_may_leave")


def add_flags(parser: ArgumentParser) -> None:
    for one in fields(Setup):
        parser.add_argument("--" + one.name.replace("_", "-"), **one.metadata)
    about = "folder of all completions; default: replies/ beside --out"
    parser.add_argument("--replies", default="", help=about)


def setup_of(args: Namespace) -> Setup:
    return Setup(**{one.name: getattr(args, one.name) for one in fields(Setup)})


def content_of(messages: list[dict] | str, images: list[Path]) -> str:
    """A short hash of all that is asked. A completion of another text or image is not used for this
    one, even under the same id."""
    return data.content_hash([messages, [data.file_hash(image) for image in images]])[:16]


def checkpoint(spec: str) -> str | None:
    """The folder of a local engine's model; None for other engines."""
    kind, _, rest = spec.partition(":")
    return rest if kind in ("hf", "vllm") else None


def identity(spec: str) -> str:
    """What answers under a spec: for a local engine the content of its model, not its path. A
    remote model is known by its name only: we cannot see it retrained under the same name."""
    folder = checkpoint(spec)
    return spec if folder is None else f"{spec.partition(':')[0]}:{stage.fingerprint(folder)}"


def completions_file(args: Namespace, role: str, spec: str, sampling: Sampling) -> Path:
    """Where completions are kept: one file for each role, engine, sampling and image settings, in
    RUN/replies, beside --out. NAME.settings.json says what the hash in the name stands for."""
    folder = Path(args.replies or Path(args.out).parent / "replies")
    settings = {"role": role, "engine": identity(spec), **vars(sampling)}
    settings |= {"pixels": args.pixels, "tiles": args.tiles}
    name = re.sub(r"\W+", "-", settings["engine"])[:40].strip("-")
    path = folder / f"{role}-{name}-{data.content_hash(settings)[:8]}.jsonl"
    if not path.with_suffix(".settings.json").exists():
        data.write_json(path.with_suffix(".settings.json"), settings)
    return path


def sealed(row: dict) -> dict:
    """A row with a hash of itself."""
    return {**row, "row_sha": data.content_hash(row)[:16]}


def read_completions(path: Path) -> list[dict]:
    """The rows of a file of completions. Raises RowError for a row that was changed: what an engine
    said is evidence."""
    rows = data.resume_jsonl(path)
    for number, row in enumerate(rows, 1):
        seal = row.pop("row_sha", None)
        if sealed(row)["row_sha"] != seal:
            remedy = "remove the row, and it is asked for again"
            raise data.RowError(f"{path}: row {number} is not as it was written; {remedy}")
    return rows


def complete_all(
    engine: Engine,
    requests: list[Request],
    sampling: Sampling,
    role: str,
    to_row: Callable[[Completion], dict],
    args: Namespace,
) -> dict[tuple[str, int], dict]:
    """{(id, sample): row} of these requests, in their order. Asks for whatever the role's file does
    not hold yet, and appends a row for each completion as it comes, with a progress bar. What was
    asked for it is in the ledger then: a kill loses only what is under way. A row is known by its
    id, its sample and `asked`, a hash of messages and images."""
    path = completions_file(args, role, engine.spec, sampling)
    asked = {request.id: content_of(request.messages, request.images) for request in requests}
    wanted = [(one.id, k, asked[one.id]) for one in requests for k in one.samples]
    key_of = itemgetter("id", "sample", "asked")
    with stage.hold(path) as file:
        rows = {key_of(row): row for row in read_completions(path)}
        left = []
        for one in requests:
            samples = tuple(k for k in one.samples if (one.id, k, asked[one.id]) not in rows)
            left += [replace(one, samples=samples)] if samples else []
        done = len(wanted) - sum(len(one.samples) for one in left)
        engine.proven, started, before = bool(rows), time.time(), Counter(engine.tally)
        booked = before
        bar = tqdm(total=len(wanted), initial=done, desc=f"{role} {engine.spec}", unit="answer")
        try:
            for completions in engine.answer(left, sampling):
                new = []
                for one in completions:
                    one = replace(one, text=clean(one.text), reasoning=clean(one.reasoning))
                    new.append({**to_row(one), "asked": asked[one.id]})
                data.append_jsonl(file, map(sealed, new))
                rows |= {key_of(row): row for row in new}
                now = Counter(engine.tally)  # read once: an engine's threads go on counting
                bill.record(path.parent, engine.spec, now - booked)
                booked, spent = now, now - before
                rate = (spent["tokens"] + spent["tokens out"]) / (time.time() - started)
                bar.set_postfix({"tokens/s": f"{rate:.0f}", **spent}, refresh=not new)
                bar.update(len(new))
        finally:
            bar.close()
            bill.record(path.parent, engine.spec, Counter(engine.tally) - booked)
    return {key[:2]: rows[key] for key in wanted}


def attempts_of(spec: str) -> int:
    """How often a label is asked for until it can be read: a local engine would repeat it."""
    return 1 if checkpoint(spec) is not None else READ_ATTEMPTS


def retry_until_read(
    engine: Engine,
    requests: list[Request],
    attempts: int,
    enough: Callable[[dict], bool],
    sampling: Sampling,
    role: str,
    to_row: Callable[[Completion], dict],
    args: Namespace,
) -> dict[str, list[dict]]:
    """{request id: its completions as rows}: the last one is `enough`, or all attempts are used.
    Attempt k is sample k, with a seed of its own, so no answer depends on what else is asked again.
    Requests with one id are one."""
    by_id = {request.id: request for request in requests}
    found: dict[str, list[dict]] = {key: [] for key in by_id}
    for attempt in range(attempts):
        open_ids = [key for key, rows in found.items() if not (rows and enough(rows[-1]))]
        if not open_ids:
            break
        left = [replace(by_id[key], samples=(attempt,)) for key in open_ids]
        for (key, _), row in complete_all(engine, left, sampling, role, to_row, args).items():
            found[key].append(row)
    return found


def completion_row(completion: Completion, spec: str) -> dict:
    """A completion as a row of rollouts.jsonl."""
    return {
        "id": completion.id,
        "sample": completion.sample,
        "engine": spec,
        "response": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "seed": completion.seed,
        "response_sha": data.response_hash(completion.text),
        "logp": completion.logp,
    }


def clean(text: str) -> str:
    """Half a surrogate pair, which no file can hold, becomes U+FFFD; a whole one its character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def json_objects(completion: str) -> Iterator[dict]:
    """The JSON objects in a completion, in order, whatever is around them."""
    decoder, at = json.JSONDecoder(), completion.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(completion, at)
            # an escape in the JSON may spell half a surrogate pair
            yield json.loads(clean(json.dumps(value, ensure_ascii=False)))
        except json.JSONDecodeError:
            end = at + 1
        at = completion.find("{", end)


def outermost(value, keys: set[str]) -> list[dict]:
    """The outermost objects in a JSON value that have all the keys; their keys in lower case."""
    if isinstance(value, dict):
        found = {key.strip().casefold(): inner for key, inner in value.items()}
        if keys <= found.keys():
            return [found]
        value = list(value.values())
    parts = value if isinstance(value, list) else []
    return [found for part in parts for found in outermost(part, keys)]


def read_object(completion: str, keys: Sequence[str]) -> dict:
    """The last object of a completion that has all the keys, itself or nested; its keys in lower
    case. Raises ValueError if there is none, or if it nests several that differ."""
    wanted = {key.casefold() for key in keys}
    try:
        for top in reversed(list(json_objects(completion))):
            found = outermost(top, wanted)
            if any(one[key] != found[0][key] for one in found for key in wanted):
                raise ValueError("it holds several objects that say different things")
            if found:
                return found[0]
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    raise ValueError(f"no JSON object in it has {', '.join(keys)}")


# Yes or No, perhaps with a reason; if the reason takes it back, even in part, it is neither: "Yes -
# no, rather not", but not "Yes - no invented findings"
YES_NO = re.compile(r"(yes|no|true|false)\b\s*\.?(?:\s*[-–—:;.(](.*))?", re.S)
HEDGE = re.compile(
    r"^\s*(?:yes|no)\b\s*(?:[^\w\s]|$)"
    r"|\b(?:mostly|partly|partially|somewhat|but|except|however|unclear)\b"
)


def read_yes_no(completion: str, keys: Sequence[str]) -> dict[str, bool]:
    """{key: bool} for each of the keys, in any case; a reason may follow ("Yes - as seen"). Raises
    ValueError for anything else, such as a missing key or the prompt's own "Yes/No"."""
    found, verdict = read_object(completion, keys), {}
    for key in keys:
        value = found[key.casefold()]
        match = YES_NO.fullmatch(str(value).strip().casefold())
        if not match or HEDGE.search(match[2] or ""):
            raise ValueError(f"{key} is {value!r}, neither Yes nor No")
        verdict[key] = match[1] in ("yes", "true")
    return verdict


def read_verdict(completion: dict, keys: Sequence[str]) -> tuple[dict | None, str | None]:
    """(criteria, None), or (None, why there are none). Only a finished completion counts: one that
    was cut off might have corrected itself."""
    if completion["finish_reason"] != "stop":
        return None, f"it is not finished: {completion['finish_reason']}"
    try:
        return read_yes_no(completion["raw"], keys), None
    except ValueError as reason:
        return None, str(reason)


# ours: paper silent; greedy, for a verdict or a label, with room for thinking before the JSON
LABELLING = Sampling(temperature=0.0, top_p=1.0, max_tokens=4096)


def label_cost(
    role: str, spec: str, sizes: Iterable[tuple[int, int]], args: Namespace
) -> bill.Cost:
    """The most that verdicts or labels may cost; sizes: (characters, images) of each request."""
    return bill.cost(role, spec, sizes, attempts_of(spec), LABELLING.max_tokens, args.pixels)


def ask_yes_no(
    engine: Engine, requests: list[Request], keys: Sequence[str], role: str, args: Namespace
) -> dict[str, dict]:
    """{request id: its last completion as a row, for read_verdict}. An unreadable one is retried
    as the next sample, attempts_of times at most. Requests with one id are one."""

    def to_row(one: Completion) -> dict:
        row = {"id": one.id, "sample": one.sample}
        return row | {"raw": one.text, "finish_reason": one.finish_reason}

    def enough(row: dict) -> bool:
        return read_verdict(row, keys)[0] is not None

    sampling, attempts = replace(LABELLING, seed=args.seed), attempts_of(engine.spec)
    found = retry_until_read(engine, requests, attempts, enough, sampling, role, to_row, args)
    return {key: rows[-1] for key, rows in found.items()}


def image_paths(question: data.Question, image_root: Path) -> list[Path]:
    """Raises RowError for an image that is not there."""
    paths = [data.image_file(image_root, image) for image in question.images]
    for path, image in zip(paths, question.images):
        if not path.is_file():
            where = f"question {question.id}: image {image} is not below {image_root}"
            raise data.RowError(f"{where}; check --images")
    return paths


def question_requests(questions: list[data.Question], root: Path, samples: int) -> list[Request]:
    """Each question as every engine gets it: the paper's system prompt, the images, the question.
    Raises RowError naming the first image that is not there, before anything is asked."""
    found = []
    for one in questions:
        images = image_paths(one, root)
        found.append(Request(one.id, data.prompt_messages(one), images, tuple(range(samples))))
    return found


def prompt_request(id: str, prompt: str, images: list[Path]) -> Request:
    """A prompt about question `id`. The id holds a hash of its content: none is asked twice."""
    messages = [{"role": "user", "content": prompt}]
    return Request(f"{id}/{content_of(prompt, images)}", messages, images, (0,))
