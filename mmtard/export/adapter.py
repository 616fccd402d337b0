"""The adapter of a run whose student was trained with `student.lora`, as a folder that peft loads."""

from __future__ import annotations

from pathlib import Path

from .. import config
from ..config import Model
from ..models import clip, lora
from ..runs import checkpoints
from ..runs.layout import CONFIG


class Adapter:
    """What a run or checkpoint holds of adapters.

    `found` is False when its student was trained whole, or when the source is no run.
    """

    def __init__(self, source: Model):
        folder = Path(source.weights)
        self.found = folder.is_dir() and not (folder / clip.CONFIG_FILE).is_file()
        if self.found:

            def read(run: Path, checkpoint: Path):
                return run, checkpoints.read_weights(checkpoint, source.ema)

            run, self.weights = checkpoints.read_resolved(folder, read)
            self.found = lora.is_adapter(self.weights)
        if self.found:
            self.student = config.load(run / CONFIG).student

    def save(self, folder: Path) -> None:
        """Write adapter_config.json, which names the model to put the adapter on, and adapter_model.safetensors."""
        base = "/".join(filter(None, (self.student.arch, self.student.weights)))
        lora.save(self.weights, self.student.lora, base, folder)
