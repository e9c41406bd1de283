"""Parts of adapters that stay with clients elsewhere (`lora_rule = "fedsa"`): on their disk, and nowhere else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from support.federation_here import run_here, split, timeless, tiny
from support.liars import LyingClient, LyingServer
from support.marks import first
from support.tiny import make_adapted, make_recipe
from support.workers_here import LinkHere, Owner, asked_to, link_of, serve_here, told_of

from fedloom.deployment.client.own_adapter import OwnPart
from fedloom.errors import RecipeError, RunError
from fedloom.federation.lora_rules import shared_part
from fedloom.handover.finished_run import adapter_folder
from fedloom.host import failpoints
from fedloom.host.frames import Frame
from fedloom.recipe.recipe import Recipe
from fedloom.records.check import check_run
from fedloom.records.run import Run
from fedloom.training.jobs import ClientFailure, ClientTask

pytestmark = pytest.mark.usefixtures("hurry")

FEDSA = ("data.clients=2", "data.central_holdout=0", "federation.lora_rule=fedsa", "federation.rounds=3")


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    failpoints.arm("")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def kept_of(folder: Path, name: str) -> Path:
    (home,) = (folder / "clients" / name / f"{name}.journal.adapters").iterdir()
    return home


def rounds_of(run: Run) -> list[dict[str, Any]]:
    """Return what is on record but for B: the server has none, and the local run has the mean of all.

    Nor how often hold-outs were scored, which a client that began anew does once more.
    """
    left_out = ("adapter_sha256", "lora_error", "lora_error_layers", "evaluate_tokens", "evaluate_samples")
    left_out += ("evaluate_steps",)
    return [{key: value for key, value in record.items() if key not in left_out} for record in timeless(run.rounds)]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return tiny(*FEDSA)


@pytest.fixture(scope="module")
def local(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_here(recipe, tmp_path_factory.mktemp("local") / "run")


def check_same(served: Run, local: Run, folder: Path, clients: int = 2) -> None:
    """Check that A, every loss, and each client's own adapter are those of a run on one machine, to the bit."""
    assert rounds_of(served) == rounds_of(local)
    assert sorted(map(repr, timeless(served.clients))) == sorted(map(repr, timeless(local.clients)))
    ours, theirs = (weights_of(run.folder / "adapters" / "last") for run in (served, local))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if ".lora_A." in name)
    assert not any(ours[name].any() for name in ours if ".lora_B." in name)
    for number in range(clients):
        mine = weights_of(kept_of(folder, f"client-{number}"))
        expected = weights_of(local.folder / "clients" / str(number) / "adapter")
        assert all(torch.equal(mine[name], expected[name]) for name in expected)
        assert any(mine[name].any() for name in mine if ".lora_B." in name)


def test_a_deployment_makes_what_one_machine_does_to_the_bit(recipe: Recipe, local: Run, tmp_path: Path) -> None:
    link = link_of(recipe, tmp_path)
    served = serve_here(recipe, link, tmp_path / "served")
    check_same(served, local, tmp_path)
    assert not any("lora_error" in record for record in served.rounds), "nobody has all B to measure it"
    assert not [one for one in check_run(served.folder) if not one.well]
    assert "| client 1 |" in (served.folder / "report.md").read_text().partition("Was it worth it?")[2]


@pytest.mark.long
def test_clients_that_sit_rounds_out_go_on_with_the_part_of_their_last(tmp_path: Path) -> None:
    recipe = tiny(*FEDSA, "data.clients=3", "federation.fraction=0.5", "federation.rounds=5", "evaluation.every=2")
    local = run_here(recipe, tmp_path / "local")
    link = link_of(recipe, tmp_path)
    link.on_question = lambda name, frame: link.restart(name) if frame.manifest["do"] == "train" else None
    served = serve_here(recipe, link, tmp_path / "served")
    assert any(len(record["clients"]) < 3 for record in served.rounds[1:])
    check_same(served, local, tmp_path, clients=3)


