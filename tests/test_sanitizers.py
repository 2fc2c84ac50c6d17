"""Native kernels touch nothing they may not: AddressSanitizer and UBSan watch tests/native/driver.cpp.

`make sanitize` runs this file alone.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bitkv import native

CSRC = Path(__file__).parents[1] / "bitkv" / "csrc"
DRIVER = Path(__file__).parent / "native" / "driver.cpp"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
ISAS = [] if native.why_not() else native.module().isas()
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
ADDRESS = ["-fsanitize=address", "-fno-sanitize-recover=all"]
# of the portable kernels and the threads: the instruction sets share all arithmetic with them, and it
# doubles the time to compile. Bad pointers are AddressSanitizer's
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize=null,pointer-overflow,object-size,vptr"]
# calls instead of inline checks, and no optimization: a third of the time to compile
OUTLINE = {
    "g++": ["--param", "asan-instrumentation-with-call-threshold=0"],
    "clang++": ["-mllvm", "-asan-instrumentation-with-call-threshold=0"],
}
ROUNDS = 45


def has_sanitizers(folder: Path) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() {}")
    command = [COMPILER, *ADDRESS, *UNDEFINED, source, "-o", folder / "empty"]
    built = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return built and subprocess.run([folder / "empty"], check=False).returncode == 0


@pytest.mark.sanitize
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: apt install g++")
@pytest.mark.skipif(not ISAS, reason=str(native.why_not()))
def test_no_access_out_of_bounds_and_no_undefined_behaviour(tmp_path):
    if not has_sanitizers(tmp_path):
        pytest.skip(f"{COMPILER} has no AddressSanitizer: apt install libasan8 libubsan1")
    sources = {
        DRIVER: [],
        CSRC / "parallel.cpp": UNDEFINED,
        CSRC / "cpu.cpp": UNDEFINED,
        CSRC / "isa_portable.cpp": UNDEFINED,
    }
    if "avx2" in ISAS:
        sources[CSRC / "isa_avx2.cpp"] = AVX2
    if "avx512vnni" in ISAS:
        sources[CSRC / "isa_avx512.cpp"] = AVX512
        sources[CSRC / "isa_amx.cpp"] = [*AVX512, "-mavx512vbmi"]
        sources[DRIVER] = ["-DWITH_AVX512"]
    common = ["-std=c++20", "-O0", "-g1", "-w", "-ffp-contract=off", f"-I{CSRC}", *ADDRESS]
    common += OUTLINE.get(Path(COMPILER).name, [])

    def compiled(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.o"
        subprocess.run([COMPILER, *common, *sources[source], "-c", source, "-o", target], check=True)
        return target

    def run(isa: str) -> subprocess.CompletedProcess:
        command = [program, isa, str(ROUNDS)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    program = tmp_path / "driver"
    slowest_first = sorted(sources, key=lambda source: -len(sources[source]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, slowest_first))
        subprocess.run(
            [COMPILER, *ADDRESS, *UNDEFINED, *objects, "-o", program, "-lpthread", "-ldl"], check=True
        )
        for isa, done in zip(ISAS, pool.map(run, ISAS), strict=True):
            assert done.returncode == 0, f"{isa}: {done.stderr}"
