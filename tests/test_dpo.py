"""Stage II: Eq. 1 in figures written out, tree rows against separate rows in Hugging Face's model,
and which policy is the reference."""

import json
import math
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from ranks_worker import (
    collate_pairs,
    draw_images,
    encode_pair,
    forest_of,
    gradients,
    in_numbers,
    pair,
    plain_inputs,
)
from safetensors.torch import load_file, save_file
from test_sft import gate_lines
from transformers import AutoModelForImageTextToText

import data
import dpo
import gate
import hub
import lora
import model
import reference
import train
import trees
from command import schema
from command.stage import fingerprint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    draw_images(folder)
    return folder


def encode(processor, films, images=(None,), ids: bool = True) -> list[model.Row]:
    return [
        encode_pair(pair(index, image, processor if ids else None), processor, films)
        for index, image in enumerate(images)
    ]


def assert_close(found: dict, wanted: dict, limit: float = 1e-5) -> None:
    assert found.keys() == wanted.keys() and any(tensor.any() for tensor in wanted.values())
    worst = max(((found[name] - wanted[name]).abs().max().item(), name) for name in wanted)
    assert worst[0] <= limit, worst


def tensors(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values]


def response_logp(network, prompt: model.Segment, response: list[int], processor) -> torch.Tensor:
    """log pi(y | x) by Hugging Face's forward over one row, prompt and response: softmax, gather,
    sum."""
    logits = network(**plain_inputs([prompt.ids + response], prompt.images, processor)).logits[0]
    return (
        logits[len(prompt.ids) - 1 : -1]
        .log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]
        .sum()
    )


# --------------------------------------------------------------------------------------------------
# Equation 1

# policy chosen, policy rejected, reference chosen, reference rejected, beta -> loss, rewards
FIGURES = [
    # h = 1 + 0.5 = 1.5; beta h = 0.15; log(1 + exp(-0.15)) = log 1.8607080
    ((-10.0, -12.0, -11.0, -11.5, 0.1), 0.6209570, 0.1, -0.05),
    # h = -4 - 2 = -6; beta h = -3; log(1 + exp(3)) = log 21.0855369
    ((-104.0, -48.0, -100.0, -50.0, 0.5), 3.0485874, -2.0, 1.0),
    # h = -30 + 50 = 20; beta h = 2; log(1 + exp(-2)) = log 1.1353353
    ((-230.0, -450.0, -200.0, -400.0, 0.1), 0.1269280, -3.0, -5.0),
]


@pytest.mark.parametrize("given, loss, chosen, rejected", FIGURES)
def test_the_loss_has_the_figures_worked_out_by_hand(given, loss, chosen, rejected):
    found = dpo.dpo_loss(*tensors(*given[:4]), given[4])
    assert [value.item() for value in found] == pytest.approx([loss, chosen, rejected], abs=1e-6)


