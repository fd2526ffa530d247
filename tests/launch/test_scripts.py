"""What the generated scripts say, and that bash and shellcheck find nothing in any of them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, TinyData
from unfold.launch.command import main

SHELLCHECK = Path(sys.executable).parent / "shellcheck"


@pytest.fixture
def config(tmp_path):
    """A configuration whose data need not be read: the files are empty."""
    data = TinyData(tmp_path / "data")
    data.tokenizer.mkdir(parents=True)
    for prefix in (data.train, data.valid):
        prefix.with_suffix(".bin").touch()
    return data.config(tmp_path / "a b.yaml", train={"steps": 12, "global_batch": 16})


@pytest.fixture
def launch(capsys, monkeypatch):
    """Run the command line in this process, from the project's root: (exit code, stdout, stderr)."""
    monkeypatch.chdir(ROOT)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["launch", *map(str, words)])
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture
def slurm(launch, config, tmp_path):
    """``launch slurm --dry-run`` with further options."""
    return lambda *more: launch("slurm", "--config", config, "--run-dir", tmp_path / "my run", "--nodes", 2, "--dry-run", *more)


def scripts_of(text: str) -> list[str]:
    return ["#!/bin/bash" + part for part in text.split("#!/bin/bash")[1:]]


def options_of(script: str) -> list[str]:
    """The sbatch options, as sbatch reads them."""
    lines = re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)
    return [word for line in lines for word in shlex.split(line)]


PROFILE = {
    "account": "my project", "partition": "gpu", "qos": "long", "time": "4:00:00", "gpus_per_node": 4, "cpus_per_rank": 8,
    "memory": "480G", "constraint": "h100&ib", "nodelist": "n[1-8]", "exclude": "n3", "reservation": "r", "exclusive": True,
    "mail_type": "END,FAIL", "mail_user": "me@example.org", "dependency": "afterany:12", "signal_lead": 300,
    "modules": ["cuda/12.4", "gcc"], "venv": "/envs/my env", "setup": "ulimit -l unlimited\nexport X=1",
    "sbatch": ["--comment='a b'"],
    "srun": ["--cpu-bind=cores"], "environment": {"NCCL_SOCKET_IFNAME": "ib0", "NOTE": "it's $HOME"},
    "cpu_jobs": {"partition": "cpu", "time": "30", "cpus_per_rank": 16},
}  # fmt: skip
VARIANTS = {
    "plain": (),
    "no requeue": ("--no-requeue", "--no-health-check"),
    "task per rank": ("--launcher", "srun", "--gpu-request", "gres:h100", "--gpus-per-node", 8),
    "cpu": ("--gpus-per-node", 0, "--ranks-per-node", 2, "--gpu-request", "none"),
    "pyxis": ("--container-image", "nvcr.io#nvidia/pytorch:25.06-py3", "--container-mounts", "/data:/data,/my dir:/x"),
    "apptainer": ("--container-image", "/images/my image.sif", "--container-runtime", "apptainer"),
    "quotes": ("--set", 'data.cache=/tmp/it\'s $HOME `x` "y"', "--job-name", "a 'b' \"c\" %j", "--python", "/my python/python"),
}


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(PROFILE))
    return path


