"""The run's schema and how it is read: YAML files plus `key.sub=value` overrides, validated without importing torch."""

from .launched import check_world, default_index, embeddings_folder, expand_shards, is_remote, world_size_from_env
from .loading import differences, dump, load, validate
from .methods import ARD, ATTACK_OBJECTIVES, METHODS, MMTARD, START, WEIGHTINGS, Attack, Clean, TeCoA
from .schema import UNSTORABLE, Cache, Config, Data, Log, Lora, Model, Resume, Student, Teacher
from .stored import MANIFEST, made_from, manifests, source, stored_teachers
from .values import parse_fraction, show_pixels

__all__ = [
    "ARD", "ATTACK_OBJECTIVES", "Attack", "Cache", "Clean", "Config", "Data", "Log", "Lora", "MANIFEST", "METHODS", "MMTARD", "Model", "Resume",
    "START", "Student", "TeCoA", "Teacher", "UNSTORABLE", "WEIGHTINGS", "check_world", "default_index", "differences", "dump", "embeddings_folder",
    "expand_shards", "is_remote", "load", "made_from", "manifests", "parse_fraction", "show_pixels", "source", "stored_teachers", "validate",
    "world_size_from_env",
]  # fmt: skip
