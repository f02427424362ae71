"""One strict schema for each kind of row that the stages exchange, and the readers that check it.

    read_rows(path, kind)    all rows of a file, or the first mistake
    python -m report check demos.jsonl pairs.jsonl
                             every mistake of every file

A mistake is reported by file, line and key.

Where we depart from the paper, or it is silent: it describes no file.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import data
from data import Question, RowError

ROLES = ("system", "user", "assistant")
# engines.inference.Completion says what they mean
FINISH_REASONS = ("stop", "length", "overlong", "blocked", "refused", "empty")


# --------------------------------------------------------------------------------------------------
# What a value must be


def is_text(value) -> bool:
    return isinstance(value, str)


def is_filled(value) -> bool:
    return is_text(value) and bool(value.strip())


def is_whole(value) -> bool:
    return type(value) is int and value >= 0


def is_number(value) -> bool:
    return type(value) in (int, float)  # bool is no number


def is_list(value, holds: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(holds, value))


def is_turn(turn) -> bool:
    held = isinstance(turn, dict) and turn.keys() == {"role", "content"}
    return held and turn["role"] in ROLES and is_text(turn["content"])


Rule = tuple[str, Callable[[object], bool]]  # what a value must be, in words and as a test


def list_of(words: str, holds: Callable[[object], bool]) -> Rule:
    return f"a list of {words}", lambda value: is_list(value, holds)


def or_null(rule: Rule) -> Rule:
    words, holds = rule
    return f"{words}, or null", lambda value: value is None or holds(value)


TEXT: Rule = ("a text", is_text)
FILLED: Rule = ("a text that is not empty", is_filled)
WHOLE: Rule = ("a whole number of 0 or more", is_whole)
NUMBER: Rule = ("a number", is_number)
TRUTH: Rule = ("true or false", lambda value: type(value) is bool)
OBJECT: Rule = ("an object", lambda value: isinstance(value, dict))
FINISH: Rule = (f"one of {', '.join(FINISH_REASONS)}", lambda value: value in FINISH_REASONS)
NAMES, NUMBERS = list_of("texts", is_text), list_of("numbers", is_number)
TOKENS = list_of("token ids", lambda value: is_whole(value) and value < 2**31)
IMAGES = list_of("paths inside the image root, without '..'", data.is_inside)


def is_shown(value) -> bool:
    """What looking.py may show in place of a question's images."""
    arms = list(value.values()) if isinstance(value, dict) else [None]
    return all(
        isinstance(arm, dict)
        and is_list(arm.get("images"), data.is_inside)
        and is_text(arm.get("answer", ""))
        for arm in arms
    )


