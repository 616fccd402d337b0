"""The robust probe: checkpoints are measured in the background while the run goes on, and the most robust one stays."""
