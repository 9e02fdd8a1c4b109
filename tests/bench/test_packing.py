"""Sizes and errors of packed tasks."""

import json

from bench import packing


def test_every_dtype_at_two_sparsities(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "TASKS", 2)
    monkeypatch.setattr(packing, "IMAGES", 2)
    packing.main(["--width", "16", "--to", str(tmp_path / "packing.json")])
    found = json.loads((tmp_path / "packing.json").read_text())
    assert json.loads(capsys.readouterr().out) == found
    rows = {(row["sparsity"], row["dtype"]): row for row in found["packed"]}
    assert len(rows) == 6
    for sparsity in (0, 50):
        exact, half, byte = (rows[sparsity, dtype] for dtype in ("float32", "bfloat16", "int8"))
        assert exact["file_bytes"] > half["file_bytes"] > byte["file_bytes"]
        assert exact["logits_error"] < 1e-6 < half["logits_error"] < 1e-2
        assert exact["values"] == 2 * half["values"]
    assert rows[50, "float32"]["values"] * 2 == rows[0, "float32"]["values"]
