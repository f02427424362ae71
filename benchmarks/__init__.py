"""Reads published benchmarks and the common formats of question banks.

    rows of a file (jsonl, json, csv, parquet)
        ->  Item: stem, options, answer, images, meta  ->  data.Question

READERS has a row for each set: the files in a downloaded folder, the columns, and what the paper
used. To add a set, add a row; if columns do not say it all, write a subclass of Reader with an
`item` of its own. A benchmark's own prompt, if it has one, goes into official.py.

    python -m benchmarks inspect NAME PATH      the counts, next to the paper's
    python -m benchmarks convert NAME PATH --out questions.jsonl --images FOLDER
    ... --answers answer_dict_test.json             for MMMU's test split, published without answers

reads a published file or folder; writes questions.jsonl, and the images of a zip or of parquet,
each once below the image root, under its published name or the hash of its bytes

Every question is kept, and a row that cannot be read is an error that names the row. Only the
large training banks leave such rows out, and count them by reason (Reader.leaves_out).

Where we depart from the paper, or it is silent:
  1. It names benchmarks, not files. The counts follow from its tables: MedXpertQA-MM test (2000),
     MMMU validation (150), MMMU-Pro test (286), MedQA test with 4 options (1273), Medbullets (308).
     It does not say which config of MMMU-Pro it used, standard or vision, nor whether Medbullets
     has 4 or 5 options; all are here.
  2. Images stand before the text, in published order; <image 1> marks stay in the text. The paper
     does not say.
  3. In MMMU-Pro's vision config the question and its options are only in the image. Our prompt
     repeats the options as text, so that an answer can be read the same way everywhere; the
     benchmark's own prompt (official.py) does not.
  4. Published rows with equal content, images included, are all kept. The second has "-2" after
     its id, and the first's id in meta["repeats"].
  5. MMMU's test split (1752 questions of Health & Medicine) and its other subjects are ours: the
     paper reports neither, but says that general visual understanding is maintained (3.2).
  6. It does not name its public training sets. PMC-VQA, MedMCQA and m23k are our choice.
"""

import argparse
import ast
import csv
import hashlib
import io
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import answers
import data
from command import schema, stage

HEALTH = {  # MMMU's Health & Medicine: subject -> (questions in MMMU validation, in MMMU-Pro test)
    "Basic_Medical_Science": (30, 52), "Clinical_Medicine": (30, 59),
    "Diagnostics_and_Laboratory_Medicine": (30, 60), "Pharmacy": (30, 57),
    "Public_Health": (30, 58),
}  # fmt: skip
MOST_IMAGES = 7  # MMMU's columns image_1 ... image_7
CHOSEN = "multiple-choice"  # MMMU's question_type of a question with options
# ours: the vision config has no text of its own
VISION_STEM = "Answer the multiple-choice question in the image."
# keys of meta by which tables are split
SUBSETS = ("question_type", "medical_task", "body_system", "subject", "modality")

# --------------------------------------------------------------------------------------------------
# Values in a row


@contextmanager
def damaged(where: str, said: str):
    """Makes any error a RowError: csv, pyarrow, zipfile and Pillow do not document all of theirs
    for a damaged file."""
    try:
        yield
    except data.RowError:
        raise
    except Exception as error:
        raise data.RowError(f"{where}: {said} ({error}); download it again") from None


def literal(value, where: str, key: str) -> list[str]:
    """A list of texts, as it is or as MMMU writes it: "['a', 'b']"."""
    if isinstance(value, str):
        with damaged(where, f"{key}: {value[:60]!r} is not the text of a list"):
            value = ast.literal_eval(value)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise data.RowError(f"{where}: {key}: expected a list of texts, found {value!r:.60}")
    return value


