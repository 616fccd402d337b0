"""The run's schema and how it is read: YAML files plus `key.sub=value` overrides, validated without importing torch."""

from .launched import check_world, expand_shards, is_remote, world_size_from_env
from .loading import differences, dump, load, validate
from .methods import ARD, ATTACK_OBJECTIVES, METHODS, MMTARD, START, WEIGHTINGS, Attack, Clean, TeCoA
from .schema import Cache, Config, Data, Log, Lora, Model, Resume, Student, Teacher
from .values import parse_fraction, show_pixels

__all__ = [
    "ARD", "ATTACK_OBJECTIVES", "Attack", "Cache", "Clean", "Config", "Data", "Log", "Lora", "METHODS", "MMTARD", "Model", "Resume", "START", "Student", "TeCoA", "Teacher",
    "WEIGHTINGS", "check_world", "differences", "dump", "expand_shards", "is_remote", "load", "parse_fraction", "show_pixels", "validate", "world_size_from_env",
]  # fmt: skip
