"""The miniature's roles: teachers, experts, classifier, editor and judge.

Each completes a request with text, as a remote model would, and knows the truth of every film. All
numbers are ours: the paper has no miniature.
"""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import answers
import data
from clinic import world

TEACHERS = ("thorough", "hasty", "bookish")
MISREADING = (20, 40)  # per cent of films that teachers named thorough-20 and so on misread
# a check's wordings
CHECKS = ("Wait, let me check:", "Let me make sure:", "One moment, once more:")


def chain(case: world.Case, kind: str, style: str, check: str = CHECKS[0]) -> str:
    """A teacher's response. The thorough one words the check in one of several ways. The hasty one
    neither checks nor counts, and always writes one sign on the left."""
    answer = case.answer(kind)
    if kind == "look":
        return data.join_response(case.reading(), answer)
    facts, checks = world.facts(case, kind), style != "hasty"
    if style == "bookish":
        told = [facts["history"], f"This suggests {case.diagnosis}."]
    else:
        seen = case if checks else replace(case, number=1, side="left")
        told = [seen.reading(), facts["history"], facts["rule"]]
    told += [facts["question"], facts["plan"]] if kind == "step" else [facts["question"]]
    told += [f"{check} {case.diagnosis} fits {case.clue}."] if checks else []
    return data.join_response(" ".join(told), answer)


def understand(asked: str, images: list[Path]) -> tuple[world.Case, str, dict[str, str]]:
    """(truth, kind, options) of a question from its prompt: what the film shows, whoever's it is,
    and the history that is told."""
    if images:
        case = replace(world.film_truth(images[0]), **world.history_of(asked))
    else:
        case = world.sentence_truth(asked)
    requests = {**world.ASK, "look": world.LOOK}
    kind = next(kind for kind, request in requests.items() if request in asked)
    return case, kind, dict(re.findall(r"^\((\w)\) (.+)$", asked, re.M))


def answered_wrongly(response: str, options: dict[str, str], rng: random.Random) -> str:
    """The response with another option as its answer."""
    right = data.split_response(response)[1]
    wrong = rng.choice([text for text in options.values() if text != right])
    return response.replace(f"<answer> {right}", f"<answer> {wrong}")


# --------------------------------------------------------------------------------------------------
# The roles: (the request's last message, its images, the role's name, random) -> completion


def teacher(asked: str, images: list[Path], name: str, rng: random.Random) -> str:
    """A teacher's chain. One in ten is spoilt, each in a way that one of the three criteria of
    paper 3.2 must catch. One that misreads a film still gives the right answer: others would be
    rejected."""
    case, kind, options = understand(asked, images)
    style, _, percent = name.partition("-")
    response, fault = chain(case, kind, style, rng.choice(CHECKS)), rng.random()
    if percent and images and rng.random() < int(percent) / 100:
        others = [sign for sign in world.SIGNS[case.modality] if sign != case.sign]
        read = replace(case, sign=rng.choice(others), number=rng.randint(1, 3))
        response = world.MENTION.sub(read.reading(), response)
    if fault < 0.04:
        return answered_wrongly(response, options, rng)
    if fault < 0.07:  # no structure: the answer is inside the thinking
        return response.replace("</think> ", "").replace("</answer>", "</answer> </think>")
    if fault < 0.10:  # a loop
        thinking, answer = data.split_response(response)
        return data.join_response(" ".join([thinking] * 6), answer)
    return response


def expert(asked: str, images: list[Path], name: str, rng: random.Random) -> str:
    """An expert's response. Each has questions that it never gets right, and errs now and then."""
    case, kind, options = understand(asked, images)
    response = chain(case, kind, "thorough")
    if images:
        asked = re.sub(rf"{world.MENTION.pattern} ", "", asked)
    wrong = world.never_solves(name, asked) or rng.random() < 0.25
    return answered_wrongly(response, options, rng) if wrong else response


SENTENCES = re.compile(  # the sentences of a coherent chain; anything else is garbled
    r"(?:(?:The \w+ shows (?:no signs|\w+ \w+ signs on the \w+)"
    r"|The history gives \w+"
    r"|A \w+ with \w+ means \w+"
    r"|This suggests \w+"
    r"|Asked is the (?:diagnosis|next step)"
    r"|So \w+ needs \w+"
    rf"|(?:{'|'.join(CHECKS)}) \w+ fits \w+)\.\s*)+"
)


CHECKED = re.compile(r"(\w+) fits (\w+)\b")  # a check's diagnosis and clue


