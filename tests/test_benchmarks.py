"""Published files become questions: every form as it is published, every mistake named."""

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import benchmarks
import data
from benchmarks import read
from command import schema
from report.__main__ import main as run_report

ROOT = Path(__file__).resolve().parent.parent


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), shade).save(file, "PNG")
    return file.getvalue()


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def mm_row(n: int, images: int = 1, form: str = "list", **other) -> dict:
    """A record of MedXpertQA-MM, in the form of its evaluation's input files ("list") or of the
    data set ("dict")."""
    options = {"A": "a rash", "B": "a scar", "C": f"sign {n}", "D": "gout (D)", "E": "none"}
    names = [f"MM-{n}-{letter}.jpeg" for letter in "abcdef"[:images]]
    text = "What is the diagnosis?\nAnswer Choices: " + " ".join(
        f"({letter}) {said}" for letter, said in options.items()
    )
    row = {
        "id": f"MM-{n}",
        "question": text,
        "medical_task": "Diagnosis",
        "body_system": "Nervous",
        "question_type": "Reasoning",
    }
    if form == "list":
        row |= {
            "options": [{"letter": key, "content": said} for key, said in options.items()],
            "label": ["C"],
            "images": [{"image_path": name} for name in names],
        }
    else:
        row |= {"options": options, "label": "C", "images": names}
    return row | other


def mmmu_row(n: int, subject: str = "Pharmacy", images: int = 1, **other) -> dict:
    row = {
        "id": f"validation_{subject}_{n}",
        "question": f"What does <image 1> show, {n}?",
        "options": "['one', \"two's\", '<image 1>']",
        "answer": "B",
        "question_type": "multiple-choice",
    }
    row |= {
        f"image_{k}": {"bytes": png(10 * n + k), "path": None} if k <= images else None
        for k in range(1, 8)
    }
    return (
        row
        | {
            "img_type": "['Body Scans: MRI, CT scans, and X-rays']",
            "topic_difficulty": "Easy",
            "subfield": "Dosing",
        }
        | other
    )


MEDMCQA = {
    "id": "4e17", "question": "Which?", "opa": "p", "opb": "q", "opc": "r", "opd": "s", "cop": 4,
    "choice_type": "single", "exp": "Because.", "subject_name": "Pathology", "topic_name": None,
}  # fmt: skip
M23K = {  # the columns of the hub's card; the form of the prompt is that of m1k-tokenized's readers
    "answer_idx": 1, "source": "openlifescienceai/medmcqa", "metadata": "{}",
    "prompt": "Which\nof these?\nA. a cyst\nB. a scar\nC. gout", "answer_letter": "B",
    "answer_string": "a scar", "reasoning": "Hm.", "distilled_answer_string": "B.", "text": "...",
}  # fmt: skip
PMC = {  # version 1, and version 2 with its letter only
    "Figure_path": "PMC1_F1.jpg", "Question": "What is it? ", "Answer": "a scar",
    "Choice A": " A:a cyst ", "Choice B": " B: a scar", "Choice C": " C: gout ",
    "Choice D": " D: T2: bright", "Answer_label": "B",
}  # fmt: skip
PMC_2 = {"index": "0", "Caption": "A scar (arrow).", **PMC, "Answer": " B ", "split": "train"}
del PMC_2["Answer_label"]


