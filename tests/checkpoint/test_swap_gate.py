"""The rules of the gate, on figures made up for them."""

import pytest

from darkroom.checkpoint.swap_gate import (
    Trial,
    Verdict,
    quality_reason,
    quality_warnings,
    reason,
    shape_reason,
)
from darkroom.evaluate.latent_fit import Agreement
from darkroom.evaluate.reconstruction import LatentStatistics, Quality, Reconstructed
from darkroom.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig


def trial(decoded=30.0, encoded=30.0, own=30.0, theirs=30.0, there=1.0, back=1.0, kind="identity") -> Trial:
    return Trial(
        kind=kind,
        decoded=decoded,
        encoded=encoded,
        own=own,
        theirs=theirs,
        to_decoder=Agreement(r2=there, worst_channel=there),
        to_denoiser=Agreement(r2=back, worst_channel=back),
        images=(),
    )


def made(psnr=30.0, **finite) -> Reconstructed:
    return Reconstructed(
        channels=4,
        stride=8,
        parameters=1_500_000,
        each=(Quality(psnr=psnr, ssim=0.9, gmsd=0.05),),
        images=(),
        latents=LatentStatistics(channel_mean=(0.0,), channel_std=(1.0,), largest=1.0),
        finite={"float32": True, "bfloat16": True, "float16": True} | finite,
    )


@pytest.mark.parametrize(
    ("figures", "holds"),
    [
        ({}, True),
        ({"decoded": 29.6}, True),
        ({"decoded": 29.4}, False),  # more than half a decibel lost
        ({"encoded": 27.1}, True),
        ({"encoded": 26.9}, False),
        ({"there": 0.89}, False),
        ({"back": 0.89}, False),
        ({"theirs": 36.0, "decoded": 31.0}, True),  # less than it could, but a gain
        ({"theirs": 36.0, "decoded": 29.0}, False),
        ({"theirs": 25.0, "decoded": 24.8, "encoded": 24.5}, True),  # a worse autoencoder that fits
        ({"theirs": 23.9, "decoded": 23.9}, False),  # twice the error
        ({"decoded": float("nan")}, False),
        ({"there": float("nan")}, False),
    ],
)
def test_what_holds(figures, holds):
    assert trial(**figures).holds == holds


def test_an_interposer_is_of_use_down_to_half_the_variance_and_twice_the_error():
    assert trial(decoded=24.1, there=0.5).agrees(0.5)
    assert not trial(decoded=24.1, there=0.49).agrees(0.5)
    assert not trial(decoded=23.9).agrees(0.5)


def test_words_say_what_is_lost_and_gained():
    assert "29.00 dB, 1.00 dB less than the model's own (30.00 dB)" in reason(trial(decoded=29.0))
    assert "31.00 dB, 1.00 dB more than" in reason(trial(decoded=31.0))
    assert "30.00 dB, the same as" in reason(trial(decoded=30.004))
    assert "R² = 0.9600 (relative error 0.2000)" in reason(trial(there=0.96))


def kl(channels: int, levels: int, **options) -> AutoencoderKL:
    return AutoencoderKL(
        AutoencoderKLConfig(
            latent_channels=channels, channels=(8,) * levels, res_blocks=1, groups=4, **options
        )
    )


def test_shapes_come_first():
    old = kl(4, 3)
    assert shape_reason(old, kl(4, 3)) is None
    sixteen = shape_reason(old, kl(16, 3))
    assert sixteen is not None
    assert "16 channels at stride 4" in sixteen and "4 channels at stride 4" in sixteen
    assert "at stride 8" in str(shape_reason(old, kl(4, 4)))
    assert "4 channels, not for RGB" in str(shape_reason(old, kl(4, 3, in_channels=4)))


def test_quality_is_judged_before_any_fit():
    assert quality_reason(made(), made(24.1)) is None
    assert "twice the error" in str(quality_reason(made(), made(23.9)))
    assert "its pictures are not finite in float32" in str(quality_reason(made(), made(float32=False)))
    assert "model's own autoencoder are not" in str(quality_reason(made(float32=False), made()))
    assert "twice the error" in str(quality_reason(made(), made(float("nan"))))


def test_warnings_name_what_is_no_reason_to_refuse():
    assert quality_warnings(made(), made(31.0)) == []
    assert "1.00 dB worse" in quality_warnings(made(), made(29.0))[0]
    assert "not finite in float16" in quality_warnings(made(), made(float16=False))[0]
    assert quality_warnings(made(float16=False), made(float16=False)) == []
    assert quality_warnings(made(), made(float16=None)) == []
    assert "keeps these pictures at 19.00 dB only" in quality_warnings(made(19.0), made(19.0))[0]


def test_tables_have_a_cell_for_every_column():
    verdict = Verdict(
        decision="refuse",
        reasons=("why",),
        old=made(),
        new=made(float16=None, bfloat16=False),
        trials=(trial(), trial(kind="interposer", decoded=28.0)),
    )
    for rows in (verdict.quality_rows(), verdict.fit_rows()):
        assert len({len(row) for row in rows}) == 1
        assert len(rows) == 3
    assert verdict.quality_rows()[2][-3:] == ("yes", "no", "-")
    assert [row[-1] for row in verdict.fit_rows()] == ["holds", "yes", "loses 2.00 dB"]
    assert Verdict(decision="refuse", reasons=("why",)).fit_rows() == []
    assert Verdict(decision="refuse", reasons=("why",)).quality_rows() == []
    assert not verdict.accepted
