r"""Draw what mini_quality.py judges: one picture a prompt, seed = index, the model's defaults.

They are kept as 8-bit PNGs, so that an accelerator can draw them and another machine judge them. Of the data
only the two `metadata.jsonl` are read.

    python benchmarks/mini_draw.py --model darkroom-mini --data ../shared/data \
        --out runs/mini-drawn --device cuda
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mini_data import Row, pair_rows, rows, text_rows
from PIL import Image
from tqdm import tqdm

from darkroom.pipeline import Pipeline, Progress, load
from darkroom.presets import model_folder

PHOTOS_A_CLASS = 2
BATCH = {"cpu": 16, "cuda": 128}
TIMED = 5


@dataclass(frozen=True)
class Drawn:
    """Pictures by set ("text", "pairs", "photos"), each in the order of its prompts, and how they came
    about.
    """

    images: dict[str, list[Image.Image]]
    about: dict


def prompt_rows(table: Sequence[Row], limit: int | None = None) -> dict[str, list[Row]]:
    """The rows that are drawn, by set: their captions are the prompts, and the index is the seed."""
    classes = {row.caption: row for row in table if row.kind == "photo" and row.split == "train"}
    photos = [row for row in classes.values() for _ in range(PHOTOS_A_CLASS)]
    sets = {"text": text_rows(table), "pairs": pair_rows(table), "photos": photos}
    return {name: found[:limit] for name, found in sets.items()}


def draw(model: str, table: Sequence[Row], out: Path, device: str | None, limit: int | None = None) -> Drawn:
    """Draw all sets into `out`, or read them from there if this very model drew them before."""
    wanted = {name: [row.caption for row in found] for name, found in prompt_rows(table, limit).items()}
    digest, note = model_digest(model_folder(model)), out / "drawn.json"
    about = json.loads(note.read_text()) if note.is_file() else {}
    if about.get("model") != digest or about.get("prompts") != wanted:
        note.unlink(missing_ok=True)
        about = {"model": digest, "prompts": wanted} | _draw(load(model, device=device), wanted, out)
        note.write_text(json.dumps(about, indent=1))
    names = {name: [_file(out, name, k) for k in range(len(texts))] for name, texts in wanted.items()}
    return Drawn({name: [_read(path) for path in paths] for name, paths in names.items()}, about)


def model_digest(folder: Path) -> str:
    """A hash over the weights and the tokenizer of a model folder."""
    total = hashlib.sha256()
    for path in sorted(
        path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json", ".txt")
    ):
        total.update(
            path.relative_to(folder).as_posix().encode() + hashlib.sha256(path.read_bytes()).digest()
        )
    return total.hexdigest()


def _draw(pipe: Pipeline, wanted: dict[str, list[str]], out: Path) -> dict:
    batch = BATCH.get(pipe.device.type, BATCH["cuda"])
    about = {"defaults": asdict(pipe.model.spec.defaults), "device": _device_name(pipe.device)}
    about["seconds_alone"] = _time_alone(pipe)
    start = time.perf_counter()
    for name, prompts in wanted.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        with tqdm(total=1, desc=f"drawing {name}", unit=" steps") as bar:

            def on_step(progress: Progress, bar: tqdm = bar) -> None:
                bar.total = progress.total
                bar.update(progress.done - bar.n)

            result = pipe(prompts, seed=0, batch_size=batch, on_step=on_step)
        for k, image in enumerate(result.images):
            image.save(_file(out, name, k))
    total = sum(map(len, wanted.values()))
    return about | {"seconds_batched": (time.perf_counter() - start) / total, "batch": batch}


def _time_alone(pipe: Pipeline) -> float:
    """Seconds for one picture drawn alone: the median of five, after a first one that does not count."""
    times = []
    for _ in range(TIMED + 1):
        start = time.perf_counter()
        pipe("red apple, 3d style", seed=1)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[TIMED // 2]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _file(out: Path, name: str, k: int) -> Path:
    return out / name / f"{k:03}.png"


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="darkroom-mini", help="a bundled model or a model folder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/mini-drawn"))
    parser.add_argument("--device")
    parser.add_argument("--limit", type=int, help="draw at most so many pictures of a set")
    options = parser.parse_args()
    done = draw(options.model, rows(options.data), options.out, options.device, options.limit)
    print({k: v for k, v in done.about.items() if k != "prompts"})
