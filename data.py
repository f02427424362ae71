"""What a question, an answer and a supervised token are (paper 3, App. A); JSON and JSONL files.

The vocabulary of the method, with nothing but the standard library:

    Question          stem, options, answer, images      -> questions.jsonl
    prompt_messages   question -> [system, user]         the paper's Appendix A, verbatim
    join_response     (thinking, answer) -> "<think> ... </think> <answer> ... </answer>"
    label_spans       characters of a response -> THINK, ANSWER or TAG: what Stage I supervises
    read_jsonl ...    rows whose errors name file, line and key; append and resume

Where we depart from the paper, or it is silent:
  1. The paper shows no assistant turn; ours has the form that its system prompt asks for.
  2. With options, the user turn is the stem, "Answer Choices:" and a line for each option, as in
     the paper's Figure 7; without, the question is open-ended.
"""

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath

from command.flags import UserError

# paper App. A, the system turn of every training, rollout and evaluation prompt
SYSTEM_PROMPT = (
    "You are a helpful assistant. A conversation between User and Assistant. The user asks a "
    "question, and the Assistant solves it. The assistant first thinks about the reasoning process "
    "in the mind and then provides the user with the answer. The reasoning process and answer are "
    "enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>."
)
# paper App. A: what the judge says Yes or No to; the last four are the criteria of §3.3
JUDGED = (
    "Answer_Correctness",
    "Logical_Consistency",
    "Image_Analysis_Involvement",
    "No_Hallucination",
    "Reflection_Presence",
)
IMAGE_MARK = re.compile(r"<image\s+(\d+)>")  # how published questions name their images in the text
LETTERS = "ABCDEFGHIJ"  # ten options at most: MMMU-Pro, MedXpertQA-Text

# Span labels of a token; 0 is not supervised. TAG is the tags, the end of the turn, text outside of
# both spans, and in Stage II every token of a chain, since no loss there needs its spans.
PROMPT, THINK, ANSWER, TAG = 0, 1, 2, 3
SPAN_NAMES = {THINK: "think", ANSWER: "answer", TAG: "tag"}


class RowError(UserError):
    """A row or a file that cannot be used; the text says where, what is wrong and what to do."""


def load_json(text: str | bytes, where: str):
    """The JSON value of a text. Raises RowError naming `where` for anything that is not JSON, for
    NaN and Infinity, a key that an object has twice, nesting too deep, and half a surrogate pair,
    which no file can hold."""

    def unique(pairs: list[tuple]) -> dict:
        row = {}
        for key, value in pairs:
            if key in row:
                raise ValueError(f"the key {key!r} is there twice")
            row[key] = value
        return row

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ValueError(f"{number} is no JSON number")
        return float(number)

    try:
        text = text.decode() if isinstance(text, bytes) else text
        strict = {"object_pairs_hook": unique, "parse_constant": finite, "parse_float": finite}
        value = json.loads(text, **strict)
        if "\\u" in text:  # an escape may spell half a pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        fault = f"holds half a surrogate pair ({error.object[error.start : error.end]!r})"
    except RecursionError:
        fault = "is nested too deeply"
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are such
        fault = f"not JSON ({error})"
    raise RowError(f"{where}: {fault}; remove it or write it again")


# --------------------------------------------------------------------------------------------------
# Questions


@dataclass
class Question:
    """One question. options: letter -> text, empty for an open-ended question; answer: a letter, or
    the reference text if open-ended; images: paths relative to the image root."""

    question: str
    options: dict[str, str]
    answer: str
    images: list[str] = field(default_factory=list)
    source: str = ""
    meta: dict = field(default_factory=dict)
    id: str = ""

    def __post_init__(self):
        content = [self.question, self.options, self.answer, self.images]
        self.id = self.id or content_hash(content)[:16]

    def to_row(self) -> dict:
        row = asdict(self)
        return {"id": row.pop("id"), **row}

    def opened(self) -> "Question":
        """The question without its options (paper Fig. 8), under its own id; the answer is the
        right option's text."""
        return replace(self, options={}, answer=self.answer_text())

    def answer_text(self) -> str:
        return self.options[self.answer] if self.options else self.answer

    def written_answer(self) -> str:
        """The answer as in the paper's figures, "B. MRI", or an open-ended question's reference."""
        return f"{self.answer}. {self.answer_text()}" if self.options else self.answer


def question_text(question: Question) -> str:
    """The user turn: stem (patient and question), then options, as in the paper's Fig. 7."""
    if not question.options:
        return question.question
    choices = "\n".join(f"({letter}) {text}" for letter, text in question.options.items())
    return f"{question.question}\nAnswer Choices:\n{choices}"


def prompt_messages(question: Question) -> list[dict]:
    """The two turns before the response. Images go in front of the user turn's text."""
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question_text(question)},
    ]


def parts_of(message: dict, images: int) -> list[dict]:
    """A turn's content as parts, {"type": "text", "text"} or {"type": "image"}. images: how many no
    earlier turn has shown; where the user's content is one text, they stand in front of it."""
    if isinstance(message["content"], list):
        return message["content"]
    shown = [{"type": "image"}] * (images if message["role"] == "user" else 0)
    return [*shown, {"type": "text", "text": message["content"]}]


# --------------------------------------------------------------------------------------------------
# Responses: <think> ... </think> <answer> ... </answer>

RESPONSE = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.S)
TAGS = re.compile(r"</?(?:think|answer)>")
# a block, or its beginning in a response that was cut off
BLOCK = re.compile(r"<(think|answer)>(.*?)(?:</\1>|\Z)", re.S)


