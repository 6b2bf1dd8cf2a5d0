"""Chats to prompts by the checkpoint's own template, as transformers renders it, in a process of its own.

    messages, variables → plain JSON values → a worker's process → text

A template is a program that came with the weights. It is only parsed here; `skipkv.load.worker` compiles and renders it
in a sandbox, with the time and the memory that stand there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipkv.checks import wrong
from skipkv.errors import CheckpointError, ConfigError
from skipkv.load import worker
from skipkv.load.files import Fields, read_text, show
from skipkv.load.process import Process

TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
MAX_TEMPLATE = 1 << 18  # bytes; the largest published ones have a tenth of it, and parsing takes seconds a megabyte
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing


def _plain(name: str, value: Any) -> Any:
    """A copy made of JSON types only: an object with methods would hand the template a way out of the sandbox."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: expected JSON values: {error}") from None


def check_variables(name: str, values: Any) -> dict[str, Any]:
    """A copy of a template's variables.

    Raises
    ------
    ConfigError
        They are no mapping of names to JSON values; ``messages`` is among them; ``tools`` or ``documents`` is no list
        of objects.
    """
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise wrong(name, values, "a mapping of names to JSON values")
    if "messages" in values:
        raise ConfigError(f"{name} holds 'messages'; allowed: other variables, as the prompt is the messages")
    result = {key: _plain(f"{name}: {show(key)}", value) for key, value in values.items()}
    for key in ("tools", "documents"):
        value = result.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(v, dict) for v in value)):
            raise ConfigError(f"{name}: {show(key)}: expected a list of objects, found {show(value)}")
    return result


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of a chat as templates see it: without keys that are null, and with reasoning under its usual names."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConfigError(f"messages: expected a list of messages, found {show(messages)}")
    result = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ConfigError(f"messages[{i}]: expected a dict with a role, found {show(message)}")
        if not isinstance(message.get("content"), (str, list, tuple, type(None))):
            found = show(message["content"])
            raise ConfigError(f"messages[{i}]: content: expected a string or a list of parts, found {found}")
        kept = {key: value for key, value in _plain(f"messages[{i}]", message).items() if value is not None}
        reasoning = [kept[key] for key in REASONING if key in kept]
        result.append({"thinking": reasoning[0], **kept, "reasoning_content": reasoning[0]} if reasoning else kept)
    return result


class Templates:
    """A checkpoint's chat templates, and the process that renders them, started with the first chat.

    Parameters
    ----------
    directory : Path
        Its chat_template.jinja and its additional_chat_templates go before the ``chat_template`` of the settings.
    settings : Fields
        tokenizer_config.json.

    Raises
    ------
    CheckpointError
        A template is no text, too long or not well-formed.
    """

    def __init__(self, directory: Path, settings: Fields) -> None:
        self._where = f"{settings.path}: chat_template"
        files = {"default": directory / TEMPLATE} if (directory / TEMPLATE).exists() else {}
        files |= {path.stem: path for path in sorted((directory / MORE_TEMPLATES).glob("*.jinja"))}
        found = {name: (str(path), path) for name, path in files.items()} or self._inline(settings)
        self._names = sorted(found)
        self._texts: dict[str, tuple[str, str]] = {}
        for name in found.keys() & {"default", "tool_use"}:  # the others are never asked for
            where, text = found[name]
            if isinstance(text, Path):
                text = read_text(text, "a chat template", MAX_TEMPLATE)
            if len(text) > MAX_TEMPLATE:
                raise CheckpointError(f"{where}: expected at most {MAX_TEMPLATE} characters, found {len(text)}")
            try:
                worker.environment().parse(text)
            except Exception as error:  # a deep one overflows the stack, a long number is no integer
                raise CheckpointError(f"{where}: {worker.explain(error)}") from None
            self._texts[name] = where, text
        self.default = self._texts["default"][1] if "default" in self._texts else None
        self._renderer = Renderer()

    def _inline(self, settings: Fields) -> dict[str, tuple[str, str]]:
        named = settings.get("chat_template")
        if named is None or isinstance(named, str):
            return {} if named is None else {"default": (self._where, named)}
        if isinstance(named, list) and all(isinstance(v, dict) and {"name", "template"} <= v.keys() for v in named):
            named = {str(v["name"]): v["template"] for v in named}
        if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
            settings.fail("chat_template", "a string or a list of {name, template}")
        return {name: (f"{self._where}: {show(name)}", text) for name, text in named.items()}

    def render(self, messages: Any, special: Mapping[str, str], variables: Mapping[str, Any]) -> str:
        """See `Tokenizer.render`; special: the tokens that templates see, which variables of their names replace."""
        # Templates test `tools` and `documents` against none rather than whether they are defined.
        values = {"tools": None, "documents": None, **special, **check_variables("template", variables)}
        values["messages"] = check_messages(messages)
        name = "tool_use" if values["tools"] is not None and "tool_use" in self._texts else "default"
        if name not in self._texts:
            found = f"only {', '.join(map(show, self._names))}" if self._names else "none"
            raise ConfigError(f"{self._where}: expected a chat template (or {TEMPLATE}), found {found}")
        return self._renderer.render(*self._texts[name], values)


class Renderer(Process):
    """Renders in a process of its own."""

    def __init__(self) -> None:
        super().__init__("chat templates need", worker.__file__, worker.BYTES)

    def render(self, where: str, template: str, values: Mapping[str, Any]) -> str:
        """The text; where: names the template.

        Raises
        ------
        ConfigError
            The template refuses, fails, or takes more time or memory than it may.
        BackendError
            No process can be started.
        """
        answer = self.ask([template, values], worker.SECONDS)
        if isinstance(answer, str):
            limits = f"{worker.SECONDS} s and {worker.BYTES >> 20} MiB"
            raise ConfigError(f"{where}: expected a template that renders within {limits}, found one that {answer}")
        text, error = answer
        if error is not None:
            raise ConfigError(f"{where}: {error}")
        return text
