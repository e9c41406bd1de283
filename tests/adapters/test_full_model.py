"""A whole model as the adapter: the same records, files that transformers opens, and little memory on the server."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
import transformers
from rich.console import Console
from support.tiny import make_blocks, make_job, make_recipe, updates_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom import run
from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.errors import ModelError
from fedloom.evaluation.held_out import evaluate
from fedloom.experiment.run import plan
from fedloom.federation import aggregation
from fedloom.federation.aggregation import STRATEGIES, weighted_mean
from fedloom.handover.export import export
from fedloom.handover.generate import generate
from fedloom.model.loading import load_model
from fedloom.model.source import byte_tokenizer, open_model
from fedloom.monitoring.display import render_plan
from fedloom.monitoring.observer import Observer
from fedloom.progress import Progress
from fedloom.recipe.sections import Strategy
from fedloom.records.run import Run
from fedloom.training.jobs import ClientUpdate
from fedloom.training.memory import LiveBytes
from fedloom.training.reference import ReferenceEngine

CPU = torch.device("cpu")
FULL = {"method": "full", "rank": None, "alpha": None}


def make_whole(shape: str = "tiny-llama") -> AdaptedModel:
    if shape != "tied":
        return AdaptedModel(load_base(shape), None, 7, tokenizer=byte_tokenizer())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = transformers.LlamaConfig(
            vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        )  # fmt: skip
        return AdaptedModel(AutoModelForCausalLM.from_config(config).eval(), None, 7, tokenizer=byte_tokenizer())


def load_base(shape: str) -> transformers.PreTrainedModel:
    return load_model(open_model(f"random:{shape}"), dtype="float32", device=CPU)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = make_recipe(adapter=FULL, federation={"rounds": 2}, training={"learning_rate": 1e-3})
    return run(recipe, tmp_path_factory.mktemp("runs") / "run", Observer())


def test_every_weight_is_trained_and_has_the_models_name(shape: str) -> None:
    whole, base = make_whole(shape), load_base(shape)
    weights = whole.layout.split(whole.read().weights_P)
    assert list(weights) == [name for name, _ in base.named_parameters()]
    assert all(torch.equal(weights[name], value) for name, value in base.named_parameters())
    assert whole.layout.size == whole.num_parameters == sum(value.numel() for value in base.parameters())


@pytest.mark.parametrize("shape", ["tiny-opt", "tiny-llama", "tiny-gpt2", "tied"])
def test_transformers_opens_a_saved_model_and_gives_its_logits(shape: str, tmp_path: Path) -> None:
    whole, tokens_BT = make_whole(shape), make_blocks(3).tokens_NT
    noise_P = torch.randn(whole.layout.size, generator=torch.Generator().manual_seed(0))
    trained = Adapter(whole.layout, whole.read().weights_P + 0.01 * noise_P)
    whole.load(trained)
    whole.save(trained, tmp_path / "model", card="A card.")
    assert torch.equal(whole.open(tmp_path / "model").weights_P, trained.weights_P)
    assert (tmp_path / "model" / "README.md").read_text() == "A card."
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 1.1 * trained.num_bytes, "tied weights once"

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="sdpa").eval()
    whole.base.set_attn_implementation("sdpa")
    with torch.inference_mode():
        assert torch.equal(theirs(input_ids=tokens_BT).logits, whole.logits(tokens_BT))
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("def")["input_ids"] == byte_tokenizer()("def")["input_ids"]


@pytest.mark.parametrize("shape", ["tiny-opt", "tied"])
def test_a_step_is_that_of_plain_training(shape: str) -> None:
    """One client's round over every weight against torch.optim over the model's own parameters."""
    whole, blocks = make_whole(shape), make_blocks(4)
    whole.base.config.attention_dropout = 0.0
    for module in whole.base.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    start = whole.read()
    job = make_job(blocks, start, optimizer="sgd", learning_rate=0.1, batch_size=4, epochs=1, proximal_mu=0.1)
    (update,) = updates_of(ReferenceEngine(whole).train([job]))
    found = {name: value.clone() for name, value in whole.layout.split(update.adapter.weights_P).items()}

    whole.load(start)
    labels_BT = blocks.tokens_NT.masked_fill(torch.arange(16) >= blocks.lengths_N[:, None], -100)
    model = whole.base.train()
    whole.gradient_P.zero_()
    model(input_ids=blocks.tokens_NT, labels=labels_BT).loss.backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value - 0.1 * value.grad, rtol=1e-4, atol=1e-6)


def test_a_run_has_the_records_of_every_run_and_the_payload_of_a_model(finished: Run) -> None:
    adapter = plan(make_recipe(adapter={"rank": 2, "targets": ["q_proj", "v_proj"]}))
    assert finished.status["state"] == "done"
    losses = [record["central_loss"] for record in finished.rounds]
    assert losses == sorted(losses, reverse=True)
    assert finished.plan["engine"] == "reference"
    assert finished.plan["trainable_parameters"] == finished.plan["parameters"]
    assert finished.rounds[1]["bytes_up"] == 3 * 4 * finished.plan["parameters"]
    assert finished.plan["payload_bytes"] > 50 * adapter.payload_bytes
    assert all(record["proximal_loss"] > 0 for record in finished.rounds[1:])
    assert "lora_error" not in finished.rounds[1]
    card = (finished.folder / "adapters" / "best" / "README.md").read_text()
    assert "The model itself, every weight of it fine-tuned from random:tiny-llama" in card
    assert "library_name: transformers" in card
    assert "- full" not in card
    assert "AutoModelForCausalLM.from_pretrained" in card


@pytest.mark.long
def test_the_published_models_payload_is_210_adapters() -> None:
    whole, lora = (
        plan(make_recipe(model={"source": "random:opt-350m", "dtype": "float32"}, adapter=adapter))
        for adapter in (FULL, {"rank": 16, "targets": ["q_proj", "v_proj"]})
    )
    assert whole.payload_bytes == 4 * 331_196_416
    assert whole.payload_bytes / lora.payload_bytes == pytest.approx(210.6, abs=0.1)
    console = Console(width=120, record=True, file=StringIO())
    console.print(render_plan(whole))
    shown = console.export_text()
    assert "331,196,416 / 331,196,416 (100.00 %)" in shown
    assert "1.3 GB a model, 7.9 GB a round" in shown


@pytest.mark.parametrize("merged", [False, True])
def test_an_exported_model_is_the_runs_to_the_bit(finished: Run, merged: bool, tmp_path: Path) -> None:
    assert export(finished.folder, tmp_path / "model", merged=merged) == 0.0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "model").iterdir()}


def test_text_comes_from_the_base_model_and_from_the_trained_one(finished: Run) -> None:
    pieces: list[str] = []
    generate(finished.folder, "import os", base=True, max_new_tokens=8, say=pieces.append)
    base, trained = "".join(pieces).removeprefix("--- base model ---\n").split("--- with the adapter ---\n")
    tokens = byte_tokenizer()("import os", return_tensors="pt")["input_ids"]
    model = load_base("tiny-llama")
    written = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False, pad_token_id=256
    )
    assert base.strip() == byte_tokenizer().decode(written[0], skip_special_tokens=True).strip()
    assert trained.startswith("import os")


def test_a_damaged_or_foreign_model_is_refused(tmp_path: Path) -> None:
    whole = make_whole()
    whole.save(whole.read(), tmp_path / "model")
    with pytest.raises(ModelError, match="only one of the two has"):
        make_whole("tiny-gpt2").open(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match="no readable adapter"):
        whole.open(tmp_path / "model")


def middling() -> AdaptedModel:
    """A random model of ten million weights."""
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=4
    )
    return AdaptedModel(AutoModelForCausalLM.from_config(config).eval(), None, 7)


@pytest.mark.long
def test_the_server_needs_less_than_three_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is alive in a round beside the client's model, its gradient and its optimizer: counted, not estimated."""
    monkeypatch.setattr(aggregation, "MOST_IN_FLOAT64", 2**20)
    whole = middling()
    model_bytes = whole.layout.size * 4
    assert 8e6 < whole.layout.size < 20e6
    engine = ReferenceEngine(whole)
    peaks: list[int] = []

    with LiveBytes([whole.weights_P, whole.gradient_P]) as live:
        start = whole.read()

        def updates() -> Iterator[ClientUpdate]:
            jobs = [
                make_job(make_blocks(2, seed=client), start, client=client, optimizer="sgd", epochs=1)
                for client in range(3)
            ]
            # What training has alive at a moment is the client's; what is left when its update arrives, the server's.
            for update in updates_of(engine.train(jobs)):
                live.peak = live.now
                yield update
                peaks.append(live.peak)

        mean = weighted_mean(start, updates(), lambda report: report.examples)
        live.peak = live.now
        digest = mean.sha256()
        whole.save(mean, tmp_path / "model")
        evaluate(whole, mean, make_blocks(1), batch_size=1)
        peaks.append(live.peak)
    assert len(peaks) == 4
    assert max(peaks) < 2.2 * model_bytes, "the global model, and the sum that becomes the next; the client's is apart"
    assert digest == whole.open(tmp_path / "model").sha256()


