"""What is asked of an engine, what comes back, and how nothing is asked twice.

    Ask (question, images, which samples)  ->  engine.answer  ->  Reply (text, token ids, why it ended)  ->  a row of JSONL

Every sample has a seed of its own, a hash of (seed, question, k). `ask_all` writes each reply as it comes and, started
again, asks only what its file does not hold: a killed rollout of a week goes on where it was, and a remote model is paid
once. Which engines there are stands in engines.py; they all run by the flags of Setup. `ask_yes_no` asks for a verdict in
JSON: what cannot be read is no verdict, asked again, and in the end none.

Where we depart from the paper, or it is silent: how models are asked is all ours.
"""

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

import bill
import data
import flags
import stage

ATTEMPTS = 3  # ours: paper silent; how often a verdict or a label is asked for until it can be read


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p 1 keeps the whole distribution; max_tokens bounds the response, stop token included."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise ValueError(f"{self}: temperature must be 0 or more, top_p above 0 and at most 1, max_tokens at least 1")


@dataclass(frozen=True)
class Ask:
    """One question to an engine: messages up to the response, images as files, and the numbers of the samples wanted."""

    id: str
    messages: list[dict]
    images: list[Path]
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Reply:
    """One answer. finish_reason is "stop"; "length" where the token limit cut it off; "overlong" where the prompt left no room
    for one; of a remote engine also "blocked" (by a safety filter), "refused" (the request was), "empty" (nothing to be
    read, however often it was asked). token_ids end with the stop token if there was one, and are None where the engine does
    not tell them. reasoning is what a remote engine thought, where it tells that apart.
    token_logps are the log-probabilities of token_ids at temperature 1, over the whole vocabulary,
    in nats; None where the engine does not tell them."""

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
    proven: bool  # it answered in an earlier run: what a remote one refuses now is the question's fault, not the request's
    tally: Counter  # what the progress bar shows beside its rate: tokens, requests asked again, ...

    def answer(self, asks: list[Ask], sampling: Sampling) -> Iterator[list[Reply]]:
        """Lists of finished replies, in any order, until every sample of every ask is answered. An
        empty list says that it is alive: what `tally` says is shown."""


class Unavailable(SystemExit, RuntimeError):
    """An engine cannot answer, or not any more. What it answered is kept; the same command goes on. Uncaught, a script
    ends with the message and exit code 1, without a traceback."""


@dataclass(frozen=True)
class Setup:
    """How engines run: the flags that every script with an engine has."""

    pixels: int = 768 * 768  # ours: paper silent, as in model.py
    tiles: int = 1  # ours: the same
    batch: int = 256  # ours
    replicas: int = 0  # ours
    tensor_parallel: int = 1  # ours
    concurrency: int = 16  # ours
    max_requests: int = 0  # ours
    images_may_leave: bool = False


# change how fast, and whether at all, not what
SPEED = (
    "batch", "replicas", "tensor_parallel", "concurrency", "max_requests", "images_may_leave",
)  # fmt: skip

FLAGS = {
    "pixels": "largest image in pixels, Qwen and remote engines; as in training",
    "tiles": "most tiles of an image, InternVL; as in training",
    "batch": "most samples at once of a local engine; hf: takes fewer where memory is short",
    "replicas": "processes of a local engine, each with its own GPUs; 0: as many as the GPUs allow",
    "tensor_parallel": "GPUs that share one vllm: engine (72B: 4)",
    "concurrency": "requests at once to a remote engine",
    "max_requests": "stop after so many requests to remote engines; 0: no limit",
    "images_may_leave": "let images be sent to engines on other machines",
}


