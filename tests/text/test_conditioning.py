"""Conditionings with emphasis: weights beside the ids, and every family's states that follow them."""

from dataclasses import replace

import pytest
import torch
from tests.closeness import assert_parity
from tests.tiny import CAPTIONS, DEFAULTS, SPACE, randomised
from torch import Tensor

from darkroom.checkpoint.model import DenoiserSpec
from darkroom.config import from_json, to_json
from darkroom.diffusion.path import FlowPath
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder
from darkroom.text.conditioning import (
    ClassConditioning,
    FluxConditioning,
    SD3Conditioning,
    TextConditioning,
    TextPart,
    Told,
    XLConditioning,
    count_tokens,
)
from darkroom.text.t5 import T5Config, T5Encoder
from darkroom.text.t5_tokenizer import train_unigram
from darkroom.text.tokenizer import Tokenizer, train_bpe

LENGTH, T5_LENGTH = 16, 12
BPE = train_bpe(CAPTIONS * 2, 540, LENGTH)
UNIGRAM = train_unigram(CAPTIONS * 4, 80, T5_LENGTH)
PICTURE = Told(height=16, width=24)
PLAIN, STRONG = ["a red apple", "a rocket"], ["a (red:1.5) apple", "a rocket"]
RED = slice(2, 2 + BPE.count("red"))  # after the start mark and "a"
RED_T5 = slice(UNIGRAM.count("a"), UNIGRAM.count("a red"))


@torch.random.fork_rng(devices=[])
def clip(seed: int, *, pad: str | None = None) -> TextPart:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=BPE.vocab_size,
        context_length=LENGTH,
        width=8 + 8 * seed,
        layers=3,
        heads=2,
        projection_dim=8,
        eos_token_id=BPE.eos_token_id,
    )
    tokenizer = BPE if pad is None else Tokenizer(BPE.vocab, BPE.merges, context_length=LENGTH, pad=pad)
    return TextPart(randomised(CLIPTextEncoder(config)), tokenizer)


@torch.random.fork_rng(devices=[])
def t5() -> TextPart:
    torch.manual_seed(7)
    config = T5Config(
        vocab_size=UNIGRAM.vocab_size, width=40, layers=2, heads=2, head_width=8, intermediate=24
    )
    return TextPart(randomised(T5Encoder(config)), UNIGRAM)


CLIP_L, CLIP_G, T5 = clip(0), clip(1, pad="!</w>"), t5()
KINDS = {
    "text": (TextConditioning(), [CLIP_L]),
    "text_layer": (TextConditioning(layer=-2), [CLIP_L]),
    "text_t5": (TextConditioning(), [T5]),
    "xl": (XLConditioning(), [CLIP_L, CLIP_G]),
    "sd3": (SD3Conditioning(t5_length=T5_LENGTH, context_dim=40), [CLIP_L, CLIP_G, T5]),
    "flux": (FluxConditioning(t5_length=T5_LENGTH), [CLIP_L, T5]),
}


@torch.no_grad()
def context(kind: str, prompts: list[str], emphasis: str) -> Tensor:
    ours, parts = KINDS[kind]
    ours = replace(ours, emphasis=emphasis)
    return ours.condition(parts, ours.tokens(parts, prompts), PICTURE).context


def by_a1111(z: Tensor, where: slice) -> Tensor:
    """The states of one encoder for both prompts, after (red:1.5) in the first."""
    changed = z.clone()
    changed[0, where] *= 1.5
    changed[0] *= z[0].mean() / changed[0].mean()
    return changed


def by_comfy(z: Tensor, empty: Tensor, where: slice) -> Tensor:
    changed = z.clone()
    changed[0, where] = (z[0, where] - empty[0, where]) * 1.5 + empty[0, where]
    return changed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("emphasis", ["a1111", "comfy"])
def test_plain_prompts_have_the_same_bits(kind, emphasis):
    assert torch.equal(context(kind, PLAIN, emphasis), context(kind, PLAIN, "none"))


@pytest.mark.parametrize("kind", ["text", "text_layer", "text_t5"])
def test_one_encoder_follows_the_formulas(kind):
    plain, empty = context(kind, PLAIN, "none"), context(kind, [""], "none")
    where = RED_T5 if kind == "text_t5" else RED
    assert_parity(context(kind, STRONG, "a1111"), by_a1111(plain, where))
    assert_parity(context(kind, STRONG, "comfy"), by_comfy(plain, empty, where))
    assert not torch.allclose(context(kind, STRONG, "none"), plain)  # the brackets are read as text


