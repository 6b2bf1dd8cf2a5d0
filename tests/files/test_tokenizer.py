"""tokenizer.py: the same ids and prompts as transformers, exact streaming, and one sentence for each thing wrong."""

# ruff: noqa: E501  (a broken file and the sentence it must get stand on one line; so do chat templates)

import json
import os
import random
from pathlib import Path

import pytest
import tokenizers
from checkpoints import CORPUS, byte_level
from harness import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel

import skipkv
from skipkv.errors import ConfigError
from skipkv.load.tokenizer import Tokenizer

TINY = Path(skipkv.__file__).parent / "tiny"
SMOL = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skipkv/models/SmolLM2-135M-Instruct"
TEXTS = ["", " ", "hello", " hello  world ", "Wait, 12345 let's\n\nsee", "日本語 🙂👩‍👩‍👧 e\u0301", "a\u0000b\ufffd\r\n\t",
         "<think>\nhm</think> so", "</s> <s>x<|im_end|> y", "▁Ġ <0x41>", *CORPUS]  # fmt: skip

# The pre-tokenizers of Qwen2 and Llama 3.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")

QWEN_TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" and message.tool_calls is defined %}{{- 'CALLS' }}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA3_TEMPLATE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "<|eot_id|>" }}
{%- if tools is not none %}
    {{- 'Tools: ' }}{{ tools | length }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}
        {%- continue %}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {% generation %}
    {{ message['content'] | trim + '<|eot_id|>' }}
    {% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
R1_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor %}{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def llama2():
    """A BPE as converted from sentencepiece: "▁" for spaces, one before the text, and bytes for other characters."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    merges = [("▁", "h"), ("l", "l"), ("▁", "▁"), ("▁h", "e"), ("▁he", "ll"), ("▁hell", "o")]
    for token in ["▁", *"abcdefghijklmnopqrstuvwxyz.,!?/[]INST", "語", *("".join(merge) for merge in merges)]:
        vocab.setdefault(token, len(vocab))
    result = tokenizers.Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    result.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    result.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    result.decoder = decoders.Sequence(strip)
    special = [("<s>", 1)]
    result.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=special)
    return result


def write(directory, tokenizer, config=None, model_type="llama", jinja=None):
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (directory / "chat_template.jinja").write_text(jinja)
    return directory


BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_CONFIG = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
               "add_bos_token": False, "chat_template": QWEN_TEMPLATE}  # fmt: skip
ADDED = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
R1_CONFIG = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False, "legacy": True,
             "chat_template": R1_TEMPLATE, "bos_token": ADDED | {"content": BEGIN}, "eos_token": ADDED | {"content": END}}  # fmt: skip


def r1(bos):
    plain = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
    return byte_level(QWEN, (END, BEGIN), plain, normalizers.NFC(), bos)


BUILD = {
    "qwen": lambda d: write(d, byte_level(QWEN, QWEN_SPECIAL, ("<think>", "</think>"), normalizers.NFC()), QWEN_CONFIG, "qwen2"),
    "llama3": lambda d: write(
        d, byte_level(LLAMA3, ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"), bos="<|begin_of_text|>"),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": "not this one"},
        jinja=LLAMA3_TEMPLATE,
    ),
    "llama2": lambda d: write(
        d, llama2(),
        {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
         "chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": LLAMA2_TEMPLATE}]},
    ),
    "r1-qwen": lambda d: write(d, r1(BEGIN), R1_CONFIG, "qwen2"),
    # add_bos_token asks for what the post-processor of this tokenizer.json does not do.
    "r1-llama-without-bos": lambda d: write(d, r1(None), R1_CONFIG, "llama"),
    "tiny": lambda d: TINY,
    "smol": lambda d: SMOL,
}  # fmt: skip
EXACT = ("qwen", "llama2", "tiny")  # one for each kind of decoder


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: build(root / name) for name, build in BUILD.items()}


@pytest.fixture(scope="module")
def opened(directories):
    """Every model but smol, its embedding padded by ten rows as Qwen's is."""
    files = {name: str(directories[name] / "tokenizer.json") for name in BUILD if name != "smol"}
    sizes = {name: tokenizers.Tokenizer.from_file(file).get_vocab_size() for name, file in files.items()}
    return {name: Tokenizer(directories[name], size + 10) for name, size in sizes.items()}


@pytest.fixture(params=BUILD)
def pair(request, directories, opened):
    """Our tokenizer and transformers'."""
    transformers = pytest.importorskip("transformers")
    if request.param == "smol" and not SMOL.is_dir():
        pytest.skip(f"no {SMOL}")
    ours = Tokenizer(SMOL, 49152) if request.param == "smol" else opened[request.param]
    return ours, transformers.AutoTokenizer.from_pretrained(directories[request.param], local_files_only=True)


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.oracle
def test_ids_and_texts_are_those_of_transformers(pair):
    ours, oracle = pair
    for text in TEXTS:
        for add in (True, False):
            ids = ours.encode(text, add_special_tokens=add)
            assert ids == oracle(text, add_special_tokens=add).input_ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip), text
    # Not len(oracle): transformers' Qwen2 class gives R1's tokenizer, which has no <|endoftext|>, a new id for it.
    assert (ours.bos_id, ours.eos_id) == (oracle.bos_token_id, oracle.eos_token_id)


