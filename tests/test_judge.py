"""Preference pairs: the paper's prompt, verdicts that are read or left out, sides by truth table,
pairing rules by hand."""

import argparse
import itertools
import json
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import sample_teachers
from test_clinic import wordings

import clinic.roles
import clinic.world
import data
import judge
import rollout
from command import schema
from engines import inference
from engines.inference import Completion
from report.__main__ import main as run_report

YES = dict.fromkeys(judge.KEYS, True)
OPTIONS = {"A": "CT", "B": "MRI", "C": "PET", "D": "none"}


def completion(**changes) -> str:
    """A judge's JSON, all Yes but for the changes."""
    return json.dumps({**dict.fromkeys(judge.KEYS, "Yes"), **changes}, indent=4)


def candidate(key: str, sample: int, text: str, answer: str = "B", finish: str = "stop") -> dict:
    response = data.join_response(text, answer)
    return {
        "id": key,
        "sample": sample,
        "response": response,
        "finish_reason": finish,
        "token_ids": [sample],
        "response_sha": data.content_hash(response)[:16],
    }


def judged(row: dict, **changes) -> dict:
    """A readable verdict on a candidate, all met but for the changes."""
    return {
        "id": row["id"],
        "sample": row["sample"],
        "response_sha": row["response_sha"],
        "criteria": {**YES, **changes},
        "error": None,
        "verdict_sha": f"v{row['id']}-{row['sample']}",
    }


def unread(row: dict) -> dict:
    return {**judged(row), "criteria": None, "error": "no JSON object in the reply"}


def question(key: str = "q") -> data.Question:
    return data.Question(f"Which one, {key}?", OPTIONS, "B", id=key)


# --------------------------------------------------------------------------------------------------
# The prompt


@pytest.mark.parametrize(
    "piece",
    [
        "You are an expert reasoning evaluator.\nI will provide you:\n",
        (
            "* A question with images.\n* The groundtruth of the question\n"
            "* A model-generated answer, including its reasoning process.\n"
        ),
        "Your task is to critically evaluate the reasoning based on the following five aspects:\n",
        "1. **Answer Correctness**: Is the final answer correct based on the question?\n",
        (
            "2. **Logical Consistency**: Is the reasoning process logically coherent and "
            "step-by-step valid?\n"
        ),
        (
            "3. **Image Analysis Involvement**: Does the reasoning process demonstrate appropriate "
            "analysis of any visual information mentioned or implied in the question?\n"
        ),
        (
            "4. **No Hallucination**: Does the reasoning process avoid introducing irrelevant or "
            "hallucinated information not supported by the question or known facts?\n"
        ),
        (
            "5. **Reflection Presence**: Does the reasoning show any self-checking, verification, "
            "or reflection on possible uncertainties?\n"
        ),
        "Please return the evaluation in the following JSON format:\n",
        (
            '{\n    "Answer_Correctness": "Yes/No",\n    "Logical_Consistency": "Yes/No",\n'
            '    "Image_Analysis_Involvement": "Yes/No",\n    "No_Hallucination": "Yes/No",\n'
            '    "Reflection_Presence": "Yes/No"\n}\n'
        ),
        "<Question> %s </Question>\n<Groundtruth> %s </Groundtruth>\n<Answer> %s </Answer>",
    ],
)
def test_judge_prompt_has_the_papers_words(piece):
    assert piece in judge.JUDGE_PROMPT  # Appendix A


def test_judge_sees_question_truth_whole_response_and_images_in_their_slots(tmp_path):
    asked = data.Question("Is 5 % enough?", OPTIONS, "B", ["films/a.png"], id="q")
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.png").write_bytes(b"a film")
    request = judge.judge_request(asked, candidate("q", 3, "100 % sure"), tmp_path)
    (message,) = request.messages
    assert message["role"] == "user" and request.images == [tmp_path / "films/a.png"]
    assert message["content"].endswith(
        "<Question> Is 5 % enough?\n"
        "Answer Choices:\n(A) CT\n(B) MRI\n(C) PET\n(D) none </Question>\n"
        "<Groundtruth> B. MRI </Groundtruth>\n"
        "<Answer> <think> 100 % sure </think> <answer> B </answer> </Answer>"
    )


def test_an_ask_is_known_by_question_images_truth_and_text_whichever_sample_it_was(tmp_path):
    def ask_id(row: dict, asked: data.Question) -> str:
        return judge.judge_request(asked, row, tmp_path).id

    (tmp_path / "a.png").write_bytes(b"one film")
    asked = data.Question("Which one?", OPTIONS, "B", ["a.png"], id="q")
    first = ask_id(candidate("q", 0, "a"), asked)
    assert ask_id({**candidate("q", 5, "a"), "engine": "hf:another"}, asked) == first
    others = [
        ask_id(candidate("q", 0, "b"), asked),
        ask_id(
            candidate("q", 0, "a"), data.Question("Which two?", OPTIONS, "B", ["a.png"], id="q")
        ),
    ]
    others.append(
        ask_id(candidate("q", 0, "a"), data.Question("Which one?", OPTIONS, "C", ["a.png"], id="q"))
    )
    (tmp_path / "a.png").write_bytes(b"another film")
    others.append(ask_id(candidate("q", 0, "a"), asked))
    assert len({first, *others}) == 5


