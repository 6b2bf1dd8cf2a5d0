"""config.json → ModelConfig: what the engine computes is taken over, what it does not compute is refused."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skipkv import _skipkv
from skipkv.checks import CONSTANTS
from skipkv.errors import CheckpointError
from skipkv.load.files import Fields, is_int, read_object, show

# Far above every published model; what exceeds them is a broken file, and refusing it here keeps size arithmetic small.
# None may exceed what skv_config_check (csrc/config.c) lets through.
MAX_HEADS, MAX_HEAD_DIM, MAX_CONTEXT = 1024, CONSTANTS["max_head_dim"], 1 << 24
SIZES = {"n_layers": ("num_hidden_layers", CONSTANTS["max_layers"]), "hidden": ("hidden_size", 1 << 17),
         "n_heads": ("num_attention_heads", MAX_HEADS), "ffn": ("intermediate_size", 1 << 20),
         "vocab": ("vocab_size", 1 << 22), "context": ("max_position_embeddings", MAX_CONTEXT)}  # fmt: skip
BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"}  # where a family has both
ROPE_KEYS = ("rope_type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
             "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate")  # fmt: skip
# transformers' defaults where config.json leaves out the key
WINDOW, FIRST_WINDOWED, UNROTATED_EVERY = 4096, 28, 4


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and variants of one model, in skipkv's names.

    Attributes
    ----------
    family : str
        ``"llama"``, ``"mistral"``, ``"qwen2"``, …: a row of the engine's table of families.
    n_layers, n_heads, n_kv_heads, head_dim, hidden, ffn, vocab : int
        Sizes; ``n_heads`` is a multiple of ``n_kv_heads`` and ``head_dim`` is even.
    context : int
        Positions that the model was made for (``max_position_embeddings``; under yarn at least its factor times the
        original ones).
    norm_eps : float
        Added to the mean square in RMSNorm.
    tied : bool
        The output head is the embedding.
    qkv_bias, o_bias, mlp_bias : bool
        Which linear layers add a bias.
    rope_type : str
        ``"default"``, ``"linear"``, ``"dynamic"``, ``"llama3"`` or ``"yarn"``.
    rope_theta, rope_factor, rope_low_freq_factor, rope_high_freq_factor, rope_beta_fast, rope_beta_slow : float
        RoPE base and scaling; neutral where the type does not use them.
    rope_original_context : int
        Positions before llama3 or yarn scaling; ``context`` where the type does not use it.
    rope_truncate : bool
        yarn's ramp begins and ends at whole pairs.
    rope_attention_factor : float
        yarn's factor of rotated queries and keys; 1 elsewhere.
    unrotated : tuple of int
        Layers without RoPE.
    """

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int
    context: int
    norm_eps: float
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    rope_type: str = "default"
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_original_context: int = 1
    rope_truncate: bool = True
    rope_attention_factor: float = 1.0
    unrotated: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "ModelConfig":
        """Read and check a ``config.json``.

        Raises
        ------
        CheckpointError
            A key is missing, has the wrong type or range, or asks for something the engine does not compute.
        """
        fields = Fields(Path(path), read_object(Path(path)))
        name, family = _family(fields)
        sizes = {name: fields.integer(key, most) for name, (key, most) in SIZES.items()}
        n_heads, hidden = sizes["n_heads"], sizes["hidden"]
        n_kv_heads = fields.integer("num_key_value_heads", MAX_HEADS, default=n_heads)
        if n_heads % n_kv_heads:
            fields.fail("num_key_value_heads", f"a divisor of num_attention_heads = {n_heads}")
        if fields.get("head_dim") is None and hidden % n_heads:
            fields.fail("hidden_size", f"a multiple of num_attention_heads = {n_heads}, as there is no head_dim")
        head_dim = fields.integer("head_dim", MAX_HEAD_DIM, default=hidden // n_heads)
        if head_dim % 2 or head_dim > MAX_HEAD_DIM:
            fields.fail("head_dim", f"an even integer from 2 to {MAX_HEAD_DIM}", str(head_dim))
        _refuse_variants(fields)
        rope = _rope(fields, family, sizes["context"])
        if rope["rope_type"] == "yarn":  # many files keep the context of before the scaling that a card recommends
            stretched = int(rope["rope_factor"] * rope["rope_original_context"])
            sizes["context"] = min(max(sizes["context"], stretched), MAX_CONTEXT)
        unrotated = _unrotated(fields, sizes["n_layers"]) if family["skips_rope"] else ()
        _refuse_windows(fields, family, sizes["n_layers"], sizes["context"], unrotated)
        asked = {name: fields.boolean(key) for name, key in BIASES.items()}
        return cls(
            family=name, n_kv_heads=n_kv_heads, head_dim=head_dim, norm_eps=fields.number("rms_norm_eps", 1e-12, 0.1),
            tied=fields.boolean("tie_word_embeddings", family["tied"]), unrotated=unrotated,
            **{bias: asked[bias] if family[bias] is None else family[bias] for bias in BIASES},
            **sizes, **rope,
        )  # fmt: skip

    @property
    def reach(self) -> str:
        """The context in words, for those who ask for more."""
        more = ", beyond which 'dynamic' RoPE is not supported" if self.rope_type == "dynamic" else ""
        return f"the context of {self.context}{more}"

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as the engine takes them."""
        return asdict(self)


def _family(fields: Fields) -> tuple[str, Mapping[str, Any]]:
    """The row of the engine's family table that ``architectures`` names."""
    families = _skipkv.families()
    by_architecture = {row["architecture"]: name for name, row in families.items()}
    found = fields.get("architectures")
    one = isinstance(found, list) and len(found) == 1 and isinstance(found[0], str)
    if not one or found[0] not in by_architecture:
        fields.fail("architectures", f"one of {', '.join(by_architecture)}")
    name = by_architecture[found[0]]
    if fields.get("model_type") not in (None, name):  # transformers goes by model_type: another model would be meant
        fields.fail("model_type", f"{name!r}, which goes with {found[0]}")
    return name, families[name]


def _refuse_variants(fields: Fields) -> None:
    """What these architectures can be configured to do and the engine does not."""
    fields.only("hidden_act", "silu")
    fields.only("pretraining_tp", 1)
    fields.only("partial_rotary_factor", 1.0)
    quantization = fields.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        expected = "unquantised weights (F32, F16, BF16)"
        fields.fail("quantization_config", expected, f"quant_method {show(method)}")


def _unrotated(fields: Fields, n_layers: int) -> tuple[int, ...]:
    """Layers without RoPE: those with 0 in the list, without a list every so many."""
    listed = fields.get("no_rope_layers")
    if listed is None:
        every = fields.integer("no_rope_layer_interval", MAX_CONTEXT, default=UNROTATED_EVERY)
        return tuple(range(every - 1, n_layers, every))
    if not isinstance(listed, list) or len(listed) < n_layers or any(not is_int(i) or i not in (0, 1) for i in listed):
        fields.fail("no_rope_layers", f"a list of 0 or 1 for each of num_hidden_layers = {n_layers}")
    return tuple(i for i in range(n_layers) if not listed[i])


def _refuse_windows(
    fields: Fields, family: Mapping[str, Any], n_layers: int, context: int, unrotated: Sequence[int]
) -> None:
    """A sliding window is refused where a layer has it and it is shorter than the context."""
    asked, window = family["slides"] or fields.boolean("use_sliding_window"), None
    absent = None if family["skips_rope"] else WINDOW
    if asked and fields.values.get("sliding_window", absent) is not None:  # null says that there is none
        window = fields.integer("sliding_window", 1 << 30, absent)
    kinds = fields.get("layer_types")
    if kinds is None:
        first = 0 if family["slides"] else fields.integer("max_window_layers", 1 << 30, FIRST_WINDOWED, low=0)
        layers = unrotated if family["skips_rope"] else range(first, n_layers)
        if layers and window is not None and window < context:
            expected = f"null, or at least the context of {context} (sliding windows are not supported)"
            fields.fail("sliding_window", expected, str(window))
        return
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        fields.fail("layer_types", f"a list of num_hidden_layers = {n_layers} names")
    for kind in kinds:
        if kind != "full_attention" and (kind != "sliding_attention" or window is None or window < context):
            fields.fail("layer_types", "only 'full_attention' (others are not supported)", show(kind))


def _rope(fields: Fields, family: Mapping[str, Any], context: int) -> dict[str, Any]:
    """RoPE's parameters from either spelling: rope_theta + rope_scaling, or rope_parameters."""
    rope = _merged_rope(fields)
    scaled = rope.get("factor") is not None  # a factor without a type: nobody can tell what it scales
    kind = "default" if rope.get("rope_type") is None and not scaled else rope.get("rope_type")
    if not isinstance(kind, str) or kind not in family["rope"]:
        rope.fail("rope_type", f"one of {', '.join(map(repr, family['rope']))}")
    rope.only("partial_rotary_factor", 1.0)
    result = {
        "rope_type": kind,
        "rope_theta": rope.number("rope_theta", 1.0, 1e12, default=family["rope_theta"]),
        "rope_original_context": context,
    }
    if kind == "yarn":
        return result | _yarn(rope, result["rope_theta"], context)
    if kind != "default":
        result["rope_factor"] = rope.number("factor", 1.0, 1e6)
    if kind == "llama3":
        low = result["rope_low_freq_factor"] = rope.number("low_freq_factor", 1e-6, 1e6)
        high = result["rope_high_freq_factor"] = rope.number("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            rope.fail("high_freq_factor", f"more than low_freq_factor = {low:g}")
        result["rope_original_context"] = rope.integer("original_max_position_embeddings", MAX_CONTEXT)
    return result


def _yarn(rope: Fields, theta: float, context: int) -> dict[str, Any]:
    """As transformers reads them: 0 counts as absent, and the attention factor follows from the others."""
    if theta == 1:
        rope.fail("rope_theta", "more than 1")
    original = rope.integer("original_max_position_embeddings", MAX_CONTEXT, default=context)
    factor = rope.number("factor", 1.0, 1e6, default=context / original)
    mscale, mscale_all_dim = (rope.number(key, 0.0, 1e6, default=0.0) for key in ("mscale", "mscale_all_dim"))

    def scale(by: float) -> float:
        return 0.1 * by * math.log(max(factor, 1.0)) + 1.0

    usual = scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)
    return {
        "rope_factor": factor,
        "rope_original_context": original,
        "rope_beta_fast": rope.number("beta_fast", 0.0, 1e6, default=0.0) or 32.0,
        "rope_beta_slow": rope.number("beta_slow", 0.0, 1e6, default=0.0) or 1.0,
        "rope_truncate": rope.boolean("truncate", True),
        "rope_attention_factor": rope.number("attention_factor", 1e-6, 1e6, default=usual),
    }


def _merged_rope(fields: Fields) -> Fields:
    # A file may carry both spellings, for old and new readers. They must say the same: nobody can tell which was meant.
    top = ("rope_theta", "original_max_position_embeddings")
    merged = {key: fields.get(key) for key in top if fields.get(key) is not None}
    labels: dict[str, str] = {}
    for spelling in ("rope_scaling", "rope_parameters"):
        part = fields.get(spelling)
        if part is None:
            continue
        if not isinstance(part, dict) or any(isinstance(value, dict) for value in part.values()):
            fields.fail(spelling, "one set of RoPE parameters for all layers")
        if part.get("truncate", True) is None:  # the one null that transformers does not take for an absent key
            part = part | {"truncate": False}
        for spelled in ("type", *ROPE_KEYS):
            key, label = "rope_type" if spelled == "type" else spelled, f"{spelling}.{spelled}"
            value = part.get(spelled)
            if value is None:
                if key not in merged:
                    labels[key] = label  # where it is missed, should it turn out to be needed
                continue
            if key in merged and not isinstance(value, list) and merged[key] != value:
                expected = f"{show(merged[key])} as in {labels.get(key, key)}"
                raise CheckpointError(f"{fields.path}: {label}: expected {expected}, found {show(value)}")
            merged[key], labels[key] = value, label
    return Fields(fields.path, merged, labels)