def csv_file(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def medbullets_rows() -> list[dict]:
    first = {
        "link": "l/1",
        "question": "Q one,\nwith a line",
        "opa": "p",
        "opb": "q",
        "opc": "r",
        "opd": "s",
        "ope": "t",
        "answer_idx": "E",
        "answer": "t",
        "explanation": "because",
    }
    return [first, first | {"link": "l/2", "question": "Q two", "answer_idx": "A", "answer": "p"}]


# --------------------------------------------------------------------------------------------------
# every published form


@pytest.mark.parametrize("form", ["list", "dict"])
def test_medxpertqa_options_leave_the_text_and_stay_beside_it(tmp_path, form):
    path = jsonl(tmp_path / "test.jsonl", [mm_row(n, images=n, form=form) for n in (1, 6)])
    one, six = read("medxpertqa-mm", path, None)
    assert (
        one.question == "What is the diagnosis?"
        and list(one.options) == list("ABCDE")
        and one.options["D"] == "gout (D)"
        and one.answer == "C"
    )
    assert (
        six.images == [f"MM-6-{letter}.jpeg" for letter in "abcdef"]
        and six.source == "medxpertqa-mm"
    )
    assert one.meta == {
        "published_id": "MM-1",
        "question_type": "Reasoning",
        "medical_task": "Diagnosis",
        "body_system": "Nervous",
    }
    assert one.id == data.content_hash([one.question, one.options, one.answer, one.images])[:16]


def test_medxpertqa_text_has_ten_options(tmp_path):
    options = {letter: f"text {letter}" for letter in "ABCDEFGHIJ"}
    text = "Why?\nAnswer Choices: " + " ".join(
        f"({letter}) {said}" for letter, said in options.items()
    )
    (question,) = read(
        "medxpertqa-text",
        jsonl(
            tmp_path / "Text/test.jsonl",
            [{"id": "Text-1", "question": text, "options": options, "label": "J"}],
        ).parent.parent,
        None,
    )
    assert question.options == options and question.answer == "J" and question.question == "Why?"


def test_medqa_reads_both_of_its_forms(tmp_path):
    us = {
        "question": "Why?",
        "answer": "two",
        "options": {"A": "one", "B": "two", "C": "three", "D": "four"},
        "meta_info": "step1",
        "answer_idx": "B",
    }
    flat = {
        "id": "test-00000",
        "question": "Why?\nAnswer Choices: (A) one (B) two (C) three (D) four",
        "label": ["B"],
    }
    (first,) = read("medqa", jsonl(tmp_path / "us.jsonl", [us]), None)
    (second,) = read("medqa", jsonl(tmp_path / "flat.jsonl", [flat]), None)
    assert first.id == second.id and (first.question, first.options, first.answer) == (
        second.question,
        second.options,
        second.answer,
    )
    assert first.meta == {"meta_info": "step1"} and second.meta == {"published_id": "test-00000"}


@pytest.mark.parametrize(
    "choices",
    ["(A) one (C) two", "(A) vitamin (B) twice (B) and (C) three", "one two", "x (A) one (B) two"],
)
def test_choices_that_can_be_read_two_ways_are_refused(tmp_path, choices):
    path = jsonl(
        tmp_path / "a.jsonl",
        [{"id": "x", "question": f"Why?\nAnswer Choices: {choices}", "label": ["B"]}],
    )
    with pytest.raises(data.RowError, match=r"a\.jsonl:1: question"):
        read("medqa", path, None)


def test_medbullets_columns_and_csv_are_the_same_questions(tmp_path):
    rows = medbullets_rows()
    columns = tmp_path / "op5.json"
    columns.write_text(
        json.dumps({key: {str(n): row[key] for n, row in enumerate(rows)} for key in rows[0]})
    )
    with open(tmp_path / "op5.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(list(rows[0]))
        writer.writerows(
            [*row.values(), "", "", ""] for row in rows
        )  # the published rows have empty cells beyond the header
    a, b = read("medbullets-op5", columns, None), read("medbullets-op5", tmp_path / "op5.csv", None)
    assert (
        a == b
        and [q.answer for q in a] == ["E", "A"]
        and a[0].question == "Q one,\nwith a line"
        and a[0].meta == {"link": "l/1"}
    )
    four = [{key: said for key, said in rows[1].items() if key != "ope"}]
    (tmp_path / "op4.json").write_text(
        json.dumps({key: {"0": row[key]} for row in four for key in row})
    )
    assert list(read("medbullets-op4", tmp_path / "op4.json", None)[0].options) == list("ABCD")


def test_mmmu_takes_the_five_health_subjects_of_a_download(tmp_path):
    for subject in [*benchmarks.HEALTH, "Art"]:
        parquet(
            tmp_path / subject / "validation-00000-of-00001.parquet",
            [mmmu_row(n, subject) for n in (1, 2, 3)],
        )
        parquet(tmp_path / subject / "test-00000-of-00001.parquet", [mmmu_row(9, subject)])
    questions = read("mmmu", tmp_path, None)
    assert len(questions) == 15 and {q.meta["subject"] for q in questions} == set(benchmarks.HEALTH)
    question = questions[0]
    assert question.options == {"A": "one", "B": "two's", "C": "<image 1>"} and question.meta[
        "image_marks"
    ] == [1, 1]
    assert (
        question.meta["modality"] == "Body Scans: MRI, CT scans, and X-rays"
        and question.meta["published_id"] == "validation_Basic_Medical_Science_1"
    )
    assert "<image 1>" in question.question  # the mark stays


def test_mmmu_short_answers_become_open_ended(tmp_path):
    rows = [
        mmmu_row(1, options="[]", question_type="open", answer="Transformation"),
        mmmu_row(2, options="[]", question_type="open", answer="['24/7', '3.429']"),
    ]
    word, number = read("mmmu", parquet(tmp_path / "a.parquet", rows), None)
    assert word.options == {} and word.answer == "Transformation" and "answers" not in word.meta
    assert number.answer == "24/7" and number.meta["answers"] == ["24/7", "3.429"]


def test_mmmu_pro_standard_has_two_to_ten_options_and_seven_images(tmp_path):
    ten = [f"option {n}" for n in range(10)]
    text = "See " + " ".join(f"<image {n}>" for n in (3, 1, 2, 4, 5, 6, 7))
    rows = [
        mmmu_row(
            1,
            images=7,
            options=str(ten),
            answer="J",
            question=text,
            subject="Pharmacy",
            id="test_Pharmacy_1",
        ),
        mmmu_row(2, options="['yes', 'no']", subject="Public_Health"),
        mmmu_row(3, subject="Music"),
    ]
    path = parquet(tmp_path / "standard (10 options)" / "test-00000-of-00002.parquet", rows[:1])
    parquet(path.with_name("test-00001-of-00002.parquet"), rows[1:])
    ten, two = read("mmmu-pro", tmp_path, tmp_path / "images")
    assert (
        list(ten.options) == list(data.LETTERS)
        and ten.answer == "J"
        and list(two.options) == ["A", "B"]
    )
    assert [(tmp_path / "images" / image).read_bytes() for image in ten.images] == [
        png(10 + k) for k in range(1, 8)
    ]  # in published order
    assert ten.meta["image_marks"] == [3, 1, 2, 4, 5, 6, 7]


def test_mmmu_pro_vision_is_one_image_with_the_question_in_it(tmp_path):
    rows = [
        {
            "id": "test_Pharmacy_1",
            "image": {"bytes": png(7), "path": "x.png"},
            "options": "['a b', 'c']",
            "answer": "B",
            "subject": "Pharmacy",
        }
    ]
    (question,) = read(
        "mmmu-pro-vision",
        parquet(tmp_path / "vision" / "test-00000-of-00001.parquet", rows).parent.parent,
        tmp_path,
    )
    assert question.options == {"A": "a b", "B": "c"} and (
        tmp_path / question.images[0]
    ).read_bytes() == png(7)


def test_mmmu_records_of_a_jsonl_name_their_images(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "p.png").write_bytes(png(1))
    row = {
        "id": "test_Pharmacy_4",
        "question": "See <image 1>",
        "options": ["yes", "no"],
        "answer": "A",
        "image_1": "images/p.png",
    }
    (question,) = read("mmmu-pro", jsonl(tmp_path / "data.jsonl", [row]), tmp_path)
    assert question.images == ["images/p.png"]


def test_mmmus_test_split_takes_its_answers_from_their_own_file(tmp_path, capsys):
    """An object with the type, or a bare text or list. The parquet has '?', or the answer."""
    blank = {"options": "[]", "question_type": "open", "answer": "?"}
    rows = [
        mmmu_row(1, id="test_Pharmacy_1", answer="?"),
        mmmu_row(2, id="test_Pharmacy_2", **blank),
        mmmu_row(3, id="test_Pharmacy_3", answer="C"),
        mmmu_row(4, id="test_Pharmacy_4", **blank),
    ]
    parquet(tmp_path / "in/Pharmacy/test-00000-of-00001.parquet", rows)
    parquet(tmp_path / "in/Art/test-00000-of-00001.parquet", [mmmu_row(5, id="test_Art_1")])
    parquet(tmp_path / "in/Pharmacy/validation-00000-of-00001.parquet", [mmmu_row(6)])
    answers = {
        "test_Pharmacy_1": {"question_type": "multiple-choice", "ground_truth": "B"},
        "test_Pharmacy_2": {"question_type": "short-answer", "ground_truth": ["24/7", "3.4"]},
        "test_Pharmacy_3": "C",
        "test_Pharmacy_4": ["one", "1"],
        "test_Art_1": "B",
    }
    file = tmp_path / "answer_dict_test.json"
    file.write_text(json.dumps(answers))
    out, root = tmp_path / "test.jsonl", tmp_path / "root"
    with pytest.raises(data.RowError, match=r"row 0: answer: is '\?'.*--answers with answer_dict"):
        read("mmmu-test", tmp_path / "in", None)
    benchmarks.main(
        ["convert", "mmmu-test", str(tmp_path / "in"), "--answers", str(file)]
        + ["--out", str(out), "--images", str(root)]
    )
    assert "4 questions" in capsys.readouterr().out
    questions = schema.read_questions(out)
    assert [q.answer for q in questions] == ["B", "24/7", "C", "one"]
    assert [q.meta.get("answers") for q in questions] == [None, ["24/7", "3.4"], None, ["one", "1"]]
    assert {q.source for q in questions} == {"mmmu-test"}
    (other,) = read("mmmu-test-general", tmp_path / "in", None, str(file))
    assert other.meta["subject"] == "Art"


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"test_Pharmacy_2": "B"}, "row 0: answer: is '?'"),
        (
            {"test_Pharmacy_1": {"question_type": "short-answer", "ground_truth": "B"}},
            "answer: the",
        ),
        ({"test_Pharmacy_1": "B", "test_Pharmacy_2": "A"}, "row 1: answer: the row has 'C'"),
        ({"test_Pharmacy_1": "F"}, "row 0: answer: 'F' is not among the options"),
        (["B"], "expected an object"),
    ],
)
def test_an_answer_file_that_lacks_or_contradicts_a_row_is_refused(tmp_path, answers, said):
    rows = [
        mmmu_row(1, id="test_Pharmacy_1", answer="?"),
        mmmu_row(2, id="test_Pharmacy_2", answer="C"),
    ]
    path = parquet(tmp_path / "a.parquet", rows)
    file = tmp_path / "answers.json"
    file.write_text(json.dumps(answers))
    with pytest.raises(data.RowError) as error:
        read("mmmu-test", path, None, str(file))
    assert said in str(error.value)
    with pytest.raises(data.RowError, match="for one of MMMU's sets"):
        read("medqa", path, None, str(file))


def test_mmmu_outside_health_is_the_validation_split_of_all_other_subjects(tmp_path):
    for subject in ["Pharmacy", "Art", "Art_Theory"]:
        parquet(tmp_path / subject / "validation-00000-of-00001.parquet", [mmmu_row(1, subject)])
        parquet(tmp_path / subject / "test-00000-of-00001.parquet", [mmmu_row(2, subject)])
    questions = read("mmmu-general", tmp_path, None)
    assert sorted(q.meta["subject"] for q in questions) == ["Art", "Art_Theory"]


