"""The miniature's ablations: their commands are real, and their pairs and teachers are what they
are said to be."""

import importlib
import random
from collections import Counter
from pathlib import Path

import pytest

import answers
import clinic.roles
import data
import judge
import medee
from clinic import ablations, school
from clinic import world as clinic_world
from command import schema
from report import claims, miniature

STAGES = medee.demo_stages(Path("run"), "qwen", "tiny", "normal", 21, ablate=True)
OWN = len(medee.demo_stages(Path("run"), "qwen", "tiny", "normal", 21))


def chain(text: str, answer: str) -> str:
    return data.join_response(text, answer)


def pair(number: int) -> dict:
    question = data.Question(f"{number}?", {"A": "x", "B": "y"}, "A", ["film.png"])
    rows = [
        {"response": chain(f"{side} {number}", "x"), "sample": k, "token_ids": [number, k]}
        for k, side in enumerate(("good", "bad"))
    ]
    return judge.pair_row(question, rows[0], {**rows[1], "failed": ["Reflection_Presence"]})


def ablate(tmp_path, pairs: list[dict], count: int, *more: str) -> list[dict]:
    data.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    words = ["--pairs", str(tmp_path / "pairs.jsonl"), "-n", str(count)]
    ablations.main([*words, "--out", str(tmp_path / "out"), *more])
    kind = "demos" if "--chosen" in more else "pairs"
    return schema.read_rows(tmp_path / "out" / f"{kind}.jsonl", kind)


def test_each_command_is_one_its_script_takes_and_reads_what_an_earlier_one_writes():
    written = {str(one.folder) for one in STAGES[:OWN]}
    for one in STAGES[OWN:]:
        script = one.script.removeprefix("-m ").removesuffix(".py")
        name = "clinic.__main__" if script == "clinic" else script
        importlib.import_module(name).parse(one.words)
        assert not any("{" in word for word in one.words)
        own = [Path(word.split(":")[-1]) for word in one.words if "run/" in word]
        for path in own:
            folders = {str(path), *map(str, path.parents)}
            assert path == one.folder or folders & written, (one.name, path)
        written.add(str(one.folder))


def test_every_ablation_of_the_docstring_is_compared():
    named = {one.name.split("/")[1] for one in STAGES[OWN:]}
    worlds = {f"{kind}-world" for kind in ablations.WORLDS}
    assert named == {*ablations.NAMES, "captions", *worlds}
    sides = {side[0] for claim in claims.CLAIMS for side in (claim.before, claim.after)}
    assert sides <= {miniature.BASE, miniature.STAGE1, miniature.STAGE2, *ablations.NAMES}


def test_pairs_are_as_many_as_wanted_and_exactly_that_share_is_the_wrong_way_round(tmp_path):
    pairs = [pair(number) for number in range(60)]
    found = ablate(tmp_path, pairs, 40, "--swap", "35")
    by_id = {one["id"]: one for one in pairs}
    ways = Counter(one["chosen"] == by_id[one["id"]]["chosen"] for one in found)
    assert ways == {True: 26, False: 14}
    for one in found:
        own = by_id[one["id"]]
        assert {one["chosen"], one["rejected"]} == {own["chosen"], own["rejected"]}
        kept = one["chosen"] == own["chosen"]
        assert one["chosen_token_ids"] == own[f"{'chosen' if kept else 'rejected'}_token_ids"]
        assert one.keys() == own.keys()


def test_the_chosen_chains_become_as_many_demonstrations(tmp_path):
    pairs = [pair(number) for number in range(6)]
    pairs += [{**one, "rejected": one["rejected"].replace("bad", "worse")} for one in pairs]
    found = ablate(tmp_path, pairs, 12, "--chosen")
    assert len(found) == 12  # a chain in two pairs is learnt from twice
    texts = Counter(row["messages"][-1]["content"] for row in found)
    assert texts == {one["chosen"]: 2 for one in pairs}


def test_right_answers_stand_above_wrong_ones_and_unfinished_ones_nowhere():
    question = data.Question("?", {"A": "x", "B": "y"}, "A", ["film.png"], id="q")
    said = [("one", "x", "stop"), ("one", "x", "stop"), ("two", "x", "stop"), ("3", "x", "stop")]
    said += [("no", "y", "stop"), ("cut", "y", "length"), ("late", "x", "length")]
    rows = [
        {"id": "q", "sample": k, "response": chain(text, answer), "finish_reason": end}
        for k, (text, answer, end) in enumerate(said)
    ]
    seen = set()
    for seed in range(20):
        found = ablations.right_above_wrong(rows, {"q": question}, random.Random(seed))
        assert {one["rejected"] for one in found} == {chain("no", "y")}
        chosen = {one["chosen"] for one in found}
        assert len(found) == len(chosen) == ablations.CAP
        seen |= chosen
    assert seen == {chain(text, "x") for text in ("one", "two", "3")}


