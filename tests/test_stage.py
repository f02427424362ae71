"""The folder of a command: what is finished or paid for is never written over, and a user's mistake
is one paragraph."""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
from command import stage

ROOT = Path(__file__).resolve().parent.parent


def work(out: Path, inputs: list, text: str = "x", **settings) -> bool:
    """A command with these settings and inputs that writes one file. Returns whether it had
    anything to do."""
    args = argparse.Namespace(out=str(out), replies="", **settings)
    if not stage.open_folder(args, inputs):
        return False
    data.write_text(out / "made.txt", text)
    stage.finish(
        args, [out / "made.txt"], time.time(), {"kept": 7}, {"clinic:judge": "clinic:judge"}
    )
    return True


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"a": 1}\n')
    return path


# --------------------------------------------------------------------------------------------------
# Opening and finishing


def test_the_record_says_what_made_the_folder(tmp_path, source):
    out = tmp_path / "run" / "out"
    work(out, [source], seed=3, where=Path("x/y"), act=print)
    record = json.loads((out / "stage.json").read_text())
    assert record["settings"] == {
        "seed": 3,
        "where": "x/y",
    }  # functions are no settings, nor is the place
    assert record["inputs"] == {str(source): hashlib.sha256(b'{"a": 1}\n').hexdigest()}
    assert record["outputs"] == {"made.txt": hashlib.sha256(b"x").hexdigest()}
    assert record["figures"] == {"kept": 7} and record["engines"] == {
        "clinic:judge": "clinic:judge"
    }
    assert (
        record["versions"]["python"] == "{}.{}.{}".format(*sys.version_info[:3])
        and record["versions"]["numpy"]
    )
    assert (
        record["sources"]["command/stage.py"]
        == hashlib.sha256((ROOT / "command" / "stage.py").read_bytes()).hexdigest()
    )
    assert record["command"] and record["seconds"] >= 0


def test_a_finished_command_run_again_says_so_and_changes_no_byte(tmp_path, source, capsys):
    out = tmp_path / "out"
    assert work(out, [source], lr=1e-4)
    before = contents(out)
    assert not work(out, [source], text="y", lr=1e-4)
    assert contents(out) == before and f"{out}: is finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", ["a setting", "a new setting", "an input", "another input", "one input more"]
)
def test_a_finished_result_of_other_settings_or_inputs_is_refused_with_the_difference(
    tmp_path, source, change
):
    out, other = tmp_path / "out", tmp_path / "other.jsonl"
    other.write_text("{}\n")
    work(out, [source], lr=1e-4)
    before, inputs, settings = contents(out), [source], {"lr": 1e-4}
    if change == "a setting":
        settings, said = {"lr": 1e-3}, "lr 0.0001 -> 0.001"
    elif change == "a new setting":
        settings, said = {"lr": 1e-4, "beta": 0.1}, "beta None -> 0.1"
    elif change == "an input":
        source.write_text("{}\n")
        said = "in.jsonl changed"
    else:
        inputs = [other] if change == "another input" else [source, other]
        said = "in.jsonl changed" if change == "another input" else "other.jsonl changed"
    with pytest.raises(data.RowError) as refused:
        work(out, inputs, text="y", **settings)
    assert said in str(refused.value) and "was finished with other" in str(refused.value)
    assert contents(out) == before


def test_a_setting_that_changes_only_the_speed_is_none(tmp_path, source):
    args = argparse.Namespace(out=str(tmp_path / "out"), concurrency=4)
    assert stage.open_folder(args, [source], ("concurrency",))
    data.write_text(tmp_path / "out" / "made.txt", "x")
    stage.release()
    assert stage.open_folder(
        argparse.Namespace(out=args.out, concurrency=8), [source], ("concurrency",)
    )  # goes on


def test_begun_work_goes_on_under_its_own_settings_only(tmp_path, source):
    out = tmp_path / "out"
    args = argparse.Namespace(out=str(out), lr=1e-4)
    assert stage.open_folder(args, [source])
    assert stage.open_folder(
        argparse.Namespace(out=str(out), lr=1e-3), [source]
    )  # nothing was made under the first
    data.write_text(out / "made.txt", "half")
    with pytest.raises(data.RowError, match="was begun with other settings .*lr 0.001 -> 0.0001"):
        stage.open_folder(args, [source])
    assert work(out, [source], lr=1e-3)


def test_an_output_that_was_edited_is_named_and_left(tmp_path, source):
    out = tmp_path / "out"
    work(out, [source])
    (out / "made.txt").write_text("edited")
    with pytest.raises(data.RowError, match="made.txt is not as it was written"):
        work(out, [source])
    assert (out / "made.txt").read_text() == "edited"