def check_scripts(text: str, tmp_path) -> list[str]:
    scripts = scripts_of(text)
    assert scripts
    for number, script in enumerate(scripts):
        path = tmp_path / f"script-{number}.sh"
        path.write_text(script)
        for command in (["bash", "-n", path], [SHELLCHECK, path]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{script}"
    return scripts


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("with_profile", [False, True], ids=["flags", "profile"])
def test_training_scripts_are_sound(slurm, profile, tmp_path, variant, with_profile):
    code, out, err = slurm(*(("--cluster", profile) if with_profile else ()), *VARIANTS[variant])
    assert code == 0, err
    check_scripts(out, tmp_path)


def test_every_setting_reaches_the_script(slurm, profile):
    _, script, _ = slurm("--cluster", profile, "--qos", "short", "--modules", "more")
    options = options_of(script)
    for option in (
        "--account=my project", "--partition=gpu", "--qos=short", "--time=4:00:00", "--nodes=2", "--ntasks-per-node=1",
        "--cpus-per-task=32", "--gpus-per-node=4", "--mem=480G", "--constraint=h100&ib", "--nodelist=n[1-8]", "--exclude=n3",
        "--reservation=r", "--exclusive", "--mail-type=END,FAIL", "--mail-user=me@example.org", "--dependency=afterany:12",
        "--signal=B:USR1@300", "--requeue", "--open-mode=append", "--kill-on-invalid-dep=yes", "--comment=a b",
        "--job-name=my run",
    ):  # fmt: skip
        assert option in options, option
    assert "module load cuda/12.4 gcc more" in script and "\nulimit -l unlimited\nexport X=1\n" in script
    assert "export OMP_NUM_THREADS=8\n" in script and "--cpu-bind=cores" in script
    values = dict(re.findall(r"^export (\w+)=(.*)$", script, re.MULTILINE))
    assert shlex.split(values["NOTE"]) == ["it's $HOME"] and values["NCCL_SOCKET_IFNAME"] == "ib0"
    assert 'source "$venv/bin/activate"' in script and "\npython=python\n" in script


def test_what_the_shell_makes_of_the_words(slurm, tmp_path):
    """Run with its commands replaced, the script hands the training exactly what was given."""
    _, script, _ = slurm(*VARIANTS["quotes"])
    words = script[script.rindex("-m unfold.pretrain train") :].splitlines()[0]
    line = ["bash", "-c", f"printf '%s\\n' {words}"]
    shown = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()
    assert shown[-1] == 'data.cache=/tmp/it\'s $HOME `x` "y"' and shown[shown.index("--run-dir") + 1] == str(tmp_path / "my run")
    assert "--job-name=a 'b' \"c\" %j" in options_of(script)


def test_task_per_rank_and_containers(slurm, tmp_path):
    _, script, _ = slurm(*VARIANTS["task per rank"], "--cpus-per-rank", 6)
    assert {"--ntasks-per-node=8", "--cpus-per-task=6", "--gres=gpu:h100:8"} <= set(options_of(script))
    assert "--ntasks=$((SLURM_NNODES * 8)) --ntasks-per-node=8" in script and "torch.distributed.run" not in script
    _, script, _ = slurm(*VARIANTS["pyxis"])
    assert script.count("--container-image=nvcr.io#nvidia/pytorch:25.06-py3") == 2, "health check and ranks"
    assert f"/my dir:/x,{ROOT}:{ROOT},{tmp_path}:{tmp_path}" in script
    _, script, _ = slurm(*VARIANTS["apptainer"])
    assert script.count("apptainer exec --nv --bind") == 2 and "'/images/my image.sif'" in script


def test_array_and_chain_scripts_are_sound(launch, config, profile, tmp_path):
    tokenize = ("--", "--input", "my corpus", "--tokenizer", "t", "--output", "shards/my text", "--valid-fraction", "0.1")
    code, out, err = launch("array", "--parts", 12, "--limit", 4, "--dry-run", "--cluster", profile, *tokenize)
    assert code == 0, err
    array, merge = check_scripts(out, tmp_path)
    assert {"--array=1-12%4", "--partition=cpu", "--time=30", "--cpus-per-task=16"} <= set(options_of(array))
    assert not any("gpu" in option for option in options_of(array) if "chdir" not in option and "output" not in option)
    assert "--dependency=afterok:ARRAY,afterany:12" in options_of(merge) and "'shards/my text_valid'" in merge

    chain = ("--prepare", "data_prep verify 'a b'", "--evaluate", "pretrain report x", "--export", tmp_path / "hf")
    code, out, err = launch(
        "chain", "--config", config, "--run-dir", tmp_path / "run", "--nodes", 2, "--dry-run", "--cluster", profile, *chain
    )
    assert code == 0, err
    prepare, train, evaluate, export = check_scripts(out, tmp_path)
    assert "data_prep verify 'a b'" in prepare and "--partition=cpu" in options_of(prepare)
    assert "--nodes=2" in options_of(train) and {"--nodes=1", "--gpus-per-node=1"} <= set(options_of(evaluate))
    assert f"--run-dir {tmp_path}/run --output {tmp_path}/hf" in export and "--partition=cpu" in options_of(export)


MISTAKES = [
    (("--time", "5x"), "error: --time: '5x' is not a time limit; give MINUTES"),
    (("--memory", "lots"), "error: --memory: 'lots' is not a memory size"),
    (("--nodes", 0), "error: --nodes 0: is below 1"),
    (("--gpus-per-node", 3), "16 is not a multiple of train.micro_batch x data-parallel ranks = 1 x 6; set it to 18"),
    (("--set", "parallel.pipeline=2", "--nodes", 3, "--set", "train.global_batch=12"), "does not divide; 4 ranks would do"),
    (("--launcher", "mpi"), "launcher: 'mpi' is not one of torchrun, srun"),
    (("--signal-lead", 600, "--time", 10), "error: --signal-lead 600: is not below the time limit of 600 s"),
    (("--account", "a\nb"), "holds a line break"),
    (("--container-runtime", "pyxis"), "image: '' with runtime: pyxis; give both, or neither"),
    (("--environment", "X"), "error: --environment X: expected NAME=VALUE"),
    (("--set", "data.train=[/nowhere/x]"), "error: data.train: /nowhere/x.bin does not exist"),
    (("--set", "train.step=3"), "train.step: unknown key; did you mean train.steps?"),
    (("--cluster", "/nowhere.yaml"), "error: --cluster /nowhere.yaml: cannot be read (No such file or directory)"),
]


@pytest.mark.parametrize("words, message", MISTAKES, ids=lambda value: str(value)[:30])
def test_mistakes_are_told_in_one_line(slurm, words, message):
    code, out, err = slurm(*words)
    assert code == 1 and message in err and err.count("\n") == 1 and not out


def test_mistakes_in_a_profile(slurm, tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("partitoin: gpu\nmax_restarts: many\ncpu_jobs: {acount: x}\n")
    code, _, err = slurm("--cluster", path)
    assert code == 1 and "partitoin: unknown key; did you mean partition?" in err and "max_restarts: input should be" in err
    path.write_text("cpu_jobs: {acount: x}\n")
    assert "cpu_jobs: acount: unknown key; did you mean account?" in slurm("--cluster", path)[2]
    path.write_text("time: 4:00:00\nexclusive: yes\nqos:\n")
    options = options_of(slurm("--cluster", path)[1])
    assert "--time=4:00:00" in options and "--exclusive" in options and not any("qos" in option for option in options)


def test_a_run_with_other_settings_is_refused_before_it_queues(slurm, launch, config, tmp_path):
    run_dir = tmp_path / "my run"
    (run_dir / "checkpoints/step-00000003").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config.read_text())
    assert slurm("--set", "parallel.zero=2")[0] == 0
    code, _, err = slurm("--set", "optimizer.lr=1")
    assert code == 1 and "optimizer.lr: 0.001 in the run, 1.0 given" in err
    assert slurm("--set", "optimizer.lr=1", "--set", "train.allow_changes=[optimizer]")[0] == 0


def test_nothing_is_overwritten(tmp_path):
    from unfold.launch.submit import write_new

    written = [write_new(tmp_path / "launch", "run", ".sbatch", text) for text in "ab"]
    assert [path.name for path in written] == ["run-001.sbatch", "run-002.sbatch"]
    assert [path.read_text() for path in written] == ["a", "b"]


@pytest.mark.parametrize(
    "nodes,ranks,tensor,context,method,heads,would_do",
    [
        (2, 8, 1, 16, "gists", 8, ""),
        (4, 4, 1, 16, "gists", 8, "parallel.context_heads: 4 would"),
        (2, 8, 2, 8, "gists", 4, ""),
        (2, 8, 4, 4, "gists", 2, ""),
        (4, 8, 4, 8, "gists", 4, "parallel.context_heads: 2 would"),
        (4, 3, 1, 4, "gists", 2, "parallel.context_heads: 1 would"),
        (2, 4, 1, 8, "ulysses", 1, "parallel.context_heads: 4 with context_method: gists would"),
        (1, 8, 1, 8, "ulysses", 1, ""),
        (2, 4, 1, 8, "gists", 1, ""),
    ],
)
def test_heads_traded_between_nodes_are_told(slurm, nodes, ranks, tensor, context, method, heads, would_do):
    settings = (f"parallel.tensor={tensor}", f"parallel.context={context}", f"parallel.context_method={method}")
    settings += (f"parallel.context_heads={heads}", "model.heads=32", "model.kv_heads=16", "train.global_batch=48")
    code, _, told = slurm("--nodes", nodes, "--gpus-per-node", ranks, *(x for s in settings for x in ("--set", s)))
    trading = context if method == "ulysses" else heads
    firsts = [rank for rank in range(nodes * ranks) if rank % (tensor * trading) < tensor]
    groups = [[first + k * tensor for k in range(trading)] for first in firsts]
    assert code == 0, told
    assert bool(would_do) == any(group[0] // ranks != group[-1] // ranks for group in groups)
    lines = [line for line in told.splitlines() if "trade heads" in line]
    assert len(lines) == bool(would_do) and all(would_do in line for line in lines)


def test_local(launch, config, tmp_path):
    where = ("--config", config, "--run-dir", tmp_path / "my run")
    code, out, _ = launch("local", *where, "--ranks", 2, "--dry-run")
    words = shlex.split(out)
    assert code == 0 and words[words.index("--nproc-per-node") + 1] == "2" and words[-1] == str(tmp_path / "my run")
    assert launch("local", *where, "--ranks", 3, "--dry-run")[2].startswith("error: --ranks = 3 rank(s): train.global_batch: 16")
    assert launch("local", *where, "--ranks", 0, "--dry-run")[2] == "error: --ranks 0: is below 1\n"


def test_array_needs_an_output(launch):
    assert "with --output PREFIX among them" in launch("array", "--parts", 2, "--", "--input", "x")[2]
    assert "--part: is given by" in launch("array", "--parts", 2, "--", "--output", "x", "--part", "1/2")[2]
    assert (
        "expected what follows `python -m`"
        in launch("chain", "--config", "launch/configs/tiny.yaml", "--run-dir", "/tmp/x", "--nodes", 1, "--prepare", "rm -rf x")[
            2
        ]
    )
