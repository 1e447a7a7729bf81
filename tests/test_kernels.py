"""A kernel that was forked from a process with the libraries: what it can, that it ends with those it works for, and
that nothing depends on it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from grpo_engage.base.core import REPO_ROOT
from grpo_engage.run.execution import NotebookFailure, execute_notebook
from grpo_engage.run.kernels import KERNELS, LOADED, kernels_ahead

METADATA = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}


def write(folder, code):
    """A notebook of that one cell, behind its parameters."""
    cells = [nbformat.v4.new_code_cell("x: int = 1", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=METADATA), path := folder / "given.ipynb")
    return path


def outputs(folder, code, label="stage example"):
    execute_notebook(write(folder, code), folder / "done.ipynb", {"x": 2}, label)
    return nbformat.read(folder / "done.ipynb", as_version=4).cells[-1].outputs


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "kernels.log"
    with kernels_ahead({**os.environ, KERNELS: "", "OMP_NUM_THREADS": "2"}, log) as found:  # jobs ask for others
        found.wait_until_loaded()
        if found.process is None or found.process.poll() is not None:
            pytest.skip(f"no kernels ahead here: {log.read_text()}")
        yield found


@pytest.fixture
def ahead(kernels, monkeypatch):
    for name, value in kernels.environment.items():
        monkeypatch.setenv(name, value)
    return kernels


def gone(process_id, seconds=20):
    """Whether the process ends within that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not psutil.pid_exists(process_id) or psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_it_has_the_libraries_and_loads_the_package_itself(ahead, tmp_path):
    found = outputs(tmp_path, f"""import os, sys
print(os.getppid(), set({LOADED!r}) <= sys.modules.keys(), [n for n in sys.modules if n.startswith("grpo_engage")])""")
    assert found[0].text.split(maxsplit=2) == [
        str(ahead.process.pid), "True", "['grpo_engage', 'grpo_engage.run', 'grpo_engage.run.kernels']\n"]


def test_environment_folder_threads_and_streams_are_those_of_the_one_who_asks(ahead, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("SOMETHING", odd := "a 'b' \"c\" {d} ü 🎩 \udcff")
    found = outputs(tmp_path, """import os, tempfile, torch
os.write(2, b"to the job's log")
print(ascii(os.environ["SOMETHING"]), os.getcwd(), torch.get_num_threads(), tempfile.gettempdir(), sep="|")""")
    assert found[0].text.strip() == "|".join([ascii(odd), str(tmp_path), "1", str(tmp_path)])
    assert "to the job's log" in capfd.readouterr().err


def test_a_figure_is_in_the_notebook(ahead, tmp_path):
    found = outputs(tmp_path, "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()")
    assert any("image/png" in output.get("data", {}) for output in found)


def test_a_long_path_and_a_hostile_name(ahead, tmp_path):
    place = tmp_path / "a 'b' ${HOME} {x} ü 🎩" / ("long" * 40)
    place.mkdir(parents=True)
    assert outputs(place, "import os\nprint(os.getppid())")[0].text.strip() == str(ahead.process.pid)


def test_its_death_is_said(ahead, tmp_path):
    with pytest.raises(NotebookFailure, match="the kernel died in cell"):
        outputs(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")


SLEEPS = """import os, subprocess, time
child = subprocess.Popen(["sleep", "100"])
open("processes", "w").write(f"{os.getpid()} {child.pid}\\n")
time.sleep(100)"""


def processes_of(folder):
    """The kernel that executes SLEEPS in `folder`, and its child."""
    path, end = Path(folder) / "processes", time.monotonic() + 60
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < end
        time.sleep(0.1)
    return [int(word) for word in path.read_text().split()]


def started(code, *words, **more):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], env=os.environ | {
        "PYTHONPATH": str(REPO_ROOT)}, **more)


def test_it_ends_with_its_children_when_the_job_is_killed(ahead, tmp_path):
    job = started("import sys; from pathlib import Path; from grpo_engage.run.execution import execute_notebook;"
                  "execute_notebook(Path(sys.argv[1]), Path(sys.argv[2]), {}, 'x')",
                  write(tmp_path, SLEEPS), tmp_path / "done.ipynb")
    kernel, child = processes_of(tmp_path)
    assert psutil.Process(kernel).ppid() == ahead.process.pid
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert gone(kernel) and gone(child)
    assert ahead.process.poll() is None  # others may still ask


def test_a_notebook_that_ends_leaves_no_process(ahead, tmp_path):
    found = outputs(tmp_path, "import atexit, os\natexit.register(lambda: open('at the end', 'w').close())\n"
                              "print(os.getpid())")
    assert gone(int(found[0].text)) and (tmp_path / "at the end").exists()


def test_the_process_ends_when_the_run_is_killed_and_jobs_do_without_it(tmp_path, monkeypatch):
    code = ("import os, sys, time; from pathlib import Path\n"
            "from grpo_engage.run.kernels import kernels_ahead, KERNELS\n"
            "with kernels_ahead({**os.environ, KERNELS: ''}, Path(sys.argv[1])) as kernels:\n"
            "    kernels.wait_until_loaded()\n"
            "    print(kernels.process.pid, kernels.environment[KERNELS], flush=True)\n"
            "    time.sleep(100)")
    run = started(code, tmp_path / "log", stdout=subprocess.PIPE, text=True)
    process, folder = run.stdout.readline().split()
    run.kill()
    run.wait()
    assert gone(int(process)) and not Path(folder).exists()
    monkeypatch.setenv(KERNELS, folder)
    assert outputs(tmp_path, "import sys\nprint('torch' in sys.modules)")[0].text.strip() == "False"


def test_it_takes_a_fraction_of_the_start(ahead, tmp_path, monkeypatch):
    """CPU seconds, so that other work counts less: 5 and .6 were measured."""
    code = ("import resource, grpo_engage.train.hybrid, grpo_engage.evaluation.evaluation\n"
            "print(sum(resource.getrusage(0)[:2]))")
    forked = float(outputs(tmp_path, code)[0].text)
    monkeypatch.setenv(KERNELS, "none")
    assert forked < float(outputs(tmp_path, code)[0].text) / 3
