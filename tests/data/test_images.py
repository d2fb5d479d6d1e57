"""Images of every mode and every kind of damage: the right picture, or one sentence."""

from __future__ import annotations

import io
import logging
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.data import ImageFiles, find_images, read_image, to_rgb
from foveate.data import images as module

RAMP = np.tile(np.arange(256, dtype=np.uint8), (8, 1))


def colours() -> Image.Image:
    """Large even areas, so that lossy formats keep them."""
    image = Image.new("RGB", (64, 32), (200, 40, 30))
    image.paste((20, 60, 210), (32, 0, 64, 32))
    return image


def near(found: Image.Image, expected: Image.Image, tolerance: int = 0) -> None:
    assert found.mode == "RGB" and found.size == expected.size
    a, b = (np.asarray(i.convert("RGB")).astype(int) for i in (found, expected))
    assert np.abs(a - b).max() <= tolerance


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_modes_that_png_has(mode: str, tmp_path: Path) -> None:
    image = colours().convert(mode)
    image.save(tmp_path / "a.png")
    near(read_image(tmp_path / "a.png"), image)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_16_bit_grey_is_scaled_and_not_clipped(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / f"a{suffix}")
    near(read_image(tmp_path / f"a{suffix}"), Image.fromarray(RAMP))
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / f"dark{suffix}")
    assert np.asarray(read_image(tmp_path / f"dark{suffix}")).max() == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP.astype(np.float32) / 255, RAMP),
        (RAMP.astype(np.float32), RAMP),
        (RAMP.astype(np.float32) * 257, RAMP),
        (RAMP.astype(np.float32) * 1e6, RAMP),
        (RAMP.astype(np.float32) - 255, RAMP),
        (RAMP.astype(np.int32), RAMP),
        (RAMP.astype(np.int32) * 257, RAMP),
        (np.full((8, 256), np.nan, dtype=np.float32), RAMP * 0),
        (np.zeros((8, 256), dtype=np.int32), RAMP * 0),
    ],
)
def test_floats_and_wide_integers(values: np.ndarray, expected: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    near(read_image(tmp_path / "a.tif"), Image.fromarray(expected), 1)


def test_premultiplied_transparency() -> None:
    for mode, own in (("LA", "La"), ("RGBA", "RGBa")):
        image = Image.new(mode, (2, 2), (80, 80, 80, 128)[-len(mode) :]).convert(own)
        assert image.mode == own
        found = np.asarray(to_rgb(image))
        assert found.shape == (2, 2, 3) and abs(found.astype(int) - 167).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_pixels_are_white(mode: str, tmp_path: Path) -> None:
    image = Image.new("RGBA", (16, 16), (200, 40, 30, 255))
    image.paste((10, 20, 30, 0), (0, 0, 8, 16))
    if mode == "P":
        image = colours().quantize(2).crop((24, 0, 40, 16))
        image.save(tmp_path / "a.png", transparency=image.getpixel((0, 0)))
    elif mode == "PA":
        mixed = image.convert("RGB").quantize(2).convert("PA")
        mixed.putalpha(image.getchannel("A"))  # Pillow before 12 loses it on the way from RGBA
        assert np.asarray(to_rgb(mixed))[0, 0].tolist() == [255, 255, 255]
        return
    else:
        image.convert(mode).save(tmp_path / "a.png")
    found = np.asarray(read_image(tmp_path / "a.png"))
    assert (found[:, :8] == 255).all() and (found[:, 8:] < 255).any(-1).all()


def test_cmyk(tmp_path: Path) -> None:
    colours().convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    near(read_image(tmp_path / "a.jpg"), colours(), 12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_image_upright(orientation: int, tmp_path: Path) -> None:
    back = {
        2: (Image.Transpose.FLIP_LEFT_RIGHT,),
        3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,),
        5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_90,),
        7: (Image.Transpose.TRANSVERSE,),
        8: (Image.Transpose.ROTATE_270,),
    }
    upright = colours()
    stored = upright
    for step in back.get(orientation, ()):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    near(read_image(tmp_path / "a.png"), upright)


