"""Commands that are run again: a finished one does nothing, a changed one is refused, and a model
that was trained anew into its old folder is another model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import curate
import data
import distill
import engines
import evaluate
import judge
import looking
import report.__main__
import rollout
from command import schema
from engines import inference


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """{name: (content, time of the last change)} of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def completions(run: Path) -> dict[str, bytes]:
    """{name: content} of every file of replies that a run keeps."""
    return {path.name: path.read_bytes() for path in (run / "replies").glob("*.jsonl")}


# --------------------------------------------------------------------------------------------------
# A model that is trained anew into its old folder


def sampling(spec: str, bank: Path, out: Path) -> None:
    files = ["--questions", str(bank / "test.jsonl"), "--images", str(bank), "--out", str(out)]
    rollout.main(["--engine", spec, *files, "-n", "2", "--max-tokens", "8"])


def evaluating(spec: str, bank: Path, out: Path, *more: str) -> None:
    files = ["--questions", str(bank / "test.jsonl"), "--images", str(bank), "--out", str(out)]
    more = ["-n", "2", "--max-tokens", "8", "--name", "m", *more]
    evaluate.main(["--engine", spec, *files, *more])


def judging(spec: str, bank: Path, out: Path) -> None:
    files = ["--rollouts", str(bank / "rollouts.jsonl"), "--questions", str(bank / "test.jsonl")]
    more = ["--images", str(bank), "--out", str(out)]
    judge.main(["verdicts", "--judge", spec, *files, *more])


COMMANDS = {  # command -> its module, and its main result
    sampling: (rollout, "rollouts.jsonl"),
    evaluating: (evaluate, "predictions.jsonl"),
    judging: (judge, "verdicts.jsonl"),
}
every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)


@pytest.fixture(scope="module")
def bank(world, tmp_path_factory) -> Path:
    """Two questions with their films, and right answers to them."""
    folder = tmp_path_factory.mktemp("bank")
    questions = [q for q in schema.read_questions(world / "test.jsonl") if q.images][:2]
    data.write_jsonl(folder / "test.jsonl", [question.to_row() for question in questions])
    shutil.copytree(world / "films", folder / "films")
    rows = []
    for question in questions:
        text = data.join_response("The film shows it.", question.answer)
        completion = inference.Completion(question.id, 0, text, None, "stop", 0)
        rows.append(inference.completion_row(completion, "double:model"))
    data.write_jsonl(folder / "rollouts.jsonl", rows)
    return folder


@pytest.fixture
def checkpoint(folders, tmp_path) -> Path:
    """A tiny checkpoint that may be changed."""
    return Path(shutil.copytree(folders["qwen"], tmp_path / "model"))


def train_anew(checkpoint: Path) -> None:
    """Another model in the same folder: its last norm turned around, so it says the contrary."""
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"] = -weights["model.norm.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, int]]:
    """(id, sample) of all that local checkpoints are asked for, and short replies of a judge."""
    monkeypatch.setattr(inference, "LABELLING", inference.Sampling(0.0, 1.0, 8))
    found, answer = [], engines.HFEngine.answer

    def recorded(self, requests, sampling):
        found.extend((request.id, k) for request in requests for k in request.samples)
        yield from answer(self, requests, sampling)

    monkeypatch.setattr(engines.HFEngine, "answer", recorded)
    return found


def said(out: Path, name: str) -> list:
    """What the model said, in the order of the result's rows."""
    rows = [row for _, row in data.read_jsonl(out / name)]
    return [row.get("raw", row.get("response")) for row in rows]