def test_the_loss_is_the_log_odds_of_the_probability_that_chosen_wins():
    """Bradley and Terry: the chance that y_w beats y_l is r_w / (r_w + r_l) with
    r = (pi / pi_ref) ** beta."""
    values = torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    losses, _, _ = dpo.dpo_loss(*values, 0.3)
    for loss, (pc, pr, rc, rr) in zip(losses.tolist(), values.T.tolist(), strict=True):
        strength = [(math.exp(p) / math.exp(r)) ** 0.3 for p, r in ((pc, rc), (pr, rr))]
        assert loss == pytest.approx(-math.log(strength[0] / sum(strength)), abs=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_the_loss_is_ln_2_where_the_policy_is_the_reference(beta):
    losses, chosen, rejected = dpo.dpo_loss(*tensors(-31.0, -77.0, -31.0, -77.0), beta)
    assert (
        losses.item() == pytest.approx(0.69314718, abs=1e-8)
        and chosen.item() == rejected.item() == 0.0
    )


@pytest.mark.parametrize("given", [figures[0] for figures in FIGURES])
def test_the_gradient_of_chosen_is_minus_beta_sigma_minus_beta_h(given):
    values, beta = tensors(*given[:4]), given[4]
    dpo.dpo_loss(*values, beta)[0].sum().backward()
    h = (given[0] - given[2]) - (given[1] - given[3])
    wanted = beta / (1 + math.exp(beta * h))
    assert values[0].grad.item() == pytest.approx(-wanted, abs=1e-12) and values[
        1
    ].grad.item() == pytest.approx(wanted, abs=1e-12)


def test_swapping_chosen_and_rejected_turns_h_around():
    pc, pr, rc, rr = tensors(-10.0, -12.0, -11.0, -11.5)  # beta h = 0.15
    forth, back = dpo.dpo_loss(pc, pr, rc, rr, 0.1)[0], dpo.dpo_loss(pr, pc, rr, rc, 0.1)[0]
    # -log sigma(-z) = -log sigma(z) + z
    assert back.item() - forth.item() == pytest.approx(0.15, abs=1e-12)


def test_the_loss_stays_finite_where_the_margin_is_extreme():
    values = tensors(-5000.0, -1.0, -1.0, -5000.0)
    loss = dpo.dpo_loss(*values, 1.0)[0]
    loss.backward()
    assert loss.item() == pytest.approx(9998.0) and values[0].grad.item() == pytest.approx(-1.0)


# --------------------------------------------------------------------------------------------------
# Pairs as tree rows


def test_twice_the_length_at_the_same_log_probabilities_is_twice_the_margin(processor):
    """Eq. 1 has sums over the response. With means, length would not count at all."""
    margins = []
    for length in (6, 12):
        row = [processor.encode_prompt([{"role": "user", "content": "?"}], [])]
        row += [processor.encode_tokens([which + 4] * length, which) for which in (1, 2)]
        batch = collate_pairs([(row, [0.0, 0.0])], [1.0], processor)
        logp = -0.5 * (batch.branch == 1) - 0.75 * (batch.branch == 2)
        loss, _, figures = in_numbers(*dpo.pair_loss(logp, batch, 0.1))
        assert figures["chosen"][0] == -0.5 * length and figures["rejected"][0] == -0.75 * length
        assert figures["chosen_tokens"][0] == figures["rejected_tokens"][0] == length
        assert loss.item() == pytest.approx(math.log1p(math.exp(-0.1 * 0.25 * length)), abs=1e-6)
        margins.append(figures["margin"][0])
    assert margins[1] == pytest.approx(2 * margins[0]) == pytest.approx(0.1 * 0.25 * 12)


@pytest.mark.parametrize("image", [None, "film0.png"])
def test_a_pair_has_the_loss_and_gradients_of_two_separate_rows_in_hugging_faces_model(
    folder, policy, processor, films, image
):
    ((prompt, chosen, rejected),) = rows = encode(processor, films, [image])
    reference = [-60.0, -75.0]
    batch = collate_pairs([(rows[0], reference)], [1.0], processor)
    loss, count, figures = in_numbers(*dpo.pair_loss(policy(batch), batch, 0.1))
    loss.backward()
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    sums = [
        response_logp(plain, prompt, response.ids, processor) for response in (chosen, rejected)
    ]
    wanted = torch.log1p(torch.exp(-0.1 * ((sums[0] - reference[0]) - (sums[1] - reference[1]))))
    wanted.backward()
    assert (
        count == 1.0 and chosen.ids[-1] == rejected.ids[-1] == processor.stop_id
    )  # the end of the turn is in the sum
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert [figures["chosen"][0], figures["rejected"][0]] == pytest.approx(
        [value.item() - was for value, was in zip(sums, reference)], abs=1e-4
    )
    assert_close(gradients(policy.model), gradients(plain))


def test_text_pairs_have_trls_loss_and_gradients(folder, policy, processor, tmp_path):
    """TRL makes its own token ids of the same texts, its own log-probabilities, and its own
    reference values."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    plain, other = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32) for _ in range(2)
    )
    with torch.no_grad():  # a reference that is not the policy, so that the margins are not 0
        for parameter in other.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.02
            )
    pairs = [pair(index) for index in range(3)]
    texts = [
        {
            "prompt": processor.render(row["prompt"], []),
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        for row in pairs
    ]
    settings = trl.DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=3,
        max_length=None,
        beta=0.1,
        report_to="none",
    )
    trainer = trl.DPOTrainer(
        model=plain,
        ref_model=other,
        args=settings,
        processing_class=processor.tokenizer,
        train_dataset=datasets.Dataset.from_list(texts),
    )
    wanted = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    wanted.backward()

    rows = [encode_pair(row, processor, tmp_path) for row in pairs]
    assert [
        [theirs[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
        for theirs in trainer.train_dataset
    ] == [[segment.ids for segment in row] for row in rows]
    rounds, forest = reference.waves_of([1] * 3, 2), forest_of(rows, processor)
    rounds = reference.log_probs(model.Policy(other), *forest, rounds, CPU, "")
    values = [values for done in rounds for _, values in done]
    batch = collate_pairs(list(zip(rows, values)), [1.0] * 3, processor)
    loss, count, _ = in_numbers(*dpo.pair_loss(policy(batch), batch, 0.1))
    (loss / count).backward()
    assert (loss / count).item() == pytest.approx(wanted.item(), abs=1e-5) and abs(
        wanted.item() - math.log(2)
    ) > 1e-3
    assert_close(gradients(policy.model), gradients(plain))


def test_two_pairs_with_different_images_in_one_batch_are_two_batches_of_one(
    policy, processor, films
):
    rows = [
        (row, [-60.0 - index, -70.0])
        for index, row in enumerate(encode(processor, films, ["film0.png", "film1.png"]))
    ]
    found = []
    for parts in ([rows], [rows[:1], rows[1:]]):
        policy.zero_grad()
        total = 0.0
        for part in parts:
            batch = collate_pairs(part, [1.0] * len(part), processor)
            loss, count, _ = in_numbers(*dpo.pair_loss(policy(batch), batch, 0.1))
            assert count == len(part)
            loss.backward()
            total += loss.item()
        found.append((total, gradients(policy)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    assert_close(found[0][1], found[1][1], 2e-5)
    own, other = (
        rows[0][0][0],
        model.Segment(rows[0][0][0].ids, rows[0][0][0].labels, images=rows[1][0][0].images),
    )
    with (
        torch.no_grad()
    ):  # and the images are looked at: with the other's image the first pair has other sums
        batches = [model.collate([[prompt, *rows[0][0][1:]]], processor) for prompt in (own, other)]
        sums = [reference.response_sums(policy(batch), batch)[:, 0] for batch in batches]
    assert (sums[0] - sums[1]).abs() > 1e-3


def test_a_pair_of_weight_zero_adds_nothing(policy, processor, films):
    rows = [(row, [-60.0, -70.0]) for row in encode(processor, films, [None, "film1.png"])]
    found = []
    for part, weights in ((rows, [0.0, 1.0]), (rows[1:], [1.0])):
        policy.zero_grad()
        batch = collate_pairs(part, weights, processor)
        loss, count, figures = in_numbers(*dpo.pair_loss(policy(batch), batch, 0.1))
        loss.backward()
        found.append(
            (count, loss.item(), [figures[name][0] for name in sorted(figures)], gradients(policy))
        )
    assert found[0][0] == found[1][0] == 1.0 and found[0][1] == pytest.approx(found[1][1], abs=1e-5)
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-4)
    assert_close(found[0][3], found[1][3], 2e-5)


def test_the_ids_of_a_rollout_are_trained_on_as_they_are(folder, policy, processor, films):
    """Sampling may spell a word in other tokens than the tokenizer would: the sampled ones were
    rewarded."""
    row = pair(0, None, processor)
    spelt = [index for letter in row["chosen"] for index in processor.tokenize(letter)] + [
        processor.stop_id
    ]
    assert processor.decode(spelt) == row["chosen"] and spelt != row["chosen_token_ids"]
    row["chosen_token_ids"] = spelt
    prompt, chosen, rejected = encoded = encode_pair(row, processor, films)
    assert chosen.ids == spelt and rejected.ids == row["rejected_token_ids"]
    batch = collate_pairs([(encoded, [0.0, 0.0])], [1.0], processor)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found, wanted = (
            reference.response_sums(policy(batch), batch)[:, 0].item(),
            response_logp(plain, prompt, spelt, processor).item(),
        )
    assert found == pytest.approx(wanted, abs=1e-3) and len(spelt) > 40


def test_a_pair_without_ids_is_tokenised_with_its_end_of_turn(processor, films):
    (with_ids,), (without,) = (
        encode(processor, films, ["film0.png"]),
        encode(processor, films, ["film0.png"], ids=False),
    )
    assert [segment.ids for segment in with_ids] == [
        segment.ids for segment in without
    ] and without[1].ids[-1] == processor.stop_id
    assert (
        [segment.branch for segment in with_ids]
        == [segment.branch for segment in without]
        == [0, 1, 2]
    )
    assert [segment.parent for segment in without] == [None, 0, 0]


# --------------------------------------------------------------------------------------------------
# The reference


def refer(
    tmp_path, policy, rows: list[model.Row], processor, checkpoint: str = "one", micro: int = 1
) -> list[list[float]]:
    forest, whole = forest_of(rows, processor, checkpoint)
    rounds, path = reference.waves_of([1] * len(rows), micro), tmp_path / "reference.jsonl"
    logp = reference.compute(path, policy, forest, whole, rounds, CPU)
    return [[logp[key] for key in forest.keys_of(one)] for one in whole]


def test_reference_values_are_the_sums_of_separate_rows(folder, policy, processor, films, tmp_path):
    rows = encode(processor, films, [None, "film0.png", "film1.png"])
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for values, (prompt, *responses) in zip(
        refer(tmp_path, policy, rows, processor), rows, strict=True
    ):
        with torch.no_grad():
            assert values == pytest.approx(
                [
                    response_logp(plain, prompt, response.ids, processor).item()
                    for response in responses
                ],
                abs=1e-3,
            )


def test_stored_reference_values_are_used_again_and_go_with_their_pair(
    policy, processor, films, tmp_path, capsys
):
    rows = encode(processor, films, [None, "film0.png", "film1.png"])
    first = refer(tmp_path, policy, rows, processor)
    assert "3 trees computed, 0 from" in capsys.readouterr().out
    before = (tmp_path / "reference.jsonl").read_bytes()
    assert refer(tmp_path, policy, rows, processor) == first
    assert (
        "0 trees computed, 3 from" in capsys.readouterr().out
        and (tmp_path / "reference.jsonl").read_bytes() == before
    )
    assert (
        refer(tmp_path, policy, rows[::-1], processor) == first[::-1]
    )  # by content, not by place in the file
    more = rows + [encode_pair(pair(9, None, processor), processor, films)]
    assert refer(tmp_path, policy, more, processor)[:3] == first
    assert "1 trees computed, 3 from" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("change", ["checkpoint", "tokens", "pixels"])
def test_a_reference_value_is_computed_anew_where_what_it_depends_on_changes(
    policy, processor, films, tmp_path, capsys, change
):
    rows = encode(processor, films, ["film0.png", "film1.png"])
    refer(tmp_path, policy, rows, processor)
    if change == "tokens":
        rows[0][1] = processor.encode_tokens([*rows[0][1].ids[:-1], 5, processor.stop_id], 1)
    if change == "pixels":
        rows[0][0].images[0].pixels[0, 0] += 0.5
    capsys.readouterr()
    refer(tmp_path, policy, rows, processor, "two" if change == "checkpoint" else "one")
    assert (
        "2 trees computed, 0 from" if change == "checkpoint" else "1 trees computed, 1 from"
    ) in capsys.readouterr().out


def with_responses(row: model.Row, chosen: model.Segment, rejected: model.Segment) -> model.Row:
    return [row[0], replace(chosen, branch=1), replace(rejected, branch=2)]


def test_a_chain_of_several_pairs_and_of_both_sides_is_stored_once(
    policy, processor, films, tmp_path, capsys
):
    first, other = encode(processor, films, ["film0.png", None])
    a, b, c = first[1], first[2], other[1]
    rows = [first, with_responses(first, a, c), with_responses(first, b, c)]
    values = refer(tmp_path, policy, rows, processor)
    assert [row["logp"] for row in data.resume_jsonl(tmp_path / "reference.jsonl")] == [
        *values[0],
        values[1][1],
    ]
    assert values[1][0] == values[0][0] and values[2] == [values[0][1], values[1][1]]
    capsys.readouterr()
    more = [
        with_responses(first, c, a),
        other,
    ]  # chains that are all stored, and another prompt before one of them
    found = refer(tmp_path, policy, more, processor)
    assert found[0] == [values[1][1], values[0][0]] and abs(found[1][0] - values[1][1]) > 1e-2
    assert "1 trees computed, 1 from" in capsys.readouterr().out
    assert len(data.resume_jsonl(tmp_path / "reference.jsonl")) == 5


@pytest.mark.parametrize("micro", [2, 3])
def test_stored_values_hold_under_another_micro_batch(
    policy, processor, films, tmp_path, capsys, micro
):
    rows = encode(processor, films, [None, "film0.png", "film1.png"])
    first = refer(tmp_path, policy, rows, processor)
    assert refer(tmp_path, policy, rows, processor, micro=micro) == first
    assert "0 trees computed, 3 from reference.jsonl" in capsys.readouterr().out


def gate_one(policy, row: model.Row, values: list[float], processor, beta: float) -> None:
    forest, whole = forest_of([row], processor)
    forest.reference = dict(zip(forest.keys[0], values))
    dpo.gate_reference(policy, dpo.pair_batches(forest, whole, 1, CPU), beta, CPU)


def long_row(processor, films) -> model.Row:
    """Its chosen response has 400 tokens: the limit is twice that of 100."""
    ((prompt, _, rejected),) = encode(processor, films)
    return [prompt, processor.encode_tokens([5] * 400, 1), rejected]


@pytest.mark.parametrize(
    "side, off, holds",
    [(0, 1.7e-3, True), (0, 2.5e-3, False), (1, 0.7e-3, True), (1, 1.3e-3, False)],
)
def test_what_may_be_rounding_grows_with_the_root_of_the_length(
    policy, processor, films, tmp_path, side, off, holds
):
    row = long_row(processor, films)
    (values,) = refer(tmp_path, policy, [row], processor)
    stored = data.resume_jsonl(tmp_path / "reference.jsonl")
    assert [line["tokens"] for line in stored] == [400, len(row[2].ids)] and len(row[2].ids) < 100
    moved = [value + off * (side == at) for at, value in enumerate(values)]
    with nullcontext() if holds else pytest.raises(train.Refused):
        gate_one(policy, row, moved, processor, dpo.BETA)


def test_the_first_loss_may_be_off_by_half_of_beta_times_what_may_be_rounding(
    policy, processor, films
):
    """At beta 5, and h off by 0.0008, the loss is off by 0.002."""
    (row,) = encode(processor, films)
    rounds, forest = reference.waves_of([1], 1), forest_of([row], processor)
    (((_, values),),) = reference.log_probs(policy, *forest, rounds, CPU, "")
    gate_one(policy, row, [values[0] + 0.8e-3, values[1]], processor, 5.0)


def test_a_run_prints_the_gate_line_by_line(folder, films, tmp_path, capsys):
    run(
        folder,
        films,
        tmp_path,
        [pair(0), pair(1, "film0.png")],
        "--method",
        "lora",
        "--epochs",
        "1",
    )
    assert gate_lines(capsys.readouterr().out) == [
        "all 2 questions are valid",
        "supervised tokens decode to the responses",
        "a row's image tokens equal its image features",
        "LoRA trains the 21 linear maps of the language model and nothing else",
        "the shortest row, N tokens, goes forward and backward",
        "the last response has the plain row's log-probability",
        "policy equals reference",
        "first loss 0.693147 is ln 2 = 0.693147",
    ]


def refused(
    claim: str, otherwise: str, folder, films, tmp_path, capsys, rows: list[dict], *flags: str
) -> None:
    """The run stops at one line of the gate, says why, and trains nothing."""
    with pytest.raises(
        train.Refused, match=re.escape(f"gate: {claim}: false; ") + ".*" + otherwise
    ):
        run(folder, films, tmp_path, rows, *flags)
    assert [line for line in capsys.readouterr().out.splitlines() if "gate:" in line][
        -1
    ] == f"  gate: NOT {claim}"
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_the_gate_refuses_pairs_that_cannot_be_encoded_and_names_them(
    folder, films, tmp_path, capsys
):
    refused(
        "all 2 questions are valid",
        "pairs.jsonl: 1 questions: p1: .*no film.png",
        folder,
        films,
        tmp_path,
        capsys,
        [pair(0), pair(1, "no film.png")],
    )


def test_the_gate_refuses_token_ids_of_another_answer(folder, processor, films, tmp_path, capsys):
    rows = [pair(index, None, processor) for index in range(3)]
    rows[1]["rejected_token_ids"] = rows[2]["rejected_token_ids"]
    refused(
        "supervised tokens decode to the responses",
        "pairs.jsonl: 1 responses: p1: .* instead of",
        folder,
        films,
        tmp_path,
        capsys,
        rows,
    )


def test_the_gate_takes_an_answer_that_was_cut_off(processor, films):
    row = pair(0, None, processor)
    row["rejected_token_ids"] = row["rejected_token_ids"][:-4]
    row["rejected"] = processor.decode(row["rejected_token_ids"])
    gate.gate_rows(
        "pairs.jsonl",
        "questions",
        [("p0", row, [row["chosen"], row["rejected"]])],
        lambda row: encode_pair(row, processor, films),
        len,
        processor,
    )


def test_the_gate_refuses_a_tree_whose_second_chain_sees_the_first(
    policy, processor, films, monkeypatch
):
    (row,) = encode(processor, films)
    policy.freeze_vision()
    gate.gate_step(policy, row, processor, CPU)
    collate = model.collate

    def leaking(rows, *given):
        batch = collate(rows, *given)
        tree = batch.tree and [
            [(start, stop, ((0, start),) if seen else ()) for start, stop, seen in stretches]
            for stretches in batch.tree
        ]
        return replace(batch, tree=tree)

    monkeypatch.setattr(model, "collate", leaking)
    with pytest.raises(train.Refused, match="plain row's log-probability: false; it is off by"):
        gate.gate_step(policy, row, processor, CPU)


def test_the_gate_refuses_image_tokens_that_are_not_the_towers_features(
    folder, films, tmp_path, capsys, monkeypatch
):
    image_features = model.Policy.image_features
    monkeypatch.setattr(
        model.Policy,
        "image_features",
        lambda self, pixels, grids: image_features(self, pixels, grids)[:-1],
    )
    refused(
        "a row's image tokens equal its image features",
        "4 tokens, 3 features",
        folder,
        films,
        tmp_path,
        capsys,
        [pair(0, "film0.png")],
    )


def test_the_gate_refuses_lora_on_other_than_the_language_models_linears(
    folders, films, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(lora, "TARGETS", lora.TARGETS[1:])
    claim = "LoRA trains the 21 linear maps of the language model and nothing else"
    refused(
        claim,
        "layers.0.self_attn.q_proj",
        folders["qwen"],
        films,
        tmp_path,
        capsys,
        [pair(0)],
        "--method",
        "lora",
    )


@pytest.mark.parametrize("shift", [(0.1, 0.0), (0.1, 0.1), (0.0, math.nan)])
def test_the_gate_refuses_a_policy_that_is_not_its_reference(
    folders, films, tmp_path, capsys, monkeypatch, shift
):
    """Where both log-probabilities are off by the same, the loss is ln 2 all the same."""
    references = reference.compute

    def shifted(path, policy, forest, *given):
        found = references(path, policy, forest, *given)
        off = {key: by for keys in forest.keys for key, by in zip(keys, shift)}
        return {key: value + off[key] for key, value in found.items()}

    monkeypatch.setattr(reference, "compute", shifted)
    said = "log-probabilities differ by up to (0.1000|nan); .*remove it"
    refused(
        "policy equals reference",
        said,
        folders["qwen"],
        films,
        tmp_path,
        capsys,
        [pair(0), pair(1)],
    )


def test_the_gate_refuses_a_first_loss_that_is_not_ln_2(
    folders, films, tmp_path, capsys, monkeypatch
):
    dpo_loss = dpo.dpo_loss
    monkeypatch.setattr(
        dpo, "dpo_loss", lambda *given: (2 * dpo_loss(*given)[0], *dpo_loss(*given)[1:])
    )
    refused(
        "first loss 1.386294 is ln 2 = 0.693147",
        "policy and reference differ",
        folders["qwen"],
        films,
        tmp_path,
        capsys,
        [pair(0)],
    )


# --------------------------------------------------------------------------------------------------
# The command


def run(folder, films, tmp_path, rows: list[dict], *flags: str) -> None:
    data.write_jsonl(tmp_path / "pairs.jsonl", rows)
    given = [
        "--model",
        str(folder),
        "--pairs",
        str(tmp_path / "pairs.jsonl"),
        "--images",
        str(films),
    ]
    dpo.main([*given, "--out", str(tmp_path / "out"), "--pixels", str(56 * 56), *flags])


def test_a_run_starts_at_ln_2_learns_the_preference_and_leaves_vision_alone(
    folder, family, policy, processor, films, tmp_path, capsys
):
    rows = [
        pair(index, "film0.png" if index % 2 else None, processor if index else None)
        for index in range(4)
    ]
    run(folder, films, tmp_path, rows, "--batch", "4", "--epochs", "4", "--lr", "1e-3")
    metrics = schema.read_metrics(tmp_path / "out")
    assert metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-4) and metrics[0][
        "margin"
    ] == pytest.approx(0, abs=1e-4)
    assert (
        metrics[-1]["loss"] < 0.6 and metrics[-1]["margin"] > 0.1 and metrics[-1]["accuracy"] == 1.0
    )
    lengths = [
        len(segment.ids) for row in rows for segment in encode_pair(row, processor, films)[1:2]
    ]
    assert metrics[0]["chosen_tokens"] == sum(lengths) / 4
    trained, before = (
        hub.load_policy(tmp_path / "out" / "merged"),
        dict(policy.named_parameters()),
    )
    frozen = {id(p) for module in (trained.vision, trained.projector) for p in module.parameters()}
    for name, p in trained.named_parameters():
        assert torch.equal(p, before[name]) == (id(p) in frozen), name
    stage = json.loads((tmp_path / "out" / "stage.json").read_text())
    moved = [(p != before[n]) for n, p in trained.named_parameters() if id(p) not in frozen]
    share = sum(m.sum().item() for m in moved) / sum(m.numel() for m in moved)
    saved = {"weights_changed": pytest.approx(share, abs=1e-12), "rounding_lost": 0.0}
    losses = {"first_loss": metrics[0]["loss"], "last_loss": metrics[-1]["loss"]}
    assert stage["figures"] == {
        "pairs": 4,
        "held_out": 0,
        "dropped": 0,
        "steps": 4,
        **losses,
        **saved,
    }
    assert (
        stage["outputs"] == {"merged": fingerprint(tmp_path / "out" / "merged")}
        and not (tmp_path / "out" / "state").exists()
    )
    assert "kept 4 of 4" in (said := capsys.readouterr().out) and "tokenised from text: 1" in said
    lines = said.partition("\nStage II is finished: ")[2].splitlines()
    found = {line[:14].strip(): line[14:] for line in lines[1:]}
    assert lines[0] == str(tmp_path / "out" / "merged")
    assert found["pairs"] == "4 trained on, 0 held out, 0 too long"
    for name in ("loss", "margin", "accuracy"):
        assert f"{name} {metrics[0][name]:.3f} -> {metrics[-1][name]:.3f}" in found["loss"]
    assert re.fullmatch(r"4 steps in 0:0\d:\d\d", found["training"])
    assert found["next"].startswith(f"python evaluate.py --engine hf:{lines[0]} ")


def test_the_reference_of_a_lora_run_is_the_merged_stage_one_and_not_the_base(
    folders, films, tmp_path
):
    base, stage_one = folders["qwen"], tmp_path / "stage one"
    processor, policy = model.Processor(base, 56 * 56, 1), hub.load_policy(base)
    lora.inject(policy.model, policy.language_model, 4, 8.0)
    for name, p in policy.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    merged = lora.merge_state(train.gather_full(policy), 8.0 / 4)
    hub.save_policy(stage_one, policy, processor, merged)
    rows = [pair(index, "film0.png" if index else None, processor) for index in range(2)]
    run(
        stage_one,
        films,
        tmp_path,
        rows,
        "--method",
        "lora",
        "--rank",
        "4",
        "--alpha",
        "8",
        "--batch",
        "2",
        "--epochs",
        "3",
        "--lr",
        "1e-3",
    )
    stored = data.resume_jsonl(tmp_path / "out" / "reference.jsonl")
    plain = [
        AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        for path in (stage_one, base)
    ]
    for row, *values in zip(rows, stored[::2], stored[1::2], strict=True):
        prompt, *responses = encode_pair(row, processor, films)
        with torch.no_grad():
            by_stage_one, by_base = (
                [
                    response_logp(network, prompt, response.ids, processor).item()
                    for response in responses
                ]
                for network in plain
            )
        assert [value["logp"] for value in values] == pytest.approx(by_stage_one, abs=1e-3)
        assert [value["tokens"] for value in values] == [
            len(response.ids) for response in responses
        ]
        assert abs(by_base[0] - by_stage_one[0]) > 0.1
    metrics = schema.read_metrics(tmp_path / "out")
    assert (
        metrics[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
        and metrics[-1]["loss"] < metrics[0]["loss"]
    )
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    merged, before = (
        load_file(path / "model.safetensors") for path in (tmp_path / "out" / "merged", stage_one)
    )
    moved = sorted(name for name in before if not torch.equal(merged[name], before[name]))
    assert len(moved) == len(adapter) // 2 == 7 * len(policy.language_model.layers)


def test_another_checkpoint_in_the_same_folder_is_refused_and_elsewhere_gets_its_own_reference(
    folders, films, tmp_path, capsys
):
    folder = tmp_path / "checkpoint"
    shutil.copytree(folders["qwen"], folder)
    rows = [pair(index) for index in range(2)]
    run(folder, films, tmp_path, rows, "--epochs", "1")
    first = data.resume_jsonl(tmp_path / "out" / "reference.jsonl")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: 1.1 * tensor for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(data.RowError, match=f"{folder} changed"):
        run(folder, films, tmp_path, rows, "--epochs", "1")
    capsys.readouterr()
    run(folder, films, tmp_path, rows, "--epochs", "1", "--out", str(tmp_path / "other"))
    assert "2 trees computed, 0 from" in capsys.readouterr().out
    second = data.resume_jsonl(tmp_path / "other" / "reference.jsonl")
    assert not {row["key"] for row in first} & {row["key"] for row in second}
    assert all(abs(a["logp"] - b["logp"]) > 0.1 for a, b in zip(first, second, strict=True))
    assert schema.read_metrics(tmp_path / "other")[0]["loss"] == pytest.approx(0.693147, abs=1e-4)


@pytest.mark.parametrize("missing", ["chosen_token_ids", "rejected_token_ids"])
def test_pairs_without_ids_are_refused_where_ids_are_required(folders, films, tmp_path, missing):
    processor = model.Processor(folders["qwen"], 56 * 56, 1)
    rows = [pair(index, None, processor) for index in range(3)]
    rows[1][missing] = None
    with pytest.raises(data.RowError, match="1 pairs have no token ids"):
        run(folders["qwen"], films, tmp_path, rows, "--require-token-ids")
    assert not (tmp_path / "out" / "merged").exists()


def test_a_pair_that_is_too_long_is_dropped_and_counted(folders, films, tmp_path, capsys):
    processor = model.Processor(folders["qwen"], 56 * 56, 1)
    rows = [pair(index, None, processor) for index in range(3)]
    rows[1] |= {"rejected_token_ids": [5] * 300, "rejected": processor.decode([5] * 300)}
    longest = max(
        sum(len(segment.ids) for segment in encode_pair(row, processor, films)) for row in rows[::2]
    )
    run(folders["qwen"], films, tmp_path, rows, "--max-length", str(longest))
    assert f"kept 2 of 3 (1 over {longest} tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "stage.json").read_text())["figures"]["dropped"] == 1
    assert len(data.resume_jsonl(tmp_path / "out" / "reference.jsonl")) == 4  # two chains of each


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda row: row.update(rejected=row["chosen"]), "rejected: is the same text as chosen"),
        (lambda row: row.pop("rejected"), "missing 'rejected'"),
        (lambda row: row.update(images="film0.png"), "images: expected a list"),
    ],
)
def test_a_bad_pair_is_named_by_file_line_and_key(tmp_path, spoil, said):
    rows = [pair(0), pair(1), pair(2)]
    spoil(rows[2])
    data.write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(data.RowError, match=f"pairs.jsonl:3: {said}"):
        schema.read_rows(tmp_path / "pairs.jsonl", "pairs")


def test_a_file_without_pairs_is_refused(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(data.RowError, match="no row in it.*pairs"):
        schema.read_rows(tmp_path / "pairs.jsonl", "pairs")


def drift_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "drift: " in line]


def test_a_run_is_refused_where_the_sampler_told_other_log_probabilities(
    folder, policy, processor, films, tmp_path, capsys
):
    rows, by_token = [pair(k, "film0.png" if k else None, processor) for k in range(2)], []
    for row in rows:
        batch = model.collate([encode_pair(row, processor, films)], processor)
        with torch.no_grad():
            logp = policy(batch)
        for answer, side in enumerate(trees.SIDES, 1):
            row[f"{side}_logp"] = logp[batch.branch == answer].sum().item()
        by_token.append(logp[batch.branch == 2].tolist())
    flags = ["--epochs", "1", "--batch", "2"]
    run(folder, films, tmp_path / "sums", rows, *flags)  # no chain of a pair tells its tokens
    (compared,) = drift_lines(capsys.readouterr().out)
    assert "over 4 chains; the limit is 0.0001" in compared
    for row, tokens in zip(rows, by_token):
        row["rejected_token_logps"] = tokens
    run(folder, films, tmp_path / "honest", rows, *flags)
    compared, own = drift_lines(capsys.readouterr().out)
    assert "over 4 chains, mean absolute" in compared and "the limit is 0.0001" in compared
    assert float(compared.split("mean absolute ")[1].split(";")[0]) < 1e-4
    assert "of the trainer against itself" in own and "over 2 chains" in own
    for row in rows:  # a thousandth of a nat a token
        row["chosen_logp"] += 2e-3 * len(row["chosen_token_ids"])
    with pytest.raises(data.RowError, match="trainer and sampler do not agree"):
        run(folder, films, tmp_path / "other", rows, *flags)
    run(folder, films, tmp_path / "allowed", rows, *flags, "--max-drift", "0.01")
