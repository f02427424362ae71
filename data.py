"""What a question, an answer and a supervised token are (paper §3, Appendix A), and the files they travel in.

The method's whole vocabulary is here, with nothing but the standard library:

    Question            stem, options, answer, images            -> questions.jsonl
    prompt_messages     question -> [system, user]               the paper's Appendix A, verbatim
    join_response       (thinking, answer) -> "<think> ... </think> <answer> ... </answer>"
    label_spans         characters of a response -> THINK / ANSWER / TAG, the spans that Stage I supervises
    read_jsonl ...      rows with errors that name file, line and key; append and resume; stage.json

    python data.py check FILE [FILE ...]      validates questions, demos, rollouts, verdicts or pairs

Where we depart from the paper, or it is silent:
  1. The paper shows no assistant turn; ours has the very form its system prompt asks for, spaces included.
  2. With options, the user turn ends in "Answer Choices:" as in the paper's Figure 7; without, it is open-ended.
"""

import argparse
import hashlib
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath

import flags

# paper App. A, the system turn of every training, rollout and evaluation prompt
SYSTEM_PROMPT = (
    "You are a helpful assistant. A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)
# paper App. A: what the judge says Yes or No to; the last four are the criteria of §3.3
JUDGED = ("Answer_Correctness", "Logical_Consistency", "Image_Analysis_Involvement", "No_Hallucination", "Reflection_Presence")
IMAGE_MARK = re.compile(r"<image\s+(\d+)>")  # how published questions name their images in the text
LETTERS = "ABCDEFGHIJ"  # ten options at most: MMMU-Pro, MedXpertQA-Text

# span labels of a token; 0 is not supervised. TAG holds the four tags and the end-of-turn token.
PROMPT, THINK, ANSWER, TAG = 0, 1, 2, 3
SPAN_NAMES = {THINK: "think", ANSWER: "answer", TAG: "tag"}


class RowError(SystemExit, ValueError):
    """A row that cannot be used; the text says where it is, what is wrong and what to do. Uncaught, a script ends with that
    text and exit code 1, without a traceback."""


def load_json(text: str | bytes, where: str):
    """The JSON value of a text. Raises RowError naming `where` for anything that is not JSON, for NaN and Infinity, for a
    key that an object has twice, for nesting too deep, and for half a surrogate pair, which no file can hold."""

    def unique(pairs: list[tuple]) -> dict:
        counts = Counter(key for key, _ in pairs)
        if len(counts) < len(pairs):
            raise ValueError(f"the key {counts.most_common(1)[0][0]!r} is there twice")
        return dict(pairs)

    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON number")

    def finite(number: str) -> float:
        return float(number) if math.isfinite(float(number)) else refuse(number)

    try:
        if isinstance(text, bytes):
            text = text.decode()
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
        if "\\u" in text:  # an escape may spell half a pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        message = f"holds half a surrogate pair ({half!r})"
    except RecursionError:
        message = "is nested too deeply"
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are such
        message = f"not JSON ({error})"
    raise RowError(f"{where}: {message}; remove it or write it again")


# ---------------------------------------------------------------------------------------------------------------
# Questions


@dataclass
class Question:
    """One question of the bank. `options` maps letters to texts and is empty for an open-ended question; `answer` is a
    letter, or the reference text if open-ended; `images` are paths relative to the run's image root."""

    question: str
    options: dict[str, str]
    answer: str
    images: list[str] = field(default_factory=list)
    source: str = ""
    meta: dict = field(default_factory=dict)
    id: str = ""

    def __post_init__(self):
        self.id = self.id or content_hash([self.question, self.options, self.answer, self.images])[:16]

    @classmethod
    def from_row(cls, row: dict, where: str) -> "Question":
        """A checked question. Raises RowError naming `where` and the key."""
        check_row({"source": "", "meta": {}, **row}, where, "questions")
        return cls(**{"source": "", "meta": {}, **row})

    def to_row(self) -> dict:
        row = asdict(self)
        return {"id": row.pop("id"), **row}

    def opened(self) -> "Question":
        """The question without its options (paper Fig. 8), under its own id; the answer is the right option's text."""
        return replace(self, options={}, answer=self.answer_text())

    def answer_text(self) -> str:
        return self.options[self.answer] if self.options else self.answer


# ours: the paper counts twelve imaging modalities and names radiology, pathology and optical coherence
# tomography. Name -> the words that stand for it. Those of the first table are told first: "CT
# angiography" is angiography.
MODALITIES = {
    "angiography": r"\w*angiogra\w*|venogra\w*|dsa",
    "nuclear medicine": r"nuclear|pet|spect|\w*scintigra\w*|bone scan|radionuclide",
    "ophthalmic imaging": r"\w*fund(?:us|oscop\w*)|octa?|optical coherence\b.*|slit lamp|retina\w*|ophthalm\w*",
    "endoscopy": r"\w*(?:endo|colono|broncho|laryngo|gastro|oto|laparo|cysto|colpo|arthro)scop\w*",
    "histopathology": r"histo\w*|patholog\w*|biops\w*|h ?&? ?e|immuno(?:histo|fluoresc)\w*",
    "electrical recording": r"e[ck]g|electro(?:cardio|encephalo|myo)\w*|eeg|emg|ctg|cardiotocogra\w*",
}, {
    "x-ray": r"x ?rays?|radiogra\w*|plain films?|mammogra\w*|fluoroscop\w*|barium|opg",
    "ct": r"cts?|cat scans?|computed tomogra\w*|computeri[sz]ed tomogra\w*|cbct|hrct",
    "mri": r"f?mri?s?|mrcp|magnetic resonance\b.*",
    "ultrasound": r"\w*ultraso\w*|sonogra\w*|doppler|echo\w*|us",
    "microscopy": r"\w*microscop\w*|\w*micrograph\w*|smears?|cytolog\w*|gram stain|bone marrow",
    "clinical photograph": r"photo(?:graph\w*|s)?|clinical images?|skin|dermatolog\w*|dermoscop\w*|gross\w*",
}  # fmt: skip


def modality(told: str) -> str:
    """The kind of image that a text tells in whatever words, one of MODALITIES; "other" where it
    names none, or two that are equally general."""
    words = " ".join(re.findall(r"[\w&]+", unicodedata.normalize("NFKC", told).casefold()))
    for table in MODALITIES:
        found = [name for name, known in table.items() if re.search(rf"\b(?:{known})(?!\w)", words)]
        if found:
            return found[0] if len(found) == 1 else "other"
    return "other"


def question_text(question: Question) -> str:
    """The user turn's text: the stem (patient information and question), then the options, as in the paper's Fig. 7."""
    if not question.options:
        return question.question
    choices = "\n".join(f"({letter}) {text}" for letter, text in question.options.items())
    return f"{question.question}\nAnswer Choices:\n{choices}"


def prompt_messages(question: Question) -> list[dict]:
    """The two turns before the response: the paper's system prompt and the question. Images go in front of the text."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question_text(question)}]


def parts_of(message: dict, images: int) -> list[dict]:
    """A turn's content as parts, {"type": "text", "text"} or {"type": "image"}. Where it is one text, the `images` still to be
    shown stand in front of it if the turn is the user's."""
    if isinstance(message["content"], list):
        return message["content"]
    return [{"type": "image"}] * (images if message["role"] == "user" else 0) + [{"type": "text", "text": message["content"]}]


# ---------------------------------------------------------------------------------------------------------------
# Responses: <think> ... </think> <answer> ... </answer>

RESPONSE = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.S)
TAGS = re.compile(r"</?(?:think|answer)>")


