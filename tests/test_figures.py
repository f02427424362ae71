"""Tables and pictures of results whose every number is known: the paper's data against arithmetic,
ours against the figures they show."""

import csv
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from judge import CRITERIA
from report import figures, score, tables

MODALITIES = (
    "CT,MRI,radiograph,ultrasound,pathology slide,fundus,dermoscopy,ECG,endoscopy,blood smear,"
    "angiography,gross photograph"
).split(",")
TASKS = ("Treatment", "Basic Science", "Diagnosis")
COUNTS = {
    "medxpertqa-mm": 96,
    "mmmu": 30,
    "mmmu-pro": 40,
    "medqa": 24,
    "medbullets-op4": 24,
    "medbullets-op5": 24,
}
SKILL = {"base": 0.22, "Stage-I": 0.34, "Stage-II": 0.4, "multimodal": 0.28, "both": 0.31}


def entries(
    stage: str, samples: int, counts: dict[str, int], seed: int = 0, size: int = 0
) -> list[dict]:
    """Made-up entries, as score.entry makes them. Every question has its own chance of a right
    answer, and a favourite wrong one."""
    found, draw = [], random.Random(f"{stage} {seed}")
    for source, count in counts.items():
        image, easier = (
            source.startswith(("medx", "mmmu")),
            {"mmmu": 0.3, "medqa": 0.3, "medbullets-op4": 0.2}.get(source, 0.0),
        )
        for i in range(count):
            mean = min(0.95, SKILL[stage] + easier)
            chance = draw.betavariate(2 * mean, 2 * (1 - mean))
            choices = [
                None
                if draw.random() < 0.03
                else "A"
                if draw.random() < chance
                else draw.choice("BBBCDE")
                for _ in range(samples)
            ]
            right = [choice == "A" for choice in choices]
            ended = [
                "length" if choice is None and draw.random() < 0.5 else "stop" for choice in choices
            ]
            groups = (
                {"modality": MODALITIES[int(len(MODALITIES) * (i / count) ** 2)]} if image else {}
            )
            if source == "medxpertqa-mm":
                groups |= {
                    "question_type": ("Reasoning", "Understanding")[i % 4 == 3],
                    "medical_task": TASKS[i % 3],
                }
            met = [
                {name: draw.random() < SKILL[stage] + 0.4 for name in CRITERIA} if image else None
                for _ in range(samples)
            ]
            official = (
                {"choices": [choice or "E" for choice in choices], "right": right}
                if source.startswith("mmmu")
                else None
            )
            words = [draw.randint(80, 400) for _ in range(samples)]
            found.append(
                {
                    "id": f"{source}-{i}",
                    "source": source,
                    "image": image,
                    "answer": "A",
                    "groups": groups,
                    "choices": choices,
                    "right": right,
                    "official": official,
                    "ended": ended,
                    "words": words,
                    "loops": [False] * len(words),
                    "criteria": met,
                }
            )
    return found


def split(members: list[dict], *keys: str) -> dict[str, dict]:
    values = [
        (key, value)
        for key in keys
        for value in sorted({found["groups"][key] for found in members if key in found["groups"]})
    ]
    return {
        f"{key}={value}": score.summarise(
            [found for found in members if found["groups"].get(key) == value]
        )
        for key, value in values
    }


def result_of(name: str, found: list[dict]) -> dict:
    """A results.json, as evaluate.py writes it."""
    image, text = [one for one in found if one["image"]], [one for one in found if not one["image"]]
    benchmarks = {}
    for source in dict.fromkeys(one["source"] for one in found):
        members = [one for one in found if one["source"] == source]
        benchmarks[source] = {
            "figures": score.summarise(members),
            "subsets": split(members, "question_type", "medical_task", "modality"),
        }
    groups = {
        kind: score.summarise(members)
        for kind, members in (("image", image), ("text", text))
        if members
    }
    settings = {
        "engine": "hf:somewhere",
        "prompt": "",
        "extractor": "",
        "sampling": {"temperature": 0.5},
    }
    return {
        "name": name,
        **settings,
        "groups": groups,
        "benchmarks": benchmarks,
        "subsets": split(image, "modality", "kind"),
        "entries": found,
    }


def made(name: str, samples: int = 32, counts: dict[str, int] | None = None, seed: int = 0) -> dict:
    return result_of(name, entries(name.split("/")[-1], samples, counts or COUNTS, seed))


@pytest.fixture(scope="module", autouse=True)
def few_subsets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "VOTE_SUBSETS", 4)  # of a vote's samples: 100 only make it slower
        yield


@pytest.fixture(scope="module")
def stages() -> list[dict]:
    return [made(f"7B/{stage}") for stage in ("base", "Stage-I", "Stage-II")]


@pytest.fixture(scope="module")
def everything(stages) -> list[dict]:
    """Three stages, two ablations of which one lacks a benchmark, a second size with one sample,
    and a model without a stage."""
    fewer = {source: count for source, count in COUNTS.items() if source != "medqa"}
    other = [
        made("7B/multimodal"),
        made("7B/both", counts=fewer),
        made("32B/Stage-I", 1, {"medxpertqa-mm": 40}),
        result_of("GPT-4o", entries("both", 2, {"medqa": 20})),
    ]
    return [*stages, *other]


