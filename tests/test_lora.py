"""lora.py against PEFT, against autograd on an explicit W0 + s B A, and against the parameter count
of the real models."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import hub
import lora
import model

RESPONSE = "<think> The film shows one mark. </think> <answer> (A) rest </answer>"


def batch_of(processor) -> model.Batch:
    """One row with an image"""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    prompt = processor.encode_prompt(turns, [processor.encode_image(image)])
    return model.collate([[prompt, processor.encode_response(RESPONSE)]], processor)


def adapt(policy, rank: int = 4, alpha: float = 10.0, stirred: bool = True) -> list[str]:
    """Injects; with a random B the adapter does something"""
    names = lora.inject(policy.model, policy.language_model, rank, alpha)
    if stirred:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in policy.named_parameters():
            if name.endswith("lora_B"):
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return names


def lora_tensors(policy) -> dict[str, torch.Tensor]:
    return {
        name: p.detach()
        for name, p in policy.model.named_parameters()
        if name.endswith(("lora_A", "lora_B"))
    }


def fresh(folder: Path):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()


@torch.no_grad()
def logits_of(policy, batch: model.Batch) -> torch.Tensor:
    return policy.model.lm_head(policy.hidden_states(batch))


def test_lora_is_identity_before_the_first_step(processor, policy):
    batch = batch_of(processor)
    before = logits_of(policy, batch)
    adapt(policy, stirred=False)
    assert torch.equal(logits_of(policy, batch), before)
    assert all(
        (tensor == 0).all() == name.endswith("lora_B")
        for name, tensor in lora_tensors(policy).items()
    )


def test_initial_a_is_pefts_uniform_and_depends_on_the_seed_only(policy, folder):
    torch.manual_seed(0)
    adapt(policy, stirred=False)
    tensors = lora_tensors(policy)
    for name, tensor in tensors.items():
        if name.endswith("lora_A"):
            theirs = torch.empty(tensor.shape)
            nn.init.kaiming_uniform_(theirs, a=5**0.5)  # what PEFT calls
            assert theirs.abs().max() * 0.9 < tensor.abs().max() <= tensor.shape[1] ** -0.5
    again, other = hub.load_policy(folder), hub.load_policy(folder)
    lora.inject(again.model, again.language_model, 4, 10.0, seed=0)
    lora.inject(other.model, other.language_model, 4, 10.0, seed=1)
    assert all(torch.equal(tensor, lora_tensors(again)[name]) for name, tensor in tensors.items())
    assert not any(
        torch.equal(tensor, lora_tensors(other)[name])
        for name, tensor in tensors.items()
        if name.endswith("lora_A")
    )


def test_lora_touches_the_seven_linears_of_each_language_layer_and_nothing_of_vision(policy):
    linears = {
        name for name, module in policy.model.named_modules() if isinstance(module, nn.Linear)
    }
    returned = adapt(policy)
    found = {
        name for name, module in policy.model.named_modules() if isinstance(module, lora.LoRALinear)
    }
    # independent of the module's own list: every linear map inside the language model's layers
    assert found == {name for name in linears if name.startswith("model.language_model.layers.")}
    assert len(found) == 7 * len(policy.language_model.layers)
    assert not any(
        name.startswith((policy.family.vision, policy.family.projector)) for name in found
    )
    assert sorted(found) == sorted(f"model.language_model.{name}" for name in returned)
    # a match by suffix would have hit the tower too: the claim is not empty
    suffixes = {name.rpartition(".")[2] for name in found}
    assert any(
        name.startswith(policy.family.vision) and name.rpartition(".")[2] in suffixes
        for name in linears
    )


def test_trainable_parameters_follow_the_formula(policy):
    shapes = [
        module.weight.shape
        for name, module in policy.language_model.layers.named_modules()
        if isinstance(module, nn.Linear)
    ]
    adapt(policy, rank=4)
    trainable = {name: p.numel() for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trainable.keys() == lora_tensors(policy).keys()
    assert sum(trainable.values()) == sum(4 * (rows + columns) for rows, columns in shapes)


@pytest.mark.parametrize("family", ["qwen", "internvl"])
def test_the_real_sizes_train_20185088_parameters_at_rank_8(family):
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
    )

    text = dict(
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
    )
    with torch.device("meta"):
        if family == "qwen":
            text |= dict(
                vocab_size=152064,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [16, 24, 24],
                },
            )
            vision = dict(
                depth=32,
                hidden_size=1280,
                num_heads=16,
                intermediate_size=3420,
                out_hidden_size=3584,
            )
            network = Qwen2_5_VLForConditionalGeneration(
                Qwen2_5_VLConfig(text_config=text, vision_config=vision)
            )
        else:
            vision = dict(
                num_hidden_layers=24,
                hidden_size=1024,
                num_attention_heads=16,
                intermediate_size=4096,
                image_size=[448, 448],
            )
            config = InternVLConfig(
                text_config={"model_type": "qwen2", "vocab_size": 151674, **text},
                vision_config=vision,
            )
            network = InternVLForConditionalGeneration(config)
        names = lora.inject(network, network.model.language_model, rank=8)
    assert len(names) == 196
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 20_185_088


def test_only_the_lora_matrices_get_gradients(processor, policy):
    adapt(policy)
    policy(batch_of(processor)).sum().backward()
    for name, parameter in policy.model.named_parameters():
        ours = name.endswith(("lora_A", "lora_B"))
        assert (parameter.grad is not None) == ours, name
        assert not ours or parameter.grad.abs().max() > 0, name


def test_gradients_of_a_and_b_equal_autograd_on_an_explicit_sum(processor, policy, folder):
    batch = batch_of(processor)
    names = adapt(policy, rank=4, alpha=10.0)
    policy(batch).sum().backward()

    plain, explicit, leaves = hub.load_policy(folder), {}, {}
    for name in names:
        full = f"model.model.language_model.{name}"
        a, b = (
            policy.get_parameter(f"{full}.{leaf}").detach().clone().requires_grad_()
            for leaf in ("lora_A", "lora_B")
        )
        explicit[f"{full}.weight"] = (
            plain.get_parameter(f"{full}.weight").detach() + 10.0 / 4 * b @ a
        )
        leaves |= {f"{full}.lora_A": a, f"{full}.lora_B": b}
    torch.func.functional_call(plain, explicit, (batch,)).sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(policy.get_parameter(name).grad, leaf.grad, atol=1e-5, rtol=1e-3)


def merged(policy, scale: float = 10.0 / 4) -> dict[str, torch.Tensor]:
    named = policy.model.named_parameters(remove_duplicate=False)
    return dict(lora.merge_state(((name, p.detach()) for name, p in named), scale))


def test_merged_equals_unmerged(processor, policy, folder):
    batch = batch_of(processor)
    base = logits_of(policy, batch)
    adapt(policy)
    unmerged = logits_of(policy, batch)
    assert (unmerged - base).abs().max() > 0.1  # the adapter does something
    plain = hub.load_policy(folder)
    plain.model.load_state_dict(merged(policy))
    torch.testing.assert_close(logits_of(plain, batch), unmerged, atol=1e-5, rtol=1e-5)


def test_a_second_adapter_is_refused(policy):
    adapt(policy)
    with pytest.raises(ValueError, match="is a LoRALinear"):
        adapt(policy)


def test_inject_refuses_a_target_that_is_not_linear(policy):
    policy.language_model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(ValueError, match="up_proj"):
        adapt(policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_state_has_the_names_and_dtypes_of_a_model_without_adapters(policy, dtype):
    policy.to(dtype)
    named = policy.model.named_parameters(remove_duplicate=False)
    before = {name: p.detach().clone() for name, p in named}
    names = adapt(policy, rank=4, alpha=10.0)
    found, matrices = merged(policy), lora_tensors(policy)
    assert found.keys() == before.keys()
    adapted = {f"model.language_model.{name}" for name in names}
    for name, tensor in found.items():
        wanted, linear = before[name], name.removesuffix(".weight")
        if linear in adapted:
            a, b = matrices[f"{linear}.lora_A"].float(), matrices[f"{linear}.lora_B"].float()
            wanted = (wanted.float() + 2.5 * (b @ a)).to(dtype)
        assert torch.equal(tensor, wanted) and tensor.dtype == dtype


def test_a_merge_into_bf16_rounds_once():
    # added in bf16, each small step would be rounded away: 1 + 0.001 is 1
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    a, b = torch.full((2, 4), 0.05), torch.full((4, 2), 0.05)
    assert torch.equal(lora.merged_weight(weight, a, b, 2.0), torch.full((4, 4), 1.01).bfloat16())
    torch.testing.assert_close(
        lora.merged_weight(weight.float(), a, b, 2.0), torch.full((4, 4), 1.01)
    )


# --- files


def test_our_adapter_loads_in_peft_with_the_same_logits(processor, policy, folder, tmp_path):
    peft = pytest.importorskip("peft")
    adapt(policy, rank=4, alpha=10.0)
    lora.save_adapter(tmp_path, lora_tensors(policy), 4, 10.0, str(folder))
    theirs = peft.PeftModel.from_pretrained(fresh(folder), tmp_path)
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert adapted == {
        name for name, module in policy.model.named_modules() if isinstance(module, lora.LoRALinear)
    }
    batch = batch_of(processor)
    ours = logits_of(policy, batch)
    torch.testing.assert_close(
        logits_of(model.Policy(theirs.base_model.model), batch), ours, atol=1e-5, rtol=1e-5
    )


def test_the_adapter_file_states_rank_alpha_and_base(policy, tmp_path):
    adapt(policy)
    lora.save_adapter(tmp_path, lora_tensors(policy), 4, 10.0, "the/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (
        4,
        10.0,
        "the/base",
    )
    pattern = re.compile(config["target_modules"])
    adapted = {
        name for name, module in policy.model.named_modules() if isinstance(module, lora.LoRALinear)
    }
    assert {name for name, _ in policy.model.named_modules() if pattern.fullmatch(name)} == adapted
