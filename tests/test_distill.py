"""Which demonstrations are kept: a truth table for every rule, teachers in turn, and engines behind
a real HTTP server.

A teacher's replies are kept beside the folder that is written, and nothing is asked twice. So a
file of replies, written here, decides what each teacher "said", and the real command then has
nothing to ask; were it to ask, the clinic would refuse these questions.
"""

import csv
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import build_folder
from PIL import Image
from test_benchmarks import EXAM_FAULTS, GONE, TURN_FAULTS, exchange
from test_clinic import wordings
from test_remote import Chat, keys, script, serve  # noqa: F401  (keys and serve are fixtures)

import answers
import clinic.roles
import clinic.world
import data
import distill
import sft
from command import schema
from engines import inference
from report.__main__ import main as run_report

OPTIONS = {"A": "biopsy", "B": "surgery", "C": "rest", "D": "steroids"}
REASON = "the cough is old and the film is dark so a surgeon must look"
GOOD = data.join_response(REASON, "B. surgery")
BAD = data.join_response(REASON, "C. rest")
REAL = os.environ.get("MEDEE_REAL_DATA")


def q(
    stem: str, key: str = "", answer: str = "B", options: dict | None = None, images: tuple = ()
) -> data.Question:
    return data.Question(
        stem, OPTIONS if options is None else options, answer, list(images), "bank", {}, key
    )


def write(path: Path, questions: list[data.Question]) -> Path:
    data.write_jsonl(path, [question.to_row() for question in questions])
    return path


def rows_of(path: Path) -> list[dict]:
    return [row for _, row in data.read_jsonl(path)]


# --------------------------------------------------------------------------------------------------
# The three criteria

ASKED = q("A man coughs. What is the best next step?", "q")
PHRASE = "we look at the film again and then"  # eight words
LOOP = " ".join([PHRASE] * 5)
FAULTS = {  # name: (response, criteria that must fail)
    "faultless": (GOOD, set()),
    "text alone": (data.join_response(REASON, "surgery"), set()),
    "wrong letter": (data.join_response(REASON, "C. rest"), {"correct"}),
    "unreadable answer": (data.join_response(REASON, "look it up"), {"correct"}),
    "letter against text": (data.join_response(REASON, "B. rest"), {"correct"}),
    "no thinking": ("<answer> B. surgery </answer>", {"structure"}),
    "empty thinking": (data.join_response("", "B. surgery"), {"structure"}),
    "too short": (data.join_response("it is so clear", "B. surgery"), {"structure"}),
    "just long enough": (data.join_response("it is all so clear", "B. surgery"), set()),
    "just short enough": (
        data.join_response(" ".join(f"w{i}" for i in range(40)), "B. surgery"),
        set(),
    ),
    "too long": (
        data.join_response(" ".join(f"w{i}" for i in range(41)), "B. surgery"),
        {"structure"},
    ),
    "text between the blocks": (
        f"<think> {REASON} </think> so <answer> B. surgery </answer>",
        {"structure"},
    ),
    "text after the blocks": (f"{GOOD} Good luck!", {"structure"}),
    "two answers": (f"{GOOD} <answer> B. surgery </answer>", {"structure"}),
    "two thoughts": (f"<think> {REASON} </think> {GOOD}", {"structure"}),
    "answer inside the thinking": (
        f"<think> {REASON} <answer> B. surgery </answer> </think>",
        {"structure", "correct"},
    ),
    "empty answer": (data.join_response(REASON, ""), {"structure", "correct"}),
    "no form at all": (f"{REASON}, so the answer is (B).", {"structure"}),
    "a loop": (data.join_response(LOOP, "B. surgery"), {"coherence"}),
    "said four times is no loop": (data.join_response(" ".join([PHRASE] * 4), "B. surgery"), set()),
    "drift into Chinese": (data.join_response(f"{REASON} 所以手术", "B. surgery"), {"coherence"}),
    "drift into Cyrillic": (
        data.join_response(f"{REASON} потому что", "B. surgery"),
        {"coherence"},
    ),
    "Greek letters are medicine": (data.join_response(f"{REASON}, α and β", "B. surgery"), set()),
    "knows the answer": (
        data.join_response(f"{REASON}, and the reference answer is surgery", "B. surgery"),
        {"coherence"},
    ),
    "was given the answer": (
        data.join_response(f"{REASON}. The provided answer says surgery", "B. surgery"),
        {"coherence"},
    ),
    "finds the answer": (
        data.join_response(f"{REASON}, so the correct answer is surgery", "B. surgery"),
        set(),
    ),
    "was given a summary": (
        data.join_response(f"{REASON}. The summary says surgery", "B. surgery"),
        {"coherence"},
    ),
    "sums up": (data.join_response(f"{REASON}. In summary, surgery", "B. surgery"), set()),
    "all three": ("потому что", {"correct", "structure", "coherence"}),
}


