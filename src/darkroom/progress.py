"""Where a call stands, for whoever looks on."""

from collections.abc import Callable
from dataclasses import dataclass

from darkroom.diffusion.samplers.steps import Step


@dataclass(frozen=True)
class Progress:
    """Where a call stands: `done` of `total` sampler steps over all batches, and the latest step itself."""

    done: int
    total: int
    step: Step


@dataclass
class Watch:
    """Counts the steps of a call and tells whoever looks on; adaptive samplers may take more than `total`."""

    total: int
    on_step: Callable[[Progress], None] | None
    done: int = 0

    def saw(self, step: Step) -> None:
        """A step was taken."""
        self.done += 1
        if self.on_step is not None:
            self.on_step(Progress(self.done, max(self.total, self.done), step))
