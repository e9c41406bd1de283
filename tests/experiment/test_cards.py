"""Several devices of one machine: processors stand for them here, each with a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.killed_runs import result_of
from support.quick_runs import attempt, make_recipe
from support.tiny import make_adapted, make_blocks, make_job, make_update, updates_of

from fedloom.adapters.adapter import Adapter as Start
from fedloom.adapters.adapter import Layout
from fedloom.adapters.lora import Residual
from fedloom.data.packing import pack_blocks
from fedloom.deployment.messages import pack_adapter, pack_task
from fedloom.errors import ModelError, ShortageError, TrainingError
from fedloom.experiment import cards
from fedloom.experiment.building import load_adapted_model
from fedloom.experiment.cards import deal, open_session
from fedloom.experiment.job_frames import Done, Found, pack_jobs, pack_result, unpack_jobs, unpack_result
from fedloom.experiment.preparation import prepare
from fedloom.experiment.private import derive_ration
from fedloom.experiment.run import plan, run
from fedloom.experiment.sweep import same_model, sweep
from fedloom.host.frames import Frame
from fedloom.model.devices import choose_devices
from fedloom.monitoring.display import describe_plan
from fedloom.monitoring.observer import Observer
from fedloom.monitoring.telemetry import Telemetry
from fedloom.privacy.ration import Ration, Terms
from fedloom.progress import Progress, Watch
from fedloom.recipe.loading import recipe_to_toml
from fedloom.recipe.recipe import Recipe
from fedloom.recipe.sections import Adapter
from fedloom.records.run import read_run
from fedloom.training.jobs import ClientFailure, ClientJob, ClientUpdate
from fedloom.training.memory import free_on_each, share_of_each

CPU = torch.device("cpu")
TWO = ["cpu", "cpu"]


def processes(parent: psutil.Process | None = None) -> list[psutil.Process]:
    """The processes of further devices that a process has."""
    found = []
    for child in (parent or psutil.Process()).children():
        with suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            found += [child] if "fedloom.experiment.card_process" in child.cmdline() else []
    return found


class Watched(Observer):
    """Keeps what it is told, and does something once, at a step of this process's own or of another's."""

    def __init__(self, once: Callable[[], object] = lambda: None) -> None:
        self.seen: list[Progress] = []
        self.said: list[str] = []
        self.pids: set[int] = set()
        self._once = once

    def show_step(self, what: str, detail: str) -> None:
        self.said.append(f"{what}: {detail}")

    def watch(self, progress: Progress) -> None:
        self.seen.append(progress)
        self.pids |= {child.pid for child in processes()}
        if progress.phase == "train" and progress.round == 2:
            once, self._once = self._once, lambda: None
            once()

    @property
    def trained(self) -> list[tuple[int | None, int | None, int]]:
        return sorted((p.round or 0, p.client or 0, p.tokens) for p in self.seen if p.phase == "train")


def on_two(recipe: Recipe, **training: object) -> Recipe:
    return recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"devices": tuple(TWO), **training})}
    )


@pytest.mark.long
def test_two_processes_give_what_one_gives_to_the_bit(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    one, two = Watched(), Watched()
    assert attempt(recipe, tmp_path / "one", display=one) == ""
    assert attempt(on_two(recipe), tmp_path / "two", display=two) == ""
    assert result_of(tmp_path / "two") == result_of(tmp_path / "one")
    assert two.trained == one.trained, "each step is shown"
    assert (len(one.pids), len(two.pids)) == (0, 1), "this process is one of the two"
    assert not processes(), "it ended with the run"
    assert "devices: a process with the model for each of cpu, cpu" in two.said


def test_a_plan_says_what_each_process_takes(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, training={"engine": "batched"})
    one, two = (describe_plan(plan(given, Observer())) for given in (recipe, on_two(recipe)))
    assert "a process with the model for each of cpu, cpu" in two["device"]
    assert "predicted for model and training in each process, 2 clients at once" in two["memory"]
    assert "predicted for model and training, 3 clients at once" in one["memory"]


@pytest.mark.long
def test_a_process_that_is_killed_ends_the_run_in_one_line_and_it_goes_on(tmp_path: Path) -> None:
    recipe = on_two(make_recipe(tmp_path))

    def kill() -> None:
        (child,) = processes()
        child.kill()

    says = attempt(recipe, tmp_path / "broken", display=Watched(kill))
    assert says.startswith("training.devices: the process that trains on cpu was killed (signal 9); go on with")
    assert not processes()
    gone, after = Watched(), read_run(tmp_path / "broken").status["round"]
    assert attempt(recipe.model_copy(update={"training": recipe.training.model_copy(update={"devices": ("cpu",)})}),
                   tmp_path / "broken", display=gone) == "", "without the device that is gone"  # fmt: skip
    assert 'moved: training.devices = ["cpu"] from here on, which moves results by rounding' in gone.said
    assert read_run(tmp_path / "broken").status["moved"] == [f'after round {after} with training.devices = ["cpu"]']
    assert attempt(make_recipe(tmp_path), tmp_path / "whole") == ""
    assert result_of(tmp_path / "broken") == result_of(tmp_path / "whole")


@pytest.mark.slow
def test_clients_of_a_device_train_in_one_pass_whose_company_moves_results_by_rounding(tmp_path: Path) -> None:
    model, training = {"dtype": "float64"}, {"engine": "batched", "clients_at_once": 2}
    recipe = make_recipe(tmp_path, model=model, data={"clients": 4}, training=training)
    assert attempt(recipe, tmp_path / "one") == ""
    assert attempt(on_two(recipe), tmp_path / "two") == ""
    losses = [[record["central_loss"] for record in read_run(tmp_path / name).rounds] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)


@pytest.mark.slow
def test_a_run_that_goes_on_deals_as_before(tmp_path: Path) -> None:
    recipe = on_two(make_recipe(tmp_path, data={"clients": 4}, training={"engine": "batched"}))
    assert attempt(recipe, tmp_path / "whole") == ""
    with pytest.raises(RuntimeError):
        attempt(recipe, tmp_path / "broken", "round.begins=raise@3")
    assert not processes()
    assert attempt(recipe, tmp_path / "broken") == ""
    assert result_of(tmp_path / "broken") == result_of(tmp_path / "whole")


@pytest.mark.long
def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(on_two(make_recipe(tmp_path)), tmp_path / "run", Watched(interrupt))
    finally:
        signal.signal(signal.SIGINT, before)
    assert not processes()


@pytest.mark.long
def test_no_process_outlives_a_run_that_is_killed(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, federation={"rounds": 1000})
    (tmp_path / "recipe.toml").write_text(recipe_to_toml(on_two(recipe)))
    words = [sys.executable, "-m", "fedloom", "run", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]
    started = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        parent, until = psutil.Process(started.pid), time.monotonic() + 120
        while not (tmp_path / "run" / "rounds.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.1)
        (child,) = processes(parent)
    finally:
        started.kill()
        started.wait()
    child.wait(20)


def test_runs_of_a_sweep_on_other_devices_do_not_share_their_processes(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    assert same_model(recipe) == same_model(recipe.model_copy(update={"name": "other"}))
    assert same_model(recipe) != same_model(on_two(recipe))


EVERYTHING = {
    "fedex": {"federation": {"lora_rule": "fedex", "strategy": {"kind": "fedavg"}}},
    "full": {"adapter": Adapter(method="full")},
    "private": {"privacy": {"noise_multiplier": 0.5, "delta": 1e-3, "noise": "seed"},
                "training": {"optimizer_state": "reset"}},
    "what follows": {"baselines": ["local", "pooled"], "personalise": {"epochs": 1}, "contributions": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("changes", EVERYTHING.values(), ids=EVERYTHING)
def test_whatever_a_run_trains_is_trained_on_two_as_on_one(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, **changes)
    says = {name: attempt(one, tmp_path / name) for name, one in {"one": recipe, "two": on_two(recipe)}.items()}
    assert says == {"one": "", "two": ""}
    assert result_of(tmp_path / "two") == result_of(tmp_path / "one")
    assert not processes()


@pytest.mark.slow
def test_a_sweep_deals_the_clients_of_its_runs_out(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    for name, one in {"one": recipe, "two": on_two(recipe)}.items():
        (tmp_path / f"{name}.toml").write_text(recipe_to_toml(one))
        sweep(tmp_path / f"{name}.toml", ["seed=5,6"], tmp_path / name, Watched())
    assert not processes()
    for seed in ("seed=5", "seed=6"):
        assert result_of(tmp_path / "two" / seed) == result_of(tmp_path / "one" / seed)


@pytest.mark.long
def test_what_nobody_waits_for_is_given_up(tmp_path: Path) -> None:
    recipe = on_two(make_recipe(tmp_path))
    prepared = prepare(recipe, Observer())
    adapted = load_adapted_model(recipe, prepared.source)
    jobs = [make_job(make_blocks(40, seed=client), adapted.read(), client=client) for client in range(4)]
    with Telemetry() as telemetry, open_session(recipe, prepared, adapted, telemetry, Observer(), tmp_path) as session:
        found = session.train_clients(jobs)
        first = next(found)
        found.close()  # type: ignore[attr-defined]
        again = [*updates_of(session.train_clients(jobs))]
    assert [update.client for update in again] == [0, 1, 2, 3]
    assert isinstance(first, ClientUpdate)
    assert torch.equal(first.adapter.weights_P, again[0].adapter.weights_P)


def make_full_job() -> ClientJob:
    """A job that has everything that a job can have."""
    adapted = make_adapted()
    start = adapted.read()
    layer = adapted.layout.names[0].removesuffix(".lora_A.weight")
    residual = Residual({layer: (torch.randn(64, 3), torch.randn(3, 64))})
    mask_P = torch.rand(adapted.layout.size) < 0.5
    job = make_job(
        replace(pack_blocks(make_blocks(9, 16)), dropped=2),
        replace(start, residual=residual),
        client=3, round=2, trial=1, trains_P=mask_P,
        state={"first": torch.randn(5), "step": torch.tensor(3.0)},
        warmup=0.25, optimizer={"kind": "adamw", "betas": [0.5, 0.9]},
    )  # fmt: skip
    ration = Ration(Terms(0.7, 1.0, 2, 9, 4, 1e-5), bytes(range(32)))
    return replace(job, shares_P=mask_P, ration=ration)


@pytest.mark.long
def test_ten_thousand_jobs_are_read_in_one_pass() -> None:
    """A walk over all tensors for each job took two minutes of a node's time, in every round."""
    start, blocks = make_adapted().read(), make_blocks(1)
    mask_P = torch.ones(start.layout.size, dtype=torch.bool)
    job = make_job(blocks, start, trains_P=mask_P)
    jobs = [replace(job, client=client) for client in range(10_000)]
    frame, began = pack_jobs(jobs), time.process_time()
    assert len(frame.payload) < 10_000 * 450 + 2 * start.weights_P.nbytes, "what they have in common comes once"
    arrived = unpack_jobs(frame, start.layout)
    assert time.process_time() - began < 20
    assert [job.client for job in arrived] == [*range(10_000)]
    assert len({id(job.adapter) for job in arrived}) == len({id(job.trains_P) for job in arrived}) == 1


