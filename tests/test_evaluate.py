"""The real command on a real world: what the files dictate, kills, prompts and rules against a
server, reports over several runs."""

import contextlib
import json
import statistics
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import sample_teachers
from PIL import Image

import clinic.roles
import data
import evaluate
import judge
import report.__main__
from command import schema
from command.stage import RECORDS
from engines import inference
from engines.inference import Completion, Sampling
from report import score, tables

OPTIONS = {"A": "CT", "B": "MRI", "C": "PET"}


# --------------------------------------------------------------------------------------------------
# The real command on a real world


def run(world: Path, out: Path, *more: str, engine: str = "clinic:thorough") -> dict:
    evaluate.main(
        [
            "--engine",
            engine,
            "--questions",
            str(world / "test.jsonl"),
            "--images",
            str(world),
            "--out",
            str(out),
            *more,
        ]
    )
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def stages(world, tmp_path_factory) -> dict[str, Path]:
    """Three evaluations, as of three stages."""
    base = tmp_path_factory.mktemp("eval")
    for engine in ("bookish", "hasty", "thorough"):
        run(
            world,
            base / engine,
            "-n",
            "8",
            "4",
            "--judge",
            "clinic:judge",
            "--judge-samples",
            "0",
            engine=f"clinic:{engine}",
        )
    return {engine: base / engine for engine in ("bookish", "hasty", "thorough")}


@pytest.mark.parametrize("engine", ["bookish", "hasty", "thorough"])
def test_accuracy_is_what_the_files_dictate(world, stages, engine):
    results = json.loads((stages[engine] / "results.json").read_text())
    questions = schema.read_questions(world / "test.jsonl")
    rows = [row for _, row in data.read_jsonl(stages[engine] / "predictions.jsonl")]
    for kind, samples in (("image", 8), ("text", 4)):
        shares, unread = [], 0
        for question in (q for q in questions if bool(q.images) == (kind == "image")):
            # teachers write the option's text and nothing more; a spoilt form has its answer
            # inside the thinking
            said = [
                row["response"].split("</think>")[-1] for row in rows if row["id"] == question.id
            ]
            assert len(said) == samples
            shares.append(
                sum(
                    f"<answer> {question.options[question.answer]} </answer>" in text
                    for text in said
                )
                / samples
            )
            unread += sum("<answer>" not in text for text in said)
        figures = results["groups"][kind]
        mean = statistics.fmean(shares)
        assert (
            figures["accuracy"] == pytest.approx([mean, *score.wilson(mean, len(shares))])
            and mean > 0.7
        )
        assert (
            figures["unparsed"] == pytest.approx(unread / (samples * len(shares)))
            and figures["cut_off"] == 0
        )
        assert (figures["questions"], figures["samples"]) == (len(shares), samples)
        assert figures["pass"]["1"] == pytest.approx(figures["accuracy"]) and figures["majority"][
            "1"
        ] == pytest.approx(figures["accuracy"])


def test_criteria_show_what_each_teacher_lacks(stages):
    for engine, lacking in (
        ("bookish", "Image_Analysis_Involvement"),
        ("hasty", "Reflection_Presence"),
        ("thorough", None),
    ):
        image = json.loads((stages[engine] / "results.json").read_text())["groups"]["image"]
        for name, share in image["criteria"].items():
            if (engine, name) == ("hasty", "No_Hallucination"):
                assert share < 0.5  # always one sign on the left: true of one film in six
            else:
                assert share == 0 if name == lacking else share > 0.7
        assert image["all_criteria"][0] == 0 if lacking else image["all_criteria"][0] > 0.7
        assert image["judged_looking"] == (0 if engine == "bookish" else 48)


def test_every_chain_on_an_image_question_is_judged_right_or_wrong(world, tmp_path):
    flags = ["-n", "8", "--judge", "clinic:judge", "--judge-samples", "0"]
    results = run(
        world, tmp_path / "out", *flags, engine="clinic:expert-a"
    )  # wrong a quarter of the time
    verdicts = {
        (row["id"], row["sample"])
        for _, row in data.read_jsonl(tmp_path / "out" / "verdicts.jsonl")
    }
    assert verdicts == {
        (q.id, k) for q in schema.read_questions(world / "test.jsonl") if q.images for k in range(8)
    }
    assert results["groups"]["image"]["accuracy"][0] < 1  # so there were wrong ones
    assert "criteria" not in results["groups"]["text"]


def test_one_chain_of_each_image_question_is_judged_and_every_run_has_the_same(world, tmp_path):
    images = {q.id for q in schema.read_questions(world / "test.jsonl") if q.images}
    seen = {}
    for engine in ("expert-a", "hasty"):
        flags = ["-n", "8", "--judge", "clinic:judge", "--seed", "3"]
        figures = run(world, tmp_path / engine, *flags, engine=f"clinic:{engine}")["groups"][
            "image"
        ]
        rows = data.read_jsonl(tmp_path / engine / "verdicts.jsonl")
        seen[engine] = {(row["id"], row["sample"]) for _, row in rows}
        assert {id for id, _ in seen[engine]} == images and len(seen[engine]) == len(images)
        assert figures["judged"] == figures["sent"] == len(images)
    assert seen["expert-a"] == seen["hasty"] and len({sample for _, sample in seen["hasty"]}) > 1


