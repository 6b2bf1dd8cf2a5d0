"""Every message with which loading refuses: what is done to the files of a model, and the sentence that follows."""

# ruff: noqa: E501  (a broken file and the sentence it must get stand on one line)

import json
import os
import signal
import struct
import threading

import pytest
from checkpoints import LLAMA3_ROPE, MISTRAL, QWEN2, QWEN3, SMOLLM3, pack, safetensors, write, write_tokenizer

from skipkv import CheckpointError, ConfigError, Trace
from skipkv.eval.store import RESULTS, RUNS, Store
from skipkv.load.checkpoint import open_checkpoint
from skipkv.load.texts import json_lines
from skipkv.load.tokenizer import Tokenizer
from skipkv.steering import load_vectors
from skipkv.vectors import read_torch_tensor

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WORDS, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
ADAPTER, GENERATION = "adapter_config.json", "generation_config.json"


def put(path, content):
    """Bytes or text; None: no such file; a dict: changes of what is there; else what makes the file."""
    if isinstance(content, dict) and path.suffix == ".safetensors":
        raw = path.read_bytes()
        data = 8 + int.from_bytes(raw[:8], "little")
        tensors = {
            name: (e["dtype"], e["shape"], raw[data + e["data_offsets"][0] : data + e["data_offsets"][1]])
            for name, e in json.loads(raw[8:data]).items() if name != "__metadata__"
        }  # fmt: skip
        content = pack(change(tensors, content))
    elif isinstance(content, dict):
        values = json.loads(path.read_text()) if path.exists() else {}
        change(values["weight_map"] if path.name == INDEX else values, content)
        content = json.dumps(values)
    path.unlink(missing_ok=True)
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def change(values, changes):
    values |= changes
    for key in [key for key, value in changes.items() if value is None]:
        del values[key]
    return values


def load(directory):
    with open_checkpoint(directory) as checkpoint:
        Tokenizer(checkpoint.path, checkpoint.config.vocab)


def message(directory, file="", opened=load, kind=CheckpointError):
    with pytest.raises(kind) as error:
        opened(directory / file)
    assert len(str(error.value)) < 1000 and str(error.value).isprintable()
    return str(error.value).replace(str(directory), "DIR")


# ---------------------------------------------------------------------------------------------------------------------
# Something else in a file's place

