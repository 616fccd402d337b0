"""How robust a model is: accuracy on clean images and under attack, with its uncertainty, sharded over the ranks."""

from .quick import Quick, evaluate, show
from .statistics import stratified, wilson_interval

__all__ = ["Quick", "evaluate", "show", "stratified", "wilson_interval"]
