"""A larger canvas around a picture."""

import numpy as np
import pytest
from PIL import Image

from darkroom.edit.outpaint import Margins, canvas
from darkroom.errors import InputError


def test_the_picture_stays_and_the_mask_is_what_is_new() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))
    grown, mask = canvas(image, Margins(left=2, bottom=3))
    assert grown.size == mask.size == (10, 9)
    assert mask.mode == "L"
    inside = np.asarray(mask) == 0
    assert inside.sum() == 48 and inside[:6, 2:].all()
    assert (np.asarray(grown)[:6, 2:] == np.asarray(image)).all()
    assert (np.asarray(grown)[:6, 1] == np.asarray(image)[:, 0]).all()  # mirrored


def test_margins_are_read_and_written() -> None:
    assert Margins.parse("64") == Margins(left=64, top=64, right=64, bottom=64)
    assert Margins.parse("1, 2,3,0") == Margins(left=1, top=2, right=3)
    assert str(Margins.parse("7")) == "7,7,7,7"


@pytest.mark.parametrize("text", ["", "a", "1,2", "-3", "1,2,3,4,5", "0", "0,0,0,0"])
def test_bad_margins_are_named(text: str) -> None:
    with pytest.raises(InputError, match="margins must be"):
        Margins.parse(text)
