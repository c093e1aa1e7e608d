"""Ranks as one machine: sums and their gradients, a rank started by SLURM, a rank that is lost."""

import time

import pytest
import torch

from btpipe import runtime
from btpipe.errors import BtpipeError, MachineError
from btpipe.runtime.rank_env import find_rank_env, first_host

EXACT = 1e-14  # float64: the same few terms in another order
MERGED = 1e-12  # float64, means up to 30 and a variance of 100 of them
FLOAT32_ROUNDING = 2.0**-23  # of a number with 24 significant bits, relative


def rows(rank: int, seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def check_collectives() -> None:
    """Runs on each rank: values and gradients against what one process computes of all of them."""
    with runtime.start("cpu") as process:
        everyone = range(process.world_size)
        x = rows(process.rank, 1, 3, 2)
        expected = torch.stack([rows(r, 1, 3, 2) for r in everyone])
        torch.testing.assert_close(
            runtime.all_reduce_sum(x), expected.sum(0), rtol=EXACT, atol=EXACT
        )
        torch.testing.assert_close(runtime.gather(x), expected, rtol=0, atol=0)
        check_moments(process)

        assert runtime.any_rank(process.rank == process.world_size - 1)
        assert not runtime.any_rank(False)
        check_gradients(process)


def check_moments(process: runtime.Runtime) -> None:
    """Moments of rows that ranks share, and their gradient, against those of all rows at once."""
    shares = [rows(r, 1, 5, 3) + 10 * r for r in range(process.world_size)]
    whole = torch.cat(shares).requires_grad_()
    local = shares[process.rank].requires_grad_()
    variance, mean = torch.var_mean(local, 0, correction=0)
    merged = runtime.merge_moments(torch.stack([mean, variance]))
    variance, mean = torch.var_mean(whole, 0, correction=0)
    expected = torch.stack([mean, variance])
    torch.testing.assert_close(merged, expected, rtol=MERGED, atol=MERGED)
    # Each rank's loss weighs the moments with its own weights; the whole loss is the sum of theirs.
    weights = [rows(r, 2, 2, 3) for r in range(process.world_size)]
    (merged * weights[process.rank]).sum().backward()  # type: ignore[no-untyped-call]
    (expected * torch.stack(weights).sum(0)).sum().backward()  # type: ignore[no-untyped-call]
    assert whole.grad is not None
    theirs = whole.grad.chunk(process.world_size)[process.rank]
    torch.testing.assert_close(local.grad, theirs, rtol=MERGED, atol=MERGED)


def check_gradients(process: runtime.Runtime) -> None:
    """float32 gradients of two memory layouts: each the sum of all ranks'."""
    gradients = [
        torch.stack([rows(r, s, 4, 3, 5, 5) for r in range(process.world_size)]) for s in (4, 5)
    ]
    parameters = [torch.nn.Parameter(torch.zeros(4, 3, 5, 5)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient[process.rank].float()
    last = gradients[-1][process.rank].float().to(memory_format=torch.channels_last)
    parameters[-1].grad = last
    runtime.sum_gradients(parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        error = (parameter.grad.double() - gradient.sum(0)).abs()
        # One rounding of each rank's float32 and one in each sum: world_size of them at most.
        bound = process.world_size * FLOAT32_ROUNDING * gradient.abs().sum(0)
        assert (error <= bound * (1 + FLOAT32_ROUNDING)).all()


def test_four_ranks_sum_gather_and_merge_like_one_process() -> None:
    runtime.launch(4, check_collectives, ())


def wait_for_a_rank_that_hangs() -> None:
    with runtime.start("cpu", collective_seconds=2) as process:
        runtime.barrier()
        if process.rank == 1:
            time.sleep(60)
        runtime.gather_rows(torch.ones(2))


def test_a_rank_that_does_not_answer_is_named() -> None:
    with pytest.raises(MachineError, match=r"rank 1 was lost \(it does not answer\)"):
        runtime.launch(3, wait_for_a_rank_that_hangs, ())


def divide_by_zero() -> None:
    with runtime.start("cpu") as process:
        runtime.barrier()
        assert 1 / process.rank


def test_a_bug_in_one_rank_is_told_with_its_traceback() -> None:
    with pytest.raises(
        BtpipeError, match=r"a bug, met by rank 0:(.|\n)*ZeroDivisionError"
    ) as failed:
        runtime.launch(2, divide_by_zero, ())
    assert failed.value.exit_code == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[03-07,9],cpu1", "gpu03"),
        ("n[1,3]", "n1"),
        ("rack[2-3]-gpu,x", "rack2-gpu"),
        ("a-b.example.org", "a-b.example.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_task_of_a_slurm_step_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "SLURM_JOB_ID": "20003",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_STEP_NODELIST": "gpu[11-12]",
        "SLURM_CPUS_PER_TASK": "6",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_rank_env() is None  # the batch script, or a shell in an allocation
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    rank_env = find_rank_env()
    assert rank_env is not None
    assert (rank_env.rank, rank_env.world_size) == (5, 8)
    assert (rank_env.local_rank, rank_env.local_world_size) == (1, 4)
    assert (rank_env.address, rank_env.local_cores) == ("tcp://gpu11:12003", 6)
    monkeypatch.setenv("MASTER_ADDR", "head")
    monkeypatch.setenv("MASTER_PORT", "4000")
    assert (rank_env := find_rank_env()) is not None
    assert rank_env.address == "tcp://head:4000"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert find_rank_env() is None  # an interactive step of one task


def test_the_device_is_the_gpu_where_the_driver_shows_one() -> None:
    shown = runtime.gpu_count() > 0
    assert runtime.resolve_device("cpu") == "cpu"
    assert runtime.resolve_device("auto") == ("cuda" if shown else "cpu")
    if not shown:
        with pytest.raises(MachineError, match="the driver shows no GPU"):
            runtime.resolve_device("cuda")
