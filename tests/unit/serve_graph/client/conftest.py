from collections.abc import Iterator

import pytest
from scripted.service import ScriptedService, scripted_service


@pytest.fixture
def scripted() -> Iterator[ScriptedService]:
    with scripted_service() as service:
        yield service
