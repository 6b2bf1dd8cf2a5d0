"""Checkpoints: what opens, what it holds on to, and what a model's name means."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    BYTES,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SMOLLM3,
    check_invariants,
    pack,
    random_tensors,
    read,
    safetensors,
    write,
    write_tokenizer,
)
from harness import refused

import skipkv
from skipkv import CheckpointError
from skipkv.load import checkpoint as checkpoint_module
from skipkv.load.checkpoint import open_checkpoint

pytestmark = pytest.mark.sanitize

INDEX, FIRST = "model.safetensors.index.json", "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype, auto", [("F32", "f32"), ("F16", "f32"), ("BF16", "bf16")])
@pytest.mark.parametrize("base", [LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3], ids=lambda base: base["model_type"])
def test_what_was_written_is_read(tmp_path, base, dtype, auto, shards):
    tensors = write(tmp_path, base, dtype=dtype, shards=shards)
    with open_checkpoint(tmp_path) as checkpoint:
        check_invariants(checkpoint)
        assert {name: checkpoint.read(name).tobytes() for name in checkpoint.tensors} == {
            n: t[2] for n, t in tensors.items()
        }
        assert checkpoint.dtype == auto and checkpoint.name == tmp_path.name and checkpoint.generation == {}
        assert checkpoint.n_parameters == sum(int(np.prod(shape)) for _, shape, _ in tensors.values())
        assert checkpoint.n_bytes == BYTES[dtype] * checkpoint.n_parameters


def test_norms_in_f32_beside_bf16_matrices_are_still_bf16(tmp_path):
    config = read(tmp_path)
    wide = random_tensors(config, "F32")
    mixed = {n: wide[n] if len(t[1]) == 1 else t for n, t in random_tensors(config).items()}
    write(tmp_path, tensors=mixed)
    assert open_checkpoint(tmp_path).dtype == "bf16"
    write(tmp_path, tensors=mixed | {"lm_head.weight": wide["lm_head.weight"]})
    assert open_checkpoint(tmp_path).dtype == "f32"


def test_a_tensor_at_an_odd_address_is_read_aligned(tmp_path):
    tensors = write(tmp_path)
    raw = pack(tensors)
    n = int.from_bytes(raw[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(safetensors(raw[8 : 8 + n] + b" ", raw[8 + n :]))
    checkpoint = open_checkpoint(tmp_path)
    check_invariants(checkpoint)
    assert checkpoint.tensors["model.norm.weight"].offset % 2 == 1
    assert checkpoint.read("model.norm.weight").tobytes() == tensors["model.norm.weight"][2]


def test_old_rope_frequencies_are_left_out(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (2,), bytes(8))}
    write(tmp_path, tensors=write(tmp_path) | extra)
    check_invariants(open_checkpoint(tmp_path))


def test_a_tied_head_stored_a_second_time_is_left_out(tmp_path):
    tensors = write(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write(tmp_path, tensors=tensors, tie_word_embeddings=True)
    check_invariants(open_checkpoint(tmp_path))


@pytest.mark.parametrize("dtype, raw", [
    ("BF16", b"\1" + bytes(1279)), ("BF16", bytes(1279) + b"\1"), ("F16", bytes(1280)),
])  # fmt: skip
def test_a_tied_head_that_differs_counts(tmp_path, dtype, raw, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "COMPARED", 96)
    tensors = write(tmp_path, tie_word_embeddings=True)
    both = {"model.embed_tokens.weight": ("BF16", (40, 16), bytes(1280)), "lm_head.weight": (dtype, (40, 16), raw)}
    write(tmp_path, tensors=tensors | both, tie_word_embeddings=True)
    with open_checkpoint(tmp_path) as checkpoint:
        check_invariants(checkpoint)
        assert not checkpoint.config.tied and checkpoint.read("lm_head.weight").tobytes() == raw


def test_tensors_without_the_models_prefix(tmp_path):
    tensors = write(tmp_path, shards=2)
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    write(tmp_path, tensors=short, shards=2)
    checkpoint = open_checkpoint(tmp_path)
    check_invariants(checkpoint)
    assert {name: checkpoint.read(name).tobytes() for name in tensors} == {name: t[2] for name, t in tensors.items()}


def test_what_the_index_does_not_list_is_left_out_where_it_may_be(tmp_path):
    tensors = write(tmp_path, tie_word_embeddings=True, shards=2)
    index = (tmp_path / INDEX).read_text()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (2,), bytes(8)),
             "lm_head.weight": ("F32", (40, 16), bytes(2560))}  # fmt: skip
    write(tmp_path, tensors=tensors | extra, tie_word_embeddings=True, shards=2)
    (tmp_path / INDEX).write_text(index)
    with open_checkpoint(tmp_path) as checkpoint:
        check_invariants(checkpoint)
        assert checkpoint.config.tied and set(checkpoint.tensors) == set(tensors)


def test_symbolic_links_as_in_the_hub_cache(tmp_path):
    write(tmp_path / "blobs", shards=2)
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    check_invariants(open_checkpoint(tmp_path / "snapshot"))


def test_the_single_file_wins_over_an_index(tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("nonsense")
    check_invariants(open_checkpoint(tmp_path))


def test_generation_config_is_passed_on(tmp_path):
    write(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    assert open_checkpoint(tmp_path).generation == {"eos_token_id": [1, 2], "temperature": 0.6}


def test_tiny_is_the_model_in_the_package():
    with open_checkpoint("tiny") as checkpoint:
        check_invariants(checkpoint)
        assert (checkpoint.name, checkpoint.dtype, checkpoint.config.family) == ("tiny", "bf16", "llama")
        assert checkpoint.n_parameters == 2479872
        assert repr(checkpoint) == "<Checkpoint 'tiny': llama, 2479872 parameters, bf16>"


def test_a_closed_checkpoint_is_not_read(tmp_path):
    write(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        pass
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.read("lm_head.weight")


SHRINK = """
import os, sys, skipkv.model
class Bar(skipkv.model.tqdm):
    def update(self, n):
        os.truncate(sys.argv[1] + "/model.safetensors", 4096)
