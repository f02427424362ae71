"""The page of single cases: what is selected, by hand; what a model wrote stays text; what a
browser makes of it."""

import base64
import hashlib
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import judge
import report.__main__
from answers import is_correct
from command import schema
from report import cases, score

RIGHT, WRONG = (
    "<think> It is broken. </think> <answer> A </answer>",
    "<think> Whole. </think> <answer> B </answer>",
)
UNREADABLE, CUT = "<think> Whole. </think> <answer> both </answer>", "<think> Let me see whether it"
EVIL = (
    "</div></style><script>console.error('ran')</script>"
    "<img src=http://x.test/a onerror=console.error('ran')> \"quoted' & &lt;b&gt;"
)


def question(key: str, **changed) -> data.Question:
    row = {
        "id": key,
        "question": f"Is {key} broken?",
        "options": {"A": "yes", "B": "no"},
        "answer": "A",
        "images": [],
    }
    return schema.question_from(row | changed, "test")


def make_run(
    folder: Path,
    name: str,
    answers: dict,
    questions: list[data.Question],
    judged: dict | None = None,
    engine: str = "hf:m",
) -> cases.Run:
    """A run's folder as evaluate.py leaves it. answers: of each question, (response, finish_reason)
    of each sample."""
    by_id, rows = {found.id: found for found in questions}, []
    for key, samples in answers.items():
        for k, (response, ended) in enumerate(samples):
            read, right = (
                (
                    score.choice_of({"response": response, "finish_reason": "stop"}, by_id[key]),
                    is_correct(response, by_id[key]),
                )
                if ended == "stop"
                else (None, False)
            )
            row = {
                "id": key,
                "sample": k,
                "engine": engine,
                "response": response,
                "token_ids": [1],
                "finish_reason": ended,
                "seed": 70 + k,
            }
            digest = hashlib.sha256(json.dumps(response, ensure_ascii=False).encode()).hexdigest()
            row["response_sha"] = digest[:16]
            rows.append(row | {"extracted": read, "correct": right})
    sha = {(row["id"], row["sample"]): row["response_sha"] for row in rows}
    data.write_jsonl(folder / "predictions.jsonl", rows)
    if judged:
        verdicts = [
            {"id": id, "sample": k, "response_sha": sha[id, k], "verdict_sha": "v", **given}
            for (id, k), given in judged.items()
        ]
        data.write_jsonl(folder / "verdicts.jsonl", verdicts)
    criteria = {key: given["criteria"] for key, given in (judged or {}).items()}
    entries = [
        score.entry(by_id[key], [row for row in rows if row["id"] == key], criteria)
        for key in answers
    ]
    figures: dict = {"groups": {}, "benchmarks": {}, "subsets": {}}  # none is read
    data.write_json(folder / "results.json", {"name": name, "entries": entries, **figures})
    return cases.read_run(folder)


class Page(html.parser.HTMLParser):
    """A page as a browser's parser meets it: every tag with its attributes, every text with the
    classes it stands in."""

    VOID = {"meta", "img", "hr", "br", "link", "input"}

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.open: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("class") or ""))
            if tag == "div" and attributes.get("class") == "chain":
                self.texts.append((("new chain",), ""))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, text):
        self.texts.append((tuple(f"{tag}.{name}" for tag, name in self.open), text))

    def chains(self) -> list[str]:
        """The whole text of each chain, the legend's left out."""
        found = []
        for where, text in self.texts:
            if where == ("new chain",):
                found.append("")
            elif "div.chain" in where:
                found[-1] += text
        return found[1:]

    def text(self, inside: str = "body.") -> str:
        return "".join(text for where, text in self.texts if inside in where)


def write(tmp_path: Path, runs, questions, only="", count=20) -> tuple[int, Page]:
    """A new page, after the one before it was moved away."""
    (tmp_path / "cases.html").unlink(missing_ok=True)
    shown = cases.write_page(runs, questions, tmp_path, only, count, tmp_path / "cases.html")
    return shown, Page(tmp_path / "cases.html")


# --------------------------------------------------------------------------------------------------
# Which cases

