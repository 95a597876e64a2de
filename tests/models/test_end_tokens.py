"""End tokens of a loaded model: Hugging Face's two files, GGUF's keys and texts, and saved
checkpoints.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from diffkv_jax.models import build_model, config_from_hf, load_pretrained
from diffkv_jax.models.load import convert_pretrained
from helpers_model import FAMILIES, tiny_config, tiny_tensors, write_folder, write_model_gguf

pytest.importorskip("safetensors")
pytest.importorskip("gguf")


def folder(path: Path, generation: Any = None, family: str = "llama", **config: Any) -> Path:
    raw = tiny_config(family, **config)
    write_folder(path, raw, tiny_tensors(raw))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, ()),
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [9, 3, 9]}, None, (9, 3)),
        # as Gemma's <eos> and <end_of_turn>
        ({"eos_token_id": 2}, {"eos_token_id": [1, 106]}, (1, 106)),
        ({"eos_token_id": 2}, {"eos_token_id": 7}, (7,)),
        ({"eos_token_id": 2}, {"eos_token_id": []}, ()),
        ({"eos_token_id": 2}, {"temperature": 0.6}, (2,)),
        ({}, {"eos_token_id": [0, 159]}, (0, 159)),
        ({"eos_token_id": 10**9}, {"eos_token_id": 1}, (1,)),  # not the one that is used
    ],
)
def test_hugging_face(
    tmp_path: Path, config: Any, generation: Any, expected: tuple[int, ...]
) -> None:
    model = load_pretrained(folder(tmp_path / "a", generation, **config)).model
    assert model.stop_token_ids == model.config.stop_token_ids == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_its_checkpoint(tmp_path: Path, family: str) -> None:
    source = folder(tmp_path / "a", {"eos_token_id": [5, 1]}, family, eos_token_id=1)
    convert_pretrained(source, tmp_path / "out")
    assert (
        load_pretrained(source).model.stop_token_ids
        == load_pretrained(tmp_path / "out").model.stop_token_ids
        == (5, 1)
    )


def test_a_multimodal_config_has_them_outside_or_inside() -> None:
    text = tiny_config("gemma3_text")
    for raw, expected in (
        ({"eos_token_id": [1, 106]}, (1, 106)),
        ({"text_config": text | {"eos_token_id": 3}}, (3,)),
        ({"eos_token_id": [1, 106], "text_config": text | {"eos_token_id": 3}}, (1, 106)),
    ):
        assert (
            config_from_hf({"model_type": "gemma3", "text_config": text} | raw).stop_token_ids
            == expected
        )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            160,
            "stop_token_ids=.160,. must be ids of the vocabulary, .* vocab_size - 1 = 159, "
            "found 160",
        ),
        ([2, -1], "must be ids of the vocabulary, .* found -1"),
        ("2", "eos_token_id='2' must be a token id or a list of token ids"),
        ([2, 3.0], "must be a token id or a list"),
        (True, "eos_token_id=True must be a token id"),
    ],
)
def test_what_is_no_token(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder(tmp_path / "a", eos_token_id=value))
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder(tmp_path / "b", {"eos_token_id": value}, eos_token_id=1))


def gguf(path: Path, **keys: Any) -> Path:
    config = tiny_config("llama")
    return write_model_gguf(
        path,
        config,
        tiny_tensors(config),
        **{f"tokenizer__ggml__{key}": value for key, value in keys.items()},
    )


def tokens(**named: str) -> list[str]:
    """160 tokens, with some texts at "t<id>"."""
    return [named.get(f"t{i}", f"<{i}>") for i in range(160)]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, ()),
        ({"eos_token_id": 4}, (4,)),
        ({"eos_token_id": 4, "eot_token_id": 3}, (3, 4)),
        ({"eos_token_id": 4, "eot_token_id": 4, "eom_token_id": 9}, (4, 9)),
        ({"eot_token_id": 6}, (6,)),
        ({"eos_token_id": 1, "tokens": tokens(t106="<end_of_turn>", t44="</s>")}, (1, 106)),
        (
            {
                "eos_token_id": 7,
                "tokens": tokens(t5="<|eot_id|>", t6="<|eom_id|>", t7="<|end_of_text|>"),
            },
            (5, 6, 7),
        ),
        ({"tokens": tokens(t2="<|im_end|>", t0="<|endoftext|>")}, (0, 2)),
        ({"tokens": tokens(t2="im_end", t3="<|im_start|>")}, ()),
    ],
)
def test_gguf_keys_and_texts(tmp_path: Path, keys: Any, expected: tuple[int, ...]) -> None:
    path = gguf(tmp_path / "a.gguf", **keys)
    assert load_pretrained(path).model.stop_token_ids == expected
    convert_pretrained(path, tmp_path / "out")
    assert load_pretrained(tmp_path / "out").model.stop_token_ids == expected


@pytest.mark.parametrize("key", ["eos_token_id", "eot_token_id", "eom_token_id"])
@pytest.mark.parametrize("value", [160, 2**32 - 1])
def test_a_gguf_id_outside_the_vocabulary(tmp_path: Path, key: str, value: int) -> None:
    with pytest.raises(
        ValueError,
        match=f"must be ids of the vocabulary, .* found {value}; "
        f".*tokenizer.ggml.eos_token_id, eot_ and eom_",
    ):
        load_pretrained(gguf(tmp_path / "a.gguf", **{key: value}))


def test_a_checkpoint_from_before_the_field(tmp_path: Path) -> None:
    convert_pretrained(folder(tmp_path / "a"), tmp_path / "out")
    assert load_pretrained(tmp_path / "out").model.stop_token_ids == ()


def test_they_do_not_tell_models_apart_for_jit() -> None:
    config = config_from_hf(tiny_config("llama"))
    other = dataclasses.replace(config, stop_token_ids=(1, 2))
    assert (
        config == other
        and hash(config) == hash(other)
        and build_model(config) == build_model(other)
    )
    assert build_model(other).stop_token_ids == (1, 2)
    traced: list[Any] = []
    run = jax.jit(lambda x, model: traced.append(model) or x, static_argnums=1)
    run(1.0, build_model(config))
    run(1.0, build_model(other))
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("ids", "kind"),
    [([1, 2], TypeError), ((1, 1), ValueError), ((1.0,), ValueError), ((160,), ValueError)],
)
def test_a_config_by_hand(ids: Any, kind: type[Exception]) -> None:
    config = config_from_hf(tiny_config("llama"))
    with pytest.raises(kind, match="stop_token_ids"):
        dataclasses.replace(config, stop_token_ids=ids)


@pytest.mark.parametrize("listed", [True, False])
def test_what_transformers_generates_with(tmp_path: Path, listed: bool) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = folder(tmp_path / "a", {"eos_token_id": [9, 4]} if listed else None, eos_token_id=6)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path
    ).generation_config.eos_token_id
    reference = reference if isinstance(reference, list) else [reference]
    assert list(load_pretrained(path).model.stop_token_ids) == reference
