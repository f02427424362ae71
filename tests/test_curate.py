"""Which questions are kept: truth tables of every rule over stored replies, leaks by hand, funnels
that add up, and a bank of 1,000 questions whose fates are known, curated over HTTP, killed at every
stage and resumed.

An engine's replies are kept beside the folder that is written, and nothing is asked twice. So a
file of replies, written here, decides what each engine "said", and the real commands then have
nothing to ask; were they to ask, the clinic would refuse these questions.
"""

import csv
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import build_folder
from PIL import Image
from test_remote import Chat, Server, keys, serve  # noqa: F401  (keys and serve are fixtures)

import clinic.__main__
import clinic.world
import curate
import data
from benchmarks import decontaminate, descriptions
from command import schema, sheets
from command.flags import UserError
from engines import inference

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"A": "biopsy", "B": "surgery", "C": "rest", "D": "steroids"}
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"  # 13 words


def q(
    stem: str,
    key: str = "",
    answer: str = "B",
    options: dict | None = None,
    images: tuple = (),
    meta: dict | None = None,
) -> data.Question:
    return data.Question(
        stem, OPTIONS if options is None else options, answer, list(images), "bank", meta or {}, key
    )


def own(key: str) -> dict:
    """Options of a question's own, so that it repeats no other."""
    return {**OPTIONS, "D": f"not {key}"}


def write(path: Path, questions: list[data.Question]) -> Path:
    data.write_jsonl(path, [question.to_row() for question in questions])
    return path


RIGHT, WRONG = data.join_response("because", "B"), data.join_response("because", "C")
SAID = {  # one letter an attempt
    "+": (RIGHT, "stop"),
    "-": (WRONG, "stop"),
    "!": (RIGHT, "length"),  # right, but cut off
    "?": ("<think> the answer is (B) </think> who knows", "stop"),  # unreadable
}


def keep_replies(argv: list[str], role: str, name: str, said: dict[str, list]) -> None:
    """Writes the file of what engine clinic:NAME replied to a command in this role: {question id:
    (response, finish reason) of each attempt}."""
    args = curate.parse(argv)
    bank = decontaminate.read_bank(args.questions)
    wanted = [demand for step in curate.STEPS for demand in curate.demands(step, bank, args)]
    (demand,) = [one for one in wanted if (one.role, one.spec) == (role, f"clinic:{name}")]
    asked = {
        request.id: inference.content_of(request.messages, request.images)
        for request in demand.requests
    }
    rows = [
        {
            "id": key,
            "sample": k,
            "engine": demand.spec,
            "response": text,
            "token_ids": None,
            "finish_reason": finish,
            "seed": 0,
            "response_sha": data.response_hash(text),
            "asked": asked[key],
        }
        for key, attempts in said.items()
        for k, (text, finish) in enumerate(attempts)
        if key in asked
    ]
    path = inference.completions_file(args, role, demand.spec, demand.sampling)
    data.write_jsonl(path, map(inference.sealed, rows))


def replies_of(out: Path, role: str, name: str) -> Path:
    """The one file of what engine clinic:NAME replied in a role, beside a folder."""
    (path,) = (out.parent / "replies").glob(f"{role}-clinic-{name}-????????.jsonl")
    return path


def questions_of(path: Path) -> list[data.Question]:
    """The questions of a file that may be empty."""
    return schema.read_questions(path) if path.stat().st_size else []


def read(out: Path) -> tuple[dict[str, data.Question], dict[str, dict], list[dict]]:
    """(kept, rejected rows, funnel) of a folder."""
    kept = {q.id: q for name in ("text", "image") for q in questions_of(out / f"{name}.jsonl")}
    rejected = {row["id"]: row for _, row in data.read_jsonl(out / "rejected.jsonl")}
    return kept, rejected, json.loads((out / "funnel.json").read_text())


def as_question(row: dict) -> data.Question:
    """The question of a rejected row."""
    return data.Question(**{key: row[key] for key in q("").to_row()})


def run_curate(
    bank: Path | list[Path], out: Path, *more: str, said: dict | None = None
) -> tuple[dict[str, data.Question], dict[str, dict], list[dict]]:
    """(kept, rejected rows, funnel) of the real command. said: {(role, name): what clinic:NAME
    has replied before}."""
    files = [str(path) for path in (bank if isinstance(bank, list) else [bank])]
    argv = ["--questions", *files, "--out", str(out), *more]
    for (role, name), completions in (said or {}).items():
        keep_replies(argv, role, name, completions)
    curate.main(argv)
    return read(out)


