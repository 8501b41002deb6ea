"""What tests of weights share."""

import pytest
from foreign import convert_


@pytest.fixture
def refused(capsys):
    """refused(ARGUMENTS of mclr convert): the line that it says, alone, and nothing else."""

    def refused(*argv):
        capsys.readouterr()
        assert convert_(*argv) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err

    return refused
