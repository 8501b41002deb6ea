"""Finds the images of a folder or zip file, and the condition of each: from class folders or a list of labels."""

import csv
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from mclr.errors import UserError
from mclr.train.data.images import endings, format_of
from mclr.train.system.files import regular

# made by file managers, network drives and operating systems, in lower case
SYSTEM = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "#recycle", "@recycle", "#snapshot", "__macosx"}
SYSTEM |= {"$recycle.bin", "system volume information", "lost+found"}
LABELS, TABLE = "dataset.json", "labels.csv"
HEADS = {"file", "filename", "file_name", "image", "path", "name", "id"}  # titles of the first column of TABLE
TRAIN, VAL, TEST = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")
HOW = f"put the images of each class into a folder of their own, as in cats/1.png, dogs/1.png, or list file,class in {TABLE}"
File = tuple[str, int]  # name below the root, condition
Kinds = dict[str, list]  # kind -> [how many, the first one's name]


@dataclass(frozen=True)
class Found:
    """Images below src/root, sorted by name ("cats/1.png"), each with its condition.

    archive: src as a zip file; None for a folder. Its names never become paths. held_out: the images of the val folder; None where src
    has no splits of its own. files: all other images. skipped: what was not taken, by kind. said: what to tell the user.
    """

    src: Path
    archive: ZipFile | None
    root: str
    class_names: tuple[str, ...]
    files: list[File]
    held_out: list[File] | None
    skipped: Kinds
    said: list[str]

    def read(self, name: str) -> bytes:
        return _read(self.src, self.archive, self.root + name)

    def fingerprint(self) -> str:
        """Short hash of the images' names and sizes: changed images are another dataset."""
        digest = hashlib.sha256()
        for name, _ in [*self.files, *(self.held_out or [])]:
            digest.update(os.fsencode(name) + b"\0%d\n" % self._size(self.root + name))
        return digest.hexdigest()[:16]

    def _size(self, name: str) -> int:
        if self.archive is not None:
            return self.archive.getinfo(name).file_size
        try:
            return (self.src / name).stat().st_size
        except OSError:
            # a dangling link counts among the unreadable images
            return -1


def count(kinds: Kinds, kind: str, name: str) -> None:
    """Count one more of this kind."""
    kinds.setdefault(kind, [0, name])[0] += 1


def listed(kinds: Kinds) -> str:
    """Kinds in words, the most frequent first: "3 hidden (like .DS_Store), 1 ..."."""
    return ", ".join(f"{n} {kind} (like {name})" for kind, (n, name) in sorted(kinds.items(), key=lambda item: -item[1][0]))


