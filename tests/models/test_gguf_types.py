"""Every quantization type that the installed `gguf` package decodes, alone and through
`load_pretrained`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffkv_jax.models import load_pretrained
from diffkv_jax.models.names import flatten
from helpers_model import gguf_metadata, gguf_tensors, tiny_config, tiny_tensors, write_model_gguf

gguf = pytest.importorskip("gguf")
from diffkv_jax.models.gguf_file import GGUFFile, can_decode  # noqa: E402

KINDS = [kind for kind in gguf.GGMLQuantizationType if can_decode(kind)]
PLAIN = ("F32", "F16", "BF16")
WIDTH = 256  # a whole super-block
CONFIG = tiny_config(
    "llama",
    hidden_size=WIDTH,
    intermediate_size=WIDTH,
    head_dim=64,
    num_hidden_layers=1,
    vocab_size=32,
)


def random_rows(kind: Any, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Random bytes as `rows` rows of WIDTH values, redrawn until every value is finite and below
    1e4; uint8 [rows, bytes].
    """
    block, size = gguf.GGML_QUANT_SIZES[kind]
    kept = np.zeros((0, WIDTH // block * size), np.uint8)
    while len(kept) < rows:
        data = rng.integers(0, 256, (4 * rows, WIDTH // block * size), dtype=np.uint8)
        if kind.name == "MXFP4":
            # the exponent: random ones are mostly huge
            data[:, ::size] = rng.integers(118, 132, data[:, ::size].shape)
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(data, kind)
        # a NaN is not below either
        kept = np.concatenate([kept, data[(np.abs(values) < 1e4).all(axis=1)]])
    return kept[:rows]


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Any]]) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in gguf_metadata(CONFIG).items():
        add = (
            writer.add_string
            if isinstance(value, str)
            else writer.add_uint32
            if isinstance(value, int)
            else writer.add_float32
        )
        add(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_types_are_those_of_the_package() -> None:
    """What dequantize says for itself, type by type."""
    for kind in gguf.GGMLQuantizationType:
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        if kind in KINDS:
            assert gguf.quants.dequantize(block, kind).dtype == np.float32
        else:
            with pytest.raises(NotImplementedError):
                gguf.quants.dequantize(block, kind)
    names = {kind.name for kind in KINDS}
    assert {
        *PLAIN,
        "Q5_0",
        "Q5_1",
        "Q2_K",
        "Q3_K",
        "IQ4_NL",
        "IQ4_XS",
        "Q4_0",
        "Q6_K",
        "Q8_0",
    } <= names
    assert not {"I8", "F64"} & names


@pytest.mark.daily(5)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_model_of_this_type(tmp_path: Path, kind: Any) -> None:
    rng = np.random.default_rng(int(kind))
    tensors = gguf_tensors(CONFIG, tiny_tensors(CONFIG))
    stored: dict[str, tuple[np.ndarray, Any]] = {}
    for name, value in tensors.items():
        plain = value.ndim == 1 or kind.name in PLAIN
        encoded = kind if value.ndim == 2 else gguf.GGMLQuantizationType.F32
        stored[name] = (
            gguf.quants.quantize(value, encoded) if plain else random_rows(kind, len(value), rng),
            encoded,
        )
    path = write(tmp_path / "a.gguf", stored)
    params = flatten(load_pretrained(path, "float32").params)
    data, _ = stored["blk.0.ffn_down.weight"]
    expected = gguf.quants.dequantize(data, kind)
    got = np.asarray(params["layers", "mlp", "down_proj", "kernel"][0]).T
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == np.float32 and np.isfinite(got).all() and got.std() > 0
    up = gguf.quants.dequantize(stored["blk.0.ffn_up.weight"][0], kind)
    assert not np.array_equal(up, expected)  # the comparison can fail
    np.testing.assert_array_equal(
        np.asarray(params["embed_tokens", "embedding"]), GGUFFile(path).read("token_embd.weight")
    )


def decode_q5_0(block: bytes) -> list[float]:
    """float16 scale, 32 high bits, then nibbles: the low ones are the first 16 values; less 16."""
    scale, high = float(np.frombuffer(block[:2], "<f2")[0]), int.from_bytes(block[2:6], "little")
    nibbles = [b & 15 for b in block[6:]] + [b >> 4 for b in block[6:]]
    return [scale * ((nibble | (high >> i & 1) << 4) - 16) for i, nibble in enumerate(nibbles)]


def decode_iq4_nl(block: bytes) -> list[float]:
    table = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    scale = float(np.frombuffer(block[:2], "<f2")[0])
    return [scale * table[b & 15] for b in block[2:]] + [scale * table[b >> 4] for b in block[2:]]


@pytest.mark.parametrize(
    ("kind", "decode", "size"), [("Q5_0", decode_q5_0, 22), ("IQ4_NL", decode_iq4_nl, 18)]
)
def test_by_hand(tmp_path: Path, kind: str, decode: Any, size: int) -> None:
    """Two of them against decoders from the format's description."""
    encoded = gguf.GGMLQuantizationType[kind]
    data = random_rows(encoded, 3, np.random.default_rng(7))
    expected = [
        [v for at in range(0, row.size, size) for v in decode(row[at : at + size].tobytes())]
        for row in data
    ]
    got = GGUFFile(write(tmp_path / "a.gguf", {"x": (data, encoded)})).read("x")
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert np.std(got) > 0


def test_q5_0_close_to_the_weights(tmp_path: Path) -> None:
    """What the package itself stores as Q5_0 comes back within half a step, a sixteenth of a
    block's largest value.
    """
    tensors = tiny_tensors(CONFIG)
    params = flatten(
        load_pretrained(
            write_model_gguf(tmp_path / "a.gguf", CONFIG, tensors, "Q5_0"), "float32"
        ).params
    )
    wanted = tensors["model.layers.0.mlp.up_proj.weight"]
    got = np.asarray(params["layers", "mlp", "up_proj", "kernel"][0]).T
    step = np.abs(wanted).reshape(-1, 32).max(axis=1) / 16
    error = np.abs(got - wanted).reshape(-1, 32).max(axis=1)
    assert (error <= 1.01 * step).all() and error.max() > 0
