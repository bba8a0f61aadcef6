"""Run a command as the workers of a distributed job, with the servers that they need.

The engine is MXNet's own parameter server (ps-lite). MXNet's wheel has a tools/launch.py, but not
the dmlc_tracker that does its work. See docs/cluster.md.
"""

import argparse
import contextlib
import datetime
import json
import logging
import os
import shlex
import shutil
import sys
import time

from cluster import hosts, job
from cluster.agent import free_port, own_address
from cluster.watch import Watch
from glore_common import GloReError, UsageError, write_text
from train import heartbeat as progress

LOGGER = logging.getLogger("glore.cluster")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LAUNCHERS = ("local", "ssh", "slurm", "mpi")
JOB = "GLORE_JOB"
# Beginnings of environment variables that go to other machines.
PASSED_ON = ("DMLC_", "PS_", "MXNET_", "NNVM_", "OMP_", "CUDA_", "NCCL_", "GLORE_", "PYTHON")
# Options of the training scripts that say where to start, and do not go with another start.
STARTS = ("--resume", "--resume-epoch", "--load-epoch", "--overwrite")
ADDRESS_PATIENCE = 120.0
FORMAT = "%(asctime)s %(levelname)s: %(message)s"
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
SSH_ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")


# Not jobs.arguments' types: these would import MXNet, which the launcher does without.
def _count(low):
    def convert(text):
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {low} or more")
        return value

    convert.__name__ = "whole number"
    return convert


