"""Removes image descriptions from a question's text: only the image then answers it (paper §3.3).

    text, removed passages = an engine's completion
    the text is accepted  iff  nothing else is lost and nothing is new

An edit that breaks a rule (a figure reference, a number, a negation or a side lost, a vital sign
removed, words lost that it does not list, words moved, ...) is refused. The question then stays as
it is, is marked meta.needs_review and listed in review.csv. There a human corrects the question
column, or empties the fault column if the question may stay. This text counts before the engine's;
an unchanged row goes on waiting. Options, answer and id never change, and meta.original keeps the
first text. curate.py sends the requests.

Where we depart from the paper, or it is silent: it has GPT-4o and humans remove descriptions, and
gives neither prompt nor rules; these are ours.
"""

import re
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

import data
from command.sheets import read_sheet, write_sheet
from engines.inference import read_object

ID = "id:"  # in front of an id: a spreadsheet would read "12e45678" as a number
REVIEW = ("needs_review", "suggestion")  # keys of meta while a question waits for a human
# ours: paper silent; words that mending a sentence may add or lose without listing them
MENDED = 3

EDIT_PROMPT = (
    "You are given the text of a medical exam question and the images that belong to it. "
    "Take out of the text whatever tells what these images show, so that the question can be "
    "answered only by looking at them.\n\n"
    "- Take out findings, descriptions, readings and captions of these images.\n"
    "- Keep all else word for word: history, examination, vital signs, laboratory values, "
    'results of other tests, what is asked, and references such as "Figure A" or "<image 1>".\n'
    "- Add nothing. Mend a sentence only where the cut has broken it.\n"
    "- If the text does not tell what the images show, return it as it is.\n\n"
    "Reply with one JSON object and nothing else, each removed passage word for word as it "
    "stands in the text:\n"
    '{"question": "the text without the passages", "removed": ["passage", ...]}\n\n'
    "<Question> %s </Question>"
)

UNIT = (
    r"%|°\s?[CF]?\b|mm\s?Hg\b|bpm\b"
    r"|(?:/\s?)?(?:[mµμnkcd]?(?:g|l|L|mol|Eq|U|IU|m|Pa|s)"
    r"|min|h|d|hours?|days?|weeks?|months?|years?)\b(?:/\w+)*"
)
NUMBER = re.compile(rf"(?<![\w.])[-−]?\d+(?:[.,/:]\d+)*(?:[\s-]?(?:{UNIT}))?")
# units of vital signs and laboratory values; a length or a share of an image is neither
MEASURED = re.compile(
    r"°|mm\s?Hg|bpm|\d\s?/\s?min|/\s?[dmµμ]?L\b|\bmmol\b|\bm?Eq\b|\bI?U\b|\bPa\b|\bkPa\b"
)
# words that reverse what a sentence says
MEANING = re.compile(
    r"\b(?:no|not|none|nor|neither|never|without|cannot|\w+n['’]t|den(?:y|ies|ied|ying)|except"
    r"|left|right|(?:bi|uni|contra|ipsi)lateral(?:ly)?)\b",
    re.I,
)
FIGURE = re.compile(
    r"<image(?:[ _]?\d+)?>"
    r"|(?i:\b(?:fig(?:ure)?s?|images?|panels?)\b\.?)\s+(?:[A-Z]|\d+[A-Za-z]?)\b"
    r"(?:\s*(?:,|and|&|to|-)\s*(?:[A-Z]|\d+[A-Za-z]?)\b)*"
)


def read_edit(completion: str) -> tuple[str, list[str]]:
    """(text without descriptions, removed passages). Raises ValueError if the completion is
    anything else."""
    found = read_object(completion, ["question", "removed"])
    text, removed = found.get("question"), found.get("removed")
    passages = removed if isinstance(removed, list) else [None]
    if not all(isinstance(part, str) for part in [text, *passages]):
        raise ValueError("question is no text, or removed no list of texts")
    return text.strip(), [passage for passage in removed if passage.strip()]


def one_line(text: str) -> str:
    return " ".join(text.split())


def first_change(before: list[str], after: list[str]) -> str | None:
    """What `after` has lost of `before`, or else what is new in it, by count. None if they are the
    same."""
    lost, new = Counter(before) - Counter(after), Counter(after) - Counter(before)
    for words, how in ((lost, "lost"), (new, "new")):
        if words:
            return f"'{next(iter(words))}' is {how}"
    return None


