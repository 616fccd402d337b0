"""Settings of the training data: which shards, what becomes of an image, and the order in which samples come."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from .values import Int, Number, PathText, Ratio, Section

USUAL_LANES, MOST_LANES = 64, 512
UNSTORABLE = (
    "data.crop_scale and data.flip make new images each epoch, whose embeddings cannot be stored; "
    "set the number of fixed views, e.g. data.views=8"
)


class Cache(Section):
    """Node-local staging of remote shards."""

    # Not a PathText: the node where the shards are staged fills the variables in, not the one that submits the job.
    dir: str | None = Field(
        None, min_length=1, description="folder on each node, may begin with $TMPDIR; null: $TMPDIR/mmtard-shards-UID"
    )
    max_gb: Number = Field(100.0, gt=0, description="GB that the staged shards of a node may take")
    ahead: Int = Field(4, ge=0, description="shards fetched before they are needed, for each rank")


Area = Annotated[Number, Field(gt=0, le=1)]


class Data(Section):
    """The training data."""

    shards: PathText | list[PathText] = Field(
        ..., description="a folder, a brace pattern, a tar, pipe:..., or a list of these"
    )
    index: PathText | None = Field(None, description="index file; null: beside the shards")
    targets: Literal["labels", "captions", "none"] = Field(
        "labels",
        description="a sample's true class: its label, its caption (.txt) among those of the global batch, "
        "or none, for a method of embeddings alone",
    )
    classnames: PathText | None = Field(
        None, description="file, one name a line; null: classnames.txt beside the shards"
    )
    templates: PathText | list[str] = Field(
        ["This is a photo of a {}"], description="prompts with {} or {c}, or a file of them"
    )
    resize: Int | None = Field(None, ge=1, description="shorter side before the crop; null: the crop's size")
    crop_scale: tuple[Area, Area] | None = Field(
        None, description="smallest and largest area of a random resized crop; null: centre crop"
    )
    flip: bool = Field(False, description="mirror an image with probability 1/2")
    views: Int | None = Field(
        None,
        ge=1,
        description="fixed augmentations a sample, of which epoch e takes number e mod views; "
        "null: a new one each epoch",
    )
    embeddings: PathText | None = Field(
        None, description="folder of stored teacher embeddings; null: embeddings/ beside the index"
    )
    lanes: Int | None = Field(
        None,
        ge=1,
        description="parallel reading positions, a multiple of every world size to be used and a divisor of "
        f"train.batch_size; the order depends on it. null: {USUAL_LANES} where that divides the batch, else the "
        f"batch's largest divisor up to {MOST_LANES} that keeps its factors of two",
    )
    window: Int = Field(1024, ge=1, description="samples shuffled together in a lane")
    workers: Int = Field(2, ge=0, le=1024, description="loader processes a rank")
    max_replaced: Ratio = Field(
        Fraction(1, 100), ge=0, le=1, description="share of unreadable samples above which the run stops"
    )
    allow_pipe: bool = Field(
        False, description="whether shards may be read through pipe: commands, which run on this machine"
    )
    label_key: str | None = Field(
        None, min_length=1, description="read labels from this key of the .json members; null: from .cls members"
    )
    caption_key: str | None = Field(
        None, min_length=1, description="read captions from this key of the .json members; null: from .txt members"
    )
    cache: Cache = Cache()

    @property
    def augmented(self) -> bool:
        """Whether a sample's image depends on a seed."""
        return self.crop_scale is not None or self.flip


def default_lanes(batch_size: int) -> int:
    """The lanes of a run that sets none: of the batch size alone, so that the order is the same on any world.

    Every power of two of GPUs that shares the batch evenly also shares these lanes.
    """
    if batch_size % USUAL_LANES == 0:
        return USUAL_LANES
    power_of_two = batch_size & -batch_size
    odd = batch_size // power_of_two
    divisors = (d for d in range(min(odd, MOST_LANES // power_of_two), 0, -1) if odd % d == 0)
    return power_of_two * next(divisors)
