"""Files as torch.save writes them, made by hand: around any pickle, with any bytes."""

import zipfile
from pathlib import Path


def data_pkl(path: Path, data: bytes, **records: bytes) -> Path:
    """A zip file as torch writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        for name, record in records.items():
            file.writestr(f"archive/data/{name.removeprefix('_')}", record)
    return path


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


def tensor_pickle(arguments: bytes, storage: bytes = STORAGE, version: bytes = b"v2") -> bytes:
    """A pickle of {"w": tensor}, of the opcodes after its storage: offset, shape, strides."""
    call = b"ctorch._utils\n_rebuild_tensor_" + version + b"\n(" + storage + arguments + b"\x89}tR"
    return b"\x80\x02}X\x01\x00\x00\x00w" + call + b"s."


GOOD = b"K\x00K\x04\x85K\x01\x85"
