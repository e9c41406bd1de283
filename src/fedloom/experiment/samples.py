"""Answers at the end of a run: a few questions of the central hold-out, to the base model and to the best adapter.

Beside them stands the answer that was held out with the question. Never a client's own documents: they would stand in a
report that travels further than they may.
"""

from __future__ import annotations

from contextlib import closing
from itertools import takewhile

from fedloom.data.prompting import Prompting
from fedloom.evaluation.generation import Prompt, Writing, write_with_each
from fedloom.experiment.preparation import Prepared
from fedloom.experiment.session import Session
from fedloom.experiment.trial import Trial
from fedloom.recipe.recipe import Recipe
from fedloom.text import count

ROOM = 80
"""The most tokens of an answer, be it right or a model's."""


def write_samples(recipe: Recipe, prepared: Prepared, session: Session, trial: Trial) -> None:
    """Write `samples.json`, where a run's documents are questions with answers and the recipe asks for samples."""
    central, source, adapted = prepared.central, prepared.source, session.adapted
    tokenizer, best = source.tokenizer, trial.recorder.adapters / "best"
    wanted = 0 if recipe.data.learns == "all" or not best.is_dir() else recipe.report.samples
    prompts: list[Prompt] = []
    answers: list[str] = []
    for row in range(len(central)):
        if len(prompts) >= wanted:
            break
        tokens, counted = central.tokens_NT[row].tolist(), central.counted_NT[row].tolist()
        prompt = tokens[: counted.index(True)]
        room = ROOM if source.max_length is None else min(ROOM, source.max_length - len(prompt) - adapted.prompt_length)
        if prompt and room > 0:
            prompts.append(Prompt(prompt, room))
            right = list(takewhile(counted.__getitem__, range(len(prompt), int(central.lengths_N[row]))))
            text = tokenizer.decode([tokens[place] for place in right[:ROOM]], skip_special_tokens=True)
            answers.append(text.rstrip() + " …" * (len(right) > ROOM))
    if not prompts:
        return
    session.begin_stage("answers")
    session.say("answers", f"to {count(len(prompts), 'question')} that {'is' if len(prompts) == 1 else 'are'} held out")
    with closing(Prompting(recipe.data, tokenizer, chats=recipe.data.is_chat)) as prompting:
        writing = Writing(prompting.stops)
    # What a run began with is the base model where the adapter is a model.
    initial = adapted.open(trial.recorder.adapters / "initial") if adapted.is_whole else None
    before, after = write_with_each(
        adapted, tokenizer, [initial, adapted.open(best)], prompts, writing, watch=session.watch
    )
    samples = [
        {
            "prompt": tokenizer.decode(prompt.tokens, skip_special_tokens=True),
            "answer": answer,
            "base": base.text,
            "tuned": tuned.text,
        }
        for prompt, answer, base, tuned in zip(prompts, answers, before, after, strict=True)
    ]
    trial.recorder.writer.write_json("samples.json", {"samples": samples})
