"""Chats become transformers' prompts and ids: what published chat templates do, in templates of our own."""

# ruff: noqa: E501  (templates)

import json

import pytest
from checkpoints import byte_level

from skipkv import ConfigError
from skipkv.load.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", minversion="5.24")

pytestmark = pytest.mark.oracle

LOOP = "{% for message in messages %}BODY{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def loop(body):
    return LOOP.replace("BODY", body)


FEATURES = {
    "chatml": loop("{{ '<b>' + message['role'] + '\\n' + message['content'] + '<e>' + '\\n' }}"),
    "default system": "{% if messages[0].role != 'system' %}<b>system\nBe kind.<e>\n{% endif %}" + loop("<b>{{ message.role }}\n{{ message.content }}<e>\n"),
    "dates": "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "Today: {{ date_string }}\n{% if tools is not none %}Environment: ipython\n{% endif %}" + loop("<b>{{ message['role'] }}<e>\n\n{{ message['content'] | trim }}<e>"),
    "thoughts dropped": "{% set ns = namespace(system='', tool=false) %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}"
    "{{ bos_token }}{{ ns.system }}" + loop("{% if message.role == 'assistant' and message.content is not none %}{% set content = message.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<a>' + content + eos_token }}"
    "{% elif message.role == 'user' %}{{ '<u>' + message.content }}{% endif %}").replace("<a>{% endif %}", "<a><think>\n{% endif %}"),
    "thinking switched": """
{%- if tools %}
    {{- '<b>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n<e>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string and not (message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<b>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<b>assistant\\n' + content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}
                {%- set call = call.function %}
            {%- endif %}
            {{- '\\n<call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {%- if call.arguments is string %}
                {{- call.arguments }}
            {%- else %}
                {{- call.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</call>' }}
        {%- endfor %}
        {{- '<e>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<b>user' }}
        {%- endif %}
        {{- '\\n<tool>\\n' + content + '\\n</tool>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<e>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<b>' + message.role + '\\n' + content + '<e>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<b>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "alternation": "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% set turns = messages[1:] if system else messages %}{{ bos_token }}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate: ' + m.role) }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ system + '\n\n' if loop.last and system else '' }}{{ m.content.strip() }} [/INST]{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
    "tool calls": loop("{% if message.tool_calls is defined %}{% for call in message.tool_calls %}{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson(indent=2) }}"
    "{{ call.function.arguments | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}{{ ', ' if not loop.last }}{% endfor %}"
    "{% elif message.role == 'tool' %}[{{ message.name }}|{{ message.tool_call_id }}|{{ message.content }}]{% else %}{{ message.content }}{% endif %}"),
    "content parts": loop("{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ message.content | rejectattr('type', 'equalto', 'text') | map(attribute='type') | join(',') }}{% endif %}\n"),
    "null content": loop("{{ message.role }}:{{ 'content' in message }}:{{ message.content is none }}:{{ message.content is defined }}:{{ message.tool_calls is defined }}:{{ message.get('content', 'no') }}:{{ message | length }};"),
    "marked generation": loop("{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\n{% else %}{{ message.content }}\n{% endif %}"),
    "scopes of a marked generation": loop("{% set x = 1 %}{% generation %}{% set x = loop.index %}{{ x }}{{ message.role }}{% endgeneration %}{{ x }}"),
    "a marked generation is no loop": loop("{% generation %}{% continue %}{% endgeneration %}"),
    "loop controls": loop("{% if message.role == 'system' %}{% continue %}{% endif %}{% if loop.index0 > 2 %}{% break %}{% endif %}{{ loop.index }}{{ loop.previtem.role if loop.previtem is defined }}{{ loop.cycle('x', 'y') }}{{ message.content }}"),
    "macros": "{% macro turn(role, body='none', sep='|') -%}\n    <{{ role }}{{ sep }}{{ body }}{{ caller() if caller else '' }}>\n{%- endmacro %}"
    + loop("{{ turn(message.role, message.content) }}{% call turn('x', sep=loop.index) %}in{% endcall %}"),
    "strings": loop("{% set c = message.content | default('', true) %}{{ c.upper() }}{{ c.split() | join('+') }}{{ c.replace('a', 'b')[:20] }}{{ c.startswith('h') }}{{ c.lower().title() }}{{ '%s/%d' | format(c, loop.index) }}{{ '{:>9}'.format(message.role) }}"
    "{{ c | length }}{{ c | replace('h', 'H') | capitalize }}{{ c | first | default('?') }}{{ (c | string)[::-1] }}{{ c | trim | indent(2) }}{{ c is string }}{{ c | e }}"),
    "documents": "{% if documents %}{% for d in documents %}Document {{ loop.index0 }}: {{ d.title }}\n{{ d['text'] | upper }}\n{% endfor %}{{ documents | tojson }}{% endif %}" + loop("{{ message.content }}"),
    "items": "{% for t in tools or [] %}{% for k, v in t.function.items() %}{{ k }}={{ v if v is string else v | tojson }};{% endfor %}{{ t.function.parameters.properties | dictsort | list }}{% endfor %}"
    "{% set d = dict(a=1, **{'b': 2}) %}{{ d }}{{ dict.fromkeys(['x', 'y'], 0) }}{% set ns = namespace(n=0, self=1) %}" + loop("{% set ns.n = ns.n + message | length %}") + "{{ ns.n }}{{ ns.self }}",
    "special tokens": "{{ [bos_token, eos_token, pad_token, unk_token is defined] }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ enable_thinking | default('unset') }}{{ nothing }}",
    "reasoning": loop("{{ message.reasoning_content | default('-') }}{{ message.thinking | default('-') }}{{ message.reasoning | default('-') }}{{ message.keys() | list }}"),
    "refused": "{{ raise_exception('not today') }}",
    "undefined": loop("{{ message.content.missing.more }}"),
    "namespace": "{% set ns = namespace() %}{% set ns._hidden = 1 %}{{ ns._hidden }}",
    "whitespace": "\n  {% if true %}\n    a  \n  {%- endif %}\n\t{# note #}\n  {%+ if true %} b{% endif %}\r\n" + loop("\n  {{ message.content }}  \n\n"),
}  # fmt: skip
NAMED = {
    "list": {"chat_template": [{"name": "default", "template": loop("d{{ message.content }}")}, {"name": "tool_use", "template": "t{{ tools | length }}"}]},
    "dict": {"chat_template": {"rag": "r", "default": "d{{ messages | length }}"}},
    "no default": {"chat_template": [{"name": "tool_use", "template": "t{{ tools | length }}"}, {"name": "rag", "template": "{%"}]},
    "twice": {"chat_template": [{"name": "default", "template": "1"}, {"name": "default", "template": "2"}]},
    "none": {},
}  # fmt: skip
FILES = {
    "file": {"chat_template.jinja": "f"},
    "file and more": {"chat_template.jinja": "f", "additional_chat_templates/tool_use.jinja": "t"},
    "more": {"additional_chat_templates/tool_use.jinja": "t", "additional_chat_templates/other.txt": "x"},
    "default among more": {"chat_template.jinja": "f", "additional_chat_templates/default.jinja": "m"},
}


def user(text):
    return {"role": "user", "content": text}


CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"b": [1, None, 2.5], "a": "é<\n"}}}
CHATS = [
    [user("hello there")],
    [{"role": "system", "content": "Short."}, user(" 12 + 30? "), {"role": "assistant", "content": "<think>\nhm\n</think>\n\n42"}, user("a")],
    [user("a"), {"role": "assistant", "content": "b", "reasoning_content": "why"}],
    [user("a"), {"role": "assistant", "thinking": "why", "content": "b", "tool_calls": None}, user("日本\u2028 🙂 <think>")],
    [user("add"), {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}, {"role": "tool", "name": "add", "tool_call_id": "1", "content": "3"}, {"role": "tool", "content": "4"}],
    [user("add"), {"role": "assistant", "tool_calls": [CALL], "reasoning": "r"}, {"role": "tool", "name": None, "content": "3"}, {"role": "assistant", "content": "three"}],
    [user([{"type": "text", "text": "look: "}, {"type": "image"}, {"type": "text", "text": "what?"}])],
    [user("a"), user("b")],
    [{"role": "assistant", "content": ""}, {"role": "odd", "content": "<e>", "weight": 0}],
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds <é>.", "parameters": {"properties": {"b": {"type": "number"}, "a": {"enum": [1, None]}}}}}
VARIABLES = [
    {},
    {"enable_thinking": False},
    {"enable_thinking": True, "date_string": "26 Jul 2024"},
    {"tools": [TOOL, TOOL], "documents": [{"title": "T", "text": "é"}]},
    {"tools": [], "documents": []},
    {"bos_token": "!", "date_string": None},
]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level("[a-z]+|[^a-z]+", ("<s>", "</s>", "<e>"), ("<b>", "<a>", "<think>", "</think>"), bos="<s>")


@pytest.fixture
def pair(tmp_path, tokenizer):
    """Our tokenizer and transformers', of these settings and files."""

    def opened(settings, files=None):
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(special | settings))
        for name, text in (files or {}).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        oracle = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path, local_files_only=True)
        return Tokenizer(tmp_path, tokenizer.get_vocab_size()), oracle

    return opened