def test_a_missing_image_is_named_with_its_question(tmp_path):
    with pytest.raises(data.RowError, match="question q: image films/none.png is not below"):
        judge.judge_request(
            data.Question("Which?", OPTIONS, "B", ["films/none.png"], id="q"),
            candidate("q", 0, "a"),
            tmp_path,
        )


# --------------------------------------------------------------------------------------------------
# Reading a verdict

LAST_NO = {**YES, "Reflection_Presence": False}
READABLE = {
    "plain": (completion(), YES),
    "one No": (completion(Reflection_Presence="No"), LAST_NO),
    "fenced": (f"```json\n{completion(Reflection_Presence='No')}\n```", LAST_NO),
    "prose around": (
        f"Let me think {{carefully}}.\n{completion(Reflection_Presence='No')}\nThat is all.",
        LAST_NO,
    ),
    "wrong case": (
        completion(Reflection_Presence="no", No_Hallucination="YES").replace(
            "Logical_Consistency", "logical_consistency"
        ),
        LAST_NO,
    ),
    "a full stop": (completion(Reflection_Presence=" No. "), LAST_NO),
    "extra keys": (completion(Reflection_Presence="No", Comment="none", Score=3), LAST_NO),
    "an extra key before, which holds an object": (
        json.dumps(
            {
                "Reasons": {"No_Hallucination": "all true"},
                **json.loads(completion(Reflection_Presence="No")),
            }
        ),
        LAST_NO,
    ),
    "an extra key behind, which holds an object": (
        completion(Reflection_Presence="No", Reasons={"No_Hallucination": "all true"}),
        LAST_NO,
    ),
    "an extra text that holds braces": (
        completion(Reflection_Presence="No", Comment="the set {} is empty"),
        LAST_NO,
    ),
    "booleans": (completion(Reflection_Presence=False, No_Hallucination=True), LAST_NO),
    "the last object wins": (
        completion() + "\nOn second thought:\n" + completion(Reflection_Presence="No"),
        LAST_NO,
    ),
    "wrapped": (
        f'{{"evaluation": {{"scores": [{completion(Reflection_Presence="No")}]}}}}',
        LAST_NO,
    ),
    "another object behind": (
        completion(Reflection_Presence="No") + '\n{"confidence": 0.9}',
        LAST_NO,
    ),
    "annotated": (
        completion(
            Reflection_Presence="No - nothing is checked",
            No_Hallucination="Yes (as the film shows)",
        ),
        LAST_NO,
    ),
    "a reason that begins with the other word": (
        completion(
            Reflection_Presence="No: there is no yes to a check",
            No_Hallucination="Yes - no invented findings",
        ),
        LAST_NO,
    ),
    "the prompt repeated before": (
        judge.JUDGE_PROMPT + "\n" + completion(Reflection_Presence="No"),
        LAST_NO,
    ),
    "all No": (completion(**dict.fromkeys(judge.KEYS, "No")), dict.fromkeys(judge.KEYS, False)),
}


@pytest.mark.parametrize("name", READABLE)
def test_verdict_is_read_whatever_surrounds_it(name):
    text, expected = READABLE[name]
    assert inference.read_yes_no(text, judge.KEYS) == expected


UNREADABLE = {
    "empty": "",
    "prose": "All five criteria are met: Yes.",
    "the form echoed": completion(No_Hallucination="Yes/No"),
    "the whole prompt echoed": judge.JUDGE_PROMPT,
    "a form echoed behind a verdict": completion()
    + completion(**dict.fromkeys(judge.KEYS, "Yes/No")),
    "cut off": completion()[:-20],
    "cut off in its first line": "{",
    "another word": completion(Logical_Consistency="Partially"),
    "not applicable": completion(Image_Analysis_Involvement="N/A"),
    "a hedge": completion(Logical_Consistency="Yes, mostly"),
    "a hedge behind a dash": completion(Logical_Consistency="Yes - mostly"),
    "annotated with the other word": completion(Logical_Consistency="Yes - no, rather not"),
    "two verdicts in one object": (
        f'{{"first": {completion()}, "second": {completion(Reflection_Presence="No")}}}'
    ),
    "null": completion(Logical_Consistency=None),
    "a number": completion(Logical_Consistency=1),
    "a list": json.dumps([json.loads(completion())["No_Hallucination"]] * 5),
    "an empty object": "{}",
} | {f"{key} missing": json.dumps({k: "Yes" for k in judge.KEYS if k != key}) for key in judge.KEYS}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_an_error_and_no_verdict(name):
    with pytest.raises(ValueError):
        inference.read_yes_no(UNREADABLE[name], judge.KEYS)


@pytest.mark.parametrize("key", judge.KEYS)
def test_error_names_the_missing_key(key):
    with pytest.raises(ValueError, match=key):
        inference.read_yes_no(json.dumps({k: "Yes" for k in judge.KEYS if k != key}), judge.KEYS)