def options_of(value, where: str) -> dict[str, str]:
    """{letter: text} of {letter: text}, of a list of {letter, content}, or of a list of texts."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value and all(isinstance(option, dict) for option in value):
        letters = [option.get("letter") for option in value]
        if letters != list(data.LETTERS[: len(value)]):
            raise data.RowError(f"{where}: options: letters are {letters}, expected A, B, C ...")
        return {option["letter"]: option.get("content") for option in value}
    texts = literal(value, where, "options")
    return {chr(ord("A") + number): text for number, text in enumerate(texts)}


CHOICES = "\nAnswer Choices:"  # MedXpertQA: the question's text goes on with (A) x (B) y
CHOICE_LINES = re.compile(rf"(?:^\s*\(?[{data.LETTERS}][).:]\s+\S.*\n?){{2,}}", re.M)


def choices_in_text(text: str, where: str) -> dict[str, str]:
    """{"A": "x", "B": "y"} of "(A) x (B) y". Each letter must occur once, in order: then the text
    is not ambiguous."""
    parts = re.split(rf"(?:^|(?<=\s))\(([{data.LETTERS}])\)\s", text.strip())
    letters, texts = parts[1::2], parts[2::2]
    if parts[0].strip() or letters != list(data.LETTERS[: len(letters)]):
        said = f"its choices are {letters}, expected (A) (B) ... once each, in order"
        raise data.RowError(f"{where}: question: {said}")
    return {letter: choice.strip() for letter, choice in zip(letters, texts)}


def split_options(text: str, where: str) -> tuple[str, dict[str, str]]:
    """(stem, options). Options come after "Answer Choices:", or are lettered lines; or none."""
    stem, mark, shown = text.rpartition(CHOICES)
    if mark:
        return stem, choices_in_text(shown, where)
    lines = CHOICE_LINES.search(text)
    if not lines:
        return text, {}
    stem = f"{text[: lines.start()].rstrip()}\n{text[lines.end() :].strip()}".strip()
    shown = re.sub(rf"^\s*\(?([{data.LETTERS}])[).:]", r"(\1)", lines[0], flags=re.M)
    return stem, choices_in_text(shown, where)


def picture(value, where: str) -> str | bytes | None:
    """An image's bytes or file name, which may be inside an object; None if there is none."""
    if not isinstance(value, dict):
        value = {"bytes" if isinstance(value, bytes) else "path": value}
    content, name = value.get("bytes"), value.get("path") or value.get("image_path")
    if not isinstance(content, bytes | None) or not isinstance(name, str | None):
        raise data.RowError(f"{where}: expected an image's bytes or name, found {value!r:.60}")
    return content or name or None


def image_list(row: dict, where: str, column: str = "images") -> list[str | bytes]:
    """A row's images; its cell is a list, one image, or nothing."""
    cells = row.get(column)
    if not isinstance(cells, list):
        cells = [] if cells is None else [cells]
    images = [picture(cell, f"{where}: {column}") for cell in cells]
    if None in images:
        raise data.RowError(f"{where}: {column}: an image is missing")
    return images


def picked(row: dict, where: str, *keys: str) -> dict:
    """For meta: the published id of a row, and what it has of these keys; all must be texts."""
    found = {key: row[key] for key in ("id", *keys) if row.get(key) not in (None, "")}
    data.need(found, where, **dict.fromkeys(found, str))
    return ({"published_id": found.pop("id")} if "id" in found else {}) | found


def subject_of(row: dict, where: str) -> str:
    """The subject. In MMMU only the id has it: validation_Public_Health_7."""
    known = picked(row, where, "subject")
    match = re.fullmatch(r"[a-z]+_(\w+)_\d+", known.get("published_id", ""))
    if "subject" not in known and not match:
        said = f"{row.get('id')!r} does not tell a subject, expected validation_SUBJECT_NUMBER"
        raise data.RowError(f"{where}: id: {said}")
    return (known.get("subject") or match[1]).replace(" ", "_")


def with_answer(row: dict, answers: dict, where: str) -> dict:
    """An MMMU row with its answer of MMMU's answer file {id: answer}. An answer is a text, a list
    of texts, or {"question_type": ..., "ground_truth": one of these}. Raises RowError if the row
    has another answer, or another type."""
    given, kind = answers.get(row.get("id")), row.get("question_type")
    if isinstance(given, dict):
        kind, given = given.get("question_type"), given.get("ground_truth")
    if given is None:
        return row
    own, own_kind = row.get("answer"), row.get("question_type", kind)
    if own not in (None, "", "?", str(given)) or (kind == CHOSEN) != (own_kind == CHOSEN):
        said = f"the row has {own!r}, {own_kind}, and the file of answers {given!r}, {kind}"
        raise data.RowError(f"{where}: answer: {said}")
    return row | {"answer": str(given)}


