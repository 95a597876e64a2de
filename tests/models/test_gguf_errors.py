"""Every refusal of a GGUF file, by its message; one test a message. The tokenizer's are in
test_gguf_tokenizer.py.
"""

from pathlib import Path

import numpy as np
import pytest

from diffkv_jax.models import load_pretrained
from helpers_model import (
    gguf_metadata,
    gguf_tensors,
    tiny_config,
    tiny_tensors,
    write_gguf,
    write_model_gguf,
)

pytest.importorskip("gguf")


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    config = tiny_config("llama")
    return write_model_gguf(tmp_path / "model.gguf", config, tiny_tensors(config))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("fraction", [0.0001, 0.01, 0.02, 0.5, 0.999])
def test_truncated_gguf(gguf_file: Path, fraction: float) -> None:
    truncate(gguf_file, max(4, int(gguf_file.stat().st_size * fraction)))
    with pytest.raises(
        ValueError, match="model.gguf must be a complete GGUF file .*: copy or download it again"
    ):
        load_pretrained(gguf_file)


def test_corrupt_gguf_header(gguf_file: Path) -> None:
    data = bytearray(gguf_file.read_bytes())
    data[24:32] = b"\xff" * 8  # the length of the first key
    gguf_file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="model.gguf must be a complete GGUF file"):
        load_pretrained(gguf_file)


def test_gguf_without_tensors(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", "llama", gguf_metadata(tiny_config("llama")), {})
    with pytest.raises(ValueError, match="must hold a model's tensors, but it holds metadata only"):
        load_pretrained(path)


def test_gguf_quantization_type(tmp_path: Path) -> None:
    config = tiny_config("llama")
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    for key, value in gguf_metadata(config).items():
        add = (
            writer.add_string
            if isinstance(value, str)
            else writer.add_uint32
            if isinstance(value, int)
            else writer.add_float32
        )
        add(key, value)
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        writer.add_tensor(name, np.zeros((64, 64), np.int8), raw_dtype=GGMLQuantizationType.I8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        ValueError,
        match=r"must have one of the types .*, given \['I8'\] in "
        r"\['token_embd.weight', 'blk.0.attn_q.weight'\]",
    ):
        load_pretrained(tmp_path / "a.gguf")


def test_gguf_quantization_type_of_the_future(gguf_file: Path) -> None:
    data, name = bytearray(gguf_file.read_bytes()), b"output_norm.weight"
    at = data.index(name) + len(name)
    dims = int.from_bytes(data[at : at + 4], "little")
    data[at + 4 + 8 * dims : at + 8 + 8 * dims] = (9999).to_bytes(4, "little")
    gguf_file.write_bytes(bytes(data))
    with pytest.raises(
        ValueError, match="the installed gguf package does not know .*9999.*upgrade it"
    ):
        load_pretrained(gguf_file)


def test_gguf_architecture(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "a.gguf", "mamba", {}, {"token_embd.weight": np.zeros((4, 4), np.float32)}
    )
    with pytest.raises(
        ValueError,
        match="general.architecture must be one of .*, given 'mamba': use a model of one of these",
    ):
        load_pretrained(path)


def test_gguf_experts(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_model_gguf(
        tmp_path / "a.gguf", config, tiny_tensors(config), llama__expert_count=8
    )
    with pytest.raises(
        ValueError, match="llama.expert_count must be 0, given 8: use a dense model"
    ):
        load_pretrained(path)


def test_gguf_missing_key(tmp_path: Path) -> None:
    config = tiny_config("llama")
    metadata = gguf_metadata(config)
    del metadata["llama.block_count"]
    path = write_gguf(
        tmp_path / "a.gguf", "llama", metadata, gguf_tensors(config, tiny_tensors(config))
    )
    with pytest.raises(
        ValueError,
        match="must state 'llama.block_count' in its metadata: convert the model to GGUF again",
    ):
        load_pretrained(path)


def test_gguf_without_an_embedding(tmp_path: Path) -> None:
    metadata = gguf_metadata(tiny_config("llama"))
    path = write_gguf(
        tmp_path / "a.gguf", "llama", metadata, {"output_norm.weight": np.zeros(4, np.float32)}
    )
    with pytest.raises(ValueError, match="must hold the tensor 'token_embd.weight'"):
        load_pretrained(path)


def test_gguf_layers_that_differ(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_model_gguf(
        tmp_path / "a.gguf", config, tiny_tensors(config), llama__attention__head_count_kv=[2, 4]
    )
    with pytest.raises(
        ValueError,
        match=r"num_key_value_heads must be the same in every layer, "
        r"given \[2, 4\]",
    ):
        load_pretrained(path)


def test_gguf_window_pattern(tmp_path: Path) -> None:
    config = tiny_config("gemma3_text")
    path = write_model_gguf(
        tmp_path / "a.gguf",
        config,
        tiny_tensors(config),
        gemma3__attention__sliding_window_pattern=[True, False, True],
    )
    with pytest.raises(
        ValueError, match="gemma3.attention.sliding_window_pattern must be one integer"
    ):
        load_pretrained(path)


def test_gguf_rope_scaling(tmp_path: Path) -> None:
    config = tiny_config("llama")
    extra = {"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 4.0}
    path = write_model_gguf(tmp_path / "a.gguf", config, tiny_tensors(config), **extra)
    with pytest.raises(
        ValueError,
        match="llama.rope.scaling.type must be 'none', 'linear' or 'yarn', given 'longrope'",
    ):
        load_pretrained(path)


def test_gguf_rows_that_do_not_pair_up(tmp_path: Path) -> None:
    from diffkv_jax.models.gguf_source import split_rotary_halves

    with pytest.raises(
        ValueError,
        match="rows must be a multiple of 2 \\* num_heads, given 12 rows and num_heads=4",
    ):
        split_rotary_halves(np.zeros((12, 3)), 4)


def test_gguf_unused_and_missing(tmp_path: Path) -> None:
    config = tiny_config("llama")
    tensors = gguf_tensors(config, tiny_tensors(config))
    del tensors["output_norm.weight"]
    tensors["blk.0.attn_sinks.weight"] = tensors["v.patch_embd.weight"] = np.zeros(4, np.float32)
    path = write_gguf(tmp_path / "a.gguf", "llama", gguf_metadata(config), tensors)
    with pytest.raises(ValueError) as error:
        load_pretrained(path)
    assert "tensors that no parameter uses: blk.0.attn_sinks.weight, v.patch_embd.weight" in str(
        error.value
    )
    assert "parameters that no tensor fills: model.norm.weight" in str(error.value)
