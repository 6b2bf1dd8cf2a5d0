"""Same numbers as transformers: random checkpoints of every family, the tiny reasoner, and a real small model.

The oracle computes in float32 from the directory that we load, whatever type it is stored in.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import spec
from checkpoints import write_tokenizer
from harness import TINY, decoder_parts

import skipkv
from skipkv.tiny.problems import draw

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
stored = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.oracle

FIVE = int(transformers.__version__.split(".")[0]) >= 5
FLOAT32 = {"dtype" if FIVE else "torch_dtype": torch.float32}
# Of the largest logit: two float32 computations sum in different orders. Best logits nearer than this decide nothing.
RTOL = 1e-4


def oracle_of(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **FLOAT32, **options).eval()


@torch.inference_mode()
def oracle_logits(oracle, ids):
    return oracle(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def error(got, want):
    """Largest difference relative to the largest logit."""
    assert got.shape == want.shape and got.dtype == want.dtype == np.float32
    return float(np.abs(got - want).max() / np.abs(want).max())


@torch.inference_mode()
def oracle_greedy(oracle, prompts, n, stop_ids=(), **options):
    """[(new tokens, how many of them are decided)] of prompts of any lengths.

    A token is decided while the two best logits of every step up to it differ by more than RTOL of the largest.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = oracle.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=n, eos_token_id=list(stop_ids) or None,
        pad_token_id=0, output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    tokens = out.sequences[:, longest:].tolist()
    best = torch.stack([step.topk(2).values for step in out.scores], 1)  # [rows, steps, 2]
    largest = torch.stack([step.abs().amax(-1) for step in out.scores], 1)
    near = (best[..., 0] - best[..., 1] < RTOL * largest).tolist()
    result = []
    for row, undecided in zip(tokens, near, strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in stop_ids), len(row))
        result.append((row[:end], undecided.index(True) if True in undecided[:end] else end))
    return result


def check_greedy(generations, expected):
    """Ours are the oracle's up to its first undecided token; to the end without one. Returns tokens compared."""
    total = 0
    for ours, (theirs, decided) in zip(generations, expected, strict=True):
        assert ours.tokens[:decided] == theirs[:decided], f"prompt {ours.prompt}"
        assert decided < len(theirs) or len(ours.tokens) == len(theirs), f"prompt {ours.prompt}"
        total += decided
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Random checkpoints

