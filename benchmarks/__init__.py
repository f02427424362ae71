"""Reads five published benchmarks and the common formats of question banks.

    rows of a file (jsonl, json, csv, parquet)
        ->  Item: stem, options, answer, images, meta  ->  data.Question

READERS says how the rows of each set are read, which files a downloaded folder holds, and what the
paper used. Images come as files, in images.zip or as bytes in parquet. Each is written once below
the image root, under its published name or the hash of its bytes. Every question is kept; a row
that cannot be read is an error that names the row.

    python -m benchmarks inspect NAME PATH      the counts, next to the paper's
    python -m benchmarks convert NAME PATH --out questions.jsonl --images FOLDER

reads a published file or folder; writes questions.jsonl for evaluate.py and curate.py, and images

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
"""

import argparse
import ast
import csv
import hashlib
import io
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
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
MOST_BYTES = 64 * 2**20  # ours: most bytes of one image; published images have a few million
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # ours: zipfile can read only these in parts
# ours: the vision config has no text of its own
VISION_STEM = "Answer the multiple-choice question in the image."
# keys of meta by which tables are split
SUBSETS = ("question_type", "medical_task", "body_system", "subject", "modality")

# --------------------------------------------------------------------------------------------------
# Rows of a published file


def check_file(path: Path) -> None:
    """Raises RowError unless this is a regular file that can be read and is not empty."""
    try:
        with data.open_file(path) as file:
            empty = not file.read(1)
    except OSError as error:
        raise data.RowError(f"{path}: cannot be read ({error.strerror})") from None
    if empty:
        raise data.RowError(f"{path}: is empty; download it again")


def load_rows(path: Path, kind: str, number: int):
    """The JSON value of a file. In a list, the first of whose rows has this number, the RowError
    names the row (such as "record 1") that is not strict JSON."""
    content = path.read_bytes()
    try:
        return data.load_json(content, str(path))
    except data.RowError:
        text = content.decode(errors="replace")
        if not text.lstrip().startswith("["):
            raise
        decoder, gap, at = json.JSONDecoder(), re.compile(r"[\s,]*"), text.index("[") + 1
        while (at := gap.match(text, at).end()) < len(text) and text[at] != "]":
            try:
                end = decoder.raw_decode(text, at)[1]
            except (ValueError, RecursionError):
                end = len(text)
            data.load_json(text[at:end], f"{path}: {kind} {number}")
            at, number = end, number + 1
        raise


