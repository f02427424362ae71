"""What tells what an image shows is taken out of a question's text, so that only looking answers it (paper §3.3).

    text, removed passages = an engine's reply;      taken  iff  nothing else is lost and nothing is new

An edit that breaks a rule (a figure reference, a number, a negation or a side lost, a vital sign removed, words lost that it
does not own up to, words moved, ...) is not taken: the question stays as it is, is marked meta.needs_review and listed in
review.csv. A human's text, from that file with its question column corrected (or its fault emptied: it may stay), goes before
the engine's; an untouched row goes on waiting. Options, answer and id are never touched, and meta.original keeps the
text as it first was. The step itself, with its requests, is `curate.py describe`.

Where we depart from the paper, or it is silent: it has GPT-4o and humans remove descriptions, and tells neither prompt nor
rules; these are ours.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path

import data
from asking import read_object

MENDED = 3  # ours: paper silent; words that mending a sentence may add or lose without owning up to it

EDIT_PROMPT = """You are given the text of a medical exam question and the images that belong to it. Take out of the text whatever tells what these images show, so that the question can be answered only by looking at them.

- Take out findings, descriptions, readings and captions of these images.
- Keep all else word for word: history, examination, vital signs, laboratory values, results of other tests, what is asked, and references such as "Figure A" or "<image 1>".
- Add nothing. Mend a sentence only where the cut has broken it.
- If the text does not tell what the images show, return it as it is.

Reply with one JSON object and nothing else, each removed passage word for word as it stands in the text:
{"question": "the text without the passages", "removed": ["passage", ...]}

