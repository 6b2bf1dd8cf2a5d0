"""Text to ids and back, and chats to prompts, as transformers does it but with only tokenizers and jinja2.

    messages → chat template (sandboxed) → text → tokenizer.json → ids
    ids → its decoder → text, whole (decode), piece by piece (stream) or id by id (token_bytes)

tokenizer.json alone decides the ids, beginning- and end-of-text tokens included (its post-processor adds them):
``add_bos_token`` and ``add_eos_token`` in tokenizer_config.json have no effect beside it, as in transformers 5.
"""

import codecs
import json
import operator
import re
from collections.abc import Iterable
from datetime import datetime
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from skipkv.errors import CheckpointError, ConfigError
from skipkv.load.files import Fields, read_object, read_text, show

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
OTHERS = ("tokenizer.model", "vocab.json")  # what transformers makes a tokenizer.json of
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MESSAGE = (("role", str, "a string"), ("content", (str, list), "a string or a list of parts"))
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# GPT-2's stand-ins for bytes: printable Latin-1 characters are themselves, the others follow from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(0x100)) - set(_PRINTABLE))
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the model wrote, for training; here its body is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _compile(template: str, where: str) -> jinja2.Template:
    # A template is a program that came with the weights: it gets plain data and the sandbox, nothing else.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson  # jinja's own escapes HTML
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": lambda *args, **values: dict(*args, **values),  # the class itself has methods that change others
    }
    try:
        return environment.from_string(template)
    except Exception as error:  # a deep template also overflows Python's own compiler
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise CheckpointError(f"{where}: {line}{error}") from None


