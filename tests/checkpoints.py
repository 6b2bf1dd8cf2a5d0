"""Small checkpoints for tests, written byte by byte: no library between the test and the file."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from skipkv import CheckpointError, _skipkv
from skipkv.load.checkpoint import open_checkpoint
from skipkv.load.config import ModelConfig

BYTES = {"F32": 4, "F16": 2, "BF16": 2}

# As transformers 4 writes them, cut to what counts.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 16,
    "intermediate_size": 24, "max_position_embeddings": 128, "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 40,
}  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-06}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-06, "head_dim": 8}

MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
SMOLLM3 = LLAMA | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}


def safetensors(header, data=b""):
    """A file of this header (an object, or bytes to be taken as they are) and this data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def pack(tensors):
    """A valid file of ``{name: (dtype, shape, bytes)}``, in this order."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    raw = json.dumps(header).encode()
    return safetensors(raw + b" " * (-len(raw) % 8), data)


CORPUS = ["Wait, let me check again: 12 + 30 = 42.", "So the answer is \\boxed{42}.", "Ça va? Über 日本語 と 日本",
          "  if x:\n\treturn x\n\n"]  # fmt: skip


def byte_level(pattern, special=(), plain=(), normalizer=None, bos=None, corpus=CORPUS):
    """A byte-level BPE tokenizer, trained on a few lines, with added tokens after its own."""
    result = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    result.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    result.normalizer, result.decoder = normalizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    result.train_from_iterator(corpus * 4, trainer)
    result.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    result.add_tokens([AddedToken(token, normalized=False) for token in plain])
    steps = [processors.ByteLevel(trim_offsets=False)]
    if bos is not None:
        pair = [(bos, result.token_to_id(bos))]
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=pair))
    result.post_processor = processors.Sequence(steps)
    return result


def merging():
    """A byte-level BPE that merges the ends of think markers with any neighbour: ")</think>So" is )< / th ink >S o."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [pair for byte in alphabet for pair in ((byte, "<"), (">", byte))] + [("t", "h"), ("in", "k"), ("i", "n")]
    tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges)])
    result = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    result.pre_tokenizer, result.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    return result


def write_tokenizer(directory, n):
    """A tokenizer.json of n words."""
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, n)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (Path(directory) / "tokenizer.json").write_text(json.dumps(whole))


def random_tensors(config, dtype="BF16", seed=0):
    """``{name: (dtype, shape, bytes)}`` for a config.json's object; finite random numbers, also in norms and biases."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape, _ in _skipkv.tensors(config.as_dict()):
        values = (rng.standard_normal(shape) * 0.1).astype(np.float32)
        raw = {"F32": values, "F16": values.astype(np.float16), "BF16": values.view(np.uint16)[..., 1::2]}[dtype]
        tensors[name] = (dtype, shape, raw.tobytes())
    return tensors


def write(directory, config=None, tensors=None, dtype="BF16", shards=1, **changes):
    """Write a checkpoint: ``config`` with ``changes`` (None removes a key), random weights by default; returns them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in ((config or LLAMA) | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values))
    if tensors is None:
        tensors = random_tensors(ModelConfig.from_json(directory / "config.json"), dtype)
    if shards == 1:
        (directory / "model.safetensors").write_bytes(pack(tensors))
        return tensors
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        (directory / file).write_bytes(pack(part))
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def read(directory, base=LLAMA, **changes):
    """The configuration that a config.json of these values gives."""
    values = {key: value for key, value in (base | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values))
    return ModelConfig.from_json(directory / "config.json")


def refusal(directory):
    """The sentence with which this directory is refused."""
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(directory)
    return str(error.value).replace(str(directory), "DIR")


def check_invariants(checkpoint):
    """What the engine relies on without looking again."""
    needed = {name: shape for name, shape, _ in _skipkv.tensors(checkpoint.config.as_dict())}
    assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == needed
    end = {}
    for name, tensor in checkpoint.tensors.items():
        assert tensor.name == name and tensor.n_bytes == BYTES[tensor.dtype] * int(np.prod(tensor.shape))
        assert end.get(tensor.file, 8) <= tensor.offset  # file order, no overlap
        end[tensor.file] = tensor.offset + tensor.n_bytes
        data = checkpoint.read(name)
        assert data.nbytes == tensor.n_bytes and data.ctypes.data % BYTES[tensor.dtype] == 0
    for file, last in end.items():
        assert last <= file.stat().st_size
