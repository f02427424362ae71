"""Will it fit? Memory of one GPU in training, term by term, from the model's own shapes: nothing is loaded, nothing is run.

    peak = the largest, over three moments of a backward, of    weights + gradients + optimizer + activations + logits + images

    head     backward begins: every activation is held, and the log-probabilities' gradient is made (model.ChunkedLogProbs)
    block    a block runs backward: its weights are gathered, its gradients on their way; with checkpointing it is recomputed
    reduce   backward ends: the embeddings' and the head's gradients are summed over the ranks in fp32, activations are gone

What is held when (train.shard, train.fit). P parameters of the language model, P_t of them trained, N ranks:

    weights      4 P / N bytes of fp32 master shards, the frozen vision tower whole in bf16, and bf16 copies of what is in use:
                 embeddings and head all through, blocks three at a time (one at work, the next one, the buffer it comes in)
    gradients    4 P_t / N, kept over the micro-batches of a step, and whole ones on their way to the ranks
    optimizer    8 P_t / N, AdamW's two moments
    reference    nothing: its log-probabilities are numbers in a file before training begins (dpo.py)
    activations  what autograd saves for backward, counted in `block_activations`; with checkpointing one input a block
    logits       LOGIT_CHUNK rows of the vocabulary at a time, never a row's whole; where the head is trained, its gradient

    python medee.py plan qwen2.5-vl-7b --gpus 8 --len 8192

reads at most a config.json; writes nothing. It is arithmetic, held to measured peaks of tiny models by a test; what it leaves
out (allocator's fragments, NCCL, kernels' workspaces) is what ROOM is for.

Where we depart from the paper, or it is silent: it says 8 H100s and nothing of memory. All of this is ours.
"""

from dataclasses import dataclass

import torch
from torch import nn

import lora
import model

GB = 2**30  # as in the lines that training prints
ROOM = 0.9  # ours: the share of a GPU that may be planned for; fragments, NCCL buffers and workspaces take from the rest


@dataclass(frozen=True)
class Size:
    """The shapes of a published model. vision: depth, width, heads, feed-forward."""

    family: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    vision: tuple[int, int, int, int]
    window: tuple[int, tuple[int, ...]] = (112, (7, 15, 23, 31))  # Qwen's tower: window in pixels, blocks that see the whole image


SIZES = {  # from memory of the published configs, not read on the hub: give --base FOLDER to use a model's own config.json
    "qwen2.5-vl-7b": Size("qwen2_5_vl", 3584, 28, 28, 4, 18944, 152064, (32, 1280, 16, 3420)),
    "qwen2.5-vl-32b": Size("qwen2_5_vl", 5120, 64, 40, 8, 27648, 152064, (32, 1280, 16, 3456)),
    "qwen2.5-vl-72b": Size("qwen2_5_vl", 8192, 80, 64, 8, 29568, 152064, (32, 1280, 16, 3456)),
    "internvl3-8b": Size("internvl", 3584, 28, 28, 4, 18944, 151674, (24, 1024, 16, 4096)),
}


def config_of(size: Size):
    """The Hugging Face config of a published size."""
    depth, width, heads, feed_forward = size.vision
    text = dict(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.feed_forward, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = dict(hidden_size=width, intermediate_size=feed_forward)
    if size.family == "qwen2_5_vl":
        from transformers import Qwen2_5_VLConfig

        half = size.width // size.heads // 2
        sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]  # 16, 24, 24 of a head's 64 frequencies
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        window, whole = size.window
        vision |= dict(depth=depth, num_heads=heads, out_hidden_size=size.width, window_size=window, fullatt_block_indexes=list(whole))
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    from transformers import InternVLConfig

    vision |= dict(num_hidden_layers=depth, num_attention_heads=heads, attention_bias=True)
    return InternVLConfig(text_config={"model_type": "qwen2", **text}, vision_config=vision, tie_word_embeddings=False)


