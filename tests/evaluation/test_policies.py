"""Policies as a command line spells them."""

import pytest

import diffkv_jax as dkv
from diffkv_jax.evaluation.policies import policy_of


@pytest.mark.parametrize(
    ("spelled", "policy"),
    [
        ("balanced", dkv.AutoPolicy(target_kl="balanced")),
        ("diffkv(1, 0)", dkv.diffkv(1, 0)),
        (
            "diffkv(1, 0.02, tiers=('K8V4', 'K4nV2n'), transform=Hadamard())",
            dkv.diffkv(1, 0.02, tiers=("K8V4", "K4nV2n"), transform=dkv.Hadamard()),
        ),
        (" ada_kv(snapkv(0.5, window=16)) ", dkv.ada_kv(dkv.snapkv(0.5, window=16))),
        (
            "quantized('K4V4', transform=Chain([Centered(), Balanced(0.25)]))",
            dkv.quantized("K4V4", transform=dkv.Chain((dkv.Centered(), dkv.Balanced(0.25)))),
        ),
        (
            "quantized('K4V4', transform=even_channels(-0.0))",
            dkv.quantized("K4V4", transform=dkv.even_channels(0)),
        ),
        (
            "quantized('K4V4', transform=Learned(0.0))",
            dkv.quantized("K4V4", transform=dkv.Learned(0.0)),
        ),
        ("none(window=32)", dkv.CompressionPolicy.none(window=32)),
    ],
)
def test_spellings(spelled, policy):
    assert policy_of(spelled) == policy != dkv.diffkv(5, 0)


def test_a_file(tmp_path):
    path = tmp_path / "mine (1).json"
    path.write_text(dkv.diffkv(2, 0).to_json())
    assert policy_of(str(path)) == dkv.diffkv(2, 0)


@pytest.mark.parametrize(
    ("spelled", "rule"),
    [
        ("difkv(1, 0)", r"difkv must be one of .*did you mean 'diffkv'"),
        ("__import__('os').system('true')", r"must be one of"),
        ("diffkv(print(1))", r"print must be one of"),
        ("diffkv(open)", r"malformed node"),
        ("diffkv(**{'queries': 8})", r"write out what \*\* stands for"),
        ("diffkv(-1, 0)", r"alpha_high=-1"),
        ("diffkv(nothing=3)", r"nothing"),
        ("diffkv(1, 0", r"was never closed"),
        ("Hadamard()", r"must be a call of a method.*is of a Hadamard"),
        ("diffkw", r"did you mean 'diffkv'"),
    ],
)
def test_what_is_refused(spelled, rule):
    with pytest.raises(ValueError, match=rule):
        policy_of(spelled)


def test_policies_that_are_yet_to_be_fitted():
    assert policy_of(" auto") == dkv.AutoPolicy()
    assert policy_of("auto(share=0.3, drop=False)") == dkv.AutoPolicy(share=0.3, drop=False)
    with pytest.raises(ValueError, match="target_kl"):
        policy_of("auto(target_kl='best')")
