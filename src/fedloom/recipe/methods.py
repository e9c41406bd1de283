"""Training methods of an adapter: PEFT's by their names, and `full`. Neither torch nor PEFT here.

A method is refused where its weights can't be averaged, or where text alone is not enough for it; its entry says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedloom.text import nearest


@dataclass(frozen=True)
class Method:
    """A way to train: its weights, its paper, and PEFT's names for the recipe's keys, empty where it has none."""

    what: str
    """Trained weights, in a few words for people."""
    paper: str = ""
    """Number on arXiv."""
    refused: str = ""
    """Reason why the method can't be used; empty if it can."""
    rank: str = ""
    alpha: str = ""
    dropout: str = ""
    targets: str = "target_modules"
    float32_base: bool = False
    """True if its weights have the base model's dtype: in bfloat16 their small steps would be lost."""
    prompts: bool = False
    """True if what it trains stands before a text: embeddings, keys and values."""
    needs_values: bool = False
    """True if PEFT can't build its layers on the meta device, which has shapes but no values."""


def _ranked(what: str, paper: str = "", *, alpha: str = "", dropout: str = "", needs_values: bool = False) -> Method:
    return Method(what, paper, rank="r", alpha=alpha, dropout=dropout, needs_values=needs_values)


def _prompt(what: str, paper: str, refused: str = "") -> Method:
    return Method(what, paper, refused, targets="", prompts=True)


METHODS: dict[str, Method] = {
    "full": Method("every weight of the base model, without PEFT", "1602.05629", targets="", float32_base=True),
    "lora": _ranked(
        "two low-rank factors beside a layer; `rslora`, `dora`",
        "2106.09685",
        alpha="lora_alpha",
        dropout="lora_dropout",
    ),
    "adalora": Method(
        "low-rank factors with a rank for each layer",
        "2303.10512",
        "each client would prune to ranks of its own, and factors of different ranks have no average",
    ),
    "adamss": Method(
        "low-rank updates in clustered subspaces",
        refused="PEFT builds it with scikit-learn, which fedloom does not install",
    ),
    # Its layers are no choice: PEFT takes one name for them, which it knows for each kind of model.
    "adaption_prompt": Method(
        "prompts inside the upper attention layers, and their gates",
        "2303.16199",
        targets="",
        float32_base=True,
        prompts=True,
    ),
    "beft": Method("the value projection's biases", "2509.15974"),
    "boft": Method(
        "an orthogonal matrix in butterfly factors", "2311.06243", dropout="boft_dropout", needs_values=True
    ),
    "c3a": Method("block-circular convolutions", "2407.19342"),
    "cartridge": _prompt(
        "keys and values before the text",
        "2506.06266",
        "it distils one corpus, which is no client's to share; `prefix_tuning` trains the same weights",
    ),
    "cpt": _prompt(
        "changes to the tokens of a prompt",
        "2410.17222",
        "its prompt is labelled examples, and its loss is one of its own over their parts",
    ),
    "deft": _ranked("a projection out of a layer and an injection into it", alpha="alpha", dropout="deft_dropout"),
    "delora": _ranked("low-rank factors apart from their strength", "2503.18225"),
    "fourierft": Method("a few Fourier coefficients of a layer's change", "2405.03003"),
    "frod": Method("sparse rotations between shared bases", dropout="frod_dropout", needs_values=True),
    "glora": _ranked("scales, shifts and low-rank changes of weights and biases", "2306.07967"),
    "gralora": _ranked(
        "low-rank factors of each block of a layer", "2505.20355", alpha="alpha", dropout="gralora_dropout"
    ),
    "hira": _ranked("low-rank factors that multiply a layer's weights", dropout="hira_dropout"),
    "hra": _ranked("a chain of Householder reflections", "2405.17484"),
    "ia3": Method("factors of keys, values and feed-forward activations", "2205.05638"),
    "lily": _ranked("low-rank factors that layers share", "2407.09946"),
    "ln_tuning": Method("the norms' weights", "2312.11420", float32_base=True),
    "loha": _ranked("the elementwise product of two low-rank changes", "2108.06098", alpha="alpha"),
    "lokr": _ranked("a Kronecker product, one side of low rank", "2309.14859", alpha="alpha"),
    "miss": _ranked("one small matrix, repeated over a layer's shards", "2409.15371", dropout="miss_dropout"),
    "multitask_prompt_tuning": _prompt(
        "a shared prompt and factors for each task",
        "2303.02861",
        "it wants a task's number with every document, which text does not have",
    ),
    "oft": Method("an orthogonal matrix in blocks", "2306.07280"),
    "osf": Method("the small singular directions of a layer", "2504.07097"),
    "p_tuning": _prompt(
        "a network that computes a prompt",
        "2103.10385",
        "PEFT saves the prompt that the network computes and not the network, so training can't go on from it;"
        " `prompt_tuning` trains the prompt itself",
    ),
    "peanut": _ranked("a small network of a layer's weights", "2410.01870"),
    "poly": Method(
        "a mixture of low-rank skills for each task",
        "2202.13914",
        "it wants a task's number with every document, which text does not have",
    ),
    "prefix_tuning": _prompt("keys and values before the text, in every layer", "2101.00190"),
    "prompt_tuning": _prompt("embeddings before the text", "2104.08691"),
    "psoft": _ranked(
        "a rotation inside a layer's principal subspace", "2505.11235", alpha="psoft_alpha", dropout="psoft_dropout"
    ),
    "pvera": _ranked(
        "scales of shared random factors, drawn as they are trained", "2512.07703", dropout="pvera_dropout"
    ),
    "randlora": _ranked(
        "scales of many random factors", "2502.00987", alpha="randlora_alpha", dropout="randlora_dropout"
    ),
    "road": Method("rotations of pairs of activations", "2409.00119"),
    "shadow": Method(
        "a small model beside the base model",
        refused="it trains with a loss of its own beside the model's, which PEFT adds where labels are given to it",
    ),
    "shira": _ranked("a sparse random share of a layer's weights", "2406.13175", needs_values=True),
    "supertuning": Method("a layer's largest weights, sparsely", "2607.09287"),
    "tinylora": _ranked("a few numbers for all layers", "2602.04118", dropout="tinylora_dropout"),
    "trainable_tokens": Method("the embeddings of a few tokens"),
    "unilora": _ranked(
        "one vector for all layers' factors", "2506.00799", dropout="unilora_dropout", needs_values=True
    ),
    "vblora": _ranked("a bank of vectors that factors are mixed from", "2405.15179", dropout="vblora_dropout"),
    "vera": _ranked("scales of shared random factors", "2310.11454", dropout="vera_dropout"),
    "waveft": Method("a few wavelet coefficients of a layer's change"),
    "xlora": Method(
        "gates that mix adapters",
        "2402.07148",
        "it mixes LoRA adapters that were trained before, and trains none",
    ),
}
"""Every method by its name: PEFT's types in lower case, and `full`."""

