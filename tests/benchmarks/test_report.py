"""What a benchmark prints."""

import torch

from mmtard.benchmarks.report import BenchmarkReport, BenchmarkTable


def test_a_table_of_many_columns_is_not_cut_where_no_terminal_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = ["mmtard", "mmtard, clean stored, open_clip's own towers"]
    columns = ["", *(f"phase number {i}" for i in range(12))]
    rows = [[name, *(f"0.00{i}{row}-0.0123456" for i in range(12))] for row, name in enumerate(names)]
    BenchmarkReport([BenchmarkTable("Seconds", columns, rows)]).publish(tmp_path / "out.json", torch.device("cpu"))
    printed = capsys.readouterr().out
    assert "…" not in printed and all(cell in printed for row in rows for cell in row[1:])
    assert all(column in printed for column in columns)
    assert "mmtard, clean stored," in printed