def _plain(name: str, value: Any) -> Any:
    """A copy made of JSON types only: an object with methods would hand the template a way out of the sandbox."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: expected JSON values: {error}") from None


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ConfigError(f"messages: expected a list of messages, found {show(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ConfigError(f"messages[{i}]: expected a dict with role and content, found {show(message)}")
        for key, kinds, expected in MESSAGE:
            if not isinstance(message[key], kinds):
                raise ConfigError(f"messages[{i}]: {key}: expected {expected}, found {show(message[key])}")
    # Some sources write optional keys as null; templates test whether a key is there.
    return [{k: v for k, v in message.items() if v is not None} for message in _plain("messages", messages)]


class Tokenizer:
    """A model's tokenizer and chat template.

    Parameters
    ----------
    directory : path
        Holds tokenizer.json and, optionally, tokenizer_config.json and chat_template.jinja (which goes before the
        ``chat_template`` of the former).
    vocab : int
        Rows of the model's embedding; every id must be below it. Ids without a token are usual: embeddings are padded.

    Attributes
    ----------
    vocab : int
    n_vocab : int
        The tokenizer's highest id plus one.
    special : dict of str to str
        The named special tokens, ``"bos_token"`` and so on, as templates see them.
    bos_id, eos_id : int or None

    Raises
    ------
    CheckpointError
        A file is missing or wrong, the tokenizer does not fit the embedding, or the template does not compile.
    """

    def __init__(self, directory: str | PathLike[str], vocab: int) -> None:
        path = Path(directory) / TOKENIZER
        self.vocab = vocab
        others = [file for file in OTHERS if (Path(directory) / file).exists()]
        if others and not path.exists():
            convert = "AutoTokenizer.from_pretrained({0!r}).save_pretrained({0!r})".format(str(directory))
            raise CheckpointError(f"{path}: expected a file, found only {others[0]!r} (with transformers: {convert})")
        raw = read_text(path, "a JSON object").encode()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            added = self._tokenizer.encode("").ids  # what the post-processor adds to every text
        except BaseException as error:  # a panic in the library, as for an incomplete post-processor, is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
            raise CheckpointError(f"{path}: expected a tokenizer that the tokenizers library reads: {reason}") from None
        self.n_vocab = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        highest = max([self.n_vocab - 1, *added])
        if highest >= vocab:
            found = f"{highest} ({show(self._tokenizer.id_to_token(highest))})"
            raise CheckpointError(f"{path}: expected ids below {vocab}, the rows of the embedding, found {found}")
        # The decoder as JSON, to be searched by name: it may be a sequence of others.
        self._decoder = self._tokenizer.decoder.__getstate__().decode() if self._tokenizer.decoder else ""
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._read_settings(Path(directory))

    def _read_settings(self, directory: Path) -> None:
        path, file = directory / SETTINGS, directory / TEMPLATE
        fields = Fields(path, read_object(path) if path.exists() else {})
        self._tokenizer.encode_special_tokens = fields.boolean("split_special_tokens")
        self.special: dict[str, str] = {}
        for key in NAMED:
            value = fields.get(key)
            token = value.get("content", value) if isinstance(value, dict) else value
            if isinstance(token, str):
                self.special[key] = token
            elif value is not None:
                fields.fail(key, "a token or an object with its content")
        self.bos_id, self.eos_id = (self.id_of(self.special.get(key, "")) for key in NAMED[:2])
        self._where, template = f"{path}: chat_template", fields.get("chat_template")
        if file.exists():
            self._where, template = str(file), read_text(file, "a chat template")
        elif isinstance(template, list):
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default" and t.get("template")]
            template = named[-1]["template"] if named else template
        if template is not None and not isinstance(template, str):
            fields.fail("chat_template", 'a string or a list of {name, template} with one named "default"')
        self._template = None if template is None else _compile(template, self._where)

    def id_of(self, token: str) -> int | None:
        """The id of one token, given as tokenizer.json spells it; None if there is none."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, all of it: truncation or padding that tokenizer.json asks for is not done.

        Raises
        ------
        ConfigError
            The text has lone surrogates, or a word that a tokenizer without an unknown token does not know.
        """
        try:
            text.encode()
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except UnicodeEncodeError as error:
            found = f"the lone surrogate U+{ord(text[error.start]):04X} at {error.start}"
            raise ConfigError(f"text: expected Unicode text, found {found}") from None
        except Exception as error:  # of this very type
            raise ConfigError(f"text: {error}") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; those without a token give nothing, and broken UTF-8 gives U+FFFD. Spaces are not cleaned up."""
        return self._tokenizer.decode([self._checked(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def _checked(self, token_id: Any) -> int:
        try:
            value = operator.index(token_id)
        except TypeError:
            value = -1
        if not 0 <= value < self.vocab:
            raise ConfigError(f"ids: expected integers from 0 to {self.vocab - 1}, found {show(token_id)}")
        return value

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The chat template's text for a chat.

        Parameters
        ----------
        messages : list of dict
            Each with ``"role"`` (a string), ``"content"`` (a string, or a list of parts) and what else the template
            knows; JSON values only.
        add_generation_prompt : bool
            End with the head of the assistant's next turn.
        **variables
            More for the template, such as ``enable_thinking=False``; JSON values only.

        Raises
        ------
        ConfigError
            There is no template, a message is malformed, or the template refuses the chat or fails on it.
        """
        if self._template is None:
            raise ConfigError(f"{self._where}: expected a chat template (or {TEMPLATE}), found none")
        # Templates test `tools` and `documents` against none rather than whether they are defined.
        values = {"tools": None, "documents": None, **self.special}
        values |= {name: _plain(f"variable {show(name)}", value) for name, value in variables.items()}
        values |= {"messages": _messages(messages), "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(values)
        except Exception as error:  # a template can raise anything
            raise ConfigError(f"{self._where}: {str(error) or type(error).__name__}") from None

    def chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> list[int]:
        """Ids of `render`'s text. The template writes the special tokens itself, so none are added."""
        return self.encode(self.render(messages, add_generation_prompt, **variables), add_special_tokens=False)

    def stream(self, skip_special_tokens: bool = True) -> "Stream":
        """A `Stream` that decodes one sequence of ids as it grows."""
        return Stream(self, skip_special_tokens)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """Bytes ``[vocab]`` of each id inside a text, ``b""`` where there is no token.

        Characters that span tokens are whole only once the bytes are joined.
        """
        result = [b""] * self.vocab
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            result[i] = self._bytes_of(token)
        for i, token in self._added.items():
            # The byte-level decoder reads every token through its table, added ones too; most are in it as they are.
            result[i] = self._bytes_of(token.content) if self._byte_level else token.content.encode()
        return result

    @cached_property
    def token_texts(self) -> list[str]:
        """`token_bytes` as text; U+FFFD where a token holds only part of a character."""
        return [raw.decode(errors="replace") for raw in self.token_bytes]

    @property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in self._decoder

    @cached_property
    def _fallback_ids(self) -> frozenset[int]:
        """Ids of tokens <0x00> to <0xFF>, if the decoder reads them as bytes."""
        vocab = self._tokenizer.get_vocab() if '"ByteFallback"' in self._decoder else {}
        return frozenset(i for token, i in vocab.items() if BYTE_TOKEN.fullmatch(token))

    def _bytes_of(self, token: str) -> bytes:
        if self._byte_level:
            known = all(character in BYTE_OF for character in token)
            return bytes(BYTE_OF[character] for character in token) if known else token.encode()
        if '"ByteFallback"' in self._decoder and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        # Sentencepiece's visible space, if this decoder is one that makes it a space again.
        return (token.replace("▁", " ") if "▁" in self._decoder else token).encode()


class Stream:
    """Decodes one sequence of ids as it grows: the pieces joined are what `Tokenizer.decode` gives for all ids.

    Each id costs the decoding of a few neighbours, not of the text so far. Made by `Tokenizer.stream`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = {i for i, token in tokenizer._added.items() if token.special and skip_special_tokens}
        # A byte-level text is its tokens' bytes, so a UTF-8 decoder that waits for the rest of a character is exact.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer._byte_level else None
        # Other decoders treat a text's first token differently (a leading space goes), so a piece is what the window
        # of new ids adds after the ids of the piece before it, whose text has `_sent` characters on its own.
        self._window: list[int] = []
        self._context = self._sent = 0

    def push(self, token_id: int) -> str:
        """The text that this id adds; "" as long as it could still change.

        That is: while a UTF-8 character is incomplete; with byte-fallback tokens until the first other token, as one
        broken character makes the decoder replace every byte of such a run.
        """
        i = self._tokenizer._checked(token_id)
        if i in self._skip:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(self._tokenizer.token_bytes[i])
        if self._tokenizer._tokenizer.id_to_token(i) is None:  # a padded row of the embedding: decoders ignore it
            return ""
        self._window.append(i)
        return "" if i in self._tokenizer._fallback_ids else self._piece()

    def flush(self) -> str:
        """What is still held back, once the sequence has ended."""
        return self._utf8.decode(b"", final=True) if self._utf8 is not None else self._piece()

    def _piece(self) -> str:
        decode = self._tokenizer._tokenizer.decode
        piece = decode(self._window, skip_special_tokens=False)[self._sent :]  # those to skip are not in the window
        if piece:
            del self._window[: self._context]
            self._context, self._sent = len(self._window), len(decode(self._window, skip_special_tokens=False))
        return piece
