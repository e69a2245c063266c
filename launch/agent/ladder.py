"""What comes after an attempt: again on the same nodes, on a spare, in a new job, or not at all. Decisions, no deeds.

    restart inside the job → swap in a spare → requeue, or the successor job → stop

What was asked for (75), what the user must change (2) and what must never be tried again (93) leave the ladder at once,
and so does what would only happen again: a full disk, a loss that is not finite, no progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.agent.job import Job
from mcore_swift.errors import EXIT_FAILED, EXIT_INPUT, EXIT_NEVER_RESTART, EXIT_TRY_AGAIN

LONGEST_BACKOFF = 300.0
NODE_LOST = ("node lost", "agent did not start")  # the node itself, at once
NODE_SUSPECT = ("CUDA error", "NCCL timeout", "hang", "agent died")  # the node, if a spare is there


@dataclass(frozen=True, kw_only=True)
class Result:
    """How an attempt ended: what verdict.json says before anything is decided."""

    attempt: int
    outcome: str  # done, stopped, failed
    code: int  # of the attempt
    cause: str = ""
    message: str = ""
    rank: int | None = None  # the culprit, where there is one
    node: str | None = None
    step: int = 0
    checkpoint_before: int = 0  # the newest complete checkpoint's step, 0 for none
    checkpoint_after: int = 0
    started: float = 0.0  # Unix seconds
    ended: float = 0.0
    hosts: list[str] = field(default_factory=list)

    @property
    def progressed(self) -> bool:
        return self.checkpoint_after > self.checkpoint_before


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What comes next. `code` is the supervisor's exit code unless the action is restart."""

    action: str  # done, restart, requeue, stop
    reason: str
    code: int = 0
    hosts: list[str] = field(default_factory=list)  # of the next attempt
    exclude: list[str] = field(default_factory=list)  # nodes that a requeued job should not get again
    delay: float = 0.0  # seconds to wait first
    skip_steps: list[int] = field(default_factory=list)


def decide(
    job: Job,
    result: Result,
    *,
    earlier: Sequence[dict[str, Any]],
    hosts: Sequence[str],
    bad: Sequence[str],
    restarts: int,
    skip_steps: Sequence[int] = (),
    stop_requested: bool = False,
) -> Decision:
    """The next step after `result`.

    `earlier` are the verdicts of the run's attempts before this one, `hosts` all of this job's, in rank order, `bad`
    those given up already, `restarts` how often this job has restarted, `skip_steps` what is left out already.
    """
    if result.outcome == "done":
        return Decision(action="done", reason="done")
    if result.outcome == "stopped":
        return Decision(action="requeue", reason="stopped on request", code=EXIT_TRY_AGAIN, exclude=[*bad])
    if result.code == EXIT_NEVER_RESTART:
        return Decision(action="stop", reason="it must not be restarted", code=EXIT_NEVER_RESTART)
    if result.code == EXIT_INPUT or result.cause == "disk full":
        return Decision(action="stop", reason="to be put right first", code=EXIT_INPUT)
    skipped = list(skip_steps)
    rewinds = result.cause == "not finite" and job.bad_steps == "rewind"
    if result.cause == "not finite":
        if not rewinds or len(skipped) >= job.max_rewinds or result.step in skipped:
            return Decision(action="stop", reason="it would happen again", code=EXIT_FAILED)
        skipped.append(result.step)
    given_up = [*bad, *_given_up(result, earlier, hosts=hosts, bad=bad, nodes=job.nodes)]
    left = [host for host in hosts if host not in given_up]
    if stop_requested:
        return Decision(action="requeue", reason="a stop was asked for", code=EXIT_TRY_AGAIN, exclude=given_up)
    idle = 0 if rewinds else _without_progress(result, earlier)
    limits = [
        (idle >= job.max_without_progress, f"no checkpoint progress in {idle} attempts"),
        (restarts >= job.max_restarts, f"max_restarts {job.max_restarts} reached"),
        (len(earlier) + 1 >= job.max_attempts, f"max_attempts {job.max_attempts} reached"),
    ]
    for reached, reason in limits:
        if reached:
            return Decision(action="stop", reason=reason, code=EXIT_FAILED, exclude=given_up)
    if len(left) < job.nodes:
        reason = f"{len(left)} healthy nodes are left, {job.nodes} are needed"
        return Decision(action="requeue", reason=reason, code=EXIT_TRY_AGAIN, exclude=given_up, skip_steps=skipped)
    chosen = left[: job.nodes]
    return Decision(
        action="restart",
        reason=_where(chosen, result, skipped if rewinds else []),
        hosts=chosen,
        exclude=given_up,
        delay=backoff(job, idle),
        skip_steps=skipped,
    )


def backoff(job: Job, idle: int) -> float:
    """Seconds to wait after `idle` attempts in a row without progress: none after the first."""
    return 0.0 if idle < 2 else min(job.backoff_seconds * 2.0 ** (idle - 2), LONGEST_BACKOFF)


def _given_up(
    result: Result, earlier: Sequence[dict[str, Any]], *, hosts: Sequence[str], bad: Sequence[str], nodes: int
) -> list[str]:
    """The node of the failure, if it is the node's, or if it may be and there is a spare."""
    node = result.node
    if node is None or node in bad:
        return []
    spare = len([host for host in hosts if host not in bad]) > nodes
    again = bool(earlier) and earlier[-1].get("node") == node and earlier[-1].get("outcome") == "failed"
    lost = result.cause in NODE_LOST  # it is no use even without a spare
    return [node] if lost or (spare and (again or result.cause in NODE_SUSPECT)) else []


def _without_progress(result: Result, earlier: Sequence[dict[str, Any]]) -> int:
    """Failed attempts in a row, this one the last, that left no newer checkpoint."""
    count = 0
    for verdict in [*earlier, asdict(result)][::-1]:
        if verdict["outcome"] != "failed" or verdict["checkpoint_after"] > verdict["checkpoint_before"]:
            break
        count += 1
    return count


def _where(chosen: list[str], result: Result, skipped: list[int]) -> str:
    new = [host for host in chosen if host not in result.hosts]
    text = f"restarting on {', '.join(new)}" if new else "restarting"
    return text + (f" without the data of step {skipped[-1]}" if skipped else "")


def sentence(result: Result, decision: Decision) -> str:
    """The line for a person: attempt 2 died: rank 13 on n02, CUDA out of memory at step 840; restarting on n05."""
    if result.outcome == "done":
        return f"attempt {result.attempt} is done: step {result.step}"
    if result.outcome == "stopped":
        return f"attempt {result.attempt} stopped on request after step {result.step}; to be started again"
    who = f"rank {result.rank}" if result.rank is not None else ""
    where = f"on {result.node}" if result.node and who else result.node or ""
    subject = " ".join(word for word in (who, where) if word)
    cause = result.cause + (f" at step {result.step}" if result.step else "")
    ends = {"requeue": "to be requeued", "stop": "stopping"}
    action = decision.reason if decision.action == "restart" else f"{ends[decision.action]}: {decision.reason}"
    wait = f" in {decision.delay:.0f} s" if decision.delay >= 1 else ""
    return f"attempt {result.attempt} died: {', '.join(x for x in (subject, cause) if x)}; {action}{wait}"
