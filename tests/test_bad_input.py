"""Whatever a user gives a command, it answers in one paragraph that names the file or the flag, and nothing is lost.

Every command runs once on good inputs; then each of its inputs is replaced by a bad one. All in this process: what the
scripts' wrapper would print and return is read off `flags.explain`, which test_stage.py tries in real processes.
"""

import csv
import hashlib
import importlib
import json
import os
import shutil
from pathlib import Path

import pytest

import clinic
import data
import descriptions
import flags
import stage


def outcome(script: str, words: list[str], capsys) -> tuple[int, str]:
    """(exit code, what is said) of a command, as flags.run_script ends it. A fault of ours is raised."""
    capsys.readouterr()
    try:
        ended = importlib.import_module(script).main(words)
    except SystemExit as end:
        ended = end.code
    except Exception as error:
        if not (ended := flags.explain(error)):
            raise
    finally:
        stage.release()
    said = "".join(capsys.readouterr())
    return (1, f"{said}{ended}") if isinstance(ended, str) else (ended or 0, said)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def place(tmp_path_factory, folders) -> Path:
    """One good input of every kind."""
    root = tmp_path_factory.mktemp("place")
    counts = {"text": 6, "image": 10, "dev-image": 2, "dev-text": 2, "test-image": 3, "test-text": 2}
    clinic.main(["world", "--out", str(root / "world"), *(word for name, n in counts.items() for word in (f"--{name}", str(n)))])
    world, run = root / "world", root / "run"
    common = ["--questions", str(world / "bank.jsonl"), "--images", str(world)]
    for script, words in (
        ("distill", ["run", *common, "--teachers", "clinic:thorough", "clinic:hasty", "--answer-form", "text", "--out", str(run / "distill")]),
        ("rollout", ["--engine", "clinic:thorough", *common, "-n", "2", "--out", str(run / "rollout")]),
        ("judge", ["verdicts", "--judge", "clinic:judge", "--rollouts", str(run / "rollout" / "rollouts.jsonl"), *common, "--out", str(run / "verdicts")]),
        ("judge", ["sample", "-n", "3", "--verdicts", str(run / "verdicts" / "verdicts.jsonl"), "--rollouts", str(run / "rollout" / "rollouts.jsonl"), *common, "--out", str(run / "human")]),
        ("evaluate", ["run", "--engine", "clinic:thorough", "--questions", str(world / "test.jsonl"), "--images", str(world), "-n", "2", "--judge", "clinic:judge", "--out", str(run / "one")]),
        ("evaluate", ["run", "--engine", "clinic:hasty", "--questions", str(world / "test.jsonl"), "--images", str(world), "-n", "2", "--out", str(run / "two")]),
    ):
        importlib.import_module(script).main(words)
    stage.release()
    shutil.copytree(folders["qwen"], root / "model")
    chains = {row["id"]: row["response"] for row in data.read_rows(run / "rollout" / "rollouts.jsonl", "rollouts")}
    question = next(q for q in data.read_questions(world / "bank.jsonl") if q.images)
    pair = {"id": question.id, "prompt": data.prompt_messages(question), "images": question.images, "chosen": chains[question.id], "rejected": "<think> no </think> <answer> no </answer>", "failed": ["No_Hallucination"]}
    data.write_jsonl(root / "pairs.jsonl", [pair, {**pair, "rejected": "no"}])
    with open(run / "human" / "sheet" / "sheet.csv", newline="", encoding="utf-8-sig") as file:
        header, *cases = csv.reader(file)
    with open(root / "rater.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([header, *(case[:-4] + ["Yes"] * 4 for case in cases)])
    descriptions.write_sheet(root / "reviewed.csv", ["id", "question"], [[f"id:{question.id}", question.question]])
    (root / "review.csv").write_text("chain,verdict\nchain-1,yes\n")
    data.write_jsonl(root / "sharegpt.jsonl", [{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "<think> So it is, as one may well see. </think> Thus."}]}])
    exam = {"question": "Which?", "options": {"A": "x", "B": "y"}, "answer_idx": "A", "answer": "x"}
    data.write_jsonl(root / "exam.jsonl", [exam])
    data.write_jsonl(root / "old-bank.jsonl", [data.Question("Where?", {}, "there").to_row()])
    return root


