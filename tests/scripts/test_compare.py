"""The table of all methods: what is compared, and that the documents say what was measured."""

import re
from pathlib import Path

import pytest

import diffkv_jax as dkv
from benchmarks.methods import compare, measure
from diffkv_jax.methods import METHODS
from diffkv_jax.methods.recipes import RECIPES

METHOD_OF = {  # pages about one method, which they do not name again
    "ada_kv": "Ada-KV(SnapKV)",
    "expected_attention": "ExpectedAttention",
    "h2o": "H2O",
    "key_difference": "KeyDiff",
    "key_norm": "L2 norm",
    "kvzip": "KVzip",
    "pyramidinfer": "PyramidInfer",
    "pyramidkv": "PyramidKV",
    "random_eviction": "random",
    "snapkv": "SnapKV",
    "streaming_llm": "StreamingLLM",
    "tova": "TOVA",
}
DOCS = Path(__file__).parent.parent.parent / "docs"


def measured() -> list[measure.Row]:
    return measure.in_order(measure.read(DOCS / "comparison" / "methods.csv"))


def test_every_method_and_recipe_is_compared(monkeypatch):
    def stem(policy: dkv.CompressionPolicy) -> str:
        return re.split(r"[-_]?\d", policy.name)[0]

    monkeypatch.setattr(compare, "smollm2_classes", lambda: dkv.TokenClasses((1,), (2,)))
    monkeypatch.setattr(compare, "smollm2_tokenizer", lambda: None)
    monkeypatch.setattr(dkv, "replay_words", lambda _: dkv.Replay())
    compared = compare.policies()
    assert {(row.method, row.target) for row in measured()} == set(compared)
    assert {stem(make()) for make in METHODS} <= {stem(policy) for policy in compared.values()}
    assert {make().tiers for make in RECIPES} <= {policy.tiers for policy in compared.values()}


def test_the_bytes_of_a_token():
    assert compare.size_of("K4V4") == pytest.approx((64 + 8 + 6) / 256)
    assert compare.size_of("full") == pytest.approx((256 + 6) / 256)


def test_the_front():
    assert compare.pareto([(0.5, 1.0), (0.2, 3.0), (0.3, 3.0), (0.4, 2.0), (0.6, 1.0)]) == [
        (0.2, 3.0),
        (0.4, 2.0),
        (0.5, 1.0),
    ]


def test_rows_survive_the_file(tmp_path):
    rows = [
        measure.Row("a, b", 0.5, 0.1, passkeys=3.0),
        measure.Row("c", None, 0.7, mean_kl=0.01),
    ]
    measure.write(tmp_path / "rows.csv", rows)
    assert list(measure.read(tmp_path / "rows.csv").values()) == rows
    assert measure.in_order({("c", None): rows[1], ("a, b", 0.5): rows[0]})[0] is rows[1]
    assert measure.markdown(rows, 10).splitlines()[2].startswith("| a, b | 0.5 | 0.100 |")


def test_the_documents_say_what_was_measured():
    table = measure.markdown(measured(), 10)
    assert table in (DOCS / "results.md").read_text(encoding="utf-8")


def said_of(method: str) -> str:
    """What a method's page says of its rows, the largest first."""
    rows = [row for row in measured() if row.method == method]
    columns = (
        [f"{100 * (row.of_bf16 or 0):.0f}" for row in rows],
        [f"{row.mean_kl:.3f}" for row in rows],
        ["–" if row.passkeys is None else f"{row.passkeys:.0f}" for row in rows],
    )
    return "{} % of bf16 bytes, KL {}, {} of 10 passkeys".format(*map(" / ".join, columns))


def test_every_page_says_what_was_measured():
    pages = {
        path.stem: " ".join(path.read_text(encoding="utf-8").split())
        for path in (DOCS / "methods").glob("*.md")
    }
    found = {
        page: re.findall(r"(?:\)\): |; )(?:([^:;[]+): )?([^:;[]+ passkeys)(?=[.;])", text)
        for page, text in pages.items()
    }
    assert (
        sum(map(len, found.values()))
        == sum(text.count("% of bf16 bytes") for text in pages.values())
        > 30
    )
    for page, statements in found.items():
        for method, said in statements:
            assert said == said_of(method or METHOD_OF[page]), (page, method)