@pytest.mark.parametrize("rule", ["rolora", "svd"])
def test_bytes_that_are_counted_are_those_that_travelled(rule: str, tmp_path: Path) -> None:
    """Half an adapter was counted on its way down, or its first ranks, where all of it is sent to clients elsewhere."""
    ranks = ["federation.client_ranks=[1,4]"] if rule == "svd" else []
    recipe = tiny("data.clients=2", "federation.rounds=2", f"federation.lora_rule={rule}", *ranks)
    link = link_of(recipe, tmp_path)
    served = serve_here(recipe, link, tmp_path / "served")
    whole = served.plan["payload_bytes"]
    for record in served.rounds[1:]:
        asked = [frame for _, frame in asked_to(link, "train") if frame.manifest["round"] == record["round"]]
        told = [frame for _, frame in told_of(link, "train") if frame.manifest["report"]["round"] == record["round"]]
        assert record["bytes_down"] == sum(len(frame.payload) for frame in asked) == 2 * whole
        assert record["bytes_up"] == sum(len(frame.payload) for frame in told) < 2 * whole


def test_b_travels_neither_way_and_half_the_bytes_do(recipe: Recipe, tmp_path: Path) -> None:
    link = link_of(recipe, tmp_path)
    served = serve_here(recipe, link, tmp_path / "served")
    adapter = weights_of(served.folder / "adapters" / "last")
    shared = sum(4 * value.numel() for name, value in adapter.items() if ".lora_A." in name)
    for do in ("train", "evaluate", "keep"):
        assert {len(frame.payload) for _, frame in asked_to(link, do)} == {shared}
    assert {len(frame.payload) for _, frame in told_of(link, "train")} == {shared}
    assert served.rounds[1]["bytes_up"] == 2 * shared
    assert {len(frame.payload) for do in ("evaluate", "keep", "meet") for _, frame in told_of(link, do)} == {0}
    # What each client has of its own is in no byte that left it, and in no file of the server's.
    for number in range(2):
        own = [value for name, value in weights_of(kept_of(tmp_path, f"client-{number}")).items() if ".lora_B." in name]
        raw = [value.numpy().tobytes() for value in own if value.any()]
        assert raw
        sent = [frame.payload for _, frame in link.answered]
        sent += [file.read_bytes() for file in served.folder.rglob("*") if file.is_file()]
        assert not any(part in whole for part in raw for whole in sent)


@pytest.mark.long  # a model is loaded for each question
def test_it_survives_a_client_that_begins_anew_before_every_question(
    recipe: Recipe, local: Run, tmp_path: Path
) -> None:
    link = link_of(recipe, tmp_path)
    link.on_question = lambda name, frame: link.restart(name)
    check_same(serve_here(recipe, link, tmp_path / "served"), local, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    "failpoint", first(["state.manifest=raise@3", "client.trained=raise@4", "round.begins=raise@3"], keep=1)
)
def test_a_server_that_goes_back_finds_the_part_of_that_round(
    failpoint: str, recipe: Recipe, local: Run, tmp_path: Path
) -> None:
    """Clients have trained on, and have newer parts than the round from which the server goes on."""
    link = link_of(recipe, tmp_path)
    failpoints.arm(failpoint)
    with pytest.raises(RuntimeError, match="a failpoint"):
        serve_here(recipe, link, tmp_path / "served")
    failpoints.arm("")
    check_same(serve_here(recipe, link, tmp_path / "served", resume=True), local, tmp_path)


@pytest.mark.long
def test_a_second_run_of_the_same_recipe_begins_anew(recipe: Recipe, local: Run, tmp_path: Path) -> None:
    """Its parts are others, though run, rounds and documents have the same names."""
    link = link_of(recipe, tmp_path)
    failpoints.arm("round.begins=raise@3")
    with pytest.raises(RuntimeError, match="a failpoint"):
        serve_here(recipe, link, tmp_path / "first")
    failpoints.arm("")
    check_same(serve_here(recipe, link, tmp_path / "second"), local, tmp_path)


