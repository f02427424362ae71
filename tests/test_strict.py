"""Every reader of judge.py, evaluate.py and cases.py holds its files to one schema: what a command
would misread is refused by file and line, before an engine is opened or a result is written."""

import json
import shutil
from pathlib import Path

import pytest

import data
import evaluate
import judge
import report.__main__
import rollout
from command import schema
from report import cases

CRITERIA = dict.fromkeys(judge.KEYS, True)
ROLLOUTS = ["--rollouts", "run/predictions.jsonl", "--questions", "test.jsonl"]
VERDICTS = ["--verdicts", "run/verdicts.jsonl"]
SHEET = ["--human", "sheet/sheet/sheet.csv", "--key", "sheet/key.jsonl"]
ENGINE = ["--engine", "clinic:hasty", "--questions", "test.jsonl"]
METRICS = ["--sft", "sft", "--dpo", "dpo"]
COMMANDS = {
    "rollout": (rollout, ENGINE),
    "verdicts": (judge, ["verdicts", "--judge", "clinic:judge", *ROLLOUTS]),
    "pairs": (judge, ["pairs", *VERDICTS, *ROLLOUTS]),
    "sample": (report.__main__, ["sample", "-n", "2", *VERDICTS, *ROLLOUTS]),
    "agree": (report.__main__, ["agree", *SHEET, *VERDICTS]),
    "run": (evaluate, [*ENGINE, "--judge", "clinic:judge", "-n", "2"]),
    "cases": (report.__main__, ["cases", "run", "--questions", "test.jsonl"]),
    "report": (report.__main__, ["page", "--results", "run", "--pairs", "pairs", *METRICS]),
}
READERS = {  # file -> its kind, and who reads it
    "test.jsonl": ("questions", ["rollout", "verdicts", "pairs", "sample", "run", "cases"]),
    "run/predictions.jsonl": ("rollouts", ["verdicts", "pairs", "sample", "cases"]),
    "run/verdicts.jsonl": ("verdicts", ["pairs", "sample", "agree", "cases"]),
    "sheet/key.jsonl": ("key", ["agree"]),
    "pairs/pairs.jsonl": ("pairs", ["report"]),
    "sft/metrics.jsonl": ("metrics", ["report"]),
    "dpo/metrics.jsonl": ("metrics", ["report"]),
}


