"""Will it fit? Memory of one GPU in training, from the model's shapes: nothing is loaded or run.

    peak = max over three moments of a backward of
           weights + gradients + optimizer + activations + logits + images

    head     backward begins: every activation is held, and the log-probabilities' gradient is made
             (attention.ChunkedLogProbs)
    block    a block runs backward: its weights are gathered, its gradients on their way; if it is
             one of those that are recomputed (checkpointing), it has just been
    reduce   backward ends: the embeddings' and the head's gradients are summed over the ranks in
             fp32, activations are gone

With P parameters of the language model, P_t of them trained, on N ranks (train.shard, train.Run):

    weights      4 P_t / N bytes of fp32 master shards, 2 (P - P_t) / N of frozen ones in bf16, the
                 frozen vision tower whole in bf16, and bf16 copies of what is in use: embeddings
                 and head all through, blocks three at a time (one at work, the next one, the
                 buffer it comes in)
    gradients    4 P_t / N, kept over the micro-batches of a step, and whole ones on their way: of
                 two blocks, one at work and one that is summed over the ranks
    optimizer    8 P_t / N, AdamW's two moments
    reference    0: its log-probabilities are numbers in a file before training begins (dpo.py)
    activations  what autograd saves (`block_activations`); of a recomputed block its input
    logits       LOGIT_CHUNK rows of the vocabulary at a time; the head's gradient if it is trained

    python medee.py plan --gpus 1                            which rows fit, for every recipe
    python medee.py plan qwen2.5-vl-7b --gpus 8 --len 8192   both stages, term by term

reads at most a config.json; writes nothing. A test holds it to measured peaks of tiny models. It
leaves out the allocator's fragments, NCCL and kernels' workspaces, for which USABLE leaves room.

Where we depart from the paper, or it is silent: it says 8 H100s and nothing of memory. All of this
is ours.
"""

import argparse
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

import lora
import model

GB = 2**30  # as in the lines that training prints
USABLE = 0.9  # ours: the share of a GPU that may be planned for


# --------------------------------------------------------------------------------------------------
# Shapes


@dataclass(frozen=True)
class Size:
    """The shapes of a published model. vision: depth, width, heads, feed-forward. window: of Qwen's
    tower, pixels of a window and the blocks that see the whole image."""

    family: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    vision: tuple[int, int, int, int]
    window: tuple[int, tuple[int, ...]] = (112, (7, 15, 23, 31))
    tied: bool = False  # the head is the embedding


# from memory of the published configs, not read on the hub: --base FOLDER reads a model's own
SHAPES = {
    "qwen2.5-vl-3b": Size(
        "qwen2_5_vl", 2048, 36, 16, 2, 11008, 151936, (32, 1280, 16, 3420), tied=True
    ),
    "internvl3-1b": Size("internvl", 896, 24, 14, 2, 4864, 151674, (24, 1024, 16, 4096)),
    "internvl3-2b": Size("internvl", 1536, 28, 12, 2, 8960, 151674, (24, 1024, 16, 4096)),
    "qwen2.5-vl-7b": Size("qwen2_5_vl", 3584, 28, 28, 4, 18944, 152064, (32, 1280, 16, 3420)),
    "qwen2.5-vl-32b": Size("qwen2_5_vl", 5120, 64, 40, 8, 27648, 152064, (32, 1280, 16, 3456)),
    "qwen2.5-vl-72b": Size("qwen2_5_vl", 8192, 80, 64, 8, 29568, 152064, (32, 1280, 16, 3456)),
    "internvl3-8b": Size("internvl", 3584, 28, 28, 4, 18944, 151674, (24, 1024, 16, 4096)),
}