def spoil_missing(parts: Path) -> None:
    for file in parts.iterdir():
        file.unlink()


def spoil_content(parts: Path) -> None:
    for file in parts.iterdir():
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def spoil_garbage(parts: Path) -> None:
    for file in parts.iterdir():
        file.write_bytes(b"no tensors")


def spoil_another_round(parts: Path) -> None:
    """Put each part in the place of another: of this run, this client, but not of that round."""
    files = sorted(parts.iterdir(), key=lambda one: one.stat().st_mtime_ns)
    newest, before = files[-1].read_bytes(), files[-2].read_bytes()
    files[-1].write_bytes(before)
    files[-2].write_bytes(newest)


def spoil_another_client(parts: Path) -> None:
    """Put another client's part of the same round there, by whoever copies folders about."""
    other = parts.parents[2] / "client-0" / "client-0.journal.parts" / "client-0"
    mine, theirs = (max(folder.iterdir(), key=lambda one: one.stat().st_mtime_ns) for folder in (parts, other))
    mine.write_bytes(theirs.read_bytes())


SPOILS = (spoil_content, spoil_another_round, spoil_another_client, spoil_missing, spoil_garbage)


@pytest.mark.parametrize("spoil", first(SPOILS))
def test_a_part_that_is_not_the_one_is_an_error_and_never_trained_on(
    spoil: Any, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = link_of(recipe, tmp_path)

    def before_round_3(name: str, frame: Frame) -> None:
        if frame.manifest["do"] == "train" and frame.manifest["round"] == 3 and name == "client-1":
            spoil(tmp_path / "clients" / name / f"{name}.journal.parts" / name)

    link.on_question = before_round_3
    allowed = recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"max_lost_clients": 1})})
    served = serve_here(allowed, link, tmp_path / "served")
    assert [record["lost"] for record in served.rounds] == [[], [], [], [1]]
    assert "can't keep or find what is its own of an adapter" in str(served.rounds[3])
    assert "this client's own part of the adapter" in capsys.readouterr().out
    told = (served.folder / "personalised.json").read_text()
    assert "error" in told, "nor does it keep an adapter with a part that is not there"


@pytest.mark.long
def test_another_runs_part_is_an_error(recipe: Recipe, tmp_path: Path) -> None:
    """A server that asks for the part of another recipe's run gets no training from it."""
    link = link_of(recipe, tmp_path)
    serve_here(recipe, link, tmp_path / "first")
    stamps = [frame.manifest["own"] for name, frame in told_of(link, "train") if name == "client-0"]
    other = recipe.model_copy(update={"name": "another"})

    def ask_for_it(name: str, frame: Frame) -> None:
        if frame.manifest["do"] == "train" and frame.manifest["round"] == 2:
            frame.manifest["own"] = stamps[-1]  # type: ignore[index]

    link.on_question = ask_for_it
    with pytest.raises(Exception, match="what is its own of an adapter"):
        serve_here(other, link, tmp_path / "second")