TYPES = {
    "pixels": flags.PIXELS,
    "tiles": flags.TILES,
    "batch": flags.whole(1),
    "replicas": flags.whole(0, 256),  # ours: each is a process with a model of its own
    "tensor_parallel": flags.whole(1),
    "concurrency": flags.whole(1, 1000),  # ours: OpenAI's client opens no more connections
    "max_requests": flags.whole(0),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    for field in fields(Setup):
        name, told = "--" + field.name.replace("_", "-"), FLAGS[field.name]
        if field.name in TYPES:
            parser.add_argument(name, type=TYPES[field.name], default=field.default, help=told)
        else:
            parser.add_argument(name, action="store_true", help=told)
    parser.add_argument("--replies", default="", help="folder of all replies; default: replies/ beside --out")


def setup_of(args: argparse.Namespace) -> Setup:
    return Setup(**{field.name: getattr(args, field.name) for field in fields(Setup)})


def content_of(said: list[dict] | str, images: list[Path]) -> str:
    """A short hash of all that is asked: a reply to something else is no reply to this, though the id be the same."""
    return data.content_hash([said, [data.file_hash(image) for image in images]])[:16]


def checkpoint(spec: str) -> str | None:
    """The folder of a local engine's model; None for other engines."""
    kind, _, rest = spec.partition(":")
    return rest if kind in ("hf", "vllm") else None


def identity(spec: str) -> str:
    """What answers under a spec: of a local engine the content of its model, not its path. A remote model is known by its name
    only: one that is retrained behind `vllm serve` under its old name cannot be told from the old one."""
    folder = checkpoint(spec)
    return spec if folder is None else f"{spec.partition(':')[0]}:{stage.fingerprint(folder)}"


def replies_file(args: argparse.Namespace, role: str, spec: str, sampling: Sampling) -> Path:
    """Where replies are kept: one file for each role, engine, sampling and image settings, in RUN/replies, beside --out. They
    outlive the folders that are made from them. NAME.settings.json says what the hash in the name stands for."""
    folder = Path(args.replies or Path(args.out).parent / "replies")
    settings = {"role": role, "engine": identity(spec), **vars(sampling), "pixels": args.pixels, "tiles": args.tiles}
    name = re.sub(r"\W+", "-", settings["engine"])[:40].strip("-")
    path = folder / f"{role}-{name}-{data.content_hash(settings)[:8]}.jsonl"
    if not path.with_suffix(".settings.json").exists():
        data.write_json(path.with_suffix(".settings.json"), settings)
    return path


def sealed(row: dict) -> dict:
    """A row with a hash of itself."""
    return {**row, "row_sha": data.content_hash(row)[:16]}


def read_replies(path: Path) -> list[dict]:
    """The rows of a file of replies. Raises RowError for one that is not as it was written: what an engine said is evidence."""
    rows = data.resume_jsonl(path)
    for number, row in enumerate(rows, 1):
        if sealed({key: value for key, value in row.items() if key != "row_sha"}) != row:
            raise data.RowError(f"{path}: row {number} is not as it was written; remove the row, and it is asked for again")
        del row["row_sha"]
    return rows


def ask_all(
    engine: Engine, asks: list[Ask], sampling: Sampling, path: Path,
    to_row: Callable[[Reply], dict], title: str,
) -> dict[tuple[str, int], dict]:  # fmt: skip
    """{(id, sample): row} of these asks, in their order. Asks whatever `path` does not hold yet,
    appending a row for each reply as it comes, with a progress bar. What was paid is added to the
    ledger, whatever ends the asking.

    Rows carry `id`, `sample` and `asked`, a hash of messages and images; a killed run asks nothing
    twice, and a reply to another text or image of the same id is no reply to this.
    """
    contents = {ask.id: content_of(ask.messages, ask.images) for ask in asks}
    wanted = {(ask.id, k): contents[ask.id] for ask in asks for k in ask.samples}
    with stage.appending(path) as file:
        stored = read_replies(path)
        rows = {
            key: row for row in stored
            if wanted.get(key := (row["id"], row["sample"])) == row["asked"]
        }  # fmt: skip
        left = [
            replace(ask, samples=missing) for ask in asks
            if (missing := tuple(k for k in ask.samples if (ask.id, k) not in rows))
        ]  # fmt: skip
        engine.proven, started, before = bool(stored), time.time(), Counter(engine.tally)
        bar = tqdm(total=len(wanted), initial=len(rows), desc=title, unit="answer")
        try:
            for replies in engine.answer(left, sampling):
                new = [{**to_row(cleaned(reply)), "asked": contents[reply.id]} for reply in replies]
                data.append_jsonl(file, map(sealed, new))
                rows |= {(row["id"], row["sample"]): row for row in new}
                spent = Counter(engine.tally) - before
                rate = (spent["tokens"] + spent["tokens out"]) / (time.time() - started)
                bar.set_postfix({"tokens/s": f"{rate:.0f}", **spent}, refresh=not new)
                bar.update(len(new))
        finally:
            bar.close()
            bill.record(path.parent, engine.spec, Counter(engine.tally) - before)
    return {(ask.id, k): rows[ask.id, k] for ask in asks for k in ask.samples}


def attempts_of(spec: str, sampling: Sampling) -> int:
    """How often what cannot be read is asked for: a greedy local engine would say the same again."""
    return 1 if checkpoint(spec) is not None and sampling.temperature == 0 else ATTEMPTS


def ask_until(engine: Engine, asks: list[Ask], attempts: int, enough: Callable[[dict], bool], sampling: Sampling, path: Path, to_row: Callable[[Reply], dict], title: str) -> dict[str, list[dict]]:
    """{ask id: its replies as rows, the last of them `enough`, or not even after all attempts}. Asks of one id are one.

    Attempts are samples of their own and go round by round, and what is settled is not asked again: the result is the same,
    for fewer requests.
    """
    by_id = {ask.id: ask for ask in asks}
    said: dict[str, list[dict]] = {key: [] for key in by_id}
    for attempt in range(attempts):
        left = [replace(by_id[key], samples=(attempt,)) for key, rows in said.items() if not (rows and enough(rows[-1]))]
        shown = title if attempt == 0 else f"{title}, attempt {attempt + 1}"
        for (key, _), row in (ask_all(engine, left, sampling, path, to_row, shown) if left else {}).items():
            said[key].append(row)
    return said


def reply_row(reply: Reply, spec: str) -> dict:
    """A reply as a row of rollouts.jsonl."""
    return {
        "id": reply.id, "sample": reply.sample, "engine": spec, "response": reply.text, "token_ids": reply.token_ids,
        "finish_reason": reply.finish_reason, "seed": reply.seed, "response_sha": data.response_hash(reply.text),
        "logp": reply.logp,
    }  # fmt: skip


def cleaned(reply: Reply) -> Reply:
    return replace(reply, text=clean(reply.text), reasoning=clean(reply.reasoning))


def clean(text: str) -> str:
    """Half a surrogate pair, which no file can hold, becomes U+FFFD; two that belong together become their character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def json_objects(reply: str) -> list[dict]:
    """The JSON objects that stand in a reply, in order, whatever surrounds them. Raises ValueError."""
    found, end, decoder = [], 0, json.JSONDecoder()
    for brace in re.finditer(r"\{", reply):
        if brace.start() < end:  # inside an object that has been read
            continue
        try:
            value, end = decoder.raw_decode(reply, brace.start())
            # escapes in the JSON may spell half a surrogate pair
            found.append(json.loads(clean(json.dumps(value, ensure_ascii=False))))
        except json.JSONDecodeError:
            continue
        except RecursionError:
            raise ValueError("the JSON of the reply is nested too deeply") from None
    return found


def read_object(reply: str, keys: Sequence[str]) -> dict:
    """The object of a reply that has all the keys, its own in lower case: the last one, or what it
    wraps. Raises ValueError if there is none, or if it wraps several that differ."""
    tops, wanted = json_objects(reply), {key.casefold() for key in keys}
    missing = sorted(keys)
    for top in reversed(tops):
        level = [top]
        while level:
            lowered = [{key.strip().casefold(): value for key, value in one.items()} for one in level]
            whole = [one for one in lowered if wanted <= one.keys()]
            if any(one[key] != whole[0][key] for one in whole for key in wanted):
                raise ValueError("it holds several objects that say different things")
            if whole:
                return whole[0]
            for one in lowered:
                missing = min(missing, [key for key in keys if key.casefold() not in one], key=len)
            inner = [value for one in level for value in one.values()]
            inner += [item for value in inner if isinstance(value, list) for item in value]
            level = [value for value in inner if isinstance(value, dict)]
    raise ValueError(f"key {missing[0]} is missing" if tops else "no JSON object in the reply")


# Yes or No, perhaps with a reason; a reason that takes it back, or half of it, is none
SAID = re.compile(r"(yes|no|true|false)\b\s*\.?(?:\s*[-–—:;.(](.*))?", re.S)
HEDGE = re.compile(r"\b(?:yes|no|mostly|partly|partially|somewhat|but|except|however|unclear)\b")


def read_yes_no(reply: str, keys: Sequence[str]) -> dict[str, bool]:
    """{key: bool} for each of the keys. Raises ValueError with the reason if the reply is anything
    else: keys and values may be in any case, and a value may be followed by its reason ("Yes - as
    seen"), but a prompt echoed ("Yes/No"), a missing key or another word is no judgement."""
    said, verdict = read_object(reply, keys), {}
    for key in keys:
        value = said[key.casefold()]
        match = SAID.fullmatch(str(value).strip().casefold())
        if not match or HEDGE.search(match[2] or ""):
            raise ValueError(f"{key} is {value!r}, neither Yes nor No")
        verdict[key] = match[1] in ("yes", "true")
    return verdict


def read_verdict(reply: dict, keys: Sequence[str]) -> tuple[dict[str, bool] | None, str | None]:
    """(criteria, None), or (None, why there are none). Only a finished reply is a verdict: one that was cut off may have been
    about to correct itself."""
    if reply["finish_reason"] != "stop":
        return None, f"the reply is not finished: {reply['finish_reason']}"
    try:
        return read_yes_no(reply["raw"], keys), None
    except ValueError as reason:
        return None, str(reason)


# ours: paper silent; of a verdict or a label, with room for an engine that thinks before its JSON
LABELLING = Sampling(temperature=0.0, top_p=1.0, max_tokens=4096)


def label_cost(
    role: str, spec: str, sizes: Iterable[tuple[int, int]], args: argparse.Namespace
) -> bill.Cost:
    """What verdicts or labels may cost at most; sizes: (characters, images) of each request."""
    attempts = attempts_of(spec, LABELLING)
    return bill.cost(role, spec, sizes, attempts, LABELLING.max_tokens, args.pixels)


def ask_yes_no(engine: Engine, asks: list[Ask], keys: Sequence[str], role: str, args: argparse.Namespace) -> dict[str, dict]:
    """{ask id: its last reply, as a row, for read_verdict}. What cannot be read is asked again, under the next sample's
    number, up to attempts_of times in all. Asks of one id are one."""

    def to_row(reply: Reply) -> dict:
        return {"id": reply.id, "sample": reply.sample, "raw": reply.text, "finish_reason": reply.finish_reason}

    sampling = replace(LABELLING, seed=args.seed)
    path = replies_file(args, role, engine.spec, sampling)
    said = ask_until(engine, asks, attempts_of(engine.spec, sampling), lambda row: read_verdict(row, keys)[0] is not None, sampling, path, to_row, f"{role}, {engine.spec}")
    return {key: rows[-1] for key, rows in said.items()}


def image_paths(question: data.Question, image_root: Path) -> list[Path]:
    """Raises RowError for an image that is not there."""
    paths = [data.image_file(image_root, image) for image in question.images]
    for path in paths:
        if not path.is_file():
            raise data.RowError(f"question {question.id}: image {path.relative_to(image_root)} is not below {image_root}; check --images")
    return paths


def question_asks(questions: list[data.Question], image_root: Path, samples: int) -> list[Ask]:
    """Each question as it is put to every engine: the paper's system prompt, the images, the question. Checks that every
    image is there before anything is asked. Raises RowError naming the first that is not."""
    return [Ask(q.id, data.prompt_messages(q), image_paths(q, image_root), tuple(range(samples))) for q in questions]


def prompt_ask(id: str, prompt: str, images: list[Path]) -> Ask:
    """A prompt about question `id`. The ask's own id is a hash of all that is asked, so that the same is never asked twice."""
    return Ask(f"{id}/{content_of(prompt, images)}", [{"role": "user", "content": prompt}], images, (0,))