def shapes(config, method: str, rank: int = lora.RANK) -> model.Policy:
    """A policy on the `meta` device: shapes and which of them are trained, but no memory. method: "full" or "lora"."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        policy = model.Policy(AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa"))
    policy.freeze_vision()
    if method == "lora":
        lora.inject(policy.model, policy.language_model, rank)
    return policy


# ---------------------------------------------------------------------------------------------------------------
# Counting


@dataclass(frozen=True)
class Load:
    """One micro-batch on one GPU. tree: rows branch, as DPO's pairs do."""

    rows: int
    length: int  # tokens of a row: prompt, images and every response
    supervised: int  # tokens of a row that have a log-probability; at most all
    tree: bool
    image_bytes: int  # pixels of a row, fp32
    checkpointing: bool


def count(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def block_activations(policy: model.Policy, load: Load, c: int) -> int:
    """Bytes that autograd keeps of one block, for a micro-batch. c: bytes of a number in compute, 2 for bf16.

    Norms compute in fp32 and keep their input so; their product is kept where their weight is trained. A linear map keeps its
    input, attention its q, k, v, output and log-sums, SwiGLU gate, silu(gate), up and their product. Where rows branch, the
    output stands run by run and as a whole, and k and v twice: a branch holds its ancestors' beside its own.
    """
    text, layer = policy.model.config.text_config, policy.language_model.layers[0]
    width, heads, head = text.hidden_size, text.num_attention_heads, text.hidden_size // text.num_attention_heads
    scale = layer.input_layernorm.weight.requires_grad
    norms = 2 * (4 * width + 4 + c * width * (1 + scale))
    attention = c * head * ((2 + load.tree) * heads + 2 * (1 + load.tree) * text.num_key_value_heads) + 4 * heads
    low = sum(c * len(module.lora_A) for module in layer.modules() if isinstance(module, lora.LoRALinear))
    token = norms + attention + 4 * c * text.intermediate_size + low
    return load.rows * load.length * token


def memory(policy: model.Policy, load: Load, gpus: int, mixed: bool = True) -> dict[str, dict[str, float]]:
    """{moment: {term: bytes}} on one of `gpus` GPUs that share the weights. mixed: as on a GPU, sharded and computed in bf16;
    False: one process on a CPU, all in fp32 and nothing gathered."""
    text, blocks = policy.model.config.text_config, policy.language_model.layers
    c, width, wide, vocabulary = 2 if mixed else 4, text.hidden_size, text.intermediate_size, text.vocab_size
    frozen = [p for module in (policy.vision, policy.projector) for p in module.parameters() if not p.requires_grad]
    tower = sum(p.numel() for p in set(frozen))
    sharded, block = count(policy) - tower, count(blocks[0])
    around = sharded - count(blocks)  # embeddings, head, last norm: gathered as one
    trained, block_trained = count(policy, True), count(blocks[0], True)
    around_trained = trained - count(blocks, True)
    head_trained = policy.model.lm_head.weight.requires_grad

    tokens, supervised = load.rows * load.length, load.rows * load.supervised
    logits = min(model.LOGIT_CHUNK, supervised) * vocabulary
    one = block_activations(policy, load, c)
    kept = len(blocks) * (c * tokens * width if load.checkpointing else one)
    shared = 2 * c * tokens * (width // text.num_attention_heads)  # rotations
    above = tokens * width * (4 + c * bool(around_trained)) + (2 + head_trained) * c * supervised * width  # last norm; positions, d logp / d h, and its product with the gradient
    backward = c * tokens * (2 * wide + width)  # gradients inside SwiGLU and along the residual

    static = {"weights": 4 * sharded / gpus + c * tower, "gradients": 4 * trained / gpus, "optimizer": 8 * trained / gpus, "reference": 0}
    images = {"images": load.rows * load.image_bytes * (1 + (c < 4) / 2)}  # as they came, and as the tower takes them
    head_gradient = vocabulary * width * head_trained
    twice = 4 + c * (c < 4)  # fp32, and its bf16 twin: of a chunk of logits, and of the head's gradient
    moments = {
        "head": {"activations": kept + shared + above, "logits": twice * (logits + head_gradient), **images},
        "block": {"activations": kept + shared + load.checkpointing * one + backward, "logits": 0, **images},
    }
    moments = {name: {**static, **moment} for name, moment in moments.items()}
    if mixed:
        for moment in moments.values():
            moment["weights"] += c * around
        moments["block"]["weights"] += 3 * c * block
        # a block's own, in bf16 and as the fp32 that is summed over the ranks; the head's waits for the embeddings'
        moments["block"]["gradients"] += (c + 4) * block_trained + c * head_gradient
        moments["reduce"] = {**static, "activations": 0, "logits": 0, **images}
        moments["reduce"]["weights"] += c * around
        moments["reduce"]["gradients"] += (c + 4) * around_trained
    else:
        moments["block"]["gradients"] += 4 * wide * width * bool(block_trained)  # one weight's new gradient beside the sum
    return moments


def peak(moments: dict[str, dict[str, float]]) -> float:
    return max(sum(moment.values()) for moment in moments.values())


# ---------------------------------------------------------------------------------------------------------------
# The answer


def image_bytes(policy: model.Policy, pixels: int, tiles: int) -> int:
    """Bytes of the largest image a row can have, in fp32: two frames of three colours for Qwen, tiles and a thumbnail for InternVL."""
    if policy.family.grid_positions:
        return 2 * 3 * 4 * pixels
    height, width = policy.model.config.vision_config.image_size
    return (tiles + (tiles > 1)) * 3 * 4 * height * width


def recommend(totals: dict[tuple[int, bool], float], budget: float) -> tuple[int, bool] | None:
    """(micro-batch, checkpointing) of what fits, or None: without checkpointing if one row fits so, since recomputing costs a
    third more time; then the most rows."""
    fitting = [choice for choice, total in totals.items() if total <= budget]
    return max(fitting, key=lambda choice: (not choice[1], choice[0])) if fitting else None


def report(title: str, policy: model.Policy, gpus: int, length: int, tree: bool, images: int, budget: float, most_rows: int) -> str:
    """The table of one stage. images: bytes of a row's. most_rows: the largest micro-batch that the global batch leaves a GPU."""
    rows = [1 << k for k in range(most_rows.bit_length()) if 1 << k <= most_rows]
    choices = {(n, again): memory(policy, Load(n, length, length, tree, images, again), gpus) for again in (False, True) for n in rows}
    totals = {choice: peak(moments) / GB for choice, moments in choices.items()}
    best = recommend(totals, budget)
    shown = best or (1, True)
    moments = choices[shown]
    lines = [title, f"  {'micro-batch ' + str(shown[0]) + (', checkpointing' if shown[1] else '') + ': GB at':<36}" + "".join(f"{name:>9}" for name in moments)]
    for term in moments["head"]:
        lines.append(f"  {term:<36}" + "".join(f"{moment[term] / GB:9.1f}" for moment in moments.values()))
    lines.append(f"  {'together':<36}" + "".join(f"{sum(moment.values()) / GB:9.1f}" for moment in moments.values()))
    lines.append(f"  {'peak in GB, by micro-batch':<36}" + "".join(f"{n:>9}" for n in rows))
    for again, word in ((False, "without checkpointing"), (True, "with checkpointing")):
        lines.append(f"  {word:<36}" + "".join(f"{totals[n, again]:9.1f}" for n in rows))
    if best:
        lines.append(f"  fits: --micro-tokens {best[0] * length}{' --checkpointing' if best[1] else ''}, {totals[best]:.0f} of {budget:.0f} GB that may be planned for")
    else:
        lines.append(f"  does not fit: {totals[shown]:.0f} GB at best, {budget:.0f} may be planned for; more GPUs, shorter rows (--len), or LoRA")
    return "\n".join(lines)
