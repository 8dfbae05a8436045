"""The progress bar of commands that draw."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from darkroom.progress import Progress


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[["Progress"], None]]:
    """A progress bar with rate and time left, shown from the first second on where somebody looks on."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="step", delay=1, disable=None, leave=False) as bar:

        def update(progress: "Progress") -> None:
            bar.total = progress.total
            bar.update(progress.done - bar.n)

        yield update