def held(*folders: Path) -> dict[Path, tuple[bytes, int]]:
    """{file: (its bytes, when it was written)} of everything in folders."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# --------------------------------------------------------------------------------------------------
# Difficulty and solvability: truth tables


def test_question_is_kept_iff_each_expert_solves_it_at_least_once(tmp_path, capsys):
    # AND over experts of OR over attempts: (4, 0) is dropped, (1, 1) and (4, 4) are kept
    patterns = ["----", "+---", "-+--", "---+", "++++", "!!!!", "????", "-!?-", "?!-+"]
    table = {f"{a} {b}": (a, b) for a, b in itertools.product(patterns, repeat=2)}
    bank = write(tmp_path / "bank.jsonl", [q(f"Question {i}", key) for i, key in enumerate(table)])
    said = {
        ("expert", name): {key: [SAID[c] for c in both[number]] for key, both in table.items()}
        for number, name in enumerate(("expert-a", "expert-b"))
    }
    flags = ["--experts", "clinic:expert-a", "clinic:expert-b", "--exact-leaks"]
    kept, rejected, _ = run_curate(bank, tmp_path / "out", *flags, said=said)
    assert set(kept) == {key for key, (a, b) in table.items() if "+" in a and "+" in b}
    assert rejected["---- ++++"]["evidence"]["ended"] == ["stop"] * 4
    assert {"++++ ----", "---- ++++"} <= set(rejected) and {"+--- ---+", "++++ ++++"} <= set(kept)
    for key, row in rejected.items():
        failed = "clinic:expert-a" if "+" not in table[key][0] else "clinic:expert-b"
        assert row["filter"] == "solvable" and row["reason"].startswith(
            f"{failed} failed all 4 attempts: "
        )
    ended = {
        "----": "4 wrong",
        "!!!!": "4 cut off",
        "????": "4 wrong",
        "-!?-": "1 cut off, 3 wrong",
    }
    assert {
        key.split()[0]: row["reason"].rpartition(": ")[2]
        for key, row in rejected.items()
        if key.endswith(" ++++")
    } == ended
    shown = capsys.readouterr().out
    # the reasons in the summary are few
    assert re.search(r"\d+ solvable: clinic:expert-a failed all 4 attempts\n", shown)
    looked_at = [a.partition("+")[0] + "+" * ("+" in a) for a, _ in table.values()]
    assert Counter(c == "!" for said in looked_at for c in said) == {True: 6 * 9, False: 22 * 9}
    assert f"expert clinic:expert-a: {28 * 9} replies, {6 * 9} length, {22 * 9} stop" in shown
    for (role, name), told in said.items():  # nothing was asked
        rows = data.read_jsonl(replies_of(tmp_path / "out", role, name))
        keys = [(row["id"], row["sample"]) for _, row in rows]
        assert keys == [(key, k) for key in told for k in range(4)]


@pytest.mark.parametrize("rule", ["any", "all"])
def test_question_is_dropped_if_any_baseline_or_every_one_is_right(tmp_path, rule):
    table = {a + b: (a, b) for a, b in itertools.product(SAID, repeat=2)}
    bank = write(tmp_path / "bank.jsonl", [q(f"Question {i}", key) for i, key in enumerate(table)])
    said = {
        ("baseline", name): {key: [SAID[both[number]]] for key, both in table.items()}
        for number, name in enumerate(("hasty", "bookish"))
    }
    flags = ["--baselines", "clinic:hasty", "clinic:bookish", "--drop-if", rule]
    kept, rejected, _ = run_curate(bank, tmp_path / "out", *flags, said=said)
    files = {f"clinic:{name}": replies_of(tmp_path / "out", role, name).name for role, name in said}
    dropped = {key for key in table if "+" in key} if rule == "any" else {"++"}
    assert set(kept) == table.keys() - dropped and set(rejected) == dropped
    for key, row in rejected.items():
        solvers = (
            ["clinic:hasty", "clinic:bookish"]
            if rule == "all"
            else ["clinic:hasty" if key[0] == "+" else "clinic:bookish"]
        )
        assert row["filter"] == "difficulty" and row[
            "reason"
        ] == "solved directly by " + " and ".join(solvers)
        assert row["evidence"] == [
            {"engine": spec, "replies": files[spec], "samples": [0], "ended": ["stop"]}
            for spec in solvers
        ]


def test_text_and_image_questions_may_have_experts_of_their_own(tmp_path, films):
    bank = [
        q(f"Question {i}", key, images=("1.png",) * key.startswith("image"))
        for i, key in enumerate(
            ("text +-", "text -+", "image +-", "image -+", "text ++", "image ++")
        )
    ]
    said = {
        ("expert", name): {x.id: [SAID[x.id[-2:][number]]] * 4 for x in bank}
        for number, name in enumerate(("expert-a", "expert-b"))
    }
    experts = ["--images", str(films), "--experts", "text=clinic:expert-a", "image=clinic:expert-b"]
    bank_file = write(tmp_path / "bank.jsonl", bank)
    out = tmp_path / "out"
    kept, rejected, _ = run_curate(bank_file, out, *experts, said=said)
    for name, kind in (("expert-a", "text"), ("expert-b", "image")):  # none was asked the other's
        rows = [row["id"] for _, row in data.read_jsonl(replies_of(out, "expert", name))]
        assert rows and all(key.startswith(kind) for key in rows)
    assert set(kept) == {"text +-", "text ++", "image -+", "image ++"}
    assert {key: row["evidence"]["engine"] for key, row in rejected.items()} == {
        "text -+": "clinic:expert-a",
        "image +-": "clinic:expert-b",
    }
    assert all(row["evidence"]["samples"] == [0, 1, 2, 3] for row in rejected.values())
    with pytest.raises(data.RowError, match="none of text=clinic:expert-a is for image questions"):
        run_curate(
            tmp_path / "bank.jsonl",
            tmp_path / "other",
            "--images",
            str(films),
            "--experts",
            "text=clinic:expert-a",
        )


def test_without_engines_and_benchmarks_everything_is_kept(tmp_path):
    bank = [q("Question 1", "a"), q("Question 2", "b")]
    kept, rejected, funnel = run_curate(write(tmp_path / "bank.jsonl", bank), tmp_path / "out")
    assert list(kept.values()) == bank and not rejected
    assert [row["text"] for row in funnel] == [2] * 6


# --------------------------------------------------------------------------------------------------
# Leaks


@pytest.fixture
def films(tmp_path) -> Path:
    """An image root with three different pictures, and a copy of the first under another name."""
    root = tmp_path / "images"
    root.mkdir()
    for number in range(3):
        Image.fromarray(np.full((4, 4, 3), 60 * number, np.uint8)).save(root / f"{number}.png")
    shutil.copy(root / "0.png", root / "copy-of-0.png")
    return root


ELSE = dict(zip("ABCD", ["laser", "drainage", "surgery", "none"]))
BENCHMARK = [
    q("What is the best next step?", "bench-text"),
    q(f"Here: {LONG}. What now?", "bench-long"),
    q("What does it show?", "bench-image", images=("0.png",)),
]


def test_without_limits_shared_words_are_allowed_but_no_exact_leak(tmp_path, films):
    shared, exact = q(f"Now {LONG}, and then?", options=ELSE), q("What is the best next step?")
    bank, against = (
        write(tmp_path / "bank.jsonl", [shared, exact]),
        write(tmp_path / "test.jsonl", BENCHMARK),
    )
    kept, rejected, _ = run_curate(
        bank, tmp_path / "out", "--against", str(against), "--images", str(films), "--exact-leaks"
    )
    assert set(kept) == {shared.id} and set(rejected) == {exact.id}


def test_repeats_in_the_bank_are_dropped_and_the_first_is_kept(tmp_path, films):
    bank = [
        q("What is it?", "first"),
        q("what IS it", "again"),
        q("What is it?", "other options", options=ELSE),
        q("What is it?", "image 1", images=("1.png",)),
        q("What is it?", "image 2", images=("2.png",)),
        q("What is it?", "image 1 again", images=("1.png",)),
        q("What else?", "image 1 other text", images=("1.png",)),
    ]
    kept, rejected, _ = run_curate(
        write(tmp_path / "bank.jsonl", bank), tmp_path / "out", "--images", str(films)
    )
    assert {key: row["reason"] for key, row in rejected.items()} == {
        "again": "same as bank question first",
        "image 1 again": "same as bank question image 1",
    }
    assert len(kept) == 5


def test_question_in_two_bank_files_is_kept_once(tmp_path):
    shared, own = q("What is it?"), q("What else?")
    files = [write(tmp_path / "one.jsonl", [shared]), write(tmp_path / "two.jsonl", [own, shared])]
    kept, _, funnel = run_curate(files, tmp_path / "out")
    assert set(kept) == {shared.id, own.id} and funnel[-1]["text"] == 2


def test_missing_image_is_named_before_any_engine_is_asked(tmp_path, films):
    bank = write(
        tmp_path / "bank.jsonl",
        [q("What is it?", "here", images=("1.png",)), q("What is it?", "gone", images=("9.png",))],
    )
    with pytest.raises(data.RowError, match="question gone: image 9.png"):
        run_curate(bank, tmp_path / "out", "--images", str(films), "--baselines", "clinic:hasty")
    assert not (tmp_path / "out").exists() and not (tmp_path / "replies").exists()


# --------------------------------------------------------------------------------------------------
# The funnel


def test_funnel_follows_every_question_to_where_it_went(tmp_path, films):
    scan, smear = {"modality": "MRI scan"}, {"modality": "blood smear"}
    bank = [
        q("What is the best next step?", "leaked"),
        q("Question 1", "easy text"),
        q("Question 2", "good text"),
        q("Question 3", "hard text"),
        q("Question 4", "easy image", images=("1.png",), meta=scan),
        q("Question 5", "good image", images=("1.png",), meta=scan),
        q("Question 6", "good image too", images=("2.png",), meta=smear),
        q("Question 7", "unnamed image", images=("2.png",)),
        q("Question 8", "leaked image", images=("0.png",), meta=smear),
        q("Question 9", "hard image", images=("2.png",), meta=smear),
    ]
    left = [question.id for question in bank if "leaked" not in question.id]
    said = {
        ("baseline", "hasty"): {key: [SAID["+" if "easy" in key else "-"]] for key in left},
        ("expert", "expert-a"): {key: [SAID["-" if "hard" in key else "+"]] * 4 for key in left},
    }
    against = write(tmp_path / "test.jsonl", BENCHMARK)
    flags = ["--against", str(against), "--images", str(films)]
    flags += ["--baselines", "clinic:hasty", "--experts", "clinic:expert-a"]
    bank_file = write(tmp_path / "bank.jsonl", bank)
    kept, rejected, funnel = run_curate(bank_file, tmp_path / "out", *flags, said=said)
    assert funnel == [
        {
            "filter": "bank",
            "text": 4,
            "image": 6,
            "modality": {"mri": 2, "microscopy": 3, "text": 4, "unknown": 1},
        },
        {
            "filter": "leak",
            "text": 3,
            "image": 5,
            "modality": {"mri": 2, "microscopy": 2, "text": 3, "unknown": 1},
        },
        {
            "filter": "difficulty",
            "text": 2,
            "image": 4,
            "modality": {"mri": 1, "microscopy": 2, "text": 2, "unknown": 1},
        },
        {
            "filter": "type",
            "text": 2,
            "image": 4,
            "modality": {"mri": 1, "microscopy": 2, "text": 2, "unknown": 1},
            "not_run": True,
        },
        {
            "filter": "describe",
            "text": 2,
            "image": 4,
            "modality": {"mri": 1, "microscopy": 2, "text": 2, "unknown": 1},
            "not_run": True,
        },
        {
            "filter": "solvable",
            "text": 1,
            "image": 3,
            "modality": {"mri": 1, "microscopy": 1, "text": 1, "unknown": 1},
        },
    ]
    assert {key: row["filter"] for key, row in rejected.items()} == {
        "leaked": "leak",
        "leaked image": "leak",
        "easy text": "difficulty",
        "easy image": "difficulty",
        "hard text": "solvable",
        "hard image": "solvable",
    }
    assert all(row["reason"] and row["evidence"] for row in rejected.values())
    assert [row["id"] for _, row in data.read_jsonl(tmp_path / "out" / "text.jsonl")] == [
        "good text"
    ]
    assert [row["id"] for _, row in data.read_jsonl(tmp_path / "out" / "image.jsonl")] == [
        "good image",
        "good image too",
        "unnamed image",
    ]
    by_id = {question.id: question for question in bank}
    assert all(
        question == by_id[key] for key, question in kept.items()
    )  # nothing of a question changes on the way
    for before, after in zip(funnel, funnel[1:]):
        dropped = sum(row["filter"] == after["filter"] for row in rejected.values())
        assert before["text"] + before["image"] - after["text"] - after["image"] == dropped
    assert all(sum(row["modality"].values()) == row["text"] + row["image"] for row in funnel)


def test_replies_that_are_nested_without_end_or_hold_half_a_character_go_to_review_and_are_no_error(
    tmp_path, films
):
    said = {
        "deep": [('{"a":' * 100_000, "stop")] * 3,
        "half": [(edit("Half a \ud83d pair. What is it?", []), "stop")],
        "fine": [(edit("What is it?", []), "stop")],
    }
    bank = [
        q("What is it?", key, options=own(key), images=("1.png",))
        if key != "half"
        else q("Half a mended pair. What is it?", key, images=("1.png",))
        for key in said
    ]
    flags = ["--images", str(films), "--editor", "clinic:editor"]
    bank_file = write(tmp_path / "bank.jsonl", bank)
    kept, rejected, _ = run_curate(
        bank_file, tmp_path / "out", *flags, said={("describe", "editor"): said}
    )
    assert rejected["deep"]["filter"] == "review" and set(kept) == {"half", "fine"}
    assert rejected["deep"]["meta"]["needs_review"] == "no readable reply in 3 attempts"
    assert kept["fine"].meta == {}
    assert kept["half"].question == "Half a \ufffd pair. What is it?"


def test_a_step_that_had_no_engine_or_no_benchmarks_does_not_look_passed(tmp_path, capsys):
    bank = [q("Question 1", "a"), q("question 1", "again")]
    _, _, funnel = run_curate(
        write(tmp_path / "bank.jsonl", bank),
        tmp_path / "out",
        "--baselines",
        "clinic:hasty",
        said={("baseline", "hasty"): {"a": [SAID["-"]]}},
    )
    assert [(row["filter"], "not_run" in row) for row in funnel] == [
        ("bank", False),
        ("leak", True),
        ("difficulty", False),
        ("type", True),
        ("describe", True),
        ("solvable", True),
    ]
    said = capsys.readouterr().out
    shown = ("leak (repeats only)", "type (not run)", "describe (not run)", "solvable (not run)")
    assert all(name in said for name in shown) and "difficulty (" not in said


LATE = {  # what would stop a late step: (flags, what is said)
    "no expert for image questions": (
        ["--experts", "text=clinic:expert-a"],
        "none of text=clinic:expert-a is for image questions",
    ),
    "no key": (
        ["--experts", "https://api.example.com/v1#m", "--images-may-leave"],
        "no key; set EXAMPLE_API_KEY",
    ),
    "no model": (["--experts", "hf:nowhere/model"], "nowhere/model: no such file"),
    "no reviewed file": (["--reviewed", "nowhere.csv"], "nowhere.csv: no such file"),
    "no such engine": (["--editor", "oracle:x"], "oracle:x: unknown engine"),
}


@pytest.mark.parametrize("name", LATE)
def test_what_would_stop_a_late_step_stops_before_the_first_asks_anything(
    tmp_path, films, name, monkeypatch
):
    monkeypatch.delenv("EXAMPLE_API_KEY", raising=False)
    flags, said = LATE[name]
    bank = write(
        tmp_path / "bank.jsonl",
        [q("Question 1", "text"), q("Question 2", "image", images=("1.png",))],
    )
    baselines = [] if "--baselines" in flags else ["--baselines", "clinic:hasty"]
    with pytest.raises(UserError, match=re.escape(said)):
        run_curate(bank, tmp_path / "out", "--images", str(films), *baselines, *flags)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_read_may_not_lie_in_the_folder_that_is_written(tmp_path):
    bank = write(tmp_path / "out" / "questions.jsonl", [q("Question 1", "a")])
    (tmp_path / "out" / "review.csv").write_text("id,question\n")
    before = bank.read_bytes()
    with pytest.raises(data.RowError, match="--out .*: holds questions.jsonl, which no finished"):
        run_curate(bank, tmp_path / "out", "--baselines", "clinic:hasty")
    with pytest.raises(data.RowError, match="holds questions.jsonl"):
        flags = ["--reviewed", str(tmp_path / "out" / "review.csv")]
        other = write(tmp_path / "bank.jsonl", [q("Question 1", "a")])
        run_curate(other, tmp_path / "out", *flags)
    assert bank.read_bytes() == before
    assert len(list((tmp_path / "out").iterdir())) == 2  # and nothing was written beside


def test_an_id_that_stands_for_two_questions_is_refused(tmp_path):
    files = [
        write(tmp_path / "one.jsonl", [q("What of the heart?", "1")]),
        write(tmp_path / "two.jsonl", [q("What of the liver?", "1")]),
    ]
    with pytest.raises(
        data.RowError, match="two.jsonl: id: '1' is another question in an earlier file"
    ):
        run_curate(files, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"meta": None}, "meta: expected an object"),
        ({"meta": [1]}, "meta: expected an object"),
        ({"source": 7}, "source: expected a text"),
        ({"question": "Half \ud83d of it?"}, "half a surrogate pair"),
        ({"meta": {"why": ["\udc00"]}}, "half a surrogate pair"),
    ],
)
def test_a_bank_whose_meta_source_or_characters_cannot_be_kept_is_refused_by_line(
    tmp_path, change, said
):
    (tmp_path / "bank.jsonl").write_text(
        json.dumps({**q("Question 1", "a").to_row(), **change}) + "\n"
    )
    with pytest.raises(data.RowError, match=f"bank.jsonl:1: .*{said}"):
        run_curate(tmp_path / "bank.jsonl", tmp_path / "out")


def test_a_modality_that_is_no_text_is_counted_by_the_words_in_it(tmp_path, films):
    bank = [
        q(f"Question {i}", str(i), images=("1.png",), meta={"modality": what})
        for i, what in enumerate((["ct"], None, "ct"))
    ]
    _, _, funnel = run_curate(
        write(tmp_path / "bank.jsonl", bank), tmp_path / "out", "--images", str(films)
    )
    assert funnel[0]["modality"] == {"ct": 2, "unknown": 1}


def test_answers_of_experts_and_baselines_have_the_room_of_every_other_stage():
    assert curate.parse(["--questions", "b", "--out", "o"]).max_tokens == 8192


@pytest.fixture(scope="module")
def curated(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("curated") / "out"
    experts = ["--experts", "clinic:expert-a", "clinic:expert-b"]
    run_curate(
        world / "bank.jsonl",
        out,
        "--images",
        str(world),
        "--against",
        str(world / "test.jsonl"),
        "--exact-leaks",
        *experts,
    )
    return out


def test_world_is_curated_by_its_own_experts(world, curated):
    kept = [
        *schema.read_questions(curated / "text.jsonl"),
        *schema.read_questions(curated / "image.jsonl"),
    ]
    bank = {question.id: question for question in schema.read_questions(world / "bank.jsonl")}
    rejected = {row["id"] for _, row in data.read_jsonl(curated / "rejected.jsonl")}
    assert {question.id for question in kept} | rejected == set(bank) and len(kept) + len(
        rejected
    ) == len(bank)
    assert not any(q.images for q in schema.read_questions(curated / "text.jsonl")) and all(
        q.images for q in schema.read_questions(curated / "image.jsonl")
    )
    for name in ("expert-a", "expert-b"):  # each kept question was really solved by each
        rights = {
            row["id"]
            for _, row in data.read_jsonl(replies_of(curated, "expert", name))
            if row["response"].endswith(f"<answer> {bank[row['id']].answer_text()} </answer>")
        }
        assert {question.id for question in kept} <= rights


def test_killed_and_resumed_curation_asks_nothing_twice(world, curated, tmp_path):
    shutil.copytree(curated.parent / "replies", tmp_path / "replies")
    path, other = (replies_of(tmp_path / "out", "expert", f"expert-{name}") for name in "ab")
    whole, both = path.read_bytes(), other.read_bytes()
    kept = whole[: len(whole) // 2]
    assert not kept.endswith(b"\n")  # killed in the middle of a line
    path.write_bytes(kept)
    other.unlink()  # the second expert was not reached
    flags = ["--images", str(world), "--against", str(world / "test.jsonl"), "--exact-leaks"]
    flags += ["--experts", "clinic:expert-a", "clinic:expert-b"]
    run_curate(world / "bank.jsonl", tmp_path / "out", *flags)
    assert path.read_bytes() == whole and other.read_bytes() == both
    for name in ("text.jsonl", "image.jsonl", "rejected.jsonl", "funnel.json"):
        assert (tmp_path / "out" / name).read_bytes() == (curated / name).read_bytes()


# --------------------------------------------------------------------------------------------------
# The bank


# --------------------------------------------------------------------------------------------------
# The type of a question

REASONING = '{"type": "clinical_reasoning", "modality": "CT", "why": "It takes both."}'
LABELS = {  # reply: the type that is read, or None
    REASONING: "clinical_reasoning",
    (
        '```json\n{"type": "pattern_recognition", "modality": "x-ray", "why": "Seen at once."}\n```'
    ): "pattern_recognition",
    'It is {"type": "clinical_reasoning"}; no: {"type": "knowledge_recall"}': "knowledge_recall",
    '{"Type": "pattern_recognition"}': "pattern_recognition",  # keys in any case
    '{"type": "Pattern recognition"}': "pattern_recognition",
    '{"type": "clinical-reasoning", "modality": 7, "why": null}': "clinical_reasoning",
    '{"type": "pattern_recognition|knowledge_recall|clinical_reasoning"}': None,
    '{"type": "one of the three"}': None,
    '{"type": ["pattern_recognition"]}': None,
    "pattern_recognition": None,
    '{"type": "pattern_recognition"': None,
    "": None,
}


@pytest.mark.parametrize("completion", LABELS)
def test_type_is_read_or_it_is_none(completion):
    if LABELS[completion] is None:
        with pytest.raises(ValueError):
            curate.read_type(completion)
    else:
        assert curate.read_type(completion)["type"] == LABELS[completion]


def test_only_image_questions_of_pattern_recognition_or_without_a_readable_type_are_dropped(
    tmp_path, films
):
    pattern, recall, junk = (
        json.dumps({"type": kind, "modality": "Histo-Pathology. ", "why": "So it is."})
        for kind in ("pattern_recognition", "knowledge_recall", "junk")
    )
    said = {  # question: its replies
        "pattern": [pattern],
        "recall": [recall],
        "reasoning": [REASONING],
        "late": [junk, "what?", REASONING],
        "late pattern": [junk, pattern],
        "cut off": [(pattern, "length"), REASONING],
        "never": [junk] * 3,
        "blocked": [("", "blocked")] * 3,
        "fourth": [junk] * 3 + [REASONING],
        "named": [REASONING],
    }
    bank = [
        q(
            f"Question {key}",
            key,
            images=("1.png",),
            meta={"modality": "oct"} if key == "named" else {"page": 7},
        )
        for key in said
    ] + [q("Question text", "text")]
    given = [question.to_row() for question in bank]
    told = {
        key: [one if isinstance(one, tuple) else (one, "stop") for one in them]
        for key, them in said.items()
    }
    flags = ["--images", str(films), "--classifier", "clinic:classifier"]
    bank_file = write(tmp_path / "bank.jsonl", bank)
    kept, rejected, funnel = run_curate(
        bank_file, tmp_path / "out", *flags, said={("type", "classifier"): told}
    )
    assert {key: row["reason"] for key, row in rejected.items()} == {
        "pattern": "pattern recognition",
        "late pattern": "pattern recognition",
        "never": "no readable type in 3 attempts",
        "blocked": "no readable type in 3 attempts",
        "fourth": "no readable type in 3 attempts",
    }
    assert rejected["pattern"]["evidence"] == {
        "engine": "clinic:classifier",
        "replies": replies_of(tmp_path / "out", "type", "classifier").name,
        "samples": [0],
        "ended": ["stop"],
        "why": "So it is.",
    }
    assert rejected["blocked"]["evidence"]["ended"] == ["blocked"] * 3
    assert kept["text"].meta == {} and kept["named"].meta == {
        "modality": "oct",
        "type": "clinical_reasoning",
    }  # the bank knows better
    assert kept["recall"].meta == {
        "page": 7,
        "type": "knowledge_recall",
        "modality": "histopathology",
    }
    assert all(
        {**row, "meta": {}} == {**kept[row["id"]].to_row(), "meta": {}}
        for row in given
        if row["id"] in kept
    )
    assert funnel[0]["modality"] == {
        "ct": 3,
        "histopathology": 3,
        "ophthalmic imaging": 1,
        "text": 1,
        "unknown": 3,
    }  # as far as anybody was told
    assert json.loads((tmp_path / "out" / "stage.json").read_text())["figures"] == {
        "kept": 6,
        "type: pattern recognition": 2,
        "type: no readable type in 3 attempts": 3,
        "descriptions removed": 0,
        "to review": 0,
    }


# --------------------------------------------------------------------------------------------------
# Image descriptions

STEM = (
    "A 45-year-old man has a fever of 39.2 °C for 3 days; his blood pressure is 120/80 mmHg. "
    "CT (Figure A) shows a 4 cm mass in the left lobe. "
    "Hemoglobin is 9.5 g/dL. A film, <image 2>, is taken. What is the diagnosis?"
)
PASSAGE = "shows a 4 cm mass in the left lobe"
CUT = STEM.replace(f"CT (Figure A) {PASSAGE}.", "CT is Figure A.")
EDITS = {  # name: (text, removed, what the fault says or None)
    "as it should be": (CUT, [PASSAGE], None),
    "nothing to remove": (STEM, [], None),
    "other spaces and lines": (CUT.replace(". ", ".\n"), [PASSAGE.replace(" ", "  ")], None),
    "two passages": (
        STEM.replace(PASSAGE, "").replace("A film, <image 2>, is taken", "<image 2>"),
        [PASSAGE, "A film, ", ", is taken"], None,
    ),
    "nothing left": (" ", [STEM], "nothing is left"),
    "longer": (STEM + " Look!", [], "longer"),
    "reference lost": (
        STEM.replace(f"CT (Figure A) {PASSAGE}. ", ""), [f"CT (Figure A) {PASSAGE}."],
        "reference 'Figure A' is lost",
    ),
    "mark lost": (CUT.replace(", <image 2>,", ""), [PASSAGE], "reference '<image 2>' is lost"),
    "not verbatim": (CUT, ["shows a mass in the left lobe"], "is no part of the question"),
    "still there": (
        STEM.replace("Hemoglobin is 9.5 g/dL. ", ""), [PASSAGE, "Hemoglobin is 9.5 g/dL."],
        "is still there",
    ),
    "vital sign lost": (
        CUT.replace("; his blood pressure is 120/80 mmHg", ""), [PASSAGE],
        "number '120/80 mmHg' is lost",
    ),
    "vital sign changed": (
        CUT.replace("120/80", "110/80"), [PASSAGE], "number '120/80 mmHg' is lost",
    ),
    "unit lost": (CUT.replace(" mmHg", ""), [PASSAGE], "number '120/80 mmHg' is lost"),
    "laboratory value lost": (
        CUT.replace("9.5 g/dL", "low"), [PASSAGE], "number '9.5 g/dL' is lost",
    ),
    "age lost": (CUT.replace("45-year-old ", ""), [PASSAGE], "number '45-year' is lost"),
    "vital sign removed, and said so": (
        CUT.replace("; his blood pressure is 120/80 mmHg", ""),
        [PASSAGE, "; his blood pressure is 120/80 mmHg"], "value '120/80 mmHg' is removed",
    ),
    "laboratory value removed, and said so": (
        CUT.replace("Hemoglobin is 9.5 g/dL. ", ""), [PASSAGE, "Hemoglobin is 9.5 g/dL."],
        "value '9.5 g/dL' is removed",
    ),
    "a new number": (CUT.replace("A film", "2 films"), [PASSAGE], "number '2' is new"),
    "what is asked removed": (
        CUT.replace(" What is the diagnosis?", ""), [PASSAGE, "What is the diagnosis?"],
        "what is asked",
    ),
    "most of what is asked removed": (
        CUT.replace("What is the diagnosis?", "diagnosis?"), [PASSAGE, "What is the"],
        "what is asked",
    ),
    "number of the passage is no loss": (CUT, [PASSAGE], None),
    # three words of mending
    "history lost without a word": (
        CUT.replace("man has a fever of", "man, fever"), [PASSAGE], None,
    ),
    "more history lost": (
        CUT.replace("A film, <image 2>, is taken.", "<image 2>.").replace(
            "What is the diagnosis", "What"
        ),
        [PASSAGE], "are lost",
    ),
    "something new": (
        CUT.replace("A film, <image 2>, is taken.", "He smokes: <image 2>. Stroke excluded."),
        [PASSAGE, "A film, ", ", is taken"], "are new",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_edit_that_breaks_a_rule_is_found_and_no_other(name):
    text, removed, fault = EDITS[name]
    found = descriptions.edit_fault(STEM, text, removed)
    assert (found is None) if fault is None else (found and fault in found), found


TURNED = {  # name: (question, edit, removed, what the fault says or None)
    "not lost": (
        "A man has fever. Which of these is not a likely cause?",
        "A man has fever. Which of these is a likely cause?", [], "word 'not' is lost",
    ),
    "no lost": (
        "A man has no fever and pain. What now?", "A man has fever and pain. What now?",
        [], "word 'no' is lost",
    ),
    "not new": (
        "A man has fever today. Which is a likely cause?",
        "A man has fever. Which is not a likely cause?", [], "word 'not' is new",
    ),
    "denies new": (
        "A man reports having fever and pain. What now?", "A man denies fever and pain. What now?",
        [], "word 'denies' is new",
    ),
    "isn't lost": (
        "Which of these isn't a cause?", "Which of these is a cause?", [], "word 'isn't' is lost",
    ),
    "the other side": (
        "A man has pain in the left flank. What now?", "A man has pain in the right flank. What",
        [], "'left' is lost",
    ),
    "negation and side of the passage": (
        "A film shows no mass in the left lobe. The man coughs, and has a fever. What is it?",
        "A film. The man coughs, and has a fever. What is it?",
        ["shows no mass in the left lobe"], None,
    ),
    "two words change places": (
        "The father has fever and the mother has cough. Which is ill?",
        "The mother has fever and the father has cough. Which is ill?", [], "is moved",
    ),
    "half of it gone": (
        "A man coughs. He takes aspirin. "
        "A film shows a dark mass in the upper lobe and more. What is it?",
        "A man coughs. What is it?",
        ["He takes aspirin.", "A film shows a dark mass in the upper lobe and more."],
        "more than half",
    ),
    "a word that is there twice, the second removed": (
        "He has a mass. The film shows a mass. He coughs. What is it?",
        "He has a mass. The film. He coughs. What is it?", ["shows a mass"], None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNED)
def test_edit_that_turns_the_meaning_around_goes_to_review(name):
    question, text, removed, fault = TURNED[name]
    found = descriptions.edit_fault(question, text, removed)
    assert (found is None) if fault is None else (found and fault in found), found


NUMBERS = {
    "He is 45 years old, 37.5°C, BP 120/80 mm Hg, pulse 90/min, Na 140 mEq/L, 98 % on 2 L/min": [
        "45 years",
        "37.5°C",
        "120/80 mm Hg",
        "90/min",
        "140 mEq/L",
        "98 %",
        "2 L/min",
    ],
    "5 men in 1,200 mL after 3 hours of -2 and 10 mg/kg/day": [
        "5",
        "1,200 mL",
        "3 hours",
        "-2",
        "10 mg/kg/day",
    ],
    "C3 and T12 are no values": [],
}
REFERENCES = {
    "See Figure A, Fig. 2b and <image>; Figures 1A and B; image 3, panel C.": {
        "Figure A",
        "Fig. 2b",
        "<image>",
        "Figures 1A and B",
        "image 3",
        "panel C",
    },
    "The image shows a figure of a man, an image a doctor took.": set(),
}


def test_numbers_come_with_their_units_and_references_with_their_letters():
    assert {text: descriptions.NUMBER.findall(text) for text in NUMBERS} == NUMBERS
    assert {text: set(descriptions.FIGURE.findall(text)) for text in REFERENCES} == REFERENCES


def edit(text: str, removed: list) -> str:
    return json.dumps({"question": text, "removed": removed})


def test_descriptions_are_cut_or_left_for_review_and_a_human_goes_first(tmp_path, films, capsys):
    said = {
        "cut": [edit(CUT, [PASSAGE])],
        "clean": [edit(STEM, [])],
        "late": ["hm", '{"question": 3, "removed": []}', edit(CUT, [PASSAGE])],
        "broken": [edit(CUT.replace("9.5", "9"), [PASSAGE])],
        "mute": ["hm"] * 3,
        "cut off": [(edit(CUT, [PASSAGE]), "length")] * 3,
    }
    bank = [q(STEM, key, options=own(key), images=("1.png",)) for key in (*said, "human")] + [
        q(STEM, "text")
    ]
    told = {
        key: [one if isinstance(one, tuple) else (one, "stop") for one in them]
        for key, them in said.items()
    }
    (tmp_path / "human.csv").write_text(
        '\ufeffid,question\nhuman,"By hand: 45, Figure A?"\nelsewhere,Not here\n', encoding="utf-8"
    )
    flags = ["--images", str(films), "--editor", "clinic:editor"]
    flags += ["--reviewed", str(tmp_path / "human.csv")]
    bank_file = write(tmp_path / "bank.jsonl", bank)
    sure, rejected, _ = run_curate(
        bank_file, tmp_path / "out", *flags, said={("describe", "editor"): told}
    )
    assert "1 of its questions are not here, or were rejected" in capsys.readouterr().out
    assert list(sure) == ["text", "cut", "clean", "late", "human"]
    assert list(rejected) == ["broken", "mute", "cut off"]
    assert {row["filter"] for row in rejected.values()} == {"review"}
    kept = sure | {key: as_question(row) for key, row in rejected.items()}
    assert {
        key: question.question for key, question in kept.items() if question.question != STEM
    } == {"cut": CUT, "late": CUT, "human": "By hand: 45, Figure A?"}
    assert all(
        (kept[x.id].options, kept[x.id].answer, kept[x.id].images)
        == (x.options, x.answer, x.images)
        for x in bank
    )
    assert {key: question.meta for key, question in kept.items()} == {
        "cut": {"original": STEM},
        "clean": {},
        "late": {"original": STEM},
        "text": {},
        "human": {"original": STEM, "reviewed": True},
        "broken": {
            "needs_review": "the number '9.5 g/dL' is lost",
            "suggestion": CUT.replace("9.5", "9"),
        },
        "mute": {"needs_review": "no readable reply in 3 attempts", "suggestion": ""},
        "cut off": {"needs_review": "no readable reply in 3 attempts", "suggestion": ""},
    }
    with open(tmp_path / "out" / "review.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["id:broken", "id:mute", "id:cut off"] and all(
        row["question"] == STEM and row["images"] == "1.png" for row in rows
    )
    assert rows[0]["fault"] == "the number '9.5 g/dL' is lost" and rows[0][
        "suggestion"
    ] == CUT.replace("9.5", "9")
    # the human step: review.csv itself, its question column corrected, on what describe wrote,
    # without an engine
    asked = replies_of(tmp_path / "out", "describe", "editor").read_bytes()
    flags.append("--keep-unreviewed")
    everything, _, _ = run_curate(bank_file, tmp_path / "all", *flags)
    assert everything == kept and everything.keys() == {question.id for question in bank}
    assert replies_of(tmp_path / "out", "describe", "editor").read_bytes() == asked
    with open(tmp_path / "filled.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerow({**rows[0], "question": CUT})
        table.writerow({**rows[1], "fault": ""})  # it may stay as it is
        table.writerow(rows[2])  # not looked at
    flags = ["--images", str(films), "--reviewed", str(tmp_path / "filled.csv")]
    described = [tmp_path / "all" / "text.jsonl", tmp_path / "all" / "image.jsonl"]
    after, waits, _ = run_curate(described, tmp_path / "human", *flags)
    assert (
        after["broken"].question == CUT
        and after["broken"].meta == {"original": STEM, "reviewed": True}
        and after["broken"].id == "broken"
    )
    assert after["mute"].question == STEM and after["mute"].meta == {"reviewed": True}
    assert list(waits) == ["cut off"] and as_question(waits["cut off"]) == kept["cut off"]
    assert after["cut"] == kept["cut"] and after["human"] == kept["human"]
    waiting = sheets.read_sheet(tmp_path / "human" / "review.csv", ["id", "fault"])
    assert [(row["id"], row["fault"]) for _, row in waiting] == [
        ("id:cut off", "no readable reply in 3 attempts")
    ]


def test_a_sheet_survives_a_spreadsheet(tmp_path):
    long = "x" * 140_000 + ", 10 µg at 37 °C"
    questions = [q(long, "12e45678", meta={"needs_review": "why", "suggestion": ""})]
    assert descriptions.write_review(tmp_path / "review.csv", questions) == 1
    assert (
        (tmp_path / "review.csv").read_bytes().startswith(b"\xef\xbb\xbfid,question")
    )  # by this mark spreadsheets tell UTF-8
    assert (
        b"\r\nid:12e45678," in (tmp_path / "review.csv").read_bytes()
    )  # and this is no number to them
    assert descriptions.read_reviewed(tmp_path / "review.csv") == {"12e45678": (long, "why")}
    (tmp_path / "western.csv").write_bytes("id,question\na,37 °C\n".encode("cp1252"))
    with pytest.raises(
        data.RowError,
        match="western.csv: cannot be read .*save the filled-in sheet as CSV in UTF-8",
    ):
        descriptions.read_reviewed(tmp_path / "western.csv")
    with pytest.raises(data.RowError, match="nowhere.csv: no such file"):
        descriptions.read_reviewed(tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id,text\na,b\n", "expected id and question"),
        ("id,question\na\n", "row 2: no column 'question'"),
        ("id,question\na,\n", "row 2: question: is empty"),
        ("id,question\na,x\na,y\n", "row 3: id: it is there twice"),
    ],
)
def test_reviewed_file_that_cannot_be_used_is_refused_by_row(tmp_path, text, said):
    (tmp_path / "reviewed.csv").write_text(text)
    with pytest.raises(data.RowError, match=said):
        descriptions.read_reviewed(str(tmp_path / "reviewed.csv"))


def test_clinic_bank_holds_what_curation_must_find_and_without_it_all_else_is_the_same(
    tmp_path, monkeypatch
):
    kept, cut, bank = {}, {}, {}
    for name, spoilt in (("spoilt", 20), ("clean", 10**6)):
        monkeypatch.setattr(clinic.world, "SPOILT", spoilt)
        counts = [
            "--text",
            "20",
            "--image",
            "80",
            "--dev-image",
            "2",
            "--dev-text",
            "2",
            "--test-image",
            "4",
            "--test-text",
            "4",
        ]
        clinic.__main__.main(["world", "--out", str(tmp_path / name), *counts])
        bank[name] = {
            question.id: question
            for question in schema.read_questions(tmp_path / name / "bank.jsonl")
        }
        engines = [
            "--experts",
            "clinic:expert-a",
            "clinic:expert-b",
            "--classifier",
            "clinic:classifier",
            "--editor",
            "clinic:editor",
        ]
        paths = [
            "--images",
            str(tmp_path / name),
            "--against",
            str(tmp_path / name / "test.jsonl"),
            "--exact-leaks",
        ]
        kept[name], rejected, funnel = run_curate(
            tmp_path / name / "bank.jsonl", tmp_path / name / "out", *paths, *engines
        )
        looks = {key for key, row in rejected.items() if row["filter"] == "type"}
        assert len(looks) == 80 // spoilt and all(
            rejected[key]["question"].endswith(clinic.world.LOOK) for key in looks
        )
        assert funnel[0]["image"] == 80 + 80 // spoilt
        cut[name] = {key: row for key, row in rejected.items() if "original" in row["meta"]}
    assert len(cut["spoilt"]) == 4 and not cut["clean"]
    for key, row in cut[
        "spoilt"
    ].items():  # cut, it is what it was; and no expert solves it, so that nothing else changes
        assert (
            clinic.world.MENTION.search(row["meta"]["original"])
            and row["question"] == bank["clean"][key].question
            and row["filter"] == "solvable"
        )
    assert [replace(question, meta={}) for question in kept["spoilt"].values()] == [
        replace(question, meta={}) for question in kept["clean"].values()
    ]


def test_only_what_a_human_has_corrected_is_asked_again_and_old_replies_stay(world, tmp_path):
    flags = [
        "--images",
        str(world),
        "--against",
        str(world / "test.jsonl"),
        "--exact-leaks",
        "--experts",
        "clinic:expert-a",
        "clinic:expert-b",
    ]
    first = run_curate(world / "bank.jsonl", tmp_path / "out", *flags)
    files = [replies_of(tmp_path / "out", "expert", f"expert-{name}") for name in "ab"]
    before = [path.read_bytes() for path in files]
    changed = schema.read_questions(tmp_path / "out" / "image.jsonl")[0]
    (tmp_path / "reviewed.csv").write_text(
        f'id,question\n{changed.id},"{changed.question} Look well."\n', encoding="utf-8"
    )
    for name in ("second", "third"):  # in the third folder nothing at all is asked
        more = ["--reviewed", str(tmp_path / "reviewed.csv")]
        kept, rejected, _ = run_curate(world / "bank.jsonl", tmp_path / name, *flags, *more)
    added = [path.read_bytes().removeprefix(old) for path, old in zip(files, before)]
    rows = [json.loads(line) for text in added for line in text.splitlines()]
    assert rows and all(path.read_bytes().startswith(old) for path, old in zip(files, before))
    assert {row["id"] for row in rows} == {changed.id} and len(
        {(row["id"], row["sample"], row["engine"]) for row in rows}
    ) == len(rows)
    assert (
        kept.get(changed.id) or SimpleNamespace(question=rejected[changed.id]["question"])
    ).question == f"{changed.question} Look well."
    # and back again: the first replies are still there
    assert run_curate(world / "bank.jsonl", tmp_path / "back", *flags) == first
    assert [path.read_bytes().removeprefix(old) for path, old in zip(files, before)] == added


# --------------------------------------------------------------------------------------------------
# Each filter alone, and what it may cost


def test_filters_one_after_the_other_keep_what_all_keeps(world, curated, tmp_path):
    paths = ["--images", str(world)]
    run_curate(
        world / "bank.jsonl",
        tmp_path / "1",
        *paths,
        "--against",
        str(world / "test.jsonl"),
        "--exact-leaks",
    )
    run_curate(
        [tmp_path / "1" / "text.jsonl", tmp_path / "1" / "image.jsonl"],
        tmp_path / "2",
        *paths,
        "--experts",
        "clinic:expert-a",
        "clinic:expert-b",
    )
    assert read(tmp_path / "2")[0] == read(curated)[0]


def test_dry_run_tells_what_may_be_asked_at_most_and_asks_nothing(tmp_path, films, capsys):
    bank = [
        q("x" * 100, "text"),
        q("y" * 100, "image", images=("1.png", "2.png")),
        q("What is the best next step?", "leaked"),
    ]
    against = write(tmp_path / "test.jsonl", BENCHMARK)
    engines = [
        "--baselines",
        "http://nowhere/v1#a",
        "http://nowhere/v1#b",
        "--classifier",
        "gemini:g",
        "--editor",
        "http://nowhere/v1#e",
        "--experts",
        "gemini:g",
        "text=http://nowhere/v1#r",
    ]
    flags = [
        "--images",
        str(films),
        "--against",
        str(against),
        "--pixels",
        str(28 * 28 * 50),
        "--max-tokens",
        "1000",
        "--dry-run",
    ]
    curate.main(
        [
            "--questions",
            str(write(tmp_path / "bank.jsonl", bank)),
            "--out",
            str(tmp_path / "out"),
            *engines,
            *flags,
        ]
    )
    assert not (tmp_path / "out").exists()
    *lines, note = capsys.readouterr().out.replace(",", "").splitlines()[2:]
    assert note.startswith("  plus what is asked again after a failure")
    rows = [line.split() for line in lines]
    prompt = (
        len(data.SYSTEM_PROMPT)
        + 100
        + len(data.question_text(bank[0]).removeprefix(bank[0].question))
    )
    text, image = prompt // 3, prompt // 3 + 100  # two images of 50 tokens
    label = (len(curate.TYPE_PROMPT) - 2 + len(data.question_text(bank[1]))) // 3 + 100
    cut = (len(descriptions.EDIT_PROMPT) - 2 + 100) // 3 + 100
    google = "generativelanguage.googleapis.com"
    assert rows == [
        ["baseline", "http://nowhere/v1#a", "2", str(text + image), "2000", "nowhere"],
        ["baseline", "http://nowhere/v1#b", "2", str(text + image), "2000", "nowhere"],
        ["type", "gemini:g", "3", str(3 * label), str(3 * 4096), google],
        ["describe", "http://nowhere/v1#e", "3", str(3 * cut), str(3 * 4096), "nowhere"],
        ["expert", "gemini:g", "8", str(4 * (text + image)), "8000", google],
        ["expert", "http://nowhere/v1#r", "4", str(4 * text), "4000", "-"],
        [
            "all",
            "22",
            str(6 * (text + image) + 3 * label + 3 * cut + 4 * text),
            str(16000 + 6 * 4096),
        ],
    ]


def test_images_leave_the_machine_only_with_leave_and_nothing_is_asked_before(tmp_path, films):
    bank = write(tmp_path / "bank.jsonl", [q("x", "image", images=("1.png",)), q("y", "text")])
    words = ["--questions", str(bank), "--images", str(films), "--out", str(tmp_path / "out")]
    with pytest.raises(data.RowError, match="images would be sent to nowhere.*--images-may-leave"):
        curate.main([*words, "--baselines", "http://nowhere/v1#a"])
    with pytest.raises(inference.Unavailable, match="no server answers there"):
        curate.main([*words, "--baselines", "http://nowhere/v1#a", "--images-may-leave"])
    assert not (tmp_path / "replies").exists()


# --------------------------------------------------------------------------------------------------
# A thousand questions over HTTP, killed at every stage

TEXT_FATES = {"leak": 300, "easy-a": 90, "easy-b": 60, "hard-a": 25, "hard-b": 25, "good": 100}
IMAGE_FATES = {
    "leak": 140,
    "easy-a": 50,
    "easy-b": 40,
    "pattern": 30,
    "riddle": 15,
    "hard-a": 15,
    "hard-b": 15,
    "good": 40,
    "told": 35,
    "spoilt": 20,
}
ROLES = ("baseline-a", "baseline-b", "classifier", "expert-a", "expert-b", "editor")
DESCRIBED = "The scan shows a mass of 4 cm. "


def thousand(folder: Path) -> dict[str, data.Question]:
    """The bank and the benchmark. An id is NUMBER-KIND-FATE. The leaked ones are the benchmark's,
    in capitals."""
    bank, leaked = {}, []
    for kind, fates in (("text", TEXT_FATES), ("image", IMAGE_FATES)):
        for fate in (fate for fate, many in fates.items() for _ in range(many)):
            number = len(bank)
            key, images = f"{number}-{kind}-{fate}", []
            if kind == "image":
                Image.fromarray(
                    np.full((4, 4, 3), [number % 251, number // 251, 0], np.uint8)
                ).save(folder / f"{number}.png")
                images = [f"{number}.png"]
            stem = (
                f"<<{key}>> {DESCRIBED if fate in ('told', 'spoilt') else ''}"
                f"What is it, at age {number}?"
            )
            bank[key] = q(
                stem,
                key,
                "ABCD"[number % 4],
                images=tuple(images),
                meta={"modality": "mri"} if kind == "image" and number % 2 else {},
            )
            if fate == "leak":
                leaked.append(q(stem.upper(), f"bench-{number}", images=tuple(images)))
    write(folder / "bank.jsonl", list(bank.values()))
    write(folder / "test.jsonl", leaked)
    return bank


def whole_rows(path: Path) -> list[dict]:
    """The rows of a file that a killed writer may have torn."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def said_about(role: str, question: data.Question, k: int) -> str:
    """What an engine says to its k-th request about a question, so that it meets its fate."""
    number, kind, fate = question.id.split("-", 2)
    if role == "classifier":
        label = "pattern_recognition" if fate == "pattern" else "clinical_reasoning"
        return (
            json.dumps({"type": label, "modality": "CT", "why": "so"})
            if fate != "riddle" and k >= int(number) % 3
            else "I wonder."
        )
    if role == "editor":
        text = (
            question.question.replace(DESCRIBED, "")
            if fate != "spoilt"
            else question.question.replace(DESCRIBED, "").replace(number + "?", "?")
        )
        return edit(text, [DESCRIBED] * (DESCRIBED in question.question))
    slow = k >= int(number) % 4  # an expert's first right attempt may be any of the four
    solves = {
        "baseline-a": fate == "easy-a",
        "baseline-b": fate == "easy-b",
        "expert-a": fate != "hard-a" and slow,
        "expert-b": fate != "hard-b" and slow,
    }[role]
    return data.join_response("hm", question.answer if solves else "ABCD"[(int(number) + 1) % 4])