@pytest.mark.parametrize(
    "place",
    [
        "a file",
        "below a file",
        "beside an input",
        "above an input",
        "the input",
        "nothing",
        "strange",
    ],
)
def test_a_place_that_is_no_place_for_results_is_refused_before_anything_is_written(
    tmp_path, source, place
):
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "photo.jpg").write_bytes(b"a family")
    out = {
        "a file": source,
        "below a file": source / "out",
        "beside an input": tmp_path,
        "above an input": tmp_path.parent,
        "the input": source,
        "nothing": "",
        "strange": strange,
    }[place]
    before = contents(tmp_path)
    with pytest.raises((data.RowError, NotADirectoryError), match=r"--out|Not a directory"):
        stage.open_folder(argparse.Namespace(out=str(out)), [source])
    assert contents(tmp_path) == before


def test_two_processes_never_write_into_one_folder_and_a_killed_one_lets_go(tmp_path, source):
    out = tmp_path / "out"
    hold = (
        "import argparse, sys; from command import stage; "
        "stage.open_folder(argparse.Namespace(out=sys.argv[1]), [sys.argv[2]]);"
        "print('open', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(out), str(source)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "open\n"
    with pytest.raises(data.RowError, match=f"--out {out}: another process is writing there"):
        work(out, [source])
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert work(out, [source])


def test_a_new_file_takes_no_others_place(tmp_path, source):
    page = tmp_path / "page.html"
    stage.new_file(page, "one")
    stage.new_file(page, "one")  # the same again is no loss
    for path in (page, source, tmp_path):
        before = contents(tmp_path)
        with pytest.raises(data.RowError, match="is there already, with another content"):
            stage.new_file(path, "two")
        assert contents(tmp_path) == before


# --------------------------------------------------------------------------------------------------
# Fingerprints


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "merges.txt",
        "chat_template.jinja",
    ):
        (folder / name).write_text(name)
    return folder


def test_a_models_fingerprint_is_its_config_tokenizer_processor_and_weights(model):
    whole = stage.fingerprint(model)
    (model / "README.md").write_text("about")
    (model / ".gitattributes").write_text("x")
    (model / "picture.png").write_bytes(b"x")
    (model / ".cache" / "huggingface").mkdir(parents=True)
    (model / ".cache" / "huggingface" / "x.json").write_text("1")
    for name in stage.RECORDS:
        (model / name).write_text("{}")
    assert stage.fingerprint(model) == whole
    for path in sorted(set(model.glob("[cmt]*")) - {model / "medee.json"}):
        before = path.read_text()
        path.write_text(before + " ")
        assert stage.fingerprint(model) != whole, path.name
        path.write_text(before)
    assert stage.fingerprint(model) == whole
    (model / "vocab.json").write_text("{}")
    assert stage.fingerprint(model) != whole


def test_a_folder_that_is_no_model_is_all_its_files_by_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    before = stage.fingerprint(tmp_path)
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert stage.fingerprint(tmp_path) != before


def test_a_large_file_is_read_once_for_each_content_over_all_processes(
    tmp_path, model, monkeypatch
):
    monkeypatch.setattr(stage, "LARGE", 1)
    monkeypatch.setattr(data, "HASHES", {})
    stage.remember(tmp_path)
    first = stage.fingerprint(model)
    data.HASHES.clear()  # another process
    stage.remember(tmp_path)
    read = []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name)
    )
    assert stage.fingerprint(model) == first and not read
    (model / "model.safetensors").write_text("retrained")
    assert stage.fingerprint(model) != first and [Path(name).name for name in read] == [
        "model.safetensors"
    ]
    with open(tmp_path / "fingerprints.jsonl", "a") as file:
        file.write('{"path": "to')  # a process was killed here
    stage.remember(tmp_path)


# --------------------------------------------------------------------------------------------------
# Around every main


