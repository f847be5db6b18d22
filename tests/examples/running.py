"""Running the example scripts as a user runs them, the long ones for a few steps only."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"

# For what runs long, so that code which is optimised a little pays for being made.
LEVEL_1 = "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
OPTIMISED = os.environ | {"XLA_FLAGS": LEVEL_1}


def run(script: str, *arguments: str, cwd: Path | None = None, env: dict | None = None) -> str:
    return python(str(EXAMPLES / script), *arguments, cwd=cwd, env=env)


def run_shortly(name: str, settings: str, steps: int, cwd: Path, env: dict | None = None) -> str:
    """The example's `main` for a few steps, its module's constants set before."""
    return python("-c", shortened(name, settings, steps), cwd=cwd, env=env)


def shortened(name: str, settings: str, steps: int) -> str:
    return f"import {name} as example\n{settings}\nexample.main(steps={steps})"


def python(*arguments: str, cwd: Path | None, env: dict | None = None) -> str:
    """What a process says, which can import the examples."""
    result = finished("-W", "error", *arguments, cwd=cwd, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refusal(script: str, *arguments: str, cwd: Path) -> str:
    """What an example says of arguments that it refuses."""
    result = finished("-W", "error", str(EXAMPLES / script), *arguments, cwd=cwd)
    assert result.returncode == 1, result.stdout
    return result.stderr


def run_by_two(script: str, cwd: Path) -> subprocess.CompletedProcess:
    """As two processes of four devices each."""
    cwd.mkdir(exist_ok=True)
    (cwd / "script.py").write_text(script)
    launch = [str(EXAMPLES / "launch.py"), "--processes", "2", "--devices", "4", "script.py"]
    return finished(*launch, cwd=cwd)


def finished(
    *arguments: str, cwd: Path | None, env: dict | None = None
) -> subprocess.CompletedProcess:
    env = {**(os.environ if env is None else env), "PYTHONPATH": str(EXAMPLES)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