THOUGHT = {"role": "assistant", "content": "<think>\nhm</think>\n\nb ", "tool_calls": None}
CHATS = [user("12 + 30?"), [*user("a"), THOUGHT, *user(" \u0085c<think>")], [*user("日本"), {"role": "assistant", "content": "🙂"}]]
MORE = {"enable_thinking": False, "tools": [{"name": "é<b>", "n": [1, None]}], "bos_token": "!"}


@pytest.mark.oracle
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("variables", [{}, MORE])
def test_chats_are_those_of_transformers(pair, chat, variables):
    ours, oracle = pair
    for add in (True, False):
        expected = oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=add, **variables)
        assert ours.render(chat, add, **variables) == expected
        ids = oracle.apply_chat_template(chat, add_generation_prompt=add, return_dict=False, **variables)
        assert ours.chat(chat, add, **variables) == ids


def test_the_post_processor_alone_decides_on_bos(opened):
    assert opened["r1-qwen"].encode("a")[:-1] == [opened["r1-qwen"].bos_id]
    assert opened["r1-llama-without-bos"].bos_id not in opened["r1-llama-without-bos"].encode("a")


def test_a_chat_begins_with_one_bos(opened):
    for name in ("llama3", "llama2", "r1-qwen", "r1-llama-without-bos", "tiny"):
        assert opened[name].chat(user("hello")).count(opened[name].bos_id) == 1, name


def test_r1_drops_earlier_thoughts_and_opens_the_next(opened):
    text = opened["r1-qwen"].render([{"role": "system", "content": "S"}, *user("u"), THOUGHT, *user("v")])
    assert text == f"{BEGIN}S<｜User｜>u<｜Assistant｜>\n\nb {END}<｜User｜>v<｜Assistant｜><think>\n"


def test_truncation_and_padding_in_the_file_are_not_done(tmp_path):
    tokenizer = llama2()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    ours = Tokenizer(write(tmp_path, tokenizer), 400)
    assert ours.encode("abcdefg") == [1, *map(ours.id_of, "▁abcdefg")]


def test_split_special_tokens_makes_them_text(tmp_path):
    ours = Tokenizer(write(tmp_path, llama2(), {"split_special_tokens": True}), 400)
    assert ours.id_of("</s>") not in ours.encode("a</s>", add_special_tokens=False)


def test_token_bytes_of_a_text_join_to_the_text(opened):
    for name in EXACT:
        ours = opened[name]
        text = "Find Ann, 3.\n\n<think>" if name == "tiny" else "hello  日本語 🙂\n<think></think>"
        lead = b" " if name == "llama2" else b""  # the space that decode takes away again
        ids = ours.encode(text, add_special_tokens=False)
        assert b"".join(ours.token_bytes[i] for i in ids) == lead + text.encode()
        assert len(ours.token_bytes) == len(ours.token_texts) == ours.vocab and ours.token_bytes[ours.n_vocab] == b""


@pytest.mark.parametrize("name, tokens, texts", [
    ("qwen", ("Ġ", "Ċ", "è", "<|im_end|>"), [" ", "\n", "\ufffd", "<|im_end|>"]),
    ("llama2", ("▁hello", "<0x41>", "<0xE8>", "語", "</s>"), [" hello", "A", "\ufffd", "語", "</s>"]),
    ("r1-qwen", (BEGIN, "<｜User｜>", "<think>"), [BEGIN, "<｜User｜>", "<think>"]),
])  # fmt: skip
def test_token_texts(opened, name, tokens, texts):
    ours = opened[name]
    assert [ours.token_texts[ours.id_of(t)] for t in tokens] == texts
    assert ours.id_of("no such token") is None


def test_added_tokens_are_their_content_but_where_the_decoder_reads_bytes(tmp_path):
    sentencepiece, bytewise = llama2(), byte_level(QWEN, QWEN_SPECIAL)
    for name, tokenizer, token, raw in (("a", sentencepiece, "x▁y", "x▁y".encode()), ("b", bytewise, "é!", b"\xe9!")):
        tokenizer.add_tokens([token])
        ours = Tokenizer(write(tmp_path / name, tokenizer), 400)
        assert ours.token_bytes[ours.id_of(token)] == raw


