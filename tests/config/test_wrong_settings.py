"""Each wrong setting is answered in one line that says what to write instead."""

import pytest

from mmtard import config
from mmtard.errors import UserError

WRONG = [  # override(s), words of the one line that answers them
    ("run_dir=2026-11-31", "override 'run_dir=2026-11-31': the value is not valid YAML; quote it"),
    ("attack.eps=8", "attack.eps: 8 is in units of [0,1], the whole range of a pixel; write 8/255"),
    ("attack.step_size=4", "attack.step_size: 4 is in units of [0,1]|write 4/255"),
    ("probe={data: x, every: 500, eps: 2}", "probe.eps: 2 is in units of [0,1]|write 2/255"),
    ("train.betas=[0.9, 1.0]", "train.betas.1: 1.0|less than 1"),
    ("seed=18446744073709551616", "seed: 18446744073709551616|less than"),
    ("data.crop_scale=[0, 1]", "data.crop_scale.0: 0|greater than 0"),
    ("data.crop_scale=[0.9, 0.3]", "data.crop_scale: from 0.9 to 0.3 is no range; write the smaller area first"),
    (
        "teachers.student={weights: a} & method.views={student: clean, robust: adv}",
        "teachers.student: this is what the model in training is called",
    ),
    (
        "method.name=clean & teachers=null & attack.objective=ce",
        "attack.objective: method 'clean' trains on clean images and attacks none; leave it out",
    ),
    ("train.lrr=1", "unknown key 'train.lrr'; did you mean 'train.lr'?"),
    ("terms.anchor=2", "terms.anchor: '2' is no section; give it keys: terms.anchor.KEY=VALUE, with KEY of teacher"),
    ("method=mmtard", "method: 'mmtard' stands where keys do; write method.name=VALUE"),
    ("teachers=clean", "teachers: 'clean' stands where keys do; write teachers.NAME=VALUE"),
    ("method.wieghting=official", "unknown key 'method.wieghting'; did you mean 'method.weighting'?"),
    ("data.cache.maxgb=3", "did you mean 'data.cache.max_gb'?"),
    ("teachers.clean.plcement=x", "did you mean 'teachers.clean.placement'?"),
    ("zzz=1", "unknown key 'zzz'; known keys: run_dir, seed"),
    ("train.steps=ten", "train.steps: 'ten'|integer"),
    ("train.steps=true", "train.steps: 'True' is not a number"),
    ("train.steps=null", "train.steps: None|integer"),
    ("train.lr=0", "train.lr: 0|greater than 0"),
    ("train.lr=.inf", "train.lr: inf|finite"),
    ("method.slope=.nan", "method.slope: nan|finite"),
    ("train.betas=[0.9]", "train.betas.1: this setting is required"),
    ("student=openai", "student: 'openai' is no section; give it keys|arch, weights"),
    ("data.shards=5", "data.shards: 5|string|list"),
    ("engine.zero_stage=4", "engine.zero_stage: 4|0, 1, 2 or 3"),
    ("attack.eps=2/0", "attack.eps: '2/0' is not a fraction; write it as 2/255 or 0.0078"),
    ("attack.eps=8px", "attack.eps: '8px' is not a fraction"),
    ("attack.eps=-1/255", "attack.eps: -1/255|greater than or equal to 0"),
    (
        "method.name=mmtrd",
        "unknown method 'mmtrd'; known: clean, tecoa, fare, pmg_aft, tga_zsr, sim_clip, agft, lore, trades, ard, "
        "rslad, iad, adaad, mtard, mmtard",
    ),
    (
        "method={}",
        "method.name: unknown method 'None'; known: clean, tecoa, fare, pmg_aft, tga_zsr, sim_clip, agft, lore, "
        "trades, ard, rslad, iad, adaad, mtard, mmtard",
    ),
    (
        "attack.objective=kl_clen",
        "attack.objective: unknown objective 'kl_clen'; known: ce, ce_targeted, kl_clean, kl_robust, kl_fused, "
        "kl_start, kl_self, kl_adaptive, l2_embedding",
    ),
    (
        "teachers.third.weights=a",
        "teachers.third: no part of method 'mmtard' uses this teacher; remove it (used: clean, robust)",
    ),
    ("method.name=tecoa", "teachers.clean: no part of method 'tecoa' uses this teacher; remove it (used: none)"),
    ("teachers={clean: {weights: a}}", "teachers.robust: method 'mmtard'|needs this teacher; add it"),
    ("teachers={}", "teachers.clean: method 'mmtard'|needs this teacher; add it"),
    ("method={name: clean} & teachers={clean: {weights: a}}", "teachers.clean: no part of method 'clean'"),
    (
        "method={name: tecoa} & teachers={} & attack.objective=kl_robust",
        "teachers.robust: method 'tecoa' with attack objective 'kl_robust' needs",
    ),
    ("teachers.clean.weights=null", "teachers.clean.weights: None|string"),
    (
        "teachers={clean: {}, robust: {weights: a}}",
        "teachers.clean.weights: this setting is required; only the teacher `start` is the untouched student",
    ),
    (
        "teachers.start={weights: a}",
        "teachers.start: no part of method 'mmtard' uses this teacher; remove it (used: clean, robust)",
    ),
    (
        "method.views={clean: clean}",
        "teachers.robust: no part of method 'mmtard' uses this teacher; remove it (used: clean)",
    ),
    (
        "method.views={clean: clean, robust: adv, third: adv}",
        "teachers.third: method 'mmtard'|needs this teacher; add it",
    ),
    ("method.views={clean: noisy}", "method.views.clean: 'noisy'|'clean', 'adv' or 'clean_for_adv'"),
    (
        "method.temperatures={robst: 2}",
        "method.temperatures.robst: method.views names no such teacher (it has robust, clean); remove it",
    ),
    ("method.temperatures={robust: 0}", "method.temperatures.robust: 0|greater than 0"),
    (
        "method.views={clean: clean, robust: clean} & method.trust=label",
        "method.trust: 'label' is of teachers of the adversarial image, and method.views has none; leave it out",
    ),
    (
        "method.views={clean: clean_for_adv, robust: adv} & method.trust=clean",
        "method.trust: 'clean' needs a teacher of the clean image, and method.views has none; add one",
    ),
    ("method.views={}", "method.views: {}|at least 1"),
    (
        "method.weighting=entrpy",
        "method.weighting: 'entrpy'|'uniform', 'official', 'constant', 'confidence_sigmoid', 'hardness', 'entropy' or "
        "'mtard'",
    ),
    (
        "attack={objective: kl_fused, fusion: {clean: 1, third: 2}}",
        "teachers.third: method 'mmtard' with attack objective 'kl_fused' needs this teacher",
    ),
    ("attack={objective: kl_fused, fusion: {clean: 0}}", "attack.fusion.clean: 0|greater than 0"),
    (
        "attack.fusion={clean: 1}",
        "attack.fusion: attack objective 'kl_clean' fuses no teachers; set attack.objective=kl_fused or remove it",
    ),
    (
        "method={name: tecoa} & teachers={} & attack.objective=kl_fused",
        "attack.objective: 'kl_fused' needs teachers to fuse; list them in attack.fusion",
    ),
    (
        "attack={restarts: 2, random_start: false}",
        "attack.restarts: 2 restarts without a random start are all the same; set attack.random_start=true",
    ),
    ("train.batch_size=6", "data.lanes: 4 lanes do not divide train.batch_size 6; make it a divisor"),
    ("resume.watchdog_minutes=30", "resume.watchdog_minutes: 30|less than 30"),
    ("resume.max_timeout=3", "did you mean 'resume.max_timeouts'?"),
    ("resume.max_losses=-1", "resume.max_losses: -1|greater than or equal to 0"),
    ("train.warmup_steps=11", "train.warmup_steps: 11 is more than train.steps 10; lower it"),
    ("train.lr", "override 'train.lr' is not of the form key.sub=value"),
    ("=3", "override '=3' is not of the form"),
    ("train.lr=[", "override 'train.lr=[': the value is not valid YAML; quote it"),
    ("run_dir.x=1", "override 'run_dir.x=1': 'run_dir' holds a value, not settings"),
]


@pytest.mark.parametrize("overrides, words", WRONG, ids=[o for o, _ in WRONG])
def test_a_wrong_setting_is_answered_in_one_line_with_the_remedy(tree, write, overrides, words):
    with pytest.raises(UserError) as error:
        config.load(write(tree), overrides.split(" & "))
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words.split("|")), message
