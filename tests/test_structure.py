"""The house: rooms in the order in which data flows, no import upward, no circle, and light rooms that stay light."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.marks import LONGEST

import fedloom

SOURCE = Path(fedloom.__file__).parent

LAYERS = (
    ("text",),
    ("errors",),
    ("seeds", "hub", "downloads", "progress"),
    ("host",),
    ("recipe",),
    ("data", "model", "privacy"),
    ("adapters",),
    ("training",),
    ("evaluation",),
    ("federation",),
    ("records",),
    ("monitoring", "report"),
    ("experiment",),
    ("handover",),
    ("deployment",),
    ("audit",),
    ("run_options",),
    ("model_commands", "client_commands", "provision_commands", "service_commands"),
    ("cli",),
    ("__main__",),
)
"""Rooms, and the modules at the root, from the ground up. One imports from those below it, and from no neighbour."""

DEPLOYMENT = (
    ("processes", "status", "message_kinds", "addresses", "certificates", "fingerprints"),
    ("signing", "approvals"),
    ("client_keys",),
    ("keys", "flower", "docker", "health", "message_recipe"),
    ("message_fields", "client_list", "queue", "systemd", "helm"),
    ("messages", "backup"),
    ("own_messages",),
    ("server", "client"),
    ("branching",),
)
"""The same inside `deployment`: what both sides share, then each side, and last what is both."""

BARE = ("model", "adapters", "training", "evaluation")
"""Rooms that also run on a bare GPU machine: nothing beyond torch, transformers, PEFT and what those need."""

LIGHT_ROOMS = (
    *("text", "errors", "seeds", "hub", "downloads", "progress", "host", "recipe"),
    *("monitoring", "report", "run_options", "cli"),
    *("model_commands", "client_commands", "provision_commands", "service_commands"),
)
LIGHT = (
    *("records.plan", "records.run", "records.kinds", "records.writer", "records.card", "training.client_report"),
    *("records.sweep_folder", "records.going_on"),
    *("deployment.docker", "deployment.helm", "deployment.health", "deployment.queue"),
    *("deployment.client.policy", "deployment.client.refusals"),
    *("deployment.client.journal", "deployment.client.account", "deployment.client.task_file"),
    *("deployment.client.reading", "deployment.client.rehearsal", "deployment.client.own_documents"),
)
"""What answers at once: rooms, and modules of other rooms, that import no torch."""

TAKES_A_RECIPE = {
    "records.card": "the card prints it",
    "audit.finished": "it wires a finished run once more",
    "audit.rehearsal": "it wires a client's part of a run",
    "handover.proof": "it builds the run's model again",
    "deployment.messages": "the recipe is what travels",
    "deployment.client.refusals": "the recipe is what is checked",
    "deployment.client.account": "the recipe is what is allowed",
    "deployment.client.rehearsal": "the recipe is what would be checked",
    "deployment.client.terms": "the recipe is what terms follow from",
    "deployment.client.client_model": "it wires a client's part of a run",
    "deployment.client.documents": "it wires a client's part of a run",
    "deployment.client.shared_base": "it wires a client's part of a run",
    "deployment.branching": "it wires a branch of two sides",
    "deployment.server.answering": "it wires the server's part of a branch",
    "deployment.server.facts": "the recipe is what clients are held to",
    "deployment.server.serving": "it wires the server's part of a run",
    "deployment.server.ground": "it wires the server's part of a run",
    "deployment.server.service": "the recipe is what is submitted",
}
"""Modules beside `experiment` and `recipe` that take a whole recipe, and why: others take their own section."""

MODULES = sorted(".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in SOURCE.rglob("*.py"))
MODULES = [module for module in MODULES if not module.endswith("__init__")]


def imports_of(module: str) -> set[str]:
    """Return the modules that a module imports: at its top, inside functions, and for types alone."""
    tree = ast.parse((SOURCE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & {f"fedloom.{name}" for name in MODULES}
            found |= inside or {node.module}
    return found


def ours(module: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    return {name.removeprefix("fedloom.") for name in imports_of(module) if name.startswith("fedloom.")}


def floor_of(name: str, layers: tuple[tuple[str, ...], ...]) -> int:
    return next(floor for floor, rooms in enumerate(layers) if name in rooms)


def check_floors(module: str, imported: set[str], layers: tuple[tuple[str, ...], ...], depth: int = 0) -> None:
    room = module.split(".")[depth]
    for other in imported:
        target = other.split(".")[depth]
        if target != room:
            assert floor_of(target, layers) < floor_of(room, layers), f"{module} imports {other}"


def test_every_room_has_a_floor() -> None:
    assert {module.split(".")[0] for module in MODULES} == {room for rooms in LAYERS for room in rooms}


@pytest.mark.parametrize("module", MODULES)
def test_no_import_runs_upward(module: str) -> None:
    check_floors(module, ours(module), LAYERS)
    if module.startswith("deployment."):
        check_floors(module, {other for other in ours(module) if other.startswith("deployment.")}, DEPLOYMENT, depth=1)


@pytest.mark.parametrize("room", sorted({module.rpartition(".")[0] for module in MODULES} - {""}))
def test_no_room_has_a_circle_inside(room: str) -> None:
    inside = {module: ours(module) for module in MODULES if module.startswith(f"{room}.")}
    try:
        TopologicalSorter({module: others & inside.keys() for module, others in inside.items()}).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_flower_is_imported_in_its_own_room_alone() -> None:
    importers = {module for module in MODULES if any(name.split(".")[0] == "flwr" for name in imports_of(module))}
    assert importers
    assert all(module.startswith("deployment.flower.") for module in importers)


def test_a_whole_recipe_goes_where_it_is_taken_apart_and_no_further() -> None:
    taking = set()
    for module in MODULES:
        tree = ast.parse((SOURCE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        # Parameters, and fields of classes.
        annotated = [node for node in ast.walk(tree) if isinstance(node, ast.arg | ast.AnnAssign)]
        if any(isinstance(node.annotation, ast.Name) and node.annotation.id == "Recipe" for node in annotated):
            taking.add(module)
    assert {module for module in taking if module.split(".")[0] not in ("experiment", "recipe")} == set(TAKES_A_RECIPE)


@pytest.mark.parametrize("module", [module for module in MODULES if module.split(".")[0] in BARE])
def test_the_training_rooms_need_only_what_a_gpu_machine_has(module: str) -> None:
    allowed = {"torch", "transformers", "peft", "safetensors", "numpy", "tokenizers", "huggingface_hub", "fedloom"}
    allowed |= {"gguf"} if module == "model.packed" or "gguf" in module else set()  # imported where one is opened
    allowed |= {"lm_eval"} if module == "evaluation.harness" else set()  # imported where one of its tasks is run
    allowed |= {"triton"} if module == "training.dropout_kernel" else set()  # of torch for CUDA; done without elsewhere
    used = {name.split(".")[0] for name in imports_of(module)} - set(sys.stdlib_module_names)
    assert used <= allowed


def test_every_module_stays_readable() -> None:
    long = {path.name: count for path in SOURCE.rglob("*.py") if (count := len(path.read_text().splitlines())) > 400}
    assert not long, "a module over 400 lines is asking to be two"


def test_light_rooms_do_not_import_torch() -> None:
    light = [module for module in MODULES if module.split(".")[0] in LIGHT_ROOMS or module in LIGHT]
    code = "; ".join(f"import fedloom.{module}" for module in light)
    code += "; import sys; assert not {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_hands_out_the_tests_does_not_import_torch() -> None:
    """It would take seconds, in which no worker has been started."""
    tests = Path(__file__).parent
    code = f"import runpy, sys; sys.path.insert(0, {str(tests)!r}); [runpy.run_path(path) for path in sys.argv[1:]]"
    code += "; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, *map(str, tests.rglob("conftest.py"))], check=True)


@pytest.mark.parametrize("name", LONGEST)
def test_a_file_that_begins_is_there(name: str) -> None:
    assert (Path(__file__).parents[1] / name).is_file()


REPEAT = pytest.param(0, marks=pytest.mark.long)


@pytest.mark.parametrize("one", [REPEAT])
@pytest.mark.parametrize("other", [REPEAT])
def test_what_repeats_in_two_ways_is_left_to_make_soak(one: int, other: int, request: pytest.FixtureRequest) -> None:
    """CI leaves this test out, unless `conftest.py` lets through what it should not."""
    assert request.node.get_closest_marker("slow")


def test_make_soak_takes_what_is_killed_at_random_instants() -> None:
    """Those tests are `long` and `slow`, which pytest leaves out unless it is told otherwise."""
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    (line,) = [line for line in makefile.splitlines() if "FEDLOOM_RANDOM_KILLS" in line]
    assert '-m "not oracles"' in line