def config_of(size: Size):
    """The Hugging Face config of a published size."""
    from transformers import InternVLConfig, Qwen2_5_VLConfig

    depth, width, heads, feed_forward = size.vision
    text = dict(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, tie_word_embeddings=size.tied,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = dict(hidden_size=width, intermediate_size=feed_forward)
    if size.family == "internvl":
        text["model_type"] = "qwen2"
        vision |= dict(num_hidden_layers=depth, num_attention_heads=heads, attention_bias=True)
        return InternVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=size.tied)
    half = size.width // size.heads // 2
    part = 3 * half // 8
    sections = [half - 2 * part, part, part]  # 16, 24, 24 of a head's 64 frequencies
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e6, mrope_section=sections)
    window, whole = size.window
    vision |= dict(
        depth=depth, num_heads=heads, out_hidden_size=size.width, window_size=window,
        fullatt_block_indexes=list(whole),
    )  # fmt: skip
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=size.tied)


def policy_of(
    config, method: str, rank: int = lora.RANK, device: str | torch.device = "meta"
) -> model.Policy:
    """A policy of random weights; on the `meta` device it has shapes and no memory. method: "full"
    or "lora"."""
    from transformers import AutoModelForImageTextToText

    with torch.device(device):
        network = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    policy = model.Policy(network)
    policy.freeze_vision()
    if method == "lora":
        lora.inject(policy.model, policy.language_model, rank)
    return policy


# --------------------------------------------------------------------------------------------------
# Counting


@dataclass(frozen=True)
class Load:
    """One micro-batch on one GPU. Its rows branch, as DPO's pairs and packed demonstrations do."""

    rows: int
    length: int  # tokens of a row: prompt, images and every response
    supervised: int  # tokens of a row that have a log-probability; at most all
    image_bytes: int  # pixels of a row, fp32
    recomputed: int = 0  # blocks whose activations are computed again in backward (checkpointing)


