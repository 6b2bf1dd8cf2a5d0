"""Prompts and recorded texts from files of JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skipkv.checks import integer
from skipkv.errors import ConfigError
from skipkv.load.files import read_piped, what_is
from skipkv.load.tokenizer import Tokenizer


def json_lines(path: str) -> Iterator[tuple[int, Any]]:
    """(number, value) of every line that is not blank; None where it is no JSON."""
    raw = read_piped(Path(path))
    if found := what_is(raw):
        raise ConfigError(f"{path}: expected JSON lines, found {found}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut inside of texts
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def is_chat(value: Any) -> bool:
    """Whether a JSON value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def prompt_of(value: dict[str, Any]) -> Any:
    """What an object of a file has as its prompt (a text, ids or messages) or its messages; None without either."""
    messages = value.get("messages")
    return messages if value.get("prompt") is None and is_chat(messages) else value.get("prompt")


def read_prompts(path: str) -> Iterator[str | list]:
    """Prompts of a file: JSON texts, or objects with a prompt (a text, ids or messages) or with messages."""
    for number, value in json_lines(path):
        prompt = prompt_of({"prompt": value} if isinstance(value, str) else value if isinstance(value, dict) else {})
        if not isinstance(prompt, (str, list)):
            raise ConfigError(f"{path}: line {number}: expected a JSON text or an object with a prompt or messages")
        yield prompt


def read_texts(
    path: str, tokenizer: Tokenizer, context: int, tokens: int | None = None, limit: int | None = None
) -> tuple[list[list[int]], list[int]]:
    """Ids of each recorded text, at most ``tokens`` and the context, and how many of them are its prompt.

    A line is a text, {"text"}, or {"prompt", "output"}; at most ``limit`` are read.
    """
    tokens = context if tokens is None else min(integer("tokens", tokens, 2, None), context)
    if limit is not None:
        integer("limit", limit, 1, None)
    texts, prompts = [], []
    for number, value in json_lines(path):
        if len(texts) == limit:
            break
        try:
            if isinstance(value, str):
                value = {"text": value}
            prompt, text = value.get("prompt") or "", value.get("text") or value["output"]
            if not isinstance(prompt, str) or not isinstance(text, str):
                raise TypeError
        except (KeyError, TypeError, AttributeError):
            expected = "a JSON text, an object with a text, or one with prompt and output"
            raise ConfigError(f"{path}: line {number}: expected {expected}") from None
        head = tokenizer.encode(prompt) if prompt else []
        texts.append((head + tokenizer.encode(text, add_special_tokens=not head))[:tokens])
        prompts.append(max(1, min(len(head), len(texts[-1]))))
    if not texts:
        raise ConfigError(f"{path}: expected at least one text, found none")
    return texts, prompts
