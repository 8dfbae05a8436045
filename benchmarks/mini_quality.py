"""What darkroom-mini can do, measured: reconstruction, following of text, unseen combinations, style,
photos, copying.

    python benchmarks/mini_quality.py --model darkroom-mini --data ../shared/data --out docs/assets/mini

Everything is judged on 8-bit pictures of 128 px. "Nearest" is by cosine similarity of SqueezeNet's fire9
features, averaged over positions. The pictures come from `mini_draw.py`, one a prompt, seed = index, the
model's defaults.

recon    the autoencoder on emoji concepts never trained on, and on the photos of the validation split.
text     300 training captions without skin tones. Right if the nearest of 1,000 training emoji without skin
tones, the 300 true ones among them, is of the prompt's concept.
pairs    the set-aside (concept, style) pairs. The gallery holds their real pictures, none of which was
trained on, and up to 1,000 training emoji of other concepts: the pictures of the same concepts in other
styles, which were trained on, are left out, so that only the unseen picture counts. Beside it, those
         other-style pictures as queries in the same gallery.
style    what a classifier trained on real training emoji says of the pictures of `text` and `pairs`.
photos   two pictures of each of 81 classes. Right if the nearest training photo is of the class. Beside it,
the validation photos as queries.
nearest  24 pictures, the first of each set, with the nearest of all training pictures.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mini_data import Row, by_hash, gallery, pair_rows, rows, text_rows
from mini_draw import Drawn, draw, model_digest, prompt_rows
from mini_pictures import Real, load, reconstruct, squeezenet, stack
from mini_style import StyleClassifier
from PIL import Image
from torch import Tensor

from darkroom.checkpoint.model import load_model_autoencoder
from darkroom.evaluate.features import nearest
from darkroom.images import error_picture, grid, save_png
from darkroom.presets import model_folder
from darkroom.runtime.device import default_device

TARGETS = {"emoji dB": 33, "photo dB": 25, "text": 0.97, "pairs": 0.5, "style": 0.97, "photos": 0.6}
SHOWN = 24
SAMPLES = {"text": 12, "pairs": 6, "photos": 6}


class Judge:
    """The real data, the drawn pictures with their features, and where the sheets go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out, self.data = options, options.out, options.data
        self.table = rows(options.data)
        self.folder = model_folder(options.model)
        self.device = torch.device(options.device) if options.device else default_device()
        self.network = squeezenet(options.data, self.device)
        self.out.mkdir(parents=True, exist_ok=True)
        if set(options.parts) != {"recon"}:
            self.real = Real(self.data, self.table, self.network, options.work / "real-features.pt")
            self.drawn = self._drawn(options)
            self.rows = prompt_rows(self.table, options.limit)
            self.pixels = {name: stack(images) for name, images in self.drawn.images.items()}
            self.features = {name: self.real.of(pixels) for name, pixels in self.pixels.items()}

    def _drawn(self, options: argparse.Namespace) -> Drawn:
        return draw(options.model, self.table, options.work / "drawn", options.device, options.limit)

    def picture(self, row: Row) -> Image.Image:
        """A real picture at the size of the drawn ones."""
        return Image.fromarray(load(self.data, [row])[0].permute(1, 2, 0).numpy())

    def sheet(
        self, name: str, images: Sequence[Image.Image], labels: Sequence[str], columns: int = 8
    ) -> None:
        """Save a labelled sheet among the results."""
        save_png(self.out / f"{name}.png", grid(images, columns, labels=labels))


def recon(judge: Judge) -> dict:
    """PSNR (mean of each picture's dB) and perceptual distance of unseen pictures, by group."""
    autoencoder = load_model_autoencoder(judge.folder).to(judge.device).eval()
    held = [row for row in judge.table if row.split == "concept"]
    groups = {
        "emoji, no skin tones": [row for row in held if not row.skin_tone],
        "emoji, all": held,
        "photo": [row for row in judge.table if row.split == "val"],
    }
    result, shown = {}, []
    for name, chosen in groups.items():
        chosen = by_hash(chosen, "reconstruction")[: judge.options.limit]
        images = load(judge.data, chosen)
        kept = reconstruct(autoencoder, images, judge.network)
        result[name] = {"pictures": len(chosen), "psnr": _mean(kept.psnr), "distance": _mean(kept.distance)}
        if name != "emoji, all":
            shown += _recon_samples(images, kept.images, kept.psnr)
    labels = [text for _, _, text in shown]
    flat = [image for a, b, _ in shown for image in (a, b, error_picture(a, b))]
    named = [label for text in labels for label in ("original", text, "error x4")]
    judge.sheet("reconstruction", flat, named, columns=6)
    return result