def streamed(ours, ids, skip=True):
    stream = ours.stream(skip)
    return [*(stream.push(i) for i in ids), stream.flush()]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40) | st.text("hello <s>▁語🙂\ufffd\n", max_size=40), skip=st.booleans())
def test_a_streamed_text_is_the_decoded_text(opened, text, skip):
    for name in ("qwen", "llama2"):
        ids = opened[name].encode(text)
        assert "".join(streamed(opened[name], ids, skip)) == opened[name].decode(ids, skip), name


@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_streamed_random_ids_are_the_decoded_ids(opened, data, skip):
    for name in EXACT:
        ours = opened[name]
        odd = [i for i, raw in enumerate(ours.token_bytes) if raw in (b"", b" ") or max(raw) > 0x7F or i < 4]
        ids = data.draw(st.lists(st.sampled_from(odd) | st.integers(0, ours.vocab - 1), max_size=24), label=name)
        assert "".join(streamed(ours, ids, skip)) == ours.decode(ids, skip), name


def test_a_split_character_comes_whole(opened):
    ids = opened["qwen"].encode("a🙂b")
    assert len(ids) == 6 and streamed(opened["qwen"], ids) == ["a", "", "", "", "🙂", "b", ""]
    # With byte fallback, a broken character would undo the whole run: it is over with the first other token.
    ids = opened["llama2"].encode("a🙂🙂b", add_special_tokens=False)
    assert streamed(opened["llama2"], ids) == ["", "a", *[""] * 8, "🙂🙂b", ""]


def test_what_shows_nothing_does_not_interrupt_a_character(opened):
    for name in ("qwen", "llama2"):
        ours = opened[name]
        first, *rest = ours.encode("🙂", add_special_tokens=False)[-4:]
        assert "".join(streamed(ours, [first, ours.n_vocab, ours.eos_id, *rest])) == "🙂", name


def test_only_special_tokens_are_skipped(opened):
    ids = opened["qwen"].encode("<think>a<|im_end|>")
    assert streamed(opened["qwen"], ids) == ["<think>", "a", "", ""]
    assert streamed(opened["qwen"], ids, skip=False) == ["<think>", "a", "<|im_end|>", ""]


def test_text_cut_within_a_character_ends_with_a_replacement(opened):
    for name, expected in (("qwen", ["a", "", "", "", "\ufffd"]), ("llama2", ["", "a", "", "", "", "\ufffd" * 3])):
        ids = opened[name].encode("a🙂", add_special_tokens=False)[:-1]
        assert streamed(opened[name], ids) == expected, name


def test_ordinary_tokens_come_at_once_with_their_spaces(opened):
    ours = opened["llama2"]
    ids = [ours.id_of(t) for t in ("▁hello", "▁", "▁h", "</s>", "▁h", "i")]
    assert streamed(ours, ids) == ["hello", " ", " h", "", " h", "i", ""]


def test_a_long_stream_decodes_a_short_window(opened):
    rng, ours = random.Random(7), opened["llama2"]
    stream = ours.stream()
    ordinary = [i for i in range(ours.n_vocab) if i not in ours._fallback_ids]
    for _ in range(2000):
        stream.push(rng.choice(ordinary))
        # The last piece and its context are one token each; a space at the very beginning can add one.
        assert len(stream._window) <= 3


def test_a_token_beyond_the_embedding_is_refused_where_a_text_needs_it(tmp_path):
    tokenizer = llama2()
    tokenizer.add_special_tokens([AddedToken("<far>", special=True)])
    far = tokenizer.get_vocab_size() - 1
    ours = Tokenizer(write(tmp_path, tokenizer, {"bos_token": "<s>", "eos_token": "<far>"}), far)
    assert (ours.n_vocab, ours.bos_id, ours.eos_id, ours.id_of("<far>")) == (far + 1, 1, None, None)
    assert len(ours.token_bytes) == len(ours.token_texts) == far and "<far>" not in ours.token_texts
    assert ours.decode(ours.encode("hello")) == "".join(streamed(ours, ours.encode("hello"))) == "hello"
    with refused(f"text: expected ids below {far}, the rows of the embedding, found {far} ('<far>')"):
        ours.encode("a<far>b")
    assert ours.spell("a<far>b") == [] != ours.spell("ab")
    assert Tokenizer(tmp_path, far + 1).encode("<far>")[-1] == far
    ends = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<q>", "type_id": 0}}], "pair": [],
            "special_tokens": {"<q>": {"id": "<q>", "ids": [70000], "tokens": ["<q>"]}}}  # fmt: skip
    added = json.dumps(json.loads(llama2().to_str()) | {"post_processor": ends})
    (tmp_path / "tokenizer.json").write_text(added)
    with refused("text: expected ids below 400, the rows of the embedding, found 70000 (null)"):
        Tokenizer(tmp_path, 400).encode("a")


