"""What makes the policy fast and equals the plain computation: a reader may skip this file.

    tree attention        a row whose responses share a prompt is attended to stretch by stretch
    grouped attention     while sampling: keys are not copied for each head that shares them
    segment attention     all images, or windows of images, of one size at once
    chunked log-probs     log softmax(h W^T)[target] without ever holding (N, V)

Each is tested equal to the plain computation: one causal row, one image, full logits.

Where we depart from the paper, or it is silent: it says nothing of how anything is computed.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

# ours: supervised positions whose logits exist at one time. With a vocabulary of 152k, 256 take
# 156 MB in fp32; on a GPU 1,024 are faster (bench/gpu.py on an H200: 37 ms, not 58)
LOGIT_CHUNK = {"cpu": 256, "cuda": 1024}


def wide_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """h W^T in fp32 (fp64 for fp64). Rounded to bf16, logits put an error of .03 nats on a token's
    log p; sums in fp32 over bf16 factors, 2e-5 (bench/gpu.py on an H200)."""
    if hidden.is_cuda and hidden.dtype is torch.bfloat16:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(wide) @ weight.to(wide).T


class ChunkedLogProbs(torch.autograd.Function):
    """log softmax(h W^T)[target] for N positions, chunk by chunk: (N, V) is never held as a whole.

        d logp / d logits = onehot(target) - softmax(logits)
        d logp / d h      = (onehot - softmax) W

    The second is only (N, D), so forward computes it while it has the chunk. Backward computes the
    chunks again only for a head that is trained, for the head's gradient. The softmax is in fp32
    (fp64 for fp64).
    """

    @staticmethod
    def residual(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """log p of n targets (n,); onehot - softmax (n, V), in place: two copies are too large."""
        logits = wide_product(hidden, weight)
        top = logits.amax(-1, keepdim=True)
        at_target = logits.gather(1, targets[:, None]) - top
        total = logits.sub_(top).exp_().sum(-1, keepdim=True)
        return (at_target - total.log())[:, 0], logits.div_(-total).scatter_add_(
            1, targets[:, None], torch.ones_like(total)
        )

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """hidden (N, D), weight (V, D), targets (N,) -> (N,) float32"""
        logp = hidden.new_empty(
            len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32)
        )
        # d logp / d h, (N, D)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for at in range(0, len(targets), chunk):
            part = slice(at, at + chunk)
            logp[part], g = ChunkedLogProbs.residual(hidden[part], weight, targets[part])
            if slope is not None:
                slope[part] = g.to(weight.dtype) @ weight
            del g  # frees it before the next chunk is made
        head = (hidden, weight, targets) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(slope, *head)
        ctx.chunk = chunk
        return logp

    @staticmethod
    def backward(ctx, grad: Tensor):
        slope, *head = ctx.saved_tensors
        grad_hidden = None if slope is None else (slope * grad[:, None]).to(slope.dtype)
        if not head:
            return grad_hidden, None, None, None
        hidden, weight, targets = head
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype)
        for at in range(0, len(targets), ctx.chunk):
            part = slice(at, at + ctx.chunk)
            _, g = ChunkedLogProbs.residual(hidden[part], weight, targets[part])
            scaled = (hidden[part] * grad[part, None]).to(hidden.dtype)
            if grad.dtype == weight.dtype:
                grad_weight.addmm_(g.T, scaled)  # without a second (V, D)
            else:
                grad_weight += g.to(weight.dtype).T @ scaled
            del g
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def segment_layout(config, grids: list[tuple[int, int, int]], device: torch.device) -> dict:
    """What Qwen's vision tower must know of its images, for its keywords. grids: (time, rows,
    columns) of each image's merged patches. Worked out on the CPU; the tower itself would read
    `grid_thw` from the GPU, and wait for it, several times."""
    from transformers import vision_utils

    merge = config.spatial_merge_size
    patches = torch.as_tensor(grids, device="cpu") * torch.tensor([1, merge, merge])
    index, windows = vision_utils.get_vision_window_index(
        patches, merge, config.window_size, config.patch_size
    )
    positions = vision_utils.get_vision_position_ids(patches, merge)
    return {
        "grid_thw": patches,
        "position_ids": positions.to(device, non_blocking=True),
        "window_index": index.to(device, non_blocking=True),
        # bounds stay on the CPU, where segment_attention reads them
        "cu_window_seqlens": windows,
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(patches),
    }


@lru_cache(maxsize=8)  # the blocks of a tower have two layouts: windows, and whole images
def equal_segments(bounds: tuple[int, ...], device: torch.device) -> list[tuple[int, Tensor]]:
    """(length, the positions of all segments of that length) from the bounds of all segments."""
    groups: dict[int, list[int]] = {}
    for start, stop in zip(bounds, bounds[1:]):
        groups.setdefault(stop - start, []).extend(range(start, stop))
    with torch.inference_mode(False):  # sampling makes them, and training may use them later
        where = {length: torch.tensor(positions) for length, positions in groups.items()}
        return [(length, at.to(device, non_blocking=True)) for length, at in where.items()]


def segment_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **_unused
):
    """Attention inside each of many segments (images, or windows of an image): query, key, value
    (1, heads, P, d); cu_seq_lens_q: the segments' bounds, on the CPU.

    transformers' own loop makes one call a segment. Here all segments of equal length run as one
    batch, which is the same sum: a film of 16 patches alone is too small to run fast, sixty-four
    together are not. (The keyword arguments beyond those named are transformers' interface for
    attention functions.)
    """
    out = query.new_empty(query.shape[2], *query.shape[1::2])  # (P, heads, d)
    for length, where in equal_segments(tuple(cu_seq_lens_q.tolist()), query.device):
        q, k, v = (
            t[0][:, where].unflatten(1, (-1, length)).transpose(0, 1) for t in (query, key, value)
        )  # (n, heads, length, d)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        out = out.index_put((where,), mixed.transpose(1, 2).flatten(0, 1))
    return out[None], None


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale) -> Tensor:
    """Attention of n new tokens to a KV cache of T: query (R, heads, n, d), key and value (R, fewer
    heads, T, d), mask (R, 1, n, T) -> (R, n, heads, d).

    With a mask, transformers repeats keys and values for all heads that share them. A CPU kernel
    shares them itself, with a bitwise equal result. CUDA's fast kernels cannot with a mask: there
    heads that share a key are stacked, as more queries of one head.
    """
    if query.device.type == "cpu":
        how = {"scale": scale, "enable_gqa": True}
        return F.scaled_dot_product_attention(query, key, value, mask, **how).transpose(1, 2)
    return stacked_attention(query, key, value, mask, scale).transpose(1, 2)


def stacked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale) -> Tensor:
    share = query.shape[1] // key.shape[1]
    stacked = query.unflatten(1, (-1, share)).flatten(2, 3)  # (R, fewer heads, share * n, d)
    mask = mask.repeat(1, 1, share, 1)
    mixed = F.scaled_dot_product_attention(stacked, key, value, mask, scale=scale)
    return mixed.unflatten(2, (share, -1)).flatten(1, 2)  # (R, heads, n, d)


def tree_attention(module, query, key, value, attention_mask, scaling=None, tree=None, **_unused):
    """Attention of tree rows, stretch by stretch: query (B, heads, T, d), key and value (B, fewer
    heads, T, d) -> (B, T, heads, d).

    The ancestors of a stretch, then the stretch itself, are a plain causal row, and are computed as
    one. The outputs at the ancestors are dropped: their own stretches give them. Computing them
    twice costs less than a (T, T) mask: half of it would be computed for nothing, and the fastest
    kernels take no mask.
    """
    if attention_mask is not None:  # a step of engines/decode.py
        return grouped_attention(query, key, value, attention_mask, scaling), None
    if tree is None:  # every row is one stretch
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    rows = []
    for b, stretches in enumerate(tree):
        mixed = []
        for start, stop, seen in stretches:
            q, k, v = (
                torch.cat([t[b : b + 1, :, i:j] for i, j in (*seen, (start, stop))], 2)
                for t in (query, key, value)
            )
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=True
            )
            mixed.append(out[:, :, start - stop :].transpose(1, 2))
        mixed.append(query.new_zeros(1, query.shape[2] - stop, *query.shape[1::2]))  # padding
        rows.append(torch.cat(mixed, 1))
    return torch.cat(rows), None


# transformers gives segment bounds to functions with "flash" in the name
SEGMENT_ATTENTION = "medee_segment_flash_attention"
TREE_ATTENTION = "medee_tree_attention"
