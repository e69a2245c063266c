"""Explains a traced step: what the GPU computed, what it waited for, and which kernels took how long.

    mcore-swift train RECIPE --runtime.profile_steps [5]
    python -m perf.trace RUN/profile/step-00000005.rank-00000.json [--top 15]

Reads the trace that a run with `runtime.profile_steps` writes (torch's profiler, Chrome's format). Streams run side by
side, so times of kinds may add up to more than the step: busy is when any kernel runs, communication alone when no
other kernel does. A GPU that idles between many kernels waits for its process to launch them. Exit code 2: not such a
trace, or one without a GPU's kernels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_swift.errors import EXIT_INPUT, InputError

Span = tuple[float, float]  # µs

# The first pattern that is found in a kernel's name, as cuBLAS, CUTLASS, cuDNN, FlashAttention and NCCL give them.
KINDS = (
    ("communication", r"nccl|userbuffers"),
    ("attention", r"attn|attention|fmha|sdpa|flash"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|wgmma|splitk|cublas"),
    ("copies", r"^memcpy|^memset"),
    ("optimizer", r"multi_tensor|adam"),
)
OTHER = "norms, activations and other"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LONG = 50.0  # µs without a kernel: more than what two launches lie apart


@dataclass(frozen=True)
class Kernel:
    name: str
    begin: float
    end: float

    @property
    def kind(self) -> str:
        return next((kind for kind, pattern in KINDS if re.search(pattern, self.name, re.IGNORECASE)), OTHER)


def union(spans: Iterable[Span]) -> list[Span]:
    """The spans without overlaps, rising."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def read(file: Path) -> list[dict[str, Any]]:
    """A trace's events that have a duration. Raises InputError for another file."""
    try:
        events = json.loads(file.read_text())["traceEvents"]
        return [event for event in events if event.get("ph") == "X"]
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("not a trace that torch's profiler wrote (JSON with traceEvents)") from error


def explain(events: Sequence[dict[str, Any]], *, top: int) -> dict[str, Any]:
    """What `text` shows; times in µs. Raises InputError where no GPU ran."""
    on_gpu = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels = [Kernel(event["name"], event["ts"], event["ts"] + event["dur"]) for event in on_gpu]
    if not kernels:
        raise InputError("no GPU's kernels are in it; trace a step of a run on a GPU")
    busy = union((kernel.begin, kernel.end) for kernel in kernels)
    computing = union((kernel.begin, kernel.end) for kernel in kernels if kernel.kind != "communication")
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(busy)]
    kinds: dict[str, list[Span]] = defaultdict(list)
    names: dict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        kinds[kernel.kind].append((kernel.begin, kernel.end))
        names[kernel.name].append(kernel.end - kernel.begin)
    calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    rows = sorted(((sum(times), len(times), name) for name, times in names.items()), reverse=True)
    return {
        "span": busy[-1][1] - busy[0][0],
        "busy": length(busy),
        "exposed": length(busy) - length(computing),
        "idle_short": sum(gap for gap in gaps if gap < LONG),
        "idle_long": sum(gap for gap in gaps if gap >= LONG),
        "long_gaps": sum(gap >= LONG for gap in gaps),
        "largest_gap": max(gaps, default=0.0),
        "launches": sum("Launch" in call["name"] for call in calls),
        "waiting": sum(call["dur"] for call in calls if call["name"] in WAITS),
        "kinds": {kind: (length(union(spans)), len(spans)) for kind, spans in kinds.items()},
        "kernels": rows[:top],
    }


def text(found: dict[str, Any]) -> str:
    """For a reader; milliseconds."""
    span = found["span"]

    def line(name: str, time: float, more: str = "") -> str:
        return f"{name:32} {time / 1e3:10.2f} ms {100 * time / span:6.1f} %  {more}".rstrip()

    gaps = f"{found['long_gaps']} of {LONG:g} µs and more, the longest {found['largest_gap'] / 1e3:.2f} ms"
    lines = [
        line("from first to last kernel", span),
        line("busy", found["busy"]),
        line("  communication alone", found["exposed"], "nothing computes meanwhile"),
        line("idle, short gaps", found["idle_short"], f"between {found['launches']} launches"),
        line("idle, long gaps", found["idle_long"], gaps),
        line("the process waits for the GPU", found["waiting"]),
        "",
        *(
            line(kind, time, f"{count} kernels")
            for kind, (time, count) in sorted(found["kinds"].items(), key=lambda item: -item[1][0])
        ),
        "",
        *(
            f"{time / 1e3:10.2f} ms {count:6} × {time / count:9.1f} µs  {name[:90]}"
            for time, count, name in found["kernels"]
        ),
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--top", type=int, default=15, help="kernels to list")
    options = parser.parse_args(words)
    try:
        print(text(explain(read(options.trace), top=options.top)))
    except InputError as error:
        print(f"perf.trace: error: {options.trace}: {error}", file=sys.stderr)
        return EXIT_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