@every_command
def test_a_model_trained_anew_into_its_folder_is_asked_and_the_old_replies_stay(
    bank, checkpoint, asked, tmp_path, command
):
    spec, run, result = f"hf:{checkpoint}", tmp_path / "run", COMMANDS[command][1]
    command(spec, bank, run / "first")
    first, old = list(asked), completions(run)
    who = json.loads((run / "first" / "stage.json").read_text())["engines"]
    assert first and len(set(first)) == len(first) and old
    command(spec, bank, run / "again")  # the same model in another folder is not asked
    assert asked == first and completions(run) == old
    assert said(run / "again", result) == said(run / "first", result)

    train_anew(checkpoint)
    before = contents(run / "first")
    with pytest.raises(data.RowError, match=rf"first: .*{checkpoint} changed"):
        command(spec, bank, run / "first")
    assert asked == first and contents(run / "first") == before
    command(spec, bank, run / "anew")
    assert asked == first + first  # all of it, once more
    assert said(run / "anew", result) != said(run / "first", result)
    assert old.items() < completions(run).items()
    now = json.loads((run / "anew" / "stage.json").read_text())["engines"]
    assert set(now) == set(who) == {spec} and now != who
    assert now == {spec: inference.identity(spec)} and now[spec].startswith("hf:")
    command(spec, bank, run / "third")
    assert asked == first + first
    assert said(run / "third", result) == said(run / "anew", result)


@every_command
def test_a_readme_and_a_cache_in_the_models_folder_change_nothing(
    bank, checkpoint, asked, tmp_path, command, capsys
):
    spec, run = f"hf:{checkpoint}", tmp_path / "run"
    command(spec, bank, run / "first")
    first, before = list(asked), contents(run)
    (checkpoint / "README.md").write_text("# A model card")
    (checkpoint / ".gitattributes").write_text("*.safetensors filter=lfs")
    (checkpoint / ".cache" / "huggingface").mkdir(parents=True)
    (checkpoint / ".cache" / "huggingface" / "model.safetensors.json").write_text("{}")
    capsys.readouterr()
    command(spec, bank, run / "first")
    assert "is finished already" in capsys.readouterr().out and contents(run) == before
    command(spec, bank, run / "second")
    assert asked == first
    one, two = (json.loads((run / name / "stage.json").read_text()) for name in ("first", "second"))
    assert one["engines"] == two["engines"] and one["inputs"] == two["inputs"]


@every_command
def test_who_answered_is_told_though_its_folder_changes_in_the_meantime(
    bank, checkpoint, asked, tmp_path, command, monkeypatch
):
    spec, module = f"hf:{checkpoint}", COMMANDS[command][0]
    answered, open_engine = inference.identity(spec), module.open_engine

    class Slow(inference.Engine):
        """Answers, and lets the checkpoint be trained anew before it has ended."""

        def __init__(self, engine: inference.Engine):
            self.engine, self.spec, self.tally = engine, engine.spec, engine.tally

        def answer(self, requests, sampling):
            yield from self.engine.answer(requests, sampling)
            train_anew(checkpoint)

    monkeypatch.setattr(module, "open_engine", lambda *about: Slow(open_engine(*about)))
    command(spec, bank, tmp_path / "run" / "out")
    assert inference.identity(spec) != answered
    record = json.loads((tmp_path / "run" / "out" / "stage.json").read_text())
    assert record["engines"] == {spec: answered}


def curating(spec: str, bank: Path, out: Path) -> None:
    files = ["--questions", str(bank / "test.jsonl"), "--images", str(bank), "--out", str(out)]
    roles = ["--baselines", spec, "clinic:hasty", "--experts", spec, "clinic:expert-a"]
    curate.main([*files, *roles, "--classifier", spec, "--editor", spec, "--max-tokens", "8"])


def evaluating_judged(spec: str, bank: Path, out: Path) -> None:
    evaluating(spec, bank, out, "--judge", spec)


def looking_judged(spec: str, bank: Path, out: Path) -> None:
    files = ["--questions", str(bank / "test.jsonl"), "--images", str(bank), "--out", str(out)]
    more = ["-n", "1", "--max-tokens", "8", "--judge", spec]
    looking.main(["--engine", spec, *files, *more])


def distilling(spec: str, bank: Path, out: Path) -> None:
    files = ["--questions", str(bank / "test.jsonl"), "--images", str(bank), "--out", str(out)]
    roles = ["--teachers", "clinic:thorough", spec, "--expand", "clinic:thorough", spec]
    distill.main(["run", *files, *roles, "--checker", spec, "--max-tokens", "8"])