# sample 0 -> which of right, wrong, unreadable, cut, unanswered it meets
TRUTH = [
    ((RIGHT, "stop"), "right"), ((WRONG, "stop"), "wrong"),
    ((UNREADABLE, "stop"), "wrong unreadable"), ((CUT, "length"), "wrong cut"),
    (("", "blocked"), "wrong unanswered"), (("", "overlong"), "wrong unanswered"),
    ((RIGHT, "length"), "wrong cut"), (("", "stop"), "wrong unreadable"),
]  # fmt: skip


@pytest.mark.parametrize("wanted", ["right", "wrong", "unreadable", "cut", "unanswered"])
def test_each_condition_takes_the_questions_of_the_truth_table_in_their_order(tmp_path, wanted):
    questions = [question(f"q{i}") for i in reversed(range(len(TRUTH)))]
    run = make_run(
        tmp_path / "a",
        "stage-1",
        {f"q{i}": [answer, (RIGHT, "stop")] for i, (answer, _) in enumerate(TRUTH)},
        questions,
    )
    expected = [i for i in reversed(range(len(TRUTH))) if wanted in TRUTH[i][1].split()]
    shown, page = write(tmp_path, [run], questions, f"stage-1-{wanted}")
    assert shown == len(expected)
    assert [text for where, text in page.texts if "p.stem" in where] == [
        f"Is q{i} broken?" for i in expected
    ]


def test_all_conditions_must_hold_and_the_header_counts_the_whole_selection(tmp_path):
    questions = [question(f"q{i}") for i in range(16)]
    one = make_run(
        tmp_path / "a",
        "stage1",
        {f"q{i}": [(RIGHT if i & 1 else WRONG, "stop")] for i in range(16)},
        questions,
    )
    two = make_run(
        tmp_path / "b",
        "stage2",
        {f"q{i}": [(RIGHT if i & 2 else WRONG, "stop")] for i in range(14)},
        questions,
    )
    shown, page = write(tmp_path, [one, two], questions, " stage1-wrong , stage2-right,", 2)
    assert (
        shown == 2
        and "Is q2 broken?" in page.text("p.stem")
        and "Is q6 broken?" in page.text("p.stem")
    )  # 2, 6, 10; q14 was not put to stage2
    assert (
        "stage1-wrong and stage2-right: 3 of the 14 questions put to every run. The first 2 of them"
        in page.text("header.")
    )
    assert "stage1: 7 ✓ right, 7 ✗ wrong" in page.text(
        "header."
    ) and "stage2: 6 ✓ right, 8 ✗ wrong" in page.text("header.")
    shown, page = write(tmp_path, [one, two], questions)
    assert (
        shown == 14
        and "every question: 14 of the 14 questions put to every run. All of them"
        in page.text("header.")
    )


def test_names_may_hold_dashes_and_words_that_conditions_are_made_of():
    runs = [cases.Run(name, Path(), {}) for name in ("a", "a-right", "+ Stage I")]
    assert cases.parse_only("a-right,a-right-right,a-right-wrong,+ Stage I-cut", runs) == [
        ("a", "right"), ("a-right", "right"), ("a-right", "wrong"), ("+ Stage I", "cut"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["stage3-wrong", "stage1-bad", "stage1", "-wrong", "stage1-cut-majority", "stage1 -wrong"],
)
def test_what_is_no_condition_is_refused_with_what_there_is(text):
    runs = [cases.Run("stage1", Path(), {}), cases.Run("stage2", Path(), {})]
    with pytest.raises(
        data.RowError, match=r"'stage1', 'stage2'.*'right', 'wrong', 'unreadable', 'cut'"
    ):
        cases.parse_only(text, runs)


def test_no_case_is_an_error_that_counts_each_condition(tmp_path):
    questions = [question("q0"), question("q1")]
    run = make_run(
        tmp_path / "a", "m", {"q0": [(RIGHT, "stop")], "q1": [(WRONG, "stop")]}, questions
    )
    with pytest.raises(data.RowError, match="of 2 questions, each alone: m-right 1, m-wrong 1"):
        write(tmp_path, [run], questions, "m-right,m-wrong")
    with pytest.raises(
        data.RowError, match=r"none of the 1 questions was put to every run \(m has 2\)"
    ):
        write(tmp_path, [run], [question("q7")])
    with pytest.raises(data.RowError, match="two results are called 'm'"):
        write(tmp_path, [run, run], questions)
    assert not (tmp_path / "cases.html").exists()


# --------------------------------------------------------------------------------------------------
# What is on the page


@given(
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<answer>", "</answer>", "<b>", "&amp;", '"', " ", "\n", "x y"]
        ),
        max_size=12,
    ).map("".join)
)
@settings(max_examples=200, deadline=None)
def test_a_chain_keeps_every_character_and_marks_each_as_label_spans_does(response):
    labels = data.label_spans(response, range(len(response)))
    found = [(character, kind) for kind, text in cases.spans_of(response) for character in text]
    assert "".join(character for character, _ in found) == response
    for (character, kind), label in zip(found, labels):
        assert kind == {data.THINK: "think", data.ANSWER: "answer"}.get(label, kind) and (
            label != data.TAG or kind in ("tag", "outside")
        )


