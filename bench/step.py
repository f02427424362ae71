"""A whole DPO step of this project against the same step of TRL: time, and peak memory above weights and optimizer.

    pip install -r requirements-dev.txt
    python bench/step.py                105 M parameters, V 151,936, fp32 on the CPU; 8 GB of memory, tens of minutes

Both train the same Qwen2.5-VL (tiny vision tower, text pairs) by their own loops, train.fit and trl.DPOTrainer.train, on
the same token ids: one pair a step, reference log-probabilities computed before, AdamW, gradients clipped. TRL is run
without activation checkpointing, as this project is, and once more with it, which is TRL's default.

The loops take turns in one process, so that a busy machine slows all. A run's first step is left out of the times (it
makes the optimizer's state), which are medians; peaks come from the allocator's own record of a whole run, less the bytes
of AdamW's two moments. All steps are on one pair, so that the second step's loss shows what the first one did: it must be the
same. (Later ones differ, by the schedules of the learning rate.)
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from logprobs import peak_bytes
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, TrainerCallback
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import clinic  # noqa: E402
import dpo  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402

SHAPES = {(512, 384, 384): (3, 1 / 2), (1536, 512, 512): (4, 1 / 4)}  # tokens of prompt, chosen, rejected: times faster, share of the peak
VOCABULARY, BETA, LEARNING_RATE = 151_936, 0.1, 1e-6


def build(tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """105 M parameters, of which 78 M are the embedding that is also the head"""
    token = tokenizer.convert_tokens_to_ids
    text = dict(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1792, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 8, 8]},
        bos_token_id=None, eos_token_id=token(clinic.EOS), pad_token_id=token(clinic.PAD),
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=512)
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"))
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")


def draw_pair(shape: tuple[int, int, int]) -> list[list[int]]:
    """Token ids of a prompt, a chosen and a rejected answer; below 200, where there are letters, and no token is special"""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(200, (length,), generator=generator).tolist() for length in shape]


def tree_row(pair: list[list[int]], processor: model.Processor) -> model.Row:
    prompt, chosen, rejected = pair
    return [model.Segment(prompt, [0] * len(prompt)), processor.encode_tokens(chosen, 0, dpo.CHOSEN), processor.encode_tokens(rejected, 0, dpo.REJECTED)]


def ours(network, processor: model.Processor, pair: list[list[int]], reference: list[float], steps: int, checkpointing: bool) -> list[tuple[float, float]]:
    """(seconds, loss) of each step of train.fit."""
    row, cpu = tree_row(pair, processor), torch.device("cpu")
    with tempfile.TemporaryDirectory() as out:
        history = train.fit(train.steps(
            train.shard(model.Policy(network), cpu, checkpointing),
            lambda logp, batch: dpo.pair_loss(logp, batch, BETA),
            lambda index: (row, reference),
            lambda part, weights: dpo.collate_pairs(part, weights, processor),
            [[0]] * steps,
            out=Path(out), device=cpu, learning_rate_peak=LEARNING_RATE, budget=1, warmup=0, save_every=0,
        ), Path(out))  # fmt: skip
    return [(row["seconds"], row["loss"]) for row in history]


class ReadyPairs(DPOTrainer):
    """TRL's trainer on rows that are token ids and have their reference's log-probabilities already."""

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


def trl(network, tokenizer, pair: list[list[int]], reference: list[float], steps: int, checkpointing: bool) -> list[tuple[float, float]]:
    """(seconds, loss) of each step of DPOTrainer.train."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        settings = DPOConfig(
            output_dir=out, use_cpu=True, bf16=False, precompute_ref_log_probs=True, gradient_checkpointing=checkpointing, beta=BETA, learning_rate=LEARNING_RATE,
            per_device_train_batch_size=1, num_train_epochs=1, max_length=None, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        trainer = ReadyPairs(
            model=network, args=settings, processing_class=tokenizer, callbacks=[clock],
            train_dataset=Dataset.from_list([dict(zip(names, [*pair, *reference]))] * steps),
        )  # fmt: skip
        trainer.train()
    return list(zip(clock.seconds, [row["loss"] for row in trainer.state.log_history if "loss" in row], strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A DPO step of this project against the same step of TRL.")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every loop")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn, the first of which is left out")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    tokenizer = clinic.make_tokenizer("qwen", 0)
    network = build(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        network.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        clinic.build("qwen", "tiny", tokenizer, 0)[1].save_pretrained(folder)
        processor = model.Processor(folder)
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    moments = 2 * sum(p.nbytes for p in start.values())
    print(f"{sum(p.numel() for p in start.values()):,} parameters, V {VOCABULARY:,}, fp32, {torch.get_num_threads()} threads")
    for shape, (faster, share) in SHAPES.items():
        pair, forward = draw_pair(shape), type(network).forward.__get__(network)
        with torch.no_grad():
            batch = model.collate([tree_row(pair, processor)], processor)
            reference = [float(value) for value in dpo.response_sums(model.Policy(network)(batch), batch)]
        loops = {
            "ours": lambda: ours(network, processor, pair, reference, args.steps, False),
            "TRL": lambda: trl(network, tokenizer, pair, reference, args.steps, False),
            "ours, checkpointing": lambda: ours(network, processor, pair, reference, args.steps, True),
            "TRL, checkpointing": lambda: trl(network, tokenizer, pair, reference, args.steps, True),
        }
        seconds, peaks, losses = ({name: [] for name in loops} for _ in range(3))
        for _ in range(args.rounds):
            for name, loop in loops.items():
                with torch.no_grad():
                    for parameter, value in zip(network.parameters(), start.values(), strict=True):
                        parameter.copy_(value)
                network.forward = forward  # TRL leaves its own in its place, and train.shard in the layers
                network.gradient_checkpointing_disable()
                for layer in network.model.language_model.layers:
                    layer.__dict__.pop("forward", None)
                steps = []
                with contextlib.redirect_stdout(io.StringIO()):
                    peaks[name].append(peak_bytes(lambda: steps.extend(loop())) - moments)
                seconds[name] += [took for took, _ in steps[1:]]
                losses[name] = [loss for _, loss in steps]
        middle = {name: statistics.median(times) for name, times in seconds.items()}
        print(f"prompt {shape[0]}, answers {shape[1]} + {shape[2]}   (targets: {faster} times faster, {share} of the peak)")
        for name in loops:
            us = name.replace("TRL", "ours")
            compared = f": ours {middle[name] / middle[us]:.2f} times faster, peak {peaks[us][0] / peaks[name][0]:.2f} of it" if us != name else ""
            print(f"  {name:19} {middle[name]:6.2f} s a step, {peaks[name][0] / 1e6:6,.0f} MB, second loss {losses[name][1]:.5f}{compared}", flush=True)


if __name__ == "__main__":
    main()
