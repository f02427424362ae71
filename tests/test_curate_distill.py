"""Which demonstrations are kept: truth tables over stored replies.

An engine's replies are kept in a file and nothing is asked twice. So a file of replies, written here, decides what each
engine "said", and the real commands then have nothing to ask; were they to ask, the clinic would refuse these questions.
"""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

import clinic
import data
import distill
import asking

OPTIONS = {"A": "biopsy", "B": "surgery", "C": "rest", "D": "steroids"}


def q(stem: str, key: str = "", answer: str = "B", options: dict | None = None, images: tuple = (), meta: dict | None = None) -> data.Question:
    return data.Question(stem, OPTIONS if options is None else options, answer, list(images), "bank", meta or {}, key)


def write(path: Path, questions: list[data.Question]) -> Path:
    data.write_jsonl(path, [question.to_row() for question in questions])
    return path


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


# ---------------------------------------------------------------------------------------------------------------
# Distillation: the three criteria

ASKED = q("A man coughs. What is the best next step?", "q")
REASON = "the cough is old and the film is dark so a surgeon must look"
GOOD = data.join_response(REASON, "B. surgery")
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
    "just short enough": (data.join_response(" ".join(f"w{i}" for i in range(40)), "B. surgery"), set()),
    "too long": (data.join_response(" ".join(f"w{i}" for i in range(41)), "B. surgery"), {"structure"}),
    "text between the blocks": (f"<think> {REASON} </think> so <answer> B. surgery </answer>", {"structure"}),
    "two answers": (f"{GOOD} <answer> B. surgery </answer>", {"structure"}),
    "answer inside the thinking": (f"<think> {REASON} <answer> B. surgery </answer> </think>", {"structure", "correct"}),
    "empty answer": (data.join_response(REASON, ""), {"structure", "correct"}),
    "no form at all": (f"{REASON}, so the answer is (B).", {"structure"}),
    "a loop": (data.join_response(" ".join(["we look at the film again and again then"] * 3), "B. surgery"), {"coherence"}),
    "said twice is no loop": (data.join_response(" ".join(["we look at the film again and again then"] * 2), "B. surgery"), set()),
    "drift into Chinese": (data.join_response(f"{REASON} 所以手术", "B. surgery"), {"coherence"}),
    "drift into Cyrillic": (data.join_response(f"{REASON} потому что", "B. surgery"), {"coherence"}),
    "Greek letters are medicine": (data.join_response(f"{REASON}, α and β", "B. surgery"), set()),
    "knows the answer": (data.join_response(f"{REASON}, and the reference answer is surgery", "B. surgery"), {"coherence"}),
    "was given the answer": (data.join_response(f"{REASON}. The provided answer says surgery", "B. surgery"), {"coherence"}),
    "all three": ("потому что", {"correct", "structure", "coherence"}),
}


def faults(response: str, finish: str = "stop", question: data.Question = ASKED) -> set[str]:
    return {name for name, fault in distill.check(response, finish, question, 5, 40).items() if fault}


@pytest.mark.parametrize("name", FAULTS)
def test_each_criterion_catches_its_own_faults(name):
    response, expected = FAULTS[name]
    assert faults(response) == expected


def test_answer_that_was_cut_off_is_not_correct():
    assert faults(GOOD, "length") == {"correct"}


def test_script_of_the_question_itself_is_no_drift():
    response = FAULTS["drift into Cyrillic"][0]
    assert faults(response, question=q("Кашель. What is the best next step?")) == set()


# ---------------------------------------------------------------------------------------------------------------
# Distillation: teachers in turn

TEACHERS = ("thorough", "hasty", "bookish")
BAD = data.join_response(REASON, "C. rest")


def run_distill(questions: Path, out: Path, *more: str) -> tuple[list[dict], list[dict]]:
    distill.main(["--questions", str(questions), "--teachers", *(f"clinic:{name}" for name in TEACHERS), "--out", str(out), *more])
    return [row for _, row in data.read_jsonl(out / "demos.jsonl")], [row for _, row in data.read_jsonl(out / "rejected.jsonl")]


def prepared(tmp_path: Path, good: dict[str, str]) -> tuple[list[dict], list[dict]]:
    """Runs with one question a key; its value names the teachers (by first letter) whose response is good."""
    questions = write(tmp_path / "questions.jsonl", [q(f"Question {key}?", key) for key in good])
    for name in TEACHERS:
        replies(
            tmp_path / "out",
            "replies",
            name,
            {key: [(data.join_response(f"{REASON}, says {name}", "B. surgery") if name[0] in able else BAD, "stop")] for key, able in good.items()},
        )
    return run_distill(questions, tmp_path / "out")


def test_teachers_take_turns(tmp_path):
    demos, rejected = prepared(tmp_path, {str(i): "thb" for i in range(7)})
    assert [demo["teacher"].removeprefix("clinic:") for demo in demos] == ["thorough", "hasty", "bookish", "thorough", "hasty", "bookish", "thorough"]
    assert [demo["id"] for demo in demos] == list("0123456") and not rejected


