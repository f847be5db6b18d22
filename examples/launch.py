"""Runs a script as several processes of one program, on this machine.

    python examples/launch.py --processes 2 --devices 4 examples/train_digits.py

Each process has so many devices of its own (on a machine without accelerators: fake ones, which
share its cores). What the first one prints is shown; of the others, what they say when they fail.
On several machines start the script once on each instead, with the same three variables set.
"""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from typing import IO

# How long the others may take to end by themselves, once one has failed.
PATIENCE = 60


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="of each process")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    options = parser.parse_args(arguments)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    command = [sys.executable, options.script, *options.arguments]
    with contextlib.ExitStack() as files:
        processes = []
        for number in range(options.processes):
            environment = os.environ | {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(options.processes),
                "JAX_PROCESS_ID": str(number),
                "JAX_NUM_CPU_DEVICES": str(options.devices),
            }
            said = files.enter_context(tempfile.TemporaryFile("w+")) if number else None
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
            processes.append((process, said))
        return watch(processes)


def watch(processes: list[tuple[subprocess.Popen, IO[str] | None]]) -> int:
    """Waits for all; 1 if any failed, and the others with it."""
    first, deadline = None, float("inf")
    while time.monotonic() < deadline:
        codes = [process.poll() for process, _ in processes]
        if first is None and any(codes):
            first = next(number for number, code in enumerate(codes) if code)
            code, deadline = processes[first][0].returncode, time.monotonic() + PATIENCE
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            print(f"Process {first} ended with {how}; so will the others.", file=sys.stderr)
        if None not in codes:
            break
        time.sleep(0.1)
    for number, (process, said) in enumerate(processes):
        process.kill()
        if process.wait() and said is not None:
            said.seek(0)
            tail = "".join(said.readlines()[-20:])
            print(f"\nThe last that process {number} said:\n{tail}", file=sys.stderr)
    return 0 if first is None else 1


if __name__ == "__main__":
    sys.exit(main())
