"""Hugging Face transformers on torch's CPU backend, with its own caches and with kvpress, as
systems of `benchmarks peers`.

A cache for a batch is made from the one of a single request: its keys and values, repeated, go
through the new cache's own `update` (a quantized cache dequantizes and quantizes again, which
changes no shape). A worker's decode step is a model call and an argmax: `model.generate` would add
its own host work to each token.
"""

import copy
import importlib
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache

from benchmarks.peers.systems import Decoded, Place, log_softmax
from benchmarks.peers.weights import HF_FOLDER

HQQ_AXIS = {"quanto": 0, "hqq": 1}  # what each backend's documentation recommends


class Transformers:
    """A Llama model with "dynamic", "static", "quanto" or "hqq" cache."""

    def __init__(
        self, place: Place, dtype: str = "bfloat16", cache: str = "dynamic", bits: int = 4
    ):
        torch.set_num_threads(place.threads)
        torch.set_grad_enabled(False)
        self.kind, self.bits = cache, bits
        self.model = AutoModelForCausalLM.from_pretrained(
            place.work / HF_FOLDER, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self.model.eval()
        self.kept: Any = None
        self.seen, self.first = 0, torch.zeros(1, 1, dtype=torch.long)

    def empty(self, room: int):
        """A new cache; `room` tokens, where that must be said."""
        if self.kind == "static":
            return StaticCache(self.model.config, max_cache_len=room)
        if self.kind == "dynamic":
            return DynamicCache(config=self.model.config)
        axis = HQQ_AXIS[self.kind]
        return QuantizedCache(
            self.kind, self.model.config, nbits=self.bits, axis_key=axis, axis_value=axis
        )

    def prefill(self, tokens: np.ndarray) -> float:
        """One pass over the prompts."""
        ids, cache = torch.from_numpy(tokens).long(), self.empty(tokens.shape[1])
        began = time.perf_counter()
        self.prompt(ids, cache).argmax(-1).tolist()
        return time.perf_counter() - began

    def keep(self, tokens: np.ndarray) -> None:
        """One pass over the prompt."""
        self.kept = None  # its memory first
        cache, self.seen = self.empty(len(tokens)), len(tokens)
        self.first = self.prompt(torch.from_numpy(tokens)[None].long(), cache).argmax(
            -1, keepdim=True
        )
        self.kept = cache

    def prompt(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Feed a prompt [R, N]; logits [R, vocab] of the last token."""
        return self.model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]

    def step(self, ids: torch.Tensor, cache: Any, position: int) -> torch.Tensor:
        """Feed a token [R, 1]; logits [R, vocab]."""
        positions = torch.full_like(ids, position)
        return self.model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            position_ids=positions,
            logits_to_keep=1,
        ).logits[:, -1]

    def decode(self, batch: int, steps: int) -> Decoded:
        """Greedy steps from copies of the kept cache."""
        cache = self.copies(batch, steps)
        token, position = self.first.expand(batch, 1).contiguous(), self.seen
        began = time.perf_counter()
        for i in range(steps):
            token = self.step(token, cache, position + i).argmax(-1, keepdim=True)
        token.tolist()
        return Decoded(time.perf_counter() - began, kv_bytes(cache))

    def copies(self, batch: int, steps: int):
        """A cache of `batch` requests like the kept one, with room for `steps` more tokens."""
        cache = self.empty(self.seen + steps)
        for layer in range(len(self.kept.layers)):
            k, v = stored(self.kept.layers[layer], self.seen)
            cache.update(k.repeat(batch, 1, 1, 1), v.repeat(batch, 1, 1, 1), layer)
        return cache

    def teacher_forced(self, tokens: np.ndarray, context: int) -> np.ndarray:
        """Prompt in one pass, then token by token."""
        ids, cache, rows = torch.from_numpy(tokens)[None].long(), self.empty(len(tokens)), []
        self.prompt(ids[:, :context], cache)
        for i in range(context, len(tokens)):
            rows.append(self.step(ids[:, i : i + 1], cache, i)[0].float().numpy())
        return log_softmax(rows)


class Pressed(Transformers):
    """A press of kvpress, which removes half of the prompt's tokens after the prompt; AdaKV only
    masks them, and frees nothing.

    kvpress 0.5.5 asks for transformers < 5.3, which passed `cache_position` to every layer. Passing
    it by hand is all that it misses in the newer version that the other systems run on.
    """

    def __init__(self, place: Place, press: str, ratio: float = 0.5):
        kvpress = importlib.import_module("kvpress")
        super().__init__(place)
        presses = {
            "snapkv": lambda: kvpress.SnapKVPress(ratio),
            "knorm": lambda: kvpress.KnormPress(ratio),
            "expected": lambda: kvpress.ExpectedAttentionPress(ratio),
            "adakv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
        }
        self.press = presses[press]()

    def prompt(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Feed a prompt and compress it."""
        with self.press(self.model):
            where = torch.arange(ids.shape[1])
            out = self.model(
                input_ids=ids,
                past_key_values=cache,
                use_cache=True,
                cache_position=where,
                logits_to_keep=1,
            )
        self.masks = [
            layer.self_attn.__dict__.get("masked_key_indices") for layer in self.model.model.layers
        ]
        return out.logits[:, -1]

    def copies(self, batch: int, steps: int):
        """The kept cache's tokens, of which there are fewer than were seen, and AdaKV's masks for
        each request.
        """
        for layer, mask in zip(self.model.model.layers, self.masks, strict=True):
            if mask is not None:
                _, heads, places = mask
                rows = torch.arange(batch).repeat_interleave(len(heads))
                layer.self_attn.masked_key_indices = (
                    rows,
                    heads.repeat(batch),
                    places.repeat(batch),
                )
        return super().copies(batch, steps)


def stored(layer: Any, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [1, heads, tokens, head_dim] that a cache's layer holds."""
    if not hasattr(layer, "_quantized_keys"):
        return layer.keys[:, :, :seen], layer.values[:, :, :seen]
    layer = copy.copy(layer)
    pairs = ((layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values))
    k, v = (
        torch.cat([layer._dequantize(packed), recent], dim=-2)
        if recent.dim() == 4
        else layer._dequantize(packed)
        for packed, recent in pairs
    )
    return k, v


def kv_bytes(cache: Any) -> int:
    """Bytes of the storage behind every tensor that a cache's layers refer to, each storage
    once.
    """
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if (
            isinstance(value, torch.Tensor)
            and type(value) is not torch.Tensor
            and hasattr(value, "__tensor_flatten__")
        ):
            parts: Any = value  # a quantized tensor of quanto: packed codes, scales, zero points
            for name in parts.__tensor_flatten__()[0]:
                visit(getattr(value, name))
        elif isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, tuple | list):
            for item in value:
                visit(item)

    for layer in cache.layers:
        visit(vars(layer))
    return sum(storages.values())