def exchange(row: dict, where: str) -> tuple[str, str]:
    """(question, answer) of a ShareGPT or OpenAI record. A system turn is left out."""
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        turns = []
    turns = [turn for turn in turns if turn.get("role", turn.get("from")) != "system"]
    roles = [turn.get("role", turn.get("from")) for turn in turns]
    texts = [turn.get("content", turn.get("value")) for turn in turns]
    known = roles in (["human", "gpt"], ["user", "assistant"])
    if not known or not all(isinstance(text, str) for text in texts):
        said = "no list 'messages' or 'conversations' of one question and one answer, both texts"
        raise data.RowError(f"{where}: {said}; turns are {roles}, the row has {sorted(row)}")
    return texts[0], texts[1]


# --------------------------------------------------------------------------------------------------
# A row becomes an item


@dataclass
class Item:
    """A row whose images have no path yet: they are published names, or bytes. Only our own rows
    have an id."""

    question: str
    options: dict[str, str]
    answer: str
    images: list[str | bytes] = field(default_factory=list)
    meta: dict = field(default_factory=dict)
    source: str = ""
    id: str = ""


@dataclass(frozen=True)
class Reader:
    """What is known of a published set: its files and its columns.

    files      its paths in a downloaded folder
    question, options, answer, text, images
               the columns with the stem, the options (several: an option each), the answer's letter
               and text, and the images. Without options the stem holds them, after "Answer
               Choices:" or one a line
    meta       columns that are kept, besides the id
    paper      the paper's counts, named as in `count`
    subjects   those that belong to it; empty: all
    outside    all subjects but these belong to it
    folder     where its images are: in this folder, or in a zip file of this name
    leaves_out whether faulty rows are left out and counted, instead of an error
    """

    files: tuple[str, ...]
    question: str = "question"
    options: tuple[str, ...] = ("options",)
    answer: str = "answer"
    text: str = "answer"
    images: str = "images"
    meta: tuple[str, ...] = ()
    paper: dict[str, int] = field(default_factory=dict)
    subjects: tuple[str, ...] = ()
    outside: bool = False
    folder: str = "images"
    leaves_out: bool = False

    def rows(self, file: Path) -> Iterator[tuple[str, dict]]:
        if file.suffix.lower() not in ROWS:
            raise data.RowError(f"{file}: expected one of {', '.join(ROWS)}")
        return ROWS[file.suffix.lower()](file)

    def item(self, row: dict, where: str) -> Item:
        data.need(row, where, **{self.question: str})
        stem, options = self.stem_and_options(row, where)
        answer, meta = self.letter(row, where, options), picked(row, where, *self.meta)
        if self.subjects:
            meta["subject"] = subject_of(row, where)
        return Item(stem, options, answer, image_list(row, where, self.images), meta)

    def stem_and_options(self, row: dict, where: str) -> tuple[str, dict[str, str]]:
        text, cells = row[self.question], [row.get(column) for column in self.options]
        if cells == [None]:
            stem, options = split_options(text, where)
        else:
            options = options_of(cells if len(cells) > 1 else cells[0], where)
            stem = text.rsplit(CHOICES, 1)[0]
        kind = row.get("question_type")
        if bool(options) == (kind == "open"):  # MMMU's word for a short answer
            said = f"there are {len(options)}, and the question's type is {kind!r}"
            raise data.RowError(f"{where}: options: {said}")
        return stem, options

    def letter(self, row: dict, where: str, options: dict[str, str]) -> str:
        """The answer's letter. Its text, if the row has one, must be that option's."""
        letter = row.get("label", row.get(self.answer))  # MedQA comes in MedXpertQA's form, too
        letter = letter[0] if isinstance(letter, list) and len(letter) == 1 else letter
        text = letter if row.get(self.text) is None else row[self.text]
        if not isinstance(letter, str) or not isinstance(text, str):
            said = f"expected one letter, and its text if any, found {letter!r} and {text!r}"
            raise data.RowError(f"{where}: {self.answer}: {said}")
        right = str(options.get(letter, text))
        if text != letter and data.normalise(text) != data.normalise(right):
            said = f"{letter!r} {text!r} is not among the options {options}"
            raise data.RowError(f"{where}: answer: {said}")
        return letter


