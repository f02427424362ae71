"""LoRA (Hu et al. 2022): the low-rank update that elicits reasoning in Stage I (paper App. C).

    h = W0 x + (alpha / r) B A x     W0 (out, in) frozen, A (r, in) and B (out, r) trained, and
                                     B = 0 at the start

With B = 0 the adapted model is exactly the base model before the first step. After training the
update is added to the weight, W = W0 + (alpha / r) B A, in fp32. What is saved is rounded once, to
the dtype of the base's files, and saving says how much of the change that loses (hub.Rounding).

    inject(model, language_model, rank=8, alpha=16)    every other parameter is frozen
    ... train ...
    save_adapter("out/adapter", ...)                   PEFT's file format: loads in peft and in vLLM
    merge_state(tensors, scale)                        W: Stage II's start and reference

Where we depart from the paper, or it is silent:
  1. It gives only "LoRA, lr 1e-4". Rank 8, alpha 16, no dropout, no bias are the defaults of its
     trainer, LLaMA-Factory.
  2. Targets are the seven linear maps of each block of the *language model*, by exact name. A
     vision tower also has modules called q_proj or gate_proj; a match by suffix would adapt those.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

# the seven linear maps of a Qwen2 block: for the 7B 7 x 28 layers at r = 8 are 20,185,088
# parameters
TARGETS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
RANK, ALPHA = 8, 16.0  # ours: paper silent (LLaMA-Factory defaults: rank 8, alpha = 2 x rank)


class LoRALinear(nn.Module):
    """A frozen linear map plus its low-rank update. Input (..., in), output (..., out)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        # Allocated even if the base is on `meta`: no file holds A and B, and they are small. A has
        # PEFT's initialisation, drawn on the CPU, so every device and every rank gets the same.
        device = "cpu" if base.weight.is_meta else base.weight.device
        bound = math.sqrt(1 / base.in_features)
        start = torch.empty(rank, base.in_features, device="cpu")
        start.uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(start.to(device))  # (r, in)
        # (out, r), zero: no change at the start
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = x @ self.lora_A.T.to(x.dtype)  # (..., r)
        return self.base(x) + self.scale * (low @ self.lora_B.T.to(x.dtype))  # (..., out)


def inject(
    model: nn.Module,
    language_model: nn.Module,
    rank: int = RANK,
    alpha: float = ALPHA,
    seed: int = 0,
) -> list[str]:
    """Freezes the whole model and replaces each target by a LoRALinear. Returns their names within
    the language model. Raises ValueError if a target is no linear map, or is adapted already."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = range(len(language_model.layers))
    names = [f"layers.{layer}.{target}" for layer in layers for target in TARGETS]
    for name in names:
        linear = language_model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is a {type(linear).__name__}, expected nn.Linear")
        language_model.set_submodule(name, LoRALinear(linear, rank, alpha, generator))
    return names


def plain_name(name: str) -> str:
    """A parameter's name without adapters: "...q_proj.base.weight" is "...q_proj.weight"."""
    return name.replace(".base.", ".")


def trained_weights(model: nn.Module) -> set[str]:
    """The weights that training changes, by their names in the model without adapters: an adapter
    changes the weight that it is merged into."""
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {re.sub(r"\.lora_[AB]$", ".weight", name) for name in trained}


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """W0 + scale * B A, computed in fp32 and returned in W0's dtype, which train.gather_full makes
    fp32, too. (out, in)"""
    return (weight.float() + scale * (lora_B.float() @ lora_A.float())).to(weight.dtype)


def merge_state(
    tensors: Iterable[tuple[str, Tensor]], scale: float
) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) without adapters, from a stream of (name, whole tensor) with them.

    The two matrices of a LoRALinear come before the weight of its base, as in `named_parameters`.
    """
    matrices: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name.endswith((".lora_A", ".lora_B")):
            matrices[name] = tensor
            continue
        if name.endswith(".base.weight"):
            linear = name.removesuffix(".base.weight")
            lora_A, lora_B = matrices.pop(f"{linear}.lora_A"), matrices.pop(f"{linear}.lora_B")
            tensor = merged_weight(tensor, lora_A, lora_B, scale)
        yield plain_name(name), tensor


def save_adapter(
    folder: str | Path, tensors: dict[str, Tensor], rank: int, alpha: float, base: str
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json, as PEFT does.

    tensors: whole `lora_A` / `lora_B` matrices by their name in the Hugging Face model
             ("model.language_model.layers.0.self_attn.q_proj.lora_A").
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        f"base_model.model.{name}.weight": tensor.detach().float().cpu().contiguous()
        for name, tensor in tensors.items()
    }
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = "|".join(map(re.escape, TARGETS))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        # a full match, so that PEFT also leaves the vision tower alone
        "target_modules": rf"model\.language_model\.layers\.\d+\.({targets})",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
