"""The flat adapter against PEFT: the same weights, the same files, the same logits."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from support.shapes import ARCHITECTURES
from support.tiny import make_adapted, make_blocks, make_recipe

from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.adapters.files import load_adapter, save_adapter
from fedloom.adapters.peft_config import build_config
from fedloom.errors import ModelError
from fedloom.evaluation.held_out import evaluate
from fedloom.model.loading import build_meta_model, load_model
from fedloom.model.source import open_model


def load_base(shape: str) -> torch.nn.Module:
    return load_model(open_model(f"random:{shape}"), dtype="float32", device=torch.device("cpu"))


def test_opt_350m_has_the_experiments_counts() -> None:
    base = build_meta_model(open_model("random:opt-350m"))
    assert sum(parameter.numel() for parameter in base.parameters()) == 331_196_416
    section = make_recipe(adapter={"rank": 16, "targets": ["q_proj", "v_proj"]}).adapter
    adapted = AdaptedModel(base, build_config(section, base), 1)
    assert (adapted.layout.size, adapted.num_parameters) == (1_572_864, 332_769_280)


def test_names_and_shapes_are_those_of_pefts_state_dict(shape: str) -> None:
    adapted = make_adapted(shape)
    theirs = get_peft_model_state_dict(adapted.model, save_embedding_layers=False)
    ours = adapted.layout.split(adapted.read().weights_P)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_adapter_is_pefts_default_and_the_same_for_a_seed(shape: str) -> None:
    first, again, other = make_adapted(shape), make_adapted(shape), make_adapted(shape, seed=8)
    assert first.read().sha256() == again.read().sha256() != other.read().sha256()
    tensors = first.layout.split(first.read().weights_P)
    assert all((tensor == 0).all() == ("lora_B" in name) for name, tensor in tensors.items())


def test_weights_and_gradients_in_the_layers_are_views_of_the_flat_vectors() -> None:
    adapted = make_adapted()
    adapted.weights_P.data.fill_(0.5)
    adapted.gradient_P.fill_(2.0)
    trained = [weight for weight in adapted.model.parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in trained) == adapted.layout.size
    assert all((weight == 0.5).all() and (weight.grad == 2.0).all() for weight in trained)


def test_backward_writes_into_the_flat_gradient(shape: str) -> None:
    adapted, blocks = make_adapted(shape), make_blocks(2)
    adapted.weights_P.data.normal_()
    adapted.model(input_ids=blocks.tokens_NT, labels=blocks.tokens_NT).loss.backward()
    whole = torch.cat([w.grad.reshape(-1) for w in adapted.model.parameters() if w.requires_grad])
    assert torch.equal(whole, adapted.gradient_P)
    assert adapted.weights_P.grad is adapted.gradient_P
    assert adapted.gradient_P.abs().sum() > 0


def test_what_was_read_does_not_change_with_the_model() -> None:
    adapted = make_adapted()
    before = adapted.read()
    digest = before.sha256()
    adapted.weights_P.data.add_(1.0)
    assert before.sha256() == digest
    adapted.load(before)
    assert adapted.read().sha256() == digest


@pytest.mark.parametrize("rslora", [False, True])
def test_plain_peft_opens_a_saved_adapter_and_gives_the_logits_that_were_evaluated(
    shape: str, rslora: bool, tmp_path: Path
) -> None:
    adapted, blocks = make_adapted(shape, rslora=rslora), make_blocks()
    trained = Adapter(adapted.layout, torch.randn(adapted.layout.size, generator=torch.manual_seed(0)) * 0.1)
    ours = evaluate(adapted, trained, blocks, batch_size=3)
    save_adapter(trained, adapted.config, tmp_path / "best")

    theirs = PeftModel.from_pretrained(load_base(shape), tmp_path / "best").eval()
    adapted.load(trained)
    with torch.no_grad():
        logits = theirs(input_ids=blocks.tokens_NT).logits
        torch.testing.assert_close(logits, adapted.model(input_ids=blocks.tokens_NT).logits)
    log_p = logits.log_softmax(-1)
    losses = [
        -log_p[row, position, blocks.tokens_NT[row, position + 1]].item()
        for row in range(len(blocks))
        for position in range(int(blocks.lengths_N[row]) - 1)
    ]
    assert ours.num_targets == len(losses)
    assert ours.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)

    merged = theirs.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=blocks.tokens_NT).logits, logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_peft_saved_is_read(shape: str, tmp_path: Path) -> None:
    theirs = get_peft_model(load_base(shape), LoraConfig(r=2, target_modules=list(ARCHITECTURES[shape]),
        task_type="CAUSAL_LM", fan_in_fan_out=shape == "tiny-gpt2"))  # fmt: skip
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    layout = make_adapted(shape).layout
    read = load_adapter(tmp_path, layout).layout.split(load_adapter(tmp_path, layout).weights_P)
    assert all(
        torch.equal(read[name], tensor)
        for name, tensor in get_peft_model_state_dict(theirs, save_embedding_layers=False).items()
    )


def test_saving_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    adapted = make_adapted()
    for value in (1.0, 2.0):
        weights_P = torch.full((adapted.layout.size,), value)
        save_adapter(Adapter(adapted.layout, weights_P), adapted.config, tmp_path / "adapters" / "best")
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["best"]
    assert load_adapter(tmp_path / "adapters" / "best", adapted.layout).weights_P.unique().tolist() == [2.0]
    weights = tmp_path / "adapters" / "best" / "adapter_model.safetensors"
    assert weights.stat().st_mode & 0o444, "readable as the umask says, not by its owner alone"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "no readable adapter"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "no readable adapter"),
        (lambda path: path.write_bytes(b""), "no readable adapter"),
    ],
)
def test_a_damaged_adapter_is_refused(damage, words: str, tmp_path: Path) -> None:
    adapted = make_adapted()
    save_adapter(adapted.read(), adapted.config, tmp_path / "best")
    damage(tmp_path / "best" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=words):
        load_adapter(tmp_path / "best", adapted.layout)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapted = make_adapted()
    save_adapter(adapted.read(), adapted.config, tmp_path / "best")
    with pytest.raises(ModelError, match="only one of the two has"):
        load_adapter(tmp_path / "best", make_adapted("tiny-gpt2").layout)
    with pytest.raises(ModelError, match=r"is \(2, 64\), not \(4, 64\)"):
        load_adapter(tmp_path / "best", make_adapted(rank=4).layout)


def test_a_target_that_is_not_there_names_those_that_are(shape: str) -> None:
    base = build_meta_model(open_model(f"random:{shape}"))
    section = make_recipe(adapter={"targets": ["q_projj"]}).adapter
    with pytest.raises(ModelError, match=rf'no layer "q_projj".*{ARCHITECTURES[shape][0]}'):
        build_config(section, base)


def test_targets_left_out_are_pefts_choice(shape: str) -> None:
    base = build_meta_model(open_model(f"random:{shape}"))
    section = make_recipe(adapter={"targets": None}).adapter
    assert AdaptedModel(base, build_config(section, base), 1).layout == make_adapted(shape).layout


def test_a_bfloat16_base_has_a_float32_adapter() -> None:
    adapted = make_adapted(dtype="bfloat16")
    assert adapted.weights_P.dtype == torch.float32
    frozen = {weight.dtype for weight in adapted.model.parameters() if not weight.requires_grad}
    assert frozen == {torch.bfloat16}


def test_a_frozen_a_is_saved_with_the_adapter_and_not_sent(tmp_path: Path, shape: str) -> None:
    both, adapted = make_adapted(shape), make_adapted(shape, freeze_a=True)
    assert adapted.layout.size + sum(value.numel() for value in adapted.frozen.values()) == both.layout.size
    trained = Adapter(adapted.layout, torch.full((adapted.layout.size,), 0.1))
    adapted.save(trained, tmp_path / "best")
    assert torch.equal(load_adapter(tmp_path / "best", adapted.layout, adapted.frozen).weights_P, trained.weights_P)
    adapted.load(trained)
    tokens_BT = make_blocks(2).tokens_NT
    opened = PeftModel.from_pretrained(load_base(shape), tmp_path / "best").eval()
    assert torch.equal(opened(input_ids=tokens_BT).logits, adapted.model.eval()(input_ids=tokens_BT).logits)