def test_text_outside_any_block_is_told_from_tags():
    assert cases.spans_of("So: <think> a </think>\n<answer> A </answer> Good luck") == [
        ("outside", "So: "), ("tag", "<think>"), ("think", " a "), ("tag", "</think>"),
        ("tag", "\n"), ("tag", "<answer>"), ("answer", " A "), ("tag", "</answer>"),
        ("outside", " Good luck"),
    ]  # fmt: skip
    assert cases.spans_of("") == []


@pytest.fixture
def hostile(tmp_path):
    """Hostile text wherever text can be: (runs, questions), two image questions, one without
    images, one open-ended."""
    name = "films/<script>x&'\".png"
    (tmp_path / "films").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)).save(
        tmp_path / name
    )
    Image.new("L", (2000, 1000), 90).save(tmp_path / "films" / "large.png")
    options = {"A": EVIL, "B": f"{EVIL} no"}
    questions = [
        question(
            "q0",
            question=EVIL,
            options=options,
            images=[name, "films/large.png"],
            source=EVIL,
            meta={EVIL: EVIL, "n": 3},
        ),
        question("q1", question="x" * 5000, images=[name]),
        question("q2"),
        question(EVIL, options={}, answer=EVIL),
    ]
    chains = [
        EVIL,
        f"{EVIL} <think> {EVIL} </think> <answer> {EVIL} </answer> {EVIL}",
        "<think> " + "y" * 5000,
        "a\n\n   b\tc",
        "\u202eolleh \u0000 مرحبا",
    ]
    answers = {found.id: [(chain, "stop") for chain in chains] for found in questions}
    answers["q2"][0] = (RIGHT, "stop")
    met = dict(zip(judge.KEYS, (True, True, False, True, False)))
    judged = {
        ("q0", 0): {"criteria": met, "error": None},
        ("q0", 1): {"criteria": None, "error": EVIL},
    }
    return [
        make_run(tmp_path / "a", EVIL, answers, questions, judged, EVIL),
        make_run(tmp_path / "b<i>", "b-2", answers, questions),
    ], questions


def test_runs_without_options_are_shown_with_the_reference_text(tmp_path):
    asked = data.Question("What is it?", {"A": "a stone", "B": "a cyst"}, "A", id="q")
    runs = [
        make_run(
            tmp_path / "a",
            "a",
            {"q": [("<think> x </think> <answer> a stone </answer>", "stop")]},
            [asked.opened()],
        )
    ]
    runs[0].open_ended = True
    assert cases.write_page(runs, [asked], tmp_path, "a-right", 5, tmp_path / "page.html") == 1
    page = (tmp_path / "page.html").read_text()
    assert "a stone <small>✓ reference answer" in page and "a cyst" not in page
    with pytest.raises(data.RowError, match="with another reference or other options"):
        cases.write_page(
            [
                runs[0],
                make_run(tmp_path / "b", "b", {"q": [("<answer> A </answer>", "stop")]}, [asked]),
            ],
            [asked],
            tmp_path,
            "",
            5,
            tmp_path / "page.html",
        )


