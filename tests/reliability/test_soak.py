"""The soak, for as long as a test may take; `make soak` lasts half an hour."""

from pathlib import Path

from tests.reliability.soak import report, soak

SECONDS = 120.0


def test_server_stays_within_its_limits(model_dir: Path, tmp_path: Path) -> None:
    found = soak(model_dir, SECONDS, tmp_path / "store")

    report(found)
    assert found.problems == []
    deeds = {deed for deed, _ in found.statuses}
    assert len(deeds) == 8
    assert found.statuses["talk", 200] > 20
    assert {status for _, status in found.statuses} <= {0, 200, 400, 404, 501, 505}
