"""`import darkroom` and `darkroom --help` answer at once: nothing heavy is imported before it is needed."""

import resource
import subprocess
import sys

import pytest

LIMIT = 0.5  # seconds for the whole process, Python's own start included
HEAVY = ("torch", "numpy", "PIL", "tokenizers", "huggingface_hub", "transformers", "diffusers")
COMMANDS = {
    "import": [sys.executable, "-c", "import darkroom"],
    "help": [sys.executable, "-m", "darkroom", "--help"],
}


def _seconds(command: list[str]) -> float:
    """Processor time of a command: unlike the time on the clock, it is the same when the machine is busy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_starts_within_half_a_second(command):
    assert min(_seconds(command) for _ in range(3)) <= LIMIT


@pytest.mark.parametrize(
    "module", ["darkroom", "darkroom.cli", "darkroom.config", "darkroom.files", "darkroom.presets"]
)
def test_nothing_heavy_is_imported(module):
    code = f"import sys, {module}; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert not set(HEAVY) & set(shown.stdout.split())
