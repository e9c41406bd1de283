"""Other trainers of the benchmark do the work that they are timed for: the same steps on the same documents."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.import_file import import_file

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.long


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return import_file(BENCH / "trainers.py")


@pytest.mark.filterwarnings("ignore")  # TRL's and transformers' own, of settings that they have by themselves
def test_batches_without_padding_train_as_those_with_it(trainers: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="a contender of the benchmark: pip install trl")
    import workload

    blocks = workload.make_blocks(8, 1, lengths=(5, 40))
    moved = []
    for make in (trainers.padded_trainer, trainers.padding_free_trainer):
        model = trainers.build_plain("tiny-llama", "float32", 0.0)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        before_P = torch.cat([weight.detach().flatten() for weight in weights])
        make(model, blocks, str(tmp_path)).train()
        moved.append(torch.cat([weight.detach().flatten() for weight in weights]) - before_P)
    padded_P, padding_free_P = moved
    assert padded_P.norm() > 1e-4
    assert (padding_free_P - padded_P).norm() < 1e-3 * padded_P.norm()


def test_a_model_whose_documents_see_each_other_in_a_row_is_told(trainers: ModuleType) -> None:
    assert trainers.shows_documents_each_other("tiny-opt")
    assert not trainers.shows_documents_each_other("tiny-llama")
