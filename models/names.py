"""Tensor names: the one mechanical rule between Hugging Face checkpoints and the parameter tree.

    model.embed_tokens.weight                  <-> embed_tokens / embedding                [vocab,
    hidden] model.layers.{i}.self_attn.q_proj.weight   <-> layers / self_attn / q_proj / kernel
    [num_layers, in, out] model.layers.{i}.self_attn.q_proj.bias     <-> layers / self_attn / q_proj
    / bias      [num_layers, out] model.layers.{i}.input_layernorm.weight    <-> layers /
    input_layernorm / weight       [num_layers, hidden] model.norm.weight
    <-> norm / weight                           [hidden] lm_head.weight
    <-> lm_head / kernel                        [hidden, vocab]
    model.layers.{i}.mlp.experts.{j}.up_proj.weight <-> layers / mlp / experts / up_proj / kernel
    [num_layers, experts, in, out]

Everything under "layers" is stacked over layers on axis 0, that of experts also over these on axis
1; a model whose first layers differ has those under "dense_layers", and "layers" begins behind
them. A "kernel" is the transpose of the checkpoint's [out, in] matrix. Which tensors must exist is
read off the model's own parameter shapes, so there is no table of names to keep in step with the
model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

_BIASES = ("bias", "e_score_correction_bias")
_LEAF_TO_HF = {
    "kernel": "weight",
    "embedding": "weight",
    "weight": "weight",
    **{name: name for name in _BIASES},
}
_STACKS = ("dense_layers", "layers")
_TEXT_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_OTHER_TOWERS = re.compile(
    r"^(model\.)?(vision_tower|vision_model|visual|multi_modal_projector|embed_vision|audio_tower|embed_audio)\."
)
_ROTARY_BUFFER = re.compile(r"(^|\.)rotary_emb\.(\w+_)?inv_freq$")


@dataclass(frozen=True)
class Slot:
    """Where one checkpoint tensor goes.

    path: keys from the root of the parameter tree to the leaf.
    layer: index on axis 0 of a stacked leaf, for an expert's tensor those on axes 0 and 1; None for
    a leaf that is not stacked. transpose: whether the leaf holds the transpose of the checkpoint's
    matrix. shape: the shape the checkpoint's tensor must have.
    """

    path: tuple[str, ...]
    layer: int | tuple[int, ...] | None
    transpose: bool
    shape: tuple[int, ...]


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested dict -> {path: leaf}, in the dict's order."""
    out: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        out.update(
            flatten(value, (*prefix, key))
            if isinstance(value, Mapping)
            else {(*prefix, key): value}
        )
    return out


def unflatten(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """{path: leaf} -> nested dict; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def hf_name(path: tuple[str, ...], layer: int | None = None, expert: int | None = None) -> str:
    """The checkpoint name of a parameter, for instance `model.layers.3.mlp.up_proj.weight`; `layer`
    counts from the model's first.
    """
    if path[-1] not in _LEAF_TO_HF:
        raise ValueError(
            f"parameter {'/'.join(path)} must end in one of {sorted(_LEAF_TO_HF)} to have a "
            "checkpoint name"
        )
    modules, leaf = path[:-1], _LEAF_TO_HF[path[-1]]
    if modules[0] in _STACKS:
        modules = ("model", "layers", str(layer), *modules[1:])
    elif modules[0] != "lm_head":
        modules = ("model", *modules)
    if expert is not None:
        modules = (*modules[:-1], str(expert), modules[-1])
    return ".".join((*modules, leaf))


def slots(param_shapes: Mapping[str, Any]) -> dict[str, Slot]:
    """{checkpoint name: Slot} for every tensor that the parameters described by `param_shapes` (a
    tree of ShapeDtypeStruct) need.
    """
    out: dict[str, Slot] = {}
    leaves = flatten(param_shapes)
    behind = max(
        (leaf.shape[0] for path, leaf in leaves.items() if path[0] == "dense_layers"), default=0
    )
    for path, leaf in leaves.items():
        transpose, first = path[-1] == "kernel", behind if path[0] == "layers" else 0
        axes = 0 if path[0] not in _STACKS else 2 if "experts" in path else 1
        shape = tuple(leaf.shape[axes:])
        shape = shape[::-1] if transpose else shape
        for at in product(*map(range, leaf.shape[:axes])):
            number = [first + at[0], *at[1:]] if at else []
            out[hf_name(path, *number)] = Slot(
                path, None if not at else at[0] if len(at) == 1 else at, transpose, shape
            )
    return out


def canonical(name: str) -> str:
    """A text model's tensor name without the prefix that multimodal checkpoints put before it."""
    for prefix, replacement in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name


def ignored_reason(name: str) -> str | None:
    """Why a tensor is left out on purpose, or None if it is not one of those."""
    if _OTHER_TOWERS.match(name):
        return "not part of the text model"
    if _ROTARY_BUFFER.search(name):
        return "rotary buffer, computed from the config"
    return None
