"""mmtard: distributed Multimodal Multi-Teacher Adversarial Robust Distillation (MMT-ARD, arXiv 2511.17448)."""

__version__ = "0.1.0"