@pytest.fixture(scope="module")
def made(world, tmp_path_factory) -> Path:
    """A run folder with every file of READERS, as our commands write them."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(world / "films", "films")
        questions = [q for q in schema.read_questions(world / "test.jsonl") if q.images]
        data.write_jsonl("test.jsonl", [question.to_row() for question in questions])
        judge_too = ["--judge", "clinic:judge", "--judge-samples", "0", "-n", "6"]
        evaluate.main([*ENGINE, *judge_too, "--out", "run"])
        rows = [row for _, row in data.read_jsonl("run/verdicts.jsonl")]
        for number, row in enumerate(rows):  # the even ones meet all four
            row["criteria"] = CRITERIA | {"No_Hallucination": number % 2 == 0}
        data.write_jsonl("run/verdicts.jsonl", rows)
        for name in ("pairs", "sample"):
            main, flags = COMMANDS[name][0].main, COMMANDS[name][1]
            main([*flags, "--out", {"pairs": "pairs", "sample": "sheet"}[name]])
        sheet = Path("sheet/sheet/sheet.csv").read_text(encoding="utf-8-sig")
        filled = sheet.replace(",,,,\n", ",Yes,No,Yes,No\n")
        Path("sheet/sheet/sheet.csv").write_text(filled, encoding="utf-8-sig")
        for name in ("sft", "dpo"):
            figures = dict.fromkeys(("think", "answer", "tag", "margin", "accuracy"), 0.5)
            steps = [{"step": k, "loss": 1.0, **figures} for k in range(3)]
            data.write_jsonl(f"{name}/metrics.jsonl", steps)
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch) -> Path:
    """A copy of the run folder that we stand in."""
    folder = Path(shutil.copytree(made, tmp_path / "made"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def closed(monkeypatch) -> None:
    """Opening an engine is an error."""

    def never(spec: str, setup) -> None:
        raise AssertionError(f"{spec} is opened")

    for module in (rollout, judge, evaluate):
        monkeypatch.setattr(module, "open_engine", never)


def start(command: str, out: str = "out") -> None:
    module, flags = COMMANDS[command]
    module.main([*flags, "--out", out])


def results(out: Path) -> set[str]:
    """What a command wrote, but for the records of its folder."""
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return {path.name for path in files} - {"begun.json", "images.json", ".lock"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_reader_reads_what_our_commands_write(run, command):
    start(command)
    assert results(run / "out")


# what is done to the last row, as text -> which kinds, and how it is told
NAN = "not JSON (NaN is no JSON number)"
CONTRARY = {"criteria": CRITERIA | {"No_Hallucination": True}, "verdict_sha": "another"}
ALL = ("questions", "rollouts", "verdicts", "key", "pairs", "metrics")
SPOILT = {
    "NaN": (ALL, lambda row: json.dumps(row)[:-1] + ', "more": NaN}', NAN),
    "a key twice": (
        ALL, lambda row: json.dumps(row)[:-1] + ', "x": 1, "x": 2}', "'x' is there twice"
    ),
    "another kind": (ALL, None, "this is a row of "),
    "an unknown key": (
        ("questions", "rollouts", "verdicts", "key", "pairs"),
        lambda row: json.dumps({**row, "more": 1}), "more: is no key of ",
    ),
    "sample is true": (
        ("rollouts", "verdicts"),
        lambda row: json.dumps({**row, "sample": True}),
        "sample: expected a whole number of 0 or more, found 'True'",
    ),
    "sample is a text": (
        ("rollouts", "verdicts"),
        lambda row: json.dumps({**row, "sample": "0"}),
        "sample: expected a whole number of 0 or more, found '0'",
    ),
    "step is true": (
        ("metrics",), lambda row: json.dumps({**row, "step": True}),
        "step: expected a whole number of 0 or more, found 'True'",
    ),
    "a hash of another response": (
        ("rollouts",), lambda row: json.dumps({**row, "response_sha": "0" * 16}),
        "response_sha: '0000000000000000' is not the hash of the response",
    ),
    "criteria is No": (
        ("verdicts",), lambda row: json.dumps({**row, "criteria": "No"}),
        "criteria: expected null, or true or false for each of Answer_Correctness",
    ),
    "a criterion is No": (
        ("verdicts",),
        lambda row: json.dumps({**row, "criteria": CRITERIA | {"No_Hallucination": "No"}}),
        "criteria: expected null, or true or false for each of Answer_Correctness",
    ),
    "no hash": (
        ("rollouts", "verdicts", "key"),
        lambda row: json.dumps({k: v for k, v in row.items() if k != "response_sha"}),
        "missing 'response_sha'",
    ),
}  # fmt: skip
TWICE = {  # kind -> a second row on the same, which says another thing
    "questions": {"question": "Another one?"},
    "rollouts": {"response": "B", "response_sha": data.content_hash("B")[:16]},
    "verdicts": CONTRARY,
    "key": {"response_sha": "0" * 16},
    "pairs": {"failed": []},
    "metrics": {"loss": 2.0},
}
SPOILT_ROWS = [
    (path, command, name)
    for path, (kind, readers) in READERS.items() for command in readers
    for name, (kinds, _, _) in SPOILT.items() if kind in kinds
]  # fmt: skip
SAID_TWICE = [(path, command) for path, (_, readers) in READERS.items() for command in readers]


@pytest.mark.parametrize(("path", "command", "name"), SPOILT_ROWS)
def test_a_row_that_would_be_misread_is_refused_by_file_and_line(run, closed, path, command, name):
    (_, spoil, said), kind = SPOILT[name], READERS[path][0]
    lines = (run / path).read_text(encoding="utf-8").splitlines()
    other = "run/verdicts.jsonl" if kind in ("questions", "rollouts") else "test.jsonl"
    stranger = (run / other).read_text(encoding="utf-8").splitlines()[-1]
    lines[-1] = spoil(json.loads(lines[-1])) if spoil else stranger
    (run / path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(data.RowError) as refused:
        start(command)
    assert str(refused.value).startswith(f"{path}:{len(lines)}: ") and said in str(refused.value)
    assert not results(run / "out")


@pytest.mark.parametrize(("path", "command"), SAID_TWICE)
def test_a_second_row_that_says_another_thing_is_refused_by_both_lines(run, closed, path, command):
    lines = (run / path).read_text(encoding="utf-8").splitlines()
    more = json.dumps({**json.loads(lines[0]), **TWICE[READERS[path][0]]})
    (run / path).write_text("\n".join([*lines, more]) + "\n", encoding="utf-8")
    with pytest.raises(data.RowError) as refused:
        start(command)
    assert str(refused.value).startswith(f"{path}:{len(lines) + 1}: ")
    assert f"is already on {path}:1; remove one of the rows" in str(refused.value)
    assert not results(run / "out")


@pytest.mark.parametrize(("path", "command"), SAID_TWICE)
def test_once_the_row_is_mended_the_same_command_goes_on_in_the_same_folder(run, path, command):
    text = (run / path).read_text(encoding="utf-8")
    (run / path).write_text(text + '{"id": NaN}\n', encoding="utf-8")
    with pytest.raises(data.RowError, match="NaN is no JSON number"):
        start(command)
    (run / path).write_text(text, encoding="utf-8")
    start(command)
    assert results(run / "out")


@pytest.mark.parametrize("command", ["table", "plot", "page", "compare", "cases"])
def test_results_that_hold_no_number_are_refused_by_file(run, command):
    path = run / "run" / "results.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"unparsed": ', '"unparsed": NaN, "was": ', 1), encoding="utf-8")
    flags = ["run", "--questions", "test.jsonl"] if command == "cases" else ["--results", "run"]
    flags += ["run"] if command == "compare" else []
    with pytest.raises(data.RowError, match=r"run/results\.json: not JSON \(NaN is no JSON"):
        report.__main__.main([command, *flags, "--out", "out"])
    assert not (run / "out").exists()


def test_a_verdict_on_another_text_is_never_counted(run, closed, capsys):
    rows = [row for _, row in data.read_jsonl("run/verdicts.jsonl")]
    rows[-1] = {**rows[-1], "response_sha": "0" * 16}
    data.write_jsonl("run/verdicts.jsonl", rows)
    start("pairs")
    assert json.loads((run / "out" / "report.json").read_text())["no_verdict"] == 1
    with pytest.raises(data.RowError, match=r"run/verdicts\.jsonl: 1 verdicts are on texts that"):
        start("sample", "sample")
    question = next(q for q in schema.read_questions("test.jsonl") if q.id == rows[-1]["id"])
    with pytest.raises(data.RowError, match=r"predictions\.jsonl: sample 5 of .* on another text"):
        cases.write_page([cases.read_run("run")], [question], run, "", 1, run / "cases.html")
