"""Whatever a user gives a command, it answers in one paragraph that names the file or the flag, and
nothing is lost.

Every command runs once on good inputs; then each of its inputs is replaced by a bad one. All in
this process: what the scripts' wrapper would print and return is read off `flags.explain`, which
test_stage.py tries in real processes.
"""

import csv
import hashlib
import importlib
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import pytest

import clinic.__main__
import data
from command import flags, schema, sheets, stage


def outcome(script: str, words: list[str], capsys) -> tuple[int, str]:
    """(exit code, what is said) of a command, as flags.run_script ends it. A fault of ours is
    raised."""
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
    files = (
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.name != ".lock"
    )
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory, folders) -> Path:
    """One good input of every kind."""
    root = tmp_path_factory.mktemp("place")
    counts = {
        "text": 6,
        "image": 10,
        "dev-image": 2,
        "dev-text": 2,
        "test-image": 3,
        "test-text": 2,
    }
    clinic.__main__.main(
        [
            "world",
            "--out",
            str(root / "world"),
            *(word for name, n in counts.items() for word in (f"--{name}", str(n))),
        ]
    )
    world, run = root / "world", root / "run"
    common = ["--questions", str(world / "bank.jsonl"), "--images", str(world)]
    for script, words in (
        (
            "distill",
            [
                "run",
                *common,
                "--teachers",
                "clinic:thorough",
                "clinic:hasty",
                "--answer-form",
                "text",
                "--out",
                str(run / "distill"),
            ],
        ),
        (
            "rollout",
            ["--engine", "clinic:thorough", *common, "-n", "2", "--out", str(run / "rollout")],
        ),
        (
            "judge",
            [
                "verdicts",
                "--judge",
                "clinic:judge",
                "--rollouts",
                str(run / "rollout" / "rollouts.jsonl"),
                *common,
                "--out",
                str(run / "verdicts"),
            ],
        ),
        (
            "report.__main__",
            [
                "sample",
                "-n",
                "3",
                "--verdicts",
                str(run / "verdicts" / "verdicts.jsonl"),
                "--rollouts",
                str(run / "rollout" / "rollouts.jsonl"),
                *common,
                "--out",
                str(run / "human"),
            ],
        ),
        (
            "evaluate",
            [
                "--engine",
                "clinic:thorough",
                "--questions",
                str(world / "test.jsonl"),
                "--images",
                str(world),
                "-n",
                "2",
                "--judge",
                "clinic:judge",
                "--out",
                str(run / "one"),
            ],
        ),
        (
            "evaluate",
            [
                "--engine",
                "clinic:hasty",
                "--questions",
                str(world / "test.jsonl"),
                "--images",
                str(world),
                "-n",
                "2",
                "--out",
                str(run / "two"),
            ],
        ),
    ):
        importlib.import_module(script).main(words)
    stage.release()
    shutil.copytree(folders["qwen"], root / "model")
    chains = {
        row["id"]: row["response"]
        for row in schema.read_rows(run / "rollout" / "rollouts.jsonl", "rollouts")
    }
    question = next(q for q in schema.read_questions(world / "bank.jsonl") if q.images)
    pair = {
        "id": question.id,
        "prompt": data.prompt_messages(question),
        "images": question.images,
        "chosen": chains[question.id],
        "rejected": "<think> no </think> <answer> no </answer>",
        "failed": ["No_Hallucination"],
    }
    data.write_jsonl(root / "pairs.jsonl", [pair, {**pair, "rejected": "no"}])
    with open(run / "human" / "sheet" / "sheet.csv", newline="", encoding="utf-8-sig") as file:
        header, *cases = csv.reader(file)
    with open(root / "rater.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([header, *(case[:-4] + ["Yes"] * 4 for case in cases)])
    sheets.write_sheet(
        root / "reviewed.csv", ["id", "question"], [[f"id:{question.id}", question.question]]
    )
    (root / "review.csv").write_text("chain,verdict\nchain-1,yes\n")
    data.write_jsonl(
        root / "sharegpt.jsonl",
        [
            {
                "conversations": [
                    {"from": "human", "value": "Why?"},
                    {
                        "from": "gpt",
                        "value": "<think> So it is, as one may well see. </think> Thus.",
                    },
                ]
            }
        ],
    )
    exam = {"question": "Which?", "options": {"A": "x", "B": "y"}, "answer_idx": "A", "answer": "x"}
    data.write_jsonl(root / "exam.jsonl", [exam])
    data.write_jsonl(root / "old-bank.jsonl", [data.Question("Where?", {}, "there").to_row()])
    return root


WORLD_IMAGES = {"--images": "world"}
# name: (script, words before the flags, inputs, its kind of out). Inputs: {flag: a path below the
# place}; "=..." is a word; a tuple holds several.
COMMANDS = {
    "check": ("report.__main__", ["check"], {"": "world/bank.jsonl"}, None),
    "show": (
        "report.__main__", ["show"], {"": "run/distill/demos.jsonl", "--model": "model"}, None,
    ),
    "leaks": (
        "benchmarks.decontaminate", [],
        {"--questions": "world/bank.jsonl", "--against": "world/test.jsonl", **WORLD_IMAGES},
        "folder",
    ),
    "curate": (
        "curate", [],
        {
            "--questions": "world/bank.jsonl", "--against": "world/test.jsonl",
            "--experts": "=clinic:expert-a", "--reviewed": "reviewed.csv", **WORLD_IMAGES,
        },
        "folder",
    ),
    "inspect": ("benchmarks", ["inspect", "medqa-train"], {"": "exam.jsonl"}, None),
    "convert": ("benchmarks", ["convert", "medqa-train"], {"": "exam.jsonl"}, "file"),
    "distill": (
        "distill", ["run"],
        {
            "--questions": "world/bank.jsonl", "--teachers": "=clinic:thorough",
            "--review": "review.csv", **WORLD_IMAGES,
        },
        "folder",
    ),
    "import": ("distill", ["import", "--format", "sharegpt"], {"": "sharegpt.jsonl"}, "folder"),
    "rollout": (
        "rollout", [],
        {"--engine": "=clinic:thorough", "--questions": "world/bank.jsonl", **WORLD_IMAGES},
        "folder",
    ),
    "verdicts": (
        "judge", ["verdicts"],
        {
            "--judge": "=clinic:judge", "--rollouts": "run/rollout/rollouts.jsonl",
            "--questions": "world/bank.jsonl", **WORLD_IMAGES,
        },
        "folder",
    ),
    "pairs": (
        "judge", ["pairs"],
        {
            "--verdicts": "run/verdicts/verdicts.jsonl",
            "--rollouts": "run/rollout/rollouts.jsonl", "--questions": "world/bank.jsonl",
        },
        "folder",
    ),
    "sample": (
        "report.__main__", ["sample", "-n", "8"],
        {
            "--verdicts": "run/verdicts/verdicts.jsonl",
            "--rollouts": "run/rollout/rollouts.jsonl", "--questions": "world/bank.jsonl",
            **WORLD_IMAGES,
        },
        "folder",
    ),
    "agree": (
        "report.__main__", ["agree"],
        {
            "--human": "rater.csv", "--key": "run/human/key.jsonl",
            "--verdicts": "run/verdicts/verdicts.jsonl",
        },
        "folder",
    ),
    "sft": (
        "sft", ["--epochs", "0.01", "--pixels", "3136"],
        {"--model": "model", "--demos": "run/distill/demos.jsonl", **WORLD_IMAGES},
        "folder",
    ),
    "dpo": (
        "dpo", ["--epochs", "0.01", "--pixels", "3136"],
        {"--model": "model", "--pairs": "pairs.jsonl", **WORLD_IMAGES},
        "folder",
    ),
    "evaluate": (
        "evaluate", [],
        {"--engine": "=clinic:thorough", "--questions": "world/test.jsonl", **WORLD_IMAGES},
        "folder",
    ),
    "compare": ("report.__main__", ["compare"], {"--results": ("run/one", "run/two")}, "file"),
    "table": ("report.__main__", ["table"], {"--results": ("run/one", "run/two")}, "folder"),
    "plot": ("report.__main__", ["plot"], {"--results": ("run/one", "run/two")}, "folder"),
    "cases": (
        "report.__main__", ["cases"],
        {"": ("run/one", "run/two"), "--questions": "world/test.jsonl", **WORLD_IMAGES},
        "file",
    ),
    "report": ("report.__main__", ["page"], {"--results": ("run/one", "run/two")}, "folder"),
    "world": (
        "clinic.__main__",
        [
            "world", "--text", "2", "--image", "2", "--dev-text", "1", "--dev-image", "1",
            "--test-text", "1", "--test-image", "1",
        ],
        {}, "folder",
    ),
    "sheet": ("clinic.__main__", ["show"], {}, "folder"),
}  # fmt: skip


def words_of(name: str, place: Path, out: Path | None, **instead: str) -> list[str]:
    """The command's words. instead: another word for a flag, by its name without dashes ("file" for
    the positional)."""
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
def test_every_command_takes_good_inputs_and_a_second_time_changes_nothing(
    name, place, tmp_path, capsys
):
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
        at.write_text(
            {
                "empty": "",
                "torn": text[: len(text.rstrip()) - 9],
                "a list": "[1]\n",
                "a number": "7\n",
                "NaN": '{"zz": NaN, ' + first[1:] + "\n",
                "a key twice": '{"id": "x", "id": "y", ' + first[1:] + "\n",
                "half a character": '{"zz": "\\ud800", ' + first[1:] + "\n",
                "nested": "[" * 50_000,
                "a row twice": first + "\n" + first + "\n",
                "a strange key": '{"Imagess": 1, ' + first[1:] + "\n",
                "another kind": '{"case": "c", "id": "x", "response_sha": "y"}\n',
                "no such column": "a,b\n1,2\n",
                "another alphabet": "",
            }[how]
        )


ROWS = (
    "missing",
    "a folder",
    "a pipe",
    "no text",
    "empty",
    "torn",
    "a list",
    "NaN",
    "a key twice",
    "half a character",
    "nested",
    "a row twice",
    "a strange key",
    "another kind",
)
PUBLISHED = ("missing", "a folder", "a pipe", "no text", "empty", "torn", "nested", "NaN")
SHEETS = ("missing", "a folder", "a pipe", "no text", "no such column")
BAD_FILES = [
    (name, flag, how)
    for name, (_, _, given, _) in COMMANDS.items()
    for flag, value in given.items()
    if isinstance(value, str) and value.endswith((".jsonl", ".csv"))
    for how in (
        SHEETS
        if value.endswith(".csv")
        else PUBLISHED
        if name in ("inspect", "convert", "import")
        else ROWS
    )
    if not (
        how == "another kind" and name in ("check", "agree") and flag in ("", "--key")
    )  # a whole file of that kind
]


@pytest.mark.parametrize(("name", "flag", "how"), BAD_FILES)
def test_a_bad_file_is_named_and_nothing_is_lost(name, flag, how, place, tmp_path, capsys):
    script, _, given, _ = COMMANDS[name]
    good, folder = place / given[flag], tmp_path / "in"
    folder.mkdir()
    bad_file(how, good, folder / good.name)
    words = words_of(
        name, place, tmp_path / "out", **{flag.strip("-") or "file": str(folder / good.name)}
    )
    before, given_before = contents(place), contents(folder)
    code, said = outcome(script, words, capsys)
    assert code in (1, 2), said
    assert good.name in said and len(said) < 4000
    assert contents(place) == before and contents(folder) == given_before
    assert not (tmp_path / "out" / "stage.json").exists()


def change(path: Path, **values) -> None:
    """Other values in a JSON file; ... for a key that is gone."""
    held = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in held.items() if value is not ...}))


