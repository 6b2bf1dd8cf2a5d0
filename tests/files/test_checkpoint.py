"""Checkpoints: what opens, what it holds on to, and what a model's name means."""

import mmap
import os
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
)
from harness import refused

from skipkv import CheckpointError
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
        assert {name: checkpoint.view(name).tobytes() for name in checkpoint.tensors} == {
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


def test_a_tensor_at_an_odd_address_is_shown_aligned(tmp_path):
    tensors = write(tmp_path)
    raw = pack(tensors)
    n = int.from_bytes(raw[:8], "little")
    (tmp_path / "model.safetensors").write_bytes(safetensors(raw[8 : 8 + n] + b" ", raw[8 + n :]))
    checkpoint = open_checkpoint(tmp_path)
    check_invariants(checkpoint)
    assert checkpoint.tensors["model.norm.weight"].offset % 2 == 1
    assert checkpoint.view("model.norm.weight").tobytes() == tensors["model.norm.weight"][2]


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


def test_tensors_without_the_models_prefix(tmp_path):
    tensors = write(tmp_path, shards=2)
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    write(tmp_path, tensors=short, shards=2)
    checkpoint = open_checkpoint(tmp_path)
    check_invariants(checkpoint)
    assert {name: checkpoint.view(name).tobytes() for name in tensors} == {name: t[2] for name, t in tensors.items()}


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


def test_closing_keeps_views_alive_and_gives_no_new_ones(tmp_path):
    tensors = write(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        view = checkpoint.view("lm_head.weight")
    assert view.tobytes() == tensors["lm_head.weight"][2]
    checkpoint.close()
    with pytest.raises(ValueError, match="is closed"):
        checkpoint.view("lm_head.weight")


def test_views_are_the_map_itself_and_cannot_be_written(tmp_path):
    write(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    name = "model.norm.weight"
    assert checkpoint.view(name).ctypes.data == checkpoint.view(name).ctypes.data
    with pytest.raises(ValueError):
        checkpoint.view(name)[0] = 1


def resident(file):
    """Bytes of this file's map that are in this process's memory."""
    inside = total = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc")
def test_release_gives_memory_back_and_keeps_the_data(tmp_path):
    tensors = write(tmp_path, vocab_size=1 << 18)
    big, small = "model.embed_tokens.weight", "model.norm.weight"
    checkpoint = open_checkpoint(tmp_path)
    view = checkpoint.view(big)
    assert view.tobytes() == tensors[big][2]
    before = resident(tmp_path / "model.safetensors")
    checkpoint.release(big)
    checkpoint.release(small)  # less than a page: nothing to give back
    after = resident(tmp_path / "model.safetensors")
    # The kernel maps pages around a fault, so some at both ends of the tensor may be another's.
    assert before >= view.nbytes and after <= before - view.nbytes + 32 * mmap.PAGESIZE
    assert view.tobytes() == tensors[big][2]
    assert checkpoint.view(small).tobytes() == tensors[small][2]


def test_comparing_a_stored_tied_head_leaves_nothing_resident(tmp_path):
    tensors = write(tmp_path, tie_word_embeddings=True, vocab_size=1 << 18)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write(tmp_path, tensors=tensors, tie_word_embeddings=True, vocab_size=1 << 18)
    checkpoint = open_checkpoint(tmp_path)
    check_invariants(checkpoint)
    if Path("/proc/self/smaps").exists():
        assert resident(tmp_path / "model.safetensors") < checkpoint.tensors["model.embed_tokens.weight"].n_bytes / 4


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
              "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja"]  # fmt: skip
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
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(source)
    expected = "a directory or a hub id (owner/name)" if found == "neither" else "a directory with config.json"
    assert str(error.value).replace(str(tmp_path), "HOME") == f"{shown}: expected {expected}, found {found}" and not hub