def join_response(thinking: str, answer: str) -> str:
    """The assistant turn of a demonstration. Raises ValueError if a part holds a tag of its own."""
    for part in (thinking, answer):
        if TAGS.search(part):
            raise ValueError(f"a tag inside a part of the response: {part[:80]!r}")
    return f"<think> {thinking.strip()} </think> <answer> {answer.strip()} </answer>"


def split_response(response: str) -> tuple[str, str] | None:
    """(thinking, answer) if the response is exactly one think block followed by one answer block, else None."""
    match = RESPONSE.fullmatch(response)
    if not match or any(TAGS.search(part) for part in match.groups()):
        return None
    return match[1].strip(), match[2].strip()


def label_spans(response: str, offsets: list[tuple[int, int]]) -> list[int]:
    """One label a token, by the character at which the token begins.

    offsets: (start, end) of each token in `response`, as a fast tokenizer returns them. The text between <think> and
    </think> is THINK, between <answer> and </answer> ANSWER, the tags themselves and whatever lies outside are TAG.
    A response without tags is all TAG: it is supervised, and reported under that name.
    """
    labels = [TAG] * len(response)
    inside, since = TAG, 0
    opens = {"<think>": THINK, "<answer>": ANSWER}
    closes = {"</think>": THINK, "</answer>": ANSWER}
    for tag in TAGS.finditer(response):
        if closes.get(tag[0]) == inside:
            labels[since : tag.start()] = [inside] * (tag.start() - since)
            inside = TAG
        elif tag[0] in opens and inside == TAG:
            inside, since = opens[tag[0]], tag.end()
    if inside != TAG:  # cut off inside a block
        labels[since:] = [inside] * (len(response) - since)
    return [labels[start] if start < len(labels) else TAG for start, _ in offsets]


