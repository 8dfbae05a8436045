"""Configs of text encoders to transformers' fields and back."""

from typing import Any

import pytest
import torch
from tests.checkpoint.configs.helpers import in_file, meta, meta_shapes
from tests.closeness import assert_parity
from tests.networks import shapes_of, with_unit_gain

from darkroom.checkpoint.configs.text import (
    clip_config_to_transformers,
    ldm_text_config_to_diffusers,
    t5_config_to_transformers,
    text_config_from_transformers,
)
from darkroom.checkpoint.layouts import CLIP_TEXT_TO_HUB
from darkroom.errors import InputError
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder
from darkroom.text.ldm import LDMTextConfig
from darkroom.text.t5 import T5Config, T5Encoder
from darkroom.text.tokenizer import Tokenizer, train_bpe

CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
SD2 = (
    CLIP_L
    | {"hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 512}
    | {
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
    }
)
BIGG = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"],
    "eos_token_id": 49407,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
XXL = {
    "architectures": ["T5EncoderModel"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}
BERT = {"model_type": "ldmbert", "activation_function": "gelu", "d_model": 1280, "encoder_layers": 32}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["a red circle", "a blue square"], 530, 16)


def test_reads_the_published_ones() -> None:
    old = CLIPTextConfig(intermediate=3072, eos_token_id=2)
    assert text_config_from_transformers(CLIP_L) == old
    assert text_config_from_transformers(SD2) == CLIPTextConfig(
        width=1024, layers=23, heads=16, intermediate=4096, activation="gelu", eos_token_id=2
    )
    assert text_config_from_transformers(BIGG) == CLIPTextConfig(
        width=1280,
        layers=32,
        heads=20,
        intermediate=5120,
        activation="gelu",
        projection_dim=1280,
        eos_token_id=49407,
    )
    assert text_config_from_transformers(XXL) == T5Config()
    assert text_config_from_transformers(BERT) == LDMTextConfig(intermediate=5120)


def test_reads_the_text_half_of_a_whole_clip() -> None:
    nested = {n: v for n, v in CLIP_L.items() if n not in ("architectures", "projection_dim")}
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 640}
    config = text_config_from_transformers(whole | {"text_config": nested, "vision_config": {}})
    assert config == CLIPTextConfig(intermediate=3072, eos_token_id=2, projection_dim=640)


def test_what_files_leave_out_is_as_in_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    read = text_config_from_transformers({"model_type": "clip_text_model"})
    theirs = transformers.CLIPTextConfig().to_dict()
    assert read == text_config_from_transformers(theirs)
    gated = {"feed_forward_proj": "gated-gelu"}
    theirs = transformers.T5Config(**gated).to_dict()
    assert text_config_from_transformers({"model_type": "t5"} | gated) == text_config_from_transformers(
        theirs
    )


CLIPS = [
    CLIPTextConfig(
        vocab_size=60, context_length=9, width=16, layers=2, heads=2, intermediate=40, eos_token_id=2
    ),
    CLIPTextConfig(
        vocab_size=50, width=24, layers=1, heads=3, intermediate=96, activation="gelu", eos_token_id=49
    ),
    CLIPTextConfig(
        vocab_size=70, width=16, layers=3, heads=4, intermediate=8, projection_dim=12, eos_token_id=7
    ),
]


@pytest.mark.parametrize("config", CLIPS)
def test_clip_there_and_back(config: CLIPTextConfig, tokenizer: Tokenizer) -> None:
    projected = config.projection_dim is not None
    written = in_file(clip_config_to_transformers(config, tokenizer, projected=projected))
    assert text_config_from_transformers(written) == config


@pytest.mark.parametrize("config", CLIPS)
def test_transformers_computes_the_same(config: CLIPTextConfig, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    projected = config.projection_dim is not None
    written = clip_config_to_transformers(config, tokenizer, projected=projected)
    kind = getattr(transformers, written["architectures"][0])
    reference = kind(transformers.CLIPTextConfig.from_dict(written)).eval()
    network = with_unit_gain(CLIPTextEncoder(config))
    prefixed = any(name.startswith("text_model.") for name in reference.state_dict())
    theirs = CLIP_TEXT_TO_HUB(network.state_dict()) if prefixed else network.state_dict()
    reference.load_state_dict(theirs, strict=True)
    ids = torch.randint(10, 45, (2, 8), generator=torch.Generator().manual_seed(1))
    ids[0, 5], ids[1, 7] = config.end_token, config.end_token
    if config.end_token == 2:
        ids[0, 5], ids[1, 7] = 59, 59  # the largest of its row, as in old vocabularies
    with torch.no_grad():
        ours, expected = network(ids), reference(ids)
    assert_parity(ours.last, expected.last_hidden_state)
    assert_parity(ours.pooled, expected.text_embeds if projected else expected.pooler_output)


@pytest.mark.parametrize(
    "config",
    [
        T5Config(),
        T5Config(vocab_size=40, width=16, layers=2, heads=3, head_width=4, intermediate=24),
        T5Config(width=24, layers=1, heads=2, head_width=12, intermediate=8, buckets=16, max_distance=40),
    ],
)
def test_t5_there_and_back(config: T5Config) -> None:
    transformers = pytest.importorskip("transformers")
    written = in_file(t5_config_to_transformers(config))
    assert text_config_from_transformers(written) == config
    reference = meta(lambda: transformers.T5EncoderModel(transformers.T5Config.from_dict(written)))
    theirs = shapes_of(reference.state_dict())
    theirs.pop("encoder.embed_tokens.weight", None)  # a second copy
    assert theirs == meta_shapes(lambda: T5Encoder(config))


@pytest.mark.parametrize(
    "config",
    [
        LDMTextConfig(intermediate=5120),
        LDMTextConfig(width=640, intermediate=2560),
        LDMTextConfig(vocab_size=9, width=8, layers=1, heads=1, head_width=2, intermediate=5),
    ],
)
def test_ldm_text_there_and_back(config: LDMTextConfig) -> None:
    assert text_config_from_transformers(in_file(ldm_text_config_to_diffusers(config))) == config


UNSUPPORTED = [
    (CLIP_L, "hidden_act", "relu"),
    (CLIP_L, "layer_norm_eps", 1e-6),
    (CLIP_L, "num_hidden_layers", "12"),
    (XXL, "feed_forward_proj", "relu"),
    (XXL, "feed_forward_proj", "gated-silu"),
    (XXL, "dense_act_fn", "silu"),
    (XXL, "is_gated_act", False),
    (XXL, "is_decoder", True),
    (XXL, "layer_norm_epsilon", 1e-5),
    (BERT, "activation_function", "relu"),
    (BERT, "scale_embedding", True),
]


@pytest.mark.parametrize(("fields", "field", "value"), UNSUPPORTED)
def test_unsupported_fields_are_named(fields: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"`{field}` = "):
        text_config_from_transformers(fields | {field: value})


def test_a_t5_without_a_gate_is_refused_where_its_field_is_left_out() -> None:
    with pytest.raises(InputError, match="`feed_forward_proj` = 'relu'"):
        text_config_from_transformers({n: v for n, v in XXL.items() if n != "feed_forward_proj"})


@pytest.mark.parametrize("kind", [None, "umt5", "bert"])
def test_other_kinds_are_refused(kind: str | None) -> None:
    with pytest.raises(InputError, match="Known: clip, clip_text_model, ldmbert, t5"):
        text_config_from_transformers(XXL | {"model_type": kind})
