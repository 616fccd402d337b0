"""Submits mmtard's work to Slurm. Needs no torch: only the standard library, `mmtard.config`, `mmtard.history`, `mmtard.slurm` and submitit."""