WORDS = re.compile(r"\w+|[↑↓→←<>=≤≥≠±+]|(?<!\w)[-−](?=\d)")  # "↑ TSH" is not "↓ TSH", and "-2" is not "2"


def normalise(text: str) -> str:
    """Text for comparison: compatibility forms folded, lower case, words and signs with meaning, one space between."""
    return " ".join(WORDS.findall(unicodedata.normalize("NFKC", text).casefold()))


def answer_region(response: str) -> str | None:
    """The part of a response that may hold its answer: after the last </think>. None if the thinking was cut off."""
    if "</think>" in response:
        return response.rsplit("</think>", 1)[1]
    return None if "<think>" in response else response


def answer_block(response: str) -> str | None:
    """What stands in the last <answer> block after the thinking (a missing close is tolerated), or None if there is none."""
    region = answer_region(response)
    if region is None or "<answer>" not in region:
        return None
    return unicodedata.normalize("NFKC", region.rsplit("<answer>", 1)[1].split("</answer>", 1)[0]).strip()


# ---------------------------------------------------------------------------------------------------------------
# Files: JSON and JSONL that name their mistakes and survive a kill


def content_hash(value) -> str:
    """SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def response_hash(response: str) -> str:
    """A short hash of a response, by which verdicts name it."""
    return content_hash(response)[:16]


def sample_seed(seed: int, key: str, sample: int) -> int:
    """The random seed of sample k of a question: a hash, so it depends on nothing else (not on the batch, not on order)."""
    return int(content_hash([seed, key, sample])[:15], 16)


def need(row: dict, where: str, **types: type) -> None:
    """Raises RowError unless the row has each key with its type."""
    for key, kind in types.items():
        if key not in row:
            raise RowError(f"{where}: missing '{key}'; the row has {sorted(row)}")
        wanted = (int, float) if kind is float else kind
        if not isinstance(row[key], wanted) or (isinstance(row[key], bool) and kind is not bool):
            found = f"{type(row[key]).__name__} {str(row[key])[:60]!r}"
            raise RowError(f"{where}: {key}: expected {kind.__name__}, found {found}")


def open_file(path: str | Path):
    """A file to read, as bytes. Raises RowError where there is no regular file: a pipe would be waited for without end."""
    if not Path(path).exists():
        raise RowError(f"{path}: no such file; run the stage that writes it, or check the path")
    if not Path(path).is_file():
        raise RowError(f"{path}: is not a file")
    return open(path, "rb")


def read_json(path: str | Path):
    """The JSON value of a file. Raises RowError naming it."""
    with open_file(path) as file:
        return load_json(file.read(), str(path))


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict]]:
    """(where, row) for each line, where = "file:line". A torn last line (a writer was killed) is an error here;
    `resume_jsonl` mends it for the stage that writes the file."""
    with open_file(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row, where = load_json(line, f"{path}:{number}"), f"{path}:{number}"
            if not isinstance(row, dict):
                raise RowError(f"{where}: expected an object, found {type(row).__name__}")
            yield where, row


def unfinished(path: Path) -> Path:
    """The name under which a file is written: hidden, so that it is nobody's own."""
    return path.with_name(f".{path.name}.tmp")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> int:
    """Writes all rows under a temporary name and renames: a reader sees the whole file or none. Returns the count."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(path)
    count = 0
    with open(temporary, "w", encoding="utf-8") as file:
        for count, row in enumerate(rows, 1):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    return count


def write_text(path: str | Path, text: str) -> None:
    """Writes under a temporary name and renames."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = unfinished(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: str | Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def resume_jsonl(path: str | Path) -> list[dict]:
    """The finished rows of a file that is appended to. A torn last line is cut off, so that its row is done again."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        print(f"{path}: dropped a torn last line of {len(content) - len(whole)} bytes; its row is done again")
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return [row for _, row in read_jsonl(path)]


def jsonl_text(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_jsonl(file, rows: Iterable[dict]) -> None:
    """Appends rows to an open text file and pushes them out of this process, so that a kill loses none of them."""
    file.write(jsonl_text(rows))
    file.flush()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes. Raises RowError where there is no file. A process reads a file once for each size and mtime."""
    with open_file(path) as file:
        stat = os.fstat(file.fileno())
        key = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns)
        if key not in HASHES:
            HASHES[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return HASHES[key]


HASHES: dict[tuple[str, int, int], str] = {}  # (path, size, mtime in ns) -> SHA-256


def is_inside(path) -> bool:
    """Whether a name is a path that stays inside the folder it is relative to."""
    return isinstance(path, str) and bool(path.strip("./ ")) and "\0" not in path and not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts


def image_file(image_root: str | Path, image: str) -> Path:
    """Where an image of a row lies. Raises RowError for a path that leaves the image root."""
    if not is_inside(image):
        raise RowError(f"image {image!r}: must be a path inside the image root, without '..'")
    return Path(image_root) / image


def image_files(image_root: str | Path, rows: Iterable[dict]) -> list[Path]:
    """Where the images of all rows lie, whether they are there or not."""
    return [image_file(image_root, image) for row in rows for image in row["images"]]


# ---------------------------------------------------------------------------------------------------------------
# One schema for each kind of row

Rule = tuple[str, Callable[[object], bool]]  # what a value must be, in words and as a test
FINISH_REASONS = ("stop", "length", "overlong", "blocked", "refused", "empty")  # asking.Reply says what they mean


def is_turn(turn) -> bool:
    return isinstance(turn, dict) and turn.keys() == {"role", "content"} and turn["role"] in ("system", "user", "assistant") and isinstance(turn["content"], str)


ANY: Rule = ("anything", lambda value: True)
TEXT: Rule = ("a text", lambda value: isinstance(value, str))
FILLED: Rule = ("a text that is not empty", lambda value: isinstance(value, str) and bool(value.strip()))
WHOLE: Rule = ("a whole number of 0 or more", lambda value: type(value) is int and value >= 0)
TRUTH: Rule = ("true or false", lambda value: type(value) is bool)
OBJECT: Rule = ("an object", lambda value: isinstance(value, dict))
NAMES: Rule = ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value))
IMAGES: Rule = ("a list of paths inside the image root, without '..'", lambda value: isinstance(value, list) and all(map(is_inside, value)))
OPTIONS: Rule = (
    "an object of two to ten texts with the letters A, B, C ... in order, or {}",
    lambda value: isinstance(value, dict) and len(value) != 1
    and list(value) == list(LETTERS[: len(value)]) and all(map(FILLED[1], value.values())),
)  # fmt: skip
TURNS: Rule = ("a list of turns, each with a role and a content that is a text, the last one the user's", lambda value: isinstance(value, list) and value != [] and all(map(is_turn, value)) and value[-1]["role"] == "user")
DEMO: Rule = ("three turns of system, user, assistant", lambda value: isinstance(value, list) and all(map(is_turn, value)) and [turn["role"] for turn in value] == ["system", "user", "assistant"])
TOKENS: Rule = ("a list of token ids, or null", lambda value: value is None or (isinstance(value, list) and all(WHOLE[1](token) and token < 2**31 for token in value)))
NUMBER: Rule = ("a number, or null", lambda value: value is None or type(value) in (int, float))
NUMBERS: Rule = (
    "a list of numbers",
    lambda value: isinstance(value, list) and all(type(one) in (int, float) for one in value),
)
META: Rule = ("an object, with a list of texts under 'answers' if there is one", lambda value: isinstance(value, dict) and NAMES[1](value.get("answers", [])))
VERDICT: Rule = (
    f"null, or true or false for each of {', '.join(JUDGED)}",
    lambda value: value is None
    or (isinstance(value, dict) and value.keys() == set(JUDGED) and all(type(met) is bool for met in value.values())),
)  # fmt: skip
CHOICE: Rule = ("a text, or null", lambda value: value is None or isinstance(value, str))
FINISH: Rule = (f"one of {', '.join(FINISH_REASONS)}", lambda value: value in FINISH_REASONS)


