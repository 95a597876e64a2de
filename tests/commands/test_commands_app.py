"""The console script as a whole: its version, errors, and arguments that are passed on."""

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
# what pip writes for an entry point
SCRIPT = """
import sys
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
def test_help_and_version(tmp_path, arguments):
    ran = script(tmp_path, *arguments)
    assert ran.returncode == 0 and ran.stdout and not ran.stderr


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    ran = script(tmp_path, "inspect", str(tmp_path / "absent"))
    assert ran.returncode == 2 and ran.stdout == ""
    (said,) = ran.stderr.splitlines()
    assert said.startswith("diffkv: ") and "must be an existing file" in said


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
