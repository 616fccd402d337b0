"""The loop, its set-up, the DeepSpeed engine, watchdog, probe, preflight, memory table."""
