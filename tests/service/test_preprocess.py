"""Tests of service.model.preprocess."""

import io
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from service.errors import InvalidRequestError
from service.model import preprocess
from service.model.manifest import ImageInput, Manifest
from service.model.preprocess import centre_ink, find_ink, read_image, read_images
from service.model.version_folder import load_manifest

Pixels = NDArray[np.uint8]


def build_spec(shape: tuple[int, ...] = (28, 28), **more: Any) -> ImageInput:
    """Return the input of an image model, MNIST's unless told otherwise."""
    image = {"width": 28, "height": 28, "fitting": "mnist"} | more
    return ImageInput.model_validate({"kind": "image", "shape": shape, "image": image})


def encode(picture: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    """Return a picture's file."""
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def draw_seven(size: tuple[int, int] = (200, 240), mode: str = "L", paper: Any = 255, ink: Any = 0) -> Image.Image:
    """Return a 7, drawn by straight strokes."""
    picture = Image.new(mode, size, paper)
    wide, tall = size
    points = [(0.3 * wide, 0.2 * tall), (0.7 * wide, 0.2 * tall), (0.45 * wide, 0.8 * tall)]
    ImageDraw.Draw(picture).line(points, fill=ink, width=max(2, wide // 12), joint="curve")
    return picture


def near(one: NDArray[Any], other: NDArray[Any], most: float = 0.12) -> bool:
    """Tell whether two fields differ by little on average of their ink."""
    return float(np.abs(one - other).sum() / max(other.sum(), 1)) < most


@pytest.fixture(scope="module")
def seven() -> NDArray[Any]:
    """A dark 7 on white paper, prepared."""
    field: NDArray[Any] = read_image(encode(draw_seven()), build_spec())[0]
    return field


def test_result_is_as_the_model_takes_it(seven: NDArray[Any]) -> None:
    """float32 (1, *shape) in [0, 1], ink bright on dark, in a box of 20 pixels whose centre of mass is at 14."""
    assert seven.dtype == np.float32
    assert (seven.min(), seven.max()) == (0, 1)
    rows, columns = np.nonzero(seven.max(axis=1))[0], np.nonzero(seven.max(axis=0))[0]
    assert 18 <= rows[-1] - rows[0] + 1 <= 20
    assert columns[-1] - columns[0] + 1 <= 20
    index = np.arange(28)
    assert abs((seven.sum(axis=1) * index).sum() / seven.sum() - 14) <= 0.6
    assert abs((seven.sum(axis=0) * index).sum() / seven.sum() - 14) <= 0.6


@pytest.mark.parametrize(
    ("kind", "more"),
    [("PNG", {}), ("JPEG", {"quality": 85}), ("WEBP", {"quality": 85}), ("WEBP", {"lossless": True}), ("BMP", {})],
)
def test_formats_agree(kind: str, more: dict[str, Any], seven: NDArray[Any]) -> None:
    """The same picture in every format gives the same digit."""
    assert near(read_image(encode(draw_seven(), kind, **more), build_spec())[0], seven)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16"])
def test_modes_agree(mode: str, seven: NDArray[Any]) -> None:
    """Every mode that a file may have gives the same digit."""
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(draw_seven()).astype(np.uint16) * 257)
    else:
        picture = draw_seven().convert("RGB").convert(mode) if mode != "LA" else draw_seven().convert("LA")
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert near(read_image(encode(picture, kind), build_spec())[0], seven)


def test_light_ink_on_dark_paper_is_the_same_digit(seven: NDArray[Any]) -> None:
    """A scan with white ink on black, or on grey, reads as a photo of dark ink."""
    for paper, ink in ((0, 255), (60, 200), (240, 120)):
        assert near(read_image(encode(draw_seven(paper=paper, ink=ink)), build_spec())[0], seven)


def test_transparent_paper_is_white_unless_only_white_ink_is_on_it(seven: NDArray[Any]) -> None:
    """Dark ink on nothing reads as on white paper; white ink on nothing would vanish there, and reads as on black."""
    for ink in ((0, 0, 0, 255), (255, 255, 255, 255)):
        picture = draw_seven(mode="RGBA", paper=(0, 0, 0, 0), ink=ink)
        assert near(read_image(encode(picture), build_spec())[0], seven)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_orientation_of_a_camera_is_undone(kind: str, seven: NDArray[Any]) -> None:
    """A picture stored on its side with an EXIF note is read upright; a broken note is no note."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = draw_seven().transpose(Image.Transpose.ROTATE_90)
    assert near(read_image(encode(turned, kind, exif=exif.tobytes()), build_spec())[0], seven)
    broken = encode(draw_seven(), kind, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert near(read_image(broken, build_spec())[0], seven)


def test_place_and_size_do_not_matter(seven: NDArray[Any]) -> None:
    """A small digit in the corner of a large sheet is the digit."""
    sheet = Image.new("L", (1500, 2000), 255)
    sheet.paste(draw_seven(), (1200, 100))
    assert near(read_image(encode(sheet), build_spec())[0], seven, 0.25)


def test_light_from_one_side_and_grain_are_no_ink(seven: NDArray[Any]) -> None:
    """A photo's shading and noise leave the digit as it is, and an empty sheet empty."""
    random = np.random.default_rng(0)
    light = np.linspace(0.55, 0.9, 240)[:, None] + np.linspace(-0.05, 0.05, 200) + random.normal(0, 0.02, (240, 200))
    for picture, digit in ((draw_seven(), seven), (Image.new("L", (200, 240), 255), np.zeros((28, 28)))):
        photo = light * (0.25 + 0.75 * np.asarray(picture) / 255)
        file = encode(Image.fromarray((np.clip(photo, 0, 1) * 255).astype(np.uint8)), "JPEG", quality=85)
        assert near(read_image(file, build_spec())[0], digit, 0.3)


@pytest.mark.parametrize("paper", [0, 128, 255])
def test_no_ink_is_all_paper(paper: int) -> None:
    """A picture of one brightness gives zeros; a model whose paper is 1 gets ones."""
    blank = encode(Image.new("L", (90, 60), paper))
    for fitting in ("mnist", "stretch"):
        assert not read_image(blank, build_spec(fitting=fitting)).any()
        assert (read_image(blank, build_spec(fitting=fitting, polarity="dark-on-light")) == 1).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2), (3, 900)])