def check_columns(names: list, where: str) -> None:
    """Raises RowError if a name occurs twice: one of its two values would be lost."""
    for name, times in Counter(names).items():
        if times > 1:
            raise data.RowError(f"{where}: column {name!r} is there twice; rename one of them")


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a list, or of an object of columns {name: {row: value}}, as pandas writes it."""
    content = load_rows(path, "row", 0)
    if isinstance(content, list):
        rows = dict(enumerate(content))
    elif isinstance(content, dict) and all(isinstance(c, dict) for c in content.values()):
        names = next(iter(content.values()), {})
        for key, column in content.items():
            if list(column) != list(names):
                raise data.RowError(f"{path}: column {key!r} has other rows than the first column")
        rows = {name: {key: content[key][name] for key in content} for name in names}
    else:
        raise data.RowError(f"{path}: expected a list of rows, or an object of columns")
    for name, row in rows.items():
        where = f"{path}: row {name}"
        if not isinstance(row, dict):
            raise data.RowError(f"{where}: expected an object, found {type(row).__name__}")
        yield where, row


def csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise csv.Error("it has a NUL byte in it")
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        check_columns([name for name in rows.fieldnames or [] if name], str(path))
        for number, row in enumerate(rows):
            where = f"{path}: row {number}"
            beyond = row.pop(None, [])  # Medbullets' rows have empty cells beyond the header
            if any(beyond) or None in row.values():
                raise data.RowError(f"{where}: has other cells than the header; download it again")
            yield where, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise data.RowError(f"{path}: not CSV ({error}); download it again") from None


def parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a parquet file, a few at a time: its images together take hundreds of megabytes."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_columns(file.schema_arrow.names, str(path))
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=16))
            for number, row in enumerate(chain.from_iterable(batches)):
                yield f"{path}: row {number}", row
    except data.RowError:
        raise
    except Exception as error:  # pyarrow does not document its errors for a damaged file
        said = f"not a whole parquet file ({error}); download it again"
        raise data.RowError(f"{path}: {said}") from None


# each yields (where, row)
ROWS = {".jsonl": data.read_jsonl, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}

# --------------------------------------------------------------------------------------------------
# Images


def image_places(file: Path) -> list[Path | zipfile.Path]:
    """Where a file's images may be: in its folder or the one above, in images/ or images.zip
    there."""
    places: list[Path | zipfile.Path] = []
    for base in file.resolve().parents[:2]:
        places += [base / "images", base]
        archive = base / "images.zip"
        if archive.is_file():
            try:
                inside = zipfile.Path(archive)
            except Exception as error:  # zipfile does not document its errors for a damaged zip
                said = f"not a whole zip file ({error}); download it again"
                raise data.RowError(f"{archive}: {said}") from None
            places += [inside, *(part for part in inside.iterdir() if part.is_dir())]
    return places


def keep_image(
    image: str | bytes, where: str, places: list[Path | zipfile.Path], root: Path | None
) -> tuple[str, bool]:
    """Writes an image once below the root, if one is given. Returns (its path there, whether it was
    found)."""
    try:
        if isinstance(image, bytes):
            content, suffix = image, image_suffix(image, where)
            name = hashlib.sha256(image).hexdigest()[:16] + suffix
        else:
            name, where = image, f"{where}: image {image}"
            if not data.is_inside(image):
                raise data.RowError(f"{where} must be a path that stays inside the image root")
            source = next((place / image for place in places if (place / image).is_file()), None)
            if source is None or root is None:
                return image, source is not None or (root is not None and (root / image).is_file())
            content = read_image(source, where)
            image_suffix(content, where)
        if root is not None:
            write_image(content, root / name, where)
        return name, True
    except OSError as error:  # a name too long for a file, a folder in the way, a full disk
        raise data.RowError(f"{where}: {error}") from None


def read_image(source: Path | zipfile.Path, where: str) -> bytes:
    """The bytes of an image file, in a zip or not. Reads at most MOST_BYTES + 1, whatever size the
    archive declares."""
    try:
        if isinstance(source, zipfile.Path):
            member = source.root.getinfo(source.at)
            if member.compress_type not in PACKED:
                raise NotImplementedError("it must be stored or deflated")
            declared = member.file_size
        else:
            declared = source.stat().st_size
        with source.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except Exception as error:  # zipfile does not document its errors for a damaged zip
        said = f"cannot be read from {source} ({error}); download it again"
        raise data.RowError(f"{where} {said}") from None
    if declared != len(content) <= MOST_BYTES:
        sizes = f"{len(content)} bytes instead of {declared}"
        raise data.RowError(f"{where} has {sizes} in {source}; download it again")
    return content


def write_image(content: bytes, target: Path, where: str) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = data.unfinished(target)
        temporary.write_bytes(content)
        os.replace(temporary, target)  # if killed before this, the next run writes it again
    elif not target.is_file() or target.read_bytes() != content:
        said = f"{target} is there already and is another image; give another --images folder"
        raise data.RowError(f"{where}: {said}")


def image_suffix(content: bytes, where: str) -> str:
    """The suffix, such as ".png", by the content. Decodes the whole image: a truncated one would
    stop a training run."""
    from PIL import Image

    if len(content) > MOST_BYTES:
        raise data.RowError(f"{where}: has more than {MOST_BYTES} bytes; make the image smaller")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return f".{image.format.lower()}"
    except Exception as error:  # Pillow does not document its errors for a damaged image
        said = f"cannot be decoded as an image ({error}); download it again"
        raise data.RowError(f"{where}: {said}") from None


# --------------------------------------------------------------------------------------------------
# One row of each published form


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


def choices(texts: list, where: str, letters: list | None = None) -> dict[str, str]:
    """{"A": "x", "B": "y"}: two to ten options, with a text each. letters: those that the row has;
    they must be in order."""
    where, known = f"{where}: options", list(data.LETTERS[: len(texts)])
    if not 2 <= len(texts) <= len(data.LETTERS):
        raise data.RowError(f"{where}: there are {len(texts)}, expected 2 to {len(data.LETTERS)}")
    if letters is not None and letters != known:
        raise data.RowError(f"{where}: letters are {letters}, expected A, B, C ... in order")
    for letter, text in zip(known, texts):
        if not isinstance(text, str) or not text.strip():
            raise data.RowError(f"{where}: {letter} is {text!r}, expected a text")
    return dict(zip(known, texts))


def literal(value, where: str, key: str) -> list[str]:
    """A list of texts, as it is or as MMMU writes it: "['a', 'b']"."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            said = f"{value[:60]!r} is not the text of a list"
            raise data.RowError(f"{where}: {key}: {said}") from None
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise data.RowError(f"{where}: {key}: expected a list of texts, found {value!r:.60}")
    return value


