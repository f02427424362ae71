"""Several ranks take the same step as one: train.fit under torchrun (gloo, FSDP2 on CPUs) against
the same fit in this process.

Runs of the ranks come from one launch of ranks_worker.py, and each test reads its part of what that
left behind. The kills have their own.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks_worker
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import data
import hub
import train
from command import schema

ROOT = Path(__file__).resolve().parent.parent
STOPPED = (
    "sft-lora-qwen",
    "dpo-full-qwen",
    "dpo-full-internvl-replicas",
)  # cases whose state also crosses between one rank and several
eight = pytest.mark.skipif(
    os.environ.get("MEDEE_RANKS") != "8", reason="set MEDEE_RANKS=8 to run on eight ranks"
)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("films")
    ranks_worker.draw_images(folder)
    return str(folder)


@pytest.fixture(scope="session")
def alone(folders, images, tmp_path_factory) -> Path:
    """The same runs in this process, each made when a test first asks for it (`by_one`)."""
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="session")
def by_one(folders, images, alone):
    done = {}
    models = str(folders["qwen"].parent)

    def run(case: str) -> dict[str, torch.Tensor]:
        if case not in done:
            done[case] = ranks_worker.run_case(case, models, images, alone / case / "whole")
        return done[case]

    return run


def start(count: int, spec: dict, folder: Path, log: str = "log") -> subprocess.Popen:
    """ranks_worker.py on `count` ranks under torchrun; one rank is a plain process."""
    (folder / f"{log}.json").write_text(json.dumps(spec))
    launch = (
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(count),
        ]
        if count > 1
        else [sys.executable]
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    with open(folder / f"{log}.txt", "w") as file:
        return subprocess.Popen(
            [*launch, ranks_worker.__file__, str(folder / f"{log}.json")],
            env=environment,
            stdout=file,
            stderr=file,
        )


def finish(running: subprocess.Popen, folder: Path, log: str = "log") -> str:
    """What it printed. Fails with the first rank's last words."""
    code, said = running.wait(600), (folder / f"{log}.txt").read_text()
    assert code == 0, "\n".join(
        [line for line in said.splitlines() if line.startswith("[rank0]")]
        or said.splitlines()[-40:]
    )
    return said


@pytest.fixture(
    scope="session", params=[pytest.param(2, id="two"), pytest.param(8, id="eight", marks=eight)]
)
def ranks(request, folders, images, tmp_path_factory) -> Path:
    """The one launch. Each case of STOPPED goes on from a state that this process, one rank, left
    at step 2."""
    out = tmp_path_factory.mktemp(f"ranks{request.param}")
    models = str(folders["qwen"].parent)
    stopped = {case: str(out / case / "from_one") for case in STOPPED}
    for case, folder in stopped.items():
        ranks_worker.run_stopped(case, models, images, Path(folder))
    finish(
        start(
            request.param,
            {"models": models, "images": images, "out": str(out), "stopped": stopped},
            out,
        ),
        out,
    )
    return out


