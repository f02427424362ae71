"""Will it fit? Predicted memory against the live tensors of real training steps, and the published
models in figures by hand."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks_worker import collate_pairs, fit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForImageTextToText

import data
import dpo
import lora
import medee
import memory
import model
import sft
import train

IMAGE_ID = 500
# width, layers, heads, key-value heads, feed-forward, vocabulary; tokens a row; rows at once; rows
# of logits at once
SHAPES = {
    "wide blocks": (192, 3, 6, 2, 768, 512, 160, 2, 1024),
    "many tokens": (64, 3, 4, 1, 256, 512, 600, 1, 1024),
    "logits in chunks": (128, 3, 4, 4, 256, 4096, 300, 1, 96),
}


class LiveTensors(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there ever were. Every operation shows
    what it made; a weak reference tells when a storage is gone."""

    def __init__(self, tensors):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0
        for tensor in tensors:
            self.meet(tensor)

    def meet(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def forget(self, key: int, size: int) -> None:
        del self.alive[key]
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self.meet(value)
        return out


def test_live_tensors_are_counted_while_they_live():
    with LiveTensors([]) as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)  # the same storage
        c = a + 1
        del c
        d = a * 2
    assert (live.now, live.peak) == (8000, 8000) and len(b) + len(d) == 1010


def tiny(family: str, shape: str):
    width, layers, heads, kv_heads, feed_forward, vocabulary, *_ = SHAPES[shape]
    config = memory.config_of(
        memory.Size(
            family,
            width,
            layers,
            heads,
            kv_heads,
            feed_forward,
            vocabulary,
            (2, 64, 4, 128),
            (112, (0, 1)),
        )
    )
    config.image_token_id = IMAGE_ID
    if family == "internvl":
        config.vision_config.image_size = (56, 56)
    return config