def test_medmcqa_tells_by_itself_whether_it_counts_from_0_or_from_1(tmp_path):
    one = [MEDMCQA | {"id": str(n), "cop": n} for n in (1, 2, 3, 4)]
    zero = [MEDMCQA | {"id": str(n), "cop": n - 1} for n in (1, 2, 3, 4)]
    (tmp_path / "old").mkdir()
    files = [
        jsonl(tmp_path / "old/train.json", one),  # the original has a row a line
        csv_file(tmp_path / "train.csv", one),
        parquet(tmp_path / "hub/data/train-00000-of-00001.parquet", zero).parent.parent,
        jsonl(tmp_path / "copy.jsonl", zero),
    ]
    read_all = [read("medmcqa", file, None) for file in files]
    assert read_all[0] == read_all[1] == read_all[2] == read_all[3]
    question = read_all[0][3]
    assert question.options == {"A": "p", "B": "q", "C": "r", "D": "s"}
    assert [q.answer for q in read_all[0]] == list("ABCD")
    assert question.meta == {"published_id": "4", "subject_name": "Pathology"}
    for rows, has in ((one[:3], "neither 0 nor 4"), (zero + one, "both 0 and 4")):
        with pytest.raises(data.RowError, match=f"cop: has {has}"):
            read("medmcqa", jsonl(tmp_path / "a.jsonl", rows), None)


def test_m23ks_options_leave_the_prompt(tmp_path):
    path = parquet(tmp_path / "data/train-00000-of-00001.parquet", [M23K]).parent.parent
    (question,) = read("m23k", path, None)
    assert question.question == "Which\nof these?" and question.answer == "B"
    assert question.options == {"A": "a cyst", "B": "a scar", "C": "gout"}
    assert question.meta == {"source": "openlifescienceai/medmcqa"}


@pytest.mark.parametrize("packed", [True, False])
def test_both_versions_of_pmc_vqa_take_their_own_images(tmp_path, packed):
    """In one download, where both may have an image of the same name."""
    for folder, inner, shade in (("images", "images", 1), ("images_2", "figures", 2)):
        if packed:
            with zipfile.ZipFile(tmp_path / f"{folder}.zip", "w") as archive:
                archive.writestr(f"{inner}/PMC1_F1.jpg", png(shade))
        else:
            (tmp_path / folder / inner).mkdir(parents=True)
            (tmp_path / folder / inner / "PMC1_F1.jpg").write_bytes(png(shade))
    csv_file(tmp_path / "train.csv", [PMC])
    csv_file(tmp_path / "train_2.csv", [PMC_2])
    for name, shade in (("pmc-vqa", 1), ("pmc-vqa-2", 2)):
        (question,) = read(name, tmp_path, tmp_path / name)
        assert question.question == "What is it? "
        assert list(question.options.values()) == ["a cyst", "a scar", "gout", "T2: bright"]
        assert question.answer == "B" and question.images == ["PMC1_F1.jpg"]
        assert (tmp_path / name / "PMC1_F1.jpg").read_bytes() == png(shade)


def test_a_banks_faulty_rows_are_left_out_and_counted_by_reason(tmp_path, capsys):
    rows = [PMC, PMC | {"Answer": "gout"}, PMC | {"Answer_label": "E"}, PMC | {"Choice C": "B: x"}]
    assert len(read("pmc-vqa", csv_file(tmp_path / "train.csv", rows), None)) == 1
    out = capsys.readouterr().out
    assert "train.csv: faulty rows left out: 3" in out
    assert "  2 x answer; the first is " in out and "train.csv: row 1: answer: 'B' 'gout'" in out
    assert "  1 x Choice C; the first is" in out
    with pytest.raises(data.RowError, match="no question of pmc-vqa"):
        read("pmc-vqa", csv_file(tmp_path / "b.csv", rows[1:]), None)


def test_huatuo_keeps_chain_and_response_for_distillation(tmp_path):
    row = {
        "question": "Why?",
        "options": {"A": "x", "B": "y"},
        "answer_idx": "B",
        "answer": "y",
        "Complex_CoT": "Hmm.",
        "Response": "So y.",
        "Question": "other",
    }
    (tmp_path / "demo_data.json").write_text(json.dumps([row]))
    (question,) = read("huatuo", tmp_path, None)
    assert question.answer == "B" and question.meta == {"Complex_CoT": "Hmm.", "Response": "So y."}


def test_our_own_questions_beside_their_images_keep_id_and_source(tmp_path):
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.png").write_bytes(png(1))
    question = data.Question(
        "A case.", {}, "gout", ["films/a.png"], "journal", {"modality": "X-ray"}, "case-7"
    )
    jsonl(tmp_path / "cases.jsonl", [question.to_row()])
    assert read("questions", tmp_path, tmp_path) == [question]


@pytest.mark.parametrize(
    "roles",
    [
        ("conversations", "from", "value", "human", "gpt"),
        ("messages", "role", "content", "user", "assistant"),
    ],
)
def test_sharegpt_records_with_marks_become_questions(tmp_path, roles):
    turns, who, what, user, model = roles
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(ord(name[0])))

    def record(asked: str, answered: str, images: list[str]) -> dict:
        return {
            turns: [
                {who: "system", what: "Be good."},
                {who: user, what: asked},
                {who: model, what: answered},
            ],
            "images": images,
        }

    rows = [
        record(
            "<image><image>\nWhich?\nA. left\nB. right",
            "<think> Option A? No. </think> <answer> B. right </answer>",
            ["a.png", "b.png"],
        ),
        record("Beside <image> stands what?", "A crow.", ["b.png"]),
        record("Which?\nAnswer Choices:\n(A) left\n(B) right", "A", []),
    ]
    rows.append(
        record(
            "<image>\n<image> Which?\n(A) left\n(B) right\nAnswer at once.", "B", ["a.png", "b.png"]
        )
    )
    two, inline, text, apart = read("sharegpt", jsonl(tmp_path / "s.jsonl", rows), tmp_path)
    assert (two.question, two.options, two.answer, two.images) == (
        "Which?",
        {"A": "left", "B": "right"},
        "B",
        ["a.png", "b.png"],
    )
    assert two.meta["response"].startswith("<think>")
    assert (inline.question, inline.options, inline.answer) == (
        "Beside <image 1> stands what?",
        {},
        "A crow.",
    )
    assert (text.question, text.answer) == ("Which?", "A") and (apart.question, apart.answer) == (
        "Which?\nAnswer at once.",
        "B",
    )
    assert inline.meta["image_marks"] == [1] and "image_marks" not in two.meta


# --------------------------------------------------------------------------------------------------
# images


def test_images_come_out_of_the_zip_once_under_their_published_names(tmp_path):
    jsonl(tmp_path / "hub/MM/test.jsonl", [mm_row(1, images=2)])
    with zipfile.ZipFile(tmp_path / "hub/images.zip", "w") as archive:
        for name, shade in (("MM-1-a.jpeg", 1), ("MM-1-b.jpeg", 2)):
            archive.writestr(f"images/{name}", png(shade))
        archive.writestr("__MACOSX/images/._MM-1-a.jpeg", b"x")
        archive.writestr("../outside.txt", b"x")
    root = tmp_path / "deep" / "root"
    (question,) = read("medxpertqa-mm", tmp_path / "hub", root)
    assert sorted(path.name for path in root.rglob("*")) == ["MM-1-a.jpeg", "MM-1-b.jpeg"] and (
        root / "MM-1-b.jpeg"
    ).read_bytes() == png(2)
    assert not list(tmp_path.rglob("outside.txt"))
    before = (root / "MM-1-a.jpeg").stat().st_mtime_ns
    assert (
        read("medxpertqa-mm", tmp_path / "hub", root)
        == [question]
        == read("medxpertqa-mm", tmp_path / "hub", None)
    )
    assert (root / "MM-1-a.jpeg").stat().st_mtime_ns == before


def test_an_unpacked_folder_may_be_the_image_root_itself(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "MM-1-a.jpeg").write_bytes(png(1))
    jsonl(tmp_path / "MM/test.jsonl", [mm_row(1)])
    assert read("medxpertqa-mm", tmp_path, tmp_path / "images")[0].images == ["MM-1-a.jpeg"]
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["MM-1-a.jpeg"]


