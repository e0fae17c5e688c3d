"""Ranks that a launcher starts, for real: joining, signals, a rank that dies, restarts, two nodes."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from tests.kills import gone, kill_all, killed_again_and_again, tree
from tests.ranks import free_port
from tests.tiny_runs import metrics, tiny_recipe
from tract_fast import checkpoint, launch, recipe as recipes, shard, train
from tract_fast.errors import UserError

START = [sys.executable, "-m", "tract_fast", "train"]
ALONE = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "SLURM_", "MASTER_"))}
ALONE |= {"OMP_NUM_THREADS": "1"}


def write(recipe, path):
    path.write_text(recipes.dump(recipe))
    return str(path)


def start(recipe, path, *words, command=START, **environment):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ALONE | environment}
    return subprocess.Popen([*command, write(recipe, path), *words], **options)


def wait_for(recipe, steps, process, seconds=120):
    file = train.Path(recipe.run.dir) / "metrics.jsonl"
    until = time.monotonic() + seconds
    while not (file.exists() and file.read_text().count("\n") >= steps):
        check(process, until)


def check(process, until):
    """Fail where a process has ended, or takes too long: it is ended then, and what it printed told."""
    if process.poll() is None and time.monotonic() > until:
        kill_all(tree(process.pid))
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)


def whole(tmp_path, recipe):
    """The metrics of the same run on two ranks that nobody disturbs."""
    again = tiny_recipe(tmp_path, "whole", **{"train__max_steps": recipe.train.max_steps, "checkpoint__every": 50})
    done = start(again, tmp_path / "whole.yaml", "--nproc", "2")
    printed, told = done.communicate(timeout=300)
    assert done.returncode == 0, told
    return metrics(tmp_path / "whole"), printed


def test_signals_and_faults(tmp_path):
    """One run on two ranks that meets everything: SIGUSR1, a rank that is killed twice, a launcher that is killed. Each
    time the next start goes on; in the end the metrics are those of a run that nobody disturbed."""
    recipe = tiny_recipe(tmp_path, train__max_steps=260, checkpoint__every=10)
    latest = lambda: int(checkpoint.latest(tmp_path / "run").name[-6:])  # noqa: E731

    process = start(recipe, tmp_path / "r.yaml", "--nproc", "2")
    wait_for(recipe, 25, process)
    process.send_signal(signal.SIGUSR1)
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 75 and "error" not in told, told
    assert "launching: " in printed and "torch.distributed.run --nproc-per-node 2" in printed
    done = metrics(tmp_path / "run")[-1]["step"]
    assert f"stopped after step {done} of 260" in printed and latest() == done

    process = start(recipe, tmp_path / "r.yaml", "--nproc", "2", "--run.max_restarts", "1")
    wait_for(recipe, done + 15, process)
    first = launch_children(process)
    kill_all(first[1:])
    wait_for_others(process, first)
    wait_for(recipe, metrics(tmp_path / "run")[-1]["step"] + 15, process)
    second = launch_children(process)
    began = time.monotonic()
    kill_all(second[:1])
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 1 and time.monotonic() - began < 40
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: rank 0 (process {second[0]}) was killed by SIGKILL (by the system, if it was short of memory); "
        "the same command goes on from the last checkpoint"
    ]
    assert printed.count("resume: going on after step") == 2, "at the start, and after the first kill"
    assert all(map(gone, second))

    process = start(recipe, tmp_path / "r.yaml", "--nproc", "2")
    wait_for(recipe, metrics(tmp_path / "run")[-1]["step"] + 15, process)
    ranks = launch_children(process)
    kill_all([process.pid])
    until = time.monotonic() + 60
    while not all(map(gone, ranks)) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(map(gone, ranks)) and latest() == metrics(tmp_path / "run")[-1]["step"], "they saved and left"

    process = start(recipe, tmp_path / "r.yaml", "--nproc", "2")
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert metrics(tmp_path / "run") == whole(tmp_path, recipe)[0]


def launch_children(process):
    return tree(process.pid)[1:]


def wait_for_others(process, before):
    until = time.monotonic() + 90
    while not (len(launch_children(process)) == 2 and not set(launch_children(process)) & set(before)):
        check(process, until)


def test_killed_at_random_instants_on_two_ranks(tmp_path):
    kills = killed_on_two_ranks(tmp_path, 3, 120)
    assert kills == 3


@pytest.mark.soak
def test_killed_many_times_on_two_ranks(tmp_path):
    """24 kills, in turn of all processes and of one rank; the metrics are those of a run that was never killed."""
    kills = killed_on_two_ranks(tmp_path, 24, 1500)
    print(f"{kills} kills")
    assert kills >= 20


def killed_on_two_ranks(tmp_path, most, steps):
    recipe = tiny_recipe(tmp_path, train__max_steps=steps, checkpoint__every=7)
    command = [*START, write(recipe, tmp_path / "r.yaml"), "--nproc", "2"]
    lines = tmp_path / "run" / "metrics.jsonl"
    progress = lambda: lines.read_text().count("\n") if lines.exists() else 0  # noqa: E731
    kills = killed_again_and_again(command, progress, most=most, rng=random.Random(0), within=0.6)
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    assert metrics(tmp_path / "run") == whole(tmp_path, recipe)[0]
    return kills


@pytest.mark.soak
def test_a_rank_that_hangs(tmp_path):
    """Stopped in place of a kernel that never ends: the others wait for run.timeout, and all are gone soon after."""
    recipe = tiny_recipe(tmp_path, train__max_steps=5000, run__timeout=10)
    process = start(recipe, tmp_path / "r.yaml", "--nproc", "2")
    wait_for(recipe, 10, process)
    ranks = launch_children(process)
    os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    _, told = process.communicate(timeout=120)
    print(f"all ended {time.monotonic() - began:.0f} s after a rank hung")
    assert process.returncode == 1 and all(map(gone, ranks))
    assert f"error: rank 1 (process {ranks[1]}) did not answer for run.timeout seconds and was ended" in told


def test_an_error_is_told_once(tmp_path):
    """Both ranks meet it; the launcher says it, with its exit code, and no traceback."""
    recipe = tiny_recipe(tmp_path, train__max_steps=3, train__lr=1e30, train__clip=None)
    process = start(recipe, tmp_path / "r.yaml", "--nproc", "2")
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in told
    assert len([line for line in told.splitlines() if "before the update" in line]) == 1, told
    assert "error: the " in told
    process = start(tiny_recipe(tmp_path, shard__replicate=3), tmp_path / "r.yaml", "--nproc", "2")
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert [x for x in told.splitlines() if x] == ["error: shard.replicate = 3: must divide the number of ranks, 2"]


def test_two_nodes_meet(tmp_path):
    """Two launchers with one rank each, as on two nodes, train as one process does."""
    recipe = tiny_recipe(tmp_path)
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "7"]
    nodes += ["--rdzv-endpoint", f"localhost:{free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *nodes, "-m", "tract_fast", "train"]
    both = [start(recipe, tmp_path / "r.yaml", "--run.nproc", "8", command=command) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert sum("ranks: 2, started by torchrun" in printed for printed, _ in ends) == 1
    near_one_process(tmp_path)


def test_a_rank_that_is_killed_on_one_of_two_nodes(tmp_path):
    """Both nodes start again, though only one of them counts the restart, and meet again."""
    recipe = tiny_recipe(tmp_path, train__max_steps=150, checkpoint__every=10, run__timeout=30)
    nodes = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "8",
        "--max-restarts",
        "1",
    ]
    nodes += ["--monitor-interval", "0.2", "--rdzv-endpoint", f"localhost:{free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *nodes, "-m", "tract_fast", "train"]
    both = [start(recipe, tmp_path / "r.yaml", "--run.nproc", "8", command=command) for _ in range(2)]
    wait_for(recipe, 30, both[0])
    kill_all(launch_children(both[1])[:1])
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert sum(printed.count("resume: going on after step") for printed, _ in ends) == 1
    assert metrics(tmp_path / "run") == whole(tmp_path, recipe)[0]


def test_ranks_that_share_a_gpu_are_refused():
    """Each of its own, by whatever number; GPUs of two nodes may be told apart by their host alone."""
    shard.refuse_shared([(0, "a", "x"), (1, "a", "y"), (2, "b", "x"), (3, "b", "y")])
    with pytest.raises(UserError, match="for rank 2 on a the GPU is that of rank 0: start one rank a GPU"):
        shard.refuse_shared([(0, "a", "x"), (1, "a", "y"), (2, "a", "x")])
    with pytest.raises(UserError, match="for rank 1 on a no GPU is left"):
        shard.refuse_shared([(0, "a", "x"), (1, "a", None)])


def test_each_start_has_a_name_of_its_own():
    """Rank 1 of the next start comes before rank 0 does, and finds all that the start before it left."""
    store = dist.HashStore()
    names = []
    for _ in range(3):
        found = {}
        others = [
            threading.Thread(target=lambda r=r, found=found: found.update({r: shard.name_of_start(store, r, 3, 20)}))
            for r in (1, 2)
        ]
        others[0].start()
        time.sleep(0.2)
        found[0] = shard.name_of_start(store, 0, 3, 20) if others[1].start() is None else None
        for other in others:
            other.join()
        assert len(set(found.values())) == 1 and len(found) == 3
        names.append(found[0])
    assert len(set(names)) == 3
    with pytest.raises(dist.DistStoreError, match="rank 1 has not met rank 0"):
        shard.name_of_start(store, 1, 3, 0.3)


def test_slurm_starts_the_ranks(tmp_path):
    """A task per rank: they join one another by what Slurm tells them."""
    recipe = tiny_recipe(tmp_path)
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(free_port())}
    tasks = [start(recipe, tmp_path / "r.yaml", SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **step) for i in range(2)]
    ends = [process.communicate(timeout=120) for process in tasks]
    assert [process.returncode for process in tasks] == [0, 0], ends
    assert "ranks: 2, started by Slurm" in ends[0][0] and not ends[1][0], "the main rank speaks"
    near_one_process(tmp_path)


def near_one_process(tmp_path):
    assert train.run(tiny_recipe(tmp_path, "one")) == 0
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "run"), strict=True):
        assert one.get("eval", one) == pytest.approx(two.get("eval", two), rel=1e-3, abs=1e-6)
    assert json.loads((checkpoint.latest(tmp_path / "run") / "state.json").read_text())["world"] == 2


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n7", "n7"), ("gpu[003-010,012],x", "gpu003"), ("a,b", "a"), ("dgx-1[2,4]", "dgx-12")],
)
def test_first_node_of_a_slurm_step(nodes, host):
    assert launch.slurm_endpoint({"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "41"}) == (host, 20041)
    given = {"SLURM_STEP_NODELIST": nodes, "MASTER_ADDR": "there", "MASTER_PORT": "5"}
    assert launch.slurm_endpoint(given) == ("there", 5)


def test_a_launcher_per_node_of_a_slurm_step():
    slurm = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_JOB_ID": "9"}
    words = " ".join(launch.command(train.Path("r.yaml"), 8, 2, slurm))
    assert "--nproc-per-node 8 --max-restarts 2" in words and "--standalone" not in words
    assert "--nnodes 4 --rdzv-backend c10d --rdzv-endpoint n1:20009 --rdzv-id 9 -m tract_fast train r.yaml" in words


def test_notes_of_an_earlier_start_are_not_read(tmp_path, monkeypatch):
    """Rank 0 is the cause of the first end and starts again; then rank 1 is, and only what it says counts."""
    monkeypatch.setenv(launch.NOTES, str(tmp_path))

    def at(rank, start):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(start))

    at(0, 0)
    assert launch.note(1, "the first end")
    assert launch.read_notes(tmp_path) == {0: {"code": 1, "message": "the first end", "lost": False, "hangs": False}}
    at(0, 1)
    launch.begin_note()
    assert launch.read_notes(tmp_path) == {}, "nothing is known of an end without a note"
    at(1, 1)
    assert launch.note(1, "the second end")
    assert launch.verdict({1: (1, 5)}, launch.read_notes(tmp_path)) == (1, "rank 1: the second end")
    # another node's failure starts ranks again without counting it here
    launch.begin_note()
    assert launch.read_notes(tmp_path) == {}


def test_a_launcher_keeps_its_own_recipe(tmp_path, monkeypatch):
    """Another one that is started in the same run.dir by mistake does not change what its ranks read at a restart."""
    first, second = tiny_recipe(tmp_path), tiny_recipe(tmp_path, train__lr=0.5)
    started, read = [], []

    def watch(words, notes, loud):
        started.append(words[-1])
        if len(started) == 1:  # the second comes while the first one's ranks train
            launch.launch(second, 2)
        read.append(recipes.load(words[-1], []))
        return 0

    monkeypatch.setattr(launch, "watch", watch)
    assert launch.launch(first, 2) == 0
    assert read == [second, first]
    assert not any(map(os.path.exists, started)), "removed at the end"


NOTE = {"code": 1, "message": "why", "lost": False, "hangs": False}
LOST = NOTE | {"message": "another rank has ended", "lost": True}


@pytest.mark.parametrize(
    ("ends", "notes", "code", "told"),
    [
        ({1: (-9, 5)}, {0: LOST}, 1, "rank 1 (process 5) was killed by SIGKILL"),
        ({1: (-9, 5)}, {0: LOST | {"hangs": True}}, 1, "rank 1 (process 5) did not answer for run.timeout seconds"),
        ({0: (1, 4), 1: (1, 5)}, {0: LOST, 1: NOTE}, 1, "rank 1: why"),
        ({0: (1, 4), 1: (1, 5)}, {0: LOST}, 1, "rank 1 (process 5) ended with exit code 1"),
        ({0: (1, 4)}, {0: LOST}, 1, "rank 0: another rank has ended"),
        ({0: (2, 4)}, {r: NOTE | {"code": 2} for r in (0, 1)}, 2, "why"),
        ({0: (-15, 4), 1: (1, 5)}, {1: NOTE}, 1, "rank 1: why"),
        ({}, {0: NOTE | {"code": 75, "message": ""}}, 75, ""),
        ({}, {}, 0, ""),
    ],
)
def test_which_rank_is_the_cause(ends, notes, code, told):
    found = launch.verdict(ends, notes)
    assert found[0] == code and (found[1].startswith(told) if told else found[1] == "")
