"""Figures by brute force and by hand: pass@n, majority vote, intervals, paired tests, denominators
that nothing escapes from."""

import itertools
import math
import re
import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import judge
from report import score

OPTIONS = {"A": "CT", "B": "MRI", "C": "PET"}
CHOICES = st.lists(st.sampled_from(["A", "B", "C", None]), min_size=1, max_size=8)


def right_of(choices) -> tuple[bool, ...]:
    return tuple(choice == "A" for choice in choices)


# --------------------------------------------------------------------------------------------------
# pass@n


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_n_is_the_share_of_all_subsets_that_hold_a_right_sample(samples):
    for right in range(samples + 1):
        outcome = [k < right for k in range(samples)]
        for n in range(1, samples + 1):
            subsets = list(itertools.combinations(outcome, n))
            expected = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            assert score.pass_at(n, samples, right) == pytest.approx(float(expected), abs=1e-12)


def test_pass_at_n_by_hand():
    # 32 samples, one right: a random half holds it half the time
    assert score.pass_at(16, 32, 1) == pytest.approx(0.5)
    assert score.pass_at(32, 32, 1) == 1 and score.pass_at(32, 32, 0) == 0


@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
@settings(max_examples=60, deadline=None)
def test_pass_at_n_never_falls_with_n_and_begins_at_the_accuracy(drawn):
    samples, right = drawn
    curve = [score.pass_at(n, samples, right) for n in range(1, samples + 1)]
    assert curve[0] == pytest.approx(right / samples)
    assert all(low <= high + 1e-12 for low, high in zip(curve, curve[1:])) and all(
        0 <= value <= 1 for value in curve
    )


# --------------------------------------------------------------------------------------------------
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
    assert score.majority([None if c == "-" else c for c in choices]) == winner


def brute_majority(choices) -> str | None:
    readable = [choice for choice in choices if choice is not None]
    return min(readable, key=lambda c: (-readable.count(c), readable.index(c)), default=None)


@given(CHOICES)
@settings(max_examples=80, deadline=None)
def test_majority_at_all_samples_is_the_plain_vote(choices):
    assert score.majority(choices) == brute_majority(choices)
    assert score.majority_at(len(choices), tuple(choices), right_of(choices), 0) == (
        brute_majority(choices) == "A"
    )


