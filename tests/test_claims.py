"""What several runs show: differences and intervals from files whose answer is known by
construction."""

from collections import defaultdict
from dataclasses import replace

import pytest

import data
import report.__main__
from clinic import world as clinic_world
from judge import CRITERIA
from report import claims, miniature, score


def write_stage(
    folder, right: list[int], met: list[int], looking: list[int], false: list[int]
) -> None:
    """Four samples a question: how many are right, meet all criteria, look at the image, and look
    and hallucinate."""
    entries = []
    for number, (r, m, look, wrong) in enumerate(zip(right, met, looking, false)):
        question, rows, verdicts = (
            data.Question("Q", {"A": "x", "B": "y"}, "A", ["film.png"], id=str(number)),
            [],
            {},
        )
        for k in range(4):
            rows.append(
                {
                    "id": question.id,
                    "sample": k,
                    "extracted": "A" if k < r else "B",
                    "correct": k < r,
                    "response": "",
                    "finish_reason": "stop",
                }
            )
            criteria = verdicts[question.id, k] = dict.fromkeys(CRITERIA, k < m)
            criteria["Image_Analysis_Involvement"] = k < look
            criteria["No_Hallucination"] = (
                k < 4 - wrong
            )  # the last samples, so that the first may meet all
        entries.append(score.entry(question, rows, verdicts))
    score.write_results(
        folder / "results.json", {"name": folder.name, **score.make_results(entries)}
    )


def claims_of(*folders) -> list[dict]:
    return claims.measure_claims([miniature.run_measures(folder) for folder in folders])


def measured(tmp_path) -> dict[str, dict]:
    for seed in (0, 1):
        run = tmp_path / str(seed)
        write_stage(run / "eval-base", [1] * 40, [0] * 40, [2] * 40, [1] * 40)
        write_stage(run / "eval-stage1", [2] * 40, [1] * 40, [4] * 40, [2] * 40)
        write_stage(run / "eval-stage2", [3] * 40, [2] * 40, [4] * 40, [1] * 40)
    return {row["claim"]: row for row in claims_of(tmp_path / "0", tmp_path / "1")}


def test_differences_are_those_of_the_files(tmp_path):
    found = list(measured(tmp_path).values())
    assert [row["levels"][0] for row in found] == [
        (0.25, 0.5),
        (0.25, 0.5),
        (0.5, 0.75),
        (0.75, 1.0),
        (0.0, 0.0),
        (0.0, 0.5),  # at the base the false sample does not look
        (0.5, 0.25),
    ]
    # every question is the same, so that resampling questions changes nothing; nor do the runs
    for row in found:
        before, after = row["levels"][0]
        assert row["differences"] == [[after - before] * 3] * 2
        assert (row["mean"], row["low"], row["high"]) == (after - before,) * 3
    assert [row["shown"] for row in found] == [True, True, True, True, False, True, True]


def test_a_question_without_the_measure_on_one_side_counts_on_the_other():
    run = defaultdict(dict)
    run["stage1"] = {"invented": {"a": (1, 1), "b": (0, 1)}}
    run["stage2"] = {"invented": {"b": (1, 1)}}
    (row,) = claims.measure_claims([run])
    assert row["levels"] == [(0.5, 1.0)]


def test_a_claim_that_one_run_contradicts_is_not_shown_whatever_the_mean(tmp_path):
    for seed, after in ((0, 4), (1, 4), (2, 1)):
        run = tmp_path / str(seed)
        for name, right in (("eval-base", 1), ("eval-stage1", after), ("eval-stage2", after)):
            write_stage(run / name, [right] * 40, [1] * 40, [4] * 40, [2] * 40)
    row = claims_of(*(tmp_path / str(seed) for seed in (0, 1, 2)))[0]
    assert [one[0] for one in row["differences"]] == [0.75, 0.75, 0.0] and not row["shown"]
    # by hand: mean .5, standard deviation .433, t of two degrees of freedom 4.303
    assert (row["mean"], row["high"]) == (0.5, pytest.approx(0.5 + 4.303 * 0.4330127 / 3**0.5))