@dataclass(frozen=True)
class Kind:
    """What a row of one kind of file holds: keys that it must have, keys that it may have, and what no two rows share."""

    required: dict[str, Rule]
    optional: dict[str, Rule]
    unique: Callable[[dict], object]


KINDS = {
    "questions": Kind(
        {"id": FILLED, "question": FILLED, "options": OPTIONS, "answer": FILLED, "images": IMAGES}, {"source": TEXT, "meta": META},
        lambda row: row["id"],
    ),
    "demos": Kind(
        {"id": FILLED, "messages": DEMO, "images": IMAGES},
        {"sample": WHOLE, "teacher": TEXT, "checks": OBJECT, "expander": TEXT, "checker": TEXT, "review": TEXT, "meta": OBJECT},
        lambda row: (row["id"], row["messages"][-1]["content"]),
    ),
    "rollouts": Kind(
        {"id": FILLED, "sample": WHOLE, "response": TEXT, "token_ids": TOKENS, "finish_reason": FINISH, "response_sha": TEXT},
        {
            "engine": TEXT, "seed": WHOLE, "asked": TEXT, "reasoning": TEXT,
            "extracted": CHOICE, "correct": TRUTH, "official": CHOICE, "official_correct": TRUTH,
            "logp": NUMBER, "token_logps": NUMBERS,
        },
        lambda row: (row["id"], row["sample"]),
    ),
    "verdicts": Kind(
        {"id": FILLED, "sample": WHOLE, "response_sha": TEXT, "criteria": VERDICT, "verdict_sha": TEXT},
        {"error": CHOICE, "judge": TEXT, "raw": TEXT}, lambda row: (row["id"], row["sample"]),
    ),
    "pairs": Kind(
        {"id": FILLED, "prompt": TURNS, "images": IMAGES, "chosen": FILLED, "rejected": FILLED, "failed": NAMES},
        {
            f"{side}_{key}": rule for side in ("chosen", "rejected")
            for key, rule in (
                ("sample", WHOLE), ("token_ids", TOKENS), ("verdict", TEXT),
                ("logp", NUMBER), ("token_logps", NUMBERS),
            )
        },
        lambda row: (row["id"], row["chosen"], row["rejected"]),
    ),
    "key": Kind({"case": FILLED, "id": FILLED, "response_sha": TEXT}, {}, lambda row: row["case"]),
    "metrics": Kind({"step": WHOLE, "loss": ("a number", lambda value: type(value) in (int, float))}, {}, lambda row: row["step"]),
}  # fmt: skip
# the key that only rows of a kind have, in this order: a loss names its own figures, "chosen" among them
TOLD_BY = {"metrics": "step", "key": "case", "pairs": "chosen", "demos": "messages", "verdicts": "verdict_sha", "rollouts": "response"}


