"""A whole DPO step of this project against the same step of TRL: time, and memory above weights.

    pip install -r requirements-dev.txt
    python bench/stage2.py                                      8 GB of memory, twenty minutes
    torchrun --nproc_per_node 2 bench/stage2.py --steps 3       two ranks on this machine

Both train the same Qwen2.5-VL (105 M parameters, vocabulary of 151,936, a tiny vision tower, fp32
on the CPU) by their own loops, train.Run and trl.DPOTrainer.train, on the same token ids: one row a
step and rank, AdamW, gradients clipped, no activation checkpointing.

    pair          one pair; both get reference log-probabilities computed beforehand
    question      3 chosen and 3 rejected chains, so 9 pairs: one tree here. TRL has no trees: its
                  figure is nine times that of its pair of the same lengths
    image         one pair about an image. TRL computes no reference before training with images:
                  it keeps a second model and runs it at every step. Its processor needs
                  torchvision; without it the row is left out, and a line says so

Times are the medians of the steps after the first, which makes the optimizer's state. Peaks come
from the allocator's record of two more steps, minus AdamW's two moments. "of its speed" is the
share of this machine's matrix-product speed, measured in this run, that goes into the products that
the row needs: 6 for every weight and token, as many for the head, and attention. Run it with
nothing beside it. All steps are on one row, so equal second losses show equal first steps.
"""

import argparse
import contextlib
import copy
import io
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from gpu import operations
from logprobs import peak_of
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, TrainerCallback
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import clinic.school
import data
import dpo
import memory  # noqa: E402
import model  # noqa: E402
import reference
import train  # noqa: E402
import trees  # noqa: E402

CPU = torch.device("cpu")
BETA, LEARNING_RATE = 0.1, 1e-6
SHAPES = memory.Size("qwen2_5_vl", 512, 8, 8, 2, 1792, 151_936, (1, 32, 2, 32))
# tokens of the prompt and of each chain; the first half of the chains is preferred to the second
ROWS = {"pair": (512, 384, 384), "long pair": (1536, 512, 512), "question": (512, *[384] * 6)}
NAMES = ("prompt_ids", "chosen_ids", "rejected_ids")  # as TRL has a row
SIDE = 448  # pixels of the image: 256 of the prompt's tokens
KINDS = {  # kinds of operators, to show where the time goes
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "AdamW and clipping": ("adamw", "_foreach", "linalg_vector_norm"),
    "copies": ("copy_", "cat", "index", "gather", "scatter", "fill_", "zero_", "clone"),
    "exchange": ("gloo", "c10d", "record_param_comms"),
}


def build(tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """105 M parameters, of which 78 M are the embedding that is also the head"""
    config, token = memory.config_of(SHAPES), tokenizer.convert_tokens_to_ids
    config.text_config.rope_parameters["mrope_section"] = [16, 8, 8]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    config.text_config.eos_token_id = token(clinic.school.EOS)
    config.text_config.pad_token_id = token(clinic.school.PAD)
    config.image_token_id, config.video_token_id = token(["<|image_pad|>", "<|video_pad|>"])
    ends = token(["<|vision_start|>", "<|vision_end|>"])
    config.vision_start_token_id, config.vision_end_token_id = ends
    torch.manual_seed(0)
    network = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    network.model.visual.requires_grad_(False)  # frozen in both loops, as in the paper's stages
    return network


def tree_of(
    prompt: model.Segment, chains: list[list[int]], processor: model.Processor
) -> model.Row:
    return [prompt, *(processor.encode_tokens(ids, 0, k) for k, ids in enumerate(chains, 1))]


def needed(row: model.Row) -> float:
    """Floating-point operations that a step needs at least, forward and backward."""
    return sum(operations(SHAPES, *(len(segment.ids) for segment in row)))


def product_speed() -> float:
    """Floating-point operations a second of a large matrix product on this machine, at its best."""
    a, b, best = torch.randn(2048, 2048), torch.randn(2048, 2048), 0.0
    for _ in range(8):
        begun = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * 2048**3 / (time.perf_counter() - begun))
    return best


