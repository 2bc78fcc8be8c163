"""Points are hundredths with two digits."""

import pytest

from openm3.train.sights.sight import point_text


@pytest.mark.parametrize(
    ("box", "text"),
    [
        ((0, 0, 200, 100), "50, 50"),
        ((0, 0, 4, 2), "01, 01"),
        ((199, 99, 200, 100), "99, 99"),
        ((200, 100, 200, 100), "99, 99"),
        ((60, 20, 80, 40), "35, 30"),
    ],
)
def test_point_text(box: tuple[int, int, int, int], text: str) -> None:
    assert point_text(box, 200, 100) == text
