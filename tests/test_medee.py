"""The driver: what counts as done, what runs again, and that recipes are commands which the scripts
accept."""

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import data
import distill
import medee
from command import flags, pipeline, schema
from command.stage import finish, open_folder

ROOT = Path(__file__).resolve().parent.parent


def world_stage(run: Path, text: int = 6) -> pipeline.Stage:
    counts = {
        "text": text,
        "image": 6,
        "dev-image": 2,
        "dev-text": 2,
        "test-image": 3,
        "test-text": 2,
    }
    return pipeline.Stage(
        "world",
        "-m clinic",
        ["world", *pipeline.words_of({**counts, "out": str(run / "world"), "seed": 0})],
    )


def distill_stage(run: Path) -> pipeline.Stage:
    flags = {
        "questions": f"{run}/world/bank.jsonl",
        "images": f"{run}/world",
        "teachers": ["clinic:thorough"],
        "answer-form": "text",
        "out": f"{run}/distill",
    }
    return pipeline.Stage("distill", "distill.py", ["run", *pipeline.words_of(flags)])


def test_a_finished_stage_is_done_and_not_run_again(tmp_path, capsys):
    stage = world_stage(tmp_path)
    assert stage.state() == "to do"
    stage.run()
    assert stage.state() == "done"
    before = (stage.folder / "bank.jsonl").stat().st_mtime_ns
    stage.run()
    assert (stage.folder / "bank.jsonl").stat().st_mtime_ns == before
    assert (
        "python -m clinic world" in capsys.readouterr().out
    )  # the command a user would type is printed


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_changed_setting_sets_the_stage_aside_and_what_depends_on_it_and_deletes_nothing(
    tmp_path, capsys
):
    world_stage(tmp_path).run()
    distill_stage(tmp_path).run()
    assert distill_stage(tmp_path).state() == "done"
    before = {name: files(tmp_path / name) for name in ("world", "distill")}
    changed = world_stage(tmp_path, text=7)
    assert changed.state() == "its settings changed"
    changed.run()
    assert distill_stage(tmp_path).state() == f"{tmp_path}/world/bank.jsonl changed"
    distill_stage(tmp_path).run()
    assert distill_stage(tmp_path).state() == "done"
    assert {name: files(tmp_path / f"{name}.1") for name in before} == before
    said = capsys.readouterr().out
    assert (
        f"{tmp_path / 'world'} is set aside as world.1 (" in said
        and "MB): its settings changed" in said
    )
    world_stage(tmp_path).run()  # and once more: what was set aside stays
    assert files(tmp_path / "world.1") == before["world"] and (tmp_path / "world.2").is_dir()


def test_an_output_that_was_edited_makes_the_stage_run_again(tmp_path):
    stage = world_stage(tmp_path)
    stage.run()
    with open(stage.folder / "test.jsonl", "a") as file:
        file.write("{}\n")
    assert stage.state() == "test.jsonl changed"


def replies_of(run: Path, role: str) -> list[Path]:
    return sorted((run / "replies").glob(f"{role}-*.jsonl"))


def test_a_stage_without_stage_json_is_interrupted_and_goes_on(tmp_path):
    world_stage(tmp_path).run()
    stage = distill_stage(tmp_path)
    stage.run()
    demos = (stage.folder / "demos.jsonl").read_bytes()
    (stage.folder / "stage.json").unlink()
    (completions,) = replies_of(tmp_path, "teacher")
    lines = completions.read_bytes().splitlines(keepends=True)
    completions.write_bytes(
        b"".join(lines[:3]) + lines[3][:10]
    )  # killed while writing the fourth row
    assert stage.state() == "interrupted"
    stage.run()
    assert stage.state() == "done" and (stage.folder / "demos.jsonl").read_bytes() == demos
    assert completions.read_bytes() == b"".join(lines)


