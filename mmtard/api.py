"""The public functions of `import mmtard`: load, attack, evaluate, train. docs/api.md shows them."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config as settings, resources
from .errors import RunError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .attacks.attack import AttackResult
    from .attacks.state import Classifier
    from .models.zero_shot_model import Tokenizer, ZeroShotModel

Eps = str | float | Fraction  # "2/255", 0.0078, Fraction(2, 255)


def load(
    source: str | Path | nn.Module,
    arch: str | None = None,
    *,
    text: str | None = None,
    quick_gelu: bool | None = None,
    ema: bool = False,
    tokenizer: Tokenizer | None = None,
    device: str | torch.device | None = None,
) -> ZeroShotModel:
    """Load a CLIP model in float32, frozen and in eval mode, or wrap an open_clip model as it is.

    source: a run or checkpoint folder, an exported folder, a weights file, "hf-hub:...", an open_clip tag such as
    "openai", "random", or an open_clip model, whose weights are then shared. arch: the open_clip architecture (or
    .json), where the source does not say it. text, quick_gelu: source of the text tower and activation, where a
    weights file does not say them. ema: the moving average of a run's weights. tokenizer: texts -> token ids, for a
    wrapped model that brings its own. device: default the CPU, for a wrapped model its own. Raises UserError for what
    cannot be loaded, and says why.
    """
    from torch import nn

    from .evaluation.python_call import arguments_named
    from .models.loading import load_clip
    from .models.zero_shot_model import ZeroShotModel, wrap

    if isinstance(source, nn.Module):
        if text is not None or quick_gelu is not None or ema:
            raise UserError(
                "text, quick_gelu, ema: they belong to weights that are loaded, not to a model; leave them out"
            )
        model = wrap(source, arch, tokenizer)
    elif isinstance(source, str | Path):
        with arguments_named():
            clip = load_clip(_spec(source, arch, text, quick_gelu, ema), where="source")
        clip.model.eval().requires_grad_(False)
        model = ZeroShotModel(clip, tokenizer or clip.tokenizer())
    else:
        raise UserError(f"source: a {type(source).__name__}; give a path, an open_clip tag, or an open_clip model")
    return model if device is None else model.to(device)


def attack(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    eps: Eps = "2/255",
    norm: str | float = "linf",
    name: str | Sequence[str] = "apgd-ce",
    *,
    iters: int = 100,
    restarts: int = 1,
    queries: int = 5000,
    targets: int = 9,
    step_size: Eps | None = None,
    seed: int = 0,
    batch_size: int = 64,
    source: Classifier | None = None,
) -> AttackResult:
    """Attack plain tensors; each image's worst case, and whether it can be believed.

    model: any callable of images [B,C,H,W] float32 in [0,1] -> logits [B,classes] float32, in eval mode, that
    normalises inside. images: float32 [B,C,H,W] in [0,1]; labels: int64 [B]; both on the model's device. eps: the
    radius in units of [0,1] pixels. norm: L-inf or L2, in any usual spelling ("linf", "Linf", numpy.inf, "L2", 2).
    name: pgd, apgd-ce, apgd-dlr, apgd-t, fab-t, square, transfer, autoattack (pyautoattack's own), or several in
    their order, each on what still stands. iters, restarts: of every gradient attack. queries: of Square. targets:
    classes that a targeted attack aims at. step_size: of pgd, default 2.5 eps / iters. seed: of the random starts;
    the batch size changes nothing, except under `autoattack`, whose library draws for a whole batch. source: the model
    that `transfer` follows. Raises UserError for whatever does not fit.

    Sources: PGD Madry et al., ICLR 2018; APGD, FAB, AutoAttack Croce & Hein, ICML 2020; Square Andriushchenko et al.,
    ECCV 2020.
    """
    from .attacks.attack import attack_tensors
    from .attacks.state import AttackSettings
    from .attacks.threat_model import check_norm
    from .evaluation.python_call import pixels
    from .models.precision import full_float32
    from .models.zero_shot_model import ZeroShotModel

    if isinstance(model, ZeroShotModel):
        raise UserError("model: it classifies nothing yet; name the classes: model.classifier(['cat', 'dog'])")
    if not callable(model):
        raise UserError(f"model: a {type(model).__name__} cannot be called; give images -> logits")
    kind, radius = check_norm(norm), float(pixels(eps, "eps"))
    if kind == "linf" and radius >= 1:
        raise UserError(f"eps: {eps} lets an attack replace the whole image, for pixels are in [0,1]; write {eps}/255")
    names = [name] if isinstance(name, str) else list(name)
    if not names:
        raise UserError("name: no attack; write one such as 'apgd-ce'")
    means = AttackSettings(
        eps=radius,
        norm=kind,
        iters=iters,
        restarts=restarts,
        queries=queries,
        targets=targets,
        step_size=None if step_size is None else float(pixels(step_size, "step_size")),
    )
    with full_float32():
        return attack_tensors(model, images, labels, means, names, seed=seed, batch_size=batch_size, source=source)


def evaluate(
    model: str | Path | ZeroShotModel,
    data: str | Path,
    protocol: str = "fare",
    *,
    arch: str | None = None,
    datasets: Sequence[str] | None = None,
    index: str | Path | None = None,
    classnames: str | Path | None = None,
    transfer_from: str | Path | None = None,
    transfer_arch: str | None = None,
    eps: Eps | Sequence[Eps] | None = None,
    norm: str | float | None = None,
    n_samples: int | str | None = None,
    out: str | Path | None = None,
    batch_size: int | None = None,
    workers: int = 2,
    sanity: bool = False,
    compile: bool = False,
    device: str = "auto",
    say: Callable[..., Any] = print,
    **changes: Any,
) -> dict:
    """Measure a model on datasets by a named protocol; the content of results.json, which is also written.

    model: what `load` takes as a source (with `arch`), or a `ZeroShotModel`. data: a dataset (shards, or images in
    class folders), or a folder of them. datasets: some of these by name. index, classnames: files of a single dataset.
    protocol: fare, tecoa, robustbench, ... eps: radii in units of [0,1]. n_samples: how many are attacked, "all" for
    all. transfer_from, transfer_arch: a source whose gradients the attack `transfer` follows. changes: other settings
    of the protocol, by name: attacks, iters, restarts, queries, step_size, templates, perturb_at, seed,
    independent_radii. out: the folder of results.json; default: named by the settings, in the run's evaluations/ or in
    ./evaluations. batch_size: images a rank takes at once. workers: loader processes a rank. sanity: also the health
    checks that need attacks of their own. compile: the image tower and the attacks' arithmetic by torch.compile, once,
    for batches of any size; it pays in long evaluations. device: auto, cpu or cuda. say: takes each line of progress.

    Runs in the process group of this launch, or alone. The same call goes on where it was interrupted. Raises
    UserError for what does not fit.
    """
    from .distributed.guest import environment_as_it_was
    from .distributed.ranks import process_group
    from .evaluation.datasets import find_datasets
    from .evaluation.evaluate import evaluate as measure
    from .evaluation.python_call import arguments_named, changed_protocol
    from .evaluation.request import EvaluationRequest, default_out, given

    with arguments_named():
        asked = changed_protocol(protocol, eps, norm, n_samples, transfer_from is not None, changes)
        names = None if datasets is None else list(datasets)
        sources = find_datasets(str(data), names, _text(index), _text(classnames))
    surrogate = _spec(transfer_from, transfer_arch) if transfer_from else None
    with _as_weights(model, arch) as (spec, identity), environment_as_it_was(), process_group(device) as ranks:
        others = {"batch_size": batch_size, "transfer": _text(transfer_from), **({"compile": True} if compile else {})}
        others |= given(_text(index), _text(classnames), transfer_arch=transfer_arch)
        folder = default_out(identity, asked, sources, str(data), **others) if out is None else Path(out)
        request = EvaluationRequest(
            spec, sources, asked, folder, surrogate, batch_size, workers, sanity, compile=compile
        )
        with arguments_named():
            return measure(request, ranks, say)


def train(config: str | Path | dict | settings.Config, overrides: Sequence[str] = ()) -> int:
    """Train, or go on training, the run of a configuration, as `mmtard train` does.

    config: a YAML file, the name of one that comes with mmtard, a dict of settings, or a `mmtard.config.Config`.
    overrides: "key.sub=value" texts, for a file or a name. Returns 0 when the run is complete, 75 when a signal
    stopped it: the same call then goes on. Raises UserError for settings or data that do not fit, RunError for what
    ended the run. Collective over the ranks of this launch.
    """
    from .data.paths import shards_of
    from .distributed.guest import environment_as_it_was, signals_as_they_were
    from .distributed.interruption import Interruption
    from .distributed.launcher import choose_accelerator, world_size_from_env
    from .runs import history, trackers

    if isinstance(config, settings.Config | dict):
        if overrides:
            raise UserError("overrides: they belong to a file of settings; change the dict or the Config itself")
        run = config if isinstance(config, settings.Config) else settings.validate(config)
    else:
        run = settings.load(resources.find_config(config), list(overrides))
    settings.check_world(run, world_size_from_env())
    shards_of(run.data)
    trackers.check(run.log)
    refused = history.why_not_restart(Path(run.run_dir), run.resume)
    if refused:
        raise RunError(f"'{run.run_dir}': {refused}")
    with environment_as_it_was(), signals_as_they_were():
        choose_accelerator(run.engine.device)
        from .training.train import train as run_training

        interruption = Interruption()
        if threading.current_thread() is not threading.main_thread():  # only there may Python set handlers of signals
            return run_training(run, interruption)
        with interruption:
            return run_training(run, interruption)


def _spec(
    source: str | Path, arch: str | None, text: str | None = None, quick_gelu: bool | None = None, ema: bool = False
) -> settings.Model:
    return settings.Model(weights=str(source), arch=arch, text=text, quick_gelu=quick_gelu, ema=ema)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


@contextmanager
def _as_weights(model: Any, arch: str | None) -> Iterator[tuple[settings.Model, settings.Model]]:
    """A model as a source that every rank loads, and as what names the folder of its results."""
    from .models.weights import tensors_sha256
    from .models.zero_shot_model import ZeroShotModel, save

    if isinstance(model, str | Path):
        spec = _spec(model, arch)
        yield spec, spec
        return
    if not isinstance(model, ZeroShotModel):
        raise UserError(
            f"model: a {type(model).__name__}; give a source, or wrap an open_clip model with mmtard.load(model)"
        )
    with tempfile.TemporaryDirectory(prefix="mmtard-model-") as scratch:
        folder = Path(scratch) / "model"
        save(model, folder)
        sha256 = tensors_sha256(model.clip.model.state_dict())
        yield _spec(folder, None), _spec(f"model-{sha256[:16]}", None)
