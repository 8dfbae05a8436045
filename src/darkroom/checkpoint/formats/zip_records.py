"""Where the records of a zip file lie, as `torch.save` writes it: stored, not compressed. No torch here."""

import mmap
import struct
from dataclasses import dataclass

# Layouts of the ZIP specification (APPNOTE.TXT, 4.3), each with its signature first.
END = struct.Struct("<4s4xHHIIH")
END64_LOCATOR = struct.Struct("<4s4xQ4x")
END64 = struct.Struct("<4s20xQQQQ")
CENTRAL = struct.Struct("<4s4xHH8xIIHHH8xI")
LOCAL = struct.Struct("<4s22xHH")
EXTRA = struct.Struct("<HH")
ZIP64_EXTRA = 1
IN_EXTRA = 0xFFFFFFFF  # a size or an offset that 32 bits do not hold
MAX_COMMENT = 65_535
# About 160,000 records; more make no checkpoint, only many objects.
MAX_DIRECTORY_BYTES = 16_000_000


@dataclass(frozen=True, slots=True)
class Record:
    """A file in the zip: where its own header begins, and how many bytes of it follow there."""

    name: str
    header: int
    nbytes: int
    stored: bool


def read_records(data: mmap.mmap) -> dict[str, Record]:
    """The records by name, from the directory at the file's end; ValueError says what is wrong with it."""
    at, size = _directory(data)
    if size > MAX_DIRECTORY_BYTES:
        raise ValueError(f"its directory would be {size} bytes long")
    if at + size > len(data):
        raise ValueError("its directory would lie beyond its end")
    records: dict[str, Record] = {}
    end = at + size
    while at < end:
        record, at = _record(data, at)
        if record.name in records:
            raise ValueError(f"it has the record {record.name!r:.200} twice")
        records[record.name] = record
    return records


def place(data: mmap.mmap, record: Record) -> int:
    """Where the bytes of a record begin; ValueError if they are compressed, or not in the file."""
    if not record.stored:
        raise ValueError(
            f"its record {record.name!r:.200} is compressed: unpack it, and save it again with torch"
        )
    signature, name_bytes, extra_bytes = _unpack(LOCAL, data, record.header)
    if signature != b"PK\x03\x04":
        raise ValueError(f"there is no record {record.name!r:.200} where its directory says")
    start = record.header + LOCAL.size + name_bytes + extra_bytes
    if start + record.nbytes > len(data):
        raise ValueError(f"its record {record.name!r:.200} would end beyond its end")
    return start


def _directory(data: mmap.mmap) -> tuple[int, int]:
    """Where the central directory lies and how long it is."""
    at = data.rfind(b"PK\x05\x06", max(0, len(data) - END.size - MAX_COMMENT))
    if at < 0:
        raise ValueError("the end of a zip file is missing (truncated?)")
    _, _, _, size, offset, _ = _unpack(END, data, at)
    locator = at - END64_LOCATOR.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
        _, at64 = _unpack(END64_LOCATOR, data, locator)
        signature, _, _, size, offset = _unpack(END64, data, at64)
        if signature != b"PK\x06\x06":
            raise ValueError("its end points to no directory")
    return offset, size


def _record(data: mmap.mmap, at: int) -> tuple[Record, int]:
    """The record that a line of the directory is about, and where the next line begins."""
    fields = _unpack(CENTRAL, data, at)
    signature, flags, method, packed, size, name_bytes, extra_bytes, comment_bytes, header = fields
    if signature != b"PK\x01\x02":
        raise ValueError("its directory is damaged")
    name_at = at + CENTRAL.size
    extra_at = name_at + name_bytes
    name = data[name_at:extra_at].decode("utf-8", "replace")
    extra = data[extra_at : extra_at + extra_bytes]
    size, packed, header = _in_64_bits(extra, [size, packed, header])
    stored = method == 0 and packed == size and not flags & 1  # 1: encrypted
    return Record(name, header, size, stored), extra_at + extra_bytes + comment_bytes


def _in_64_bits(extra: bytes, values: list[int]) -> list[int]:
    """The values, those of them that 32 bits do not hold from the extra field."""
    at = 0
    while at + EXTRA.size <= len(extra) and IN_EXTRA in values:
        kind, size = EXTRA.unpack_from(extra, at)
        at += EXTRA.size
        if kind == ZIP64_EXTRA:
            wide = [extra[i : i + 8] for i in range(at, min(at + size, len(extra)), 8)]
            if len(wide) < values.count(IN_EXTRA):
                break
            return [int.from_bytes(wide.pop(0), "little") if v == IN_EXTRA else v for v in values]
        at += size
    return values


def _unpack(layout: struct.Struct, data: mmap.mmap, at: int) -> tuple:
    if at + layout.size > len(data):
        raise ValueError("it ends in the middle of its directory (truncated?)")
    return layout.unpack_from(data, at)