def test_what_is_still_valid_is_never_asked_again(tmp_path):
    world_stage(tmp_path).run()
    stage = distill_stage(tmp_path)
    stage.run()
    (completions,) = replies_of(tmp_path, "teacher")
    before = completions.read_bytes()

    def again(*more: str) -> pipeline.Stage:
        return pipeline.Stage("distill", "distill.py", [*stage.words, *more])

    again("--words", "5", "300").run()  # nothing that an engine is asked with
    assert replies_of(tmp_path, "teacher") == [completions] and completions.read_bytes() == before
    bank = schema.read_questions(tmp_path / "world" / "bank.jsonl")
    bank[0].question += " Think well."
    data.write_jsonl(tmp_path / "world" / "bank.jsonl", (question.to_row() for question in bank))
    again("--words", "5", "300").run()  # the changed question is asked anew, the others are not
    asked = completions.read_bytes().removeprefix(before).splitlines()
    assert completions.read_bytes().startswith(before) and [
        json.loads(line)["id"] for line in asked
    ] == [bank[0].id]
    held = completions.read_bytes()
    again("--temperature", "0.9").run()  # another way to ask: a file of its own
    assert len(replies_of(tmp_path, "teacher")) == 2 and completions.read_bytes() == held


def test_a_sheet_that_a_human_filled_in_is_no_changed_output_and_outlives_every_change(tmp_path):
    world_stage(tmp_path).run()
    stage = distill_stage(tmp_path)
    stage.run()
    sheet = stage.folder / "review.csv"
    sheet.write_text("chain,verdict\nchain-of-a-human,yes\n")
    assert stage.state() == "done"
    pipeline.Stage("distill", "distill.py", [*stage.words, "--words", "5", "300"]).run()
    assert (
        tmp_path / "distill.1" / "review.csv"
    ).read_text() == "chain,verdict\nchain-of-a-human,yes\n"