def test_a_thousand_questions_meet_their_fates_though_killed_at_every_stage(tmp_path):
    bank, log, asked, running = thousand(tmp_path), [], Counter(), []
    seeds = {(data.sample_seed(0, key, k) % 2**31): (key, k) for key in bank for k in range(4)}

    def play(key, count, body):
        role, (id, k) = body["model"], seeds[body["seed"]]
        assert id == key
        with server.lock:
            log.append((role, id, k))
            asked[role] += 1
            kill = asked[role] == 25  # once in each stage that asks
        if kill:
            running[-1].send_signal(signal.SIGKILL)
            return "reset"
        return Chat.good(said_about(role, bank[id], k))

    server, out = Server(play), tmp_path / "out"
    spec = {role: f"{server.base}/v1#{role}" for role in ROLES}
    command = [
        sys.executable,
        str(ROOT / "curate.py"),
        "--questions",
        str(tmp_path / "bank.jsonl"),
        "--against",
        str(tmp_path / "test.jsonl"),
        "--images",
        str(tmp_path),
    ]
    command += [
        "--baselines",
        spec["baseline-a"],
        spec["baseline-b"],
        "--experts",
        spec["expert-a"],
        spec["expert-b"],
        "--classifier",
        spec["classifier"],
        "--editor",
        spec["editor"],
    ]
    while True:
        begun = len(log)
        files = [
            (role, path)
            for role in ROLES
            for path in (tmp_path / "replies").glob(f"*-v1-{role}-????????.jsonl")
        ]
        assert {role for role, _ in files} >= set(asked)
        on_disk = {(role, x["id"], x["sample"]) for role, path in files for x in whole_rows(path)}
        running.append(
            subprocess.Popen(
                [*command, "--out", str(out), "--concurrency", "8"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        printed, complaint = running[-1].communicate(timeout=300)
        time.sleep(0.5)  # a request that was on its way still arrives
        this = log[begun:]
        # neither what was on disk is asked again, nor anything twice
        assert not on_disk & set(this) and len(this) == len(set(this))
        if running[-1].returncode == 0:
            break
        assert running[-1].returncode == -signal.SIGKILL and not (out / "stage.json").exists(), (
            complaint[-2000:]
        )
    server.close()
    assert len(running) == 1 + len(ROLES) and set(asked) == set(ROLES)

    kept, rejected, funnel = read(out)
    fate = {key: key.split("-", 2)[2] for key in bank}
    assert set(kept) == {key for key in bank if fate[key] in ("good", "told")}
    filters = {
        "spoilt": "review",
        "leak": "leak",
        "easy-a": "difficulty",
        "easy-b": "difficulty",
        "pattern": "type",
        "riddle": "type",
        "hard-a": "solvable",
        "hard-b": "solvable",
    }
    assert {key: row["filter"] for key, row in rejected.items()} == {
        key: filters[fate[key]] for key in bank if key not in kept
    }
    assert [(row["filter"], row["text"], row["image"]) for row in funnel] == [
        ("bank", 600, 400),
        ("leak", 300, 260),
        ("difficulty", 150, 170),
        ("type", 150, 125),
        ("describe", 150, 105),
        ("solvable", 100, 75),
    ]
    waiting = {key: as_question(row) for key, row in rejected.items() if row["filter"] == "review"}
    for key, question in (kept | waiting).items():
        assert question.question == (
            bank[key].question
            if fate[key] == "spoilt"
            else bank[key].question.replace(DESCRIBED, "")
        )
        assert ("original" in question.meta, "needs_review" in question.meta) == (
            fate[key] == "told",
            fate[key] == "spoilt",
        )
        assert (question.options, question.answer, question.images) == (
            bank[key].options,
            bank[key].answer,
            bank[key].images,
        )
        assert question.meta.get("modality") == (
            ("mri" if int(key.split("-")[0]) % 2 else "ct") if question.images else None
        )
    assert descriptions.read_reviewed(out / "review.csv").keys() == {
        key for key in bank if fate[key] == "spoilt"
    }
    figures = json.loads((out / "stage.json").read_text())["figures"]
    assert (
        figures["leak"],
        figures["type: pattern recognition"],
        figures["type: no readable type in 3 attempts"],
    ) == (440, 30, 15)
    assert (figures["kept"], figures["descriptions removed"], figures["to review"]) == (175, 35, 20)
    assert figures["review: waits for a human"] == 20
    assert re.search(r"bank +600 +400 +37,000 +17,000", printed)
    assert re.search(r"solvable +100 +75 +3,000 +2,000", printed)

    def attempts(solves: bool, key: str) -> int:
        return int(key.split("-")[0]) % 4 + 1 if solves else 4

    solved = {"good", "told", "hard-a", "hard-b"}  # what comes to the experts
    needed = {
        "baseline-a": sum(fate[key] != "leak" for key in bank),
        "baseline-b": sum(fate[key] not in ("leak", "easy-a") for key in bank),
        "classifier": sum(
            3 if fate[key] == "riddle" else int(key.split("-")[0]) % 3 + 1
            for key in bank
            if "-image-" in key and fate[key] not in ("leak", "easy-a", "easy-b")
        ),
        "expert-a": sum(
            attempts(fate[key] != "hard-a", key) for key in bank if fate[key] in solved
        ),
        "expert-b": sum(
            attempts(fate[key] != "hard-b", key) for key in bank if fate[key] in solved - {"hard-a"}
        ),
        "editor": 125,
    }
    assert Counter(role for role, *_ in set(log)) == needed  # and nothing more


# --------------------------------------------------------------------------------------------------
# What waits for a human, what is finished, and what answers under an old name

FEW = ("40-image-good", "44-image-told", "48-image-spoilt", "52-text-good")


def few(folder: Path, serve) -> tuple[dict[str, data.Question], list[str], Server]:
    """(bank, flags of a curation with an editor and two experts, the server behind them). The
    editor spoils the third question's text; the experts solve whatever they are asked."""
    Image.new("RGB", (4, 4), "green").save(folder / "film.png")
    bank = {}
    for key in FEW:
        number, kind, fate = key.split("-")
        told = DESCRIBED if fate in ("told", "spoilt") else ""
        images = ("film.png",) * (kind == "image")
        bank[key] = q(f"<<{key}>> {told}What is it, at age {number}?", key, images=images)
    server = serve(lambda key, count, body: Chat.good(said_about(body["model"], bank[key], 0)))
    write(folder / "bank.jsonl", list(bank.values()))
    spec = {role: f"{server.base}/v1#{role}" for role in ("editor", "expert-a", "expert-b")}
    experts = ["--experts", spec["expert-a"], spec["expert-b"]]
    flags = ["--images", str(folder), "--exact-leaks", "--editor", spec["editor"], *experts]
    return bank, flags, server


def asked_of(server: Server) -> Counter:
    """How often each model was asked about each question."""
    said = [(body["model"], json.dumps(body)) for _, _, body in server.requests]
    return Counter((model, re.search("<<(.*?)>>", text)[1]) for model, text in said)


GOOD, TOLD, SPOILT, TEXT = FEW
WANTED = {("editor", key): 1 for key in FEW[:3]} | {
    (f"expert-{x}", key): 1 for x in "ab" for key in (GOOD, TOLD, TEXT)
}
FAULT = "the number '48' is lost"


def test_a_question_that_waits_for_review_is_held_back_and_no_expert_is_asked(serve, tmp_path):
    bank, flags, server = few(tmp_path, serve)
    kept, rejected, funnel = run_curate(tmp_path / "bank.jsonl", tmp_path / "out", *flags)
    assert list(kept) == [TEXT, GOOD, TOLD] and list(rejected) == [SPOILT]
    row = rejected[SPOILT]
    assert (row["filter"], row["evidence"]) == ("review", {"fault": FAULT}) and row["reason"]
    assert row["meta"]["needs_review"] == FAULT and row["question"] == bank[SPOILT].question
    assert descriptions.read_reviewed(tmp_path / "out" / "review.csv") == {
        SPOILT: (bank[SPOILT].question, FAULT)
    }
    assert [(row["filter"], row["image"]) for row in funnel[-3:]] == [
        ("type", 3),
        ("describe", 2),
        ("solvable", 2),
    ]
    assert asked_of(server) == WANTED


def test_keep_unreviewed_lets_a_waiting_question_in_with_its_mark(serve, tmp_path):
    bank, flags, server = few(tmp_path, serve)
    flags.append("--keep-unreviewed")
    kept, rejected, _ = run_curate(tmp_path / "bank.jsonl", tmp_path / "out", *flags)
    assert list(kept) == [TEXT, GOOD, TOLD, SPOILT] and not rejected
    assert kept[SPOILT].question == bank[SPOILT].question
    assert kept[SPOILT].meta["needs_review"] == FAULT
    assert not any("needs_review" in kept[key].meta for key in (TEXT, GOOD, TOLD))
    assert list(descriptions.read_reviewed(tmp_path / "out" / "review.csv")) == [SPOILT]
    assert asked_of(server) == WANTED | {("expert-a", SPOILT): 1, ("expert-b", SPOILT): 1}


def test_a_single_describe_holds_back_what_waits_unless_it_is_told_to_keep_it(serve, tmp_path):
    _, flags, _ = few(tmp_path, serve)
    flags = flags[:5]  # without the experts
    for name, more in (("held", []), ("let-in", ["--keep-unreviewed"])):
        kept, rejected, _ = run_curate(tmp_path / "bank.jsonl", tmp_path / name, *flags, *more)
        assert (SPOILT in kept, SPOILT in rejected) == (bool(more), not more) and len(kept) >= 3
        assert list(descriptions.read_reviewed(tmp_path / name / "review.csv")) == [SPOILT]


def test_a_mark_that_the_bank_brings_along_is_no_step_that_was_not_run(tmp_path, films):
    marked = q("Question 1", "marked", images=("1.png",), meta={"needs_review": "why"})
    bank = write(tmp_path / "bank.jsonl", [marked, q("Question 2", "plain", images=("1.png",))])
    kept, rejected, funnel = run_curate(bank, tmp_path / "out", "--images", str(films))
    assert list(kept) == ["plain"] and rejected["marked"]["filter"] == "review"
    (row,) = [row for row in funnel if row["filter"] == "describe"]
    assert row["image"] == 1 and "not_run" not in row


def fill(sheet: Path, texts: dict[str, str], to: Path) -> Path:
    """A copy of review.csv with other texts, as a human's spreadsheet saves it."""
    with open(sheet, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["question"] = texts.get(row["id"].removeprefix("id:"), row["question"])
    with open(to, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return to


def test_a_reviewed_text_lets_its_question_in_and_nothing_else_is_asked_anew(serve, tmp_path):
    bank, flags, server = few(tmp_path, serve)
    first, _, _ = run_curate(tmp_path / "bank.jsonl", tmp_path / "out", *flags)
    before, asked = held(tmp_path / "out", tmp_path / "replies"), asked_of(server)
    text = bank[SPOILT].question.replace(DESCRIBED, "")
    sheet = fill(tmp_path / "out" / "review.csv", {SPOILT: text}, tmp_path / "filled.csv")
    kept, rejected, _ = run_curate(
        tmp_path / "bank.jsonl", tmp_path / "second", *flags, "--reviewed", str(sheet)
    )
    assert list(kept) == [TEXT, GOOD, TOLD, SPOILT] and not rejected
    assert kept[SPOILT].question == text
    assert kept[SPOILT].meta == {"original": bank[SPOILT].question, "reviewed": True}
    assert {key: kept[key] for key in first} == first
    assert asked_of(server) - asked == {("expert-a", SPOILT): 1, ("expert-b", SPOILT): 1}
    for path, (content, _) in before.items():  # what there was is there, and replies are added
        assert path.read_bytes().startswith(content)
        assert path.parent.name == "replies" or path.read_bytes() == content


def test_a_question_that_no_human_has_decided_goes_on_waiting_without_the_editor(serve, tmp_path):
    _, flags, _ = few(tmp_path, serve)
    run_curate(tmp_path / "bank.jsonl", tmp_path / "out", *flags)
    sheet = fill(tmp_path / "out" / "review.csv", {}, tmp_path / "filled.csv")
    more = [*flags, "--editor", "", "--reviewed", str(sheet)]
    kept, rejected, _ = run_curate(tmp_path / "bank.jsonl", tmp_path / "second", *more)
    assert SPOILT not in kept and rejected[SPOILT]["evidence"] == {"fault": FAULT}


def test_a_sheet_that_a_human_corrected_in_place_survives_every_rerun(serve, tmp_path):
    bank, flags, server = few(tmp_path, serve)
    out, bank_file = tmp_path / "out", tmp_path / "bank.jsonl"
    run_curate(bank_file, out, *flags)
    text = bank[SPOILT].question.replace(DESCRIBED, "")
    sheet = fill(out / "review.csv", {SPOILT: text}, out / "review.csv")
    filled, asked = sheet.read_bytes(), asked_of(server)
    run_curate(bank_file, out, *flags)
    for more in (["--reviewed", str(sheet)], ["--keep-unreviewed"], ["--seed", "1"]):
        with pytest.raises(data.RowError, match="--out .*out: "):
            run_curate(bank_file, out, *flags, *more)
        assert sheet.read_bytes() == filled
    kept, _, _ = run_curate(bank_file, tmp_path / "second", *flags, "--reviewed", str(sheet))
    assert kept[SPOILT].question == text and sheet.read_bytes() == filled
    asked |= {("expert-a", SPOILT): 1, ("expert-b", SPOILT): 1}
    (out / "stage.json").unlink()  # as if it had been killed after it wrote the sheet
    with pytest.raises(data.RowError, match="review.csv: is there already, and a human may"):
        run_curate(bank_file, out, *flags)
    assert sheet.read_bytes() == filled and asked_of(server) == asked


OTHER = {  # what is another command: (more flags, how the difference is named)
    "seed": (["--seed", "1"], "seed 0 -> 1"),
    "image settings": (["--pixels", "784"], "pixels 589824 -> 784"),
    "what waits": (["--keep-unreviewed"], "keep_unreviewed False -> True"),
    "an engine less": (["--editor", ""], "editor 'http://.*#editor' -> ''"),
    "the same bank, changed": ([], "bank.jsonl changed"),
    "another bank": ([], "questions .*bank.jsonl.* -> .*other.jsonl"),
}


@pytest.fixture
def finished(serve, tmp_path, capsys) -> SimpleNamespace:
    """A folder that is finished, and whose engines have gone."""
    bank, flags, server = few(tmp_path, serve)
    run_curate(tmp_path / "bank.jsonl", tmp_path / "out", *flags)
    server.close()
    capsys.readouterr()
    return SimpleNamespace(bank=bank, flags=flags, server=server, asked=len(server.requests))


def test_a_finished_command_opens_no_engine_and_leaves_every_byte(finished, tmp_path, capsys):
    before = held(tmp_path)
    for more in ([], ["--concurrency", "3"]):  # how fast is no other command
        run_curate(tmp_path / "bank.jsonl", tmp_path / "out", *finished.flags, *more)
        assert "out: is finished already" in capsys.readouterr().out
    assert held(tmp_path) == before and len(finished.server.requests) == finished.asked


@pytest.mark.parametrize("name", OTHER)
def test_another_command_in_a_finished_folder_is_refused_by_name(finished, tmp_path, name):
    more, said = OTHER[name]
    bank = tmp_path / ("other.jsonl" if name == "another bank" else "bank.jsonl")
    if "bank" in name:
        write(bank, [*finished.bank.values(), q("One more", "more")])
    before = held(tmp_path)
    with pytest.raises(data.RowError, match=f"finished with other settings or inputs .*{said}"):
        run_curate(bank, tmp_path / "out", *finished.flags, *more)
    assert held(tmp_path) == before and len(finished.server.requests) == finished.asked


def test_a_retrained_checkpoint_is_asked_anew_and_its_old_replies_stay(folders, tmp_path):
    shutil.copytree(folders["qwen"], tmp_path / "base")
    bank = write(tmp_path / "bank.jsonl", [q(f"Question {i}", str(i)) for i in range(3)])
    flags = ["--baselines", f"hf:{tmp_path / 'base'}", "--max-tokens", "4"]
    run_curate(bank, tmp_path / "out", *flags)
    (old,) = (tmp_path / "replies").glob("baseline-*.jsonl")
    before = held(tmp_path / "out", tmp_path / "replies")
    build_folder("qwen", tmp_path / "base", seed=1)
    with pytest.raises(data.RowError, match="out: was finished with other .*base changed"):
        run_curate(bank, tmp_path / "out", *flags)
    assert held(tmp_path / "out", tmp_path / "replies") == before
    run_curate(bank, tmp_path / "second", *flags)
    (new,) = set((tmp_path / "replies").glob("baseline-*.jsonl")) - {old}
    assert before.items() <= held(tmp_path / "out", tmp_path / "replies").items()
    olds, news = ([row for _, row in data.read_jsonl(path)] for path in (old, new))
    asked = [[(row["id"], row["asked"]) for row in rows] for rows in (olds, news)]
    assert asked[0] == asked[1] and len(news) == 3
    assert all(a["token_ids"] != b["token_ids"] for a, b in zip(olds, news))
    stages = [json.loads((tmp_path / out / "stage.json").read_text()) for out in ("out", "second")]
    named = [stage["engines"] for stage in stages]
    assert named[0].keys() == named[1].keys() and named[0] != named[1]