@pytest.mark.parametrize("command", [curating, distilling, evaluating_judged, looking_judged])
def test_a_command_holds_one_local_model_at_a_time(
    bank, checkpoint, asked, tmp_path, monkeypatch, command
):
    held, most = [], []
    load, close = engines.HFEngine.__init__, engines.HFEngine.close

    def loaded(self, *about):
        load(self, *about)
        held.append(self)
        most.append(len(held))

    def closed(self):
        close(self)
        held.remove(self)

    monkeypatch.setattr(engines.HFEngine, "__init__", loaded)
    monkeypatch.setattr(engines.HFEngine, "close", closed)
    command(f"hf:{checkpoint}", bank, tmp_path / "run" / "out")
    assert len(most) > 1 and max(most) == 1


def test_a_greedy_local_judge_that_cannot_be_read_is_asked_once(bank, checkpoint, asked, tmp_path):
    judging(f"hf:{checkpoint}", bank, tmp_path / "run" / "out")  # it says nothing readable
    rows = [row for _, row in data.read_jsonl(tmp_path / "run" / "out" / "verdicts.jsonl")]
    assert [row["criteria"] for row in rows] == [None, None] and len(asked) == 2
    assert inference.attempts_of("https://api.example.com/v1#m") == 3


# --------------------------------------------------------------------------------------------------
# A finished command is run again