def measured(
    config, stage: str, method: str, shape: str, recomputed: int, out
) -> tuple[int, memory.Load]:
    """The peak of two steps of two micro-batches each, by the stage's own loss and the project's
    own loop."""
    *_, length, micro, _ = SHAPES[shape]
    policy = model.Policy(
        AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    )
    policy.freeze_vision()
    if method == "lora":
        lora.inject(policy.model, policy.language_model)
    train.shard(policy, torch.device("cpu"), recomputed)
    processor = SimpleNamespace(image_id=IMAGE_ID, family=policy.family)
    pixels = torch.randn(16, 1176) if policy.family.grid_positions else torch.randn(1, 3, 56, 56)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, IMAGE_ID, (count,)).tolist()

    def encode(index: int) -> model.Row:
        ids = tokens(length // 4)
        ids[5:9] = [IMAGE_ID] * 4
        rest = length - len(ids)
        prompt = model.Segment(
            ids, [data.PROMPT] * len(ids), images=[model.ImageInput(pixels.clone(), (1, 2, 2), 4)]
        )
        half = rest // 2
        if stage == "sft":  # two demonstrations in one row, as --pack makes it
            return [
                prompt,
                model.Segment(tokens(half), [data.THINK] * half, 0),
                model.Segment(tokens(rest - half), [data.THINK] * (rest - half), 0),
            ]
        return [
            prompt,
            *(
                model.Segment(tokens(n), [data.TAG] * n, 0, which)
                for n, which in ((half, 1), (rest - half, 2))
            ),
        ]

    def collate(rows, weights):
        return (
            model.collate(rows, processor, weights)
            if stage == "sft"
            else collate_pairs([(row, [0.0, 0.0]) for row in rows], weights, processor)
        )

    def loss(logp, batch):
        return (
            sft.sft_loss(logp, batch, dict.fromkeys(data.SPAN_NAMES, 1.0))
            if stage == "sft"
            else dpo.pair_loss(logp, batch, 0.1)
        )

    with LiveTensors([*policy.parameters(), *policy.buffers()]) as live:
        fit(
            policy,
            loss,
            encode,
            collate,
            train.shuffled(2 * micro, 2 * micro, 2, 0),
            out=out,
            device=torch.device("cpu"),
            peak=1e-4,
            budget=micro,
            warmup=0.1,
            save_every=0,
        )
    return live.peak, memory.Load(
        micro, length, length - length // 4, pixels.numel() * 4, recomputed
    )


@pytest.mark.parametrize("recomputed", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "family, stage, method, shape",
    [
        *(
            ("qwen2_5_vl", stage, method, shape)
            for stage, method in (("sft", "lora"), ("dpo", "full"))
            for shape in SHAPES
        ),
        ("qwen2_5_vl", "dpo", "lora", "wide blocks"),
        ("internvl", "dpo", "full", "wide blocks"),
        ("internvl", "sft", "lora", "wide blocks"),
    ],
)
def test_prediction_is_within_five_percent_of_the_measured_peak(
    family, stage, method, shape, recomputed, tmp_path, monkeypatch
):
    monkeypatch.setitem(model.LOGIT_CHUNK, "cpu", SHAPES[shape][-1])
    config = tiny(family, shape)
    found, load = measured(config, stage, method, shape, recomputed, tmp_path)
    predicted = memory.peak(memory.memory(memory.policy_of(config, method), load, 1, mixed=False))
    print(f"measured {found / 2**20:.2f} MB, predicted {predicted / 2**20:.2f} MB")
    assert predicted == pytest.approx(found, rel=0.05)


# --------------------------------------------------------------------------------------------------
# The published models


@pytest.fixture(scope="module")
def seven() -> dict[str, model.Policy]:
    config = memory.config_of(memory.SHAPES["qwen2.5-vl-7b"])
    return {method: memory.policy_of(config, method) for method in ("full", "lora")}


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("qwen2.5-vl-3b", 3_754_622_976),
        ("internvl3-2b", 2_088_957_440),
        ("internvl3-1b", 938_193_024),
        ("qwen2.5-vl-7b", 8_292_166_656),
        ("qwen2.5-vl-72b", 73_410_777_344),
        ("qwen2.5-vl-32b", 33_452_718_336),
        ("internvl3-8b", 7_944_373_760),
    ],
)
def test_shapes_have_the_parameters_of_the_published_checkpoints(name, parameters):
    policy = memory.policy_of(memory.config_of(memory.SHAPES[name]), "full")
    assert memory.count(policy) == parameters and all(p.is_meta for p in policy.parameters())


def test_seven_billion_by_hand(seven):
    """Qwen2.5-VL-7B in full on 8 GPUs: D 3584, F 18944, 28 blocks, V 152064, 28 heads of 128, 4 of
    keys.

    A block: q and o 2 x 3584^2 + 3584, k and v 2 x (3584 + 1) x 512, three maps 3 x 3584 x 18944,
    two norms 2 x 3584
           = 25,693,696 + 3,671,040 + 203,685,888 + 7,168 = 233,057,792 parameters.
    Embeddings and head 2 x 152064 x 3584 and the last norm = 1,089,998,336. Language model
    28 x 233,057,792 + 1,089,998,336 = 7,615,616,512; the tower 676,550,144.
    """
    load = memory.Load(1, 8192, 8192, 0, 28)
    moments = memory.memory(seven["full"], load, 8)
    head, block, reduce = (moments[name] for name in ("head", "block", "reduce"))
    assert head["optimizer"] == 8 * 7_615_616_512 / 8 == 7_615_616_512 and head["reference"] == 0
    assert head["gradients"] == 4 * 7_615_616_512 / 8 == 3_807_808_256
    assert head["weights"] == 3_807_808_256 + 2 * 676_550_144 + 2 * 1_089_998_336
    assert block["weights"] == head["weights"] + 3 * 2 * 233_057_792
    assert block["gradients"] == head["gradients"] + 10 * 233_057_792 + 2 * 152_064 * 3584
    assert (
        reduce["gradients"] == head["gradients"] + 6 * 1_089_998_336 and reduce["activations"] == 0
    )
    # logits: 1,024 rows of them in fp32 and in bf16, the head's gradient in fp32, and these rows'
    # share of it in bf16
    assert head["logits"] == (4 + 2) * 1024 * 152_064 + (4 + 2) * 152_064 * 3584
    # a token: norms 2 x (4 + 2 + 2) x 3584 + 8, attention 2 x 128 x (3 x 28 + 4 x 4) + 4 x 28 (rows
    # branch), SwiGLU 4 x 2 x 18944
    one = 8192 * (57_344 + 8 + 25_600 + 112 + 151_552)
    assert memory.block_activations(seven["full"], load, 2) == one == 1_921_974_272
    assert (
        block["activations"]
        == 28 * 2 * 8192 * 3584 + one + 2 * 8192 * (2 * 18944 + 3584) + 2 * 2 * 8192 * 128
    )


