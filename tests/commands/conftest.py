"""A tiny model in a folder, with a tokenizer and a chat template."""

import pytest
from typer.testing import CliRunner, Result

from diffkv_jax.commands.app import app
from helpers_model import tiny_config, tiny_tensors, write_folder
from helpers_tokenizer import loaded_once, tokenizer_folder

EXACT = "diffkv(1, 0, window=16, flush=8, transform=Exact())"  # which learns nothing


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    pytest.importorskip("safetensors")
    config = tiny_config("llama", vocab_size=300, max_position_embeddings=2048)
    folder = write_folder(tmp_path_factory.mktemp("model"), config, tiny_tensors(config))
    return str(tokenizer_folder(folder))


@pytest.fixture
def diffkv(model, monkeypatch):
    """`diffkv(command, *arguments)` of that model."""

    monkeypatch.setattr("diffkv_jax.models.load_pretrained", loaded_once)

    def run(command: str, *arguments: object, policy: str | None = EXACT, **options) -> Result:
        chosen = [] if policy is None else ["--policy", policy]
        given = [command, model, *map(str, arguments), *chosen]
        return CliRunner().invoke(app, given, **options)

    return run
