"""The output folder of a command: opened before anything is written, finished by stage.json, never written over.

    open_folder     nothing is lost: an input, a finished result, or the work of another process is refused
    finish          stage.json, written last: what made this folder, from which inputs, with which hashes
    fingerprint     a file or folder by its content; of a model's folder: config, tokenizer, processor and weights

A folder is in one of three states. It is new; or begun.json holds the settings and inputs of work that can go on; or
stage.json says that it is finished. The same command goes on, or says that it is finished. Another command is refused with
the difference, whatever it is. Nothing here deletes or replaces a result.

    begun.json   {"settings", "inputs": {path: hash}}
    stage.json   the same, with "command", "outputs": {name: hash}, "engines", "figures", "versions", "sources", "seconds"

    images.json  {path: hash} of the images that the rows name, where a command reads images

Hashing 150 GB takes minutes, so the hash of a large file is kept in RUN/fingerprints.jsonl by path, size and mtime, where
RUN is the folder that holds the command's --out.

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
from pathlib import Path
from typing import IO

import data
import flags

HERE = Path(os.path.realpath(__file__)).parent
RECORDS = ("begun.json", "stage.json", "images.json", "medee.json", ".lock")  # of the folder itself, no result
MODEL_FILES = (".safetensors", ".json", ".txt", ".jinja", ".model")  # config, tokenizer, processor, weights
LARGE = 1 << 26  # ours: bytes from which a file's hash is kept on disk; 64 MB take a tenth of a second
VERSIONS = ("torch", "transformers", "numpy", "pillow", "safetensors", "vllm", "openai", "google-genai")


# ---------------------------------------------------------------------------------------------------------------
# Fingerprints

_memory: Path | None = None  # fingerprints.jsonl of this process's run


def remember(run: Path) -> None:
    """Keeps hashes of large files in RUN/fingerprints.jsonl from now on, and takes those that are there."""
    global _memory
    _memory = run / "fingerprints.jsonl"
    if _memory.is_file():
        for line in _memory.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                data.HASHES[row["path"], row["size"], row["mtime"]] = row["sha256"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # a torn line of a killed process: its file is hashed again


def large_hash(path: Path) -> str:
    """data.file_hash, kept on disk where the file is large."""
    known = len(data.HASHES)
    digest = data.file_hash(path)
    if _memory and (stat := path.stat()).st_size >= LARGE and len(data.HASHES) > known:
        row = {"path": os.path.realpath(path), "size": stat.st_size, "mtime": stat.st_mtime_ns, "sha256": digest}
        _memory.parent.mkdir(parents=True, exist_ok=True)
        with open(_memory, "a", encoding="utf-8") as file:
            data.append_jsonl(file, [row])
    return digest


def belongs(file: Path, model: bool) -> bool:
    """Whether a file, named relative to its folder, is content: no record, nothing hidden, no README."""
    hidden = any(part.startswith(".") for part in file.parts)
    return not hidden and file.name not in RECORDS and file.suffix != ".md" and (not model or file.suffix in MODEL_FILES)


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's files. A model's folder (one with a config.json) is its
    config, tokenizer, processor and weights: what else lies there does not change the model. Raises RowError where there
    is nothing."""
    path = Path(path)
    if not path.is_dir():
        return large_hash(path)
    model = (path / "config.json").exists()
    inside = path.iterdir() if model else path.rglob("*")
    names = sorted(file.relative_to(path) for file in inside if file.is_file())
    names = [name for name in names if belongs(name, model)]
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock
        hashes = pool.map(large_hash, [path / name for name in names])
        return data.content_hash([[str(name), digest] for name, digest in zip(names, hashes)])


# ---------------------------------------------------------------------------------------------------------------
# Opening and finishing a folder

_held: dict[Path, tuple[IO, dict]] = {}  # real folder -> its lock and begun.json, until it is finished


def settings_of(args: argparse.Namespace, free: Iterable[str] = ()) -> dict:
    """The settings that the result depends on, as JSON has them. free: flags that change only speed or rounding."""
    kept = {key: value for key, value in vars(args).items() if key not in ("out", "replies", *free) and not callable(value)}
    return json.loads(json.dumps(kept, default=str))


def difference(record: dict, now: dict) -> str:
    """In which settings and inputs a record differs: "lr 0.0001 -> 0.001, demos.jsonl changed"; "" if in none."""
    old, new = record["settings"], now["settings"]
    said = [f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old | new) if old.get(key) != new.get(key)]
    had, has = record["inputs"], now["inputs"]
    said += [f"{path} changed" for path, digest in has.items() if path in had and had[path] != digest]
    return ", ".join(said + [f"{path} is another input" for path in sorted(had.keys() ^ has.keys()) if not said])


def read_record(path: Path) -> dict:
    """A record of a folder. Raises RowError for what is none, as of a torn or foreign file."""
    keys = {"begun.json": {"settings": dict, "inputs": dict}, "medee.json": {"command": list, "inputs": dict}}
    keys["stage.json"] = keys["begun.json"] | {"command": list, "outputs": dict, "sources": dict, "figures": dict, "seconds": float}
    record = data.read_json(path)
    data.need({"record": record}, str(path), record=dict)
    data.need(record, str(path), **keys[path.name])
    return record


def changed_output(folder: Path, record: dict) -> str | None:
    """The first output of a finished folder that is not as it was written, or None."""
    for name, digest in record["outputs"].items():
        if not (folder / name).exists() or fingerprint(folder / name) != digest:
            return name
    return None