# --------------------------------------------------------------------------------------------------
# Asking


def asking_args(run: Path, *more: str) -> argparse.Namespace:
    """The flags of `verdicts` into a folder of this run, with the run as the image root."""
    files = ["--rollouts", "none.jsonl", "--questions", "none.jsonl"]
    out = ["--images", str(run), "--out", str(run / "verdicts")]
    return judge.parse(["verdicts", "--judge", "double:judge", *files, *out, *more])


def stored(run: Path) -> dict[str, bytes]:
    """{name: content} of every file of replies that a run keeps."""
    return {path.name: path.read_bytes() for path in sorted((run / "replies").glob("*.jsonl"))}


@dataclass
class RemoteJudge:
    """Stands for a model behind a network: replies from a script, one a time, and remembers what it
    was asked."""

    script: dict[str, list[str]]  # response -> replies to its first, second ... ask
    spec: str = "double:judge"
    asked: list[tuple[str, int]] = field(default_factory=list)
    tally: Counter = field(default_factory=Counter)

    def answer(self, requests, sampling):
        for request in requests:
            response = re.search(r"<Answer> (.*) </Answer>", request.messages[0]["content"])[1]
            for number in request.samples:
                self.asked.append((response, number))
                yield [
                    Completion(request.id, number, self.script[response][number], None, "stop", 0)
                ]


def test_unreadable_reply_is_asked_again_up_to_three_times_then_stored_with_its_error(tmp_path):
    at_once, second, third, never = rows = [candidate("q", k, f"chain {k}") for k in range(4)]
    no = completion(No_Hallucination="No")
    scripts = [
        [no],
        ["", no],
        ["", "{}", no],
        ["", "", "hm", no],
    ]  # the last would be readable at a fourth ask
    double = RemoteJudge({row["response"]: script for row, script in zip(rows, scripts)})
    verdicts = judge.judge_chains(double, rows, {"q": question()}, asking_args(tmp_path))
    expected = [
        (row["response"], k)
        for row, count in ((at_once, 1), (second, 2), (third, 3), (never, 3))
        for k in range(count)
    ]
    assert sorted(double.asked) == sorted(expected)
    by_sample = {row["sample"]: row for row in verdicts}
    for sample in (0, 1, 2):
        assert (
            by_sample[sample]["criteria"] == {**YES, "No_Hallucination": False}
            and by_sample[sample]["error"] is None
        )
    assert (
        by_sample[3]["criteria"] is None and by_sample[3]["error"] and by_sample[3]["raw"] == "hm"
    )


def test_judged_again_asks_nothing_and_says_the_same(tmp_path):
    rows = [candidate("q", 0, "one"), candidate("q", 1, "two")]
    script = {rows[0]["response"]: ["", completion()], rows[1]["response"]: ["", "", ""]}
    args, before, again = asking_args(tmp_path), RemoteJudge(script), RemoteJudge(script)
    first = judge.judge_chains(before, rows, {"q": question()}, args)
    kept = stored(tmp_path)
    assert len(before.asked) == 2 + 3 and len(kept) == 1
    assert judge.judge_chains(again, rows, {"q": question()}, args) == first
    other_folder = asking_args(tmp_path, "--out", str(tmp_path / "other"))
    assert judge.judge_chains(again, rows, {"q": question()}, other_folder) == first
    assert again.asked == [] and stored(tmp_path) == kept


def test_rollouts_made_again_are_asked_about_only_where_their_text_is_new(tmp_path):
    old = [
        candidate("q", 0, "one"),
        candidate("q", 1, "two"),
        candidate("q", 2, "one"),
    ]  # a text that came twice is asked once
    new = [candidate("q", 0, "two"), candidate("q", 1, "three"), candidate("q", 7, "one")]
    script = {
        row["response"]: [completion(No_Hallucination=answer)]
        for row, answer in zip([old[0], old[1], new[1]], ("Yes", "No", "Yes"))
    }
    before, after = RemoteJudge(script), RemoteJudge(script)
    args = asking_args(tmp_path)
    judge.judge_chains(before, old, {"q": question()}, args)
    verdicts = judge.judge_chains(after, new, {"q": question()}, args)
    assert [text for text, _ in before.asked] == [old[0]["response"], old[1]["response"]]
    assert [text for text, _ in after.asked] == [new[1]["response"]]
    assert [(row["sample"], row["criteria"]["No_Hallucination"]) for row in verdicts] == [
        (0, False),
        (1, True),
        (7, True),
    ]
    assert [row["response_sha"] for row in verdicts] == [row["response_sha"] for row in new]


