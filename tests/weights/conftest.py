"""What tests of weights share."""

import photos
import pytest

from mclr.train import convert


@pytest.fixture
def refused(capsys):
    """refused(ARGUMENTS of mclr convert): the one line that it prints before it exits with status 2."""
    return lambda *argv: photos.refused(convert.main, argv, capsys)
