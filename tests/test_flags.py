"""Flags: the parser refuses every number that cannot work, by its flag, before anything is done."""

import argparse
import importlib

import pytest
from test_house import STAGES, parsers

from command import flags

QUESTIONS = ["--questions", "q.jsonl"]
ROLLOUTS = ["--rollouts", "r.jsonl", *QUESTIONS, "--out", "o"]
AGREE = "agree --verdicts v.jsonl --human h.csv --key k".split()
JUDGED = [*ROLLOUTS, "--verdicts", "v.jsonl"]
ROLES = ("baselines", "experts", "classifier", "editor", "teachers", "judge")
ENGINES = [f"--{role}=hf:m" for role in ROLES]
NEEDED = {  # the words that each command requires
    "rollout": ("rollout", ["--engine", "hf:m", *QUESTIONS, "--out", "o"]),
    "curate": ("curate", [*QUESTIONS, "--out", "o"]),
    "clinic world": ("clinic.__main__", ["world", "--out", "o"]),
    "clinic teach": ("clinic.__main__", ["teach", "--out", "o"]),
    "clinic show": ("clinic.__main__", ["show", "--out", "o"]),
    "distill run": ("distill", ["run", *QUESTIONS, "--teachers", "clinic:hasty", "--out", "o"]),
    "distill import": ("distill", ["import", "f.json", "--format", "huatuo", "--out", "o"]),
    "dpo": ("dpo", ["--model", "m", "--pairs", "p.jsonl", "--out", "o"]),
    "evaluate run": ("evaluate", ["--engine", "hf:m", *QUESTIONS, "--out", "o"]),
    "evaluate cases": ("report.__main__", ["cases", "r", *QUESTIONS]),
    "judge verdicts": ("judge", ["verdicts", *ROLLOUTS, "--judge", "clinic:judge"]),
    "judge pairs": ("judge", ["pairs", *JUDGED]),
    "judge sample": ("report.__main__", ["sample", *JUDGED]),
    "judge agree": ("report.__main__", [*AGREE, "--out", "o"]),
    "leaks": ("benchmarks.decontaminate", [*QUESTIONS, "--against", "t.jsonl", "--out", "o"]),
    "medee demo": ("medee", ["demo"]),
    "medee run": ("medee", ["run", "qwen2.5-vl-7b", *QUESTIONS, "--test=t", *ENGINES]),
    "medee claims": ("medee", ["claims"]),
    "medee plan": ("medee", ["plan", "qwen2.5-vl-7b"]),
    "model show": ("report.__main__", ["show", "d.jsonl", "--model", "m"]),
    "sft": ("sft", ["--model", "m", "--demos", "d.jsonl", "--out", "o"]),
}  # fmt: skip
REFUSED = [  # (command, flag, its words, what is said)
    ("rollout", "--pixels", "999999999999", "784 to 12845056"),
    ("rollout", "--pixels", "783", "784 to 12845056"),
    ("rollout", "--tiles", "0", "1 to 40"),
    ("rollout", "--tiles", "1000000", "1 to 40"),
    ("rollout", "--batch", "-1", "0 or more, not '-1'"),
    ("rollout", "--batch", "1" + "0" * 30, "0 to 9223372036854775807"),
    ("rollout", "--replicas", "-1", "0 to 256"),
    ("rollout", "--tensor-parallel", "0", "1 or more"),
    ("rollout", "--concurrency", "0", "1 to 1000"),
    ("rollout", "--max-requests", "-1", "0 or more"),
    ("rollout", "-n", "0", "1 to 10000"),
    ("rollout", "-n", "999999999999", "1 to 10000"),
    ("rollout", "--temperature", "nan", "of 0 or more and of at most 100, not 'nan'"),
    ("rollout", "--temperature", "-0.5", "of 0 or more"),
    ("rollout", "--temperature", "1e-40", "0, or a number of 0.01 or more"),
    ("rollout", "--top-p", "0", "above 0 and of at most 1, not '0'"),
    ("rollout", "--top-p", "2", "at most 1"),
    ("rollout", "--max-tokens", "0", "1 to 1048576"),
    ("rollout", "--max-tokens", "8192.5", "a whole number"),
    ("rollout", "--seed", "-1", "0 to 18446744073709551615"),
    ("rollout", "--seed", str(2**64), "0 to 18446744073709551615"),
    ("clinic world", "--text", "-1", "0 to 200000"),
    ("clinic world", "--test-text", "1000000", "0 to 200000"),
    ("clinic world", "--modalities", "0", "1 to 4"),
    ("clinic world", "--modalities", "5", "1 to 4"),
    ("clinic world", "--seed", "-1", "0 to"),
    ("clinic show", "--seed", "-1", "0 to"),
    ("clinic teach", "--films", "0", "1 or more"),
    ("clinic teach", "--eye-epochs", "0", "above 0"),
    ("clinic teach", "--eye-epochs", "inf", "finite"),
    ("clinic teach", "--steps", "0", "1 or more"),
    ("clinic teach", "--batch", "0", "1 or more"),
    ("clinic teach", "--lr", "nan", "finite"),
    ("clinic teach", "--save-every", "-1", "0 or more"),
    ("clinic teach", "--print-every", "0", "1 or more"),
    ("curate", "--pixels", "0", "784 to"),
    ("curate", "--max-tokens", "0", "1 to"),
    ("curate", "--seed", "-1", "0 to"),
    ("distill run", "--temperature", "inf", "finite"),
    ("distill run", "--max-tokens", "-5", "1 to"),
    ("distill run", "--words", "10 5", "MIN 10 is above MAX 5"),
    ("distill import", "--words", "10 5", "MIN 10 is above MAX 5"),
    ("distill import", "--words", "-1 5", "0 or more"),
    ("dpo", "--rank", "0", "1 to 8192"),
    ("dpo", "--alpha", "0", "above 0"),
    ("dpo", "--beta", "0", "above 0"),
    ("dpo", "--beta", "inf", "finite"),
    ("dpo", "--lr", "-1", "above 0"),
    ("dpo", "--lr", "nan", "finite"),
    ("dpo", "--epochs", "inf", "finite"),
    ("dpo", "--batch", "0", "1 or more"),
    ("dpo", "--micro-tokens", "-1", "0 or more"),
    ("dpo", "--max-length", "0", "1 or more"),
    ("dpo", "--pixels", "1", "784 to"),
    ("dpo", "--tiles", "0", "1 to 40"),
    ("dpo", "--replicas", "0", "1 or more"),
    ("dpo", "--save-every", "-1", "0 or more"),
    ("dpo", "--seed", "-1", "0 to"),
    ("evaluate run", "-n", "0", "1 to 10000"),
    ("evaluate run", "-n", "16 0", "1 to 10000"),
    ("evaluate run", "--temperature", "-1", "of 0 or more"),
    ("evaluate run", "--top-p", "nan", "finite"),
    ("evaluate run", "--max-tokens", "1e3", "a whole number"),
    ("evaluate run", "--seed", "1.5", "a whole number"),
    ("evaluate cases", "-n", "0", "1 or more"),
    ("judge verdicts", "--seed", "-1", "0 to"),
    ("judge verdicts", "--tiles", "-1", "1 to 40"),
    ("judge pairs", "--cap", "-1", "0 or more"),
    ("judge sample", "-n", "0", "1 or more"),
    ("judge agree", "--seed", "-1", "0 to"),
    ("leaks", "--ngram", "-1", "0 or more"),
    ("leaks", "--jaccard", "2", "at most 1"),
    ("leaks", "--distance", "513", "0 to 512"),
    ("medee demo", "--seed", "-1", "0 to"),
    ("medee run", "--gpus", "-1", "0 or more"),
    ("medee run", "--seed", "one", "a whole number"),
    ("medee claims", "--seeds", "21 -22", "0 to"),
    ("medee plan", "--gpus", "0", "1 or more"),
    ("medee plan", "--images", "-1", "0 or more"),
    ("medee plan", "--memory", "nan", "finite"),
    ("medee plan", "--memory", "0", "above 0"),
    ("model show", "-n", "0", "1 or more"),
    ("sft", "--rank", "0", "1 to 8192"),
    ("sft", "--alpha", "-16", "above 0"),
    ("sft", "--lr", "0", "above 0"),
    ("sft", "--epochs", "0", "above 0"),
    ("sft", "--epochs", "1e300", "at most 1e+06"),
    ("sft", "--micro-tokens", "-1", "0 or more"),
    ("sft", "--max-length", "0", "1 or more"),
    ("sft", "--pack", "-1", "0 or more"),
    ("sft", "--weights", "-1 0 0", "of 0 or more"),
    ("sft", "--weights", "0 0 0", "at least one of them must be above 0"),
    ("sft", "--pixels", "28", "784 to"),
    ("sft", "--replicas", "-2", "1 or more"),
]