@pytest.fixture(scope="module")
def drawn(everything, tmp_path_factory) -> tuple[Path, list[Path], list[str]]:
    out = tmp_path_factory.mktemp("paper")
    return out, *figures.plot_paper(everything, out)


# --------------------------------------------------------------------------------------------------
# The paper's tables against arithmetic


def whole(text: str, questions: int) -> list[int]:
    """Every k that k of so many questions, in per cent, is printed as `text`: rounded, or cut off,
    to two decimals."""
    printed = int(text.replace(".", ""))
    return [
        k
        for k in range(questions + 1)
        if printed in (10000 * k // questions, (20000 * k + questions) // (2 * questions))
    ]


def accuracies(number: int, questions: dict | None = None) -> list[tuple]:
    """(method, benchmark, subset, printed, questions) of a table of the paper. questions: the row's
    own, or the column's."""
    rows = [row for row in tables.paper_records(number) if row["subset"] != "delta"]
    return [
        (
            row["method"],
            row["benchmark"],
            row["subset"].split("=")[-1],
            row["percent"],
            questions[row["benchmark"], row["subset"]] if questions else row["questions"],
        )
        for row in rows
    ]


def column_questions(number: int) -> dict:
    return {
        (benchmark, subset): questions for benchmark, subset, questions in tables.TABLES[number][0]
    }


def test_values_that_are_no_k_of_the_columns_questions_are_the_known_ones():
    unfit = {row[:4] for row in accuracies(1, column_questions(1)) if not whole(row[3], row[4])}
    mm, pro = "medxpertqa-mm", "mmmu-pro"
    assert unfit == {
        ("OpenAI-o1", mm, "Reasoning", "52.78"),
        ("OpenAI-o1", mm, "Understanding", "65.45"),
        ("OpenAI-o1", mm, "", "56.28"),  # the sampled subset
        ("InternVL3.0-78B", mm, "Reasoning", "28.80"),
        ("QwenVL2.5-7B", pro, "", "28.47"),
        ("GMAI-VL-R1 SFT", pro, "", "32.99"),
        ("GMAI-VL-R1 RLT", pro, "", "34.03"),  # of 288
        ("Chiron-o1", mm, "Understanding", "25.10"),
        ("Chiron-o1", "mmmu", "", "54.60"),
        ("Chiron-o1", pro, "", "33.90"),  # one decimal
    }
    assert not [row for row in accuracies(2, column_questions(2)) if not whole(row[3], row[4])]


def test_with_their_own_questions_only_the_misprints_are_left():
    assert {row[:2] for row in accuracies(1) if not whole(row[3], row[4])} == {
        ("InternVL3.0-78B", "medxpertqa-mm"),
        *(("Chiron-o1", s) for s in column_benchmarks()),
    }
    counted = {
        (method, benchmark, subset): whole(printed, n)
        for method, benchmark, subset, printed, n in accuracies(1)
    }
    assert [
        counted["OpenAI-o1", "medxpertqa-mm", part] for part in ("Reasoning", "Understanding", "")
    ] == [[76], [36], [112]]
    assert [
        counted[method, "mmmu-pro", ""]
        for method in ("QwenVL2.5-7B", "GMAI-VL-R1 SFT", "GMAI-VL-R1 RLT")
    ] == [[82], [95], [98]]


def column_benchmarks() -> set[str]:
    return {benchmark for benchmark, _, _ in tables.COLUMNS1}


@pytest.mark.parametrize("number", [1, 2])
def test_parts_add_up_to_the_overall_but_for_two_rows(number):
    found: dict[str, dict[str, list[int]]] = {}
    for method, benchmark, subset, printed, n in accuracies(number):
        if benchmark == "medxpertqa-mm":
            found.setdefault(method, {})[subset] = whole(printed, n)
    for parts in (("Reasoning", "Understanding"), ("Treatment", "Basic Science", "Diagnosis"))[
        :number
    ]:
        sums = {
            method: {
                sum(k)
                for k in np.array(np.meshgrid(*(cells[part] for part in parts)))
                .reshape(len(parts), -1)
                .T.tolist()
            }
            for method, cells in found.items()
            if parts[0] in cells
        }
        wrong = {method for method, total in sums.items() if not total & set(found[method][""])}
        assert wrong == ({"InternVL3.0-78B", "Chiron-o1"} if number == 1 else set())
    assert all(
        sum(n for _, subset, n in tables.COLUMNS2 if subset.startswith(key)) == 2000
        for key in ("medical_task=", "question_type=")
    )


def test_gains_are_differences_but_for_chiron():
    values = {
        (row["method"], row["benchmark"]): round(100 * float(row["percent"]))
        for row in tables.paper_records(1)
        if row["subset"] == ""
    }
    wrong = set()
    for row in tables.paper_records(1):
        if row["subset"] == "delta":
            base = (
                "QwenVL2.5-7B"
                if "Qwen" in row["method"] or "GMAI" in row["method"]
                else "InternVL3.0-8B"
            )
            difference = values[row["method"], row["benchmark"]] - values[base, row["benchmark"]]
            if difference != round(100 * float(row["percent"])):
                wrong.add(
                    (
                        row["method"],
                        row["benchmark"],
                        difference - round(100 * float(row["percent"])),
                    )
                )
    assert wrong == {
        ("Chiron-o1", "medxpertqa-mm", 1),
        ("Chiron-o1", "mmmu", -1),
        ("Chiron-o1", "mmmu-pro", -1),
    }
    overall = {
        row["method"]: row["percent"] for row in tables.paper_records(2) if row["subset"] == ""
    }
    for row in tables.paper_records(2):
        if row["subset"] == "delta":
            assert float(overall[row["method"]]) - float(
                overall[row["method"].split()[0]]
            ) == pytest.approx(float(row["percent"]))


def test_every_note_is_used_and_every_misprint_has_one():
    records = [row for number in (1, 2) for row in tables.paper_records(number)]
    assert {note for row in records for note in row["notes"]} == set(tables.NOTES)
    for number in (1, 2):
        for row in tables.paper_records(number):
            if row["subset"] != "delta" and not whole(
                row["percent"], column_questions(number)[row["benchmark"], row["subset"]]
            ):
                assert row["notes"], row
    assert (
        len(records) == 17 * 5 - 4 + 3 * 7 + 6 * 7
    )  # accuracies less the four of GMAI-VL-R1 that are not given, gains, Table 2


# --------------------------------------------------------------------------------------------------
# Tables: cells against hand figures, and read back


def cells(markdown: str) -> dict[str, list[str]]:
    """{first cell: the others} of a Markdown table, the header under its own first cell"""
    lines = [
        line for line in markdown.splitlines() if line.startswith("|") and not line.startswith("|-")
    ]
    rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
    ]
    assert (
        len(set(map(len, lines))) == 1
        and len({len(row) for row in rows}) == 1
        and len({row[0] for row in rows}) == len(rows)
    )
    return {row[0]: row[1:] for row in rows}


