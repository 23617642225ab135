from __future__ import annotations

import pytest

from tests.publishing import trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training with both callbacks, evaluated after its end, and its checkpoint in its output folder."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trained(folder, save_strategy="no")
    trainer.evaluate()
    trainer.save_model(str(folder))
    yield trainer, folder