def whole_state(folder: Path) -> dict[str, torch.Tensor]:
    """A saved state with the shards put together: FSDP shards along the first dimension, in rank
    order."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob("rank_*"))]
    assert files and all(int(file.metadata()["shards"]) == len(files) for file in files)
    return {key: torch.cat([file.get_tensor(key) for file in files]) for key in files[0].keys()}


def closeness(case: str) -> float:
    """The softmax is in fp32 whatever the weights are, and rounds otherwise where rows are padded
    in other company."""
    return 1e-9 if ranks_worker.CASES[case][3] == 1 else 1e-6


def assert_same(found: dict, wanted: dict, limit: float) -> None:
    assert found.keys() == wanted.keys() and wanted
    worst = max(((found[name] - wanted[name]).abs().max().item(), name) for name in wanted)
    assert worst[0] <= limit, worst


@pytest.mark.parametrize("case", ranks_worker.CASES)
def test_ranks_sum_the_same_gradients_as_a_plain_loop(ranks, folders, images, case):
    """By hand: one demonstration or one pair at a time, one backward, one division by the count of
    the whole batch, one clip. AdamW's first moment after one step is a tenth of the gradient it was
    given. (Ranks have DPO's pairs as trees.)"""
    policy, loss_of, encode, collate, rows = ranks_worker.prepare(
        case, str(folders["qwen"].parent), images
    )
    counts = []
    for index in train.shuffled(len(rows), ranks_worker.BATCH, 1, 0)[0]:
        for single in ranks_worker.apart(encode(index)):
            batch = collate([single], [1.0])
            loss, count, _ = loss_of(policy(batch), batch)
            loss.backward()
            counts.append(count)
    wanted = {
        name: p.grad / sum(counts) for name, p in policy.named_parameters() if p.requires_grad
    }
    norm = torch.cat([g.flatten() for g in wanted.values()]).norm()
    wanted = {name: g * min(1.0, 1.0 / norm.item()) for name, g in wanted.items()}
    moments = {
        key.split("|")[0]: t
        for key, t in whole_state(ranks / case / "whole" / "first").items()
        if key.endswith("|exp_avg")
    }
    assert_same({name: m / (1 - train.BETAS[0]) for name, m in moments.items()}, wanted, 1e-5)
    assert any(
        g.abs().max() > 1e-3 for g in wanted.values()
    )  # 1e-5 is small beside what is compared


@pytest.mark.parametrize("case", ranks_worker.CASES)
def test_ranks_reach_the_same_weights_as_one(ranks, by_one, folders, case):
    found = load_file(ranks / case / "weights.safetensors")
    assert_same(found, by_one(case), closeness(case))
    started = dict(hub.load_policy(folders[ranks_worker.CASES[case][1]]).model.named_parameters())
    moved = [
        name
        for name in found
        if name not in started or (found[name] - started[name].double()).abs().max() > 1e-4
    ]
    assert len(moved) > 20  # three steps of 1e-3: not the same because nothing moved


@pytest.mark.parametrize("case", ranks_worker.CASES)
def test_ranks_save_the_same_state_as_one(ranks, by_one, alone, case):
    by_one(case)
    found, wanted = (
        whole_state(folder / case / "whole" / "state" / "step_000003") for folder in (ranks, alone)
    )
    assert_same(found, wanted, closeness(case))


@pytest.mark.parametrize("case", ranks_worker.CASES)
def test_ranks_log_the_same_losses_as_one(ranks, by_one, alone, case):
    by_one(case)
    found, wanted = (schema.read_metrics(folder / case / "whole") for folder in (ranks, alone))
    assert [row["step"] for row in found] == [0, 1, 2]
    for a, b in zip(found, wanted, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in b.items() if k != "seconds"}, abs=2e-5
        )


@pytest.mark.parametrize("case", STOPPED)
def test_a_state_of_one_rank_goes_on_on_several(ranks, by_one, case):
    assert_same(load_file(ranks / case / "resumed.safetensors"), by_one(case), 1e-9)


@pytest.mark.parametrize("case", STOPPED)
def test_a_state_of_several_ranks_goes_on_on_one(ranks, by_one, folders, images, case):
    folder = ranks / case / "stopped"
    count, replicas = (
        len(list((folder / "state" / "step_000002").iterdir())),
        ranks_worker.CASES[case][5],
    )
    assert count > 1 or replicas > 1  # a file for each shard; two ranks of two replicas have one
    resumed = ranks_worker.run_case(case, str(folders["qwen"].parent), images, folder)
    assert_same(resumed, by_one(case), 1e-9)
    assert [row["step"] for row in schema.read_metrics(folder)] == [0, 1, 2]


