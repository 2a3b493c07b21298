"""A profile's fields: what sbatch and srun are asked to the letter, and what is refused with its file, line and fix."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from stamo_dist.errors import RunError
from stamo_dist.launch import chain, checks, slurm, supervise
from stamo_dist.launch.job import Job, Requests
from stamo_dist.launch.pipeline import Stage, Work
from stamo_dist.launch.profile import ProfileError, load_profile
from stamo_dist.launch.record import Launch, events
from stamo_dist.launch.sbatch import JobOrder, Sbatch
from stamo_dist.launch.submit import script

RUN = "/runs/tok é"
SNAPSHOT = f"{RUN}/launch/snapshots/TIME"
INSIDE = f"{SNAPSHOT}/code/run.py"


def order(folder: Path, run: str = RUN, **fields: Any) -> JobOrder:
    file = folder / "profile.yaml"
    file.write_text(yaml.safe_dump(fields, allow_unicode=True), encoding="utf-8")
    name, profile = load_profile(str(file))
    launch = Launch(
        "tok", run, "r.yaml", command=["train", "{snapshot}/recipe.yaml"], cluster=name, nodes=profile.nodes,
        profile=profile.model_dump(mode="json"), processes_per_node=profile.processes, node_counts=[profile.nodes],
    )  # fmt: skip
    return JobOrder(launch, profile)


GPU_NODE = {"nodes": 2, "gpus_per_node": 8, "cpus_per_gpu": 12, "time": "1-00:00:00"}
WHOLE = f"""\
#!/bin/bash

# Parameters
#SBATCH --chdir={{cwd}}
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --gres=gpu:h100:8,nvme:1
#SBATCH --job-name=tok
#SBATCH --nodes=2
#SBATCH --open-mode=append
#SBATCH --output='{RUN}/logs/main.log'
#SBATCH --requeue
#SBATCH --segment=2
#SBATCH --signal=USR1@180
#SBATCH --time=1-00:00:00

# setup
export NOTE='it'"'"'s ünï $HOME'
export APPTAINERENV_NOTE='it'"'"'s ünï $HOME'
export APPTAINER_NO_EVAL=1
type module >/dev/null 2>&1 || for f in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh \
/usr/share/modules/init/bash /usr/share/lmod/lmod/init/bash; do [ -r $f ] && . $f && break; done
module load cuda/12.8 apptainer || {{{{ echo 'modules: cuda/12.8 apptainer: could not be loaded' >&2; exit 2; }}}}
ulimit -n 65536

# command
export SUBMITIT_EXECUTOR=slurm
exec {sys.executable} '{INSIDE}' stamo_dist.launch.job '{RUN}'