def test_damaged_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    colours().save(tmp_path / "a.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert read_image(tmp_path / "a.jpg").size == (64, 32)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    colours().save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (64, 32))])
    near(read_image(tmp_path / "a.gif"), colours(), 8)


@pytest.mark.parametrize("size", [(1, 1), (1, 500)])
def test_tiny_images(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").size == size


# Huge ones, at a limit that is small enough to test ----------------------------------------------


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_PIXELS", 1000)
    monkeypatch.setattr(module, "_REFUSED_PIXELS", 2000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)


@pytest.mark.parametrize(("size", "left"), [((40, 40), (20, 20)), ((320, 160), (40, 20))])
def test_a_large_jpeg_is_shrunk(
    size: tuple[int, int], left: tuple[int, int], small_limits: None, tmp_path: Path
) -> None:
    colours().resize(size).save(tmp_path / "a.jpg")
    found = read_image(tmp_path / "a.jpg")
    assert found.size[0] * found.size[1] <= 1000
    near(found, colours().resize(found.size), 60)


def test_a_large_png_is_shrunk_and_a_huge_one_refused(small_limits: None, tmp_path: Path) -> None:
    colours().resize((40, 40)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").size == (20, 20)
    Image.new("RGB", (100, 100)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png: more than .* million pixels"):
        read_image(tmp_path / "b.png")


def test_a_huge_progressive_jpeg_is_refused(small_limits: None, tmp_path: Path) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "a.jpg", progressive=True)
    with pytest.raises(ValueError, match="100 x 100 pixels; at most"):
        read_image(tmp_path / "a.jpg")


def test_20_000_by_20_000(tmp_path: Path) -> None:
    """A header that claims so much is refused at once; nothing is decoded."""
    stream = io.BytesIO()
    Image.new("1", (8, 8)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"a\.png: more than 178 million pixels"):
        read_image(tmp_path / "a.png")


# Files that are no images ------------------------------------------------------------------------


def broken_files(folder: Path) -> dict[str, Path]:
    colours().save(folder / "whole.png")
    colours().save(folder / "whole.jpg")
    files = {
        "text": b"this is text\n",
        "empty": b"",
        "half": (folder / "whole.png").read_bytes()[:90],
        "half_jpeg": (folder / "whole.jpg").read_bytes()[:300],
        "zeros": bytes(1000),
    }
    for name, content in files.items():
        (folder / f"{name}.jpg").write_bytes(content)
    return {name: folder / f"{name}.jpg" for name in files}


def test_broken_files_are_one_sentence(tmp_path: Path) -> None:
    for path in broken_files(tmp_path).values():
        with pytest.raises(ValueError) as error:
            read_image(path)
        text = str(error.value)
        assert text.startswith(f"{path}: ") and "\n" not in text and len(text) > len(str(path)) + 5
    with pytest.raises(ValueError, match=r"no\.png does not exist"):
        read_image(tmp_path / "no.png")
    with pytest.raises(ValueError, match="is a folder"):
        read_image(tmp_path)


def test_broken_files_are_named_counted_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = broken_files(tmp_path)
    files = ImageFiles(tmp_path)
    with caplog.at_level(logging.WARNING):
        read = [path.name for path, _ in files]
    assert read == ["whole.jpg", "whole.png"]
    assert set(files.broken) == set(broken.values())
    assert "5 of 7 files were skipped" in caplog.text
    assert all(path.name in caplog.text for path in broken.values())
    with pytest.raises(ValueError, match=r"empty\.jpg"):
        list(ImageFiles(tmp_path, strict=True))


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=r"none of 2 files is a readable image: .*a\.jpg"):
        list(ImageFiles(tmp_path))
    with pytest.raises(ValueError, match=r"^[^ ]*a\.jpg: not an image"):
        list(ImageFiles(tmp_path / "a.jpg"))


def test_finding_files(tmp_path: Path) -> None:
    for name in ("b.PNG", "sub/a.jpg", "sub/.hidden.png", ".git/x.png", "notes.txt", "a.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)]
    assert found == ["a.webp", "b.PNG", "sub/a.jpg"]
    twice = find_images([tmp_path / "notes.txt", tmp_path / "b.PNG", tmp_path])
    assert [path.name for path in twice] == ["notes.txt", "b.PNG", "a.webp", "a.jpg"]
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([], "no images were given"),
        (tmp_path / "empty", r"empty holds no images"),
        (tmp_path / "missing", r"missing does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            find_images(paths)
