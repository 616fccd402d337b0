"""The names of the files of a run folder. No torch."""

CONFIG = "config.yaml"  # every setting of the run, resolved
ENVIRONMENT = "environment.json"  # versions, git state, hosts
METRICS = "metrics.jsonl"  # a row a step
EVENTS = "events.jsonl"  # skipped steps, replaced samples, alarms
OVERFITTED = "alarm: catastrophic overfitting"  # one of these events
PROBES = "probes.jsonl"  # robust accuracy of checkpoints, measured while the run goes on
HISTORY = "resume.jsonl"  # a line a start; it also marks the folder as mmtard's own
CHECKSUMS = "checksums.json"  # of the settings, the class embeddings and the start
UNNOTED = "unnoted.jsonl"  # a line a start that a signal ended before it came into the history
SUCCESSOR = "goes_on_as"  # the job that goes on for one that may not be requeued
WANDB = "wandb.json"  # the id of the run at Weights & Biases
TENSORBOARD = "tensorboard"
CLASS_EMBEDDINGS = "class_embeddings.safetensors"
START = "start"  # the student before training, as an open_clip folder
CHECKPOINTS = "checkpoints"  # step-N folders, and the links latest and most_robust to two of them
LATEST = "latest"
MOST_ROBUST = "most_robust"  # the checkpoint that probes found so
EVALUATIONS = "evaluations"
RESULTS = "results.json"
LOCK = ".lock"
OWNER = ".owner"  # in place of a lock, where the file system has none
HEARTBEATS = ".heartbeat"
PROBE = ".probe"
