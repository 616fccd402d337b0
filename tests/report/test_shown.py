"""Text of others is shown as it stands: no markup, formula, control character or line break of it works."""

import pytest

from mmtard.report import shown


def test_controls_and_direction_marks_are_written_out():
    assert shown.visible("a\x1b[31mb\nc\u202ed\u2028e naïve 中文") == "a\\x1b[31mb\\nc\\u202ed\\u2028e naïve 中文"
    assert shown.visible("a\nb\r", lines=True) == "a\nb\\r" and shown.visible("\ud800") == "\\ud800"


def test_a_long_name_keeps_its_ends():
    assert shown.short("x" * 3000 + "end", 11) == "xxxxx…xxend" and shown.short("abc") == "abc"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("| a | b |", r"\| a \| b \|"),
        ("<script>alert(1)</script>", r"\<script\>alert(1)\</script\>"),
        ("a\n# Robust accuracy 99 %", r"a\\n\# Robust accuracy 99 %"),
        ("`x` [y](z) **b** $m$ &amp;", r"\`x\` \[y\](z) \*\*b\*\* \$m\$ \&amp;"),
    ],
)
def test_markdown_reads_as_the_text(text, expected):
    assert shown.markdown(text) == expected and shown.markdown(shown.markdown(text)) == expected


def test_code_of_markdown_cannot_be_left():
    assert shown.code("a`b``c") == "```a`b``c```" and shown.code("`") == "`` ` ``" and shown.code("a|b") == r"`a\|b`"
    assert shown.block("x\n```\n<script>\n````", "yaml") == "`````yaml\nx\n```\n<script>\n````\n`````"


def test_latex_and_spreadsheets_take_a_name_for_a_name():
    assert shown.latex(r"a_b & 50% \input{x} ~^") == (
        r"a\_b \& 50\% \textbackslash{}input\{x\} \textasciitilde{}\textasciicircum{}"
    )
    assert [shown.csv_cell(text) for text in ("=1+1", "+cmd", "@x", "-2.5", "+3.0", "plain")] == [
        "'=1+1", "'+cmd", "'@x", "-2.5", "+3.0", "plain",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "stored, typed",
    [
        ("/home/me/.venv/bin/mmtard train b32.yaml", "mmtard train b32.yaml"),
        ("/x/mmtard/__main__.py evaluate 'runs/a b'", "mmtard evaluate 'runs/a b'"),
        ("/x/mmtard/examples/quickstart.py", "python -m mmtard.examples.quickstart"),
        ("/x/site-packages/mmtard/quickstart/__main__.py", "python -m mmtard.quickstart"),
        ("python train.py x", "python train.py x"),
        ("unclosed 'quote", "unclosed 'quote"),
        ("", ""),
    ],
)
def test_a_command_is_shown_as_a_person_types_it(stored, typed):
    assert shown.typed(stored) == typed
