"""What interrupts a whole run in this process, and what it leaves in its folder, for the tests of this folder."""

import json


class Never:
    signal = name = None

    def __bool__(self):
        return False


class AfterSteps(Never):
    """Answers as an interruption that comes during a step, the second where none is named; asked once a step."""

    name = "SIGUSR2"

    def __init__(self, step=2):
        self.left = step

    def __bool__(self):
        self.left -= 1
        return self.left <= 0


def rows(run):
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in row.items() if not k.startswith(("seconds", "images", "tflops", "memory", "mfu"))}
        for row in lines
    ]
