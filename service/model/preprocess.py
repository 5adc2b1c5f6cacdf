"""Image preprocessing: decode PNG, JPEG, WebP or BMP bytes into a model's input, float32 (N, *shape) in [0, 1].

Images are decoded with Pillow (https://pillow.readthedocs.io). Oversized images are rejected before decoding. The rest
are rotated according to EXIF, composited on white if transparent, and fitted to the model's `ImageSpec`.

"mnist" fitting follows http://yann.lecun.com/exdb/mnist: the ink is scaled into a box 20/28 the size of the image,
keeping its aspect ratio, and the box is placed so that the centre of mass is at the image's centre, pixel index 14 of
28. The border's brightness distinguishes dark ink on light paper from light ink on dark paper, and the image is
inverted if needed to match the model's polarity. Models with polarity "as-is" get the original brightness.
"""

import io
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from service.errors import InvalidRequestError
from service.model.backends import Array
from service.model.manifest import ImageInput, ImageSpec

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 32_000_000  # per request; decoding takes up to 500 MB for WebP, 250 MB for other formats
MAX_SIDE = 16_384

_LARGE_PIXELS = 4_000_000  # per request; above this, requests are decoded one at a time
_STRIP_PIXELS = 1_000_000  # a decoded image is converted and reduced in strips of this size
_WORK_SIDE = 512  # pixels; images at least twice as large are reduced before ink detection
_SMOOTH_SIDE = 64  # pixels; larger images are blurred before measuring contrast, to suppress noise
_BOX = 20 / 28
_LEAST_CONTRAST = 0.08  # between ink and paper, as a fraction of full brightness; below this there is no ink
_LEAST_SHADE, _SHADE_SHARE = 0.03, 0.12  # of full brightness and of the contrast: a border that is off its plane
_PAPER_SIDE, _PAPER_WINDOW = 96, 31  # pixels: paper is estimated on a picture this small, and strokes are narrower
_EDGE = 0.2  # fainter pixels, relative to full ink, do not count towards the ink's bounding box
_FULL = 90  # percentile of the ink's pixels that is scaled to full ink, matching MNIST

Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit only warns; `_check_sizes` refuses
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # keep malformed images out of the log
_large_turn = threading.Lock()  # decode one large request at a time: a few small files could exhaust memory

Plane = NDArray[np.float64]  # (height, width) in [0, 1]: brightness or amount of ink


def read_image(content: bytes, spec: ImageInput) -> Array:
    """Decode one image into an input, float32 (1, *shape) in [0, 1]. See `read_images`."""
    return read_images([content], spec, ["the picture"])


def read_images(
    contents: Sequence[bytes], spec: ImageInput, names: Sequence[str], check: Callable[[], object] = bool
) -> Array:
    """Decode N images into inputs, float32 (N, *shape) in [0, 1].

    Args:
        contents: The encoded bytes of each image.
        spec: The model's input.
        names: How to refer to each image in error messages.
        check: Called before each image is decoded; raises once nobody waits for it.

    Raises:
        InvalidRequestError: An image is empty, corrupt, too large, or in an unsupported format. Sizes are checked
            before anything is decoded.
    """
    pictures = [_open(content, name) for content, name in zip(contents, names, strict=True)]
    total = _check_sizes(pictures, names)
    inputs = np.empty((len(pictures), *spec.shape), np.float32)
    with _large_turn if total > _LARGE_PIXELS else nullcontext():
        for index, (picture, name) in enumerate(zip(pictures, names, strict=True)):
            check()
            inputs[index] = _arrange(fit_picture(_load(picture, name), spec.image), spec)
    return inputs


def _open(content: bytes, name: str) -> Image.Image:
    """Read an image's header without decoding it."""
    if not content:
        raise InvalidRequestError(f"{name} is empty; send the bytes of a PNG, JPEG, WebP or BMP file")
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:  # Pillow raises many types for invalid bytes
        raise InvalidRequestError(f"{name} is not a PNG, JPEG, WebP or BMP picture that can be read") from error


def _check_sizes(pictures: Sequence[Image.Image], names: Sequence[str]) -> int:
    """Check the images against the size limits and return their total number of pixels."""
    for picture, name in zip(pictures, names, strict=True):
        width, height = picture.size
        if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
            limit = f"{MAX_SIDE} a side and {MAX_PIXELS // 1_000_000} million in all"
            raise InvalidRequestError(f"{name} has {width} × {height} pixels, over the limit of {limit}")
    total = sum(picture.width * picture.height for picture in pictures)
    if total > MAX_PIXELS:
        limit = f"{MAX_PIXELS // 1_000_000} million a request"
        raise InvalidRequestError(f"the pictures have {total} pixels together, over the limit of {limit}")
    return total