def test_a_difference_within_its_own_interval_is_not_shown(tmp_path):
    for name, right in (("base", [2] * 40), ("stage1", [1, 3] * 20), ("stage2", [1, 3] * 20)):
        write_stage(tmp_path / "run" / f"eval-{name}", right, [1] * 40, [4] * 40, [2] * 40)
    found = claims_of(tmp_path / "run")
    value, low, high = found[0]["differences"][0]
    assert value == 0 and low < 0 < high and not found[0]["shown"]
    assert not found[1]["shown"] and not found[4]["shown"]


def test_false_readings_are_counted_against_the_films(tmp_path, world):
    questions = [row for _, row in data.read_jsonl(world / "test.jsonl") if row["images"]][:3]
    (tmp_path / "world").symlink_to(world)
    rows = []
    for row, wrong in zip(questions, ("sign", "side", "")):
        film = clinic_world.film_truth(world / row["images"][0])
        if wrong == "sign":
            others = clinic_world.SIGNS[film.modality]
            film = replace(film, sign=next(sign for sign in others if sign != film.sign))
        if wrong == "side":
            film = replace(film, side="left" if film.side == "right" else "right")
        check = f"Wait, let me check: {film.diagnosis} fits {film.clue}."
        rows += [{"id": row["id"], "response": f"<think> {film.reading()} {check} </think>"}] * 2
    rows.append({"id": questions[0]["id"], "response": "nothing is read"})
    data.write_jsonl(tmp_path / "eval-base" / "predictions.jsonl", rows)
    named = dict.fromkeys([row["id"] for row in questions], (True, 1))
    found = miniature.of_readings(tmp_path / "eval-base", miniature.films_of(tmp_path), named)
    first, second, third = (row["id"] for row in questions)
    assert found["misread"] == {first: (2, 2), second: (0, 2), third: (0, 2)}
    assert found["sign"] == {first: (0, 2), second: (2, 2), third: (2, 2)}
    assert found["miscounted"] == {first: (0, 2), second: (2, 2), third: (0, 2)}
    assert found["false reading"] == {first: (2, 2), second: (2, 2), third: (0, 2)}
    assert found["false check"] == {first: (2, 2), second: (0, 2), third: (0, 2)}
    assert found["checks"] == {first: (2, 2), second: (2, 2), third: (2, 2)}
    assert found["knows"] == {first: (2, 2)}  # asked for the film alone it names the sign


def test_the_table_marks_what_is_not_shown(tmp_path, capsys):
    for name in ("eval-base", "eval-stage1", "eval-stage2"):
        write_stage(tmp_path / "run" / name, [2] * 10, [1] * 10, [4] * 10, [2] * 10)
    report.__main__.main(
        ["claims", "--runs", str(tmp_path / "run"), "--out", str(tmp_path / "claims.md")]
    )
    text = (tmp_path / "claims.md").read_text()
    assert "**no**" in text and text.count("\n|") == 2 + 7  # those that results.json can tell
    assert (tmp_path / "claims.png").stat().st_size > 5000


# what --out may not name
TAKEN = ("run/eval-base/results.json", "run", "older.md")


@pytest.mark.parametrize("name", TAKEN)
def test_claims_are_never_written_over_something_else(tmp_path, name):
    for stage in ("eval-base", "eval-stage1", "eval-stage2"):
        write_stage(tmp_path / "run" / stage, [2] * 10, [1] * 10, [4] * 10, [2] * 10)
    (tmp_path / "older.md").write_text("the claims of another run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command = ["claims", "--runs", str(tmp_path / "run"), "--out"]
    with pytest.raises(
        data.RowError, match=f"--out .*{name}: is there already, with another content"
    ):
        report.__main__.main([*command, str(tmp_path / name)])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for _ in range(2):  # the same over itself changes nothing
        report.__main__.main([*command, str(tmp_path / "new.md")])
