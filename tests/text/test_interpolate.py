"""Between prompts: ends that are exact, lengths made one, and what a U-Net sees of a text told twice."""

import pytest
import torch
from tests.closeness import assert_parity
from tests.tiny import tiny_parts
from torch import Tensor

from darkroom.blend import slerp
from darkroom.diffusion.denoiser import Condition
from darkroom.errors import InputError
from darkroom.nn.extra import Extra
from darkroom.text.interpolate import interpolate, same_length


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def condition(seed: int, length: int = 6, **extra: Tensor) -> Condition:
    return Condition(drawn(2, length, 8, seed=seed), Extra(pooled=drawn(2, 5, seed=seed + 50), **extra))


A, B = condition(1), condition(2)


@pytest.mark.parametrize("how", ["linear", "arc"])
def test_the_ends_are_the_prompts(how):
    for t, end in ((0.0, A), (1.0, B)):
        mixed = interpolate(A, B, t, how=how)
        assert torch.equal(mixed.context, end.context)
        assert torch.equal(mixed.extra.pooled, end.extra.pooled)


def test_on_the_line_and_on_the_arc():
    mixed = interpolate(A, B, 0.25)
    assert_parity(mixed.context, 0.75 * A.context + 0.25 * B.context)
    assert_parity(mixed.extra.pooled, 0.75 * A.extra.pooled + 0.25 * B.extra.pooled)
    arc = interpolate(A, B, 0.25, how="arc")
    assert_parity(arc.context[1, 3], slerp(A.context[1, 3][None], B.context[1, 3][None], 0.25)[0])
    assert_parity(arc.extra.pooled, slerp(A.extra.pooled, B.extra.pooled, 0.25))
    assert not torch.allclose(arc.context, mixed.context)


def test_what_is_the_same_stays():
    labels, guidance = torch.tensor([3, 4]), torch.tensor([3.5, 3.5])
    a = Condition(A.context, Extra(pooled=A.extra.pooled, class_labels=labels, guidance=guidance))
    b = Condition(B.context, Extra(pooled=B.extra.pooled, class_labels=labels.clone(), guidance=guidance * 2))
    mixed = interpolate(a, b, 0.5)
    assert torch.equal(mixed.extra.class_labels, labels)
    assert mixed.extra.guidance.tolist() == [5.25, 5.25]
    uneven = (Condition(None, Extra(guidance=torch.tensor(pair))) for pair in ([1.0, 5.0], [5.0, 1.0]))
    assert interpolate(*uneven, 0.5, how="arc").extra.guidance.tolist() == [3.0, 3.0]
    assert interpolate(Condition(A.context), Condition(B.context), 0.5).extra is None


def test_lengths_are_made_one():
    one, two, three = (condition(k, 6 * k) for k in (1, 2, 3))
    mixed = interpolate(two, three, 0.5)
    assert mixed.context.shape[1] == 36
    assert_parity(mixed.context, (two.context.repeat(1, 3, 1) + three.context.repeat(1, 2, 1)) / 2)
    assert [c.context.shape[1] for c in same_length([one, two, three])] == [36] * 3
    assert same_length([one, condition(9)])[0] is one
    assert torch.equal(same_length([one, three])[0].extra.pooled, one.extra.pooled)
    far = [condition(1, 77), condition(2, 333)]
    assert same_length(far)[0].context.shape[1] == 77  # no short multiple in common
    masked = Condition(one.context, Extra(context_mask=drawn(2, 6) > 0))
    mask = same_length([masked, two])[0].extra.context_mask
    assert torch.equal(mask, masked.extra.context_mask.repeat(1, 2))
    bare = Condition(None)
    assert same_length([bare, one, two])[0] is bare


def test_a_u_net_sees_the_same_in_a_text_told_twice():
    denoiser = tiny_parts().denoiser
    x, context, sigma = drawn(2, 4, 8, 8), drawn(2, 6, 16, seed=3), torch.tensor([0.5, 0.5])
    once = denoiser(x, sigma, Condition(context))
    twice = denoiser(x, sigma, Condition(context.repeat(1, 2, 1)))
    padded = denoiser(x, sigma, Condition(torch.cat([context, drawn(2, 6, 16, seed=4)], dim=1)))
    assert_parity(twice, once)
    assert (padded - once).norm() / once.norm() > 1e-3


@pytest.mark.parametrize(
    ("a", "b", "t", "words"),
    [
        (A, B, 1.5, r"t must be in 0 \.\.\. 1, not 1.5"),
        (A, B, float("nan"), "t must be in"),
        (A, Condition(B.context), 0.5, "only one of them has 'pooled'"),
        (A, Condition(None, B.extra), 0.5, "only one of them has 'context'"),
        (condition(1, 77), condition(2, 333), 0.5, r"'context' have shapes \(2, 77, 8\) and \(2, 333, 8\)"),
        (Condition(None, Extra(skip=(1,))), Condition(None), 0.5, "their 'skip' or 'perturbed' differ"),
        (
            Condition(None, Extra(class_labels=torch.tensor([1]))),
            Condition(None, Extra(class_labels=torch.tensor([2]))),
            0.5,
            "'class_labels' differ",
        ),
    ],
)
def test_what_cannot_be_mixed(a, b, t, words):
    with pytest.raises(InputError, match=words):
        interpolate(a, b, t)
