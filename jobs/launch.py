"""Run a command as the workers of a distributed job, with the servers that they need.

The engine is MXNet's own parameter server (ps-lite). MXNet's wheel has a tools/launch.py, but not
the dmlc_tracker that does its work. See docs/cluster.md.
"""

import contextlib
import dataclasses
import datetime
import logging
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Callable, Optional

from cluster import hosts, job, rendezvous
from cluster.agent import Task, free_port, own_address
from cluster.hosts import Member
from cluster.watch import Watch, heartbeat_folder, read_heartbeat
from glore_common import HEARTBEAT_FOLDER, UsageError, run_main
from glore_options import JobOptions, Options, count, group, number, option, parse, positive_int

LOGGER = logging.getLogger("glore.cluster")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LAUNCHERS = ("local", "ssh", "slurm", "mpi")
# Environment variables: name of the job, and of one attempt at it, which no other has.
JOB, RUN = "GLORE_JOB", "GLORE_RUN"
# Beginnings of environment variables that go to other machines, and PATH.
PASSED_ON = ("DMLC_", "PS_", "MXNET_", "NNVM_", "OMP_", "CUDA_", "NCCL_", "GLORE_", "PYTHON")
# Options of the training scripts that say where to start, and do not go with another start.
STARTS = ("--resume", "--resume-epoch", "--load-epoch", "--overwrite")
# Those that choose a worker's GPUs.
GPUS = ("--gpus", "--gpu-id")
EXAMPLE = "The command follows --, as in: -n 2 -s 1 -- python train_kinetics.py --dataset Demo"
FORMAT = "%(asctime)s %(levelname)s: %(message)s"
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
SSH_ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")

# Machines of the workers and of the servers.
Places = tuple[Sequence[Optional[str]], Sequence[Optional[str]]]
seconds = number(float, 0.0)


@dataclasses.dataclass
class LaunchOptions(Options):
    """How many processes, where, and what becomes of them; the command follows ``--``."""

    title = "processes and machines"

    launcher: str = option("local", "who starts processes on other machines", choices=LAUNCHERS)
    num_workers: int = option(
        0,
        "processes that run the command (default: none, say how many)",
        kind=positive_int,
        aliases=("-n",),
        metavar="N",
    )
    num_servers: int = option(
        -1,
        "MXNet's servers (default: as many as workers); 0: no parameter server at all",
        kind=count,
        aliases=("-s",),
        metavar="N",
    )
    hosts: str = option("Hosts", "for ssh and mpi: file with a host a line", aliases=("-H",))
    max_restarts: int = option(
        0,
        "start again after a failure, so often, from the newest checkpoint that is whole",
        kind=count,
        metavar="N",
    )
    restart_args: str = option(
        "--resume auto",
        "what a restarted command gets in place of its own --resume and the like",
        metavar="TEXT",
    )
    grace: float = option(
        60.0, "seconds that workers have to save after Ctrl-C or SIGTERM", kind=seconds
    )
    stall_warning: float = option(
        120.0,
        "say so when a worker has not got on for so many seconds; 0: never",
        kind=seconds,
        metavar="S",
    )
    stall_limit: float = option(
        0.0, "and end (or restart) the job after so many; 0: never", kind=seconds, metavar="S"
    )
    port: int = option(0, "of the scheduler; 0: one that is free", kind=number(int, 0, 65535))
    env: tuple[str, ...] = option(
        (),
        "pass this variable on to other machines as well (always passed on: PATH, "
        + ", ".join(f"{name}*" for name in PASSED_ON)
        + ")",
        metavar="NAME[=VALUE]",
        several=True,
    )
    log_dir: str = option(
        "", "folder of the log files, one for each process (default: ./exps/logs/dist/JOB)"
    )
    job: str = option("", "name of the job (default: made from the time)")
    ssh_option: tuple[str, ...] = option(
        (), "more options for ssh, e.g. --ssh-option=-p2222", metavar="OPTION", several=True
    )
    remote_python: str = option(
        sys.executable,
        "interpreter on other machines, also for a command that begins with python (default: this "
        "one's path)",
    )
    starter_option: tuple[str, ...] = option(
        (), "more options for srun or mpirun", metavar="OPTION", several=True
    )

    def settle(self, member: Optional[Member]) -> None:
        """Work out what was left open; ``member`` is what Slurm or MPI says of this process."""
        if not self.num_workers:
            raise UsageError("say how many workers: -n N")
        if self.num_servers < 0:
            self.num_servers = self.num_workers
        if member is not None and not self.job:
            if member.job is None:
                raise UsageError("the job needs a name that is the same everywhere: --job NAME")
            self.job = member.job
        if not self.job:
            self.job = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
        if self.job != os.path.basename(self.job) or self.job.startswith("."):
            raise UsageError(f"--job {self.job} is no name for a folder")
        self.log_dir = os.path.abspath(self.log_dir or os.path.join("exps/logs/dist", self.job))