def test_hostile_text_stays_text_and_nothing_is_loaded(tmp_path, hostile):
    runs, questions = hostile
    shown, page = write(tmp_path, runs, questions)
    assert shown == 4
    ours = (
        "html head meta title style body header main nav article section h1 h2 h3 p ul li strong "
        "small em a div span figure figcaption img details summary hr"
    )
    assert {tag for tag, _ in page.tags} <= set(ours.split())
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        if "src" in attributes:
            assert (
                tag == "img" and attributes["src"].startswith("data:image/") and attributes["alt"]
            )
        if "href" in attributes:
            assert attributes["href"].startswith("#case-")
    style = page.text("style.")
    assert "url(" not in style and "@import" not in style and "http" not in style
    rows = [
        json.loads(line)
        for run in runs
        for line in (run.folder / "predictions.jsonl").read_text().splitlines()
    ]
    assert sorted(page.chains()) == sorted(row["response"] for row in rows)
    text = page.text()
    assert (
        text.count(EVIL) > 40
        and questions[0].images[0] in text
        and f"reference answer: {EVIL}" not in text
    )
    assert (
        page.text("title.") == "Cases: every question"
        and f"chosen by {EVIL}, b-2" in text
        and f" · {EVIL}" in page.text("section.")
    )
    _, page = write(
        tmp_path, runs, questions, f"{EVIL}-right"
    )  # an option's whole text is an answer, and a whole reply an open one
    assert page.text(
        "title."
    ) == f"Cases: {EVIL}-right" and f"{EVIL}-right: 3 of the 4 questions" in page.text("header.")


def test_a_case_shows_what_an_auditor_needs(tmp_path):
    questions = [
        question("q0", meta={"shown": {"x": {"images": []}}, "modality": "x-ray"}, source="bank"),
        question("q1", options={}, answer="A broken arm"),
    ]
    met = {
        "Answer_Correctness": True,
        "Logical_Consistency": True,
        "Image_Analysis_Involvement": False,
        "No_Hallucination": True,
        "Reflection_Presence": False,
    }
    judged = {
        ("q0", 0): {"criteria": met, "error": None},
        ("q0", 1): {"criteria": None, "error": "no JSON"},
    }
    answers = {
        "q0": [
            (WRONG, "stop"),
            (RIGHT, "stop"),
            (RIGHT, "stop"),
            (UNREADABLE, "stop"),
            (CUT, "length"),
        ]
    }
    answers["q1"] = [("<answer> a  Broken arm. </answer>", "stop")]
    runs = [
        make_run(tmp_path / "a", "judged", answers, questions, judged),
        make_run(tmp_path / "b", "other", answers, questions),
    ]
    _, page = write(tmp_path, runs, questions)
    sections = (tmp_path / "cases.html").read_text().split("<section>")
    first = html.unescape(sections[1])
    assert (
        ">✗ wrong</strong>, read: (B) no" in first and ">✓ right</strong>, read: (A) yes" in first
    )
    assert (
        ">? unreadable (wrong)</strong>, read: nothing" in first
        and ">✂ cut off (wrong)</strong>, read: nothing" in first
    )
    assert (
        "✓ Logical Consistency: yes" in first
        and "✗ Image Analysis Involvement: no" in first
        and "✗ Reflection Presence: no" in first
    )
    assert (
        first.count('class="criteria"') == 1
        and "no verdict: no JSON" in first
        and "criteria" not in sections[2]
    )
    assert (
        "all 5 samples: 2 ✓ right, 1 ✗ wrong, 1 ? unreadable (wrong), 1 ✂ cut off (wrong); "
        "majority right"
    ) in first
    assert "sample 4 · seed 74 · ended: length · response " in first and "hf:m" in first
    assert ">✓ right</strong>, read: A broken arm" in sections[3]  # open-ended, by its words
    items = [text for where, text in page.texts if "li.option reference" in where]
    assert (
        "".join(items)
        == "(A) yes ✓ reference answerA broken arm ✓ reference answer · chosen by judged, other"
    )
    assert "(B) no chosen by judged, other" in page.text("li.option")
    assert "id q0 · bank · modality: x-ray" in page.text("p.facts")  # without meta.shown


