"""What several runs show: differences and intervals from files whose answer is known by
construction."""

import pytest

import data
import report.__main__
from judge import CRITERIA
from report import claims, score


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


def measured(tmp_path) -> dict[str, dict]:
    for seed in (0, 1):
        run = tmp_path / str(seed)
        write_stage(run / "eval-base", [1] * 40, [0] * 40, [2] * 40, [1] * 40)
        write_stage(run / "eval-stage1", [2] * 40, [1] * 40, [4] * 40, [2] * 40)
        write_stage(run / "eval-stage2", [3] * 40, [2] * 40, [4] * 40, [1] * 40)
    return {row["claim"]: row for row in claims.measure_claims([tmp_path / "0", tmp_path / "1"])}


def test_differences_are_those_of_the_files(tmp_path):
    found = list(measured(tmp_path).values())
    assert [row["levels"][0] for row in found] == [
        (0.25, 0.5),
        (0.25, 0.5),
        (0.5, 0.75),
        (0.5, 0.25),
        (0.75, 1.0),
    ]
    assert [round(row["mean"], 6) for row in found] == [0.25, 0.25, 0.25, -0.25, 0.25]
    # every question is the same, so resampling questions changes nothing
    assert all(
        abs(row["low"] - row["mean"]) < 1e-9 and abs(row["high"] - row["mean"]) < 1e-9
        for row in found
    )
    assert all(row["shown"] for row in found)


def test_a_claim_that_does_not_show_is_said_not_to(tmp_path):
    for name, right in (
        ("eval-base", [2] * 40),
        ("eval-stage1", [1, 3] * 20),
        ("eval-stage2", [1, 3] * 20),
    ):
        write_stage(tmp_path / "run" / name, right, [1] * 40, [4] * 40, [2] * 40)
    found = claims.measure_claims([tmp_path / "run"])
    assert (
        found[0]["mean"] == 0 and found[0]["low"] < 0 < found[0]["high"] and not found[0]["shown"]
    )
    assert not found[1]["shown"] and not found[3]["shown"]


def test_the_table_marks_what_is_not_shown(tmp_path, capsys):
    for name in ("eval-base", "eval-stage1", "eval-stage2"):
        write_stage(tmp_path / "run" / name, [2] * 10, [1] * 10, [4] * 10, [2] * 10)
    report.__main__.main(
        ["claims", "--runs", str(tmp_path / "run"), "--out", str(tmp_path / "CLAIMS.md")]
    )
    text = (tmp_path / "CLAIMS.md").read_text()
    assert "**no**" in text and text.count("\n|") == 2 + len(claims.CLAIMS)


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