def by_hand(key: str, source: str, image: bool, choices: str, **more) -> dict:
    """An entry whose answer is A; "-" cannot be read, "!" was cut off."""
    said = [None if choice in "-!" else choice for choice in choices]
    count = len(said)
    entry = {
        "id": key,
        "source": source,
        "image": image,
        "answer": "A",
        "groups": {},
        "choices": said,
        "right": [choice == "A" for choice in said],
    }
    ended = ["length" if choice == "!" else "stop" for choice in choices]
    return (
        entry
        | {
            "official": None,
            "ended": ended,
            "words": [10] * count,
            "loops": [False] * count,
            "criteria": [None] * count,
        }
        | more
    )


def wilson(share: float, n: int) -> str:
    z = 1.959963984540054
    middle, half = (
        share + z * z / (2 * n),
        z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)),
    )
    return (
        f"{share:.3f} ({(middle - half) / (1 + z * z / n):.2f} … "
        f"{(middle + half) / (1 + z * z / n):.2f})"
    )


def test_table_by_hand():
    met, blind = (
        dict.fromkeys(CRITERIA, True),
        {**dict.fromkeys(CRITERIA, True), "No_Hallucination": False},
    )
    official = {"choices": ["A", "A", "A", None], "right": [True, True, True, False]}
    first = result_of(
        "one",
        [
            by_hand(
                "p",
                "mmmu",
                True,
                "AAB-",
                official=official,
                criteria=[met, blind, met, {}],
                words=[10, 20, 30, 40],
            ),
            by_hand("q", "mmmu", True, "BB!A", official=official),
            by_hand("t", "medqa", False, "AABA"),
        ],
    )
    second = result_of(
        "two | 2", [by_hand("t", "medqa", False, "BA", ended=["overlong", "refused"])]
    )
    found = cells(tables.table([first, second]))
    assert found[""] == ["one", "two | 2"]
    assert found["image questions: questions × samples"] == ["2 × 4", "–"] and found[
        "text questions: questions × samples"
    ] == ["1 × 4", "1 × 2"]
    assert found["image questions: accuracy"] == [wilson((2 / 4 + 1 / 4) / 2, 2), "–"]
    by_rule = found["image questions: accuracy, by the benchmark's rule (official.py)"]
    assert by_rule == [wilson(3 / 4, 2), "–"]
    assert found["image questions: … which cannot read, of all answers"] == ["0.250", "–"]
    assert found["image questions: majority vote"] == [
        wilson(1 / 2, 2) + ", n = 4",
        "–",
    ]  # p: A, q: B
    assert found["image questions: any right (pass@n)"][0] == wilson(1, 2) + ", n = 4"
    # of the 8 answers 2 cannot be read; the one of them that was cut off is half of those
    assert found["image questions: cannot be read, of all answers"][0] == "0.250"
    assert found["image questions: … cut off, of all answers"][0] == "0.125"
    assert found["image questions: words a chain"][0] == "18"  # (100 + 40) / 8 = 17.5
    assert (
        found["image questions: chains that meet all four criteria"][0] == wilson(2 / 3, 1)
        and found["image questions: … No Hallucination"][0] == "0.667"
    )
    assert found["image questions: hallucinate, of those that look"][0] == "0.333 of 3"
    assert found["text questions: accuracy"] == [wilson(3 / 4, 1), wilson(1 / 2, 1)]
    for label in ("prompt over long", "unanswered"):
        assert found[f"text questions: … {label}, of all answers"] == ["0.000", "0.500"]
    assert found["medqa: accuracy"] == found["text questions: accuracy"] and found[
        "mmmu: accuracy, by the benchmark's rule (official.py)"
    ] == [wilson(3 / 4, 2), "–"]
    # what no result has, has no row: nobody judged a text, and MedQA has no rule of its own
    assert not [
        label
        for label in found
        if label.startswith("text questions: chains") or label.startswith("medqa: accuracy,")
    ]