BAD_MODELS = {  # how: what the message must name
    "missing": "model", "a file": "model", "empty": "config.json", "torn config": "config.json",
    "another family": "llama", "an adapter": "adapter", "no weights": "safetensors",
    "torn weights": "safetensors", "torn tokenizer": "tokenizer",
    "torn index": "index.json", "another shape": "missing", "another size": "shape",
}  # fmt: skip


def bad_model(how: str, good: Path, at: Path) -> None:
    if how == "missing":
        return
    if how == "a file":
        at.write_text("{}")
        return
    shutil.copytree(good, at)
    config, weights = at / "config.json", at / "model.safetensors"
    if how == "empty":
        shutil.rmtree(at)
        at.mkdir()
    elif how == "torn config":
        config.write_text(config.read_text()[:-20])
    elif how == "another family":
        change(config, model_type="llama")
    elif how == "an adapter":
        (at / "adapter_config.json").write_text("{}")
    elif how == "no weights":
        weights.unlink()
    elif how == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "torn tokenizer":
        (at / "tokenizer.json").write_text((at / "tokenizer.json").read_text()[:-20])
    elif how == "torn index":
        (at / "model.safetensors.index.json").write_text('{"weight_map": ')
    elif how == "another shape":
        text = json.loads(config.read_text())["text_config"]
        layers = [*text["layer_types"], "full_attention"]
        change(
            config, text_config={**text, "num_hidden_layers": len(layers), "layer_types": layers}
        )
    else:
        text = json.loads(config.read_text())["text_config"]
        change(config, text_config={**text, "intermediate_size": text["intermediate_size"] + 8})


