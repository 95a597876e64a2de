"""Which interpreted TPU kernels run every day: the interpreter takes 5 to 20 s for each of the larger ones, so CI runs the others."""

import pytest

LONG = ("test_decode_attention.py", "test_event.py")  # one TPU case each is quick, all else of them is slow
EVERY_DAY = (
    "test_equals_a_dense_softmax[K8V4+K4V2, G=4, d=128, T=128-mosaic_tpu]",
    "test_an_event[mosaic_tpu-K8V4+K4V2-64-32-True-False]",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = item.nodeid.split("/")[-1]
        long = "mosaic_tpu" in name and name.startswith(LONG) and not name.endswith(EVERY_DAY)
        checked = "mosaic_tpu_checked" in name and not name.startswith("test_append.py")
        if long or checked:
            item.add_marker(pytest.mark.slow)
