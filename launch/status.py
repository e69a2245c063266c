"""`mcore-swift launch status RUN`: how a run is doing, read from its folder alone, by whoever may read it."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

from launch.agent.job import RunFolder, read_json
from mcore_swift.errors import InputError
from mcore_swift.training.checkpoint_folder import checkpoint_step, complete_checkpoints
from mcore_swift.training.metrics import FILE_NAME, read_metrics
from mcore_swift.training.progress import format_duration

FRESH_SECONDS = 30.0  # a supervisor writes progress.json every two seconds
RECENT_STEPS = 20


def status(run: Path, *, as_json: bool) -> int:
    """Prints the run's status. Raises InputError when the folder is not a launched run's."""
    found = run_status(run, now=time.time())
    print(json.dumps(found, indent=1) if as_json else _page(found))
    return 0


def run_status(run: Path, *, now: float) -> dict[str, Any]:
    """The status as plain values; times in seconds, `now` in Unix seconds.

    `goodput` is the time spent in steps that the run still stands on, over all time since the first attempt began,
    waiting in the queue included.
    """
    folder = RunFolder(run)
    folder.job()  # raises InputError when this is no launched run
    attempts, verdicts = folder.attempts(), folder.verdicts()
    newest = folder.attempt(attempts[-1]) if attempts else None
    progress = (read_json(newest / "progress.json") if newest else None) or {}
    last = verdicts[-1] if verdicts else None
    open_attempt = newest is not None and not (newest / "verdict.json").exists()
    rows = [row for row in _metrics(run / FILE_NAME) if row.get("loss") is not None]
    step = max([int(progress.get("step") or 0) if open_attempt else 0, *(row["step"] for row in rows[-1:])])
    state = _state(open_attempt, progress, last, now=now)
    began = [path.stat().st_ctime for path in [folder.path / "job.json"]]
    began += [verdict["started"] for verdict in verdicts if verdict.get("started")]
    ended = now if state == "running" or not last else float(last.get("ended") or now)
    wall = max(ended - min(began), 1e-9)
    total = progress.get("total")
    seconds = [row["seconds"] for row in rows[-RECENT_STEPS:]]
    left = None if total is None or not seconds else (total - step) * statistics.median(seconds)
    saved = complete_checkpoints(run / "checkpoints")
    return {
        "run": str(folder.path),
        "state": state,
        "step": step,
        "total_steps": total,
        "loss": rows[-1]["loss"] if rows else None,
        "eta_seconds": left if state == "running" else None,
        "checkpoint": checkpoint_step(saved[-1]) if saved else None,
        "attempts": len(attempts),
        "goodput": min(1.0, sum(row["seconds"] for row in rows) / wall),
        "nodes": progress.get("nodes", {}),
        "phases": progress.get("phases", {}) if open_attempt else {},
        "slow": progress.get("slow", {}),
        "last_verdict": last["line"] if last else None,
        "verdicts": [verdict["line"] for verdict in verdicts],
    }


def _state(open_attempt: bool, progress: dict[str, Any], last: dict[str, Any] | None, *, now: float) -> str:
    if open_attempt:
        fresh = not progress or now - float(progress.get("time", 0.0)) < FRESH_SECONDS
        return "running" if fresh else "dead"  # its supervisor vanished: requeued runs go on from here
    actions = {"done": "done", "restart": "restarting", "requeue": "to be requeued", "stop": "failed"}
    return actions[last["action"]] if last else "prepared"


def _metrics(path: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(path)
    except (OSError, InputError):
        return []


def _page(found: dict[str, Any]) -> str:
    total = f"/{found['total_steps']}" if found["total_steps"] else ""
    loss = f", loss {found['loss']:.4f}" if found["loss"] is not None else ""
    saved = f"step {found['checkpoint']}" if found["checkpoint"] is not None else "none"
    rows = [
        ("run", found["run"]),
        ("state", found["state"]),
        ("step", f"{found['step']}{total}{loss}"),
        ("checkpoint", saved),
        ("attempts", str(found["attempts"])),
        ("goodput", f"{100 * found['goodput']:.0f}% of the time since the start"),
    ]
    if found["eta_seconds"] is not None:
        rows.insert(3, ("ETA", format_duration(found["eta_seconds"])))
    for measure, report in found["slow"].items():
        for rank in report["slow"]:
            where = f"rank {rank['rank']} on {rank['node']}: {rank['ratio']} × the median of {measure}"
            rows.append(("slow", where))
    if found["last_verdict"]:
        rows.append(("verdict", found["last_verdict"]))
    return "\n".join(f"{name:<11}{text}" for name, text in rows)
