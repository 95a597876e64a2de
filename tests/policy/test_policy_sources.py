"""What names a policy: recipes, mappings and files; and the folders of calibrations."""

import json

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax import CompressionPolicy


def test_what_names_a_policy():
    assert dkv.load_policy(dkv.h2o(0.3)) == dkv.h2o(0.3)
    assert dkv.load_policy("snapkv") == dkv.load_policy(dkv.snapkv) == dkv.snapkv()
    assert (
        dkv.load_policy("none")
        == dkv.load_policy(CompressionPolicy.none)
        == CompressionPolicy.none()
    )
    assert dkv.load_policy({"name": "x", "tiers": ["K8V4"]}) == CompressionPolicy(
        "x", tiers=("K8V4",)
    )
    assert dkv.load_policy(json.loads(dkv.kvzip().to_json())) == dkv.kvzip()


def test_a_policy_that_does_not_forget():
    for policy, horizon in ((dkv.diffkv(), 64), (dkv.diffkv(forgets=False), None)):
        again = dkv.CompressionPolicy.from_json(policy.to_json())
        assert again == policy and again.score is not None and again.score.horizon == horizon
    score = dkv.diffkv(queries="all").score
    assert score is not None and score.horizon is None
    written = json.loads(dkv.diffkv().to_json())
    del written["score"]["forgets"]  # before there was a choice
    assert dkv.load_policy(written) == dkv.diffkv()


SOURCES = {
    "typing error": ("snapvk", "no such file; did you mean 'snapkv'"),
    "None": (None, "policy=None must be a CompressionPolicy, a mapping of its fields, one of"),
    "bytes": (b"snapkv", "policy=b'snapkv' must be"),
    "a number": (3, "policy=3 must be"),
    "a method that needs a policy": (
        dkv.ada_kv,
        "policy=<function ada_kv.* call it with its arguments",
    ),
    "a class": (CompressionPolicy, "policy=.* must be a CompressionPolicy"),
    "a folder": (".", r"policy='\.' must be a JSON file.*a folder"),
    "a long name": ("x" * 5000, "policy='xxx.* must be the path"),
    "a null byte": ("a\0b", "policy=.* must be the path"),
    "an unknown field": (
        {"name": "x", "tiers": ["full"], "schedules": 3},
        r"unknown \['schedules'\]; did you mean 'schedule'",
    ),
    "a field that is no text": ({"name": "x", "tiers": ["full"], 3: 3}, r"unknown \[3\]"),
    "no name": ({"tiers": ["full"]}, "missing 'name'"),
    "a bad field": (
        {"name": "x", "schedule": {"type": "Schedule", "window": None}},
        "window=None must be",
    ),
    "a stage of no type": ({"name": "x", "schedule": {"window": 3}}, "schedule.type=None must be"),
    "a stage of another type": (
        {"name": "x", "schedule": {"type": "Budget"}},
        "schedule.type='Budget' must be a Schedule",
    ),
    "a stage of one's own": (
        {"name": "x", "score": {"type": "my_module:Mine"}},
        "import the module that defines it first",
    ),
}


@pytest.mark.parametrize("case", SOURCES)
def test_what_names_none(case):
    source, message = SOURCES[case]
    with pytest.raises(ValueError, match=message):
        dkv.load_policy(source)


FILES = {
    "not UTF-8": (b'{"name": "\xff"}', "policy='.*' must be a JSON file.*utf-8"),
    "cut": (
        dkv.kvzip().to_json()[:-9].encode(),
        "policy file .*text=.* must be the JSON of a policy",
    ),
    "empty": (b"", "policy file .*must be the JSON of a policy"),
    "nested without end": (b"[" * 100_000, "policy file .*must be the JSON of a policy"),
    "endless digits": (
        b'{"name": "x", "schedule": {"type": "Schedule", "window": ' + b"9" * 5000 + b"}}",
        "policy file .*must be the JSON of a policy",
    ),
    "a number": (b"3", "policy file .*must be a JSON object"),
    "a wrong type": (
        b'{"name": "x", "tiers": "full"}',
        "policy file .*tiers='full' must be a list",
    ),
    "infinity": (
        b'{"name": "x", "keep": {"type": "Thresholds", "alpha_high": Infinity}}',
        "policy file .*alpha_high=inf must be finite",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case, tmp_path):
    content, message = FILES[case]
    path = tmp_path / "policy.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        dkv.load_policy(path)
    # as some editors begin a file
    path.write_bytes(b"\xef\xbb\xbf" + dkv.tova().to_json().encode())
    assert dkv.load_policy(str(path)) == dkv.tova()


def test_calibration_folders(tmp_path):
    made = dkv.Calibration(
        ((None, np.zeros((1, 1, 2), np.float16)),), ["K4V8v4"], {"type": "WithoutRope"}, "x"
    )
    assert made.tiers == ("K4V8v4",) and made.transform == dkv.WithoutRope()
    made.save(tmp_path / "new" / "folder")
    assert dkv.Calibration.load(tmp_path / "new" / "folder").fingerprint == "x"
    (tmp_path / "file").write_text("x")
    for path, message in (
        (tmp_path / "new", "is there already: give overwrite=True"),
        (tmp_path / "file", "take another"),
    ):
        with pytest.raises(ValueError, match=f"path=.*{message}"):
            made.save(path)
    with pytest.raises(ValueError, match="path=.* must be a folder that can be made"):
        made.save("/proc/no/such")
    with pytest.raises(TypeError, match="overwrite=1 must be True or False"):
        made.save(tmp_path / "other", overwrite=1)
    with pytest.raises(ValueError, match="path=.* must be a folder that Calibration.save wrote"):
        dkv.Calibration.load(tmp_path / "file")
    with pytest.raises(TypeError, match="model=None must be a CausalLM"):
        made.check(None, {})