# It starts the processes with
#   srun --nodes=2 --ntasks=16 --ntasks-per-node=8 --cpus-per-task=12 --wait=20 --kill-on-bad-exit=0 --export=ALL \
--input=none --cpu-bind=none --mpi=none apptainer exec --nv '--bind={RUN}:{RUN}' --bind={{cwd}}:{{cwd}} \
'--bind=/data sets/ä:/data:ro' --bind=/scratch:/scratch --no-home '/images/my stamo.sif' python3 '{INSIDE}' \
stamo_dist.launch.rank train '{SNAPSHOT}/recipe.yaml'
"""


def test_every_field_to_the_letter(tmp_path: Path) -> None:
    asked = order(
        tmp_path, **GPU_NODE, gpu_type="h100", gpu_request="gres", sbatch={"gres": "nvme:1"}, exclusive=True, segment=2,
        cpu_bind="gpu", modules=["cuda/12.8", "apptainer"], setup=["ulimit -n 65536"],
        environment={"NOTE": "it's ünï $HOME"}, container={
            "kind": "apptainer", "image": "/images/my stamo.sif", "mounts": ["/data sets/ä:/data:ro", "/scratch"],
            "options": ["--no-home"],
        },
    )  # fmt: skip
    assert script(asked) == WHOLE.format(cwd=Path.cwd())


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, ["--gpus-per-node=8"]),
        ({"gpu_request": "gres"}, ["--gres=gpu:8"]),
        ({"gpu_request": "gpus", "gpu_type": "a100"}, ["--gpus=a100:16"]),
        ({"gpus_per_node": 0, "processes_per_node": 8, "gpu_request": "gres"}, []),
    ],
)
def test_gpus_are_asked_for_as_the_cluster_wants(tmp_path: Path, fields: dict[str, Any], options: list[str]) -> None:
    lines = script(order(tmp_path, **{**GPU_NODE, **fields})).splitlines()
    assert [line for line in lines if line.startswith("#SBATCH --g")] == [f"#SBATCH {option}" for option in options]
    assert "#SBATCH --cpus-per-task=96" in lines


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"image": "nvcr.io#nvidia/pytorch:25.09-py3", "mounts": ["/data:/data"], "options": ["--x"]},
            f"'--container-image=nvcr.io#nvidia/pytorch:25.09-py3' '--container-mounts={RUN}:{RUN},{{cwd}}:{{cwd}},"
            "/data:/data' --container-workdir={cwd} --container-env=NCCL_DEBUG,TAG --x --mpi=none python3 ",
        ),
        (
            {"kind": "singularity", "image": "s.sif", "options": ["--rocm"]},
            f"--mpi=none singularity exec '--bind={RUN}:{RUN}' --bind={{cwd}}:{{cwd}} --rocm s.sif python3 ",
        ),
    ],
)  # fmt: skip
def test_containers(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    """Everything but the job itself runs inside, with the profile's environment in place of the image's."""
    text = script(order(tmp_path, **GPU_NODE, container=fields, environment={"NCCL_DEBUG": "WARN", "TAG": 1}))
    srun = text.splitlines()[-1]
    assert f"--input=none {words.format(cwd=Path.cwd())}'{INSIDE}' stamo_dist.launch.rank train" in srun
    assert ("export SINGULARITYENV_NCCL_DEBUG=WARN" in text) == ("kind" in fields)
    assert f"exec {sys.executable} '{INSIDE}' stamo_dist.launch.job" in text


def test_what_the_profile_says_of_the_processes_comes_last(tmp_path: Path) -> None:
    asked = order(tmp_path, python="/opt/venv/bin/python", srun=["--mpi=pmix", "--distribution=block:block"])
    assert f"--input=none --mpi=pmix --distribution=block:block /opt/venv/bin/python '{INSIDE}'" in script(asked)
    assert "--cpu-bind=map_ldom:0,1 --mpi=none" in script(order(tmp_path, cpu_bind="map_ldom:0,1"))


def test_a_run_of_a_sweep_is_mounted_with_the_folder_above(tmp_path: Path) -> None:
    """Its own name has commas, which separate mounts."""
    inside = {"kind": "apptainer", "image": "s.sif"}
    text = script(order(tmp_path, run="/runs/sweep/lr=0.1,seed=0", container=inside))
    assert " --bind=/runs/sweep:/runs/sweep " in text
    asked = order(tmp_path, run="/a:b/run", container=inside)
    with pytest.raises(RunError, match="run_dir: /a:b/run cannot be mounted into a container"):
        checks.shell_and_container(asked.launch, "")


def test_an_image_that_is_not_here_is_said(tmp_path: Path) -> None:
    asked = order(tmp_path, container={"image": f"{tmp_path}/s.sqsh"})
    assert checks.shell_and_container(asked.launch, "") == [
        f"container.image: {tmp_path}/s.sqsh is not on this machine; the nodes must have it"
    ]
    (tmp_path / "s.sqsh").touch()
    assert checks.shell_and_container(asked.launch, "") == []


WRONG = {
    "segment: 2": "segment: blocks of 2 nodes do not divide 3 nodes; change nodes, or leave it out",
    "gpu_request: gpu": "gpu_request: must be one of gpus-per-node, gres, gpus, not gpu",
    "gpu_request: gpus\nmin_nodes: 1": "gpu_request: gpus is a number for the whole job, which min_nodes and max_nodes",
    "cpu_bind: gpu": "cpu_bind: gpu needs gpus_per_node",
    "modules: [cuda/12.8, purge all]": "modules: 'purge all' is no name of a module; one each",
    "setup: ['#SBATCH --signal=USR2@60']": "setup: '#SBATCH --signal=USR2@60' is for sbatch; write it under sbatch:",
    "srun: [--signal=USR1@5]": "srun: --signal=USR1@5 is decided by the profile's fields or the launcher; signal_delay",
    "srun: [--gpus-per-task=1]": "and would see one GPU only; cpu_bind: gpu keeps it to the CPUs beside it",
    "srun: [-n4]": "srun: -n4 is decided by the profile's fields or the launcher; leave it out",
    "sbatch: {signal: USR2@1}": "sbatch: signal is decided by the profile's fields or the launcher; signal_delay says",
    "sbatch: {cpus_per_gpu: 4}": "sbatch: cpus_per_gpu is decided by the profile's fields or the launcher; write cpus_",
    "sbatch: {N: 3}": "sbatch: 'N' is no long name of an option; write it as `reservation: robots`, without dashes",
    "sbatch: {container-image: x}": "sbatch: container-image is decided by the profile's fields or the launcher; it wo",
    "container: {image: s.sif}": "container.kind: pyxis reads no .sif file, as s.sif; write kind: apptainer",
    "container: {image: ~/s.sqsh}": "container.image: no shell expands ~/s.sqsh; write the whole path",
    "container: {image: s, mounts: ['~/d:/d']}": "container.mounts: '~/d:/d' is not SOURCE:TARGET or SOURCE:TARGET:ro",
    "container: {image: s, mounts: ['/a,b:/d']}": "a path with , or : cannot be mounted",
    "container: {image: s, kind: apptainer, options: [-e]}": "container.options: -e hides the job's variables from its",
    "container: {image: s, options: [--container-mounts=/a:/a]}": "container.options: --container-mounts is made of im",
    "container: {image: s}\nbackend: local": "container: is for Slurm's jobs; start stamo itself in the container",
    "container: {imgae: s.sqsh}": "container.imgae: no such field; did you mean image?",
}  # fmt: skip


@pytest.mark.parametrize("fields", WRONG)
def test_a_wrong_field_is_said_in_one_line(tmp_path: Path, fields: str) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text(f"nodes: 3\n{fields}\n")
    with pytest.raises(ProfileError) as refused:
        load_profile(str(file))
    lines = [line for line in refused.value.problems if WRONG[fields] in line]
    assert len(lines) == 1
    assert lines[0].startswith((f"{file}:2: ", f"{file}:3: "))


def test_gpus_are_not_asked_for_twice(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="sbatch: gres asks for GPUs beside gpus_per_node; write gpu_request: gres"):
        order(tmp_path, gpus_per_node=8, sbatch={"gres": "gpu:8"})
    order(tmp_path, processes_per_node=8, sbatch={"gres": "gpu:8"})  # another's way, from before gpu_request


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SBATCH_SIGNAL", "USR2@60", "signal_delay says how many seconds before the time limit"),
        ("SBATCH_TIMELIMIT", "10", "would win over what the script asks for; `unset SBATCH_TIMELIMIT`"),
        ("SBATCH_NO_REQUEUE", "1", "would win over what the script asks for; `unset SBATCH_NO_REQUEUE`"),
        ("SBATCH_GPUS", "4", "would win over what the script asks for; `unset SBATCH_GPUS`"),
        ("SBATCH_PARTITION", "cpu", "SBATCH_PARTITION=cpu in your environment would win over what the script asks for"),
        ("SBATCH_PARTITION", "gpu", None),
        ("SBATCH_OUTPUT", f"{RUN}/logs/main.log", None),
        ("SBATCH_REQUEUE", "1", None),
        ("SBATCH_RESERVATION", "robots", None),
    ],
)
def test_variables_of_the_shell_that_would_win(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str | None
) -> None:
    """sbatch takes its variables before the lines of a script."""
    asked = order(tmp_path, **GPU_NODE, partition="gpu")
    text = script(asked)
    monkeypatch.setenv(variable, value)
    if said is None:
        assert checks.shell_and_container(asked.launch, text) == []
    else:
        with pytest.raises(ProfileError) as refused:
            checks.shell_and_container(asked.launch, text)
        assert said in refused.value.problems[0]


MODULES = 'module() { [ "$2" = "my tool/1" ] && export LOADED="$*"; }; export -f module; '


@pytest.mark.parametrize("loads", [True, False])
def test_modules_and_variables_reach_the_run_or_end_it(tmp_path: Path, loads: bool) -> None:
    """As bash reads the script, from a shell that defines `module` as clusters do."""
    nasty = 'it\'s "ünï"\n$HOME `id` \\ *'
    made = order(tmp_path, environment={"NASTY": nasty}, modules=["cuda/12.8"], setup=["SET='a b'; export SET"])
    modules = ["my tool/1"] if loads else ["cuda/12.8"]
    launch = made.profile.model_copy(update={"modules": modules})
    text = script(JobOrder(made.launch, launch)).partition("\nexec ")[0]
    ask = 'printf "%s|" "$NASTY" "$LOADED" "$SET"'
    done = subprocess.run(
        ["bash", "-c", f'{MODULES} exec bash "$0"', str(_file(tmp_path, f"{text}\n{ask}\n"))],
        check=False, capture_output=True, text=True, env=dict(os.environ), timeout=60,
    )  # fmt: skip
    if loads:
        assert (done.returncode, done.stdout) == (0, f"{nasty}|load my tool/1|a b|")
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert "modules: cuda/12.8: could not be loaded" in done.stderr


def test_logs_lie_where_the_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an array too, whose tasks open their logs themselves; what Slurm takes out of a path is refused."""
    monkeypatch.setattr(slurm, "run", lambda *words, **_: "Submitted batch job 7")
    run = tmp_path / "100% %j" / "sweep" / "lr=1"
    asked = order(tmp_path, str(run))
    assert Sbatch(replace(asked, members=[asked])).send() == "7"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100% %j", "profile.yaml"]
    assert (run.parent / "logs").is_dir()
    assert "/100%% %%j/sweep/logs/task_%a.log" in Sbatch(replace(asked, members=[asked])).text()
    with pytest.raises(RunError, match=r"run_dir: /runs/a\\b has '\\\\', which Slurm takes out of a path"):
        script(order(tmp_path, "/runs/a\\b"))