# --------------------------------------------------------------------------------------------------
# The two loops: (seconds, loss) of each step


def ours(
    network, steps: int, processor: model.Processor, row: trees.Encoded
) -> list[tuple[float, float]]:
    policy, plan = model.Policy(network), [list(range(train.world_size()))] * steps
    settings = {"peak": LEARNING_RATE, "budget": 1, "warmup": 0, "save_every": 0}
    with tempfile.TemporaryDirectory() as out:

        def make_batch(rows: list[int], weights: list[float]) -> model.Batch:
            return trees.collate_trees([row] * len(rows), weights, processor)

        policy = train.shard(policy, CPU)
        run = train.Run(policy, plan, make_batch, out=Path(out), device=CPU, **settings)
        history = []
        for _ in run:
            for batch in run.micro_batches():
                run.backward(*dpo.pair_loss(policy(batch), batch, BETA))
            run.update()
            history.append(run.figures)
    return [(row["seconds"], row["loss"]) for row in history]


class ReadyPairs(DPOTrainer):
    """TRL's trainer on rows that are token ids and have the reference's log-probabilities."""

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _precompute_ref_logps(self, dataset, *_):
        return dataset


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__):
        self.begun = time.time()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.time() - self.begun)


def trl(
    network, steps: int, processing, row: dict, trainer: type[DPOTrainer], ready: bool
) -> list[tuple[float, float]]:
    """ready: the row has the reference's log-probabilities; otherwise TRL keeps a second model."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        settings = DPOConfig(
            output_dir=out, use_cpu=True, bf16=False, precompute_ref_log_probs=ready,
            gradient_checkpointing=False, beta=BETA, learning_rate=LEARNING_RATE,
            per_device_train_batch_size=1, num_train_epochs=1, max_length=None, save_strategy="no",
            report_to="none", disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        loop = trainer(
            model=network,
            ref_model=None if ready else copy.deepcopy(network),
            args=settings,
            processing_class=processing,
            callbacks=[clock],
            train_dataset=Dataset.from_list([row] * steps * train.world_size()),
        )
        loop.train()
    losses = [entry["loss"] for entry in loop.state.log_history if "loss" in entry]
    return list(zip(clock.seconds, losses, strict=True))


# --------------------------------------------------------------------------------------------------
# Measuring


def measure(tokenizer, steps: int, loop, *given) -> tuple[float, int, dict[str, float], float]:
    """(median seconds, peak bytes minus the moments, share of the time by kind, second loss)."""
    quiet = contextlib.redirect_stdout(io.StringIO())
    with quiet:
        taken = loop(build(tokenizer), steps + 1, *given)
    seconds = statistics.median(took for took, _ in taken[1:])
    network = build(tokenizer)
    moments = 2 * sum(p.nbytes for p in network.parameters() if p.requires_grad)
    with quiet, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loop(network, 2, *given)
    spent: Counter = Counter()
    for event in record.key_averages():
        kind = next((k for k, names in KINDS.items() if any(n in event.key for n in names)), "rest")
        spent[kind] += event.self_cpu_time_total
    whole = sum(spent.values())
    shares = {kind: spent[kind] / whole for kind in [*KINDS, "rest"] if spent[kind]}
    return seconds, peak_of(record) - moments, shares, taken[1][1]


def report(name: str, own: tuple, theirs: tuple | None, times: int, speed: float, row) -> None:
    """One line of the table, and how our own time is spent."""
    seconds, peak, shares, loss = own
    line = f"{name:<34} {seconds:7.2f} s {peak / 1e6:7,.0f} MB"
    line += f"   {needed(row) / seconds / speed:4.0%} of its speed"
    if theirs:
        line += f" | TRL {times * theirs[0]:7.2f} s {theirs[1] / 1e6:7,.0f} MB"
        line += f" | {times * theirs[0] / seconds:5.2f} x faster, peak {peak / theirs[1]:.2f}"
        line += f" | second loss {loss:.5f}, TRL {theirs[3]:.5f}" if times == 1 else ""
    train.print0(line)
    train.print0("    " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))


def with_reference(row: model.Row, tokenizer, processor) -> trees.Encoded:
    """Each chain of the first half is preferred to each of the second."""
    policy, half = model.Policy(build(tokenizer)), len(row) // 2
    with torch.no_grad():
        batch = model.collate([row], processor)
        values = reference.response_sums(policy(batch), batch)[0].tolist()
    return row, values, list(product(range(half), range(half, 2 * half)))


def text_row(lengths: tuple[int, ...], processor: model.Processor) -> tuple[model.Row, dict]:
    """(the row, the same for TRL): random token ids below 200: letters, and no special token."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(200, (length,), generator=generator).tolist() for length in lengths]
    root = model.Segment(ids[0], [data.PROMPT] * lengths[0])
    return tree_of(root, ids[1:], processor), dict(zip(NAMES, ids))


