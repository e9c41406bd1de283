"""A server whose clients are private: it takes nothing of them that a private run does not tell, and says so."""

from dataclasses import replace
from typing import Any

import pytest
from support.liars import Lie, LyingClient, facts_of
from support.marks import first
from support.tiny import make_adapted, make_recipe

from fedloom.deployment.messages import hide_documents, unpack_facts
from fedloom.deployment.server.facts import check_facts
from fedloom.errors import DeploymentError, MessageError
from fedloom.federation.fleet import ClientPreview
from fedloom.host.frames import Frame
from fedloom.training.jobs import ClientFailure, ClientTask

pytestmark = pytest.mark.usefixtures("hurry")

BOUND = {"epsilon": 8.0, "delta": 1e-3}


def telling(do: str, **fields: Any) -> Lie:
    """A client that tells more than it may, in one kind of answer."""

    def lie(asked: str, question: Frame, answer: Frame) -> Frame:
        if asked != do:
            return answer
        report = {"report": {**answer.manifest["report"], **fields}} if do == "train" else fields
        return replace(answer, manifest={**answer.manifest, **report})

    return lie


@pytest.mark.parametrize(
    "fields", [{"tokens": 4}, {"loss_first": 1.0}, {"loss_mean": 1.0}, {"seconds": 1.5}, {"holdout_loss_after": 1.0}]
)
def test_an_update_that_tells_of_documents_is_refused_so_that_nobody_has_it(fields: dict[str, Any]) -> None:
    fleet, _ = LyingClient(telling("train", **fields)).fleet(privacy=BOUND)
    start = make_adapted().read()
    tasks = [ClientTask(1, client, start, make_recipe().training, 2, 7) for client in fleet.clients]
    honest, liar = [found for found in fleet.train(tasks) if not isinstance(found, ClientPreview)]
    assert not isinstance(honest, ClientFailure)
    assert isinstance(liar, ClientFailure)
    assert next(iter(fields)) in str(liar.error)


def test_a_score_is_not_taken() -> None:
    fleet, said = LyingClient(telling("evaluate", score=[2.0, 1, 4])).fleet(privacy=BOUND)
    assert fleet.evaluate(make_adapted().read()) == {}
    assert [words for words in said if words.startswith("unscored 1: score")]


@pytest.mark.parametrize("fields", first([{"tokens": 7}, {"holdout_blocks": 2}, {"noise_multiplier": None}]))
def test_a_client_that_tells_of_its_documents_or_of_no_noise_is_not_enrolled(fields: dict[str, Any]) -> None:
    with pytest.raises(DeploymentError, match="1 of 2 clients came"):
        LyingClient(telling("meet", **fields)).fleet(wait_seconds=0.5, privacy=BOUND)


def test_a_client_takes_at_least_the_recipes_noise() -> None:
    recipe = make_recipe(privacy={"noise_multiplier": 2.0, "delta": 1e-3})
    facts = unpack_facts(hide_documents(facts_of("0", noise_multiplier=2.0), "meet"), private=True)
    check_facts(recipe, facts)
    check_facts(recipe, replace(facts, noise_multiplier=3.0))
    for noise in (1.9, 1e-9):
        with pytest.raises(MessageError, match="less noise than the recipe asks for"):
            check_facts(recipe, replace(facts, noise_multiplier=noise))
    with pytest.raises(MessageError, match="takes noise where the recipe has none"):
        check_facts(make_recipe(), facts)
    with pytest.raises(MessageError, match=r"privacy\.delta: 0\.5 is more than one over the 4 documents"):
        check_facts(make_recipe(privacy={"noise_multiplier": 2.0, "delta": 0.5}), facts)
