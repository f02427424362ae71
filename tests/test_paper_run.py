"""A run's three evaluations beside the paper's: the commands that `medee.py run` calls at its end,
on evaluations of the miniature's engines, and what models need that the paper compares with."""

import csv
import json
import shlex
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from test_medee import full_run

import data
import evaluate
import medee
import model
import report.__main__
from command import flags, schema
from report import tables

TEACHERS = {"base": "bookish", "Stage-I": "hasty", "Stage-II": "thorough", "multimodal": "bookish"}
FOLDERS = {"base": "eval-base", "Stage-I": "eval-stage1", "Stage-II": "eval-stage2"}


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory) -> Path:
    """A run's three evaluations and an ablation, on image questions called MedXpertQA-MM's."""
    run, questions = tmp_path_factory.mktemp("run"), schema.read_questions(world / "test.jsonl")
    rows = [replace(one, source=tables.MM).to_row() for one in questions if one.images]
    data.write_jsonl(run / "mm.jsonl", rows)
    for number, (stage, teacher) in enumerate(TEACHERS.items()):
        words = ["--engine", f"clinic:{teacher}", "--questions", str(run / "mm.jsonl")]
        words += ["--images", str(world), "-n", "4", "--seed", str(number)]
        folder = run / FOLDERS.get(stage, stage)
        evaluate.main([*words, "--name", f"7B/{stage}", "--out", str(folder)])
    return run


def last_commands(run: Path, capsys, *more: str) -> list[list[str]]:
    """The words of the last two commands of a run at the paper's size."""
    (run / "bank").mkdir(exist_ok=True)
    medee.main(full_run(run / "bank", "--out", str(run), *more, "--dry"))
    lines = capsys.readouterr().out.splitlines()
    start = "python -m report "
    found = [line.removeprefix(start) for line in lines if line.startswith(start)]
    assert [line.split()[0] for line in found] == ["looking", "page", "table", "plot"]
    return [shlex.split(line) for line in found[2:]]


def test_a_run_prints_its_gain_over_base_under_the_papers_rows_and_draws_its_figures(
    evaluated, capsys
):
    for words in last_commands(evaluated, capsys, "--results", str(evaluated / "multimodal")):
        report.__main__.main(words)
    printed = capsys.readouterr().out
    right = {}  # by stage, the share of right samples of each question, by hand
    for stage, folder in FOLDERS.items():
        rows = [row for _, row in data.read_jsonl(evaluated / folder / "predictions.jsonl")]
        by_id = {row["id"]: [] for row in rows}
        for row in rows:
            by_id[row["id"]].append(row["correct"])
        right[stage] = 100 * statistics.fmean(map(statistics.fmean, by_id.values()))
    with open(evaluated / "tables" / "table1.csv", encoding="utf-8-sig") as file:
        ours = {
            (row["method"], row["subset"]): row
            for row in csv.DictReader(file)
            if row["by"] == "ours" and row["benchmark"] == tables.MM
        }
    assert ("7B/base", "delta") not in ours
    for stage in ("Stage-I", "Stage-II"):
        gain = ours[f"7B/{stage}", "delta"]
        assert float(gain["percent"]) == pytest.approx(right[stage] - right["base"], abs=0.006)
        assert float(gain["low"]) <= float(gain["percent"]) <= float(gain["high"])
        shown = f"{gain['percent']} ({float(gain['low']):+.1f} … {float(gain['high']):+.1f})"
        assert shown in printed
    # all in one printed table: the paper's rows first
    assert printed.index("QwenVL2.5-7B +Stage-II") < printed.index("7B/Stage-II (ours")
    drawn = {path.name for path in (evaluated / "figures").glob("*.png")}
    assert drawn >= {"figure4.png", "figure5-7B.png", "figure6-7B.png"}
    assert "Table 2: no result is called 32B/base, 32B/Stage-I, 32B/Stage-II, 72B/base" in printed
    assert "Figure 4: no result is called 32B/base" in printed


