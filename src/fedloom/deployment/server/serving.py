"""`fedloom serve`: a run whose clients are other machines. All but the clients is as in `fedloom run`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedloom.data.splits import Audit
from fedloom.deployment.keys import Security, describe_expiry, in_use
from fedloom.deployment.messages import ClientFacts, pack_recipe
from fedloom.deployment.own_messages import KeptAdapter
from fedloom.deployment.processes import check_flower, free_port, private_folder
from fedloom.deployment.server.exchange import Exchange
from fedloom.deployment.server.facts import check_facts, terms_of
from fedloom.deployment.server.ground import Ground, describe_room, lay_ground
from fedloom.deployment.server.nginx import proxy
from fedloom.deployment.server.remote_fleet import RemoteFleet
from fedloom.deployment.server.superlink import SuperLink
from fedloom.errors import DeploymentError, MessageError, RecipeError
from fedloom.experiment.preparation import Prepared, check_cohort, name_ways
from fedloom.experiment.preview import describe_learning
from fedloom.experiment.private import promise
from fedloom.experiment.run import run
from fedloom.experiment.session import Session, hash_base
from fedloom.experiment.trial import Trial
from fedloom.experiment.unused import find_unused
from fedloom.experiment.watchers import Watchers
from fedloom.experiment.weighing import plan_shares
from fedloom.federation.schedule import choose_scored_clients, cohort_size, count_evaluated
from fedloom.host.failpoints import failpoint
from fedloom.host.machine import free_memory
from fedloom.model.attention import is_slow
from fedloom.model.devices import has_in_hardware
from fedloom.monitoring.display import Terminal
from fedloom.monitoring.observer import Observer, Observers
from fedloom.progress import Say
from fedloom.recipe.recipe import Recipe, pin
from fedloom.recipe.training_section import Training
from fedloom.records.plan import UNKNOWN, ClientPlan, Plan
from fedloom.records.run import Run, has_plan, read_run
from fedloom.records.writer import default_folder
from fedloom.text import count

WAIT_SECONDS = 600.0


def serve(
    recipe: Recipe,
    out: Path | None = None,
    display: Observer | None = None,
    *,
    resume: bool = False,
    port: int = 0,
    security: Security | None = None,
    wait_seconds: float = WAIT_SECONDS,
    observers: Sequence[Observer] = (),
) -> Run:
    """Carry out a recipe with clients on other machines, and leave the same run directory as `run`.

    Raises:
        FedloomError: what the person who asked can mend.
    """
    check_flower()
    check_deployable(recipe)
    recipe = with_limits(recipe)
    display = Observers(display or Terminal(), *observers)
    out = out or default_folder(recipe.name)
    with ExitStack() as stack:
        if security:
            stack.enter_context(in_use(security.folder, out))
        link = stack.enter_context(link_to_clients(port, security, display.show_step))
        clients = RemoteClients(link, wait_seconds, clients_of(out) if resume else ())
        return run(recipe, out, display, resume=resume, clients=clients)


@contextmanager
def link_to_clients(port: int, security: Security | None, say: Callable[[str, str], object]) -> Iterator[SuperLink]:
    """Yield a SuperLink that is not open yet, behind nginx where clients come from other machines.

    Raises:
        DeploymentError: nginx is not installed, or does not start.
    """
    with ExitStack() as stack:
        folder, port = stack.enter_context(private_folder()), port or free_port()
        if security:
            say("server", describe_expiry(security.expires()))
            port = security.port if security.is_local else port
            stack.enter_context(proxy(security, port, folder, say))
        yield stack.enter_context(closing(SuperLink(folder, port, security, say)))


def clients_of(folder: Path) -> Sequence[str]:
    """Return the names of a run's clients, in their order; none of one that has not begun.

    Raises:
        RunError: the run directory is damaged.
    """
    return read_run(folder).plan.get("elsewhere", ()) if has_plan(folder) else ()


def check_deployable(recipe: Recipe) -> None:
    """Refuse what clients on other machines can't do yet.

    Raises:
        RecipeError
    """
    if recipe.training.optimizer_state == "keep":
        raise RecipeError(
            "clients on other machines keep no optimizer state", where="training.optimizer_state", mend='use "reset"'
        )
    if recipe.bounds_clients:
        raise RecipeError(
            "clients elsewhere would have to trust the server, which sees every update and whom it drew",
            where='privacy.unit = "client"',
            mend='use fedloom run, for a simulation, or unit = "document" or a column',
        )
    if recipe.baselines:
        raise RecipeError("baselines need all documents in one place", where="baselines", mend="leave it out")
    if recipe.federation.lora_rule == "fedsa" and recipe.privacy is not None:
        raise RecipeError(
            'with lora_rule = "fedsa" clients alone can judge adapters, and those of a private run tell no loss',
            where="federation.lora_rule",
            mend='use another: "ffa" and "rolora" send half the bytes too',
        )
    # Each client's B is on its own machine, so nothing can be asked of a whole adapter here.
    whole = {
        "data.central_holdout": recipe.data.central_holdout,
        "evaluation.tasks": recipe.evaluation.tasks,
        "report.samples": recipe.report.samples if recipe.data.learns != "all" else 0,
    }
    if recipe.federation.lora_rule == "fedsa" and (asked := [key for key, value in whole.items() if value]):
        raise RecipeError(
            'with lora_rule = "fedsa" the server has A alone, which is no adapter to judge: clients judge theirs',
            where=asked[0],
            mend="set it to []" if asked[0] == "evaluation.tasks" else "set it to 0",
        )
    if recipe.contributions:
        raise RecipeError(
            "what each client brings is found by federations without it, for which all documents have to be in one"
            " place: clients on other machines are not asked for them",
            where="contributions",
            mend="leave it out, or use fedloom run",
        )
    if recipe.model.dtype == "float64":
        raise RecipeError("what travels is float32", where="model.dtype", mend='use "float32"')
    try:
        pack_recipe(recipe)
    except MessageError as error:
        raise RecipeError(f"{error.what}: clients take no other", where=error.where) from None


def with_limits(recipe: Recipe) -> Recipe:
    """Return the recipe with the limits that it leaves out: what clients say of themselves is not known to be true.

    What a run has on record is then what was done.
    """
    section = recipe.federation
    # Half of the weight for one of a hundred would be no limit: four equal shares then.
    share = min(0.5, 4 / cohort_size(recipe.data.clients, section))
    limits = {"max_share": share, "max_change": 10.0, "max_client_blocks": 1_000_000}
    lacking = {key: value for key, value in limits.items() if getattr(section, key) is None}
    return recipe.model_copy(update={"federation": section.model_copy(update=lacking)})


def gather(
    link: SuperLink,
    recipe: Recipe,
    show: Observer,
    check: Callable[[], object],
    wait_seconds: float,
    known: Sequence[str] = (),
) -> tuple[Ground, Exchange, list[str]]:
    """Lay the server's ground and wait for the clients; return it, the exchange with them, and their names in order.

    The link is opened, if it is not open yet. `check` is called at every wait, and may end it.

    Raises:
        FedloomError: the data, the model or the clients can't be had.
    """
    ground = lay_ground(recipe, show.show_step)
    if words := describe_room(ground.setup.payload_bytes, free_memory()):
        show.show_step("memory", words)
    link.watch(check)
    if not link.is_open:
        show.show_step("server", "starting Flower's SuperLink")
        link.open()
    source = ground.source
    weights = source.weights.record if source.weights else {}
    exchange = Exchange(
        link,
        pack_recipe(pin(recipe, {"model_revision": source.revision, "model_weights": weights})),
        recipe.federation.round_deadline,
        show.show_step,
        show.show_clients,
        partial(check_facts, recipe),
        show.show_wait,
    )
    show.show_step("waiting", f"for {count(recipe.data.clients, 'client')}")
    return ground, exchange, exchange.assemble(recipe.data.clients, wait_seconds, known)


class RemoteClients:
    """Clients on other machines. The link to them is opened when the run is prepared, if it is not open yet.

    `known` are the names of those that the run has, if it goes on. `check` is called at every wait, and may end it.
    """

    def __init__(
        self,
        link: SuperLink,
        wait_seconds: float,
        known: Sequence[str] = (),
        check: Callable[[], object] = bool,
        command: str = "fedloom serve",
    ) -> None:
        self._link, self._wait_seconds, self._known, self._check = link, wait_seconds, known, check
        self.command = command
        self._names: list[str] = []
        self._exchange: Exchange | None = None

    def prepare(self, recipe: Recipe, watchers: Watchers) -> Prepared:
        """Gather the server's own hold-out, wait for the clients, and plan with what they tell of theirs.

        Raises:
            FedloomError: the data, the model or the clients can't be had.
        """

        def check() -> None:
            watchers.check()
            self._check()

        ground, self._exchange, self._names = gather(
            self._link, recipe, watchers, check, self._wait_seconds, self._known
        )
        source, device, found, central, setup = ground
        facts = [self._exchange.facts[name] for name in self._names]
        private = recipe.privacy is not None
        held = [fact.holdout_blocks for fact in facts]
        scored = choose_scored_clients(held, recipe.evaluation, seed=recipe.seed, private=private)
        if not len(central) and not scored:
            raise RecipeError("nothing is held out, so no adapter can be judged", where="data.central_holdout")
        plan = Plan.of(
            recipe.name,
            recipe.training,
            recipe.federation,
            evaluated_rounds=count_evaluated(recipe.federation.rounds, recipe.evaluation.every),
            model=source.name,
            model_revision=source.revision,
            model_weights=source.weights.record if source.weights else {},
            dtype=setup.dtype,
            device=str(device),
            engine=setup.engine,
            slow_attention=is_slow(source.config),
            slow_dtype=not has_in_hardware(setup.dtype, device),
            parameters=setup.shape.num_parameters,
            base_parameters=setup.shape.num_base_parameters,
            trainable_parameters=setup.shape.layout.size,
            payload_bytes=setup.payload_bytes,
            data=f"{', '.join(self._names)}: each its own",
            elsewhere=tuple(self._names),
            data_revision=UNKNOWN,
            documents=len(found.documents) + sum(fact.train_documents + fact.holdout_documents for fact in facts),
            skipped=dict(found.skipped),
            learns=describe_learning(recipe.data, (), found.other_columns),
            central_documents=len(found.documents),
            central_tokens=central.num_tokens,
            clients=[_plan_client(fact, recipe.training) for fact in facts],
            scored_clients=scored,
            left_out=(),
            clients_per_round=check_cohort(recipe, sum(1 for fact in facts if fact.blocks)),
            clients_at_once=1,
            clients_that_fit=None,
            peak_bytes=None,
            audit=_join_audits(facts, len(found.documents), recipe),
            shared_blocks=sum(fact.shared_blocks for fact in facts),
            duplicates=recipe.data.duplicates,
            ways=name_ways(recipe, setup),
        )
        if recipe.privacy:
            terms = {client: terms_of(recipe, fact) for client, fact in enumerate(facts) if fact.blocks}
            plan = promise(plan, recipe, terms)
        unused = find_unused(recipe, plan, setup.shape)
        if any(fact.tasks for fact in facts):  # those of clients are asked in the rounds, too
            unused = tuple(line for line in unused if not line.startswith("evaluation.tasks_every"))
        plan = replace(plan, unused=unused, shared_alone=recipe.federation.lora_rule == "fedsa")
        plan = plan_shares(plan, recipe.federation, self._names)
        told = tuple(fact.documents for fact in facts)
        return Prepared(source, device, central, (), scored, plan, 1, told)

    def open_fleet(self, recipe: Recipe, prepared: Prepared, session: Session, folder: Path) -> RemoteFleet:
        """Return the fleet of the clients that came.

        Raises:
            DeploymentError: one has another base model.
        """
        assert self._exchange is not None, "a fleet before its clients came"
        facts, base = self._exchange.facts, hash_base(session.adapted)
        if others := [name for name in self._names if facts[name].base != base]:
            raise DeploymentError(
                f"{', '.join(others)} loaded another base model than the server",
                where="model.source",
                mend='give all the same files, the same versions of packages and model.dtype = "float32"',
            )
        return RemoteFleet(
            self._exchange,
            self._names,
            recipe.federation,
            prepared.scored_clients,
            folder,
            session.watch,
            counted_width=recipe.data.max_length if recipe.data.pad_in_loss else None,
        )

    def finish(self, trial: Trial, session: Session, say: Say) -> None:
        """Have each client make the adapter that is its own, and stays there; what it tells of it is put on record.

        With `personalise` that is trained on from the best adapter; with `lora_rule = "fedsa"` it is the last A with
        the client's own B.
        """
        recipe, run, fleet = trial.recipe, trial.run, trial.fleet
        assert isinstance(fleet, RemoteFleet), "open_fleet made it"
        if recipe.personalise:
            say("by itself", "each client goes on from the best adapter, and keeps what comes of it")
            session.begin_stage("personalise")
            best = read_run(trial.recorder.writer.folder).best_round
            found = fleet.keep(trial.recorder.open("best"), run.completed + 1)
        elif recipe.federation.lora_rule == "fedsa":
            say("by itself", "each client keeps the last adapter with its own part")
            best, found = run.completed, fleet.keep(run.adapter, run.completed)
        else:
            return
        for client, kept in found.items():
            if isinstance(kept, MessageError):
                say("lost", f"{self._names[client]}: {kept}")
        told = {str(client): _describe_kept(kept) for client, kept in found.items()}
        trial.recorder.writer.write_json("personalised.json", {"round": best, "clients": told})
        trial.recorder.forget_measured()
        failpoint("personalised.written")


def _describe_kept(kept: KeptAdapter | MessageError) -> dict[str, Any]:
    if isinstance(kept, MessageError):
        return {"error": str(kept)}
    return {} if kept.before is None or kept.after is None else {"global_loss": kept.before, "loss": kept.after}


def _plan_client(facts: ClientFacts, training: Training) -> ClientPlan:
    return ClientPlan.of(
        training,
        train_documents=facts.train_documents,
        holdout_documents=facts.holdout_documents,
        blocks=facts.blocks,
        tokens=facts.tokens,
        holdout_tokens=facts.holdout_tokens,
    )


def _join_audits(facts: Sequence[ClientFacts], central: int, recipe: Recipe) -> Audit:
    """Add up what each client found within its own documents; between clients nobody can look."""
    return Audit(
        central=central,
        train=sum(fact.train_documents + fact.dropped for fact in facts),
        holdout=sum(fact.holdout_documents for fact in facts),
        near_duplicate=recipe.data.near_duplicate,
        overlaps=(),
        dropped=tuple(fact.dropped for fact in facts),
        leaks=sum(fact.leaks for fact in facts),
    )