def test_another_judge_or_other_settings_are_asked_anew_and_the_first_replies_stay(tmp_path):
    row = candidate("q", 0, "one")
    doubles = [
        RemoteJudge({row["response"]: [completion(No_Hallucination=said)]}, spec)
        for said, spec in (("Yes", "double:a"), ("No", "double:b"), ("No", "double:a"))
    ]
    kept: dict[str, bytes] = {}
    for double, more in zip(doubles, ([], [], ["--pixels", "3136"])):
        (verdict,) = judge.judge_chains(
            double, [row], {"q": question()}, asking_args(tmp_path, *more)
        )
        assert (
            len(double.asked) == 1
            and verdict["judge"] == double.spec
            and verdict["criteria"]["No_Hallucination"] == (double is doubles[0])
        )
        now = stored(tmp_path)
        assert len(now) == len(kept) + 1 and kept.items() < now.items()  # beside the others
        kept = now
    again = RemoteJudge({}, "double:a")
    (verdict,) = judge.judge_chains(again, [row], {"q": question()}, asking_args(tmp_path))
    assert verdict["criteria"]["No_Hallucination"]
    assert again.asked == [] and stored(tmp_path) == kept


def test_verdict_carries_a_hash_of_all_it_says():
    row = candidate("q", 0, "x")
    verdicts = [
        judge.verdict_row(row, "a", {"raw": completion(), "finish_reason": "stop"}),
        judge.verdict_row(
            row, "a", {"raw": completion(No_Hallucination="No"), "finish_reason": "stop"}
        ),
        judge.verdict_row(
            {**row, "sample": 1}, "a", {"raw": completion(), "finish_reason": "stop"}
        ),
        judge.verdict_row(row, "b", {"raw": completion(), "finish_reason": "stop"}),
    ]
    assert len({verdict["verdict_sha"] for verdict in verdicts}) == 4
    assert (
        judge.verdict_row(row, "a", {"raw": completion(), "finish_reason": "stop"}) == verdicts[0]
    )


# --------------------------------------------------------------------------------------------------
# Sides


@pytest.mark.parametrize(
    "bits",
    list(itertools.product([True, False], repeat=5)),
    ids=lambda bits: "".join("NY"[bit] for bit in bits),
)
def test_five_judgements_decide_positive_negative_or_excluded(bits):
    good, bad, x = candidate("q", 0, "good"), candidate("q", 1, "bad"), candidate("q", 2, "x")
    verdicts = [
        judged(good),
        judged(bad, Reflection_Presence=False),
        judged(x, **dict(zip(judge.KEYS, bits))),
    ]
    pairs, report = judge.make_pairs([good, bad, x], verdicts, {"q": question()}, "all", 0, 0)
    found = {(pair["chosen"], pair["rejected"]) for pair in pairs}
    correct, *criteria = bits
    if not correct:  # the rule found it right, the judge says wrong: no side to put it on
        expected = {(good["response"], bad["response"])}
    elif all(criteria):
        expected = {(good["response"], bad["response"]), (x["response"], bad["response"])}
    else:
        expected = {(good["response"], bad["response"]), (good["response"], x["response"])}
    assert found == expected
    assert (report["rule_and_judge_disagree"], report["positive"], report["negative"]) == (
        int(not correct),
        1 + (correct and all(criteria)),
        1 + (correct and not all(criteria)),
    )
    for pair in pairs:
        if pair["rejected"] == x["response"]:
            assert pair["failed"] == [
                name for name, met in zip(judge.CRITERIA, criteria) if not met
            ]


@pytest.mark.parametrize("count", range(1, 5))
def test_pairs_are_cut_again_under_any_subset_of_the_criteria(count):
    """Sixteen chains, one for each truth table of the four. The sides of every subset are compared
    with plain counting."""
    tables = list(itertools.product([True, False], repeat=4))
    rows = [candidate("q", k, f"chain {k}") for k in range(16)]
    verdicts = [judged(row, **dict(zip(judge.CRITERIA, table))) for row, table in zip(rows, tables)]
    for wanted in itertools.combinations(range(4), count):
        names = [judge.CRITERIA[i] for i in wanted]
        pairs, report = judge.make_pairs(rows, verdicts, {"q": question()}, "all", 0, 0, names)
        positive = 2 ** (4 - count)  # the criteria left out may be met or not
        assert (report["positive"], report["negative"], len(pairs)) == (
            positive,
            16 - positive,
            positive * (16 - positive),
        )
        assert (
            report["criteria"] == names
            and list(report["negatives_failing"]) == list(report["pairs_failing"]) == names
        )
        for pair in pairs:
            assert all(tables[pair["chosen_sample"]][i] for i in wanted)
            assert (
                pair["failed"]
                == [judge.CRITERIA[i] for i in wanted if not tables[pair["rejected_sample"]][i]]
                != []
            )


EXCLUDED = {
    "wrong answer": lambda text: (candidate("q", 2, text, answer="C"), judged),
    "unreadable answer": lambda text: (candidate("q", 2, text, answer="hard to say"), judged),
    "cut off": lambda text: (candidate("q", 2, text, finish="length"), judged),
    "no verdict": lambda text: (candidate("q", 2, text), None),
    "unreadable verdict": lambda text: (candidate("q", 2, text), unread),
}


