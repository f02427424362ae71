"""Tiny random models from the real classes, one of each family. They are made once a session and
never downloaded."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for python -m in a test's own process

import clinic.__main__  # noqa: E402
import clinic.school  # noqa: E402
import data  # noqa: E402
import hub  # noqa: E402
import model  # noqa: E402
import rollout  # noqa: E402
from command import stage  # noqa: E402


@pytest.fixture(autouse=True)
def folders_are_let_go():
    """A script lets go of its output folder when it ends. A main that raises inside a test does not
    end the process."""
    yield
    stage.release()


def build_folder(family: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint folder with random weights: config, tokenizer, image processor, safetensors."""
    tokenizer = clinic.school.make_tokenizer(family, 0)
    network, image_processor = clinic.school.build(family, "tiny", tokenizer, seed)
    network.save_pretrained(folder)
    clinic.school.save_processors(folder, family, tokenizer, image_processor)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """{"qwen": folder, "internvl": folder}; read only"""
    base = tmp_path_factory.mktemp("models")
    return {family: build_folder(family, base / family) for family in ("qwen", "internvl")}


@pytest.fixture(params=["qwen", "internvl"])
def family(request) -> str:
    return request.param


@pytest.fixture
def folder(folders, family) -> Path:
    return folders[family]


@pytest.fixture
def processor(folder) -> model.Processor:
    """56 x 56 pixels for Qwen, one tile for InternVL: four image tokens an image"""
    return model.Processor(folder, max_pixels=56 * 56, tiles=1)


@pytest.fixture
def policy(folder) -> model.Policy:
    return hub.load_policy(folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A very small clinic: bank.jsonl, dev.jsonl, test.jsonl and films"""
    folder = tmp_path_factory.mktemp("world")
    clinic.__main__.main(
        [
            "world",
            "--out",
            str(folder),
            "--text",
            "12",
            "--image",
            "12",
            "--dev-image",
            "4",
            "--dev-text",
            "4",
            "--test-image",
            "6",
            "--test-text",
            "4",
        ]
    )
    return folder


def sample_teachers(world: Path, styles: Iterable[str], count: int, folder: Path) -> Path:
    """Answers of several teachers to the test questions, as samples of one model: rollouts.jsonl. A
    teacher's name is kept in `engine`."""
    rows = []
    for number, style in enumerate(styles):
        files = ["--questions", str(world / "test.jsonl"), "--images", str(world)]
        words = ["--engine", f"clinic:{style}", *files, "-n", str(count)]
        rollout.main([*words, "--out", str(folder / style)])
        for _, row in data.read_jsonl(folder / style / "rollouts.jsonl"):
            rows.append({**row, "sample": row["sample"] + count * number})
    data.write_jsonl(folder / "rollouts.jsonl", rows)
    return folder / "rollouts.jsonl"
