"""What a model's folder is, from the headers of its files and what it says itself. No torch here."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from darkroom.checkpoint.anatomy import NETWORK
from darkroom.checkpoint.folder_files import INDEX, is_darkroom, is_diffusers, weight_files
from darkroom.checkpoint.formats.read import read_header
from darkroom.checkpoint.inspect import ComponentReport, Report, report
from darkroom.checkpoint.prediction import scheduler_prediction
from darkroom.errors import InputError
from darkroom.files import read_json

SCHEDULER = "scheduler/scheduler_config.json"


def inspect_folder(folder: Path) -> Report:
    """What the parts of a folder are together; raises InputError where it holds no weights."""
    parts = {prefix: report(file, read_header(file)) for prefix, file in weight_files(folder)}
    if not parts:
        raise InputError(f"{folder}: no file of weights here, nor in the folders of its parts")
    components: dict[str, ComponentReport] = {}
    for prefix, part in parts.items():
        for role, component in part.components.items():
            components[role if role not in components else prefix.rstrip("/")] = component
    main = next((part for part in parts.values() if NETWORK in part.components), next(iter(parts.values())))
    found = replace(
        main,
        path=str(folder),
        format=_format(folder),
        kind="model" if len(parts) > 1 else main.kind,
        bytes=sum(part.bytes for part in parts.values()),
        components=components,
        unknown=tuple(prefix + name for prefix, part in parts.items() for name in part.unknown),
        left_out=_summed(parts),
        evidence=tuple(
            f"{prefix.rstrip('/')}: {line}" if prefix else line
            for prefix, part in parts.items()
            for line in part.evidence
        ),
    )
    return _as_the_folder_says(found, folder)


def _format(folder: Path) -> str:
    if is_darkroom(folder):
        return "darkroom folder"
    return "diffusers folder" if is_diffusers(folder) else "folder of parts"


def _summed(parts: Mapping[str, Report]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for part in parts.values():
        for what, count in part.left_out.items():
            counts[what] = counts.get(what, 0) + count
    return counts


def _as_the_folder_says(found: Report, folder: Path) -> Report:
    """With the pipeline's class and the scheduler's prediction where the folder names them."""
    evidence = list(found.evidence)
    if (folder / INDEX).is_file():
        evidence.append(f"{INDEX} names {read_json(folder / INDEX).get('_class_name')}")
    if not (folder / SCHEDULER).is_file():
        return replace(found, evidence=tuple(evidence))
    fields = read_json(folder / SCHEDULER)
    prediction = scheduler_prediction(fields) or found.prediction
    schedule = found.schedule or ""
    if fields.get("rescale_betas_zero_snr") and "zero terminal" not in schedule:
        schedule = f"{schedule}, zero terminal SNR"
    evidence.append(
        f"{SCHEDULER}: {fields.get('_class_name')}, prediction_type {fields.get('prediction_type')}"
    )
    return replace(found, prediction=prediction, schedule=schedule or None, evidence=tuple(evidence))
