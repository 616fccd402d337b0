"""Run folders and results.json written by hand, as training and `mmtard evaluate` leave them."""

import json

import yaml

from mmtard.evaluation.statistics import wilson_interval
from mmtard.runs import history


def accuracy(flags):
    return {
        "accuracy": sum(flags) / len(flags),
        "interval95": list(wilson_interval(sum(flags), len(flags))),
        "n": len(flags),
    }


def dataset(
    name, clean, robust, data="shards", fingerprint="f" * 64, classes=("red square", "green <ring>"), **changes
):
    """A dataset's part of a results.json.

    clean: flags of the attacked samples; robust: {eps: flags}. Who is not attacked is right.
    """
    labels = [i % len(classes) for i in range(len(clean))]
    wrong = [(label + 1) % len(classes) for label in labels]
    by_eps = {
        eps: {
            "attacks": {
                "apgd-ce": {
                    **accuracy([c and (r or i % 2 > 0) for i, (c, r) in enumerate(zip(clean, flags))]),
                    "seconds": 1.0,
                },
                "apgd-t": {**accuracy(flags), "seconds": 2.0},
            },
            "robust": accuracy(flags),
            "worst_class": {"name": classes[0], "accuracy": 0.25, "n": len(clean) // 2},
            "skipped": {},
        }
        for eps, flags in robust.items()
    }
    outcomes = {
        eps: {
            "broken_by": ["apgd-t" if c and not r else None for c, r in zip(clean, flags)],
            "prediction": [label if r else w for label, w, r in zip(labels, wrong, flags)],
            "robust": flags,
        }
        for eps, flags in robust.items()
    }
    samples = {
        "ids": list(range(len(clean))), "keys": [f"k{i}" for i in range(len(clean))], "labels": labels, "clean": clean,
        "clean_prediction": [label if c else w for label, w, c in zip(labels, wrong, clean)], "eps": outcomes,
    }  # fmt: skip
    health = [
        {"check": "range", "status": "PASS", "detail": "pixels in [0,1]"},
        {"check": "zero gradients", "status": "WARN", "detail": "3 of 10 samples"},
    ]
    return {
        "name": name, "data": data, "key": "k", "fingerprint": fingerprint, "kind": "zeroshot",
        "classes": list(classes), "chance": 1 / len(classes), "n_total": len(clean), "replaced": 0,
        "templates": ["a photo of a {}"], "perturb_at": "input", "perturbed_size": [16, 16],
        "clean_all": accuracy(clean), "clean": accuracy(clean), "eps": by_eps, "samples": samples, "health": health,
        **changes,
    }  # fmt: skip


def results(datasets, weights="runs/a", sha256="s", protocol="fare", **settings):
    return {
        "format": 2,
        "protocol": protocol,
        "command": f"mmtard evaluate {weights} --protocol {protocol}",
        "environment": {"python": "3.11", "git": None},
        "model": {
            "weights": weights,
            "arch": "tests-vit",
            "sha256": sha256,
            "text_sha256": "t",
            "quick_gelu": False,
            "image_size": 16,
            "logit_scale": 100.0,
        },
        "settings": {
            "norm": "linf",
            "eps": ["2/255", "4/255"],
            "attacks": ["apgd-ce", "apgd-t"],
            "iters": 100,
            "restarts": 1,
            "seed": 0,
            "batch_size": 64,
            **settings,
        },
        "datasets": datasets,
        "averages": {},
        "seconds": 1.0,
    }


def save(content, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))
    return folder / "results.json"


CONFIG = {
    "student": {"arch": "ViT-B-32", "weights": "openai"},
    "method": {"name": "tecoa"},
    "data": {"shards": "shards/train", "lanes": 4},
    "train": {"steps": 10, "batch_size": 8, "weight_decay": 0.05},
}
ROWS = [
    {
        "step": n, "loss": 3.0 / n, "kl_robust": 2.0 / n,
        "w_clean": 5.0, "w_clean_p10": 4.0, "w_clean_p50": 5.0, "w_clean_p90": 6.0, "w_robust": 40.0 + n,
        "lr": 1e-3, "grad_norm": None if n == 4 else 1.0, "batch": 17, "skipped": 0, "replaced": 0,
        "seconds": 2.0, "images_per_s": 4.0, "memory_gib": 0.5,
    }
    for n in range(1, 11)
]  # fmt: skip
PROBES = [{"step": n, "clean": 0.9 - n / 50, "robust": n / 20, "interval": [0, 1], "n": 40} for n in range(2, 11, 2)]


def write_run(folder, rows=ROWS, probes=PROBES):
    """A run's folder of 10 steps that is complete, with a probe at every second step; its last metrics are cut."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "run_dir": str(folder)}))
    (folder / "environment.json").write_text(
        json.dumps({"command": f"mmtard train {folder.name}.yaml", "versions": {"torch": "2"}, "git": None})
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "lo')
    if probes:
        (folder / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in probes))
    history.record_start(folder, {"step": 0, "world_size": 2})
    history.record_end(folder, history.COMPLETE, "complete, 10 steps done", 10)
    return folder
