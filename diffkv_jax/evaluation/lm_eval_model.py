"""`CompressedLM`: any task of EleutherAI's lm-eval on a compressed cache.

    from diffkv_jax.evaluation.lm_eval_model import CompressedLM
    lm_eval.simple_evaluate(CompressedLM(model, params, tokenizer, policy), tasks=["hellaswag"])

Needs the package lm-eval (extra `eval`); nothing else of the library imports this module.
"""

import importlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np
from tqdm import tqdm

from diffkv_jax.arguments import integer, refuse
from diffkv_jax.evaluation.answers import RunOptions, answers, encoded
from diffkv_jax.evaluation.forcing import teacher_forced
from diffkv_jax.inputs import as_policy
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy

try:
    LM: Any = importlib.import_module("lm_eval.api.model").LM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"CompressedLM needs lm-eval ({error}): pip install 'diffkv-jax[eval]'"
    ) from error


class CompressedLM(LM):
    """What lm-eval asks of a model, through a cache that compresses.

    A context is read as a prompt and compressed; what is scored after it is fed one token at a
    time, as in `generate`, while the cache goes on compressing. Greedy only.
    """

    def __init__(
        self,
        model: CausalLM,
        params: Any,
        tokenizer: Any,
        policy: CompressionPolicy | str | None = None,
        *,
        max_gen_toks: int = 256,
        **options: Unpack[RunOptions],
    ):
        """`max_gen_toks` is for tasks that do not say; the other arguments are those of
        `evaluation.answers`.
        """
        super().__init__()
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self.policy = as_policy(policy)
        self.max_gen_toks = integer("max_gen_toks", max_gen_toks, least=1)
        self.options = options
        self.limit = model.attention.max_position_embeddings

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would say it) of each continuation."""
        found = []
        for request in self._bar(requests, "loglikelihood"):
            context, continuation = self._pair(*request.args)
            found.append(self._scored(context, continuation))
            self.cache_hook.add_partial("loglikelihood", request.args, found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each text, fed one token at a time from its first on. Texts longer
        than the model's context go in windows of it, each behind one token of the one before.
        """
        found = []
        for request in self._bar(requests, "loglikelihood_rolling"):
            ids = [self._prefix(), *encoded(self.tokenizer, request.args[0], begins=False)]
            size, total = self.limit - 1, 0.0
            for start in range(0, len(ids) - 1, size):
                part = ids[start : start + size + 1]
                total += self._scored(part[:1], part[1:])[0]
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The greedy continuation of each context, up to the first of its `until`.

        Raises:
            ValueError: a task that samples.
        """
        groups: dict[tuple, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            groups[self._how(request.args[1])].append(place)
        found = [""] * len(requests)
        for (until, most), places in groups.items():
            room = self.limit - most
            contexts = [encoded(self.tokenizer, requests[i].args[0])[-room:] for i in places]
            given = (self.model, self.params, self.tokenizer, contexts, self.policy)
            said = answers(*given, max_new_tokens=most, until=until, **self.options)
            for place, text in zip(places, said.turns[0], strict=True):
                found[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The tokenizer's own template as text."""
        more = {"add_generation_prompt": add_generation_prompt}
        more |= {"continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **more)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's store of requests."""
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def _how(self, given: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
        """(until, max_new_tokens) of a task's generation arguments."""
        if given.get("do_sample") and given.get("temperature", 1.0):
            refuse("do_sample", True, "False: CompressedLM is greedy; set temperature=0")
        until = given.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        most = integer("max_gen_toks", given.get("max_gen_toks", self.max_gen_toks), least=1)
        if most >= self.limit:
            refuse("max_gen_toks", most, f"below the model's context of {self.limit}")
        return until, most

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both; spaces that end the context belong to the continuation, whose tokens
        are those that it has behind the context.
        """
        if not context:
            return [self._prefix()], encoded(self.tokenizer, continuation, begins=False)
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole, before = (
            encoded(self.tokenizer, text) for text in (context + continuation, context)
        )
        return before or [self._prefix()], whole[len(before) :]

    def _scored(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True
        room = self.limit - len(continuation)
        if room < 1:
            rule = f"at most {self.limit - 1} tokens, the model's context without one"
            refuse("continuation", len(continuation), rule)
        context = context[-room:]
        tokens = np.array([context + continuation])
        kept = {key: value for key, value in self.options.items() if key != "batch_size"}
        options: dict[str, Any] = {**kept, "progress": None, "first": True}
        given = (self.model, self.params, tokens, len(context), self.policy)
        rows = teacher_forced(*given, **options)[0][0, : len(continuation)]
        ids = np.array(continuation)
        said = rows[np.arange(len(ids)), ids].astype(np.float64).sum()
        return float(said), bool((rows.argmax(axis=-1) == ids).all())

    def _prefix(self) -> int:
        """The token that stands before a text without a context."""
        names = ("bos_token_id", "eos_token_id")
        ids = [getattr(self.tokenizer, name, None) for name in names]
        ids += list(getattr(self.model, "stop_token_ids", ()))
        return next((int(i) for i in ids if i is not None), 0)

    def _bar(self, requests: Sequence[Any], name: str) -> Any:
        return tqdm(requests, desc=name, disable=self.options.get("progress") is None)
