"""Figures by brute force and by hand: pass@n, majority vote, standard errors, denominators that nothing escapes from."""

import itertools
import json
import math
import statistics
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import evaluate
import judge
import rollout

OPTIONS = {"A": "CT", "B": "MRI", "C": "PET"}
CHOICES = st.lists(st.sampled_from(["A", "B", "C", None]), min_size=1, max_size=8)


# ---------------------------------------------------------------------------------------------------------------
# pass@n


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_n_is_the_share_of_all_subsets_that_hold_a_right_sample(samples):
    for right in range(samples + 1):
        outcome = [k < right for k in range(samples)]
        for n in range(1, samples + 1):
            subsets = list(itertools.combinations(outcome, n))
            expected = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            assert evaluate.pass_at(n, samples, right) == pytest.approx(float(expected), abs=1e-12)


def test_pass_at_n_by_hand():
    # 32 samples, one right: a random half holds it half the time
    assert evaluate.pass_at(16, 32, 1) == pytest.approx(0.5)
    assert evaluate.pass_at(32, 32, 1) == 1 and evaluate.pass_at(32, 32, 0) == 0


@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
@settings(max_examples=60, deadline=None)
def test_pass_at_n_never_falls_with_n_and_begins_at_the_accuracy(drawn):
    samples, right = drawn
    curve = [evaluate.pass_at(n, samples, right) for n in range(1, samples + 1)]
    assert curve[0] == pytest.approx(right / samples)
    assert all(low <= high + 1e-12 for low, high in zip(curve, curve[1:])) and all(0 <= value <= 1 for value in curve)


def test_pass_at_more_than_there_are_samples_is_refused():
    with pytest.raises(ValueError, match="pass@4 needs at least 4"):
        evaluate.pass_at(4, 3, 1)


# ---------------------------------------------------------------------------------------------------------------
# Majority vote


@pytest.mark.parametrize(
    ("choices", "winner"),
    [
        ("ABB", "B"),
        ("AABB", "A"),  # a tie goes to the earliest sampled
        ("BBAA", "B"),
        ("CABAB", "A"),  # C came first but has fewer; of A and B, A came first
        ("A--", "A"),  # unreadable ones abstain: they are no choice that could win
        ("----B", "B"),
        ("-BA", "B"),
        ("---", None),
        ("", None),
    ],
)
def test_majority_by_hand(choices, winner):
    assert evaluate.majority([None if c == "-" else c for c in choices]) == winner


def brute_majority(choices) -> str | None:
    readable = [choice for choice in choices if choice is not None]
    return min(readable, key=lambda c: (-readable.count(c), readable.index(c)), default=None)


@given(CHOICES)
@settings(max_examples=80, deadline=None)
def test_majority_at_all_samples_is_the_plain_vote(choices):
    assert evaluate.majority(choices) == brute_majority(choices)
    assert evaluate.majority_at(len(choices), choices, "A", 0) == (brute_majority(choices) == "A")


@given(CHOICES, st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_majority_of_one_is_the_mean_accuracy_whatever_the_seed(choices, seed):
    assert evaluate.majority_at(1, choices, "A", seed) == pytest.approx(choices.count("A") / len(choices))


@pytest.mark.parametrize("choices", ["AABBB-CA", "ABABABAB", "--A-B-A-", "BBBBBBBA", "AAAAAAAA", "CCBBAAAA"])
@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_majority_at_n_is_near_the_share_over_all_subsets(choices, n):
    choices = [None if c == "-" else c for c in choices]
    subsets = list(itertools.combinations(choices, n))  # in the order sampled
    share = sum(brute_majority(subset) == "A" for subset in subsets) / len(subsets)
    error = math.sqrt(share * (1 - share) / evaluate.SUBSETS)
    assert abs(evaluate.majority_at(n, choices, "A", seed=5) - share) <= 4 * error


def test_majority_at_n_follows_from_its_seed():
    choices = list("AABBCABC")
    assert evaluate.majority_at(4, choices, "A", 1) == evaluate.majority_at(4, choices, "A", 1)
    assert len({evaluate.majority_at(4, choices, "A", seed) for seed in range(10)}) > 1


# ---------------------------------------------------------------------------------------------------------------
# Mean and error


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.25, 0.5, 0.5, 1.0], [0.1] * 5, [1.0, 0.0, 0.0, 0.0, 0.75]])
def test_standard_error_is_over_questions(values):
    mean, error = evaluate.mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)))