def choices_in_text(text: str, where: str) -> dict[str, str]:
    """{"A": "x", "B": "y"} of "(A) x (B) y". Each letter must occur once, in order: then the text
    is not ambiguous."""
    parts = re.split(rf"(?:^|(?<=\s))\(([{data.LETTERS}])\)\s", text.strip())
    if parts[0].strip() or parts[1::2] != list(data.LETTERS[: len(parts) // 2]):
        said = f"its choices are {parts[1::2]}, expected (A) (B) ... once each, in order"
        raise data.RowError(f"{where}: question: {said}")
    return choices([choice.strip() for choice in parts[2::2]], where)


def medxpertqa(row: dict, where: str) -> Item:
    """Options are in the question's text, and mostly also in a column: {letter: text}, or a list of
    {letter, content}."""
    data.need(row, where, question=str)
    stem, mark, shown = row["question"].rpartition("\nAnswer Choices:")
    if row.get("options") is not None:
        options = options_beside(row, where)
        beside = " ".join(f"({letter}) {text}" for letter, text in options.items())
        if mark and shown.split() != beside.split():
            said = f"its choices {shown[:80]!r} are not its options"
            raise data.RowError(f"{where}: question: {said}")
    elif mark:
        options = choices_in_text(shown, where)
    else:
        raise data.RowError(f"{where}: no options, nor 'Answer Choices:' in the question")
    label = row.get("label")
    label = label[0] if isinstance(label, list) and len(label) == 1 else label
    if not isinstance(label, str):
        raise data.RowError(f"{where}: label: expected one letter, found {label!r}")
    meta = picked(row, where, "question_type", "medical_task", "body_system")
    images = image_list(row, where, "image_path")
    return Item(stem if mark else row["question"], options, label, images, meta)


def options_beside(row: dict, where: str) -> dict[str, str]:
    """The options of a row: {letter: text}, or a list of {letter, content}."""
    options = row["options"]
    if not isinstance(options, list):
        data.need(row, where, options=dict)
        return choices(list(options.values()), where, list(options))
    for option in options:
        found = option if isinstance(option, dict) else {}
        data.need(found, f"{where}: options", letter=str, content=str)
    letters = [option["letter"] for option in options]
    return choices([option["content"] for option in options], where, letters)


def picked(row: dict, where: str, *keys: str) -> dict:
    """For meta: the published id of a row, and what it has of these keys; all must be texts."""
    found = {key: row[key] for key in ("id", *keys) if row.get(key) not in (None, "")}
    data.need(found, where, **dict.fromkeys(found, str))
    return ({"published_id": found.pop("id")} if "id" in found else {}) | found


def same_answer(letter: str, text, options: dict[str, str], where: str) -> str:
    """The answer's letter. Its text, if the row has one, must be that option's text."""
    if letter in options and text not in (None, letter):
        right = data.normalise(options[letter])
        if not isinstance(text, str) or data.normalise(text) != right:
            said = f"{letter!r} {text!r} is not among the options {options}"
            raise data.RowError(f"{where}: answer: {said}")
    return letter


def exam(row: dict, where: str) -> Item:
    """MedQA's US/*.jsonl and HuatuoGPT-o1's demo_data.json: options by letter, answer_idx, the
    answer's text. MedQA also in MedXpertQA's form, with a label."""
    if "label" in row:
        return medxpertqa(row, where)
    data.need(row, where, question=str, options=dict, answer_idx=str)
    options = options_beside(row, where)
    answer = same_answer(row["answer_idx"], row.get("answer"), options, where)
    meta = picked(row, where, "meta_info", "Complex_CoT", "Response")
    return Item(row["question"], options, answer, meta=meta)


def medbullets(row: dict, where: str) -> Item:
    data.need(row, where, question=str, opa=str, opb=str, opc=str, opd=str, answer_idx=str)
    texts = [row[key] for key in ("opa", "opb", "opc", "opd", "ope") if row.get(key) is not None]
    options = choices(texts, where)
    answer = same_answer(row["answer_idx"], row.get("answer"), options, where)
    return Item(row["question"], options, answer, meta=picked(row, where, "link"))


def picture(value, where: str, key: str = "path") -> str | bytes | None:
    """An image's bytes or file name, which may be inside an object; None if there is none."""
    if not isinstance(value, dict):
        value = {"bytes" if isinstance(value, bytes) else key: value}
    found, kind = value.get("bytes"), bytes
    if found is None:
        found, kind = value.get(key), str
    if found is not None and not (isinstance(found, kind) and found.strip()):
        raise data.RowError(f"{where}: expected an image's bytes or name, found {found!r:.60}")
    return found


def image_list(row: dict, where: str, key: str = "path") -> list[str | bytes]:
    """A row's images; its cell is a list, one image, or nothing."""
    images = row.get("images")
    if images is None:
        return []
    cells = images if isinstance(images, list) else [images]
    found = [picture(cell, f"{where}: images", key) for cell in cells]
    if None in found:
        raise data.RowError(f"{where}: images: image None must be a path or bytes")
    return found


def subject_of(row: dict, where: str) -> str:
    """The subject. In MMMU only the id has it: validation_Public_Health_7."""
    known = picked(row, where, "subject")
    match = re.fullmatch(r"[a-z]+_(\w+)_\d+", known.get("published_id", ""))
    if "subject" not in known and not match:
        said = f"{row.get('id')!r} does not tell a subject, expected validation_SUBJECT_NUMBER"
        raise data.RowError(f"{where}: id: {said}")
    return (known.get("subject") or match[1]).replace(" ", "_")


def mmmu(row: dict, where: str) -> Item:
    data.need(row, where, id=str, question=str, answer=str)
    texts = literal(row.get("options"), where, "options")
    kind = row.get("question_type") or "multiple-choice"
    short = kind == "open"
    if kind not in ("multiple-choice", "open") or (short and texts):
        raise data.RowError(f"{where}: question_type: is {kind!r}, with {len(texts)} options")
    options = {} if short else choices(texts, where)
    meta = picked(row, where, "topic_difficulty", "subfield") | {"subject": subject_of(row, where)}
    if row.get("img_type"):
        meta["modality"] = ", ".join(dict.fromkeys(literal(row["img_type"], where, "img_type")))
    answer = row["answer"]
    if short and answer.startswith("["):
        meta["answers"] = literal(answer, where, "answer")
        answer = next(iter(meta["answers"]), "")
    columns = [f"image_{n}" for n in range(1, MOST_IMAGES + 1)]
    cells = [picture(row.get(column), f"{where}: {column}") for column in columns]
    images = [cell for cell in cells if cell]
    text = "\n".join([row["question"], *options.values()])
    meta["image_marks"] = [int(n) for n in data.IMAGE_MARK.findall(text)]
    for n in {*meta["image_marks"], *(n for n, cell in enumerate(cells, 1) if cell)}:
        if not 1 <= n <= len(images) or not cells[n - 1]:
            raise data.RowError(f"{where}: image_{n} is missing, or one before it is")
    return Item(row["question"], options, answer, images, meta)


def mmmu_vision(row: dict, where: str) -> Item:
    data.need(row, where, id=str, answer=str)
    image = picture(row.get("image"), where)
    if image is None:
        raise data.RowError(f"{where}: image: is missing, and it is all there is of the question")
    options = choices(literal(row.get("options"), where, "options"), where)
    meta = picked(row, where) | {"subject": subject_of(row, where)}
    return Item(VISION_STEM, options, row["answer"], [image], meta)


def own(row: dict, where: str) -> Item:
    """A row of questions.jsonl, with the id it has."""
    return Item(**vars(schema.question_from(row, where)))


def exchange(row: dict, where: str) -> tuple[str, str]:
    """(question, answer) of a ShareGPT or OpenAI record. A system turn is left out."""
    turns = row.get("messages") or row.get("conversations")
    wanted = "expected one question and one answer, both texts"
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        said = f"no list 'messages' or 'conversations' of turns, {wanted}"
        raise data.RowError(f"{where}: {said}; the row has {sorted(row)}")
    turns = [turn for turn in turns if turn.get("role", turn.get("from")) != "system"]
    roles = [turn.get("role", turn.get("from")) for turn in turns]
    texts = [turn.get("content", turn.get("value")) for turn in turns]
    known = roles in (["human", "gpt"], ["user", "assistant"])
    if not known or not all(isinstance(text, str) for text in texts):
        raise data.RowError(f"{where}: turns are {roles}, {wanted}")
    return texts[0], texts[1]


CHOICE_LINES = re.compile(rf"(?:^\s*\(?[{data.LETTERS}][).:]\s+\S.*\n?){{2,}}", re.M)


def split_options(text: str, where: str) -> tuple[str, dict[str, str]]:
    """(stem, options). Options come after "Answer Choices:", or are lettered lines; or none."""
    stem, mark, shown = text.rpartition("\nAnswer Choices:")
    if mark:
        return stem, choices_in_text(shown, where)
    lines = CHOICE_LINES.search(text)
    if not lines:
        return text, {}
    stem = f"{text[: lines.start()].rstrip()}\n{text[lines.end() :].strip()}".strip()
    shown = re.sub(rf"^\s*\(?([{data.LETTERS}])[).:]", r"(\1)", lines[0], flags=re.M)
    return stem, choices_in_text(shown, where)


def conversation(row: dict, where: str) -> Item:
    """A ShareGPT or OpenAI record: one question with <image> marks, and one answer.
    meta["response"] keeps the whole answer."""
    asked, response = exchange(row, where)
    images, marks = image_list(row, where), asked.count("<image>")
    if marks != len(images):
        raise data.RowError(f"{where}: {marks} <image> marks for {len(images)} images")
    meta = picked(row, where) | {"response": response}
    text = re.sub(r"^(?:\s*<image>)+\s*", "", asked)
    if "<image>" in text:  # marks inside the text are numbered, as in MMMU
        text, meta["image_marks"] = asked, list(range(1, marks + 1))
        for n in meta["image_marks"]:
            text = text.replace("<image>", f"<image {n}>", 1)
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
    try:  # `where` is its id until the row is checked; the id of the content comes after
        row = data.Question(**fields | {"id": item.id or where}).to_row()
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise data.RowError(f"{where}: cannot be written as JSON ({error})") from None
    schema.question_from(row, where)
    return data.Question(**fields)


# --------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Reader:
    """What is known of a published set. files: its paths in a downloaded folder. paper: the paper's
    counts, named as in `count`. subjects: those that belong to it; empty: all."""

    item: Callable[[dict, str], Item]
    files: tuple[str, ...]
    paper: dict[str, int] = field(default_factory=dict)
    subjects: tuple[str, ...] = ()


# paper Tables 1, 2: all rows but one are shares of these; images: as published
MM = {
    "questions": 2000, "images": 2852,
    "question_type Reasoning": 1446, "question_type Understanding": 554,
    "medical_task Diagnosis": 1199, "medical_task Treatment": 448,
    "medical_task Basic Science": 353,
}  # fmt: skip
MMMU = {"questions": 150, "options 0": 5} | {f"subject {key}": n for key, (n, _) in HEALTH.items()}
MMMU_FILES = tuple(f"{key}/validation{form}.parquet" for key in HEALTH for form in ("-*", "/*"))
# the paper does not say which of the configs it used
PRO = {"questions": 286} | {f"subject {key}": n for key, (_, n) in HEALTH.items()}
PRO_FILES = ("standard (10 options)/test-*.parquet", "standard (10 options)/test/*.parquet")
VISION_FILES = ("vision/test-*.parquet", "vision/test/*.parquet")
MEDQA_FILES = ("**/US/4_options/*_test.jsonl", "phrases_no_exclude_test.jsonl")
OP4, OP5 = {"questions": 308, "options 4": 308}, {"questions": 308, "options 5": 308}
READERS = {
    "medxpertqa-mm": Reader(medxpertqa, ("MM/test.jsonl", "test.jsonl"), MM),
    "medxpertqa-text": Reader(medxpertqa, ("Text/test.jsonl", "test.jsonl")),
    "medqa": Reader(exam, MEDQA_FILES, {"questions": 1273, "options 4": 1273}),
    "medbullets-op4": Reader(medbullets, ("**/medbullets_op4.json",), OP4),
    "medbullets-op5": Reader(medbullets, ("**/medbullets_op5.json",), OP5),
    "mmmu": Reader(mmmu, MMMU_FILES, MMMU, tuple(HEALTH)),
    "mmmu-pro": Reader(mmmu, PRO_FILES, PRO | {"options 10": 204}, tuple(HEALTH)),
    "mmmu-pro-vision": Reader(mmmu_vision, VISION_FILES, PRO, tuple(HEALTH)),
    # banks for curate.py: exams, demonstrations, our own files (case reports beside their images),
    # and records of other trainers
    "medqa-train": Reader(exam, ("**/US/train.jsonl", "phrases_no_exclude_train.jsonl")),
    "huatuo": Reader(exam, ("demo_data.json",)),
    "questions": Reader(own, ("*.jsonl",)),
    "sharegpt": Reader(conversation, ("*.json", "*.jsonl")),
}


def read_file(
    file: Path, name: str, image_root: Path | None
) -> Iterator[tuple[str, data.Question]]:
    """(where, question) of each row of one file."""
    if file.suffix.lower() not in ROWS:
        raise data.RowError(f"{file}: expected one of {', '.join(ROWS)}")
    check_file(file)
    reader, places, found, missing = READERS[name], image_places(file), 0, []
    for where, row in ROWS[file.suffix.lower()](file):
        if reader.subjects and subject_of(row, where) not in reader.subjects:
            continue
        item = reader.item(row, where)
        kept = [keep_image(image, where, places, image_root) for image in item.images]
        found += sum(there for _, there in kept)
        missing += [f"{where}: image {image}" for image, there in kept if not there]
        yield where, question_of(item, [image for image, _ in kept], name, where)
    if missing and (found or image_root is not None):
        said = f"{missing[0]} is not beside the file, nor in images/ or images.zip there"
        counts = f"{len(missing)} are missing, {found} are there"
        raise data.RowError(f"{said} or one folder up ({counts})")
    if missing:
        print(f"{file}: names {len(missing)} images and none is beside it; none was checked")


def read(name: str, path: str | Path, image_root: Path | None) -> list[data.Question]:
    """Every question of a published file or folder, in its order.

    With an image root, images are written below it, once; those that a killed run wrote stay.
    Without a root nothing is written: images are looked for, and a file that came without them is
    reported. Raises RowError.
    """
    if name not in READERS:
        raise data.RowError(f"{name!r} is not a known set; known are {', '.join(READERS)}")
    reader, files = READERS[name], [Path(path)]
    if os.path.isdir(path):
        files = sorted({file for form in reader.files for file in Path(path).glob(form)})
    if not files or not os.path.exists(files[0]):
        said = f"is neither a file nor a folder with {' or '.join(reader.files)}"
        raise data.RowError(f"{path}: {said}; name the file itself")
    questions: list[data.Question] = []
    rows_of: dict[str, str] = {}  # published id -> its row
    seen: Counter = Counter()
    for where, question in chain.from_iterable(read_file(file, name, image_root) for file in files):
        known = question.id if reader.item is own else question.meta.get("published_id")
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
    converted.add_argument("--out", required=True, help="questions.jsonl to write")
    converted.add_argument("--images", default="", help="image root")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    questions = read(args.name, args.path, None)
    if args.command == "convert":
        if any(question.images for question in questions):
            if not args.images:
                raise data.RowError(f"{args.path}: has images; say with --images where they go")
            questions = read(args.name, args.path, Path(args.images))
        text = "".join(data.json_lines(question.to_row() for question in questions))
        stage.new_file(args.out, text, [args.path])
        print(f"{args.out}: {len(questions)} questions")
    inspect(args.name, questions)
