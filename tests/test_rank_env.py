"""Reading torchrun's and srun's variables."""

from __future__ import annotations

import pytest

from mcore_swift import rank_env
from mcore_swift.errors import InputError

SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_NODELIST": "login,node[01-03]",
    "SLURM_STEP_NODELIST": "node[01-02,07]-x",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def test_srun() -> None:
    assert rank_env.joined(SRUN) == {
        "RANK": "6",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "node01-x",
        "MASTER_PORT": "21436",
    }


def test_srun_respects_a_given_rendezvous() -> None:
    joined = rank_env.joined(SRUN | {"MASTER_ADDR": "fast-nic", "MASTER_PORT": "4000"})
    assert joined is not None and (joined["MASTER_ADDR"], joined["MASTER_PORT"]) == ("fast-nic", "4000")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {name: value for name, value in SRUN.items() if "STEP" not in name},  # a batch script
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell, one task a node
    ],
    ids=["plain", "rank_only", "batch_script", "one_task"],
)
def test_no_ranks_were_started(environment: dict[str, str]) -> None:
    assert rank_env.joined(environment) is None


def test_torchrun_wins_over_the_slurm_step_it_runs_in() -> None:
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert rank_env.joined(SRUN | torchrun) == torchrun


def test_half_a_torchrun_environment() -> None:
    with pytest.raises(InputError, match=r"RANK=1 and WORLD_SIZE=2 .* but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"):
        rank_env.joined({"RANK": "1", "WORLD_SIZE": "2"})
    alone = rank_env.joined({"RANK": "0", "WORLD_SIZE": "1"})
    assert alone is not None and alone["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node7", "node7"),
        ("node[01-03,07]-x", "node01-x"),
        ("a,b[1-2]", "a"),
        ("rack[1-2]node[3,4],z", "rack1node3"),
        ("gpu[007],cpu[1,2]", "gpu007"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert rank_env.first_host(nodelist) == host


def test_expand_counts() -> None:
    assert rank_env.expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert rank_env.expand_counts("8") == [8]
