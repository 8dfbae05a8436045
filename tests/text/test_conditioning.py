"""Conditionings: weights of emphasis, chunks of long prompts, texts by role, layers, in every family."""

from dataclasses import replace

import pytest
import torch
from tests.closeness import assert_parity
from tests.tiny import CAPTIONS, DEFAULTS, SPACE, randomised
from torch import Tensor

from darkroom.checkpoint.model import DenoiserSpec
from darkroom.config import from_json, to_json
from darkroom.diffusion.denoiser import Condition
from darkroom.diffusion.path import FlowPath
from darkroom.errors import InputError
from darkroom.text.clip import CLIPTextConfig, CLIPTextEncoder
from darkroom.text.conditioning import (
    ClassConditioning,
    FluxConditioning,
    SD3Conditioning,
    TextConditioning,
    TextPart,
    Told,
    XLConditioning,
)
from darkroom.text.prompt import Texts
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
@pytest.mark.parametrize("emphasis", ["darkroom", "a1111", "comfy"])
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


@pytest.mark.parametrize("kind", KINDS)
def test_our_weights_act_as_comfys(kind):
    assert torch.equal(context(kind, STRONG, "darkroom"), context(kind, STRONG, "comfy"))
    nested = ["a ((red:1.25):1.2) apple", "a rocket"]
    assert_parity(context(kind, nested, "darkroom"), context(kind, STRONG, "comfy"))
    silent = context(kind, ["a (red:0) apple", ""], "darkroom")
    where = RED_T5 if kind == "flux" or kind == "text_t5" else RED
    assert_parity(silent[0, where], silent[1, where])  # a weight of 0 is the empty prompt


@pytest.mark.parametrize("kind", ["xl", "sd3", "flux"])
@pytest.mark.parametrize("emphasis", ["darkroom", "a1111", "comfy"])
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


CHUNKED = ["text", "text_layer", "xl", "sd3"]


def told(kind: str, prompts: list, emphasis: str, **changes) -> Condition:
    ours, parts = KINDS[kind]
    ours = replace(ours, emphasis=emphasis, **changes)
    return ours.condition(parts, ours.tokens(parts, prompts), PICTURE)


