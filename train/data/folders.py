"""Finds the images of a folder or zip file, and the condition of each: from class folders or a list of labels."""

import csv
import hashlib
import json
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
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
TRAIN, VAL, TEST = ("train/", "training/"), ("val/", "valid/", "validation/"), ("test/", "testing/")
HOW = f"put the images of each class into a folder of their own, as in cats/1.png, dogs/1.png, or list file,class in {TABLE}"
File = tuple[str, int]  # name, condition
Kinds = dict[str, list[str]]  # kind -> the names of what is of it


class Tree:
    """A folder, or a zip file, whose names never become paths.

    entries: names of files ("cats/1.png"), and of folders with "/" at the end, sorted. names: without files that are no images.
    root: the folder in src that all names are relative to; place: its path. skipped: what was not taken, by kind.
    """

    def __init__(self, src: Path):
        """Raises UserError where a link leads back, or a zip file holds names outside of it."""
        self.src, self.root, self.place = src, "", src
        self.skipped: Kinds = defaultdict(list)
        self.archive = ZipFile(src) if src.suffix.lower() == ".zip" and src.is_file() else None
        found = self._below() if self.archive is None else self._packed(self.archive)
        # the content of a folder stays together
        self.entries = sorted(found, key=lambda name: name.split("/"))
        self.names = [name for name in self.entries if self._is_taken(name)]

    def enter(self, folder: str) -> None:
        """Make this folder the root of all names."""
        self.root, self.place = self.root + folder, self.place / folder
        self.entries, self.names = (
            [name.removeprefix(folder) for name in names if name.startswith(folder) and name != folder]
            for names in (self.entries, self.names)
        )

    def read(self, name: str) -> bytes:
        return regular(self.place / name).read_bytes() if self.archive is None else self.archive.read(self.root + name)

    def size(self, name: str) -> int:
        if self.archive is not None:
            return self.archive.getinfo(self.root + name).file_size
        # a dangling link counts among the unreadable images
        return os.path.getsize(self.place / name) if os.path.exists(self.place / name) else -1

    def _below(self) -> Iterator[str]:
        todo: list[tuple[str, frozenset[str]]] = [("", frozenset())]
        while todo:
            prefix, above = todo.pop()
            here = os.path.realpath(self.src / prefix)
            if here in above:
                raise UserError(f"{self.src / prefix} is a link to a folder that it lies in: remove the link")
            for entry in os.scandir(self.src / prefix):
                name = prefix + entry.name
                if self._is_skipped(entry.name, name):
                    continue
                # is_dir() of an entry may raise at a link that leads nowhere
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    name += "/"
                    todo.append((name, above | {here}))
                yield name

    def _packed(self, archive: ZipFile) -> set[str]:
        """What _below would give of the unpacked file."""
        entries = set()
        for info in archive.infolist():
            if info.flag_bits & 1:
                raise UserError(f"{self.src} is encrypted: unpack it with its password and give the folder")
            parts = info.filename.removesuffix("/").split("/")
            if "" in parts or ".." in parts:
                raise UserError(f"{self.src} holds {info.filename!r}, which lies outside of it: pack it again")
            if not any(self._is_skipped(part, info.filename) for part in parts):
                entries |= {info.filename, *("/".join(parts[:depth]) + "/" for depth in range(1, len(parts)))}
        return entries

    def _is_skipped(self, part: str, name: str) -> bool:
        """Whether a part of a name is that of a hidden or system entry, which is counted."""
        system = part.lower() in SYSTEM
        if system or part.startswith("."):
            self.skipped["of the system" if system else "hidden"].append(name)
            return True
        return False

    def _is_taken(self, name: str) -> bool:
        """Whether it is a folder or an image: by its name's ending or, where that is unknown, by its content. Other files are counted."""
        if name.endswith("/") or os.path.splitext(name)[1].lower() in endings():
            return True
        if os.path.basename(name) in (LABELS, TABLE):
            return False
        if format_of(self.src / name if self.archive is None else self.archive.open(name)):
            return True
        self.skipped["that are no images"].append(name)
        return False


@dataclass(frozen=True)
class Found:
    """The images of a tree, sorted by name, each with its condition.

    held_out: the images of the val folder; None where there are no such splits. files: all other images. said: what to tell the user.
    """

    tree: Tree
    class_names: tuple[str, ...]
    files: list[File]
    held_out: list[File] | None
    said: list[str]

    def fingerprint(self) -> str:
        """Short hash of the images' names and sizes: changed images are another dataset."""
        digest = hashlib.sha256()
        for name, _ in [*self.files, *(self.held_out or [])]:
            digest.update(os.fsencode(name) + b"\0%d\n" % self.tree.size(name))
        return digest.hexdigest()[:16]


def listed(kinds: Kinds) -> str:
    """Kinds in words, the most frequent first: "3 hidden (like .DS_Store), 1 ..."."""
    by_number = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return ", ".join(f"{len(names)} {kind} (like {names[0]})" for kind, names in by_number)