def image_hash(path: Path) -> str:
    """The hash of an image, "" where there is none: whoever opens it says so, with its row."""
    return data.file_hash(path) if path.is_file() else ""


def image_hashes(images: Iterable[Path]) -> dict[str, str]:
    paths = list(dict.fromkeys(images))
    with ThreadPoolExecutor() as pool:
        return dict(zip(map(str, paths), pool.map(image_hash, paths)))


def changed_image(folder: Path) -> str | None:
    """The first image that a folder's command read and that is another now, or gone; or None."""
    path = folder / "images.json"
    for image, digest in (data.read_json(path) if path.exists() else {}).items():
        if image_hash(Path(image)) != digest:
            return image
    return None


def hold(path: Path, what: str) -> IO:
    """Opens a file to append to, and locks it until it is closed. Raises RowError where another process has it: a killed one
    has let it go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        raise data.RowError(f"{path}: is not a file")
    file = open(path, "a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise data.RowError(f"{what}: another process is writing there; wait for it, or write elsewhere") from None
    return file


def appending(path: Path) -> IO:
    """A file of rows, for one process at a time."""
    return hold(path, str(path))


def release() -> None:
    while _held:
        _held.popitem()[1][0].close()


def open_folder(
    args: argparse.Namespace, inputs: Iterable[str | Path], free: Iterable[str] = (), images: Iterable[Path] = ()
) -> bool:
    """Opens the folder --out for a command with these inputs, or returns False where it is finished already. images: the
    files that the inputs' rows name.

    Raises RowError, before anything is written, where --out is no folder or holds an input; was begun or finished with
    other settings or inputs; holds what no command of ours wrote; or is being written by another process.
    """
    out, inputs = Path(args.out), [Path(path) for path in inputs]
    if not str(args.out) or (out.exists() and not out.is_dir()):
        raise data.RowError(f"--out {args.out}: a folder is wanted there")
    real = Path(os.path.realpath(out))
    for path in map(Path, map(os.path.realpath, inputs)):
        if real in (path, *path.parents) and path.exists():
            raise data.RowError(f"--out {out}: holds {path}, which is read here; write to another folder")
    remember(out.parent)
    now = {"settings": settings_of(args, free), "inputs": {str(path): fingerprint(path) for path in inputs}}
    seen = image_hashes(images)
    own = {*RECORDS, *(f".{name}.tmp" for name in RECORDS)}
    results = sorted(path.name for path in out.iterdir() if path.name not in own) if out.exists() else []
    records = [path for path in (out / "stage.json", out / "begun.json") if path.exists()]
    if results and not records:
        raise data.RowError(f"--out {out}: holds {results[0]}, which no finished or begun command wrote; write to another folder")
    if real not in _held:
        _held[real] = hold(out / ".lock", f"--out {out}"), now
    flags.working_in(out)
    finished = (out / "stage.json").exists()
    record = read_record(records[0]) if records else {}
    if finished or results:
        differs = difference(record, now)
        before = data.read_json(out / "images.json") if (out / "images.json").exists() else {}
        other = [path for path in before.keys() | seen.keys() if before.get(path) != seen.get(path)]
        if differs := differs or (f"{sorted(other)[0]} changed" if other else ""):
            was = "finished" if finished else "begun"
            raise data.RowError(f"--out {out}: was {was} with other settings or inputs ({differs}); write to another folder, or move this one away")
    if finished:
        if lost := changed_output(out, record):
            raise data.RowError(f"--out {out}: is finished, but its {lost} is not as it was written; move the folder away to make it anew")
        print(f"{out}: is finished already ({out / 'stage.json'}); nothing to do")
        release()
        return False
    _held[real] = _held[real][0], now
    if seen:
        data.write_json(out / "images.json", seen)
    data.write_json(out / "begun.json", now)
    return True


def finish(args: argparse.Namespace, outputs: Iterable[str | Path], started: float, figures: dict, engines: dict[str, str] | None = None) -> None:
    """stage.json, written last: the folder is complete, and this is what made it. engines: {spec: what answered under it}."""
    out, versions = Path(args.out), {}
    file, begun = _held[Path(os.path.realpath(out))]
    if not (out / ".lock").exists() or not os.path.samestat(os.fstat(file.fileno()), (out / ".lock").stat()):
        raise data.RowError(f"--out {out}: was moved away while this command worked")
    for package in VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    data.write_json(out / "stage.json", {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **begun,
        "engines": engines or {},
        "outputs": {str(Path(path).relative_to(out)): fingerprint(path) for path in outputs},
        "figures": figures,
        "versions": {"python": sys.version.split()[0], **versions},
        "sources": sources(),
        "seconds": round(time.time() - started, 1),
    })  # fmt: skip
    release()


def sources() -> dict[str, str]:
    """{file: hash} of the project's files that this process has loaded."""
    files = {Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    return {file.name: data.file_hash(file) for file in sorted(files) if file.parent == HERE}


def new_file(path: str | Path, content: str, inputs: Iterable[str | Path]) -> None:
    """Writes a text where no other is. Raises RowError for a folder, an input, and a file with another content."""
    path = Path(path)
    what = "read here" if os.path.realpath(path) in map(os.path.realpath, inputs) else "a folder" if path.is_dir() else ""
    if what or (path.exists() and not path.is_file()):
        raise data.RowError(f"--out {path}: is {what or 'no file'}; name another file")
    if path.exists() and path.read_bytes() != content.encode():
        raise data.RowError(f"--out {path}: is there already, with another content; move it away, or name another file")
    data.write_text(path, content)
