"""Run the slow tests one file after the other; print a table of the results; exit with 1 if a test failed."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

PYTEST = [sys.executable, "-m", "pytest", "-n", "0", "-m", "slow"]
"""One process: a slow test may use every core."""
NO_TESTS = 5
"""Exit code of pytest if no test was selected."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of one file."""

    file: str
    tests: int
    failed: int
    skipped: int
    seconds: float
    exit_code: int

    @property
    def is_failure(self) -> bool:
        """True if a test failed, or pytest itself did."""
        return self.failed > 0 or self.exit_code not in (0, NO_TESTS)


def collect(arguments: list[str]) -> list[str]:
    """Return the files with slow tests, in order."""
    done = subprocess.run([*PYTEST, "--collect-only", "-q", *arguments], capture_output=True, text=True, check=False)
    if done.returncode not in (0, NO_TESTS):
        sys.exit(done.stdout + done.stderr)
    return list(dict.fromkeys(line.split("::")[0] for line in done.stdout.splitlines() if "::" in line))


def run(file: str) -> Result:
    """Run the slow tests of one file."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = subprocess.run([*PYTEST, file, f"--junitxml={report}"], check=False).returncode
        suite = ElementTree.parse(report).find("testsuite") if report.exists() else None
    counts = {
        key: int(suite.get(key, 0)) if suite is not None else 0 for key in ("tests", "failures", "errors", "skipped")
    }
    return Result(
        file=file,
        tests=counts["tests"],
        failed=counts["failures"] + counts["errors"],
        skipped=counts["skipped"],
        seconds=time.monotonic() - started,
        exit_code=code,
    )


def table(results: list[Result]) -> str:
    """Return the results as a table."""
    width = max(len(result.file) for result in results)
    lines = [f"{'file':{width}}  tests  passed  failed  skipped  seconds"]
    for result in results:
        passed = result.tests - result.failed - result.skipped
        mark = f"  FAILED (exit code {result.exit_code})" if result.is_failure else ""
        lines.append(
            f"{result.file:{width}}  {result.tests:5}  {passed:6}  {result.failed:6}  {result.skipped:7}  "
            f"{result.seconds:7.0f}{mark}"
        )
    lines.append(
        f"{'total':{width}}  {sum(result.tests for result in results):5}  "
        f"{sum(result.tests - result.failed - result.skipped for result in results):6}  "
        f"{sum(result.failed for result in results):6}  {sum(result.skipped for result in results):7}  "
        f"{sum(result.seconds for result in results):7.0f}"
    )
    return "\n".join(lines)


def main() -> int:
    """Run the tests and return the exit code."""
    results = [run(file) for file in collect(sys.argv[1:])]
    if not results:
        print("no slow tests")
        return 1
    print(table(results))
    return int(any(result.is_failure for result in results))


if __name__ == "__main__":
    sys.exit(main())