def kind_of(row: dict) -> str:
    return next((kind for kind, key in TOLD_BY.items() if key in row), "questions")


def kind_of_file(path: str | Path) -> str:
    """A file holds one kind of row: its first row's."""
    return next((kind_of(row) for _, row in read_jsonl(path)), "questions")


def check_row(row: dict, where: str, kind: str) -> None:
    """Raises RowError, naming `where` and the key, unless a row is a whole row of its kind and nothing else."""
    if (found := kind_of(row)) != kind:
        raise RowError(f"{where}: this is a row of {found}, expected {kind}")
    schema = KINDS[kind]
    known = schema.required | schema.optional
    if missing := [key for key in schema.required if key not in row]:
        raise RowError(f"{where}: missing '{missing[0]}'; the row has {sorted(row)}")
    if kind != "metrics" and (strange := [key for key in row if key not in known]):  # a loss names its own figures
        raise RowError(f"{where}: {strange[0]}: is no key of {kind}; known are {', '.join(known)}")
    for key, (wanted, holds) in known.items():
        if key in row and not holds(row[key]):
            raise RowError(f"{where}: {key}: expected {wanted}, found {str(row[key])[:80]!r}")
    if kind == "questions" and row["options"] and row["answer"] not in row["options"]:
        raise RowError(f"{where}: answer: {row['answer']!r} is not among the options {list(row['options'])}")
    if kind == "demos" and split_response(row["messages"][2]["content"]) is None:
        raise RowError(f"{where}: messages: the assistant turn is not one <think> block followed by one <answer> block")
    if kind == "pairs" and row["chosen"] == row["rejected"]:
        raise RowError(f"{where}: rejected: is the same text as chosen; a pair must differ")
    if kind == "rollouts" and row["response_sha"] != response_hash(row["response"]):
        raise RowError(f"{where}: response_sha: {row['response_sha']!r} is not the hash of the response")