def test_a_stage_is_done_until_a_file_or_model_that_its_command_read_has_another_content(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bank.jsonl").write_text("{}\n")
    (tmp_path / "model" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_text("old")
    words = ["--engine", "hf:model", "--questions", "bank.jsonl", "--seed", "0", "--out", "run/x"]
    one = pipeline.Stage("x", "rollout.py", words)
    data.write_json(one.folder / "medee.json", {"command": ["rollout.py", *words]})
    assert one.state() == "interrupted"  # killed before it read anything
    args = argparse.Namespace(out="run/x")
    open_folder(args, ["bank.jsonl", "model"])
    assert one.state() == "interrupted"
    finish(args, [], time.time(), {})
    for name in ("0", "rollout.py", "model/README.md", "model/.cache/huggingface/download.lock"):
        (tmp_path / name).write_text("nothing that it read")
    assert one.state() == "done"
    for name, what in (("bank.jsonl", "bank.jsonl"), ("model/model.safetensors", "model")):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text("new content")
        assert one.state() == f"{what} changed"
        (tmp_path / name).write_text(before)
    assert one.state() == "done"


def test_a_folder_that_this_run_did_not_begin_is_left_alone_and_the_way_out_is_said(tmp_path):
    world = world_stage(tmp_path)
    world.run()
    hand = tmp_path / "distill"
    hand.mkdir()
    (hand / "paid.jsonl").write_text("replies of a week")
    with pytest.raises(
        data.RowError,
        match="not begun by this run, and is left alone.*medee.py adopt distill --out",
    ):
        distill_stage(tmp_path).run()
    assert files(hand) == {"paid.jsonl": b"replies of a week"}
    with pytest.raises(data.RowError, match="stage.json: no such file; run the stage"):
        distill_stage(tmp_path).adopt()


def test_a_whole_stage_that_was_made_by_hand_is_adopted_with_its_real_command(tmp_path):
    world_stage(tmp_path).run()
    by_hand = [
        "distill.py",
        "run",
        "--questions",
        f"{tmp_path}/world/bank.jsonl",
        "--images",
        f"{tmp_path}/world",
        "--teachers",
        "clinic:hasty",
        "--answer-form",
        "text",
        "--out",
        f"{tmp_path}/distill",
    ]
    subprocess.run([sys.executable, *by_hand], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    stage = distill_stage(tmp_path)
    assert stage.state() == "not begun by this run"
    before = files(stage.folder)
    stage.adopt()
    assert stage.state() == "done"
    stage.run()
    record = json.loads((stage.folder / "medee.json").read_text())
    assert record["adopted"] == by_hand  # not what the run would have typed
    assert {
        name: content for name, content in files(stage.folder).items() if name != "medee.json"
    } == before
    (stage.folder / "medee.json").unlink()
    (stage.folder / "demos.jsonl").write_text("edited")
    with pytest.raises(data.RowError, match="demos.jsonl is not as its stage.json has it"):
        stage.adopt()


def test_a_folder_of_another_script_or_of_this_run_is_not_adopted(tmp_path):
    world, stage = world_stage(tmp_path), distill_stage(tmp_path)
    world.run()
    with pytest.raises(data.RowError, match="is of this run already"):
        world.adopt()
    shutil.copytree(world.folder, stage.folder)
    (stage.folder / "medee.json").unlink()
    with pytest.raises(data.RowError, match="was made by -m clinic world, not by distill.py run"):
        stage.adopt()
    shutil.rmtree(stage.folder)
    stage.run()
    (stage.folder / "medee.json").unlink()
    stage.adopt()
    with pytest.raises(data.RowError, match="is of this run already"):
        stage.adopt()


def test_a_stage_in_which_a_command_still_works_is_not_set_aside(tmp_path):
    stage = distill_stage(tmp_path)
    world_stage(tmp_path).run()
    stage.run()
    hold = (
        "from command import stage; import sys, pathlib; "
        "file = stage.hold(pathlib.Path(sys.argv[1]), 'x'); "
        "print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(stage.folder / ".lock")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    before = files(stage.folder)
    with pytest.raises(data.RowError, match="another process is writing there"):
        pipeline.Stage("distill", "distill.py", [*stage.words, "--seed", "5"]).run()
    other.kill()
    other.wait()
    assert files(stage.folder) == before and not (tmp_path / "distill.1").exists()


def test_a_sheet_that_lies_in_the_stage_it_changes_is_not_set_aside_with_it(tmp_path):
    world_stage(tmp_path).run()
    stage = distill_stage(tmp_path)
    stage.run()
    before = files(stage.folder)
    with pytest.raises(data.RowError, match="review.csv lies in .*; copy it to another place"):
        pipeline.Stage(
            "distill", "distill.py", [*stage.words, "--review", str(stage.folder / "review.csv")]
        ).run()
    assert files(stage.folder) == before


def test_an_image_that_became_another_under_its_name_is_a_change(tmp_path):
    world = world_stage(tmp_path)
    world.run()
    stage = pipeline.Stage(
        "rollout",
        "rollout.py",
        pipeline.words_of(
            {
                "engine": "clinic:thorough",
                "questions": f"{tmp_path}/world/bank.jsonl",
                "images": f"{tmp_path}/world",
                "n": 1,
                "out": f"{tmp_path}/rollout",
            }
        ),
    )
    stage.run()
    film, other = sorted((tmp_path / "world" / "films").rglob("*.png"))[:2]
    assert stage.state() == "done"
    film.write_bytes(other.read_bytes())
    assert stage.state() == f"{film} changed"
    ended = subprocess.run(
        [sys.executable, stage.script, *stage.words], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1 and f"{film} changed" in ended.stderr


def test_a_run_keeps_out_of_places_that_are_not_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.RowError, match="--out"):
        medee.main(["demo", "--fast", "--out", ""])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text('{"mine": 1}')
    with pytest.raises(data.RowError, match="run.json: missing 'started_in'"):
        medee.main(["demo", "--fast", "--out", "mine"])
    assert files(tmp_path) == {"mine/run.json": b'{"mine": 1}'}


def test_a_stage_of_a_begun_run_is_adopted_by_its_name(tmp_path, monkeypatch, capsys):
    world, mine = world_stage(tmp_path), distill_stage(tmp_path)
    world.run()
    mine.run()
    (mine.folder / "medee.json").unlink()
    stages = [[one.name, one.script, list(one.words), one.ranks] for one in (world, mine)]
    record = {"started_in": os.getcwd(), "stages": stages}
    (tmp_path / "run.json").write_text(json.dumps(record))
    monkeypatch.chdir(os.getcwd())  # adopt changes it
    with pytest.raises(
        flags.UserError, match="nonsense is not a stage of this run; its stages are world, distill"
    ):
        medee.main(["adopt", "nonsense", "--out", str(tmp_path)])
    medee.main(["adopt", "distill", "--out", str(tmp_path)])
    assert mine.state() == "done" and "is this run's now" in capsys.readouterr().out


def test_a_change_of_the_code_is_said_and_undoes_nothing(tmp_path, capsys):
    stage = world_stage(tmp_path)
    stage.run()
    finished = stage.folder / "stage.json"
    record = json.loads(finished.read_text())
    assert {"clinic/world.py", "data.py", "command/stage.py"} <= record[
        "sources"
    ].keys()  # what it ran on
    assert "evaluate.py" not in record["sources"] and "random.py" not in record["sources"]
    record["sources"]["data.py"] = "as it was then"
    finished.write_text(json.dumps(record))
    capsys.readouterr()
    stage.run()
    assert stage.state() == "done" and stage.edited() == ["data.py"]
    assert "data.py changed since this was made" in capsys.readouterr().out


def test_a_failing_stage_stops_the_run_and_names_itself(tmp_path):
    stage = pipeline.Stage(
        "distill",
        "distill.py",
        [
            "run",
            "--questions",
            f"{tmp_path}/none.jsonl",
            "--teachers",
            "clinic:thorough",
            "--out",
            f"{tmp_path}/distill",
        ],
    )
    with pytest.raises(flags.UserError, match="distill stopped with exit code"):
        stage.run()


GIVEN = {
    "base": "base", "root": "images", "bank": ["bank.jsonl"], "against": ["test.jsonl"],
    "test": ["test.jsonl"], "baselines": ["vllm:base"], "experts": ["gemini:a"],
    "classifier": "gemini:a", "editor": "gemini:a", "judge": "gemini:a", "eval_judge": "gemini:a",
    "teachers": ["gemini:a"], "seed": 0, "label": "7B",
}  # fmt: skip


def test_a_run_hands_reviewed_texts_to_curation(tmp_path, capsys):
    medee.main(full_run(tmp_path, "--reviewed", "review.csv", "--dry"))
    command = next(line for line in capsys.readouterr().out.splitlines() if "curate.py" in line)
    assert "--reviewed review.csv" in command and command.count("review.csv") == 1


def full_run(folder: Path, *more: str) -> list[str]:
    """A run at the paper's size over a bank of 30 text and 20 image questions, and 10 of a
    benchmark."""
    Image.new("RGB", (56, 56)).save(folder / "film.png")

    def rows(name: str, text: int, image: int) -> str:
        questions = [
            data.Question(
                f"{name} {i}?", {"A": "x", "B": "y"}, "A", ["film.png"] * (i >= text), name
            )
            for i in range(text + image)
        ]
        data.write_jsonl(folder / f"{name}.jsonl", (question.to_row() for question in questions))
        return str(folder / f"{name}.jsonl")

    engines = [
        word
        for flag in ("experts", "classifier", "editor", "teachers", "judge")
        for word in (f"--{flag}", "gemini:g")
    ]
    return [
        "run",
        "qwen2.5-vl-7b",
        "--questions",
        rows("bank", 30, 20),
        "--test",
        rows("test", 0, 10),
        "--baselines",
        "vllm:base",
        *engines,
        "--images",
        str(folder),
        "--out",
        str(folder / "run"),
        *more,
    ]


def bound(printed: str) -> dict[str, int]:
    """{role: requests} of the table."""
    table = printed[printed.index("at most:") :].splitlines()[1:]
    rows = [re.split(r"\s{2,}", line.strip()) for line in table if "  " in line.strip()]
    return {row[0]: int((row[1] if row[0] == "all" else row[2]).replace(",", "")) for row in rows}


def test_a_run_tells_first_what_it_may_cost_and_one_chain_a_benchmark_question_is_judged(
    tmp_path, capsys
):
    medee.main(full_run(tmp_path, "--dry"))
    requests = bound(capsys.readouterr().out)
    assert requests == {
        "curate: expert": 4 * 50,
        "curate: type": 3 * 20,
        "curate: describe": 3 * 20,
        "distill: teacher": 30,
        "verdicts: judge": 3 * 8 * 20,
        **{f"eval-{name}: judge": 3 * 10 for name in ("base", "stage1", "stage2")},
        **{f"look-{name}: judge": 3 * 4 * 10 for name in ("base", "stage1", "stage2")},
        "all": 200 + 60 + 60 + 30 + 480 + 90 + 360,
    }
    medee.main(full_run(tmp_path, "--dry", "--judge-samples", "0", "--limit", "4"))
    requests = bound(capsys.readouterr().out)
    assert requests["curate: expert"] == 4 * 8 and requests["eval-base: judge"] == 3 * 4 * 32


def test_a_run_sends_no_image_away_without_leave_and_asks_no_more_than_it_may(tmp_path):
    with pytest.raises(
        data.RowError, match="images would be sent to generativelanguage.googleapis.com"
    ):
        medee.main(full_run(tmp_path))
    assert not (tmp_path / "run").exists()
    ledger = {"engine": "gemini:g", "requests": 70, "tokens in": 5, "tokens out": 5}
    data.write_jsonl(tmp_path / "run" / "replies" / "paid.jsonl", [ledger, ledger])
    args = medee.parse(full_run(tmp_path, "--max-requests", "150", "--concurrency", "3"))
    one = world_stage(tmp_path)
    assert medee.limits(one, tmp_path / "run", args) == []  # it asks nobody
    asking = replace(one, name="curate")
    left = ["--concurrency", "3", "--max-requests", "10"]
    assert medee.limits(asking, tmp_path / "run", args) == left
    args.max_requests = 140
    with pytest.raises(flags.UserError, match="140 requests were made"):
        medee.limits(asking, tmp_path / "run", args)


def test_limits_are_told_to_the_command_and_are_no_change_of_it(tmp_path):
    world_stage(tmp_path).run()
    distill_stage(tmp_path).run(["--concurrency", "3"])
    record = json.loads((tmp_path / "distill" / "stage.json").read_text())
    assert record["command"][-2:] == ["--concurrency", "3"]
    assert distill_stage(tmp_path).state() == "done"


def every_stage() -> list:
    stages = []
    for family in ("qwen", "internvl"):
        for world in ("normal", "fast"):
            stages += medee.demo_stages(Path("runs/demo"), family, "tiny", world, 0)
    for name, recipe in medee.RECIPES.items():
        more = {"expand": [["gemini:a", "gemini:b"]], "checker": "gemini:c"}
        recipe = medee.override(recipe, {"curate": {"reviewed": "review.csv"}, "distill": more})
        stages += medee.method(recipe, GIVEN, Path("runs/x"), 8)
    return stages


def module_of(script: str) -> str:
    """The module that a command runs: distill.py -> distill, -m clinic -> clinic.__main__"""
    return script[3:] + ".__main__" if script.startswith("-m ") else script.removesuffix(".py")


def test_every_command_of_every_recipe_parses_with_its_own_script():
    for stage in every_stage():
        importlib.import_module(module_of(stage.script)).parse(stage.words)


def test_words_of_a_command_carry_switches_lists_and_numbers():
    assert pipeline.words_of({"lr": 1e-4, "n": 8, "checkpointing": True, "test": ["a", "b"]}) == [
        "--lr",
        "0.0001",
        "-n",
        "8",
        "--checkpointing",
        "--test",
        "a",
        "b",
    ]


def test_several_teachers_may_be_expanded_each_by_its_own_engine(tmp_path, capsys):
    expand = ["--expand", "gemini:a", "gemini:x", "--expand", "gemini:b", "gemini:y"]
    medee.main(full_run(tmp_path, "--dry", "--teachers", "gemini:a", "gemini:b", *expand))
    command = next(line for line in capsys.readouterr().out.splitlines() if "distill.py" in line)
    assert "--expand gemini:a gemini:x --expand gemini:b gemini:y" in command
    assert distill.parse(command.split()[2:]).expand == [
        ["gemini:a", "gemini:x"],
        ["gemini:b", "gemini:y"],
    ]


def test_recipes_carry_the_numbers_that_the_paper_gives():
    full = medee.RECIPES["qwen2.5-vl-7b"]
    assert (
        full["sft"]["lr"] == 1e-4
        and full["dpo"]["lr"] == 1e-6
        and full["dpo"]["method"] == "full"
        and full["rollout"]["n"] == 8
        and full["evaluate"]["n"] == 32
    )
    assert all(
        medee.RECIPES[name]["dpo"]["method"] == "lora"
        for name in ("qwen2.5-vl-32b", "qwen2.5-vl-72b")
    )


def test_rollout_training_and_evaluation_use_one_picture_of_an_image():
    for name in medee.RECIPES:
        stages = medee.method(medee.RECIPES[name], GIVEN, Path("r"))
        flag = "--tiles" if "internvl" in name else "--pixels"
        used = {
            stage.words[stage.words.index(flag) + 1]
            for stage in stages
            if stage.script in ("rollout.py", "dpo.py") or stage.name.startswith("eval-")
        }
        assert len(used) == 1


def test_status_tells_what_is_done(tmp_path, capsys, monkeypatch):
    stages = [world_stage(tmp_path), distill_stage(tmp_path)]
    data.write_json(
        tmp_path / "run.json",
        {
            "started_in": str(tmp_path),
            "stages": [[s.name, s.script, list(s.words), s.ranks] for s in stages],
        },
    )
    stages[0].run()
    monkeypatch.chdir(ROOT)  # restored after the test: status goes where the run was started
    capsys.readouterr()
    medee.main(["status", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["world", "done"] and lines[1].split()[:3] == [
        "distill",
        "to",
        "do",
    ]


def test_dry_run_prints_the_torchrun_commands(tmp_path, capsys):
    medee.main(full_run(tmp_path, "--dry"))
    out = capsys.readouterr().out
    assert (
        "torchrun --nproc_per_node 8 sft.py" in out
        and "torchrun --nproc_per_node 8 dpo.py" in out
        and "--lr 1e-06" in out
    )


def test_a_killed_driver_goes_on_from_where_it_was(tmp_path):
    """kill -9 of the driver and its stage. The same command again finishes with the same files as
    an undisturbed run."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import medee; "
        "from command import pipeline; "
        "run = Path(sys.argv[2]);"
        "counts = {'text': 6, 'image': 400, 'dev-image': 2, 'dev-text': 2, 'test-image': 3, "
        "'test-text': 2};"
        "world = pipeline.Stage('world', '-m clinic', ['world', *pipeline.words_of({**counts, "
        "'out': str(run / 'world'), 'seed': 0})]);"
        "flags = {'questions': str(run / 'world' / 'bank.jsonl'), 'images': str(run / 'world'), "
        "'teachers': ['clinic:thorough'], 'out': str(run / 'distill')};"
        "medee.run_stages([world, pipeline.Stage('distill', 'distill.py', "
        "['run', *pipeline.words_of(flags)])], run, 'it')"
    )
    disturbed, quiet = tmp_path / "a", tmp_path / "b"
    command = [sys.executable, "-c", program, str(ROOT)]
    process = subprocess.Popen(
        [*command, str(disturbed)], start_new_session=True, stdout=subprocess.DEVNULL
    )
    for _ in range(600):
        if (disturbed / "world" / "films").exists():
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (disturbed / "world" / "stage.json").exists()
    for run in (disturbed, quiet):
        subprocess.run([*command, str(run)], check=True, stdout=subprocess.DEVNULL)
    assert (disturbed / "distill" / "demos.jsonl").read_bytes() == (
        quiet / "distill" / "demos.jsonl"
    ).read_bytes()
    assert json.loads((disturbed / "world" / "stage.json").read_text())["outputs"]["bank.jsonl"]


def test_a_second_judge_judges_the_evaluation_and_not_the_preferences(tmp_path, capsys):
    words = full_run(tmp_path, "--dry")
    at = words.index("--judge") + 2
    medee.main([*words[:at], "gemini:other", *words[at:]])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python ")]
    judges = [(line.split()[1], re.findall(r"--judge (\S+)", line)) for line in lines]
    asked = [(script, found[0]) for script, found in judges if found]
    assert asked == [
        ("judge.py", "gemini:g"),
        *[("evaluate.py", "gemini:other")] * 3,
        *[("looking.py", "gemini:other")] * 3,
    ]
    with pytest.raises(SystemExit):
        medee.main([*words[:at], "gemini:other", "gemini:third", *words[at:]])


def test_a_seed_that_stops_is_named_with_its_log_and_the_others_finish_first(tmp_path):
    for seed in (4, 5):
        (tmp_path / f"seed-{seed}" / "world").mkdir(parents=True)
        (tmp_path / f"seed-{seed}" / "world" / "foreign").write_text("of another run")
    with pytest.raises(flags.UserError, match="seed 4 stopped; .*seed-4.log says why"):
        medee.main(["claims", "--out", str(tmp_path), "--seeds", "4", "5"])
    for seed in (4, 5):
        assert "was not begun by this run" in (tmp_path / f"seed-{seed}.log").read_text()
    assert not (tmp_path / "claims.md").exists()


def test_at_ctrl_c_a_stage_has_the_time_that_it_needs_to_end(tmp_path):
    """a remote engine waits for the answers under way, which are paid for"""
    (tmp_path / "slow.py").write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n    print('asking', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(2)\n"
        "    pathlib.Path(sys.argv[-1], 'kept').touch()\n"
    )
    program = (
        "import signal; from command import pipeline\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"pipeline.Stage('slow', '-m slow', ['--out', {str(tmp_path / 'out')!r}]).run()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while "asking" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the stage, too
    process.communicate(timeout=60)
    assert process.returncode and (tmp_path / "out" / "kept").exists()