def passage_fault(passage: str, rest: str, text: str) -> str | None:
    """The fault of a removed passage, or None: not in the question, not removed, or a measured
    value. rest: the question without longer passages."""
    if passage not in rest:
        return f"'{passage}' is said to be removed, but is no part of the question"
    if text.count(passage) >= rest.count(passage):
        return f"'{passage}' is said to be removed, but is still there"
    values = [number for number in NUMBER.findall(passage) if MEASURED.search(number)]
    return f"the value '{values[0]}' is removed; is that of the image?" if values else None


def word_fault(question: str, text: str, removed: list[str]) -> str | None:
    """The fault of the words between the passages, or None: lost, new or moved."""
    before, after = data.normalise(question).split(), data.normalise(text).split()
    if 2 * len(after) < len(before):
        return "more than half of the words are gone"
    lost, new = Counter(), Counter()
    steps = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    for kind, i, i_end, j, j_end in steps:
        if kind != "equal":
            lost.update(before[i:i_end])
            new.update(after[j:j_end])
    lost -= Counter(word for passage in removed for word in data.normalise(passage).split())
    for words, fault in ((lost, "are lost"), (new, "are new")):
        if words.total() > MENDED:
            return f"the words '{' '.join(words.elements())}' {fault}"
    # short words such as "is" and "the" come and go where a sentence is mended
    moved = [word for word in lost & new if len(word) > 3]
    return f"the word '{moved[0]}' is moved" if moved else None


def edit_fault(question: str, text: str, removed: list[str]) -> str | None:
    """The rule that an edit breaks, or None. Only the removed passages may be lost, nothing may be
    new, and the order stays. Outside them no number, negation or side may come or go; inside them
    no measured value may go, nor most of what is asked."""
    question, text, removed = one_line(question), one_line(text), [one_line(p) for p in removed]
    if not text:
        return "nothing is left"
    if len(text) > len(question):
        return "it is longer than the question"
    if lost := sorted(set(FIGURE.findall(question)) - set(FIGURE.findall(text))):
        return f"the reference '{lost[0]}' is lost"
    rest = question
    for passage in sorted(removed, key=len, reverse=True):
        if fault := passage_fault(passage, rest, text):
            return fault
        rest = rest.replace(passage, " ", 1)
    asked = re.split(r"(?<=[.?!:;])\s+", question)[-1]
    gone = sum(len(passage.split()) for passage in removed if passage in asked)
    if any(asked in passage for passage in removed) or 2 * gone > len(asked.split()):
        return f"what is asked, '{asked}', is removed"
    if change := first_change(NUMBER.findall(rest), NUMBER.findall(text)):
        return f"the number {change}"
    if change := first_change(MEANING.findall(rest.casefold()), MEANING.findall(text.casefold())):
        return f"the word {change}"
    return word_fault(question, text, removed)


def rewrite(question: data.Question, text: str, marks: dict) -> None:
    """Gives a question another text. meta keeps its first text, and the marks."""
    question.meta = {k: v for k, v in question.meta.items() if k not in REVIEW}
    if text != question.question:
        question.meta.setdefault("original", question.question)
    question.question, question.meta = text, question.meta | marks


def read_reviewed(path: str) -> dict[str, tuple[str, str]]:
    """{id: (text, fault)} of a CSV with the columns id and question, and perhaps fault, such as a
    corrected review.csv."""
    found = {}
    for number, row in read_sheet(path, ["id", "question"]):
        key, where = row["id"].removeprefix(ID), f"{path}: row {number}"
        if key in found:
            raise data.RowError(f"{where}: id: it is there twice")
        if not row["question"].strip():
            raise data.RowError(f"{where}: question: is empty; remove the row or write the text")
        found[key] = row["question"].strip(), (row.get("fault") or "").strip()
    return found


def reviewed_texts(
    reviewed: dict[str, tuple[str, str]], questions: dict[str, data.Question]
) -> dict[str, str]:
    """{id: text} of the questions that a human has decided. A row with its old text and its fault
    still there has not been looked at. To leave a question as it is, empty its fault."""
    decided = {}
    for key, (text, fault) in reviewed.items():
        if key in questions and not (fault and one_line(text) == one_line(questions[key].question)):
            decided[key] = text
    return decided


def write_review(path: Path, questions: list[data.Question]) -> int:
    """The questions that a human must look at. Correct the column `question`, or empty the column
    `fault` if the question may stay as it is; then give the file back with --reviewed."""
    rows = []
    for q in questions:
        fault, suggestion = q.meta["needs_review"], q.meta.get("suggestion", "")
        rows.append([ID + q.id, q.question, fault, suggestion, " ".join(q.images)])
    write_sheet(path, ["id", "question", "fault", "suggestion", "images"], rows)
    return len(questions)