@pytest.mark.parametrize("template, expected", [
    ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe."),
    ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe."),
    ("{{ dict.update(messages[0], {'content': 'x'}) }}", "'<run_path>._Dict object' has no attribute 'update'"),
    ("{{ dict.fromkeys.__self__.update }}", "access to attribute '__self__' of 'builtin_function_or_method' object is unsafe."),
    ("{{ namespace(_x=1) }}", "namespace: expected a name without a leading _, found '_x'"),
    ("{% set ns = namespace() %}{% set ns.__html__ = 1 %}", "namespace: expected a name without a leading _, found '__html__'"),
    ("{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['os'] }}", "access to attribute '__globals__' of 'function' object is unsafe."),
    ("{{ '{0.__class__.__mro__}'.format(1) }}", "access to attribute '__class__' of 'int' object is unsafe."),
    ("{% include 'tokenizer.json' %}", "no loader for this environment specified"),
    ("{{ range(10 ** 9) | length }}", "Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)."),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    ("{{ 1 + none }}", "unsupported operand type(s) for +: 'int' and 'NoneType'"),
    ("{{ raise_exception('no system role') }}", "no system role"),
])  # fmt: skip
def test_a_template_that_fails_or_reaches_out(tmp_path, template, expected):
    ours = Tokenizer(write(tmp_path, llama2(), jinja=template), 400)
    with pytest.raises(ConfigError) as error:
        ours.render(user("hi"))
    # Python words the end of the stack in more than one way.
    assert str(error.value).startswith(f"{tmp_path}/chat_template.jinja: {expected}")


@pytest.mark.parametrize("messages, expected", [
    ("hi", "messages: expected a list of messages, found 'hi'"),
    ([], "messages: expected a list of messages, found []"),
    ([*user("a"), "b"], "messages[1]: expected a dict with a role, found 'b'"),
    ([{"content": "a"}], "messages[0]: expected a dict with a role, found {'content': 'a'}"),
    ([{"role": 1, "content": "a"}], "messages[0]: expected a dict with a role, found {'content': 'a', 'role': 1}"),
    ([*user("a"), {"role": "assistant", "content": 5}], "messages[1]: content: expected a string or a list of parts, found 5"),
    ([{"role": "user", "content": "a", "file": Path("x")}], f"messages[0]: expected JSON values: Object of type {type(Path('x')).__name__} is not JSON serializable"),
])  # fmt: skip
def test_malformed_messages(opened, messages, expected):
    with refused(expected):
        opened["qwen"].render(messages)


def test_a_variable_with_methods_is_refused(opened):
    message = f"template: 'where': expected JSON values: Object of type {type(Path('x')).__name__} is not JSON serializable"
    with refused(message):
        opened["qwen"].chat(user("a"), where=Path("x"))


def test_no_template(tmp_path):
    ours = Tokenizer(write(tmp_path, llama2()), 400)
    with refused(f"{tmp_path}/tokenizer_config.json: chat_template: expected a chat template (or chat_template.jinja), found none"):
        ours.chat(user("a"))
    ours = Tokenizer(write(tmp_path, llama2(), {"chat_template": {"rag": "{%", "tool_use": "t"}}), 400)
    assert ours.render(user("a"), tools=[]) == "t"
    with refused(f"{tmp_path}/tokenizer_config.json: chat_template: expected a chat template (or chat_template.jinja), found only 'rag', 'tool_use'"):
        ours.chat(user("a"))


@pytest.mark.parametrize("bad", [-1, 400, 1.0, "1"])
def test_ids_out_of_range(tmp_path, bad):
    ours = Tokenizer(write(tmp_path, llama2()), 400)
    for decode in (lambda: ours.decode([1, bad]), lambda: ours.stream().push(bad)):
        with refused(f"ids: expected integers from 0 to 399, found {bad!r}"):
            decode()


def test_texts_that_have_no_ids(tmp_path, opened):
    with pytest.raises(ConfigError, match=r"^text: expected Unicode text, found the lone surrogate U\+D83D at 2$"):
        opened["qwen"].encode("ab\ud83d")
    words = tokenizers.Tokenizer(WordLevel({"a": 0}, unk_token="?"))
    with pytest.raises(ConfigError, match=r"^text: WordLevel error: Missing \[UNK\] token from the vocabulary$"):
        Tokenizer(write(tmp_path, words), 1).encode("b")
    assert Tokenizer(tmp_path, 1).spell("b") == []