def test_right_above_wrong_and_the_rates_are_those_of_the_demos_recipe():
    assert ablations.CAP == medee.MINI["pairs"]["cap"]
    rate = medee.MINI["dpo"]["lr"]
    assert ablations.RATES == {"": rate, "-10": pytest.approx(10 * rate)}


@pytest.mark.parametrize("percent", clinic.roles.MISREADING)
def test_a_teacher_misreads_that_share_of_films_and_still_answers_rightly(world, percent):
    asked = [one for one in schema.read_questions(world / "test.jsonl") if one.images]
    wrong = []
    for seed in range(60):
        for one in asked:
            film = world / one.images[0]
            rng = random.Random(f"{seed}/{one.id}")
            text = data.question_text(one)
            own = clinic.roles.teacher(text, [film], "thorough", random.Random(f"{seed}/{one.id}"))
            said = clinic.roles.teacher(text, [film], f"thorough-{percent}", rng)
            assert answers.is_correct(said, one) == answers.is_correct(own, one)
            wrong.append(clinic_world.film_truth(film).sign not in said.split(".")[0])
    assert sum(wrong) / len(wrong) == pytest.approx(percent / 100, abs=0.08)


def test_a_teacher_that_misreads_films_reads_sentences_rightly(world):
    for one in schema.read_questions(world / "test.jsonl"):
        if not one.images:
            text = data.question_text(one)
            said = [
                clinic.roles.teacher(text, [], name, random.Random(3))
                for name in ("thorough", "thorough-40")
            ]
            assert said[0] == said[1]


def test_a_third_of_the_rules_is_withheld_one_of_each_sign_and_none_that_is_familiar():
    assert len(clinic_world.WITHHELD) == len(clinic_world.FAMILIAR) == len(clinic_world.RULE) // 3
    assert not clinic_world.WITHHELD & clinic_world.FAMILIAR
    assert {sign for sign, _ in clinic_world.WITHHELD} == set(clinic_world.MODALITY_OF)
    rng = random.Random(0)
    drawn = {
        (one.sign, one.clue) for one in (clinic_world.draw_case(rng, 4, True) for _ in range(2000))
    }
    assert drawn == clinic_world.RULE.keys() - clinic_world.WITHHELD


def test_no_lesson_of_a_base_model_tells_a_rule_that_is_withheld():
    """All of a lesson's text, through a processor that only keeps it."""
    told = []

    class Keeps:
        family = type("Family", (), {"image_token": "I", "before_image": "", "after_image": ""})

        def tokenize(self, text):
            told.append(text)
            return [], []

        def encode_response(self, text, parent):
            told.append(text)

    image = type("Image", (), {"tokens": 4})
    rng = random.Random(0)
    films = [(clinic_world.draw_case(rng, 4, True), image) for _ in range(200)]
    lessons = school.Lessons(0, Keeps(), films, 4, withhold=True)
    for index in range(1500):
        lessons.row(index)
    text = "\n".join(told)
    for sign, clue in clinic_world.RULE:
        named = f"A {sign} with {clue} means" in text
        assert named == ((sign, clue) not in clinic_world.WITHHELD)


def test_the_true_order_of_pairs_is_those_ordered_so_less_those_reversed(tmp_path):
    criteria = {
        True: dict.fromkeys(judge.CRITERIA, True),
        False: dict.fromkeys(judge.CRITERIA, False),
    }
    verdicts = [{"id": "q", "sample": k, "criteria": criteria[k < 2]} for k in range(4)]
    data.write_jsonl(tmp_path / "verdicts" / "verdicts.jsonl", verdicts)
    ways = [(0, 2), (1, 3), (2, 0), (0, 1), (2, 3)]  # right, right, reversed, tie, tie
    rows = [{"id": "q", "chosen_sample": w, "rejected_sample": l} for w, l in ways]
    data.write_jsonl(tmp_path / "ablations/lenient/matched/pairs.jsonl", rows)
    assert claims.true_order(tmp_path, "lenient") == pytest.approx(1 / 5)
    assert claims.true_order(tmp_path, "four") is None
