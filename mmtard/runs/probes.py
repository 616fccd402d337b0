"""What tells the probes of a run apart: only those that were measured alike, on the same data, are compared."""

from __future__ import annotations

FINGERPRINT, CLASSES = "fingerprint", "classes"  # of a probe's data; what earlier versions did not note


def differences(protocols: list[dict], protocol: dict) -> list[str]:
    """What some of these say otherwise than `protocol`; one of an earlier version does not say which data it saw."""
    unsaid = {key: protocol[key] for key in (FINGERPRINT, CLASSES) if key in protocol}
    others = [unsaid | other for other in protocols]
    keys = [*protocol, *sorted({key for other in others for key in other} - protocol.keys())]
    return [key for key in keys if any(other.get(key) != protocol.get(key) for other in others)]
