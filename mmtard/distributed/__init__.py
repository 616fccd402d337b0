"""Ranks and how they agree; signals; how processes end; what Slurm says of this job."""
