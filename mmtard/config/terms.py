"""Settings of the terms that a run adds to its method's loss, whichever method that is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .method_settings import START, Bound
from .values import Number, Section


class Anchor(Section):
    """The student's embedding of the clean image, held near a teacher's of the same image."""

    teacher: str = Field("clean", description="whose embedding of the clean image; start: the untouched student's")
    weight: Number = Field(1.0, gt=0, description="of 1 - cos(z_S(x), z_T(x))")
    projection: bool | None = Field(
        None, description="learn a linear map from the student's embedding to the teacher's; null: where widths differ"
    )


class Feature(Section):
    """The student's features of the adversarial image, held near a robust teacher's."""

    teacher: str = Field("robust", description="whose features")
    weight: Number = Field(1.0, gt=0, description="of 1 - cos(z_S(x'), z_T(view))")
    teacher_view: Literal["clean", "adv"] = Field(
        "clean", description="the image the teacher sees; of the clean one its embeddings can be stored"
    )
    of: Literal["embedding", "tokens"] = Field(
        "embedding",
        description="the image embedding, or features of places, each with the teacher's of its place: a ViT's patch "
        "tokens, a convolutional tower's last map",
    )
    projection: bool | None = Field(
        None, description="learn a linear map from the student's features to the teacher's; null: where widths differ"
    )


class Terms(Section):
    """Terms added to the method's loss, whichever method that is."""

    anchor: Anchor | None = Field(None, description="null: none")
    feature: Feature | None = Field(None, description="null: none")
    bound: Bound | None = Field(None, description="null: none; the method `lore` has its own")
    projection_lr: Number = Field(
        1e-3, gt=0, description="largest learning rate of the linear maps; it follows train.schedule"
    )

    @property
    def teachers(self) -> dict[str, str]:
        """Term -> the teacher that it asks."""
        asked = {name: term.teacher for name in ("anchor", "feature") if (term := getattr(self, name)) is not None}
        return asked | ({"bound": START} if self.bound is not None else {})