def taken(src: Path, formats: dict[str, int], skipped: Kinds) -> str:
    """How many images of which formats were taken, and what was skipped, in one line."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(formats.items(), key=lambda item: -item[1]))
    return f"{src}: {sum(formats.values())} images ({kinds})" + (f"; skipped {listed(skipped)}" if skipped else "")


def images_below(folder: Path) -> tuple[list[str], Kinds]:
    """Names of the images anywhere below a folder, sorted; and what was skipped. Links are followed.

    Raises UserError where a link leads back, or the folder cannot be read.
    """
    skipped: Kinds = {}
    try:
        entries = sorted(_entries_below(folder, skipped), key=_order)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return _images(_without_others(folder, None, entries, skipped)), skipped


def find_images(src: Path) -> Found:
    """The images of a folder or a .zip, and their conditions.

    Conditions come from a list of labels where there is one: dataset.json, as EDM2's and StyleGAN's data have it, or labels.csv. Else
    they come from class folders. Class folders may lie in train/ and val/, and everything may lie in one outer folder. Raises UserError
    where nothing of this fits, or src cannot be read.
    """
    skipped: Kinds = {}
    try:
        archive = None
        if src.suffix.lower() == ".zip" and src.is_file():
            archive = ZipFile(src)
            entries = sorted(_entries_of_zip(src, archive, skipped), key=_order)
        elif src.is_dir():
            entries = sorted(_entries_below(src, skipped), key=_order)
        else:
            raise UserError(f"no folder of images at {src}, nor a .zip")
        root, names = "", _without_others(src, archive, entries, skipped)
        while inner := _only_folder(names, entries, root):
            root, names = root + inner, _inside(names, inner)
        said = [f"the classes are in {src / root}, the only folder of {src}"] if root else []
        images, held_out = _images(names), dict[str, str]()
        # a table of labels may lie beside the folder of images
        beside = src.absolute().with_name(TABLE)
        if root + LABELS in entries:
            labels = _by_json(src / root / LABELS, images, _read(src, archive, root + LABELS))
        elif root + TABLE in entries:
            labels = _by_table(src / root / TABLE, images, _read(src, archive, root + TABLE))
        elif any("/" not in name for name in images) and beside.is_file():
            labels = _by_table(beside, images, beside.read_bytes(), src.stem if archive else src.name)
        elif splits := _splits(names):
            labels, held_out = _by_splits(src / root, names, *splits)
            said.append(f"{src / root / splits[0]} is taken as train, {splits[1]} as val; nothing else of {src / root} is used")
        else:
            labels = _by_folders(src / root, names)
        class_names = ordered(set(labels.values()))
        condition = {name: c for c, name in enumerate(class_names)}
        files, val = ([(name, condition[label]) for name, label in split.items()] for split in (labels, held_out))
        said.append(f"{len(class_names)} classes: {', '.join(_numbered(class_names))}")
        return Found(src, archive, root, class_names, files, val or None, skipped, said)
    except OSError as error:
        raise _unreadable(src, error) from error
    # zipfile raises these on damaged bytes and on methods that it does not know
    except (BadZipFile, NotImplementedError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{src} is damaged, or no zip file ({error}): copy it again, or unpack it and give the folder") from error


def _unreadable(src: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {error.filename or src} ({error.strerror or error}): make it readable")


def _left_out(name: str) -> str | None:
    """The kind of a hidden or system entry; None for others."""
    if name.lower() in SYSTEM:
        return "of the system"
    return "hidden" if name.startswith(".") else None


def _entries_below(src: Path, skipped: Kinds) -> Iterator[str]:
    """Names of all files, and of all folders with "/" at the end. Raises UserError where a link leads back to a folder above it."""
    todo: list[tuple[str, frozenset[str]]] = [("", frozenset())]
    while todo:
        prefix, above = todo.pop()
        here = os.path.realpath(src / prefix)
        if here in above:
            raise UserError(f"{src / prefix} is a link to a folder that it lies in: remove the link")
        for entry in os.scandir(src / prefix):
            if kind := _left_out(entry.name):
                count(skipped, kind, prefix + entry.name)
            # is_dir() of an entry may raise at a link that leads nowhere
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                yield f"{prefix}{entry.name}/"
                todo.append((f"{prefix}{entry.name}/", above | {here}))
            else:
                yield prefix + entry.name


def _entries_of_zip(src: Path, archive: ZipFile, skipped: Kinds) -> set[str]:
    """What _entries_below would give of the unpacked file."""
    entries = set()
    for info in archive.infolist():
        parts = info.filename.removesuffix("/").split("/")
        if info.flag_bits & 1:
            raise UserError(f"{src} is encrypted: unpack it with its password and give the folder")
        if "" in parts or ".." in parts:
            raise UserError(f"{src} holds {info.filename!r}, which lies outside of it: pack it again")
        if kind := next(filter(None, map(_left_out, parts)), None):
            count(skipped, kind, info.filename)
            continue
        entries.add(info.filename)
        entries |= {"/".join(parts[:depth]) + "/" for depth in range(1, len(parts))}
    return entries


def _order(name: str) -> list[str]:
    """Key for sorting names: the content of a folder stays together."""
    return name.split("/")


def _read(src: Path, archive: ZipFile | None, name: str) -> bytes:
    return regular(src / name).read_bytes() if archive is None else archive.read(name)


def _without_others(src: Path, archive: ZipFile | None, entries: list[str], skipped: Kinds) -> list[str]:
    """Folders and images among the entries. A file is an image by its name's ending or, where that is unknown, by its content."""
    names = []
    for name in entries:
        if name.endswith("/") or os.path.splitext(name)[1].lower() in endings():
            names.append(name)
        elif os.path.basename(name) not in (LABELS, TABLE):
            if format_of(src / name if archive is None else archive.open(name)):
                names.append(name)
            else:
                count(skipped, "that are no images", name)
    return names


def _images(names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith("/")]


def _inside(names: list[str], folder: str) -> list[str]:
    """Names below a folder, relative to it."""
    return [name.removeprefix(folder) for name in names if name.startswith(folder) and name != folder]


def _top(names: list[str]) -> list[str]:
    """The folders that lie in no other one."""
    return [name for name in names if name.find("/") == len(name) - 1]


