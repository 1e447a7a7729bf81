"""Jobs on other machines, without any: an executor plugin of the tests' own runs them as a cluster would."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_graph import STAND_IN

from grpo_engage.base.core import REPO_ROOT, read_json
from grpo_engage.run.folders import only_one

# As Slurm's: each job is Snakemake again, in another process that writes a log of its own.
ELSEWHERE = '''
import json
import subprocess
from pathlib import Path
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
from snakemake_interface_executor_plugins.settings import CommonSettings

common_settings = CommonSettings(
    non_local_exec=True, implies_no_shared_fs=False, job_deploy_sources=False, pass_default_storage_provider_args=True,
    pass_default_resources_args=True, pass_envvar_declarations_to_cmd=False,
    auto_deploy_default_storage_provider=False, init_seconds_before_status_checks=0)


class Executor(RemoteExecutor):
    def run_job(self, job):
        log = Path(f".snakemake/elsewhere_logs/rule_{job.name}/{job.jobid}.log").resolve()
        log.parent.mkdir(parents=True, exist_ok=True)
        asked = {name: job.resources.get(name) for name in ("mem_mb", "runtime", "gpu")} | {"threads": job.threads}
        nodes = self.workflow.resource_settings.nodes
        self.logger.info(f"asked {job.name} {json.dumps(asked)} of {nodes} (log: {log})")
        with open(log, "w") as handle:
            process = subprocess.Popen(self.format_job_exec(job), shell=True, stdout=handle, stderr=handle,
                                       cwd=self.workflow.workdir_init)  # where Slurm begins a job
        self.report_job_submission(SubmittedJobInfo(job, external_jobid=str(process.pid), aux={"process": process}))

    async def check_active_jobs(self, active_jobs):
        for info in active_jobs:
            code = info.aux["process"].poll()
            if code is None:
                yield info
            elif code:
                self.report_job_error(info, msg=f"log: {info.job}")
            else:
                self.report_job_success(info)

    def cancel_jobs(self, active_jobs):
        for info in active_jobs:
            info.aux["process"].kill()
'''
# A stage says what its job was given, and fails where the environment says so.
SAYS = '''
import os
stand_in = papermill.execute_notebook

def execute_and_say(notebook, executed, parameters, **options):
    if os.environ.get("BREAK"):
        raise RuntimeError("the disk of that machine is gone")
    stand_in(notebook, executed, parameters, **options)
    names = ("OMP_NUM_THREADS", "GRPO_ENGAGE_PARENT")
    (Path(executed).parent / "given.json").write_text(json.dumps({name: os.environ.get(name) for name in names}))

papermill.execute_notebook = execute_and_say
'''
SLOWLY = "--snakemake=--seconds-between-status-checks 1"


class Runs:
    """Commands in a folder of runs, with the executor `elsewhere` and stages that compute nothing."""

    def __init__(self, folder: Path):
        self.folder = folder
        plugin = folder / "python" / "snakemake_executor_plugin_elsewhere"
        plugin.mkdir(parents=True)
        (plugin / "__init__.py").write_text(ELSEWHERE)
        (folder / "python" / "sitecustomize.py").write_text(STAND_IN + SAYS)
        (folder / "posts.csv").write_text("tweet,reply\na,b\n")

    def environment(self, **more: str) -> dict:
        return os.environ | {"PYTHONPATH": f"{self.folder / 'python'}{os.pathsep}{REPO_ROOT}",
                             "PYTHONDONTWRITEBYTECODE": "1", "GRPO_ENGAGE_RUNS": str(self.folder / "runs")} | more

    def run(self, *words: str, preset: str = "smoke", **more: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "grpo_engage", "run", *words[:1], "--preset", preset, "-p",
                               "policy=nano", "--data", str(self.folder / "posts.csv"), *words[1:]], cwd=self.folder,
                              text=True, capture_output=True, env=self.environment(**more), timeout=600)

    def asked(self, name: str) -> dict[str, dict]:
        log = (self.folder / "runs" / name / "snakemake.log").read_text(encoding="utf-8")
        return {rule: json.loads(found) | {"nodes": int(nodes)}
                for rule, found, nodes in re.findall(r"^asked (\w+) (\{.*\}) of (\d+) ", log, flags=re.MULTILINE)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("a cluster's folder"))


@pytest.fixture(scope="module")
def finished(runs):
    """A run up to the stage policy, through the executor."""
    done = runs.run("policy", "--run", "one", "--executor", "elsewhere", "--jobs", "3", "--cores", "7", SLOWLY,
                    "--snakemake=--set-resources policy:runtime=77")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_executor_jobs_and_options_reach_snakemake_and_rules_carry_resources(runs, finished):
    assert runs.asked("one") == {
        "data": {"mem_mb": 8000, "runtime": 240, "gpu": 0, "threads": 7, "nodes": 3},
        "policy": {"mem_mb": 8000, "runtime": 77, "gpu": 0, "threads": 1, "nodes": 3}}
    assert "the jobs go to elsewhere" in finished.stdout


def test_a_job_elsewhere_has_its_own_cores_and_no_parent_here(runs, finished):
    for stage, threads in (("data", "7"), ("policy", "1")):
        folder = runs.folder / "runs" / "one" / stage
        assert read_json(folder / "given.json") == {"OMP_NUM_THREADS": threads, "GRPO_ENGAGE_PARENT": ""}
        assert read_json(folder / "manifest.json")["status"] == "completed"


def test_what_was_done_elsewhere_is_done_here(runs, finished):
    done = runs.run("policy", "--run", "one")
    assert done.returncode == 0, done.stderr
    assert (runs.folder / "runs" / "one" / "policy" / "executed.txt").read_text() == "x"


def test_an_earlier_run_says_what_is_asked_for(runs, finished, tmp_path):
    """Whatever machine it was made on; a profile names the executor."""
    (tmp_path / "config.yaml").write_text("executor: elsewhere\njobs: 2\nseconds-between-status-checks: 1\n")
    path = runs.folder / "runs" / "one" / "data" / "manifest.json"
    record = read_json(path)
    path.write_text(json.dumps(record | {"job_seconds": 3600.0, "peak_memory": 2e9, "hardware": {"machine": "abacus"}}))
    done = runs.run("data", "--run", "two", "--profile", str(tmp_path))
    path.write_text(json.dumps(record))
    assert done.returncode == 0, done.stderr
    assert runs.asked("two")["data"].items() >= {"mem_mb": 4000, "runtime": 190, "nodes": 2}.items()


def test_a_job_that_failed_elsewhere_says_here_why(runs):
    done = runs.run("data", "--run", "broken", "--executor", "elsewhere", SLOWLY, BREAK="1")
    assert done.returncode == 1
    assert "error: the disk of that machine is gone" in done.stderr and "Traceback" not in done.stderr


def test_a_job_waits_for_the_same_job_that_is_still_at_work(runs, finished):
    """Its command may have been killed, while the scheduler goes on with it."""
    run_dir = runs.folder / "runs" / "one"
    with only_one(run_dir / "data"):
        job = subprocess.Popen([sys.executable, "-m", "grpo_engage", "job", "data"], cwd=run_dir, text=True,
                               stdout=subprocess.PIPE, env=runs.environment(PYTHONUNBUFFERED="1"))
        assert "another command is at work" in job.stdout.readline() and job.poll() is None
    assert "kept" in job.communicate(timeout=120)[0] and job.returncode == 0


def test_what_a_gpu_preset_asks_for(runs):
    done = runs.run("train", "--run", "big", "--executor", "elsewhere", "--dry-run", "-p", "n_processes=4", "-p",
                    "n_machines=2", "-p", "gradient_accumulation=0", preset="gpu")
    assert done.returncode == 0, done.stderr
    rules = re.findall(r"^(?:local)?rule (\w+):$.*?^    resources: (.*?)$", done.stdout + done.stderr,
                       flags=re.MULTILINE | re.DOTALL)
    found = {rule: dict(part.split("=") for part in text.split(", ")) for rule, text in rules}
    assert {rule: int(asked["gpu"]) for rule, asked in found.items()} == {
        "data": 0, "heuristic_reward": 0, "reward_model": 1, "policy": 1, "train": 2}
    assert all((asked["mem_mb"], asked["runtime"]) == ("64000", "1440") for asked in found.values())


@pytest.mark.parametrize(("words", "said"), [
    (["--executor", "abacus"], "there is no executor 'abacus' here (installed: "),
    (["--profile", "nowhere"], "--profile nowhere: there is no such folder or file"),
    (["--snakemake=--directory /x"], "a run holds this itself"),
    (["--snakemake=-j 4"], "give --jobs to this command itself")])
def test_what_cannot_be_handed_on_is_refused(runs, words, said):
    done = runs.run("data", "--run", "never", *words)
    assert done.returncode == 2 and said in done.stderr and not (runs.folder / "runs" / "never").exists()


def test_the_profile_for_slurm_is_one():
    from snakemake.cli import get_argument_parser, get_profile_dir

    _, path = get_profile_dir(str(REPO_ROOT / "configs" / "slurm"))
    # comments that a user uncomments must be valid too
    known = {option for action in get_argument_parser()._actions for option in action.option_strings}
    text = re.sub(r"^# (?=[a-z-]+: |  |(?:default|set)-resources:$)", "", path.read_text(), flags=re.MULTILINE)
    names = re.findall(r"^([a-z-]+):", text, flags=re.MULTILINE)
    assert {"executor", "jobs", "retries", "set-resources", "default-resources"} <= set(names)
    assert [name for name in names if f"--{name}" not in known and not name.startswith("slurm-")] == []
