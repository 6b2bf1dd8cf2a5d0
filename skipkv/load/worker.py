"""The program that renders chat templates, which are untrusted programs themselves; imports nothing of skipkv.

What takes too long or too much memory ends its process; `skipkv.load.template` starts it and tells what its end says.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

SECONDS = 10  # of one rendering
BYTES = 1 << 29  # of address space
CHARACTERS = 1 << 24  # of a rendered text


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the model wrote, for training; here its body is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body, lineno=line)

    def _render(self, caller: Any) -> str:
        return caller()


class _Dict:
    """``dict`` without the class's own methods, which change others."""

    __call__ = staticmethod(dict)
    fromkeys = staticmethod(dict.fromkeys)


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **values: Any) -> None:  # a template may name one of its values "self"
        jinja2.utils.Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **values).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace: expected a name without a leading _, found {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.Environment:
    """As transformers sets it up."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson  # jinja's own escapes HTML
    made.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return made


def explain(error: Exception) -> str:
    """An error of jinja2 or of the template in one printable line, with the template's line where it has one."""
    line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
    text = (str(error) or type(error).__name__)[:1000]
    return line + "".join(character if character.isprintable() else " " for character in text)


@lru_cache(2)
def _compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


def answer(template: str, values: dict[str, Any]) -> tuple[str | None, str | None]:
    """(text, None) or (None, error)."""
    try:
        text = _compiled(template).render(values)
    except MemoryError:
        raise
    except Exception as error:  # a template can raise anything
        return None, explain(error)
    if len(text) > CHARACTERS:
        return None, f"expected a text of at most {CHARACTERS} characters, found {len(text)}"
    return text, None
