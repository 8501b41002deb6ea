"""Files of torch.save, old and new, and plain pickles: their one content, with tensors whose bytes stay in the mapped file."""

import io
import mmap
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mclr.train.weights.unpickler import AGAIN, CALLS, EMBEDDED, SCRIPT, TOO_LONG, Machine, Refused, Script, Storage, refuse

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.save's, before zip archives


def read(path: Path) -> Any:
    """What a pickle or a file of torch.save holds: dicts, lists, numbers, text, and Module, View and Inert for objects.

    Raises Refused for a damaged file, and for one that names anything outside of ALLOWED.
    """
    with open(path, "rb") as file:
        # a private mapping: torch wants memory that it may write to, and no write reaches the file
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        try:
            if data[:4] == b"PK\3\4":
                return _read_archive(data, file.fileno())
            script = Script(data)
            return _read_streams(script, CALLS | {EMBEDDED: lambda arguments: _embedded(script, arguments)})
        except Refused:
            raise
        # damaged bytes lead to nearly any error, in a machine and in zipfile
        except Exception as error:
            what = f"incomplete ({error})" if isinstance(error, zipfile.BadZipFile) else f"damaged ({type(error).__name__} in it)"
            raise Refused(f"is {what}: {AGAIN}") from error


def _read_streams(script: Script, calls: Mapping[str, Callable]) -> Any:
    """One pickle, or what torch.save wrote before zip archives: five pickles, then numel and bytes of every storage."""
    machine = Machine(script, calls)
    content = machine.load()
    if content == MAGIC:
        protocol, system = (Machine(script, {}).load() for _ in range(2))
        if protocol != PROTOCOL or system["little_endian"] is not True:
            refuse("is written for another kind of machine")
        machine = Machine(script, calls)
        content = machine.load()
        for key in Machine(script, {}).load():
            # text alone: the hash of tuples within tuples may take for ever
            found = machine.storages[key if type(key) is str else ""]
            if script.number("<q") != found.numel:
                refuse("holds storages of two sizes")
            start = script.skip(found.nbytes)
            found.place = script.data[start : script.at]
    if any(storage.place is None for storage in machine.storages.values()) or script.at != len(script.data):
        refuse("does not end where its contents do")
    return content


def _embedded(script: Script, arguments: tuple[Any, ...]) -> Storage:
    """The storage in a stream of torch.save that lies within the bytes of a pickle."""
    (place,) = arguments
    if type(place) is not slice:
        refuse(f"calls {EMBEDDED!r} with no bytes")
    inner = Script(script.data[: place.stop], place.start, script.left)
    content = _read_streams(inner, {})
    script.left = inner.left
    if type(content) is not Storage:
        refuse("holds other things than a storage among its storages")
    return content


class _Bounded(io.FileIO):
    """A file of which at most SCRIPT bytes are read at once, as zipfile does with the list of members."""

    def read(self, count: int | None = -1, /) -> bytes:
        found = super().read(count if count is not None and 0 <= count <= SCRIPT else SCRIPT + 1) or b""
        if len(found) > SCRIPT:
            refuse(*TOO_LONG)
        return found


def _read_archive(data: memoryview, descriptor: int) -> Any:
    """What torch.save writes now: an uncompressed zip archive with one pickle, data.pkl, and a member data/KEY for every storage."""
    members: dict[str, memoryview] = {}
    with _Bounded(descriptor, closefd=False) as file, zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                refuse("is a compressed archive, which torch.save does not write")
            # a header of 30 bytes, the name and an extra field come before the content (APPNOTE.TXT 6.3.10, section 4.3.7)
            start = info.header_offset + 30 + sum(struct.unpack_from("<HH", data, info.header_offset + 26))
            if not 0 <= start <= len(data) - info.file_size:
                raise ValueError("a member outside of the file")
            members[info.filename] = data[start : start + info.file_size]
    folder = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
    if folder is None:
        refuse("is a zip archive, but none of torch.save")
    if members.get(f"{folder}byteorder", b"little") != b"little":
        refuse("is written for another kind of machine")
    machine = Machine(Script(members[f"{folder}data.pkl"]))
    content = machine.load()
    for key, storage in machine.storages.items():
        storage.place = members[f"{folder}data/{key}"]
        if len(storage.place) != storage.nbytes:
            refuse("holds storages of two sizes")
    return content
