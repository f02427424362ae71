"""The loop: order, schedule and one step by hand, and a run that was stopped ends in the very
weights of one that was not."""

import argparse
import math
import os
import random
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks_worker import Stop, demo, fit
from torch import nn

import data
import hub
import model
import sft
import train
from command import schema, stage

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------
# A toy: small enough to write its training out by hand


@dataclass
class Points:
    x: torch.Tensor
    y: torch.Tensor
    row_weights: torch.Tensor

    def to(self, device) -> "Points":
        return Points(self.x.to(device), self.y.to(device), self.row_weights.to(device))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, batch: Points) -> torch.Tensor:
        return self.inner(batch.x)[:, 0]


def toy_rows(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(3, generator=generator), 5 * torch.randn((), generator=generator))
        for _ in range(count)
    ]


def toy_collate(rows: list, weights: list[float]) -> Points:
    return Points(
        torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]), torch.tensor(weights)
    )


def toy_loss(out: torch.Tensor, batch: Points) -> tuple:
    return ((out - batch.y).square() * batch.row_weights).sum(), float(batch.row_weights.sum()), {}


def toy_fit(
    toy: nn.Module,
    out: Path,
    encode=None,
    loss=toy_loss,
    save_every: int = 0,
    budget: int = 2,
    **changes,
) -> list[dict]:
    rows = toy_rows(10)
    settings = (
        dict(peak=0.05, budget=budget, warmup=0.4, save_every=save_every, print_every=100) | changes
    )
    plan = train.shuffled(len(rows), 4, 2, 3)
    return fit(
        toy, loss, encode or (lambda i: rows[i]), toy_collate, plan, out=out, device=CPU, **settings
    )


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def untimed(history: list[dict]) -> list[dict]:
    """Metrics without the one figure that differs from run to run."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def assert_bits(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys() and wanted
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


# --------------------------------------------------------------------------------------------------
# Order and schedule


@pytest.mark.parametrize("rows, batch", [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_an_epoch_sees_every_row_once_and_its_last_batch_may_be_smaller(rows, batch):
    per_epoch = -(-rows // batch)
    for epoch in range(3):
        batches = train.shuffled(rows, batch, 3, 7)[epoch * per_epoch :][:per_epoch]
        assert sorted(index for part in batches for index in part) == list(range(rows))
        assert [len(part) for part in batches[:-1]] == [batch] * (per_epoch - 1) and len(
            batches[-1]
        ) == rows - batch * (per_epoch - 1)


def test_rows_dealt_by_length_make_ranks_wait_little():
    """Steps of 64 rows on 8 ranks, one row at a time, lengths with a coefficient of variation of
    .5: time over the time of equal shares, if ranks wait at the end of a step, and after each row.
    As they are shuffled the second is above 1.8."""
    spread = np.sqrt(np.log(1 + 0.5**2))
    lengths = np.random.default_rng(0).lognormal(7, spread, 64 * 50).astype(int).tolist()
    assert np.std(lengths) / np.mean(lengths) == pytest.approx(0.5, abs=0.03)
    plan = train.shuffled(len(lengths), 64, 1, 0)
    waited = [max(lengths[i] for i in step[at : at + 8]) for step in plan for at in range(0, 64, 8)]
    shuffled = 8 * sum(waited) / sum(lengths)
    assert shuffled > 1.8 and 1 / train.micro_batch_shape(plan, 1, 8, lengths)[0] <= 1.17
    shares = [train.deal_rows(step, 1, 8, lengths) for step in plan]
    longest = [max(sum(lengths[i] for ((i, _),) in rank) for rank in ranks) for ranks in shares]
    assert 8 * sum(longest) / sum(lengths) <= 1.08


def test_the_largest_micro_batch_counts_its_padding():
    lengths = [100, 30, 29, 28, 27]
    assert train.micro_batch_shape([[0, 1, 2], [3, 4]], 90, 1, lengths)[1:] == (1, 100)
    assert train.micro_batch_shape([[1, 2, 3, 4]], 90, 1, lengths)[1:] == (3, 30)
    # 120 tokens, 114 of rows
    assert train.micro_batch_shape([[1, 2, 3, 4]], 120, 1, lengths) == (114 / 120, 4, 30)


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    first = train.order(50, 1, 0)
    random.seed(99)
    random.random()
    torch.rand(3)
    assert train.order(50, 1, 0) == first  # the global generators have no part in it
    assert (
        first != train.order(50, 2, 0)
        and first != train.order(50, 1, 1)
        and first != list(range(50))
    )
    assert train.shuffled(50, 8, 1, 1)[3] == first[24:32]
    assert len(train.shuffled(50, 1, 1.1, 1)) == 55  # 1.1 * 50 is a little more in floats


@pytest.mark.parametrize(
    "count, micro, world", [(7, 2, 3), (8, 1, 4), (1, 4, 8), (5, 3, 2), (64, 1, 8), (9, 4, 2)]
)
def test_ranks_get_equally_many_micro_batches_and_each_row_counts_once(count, micro, world):
    indices = list(range(100, 100 + count))
    parts = train.deal_rows(indices, micro, world)
    assert len({len(part) for part in parts}) == 1
    rows = [row for part in parts for batch in part for row in batch]
    assert sorted(index for index, weight in rows if weight == 1.0) == indices
    assert {weight for _, weight in rows} <= {0.0, 1.0} and all(
        index in indices for index, _ in rows
    )
    assert all(0 < len(batch) <= micro for part in parts for batch in part)
    assert len(parts[0]) == math.ceil(
        math.ceil(count / world) / micro
    )  # no rank works longer than it must


def test_the_learning_rate_rises_straight_and_falls_as_a_cosine():
    rates = [train.learning_rate(step, 10, 2.0, 0.2) for step in range(10)]
    assert rates[:3] == [
        1.0,
        2.0,
        2.0,
    ]  # two of ten steps to warm up; the cosine begins at its peak
    assert rates[4] == pytest.approx(1 + math.cos(math.pi / 4), abs=1e-12)
    assert rates[6] == pytest.approx(1.0, abs=1e-12)  # half way down
    assert rates[9] == pytest.approx(1 + math.cos(math.pi * 7 / 8), abs=1e-12)
    assert train.learning_rate(10, 10, 2.0, 0.2) == pytest.approx(0.0, abs=1e-12)
    assert (
        train.learning_rate(0, 1, 2.0, 0.1) == 2.0
    )  # a run of one step is not spent on warming up


# --------------------------------------------------------------------------------------------------
# The step


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fit_is_a_plain_adamw_loop_over_means_clipped_at_one(tmp_path, decay):
    by_hand = Toy()
    rows, history = toy_rows(10), []
    optimizer = torch.optim.AdamW(
        by_hand.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay
    )
    for step in range(
        6
    ):  # ten rows in fours: three steps an epoch, two epochs, two of six to warm up
        lr = (
            0.05 * (step + 1) / 2
            if step < 2
            else 0.05 * (1 + math.cos(math.pi * (step - 2) / 4)) / 2
        )
        chosen = train.order(10, 3, step // 3)[4 * (step % 3) : 4 * (step % 3) + 4]
        x, y = torch.stack([rows[i][0] for i in chosen]), torch.stack([rows[i][1] for i in chosen])
        loss = (by_hand.inner(x)[:, 0] - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in by_hand.parameters()))
        for p in by_hand.parameters():
            p.grad *= min(1.0, 1.0 / norm)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        history.append((loss.item(), norm, lr))
    assert max(norm for _, norm, _ in history) > 2  # the clip had something to do
    toy = Toy()
    found = toy_fit(toy, tmp_path, weight_decay=decay)
    for name, wanted in weights_of(by_hand).items():
        torch.testing.assert_close(dict(toy.named_parameters())[name], wanted, rtol=0, atol=1e-6)
    for row, (loss, norm, lr) in zip(found, history, strict=True):
        assert row["loss"] == pytest.approx(loss, abs=2e-5) and row["grad_norm"] == pytest.approx(
            norm, abs=1e-3
        )
        assert row["lr"] == pytest.approx(lr, abs=1e-12)


def test_accumulation_takes_the_same_step_as_one_large_batch(folders, tmp_path):
    """Rows of unequal length: a mean of the micro-batches' means would weigh a token by the company
    it keeps."""
    processor = model.Processor(folders["qwen"], 56 * 56, 1)
    encoded = [sft.encode_demo(demo(index), processor, tmp_path) for index in range(8)]
    assert len({len(row[1].ids) for row in encoded}) > 3
    runs = []
    for micro in (1, 3, 4):
        policy = hub.load_policy(folders["qwen"])
        policy.freeze_vision()
        policy.double()
        fit(
            policy,
            lambda logp, b: sft.sft_loss(logp, b, dict.fromkeys(data.SPAN_NAMES, 1.0)),
            lambda i: encoded[i],
            lambda r, w: model.collate(r, processor, w),
            train.shuffled(len(encoded), 4, 1.5, 0),
            out=tmp_path / str(micro),
            device=CPU,
            peak=1e-3,
            budget=micro,
            warmup=0.1,
            save_every=0,
            print_every=100,
        )
        runs.append(weights_of(policy))
    for run in runs[1:]:
        assert (
            max((run[name] - runs[0][name]).abs().max().item() for name in run) < 2e-6
        )  # three steps of up to 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_does_harm(tmp_path, bad):
    toy, calls, before = Toy(), [], {}

    def loss(out, batch):
        calls.append(1)
        if len(calls) == 5:  # the third step's first micro-batch
            before.update(weights_of(toy))
        total, count, figures = toy_loss(out, batch)
        return total * (bad if len(calls) == 5 else 1.0), count, figures

    with pytest.raises(train.Refused, match="step 3: .* those after 2 steps"):
        toy_fit(toy, tmp_path, loss=loss)
    assert_bits(weights_of(toy), before)
    assert not torch.equal(
        before["inner.0.weight"], Toy().inner[0].weight
    )  # two good steps were taken
    assert [row["step"] for row in schema.read_metrics(tmp_path)] == [0, 1]


# --------------------------------------------------------------------------------------------------
# What a step says


def lines_of(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]


def test_a_steps_line_tells_its_rate_and_what_is_left_of_this_run(tmp_path, capsys, monkeypatch):
    """Six steps by a clock that gains ten seconds whenever it is read: once at the beginning, and
    at the beginning and the end of each step."""
    lengths = [100 + 7 * index for index in range(10)]

    def timed(out: str, **changes) -> list[str]:
        ticks = iter(range(0, 10_000, 10))
        monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: next(ticks)))
        toy_fit(Toy(), tmp_path / out, print_every=1, lengths=lengths, **changes)
        return lines_of(capsys)

    lines = timed("whole", save_every=1)
    for step, line in enumerate(lines):
        tokens = sum(lengths[index] for index in train.shuffled(10, 4, 3, 3)[step])
        assert f" | {tokens / 10:7,.0f} tokens/s | " in line and line.endswith("seconds        10")
        left = 20 * (5 - step)
        assert f" | left 0:{left // 60:02}:{left % 60:02} | " in line
    assert len(lines) == 6 and len(set(map(len, lines))) == 1  # column under column
    assert timed("whole", save_every=1) == []  # goes on after the last step

    class Wait(Exception):
        pass

    def dies(index: int):
        if (tmp_path / "killed" / "state" / "step_000004").exists():
            raise Wait
        return toy_rows(10)[index]

    with pytest.raises(Wait):
        timed("killed", save_every=1, encode=dies)
    capsys.readouterr()
    resumed = timed("killed", save_every=1)
    left = [line.split(" | ")[1] for line in resumed]
    assert left == ["left 0:00:20", "left 0:00:00"]  # by its own two steps


def test_the_metrics_are_the_same_whether_a_line_tells_a_rate_or_not(tmp_path):
    plain = toy_fit(Toy(), tmp_path / "plain")
    told = toy_fit(Toy(), tmp_path / "told", lengths=[5] * 10, budget=10)
    assert untimed(plain) == untimed(told) and plain[0].keys() == told[0].keys()


# --------------------------------------------------------------------------------------------------
# State


def one_step(toy: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
    batch = toy_collate(toy_rows(10)[index : index + 2], [1.0, 1.0]).to(
        next(toy.parameters()).device
    )
    toy_loss(toy(batch), batch)[0].backward()
    optimizer.step()
    optimizer.zero_grad()


with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(
    "device, fused", [("cpu", True), ("cpu", False), pytest.param("cuda", True, marks=with_gpu)]
)
def test_a_saved_state_comes_back_to_the_last_bit_and_so_does_the_next_step(
    tmp_path, device, fused
):
    toy = Toy().to(device)
    optimizer = torch.optim.AdamW(toy.parameters(), lr=0.1, fused=fused)
    for index in range(3):
        one_step(toy, optimizer, index)
    train.save_state(tmp_path, toy, optimizer, 3)
    other = Toy().to(device)
    again = torch.optim.AdamW(other.parameters(), lr=0.1, fused=fused)
    assert train.load_state(tmp_path, other, again) == 3
    assert_bits(weights_of(other), weights_of(toy))
    for mine, theirs in zip(toy.parameters(), other.parameters(), strict=True):
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[mine][kind], again.state[theirs][kind])
    one_step(toy, optimizer, 5)
    one_step(other, again, 5)
    assert_bits(weights_of(other), weights_of(toy))


def test_a_half_written_state_is_passed_over_and_the_next_save_clears_it(tmp_path):
    toy = Toy()
    optimizer = torch.optim.AdamW(toy.parameters(), lr=0.1)
    assert train.load_state(tmp_path / "none", toy, optimizer) == 0
    one_step(toy, optimizer, 0)
    train.save_state(tmp_path, toy, optimizer, 2)
    whole = (tmp_path / "step_000002" / "rank_00000.safetensors").read_bytes()
    (tmp_path / "step_000004.tmp").mkdir()
    (tmp_path / "step_000004.tmp" / "rank_00000.safetensors").write_bytes(whole[: len(whole) // 2])
    assert train.load_state(tmp_path, toy, optimizer) == 2
    train.save_state(tmp_path, toy, optimizer, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000004"]


def test_a_kill_between_two_states_leaves_the_newer_one_in_force(tmp_path):
    toy = Toy()
    optimizer = torch.optim.AdamW(toy.parameters(), lr=0.1)
    one_step(toy, optimizer, 0)
    train.save_state(tmp_path, toy, optimizer, 2)
    shutil.copytree(tmp_path / "step_000002", tmp_path / "kept")
    one_step(toy, optimizer, 1)
    train.save_state(tmp_path, toy, optimizer, 4)
    (tmp_path / "kept").rename(
        tmp_path / "step_000002"
    )  # as if the kill came before the older one was removed
    other = Toy()
    assert train.load_state(tmp_path, other, torch.optim.AdamW(other.parameters(), lr=0.1)) == 4
    assert_bits(weights_of(other), weights_of(toy))


@pytest.mark.parametrize("stop", range(6))
@pytest.mark.parametrize("save_every", [1, 2])
def test_a_run_stopped_in_any_step_ends_in_the_same_weights_and_logs_each_step_once(
    tmp_path, stop, save_every
):
    straight, rows, seen = Toy(), toy_rows(10), []
    wanted = toy_fit(straight, tmp_path / "straight", save_every=save_every)

    def dies(index: int):
        seen.append(index)
        if len(seen) == sum(map(len, train.shuffled(10, 4, 3, 3)[:stop])) + 1:
            raise Stop
        return rows[index]

    with pytest.raises(Stop):
        toy_fit(Toy(), tmp_path / "killed", encode=dies, save_every=save_every)
    resumed = Toy()
    found = toy_fit(resumed, tmp_path / "killed", save_every=save_every)
    assert_bits(weights_of(resumed), weights_of(straight))
    for history in (found, schema.read_metrics(tmp_path / "killed")):
        assert untimed(history) == untimed(wanted)


@pytest.mark.parametrize("save_every", [1, 4, 100])
def test_the_last_step_has_a_state_and_a_run_that_goes_on_from_it_takes_no_step(
    tmp_path, save_every
):
    straight, resumed = Toy(), Toy()
    wanted = toy_fit(straight, tmp_path, save_every=save_every)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000006"]

    def encode(index: int):
        raise AssertionError("a row is asked for")

    assert toy_fit(resumed, tmp_path, encode=encode, save_every=save_every) == wanted
    assert_bits(weights_of(resumed), weights_of(straight))


def test_a_run_that_keeps_no_state_has_none_of_its_last_step(tmp_path):
    toy_fit(Toy(), tmp_path, save_every=0)
    assert not (tmp_path / "state").exists()


def test_a_resumed_run_never_leaves_its_metrics_empty(tmp_path):
    """A second name for the file shows whether it is emptied and written again, or replaced whole.
    A kill in between would lose the figures of every step so far."""
    rows, seen = toy_rows(10), []

    def dies(index: int):
        seen.append(index)
        if len(seen) == 15:
            raise Stop
        return rows[index]

    with pytest.raises(Stop):
        toy_fit(Toy(), tmp_path, encode=dies, save_every=2)
    os.link(tmp_path / "metrics.jsonl", tmp_path / "second name")
    toy_fit(Toy(), tmp_path, save_every=2)
    assert len((tmp_path / "second name").read_text().splitlines()) == 4


def settings(tmp_path: Path, lr: float = 1e-4, micro_tokens: int = 1) -> argparse.Namespace:
    return argparse.Namespace(out=str(tmp_path / "out"), lr=lr, micro_tokens=micro_tokens)


def test_a_state_goes_on_only_under_the_settings_it_was_begun_with(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text("{}\n")
    assert train.begin(settings(tmp_path), [source])
    (tmp_path / "out" / "state").mkdir()  # the run was killed after it had saved a state
    assert train.begin(settings(tmp_path, micro_tokens=4), [source])  # only rounding changes
    with pytest.raises(data.RowError, match="lr 0.0001 -> 0.001"):
        train.begin(settings(tmp_path, lr=1e-3), [source])
    source.write_text("{} \n")
    with pytest.raises(data.RowError, match="rows.jsonl changed"):
        train.begin(settings(tmp_path), [source])
    (tmp_path / "out" / "state").rmdir()  # nothing was made: a new one may begin
    assert train.begin(settings(tmp_path, lr=1e-3), [source])


def test_a_finished_run_begins_no_other_and_loses_what_is_left_of_its_states(tmp_path):
    assert train.begin(settings(tmp_path), [])
    result = tmp_path / "out" / "weights"
    result.write_text("trained")
    stage.finish(settings(tmp_path), [result], 0.0, {})
    (tmp_path / "out" / "state" / "step_000006").mkdir(parents=True)  # killed while it removed them
    with pytest.raises(
        data.RowError, match="was finished with other settings .*lr 0.0001 -> 0.001"
    ):
        train.begin(settings(tmp_path, lr=1e-3), [])
    assert not train.begin(settings(tmp_path), [])
    assert result.read_text() == "trained" and not (tmp_path / "out" / "state").exists()


def test_a_file_is_seen_once_a_slow_disk_shows_it_as_it_was_written(tmp_path, monkeypatch):
    path = tmp_path / "begun.json"
    monkeypatch.setattr(train, "SIGHT", 1)
    assert not train.sees(path, b"new")
    path.write_bytes(b"old")
    assert not train.sees(path, b"new")
    monkeypatch.setattr(train, "SIGHT", 60)
    later = threading.Timer(0.5, path.write_bytes, [b"new"])
    later.start()
    assert train.sees(path, b"new")
    later.join()


def test_micro_batches_that_are_given_up_are_not_waited_for():
    """The garbage collector may close the iterator in a thread whose lock the waiting needs."""
    may_go, made = threading.Event(), []

    def make(item: int) -> int:
        if item:
            may_go.wait(20)
        made.append(item)
        return item

    batches = train.ahead(range(9), make)
    assert next(batches) == 0
    batches.close()
    assert made == [0]  # the thread is still at work on the next one
    may_go.set()