def test_any_size_is_read(size: tuple[int, int]) -> None:
    """Pictures of one pixel, or one line of pixels, give numbers in [0, 1]."""
    random = np.random.default_rng(1)
    picture = Image.fromarray(random.integers(0, 256, size[::-1], dtype=np.uint8))
    for fitting in ("mnist", "stretch"):
        field = read_image(encode(picture), build_spec(fitting=fitting))
        assert field.shape == (1, 28, 28)
        assert 0 <= field.min() <= field.max() <= 1


def test_prepared_digits_stay_as_they_are(published: Any) -> None:
    """MNIST's own pictures, already prepared, come out as they went in, to a few grey values."""
    manifest = load_manifest(sorted((published / "mnist").iterdir())[-1])
    assert isinstance(manifest, Manifest)
    assert manifest.golden_rows is not None
    for row in manifest.golden_rows.inputs:
        pixels = row.reshape(28, 28)
        for shown in (pixels, 1 - pixels):
            file = encode(Image.fromarray(np.round(255 * shown).astype(np.uint8)))
            assert np.abs(read_image(file, build_spec())[0] - pixels).max() < 0.1


def test_stretch_keeps_what_is_there() -> None:
    """The whole picture is resized, with its grey values, and turned to the model's polarity."""
    picture = draw_seven((28, 28), ink=100)
    expected = 1 - np.asarray(picture) / 255
    assert np.allclose(read_image(encode(picture), build_spec(fitting="stretch"))[0], expected, atol=1e-6)
    turned = read_image(encode(picture), build_spec(fitting="stretch", polarity="dark-on-light"))[0]
    assert np.allclose(turned, 1 - expected, atol=1e-6)


