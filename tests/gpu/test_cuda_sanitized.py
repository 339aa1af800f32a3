"""tests/gpu/test_cuda.py again, under AddressSanitizer and UBSan, and under ThreadSanitizer.

A process for each. A finding ends the process; tests/gpu/test_emulator.py shows that they find.
"""

import emulator
import pytest

# Both orders and layouts, sums, odd tails, gradients and the feed-forward block. TSan takes 20
# times as long as the plain run, so less of it there.
SHAPES = "every_order and (16x2 or 24x3 or 7x5 or 70x66) and not 200-"
SOME = {
    "address": f"({SHAPES} or feed_forward and odd) and (float16 or float32) and not bfloat",
    "thread": f"({SHAPES} or feed_forward and odd) and float16 and not bfloat",
}
MATH = {"address": ["float16", "float32"], "thread": ["float16"]}


def run(sanitizer, *arguments, watched=emulator.MATH):
    if reason := emulator.why_not(sanitizer):
        pytest.skip(reason)
    done = emulator.run_sanitized(sanitizer, ["tests/gpu/test_cuda.py", *arguments], watched)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("sanitizer", SOME)
def test_some_kernels(sanitizer):
    run(sanitizer, "-k", SOME[sanitizer], watched=MATH[sanitizer])


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SOME)
def test_every_kernel(sanitizer):
    run(sanitizer, "-k", "not of_the_presets and not compiler and not capture")
