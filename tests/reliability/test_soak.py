"""The soak, for 10 seconds and for 2 minutes; `make soak` lasts half an hour."""

from pathlib import Path

import pytest

from tests.helpers.marks import all_but
from tests.reliability.soak import report, soak


@pytest.mark.alone
@pytest.mark.parametrize("seconds", all_but([10.0], [10.0, 120.0]))
def test_server_stays_within_its_limits(
    model_dir: Path, tmp_path: Path, seconds: float
) -> None:
    found = soak(model_dir, seconds, tmp_path / "store")

    report(found)
    assert found.problems == []
    assert len({deed for deed, _ in found.statuses}) == 8
    assert found.statuses["talk", 200] > seconds / 6
    assert {status for _, status in found.statuses} <= {0, 200, 400, 404, 501, 505}
