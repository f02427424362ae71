"""Published files become questions: five benchmarks and the common forms of question banks, each as its authors publish it.

    rows of a file (jsonl, json, csv, parquet)  ->  Item: stem, options, answer, images, meta  ->  data.Question

READERS is a table of facts: how a row is read, which files a downloaded folder holds, what the paper used. Images come as files, in images.zip or as bytes in parquet; they
are written once below the image root, under their published name or the hash of their bytes. Every question is kept; a
row that cannot be read is an error that names it.

    python benchmarks.py inspect medxpertqa-mm MedXpertQA/          what is there, next to what the paper used
    python benchmarks.py convert medxpertqa-mm MedXpertQA/ --out data/medxpertqa.jsonl --images data/images

reads a published file or folder; writes questions.jsonl for evaluate.py and curate.py, and images below --images

Where we depart from the paper, or it is silent:
  1. It names benchmarks, not files. Counts follow from its tables: MedXpertQA-MM test (2000), MMMU validation (150),
     MMMU-Pro test (286), MedQA test with 4 options (1273), Medbullets (308). Whether MMMU-Pro is the standard or the
     vision config, and Medbullets has 4 or 5 options, cannot be told from its figures; all are here.
  2. Images stand in front, in published order; <image 1> marks stay in the text. The paper does not say.
  3. In MMMU-Pro's vision config the question and its options are only in the image. The house prompt repeats the
     options as text, so that an answer can be read the same way everywhere; the benchmark's own (official.py) does not.
  4. Published rows equal in content, images included, are all kept: the second has "-2" after its id and the first's
     id in meta["repeats"].
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
from pathlib import Path

import answers
import data
import flags
import stage

HEALTH = {  # MMMU's Health & Medicine: subject -> (questions in MMMU validation, in MMMU-Pro test)
    "Basic_Medical_Science": (30, 52), "Clinical_Medicine": (30, 59), "Diagnostics_and_Laboratory_Medicine": (30, 60),
    "Pharmacy": (30, 57), "Public_Health": (30, 58),
}  # fmt: skip
MOST_IMAGES = 7  # MMMU's columns image_1 ... image_7
MOST_BYTES = 64 * 2**20  # ours: most bytes of one image; the published ones have a few million
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # ours: zipfile unpacks no other form in parts
VISION_STEM = "Answer the multiple-choice question in the image."  # ours: the vision config has no text of its own
SUBSETS = ("question_type", "medical_task", "body_system", "subject", "modality")  # keys of meta that tables part by

# ---------------------------------------------------------------------------------------------------------------
# Rows of a published file


def check_file(path: Path) -> None:
    """Raises RowError unless this is a regular file that can be read and is not empty. Opening a
    pipe would wait for its writer without end."""
    if not os.path.exists(path):
        raise data.RowError(f"{path}: no such file; check the path")
    if not os.path.isfile(path):
        raise data.RowError(f"{path}: is no regular file; check the path")
    try:
        with open(path, "rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise data.RowError(f"{path}: cannot be read ({error.strerror})") from None
    if empty:
        raise data.RowError(f"{path}: is empty; download it again")


def load_rows(path: Path, kind: str, first: int):
    """The JSON value of a file. What cannot be read in a list is named by the number of its row."""
    content = path.read_bytes()
    try:
        return data.load_json(content, str(path))
    except data.RowError:
        text = content.decode(errors="replace")
        if text.lstrip().startswith("["):
            check_rows(text, f"{path}: {kind}", first)
        raise


def check_rows(text: str, where: str, number: int) -> None:
    """Raises RowError for the first row of a JSON list that load_json refuses."""
    decoder, gap, at = json.JSONDecoder(), re.compile(r"[\s,]*"), text.index("[") + 1
    while (at := gap.match(text, at).end()) < len(text) and text[at] != "]":
        try:
            end = decoder.raw_decode(text, at)[1]
        except (ValueError, RecursionError):
            end = len(text)
        data.load_json(text[at:end], f"{where} {number}")
        at, number = end, number + 1


def once(names: list, where: str) -> None:
    """Raises RowError for a name that is there twice: one of its two values would be lost."""
    for name, times in Counter(names).items():
        if times > 1:
            raise data.RowError(f"{where}: {name!r} is there twice; rename one of them")


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    content = load_rows(path, "row", 0)
    if isinstance(content, dict) and content and all(isinstance(column, dict) for column in content.values()):
        names = list(next(iter(content.values())))
        for key, column in content.items():
            if list(column) != names:
                raise data.RowError(f"{path}: column {key!r} has other rows than the first column; download it again")
        content = {name: {key: column[name] for key, column in content.items()} for name in names}
    elif isinstance(content, list):
        content = dict(enumerate(content))
    else:
        raise data.RowError(f"{path}: expected a list of rows, or an object of columns as pandas writes it")
    for name, row in content.items():
        if not isinstance(row, dict):
            raise data.RowError(f"{path}: row {name}: expected an object, found {type(row).__name__}")
        yield f"{path}: row {name}", row


def csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise csv.Error("it has a NUL byte in it")
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names = list(rows.fieldnames or [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise data.RowError(f"{path}: not CSV ({error}); download it again") from None
    once([name for name in names if name], f"{path}: header")
    try:
        for number, row in enumerate(rows):
            where = f"{path}: row {number}"
            beyond = row.pop(None, [])  # Medbullets' rows have empty cells that the header has not
            if any(beyond) or None in row.values():
                raise data.RowError(f"{where}: has other cells than the header; download it again")
            yield where, row
    except csv.Error as error:
        raise data.RowError(f"{path}: not CSV ({error}); download it again") from None


def parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a parquet file, a few at a time: their images are bytes, and hundreds of megabytes together."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise data.RowError(f"{path}: reading parquet needs pyarrow; pip install -r requirements.txt") from None
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            once(file.schema_arrow.names, f"{path}: columns")
            for batch in file.iter_batches(batch_size=16):
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", row
                    number += 1
    except data.RowError:
        raise
    except Exception as error:  # what the reader of a damaged file raises is not documented
        raise data.RowError(f"{path}: not a whole parquet file ({error}); download it again") from None


ROWS = {".jsonl": data.read_jsonl, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}  # each yields (where, row)

# ---------------------------------------------------------------------------------------------------------------
# Images


def image_places(file: Path) -> list[Path | zipfile.Path]:
    """Where the images that a file names may lie: beside it or one folder up, in images/, in images.zip."""
    places: list[Path | zipfile.Path] = []
    for base in (file.resolve().parent, file.resolve().parent.parent):
        places += [base / "images", base]
        if (base / "images.zip").is_file():
            try:
                inside = zipfile.Path(base / "images.zip")
            except Exception as error:  # what the reader of a damaged zip raises is not documented
                raise data.RowError(f"{base / 'images.zip'}: not a whole zip file ({error}); download it again") from None
            places += [inside, *(part for part in inside.iterdir() if part.is_dir())]
    return places


def keep_image(image: str | bytes, where: str, places: list[Path | zipfile.Path], root: Path | None) -> tuple[str, bool]:
    """(the image's path below the root, whether it was found). It is written there, once; with no root nothing is."""
    try:
        if isinstance(image, bytes):
            content = image
            name = hashlib.sha256(content).hexdigest()[:16] + image_suffix(content, where)
        else:
            name, where = image, f"{where}: image {image}"
            if not image or Path(image).is_absolute() or ".." in Path(image).parts:
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
    """The bytes of an image file, in a zip or not. Reads no more than an image may have, whatever
    size the archive declares."""
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
    except Exception as error:  # what the reader of a damaged zip raises is not documented
        said = f"cannot be read from {source} ({error}); download it again"
        raise data.RowError(f"{where} {said}") from None
    if declared != len(content) <= MOST_BYTES:
        sizes = f"{len(content)} bytes instead of {declared}"
        raise data.RowError(f"{where} has {sizes} in {source}; download it again")
    return content


def write_image(content: bytes, target: Path, where: str) -> None:
    if target.exists():
        if not target.is_file() or target.read_bytes() != content:
            raise data.RowError(f"{where}: {target} is there already and is another image; give another --images folder")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = data.unfinished(target)
    temporary.write_bytes(content)
    os.replace(temporary, target)  # killed before this, the next run writes it again


def image_suffix(content: bytes, where: str) -> str:
    """".png", ".jpeg" ... by what the bytes are. The image is decoded whole: one that is cut off ends a training run later."""
    from PIL import Image

    if len(content) > MOST_BYTES:
        raise data.RowError(f"{where}: has more than {MOST_BYTES} bytes; make the image smaller")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return f".{image.format.lower()}"
    except Exception as error:  # what the decoder of a damaged image raises is not documented
        raise data.RowError(f"{where}: cannot be decoded as an image ({error}); download it again") from None


# ---------------------------------------------------------------------------------------------------------------
# One row of each published form


@dataclass
class Item:
    """A row before its images have a place: they are names as published, or bytes. id only where our own rows have one."""

    question: str
    options: dict[str, str]
    answer: str
    images: list[str | bytes] = field(default_factory=list)
    meta: dict = field(default_factory=dict)
    source: str = ""
    id: str = ""


def choices(letters: list, texts: list, where: str) -> dict[str, str]:
    """{"A": "x", "B": "y"}: two to ten options, their letters in order, each with a text."""
    where = f"{where}: options"
    if not 2 <= len(texts) <= len(data.LETTERS):
        raise data.RowError(f"{where}: there are {len(texts)}, expected 2 to {len(data.LETTERS)}")
    if letters != list(data.LETTERS[: len(letters)]):
        raise data.RowError(f"{where}: letters are {letters}, expected A, B, C ... in order")
    for letter, text in zip(letters, texts):
        if not isinstance(text, str) or not text.strip():
            raise data.RowError(f"{where}: {letter} is {text!r}, expected a text")
    return dict(zip(letters, texts))


def lettered(texts: list, where: str) -> dict[str, str]:
    return choices(list(data.LETTERS[: len(texts)]), texts, where)


def literal(value, where: str, key: str) -> list[str]:
    """A list of texts, or the text of one as MMMU has it: "['a', 'b']"."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise data.RowError(f"{where}: {key}: {value[:60]!r} is not the text of a list") from None
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise data.RowError(f"{where}: {key}: expected a list of texts, found {value!r:.60}")
    return value


def choices_in_text(text: str, where: str) -> dict[str, str]:
    """{"A": "x", "B": "y"} of "(A) x (B) y". Each letter must stand there once, in order: no other reading is possible."""
    parts = re.split(rf"(?:^|(?<=\s))\(([{data.LETTERS}])\)\s", text.strip())
    if parts[0].strip() or parts[1::2] != list(data.LETTERS[: len(parts) // 2]):
        raise data.RowError(f"{where}: question: the letters after 'Answer Choices:' are {parts[1::2]}, expected (A) (B) ... once each, in order")
    return lettered([choice.strip() for choice in parts[2::2]], where)


def medxpertqa(row: dict, where: str) -> Item:
    """Options stand inside the question's text, and mostly also beside it: as {letter: text}, or {letter, content} each."""
    data.need(row, where, question=str)
    stem, mark, shown = row["question"].rpartition("\nAnswer Choices:")
    if row.get("options") is not None:
        options = options_beside(row, where)
        beside = " ".join(f"({letter}) {text}" for letter, text in options.items())
        if mark and shown.split() != beside.split():
            said = "the choices in its text are not its options"
            raise data.RowError(f"{where}: question: {said}: {shown[:80]!r}")
    elif mark:
        options = choices_in_text(shown, where)
    else:
        said = "neither beside the question nor after 'Answer Choices:' in it"
        raise data.RowError(f"{where}: no options, {said}")
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
        return choices(list(options), list(options.values()), where)
    for option in options:
        found = option if isinstance(option, dict) else {}
        data.need(found, f"{where}: options", letter=str, content=str)
    letters = [option["letter"] for option in options]
    return choices(letters, [option["content"] for option in options], where)


def picked(row: dict, where: str, *keys: str) -> dict:
    """The named keys of a row that it has, for meta, and its id as published: all of them texts."""
    found = {key: row[key] for key in ("id", *keys) if row.get(key) not in (None, "")}
    data.need(found, where, **dict.fromkeys(found, str))
    return ({"published_id": found.pop("id")} if "id" in found else {}) | found


def same_answer(letter: str, text, options: dict[str, str], where: str) -> str:
    """The letter of the answer. Its text, where the row has one, must be the option's."""
    if letter not in options:
        raise data.RowError(f"{where}: answer: {letter!r} is not among the options {options}")
    same = isinstance(text, str) and data.normalise(text) == data.normalise(options[letter])
    if text not in (None, letter) and not same:
        said = f"{letter!r} {text!r}"
        raise data.RowError(f"{where}: answer: {said} is not among the options {options}")
    return letter


def exam(row: dict, where: str) -> Item:
    """MedQA's US/*.jsonl and HuatuoGPT-o1's demo_data.json: options by letter, answer_idx, the answer's text. MedQA also in
    MedXpertQA's form, with a label."""
    if "label" in row:
        return medxpertqa(row, where)
    data.need(row, where, question=str, options=dict, answer_idx=str)
    options = options_beside(row, where)
    answer = same_answer(row["answer_idx"], row.get("answer"), options, where)
    meta = picked(row, where, "meta_info", "Complex_CoT", "Response")
    return Item(row["question"], options, answer, meta=meta)


def medbullets(row: dict, where: str) -> Item:
    data.need(row, where, question=str, opa=str, opb=str, opc=str, opd=str, answer_idx=str)
    options = lettered([row[key] for key in ("opa", "opb", "opc", "opd", "ope") if row.get(key) is not None], where)
    answer = same_answer(row["answer_idx"], row.get("answer"), options, where)
    return Item(row["question"], options, answer, meta=picked(row, where, "link"))


def picture(value, where: str, key: str = "path") -> str | bytes | None:
    """An image as published: its bytes, its file's name, an object with one of them, or nothing."""
    if not isinstance(value, dict):
        value = {"bytes" if isinstance(value, bytes) else key: value}
    found, kind = value.get("bytes"), bytes
    if found is None:
        found, kind = value.get(key), str
    if found is not None and not (isinstance(found, kind) and found.strip()):
        raise data.RowError(f"{where}: expected an image's bytes or name, found {found!r:.60}")
    return found


def image_list(row: dict, where: str, key: str = "path") -> list[str | bytes]:
    """The images of a row: a list of them, one alone, or nothing."""
    images = row.get("images")
    if images is None:
        return []
    cells = images if isinstance(images, list) else [images]
    found = [picture(cell, f"{where}: images", key) for cell in cells]
    if None in found:
        raise data.RowError(f"{where}: images: image None must be a path or bytes")
    return found


def subject_of(row: dict, where: str) -> str:
    """MMMU-Pro has a column for it; MMMU only the id: validation_Public_Health_7."""
    known = picked(row, where, "subject")
    match = re.fullmatch(r"[a-z]+_(\w+)_\d+", known.get("published_id", ""))
    if "subject" not in known and not match:
        raise data.RowError(f"{where}: id: {row.get('id')!r} does not tell a subject, expected validation_SUBJECT_NUMBER")
    return (known.get("subject") or match[1]).replace(" ", "_")


def mmmu(row: dict, where: str) -> Item:
    data.need(row, where, id=str, question=str, answer=str)
    texts = literal(row.get("options"), where, "options")
    kind = row.get("question_type") or "multiple-choice"
    if kind not in ("multiple-choice", "open") or (kind == "open" and texts):
        raise data.RowError(f"{where}: question_type: is {kind!r}, with {len(texts)} options")
    short = kind == "open"
    options = {} if short else lettered(texts, where)
    meta = picked(row, where, "topic_difficulty", "subfield") | {"subject": subject_of(row, where)}
    if row.get("img_type"):
        meta["modality"] = ", ".join(dict.fromkeys(literal(row["img_type"], where, "img_type")))
    answer = row["answer"]
    if short and answer.startswith("["):
        meta["answers"] = literal(answer, where, "answer")
        answer = next(iter(meta["answers"]), "")
    cells = [picture(row.get(f"image_{n}"), f"{where}: image_{n}") for n in range(1, MOST_IMAGES + 1)]
    images = [cell for cell in cells if cell]
    text = "\n".join([row["question"], *options.values()])
    marks = [int(n) for n in data.IMAGE_MARK.findall(text)]
    for n in {*marks, *(n for n, cell in enumerate(cells, 1) if cell)}:
        if not 1 <= n <= len(images) or not cells[n - 1]:
            raise data.RowError(f"{where}: image_{n} is missing, or one before it is; the text's marks are {marks}")
    return Item(row["question"], options, answer, images, meta | {"image_marks": marks})


def mmmu_vision(row: dict, where: str) -> Item:
    data.need(row, where, id=str, answer=str)
    image = picture(row.get("image"), where)
    if image is None:
        raise data.RowError(f"{where}: image: is missing, and it is all there is of the question")
    options = lettered(literal(row.get("options"), where, "options"), where)
    meta = picked(row, where) | {"subject": subject_of(row, where)}
    return Item(VISION_STEM, options, row["answer"], [image], meta)


def own(row: dict, where: str) -> Item:
    """A row of questions.jsonl, with the id it has."""
    question = data.Question.from_row(row, where)
    return Item(question.question, question.options, question.answer, question.images, question.meta, question.source, question.id)


def exchange(row: dict, where: str) -> tuple[str, str]:
    """(question, answer) of a ShareGPT or OpenAI record. A system turn is left out."""
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise data.RowError(
            f"{where}: no list 'messages' or 'conversations' of turns, "
            f"expected one question and one answer; the row has {sorted(row)}"
        )
    turns = [turn for turn in turns if turn.get("role", turn.get("from")) != "system"]
    roles = [turn.get("role", turn.get("from")) for turn in turns]
    texts = [turn.get("content", turn.get("value")) for turn in turns]
    known = roles in (["human", "gpt"], ["user", "assistant"])
    if not known or not all(isinstance(text, str) for text in texts):
        said = "expected one question and one answer, both texts"
        raise data.RowError(f"{where}: turns are {roles}, {said}")
    return texts[0], texts[1]


CHOICE_LINES = re.compile(rf"(?:^\s*\(?[{data.LETTERS}][).:]\s+\S.*\n?){{2,}}", re.M)


def conversation(row: dict, where: str) -> Item:
    """A ShareGPT or OpenAI record: one question and one answer, <image> marks in the question. Options are lettered lines.
    The whole answer is kept in meta["response"]."""
    text, response = exchange(row, where)
    images = image_list(row, where)
    if text.count("<image>") != len(images):
        raise data.RowError(f"{where}: {text.count('<image>')} <image> marks for {len(images)} images")
    meta = picked(row, where) | {"response": response}
    bare = re.sub(r"^(?:\s*<image>)+\s*", "", text)
    if "<image>" in bare:  # not all in front: numbered, as MMMU has them
        numbers = iter(meta.setdefault("image_marks", list(range(1, len(images) + 1))))
        bare = re.sub("<image>", lambda _: f"<image {next(numbers)}>", text)
    text = bare
    stem, mark, shown = text.rpartition("\nAnswer Choices:")
    lines = CHOICE_LINES.search(text)
    if mark:
        options = choices_in_text(shown, where)
    elif lines:
        stem = (text[: lines.start()].rstrip() + "\n" + text[lines.end() :].strip()).strip()
        options = choices_in_text(re.sub(rf"^\s*\(?([{data.LETTERS}])[).:]", r"(\1)", lines[0], flags=re.M), where)
    else:
        stem, options = text, {}
    block = response if data.answer_block(response) is not None else f"<answer>{data.answer_region(response) or ''}</answer>"
    answer = answers.extract_choice(block, options) if options else data.answer_block(block)
    if not answer or (not options and answer in data.LETTERS):
        raise data.RowError(f"{where}: the answer is not among the options {options}: {response[-80:]!r}; options stand one a line, as 'A. text'")
    return Item(stem, options, answer, images, meta)


def question_of(item: Item, images: list[str], source: str, where: str) -> data.Question:
    """The checked question of an item, given the names of its images."""
    question = data.Question(
        item.question, item.options, item.answer, images, item.source or source, item.meta,
        item.id or where,  # until it is checked; the id that follows from the content comes after
    )  # fmt: skip
    try:
        row = question.to_row()
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise data.RowError(f"{where}: cannot be written as JSON ({error})") from None
    data.Question.from_row(row, where)
    return replace(question, id=item.id)


# ---------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Reader:
    """What is known of a published set. files: where a folder as downloaded holds it. paper: what the paper used, by the
    names that `count` gives. subjects: the rows that belong to it; empty: all."""

    item: Callable[[dict, str], Item]
    files: tuple[str, ...]
    paper: dict[str, int] = field(default_factory=dict)
    subjects: tuple[str, ...] = ()


MM = Reader(medxpertqa, ("MM/test.jsonl", "test.jsonl"), {  # paper Tables 1, 2: all rows but one are shares of these; images: as published
    "questions": 2000, "images": 2852, "question_type Reasoning": 1446, "question_type Understanding": 554,
    "medical_task Diagnosis": 1199, "medical_task Treatment": 448, "medical_task Basic Science": 353,
})  # fmt: skip
MMMU = Reader(mmmu, tuple(f"{subject}/validation{form}.parquet" for subject in HEALTH for form in ("-*", "/*")), {
    "questions": 150, "options 0": 5, **{f"subject {subject}": n for subject, (n, _) in HEALTH.items()},
}, tuple(HEALTH))  # fmt: skip
PRO_PAPER = {"questions": 286, **{f"subject {subject}": n for subject, (_, n) in HEALTH.items()}}  # which of the configs is not said
PRO_FILES = ("standard (10 options)/test-*.parquet", "standard (10 options)/test/*.parquet")
PRO = Reader(mmmu, PRO_FILES, PRO_PAPER | {"options 10": 204}, tuple(HEALTH))
READERS = {
    "medxpertqa-mm": MM,
    "medxpertqa-text": replace(MM, files=("Text/test.jsonl", "test.jsonl"), paper={}),
    "medqa": replace(MM, item=exam, files=("**/US/4_options/*_test.jsonl", "phrases_no_exclude_test.jsonl"), paper={"questions": 1273, "options 4": 1273}),
    "medbullets-op4": replace(MM, item=medbullets, files=("**/medbullets_op4.json",), paper={"questions": 308, "options 4": 308}),
    "medbullets-op5": replace(MM, item=medbullets, files=("**/medbullets_op5.json",), paper={"questions": 308, "options 5": 308}),
    "mmmu": MMMU,
    "mmmu-pro": PRO,
    "mmmu-pro-vision": replace(PRO, item=mmmu_vision, files=("vision/test-*.parquet", "vision/test/*.parquet"), paper=PRO_PAPER),
    # banks, for curate.py: exams, demonstrations, our own files (case reports beside their images), records of other trainers
    "medqa-train": Reader(exam, ("**/US/train.jsonl", "phrases_no_exclude_train.jsonl")),
    "huatuo": Reader(exam, ("demo_data.json",)),
    "questions": Reader(own, ("*.jsonl",)),
    "sharegpt": Reader(conversation, ("*.json", "*.jsonl")),
}


def reader_of(name: str) -> Reader:
    if name not in READERS:
        raise data.RowError(f"{name!r} is not a known set; known are {', '.join(READERS)}")
    return READERS[name]


def read(name: str, path: str | Path, image_root: Path | None) -> list[data.Question]:
    """Every question of a published file or folder, in its order.

    With an image root the images are written below it, once; killed and run again, those that are there stay. Without,
    nothing is written: images are looked for, and it is said where a file came without them. Raises RowError.
    """
    reader, path = reader_of(name), Path(path)
    files = [path]
    if os.path.isdir(path):
        files = sorted({file for pattern in reader.files for file in path.glob(pattern)})
    if not files or not os.path.exists(files[0]):
        raise data.RowError(f"{path}: is neither a file nor a folder with {' or '.join(reader.files)}; name the file itself")
    questions: list[data.Question] = []
    rows_of: dict[str, str] = {}  # published id -> its row
    seen: Counter = Counter()
    for file in files:
        if file.suffix.lower() not in ROWS:
            raise data.RowError(f"{file}: expected one of {', '.join(ROWS)}")
        check_file(file)
        places, found, missing = image_places(file), 0, []
        for where, row in ROWS[file.suffix.lower()](file):
            if reader.subjects and subject_of(row, where) not in reader.subjects:
                continue
            item = reader.item(row, where)
            known = item.id or item.meta.get("published_id")
            if known is not None and rows_of.setdefault(known, where) != where:
                raise data.RowError(f"{where}: id: {known!r} is already on {rows_of[known]}; remove one of the rows")
            kept = [keep_image(image, where, places, image_root) for image in item.images]
            found += sum(there for _, there in kept)
            missing += [f"{where}: image {image} is not beside the file, nor in images/ or images.zip there or one folder up" for image, there in kept if not there]
            question = question_of(item, [image for image, _ in kept], name, where)
            seen[question.id] += 1
            if seen[question.id] > 1:
                question = replace(question, id=f"{question.id}-{seen[question.id]}", meta=question.meta | {"repeats": question.id})
            questions.append(question)
        if missing and (found or image_root is not None):
            raise data.RowError(f"{missing[0]} ({len(missing)} are missing, {found} are there)")
        if missing:
            print(f"{file}: names {len(missing)} images and none is beside it; none was checked")
    if not questions:
        raise data.RowError(f"{path}: no question of {name} in it; check that it is the published file")
    return questions


# ---------------------------------------------------------------------------------------------------------------
# python benchmarks.py inspect | convert


def count(questions: list[data.Question]) -> dict[str, int]:
    """Questions, images, options, and each value of the keys that tables part by. "options 0" are short answers."""
    found = Counter({"questions": len(questions), "images": sum(len(q.images) for q in questions)})
    found.update(f"images of a question {len(q.images)}" for q in questions if q.images)
    found.update(f"options {len(q.options)}" for q in questions)
    found.update(f"{key} {q.meta[key]}" for q in questions for key in SUBSETS if key in q.meta)
    found["rows that repeat another"] = sum("repeats" in q.meta for q in questions)
    return dict(found)


def inspect(name: str, questions: list[data.Question]) -> list[str]:
    """Prints what was found next to what the paper used. Returns the names of the figures that differ."""
    found, paper = count(questions), reader_of(name).paper
    keys = ["questions", "images", *sorted({*found, *paper} - {"questions", "images"}, key=lambda key: (key.split()[0], -found.get(key, 0), key))]
    different = [key for key in paper if found.get(key, 0) != paper[key]]
    width = max(map(len, keys))
    print(f"{name:<{width}}   found   paper")
    for key in keys:
        print(f"  {key:<{width}} {found.get(key, 0):>5} {paper.get(key, ''):>7}" + ("   differs" if key in different else ""))
    print(f"{len(different)} of {len(paper)} figures differ from what the paper used" if paper else "the paper does not use this set by name")
    return different


def run(args: argparse.Namespace) -> None:
    questions = read(args.name, args.path, None)
    if args.command == "convert":
        if any(question.images for question in questions):
            if not args.images:
                raise data.RowError(f"{args.path}: has images; say with --images where they go")
            questions = read(args.name, args.path, Path(args.images))
        stage.new_file(args.out, data.jsonl_text(question.to_row() for question in questions), [args.path])
        print(f"{args.out}: {len(questions)} questions")
    inspect(args.name, questions)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Read published benchmarks and question banks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, said in (("inspect", "what is in it, next to what the paper used"), ("convert", "write questions.jsonl and the images")):
        one = commands.add_parser(command, help=said)
        one.add_argument("name", help=", ".join(READERS))
        one.add_argument("path", help="the published file, or the folder it was downloaded to")
        if command == "convert":
            one.add_argument("--out", required=True, help="questions.jsonl to write")
            one.add_argument("--images", default="", help="image root")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    run(parse(argv))


if __name__ == "__main__":
    flags.run_script(main)