def _only_folder(names: list[str], entries: list[str], root: str) -> str | None:
    """The folder around the class folders, if there is one: nothing lies beside it, and no images lie directly in it."""
    if len(_top(names)) != 1 or root + LABELS in entries or root + TABLE in entries:
        return None
    return None if any(name.count("/") < 2 for name in _images(names)) or len(_images(names)) == 0 else _top(names)[0]


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in the order of their conditions: numeric if all names are numbers, else alphabetic."""
    names = sorted(names)
    return tuple(sorted(names, key=int) if all(name.isdecimal() for name in names) else names)


def _numbered(class_names: tuple[str, ...]) -> list[str]:
    """The first classes and the last one, each with its condition."""
    shown = [f"{c} {name}" for c, name in enumerate(class_names)]
    shown[10:-1] = ["..."] if len(shown) > 12 else shown[10:-1]
    return [*shown[:-1], shown[-1] + " (in numeric order)" * (list(class_names) != sorted(class_names))]


def _by_folders(src: Path, names: list[str]) -> dict[str, str]:
    """The class of every image: its outermost folder."""
    labels = {name: name.partition("/")[0] for name in _images(names)}
    if loose := [name for name in labels if "/" not in name]:
        raise UserError(f"{src} has {len(loose)} images outside of any class folder ({loose[0]}): {HOW}")
    folders = {folder[:-1] for folder in _top(names)}
    if not folders:
        raise UserError(f"{src} has no class folders: {HOW}")
    if empty := folders - set(labels.values()):
        raise UserError(f"class folder {src / min(empty)} has no images: add some or remove it")
    return labels


def _splits(names: list[str]) -> tuple[str, str] | None:
    """The folders of train and val; None where the folders are classes."""
    top = {folder[:-1].lower(): folder for folder in _top(names)}
    train, val, test = (next((top.pop(name) for name in known if name in top), None) for known in (TRAIN, VAL, TEST))
    held_out = val or test
    # a folder that holds images directly is a class
    if top or not train or not held_out or any("/" not in name for name in _images(_inside(names, train))):
        return None
    return train, held_out


def _by_splits(src: Path, names: list[str], train: str, val: str) -> tuple[dict[str, str], dict[str, str]]:
    """The class of every image of train, and of val."""
    labels, held_out = (
        {split + name: label for name, label in _by_folders(src / split, _inside(names, split)).items()} for split in (train, val)
    )
    if odd := set(held_out.values()) - set(labels.values()):
        raise UserError(f"class {min(odd)} is in {src / val}, but not in {src / train}: add images there, or remove it")
    return labels, held_out


def _complete(place: Path, images: list[str], labels: dict[str, Any]) -> dict[str, Any]:
    """The labels in the order of the images. Raises UserError unless every image has a label, and every label an image."""
    if unlabelled := [name for name in images if name not in labels]:
        raise UserError(f"{place} has no label for {len(unlabelled)} images ({unlabelled[0]}): add them or remove the images")
    if missing := sorted(set(labels) - set(images)):
        raise UserError(f"{place} has labels for {len(missing)} images that are not there ({missing[0]}): copy the images again")
    if not images:
        raise UserError(f"{place.parent} has no images: add some")
    return {name: labels[name] for name in images}


def _by_table(place: Path, images: list[str], text: bytes, folder: str = "") -> dict[str, str]:
    """The class of every image, from lines of file,class. folder: the name of the folder of images, which lines may begin with."""
    try:
        rows = [row for row in csv.reader(text.decode("utf-8-sig").splitlines(), strict=True) if row]
        if rows and rows[0][0].strip().lower() in HEADS and rows[0][0] not in images:
            rows = rows[1:]
        labels = {row[0].strip().removeprefix(f"{folder}/"): row[1].strip() for row in rows}
    except (ValueError, IndexError, csv.Error) as error:
        raise UserError(f"{place} is no table of files and classes ({error}): expected lines like a.png,cats") from error
    if len(labels) < len(rows):
        raise UserError(f"{place} names {len(rows) - len(labels)} files twice: leave one line for each")
    return _complete(place, images, labels)


def _by_json(place: Path, images: list[str], text: bytes) -> dict[str, str]:
    """The class of every image, from {"labels": [["00000/img00000000.png", 6], ...]}; classes are "0", "1", ..."""
    try:
        labels = json.loads(text)["labels"]
        labels = labels if labels is None else dict(labels)
        if odd := [name for name in labels or () if not isinstance(name, str)]:
            raise TypeError(f"{odd[0]!r:.40} is no name of an image")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{place} is no list of labels ({error}): expected {{"labels": [["a.png", 0], ...]}}') from error
    if labels is None:
        raise UserError(f"{place} has no labels (null): conditions are learned from them; {HOW}, and remove dataset.json")
    labels = _complete(place, images, labels)
    if wrong := [name for name in images if type(labels[name]) is not int or labels[name] < 0]:
        raise UserError(f"{place}: the label of {wrong[0]} is {labels[wrong[0]]!r:.40}: expected a whole number from 0 on")
    known = sorted(set(labels.values()))
    if known[-1] >= len(known):
        gap = next(c for c, label in enumerate(known) if c != label)
        raise UserError(
            f"{place}: labels go to {known[-1]}, but no image has {gap}: number the classes 0, 1, 2, ... without gaps"
        )
    return {name: str(label) for name, label in labels.items()}