def checked_rows(path: str | Path, kind: str) -> Iterator[dict | RowError]:
    """Every row of a file, or what is wrong with it: rows of `kind`, no two of them the same, one at least."""
    count, seen = 0, {}
    for count, (where, row) in enumerate(read_jsonl(path), 1):
        try:
            check_row(row, where, kind)
            same = KINDS[kind].unique(row)
            if seen.setdefault(same, where) != where:
                raise RowError(f"{where}: {str(same)[:80]!r} is already on {seen[same]}; remove one of the rows")
            yield row
        except RowError as error:
            yield error
    if not count:
        yield RowError(f"{path}: no row in it; look at what the stage that writes {kind} printed")


def read_rows(path: str | Path, kind: str) -> list[dict]:
    """Every row of a file of one kind ("demos", "pairs", ...), checked before anything is done with any of them. Raises the
    first RowError."""
    rows = []
    for row in checked_rows(path, kind):
        if isinstance(row, RowError):
            raise row
        rows.append(row)
    return rows


def read_questions(path: str | Path) -> list[Question]:
    """Every question of a file, checked."""
    return [Question(**row) for row in read_rows(path, "questions")]


def some(questions: Iterable[Question], limit: int) -> list[Question]:
    """So many text and so many image questions, drawn by their ids alone, in their order; all for 0."""
    questions = list(questions)
    if not limit:
        return questions
    drawn = sorted(questions, key=lambda question: content_hash(question.id))
    shown, told = ([q for q in drawn if bool(q.images) == kind] for kind in (True, False))
    kept = {question.id for question in shown[:limit] + told[:limit]}
    return [question for question in questions if question.id in kept]


def read_metrics(folder: str | Path) -> list[dict]:
    """The steps of a training run: loss and figures, one row a step."""
    return read_rows(Path(folder) / "metrics.jsonl", "metrics")


# ---------------------------------------------------------------------------------------------------------------
# python data.py check FILE


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check the project's JSONL files.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="validate every row; names file, line and key of each mistake")
    check.add_argument("files", nargs="+")
    args = parser.parse_args(argv)
    mistakes = 0
    for path in args.files:
        good, kind = 0, "questions"
        try:
            kind = kind_of_file(path)
            for row in checked_rows(path, kind):
                good += not isinstance(row, RowError)
                if isinstance(row, RowError):
                    mistakes += 1
                    print(row)
        except RowError as error:  # from here on the file cannot be read
            mistakes += 1
            print(error)
        print(f"{path}: {good} {kind}" if good else f"{path}: no valid row")
    print(f"{mistakes} mistakes")
    return 1 if mistakes else 0


if __name__ == "__main__":
    flags.run_script(main)