skipkv.model.tqdm = Bar
try:
    skipkv.load(sys.argv[1], progress=False)
except skipkv.CheckpointError as error:
    print(error)
"""


def test_a_file_that_shrinks_while_it_is_loaded_is_refused(tmp_path):
    write(tmp_path, vocab_size=4096)
    write_tokenizer(tmp_path, 40)
    environment = os.environ | {"PYTHONPATH": str(Path(skipkv.__file__).parents[1])}
    command = [sys.executable, "-c", SHRINK, str(tmp_path)]  # a process of its own: a mapped file would end it
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    expected = "expected [0-9]+ bytes, found [0-9]+ .the file has changed since it was opened."
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(f"{tmp_path}/model.safetensors: tensor 'model[^']*': {expected}\n", done.stdout), done.stdout


@pytest.fixture
def hub(monkeypatch):
    """Calls to the hub are recorded, and answered by the function put into ``answer``."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Calls(list):
        answer = staticmethod(lambda repo_id: pytest.fail(f"the hub was asked for {repo_id}"))

    def snapshot_download(repo_id, **options):
        calls.append((repo_id, options))
        return calls.answer(repo_id)

    calls = Calls()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_id_is_downloaded_without_other_formats(tmp_path, hub):
    write(tmp_path, shards=2)
    hub.answer = lambda repo_id: str(tmp_path)
    with open_checkpoint("owner/Model-1.5B") as checkpoint:
        assert checkpoint.name == "owner/Model-1.5B" and checkpoint.path == tmp_path
    [(repo_id, options)] = hub
    assert repo_id == "owner/Model-1.5B" and set(options) == {"allow_patterns"}
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "generation_config.json", "model.safetensors", FIRST, INDEX, "tokenizer.json",
              "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/*.jinja",
              "adapter_config.json"]  # fmt: skip
    others = ["README.md", "pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "m.gguf",
              "original/params.json", "onnx/model.onnx"]  # fmt: skip
    assert list(filter_repo_objects(wanted + others, allow_patterns=options["allow_patterns"])) == wanted


def test_a_hub_failure_names_the_id(hub):
    def answer(repo_id):
        raise ConnectionError("no route\nmore lines")

    hub.answer = answer
    with refused("owner/model: expected a directory or a model on the Hugging Face hub: no route", CheckpointError):
        open_checkpoint("owner/model")


def test_offline_the_hub_is_not_asked(tmp_path):
    pytest.importorskip("huggingface_hub")
    code = "from skipkv.load.checkpoint import *\ntry: open_checkpoint('skipkv-test/none')\n"
    code += "except Exception as e: print(type(e).__name__, e)"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    ).stdout
    assert out.startswith("CheckpointError skipkv-test/none: expected a directory or a model on the Hugging Face hub: ")
    assert "HF_HUB_OFFLINE" in out


def test_a_directory_wins_over_a_hub_id_and_the_word_tiny_over_both(tmp_path, hub, monkeypatch):
    write(tmp_path / "owner" / "model")
    write(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("owner/model").path == Path("owner/model")
    assert open_checkpoint("tiny").n_parameters == 2479872
    assert open_checkpoint("./tiny").n_parameters < 10_000
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/tiny").path == tmp_path / "tiny"


@pytest.mark.parametrize("source, shown, found", [
    ("./nothing", "./nothing", "nothing"), ("../owner/nothing", "../owner/nothing", "nothing"),
    ("/nothing/here", "/nothing/here", "nothing"), ("~/nothing", "HOME/nothing", "nothing"),
    (Path("owner/nothing"), "owner/nothing", "nothing"), ("file", "file", "something else"),
    *((name, repr(name), "neither") for name in ("", "a/b/c", "a b", "a\0b")),
])  # fmt: skip
def test_names_that_are_no_model(tmp_path, hub, monkeypatch, source, shown, found):
    (tmp_path / "file").write_text("a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(source)
    expected = "a directory or a hub id (owner/name)" if found == "neither" else "a directory with config.json"
    assert str(error.value).replace(str(tmp_path), "HOME") == f"{shown}: expected {expected}, found {found}" and not hub
