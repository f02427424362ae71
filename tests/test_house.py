"""The house itself: who imports whom, flags that are read, a README whose commands are real."""

import argparse
import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

import asking

ROOT = Path(__file__).resolve().parent.parent
# each file may import only files before it
TABLE = [
    "flags", "data", "answers", "stage", "images", "lora", "model", "train", "clinic", "decode", "bill", "asking", "remote", "engines", "benchmarks", "official", "leaks",
    "descriptions", "curate", "distill", "sft", "rollout", "judge", "drift", "trees", "dpo", "score",
    "tables", "figures", "cases", "evaluate", "plan", "medee",
]  # fmt: skip
STAGES = ["data", "model", "clinic", "benchmarks", "leaks", "curate", "distill", "sft", "rollout", "judge", "dpo", "evaluate", "medee"]


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text()


def imports(name: str) -> set[str]:
    """Every module a file imports, at the top or inside a function, but for annotations under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_every_file_of_the_project_stands_in_the_table():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_imports_go_only_up_the_table(name):
    project = imports(name) & set(TABLE)
    below = {other for other in project if TABLE.index(other) >= TABLE.index(name)}
    assert not below, f"{name}.py imports {below}"


@pytest.mark.parametrize("name", ["model", "lora"])
def test_the_model_knows_nothing_of_ranks(name):
    assert "torch.distributed" not in source(name)


@pytest.mark.parametrize("name", ["data", "flags"])
def test_data_and_flags_need_only_the_standard_library(name):
    import sys

    assert imports(name) <= {*sys.stdlib_module_names, "flags"}


@pytest.mark.parametrize("name", TABLE)
def test_no_pickle_no_remote_code_and_no_unexplained_kwargs(name):
    text = source(name)
    assert "pickle" not in imports(name) and "torch.load" not in text and "torch.save" not in text
    assert "trust_remote_code=True" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.args.kwarg and not node.name.startswith("_"):
            allowed = {("data", "write_stage"), ("data", "need"), ("model", "segment_attention"), ("model", "tree_attention")}  # named figures, named types, transformers' interface
            assert (name, node.name) in allowed, f"{name}.{node.name} passes **{node.args.kwarg.arg} on"


@pytest.mark.parametrize("name", TABLE)
def test_docstring_says_the_idea_and_where_we_depart_from_the_paper(name):
    docstring = ast.get_docstring(ast.parse(source(name)))
    assert docstring and len(docstring.splitlines()) >= 8
    if name != "clinic":  # the paper has no miniature
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
    text, shared = source(name), {field.name for field in dataclasses.fields(asking.Setup)} | {"replies"}
    read = set(re.findall(r"\bargs\.(\w+)", text)) | set(re.findall(r"\bargs\.(\w+)", source("curate") if name == "curate" else ""))
    if "setup_of(args)" in text:  # the flags of every engine, which engines.py and remote.py read
        read |= set(re.findall(r"\bsetup\.(\w+)", source("engines") + source("remote"))) | {"replies"}
    for parser in parsers(name):
        actions = [action for action in parser._actions if action.dest != "help"]
        own = {action.dest for action in actions} - shared  # beside those that engines share
        assert len(own) <= 20, f"{name}: {len(own)} flags of its own"
        for action in actions:
            assert action.dest in read, f"{name}: --{action.dest} is never read"


def readme_commands() -> list[list[str]]:
    """Every command in the README's code blocks, continuation lines joined, as words."""
    commands = []
    for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
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
            words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
        if words[0] not in ("python", ".venv/bin/python") or words[1] == "-m":
            continue
        script = importlib.import_module(Path(words[1]).stem)
        if hasattr(script, "parse"):
            script.parse(words[2:])
        seen += 1
    assert seen >= 8


def test_readme_names_only_files_that_exist():
    for name in re.findall(r"`(\w+\.(?:py|txt|md))`", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists() or (ROOT / "docs" / name).exists() or name in ("table.md",), name


@pytest.mark.parametrize("name", ["README.md", "Makefile", ".ci/run", "requirements.txt", *[f"{name}.py" for name in TABLE]])
def test_the_project_stands_alone(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"\.\./shared|/work/|/opt/pypi|/tmp/venv", text)


def test_makefile_installs_only_from_the_requirement_files():
    text = (ROOT / "Makefile").read_text()
    installs = re.findall(r"\t\$\(PIP\) (.*)", text)
    assert installs == ["-r requirements.txt", "-r requirements-dev.txt"]
    assert len(re.findall("pip install", text)) == 1  # PIP itself, held to the lock file


def test_the_lock_file_names_every_requirement_with_one_version():
    named = [re.match(r"[\w-]+", line)[0] for name in ("", "-dev") for line in (ROOT / f"requirements{name}.txt").read_text().split("\n") if line]
    locked = re.findall(r"(?m)^([\w.-]+)==[\w.]+$", (ROOT / "requirements.lock").read_text())
    assert {name.lower() for name in named} <= {name.lower() for name in locked}