def test_equal_bytes_are_one_file_named_by_their_hash_and_no_root_writes_nothing(tmp_path):
    same = {"bytes": png(5), "path": None}
    path = parquet(
        tmp_path / "in" / "a.parquet", [mmmu_row(1, image_1=same), mmmu_row(2, image_1=same)]
    )
    questions = read("mmmu", path, None)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert read("mmmu", path, tmp_path / "root") == questions
    assert [p.name for p in (tmp_path / "root").iterdir()] == [
        hashlib.sha256(png(5)).hexdigest()[:16] + ".png"
    ]


def test_a_killed_run_is_finished_by_the_next(tmp_path):
    """Killed in the middle of an image: what is half written lies under another name."""
    path = parquet(tmp_path / "a.parquet", [mmmu_row(n) for n in (1, 2, 3)])
    code = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import benchmarks
rename, done = os.replace, []
def die(source, target):
    os._exit(9) if done else rename(source, target)
    done.append(target)
os.replace = die
benchmarks.read("mmmu", sys.argv[2], Path(sys.argv[3]))
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(ROOT), str(path), str(tmp_path / "root")]
        ).returncode
        == 9
    )
    assert sorted(p.suffix for p in (tmp_path / "root").iterdir()) == [".png", ".tmp"]
    questions = read("mmmu", path, tmp_path / "root")
    assert {(tmp_path / "root" / q.images[0]).read_bytes() for q in questions} == {
        png(11),
        png(21),
        png(31),
    }
    assert not list((tmp_path / "root").glob("*.tmp"))


def test_without_images_and_without_a_root_a_file_is_read_and_said_to_be_unchecked(
    tmp_path, capsys
):
    assert len(read("medxpertqa-mm", jsonl(tmp_path / "a.jsonl", [mm_row(1, images=3)]), None)) == 1
    assert "names 3 images and none is beside it" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# mistakes, named by file and row


