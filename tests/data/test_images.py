import numpy as np
import open_clip
import pytest
from PIL import Image
from tiny_shards import encode, picture
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from mmtard.data.images import DecodeError, Transform, decode
from mmtard.errors import UserError


def pixels(image):
    return np.asarray(image).astype(int)


def test_grey_is_repeated():
    grey = picture(1).convert("L")
    assert (pixels(decode(encode(grey, "PNG"))) == pixels(grey)[..., None]).all()


def test_sixteen_bit_grey_keeps_the_upper_byte():
    values = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    assert pixels(decode(encode(image, "PNG")))[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused_and_not_black(dtype):
    """Floats in [0, 1] and 32-bit integers in 0..255 both came out as black."""
    grey = Image.fromarray(np.linspace(0, 1 if dtype == np.float32 else 255, 64).astype(dtype).reshape(8, 8))
    with pytest.raises(DecodeError, match="pixels of 32 bits, whose range is not known; write them as 8 or 16 bits"):
        decode(encode(grey, "TIFF"))


@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_sixteen_bit_images_are_bounded_before_they_take_memory(kind, monkeypatch):
    """A damaged one of 1.4 kB with 31 x 4,194,324 pixels took 3.2 GB: each pixel passes through wider numbers."""
    monkeypatch.setattr("mmtard.data.images.MAX_PIXELS", 4 * 1199)
    data = encode(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), kind)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("its pixels were read"))
    with pytest.raises(DecodeError, match="40x30 pixels of 16 bits or more, more than 1199"):
        decode(data)


@pytest.mark.filterwarnings("ignore")
def test_a_mutated_image_is_an_image_or_a_decode_error():
    """A bounded fuzz of every format and of the ways to a square; any other error is a finding."""
    rng, rgb = np.random.default_rng(0), picture(4, (37, 23))
    palette, grey16 = rgb.quantize(16), Image.fromarray(np.arange(620, dtype=np.uint16).reshape(20, 31) * 100)
    whole = [encode(rgb, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")]
    whole += [encode(rgb, "JPEG", progressive=True), encode(rgb.convert("CMYK"), "JPEG"), encode(palette, "GIF")]
    whole += [encode(palette, "PNG", transparency=3), encode(grey16, "PNG"), encode(grey16, "TIFF")]
    whole += [encode(rgb, "TIFF", compression=how) for how in ("tiff_lzw", "tiff_deflate", "jpeg")]
    whole += [encode(rgb.convert("1"), "TIFF", compression="group4"), encode(rgb.convert("LA"), "PNG")]
    squares = [Transform(16), Transform(16, crop_scale=(0.5, 1)), Transform(16, squash=True)]
    read = 0
    for number in range(60 * len(whole)):
        data = bytearray(whole[number % len(whole)])
        for _ in range(int(rng.integers(1, 5))):
            at = int(rng.integers(len(data) if rng.random() < 0.5 else min(200, len(data))))
            data[at : at + int(rng.integers(0, 5))] = rng.bytes(int(rng.integers(1, 5)))
        try:
            pixels = squares[number % 3](decode(bytes(data)), number)
            read += 1
        except DecodeError:
            continue
        assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8
    assert 0 < read < 60 * len(whole)


def test_cmyk_jpeg_shows_its_colours():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(pixels(decode(encode(red, quality=100))) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("transparency", [None, 1, b"\x80\x00\xff"])
def test_palette_colours_survive_whatever_the_transparency(transparency, recwarn):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    data = encode(image, "PNG", **({} if transparency is None else {"transparency": transparency}))
    assert pixels(decode(data)).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    assert not recwarn.list


def test_alpha_is_dropped():
    assert pixels(decode(encode(Image.new("RGBA", (2, 2), (9, 8, 7, 0)), "PNG")))[0, 0].tolist() == [9, 8, 7]


def test_webp():
    assert (pixels(decode(encode(picture(3), "WEBP", lossless=True))) == pixels(picture(3))).all()


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    rotated, plain = (decode(encode(picture(2), exif=e)) for e in (exif, Image.Exif()))
    assert rotated.size == (40, 30) and (pixels(rotated) == pixels(plain)).all()


@pytest.mark.parametrize("data, words", [
    (encode(picture(1))[:-200], "truncated"),
    (encode(picture(1, (200, 200)), "PNG")[:-500], "truncated|broken"),
    (b"no image", "not an image of a known format"),
    (b"", "not an image of a known format"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image of a known format"),
])  # fmt: skip
def test_damaged_images_are_decode_errors(data, words):
    with pytest.raises(DecodeError, match=words):
        decode(data)


@pytest.mark.filterwarnings("ignore")
def test_every_cut_of_an_image_is_an_image_or_a_decode_error():
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = encode(picture(4, (16, 16)), kind)
        for end in range(0, len(whole), 7):
            try:
                assert decode(whole[:end]).mode == "RGB"
            except DecodeError:
                pass
        assert decode(whole).size == (16, 16)


def test_oversized_image(monkeypatch):
    monkeypatch.setattr("mmtard.data.images.MAX_PIXELS", 1199)
    with pytest.raises(DecodeError, match="40x30 pixels"):
        decode(encode(picture(1)))


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (24, 31), (333, 217), (217, 334), (24, 24), (500, 24)])
@pytest.mark.parametrize("resize, crop", [(None, 24), (27, 24), (32, 25)])
def test_centre_crop_is_torchvisions(size, resize, crop):
    image = picture(5, size)
    theirs = CenterCrop(crop)(Resize(resize or crop, InterpolationMode.BICUBIC)(image))
    ours = Transform(crop, resize)(image, 0)
    assert ours.dtype == np.uint8 and ours.shape == (3, crop, crop)
    assert (ours == np.asarray(theirs).transpose(2, 0, 1)).all()


def test_random_crop_depends_on_the_seed_alone():
    transform = Transform(16, crop_scale=(0.2, 1.0), flip=True)
    image = picture(6, (60, 50))
    a = [transform(image, s) for s in range(30)]
    np.random.seed(1)
    b = [Transform(16, crop_scale=(0.2, 1.0), flip=True)(image, s) for s in reversed(range(30))][::-1]
    assert all((x == y).all() for x, y in zip(a, b))
    assert len({x.tobytes() for x in a}) == 30


def test_random_crop_has_the_area_and_ratio_asked_for():
    x, y = np.meshgrid(np.arange(200), np.arange(200))  # a pixel tells where it came from
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    areas, ratios = [], []
    for seed in range(400):
        crop = Transform(32, crop_scale=(0.3, 0.6))(image, seed).astype(int)
        w, h = (crop[0].max() - crop[0].min() + 1), (crop[1].max() - crop[1].min() + 1)
        areas.append(w * h / 200**2)
        ratios.append(w / h)
    assert 0.25 < min(areas) < 0.33 and 0.55 < max(areas) < 0.63 and abs(np.mean(areas) - 0.45) < 0.03
    assert 0.7 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.42


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (24, 24), (500, 24)])
@pytest.mark.parametrize("mode", ["shortest", "squash", None])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random", None])
def test_a_models_own_way_is_open_clips(size, mode, interpolation):
    image, cfg = picture(5, size), {"resize_mode": mode, "interpolation": interpolation, "mean": [0.5] * 3}
    theirs = open_clip.image_transform(
        24, is_train=False, mean=(0,) * 3, std=(1,) * 3, resize_mode=mode, interpolation=interpolation
    )(image)
    assert (Transform.of_model(24, cfg, "m")(image, 0) == (theirs * 255).round().byte().numpy()).all()