@dataclasses.dataclass
class LaunchJobOptions(JobOptions):
    """All options of the launcher."""

    launch: LaunchOptions = group(LaunchOptions)


def split_command(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return (our own arguments, the command after ``--``)."""
    if "--" not in argv:
        if {"-h", "--help"} & set(argv):
            return argv, []
        raise UsageError("the command to run comes after --, as in: -n 2 -- python train.py ...")
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def restarted(command: list[str], extra: list[str]) -> list[str]:
    """Return the command of a restart: without its own ``--resume`` and the like, with ``extra``.

    >>> restarted(["python", "t.py", "--overwrite", "--resume", "none"], ["--resume", "auto"])
    ['python', 't.py', '--resume', 'auto']
    """
    if "--resume" not in extra:
        return [*command, *extra]
    kept, skip = [], False
    for word in command:
        if word in STARTS:
            skip = True
        elif word.split("=")[0] in STARTS or (skip and not word.startswith("--")):
            skip = False
        else:
            kept.append(word)
            skip = False
    return [*kept, *extra]


def passed_on(names: tuple[str, ...]) -> dict[str, str]:
    """Return the environment variables for other machines: ours, and those of ``--env``.

    Raises
    ------
    UsageError
        If a name of ``--env`` has no value.
    """
    env = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    env["PATH"] = os.environ.get("PATH", os.defpath)
    for text in names:
        name, given, value = text.partition("=")
        if not given and name not in os.environ:
            raise UsageError(f"--env {name}: there is no such variable here; give {name}=VALUE")
        env[name] = value if given else os.environ[name]
    return env


def roles_of(
    options: LaunchOptions,
    command: list[str],
    env: dict[str, str],
    root: Optional[str],
    places: Places,
) -> list[job.Role]:
    """Return the processes of a job.

    Parameters
    ----------
    options
    command
        What the workers run.
    env
        Environment variables of all.
    root
        Address of the scheduler; None without servers.
    places
        ssh's names of the machines of workers and servers; None is this machine.
    """
    workers, servers = places
    env = {**env, JOB: options.job}
    if servers and root is not None:
        env.update(
            DMLC_PS_ROOT_URI=root,
            DMLC_NUM_WORKER=str(len(workers)),
            DMLC_NUM_SERVER=str(len(servers)),
        )
        if hosts.is_loopback(root):
            env.update(DMLC_NODE_HOST=root)
    # An installed package is found without it.
    checkout = ROOT if __package__ == "jobs" else None
    path = os.pathsep.join(filter(None, (checkout, env.get("PYTHONPATH", os.getenv("PYTHONPATH")))))
    result = []
    at_servers = [(job.SERVER, index, host) for index, host in enumerate(servers)]
    if servers:
        at_servers.insert(0, (job.SCHEDULER, 0, servers[0]))
    for kind, index, host in at_servers:
        python = sys.executable if host is None else options.remote_python
        serving = [python, "-m", f"{__package__}.parameter_server"]
        port = options.port if kind == job.SCHEDULER else None
        own = {"PYTHONPATH": path, "DMLC_ROLE": kind}
        result.append(job.Role(kind, index, Task(serving, {**env, **own}, port), host))
    # A choice of GPUs in the command refers to all of them, and Slurm has shared them out.
    shared = options.launcher != "slurm" and not any(w.split("=")[0] in GPUS for w in command)
    for index, host in enumerate(workers):
        own = {"DMLC_ROLE": job.WORKER} if servers else {}
        own.update(DMLC_TASK_ID=str(index), DMLC_WORKER_COUNT=str(len(workers)))
        here = workers.count(host)
        share = workers[:index].count(host) if shared and here > 1 else None
        task = Task(command, {**env, **own}, None, here, share)
        result.append(job.Role(job.WORKER, index, task, host))
    return result


def agent_command(options: LaunchOptions) -> Callable[[job.Role], list[str]]:
    """Return a function: role -> command that runs its agent, here or through ssh."""

    def run_agent(role: job.Role) -> list[str]:
        if role.host is None:
            return [sys.executable, job.AGENT]
        # "exec" is the shell's; the rest is quoted.
        remote = f"exec {shlex.join([options.remote_python, job.AGENT])}"
        return [*SSH, *SSH_ALIVE, *options.ssh_option, role.host, remote]

    return run_agent


def heartbeats_of(options: LaunchOptions) -> str:
    """Return the folder in which workers leave word of what they do."""
    return os.path.join(options.log_dir, "heartbeat")


def get_watch(options: LaunchOptions) -> Watch:
    """Return the watch over the workers."""
    folder = heartbeats_of(options)
    return Watch(
        lambda worker: read_heartbeat(folder, worker),
        options.num_workers,
        options.stall_warning,
        options.stall_limit,
    )


def run_roles(
    options: LaunchOptions, roles: list[job.Role], stop: job.Stop, watch: Optional[Watch]
) -> Optional[job.Failure]:
    """Run the processes to the end; return a failure or None."""
    folder, start = os.getcwd(), agent_command(options)
    return job.Job(roles, options.log_dir, start, folder, stop, options.grace, watch).run()


def run_attempt(
    options: LaunchOptions, own: list[str], command: list[str], stop: job.Stop
) -> Optional[job.Failure]:
    """Run the job once; return a failure or None. ``own`` is our own command line."""
    env = passed_on(options.env)
    if options.launcher in ("slurm", "mpi"):
        env.update({JOB: options.job, RUN: secrets.token_hex(8)})
        starter = starter_command(options, own, command, env)
        # The members watch.
        return run_roles(options, [job.Role(job.STARTER, 0, Task(starter, env))], stop, None)
    if options.launcher == "ssh":
        places, root = ssh_places(options)
        command = elsewhere(options, command)
    else:
        places, root = ([None] * options.num_workers, [None] * options.num_servers), hosts.LOOPBACK
    if not options.stall_warning:
        return run_roles(options, roles_of(options, command, env, root, places), stop, None)
    folder = heartbeats_of(options)
    env[HEARTBEAT_FOLDER] = folder
    with heartbeat_folder(folder, options.num_workers) as marker:
        roles = [
            dataclasses.replace(role, task=role.task._replace(marker=marker))
            for role in roles_of(options, command, env, root, places)
        ]
        return run_roles(options, roles, stop, get_watch(options))


def elsewhere(options: LaunchOptions, command: list[str]) -> list[str]:
    """Return a command as other machines run it, whose own ``python`` is not the project's."""
    return [options.remote_python, *command[1:]] if command[0] == "python" else command


def ssh_places(options: LaunchOptions) -> tuple[Places, Optional[str]]:
    """Return ((hosts of workers, hosts of servers), address of the scheduler)."""
    listed = hosts.read_hosts(options.hosts)
    workers, servers = hosts.place(listed, options.num_workers, options.num_servers)
    places = [host.name for host in workers], [host.name for host in servers]
    if shutil.which("ssh") is None:
        raise UsageError("ssh is not installed: apt-get install openssh-client")
    if not servers:
        return places, None
    ssh = ("ssh", *options.ssh_option)
    root = hosts.address_of(servers[0], ssh)
    for host in {*workers, *servers}:
        address = hosts.address_of(host, ssh)
        if hosts.is_loopback(address) != hosts.is_loopback(root):
            raise UsageError(
                f"{options.hosts}: {host.name} is {address}, but {servers[0].name} is {root}: a "
                "loopback address is not reached from other machines; name this one by its address"
            )
    return places, root


def starter_command(
    options: LaunchOptions, own: list[str], command: list[str], env: dict[str, str]
) -> list[str]:
    """Return the srun or mpirun command that starts the launcher once for each worker.

    Each of them reads the same command line, ``own``; what was settled comes after it.
    """
    program = {"slurm": "srun", "mpi": "mpirun"}[options.launcher]
    if shutil.which(program) is None:
        package = {"srun": "slurm-client", "mpirun": "openmpi-bin"}[program]
        raise UsageError(f"{program} is not installed (Debian's package {package})")
    if program == "srun":
        # Without --kill-on-bad-exit the others would go on for ever.
        words = ["srun", f"--ntasks={options.num_workers}", "--kill-on-bad-exit=1", "--export=ALL"]
    else:
        words = ["mpirun", "-np", str(options.num_workers)]
        if os.path.exists(options.hosts):
            names = hosts.read_hosts(options.hosts)
            words += ["--host", ",".join(f"{host.name}:{host.slots}" for host in names)]
        for name in sorted(env):
            words += ["-x", f"{name}={env[name]}"]
    script = [os.path.join(ROOT, "launch.py")]
    if __package__ != "jobs":
        script = ["-m", f"{__package__}.launch"]
    member = [options.remote_python, *script, *own]
    member += ["--job", options.job, "--log-dir", options.log_dir, "--max-restarts", "0"]
    return [*words, *options.starter_option, *member, "--", *elsewhere(options, command)]


def run_member(options: LaunchOptions, command: list[str], member: Member, stop: job.Stop) -> int:
    """Run the part of a job that falls to one process which Slurm or MPI started.

    Member k runs worker k, and the servers k, k + size, …; member 0 the scheduler, too.
    """
    if options.max_restarts:
        raise UsageError(
            "--max-restarts has no effect within srun or mpirun: let launch.py call them"
        )
    if member.size != options.num_workers:
        raise UsageError(f"{member.size} processes were started for {options.num_workers} workers")
    # A job that Slurm starts again has the same number.
    again = os.environ.get("SLURM_RESTART_COUNT", "0")
    run = os.environ.get(RUN) or f"{member.job or options.job}-{again}"
    env: dict[str, str] = {}
    root = hosts.LOOPBACK
    watch = None
    with contextlib.ExitStack() as stack:
        if options.stall_warning:
            env[HEARTBEAT_FOLDER] = heartbeats_of(options)
            if member.rank == 0:
                # Before the others begin: they wait for the address.
                stack.enter_context(heartbeat_folder(env[HEARTBEAT_FOLDER], member.size))
                watch = get_watch(options)
        if options.num_servers and member.rank == 0:
            root = hosts.LOOPBACK if member.machines == 1 else hosts.routed_address()
            try:
                options.port = free_port(root, options.port)
            except OSError as error:
                where = f"{root}:{options.port}"
                raise UsageError(f"the scheduler cannot have {where}: {error}") from error
            stack.enter_context(rendezvous.published(options.log_dir, run, root, options.port))
        elif options.num_servers:
            root, options.port = rendezvous.look_up(options.log_dir, run)
        if options.num_servers:
            env.update(DMLC_PS_ROOT_PORT=str(options.port))
            if not hosts.is_loopback(root):
                env.update(DMLC_NODE_HOST=own_address(root))
        places = [None] * member.size, [None] * options.num_servers
        roles = [
            role
            for role in roles_of(options, command, env, root, places)
            if role.index % member.size == member.rank
        ]
        if member.machines != 1:
            roles = [
                dataclasses.replace(role, task=role.task._replace(workers_here=1, gpu_share=None))
                for role in roles
            ]
        failure = run_roles(options, roles, stop, watch)
    if failure is None:
        return 0
    LOGGER.error("Member %d: %s", member.rank, failure.message)
    return failure.code


def run_job(options: LaunchOptions, own: list[str], command: list[str], stop: job.Stop) -> int:
    """Run the job, again and again if asked to; return the exit code."""
    try:
        os.makedirs(options.log_dir, exist_ok=True)
        path = os.path.join(options.log_dir, "launcher.log")
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"the log files cannot be written: {error}") from error
    handler.setFormatter(logging.Formatter(FORMAT))
    LOGGER.addHandler(handler)
    LOGGER.info(
        "Job %s: %d workers, %d servers (%s); logs in %s",
        options.job,
        options.num_workers,
        options.num_servers,
        options.launcher,
        options.log_dir,
    )
    for attempt in range(options.max_restarts + 1):
        started = time.monotonic()
        failure = run_attempt(options, own, command, stop)
        took = time.monotonic() - started
        if failure is None:
            LOGGER.info("Job %s ended well after %.1f s", options.job, took)
            return 0
        LOGGER.error("Job %s ended after %.1f s: %s", options.job, took, failure.message)
        if not failure.again or attempt == options.max_restarts:
            return failure.code
        command = restarted(command, shlex.split(options.restart_args))
        LOGGER.warning(
            "Restart %d of %d: %s", attempt + 1, options.max_restarts, shlex.join(command)
        )
    return 1


def main(argv: Optional[list[str]] = None) -> int:
    """Launch as the command line says."""
    own, command = split_command(sys.argv[1:] if argv is None else argv)
    options = parse(LaunchJobOptions(), own, str(__doc__).split("\n")[0], epilog=EXAMPLE).launch
    if not command:
        raise UsageError("there is no command after --")
    if shutil.which(command[0]) is None and options.launcher == "local":
        raise UsageError(f"{command[0]}, the command to run, is not there or cannot be executed")
    logging.basicConfig(level=logging.INFO, format=FORMAT, stream=sys.stderr)
    member = hosts.member(options.launcher) if options.launcher in ("slurm", "mpi") else None
    options.settle(member)
    with job.Stop() as stop:
        if member is not None:
            return run_member(options, command, member, stop)
        return run_job(options, own, command, stop)


if __name__ == "__main__":
    sys.exit(run_main(main))
