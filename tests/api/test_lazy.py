"""What is not used is not needed: no torch for the import, and no package of training for measuring."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}: raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Block())
"""


def python(script, cwd, *blocked):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", BLOCK.format(blocked=blocked) + script]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_import_needs_no_torch(tmp_path):
    script = "import mmtard\nassert set(mmtard.__all__) <= set(dir(mmtard)) and 'numpy' not in sys.modules"
    python(script, tmp_path, "torch", "open_clip", "deepspeed")


@pytest.mark.slow
def test_loading_attacking_and_measuring_need_no_package_of_training(tmp_path, vit):
    script = f"""
import numpy, torch, mmtard
from PIL import Image
from pathlib import Path
model = mmtard.load("random", arch={vit!r})
classify = model.classifier(["cat", "dog"])
images = torch.rand(4, 3, 16, 16)
print(mmtard.attack(classify, images, classify(images).argmax(1), eps="8/255", iters=2))
for k, name in enumerate(["cat", "dog"] * 2):
    path = Path("pets") / name / f"{{k}}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numpy.full((16, 16, 3), 50 * k, dtype=numpy.uint8)).save(path)
results = mmtard.evaluate(model, "pets", "quick", iters=2, out="out", workers=0)
print("measured", results["datasets"][0]["n_total"])
"""
    out = python(script, tmp_path, "deepspeed", "webdataset", "submitit", "matplotlib", "tensorboard", "pyautoattack")
    assert "4 images: clean 100.0%" in out and "measured 4" in out
