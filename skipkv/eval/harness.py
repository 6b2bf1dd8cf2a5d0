"""A model of EleutherAI's lm-evaluation-harness, so that any of its tasks runs under any method.

    lm_eval.simple_evaluate(model=LM("dir", method="skipkv:budget=1024"), tasks=["gsm8k"])
    lm_eval --model skipkv --model_args pretrained=DIR,method=skipkv:budget=1024,tau=0.9 --tasks gsm8k

The command finds this class by its entry point, in releases that look for those (after 0.4.13); in older ones
``python -m skipkv.eval.harness`` stands for ``lm_eval``. Texts become ids as in the harness's own models.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from skipkv import devices
from skipkv.checks import integer
from skipkv.errors import BackendError, ConfigError, warn
from skipkv.load.template import check_variables
from skipkv.methods import Method, parse_method
from skipkv.model import Model, load
from skipkv.run import Options, Sampling
from skipkv.steering import Steering, describe_run, parse_run

from .likelihood import likelihoods

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
SAMPLING = [f.name for f in fields(Sampling)]


@register_model("skipkv")
class LM(TemplateLM):
    """A skipkv model as the harness sees one.

    Parameters
    ----------
    pretrained : path, hub id, "tiny", or Model
        For `skipkv.load`, with ``device``, ``dtype`` and ``threads``; or a model that is loaded already.
    method : str or Method
        The string may hold ``+steer:FILE,…``.
    steering : Steering, optional
    rows, cache, memory_limit
        As for `Model.generate`; log-likelihoods, too. Greedy results do not depend on ``rows``.
    max_length : int, optional
        Of contexts and windows, which are cut on the left; by default the model's context.
    max_gen_toks : int
        New tokens where a task says nothing.
    think_end_token : str, optional
        The answer is what follows its last occurrence, such as ``"</think>"``.
    chat_template_args : mapping, optional
        Variables of the chat template.
    batch_size, max_batch_size
        The harness's own; a batch size above 1 is ``rows``.
    **parameters
        More of the method's string: of ``method=skipkv:budget=1024,tau=0.9`` the harness makes two arguments. They are
        read as if they followed ``method``, and what is no parameter there is refused.

    Raises
    ------
    CheckpointError, ConfigError, BackendError
        As `skipkv.load`; a parameter is out of range; the model has no tokenizer.
    """

    def __init__(
        self, pretrained: str | Model, method: str | Method = "full", steering: Steering | None = None, *,
        device: str = "cpu", dtype: str = "auto", threads: int | None = None, rows: int = 16, cache: str = "bf16",
        memory_limit: int | None = None, max_length: int | None = None, max_gen_toks: int = 256,
        think_end_token: str | None = None, chat_template_args: Mapping[str, Any] | None = None,
        batch_size: int | str = 1, max_batch_size: int | None = None, **parameters: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(method, str):
            more = ",".join(f"{name}={value}" for name, value in parameters.items())
            self.method, steered = parse_run(f"{method}{',' if ':' in method else ':'}{more}" if more else method)
            steering = steering or steered
        else:
            self.method = parse_method(method).with_(**parameters)
        self.steering = steering
        rows = int(batch_size) if str(batch_size).isdigit() and int(batch_size) > 1 else rows
        self.options = {"rows": rows, "cache": cache, "memory_limit": memory_limit}
        Options(max_new_tokens=max_gen_toks, **self.options)  # or refused
        self.model = pretrained if isinstance(pretrained, Model) else load(pretrained, device, dtype, threads)
        self.tokenizer, context = self.model.tokenizer, self.model.config.context
        if self.tokenizer is None:
            raise ConfigError(f"{self.model.name} has no tokenizer, and the harness asks in texts")
        self.model.check_steering(self.steering)
        self.max_length = context if max_length is None else integer("max_length", max_length, 2, context)
        self.max_gen_toks, self.think_end_token = max_gen_toks, think_end_token
        self.chat_template_args = check_variables("chat_template_args", chat_template_args or {})

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict | None = None) -> "LM":
        """From the command line's arguments, which go before its options; the default of ``--device`` is cuda:0."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None} | arg_dict
        if "device" not in arg_dict:
            try:
                devices.find(given.setdefault("device", "cpu"))
            except BackendError as error:
                warn(f"{error}; the CPU computes")
                given["device"] = "cpu"
        return cls(**given)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "LM":
        """See `create_from_arg_obj`."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    def get_model_info(self) -> dict[str, Any]:
        """What stands beside the results."""
        run = describe_run(self.method, self.steering)
        return {"pretrained": self.model.name, "method": run, "model_dtype": self.model.dtype, **self.options}

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context, and before the first token of a rolling text."""
        found = self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        if found is None:
            raise ConfigError(f"{self.model.name}: expected a bos_token or eos_token to begin a text with, found none")
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids; by default with special tokens, unless the text begins with one, as that of a chat template may."""
        if add_special_tokens is None:
            special = self.tokenizer.special
            begin = special.get("bos_token") or special.get("eos_token")
            add_special_tokens = not (begin and string.startswith(begin))
        return self.tokenizer.encode(string, add_special_tokens)

    def _cut(self, context: list[int], room: int) -> list[int]:
        """The last ``room`` tokens, and at least one."""
        if len(context) > room:
            self.model._say_once(f"contexts are cut on the left, so that they fit max_length={self.max_length}")
        return context[-room:] or [self.prefix_token_id]

    @property
    def tokenizer_name(self) -> str:
        return self.model.name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Text of a chat; without generation prompt up to the end of the last message, which is to go on."""
        try:
            text = self.tokenizer.render(chat_history, add_generation_prompt, **self.chat_template_args)
        except ConfigError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) in (0, len(chat_history)):
                raise
            text = self.tokenizer.render(others, add_generation_prompt, **self.chat_template_args)
            self.model._say_once("the chat template fails with a system message; it is left out")
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def _options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A request's generation_kwargs as options of `Model.stream`."""
        given = {name: value for name, value in given.items() if (name, value) != ("num_beams", 1)}
        until, sampled, *lengths = (given.pop(name, None) for name in ("until", "do_sample", *LENGTHS))
        temperature = given.pop("temperature", 1.0 if sampled else 0.0)
        unknown = given.keys() - set(SAMPLING)
        if unknown:
            allowed = ", ".join(["until", "do_sample", *LENGTHS, *SAMPLING])
            raise ConfigError(f"generation option {min(unknown)!r} is unknown; allowed: {allowed}")
        stop = [*([until] if isinstance(until, str) else until or ()), self.tokenizer.special.get("eos_token")]
        length = next((n for n in lengths if n is not None), self.max_gen_toks)
        return {
            **self.options, **given, "temperature": 0.0 if sampled is False else temperature,
            "stop": [text for text in stop if text],
            "max_new_tokens": integer("max_gen_toks", length, 1, self.max_length - 1),
        }  # fmt: skip

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop string; requests with the same options run together."""
        texts, calls = [""] * len(requests), {}
        for i, request in enumerate(requests):
            calls.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for indices in calls.values():
                options = self._options(requests[indices[0]].args[1])
                room = self.max_length - options["max_new_tokens"]
                prompts = [self._cut(self.tok_encode(requests[i].args[0]), room) for i in indices]
                for event in self.model.stream(prompts, self.method, self.steering, **options):
                    if event.generation is None:
                        continue
                    if event.generation.finish_reason == "interrupted":
                        raise KeyboardInterrupt  # a part of a text is not to be graded
                    i, text = indices[event.prompt], event.generation.text
                    texts[i] = text.split(self.think_end_token)[-1].lstrip() if self.think_end_token else text
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update()
        return texts

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts: of windows of ``max_length`` tokens that know nothing of each other."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding says it) of (key in the harness's cache, context, continuation)."""
        found = [(0.0, True)] * len(requests)  # what an empty continuation has
        longest = max((len(continuation) for *_, continuation in requests), default=0)
        if longest > self.max_length:
            raise ConfigError(f"a continuation has {longest} tokens; allowed: up to {self.max_length}")
        which = [i for i, (*_, continuation) in enumerate(requests) if continuation]
        # The last token is never fed.
        pairs = [(self._cut(requests[i][1], self.max_length + 1 - len(requests[i][2])), requests[i][2]) for i in which]
        with tqdm(total=len(which), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for j, result in likelihoods(self.model, pairs, self.method, self.steering, **self.options):
                i = which[j]
                found[i] = result
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
                bar.update()
        return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
