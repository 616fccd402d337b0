"""Files that several processes share, and how anything is written."""

from .disk import FULL, free_space, size_in_words, why_not_read, why_not_written
from .locks import exclusive, held, shared
from .paths import discard, refuse_special, temporary_files, user_cache, wait_for
from .records import DIGEST, json_objects, opened, read_json_lines, sealed, settings_digest, slug
from .writing import note_text, publish, write_text

__all__ = [
    "DIGEST", "FULL", "discard", "exclusive", "free_space", "held", "json_objects", "note_text", "opened", "publish",
    "read_json_lines", "refuse_special", "sealed", "settings_digest", "shared", "size_in_words", "slug",
    "temporary_files", "user_cache", "wait_for", "why_not_read", "why_not_written", "write_text",
]  # fmt: skip
