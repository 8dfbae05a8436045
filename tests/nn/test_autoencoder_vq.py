"""The VQ autoencoder: quantisation, gradients, statistics, and the revival of dead codes."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from darkroom.nn import autoencoder_vq
from darkroom.nn.autoencoder_vq import (
    AutoencoderVQ,
    AutoencoderVQConfig,
    Codebook,
    CodeRevival,
    VQReconstruction,
)
from darkroom.nn.latent_space import LatentSpace

CONFIG = AutoencoderVQConfig(latent_channels=3, channels=(16, 32), res_blocks=1, groups=8, codes=32)


def build(seed: int = 0, latent_space: LatentSpace | None = None) -> AutoencoderVQ:
    torch.manual_seed(seed)
    model = AutoencoderVQ(CONFIG, latent_space)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


def image(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def output_of(latents: Tensor, codebook: Codebook) -> VQReconstruction:
    codes = codebook(latents)
    return VQReconstruction(torch.zeros(()), codes.loss, codes.indices, latents)


def test_nearest_in_slabs_is_the_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder_vq, "SLAB", 7)
    codebook, z = build().quantize, torch.randn(2, 3, 4, 5)
    distances = (z[:, None] - codebook.embedding.weight[None, :, :, None, None]).square().sum(2)
    indices = codebook.nearest(z)
    assert torch.equal(indices, distances.argmin(1))
    moved = codebook(z).latents
    assert torch.allclose(moved[1, :, 2, 3], codebook.embedding.weight[indices[1, 2, 3]], atol=1e-6)


def test_commitment_weighs_the_latents() -> None:
    codebook, z = Codebook(4, 1, commitment=0.25), torch.zeros(1, 1, 1, 1, requires_grad=True)
    with torch.no_grad():
        codebook.embedding.weight.copy_(torch.tensor([[2.0], [9.0], [9.0], [9.0]]))
    loss = codebook(z).loss
    assert loss.item() == pytest.approx(4 + 0.25 * 4)
    loss.backward()
    assert z.grad.item() == pytest.approx(0.25 * -4)
    assert codebook.embedding.weight.grad[:, 0].tolist() == pytest.approx([4, 0, 0, 0])


def test_gradients_pass_straight_through_and_reach_everything() -> None:
    model, x = build(), image()
    z = torch.randn(1, 3, 4, 4, requires_grad=True)
    moved = model.quantize(z).latents
    weights = torch.randn_like(moved)
    assert torch.equal(torch.autograd.grad((moved * weights).sum(), z)[0], weights)
    output = model.quantised_reconstruction(x)
    (output.image - x).square().mean().backward()
    assert model.quantize.embedding.weight.grad is None or model.quantize.embedding.weight.grad.norm() == 0
    assert model.encoder.conv_in.weight.grad.norm() > 0
    model.quantised_reconstruction(x).codebook_loss.backward()
    # A key's bias adds the same to every score of a row, which softmax ignores.
    lost = [n for n, p in model.named_parameters() if p.grad.norm() == 0 and not n.endswith("to_k.bias")]
    assert lost == []
    assert output.image.shape == x.shape and output.indices.shape == (2, 8, 12)
    assert not output.latents.requires_grad


def test_encode_stops_before_quantisation_and_normalises() -> None:
    space = LatentSpace(channels=3, stride=2, mean=(0.5, -1.0, 2.0), std=(2.0, 0.5, 3.0))
    plain, model, x = build(), build(latent_space=space), image()
    with torch.no_grad():
        raw, latents = plain.encode(x), model.encode(x)
        assert torch.allclose(space.denormalise(latents), raw, atol=1e-5)
        output = plain.quantised_reconstruction(x)
        assert torch.equal(output.latents, raw)
        assert torch.allclose(model.decode(latents), output.image, atol=1e-5)
        # Codes absorb a change too small to reach the next one, and so show that decode quantises.
        table = plain.quantize.embedding.weight
        exact = table[output.indices].permute(0, 3, 1, 2)
        assert torch.allclose(plain.decode(exact + 1e-4), plain.decode(exact), atol=1e-6)
        assert not torch.allclose(plain.decode(exact.roll(1, 0)), plain.decode(exact), atol=1e-3)
    assert model.last_layer is model.decoder.conv_out.weight


def test_half_precision_quantises_in_float32() -> None:
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        output = model.quantised_reconstruction(image())
    assert output.codebook_loss.dtype == torch.float32
    assert torch.equal(model.quantize.nearest(output.latents), output.indices)


def test_usage() -> None:
    codebook = Codebook(8, 2, 0.25)
    even = codebook.usage(torch.tensor([[0, 1], [2, 3]]))
    assert even["codebook_perplexity"].item() == pytest.approx(4.0)
    assert even["codebook_used"].item() == pytest.approx(0.5)
    assert codebook.usage(torch.full((3, 3), 5))["codebook_perplexity"].item() == pytest.approx(1.0)


def test_dead_codes_revive_and_living_ones_stay() -> None:
    codebook, revival = Codebook(4, 2, 0.25), CodeRevival(4, patience=3)
    with torch.no_grad():
        codebook.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]]))
    before = codebook.embedding.weight.detach().clone()
    z = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        assert torch.equal(codebook.embedding.weight, before)
        dead = revival(codebook, output_of(z, codebook), torch.Generator().manual_seed(step))
        assert dead.tolist() == [False] + [step == 2] * 3
    after = codebook.embedding.weight.detach()
    assert torch.equal(after[0], before[0])
    vectors = z.permute(0, 2, 3, 1).reshape(-1, 2)
    assert all((vectors == code).all(1).any() for code in after[1:])
    assert revival.idle.tolist() == [0, 0, 0, 0]
    assert codebook.usage(codebook.nearest(z))["codebook_used"] > 0.5


def test_revival_repeats_and_resumes() -> None:
    tables = []
    for interrupted in (False, True):
        codebook, revival = build().quantize, CodeRevival(32, patience=4)
        for step in range(6):
            z = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(step))
            revival(codebook, output_of(z, codebook), torch.Generator().manual_seed(step))
            if interrupted and step == 2:
                state = revival.state_dict()
                revival = CodeRevival(32, patience=4)
                revival.load_state_dict(state)
        tables.append(codebook.embedding.weight.detach().clone())
    assert torch.equal(*tables)
    assert not torch.equal(tables[0], build().quantize.embedding.weight)


def revive_in_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    codebook, revival = build().quantize, CodeRevival(32, patience=1)
    z = codebook.embedding.weight.detach()[rank].reshape(1, 3, 1, 1)  # each process uses its own code
    revival(codebook, output_of(z, codebook), torch.Generator().manual_seed(rank))
    torch.save(codebook.embedding.weight.detach(), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_agree_on_the_codebook(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(revive_in_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    original = build().quantize.embedding.weight
    assert torch.equal(first[:2], original[:2])
    assert torch.equal(first[2:], original[:1].expand(30, 3))
