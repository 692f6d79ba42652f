"""Uninitialised memory is poisoned in every test."""

import pytest


@pytest.fixture(autouse=True)
def _poisoned(poisoned):
    pass