@pytest.mark.parametrize("brightness", [0, 30, 128, 255])
def test_as_is_keeps_every_grey(brightness: int) -> None:
    """A model of photos gets the picture's own brightness: no border turns it, and no even picture is paper."""
    spec = build_spec(fitting="stretch", polarity="as-is")
    picture = draw_seven((28, 28), paper=brightness, ink=90)
    for shown in (picture, Image.new("L", (28, 28), brightness)):
        assert np.allclose(read_image(encode(shown), spec)[0], np.asarray(shown) / 255, atol=1e-6)
    assert read_image(encode(draw_seven(mode="RGBA", paper=(0, 0, 0, 0), ink=(255,) * 4)), spec).min() == 1


@pytest.mark.parametrize("shape", [(2352,), (3, 28, 28), (28, 28, 3)])
def test_colours_go_where_the_shape_has_them(shape: tuple[int, ...]) -> None:
    """Channels come first when the shape has them first; colours are never turned."""
    picture = Image.new("RGB", (50, 40), (255, 128, 0))
    field = read_image(encode(picture), build_spec(shape, channels=3, fitting="stretch"))[0]
    assert field.shape == shape
    planes = field if shape[0] == 3 else np.moveaxis(field.reshape(28, 28, 3), 2, 0)
    assert np.allclose(planes.reshape(3, -1), np.array([[1], [128 / 255], [0]]), atol=1e-6)


