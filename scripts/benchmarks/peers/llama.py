"""llama.cpp through the low-level interface of llama-cpp-python, as a system of `benchmarks peers`.

Every request has a stream of its own in the KV cache (`kv_unified=False`), which is faster for
requests that share nothing, and flash attention is on. Copies of a request go through llama.cpp's
saved state of a sequence.
"""

import ctypes
import hashlib
import importlib
import re
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.peers.systems import Decoded, Place, log_softmax
from benchmarks.peers.weights import F16_FILE

BATCH, CELLS = 2048, 256  # tokens fed in one call; llama.cpp rounds a stream up to so many tokens
DEBUG = 1  # level of a log line
KV_SIZE = re.compile(r"KV buffer size = *([\d.]+) MiB")


class LlamaCpp:
    """`weights` "f16" or "shipped" (the file as it is); `kv` is the type of keys and values."""

    def __init__(self, place: Place, weights: str = "f16", kv: str = "f16"):
        self.lib: Any = importlib.import_module("llama_cpp")
        self.type = {
            "f16": self.lib.GGML_TYPE_F16,
            "q8_0": self.lib.GGML_TYPE_Q8_0,
            "q4_0": self.lib.GGML_TYPE_Q4_0,
        }[kv]
        self.place, self.name, self.kv_bytes = place, f"llama-{weights}-{kv}", 0
        # kept: llama.cpp calls it for as long as it runs
        self._log = self.lib.llama_log_callback(self._logged)
        self.lib.llama_log_set(self._log, None)
        self.lib.llama_backend_init()
        path = place.gguf if weights == "shipped" else place.work / F16_FILE
        self.model = self.lib.llama_model_load_from_file(
            str(path).encode(), self.lib.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        self.kept, self.seen, self.first = b"", 0, 0

    def prefill(self, tokens: np.ndarray) -> float:
        """Each prompt in a stream of its own."""
        with self.context(*tokens.shape) as context:
            began = time.perf_counter()
            for seq, row in enumerate(tokens):
                self.prompt(context, row, seq).argmax()
            return time.perf_counter() - began

    def keep(self, tokens: np.ndarray) -> None:
        """A file of the work folder saves a prompt of 8,000 tokens, which takes llama.cpp minutes
        with a quantized cache.
        """
        path = (
            self.place.work
            / f"{self.name}-{hashlib.sha256(tokens.tobytes()).hexdigest()[:16]}.state"
        )
        if not path.exists():
            with self.context(1, len(tokens)) as context:
                first = int(self.prompt(context, tokens, 0).argmax())
                size = self.lib.llama_state_seq_get_size(context, 0)
                state = (ctypes.c_uint8 * size)()
                self.lib.llama_state_seq_get_data(context, state, size, 0)
            partial = path.with_suffix(".partial")
            partial.write_bytes(struct.pack("<I", first) + bytes(state))
            partial.rename(path)
        saved = path.read_bytes()
        self.first, self.kept, self.seen = (
            struct.unpack_from("<I", saved)[0],
            saved[4:],
            len(tokens),
        )

    def decode(self, batch: int, steps: int) -> Decoded:
        """Greedy steps, the tokens of all requests in one call."""
        seqs, tokens = range(batch), [self.first] * batch
        with self.context(batch, self.seen + steps) as context:
            state = for_streams(self.kept, batch, self.seen)
            source = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
            for seq in seqs:
                if not self.lib.llama_state_seq_set_data(context, source, len(state), seq):
                    raise RuntimeError("llama.cpp did not take the saved state of a sequence")
            del source
            began = time.perf_counter()
            for i in range(steps):
                logits = self.feed(context, tokens, [self.seen + i] * batch, seqs, [True] * batch)
                tokens = [int(row.argmax()) for row in logits]
            return Decoded(time.perf_counter() - began, self.kv_bytes)

    def teacher_forced(self, tokens: np.ndarray, context: int) -> np.ndarray:
        """Prompt, then token by token."""
        rows = []
        with self.context(1, len(tokens)) as opened:
            self.prompt(opened, tokens[:context], 0)
            for i in range(context, len(tokens)):
                rows.append(self.feed(opened, [tokens[i]], [i], [0], [True])[0].copy())
        return log_softmax(rows)

    @contextmanager
    def context(self, requests: int, room: int) -> Iterator[Any]:
        """A context with `room` tokens for each request; freed at the end."""
        params = self.lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = (
            requests * -(-room // CELLS) * CELLS,
            requests,
            False,
        )
        params.n_batch, params.n_threads, params.n_threads_batch = (
            BATCH,
            self.place.threads,
            self.place.threads,
        )
        params.type_k = params.type_v = self.type
        params.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.kv_bytes = 0
        context = self.lib.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError(
                f"llama.cpp made no context for {requests} requests of {room} tokens"
            )
        try:
            yield context
        finally:
            self.lib.llama_free(context)

    def prompt(self, context: Any, tokens: np.ndarray, seq: int) -> np.ndarray:
        """Feed a prompt [N] in pieces; logits [vocab] of its last token."""
        logits = []
        for first in range(0, len(tokens), BATCH):
            part = tokens[first : first + BATCH]
            wanted = [first + i == len(tokens) - 1 for i in range(len(part))]
            logits = self.feed(
                context, part, range(first, first + len(part)), [seq] * len(part), wanted
            )
        return logits[-1]

    def feed(
        self,
        context: Any,
        tokens: Sequence[int] | np.ndarray,
        positions,
        seqs,
        wanted: Sequence[bool],
    ) -> list[np.ndarray]:
        """One call of llama.cpp; views of the logits [vocab] of the tokens that are `wanted`, good
        until the next call.
        """
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, seq, output) in enumerate(
            zip(tokens, positions, seqs, wanted, strict=True)
        ):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = (
                int(token),
                position,
                1,
                output,
            )
            batch.seq_id[i][0] = seq
        status = self.lib.llama_decode(context, batch)
        self.lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        at = [i for i, output in enumerate(wanted) if output]
        return [
            np.ctypeslib.as_array(self.lib.llama_get_logits_ith(context, i), (self.vocab,))
            for i in at
        ]

    def _logged(self, level: int, text: bytes, _: Any) -> None:
        """llama.cpp says how many bytes it has allocated in its log only."""
        if level == DEBUG:
            return
        line = text.decode(errors="replace")
        if match := KV_SIZE.search(line):
            self.kv_bytes += round(float(match[1]) * 2**20)
        sys.stderr.write(line)


def for_streams(state: bytes, streams: int, tokens: int) -> bytes:
    """The saved state of a sequence of `tokens`, made in a cache of one stream, as a cache of
    several streams writes it.

    After eight bytes come the number of streams and, for each, its number of cells and the cells;
    those of a sequence are in one stream.

    Raises:
        RuntimeError: the state is not of this form.
    """
    found = struct.unpack_from("<2I", state, 8)
    if found != (1, tokens):
        raise RuntimeError(
            f"a saved state of llama.cpp should have one stream of {tokens} cells, given {found}"
        )
    return (
        state[:8] + struct.pack("<I", streams) + state[12:] + struct.pack("<I", 0) * (streams - 1)
    )
