"""The machines of a job: the ``Hosts`` file, addresses, and who runs where."""

import ipaddress
import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

from glore_common import PathLike, UsageError

from .agent import own_address

LOOPBACK = "127.0.0.1"
_LINE = re.compile(r"(?P<name>[^\s#=]+)(\s+slots=(?P<slots>\d+))?\s*(#.*)?")


class Host(NamedTuple):
    """A machine: its name for ssh (``user@name`` is fine) and how many workers it takes."""

    name: str
    slots: int


def read_hosts(path: PathLike) -> list[Host]:
    """Read a ``Hosts`` file: one ``name`` or ``name slots=N`` a line; ``#`` begins a comment.

    Raises
    ------
    UsageError
        Naming the line that is wrong, or if there is no host.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            lines = stream.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the list of hosts cannot be read: {error}") from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        slots = int(match["slots"] or 1) if match else 0
        # ssh would take a name that begins with a dash for an option.
        if match is None or not slots or match["name"].startswith("-"):
            raise UsageError(f"{path}:{number}: {line.strip()!r} is no 'NAME' or 'NAME slots=N'")
        if any(host.name == match["name"] for host in hosts):
            raise UsageError(f"{path}:{number}: {match['name']} is there twice; use slots=N")
        hosts.append(Host(match["name"], slots))
    if not hosts:
        raise UsageError(f"{path} names no host")
    return hosts


def place(hosts: list[Host], workers: int, servers: int) -> tuple[list[Host], list[Host]]:
    """Return the host of each worker (filled slot by slot) and of each server (one by one).

    Raises
    ------
    UsageError
        If there are fewer slots than workers.
    """
    slots = [host for host in hosts for _ in range(host.slots)]
    if workers > len(slots):
        raise UsageError(
            f"{workers} workers, but the hosts have {len(slots)} slots: name more hosts, or say "
            "'NAME slots=N' for N workers on one"
        )
    return slots[:workers], [hosts[index % len(hosts)] for index in range(servers)]


def address_of(host: Host, ssh: Sequence[str] = ("ssh",)) -> str:
    """Return the IPv4 address of a host's name as ssh knows it.

    Raises
    ------
    UsageError
        If the name has no address.
    """
    name = host.name.rpartition("@")[2]
    try:
        shown = subprocess.run(
            [*ssh, "-G", host.name], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    for line in shown.splitlines():
        if line.startswith("hostname "):
            name = line.split()[1]
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except OSError as error:
        raise UsageError(f"the host {host.name} has no address: {error}") from error


def is_loopback(address: str) -> bool:
    """Return whether an address is reached from its own machine only."""
    return ipaddress.ip_address(address).is_loopback


def routed_address() -> str:
    """Return this machine's address towards other machines."""
    try:
        # A documentation address (RFC 5737): the route alone is asked for.
        return own_address("192.0.2.1")
    except OSError:
        return socket.gethostbyname(socket.gethostname())


class Member(NamedTuple):
    """One of the processes that Slurm or MPI started: its number, their count, and the job.

    ``job`` is a name that they have in common, and ``machines`` how many machines they are on;
    either is None where the environment does not say.
    """

    rank: int
    size: int
    job: Optional[str]
    machines: Optional[int]


# Rank, size, job and step, number of machines, or processes on this machine, of each starter.
_Names = tuple[tuple[str, str, Optional[str], Optional[str]], Optional[str], Optional[str]]
_MEMBERS: dict[str, _Names] = {
    "slurm": (
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_STEP_ID"),
        "SLURM_STEP_NUM_NODES",
        None,
    ),
    "mpi": (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_NAMESPACE", None),
        None,
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    # MPICH, Intel MPI and other users of Hydra.
    "pmi": (("PMI_RANK", "PMI_SIZE", None, None), None, "MPI_LOCALNRANKS"),
}


def member(launcher: str, environment: Optional[Mapping[str, str]] = None) -> Optional[Member]:
    """Return what Slurm's or MPI's environment variables say, or None outside of their jobs.

    Parameters
    ----------
    launcher
        Whose: ``slurm`` or ``mpi``.
    environment
        ``os.environ`` by default.

    Raises
    ------
    UsageError
        If a variable is missing or is no number.
    """
    env = os.environ if environment is None else environment
    for kind in ("slurm",) if launcher == "slurm" else ("mpi", "pmi"):
        (rank, size, job, step), nodes, local = _MEMBERS[kind]
        # Within sbatch, outside of srun, SLURM_PROCID is set as well, but no step.
        if rank not in env or (step is not None and step not in env):
            continue
        if step is not None and not env[step].isdigit():
            continue
        try:
            number, count = int(env[rank]), int(env[size])
            machines = int(env[nodes]) if nodes and nodes in env else None
            if local and int(env.get(local, -1)) == count:
                machines = 1
        except (KeyError, ValueError) as error:
            raise UsageError(f"{kind}'s environment variables are incomplete: {error}") from error
        if not 0 <= number < count:
            raise UsageError(f"{rank}={number} does not fit {size}={count}")
        name = "-".join(env[key] for key in (job, step) if key is not None and key in env)
        return Member(number, count, f"{kind}-{name}" if name else None, machines)
    return None
