"""data/image/decode.py: formats, colour spaces and orientations, against Pillow; what is no image.

``test/inputs/images`` has files from public reports; each has a relative made here.
"""

import io
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
from images import MEAN, STD, picture
from PIL import Image, ImageFile, ImageOps, features

from data.common.loader import UnreadableData
from data.image.decode import ImageError, decode_image, header_of
from data.image.loaders import get_image_train_loader, get_image_val_loader
from data.image.options import ImageOptions, ImageTestOptions
from data.image.source import image_source_of_rows

INPUTS = os.path.join(os.path.dirname(__file__), "..", "..", "inputs", "images")
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    b'syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>'
)


def given(name):
    with open(os.path.join(INPUTS, name), "rb") as stream:
        return stream.read()


def encoded(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pillows(content):
    """What Pillow makes of a file, turned."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def assert_as_pillow(content, tolerance=0):
    ours, theirs = decode_image(content, "x"), pillows(content)
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape == (*header_of(io.BytesIO(content)).size, 3)
    assert np.abs(ours.astype(int) - theirs).max() <= tolerance


def png(width, height, bits=1, kind=0):
    """A PNG of some size in its header, and a few bytes of data."""

    def chunk(name, data):
        checksum = zlib.crc32(name + data) & 0xFFFFFFFF
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    data = zlib.compress(bytes(1000), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


SMOOTH = Image.fromarray(picture(3, 60, 80))


# --- orientation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_format_is_turned_as_its_exif_says(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if form == "WEBP" else {}
    content = encoded(SMOOTH, form, exif=exif.tobytes(), **lossless)
    assert_as_pillow(content, tolerance=2 if form == "JPEG" else 0)


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_xmp_says_it_where_exif_does_not(form, orientation):
    content = encoded(SMOOTH, form, quality=95, xmp=XMP % orientation)
    assert header_of(io.BytesIO(content)).size == ((60, 80) if orientation == 3 else (80, 60))
    assert_as_pillow(content, tolerance=3)


@pytest.mark.parametrize("name", ["exif6.webp", "xmp6.jpg"])
def test_given_files_are_turned_and_not_left_out_of_whole_images(name):
    # The left half is red, the right one blue, the upper third brighter; turned to the right.
    content = given(name)
    image = decode_image(content, name)
    assert image.shape == (320, 200, 3) == (*header_of(io.BytesIO(content)).size, 3)
    assert image[40, 20, 0] > 180 > 60 > image[40, 20, 2]
    assert image[280, 20, 2] > 180 > 60 > image[280, 20, 0]
    assert image[40, 180, 1] > 90 > 30 > image[40, 20, 1]
    options = ImageTestOptions(crop_size=32, resize=40, batch_size=1, num_workers=0)
    source = image_source_of_rows([(name, 0)], INPUTS)
    with get_image_val_loader(source, options, mean=MEAN, std=STD, crops="full") as loader:
        ((data, _, _),) = loader
        assert data.shape == (1, 3, 64, 40)


def test_a_broken_orientation_is_none():
    content = encoded(SMOOTH, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(30))
    assert decode_image(content, "x").shape == (60, 80, 3)
    exif = Image.Exif()
    exif[0x0112] = 90
    assert decode_image(encoded(SMOOTH, "JPEG", exif=exif.tobytes()), "x").shape == (60, 80, 3)


# --- the table of docs/images.md ------------------------------------------------------------------

FORMS = {
    "JPEG": ("JPEG", {"quality": 95}, 2),
    "JPEG, progressive": ("JPEG", {"quality": 95, "progressive": True}, 2),
    "PNG": ("PNG", {}, 0),
    "BMP": ("BMP", {}, 0),
    "WebP": ("WEBP", {"quality": 95}, 3),
    "TIFF": ("TIFF", {}, 0),
    "TIFF, LZW": ("TIFF", {"compression": "tiff_lzw"}, 0),
    "PPM": ("PPM", {}, 0),
    "JPEG 2000": ("JPEG2000", {}, 1),
    "GIF": ("GIF", {}, 0),
}


@pytest.mark.parametrize("name", FORMS)
def test_formats(name):
    form, options, tolerance = FORMS[name]
    assert_as_pillow(encoded(SMOOTH, form, **options), tolerance)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif():
    assert_as_pillow(encoded(SMOOTH, "AVIF"))


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_of_an_animation_the_first_frame_is_read(form):
    second = Image.fromarray(picture(4, 60, 80))
    content = encoded(SMOOTH, form, save_all=True, append_images=[second], duration=100)
    assert_as_pillow(content, tolerance=3)


COLOURS = [
    *(("JPEG", mode) for mode in ("L", "1", "CMYK", "YCbCr")),
    *(("PNG", mode) for mode in ("L", "1", "P")),
    *(("TIFF", mode) for mode in ("L", "1", "P", "CMYK")),
]


@pytest.mark.parametrize(("form", "mode"), COLOURS)
def test_colour_spaces(form, mode):
    image = SMOOTH.convert(mode)
    options = {"quality": 95} if form == "JPEG" else {}
    tolerance = {"CMYK": 1, "YCbCr": 2}.get(mode, 0)
    assert_as_pillow(encoded(image, form, **options), max(tolerance, 2 * (form == "JPEG")))


def test_cmyk_jpeg_is_within_a_grey_level_of_pillow():
    # A plane of each colour: no difference of the decoders' chroma is in the way.
    colours = np.zeros((16, 16, 3), np.uint8)
    for colour in ((0, 0, 0), (255, 255, 255), (200, 40, 90), (10, 130, 250)):
        colours[:] = colour
        content = encoded(Image.fromarray(colours).convert("CMYK"), "JPEG", quality=100)
        assert_as_pillow(content, tolerance=1)


def test_sixteen_bits_become_the_upper_eight():
    rgb = picture(5, 40, 50)
    deep = rgb.astype(np.uint16) * 257
    for extension in (".png", ".tif"):
        done, content = cv2.imencode(extension, deep[..., ::-1])
        assert done
        np.testing.assert_array_equal(decode_image(content.tobytes(), "x"), rgb)
    grey = Image.fromarray(deep[..., 0])
    found = decode_image(encoded(grey, "PNG"), "x")
    np.testing.assert_array_equal(found, np.repeat(rgb[..., :1], 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_left_out(mode):
    alpha = Image.fromarray(np.zeros((60, 80), np.uint8))
    image = SMOOTH.convert(mode)
    image.putalpha(alpha)
    content = encoded(image, "PNG")
    np.testing.assert_array_equal(decode_image(content, "x"), np.asarray(image.convert("RGB")))


# --- content, not name; what is no image ----------------------------------------------------------


def test_a_gif_called_jpg_is_a_gif():
    assert_as_pillow(given("really_gif.jpg"))


@pytest.mark.parametrize("kind", ["given", "colour", "JPEG", "WebP", "TIFF"])
def test_more_pixels_than_allowed_are_not_decoded(kind):
    if kind == "given":
        content, says = given("oversized_60000x60000.png"), "60000 x 60000 pixels, more than"
    elif kind == "colour":
        content, says = png(20000, 30000, 8, 2), "20000 x 30000 pixels, more than"
    else:
        form = {"JPEG": "JPEG", "WebP": "WEBP", "TIFF": "TIFF"}[kind]
        content, says = encoded(SMOOTH, form), "80 x 60 pixels, more than"
    limit = 4799 if kind in ("JPEG", "WebP", "TIFF") else 100_000_000
    with pytest.raises(ImageError, match=says) as caught:
        decode_image(content, "x", limit)
    assert "--max-pixels" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>404</html>",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a" + bytes(20),
        given("corrupt_header.webp"),
        encoded(SMOOTH, "WEBP")[:40],
        encoded(SMOOTH, "GIF")[:60],
        encoded(SMOOTH, "TIFF")[:60],
        encoded(SMOOTH, "PNG")[:100],
        encoded(SMOOTH, "JPEG")[:150],
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_what_is_no_whole_image_is_that_files_failure(content, lenient, monkeypatch):
    # gluoncv sets this.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    with pytest.raises(ImageError, match="the file is empty|its [0-9]+ bytes are no"):
        decode_image(content, "x")


def test_damaged_files_raise_nothing_else():
    rng = np.random.RandomState(0)
    for form in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        whole = encoded(SMOOTH.resize((20, 16)), form)
        for _ in range(40):
            content = bytearray(whole)
            content[rng.randint(len(content))] ^= 1 << rng.randint(8)
            try:
                decode_image(bytes(content), "x", 10_000_000)
            except ImageError:
                continue


# --- through the loaders --------------------------------------------------------------------------


def loaders(folder, rows, **options):
    source = image_source_of_rows(rows, str(folder))
    basic = {"crop_size": 224, "batch_size": 2, "num_workers": 0, **options}
    return get_image_train_loader(
        source,
        ImageOptions(**basic, augmentation="crop", rotation=10.0),
        mean=MEAN,
        std=STD,
    )


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("name", ["banner_640x4.png", "tall_4x700.png"])
def test_what_a_transform_cannot_do_with_one_file_is_that_files_failure(tmp_path, name, number):
    for index in range(5):
        Image.fromarray(picture(index, 60, 80)).save(tmp_path / f"{index}.jpg")
    if name.startswith("banner"):
        (tmp_path / name).write_bytes(given(name))
    else:
        Image.fromarray(picture(9, 700, 4)).save(tmp_path / name)
    rows = [(f"{index}.jpg", 0) for index in range(5)] + [(name, 1)]
    with loaders(tmp_path, rows, num_workers=number) as loader:
        labels = [label.asnumpy().tolist() for _, label in loader]
        (bad,) = loader.bad_files()
    assert labels == [[0, 0]] * 3
    assert bad.path == str(tmp_path / name)
    assert bad.reason.startswith("error: ")
    with (
        loaders(tmp_path, rows, strict_data=True) as loader,
        pytest.raises(UnreadableData, match=name),
    ):
        list(loader)


def test_a_thread_does_not_fill_the_memory(tmp_path):
    Image.fromarray(picture(0, 60, 80)).save(tmp_path / "0.png")
    Image.fromarray(np.zeros((1, 30000, 3), np.uint8)).save(tmp_path / "thread.png")
    source = image_source_of_rows([("0.png", 0), ("thread.png", 0)], str(tmp_path))
    options = ImageTestOptions(crop_size=64, batch_size=1, num_workers=0, max_pixels=1_000_000)
    for crops in ("centre", "full"):
        with get_image_val_loader(source, options, mean=MEAN, std=STD, crops=crops) as loader:
            assert [index.tolist() for *_, index in loader] == [[0]]
            (bad,) = loader.bad_files()
        assert "its 30000 x 1 pixels would be" in bad.reason
