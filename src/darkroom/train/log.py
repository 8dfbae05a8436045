"""What a run writes for people: lines in metrics.jsonl, a loss curve, TensorBoard where it is installed."""

import json
import time
from pathlib import Path

from darkroom.errors import DarkroomError
from darkroom.files import atomic_write


class RunLog:
    """Appends metrics to `folder/metrics.jsonl`; lines past the step resumed from are dropped first."""

    def __init__(self, folder: Path, *, resumed_step: int, enabled: bool = True) -> None:
        self.enabled = enabled
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.rows: list[dict[str, float]] = []
        self.started, self.step = time.perf_counter(), resumed_step
        if not enabled:
            return
        if self.path.exists():
            self.rows = [row for row in whole_rows(self.path) if row["step"] <= resumed_step]
        with atomic_write(self.path) as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.board = _tensorboard(folder)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log `values` for `step`, with the steps a second since the last line.

        Raises DarkroomError naming the file when the file system refuses (disk full, no permission).
        """
        if not self.enabled:
            return
        now = time.perf_counter()
        row = {"step": step, **values, "steps_per_second": (step - self.step) / (now - self.started)}
        self.started, self.step = now, step
        self.rows.append(row)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise DarkroomError(f"{self.path}: could not be written: {error.strerror}") from error
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def draw(self) -> None:
        """Redraw `loss.png` from all rows so far, when matplotlib is installed."""
        if self.enabled and len(self.rows) > 1:
            draw_losses(self.rows, self.folder / "loss.png")


def whole_rows(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file up to the first that a crash or a full disk left unfinished."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def draw_losses(rows: list[dict[str, float]], path: Path) -> None:
    """Plot every logged value whose name holds "loss" over the step, logarithmic where all are positive."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    axes = (figure := Figure(figsize=(8, 4.5), layout="constrained")).subplots()
    for name in sorted({key for row in rows for key in row if "loss" in key}):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        if min(value for _, value in points) <= 0:
            axes.set_yscale("symlog", linthresh=1e-2)
    if axes.get_yscale() == "linear":
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as draft:
        figure.savefig(draft, format="png", dpi=110)


def _tensorboard(folder: Path):  # noqa: ANN202 - SummaryWriter's type exists only when TensorBoard is installed
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
