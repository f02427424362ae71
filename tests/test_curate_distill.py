"""Which questions are kept: truth tables over stored replies, leaks by hand, funnels that add up.

An engine's replies are kept in a file and nothing is asked twice. So a file of replies, written here, decides what each
engine "said", and the real commands then have nothing to ask; were they to ask, the clinic would refuse these questions.
"""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clinic
import curate
import data

OPTIONS = {"A": "biopsy", "B": "surgery", "C": "rest", "D": "steroids"}
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"  # 13 words


def q(stem: str, key: str = "", answer: str = "B", options: dict | None = None, images: tuple = (), meta: dict | None = None) -> data.Question:
    return data.Question(stem, OPTIONS if options is None else options, answer, list(images), "bank", meta or {}, key)


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


def replies(out: Path, role: str, name: str, said: dict[str, list[tuple[str, str]]]) -> None:
    """The file of what engine clinic:NAME replied: {question id: (response, finish reason) of each attempt}."""
    rows = [
        {
            "id": key,
            "sample": k,
            "engine": f"clinic:{name}",
            "response": text,
            "token_ids": None,
            "finish_reason": finish,
            "seed": 0,
            "response_sha": data.content_hash(text)[:16],
        }
        for key, attempts in said.items()
        for k, (text, finish) in enumerate(attempts)
    ]
    data.write_jsonl(out / f"{role}-clinic-{name}.jsonl", rows)


def run_curate(bank: Path | list[Path], out: Path, *more: str) -> tuple[dict[str, data.Question], dict[str, dict], list[dict]]:
    """(kept, rejected rows, funnel) of the real command."""
    files = [str(path) for path in (bank if isinstance(bank, list) else [bank])]
    curate.main(["all", "--questions", *files, "--out", str(out), *more])
    kept = {question.id: question for name in ("text", "image") for question in data.read_questions(out / f"{name}.jsonl")}
    rejected = {row["id"]: row for _, row in data.read_jsonl(out / "rejected.jsonl")}
    return kept, rejected, json.loads((out / "funnel.json").read_text())


# ---------------------------------------------------------------------------------------------------------------
# Difficulty and solvability: truth tables


def test_question_is_kept_iff_each_expert_solves_it_at_least_once(tmp_path):
    # AND over experts of OR over attempts: (4, 0) is dropped, (1, 1) and (4, 4) are kept
    patterns = ["----", "+---", "-+--", "---+", "++++", "!!!!", "????", "-!?-", "?!-+"]
    table = {f"{a} {b}": (a, b) for a, b in itertools.product(patterns, repeat=2)}
    bank = write(tmp_path / "bank.jsonl", [q(f"Question {i}", key) for i, key in enumerate(table)])
    for number, name in enumerate(("expert-a", "expert-b")):
        replies(tmp_path / "out", "expert", name, {key: [SAID[c] for c in both[number]] for key, both in table.items()})
    before = {name: (tmp_path / "out" / f"expert-clinic-{name}.jsonl").read_bytes() for name in ("expert-a", "expert-b")}
    kept, rejected, _ = run_curate(bank, tmp_path / "out", "--experts", "clinic:expert-a", "clinic:expert-b", "--ngram", "0")
    assert set(kept) == {key for key, (a, b) in table.items() if "+" in a and "+" in b}
    assert {"++++ ----", "---- ++++"} <= set(rejected) and {"+--- ---+", "++++ ++++"} <= set(kept)
    for key, row in rejected.items():
        failed = "clinic:expert-a" if "+" not in table[key][0] else "clinic:expert-b"
        assert row["filter"] == "solvable" and row["reason"] == f"{failed} failed all 4 attempts"
    assert all((tmp_path / "out" / f"expert-clinic-{name}.jsonl").read_bytes() == text for name, text in before.items())  # nothing was asked


def test_question_is_dropped_if_any_baseline_is_right_at_once(tmp_path):
    table = {a + b: (a, b) for a, b in itertools.product(SAID, repeat=2)}
    bank = write(tmp_path / "bank.jsonl", [q(f"Question {i}", key) for i, key in enumerate(table)])
    for number, name in enumerate(("hasty", "bookish")):
        replies(tmp_path / "out", "baseline", name, {key: [SAID[both[number]]] for key, both in table.items()})
    kept, rejected, _ = run_curate(bank, tmp_path / "out", "--baselines", "clinic:hasty", "clinic:bookish", "--ngram", "0")
    assert set(kept) == {key for key in table if "+" not in key} and set(rejected) == {key for key in table if "+" in key}
    for key, row in rejected.items():
        assert row["filter"] == "difficulty" and row["reason"] == f"solved directly by clinic:{'hasty' if key[0] == '+' else 'bookish'}"


