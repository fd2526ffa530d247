"""What ``launch doctor`` looks at on one machine."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from unfold.launch.findings import Finding, note, ok, problem
from unfold.launch.machine import gpus, interfaces, query
from unfold.launch.node import disk_faults, memory_faults
from unfold.launch.training import installed_torch_has_cuda

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"
LEAST_FILES = 4096  # open files: shards and sockets of a rank
LEAST_SHM = 1 << 30  # bytes of /dev/shm: NCCL and the data loader's neighbours use it
FIRST_PORT, LAST_PORT = 20000, 30000  # where jobs take theirs from
LOCK_HOLDER = """
import fcntl, sys
file = open(sys.argv[1])
try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(3)
"""


def versions() -> list[Finding]:
    """Python and libraries against requirements.txt."""
    if not REQUIREMENTS.is_file():
        return [note("requirements.txt is not there: versions not compared", "run from the project's root")]
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", REQUIREMENTS.read_text(), re.MULTILINE)
    wrong = []
    for name, wanted in pins:
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            have = "missing"
        if have.partition("+")[0] != wanted:
            wrong.append(f"{name} {have} ({wanted} wanted)")
    if wrong:
        return [problem(f"other versions than tested: {', '.join(wrong)}", f"pip install -r {REQUIREMENTS.name}")]
    return [ok(f"Python {sys.version.split()[0]}, all {len(pins)} libraries as in requirements.txt")]


def gpu_findings() -> list[Finding]:
    """GPUs, their memory and errors, and whether PyTorch can use them."""
    cuda, found = installed_torch_has_cuda(), gpus()
    if not found:
        return [note("no GPU that nvidia-smi knows", "training runs on CPUs; on a GPU node look at the driver")]
    kinds = sorted({f"{gpu.name}, {gpu.total // 1024} GiB, driver {gpu.driver}" for gpu in found})
    out = [ok(f"{len(found)} GPU(s): {'; '.join(kinds)}")]
    if len(kinds) > 1:
        out.append(note("the GPUs differ", "the slowest sets the pace; leave the others out with CUDA_VISIBLE_DEVICES"))
    if cuda is False:
        out.append(problem("PyTorch is a CPU build", "install the CUDA build of the torch version in requirements.txt"))
    for gpu in found:
        if gpu.used > gpu.total // 10:
            out.append(problem(f"GPU {gpu.index}: {gpu.used} of {gpu.total} MiB in use", "end the process that nvidia-smi shows"))
        if gpu.uncorrected.isdigit() and int(gpu.uncorrected):
            what = f"GPU {gpu.index}: {gpu.uncorrected} uncorrected memory errors"
            out.append(problem(what, "have the node drained and the GPU reset"))
    return out


def network() -> list[Finding]:
    """Interfaces, and the settings that name them."""
    found = interfaces()
    out = [ok(f"interfaces: {', '.join(f'{name} {address}' for name, address in found.items())}")] if found else []
    if not found:
        out.append(note("no network interface but loopback", "several nodes cannot train together from here"))
    infiniband = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    if infiniband:
        out.append(ok(f"RDMA devices: {', '.join(infiniband)}"))
        if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
            what = "locked memory is limited: RDMA fails or is slow"
            out.append(problem(what, "ulimit -l unlimited, in setup: of the cluster profile"))
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "").lstrip("=^").split(",")
        if os.environ.get(variable, "").startswith("^") or wanted == [""]:
            continue
        if not any(name.startswith(tuple(wanted)) for name in [*found, "lo"]):
            what = f"{variable}={os.environ[variable]}: no such interface"
            out.append(problem(what, f"set it to one of {', '.join(found)}"))
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return [*out, problem(f"host name {socket.gethostname()} has no address", "add it to DNS or /etc/hosts")]
    if address.startswith("127.") and found:
        out.append(note(f"host name {socket.gethostname()} is {address}: other nodes cannot use it",
                        "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or mend /etc/hosts"))  # fmt: skip
    return out


def ports() -> list[Finding]:
    """Whether the ports that jobs take are free."""
    taken = []
    for port in range(FIRST_PORT, LAST_PORT, 97):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                taken.append(port)
    if taken:
        remedy = f"jobs take theirs from {FIRST_PORT} to {LAST_PORT}, by job number"
        return [note(f"ports in use: {', '.join(map(str, taken))}", remedy)]
    return [ok(f"ports {FIRST_PORT} to {LAST_PORT}: all {len(range(FIRST_PORT, LAST_PORT, 97))} tried are free")]


def limits() -> list[Finding]:
    """Open files, shared memory, memory, compiler."""
    out = []
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < LEAST_FILES:
        out.append(problem(f"only {files} open files allowed", f"ulimit -n {LEAST_FILES}, in setup: of the cluster profile"))
    if Path("/dev/shm").is_dir() and (size := shutil.disk_usage("/dev/shm")).free < LEAST_SHM:
        out.append(note(f"/dev/shm has only {size.free / 1e6:.0f} MB free", "give a container more, e.g. docker --shm-size 8g"))
    out += [problem(fault, "end other processes, or ask for more memory") for fault in memory_faults()]
    if not any(shutil.which(name) for name in ("gcc", "cc", "clang")):
        out.append(problem("no C compiler: Triton cannot build its launcher", "install gcc, or load a module that has it"))
    return out or [ok(f"{files} open files, memory and shared memory suffice")]


def file_system(directory: Path) -> list[Finding]:
    """Room, atomic rename and locks, where runs are to be written."""
    place = directory
    while not place.exists():
        place = place.parent
    faults = disk_faults(place)
    if faults:
        return [problem(fault, "choose another place for --run-dir, or make room") for fault in faults]
    kind = _kind_of(place)
    out = [ok(f"{place}: {shutil.disk_usage(place).free / 1e9:.0f} GB free, {kind}")]
    with tempfile.TemporaryDirectory(dir=place, prefix=".launch-") as scratch:
        out += _rename(Path(scratch)) + _lock(Path(scratch))
    return out


def _kind_of(place: Path) -> str:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    under = [m for m in mounts if place.resolve().is_relative_to(m[1].replace("\\040", " "))]
    return max(under, key=lambda m: len(m[1]))[2] if under else "unknown kind"


def _rename(scratch: Path) -> list[Finding]:
    """A reader that looks all the time while a file is replaced must always find a whole one."""
    target = scratch / "target"
    target.write_text("0" * 4096)
    script = "import sys\nwhile True:\n t=open(sys.argv[1]).read()\n if len(t)!=4096 or len(set(t))!=1: sys.exit(3)\n"
    reader = subprocess.Popen([sys.executable, "-S", "-c", script, target], stderr=subprocess.DEVNULL)
    try:
        for number in range(300):
            new = scratch / "new"
            new.write_text(str(number % 10) * 4096)
            os.replace(new, target)
        broken = reader.poll() is not None
    finally:
        reader.kill()
        reader.wait()
    if broken:
        return [problem("replacing a file is not atomic here", "put runs on another file system: checkpoints could be lost")]
    return [ok("files are replaced atomically")]


def _lock(scratch: Path) -> list[Finding]:
    with open(scratch / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            remedy = "mount with locks (Lustre: -o flock), or take care that no two runs share a directory"
            return [note(f"no file locks here ({error.strerror})", remedy)]
        code = subprocess.run([sys.executable, "-S", "-c", LOCK_HOLDER, scratch / "lock"]).returncode
    if code != 3:
        remedy = "mount with locks: two runs in one directory would not be noticed"
        return [problem("file locks do not exclude others here", remedy)]
    return [ok("file locks work")]


def clock() -> list[Finding]:
    """Whether the clock is kept right."""
    told = dict(line.partition("=")[::2] for line in query("timedatectl", "show"))
    if told.get("NTPSynchronized") == "no":
        return [note("the clock is not synchronised", "start chrony or systemd-timesyncd: times in logs will not fit together")]
    return [ok("the clock is synchronised")] if told.get("NTPSynchronized") == "yes" else []


def slurm() -> list[Finding]:
    """Whether SLURM is here and answers."""
    if not shutil.which("sbatch"):
        return [note("no SLURM here (sbatch not found)", "`launch local` trains on this machine")]
    partitions = query("sinfo", "--noheader", "--format", "%P %D nodes %l %G")
    if not partitions:
        return [note("SLURM is installed but does not answer (sinfo)", "look at SLURM_CONF and the controller: scontrol ping")]
    return [ok(f"SLURM: {'; '.join(partitions)}")]


def machine_findings(directory: Path) -> list[Finding]:
    """Everything about this machine."""
    return [*versions(), *gpu_findings(), *network(), *ports(), *limits(), *file_system(directory), *clock(), *slurm()]
