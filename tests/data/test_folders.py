"""Which images are found in a folder, with which conditions, and what is skipped; how any image file is read."""

import shutil

import numpy as np
import pytest
from photos import encoded, save
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mclr.errors import UserError
from mclr.train.data.dataset import load_split
from mclr.train.data.folders import find_images, images_below
from mclr.train.data.images import center_crop, decode, read_images
from mclr.train.data.write import prepare_images
from mclr.train.prepare import main


def conditions(folder, split):
    """{red value of an image: condition} of a split."""
    image_NCHW, c_N = load_split(folder, split)
    return dict(zip(image_NCHW[:, 0, 0, 0].tolist(), c_N.tolist(), strict=True))


@pytest.fixture
def pets(tmp_path):
    """cats/ and dogs/ of 6 images each."""
    for c, name in enumerate(("cats", "dogs")):
        for i in range(6):
            save(tmp_path / "pets" / name / f"{i}.png", 100 * c + i)
    return tmp_path / "pets"


JUNK = ("cats/Thumbs.db", "cats/.DS_Store", "dogs/._0.png", ".ipynb_checkpoints/0.png", "@eaDir/t.jpg", "cats/@eaDir/0.png/S.jpg")


def test_what_is_no_image_of_the_user_is_skipped_and_counted(pets, tmp_path, capsys):
    for name in (*JUNK, "readme.txt", "cats/notes"):
        (pets / name).parent.mkdir(parents=True, exist_ok=True)
        (pets / name).write_bytes(b"x") if name.endswith((".db", "_Store", "._0.png", "txt", "notes")) else save(pets / name)
    # an image whatever its ending
    save(tmp_path / "a.png").rename(pets / "dogs" / "photo")
    (pets / "dogs" / "avif.jpg").write_bytes(encoded(Image.new("RGB", (8, 8)), "AVIF"))
    info = prepare_images(pets, tmp_path / "out", resolution=8)
    assert info.class_names == ("cats", "dogs") and sum(split.count for split in info.splits.values()) == 14
    said = capsys.readouterr().out
    assert "2 classes: 0 cats, 1 dogs\n" in said and f"{pets}: 14 images (13 PNG, 1 AVIF); skipped 3 " in said
    assert all(f"{kind} (like " in said for kind in ("3 hidden", "3 of the system", "2 that are no images"))
    (names, skipped), found = images_below(pets), find_images(pets)
    assert len(names) == 14 and names == [name for name, _ in found.files] and skipped == found.tree.skipped


@pytest.mark.parametrize("names, test", [(("train", "val"), False), (("Train", "valid"), True), (("training", "test"), False)])
def test_splits_of_a_folder_are_used(pets, tmp_path, capsys, names, test):
    src = tmp_path / "wrapped" / "src"
    for i, name in enumerate((*names, "test") if test else names):
        shutil.copytree(pets, src / name)
        for c, animal in enumerate(("cats", "dogs")):
            save(src / name / animal / "more.png", 200 + 10 * i + c)
    info = prepare_images(tmp_path / "wrapped", tmp_path / "out", resolution=8)
    assert info.class_names == ("cats", "dogs") and [split.count for split in info.splits.values()] == [14, 14]
    train, val = (conditions(tmp_path / "out", split) for split in ("train", "val"))
    assert train[200] == val[210] == 0 and train[201] == val[211] == 1 and 210 not in train
    said = capsys.readouterr().out
    assert f"the classes are in {src}, the only folder of" in said
    assert f"{src}/{names[0]} is taken as train, {names[1]}/ as val" in said
    with pytest.raises(UserError, match="has splits of its own: leave out the val share"):
        prepare_images(src, tmp_path / "other", resolution=8, val_share=0.2)
    save(src / names[1] / "cows" / "1.png")
    with pytest.raises(UserError, match=f"class cows is in {src}/{names[1]}, but not in"):
        prepare_images(src, tmp_path / "other", resolution=8)


def test_class_folders_that_look_like_splits_stay_classes(tmp_path):
    for name in ("train", "val"):
        save(tmp_path / "src" / name / "1.png")
    assert find_images(tmp_path / "src").class_names == ("train", "val")


def test_numbers_are_in_numeric_order_and_other_names_in_that_of_text(tmp_path, capsys):
    for c in range(12):
        save(tmp_path / "numbers" / str(c) / "1.png", c)
        save(tmp_path / "synsets" / f"n{c}" / "1.png", c)
    prepare_images(tmp_path / "numbers", tmp_path / "out", resolution=8, val_share=0)
    assert conditions(tmp_path / "out", "train") == {c: c for c in range(12)}
    assert "12 classes: 0 0, 1 1, 2 2," in (said := capsys.readouterr().out) and "11 11 (in numeric order)\n" in said
    assert find_images(tmp_path / "synsets").class_names[:4] == ("n0", "n1", "n10", "n11")


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_a_table_of_labels(tmp_path, place):
    src = tmp_path / "photos"
    for i in range(4):
        save(src / f"{i}.png", i)
    table, last = (src / "labels.csv", "3.png") if place == "inside" else (tmp_path / "labels.csv", "photos/3.png")
    table.write_text(f"\ufefffile,class\n0.png,a\n1.png,b\n2.png,a\n{last},b\n")
    info = prepare_images(src, tmp_path / "out", resolution=8, val_share=0)
    assert info.class_names == ("a", "b") and conditions(tmp_path / "out", "train") == {i: i % 2 for i in range(4)}
    for text, says in (
        ("0.png,a\n", "has no label for 3 images"),
        ("0.png\n", "is no table of files and classes"),
        ("0.png,a\n0.png,b\n", "names 1 files twice"),
        ("".join(f"{i}.png,a\n" for i in range(5)), "has labels for 1 images that are not there .4.png."),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=f"{table} {says}"):
            find_images(src)


