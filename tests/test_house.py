"""The house itself: who imports whom, flags that are read, a README whose commands are real."""

import argparse
import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from engines import inference

ROOT = Path(__file__).resolve().parent.parent
# each file may import only files before it
TABLE = [
    "command.flags", "data", "answers", "command.schema", "command.stage", "command.images", "lora",
    "attention", "model", "memory", "hub", "train", "gate", "command.pipeline", "clinic.zero3",
    "clinic.world", "clinic.roles", "clinic.school", "clinic.__main__",
    "command.sheets",
    "engines.bill", "engines.inference", "engines.decode", "engines.remote", "engines.apis",
    "engines", "engines.drift",
    "benchmarks", "benchmarks.__main__", "benchmarks.modalities", "benchmarks.official",
    "benchmarks.decontaminate", "benchmarks.descriptions", "curate", "distill", "sft", "rollout",
    "judge", "clinic.ablations", "trees", "reference", "dpo",
    "report.score", "report.agreement", "report.tables", "report.figures", "report.cases",
    "report.compare", "report.show", "report.looking", "report.miniature",
    "report.claims", "evaluate", "looking",
    "report.judging",
    "report.__main__", "medee",
]  # fmt: skip
STAGES = [
    "clinic.__main__", "benchmarks", "benchmarks.decontaminate", "curate", "distill",
    "sft", "rollout", "judge", "dpo", "evaluate", "looking", "report.__main__", "medee",
]  # fmt: skip
FOLDERS = ("command", "engines", "benchmarks", "clinic", "report")


def path_of(name: str) -> Path:
    path = ROOT / name.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def source(name: str) -> str:
    return path_of(name).read_text()


def imports(name: str) -> set[str]:
    """Every module a file imports, at the top or inside a function, but for annotations under
    TYPE_CHECKING. Of a folder of ours the file in it; of other packages the package."""
    found = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(TABLE)
            found |= inside or {node.module}
    return {module if module in TABLE else module.split(".")[0] for module in found}


def test_every_file_of_the_project_stands_in_the_table():
    paths = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).glob("*.py"))]
    empty = {path for path in paths if not path.read_text().strip()}
    named = {path_of(name) for name in TABLE} | {ROOT / "clinic" / "__init__.py"}  # a docstring
    assert {*paths} - empty == named


@pytest.mark.parametrize("name", TABLE)
def test_imports_go_only_up_the_table(name):
    project = imports(name) & set(TABLE)
    below = {other for other in project if TABLE.index(other) >= TABLE.index(name)}
    assert not below, f"{name}.py imports {below}"


@pytest.mark.parametrize("name", ["model", "lora"])
def test_the_model_knows_nothing_of_ranks(name):
    assert "torch.distributed" not in source(name)


@pytest.mark.parametrize("name", ["data", "command.flags"])
def test_data_and_flags_need_only_the_standard_library(name):
    import sys

    assert imports(name) <= {*sys.stdlib_module_names, "command.flags"}


@pytest.mark.parametrize("name", TABLE)
def test_no_pickle_no_remote_code_and_no_unexplained_kwargs(name):
    text = source(name)
    assert "pickle" not in imports(name) and "torch.load" not in text and "torch.save" not in text
    assert "trust_remote_code=True" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.args.kwarg and not node.name.startswith("_"):
            allowed = {
                ("data", "write_stage"),
                ("data", "need"),
                ("attention", "segment_attention"),
                ("attention", "tree_attention"),
            }  # named figures, named types, transformers' interface
            assert (name, node.name) in allowed, (
                f"{name}.{node.name} passes **{node.args.kwarg.arg} on"
            )


@pytest.mark.parametrize("name", TABLE)
def test_docstring_says_the_idea_and_where_we_depart_from_the_paper(name):
    docstring = ast.get_docstring(ast.parse(source(name)))
    if name.endswith("__main__"):
        assert docstring
        return
    assert docstring and len(docstring.splitlines()) >= 4
    if "clinic" not in name:  # the paper has no miniature
        assert "epart from the paper" in docstring


def parsers(name: str) -> list[argparse.ArgumentParser]:
    """The argument parsers that a script builds, sub-commands included."""
    made, original = [], argparse.ArgumentParser.parse_args

    def catch(self, *args, **kwargs):
        made.append(self)
        raise SystemExit

    argparse.ArgumentParser.parse_args = catch
    try:
        script = importlib.import_module(name)
        with pytest.raises(SystemExit):
            (getattr(script, "parse", None) or script.main)([])
    finally:
        argparse.ArgumentParser.parse_args = original
    subs = [action for action in made[0]._actions if isinstance(action, argparse._SubParsersAction)]
    return list(subs[0].choices.values()) if subs else made