def _load(picture: Image.Image, name: str) -> Image.Image:
    """Decode the first frame as L, RGB, RGBA or F (0 to 255), upright, with its longer side below 1,024 pixels."""
    try:
        picture.draft(None, (_WORK_SIDE, _WORK_SIDE))  # decodes large JPEGs at down to 1/8 scale
        picture.load()
        factor = max(picture.size) // _WORK_SIDE
        plain = _shrink(picture, factor) if factor > 1 else _simplify(picture)
    except Exception as error:  # see `_open`
        raise InvalidRequestError(f"{name} is a {picture.format} file that is cut short or broken") from error
    plain.info = picture.info  # holds the EXIF orientation
    try:
        return ImageOps.exif_transpose(plain)
    except Exception:  # ignore unreadable EXIF orientation
        return plain


def _shrink(picture: Image.Image, factor: int) -> Image.Image:
    """Apply `_simplify` and downscale by `factor`, in strips to avoid a second full-size copy."""
    width, height = picture.size
    step = factor * max(1, _STRIP_PIXELS // (width * factor))
    strips = (picture.crop((0, top, width, min(top + step, height))) for top in range(0, height, step))
    parts = [_simplify(strip).reduce((min(factor, width), min(factor, height))) for strip in strips]
    whole = Image.new(parts[0].mode, (parts[0].width, sum(part.height for part in parts)))
    for number, part in enumerate(parts):
        whole.paste(part, (0, number * step // factor))
    return whole


def _simplify(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):  # 16 bits per pixel
        deep = np.asarray(picture, dtype=np.float32)
        return Image.fromarray(deep * np.float32(255 / 65535))
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def fit_picture(picture: Image.Image, image: ImageSpec) -> NDArray[np.float64]:
    """Fit a decoded image to the model's size: float64 (height, width, channels) in [0, 1].

    Colour images with "stretch" fitting are never inverted: they have no ink.
    """
    if image.channels > 1 and image.fitting == "stretch":
        return _resize_colours(_lay_on(picture, 255), image)
    grey = _grey(_lay_on(picture, 255))
    if not image.has_ink:
        return _resize(grey, image.width, image.height)[:, :, None]
    ink, dark_ink = find_ink(grey)
    if not ink.any() and picture.mode == "RGBA":  # white ink on a transparent background
        grey = _grey(_lay_on(picture, 0))
        ink, dark_ink = find_ink(grey)
    if image.fitting == "mnist" or not ink.any():
        field = centre_ink(ink, image.width, image.height)
    else:
        field = _resize(1 - grey if dark_ink else grey, image.width, image.height)
    if image.polarity == "dark-on-light":
        field = 1 - field
    return np.repeat(field[:, :, None], image.channels, axis=2)


def _lay_on(picture: Image.Image, brightness: int) -> Image.Image:
    """Composite a transparent image on a background of the given brightness, 0 to 255."""
    if picture.mode != "RGBA":
        return picture
    paper = Image.new("RGBA", picture.size, (brightness, brightness, brightness, 255))
    return Image.alpha_composite(paper, picture).convert("RGB")


def _grey(picture: Image.Image) -> Plane:
    plain = picture if picture.mode in ("L", "F") else picture.convert("L")
    return np.clip(np.asarray(plain, dtype=np.float64) / 255, 0, 1)


def find_ink(grey: Plane) -> tuple[Plane, bool]:
    """Separate ink from paper.

    The paper's brightness is modelled as a plane fitted to the border pixels, so uneven lighting is not taken for ink;
    where the border does not lie on a plane, as with a shadow, it is estimated around each pixel. Differences smaller
    than the noise along the border are not ink either.

    Args:
        grey: Brightness, (height, width); 0 is black.

    Returns:
        The amount of ink, (height, width), all zeros if there is none; and whether the ink is darker than the paper.
    """
    smooth = _smooth(grey)
    paper = _fit_paper(smooth)
    above = smooth - paper
    dark_ink = bool(-above.min() >= above.max())
    if np.percentile(np.abs(_border(above)), 90) > max(_LEAST_SHADE, _SHADE_SHARE * float(np.abs(above).max())):
        paper, dark_ink = _estimate_paper(smooth)
        above = smooth - paper
    depth = -above if dark_ink else above
    contrast = float(depth.max())
    if contrast < _LEAST_CONTRAST:
        return np.zeros_like(grey), dark_ink
    grain = min(0.25, 6 * float(np.median(np.abs(_border(depth)))) / contrast)
    ink = (paper - grey if dark_ink else grey - paper) / contrast
    return np.clip((ink - grain) / (1 - grain), 0, 1), dark_ink


def _smooth(grey: Plane) -> Plane:
    if max(grey.shape) <= _SMOOTH_SIDE:
        return grey
    blurred = Image.fromarray(np.round(grey * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
    return np.asarray(blurred, dtype=np.float64) / 255


def _fit_paper(grey: Plane) -> Plane:
    """Fit a plane (height, width) to the border pixels by least squares, excluding outliers."""
    height, width = grey.shape
    middle = float(np.median(_border(grey)))
    if min(height, width) < 3:  # noqa: PLR2004 - too few pixels to define a plane
        return np.full(grey.shape, middle)
    across, down = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    columns = np.stack([_border(np.ones_like(grey)), _border(across), _border(down)], axis=1)
    heights = _border(grey)
    kept = np.abs(heights - middle) <= 2 * np.percentile(np.abs(heights - middle), 60)
    for _ in range(2):
        level, right, low = np.linalg.lstsq(columns[kept], heights[kept], rcond=None)[0]
        off = np.abs(heights - columns @ (level, right, low))
        kept = off <= 3 * np.median(off)
    return np.asarray(level + right * across + low * down)


def _estimate_paper(grey: Plane) -> tuple[Plane, bool]:
    """Estimate the paper's brightness around each pixel (height, width), and whether the ink is darker than it.

    A closing fills what is dark and narrower than its window, and leaves slopes as they are; an opening does the same
    to what is bright. Beyond the edges, slopes go on as they are.
    """
    height, width = grey.shape
    share = min(1.0, _PAPER_SIDE / max(height, width))
    small = _resize(grey, max(3, round(width * share)), max(3, round(height * share)))
    around = small - _slide(np.pad(small, _PAPER_WINDOW // 2, "reflect", reflect_type="odd"), _PAPER_WINDOW, np.mean)
    dark_ink = bool(-around.min() >= around.max())
    paper = np.pad(small, _PAPER_WINDOW + 1, "reflect", reflect_type="odd")
    for widest in (np.max, np.min) if dark_ink else (np.min, np.max):
        paper = _slide(paper, _PAPER_WINDOW, widest)
    return _resize(_slide(paper, 5, np.mean), width, height), dark_ink


def _slide(plane: Plane, size: int, reduce: Callable[..., Plane]) -> Plane:
    """Reduce each square of `size` pixels a side to one pixel."""
    for axis in (0, 1):
        plane = reduce(np.lib.stride_tricks.sliding_window_view(plane, size, axis=axis), axis=-1)
    return plane


def _border(plane: Plane) -> Plane:
    """Return the pixels of the four edges, (2 * (height + width),)."""
    return np.concatenate([plane[0], plane[-1], plane[:, 0], plane[:, -1]])


def centre_ink(ink: Plane, width: int, height: int) -> Plane:
    """Scale ink into the inner box and centre it by mass, like MNIST; returns (height, width) in [0, 1].

    Args:
        ink: The amount of ink, of any size.
        width: Width of the result; 28 for MNIST.
        height: Height of the result.
    """
    field = np.zeros((height, width))
    rows, columns = np.nonzero(ink.max(axis=1) >= _EDGE)[0], np.nonzero(ink.max(axis=0) >= _EDGE)[0]
    if not len(rows):
        return field
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = min(round(height * _BOX) / cut.shape[0], round(width * _BOX) / cut.shape[1])
    tall, wide = (max(1, round(side * scale)) for side in cut.shape)
    box = _resize(cut, wide, tall)
    clear = box[box > _EDGE / 4]  # empty if a hairline has been scaled down
    box = np.clip(box / (float(np.percentile(clear, _FULL)) if clear.size else float(box.max())), 0, 1)
    mass = box.sum()
    top = round(height / 2 - float((box.sum(axis=1) * np.arange(tall)).sum() / mass))
    left = round(width / 2 - float((box.sum(axis=0) * np.arange(wide)).sum() / mass))
    top, left = min(max(top, 0), height - tall), min(max(left, 0), width - wide)
    field[top : top + tall, left : left + wide] = box
    return field


def _resize(plane: Plane, width: int, height: int) -> Plane:
    """Resize: area averaging to shrink, bilinear interpolation to enlarge."""
    resized = Image.fromarray(plane.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(resized, dtype=np.float64), 0, 1)


def _resize_colours(picture: Image.Image, image: ImageSpec) -> NDArray[np.float64]:
    size = (image.width, image.height)
    planes = [plane.convert("F").resize(size, Image.Resampling.BILINEAR) for plane in picture.split()]
    field = np.stack([np.asarray(plane, dtype=np.float64) for plane in planes], axis=2)
    return np.broadcast_to(np.clip(field / 255, 0, 1), (image.height, image.width, 3))


def _arrange(field: NDArray[np.float64], spec: ImageInput) -> NDArray[np.float64]:
    """Reshape (height, width, channels) to the input's shape, moving channels first if it requires that."""
    image = spec.image
    if spec.shape == (image.channels, image.height, image.width):
        field = np.moveaxis(field, 2, 0)
    return field.reshape(spec.shape)