def test_sdxl_restores_the_mean_of_each_encoder():
    plain, empty = context("xl", PLAIN, "none"), context("xl", [""], "none")
    first, second = plain.split([8, 16], dim=2)
    expected = torch.cat([by_a1111(first, RED), by_a1111(second, RED)], dim=2)
    assert_parity(context("xl", STRONG, "a1111"), expected)
    assert not torch.allclose(expected, by_a1111(plain, RED))
    assert_parity(context("xl", STRONG, "comfy"), by_comfy(plain, empty, RED))


def test_sd3_weights_t5_in_comfy_and_both_clips_as_one_in_a1111():
    plain, empty = context("sd3", PLAIN, "none"), context("sd3", [""], "none")
    clips, t5_states = plain.split([LENGTH, T5_LENGTH], dim=1)
    empty_clips, empty_t5 = empty.split([LENGTH, T5_LENGTH], dim=1)
    assert_parity(context("sd3", STRONG, "a1111"), torch.cat([by_a1111(clips, RED), t5_states], dim=1))
    both = [by_comfy(clips, empty_clips, RED), by_comfy(t5_states, empty_t5, RED_T5)]
    assert_parity(context("sd3", STRONG, "comfy"), torch.cat(both, dim=1))


def test_sd3_without_t5():
    ours, parts = replace(KINDS["sd3"][0], emphasis="a1111"), [CLIP_L, CLIP_G]
    out = ours.condition(parts, ours.tokens(parts, STRONG), PICTURE).context
    assert torch.equal(out[:, :LENGTH], context("sd3", STRONG, "a1111")[:, :LENGTH])
    assert not out[:, LENGTH:].any()


def test_flux_weights_t5():
    plain, empty = context("flux", PLAIN, "none"), context("flux", [""], "none")
    assert_parity(context("flux", STRONG, "a1111"), by_a1111(plain, RED_T5))
    assert_parity(context("flux", STRONG, "comfy"), by_comfy(plain, empty, RED_T5))


@pytest.mark.parametrize("kind", ["xl", "sd3", "flux"])
@pytest.mark.parametrize("emphasis", ["a1111", "comfy"])
def test_pooled_states_are_not_weighted(kind, emphasis):
    ours, parts = KINDS[kind]
    weighed = replace(ours, emphasis=emphasis)
    plain = ours.condition(parts, ours.tokens(parts, PLAIN), PICTURE).extra.pooled
    strong = weighed.condition(parts, weighed.tokens(parts, STRONG), PICTURE).extra.pooled
    assert torch.equal(strong, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_follow_the_ids_of_all_parts(kind):
    ours, parts = KINDS[kind]
    assert [ids.dtype for ids in ours.tokens(parts, STRONG)] == [torch.int64] * len(parts)
    tokens = replace(ours, emphasis="comfy").tokens(parts, STRONG)
    ids, weights = tokens[: len(parts)], tokens[len(parts) :]
    for plain, i, w in zip(ours.tokens(parts, PLAIN), ids, weights, strict=True):
        assert torch.equal(i, plain)
        assert w.shape == i.shape
        assert w.dtype == torch.float32
        assert set(w[0].tolist()) == {1.0, 1.5}
        assert set(w[1].tolist()) == {1.0}


def test_t5_grows_with_the_text_and_not_with_its_brackets():
    ours = SD3Conditioning(t5_length=4, t5_grows=True, context_dim=40, emphasis="comfy")
    parts = [CLIP_L, CLIP_G, T5]
    count = UNIGRAM.count("a red apple")
    assert count > 3
    for prompt in ("(a (red:1.5) apple:0.5)", "a red apple"):
        assert ours.tokens(parts, [prompt, ""])[2].shape == (2, count + 1)
    assert replace(ours, t5_grows=False).tokens(parts, ["a red apple"])[2].shape == (1, 4)


def test_signs_of_emphasis_do_not_count_as_tokens():
    prompt = "((a (red:1.5) apple))"
    for ours, parts in KINDS.values():
        plain = count_tokens(ours, parts[0], "a red apple")
        assert count_tokens(replace(ours, emphasis="a1111"), parts[0], prompt) == plain
        assert count_tokens(ours, parts[0], prompt) > plain
    assert count_tokens(ClassConditioning(), CLIP_L, "a red apple") == BPE.count("a red apple")


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_keeps_emphasis_and_old_headers_lack_it(kind):
    ours = replace(KINDS[kind][0], emphasis="comfy")
    spec = DenoiserSpec(
        prediction="flow", path=FlowPath(), latent_space=SPACE, defaults=DEFAULTS, conditioning=ours
    )
    text = to_json(spec)
    assert from_json(text, DenoiserSpec) == spec
    old = text.replace(',"emphasis":"comfy"', "")
    assert old != text
    assert from_json(old, DenoiserSpec).conditioning == KINDS[kind][0]