@pytest.mark.parametrize("name", STAGES)
def test_every_flag_is_read_and_a_command_has_at_most_twenty_of_its_own(name):
    shared = {field.name for field in dataclasses.fields(inference.Setup)} | {"replies"}
    reached = [name, *(imports(name) & set(TABLE))]  # train.py reads what both stages share
    if {"engines", "engines.inference"} & {*reached}:
        reached += ["engines", "engines.remote", "engines.apis"]
    read = {word for one in reached for word in re.findall(r"\b(?:args|setup)\.(\w+)", source(one))}
    for parser in parsers(name):
        actions = [action for action in parser._actions if action.dest != "help"]
        own = {action.dest for action in actions if action.option_strings}
        own -= shared  # beside those that engines share
        assert len(own) <= 20, f"{name}: {len(own)} flags of its own"
        for action in actions:
            assert action.dest in read, f"{name}: --{action.dest} is never read"


def readme_commands() -> list[list[str]]:
    """Every command in the code blocks of the README and of docs/, continuation lines joined."""
    commands, pages = [], [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                commands.append(words)
    return commands


def test_readme_has_the_two_commands_first():
    first = [words for words in readme_commands() if words[0] == "make"][:2]
    assert first == [["make", "demo"], ["make", "test"]]


def test_every_python_command_of_the_readme_parses():
    seen = 0
    for words in readme_commands():
        while words and "=" in words[0] and not words[0].startswith("-"):
            words = words[1:]  # environment variables
        if words[0] == "torchrun":
            words = [
                "python",
                *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :],
            ]
        if words[0] not in ("python", ".venv/bin/python") or words[2:3] == ["pytest"]:
            continue
        module, words = (words[2], words[1:]) if words[1] == "-m" else (Path(words[1]).stem, words)
        module += ".__main__" * (ROOT / module / "__main__.py").exists()
        script = importlib.import_module(module)
        if hasattr(script, "parse"):
            script.parse(words[2:])
        seen += 1
    assert seen >= 8


def test_readme_names_only_files_that_exist():
    for name in re.findall(r"`([\w/]+\.(?:py|txt|md))`", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists() or (ROOT / "docs" / name).exists() or name in ("table.md",), (
            name
        )


def lines_of(path: str, names: list[str]) -> int:
    """The lines of a file, or of some of its functions and classes."""
    text = (ROOT / path).read_text()
    tree = {node.name: node for node in ast.parse(text).body if hasattr(node, "name")}
    return sum(tree[n].end_lineno - tree[n].lineno + 1 for n in names) or len(text.splitlines())


def test_the_reading_path_of_the_readme_has_the_length_that_it_says():
    text = (ROOT / "README.md").read_text()
    steps = re.findall(r"(?m)^\d+\. `([\w/]+\.py)`(.*)$", text)
    total = sum(lines_of(path, re.findall(r"`(\w+)`", names)) for path, names in steps)
    assert total <= 2000
    assert re.search(r"(?m)^([\d,]+) lines, in this order", text)[1] == f"{total:,}"


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "Makefile",
        ".ci/run",
        "requirements.txt",
        *[str(path_of(name).relative_to(ROOT)) for name in TABLE],
    ],
)
def test_the_project_stands_alone(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"\.\./shared|/work/|/opt/pypi|/tmp/venv", text)


def test_makefile_installs_only_from_the_requirement_files():
    text = (ROOT / "Makefile").read_text()
    installs = re.findall(r"\t\$\(PIP\) (.*)", text)
    assert installs == ["-r requirements.txt", "-r requirements-dev.txt"]
    assert len(re.findall("pip install", text)) == 1  # PIP itself, held to the lock file


def test_the_lock_file_names_every_requirement_with_one_version():
    named = [
        re.match(r"[\w-]+", line)[0]
        for name in ("", "-dev")
        for line in (ROOT / f"requirements{name}.txt").read_text().split("\n")
        if line
    ]
    locked = re.findall(r"(?m)^([\w.-]+)==[\w.]+$", (ROOT / "requirements.lock").read_text())
    assert {name.lower() for name in named} <= {name.lower() for name in locked}