class MMMU(Reader):
    """Numbered images, with marks in the text; short answers, of which several may count."""

    def item(self, row: dict, where: str) -> Item:
        if row.get("answer") == "?":
            file = "answer_dict_test.json (github.com/MMMU-Benchmark/MMMU)"
            said = f"is '?', as in the test split; give --answers with {file}, which has this id"
            raise data.RowError(f"{where}: answer: {said}")
        item = super().item(row, where)
        meta = item.meta
        if row.get("img_type"):
            kinds = literal(row["img_type"], where, "img_type")
            meta["modality"] = ", ".join(dict.fromkeys(kinds))
        if not item.options and item.answer.startswith("["):
            meta["answers"] = literal(item.answer, where, "answer")
            item.answer = next(iter(meta["answers"]), "")
        columns = [f"image_{number}" for number in range(1, MOST_IMAGES + 1)]
        cells = [picture(row.get(column), f"{where}: {column}") for column in columns]
        item.images = [cell for cell in cells if cell]
        count = len(item.images)
        text = "\n".join([item.question, *map(str, item.options.values())])
        meta["image_marks"] = [int(number) for number in data.IMAGE_MARK.findall(text)]
        if cells[:count] != item.images or {*meta["image_marks"]} - {*range(1, count + 1)}:
            there = [column for column, cell in zip(columns, cells) if cell]
            said = f"has {there}, and marks for {meta['image_marks']}; an image is missing"
            raise data.RowError(f"{where}: {said}")
        return item


class Vision(Reader):
    """The question and its options are in one image."""

    def item(self, row: dict, where: str) -> Item:
        item = super().item(row | {self.question: VISION_STEM}, where)
        if not item.images:
            raise data.RowError(f"{where}: {self.images}: is missing")
        return item


class PMCVQA(Reader):
    """A choice may begin with its letter: "B: a cyst". So may the answer's text."""

    def item(self, row: dict, where: str) -> Item:
        data.need(row, where, **dict.fromkeys((*self.options, self.answer, self.text), str))
        row = row | {self.answer: row[self.answer].strip()}
        letters = dict(zip(self.options, data.LETTERS)) | {self.text: row[self.answer]}
        for column, right in letters.items():
            letter, text = re.match(r"(?:([A-J])\s*:)?(.*)", row[column].strip(), re.S).groups()
            if letter not in (None, right):
                raise data.RowError(f"{where}: {column}: its letter is {letter!r}")
            row[column] = text.strip()
        return super().item(row, where)


class MedMCQA(Reader):
    """`cop` is the number of the right option. The original JSON lines count from 1, the hub's
    parquet from 0, and copies either way. So the file itself must tell."""

    def rows(self, file: Path) -> Iterator[tuple[str, dict]]:
        # the original train.json has a row a line
        read_rows = data.read_jsonl if file.suffix == ".json" else super().rows
        numbers = {str(row.get("cop")) for _, row in read_rows(file)}
        if ("0" in numbers) == ("4" in numbers):
            has = "both 0 and 4" if "0" in numbers else "neither 0 nor 4"
            said = f"has {has}, so it may count from 0 or from 1; give the whole published file"
            raise data.RowError(f"{file}: cop: {said}")
        letters = dict(zip("0123" if "0" in numbers else "1234", data.LETTERS))
        for where, row in read_rows(file):
            yield where, row | {"cop": letters.get(str(row.get("cop")), row.get("cop"))}

    def item(self, row: dict, where: str) -> Item:
        kind = row.get("choice_type")
        if kind not in ("single", "single-choice"):
            said = f"is {kind!r}, not 'single': several options may be right, and cop names one"
            raise data.RowError(f"{where}: choice_type: {said}")
        return super().item(row, where)