@pytest.mark.long
def test_a_part_is_found_by_its_name_alone_would_be_caught(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a look at what a part is, another round's is trained on, and nobody notices."""
    monkeypatch.setattr(OwnPart, "_stamp", lambda own, part: str(part.round) * 64)
    link = link_of(recipe, tmp_path)

    def before_round_3(name: str, frame: Frame) -> None:
        if frame.manifest["do"] == "train" and frame.manifest["round"] == 3 and name == "client-1":
            (file,) = (tmp_path / "clients" / name / f"{name}.journal.parts" / name).glob("2222*")
            found = load_file(file)
            file.write_bytes(save({**found, "own": found["own"] + 1}))

    link.on_question = before_round_3
    assert [record["lost"] for record in serve_here(recipe, link, tmp_path / "served").rounds] == [[], [], [], []]


def test_a_server_that_sends_a_b_as_well_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    """It would take the place of the client's own."""
    link = link_of(recipe, tmp_path)
    server = LyingServer(link.workers["client-0"].answer, recipe)
    for do in ("train", "evaluate", "keep", "tasks"):
        assert server.ask(server.question(do)).manifest == {"name": "client-0", "refused": "question"}


@pytest.mark.parametrize("lie", [{"own": None}, {"own": "b" * 63}, {}])
def test_a_client_that_does_not_say_which_part_it_keeps_has_no_update(lie: dict[str, Any]) -> None:
    shares_P = shared_part(make_adapted().layout, "fedsa")

    def answer(do: str, asked: Frame, honest: Frame) -> Frame:
        return Frame({**honest.manifest, **lie}, asked.payload) if do == "train" else honest

    fleet, _ = LyingClient(answer, clients=1).fleet(lora_rule="fedsa")
    start = make_adapted().read()
    task = ClientTask(1, 0, start, make_recipe().training, 2, 7, shares_P=shares_P)
    (result,) = fleet.train([task])
    assert isinstance(result, ClientFailure)
    assert fleet.own_parts == {}


@pytest.mark.long
def test_few_parts_stay_on_the_disk_and_their_owner_alone_reads_them(tmp_path: Path) -> None:
    recipe = tiny(*FEDSA, "federation.rounds=12", "evaluation.every=12")
    link = link_of(recipe, tmp_path)
    serve_here(recipe, link, tmp_path / "served")
    files = list((tmp_path / "clients" / "client-0" / "client-0.journal.parts" / "client-0").iterdir())
    assert len(files) == 10
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


@pytest.mark.long
def test_the_hash_that_is_told_of_a_part_confirms_no_guess(recipe: Recipe, tmp_path: Path) -> None:
    """Two clients of the same documents tell different ones, and so does one client in two rounds."""
    data = split(recipe, tmp_path / "split")[0]
    link = LinkHere({name: Owner(data) for name in ("client-0", "client-1")}, tmp_path / "clients")
    serve_here(recipe, link, tmp_path / "served")
    stamps = [frame.manifest["own"] for _, frame in told_of(link, "train")]
    assert len(set(stamps)) == 6


@pytest.mark.parametrize(
    ("override", "where"),
    [("data.central_holdout=4", "data.central_holdout"), ("evaluation.tasks=['first-steps']", "evaluation.tasks")],
)
def test_what_needs_a_whole_adapter_on_the_server_is_refused_by_name(override: str, where: str, tmp_path: Path) -> None:
    recipe = tiny(*FEDSA, override)
    with pytest.raises(RecipeError, match="the server has A alone") as refused:
        serve_here(recipe, LinkHere({}, tmp_path), tmp_path / "served")
    assert refused.value.where == where


def test_a_private_run_has_another_rule(tmp_path: Path) -> None:
    """It is judged by a central hold-out alone, for which the server lacks B."""
    recipe = tiny("federation.lora_rule=fedsa", "privacy.epsilon=8", "privacy.delta=1e-3", "training.proximal_mu=0")
    with pytest.raises(RecipeError, match="those of a private run tell no loss") as refused:
        serve_here(recipe, LinkHere({}, tmp_path), tmp_path / "served")
    assert refused.value.where == "federation.lora_rule"


@pytest.mark.long
def test_the_servers_adapters_are_not_handed_on(recipe: Recipe, tmp_path: Path) -> None:
    served = serve_here(recipe, link_of(recipe, tmp_path), tmp_path / "served")
    with pytest.raises(RunError, match="its adapters have A alone"):
        adapter_folder(served.folder, "best")
    assert "What is here is A" in (served.folder / "adapters" / "best" / "README.md").read_text()
    card = (kept_of(tmp_path, "client-0") / "README.md").read_text()
    assert "its B is this client's alone" in card
    assert "was sent to nobody" in card
    assert "| Loss on what its client holds out (nats per token) |" in card