ROLLOUTS = ["--rollouts", "rollouts/rollouts.jsonl", "--questions", "test.jsonl"]
VERDICTS = ["--verdicts", "verdicts/verdicts.jsonl"]
# name -> (main, flags, all in a folder of their own with relative paths), in the order they are run
FINISHED: dict[str, tuple[Callable, list[str]]] = {
    "rollouts": (
        rollout.main,
        ["--engine", "clinic:thorough", "--questions", "test.jsonl", "-n", "4"],
    ),
    "verdicts": (judge.main, ["verdicts", "--judge", "clinic:judge", *ROLLOUTS]),
    "pairs": (judge.main, ["pairs", *VERDICTS, *ROLLOUTS]),
    "sheet": (report.__main__.main, ["sample", "-n", "3", *VERDICTS, *ROLLOUTS]),
    "agreement": (
        report.__main__.main,
        ["agree", "--human", "rater.csv", "--key", "sheet/key.jsonl", *VERDICTS],
    ),
    "evaluation": (
        evaluate.main,
        ["--engine", "clinic:hasty", "--judge", "clinic:judge", "--questions", "test.jsonl"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """A run folder with questions and films of the world, and every command of FINISHED done."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(world / "films", "films")
        shutil.copyfile(world / "test.jsonl", "test.jsonl")
        for name, (main, flags) in FINISHED.items():
            main([*flags, "--out", name])
            if name == "sheet":
                blank = Path("sheet/sheet/sheet.csv").read_text(encoding="utf-8-sig")
                filled = blank.replace(",,,,\n", ",Yes,No,Yes,No\n")
                Path("rater.csv").write_text(filled, encoding="utf-8-sig")
    assert (folder / "pairs" / "pairs.jsonl").stat().st_size  # so no claim is empty
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> Path:
    """A copy of the run folder that we stand in, where opening an engine is an error."""
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    monkeypatch.chdir(folder)

    def never(spec: str, setup) -> None:
        raise AssertionError(f"{spec} is opened")

    for module in (rollout, judge, evaluate):
        monkeypatch.setattr(module, "open_engine", never)
    return folder


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_command_run_again_asks_nothing_and_leaves_every_byte(run, name, capsys):
    main, flags = FINISHED[name]
    before = contents(run)
    assert main([*flags, "--out", name]) is None
    assert contents(run) == before
    said = f"{name}: is finished already ({name}/stage.json); nothing to do\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("name", ["rollouts", "verdicts", "evaluation"])
def test_flags_that_change_only_speed_are_no_other_settings(run, name, capsys):
    main, flags = FINISHED[name]
    before = contents(run)
    speed = ["--concurrency", "2", "--batch", "3", "--max-requests", "7", "--replicas", "1"]
    main([*flags, *speed, "--tensor-parallel", "2", "--replies", "replies", "--out", name])
    assert contents(run) == before and "is finished already" in capsys.readouterr().out


# of each command: (a flag more, how the difference is told)
OTHER_FLAGS = {
    "rollouts": [
        (["--temperature", "0.5"], r"temperature 0\.95 -> 0\.5"),
        (["-n", "5"], "n 4 -> 5"),
        (["--seed", "1"], "seed 0 -> 1"),
        (["--engine", "clinic:bookish"], "engine 'clinic:thorough' -> 'clinic:bookish'"),
        (["--pixels", "3136"], "pixels 589824 -> 3136"),
    ],
    "verdicts": [
        (["--judge", "clinic:expert-a"], "judge 'clinic:judge' -> 'clinic:expert-a'"),
        (["--tiles", "2"], "tiles 1 -> 2"),
        (["--images", ".."], r"images '\.' -> '\.\.'"),
    ],
    "pairs": [
        (["--rule", "length-matched"], "rule 'all' -> 'length-matched'"),
        (["--cap", "1"], "cap 0 -> 1"),
        (["--criteria", "No_Hallucination"], r"criteria \[.*\] -> \['No_Hallucination'\]"),
    ],
    "sheet": [(["-n", "2"], "n 3 -> 2"), (["--seed", "1"], "seed 0 -> 1")],
    "agreement": [(["--seed", "1"], "seed 0 -> 1")],
    "evaluation": [
        (["-n", "2"], r"n \[1\] -> \[2\]"),
        (["--prompt", "bare"], "prompt 'paper' -> 'bare'"),
        (["--judge", ""], "judge 'clinic:judge' -> ''"),
        (["--name", "m", "--seed", "3"], "name '' -> 'm', seed 0 -> 3"),
    ],
}  # fmt: skip
CHANGED = [(name, *other) for name, others in OTHER_FLAGS.items() for other in others]


@pytest.mark.parametrize(("name", "more", "told"), CHANGED)
def test_a_finished_command_with_another_flag_is_refused_and_the_difference_is_named(
    run, name, more, told
):
    main, flags = FINISHED[name]
    before = contents(run)
    with pytest.raises(data.RowError, match=rf"--out {name}: was finished .*\({told}\)"):
        main([*flags, *more, "--out", name])
    assert contents(run) == before


INPUTS = {
    "rollouts": ["test.jsonl"],
    "verdicts": ["test.jsonl", "rollouts/rollouts.jsonl"],
    "pairs": ["test.jsonl", "rollouts/rollouts.jsonl", "verdicts/verdicts.jsonl"],
    "sheet": ["test.jsonl", "rollouts/rollouts.jsonl", "verdicts/verdicts.jsonl"],
    "agreement": ["rater.csv", "sheet/key.jsonl", "verdicts/verdicts.jsonl"],
    "evaluation": ["test.jsonl"],
}


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in INPUTS for path in INPUTS[name]]
)
def test_a_finished_command_with_another_input_is_refused_and_the_input_is_named(run, name, path):
    main, flags = FINISHED[name]
    lines = (run / path).read_text(encoding="utf-8").splitlines(keepends=True)
    (run / path).write_text("".join(lines[:-1]), encoding="utf-8")  # one row less
    before = contents(run)
    with pytest.raises(data.RowError, match=rf"--out {name}: was finished .*\({path} changed\)"):
        main([*flags, "--out", name])
    assert contents(run) == before
    shutil.copyfile(path, "copy")
    moved = ["copy" if word == path else word for word in flags]
    with pytest.raises(data.RowError, match=rf"--out {name}: was finished .*{path}.* -> .*copy"):
        main([*moved, "--out", name])


@pytest.mark.parametrize("name", FINISHED)
def test_an_output_that_was_changed_by_hand_is_named_and_not_made_anew(run, name):
    main, flags = FINISHED[name]
    outputs = json.loads((run / name / "stage.json").read_text())["outputs"]
    for output in outputs:
        path = run / name / output
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b" ")
        before = contents(run)
        said = f"{name}: is finished, but its {output} is not as it was written"
        with pytest.raises(data.RowError, match=said):
            main([*flags, "--out", name])
        assert contents(run) == before
        path.write_bytes(whole)
    assert outputs
