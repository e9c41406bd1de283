"""FlowerTune's recipes, held to the published configuration."""

import math

import pytest

from fedloom.recipe.loading import load_recipe
from fedloom.recipe.templates import parse_template

BELOW = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ROW = {"instruction": "Sort it.", "input": "b a", "output": "a b"}
CHALLENGES = {
    "nlp": ("flwrlabs/alpaca-gpt4", 20, 2, "Sort it."),
    "finance": ("flwrlabs/fingpt-sentiment-train", 50, 5, "Sort it. b a"),
    "medical": ("flwrlabs/medical-meadow-medical-flashcards", 20, 2, "b a"),
    "code": ("flwrlabs/code-alpaca-20k", 10, 2, "Sort it. b a"),
}


@pytest.mark.parametrize("ending", ["", "-as-run"])
@pytest.mark.parametrize("challenge", CHALLENGES)
def test_a_challenge_has_its_published_configuration(challenge: str, ending: str) -> None:
    recipe = load_recipe(f"flowertune-{challenge}{ending}")
    source, clients, in_a_round, asked = CHALLENGES[challenge]
    data, training, federation, options = recipe.data, recipe.training, recipe.federation, recipe.model
    assert (data.source, data.clients, data.max_length) == (source, clients, 512)
    assert round(federation.fraction * clients) == in_a_round
    prompt, completion = (parse_template(part or "").fill(lambda name, _: ROW[name]) for part in
                          (data.prompt, data.completion))  # fmt: skip
    assert prompt + completion == f"{BELOW}\n### Instruction:\n{asked}\n### Response: a b"
    assert completion == " a b", "the answer begins behind the response mark"
    assert data.ends is not bool(ending)
    assert (options.source, options.quantization) == ("mistralai/Mistral-7B-v0.3", "4bit")
    assert options.quantization_options is not None
    assert options.quantization_options.model_dump() == {"type": "fp4", "compute_dtype": "float32", "double": False}
    assert recipe.adapter.given == {"rank", "alpha", "dropout"}, "targets are PEFT's choice"
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (32, 64, 0.075)
    assert (training.batch_size, training.gradient_accumulation, training.max_steps) == (16, 1, 10)
    assert (training.schedule, training.schedule_scope) == ("cosine", "rounds")
    assert (training.learning_rate, training.learning_rate_end) == (5e-5, 1e-6)
    assert (training.max_gradient_norm, training.weight_decay, training.proximal_mu) == (1.0, 0, 0)
    assert training.gradient_checkpointing
    assert (federation.rounds, federation.keep_every, federation.max_bytes) == (200, 5, 200_000 * 2**20)
    # The budget allows all rounds: what the layers of Mistral-7B that are adapted come to, both ways.
    adapter = 32 * 4 * 32 * ((4096 + 4096) + (4096 + 1024))
    assert math.isclose(200 * in_a_round * 2 * adapter / 2**30, 101.6 if challenge == "finance" else 40.6, rel_tol=2e-3)
    assert 200 * in_a_round * 2 * adapter < federation.max_bytes


def test_alpacas_prompt_leaves_out_what_a_row_has_not() -> None:
    template = parse_template(load_recipe("alpaca").data.prompt or "")
    full, bare = (template.fill(lambda name, _, row=row: row[name]) for row in (ROW, {**ROW, "input": ""}))
    assert full.replace("### Input:\nb a\n\n", "") == bare
    assert bare == f"{BELOW}\n\n### Instruction:\nSort it.\n\n### Response:\n"


def test_the_small_one_is_the_same_configuration_with_other_sizes() -> None:
    small, whole = load_recipe("tiny-flowertune"), load_recipe("flowertune-nlp")
    assert small.adapter == whole.adapter
    sizes = {"batch_size", "max_steps", "learning_rate", "learning_rate_end"}
    assert small.training.model_dump(exclude=sizes) == whole.training.model_dump(exclude=sizes)
