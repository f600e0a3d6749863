"""Imports without the garbage collector leave it as it was."""

import gc

import pytest

from distilspeed.trainer.job.command import fast_imports


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_is_off_during_imports_and_then_as_before(is_enabled: bool) -> None:
    try:
        if not is_enabled:
            gc.disable()
        with fast_imports():
            assert not gc.isenabled()
        assert gc.isenabled() == is_enabled
    finally:
        gc.enable()
