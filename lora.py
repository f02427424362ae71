"""LoRA (Hu et al. 2022): the low-rank update that elicits reasoning in Stage I (paper App. C).

    h = W0 x + (alpha / r) B A x     W0 (out, in) frozen, A (r, in) and B (out, r) trained, and
                                     B = 0 at the start

With B = 0 the adapted model is exactly the base model before the first step. After training the
update is added to the weight, W = W0 + (alpha / r) B A, in fp32. What is saved is rounded once, to
the dtype of the base's files, and saving says how much of the change that loses (hub.Rounding).

    names = inject(model, language_model, rank=8, alpha=16)    every other parameter is frozen
    ... train ...
    save_adapter("out/adapter", ...)           PEFT's own file format: loads in peft and in vLLM
    merge(language_model)                      the merged weights: Stage II's start and reference

Where we depart from the paper, or it is silent:
  1. It gives only "LoRA, lr 1e-4". Rank 8, alpha 16, no dropout, no bias are the defaults of its
     trainer, LLaMA-Factory.
  2. Targets are the seven linear maps of each block of the *language model*, by exact name. A
     vision tower also has modules called q_proj or gate_proj; a match by suffix would adapt those.
"""

import json
import math
import re
from collections.abc import Iterator
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
        # Real numbers even if the base's are on `meta`: no file holds them, and they are few. A has
        # PEFT's initialisation, drawn on the CPU, so every device and every rank gets the same.
        device = "cpu" if base.weight.is_meta else base.weight.device
        bound = math.sqrt(6 / ((1 + 5) * base.in_features))
        start = torch.empty(rank, base.in_features, device="cpu").uniform_(
            -bound, bound, generator=generator
        )
        self.lora_A = nn.Parameter(start.to(device))  # (r, in)
        # (out, r), zero: no change at the start
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = x @ self.lora_A.T.to(x.dtype)  # (..., r)
        return self.base(x) + self.scale * (low @ self.lora_B.T.to(x.dtype))  # (..., out)


def target_names(language_model: nn.Module) -> list[str]:
    """Exact names, within the language model, of the linear maps to adapt: seven for each layer."""
    return [
        f"layers.{layer}.{target}"
        for layer in range(len(language_model.layers))
        for target in TARGETS
    ]


def inject(
    model: nn.Module,
    language_model: nn.Module,
    rank: int = RANK,
    alpha: float = ALPHA,
    seed: int = 0,
) -> list[str]:
    """Freezes the whole model and replaces each target by a LoRALinear. Returns the adapted names.

    Raises ValueError if the model is adapted already, or a target is missing or not a linear map.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError(
            "the model already carries a LoRA adapter; merge it first, a second one would hide it"
        )
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    names = target_names(language_model)
    for name in names:
        linear = language_model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is a {type(linear).__name__}, expected nn.Linear")
        language_model.set_submodule(name, LoRALinear(linear, rank, alpha, generator))
    return names


def merged_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """W0 + scale * B A, computed in fp32 and returned in W0's dtype. (out, in)"""
    return (weight.float() + scale * (lora_B.float() @ lora_A.float())).to(weight.dtype)


@torch.no_grad()
def merge(language_model: nn.Module) -> int:
    """Adds every adapter to its weight and restores the plain linear map. Returns how many.

    Raises ValueError if there is none: a second merge is a mistake of the caller.
    """
    adapted = [
        (name, module)
        for name, module in language_model.named_modules()
        if isinstance(module, LoRALinear)
    ]
    if not adapted:
        raise ValueError(
            "nothing to merge: the model carries no LoRA adapter (was it merged before?)"
        )
    for name, module in adapted:
        module.base.weight.copy_(
            merged_weight(module.base.weight, module.lora_A, module.lora_B, module.scale)
        )
        language_model.set_submodule(name, module.base)
    return len(adapted)


def plain_name(name: str) -> str:
    """A parameter's name without adapters: "...q_proj.base.weight" is "...q_proj.weight"."""
    return name.replace(".base.", ".")


def trained_weights(model: nn.Module) -> set[str]:
    """The weights that training changes, by their names in the model without adapters: an adapter
    changes the weight that it is merged into."""
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {re.sub(r"\.lora_[AB]$", ".weight", name) for name in trained}


def merge_state(
    tensors: Iterator[tuple[str, Tensor]], scale: float
) -> Iterator[tuple[str, Tensor]]:
    """`merge` for a stream of (name, whole tensor), as a sharded model gives its state.

    The two matrices of a LoRALinear come before the weight of its base, as in `named_parameters`.
    """
    held: dict[str, Tensor] = {}
    for name, tensor in tensors:
        parent, _, leaf = name.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            held[name] = tensor
        else:
            linear = parent.removesuffix(".base")
            if linear != parent and leaf == "weight":
                tensor = merged_weight(
                    tensor, held.pop(f"{linear}.lora_A"), held.pop(f"{linear}.lora_B"), scale
                )
            yield plain_name(name), tensor
    if held:
        raise ValueError(f"adapter matrices without a base weight: {sorted(held)[:3]}")


# --------------------------------------------------------------------------------------------------
# Files, as PEFT writes them


def save_adapter(
    folder: str | Path, tensors: dict[str, Tensor], rank: int, alpha: float, base: str
) -> None:
    """Writes adapter_model.safetensors and adapter_config.json.

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
        "target_modules": r"model\.language_model\.layers\.\d+\.("
        + "|".join(re.escape(target) for target in TARGETS)
        + ")",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def load_adapter(folder: str | Path, model: nn.Module, language_model: nn.Module) -> list[str]:
    """Injects an adapter saved by `save_adapter` or by PEFT. Returns the adapted names.

    Raises ValueError unless the file holds exactly the matrices that the model expects: a wrong
    name would otherwise leave the base model unchanged, without an error.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    other = [
        key
        for key in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "fan_in_fan_out")
        if config.get(key)
    ]
    if other or config.get("bias", "none") != "none":
        raise ValueError(
            f"{folder}: the adapter uses {other or 'bias'}, "
            "which is another update than W0 + (alpha / r) B A"
        )
    stored, rank = load_file(folder / "adapter_model.safetensors"), config["r"]
    prefix = next(name for name, module in model.named_modules() if module is language_model)
    wanted = {}
    for name in target_names(language_model):
        linear = language_model.get_submodule(name)
        wanted[f"base_model.model.{prefix}.{name}.lora_A.weight"] = (rank, linear.in_features)
        wanted[f"base_model.model.{prefix}.{name}.lora_B.weight"] = (linear.out_features, rank)
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if found != wanted:
        differ = sorted(
            name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
        )
        raise ValueError(
            f"{folder}: the adapter does not fit the model in {len(differ)} matrices, "
            f"{differ[0]}: {found.get(differ[0])} stored, {wanted.get(differ[0])} wanted"
        )
    names = inject(model, language_model, rank, config["lora_alpha"])
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, LoRALinear):
                module.lora_A.copy_(stored[f"base_model.model.{name}.lora_A.weight"])
                module.lora_B.copy_(stored[f"base_model.model.{name}.lora_B.weight"])
    return names