USERS = {"sft": "--model", "dpo": "--model", "rollout": "--engine"}  # commands that load a model


@pytest.mark.parametrize(("name", "how"), [(name, how) for name in USERS for how in BAD_MODELS])
def test_a_folder_that_is_no_whole_model_is_named_and_left_as_it_is(
    name, how, place, tmp_path, capsys
):
    bad_model(how, place / "model", tmp_path / "model")
    before = contents(tmp_path)
    spec = f"hf:{tmp_path / 'model'}" if name == "rollout" else str(tmp_path / "model")
    words = words_of(name, place, tmp_path / "run" / "out", **{USERS[name].strip("-"): spec})
    code, said = outcome(
        COMMANDS[name][0], words + (["--pixels", "3136"] if name == "rollout" else []), capsys
    )
    assert code == 1 and BAD_MODELS[how] in said and str(tmp_path / "model") in said, said
    assert {
        name: digest for name, digest in contents(tmp_path).items() if not name.startswith("run/")
    } == before


BAD_RESULTS = {
    "missing": None, "torn": '{"name": ', "a list": "[]", "without entries": {"entries": ...},
    "entries of texts": {"entries": ["x"]}, "entries of nothing": {"entries": [{}]},
    "no entry": {"entries": []}, "NaN": '{"name": NaN}', "without figures": {"groups": ...},
    "a name that is a number": {"name": 7},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (name, how)
        for name in ("compare", "table", "plot", "cases", "report")
        for how in BAD_RESULTS
    ],
)
def test_results_that_are_none_are_named(name, how, place, tmp_path, capsys):
    folder, what = tmp_path / "one", BAD_RESULTS[how]
    shutil.copytree(place / "run" / "one", folder)
    if what is None:
        (folder / "results.json").unlink()
    elif isinstance(what, str):
        (folder / "results.json").write_text(what)
    else:
        change(folder / "results.json", **what)
    before = contents(folder)
    key = "file" if name == "cases" else "results"
    words = words_of(name, place, tmp_path / "out", **{key: str(folder)})
    code, said = outcome("report.__main__", words, capsys)
    assert code == 1 and "results.json" in said and contents(folder) == before, said