@pytest.mark.parametrize("ranks", [pytest.param(8, id="eight", marks=eight)], indirect=True)
def test_a_state_of_eight_ranks_goes_on_on_four(ranks, by_one, folders, images, tmp_path):
    for case in STOPPED:
        shutil.copytree(ranks / case / "stopped", tmp_path / case)
    resume = {case: str(tmp_path / case) for case in STOPPED}
    finish(
        start(
            4,
            {
                "models": str(folders["qwen"].parent),
                "images": images,
                "out": str(tmp_path),
                "resume": resume,
            },
            tmp_path,
        ),
        tmp_path,
    )
    for case in STOPPED:
        assert_same(load_file(tmp_path / case / "fewer.safetensors"), by_one(case), 1e-9)


def test_a_state_that_lacks_a_rank_is_refused(ranks, folders, images, tmp_path):
    case = STOPPED[0]
    source = ranks / case / "whole" / "state" / "step_000003"
    kept = tmp_path / "state" / "step_000003"
    kept.mkdir(parents=True)
    (kept / "rank_00000.safetensors").write_bytes((source / "rank_00000.safetensors").read_bytes())
    with pytest.raises(train.Refused, match="1 of .* rank files"):
        ranks_worker.run_case(case, str(folders["qwen"].parent), images, tmp_path)


