"""GGUF files: block decoding against decoders written from the format's description, and whole
models against safetensors.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffkv_jax.models import config_from_hf, load_pretrained
from diffkv_jax.models.names import flatten
from helpers_model import (
    FAMILIES,
    gguf_metadata,
    gguf_tensors,
    interleave_rotary,
    same_trees,
    tiny_config,
    tiny_tensors,
    transformers_from_gguf,
    write_folder,
    write_gguf,
    write_model_gguf,
)

gguf = pytest.importorskip("gguf")
from diffkv_jax.models.gguf_config import config_from_gguf  # noqa: E402
from diffkv_jax.models.gguf_file import GGUFFile  # noqa: E402
from diffkv_jax.models.gguf_source import split_rotary_halves  # noqa: E402

Decoder = Callable[[bytes], list[float]]


def half(data: bytes) -> float:
    return float(np.frombuffer(data, "<f2")[0])


def decode_q8_0(block: bytes) -> list[float]:
    return [half(block[:2]) * q for q in np.frombuffer(block[2:], np.int8).tolist()]


def decode_q4_0(block: bytes) -> list[float]:
    """Low nibbles are the first 16 values, high nibbles the last 16, less 8."""
    d, q = half(block[:2]), block[2:]
    return [d * ((b & 15) - 8) for b in q] + [d * ((b >> 4) - 8) for b in q]


def decode_q4_1(block: bytes) -> list[float]:
    d, m, q = half(block[:2]), half(block[2:4]), block[4:]
    return [d * (b & 15) + m for b in q] + [d * (b >> 4) + m for b in q]


def six_bit_pairs(s: bytes) -> list[tuple[int, int]]:
    """The eight (scale, min) pairs of Q4_K and Q5_K, six bits each in twelve bytes."""
    first = [(s[j] & 63, s[j + 4] & 63) for j in range(4)]
    last = [
        ((s[j + 8] & 15) | (s[j] >> 6) << 4, (s[j + 8] >> 4) | (s[j + 4] >> 6) << 4)
        for j in range(4)
    ]
    return first + last


def decode_q4_k(block: bytes) -> list[float]:
    d, dmin, pairs, q = half(block[:2]), half(block[2:4]), six_bit_pairs(block[4:16]), block[16:]
    out = []
    for group, (scale, low) in enumerate(pairs):
        for b in q[32 * (group // 2) : 32 * (group // 2) + 32]:
            out.append(d * scale * (b >> 4 if group % 2 else b & 15) - dmin * low)
    return out


def decode_q5_k(block: bytes) -> list[float]:
    d, dmin, pairs, high, q = (
        half(block[:2]),
        half(block[2:4]),
        six_bit_pairs(block[4:16]),
        block[16:48],
        block[48:],
    )
    out = []
    for group, (scale, low) in enumerate(pairs):
        for i, b in enumerate(q[32 * (group // 2) : 32 * (group // 2) + 32]):
            value = (b >> 4 if group % 2 else b & 15) + 16 * (high[i] >> group & 1)
            out.append(d * scale * value - dmin * low)
    return out


def decode_q6_k(block: bytes) -> list[float]:
    low, high, scales, d = (
        block[:128],
        block[128:192],
        np.frombuffer(block[192:208], np.int8).tolist(),
        half(block[208:]),
    )
    out = []
    for n in range(256):
        part, i = divmod(n, 128)
        quarter, lane = divmod(i, 32)
        nibble = low[64 * part + 32 * (quarter % 2) + lane]
        nibble = nibble >> 4 if quarter >= 2 else nibble & 15
        value = (nibble | (high[32 * part + lane] >> 2 * quarter & 3) << 4) - 32
        out.append(d * scales[n // 16] * value)
    return out


# type: (bytes a block, offsets of its float16 fields, decoder)
BLOCKS: dict[str, tuple[int, tuple[int, ...], Decoder]] = {
    "Q8_0": (34, (0,), decode_q8_0),
    "Q4_0": (18, (0,), decode_q4_0),
    "Q4_1": (20, (0, 2), decode_q4_1),
    "Q4_K": (144, (0, 2), decode_q4_k),
    "Q5_K": (176, (0, 2), decode_q5_k),
    "Q6_K": (210, (208,), decode_q6_k),
}


def random_blocks(kind: str, rows: int = 3, blocks: int = 2) -> np.ndarray:
    """Random bytes with sane float16 fields, uint8 [rows, blocks * block bytes]."""
    size, halves, _ = BLOCKS[kind]
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, size=(rows, blocks, size), dtype=np.uint8)
    for offset in halves:
        data[:, :, offset : offset + 2] = (
            rng.uniform(-0.1, 0.1, size=(rows, blocks, 1)).astype("<f2").view(np.uint8)
        )
    return data.reshape(rows, blocks * size)


def write_raw(path: Path, data: np.ndarray, kind: str) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("x", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_decoding(tmp_path: Path, kind: str) -> None:
    data = random_blocks(kind)
    read = GGUFFile(write_raw(tmp_path / "x.gguf", data, kind)).read("x")
    size, _, decode = BLOCKS[kind]
    expected = np.array(
        [
            [v for at in range(0, row.size, size) for v in decode(row[at : at + size].tobytes())]
            for row in data
        ]
    )
    assert read.dtype == np.float32 and read.shape == expected.shape
    np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(read, expected[:, ::-1], rtol=1e-3, atol=1e-3)  # the comparison can fail


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_types(tmp_path: Path, kind: str) -> None:
    # exact in all three
    value = np.random.default_rng(0).integers(-100, 100, size=(3, 64)).astype(np.float32) / 64
    path = write_gguf(tmp_path / "x.gguf", "llama", {}, {"x": value}, kind)
    np.testing.assert_array_equal(GGUFFile(path).read("x"), value)


def test_rotary_rows_by_hand() -> None:
    # GGUF order: pairs (0, 1), (2, 3), (4, 5)
    one_head = np.array([[0.0], [1], [2], [3], [4], [5]])
    assert split_rotary_halves(one_head, 1)[:, 0].tolist() == [0, 2, 4, 1, 3, 5]
    bias = np.arange(8.0)
    assert split_rotary_halves(bias, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    value = np.random.default_rng(0).normal(size=(48, 5))
    assert not np.array_equal(interleave_rotary(value, 3), value)
    np.testing.assert_array_equal(split_rotary_halves(interleave_rotary(value, 3), 3), value)


@pytest.mark.parametrize("family", [*FAMILIES, "llama with biases"])
def test_a_gguf_model_equals_its_safetensors(tmp_path: Path, family: str) -> None:
    config = tiny_config(
        family.split()[0], **({"attention_bias": True} if "biases" in family else {})
    )
    tensors = tiny_tensors(config)
    expected = load_pretrained(write_folder(tmp_path / "folder", config, tensors))
    loaded = load_pretrained(write_model_gguf(tmp_path / "model.gguf", config, tensors))
    assert loaded.model == expected.model
    assert same_trees(loaded.params, expected.params)


def test_quantized_weights_are_the_decoded_ones(tmp_path: Path) -> None:
    config = tiny_config("qwen3")
    tensors = tiny_tensors(config)
    params = load_pretrained(
        write_model_gguf(tmp_path / "model.gguf", config, tensors, "Q8_0"), "float32"
    ).params
    path, name = ("layers", "mlp", "up_proj", "kernel"), "model.layers.1.mlp.up_proj.weight"
    stored = gguf.quants.quantize(tensors[name], gguf.GGMLQuantizationType.Q8_0)
    decoded = [
        [v for at in range(0, row.size, 34) for v in decode_q8_0(row[at : at + 34].tobytes())]
        for row in stored
    ]
    np.testing.assert_allclose(np.asarray(flatten(params)[path][1]).T, decoded, rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_transformers_reads_the_same_gguf_the_same_way(tmp_path: Path, family: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = tiny_config(family)
    # where it takes the vocabulary's size from
    tokens = {"tokenizer__ggml__tokens": [f"t{i}" for i in range(config["vocab_size"])]}
    path = write_model_gguf(tmp_path / "model.gguf", config, tiny_tensors(config), "Q8_0", **tokens)
    # It does not read Qwen3's head_dim or Gemma 3's scale, and keeps the epsilon's float32 rounding
    # (9.999999747378752e-06).
    unread = {
        key: config[key]
        for key in ("head_dim", "rms_norm_eps", "query_pre_attn_scalar")
        if key in config
    }
    transformers_from_gguf(path, **unread).save_pretrained(tmp_path / "again")
    ours, theirs = load_pretrained(path, "float32"), load_pretrained(tmp_path / "again")
    assert same_trees(ours.params, theirs.params)
    assert ours.model.config == theirs.model.config


def divisors(count: int, theta: float, factor: float, original: int) -> np.ndarray:
    """Llama 3.1's rule, one frequency at a time, as llama.cpp's converter writes it."""
    out = []
    for i in range(count):
        wavelength = 2 * np.pi * theta ** (i / count)
        if wavelength < original / 4:
            out.append(1.0)
        elif wavelength > original:
            out.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / 3.0
            out.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def with_rope_freqs(path: Path, values: np.ndarray, **changes: Any) -> Path:
    config = tiny_config("llama", **changes)
    tensors = gguf_tensors(config, tiny_tensors(config)) | {"rope_freqs.weight": values}
    return write_gguf(path, "llama", gguf_metadata(config), tensors)


def test_llama3_rope_scaling_is_recovered(tmp_path: Path) -> None:
    path = with_rope_freqs(
        tmp_path / "a.gguf", divisors(8, 500000.0, 32.0, 8192), rope_theta=500000.0
    )
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert config_from_gguf(GGUFFile(path))["rope_scaling"] == scaling
    expected = config_from_hf(tiny_config("llama", rope_theta=500000.0, rope_scaling=scaling))
    assert load_pretrained(path).model.config == expected
    plain = with_rope_freqs(tmp_path / "b.gguf", np.ones(8, np.float32))
    assert config_from_gguf(GGUFFile(plain))["rope_scaling"] is None
    other = with_rope_freqs(
        tmp_path / "c.gguf", divisors(8, 500000.0, 32.0, 4096), rope_theta=500000.0
    )
    with pytest.raises(
        ValueError, match="the divisors in rope_freqs.weight must be those of Llama 3 rope scaling"
    ):
        load_pretrained(other)


def test_linear_rope_scaling(tmp_path: Path) -> None:
    config = tiny_config("gemma3_text")
    extra = {"gemma3__rope__scaling__type": "linear", "gemma3__rope__scaling__factor": 8.0}
    loaded = load_pretrained(
        write_model_gguf(tmp_path / "a.gguf", config, tiny_tensors(config), **extra)
    ).model.config
    assert loaded == config_from_hf(
        config | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    )
    assert loaded.rope_scaling is not None and loaded.rope_scaling.factor == 8.0


def test_generation_config_lists_every_end_token(tmp_path: Path) -> None:
    from diffkv_jax.models.gguf_source import GGUFSource

    config = tiny_config("llama")
    extra: Any = {
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__eot_token_id": 5,
    }
    source = GGUFSource(
        write_model_gguf(tmp_path / "a.gguf", config, tiny_tensors(config), **extra)
    )
    assert source.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 5]}