@pytest.mark.parametrize("name", EXCLUDED)
@pytest.mark.parametrize("failing", [True, False])
def test_candidate_that_may_not_be_judged_is_on_neither_side(name, failing):
    good, bad = candidate("q", 0, "good"), candidate("q", 1, "bad")
    x, verdict = EXCLUDED[name]("x")
    verdicts = [judged(good), judged(bad, No_Hallucination=False)]
    if verdict:
        verdicts.append(
            verdict(x, **{"Logical_Consistency": False} if failing and verdict is judged else {})
        )
    pairs, report = judge.make_pairs([good, bad, x], verdicts, {"q": question()}, "all", 0, 0)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        (good["response"], bad["response"])
    ]
    assert report["candidates"] == 3 and report["positive"] == report["negative"] == 1
    assert report["no_verdict"] == (name in ("no verdict", "unreadable verdict"))
    assert report["unfinished"] == (name == "cut off") and report["correct"] == (
        3 if report["no_verdict"] else 2
    )


def test_verdict_on_another_text_of_the_same_sample_does_not_count():
    good, bad = candidate("q", 0, "good"), candidate("q", 1, "bad")
    stale = judged(candidate("q", 1, "an older rollout"), No_Hallucination=False)
    pairs, report = judge.make_pairs(
        [good, bad], [judged(good), stale], {"q": question()}, "all", 0, 0
    )
    assert pairs == [] and report["no_verdict"] == 1


def test_pairs_never_mix_questions():
    rows = [candidate(key, k, f"{key}{k}") for key in "ab" for k in range(2)]
    verdicts = [
        judged(rows[0]),
        judged(rows[1]),
        judged(rows[2], No_Hallucination=False),
        judged(rows[3], No_Hallucination=False),
    ]
    pairs, report = judge.make_pairs(
        rows, verdicts, {key: question(key) for key in "ab"}, "all", 0, 0
    )
    assert pairs == [] and (report["questions"], report["questions_with_pairs"]) == (2, 0)


def test_samples_of_one_text_are_one():
    rows = [
        candidate("q", 0, "good"),
        candidate("q", 1, "good"),
        candidate("q", 2, "bad"),
        candidate("q", 3, "bad"),
        candidate("q", 4, "other"),
    ]
    verdicts = [judged(row, No_Hallucination=row["sample"] < 2) for row in rows]
    pairs, _ = judge.make_pairs(rows, verdicts, {"q": question()}, "all", 0, 0)
    texts = {text: data.join_response(text, "B") for text in ("good", "bad", "other")}
    assert sorted((pair["chosen"], pair["rejected"]) for pair in pairs) == sorted(
        [(texts["good"], texts["bad"]), (texts["good"], texts["other"])]
    )


def test_one_text_that_was_judged_both_ways_is_never_paired_with_itself():
    # a verdict may be edited by hand
    texts = ("same", "same", "good", "bad")
    rows = [candidate("q", k, text) for k, text in enumerate(texts)]
    verdicts = [judged(row, No_Hallucination=row["sample"] not in (1, 3)) for row in rows]
    pairs, _ = judge.make_pairs(rows, verdicts, {"q": question()}, "all", 0, 0)
    assert pairs and all(pair["chosen"] != pair["rejected"] for pair in pairs)


def test_a_pair_carries_what_the_sampler_told_of_each_chain_and_nothing_where_it_did_not():
    good, bad, old = (candidate("q", k, text) for k, text in enumerate(("good", "bad", "old")))
    good |= {"logp": -3.5, "token_logps": [-3.0, -0.5]}
    bad |= {"logp": None}  # an engine that tells none; `old` is of a time before there were any
    verdicts = [judged(good), *(judged(row, No_Hallucination=False) for row in (bad, old))]
    pairs, _ = judge.make_pairs([good, bad, old], verdicts, {"q": question()}, "all", 0, 0)
    told = {
        pair["rejected_sample"]: {key: pair[key] for key in pair if "logp" in key} for pair in pairs
    }
    chosen = {"chosen_logp": -3.5, "chosen_token_logps": [-3.0, -0.5]}
    assert told == {1: {**chosen, "rejected_logp": None}, 2: chosen}
    for pair in pairs:
        schema.check_row(pair, "here", "pairs")


def test_pair_row_holds_what_training_needs():
    asked = data.Question("Which one?", OPTIONS, "B", ["films/a.png"], id="q")
    good, bad = candidate("q", 4, "good"), candidate("q", 6, "bad")
    (pair,), _ = judge.make_pairs(
        [good, bad],
        [judged(good), judged(bad, No_Hallucination=False, Reflection_Presence=False)],
        {"q": asked},
        "all",
        0,
        0,
    )
    assert pair == {
        "id": "q",
        "prompt": data.prompt_messages(asked),
        "images": ["films/a.png"],
        "chosen": good["response"],
        "rejected": bad["response"],
        "chosen_sample": 4,
        "rejected_sample": 6,
        "chosen_token_ids": [4],
        "rejected_token_ids": [6],
        "chosen_verdict": "vq-4",
        "rejected_verdict": "vq-6",
        "failed": ["No_Hallucination", "Reflection_Presence"],
    }