def test_both_stages_run_on_ranks_and_move_as_on_one(ranks, folders, images, tmp_path):
    """The commands themselves, in fp32. Adam turns rounding into a step where a gradient is nearly
    nothing, so the whole update is compared, not each number."""
    models = str(folders["qwen"].parent)
    ranks_worker.run_stages(models, images, tmp_path)
    before = load_file(folders["qwen"] / "model.safetensors")
    for stage in ("sft", "dpo"):
        found, wanted = (
            load_file(folder / stage / "merged" / "model.safetensors")
            for folder in (ranks, tmp_path)
        )
        assert found.keys() == wanted.keys()
        moved = sum((wanted[name] - before[name]).square().sum() for name in wanted).sqrt()
        apart = sum((wanted[name] - found[name]).square().sum() for name in wanted).sqrt()
        assert moved > 0.05 and apart < 0.01 * moved, (stage, moved, apart)
        hub.load_policy(ranks / stage / "merged")  # raises on a missing or unexpected weight
        figures = [
            json.loads((folder / stage / "stage.json").read_text())["figures"]
            for folder in (ranks, tmp_path)
        ]
        tokens = [
            {name: one.pop(name, None) for name in ("span_tokens", "response_tokens")}
            for one in figures
        ]
        assert figures[0] == pytest.approx(figures[1], abs=1e-3) and tokens[0] == tokens[1]
        assert not (ranks / stage / "state").exists()
    assert schema.read_metrics(ranks / "dpo")[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert (
        len(data.resume_jsonl(ranks / "dpo" / "reference.jsonl")) == 12
    )  # two pairs share one with another


def test_ranks_save_a_bf16_base_and_say_what_rounding_took_as_one_does(ranks, folders, tmp_path):
    ranks_worker.run_rounding(str(folders["qwen"].parent), tmp_path)
    saved = "rounding/merged/model.safetensors"
    found, wanted = (load_file(at / saved) for at in (ranks, tmp_path))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert_same(found, wanted, 0)
    found, wanted = (json.loads((at / "rounding.json").read_text()) for at in (ranks, tmp_path))
    assert found == wanted and 0 < wanted["rounding_lost"] < 1
    assert 0.5 < wanted["weights_changed"] < 1


def test_no_rank_ever_holds_the_whole_model(ranks):
    """Bytes of torch's allocator. Loading: the rank's own shards (the vision tower whole) and a
    weight on its way. Saving: on the first rank a file and a weight on its way, on the others a
    weight on its way."""
    figures = [json.loads(path.read_text()) for path in sorted(ranks.glob("memory_*.json"))]
    for rank, at in enumerate(figures):
        assert at["own"] <= at["frozen"] + 1.02 * (at["whole"] - at["frozen"]) / len(
            figures
        )  # a last shard may be smaller
        assert at["own"] <= at["load"] <= at["own"] + at["largest"], at
        assert at["save"] <= (at["limit"] if rank == 0 else 0) + 3 * at["largest"] < at["whole"], at
    hub.load_policy(ranks / "saved")


# --------------------------------------------------------------------------------------------------
# kill -9 of the commands themselves


def command(stage: str, folder: Path, base: Path, out: str) -> list[str]:
    given = (
        ["--demos", str(folder / "demos.jsonl")]
        if stage == "sft"
        else ["--pairs", str(folder / "pairs.jsonl")]
    )
    return [
        stage,
        "--model",
        str(base),
        *given,
        "--images",
        str(folder),
        "--out",
        str(folder / out),
        "--pixels",
        str(56 * 56),
        "--batch",
        "2",
        "--epochs",
        "5",
        "--lr",
        "1e-3",
        "--save-every",
        "2",
    ]


def lines(folder: Path) -> list[str]:
    """Finished lines of a metrics file that another process is writing."""
    path = folder / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def newest(folder: Path) -> int:
    """The step of the state in force."""
    return max(
        int(path.name.removeprefix("step_")) for path in (folder / "state").glob("step_*[0-9]")
    )


@pytest.mark.parametrize(
    "count, stage, base",
    [(1, "dpo", "qwen"), (2, "sft", "internvl"), pytest.param(8, "dpo", "qwen", marks=eight)],
)
def test_kill_minus_nine_at_a_random_step_and_while_saving_changes_no_bit(
    folders, images, tmp_path, count, stage, base
):
    """One run killed three times: at a random moment, half-way through a state's file, half-way
    through the checkpoint's."""
    write_rows(images, tmp_path, 10)
    killed, straight = (
        command(stage, tmp_path, folders[base], name) for name in ("killed", "straight")
    )
    out, spec = tmp_path / "killed", {"mains": [killed], "pids": str(tmp_path), "die": None}

    running = start(count, spec, tmp_path, "first")
    deadline, wanted = time.time() + 400, random.randint(3, 12)
    while len(lines(out)) < wanted:
        assert running.poll() is None and time.time() < deadline, (
            tmp_path / "first.txt"
        ).read_text()[-2000:]
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.1))
    for path in tmp_path.glob("pid_*"):
        os.kill(int(path.read_text()), signal.SIGKILL)
    assert running.wait(120) != 0 and not (out / "merged").exists()

    begun = [newest(out)]
    for log, die in (
        ("state", [count - 1, f"step_{begun[0] + 4:06d}.tmp"]),
        ("checkpoint", [0, "merged/saving.tmp"]),
    ):  # of the last step: 25
        assert start(count, spec | {"die": die}, tmp_path, log).wait(400) != 0
        assert f"resumed at step {begun[-1]} of 25" in (tmp_path / f"{log}.txt").read_text()
        begun.append(newest(out))
    assert (
        begun == [begun[0], begun[0] + 2, 25]
        and (out / "state" / f"step_{begun[0] + 4:06d}.tmp").exists() is False
    )
    assert (out / "merged" / "saving.tmp").exists() and not list(
        (out / "merged").glob("*.safetensors")
    )

    said = finish(
        start(count, spec | {"mains": [killed, straight]}, tmp_path, "last"), tmp_path, "last"
    )
    assert "resumed at step 25 of 25" in said and not (out / "merged" / "saving.tmp").exists()
    found, wanted = (
        load_file(tmp_path / name / "merged" / "model.safetensors")
        for name in ("killed", "straight")
    )
    assert (
        found.keys() == wanted.keys()
        and [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    )
    assert any(
        not torch.equal(tensor, wanted[name])
        for name, tensor in load_file(folders[base] / "model.safetensors").items()
    )
    metrics = [
        [
            {k: v for k, v in row.items() if k != "seconds"}
            for row in schema.read_metrics(tmp_path / name)
        ]
        for name in ("killed", "straight")
    ]
    assert metrics[0] == metrics[1] and [row["step"] for row in metrics[0]] == list(range(25))
    assert not (out / "state").exists()


def write_rows(images: str, folder: Path, count: int) -> None:
    for film in Path(images).iterdir():
        shutil.copy(film, folder)
    data.write_jsonl(folder / "demos.jsonl", ranks_worker.mixed_rows("sft", count=count))
    data.write_jsonl(folder / "pairs.jsonl", ranks_worker.mixed_rows("dpo", count=count))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("count, stage, base", [(1, "dpo", "qwen"), (2, "sft", "internvl")])
def test_a_kill_after_the_last_step_costs_no_step_and_a_finished_run_is_left_alone(
    folders, images, tmp_path, count, stage, base
):
    """Killed with all saved but stage.json, then half-way through removing the states; then run
    twice more."""
    write_rows(images, tmp_path, 3)
    straight, killed = (
        [*command(stage, tmp_path, folders[base], name), "--save-every", "7"]
        for name in ("straight", "killed")
    )
    out, spec = tmp_path / "killed", {"mains": [killed], "pids": str(tmp_path), "die": None}

    assert (
        start(
            count, spec | {"mains": [straight, killed], "die": [0, "finish"]}, tmp_path, "finish"
        ).wait(400)
        != 0
    )
    assert (out / "merged").exists() and not (out / "stage.json").exists() and newest(out) == 10
    metrics = (out / "metrics.jsonl").read_bytes()

    assert start(count, spec | {"die": [0, "dropping"]}, tmp_path, "dropping").wait(400) != 0
    said = (tmp_path / "dropping.txt").read_text()
    assert "resumed at step 10 of 10" in said and "step 00" not in said
    assert (out / "stage.json").exists() and (out / "state" / "step_000010").exists()
    before = {
        name: content for name, content in contents(out).items() if not name.startswith("state")
    }

    assert "is finished already" in finish(start(count, spec, tmp_path, "again"), tmp_path, "again")
    assert contents(out) == before and before["metrics.jsonl"] == metrics
    assert contents(out / "merged") == contents(tmp_path / "straight" / "merged")

    assert (
        start(count, spec | {"mains": [[*killed, "--lr", "2e-3"]]}, tmp_path, "other").wait(400)
        == 1
    )
    assert (
        "was finished with other settings or inputs (lr 0.001 -> 0.002)"
        in (tmp_path / "other.txt").read_text()
    )
    assert contents(out) == before


@pytest.mark.parametrize("count, done, chains", [(1, 3, 9), (2, 6, 15)])
def test_a_reference_pass_that_was_killed_computes_only_the_rest_to_the_same_values(
    folders, images, tmp_path, count, done, chains
):
    """The first rank dies in its fourth round, after the two forwards of the gate. The last line
    of the file is torn then, as where a machine stops."""
    write_rows(images, tmp_path, 10)
    straight, killed = (
        [*command("dpo", tmp_path, folders["qwen"], name), "--epochs", "1", "--micro-tokens", "1"]
        for name in ("straight", "killed")
    )
    path, spec = tmp_path / "killed" / "reference.jsonl", {"pids": str(tmp_path)}
    spoilt = spec | {"mains": [straight, killed], "die": [0, "forward 6"]}
    assert start(count, spoilt, tmp_path, "first").wait(400) != 0
    whole = (tmp_path / "straight" / "reference.jsonl").read_bytes()
    assert path.read_bytes().splitlines() == whole.splitlines()[:chains]  # of the longest rows
    with open(path, "ab") as file:
        file.write(whole.splitlines()[chains][:50])
    said = finish(
        start(count, spec | {"mains": [killed], "die": None}, tmp_path, "last"), tmp_path, "last"
    )
    assert f"reference: {7 - done} trees computed, {done} from reference.jsonl" in said
    assert path.read_bytes() == whole and said.count("dropped a torn last line") == 1


@pytest.mark.parametrize("count, base", [(1, "internvl"), (2, "qwen")])
def test_stage_two_killed_in_each_of_its_passes_ends_as_one_that_was_not_to_the_bit(
    folders, images, tmp_path, count, base
):
    write_rows(images, tmp_path, 90)  # enough pairs to hold some out
    more = ["--epochs", "1", "--micro-tokens", "900", "--batch", "8"]
    straight, killed = (
        [*command("dpo", tmp_path, folders[base], name), *more] for name in ("straight", "killed")
    )
    spec = {"mains": [killed], "pids": str(tmp_path)}
    for moment in ("plan", "reference", "step_000004.tmp", "after"):
        code = start(count, spec | {"die": [0, moment]}, tmp_path, moment).wait(400)
        assert code == (-9 if count == 1 else 1), moment  # torchrun's own code
        assert not (tmp_path / "killed" / "stage.json").exists()
    last = start(count, spec | {"mains": [killed, straight], "die": None}, tmp_path, "last")
    said = finish(last, tmp_path, "last")
    assert "held out: 16 pairs" in said and "resumed at step 10 of 10" in said
    for name in ("reference.jsonl", "after.jsonl", "merged/model.safetensors"):
        found, wanted = ((tmp_path / run / name).read_bytes() for run in ("killed", "straight"))
        assert found == wanted, name
    metrics = [
        [
            {k: v for k, v in row.items() if k != "seconds"}
            for row in schema.read_metrics(tmp_path / run)
        ]
        for run in ("killed", "straight")
    ]
    assert metrics[0] == metrics[1] and "held_loss" in metrics[0][-1]


# --------------------------------------------------------------------------------------------------
# Two ranks started by hand, as on two nodes: what one of them refuses


def by_hand(folder: Path, arguments: list[str]) -> list[tuple[int, str]]:
    """(exit code, what it printed) of the two ranks of sft.py, each in a working directory of its
    own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    running = []
    for rank in (0, 1):
        (folder / f"node{rank}").mkdir(exist_ok=True)
        environment = os.environ | meeting | {"RANK": str(rank), "OMP_NUM_THREADS": "1"}
        options = {
            "cwd": folder / f"node{rank}",
            "env": environment,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        running.append(
            subprocess.Popen([sys.executable, str(ROOT / "sft.py"), *arguments], **options)
        )
    said = [process.communicate(timeout=200)[0] for process in running]
    return [(process.returncode, text) for process, text in zip(running, said)]


REFUSED = {  # what is wrong -> (flags, what is said once)
    "OUT is on a disk of each node": (
        ["--out", "out"],
        "--out out: rank 1 cannot see what rank 0 wrote there; "
        "OUT must lie on a disk that all nodes share",
    ),
    "OUT is a file": (["--out", "{folder}/demos.jsonl"], "demos.jsonl: a folder is wanted there"),
    "one node lacks the images": (
        ["--out", "{folder}/out", "--images", "films"],
        "gate: all 4 demonstrations are valid: false",
    ),
    "replicas that do not divide": (
        ["--out", "{folder}/out", "--replicas", "3"],
        "--replicas 3 does not divide the number of ranks, 2",
    ),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_one_rank_refuses_ends_all_ranks_with_one_text_and_no_traceback(
    folders, images, tmp_path, wrong
):
    write_rows(images, tmp_path, 4)
    if "lacks" in wrong:
        shutil.copytree(images, tmp_path / "node0" / "films")
    flags, said = REFUSED[wrong]
    given = [
        "--model",
        str(folders["qwen"]),
        "--demos",
        str(tmp_path / "demos.jsonl"),
        "--images",
        str(images),
        "--pixels",
        str(56 * 56),
    ]
    ended = by_hand(tmp_path, [*given, *(flag.format(folder=tmp_path) for flag in flags)])
    printed = ended[0][1] + ended[1][1]
    assert [code for code, _ in ended] == [1, 1], printed
    assert printed.count(said) == 1 and "Traceback" not in printed, printed
    assert not list(tmp_path.glob("**/metrics.jsonl"))