WORLD_IMAGES = {"--images": "world"}
ENGINE = {"--max-tokens": "=8"}
COMMANDS = {  # name: (script, words before the flags, {flag: a path below the place; "=..." is a word; several in a tuple}, its kind of out)
    "check": ("data", ["check"], {"": "world/bank.jsonl"}, None),
    "show": ("model", ["show"], {"": "run/distill/demos.jsonl", "--model": "model"}, None),
    "leaks": ("leaks", [], {"--questions": "world/bank.jsonl", "--against": "world/test.jsonl", **WORLD_IMAGES}, "folder"),
    "curate": ("curate", ["all"], {"--questions": "world/bank.jsonl", "--against": "world/test.jsonl", "--experts": "=clinic:expert-a", "--reviewed": "reviewed.csv", **WORLD_IMAGES}, "folder"),
    "add": ("curate", ["add", "medqa-train"], {"": "exam.jsonl"}, "file"),
    "inspect": ("benchmarks", ["inspect", "medqa-train"], {"": "exam.jsonl"}, None),
    "convert": ("benchmarks", ["convert", "medqa-train"], {"": "exam.jsonl"}, "file"),
    "distill": ("distill", ["run"], {"--questions": "world/bank.jsonl", "--teachers": "=clinic:thorough", "--review": "review.csv", **WORLD_IMAGES}, "folder"),
    "import": ("distill", ["import", "--format", "sharegpt"], {"": "sharegpt.jsonl"}, "folder"),
    "rollout": ("rollout", [], {"--engine": "=clinic:thorough", "--questions": "world/bank.jsonl", **WORLD_IMAGES}, "folder"),
    "verdicts": ("judge", ["verdicts"], {"--judge": "=clinic:judge", "--rollouts": "run/rollout/rollouts.jsonl", "--questions": "world/bank.jsonl", **WORLD_IMAGES}, "folder"),
    "pairs": ("judge", ["pairs"], {"--verdicts": "run/verdicts/verdicts.jsonl", "--rollouts": "run/rollout/rollouts.jsonl", "--questions": "world/bank.jsonl"}, "folder"),
    "sample": ("judge", ["sample", "-n", "2"], {"--verdicts": "run/verdicts/verdicts.jsonl", "--rollouts": "run/rollout/rollouts.jsonl", "--questions": "world/bank.jsonl", **WORLD_IMAGES}, "folder"),
    "agree": ("judge", ["agree"], {"--human": "rater.csv", "--key": "run/human/key.jsonl", "--verdicts": "run/verdicts/verdicts.jsonl"}, "folder"),
    "sft": ("sft", ["--epochs", "0.01", "--pixels", "3136"], {"--model": "model", "--demos": "run/distill/demos.jsonl", **WORLD_IMAGES}, "folder"),
    "dpo": ("dpo", ["--epochs", "0.01", "--pixels", "3136"], {"--model": "model", "--pairs": "pairs.jsonl", **WORLD_IMAGES}, "folder"),
    "evaluate": ("evaluate", ["run"], {"--engine": "=clinic:thorough", "--questions": "world/test.jsonl", **WORLD_IMAGES}, "folder"),
    "compare": ("evaluate", ["compare"], {"--results": ("run/one", "run/two")}, "file"),
    "table": ("evaluate", ["table"], {"--results": ("run/one", "run/two")}, "folder"),
    "plot": ("evaluate", ["plot"], {"--results": ("run/one", "run/two")}, "folder"),
    "cases": ("evaluate", ["cases"], {"": ("run/one", "run/two"), "--questions": "world/test.jsonl", **WORLD_IMAGES}, "file"),
    "report": ("evaluate", ["report"], {"--results": ("run/one", "run/two")}, "folder"),
    "world": ("clinic", ["world", "--text", "2", "--image", "2", "--dev-text", "1", "--dev-image", "1", "--test-text", "1", "--test-image", "1"], {}, "folder"),
    "sheet": ("clinic", ["show"], {}, "folder"),
}  # fmt: skip


