"""The settings of a run: schema, YAML files, overrides, and errors that say what to write instead. No torch."""

from .attack import ATTACK_OBJECTIVES, Attack
from .data import UNSTORABLE, Cache, Data
from .loading import differences, dump, load, section, validate
from .method_settings import START
from .methods import ARD, METHODS, Clean, TeCoA
from .mmtard_method import MMTARD, TRUSTS, WEIGHTINGS
from .models import Lora, Model, Student, Teacher
from .schema import Config
from .training import Log, Resume, Train
from .values import expand_path, parse_fraction, show_pixels
from .world import check_world

__all__ = [
    "ARD", "ATTACK_OBJECTIVES", "Attack", "Cache", "Clean", "Config", "Data", "Log", "Lora", "METHODS", "MMTARD",
    "Model", "Resume", "START", "Student", "TRUSTS", "TeCoA", "Teacher", "Train", "UNSTORABLE", "WEIGHTINGS",
    "check_world", "differences", "dump", "expand_path", "load", "parse_fraction", "section", "show_pixels",
    "validate",
]  # fmt: skip