def chunks_of(kind: str, prompts: list[str]) -> Tensor:
    """The states of texts that fit, one after the other; those of SD 3's T5 apart."""
    states = [context(kind, [prompt], "none")[:, :LENGTH] for prompt in prompts]
    return torch.cat(states, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", CHUNKED)
@pytest.mark.parametrize("emphasis", ["darkroom", "a1111"])
def test_chunks_have_marks_of_their_own_and_follow_each_other(kind, emphasis):
    cond = told(kind, ["a red apple BREAK a rocket", "an octopus"], emphasis)
    count = 2 * LENGTH
    assert_parity(cond.context[:1, :count], chunks_of(kind, ["a red apple", "a rocket"]))
    assert_parity(cond.context[1:, :count], chunks_of(kind, ["an octopus", ""]))
    assert cond.context.shape[1] == count + (T5_LENGTH if kind == "sd3" else 0)
    if cond.extra is not None:  # of the first chunk
        assert_parity(cond.extra.pooled, told(kind, ["a red apple", "an octopus"], "none").extra.pooled)


@torch.no_grad()
@pytest.mark.parametrize("emphasis", ["darkroom", "a1111", "comfy"])
@pytest.mark.parametrize("kind", CHUNKED)
def test_nothing_of_a_long_prompt_is_cut(kind, emphasis):
    long = " ".join("abcdefghijklmnopqrst")
    cond = told(kind, [long], emphasis)
    assert_parity(cond.context[:, : 2 * LENGTH], chunks_of(kind, [long[:27], long[28:]]))
    assert told(kind, [long], "none").context.shape[1] == cond.context.shape[1] - LENGTH


@torch.no_grad()
@pytest.mark.parametrize("emphasis", ["darkroom", "a1111", "comfy"])
def test_each_chunk_has_its_weights(emphasis):
    alone = [f"(a:1.5) {' '.join('bcdefghijklmn')}", "(a rocket:1.5)"]
    parts = [told("text", [text], emphasis).context for text in alone]
    assert_parity(told("text", [" ".join(alone)], emphasis).context, torch.cat(parts, dim=1))


@torch.no_grad()
def test_flux_reads_the_first_chunk_with_clip_and_all_with_t5():
    prompt = f"{' '.join('abcdefghijkl')}, red apple"
    cond = told("flux", [prompt], "darkroom")
    assert_parity(cond.extra.pooled, told("flux", [prompt[: prompt.index(" red")]], "none").extra.pooled)
    assert torch.equal(cond.context, told("flux", [prompt], "none").context)
    assert not torch.allclose(cond.extra.pooled, told("flux", [prompt], "none").extra.pooled)


@torch.no_grad()
@pytest.mark.parametrize("emphasis", ["none", "darkroom", "a1111", "comfy"])
@pytest.mark.parametrize("kind", ["xl", "sd3", "flux"])
def test_texts_by_role(kind, emphasis):
    texts = {"clip_l": "a rocket", "clip_g": "a (banana:1.5)", "t5": "an (octopus:1.5)"}
    roles = [reader.role for reader in KINDS[kind][0].readers(KINDS[kind][1])]
    mixed = told(kind, [Texts(main="a blob", **{role: texts[role] for role in roles})], emphasis)
    alone = {role: told(kind, [texts[role]], emphasis) for role in roles}
    widths = {"clip_l": slice(0, 8), "clip_g": slice(8, 24)}
    if kind == "flux":
        assert torch.equal(mixed.extra.pooled, alone["clip_l"].extra.pooled)
        assert torch.equal(mixed.context, alone["t5"].context)
        return
    for role in ("clip_l", "clip_g"):
        if (kind, emphasis) != ("sd3", "a1111"):  # which scales both together
            ours, theirs = (c.context[:, :LENGTH, widths[role]] for c in (mixed, alone[role]))
            assert_parity(ours, theirs)
    if kind == "sd3":
        assert_parity(mixed.context[:, LENGTH:], alone["t5"].context[:, LENGTH:])
        left, right = (alone[role].extra.pooled for role in ("clip_l", "clip_g"))
        assert_parity(mixed.extra.pooled, torch.cat([left[:, :8], right[:, 8:]], dim=1))
    else:
        assert_parity(mixed.extra.pooled, alone["clip_g"].extra.pooled)


@torch.no_grad()
def test_encoders_that_read_in_chunks_get_as_many():
    prompt = Texts(main="a red apple", clip_g="a rocket BREAK an octopus")
    for kind in ("xl", "sd3"):
        context_ = told(kind, [prompt], "darkroom").context
        left = chunks_of(kind, ["a red apple", ""])[..., :8]
        right = chunks_of(kind, ["a rocket", "an octopus"])[..., 8:24]
        assert_parity(context_[:, : 2 * LENGTH, :24], torch.cat([left, right], dim=-1))


def test_a_text_for_an_encoder_that_is_not_there():
    for kind, role, words in (
        ("text", "clip_l", "no text encoder 'clip_l' to read a text of its own: it has clip$"),
        ("text_t5", "t5", None),
        ("xl", "t5", "it has clip_l and clip_g"),
        ("flux", "clip_g", "it has clip_l and t5"),
    ):
        ours, parts = KINDS[kind]
        prompts = ["a", Texts(main="a", **{role: "b"})]
        if words is None:
            ours.tokens(parts, prompts)
            continue
        with pytest.raises(InputError, match=words):
            ours.tokens(parts, prompts)
    refiner = XLConditioning(aesthetic=True)
    assert [reader.role for reader in refiner.readers([CLIP_G])] == ["clip_g"]
    with pytest.raises(InputError, match="it has none"):
        ClassConditioning().tokens([], [Texts(main="3", t5="b")])
    assert ClassConditioning().tokens([], [Texts(main="3")])[0].tolist() == [3]


def test_t5_in_a_models_only_place_is_cut_at_its_length():
    ours, parts = KINDS["text_t5"]
    for emphasis in ("none", "darkroom"):
        prompt = "a red apple " * 20
        assert replace(ours, emphasis=emphasis).tokens(parts, [prompt])[0].shape == (1, T5_LENGTH)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["xl", "sd3"])
def test_the_layer_is_counted_from_the_end(kind):
    last, usual, first = (told(kind, PLAIN, "none", layer=layer) for layer in (-1, -2, -3))
    assert torch.equal(usual.context, context(kind, PLAIN, "none"))
    encoder, tokenizer = CLIP_G.encoder, CLIP_G.tokenizer
    hidden = encoder(tokenizer.encode(PLAIN)).hidden
    for cond, layer in ((last, -1), (first, -3)):
        assert torch.equal(cond.context[:, :LENGTH, 8:24], hidden[layer])
        assert torch.equal(cond.extra.pooled, usual.extra.pooled)