def test_a_benchmarks_own_rule_is_shown_beside_ours(tmp_path):
    questions = [question("q0")]
    run = make_run(tmp_path / "a", "m", {"q0": [(UNREADABLE, "stop"), (WRONG, "stop")]}, questions)
    run.entries["q0"]["official"] = {"choices": ["A", None], "right": [True, False]}
    _, page = write(tmp_path, [run], questions)
    assert (
        "read: nothing; by the benchmark's own rule A, right" in page.text()
        and "read: (B) no; by the benchmark's own rule nothing, wrong" in page.text()
    )


def test_thirty_two_samples_are_all_there_with_all_but_the_first_folded(tmp_path):
    questions = [question("q0")]
    chains = [
        f"<think> chain number {k} </think> <answer> {'AB'[k % 2]} </answer>" for k in range(32)
    ]
    rows = {"q0": [(chain, "stop") for chain in chains]}
    run = make_run(tmp_path / "a", "m", rows, questions)
    lines = (tmp_path / "a" / "predictions.jsonl").read_text().splitlines()
    (tmp_path / "a" / "predictions.jsonl").write_text(
        "\n".join(reversed(lines)) + "\n"
    )  # rows come in any order
    with pytest.raises(data.RowError, match="not the answers that results.json counts"):
        write(
            tmp_path,
            [
                make_run(tmp_path / "b", "n", {"q0": rows["q0"][:31]}, questions),
                cases.Run("m", tmp_path / "b", run.entries),
            ],
            questions,
        )
    _, page = write(tmp_path, [run], questions)
    assert page.chains() == chains
    assert "chain number 0 " not in page.text("details.") and "chain number 31 " in page.text(
        "details."
    )
    assert "all 32 samples: 16 ✓ right, 16 ✗ wrong; majority right" in page.text(
        "summary."
    )  # of tied answers, the earliest sampled


def test_images_are_in_the_page_and_no_larger_than_they_may_be(tmp_path, hostile):
    runs, questions = hostile
    _, page = write(tmp_path, runs, questions)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    opened = [
        Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",", 1)[1])))
        for attributes in images
    ]
    assert [(image.format, image.size) for image in opened] == [
        ("PNG", (56, 56)),
        ("JPEG", (900, 450)),
        ("PNG", (56, 56)),
    ]
    assert np.array_equal(
        np.asarray(opened[0]), np.asarray(Image.open(tmp_path / questions[0].images[0]))
    )  # a small one is kept exactly
    assert [(image["width"], image["height"]) for image in images] == [
        ("224", "224"),
        ("900", "450"),
        ("224", "224"),
    ]
    assert [image["alt"] for image in images] == [
        "image 1 of 2 of case 1",
        "image 2 of 2 of case 1",
        "image 1 of 1 of case 2",
    ]


def test_a_missing_or_unreadable_image_is_named_and_no_page_is_written(tmp_path):
    questions = [question("q0", images=["films/7.png"])]
    run = make_run(tmp_path / "a", "m", {"q0": [(RIGHT, "stop")]}, questions)
    with pytest.raises(data.RowError, match="q0: image films/7.png is not below .*check --images"):
        write(tmp_path, [run], questions)
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "7.png").write_text("no image")
    with pytest.raises(data.RowError, match="7.png: not a readable image"):
        write(tmp_path, [run], questions)
    assert not list(tmp_path.glob("cases.html*"))


def test_the_same_runs_make_the_same_page(tmp_path, hostile):
    write(tmp_path, *hostile)
    before = (tmp_path / "cases.html").read_bytes()
    cases.write_page(*hostile, tmp_path, "", 20, tmp_path / "cases.html")  # over itself
    assert (tmp_path / "cases.html").read_bytes() == before
    write(tmp_path, *hostile)
    assert (tmp_path / "cases.html").read_bytes() == before


