"""Stages as commands: which are done, which must be made anew, and how each is run.

A stage is done if its folder has a stage.json, its command is the one asked for now, and its inputs
and outputs are as they were. A killed stage resumes from its last row or step. If its command, an
input or an output changed, its folder is renamed to NAME.1 and the stage is made anew; nothing is
ever deleted. A folder that the run did not begin is left alone. A change of the code is only
reported.

reads and writes RUN/run.json, the run's stages, and FOLDER/medee.json, the command, beside the
folder's own records (stage.py), which name its inputs.

Where we depart from the paper, or it is silent: it does not say how its steps were run.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import data
from command import flags, stage


def environment() -> dict[str, str]:
    """A command's environment. Threads wait passively: spinning is several times slower on a busy
    machine. PYTHONPATH lets `python -m` find the project anywhere."""
    ours = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = filter(None, [str(flags.HERE), os.environ.get("PYTHONPATH")])
    return {**ours, **os.environ, "PYTHONPATH": os.pathsep.join(path)}


@dataclass(frozen=True)
class Stage:
    """One command. Its folder is its --out; medee.json there says with which command this run began
    it."""

    name: str
    script: str
    words: list[str]
    ranks: int = 0  # above 0: launched by torchrun

    @property
    def folder(self) -> Path:
        return Path(self.words[self.words.index("--out") + 1])

    def command(self) -> list[str]:
        """The command as a user types it."""
        launcher = ["torchrun", "--nproc_per_node", str(self.ranks)] if self.ranks else ["python"]
        return [*launcher, *self.script.split(), *self.words]

    def state(self) -> str:
        """The stage's state: "done", "to do", "interrupted", "not begun by this run", or what
        changed since."""
        begun, path = self.folder / "medee.json", stage.record_of(self.folder)
        if not begun.exists():
            filled = self.folder.exists() and any(self.folder.iterdir())
            return "not begun by this run" if filled else "to do"
        ours = stage.read_record(begun)
        if ours["command"] != [self.script, *self.words]:
            return "its settings changed"
        if not path.exists():
            return "interrupted"
        record = stage.read_record(path)
        inputs = ours.get("inputs", record["inputs"]) | stage.read_images(self.folder)
        outputs = record.get("outputs", {})
        if changed := stage.changed(inputs) or stage.changed(outputs, self.folder):
            return f"{changed[0]} changed"
        return "done" if path.name == "stage.json" else "interrupted"

    def edited(self) -> list[str]:
        """Files of the project that changed since the stage was finished. The stage stays done: a
        corrected comment must not cost a week of training. If a change matters, move the folder
        away."""
        return stage.changed(stage.read_record(self.folder / "stage.json")["sources"], flags.HERE)

    def set_aside(self, why: str) -> None:
        """Renames the folder. Raises RowError if the command reads a file in it, or if another
        command is still writing there."""
        own = Path(os.path.realpath(self.folder))
        for word in self.words:
            path = Path(os.path.realpath(word))
            if own in path.parents and path.exists():
                where = f"{word} lies in {self.folder}, which must be made anew ({why})"
                raise data.RowError(f"{where}; copy it to another place and name that")
        stage.hold(self.folder / ".lock", str(self.folder)).close()
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        renamed = f"{self.folder} is set aside as {aside.name} ({size / 1e6:.1f} MB)"
        print(f"   {renamed}: {why}", flush=True)
        self.folder.rename(aside)

    def adopt(self) -> None:
        """Accepts a finished folder that was made by hand. Of its inputs those are watched
        that are there. Raises RowError unless it is complete and of this stage's command."""
        begun, where = self.folder / "medee.json", f"adopt {self.name}: {self.folder}"
        if begun.exists():
            raise data.RowError(f"{where} is of this run already")
        finished = stage.read_record(self.folder / "stage.json")
        command = [self.script] if self.words[0].startswith("-") else [self.script, self.words[0]]
        if finished["command"][: len(command)] != command:
            made = " ".join(finished["command"][:2])
            raise data.RowError(f"{where} was made by {made}, not by {' '.join(command)}")
        if lost := stage.changed(finished["outputs"], self.folder):
            raise data.RowError(f"{where}: {lost[0]} is not as its stage.json has it")
        there = [path for path in finished["inputs"] if Path(path).exists()]
        ours = {"command": [self.script, *self.words], "inputs": stage.hashes_of(there)}
        data.write_json(begun, {**ours, "adopted": finished["command"]})

    def run(self, limits: Iterable[str] = ()) -> None:
        """Runs the command unless it is done, and resumes it if nothing changed. limits: flags that
        change the speed, or whether it may run, but not the result. Raises UserError if it
        fails."""
        state = self.state()
        typed = shlex.join([*self.command(), *limits])
        print(f"\n== {self.name}: {state}\n   $ {typed}", flush=True)
        if state == "not begun by this run":
            raise data.RowError(
                f"{self.folder} was not begun by this run, and is left alone; if it is this stage, "
                f"finished by hand: python medee.py adopt {self.name} --out "
                f"{self.folder.parents[self.name.count('/')]}; else give another --out"
            )
        if state == "done":
            if edited := self.edited():
                print(f"   note: {', '.join(edited)} changed since this was made;", end=" ")
                print(f"if that matters here, move {self.folder} away")
            return
        if state not in ("to do", "interrupted"):
            self.set_aside(state)
        data.write_json(self.folder / "medee.json", {"command": [self.script, *self.words]})
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(self.ranks)]
        module = self.script.startswith("-m ")
        script = self.script.split() if module else [str(flags.HERE / self.script)]
        command = [*(launcher if self.ranks else []), *script, *self.words, *limits]
        process = subprocess.Popen([sys.executable, *command], env=environment())
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it has come to the stage too, which ends by itself
            process.wait()
            raise
        if code:
            failed = f"{self.name} stopped with exit code {code}"
            raise flags.UserError(f"{failed}; the same command goes on from there")