def _seconds(text):
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def get_parser():
    """Return the argument parser; the command follows ``--``."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        usage="%(prog)s [options] -n WORKERS [-s SERVERS] -- COMMAND ...",
        allow_abbrev=False,
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="default: local")
    parser.add_argument("-n", "--num-workers", type=_count(1), required=True)
    parser.add_argument(
        "-s",
        "--num-servers",
        type=_count(0),
        help="default: as many as workers; 0: no parameter server at all",
    )
    parser.add_argument(
        "-H", "--hosts", default="Hosts", help="for ssh and mpi: a host a line (default: Hosts)"
    )
    parser.add_argument(
        "--max-restarts",
        type=_count(0),
        default=0,
        metavar="N",
        help="start again after a failure, so often, from the newest checkpoint that is whole",
    )
    parser.add_argument(
        "--restart-args",
        type=shlex.split,
        default=["--resume", "auto"],
        metavar="TEXT",
        help="what a restarted command gets in place of its own --resume and the like "
        "(default: --resume auto)",
    )
    parser.add_argument(
        "--grace",
        type=_seconds,
        default=60.0,
        help="seconds that workers have to save after Ctrl-C or SIGTERM (default: 60)",
    )
    parser.add_argument(
        "--stall-warning",
        type=_seconds,
        default=120.0,
        metavar="S",
        help="say so when a worker has not got on for so many seconds (default: 120)",
    )
    parser.add_argument(
        "--stall-limit",
        type=_seconds,
        default=0.0,
        metavar="S",
        help="and end (or restart) the job after so many; 0: never (default)",
    )
    parser.add_argument(
        "--port",
        type=_count(1),
        help="of the scheduler (default: one that is free)",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="pass this variable on to other machines as well (always passed on: "
        + ", ".join(f"{name}*" for name in PASSED_ON)
        + ")",
    )
    parser.add_argument(
        "--log-dir",
        help="folder of the log files, one for each process (default: ./exps/logs/dist/JOB)",
    )
    parser.add_argument("--job", help="name of the job (default: made from the time)")
    parser.add_argument(
        "--ssh-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="more options for ssh, e.g. --ssh-option=-p2222",
    )
    parser.add_argument(
        "--remote-python",
        default=sys.executable,
        help="interpreter on other machines (default: this one's path)",
    )
    parser.add_argument(
        "--starter-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="more options for srun or mpirun",
    )
    return parser


def split_command(argv):
    """Return (our own arguments, the command after ``--``)."""
    if "--" not in argv:
        if {"-h", "--help"} & set(argv):
            return argv, []
        raise UsageError("the command to run comes after --, as in: -n 2 -- python train.py ...")
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def restarted(command, extra):
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


def passed_on(names):
    """Return the environment variables for other machines: ours, and those of ``--env``.

    Raises
    ------
    UsageError
        If a name of ``--env`` has no value.
    """
    env = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    for text in names:
        name, given, value = text.partition("=")
        if not given and name not in os.environ:
            raise UsageError(f"--env {name}: there is no such variable here; give {name}=VALUE")
        env[name] = value if given else os.environ[name]
    return env


def roles_of(args, command, env, root, places, wanted=None):
    """Return the processes of a job.

    Parameters
    ----------
    args : argparse.Namespace
    command : list of str
        What the workers run.
    env : dict
        Environment variables of all.
    root : str
        Address of the scheduler.
    places : (list, list)
        ssh's names of the machines of workers and servers; None is this machine.
    wanted : callable, optional
        (kind, index) -> whether the process is to be started from here; by default all are.

    Returns
    -------
    list of job.Role
    """
    workers, servers = places
    env = {**env, JOB: args.job}
    if servers:
        env.update(
            DMLC_PS_ROOT_URI=root,
            DMLC_NUM_WORKER=str(len(workers)),
            DMLC_NUM_SERVER=str(len(servers)),
        )
        if hosts.is_loopback(root):
            env.update(DMLC_NODE_HOST=root)
    path = os.pathsep.join(filter(None, (ROOT, env.get("PYTHONPATH", os.getenv("PYTHONPATH")))))
    serving = {**env, "PYTHONPATH": path}
    rows = []
    if servers:
        rows.append((job.SCHEDULER, 0, servers[0], 0))
        rows += [(job.SERVER, index, host, 0) for index, host in enumerate(servers)]
    rows += [(job.WORKER, index, host, workers.count(host)) for index, host in enumerate(workers)]
    result = []
    for kind, index, host, here in rows:
        if wanted is not None and not wanted(kind, index):
            continue
        own = {"DMLC_ROLE": kind} if servers else {}
        if kind == job.WORKER:
            own.update(DMLC_TASK_ID=str(index), DMLC_WORKER_COUNT=str(len(workers)))
        result.append(
            job.Role(
                kind,
                index,
                command if kind == job.WORKER else server_command(args, host),
                {**(env if kind == job.WORKER else serving), **own},
                host,
                (args.port or 0) if kind == job.SCHEDULER else None,
                here,
            )
        )
    return result


def server_command(args, host):
    """Return what a scheduler or server runs."""
    python = sys.executable if host is None else args.remote_python
    return [python, "-m", "cluster.parameter_server"]


def agent_command(args):
    """Return a function: role -> command that runs its agent, here or through ssh."""

    def command(role):
        if role.host is None:
            return [sys.executable, job.AGENT]
        remote = shlex.join(["exec", args.remote_python, job.AGENT])
        # "exec" is the shell's; the rest is quoted.
        remote = remote.replace("'exec'", "exec", 1)
        return [*SSH, *SSH_ALIVE, *args.ssh_option, role.host, remote]

    return command


def get_watch(args):
    """Return the watch over the workers' reports, and the folder that they go to."""
    folder = os.path.join(args.log_dir, "progress")
    if not args.stall_warning:
        return None, folder
    os.makedirs(folder, exist_ok=True)
    for number in range(args.num_workers):
        with contextlib.suppress(FileNotFoundError):
            os.remove(progress.path_of(folder, number))
    limit, warning = args.stall_limit, args.stall_warning
    return (
        Watch(lambda n: progress.read(folder, n), args.num_workers, warning, limit),
        folder,
    )


def run_attempt(args, command, stop):
    """Run the job once; return a job.Failure or None."""
    watch, folder = get_watch(args)
    common = {progress.FOLDER: folder} if watch is not None else {}
    if args.launcher in ("slurm", "mpi"):
        roles = [job.Role(job.STARTER, 0, starter_command(args, command), {JOB: args.job})]
        # The members watch: what they need goes through their own command line.
        watch = None
    elif args.launcher == "ssh":
        places, root = ssh_places(args)
        roles = roles_of(args, command, {**passed_on(args.env), **common}, root, places)
    else:
        places = [None] * args.num_workers, [None] * args.num_servers
        env = {**dict(text.split("=", 1) for text in args.env if "=" in text), **common}
        roles = roles_of(args, command, env, hosts.LOOPBACK, places)
    return job.Job(
        roles, args.log_dir, agent_command(args), os.getcwd(), stop, args.grace, watch
    ).run()


