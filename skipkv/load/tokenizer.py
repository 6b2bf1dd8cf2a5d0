"""Text to ids and back, and chats to prompts, as transformers does it but with only tokenizers and jinja2.

    messages → chat template (`skipkv.load.template`) → text → tokenizer.json → ids
    ids → its decoder → text, whole (decode), piece by piece (stream) or id by id (token_bytes)

tokenizer.json alone decides the ids, beginning- and end-of-text tokens included (its post-processor adds them):
``add_bos_token`` and ``add_eos_token`` in tokenizer_config.json have no effect beside it, as in transformers 5.
"""

import codecs
import operator
import re
from collections.abc import Iterable
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import tokenizers

from skipkv.errors import CheckpointError, ConfigError
from skipkv.load.files import MAX_JSON_BYTES, Fields, read_object, read_text, show
from skipkv.load.template import Templates

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
OTHERS = ("tokenizer.model", "vocab.json")  # what transformers makes a tokenizer.json of
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# GPT-2's stand-ins for bytes: printable Latin-1 characters are themselves, the others follow from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(0x100)) - set(_PRINTABLE))
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}


class Tokenizer:
    """A model's tokenizer and chat templates.

    Parameters
    ----------
    directory : path
        Holds tokenizer.json and, optionally, tokenizer_config.json, chat_template.jinja and additional_chat_templates.
    vocab : int
        Rows of the model's embedding. Ids without a token are usual, as embeddings are padded; tokens whose ids are
        beyond it can be neither written nor read.

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
        A file is missing or wrong, or a template is not well-formed.
    """

    def __init__(self, directory: str | PathLike[str], vocab: int) -> None:
        path = Path(directory) / TOKENIZER
        self.vocab = vocab
        others = [file for file in OTHERS if (Path(directory) / file).exists()]
        if others and not path.exists():
            convert = "AutoTokenizer.from_pretrained({0!r}).save_pretrained({0!r})".format(str(directory))
            raise CheckpointError(f"{path}: expected a file, found only {others[0]!r} (with transformers: {convert})")
        raw = read_text(path, "a JSON object", MAX_JSON_BYTES).encode()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode("")  # the post-processor is first looked at when it adds to a text
        except BaseException as error:  # a panic in the library, as for an incomplete post-processor, is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = str(error).removeprefix("Cannot instantiate Tokenizer from buffer: ")
            raise CheckpointError(f"{path}: expected a tokenizer that the tokenizers library reads: {reason}") from None
        own = self._tokenizer.get_vocab(with_added_tokens=False).values()
        if len(own) > len(set(own)):  # which of two the library takes differs from one process to the next
            found = f"{len(own)} tokens of {len(set(own))} ids"
            raise CheckpointError(f"{path}: model.vocab: expected an id of its own for each token, found {found}")
        self.n_vocab = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        # The decoder as JSON, to be searched by name: it may be a sequence of others.
        self._decoder = self._tokenizer.decoder.__getstate__().decode() if self._tokenizer.decoder else ""
        self._added = self._tokenizer.get_added_tokens_decoder()
        self._read_settings(Path(directory))

    def _read_settings(self, directory: Path) -> None:
        path = directory / SETTINGS
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
        self._templates = Templates(directory, fields)

    def id_of(self, token: str) -> int | None:
        """The id of one token, given as tokenizer.json spells it; None if there is none with a row in the embedding."""
        try:
            found = self._tokenizer.token_to_id(token)
        except UnicodeEncodeError:  # a lone surrogate, which no tokenizer.json can hold
            return None
        return None if found is None or found >= self.vocab else found

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, all of it: truncation or padding that tokenizer.json asks for is not done.

        Raises
        ------
        ConfigError
            The text has lone surrogates, a word that a tokenizer without an unknown token does not know, or a token
            for which the embedding has no row.
        """
        try:
            text.encode()
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except UnicodeEncodeError as error:
            found = f"the lone surrogate U+{ord(text[error.start]):04X} at {error.start}"
            raise ConfigError(f"text: expected Unicode text, found {found}") from None
        except Exception as error:  # of this very type
            raise ConfigError(f"text: {error}") from None
        highest = max(ids, default=0)
        if highest >= self.vocab:
            found = f"{highest} ({show(self._tokenizer.id_to_token(highest))})"
            raise ConfigError(f"text: expected ids below {self.vocab}, the rows of the embedding, found {found}")
        return ids

    def spell(self, text: str) -> list[int]:
        """Ids that write a text inside of another; [] where no ids of the embedding do."""
        try:
            return self.encode(text, add_special_tokens=False)
        except ConfigError:
            return []

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

    @property
    def chat_template(self) -> str | None:
        """The text of the ``default`` template."""
        return self._templates.default

    def render(self, messages: list[dict], /, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The chat template's text for a chat; of several templates that of ``tool_use`` with tools, else ``default``.

        Parameters
        ----------
        messages : list of dict
            Each with ``"role"`` (a string) and, as the template knows them, ``"content"`` (a string, or a list of
            parts), ``"tool_calls"``, ``"reasoning_content"`` and so on; JSON values only.
        add_generation_prompt : bool
            End with the head of the assistant's next turn.
        **variables
            More for the template, such as ``enable_thinking=False``, ``tools`` or ``documents``; JSON values only.

        Raises
        ------
        ConfigError
            There is no template, a message or variable is malformed, or the template refuses the chat, fails on it or
            takes more time or memory than it may.
        BackendError
            The process that renders cannot be started.
        """
        variables["add_generation_prompt"] = add_generation_prompt
        return self._templates.render(messages, self.special, variables)

    def chat(self, messages: list[dict], /, add_generation_prompt: bool = True, **variables: Any) -> list[int]:
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
            if i < self.vocab:
                result[i] = self._bytes_of(token)
        for i, token in self._added.items():
            # The byte-level decoder reads every token through its table, added ones too; most are in it as they are.
            if i < self.vocab:
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

    def skipped(self, token_id: int) -> str:
        """The text of a special token that `push` leaves out; "" of any other."""
        return self._tokenizer.token_texts[token_id] if token_id in self._skip else ""

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
