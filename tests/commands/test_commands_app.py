"""The console script as a whole: it starts without JAX, says its version, passes arguments on."""

import os
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffkv_jax.commands.app import app

ROOT = Path(__file__).parents[2]
# what pip writes for an entry point, and what it has loaded at its end
SCRIPT = """
import atexit, sys
atexit.register(lambda: print("jax" in sys.modules, file=sys.stderr))
from diffkv_jax.commands import main
sys.exit(main())
"""


def script(folder: Path, *arguments: str, lines: str = SCRIPT) -> subprocess.CompletedProcess:
    """The installed script with these arguments."""
    path = folder / "diffkv"
    path.write_text(lines)
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_and_version_do_not_load_jax(tmp_path, arguments):
    ran = script(tmp_path, *arguments)
    assert ran.returncode == 0 and ran.stdout
    assert ran.stderr.split() == ["False"]


def test_a_command_loads_the_whole_library(tmp_path):
    ran = script(tmp_path, "inspect", str(tmp_path / "absent"))
    assert ran.returncode == 2 and ran.stdout == ""
    said = ran.stderr.splitlines()
    assert said[0].startswith("diffkv: ") and "must be an existing file" in said[0]
    assert said[1:] == ["True"]  # JAX, and no traceback


def test_the_library_in_the_console_script_is_the_library(tmp_path):
    lines = """
import diffkv_jax.generate
import diffkv_jax as dkv
print("CompressionPolicy" in vars(dkv), dkv.CompressionPolicy.none().name)
print(callable(dkv.generate), callable(dkv.make_cache))
print(hasattr(dkv, "absent"))
from diffkv_jax.choice import automatic, judged
print(len(automatic._fits), len(judged._judges))
"""
    ran = script(tmp_path, lines=lines)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == "False none True True False 1 1".split()


def test_version():
    said = CliRunner().invoke(app, ["--version"])
    assert said.exit_code == 0 and said.stdout == f"diffkv {version('diffkv-jax')}\n"


def test_evaluate_passes_everything_on(monkeypatch):
    given = []
    monkeypatch.setattr(
        "diffkv_jax.evaluation.command.main", lambda argv: given.append(list(argv)) or 1
    )
    arguments = ["--model", "m", "--policy", "diffkv(1, 0)", "--policy", "none", "--question-with"]
    said = CliRunner().invoke(app, ["evaluate", *arguments])
    assert given == [arguments] and said.exit_code == 1


def test_evaluate_shows_the_help_of_the_evaluation(capfd):
    said = CliRunner().invoke(app, ["evaluate", "--help"])
    assert said.exit_code == 0
    assert "--cache-dtype" in said.stdout and "python -m diffkv_jax.evaluation" in said.stdout


def test_a_traceback_only_where_it_is_asked_for():
    wrong = ["inspect", "absent/absent/absent"]
    plain = CliRunner().invoke(app, wrong)
    assert plain.exit_code == 2 and plain.stderr.count("\n") == 1
    assert isinstance(plain.exception, SystemExit)
    for options, env in ((["--debug"], {}), ([], {"DIFFKV_DEBUG": "1"})):
        shown = CliRunner().invoke(app, [*options, *wrong], env=env)
        assert isinstance(shown.exception, ValueError)
    assert isinstance(CliRunner().invoke(app, wrong).exception, SystemExit)


def test_ctrl_c_is_130(monkeypatch):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffkv_jax.models.load_pretrained", pressed)
    assert CliRunner().invoke(app, ["inspect", "m"]).exit_code == 130


def test_the_entry_point_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    module, function = project["scripts"]["diffkv"].split(":")
    assert callable(getattr(import_module(module), function))