def _recon_samples(images: Tensor, made: Tensor, psnr: Tensor) -> list[tuple[Image.Image, Image.Image, str]]:
    """The worst, the best, and four evenly between them."""
    order = psnr.argsort()
    chosen = order[torch.linspace(0, len(order) - 1, min(6, len(order))).long()].tolist()
    return [(_pil(images[i]), _pil(made[i]), f"{psnr[i]:.1f} dB") for i in chosen]


def text(judge: Judge) -> dict:
    """Whether the nearest gallery picture is of the prompt's concept; `picture`: of its style as well."""
    held = gallery(judge.table, text_rows(judge.table), same_concepts=True)
    return _retrieval(judge, "text", held)


def pairs(judge: Judge) -> dict:
    """As `text` for combinations never trained on, with what the same concepts in other styles reach."""
    held = gallery(judge.table, pair_rows(judge.table), same_concepts=False)
    concepts = {row.concept for row in pair_rows(judge.table)}
    others = [
        row for row in judge.table if row.concept in concepts and row.split == "train" and not row.skin_tone
    ]
    found = nearest(judge.real[others], judge.real[held]).index.tolist()
    hits = [held[j].concept == row.concept for j, row in zip(found, others, strict=True)]
    beside = {"real, other styles": sum(hits) / len(hits), "real queries": len(hits)}
    return _retrieval(judge, "pairs", held) | beside


def _retrieval(judge: Judge, name: str, held: Sequence[Row]) -> dict:
    asked, features = judge.rows[name], judge.features[name]
    found = [held[j] for j in nearest(features, judge.real[held]).index.tolist()]
    hits = [f.concept == row.concept for f, row in zip(found, asked, strict=True)]
    same = [f == row for f, row in zip(found, asked, strict=True)]
    true = torch.cosine_similarity(features, judge.real[asked])
    _good_and_bad(judge, name, true)
    misses = {r.caption: f.caption for r, f, hit in zip(asked, found, hits, strict=True) if not hit}
    return {
        "prompts": len(asked),
        "gallery": len(held),
        "concept": sum(hits) / len(hits),
        "picture": sum(same) / len(same),
        "cosine to the true picture": _mean(true),
        "misses": misses,
    }


def _good_and_bad(judge: Judge, name: str, true: Tensor) -> None:
    """Sheets of the first, the best and the worst by cosine to the true picture, which stands beside."""
    order = true.argsort(descending=True).tolist()
    count = min(SHOWN, len(order))
    for kind, chosen in (("first", range(count)), ("best", order[:count]), ("worst", order[-count:])):
        images, labels = [], []
        for k in chosen:
            row = judge.rows[name][k]
            images += [judge.drawn.images[name][k], judge.picture(row)]
            labels += [row.caption, f"real, {true[k]:.2f}"]
        judge.sheet(f"{name}-{kind}", images, labels)


def style(judge: Judge) -> dict:
    """How often a classifier sees the style that the prompt names, and how good it is on real pictures."""
    classify = StyleClassifier(judge.data, judge.table, judge.network)
    result: dict = {"real": classify.accuracy}
    right: list[bool] = []
    for name in ("text", "pairs"):
        said = classify(judge.pixels[name])
        hits = [s == row.style for s, row in zip(said, judge.rows[name], strict=True)]
        wrong = zip(said, judge.rows[name], strict=True)
        result[name] = sum(hits) / len(hits)
        result[f"{name} misses"] = {row.caption: s for s, row in wrong if s != row.style}
        right += hits
    return result | {"both": sum(right) / len(right)}


def photos(judge: Judge) -> dict:
    """Whether the nearest training photo is of the class asked for, with what validation photos reach."""
    train = [row for row in judge.table if row.kind == "photo" and row.split == "train"]
    val = [row for row in judge.table if row.kind == "photo" and row.split == "val"]
    asked = judge.rows["photos"]

    def hits(features: Tensor, queries: Sequence[Row]) -> list[bool]:
        found = nearest(features, judge.real[train]).index.tolist()
        return [train[j].concept == row.concept for j, row in zip(found, queries, strict=True)]

    drawn, real = hits(judge.features["photos"], asked), hits(judge.real[val], val)
    images = judge.drawn.images["photos"][::2]
    labels = [
        row.concept.replace("-", " ") + (": right" if hit else ": wrong")
        for row, hit in zip(asked[::2], drawn[::2], strict=True)
    ]
    judge.sheet("photos", images, labels, columns=9)
    result = {"pictures": len(drawn), "class": sum(drawn) / len(drawn)}
    return result | {"real validation photos": sum(real) / len(real), "real queries": len(real)}


