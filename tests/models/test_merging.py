"""`mmtard merge`: the weights between two models, written as a folder that loads like any model."""

import copy
import json

import pytest
import torch

from mmtard.cli.main import main
from mmtard.config import Model
from mmtard.errors import UserError
from mmtard.models import loading
from mmtard.models.clip import Clip
from mmtard.models.merging import interpolate, merge_command, merged_from


@pytest.fixture(scope="module")
def pair(base, vit, tmp_path_factory):
    """Folders of two models that differ in the image tower alone, and the second's Clip."""
    folder = tmp_path_factory.mktemp("pair")
    other = loading.load_clip(Model(arch=vit, weights="random"), seed=4)
    state = base.model.state_dict() | {k: v for k, v in other.model.state_dict().items() if k.startswith("visual.")}
    other.model.load_state_dict(state)
    base.save(folder / "a")
    other.save(folder / "b")
    return folder / "a", folder / "b", other


def test_each_weight_is_between_those_of_the_two(pair, base, tmp_path, capsys):
    a, b, other = pair
    assert main(["merge", str(a), str(b), "--weight", "0.3", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    merged = loading.load_clip(Model(weights=str(tmp_path / "out"))).model.state_dict()
    for name, value in merged.items():
        expected = 0.7 * base.model.state_dict()[name].double() + 0.3 * other.model.state_dict()[name].double()
        assert torch.allclose(value.double(), expected, rtol=1e-6, atol=1e-7), name
    note = json.loads((tmp_path / "out" / "merged.json").read_text())
    assert note["weight"] == 0.3 and note["b"]["sha256"] == other.sha256(image=True)
    # Made again with another weight: it replaces what mmtard itself wrote.
    assert main(["merge", str(a), str(b), "--weight", "1", str(tmp_path / "out")]) == 0
    assert loading.load_clip(Model(weights=str(tmp_path / "out"))).sha256(image=True) == other.sha256(image=True)


def test_the_ends_are_the_models_bit_for_bit_and_both_stay_as_they_are(pair, base):
    other = pair[2]
    before = base.sha256(image=True), other.sha256(image=True)
    ends = [interpolate(base, other, weight).sha256(image=True) for weight in (0, 1)]
    assert tuple(ends) == before == (base.sha256(image=True), other.sha256(image=True))


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["A", "A", "--weight", "1.5", "OUT"], "--weight: 1.5 is not between 0 (A alone) and 1 (B alone)"),
        (["A", "A", "--weight", "1.0000001", "OUT"], "--weight: 1.0000001 is not between"),
        (["hf-hub:no/thing", "A", "--weight", "nan", "OUT"], "--weight: nan is not between"),  # before it is fetched
        (["", "A", "--weight", "0.5", "OUT"], "A: '' is no folder of a run or model"),
        (["A", "B", "--weight", "0.5", "A/open_clip_config.json/OUT"], "OUT': File exists; choose another OUT"),
        (["A", "openai", "--weight", "0.5", "OUT"], "B: 'openai' is no folder of a run or model"),
        (["A", "TEXT", "--weight", "0.5", "OUT"], "their text towers differ"),
        (["A", "NORM", "--weight", "0.5", "OUT"], "A and B: their preprocess_cfg differs in mean"),
        (["A", "B", "--weight", "0.5", "A"], "is A itself; choose another OUT"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(pair, vit, tmp_path, capsys, arguments, words):
    made = loading.load_clip(Model(arch=vit, weights="random"), seed=9)
    made.save(tmp_path / "TEXT")
    shifted = loading.load_clip(Model(weights=str(pair[0])))
    shifted.config["preprocess_cfg"] = {**shifted.config["preprocess_cfg"], "mean": [0.1, 0.2, 0.3]}
    shifted.save(tmp_path / "NORM")
    names = {"A": str(pair[0]), "B": str(pair[1])} | {n: str(tmp_path / n) for n in ("TEXT", "NORM", "OUT")}
    names["A/open_clip_config.json/OUT"] = f"{names['A']}/open_clip_config.json/OUT"
    assert main(["merge", *(names.get(word, word) for word in arguments)]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and not (tmp_path / "OUT").exists()


def test_two_models_whose_numbers_are_too_far_apart_are_refused(base):
    ends = []
    for value in (3e38, -3e38):
        model = copy.deepcopy(base.model)
        model.visual.state_dict()["ln_post.bias"].fill_(value)
        ends.append(Clip(model, base.name, base.config))
    with pytest.raises(UserError, match="the image tower between A and B is not finite: 'ln_post.bias' holds NaN"):
        interpolate(*ends, 0.5)


@pytest.mark.parametrize(
    "note",
    [
        "[" * 100_000,
        "[]",
        '{"a": {"folder": ""}, "b": {"folder": 3}}',
        '{"a": {"folder": "a\\u0000b"}, "b": {"folder": "\\ud800"}}',
        json.dumps({"a": {"folder": "x" * 5000}, "b": {"folder": "/no/such"}}),
    ],
)
def test_a_damaged_note_names_no_model(tmp_path, note):
    (tmp_path / "merged.json").write_text(note)
    assert merged_from(tmp_path) == [] and merge_command(tmp_path) is None
