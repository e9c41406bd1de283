"""Answers at the end of a run: a few questions of the central hold-out, to the base model and to the best adapter.

Never a client's own documents: they would stand in a report that travels further than they may.
"""

from __future__ import annotations

from contextlib import closing

from fedloom.data.prompting import Prompting
from fedloom.evaluation.generation import write_on
from fedloom.experiment.preparation import Prepared
from fedloom.experiment.session import Session
from fedloom.experiment.trial import Trial
from fedloom.recipe.recipe import Recipe

ROOM = 80
"""The most tokens of an answer."""


def write_samples(recipe: Recipe, prepared: Prepared, session: Session, trial: Trial) -> None:
    """Write `samples.json`, where a run's documents are questions with answers and the recipe asks for samples."""
    central, source, adapted = prepared.central, prepared.source, session.adapted
    tokenizer, best = source.tokenizer, trial.recorder.adapters / "best"
    wanted = 0 if recipe.data.learns == "all" or not best.is_dir() else recipe.report.samples
    prompts: list[tuple[list[int], int]] = []
    for row in range(len(central)):
        if len(prompts) >= wanted:
            break
        tokens, counts = central.tokens_NT[row].tolist(), central.counted_NT[row].tolist()
        prompt = tokens[: counts.index(True)]
        room = ROOM if source.max_length is None else min(ROOM, source.max_length - len(prompt) - adapted.prompt_length)
        if prompt and room > 0:
            prompts.append((prompt, room))
    if not prompts:
        return
    with closing(Prompting(recipe.data, tokenizer, chats=recipe.data.is_chat)) as prompting:
        stops = prompting.stops

    def answer_all() -> list[str]:
        return [write_on(adapted, tokenizer, prompt, room=room, stops=stops) for prompt, room in prompts]

    with adapted.as_base(adapted.open(trial.recorder.adapters / "initial"), adapted.open(best)):
        before = answer_all()
    samples = [
        {"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "base": base, "tuned": tuned}
        for (prompt, _), base, tuned in zip(prompts, before, answer_all(), strict=True)
    ]
    trial.recorder.writer.write_json("samples.json", {"samples": samples})
