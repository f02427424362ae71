"""clinic/zero3.py, on two ranks and on four, against one process and against FSDP2.

Each number of ranks is one launch of this very file under torchrun (`work`); the tests read what it
left behind. With 3 rows, two ranks have 2 and 1, and of four ranks one has none.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clinic import zero3

STEPS = 3


class Held(TorchDispatchMode):
    """The bytes of all living tensors that were made under it, activations too, at their most."""

    def __init__(self):
        super().__init__()
        self.living, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.living[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.living = {key: one for key, one in self.living.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.living.values()))
        return result


def plain_training(rank: int, world_size: int, shard=None) -> dict[str, torch.Tensor]:
    """The same training by a plain nn.Module, or one that `shard` shards: each block's weights and
    first moments, flat. FSDP averages gradients over ranks, so the local sum is multiplied by
    their number."""
    network = nn.Sequential(*[zero3.build(index) for index in range(zero3.DEPTH + 1)])
    if shard:
        for part in [*network, network]:
            shard(part)
    optimizer = torch.optim.AdamW(network.parameters(), lr=zero3.LR)
    x, y = zero3.batch()
    for _ in range(STEPS):
        error = network(x[rank::world_size]) - y[rank::world_size]
        (error.square().sum() / y.numel() * world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = lambda tensor: (tensor.full_tensor() if shard else tensor).detach().flatten()
    found = {}
    for index, block in enumerate(network):
        own = list(block.parameters())
        found[f"{index} weights"] = torch.cat([whole(p) for p in own])
        moments = [whole(optimizer.state[p]["exp_avg"]) for p in own]
        found[f"{index} moments"] = torch.cat(moments)
    return found


def work(out: Path) -> None:
    """A rank: trains by hand under the counters, then by FSDP2. Rank 0 saves what came out."""
    ring, passed, isend = zero3.begin(), [], dist.isend
    dist.isend = lambda piece, to: passed.append(piece.nbytes) or isend(piece, to)
    rows, step = [], zero3.take_step
    zero3.take_step = lambda *given: rows.append(len(given[-1])) or step(*given)
    with Held() as held:
        blocks, optimizer = zero3.train(ring, STEPS)
    dist.isend = isend
    zero3.report(ring, blocks, optimizer, STEPS)
    figures = {"peak": held.peak, "counted": ring.sent, "passed": sum(passed), "rows": rows}
    (out / f"rank_{ring.rank}.json").write_text(json.dumps(figures))

    by_hand = {}
    for index, block in enumerate(blocks):
        weights = [weight.detach().flatten() for weight in block.gather().values()]
        by_hand[f"{index} weights"] = torch.cat(weights)
        moments = ring.all_gather(optimizer.state[block.shard]["exp_avg"])
        by_hand[f"{index} moments"] = moments[: by_hand[f"{index} weights"].numel()].clone()

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ring.world_size,))
    by_fsdp = plain_training(ring.rank, ring.world_size, lambda part: fully_shard(part, mesh=mesh))
    if ring.rank == 0:
        save_file(by_hand, out / "hand.safetensors")
        save_file(by_fsdp, out / "fsdp.safetensors")
    dist.barrier()  # no rank leaves while another still receives
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as ranks_worker.py: at Python's own end, threads of FSDP2's group may abort


def launch(count: int, *command: str) -> str:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    done = subprocess.run(
        [sys.executable, *(torchrun if count > 1 else []), *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory) -> tuple[int, Path]:
    """(N, the folder with what N ranks left)"""
    out = tmp_path_factory.mktemp(f"zero{request.param}")
    (out / "said.txt").write_text(launch(request.param, __file__, str(out)))
    return request.param, out


def padded(count: int) -> list[int]:
    """Each block's number of weights on `count` ranks"""
    blocks = [zero3.build(index) for index in range(zero3.DEPTH + 1)]
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    assert any(size % count for size in sizes)  # something is padded
    return [-(-size // count) * count for size in sizes]


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """AdamW's step hardly sees a gradient's scale; its first moment does, and is compared too."""
    assert found.keys() == wanted.keys() and len(found) == 2 * (zero3.DEPTH + 1)
    for name in wanted:
        assert found[name].shape == wanted[name].shape
        assert (found[name] - wanted[name]).abs().max() <= 1e-6, name
        assert wanted[name].abs().max() > 1e-3, name  # 1e-6 is small beside what is compared


def test_zero3_by_hand_ends_with_the_weights_of_one_process(ranks):
    found = load_file(ranks[1] / "hand.safetensors")
    assert_same(found, plain_training(0, 1))
    for index in range(zero3.DEPTH + 1):  # not the same because nothing moved
        before = torch.cat([p.detach().flatten() for p in zero3.build(index).parameters()])
        assert (found[f"{index} weights"] - before).abs().max() > zero3.LR


def test_zero3_by_hand_ends_with_the_weights_of_fsdp2(ranks):
    found, wanted = (load_file(ranks[1] / f"{name}.safetensors") for name in ("hand", "fsdp"))
    assert_same(found, wanted)


def test_a_rank_holds_and_sends_the_bytes_that_the_formulas_say(ranks):
    count, out = ranks
    p, said = sum(padded(count)), (out / "said.txt").read_text()
    parts = re.search(r"held  (\d+) weights \+ (\d+) gradients \+ (\d+) moments = (\d+)", said)
    assert [int(part) * count for part in parts.groups()] == [4 * p, 4 * p, 8 * p, 16 * p]
    sent = int(re.search(r"sent  (\d+) per step", said)[1])
    assert sent * count == 3 * 4 * p * (count - 1)
    assert [int(formula) for formula in re.findall(r"formula: .* = (\d+)", said)] == [
        16 * p // count,
        sent,
    ]
    for rank in range(count):
        figures = json.loads((out / f"rank_{rank}.json").read_text())
        assert figures["counted"] == figures["passed"] == sent * STEPS


def test_every_row_is_computed_by_one_rank(ranks):
    """The gradients' sum over the count would be the same if every rank computed every row."""
    figures = [json.loads(path.read_text()) for path in ranks[1].glob("rank_*.json")]
    assert len(figures) == ranks[0]
    assert [sum(rows) for rows in zip(*(at["rows"] for at in figures))] == [zero3.ROWS] * STEPS


def test_no_rank_holds_more_than_its_shards_and_one_whole_block(ranks):
    """The block's whole weights and gradient; a quarter of its weights is left for activations."""
    count, out = ranks
    shards, block = 16 * sum(padded(count)) // count, 4 * max(padded(count))
    for rank in range(count):
        peak = json.loads((out / f"rank_{rank}.json").read_text())["peak"]
        assert shards + block < peak <= shards + 2 * block + block // 4, (peak, shards, block)


def test_the_command_takes_the_same_steps_alone_as_on_two_ranks():
    alone, two = (launch(count, "-m", "clinic.zero3").splitlines() for count in (1, 2))
    losses = [
        [float(line.split()[-1]) for line in said if line.startswith("step")]
        for said in (alone, two)
    ]
    assert len(losses[0]) == zero3.STEPS and losses[0] == pytest.approx(losses[1], abs=2e-6)
    assert losses[0][-1] < 0.5 * losses[0][0]
    assert "sent  0 per step" in alone


if __name__ == "__main__":
    work(Path(sys.argv[1]))