def test_standard_error_by_hand_and_of_one_question():
    # mean 1/2, squared differences 1/4 + 1/4, divided by 2 - 1, root, divided by the root of 2
    assert evaluate.mean_and_error([0.0, 1.0]) == pytest.approx((0.5, math.sqrt(0.5) / math.sqrt(2)))
    assert evaluate.mean_and_error([0.5]) == (0.5, 0.0)


@pytest.mark.parametrize(("most", "expected"), [(1, [1]), (2, [1, 2]), (7, [1, 2, 4]), (8, [1, 2, 4, 8]), (32, [1, 2, 4, 8, 16, 32])])
def test_curves_are_drawn_at_powers_of_two(most, expected):
    assert evaluate.powers_of_two(most) == expected


# ---------------------------------------------------------------------------------------------------------------
# A summary, by hand. Letters are choices, "-" is an unreadable answer, "!" one that was cut off.


def made(key: str, answer: str, choices: str) -> tuple[data.Question, list[dict]]:
    rows = []
    for k, choice in enumerate(choices):
        said = None if choice in "-!" else choice
        rows.append(
            {
                "id": key,
                "sample": k,
                "response": "two words" if k % 2 else "three little words",
                "finish_reason": "length" if choice == "!" else "stop",
                "extracted": said,
                "correct": said == answer,
            }
        )
    return data.Question(key, OPTIONS, answer, id=key), rows


def summary(*parts, criteria=None) -> dict:
    return evaluate.summarise([row for _, rows in parts for row in rows], [question for question, _ in parts], criteria or {})


def test_summary_by_hand():
    figures = summary(made("p", "A", "AAB-"), made("q", "B", "BBBB"), made("r", "C", "AA!!"))
    shares = [2 / 4, 1, 0]
    assert figures["questions"] == 3 and figures["samples"] == 4
    assert figures["accuracy"] == pytest.approx(sum(shares) / 3)
    assert figures["standard_error"] == pytest.approx(statistics.stdev(shares) / 3**0.5)
    assert figures["unparsed"] == pytest.approx(3 / 12) and figures["cut_off"] == pytest.approx(2 / 12)
    assert figures["words"] == pytest.approx(2.5)
    assert list(figures["majority"]) == list(figures["pass"]) == ["1", "2", "4"]
    assert figures["majority"]["4"][0] == pytest.approx(2 / 3)  # p: A, q: B, r: A
    assert figures["pass"]["4"][0] == pytest.approx(2 / 3)
    # p has 2 right of 4: of the six pairs only the one of both wrong holds none
    assert figures["pass"]["2"][0] == pytest.approx((5 / 6 + 1 + 0) / 3)
    assert "criteria" not in figures


def test_unparsed_and_cut_off_answers_stay_in_the_denominator():
    with_them, without = summary(made("p", "A", "AA--")), summary(made("p", "A", "AABB"))
    cut = summary(made("p", "A", "AA!!"))
    assert with_them["accuracy"] == without["accuracy"] == cut["accuracy"] == 0.5
    assert summary(made("p", "A", "----"))["accuracy"] == 0 == summary(made("p", "A", "!!!!"))["majority"]["4"][0]


