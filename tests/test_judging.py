"""How good is a judge: judges whose errors are known by construction, and two side by side."""

import json
import re

import pytest
from conftest import sample_teachers

import data
import report.__main__
from clinic import roles
from judge import CRITERIA
from report import judging

MADE = {"Answer_Correctness": True} | dict.fromkeys(CRITERIA, False)
CHECKED = f"So it is. {roles.CHECKS[0]} it fits."


@pytest.mark.parametrize(
    ("name", "response", "met"),
    [
        ("judge", CHECKED, set()),
        ("judge-blind", CHECKED, {"No_Hallucination"}),
        ("judge-style", CHECKED, {*CRITERIA}),
        ("judge-style", "So it is.", set()),
    ],
)
def test_a_judge_errs_as_its_name_says(name, response, met):
    found = roles.erring(MADE, name, response, roles.random.Random(0))
    assert {key for key in CRITERIA if found[key]} == met and found["Answer_Correctness"]


@pytest.mark.parametrize(("name", "share"), [("judge-20", 0.2), ("judge-50", 0.5)])
def test_the_share_that_a_noisy_judge_flips_is_the_one_it_is_called_by(name, share):
    rng = roles.random.Random(0)
    flipped = [roles.erring(MADE, name, "", rng)[key] for _ in range(2000) for key in CRITERIA]
    assert sum(flipped) / len(flipped) == pytest.approx(share, abs=0.02)


@pytest.fixture(scope="module")
def chains(world, tmp_path_factory):
    return sample_teachers(world, ["hasty", "bookish", "thorough"], 4, tmp_path_factory.mktemp("c"))


def judged(world, chains, out, name: str) -> dict:
    args = ["--judge", f"clinic:{name}", "--chains", str(chains), "--images", str(world)]
    report.__main__.main(
        ["judge", *args, "--questions", str(world / "test.jsonl"), "--out", str(out)]
    )
    return json.loads((out / "judge.json").read_text())["criteria"]


def test_a_judge_without_errors_is_measured_as_one(world, chains, tmp_path):
    found = judged(world, chains, tmp_path / "out", "judge")
    for name in CRITERIA:
        one = found[name]
        assert one["sensitivity"][0] == one["specificity"][0] == one["kappa"] == 1.0
        assert one["moves"] == one["truth_moves"]
    assert found["No_Hallucination"]["moves"][0] > 0.2
    assert found["Reflection_Presence"]["moves"][0] == 0.0  # it is in the chain alone


def test_a_blind_judge_sees_no_hallucination_and_does_not_move(world, chains, tmp_path):
    found = judged(world, chains, tmp_path / "out", "judge-blind")["No_Hallucination"]
    assert found["sensitivity"][0] == 1.0 and found["specificity"][0] == 0.0
    assert found["moves"][0] == 0.0 and found["truth_moves"][0] > 0.2


def test_a_lenient_judge_lets_about_half_of_what_fails_pass(world, chains, tmp_path):
    found = judged(world, chains, tmp_path / "out", "judge-lenient")
    failing = found["Reflection_Presence"]["specificity"]
    assert failing[1] < 0.5 < failing[2] and found["Reflection_Presence"]["sensitivity"][0] == 1.0


def test_a_text_counts_once_however_often_it_was_sampled(world, chains, tmp_path):
    rows = [row for _, row in data.read_jsonl(chains)]
    twice = [*rows, *({**row, "sample": row["sample"] + len(rows)} for row in rows)]
    data.write_jsonl(tmp_path / "twice.jsonl", twice)
    once = judged(world, chains, tmp_path / "once", "judge-lenient")
    assert judged(world, tmp_path / "twice.jsonl", tmp_path / "out", "judge-lenient") == once


def test_two_judges_are_compared_by_stage_on_the_chains_that_both_read(tmp_path, capsys):
    def write(name: str, met: list[bool | None]) -> str:
        rows = [
            {
                "id": str(i),
                "response_sha": "x",
                "criteria": m if m is None else dict.fromkeys(CRITERIA, m),
            }
            for i, m in enumerate(met)
        ]
        data.write_jsonl(tmp_path / name / "verdicts.jsonl", rows)
        return str(tmp_path / name)

    first = [write("a1", [True, True, False, False, None]), write("a2", [True, True])]
    second = [write("b1", [True, False, False, False, True]), write("b2", [True, True])]
    report.__main__.main(["judges", "--first", *first, "--second", *second])
    out = capsys.readouterr().out
    cells = [re.split(r" *\| *", line)[1:-1] for line in out.splitlines() if " all " in line]
    # agreement 3 of 4; by chance .5 * .25 + .5 * .75 = .5, so kappa is (.75 - .5) / .5
    assert cells[0] == ["a1", "all", "4", "0.50", "0.25", "0.25", "0.75", "0.50"]
    assert cells[1][:7] == ["a2", "all", "2", "1.00", "1.00", "0.00", "1.00"]


def test_unreadable_verdicts_have_no_figures():
    found = judging.measure([None], [dict.fromkeys(CRITERIA, True)], [None], [None])
    assert all(one["sensitivity"] is None for one in found.values())