META: Rule = (
    "an object; in it, if they are there, 'answers' is a list of texts, and 'shown' has for each "
    "name an object with 'images', paths inside the image root, and 'answer', a letter",
    lambda value: (
        isinstance(value, dict)
        and is_list(value.get("answers", []), is_text)
        and is_shown(value.get("shown", {}))
    ),
)
OPTIONS: Rule = (
    "an object of two to ten texts with the letters A, B, C ... in order, or {}",
    lambda value: isinstance(value, dict) and len(value) != 1
    and list(value) == list(data.LETTERS[: len(value)]) and all(map(is_filled, value.values())),
)  # fmt: skip
TURNS: Rule = (
    "a list of turns, each with a role and a content that is a text, the last one the user's",
    lambda value: is_list(value, is_turn) and value != [] and value[-1]["role"] == "user",
)
DEMO: Rule = (
    "three turns of system, user, assistant",
    lambda value: is_list(value, is_turn) and [turn["role"] for turn in value] == list(ROLES),
)
VERDICT: Rule = (
    f"null, or true or false for each of {', '.join(data.JUDGED)}",
    lambda value: value is None or isinstance(value, dict) and value.keys() == set(data.JUDGED)
    and all(type(met) is bool for met in value.values()),
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of row: its required keys, its optional keys, and what no two rows share."""

    required: dict[str, Rule]
    optional: dict[str, Rule]
    unique: Callable[[dict], object]


KINDS = {
    "questions": Kind(
        {"id": FILLED, "question": FILLED, "options": OPTIONS, "answer": FILLED, "images": IMAGES},
        {"source": TEXT, "meta": META},
        lambda row: row["id"],
    ),
    "demos": Kind(
        {"id": FILLED, "messages": DEMO, "images": IMAGES},
        {
            "sample": WHOLE, "teacher": TEXT, "checks": OBJECT, "expander": TEXT, "checker": TEXT,
            "review": TEXT, "meta": OBJECT,
        },
        lambda row: (row["id"], row["messages"][-1]["content"]),
    ),
    "rollouts": Kind(
        {
            "id": FILLED, "sample": WHOLE, "response": TEXT, "token_ids": or_null(TOKENS),
            "finish_reason": FINISH, "response_sha": TEXT,
        },
        {
            "engine": TEXT, "seed": WHOLE, "asked": TEXT, "reasoning": TEXT,
            "extracted": or_null(TEXT), "correct": TRUTH, "official": or_null(TEXT),
            "official_correct": TRUTH, "logp": or_null(NUMBER), "token_logps": NUMBERS,
        },
        lambda row: (row["id"], row["sample"]),
    ),
    "verdicts": Kind(
        {
            "id": FILLED, "sample": WHOLE, "response_sha": TEXT, "criteria": VERDICT,
            "verdict_sha": TEXT,
        },
        {"error": or_null(TEXT), "judge": TEXT, "raw": TEXT},
        lambda row: (row["id"], row["sample"]),
    ),
    "pairs": Kind(
        {
            "id": FILLED, "prompt": TURNS, "images": IMAGES, "chosen": FILLED, "rejected": FILLED,
            "failed": NAMES,
        },
        {
            f"{side}_{key}": rule for side in ("chosen", "rejected")
            for key, rule in (
                ("sample", WHOLE), ("token_ids", or_null(TOKENS)), ("verdict", TEXT),
                ("logp", or_null(NUMBER)), ("token_logps", NUMBERS),
            )
        },
        lambda row: (row["id"], row["chosen"], row["rejected"]),
    ),
    "key": Kind({"case": FILLED, "id": FILLED, "response_sha": TEXT}, {}, lambda row: row["case"]),
    "metrics": Kind({"step": WHOLE, "loss": NUMBER}, {}, lambda row: row["step"]),
}  # fmt: skip
# the key that tells a kind, tried in this order: metrics may have any key, also "chosen"
KIND_KEYS = {
    "metrics": "step", "key": "case", "pairs": "chosen", "demos": "messages",
    "verdicts": "verdict_sha", "rollouts": "response",
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Checking and reading


def kind_of(row: dict) -> str:
    return next((kind for kind, key in KIND_KEYS.items() if key in row), "questions")


def kind_of_file(path: str | Path) -> str:
    """The kind of a file's first row; a file holds one kind."""
    return next((kind_of(row) for _, row in data.read_jsonl(path)), "questions")


def faults(row: dict, kind: str) -> Iterator[str]:
    """What is wrong with a row. Only the first fault counts: a later one relies on what the earlier
    ones did not find."""
    schema = KINDS[kind]
    known = schema.required | schema.optional
    if (found := kind_of(row)) != kind:
        yield f"this is a row of {found}, expected {kind}"
    for key in schema.required:
        if key not in row:
            yield f"missing '{key}'; the row has {sorted(row)}"
    for key in row:
        if key not in known and kind != "metrics":  # a training step has any figures
            yield f"{key}: is no key of {kind}; known are {', '.join(known)}"
    for key, (wanted, holds) in known.items():
        if key in row and not holds(row[key]):
            yield f"{key}: expected {wanted}, found {str(row[key])[:80]!r}"
    if kind == "questions" and row["options"] and row["answer"] not in row["options"]:
        yield f"answer: {row['answer']!r} is not among the options {list(row['options'])}"
    if kind == "demos" and data.split_response(row["messages"][2]["content"]) is None:
        yield "messages: the assistant turn is not a <think> block followed by an <answer> block"
    if kind == "pairs" and row["chosen"] == row["rejected"]:
        yield "rejected: is the same text as chosen; a pair must differ"
    if kind == "rollouts" and row["response_sha"] != data.response_hash(row["response"]):
        yield f"response_sha: {row['response_sha']!r} is not the hash of the response"


def check_row(row: dict, where: str, kind: str) -> None:
    """Raises RowError, naming `where` and the key, unless the row is valid for its kind."""
    for fault in faults(row, kind):
        raise RowError(f"{where}: {fault}")


def checked_rows(
    path: str | Path, kind: str, mistakes: list[RowError] | None = None
) -> Iterator[dict]:
    """The rows of a file one by one: at least one, all of `kind`, all different. Raises the first
    RowError, or leaves bad rows out and adds every error to `mistakes`."""
    count, seen = 0, {}
    for count, (where, row) in enumerate(data.read_jsonl(path), 1):
        try:
            check_row(row, where, kind)
            same = KINDS[kind].unique(row)
            if (first := seen.setdefault(same, where)) != where:
                twice = f"{str(same)[:80]!r} is already on {first}; remove one of the rows"
                raise RowError(f"{where}: {twice}")
        except RowError as error:
            if mistakes is None:
                raise
            mistakes.append(error)
        else:
            yield row
    if not count:
        raise RowError(f"{path}: no row in it; look at what the stage that writes {kind} printed")


def read_rows(path: str | Path, kind: str) -> list[dict]:
    """Every row of a file of one kind ("demos", "pairs", ...), checked."""
    return list(checked_rows(path, kind))


def question_from(row: dict, where: str) -> Question:
    """A checked question. Raises RowError naming `where` and the key."""
    whole = {"source": "", "meta": {}, **row}
    check_row(whole, where, "questions")
    return Question(**whole)


def read_questions(path: str | Path) -> list[Question]:
    """Every question of a file, checked."""
    return [Question(**row) for row in read_rows(path, "questions")]


def read_metrics(folder: str | Path) -> list[dict]:
    """The steps of a training run: loss and figures, one row a step."""
    return read_rows(Path(folder) / "metrics.jsonl", "metrics")


def check(args: argparse.Namespace) -> int:
    """`python -m report check`: prints every mistake of every file."""
    count = 0
    for path in args.files:
        mistakes, good, kind = [], 0, "questions"
        try:
            kind = kind_of_file(path)
            for _ in checked_rows(path, kind, mistakes):
                good += 1
        except RowError as error:  # the rest of the file cannot be read
            mistakes.append(error)
        count += len(mistakes)
        print(*mistakes, f"{path}: {good} {kind}" if good else f"{path}: no valid row", sep="\n")
    print(f"{count} mistakes")
    return 1 if count else 0