def test_table_of_one_benchmark_does_not_say_everything_twice():
    found = cells(tables.table([result_of("one", [by_hand("t", "medqa", False, "AABA")])]))
    assert all(label == "" or label.startswith("text questions: ") for label in found)


def test_table_says_accuracy_and_questions_of_every_modality(stages):
    found = cells(tables.table(stages))
    for modality in MODALITIES:
        asked = [one for one in stages[0]["entries"] if one["groups"].get("modality") == modality]
        label = f"image questions, {modality}"
        assert found[f"{label}: questions × samples"] == [f"{len(asked)} × 32"] * 3
        right = np.mean([one["right"] for one in asked])
        assert found[f"{label}: accuracy"][0] == wilson(right, len(asked))


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def paper_titles(number: int) -> list[str]:
    """The headers of the paper's columns."""
    parts = {"": "Overall", "delta": "Δ"}
    return [
        f"{tables.TITLES[name]} {parts.get(subset) or subset.split('=')[1]} (n = {n})"
        for name, subset, n in tables.TABLES[number][0]
    ]


def table_of(path: Path) -> dict[str, dict[str, str]]:
    """{row: {header: cell}} of a Markdown table, without the cells that have no value"""
    shown = cells(path.read_text())
    header = shown.pop("accuracy in %")
    assert len(set(header)) == len(header)
    rows = {name: dict(zip(header, row, strict=True)) for name, row in shown.items()}
    return {n: {key: cell for key, cell in row.items() if cell != "–"} for n, row in rows.items()}


@pytest.fixture(scope="module")
def printed(everything, tmp_path_factory) -> tuple[Path, list[Path], list[str]]:
    out = tmp_path_factory.mktemp("tables")
    return out, *tables.paper_tables(everything, out)


@pytest.mark.parametrize("number", [1, 2])
def test_our_rows_stand_under_the_papers_with_interval_and_questions(printed, everything, number):
    out, paths, _ = printed
    names = ["table1.csv", "table1.md", "table2.csv", "table2.md"]
    assert sorted(path.name for path in paths) == names and all(path.exists() for path in paths)
    shown, records = table_of(out / f"table{number}.md"), read_csv(out / f"table{number}.csv")
    ours = [name for name in shown if "(ours" in name]
    assert list(shown)[-len(ours) :] == ours
    assert len(ours) == 6 + (number == 1)  # GPT-4o was asked MedQA only, of which Table 2 has none
    assert ours[0] == "7B/base (ours, 32 samples a question)" and "32B/Stage-I (ours)" in ours
    for record in records:
        samples = record["samples"] not in ("", "1")
        told = f"ours, {record['samples']} samples a question" if samples else "ours"
        name = record["method"] + (f" ({told})" if record["by"] == "ours" else "")
        part = {"": "Overall", "delta": "Δ"}.get(record["subset"], record["subset"].split("=")[-1])
        title = f"{tables.TITLES[record['benchmark']]} {part} (n = "
        if record["by"] == "ours":
            cell = shown[name].pop(f"{title}{record['questions']})")
            found = re.search(r"\(([-+\d.]+) … ([-+\d.]+)\)", cell).groups()
            wanted = [float(record["low"]), float(record["high"])]
            assert list(map(float, found)) == pytest.approx(wanted, abs=0.051)
        else:  # in the paper's column, of whose questions a few of its rows are not
            (key,) = (key for key in paper_titles(number) if key.startswith(title))
            cell = shown[name].pop(key)
        assert cell.startswith(record["percent"])
    assert not any(shown.values())  # every cell is a record
    result = everything[2]
    figures_of = result["benchmarks"]["medxpertqa-mm"]["subsets"]["question_type=Reasoning"]
    record = next(
        r
        for r in records
        if (r["method"], r["subset"]) == ("7B/Stage-II", "question_type=Reasoning")
    )
    right = [
        one["right"]
        for one in result["entries"]
        if one["groups"].get("question_type") == "Reasoning"
    ]
    assert (
        float(record["percent"]) == pytest.approx(100 * np.mean(right), abs=0.00501)
        and int(record["questions"]) == len(right) == figures_of["questions"] == 72
    )
    gain = next(
        r
        for r in records
        if (r["method"], r["benchmark"], r["subset"]) == ("7B/Stage-II", "medxpertqa-mm", "delta")
    )
    means = [
        np.mean(
            [one["right"] for one in everything[i]["entries"] if one["source"] == "medxpertqa-mm"]
        )
        for i in (0, 2)
    ]
    assert float(gain["percent"]) == pytest.approx(
        100 * (means[1] - means[0]), abs=0.00501
    ) and float(gain["low"]) < float(gain["percent"]) < float(gain["high"])