def taken(src: Path, formats: dict[str, int], skipped: Kinds) -> str:
    """How many images of which formats were taken, and what was skipped, in one line."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(formats.items(), key=lambda item: -item[1]))
    return f"{src}: {sum(formats.values())} images ({kinds})" + (f"; skipped {listed(skipped)}" if skipped else "")


def images_below(folder: Path) -> tuple[list[str], Kinds]:
    """Names of the images anywhere below a folder, sorted; and what was skipped. Links are followed.

    Raises UserError where a link leads back, or the folder cannot be read.
    """
    with _readable(folder):
        tree = Tree(folder)
        return _level(tree)[1], tree.skipped


def find_images(src: Path) -> Found:
    """The images of a folder or a .zip, and their conditions.

    Conditions come from a list of labels where there is one: dataset.json, as EDM2's and StyleGAN's data have it, or labels.csv. Else
    they come from class folders. Class folders may lie in train/ and val/, and everything may lie in one outer folder. Raises UserError
    where nothing of this fits, or src cannot be read.
    """
    with _readable(src):
        if not (src.is_dir() or (src.suffix.lower() == ".zip" and src.is_file())):
            raise UserError(f"no folder of images at {src}, nor a .zip")
        tree = Tree(src)
        while inner := _only_folder(tree):
            tree.enter(inner)
        place, (_, images), held_out = tree.place, _level(tree), dict[str, str]()
        said = [f"the classes are in {place}, the only folder of {src}"] if tree.root else []
        # a table of labels may lie beside the folder of images
        beside = src.absolute().with_name(TABLE)
        if LABELS in tree.entries:
            labels = _by_json(place / LABELS, images, tree.read(LABELS))
        elif TABLE in tree.entries:
            labels = _by_table(place / TABLE, images, tree.read(TABLE))
        elif any("/" not in name for name in images) and beside.is_file():
            labels = _by_table(beside, images, beside.read_bytes(), src.stem if tree.archive else src.name)
        elif splits := _splits(tree):
            labels, held_out = (_by_folders(tree, split) for split in splits)
            here, there = (place / split for split in splits)
            if odd := set(held_out.values()) - set(labels.values()):
                raise UserError(f"class {min(odd)} is in {there}, but not in {here}: add images there, or remove it")
            said.append(f"{here} is taken as train, {splits[1]} as val; nothing else of {place} is used")
        else:
            labels = _by_folders(tree)
    class_names = sorted(set(labels.values()))
    by_number = all(map(str.isdecimal, class_names))
    if by_number:
        class_names.sort(key=int)
    condition = {name: c for c, name in enumerate(class_names)}
    files, val = ([(name, condition[label]) for name, label in split.items()] for split in (labels, held_out))
    shown = [f"{c} {name}" for c, name in enumerate(class_names)]
    shown[10:-1] = ["..."] if len(shown) > 12 else shown[10:-1]
    said.append(f"{len(class_names)} classes: {', '.join(shown)}" + " (in numeric order)" * by_number)
    return Found(tree, tuple(class_names), files, val or None, said)


@contextmanager
def _readable(src: Path) -> Iterator[None]:
    """Raises UserError where src cannot be read, or is a damaged zip file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename or src} ({error.strerror or error}): make it readable") from error
    # zipfile raises these on damaged or encrypted bytes and on methods that it does not know
    except (BadZipFile, RuntimeError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{src} is damaged, or no zip file ({error}): copy it again, or unpack it and give the folder") from error


def _level(tree: Tree, folder: str = "") -> tuple[list[str], list[str]]:
    """(the folders in a folder, the images anywhere below it), by names relative to it."""
    names = [name.removeprefix(folder) for name in tree.names if name.startswith(folder) and name != folder]
    return [name for name in names if name.find("/") == len(name) - 1], [name for name in names if not name.endswith("/")]


def _only_folder(tree: Tree) -> str | None:
    """The folder around the class folders, if there is one: nothing lies beside it, and no images lie directly in it."""
    folders, images = _level(tree)
    alone = len(folders) == 1 and not {LABELS, TABLE}.intersection(tree.entries)
    return folders[0] if alone and min((name.count("/") for name in images), default=0) > 1 else None


def _splits(tree: Tree) -> tuple[str, str] | None:
    """The folders of train and of val; None where the folders are classes."""
    folders = {folder.lower(): folder for folder in _level(tree)[0]}
    train, val, test = (next((folders.pop(name) for name in known if name in folders), "") for known in (TRAIN, VAL, TEST))
    # a folder that holds images directly is a class
    if folders or not train or not (val or test) or any("/" not in name for name in _level(tree, train)[1]):
        return None
    return train, val or test


def _by_folders(tree: Tree, split: str = "") -> dict[str, str]:
    """The class of every image of a split: its outermost folder."""
    (folders, images), place = _level(tree, split), tree.place / split
    if loose := [name for name in images if "/" not in name]:
        raise UserError(f"{place} has {len(loose)} images outside of any class folder ({loose[0]}): {HOW}")
    if not folders:
        raise UserError(f"{place} has no class folders: {HOW}")
    labels = {split + name: name.partition("/")[0] for name in images}
    if empty := {folder[:-1] for folder in folders} - set(labels.values()):
        raise UserError(f"class folder {place / min(empty)} has no images: add some or remove it")
    return labels


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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{place} is no list of labels ({error}): expected {{"labels": [["a.png", 0], ...]}}') from error
    if labels is None:
        raise UserError(f"{place} has no labels (null): conditions are learned from them; {HOW}, and remove dataset.json")
    if wrong := [item for item in labels.items() if type(item[0]) is not str or type(item[1]) is not int or item[1] < 0]:
        raise UserError(f'{place} has the label {wrong[0]!r:.60}: expected a name and a number from 0 on, as in ["a.png", 0]')
    labels, known = _complete(place, images, labels), sorted(set(labels.values()))
    if gap := [c for c, label in enumerate(known) if c != label]:
        raise UserError(f"{place} has labels up to {known[-1]}, but no image has {gap[0]}: number the classes 0, 1, 2, ...")
    return {name: str(label) for name, label in labels.items()}
