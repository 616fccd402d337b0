"""Datasets of a few noisy coloured images, in CLIP_benchmark's layout."""

import io
import json
import shutil
import tarfile

import numpy as np
from PIL import Image

from mmtard.models import clip

COLOURS = {"red": 0, "green": 1, "blue": 2, "grey": None}


def write(
    folder, n, size=(32, 32), classes=COLOURS, captions=None, label=lambda i, n_classes: i % n_classes, truncated=()
):
    """Write `folder`/test/0.tar of noisy coloured images, in CLIP_benchmark's layout; `truncated` ones are cut off."""
    (folder / "test").mkdir(parents=True)
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for i in range(n):
            k = label(i, len(classes))
            pixels = rng.integers(60, 200, (*size, 3), dtype=np.uint8)
            channel = list(classes.values())[k] if isinstance(classes, dict) else k % 3
            if channel is not None:
                pixels[..., channel] = np.minimum(pixels[..., channel] + 50, 255)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "PNG")
            members = {"png": image.getvalue()[: -200 if i in truncated else None], "cls": str(k).encode()}
            for extension, content in (members | ({"txt": captions(i).encode()} if captions else {})).items():
                member = tarfile.TarInfo(f"s{i:04d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    (folder / "test" / "nshards.txt").write_text("1\n")
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in classes))
    return folder


def strip_seconds(entry):
    """A part of results without the times, by which equal ones differ."""
    return json.loads(json.dumps(entry), object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds"})


def flags(found, eps="4/255"):
    (entry,) = found["datasets"]
    return entry["samples"]["clean"], entry["samples"]["eps"][eps]["robust"]


def edited(folder, to, **preprocess):
    """A copy of an exported folder, over an earlier one, with other settings of its preprocessing."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    cfg = json.loads((to / clip.CONFIG_FILE).read_text())
    cfg["preprocess_cfg"] |= preprocess
    (to / clip.CONFIG_FILE).write_text(json.dumps(cfg))
    return to
