"""The user's own settings: a run gives the same bytes under all of them, or one line; what is meant to count counts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from accelerate.commands import launch
from accelerate.commands.config import config_args
from jupyter_client import KernelManager
from matplotlib.font_manager import FontProperties, findfont

from grpo_engage.base.core import REPO_ROOT, read_json
from grpo_engage.base.environment import LEFT_OUT, own_environment, without_settings
from grpo_engage.base.plots import style
from grpo_engage.base.processes import launch_command
from grpo_engage.run.execution import ThisInterpreter

RUN = ["-m", "grpo_engage", "run", "data", "--preset", "smoke", "-p", "n_conversations=40"]
EXITS = "raise SystemExit('a startup file of the user was run')\n"
FOREIGN = '{"argv": ["/bin/false", "{connection_file}"], "display_name": "Python 3", "language": "python"}'
ACCELERATE = ("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: fp16\n"
              "num_machines: 2\nnum_processes: 16\nmachine_rank: 1\nmain_process_ip: 10.9.8.7\n"
              "main_process_port: 29500\n"
              "rdzv_backend: c10d\nsame_network: false\ndowncast_bf16: 'yes'\ndebug: true\nuse_cpu: false\n"
              "dynamo_config: {dynamo_backend: INDUCTOR}\n")
# What a shell on a cluster, in a notebook, under another program may hold. `@` stands for the folder with FILES.
LAUNCHED = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
            "ROLE_NAME": "default", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_USE_AGENT_STORE": "True", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "PMI_SIZE": "2",
            "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "ACCELERATE_MIXED_PRECISION": "bf16",
            "ACCELERATE_USE_FSDP": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "FSDP_VERSION": "2",
            "ACCELERATE_DYNAMO_BACKEND": "inductor", "ACCELERATE_CONFIG_FILE": "@/accelerate.yaml"}
LEAKS = LAUNCHED | {
    "SNAKEMAKE_PROFILE": "@/slurm", "SNAKEMAKE_OUTPUT_CACHE": "/none", "MATPLOTLIBRC": "@/matplotlib",
    "MPLBACKEND": "TkAgg", "MPLCONFIGDIR": "@/a_file", "JUPYTER_PATH": "@/jupyter", "JUPYTER_CONFIG_DIR": "@/a_file",
    "JUPYTER_DATA_DIR": "@/jupyter", "JUPYTER_PREFER_ENV_PATH": "0", "JUPYTER_RUNTIME_DIR": "@/a_file",
    "IPYTHONDIR": "@/ipython", "PYTHONSTARTUP": "@/exits.py", "PYTHONHASHSEED": "7", "PYTHONWARNINGS": "error",
    "PYTHONOPTIMIZE": "2", "PYTHONIOENCODING": "ascii", "PYTHONBREAKPOINT": "none.at_all", "GIT_DIR": "/none",
    "GIT_WORK_TREE": "/none", "GIT_INDEX_FILE": "/none", "LC_ALL": "tr_TR.ISO-8859-9", "LANG": "tr_TR",
    "TZ": "Asia/Tokyo", "COLUMNS": "20", "NO_COLOR": "1", "FORCE_COLOR": "1", "CI": "true", "TERM": "dumb",
    "BASH_ENV": "@/exits.sh", "PANDAS_COPY_ON_WRITE": "1", "TQDM_MININTERVAL": "soon",
    "TRANSFORMERS_VERBOSITY": "debug", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_none",
    "WANDB_MODE": "online", "WANDB_PROJECT": "other", "COMET_API_KEY": "none",
    "MLFLOW_TRACKING_URI": "http://none.invalid", "TYPST_ROOT": "/none", "SOURCE_DATE_EPOCH": "",
    "SCIPY_ARRAY_API": "1", "USE_TORCH": "0", "JOBLIB_TEMP_FOLDER": "/none", "SKLEARN_ASSUME_FINITE": "1",
    "CUDA_VISIBLE_DEVICES": "", "ONEDNN_DEFAULT_FPMATH_MODE": "BF16", "ATEN_CPU_CAPABILITY": "default",
    "PYTORCH_JIT": "0", "GRPO_ENGAGE_LAUNCHER": "elsewhere:1", "GRPO_ENGAGE_PARENT": "elsewhere:1",
    "GRPO_ENGAGE_PYTHON": "/bin/false"}
FILES = {  # below a folder
    "slurm/config.yaml": "executor: slurm\njobs: 100\n", "matplotlib/matplotlibrc": "text.usetex: True\n", "a_file": "",
    "jupyter/kernels/python3/kernel.json": FOREIGN, "ipython/profile_default/startup/00.py": EXITS, "exits.py": EXITS,
    "ipython/profile_default/ipython_config.py": "c.InteractiveShellApp.exec_lines = ['raise SystemExit']\n",
    "exits.sh": "exit 9\n", "accelerate.yaml": ACCELERATE}
HOME = {  # below the home folder
    ".config/matplotlib/matplotlibrc": "text.usetex: True\n", ".ipython/profile_default/startup/00.py": EXITS,
    ".ipython/profile_default/ipython_kernel_config.py": "c.IPKernelApp.exec_lines = ['raise SystemExit']\n",
    ".config/snakemake/default/config.yaml": "executor: slurm\n", ".jupyter/jupyter_config.py": EXITS,
    ".local/share/jupyter/kernels/python3/kernel.json": FOREIGN, ".gitconfig": "[broken\n", ".bashrc": "exit 9\n",
    ".cache/huggingface/accelerate/default_config.yaml": ACCELERATE, ".condarc": "x", ".profile": "exit 9\n"}
HERE = {  # where the command is given
    "random.py": EXITS, "yaml.py": EXITS, "tests/__init__.py": EXITS, "data/__init__.py": EXITS, "papermill.py": EXITS,
    "matplotlibrc": "text.usetex: True\n", "profiles/default/config.yaml": "executor: slurm\n", ".env": "X=1"}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def environment(tmp, more=None):
    """This process's environment for a run below `tmp`, with the variables `more`."""
    clean = without_settings(os.environ)
    paths = os.pathsep.join([str(REPO_ROOT), *filter(None, [clean.get("PYTHONPATH")])])  # it may not be installed
    return clean | {"GRPO_ENGAGE_RUNS": str(tmp / "runs"), "PYTHONPATH": paths} | {
        name: value.replace("@", str(tmp / "files")) for name, value in (more or {}).items()}


