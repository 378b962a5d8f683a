#!/usr/bin/env python
"""The operators' tests on CPU kernels that AddressSanitizer and UndefinedBehaviorSanitizer watch.

    python tools/sanitize.py [--sets default avx2 avx512] [--tests tests/ops]
        [--profile many] [--jobs 2] [--output output/sanitize]

A copy of the sources is built in the output folder, with operators that are broken on purpose
(tests/ops/canary.cpp): each must be caught. Then all tests of the operators run on the CPU, once
for each instruction set of this processor, the properties of tests/ops/test_hostile.py with as many
examples as the profile has (tests/conftest.py). Logs, which have the sanitizers' reports, stay
there. Needs GCC and the extra ``test``; the exit status tells whether all is well.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETS = ["default", "avx2", "avx512"]
SANITIZERS = "address,undefined"
# What each broken operator does wrong, in the words of the sanitizers' reports.
CANARIES = {
    "read_beyond_tensor": "heap-buffer-overflow",
    "write_beyond_buffer": "heap-buffer-overflow",
    "overflow": "signed integer overflow",
    "whole_number_of_nan": "outside the range of representable values",
}
REPORT = re.compile(r"ERROR: AddressSanitizer.*|.*runtime error: .*")  # its first line
VERDICT = re.compile(r"\d+ (?:passed|failed|error).* in [\d.]+s.*")
# Compiled by other means: the CUDA code on the host, and what torch.compile writes.
NOT_OURS = "not emulated and not compiles and not cuda_build"


def copy_sources(tree: Path) -> None:
    """The checkout's sources, older and newer ones as they are; what was built from them stays."""
    for name in ("d2_deform", "csrc", "tests", "tools"):
        shutil.rmtree(tree / name, ignore_errors=True)
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "configs")
    for name in ("d2_deform", "csrc", "tests/ops", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "tests/conftest.py"):
        shutil.copy2(ROOT / name, tree / name)
    shutil.copy2(ROOT / "tests/ops/canary.cpp", tree / "csrc/cpu/canary.cpp")


def build(tree: Path, log: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "D2_DEFORM_SANITIZE": SANITIZERS}
    with log.open("w") as file:
        result = subprocess.run(command, cwd=tree, env=environment, stdout=file, stderr=file)
    if result.returncode != 0:
        raise SystemExit(f"sanitize: building with {SANITIZERS} failed, see {log}")


def runtime_environment(tree: Path) -> dict[str, str]:
    """Of a Python that the sanitizers watch: they come before all other libraries. Python itself
    leaks at its end, so leaks are not told; memory for absurd sizes is refused as it is elsewhere.
    """
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "2",
    }


def missed_canaries(environment: dict[str, str], tree: Path) -> list[str]:
    missed = []
    for name, words in CANARIES.items():
        call = f"torch.ops.d2_deform.canary_{name}(torch.full((37,), torch.nan))"
        command = [sys.executable, "-W", "ignore", "-c", f"import torch, d2_deform.ops; {call}"]
        result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if result.returncode == 0 or not any(
            words in told for told in REPORT.findall(result.stderr)
        ):
            missed.append(name)
    return missed


def run_tests(
    capability: str, args: argparse.Namespace, environment: dict[str, str], tree: Path
) -> tuple[int, str]:
    """Exit status and log of pytest, which leaves the sanitizers their stderr."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys"]
    command += ["-k", NOT_OURS, f"--hypothesis-profile={args.profile}", "-n", str(args.jobs)]
    log = args.output / f"{capability}.log"
    environment = {**environment, "D2_DEFORM_CPU_CAPABILITY": capability}
    with log.open("w") as file:
        result = subprocess.run(
            [*command, *args.tests], cwd=tree, env=environment, stdout=file, stderr=file
        )
    return result.returncode, log.read_text(errors="replace")


def main() -> None:
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", choices=SETS, help="(default: all of this processor)")
    parser.add_argument("--tests", nargs="+", default=["tests/ops"], help="(default: tests/ops)")
    parser.add_argument("--profile", default="many", help="of hypothesis (default: many)")
    parser.add_argument("--jobs", type=int, default=2, help="test processes (default: 2)")
    parser.add_argument("--output", type=Path, default=ROOT / "output/sanitize", metavar="FOLDER")
    args = parser.parse_args()
    from d2_deform.ops import cpu_capability

    args.output = args.output.resolve()
    tree = args.output / "tree"
    tree.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    print(f"sanitize: compiling with {SANITIZERS} ...", flush=True)
    copy_sources(tree)
    build(tree, args.output / "build.log")
    environment = runtime_environment(tree)
    missed = missed_canaries(environment, tree)
    print(f"sanitize: {len(CANARIES) - len(missed)} of {len(CANARIES)} broken operators caught")
    failed = [f"canary {name}" for name in missed]
    findings = 0
    for capability in args.sets or SETS[: SETS.index(cpu_capability()) + 1]:
        print(f"sanitize: tests with {capability} ...", flush=True)
        status, log = run_tests(capability, args, environment, tree)
        reports = REPORT.findall(log)
        findings += len(reports)
        told = VERDICT.findall(log) or ["pytest gave no verdict"]
        print("\n".join([f"sanitize: {capability}: {told[-1]}", *reports[:10]]), flush=True)
        failed += [capability] * (status != 0 or bool(reports))
    verdict = f"FAILED: {', '.join(failed)}" if failed else "passed"
    minutes = (time.monotonic() - start) / 60
    counts = f"{findings} reports, {minutes:.0f} minutes, logs in {args.output}"
    print(f"sanitize: {SANITIZERS}: {verdict}; {counts}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
