"""The folder of a run: its files, lock, history of starts, checkpoints, metrics, trackers, and the table of runs."""