BASE = {"question": "Why?", "options": {"A": "x", "B": "y"}, "answer": "B", "id": "q1"}


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("medxpertqa-mm", mm_row(1, label=["F"]), "answer: 'F' is not among the options"),
        ("medxpertqa-mm", mm_row(1, label=["A", "B"]), "label: expected one letter"),
        ("medxpertqa-mm", mm_row(1, options=[{"letter": "A"}]), "options: expected an object"),
        (
            "medxpertqa-mm",
            mm_row(1, images=1) | {"images": ["../MM-1-a.jpeg"]},
            "stays inside the image root",
        ),
        (
            "medxpertqa-mm",
            mm_row(1, images=1) | {"images": ["/etc/MM-1-a.jpeg"]},
            "stays inside the image root",
        ),
        (
            "medqa",
            {"question": "Why?", "options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "x"},
            "is not among the options",
        ),
        (
            "medqa",
            {"question": "Why?", "options": {"A": "x", "B": "y"}, "answer_idx": "C"},
            "is not among the options",
        ),
        (
            "medqa",
            {"question": "Why?", "options": {"A": "x", "B": "y"}, "answer_idx": "C", "answer": "z"},
            "is not among the options",
        ),
        ("medqa", {"question": "Why?"}, "options: there are 0"),
        ("medqa", {"question": "Why?", "label": "A"}, "options: there are 0"),
        (
            "mmmu",
            {
                "id": "validation_Pharmacy_1",
                "question": "<image 2>?",
                "options": "['a', 'b']",
                "answer": "A",
                "image_1": "x.png",
            },
            "has ['image_1'], and marks for [2]; an image is missing",
        ),
        (
            "mmmu",
            {
                "id": "validation_Pharmacy_1",
                "question": "?",
                "options": "['a', 'b']",
                "answer": "A",
                "image_2": "x.png",
            },
            "has ['image_2'], and marks for []; an image is missing",
        ),
        (
            "mmmu",
            {"id": "validation_Pharmacy_1", "question": "?", "options": "['a', b]", "answer": "A"},
            "not the text of a list",
        ),
        (
            "mmmu",
            {
                "id": "validation_Pharmacy_1",
                "question": "?",
                "options": "__import__('os').getcwd()",
                "answer": "A",
            },
            "not the text of a list",
        ),
        (
            "mmmu",
            {"id": "validation_Pharmacy_1", "question": "?", "options": "[]", "answer": "A"},
            "options: there are 0",
        ),
        (
            "mmmu",
            {
                "id": "validation_Pharmacy_1",
                "question": "?",
                "options": str(list("abcdefghijk")),
                "answer": "A",
            },
            "options: expected an object of two to ten texts",
        ),
        (
            "mmmu",
            {"id": "Pharmacy", "question": "?", "options": "['a', 'b']", "answer": "A"},
            "does not tell a subject",
        ),
        (
            "mmmu-pro-vision",
            {"id": "test_Pharmacy_1", "options": "['a', 'b']", "answer": "A"},
            "image: is missing",
        ),
        (
            "sharegpt",
            {
                "messages": [
                    {"role": "user", "content": "<image>?"},
                    {"role": "assistant", "content": "Yes"},
                ],
                "images": [],
            },
            "1 <image> marks for 0 images",
        ),
        ("sharegpt", {"messages": ["?"]}, "of one question and one answer"),
        (
            "sharegpt",
            {"messages": [{"role": "system", "content": "?"}]},
            "of one question and one answer",
        ),
        ("sharegpt", {"text": "?"}, "of one question and one answer"),
        (
            "medxpertqa-mm",
            mm_row(1) | {"images": [{"file": "a.png"}]},
            "images: an image is missing",
        ),
        (
            "sharegpt",
            {"messages": [{"role": "user", "content": "?"}]},
            "of one question and one answer",
        ),
        (
            "sharegpt",
            {
                "messages": [
                    {"role": "user", "content": "? A) x B) y"},
                    {"role": "assistant", "content": "B"},
                ]
            },
            "options stand one a line",
        ),
        (
            "sharegpt",
            {
                "messages": [
                    {"role": "user", "content": "?\nA. x\nB. y"},
                    {"role": "assistant", "content": "A or B"},
                ]
            },
            "is not among the options",
        ),
        (
            "questions",
            {"id": "q", "question": "?", "options": {}, "answer": "", "images": []},
            "answer: expected a text that is not empty",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, row, said):
    good = {
        "questions": data.Question("Q", {}, "a", id="fine").to_row(),
        "sharegpt": {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes"}]
        },
    }
    path = jsonl(tmp_path / "b.jsonl", [good[name], row] if name in good else [row])
    with pytest.raises(data.RowError) as error:
        read(name, path, None)
    assert f"b.jsonl:{2 if name in good else 1}:" in str(error.value) and said in str(error.value)


GONE = object()  # a key that the row has not


def exchange(user, assistant="B") -> dict:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": turns}


EXCHANGE = exchange("<image>Which?\nA. x\nB. y")["messages"]
EXAM = {"question": "Why?", "options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "y"}
PICTURE = {"id": "test_Pharmacy_1", "image": "a.png", "options": ["x", "y"], "answer": "B"}
TWO_TO_TEN = "options: expected an object of two to ten texts with the letters A, B, C"
OPTION_FAULTS = [  # of a row with options by letter
    ({"options": {"B": "y", "A": "x"}}, TWO_TO_TEN),
    ({"options": {"A": "x", "C": "y"}}, TWO_TO_TEN),
    ({"options": {"B": "y", "C": "x"}}, TWO_TO_TEN),
    ({"options": {"a": "x", "b": "y"}}, TWO_TO_TEN), ({"options": {"A": "x"}}, TWO_TO_TEN),
    ({"options": {}}, "there are 0"), ({"options": {"A": 1, "B": "y"}}, TWO_TO_TEN),
    ({"options": {"A": " ", "B": "y"}}, TWO_TO_TEN),
    ({"options": {"A": None, "B": "y"}}, TWO_TO_TEN),
    ({"options": "AB"}, "not the text of a list"), ({"options": 5}, "options: expected a list"),
]  # fmt: skip
IMAGE_FAULTS = [
    ({"images": 5}, "an image's bytes or name"), ({"images": ""}, "an image is missing"),
    ({"images": [""]}, "an image is missing"), ({"images": [" "]}, "stays inside the image root"),
    ({"images": ["a.png", 3]}, "an image's bytes or name"),
    ({"images": [["a.png"]]}, "an image's bytes or name"),
    ({"images": [None]}, "an image is missing"), ({"images": {}}, "an image is missing"),
    ({"images": [True]}, "an image's bytes or name"),
]  # fmt: skip
MM_FAULTS = [
    *IMAGE_FAULTS,
    ({"options": [{"letter": letter, "content": "x"} for letter in "AAB"]}, "['A', 'A', 'B']"),
    ({"options": [{"letter": letter, "content": "x"} for letter in "BA"]}, "['B', 'A']"),
    ({"options": [{"letter": letter, "content": 1} for letter in "ABC"]}, TWO_TO_TEN),
    ({"options": ["x", "y"]}, "'C' is not among"),
    ({"options": [{"letter": letter, "content": ""} for letter in "AB"]}, TWO_TO_TEN),
    ({"options": "AB"}, "not the text of a list"), ({"options": {}}, "there are 0"),
    ({"options": []}, "there are 0"), ({"label": "F"}, "'F' is not among"),
    ({"label": "c"}, "'c' is not among"), ({"label": 2}, "label: expected one letter"),
    ({"label": []}, "label: expected one letter"),
    ({"label": GONE}, "label: expected one letter"), ({"id": 7}, "id: expected str"),
    ({"id": ["MM-2"]}, "id: expected str"), ({"question": 5}, "question: expected str"),
    ({"question": GONE}, "missing 'question'"),
    ({"question": " "}, "question: expected a text that is not empty"),
    ({"medical_task": 3}, "medical_task: expected str"),
    ({"question_type": ["Reasoning"]}, "question_type: expected str"),
]  # fmt: skip
EXAM_FAULTS = [
    *OPTION_FAULTS, ({"answer": 5}, "found 'B' and 5"), ({"answer": "x"}, "is not among"),
    ({"answer": ["y"]}, "found 'B' and ['y']"), ({"answer_idx": 1}, "answer_idx: expected one"),
    ({"answer_idx": "C"}, "'C' is not among"), ({"answer_idx": ""}, "a text that is not empty"),
    ({"answer_idx": ["A", "B"]}, "answer_idx: expected one"), ({"id": 7}, "id: expected str"),
    ({"question": ""}, "question: expected a text that is not empty"),
    ({"question": ["Why?"]}, "question: expected str"),
    ({"meta_info": 1}, "meta_info: expected str"),
    ({"Complex_CoT": ["Hm."]}, "Complex_CoT: expected str"),
    ({"label": 5, "options": GONE}, "there are 0"),
]  # fmt: skip
BULLETS_FAULTS = [
    ({"opa": 1}, "options: expected a list of texts"),
    ({"opb": GONE}, "options: expected a list of texts"),
    ({"opc": None}, "options: expected a list of texts"), ({"opd": ""}, TWO_TO_TEN),
    ({"opd": " "}, TWO_TO_TEN), ({"answer_idx": "F", "answer": GONE}, "'F' is not among"),
    ({"answer_idx": 4}, "answer_idx: expected one"), ({"answer": "q"}, "is not among"),
    ({"answer": 3}, "answer_idx: expected one"), ({"question": 1}, "question: expected str"),
    ({"question": "\n"}, "question: expected a text that is not empty"),
    ({"link": 5}, "link: expected str"),
    ({"id": 5}, "id: expected str"),
]  # fmt: skip
LIST_FAULTS = [  # of a row with a list of options, or the text of one
    ({"options": "xy"}, "not the text of a list"),
    ({"options": "[" * 99_999}, "not the text of a list"),
    ({"options": "1" + "+1" * 99_999}, "not the text of a list"),
    ({"options": "{[]: 1}"}, "not the text of a list"),
    ({"options": "{'x': 'y'}"}, "list of texts"), ({"options": [1, 2]}, "list of texts"),
    ({"options": ["x", None]}, "list of texts"), ({"options": ["x", ""]}, TWO_TO_TEN),
    ({"options": GONE}, "there are 0"), ({"options": ["x"]}, TWO_TO_TEN),
    ({"answer": "F"}, "'F' is not among"), ({"answer": 1}, "answer: expected one letter"),
    ({"answer": ""}, "answer: expected a text that is not empty"),
    ({"id": 5}, "id: expected str"), ({"id": None}, "id: "),
    ({"subject": 5}, "subject: expected str"),
]  # fmt: skip
MMMU_FAULTS = [
    *LIST_FAULTS, ({"image_1": 5}, "image_1: expected an image's"),
    ({"image_1": ""}, "an image is missing"),
    ({"image_1": {"bytes": "iVBOR"}}, "image_1: expected an image's"),
    ({"image_1": {"bytes": None, "path": ""}}, "an image is missing"),
    ({"image_1": ["a.png"]}, "image_1: expected an image's"),
    ({"image_1": {"path": 5}}, "image_1: expected an image's"),
    ({"question": 5}, "question: expected str"),
    ({"question": ""}, "question: expected a text that is not empty"),
    ({"question_type": "open"}, "options: there are 3, and the question's type is 'open'"),
    (
        {"question_type": "open", "options": "[]", "answer": "[]"},
        "answer: expected a text that is not empty",
    ),
    ({"img_type": "[1]"}, "img_type: expected a list of texts"),
    ({"question_type": "open", "options": "[]", "answer": "[5]"}, "answer: expected a list"),
    ({"subfield": 5}, "subfield: expected str"),
]  # fmt: skip
# a row with a subject needs no id
ART_FAULTS = [(changes, said) for changes, said in MMMU_FAULTS if changes != {"id": None}]
VISION_FAULTS = [
    *LIST_FAULTS, ({"image": 5}, "an image's bytes or name"),
    ({"image": ""}, "an image is missing"), ({"image": None}, "image: is missing"),
    ({"image": {"bytes": "iVBOR"}}, "an image's bytes or name"),
    ({"image": [["a.png"]]}, "an image's bytes or name"), ({"image": {}}, "an image is missing"),
]  # fmt: skip
OWN_FAULTS = [
    *[(changes, "options: ") for changes, _ in OPTION_FAULTS[:4] + OPTION_FAULTS[6:]],
    ({"images": "a.png"}, "images"), ({"images": [5]}, "images"), ({"images": [""]}, "image"),
    ({"images": 5}, "images"), ({"id": 5}, "id"), ({"question": 5}, "question"),
    ({"question": " "}, "question"), ({"answer": "C"}, "answer"), ({"answer": 5}, "answer"),
    ({"meta": []}, "meta"), ({"source": 5}, "source"),
]  # fmt: skip
TURN_FAULTS = [
    *IMAGE_FAULTS, ({"messages": "ab"}, "no list 'messages'"),
    ({"messages": 5}, "no list 'messages'"),
    ({"messages": {"role": "user"}}, "no list 'messages'"),
    ({"messages": ["a", "b"]}, "no list 'messages'"),
    ({"messages": EXCHANGE[:1]}, "of one question and one answer"),
    ({"messages": EXCHANGE[::-1]}, "of one question and one answer"),
    ({"messages": EXCHANGE * 2}, "of one question and one answer"),
    (exchange(5), "both texts"), (exchange("<image>Why?", ["B"]), "both texts"),
    (exchange("<image>Why?", None), "both texts"),
    (exchange("<image> ", "Yes"), "question: expected a text that is not empty"),
]  # fmt: skip
CHAT_FAULTS = [
    *TURN_FAULTS, (exchange("<image>Which?\nA. x\nB. y", "C"), "not among the options"),
    (exchange("<image>Which?\nA. x\nC. y"), "expected (A) (B)"),
    (exchange("<image>Which?\nA. x\nA. y"), "expected (A) (B)"),
    (exchange("<image>Which?\nB. x\nA. y"), "expected (A) (B)"), ({"id": 5}, "id: expected str"),
]  # fmt: skip
MEDMCQA_FAULTS = [
    ({"opa": 1}, "options: expected a list of texts"),
    ({"opb": GONE}, "options: expected a list of texts"),
    ({"opc": None}, "options: expected a list of texts"), ({"opd": " "}, TWO_TO_TEN),
    ({"cop": GONE}, "cop: expected one letter"), ({"cop": None}, "cop: expected one letter"),
    ({"cop": -1}, "cop: expected one letter"), ({"cop": 5}, "cop: expected one letter"),
    ({"cop": [4]}, "cop: expected one letter"), ({"cop": "5"}, "'5' is not among"),
    ({"choice_type": "multi"}, "choice_type: is 'multi'"),
    ({"choice_type": GONE}, "choice_type: is None"), ({"question": 5}, "question: expected str"),
    ({"question": " "}, "question: expected a text that is not empty"),
    ({"subject_name": 5}, "subject_name: expected str"), ({"id": 5}, "id: expected str"),
]  # fmt: skip
AFTER = "prompt: text stands after its options"
M23K_FAULTS = [
    ({"answer_letter": "C"}, "answer: 'C' 'a scar' is not among"),
    ({"answer_letter": "D"}, "'D' is not among"),
    ({"answer_letter": "D", "answer_string": None}, "'D' is not among"),
    ({"answer_letter": None}, "answer_letter: expected one letter"),
    ({"answer_letter": 1}, "answer_letter: expected one letter"),
    ({"answer_string": "a cyst"}, "is not among"), ({"answer_string": 5}, "answer_letter: "),
    ({"prompt": "Which?"}, "options: there are 0"), ({"prompt": 5}, "prompt: expected str"),
    ({"prompt": GONE}, "missing 'prompt'"), ({"prompt": "Which?\nA. a cyst\nC. a scar"}, "(A) (B)"),
    ({"prompt": "A. a cyst\nB. a scar"}, "question: expected a text that is not empty"),
    ({"prompt": "Which?\nA. a cyst\nB. a scar\nin the lung\nC. gout"}, AFTER),
    ({"prompt": "Which?\nA. a cyst\nB. a scar\nTell why."}, AFTER),
    ({"prompt": "A. x\nB. y\nWhich are true?\nA. both\nB. a scar"}, AFTER),
]  # fmt: skip
PMC_FAULTS = [
    ({"Answer_label": "C"}, "answer: 'C' 'a scar' is not among"), ({"Answer": "gout"}, "not among"),
    ({"Answer_label": "E"}, "'E' is not among"), ({"Answer": ""}, "not among"),
    ({"Answer_label": "b"}, "'b' is not among"),
    ({"Answer_label": ""}, "answer: expected a text"),
    ({"Answer": "C: a scar"}, "Answer: its letter is 'C'"), ({"Answer": None}, "expected str"),
]  # fmt: skip
PMC_2_FAULTS = [
    ({"Answer": "E"}, "'E' is not among"), ({"Answer": ""}, "answer: expected a text"),
    ({"Answer": "b"}, "'b' is not among"), ({"Answer": "a scar"}, "'a scar' is not among"),
    ({"Answer": "B: a scar"}, "Answer: its letter is 'B'"), ({"Answer": GONE}, "missing 'Answer'"),
]  # fmt: skip
CHOICE_FAULTS = [
    ({"Choice A": "B: a cyst"}, "Choice A: its letter is 'B'"),
    ({"Choice B": None}, "Choice B: expected str"), ({"Choice C": " C: "}, TWO_TO_TEN),
    ({"Choice D": GONE}, "missing 'Choice D'"), ({"Figure_path": ""}, "an image is missing"),
    ({"Figure_path": 5}, "an image's bytes or name"), ({"Question": 5}, "Question: expected str"),
    ({"Question": " "}, "question: expected a text that is not empty"),
]  # fmt: skip
MM_GOOD = mm_row(1, form="dict") | {"question": "What is it?"}
MMMU_GOOD = mmmu_row(1, image_1="a.png")
BROKEN = {  # reader: (a good row, what is broken in it and what is said of that)
    "medxpertqa-mm": (MM_GOOD, MM_FAULTS), "medxpertqa-text": (MM_GOOD, MM_FAULTS),
    "medqa": (EXAM, EXAM_FAULTS), "medqa-train": (EXAM, EXAM_FAULTS),
    "huatuo": (EXAM, EXAM_FAULTS), "medbullets-op4": (medbullets_rows()[1], BULLETS_FAULTS),
    "medbullets-op5": (medbullets_rows()[1], [*BULLETS_FAULTS, ({"ope": " "}, TWO_TO_TEN)]),
    "mmmu": (MMMU_GOOD, MMMU_FAULTS), "mmmu-pro": (MMMU_GOOD, MMMU_FAULTS),
    "mmmu-pro-vision": (PICTURE, VISION_FAULTS),
    "mmmu-test": (MMMU_GOOD, [*MMMU_FAULTS, ({"answer": "?"}, "give --answers with")]),
    "mmmu-general": (MMMU_GOOD | {"subject": "Art"}, ART_FAULTS),
    "mmmu-test-general": (MMMU_GOOD | {"subject": "Art"}, ART_FAULTS),
    "medmcqa": (MEDMCQA, MEDMCQA_FAULTS), "m23k": (M23K, M23K_FAULTS),
    "pmc-vqa": (PMC, [*CHOICE_FAULTS, *PMC_FAULTS]),
    "pmc-vqa-2": (PMC_2, [*CHOICE_FAULTS, *PMC_2_FAULTS]),
    "questions": (data.Question(**BASE).to_row(), OWN_FAULTS),
    "sharegpt": ({"messages": EXCHANGE, "images": ["a.png"]}, CHAT_FAULTS),
}  # fmt: skip


@pytest.mark.parametrize("name", list(benchmarks.READERS))
def test_every_reader_names_each_broken_row_and_never_reads_it(tmp_path, name, capsys):
    good, faults = BROKEN[name]
    assert len(read(name, jsonl(tmp_path / "good.jsonl", [good]), None)) == 1 and len(faults) >= 12
    for changes, said in faults:
        row = good | {"id": "test_Pharmacy_2"} | changes
        row = {key: value for key, value in row.items() if value is not GONE}
        path, told = jsonl(tmp_path / "b.jsonl", [good, row]), ""
        if benchmarks.READERS[name].leaves_out:
            assert len(read(name, path, None)) == 1, f"{name} reads {str(changes)[:200]}"
            told = capsys.readouterr().out
        else:
            with pytest.raises(data.RowError) as error:
                read(name, path, None)
                pytest.fail(f"{name} reads {str(changes)[:200]}")
            told = str(error.value)
        assert "b.jsonl:2" in told and said in told, (changes, told)


@pytest.mark.parametrize("name", ["medxpertqa-mm", "sharegpt"])
def test_one_name_where_a_list_of_images_is_usual_is_one_image(tmp_path, name):
    row = BROKEN[name][0] | {"images": "MM-1-a.jpeg"}
    assert read(name, jsonl(tmp_path / "a.jsonl", [row]), None)[0].images == ["MM-1-a.jpeg"]


EXAM_TEXT = json.dumps(EXAM)
NOT_STRICT = {  # what is no row, and what is said of it
    EXAM_TEXT.replace('"B": "y"', '"A": "y", "B": "y"'): "'A' is there twice",
    EXAM_TEXT.replace('"y"}', '"y"}, "score": NaN'): "NaN",
    EXAM_TEXT.replace('"y"}', '"y"}, "score": -Infinity'): "Infinity",
    EXAM_TEXT.replace("Why?", "\\ud800?"): "half a surrogate pair",
    EXAM_TEXT.replace('"y"}', '"y"}, "n": ' + "[" * 99_999): "nested too deeply",
    EXAM_TEXT.replace('"y"}', '"y"}, "n": ' + "9" * 5000): "not JSON", EXAM_TEXT[:-1]: "not JSON",
}  # fmt: skip


@pytest.mark.parametrize("text", NOT_STRICT, ids=list(NOT_STRICT.values()))
def test_json_that_is_not_strict_is_named_by_file_and_row(tmp_path, text):
    (tmp_path / "a.json").write_text(f"[{EXAM_TEXT},\n{text}]")
    (tmp_path / "a.jsonl").write_text(f"{EXAM_TEXT}\n{text}\n")
    for file, where in (("a.json", "a.json: "), ("a.jsonl", "a.jsonl:2")):
        with pytest.raises(data.RowError) as error:
            read("huatuo", tmp_path / file, None)
        assert where in str(error.value) and NOT_STRICT[text] in str(error.value)


def test_a_number_that_no_file_of_ours_can_hold_is_named(tmp_path):
    row = json.dumps(data.Question(**BASE).to_row()).replace('"meta": {}', '"meta": {"x": 1e999}')
    (tmp_path / "a.jsonl").write_text(row)
    with pytest.raises(data.RowError, match=r"a\.jsonl:1: not JSON .1e999 is no JSON number"):
        read("questions", tmp_path / "a.jsonl", None)


FILES = {  # what lies where a file is expected, and what is said of it
    "a folder": (lambda path: path.mkdir(), "neither a file nor a folder with|is not a file"),
    "nothing": (lambda path: None, "neither a file nor a folder"),
    "an empty file": (lambda path: path.write_bytes(b""), "no question|not JSON|not a whole"),
    "a pipe": (lambda path: os.mkfifo(path), "is not a file"),
    "NUL bytes": (lambda path: path.write_bytes(b"a,b\n\0,1\n" * 9), "a.*: "),
    "a zip": (lambda path: path.write_bytes(b"PK\3\4" + bytes(range(256))), "a.*: "),
    "no permission": (lambda path: (path.write_text("x"), path.chmod(0)), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("suffix", list(benchmarks.ROWS))
def test_what_is_no_file_of_rows_is_refused_at_once_by_name(tmp_path, suffix, what):
    if what == "no permission" and os.getuid() == 0:
        pytest.skip("root may read everything")
    make, said = FILES[what]
    make(tmp_path / f"a{suffix}")
    with pytest.raises(data.RowError, match=said) as error:
        read("huatuo", tmp_path / f"a{suffix}", None)
    assert str(tmp_path) in str(error.value)


def test_a_pipe_or_a_folder_among_the_files_of_a_download_is_refused(tmp_path):
    jsonl(tmp_path / "a.jsonl", [data.Question(**BASE).to_row()])
    for make in (os.mkfifo, os.mkdir):
        make(tmp_path / "b.jsonl")
        with pytest.raises(data.RowError, match=r"b\.jsonl: is not a file"):
            read("questions", tmp_path, None)
        (tmp_path / "b.jsonl").unlink() if make is os.mkfifo else (tmp_path / "b.jsonl").rmdir()


def test_a_parquet_file_that_is_torn_anywhere_is_named(tmp_path):
    whole = parquet(tmp_path / "a.parquet", [mmmu_row(n) for n in (1, 2, 3)]).read_bytes()
    for cut in range(1, len(whole), len(whole) // 40):
        (tmp_path / "cut.parquet").write_bytes(whole[:cut])
        (tmp_path / "hole.parquet").write_bytes(whole[:cut] + bytes(40) + whole[cut + 40 :])
        for file in ("cut.parquet", "hole.parquet"):
            try:
                read("mmmu", tmp_path / file, None)
                assert file == "hole.parquet"  # a hole in what nobody reads
            except data.RowError as error:
                assert file in str(error)


# --------------------------------------------------------------------------------------------------
# images that are too much


def zipped(folder: Path, content: bytes) -> Path:
    """A folder's images.zip with one image, beside a row that names it."""
    jsonl(folder / "MM/test.jsonl", [mm_row(1)])
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("MM-1-a.jpeg", content)
    return folder / "images.zip"


def declare(path: Path, size: int) -> None:
    """Writes another size into the archive: where the image begins, and in the list at the end."""
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\1\2", 24), (b"PK\3\4", 22)):
        at = content.index(mark) + offset
        content[at : at + 4] = size.to_bytes(4, "little")
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("declared", [0, 20])
def test_a_member_that_lies_about_its_size_is_named(tmp_path, declared):
    declare(zipped(tmp_path, png(1)), declared)
    with pytest.raises(data.RowError, match=r"test\.jsonl:1: image MM-1-a\.jpeg: .*images\.zip"):
        read("medxpertqa-mm", tmp_path, tmp_path / "root")


def test_a_picture_of_too_many_pixels_is_refused_undecoded(tmp_path):
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    zipped(tmp_path, file.getvalue())
    with pytest.raises(
        data.RowError, match=r"MM-1-a\.jpeg: cannot be decoded .*decompression bomb"
    ):
        read("medxpertqa-mm", tmp_path, tmp_path / "root")


def test_a_zip_that_is_torn_anywhere_is_named(tmp_path):
    path = zipped(tmp_path, png(1))
    whole = path.read_bytes()
    for cut in range(len(whole)):
        for content in (whole[:cut], whole[:cut] + b"\xff" + whole[cut + 1 :]):
            path.write_bytes(content)
            shutil.rmtree(tmp_path / "root", ignore_errors=True)
            try:
                read("medxpertqa-mm", tmp_path, tmp_path / "root")
                assert (tmp_path / "root/MM-1-a.jpeg").read_bytes() == png(1)  # a date, a flag
            except data.RowError as error:
                assert "images.zip" in str(error) or "MM-1-a.jpeg" in str(error)


@pytest.mark.parametrize("name", ["root", "nul\0.png"])
def test_an_image_name_that_no_file_can_have_is_named(tmp_path, name):
    (tmp_path / "root" / "root").mkdir(parents=True)
    path = zipped(tmp_path, png(1))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, png(1))
    jsonl(tmp_path / "MM/test.jsonl", [mm_row(1) | {"images": [name]}])
    with pytest.raises(data.RowError, match=r"test\.jsonl:1: images?:? "):
        read("medxpertqa-mm", tmp_path, tmp_path / "root")


def test_one_missing_image_among_those_there_is_an_error_with_or_without_a_root(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [mm_row(1, images=2)])
    (tmp_path / "MM-1-a.jpeg").write_bytes(png(1))
    for root in (None, tmp_path / "root"):
        with pytest.raises(
            data.RowError,
            match=r"a\.jsonl:1: image MM-1-b\.jpeg is not in .* \(1 are missing, 1 are there\)",
        ):
            read("medxpertqa-mm", path, root)


def test_no_image_at_all_is_an_error_where_they_are_to_be_written(tmp_path):
    with pytest.raises(data.RowError, match=r"a\.jsonl:1: image MM-1-a\.jpeg is not in"):
        read("medxpertqa-mm", jsonl(tmp_path / "a.jsonl", [mm_row(1)]), tmp_path / "root")


def test_a_repeated_published_id_is_an_error_with_both_rows(tmp_path):
    with pytest.raises(data.RowError, match=r"a\.jsonl:2: id: 'MM-1' is already on .*a\.jsonl:1"):
        read(
            "medxpertqa-mm",
            jsonl(tmp_path / "a.jsonl", [mm_row(1), mm_row(1, medical_task="Treatment")]),
            None,
        )


def test_rows_equal_in_content_are_kept_apart_and_said_to_repeat(tmp_path):
    row = {"question": "Why?", "options": {"A": "x", "B": "y"}, "answer_idx": "B"}
    questions = read(
        "medqa", jsonl(tmp_path / "a.jsonl", [row | {"id": f"t{n}"} for n in range(3)]), None
    )
    base = questions[0].id
    assert [q.id for q in questions] == [base, f"{base}-2", f"{base}-3"] and [
        q.meta.get("repeats") for q in questions
    ] == [None, base, base]
    assert benchmarks.count(questions)["rows that repeat another"] == 2
    data.write_jsonl(tmp_path / "q.jsonl", (q.to_row() for q in questions))
    assert schema.read_questions(tmp_path / "q.jsonl") == questions


def test_equal_stems_with_other_options_or_images_are_other_questions(tmp_path):
    rows = [mm_row(1), mm_row(2), mm_row(3)]
    rows[2] |= {
        "question": rows[0]["question"],
        "options": rows[0]["options"],
    }  # only the image differs
    assert len({q.id for q in read("medxpertqa-mm", jsonl(tmp_path / "a.jsonl", rows), None)}) == 3


def test_a_truncated_zip_and_a_damaged_entry_are_named(tmp_path):
    jsonl(tmp_path / "MM/test.jsonl", [mm_row(1)])
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images/MM-1-a.jpeg", png(1))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(data.RowError, match=r"images\.zip: not a whole zip"):
        read("medxpertqa-mm", tmp_path, None)
    damaged = bytearray(whole)
    damaged[whole.index(b"IDAT") + 6] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(
        data.RowError, match=r"test\.jsonl:1: image MM-1-a\.jpeg: cannot be read from .*images\.zip"
    ):
        read("medxpertqa-mm", tmp_path, tmp_path / "root")


def test_an_image_that_is_cut_off_is_named(tmp_path):
    file = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(file, "JPEG")
    (tmp_path / "MM-1-a.jpeg").write_bytes(file.getvalue()[:-200])
    with pytest.raises(data.RowError, match=r"a\.jsonl:1: image MM-1-a\.jpeg: cannot be decoded"):
        read("medxpertqa-mm", jsonl(tmp_path / "a.jsonl", [mm_row(1)]), tmp_path / "root")
    with pytest.raises(data.RowError, match=r"b\.parquet: row 0: cannot be decoded"):
        read(
            "mmmu",
            parquet(
                tmp_path / "b.parquet", [mmmu_row(1, image_1={"bytes": png(1)[:40], "path": None})]
            ),
            None,
        )


def test_another_image_under_the_same_name_is_not_overwritten(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "MM-1-a.jpeg").write_bytes(png(9))
    (tmp_path / "MM-1-a.jpeg").write_bytes(png(1))
    with pytest.raises(data.RowError, match="is another image; give another --images"):
        read("medxpertqa-mm", jsonl(tmp_path / "a.jsonl", [mm_row(1)]), tmp_path / "root")
    assert (tmp_path / "root" / "MM-1-a.jpeg").read_bytes() == png(9)


def test_damaged_files_and_unknown_names_are_named(tmp_path):
    whole = parquet(tmp_path / "a.parquet", [mmmu_row(1)]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-20])
    (tmp_path / "cut.json").write_text('{"question": {"0": "x"')
    (tmp_path / "uneven.json").write_text('{"question": {"0": "x", "1": "y"}, "opa": {"0": "x"}}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "short.csv").write_text("question,opa\nq\n")
    (tmp_path / "long.csv").write_text("question,opa\nq,a,b\n")
    (tmp_path / "latin.csv").write_bytes("question,opa\nq,\xe9\n".encode("latin-1"))
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty.json").write_text("[]")
    cases = [
        ("mmmu", "cut.parquet", "not a whole parquet"),
        ("huatuo", "cut.json", "not JSON"),
        ("medbullets-op4", "uneven.json", "row 0: options: expected a list"),
    ]
    cases += [
        ("huatuo", "list.json", "row 0: expected an object"),
        ("medbullets-op4", "short.csv", "row 0: has other cells"),
        ("medbullets-op4", "long.csv", "row 0: has other cells"),
    ]
    cases += [
        ("medbullets-op4", "latin.csv", "not CSV"),
        ("medqa", "a.txt", "expected one of .jsonl"),
        ("huatuo", "empty.json", "no question of huatuo"),
        ("medqa", "none.jsonl", "neither a file nor a folder"),
    ]
    for name, file, said in cases:
        with pytest.raises(data.RowError, match=said) as error:
            read(name, tmp_path / file, None)
        assert file in str(error.value)
    with pytest.raises(data.RowError, match="known are medxpertqa-mm"):
        read("medxpert", tmp_path, None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        data.RowError, match="neither a file nor a folder with Basic_Medical_Science/validation"
    ):
        read("mmmu", tmp_path / "empty", None)


# --------------------------------------------------------------------------------------------------
# the command


def test_inspect_prints_what_was_found_next_to_the_paper(tmp_path, capsys):
    benchmarks.main(
        [
            "inspect",
            "medxpertqa-mm",
            str(
                jsonl(
                    tmp_path / "a.jsonl",
                    [mm_row(n, question_type="Understanding") for n in range(4)],
                )
            ),
        ]
    )
    lines = {
        " ".join(line.split()[: -2 if "differs" not in line else -3]): line.split()
        for line in capsys.readouterr().out.splitlines()
    }
    assert lines["question_type Understanding"][-3:] == ["4", "554", "differs"] and lines[
        "question_type Reasoning"
    ][-3:] == ["0", "1446", "differs"]
    assert "7 of 7 figures differ from what the paper used".split() in lines.values()


def test_nothing_differs_where_the_counts_are_the_papers(capsys):
    questions = [
        data.Question(str(n), {"A": "x", "B": "y", "C": "z", "D": "w"}, "A", source="medqa")
        for n in range(1273)
    ]
    assert benchmarks.inspect("medqa", questions) == []
    assert "0 of 2 figures differ" in capsys.readouterr().out


def test_the_papers_counts_add_up():
    paper = {name: reader.paper for name, reader in benchmarks.READERS.items()}
    assert paper["medxpertqa-mm"]["questions"] == 2000 == 1446 + 554 == 1199 + 448 + 353
    assert sum(n for key, n in paper["mmmu"].items() if key.startswith("subject")) == 150
    assert (
        sum(n for key, n in paper["mmmu-pro"].items() if key.startswith("subject"))
        == 286
        == paper["mmmu-pro-vision"]["questions"]
    )


def test_convert_writes_questions_that_other_stages_read(tmp_path, capsys):
    jsonl(tmp_path / "MM/test.jsonl", [mm_row(1), mm_row(2)])
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for n in (1, 2):
            archive.writestr(f"MM-{n}-a.jpeg", png(n))
    out, root = tmp_path / "out/questions.jsonl", tmp_path / "root"
    with pytest.raises(data.RowError, match="--images"):
        benchmarks.main(["convert", "medxpertqa-mm", str(tmp_path), "--out", str(out)])
    assert not out.exists()
    benchmarks.main(
        ["convert", "medxpertqa-mm", str(tmp_path), "--out", str(out), "--images", str(root)]
    )
    questions = schema.read_questions(out)
    assert len(questions) == 2 and all(
        (root / image).is_file() for q in questions for image in q.images
    )
    assert run_report(["check", str(out)]) == 0 and questions == read("questions", out, root)


# --------------------------------------------------------------------------------------------------
# real files


@pytest.mark.skipif(
    "MEDEE_REAL_DATA" not in os.environ,
    reason="MEDEE_REAL_DATA names no folder with published files",
)
@pytest.mark.parametrize(
    ("name", "file", "figures"),
    [
        (
            "medxpertqa-mm",
            "medxpertqa_sampled_mm_input.jsonl",
            {
                "questions": 199,
                "images": 273,
                "question_type Reasoning": 144,
                "question_type Understanding": 55,
                "options 5": 199,
            },
        ),
        ("medqa", "medqa_input_200.jsonl", {"questions": 200, "options 4": 200, "images": 0}),
        ("huatuo", "huatuo_demo_data.json", {"questions": 198, "options 4": 176, "options 5": 22}),
    ],
)
def test_real_files_are_read_whole(name, file, figures):
    questions = read(name, Path(os.environ["MEDEE_REAL_DATA"]) / file, None)
    assert figures.items() <= benchmarks.count(questions).items()
    assert not any("Answer Choices" in q.question for q in questions) and len(
        {q.id for q in questions}
    ) == len(questions)
    if name == "huatuo":
        assert all(q.meta["Complex_CoT"] and q.meta["Response"] for q in questions)