def run(code: str, *argv: str, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
    program = (
        "import sys, errno, data; from command import flags\nsys.argv[0] = 'script.py'\n"
        f"def main(argv):\n    {code}\nflags.run_script(main)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program, *argv],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


CAUSED = {  # what goes wrong: (code, what is said)
    "disk full": (
        "raise OSError(errno.ENOSPC, 'No space left on device', 'out/x.jsonl')",
        "out/x.jsonl: No space left on device; free",
    ),
    "no permission": (
        "raise PermissionError(errno.EACCES, 'Permission denied', 'x')",
        "x: Permission denied; check the path",
    ),
    "a folder": ("open('/')", "/: Is a directory"),
    "no memory": ("raise MemoryError('of 9 GB')", "out of memory (of 9 GB)"),
    "half a character": ("open('x.txt', 'w').write('\\ud800')", "no file can hold"),
    "not UTF-8": ("b'\\xff'.decode()", "not UTF-8"),
    "a bad row": ("raise data.RowError('a.jsonl:3: id: is missing')", "a.jsonl:3: id: is missing"),
}


@pytest.mark.parametrize("name", CAUSED)
def test_what_a_user_or_a_machine_causes_is_one_paragraph_and_exit_code_1(name, tmp_path):
    code, said = CAUSED[name]
    ended = run(code, cwd=tmp_path)
    assert ended.returncode == 1 and said in ended.stderr and "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_fault_of_ours_and_debug_show_the_traceback():
    assert "Traceback" in run("raise KeyError('x')").stderr
    ended = run("assert argv == ['a']; open('/')", "a", "--debug")
    assert (
        "Traceback" in ended.stderr
        and "IsADirectoryError" in ended.stderr
        and ended.returncode == 1
    )


def test_the_exit_code_of_main_is_the_scripts():
    assert [
        run(code).returncode for code in ("return 0", "return 1", "pass", "raise SystemExit(2)")
    ] == [0, 1, 0, 2]


def test_a_reader_that_goes_away_is_no_error_of_ours():
    program = (
        "import sys; from command import flags\n"
        "def main(argv):\n    for i in range(10**6): print(i)\n"
        "flags.run_script(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 1 and not process.stderr.read()


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(tmp_path, source):
    code = (
        "import argparse, time; stage.open_folder(argparse.Namespace(out=argv[0]), [argv[1]]);"
        " print('open', flush=True); time.sleep(60)"
    )
    program = (
        "import sys; from command import flags, stage\n"
        f"def main(argv):\n    {code}\nflags.run_script(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out"), str(source)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "open\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in said
    assert f"kept in {tmp_path / 'out'}" in said and "the same command goes on" in said


TORN = (
    "[]",
    "5",
    "null",
    "{}",
    '{"settings": []}',
    '{"settings": {}, "inputs": []}',
    "{",
    "[" * 100_000,
)


@pytest.mark.parametrize("content", TORN)
@pytest.mark.parametrize("name", ["begun.json", "stage.json"])
def test_a_record_that_is_none_is_named_and_left(tmp_path, source, name, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(content)
    with pytest.raises(data.RowError, match=name):
        work(out, [source])
    assert (out / name).read_text() == content and not (out / "made.txt").exists()


def test_a_command_that_was_killed_at_its_first_write_goes_on(tmp_path, source):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".begun.json.tmp").write_text("{")
    assert work(out, [source])


def test_the_first_large_input_of_a_new_run_is_remembered(tmp_path, source, monkeypatch):
    monkeypatch.setattr(stage, "LARGE", 1)
    monkeypatch.setattr(data, "HASHES", {})
    assert work(tmp_path / "new" / "run" / "out", [source])
    assert "in.jsonl" in (tmp_path / "new" / "run" / "fingerprints.jsonl").read_text()


def test_a_folder_begun_anew_without_images_forgets_those_of_before(tmp_path, source):
    (tmp_path / "film.png").write_bytes(b"one")
    args = argparse.Namespace(out=str(tmp_path / "out"), lr=1)
    assert stage.open_folder(args, [source], images=[tmp_path / "film.png"])
    args.lr = 2  # nothing was made yet: it may begin anew
    assert stage.open_folder(args, [source])
    (tmp_path / "out" / "rows.jsonl").write_text("{}\n")  # and is killed here
    assert stage.open_folder(args, [source])


def test_a_changed_image_is_another_input(tmp_path, source):
    film = tmp_path / "film.png"
    film.write_bytes(b"one")
    args = argparse.Namespace(out=str(tmp_path / "out"))
    stage.open_folder(args, [source], images=[film])
    stage.finish(args, [], time.time(), {})
    assert (
        not stage.open_folder(args, [source], images=[film])
        and stage.changed(stage.read_images(tmp_path / "out")) == []
    )
    film.write_bytes(b"two")
    with pytest.raises(data.RowError, match="film.png changed"):
        stage.open_folder(args, [source], images=[film])
    assert stage.changed(stage.read_images(tmp_path / "out")) == [str(film)]


def test_a_stream_that_lacks_a_letter_stops_nothing():
    program = (
        "from command import flags\ndef main(argv):\n    print('\u2026')\nflags.run_script(main)"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "\\u2026\n", "")


@pytest.mark.parametrize("what", ["a loop", "a pipe", "no UTF-8"])
def test_strange_paths_are_answered_at_once(tmp_path, what):
    if what == "a pipe":
        os.mkfifo(tmp_path / "x")
    if what == "a loop":
        (tmp_path / "x").symlink_to(tmp_path / "x")
    path = str(tmp_path / "x") if what != "no UTF-8" else os.fsencode(tmp_path) + b"/\xff"
    rows = tmp_path / "q.jsonl"
    rows.write_text("{}")
    command = [
        sys.executable,
        "-m",
        "benchmarks.decontaminate",
        "--questions",
        path,
        "--against",
        str(rows),
        "--out",
        str(tmp_path / "out"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (
        ended.returncode == 1
        and "Traceback" not in ended.stderr
        and len(ended.stderr.splitlines()) == 1
    )
