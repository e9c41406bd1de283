"""`fedloom serve`: a run whose clients are other machines. All but the fleet and the plan is as in `fedloom run`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from fedloom.data.documents import Documents, load_documents
from fedloom.data.splits import Audit
from fedloom.data.tokens import TokenBlocks
from fedloom.deployment.keys import Security, describe_expiry
from fedloom.deployment.messages import ClientFacts, pack_recipe
from fedloom.deployment.processes import check_flower, free_port, private_folder
from fedloom.deployment.server.exchange import Exchange
from fedloom.deployment.server.nginx import proxy
from fedloom.deployment.server.remote_fleet import RemoteFleet
from fedloom.deployment.server.superlink import SuperLink
from fedloom.errors import DeploymentError, RecipeError
from fedloom.experiment.preparation import Prepared, build_shape, check_length, choose_judges, dtype_of, tokenize_for
from fedloom.experiment.run import Venue, run
from fedloom.experiment.session import Workshop, hash_base
from fedloom.federation.aggregation import check_strategy
from fedloom.federation.fleet import LoyalFleet
from fedloom.federation.schedule import cohort_size
from fedloom.model.loading import choose_device
from fedloom.model.source import open_model
from fedloom.monitoring.display import Display, Terminal
from fedloom.recipe.recipe import Recipe
from fedloom.records.plan import ClientPlan, Plan
from fedloom.records.run import Run
from fedloom.training.engines import choose_engine

WAIT_SECONDS = 600.0


def serve(
    recipe: Recipe,
    out: Path | None = None,
    display: Display | None = None,
    *,
    resume: bool = False,
    port: int = 0,
    security: Security | None = None,
    wait_seconds: float = WAIT_SECONDS,
) -> Run:
    """Carry out a recipe with clients on other machines, and leave the same run directory as `run`.

    Raises:
        FedloomError: what the person who asked can mend.
    """
    check_flower()
    check_deployable(recipe)
    display = display or Terminal()
    port = port or free_port()
    with ExitStack() as stack:
        folder = stack.enter_context(private_folder())
        if security:
            display.show_step("server", describe_expiry(security.expires()))
            port = security.port if security.is_local else port
            stack.enter_context(proxy(security, port, folder, display.show_step))
        link = stack.enter_context(closing(SuperLink(folder, port, security, display.show_step)))
        host = Host(link, wait_seconds)
        venue = Venue(host.prepare, host.open_fleet, "fedloom serve")
        return run(recipe, out, display, resume=resume, venue=venue)


def check_deployable(recipe: Recipe) -> None:
    """Refuse what clients on other machines can't do yet.

    Raises:
        RecipeError
    """
    if recipe.training.optimizer_state == "keep":
        raise RecipeError(
            "clients on other machines keep no optimizer state", where="training.optimizer_state", mend='use "reset"'
        )
    if recipe.baselines:
        raise RecipeError("baselines need all documents in one place", where="baselines", mend="leave it out")
    if recipe.model.dtype == "float64":
        raise RecipeError("what travels is float32", where="model.dtype", mend='use "float32"')


class Host:
    """Opens the link when the run is prepared, and knows who came."""

    def __init__(self, link: SuperLink, wait_seconds: float) -> None:
        self._link, self._wait_seconds = link, wait_seconds
        self._names: list[str] = []
        self._exchange: Exchange | None = None

    def prepare(self, recipe: Recipe, display: Display, check: Callable[[], None]) -> Prepared:
        """The server's own hold-out, and what the clients tell of theirs.

        Raises:
            FedloomError: the data, the model or the clients can't be had.
        """
        source = open_model(recipe.model.source, recipe.model.revision, say=partial(display.show_step, "model"))
        device = choose_device(recipe.model.device)
        found, central = gather_central(recipe, source)
        shape = build_shape(recipe, source, dtype_of(recipe, device))
        check_length(recipe.data.max_length, source, shape)
        display.show_step("server", "starting Flower's SuperLink")
        self._link.watch(check)
        self._link.open()
        self._exchange = Exchange(
            self._link,
            pack_recipe(recipe),
            recipe.federation.round_deadline,
            display.show_step,
            display.show_clients,
        )
        display.show_step("waiting", f"for {recipe.data.clients} clients")
        self._names = self._exchange.assemble(recipe.data.clients, self._wait_seconds)
        facts = [self._exchange.facts[name] for name in self._names]
        judges = choose_judges([fact.holdout_blocks for fact in facts], recipe)
        if not len(central) and not judges:
            raise RecipeError("nothing is held out, so no adapter can be judged", where="data.central_holdout")
        per_round = cohort_size(sum(1 for fact in facts if fact.blocks), recipe.federation)
        check_strategy(recipe.federation.strategy, per_round - recipe.federation.max_lost_clients)
        plan = Plan(
            name=recipe.name,
            model=source.name,
            model_revision=source.revision,
            dtype=dtype_of(recipe, device),
            device=str(device),
            engine=choose_engine(recipe),
            parameters=shape.num_parameters,
            trainable_parameters=shape.layout.size,
            data=f"{', '.join(self._names)}: each its own",
            data_revision="unknown",
            documents=len(found.documents) + sum(fact.train_documents + fact.holdout_documents for fact in facts),
            skipped=dict(found.skipped),
            judged_tokens=sum(facts[judge].holdout_tokens for judge in judges),
            central_documents=len(found.documents),
            central_tokens=central.num_tokens,
            clients=tuple(_plan_client(fact, recipe) for fact in facts),
            left_out=(),
            clients_per_round=per_round,
            clients_at_once=1,
            clients_that_fit=None,
            peak_bytes=None,
            audit=_join_audits(facts, len(found.documents), recipe),
            shared_blocks=sum(fact.shared_blocks for fact in facts),
            duplicates=recipe.data.duplicates,
            rounds=recipe.federation.rounds,
            epochs=recipe.training.epochs,
            proximal_mu=recipe.training.proximal_mu,
            payload_bytes=shape.weights_P.numel() * shape.weights_P.element_size(),
        )
        told = tuple(fact.documents for fact in facts)
        return Prepared(source, device, central, (), plan, 1, told)

    def open_fleet(self, recipe: Recipe, prepared: Prepared, workshop: Workshop, folder: Path) -> LoyalFleet:
        """The clients that came.

        Raises:
            DeploymentError: one has another base model.
        """
        assert self._exchange is not None, "a fleet before its clients came"
        facts, base = self._exchange.facts, hash_base(workshop.adapted)
        if others := [name for name in self._names if facts[name].base != base]:
            raise DeploymentError(
                f"{', '.join(others)} loaded another base model than the server",
                where="model.source",
                mend='give all the same files, the same versions of packages and model.dtype = "float32"',
            )
        judges = choose_judges([facts[name].holdout_blocks for name in self._names], recipe)
        return RemoteFleet(self._exchange, self._names, recipe.federation, judges, folder, workshop.telemetry.watch)


def gather_central(recipe: Recipe, source: Any) -> tuple[Documents, TokenBlocks]:
    """The server's own hold-out: the first documents of its source, none where the recipe asks for none."""
    wanted = recipe.data.central_holdout
    found = load_documents(recipe.data, recipe.seed, wanted) if wanted else Documents((), {}, "none", "unknown")
    return found, tokenize_for(source, recipe, found.documents)


def _plan_client(fact: ClientFacts, recipe: Recipe) -> ClientPlan:
    steps = recipe.training.epochs * -(-fact.blocks // recipe.training.batch_size)
    keys = ("train_documents", "holdout_documents", "blocks", "tokens", "holdout_tokens")
    return ClientPlan(**{key: getattr(fact, key) for key in keys}, steps=steps)


def _join_audits(facts: list[ClientFacts], central: int, recipe: Recipe) -> Audit:
    """What each client found within its own documents; between clients nobody can look."""
    return Audit(
        central=central,
        train=sum(fact.train_documents + fact.dropped for fact in facts),
        holdout=sum(fact.holdout_documents for fact in facts),
        near_duplicate=recipe.data.near_duplicate,
        overlaps=(),
        dropped=tuple(fact.dropped for fact in facts),
        leaks=sum(fact.leaks for fact in facts),
    )