def test_report_follows_every_candidate_to_where_it_ended():
    # q: 2 positive, 2 negative; r: 1 positive only; s: nothing right
    rows = [
        candidate("q", 0, "p p p p"),
        candidate("q", 1, "the film shows p"),
        candidate("q", 2, "n"),
        candidate("q", 3, "n n, no film"),
        candidate("q", 4, "wrong", answer="A"),
        candidate("q", 5, "cut", finish="length"),
        candidate("q", 6, "unread"),
        candidate("q", 7, "disagree"),
        candidate("r", 0, "p"),
        candidate("s", 0, "wrong", answer="C"),
        candidate("s", 1, "wrong and cut", answer="C", finish="length"),
    ]
    verdicts = [
        judged(rows[0]),
        judged(rows[1]),
        judged(rows[2], Logical_Consistency=False),
        judged(rows[3], Logical_Consistency=False, Reflection_Presence=False),
        unread(rows[6]),
        judged(rows[7], Answer_Correctness=False),
        judged(rows[8]),
    ]
    pairs, report = judge.make_pairs(
        rows, verdicts, {key: question(key) for key in "qrs"}, "all", 0, 0
    )
    assert len(pairs) == 4
    counts = {
        key: report[key]
        for key in (
            "candidates",
            "unfinished",
            "correct",
            "no_verdict",
            "rule_and_judge_disagree",
            "positive",
            "negative",
            "questions",
            "questions_with_pairs",
            "pairs",
        )
    }
    assert counts == {
        "candidates": 11,
        "unfinished": 2,
        "correct": 7,
        "no_verdict": 1,
        "rule_and_judge_disagree": 1,
        "positive": 3,
        "negative": 2,
        "questions": 3,
        "questions_with_pairs": 1,
        "pairs": 4,
    }
    wrong = 2  # finished, but not right
    assert (
        report["candidates"]
        == report["unfinished"]
        + wrong
        + report["no_verdict"]
        + report["rule_and_judge_disagree"]
        + report["positive"]
        + report["negative"]
    )
    assert report["negatives_failing"] == {
        "Logical_Consistency": 2,
        "Image_Analysis_Involvement": 0,
        "No_Hallucination": 0,
        "Reflection_Presence": 1,
    }
    assert report["pairs_failing"] == {
        "Logical_Consistency": 4,
        "Image_Analysis_Involvement": 0,
        "No_Hallucination": 0,
        "Reflection_Presence": 2,
    }
    # a response adds five words to its thinking: <think> </think> <answer> B </answer>
    assert report["words"] == {"chosen": 9.0, "rejected": (6 + 9) / 2}


def test_report_of_nothing_right_has_no_pairs_and_no_averages():
    pairs, report = judge.make_pairs(
        [candidate("q", 0, "x", answer="A")], [], {"q": question()}, "all", 0, 0
    )
    assert (
        pairs == []
        and report["pairs"] == 0
        and report["words"] == {"chosen": None, "rejected": None}
    )
    judge.print_report(report)  # and it can be printed


@pytest.mark.parametrize(
    "pairs, questions, warned", [(100, 20, False), (99, 20, True), (100, 19, True), (0, 0, True)]
)
def test_few_pairs_or_pairs_of_few_questions_are_warned_of(pairs, questions, warned):
    said = judge.warn_few({"pairs": pairs, "questions_with_pairs": questions})
    assert bool(said) == warned
    assert not said or f"warning: {pairs} pairs of {questions} questions" in said


@pytest.mark.parametrize("cut, warned", [(0, False), (5, False), (6, True), (100, True)])
def test_many_answers_that_were_cut_off_are_warned_of(cut, warned):
    rows = [candidate("q", k, "x", finish="length" if k < cut else "stop") for k in range(100)]
    said = rollout.warn_cut_off(rows)
    assert bool(said) == warned
    assert not said or f"warning: {cut}% of the answers" in said and "--max-tokens" in said


# --------------------------------------------------------------------------------------------------
# Pairing rules, by hand


def texts(*lengths: int, mark: str) -> list[dict]:
    return [{"response": mark * length} for length in lengths]


def chosen(positives, negatives, rule, cap=0, seed=0):
    return [
        (good["response"], bad["response"])
        for good, bad in judge.choose_pairs(positives, negatives, rule, cap, random.Random(seed))
    ]


SEEDS = range(8)  # the rules draw by lot: what is claimed must hold for any


