"""Checkpoints without what only training needs."""

import json
from pathlib import Path

import pytest
import torch
from tests.checkpoint.relatives import MATRIX, STAGE, Tensors, same, small_model
from tests.checkpoint.test_single_file import UNET

from darkroom.checkpoint.prune import ema_name, prune
from darkroom.errors import InputError


@pytest.fixture(scope="module")
def first() -> Tensors:
    return small_model()


def test_pruning_drops_uses_or_keeps_averages(first: Tensors) -> None:
    copies = {ema_name(n): t + 1 for n, t in first.items() if n.startswith("model.")}
    whole = first | copies | {"model_ema.decay": torch.tensor(0.9), "loss.logvar": torch.zeros(1)}
    assert ema_name(f"{UNET}out.2.bias") == "model_ema.diffusion_modelout2bias"
    dropped = prune(whole)
    assert same(dropped.tensors, first) and set(dropped.dropped) == {"averaged copies", "losses"}
    assert dropped.after < dropped.before
    used = prune(whole, ema="use").tensors
    assert used.keys() == first.keys() and torch.equal(used[MATRIX], first[MATRIX] + 1)
    stage = "first_stage_model.decoder.conv_in.weight"
    assert torch.equal(used[stage], first[stage])
    assert copies.keys() <= prune(whole, ema="keep").tensors.keys()
    half = prune(whole, dtype=torch.float16, full_autoencoder=True).tensors
    assert half[MATRIX].dtype == torch.float16 and half[stage].dtype == torch.float32
    positions = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert half[positions].dtype == torch.int64


def test_averages_that_are_not_the_models(first: Tensors) -> None:
    with pytest.raises(InputError, match="there are no averaged weights"):
        prune(first, ema="use")
    with pytest.raises(InputError, match="are not those of the model"):
        prune(first | {"model_ema.what": torch.zeros(1)}, ema="use")


def test_averages_of_other_shapes(first: Tensors) -> None:
    copies = {ema_name(n): t for n, t in first.items() if n.startswith("model.")}
    with pytest.raises(InputError, match=f"are of other shapes than the model's: {MATRIX}"):
        prune(first | copies | {ema_name(MATRIX): torch.zeros(1)}, ema="use")


def test_published_averages_have_these_names(shared: Path) -> None:
    def listed(name: str) -> list[str]:
        return list(json.loads((shared / f"reference/keys/{name}.json").read_text())["tensors"])

    model, extra = listed("sd15.single"), listed("sd15.single.ema_extra")
    tensors = {name: torch.tensor([1.0]) for name in model} | {name: torch.tensor([2.0]) for name in extra}
    used = prune(tensors, ema="use")
    assert list(used.tensors) == model and set(used.dropped["averaged copies"]) == set(extra)
    assert all(float(t) == (2 if n.startswith("model.") else 1) for n, t in used.tensors.items())


def test_something_must_be_left() -> None:
    with pytest.raises(InputError, match=r"nothing would be left: the file holds model_ema\.decay"):
        prune({"model_ema.decay": torch.tensor(0.9)})


def test_scales_of_float8_are_multiplied_out(first: Tensors) -> None:
    weight = torch.tensor([[1.0, 2.0], [0.5, 4.0]])
    scaled = {"a.weight": weight.to(torch.float8_e4m3fn), "a.scale_weight": torch.tensor(3.0)}
    found = prune(
        first | scaled | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, dtype=torch.float16
    )
    assert torch.equal(found.tensors["a.weight"], (3 * weight).half())
    assert "a.scale_weight" not in found.tensors


def test_states_of_optimizers_go(first: Tensors) -> None:
    more = {"optimizer_states.0.state.0.exp_avg": torch.zeros(8), "optimizer.state.1.exp_avg": torch.zeros(8)}
    found = prune(first | more, ema="keep")
    assert same(found.tensors, first) and set(found.dropped["states of optimizers"]) == set(more)
    assert found.before - found.after == 2 * 8 * 4


def test_schedules_keep_their_digits(first: Tensors) -> None:
    schedule = {"alphas_cumprod": torch.rand(1000), "scale_factor": torch.tensor(0.18215)}
    found = prune(first | schedule, dtype=torch.float16).tensors
    assert all(torch.equal(found[name], schedule[name]) for name in schedule)
    assert found[STAGE].dtype == torch.float16


def test_numbers_without_room_are_named(first: Tensors) -> None:
    large = first | {MATRIX: first[MATRIX] + 1e6}
    with pytest.raises(InputError, match=r"attn1\.to_q\.weight: has numbers too large for float16"):
        prune(large, dtype=torch.float16)
    assert prune(large, dtype=torch.bfloat16).tensors[MATRIX].isfinite().all()
