"""The interposer's training learns what no affine map can, the same way each time."""

import math

import pytest
import torch
from torch import Tensor, nn

from darkroom.errors import InputError
from darkroom.evaluate.handful import handful
from darkroom.evaluate.latent_fit import agreement, fit
from darkroom.nn.latent_space import LatentSpace
from darkroom.train.interposer import InterposerTraining, train_interposer, view_latents

SHORT = InterposerTraining(steps=200, batch_size=8, views=48, cells=8, width=16, blocks=1, lr=5e-3)


class Bent(nn.Module):
    """An "autoencoder" that averages 4x4 pixels and bends the result, which no affine map undoes."""

    def __init__(self, bend: float) -> None:
        super().__init__()
        self.bend = nn.Parameter(torch.tensor(bend))
        self.latent_space = LatentSpace.identity(3, 4)

    def encode(self, image: Tensor) -> Tensor:
        mean = nn.functional.avg_pool2d(image, 4)
        return mean + self.bend * mean.abs().roll(1, dims=1)


@pytest.fixture(scope="module")
def pictures() -> list[Tensor]:
    return list(handful(64).values())


def test_it_learns_what_no_affine_map_can(pictures):
    old, new = Bent(0.0), Bent(0.6)
    interposer = train_interposer(old, new, pictures, SHORT)
    known, theirs = view_latents(old, new, pictures, InterposerTraining(views=32, cells=8, seed=1))
    with torch.no_grad():
        there, back = interposer.to_decoder(known), interposer.to_denoiser(theirs)
    affine = [fit("affine", list(known), list(theirs))(each) for each in known]
    best = agreement(affine, list(theirs)).r2
    assert best < 0.97
    assert agreement(list(there), list(theirs)).r2 > 1 - (1 - best) / 2
    assert agreement(list(back), list(known)).r2 > 0.9
    assert not any(p.requires_grad for p in interposer.parameters())
    assert not interposer.training


def test_the_same_call_gives_the_same_weights(pictures):
    training = InterposerTraining(steps=3, batch_size=4, views=8, cells=8, width=8, blocks=1)
    state = torch.get_rng_state()
    first, second = (train_interposer(Bent(0.0), Bent(0.6), pictures, training) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_views_are_as_many_as_asked_for_and_unlike_each_other(pictures):
    known, theirs = view_latents(
        Bent(0.0), Bent(0.0), pictures[:1], InterposerTraining(views=9, batch_size=4)
    )
    assert known.shape == theirs.shape == (9, 3, 16, 16)
    assert torch.equal(known, theirs)
    assert known.abs().max() <= 1
    distances = torch.cdist(known.flatten(1), known.flatten(1)) + torch.eye(9) * math.inf
    assert distances.nan_to_num(math.inf).min() > 1


def test_pictures_of_several_sizes_and_smaller_than_the_views(pictures):
    several = [pictures[0], pictures[1][:, :40, :64]]
    known, _ = view_latents(Bent(0.0), Bent(0.0), several, InterposerTraining(views=4))
    assert known.shape == (4, 3, 10, 10)


def test_too_many_parameters_and_bad_numbers_are_named(pictures):
    with pytest.raises(InputError, match=r"make 4,4[0-9]{2},[0-9]{3} parameters, more than 500,000"):
        train_interposer(
            Bent(0.0), Bent(0.6), pictures, InterposerTraining(width=202, steps=1, views=1, cells=8)
        )
    with pytest.raises(InputError, match="steps"):
        InterposerTraining(steps=0)
    with pytest.raises(InputError, match="pictures of 3 pixels are smaller than the 4"):
        view_latents(Bent(0.0), Bent(0.0), [pictures[0][:, :3]], SHORT)