CAUSES = {
    "a git-lfs pointer (the file itself was never fetched: git lfs pull)": [b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"],
    "a GGUF file (take the safetensors that it was made from)": [b"GGUF\3\0\0\0" + bytes(40)],
    "a zip archive (torch.save's format)": [b"PK\3\4\0\0\x08\x08" + bytes(60)],
    "a pickle (torch.save's older format)": [b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\4\x95\x0c\0\0\0\0\0\0\0."],
    "an HTML or XML page (a download's error page)": [b"<!DOCTYPE html>\n<html>", b"\n <html lang=en>", b'\xef\xbb\xbf<?xml version="1.0"?><Error>'],
    "an empty file": [b""],
    "UTF-16 text (save it as UTF-8)": ['{"a": 1}'.encode(code) for code in ("utf-16", "utf-16-le", "utf-16-be")],
    "UTF-32 text (save it as UTF-8)": ['{"a": 1}'.encode(code) for code in ("utf-32", "utf-32-le", "utf-32-be")],
}  # fmt: skip
VECTORS, TRACE, LINES, TENSOR = "v.safetensors", "t.npz", "p.jsonl", "v.pt"
PLACES = {
    **dict.fromkeys((CONFIG, GENERATION, INDEX, WORDS, SETTINGS, ADAPTER), "a JSON object"), TEMPLATE: "a chat template",
    **dict.fromkeys((SINGLE, SECOND, VECTORS), "a safetensors file"), TRACE: "a skipkv trace", LINES: "JSON lines",
    TENSOR: "a zip archive of torch.save",
}  # fmt: skip
OPENERS = {VECTORS: load_vectors, TRACE: Trace.load, LINES: lambda path: list(json_lines(path)), TENSOR: read_torch_tensor}


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("place", PLACES)
def test_something_else_in_a_files_place(tmp_path, place, cause):
    write(tmp_path, shards=1 if place == SINGLE else 2)
    write_tokenizer(tmp_path, 40)
    for raw in CAUSES[cause] if (place, cause[:5]) not in ((TRACE, "a zip"), (TENSOR, "a zip")) else ():
        put(tmp_path / place, raw)
        given = (tmp_path, place, OPENERS[place]) if place in OPENERS else (tmp_path,)
        found = message(*given, kind=ConfigError if place == LINES else CheckpointError)
        assert found == f"DIR/{place}: expected {PLACES[place]}, found {cause}"


@pytest.mark.parametrize("place, raw, found", [
    (TRACE, bytes(100), "expected a skipkv trace, found something else"),
    (TRACE, b"PK\3\4", "expected a skipkv trace, found something else"),
    (TENSOR, bytes(100), "expected a zip archive of torch.save, found something else"),
    (TENSOR, b"PK\5\6" + bytes(18), "expected a tensor of torch.save: \"There is no item named 'archive/data.pkl' in the archive\""),
], ids="trace-zeros trace-cut tensor-zeros tensor-none".split())  # fmt: skip
def test_what_nobody_knows_in_an_archives_place(tmp_path, place, raw, found):
    put(tmp_path / place, raw)
    assert message(tmp_path, place, OPENERS[place]) == f"DIR/{place}: {found}"


@pytest.mark.parametrize("cause", CAUSES)
def test_a_file_in_a_models_place(tmp_path, cause):
    for raw in CAUSES[cause]:
        put(tmp_path / "m.gguf", raw)
        expected = f"DIR/m.gguf: expected a directory with config.json, found {cause}"
        assert message(tmp_path, "m.gguf", open_checkpoint) == expected


@pytest.fixture
def in_time():
    """An error in place of a test that waits for ever."""
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("place", [*sorted(PLACES.keys() - {LINES}), RUNS, RESULTS])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_has_no_end_is_no_file(tmp_path, place, make, in_time):
    write(tmp_path, shards=1 if place == SINGLE else 2)
    write_tokenizer(tmp_path, 40)
    put(tmp_path / place, make)
    openers = OPENERS | dict.fromkeys((RUNS, RESULTS), lambda path: Store(path.parent))
    given = (tmp_path, place, openers[place]) if place in openers else (tmp_path,)
    assert message(*given) == f"DIR/{place}: expected a file, found something else"


def test_json_lines_come_through_pipes(tmp_path, in_time):
    os.mkfifo(tmp_path / "lines")
    with pytest.raises(ConfigError, match="lines: expected JSON lines, found an empty file"):
        list(json_lines(tmp_path / "lines"))
    with pytest.raises(CheckpointError, match="/dev/zero: expected a file, found something else"):
        list(json_lines("/dev/zero"))
    read, written = os.pipe()
    threading.Timer(0.3, lambda: (os.write(written, b'"a"\n"b"'), os.close(written))).start()
    assert list(json_lines(f"/dev/fd/{read}")) == [(1, "a"), (2, "b")]
    os.close(read)


def test_a_byte_order_mark_is_read(tmp_path):
    write(tmp_path, shards=2)
    write_tokenizer(tmp_path, 40)
    put(tmp_path / GENERATION, '{"eos_token_id": 1}')
    put(tmp_path / SETTINGS, '{"bos_token": "w1"}')
    put(tmp_path / TEMPLATE, "{{ messages[0].content }}")
    put(tmp_path / LINES, '"a"\n"b"\n')
    for file in (CONFIG, INDEX, WORDS, GENERATION, SETTINGS, TEMPLATE, LINES):
        put(tmp_path / file, b"\xef\xbb\xbf" + (tmp_path / file).read_bytes())
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.generation == {"eos_token_id": 1}
    tokenizer = Tokenizer(tmp_path, 40)
    assert tokenizer.bos_id == 1 and tokenizer.render([{"role": "user", "content": "x"}]) == "x"
    assert list(json_lines(tmp_path / LINES)) == [(1, "a"), (2, "b")]


# ---------------------------------------------------------------------------------------------------------------------
# Files that are wrong in themselves


def above_the_limit(path):
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)  # sparse


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


A, B = entry(), entry(offsets=(4, 8))
MODEL = "DIR/model.safetensors: "
NO_ENTRY = MODEL + "tensor 'a': expected an object of dtype, shape and data_offsets, found "
SHAPE, OFFSETS = MODEL + "tensor 'a': shape: expected ", MODEL + "tensor 'a': data_offsets: expected "
WEIGHTS = [
    (b"\2\0\0\0{}", MODEL + "expected 8 bytes of header size, found a file of 6 bytes"),
    (b"\3\0\0\0\0\0\0\0{}", MODEL + "header: expected at most 2 bytes, found a header size of 3"),
    (b"\xff" * 8 + b"{}", MODEL + "header: expected at most 2 bytes, found a header size of 18446744073709551615"),
    (b"\0" * 8, MODEL + "header: invalid JSON: Expecting value: line 1 column 1 (char 0)"),
    (b"\2\0\0\0\0\0\0\0\x80\x04", MODEL + "header: expected UTF-8, found byte 0x80 at 0"),
    (above_the_limit, MODEL + "header: expected at most 100000000 bytes, found a header size of 100000001"),
    (b"\2\0\0\0\0\0\0\0[]", MODEL + "header: expected a JSON object, found []"),
    (b"\2\0\0\0\0\0\0\0{x", MODEL + "header: invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (safetensors(b'{"a":{},"a":{}}'), MODEL + "header: invalid JSON: duplicate key 'a'"),
    (safetensors(b'{"a":{"dtype":"F32","dtype":"F16"}}'), MODEL + "header: invalid JSON: duplicate key 'dtype'"),
    (safetensors({"__metadata__": {"format": 1}}), MODEL + "header: __metadata__: expected an object of strings, found {'format': 1}"),
    (safetensors({"__metadata__": None}), MODEL + "header: __metadata__: expected an object of strings, found null"),
    (safetensors({"a": 7}), NO_ENTRY + "7"),
    (safetensors({"a": {}}), NO_ENTRY + "{}"),
    (safetensors({"a": {"dtype": "F32", "shape": []}}), NO_ENTRY + "{'dtype': 'F32', 'shape': []}"),
    *[
        (safetensors({"a": entry(dtype)}, bytes(4)), MODEL + f"tensor 'a': dtype: expected F32 or F16 or BF16, found {found}")
        for dtype, found in [("I8", "'I8'"), ("F8_E4M3", "'F8_E4M3'"), ("U32", "'U32'"), ("F64", "'F64'"), ("f32", "'f32'"), (4, "4"), ([], "[]")]
    ],
    (safetensors({"a": A | {"shape": 1}}), SHAPE + "at most 8 sizes, found 1"),
    *[(safetensors({"a": entry(shape=s)}), SHAPE + f"at most 8 sizes, found {s}") for s in ([-1], [1.0], [True], ["1"], [1 << 64])],
    (safetensors({"a": entry(shape=[1] * 9)}), SHAPE + "at most 8 sizes, found [1, 1, 1, 1, 1, 1, 1, 1, ...]"),
    (safetensors({"a": entry(shape=[1 << 32, 1 << 32])}), SHAPE + "less than 2^63 bytes, found [4294967296, 4294967296]"),
    (safetensors({"a": A | {"data_offsets": 4}}), OFFSETS + "a first byte and an end, found 4"),
    *[(safetensors({"a": entry(offsets=o)}, bytes(4)), OFFSETS + f"a first byte and an end, found {o}") for o in ([4], [0, 4, 8], [0, "4"], [-4, 0], [0, 4.0])],
    *[(safetensors({"a": entry(offsets=o)}, bytes(4)), OFFSETS + f"4 bytes for F32 [1], found {o}") for o in ([4, 0], [0, 3])],
    (safetensors({"a": entry(shape=[0, 5], offsets=[0, 4])}, bytes(4)), OFFSETS + "0 bytes for F32 [0, 5], found [0, 4]"),
    (safetensors({"a": A}, bytes(3)), OFFSETS + "an end within the file's 3 bytes of data, found [0, 4]"),
    (safetensors({"a": entry(offsets=[1 << 40, (1 << 40) + 4])}, bytes(4)), OFFSETS + "an end within the file's 4 bytes of data, found [1099511627776, 1099511627780]"),
    (safetensors({"a": A, "b": A}, bytes(4)), MODEL + "tensor 'b': expected to begin at byte 4 of the data, where the tensor before it ends, found 0 (an overlap)"),
    (safetensors({"a": A, "b": entry(offsets=[8, 12])}, bytes(12)), MODEL + "tensor 'b': expected to begin at byte 4 of the data, where the tensor before it ends, found 8 (a hole)"),
    (safetensors({"b": B}, bytes(8)), MODEL + "tensor 'b': expected to begin at byte 0 of the data, where the tensor before it ends, found 4 (a hole)"),
    (safetensors(json.dumps({"a": A}).encode().ljust(64), bytes(9)), MODEL + "expected 76 bytes as the header says, found 81"),
    (safetensors({}), "DIR: expected the 21 tensors that config.json calls for, found missing 21: 'lm_head.weight', "
     "'model.embed_tokens.weight', 'model.layers.0.input_layernorm.weight', 'model.layers.0.mlp.down_proj.weight', …"),
]  # fmt: skip

EMBEDDING, Q = ("BF16", (40, 16), bytes(1280)), "model.layers.0.self_attn.q_proj"
CALLS_FOR = "DIR: expected the 21 tensors that config.json calls for, found "
TENSORS = [
    ({"lm_head.weight": None}, CALLS_FOR + "missing 1: 'lm_head.weight'"),
    ({f"model.layers.{i}.{name}.weight": None for i in (0, 1) for name in ("self_attn.k_proj", "mlp.up_proj", "input_layernorm")},
     CALLS_FOR + "missing 6: 'model.layers.0.input_layernorm.weight', 'model.layers.0.mlp.up_proj.weight', "
     "'model.layers.0.self_attn.k_proj.weight', 'model.layers.1.input_layernorm.weight', …"),
    ({f"{Q}.bias": ("F32", (16,), bytes(64))}, CALLS_FOR + f"surplus 1: '{Q}.bias'"),
    ({"model.norm.weight": None, "norm.weight": ("F32", (16,), bytes(64))}, CALLS_FOR + "missing 1: 'model.norm.weight'; surplus 1: 'norm.weight'"),
    ({f"{Q}.weight": ("BF16", (16, 15), bytes(480))}, MODEL + f"tensor '{Q}.weight': expected shape [16, 16], found [16, 15]"),
    ({f"{Q}.weight": ("BF16", (256,), bytes(512))}, MODEL + f"tensor '{Q}.weight': expected shape [16, 16], found [256]"),
    ({"model.norm.weight": ("F32", (), bytes(4))}, MODEL + "tensor 'model.norm.weight': expected shape [16], found []"),
    ({"model.norm.weight": ("F32", (0,), b"")}, MODEL + "tensor 'model.norm.weight': expected shape [16], found [0]"),
]  # fmt: skip
NOT_BESIDE = f"DIR/{INDEX}: tensor 'lm_head.weight': expected the name of a .safetensors file beside the index, found "
SHARDS = [
    ({INDEX: "{"}, f"DIR/{INDEX}: invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ({INDEX: "[]"}, f"DIR/{INDEX}: expected a JSON object, found []"),
    ({INDEX: "{}"}, f"DIR/{INDEX}: weight_map: expected an object, tensor to file name, found null"),
    ({INDEX: '{"weight_map": {}}'}, f"DIR/{INDEX}: weight_map: expected an object, tensor to file name, found {{}}"),
    ({INDEX: '{"weight_map": {"a": "b", "a": "c"}}'}, f"DIR/{INDEX}: invalid JSON: duplicate key 'a'"),
    *[({INDEX: {"lm_head.weight": file}}, NOT_BESIDE + repr(file)) for file in ("../other/model.safetensors", "/etc/model.safetensors",
      "..\\model.safetensors", "C:model.safetensors", "a\0.safetensors", "\ud800.safetensors", "..", "pytorch_model.bin", 1)],
    ({SECOND: None}, f"DIR/{SECOND}: expected a file, found nothing"),
    ({SECOND: os.mkdir}, f"DIR/{SECOND}: expected a file, found something else"),
    ({SECOND: os.mkfifo}, f"DIR/{SECOND}: expected a file, found something else"),
    ({SECOND: lambda path: path.symlink_to(SECOND)}, f"DIR/{SECOND}: expected a file, found nothing"),
    ({INDEX: {"lm_head.weight": "x" * 300 + ".safetensors"}}, "DIR/" + "x" * 300 + ".safetensors: cannot be read: File name too long"),
    ({INDEX: {"lm_head.weight": SECOND}}, f"DIR/{INDEX}: tensor 'lm_head.weight': expected in '{SECOND}', found in '{FIRST}'"),
    ({INDEX: {"a": FIRST}}, f"DIR/{INDEX}: tensor 'a': expected in '{FIRST}', found in no file"),
    ({FIRST: {"a": EMBEDDING}}, f"DIR/{FIRST}: expected only tensors that {INDEX} lists, found 1: 'a'"),
    ({INDEX: {"lm_head.weight": None}}, f"DIR/{FIRST}: expected only tensors that {INDEX} lists, found 1: 'lm_head.weight'"),
    ({SECOND: {"lm_head.weight": EMBEDDING}}, f"DIR/{SECOND}: tensor 'lm_head.weight': expected in one file, found in '{FIRST}' too"),
]  # fmt: skip

NO_WEIGHTS = "DIR: expected model.safetensors or model.safetensors.index.json, found "
AN_ADAPTER = "DIR: expected a model, found a PEFT adapter; merge it into its base model first (merge_and_unload)"
CONVERT = "AutoTokenizer.from_pretrained('DIR').save_pretrained('DIR')"
FILES = [
    ({CONFIG: None}, "DIR/config.json: expected a file, found nothing"),
    ({CONFIG: None, "training_args.bin": ""}, "DIR/config.json: expected a file, found nothing"),
    ({CONFIG: None, SINGLE: None, "m.gguf": "", "a.pt": ""}, "DIR: expected config.json, found 2: 'a.pt', 'm.gguf' (convert to safetensors)"),
    ({SINGLE: None}, NO_WEIGHTS + "neither"),
    ({SINGLE: None, "pytorch_model.bin": ""}, NO_WEIGHTS + "only 1: 'pytorch_model.bin' (convert to safetensors)"),
    ({SINGLE: None, "m.gguf": "", "a.pt": ""}, NO_WEIGHTS + "only 2: 'a.pt', 'm.gguf' (convert to safetensors)"),
    ({SINGLE: None, FIRST: ""}, NO_WEIGHTS + f"only 1: '{FIRST}'"),
    ({ADAPTER: '{"base_model_name_or_path": "o/m"}'}, AN_ADAPTER.replace(";", " of 'o/m';")),
    *[({CONFIG: None, SINGLE: None, file: ""}, AN_ADAPTER) for file in ("adapter_model.safetensors", "adapter_model.bin")],
    ({ADAPTER: "{}", CONFIG: None}, AN_ADAPTER),
    ({ADAPTER: "[]"}, f"DIR/{ADAPTER}: expected a JSON object, found []"),
    *[({WORDS: None, file: ""}, f"DIR/{WORDS}: expected a file, found only '{file}' (with transformers: {CONVERT})") for file in ("tokenizer.model", "vocab.json")],
    ({GENERATION: "[]"}, f"DIR/{GENERATION}: expected a JSON object, found []"),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# config.json: a key, what it should be, what was found

ARCHITECTURES = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM"
INTEGERS = {
    "num_hidden_layers": 1024, "num_attention_heads": 1024, "num_key_value_heads": 1024, "hidden_size": 131072,
    "intermediate_size": 1048576, "vocab_size": 4194304, "max_position_embeddings": 16777216, "head_dim": 512,
}  # fmt: skip
ROPE_TYPES = "one of 'default', 'linear', 'dynamic', 'llama3', 'yarn'"
BOOLEAN, FACTOR = "true or false", "a number from 1 to 1e+06"
ONE_ROPE = "one set of RoPE parameters for all layers"
NAN, INF = float("nan"), float("inf")
VALUES = [
    ("architectures", (None, [], "LlamaForCausalLM", [[]], ["PhiForCausalLM"]), f"one of {ARCHITECTURES}"),
    ("model_type", ("mistral",), "'llama', which goes with LlamaForCausalLM"),
    ("num_key_value_heads", (3, 8), "a divisor of num_attention_heads = 4"),
    ("hidden_size", (18,), "a multiple of num_attention_heads = 4, as there is no head_dim"),
    ("head_dim", (5,), "an even integer from 2 to 512"),
    ("hidden_act", ("gelu",), '"silu" (others are not supported)'),
    ("pretraining_tp", (2, True), "1 (others are not supported)"),
    ("partial_rotary_factor", (0.5,), "1.0 (others are not supported)"),
    ("rms_norm_eps", (None, 0, "1e-5", NAN), "a number from 1e-12 to 0.1"),
    ("tie_word_embeddings", (1,), BOOLEAN),
    ("attention_bias", ("no",), BOOLEAN),
    ("mlp_bias", (0.0,), BOOLEAN),
    ("use_sliding_window", (1,), BOOLEAN),
    ("layer_types", (["full_attention"],), "a list of num_hidden_layers = 2 names"),
    ("rope_scaling", ("linear",), ONE_ROPE),
    ("rope_parameters", ({"full_attention": {}},), ONE_ROPE),
    ("rope_theta", (-1.0, INF), "a number from 1 to 1e+12"),
    *((key, (0, -4, True, 4.0, "4", high + 1, []), f"an integer from 1 to {high}") for key, high in INTEGERS.items()),
    *((key, (None,), f"an integer from 1 to {high}") for key, high in INTEGERS.items()
      if key not in ("num_key_value_heads", "head_dim")),
]  # fmt: skip


def shown(value):
    return "nothing" if value is None else "true" if value is True else repr(value)


def named(base):
    return {key: base[key] for key in ("architectures", "model_type")}


def yarn(**more):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    return {"rope_parameters": rope | more}


def linear(**more):
    return {"rope_scaling": {"type": "linear"} | more}


CONFIGS = [({key: v}, key, wanted, shown(v)) for key, values, wanted in VALUES for v in values] + [
    ({"hidden_size": 12}, "head_dim", "an even integer from 2 to 512", "3"),
    ({"hidden_size": 4096}, "head_dim", "an even integer from 2 to 512", "1024"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types",
     "only 'full_attention' (others are not supported)", "'sliding_attention'"),
    *(({"quantization_config": {"quant_method": m} if m else {}}, "quantization_config",
       "unquantised weights (F32, F16, BF16)", f"quant_method {m!r}" if m else "quant_method null")
      for m in ("bitsandbytes", "gptq", "awq", "fp8", "")),
    *((linear(type=kind, factor=2.0), "rope_scaling.type", ROPE_TYPES, repr(kind))
      for kind in ("longrope", "")),
    ({"rope_parameters": {"rope_type": "mrope"}}, "rope_parameters.rope_type", ROPE_TYPES, "'mrope'"),
    *((yarn(**{key: value}), f"rope_parameters.{key}", wanted, shown(value)) for key, value, wanted in (
        ("factor", 0.5, FACTOR), ("original_max_position_embeddings", 0, "an integer from 1 to 16777216"),
        ("beta_fast", -1, "a number from 0 to 1e+06"), ("beta_slow", "1", "a number from 0 to 1e+06"),
        ("mscale", NAN, "a number from 0 to 1e+06"), ("mscale_all_dim", [], "a number from 0 to 1e+06"),
        ("attention_factor", 0, "a number from 1e-06 to 1e+06"), ("truncate", 1, BOOLEAN))),
    (yarn(rope_theta=1.0) | {"rope_theta": None}, "rope_parameters.rope_theta", "more than 1", "1.0"),
    (yarn() | {"original_max_position_embeddings": 16}, "rope_parameters.original_max_position_embeddings",
     "16 as in original_max_position_embeddings", "32"),
    *((slides | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_window",
       "null, or at least the context of 128 (sliding windows are not supported)", "64")
      for slides in (named(QWEN2), named(QWEN3), named(MISTRAL), named(SMOLLM3) | {"no_rope_layers": [1, 0]})),
    (named(MISTRAL) | {"max_position_embeddings": 4097}, "sliding_window",
     "null, or at least the context of 4097 (sliding windows are not supported)", "4096"),
    (named(MISTRAL) | {"sliding_window": 0}, "sliding_window", "an integer from 1 to 1073741824", "0"),
    (named(QWEN2) | {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers",
     "an integer from 0 to 1073741824", "-1"),
    *((named(SMOLLM3) | {"no_rope_layers": found}, "no_rope_layers",
       "a list of 0 or 1 for each of num_hidden_layers = 2", repr(found)) for found in ([1], [1, 2], "10", [1, 1.0])),
    (named(SMOLLM3) | {"no_rope_layer_interval": 0}, "no_rope_layer_interval", "an integer from 1 to 16777216", "0"),
    ({"rope_scaling": {"rope_type": 3}}, "rope_scaling.rope_type", ROPE_TYPES, "3"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.rope_type", ROPE_TYPES, "nothing"),
    (linear(), "rope_scaling.factor", FACTOR, "nothing"),
    (linear(factor=0.5), "rope_scaling.factor", FACTOR, "0.5"),
    (linear(factor=True), "rope_scaling.factor", FACTOR, "true"),
    *(({"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != key}}, f"rope_scaling.{key}", what, "nothing")
      for key, what in (("factor", FACTOR), ("low_freq_factor", "a number from 1e-06 to 1e+06"),
                        ("high_freq_factor", "a number from 1e-06 to 1e+06"),
                        ("original_max_position_embeddings", "an integer from 1 to 16777216"))),
    ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "rope_scaling.high_freq_factor",
     "more than low_freq_factor = 1", "1.0"),
    (linear(rope_type="llama3"), "rope_scaling.rope_type", "'linear' as in rope_scaling.type", "'llama3'"),
    ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.rope_theta", "10000.0 as in rope_theta", "5.0"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
     "rope_parameters.partial_rotary_factor", "1.0 (others are not supported)", "0.5"),
]  # fmt: skip
JSON = [
    ("{", "invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ("[]", "expected a JSON object, found []"),
    ("null", "expected a JSON object, found null"),
    (b'{"a": "\xff"}', "expected UTF-8, found byte 0xff at 7"),
    ('{"a": 1, "a": 2}', "invalid JSON: duplicate key 'a'"),
    (bytes(64), "invalid JSON: Expecting value: line 1 column 1 (char 0)"),
]

# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def post(**values):
    return {"post_processor": {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<q>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": values,
    }}  # fmt: skip


def too_large(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse


UNREADABLE = "expected a tokenizer that the tokenizers library reads: "
NO_TEMPLATE = "chat_template: expected a string or a list of {name, template}, found "
TOKENIZERS = [
    (WORDS, None, "expected a file, found nothing"),
    (WORDS, " ", UNREADABLE + "EOF while parsing a value at line 1 column 1"),
    (WORDS, "[]", UNREADABLE + "invalid type: sequence, expected struct Tokenizer at line 1 column 2"),
    (WORDS, "{}", UNREADABLE + "Model missing. at line 1 column 2"),
    (WORDS, '{"model": ', UNREADABLE + "EOF while parsing a value at line 1 column 10"),
    (WORDS, b'{"a": "\xff"}', "expected UTF-8, found byte 0xff at 7"),
    (WORDS, post(), UNREADABLE + "no entry found for key"),  # the library panics, when first used
    (WORDS, {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 0}, "unk_token": "a"}}, "model.vocab: expected an id of its own for each token, found 2 tokens of 1 ids"),
    (WORDS, too_large, f"expected at most 100000000 bytes, found {1 << 40}"),
    (SETTINGS, "[1]", "expected a JSON object, found [1]"),
    (SETTINGS, "{", "invalid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    (SETTINGS, '{"eos_token": 2}', "eos_token: expected a token or an object with its content, found 2"),
    (SETTINGS, '{"bos_token": {"id": 1}}', "bos_token: expected a token or an object with its content, found {'id': 1}"),
    (SETTINGS, '{"split_special_tokens": "no"}', "split_special_tokens: expected true or false, found 'no'"),
    (SETTINGS, '{"chat_template": 5}', NO_TEMPLATE + "5"),
    (SETTINGS, '{"chat_template": {"default": 5}}', NO_TEMPLATE + "{'default': 5}"),
    (SETTINGS, '{"chat_template": [{"name": "rag", "template": null}]}', NO_TEMPLATE + "[{'name': 'rag', 'template': None}]"),
    (SETTINGS, '{"chat_template": [{"name": "default"}, 3]}', NO_TEMPLATE + "[{'name': 'default'}, 3]"),
    (SETTINGS, '{"chat_template": "\\n{% if x %}"}', "chat_template: line 2: Unexpected end of template. Jinja was looking for the following tags: 'elif' or 'else' or 'endif'. The innermost block that needs to be closed is 'if'."),
    (SETTINGS, '{"chat_template": [{"name": "tool_use", "template": "{{"}]}', "chat_template: 'tool_use': line 1: unexpected 'end of template'"),
    (SETTINGS, '{"chat_template": "{% \\u001b[2J %}"}', "chat_template: line 1: unexpected char '\\x1b' at 3"),
    (SETTINGS, json.dumps({"chat_template": "a" * (1 << 18) + "b"}), "chat_template: expected at most 262144 characters, found 262145"),
    (TEMPLATE, "a" * (1 << 18) + "b", "expected at most 262144 bytes, found 262145"),
    (TEMPLATE, b"ab\xff", "expected UTF-8, found byte 0xff at 2"),
    (TEMPLATE, "\n{% if x %}", "line 2: Unexpected end of template. Jinja was looking for the following tags: 'elif' or 'else' or 'endif'. The innermost block that needs to be closed is 'if'."),
]  # fmt: skip

ROWS = [
    *[({SINGLE: content}, sentence) for content, sentence in WEIGHTS + TENSORS],
    ({CONFIG: {"tie_word_embeddings": True}, SINGLE: {"lm_head.weight": ("BF16", (16, 40), bytes(1280))}},
     MODEL + "tensor 'lm_head.weight': expected shape [40, 16], found [16, 40]"),
    *SHARDS, *FILES,
    *[({CONFIG: changes}, f"DIR/config.json: {key}: expected {wanted}, found {found}") for changes, key, wanted, found in CONFIGS],
    *[({CONFIG: content}, f"DIR/config.json: {sentence}") for content, sentence in JSON],
    *[({file: content}, f"DIR/{file}: {sentence}") for file, content, sentence in TOKENIZERS],
]  # fmt: skip


@pytest.mark.parametrize("files, sentence", ROWS, ids=[f"{i}-{'+'.join(files)}" for i, (files, _) in enumerate(ROWS)])
def test_files_that_are_refused(tmp_path, files, sentence):
    write(tmp_path, shards=2 if {INDEX, FIRST, SECOND} & files.keys() and SINGLE not in files else 1)
    write_tokenizer(tmp_path, 40)
    for file, content in files.items():
        put(tmp_path / file, content)
    assert message(tmp_path) == sentence


@pytest.mark.parametrize("cut", [1, 8, 1000])
def test_a_truncated_download_is_refused(tmp_path, cut):
    write(tmp_path)
    file = tmp_path / SINGLE
    file.write_bytes(file.read_bytes()[:-cut])
    n = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    assert f"data_offsets: expected an end within the file's {n} bytes of data, found" in message(tmp_path)