def ssh_places(args):
    """Return ((hosts of workers, hosts of servers), address of the scheduler)."""
    listed = hosts.read_hosts(args.hosts)
    workers, servers = hosts.place(listed, args.num_workers, args.num_servers)
    places = [host.name for host in workers], [host.name for host in servers]
    if not servers:
        return places, None
    if shutil.which("ssh") is None:
        raise UsageError("ssh is not installed: apt-get install openssh-client")
    command = ("ssh", *args.ssh_option)
    root = hosts.address_of(servers[0], command)
    for host in {*workers, *servers}:
        address = hosts.address_of(host, command)
        if hosts.is_loopback(address) != hosts.is_loopback(root):
            raise UsageError(
                f"{args.hosts}: {host.name} is {address}, but {servers[0].name} is {root}: a "
                "loopback address is not reached from other machines; name this one by its address"
            )
    return places, root


def own_options(args):
    """Return our own options for a member of the job, as a command line."""
    words = ["--launcher", args.launcher, "--job", args.job, "--log-dir", args.log_dir]
    for name in ("num_workers", "num_servers", "grace", "stall_warning", "stall_limit"):
        words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += ["--port", str(args.port)] if args.port else []
    return words


def starter_command(args, command):
    """Return the srun or mpirun command that starts ``launch.py`` once for each worker."""
    program = {"slurm": "srun", "mpi": "mpirun"}[args.launcher]
    if shutil.which(program) is None:
        package = {"srun": "slurm-client", "mpirun": "openmpi-bin"}[program]
        raise UsageError(f"{program} is not installed (Debian's package {package})")
    member = [args.remote_python, os.path.join(ROOT, "launch.py"), *own_options(args)]
    env = passed_on(args.env)
    if program == "srun":
        # Without --kill-on-bad-exit the others would go on for ever.
        words = ["srun", f"--ntasks={args.num_workers}", "--kill-on-bad-exit=1", "--export=ALL"]
    else:
        words = ["mpirun", "-np", str(args.num_workers)]
        if os.path.exists(args.hosts):
            names = hosts.read_hosts(args.hosts)
            words += ["--host", ",".join(f"{host.name}:{host.slots}" for host in names)]
        for name in sorted(env):
            words += ["-x", f"{name}={env[name]}"]
    return [*words, *args.starter_option, *member, "--", *command]


def rendezvous(args, member):
    """Agree on the scheduler's address and port through a file in the log folder.

    Raises
    ------
    GloReError
        If the file does not come: the folder is not shared, or member 0 has not started.
    """
    path = os.path.join(args.log_dir, "address.json")
    if member.rank == 0:
        root = hosts.LOOPBACK if member.machines == 1 else hosts.routed_address()
        try:
            port = free_port(root, args.port or 0)
        except OSError as error:
            raise UsageError(f"the scheduler cannot have {root}:{args.port}: {error}") from error
        write_text(path, json.dumps({"root": root, "port": port, "job": attempt_name(args)}))
        return root, port
    deadline = time.monotonic() + ADDRESS_PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            with open(path, encoding="utf-8") as stream:
                content = json.load(stream)
            if content["job"] == attempt_name(args):
                return content["root"], content["port"]
        time.sleep(0.1)
    raise GloReError(
        f"{path} did not appear within {ADDRESS_PATIENCE:g} s: the log folder must be on a file "
        "system that all machines share (--log-dir), and member 0 must run"
    )


def attempt_name(args):
    """Return the job's name with the number of the attempt."""
    return f"{args.job}-{os.environ.get('GLORE_ATTEMPT', '1')}"


