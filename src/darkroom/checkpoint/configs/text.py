"""The configs of transformers' text encoders, CLIP's and T5's, and of diffusers' `LDMBertModel`, as ours, and
back.
"""

from collections.abc import Mapping
from typing import Any

from darkroom.checkpoint.configs.fields import Fields
from darkroom.errors import unknown
from darkroom.text import clip, t5
from darkroom.text.clip import CLIPTextConfig
from darkroom.text.ldm import LDMTextConfig
from darkroom.text.t5 import T5Config
from darkroom.text.tokenizer import Tokenizer

PROJECTING = ("CLIPTextModelWithProjection", "CLIPModel")

CLIP = Fields(
    owner="transformers CLIP",
    class_field="model_type",
    classes=("clip_text_model", "clip"),
    read={
        "eos_token_id": 49407,
        "hidden_act": "quick_gelu",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "max_position_embeddings": 77,
        "num_attention_heads": 8,
        "num_hidden_layers": 12,
        "projection_dim": 512,
        "vocab_size": 49408,
    },
    fixed={"layer_norm_eps": clip.EPS, "pruned_heads": {}},
    open=True,
)
T5 = Fields(
    owner="transformers T5",
    class_field="model_type",
    classes=("t5",),
    read={
        "d_ff": 2048,
        "d_kv": 64,
        "d_model": 512,
        "feed_forward_proj": "relu",
        "num_heads": 8,
        "num_layers": 6,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "vocab_size": 32128,
    },
    fixed={
        "dense_act_fn": "gelu_new",
        "is_decoder": False,
        "is_gated_act": True,
        "layer_norm_epsilon": t5.EPS,
        "pruned_heads": {},
    },
    open=True,
)
LDM = Fields(
    owner="diffusers LDMBert",
    class_field="model_type",
    classes=("ldmbert",),
    read={
        "d_model": 1280,
        "encoder_attention_heads": 8,
        "encoder_ffn_dim": 5120,
        "encoder_layers": 32,
        "head_dim": 64,
        "max_position_embeddings": 77,
        "vocab_size": 30522,
    },
    fixed={"activation_function": "gelu", "scale_embedding": False},
    open=True,
)


def text_config_from_transformers(config: Mapping[str, Any]) -> CLIPTextConfig | T5Config | LDMTextConfig:
    """Read the config of a text encoder of any of these kinds, which its `model_type` names.

    Fields that change no number here, as those for generating, are ignored. Raises InputError for another
    kind, and naming a field that asks for a variant that our encoder doesn't have.
    """
    readers = {
        "clip": clip_config_from_transformers,
        "clip_text_model": clip_config_from_transformers,
        "ldmbert": ldm_text_config_from_diffusers,
        "t5": t5_config_from_transformers,
    }
    kind = config.get("model_type")
    if kind not in readers:
        raise unknown("text encoder `model_type`", str(kind), readers)
    return readers[kind](config)


def clip_config_from_transformers(config: Mapping[str, Any]) -> CLIPTextConfig:
    """Read the config of transformers' `CLIPTextModel`, which has no projection, of
    `CLIPTextModelWithProjection`, or of a whole `CLIPModel`, whose text encoder's is nested in it.

    Which of them it is, `architectures` says. Raises as `text_config_from_transformers` does.
    """
    own = config.get("text_config") or config
    fields = CLIP.of(own)
    if fields["hidden_act"] not in ("quick_gelu", "gelu"):
        raise CLIP.unsupported("hidden_act", fields["hidden_act"], "'quick_gelu' or 'gelu'")
    projects = any(name in PROJECTING for name in config.get("architectures") or ())
    return CLIPTextConfig(
        vocab_size=fields["vocab_size"],
        context_length=fields["max_position_embeddings"],
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=fields["num_attention_heads"],
        intermediate=fields["intermediate_size"],
        activation=fields["hidden_act"],
        projection_dim=config.get("projection_dim", fields["projection_dim"]) if projects else None,
        eos_token_id=fields["eos_token_id"],
    )


def clip_config_to_transformers(
    config: CLIPTextConfig, tokenizer: Tokenizer | None, *, projected: bool = False
) -> dict[str, Any]:
    """Write the config under which transformers' `CLIPTextModel` is the same network.

    Without a tokenizer its marks are CLIP's own. With `projected` it is `CLIPTextModelWithProjection`, whose
    projection is square where ours has none.
    """
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": config.vocab_size - 2 if tokenizer is None else tokenizer.bos_token_id,
        "eos_token_id": config.end_token,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "layer_norm_eps": clip.EPS,
        "max_position_embeddings": config.context_length,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": config.end_token if tokenizer is None else tokenizer.pad_token_id,
        "projection_dim": config.projection_dim or config.width,
        "vocab_size": config.vocab_size,
    }


def t5_config_from_transformers(config: Mapping[str, Any]) -> T5Config:
    """Read the config of transformers' `T5EncoderModel`, of T5 1.1; raises as
    `text_config_from_transformers` does.
    """
    fields = T5.of(config)
    if fields["feed_forward_proj"] != "gated-gelu":
        raise T5.unsupported("feed_forward_proj", fields["feed_forward_proj"], "'gated-gelu'")
    return T5Config(
        vocab_size=fields["vocab_size"],
        width=fields["d_model"],
        layers=fields["num_layers"],
        heads=fields["num_heads"],
        head_width=fields["d_kv"],
        intermediate=fields["d_ff"],
        buckets=fields["relative_attention_num_buckets"],
        max_distance=fields["relative_attention_max_distance"],
    )


def t5_config_to_transformers(config: T5Config) -> dict[str, Any]:
    """Write the config under which transformers' `T5EncoderModel` is the same network."""
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": config.intermediate,
        "d_kv": config.head_width,
        "d_model": config.width,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": t5.EPS,
        "model_type": "t5",
        "num_heads": config.heads,
        "num_layers": config.layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.buckets,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }


def ldm_text_config_from_diffusers(config: Mapping[str, Any]) -> LDMTextConfig:
    """Read the config of diffusers' `LDMBertModel`; raises as `text_config_from_transformers` does."""
    fields = LDM.of(config)
    return LDMTextConfig(
        vocab_size=fields["vocab_size"],
        context_length=fields["max_position_embeddings"],
        width=fields["d_model"],
        layers=fields["encoder_layers"],
        heads=fields["encoder_attention_heads"],
        head_width=fields["head_dim"],
        intermediate=fields["encoder_ffn_dim"],
    )


def ldm_text_config_to_diffusers(config: LDMTextConfig) -> dict[str, Any]:
    """Write the config under which diffusers' `LDMBertModel` is the same network."""
    return {
        "activation_function": "gelu",
        "architectures": ["LDMBertModel"],
        "d_model": config.width,
        "encoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.mlp_width,
        "encoder_layers": config.layers,
        "head_dim": config.head_width,
        "max_position_embeddings": config.context_length,
        "model_type": "ldmbert",
        "pad_token_id": 0,
        "scale_embedding": False,
        "vocab_size": config.vocab_size,
    }