def words_of(settings: dict) -> list[str]:
    """{"lr": 1e-4, "n": 8, "exact-leaks": True, "base": ""} -> ["--lr", "0.0001", "-n", "8",
    "--exact-leaks"]; a list of lists repeats its flag."""
    words = []
    for name, value in settings.items():
        if value in (None, "", []):
            continue
        repeated = isinstance(value, list) and isinstance(value[0], list)
        for one in value if repeated else [value]:
            words.append(("-" if len(name) == 1 else "--") + name)
            if one is not True:
                words += map(str, one if isinstance(one, list) else [one])
    return words


def stages_from(commands: str, values: dict, ranks: int = 0) -> list[Stage]:
    """The stages of a text: a line is NAME LAUNCHER SCRIPT and words; its --out is added. {name} is
    replaced by its value; where it is a whole word and the value a list, by the list's words."""
    stages = []
    for line in commands.strip().splitlines():
        name, launcher, *typed = shlex.split(line)
        filled = []
        for word in [*typed, "--out", f"{{run}}/{name}"]:
            value = values.get(word[1:-1]) if word.startswith("{") else None
            filled += value if isinstance(value, list) else [word.format(**values)]
        size = 2 if filled[0] == "-m" else 1
        script, words = " ".join(filled[:size]), filled[size:]
        stages.append(Stage(name, script, words, ranks if launcher == "torchrun" else 0))
    return stages


# --------------------------------------------------------------------------------------------------
# The folder of a run


def begin(run: Path, stages: list[Stage]) -> IO:
    """Records the stages in run.json. Returns the run's lock, which is held until it is closed."""
    if run == Path():
        raise data.RowError("--out: a folder of the run's own is wanted")
    flags.working_in(run)
    if (run / "run.json").exists():
        stage.read_record(run / "run.json")  # so that a foreign run.json is not replaced
    lock = stage.hold(run / ".lock", f"--out {run}")
    stage.remember(run)
    rows = [[one.name, one.script, one.words, one.ranks] for one in stages]
    data.write_json(run / "run.json", {"started_in": os.getcwd(), "stages": rows})
    return lock


def stages_of(run: Path) -> list[Stage]:
    """The stages of a run that was begun. Changes to the folder that their paths are relative to.
    Raises RowError for a run that was copied or moved."""
    if not (run / "run.json").exists():
        raise flags.UserError(f"{run} holds no run; medee.py demo or medee.py run begins one")
    record, there = stage.read_record(run / "run.json"), Path(os.path.realpath(run))
    stage.remember(there)
    os.chdir(record["started_in"])
    stages = [Stage(*row) for row in record["stages"]]
    if (held := Path(os.path.realpath(stages[0].folder)).parent) != there:
        moved = "a run that was copied or moved has no status"
        raise data.RowError(f"{there / 'run.json'} is of a run in {held}; {moved}")
    return stages