VOCAB, CONTEXT = 211, 640
LENGTHS = (1, 2, 63, 64, 65, 300)
DEFAULT = {"rope_type": "default"}
LINEAR = {"rope_type": "linear", "factor": 2.5}
# Most of the 300 positions lie beyond the original context, and heads of 32 have pairs in all three bands of frequency.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 48}  # fmt: skip
# The last of the 300 positions is four times the original context.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 75}
YARN_BETAS = YARN | {"beta_fast": 8.0, "beta_slow": 0.5, "truncate": False}
YARN_SCALES = YARN | {"mscale": 1.3, "mscale_all_dim": 0.7}
YARN_ATTENTION = YARN | {"attention_factor": 0.8, "beta_fast": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
WINDOWED = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}  # of three layers none
TIED, BIASES, MLP_BIAS = {"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}
CASES = {
    # (heads, KV heads, head_dim, hidden), what else the config says, theta, scaling, stored type, sharded, spelling
    "llama-mha": ("llama", (4, 4, 16, 64), {}, 1e4, DEFAULT, "float32", False, "new"),
    "llama-mha-sharded-old": ("llama", (4, 4, 32, 128), {}, 5e5, DEFAULT, "bfloat16", True, "old"),
    "llama3-gqa2-wide-tied": ("llama", (4, 2, 32, 48), TIED, 5e5, LLAMA3, "bfloat16", True, "new"),
    "llama3-gqa2-old": ("llama", (8, 4, 32, 256), {}, 5e5, LLAMA3, "float16", False, "old"),
    "llama-gqa7-linear-biases": ("llama", (7, 1, 8, 56), BIASES | MLP_BIAS, 1e4, LINEAR, "float16", False, "new"),
    "llama-gqa7-linear-mlp-bias": ("llama", (14, 2, 16, 112), MLP_BIAS, 1e4, LINEAR, "float32", True, "old"),
    "llama-attention-bias-tied": ("llama", (4, 2, 64, 80), BIASES | TIED, 1e4, DEFAULT, "bfloat16", False, "new"),
    "qwen2-gqa2-tied": ("qwen2", (4, 2, 16, 64), TIED, 1e6, DEFAULT, "bfloat16", False, "new"),
    "qwen2-gqa7-old": ("qwen2", (14, 2, 64, 448), {}, 1e6, DEFAULT, "bfloat16", True, "old"),
    "qwen2-mha-linear": ("qwen2", (3, 3, 32, 96), {}, 1e4, LINEAR, "float32", False, "new"),
    "qwen3-gqa2-wide": ("qwen3", (4, 2, 32, 64), {}, 1e6, DEFAULT, "float32", False, "new"),
    "qwen3-gqa7-tied-biases": ("qwen3", (7, 1, 16, 40), BIASES | TIED, 1e4, DEFAULT, "float16", True, "old"),
    "llama-yarn": ("llama", (4, 2, 64, 96), {}, 1e4, YARN, "float32", False, "new"),
    "qwen3-yarn-old": ("qwen3", (4, 2, 128, 64), {}, 1e6, YARN, "bfloat16", False, "old"),
    "qwen2-yarn-betas": ("qwen2", (4, 1, 32, 64), TIED, 1e6, YARN_BETAS, "bfloat16", False, "new"),
    "qwen3-yarn-scales": ("qwen3", (7, 1, 64, 56), {}, 1e4, YARN_SCALES, "float32", False, "old"),
    "llama-yarn-attention": ("llama", (8, 2, 32, 128), {}, 5e5, YARN_ATTENTION, "float32", True, "new"),
    "llama-dynamic": ("llama", (4, 2, 32, 64), {}, 1e4, DYNAMIC, "float32", False, "new"),
    "qwen2-dynamic-old": ("qwen2", (4, 4, 16, 64), {}, 1e6, DYNAMIC, "bfloat16", False, "old"),
    "qwen2-no-layer-slides": ("qwen2", (4, 2, 16, 64), WINDOWED, 1e6, DEFAULT, "float32", False, "new"),
    "mistral-gqa4-wide": ("mistral", (8, 2, 32, 96), {"sliding_window": None}, 1e9, DEFAULT, "bfloat16", True, "new"),
    "mistral-long-window": ("mistral", (2, 1, 64, 80), {"sliding_window": 640}, 1e4, DEFAULT, "float32", False, "old"),
    "smollm3-tied": ("smollm3", (4, 1, 32, 128), TIED | {"no_rope_layer_interval": 2}, 2e6, DEFAULT, "bfloat16", False,
                     "new"),
    "smollm3-listed": ("smollm3", (6, 3, 16, 96), BIASES | {"no_rope_layers": [0, 1, 0]}, 5e6, DEFAULT, "float32",
                       False, "old"),
    "smollm3-yarn": ("smollm3", (4, 2, 32, 64), MLP_BIAS, 5e4, YARN, "float32", True, "new"),
    "qwen3-mha-128": ("qwen3", (2, 2, 128, 64), {}, 1e6, LLAMA3, "bfloat16", False, "old"),
}
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}


def save_random(directory, family, shape, options, theta, scaling, stored, sharded, spelling, seed):
    heads, kv_heads, head_dim, hidden = shape
    torch.manual_seed(seed)
    new, old = {"rope_parameters": scaling | {"rope_theta": theta}}, {"rope_theta": theta, "rope_scaling": scaling}
    config = getattr(transformers, f"{FAMILIES[family]}Config")(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=2 * hidden + 8, num_hidden_layers=3, head_dim=head_dim,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
        pad_token_id=0, eos_token_id=None, **({"tie_word_embeddings": False} | options), **(new if FIVE else old),
    )  # fmt: skip
    model = getattr(transformers, f"{FAMILIES[family]}ForCausalLM")(config)
    with torch.no_grad():
        # Queries and keys of size 1.6 a number give logits of about 2.5, far from uniform attention. Norms and biases
        # start as 1 and 0, which would hide a mistake.
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.normal_(centre, 1.6 / parameter.shape[1] ** 0.5 if parameter.ndim == 2 else 0.2)
    model.to(getattr(torch, stored)).save_pretrained(directory, max_shard_size="60KB" if sharded else "1GB")
    write_tokenizer(directory, VOCAB)
    path = directory / "config.json"
    values = json.loads(path.read_text())
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        values.pop(key, None)
    values |= new if spelling == "new" else old | ({"rope_scaling": None} if scaling is DEFAULT else {})
    path.write_text(json.dumps(values))
    assert (directory / "model.safetensors.index.json").exists() == sharded


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    save_random(directory, *CASES[request.param], seed=list(CASES).index(request.param))
    ids = np.random.default_rng(1).integers(0, VOCAB, LENGTHS[-1]).tolist()
    return SimpleNamespace(directory=directory, oracle=oracle_of(directory), ids=ids)