def test_the_papers_cells_are_printed_as_they_are_with_their_notes(printed):
    out, _, _ = printed
    text = (out / "table1.md").read_text()
    shown = {name: row[:8] for name, row in cells(text).items()}
    assert shown.pop("accuracy in %") == paper_titles(1)
    papers = [name for name in shown if "(ours" not in name]
    assert len(papers) == 17 and {cell for n in papers for cell in cells(text)[n][8:]} == {"–"}
    assert shown["OpenAI-o1"] == [
        "52.78 [a]",
        "65.45 [a]",
        "56.28 [a]",
        "–",
        "60.00",
        "–",
        "41.96",
        "–",
    ]
    assert shown["GMAI-VL-R1 RLT"] == [
        "–",
        "–",
        "23.80",
        "+3.10",
        "57.33",
        "+2.00",
        "34.03 [c] [d]",
        "+5.56",
    ]
    assert shown["InternVL3.0-8B +Stage-II"] == [
        "25.93",
        "31.05",
        "27.35",
        "+5.50",
        "70.00",
        "+8.67",
        "48.95",
        "+12.24",
    ]
    for mark in "abcdef":
        assert f"* [{mark}] " in text
    assert "* [a] " not in (out / "table2.md").read_text()  # only the notes of its own cells
    assert (
        int(
            next(r for r in read_csv(out / "table1.csv") if r["method"] == "OpenAI-o1")["questions"]
        )
        == 144
    )


def test_only_the_papers_number_of_questions_stands_in_the_papers_column(tmp_path):
    counts = {"mmmu": 150, "mmmu-pro": 20}
    tables.paper_tables([result_of("7B/base", entries("base", 1, counts))], tmp_path)
    shown = cells((tmp_path / "table1.md").read_text())
    header, row = shown["accuracy in %"], shown["7B/base (ours)"]
    assert header == [*paper_titles(1), "MMMU-Pro-Health Overall (n = 20)"]
    assert [column for column, cell in enumerate(row) if cell != "–"] == [4, 8]


def test_columns_of_fewer_questions_stand_in_the_papers_order(stages, tmp_path):
    tables.paper_tables(stages, tmp_path)
    header = cells((tmp_path / "table1.md").read_text())["accuracy in %"]
    parts = {"Reasoning": 72, "Understanding": 24, "Overall": 96, "Δ": 96}
    assert header[8:12] == [f"MedXpertQA-MM {part} (n = {n})" for part, n in parts.items()]


def test_whatever_was_evaluated_has_a_column_beside_the_papers(tmp_path):
    counts = {"medbullets-op5": 8, "mmmu": 150, "exam of ours": 3}
    base, late = (made(f"7B/{stage}", 1, counts) for stage in ("base", "Stage-I"))
    vision = result_of("+ vision", entries("base", 1, {"mmmu-pro-vision": 4}))
    free = result_of("free", entries("both", 1, {"medbullets-op5": 8}))
    free["open_ended"] = "hf:grader"
    tables.paper_tables([base, late, vision, free], tmp_path)
    header = cells((tmp_path / "table1.md").read_text())["accuracy in %"]
    assert header == [
        *paper_titles(1),
        "Medbullets, 5 options Overall (n = 8)",
        "Medbullets, 5 options Δ (n = 8)",
        "exam of ours Overall (n = 3)",
        "exam of ours Δ (n = 3)",
        "MMMU-Pro-Health, vision Overall (n = 4)",
        "Medbullets, 5 options, open-ended Overall (n = 8)",
    ]
    shown = table_of(tmp_path / "table1.md")
    before, right = (
        sum(one["right"][0] for one in run["entries"] if one["source"] == "medbullets-op5")
        for run in (base, late)
    )
    row = shown["7B/Stage-I (ours)"]
    assert row["Medbullets, 5 options Overall (n = 8)"].startswith(f"{100 * right / 8:.2f} (")
    assert row["Medbullets, 5 options Δ (n = 8)"].startswith(f"{100 * (right - before) / 8:+.2f} (")
    assert list(row)[:2] == ["MMMU-Health Overall (n = 150)", "MMMU-Health Δ (n = 150)"]
    assert list(shown["+ vision (ours)"]) == ["MMMU-Pro-Health, vision Overall (n = 4)"]
    assert list(shown["free (ours)"]) == ["Medbullets, 5 options, open-ended Overall (n = 8)"]
    names = [row["method"] for row in read_csv(tmp_path / "table1.csv")]
    assert "'+ vision" in names and "+ vision" not in names  # a spreadsheet would run it


def test_a_gain_on_the_image_questions_of_a_benchmark_is_over_those(tmp_path):
    text, results = by_hand("t", "mmmu", False, "B"), []
    for name, choices in (("7B/base", "BB"), ("7B/Stage-I", "AB")):
        image = by_hand("p", "mmmu", True, choices)
        result = result_of(name, [image])
        result["benchmarks"] = {"mmmu, image": result["benchmarks"]["mmmu"]}
        results.append({**result, "entries": [image, text]})
    tables.paper_tables(results, tmp_path)
    row = table_of(tmp_path / "table1.md")["7B/Stage-I (ours, 2 samples a question)"]
    assert row["mmmu, image Δ (n = 1)"] == "+50.00 (+50.0 … +50.0)"


