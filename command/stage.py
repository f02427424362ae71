"""A command's output folder: checked first, finished by stage.json, never replaced.

A folder is in one of three states: new; begun, with the settings and inputs of work that can be
resumed in begun.json; or finished, with stage.json. The same command resumes, or says that it is
finished. Any other command is refused with the difference, as is a folder with an input, a foreign
file or another process's work. Nothing here deletes a result.

    begun.json   {"settings", "inputs": {path: hash}}
    stage.json   the same, with "command", "outputs": {name: hash}, "engines", "figures",
                 "versions", "sources", "seconds"
    images.json  {path: hash} of the images that the rows name, where a command reads images

Hashing 150 GB takes minutes, so the hash of a large file is kept in RUN/fingerprints.jsonl by path,
size and mtime, where RUN is the folder that holds the command's --out.

Where we depart from the paper, or it is silent: it says nothing of files.
"""

import argparse
import fcntl
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO

import data
from command import flags

# the folder's own records, which are no results
RECORDS = ("begun.json", "stage.json", "images.json", "medee.json", ".lock")
KEYS = {  # the keys of a record, and their types
    "run.json": {"started_in": str, "stages": list},
    "medee.json": {"command": list},
    "begun.json": {"settings": dict, "inputs": dict},
    "stage.json": {
        "settings": dict, "inputs": dict, "command": list, "outputs": dict, "sources": dict,
        "figures": dict, "seconds": float,
    },
}  # fmt: skip
# config, tokenizer, processor, weights
MODEL_FILES = (".safetensors", ".json", ".txt", ".jinja", ".model")
# ours: from this many bytes on, a file's hash is kept on disk; 64 MB take a tenth of a second
LARGE = 1 << 26
VERSIONS = (
    "torch", "transformers", "numpy", "pillow", "safetensors", "vllm", "openai", "google-genai",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Fingerprints

_memory: Path | None = None  # fingerprints.jsonl of this process's run


def remember(run: Path) -> None:
    """Loads known hashes from RUN/fingerprints.jsonl, and adds those of large files from now on."""
    global _memory
    _memory = run / "fingerprints.jsonl"
    text = _memory.read_text(encoding="utf-8", errors="replace") if _memory.is_file() else ""
    for line in text.splitlines():
        with suppress(ValueError):  # a line cut short by a kill: its file is hashed again
            row = json.loads(line)
            data.HASHES[row["path"], row["size"], row["mtime"]] = row["sha256"]


def large_hash(path: Path) -> str:
    """data.file_hash, kept on disk where the file is large."""
    if not path.is_file():
        return data.file_hash(path)  # which says what is wrong
    stat = path.stat()  # before its bytes are read: a file that changes meanwhile is hashed again
    key = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns)
    known, digest = key in data.HASHES, data.file_hash(path)
    if _memory and stat.st_size >= LARGE and not known:
        row = dict(zip(("path", "size", "mtime"), key))
        _memory.parent.mkdir(parents=True, exist_ok=True)
        with open(_memory, "a", encoding="utf-8") as file:
            data.append_jsonl(file, [{**row, "sha256": digest}])
    return digest


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's files, without records, hidden
    files and .md. In a model's folder (one with a config.json) only config, tokenizer, processor
    and weights count: other files do not change the model. Raises RowError where there is nothing.
    """
    path = Path(path)
    if not path.is_dir():
        return large_hash(path)
    model = (path / "config.json").exists()
    names = []
    for file in path.iterdir() if model else path.rglob("*"):
        name = file.relative_to(path)
        hidden = any(part.startswith(".") for part in name.parts)
        counts = name.suffix in MODEL_FILES if model else name.suffix != ".md"
        if counts and not hidden and name.name not in RECORDS and file.is_file():
            names.append(name)
    hashes = hashes_of(path / name for name in names)
    return data.content_hash([[str(name), hashes[str(path / name)]] for name in sorted(names)])


def hashes_of(paths: Iterable[str | Path]) -> dict[str, str]:
    """{path: fingerprint, or "" where nothing is}."""
    names = list(dict.fromkeys(map(str, paths)))
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        found = pool.map(lambda name: fingerprint(name) if Path(name).exists() else "", names)
        return dict(zip(names, found))


def changed(then: dict[str, str], folder: Path = Path()) -> list[str]:
    """The files whose hashes are no longer those of `then`; names are relative to the folder."""
    now = hashes_of(folder / name for name in then)
    return [name for name, digest in then.items() if now[str(folder / name)] != digest]


# --------------------------------------------------------------------------------------------------
# What changed


def settings_of(args: argparse.Namespace, free: Iterable[str] = ()) -> dict:
    """The settings that decide the result, as JSON. free: flags of speed or rounding only."""
    left_out = {"out", "replies", *free}
    pairs = vars(args).items()
    settings = {k: v for k, v in pairs if k not in left_out and not callable(v)}
    return json.loads(json.dumps(settings, default=str))


def difference(old: dict, new: dict, then: dict[str, str], now: dict[str, str]) -> str:
    """How settings differ, "lr 0.0001 -> 0.001"; if they do not, the first input whose hashes
    differ, "demos.jsonl changed"; "" where nothing does."""
    settings = [
        f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old | new) if old.get(name) != new.get(name)
    ]  # fmt: skip
    inputs = [f"{path} changed" for path in sorted(then | now) if then.get(path) != now.get(path)]
    return ", ".join(settings or inputs[:1])


def record_of(folder: Path) -> Path:
    """stage.json, or begun.json while the folder is not finished."""
    finished = folder / "stage.json"
    return finished if finished.exists() else folder / "begun.json"


def read_record(path: Path) -> dict:
    """A folder's record. Raises RowError if it is not one, as in a torn or foreign file."""
    record = data.read_json(path)
    data.need({"record": record}, str(path), record=dict)
    data.need(record, str(path), **KEYS[path.name])
    return record