@torch.inference_mode()
def test_random_weights_attend_and_speak_unevenly(saved):
    oracle = oracle_of(saved.directory, attn_implementation="eager")
    out = oracle(torch.tensor([saved.ids[:100]]), output_attentions=True)
    # As many slots as would, looked at evenly, give the same sum of squares.
    slots = torch.stack([1 / (p[0, :, -1] ** 2).sum(-1) for p in out.attentions])
    words = 1 / (out.logits[0].softmax(-1) ** 2).sum(-1)
    assert slots.mean() < 0.5 * 100 and words.mean() < 0.5 * VOCAB


def test_the_specification_has_the_same_logits(saved):
    ids = saved.ids[:64]
    want = oracle_logits(saved.oracle, ids)
    got = spec.Decoder(*decoder_parts(saved.directory)).logits(ids)
    assert np.abs(got - want).max() <= RTOL * np.abs(want).max()  # float32 against float64


def test_logits(saved, variant):
    model = skipkv.load(saved.directory, dtype="f32", progress=False)
    assert model._core.variant == variant and model.dtype == "f32"
    for n in LENGTHS:
        assert error(model.logits(saved.ids[:n]), oracle_logits(saved.oracle, saved.ids[:n])) <= RTOL, f"{n} tokens"
    shifted = oracle_logits(saved.oracle, saved.ids[1:])  # the bound tells right from wrong
    assert error(model.logits(saved.ids[:-1]), shifted) > 0.1


@pytest.fixture(scope="module")
def greedy(saved):
    prompts = [saved.ids[:1], saved.ids[10:75]]
    return prompts, oracle_greedy(saved.oracle, prompts, 200)


def test_greedy_continuations(saved, greedy, variant):
    prompts, expected = greedy
    model = skipkv.load(saved.directory, dtype="f32", progress=False)
    outs = model.generate(prompts, max_new_tokens=200, stop_ids=(), cache="f32", progress=False)
    assert [len(out.tokens) for out in outs] == [200, 200]
    assert check_greedy(outs, expected) >= 100  # near ties are too rare to hide behind


def with_head(tensors, head):
    return tensors | {"lm_head.weight": head}


def without_prefix(tensors):
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("tied, store, reads_tied", [
    (True, lambda t, head: t, True),
    (True, lambda t, head: with_head(t, t["model.embed_tokens.weight"].clone()), True),
    (True, with_head, False),
    (True, lambda t, head: without_prefix(t), True),
    (True, lambda t, head: without_prefix(with_head(t, head)), False),
    (False, lambda t, head: without_prefix(with_head(t, head)), False),
], ids=["tied", "same head", "other head", "no prefix", "no prefix, other head", "untied, no prefix"])  # fmt: skip
def test_heads_and_names_as_transformers_reads_them(tmp_path, tied, store, reads_tied):
    options = {"tie_word_embeddings": tied}
    save_random(tmp_path, "llama", (4, 2, 16, 64), options, 1e4, DEFAULT, "float32", False, "new", seed=7)
    file = tmp_path / "model.safetensors"
    tensors = {n: t for n, t in stored.load_file(file).items() if n != "lm_head.weight"}
    stored.save_file(store(tensors, torch.randn(VOCAB, 64)), file, {"format": "pt"})
    ids = list(range(40))
    model = skipkv.load(tmp_path, progress=False)
    assert model.config.tied == reads_tied
    assert error(model.logits(ids), oracle_logits(oracle_of(tmp_path), ids)) <= RTOL


