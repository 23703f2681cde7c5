"""All tests, in as many processes as there are cores:

    python -m tests [what `pytest` takes]

A test is mostly small tensors, on which a second thread is wasted. Every process takes the next file that none has
taken (`conftest.py`); the first shows what it does, the others at their end. It ends with the largest exit status.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NOTHING_LEFT = 5  # pytest's exit status where it ran no test


def main(flags: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TAKEN_TESTS": folder, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", *flags]
        processes, outputs = [], [None]
        for n in range(os.cpu_count() or 1):
            if n:
                outputs.append((Path(folder) / f"output {n}").open("w+"))
            processes.append(subprocess.Popen(command, env=environment, stdout=outputs[n], stderr=outputs[n]))
        statuses = [process.wait() for process in processes]
        for output in outputs[1:]:
            output.seek(0)
            print(output.read())
            output.close()
    # One that a signal ended has a status below 0.
    ran = [status for status in statuses if status != NOTHING_LEFT]
    return max(map(abs, ran), default=NOTHING_LEFT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
