"""Submitting to Slurm, the body of a job, running on this machine. No torch."""