def test_every_class_keeps_an_image_to_train_on(tmp_path, capsys):
    for c in range(20):
        save(tmp_path / "src" / f"c{c:02d}" / "0.png", c)
    for i in range(30):
        save(tmp_path / "src" / "c00" / f"{i}.png", 100)
    info = prepare_images(tmp_path / "src", tmp_path / "out", resolution=8)
    assert set(conditions(tmp_path / "out", "train").values()) == set(range(20)) and info.splits["val"].count > 0
    assert "19 of 20 classes have no image in val, like c01" in capsys.readouterr().err


UPRIGHT = np.zeros((16, 24, 3), np.uint8)
UPRIGHT[:8, :12] = 250
TURNED = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_orientation_is_read_upright(tmp_path, kind):
    for orientation, how in enumerate(TURNED, start=2):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = Image.fromarray(UPRIGHT).transpose(Image.Transpose[how])
        path = tmp_path / f"{orientation}.png"
        path.write_bytes(encoded(turned, kind, exif=exif, quality=98))
        (image_CHW,) = read_images([path])
        assert np.abs(image_CHW.transpose(1, 2, 0).astype(int) - UPRIGHT).max() < 30


def test_a_png_may_hold_long_texts(tmp_path):
    image, texts = Image.fromarray(UPRIGHT), PngInfo()
    texts.add_text("Description", "x" * 3_000_000, zip=True)
    texts.add_itxt("Other", "y" * 3_000_000, zip=True)
    # which Pillow reads the orientation from
    texts.add_itxt("XML:com.adobe.xmp", '<rdf tiff:Orientation="3"/>')
    data = encoded(image, "PNG", pnginfo=texts)
    assert np.array_equal(decode(data)[0], UPRIGHT[::-1, ::-1])
    assert np.array_equal(decode(data[:-4])[0], UPRIGHT[::-1, ::-1])


def test_the_limit_of_size_is_ours_and_can_be_set(tmp_path, capsys):
    assert Image.MAX_IMAGE_PIXELS is None
    for i in range(120):
        save(tmp_path / "src" / "a" / f"{i}.png")
    Image.new("RGB", (64, 33)).save(tmp_path / "src" / "a" / "large.png")
    argv = ["images", str(tmp_path / "src"), str(tmp_path / "out"), "--resolution", "8", "--megapixels"]
    assert main([*argv, str(64 * 32 / 2**20)]) == 0
    says = "cannot be read: 1 larger than the 0.00195312 megapixels of `mclr prepare images --megapixels` (like a/large.png)"
    assert says in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    assert main([*argv, "1"]) == 0 and "121 images (121 PNG)" in capsys.readouterr().out


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (30_000, 16)])
def test_a_thin_image_takes_memory_of_its_result(monkeypatch, size):
    resize, largest = Image.Image.resize, []

    def noted(self, size, *rest):
        largest.append(size[0] * size[1])
        return resize(self, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", noted)
    image = Image.new("RGB", size, "blue")
    image.paste("red", (size[0] // 2, size[1] // 2, size[0] // 2 + 1, size[1]))
    assert center_crop(image, 64).getpixel((32, 32))[0] > 100 and max(largest) <= 32 * 64 * 64


@pytest.mark.parametrize("side", [7, 8, 9, 31, 33, 64, 77])
def test_ordinary_crops_are_those_of_the_first_release(side):
    # the definition, which shards of existing datasets were made by
    image = Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, 3 * side, 3), np.uint8))
    whole = image
    while min(whole.size) >= 16:
        whole = whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.BOX)
    scale = 8 / min(whole.size)
    whole = whole.resize((round(whole.width * scale), round(whole.height * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - 8) // 2, (whole.height - 8) // 2
    assert np.array_equal(center_crop(image, 8), whole.crop((left, top, left + 8, top + 8)))


def test_reasons_are_told_by_kind(pets, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    for i in range(3):
        (pets / "cats" / f"cut{i}.png").write_bytes(encoded(Image.fromarray(UPRIGHT), "PNG")[: 60 - i])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(pets / "dogs" / "depth.tif")
    (pets / "dogs" / "dangling.png").symlink_to("nowhere")
    (pets / "dogs" / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(UserError, match=r"^6 of 18 images in .*; that is more than 1%") as error:
        prepare_images(pets, tmp_path / "out", resolution=8)
    for says in (
        "3 image file is truncated (like cats/cut",
        "1 pixels of 32 bits have no known range (like dogs/depth.tif)",
        "1 No such file or directory (like dogs/dangling.png)",
        "1 in no format that Pillow here reads (like dogs/eps.png)",
    ):
        assert says in str(error.value)
    assert not (tmp_path / "out").exists()
