"""The Python of docs/quality.md, scale_and_limits.md, choosing_a_policy.md, fitting.md and
serving.md, with tiny models.
"""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.calibration.sample_text import SampleText
from diffkv_jax.testing.tiny import prompt, tiny_model
from helpers_tokenizer import tokenizer_folder

DOCS = Path(__file__).parent.parent / "docs"


def run(page: str, names: dict, given: str = "", shorter: str = "") -> None:
    """Execute a page's only block, with `shorter` in place of what it has `given`."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text("utf-8"), flags=re.DOTALL)
    assert given in code
    exec(compile(code.replace(given, shorter) if given else code, page, "exec"), names)


@pytest.mark.parametrize("package", ["diffkv_jax", "diffkv_jax.evaluation"])
def test_every_public_name_is_on_the_api_page(package):
    """But for methods, which have pages of their own."""
    source = Path(importlib.import_module(package).__file__ or "").read_text("utf-8")
    entries = re.findall(r"^::: (\S+)\.(\w+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE)
    public, listed = set(re.findall(r"(\w+) as \1\b", source)), {name for _, name in entries}
    assert public and public <= listed
    for module, name in entries:
        if name in public:
            assert hasattr(importlib.import_module(module), name), (module, name)


@pytest.mark.slow
def test_quality_of_a_text(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_text.txt").write_text("to be or not to be, that is the question " * 8)
    monkeypatch.chdir(tmp_path)
    model, params = tiny_model()

    def tokenizer(text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) % 97 for letter in text])

    names = {"model": model, "params": params, "tokenizer": tokenizer}
    run("quality.md", names, "2048, 256", "256, 16")
    printed = capsys.readouterr().out
    assert printed.count("mean KL") == 2
    assert names["found"].kl.shape == (1, 16) and names["found"].kl.mean() > 0
    kept = [float(x) for x in re.findall(r"(\d+)% of bf16", printed)]
    assert len(kept) == 2


def test_a_copy_of_a_cache_outlives_the_call():
    model, params = tiny_model()
    policy = dkv.snapkv(0.5, window=16, flush=8)
    names = {"dkv": dkv, "jax": jax, "jnp": jnp, "model": model, "params": params}
    names |= {"policy": policy, "prompt": prompt(200)}
    names |= {"question": prompt(9, 1), "another": prompt(9, 1)}
    run("scale_and_limits.md", names)
    np.testing.assert_array_equal(names["first"].tokens, names["second"].tokens)
    with pytest.raises(ValueError, match="was given to an earlier call"):
        dkv.generate(model, params, [prompt(9, 1)], cache=names["document"].cache)


@pytest.mark.slow
def test_a_calibrated_transform():
    model, params = tiny_model()
    names = {"dkv": dkv, "model": model, "params": params}
    names |= {"tokens": prompt(200, 1).tolist(), "prompt": prompt(200)}
    run("choosing_a_policy.md", names, "prompt], ", "prompt], max_new_tokens=3, ")
    assert names["out"].cache.policy.transform.parts[0].key_mean.shape == (2, 1, 64)


@pytest.mark.slow
def test_a_fitted_policy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, params = tiny_model()
    model = model.clone(text=SampleText(prompt(2400, 1), prompt(0)))
    names = {"dkv": dkv, "model": model, "params": params, "prompt": prompt(200)}
    run("fitting.md", names, "share=0.25, context=8192", "share=0.7, context=512")
    assert "mean KL" in capsys.readouterr().out
    assert (tmp_path / "my_policy" / "fitted_policy.json").is_file()
    assert names["out"].cache.policy.tiers == names["fitted"].policy.tiers
    assert names["fitted"].report.share <= 0.75 and names["fitted"].report.context == 512


@pytest.mark.slow
def test_many_requests_at_once(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder(tmp_path))
    model, params = tiny_model(vocab=len(tokenizer))
    policy = dkv.diffkv(queries=32)
    names = {"dkv": dkv, "model": model, "params": params, "policy": policy}
    names["tokenizer"] = tokenizer
    run("serving.md", names, "256MiB", "64MiB")
    assert capsys.readouterr().out.startswith("0 ")
    assert {request.finish_reason for request in names["asked"]} <= {"length", "stop", "eos"}
    assert len(names["asked"][1].logprobs) == len(names["asked"][1].tokens) > 0