INIT_REFUSED: dict[str, str] = {
    "pissa": "it changes the base model that everybody shares, so the adapter would not fit the published one",
    "olora": "it changes the base model that everybody shares, so the adapter would not fit the published one",
    "loftq": "it changes the base model that everybody shares, so the adapter would not fit the published one",
    "eva": "it is computed from documents, and a client's are nobody else's",
    "corda": "it is computed from documents, and a client's are nobody else's",
    "lora_ga": "it is computed from gradients on documents, and a client's are nobody else's",
}
"""Values of PEFT's `init_lora_weights` that a federation can't use, by how they begin, with the reason."""
INIT_ALLOWED = (True, False, "gaussian", "orthogonal")
"""Values of PEFT's `init_lora_weights` that need nothing but a shape and a seed."""

SHAPED = {"exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"}
"""PEFT's options of LoRA for which it reads no weight of the base model."""

SEEDS = ("projection_prng_key", "random_seed", "random_loc_seed", "proj_seed", "projection_seed", "generator_seed")
"""PEFT's fields that seed random weights which are not trained; all of them are derived from the recipe's seed."""
SET_BY_FEDLOOM = (
    "task_type",
    "peft_type",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "fan_in_fan_out",
    *SEEDS,
)
"""PEFT's fields that a recipe can't choose."""


def check_method(name: str) -> str:
    """Return the name of a method if it is known.

    Raises:
        ValueError: no method has that name.
    """
    if name not in METHODS:
        raise ValueError(f"should be a known method ({nearest(name, list(METHODS))})")
    return name


def own_keys(name: str) -> dict[str, str]:
    """Return the recipe's key for each of PEFT's fields that has one: `{"r": "rank", ...}`."""
    method = METHODS[name]
    keys = {method.rank: "rank", method.alpha: "alpha", method.dropout: "dropout", method.targets: "targets"}
    if name == "lora":
        keys |= {"use_rslora": "rslora", "use_dora": "dora"}
    return {field: key for field, key in keys.items() if field}


def check_choice(name: str, given: set[str], options: Mapping[str, object]) -> None:
    """Refuse a method that can't be federated, keys that it does not use, and options that a recipe can't set.

    `given` has the keys of the section that the recipe sets, `options` the rest by PEFT's names.

    Raises:
        ValueError: pydantic makes an error of the recipe of it.
    """
    owned = own_keys(name)
    if why := METHODS[name].refused:
        raise ValueError(f'method "{name}" is refused: {why}')
    if spare := sorted(given - {"method", "options", *owned.values()}):
        raise ValueError(f'method "{name}" does not use {" and ".join(spare)}')
    if name == "full" and options:
        raise ValueError('method "full" does not use options')
    for option, value in options.items():
        if option in owned:
            raise ValueError(f"options.{option} can't be set here: use adapter.{owned[option]}")
        if option in SET_BY_FEDLOOM:
            raise ValueError(f"options.{option} is set by fedloom: leave it out")
        if option.endswith("_config") or option.startswith("megatron_"):
            raise ValueError(
                f"options.{option} is for a variant of the method that fedloom does not support: leave it out"
            )
        if option == "init_lora_weights" and value not in INIT_ALLOWED:
            reason = next((why for start, why in INIT_REFUSED.items() if str(value).startswith(start)), "")
            known = "choose one of: true, false, gaussian, orthogonal"
            raise ValueError(f'options.init_lora_weights can\'t be "{value}": {reason or known}')


def describe_methods() -> str:
    """Return every method with its trained weights, paper and code, as a Markdown table."""
    rows = [
        f"| `{name}` | {method.what}{f'; refused: {method.refused}' if method.refused else ''} |"
        f" {method.paper and f'arXiv {method.paper}'} |"
        f" {'`src/fedloom/adapters/adapted_model.py`' if name == 'full' else f'`peft/tuners/{name}`'} |"
        for name, method in METHODS.items()
    ]
    return "\n".join(["| method | what is trained | paper | code |", "|---|---|---|---|", *rows]) + "\n"