class M23K(Reader):
    """The prompt ends in its options, one a line."""

    def stem_and_options(self, row: dict, where: str) -> tuple[str, dict[str, str]]:
        stem, options = super().stem_and_options(row, where)
        if not row[self.question].strip().startswith(stem):
            raise data.RowError(f"{where}: {self.question}: text stands after its options")
        return stem, options


class Own(Reader):
    """A row of questions.jsonl, with the id it has."""

    def item(self, row: dict, where: str) -> Item:
        return Item(**vars(schema.question_from(row, where)))


class Conversation(Reader):
    """A ShareGPT or OpenAI record: one question with <image> marks, and one answer.
    meta["response"] keeps the whole answer."""

    def item(self, row: dict, where: str) -> Item:
        asked, response = exchange(row, where)
        images, marks = image_list(row, where), asked.count("<image>")
        if marks != len(images):
            raise data.RowError(f"{where}: {marks} <image> marks for {len(images)} images")
        meta = picked(row, where) | {"response": response}
        text = re.sub(r"^(?:\s*<image>)+\s*", "", asked)
        if "<image>" in text:  # marks inside the text are numbered, as in MMMU
            text, meta["image_marks"] = asked, list(range(1, marks + 1))
            for number in meta["image_marks"]:
                text = text.replace("<image>", f"<image {number}>", 1)
        stem, options = split_options(text, where)
        block = response
        if data.answer_block(response) is None:
            block = f"<answer>{data.answer_region(response) or ''}</answer>"
        answer = answers.extract_choice(block, options) if options else data.answer_block(block)
        if not answer or (not options and answer in data.LETTERS):
            said = f"{response[-80:]!r} is not among the options {options}"
            raise data.RowError(f"{where}: answer: {said}; options stand one a line, as 'A. text'")
        return Item(stem, options, answer, images, meta)


def question_of(item: Item, images: list[str], source: str, where: str) -> data.Question:
    """The checked question of an item, given the names of its images."""
    fields = vars(item) | {"images": images, "source": item.source or source}
    schema.question_from(fields | {"id": item.id or where}, where)  # the content's hash comes after
    return data.Question(**fields)


# --------------------------------------------------------------------------------------------------
# The table

# paper Tables 1, 2: all rows but one are shares of these; images: as published
MM = {
    "questions": 2000, "images": 2852,
    "question_type Reasoning": 1446, "question_type Understanding": 554,
    "medical_task Diagnosis": 1199, "medical_task Treatment": 448,
    "medical_task Basic Science": 353,
}  # fmt: skip
MM_META = ("question_type", "medical_task", "body_system")
OP = ("opa", "opb", "opc", "opd", "ope")
EXAM_META = ("meta_info", "Complex_CoT", "Response")
MMMU_META = ("topic_difficulty", "subfield")
CHOICE_COLUMNS = ("Choice A", "Choice B", "Choice C", "Choice D")
VALIDATION = {f"subject {key}": n for key, (n, _) in HEALTH.items()}
# the paper does not say which of the configs it used
PRO = {"questions": 286} | {f"subject {key}": n for key, (_, n) in HEALTH.items()}


def parquets(split: str, folders: tuple[str, ...]) -> tuple[str, ...]:
    """The files of a split of MMMU, which has a folder for each subject."""
    return tuple(f"{key}/{split}{form}.parquet" for key in folders for form in ("-*", "/*"))


