"""The README's Python runs as it stands, but for the path of the model, and compresses."""

import re
from pathlib import Path

import pytest

import diffkv_jax as dkv
from helpers_model import smollm2_gguf_path

pytestmark = [pytest.mark.slow, pytest.mark.optimized]


def test_the_python_examples_run_and_compress(capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    placeholder, names = "path/to/checkpoint-or-model.gguf", {}
    assert placeholder in blocks[0]
    for number, code in enumerate(blocks):
        code = code.replace(placeholder, str(smollm2_gguf_path()))
        exec(compile(code, f"README.md, block {number}", "exec"), names)
        if number == 0:
            report = dkv.memory_report(names["more"].cache)
    printed = capsys.readouterr().out
    assert "allocated" in printed
    assert len(names["prompt"]) >= 1000
    assert report.allocated < 0.5 * report.bf16
    assert names["out"].lengths.min() >= 1 and names["two"].lengths.min() >= 1
    assert (
        names["more"].cache.counters.seq_len.min()
        > len(names["prompt"]) + names["out"].lengths.min()
    )
