"""Commands that must fail, and what they say."""

import pytest

from perturbcore.cli import main


def failure(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 1) -> str:
    """Run a command that must fail, and return its one or two lines on stderr."""
    capsys.readouterr()
    assert main(arguments) == code
    said = capsys.readouterr().err.strip()
    assert "Traceback" not in said
    assert said.startswith("error: ")
    assert 1 <= len(said.splitlines()) <= 2
    return said