def test_subsets_split_the_image_questions(stages):
    results = json.loads((stages["thorough"] / "results.json").read_text())
    for key in ("modality", "kind"):
        parts = [
            figures for name, figures in results["subsets"].items() if name.startswith(f"{key}=")
        ]
        assert sum(figures["questions"] for figures in parts) == 6
        assert sum(
            figures["questions"] * figures["accuracy"][0] for figures in parts
        ) / 6 == pytest.approx(results["groups"]["image"]["accuracy"][0])


def test_killed_and_resumed_evaluation_gives_the_same_results_and_asks_nothing_twice(
    world, stages, tmp_path, monkeypatch
):
    (path,) = (stages["thorough"].parent / "replies").glob("evaluate-clinic-thorough-*.jsonl")
    asked, answer = Counter(), clinic.roles.answer

    def counted(role: str, *about) -> str:
        asked[role] += 1
        return answer(role, *about)

    monkeypatch.setattr(clinic.roles, "answer", counted)
    whole = path.read_bytes()
    kept = whole[: len(whole) // 2]
    assert not kept.endswith(b"\n")  # killed in the middle of a line
    (tmp_path / "replies").mkdir()
    (tmp_path / "replies" / path.name).write_bytes(kept)
    more = ["-n", "8", "4", "--judge", "clinic:judge", "--judge-samples", "0", "--name", "thorough"]
    results = run(world, tmp_path / "out", *more)
    assert results == json.loads((stages["thorough"] / "results.json").read_text())
    assert (tmp_path / "replies" / path.name).read_bytes() == whole
    assert asked["thorough"] == whole.count(b"\n") - kept.count(b"\n")
    (judged,) = (tmp_path / "replies").glob("judge-*.jsonl")
    assert asked["judge"] == judged.read_bytes().count(b"\n")
    for name in ("predictions.jsonl", "verdicts.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (stages["thorough"] / name).read_bytes()


@contextlib.contextmanager
def stored(out: Path, completions: dict[str, list[tuple[str, str]]], *more: str, images: str = "."):
    """Stored replies of clinic:hasty to the questions of RUN/test.jsonl, (text, finish_reason) of
    each sample by question: the real command has nothing to ask, and what it says follows from
    this file alone. Yields its flags."""
    questions = {q.id: q for q in schema.read_questions(out.parent / "test.jsonl")}
    count = max(map(len, completions.values()))
    asked = ["--questions", str(out.parent / "test.jsonl"), "--images", images, "-n", str(count)]
    flags = ["--engine", "clinic:hasty", *asked, *more, "--out", str(out)]
    args, rows = evaluate.parse(flags), []
    sampling = Sampling(args.temperature, args.top_p, args.max_tokens, args.seed)
    for key, said in completions.items():
        question = questions[key].opened() if args.open_ended else questions[key]
        request = evaluate.make_request(question, args.prompt, Path(images), count)
        for k, (text, finish) in enumerate(said):
            row = inference.completion_row(
                Completion(key, k, text, None, finish, 0), "clinic:hasty"
            )
            rows.append({**row, "asked": inference.content_of(request.messages, request.images)})
    path = inference.completions_file(args, "evaluate", "clinic:hasty", sampling)
    data.write_jsonl(path, map(inference.sealed, rows))
    before = path.read_bytes()
    yield flags
    assert path.read_bytes() == before  # nothing was asked


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_right_answer_that_was_cut_off_counts_as_wrong_and_as_unread(tmp_path):
    question = data.Question("Which one?", OPTIONS, "A")
    data.write_jsonl(tmp_path / "test.jsonl", [question.to_row()])
    good = data.join_response("x", "A")
    wrong = data.join_response("x", "B")
    said = [(good, "stop"), (good, "length"), ("<think> the answer is (A)", "length")]
    said.append((wrong, "stop"))
    with stored(tmp_path / "out", {question.id: said}) as flags:
        evaluate.main(flags)
    figures = results_of(tmp_path / "out")["groups"]["text"]
    assert (figures["accuracy"][0], figures["cut_off"], figures["unparsed"]) == (0.25, 0.5, 0.5)


def test_open_ended_answers_are_voted_on_and_only_unreadable_ones_are_unparsed(tmp_path):
    question = data.Question("Which one?", {}, "renal ultrasound")
    data.write_jsonl(tmp_path / "test.jsonl", [question.to_row()])
    said = ["Renal ultrasound.", "CBC", "renal  ultrasound"]
    said = [(data.join_response("x", text), "stop") for text in said]
    said.append(("<think> no answer", "stop"))
    with stored(tmp_path / "out", {question.id: said}) as flags:
        evaluate.main(flags)
    figures = results_of(tmp_path / "out")["groups"]["text"]
    assert figures["accuracy"][0] == 0.5 and figures["unparsed"] == 0.25
    assert figures["majority"]["1"][0] == figures["pass"]["1"][0] == 0.5  # MV@1 = pass@1 = accuracy
    assert figures["majority"]["4"][0] == 1  # two of the three readable ones agree


def test_one_question_in_two_files_is_not_counted_twice(tmp_path):
    rows = [data.Question(f"{name}?", OPTIONS, "A") for name in "pq"]
    data.write_jsonl(tmp_path / "test.jsonl", [row.to_row() for row in rows])
    data.write_jsonl(tmp_path / "more.jsonl", [rows[0].to_row()])
    said = {q.id: [(data.join_response("x", letter), "stop")] for q, letter in zip(rows, "AB")}
    with stored(tmp_path / "out", said) as flags:
        place = flags.index(str(tmp_path / "test.jsonl"))
        flags.insert(place + 1, str(tmp_path / "more.jsonl"))
        evaluate.main(flags)
    figures = results_of(tmp_path / "out")["groups"]["text"]
    assert (figures["questions"], figures["accuracy"][0]) == (2, 0.5)


# --------------------------------------------------------------------------------------------------
# Tables and plots


def load(stages: dict[str, Path]) -> list[dict]:
    return [json.loads((folder / "results.json").read_text()) for folder in stages.values()]


def colours(path: Path) -> int:
    with Image.open(path) as picture:
        return len(picture.convert("RGB").getcolors(1 << 24))


@pytest.fixture(scope="module")
def reported(world, stages, tmp_path_factory) -> Path:
    """The report over three stages, with training curves and pairs."""
    base = tmp_path_factory.mktemp("report")
    sample_teachers(world, stages, 2, base)
    files = ["--rollouts", str(base / "rollouts.jsonl"), "--questions", str(world / "test.jsonl")]
    judge.main(
        [
            "verdicts",
            "--judge",
            "clinic:judge",
            *files,
            "--images",
            str(world),
            "--out",
            str(base / "verdicts"),
        ]
    )
    judge.main(
        [
            "pairs",
            "--verdicts",
            str(base / "verdicts" / "verdicts.jsonl"),
            *files,
            "--out",
            str(base / "pairs"),
        ]
    )
    data.write_jsonl(
        base / "sft" / "metrics.jsonl",
        [
            {
                "step": k,
                "loss": 2 / (k + 1),
                "think": 2 / (k + 1),
                "answer": 1 / (k + 1),
                "tag": 0.1 / (k + 1),
            }
            for k in range(20)
        ],
    )
    data.write_jsonl(
        base / "dpo" / "metrics.jsonl",
        [
            {"step": k, "loss": 0.69 - 0.02 * k, "margin": 0.1 * k, "accuracy": 0.5 + 0.02 * k}
            for k in range(20)
        ],
    )
    report.__main__.main(
        [
            "page",
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
    assert (reported / "table.md").read_text() == tables.table(load(stages)) + "\n"
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
    report.__main__.main(
        ["page", "--results", str(stages["thorough"]), "--out", str(tmp_path / "out")]
    )
    results = {path.name for path in (tmp_path / "out").iterdir()} - set(RECORDS)
    assert results == {"table.md"} and (tmp_path / "out" / "stage.json").exists()


# --------------------------------------------------------------------------------------------------
# Prompts, rules, free answers


class Recorder(BaseHTTPRequestHandler):
    """A server that speaks OpenAI's protocol, says what `says` makes of the messages, and keeps
    every request."""

    def do_GET(self):
        self.say({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "a test"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        choices = [
            {
                "index": k,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": self.server.says(body["messages"])},
            }
            for k in range(body.get("n", 1))
        ]
        self.say(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": choices,
            }
        )

    def say(self, value) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(says):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    server.says, server.requests = says, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1#m", server.requests
    finally:
        server.shutdown()
        server.server_close()


def text_of(messages: list[dict]) -> str:
    content = messages[-1]["content"]
    return (
        content
        if isinstance(content, str)
        else "".join(part.get("text", "[image]") for part in content)
    )


def film(folder: Path, name: str = "film.png") -> str:
    Image.new("L", (28, 28), 90).save(folder / name)
    return name


def test_medxpertqas_own_prompt_has_two_turns_and_its_own_rule_reads_them_differently(tmp_path):
    question = data.Question("What is seen?", OPTIONS, "B", [film(tmp_path)], "medxpertqa-mm")
    data.write_jsonl(tmp_path / "test.jsonl", [question.to_row()])
    with serving(
        lambda messages: (
            "Therefore it is B"
            if "answer is" in text_of(messages)
            else "A long look: option A at first. The answer is (C)."
        )
    ) as (spec, requests):
        more = ["-n", "2", "--prompt", "official", "--name", "m"]
        results = run(tmp_path, tmp_path / "out", *more, engine=spec)
        assert len(requests) == 2  # and nothing is asked twice, in the same folder or in another
        run(tmp_path, tmp_path / "out", *more, engine=spec)
        again = run(tmp_path, tmp_path / "again", *more, engine=spec)
    assert [text_of(body["messages"]) for body in requests[:1]] == [
        "Q: What is seen?\nAnswer Choices: (A) CT (B) MRI (C) PET\n"
        "A: Let's think step by step.[image]"
    ]
    assert {text_of(body["messages"]) for body in requests[1:]} == {
        "Therefore, among A through C, the answer is"
    } and len(requests) == 2  # two samples in the first; both chains are the same
    assert requests[1]["messages"][-2]["content"].startswith("A long look")
    row = next(iter(data.read_jsonl(tmp_path / "out" / "predictions.jsonl")))[1]
    assert row["response"].endswith("Therefore, among A through C, the answer is Therefore it is B")
    assert (row["official"], row["official_correct"]) == (
        "B",
        True,
    )  # the first letter after the trigger
    found = results["benchmarks"]["medxpertqa-mm"]["figures"]
    assert found["official"][0] == 1 and results == again


def test_the_letters_turn_is_in_the_bill_and_leaves_no_log_probability(tmp_path):
    two, one = (
        data.Question(f"{name}?", OPTIONS, "B", source=name) for name in ("medxpertqa-text", "mmmu")
    )
    questions = {two.id: two, one.id: one}
    flags = ["--engine", "hf:none", "--questions", "q.jsonl", "--out", "out", "-n", "2"]
    args = evaluate.parse([*flags, "--prompt", "official", "--max-tokens", "100"])
    requests = evaluate.requests_of(questions, args)
    chains, letters = evaluate.costs(questions, requests.values(), args)
    assert (chains.role, chains.figures[0]) == ("evaluate", 4)
    assert (letters.role, letters.figures[0], letters.figures[2]) == ("letter", 2, 200)
    assert letters.figures[1] >= 200  # the chain is in the prompt

    row = {"id": two.id, "sample": 0, "response": "A chain.", "finish_reason": "stop"}
    row |= {"token_ids": [1, 2], "logp": -3.0}
    letter = {"response": "B", "finish_reason": "stop"}
    ask = lambda role, asked: {(request.id, 0): letter for request in asked}
    evaluate.ask_for_letters(ask, requests, [row], questions)
    assert row["response"].endswith("the answer is B")
    assert row["token_ids"] is None and row["logp"] is None


@pytest.mark.parametrize(("style", "roles"), [("paper", ["system", "user"]), ("bare", ["user"])])
def test_bare_is_the_papers_prompt_without_its_system_turn(tmp_path, style, roles):
    question = data.Question("What is seen?", OPTIONS, "B")
    data.write_jsonl(tmp_path / "test.jsonl", [question.to_row()])
    with serving(lambda messages: "<answer> B </answer>") as (spec, requests):
        assert (
            run(tmp_path, tmp_path / "out", "--prompt", style, engine=spec)["groups"]["text"][
                "accuracy"
            ][0]
            == 1
        )
    (body,) = requests
    assert [turn["role"] for turn in body["messages"]] == roles and text_of(
        body["messages"]
    ) == data.question_text(question)


def test_both_rules_are_applied_and_shown_side_by_side(tmp_path, capsys):
    question = data.Question("What is seen?", OPTIONS, "B", source="medqa")
    data.write_jsonl(tmp_path / "test.jsonl", [question.to_row()])
    said = [
        "<think> A man. </think> <answer> B </answer>",
        "<think> B, or C </think> <answer> C </answer>",
        "<think> no letter </think>",
        "<answer> B </answer>",
    ]
    completions = [(text, "stop") for text in said[:3]] + [(said[3], "length")]
    with stored(tmp_path / "out", {question.id: completions}) as flags:
        evaluate.main(flags)
    found = results_of(tmp_path / "out")["benchmarks"]["medqa"]["figures"]
    # ours: B, C, none, cut off; MedXpertQA's: the article A, the B of the thinking, none, cut off
    assert (
        found["accuracy"][0],
        found["unparsed"],
        found["official"][0],
        found["official_unparsed"],
    ) == (0.25, 0.5, 0.25, 0.5)
    assert "by the benchmark's own rule 0.250" in capsys.readouterr().out


def test_shares_of_all_answers_are_called_that(tmp_path, capsys):
    question = data.Question("Which one?", OPTIONS, "A")
    data.write_jsonl(tmp_path / "test.jsonl", [question.to_row()])
    good = data.join_response("x", "A")
    said = [(good, "stop"), ("<think> A", "length"), ("no letter", "stop"), ("", "blocked")]
    with stored(tmp_path / "out", {question.id: said}) as flags:
        evaluate.main(flags)
    wanted = "; of all answers: unparsed 0.750 (cut off 0.250, over long 0.000, unanswered 0.250)"
    assert capsys.readouterr().out.count(wanted) == 2  # of the text questions, and of the benchmark


def test_free_answers_are_asked_for_without_options_and_graded_once(tmp_path):
    question = data.Question("What is done?", {"A": "renal ultrasound", "B": "CT"}, "A")
    data.write_jsonl(tmp_path / "test.jsonl", [question.to_row()])
    said = ("Renal ultrasound", "sonography of the kidneys", "a CT", "an echo")
    completions = {question.id: [(data.join_response("x", text), "stop") for text in said]}
    grades = {
        "sonography of the kidneys": '{"Correct": "Yes"}',
        "a CT": '{"Correct": "No"}',
        "an echo": "cannot say",
    }
    with serving(
        lambda messages: next(
            grade
            for said, grade in grades.items()
            if f"<Answer> {said} </Answer>" in text_of(messages)
        )
    ) as (spec, requests):
        for name in ("out", "again"):  # a second folder of the same run
            with stored(tmp_path / name, completions, "--open-ended", spec) as flags:
                evaluate.main(flags)
    found = results_of(tmp_path / "out")["groups"]["text"]
    assert results_of(tmp_path / "again")["groups"]["text"] == found
    assert (
        found["accuracy"][0] == 0.5 and len(requests) == 1 + 1 + 3
    )  # what cannot be read is asked three times, and is wrong
    assert all(
        "<Reference> renal ultrasound </Reference>" in text_of(body["messages"])
        for body in requests
    )
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["entries"][0]["answer"]
        == "renal ultrasound"
    )


def test_free_answers_without_tags_are_graded_too(tmp_path):
    data.write_jsonl(
        tmp_path / "test.jsonl",
        [data.Question("What is it?", OPTIONS, "B", source="medqa").to_row()],
    )
    with serving(
        lambda messages: (
            '{"Correct": "Yes"}' if "<Reference>" in text_of(messages) else "It is an MRI scan"
        )
    ) as (spec, requests):
        results = run(
            tmp_path, tmp_path / "out", "--prompt", "bare", "--open-ended", spec, engine=spec
        )
    assert results["groups"]["text"]["accuracy"][0] == 1 and len(requests) == 2
    assert (
        "official" not in results["benchmarks"]["medqa"]["figures"]
    )  # the benchmark's rule reads letters, and there are none


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--prompt", "official", "--open-ended", "clinic:judge"], "asks for a letter"),
        (["-n", "1", "2", "3"], "expected one number of samples, or two"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(tmp_path, capsys, more, said):
    asked = ["--engine", "clinic:hasty", "--questions", "none.jsonl", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        evaluate.main([*asked, *more])
    assert said in capsys.readouterr().err


def test_a_direct_letter_is_read_under_mmmus_own_prompt(tmp_path):
    data.write_jsonl(
        tmp_path / "test.jsonl",
        [
            data.Question("What is it?", OPTIONS, "B", source="mmmu").to_row(),
            data.Question("How many?", {}, "2", source="mmmu").to_row(),
        ],
    )
    with serving(lambda messages: "2" if "How many" in text_of(messages) else "B") as (spec, _):
        found = run(tmp_path, tmp_path / "out", "--prompt", "official", engine=spec)["benchmarks"][
            "mmmu"
        ]["figures"]
    assert found["accuracy"][0] == 1 == found["official"][0] and found["unparsed"] == 0


# --------------------------------------------------------------------------------------------------
# Several benchmarks, several runs


def test_a_question_of_two_benchmarks_counts_in_both_and_one_id_for_two_questions_is_refused(
    tmp_path,
):
    shared = data.Question("Which one?", OPTIONS, "A", source="medqa")
    other = data.Question("Which one?", OPTIONS, "A", source="mmmu")
    assert shared.id == other.id
    for name, question in (
        ("one", shared),
        ("two", other),
        ("three", data.Question("Another?", OPTIONS, "A", id=shared.id)),
    ):
        data.write_jsonl(tmp_path / f"{name}.jsonl", [question.to_row()])
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two", "three")]
    found = evaluate.read_all([paths[0], paths[1], paths[0]])
    assert {key: question.source for key, question in found.items()} == {
        shared.id: "medqa",
        f"{shared.id}-mmmu": "mmmu",
    }
    assert all(key == question.id for key, question in found.items())
    with pytest.raises(data.RowError, match="stands for another question"):
        evaluate.read_all([paths[0], paths[2]])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(data.RowError, match=r"empty\.jsonl: no row in it"):
        evaluate.read_all([paths[0], str(tmp_path / "empty.jsonl")])


def test_an_empty_answer_meets_nothing_unasked_and_a_run_never_stands_beside_verdicts_of_another(
    world, tmp_path
):
    question = next(q for q in schema.read_questions(world / "test.jsonl") if q.images)
    data.write_jsonl(tmp_path / "test.jsonl", [question.to_row()])
    said = [("", "blocked"), (data.join_response("The film shows it.", "x"), "stop")]
    out, bare = tmp_path / "out", tmp_path / "bare"
    with stored(out, {question.id: said}, images=str(world)) as flags:
        flags += ["--judge-samples", "0"]
        evaluate.main([*flags, "--judge", "clinic:judge"])
        assert len(data.resume_jsonl(out / "verdicts.jsonl")) == 1
        image = results_of(out)["groups"]["image"]
        assert image["judged"] == 2 and image["unanswered"] == 0.5
        (entry,) = results_of(out)["entries"]
        assert not any(entry["criteria"][0].values()) and any(entry["criteria"][1].values())
        before = {path: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(data.RowError, match="judge 'clinic:judge' -> ''.*another folder"):
            evaluate.main(flags)
        assert {path: path.read_bytes() for path in out.iterdir()} == before
        evaluate.main([*flags, "--out", str(bare)])
    assert not (bare / "verdicts.jsonl").exists()
    assert "criteria" not in results_of(bare)["groups"]["image"]


def test_benchmarks_are_told_apart_by_source_and_each_has_its_subsets(tmp_path):
    questions = [
        data.Question(f"{n}?", OPTIONS, "A", source=source, meta={"question_type": kind})
        for n, (source, kind) in enumerate(
            [("medqa", "Reasoning"), ("medqa", "Understanding"), ("mmmu", "Reasoning")]
        )
    ]
    data.write_jsonl(tmp_path / "one.jsonl", [q.to_row() for q in questions[:2]])
    data.write_jsonl(tmp_path / "two.jsonl", [questions[2].to_row()])
    with serving(
        lambda messages: data.join_response("x", "B" if text_of(messages).startswith("1") else "A")
    ) as (spec, _):
        evaluate.main(
            [
                "--engine",
                spec,
                "--questions",
                str(tmp_path / "one.jsonl"),
                str(tmp_path / "two.jsonl"),
                "--out",
                str(tmp_path / "out"),
            ]
        )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {
        name: part["figures"]["accuracy"][0] for name, part in results["benchmarks"].items()
    } == {"medqa": 0.5, "mmmu": 1}
    assert {
        name: found["accuracy"][0]
        for name, found in results["benchmarks"]["medqa"]["subsets"].items()
    } == {"question_type=Reasoning": 1, "question_type=Understanding": 0}
    recomputed = score.make_results(results["entries"])  # from the file alone
    assert all(
        json.loads(json.dumps(recomputed[key])) == results[key]
        for key in ("groups", "benchmarks", "subsets")
    )


def test_runs_are_compared_question_by_question(stages, tmp_path, capsys):
    report.__main__.main(
        [
            "compare",
            "--results",
            str(stages["hasty"]),
            str(stages["thorough"]),
            "--out",
            str(tmp_path / "compare.md"),
        ]
    )
    said = (tmp_path / "compare.md").read_text()
    assert (
        said in capsys.readouterr().out and said.count("\n") == 2 + 2 + 3  # and what they can tell
    )  # image and text questions apart
    one, two = (
        json.loads((stages[name] / "results.json").read_text())["groups"]["image"]["accuracy"][0]
        for name in ("hasty", "thorough")
    )
    assert f"{two - one:+.3f} (" in said


def written(folder: Path, choices: dict[str, str], official: str = "") -> str:
    """A run's folder, from what was read of each question ("-": nothing) of MedQA; where `official`
    is given, the benchmark's rule read those letters, one a question. The answer is A."""
    entries = []
    for number, (key, said) in enumerate(choices.items()):
        question = data.Question(f"{key}?", OPTIONS, "A", source="medqa", id=key)
        rows = [
            {
                "id": key,
                "sample": k,
                "response": "<think> x </think>",
                "finish_reason": "stop",
                "extracted": None if choice == "-" else choice,
                "correct": choice == "A",
            }
            for k, choice in enumerate(said)
        ]
        for row in rows if official else []:
            row |= {"official": official[number], "official_correct": official[number] == "A"}
        entries.append(score.entry(question, rows, {}))
    results = {"name": folder.name, **score.make_results(entries)}
    score.write_results(folder / "results.json", results)
    return str(folder)


def compared(capsys, *flags: str) -> tuple[list[dict[str, str]], str]:
    """(rows by column, what is printed under the table) of `compare`"""
    capsys.readouterr()
    report.__main__.main(["compare", "--results", *flags])
    table, _, notes = capsys.readouterr().out.strip().partition("\n\n")
    lines = table.split("\n")
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows], notes


def test_a_gain_that_is_one_of_form_is_seen_in_its_row(tmp_path, capsys):
    # the second run tags what the first said without tags: the benchmark's rule read both alike
    first = written(tmp_path / "loose", {"p": "A-", "q": "--", "r": "-A", "s": "BB"}, "AABB")
    second = written(tmp_path / "tagged", {"p": "AA", "q": "AA", "r": "BA", "s": "BB"}, "AABB")
    plain = written(tmp_path / "plain", {"p": "AA", "q": "AA", "r": "BA", "s": "BB"})
    (row, other), notes = compared(capsys, first, second, plain)
    assert (row["questions"], row["first → second"]) == ("medqa (4)", "loose → tagged")
    assert notes == f"* medqa: {score.resolution(4)}"
    assert row["difference in accuracy, 95 % interval"].startswith("+0.375 (")  # 3 of 8 answers
    assert row["in the share of readable answers"].startswith("+0.500 (")  # 4 of 8
    assert row["by the benchmark's own rule"] == "+0.000 (+0.000 … +0.000)"
    assert row["by majority vote"].startswith("+0.000 (")  # p, r before; p, q after
    assert row["only the first's vote is right"] == row["only the second's"] == "1"
    assert row["McNemar's p"] == "1" and other["by the benchmark's own rule"] == "–"


def test_counts_of_votes_are_whole_numbers(tmp_path, capsys):
    runs = [dict.fromkeys(map(str, range(123)), letter) for letter in "BA"]
    folders = [written(tmp_path / name, run) for name, run in zip(("one", "two"), runs)]
    ((row,), _) = compared(capsys, *folders)
    assert row["only the second's"] == "123"


def test_runs_on_other_questions_are_named_and_compared_on_those_that_both_have(tmp_path, capsys):
    first = written(tmp_path / "one", {"p": "A", "q": "B", "r": "B"})
    second = written(tmp_path / "two", {"s": "A", "r": "A", "q": "A", "t": "B", "u": "B"})
    said = "one and two, medqa: 3 and 5 questions, of which 2 are the same .*; --shared compares"
    with pytest.raises(data.RowError, match=said):
        report.__main__.main(["compare", "--results", first, second])
    out = ["--out", str(tmp_path / "compare.md")]
    ((row,), notes) = compared(capsys, first, second, "--shared", *out)
    assert row["questions"] == "medqa (2)"
    assert row["difference in accuracy, 95 % interval"] == "+1.000 (+1.000 … +1.000)"
    told = f"* medqa: {score.resolution(2)}"
    assert (
        notes == f"* 2 questions are in both runs; left out: 1 of one's 3 and 3 of two's 5.\n{told}"
    )
    assert notes in (tmp_path / "compare.md").read_text()
    third = written(tmp_path / "three", {"v": "A"})
    with pytest.raises(data.RowError, match="two and three: --shared: no question in common"):
        report.__main__.main(["compare", "--shared", "--results", second, third])


def test_runs_without_a_common_benchmark_are_not_compared(stages, tmp_path):
    entries = json.loads((stages["hasty"] / "results.json").read_text())["entries"]
    results = score.make_results([{**entries[0], "source": "mmmu"}])
    score.write_results(tmp_path / "results.json", {"name": "other", **results})
    with pytest.raises(data.RowError, match="no benchmark in common"):
        report.__main__.main(["compare", "--results", str(stages["hasty"]), str(tmp_path)])


def test_what_only_one_run_was_asked_is_said(stages, tmp_path, capsys):
    entries = json.loads((stages["hasty"] / "results.json").read_text())["entries"]
    more = [{**entries[0], "id": "more", "source": "mmmu"}]
    for name, members in (("one", entries), ("two", entries + more)):
        score.write_results(
            tmp_path / name / "results.json", {"name": name, **score.make_results(members)}
        )
    report.__main__.main(["compare", "--results", str(tmp_path / "one"), str(tmp_path / "two")])
    assert "not compared, since only one of one and two was asked: mmmu" in capsys.readouterr().out
    with pytest.raises(data.RowError, match="give two or more"):
        report.__main__.main(["compare", "--results", str(tmp_path / "one")])


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "not JSON"), ('{"name": "old", "groups": {}}', "missing 'benchmarks'")],
)
def test_a_torn_or_older_results_file_is_named(tmp_path, content, said):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(data.RowError, match=said):
        report.__main__.main(["plot", "--results", str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(data.RowError, match="evaluate.py writes it"):
        report.__main__.main(["table", "--results", str(tmp_path / "none"), "--out", str(tmp_path)])


# --------------------------------------------------------------------------------------------------
# Nothing is written over


def contents(folder: Path) -> dict[Path, bytes]:
    """{path: content} of every file below a folder, but for locks, which hold nothing."""
    found = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: content for path, content in found.items() if path.name != ".lock"}


@pytest.fixture
def two_runs(stages, tmp_path) -> Path:
    """A folder with two evaluations, one and two, and things that none of our commands wrote."""
    for name, engine in (("one", "hasty"), ("two", "thorough")):
        (tmp_path / name).mkdir()
        content = (stages[engine] / "results.json").read_bytes()
        (tmp_path / name / "results.json").write_bytes(content)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("the only copy")
    (tmp_path / "older.md").write_text("a table of last week")
    return tmp_path


# --out -> why nothing is written there
NO_FOLDER = {
    "one": r"holds results\.json, which no finished or begun command wrote; write to another",
    ".": "holds foreign, which no finished or begun command wrote; write to another",
    "older.md": "a folder is wanted there",
    "foreign": r"holds notes\.txt, which no finished or begun command wrote; write to another",
    "done": r"was finished with other settings or inputs \(results \[.*two.*\] -> \[.*one.*\]\)",
}


@pytest.mark.parametrize("command", ["table", "plot", "page"])
@pytest.mark.parametrize("name", NO_FOLDER)
def test_tables_and_plots_are_never_written_over_something_else(two_runs, command, name):
    done, out = str(two_runs / "done"), str(two_runs / name)
    if name == "done":
        report.__main__.main([command, "--results", str(two_runs / "two"), "--out", done])
    before = contents(two_runs)
    with pytest.raises(data.RowError, match=f"--out .*: {NO_FOLDER[name]}"):
        report.__main__.main([command, "--results", str(two_runs / "one"), "--out", out])
    assert contents(two_runs) == before


@pytest.mark.parametrize("command", ["table", "plot", "page"])
def test_a_table_of_changed_results_is_refused_and_one_of_the_same_is_left(
    two_runs, command, capsys
):
    flags = [command, "--results", str(two_runs / "one"), "--out", str(two_runs / "out")]
    report.__main__.main(flags)
    before = contents(two_runs)
    capsys.readouterr()
    report.__main__.main(flags)
    assert "is finished already" in capsys.readouterr().out and contents(two_runs) == before
    results = (two_runs / "two" / "results.json").read_bytes()
    (two_runs / "one" / "results.json").write_bytes(results)
    before = contents(two_runs)
    with pytest.raises(data.RowError, match=r"\(.*one/results\.json changed\)"):
        report.__main__.main(flags)
    assert contents(two_runs) == before


def test_a_table_and_a_plot_do_not_share_a_folder(two_runs):
    flags = ["--results", str(two_runs / "one"), "--out", str(two_runs / "out")]
    report.__main__.main(["table", *flags])
    with pytest.raises(data.RowError, match="command 'table' -> 'plot'"):
        report.__main__.main(["plot", *flags])


# what --out may not name
NO_FILE = ("one/results.json", "foreign/../two/results.json", "foreign", "older.md")


@pytest.mark.parametrize("name", NO_FILE)
def test_a_comparison_is_never_written_over_something_else(two_runs, name):
    runs = [str(two_runs / "one"), str(two_runs / "two")]
    before = contents(two_runs)
    with pytest.raises(
        data.RowError, match=f"--out .*{name}: is there already, with another content"
    ):
        report.__main__.main(["compare", "--results", *runs, "--out", str(two_runs / name)])
    assert contents(two_runs) == before
    for _ in range(2):  # the same over itself changes nothing
        report.__main__.main(["compare", "--results", *runs, "--out", str(two_runs / "new.md")])
    with pytest.raises(data.RowError, match=r"new\.md: is there already, with another content"):
        report.__main__.main(
            ["compare", "--results", *runs[::-1], "--out", str(two_runs / "new.md")]
        )


# --------------------------------------------------------------------------------------------------
# Endless thinking

LOOP = "and so the film shows one sign on the left " * 12
ENDLESS = {  # name: (first completion, its end, second completion; extracted, correct, forced)
    "read": ("<think> x </think> <answer> A </answer>", "stop", "B", "A", True, True),
    "read and wrong": ("<think> x </think> <answer> B </answer>", "stop", "A", "B", False, False),
    "unread, then right": ("I cannot say.", "stop", "A", None, False, True),
    "unread, then wrong": ("I cannot say.", "stop", "B", None, False, False),
    "cut off, then right": ("<think> " + LOOP, "length", "(A)", None, False, True),
    "unread twice": ("I cannot say.", "stop", "Both.", None, False, False),
    "unread, then cut off": ("I cannot say.", "stop", "A", None, False, False),
    "empty": ("", "empty", "A", None, False, False),
}


class Forced(inference.Engine):
    """Answers first as ENDLESS says, then with the letter."""

    spec = "clinic:thorough"

    def __init__(self):
        self.tally, self.asked = Counter(), []

    def answer(self, requests, sampling):
        for request in requests:
            self.asked.append(request.id)
            first, end, second = ENDLESS[request.messages[1]["content"].split("?")[0]][:3]
            if len(request.messages) > 2:
                assert request.messages[-1]["content"] == evaluate.FORCE_PROMPT
                cut = request.messages[1]["content"].startswith("unread, then cut off?")
                first, end = second, "length" if cut else "stop"
            yield [Completion(request.id, k, first, None, end, 0, "") for k in request.samples]


def test_an_answer_is_forced_where_none_is_readable_and_counted_apart(
    tmp_path, monkeypatch, capsys
):
    rows = [
        data.Question(f"{name}?", {"A": "CT", "B": "MRI"}, "A", id=name).to_row()
        for name in ENDLESS
    ]
    data.write_jsonl(tmp_path / "test.jsonl", rows)
    engine = Forced()
    monkeypatch.setattr(evaluate, "open_engine", lambda spec, setup: engine)
    results = run(tmp_path, tmp_path / "out", "--force")
    assert len(engine.asked) == 8 + 5  # only the unreadable ones a second time
    found = {one["id"]: one for one in results["entries"]}
    for name, (*_, extracted, correct, forced) in ENDLESS.items():
        assert found[name]["choices"] == [extracted] and found[name]["right"] == [correct]
        assert found[name]["forced"] == [forced]
        assert found[name]["loops"] == [name.startswith("cut off")]
    figures = results["groups"]["text"]
    assert figures["accuracy"][0] == pytest.approx(1 / 8)
    assert figures["forced"][0] == pytest.approx(3 / 8)
    assert (figures["loops"], figures["cut_off"]) == pytest.approx((1 / 8, 1 / 8))
    assert "accuracy with forced answers 0.375" in capsys.readouterr().out
    flags = ["page", "--results", str(tmp_path / "out"), "--out", str(tmp_path / "page")]
    report.__main__.main(flags)
    said = (tmp_path / "page" / "table.md").read_text()
    (row,) = [line for line in said.splitlines() if "answers forced" in line]
    assert "0.375 (" in row
    # of 8: 1.96 sqrt(.25 / 8) = .346; 2.80 sqrt(.5 / 8) = .700; 2.80 sqrt(.3 / 8) = .543
    assert "8 questions: ± 34.6 points; detects 70 between two runs, 54 paired" in said


def test_a_forced_answer_is_in_the_bill_as_one_request_more_a_chain(world):
    flags = ["--engine", "http://gpu1/v1#m", "--questions", str(world / "test.jsonl")]
    flags += ["--images", str(world), "--out", "x", "-n", "2", "3", "--max-tokens", "100"]
    args = evaluate.parse([*flags, "--force"])
    questions = evaluate.questions_of(args)
    requests = evaluate.requests_of(questions, args).values()
    chains, forced = evaluate.costs(questions, requests, args)
    assert evaluate.costs(questions, requests, evaluate.parse(flags)) == [chains]
    images, texts = 6, 4  # of the world
    count = 2 * images + 3 * texts
    assert (forced.role, forced.figures[0], forced.figures[2]) == ("force", count, 100 * count)
    assert forced.images == chains.images == 2 * images
    # the chain and the prompt come on top of what was asked; rounded down to tokens of 3 letters
    more = count * (100 + len(evaluate.FORCE_PROMPT) // 3)
    assert 0 <= forced.figures[1] - chains.figures[1] - more <= count


def test_a_role_of_the_clinic_can_be_asked_once_more(world, tmp_path):
    plain = run(world, tmp_path / "plain", "-n", "16", engine="clinic:hasty")
    forced = run(world, tmp_path / "forced", "-n", "16", "--force", engine="clinic:hasty")
    before, after = (results["groups"]["image"] for results in (plain, forced))
    assert before["unparsed"] > 0 and after["accuracy"] == before["accuracy"]
    assert after["forced"][0] > after["accuracy"][0]