@pytest.mark.parametrize("penalty", [1.1, 1.3, 0.9])
def test_a_repetition_penalty(saved, penalty):
    prompts = [saved.ids[:7], saved.ids[10:75]]
    model = skipkv.load(saved.directory, dtype="f32", progress=False)
    options = {"max_new_tokens": 60, "stop_ids": (), "cache": "f32", "progress": False}
    outs = model.generate(prompts, repetition_penalty=penalty, **options)
    # One by one: a padded prompt's padding would count as said.
    expected = [oracle_greedy(saved.oracle, [ids], 60, repetition_penalty=penalty)[0] for ids in prompts]
    assert check_greedy(outs, expected) >= 60
    assert [out.tokens for out in outs] != [out.tokens for out in model.generate(prompts, **options)]


# ---------------------------------------------------------------------------------------------------------------------
# The tiny reasoner

PROBLEMS = draw(200)


@pytest.fixture(scope="module")
def tiny_greedy():
    oracle = oracle_of(TINY)
    tokenizer = skipkv.load("tiny", progress=False).tokenizer
    prompts = [tokenizer.encode(problem["prompt"]) for problem in PROBLEMS[::25]]
    return prompts, oracle_greedy(oracle, prompts, 1600, {tokenizer.eos_id})


def test_tiny_writes_what_it_writes_in_transformers(tiny_greedy, variant):
    prompts, expected = tiny_greedy
    model = skipkv.load("tiny", dtype="f32", progress=False)
    outs = model.generate(prompts, max_new_tokens=1600, cache="f32", progress=False)
    assert check_greedy(outs, expected) == sum(len(out.tokens) for out in outs) > 3000
    for out, (tokens, _) in zip(outs, expected, strict=True):
        assert out.text == model.tokenizer.decode(tokens) and out.finish_reason == "stop"


@pytest.mark.parametrize("penalty", [1.1, 1.3, 0.9])
def test_tiny_under_a_repetition_penalty(penalty):
    model, oracle = skipkv.load("tiny", dtype="f32", progress=False), oracle_of(TINY)
    prompts = [problem["prompt"] for problem in PROBLEMS[:3]]
    outs = model.generate(prompts, max_new_tokens=200, cache="f32", repetition_penalty=penalty, progress=False)
    expected = [oracle_greedy(oracle, [out.prompt_tokens], 200, model.stop_ids, repetition_penalty=penalty)[0]
                for out in outs]  # fmt: skip
    assert check_greedy(outs, expected) >= 300