@given(st.lists(st.text("ABC-!", min_size=4, max_size=4), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_mv_at_1_equals_pass_at_1_equals_accuracy(choices):
    figures = summary(*(made(str(i), "ABC"[i % 3], text) for i, text in enumerate(choices)))
    accuracy = (figures["accuracy"], figures["standard_error"])
    assert figures["majority"]["1"] == pytest.approx(accuracy) and figures["pass"]["1"] == pytest.approx(accuracy)
    passes = [value for value, _ in figures["pass"].values()]
    assert passes == sorted(passes)


def verdict(*failed: str) -> dict:
    return {key: key not in failed for key in judge.KEYS}


def test_criteria_by_hand_and_hallucination_among_looking_chains_only():
    parts = made("p", "A", "AAAB"), made("q", "B", "BA--")
    look, true = "Image_Analysis_Involvement", "No_Hallucination"
    criteria = {
        ("p", 0): verdict(),
        ("p", 1): verdict(true),  # looks, and sees what is not there
        ("p", 2): verdict(look),
        ("p", 3): verdict(look, true),  # does not look: its false claims are not about the image
        ("q", 0): verdict("Reflection_Presence"),
        ("q", 1): verdict("Answer_Correctness"),  # a wrong answer, all four criteria met
        ("q", 2): None,  # an unreadable verdict
    }  # and none of ("q", 3)
    figures = summary(*parts, criteria=criteria)
    assert figures["judged"] == 6
    assert figures["criteria"] == pytest.approx({"Logical_Consistency": 1, look: 4 / 6, true: 4 / 6, "Reflection_Presence": 5 / 6})
    assert figures["looking"] == 4 and figures["hallucinated"] == pytest.approx(1 / 4)
    # all four criteria: 1 of 4 chains of p, 1 of 2 of q; the error is over questions
    assert figures["all_criteria"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert figures["all_criteria_error"] == pytest.approx(statistics.stdev([0.25, 0.5]) / 2**0.5)


def test_nobody_who_looks_is_no_share_and_not_zero():
    figures = summary(made("p", "A", "AA"), criteria={("p", 0): verdict("Image_Analysis_Involvement"), ("p", 1): None})
    assert figures["looking"] == 0 and figures["hallucinated"] is None
    row = next(line for line in evaluate.table([{"name": "s", "groups": {"image": figures}}]).splitlines() if "of those that look" in line)
    assert "–" in row


# ---------------------------------------------------------------------------------------------------------------
# The real command on a real world


def run(world: Path, out: Path, *more: str, engine: str = "clinic:thorough") -> dict:
    evaluate.main(["run", "--engine", engine, "--questions", str(world / "test.jsonl"), "--images", str(world), "--out", str(out), *more])
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def stages(world, tmp_path_factory) -> dict[str, Path]:
    """Three evaluations, as of three stages."""
    base = tmp_path_factory.mktemp("eval")
    for engine in ("bookish", "hasty", "thorough"):
        run(world, base / engine, "-n", "8", "--n-text", "4", "--judge", "clinic:judge", engine=f"clinic:{engine}")
    return {engine: base / engine for engine in ("bookish", "hasty", "thorough")}


@pytest.mark.parametrize("engine", ["bookish", "hasty", "thorough"])
def test_accuracy_is_what_the_files_dictate(world, stages, engine):
    results = json.loads((stages[engine] / "results.json").read_text())
    questions = data.read_questions(world / "test.jsonl")
    rows = [row for _, row in data.read_jsonl(stages[engine] / "predictions.jsonl")]
    for kind, samples in (("image", 8), ("text", 4)):
        shares, unread = [], 0
        for question in (q for q in questions if bool(q.images) == (kind == "image")):
            # the teachers write the option's text and nothing more; a spoilt form has its answer inside the thinking
            said = [row["response"].split("</think>")[-1] for row in rows if row["id"] == question.id]
            assert len(said) == samples
            shares.append(sum(f"<answer> {question.options[question.answer]} </answer>" in text for text in said) / samples)
            unread += sum("<answer>" not in text for text in said)
        figures = results["groups"][kind]
        assert figures["accuracy"] == pytest.approx(statistics.fmean(shares)) and figures["accuracy"] > 0.7
        assert figures["standard_error"] == pytest.approx(statistics.stdev(shares) / len(shares) ** 0.5)
        assert figures["unparsed"] == pytest.approx(unread / (samples * len(shares))) and figures["cut_off"] == 0
        assert (figures["questions"], figures["samples"]) == (len(shares), samples)
        assert figures["pass"]["1"] == pytest.approx([figures["accuracy"], figures["standard_error"]]) == figures["majority"]["1"]


def test_criteria_show_what_each_teacher_lacks(stages):
    for engine, lacking in (("bookish", "Image_Analysis_Involvement"), ("hasty", "Reflection_Presence"), ("thorough", None)):
        image = json.loads((stages[engine] / "results.json").read_text())["groups"]["image"]
        for name, share in image["criteria"].items():
            if (engine, name) == ("hasty", "No_Hallucination"):
                assert share < 0.5  # always one sign on the left: true of one film in six
            else:
                assert share == 0 if name == lacking else share > 0.7
        assert image["all_criteria"] == 0 if lacking else image["all_criteria"] > 0.7
        assert image["looking"] == (0 if engine == "bookish" else 48)


def test_every_chain_on_an_image_question_is_judged_right_or_wrong(world, tmp_path):
    results = run(world, tmp_path / "out", "-n", "8", "--judge", "clinic:judge", engine="clinic:expert-a")  # wrong a quarter of the time
    verdicts = {(row["id"], row["sample"]) for _, row in data.read_jsonl(tmp_path / "out" / "verdicts.jsonl")}
    assert verdicts == {(q.id, k) for q in data.read_questions(world / "test.jsonl") if q.images for k in range(8)}
    assert results["groups"]["image"]["accuracy"] < 1  # so there were wrong ones
    assert "criteria" not in results["groups"]["text"]


def test_subsets_split_the_image_questions(stages):
    results = json.loads((stages["thorough"] / "results.json").read_text())
    for key in ("modality", "kind"):
        parts = [figures for name, figures in results["subsets"].items() if name.startswith(f"{key}=")]
        assert sum(figures["questions"] for figures in parts) == 6
        assert sum(figures["questions"] * figures["accuracy"] for figures in parts) / 6 == pytest.approx(results["groups"]["image"]["accuracy"])


def test_killed_and_resumed_evaluation_gives_the_same_results(world, stages, tmp_path):
    whole = (stages["thorough"] / "replies.jsonl").read_bytes()
    kept = whole[: len(whole) // 2]
    assert not kept.endswith(b"\n")  # killed in the middle of a line
    (tmp_path / "replies.jsonl").write_bytes(kept)
    (tmp_path / "replies.jsonl.settings.json").write_bytes((stages["thorough"] / "replies.jsonl.settings.json").read_bytes())
    results = run(world, tmp_path, "-n", "8", "--n-text", "4", "--judge", "clinic:judge", "--name", "thorough")
    assert results == json.loads((stages["thorough"] / "results.json").read_text())
    assert (tmp_path / "replies.jsonl").read_bytes() == whole
    assert (tmp_path / "predictions.jsonl").read_bytes() == (stages["thorough"] / "predictions.jsonl").read_bytes()


def replies_file(out: Path, question: data.Question, responses: list[tuple[str, str]]) -> None:
    """Stored replies, so that the real command has nothing to ask: what it then says follows from this file alone."""
    rows = [
        {
            "id": question.id,
            "sample": k,
            "engine": "clinic:hasty",
            "response": text,
            "token_ids": None,
            "finish_reason": finish,
            "seed": 0,
            "response_sha": data.content_hash(text)[:16],
        }
        for k, (text, finish) in enumerate(responses)
    ]
    data.write_jsonl(out / "replies.jsonl", rows)


def test_right_answer_that_was_cut_off_counts_as_wrong_and_as_unread(tmp_path):
    question = data.Question("Which one?", OPTIONS, "A")
    data.write_jsonl(tmp_path / "test.jsonl", [question.to_row()])
    good = data.join_response("x", "A")
    replies_file(
        tmp_path / "out",
        question,
        [(good, "stop"), (good, "length"), ("<think> the answer is (A)", "length"), (data.join_response("x", "B"), "stop")],
    )
    figures = run(tmp_path, tmp_path / "out", "-n", "4", engine="clinic:hasty")["groups"]["text"]
    assert (figures["accuracy"], figures["cut_off"], figures["unparsed"]) == (0.25, 0.5, 0.5)


def test_open_ended_answers_are_voted_on_and_only_unreadable_ones_are_unparsed(tmp_path):
    question = data.Question("Which one?", {}, "renal ultrasound")
    data.write_jsonl(tmp_path / "test.jsonl", [question.to_row()])
    said = ["Renal ultrasound.", "CBC", "renal  ultrasound"]
    replies_file(tmp_path / "out", question, [*((data.join_response("x", text), "stop") for text in said), ("<think> no answer", "stop")])
    figures = run(tmp_path, tmp_path / "out", "-n", "4", engine="clinic:hasty")["groups"]["text"]
    assert figures["accuracy"] == 0.5 and figures["unparsed"] == 0.25
    assert figures["majority"]["1"][0] == figures["pass"]["1"][0] == 0.5  # MV@1 = pass@1 = accuracy
    assert figures["majority"]["4"][0] == 1  # two of the three readable ones agree


def test_one_question_in_two_files_is_not_counted_twice(tmp_path):
    rows = [data.Question(f"{name}?", OPTIONS, "A") for name in "pq"]
    data.write_jsonl(tmp_path / "test.jsonl", [row.to_row() for row in rows])
    data.write_jsonl(tmp_path / "more.jsonl", [rows[0].to_row()])
    replies = [
        {
            "id": q.id,
            "sample": 0,
            "engine": "clinic:hasty",
            "response": data.join_response("x", said),
            "token_ids": None,
            "finish_reason": "stop",
            "seed": 0,
            "response_sha": "",
        }
        for q, said in zip(rows, "AB")
    ]
    data.write_jsonl(tmp_path / "out" / "replies.jsonl", replies)
    try:
        evaluate.main(
            [
                "run",
                "--engine",
                "clinic:hasty",
                "--questions",
                str(tmp_path / "test.jsonl"),
                str(tmp_path / "more.jsonl"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
    except data.RowError as error:  # to refuse it is as good, if the message says which question
        assert rows[0].id in str(error)
        return
    figures = json.loads((tmp_path / "out" / "results.json").read_text())["groups"]["text"]
    assert (figures["questions"], figures["accuracy"]) == (2, 0.5)


# ---------------------------------------------------------------------------------------------------------------
# Tables and plots


def load(stages: dict[str, Path]) -> list[dict]:
    return [json.loads((folder / "results.json").read_text()) for folder in stages.values()]


def test_table_has_a_row_a_stage_and_equally_many_cells_in_each(stages):
    results = load(stages)
    lines = evaluate.table(results).splitlines()
    assert len(lines) == 2 + len(evaluate.ROWS) and {line.count("|") for line in lines} == {2 + len(results)} and len(set(map(len, lines))) == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    for column, result in enumerate(results, 1):
        assert cells[0][column] == result["name"]
        assert cells[2][column].startswith(f"{result['groups']['image']['accuracy']:.3f} ± ")
        assert cells[3][column] == f"{result['groups']['image']['majority']['8'][0]:.3f} (n = 8)"


def test_table_of_a_stage_without_a_judge_or_without_text_has_dashes(world, tmp_path):
    image_only = tmp_path / "image.jsonl"
    data.write_jsonl(image_only, [q.to_row() for q in data.read_questions(world / "test.jsonl") if q.images])
    evaluate.main(["run", "--engine", "clinic:hasty", "--questions", str(image_only), "--images", str(world), "--out", str(tmp_path / "out")])
    lines = evaluate.table([json.loads((tmp_path / "out" / "results.json").read_text())]).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and sum(line.split("|")[2].strip() == "–" for line in lines) == 1 + 6  # text, and six figures of the judge


def test_table_of_a_stage_without_image_questions_has_its_row(world, tmp_path):
    text_only = tmp_path / "text.jsonl"
    data.write_jsonl(text_only, [q.to_row() for q in data.read_questions(world / "test.jsonl") if not q.images])
    evaluate.main(["run", "--engine", "clinic:hasty", "--questions", str(text_only), "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    lines = evaluate.table([result]).splitlines()
    assert f"{result['groups']['text']['accuracy']:.3f}" in next(line for line in lines if line.startswith("| text questions"))
    assert "–" in next(line for line in lines if line.startswith("| image questions"))


def colours(path: Path) -> int:
    with Image.open(path) as picture:
        return len(picture.convert("RGB").getcolors(1 << 24))


@pytest.fixture(scope="module")
def reported(world, stages, tmp_path_factory) -> Path:
    """The report over three stages, with training curves and pairs."""
    base = tmp_path_factory.mktemp("report")
    rows = []
    for number, style in enumerate(stages):
        rollout.main(
            ["--engine", f"clinic:{style}", "--questions", str(world / "test.jsonl"), "--images", str(world), "--out", str(base / style), "-n", "2"]
        )
        rows += [{**row, "sample": row["sample"] + 2 * number} for _, row in data.read_jsonl(base / style / "rollouts.jsonl")]
    data.write_jsonl(base / "rollouts.jsonl", rows)
    files = ["--rollouts", str(base / "rollouts.jsonl"), "--questions", str(world / "test.jsonl")]
    judge.main(["verdicts", "--judge", "clinic:judge", *files, "--images", str(world), "--out", str(base / "verdicts")])
    judge.main(["pairs", "--verdicts", str(base / "verdicts" / "verdicts.jsonl"), *files, "--out", str(base / "pairs")])
    data.write_jsonl(
        base / "sft" / "metrics.jsonl",
        [{"step": k, "loss": 2 / (k + 1), "think": 2 / (k + 1), "answer": 1 / (k + 1), "tag": 0.1 / (k + 1)} for k in range(20)],
    )
    data.write_jsonl(
        base / "dpo" / "metrics.jsonl", [{"step": k, "loss": 0.69 - 0.02 * k, "margin": 0.1 * k, "accuracy": 0.5 + 0.02 * k} for k in range(20)]
    )
    evaluate.main(
        [
            "report",
            "--results",
            *map(str, stages.values()),
            "--sft",
            str(base / "sft"),
            "--dpo",
            str(base / "dpo"),
            "--pairs",
            str(base / "pairs"),
            "--images",
            str(world),
            "--out",
            str(base / "report"),
        ]
    )
    return base / "report"


def test_report_writes_its_table_and_says_what_it_was_made_from(stages, reported):
    assert (reported / "table.md").read_text() == evaluate.table(load(stages)) + "\n"
    stage = json.loads((reported / "stage.json").read_text())
    assert set(stage["outputs"]) == {"table.md", "report.png", "films.png"}
    assert {str(folder / "results.json") for folder in stages.values()} < set(stage["inputs"])


@pytest.mark.parametrize("name", ["report.png", "films.png"])
def test_plots_are_written_and_not_empty(reported, name):
    with Image.open(reported / name) as picture:
        assert min(picture.size) > 300
        drawn = np.asarray(picture.convert("L")) < 250
    assert 0.005 < drawn.mean() < 0.9 and colours(reported / name) > 50


def test_report_without_curves_or_pairs_is_a_table(stages, tmp_path):
    evaluate.main(["report", "--results", str(stages["thorough"]), "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["stage.json", "table.md"]