def read(command: str, words: list[str]) -> argparse.Namespace:
    name, needed = NEEDED[command]
    script = importlib.import_module(name)
    return (getattr(script, "parse", None) or script.main)([*needed, *words])


@pytest.mark.parametrize(("command", "flag", "words", "said"), REFUSED)
def test_a_value_that_cannot_work_is_refused_by_name(command, flag, words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        read(command, [flag, *words.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {flag}: " in error and said in error


@pytest.mark.parametrize("command", [command for command in NEEDED if command != "model show"])
def test_the_words_of_the_table_alone_are_accepted(command):
    read(command, [])


def test_values_at_the_ends_of_a_range_are_accepted():
    ends = ["--pixels", "784", "--temperature", "0", "--top-p", "1", "--seed", str(2**64 - 1)]
    args = read("rollout", ends)
    assert (args.pixels, args.temperature, args.top_p, args.seed) == (784, 0.0, 1.0, 2**64 - 1)
    assert read("sft", ["--weights", "0", "0", "0.5", "--pack", "0"]).weights == [0.0, 0.0, 0.5]
    assert read("distill import", ["--words", "5", "5"]).words == [5, 5]
    assert read("clinic world", ["--text", "0", "--modalities", "4"]).text == 0


def actions() -> list[tuple[str, argparse.Action]]:
    """(script and flag, action) of every flag of the project."""
    made = [(name, parser._actions) for name in STAGES for parser in parsers(name)]
    return [(f"{name} {action.dest}", action) for name, found in made for action in found]


def test_no_flag_has_a_type_without_a_range():
    for where, action in actions():
        assert action.type not in (int, float), where
        if type(action.default) in (int, float):
            assert action.type, where


def test_every_numeric_flag_refuses_what_is_out_of_any_range_and_takes_its_default():
    found = [(where, action) for where, action in actions() if action.type]
    assert len(found) > 100
    for where, action in found:
        for word in ("nan", "x", "", "inf", "1e999", "-1", "9" * 400):
            with pytest.raises(argparse.ArgumentTypeError, match="^must be ") as refusal:
                action.type(word)
            assert repr(word) in str(refusal.value), where
        for value in action.default if isinstance(action.default, list) else [action.default]:
            assert action.type(str(value)) == value, where


def test_whole_and_number_say_their_range():
    for of, word, said in (
        (flags.whole(1), "0", "must be a whole number of 1 or more, not '0'"),
        (flags.whole(0, 64), "65", "must be a whole number of 0 to 64, not '65'"),
        (flags.number(0, 1), "2", "must be a finite number of 0 or more and of at most 1, not '2'"),
        (flags.number(above=0), "0", "must be a finite number above 0, not '0'"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as refusal:
            of(word)
        assert str(refusal.value) == said
    assert flags.whole(0, 64)("64") == 64 and flags.number(above=0, high=1)("1") == 1.0


def test_the_miniature_may_be_without_questions_of_a_kind(tmp_path):
    import clinic.__main__

    counts = [f"--{part}{kind}=0" for part in ("", "dev-", "test-") for kind in ("text", "image")]
    clinic.__main__.main(["world", "--out", str(tmp_path), *counts])
    assert (tmp_path / "bank.jsonl").read_text() == ""