@pytest.mark.parametrize("generation", [None, {}, {"eos_token_id": 7}, {"eos_token_id": [8, 9]}], ids=str)
@pytest.mark.parametrize("eos", [["Wait"], [" so", "Wait"], []], ids=str)
def test_texts_end_where_they_end_in_transformers(tmp_path, generation, eos):
    for name in ("model.safetensors", "tokenizer.json"):  # no tokenizer_config.json: no EOS of the tokenizer's
        (tmp_path / name).symlink_to(TINY / name)
    prompt = PROBLEMS[0]["prompt"]
    tokenizer = skipkv.load("tiny", progress=False).tokenizer
    ids = [tokenizer.encode(text)[-1] for text in eos]
    config = json.loads((TINY / "config.json").read_text()) | {"eos_token_id": ids[0] if len(ids) == 1 else ids or None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    ours = skipkv.load(tmp_path, dtype="f32", progress=False).generate(prompt, max_new_tokens=60, cache="f32")[0]
    with torch.inference_mode():
        given = torch.tensor([ours.prompt_tokens])
        theirs = oracle_of(tmp_path).generate(given, max_new_tokens=60, do_sample=False, pad_token_id=0)
    theirs = theirs[0, given.shape[1] :].tolist()
    if generation == {} and ids:  # there it would never end
        assert len(theirs) == 60 and ours.finish_reason == "stop" and ours.tokens[-1] in ids
        assert ours.tokens == theirs[: len(ours.tokens)]
    else:
        assert ours.tokens == theirs


# ---------------------------------------------------------------------------------------------------------------------
# A real small model

NAME = "SmolLM2-135M-Instruct"
SYSTEM = {"role": "system", "content": "You are a careful teacher. Explain in full sentences."}
CHATS = [
    [{"role": "user", "content": "What is gravity?"}],
    [{"role": "user", "content": "Write a short story about a fox and a crow who share a winter."}],
    [{"role": "user", "content": "List ten facts about the ocean, one per line."}],
    [{"role": "user", "content": "Tom has 12 apples, gives away 5 and buys 9 more. How many has he? Think it over."}],
    [SYSTEM, {"role": "user", "content": "Why is the sky blue, and why are sunsets red?"}],
    [SYSTEM, {"role": "user", "content": "How does a bicycle stay upright?"}],
    [{"role": "user", "content": "Explique la photosynthèse en français, s'il te plaît — naïvement."}],
    [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How can I help?"},
     {"role": "user", "content": "Describe how bread is made, from the grain to the loaf."}],
    [{"role": "user", "content": "Give me a plan for a week in the mountains: food, clothes, routes, dangers. " * 3}],
    [{"role": "user", "content": "Compare trains and cars in detail:\n\n* speed,\n* cost,\n* comfort and safety."}],
    [{"role": "user", "content": "Continue this tale: Once upon a time a miller had three sons and a cat."}],
    [{"role": "user", "content": "Describe in detail how plants make food from light, water and air."}],
]  # fmt: skip
NEW = 140


@pytest.fixture(scope="module")
def smol():
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skipkv" / "models" / NAME
    if not directory.exists():
        tool = Path(__file__).resolve().parents[3] / "shared" / "tools" / "get_model.py"
        missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
        if missing or not tool.exists():
            pytest.skip(f"{directory} is absent, and cannot be made without {' and '.join(missing) or tool}")
        made = subprocess.run([sys.executable, tool, "--out", directory], capture_output=True, text=True, timeout=600)
        if made.returncode:
            pytest.skip(f"{directory} is absent, and {tool.name} says: {made.stderr.strip().splitlines()[-1:]}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    chats = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in CHATS]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in chats]
    oracle = oracle_of(directory)
    stop_ids = {json.loads((directory / "generation_config.json").read_text())["eos_token_id"]}
    expected = oracle_greedy(oracle, prompts, NEW, stop_ids)
    texts = [prompt + tokens for prompt, (tokens, _) in zip(prompts, expected, strict=True)]
    logits, best = {}, []
    for i, ids in enumerate(texts):
        found = oracle_logits(oracle, ids)
        best.append(found.argmax(1))
        if i in (0, 8):  # a short and a long one; all of them are 0.5 GB
            logits[i] = found
    return SimpleNamespace(
        directory=directory, prompts=prompts, expected=expected, texts=texts, logits=logits, best=best
    )


@pytest.fixture(scope="module")
def smol_f32(smol):
    return skipkv.load(smol.directory, dtype="f32", progress=False)


def test_smollm2_chats(smol, smol_f32):
    for chat, ids in zip(CHATS, smol.prompts, strict=True):
        assert smol_f32.encode(chat) == ids


def test_smollm2_logits(smol, variant):
    model = skipkv.load(smol.directory, dtype="f32", progress=False)
    assert model._core.variant == variant
    for i, want in smol.logits.items():
        assert error(model.logits(smol.texts[i]), want) <= RTOL


def test_smollm2_greedy(smol, smol_f32):
    outs = smol_f32.generate(CHATS, max_new_tokens=NEW, cache="f32", progress=False)
    assert len(outs) >= 10 and all(len(out.tokens) >= 40 for out in outs)
    assert check_greedy(outs, smol.expected) >= 400


@pytest.mark.parametrize("cache", ["f32", "bf16"])
def test_smollm2_in_bf16_says_the_same(smol, cache):
    model = skipkv.load(smol.directory, dtype="bf16", progress=False)
    assert model.dtype == "bf16"
    best = [model.logits(ids, cache=cache).argmax(1) for ids in smol.texts]
    same = np.concatenate(best) == np.concatenate(smol.best)
    assert len(same) >= 2000 and same.mean() >= 0.99, f"{same.sum()} of {len(same)}"
