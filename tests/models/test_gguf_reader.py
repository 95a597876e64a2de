"""Metadata whose arrays are read whole: what gguf's own reader says, and in seconds."""

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
from diffkv_jax.models.gguf_file import GGUFFile  # noqa: E402
from diffkv_jax.models.gguf_reader import WholeArrays  # noqa: E402

NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9


def packed(order: str, kind: int, value: Any) -> bytes:
    """`value` as a GGUF file has it; an array is (type of its items, list)."""
    if kind == STRING:
        return struct.pack(f"{order}Q", len(value)) + value
    if kind == ARRAY:
        item, values = value
        head = struct.pack(f"{order}IQ", item, len(values))
        return head + b"".join(packed(order, item, v) for v in values)
    return struct.pack(order + NUMBERS[kind], value)


def header(path: Path, order: str, fields: dict[str, tuple[int, Any]]) -> Path:
    """A GGUF file of metadata only, as bytes: gguf's writer has no empty arrays."""
    data = b"GGUF" + struct.pack(f"{order}IQQ", 3, 0, len(fields))
    for key, (kind, value) in fields.items():
        data += packed(order, STRING, key.encode()) + struct.pack(f"{order}I", kind)
        data += packed(order, kind, value)
    path.write_bytes(data)
    return path


FIELDS: dict[str, tuple[int, Any]] = {
    "text": (STRING, "größer 你好".encode()),
    "number": (4, 7),
    **{f"of {code}": (ARRAY, (kind, [1, 0, 1])) for kind, code in NUMBERS.items()},
    "negative": (ARRAY, (5, [-1, -(2**31), 2**31 - 1])),
    "large": (ARRAY, (10, [2**64 - 1, 0])),
    "strings": (ARRAY, (STRING, ["▁a".encode(), b"", b"a b", b"\x00"])),
    **{f"empty {kind}": (ARRAY, (kind, [])) for kind in (*NUMBERS, STRING, ARRAY)},
    "nested": (ARRAY, (ARRAY, [(5, [1, 2]), (5, []), (5, [3])])),
    "nested strings": (ARRAY, (ARRAY, [(STRING, [b"a", b"bc"]), (STRING, [b"d"])])),
    "nested, the first empty": (ARRAY, (ARRAY, [(5, []), (5, [1])])),
    "twice nested": (ARRAY, (ARRAY, [(ARRAY, [(4, [1]), (4, [2, 3])])])),
    "last": (STRING, b"end"),
}


def contents(reader: Any) -> dict[str, Any]:
    return {key: (field.types, field.contents()) for key, field in reader.fields.items()}


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_contents_are_gguf_s_own(tmp_path: Path, order: str) -> None:
    path = header(tmp_path / "a.gguf", order, FIELDS)
    ours, theirs = contents(WholeArrays(path)), contents(gguf.GGUFReader(path))
    assert ours == theirs and list(ours) == list(theirs)
    assert ours["nested strings"][1] == ["a", "bc", "d"] and ours["last"][1] == "end"
    for key in ("strings", "of H", "twice nested"):  # the comparison can fail
        kind, (item, values) = FIELDS[key]
        other = header(
            tmp_path / "b.gguf", order, FIELDS | {key: (kind, (item, values[::-1][:-1]))}
        )
        assert contents(WholeArrays(other)) != theirs


@pytest.mark.parametrize("big_endian", [False, True])
def test_what_gguf_writes(tmp_path: Path, big_endian: bool) -> None:
    """The same with tensors behind the metadata, whose place depends on its length."""
    endian = gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(str(path), "llama", endianess=endian)
    writer.add_token_list(["<s>", "▁the", "e"])
    writer.add_token_scores([0.0, -1.5, -2.0])
    writer.add_array("llama.attention.sliding_window_pattern", [True, False])
    writer.add_tensor("x", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = WholeArrays(path), gguf.GGUFReader(path)
    assert contents(ours) == contents(theirs)
    np.testing.assert_array_equal(ours.tensors[0].data, np.arange(12).reshape(3, 4))
    if big_endian:  # dequantize takes the bytes of any type for this machine's
        with pytest.raises(ValueError, match="must have this machine's byte order, little-endian"):
            GGUFFile(path)
    else:
        np.testing.assert_array_equal(GGUFFile(path).read("x"), np.arange(12).reshape(3, 4))


def test_a_vocabulary_of_262144(tmp_path: Path) -> None:
    """At most 3 s of one processor; gguf's own reader takes 10 s and more."""
    tokens = [f"▁token {i}" for i in range(262_144)]
    merges, scores = [f"a {i}" for i in range(262_144)], np.arange(262_144.0).tolist()
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_scores(scores)
    writer.add_token_types([1] * len(tokens))
    writer.add_tensor("x", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    began = time.process_time()
    metadata = GGUFFile(path).metadata
    assert time.process_time() - began < 3
    assert metadata["tokenizer.ggml.tokens"] == tokens
    assert metadata["tokenizer.ggml.merges"] == merges
    assert metadata["tokenizer.ggml.scores"] == scores
    assert metadata["tokenizer.ggml.token_type"] == [1] * len(tokens)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("key", ["strings", "of H", "of d", "nested", "nested strings"])
@pytest.mark.parametrize("damage", ["count", "cut", "length"])
def test_damaged_arrays(tmp_path: Path, order: str, key: str, damage: str) -> None:
    """A count or a length that is far too high, or a file that ends within: an error at once.
    gguf's own reader counts to 2**60 where the items are numbers.
    """
    path = header(tmp_path / "a.gguf", order, {key: FIELDS[key]})
    data, start = path.read_bytes(), 24 + 8 + len(key) + 4
    if damage == "cut":
        path.write_bytes(data[:-1])
    else:
        at = start + (4 if damage == "count" or "strings" != key else 12)
        path.write_bytes(data[:at] + struct.pack(f"{order}Q", 2**60) + data[at + 8 :])
    with pytest.raises(
        ValueError, match="a.gguf must be a complete GGUF file .*: copy or download"
    ):
        GGUFFile(path)


def test_damaged_text(tmp_path: Path) -> None:
    path = header(tmp_path / "a.gguf", "<", {"tokens": (ARRAY, (STRING, [b"a", b"\xff"]))})
    with pytest.raises(ValueError, match=r"must be a complete GGUF file \(UnicodeDecodeError"):
        GGUFFile(path)


def test_what_is_overridden_exists() -> None:
    """Another version of gguf with other names would be read right, but slowly."""
    import inspect

    assert list(inspect.signature(gguf.GGUFReader._get_field_parts).parameters) == [
        "self",
        "orig_offs",
        "raw_type",
    ]
    assert "offset" in inspect.signature(gguf.GGUFReader._get).parameters
