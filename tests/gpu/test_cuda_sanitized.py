"""The emulated tests again, under AddressSanitizer with UBSan and under ThreadSanitizer.

Each runs in a process, which the first finding ends. test_emulator.py shows that they find bugs.
"""

import emulator
import pytest

# Both orders and layouts, sums, odd tails, gradients and the feed-forward block. TSan takes 20
# times as long as the plain run, so it runs fewer.
PRODUCTS = "(test_forward[ or test_gradients[) and (16x2-12x24 or 24x3 or 7x5-13x11 or 70x66)"
SHAPES = f"emulated and ({PRODUCTS} and not 200-emulated or feed_forward and 5x2-7x9)"
SOME = {
    "address": f"{SHAPES} and (emulated-float16 or emulated-float32)",
    "thread": f"{SHAPES} and emulated-float16",
}
TESTS = "tests/gpu/test_engines.py", "tests/gpu/test_cuda.py"
MATH = {"address": ["float16", "float32"], "thread": ["float16"]}


def run(sanitizer, *arguments, watched=emulator.MATH):
    if reason := emulator.why_not(sanitizer):
        pytest.skip(reason)
    done = emulator.run_sanitized(sanitizer, [*TESTS, *arguments], watched)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SOME)
def test_some_kernels(sanitizer):
    run(sanitizer, "-k", SOME[sanitizer], watched=MATH[sanitizer])


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SOME)
def test_every_kernel(sanitizer):
    presets = "(test_forward[ or test_gradients[) and 384"
    run(sanitizer, "-k", f"emulated and not (compiler or capture or nvcc) and not ({presets})")
