import pytest
from serving_session import client_of, open_session


@pytest.fixture
def client(tmp_path):
    with client_of(open_session(tmp_path / "out")) as client:
        yield client
