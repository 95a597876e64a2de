"""Which interpreted TPU kernels run every day, which in CI and which only when asked for: the
larger ones take 5 to 20 s each.
"""

import pytest

# but for a few TPU cases all of them are slow
LONG = ("test_decode_attention.py", "test_table_attention.py", "test_apply_event.py")
EVERY_DAY = (
    "test_equals_a_dense_softmax[K8V4+K4V2, G=4, d=128, T=128-mosaic_tpu]",
    "test_equals_a_dense_softmax[CQ 4c8b, G=3-mosaic_tpu]",
    "test_equals_a_dense_softmax[KVQuant of 3 bits, outliers-mosaic_tpu]",
    "test_the_comparison_sees_wrong_tables[the table of the head beside-mosaic_tpu]",
    "test_an_event[mosaic_tpu-K8V4+K4V2-64-32-True-False]",
)
# CI runs other TPU cases of the same code
NOT_BY_CI = ("test_table_attention.py", "bfloat16_queries")
CHECKED_BY_CI = (
    "K8V4+K4V2, G=4, d=128, T=128",
    "K8V4+K4V2-64-32-True-False",
    "KVQuant of 3 bits, outliers",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = item.nodeid.split("/")[-1]
        checked = "mosaic_tpu_checked" in name and not name.startswith("test_recent_window.py")
        if (
            "mosaic_tpu" not in name
            or name.endswith(EVERY_DAY)
            or not (checked or name.startswith(LONG))
        ):
            continue
        item.add_marker(pytest.mark.slow)
        by_ci = (
            any(case in name for case in CHECKED_BY_CI)
            if checked
            else not any(part in name for part in NOT_BY_CI)
        )
        if not by_ci:
            item.add_marker(pytest.mark.long)
