"""Humans against the judge: kappa and intervals by hand, the blinded sheet, every mistake a rater
can make, and a simulated rater whose error rates are known."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import judge
import report.__main__
from command import schema
from report import agreement

OPTIONS = {"A": "CT", "B": "MRI"}
CASES = 400
JUDGE_YES = dict(zip(judge.CRITERIA, (0.9, 0.7, 0.5, 0.6)))
FLIPPED = dict(
    zip(judge.CRITERIA, (0.05, 0.1, 0.2, 0.3))
)  # how often the simulated rater says the contrary of the judge


# --------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize(
    "both_yes, only_first, only_second, both_no, expected",
    [
        (20, 5, 10, 15, 0.4),  # p_o = 0.7; p_e = 0.5 x 0.6 + 0.5 x 0.4 = 0.5
        (45, 15, 25, 15, 3 / 23),  # p_o = 0.6; p_e = 0.6 x 0.7 + 0.4 x 0.3 = 0.54; 0.06 / 0.46
        (25, 35, 5, 35, 7 / 27),  # p_o = 0.6; p_e = 0.6 x 0.3 + 0.4 x 0.7 = 0.46; 0.14 / 0.54
        (7, 0, 0, 3, 1.0),
        (0, 5, 5, 0, -1.0),  # p_o = 0; p_e = 0.5
        (25, 25, 25, 25, 0.0),
        (10, 0, 0, 0, None),  # p_e = 1
    ],
)
def test_kappa_has_the_figures_worked_out_by_hand(
    both_yes, only_first, only_second, both_no, expected
):
    pairs = (
        [(True, True)] * both_yes
        + [(True, False)] * only_first
        + [(False, True)] * only_second
        + [(False, False)] * both_no
    )
    assert agreement.kappa(*np.array(pairs).T) == (
        None if expected is None else pytest.approx(expected, abs=1e-12)
    )


def test_score_figures_by_hand():
    """Five cases, differences 0, 0, +1, -1, -3: mean -0.6. The squares around it are 0.36, 0.36,
    2.56, 0.16 and 5.76; their sum is 9.2, and 9.2 / 4 = 2.3."""

    def met(count: int) -> list[bool]:
        return [index < count for index in range(4)]

    cases = np.array(
        [[met(human), met(judged)] for human, judged in ((4, 4), (2, 2), (3, 2), (3, 4), (0, 3))]
    )
    figures = agreement.agreement(cases)
    assert agreement.differences(cases).tolist() == [0, 0, 1, -1, -3]
    assert figures["mean"] == pytest.approx(-0.6) and figures["sd"] == pytest.approx(2.3**0.5)
    # within 1.517 of 0: all but -3; within 1.517 of -0.6, which is -2.117 to 0.917: 0, 0, -1
    assert figures["within_sd_of_0"] == 0.8 and figures["within_sd_of_mean"] == 0.6
    assert (
        figures["all.human_yes"] == 0.2
        and figures["all.judge_yes"] == 0.4
        and figures["all.accuracy"] == 0.8
    )
    first = judge.CRITERIA[0]  # humans: Y Y Y Y N, judge: Y Y Y Y Y
    assert (
        figures[f"{first}.human_yes"],
        figures[f"{first}.judge_yes"],
        figures[f"{first}.accuracy"],
        figures[f"{first}.kappa"],
    ) == (0.8, 1.0, 0.8, 0.0)


def test_scores_of_several_raters_are_averaged_and_their_answers_counted_one_by_one():
    yes, no = [True] * 4, [False] * 4
    cases = np.array([[yes, yes, no, yes], [no, no, no, no]])
    assert agreement.differences(cases).tolist() == [pytest.approx(8 / 3 - 4), 0]
    assert agreement.agreement(cases)["all.accuracy"] == pytest.approx(5 / 6)


def test_bootstrap_interval_of_a_share_is_that_of_the_normal_law():
    cases = np.array([1.0] * 120 + [0.0] * 280)
    (low, high) = agreement.agreement_intervals(
        cases, lambda drawn: {"share": drawn.mean()}, 2000, 0
    )["share"]
    error = 1.96 * (0.3 * 0.7 / 400) ** 0.5  # 0.0449
    assert low == pytest.approx(0.3 - error, abs=0.006) and high == pytest.approx(
        0.3 + error, abs=0.006
    )


def test_bootstrap_covers_the_truth_about_nineteen_times_in_twenty():
    rng, covered = random.Random(1), 0
    for trial in range(100):
        cases = np.array([float(rng.random() < 0.4) for _ in range(80)])
        low, high = agreement.agreement_intervals(
            cases, lambda drawn: {"share": drawn.mean()}, 200, trial
        )["share"]
        covered += low <= 0.4 <= high
    assert 88 <= covered <= 100


def test_bootstrap_leaves_out_draws_without_a_figure_and_is_the_same_for_one_seed():
    figure = lambda drawn: {"never": None, "sometimes": agreement.kappa(*drawn.T)}  # noqa: E731
    cases = np.array([(True, True)] * 3 + [(False, False)])
    first = agreement.agreement_intervals(cases, figure, 200, 5)
    assert (
        first["never"] is None
        and first["sometimes"] == (1.0, 1.0)
        and first == agreement.agreement_intervals(cases, figure, 200, 5)
    )


# --------------------------------------------------------------------------------------------------
# The sheet


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Questions with one or two films, rollouts, and the verdicts of a judge with the shares of
    JUDGE_YES."""
    folder, rng = tmp_path_factory.mktemp("study"), random.Random(0)
    (folder / "films").mkdir()
    for index in range(3):
        Image.new("L", (8, 8), 40 * index).save(folder / "films" / f"nodule{index}.png")
    questions, rollouts, verdicts = [], [], []
    for number in range(CASES // 4 + 10):
        films = [f"films/nodule{number % 3}.png", "films/nodule0.png"][: 1 + number % 2]
        question = data.Question(
            f'Fièvre ≥ 39 °C, case {number}:\nwhich, "MRI" or CT?', OPTIONS, "B", films
        )
        questions.append(question.to_row())
        for k in range(4):
            response = data.join_response(f"Chain {k},\nof {number}; the film says so.", "B")
            row = {
                "id": question.id,
                "sample": k,
                "response": response,
                "finish_reason": "stop",
                "token_ids": None,
                "response_sha": data.content_hash(response)[:16],
            }
            said = {
                "Answer_Correctness": "Yes",
                **{
                    name: "Yes" if rng.random() < JUDGE_YES[name] else "No"
                    for name in judge.CRITERIA
                },
            }
            rollouts += (
                [row, {**row, "sample": k + 4}] if number % 5 == 0 else [row]
            )  # some texts came twice
            verdicts += [
                judge.verdict_row(
                    row,
                    "double:judge",
                    {
                        "raw": json.dumps(said) if (number, k) != (0, 0) else "no verdict",
                        "finish_reason": "stop",
                    },
                )
                for row in rollouts[len(verdicts) :]
            ]
    data.write_jsonl(folder / "questions.jsonl", questions)
    data.write_jsonl(folder / "rollouts.jsonl", rollouts)
    data.write_jsonl(folder / "verdicts.jsonl", verdicts)
    return folder


def draw(study: Path, out: Path, n: int = CASES, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """(rows of the sheet, rows of the key)"""
    files = [f"--{name}={study / name}.jsonl" for name in ("rollouts", "questions", "verdicts")]
    report.__main__.main(
        [
            "sample",
            "-n",
            str(n),
            *files,
            "--images",
            str(study),
            "--out",
            str(out),
            "--seed",
            str(seed),
        ]
    )
    with open(out / "sheet" / "sheet.csv", newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file)), [row for _, row in data.read_jsonl(out / "key.jsonl")]


@pytest.fixture(scope="module")
def drawn(study, tmp_path_factory) -> tuple[Path, list[dict], list[dict]]:
    out = tmp_path_factory.mktemp("drawn")
    return out, *draw(study, out)


def test_the_sheet_has_all_that_a_rater_needs_and_nothing_that_the_judge_said(study, drawn):
    out, rows, key = drawn
    questions = {
        question.id: question for question in schema.read_questions(study / "questions.jsonl")
    }
    texts = {
        (row["id"], row["response_sha"]): row["response"]
        for _, row in data.read_jsonl(study / "rollouts.jsonl")
    }
    assert list(rows[0]) == [
        "id",
        "question",
        "options",
        "answer",
        "response",
        "images",
        *judge.CRITERIA,
    ]
    assert (
        [row["id"] for row in rows]
        == [entry["case"] for entry in key]
        == [f"case-{n:04d}" for n in range(1, CASES + 1)]
    )
    for row, entry in zip(rows, key):
        asked = questions[entry["id"]]
        assert (row["question"], row["options"], row["answer"]) == (
            asked.question,
            "(A) CT\n(B) MRI",
            "B. MRI",
        )
        assert row["response"] == texts[entry["id"], entry["response_sha"]] and all(
            row[name] == "" for name in judge.CRITERIA
        )
        copies = row["images"].split()
        assert [(out / "sheet" / "images" / name).read_bytes() for name in copies] == [
            (study / image).read_bytes() for image in asked.images
        ]
    shown = (out / "sheet" / "sheet.csv").read_text(encoding="utf-8-sig")
    assert not any(
        word in shown for word in ("nodule", "double:judge", *[entry["id"] for entry in key])
    )  # no file name that tells, no judge, no way back
    assert {path.name for path in (out / "sheet").iterdir()} == {
        "sheet.csv",
        "images",
    }  # what is given to raters holds no key
    assert len({(entry["id"], entry["response_sha"]) for entry in key}) == CASES  # no text twice


def test_the_draw_follows_from_the_seed(study, drawn, tmp_path):
    _, rows, key = drawn
    assert draw(study, tmp_path / "again") == (rows, key)
    assert draw(study, tmp_path / "other", seed=1)[1] != key


def test_a_chain_without_a_readable_verdict_is_never_drawn_and_too_many_cases_are_refused(
    study, tmp_path
):
    unread = next(
        row for _, row in data.read_jsonl(study / "verdicts.jsonl") if row["criteria"] is None
    )
    _, key = draw(study, tmp_path / "all", CASES + 39)  # 110 questions of four chains, less one
    assert (unread["id"], unread["response_sha"]) not in {
        (entry["id"], entry["response_sha"]) for entry in key
    }
    with pytest.raises(
        data.RowError, match="439 chains have a readable verdict, fewer than -n 440"
    ):
        draw(study, tmp_path / "more", CASES + 40)


def test_a_sheet_that_may_be_half_filled_in_is_not_written_over(study, tmp_path, capsys):
    out = tmp_path / "out"
    draw(study, out, 5)
    sheet = out / "sheet" / "sheet.csv"
    filled = sheet.read_bytes().replace(b",,,\r\n", b",Yes,,\r\n", 1)
    assert filled != sheet.read_bytes()
    sheet.write_bytes(filled)
    capsys.readouterr()
    draw(study, out, 5)  # the same command has nothing to do
    assert "is finished already" in capsys.readouterr().out and sheet.read_bytes() == filled
    with pytest.raises(data.RowError, match="other settings.*seed 0 -> 1.*another folder"):
        draw(study, out, 5, seed=1)
    assert sheet.read_bytes() == filled
    (out / "stage.json").unlink()  # as if it had been killed before its last line
    with pytest.raises(data.RowError, match=r"sheet\.csv: .*a human may have filled it in; move"):
        draw(study, out, 5)
    assert sheet.read_bytes() == filled


# --------------------------------------------------------------------------------------------------
# Filled in


def fill(study: Path, drawn, path: Path, seed: int, flipped: dict = FLIPPED) -> list[dict]:
    """A rater who agrees with the judge, but errs at known rates. Returns the rows."""
    _, rows, key = drawn
    verdicts = {
        (row["id"], row["response_sha"]): row["criteria"]
        for _, row in data.read_jsonl(study / "verdicts.jsonl")
    }
    rng, filled = random.Random(seed), []
    for row, entry in zip(rows, key):
        said = {
            name: verdicts[entry["id"], entry["response_sha"]][name]
            != (rng.random() < flipped[name])
            for name in judge.CRITERIA
        }
        filled.append(
            {
                **row,
                **{
                    name: ("Yes" if yes else "No") if rng.random() < 0.8 else (" y" if yes else "0")
                    for name, yes in said.items()
                },
            }
        )
    rng.shuffle(filled)  # a rater may sort the rows
    write(path, filled)
    return filled


def write(path: Path, rows: list[dict], encoding: str = "utf-8-sig", delimiter: str = ",") -> None:
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def agree(study: Path, drawn, sheets: list[Path], out: Path) -> dict:
    report.__main__.main(
        [
            "agree",
            "--human",
            *map(str, sheets),
            "--key",
            str(drawn[0] / "key.jsonl"),
            "--verdicts",
            str(study / "verdicts.jsonl"),
            "--out",
            str(out),
        ]
    )
    return json.loads((out / "agreement.json").read_text())


@pytest.fixture(scope="module")
def compared(study, drawn, tmp_path_factory) -> Path:
    """`agree` with one simulated rater"""
    folder = tmp_path_factory.mktemp("agree")
    fill(study, drawn, folder / "rater.csv", 3)
    agree(study, drawn, [folder / "rater.csv"], folder / "out")
    return folder


def test_agree_finds_the_error_rates_of_a_simulated_rater(study, drawn, compared):
    found = json.loads((compared / "out" / "agreement.json").read_text())
    figures, intervals = found["figures"], found["intervals"]
    assert (found["cases"], found["raters"]) == (CASES, 1)
    shift = 0.0
    for name, error in FLIPPED.items():
        yes = figures[f"{name}.judge_yes"]
        assert yes == pytest.approx(JUDGE_YES[name], abs=0.08)
        human = (
            yes * (1 - error) + (1 - yes) * error
        )  # the rater says Yes to both: right about a Yes, wrong about a No
        chance = yes * human + (1 - yes) * (1 - human)
        expected = {
            "human_yes": human,
            "accuracy": 1 - error,
            "kappa": (1 - error - chance) / (1 - chance),
        }
        for figure, value in expected.items():
            low, high = intervals[f"{name}.{figure}"]
            assert low - 0.01 <= value <= high + 0.01, (name, figure, value, low, high)
        shift += human - yes
    low, high = intervals["mean"]
    assert low <= shift <= high and low < figures["mean"] < high
    # each criterion's difference is -1, 0 or +1, and not 0 at its error rate
    variance = sum(
        e - (f - y) ** 2
        for e, f, y in (
            (e, figures[f"{n}.human_yes"], figures[f"{n}.judge_yes"]) for n, e in FLIPPED.items()
        )
    )
    assert figures["sd"] == pytest.approx(variance**0.5, abs=0.08)
    width = {name: high - low for name, (low, high) in intervals.items()}
    assert width["No_Hallucination.accuracy"] == pytest.approx(
        2 * 1.96 * (0.2 * 0.8 / CASES) ** 0.5, rel=0.2
    )


def test_a_rater_who_says_what_the_judge_said_agrees_in_everything(study, drawn, tmp_path):
    fill(study, drawn, tmp_path / "rater.csv", 0, dict.fromkeys(judge.CRITERIA, 0.0))
    figures = agree(study, drawn, [tmp_path / "rater.csv"], tmp_path / "out")["figures"]
    assert (figures["mean"], figures["sd"], figures["within_sd_of_0"]) == (0, 0, 1)
    assert all(
        figures[f"{name}.accuracy"] == figures[f"{name}.kappa"] == 1
        for name in (*judge.CRITERIA, "all")
    )


def test_three_raters_are_nearer_to_the_judge_than_one(study, drawn, compared, tmp_path):
    sheets = [tmp_path / f"rater{seed}.csv" for seed in range(3)]
    for seed, path in enumerate(sheets):
        fill(study, drawn, path, seed)
    found = agree(study, drawn, sheets, tmp_path / "out")
    alone = json.loads((compared / "out" / "agreement.json").read_text())["figures"]["sd"]
    assert found["raters"] == 3 and found["figures"]["sd"] < 0.75 * alone
    assert found["figures"]["No_Hallucination.accuracy"] == pytest.approx(0.8, abs=0.04)


def test_the_histogram_is_drawn(compared):
    with Image.open(compared / "out" / "agreement.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert min(picture.size) > 400
    bars = (pixels == (0x5B, 0x8D, 0xB8)).all(1).mean()
    assert 0.03 < bars < 0.5


def test_a_case_with_an_unreadable_verdict_of_another_judge_is_left_out_and_counted(
    study, drawn, compared, tmp_path, capsys
):
    _, _, key = drawn
    rows = [row for _, row in data.read_jsonl(study / "verdicts.jsonl")]
    lost = (key[0]["id"], key[0]["response_sha"])
    data.write_jsonl(
        tmp_path / "verdicts.jsonl",
        (
            {**row, "criteria": None} if (row["id"], row["response_sha"]) == lost else row
            for row in rows
        ),
    )
    found = agree(tmp_path, drawn, [compared / "rater.csv"], tmp_path / "one")
    assert (
        found["cases"] == CASES - 1
        and "1 left out for an unreadable verdict" in capsys.readouterr().out
    )
    data.write_jsonl(
        tmp_path / "verdicts.jsonl",
        (row for row in rows if (row["id"], row["response_sha"]) != lost),
    )
    with pytest.raises(
        data.RowError,
        match=r"verdicts\.jsonl: no verdict on 1 of 400 cases, the first is case-0001",
    ):
        agree(tmp_path, drawn, [compared / "rater.csv"], tmp_path / "two")


MISTAKES = {
    "a word that is neither": (
        lambda rows: rows[6].update(No_Hallucination="maybe"),
        r"row 8 \(case-0007\), column No_Hallucination: 'maybe' is neither Yes nor No",
    ),
    "an empty cell": (
        lambda rows: rows[0].update(Reflection_Presence=" "),
        r"row 2 \(case-0001\), column Reflection_Presence: is empty",
    ),
    "a row of another sheet": (
        lambda rows: rows[2].update(id="case-9999"),
        r"row 4 \(case-9999\), column id: is not a case of the key",
    ),
    "a row twice": (
        lambda rows: rows.append(dict(rows[4])),
        r"row 402 \(case-0005\), column id: is there twice",
    ),
    "a row lost": (lambda rows: rows.pop(10), r"case-0011 is missing"),
    "a column lost": (
        lambda rows: [row.pop("No_Hallucination") for row in rows],
        r"no column 'No_Hallucination'",
    ),
    "many": (
        lambda rows: [row.update(No_Hallucination="?") for row in rows],
        r"400 mistakes.*row 21 .*\.\.\. and 380 more",
    ),
    "many of several kinds": (
        lambda rows: (rows[0].update(id="case-9999"), rows[6].update(No_Hallucination="maybe")),
        r"3 mistakes; nothing was computed.*row 2 \(case-9999\).*row 8 .*case-0001 is missing",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_sheet_with_a_mistake_is_refused_by_file_row_and_column(study, drawn, tmp_path, name):
    spoil, message = MISTAKES[name]
    rows = [{**row, **dict.fromkeys(judge.CRITERIA, "Yes")} for row in drawn[1]]
    spoil(rows)
    write(tmp_path / "rater.csv", rows)
    with pytest.raises(data.RowError, match=r"(?s)rater\.csv: .*" + message):
        agree(study, drawn, [tmp_path / "rater.csv"], tmp_path / "out")
    assert not list((tmp_path / "out").glob("agreement.*"))


def test_rows_that_end_too_early_are_listed_together(study, drawn, tmp_path):
    """A spreadsheet may drop the empty cells at the end of a row."""
    write(tmp_path / "rater.csv", drawn[1])
    whole = (tmp_path / "rater.csv").read_bytes()
    (tmp_path / "rater.csv").write_bytes(whole.replace(b",,,\r\n", b"\r\n"))
    said = r"row 2: no column 'Image_Analysis_Involvement'.*row 3: .*\.\.\. and 1180 more.*commas"
    with pytest.raises(data.RowError, match=r"rater\.csv: " + said):
        agree(study, drawn, [tmp_path / "rater.csv"], tmp_path / "out")


@pytest.mark.parametrize(
    "encoding, delimiter, message",
    [
        ("utf-8", ";", "no column 'id'.*commas"),
        ("latin-1", ",", "cannot be read.*UTF-8"),
        (None, None, "no such file.*check the path"),
    ],
)
def test_a_sheet_saved_another_way_is_refused_with_what_to_do(
    study, drawn, tmp_path, encoding, delimiter, message
):
    if encoding:
        rows = [
            {
                **row,
                "question": row["question"].replace("≥", ">"),
                **dict.fromkeys(judge.CRITERIA, "Yes"),
            }
            for row in drawn[1]
        ]
        write(tmp_path / "rater.csv", rows, encoding, delimiter)
    with pytest.raises(data.RowError, match=r"rater\.csv: " + message):
        agree(study, drawn, [tmp_path / "rater.csv"], tmp_path / "out")
    assert not list(tmp_path.glob("out/agreement.*"))