def test_a_missing_stage_is_named_and_the_others_are_still_drawn(evaluated, tmp_path, capsys):
    given = ["--results", *(str(evaluated / FOLDERS[stage]) for stage in ("Stage-I", "Stage-II"))]
    for command in ("table", "plot"):
        report.__main__.main([command, *given, "--out", str(tmp_path / command)])
    said = capsys.readouterr().out
    assert "Table 1: no result is called 7B/base, 8B/base" in said
    assert "Figure 4: no result is called 7B/base, 32B/base" in said
    assert f"7B/Stage-I lacks {tables.MM} question_type=Reasoning" in said
    assert f"Δ on {tables.MM} (no SIZE/base on the same questions)" in said
    assert (tmp_path / "plot" / "figure4.png").exists()
    assert (tmp_path / "table" / "table2.md").exists()


def test_the_names_of_a_run_are_its_size_and_the_stages_that_tables_know(tmp_path, capsys):
    for recipe, size in (("qwen2.5-vl-72b", "72B"), ("internvl3-8b", "8B")):
        medee.main(["run", recipe, *full_run(tmp_path, "--dry")[2:]])
        out = capsys.readouterr().out
        for stage in tables.STAGES:
            assert f"--name {size}/{stage} " in out and size in tables.PAPER_SIZES
    stages = medee.demo_stages(Path("runs/demo"), "qwen", "tiny", "fast", 0)
    words = [word for stage in stages for word in stage.words]
    assert {"demo/base", "demo/Stage-I", "demo/Stage-II"} <= {*words}


def test_results_that_tables_could_not_take_stop_a_run_at_its_start(evaluated, tmp_path):
    for folder, said in ((evaluated / "eval-base", "two results are called '7B/base'"),
                         (tmp_path / "none", "results.json")):  # fmt: skip
        with pytest.raises(data.RowError, match=said):
            medee.main(full_run(tmp_path, "--images-may-leave", "--results", str(folder)))
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# docs/models.md, and what the engines say by themselves

PAGE = Path(medee.__file__).parent / "docs" / "models.md"


def models() -> dict[str, list[str]]:
    """{model: the cells after its name} of the page's table."""
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line[:1] == "|"]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows[2:]}


def test_every_model_of_table_1_has_its_line():
    named = {record["method"].partition(" +")[0] for record in tables.paper_records(1)}
    assert named == models().keys() - {"+Stage-I, +Stage-II"} and len(named) == 13


def test_every_line_names_an_engine_a_prompt_and_the_keys_variable():
    from engines import ENGINES, apis

    for specs, prompt, needs, _ in models().values():
        for spec in specs.split(", "):
            spec = spec.strip("`")
            assert spec.partition(":")[0] in ENGINES and prompt in ("paper", "official", "bare")
            if spec.startswith("https:"):
                host, _, name = spec.removeprefix("https://").partition("#")
                assert name and apis.key_variable(host.partition("/")[0]) in needs


def test_a_folder_of_internvls_first_form_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    with pytest.raises(data.RowError) as refused:
        model.load_config(tmp_path)
    serve = f"`vllm serve {tmp_path} --trust-remote-code` on a machine of its own"
    assert serve in str(refused.value) and f"v1#{tmp_path}; docs/models.md" in str(refused.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(data.RowError, match="'llava' is not supported") as refused:
        model.load_config(tmp_path)
    assert "vllm serve" not in str(refused.value)


def test_plan_without_a_recipe_refuses_a_base_and_with_one_counts_its_own_shapes(tmp_path, capsys):
    from memory import SHAPES, config_of

    with pytest.raises(flags.UserError, match="name the recipe nearest in size.*qwen2.5-vl-32b"):
        medee.main(["plan", "--base", str(tmp_path)])
    # 32 of the 38B's 64 blocks, to be quick, and its vision tower
    shapes = replace(SHAPES["qwen2.5-vl-32b"], family="internvl", layers=32)
    config_of(replace(shapes, vision=(45, 3200, 25, 12800))).save_pretrained(tmp_path)
    medee.main(["plan", "qwen2.5-vl-32b", "--gpus", "1", "--base", str(tmp_path)])
    printed = capsys.readouterr().out
    weights = next(line.split() for line in printed.splitlines() if "  weights " in line)
    width, wide, vision = 5120, 27648, 3200
    block = 2 * width * width + 2 * width * 1024 + 3 * width * wide  # q, o; k, v; SwiGLU
    tower = 45 * 12 * vision * vision  # attention and feed-forward of InternViT-6B
    parameters = 32 * block + tower + 2 * (2 * 152064 * width)  # embeddings and head held twice
    assert float(weights[1]) == pytest.approx(2 * parameters / 2**30, rel=0.03)