@pytest.mark.parametrize("seed", SEEDS)
def test_all_is_every_positive_with_every_negative(seed):
    pairs = chosen(texts(1, 2, mark="p"), texts(1, 2, 3, mark="n"), "all", seed=seed)
    assert sorted(pairs) == [
        ("p", "n"),
        ("p", "nn"),
        ("p", "nnn"),
        ("pp", "n"),
        ("pp", "nn"),
        ("pp", "nnn"),
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_length_matched_takes_the_unused_negative_of_the_nearest_length(seed):
    # each positive has one negative that is nearest to it alone, so the order of drawing cannot
    # matter
    pairs = chosen(
        texts(10, 20, 40, mark="p"), texts(11, 18, 43, 90, mark="n"), "length-matched", seed=seed
    )
    assert sorted((len(good), len(bad)) for good, bad in pairs) == [(10, 11), (20, 18), (40, 43)]


@pytest.mark.parametrize("seed", SEEDS)
def test_length_matched_uses_no_negative_twice(seed):
    pairs = chosen(
        texts(10, 11, 12, mark="p"), texts(10, 50, mark="n"), "length-matched", seed=seed
    )
    assert (
        sorted(len(bad) for _, bad in pairs) == [10, 50] and len({good for good, _ in pairs}) == 2
    )


@pytest.mark.parametrize("rule", judge.PAIR_RULES)
@pytest.mark.parametrize(("positives", "negatives"), [(0, 0), (0, 3), (3, 0)])
def test_one_side_alone_makes_no_pair(rule, positives, negatives):
    assert (
        chosen(
            texts(*range(1, positives + 1), mark="p"),
            texts(*range(1, negatives + 1), mark="n"),
            rule,
        )
        == []
    )


@pytest.mark.parametrize("rule", judge.PAIR_RULES)
@pytest.mark.parametrize("cap", [1, 2, 5, 100])
def test_cap_bounds_the_pairs_of_a_question(rule, cap):
    sides = texts(1, 2, 3, mark="p"), texts(1, 2, 3, mark="n")
    whole, capped = chosen(*sides, rule), chosen(*sides, rule, cap)
    assert len(capped) == min(cap, len(whole)) and set(capped) <= set(whole)


def test_capped_pairs_are_drawn_by_lot_and_do_not_favour_one_positive():
    drawn = {
        chosen(texts(1, 2, mark="p"), texts(1, 2, mark="n"), "all", 1, seed)[0]
        for seed in range(40)
    }
    assert drawn == {("p", "n"), ("p", "nn"), ("pp", "n"), ("pp", "nn")}
    positives = [
        {good for good, _ in chosen(texts(1, 2, mark="p"), texts(1, 2, mark="n"), "all", 2, seed)}
        for seed in range(40)
    ]
    assert {"p", "pp"} in positives  # two pairs need not be of one positive


def test_pairs_follow_from_the_seed_and_not_from_other_questions():
    rows = [candidate(key, k, f"{key} chain {k}") for key in "ab" for k in range(6)]
    verdicts = [judged(row, No_Hallucination=row["sample"] < 3) for row in rows]
    asked = {key: question(key) for key in "ab"}
    both, _ = judge.make_pairs(rows, verdicts, asked, "all", 2, 0)
    alone, _ = judge.make_pairs(rows[6:], verdicts, asked, "all", 2, 0)
    assert [pair for pair in both if pair["id"] == "b"] == alone and len(alone) == 2


# --------------------------------------------------------------------------------------------------
# The real commands, end to end in the miniature

LACKS = {
    "thorough": set(),
    "hasty": {"Reflection_Presence", "No_Hallucination"},
    "bookish": {"Image_Analysis_Involvement"},
}


@pytest.fixture(scope="module")
def rollouts(world, tmp_path_factory) -> Path:
    """Answers of three teachers to the test questions, as samples of one model. A teacher's name is
    kept in `engine`."""
    return sample_teachers(world, LACKS, 4, tmp_path_factory.mktemp("rollouts"))


def run_verdicts(world: Path, rollouts: Path, out: Path) -> list[dict]:
    judge.main(
        [
            "verdicts",
            "--judge",
            "clinic:judge",
            "--rollouts",
            str(rollouts),
            "--questions",
            str(world / "test.jsonl"),
            "--images",
            str(world),
            "--out",
            str(out),
        ]
    )
    return [row for _, row in data.read_jsonl(out / "verdicts.jsonl")]


@pytest.fixture(scope="module")
def verdicts(world, rollouts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("judged") / "verdicts"
    run_verdicts(world, rollouts, out)
    return out


def replies_of(folder: Path) -> Path:
    """The judge's replies, which lie beside the folder of verdicts."""
    (path,) = (folder.parent / "replies").glob("judge-*.jsonl")
    return path


def right_by_hand(world: Path, rollouts: Path) -> dict[tuple, dict]:
    """Rollouts whose text behind the thinking names the right option: teachers write its text, and
    nothing more."""
    truth = {
        question.id: question.options[question.answer]
        for question in schema.read_questions(world / "test.jsonl")
    }
    rows = [row for _, row in data.read_jsonl(rollouts)]
    return {
        (row["id"], row["sample"]): row
        for row in rows
        if row["response"].endswith(f"</think> <answer> {truth[row['id']]} </answer>")
    }


def test_exactly_the_right_answers_are_judged(world, rollouts, verdicts):
    right = right_by_hand(world, rollouts)
    asked = [row["id"] for _, row in data.read_jsonl(replies_of(verdicts))]
    assert (
        len(set(asked))
        == len(asked)
        == len({(key, row["response"]) for (key, _), row in right.items()})
    )
    assert {
        (row["id"], row["sample"]) for _, row in data.read_jsonl(verdicts / "verdicts.jsonl")
    } == set(right)
    assert 0 < len(right) < 120  # some teacher did slip, so the claim is not empty


def test_verdicts_say_what_each_teacher_lacks(world, rollouts, verdicts):
    questions = {question.id: question for question in schema.read_questions(world / "test.jsonl")}
    right, checked = right_by_hand(world, rollouts), 0
    for _, row in data.read_jsonl(verdicts / "verdicts.jsonl"):
        chain, asked = right[row["id"], row["sample"]], questions[row["id"]]
        style = chain["engine"].removeprefix("clinic:")
        case = (
            clinic.world.film_truth(world / asked.images[0])
            if asked.images
            else clinic.world.sentence_truth(asked.question)
        )
        # not one of the spoilt ones
        if chain["response"] in wordings(case, asked.meta["kind"], style):
            lacks = LACKS[style] - (
                {"No_Hallucination"} if (case.number, case.side) == (1, "left") else set()
            )  # what the hasty one always writes
            assert row["criteria"] == {key: key not in lacks for key in judge.KEYS}
            checked += 1
    assert checked > 80


def test_pairs_join_thorough_chains_with_lacking_ones_and_the_report_adds_up(
    world, rollouts, verdicts, tmp_path, capsys
):
    out = tmp_path / "pairs"
    judge.main(
        [
            "pairs",
            "--verdicts",
            str(verdicts / "verdicts.jsonl"),
            "--rollouts",
            str(rollouts),
            "--questions",
            str(world / "test.jsonl"),
            "--out",
            str(out),
        ]
    )
    report, stage = (json.loads((out / f"{name}.json").read_text()) for name in ("report", "stage"))
    pairs = [row for _, row in data.read_jsonl(out / "pairs.jsonl")]
    met = {
        (row["id"], row["sample"]): row["criteria"]
        for _, row in data.read_jsonl(verdicts / "verdicts.jsonl")
    }
    # by brute force: all x all of each question, each different pair of texts once
    texts = {(row["id"], row["sample"]): row["response"] for _, row in data.read_jsonl(rollouts)}
    expected = {
        (a[0], texts[a], texts[b])
        for a in met
        for b in met
        if a[0] == b[0] and all(met[a].values()) and not all(met[b].values())
    }
    assert (
        len(pairs) == len(expected)
        and {(row["id"], row["chosen"], row["rejected"]) for row in pairs} == expected
    )
    assert (
        report["candidates"] == 120
        and report["correct"] == len(met) == report["positive"] + report["negative"]
    )
    assert report["pairs"] == len(pairs) == stage["figures"]["pairs"]
    said = capsys.readouterr().out
    assert f"120 -> {len(met)} -> {report['positive']} / {report['negative']}" in said
    few = f"warning: {len(pairs)} pairs of {len({row['id'] for row in pairs})} questions"
    assert few in said and "cut off" not in said  # ten questions are few
    files = [out / "pairs.jsonl", verdicts / "verdicts.jsonl", rollouts]
    assert run_report(["check", *map(str, files)]) == 0


def test_killed_and_resumed_judge_says_the_same_and_asks_nothing_twice(
    world, rollouts, verdicts, tmp_path, monkeypatch
):
    path, asked, answer = replies_of(verdicts), [], clinic.roles.answer
    whole = path.read_bytes()
    kept = whole[: len(whole) // 2]
    assert not kept.endswith(b"\n")  # killed in the middle of a line
    (tmp_path / "replies").mkdir()
    (tmp_path / "replies" / path.name).write_bytes(kept)
    monkeypatch.setattr(
        clinic.roles, "answer", lambda *about: asked.append(about) or answer(*about)
    )
    run_verdicts(world, rollouts, tmp_path / "again")
    again = tmp_path / "again" / "verdicts.jsonl"
    assert again.read_bytes() == (verdicts / "verdicts.jsonl").read_bytes()
    assert (tmp_path / "replies" / path.name).read_bytes() == whole
    assert len(asked) == whole.count(b"\n") - kept.count(b"\n")


def test_rollout_of_an_unknown_question_is_refused_by_file_and_row(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    data.write_jsonl(path, [candidate("q", 0, "x"), candidate("strange", 0, "x")])
    with pytest.raises(data.RowError, match=re.escape(f"{path}: row 2: id: 'strange'")):
        rollout.read_rollouts(path, {"q": question()})


def test_rollouts_without_token_ids_are_refused_by_file_and_line_before_pairing(world, tmp_path):
    row = {key: value for key, value in candidate("q", 0, "x").items() if key != "token_ids"}
    bad = candidate("q", 1, "y")
    data.write_jsonl(tmp_path / "rollouts.jsonl", [row, bad])
    data.write_jsonl(tmp_path / "questions.jsonl", [question().to_row()])
    data.write_jsonl(
        tmp_path / "verdicts.jsonl", [judged(row), judged(bad, No_Hallucination=False)]
    )
    with pytest.raises(data.RowError, match=r"rollouts\.jsonl:1: .*token_ids"):
        judge.main(
            [
                "pairs",
                "--verdicts",
                str(tmp_path / "verdicts.jsonl"),
                "--rollouts",
                str(tmp_path / "rollouts.jsonl"),
                "--questions",
                str(tmp_path / "questions.jsonl"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