WITH_IMAGES = [
    name for name, (_, _, given, _) in COMMANDS.items() if "--images" in given and name != "sft"
]


@pytest.mark.parametrize("how", ["nowhere", "without the images", "no images", "a bomb", "folders"])
@pytest.mark.parametrize("name", WITH_IMAGES)
def test_an_image_that_cannot_be_used_is_named(name, how, place, tmp_path, capsys):
    root = tmp_path / "root"
    if how == "without the images":
        root.mkdir()
    elif how != "nowhere":
        shutil.copytree(place / "world", root)
        for image in sorted((root / "films").rglob("*.png")):
            image.unlink()
            if how == "folders":
                image.mkdir()
            else:
                image.write_bytes(b"no image" if how == "no images" else BOMB)
    if how in ("no images", "a bomb") and name not in ("leaks", "curate", "dpo"):
        return  # files are only handed on, to an engine that reads them, or to raters
    code, said = outcome(
        COMMANDS[name][0], words_of(name, place, tmp_path / "run" / "out", images=str(root)), capsys
    )
    assert code == 1 and ".png" in said and "image" in said, said


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes: its header alone"""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


BOMB = bomb()

SPECS = {
    "nonsense:x": "a spec is", "no-colon": "a spec is", "http://host:1/v1": "which model",
    "https://api.example.com/v1#m": "EXAMPLE_API_KEY", "gemini:g": "GEMINI_API_KEY",
    "http://127.0.0.1:9/v1#m": "no server answers", "clinic:nobody": "nobody", "": "a spec is",
}  # fmt: skip
ASKS = {
    "rollout": "engine",
    "evaluate": "engine",
    "verdicts": "judge",
    "distill": "teachers",
    "curate": "experts",
}


@pytest.mark.parametrize(("name", "spec"), [(name, spec) for name in ASKS for spec in SPECS])
def test_an_engine_that_cannot_answer_is_named_with_what_to_do(
    name, spec, place, tmp_path, capsys, monkeypatch
):
    for variable in ("GEMINI_API_KEY", "EXAMPLE_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    words = words_of(name, place, tmp_path / "run" / "out", **{ASKS[name]: spec})
    words.append("--images-may-leave")
    code, said = outcome(COMMANDS[name][0], words, capsys)
    assert code == 1 and SPECS[spec] in said, said


PLACES = (
    "a file",
    "an input's folder",
    "a strange folder",
    "nothing",
    "finished with another input",
)
WRITERS = [name for name, (_, _, _, kind) in COMMANDS.items() if kind == "folder"]


@pytest.mark.parametrize(("name", "how"), [(name, how) for name in WRITERS for how in PLACES])
def test_a_folder_that_would_lose_something_is_refused_by_every_command(
    name, how, place, tmp_path, capsys
):
    script, _, given, _ = COMMANDS[name]
    out = tmp_path / "out"
    if how == "a file":
        out.write_text("a week of work")
    elif how == "an input's folder":
        file = next(
            (
                value
                for value in given.values()
                if isinstance(value, str) and "/" in value and not value.startswith("=")
            ),
            "",
        )
        if not file:
            return
        out = (place / file).parent
    elif how == "a strange folder":
        out.mkdir()
        (out / "bank.jsonl").write_text("a week of work")
    elif how == "finished with another input":
        out.mkdir()
        (out / "made.txt").write_text("a week of work")
        record = {
            "settings": {},
            "inputs": {"other.jsonl": "0"},
            "outputs": {},
            "command": [],
            "sources": {},
            "figures": {},
            "seconds": 1.0,
        }
        (out / "stage.json").write_text(json.dumps(record))
    before = contents(place) | contents(tmp_path)
    code, said = outcome(
        script, words_of(name, place, Path("") if how == "nothing" else out), capsys
    )
    assert code == 1 and "--out" in said, said
    assert contents(place) | contents(tmp_path) == before


@pytest.mark.parametrize("how", ["a folder", "an input", "something else"])
@pytest.mark.parametrize("name", [name for name, (*_, kind) in COMMANDS.items() if kind == "file"])
def test_a_file_that_would_lose_something_is_refused_by_every_command(
    name, how, place, tmp_path, capsys
):
    script, _, given, _ = COMMANDS[name]
    first = next(iter(given.values()))
    good = place / (first if isinstance(first, str) else f"{first[0]}/results.json")
    out = {"a folder": tmp_path, "an input": good, "something else": tmp_path / "page.md"}[how]
    (tmp_path / "page.md").write_text("a week of work")
    before = contents(place) | contents(tmp_path)
    code, said = outcome(script, words_of(name, place, out), capsys)
    assert code == 1 and str(out) in said, said
    assert contents(place) | contents(tmp_path) == before
