"""What a student does in JupyterLab, done by a headless Chromium, with a screenshot of each step.

    pip install playwright; python proofs/jupyterlab.py OUT [nbs/07_hybrid.ipynb ...] [--chromium /usr/bin/chromium]

In a clone (the notebooks are changed): each notebook is opened, run (Run All Cells), its first two screens are taken,
its parameters cell is changed where it has one, it is run again, saved and closed. Fails where a cell ends with an
error, where the result is not within the first two screens, or where git sees another change than the parameter's.
10_runs: sort, pick a run, read, vote (GRPO_ENGAGE_RUNS names a folder of runs). Needs a Chromium; playwright is in no
list of requirements.
"""

import argparse
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 1280, 900
# a parameter to change, and what it becomes; the trainer's notebook and the tour have no parameters cell
CHANGES = {
    "01_data": ("n_conversations: int = 120", "n_conversations: int = 90"),
    "02_heuristic_reward": ("seed: int = 0", "seed: int = 1"),
    "03_reward_model": ("seed: int = 0", "seed: int = 1"),
    "04_policy": ("seed: int = 0", "seed: int = 1"),
    "05_best_of_n": ("seed: int = 0", "seed: int = 1"),
    "07_hybrid": ("max_steps: int = 3", "max_steps: int = 6"),
    "08_evaluation": ("n_boot: int = 2000", "n_boot: int = 500"),
    "09_paper": ('title: str = "Teaching', 'title: str = "Not teaching'),
}


def server(folder: Path) -> tuple[subprocess.Popen, str]:
    """JupyterLab as `make lab` starts it, and its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--notebook-dir={folder}",
        "--no-browser",
        f"--port={port}",
        "--allow-root",
        "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True",
        f"--LabApp.app_settings_dir={folder / 'hooks' / 'lab'}",
        "--ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    for _ in range(240):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return process, f"http://127.0.0.1:{port}/lab/tree"
        time.sleep(0.5)
    process.kill()
    raise RuntimeError("JupyterLab does not answer")


def menu(page: Page, *names: str) -> None:
    page.locator("#jp-MainMenu .lm-MenuBar-item", has_text=names[0]).first.click()
    page.locator(".lm-Menu-item", has_text=names[1]).first.click()


def run_all(page: Page, minutes: float) -> None:
    """Run → Run All Cells, until the kernel is idle and no cell waits."""
    menu(page, "Run", "Run All Cells")
    page.wait_for_timeout(3000)
    waiting = "!document.querySelector('.jp-Notebook .jp-InputArea-prompt')?.textContent.includes('[*]')"
    idle = "document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"
    page.wait_for_function(f"{idle} && {waiting}", timeout=60_000 * minutes, polling=1000)
    page.wait_for_timeout(1500)


def scroll(page: Page, pixels: int) -> None:
    page.evaluate(
        f"document.querySelectorAll('.jp-WindowedPanel-outer').forEach(panel => {{ panel.scrollTop = {pixels} }})"
    )
    page.wait_for_timeout(1500)


def screens(page: Page, out: Path) -> bool:
    """Take the first two screens; whether the result (a picture or a table under its heading) begins on them."""
    scroll(page, 0)
    page.screenshot(path=f"{out}_1.png")
    seen = page.locator(".jp-Notebook img[alt=result], .jp-Notebook .jp-RenderedHTML table")
    place = seen.first.bounding_box() if seen.count() else None
    scroll(page, HEIGHT - 150)
    page.screenshot(path=f"{out}_2.png")
    return place is not None and place["y"] < 2 * HEIGHT


def runs_page(page: Page, out: Path) -> list[str]:
    """Sort the runs, pick the first, look at its report, its replies and the vote."""
    page.screenshot(path=f"{out / '10_runs'}_table.png")
    pick = page.locator(".widget-dropdown select").first
    if not pick.count():
        return []  # no runs here
    page.locator(".widget-button").nth(1).click()
    pick.select_option(index=1)
    page.locator(".widget-text input").first.fill("ann")
    page.locator(".widget-text input").first.press("Enter")
    page.wait_for_timeout(6000)
    for name in ("report", "replies", "vote"):
        page.locator(".widget-tab > .lm-TabBar .lm-TabBar-tab", has_text=name).first.click()
        page.wait_for_timeout(2500)
        page.locator(".widget-tab").first.scroll_into_view_if_needed()
        page.screenshot(path=f"{out / '10_runs'}_{name}.png")
    left = page.locator(".widget-button", has_text="left")
    if not left.count():
        return ["there is nothing to vote on"]
    left.first.click()
    page.wait_for_timeout(1500)
    return []


def student(page: Page, address: str, path: Path, out: Path, minutes: float) -> list[str]:
    """What went wrong, in words, when `path` was opened, run, changed, run again, saved and closed."""
    wrong = []
    page.goto(f"{address}/{path.relative_to(path.parents[1]).as_posix()}?reset")
    page.locator(".jp-Notebook-ExecutionIndicator").first.wait_for(timeout=90_000)
    page.wait_for_timeout(5000)
    run_all(page, minutes)
    if path.stem == "10_runs":
        wrong += runs_page(page, out)
    elif not screens(page, out / f"{path.stem}_run"):
        wrong.append("no result within the first two screens")
    found = page.locator(
        ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], .jp-Notebook .ansi-red-fg"
    ).all()
    wrong += [f"an error: {each.text_content()[:300]}" for each in found if "Error" in (each.text_content() or "")][:2]
    if path.stem in CHANGES:
        old, new = CHANGES[path.stem]
        changed = page.evaluate(
            """([old, fresh]) => {
            const panel = window.jupyterapp?.shell?.currentWidget, cells = panel?.content?.model?.cells;
            for (let i = 0; i < (cells?.length ?? 0); i++) {
                const model = cells.get(i).sharedModel, text = model.getSource();
                if (text.includes(old)) { model.setSource(text.replace(old, fresh)); return true }
            }
            return false }""",
            [old, new],
        )
        if not changed:
            return [*wrong, f"{old!r} was not found"]
        run_all(page, minutes)
        if not screens(page, out / f"{path.stem}_changed"):
            wrong.append("no result within the first two screens after the change")
    menu(page, "File", "Save Notebook")
    page.wait_for_timeout(4000)
    said = subprocess.run(["git", "diff", "--numstat", "--", str(path)], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    wanted = ["1", "1"] if path.stem in CHANGES else []
    if said.stdout.split()[:2] != wanted:  # as git stores it: without outputs
        wrong.append(f"saved, git sees other changes than the parameter: {said.stdout.strip() or 'none'}")
    menu(page, "File", "Close and Shut Down Notebook")
    page.wait_for_timeout(2000)
    page.screenshot(path=f"{out / path.stem}_closed.png")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--minutes", type=float, default=10, help="the longest that a notebook may take")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    paths = [path.resolve() for path in given.notebooks] or sorted((ROOT / "nbs").glob("[01]*.ipynb"))
    subprocess.run([sys.executable, "hooks/clean_notebook.py", "--install"], cwd=ROOT, check=True)  # as make install
    process, address = server(ROOT)
    failed = False
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.on("dialog", lambda dialog: dialog.accept())
            for path in paths:
                start, wrong = time.time(), student(page, address, path, given.out, given.minutes)
                failed |= bool(wrong)
                print(f"{path.name}: {'; '.join(wrong) or 'as it should be'} ({time.time() - start:.0f} s)", flush=True)
    finally:
        process.terminate()
    sys.exit(failed)


if __name__ == "__main__":
    main()
