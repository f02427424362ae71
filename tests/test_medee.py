"""The driver: what counts as done, what runs again, and that recipes are commands which the scripts accept."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
import distill
import medee

ROOT = Path(__file__).resolve().parent.parent


def world_stage(run: Path, text: int = 6) -> medee.Stage:
    counts = {"text": text, "image": 6, "dev-image": 2, "dev-text": 2, "test-image": 3, "test-text": 2}
    return medee.Stage("world", "clinic.py", ("world", *medee.words({**counts, "out": str(run / "world"), "seed": 0})))


def distill_stage(run: Path) -> medee.Stage:
    flags = {"questions": f"{run}/world/bank.jsonl", "images": f"{run}/world", "teachers": ["clinic:thorough"], "answer-form": "text", "out": f"{run}/distill"}
    return medee.Stage("distill", "distill.py", ("run", *medee.words(flags)))


def test_a_finished_stage_is_done_and_not_run_again(tmp_path, capsys):
    stage = world_stage(tmp_path)
    assert stage.state() == "to do"
    stage.run()
    assert stage.state() == "done"
    before = (stage.folder / "bank.jsonl").stat().st_mtime_ns
    stage.run()
    assert (stage.folder / "bank.jsonl").stat().st_mtime_ns == before
    assert "python clinic.py world" in capsys.readouterr().out  # the command a user would type is printed


def test_a_changed_setting_reruns_the_stage_and_what_depends_on_it(tmp_path, capsys):
    world_stage(tmp_path).run()
    distill_stage(tmp_path).run()
    assert distill_stage(tmp_path).state() == "done"
    changed = world_stage(tmp_path, text=7)
    assert changed.state() == "its settings changed"
    changed.run()
    assert distill_stage(tmp_path).state() == f"{tmp_path}/world/bank.jsonl changed"
    distill_stage(tmp_path).run()
    assert distill_stage(tmp_path).state() == "done"
    assert "its settings changed; it starts again" in capsys.readouterr().out


def test_an_output_that_was_edited_makes_the_stage_run_again(tmp_path):
    stage = world_stage(tmp_path)
    stage.run()
    with open(stage.folder / "test.jsonl", "a") as file:
        file.write("{}\n")
    assert stage.state() == "its output test.jsonl changed"


def test_a_stage_without_stage_json_is_interrupted_and_goes_on(tmp_path):
    world_stage(tmp_path).run()
    stage = distill_stage(tmp_path)
    stage.run()
    demos = (stage.folder / "demos.jsonl").read_bytes()
    (stage.folder / "stage.json").unlink()
    replies = next(stage.folder.glob("replies-*.jsonl"))
    lines = replies.read_bytes().splitlines(keepends=True)
    replies.write_bytes(b"".join(lines[:3]) + lines[3][:10])  # killed while writing the fourth row
    assert stage.state() == "interrupted"
    stage.run()
    assert stage.state() == "done" and (stage.folder / "demos.jsonl").read_bytes() == demos


def answers(path: Path) -> int:
    return len(path.read_bytes().splitlines())


def test_a_stage_that_starts_again_keeps_replies_that_it_would_ask_for_in_the_same_way(tmp_path, capsys):
    world_stage(tmp_path).run()
    stage = distill_stage(tmp_path)
    stage.run()
    replies = stage.folder / "replies-clinic-thorough.jsonl"
    before = replies.read_bytes()
    (stage.folder / "other.txt").write_text("not a reply")
    sheet = stage.folder / "review.csv"
    sheet.write_text("chain,verdict\nchain-of-another-run,yes\n")

    def again(*more: str) -> medee.Stage:
        return medee.Stage("distill", "distill.py", (*stage.words, *more))

    longer = again("--words", "5", "300")  # nothing that an engine is asked with
    with pytest.raises(SystemExit):  # a human's verdicts are not written over
        longer.run()
    assert "chain-of-another-run" in sheet.read_text()
    sheet.unlink()
    longer.run()
    assert longer.state() == "done" and replies.read_bytes() == before and not (stage.folder / "other.txt").exists()
    bank = data.read_questions(tmp_path / "world" / "bank.jsonl")
    bank[0].question += " Think well."
    data.write_jsonl(tmp_path / "world" / "bank.jsonl", (question.to_row() for question in bank))
    assert longer.state().endswith("bank.jsonl changed")
    longer.run()  # the changed question is asked anew, the others are not
    assert replies.read_bytes().startswith(before) and [json.loads(line)["id"] for line in replies.read_bytes().removeprefix(before).splitlines()] == [bank[0].id]
    capsys.readouterr()
    warmer, held = again("--words", "5", "300", "--temperature", "0.9"), replies.read_bytes()
    warmer.run()
    assert warmer.state() == "done" and "replies-clinic-thorough.jsonl may have been asked for in another way" in capsys.readouterr().out
    assert Path(f"{replies}.1").read_bytes() == held and answers(replies) == len(bank)
    assert json.loads(Path(f"{replies}.1.settings").read_text())["temperature"] == 1.0
    stage.run()  # and once more: what was set aside stays
    assert answers(Path(f"{replies}.2")) == len(bank) and Path(f"{replies}.1").read_bytes() == held


STALE = {  # (script, what changed): whether its file of replies may not count any more
    ("curate.py", "flag"): True, ("curate.py", "model"): True, ("curate.py", "questions"): False, ("curate.py", "judge"): False,
    ("evaluate.py", "flag"): True, ("evaluate.py", "model"): True, ("evaluate.py", "questions"): True, ("evaluate.py", "judge"): False,
    ("rollout.py", "judge"): True,
}  # fmt: skip


@pytest.mark.parametrize(("script", "what"), STALE)
def test_replies_of_a_changed_model_or_to_changed_questions_are_set_aside(tmp_path, script, what):
    model, bank = tmp_path / "model", tmp_path / "bank.jsonl"
    model.mkdir()
    (model / "weights").write_text("old")
    bank.write_text("{}\n")

    def stage(seed: int, judge: str) -> medee.Stage:
        return medee.Stage("x", script, ("run", "--engine", f"hf:{model}", "--questions", str(bank), "--seed", str(seed), "--judge", judge, "--out", str(tmp_path / "out")))

    before = stage(0, "clinic:judge")
    data.write_json(before.folder / "begun.json", {"command": [script, *before.words], "inputs": before.inputs(), "sources": {}})
    replies = before.folder / "replies.jsonl"
    replies.write_text("{}\n")
    data.settle(replies, {"engine": f"hf:{model}", "seed": 0})
    if what == "model":
        (model / "weights").write_text("new")
    if what == "questions":
        bank.write_text("{}\n{}\n")
    stage(int(what == "flag"), "gemini:g" if what == "judge" else "clinic:judge").clear()
    assert replies.exists() != STALE[script, what] and Path(f"{replies}.1").exists() == STALE[script, what]


def test_replies_without_a_record_of_how_they_were_begun_are_set_aside_and_not_lost(tmp_path):
    replies = tmp_path / "distill" / "replies-clinic-thorough.jsonl"
    replies.parent.mkdir()
    replies.write_text("{}\n")
    data.settle(replies, {"seed": 0})
    distill_stage(tmp_path).clear()
    assert sorted(path.name for path in replies.parent.iterdir()) == [f"{replies.name}.1", f"{replies.name}.1.settings"]


def test_a_change_of_the_code_is_said_and_undoes_nothing(tmp_path, capsys):
    stage = world_stage(tmp_path)
    assert {"clinic.py", "data.py", "model.py", "train.py"} <= stage.sources().keys()  # what it imports, and what that imports
    assert "evaluate.py" not in stage.sources() and "random.py" not in stage.sources()
    stage.run()
    begun = json.loads((stage.folder / "begun.json").read_text())
    begun["sources"]["data.py"] = "as it was then"
    (stage.folder / "begun.json").write_text(json.dumps(begun))
    capsys.readouterr()
    stage.run()
    assert stage.state() == "done" and stage.edited() == ["data.py"]
    assert "data.py changed since this was begun" in capsys.readouterr().out


def test_a_failing_stage_stops_the_run_and_names_itself(tmp_path):
    stage = medee.Stage("distill", "distill.py", ("run", "--questions", f"{tmp_path}/none.jsonl", "--teachers", "clinic:thorough", "--out", f"{tmp_path}/distill"))
    with pytest.raises(SystemExit, match="distill stopped with exit code"):
        stage.run()


ENGINES = {
    "curate": {"baselines": ["vllm:base"], "experts": ["gemini:a"], "classifier": "gemini:a", "editor": "gemini:a"},
    "distill": {"teachers": ["gemini:a"], "expand": [["gemini:a", "gemini:b"]], "checker": "gemini:c"}, "judge": "gemini:a",
}  # fmt: skip


def every_stage() -> list:
    stages = []
    for family in ("qwen", "internvl"):
        for world in ("normal", "fast"):
            stages += medee.demo_stages(Path("runs/demo"), family, "tiny", world, 0)
    for name, recipe in medee.RECIPES.items():
        stages += medee.method(recipe, recipe.base, Path("runs/x"), ["bank.jsonl"], "images", ["test.jsonl"], ["test.jsonl"], ENGINES, 8, 0)
    return stages


def test_every_command_of_every_recipe_parses_with_its_own_script():
    for stage in every_stage():
        importlib.import_module(stage.script.removesuffix(".py")).parse(list(stage.words))


def test_words_of_a_command_carry_switches_lists_and_numbers():
    assert medee.words({"lr": 1e-4, "n": 8, "checkpointing": True, "test": ["a", "b"]}) == ["--lr", "0.0001", "-n", "8", "--checkpointing", "--test", "a", "b"]


def test_several_teachers_may_be_expanded_each_by_its_own_engine(capsys):
    engines = [word for flag in ("baselines", "experts", "classifier", "editor", "judge") for word in (f"--{flag}", "gemini:g")]
    expand = ["--teachers", "gemini:a", "gemini:b", "--expand", "gemini:a", "gemini:x", "--expand", "gemini:b", "gemini:y"]
    medee.main(["run", "qwen2.5-vl-7b", "--questions", "bank.jsonl", "--test", "test.jsonl", *engines, *expand, "--dry"])
    command = next(line for line in capsys.readouterr().out.splitlines() if "distill.py" in line)
    assert "--expand gemini:a gemini:x --expand gemini:b gemini:y" in command
    assert distill.parse(command.split()[2:]).expand == [["gemini:a", "gemini:x"], ["gemini:b", "gemini:y"]]


def test_recipes_carry_the_numbers_that_the_paper_gives():
    full = medee.RECIPES["qwen2.5-vl-7b"]
    assert full.sft["lr"] == 1e-4 and full.dpo["lr"] == 1e-6 and full.dpo["method"] == "full" and full.rollout["n"] == 8 and full.evaluate["n"] == 32
    assert all(medee.RECIPES[name].dpo["method"] == "lora" for name in ("qwen2.5-vl-32b", "qwen2.5-vl-72b"))


def test_rollout_training_and_evaluation_use_one_picture_of_an_image():
    for name in medee.RECIPES:
        stages = medee.method(medee.RECIPES[name], "base", Path("r"), ["b"], "i", ["t"], ["t"], ENGINES, 0, 0)
        flag = "--tiles" if "internvl" in name else "--pixels"
        used = {stage.words[stage.words.index(flag) + 1] for stage in stages if stage.script in ("rollout.py", "dpo.py") or stage.name.startswith("eval-")}
        assert len(used) == 1


def test_status_tells_what_is_done(tmp_path, capsys, monkeypatch):
    stages = [world_stage(tmp_path), distill_stage(tmp_path)]
    data.write_json(tmp_path / "run.json", {"started_in": str(tmp_path), "stages": [[s.name, s.script, list(s.words), s.ranks] for s in stages]})
    stages[0].run()
    monkeypatch.chdir(ROOT)  # restored after the test: status goes where the run was started
    capsys.readouterr()
    medee.main(["status", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["world", "done"] and lines[1].split()[:3] == ["distill", "to", "do"]


def test_dry_run_prints_the_torchrun_commands(capsys):
    argv = ["run", "qwen2.5-vl-7b", "--questions", "bank.jsonl", "--test", "test.jsonl", "--baselines", "vllm:base", "--experts", "gemini:g", "--classifier", "gemini:g", "--editor", "gemini:g", "--teachers", "gemini:g", "--judge", "gemini:g", "--dry"]
    medee.main(argv)
    out = capsys.readouterr().out
    assert "torchrun --nproc_per_node 8 sft.py" in out and "torchrun --nproc_per_node 8 dpo.py" in out and "--lr 1e-06" in out


def test_a_killed_driver_goes_on_from_where_it_was(tmp_path):
    """kill -9 of the driver and its stage; the same command again finishes with the same files as an undisturbed run."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import medee; run = Path(sys.argv[2]);"
        "counts = {'text': 6, 'image': 400, 'dev-image': 2, 'dev-text': 2, 'test-image': 3, 'test-text': 2};"
        "world = medee.Stage('world', 'clinic.py', ('world', *medee.words({**counts, 'out': str(run / 'world'), 'seed': 0})));"
        "flags = {'questions': str(run / 'world' / 'bank.jsonl'), 'images': str(run / 'world'), 'teachers': ['clinic:thorough'], 'out': str(run / 'distill')};"
        "medee.run_stages([world, medee.Stage('distill', 'distill.py', ('run', *medee.words(flags)))], run, 'it')"
    )
    disturbed, quiet = tmp_path / "a", tmp_path / "b"
    command = [sys.executable, "-c", program, str(ROOT)]
    process = subprocess.Popen([*command, str(disturbed)], start_new_session=True, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if (disturbed / "world" / "films").exists():
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (disturbed / "world" / "stage.json").exists()
    for run in (disturbed, quiet):
        subprocess.run([*command, str(run)], check=True, stdout=subprocess.DEVNULL)
    assert (disturbed / "distill" / "demos.jsonl").read_bytes() == (quiet / "distill" / "demos.jsonl").read_bytes()
    assert json.loads((disturbed / "world" / "stage.json").read_text())["outputs"]["bank.jsonl"]
