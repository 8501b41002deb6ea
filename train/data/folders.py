"""Where `mclr prepare images` finds images: a folder or a zip file of them, conditions by class folder or by a list of labels."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from mclr.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
# as Pillow names them; it would hand PostScript to Ghostscript, whatever the file is called
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"]
LABELS = "dataset.json"
HOW = "put the images of each class into a folder of their own, as in cats/1.png, dogs/1.png"


@dataclass(frozen=True)
class Images:
    """Images below src, each with its condition, sorted by name ("cats/1.png"). archive: src, where it is a zip file.

    A zip file is read in place: its names are looked up in it and never become paths.
    """

    src: Path
    archive: ZipFile | None
    class_names: tuple[str, ...]
    files: list[tuple[str, int]]

    def read(self, name: str) -> bytes:
        return (self.src / name).read_bytes() if self.archive is None else self.archive.read(name)

    def fingerprint(self) -> str:
        """Short hash of the images' names and sizes: changed images are another dataset."""
        digest = hashlib.sha256()
        for name, _ in self.files:
            digest.update(os.fsencode(name) + b"\0%d\n" % self._size(name))
        return digest.hexdigest()[:16]

    def _size(self, name: str) -> int:
        if self.archive is not None:
            return self.archive.getinfo(name).file_size
        try:
            return (self.src / name).stat().st_size
        except OSError:
            # a dangling link counts among the unreadable images
            return -1


def find_images(src: Path) -> Images:
    """The images of a folder or a .zip. With a dataset.json of labels beside them, as EDM2's and StyleGAN's data have it, they decide;
    else the class folders do, numbered by name. Hidden files and folders do not count.

    Raises UserError where there is neither, or src cannot be read.
    """
    try:
        archive = None
        if src.suffix.lower() == ".zip" and src.is_file():
            archive = ZipFile(src)
            entries = _entries_of_zip(src, archive)
        elif src.is_dir():
            entries = sorted(_entries_below(src), key=_order)
        else:
            raise UserError(f"no folder of images at {src}, nor a .zip")
        wrapped = archive is not None and len({name.split("/")[0] for name in entries}) == 1
        if wrapped and any(name.count("/") == 2 and name.endswith("/") for name in entries):
            raise UserError(f"{src} holds one folder, {entries[0]}, with the others inside: pack its content, or give the folder")
        if LABELS in entries:
            text = (src / LABELS).read_bytes() if archive is None else archive.read(LABELS)
            return Images(src, archive, *_by_labels(src, entries, text))
        return Images(src, archive, *_by_folders(src, entries))
    except OSError as error:
        raise UserError(f"cannot read {error.filename or src} ({error.strerror or error}): make it readable") from error
    # what zipfile raises on bytes that are no zip file, and on kinds it does not know
    except (BadZipFile, NotImplementedError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{src} is damaged, or no zip file ({error}): copy it again, or unpack it and give the folder") from error


def _entries_below(src: Path) -> Iterator[str]:
    """Names of all files, and of all folders with "/" at the end. Raises UserError where a link leads back to a folder above it."""
    todo: list[tuple[str, frozenset[str]]] = [("", frozenset())]
    while todo:
        prefix, above = todo.pop()
        here = os.path.realpath(src / prefix)
        if here in above:
            raise UserError(f"{src / prefix} is a link to a folder that it lies in: remove the link")
        for entry in os.scandir(src / prefix):
            if entry.name.startswith("."):
                continue
            # of a link that leads nowhere, the entry itself may raise
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield f"{prefix}{entry.name}/"
                todo.append((f"{prefix}{entry.name}/", above | {here}))
            else:
                yield prefix + entry.name


def _entries_of_zip(src: Path, archive: ZipFile) -> list[str]:
    """As _entries_below: what unpacking would give."""
    entries = set()
    for info in archive.infolist():
        parts = info.filename.removesuffix("/").split("/")
        if info.flag_bits & 1:
            raise UserError(f"{src} is encrypted: unpack it with its password and give the folder")
        if "" in parts or ".." in parts:
            raise UserError(f"{src} holds {info.filename!r}, which lies outside of it: pack it again")
        # beside each file, macOS packs what Finder knows of it
        if parts[0] == "__MACOSX" or any(part.startswith(".") for part in parts):
            continue
        entries.add(info.filename)
        entries |= {"/".join(parts[:depth]) + "/" for depth in range(1, len(parts))}
    return sorted(entries, key=_order)


def _order(name: str) -> list[str]:
    """A folder's content comes where its name stands among its neighbours."""
    return name.split("/")


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _by_folders(src: Path, entries: list[str]) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Names of the class folders, and every (image, condition)."""
    if loose := [name for name in entries if "/" not in name and _is_image(name)]:
        raise UserError(f"{src} has {len(loose)} images outside of any class folder ({loose[0]}): {HOW}")
    folders = [name for name in entries if name.find("/") == len(name) - 1]
    if not folders:
        raise UserError(f"{src} has no class folders: {HOW}")
    condition = {folder: c for c, folder in enumerate(folders)}
    files = [(name, condition[name[: name.index("/") + 1]]) for name in entries if _is_image(name)]
    if empty := sorted(set(range(len(folders))) - {c for _, c in files}):
        folder = src / folders[empty[0]]
        raise UserError(f"class folder {folder} has no images ({', '.join(sorted(SUFFIXES))}): add some or remove it")
    return tuple(folder[:-1] for folder in folders), files


def _by_labels(src: Path, entries: list[str], text: bytes) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Classes "0" to the largest label, and every (image, condition), of {"labels": [["00000/img00000000.png", 6], ...]}."""
    place = f"{src / LABELS}"
    try:
        labels = json.loads(text)["labels"]
        labels = labels if labels is None else dict(labels)
        if odd := [name for name in labels or () if not isinstance(name, str)]:
            raise TypeError(f"{odd[0]!r:.40} is no name of an image")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{place} is no list of labels ({error}): expected {{"labels": [["a.png", 0], ...]}}') from error
    images = [name for name in entries if _is_image(name)]
    if labels is None:
        raise UserError(f"{place} has no labels (null): conditions are learned from them; {HOW}, and remove dataset.json")
    if unlabelled := [name for name in images if name not in labels]:
        raise UserError(f"{place} has no label for {len(unlabelled)} images ({unlabelled[0]}): add them or remove the images")
    if missing := sorted(labels.keys() - set(images)):
        raise UserError(f"{place} has labels for {len(missing)} images that are not there ({missing[0]}): copy the images again")
    if wrong := [name for name in images if type(labels[name]) is not int or labels[name] < 0]:
        raise UserError(f"{place}: the label of {wrong[0]} is {labels[wrong[0]]!r:.40}: expected a whole number from 0 on")
    if not images:
        raise UserError(f"{src} has no images ({', '.join(sorted(SUFFIXES))})")
    known = sorted(set(labels.values()))
    if known[-1] >= len(known):
        gap = next(c for c, label in enumerate(known) if c != label)
        raise UserError(
            f"{place}: labels go to {known[-1]}, but no image has {gap}: number the classes 0, 1, 2, ... without gaps"
        )
    return tuple(str(c) for c in known), [(name, labels[name]) for name in images]
