"""The fields of a config.json that nothing here reads: which may stay unread, and which mean another model.

Owns that decision. What a config.json means is what transformers' own class of its ``model_type`` computes, and a
class ignores what it does not know; so fields about tokens, training, names, number formats, generation or another
program are left unread, known or not. But a fork may keep the name of a family and change its mathematics, and silently
wrong logits are worse than an error. So a set field is refused

- when the checkpoint brings its own code (``auto_map``) or quantised weights (``quantization_config`` and its like),
- when one of its words names a part of a decoder's computation (``_TELLING``: ``logit_scale``, ``attn_softcap``,
  ``use_qk_norm``, ``num_experts``), whether any model here or elsewhere is known to have it or not.

Exempt from the words are the fields of transformers that all models have and that leave the logits alone
(``_OF_TRANSFORMERS``), kinds of names that do (``_HARMLESS``), and factors of 1. A fork whose field has none of these
words is caught only where it has other weights: their names and shapes must be the family's (``checkpoint``).
"""

from __future__ import annotations

import re
from typing import Any

from crypten_llm.errors import UsageError
from crypten_llm.models.fields import short

# pretraining_tp and tensor_parallel only split products; what steers generate() is not used here.
_OF_TRANSFORMERS = frozenset(
    """
    pretraining_tp tensor_parallel chunk_size_feed_forward cross_attention_hidden_size output_attentions
    output_hidden_states original_max_position_embeddings ignore_keys_at_rope_validation attn_implementation
    gradient_checkpointing neftune_noise_alpha

    assistant_early_exit dola_layers encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff
    exponential_decay_length_penalty guidance_scale output_logits penalty_alpha prefill_chunk_size renormalize_logits
    sequence_bias use_mtp
    """.split()
)
_HARMLESS = re.compile(
    r"""
    .*_token(_ids?)? | .*tokenizer.* | .*_(padding|truncation)_side | (.*_)?vocab_file  # tokens
    | .*dropout.* | .*_pdrop  # off at inference
    | initializer_.* | (.*_)?train(ing|able|ed)?(_.*)? | .*_loss(_.*)? | .*_coef(ficient)? | (adam|optimizer|lr)_.*
    | (.*_)?dtype | .*_version | (.*_)?name(_or_path)? | .*_(url|path)  # formats and names
    | (use_)?(flash|sdp|sdpa|memory_efficient)_att(entio)?n(_\w+)? | (use_)?cache(_.*)?  # the same, computed otherwise
    """,
    re.VERBOSE,
)
_TELLING = frozenset(
    """
    activation act gate gated gating glu mlp ffn ff feed
    attention attn head heads kv qk qkv key keys query value sdpa softmax alibi window sliding chunk chunked sink sinks
    causal bidirectional sparse sparsity mask masked local global cross encoder
    rope rotary position positions positional nope interleaved mrope
    embed embedding embeddings residual residuals norm norms normalize normalization layernorm rmsnorm eps epsilon bias
    biases
    scale scales scaled scaling multiplier multipliers factor factors alpha beta gamma softcap softcapping cap clip
    clamp logit logits mup
    layer layers block blocks depth width dim dims rank hidden skip exit shared sharing
    expert experts moe router routing
    conv ssm mamba recurrent hybrid lora adapter adapters prune pruned quant quantized quantization compression bits
    draft mtp medusa eagle vision audio image
    """.split()
)
_ADVICE = (
    "use the float16, bfloat16 or float32 weights that this checkpoint was made from, or a GGUF file of the model "
    "(--model FILE.gguf)"
)
_QUANTISED = ("quantization_config", "compression_config")


def check_unread(d: dict[str, Any], read: frozenset[str]) -> None:
    """Raises UsageError for the first field beside those that are ``read`` that may mean another model."""
    for name in _QUANTISED:
        if d.get(name):
            method = d[name].get("quant_method") if isinstance(d[name], dict) else None
            said = repr(method) if isinstance(method, str) else short(d[name])
            raise UsageError(f"{name} is {said}; quantised weights are read from GGUF files alone: {_ADVICE}")
    _check_code(d.get("auto_map"))
    for name, value in d.items():
        # An unset field asks for nothing, but 0 may. Names with an underscore are transformers' own bookkeeping.
        is_set = value is not False and (bool(value) or value == 0)
        if is_set and name not in read and not name.startswith("_") and _may_change_the_model(name, value):
            raise UsageError(
                f"{name} is {short(value)}; this field is not supported, and by its name it may change what the model "
                "computes (supported: absent, null or false). If it does not, remove it from config.json"
            )


def _check_code(auto_map: Any) -> None:
    """Raises UsageError for a checkpoint with a model of its own; a tokenizer of its own is another matter."""
    if not auto_map:
        return
    names = set(auto_map) if isinstance(auto_map, dict) else {"AutoModel"}
    if any(name.startswith(("AutoModel", "AutoConfig")) for name in names):
        raise UsageError(
            f"auto_map is {short(auto_map)}; this checkpoint brings its own model code, which is not run: what it "
            "computes may differ. If transformers runs it without trust_remote_code, remove the field from config.json"
        )


def _may_change_the_model(name: str, value: Any) -> bool:
    if name in _OF_TRANSFORMERS or _HARMLESS.fullmatch(name):
        return False
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    if words and words[-1] in ("scale", "scaling", "multiplier", "factor") and value == 1:
        return False
    return not _TELLING.isdisjoint(words)