def test_attempts_beyond_the_asked_number_do_not_count(tmp_path):
    bank = write(tmp_path / "bank.jsonl", [q("Question 1", "late"), q("Question 2", "early")])
    replies(tmp_path / "out", "expert", "expert-a", {"late": [SAID[c] for c in "--+"], "early": [SAID[c] for c in "-+-"]})
    kept, _, _ = run_curate(bank, tmp_path / "out", "--experts", "clinic:expert-a", "--attempts", "2")
    assert set(kept) == {"early"}


def test_without_engines_and_benchmarks_everything_is_kept(tmp_path):
    bank = [q("Question 1", "a"), q("Question 2", "b")]
    kept, rejected, funnel = run_curate(write(tmp_path / "bank.jsonl", bank), tmp_path / "out")
    assert list(kept.values()) == bank and not rejected and [row["text"] for row in funnel] == [2, 2, 2, 2]


# ---------------------------------------------------------------------------------------------------------------
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


SHUFFLED = dict(zip("ABCD", ["steroids", "rest", "surgery", "biopsy"]))
ELSE = dict(zip("ABCD", ["laser", "drainage", "surgery", "none"]))
BENCHMARK = [
    q("What is the best next step?", "bench-text"),
    q(f"Here: {LONG}. What now?", "bench-long"),
    q("What does it show?", "bench-image", images=("0.png",)),
]
LEAKS = {  # name: (question, what it must be rejected for, or None)
    "exact": (q("What is the best next step?"), "bench-text"),
    "case, spaces and punctuation": (q("  what is the BEST next step "), "bench-text"),
    "options in another order": (q("What is the best next step?", options=SHUFFLED, answer="C"), "bench-text"),
    "options in another case": (q("What is the best next step?", options={k: v.upper() for k, v in OPTIONS.items()}), "bench-text"),
    "same stem, other options": (q("What is the best next step?", options=ELSE), None),
    "same options, other stem": (q("What is the worst next step?"), None),
    "13 words in a row": (q(f"Now {LONG}, and then?", options=ELSE), "bench-long"),
    "13 words in a row in another dress": (q(f"Now {LONG.upper().replace(' ', ', ')}; and then?"), "bench-long"),
    "13 words in a row, the last of the question": (q(f"Now {LONG}", options=ELSE), "bench-long"),
    "13 words in a row, and no others": (q(LONG, options=ELSE), "bench-long"),
    "12 words in a row": (q(f"Now {LONG.replace('thirteen', '')} fourteen"), None),
    "13 words, not in a row": (q(f"Now {LONG.replace('seven', 'seven and')}"), None),
    "same image, other text": (q("Which side is it on?", images=("0.png",)), "bench-image"),
    "same image under another name": (q("Is it on the right?", images=("copy-of-0.png",)), "bench-image"),
    "second of two images": (q("Which is older?", images=("1.png", "copy-of-0.png")), "bench-image"),
    "same text, other image": (q("What does it show?", images=("1.png",)), None),
    "text of an image question, without it": (q("What does it show?"), None),
    "options that differ in a symbol only": (q("What is the best next step?", options={k: v + " ↑" for k, v in OPTIONS.items()}), None),
}


@pytest.mark.parametrize("name", LEAKS)
def test_benchmark_question_is_found_in_the_bank_and_no_other(tmp_path, films, name):
    question, leak = LEAKS[name]
    bank, against = write(tmp_path / "bank.jsonl", [question]), write(tmp_path / "test.jsonl", BENCHMARK)
    kept, rejected, _ = run_curate(bank, tmp_path / "out", "--against", str(against), "--images", str(films))
    if leak is None:
        assert set(kept) == {question.id} and not rejected
    else:
        assert not kept and rejected[question.id]["filter"] == "leak" and leak in rejected[question.id]["reason"]


def test_ngram_0_allows_shared_words_but_no_exact_leak(tmp_path, films):
    shared, exact = LEAKS["13 words in a row"][0], LEAKS["exact"][0]
    bank, against = write(tmp_path / "bank.jsonl", [shared, exact]), write(tmp_path / "test.jsonl", BENCHMARK)
    kept, rejected, _ = run_curate(bank, tmp_path / "out", "--against", str(against), "--images", str(films), "--ngram", "0")
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
    kept, rejected, _ = run_curate(write(tmp_path / "bank.jsonl", bank), tmp_path / "out", "--images", str(films))
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
    bank = write(tmp_path / "bank.jsonl", [q("What is it?", "here", images=("1.png",)), q("What is it?", "gone", images=("9.png",))])
    with pytest.raises(data.RowError, match="question gone: image 9.png"):
        run_curate(bank, tmp_path / "out", "--images", str(films), "--baselines", "clinic:hasty")
    assert not list((tmp_path / "out").glob("expert-*"))


# ---------------------------------------------------------------------------------------------------------------
# The funnel