class AheadCard:
    """Device that is done with all of its jobs before the others have begun."""

    def __init__(self, connection: socket.socket) -> None:
        self.is_busy, self.lowered_to, self.fileno = False, None, connection.fileno

    def ask(self, jobs: Sequence[ClientJob]) -> None:
        self.is_busy, self._jobs = True, deque(jobs)

    def hear(self) -> Done | Found:
        if not self._jobs:
            self.is_busy = False
            return Done(None)
        job = self._jobs.popleft()
        update = make_update(replace(job.adapter, weights_P=job.adapter.weights_P + 1), job.client)
        return Found((job.trial, job.client), pack_result(update))

    def look(self) -> None:
        raise AssertionError("it always has something to say")

    def stop(self) -> None:
        self.is_busy = False


def test_results_that_wait_for_their_turn_take_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One adapter for each client that is ahead, where ten thousand train, would be more than a machine has."""
    monkeypatch.setattr(cards, "HELD_BYTES", 2**22)
    start = Start(Layout(("weight",), (torch.Size((2**18,)),)), torch.zeros(2**18))
    jobs = [make_job(make_blocks(1), start, client=client) for client in range(300)]
    process, most = psutil.Process(), 0

    class Slow:
        """Engine of this process: whenever it has trained one, the card has been heard."""

        lowered_to = None

        def __init__(self, watch: Watch) -> None:
            self._watch = watch

        def train(self, jobs: Sequence[ClientJob]) -> Iterator[ClientUpdate]:
            for job in jobs:
                self._watch(Progress("train", 1, 1, 1, job.client))
                yield make_update(replace(start, weights_P=start.weights_P + 1), job.client)

    there, ours = socket.socketpair()
    with there, ours:
        ours.send(b".")  # there is always something to hear
        engine = cards.DealtEngine([AheadCard(there)], Slow, bool, lambda *said: None, tmp_path)  # type: ignore[list-item]
        before = process.memory_info().rss
        for client, update in enumerate(engine.train(jobs)):
            assert update.client == client
            assert isinstance(update, ClientUpdate)
            assert update.adapter.weights_P.sum() == 2**18
            most = max(most, process.memory_info().rss - before)
    assert most < 60e6, "150 adapters of 1 MB wait"


def test_a_job_arrives_as_it_was_sent() -> None:
    job = make_full_job()
    other = replace(make_job(make_blocks(4), job.adapter, client=1))
    sent = pack_jobs([job, other])
    came, second = unpack_jobs(Frame(json.loads(json.dumps(sent.manifest)), sent.payload), job.adapter.layout)
    assert second.adapter is came.adapter, "so their residual is loaded once"
    assert came.adapter.sha256() == job.adapter.sha256()
    plain = ("round", "client", "rounds", "seed", "trial", "training", "ration", "dropout_seed")
    assert [getattr(came, name) for name in plain] == [getattr(job, name) for name in plain]
    assert second.ration is second.trains_P is second.shares_P is second.optimizer_state is None
    pairs = [*zip(came.blocks.tensors, job.blocks.tensors, strict=True),
             (came.trains_P, job.trains_P), (came.shares_P, job.shares_P),
             *((came.optimizer_state[name], job.optimizer_state[name]) for name in ("first", "step"))]  # fmt: skip
    assert all(ours.dtype == theirs.dtype and torch.equal(ours, theirs) for ours, theirs in pairs)
    assert (came.blocks.dropped, came.blocks.texts_NT is None) == (2, False)


def test_a_result_arrives_as_it_was_sent() -> None:
    job = make_full_job()
    update = replace(make_update(job.adapter, 3, trial=1), optimizer_state={"first": torch.randn(5)})
    came = unpack_result(pack_result(update), job)
    assert isinstance(came, ClientUpdate)
    assert (came.report, came.trial, came.client) == (update.report, 1, 3)
    assert came.adapter.sha256() == update.adapter.sha256()
    assert torch.equal(came.optimizer_state["first"], update.optimizer_state["first"])
    for kind in (TrainingError, ShortageError):
        error = kind("the loss is nan", round=2, client=3, stage="training", mend="lower it")
        failed = unpack_result(pack_result(ClientFailure(3, error, 1)), job)
        assert isinstance(failed, ClientFailure)
        assert (type(failed.error), str(failed.error), failed.trial) == (kind, str(error), 1)


def test_noise_does_not_depend_on_the_devices_that_train() -> None:
    job = make_full_job()
    assert job.ration is not None
    on_others = replace(job, training=job.training.model_copy(update={"devices": ("cpu", "cpu")}))
    one, other = (derive_ration(b"secret", job.ration.terms, "documents", each) for each in (job, on_others))
    assert one == other


def test_devices_are_the_servers_own_and_no_client_is_told() -> None:
    job = make_full_job()
    training = job.training.model_copy(update={"devices": ("cpu", "cpu"), "epochs": 3})
    told = pack_task(replace(job, training=training), pack_adapter(replace(job.adapter, residual=None))).manifest
    assert "devices" not in told["training"]
    assert told["training"]["epochs"] == 3


def test_the_longest_jobs_are_dealt_first_and_each_to_who_has_the_least() -> None:
    start = make_adapted().read()
    sizes = (2, 9, 4, 3, 16, 4)
    jobs = [make_job(make_blocks(size, seed=1), start, client=client) for client, size in enumerate(sizes)]
    shares = [[sizes[job.client] for job in share] for share in deal(jobs, 2)]
    assert shares == [[16, 3], [2, 9, 4, 4]] or shares == [[2, 16], [9, 4, 3, 4]]
    assert [len(share) for share in deal(jobs[:1], 3)] == [1, 0, 0]


@pytest.mark.long
def test_a_plan_says_where_clients_train_and_how_many_fit_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom.training.memory.free_memory", lambda: 2**30)
    recipe = make_recipe(tmp_path, data={"clients": 5}, training={"engine": "batched"})
    one, two = plan(recipe), plan(on_two(recipe))
    assert "a process with the model for each of cpu, cpu" in two.ways
    assert not any("process" in way for way in one.ways)
    assert (one.clients_at_once, two.clients_at_once) == (5, 3), "the larger of the two shares"
    assert one.peak_bytes is not None
    assert two.peak_bytes is not None
    assert two.peak_bytes < one.peak_bytes
    assert one.clients_that_fit is not None
    assert two.clients_that_fit is not None
    assert two.clients_that_fit < 0.6 * one.clients_that_fit, "two processes share what is free"
    assert free_on_each([CPU, CPU]) * 2 == free_on_each([CPU])
    assert [share_of_each(5, [CPU] * devices) for devices in (0, 1, 2, 5, 9)] == [5, 5, 3, 1, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("devices", "says"),
    [
        ("all", "training.devices: torch sees no GPU; leave it out"),
        (["cpu", "cuda:1"], "training.devices: no device cuda:1: torch sees 0 GPUs"),
        (["cuda:99999999999999"], "training.devices: no device cuda:99999999999999: torch sees 0 GPUs"),
    ],
)
def test_devices_that_are_not_there_are_refused(devices: str | list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says):
        plan(make_recipe(tmp_path, training={"devices": devices}))


def test_devices_of_two_kinds_are_refused() -> None:
    assert choose_devices(None, CPU) == ()
    assert choose_devices(["cpu"], CPU) == (CPU,)
    with pytest.raises(ModelError, match="cpu is of another kind than cuda:0, which the run itself is on"):
        choose_devices(["cpu"], torch.device("cuda:0"))


def test_a_number_that_torch_takes_for_another_ones_is_that_of_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torch.device("cuda:256") == torch.device("cuda:0"), "why it is asked before"
    for number in ("2", "128", "255", "256", "9" * 5000):
        with pytest.raises(ModelError, match=r"^training\.devices: no device cuda:\d+: torch sees 2 GPUs"):
            choose_devices([f"cuda:{number}"], torch.device("cuda:0"))
    assert choose_devices(["cuda", "cuda:1"], torch.device("cuda:0")) == (
        torch.device("cuda:0"),
        torch.device("cuda:1"),
    )