def test_under_a_table_stands_what_each_of_our_benchmarks_can_tell(tmp_path):
    counts = {"mmmu": 150, "mmmu-pro": 20}
    names = {"7B/base": "base", "7B/Stage-I": "Stage-I"}
    stages = [result_of(name, entries(stage, 1, counts)) for name, stage in names.items()]
    tables.paper_tables(stages, tmp_path)
    told = [line for line in (tmp_path / "table1.md").read_text().splitlines() if "detects" in line]
    ends = "paired at 30 % disagreement, at 80 % power"
    # by hand, as 1.96 sqrt(.25 / n), 2.80 sqrt(.5 / n) and 2.80 sqrt(.3 / n)
    assert told == [
        f"* Ours, MMMU-Health: 150 questions: ± 8.0 points; detects 16 between two runs, 13 {ends}",
        "* Ours, MMMU-Pro-Health: 20 questions: ± 21.9 points; detects 44 between two runs, "
        f"34 {ends}",
    ]


def test_what_a_result_lacks_for_the_tables_is_said(printed):
    _, _, left_out = printed
    assert (
        "Table 1: 32B/Stage-I lacks Δ on medxpertqa-mm (no SIZE/base on the same questions), mmmu, "
        "mmmu-pro"
    ) in left_out
    assert any(
        line.startswith("Table 2: GPT-4o lacks medxpertqa-mm medical_task=Treatment, ")
        for line in left_out
    )
    assert not [line for line in left_out if "7B/Stage-II" in line]


def test_no_gain_over_a_base_that_was_asked_other_questions(stages, tmp_path):
    other = made("7B/base", 2, {"medxpertqa-mm": 90})
    left_out = tables.paper_tables([other, stages[1]], tmp_path)[1]
    assert any("7B/Stage-I lacks Δ on medxpertqa-mm" in line for line in left_out)
    assert not [
        row
        for row in read_csv(tmp_path / "table1.csv")
        if row["by"] == "ours" and row["subset"] == "delta"
    ]


def test_no_gain_over_the_base_of_another_size_or_of_no_size(tmp_path):
    mm, more = {"medxpertqa-mm": 12}, tmp_path / "more"
    more.mkdir()
    results = [
        made("7B/base", 1, mm),
        made("base", 1, mm),
        made("32B/Stage-I", 1, mm),
        result_of("GPT-4o", entries("both", 1, mm)),
    ]
    tables.paper_tables(results, tmp_path)
    assert not [
        row
        for row in read_csv(tmp_path / "table1.csv")
        if row["by"] == "ours" and row["subset"] == "delta"
    ]
    tables.paper_tables([*results, made("32B/base", 1, mm)], more)
    ours = [row for row in read_csv(more / "table1.csv") if row["by"] == "ours"]
    assert [row["method"] for row in ours if row["subset"] == "delta"] == ["32B/Stage-I"]


def test_two_results_of_one_name_are_refused(stages, tmp_path):
    for make in (tables.paper_tables, figures.plot_paper):
        with pytest.raises(data.RowError, match="two results are called '7B/base'.*--name"):
            make([stages[0], *stages], tmp_path)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Pictures


def texts(path: Path) -> str:
    """All that a picture says."""
    return "\n".join(re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text()))


def test_every_picture_is_written_twice_and_is_not_empty(drawn):
    out, paths, _ = drawn
    names = ["figure4", "figure5-7B", "figure6", "figure6-7B"]
    assert (
        sorted(path.name for path in paths)
        == sorted(path.name for path in out.iterdir())
        == sorted(f"{name}.{kind}" for name in names for kind in ("png", "svg"))
    )
    for name in names:
        with Image.open(out / f"{name}.png") as picture:
            assert min(picture.size) > 250
            ink = (np.asarray(picture.convert("L")) < 250).mean()
        assert 0.005 < ink < 0.9
        assert "95 % interval" in texts(out / f"{name}.svg")


def test_figure_4_says_sizes_stages_and_numbers_of_the_paper_and_ours(drawn, everything):
    said = texts(drawn[0] / "figure4.svg").splitlines()
    assert {
        "7B",
        "32B",
        "72B",
        "ours –",
        "base",
        "Stage-I",
        "Stage-II",
        "paper, QwenVL2.5-72B",
    } <= set(said)
    for printed in (
        "20.70",
        "25.15",
        "26.55",
        "27.40",
        "32.05",
        "33.50",
        "28.35",
        "39.60",
        "40.45",
    ):  # Tables 1 and 2
        assert f"paper {printed}" in said
    assert "ours, 96 questions × 32 samples" in said and "ours, 40 questions × 1 samples" in said
    for result in everything[:3]:
        assert (
            f"ours {100 * result['benchmarks']['medxpertqa-mm']['figures']['accuracy'][0]:.2f}"
            in said
        )


def test_figure_4_has_a_panel_for_a_size_that_the_paper_has_not(tmp_path):
    figures.plot_paper(
        [made("3B/Stage-I", 2, {"medxpertqa-mm": 4}), made("8B/base", 1, {"medxpertqa-mm": 4})],
        tmp_path,
    )
    said = texts(tmp_path / "figure4.svg").splitlines()
    assert {"3B", "7B", "8B", "paper –", "paper, InternVL3.0-8B", "paper 21.85"} <= set(said)


