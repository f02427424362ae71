"""The miniature: a small invented clinic of drawn films, histories and rules, all checkable.

It stands in for what a laptop cannot have: the general model, the question bank, the teachers, the
experts, the judge. Nothing else of the method is imitated: curate, distil, SFT, rollout, judge, DPO
and evaluate are the real scripts.

    film         56 x 56 pixels, four modalities with three signs each, one to three of them, left
                 or right. The base model has also met normal films, without a sign; no question is
                 about one, but looking.py shows them.
    history      age, sex, one of three clues, one symptom that means nothing
    rule         sign + clue -> diagnosis (36 rules); diagnosis -> next step. Neither film nor
                 history alone decides.
    question     film + history + "What is the diagnosis?" or "What is the best next step?" + four
                 options: what is right by each of the modality's three signs, and one other, so
                 who does not look is right in a third. A text question has the reading of the film
                 as a sentence instead of the film. The bank also has questions that curation must
                 find: a few that looking alone answers ("What does the film show?"), and a few
                 whose text tells what the film shows.
    full chain   read the film, read the history, recall the rule, conclude, check

    base model   a tiny Qwen2.5-VL or InternVL, taught from scratch to see, to know the rules and to
                 answer directly, never to reason. Stage I must elicit reasoning from text alone.
    teachers     thorough (full chain, its check in one of three wordings), hasty (no check, and
                 always writes one sign on the left), bookish (never looks at the film, argues from
                 the history). The mixture gives Stage II something to prefer.
    classifier   finds the questions that looking alone answers
    editor       removes readings of the film from a question's text
    judge        answers the paper's Appendix A prompt with JSON from the truth. A film carries its
                 truth in a PNG text chunk, which the roles read and no model sees.

    python -m clinic world --out OUT      bank.jsonl, dev.jsonl, test.jsonl, films/
    python -m clinic teach --out OUT      the base model, a Hugging Face folder
    python -m clinic show --out OUT       a sheet of films, and one question of each kind
    medee.py demo --ablate                what else each stage could learn from (ablations.py)

Everything follows from --seed. All numbers here are ours: the paper has no miniature.
"""