@pytest.mark.parametrize("cfg, message", [
    ({"resize_mode": "longest"}, "'m': .* resize_mode 'longest'; shortest and squash are known"),
    ({"interpolation": "nearest"}, "'m': .* interpolation 'nearest'; bicubic and bilinear are known"),
])  # fmt: skip
def test_a_way_of_resizing_that_is_not_known_is_refused(cfg, message):
    with pytest.raises(UserError, match=message):
        Transform.of_model(24, cfg, "'m'")


def test_whole_crop_is_a_resize_and_flip_mirrors_half():
    image = picture(7, (24, 24))
    plain = np.asarray(image).transpose(2, 0, 1)
    flipped = [bool((Transform(24, flip=True)(image, s) == plain[:, :, ::-1]).all()) for s in range(400)]
    assert 160 < sum(flipped) < 240
    assert all((Transform(24, flip=True)(image, s) == plain).all() for s in range(400) if not flipped[s])


def test_an_image_that_would_be_enlarged_beyond_all_bounds_is_a_decode_error():
    with pytest.raises(DecodeError, match="4480000x224 pixels when its shorter side is 224, more than 178956970"):
        Transform(224)(Image.new("RGB", (20000, 1)), 0)


def test_a_very_long_image_can_be_cropped():
    assert Transform(8, crop_scale=(0.9, 1.0))(picture(8, (400, 5)), 1).shape == (3, 8, 8)


@pytest.mark.parametrize("arguments", [{"resize": 200}, {"crop_scale": (0.5, 0.2)}, {"crop_scale": (0, 1)}])
def test_settings_that_do_not_fit_are_refused(arguments):
    with pytest.raises(UserError, match="data.(resize|crop_scale)"):
        Transform(224, **arguments)
