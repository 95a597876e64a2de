"""The README's Python runs as it stands, but for the path of the model."""

import re
from pathlib import Path

import pytest

from helpers_model import smollm2_gguf_path

pytestmark = [pytest.mark.slow, pytest.mark.optimized]


def test_the_python_example_runs(capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    placeholder = "path/to/checkpoint-or-model.gguf"
    assert placeholder in code
    names: dict = {}
    exec(compile(code.replace(placeholder, str(smollm2_gguf_path())), "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "allocated" in printed
    assert names["out"].lengths.min() >= 1
    assert names["more"].cache.seq_len.min() > names["out"].lengths.min()
