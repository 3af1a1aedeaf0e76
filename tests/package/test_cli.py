"""The command line: what it lists, how it ends, and that asking for help costs no heavy import.

Would catch: a sub-command that is not wired up, a traceback shown to a user, an eager `import torch`.
"""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from mhc_tilelang import cli
from mhc_tilelang.errors import MHCError

HEAVY = ("torch", "tilelang", "tvm")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def heavy_modules_after(statement: str) -> list[str]:
    return run_python(f"import sys\n{statement}\nprint(*[m for m in {HEAVY} if m in sys.modules])").split()


def fake_command(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    """Put a sub-command `fake` in the place of the real ones."""
    module = types.ModuleType("fake_command")
    module.add_arguments = lambda parser: parser.add_argument("--answer", type=int, default=0)
    module.run = run
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setattr(cli, "COMMANDS", {"fake": cli.Command("fake_command", "a fake")})


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    commands = "check bench traffic inspect predict study export warmup memory simulate doctor"
    assert set(cli.COMMANDS) == {*commands.split()}
    assert all(command.help in shown for command in cli.COMMANDS.values())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_explains_itself_and_takes_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert "--json FILE" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["doctor", "--nonsense"]])
def test_bad_arguments_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert "usage: mhc-tilelang" in capsys.readouterr().err


def test_exit_status_and_arguments_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch, lambda args: args.answer)
    assert cli.main(["fake", "--answer", "7"]) == 7


def test_known_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: object) -> int:
        raise MHCError("expected a GPU, found none")

    fake_command(monkeypatch, fail)
    assert cli.main(["fake"]) == 1
    assert capsys.readouterr().err == "mhc-tilelang fake: expected a GPU, found none\n"


def test_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    fake_command(monkeypatch, interrupt)
    assert cli.main(["fake"]) == 130
    assert capsys.readouterr().err == "mhc-tilelang fake: interrupted\n"


def test_unknown_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise ZeroDivisionError

    fake_command(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"mhc-tilelang {version('mhc-tilelang')}\n"


def test_importing_the_package_does_not_load_tilelang() -> None:
    assert "tilelang" not in heavy_modules_after("import mhc_tilelang")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_loads_nothing_heavy(command: str) -> None:
    ask_for_help = f"""
import contextlib, io
from mhc_tilelang.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["{command}", "--help"])
"""
    assert heavy_modules_after(ask_for_help) == []