def test_lora_on_seven_billion_by_hand(seven):
    moments = memory.memory(seven["lora"], memory.Load(1, 8192, 8192, 0), 8)
    adapter = 28 * 8 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert adapter == 20_185_088 == memory.count(seven["lora"], trained=True)
    assert moments["head"]["optimizer"] == adapter and moments["head"]["gradients"] == adapter / 2
    assert (
        moments["head"]["weights"]
        == 2 * 7_615_616_512 / 8 + adapter / 2 + 2 * 676_550_144 + 2 * 1_089_998_336
    )
    # frozen norms keep no product; seven maps keep eight numbers a token; no gradient of the head
    token = 2 * (4 + 2) * 3584 + 8 + 2 * 128 * (3 * 28 + 4 * 4) + 4 * 28 + 8 * 18944 + 7 * 8 * 2
    assert memory.block_activations(seven["lora"], memory.Load(1, 8192, 8192, 0), 2) == 8192 * token
    assert moments["head"]["logits"] == 1024 * 152_064 * (4 + 2)  # in fp32 and in bf16


@pytest.mark.parametrize("gpus, length", [(8, 8192), (8, 24576), (2, 4096)])
def test_auto_recomputes_no_more_blocks_than_memory_asks_for(seven, gpus, length):
    def peak(blocks: int) -> float:
        load = memory.Load(1, length, length, 0, blocks)
        return memory.peak(memory.memory(seven["full"], load, gpus))

    budget = memory.USABLE * 80 * memory.GB
    load = memory.Load(1, length, length, 0)
    count = memory.blocks_to_recompute(seven["full"], load, gpus, budget)
    if count is None:
        assert peak(28) > budget
        return
    assert peak(count) <= budget and (count == 0 or peak(count - 1) > budget)


def test_plan_command_answers_for_both_stages(capsys):
    medee.main(["plan", "qwen2.5-vl-7b", "--gpus", "8", "--len", "8192"])
    out = capsys.readouterr().out
    assert (
        "Stage I, sft.py (lora" in out
        and "Stage II, dpo.py (full" in out
        and out.count("fits: --micro-tokens") == 2
    )
    medee.main(["plan", "internvl3-8b", "--gpus", "1"])
    out = capsys.readouterr().out
    assert "does not fit" in out[out.index("Stage II,") :]


@pytest.mark.parametrize("gpus", [1, 8])
def test_the_readmes_table_is_what_plan_prints(gpus, capsys):
    medee.main(["plan", "--gpus", str(gpus)])
    printed = capsys.readouterr().out
    assert printed in (Path(__file__).parent.parent / "docs" / "running.md").read_text()
    assert printed.count("\n") == 2 + 2 * len(medee.PUBLISHED)


def test_plan_reads_a_local_config(folders, capsys):
    medee.main(["plan", "qwen2.5-vl-7b", "--base", str(folders["qwen"]), "--len", "512"])
    out = capsys.readouterr().out
    assert str(folders["qwen"]) in out and out.count("fits: --micro-tokens 4096,") == 2


@pytest.mark.parametrize("name", [name for name in medee.RECIPES if not name.startswith("mini")])
def test_every_recipe_of_the_papers_size_has_its_shapes(name):
    assert name in memory.SHAPES