def image_pair(processor: model.Processor) -> tuple[model.Row, dict]:
    """The same with an image of noise, and of words that are one token each."""
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    asked, chosen, rejected = " fever" * 230, " left" * 383, " right" * 383
    encoded = processor.encode_image(image)
    prompt = processor.encode_prompt([{"role": "user", "content": asked}], [encoded])
    chains = [processor.encode_response(text).ids for text in (chosen, rejected)]
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]
    row = {"images": [image], "prompt": turns}
    for side, text in zip(trees.SIDES, (chosen, rejected)):
        row[side] = [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
    return tree_of(prompt, chains, processor), row


def processors(tokenizer) -> tuple:
    """Ours, and transformers' for TRL's image pair; None without torchvision, which that needs."""
    with tempfile.TemporaryDirectory() as folder:
        build(tokenizer).config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        clinic.school.build("qwen", "tiny", tokenizer, 0)[1].save_pretrained(folder)
        processor, vision = model.Processor(folder, SIDE * SIDE), None
        if find_spec("torchvision"):
            vision = AutoProcessor.from_pretrained(folder)
            vision.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": SIDE * SIDE}
    return processor, vision


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A DPO step of this project against TRL's.")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of every loop")
    parser.add_argument("--only", nargs="+", help=f"of: {', '.join([*ROWS, 'image'])}")
    args = parser.parse_args(argv)
    wanted = {*(args.only or [*ROWS, "image"])}
    wanted |= {"pair"} if "question" in wanted else set()  # TRL's figure is of the pair
    warnings.filterwarnings("ignore")
    train.init_ranks()
    tokenizer = clinic.school.make_tokenizer("qwen", 0)
    processor, vision = processors(tokenizer)
    count, speed = sum(p.numel() for p in build(tokenizer).parameters()), product_speed()
    threads = f"{torch.get_num_threads()} threads, {train.world_size()} ranks"
    train.print0(f"{count:,} parameters, V {SHAPES.vocabulary:,}, fp32, {threads}")
    train.print0(f"this machine's matrix products reach {speed / 1e9:.0f} GFLOP/s on one rank")
    of_pair = None
    for name in [*ROWS, "image"]:
        if name not in wanted:
            continue
        row, ready = image_pair(processor) if name == "image" else text_row(ROWS[name], processor)
        encoded = with_reference(row, tokenizer, processor)
        times, shown = 1, " + ".join(str(len(segment.ids)) for segment in row)
        if name == "image":
            given = (vision, ready, DPOTrainer, False)
            theirs = measure(tokenizer, args.steps, trl, *given) if vision else None
        elif name == "question":
            times, theirs, shown = 9, of_pair, "512 + 6 x 384, 9 pairs"
        else:
            ready |= zip(("ref_chosen_logps", "ref_rejected_logps"), encoded[1])
            theirs = measure(tokenizer, args.steps, trl, tokenizer, ready, ReadyPairs, True)
            of_pair = of_pair or theirs
        own = measure(tokenizer, args.steps, ours, processor, encoded)
        report(f"{name}, {shown}", own, theirs, times, speed, row)
        if not theirs:
            train.print0("    TRL on images: not measured, its processor needs torchvision")
    train.leave_group()


if __name__ == "__main__":
    main()