<Question> %s </Question>"""

UNIT = r"%|°\s?[CF]?\b|mm\s?Hg\b|bpm\b|(?:/\s?)?(?:[mµμnkcd]?(?:g|l|L|mol|Eq|U|IU|m|Pa|s)|min|h|d|hours?|days?|weeks?|months?|years?)\b(?:/\w+)*"
NUMBER = re.compile(rf"(?<![\w.])[-−]?\d+(?:[.,/:]\d+)*(?:[\s-]?(?:{UNIT}))?")
# of vital signs and laboratory values; a length or a share of an image is none
MEASURED = re.compile(r"°|mm\s?Hg|bpm|\d\s?/\s?min|/\s?[dmµμ]?L\b|\bmmol\b|\bm?Eq\b|\bI?U\b|\bPa\b|\bkPa\b")
# what turns a sentence around
MEANING = re.compile(r"\b(?:no|not|none|nor|neither|never|without|cannot|\w+n['’]t|den(?:y|ies|ied|ying)|except|left|right|(?:bi|uni|contra|ipsi)lateral(?:ly)?)\b", re.I)
FIGURE = re.compile(r"<image(?:[ _]?\d+)?>|(?i:\b(?:fig(?:ure)?s?|images?|panels?)\b\.?)\s+(?:[A-Z]|\d+[A-Za-z]?)\b(?:\s*(?:,|and|&|to|-)\s*(?:[A-Z]|\d+[A-Za-z]?)\b)*")


def read_edit(reply: str) -> tuple[str, list[str]]:
    """(text without descriptions, removed passages) of a reply. Raises ValueError if it is anything else."""
    found = read_object(reply, ["question", "removed"])
    text, removed = found.get("question"), found.get("removed")
    if not isinstance(text, str) or not isinstance(removed, list) or not all(isinstance(passage, str) for passage in removed):
        raise ValueError("question is no text, or removed no list of texts")
    return text.strip(), [passage for passage in removed if passage.strip()]


def flat(text: str) -> str:
    return " ".join(text.split())


def first_change(before: list[str], after: list[str]) -> str | None:
    """What of `before` is lost in `after`, or else what is new there, as they are counted; None if they are the same."""
    lost, new = Counter(before) - Counter(after), Counter(after) - Counter(before)
    return f"'{next(iter(lost))}' is lost" if lost else f"'{next(iter(new))}' is new" if new else None


def passage_fault(question: str, text: str, removed: list[str]) -> str | None:
    """What is wrong with the passages themselves: not of the question, not removed, a measured value, or what is asked."""
    asked, rest = re.split(r"(?<=[.?!:;])\s+", question)[-1], question
    for passage in sorted(removed, key=len, reverse=True):
        if passage not in rest:
            return f"'{passage}' is said to be removed, but is no part of the question"
        rest = rest.replace(passage, " ", 1)
        if text.count(passage) > rest.count(passage):
            return f"'{passage}' is said to be removed, but is still there"
        if value := next((number for number in NUMBER.findall(passage) if MEASURED.search(number)), None):
            return f"the value '{value}' is removed; is that of the image?"
    gone = sum(len(passage.split()) for passage in removed if passage in asked)
    if any(asked in passage for passage in removed) or 2 * gone > len(asked.split()):
        return f"what is asked, '{asked}', is removed"
    return None


def edit_fault(question: str, text: str, removed: list[str]) -> str | None:
    """What an edit breaks, or None: nothing may be lost but what it says it removed, nothing may be new, and the order stays.
    A number, a negation or a side may never come or go outside a removed passage, nor a measured value inside one."""
    question, text, removed = flat(question), flat(text), [flat(passage) for passage in removed]
    if not text:
        return "nothing is left"
    if len(text) > len(question):
        return "it is longer than the question"
    if lost := sorted(set(FIGURE.findall(question)) - set(FIGURE.findall(text))):
        return f"the reference '{lost[0]}' is lost"
    if fault := passage_fault(question, text, removed):
        return fault
    rest = question
    for passage in sorted(removed, key=len, reverse=True):
        rest = rest.replace(passage, " ", 1)
    for kind, pattern in (("number", NUMBER), ("word", MEANING)):
        if change := first_change(*([found.casefold() if kind == "word" else found for found in pattern.findall(part)] for part in (rest, text))):
            return f"the {kind} {change}"
    before, after = (data.normalise(part).split() for part in (question, text))
    if 2 * len(after) < len(before):
        return "more than half of the words are gone"
    steps = [step for step in SequenceMatcher(None, before, after, autojunk=False).get_opcodes() if step[0] != "equal"]
    lost, new = (Counter(word for step in steps for word in words[step[i] : step[i + 1]]) for words, i in ((before, 1), (after, 3)))
    lost -= Counter(word for passage in removed for word in data.normalise(passage).split())
    for words, fault in ((lost, "are lost"), (new, "are new")):
        if words.total() > MENDED:
            return f"the words '{' '.join(words.elements())}' {fault}"
    moved = [word for word in lost & new if len(word) > 3]  # "is" and "the" come and go where a sentence is mended
    return f"the word '{moved[0]}' is moved" if moved else None


def edited(question: data.Question, text: str, marks: dict) -> data.Question:
    """The question with another text, its own id and answer; meta keeps the text it first had, and the marks."""
    meta = {key: value for key, value in question.meta.items() if key not in ("needs_review", "suggestion")}
    if text != question.question:
        meta.setdefault("original", question.question)
    return replace(question, question=text, meta=meta | marks)


def read_reviewed(path: str) -> dict[str, tuple[str, str]]:
    """{id: (text, fault)} of a CSV with the columns id and question, and perhaps fault: review.csv with its question column
    corrected is one."""
    found = {}
    for number, row in read_sheet(path, ["id", "question"]):
        key = row["id"].removeprefix(ID)
        if not row["question"].strip() or key in found:
            raise data.RowError(f"{path}: row {number}: {'id: it is there twice' if key in found else 'question: is empty; remove the row or write the text'}")
        found[key] = row["question"].strip(), (row.get("fault") or "").strip()
    return found


def settled(reviewed: dict[str, tuple[str, str]], questions: dict[str, data.Question]) -> dict[str, str]:
    """{id: text} of the rows in which a human has done something: a row whose text is as it was and whose fault still stands
    there has not been looked at. To leave a question as it is, empty its fault."""
    same = {key for key, (text, fault) in reviewed.items() if fault and key in questions and flat(text) == flat(questions[key].question)}
    return {key: text for key, (text, _) in reviewed.items() if key not in same}


def write_review(path: Path, questions: list[data.Question]) -> int:
    """The questions that a human must look at: correct the column `question`, or empty the column `fault` where the question
    may stay as it is, and give the file back with --reviewed."""
    rows = [[ID + q.id, q.question, q.meta["needs_review"], q.meta.get("suggestion", ""), " ".join(q.images)] for q in questions]
    write_sheet(path, ["id", "question", "fault", "suggestion", "images"], rows)
    return len(questions)


# ---------------------------------------------------------------------------------------------------------------
# Sheets that go through a human's spreadsheet

ID = "id:"  # in front of an id: a spreadsheet would take "12e45678" for a number
# A cell that begins so is run as a formula (OWASP, CSV injection), but for a plain number such as
# -6.72. In a sheet it has a "'" more in front, which makes it text. A text that looks as if it had
# been marked is marked too, so that reading gives back every text; one that a spreadsheet took
# the mark from is read as it then stands.
FORMULA = re.compile(r"'*(?![-+]?[0-9]+(?:\.[0-9]+)?\Z)[=+\-@\t\r\n＝＋－＠]")
csv.field_size_limit(2**31 - 1)  # of characters in a cell; a chain of reasoning is longer than Python's 131,072


def read_sheet(path: str | Path, columns: list[str]) -> list[tuple[int, dict[str, str]]]:
    """(number, row) of a CSV, numbered as a spreadsheet does: the first row is the header. Raises
    RowError for a file that cannot be read, and for one that lacks one of `columns`, in its header
    or in any row: such rows are listed together. Marks in front of formulas are taken off."""
    with data.open_file(path) as file:
        content = file.read()
    try:
        sheet = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        rows, names = list(enumerate(sheet, 2)), sheet.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise data.RowError(f"{path}: cannot be read ({error}); save the filled-in sheet as CSV in UTF-8") from None
    if len(set(names)) < len(names):
        raise data.RowError(f"{path}: a column is there twice in {names}; remove one of the two")
    if lost := [name for name in columns if name not in names]:
        wanted = f"columns are {names}, expected {' and '.join(columns)} among them"
        said = f"no column {lost[0]!r}: {wanted}"
    else:
        short = [(number, name) for number, row in rows for name in columns if row[name] is None]
        said = "; ".join(f"row {number}: no column {name!r}" for number, name in short[:20])
        said += f"; ... and {len(short) - 20} more" if len(short) > 20 else ""
    if said:
        how = "save the sheet as CSV with commas, its first line unchanged"
        raise data.RowError(f"{path}: {said}; {how}")
    return [(number, {name: unmarked(row[name]) for name in names}) for number, row in rows]


def marked(text: str) -> str:
    """A cell's text as a sheet holds it."""
    return "'" + text if FORMULA.match(text) else text


def unmarked(text: str | None) -> str | None:
    """The text of a cell of a sheet; None of one that its row lacks."""
    return text[1:] if text and text[0] == "'" and FORMULA.match(text) else text


def write_sheet(path: Path, columns: Sequence[str], rows: Iterable[Iterable]) -> None:
    """Writes a sheet where none is: no cell is a formula to a spreadsheet, which tells UTF-8 by the
    mark in front of the file. Raises RowError where one with another content is: a human may have
    filled it in."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *([marked(str(cell)) for cell in row] for row in rows)])
    content = text.getvalue().encode("utf-8-sig")
    if path.exists() and path.read_bytes() != content:
        raise data.RowError(f"{path}: is there already, and a human may have filled it in; move it away")
    temporary = data.unfinished(path)
    temporary.write_bytes(content)
    temporary.replace(path)