def copies(judge: Judge) -> dict:
    """24 pictures, each with the nearest of all training pictures and their cosine."""
    train = [row for row in judge.table if row.split == "train"]
    images, labels, values = [], [], []
    for name, count in SAMPLES.items():
        step = 2 if name == "photos" else 1  # one of each class
        features = judge.features[name][::step][:count]
        found = nearest(features, judge.real[train])
        for k, (j, value) in enumerate(zip(found.index.tolist(), found.similarity.tolist(), strict=True)):
            images += [judge.drawn.images[name][k * step], judge.picture(train[j])]
            labels += [judge.rows[name][k * step].caption, f"{value:.2f}: {train[j].caption}"]
            values.append(value)
    judge.sheet("nearest", images, labels)
    return {"samples": len(values), "mean cosine": sum(values) / len(values)}


PARTS: dict[str, Callable[[Judge], dict]] = {
    "recon": recon,
    "text": text,
    "pairs": pairs,
    "style": style,
    "photos": photos,
    "nearest": copies,
}


def table(quality: dict) -> str:
    """The figures as a table in Markdown: measure, figure, what was aimed at, and what stands beside it."""
    lines = ["| measure | figure | target | beside it |", "|---|---|---|---|"]
    for name, aim in (
        ("emoji, no skin tones", "emoji dB"),
        ("emoji, all", "emoji dB"),
        ("photo", "photo dB"),
    ):
        if found := quality.get("recon", {}).get(name):
            beside = f"perceptual distance {found['distance']:.4f}, {found['pictures']} pictures"
            what = "reconstruction, " + ("validation photos" if name == "photo" else f"set-aside {name}")
            lines.append(f"| {what} | {found['psnr']:.2f} dB | ≥ {TARGETS[aim]} dB | {beside} |")
    for row in (_text_line, _pairs_line, _style_line, _photos_line, _speed_line):
        lines += row(quality)
    return "\n".join(lines)


def _text_line(quality: dict) -> list[str]:
    q = quality.get("text")
    beside = q and f"the very picture: {q['picture']:.1%}; {q['prompts']} prompts, {q['gallery']} pictures"
    return (
        [f"| text: the named concept | {q['concept']:.1%} | ≥ {TARGETS['text']:.0%} | {beside} |"]
        if q
        else []
    )


def _pairs_line(quality: dict) -> list[str]:
    q = quality.get("pairs")
    beside = q and f"real pictures in other styles: {q['real, other styles']:.1%}; {q['prompts']} prompts"
    return [f"| unseen pairs | {q['concept']:.1%} | ≥ {TARGETS['pairs']:.0%} | {beside} |"] if q else []


def _style_line(quality: dict) -> list[str]:
    if not (q := quality.get("style")):
        return []
    real = ", ".join(f"{name} {value:.1%}" for name, value in q["real"].items())
    beside = f"text {q['text']:.1%}, pairs {q['pairs']:.1%}; real held-out emoji: {real}"
    return [f"| style | {q['both']:.1%} | ≥ {TARGETS['style']:.0%} | {beside} |"]


def _photos_line(quality: dict) -> list[str]:
    q = quality.get("photos")
    beside = q and f"real validation photos: {q['real validation photos']:.1%}; {q['pictures']} pictures"
    return [f"| photos: the class | {q['class']:.1%} | ≥ {TARGETS['photos']:.0%} | {beside} |"] if q else []


def _speed_line(quality: dict) -> list[str]:
    q = quality.get("drawing")
    beside = q and f"{q['seconds_batched']:.3f} s in batches of {q['batch']}; {q['device']}"
    return [f"| one picture, alone | {q['seconds_alone']:.2f} s | | {beside} |"] if q else []


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="darkroom-mini", help="a bundled model or a model folder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument(
        "--out", type=Path, default=Path("docs/assets/mini"), help="quality.json and the sheets"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/mini-quality"), help="drawings and features kept"
    )
    parser.add_argument("--device")
    parser.add_argument("--limit", type=int, help="at most so many pictures of a set, for a quick look")
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS)
    )
    options = parser.parse_args()
    if wrong := set(options.parts) - PARTS.keys():
        parser.error(f"unknown parts {sorted(wrong)}; known: {', '.join(PARTS)}")
    return options


def main() -> None:
    """Run the parts asked for, add them to what `quality.json` has of the same model, and print the table."""
    options = _options()
    judge, path = Judge(options), options.out / "quality.json"
    identity = {"model": model_digest(judge.folder), "limit": options.limit}
    before = json.loads(path.read_text()) if path.is_file() else {}
    quality = before if identity.items() <= before.items() else identity
    if hasattr(judge, "drawn"):
        quality["drawing"] = {
            key: value for key, value in judge.drawn.about.items() if key not in ("model", "prompts")
        }
    for part in options.parts:
        quality[part] = PARTS[part](judge)
        path.write_text(json.dumps(quality, indent=1, ensure_ascii=False) + "\n")
    print(table(quality))


if __name__ == "__main__":
    main()