def read_images(folder: Path) -> dict[str, str]:
    """images.json, or {} where a folder has none."""
    path = folder / "images.json"
    return data.read_json(path) if path.exists() else {}


# --------------------------------------------------------------------------------------------------
# Opening and finishing a folder

_held: dict[Path, IO] = {}  # real folder -> its lock, until it is finished


def hold(path: Path, what: str = "") -> IO:
    """Opens a file to append to, and locks it until it is closed. Raises RowError where another
    process holds it; a kill releases the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise data.RowError(f"{path}: is not a file")
    file = open(path, "a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        busy = "another process is writing there; wait for it, or write elsewhere"
        raise data.RowError(f"{what or path}: {busy}") from None
    return file


def release() -> None:
    """Releases every folder of this process."""
    while _held:
        _held.popitem()[1].close()


def results_of(folder: Path) -> list[str]:
    """The names in a folder that are not its records."""
    own = {*RECORDS, *(f".{name}.tmp" for name in RECORDS)}
    return sorted(path.name for path in folder.glob("*") if path.name not in own)


def check_place(out: Path) -> None:
    """Raises RowError where --out is no folder, or holds what no command wrote: also an input."""
    if out.exists() and not out.is_dir():
        raise data.RowError(f"--out {out}: a folder is wanted there")
    results = results_of(out)
    if results and not record_of(out).exists():
        fault = f"holds {results[0]}, which no finished or begun command wrote"
        raise data.RowError(f"--out {out}: {fault}; write to another folder")


def check_same(out: Path, settings: dict, inputs: dict[str, str]) -> None:
    """Raises RowError unless a folder was begun or finished with these settings and inputs, and has
    its outputs if finished."""
    path = record_of(out)
    if not path.exists():
        return
    record, finished = read_record(path), path.name == "stage.json"
    if not finished and not results_of(out):
        return  # nothing was made yet
    then = record["inputs"] | read_images(out)
    if differs := difference(record["settings"], settings, then, inputs):
        was = f"was {'finished' if finished else 'begun'} with other settings or inputs"
        elsewhere = "write to another folder, or move this one away"
        raise data.RowError(f"--out {out}: {was} ({differs}); {elsewhere}")
    if edited := changed(record.get("outputs", {}), out):
        fault = f"is finished, but its {edited[0]} is not as it was written"
        raise data.RowError(f"--out {out}: {fault}; move the folder away to make it anew")


def open_folder(
    args: argparse.Namespace,
    inputs: Iterable[str | Path],
    free: Iterable[str] = (),
    images: Iterable[Path] = (),
) -> bool:
    """Opens the folder --out for a command with these inputs; returns False if it is finished.
    images: the files that the inputs' rows name. Raises RowError, before a record or a result is
    written, for a place that check_place or check_same refuses, or that another process writes to.
    """
    out = Path(args.out)
    check_place(out)
    remember(out.parent)
    hashes = {str(path): fingerprint(path) for path in map(Path, inputs)}
    begun = {"settings": settings_of(args, free), "inputs": hashes}
    seen, real = hashes_of(images), Path(os.path.realpath(out))
    if real not in _held:
        _held[real] = hold(out / ".lock", f"--out {out}")
    flags.working_in(out)
    check_same(out, begun["settings"], begun["inputs"] | seen)
    if (out / "stage.json").exists():
        print(f"{out}: is finished already ({out / 'stage.json'}); nothing to do")
        release()
        return False
    if seen or (out / "images.json").exists():  # of another command that made nothing
        data.write_json(out / "images.json", seen)
    data.write_json(out / "begun.json", begun)
    return True


def finish(
    args: argparse.Namespace,
    outputs: Iterable[str | Path],
    started: float,
    figures: dict,
    engines: dict[str, str] | None = None,
) -> None:
    """Writes stage.json, the last file. engines: {spec: what answered under it}."""
    out = Path(args.out)
    record = {
        "command": [flags.program(), *sys.argv[1:]],
        **read_record(out / "begun.json"),
        "engines": engines or {},
        "outputs": {str(Path(path).relative_to(out)): fingerprint(path) for path in outputs},
        "figures": figures,
        "versions": versions(),
        "sources": sources(),
        "seconds": round(time.time() - started, 1),
    }
    data.write_json(out / "stage.json", record)
    release()


def versions() -> dict[str, str | None]:
    """{package: version, or None where it is not installed}."""
    found: dict[str, str | None] = {"python": sys.version.split()[0], **dict.fromkeys(VERSIONS)}
    for package in VERSIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def sources() -> dict[str, str]:
    """{file: hash} of the project's files that this process has loaded."""
    loaded = {getattr(module, "__file__", None) for module in list(sys.modules.values())} - {None}
    home = flags.HERE
    own = [path for path in map(Path, sorted(loaded)) if home in (path.parent, path.parent.parent)]
    return {str(path.relative_to(home)): data.file_hash(path) for path in own}


def new_file(path: str | Path, content: str) -> None:
    """Writes a text to a new file. Raises RowError if anything else is there."""
    path = Path(path)
    if path.exists() and not (path.is_file() and path.read_bytes() == content.encode()):
        fault = "is there already, with another content; move it away, or name another file"
        raise data.RowError(f"--out {path}: {fault}")
    data.write_text(path, content)