class Counting(Observer):
    """Counts the weights of a run's adapters that are alive while clients train; those of other tests are left out."""

    def __init__(self) -> None:
        self.most = 0
        gc.collect()
        self._others = self._alive()

    def watch(self, progress: Progress) -> None:
        if progress.phase == "train":
            others = {id(adapter) for adapter in self._others}
            ours = [adapter for adapter in self._alive() if id(adapter) not in others]
            self.most = max(self.most, len({adapter.weights_P.data_ptr() for adapter in ours}))

    def _alive(self) -> list[Adapter]:
        return [value for value in gc.get_objects() if type(value) is Adapter]


@pytest.mark.long
def test_a_run_keeps_the_global_model_alone(tmp_path: Path) -> None:
    counting = Counting()
    run(make_recipe(adapter=FULL, federation={"rounds": 3}), tmp_path / "run", counting)
    assert counting.most == 2, "the server's, and a client's that is the model itself"


def test_a_lent_update_is_the_models_own_and_robust_rules_copy_it() -> None:
    whole = make_whole()
    engine, start = ReferenceEngine(whole), make_whole().read()
    jobs = [
        make_job(make_blocks(2, seed=client), start, client=client, optimizer="sgd", learning_rate=0.1)
        for client in range(3)
    ]
    digests, kept = [], []
    for update in updates_of(engine.train(jobs)):
        assert update.adapter.weights_P.data_ptr() == whole.weights_P.data_ptr()
        digests.append(update.adapter.sha256())
        kept.append(replace(update, adapter=replace(update.adapter, weights_P=update.adapter.weights_P.clone())))
    assert len(set(digests)) == 3
    assert start.sha256() == make_whole().read().sha256(), "the server's own is left alone"
    for kind in ("fedmedian", "trimmed_mean", "krum", "fedavg", "norm_clipped"):
        strategy = STRATEGIES[kind](Strategy(kind=kind))
        lent, copied = (
            strategy.update(strategy.init(start), start, updates)[1].sha256()
            for updates in (updates_of(engine.train(jobs)), kept)
        )
        assert lent == copied, kind


@pytest.mark.parametrize("most", [2**26, 1])
def test_a_sum_in_its_own_dtype_is_the_mean_all_the_same(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation, "MOST_IN_FLOAT64", most)
    whole = make_whole()
    job = make_job(make_blocks(2), whole.read(), optimizer="sgd")
    (update,) = updates_of(ReferenceEngine(whole).train([job]))
    updates = [
        replace(update, adapter=replace(update.adapter, weights_P=update.adapter.weights_P * factor))
        for factor in (1.0, 2.0, 6.0)
    ]
    mean = weighted_mean(update.adapter, updates, lambda report: 3.0)
    torch.testing.assert_close(mean.weights_P, 3.0 * update.adapter.weights_P)
    assert mean.weights_P.dtype == torch.float32
