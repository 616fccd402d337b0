"""The whole configuration of a run, and whether its parts fit each other. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from .attack import ATTACK_OBJECTIVES, Attack
from .data import UNSTORABLE, Data, default_lanes
from .method_settings import START, Bound
from .methods import Method
from .models import Model, Student, Teacher
from .terms import Terms
from .training import Checkpoint, Engine, Log, Probe, Resume, Train
from .values import Int, PathText, Section, check_unit


class Config(Section):
    """A run: what `mmtard train` reads."""

    run_dir: PathText = Field(..., description="the run's own folder, which is made; the same folder goes on")
    seed: Int = Field(0, ge=0, lt=2**63, description="of the order, augmentations, attacks and random weights")
    student: Student
    teachers: dict[str, Teacher] = Field({}, description="name -> a frozen model that the method asks")
    method: Method
    terms: Terms = Terms()
    attack: Attack = Attack()
    data: Data
    train: Train
    engine: Engine = Engine()
    checkpoint: Checkpoint = Checkpoint()
    probe: Probe | None = Field(None, description="measures checkpoints while the run goes on; null: none")
    resume: Resume = Resume()
    log: Log = Log()

    @property
    def attack_objective(self) -> str | None:
        """The loss the training attack maximises; None for a method that trains on clean images."""
        return None if self.method.attack is None else self.attack.objective or self.method.attack

    @property
    def fusion(self) -> dict[str, float]:
        """Weights, of sum 1, of the teachers whose fused prediction the attack is measured against.

        Empty for another objective.
        """
        if self.attack_objective != "kl_fused":
            return {}
        weights = self.attack.fusion or {name: 1.0 for name in self.teachers if name != START}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    @property
    def ensemble(self) -> dict[str, Teacher]:
        """The teachers of the run: those listed, and `start` from the run's own folder where a part of it needs it."""
        listed = dict(self.teachers)
        if START in self._needed:
            listed.setdefault(START, Teacher())
        stored = {"weights": str(Path(self.run_dir) / START)}
        return {
            name: teacher.model_copy(update=stored) if self._is_untouched_student(name) else teacher
            for name, teacher in listed.items()
        }

    def model_of(self, teacher: str) -> Model:
        """The model that a teacher is before any run: its own setting, or the student's for the untouched student."""
        return self.student if self._is_untouched_student(teacher) else self.teachers[teacher]

    def _is_untouched_student(self, teacher: str) -> bool:
        """Whether a teacher is the student before training: `start`, unless it is listed with weights of its own."""
        return teacher == START and (teacher not in self.teachers or self.teachers[teacher].weights == START)

    @property
    def needs_labels(self) -> bool:
        """Whether a sample without a label in its shard is of no use to this run."""
        if self.data.targets != "labels":
            return False
        attacked = self.attack_objective is not None and ATTACK_OBJECTIVES[self.attack_objective].labels
        return self.method.labels or attacked

    @property
    def needs_classes(self) -> bool:
        """Whether the run asks any model for predictions of classes."""
        return self.method.classes or (
            self.attack_objective is not None and ATTACK_OBJECTIVES[self.attack_objective].classes
        )

    @property
    def token_models(self) -> set[str]:
        """The models of the run that must give patch tokens, or a last map, beside their image embedding."""
        if self.method.tokens:
            return {"student", *self._needed}
        feature = self.terms.feature
        return {"student", feature.teacher} if feature is not None and feature.of == "tokens" else set()

    @property
    def bound(self) -> Bound | None:
        """The bound on the clean embedding: the method's own, or the added term."""
        return getattr(self.method, "bound", None) or self.terms.bound

    @property
    def attack_sharpness(self) -> tuple[float, float]:
        """Factors of the reference's and the student's logits in what the attack maximises: the method's own."""
        if self.method.name == "agft" and self.attack_objective == "kl_start":
            return self.method.gamma * self.method.sharpness, self.method.sharpness
        return 1.0, 1.0

    @property
    def _needed(self) -> set[str]:
        objective = ATTACK_OBJECTIVES[self.attack_objective].teacher if self.attack_objective else None
        return {*self.method.teachers, *self.fusion, *self.terms.teachers.values(), objective} - {None}

    @model_validator(mode="after")
    def _lanes_of_the_batch(self):
        if self.data.lanes is None:
            data = self.data.model_copy(update={"lanes": default_lanes(self.train.batch_size)})
            object.__setattr__(self, "data", data)  # before anyone else sees this frozen configuration
        return self

    @model_validator(mode="after")
    def _objective_fits(self):
        method, objective = self.method.name, self.attack.objective
        if objective is not None and self.method.attack is None:
            raise ValueError(
                f"attack.objective: method '{method}' trains on clean images and attacks none; "
                "leave it out or choose another method"
            )
        if objective is not None and objective not in ATTACK_OBJECTIVES:
            raise ValueError(
                f"attack.objective: unknown objective '{objective}'; known: {', '.join(ATTACK_OBJECTIVES)}"
            )
        if self.attack_objective == "kl_fused" and not self.fusion:
            raise ValueError("attack.objective: 'kl_fused' needs teachers to fuse; list them in attack.fusion")
        if self.attack.fusion and self.attack_objective != "kl_fused":
            raise ValueError(
                f"attack.fusion: attack objective '{self.attack_objective}' fuses no teachers; "
                "set attack.objective=kl_fused or remove it"
            )
        if self.attack.restarts > 1 and not self.attack.random_start:
            raise ValueError(
                f"attack.restarts: {self.attack.restarts} restarts without a random start are all the same; "
                "set attack.random_start=true"
            )
        return self

    @model_validator(mode="after")
    def _teachers_fit(self):
        method, needed = self.method.name, self._needed
        if "student" in self.teachers:
            raise ValueError(
                "teachers.student: this is what the model in training is called; give the teacher another name"
            )
        for term, name in self.terms.teachers.items():
            if name not in {START, *self.teachers}:
                raise ValueError(
                    f"terms.{term}.teacher: teachers has no '{name}'; add it there, or name another"
                    f" ({', '.join([*self.teachers, START])})"
                )
        for name in sorted(needed - {START} - set(self.teachers)):
            raise ValueError(
                f"teachers.{name}: method '{method}' with attack objective '{self.attack_objective}' "
                "needs this teacher; add it"
            )
        unused = sorted(set(self.teachers) - needed)
        if unused:
            drop = "teachers=null" if not needed else " ".join(f"teachers.{name}=null" for name in unused)
            raise ValueError(
                f"teachers.{unused[0]}: no part of method '{method}' uses this teacher; remove it "
                f"(used: {', '.join(sorted(needed)) or 'none'}), in the file or with {drop}"
            )
        for name, teacher in self.teachers.items():
            if name != START and teacher.weights == START:
                raise ValueError(
                    f"teachers.{name}.weights: this setting is required; "
                    "only the teacher `start` is the untouched student"
                )
            if teacher.stored and self.data.augmented and self.data.views is None:
                raise ValueError(f"teachers.{name}.stored: {UNSTORABLE}")
        return self

    @model_validator(mode="after")
    def _terms_fit(self):
        if self.terms.feature is not None and self.method.attack is None:
            raise ValueError(
                f"terms.feature: method '{self.method.name}' attacks none, so there is no adversarial image; "
                "leave it out, or choose another method"
            )
        if self.terms.bound is not None and self.method.name == "lore":
            raise ValueError("terms.bound: method 'lore' has this bound itself; set method.bound, and leave it out")
        return self

    @model_validator(mode="after")
    def _data_fits(self):
        data = self.data
        if data.targets == "none" and self.needs_classes:
            attacked = f" with attack objective '{self.attack_objective}'" if self.attack_objective else ""
            raise ValueError(
                f"data.targets: 'none' leaves no classes, which method '{self.method.name}'{attacked} needs; "
                "set it to labels or captions"
            )
        if data.crop_scale is not None and data.crop_scale[0] > data.crop_scale[1]:
            raise ValueError(
                f"data.crop_scale: from {data.crop_scale[0]:g} to {data.crop_scale[1]:g} is no range; "
                "write the smaller area first"
            )
        if data.views is not None and not data.augmented:
            raise ValueError(
                "data.views: without data.crop_scale or data.flip all views of a sample are the same; "
                "leave it out or set one of them"
            )
        if self.train.batch_size % data.lanes:
            raise ValueError(
                f"data.lanes: {data.lanes} lanes do not divide train.batch_size {self.train.batch_size}; "
                "make it a divisor of the batch size, or leave it out"
            )
        if self.train.warmup_steps > self.train.steps:
            raise ValueError(
                f"train.warmup_steps: {self.train.warmup_steps} is more than train.steps {self.train.steps}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _probe_fits(self):
        if self.probe is None:
            return self
        if self.probe.eps is not None and self.attack.norm == "linf":
            check_unit("probe.eps", self.probe.eps)
        if self.probe.every % self.checkpoint.every:
            raise ValueError(
                f"probe.every: {self.probe.every} is no multiple of checkpoint.every {self.checkpoint.every}; "
                "only checkpoints can be measured"
            )
        if self.probe.ema and self.train.ema is None:
            raise ValueError(
                "probe.ema: true, but the run keeps no moving average; set train.ema, or leave probe.ema out"
            )
        return self