def test_figure_5_says_strategies_benchmarks_and_questions(drawn, everything):
    said = texts(drawn[0] / "figure5-7B.svg").splitlines()
    for label in ("before Stage I", "text-only", "multimodal", "text and multimodal"):
        assert f"{label} (32 samples)" in said
    for label, count in (
        ("MedXpertQA-MM", 96),
        ("MMMU-Health", 30),
        ("MedQA", 24),
        ("Medbullets, 5 options", 24),
    ):
        assert label in said and f"n = {count}" in said
    assert f"{100 * everything[3]['benchmarks']['medqa']['figures']['accuracy'][0]:.1f}" in said


def test_figure_6_has_two_panels_a_benchmark_and_says_samples(drawn):
    said = texts(drawn[0] / "figure6-7B.svg").splitlines()
    for label, count in (("MedXpertQA-MM", 96), ("MMMU-Pro-Health", 40), ("MedQA", 24)):
        assert (
            f"{label} ({count} questions): majority vote, MV@n" in said
            and f"{label} ({count} questions): any of n right, pass@n" in said
        )
    assert said.count("7B/Stage-II (32 samples)") == 1 and said.count("n samples") == 2 * len(
        COUNTS
    )
    assert [n in said for n in ("1", "2", "4", "8", "16", "32", "64")] == [True] * 6 + [False]
    assert "GPT-4o (2 samples)" in texts(drawn[0] / "figure6.svg")


def shares(result: dict, source: str) -> list[list[float]]:
    """The accuracy of one benchmark by hand: [mean, low, high]."""
    rights = [one["right"] for one in result["entries"] if one["source"] == source]
    mean, z2, n = float(np.mean(rights)), 1.959963984540054**2, len(rights)
    half = (z2 * (mean * (1 - mean) / n + z2 / (4 * n * n))) ** 0.5
    return [
        mean,
        (mean + z2 / (2 * n) - half) / (1 + z2 / n),
        (mean + z2 / (2 * n) + half) / (1 + z2 / n),
    ]


def test_curves_and_bands_are_those_of_the_samples(stages):
    axes = figures.curves(stages, []).axes
    rights = [
        [one["right"] for one in result["entries"] if one["source"] == "medxpertqa-mm"]
        for result in stages
    ]
    for line, right in zip(axes[1].lines, rights):  # pass@n of the first benchmark
        assert list(line.get_xdata()) == [1, 2, 4, 8, 16, 32]
        assert line.get_ydata()[0] == pytest.approx(np.mean(right)) and line.get_ydata()[
            -1
        ] == pytest.approx(np.mean([any(row) for row in right]))
    for line, result, band in zip(axes[0].lines, stages, axes[0].collections):
        votes = []
        for one in (one for one in result["entries"] if one["source"] == "medxpertqa-mm"):
            readable = [choice for choice in one["choices"] if choice]
            votes.append(
                min(readable, key=lambda choice: (-readable.count(choice), readable.index(choice)))
                == "A"
            )
        assert line.get_ydata()[0] == pytest.approx(
            shares(result, "medxpertqa-mm")[0]
        ) and line.get_ydata()[-1] == pytest.approx(np.mean(votes))
        edge = band.get_paths()[0].vertices
        assert sorted({round(y, 9) for x, y in edge if x == 1}) == pytest.approx(
            shares(result, "medxpertqa-mm")[1:]
        )
    assert (
        len(axes[0].lines) == 3
        and len({(line.get_linestyle(), line.get_marker()) for line in axes[0].lines}) == 3
    )  # without colour too


def test_bars_and_their_arms_are_those_of_the_samples(everything):
    members = [
        result
        for result in everything
        if result["name"] in ("7B/Stage-I", "7B/multimodal", "7B/both")
    ]
    ax = figures.strategies("7B", members, []).axes[0]
    bars = [container for container in ax.containers if hasattr(container, "patches")]
    for container, result in zip(bars, members):
        sources = [
            source
            for source in ("medxpertqa-mm", "mmmu", "medqa", "medbullets-op4", "medbullets-op5")
            if source in result["benchmarks"]
        ]
        expected = [shares(result, source) for source in sources]
        assert [bar.get_height() for bar in container.patches] == pytest.approx(
            [100 * mean for mean, _, _ in expected]
        )
        ends = container.errorbar.lines[2][0].get_segments()
        assert [[low, high] for (_, low), (_, high) in ends] == [
            pytest.approx([100 * low, 100 * high]) for _, low, high in expected
        ]
    assert len({container.patches[0].get_hatch() for container in bars}) == 3
    places = sorted(bar.get_x() for container in bars for bar in container.patches)
    assert all(
        b - a > bars[0].patches[0].get_width() for a, b in zip(places, places[1:])
    )  # none over another


@pytest.mark.parametrize(
    "line",
    [
        "Figures 4, 6: 7B/both is an ablation, for Figure 5 only",
        "Figure 4: GPT-4o is not named SIZE/STAGE with a stage of base, Stage-I, Stage-II",
        "Figure 5: 7B/both has no medqa",
        "Figure 6: 32B/Stage-I has one sample a question of medxpertqa-mm; evaluate with -n 32",
    ],
)
def test_who_is_left_out_of_what_is_said(drawn, line):
    assert line in drawn[2]


def test_a_size_without_ablations_has_no_figure_5_and_that_is_said(drawn):
    assert [
        line
        for line in drawn[2]
        if line.startswith("Figure 5: needs") and "32B/Stage-I do not make it" in line
    ]