def compare(ours, oracle):
    """The prompts, None where both refuse."""
    prompts = []
    for chat in CHATS:
        for variables in VARIABLES:
            for add in (False, True):
                about = f"{chat} {variables} {add}"
                try:
                    expected = oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=add, **variables)
                except Exception:  # of jinja, or whatever the template runs into
                    with pytest.raises(ConfigError):
                        print(about, ours.render(chat, add, **variables))
                    prompts.append(None)
                    continue
                assert ours.render(chat, add, **variables) == expected, about
                ids = oracle.apply_chat_template(chat, add_generation_prompt=add, return_dict=False, **variables)
                assert ours.chat(chat, add, **variables) == ids, about
                prompts.append(expected)
    return prompts


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_published_templates(pair, name):
    prompts = compare(*pair({"chat_template": FEATURES[name]}))
    refusing = name in ("refused", "undefined", "namespace", "a marked generation is no loop")
    assert len(set(prompts)) > 4 if not refusing else set(prompts) == {None}


@pytest.mark.parametrize("name", NAMED)
def test_templates_by_name(pair, name):
    assert set(compare(*pair(NAMED[name]))) != {None} or name == "none"


@pytest.mark.parametrize("name", FILES)
def test_templates_in_files(pair, name):
    assert set(compare(*pair(NAMED["list"], FILES[name]))) != {None}


def test_what_is_no_list_of_objects_is_refused(pair):
    ours, oracle = pair({"chat_template": "{{ tools }}{{ documents }}"})
    for variables in ({"tools": ["add"]}, {"documents": ["text"]}):
        with pytest.raises((ValueError, TypeError)):
            oracle.apply_chat_template(CHATS[0], tokenize=False, **variables)
        [name] = variables
        with pytest.raises(ConfigError, match=f"^template: '{name}': expected a list of objects, found "):
            ours.render(CHATS[0], **variables)
