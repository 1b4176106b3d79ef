"""`make fuzz` (ARGS='SECONDS', 240 by default) runs each target for half of the time, and counts the inputs.

The corpus and the findings are in .fuzz, which git ignores. A finding of celery_decoder is a golden message without its
expected part; `add` of tools/golden.py makes it a permanent one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

from tools.golden import ROOT, corpus, read

TARGETS = ("from_wire", "celery_decoder")
HOME = ROOT / ".fuzz"
FINDINGS = HOME / "findings"
DEFAULT_SECONDS = 240
_EXECUTED = re.compile(r"^stat::number_of_executed_units: (\d+)$", re.MULTILINE)


def seed() -> None:
    """Give the target of texts the golden bodies and payloads as first inputs; the other target has them built in."""
    directory = HOME / "corpus" / "from_wire"
    for path in corpus():
        golden = read(path)
        (directory / f"{path.parent.name}-{path.stem}").write_bytes(b"\0" + golden.body)
    text = (
        b'\0{"task_name":"t","args":[1.5,null,"x"],"kwargs":{},"queue":"q","fairness":null,"task_id":"i","on_success":'
    )
    (directory / "plain").write_bytes(text + b'{"task_name":"s","kwargs":{"callback_kwargs":{}},"queue":"c"}}')


def run(target: str, seconds: int) -> tuple[int, bool]:
    """Run one target; return the number of inputs, and whether it succeeded."""
    directory = HOME / "corpus" / target
    limits = [f"-max_total_time={seconds}", "-max_len=2048", "-len_control=20", "-timeout=30", "-print_final_stats=1"]
    command = [
        sys.executable,
        "-m",
        f"fuzz.{target}",
        *limits,
        f"-artifact_prefix={FINDINGS}/{target}-",
        str(directory),
    ]
    environment = {**os.environ, "FUZZ_FINDINGS": str(FINDINGS)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
    if ended.returncode:
        print(ended.stderr[-4000:])
    found = _EXECUTED.search(ended.stderr)
    return int(found[1]) if found else 0, not ended.returncode


def main(arguments: list[str]) -> int:
    seconds = int(arguments[0]) if arguments else DEFAULT_SECONDS
    for target in TARGETS:
        (HOME / "corpus" / target).mkdir(parents=True, exist_ok=True)
    FINDINGS.mkdir(exist_ok=True)
    seed()
    before, well = set(FINDINGS.iterdir()), True
    for target in TARGETS:
        started = time.monotonic()
        executions, ended_well = run(target, max(1, seconds // len(TARGETS)))
        well = well and ended_well
        print(f"{target}: {executions:,} executions in {time.monotonic() - started:.0f} s")
    new = sorted(set(FINDINGS.iterdir()) - before)
    print(f"{len(new)} files of findings", *(str(path.relative_to(ROOT)) for path in new), sep="\n  ")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