READERS = {
    "medxpertqa-mm": Reader(
        ("MM/test.jsonl", "test.jsonl"), answer="label", meta=MM_META, paper=MM,
    ),
    "medxpertqa-text": Reader(("Text/test.jsonl", "test.jsonl"), answer="label", meta=MM_META),
    "medqa": Reader(
        ("**/US/4_options/*_test.jsonl", "phrases_no_exclude_test.jsonl"),
        answer="answer_idx", meta=EXAM_META, paper={"questions": 1273, "options 4": 1273},
    ),
    "medbullets-op4": Reader(
        ("**/medbullets_op4.json",), options=OP[:4], answer="answer_idx", meta=("link",),
        paper={"questions": 308, "options 4": 308},
    ),
    "medbullets-op5": Reader(
        ("**/medbullets_op5.json",), options=OP, answer="answer_idx", meta=("link",),
        paper={"questions": 308, "options 5": 308},
    ),
    "mmmu": MMMU(
        parquets("validation", (*HEALTH,)),
        meta=MMMU_META, subjects=(*HEALTH,), paper=VALIDATION | {"questions": 150, "options 0": 5},
    ),
    "mmmu-test": MMMU(parquets("test", (*HEALTH,)), meta=MMMU_META, subjects=(*HEALTH,)),
    "mmmu-general": MMMU(
        parquets("validation", ("*",)), meta=MMMU_META, subjects=(*HEALTH,), outside=True,
    ),
    "mmmu-test-general": MMMU(
        parquets("test", ("*",)), meta=MMMU_META, subjects=(*HEALTH,), outside=True,
    ),
    "mmmu-pro": MMMU(
        ("standard (10 options)/test-*.parquet", "standard (10 options)/test/*.parquet"),
        meta=MMMU_META, subjects=(*HEALTH,), paper=PRO | {"options 10": 204},
    ),
    "mmmu-pro-vision": Vision(
        ("vision/test-*.parquet", "vision/test/*.parquet"),
        images="image", subjects=(*HEALTH,), paper=PRO,
    ),
    # banks for curate.py: exams, demonstrations, our own files (case reports beside their images),
    # and records of other trainers
    "medqa-train": Reader(
        ("**/US/train.jsonl", "phrases_no_exclude_train.jsonl"), answer="answer_idx", meta=EXAM_META
    ),
    "medmcqa": MedMCQA(
        ("data/train-*.parquet", "**/train.json", "**/train.csv"), options=OP[:4], answer="cop",
        meta=("subject_name", "topic_name"), leaves_out=True,
    ),
    "m23k": M23K(
        ("data/train-*.parquet",), question="prompt", answer="answer_letter", text="answer_string",
        meta=("source",), leaves_out=True,
    ),
    "pmc-vqa": PMCVQA(
        ("train.csv",), question="Question", options=CHOICE_COLUMNS, answer="Answer_label",
        text="Answer", images="Figure_path", leaves_out=True,
    ),
    "pmc-vqa-2": PMCVQA(
        ("train_2.csv",), question="Question", options=CHOICE_COLUMNS, answer="Answer",
        text="Answer", images="Figure_path", folder="images_2", leaves_out=True,
    ),
    "huatuo": Reader(("demo_data.json",), answer="answer_idx", meta=EXAM_META),
    "questions": Own(("*.jsonl",)),
    "sharegpt": Conversation(("*.json", "*.jsonl")),
}  # fmt: skip

# --------------------------------------------------------------------------------------------------
# Rows of a file


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a list, or of an object of columns {name: {row: value}}, as pandas writes it."""
    rows = data.read_json(path)
    if isinstance(rows, dict) and all(isinstance(column, dict) for column in rows.values()):
        names = next(iter(rows.values()), {})
        rows = [{key: column.get(name) for key, column in rows.items()} for name in names]
    if not isinstance(rows, list):
        raise data.RowError(f"{path}: expected a list of rows, or an object of columns")
    for number, row in enumerate(rows):
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise data.RowError(f"{where}: expected an object, found {type(row).__name__}")
        yield where, row


def csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    with data.open_file(path) as file, damaged(path, "not CSV"):
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        for number, row in enumerate(csv.DictReader(text, strict=True)):
            where = f"{path}: row {number}"
            beyond = row.pop(None, [])  # Medbullets' rows have empty cells beyond the header
            if any(beyond) or None in row.values():
                raise data.RowError(f"{where}: has other cells than the header; download it again")
            yield where, row


def parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a parquet file, a few at a time: its images together take hundreds of megabytes."""
    import pyarrow.parquet

    with data.open_file(path) as file, damaged(path, "not a whole parquet file"):
        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=16)
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            yield f"{path}: row {number}", row


# each yields (where, row)
ROWS = {".jsonl": data.read_jsonl, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}

# --------------------------------------------------------------------------------------------------
# Images