SENTENCE = "So the film is dark, and the cough is old, and that is why he must rest."
LONG = " ".join(f"word{i}" for i in range(373))
LOOPS = {  # name: (text, whether it is a loop)
    "a sentence until the tokens end": (f"{LONG} {' '.join([SENTENCE] * 200)}", True),
    "a sentence ten times at last": (f"{LONG} {' '.join([SENTENCE] * 10)}", True),
    "two sentences in turn": (f"{LONG} {' '.join([SENTENCE, 'But wait, is it?'] * 20)}", True),
    "two words": (f"{LONG} {'no, wait, ' * 200}", True),
    "only a number changes": (
        LONG + "".join(f" Step {i}: {SENTENCE}" for i in range(20)), True,
    ),
    "a sentence three times in a chain": (f"{LONG} ".join([SENTENCE] * 3), False),
    "a sentence five times in a long chain": (f"{LONG} ".join([SENTENCE] * 5), False),
    "no word twice": (LONG, False),
    "nothing": ("", False),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_what_is_said_over_and_over_and_not_what_is_said_three_times(name):
    text, expected = LOOPS[name]
    assert (answers.loop(text) is not None) == expected


def faults(response: str, finish: str = "stop", question: data.Question = ASKED) -> set[str]:
    return set(distill.check_chain(response, finish, question, 5, 40))


@pytest.mark.parametrize("name", FAULTS)
def test_each_criterion_catches_its_own_faults(name):
    response, expected = FAULTS[name]
    assert faults(response) == expected


def test_answer_that_was_cut_off_is_not_correct():
    assert faults(GOOD, "length") == {"correct"}


def test_script_of_the_question_itself_is_no_drift():
    response = FAULTS["drift into Cyrillic"][0]
    assert faults(response, question=q("Кашель. What is the best next step?")) == set()


def test_a_refusal_says_what_is_wrong_with_the_answer():
    said = {
        name: distill.check_chain(FAULTS[name][0], "stop", ASKED, 5, 40)["correct"]
        for name in ("wrong letter", "unreadable answer")
    }
    assert said == {
        "wrong letter": "the answer is C, not B",
        "unreadable answer": "the answer is wrong, or cannot be read",
    }


# --------------------------------------------------------------------------------------------------
# Reading a teacher's reply

# name: (text, reasoning told apart, the response that is read). None: the text as it is, which the
# rules refuse.
READ = {
    "as asked": (GOOD, "", GOOD),
    "spaces and lines": (
        f"\n<think>\n{REASON}\n</think>\n\n<answer>B. surgery</answer>\n",
        "",
        GOOD,
    ),
    "an explanation before the block": (
        f"<think>{REASON}</think>\nIn short: look.\n<answer>B. surgery</answer>",
        "",
        GOOD,
    ),
    "no block, but a stated answer": (f"<think>{REASON}</think>\nSo the answer is (B).", "", GOOD),
    "no block, an answer stated twice": (
        f"<think>{REASON}</think>\nPerhaps the answer is C. No, the answer is B.",
        "",
        GOOD,
    ),
    "no block, a letter alone": (f"<think>{REASON}</think>\n\nB", "", GOOD),
    "no block, an option that is not there": (
        f"<think>{REASON}</think> The answer is (E).",
        "",
        None,
    ),
    "stated inside the thinking only": (
        f"<think>{REASON}, so the answer is (B)</think> See above.",
        "",
        None,
    ),
    "two blocks": (f"<think>{REASON}</think> <answer>C</answer> <answer>B</answer>", "", None),
    "a block that does not end": (f"<think>{REASON}</think> <answer>B", "", None),
    "two thoughts": (
        f"<think>{REASON}</think> <think>{REASON}</think> <answer>B</answer>",
        "",
        None,
    ),
    "no thinking": ("The answer is (B).", "", None),
    "thinking that does not end": (f"<think>{REASON}, the answer is (B).", "", None),
    "told apart": ("<answer> B. surgery </answer>", REASON, GOOD),
    "told apart, an explanation around": (
        "Look first.\n<answer>B. surgery</answer>\nDone.",
        f"\n{REASON}\n",
        GOOD,
    ),
    "told apart, a stated answer": ("**The answer is (B).**", REASON, GOOD),
    "told apart, and a second think block in the text": (
        "<think> In brief. </think> <answer> B. surgery </answer>",
        REASON,
        GOOD,
    ),
    "told apart, and a think block that does not end": (
        "<think> In brief. The answer is (B).",
        REASON,
        None,
    ),
    "told apart, no answer": ("I must see the film.", REASON, None),
}


@pytest.mark.parametrize("name", READ)
def test_a_reply_is_read_by_one_rule_or_left_as_it_is(name):
    text, reasoning, expected = READ[name]
    response = distill.read_completion(text, reasoning, OPTIONS)
    assert response == (expected or text)
    assert (faults(response) == set()) == (expected is not None)


def test_tags_inside_told_reasoning_are_refused_and_not_an_error():
    response = distill.read_completion(
        "<answer> B </answer>", f"{REASON}, and I must write <answer> tags", OPTIONS
    )
    assert "structure" in faults(response)


def test_an_open_question_needs_its_answer_in_the_block():
    question = q("Which?", options={}, answer="renal ultrasound")
    read = [
        distill.read_completion(text, REASON, {})
        for text in ("<answer> Renal ultrasound. </answer>", "The answer is renal ultrasound.")
    ]
    assert [faults(text, question=question) for text in read] == [set(), {"correct", "structure"}]


# --------------------------------------------------------------------------------------------------
# Teachers in turn

TEACHERS = ("thorough", "hasty", "bookish")


def keep_replies(argv: list[str], name: str, said: dict[str, list[str]]) -> None:
    """Writes the file of what teacher clinic:NAME replied to a command: {question id: response of
    each sample}."""
    args = distill.parse(argv)
    questions = schema.read_questions(args.questions)
    requests = inference.question_requests(questions, Path(args.images), 1)
    asked = {
        request.id: inference.content_of(request.messages, request.images) for request in requests
    }
    rows = [
        {
            "id": key,
            "sample": k,
            "engine": f"clinic:{name}",
            "response": text,
            "token_ids": None,
            "finish_reason": "stop",
            "seed": 0,
            "response_sha": data.response_hash(text),
            "reasoning": "",
            "asked": asked[key],
        }
        for key, attempts in said.items()
        for k, text in enumerate(attempts)
    ]
    sampling = inference.Sampling(args.temperature, 1.0, args.max_tokens, args.seed)
    data.write_jsonl(
        inference.completions_file(args, "teacher", f"clinic:{name}", sampling),
        map(inference.sealed, rows),
    )


def replies_of(out: Path, name: str) -> Path:
    """The one file of what teacher clinic:NAME replied, beside a folder."""
    (path,) = (out.parent / "replies").glob(f"teacher-clinic-{name}-????????.jsonl")
    return path


def run_distill(
    questions: Path,
    out: Path,
    *more: str,
    said: dict | None = None,
    teachers: tuple = tuple(f"clinic:{name}" for name in TEACHERS),
) -> tuple[list[dict], list[dict]]:
    """(demonstrations, rejected rows) of the real command. said: {name: what clinic:NAME has
    replied before}."""
    argv = ["run", "--questions", str(questions), "--teachers", *teachers, "--out", str(out), *more]
    for name, completions in (said or {}).items():
        keep_replies(argv, name, completions)
    distill.main(argv)
    return rows_of(out / "demos.jsonl"), rows_of(out / "rejected.jsonl")


def held(*folders: Path) -> dict[Path, tuple[bytes, int]]:
    """{file: (its bytes, when it was written)} of everything in folders."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def said_by(name: str, k: int = 0) -> str:
    return data.join_response(f"{REASON}, says {name}" + f" once more, {k}" * (k > 0), "B. surgery")


def prepared(
    tmp_path: Path, good: dict[str, str], *more: str, samples: int = 1
) -> tuple[list[dict], list[dict]]:
    """Runs with one question a key. Its value names the teachers (by first letter) whose responses
    are good."""
    questions = write(tmp_path / "questions.jsonl", [q(f"Question {key}?", key) for key in good])
    said = {
        name: {
            key: [said_by(name, k) if name[0] in able else BAD for k in range(samples)]
            for key, able in good.items()
        }
        for name in TEACHERS
    }
    return run_distill(questions, tmp_path / "out", *more, said=said)


def by(row: dict) -> str:
    return row["teacher"].removeprefix("clinic:")


def test_teachers_take_turns(tmp_path):
    demos, rejected = prepared(tmp_path, {str(i): "thb" for i in range(7)})
    assert [by(demo) for demo in demos] == [
        "thorough",
        "hasty",
        "bookish",
        "thorough",
        "hasty",
        "bookish",
        "thorough",
    ]
    assert [demo["id"] for demo in demos] == list("0123456") and not rejected


def test_teacher_that_fails_is_replaced_by_the_next_in_turn(tmp_path):
    # first asked, in turn: thorough, hasty, bookish, thorough, hasty, bookish, thorough, hasty
    demos, rejected = prepared(
        tmp_path, {"0": "t", "1": "b", "2": "t", "3": "b", "4": "t", "5": "hb", "6": "hb", "7": ""}
    )
    assert {demo["id"]: by(demo) for demo in demos} == {
        "0": "thorough",
        "1": "bookish",
        "2": "thorough",
        "3": "bookish",
        "4": "thorough",
        "5": "bookish",
        "6": "hasty",
    }
    refused = {(row["id"], by(row)) for row in rejected}
    assert refused == {
        ("1", "hasty"),
        ("2", "bookish"),
        ("3", "thorough"),
        ("3", "hasty"),
        ("4", "hasty"),
        ("4", "bookish"),
        ("6", "thorough"),
        ("7", "hasty"),
        ("7", "bookish"),
        ("7", "thorough"),
    }
    assert len(refused) == len(rejected) and all(
        row["faults"] == {"correct": "the answer is C, not B"} and row["response"] == BAD
        for row in rejected
    )
    for demo in demos:
        assert f"says {by(demo)} </think>" in demo["messages"][2]["content"]
    figures = json.loads((tmp_path / "out" / "stage.json").read_text())["figures"]
    assert figures == {
        "demos": 7,
        "refused": 10,
        "teachers": {"clinic:thorough": 3, "clinic:bookish": 3, "clinic:hasty": 1},
        "faults": {"correct": 10},
    }


@pytest.mark.parametrize(("form", "said"), [("letter-text", "B. surgery"), ("text", "surgery")])
def test_demonstration_is_in_the_papers_message_format(tmp_path, form, said):
    questions = write(tmp_path / "questions.jsonl", [q("Question?", "k")])
    said_so = {"thorough": {"k": [data.join_response(REASON, "(B)")]}}
    (demo,), _ = run_distill(questions, tmp_path / "out", "--answer-form", form, said=said_so)
    assert demo == {
        "id": "k",
        "sample": 0,
        "messages": [
            {"role": "system", "content": data.SYSTEM_PROMPT},
            {
                "role": "user",
                "content": (
                    "Question?\nAnswer Choices:\n(A) biopsy\n(B) surgery\n(C) rest\n(D) steroids"
                ),
            },
            {
                "role": "assistant",
                "content": f"<think> {REASON} </think> <answer> {said} </answer>",
            },
        ],
        "images": [],
        "teacher": "clinic:thorough",
        "checks": {"correct": True, "structure": True, "coherence": True},
    }
    assert run_report(["check", str(tmp_path / "out" / "demos.jsonl")]) == 0


@pytest.mark.parametrize("form", ["letter-text", "text"])
@pytest.mark.parametrize(
    "options",
    [OPTIONS, dict(zip("ABCD", ["↑ TSH", "↓ TSH", "-5", "+5"])), {}],
    ids=["words", "symbols", "open-ended"],
)
def test_answer_of_a_demonstration_is_read_as_right(form, options):
    # whatever a model learns to write must count as right later
    question = q("Which?", "k", options=options, answer="B" if options else "renal ultrasound")
    demo = distill.make_demo(distill.Chain(question, 0, "clinic:thorough", GOOD, {}), form)
    assert answers.is_correct(demo["messages"][2]["content"], question)


@pytest.fixture(scope="module")
def distilled(world, tmp_path_factory) -> Path:
    run, bank = tmp_path_factory.mktemp("distilled"), schema.read_questions(world / "bank.jsonl")
    texts = write(run / "questions.jsonl", [question for question in bank if not question.images])
    run_distill(texts, run / "out")
    return run / "out"


def test_every_demonstration_of_the_clinics_teachers_is_one_that_the_truth_confirms(distilled):
    bank = schema.read_questions(distilled.parent / "questions.jsonl")
    questions = {question.id: question for question in bank}
    demos = rows_of(distilled / "demos.jsonl")
    assert len(demos) >= 11 and {by(demo) for demo in demos} == set(TEACHERS)
    for demo in demos:
        question = questions[demo["id"]]
        case, kind = clinic.world.sentence_truth(question.question), question.meta["kind"]
        chains = [data.split_response(said)[0] for said in wordings(case, kind, by(demo))]
        answer = f"<answer> {question.answer}. {question.answer_text()} </answer>"
        said = [f"<think> {thinking} </think> {answer}" for thinking in chains]
        assert demo["messages"][2]["content"] in said


def test_resumed_distillation_asks_nothing_twice(distilled, tmp_path):
    shutil.copytree(distilled.parent / "replies", tmp_path / "replies")
    path = replies_of(tmp_path / "out", "hasty")
    whole = path.read_bytes()
    kept = whole[: len(whole) // 2]
    assert not kept.endswith(b"\n")  # killed in the middle of a line
    path.write_bytes(kept)
    run_distill(distilled.parent / "questions.jsonl", tmp_path / "out")
    for name in ("demos.jsonl", "rejected.jsonl", "review.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (distilled / name).read_bytes()
    for name in TEACHERS:
        ours, theirs = (replies_of(out, name) for out in (tmp_path / "out", distilled))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_question_whose_text_has_changed_is_asked_anew_and_no_other(serve, tmp_path):
    server = served(serve, {"teacher": lambda question, time_: said_by("teacher", time_)})
    questions, teachers = marked(tmp_path, "ab"), (spec(server, "teacher"),)
    run_distill(questions, tmp_path / "out", teachers=teachers)
    write(questions, [q("What is <<new>>?", "a"), q("What is <<b>>?", "b")])
    before, asked = held(tmp_path), server.by_model.copy()
    with pytest.raises(data.RowError, match="out: was finished .*questions.jsonl changed"):
        run_distill(questions, tmp_path / "out", teachers=teachers)
    assert held(tmp_path) == before and server.by_model == asked
    demos, _ = run_distill(questions, tmp_path / "second", teachers=teachers)
    assert (
        server.by_model == {("teacher", name): 1 for name in ("a", "b", "new")} and len(demos) == 2
    )


def test_other_sampling_is_refused_in_the_same_folder_and_asked_anew_in_another(serve, tmp_path):
    server = served(serve, {"teacher": lambda question, time_: said_by("teacher", time_)})
    questions, teachers = marked(tmp_path, "ab"), (spec(server, "teacher"),)
    run_distill(questions, tmp_path / "out", teachers=teachers)
    before, warm = held(tmp_path), ("--temperature", "0.5")
    with pytest.raises(data.RowError, match="out: was finished .*temperature 1.0 -> 0.5"):
        run_distill(questions, tmp_path / "out", *warm, teachers=teachers)
    assert held(tmp_path) == before and server.by_model.total() == 2
    (tmp_path / "out" / "stage.json").rename(tmp_path / "stage.json")  # as if it had been killed
    with pytest.raises(data.RowError, match="out: was begun .*temperature 1.0 -> 0.5"):
        run_distill(questions, tmp_path / "out", *warm, teachers=teachers)
    (tmp_path / "stage.json").rename(tmp_path / "out" / "stage.json")
    assert held(tmp_path) == before and server.by_model.total() == 2
    run_distill(questions, tmp_path / "second", *warm, teachers=teachers)
    assert server.by_model == {("teacher", name): 2 for name in "ab"}
    del before[tmp_path / "replies" / "paid.jsonl"]  # the ledger grows
    assert before.items() <= held(tmp_path).items()  # the first replies and results stay
    assert len(list((tmp_path / "replies").glob("teacher-*.jsonl"))) == 2


def test_what_would_go_wrong_late_is_refused_at_once(tmp_path):
    questions = write(tmp_path / "out" / "questions.jsonl", [q("Question?", "k")])
    with pytest.raises(
        data.RowError, match="--out .*out: holds questions.jsonl, which no finished"
    ):
        run_distill(questions, tmp_path / "out")
    chains = tmp_path / "out" / "chains.jsonl"
    data.write_jsonl(chains, [record("1?", "Surgery.")])
    with pytest.raises(data.RowError, match="--out .*out: holds .*chains.jsonl"):
        distill.main(["import", str(chains), "--format", "huatuo", "--out", str(chains.parent)])


def test_questions_without_a_demonstration_are_counted(tmp_path, capsys):
    prepared(tmp_path, {"0": "t", "1": "", "2": ""})
    assert "2 of 3 questions have no demonstration" in capsys.readouterr().out
    prepared(tmp_path / "all", {"0": "t"})
    assert "no demonstration" not in capsys.readouterr().out


def test_unknown_teacher_and_a_stranger_to_expand_are_refused_by_name(tmp_path):
    questions = write(tmp_path / "questions.jsonl", [q("Question?", "k")])
    with pytest.raises(inference.Unavailable, match="oracle:x"):
        run_distill(questions, tmp_path / "out", teachers=("oracle:x",))
    with pytest.raises(data.RowError, match="--expand: gemini:x is not among the --teachers"):
        run_distill(questions, tmp_path / "out", "--expand", "gemini:x", "clinic:hasty")


# --------------------------------------------------------------------------------------------------
# Engines behind a server: reasoning told apart, expansion, checker

YES = {"Logical_Structure": "Yes", "Plausibility_Coherence": "Yes"}
ANSWER = "<answer> B. surgery </answer>"
SHORT = "a dark film, so surgery it is"


def served(serve, said: dict):
    """A server with the models teacher, expander and checker. said[model](question, time) is a
    text, or what Chat.good takes."""

    def play(question, time_, body):
        with lock:
            asked[body["model"], question] += 1
            time_ = asked[body["model"], question]
        what = said[body["model"]](question, time_)
        return what if isinstance(what, tuple) else Chat.good(what)

    asked, lock, server = Counter(), threading.Lock(), serve(play)
    server.by_model = asked
    return server


def spec(server, name: str) -> str:
    return f"{server.base}/v1#{name}"


def marked(tmp_path: Path, names) -> Path:
    return write(tmp_path / "questions.jsonl", [q(f"What is <<{name}>>?", name) for name in names])


def test_what_a_server_tells_apart_as_reasoning_is_the_chain_as_it_is(serve, tmp_path):
    said = {
        "apart": Chat.good("Look.\n<answer>B</answer>", thoughts=f"\n{REASON}.\nYes — surely!\n"),
        "in the text": Chat.good(f"<think>\n{REASON}\n</think>\nThe answer is (B)."),
        "no answer": Chat.good("Look.", thoughts=REASON),
        "wrong": Chat.good("<answer>C</answer>", thoughts=REASON),
        "cut off": Chat.good("<answer>B</answer>", thoughts=REASON, finish="length"),
        "blocked": Chat.good("", finish="content_filter"),
    }
    server = served(serve, {"teacher": lambda question, time_: said[question]})
    demos, rejected = run_distill(
        marked(tmp_path, said), tmp_path / "out", teachers=(spec(server, "teacher"),)
    )
    assert {demo["id"]: demo["messages"][2]["content"] for demo in demos} == {
        "apart": f"<think> {REASON}.\nYes — surely! </think> <answer> B. surgery </answer>",
        "in the text": f"<think> {REASON} </think> <answer> B. surgery </answer>",
    }
    assert {row["id"]: row["faults"].get("correct") for row in rejected} == {
        "no answer": "the answer is wrong, or cannot be read",
        "wrong": "the answer is C, not B",
        "cut off": "the response is not finished: length",
        "blocked": "the response is not finished: blocked",
    }
    _, _, body = server.requests[0]
    assert [message["role"] for message in body["messages"]] == ["system", "user"] and body[
        "messages"
    ][0]["content"] == data.SYSTEM_PROMPT


FULL = f"{REASON}. Wait, could it be steroids? No, the film is too dark for that"
EXPANSIONS = {  # name: (the expander's reply, faults)
    "plain text": (Chat.good(f"{FULL}\n\n{ANSWER}"), set()),
    "in think tags": (Chat.good(f"<think>{FULL}</think> {ANSWER}"), set()),
    "with thoughts of its own": (
        Chat.good(
            f"{FULL} {ANSWER}", thoughts="The user wants a chain. The reference answer is B."
        ),
        set(),
    ),
    "another answer": (Chat.good(f"{FULL} <answer> C. rest </answer>"), {"correct"}),
    "an answer that cannot be read": (Chat.good(f"{FULL} <answer> B or C </answer>"), {"correct"}),
    "no answer": (Chat.good(FULL), {"correct", "structure"}),
    "cut off": (Chat.good(f"{FULL} {ANSWER}", finish="length"), {"correct"}),
    "the summary again": (Chat.good(f"{SHORT} {ANSWER}"), {"expansion"}),
    "a loop": (Chat.good(LOOP + ANSWER), {"coherence"}),
    "speaks of the summary": (Chat.good(f"{FULL}, as the summary states. {ANSWER}"), {"coherence"}),
    "two answers": (Chat.good(f"{FULL} {ANSWER} {ANSWER}"), {"structure"}),
    "too long": (Chat.good(" ".join(f"w{i}" for i in range(51)) + ANSWER), {"structure"}),
    "another script": (Chat.good(f"{FULL} 手术 {ANSWER}"), {"coherence"}),
}


def test_a_summary_is_written_out_and_the_result_must_meet_every_criterion_and_keep_the_answer(
    serve, tmp_path
):
    names = [*EXPANSIONS, "teacher is wrong", "teacher is not in form"]
    texts = {
        "teacher is wrong": data.join_response(SHORT, "C. rest"),
        "teacher is not in form": f"{SHORT}. The answer is (B).",
    }
    said = {
        "teacher": lambda question, time_: texts.get(question, data.join_response(SHORT, "B")),
        "expander": lambda question, time_: EXPANSIONS.get(question, EXPANSIONS["plain text"])[0],
    }
    server = served(serve, said)
    teacher, expander = spec(server, "teacher"), spec(server, "expander")
    command = [
        marked(tmp_path, names),
        tmp_path / "out",
        "--expand",
        teacher,
        expander,
        "--words",
        "5",
        "50",
    ]
    demos, rejected = run_distill(*command, teachers=(teacher,))
    assert {row["id"]: set(row["faults"]) for row in rejected} == {
        **{name: wrong for name, (_, wrong) in EXPANSIONS.items() if wrong},
        "teacher is wrong": {"correct"},
    }
    assert {demo["id"] for demo in demos} == {
        name for name in names if name not in {row["id"] for row in rejected}
    }
    for demo in demos:
        assert demo["messages"][2]["content"] == data.join_response(FULL, "B. surgery")
        assert demo["teacher"] == teacher and demo["expander"] == expander
    assert server.by_model == {
        **{("teacher", name): 1 for name in names},
        **{("expander", name): 1 for name in names if name != "teacher is wrong"},
    }
    prompts = [
        body["messages"][0]["content"]
        for _, _, body in server.requests
        if body["model"] == "expander"
    ]
    assert all(
        f"<Summary> {SHORT}" in prompt
        and "(C) rest" in prompt
        and "<Answer> B. surgery </Answer>" in prompt
        for prompt in prompts
    )
    assert {
        row["id"]: row["faults"]["correct"]
        for row in rejected
        if row["id"] in ("cut off", "another answer")
    } == {
        "cut off": "the response is not finished: length",
        "another answer": "the answer is C, not B",
    }
    again = run_distill(command[0], tmp_path / "again", *command[2:], teachers=(teacher,))
    run_distill(*command, teachers=(teacher,))
    # the same command again asks nothing, in this folder or in another
    assert again == (demos, rejected) and max(server.by_model.values()) == 1


def test_only_the_named_teacher_is_expanded(serve, tmp_path):
    said = {name: lambda question, time_, name=name: said_by(name) for name in ("one", "two")}
    server = served(serve, {**said, "expander": lambda question, time_: f"{FULL} {ANSWER}"})
    one, two = spec(server, "one"), spec(server, "two")
    demos, _ = run_distill(
        marked(tmp_path, "abcd"),
        tmp_path / "out",
        "--expand",
        two,
        spec(server, "expander"),
        teachers=(one, two),
    )
    assert [demo["messages"][2]["content"] for demo in demos] == [
        said_by("one"),
        data.join_response(FULL, "B. surgery"),
    ] * 2
    assert [demo.get("expander") for demo in demos] == [None, spec(server, "expander")] * 2


# name: (what the checker says, one reply an attempt, the last repeated; faults; requests)
CHECKED = {
    "yes": ([json.dumps(YES)], set(), 1),
    "prose around": ([f"Well {{hm}}. {json.dumps(YES)} So much for that."], set(), 1),
    "no structure": ([json.dumps({**YES, "Logical_Structure": "No"})], {"structure"}, 1),
    "not plausible": ([json.dumps({**YES, "Plausibility_Coherence": "no"})], {"coherence"}, 1),
    "neither": ([json.dumps(dict.fromkeys(YES, "No"))], {"structure", "coherence"}, 1),
    "prose, then yes": (["All is well.", json.dumps(YES)], set(), 2),
    "prose, then no": (
        ["All is well.", json.dumps({**YES, "Logical_Structure": "No"})],
        {"structure"},
        2,
    ),
    "always prose": (["All is well."], {"unchecked"}, 3),
    "a key missing": (['{"Logical_Structure": "Yes"}'], {"unchecked"}, 3),
    "echoed": ([json.dumps(dict.fromkeys(YES, "Yes/No"))], {"unchecked"}, 3),
    "another word": ([json.dumps({**YES, "Logical_Structure": "Mostly"})], {"unchecked"}, 3),
    "no object": (['["Yes", "Yes"]'], {"unchecked"}, 3),
    "cut off": ([Chat.good(json.dumps(YES) + " But", finish="length")], {"unchecked"}, 3),
    "blocked": ([Chat.good("", finish="content_filter")], {"unchecked"}, 3),
    "not asked": ([json.dumps(YES)], {"correct"}, 0),
}


def test_the_checkers_verdict_is_read_strictly_or_asked_again_and_never_taken_for_a_yes(
    serve, tmp_path, capsys
):
    said = {
        "teacher": lambda question, time_: BAD if question == "not asked" else GOOD,
        "checker": lambda question, time_: CHECKED[question][0][
            min(time_, len(CHECKED[question][0])) - 1
        ],
    }
    server = served(serve, said)
    command = [marked(tmp_path, CHECKED), tmp_path / "out", "--checker", spec(server, "checker")]
    demos, rejected = run_distill(*command, teachers=(spec(server, "teacher"),))
    assert {demo["id"] for demo in demos} == {
        name for name, (_, wrong, _) in CHECKED.items() if not wrong
    }
    assert {row["id"]: set(row["faults"]) for row in rejected} == {
        name: wrong for name, (_, wrong, _) in CHECKED.items() if wrong
    }
    assert all(demo["checker"] == spec(server, "checker") for demo in demos)
    assert {name: server.by_model["checker", name] for name in CHECKED} == {
        name: times for name, (_, _, times) in CHECKED.items()
    }
    unchecked = sum("unchecked" in wrong for _, wrong, _ in CHECKED.values())
    assert f"unchecked {unchecked}" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "out" / "stage.json").read_text())["figures"]["faults"]["unchecked"]
        == unchecked
    )
    before, teachers = server.by_model.copy(), (spec(server, "teacher"),)
    run_distill(*command, teachers=teachers)
    again = run_distill(command[0], tmp_path / "again", *command[2:], teachers=teachers)
    assert again == (demos, rejected) and server.by_model == before  # not even the unreadable ones


def test_a_chain_that_the_checker_refuses_is_replaced_by_the_next_teachers(serve, tmp_path):
    said = {name: lambda question, time_, name=name: said_by(name) for name in ("one", "two")}
    refused = json.dumps({**YES, "Plausibility_Coherence": "No"})
    server = served(
        serve,
        {**said, "checker": lambda question, time_: refused if time_ == 1 else json.dumps(YES)},
    )
    teachers = (spec(server, "one"), spec(server, "two"))
    demos, rejected = run_distill(
        marked(tmp_path, "ab"),
        tmp_path / "out",
        "--checker",
        spec(server, "checker"),
        teachers=teachers,
    )
    assert [demo["teacher"] for demo in demos] == [teachers[1], teachers[0]] and len(rejected) == 2


def test_images_go_to_teacher_and_checker_and_into_the_demonstration(serve, tmp_path):
    Image.new("RGB", (30, 20), "green").save(tmp_path / "film.png")
    questions = write(
        tmp_path / "questions.jsonl",
        [q("What is <<it>>?", "it", images=("film.png",)), q("What is <<text>>?", "text")],
    )
    server = served(
        serve,
        {
            "teacher": lambda *_: GOOD,
            "expander": lambda *_: f"{FULL} {ANSWER}",
            "checker": lambda *_: json.dumps(YES),
        },
    )
    teacher = spec(server, "teacher")
    flags = [
        "--images",
        str(tmp_path),
        "--expand",
        teacher,
        spec(server, "expander"),
        "--checker",
        spec(server, "checker"),
    ]
    demos, _ = run_distill(questions, tmp_path / "out", *flags, teachers=(teacher,))
    assert {demo["id"]: demo["images"] for demo in demos} == {"it": ["film.png"], "text": []}
    sent = {
        (body["model"], "<<it>>" in json.dumps(body)): json.dumps(body).count("data:image/png")
        for _, _, body in server.requests
    }
    assert sent == {
        ("teacher", True): 1,
        ("expander", True): 0,
        ("checker", True): 1,
        ("teacher", False): 0,
        ("expander", False): 0,
        ("checker", False): 0,
    }
    (tmp_path / "film.png").unlink()
    before = len(server.requests)
    with pytest.raises(data.RowError, match="film.png is not below"):
        run_distill(questions, tmp_path / "other", *flags, teachers=(teacher,))
    assert len(server.requests) == before


def test_a_run_that_is_killed_at_each_stage_goes_on_and_asks_nothing_twice(serve, tmp_path):
    """kill -9 while the teacher answers, while summaries are written out, while the checker judges;
    then to the end."""
    names, limit, answered, lock = [f"q{i}" for i in range(12)], 0, Counter(), threading.Lock()
    said = {
        "teacher": data.join_response(SHORT, "B"),
        "expander": f"{FULL} {ANSWER}",
        "checker": json.dumps(YES),
    }

    def play(question, time_, body):
        with lock:
            if answered.total() >= limit:
                return "hang"
            answered[body["model"], question] += 1
        return Chat.good(said[body["model"]])

    server = serve(play)
    teacher, out, kept = spec(server, "teacher"), tmp_path / "out", tmp_path / "replies"
    words = [
        "distill.py",
        "run",
        "--questions",
        str(marked(tmp_path, names)),
        "--teachers",
        teacher,
        "--expand",
        teacher,
        spec(server, "expander"),
    ]
    words += ["--checker", spec(server, "checker"), "--out", str(out), "--concurrency", "3"]
    for limit in (7, 20, 31):
        process = script(tmp_path, *words)
        while process.poll() is None:
            if sum(path.read_bytes().count(b"\n") for path in kept.glob("*-http*.jsonl")) >= limit:
                break
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        assert (
            process.wait() == -signal.SIGKILL
            and not (out / "stage.json").exists()
            and not (out / "demos.jsonl").exists()
        )
    limit = 1000
    process = script(tmp_path, *words)
    text = process.communicate()[0]
    assert process.returncode == 0 and "12 demonstrations" in text
    assert answered == {(name, question): 1 for name in said for question in names}
    assert len(rows_of(out / "demos.jsonl")) == 12


# --------------------------------------------------------------------------------------------------
# Human review


def fill_in(sheet: Path, copy: Path, verdicts: dict[str, str]) -> Path:
    with open(sheet, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["verdict"] = verdicts.get(row["id"], "")
    with open(copy, "w", newline="", encoding="utf-8") as file:  # as a spreadsheet would save it
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return copy


def read_sheet(path: Path) -> dict[str, dict]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def named(key: str, response: str) -> str:
    return distill.Chain(q("", key), 0, "", response, {}).key()


LOOPING = data.join_response(LOOP, "B. surgery")
REVIEWED = {
    "good": GOOD,
    "good, no": GOOD,
    "loop": LOOPING,
    "loop, yes": LOOPING,
    "loop, no": LOOPING,
    "wrong": BAD,
    "no form": f"{REASON}, so the answer is (B).",
}


HASTY = ("clinic:hasty",)


@pytest.fixture
def reviewed(tmp_path) -> Path:
    """A run folder with questions.jsonl and the finished folder out."""
    questions = write(
        tmp_path / "questions.jsonl", [q(f"Question {key}?", key) for key in REVIEWED]
    )
    said = {"hasty": {key: [text] for key, text in REVIEWED.items()}}
    run_distill(questions, tmp_path / "out", teachers=HASTY, said=said)
    return tmp_path


def test_the_sheet_has_every_chain_that_a_human_may_keep_with_an_empty_verdict(reviewed):
    sheet = read_sheet(reviewed / "out" / "review.csv")
    assert list(sheet) == ["good", "good, no", "loop", "loop, yes", "loop, no"] and not any(
        row["verdict"] for row in sheet.values()
    )
    row = sheet["good"]
    assert (row["sample"], row["teacher"], row["reasoning"], row["answer"], row["checks"]) == (
        "0",
        "clinic:hasty",
        REASON,
        "B. surgery",
        "passed",
    )
    assert (
        row["question"] == data.question_text(q("Question good?"))
        and "coherence: a loop" in sheet["loop"]["checks"]
    )
    assert (reviewed / "out" / "review.csv").read_bytes().startswith(b"\xef\xbb\xbf")


def test_a_humans_yes_and_no_overrule_both_ways(reviewed):
    told = fill_in(
        reviewed / "out" / "review.csv",
        reviewed / "filled.csv",
        {"good, no": "No", "loop, yes": " YES ", "loop, no": "n"},
    )
    asked = replies_of(reviewed / "out", "hasty").read_bytes()
    # the sheet that is written now holds the verdicts, and a third folder goes on with it
    for name, sheet in (("second", told), ("third", reviewed / "second" / "review.csv")):
        out = reviewed / name
        flags = ["--review", str(sheet)]
        demos, rejected = run_distill(reviewed / "questions.jsonl", out, *flags, teachers=HASTY)
        assert [demo["id"] for demo in demos] == ["good", "loop, yes"]
        assert {row["id"]: set(row["faults"]) for row in rejected} == {
            "good, no": {"review"},
            "loop": {"coherence"},
            "loop, no": {"coherence", "review"},
            "wrong": {"correct"},
            "no form": {"structure"},
        }
        assert demos[1]["review"] == "yes" and "review" not in demos[0]
        assert demos[1]["checks"] == {"correct": True, "structure": True, "coherence": False}
        verdicts = {key: row["verdict"] for key, row in read_sheet(out / "review.csv").items()}
        assert verdicts == {
            "good": "",
            "good, no": "no",
            "loop": "",
            "loop, yes": "yes",
            "loop, no": "no",
        }
    assert replies_of(reviewed / "out", "hasty").read_bytes() == asked


def test_no_human_makes_a_wrong_answer_right_or_gives_form_to_what_has_none(reviewed, capsys):
    lines = ["chain,verdict"] + [f"{named(key, REVIEWED[key])},yes" for key in ("wrong", "no form")]
    (reviewed / "filled.csv").write_text("\n".join(lines) + "\n")
    flags = ["--review", str(reviewed / "filled.csv")]
    questions, out = reviewed / "questions.jsonl", reviewed / "second"
    demos, _ = run_distill(questions, out, *flags, teachers=HASTY)
    assert [demo["id"] for demo in demos] == ["good", "good, no"]
    assert (
        "2 verdicts are on chains that this run did not make, or that no verdict can keep"
        in capsys.readouterr().out
    )


def test_a_human_is_asked_before_the_checker_and_a_refused_chain_gives_way_to_the_next_teachers(
    serve, tmp_path
):
    server = served(
        serve,
        {
            "one": lambda *_: said_by("one"),
            "two": lambda *_: said_by("two"),
            "checker": lambda *_: json.dumps({**YES, "Logical_Structure": "No"}),
        },
    )
    one, two = spec(server, "one"), spec(server, "two")
    lines = [
        f"{named(key, said_by(name))},{word}"
        for key, name, word in (("a", "one", "no"), ("a", "two", "yes"), ("b", "two", "yes"))
    ]
    (tmp_path / "filled.csv").write_text("\n".join(["chain,verdict", *lines]) + "\n")
    flags = ["--checker", spec(server, "checker"), "--review", str(tmp_path / "filled.csv")]
    demos, rejected = run_distill(
        marked(tmp_path, "abc"), tmp_path / "out", *flags, teachers=(one, two)
    )
    assert [(demo["id"], demo["teacher"], demo["review"]) for demo in demos] == [
        ("a", two, "yes"),
        ("b", two, "yes"),
    ]
    assert {(row["id"], row["teacher"]): set(row["faults"]) for row in rejected} == {
        ("a", one): {"review"},
        ("c", one): {"structure"},
        ("c", two): {"structure"},
    }
    assert {key for key in server.by_model if key[0] == "checker"} == {("checker", "c")}


def test_verdicts_written_into_the_runs_own_sheet_survive_every_rerun_and_count(reviewed):
    out, questions = reviewed / "out", reviewed / "questions.jsonl"
    sheet = fill_in(out / "review.csv", out / "review.csv", {"loop": "yes"})
    before, results = sheet.read_bytes(), held(out, reviewed / "replies")
    demos, _ = run_distill(questions, out, teachers=HASTY)
    assert "loop" not in {demo["id"] for demo in demos} and sheet.read_bytes() == before
    for more, said in (
        (["--review", str(sheet)], "out: was finished with other settings"),
        (["--words", "6", "4000"], "out: was finished with other settings"),
    ):
        with pytest.raises(data.RowError, match=said):
            run_distill(questions, out, *more, teachers=HASTY)
    assert held(out, reviewed / "replies") == results
    demos, _ = run_distill(questions, reviewed / "second", "--review", str(sheet), teachers=HASTY)
    assert "loop" in {demo["id"] for demo in demos} and sheet.read_bytes() == before
    (out / "stage.json").unlink()  # as if it had been killed after it wrote the sheet
    with pytest.raises(data.RowError, match="review.csv: is there already, and a human may"):
        run_distill(questions, out, teachers=HASTY)
    assert sheet.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("chain,verdict\na,maybe\n", "row 2: verdict: 'maybe' is neither yes nor no"),
        ("chain,verdict\na,yes\na,no\n", "row 3: verdict: another row says the opposite"),
        (
            "chain;verdict\na;yes\n",
            "no column .*: columns are .*, expected chain and verdict among them",
        ),
        ("chain,verdict\na\n", "row 2: no column 'verdict'"),
        ("chain,id\na,1\n", "no column .*: columns are .*, expected chain and verdict among them"),
        (None, "no such file"),
    ],
)
def test_a_sheet_that_cannot_be_used_is_refused_before_anything_is_done(reviewed, text, said):
    if text:
        (reviewed / "filled.csv").write_text(text)
    before, flags = held(reviewed), ["--review", str(reviewed / "filled.csv")]
    for name in ("out", "second"):
        with pytest.raises(data.RowError, match="filled.csv: " + said):
            run_distill(reviewed / "questions.jsonl", reviewed / name, *flags, teachers=HASTY)
    assert held(reviewed) == before and not (reviewed / "second").exists()


# --------------------------------------------------------------------------------------------------
# Chains that exist already


def run_import(path: Path, form: str, *more: str) -> tuple[list[dict], list[dict]]:
    out = path.parent / "imported"
    distill.main(["import", str(path), "--format", form, "--out", str(out), *more])
    assert run_report(["check", str(out / "demos.jsonl")]) == 0
    return rows_of(out / "demos.jsonl"), rows_of(out / "rejected.jsonl")


def record(stem: str, response: str, **changes) -> dict:
    return {
        "question": stem,
        "options": OPTIONS,
        "answer_idx": "B",
        "answer": "surgery",
        "Complex_CoT": REASON,
        "Response": response,
        "Question": "open?",
        **changes,
    }


HUATUO = {  # name: (record, faults)
    "agrees": (record("1?", "The best step is Surgery, at once."), set()),
    "agrees, another option later": (record("2?", "Surgery is best. No rest."), set()),
    "names another option first": (record("3?", "Rest comes first, then surgery."), {"conclusion"}),
    "names no option": (record("4?", "He must be operated on."), {"conclusion"}),
    "names part of a word": (record("5?", "Neurosurgery is far."), {"conclusion"}),
    "two options begin alike": (
        record("6?", "A rest in bed.", options={"A": "rest", "B": "rest in bed"}, answer="B"),
        set(),
    ),
    "loops": (record("7?", "Surgery.", Complex_CoT=LOOP), {"coherence"}),
    "too short": (record("8?", "Surgery.", Complex_CoT="so it is"), {"structure"}),
    "too long": (
        record("9?", "Surgery.", Complex_CoT=" ".join(f"w{i}" for i in range(41))),
        {"structure"},
    ),
    "tags": (
        record("10?", "Surgery.", Complex_CoT=f"{REASON} <answer> B </answer>"),
        {"structure"},
    ),
    "drifts": (record("11?", "Surgery.", Complex_CoT=f"{REASON} 手术"), {"coherence"}),
    "another option's text": (record("16?", "Surgery.", answer="rest"), {"record"}),
    "no such option": (record("12?", "Surgery.", answer_idx="E"), {"record"}),
    "letters out of order": (
        record("13?", "Surgery.", options={"B": "surgery", "A": "rest"}),
        {"record"},
    ),
    "a key missing": ({"question": "14?", "options": OPTIONS, "answer_idx": "B"}, {"record"}),
    "no record": ("15?", {"record"}),
}


NAMED = {  # name: (Response, options, the fault if the answer is B)
    "the answer alone": ("It is a rash: rest. Surgery is not.", ["surgery", "rest"], None),
    "another first": ("Rest. Then surgery.", ["rest", "surgery"], "first names A, not B"),
    "two in one sentence": ("Rest or surgery.", ["surgery", "rest"], "first names A and B, not B"),
    "the longer of two at one place": ("Rest in bed.", ["rest", "rest in bed"], None),
    "both": ("Rest, or rest in bed.", ["rest", "rest in bed"], "first names A and B, not B"),
    "none": ("Neurosurgery.", ["rest", "surgery"], "names no option"),
    "words of two sentences": ("He has a bed. Rest is good.", ["x", "bed rest"], "names no option"),
    "a small word": ("It might be rest.", ["ad", "be"], "names no option"),
    "a sign": ("There is ↓ TSH.", ["↑ TSH", "↓ TSH"], None),
    "not": ("This is not rest.", ["surgery", "rest"], "names B beside 'not'"),
    "a contraction": ("The best is certainly not x? It isn't rest.", ["surgery", "rest"],
                      "names B beside 'isn't'"),
    "while": ("While rest has its uses ...", ["surgery", "rest"], "names B beside 'while'"),
    "a no of the answer": ("There is no pain.", ["pain", "no pain"], None),
    "not, of another sentence": ("It is not new. Rest helps.", ["x", "rest"], None),
    "empty": ("", ["surgery", "rest"], "names no option"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_conclusion_must_first_name_the_answer_alone_and_not_set_it_aside(name):
    text, options, fault = NAMED[name]
    question = data.Question("?", dict(zip("ABCD", options)), "B")
    assert distill.conclusion_fault(text, question) == fault


def test_what_an_import_refuses_says_which_record_it_was(tmp_path, capsys):
    rows = [record("1?", "Surgery."), record("2?", "Rest, then surgery."), record("3?", "Hm.")]
    data.write_jsonl(tmp_path / "chains.jsonl", [*rows, {**rows[0], "answer": "rest"}])
    _, rejected = run_import(tmp_path / "chains.jsonl", "huatuo")
    row = rejected[0]
    assert row["id"] and (row["number"], row["question"], row["answer"]) == (2, "2?", "B")
    assert (row["options"], row["Response"]) == (OPTIONS, "Rest, then surgery.")
    assert row["response"] == GOOD and list(row["faults"]) == ["conclusion"]
    assert [row["number"] for row in rejected] == [2, 3, 4]
    assert row["question"] and rejected[2]["question"] == ""  # nothing is read of a bad record
    assert "3 responses refused: conclusion 2, record 1" in capsys.readouterr().out


WRONG = {  # name: (records, --format, what the error says)
    "the other format": (
        [record("1?", "Surgery.")] * 3, "sharegpt",
        "none of the 3 records of .*chains.jsonl can be read; the first: .*chains.jsonl:1: no list "
        "'messages' or 'conversations' .* the row has .*Complex_CoT",
    ),
    "the other way round": (
        [exchange("1?", "<think> x </think> B")], "huatuo",
        "the first: .* missing 'options'; the row has .*messages",
    ),
    "no known format": ([{"prompt": "1?"}], "huatuo", "the first: .* the row has .*prompt"),
    "keys that fit, and nothing to read": (
        [record("1?", "Surgery.", answer_idx="E")], "huatuo", "the first: .*'E' is not among",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_format_ends_in_an_error_that_names_the_keys_wanted_and_found(tmp_path, name):
    rows, form, said = WRONG[name]
    data.write_jsonl(tmp_path / "chains.jsonl", rows)
    with pytest.raises(data.RowError, match=said):
        run_import(tmp_path / "chains.jsonl", form)
    assert not list((tmp_path / "imported").glob("*.jsonl"))


def test_a_file_without_a_record_is_refused(tmp_path):
    (tmp_path / "chains.json").write_text("[]")
    with pytest.raises(data.RowError, match="none of the 0 records of .*chains.json can be read"):
        run_import(tmp_path / "chains.json", "huatuo")


def test_a_human_overrules_what_an_import_reads_in_both_ways(tmp_path):
    rows = [record("kept?", "Surgery."), record("named?", "He must be operated on.")]
    rows += [record("wrong?", "Rest."), record("tags?", "Surgery.", Complex_CoT="a </think> b")]
    data.write_jsonl(tmp_path / "chains.jsonl", rows)
    demos, _ = run_import(tmp_path / "chains.jsonl", "huatuo")
    keys = {row["question"]: data.Question(row["question"], OPTIONS, "B").id for row in rows}
    sheet = read_sheet(tmp_path / "imported" / "review.csv")
    assert [demo["id"] for demo in demos] == [keys["kept?"]]
    assert list(sheet) == [keys[name] for name in ("kept?", "named?", "wrong?")]
    assert sheet[keys["named?"]]["checks"] == "conclusion: its Response names no option"
    filled = {keys["kept?"]: "no", keys["named?"]: "yes"}
    told = fill_in(tmp_path / "imported" / "review.csv", tmp_path / "filled.csv", filled)
    (tmp_path / "imported").rename(tmp_path / "first")
    demos, rejected = run_import(tmp_path / "chains.jsonl", "huatuo", "--review", str(told))
    assert [(demo["id"], demo["review"]) for demo in demos] == [(keys["named?"], "yes")]
    assert demos[0]["checks"] == {"correct": True, "structure": True, "coherence": True}
    assert {row["question"]: set(row["faults"]) for row in rejected} == {
        "kept?": {"review"},
        "wrong?": {"conclusion"},
        "tags?": {"structure"},
    }
    verdicts = [row["verdict"] for row in read_sheet(tmp_path / "imported/review.csv").values()]
    assert verdicts == ["no", "yes", ""]


def test_a_humans_yes_does_not_say_that_an_answer_nobody_checked_is_right(tmp_path):
    rows = [exchange(f"{said}?", f"<think> {said} </think> B") for said in (REASON, LOOP)]
    data.write_jsonl(tmp_path / "chains.jsonl", rows)
    run_import(tmp_path / "chains.jsonl", "sharegpt")
    sheet = tmp_path / "imported" / "review.csv"
    told = fill_in(sheet, tmp_path / "filled.csv", dict.fromkeys(read_sheet(sheet), "yes"))
    (tmp_path / "imported").rename(tmp_path / "first")
    demos, _ = run_import(tmp_path / "chains.jsonl", "sharegpt", "--review", str(told))
    assert [demo["checks"] for demo in demos] == [
        {"correct": None, "structure": True, "coherence": met} for met in (True, False)
    ]


def test_an_imports_checker_sees_what_the_rules_let_pass_with_its_images(serve, tmp_path, capsys):
    names = ("good", "bad", "loop")
    no = {**YES, "Plausibility_Coherence": "No"}
    server = served(serve, {"checker": lambda name, _: json.dumps(no if name == "bad" else YES)})
    Image.new("RGB", (30, 20), "green").save(tmp_path / "film.png")
    said = {name: f"<think> {LOOP if name == 'loop' else REASON} </think> B" for name in names}
    rows = [exchange(f"<image>What is <<{name}>>?", said[name]) for name in names]
    rows = [row | {"images": ["film.png"]} for row in rows]
    data.write_jsonl(tmp_path / "chains.jsonl", rows)
    flags = ["--checker", spec(server, "checker"), "--images", str(tmp_path)]
    demos, rejected = run_import(tmp_path / "chains.jsonl", "sharegpt", *flags)
    assert "at most:" in (said := capsys.readouterr().out) and "checker" in said  # the bill, first
    assert server.by_model == {("checker", "good"): 1, ("checker", "bad"): 1}
    assert all("data:image/png" in json.dumps(body) for _, _, body in server.requests)
    assert [demo["checker"] for demo in demos] == [spec(server, "checker")]
    assert "<<good>>" in demos[0]["messages"][1]["content"]
    assert [list(row["faults"]) for row in rejected] == [["coherence"], ["coherence"]]
    figures = json.loads((tmp_path / "imported" / "stage.json").read_text())
    assert list(figures["engines"]) == [spec(server, "checker")]
    assert figures["figures"] == {
        "demos": 1,
        "refused": 2,
        "teachers": {"sharegpt": 1},
        "faults": {"coherence": 2},
    }
    (tmp_path / "film.png").unlink()
    (tmp_path / "imported").rename(tmp_path / "first")
    with pytest.raises(data.RowError, match="film.png is not below"):
        run_import(tmp_path / "chains.jsonl", "sharegpt", *flags, "--seed", "1")
    assert server.by_model.total() == 2


def test_huatuos_chains_become_demonstrations_where_their_own_conclusion_is_the_answer(tmp_path):
    repeated = HUATUO["agrees"][0]
    (tmp_path / "demo_data.json").write_text(
        json.dumps(
            [row for row, _ in HUATUO.values()]
            + [repeated, {**repeated, "Complex_CoT": f"{REASON}, again"}]
        )
    )
    demos, rejected = run_import(tmp_path / "demo_data.json", "huatuo", "--words", "5", "40")
    stems = [row["question"] for row, wrong in HUATUO.values() if not wrong]
    assert [demo["messages"][1]["content"].split("\n")[0] for demo in demos] == [*stems, "1?"]
    assert demos[0]["messages"] == [
        *data.prompt_messages(q("1?")),
        {"role": "assistant", "content": GOOD},
    ]
    assert (
        demos[0]["meta"] == {"Response": "The best step is Surgery, at once."}
        and demos[0]["teacher"] == "huatuo"
    )
    assert [(demo["id"], demo["sample"]) for demo in (demos[0], demos[-1])] == [
        (demos[0]["id"], 0),
        (demos[0]["id"], 1),
    ]
    assert [set(row["faults"]) for row in rejected] == [
        *(wrong for _, wrong in HUATUO.values() if wrong),
        {"duplicate"},
    ]
    said = [next(iter(row["faults"].values())) for row in rejected]
    assert said[:2] == ["its Response first names B and C, not B", "its Response names no option"]
    for fault in ("record 15: missing 'Complex_CoT'", "record 13: answer: 'E' is not among"):
        assert any(fault in text for text in said)
    stage = json.loads((tmp_path / "imported" / "stage.json").read_text())
    assert stage["figures"]["demos"] == len(demos) and stage["inputs"] == {
        str(tmp_path / "demo_data.json"): data.file_hash(tmp_path / "demo_data.json")
    }


def turns(asked: str, said: str, system: str = "") -> list[tuple[str, str]]:
    return [("system", system)] * bool(system) + [("user", asked), ("assistant", said)]


THOUGHT = f"<think>\n{REASON}\n</think>\n\n"
# name: (turns, images, the answer that is read, faults). None for the answer: refused for these
# faults.
SHAREGPT = {
    "an answer block": (
        turns("1?", f"{THOUGHT}So: <answer>surgery</answer>"),
        [],
        "surgery",
        set(),
    ),
    "what follows the thinking": (
        turns("2?", f"{THOUGHT}Surgery, at once.", system="Be brief."),
        [],
        "Surgery, at once.",
        set(),
    ),
    "with an image": (turns("<image>\n3?", f"{THOUGHT}B"), ["film.png"], "B", set()),
    "no thinking": (turns("4?", "Surgery."), [], None, {"structure"}),
    "thinking that does not end": (
        turns("5?", f"<think> {REASON}"),
        [],
        None,
        {"structure", "correct"},
    ),
    "two thoughts": (turns("6?", f"{THOUGHT}{THOUGHT}B"), [], None, {"structure", "correct"}),
    "nothing after it": (turns("7?", THOUGHT), [], None, {"structure", "correct"}),
    "a loop": (turns("8?", f"<think> {LOOP} </think> B"), [], None, {"coherence"}),
    "several questions": (turns("9?", f"{THOUGHT}B") * 2, [], None, {"record"}),
    "an image in the text": (turns("10 <image>?", f"{THOUGHT}B"), ["film.png"], None, {"record"}),
    "an image too few": (turns("<image><image>11?", f"{THOUGHT}B"), ["film.png"], None, {"record"}),
    "an image that is not named": (turns("12?", f"{THOUGHT}B"), ["film.png"], None, {"record"}),
    "an image outside": (turns("<image>13?", f"{THOUGHT}B"), ["../film.png"], None, {"record"}),
    "no text": ([("user", "14?"), ("assistant", None)], [], None, {"record"}),
    "no question": (turns(" ", f"{THOUGHT}B"), [], None, {"record"}),
}


@pytest.mark.parametrize("kind", ["conversations", "messages"])
def test_sharegpt_and_message_records_with_thinking_become_demonstrations(tmp_path, kind):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    rows = []
    for spoken, images, _, _ in SHAREGPT.values():
        said = [
            {"from": names[role], "value": text}
            if kind == "conversations"
            else {"role": role, "content": text}
            for role, text in spoken
        ]
        rows.append({kind: said, **({"images": images} if images else {})})
    data.write_jsonl(tmp_path / "chains.jsonl", [*rows, {"instruction": "x"}])
    demos, rejected = run_import(tmp_path / "chains.jsonl", "sharegpt")
    kept = [
        (spoken, images, answer) for spoken, images, answer, wrong in SHAREGPT.values() if not wrong
    ]
    assert [demo["messages"] for demo in demos] == [
        [
            {"role": "system", "content": data.SYSTEM_PROMPT},
            {"role": "user", "content": spoken[-2][1].removeprefix("<image>\n")},
            {"role": "assistant", "content": data.join_response(REASON, answer)},
        ]
        for spoken, _, answer in kept
    ]
    assert [demo["images"] for demo in demos] == [images for _, images, _ in kept] and all(
        demo["checks"]["correct"] is None for demo in demos
    )
    assert [set(row["faults"]) for row in rejected] == [
        wrong for _, _, _, wrong in SHAREGPT.values() if wrong
    ] + [{"record"}]
    assert (
        "chains.jsonl:16: no list 'messages' or 'conversations'" in rejected[-1]["faults"]["record"]
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (None, "no such file"),
        (b"", "not JSON"),
        (b"{}", "content: expected list, found dict"),
        (os.mkfifo, "is not a file"),
        (os.mkdir, "is not a file"),
        (b'[{}, {"a": 1, "a": 2}]', "'a' is there twice"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'[{"a": NaN}]', "NaN"),
        (b"[{}, " + b"[" * 99_999, "nested"),
        (b"[{}]]", "not JSON"),
        (b'[{"a": "\\ud800"}]', "surrogate"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "chains.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        content(path)
    with pytest.raises(data.RowError, match=f"chains.json.*{said}"):
        run_import(path, "sharegpt")


@pytest.mark.parametrize(
    ("form", "good", "faults"),
    [
        ("huatuo", record("1?", "Surgery."), EXAM_FAULTS),
        (
            "huatuo",
            record("1?", "Surgery."),
            [({key: 5}, "") for key in ("Response", "Complex_CoT")],
        ),
        ("sharegpt", exchange("<image>1?", THOUGHT + "B") | {"images": ["a.png"]}, TURN_FAULTS),
    ],
)
def test_each_broken_record_is_rejected_by_name_and_no_other(tmp_path, form, good, faults):
    rows = [good, *(good | changes for changes, _ in faults)]
    rows = [{key: value for key, value in row.items() if value is not GONE} for row in rows]
    data.write_jsonl(tmp_path / "chains.jsonl", rows)
    _, rejected = run_import(tmp_path / "chains.jsonl", form)
    said = {row["id"]: row["faults"].get("record", "") for row in rejected}
    for number in range(2, len(rows) + 1):
        assert f"chains.jsonl:{number}: " in said.get(str(number), ""), rows[number - 1]
    assert "1" not in said


@pytest.mark.skipif(
    not REAL or not (Path(REAL) / "huatuo_demo_data.json").exists(),
    reason="MEDEE_REAL_DATA names no folder with huatuo_demo_data.json",
)
def test_huatuos_own_file_becomes_demonstrations_that_can_be_shown_and_teach(
    folders, tmp_path, capsys
):
    shutil.copy(Path(REAL) / "huatuo_demo_data.json", tmp_path)
    demos, rejected = run_import(tmp_path / "huatuo_demo_data.json", "huatuo")
    faults = Counter(name for row in rejected for name in row["faults"])
    assert (len(demos), faults) == (37, {"conclusion": 161})
    capsys.readouterr()
    run_report(
        [
            "show",
            str(tmp_path / "imported" / "demos.jsonl"),
            "--model",
            str(folders["qwen"]),
            "-n",
            "2",
        ]
    )
    shown = capsys.readouterr().out
    assert shown.count("supervised: think") == 2 and data.SYSTEM_PROMPT in shown
    shortest = sorted(
        demos, key=lambda demo: sum(len(message["content"]) for message in demo["messages"])
    )[:5]
    data.write_jsonl(tmp_path / "short.jsonl", shortest)
    flags = ["--epochs", "4", "--batch", "1", "--lr", "5e-3", "--pixels", str(56 * 56)]
    sft.main(
        [
            "--model",
            str(folders["qwen"]),
            "--demos",
            str(tmp_path / "short.jsonl"),
            "--out",
            str(tmp_path / "sft"),
            *flags,
        ]
    )
    losses = [row["loss"] for row in schema.read_metrics(tmp_path / "sft")]
    assert (
        len(losses) == 20
        and losses[-1] < losses[0] - 0.5
        and sum(losses[10:]) < 0.95 * sum(losses[:10])
    )  # the same five rows, again


# --------------------------------------------------------------------------------------------------
# What is finished, and what answers under an old name

OTHER = {  # what is another command: (more flags, how the difference is named)
    "seed": (["--seed", "1"], "seed 0 -> 1"),
    "words": (["--words", "6", "50"], r"words \[5, 4000\] -> \[6, 50\]"),
    "answer form": (["--answer-form", "text"], "answer_form 'letter-text' -> 'text'"),
    "the same questions, changed": ([], "questions.jsonl changed"),
    "other questions": ([], "questions '.*questions.jsonl' -> '.*other.jsonl'"),
}


@pytest.fixture
def finished(serve, tmp_path, capsys) -> tuple:
    """(server, teachers, flags) of a folder that is finished, and whose engines have gone."""
    said = {"teacher": lambda *_: data.join_response(SHORT, "B")}
    said |= {"expander": lambda *_: f"{FULL} {ANSWER}", "checker": lambda *_: json.dumps(YES)}
    server = served(serve, said)
    teachers = (spec(server, "teacher"),)
    flags = ["--expand", *teachers, spec(server, "expander"), "--checker", spec(server, "checker")]
    demos, _ = run_distill(marked(tmp_path, "ab"), tmp_path / "out", *flags, teachers=teachers)
    assert len(demos) == 2 and server.by_model == {(name, key): 1 for name in said for key in "ab"}
    server.close()
    capsys.readouterr()
    return server, teachers, flags


def test_a_finished_command_opens_no_engine_and_leaves_every_byte(finished, tmp_path, capsys):
    server, teachers, flags = finished
    before = held(tmp_path)
    for more in ([], ["--concurrency", "3"]):  # how fast is no other command
        command = [tmp_path / "questions.jsonl", tmp_path / "out", *flags, *more]
        run_distill(*command, teachers=teachers)
        assert "out: is finished already" in capsys.readouterr().out
    assert held(tmp_path) == before and server.by_model.total() == 6


@pytest.mark.parametrize("name", OTHER)
def test_another_command_in_a_finished_folder_is_refused_by_name(finished, tmp_path, name):
    server, teachers, flags = finished
    more, said = OTHER[name]
    questions = tmp_path / ("other.jsonl" if name == "other questions" else "questions.jsonl")
    if "questions" in name:
        write(questions, [q("What is <<more>>?", "more")])
    before = held(tmp_path)
    with pytest.raises(data.RowError, match=f"finished with other settings or inputs .*{said}"):
        run_distill(questions, tmp_path / "out", *flags, *more, teachers=teachers)
    assert held(tmp_path) == before and server.by_model.total() == 6


def test_a_retrained_teacher_is_asked_anew_and_its_old_replies_stay(folders, tmp_path):
    shutil.copytree(folders["qwen"], tmp_path / "base")
    questions = write(tmp_path / "questions.jsonl", [q(f"Question {i}?", str(i)) for i in range(3)])
    flags, teachers = ["--max-tokens", "4"], (f"hf:{tmp_path / 'base'}",)
    run_distill(questions, tmp_path / "out", *flags, teachers=teachers)
    (old,) = (tmp_path / "replies").glob("teacher-*.jsonl")
    before = held(tmp_path / "out", tmp_path / "replies")
    build_folder("qwen", tmp_path / "base", seed=1)
    with pytest.raises(data.RowError, match="out: was finished with other .*base changed"):
        run_distill(questions, tmp_path / "out", *flags, teachers=teachers)
    assert held(tmp_path / "out", tmp_path / "replies") == before
    run_distill(questions, tmp_path / "second", *flags, teachers=teachers)
    (new,) = set((tmp_path / "replies").glob("teacher-*.jsonl")) - {old}
    assert before.items() <= held(tmp_path / "out", tmp_path / "replies").items()
    olds, news = rows_of(old), rows_of(new)
    asked = [[(row["id"], row["asked"]) for row in rows] for rows in (olds, news)]
    assert asked[0] == asked[1] and len(news) == 3
    assert all(a["token_ids"] != b["token_ids"] for a, b in zip(olds, news))
    stages = [json.loads((tmp_path / out / "stage.json").read_text()) for out in ("out", "second")]
    named = [stage["engines"] for stage in stages]
    assert named[0].keys() == named[1].keys() and named[0] != named[1]