def test_line_ends_of_every_kind_are_kept_and_the_same_page_is_no_other(tmp_path):
    chain = "<think> one\r\ntwo\rthree\n </think> <answer> A </answer>"
    questions = [question("q0")]
    run = make_run(tmp_path / "a", "m", {"q0": [(chain, "stop")]}, questions)
    _, page = write(tmp_path, [run], questions)
    assert page.chains() == [chain] and b"\r" not in (tmp_path / "cases.html").read_bytes()
    assert cases.write_page([run], questions, tmp_path, "", 20, tmp_path / "cases.html") == 1


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path):
    questions = [question("q0")]
    run = make_run(tmp_path / "a", "m", {"q0": [(RIGHT, "stop")]}, questions)
    _, page = write(tmp_path, [run], [replace(questions[0], question="half \ud83d pair")])
    assert "half" in page.text("p.stem")
    folder = tmp_path / os.fsdecode(b"\xff-latin")  # a name that is not UTF-8
    run = make_run(folder, "m", {"q0": [(RIGHT, "stop")]}, questions)
    assert "-latin" in write(tmp_path, [run], questions)[1].text("header.")


@pytest.mark.parametrize("line", [1, 3])
def test_half_a_surrogate_pair_in_a_file_is_named_by_its_line(tmp_path, line):
    questions = [question(f"q{i}") for i in range(3)]
    answers = {found.id: [(RIGHT, "stop")] for found in questions}
    run = make_run(tmp_path / "a", "m", answers, questions)
    path = tmp_path / "a" / "predictions.jsonl"
    lines = path.read_text().splitlines()
    lines[line - 1] = lines[line - 1].replace("It is broken", "half \\ud83d pair")
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(data.RowError, match=rf"predictions\.jsonl:{line}: holds half a surrogate"):
        write(tmp_path, [run], questions)


# what --out may not name
TAKEN = (
    "a/results.json",
    "a/predictions.jsonl",
    "a/verdicts.jsonl",
    "test.jsonl",
    "films/7.png",
    "a/../test.jsonl",
    "a",
    "older.html",
)


@pytest.mark.parametrize("name", TAKEN)
def test_a_page_is_never_written_over_something_else(tmp_path, name):
    questions = [question("q0", images=["films/7.png"])]
    (tmp_path / "films").mkdir()
    Image.new("L", (28, 28), 90).save(tmp_path / "films" / "7.png")
    judged = {("q0", 0): {"criteria": None, "error": "x"}}
    make_run(tmp_path / "a", "m", {"q0": [(RIGHT, "stop")]}, questions, judged)
    data.write_jsonl(tmp_path / "test.jsonl", [found.to_row() for found in questions])
    (tmp_path / "older.html").write_text("a page of last week")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    files = ["--questions", str(tmp_path / "test.jsonl"), "--images", str(tmp_path)]
    command = ["cases", str(tmp_path / "a"), *files]
    with pytest.raises(
        data.RowError, match=re.escape(name) + ".*" + "is there already, with another content"
    ):
        report.__main__.main([*command, "--out", str(tmp_path / name)])
    now = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert now == before
    report.__main__.main(
        [*command, "--out", str(tmp_path / "new.html")]
    )  # so it was for --out alone


# --------------------------------------------------------------------------------------------------
# Files that do not belong together


def test_a_folder_without_entries_is_refused(tmp_path):
    with pytest.raises(data.RowError, match=r"results.json: no such file.*evaluate.py writes"):
        cases.read_run(tmp_path)
    data.write_json(
        tmp_path / "results.json",
        {"name": "m", **dict.fromkeys(("groups", "benchmarks", "subsets"), {})},
    )
    with pytest.raises(data.RowError, match="results.json: missing 'entries'"):
        cases.read_run(tmp_path)