def image_places(file: Path, folder: str) -> list[Path | zipfile.Path]:
    """Where a file's images may be: in its folder or the one above, in images/ or images.zip
    there. PMC-VQA's have a folder images/ or figures/ inside."""
    places: list[Path | zipfile.Path] = []
    for base in file.resolve().parents[:2]:
        places += [base / folder, base / folder / "images", base / folder / "figures", base]
        archive = base / f"{folder}.zip"
        if archive.is_file():
            with damaged(archive, "not a whole zip file"):
                inside = zipfile.Path(archive)
            places += [inside, *(part for part in inside.iterdir() if part.is_dir())]
        places.append(base / "figures")
    return places


def keep_image(
    image: str | bytes, where: str, places: list[Path | zipfile.Path], root: Path | None
) -> tuple[str, bool]:
    """Writes an image once below the root, if one is given. Returns (its path there, whether it was
    found)."""
    if isinstance(image, bytes):
        content = image
        name = hashlib.sha256(image).hexdigest()[:16] + image_suffix(image, where)
    else:
        name, where = image, f"{where}: image {image}"
        if not data.is_inside(name):
            raise data.RowError(f"{where} must be a path that stays inside the image root")
        source = next((place / name for place in places if (place / name).is_file()), None)
        if source is None or root is None:
            return name, source is not None or (root is not None and (root / name).is_file())
        with damaged(where, f"cannot be read from {source}"):
            content = source.read_bytes()
        image_suffix(content, where)
    if root is not None:
        write_image(content, root / name, where)
    return name, True


def image_suffix(content: bytes, where: str) -> str:
    """The suffix, such as ".png", by the content. Decodes the whole image: a truncated one would
    stop a training run."""
    from PIL import Image

    with damaged(where, "cannot be decoded as an image"):
        image = Image.open(io.BytesIO(content))
        image.load()
    return f".{image.format.lower()}"


def write_image(content: bytes, target: Path, where: str) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = data.unfinished(target)
        temporary.write_bytes(content)
        os.replace(temporary, target)  # if killed before this, the next run writes it again
    elif not target.is_file() or target.read_bytes() != content:
        said = f"{target} is there already and is another image; give another --images folder"
        raise data.RowError(f"{where}: {said}")


# --------------------------------------------------------------------------------------------------
# A whole set


def read_file(
    file: Path, name: str, image_root: Path | None, answers: dict
) -> Iterator[tuple[str, data.Question]]:
    """(where, question) of each row of one file. Prints what is left out."""
    reader, found, missing, left_out = READERS[name], 0, [], {}
    places = image_places(file, reader.folder)
    for where, row in reader.rows(file):
        if reader.subjects and (subject_of(row, where) in reader.subjects) == reader.outside:
            continue
        try:
            item = reader.item(with_answer(row, answers, where) if answers else row, where)
            question_of(item, [], name, where)  # images are read only for a good row
        except data.RowError as error:
            if not reader.leaves_out:
                raise
            reason = re.split("[:;]", str(error).removeprefix(f"{where}: "))[0]
            left_out.setdefault(reason, []).append(error)
            continue
        kept = [keep_image(image, where, places, image_root) for image in item.images]
        found += sum(there for _, there in kept)
        missing += [f"{where}: image {image}" for image, there in kept if not there]
        yield where, question_of(item, [image for image, _ in kept], name, where)
    if left_out:
        print(f"{file}: faulty rows left out: {sum(map(len, left_out.values()))}")
    for reason, errors in left_out.items():
        print(f"  {len(errors)} x {reason}; the first is {errors[0]}")
    if missing and (found or image_root is not None):
        said = "is not in the file's folder or the one above, nor in "
        said += f"{reader.folder}/ or {reader.folder}.zip there"
        counts = f"{len(missing)} are missing, {found} are there"
        raise data.RowError(f"{missing[0]} {said} ({counts})")
    if missing:
        print(f"{file}: names {len(missing)} images and none is beside it; none was checked")


