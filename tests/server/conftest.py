"""A server for a whole module; its pages have to be free in the end."""

import pytest


@pytest.fixture(scope="module")
def engine():
    from helpers_server import tiny_engine

    return tiny_engine()


@pytest.fixture(scope="module")
def served(engine):
    from diffkv_jax.server import app
    from helpers_server import NAME, all_free, wait_until

    found = app(engine, model_name=NAME)
    yield found
    wait_until(lambda: all_free(engine))
    driver = found.state.driver
    assert not driver._mail and not driver._open
    driver.close(5)
    assert not driver._thread.is_alive()