def test_more_results_than_can_be_told_apart_are_not_drawn_over_each_other(tmp_path):
    results = [result_of(name, entries("base", 2, {"medqa": 4})) for name in "uvwxyz"]
    paths, left_out = figures.plot_paper(results, tmp_path)
    assert paths == [] and [
        line
        for line in left_out
        if "6 results of one size" in line and "5 can be told apart" in line
    ]


def test_the_same_results_give_the_same_files(stages, tmp_path):
    results = [
        {**result, "benchmarks": {"mmmu": result["benchmarks"]["mmmu"]}} for result in stages
    ]
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        figures.plot_paper(results, tmp_path / name)
    assert [path.read_bytes() for path in sorted((tmp_path / "first").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "second").iterdir())
    ]


# --------------------------------------------------------------------------------------------------
# The sheets of the demo


def test_report_has_six_panels_and_the_figures_of_every_stage(stages, tmp_path):
    sft = [
        {"step": k, "think": 2 / (k + 1), "answer": 1 / (k + 1), "tag": 0.1 / (k + 1)}
        for k in range(20)
    ]
    dpo = [
        {"step": k, "loss": 0.69 - 0.02 * k, "margin": 0.1 * k, "accuracy": 0.5 + 0.02 * k}
        for k in range(20)
    ]
    unjudged = result_of("unjudged", [by_hand("p", "mmmu", True, "AAB-")])
    text_only = result_of("text only", [by_hand("t", "medqa", False, "AABA")])
    figures.plot_report([*stages, unjudged, text_only], sft, dpo, tmp_path / "report.svg")
    said = texts(tmp_path / "report.svg").splitlines()
    for result in stages:
        for kind in ("image", "text"):
            assert f"{result['groups'][kind]['accuracy'][0]:.2f}" in said
        image = result["groups"]["image"]
        assert (
            f"{image['hallucinated']:.2f}" in said
            and f"{image['judged_looking']} chains" in said
            and said.count(result["name"]) == 4
        )  # ticks, legends
    assert {
        "Stage I: loss per token of each span",
        "reward margin",
        "think",
        "all four",
        "unjudged",
    } <= set(said) and "text only" not in said
    figures.plot_report(stages, sft, dpo, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.size == (1650, 935)


def test_films_show_one_pair_a_question_and_nothing_without_images(tmp_path):
    Image.new("L", (56, 56), 90).save(tmp_path / "film.png")
    pair = {
        "prompt": [{"content": "system"}, {"content": "What costs $5 and $6?"}],
        "chosen": "<think> right",
        "rejected": "<think> wrong",
        "images": ["film.png"],
    }
    pairs = [{**pair, "id": str(i // 2), "failed": [CRITERIA[i % 4]]} for i in range(8)]
    figures.plot_films(
        [{**pair, "id": "text", "images": [], "failed": [CRITERIA[0]]}],
        tmp_path,
        tmp_path / "none.png",
    )
    assert not (tmp_path / "none.png").exists()
    figures.plot_films(pairs, tmp_path, tmp_path / "films.svg")
    said = texts(tmp_path / "films.svg")
    assert (
        said.count("chosen: meets all four") == 4
        and said.count("rejected: fails") == 4
        and "What costs $5 and $6?" in said
    )
    figures.plot_films(pairs, tmp_path, tmp_path / "films.png")
    with Image.open(tmp_path / "films.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert (pixels == 90).all(2).sum() > 4 * 100 * 100  # four grey films, as grey as they are


def test_a_long_chain_is_shown_whole_in_a_row_of_its_own_height(tmp_path):
    Image.new("RGB", (56, 56), "#446688").save(tmp_path / "film.png")
    chain = " ".join(f"word{i}" for i in range(600))
    pair = {
        "prompt": [{"content": "Which?"}],
        "chosen": chain,
        "rejected": "short",
        "images": ["film.png"],
        "failed": [CRITERIA[0]],
    }
    figures.plot_films(
        [{**pair, "id": "p"}, {**pair, "id": "q", "chosen": "brief"}],
        tmp_path,
        tmp_path / "films.svg",
    )
    picture = (tmp_path / "films.svg").read_text()
    assert "word0 " in texts(tmp_path / "films.svg") and "word599" in texts(tmp_path / "films.svg")

    def height(word: str) -> float:
        """Where the line with this word stands in the picture, in points from above."""
        line = next(
            line
            for line in picture.splitlines()
            if "<text" in line and re.search(rf"\b{word}\b", line)
        )
        return float(
            re.search(
                r" y=\"([\d.]+)\"|translate\([\d.]+ ([\d.]+)\)|rotate\(\S+ [\d.]+ ([\d.]+)\)", line
            )[0]
            .strip(' y="()')
            .split()[-1]
        )

    assert (
        0 < height("word0") < height("word599") < height("brief")
    )  # the next row begins below the end of the long chain


def test_a_picture_too_high_to_draw_is_drawn_with_fewer_dots(tmp_path):
    figure, _ = figures.canvas(1, 1, 2, 700)
    figures.save(figure, tmp_path / "high.png")
    with Image.open(tmp_path / "high.png") as picture:
        assert picture.size[0] == round(2 * 60000 / 700) and 59900 < picture.size[1] <= 60000