def read(
    name: str, path: str | Path, image_root: Path | None, answers: str = ""
) -> list[data.Question]:
    """Every question of a published file or folder, in its order. answers: MMMU's file of answers.

    With an image root, images are written below it, once; those that a killed run wrote stay.
    Without a root nothing is written: images are looked for, and a file that came without them is
    reported. Raises RowError.
    """
    if name not in READERS:
        raise data.RowError(f"{name!r} is not a known set; known are {', '.join(READERS)}")
    reader, files = READERS[name], [Path(path)]
    answer_of = data.read_json(answers) if answers else {}
    if answers and not (isinstance(reader, MMMU) and isinstance(answer_of, dict)):
        said = "expected an object {id: answer}, for one of MMMU's sets"
        raise data.RowError(f"--answers {answers}: {said}")
    if files[0].is_dir():
        files = sorted({file for form in reader.files for file in files[0].glob(form)})
    if not files or not files[0].exists():
        said = f"is neither a file nor a folder with {' or '.join(reader.files)}"
        raise data.RowError(f"{path}: {said}; name the file itself")
    questions: list[data.Question] = []
    rows_of: dict[str, str] = {}  # published id -> its row
    seen: Counter = Counter()
    rows = (read_file(file, name, image_root, answer_of) for file in files)
    for where, question in chain.from_iterable(rows):
        known = question.id if isinstance(reader, Own) else question.meta.get("published_id")
        if known is not None and rows_of.setdefault(known, where) != where:
            said = f"{known!r} is already on {rows_of[known]}; remove one of the rows"
            raise data.RowError(f"{where}: id: {said}")
        seen[question.id] += 1
        if seen[question.id] > 1:
            meta = question.meta | {"repeats": question.id}
            question = replace(question, id=f"{question.id}-{seen[question.id]}", meta=meta)
        questions.append(question)
    if not questions:
        said = f"no question of {name} in it; check that it is the published file"
        raise data.RowError(f"{path}: {said}")
    return questions


# --------------------------------------------------------------------------------------------------
# python -m benchmarks inspect | convert


def count(questions: list[data.Question]) -> Counter:
    """Questions, images, options, and each value of the keys in SUBSETS. "options 0" are short
    answers."""
    found = Counter({"questions": len(questions), "images": sum(len(q.images) for q in questions)})
    found.update(f"images of a question {len(q.images)}" for q in questions if q.images)
    found.update(f"options {len(q.options)}" for q in questions)
    found.update(f"{key} {q.meta[key]}" for q in questions for key in SUBSETS if key in q.meta)
    found["rows that repeat another"] = sum("repeats" in q.meta for q in questions)
    return found


def inspect(name: str, questions: list[data.Question]) -> list[str]:
    """Prints the counts found next to the paper's. Returns the names of those that differ."""
    found, paper = count(questions), READERS[name].paper
    first = ["questions", "images"]
    rest = {*found, *paper}.difference(first)
    keys = first + sorted(rest, key=lambda key: (key.split()[0], -found[key], key))
    different = [key for key in paper if found[key] != paper[key]]
    width = max(map(len, keys))
    print(f"{name:<{width}}   found   paper")
    for key in keys:
        differs = "   differs" if key in different else ""
        print(f"  {key:<{width}} {found[key]:>5} {paper.get(key, ''):>7}{differs}")
    if paper:
        print(f"{len(different)} of {len(paper)} figures differ from what the paper used")
    else:
        print("the paper does not use this set by name")
    return different


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Read published benchmarks and question banks.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspected = commands.add_parser("inspect", help="what is in it, next to what the paper used")
    converted = commands.add_parser("convert", help="write questions.jsonl and the images")
    for command in (inspected, converted):
        command.add_argument("name", help=", ".join(READERS))
        command.add_argument("path", help="the published file, or the folder it was downloaded to")
        command.add_argument("--answers", default="", help="MMMU's answer_dict_test.json")
    converted.add_argument("--out", required=True, help="questions.jsonl to write")
    converted.add_argument("--images", default="", help="image root")
    inspected.set_defaults(images="")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    root = Path(args.images) if args.images else None
    questions = read(args.name, args.path, root, args.answers)
    if args.command == "convert":
        if root is None and any(question.images for question in questions):
            raise data.RowError(f"{args.path}: has images; say with --images where they go")
        text = "".join(data.json_lines(question.to_row() for question in questions))
        stage.new_file(args.out, text)
        print(f"{args.out}: {len(questions)} questions")
    inspect(args.name, questions)
