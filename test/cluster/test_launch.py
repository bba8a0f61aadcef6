"""launch.py: who is started with what, how it ends, and that nothing is left behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from dist_runs import ROOT, Launched, command_of, marked, wait_for

from cluster import agent, hosts, rendezvous
from cluster.watch import Watch
from glore_common import GloReError, UsageError
from jobs import launch

WORKER = """
import os, signal, subprocess, sys, time
worker, mode = os.environ["DMLC_TASK_ID"], sys.argv[1]
print("worker", worker, "of", os.environ["DMLC_WORKER_COUNT"], *sys.argv[2:], flush=True)
if mode == "fail" and worker == "1":
    print("what went wrong", flush=True)
    sys.exit(int(sys.argv[2]))
if mode == "die" and worker == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "chain":
    # Worker 0 fails as a consequence of worker 1's death, and is noticed first.
    if worker == "1":
        subprocess.Popen(["sleep", "100"])
        open("dying", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    while not os.path.exists("dying"):
        time.sleep(0.001)
    sys.exit(9)
if mode == "where":
    print(sys.executable)
    for name in ("PATH", "SOME", "CUDA_VISIBLE_DEVICES"):
        print(f"{name}={os.environ.get(name)}")
    sys.exit()
if mode == "slow":
    time.sleep(6)
    sys.exit()
if mode == "family":
    # A child of its own, and an orphan in a session of its own.
    subprocess.Popen(["sleep", "100"])
    subprocess.run(["sh", "-c", "setsid sleep 100 & echo"])
    print("started", flush=True)
if mode == "save":
    def save(number, frame):
        open(f"saved-{worker}", "w").write(str(number))
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
    print("ready", flush=True)
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
if mode == "once" and not os.path.exists(f"was-here-{worker}"):
    open(f"was-here-{worker}", "w").close()
    sys.exit(7)
if mode not in ("ok", "once", "orphan"):
    time.sleep(100)
if mode == "orphan":
    subprocess.run(["sh", "-c", "setsid sleep 100 & echo"])
print("done", worker, flush=True)
"""


@pytest.fixture
def job(tmp_path):
    """Return a function that launches the worker above with a mode: (options, mode, words)."""
    (tmp_path / "worker.py").write_text(WORKER)
    running = []

    def start(options, *words, env=None, python=sys.executable):
        command = (python, tmp_path / "worker.py", *words)
        running.append(Launched(tmp_path, *options, "--", *command, env=env))
        return running[-1]

    yield start
    for launched in running:
        if launched.process.poll() is None:
            launched.process.kill()
            launched.process.communicate()
        for pid in marked(launched.mark):
            agent.kill(pid)


def test_every_process_has_a_log_and_worker_0_the_terminal(job):
    done = job(("-n", 3, "-s", 0), "ok", "a b", "'").finish(0)
    assert done.out == "worker 0 of 3 a b '\ndone 0\n"
    for worker in range(3):
        assert done.log(f"worker-{worker}") == f"worker {worker} of 3 a b '\ndone {worker}\n"
    logs = [f"worker-{number}.log" for number in range(3)]
    assert sorted(os.listdir(done.log_dir)) == ["heartbeat", "launcher.log", *logs]
    assert "ended well" in done.log("launcher")


def test_a_failed_worker_ends_the_job_and_is_named(job):
    started = time.monotonic()
    done = job(("-n", 2, "-s", 0), "fail", 5).finish(5)
    assert time.monotonic() - started < 30
    assert re.search(r"worker 1 \(process \d+\) failed with exit code 5", done.err)
    assert "what went wrong" in done.err


def test_a_killed_worker_ends_the_job_and_is_named(job):
    done = job(("-n", 2, "-s", 0), "die").finish(1, seconds=30)
    assert re.search(r"worker 1 \(process \d+\) was killed by signal 9 \(SIGKILL\)", done.err)


def test_of_two_failures_the_first_is_named(job):
    done = job(("-n", 2, "-s", 0), "chain").finish(1, seconds=30)
    assert re.search(r"ended after .*: worker 1 .* was killed by signal 9", done.err)


def test_a_killed_agent_ends_the_job(job):
    launched = job(("-n", 2, "-s", 0), "family")
    launched.wait_for_log("worker-1", "started")
    agents = [pid for pid in marked(launched.mark) if "agent.py" in command_of(pid)]
    assert len(agents) == 2
    agent.kill(agents[1])
    done = launched.finish(1, seconds=30)
    assert re.search(r"worker [01].* is gone: its agent ended by signal 9", done.err)


def test_nothing_outlives_a_killed_launcher(job):
    launched = job(("-n", 2, "-s", 0), "family")
    for worker in range(2):
        launched.wait_for_log(f"worker-{worker}", "started")
    # Launcher; and for each worker: agent, worker, child, orphan.
    assert len(marked(launched.mark)) == 9
    launched.signal(signal.SIGKILL)
    launched.process.communicate()
    wait_for(lambda: not marked(launched.mark), 20, "the end of all processes")


def test_what_a_worker_leaves_running_is_ended(job):
    done = job(("-n", 1, "-s", 0), "orphan").finish(0, seconds=30)
    assert "done 0" in done.out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_workers_save(job, tmp_path, number):
    launched = job(("-n", 2, "-s", 0), "save")
    for worker in range(2):
        launched.wait_for_log(f"worker-{worker}", "ready")
    launched.signal(number)
    done = launched.finish(128 + number, seconds=30)
    assert signal.Signals(number).name in done.err
    for worker in range(2):
        assert (tmp_path / f"saved-{worker}").read_text() == str(int(number))


def test_the_time_to_save_is_limited(job):
    launched = job(("-n", 1, "-s", 0, "--grace", 1), "deaf")
    launched.wait_for_log("worker-0", "ready")
    launched.signal(signal.SIGTERM)
    launched.finish(143, seconds=20)


def test_a_failed_job_starts_again_and_resumes(job):
    done = job(("-n", 2, "-s", 0, "--max-restarts", 2), "once", "--resume=none").finish(0)
    assert "Restart 1 of 2" in done.err
    assert "Restart 2" not in done.err
    assert "worker 0 of 2 --resume=none\n" in done.out
    assert "worker 0 of 2 --resume auto\n" in done.out


def test_restarts_are_counted_and_wrong_usage_is_not_repeated(job):
    done = job(("-n", 2, "-s", 0, "--max-restarts", 1), "fail", 3).finish(3)
    assert done.err.count("failed with exit code 3") == 2
    done = job(("-n", 2, "-s", 0, "--max-restarts", 3), "fail", 2).finish(2)
    assert "Restart" not in done.err


def test_a_taken_port_is_said(job):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = job(("-n", 1, "-s", 1, "--port", port), "ok").finish(1)
    assert f"the scheduler cannot have 127.0.0.1:{port}: Address already in use" in done.err


def test_a_standstill_is_said_and_can_end_the_job(job):
    options = ("-n", 1, "-s", 0, "--stall-warning", 1, "--stall-limit", 3)
    done = job(options, "deaf").finish(1, seconds=30)
    assert "WARNING: No progress for 1 s: no worker reports what it does" in done.err
    assert re.search(r"ERROR: .*No progress for [34] s", done.err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "2"], "comes after --"),
        (["-n", "2", "--"], "no command after --"),
        (["-n", "2", "--", "no-such-program"], "no-such-program"),
        (["-n", "1", "--job", "../x", "--", "true"], "no name for a folder"),
        (["-s", "1", "--", "true"], "say how many workers: -n N"),
        (["-n", "1", "--env", "GLORE_NONE", "--", "true"], "--env GLORE_NONE: there is no such"),
        (["--launcher", "ssh", "-H", "/none/Hosts", "-n", "1", "--", "true"], "/none/Hosts"),
    ],
)
def test_wrong_usage(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(message)):
        launch.main(words)


def test_the_command_of_a_restart():
    again = ["--resume", "auto"]
    command = ["python", "t.py", "--resume", "x", "--overwrite", "--lr", "1", "--resume-epoch=3"]
    assert launch.restarted(command, again) == ["python", "t.py", "--lr", "1", *again]
    command = ["t.py", "--overwrite", "True", "--load-epoch", "-1", "--keep", "2"]
    assert launch.restarted(command, again) == ["t.py", "--keep", "2", *again]
    assert launch.restarted(["a", "--resume", "b"], []) == ["a", "--resume", "b"]


def test_hosts_file(tmp_path):
    path = tmp_path / "Hosts"
    path.write_text("# two\n\nnode1 slots=2  # big\nme@node2\n")
    listed = hosts.read_hosts(path)
    assert listed == [hosts.Host("node1", 2), hosts.Host("me@node2", 1)]
    workers, servers = hosts.place(listed, 3, 3)
    assert [host.name for host in workers] == ["node1", "node1", "me@node2"]
    assert [host.name for host in servers] == ["node1", "me@node2", "node1"]
    with pytest.raises(UsageError, match="4 workers, but the hosts have 3 slots"):
        hosts.place(listed, 4, 1)
    for text in ("node1 slots=0\n", "-oProxyCommand=x\n", "a b\n"):
        path.write_text(text)
        with pytest.raises(UsageError, match=f"{re.escape(str(path))}:1: "):
            hosts.read_hosts(path)
    path.write_text("a\na\n")
    with pytest.raises(UsageError, match=":2: a is there twice"):
        hosts.read_hosts(path)
    path.write_text("\n")
    with pytest.raises(UsageError, match="names no host"):
        hosts.read_hosts(path)


def test_members_of_slurm_and_mpi():
    slurm = {"SLURM_PROCID": "3", "SLURM_JOB_ID": "77", "SLURM_STEP_NUM_TASKS": "8"}
    assert hosts.member("slurm", slurm) is None  # within sbatch, not within srun
    step = {**slurm, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "4"}
    assert hosts.member("slurm", step) == hosts.Member(3, 8, "slurm-77-0", 4)
    assert hosts.member("mpi", step) is None
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_NAMESPACE": "5"}
    assert hosts.member("mpi", mpi) == hosts.Member(1, 2, "mpi-5", None)
    here = {**mpi, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert hosts.member("mpi", here).machines == 1
    pmi = {"PMI_RANK": "0", "PMI_SIZE": "2"}
    assert hosts.member("mpi", pmi) == hosts.Member(0, 2, None, None)
    with pytest.raises(UsageError, match="incomplete"):
        hosts.member("mpi", {"PMI_RANK": "0"})
    with pytest.raises(UsageError, match="PMI_RANK=2 does not fit PMI_SIZE=2"):
        hosts.member("mpi", {**pmi, "PMI_RANK": "2"})


def test_roles(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    options = launch.LaunchOptions(job="j", remote_python="/far/python")
    places = ["a", "a", "b"], ["a", "b"]
    scheduler, *rest = launch.roles_of(options, ["run"], {"X": "1"}, "10.0.0.1", places)
    assert (scheduler.kind, scheduler.host, scheduler.task.root_port) == ("scheduler", "a", 0)
    assert scheduler.task.command == ["/far/python", "-m", "jobs.parameter_server"]
    assert scheduler.task.env["PYTHONPATH"] == f"{ROOT}{os.pathsep}/theirs"
    assert [(r.name, r.host) for r in rest] == [
        ("server 0", "a"),
        ("server 1", "b"),
        ("worker 0", "a"),
        ("worker 1", "a"),
        ("worker 2", "b"),
    ]
    worker = rest[-1]
    expected = {
        "X": "1",
        "GLORE_JOB": "j",
        "DMLC_ROLE": "worker",
        "DMLC_TASK_ID": "2",
        "DMLC_WORKER_COUNT": "3",
        "DMLC_NUM_WORKER": "3",
        "DMLC_NUM_SERVER": "2",
        "DMLC_PS_ROOT_URI": "10.0.0.1",
    }
    assert worker.task.env == expected
    assert (worker.task.command, worker.task.root_port, worker.task.workers_here) == (
        ["run"],
        None,
        1,
    )
    assert rest[2].task.workers_here == 2
    local = launch.roles_of(options, ["run"], {}, hosts.LOOPBACK, ([None], [None]))
    assert {role.task.env["DMLC_NODE_HOST"] for role in local} == {"127.0.0.1"}


def test_an_installed_launcher_starts_modules_of_its_package(monkeypatch, stand_ins):
    monkeypatch.setenv("PATH", stand_ins["PATH"])
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    monkeypatch.setattr(launch, "__package__", "glore.jobs")
    options = launch.LaunchOptions(launcher="slurm", num_workers=2, job="j", log_dir="/l")
    server = launch.roles_of(options, ["run"], {}, hosts.LOOPBACK, ([None], [None]))[0]
    assert server.task.command[1:] == ["-m", "glore.jobs.parameter_server"]
    assert server.task.env["PYTHONPATH"] == "/theirs"
    words = launch.starter_command(options, ["-n", "2"], ["glore", "train-kinetics"], {})
    own = words[words.index("-m") :]
    assert own[:4] == ["-m", "glore.jobs.launch", "-n", "2"]
    assert own[own.index("--") :] == ["--", "glore", "train-kinetics"]


def a_worker(number, host=None, sees=None):
    return SimpleNamespace(role=SimpleNamespace(index=number, host=host), sees=sees)


def test_the_watch_names_the_worker_that_the_others_wait_for():
    now, reports = [0.0], {0: None, 1: None}
    watch = Watch(reports.get, 2, 10, 100, clock=lambda: now[0])
    children = [a_worker(n) for n in range(2)]
    messages = []

    def look(at):
        now[0] = at
        return watch(children)

    def report(worker, step, doing, ticks):
        reports[worker] = {"step": step, "doing": doing, "ticks": ticks}

    watch_log = launch.logging.getLogger("glore.cluster")
    handler = launch.logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    watch_log.addHandler(handler)
    try:
        report(0, 4, "exchange", 1)
        report(1, 4, "input", 1)
        for second in (1, 5, 10):
            assert look(second) is None
        assert not messages
        assert look(12) is None
        assert "worker 0: step 4, exchange for 11 s" in messages[0]
        assert messages[0].endswith("The others wait for worker 1")
        look(15)
        assert len(messages) == 1
        look(23)
        assert len(messages) == 2
        report(1, 4, "exchange", 2)
        look(24)
        look(40)
        assert "All of them wait: a server or the scheduler does not answer" in messages[-1]
        report(0, 5, "input", 2)
        report(1, 5, "input", 3)
        before = len(messages)
        look(45)
        assert len(messages) == before
        assert "No progress for 101 s" in look(146).message
    finally:
        watch_log.removeHandler(handler)


def test_the_watch_does_not_judge_what_it_cannot_see(caplog):
    now = [0.0]
    watch = Watch({}.get, 3, 10, 100, clock=lambda: now[0])
    far = [a_worker(0, "near", True), a_worker(1, "far", False), a_worker(2, "far", False)]
    with caplog.at_level("WARNING", "glore.cluster"):
        assert watch(far) is None
        now[0] = 200.0
        assert watch(far[1:]) is None
    assert len(caplog.messages) == 1
    assert "The log folder is not shared with far" in caplog.messages[0]
    assert "No progress for 200 s: no worker reports what it does" in watch(far).message


def test_an_agent_that_hears_nothing_ends_its_process(tmp_path):
    task = {
        "command": ["sleep", "100"],
        "env": {},
        "folder": str(tmp_path),
        "silence": 0.5,
    }
    process = subprocess.Popen(
        [sys.executable, agent.__file__], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdin.write(json.dumps(task).encode() + b"\n")
    process.stdin.flush()
    news = [json.loads(line) for line in process.stderr]
    assert process.wait(20) == 0
    process.stdin.close()
    assert news[1:] == [{"error": "nothing was heard of the launcher for 0.5 s"}, {"exit": -9}]
    assert "pid" in news[0]
    assert not os.path.exists(f"/proc/{news[0]['pid']}")


needs_mpirun = pytest.mark.skipif(not shutil.which("mpirun"), reason="mpirun is not installed")
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@needs_mpirun
def test_a_signal_to_mpirun_lets_the_workers_save(job, tmp_path):
    options = ("--launcher", "mpi", "--starter-option=--oversubscribe", "-n", 2, "-s", 0)
    launched = job(options, "save", env=MPI)
    for worker in range(2):
        launched.wait_for_log(f"worker-{worker}", "ready")
    launched.signal(signal.SIGTERM)
    launched.finish(143, seconds=30)
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


@needs_mpirun
def test_mpirun(job):
    options = ("--launcher", "mpi", "--starter-option=--oversubscribe", "-n", 2, "-s", 0)
    done = job(options, "ok", env=MPI).finish(0)
    assert "worker 0 of 2" in done.out
    assert done.log("worker-1") == "worker 1 of 2\ndone 1\n"
    done = job(options, "die", env=MPI).finish(1, seconds=30)
    assert "worker 1" in done.err + done.out
    assert "was killed by signal 9" in done.err + done.out


STARTER = """#!{python}
# What srun and mpirun do, on one machine: as many processes, numbered by environment variables.
import os, subprocess, sys
words, env = sys.argv[1:], dict(os.environ)
if sys.argv[0].endswith("srun"):
    assert "--kill-on-bad-exit=1" in words
    count = int(words[0].split("=")[1])
    while words[0].startswith("--"):
        del words[0]
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    env.update(SLURM_STEP_ID="0", SLURM_JOB_ID="12", SLURM_STEP_NUM_NODES="1")
else:
    # On other machines a login's environment, and -x.
    env = dict(PATH="/usr/bin:/bin", PMIX_NAMESPACE="5")
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    count = int(words[1])
    del words[:2]
    while words[0] == "-x":
        env.update([words[1].split("=", 1)])
        del words[:2]
tasks = []
for rank in range(count):
    own = dict(env, **dict(zip(names, (str(rank), str(count)))))
    tasks.append(subprocess.Popen(words, env=own))
codes = []
while tasks and not any(codes):
    pid, status = os.wait()
    codes.append(os.waitstatus_to_exitcode(status))
    tasks = [task for task in tasks if task.pid != pid]
for task in tasks:
    task.terminate()
sys.exit(max(codes))
"""


SSH = """#!{python}
# What ssh does, on one machine: a login's environment. The folder UNSHARED is not there.
import os, subprocess, sys
if "-G" in sys.argv:
    sys.exit("hostname 127.0.0.1")
unshared = os.environ.get("UNSHARED", "/none")
words = ["sed", "-u", f"s|{{unshared}}|/nowhere|g"]
sed = subprocess.Popen(words, stdout=subprocess.PIPE)
env = dict(PATH="/usr/bin:/bin")
sys.exit(subprocess.run(["sh", "-c", sys.argv[-1]], stdin=sed.stdout, env=env).returncode)
"""


@pytest.fixture
def stand_ins(tmp_path):
    """Make programs that stand in for ssh, srun and mpirun; return the environment with them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", STARTER), ("mpirun", STARTER), ("ssh", SSH)):
        (folder / name).write_text(text.format(python=sys.executable))
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("launcher", ["ssh", "mpi", "slurm"])
def test_other_machines_have_the_launchers_python_path_and_variables(
    job, tmp_path, stand_ins, launcher
):
    (tmp_path / "Hosts.two").write_text("one\ntwo\n")
    options = ("--launcher", launcher, "-n", 2, "-s", 0, "--env", "SOME=a 'b'", "--env", "HOME")
    options += ("-H", "Hosts.two") if launcher == "ssh" else ()
    done = job(options, "where", env=stand_ins, python="python").finish(0)
    shown = [sys.executable, f"PATH={stand_ins['PATH']}", "SOME=a 'b'"]
    for worker in range(2):
        assert done.log(f"worker-{worker}").splitlines()[1:4] == shown


def test_a_worker_whose_heartbeat_cannot_be_seen_is_not_ended(job, tmp_path, stand_ins):
    (tmp_path / "Hosts").write_text("one\ntwo\n")
    options = ("--launcher", "ssh", "-n", 2, "-s", 0, "--stall-warning", 1, "--stall-limit", 2)
    env = {**stand_ins, "UNSHARED": str(tmp_path / "logs")}
    done = job(options, "slow", env=env).finish(0)
    for host in ("one", "two"):
        assert done.err.count(f"The log folder is not shared with {host}") == 1
    assert "No progress" not in done.err
    # Where it could be seen, there is none.
    done = job(options, "slow", env=stand_ins).finish(1)
    assert "not shared" not in done.err
    assert "No progress" in done.err


def test_a_job_name_used_again_does_not_join_the_last_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.3)
    for name, value in (("PROCID", "1"), ("STEP_NUM_TASKS", "2"), ("STEP_ID", "0")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    joined = []
    monkeypatch.setattr(
        launch, "run_roles", lambda options, *more: joined.append(options.port) or None
    )
    folder = str(tmp_path / "logs")
    words = ["--launcher", "slurm", "-n", "2", "--job", "same", "--log-dir", folder, "--", "true"]

    # Slurm started the job again: the dead run's number was the same.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    not_ours = pytest.raises(GloReError, match="did not come from this run within 0.3 s")
    with rendezvous.published(folder, "slurm-12-0-0", "127.0.0.1", 1111), not_ours:
        launch.main(words)
    with rendezvous.published(folder, "slurm-12-0-1", "127.0.0.1", 2222):
        assert launch.main(words) == 0
    assert not os.path.exists(tmp_path / "logs" / "address.json")
    # The launcher has given each attempt a name.
    monkeypatch.setenv("GLORE_RUN", "new")
    with rendezvous.published(folder, "old", "127.0.0.1", 3333), pytest.raises(GloReError):
        launch.main(words)
    with rendezvous.published(folder, "new", "127.0.0.1", 4444):
        assert launch.main(words) == 0
    assert joined == [2222, 4444]


def test_each_attempt_has_a_name_of_its_own(job, tmp_path, stand_ins):
    (tmp_path / "names").mkdir()
    script = tmp_path / "bin" / "srun"
    script.write_text(
        f'#!/bin/sh\n: > "{tmp_path}/names/$GLORE_RUN"\ntest $(ls "{tmp_path}/names" | wc -l) = 2'
    )
    job(("--launcher", "slurm", "-n", 1, "-s", 0, "--max-restarts", 1), "ok", env=stand_ins).finish(
        0
    )
    assert len(os.listdir(tmp_path / "names")) == 2


def shown_gpus(done, workers):
    return [done.log(f"worker-{worker}").splitlines()[-1] for worker in range(workers)]


def test_local_workers_share_the_gpus(job):
    env = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    done = job(("-n", 2, "-s", 0), "where", env=env).finish(0)
    assert shown_gpus(done, 2) == ["CUDA_VISIBLE_DEVICES=4,5", "CUDA_VISIBLE_DEVICES=6,7"]
    assert "WARNING" not in done.err
    # Which GPUs the command takes, if it says so, is its own affair.
    done = job(("-n", 2, "-s", 0), "where", "--gpus", "1", env=env).finish(0)
    assert shown_gpus(done, 2) == ["CUDA_VISIBLE_DEVICES=4,5,6,7"] * 2
    done = job(("-n", 3, "-s", 0), "where", env={"CUDA_VISIBLE_DEVICES": "4,5"}).finish(0)
    assert shown_gpus(done, 3) == [f"CUDA_VISIBLE_DEVICES={gpu}" for gpu in (4, 5, 4)]
    assert re.search(r"WARNING: worker 0.*: 3 workers share 2 GPUs", done.err)
    done = job(("-n", 2, "-s", 0), "where", env={"CUDA_VISIBLE_DEVICES": ""}).finish(0)
    assert shown_gpus(done, 2) == ["CUDA_VISIBLE_DEVICES="] * 2


def test_the_gpus_that_cuda_shows():
    def eight():
        return 8

    assert agent.visible_gpus({}, eight) == list("01234567")
    assert agent.visible_gpus({}, lambda: 0) == []
    for text, names in (
        ("3, GPU-1f ,MIG-2a", ["3", "GPU-1f", "MIG-2a"]),
        ("2,-1,3", ["2"]),
        ("NoDevFiles", []),
        ("", []),
    ):
        assert agent.visible_gpus({"CUDA_VISIBLE_DEVICES": text}, eight) == names
    assert [agent.gpus_of(list("01234567"), worker, 3) for worker in range(3)] == [
        *(["0", "1"], ["2", "3"], ["4", "5"])
    ]


def test_srun(job, stand_ins):
    env = stand_ins
    options = ("--launcher", "slurm", "-n", 2, "-s", 0)
    done = job(options, "ok", env=env).finish(0)
    assert done.out.startswith("worker 0 of 2\ndone 0\n")
    assert done.log("worker-1") == "worker 1 of 2\ndone 1\n"
    done = job(options, "fail", 4, env=env).finish(4, seconds=30)
    assert "Member 1: worker 1" in done.out + done.err


@pytest.fixture
def sshd(tmp_path):
    """Run an OpenSSH server on loopback; return the options for its client."""
    server = shutil.which("sshd") or "/usr/sbin/sshd"
    if not os.path.exists(server) or not shutil.which("ssh"):
        pytest.skip("OpenSSH's server or client is not installed")
    if os.getuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(words, check=True)
    port = agent.free_port("127.0.0.1")
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\n"
        f"AuthorizedKeysFile {tmp_path}/user.pub\nStrictModes no\nPermitRootLogin yes\n"
        "PasswordAuthentication no\nPidFile none\n"
    )
    process = subprocess.Popen(
        [server, "-D", "-f", str(tmp_path / "sshd_config"), "-E", str(tmp_path / "sshd.log")]
    )

    def answers():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(answers, 10, "the ssh server")
        options = (f"-p{port}", f"-i{tmp_path}/user", "-oStrictHostKeyChecking=no")
        options += (f"-oUserKnownHostsFile={tmp_path}/known", "-oLogLevel=ERROR", "-F/dev/null")
        yield [f"--ssh-option={option}" for option in options]
    finally:
        process.terminate()
        process.wait(10)