@given(CHOICES, st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_majority_of_one_is_the_mean_accuracy_whatever_the_seed(choices, seed):
    assert score.majority_at(1, tuple(choices), right_of(choices), seed) == pytest.approx(
        choices.count("A") / len(choices)
    )


@pytest.mark.parametrize(
    "choices", ["AABBB-CA", "ABABABAB", "--A-B-A-", "BBBBBBBA", "AAAAAAAA", "CCBBAAAA"]
)
@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("times", [1, 2])
def test_majority_at_n_is_the_share_over_all_subsets_or_near_it_where_they_are_many(
    choices, n, times
):
    choices = [None if c == "-" else c for c in choices * times]
    subsets = list(itertools.combinations(choices, n))  # in the order sampled
    share = sum(brute_majority(subset) == "A" for subset in subsets) / len(subsets)
    error = math.sqrt(share * (1 - share) / score.VOTE_SUBSETS)
    exact = len(subsets) <= max(score.VOTE_SUBSETS, len(choices))
    found = score.majority_at(n, tuple(choices), right_of(choices), seed=5)
    assert abs(found - share) <= (1e-12 if exact else 4 * error)


def test_answers_that_a_benchmark_accepts_are_one_choice():
    question = data.Question("How many?", {}, "24/7", meta={"answers": ["24/7", "3.429"]})
    said = ["24/7", "3.429", "5", "3.429"]
    rows = [{"response": one, "finish_reason": "stop"} for one in said]
    choices = [score.choice_of(row, question) for row in rows]
    assert choices == ["24/7", "24/7", "5", "24/7"]


def test_majority_at_n_follows_from_its_seed():
    choices = list("AABBCABC") * 2
    right = right_of(choices)
    assert score.majority_at(4, tuple(choices), right, 1) == score.majority_at(
        4, tuple(choices), right, 1
    )
    assert len({score.majority_at(4, tuple(choices), right, seed) for seed in range(10)}) > 1


def test_an_open_ended_vote_is_as_right_as_the_first_sample_that_gave_the_winning_answer():
    said = ["renal stone", "kidney stone", "kidney stone"]
    assert score.vote(said, [False, True, True]) and not score.vote(said, [True, False, False])
    assert not score.vote([None, None], [False, False])


# --------------------------------------------------------------------------------------------------
# Intervals and paired tests


def test_wilsons_interval_of_the_papers_62_percent_of_150_questions():
    low, high = score.wilson(0.62, 150)
    assert (round(low, 3), round(high, 3)) == (0.540, 0.694)


@given(st.integers(1, 3000), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_wilsons_bounds_are_the_shares_that_the_observed_one_is_just_compatible_with(count, share):
    # the interval's definition: every p with |share - p| <= z sqrt(p (1 - p) / count)
    low, high = score.wilson(share, count)
    for bound in (low, high):
        if 0 < bound < 1:
            assert abs(share - bound) == pytest.approx(
                1.959964 * math.sqrt(bound * (1 - bound) / count), rel=1e-4, abs=1e-7
            )
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1


@pytest.mark.parametrize(
    ("one", "two", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (0, 5, 2 / 32),
        (3, 3, 1.0),
        (1, 7, 2 * 9 / 256),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_mcnemar_by_hand(one, two, p):
    assert score.mcnemar(one, two) == pytest.approx(p) == score.mcnemar(two, one)


@pytest.mark.parametrize(("one", "two"), [(2, 4), (5, 1), (0, 6), (4, 4)])
def test_mcnemar_is_the_share_of_coin_rows_at_least_as_uneven(one, two):
    rows = list(itertools.product((0, 1), repeat=one + two))
    assert score.mcnemar(one, two) == pytest.approx(
        sum(abs(2 * sum(row) - one - two) >= abs(one - two) for row in rows) / len(rows)
    )


def test_the_bootstrap_interval_is_near_the_normal_one_where_that_holds():
    values = np.random.default_rng(0).normal(0.1, 1, 400)
    low, high = score.bootstrap(values.tolist())
    half = 1.959964 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.006) and high == pytest.approx(
        values.mean() + half, abs=0.006
    )
    assert score.bootstrap(values.tolist()) == (low, high)  # the same every time
    assert score.bootstrap([0.25] * 9) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (7, [1, 2, 4, 7]),
        (10, [1, 2, 4, 8, 10]),
        (8, [1, 2, 4, 8]),
        (32, [1, 2, 4, 8, 16, 32]),
    ],
)
def test_curves_are_drawn_at_powers_of_two_and_at_all_samples(most, expected):
    assert score.sizes(most) == expected


# --------------------------------------------------------------------------------------------------
# A summary, by hand. Letters are choices, "-" is an unreadable answer, "!" one that was cut off.


def made(
    key: str,
    answer: str,
    choices: str,
    verdicts: dict | None = None,
    text: str = "three little words",
    meta: dict | None = None,
    image: bool = False,
) -> dict:
    question = data.Question(
        key, OPTIONS, answer, ["film.png"] if image else [], meta=meta or {}, id=key
    )
    rows = [
        {
            "id": key,
            "sample": k,
            "response": (
                f"<think> {'two words' if k % 2 else text} </think> <answer> {choice} </answer>"
            ),
            "finish_reason": "length" if choice == "!" else "stop",
            "extracted": None if choice in "-!" else choice,
            "correct": choice == answer,
        }
        for k, choice in enumerate(choices)
    ]
    return score.entry(
        question, rows, {(key, k): verdict for k, verdict in (verdicts or {}).items()}
    )


def test_summary_by_hand():
    figures = score.summarise(
        [made("p", "A", "AAB-"), made("q", "B", "BBBB"), made("r", "C", "AA!!")]
    )
    mean = (2 / 4 + 1 + 0) / 3
    assert figures["questions"] == 3 and figures["samples"] == 4
    assert figures["accuracy"] == pytest.approx([mean, *score.wilson(mean, 3)])
    assert figures["unparsed"] == pytest.approx(3 / 12) and figures["cut_off"] == pytest.approx(
        2 / 12
    )
    assert figures["words"] == pytest.approx(2.5)  # of the thinking
    assert list(figures["majority"]) == list(figures["pass"]) == ["1", "2", "4"]
    assert figures["majority"]["4"][0] == pytest.approx(2 / 3)  # p: A, q: B, r: A
    assert figures["pass"]["4"][0] == pytest.approx(2 / 3)
    # p has 2 right of 4: of the six pairs only the one of both wrong holds none
    assert figures["pass"]["2"][0] == pytest.approx((5 / 6 + 1 + 0) / 3)
    assert "criteria" not in figures and "official" not in figures


def test_unparsed_and_cut_off_answers_stay_in_the_denominator():
    with_them, without, cut = (
        score.summarise([made("p", "A", choices)]) for choices in ("AA--", "AABB", "AA!!")
    )
    assert (
        with_them["accuracy"] == without["accuracy"] == cut["accuracy"]
        and cut["accuracy"][0] == 0.5
    )
    assert (
        score.summarise([made("p", "A", "----")])["accuracy"][0]
        == 0
        == score.summarise([made("p", "A", "!!!!")])["majority"]["4"][0]
    )


@pytest.mark.parametrize(
    ("end", "figure"),
    [
        ("length", "cut_off"),
        ("overlong", "over_long"),
        ("blocked", "unanswered"),
        ("refused", "unanswered"),
        ("empty", "unanswered"),
    ],
)
def test_each_kind_of_missing_answer_is_counted_under_its_name(end, figure):
    entry = made("p", "A", "AA-B")
    entry["ended"][2] = end
    figures = score.summarise([entry])
    assert [figures[name] for name in ("cut_off", "over_long", "unanswered")] == [
        0.25 if name == figure else 0 for name in ("cut_off", "over_long", "unanswered")
    ]


@given(st.lists(st.text("ABC-!", min_size=4, max_size=4), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_mv_at_1_equals_pass_at_1_equals_accuracy(choices):
    figures = score.summarise([made(str(i), "ABC"[i % 3], text) for i, text in enumerate(choices)])
    assert figures["majority"]["1"] == pytest.approx(figures["accuracy"]) and figures["pass"][
        "1"
    ] == pytest.approx(figures["accuracy"])
    passes = [value for value, _, _ in figures["pass"].values()]
    assert passes == sorted(passes)


def test_questions_with_unequal_numbers_of_samples_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 4\] samples"):
        score.summarise([made("p", "A", "AA"), made("q", "A", "AAAA")])


def verdict(*failed: str) -> dict:
    return {key: key not in failed for key in judge.KEYS}


def test_criteria_by_hand_and_hallucination_among_looking_chains_only():
    look, true = "Image_Analysis_Involvement", "No_Hallucination"
    # p: 1 looks and sees what is not there; 2 does not look; 3 neither, so its false claims are not
    # about the image
    p = made(
        "p", "A", "AAAB", {0: verdict(), 1: verdict(true), 2: verdict(look), 3: verdict(look, true)}
    )
    # q: 1 has a wrong answer and meets all four; 2 has an unreadable verdict, 3 none
    q = made(
        "q",
        "B",
        "BA--",
        {0: verdict("Reflection_Presence"), 1: verdict("Answer_Correctness"), 2: None},
    )
    figures = score.summarise([p, q])
    assert figures["judged"] == 6
    assert figures["criteria"] == pytest.approx(
        {"Logical_Consistency": 1, look: 4 / 6, true: 4 / 6, "Reflection_Presence": 5 / 6}
    )
    assert figures["judged_looking"] == 4 and figures["hallucinated"] == pytest.approx(1 / 4)
    # all four criteria: 2 of 6 chains; the interval is over questions
    assert figures["all_criteria"] == pytest.approx([2 / 6, *score.wilson(2 / 6, 2)])


def test_nobody_who_looks_is_no_share_and_not_zero():
    figures = score.summarise(
        [made("p", "A", "AA", {0: verdict("Image_Analysis_Involvement"), 1: None})]
    )
    assert figures["judged_looking"] == 0 and figures["hallucinated"] is None


# --------------------------------------------------------------------------------------------------
# Two models on the same questions


def test_comparison_by_hand():
    first = [
        made("p", "A", "AABB"),
        made("q", "A", "BBBB"),
        made("r", "A", "AAAA"),
        made("s", "A", "BB--"),
    ]
    second = [
        made("s", "A", "AAAB"),
        made("p", "A", "BBAA"),
        made("q", "A", "AAAA"),
        made("r", "A", "AAAA"),
    ]  # in another order
    found = score.compare(first, second)
    assert found["questions"] == 4 and found["difference"][0] == pytest.approx(
        (0 + 1 + 0 + 0.75) / 4
    )
    # votes: p is a tie that goes to the earliest, so only the first is right; q and s only the
    # second
    assert found["vote_difference"][0] == pytest.approx((2 - 1) / 4)
    assert (found["only_first"], found["only_second"]) == (1, 2) and found["p"] == score.mcnemar(
        1, 2
    ) == 1.0
    assert found["difference"][1] <= found["difference"][0] <= found["difference"][2]


def ruled(entry: dict, choices: str) -> dict:
    """An entry with what the benchmark's own rule reads."""
    right = [choice == entry["answer"] for choice in choices]
    return {**entry, "official": {"choices": list(choices), "right": right}}


def test_a_gain_in_form_shows_beside_the_difference_by_the_benchmarks_own_rule():
    # our rule reads nothing of two answers that the benchmark's own does; the second writes tags
    first = [ruled(made("p", "A", "A--B"), "AAAB"), ruled(made("q", "A", "----"), "BBBB")]
    second = [ruled(made("p", "A", "AAAB"), "AAAB"), ruled(made("q", "A", "BB-B"), "BBBB")]
    found = score.compare(first, second)
    assert found["difference"][0] == pytest.approx((2 / 4 + 0) / 2)
    assert found["readable_difference"][0] == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert found["official_difference"] == [0, 0, 0]
    low, high = found["readable_difference"][1:]
    assert (low, high) == (2 / 4, 3 / 4)  # both questions alike, in one draw of four


@pytest.mark.parametrize("lacking", [0, 1])
def test_no_difference_by_a_rule_that_one_run_was_not_read_by(lacking):
    runs = [[ruled(made("p", "A", "A"), "A")], [ruled(made("p", "A", "A"), "A")]]
    assert "official_difference" in score.compare(*runs)
    runs[lacking] = [made("p", "A", "A")]
    assert "official_difference" not in score.compare(*runs)


OTHERS = {  # of the first's two questions, p and q
    "fewer": ([made("p", "A", "AA")], "2 and 1 questions, of which 1 are the same"),
    "another answer": ([made("p", "A", "AA"), made("q", "B", "AA")], "2 and 2 .* which 1 are"),
    "another id": ([made("p", "A", "AA"), made("r", "A", "AA")], "2 and 2 .* which 1 are"),
    "more": ([made(key, "A", "AA") for key in "pqr"], "2 and 3 .* which 2 are"),
    "another source": (
        [made("p", "A", "A"), {**made("q", "A", "A"), "source": "x"}], "2 and 2 .* which 1 are",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_unlike_questions_are_not_compared_but_those_that_both_have_can_be(name):
    first, (second, message) = [made("p", "A", "AA"), made("q", "A", "BB")], OTHERS[name]
    with pytest.raises(data.RowError, match=message):
        score.compare(first, second)
    pairs = score.shared(first, second)
    assert [(one["id"], two["id"]) for one, two in pairs] == [("p", "p"), ("q", "q")][: len(pairs)]
    assert len(pairs) == (2 if name == "more" else 1)
    assert pairs[0][0] is first[0] and pairs[0][1] is second[0]


# --------------------------------------------------------------------------------------------------
# What an accuracy can tell


@pytest.mark.parametrize("n", [150, 600])
def test_a_difference_that_is_said_to_be_detected_is_found_in_four_of_five_simulations(n):
    half, apart, paired = map(
        float,
        re.search(
            r"± ([\d.]+) points; detects (\d+) between two runs, (\d+) paired", score.resolution(n)
        ).groups(),
    )
    rng, z = np.random.default_rng(0), statistics.NormalDist().inv_cdf(0.975)
    assert half / 100 == pytest.approx(z * (0.25 / n) ** 0.5, abs=5e-4)
    # both are rounded to points, so that power is near 80 % and not equal to it
    shift = apart / 200
    first, second = rng.binomial(n, 0.5 - shift, 4000) / n, rng.binomial(n, 0.5 + shift, 4000) / n
    error = ((first * (1 - first) + second * (1 - second)) / n) ** 0.5
    assert (abs(second - first) > z * error).mean() == pytest.approx(0.8, abs=0.1)
    gains = rng.multinomial(n, [0.15 + paired / 200, 0.15 - paired / 200, 0.7], 4000)
    only = gains[:, 0] + gains[:, 1]
    found = abs(gains[:, 0] - gains[:, 1]) > z * only**0.5  # McNemar
    assert found.mean() == pytest.approx(0.8, abs=0.1)


def test_lengths_are_those_of_a_sorted_list():
    found = score.lengths([*range(1, 101)][::-1])
    assert found == {"words": 50.5, "words_median": 50.5, "words_95": 95}
