"""The house: a module imports only from modules above it, and what must stay light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedloom

SOURCE = Path(fedloom.__file__).parent

HOUSE = [
    "adapters.lora",
    "deployment.frames",
    "deployment.health",
    "host.failpoints",
    "host.machine",
    "host.signals",
    "hub",
    "model.attention",
    "model.loss_head",
    "model.packed",
    "progress",
    "seeds",
    "text",
    "training.gradient_checkpointing",
    "adapters.adapter",
    "errors",
    "monitoring.telemetry",
    "recipe.methods",
    "records.plan",
    "report.document",
    "report.plots",
    "training.client_dropout",
    "adapters.peft_config",
    "data.rows",
    "data.tokens",
    "deployment.client.journal",
    "deployment.docker",
    "deployment.flower.apps",
    "deployment.flower.bundle",
    "deployment.processes",
    "federation.lora_error",
    "host.files",
    "model.source",
    "monitoring.display",
    "recipe.sections",
    "records.run",
    "adapters.files",
    "data.documents",
    "deployment.client.policy",
    "deployment.flower.programs",
    "deployment.keys",
    "model.loading",
    "monitoring.trackers",
    "recipe.recipe",
    "records.writer",
    "report.figures",
    "training.objective",
    "adapters.adapted_model",
    "data.splits",
    "deployment.client.preflight",
    "deployment.server.nginx",
    "federation.schedule",
    "monitoring.status",
    "recipe.loading",
    "report.baselines_section",
    "report.setup_section",
    "training.jobs",
    "adapters.stacked_lora",
    "deployment.client.joining",
    "evaluation.held_out",
    "federation.admission",
    "federation.aggregation",
    "handover.finished_run",
    "records.card",
    "report.observations",
    "training.reference",
    "training.stacked_optimizers",
    "federation.fleet",
    "federation.lora_rules",
    "records.state",
    "report.run_report",
    "training.stacked_step",
    "deployment.messages",
    "federation.rounds",
    "records.check",
    "report.comparison",
    "training.cuda_graph",
    "training.memory",
    "deployment.server.exchange",
    "experiment.baselines",
    "training.batched",
    "deployment.server.remote_fleet",
    "deployment.server.superlink",
    "training.engines",
    "experiment.preparation",
    "deployment.client.documents",
    "experiment.session",
    "handover.export",
    "handover.generate",
    "deployment.client.worker",
    "experiment.recorder",
    "experiment.trial",
    "experiment.run",
    "experiment.sweep",
    "deployment.server.serving",
    "cli",
    "__main__",
]
"""The modules in the order in which data flows."""

BARE = [
    module
    for module in HOUSE
    if module.split(".")[0] in ("model.loading", "adapters", "training", "evaluation.held_out")
]
"""Modules that also run on a bare GPU machine."""

LIGHT = [
    *(
        "text",
        "errors",
        "host.failpoints",
        "text",
        "seeds",
        "recipe.methods",
        "recipe.sections",
        "recipe.recipe",
        "recipe.loading",
        "progress",
        "records.plan",
        "host.machine",
        "host.files",
        "records.run",
        "monitoring.telemetry",
        "monitoring.trackers",
    ),
    *("records.card", "report.run_report", "report.comparison", "monitoring.display", "monitoring.status", "cli"),
    *("deployment.client.policy", "deployment.client.journal", "deployment.docker", "deployment.health"),
]
"""Modules that answer at once: no torch at import."""


def imports_of(module: str, *, typing_only: bool = False) -> set[str]:
    """The modules that a module imports when it is imported or its functions run, without those for types alone."""
    tree = ast.parse((SOURCE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not typing_only:
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & {f"fedloom.{name}" for name in HOUSE}
            found |= inside or {node.module}
    return found


def test_the_house_holds_every_module() -> None:
    files = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for path in SOURCE.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert files == set(HOUSE)


@pytest.mark.parametrize("module", HOUSE)
def test_imports_go_one_way(module: str) -> None:
    above = {f"fedloom.{name}" for name in HOUSE[: HOUSE.index(module)]} | {"fedloom"}
    ours = {name for name in imports_of(module) if name.split(".")[0] == "fedloom"}
    assert ours <= above


@pytest.mark.parametrize("module", BARE)
def test_the_training_modules_need_only_what_a_gpu_machine_has(module: str) -> None:
    allowed = {"torch", "transformers", "peft", "safetensors", "numpy", "tokenizers", "huggingface_hub", "fedloom"}
    used = {name.split(".")[0] for name in imports_of(module)} - set(sys.stdlib_module_names)
    assert used <= allowed


def test_every_module_stays_readable() -> None:
    long = {path.name: count for path in SOURCE.rglob("*.py") if (count := len(path.read_text().splitlines())) > 400}
    assert not long, "a module over 400 lines is asking to be two"


def test_light_modules_do_not_import_torch() -> None:
    code = "; ".join(f"import fedloom.{module}" for module in LIGHT)
    code += "; import sys; assert not {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