def join_response(thinking: str, answer: str) -> str:
    """The assistant turn of a demonstration. Raises ValueError if a part holds a tag of its own."""
    for part in (thinking, answer):
        if TAGS.search(part):
            raise ValueError(f"a tag inside a part of the response: {part[:80]!r}")
    return f"<think> {thinking.strip()} </think> <answer> {answer.strip()} </answer>"


def split_response(response: str) -> tuple[str, str] | None:
    """(thinking, answer) of a response of one think block, then one answer block; else None."""
    match = RESPONSE.fullmatch(response)
    if not match or any(TAGS.search(part) for part in match.groups()):
        return None
    return match[1].strip(), match[2].strip()


def label_spans(response: str, starts: Iterable[int]) -> list[int]:
    """One label a token, by the character at which the token begins.

    The text of a <think> block is THINK, of an <answer> block ANSWER; the tags and all else are
    TAG. So a response without tags is all TAG: it is supervised.
    """
    labels = [TAG] * (len(response) + 1)  # the end of the turn may begin behind the text
    for block in BLOCK.finditer(response):
        start, end = block.span(2)
        labels[start:end] = [THINK if block[1] == "think" else ANSWER] * (end - start)
    return [labels[start] for start in starts]


# "↑ TSH" is not "↓ TSH", and "-2" is not "2"
WORDS = re.compile(r"\w+|[↑↓→←<>=≤≥≠±+]|(?<!\w)[-−](?=\d)")


def normalise(text: str) -> str:
    """Text for comparison: NFKC, lower case, words and signs with one space between."""
    return " ".join(WORDS.findall(unicodedata.normalize("NFKC", text).casefold()))


def answer_region(response: str) -> str | None:
    """The part of a response that may hold its answer: after the last </think>. None for a response
    that was cut off while thinking."""
    if "</think>" in response:
        return response.rsplit("</think>", 1)[1]
    return None if "<think>" in response else response


def answer_block(response: str) -> str | None:
    """The last <answer> block after the thinking, or None. Its end tag may be missing."""
    region = answer_region(response)
    if region is None or "<answer>" not in region:
        return None
    block = region.rsplit("<answer>", 1)[1].split("</answer>", 1)[0]
    return unicodedata.normalize("NFKC", block).strip()


# --------------------------------------------------------------------------------------------------
# Files: JSON and JSONL that name their mistakes and survive a kill


def content_hash(value) -> str:
    """SHA-256 of a JSON value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def response_hash(response: str) -> str:
    """A short hash of a response, by which verdicts name it."""
    return content_hash(response)[:16]


def sample_seed(seed: int, key: str, sample: int) -> int:
    """The seed of sample k of a question: a hash, so that batch and order do not change it."""
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
    """A file to read, as bytes. Raises RowError if it is no regular file: a pipe may not end."""
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
    """(where, row) for each line, where = "file:line". A last line that is cut inside its JSON, by
    a kill, is an error here; `resume_jsonl` removes it for the stage that writes the file."""
    with open_file(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            row = load_json(line, where)
            if not isinstance(row, dict):
                raise RowError(f"{where}: expected an object, found {type(row).__name__}")
            yield where, row


def unfinished(path: Path) -> Path:
    """The hidden name under which a file is written before it is renamed."""
    return path.with_name(f".{path.name}.tmp")


def json_lines(rows: Iterable[dict]) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Writes under a temporary name and renames: a reader sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(unfinished(path), "w", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(unfinished(path), path)


def write_text(path: str | Path, text: str) -> None:
    write_lines(path, [text])


def write_json(path: str | Path, value) -> None:
    write_lines(path, [json.dumps(value, indent=1, ensure_ascii=False), "\n"])


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    write_lines(path, json_lines(rows))


def resume_jsonl(path: str | Path) -> list[dict]:
    """The finished rows of a file that is appended to. A torn last line is cut off: its row is done
    again."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if torn := len(content) - whole:
        print(f"{path}: dropped a torn last line of {torn} bytes; its row is done again")
        os.truncate(path, whole)
    return [row for _, row in read_jsonl(path)]


def append_jsonl(file, rows: Iterable[dict]) -> None:
    """Appends rows to an open text file and flushes it, so that a kill loses none of them."""
    file.writelines(json_lines(rows))
    file.flush()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes; a process reads a file once for each size and mtime."""
    with open_file(path) as file:
        stat = os.fstat(file.fileno())
        key = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns)
        if key not in HASHES:
            HASHES[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return HASHES[key]


HASHES: dict[tuple[str, int, int], str] = {}  # (path, size, mtime in ns) -> SHA-256


def is_inside(path) -> bool:
    """Whether a name is a path that stays inside the folder it is relative to."""
    if not isinstance(path, str) or "\0" in path or not path.strip("./ "):
        return False
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts


def image_file(image_root: str | Path, image: str) -> Path:
    """Where an image of a row lies. Raises RowError for a path that leaves the image root."""
    if not is_inside(image):
        raise RowError(f"image {image!r}: must be a path inside the image root, without '..'")
    return Path(image_root) / image


def image_files(image_root: str | Path, rows: Iterable[dict]) -> list[Path]:
    """Where the images of all rows lie, whether they are there or not."""
    return [image_file(image_root, image) for row in rows for image in row["images"]]


def draw(questions: Iterable[Question], limit: int) -> list[Question]:
    """At most `limit` text and `limit` image questions, drawn by a hash of their ids; 0: all."""
    questions = list(questions)
    if not limit:
        return questions
    drawn = sorted(questions, key=lambda question: content_hash(question.id))
    text = [question.id for question in drawn if not question.images]
    image = [question.id for question in drawn if question.images]
    kept = {*text[:limit], *image[:limit]}
    return [question for question in questions if question.id in kept]
