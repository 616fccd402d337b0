"""A model's tokenizer: made once for all models that read alike."""

from open_clip import tokenizer as theirs

from mmtard.models import tokenizer


def test_the_table_of_byte_pairs_is_read_once_for_each_length_and_options(monkeypatch):
    made, init = [], theirs.SimpleTokenizer.__init__
    monkeypatch.setattr(
        theirs.SimpleTokenizer, "__init__", lambda self, **options: made.append(options) or init(self, **options)
    )
    tokenizer._byte_pairs.cache_clear()
    first, again, other, shuffled = (
        tokenizer.load_tokenizer(cfg, "a model")
        for cfg in (
            {"context_length": 9},
            {"context_length": 9, "tokenizer_kwargs": {}},
            {"context_length": 11},
            {"context_length": 9, "tokenizer_kwargs": {"clean": "canonicalize"}},
        )
    )
    assert first is again and made == [
        {"context_length": 9},
        {"context_length": 11},
        {"context_length": 9, "clean": "canonicalize"},
    ]
    assert (first(["a cat"]).shape, other(["a cat"]).shape) == ((1, 9), (1, 11))
    assert first(["a cat!"]).tolist() != shuffled(["a cat!"]).tolist()