def count(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def block_activations(policy: model.Policy, load: Load, c: int) -> int:
    """Bytes that autograd keeps of one block, for a micro-batch. c: bytes of a number in compute, 2
    for bf16.

    Norms compute in fp32 and keep their input so; their product is kept where their weight is
    trained. A linear map keeps its input, attention its q, k, v, output and log-sums, SwiGLU gate,
    silu(gate), up and their product. As rows branch, the output is kept for each branch and as
    a whole, and k and v twice: a branch holds its ancestors' beside its own.
    """
    text, layer = policy.model.config.text_config, policy.language_model.layers[0]
    width, heads, kv_heads = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
    scaled = layer.input_layernorm.weight.requires_grad
    norms = 2 * (4 * width + 4 + c * width * (1 + scaled))
    attention = c * (width // heads) * (3 * heads + 4 * kv_heads) + 4 * heads
    adapters = [module for module in layer.modules() if isinstance(module, lora.LoRALinear)]
    low = c * sum(len(module.lora_A) for module in adapters)
    token = norms + attention + 4 * c * text.intermediate_size + low
    return load.rows * load.length * token


def constant_terms(policy: model.Policy, load: Load, gpus: int, mixed: bool) -> dict[str, float]:
    """{term: bytes} that are held all through; 0 for what a moment adds."""
    c = 2 if mixed else 4  # bytes of a number in compute
    tower = {*policy.vision.parameters(), *policy.projector.parameters()}
    frozen = sum(p.numel() for p in tower if not p.requires_grad)
    sharded, trained = count(policy) - frozen, count(policy, True)
    # embeddings, head, last norm: gathered as one
    around = sharded - count(policy.language_model.layers)
    return {
        "weights": (4 * trained + c * (sharded - trained)) / gpus + c * frozen + c * around * mixed,
        "gradients": 4 * trained / gpus,
        "optimizer": 8 * trained / gpus,
        "reference": 0,
        "activations": 0,
        "logits": 0,
        # as they came, and as the tower takes them
        "images": load.rows * load.image_bytes * (1.5 if mixed else 1),
    }


def memory(
    policy: model.Policy, load: Load, gpus: int, mixed: bool = True
) -> dict[str, dict[str, float]]:
    """{moment: {term: bytes}} on one of `gpus` GPUs that share the weights. mixed: as on a GPU,
    sharded and computed in bf16; False: one process on a CPU, all in fp32, nothing gathered."""
    text, blocks = policy.model.config.text_config, policy.language_model.layers
    width, wide, vocabulary = text.hidden_size, text.intermediate_size, text.vocab_size
    c = 2 if mixed else 4  # bytes of a number in compute
    static = constant_terms(policy, load, gpus, mixed)
    block, block_trained = count(blocks[0]), count(blocks[0], True)
    around_trained = count(policy, True) - count(blocks, True)
    head_trained = policy.model.lm_head.weight.requires_grad
    tokens, supervised = load.rows * load.length, load.rows * load.supervised
    one = block_activations(policy, load, c)
    whole = (len(blocks) - load.recomputed) * one
    # inputs of the blocks that are recomputed, and rotations
    kept = c * tokens * (load.recomputed * width + 2 * (width // text.num_attention_heads))
    # last norm; positions, d logp / d h, and its product with the gradient
    above = tokens * width * (4 + c * bool(around_trained))
    above += (2 + head_trained) * c * supervised * width
    inside = c * tokens * (2 * wide + width)  # gradients in SwiGLU and along the residual
    logits = min(model.LOGIT_CHUNK["cuda" if mixed else "cpu"], supervised) * vocabulary
    head_gradient = vocabulary * width * head_trained
    twice = 4 + c * mixed  # fp32 and its bf16 twin
    head = static | {
        "activations": kept + whole + above,
        "logits": twice * (logits + head_gradient),
    }
    # the first blocks are recomputed, one at a time, when those after them have gone backward
    at_block = static | {"activations": kept + max(whole, one) + inside}
    if not mixed:  # one weight's new gradient beside the sum
        at_block["gradients"] += 4 * wide * width * bool(block_trained)
        return {"head": head, "block": at_block}
    at_block["weights"] += 3 * c * block
    # a block's own, in bf16 and as the fp32 that is summed over the ranks, and that of the block
    # before it; the head's waits for the embeddings'
    at_block["gradients"] += (c + 8) * block_trained + c * head_gradient
    reduce = static | {"gradients": static["gradients"] + (c + 4) * around_trained}
    return {"head": head, "block": at_block, "reduce": reduce}


def peak(moments: dict[str, dict[str, float]]) -> float:
    return max(sum(moment.values()) for moment in moments.values())


def blocks_to_recompute(policy: model.Policy, load: Load, gpus: int, budget: float) -> int | None:
    """The fewest blocks whose recomputation makes training fit into `budget` bytes; None if not
    even all of them do. Recomputing all costs a third more time."""
    for count in range(len(policy.language_model.layers) + 1):
        if peak(memory(policy, replace(load, recomputed=count), gpus)) <= budget:
            return count
    return None


def longest_row(policy: model.Policy, load: Load, gpus: int, budget: float) -> int:
    """Tokens of the longest row, in steps of 256 and at most 32K, that trains within `budget`
    bytes; 0 if none does. load: all but its length."""

    def needed(length: int) -> float:
        return peak(memory(policy, replace(load, length=length, supervised=length), gpus))

    lengths = range(0, 32 * 1024 + 1, 256)
    fitting = bisect_right(lengths, budget, key=needed)
    return lengths[max(0, fitting - 1)]


def image_bytes(policy: model.Policy, pixels: int, tiles: int) -> int:
    """Bytes of the largest image a row can have, in fp32: two frames of three colours for Qwen,
    tiles and a thumbnail for InternVL."""
    if policy.family.grid_positions:
        return 2 * 3 * 4 * pixels
    height, width = policy.model.config.vision_config.image_size
    return (tiles + (tiles > 1)) * 3 * 4 * height * width


# --------------------------------------------------------------------------------------------------
# python medee.py plan


def recipe_image(policy: model.Policy, recipe: dict) -> int:
    """Bytes of the largest image that a recipe allows."""
    return image_bytes(policy, recipe["image"].get("pixels", 0), recipe["image"].get("tiles", 1))


def plan_table(recipes: dict[str, dict], gpus: int) -> None:
    """What each recipe can train on GPUs of three sizes: tokens of the longest row with an image,
    if every block is recomputed, and if none is, which is faster."""
    sizes = (24, 48, 80)
    print(f"longest row in tokens (up to 32K), every block recomputed / none, GPUs: {gpus}")
    print(f"{'':<16}{'':>6}" + "".join(f"{f'{size} GB':>17}" for size in sizes))
    for name, recipe in recipes.items():
        for method in ("lora", "full"):
            policy = policy_of(config_of(SHAPES[name]), method)
            every = len(policy.language_model.layers)
            cells = []
            for size in sizes:
                found = []
                for recomputed in (every, 0):
                    load = Load(1, 0, 0, recipe_image(policy, recipe), recomputed)
                    found.append(longest_row(policy, load, gpus, USABLE * size * GB))
                cells.append(" / ".join(f"{n:,}" if n else "-" for n in found))
            print(f"{name:<16}{method:>6}" + "".join(f"{cell:>17}" for cell in cells))


def plan_recipe(recipe: dict, args: argparse.Namespace) -> None:
    """Both stages of a recipe, term by term."""
    config = model.load_config(args.base) if args.base else config_of(SHAPES[args.recipe])
    source = args.base or "the published config, from memory (--base FOLDER reads yours)"
    print(f"{args.recipe} on {args.gpus} GPUs of {args.memory:.0f} GB; shapes of {source}")
    for title, stage, images in (
        ("Stage I, sft.py", recipe["sft"], 0),
        ("Stage II, dpo.py", recipe["dpo"], args.images),
    ):
        method = stage.get("method", "lora")
        policy = policy_of(config, method, stage.get("rank", lora.RANK))
        length = args.len or stage["max-length"]
        print(f"\n{title} ({method}; rows of {length} tokens; images a row: {images})")
        load = Load(1, length, length, images * recipe_image(policy, recipe))
        report(policy, load, args.gpus, USABLE * args.memory, max(1, stage["batch"] // args.gpus))


def report(policy: model.Policy, load: Load, gpus: int, budget: float, most_rows: int) -> None:
    """Prints the table of one stage. load: one row. budget: GB that may be planned for. most_rows:
    the largest micro-batch that the global batch leaves a GPU. The micro-batch that is chosen
    recomputes the fewest blocks, and then has the most rows."""
    every = len(policy.language_model.layers)
    loads = [replace(load, rows=1 << k) for k in range(most_rows.bit_length())]
    asked = [blocks_to_recompute(policy, one, gpus, budget * GB) for one in loads]
    fitting = [replace(one, recomputed=n) for one, n in zip(loads, asked) if n is not None]
    best = replace(load, recomputed=every)
    if fitting:
        best = min(fitting, key=lambda one: (one.recomputed, -one.rows))

    def line(label: str, cells: Iterable) -> None:
        shown = (f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells)
        print(f"  {label:<36}" + "".join(f"{cell:>9}" for cell in shown))

    moments = memory(policy, best, gpus)
    line(f"micro-batch {best.rows}, {best.recomputed} of {every} blocks again: GB at", moments)
    for term in moments["head"]:
        line(term, (moment[term] / GB for moment in moments.values()))
    line("together", (sum(moment.values()) / GB for moment in moments.values()))
    line("micro-batch", (one.rows for one in loads))
    line("blocks that auto recomputes", ("-" if n is None else n for n in asked))
    total = peak(moments) / GB
    if fitting:
        print(f"  fits: --micro-tokens {best.rows * load.length}, {total:.0f} of {budget:.0f} GB")
    else:
        print(f"  does not fit: {total:.0f} GB at best, {budget:.0f} may be planned for;")
        print("  more GPUs, shorter rows (--len), or LoRA")