def test_ssh(job, sshd, tmp_path):
    (tmp_path / "Hosts").write_text("127.0.0.1 slots=2\n")
    options = ("--launcher", "ssh", *sshd, "-n", 2, "-s", 0)
    done = job((*options, "--env", "SOME=a 'b'"), "ok", "x y").finish(0)
    assert done.out == "worker 0 of 2 x y\ndone 0\n"
    assert done.log("worker-1") == "worker 1 of 2 x y\ndone 1\n"
    launched = job(options, "family")
    for worker in range(2):
        launched.wait_for_log(f"worker-{worker}", "started")
    # The connection of one worker breaks.
    clients = [pid for pid in marked(launched.mark) if command_of(pid).startswith("ssh ")]
    assert len(clients) == 2
    agent.kill(max(clients))
    done = launched.finish(1, seconds=30)
    assert re.search(r"the connection to worker 1 \(on 127.0.0.1, process \d+\) was lost", done.err)


def test_a_host_that_cannot_be_reached_is_named(job, sshd, tmp_path):
    (tmp_path / "Hosts").write_text("127.0.0.1\n127.0.0.9\n")
    done = job(("--launcher", "ssh", *sshd, "-n", 2, "-s", 0), "ok").finish(1, seconds=30)
    assert "the host 127.0.0.9 cannot be reached for worker 1: ssh: connect to" in done.err