def test_teacher_that_fails_is_replaced_by_the_next_in_turn(tmp_path):
    #             first asked: thorough  hasty       bookish     thorough   hasty       bookish    thorough    hasty
    demos, rejected = prepared(tmp_path, {"0": "t", "1": "b", "2": "t", "3": "b", "4": "t", "5": "hb", "6": "hb", "7": ""})
    assert {demo["id"]: demo["teacher"].removeprefix("clinic:") for demo in demos} == {
        "0": "thorough", "1": "bookish", "2": "thorough", "3": "bookish", "4": "thorough", "5": "bookish", "6": "hasty",
    }  # fmt: skip
    refused = {(row["id"], row["teacher"].removeprefix("clinic:")) for row in rejected}
    assert refused == {
        ("1", "hasty"), ("2", "bookish"), ("3", "thorough"), ("3", "hasty"), ("4", "hasty"), ("4", "bookish"), ("6", "thorough"),
        ("7", "hasty"), ("7", "bookish"), ("7", "thorough"),
    }  # fmt: skip
    assert len(refused) == len(rejected) and all(set(row["faults"]) == {"correct"} and row["response"] == BAD for row in rejected)
    for demo in demos:
        assert f"says {demo['teacher'].removeprefix('clinic:')} </think>" in demo["messages"][2]["content"]
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
    replies(tmp_path / "out", "replies", "thorough", {"k": [(data.join_response(REASON, "(B)"), "stop")]})
    (demo,), _ = run_distill(questions, tmp_path / "out", "--answer-form", form)
    assert demo["messages"] == [
        {"role": "system", "content": data.SYSTEM_PROMPT},
        {"role": "user", "content": "Question?\nAnswer Choices:\n(A) biopsy\n(B) surgery\n(C) rest\n(D) steroids"},
        {"role": "assistant", "content": f"<think> {REASON} </think> <answer> {said} </answer>"},
    ]
    assert demo["id"] == "k" and demo["images"] == [] and demo["teacher"] == "clinic:thorough" and all(demo["checks"].values())
    assert data.main(["check", str(tmp_path / "out" / "demos.jsonl")]) == 0


@pytest.mark.parametrize("form", ["letter-text", "text"])
@pytest.mark.parametrize("options", [OPTIONS, dict(zip("ABCD", ["↑ TSH", "↓ TSH", "-5", "+5"])), {}], ids=["words", "symbols", "open-ended"])
def test_answer_of_a_demonstration_is_read_as_right(form, options):
    # whatever a model learns to write must count as right later
    question = q("Which?", "k", options=options, answer="B" if options else "renal ultrasound")
    demo = distill.make_demo(question, {"response": GOOD, "sample": 0}, "clinic:thorough", form)
    assert data.is_correct(demo["messages"][2]["content"], question)


@pytest.fixture(scope="module")
def distilled(world, tmp_path_factory) -> Path:
    out, texts = tmp_path_factory.mktemp("distilled"), tmp_path_factory.mktemp("texts") / "text.jsonl"
    write(texts, [question for question in data.read_questions(world / "bank.jsonl") if not question.images])
    run_distill(texts, out)
    shutil.copy(texts, out / "questions.jsonl")
    return out


def test_every_demonstration_of_the_real_teachers_is_one_that_the_truth_confirms(distilled):
    questions = {question.id: question for question in data.read_questions(distilled / "questions.jsonl")}
    demos = [row for _, row in data.read_jsonl(distilled / "demos.jsonl")]
    assert len(demos) >= 11 and {demo["teacher"] for demo in demos} == {f"clinic:{name}" for name in TEACHERS}
    for demo in demos:
        question = questions[demo["id"]]
        case, kind = clinic.sentence_truth(question.question), question.meta["kind"]
        thinking, _ = data.split_response(clinic.chain(case, kind, demo["teacher"].removeprefix("clinic:")))
        assert demo["messages"][2]["content"] == f"<think> {thinking} </think> <answer> {question.answer}. {question.answer_text()} </answer>"


def test_killed_and_resumed_distillation_asks_nothing_twice(distilled, tmp_path):
    for path in distilled.glob("replies*"):
        shutil.copy(path, tmp_path)
    path = tmp_path / "replies-clinic-hasty.jsonl"
    whole = path.read_bytes()
    kept = whole[: len(whole) // 2]
    assert not kept.endswith(b"\n")  # killed in the middle of a line
    path.write_bytes(kept)
    run_distill(distilled / "questions.jsonl", tmp_path)
    for name in ("demos.jsonl", "rejected.jsonl", *(f"replies-clinic-{name}.jsonl" for name in TEACHERS)):
        assert (tmp_path / name).read_bytes() == (distilled / name).read_bytes()
    rows = [row for _, row in data.read_jsonl(path)]
    assert len({(row["id"], row["sample"]) for row in rows}) == len(rows)


def test_distillation_refuses_to_go_on_with_other_sampling(distilled, tmp_path):
    for path in distilled.glob("replies*"):
        shutil.copy(path, tmp_path)
    with pytest.raises(data.RowError, match="temperature"):
        run_distill(distilled / "questions.jsonl", tmp_path, "--temperature", "0.5")


def test_unknown_teacher_is_refused_by_name(tmp_path):
    questions = write(tmp_path / "questions.jsonl", [q("Question?", "k")])
    with pytest.raises(asking.Unavailable, match="oracle:x"):
        distill.main(["--questions", str(questions), "--teachers", "oracle:x", "--out", str(tmp_path / "out")])
