"""An adapter: named tensors over one flat vector; PEFT files in and out.

One flat vector makes what happens to an adapter plain arithmetic: averaging, distance, clipping, the optimizer
and the bytes on the wire need no names.

Letters: P adapter parameters.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedloom.adapters.residual import A_SUFFIX, Residual, lora_pairs, make_room_for_residuals
from fedloom.errors import ModelError
from fedloom.failpoints import failpoint
from fedloom.randomness import derive_seed
from fedloom.readout import Readout

if TYPE_CHECKING:
    from fedloom.sections import Adapter as AdapterSection

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
A_WEIGHT = ".lora_A.default.weight"


@dataclass(frozen=True)
class Layout:
    """Names and shapes of an adapter's tensors in the order in which they lie in the flat vector.

    The names are those of PEFT's files: `base_model.model.….q_proj.lora_A.weight`.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def size(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    def split(self, weights_P: Tensor) -> dict[str, Tensor]:
        """Each tensor as a view of the flat vector."""
        return dict(zip(self.names, (view[0] for view in self.split_stacked(weights_P[None])), strict=True))

    def split_stacked(self, weights_KP: Tensor) -> list[Tensor]:
        """Each tensor of K adapters as a view of theirs, with the clients in front."""
        ends = accumulate((shape.numel() for shape in self.shapes), initial=0)
        views = (weights_KP[:, start:end] for start, end in pairwise(ends))
        return [view.unflatten(1, shape) for view, shape in zip(views, self.shapes, strict=True)]


@dataclass(frozen=True)
class Adapter:
    """Weights that belong to nobody's model: on the CPU, never changed in place."""

    layout: Layout
    weights_P: Tensor
    residual: Residual | None = None
    """With `lora_rule = "fedex"`: what belongs to the model beside the adapter."""

    @property
    def num_bytes(self) -> int:
        """The payload: what travels."""
        beside = self.residual.num_bytes if self.residual else 0
        return self.weights_P.numel() * self.weights_P.element_size() + beside

    def sha256(self) -> str:
        """Of names, shapes and weights."""
        digest = hashlib.sha256(repr((self.layout.names, [tuple(shape) for shape in self.layout.shapes])).encode())
        digest.update(self.weights_P.contiguous().numpy().data)
        for layer, pair in self.residual.factors.items() if self.residual else ():
            for factor in pair:
                digest.update(f"{layer}{tuple(factor.shape)}".encode())
                digest.update(factor.contiguous().numpy().data)
        return digest.hexdigest()