def test_modules_on_this_machine(tmp_path: Path) -> None:
    """The local launcher's processes get them too."""
    made = order(tmp_path, backend="local", modules=["cuda"])
    text = supervise.command(made.launch)[2]
    assert "module load cuda || " in text
    assert text.endswith('exec "$@"')


def test_a_stage_of_one_process_asks_for_less(tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    given = {**GPU_NODE, "segment": 2, "exclusive": True, "cpu_bind": "gpu", "gpu_request": "gpus"}
    file.write_text(yaml.safe_dump(given))
    profile = load_profile(str(file))[1]
    for words, options in (
        ("data convert rlds a b", ["--cpus-per-task=96", "--exclusive"]),
        ("eval probe run", ["--cpus-per-task=12", "--gpus=1"]),
    ):
        work = Work("s", Stage(run=words), tmp_path, words.split(), None, [])
        alone = load_profile(str(file), chain._shape(work, profile))[1]
        launch = Launch("s", str(tmp_path), "", command=words.split(), profile=alone.model_dump(mode="json"))
        lines = script(JobOrder(launch, alone)).splitlines()
        asked = ("#SBATCH --cpus", "#SBATCH --excl", "#SBATCH --segment", "#SBATCH --g")
        assert [line.split()[1] for line in lines if line.startswith(asked)] == options


def _file(folder: Path, text: str) -> Path:
    file = folder / "job.sh"
    file.write_text(text)
    return file


def test_a_node_without_apptainer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job ends with code 2, and its record says which module is to be named."""
    made = order(tmp_path, run=str(tmp_path / "run"), container={"kind": "apptainer", "image": "s.sif"})
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text("#!/bin/sh\n")
    (tools / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    for name, value in {"JOB_ID": "1", "JOB_NODELIST": "n1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made.launch.write()
    assert Job(made.launch, Requests()).work() == 2
    assert "there is no apptainer on " in events(made.launch.run_dir)[-1].reason
    assert "modules in the profile" in events(made.launch.run_dir)[-1].reason
