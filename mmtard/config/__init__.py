"""The settings of a run: schema, YAML files, overrides, and errors that say what to write instead. No torch."""

from .attack import ATTACK_OBJECTIVES, Attack
from .loading import differences, dump, load, validate
from .methods import ARD, METHODS, MMTARD, START, WEIGHTINGS, Clean, TeCoA
from .schema import UNSTORABLE, Cache, Config, Data, Log, Lora, Model, Resume, Student, Teacher, model_of
from .values import expand_path, parse_fraction, show_pixels
from .world import check_world, world_size_from_env

__all__ = [
    "ARD", "ATTACK_OBJECTIVES", "Attack", "Cache", "Clean", "Config", "Data", "Log", "Lora", "METHODS", "MMTARD", "Model",
    "Resume", "START", "Student", "TeCoA", "Teacher", "UNSTORABLE", "WEIGHTINGS", "check_world", "differences", "dump",
    "expand_path", "load", "model_of", "parse_fraction", "show_pixels", "validate", "world_size_from_env",
]  # fmt: skip