def called(words, tmp, more=None, cwd=REPO_ROOT, before="true", timeout=300):
    """`words` given to this interpreter by a shell that does `before` first."""
    command = ["sh", "-c", f'{before}; exec "$0" "$@"', sys.executable, *words]
    return subprocess.run(command, env=environment(tmp, more), cwd=cwd, capture_output=True, text=True, timeout=timeout)


def results(run_dir):
    """Name -> bytes of what the stage wrote, without what holds times: manifest and executed notebook."""
    paths = [path for path in (run_dir / "data").rglob("*")
             if path.is_file() and path.suffix not in (".json", ".ipynb")]
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("clean")
    (tmp / "home").mkdir()
    done = called([*RUN, "--run", "a"], tmp, {"HOME": str(tmp / "home")})
    assert done.returncode == 0, done.stderr
    found = results(tmp / "runs" / "a")
    assert [*(tmp / "home").rglob("*")] == [], "what a run keeps lies in its own folder"
    assert {Path(name).suffix for name in found} >= {".parquet", ".csv", ".pdf", ".png"}
    return found, read_json(tmp / "runs" / "a" / "data" / "manifest.json")


def test_the_same_bytes_under_variables_and_files_of_the_user(clean, tmp_path):
    """All at once: a variable that were heard would end the run or change a byte, and so would a file behind it."""
    write(tmp_path / "files", FILES)
    home = write(tmp_path / "home", HOME)
    beside = write(tmp_path / "path", {"tests/x.py": EXITS, "data/y.py": EXITS, "torch_settings.py": EXITS})
    paths = f"{beside}{os.pathsep}{environment(tmp_path)['PYTHONPATH']}"
    done = called([*RUN, "--run", "a"], tmp_path,
                  LEAKS | {"TMPDIR": "/none", "HOME": str(home), "PYTHONPATH": paths}, write(tmp_path / "here", HERE),
                  before="exec 0<&- 1>&-; umask 077")
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path / "runs" / "a") == clean[0]
    record = read_json(tmp_path / "runs" / "a" / "data" / "manifest.json")
    assert record["git"] == clean[1]["git"] and record["hardware"] == clean[1]["hardware"]


def test_what_cannot_be_had_is_one_line(tmp_path):
    shadows = write(tmp_path / "shadows", {"random.py": EXITS})
    gone = tmp_path / "gone"
    accelerated = ["-m", "accelerate.commands.launch", "--config_file",
                   str(REPO_ROOT / "configs" / "accelerate" / "several.yaml"), "--main_process_port", "0"]
    for words, options, expected in [
            (RUN, {"more": {"PYTHONPATH": f"{REPO_ROOT}:{shadows}"}}, "hides Python's own module 'random'"),
            (RUN, {"before": f"mkdir {gone}; cd {gone}; rmdir {gone}"}, "the current folder was deleted"),
            ([*RUN, "--profile", "none"], {}, "--profile none: there is no such folder"),
            ([*accelerated, *RUN], {"more": {"ACCELERATE_USE_CPU": "true"}}, "with -p n_processes=2")]:
        done = called(words, tmp_path, **options)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode not in (0, 124) and lines and all(expected in line for line in lines), done.stderr
        assert "Traceback" not in done.stderr.partition("accelerate")[0]
    assert not (tmp_path / "runs").exists()


