"""A study of two methods that trains in seconds: rendered shapes, a ViT of two blocks, four steps."""

import json
from pathlib import Path

import yaml
from published_checkpoints import publish

GRID = {"tune": {"train.lr": [1e-3, 4e-3]}, "vary": [[{"attack.steps": 1}, {"attack.steps": 2}]]}
DATA = {
    "maker": "shapes",
    "options": {"train": 72, "test": 36, "zeroshot": 24, "validation": 36, "validation_zeroshot": 24},
}


def measure(data, **changes):
    return {
        "data": f"{{study}}/data/{data}",
        "eps": "8/255",
        "attacks": ["pgd"],
        "iters": 2,
        "n_samples": "all",
        **changes,
    }


def tree(out, vit, **changes):
    """The study as YAML has it: `teacher` learns from a robust model, `tecoa` and its half `less` have none."""
    found = {
        "title": "A tiny study",
        "question": "Does anything happen?",
        "out": str(out),
        "data": DATA,
        "settings": {
            "student": {"arch": vit, "weights": "random"},
            "attack": {"eps": "8/255", "step_size": "4/255", "alarm_every": None},
            "data": {"shards": "{study}/data/images/train", "lanes": 8, "window": 16, "workers": 0},
            "train": {"steps": 4, "batch_size": 8},
            "engine": {"device": "cpu", "precision": "float32", "zero_stage": 0},
        },
        "models": {"robust": {"settings": {"method": {"name": "tecoa"}, "train": {"lr": 1e-3}}}},
        "methods": {
            "tecoa": {"label": "TeCoA", "baseline": True, "settings": {"method": {"name": "tecoa"}}},
            "teacher": {
                "settings": {"method": {"name": "rslad"}, "teachers": {"robust": {"weights": "{study}/models/robust"}}}
            },
        },
        "grid": GRID,
        "seeds": [0, 1],
        "validation": {"test": measure("validation/test")},
        "evaluations": {"test": measure("images/test"), "zeroshot": measure("images/zeroshot")},
        "curve": {"points": 2, "measure": measure("validation/zeroshot")},
        "front": {"resamples": 100},
        "at_once": 2,
    }
    return {**found, **changes}


def write(path, content):
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def results(out, clean, robust, ids=None):
    """A results.json with these outcomes, as `mmtard evaluate` writes it."""
    samples = {"ids": ids or list(range(len(clean))), "clean": clean, "eps": {"8/255": {"robust": robust}}}
    entry = {"name": "x", "kind": "zeroshot", "key": "k", "fingerprint": "f", "eps": {}, "samples": samples}
    entry |= {"health": [], "chance": 0.1}
    found = {"format": 2, "protocol": "quick", "model": {}, "settings": {}, "datasets": [entry], "averages": {}}
    out.mkdir(parents=True)
    (out / "results.json").write_text(json.dumps(found))


def finished(item, **state):
    """The folder of a run whose last checkpoint is there."""
    return publish(Path(item.config.run_dir), item.config.train.steps, **state)