def words_of(name: str, place: Path, out: Path | None, **instead: str) -> list[str]:
    """The command's words; instead: another word for a flag, by its name without dashes ("file" for the positional)."""
    _, words, given, _ = COMMANDS[name]
    words = list(words)
    for flag, value in sorted(given.items()):  # the positional first
        values = value if isinstance(value, tuple) else (value,)
        said = [one[1:] if one.startswith("=") else str(place / one) for one in values]
        key = flag.strip("-").replace("-", "_") or "file"
        if key in instead:
            said[0] = instead[key]
        words += [flag] * bool(flag) + said
    return words + (["--out", str(out)] if COMMANDS[name][3] and out is not None else [])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_good_inputs_and_a_second_time_changes_nothing(name, place, tmp_path, capsys):
    """without which nothing below would say anything"""
    script, *_, kind = COMMANDS[name]
    out = tmp_path / ("made.jsonl" if kind == "file" else "made")
    before = contents(place)
    code, said = outcome(script, words_of(name, place, out), capsys)
    assert code == 0, said
    assert contents(place) == before
    made = contents(tmp_path)
    code, said = outcome(script, words_of(name, place, out), capsys)
    assert code == 0 and contents(tmp_path) == made
    assert kind != "folder" or "is finished already" in said


def bad_file(how: str, good: Path, at: Path) -> None:
    """A bad file of a good one's name."""
    text = good.read_text(encoding="utf-8-sig") if good.is_file() else ""
    first = text.splitlines()[0] if text else ""
    if how == "a folder":
        at.mkdir()
    elif how == "a pipe":
        os.mkfifo(at)
    elif how == "no text":
        at.write_bytes(bytes(range(256)) * 9)
    elif how != "missing":
        at.write_text({
            "empty": "", "torn": text[: len(text.rstrip()) - 9], "a list": "[1]\n", "a number": "7\n",
            "NaN": '{"zz": NaN, ' + first[1:] + "\n", "a key twice": '{"id": "x", "id": "y", ' + first[1:] + "\n",
            "half a character": '{"zz": "\\ud800", ' + first[1:] + "\n", "nested": "[" * 50_000,
            "a row twice": first + "\n" + first + "\n", "a strange key": '{"Imagess": 1, ' + first[1:] + "\n",
            "another kind": '{"case": "c", "id": "x", "response_sha": "y"}\n',
            "no such column": "a,b\n1,2\n", "another alphabet": "",
        }[how])  # fmt: skip


ROWS = ("missing", "a folder", "a pipe", "no text", "empty", "torn", "a list", "NaN", "a key twice", "half a character", "nested", "a row twice", "a strange key", "another kind")
PUBLISHED = ("missing", "a folder", "a pipe", "no text", "empty", "torn", "nested", "NaN")
SHEETS = ("missing", "a folder", "a pipe", "no text", "no such column")
BAD_FILES = [
    (name, flag, how)
    for name, (_, _, given, _) in COMMANDS.items()
    for flag, value in given.items()
    if isinstance(value, str) and value.endswith((".jsonl", ".csv"))
    for how in (SHEETS if value.endswith(".csv") else PUBLISHED if name in ("add", "inspect", "convert", "import") else ROWS)
    if not (name == "show" and how in ("a row twice", "a strange key", "another kind"))
    if not (name == "import" and how in ("NaN", "a strange key"))
    if not (name == "agree" and (flag, how) == ("--key", "another kind"))
]


@pytest.mark.parametrize(("name", "flag", "how"), BAD_FILES)
def test_a_bad_file_is_named_and_nothing_is_lost(name, flag, how, place, tmp_path, capsys):
    script, _, given, _ = COMMANDS[name]
    good, folder = place / given[flag], tmp_path / "in"
    folder.mkdir()
    bad_file(how, good, folder / good.name)
    words = words_of(name, place, tmp_path / "out", **{flag.strip("-") or "file": str(folder / good.name)})
    before, given_before = contents(place), contents(folder)
    code, said = outcome(script, words, capsys)
    assert code in (1, 2), said
    assert good.name in said and len(said) < 4000
    assert contents(place) == before and contents(folder) == given_before
    assert not (tmp_path / "out" / "stage.json").exists()