def run_member(args, command, member, stop):
    """Run the part of a job that falls to one process which Slurm or MPI started.

    Member k runs worker k, and the servers k, k + size, …; member 0 the scheduler, too.
    """
    if member.size != args.num_workers:
        raise UsageError(f"{member.size} processes were started for {args.num_workers} workers")
    os.makedirs(args.log_dir, exist_ok=True)
    watch, folder = get_watch(args) if member.rank == 0 else (None, None)
    env = {}
    if args.stall_warning:
        env[progress.FOLDER] = folder or os.path.join(args.log_dir, "progress")
        os.makedirs(env[progress.FOLDER], exist_ok=True)
    root = hosts.LOOPBACK
    if args.num_servers:
        root, port = rendezvous(args, member)
        args.port = port
        env.update(DMLC_PS_ROOT_PORT=str(port))
        if not hosts.is_loopback(root):
            env.update(DMLC_NODE_HOST=own_address(root))
    places = [None] * args.num_workers, [None] * args.num_servers

    def wanted(kind, index):
        if kind == job.SCHEDULER:
            return member.rank == 0
        return index % member.size == member.rank

    roles = roles_of(args, command, env, root, places, wanted)
    if member.machines != 1:
        roles = [role._replace(workers_here=1) for role in roles]
    failure = job.Job(
        roles, args.log_dir, agent_command(args), os.getcwd(), stop, args.grace, watch
    ).run()
    if failure is None:
        return 0
    LOGGER.error("Member %d: %s", member.rank, failure.message)
    return failure.code


def run_job(args, command, stop):
    """Run the job, again and again if asked to; return the exit code."""
    try:
        os.makedirs(args.log_dir, exist_ok=True)
        handler = logging.FileHandler(os.path.join(args.log_dir, "launcher.log"), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the log files cannot be written: {error}") from error
    handler.setFormatter(logging.Formatter(FORMAT))
    LOGGER.addHandler(handler)
    LOGGER.info(
        "Job %s: %d workers, %d servers (%s); logs in %s",
        args.job,
        args.num_workers,
        args.num_servers,
        args.launcher,
        args.log_dir,
    )
    for attempt in range(args.max_restarts + 1):
        os.environ["GLORE_ATTEMPT"] = str(attempt + 1)
        started = time.monotonic()
        failure = run_attempt(args, command, stop)
        seconds = time.monotonic() - started
        if failure is None:
            LOGGER.info("Job %s ended well after %.1f s", args.job, seconds)
            return 0
        LOGGER.error("Job %s ended after %.1f s: %s", args.job, seconds, failure.message)
        if not failure.again or attempt == args.max_restarts:
            return failure.code
        command = restarted(command, args.restart_args)
        LOGGER.warning("Restart %d of %d: %s", attempt + 1, args.max_restarts, shlex.join(command))
    return 1


def main(argv=None):
    """Launch as the command line says."""
    own, command = split_command(sys.argv[1:] if argv is None else argv)
    args = get_parser().parse_args(own)
    if not command:
        raise UsageError("there is no command after --")
    if shutil.which(command[0]) is None and args.launcher == "local":
        raise UsageError(f"{command[0]}, the command to run, is not there or cannot be executed")
    logging.basicConfig(level=logging.INFO, format=FORMAT, stream=sys.stderr)
    if args.num_servers is None:
        args.num_servers = args.num_workers
    member = hosts.member(args.launcher) if args.launcher in ("slurm", "mpi") else None
    if member is not None:
        args.job = args.job or member.job
        if args.job is None:
            raise UsageError("the job needs a name that is the same everywhere: --job NAME")
    args.job = args.job or datetime.datetime.now().strftime("%Y%m%d-%H%M%S-") + str(os.getpid())
    if args.job != os.path.basename(args.job) or args.job.startswith("."):
        raise UsageError(f"--job {args.job} is no name for a folder")
    args.log_dir = os.path.abspath(args.log_dir or os.path.join("exps", "logs", "dist", args.job))
    with job.Stop() as stop:
        if member is not None:
            if args.max_restarts:
                raise UsageError(
                    "--max-restarts has no effect within srun or mpirun: let launch.py call them"
                )
            return run_member(args, command, member, stop)
        return run_job(args, command, stop)