def test_several_pictures_keep_their_order() -> None:
    """N pictures give (N, *shape), each as it would be alone."""
    files = [encode(draw_seven()), encode(Image.new("L", (9, 9), 255)), encode(draw_seven(ink=90), "BMP")]
    fields = read_images(files, build_spec((1, 28, 28)), ["a", "b", "c"])
    assert fields.shape == (3, 1, 28, 28)
    for field, file in zip(fields, files, strict=True):
        assert (field == read_image(file, build_spec((1, 28, 28)))[0]).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_cut_short_is_refused(kind: str) -> None:
    """No prefix of a file is ever read as a picture, nor is anything but the one error raised."""
    file = encode(draw_seven(), kind)
    for end in (1, 8, 30, len(file) // 2, len(file) - 40):
        with pytest.raises(InvalidRequestError, match="the picture"):
            read_image(file[:end], build_spec())


def test_damage_is_refused_or_read_and_nothing_else() -> None:
    """Files with random bytes in them give numbers in [0, 1], or the one error."""
    random = np.random.default_rng(2)
    for kind in ("PNG", "JPEG", "WEBP", "BMP"):
        file = np.frombuffer(encode(draw_seven((60, 60)), kind), np.uint8)
        for _ in range(60):
            hostile = file.copy()
            hostile[random.integers(0, len(file), 4)] = random.integers(0, 256, 4)
            try:
                field = read_image(hostile.tobytes(), build_spec())
            except InvalidRequestError:
                continue
            assert 0 <= field.min() <= field.max() <= 1


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"GIF89a" + bytes(100), b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_other_than_pictures_is_refused(content: bytes) -> None:
    """Nothing, text, and formats that are not read get a sentence that says what is read."""
    with pytest.raises(InvalidRequestError, match="PNG, JPEG, WebP or BMP"):
        read_image(content, build_spec())


def test_bombs_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file that says it has very many pixels, and many files that have as many together, are not decoded."""
    monkeypatch.setattr(preprocess, "_load", lambda *_: pytest.fail("it was decoded"))
    for size in ((20_000, 10), (8_000, 8_000)):
        bomb = encode(Image.new("1", size))
        assert len(bomb) < 20_000
        with pytest.raises(InvalidRequestError, match="over the limit"):
            read_image(bomb, build_spec())
    half = encode(Image.new("1", (5_000, 4_000)))
    with pytest.raises(InvalidRequestError, match="together"):
        read_images([half, half], build_spec(), ["a", "b"])


@pytest.mark.parametrize("size", [(1500, 2000), (2049, 777)])
@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGB", "I;16"])
def test_large_pictures_are_read_in_strips(mode: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A large picture of any mode, on its side, gives the same numbers in many strips as in one."""
    turned = draw_seven((size[1], size[0])).transpose(Image.Transpose.ROTATE_90)
    deep = Image.fromarray(np.asarray(turned).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encode(deep if mode == "I;16" else turned.convert("RGB").convert(mode), exif=exif.tobytes())
    fields = []
    for pixels in (1, 10**9):
        monkeypatch.setattr(preprocess, "_STRIP_PIXELS", pixels)
        fields.append(read_image(file, build_spec())[0])
    assert (fields[0] == fields[1]).all()
    upright = read_image(encode(draw_seven((size[1], size[0]))), build_spec())[0]
    assert near(fields[0], upright)


@pytest.mark.parametrize("side", [200, 500, 1000])
def test_hairlines_are_ink(side: int) -> None:
    """Strokes of one pixel, and two dots, are ink up to full strength, however far they are scaled down."""
    hairline, dots = Image.new("L", (side, side), 255), Image.new("L", (side, side), 255)
    ImageDraw.Draw(hairline).line([(5, 5), (side - 5, side - 5)], fill=0)
    dots.putpixel((3, 3), 0)
    dots.putpixel((side - 5, side - 5), 0)
    for picture in (hairline, dots):
        field = read_image(encode(picture), build_spec())[0]
        assert (field.min(), field.max()) == (0, 1)


def test_large_requests_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large pictures one is decoded at a time; a small one does not wait for it."""
    decoding, most = 0, 0
    load = preprocess._load

    def slow_load(picture: Image.Image, name: str) -> Image.Image:
        nonlocal decoding, most
        if picture.width < 1000:
            assert decoding
            return load(picture, name)
        decoding += 1
        most = max(most, decoding)
        time.sleep(0.1)
        decoding -= 1
        return load(picture, name)

    monkeypatch.setattr(preprocess, "_load", slow_load)
    large, small = encode(Image.new("1", (3000, 2000))), encode(draw_seven())
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(read_image, large, build_spec()) for _ in range(3)]
        time.sleep(0.05)
        read_image(small, build_spec())
        assert all(each.result().shape == (1, 28, 28) for each in asked)
    assert most == 1


def test_ink_is_told_from_paper_by_the_border() -> None:
    """Where more than half the picture is ink, the border still says what is paper."""
    grey = np.ones((40, 40))
    grey[5:35, 5:35] = 0
    ink, dark_ink = find_ink(grey)
    assert dark_ink
    assert (ink[5:35, 5:35] == 1).all()
    assert find_ink(1 - grey)[1] is False


def test_ink_keeps_its_aspect_ratio() -> None:
    """A tall stroke fills the box's height and not its width; it lies within the field."""
    ink = np.zeros((100, 100))
    ink[10:90, 48:53] = 1
    field = centre_ink(ink, 28, 28)
    assert np.count_nonzero(field.max(axis=1)) == 20
    assert np.count_nonzero(field.max(axis=0)) <= 2
    assert centre_ink(ink, 56, 28).shape == (28, 56)


@pytest.mark.parametrize("shade", ["vignette", "shadow", "corner"])
@pytest.mark.parametrize("is_dark", [True, False])
def test_shaded_paper_is_not_ink(shade: str, is_dark: bool) -> None:
    """A small 4 on paper whose brightness is no plane is fitted as on even paper, dark on light or light on dark."""
    down, across = np.mgrid[0:240, 0:240] / 240
    paper = {
        "vignette": 0.9 - 1.1 * ((across - 0.5) ** 2 + (down - 0.5) ** 2),
        "shadow": 0.9 - 0.45 / (1 + np.exp(-25 * (across + 0.4 * down - 0.75))),
        "corner": 0.9 - 0.6 * np.exp(-((across - 1) ** 2 + (down - 1) ** 2) / 0.18),
    }[shade]
    drawn = Image.new("L", (240, 240), 0)
    for stroke in ([(105, 70), (85, 105), (120, 105)], [(107, 70), (107, 128)]):
        ImageDraw.Draw(drawn).line(stroke, fill=255, width=5)
    ink = np.asarray(drawn) / 255
    fields = []
    for ground in (np.full_like(paper, 0.9), paper):
        grey = ground * (1 - 0.7 * ink)
        grey = grey if is_dark else 1 - grey
        found, dark = find_ink(grey)
        assert dark == is_dark
        fields.append(centre_ink(found, 28, 28))
    assert np.abs(fields[0] - fields[1]).mean() < 0.03