def test_funnel_follows_every_question_to_where_it_went(tmp_path, films):
    scan, smear = {"modality": "scan"}, {"modality": "smear"}
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
    replies(tmp_path / "out", "baseline", "hasty", {key: [SAID["+" if "easy" in key else "-"]] for key in left})
    replies(tmp_path / "out", "expert", "expert-a", {key: [SAID["-" if "hard" in key else "+"]] * 4 for key in left})
    against = write(tmp_path / "test.jsonl", BENCHMARK)
    paths = ["--against", str(against), "--images", str(films)]
    kept, rejected, funnel = run_curate(
        write(tmp_path / "bank.jsonl", bank), tmp_path / "out", *paths, "--baselines", "clinic:hasty", "--experts", "clinic:expert-a"
    )
    assert funnel == [
        {"filter": "bank", "text": 4, "image": 6, "modality": {"scan": 2, "smear": 3, "text": 4, "unknown": 1}},
        {"filter": "leak", "text": 3, "image": 5, "modality": {"scan": 2, "smear": 2, "text": 3, "unknown": 1}},
        {"filter": "difficulty", "text": 2, "image": 4, "modality": {"scan": 1, "smear": 2, "text": 2, "unknown": 1}},
        {"filter": "solvable", "text": 1, "image": 3, "modality": {"scan": 1, "smear": 1, "text": 1, "unknown": 1}},
    ]
    assert {key: row["filter"] for key, row in rejected.items()} == {
        "leaked": "leak", "leaked image": "leak", "easy text": "difficulty", "easy image": "difficulty", "hard text": "solvable", "hard image": "solvable",
    }  # fmt: skip
    assert all(row["reason"] for row in rejected.values())
    assert [row["id"] for _, row in data.read_jsonl(tmp_path / "out" / "text.jsonl")] == ["good text"]
    assert [row["id"] for _, row in data.read_jsonl(tmp_path / "out" / "image.jsonl")] == ["good image", "good image too", "unnamed image"]
    by_id = {question.id: question for question in bank}
    assert all(question == by_id[key] for key, question in kept.items())  # nothing of a question changes on the way
    for before, after in zip(funnel, funnel[1:]):
        dropped = sum(row["filter"] == after["filter"] for row in rejected.values())
        assert before["text"] + before["image"] - after["text"] - after["image"] == dropped
    assert all(sum(row["modality"].values()) == row["text"] + row["image"] for row in funnel)


@pytest.fixture(scope="module")
def curated(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("curated")
    experts = ["--experts", "clinic:expert-a", "clinic:expert-b"]
    run_curate(world / "bank.jsonl", out, "--images", str(world), "--against", str(world / "test.jsonl"), "--ngram", "0", *experts)
    return out


def test_world_is_curated_by_its_own_experts(world, curated):
    kept = [*data.read_questions(curated / "text.jsonl"), *data.read_questions(curated / "image.jsonl")]
    bank = {question.id: question for question in data.read_questions(world / "bank.jsonl")}
    rejected = {row["id"] for _, row in data.read_jsonl(curated / "rejected.jsonl")}
    assert {question.id for question in kept} | rejected == set(bank) and len(kept) + len(rejected) == len(bank)
    assert not any(q.images for q in data.read_questions(curated / "text.jsonl")) and all(
        q.images for q in data.read_questions(curated / "image.jsonl")
    )
    for name in ("expert-a", "expert-b"):  # each kept question was really solved by each
        rights = {
            row["id"]
            for _, row in data.read_jsonl(curated / f"expert-clinic-{name}.jsonl")
            if row["response"].endswith(f"<answer> {bank[row['id']].answer_text()} </answer>")
        }
        assert {question.id for question in kept} <= rights


def test_solved_question_is_not_asked_again(curated):
    for name in ("expert-a", "expert-b"):
        rows = [row for _, row in data.read_jsonl(curated / f"expert-clinic-{name}.jsonl")]
        asked = Counter(row["id"] for row in rows)
        assert len({(row["id"], row["sample"]) for row in rows}) == len(rows)
        assert asked and min(asked.values()) == 1 and max(asked.values()) <= 4


def test_killed_and_resumed_curation_asks_nothing_twice(world, curated, tmp_path):
    for path in curated.glob("expert-*"):
        shutil.copy(path, tmp_path)
    path = tmp_path / "expert-clinic-expert-a.jsonl"
    whole = path.read_bytes()
    kept = whole[: len(whole) // 2]
    assert not kept.endswith(b"\n")  # killed in the middle of a line
    path.write_bytes(kept)
    (tmp_path / "expert-clinic-expert-b.jsonl").unlink()  # the second expert was not reached
    run_curate(
        world / "bank.jsonl",
        tmp_path,
        "--images",
        str(world),
        "--against",
        str(world / "test.jsonl"),
        "--ngram",
        "0",
        "--experts",
        "clinic:expert-a",
        "clinic:expert-b",
    )
    assert path.read_bytes() == whole
    for name in ("text.jsonl", "image.jsonl", "rejected.jsonl", "funnel.json", "expert-clinic-expert-b.jsonl"):
        assert (tmp_path / name).read_bytes() == (curated / name).read_bytes()