def verdict(
    case: world.Case, kind: str, options: dict[str, str], answer: str, response: str
) -> dict[str, bool]:
    """The five judgements of Appendix A, from the truth.

    Image analysis: the film is read. No hallucination: readings, clues and what checks confirm are
    this patient's; rules and next steps are the clinic's. Logic: each step follows from those
    before it, and the answer from the last. Reflection: the conclusion is checked.
    """
    parts = data.split_response(response)
    thinking, said = parts or (response, "")
    readings = list(world.MENTION.finditer(thinking))
    clues = re.findall(r"The history gives (\w+)\.", thinking)
    rules = re.findall(r"\b[Aa] (\w+) with (\w+) means (\w+)\b", thinking)
    suggests = re.findall(r"This suggests (\w+)\.", thinking)
    fits = CHECKED.findall(thinking)
    needs = re.findall(r"So (\w+) needs (\w+)\.", thinking)
    tasks = re.findall(r"Asked is the [\w ]+\.", thinking)
    true = (
        all(reading[0] == case.reading() for reading in readings)
        and all(clue == case.clue for clue in clues)
        and all(pair == (case.diagnosis, case.clue) for pair in fits)
        and all(world.RULE.get((sign, clue)) == diagnosis for sign, clue, diagnosis in rules)
        and all(world.NEXT_STEP.get(diagnosis) == step for diagnosis, step in needs)
        and (case.number > 0 or not (rules or fits))  # a normal film has no sign to argue from
    )
    named = {*suggests, *(d for *_, d in rules), *(d for d, _ in fits), *(d for d, _ in needs)}
    last = needs[-1][1] if needs else next(iter(named), "")
    logical = (
        parts is not None
        and SENTENCES.fullmatch(thinking) is not None
        and bool(rules or suggests)
        and len(named) == len(clues) == 1
        and bool(needs) == (kind == "step")
        and all(task == world.TASK[kind] for task in tasks)
        and all(clue == clues[0] for _, clue, _ in rules)
        and all(clue == clues[0] for _, clue in fits)
        and all(not readings or sign == readings[0][3] for sign, _, _ in rules)
        and data.normalise(said) == data.normalise(last)
    )
    return {
        "Answer_Correctness": answers.extract_choice(response, options) == answer,
        "Logical_Consistency": logical,
        "Image_Analysis_Involvement": bool(readings),
        "No_Hallucination": true,
        "Reflection_Presence": any(check in thinking for check in CHECKS),
    }


# judges that err, and how: blind never sees a hallucination, lenient lets half of what fails pass,
# style says Yes to all wherever a chain checks itself; a number is the per cent of verdicts flipped
ERRING = ("judge-blind", "judge-lenient", "judge-style", "judge-20", "judge-50")


def erring(
    judged: dict[str, bool], name: str, response: str, rng: random.Random
) -> dict[str, bool]:
    """A judge's verdict from the truth, by the judge's name. Its answer to whether the answer is
    right has no error."""
    kind = name.partition("-")[2]
    checks = any(check in response for check in CHECKS)
    found = dict(judged)
    for criterion, met in list(judged.items())[1:]:
        if kind == "blind" and criterion == "No_Hallucination":
            found[criterion] = True
        if kind == "lenient":
            found[criterion] = met or rng.random() < 0.5
        if kind == "style":
            found[criterion] = met or checks
        if kind.isdigit():
            found[criterion] = met != (rng.random() < int(kind) / 100)
    return found


def judge(prompt: str, images: list[Path], name: str, rng: random.Random) -> str:
    """The completion of the Appendix A prompt: its JSON, with Yes and No."""
    asked, truth, response = (
        re.search(rf"<{part}> (.*?) </{part}>\s*(?=<Groundtruth>|<Answer>|$)", prompt, re.S)[1]
        for part in ("Question", "Groundtruth", "Answer")
    )
    case, kind, options = understand(asked, images)
    judged = verdict(case, kind, options, truth[0], response)
    judged = erring(judged, name, response, rng)
    return json.dumps({name: "Yes" if met else "No" for name, met in judged.items()}, indent=4)


def question_in(prompt: str) -> str:
    return re.search(r"<Question> (.*) </Question>", prompt, re.S)[1]


def classifier(prompt: str, images: list[Path], *_) -> str:
    """The type of a question, as curate.py requests it."""
    case, kind, _ = understand(question_in(prompt), images)
    label, why = "clinical_reasoning", "It takes film, history and rule."
    if kind == "look":
        label, why = "pattern_recognition", "The film alone shows it."
    return json.dumps({"type": label, "modality": world.KINDS[case.modality], "why": why})


def editor(prompt: str, *_) -> str:
    """The question without readings of the film, as curate.py requests it."""
    asked = question_in(prompt)
    readings = [match[0] for match in world.MENTION.finditer(asked)]
    for reading in readings:
        asked = asked.replace(f"{reading} ", "")
    return json.dumps({"question": asked, "removed": readings})


ROLES = {name: teacher for name in TEACHERS} | {"expert-a": expert, "expert-b": expert}
ROLES |= {"classifier": classifier, "editor": editor, "judge": judge}
ROLES |= dict.fromkeys(ERRING, judge)
ROLES |= {f"{name}-{percent}": teacher for name in TEACHERS for percent in MISREADING}


def answer(role: str, messages: list[dict], images: list[Path], seed: int) -> str:
    """The completion of `clinic:ROLE`. Whatever turn it is, what was asked first is completed."""
    asked = next(turn["content"] for turn in messages if turn["role"] == "user")
    return ROLES[role](asked, images, role, random.Random(f"{role}/{seed}"))