class AdaptedModel:
    """The frozen base model with a PEFT adapter whose trained weights, and their gradients, are flat vectors.

    `weights_P` is one parameter, `gradient_P` its gradient; the layers see views of both. Loading an adapter copies
    into `weights_P`, so the model is wrapped once and serves every client. With `freeze_a` only LoRA's B is trained,
    and A, the same for everybody, is in `frozen` (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313). With `residuals` the
    adapted layers have room for an adapter's residual.

    `base` may be on the meta device: then everything has its shape, and nothing a value.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: PeftConfig,
        seed: int,
        *,
        freeze_a: bool = False,
        residuals: bool = False,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            # PEFT draws on the CPU, so the same seed gives the same adapter on every device.
            torch.manual_seed(derive_seed(seed, "adapter"))
            self.model = _wrap(base, config)
        for name, value in self.model.named_parameters():
            if freeze_a and name.endswith(A_WEIGHT):
                value.requires_grad_(False)
        self.config = config
        self.frozen = {
            name.replace(".default", ""): value.detach()
            for name, value in self.model.named_parameters()
            if freeze_a and name.endswith(A_WEIGHT)
        }
        self._rooms = make_room_for_residuals(self.model) if residuals else {}
        self.readout = Readout(self.model.get_base_model())
        trained = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        self.layout = Layout(
            names=tuple(name.replace(".default", "") for name, _ in trained),
            shapes=tuple(value.shape for _, value in trained),
        )
        self.weights_P = nn.Parameter(torch.cat([value.detach().reshape(-1) for _, value in trained]))
        self.gradient_P = torch.zeros_like(self.weights_P)
        self.weights_P.grad = self.gradient_P
        weights = self.layout.split(self.weights_P.data)
        gradients = self.layout.split(self.gradient_P)
        for name, (_, value) in zip(self.layout.names, trained, strict=True):
            value.data = weights[name]
            value.grad = gradients[name]

    @property
    def device(self) -> torch.device:
        return self.weights_P.device

    @property
    def num_parameters(self) -> int:
        """Of the base model with the adapter."""
        return sum(value.numel() for value in self.model.parameters())

    def parameter(self, name: str) -> Tensor:
        """What the model has under a name of PEFT's files."""
        found: Tensor = self.model.get_parameter(name.replace(".weight", ".default.weight"))
        return found

    def load(self, adapter: Adapter) -> None:
        """Copy an adapter's weights into the model."""
        assert adapter.layout == self.layout, "an adapter of another model"
        self.weights_P.data.copy_(adapter.weights_P)
        self.load_residual(adapter)

    def load_residual(self, adapter: Adapter) -> None:
        """Let the layers add what an adapter has beside its weights."""
        for layer, room in self._rooms.items():
            room.load(adapter.residual.factors[layer] if adapter.residual else None)

    def draw(self, seed: int) -> Adapter:
        """The LoRA adapter that a run with another seed starts from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "adapter"))
            self.model.add_adapter("drawn", copy.deepcopy(self.config))
        drawn = [self.model.get_parameter(name.replace(".weight", ".drawn.weight")) for name in self.layout.names]
        weights_P = torch.cat([value.detach().reshape(-1) for value in drawn]).cpu()
        self.model.delete_adapter("drawn")
        return Adapter(self.layout, weights_P)

    def read(self) -> Adapter:
        """A copy of the weights that are in the model now."""
        return Adapter(self.layout, self.weights_P.detach().to("cpu", copy=True))

    def save(self, adapter: Adapter, folder: Path, card: str = "") -> None:
        """Write an adapter with everything that PEFT needs to open it, and its model card."""
        save_adapter(adapter, self.config, folder, frozen=self.frozen, card=card)


def build_config(section: AdapterSection, base: PreTrainedModel) -> LoraConfig:
    """PEFT's configuration for the recipe's `[adapter]`.

    Raises:
        ModelError: a target that the model does not have, or none named where PEFT knows no default.
    """
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, nn.Linear | Conv1D)}
    known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
    targets, adapted = section.targets, list(layers.values())
    if isinstance(targets, tuple):
        matches = {t: [v for name, v in layers.items() if name == t or name.endswith(f".{t}")] for t in targets}
        adapted = [layer for layers in matches.values() for layer in layers]
        if missing := [target for target, found in matches.items() if not found]:
            raise ModelError(f'the model has no layer "{missing[0]}"', where="adapter.targets", mend=f"it has: {known}")
    elif targets is None and base.config.model_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise ModelError(
            f"PEFT knows no default layers for {base.config.model_type}",
            where="adapter.targets",
            mend=f"name some of: {known}",
        )
    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        target_modules=sorted(targets) if isinstance(targets, tuple) else targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in adapted),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.name_or_path,
    )


def save_adapter(
    adapter: Adapter,
    config: PeftConfig,
    folder: Path,
    *,
    frozen: Mapping[str, Tensor] = MappingProxyType({}),
    card: str = "",
) -> None:
    """Write the adapter, and the frozen tensors beside it, as PEFT does; the folder is replaced whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        saved = copy.deepcopy(config)
        saved.inference_mode = True
        if isinstance(getattr(saved, "target_modules", None), set):
            saved.target_modules = sorted(saved.target_modules)
        tensors = {**adapter.layout.split(adapter.weights_P), **{name: value.cpu() for name, value in frozen.items()}}
        if adapter.residual:
            tensors, more = adapter.residual.widen(tensors)
            _widen(saved, more)
        saved.save_pretrained(str(temporary))
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        for file in temporary.iterdir():
            file.chmod(0o666 & ~_umask())
        temporary.chmod(0o777 & ~_umask())
        failpoint("adapter.written")
        if folder.exists():
            folder.rename(temporary / "replaced")
        failpoint("adapter.between")
        temporary.rename(folder)
        failpoint("adapter.renamed")
        shutil.rmtree(folder / "replaced", ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_adapter(folder: Path, layout: Layout, frozen: Collection[str] = ()) -> Adapter:
    """Read an adapter that PEFT or `save_adapter` wrote, leaving out the tensors that are `frozen`.

    Ranks beyond those of `layout` are its residual.

    Raises:
        ModelError: there is none, it can't be read, or its tensors are not those of `layout`.
    """
    path = folder / WEIGHTS_FILE
    try:
        tensors = {name: value for name, value in load_file(path).items() if name not in frozen}
    except Exception as error:  # safetensors raises its own kinds for damage
        raise ModelError(f"no readable adapter ({type(error).__name__})", where=str(path)) from error
    if set(tensors) != set(layout.names):
        odd = sorted(set(tensors) ^ set(layout.names))[0]
        raise ModelError(f"not an adapter of this model: {odd} is only on one side", where=str(path))
    ranks = {
        layer: layout.shapes[layout.names.index(a_name)][0] for layer, (a_name, _) in lora_pairs(layout.names).items()
    }
    residual = None
    if any(len(tensors[layer + A_SUFFIX]) > rank for layer, rank in ranks.items()):
        tensors, residual = Residual.split(tensors, ranks)
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if tensors[name].shape != shape:
            raise ModelError(f"{name} is {tuple(tensors[name].shape)}, not {tuple(shape)}", where=str(path))
    return Adapter(layout, torch.cat([tensors[name].reshape(-1) for name in layout.names]), residual)


def _widen(config: PeftConfig, ranks: int) -> None:
    """More ranks for a LoRA configuration, and an α that leaves its scale as it was."""
    wider = config.r + ranks
    config.lora_alpha *= (wider / config.r) ** (0.5 if config.use_rslora else 1)
    config.r = wider


def _wrap(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    with warnings.catch_warnings():
        # Of libraries about each other, and of tied heads being merged, which nobody does here.
        warnings.simplefilter("ignore")
        if base.device.type == "meta":
            with torch.device("meta"):
                return get_peft_model(base, copy.deepcopy(config))
        return get_peft_model(base, copy.deepcopy(config))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
