"""Our models in EleutherAI's evaluation harness, `lm-eval`. Needs the extra `eval`."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llama4_eqx.generation.decoding import stream
from llama4_eqx.generation.sampling import Greedy, Sample, Sampler
from llama4_eqx.generation.scoring import loglikelihood
from llama4_eqx.model import Llama4
from llama4_eqx.processing.special_tokens import BEGIN_OF_TEXT
from llama4_eqx.processing.tokenizer import Tokenizer


class LmEval(TemplateLM):
    """A model for `lm_eval.simple_evaluate(model=LmEval(model, tokenizer), tasks=[…])`.

    As in the harness's own adapter for `transformers`, a text begins with `<|begin_of_text|>`, the
    names of special tokens in it are those tokens, and texts longer than `max_length` tokens lose
    their beginning. `chat_template` is what `load_chat_template` returns. On a CPU, pass
    `model.unstacked(experts=True)`.
    """

    def __init__(
        self,
        model: Llama4,
        tokenizer: Tokenizer,
        *,
        max_length: int = 8192,
        batch_size: int = 8,
        max_gen_toks: int = 256,
        chat_template: Callable[..., str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self._tokenizer = model, tokenizer
        self.max_length = min(max_length, model.config.text_config.max_position_embeddings)
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks
        self._chat_template, self._key = chat_template, jax.random.key(seed)

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        return self._tokenizer.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes caches of requests."""
        return f"{type(self._tokenizer).__name__}-{self._tokenizer.vocab_size}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, after `<|begin_of_text|>` unless it has that or it isn't wanted."""
        bos = add_special_tokens is not False and not string.startswith(BEGIN_OF_TEXT)
        return self._tokenizer.encode(string, bos=bos, special=True)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """A name for the template in the harness's records."""
        return None if self._chat_template is None else repr(self._chat_template)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt of a conversation; without a generation prompt its last message goes on."""
        if self._chat_template is None:
            raise ValueError(
                "The task wants a chat template: pass chat_template=load_chat_template(folder)."
            )
        return self._chat_template(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        contexts, continuations = [], []
        for _, context, continuation in requests:
            continuations.append(continuation[-self.max_length :])
            # One token more than are read: the last one is only predicted.
            room = self.max_length + 1 - len(continuations[-1])
            contexts.append(context[-room:])
        found = loglikelihood(self.model, contexts, continuations, batch_size=self.batch_size)
        results = list(zip(found.total.tolist(), found.is_greedy.tolist(), strict=True))
        for (strings, *_), result in zip(requests, results, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of whole texts, read in windows of `max_length` tokens."""
        windows = [
            (None, *make_disjoint_window(window))
            for request in requests
            for window in self._windows(request.args[0])
        ]
        numbers = [sum(1 for _ in self._windows(request.args[0])) for request in requests]
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(number)) for number in numbers]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> Any:
        return get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop string or token, or `max_gen_toks` tokens."""
        asked: list[tuple[str, dict[str, Any]]] = [cast(Any, r.args) for r in requests]
        texts: dict[int, str] = {}

        def settings(i: int) -> str:
            return repr(sorted(asked[i][1].items()))

        order = sorted(range(len(asked)), key=lambda i: (settings(i), len(asked[i][0])))
        for _, same in groupby(order, key=settings):
            numbers = list(same)
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                prompts = [asked[i][0] for i in batch]
                options = asked[batch[0]][1]
                for i, text in zip(batch, self._continue(prompts, options), strict=True):
                    texts[i] = text
                    self.cache_hook.add_partial("generate_until", asked[i], text)
        return [texts[i] for i in range(len(asked))]

    def _continue(self, prompts: list[str], options: dict[str, Any]) -> list[str]:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        new = int(options.get("max_gen_toks", self.max_gen_toks))
        room = self.max_length - new
        if room < 1:
            raise ValueError(f"max_gen_toks={new} leaves no room for a prompt: raise max_length.")
        rows = [self.tok_encode(prompt)[-room:] for prompt in prompts]
        width = max(map(len, rows))
        tokens = np.array([[0] * (width - len(row)) + row for row in rows], np.int32)
        mask = np.array([[False] * (width - len(row)) + [True] * len(row) for row in rows])
        sampler, key = self._sampler(options)
        ids: list[list[int]] = [[] for _ in rows]
        texts = ["" for _ in rows]
        done = [False for _ in rows]
        stops = self._tokenizer.stop_ids
        for token in stream(
            self.model,
            jnp.asarray(tokens),
            mask=jnp.asarray(mask),
            max_new_tokens=new,
            stop_ids=stops,
            sampler=sampler,
            key=key,
        ):
            for row, one in enumerate(np.asarray(token).tolist()):
                if done[row] or one in stops:
                    done[row] = True
                    continue
                ids[row].append(one)
                texts[row] = self._tokenizer.decode(ids[row])
                done[row] = any(stop in texts[row] for stop in until if stop)
            if all(done):
                break
        return [
            min((text.split(stop)[0] for stop in until if stop), key=len, default=text)
            for text in texts
        ]

    def _sampler(self, options: dict[str, Any]) -> tuple[Sampler, Any]:
        temperature = float(options.get("temperature") or 0)
        if temperature == 0 or options.get("do_sample") is False:
            return Greedy(), None
        self._key, key = jax.random.split(self._key)
        top_k, top_p = options.get("top_k"), options.get("top_p")
        return Sample(temperature, top_k=top_k or None, top_p=top_p), key
