""".ci/wheels: the wheel for Linux on x86-64 passes the kernels' tests without a compiler."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "wheels"

pytestmark = pytest.mark.slow


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="for Linux on x86-64"
)
def test_the_wheel_for_linux_passes_the_kernels_tests_without_a_compiler():
    done = subprocess.run(
        [sys.executable, SCRIPT, "linux-x86_64"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "manylinux_2_17_x86_64.whl: module " in done.stdout
    assert " passed" in done.stdout


def test_an_unknown_target_is_refused():
    done = subprocess.run([sys.executable, SCRIPT, "amiga"], capture_output=True, text=True)
    assert done.returncode == 2 and "no such target: amiga; there are linux-x86_64" in done.stderr