def test_verdicts_on_another_text_and_changed_questions_are_refused(tmp_path):
    questions = [question("q0")]
    run = make_run(
        tmp_path / "a",
        "m",
        {"q0": [(RIGHT, "stop")]},
        questions,
        {("q0", 0): {"criteria": None, "error": "x"}},
    )
    with pytest.raises(data.RowError, match="question q0: was put with another reference"):
        write(tmp_path, [run], [question("q0", answer="B")])
    with pytest.raises(data.RowError, match="or other options"):
        three = [question("q0", options={"A": "yes", "B": "no", "C": "perhaps"})]
        said = {"q0": [("<think> Hm. </think> <answer> C </answer>", "stop")]}
        write(tmp_path, [make_run(tmp_path / "b", "m", said, three)], questions)
    lines = (tmp_path / "a" / "predictions.jsonl").read_text()
    for name in ("engine", "seed", "correct"):
        row = {key: value for key, value in json.loads(lines).items() if key != name}
        data.write_jsonl(tmp_path / "a" / "predictions.jsonl", [row])
        where = r"predictions\.jsonl: sample 0 of question q0"
        with pytest.raises(data.RowError, match=f"{where}: missing '{name}'"):
            write(tmp_path, [run], questions)
    (tmp_path / "a" / "predictions.jsonl").write_text("\n" + lines)  # an empty line is no row
    verdicts = tmp_path / "a" / "verdicts.jsonl"
    data.write_jsonl(verdicts, [json.loads(verdicts.read_text()) | {"response_sha": "0" * 16}])
    told = r"predictions\.jsonl: sample 0 of question q0: its verdict is on another text"
    with pytest.raises(data.RowError, match=told):
        write(tmp_path, [run], questions)


# --------------------------------------------------------------------------------------------------
# In a browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Browser:
    """Headless Chromium, spoken to over a pair of pipes in its DevTools protocol: messages of JSON
    that end in a zero byte."""

    def __init__(self, profile: Path):
        (theirs_in, self.to), (self.back, theirs_out) = os.pipe(), os.pipe()
        flags = [
            "--headless",
            "--no-sandbox",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "--hide-scrollbars",
        ]
        shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, CHROMIUM, *flags],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in), os.close(theirs_out)
        self.buffer, self.count, self.events = b"", 0, []
        target = self.request("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self.request("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
        }
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.request(f"{domain}.enable", **self.session)

    def message(self) -> dict:
        while b"\0" not in self.buffer:
            part = os.read(self.back, 1 << 20)
            assert part, "the browser has ended"
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(line)

    def request(self, method: str, sessionId: str | None = None, **params) -> dict:
        self.count += 1
        sent = {"id": self.count, "method": method, "params": params} | (
            {"sessionId": sessionId} if sessionId else {}
        )
        os.write(self.to, json.dumps(sent).encode() + b"\0")
        while (got := self.message()).get("id") != self.count:
            self.events.append(got)
        assert "error" not in got, got
        return got["result"]

    def show(self, url: str, width: int, height: int, scheme: str) -> None:
        self.events = []
        self.request(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
            **self.session,
        )
        self.request(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
            **self.session,
        )
        self.request("Page.navigate", url=url, **self.session)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.message())

    def value(self, expression: str):
        return self.request(
            "Runtime.evaluate", expression=expression, returnByValue=True, **self.session
        )["result"].get("value")

    def picture(self) -> np.ndarray:
        shot = self.request("Page.captureScreenshot", **self.session)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("L"))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to), os.close(self.back)


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path"
)
def test_a_browser_shows_the_page_and_neither_complains_nor_loads_anything(tmp_path, hostile):
    write(tmp_path, *hostile)
    url = (tmp_path / "cases.html").as_uri()
    browser = Browser(tmp_path / "profile")
    try:
        for width, height, scheme in ((1400, 900, "light"), (420, 900, "dark")):
            browser.show(url, width, height, scheme)
            picture = browser.picture()
            assert picture.shape == (height, width) and picture.std() > 5  # not one colour
            assert (picture.mean() > 128) == (scheme == "light")
            assert (
                browser.value("document.documentElement.scrollWidth") <= width
            )  # long lines wrap, opened samples included
            browser.value(
                "document.querySelectorAll('details').forEach(found => found.open = true)"
            )
            assert browser.value("document.documentElement.scrollWidth") <= width
            sides = browser.value(
                "[...document.querySelectorAll('.runs')[0].children]"
                ".map(found => found.getBoundingClientRect().left)"
            )
            assert (sides[0] < sides[1]) == (width > 1000)  # side by side, or stacked
            loaded = {
                event["params"]["request"]["url"].split(",")[0]
                for event in browser.events
                if event["method"] == "Network.requestWillBeSent"
            }
            assert {found for found in loaded if not found.startswith("data:image/")} == {url}
            said = [
                event
                for event in browser.events
                if event["method"]
                in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
            ]
            assert not said
    finally:
        browser.close()
