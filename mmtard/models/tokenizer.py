"""A model's own tokenizer, never with code that came with the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from torch import Tensor

from ..errors import UserError


def load_tokenizer(text_cfg: dict, name: str) -> Callable[[list[str]], Tensor]:
    """The tokenizer of a checked `text_cfg`: N texts -> token ids int64 [N,L].

    name: what the model is called; the tokenizer of `local-dir:FOLDER` lies in that folder.
    Raises UserError for a tokenizer of Hugging Face that is not at hand, is damaged, or asks to run code.
    """
    length = text_cfg.get("context_length", DEFAULT_CONTEXT_LENGTH)
    extra = dict(text_cfg.get("tokenizer_kwargs") or {})
    hf_name = text_cfg.get("hf_tokenizer_name")
    try:
        if not hf_name:
            return _byte_pairs(length, json.dumps(extra, sort_keys=True))
        source = name.removeprefix("local-dir:") if name.startswith("local-dir:") else hf_name
        _check_files(Path(source), name)
        mode = text_cfg.get("tokenizer_mode")
        # Said outright: without it transformers asks on the terminal whether to run the code.
        made = HFTokenizer(source, context_length=length, tokenizer_mode=mode, trust_remote_code=False, **extra)
        made(["a"])  # a damaged one may load and then fail
        return made
    except UserError:
        raise
    except (OSError, ImportError) as error:
        raise UserError(
            f"{name}: its tokenizer '{hf_name}' is not at hand ({_line(error)}); download it once"
        ) from None
    except Exception as error:  # every tokenizer's reader has its own family of errors
        if "trust_remote_code" in str(error):
            raise _runs_code(name, hf_name) from None
        raise UserError(
            f"{name}: its tokenizer '{hf_name or 'of CLIP'}' cannot be used ({_line(error)}); download it again, or"
            " correct text_cfg"
        ) from None


@lru_cache(maxsize=16)
def _byte_pairs(length: int, options: str) -> SimpleTokenizer:
    """CLIP's own tokenizer, of options as JSON; kept, for to read its table takes longer than many a text."""
    return SimpleTokenizer(context_length=length, **json.loads(options))


def _check_files(folder: Path, name: str) -> None:
    """Refuse a folder whose tokenizer names a class of its own code."""
    for file in ("tokenizer_config.json", "config.json"):
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # absent, or the reader of the tokenizer says what is wrong
        if isinstance(content, dict) and content.get("auto_map"):
            raise _runs_code(name, f"{folder / file}")


def _runs_code(name: str, tokenizer: str) -> UserError:
    return UserError(
        f"{name}: its tokenizer '{tokenizer}' asks to run code of its own (auto_map), which mmtard never does; take a"
        " model without it"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_alike(tokenize: Callable[[list[str]], Tensor], texts: list[str]) -> list[tuple[str, str]]:
    """(an earlier text, another) wherever the tokenizer makes the same tokens of two that are not the same words.

    It knows no capitals and cuts what is longer than the text tower's context.
    """
    first: dict[bytes, str] = {}
    pairs = []
    for text, tokens in zip(texts, tokenize(texts)):
        earlier = first.setdefault(tokens.numpy().tobytes(), text)
        if " ".join(earlier.lower().split()) != " ".join(text.lower().split()):
            pairs.append((earlier, text))
    return pairs
