"""Encoded bytes to RGB pixels, and RGB pixels to the size a tower sees."""

import io
import math
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import UserError

# Others would let a member run external programs (EPS) or read other files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_PIXELS = 178_956_970  # Pillow's own bound, which other libraries switch off
# What Pillow's readers raise on damaged files.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class DecodeError(Exception):
    """These bytes are not an image that can be read; says why."""


def decode(data: bytes) -> Image.Image:
    """The pixels of an encoded image as a PIL image in RGB.

    Grey is repeated, alpha is dropped, 16-bit grey keeps its upper byte, CMYK is converted without a colour profile.
    The EXIF orientation is deliberately not applied: pixels are taken as stored, as torchvision and open_clip do, on
    which published numbers rest. Raises DecodeError for truncated, damaged, unknown or oversized images, and for
    pixels whose range is not known.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image)
        if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
            raise DecodeError("pixels of 32 bits, whose range is not known; write them as 8 or 16 bits")
        image.load()
        if image.mode.startswith("I"):
            image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")
    except UnidentifiedImageError:
        raise DecodeError("not an image of a known format") from None
    except MemoryError:
        raise DecodeError("too large for the memory of this process") from None
    except _DAMAGED as error:
        raise DecodeError(" ".join(str(error).split()) or type(error).__name__) from None


def _check_size(image: Image.Image) -> None:
    """Raises DecodeError for an image of too many pixels, before any of them takes memory.

    A pixel of 16 or 32 bits passes through wider numbers on its way to RGB, so that fewer of them are allowed.
    """
    wide = image.mode.startswith(("I", "F"))
    most = MAX_PIXELS // 4 if wide else MAX_PIXELS
    if image.width * image.height > most:
        bits = " of 16 bits or more" if wide else ""
        raise DecodeError(f"{image.width}x{image.height} pixels{bits}, more than {most}")


class Transform:
    """(PIL image RGB, sample seed) -> uint8 [3,H,W]. All randomness comes from the seed.

    size: H = W, or (H, W). Without `crop_scale`: the shorter side to `resize` (None: `size`), then the centre square,
    pixel for pixel as torchvision's Resize and CenterCrop; for another shape the smallest image that covers it, then
    its centre, as open_clip does. With `squash`: both sides to `size`, whatever the aspect. With `crop_scale` (least,
    most) area: torchvision's RandomResizedCrop, aspect ratio 3/4 to 4/3. `interpolation`: bicubic or bilinear,
    antialiased. `flip` mirrors half of the samples. Raises UserError for settings that do not fit.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        resize: int | None = None,
        crop_scale: tuple[float, float] | None = None,
        flip: bool = False,
        *,
        squash: bool = False,
        interpolation: str = "bicubic",
    ):
        self.shape: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])  # (H, W)
        shorter = min(self.shape)
        if resize is not None and resize < shorter:
            raise UserError(f"data.resize: {resize} is less than the crop of {shorter}; make it at least {shorter}")
        if crop_scale is not None and not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UserError(f"data.crop_scale: {list(crop_scale)} is not a range of areas; write it like [0.9, 1.0]")
        self.resize, self.crop_scale, self.flip = resize or shorter, crop_scale, flip
        self.squash, self.interpolation = squash, INTERPOLATIONS[interpolation]

    @classmethod
    def of_model(cls, size: int | tuple[int, int], preprocess: dict, where: str) -> "Transform":
        """As open_clip brings images to a model of this `preprocess_cfg`.

        Raises UserError naming `where` for a way that is not known.
        """
        mode, interpolation = preprocess.get("resize_mode") or "shortest", preprocess.get("interpolation") or "bicubic"
        if mode not in ("shortest", "squash"):
            raise UserError(
                f"{where}: its images are resized by resize_mode '{mode}'; shortest and squash are known, "
                "take a model of these"
            )
        if interpolation == "random":  # in training; open_clip measures with bicubic
            interpolation = "bicubic"
        if interpolation not in INTERPOLATIONS:
            known = " and ".join(INTERPOLATIONS)
            raise UserError(
                f"{where}: its images are resized by interpolation '{interpolation}'; {known} are known, "
                "take a model of these"
            )
        return cls(size, squash=mode == "squash", interpolation=interpolation)

    def __call__(self, image: Image.Image, seed: int) -> np.ndarray:
        u = _uniforms(seed) if self.crop_scale or self.flip else None
        if self.crop_scale:
            cropped = self._random_crop(image, u)
        elif self.squash:
            cropped = self._resized(image)
        else:
            cropped = self._centre_crop(image)
        pixels = np.asarray(cropped).transpose(2, 0, 1)
        if self.flip and u[-1] < 0.5:
            pixels = pixels[:, :, ::-1]
        return np.ascontiguousarray(pixels)

    def _resized(self, image: Image.Image) -> Image.Image:
        height, width = self.shape
        return image.resize((width, height), self.interpolation)

    def _centre_crop(self, image: Image.Image) -> Image.Image:
        height, width = self.shape
        at, interpolation = self._covering(image.width, image.height), self.interpolation
        if height != width:
            interpolation = INTERPOLATIONS["bicubic"]  # open_clip's own, whatever the model says
        if at != image.size:
            if at[0] * at[1] > MAX_PIXELS:
                raise DecodeError(
                    f"{at[0]}x{at[1]} pixels when its shorter side is {self.resize}, more than {MAX_PIXELS}"
                )
            image = image.resize(at, interpolation)
        left, top = round((at[0] - width) / 2), round((at[1] - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def _covering(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) to which an image is resized before its centre is cut out."""
        if self.shape[0] == self.shape[1]:
            if min(width, height) == self.resize:
                return width, height
            if width < height:
                return self.resize, int(self.resize * height / width)
            return int(self.resize * width / height), self.resize
        scale = self.resize / min(self.shape)
        ratio = min(height / (self.shape[0] * scale), width / (self.shape[1] * scale))
        return round(width / ratio), round(height / ratio)

    def _random_crop(self, image: Image.Image, u: np.ndarray) -> Image.Image:
        width, height = image.size
        least, most = self.crop_scale
        for a, b, c, d in u[:-1].reshape(-1, 4):
            area = width * height * (least + (most - least) * a)
            ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * b)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(c * (width - w + 1)), int(d * (height - h + 1))
                break
        else:  # an image too long and thin for any: the largest central part within the ratios
            w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
            left, top = (width - w) // 2, (height - h) // 2
        return self._resized(image.crop((left, top, left + w, top + h)))


class Native:
    """A stored image's own pixels: RGB PIL image -> uint8 [3,H,W].

    All images must be `shape` (H, W): UserError for any other.
    """

    def __init__(self, shape: tuple[int, int]):
        self.shape = shape

    def __call__(self, image: Image.Image, seed: int) -> np.ndarray:
        if (image.height, image.width) != self.shape:
            at, others = f"{image.width}x{image.height}", f"{self.shape[1]}x{self.shape[0]}"
            raise UserError(
                f"is {at} pixels, others are {others}: images of several sizes have no common native size; "
                "use --perturb-at input"
            )
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _uniforms(seed: int) -> np.ndarray:
    """41 numbers in [0,1): four for each of ten tries at a crop, one for the flip."""
    return (np.random.Philox(key=int(seed)).random_raw(41) >> np.uint64(11)) * 2.0**-53