def test_what_is_meant_to_count_counts(clean, tmp_path):
    """A limit of threads, and a profile that is given by hand; where nothing can be written into the user's folders."""
    (tmp_path / "a_file").touch()  # root may write into any folder, but not below a file
    nowhere = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR", "HF_HOME")
    profile = write(tmp_path / "profile", {"config.yaml": "printshellcmds: true\ncores: 7\n"})
    others = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"} | dict.fromkeys(
        nowhere, str(tmp_path / "a_file"))
    done = called([*RUN, "--run", "a", "--profile", os.path.relpath(profile, tmp_path)], tmp_path, others, tmp_path)
    assert done.returncode == 0, done.stderr
    record = read_json(tmp_path / "runs" / "a" / "data" / "manifest.json")
    assert record["hardware"] == clean[1]["hardware"] | {"threads": 1} and record["git"] == clean[1]["git"]
    assert results(tmp_path / "runs" / "a") == clean[0]
    log = (tmp_path / "runs" / "a" / "snakemake.log").read_text(encoding="utf-8")
    assert "grpo_engage job data" in log, "printshellcmds"
    assert "Provided cores: 1\n" in log or "Provided cores: 1 " in log
    kept = {"HF_HOME": "/hub", "HF_TOKEN": "x", "HTTPS_PROXY": "http://x", "SSL_CERT_FILE": "/x", "NCCL_DEBUG": "INFO",
            "WANDB_API_KEY": "x", "CUDA_VISIBLE_DEVICES": "1", "LD_LIBRARY_PATH": "/x", "OMP_NUM_THREADS": "5",
            "TRANSFORMERS_OFFLINE": "1", "GRPO_ENGAGE_MODELS": "/models", "PATH": "/bin", "OMP_WAIT_POLICY": "ACTIVE"}
    assert own_environment(tmp_path, kept).items() >= kept.items()


TRAIN = """
import sys
from pathlib import Path
import pandas as pd
from grpo_engage.base.processes import world_size
from grpo_engage.policy.base_models import ensure_policy
from grpo_engage.train.arm_training import train_arm
from grpo_engage.train.objective import Objective
posts = pd.DataFrame({"tweet": [f"Rain again, day {i} 🌧" for i in range(8)], "reply": ["so it is…", "Nass."] * 4})
train_arm(ensure_policy("nano"), posts, Path(sys.argv[1]), objective=Objective(1, 0, 0), max_steps=2, batch_size=4,
          learning_rate_policy=1e-3, gradient_accumulation=0)
assert world_size() == 1
"""


def test_a_launcher_of_somebody_else_changes_no_training(base, tmp_path, monkeypatch):
    """In a script of a user's own, whose environment we do not make."""
    write(tmp_path / "files", FILES)
    done = called(["-c", TRAIN, str(tmp_path / "launched")], tmp_path, LAUNCHED, timeout=120)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "clean")])
    exec(TRAIN, {})  # here, where no launcher left a word
    weights = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("clean", "launched")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_accelerates_own_default_is_not_asked(tmp_path, monkeypatch):
    """`accelerate config` leaves a file in the home folder, which `accelerate launch` reads when it gets no other."""
    def arguments():
        return vars(launch._validate_launch_command(
            launch.launch_command_parser().parse_args(launch_command(2, ["x.py"])[3:]))[0])

    path = str(write(tmp_path, {"default_config.yaml": ACCELERATE}) / "default_config.yaml")
    before = arguments()
    for module in (launch, config_args):
        monkeypatch.setattr(module, "default_config_file", path)
    assert arguments() == before
    assert before["mixed_precision"] == "no" and before["num_machines"] == 1 and before["multi_gpu"]
    assert before["dynamo_backend"] in (None, "no") and before["num_processes"] == 2 and not before["use_fsdp"]


def test_each_row_of_the_table_is_tried():
    """A row that no variable here has would be a row that nobody has seen work."""
    names = {*LEAKS, "MKL_CBWR", "TEXINPUTS"}
    assert [pattern for pattern in LEFT_OUT if not any(re.fullmatch(pattern, name) for name in names)] == []


def test_the_kernel_is_the_interpreter_that_runs_us(tmp_path, monkeypatch):
    """Where the kernel of that name is somebody else's."""
    monkeypatch.setenv("JUPYTER_PATH", str(write(tmp_path, FILES) / "jupyter"))
    assert KernelManager(kernel_name="python3").kernel_spec.argv[0] == "/bin/false", "the trap is set"
    assert ThisInterpreter(kernel_name="python3").kernel_spec.argv[0] == sys.executable


def test_a_figure_has_the_projects_look_alone():
    """In a process of a user's own, whose matplotlib is set up already."""
    style()
    expected = dict(matplotlib.rcParams)
    matplotlib.rcParams.update({"text.usetex": True, "lines.linewidth": 9, "font.family": "serif", "savefig.dpi": 7,
                                "path.sketch": (9, 9, 9), "axes.prop_cycle": "cycler('color', ['red'])"})
    style()
    assert {name: (value, expected[name]) for name, value in matplotlib.rcParams.items()
            if value != expected[name]} == {}
    ours = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    assert ours.samefile(findfont(FontProperties()))
