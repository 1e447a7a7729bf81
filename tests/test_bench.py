"""engage-bench: the release is what was frozen, the truth gets the top figures, entries are refused with a sentence."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from real_texts import SETS

from grpo_engage.base.core import REPO_ROOT, read_json
from grpo_engage.bench import leaderboard
from grpo_engage.bench.entries import read_score
from grpo_engage.bench.judge_track import judge_samples, judge_track
from grpo_engage.bench.leaderboard import HEADLINES, read_board
from grpo_engage.bench.release import MOST_BYTES, check_sums, read_part, release_folder, sums_of, write_sums
from grpo_engage.bench.reward_track import policy_sample, reward_samples, reward_track
from grpo_engage.bench.simulated import CONVERSATIONS, SEED
from grpo_engage.data.gold import gold_appeal
from grpo_engage.run.bench import print_bench
from grpo_engage.run.cli import main

RELEASE = release_folder()
BASELINES = RELEASE.parent / "baselines.py"
MINE = """
from pathlib import Path
def words(completions, post): return [len(one.split()) for one in completions]
def same(completions): return [0.5 for _ in completions]
def popular(completions, post): return [len(one) for one in post]
def none(completions): return [None] * len(completions)
def short(completions): return [1.0]
def stops(completions): raise SystemExit(0)
def changes(completions, post):
    numbers = [len(one.split()) for one in completions]
    completions.clear(), post.clear()
    return numbers
def takes(train, posts, replies):
    train.drop(train.index, inplace=True), posts.clear()
    return [len(one) for one in replies]
def stops_learning(train, posts, replies): raise SystemExit("enough")
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "my own 🎩.py"
    path.write_text(MINE, encoding="utf-8")
    return path


def test_the_release_is_what_was_frozen():
    check_sums(RELEASE)
    names = {path.name for path in RELEASE.iterdir() if path.is_file()}
    assert {"DATASHEET.md", "LICENSE", "SHA256SUMS", "sources.json", "replies.parquet", "worlds.parquet",
            "systems.parquet", "candidates.parquet", "texts.parquet", "posts.parquet", "scores.parquet"} <= names
    assert max(path.stat().st_size for path in RELEASE.iterdir()) < MOST_BYTES
    assert (RELEASE / "LICENSE").read_bytes() == (REPO_ROOT / "LICENSE").read_bytes()
    sheet = (RELEASE / "DATASHEET.md").read_text(encoding="utf-8")
    assert [path.name for path in RELEASE.glob("*.parquet") if f"`{path.name}`" not in sheet] == []


@pytest.mark.parametrize("damage", ["changed", "gone", "more"])
def test_a_release_that_was_touched_is_refused(tmp_path, damage):
    folder = tmp_path / "v1"
    shutil.copytree(RELEASE, folder)
    path = folder / "replies.parquet"
    if damage == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif damage == "gone":
        path.unlink()
    else:
        (folder / "more.csv").write_text("a\n")
    with pytest.raises(ValueError, match="more.csv changed" if damage == "more" else "replies.parquet changed"):
        read_part("replies", folder)


def test_a_file_that_is_too_large_is_not_frozen(tmp_path):
    (tmp_path / "replies.parquet").write_bytes(bytes(MOST_BYTES + 1))
    with pytest.raises(ValueError, match="takes fewer replies"):
        write_sums(tmp_path)


def test_the_simulated_part_is_made_again_to_the_byte(tmp_path):
    """By the one command, in another process."""
    subprocess.run([sys.executable, REPO_ROOT / "benchmarks" / "bench_release.py", tmp_path], check=True, cwd=tmp_path,
                   env=os.environ | {"PYTHONPATH": str(REPO_ROOT)})
    for name in ("replies.parquet", "worlds.parquet"):
        assert (tmp_path / name).read_bytes() == (RELEASE / name).read_bytes(), name
    recorded = read_json(RELEASE / "sources.json")["simulated"]
    assert read_json(tmp_path / "sources.json")["simulated"] == recorded == {
        "seed": SEED, "conversations": CONVERSATIONS}
    assert set(sums_of(tmp_path).splitlines()) & set((RELEASE / "SHA256SUMS").read_text().splitlines())


def test_gold_in_the_files_is_the_truth_of_their_texts():
    for name, sample in {**reward_samples(), **judge_samples()}.items():
        few = sample.sample(200, random_state=0)
        np.testing.assert_allclose(gold_appeal(few["post"], few["text"]), few["gold"], atol=1e-6, err_msg=name)


def test_the_samples_are_square():
    systems, candidates = policy_sample("systems"), policy_sample("candidates")
    made = systems[systems["arm"] != "real"].groupby(["arm", "seed", "post"]).size()
    assert set(made) == {3} and systems["post"].nunique() == 48 and systems["arm"].nunique() >= 30
    assert set(candidates.groupby("post").size()) == {192} and candidates["post"].nunique() == 32
    assert set(candidates["post"]) <= set(systems["post"])


def test_a_perfect_reward_gets_the_known_values():
    found = reward_track(gold_appeal)
    candidates = policy_sample("candidates")
    # the mean over all subsets of 128 of 192 of their highest gold, by its definition: rank r is the top of C(r-1, 127)
    from scipy.special import comb

    weight = comb(np.arange(192), 127, exact=False) / comb(192, 128)
    known = candidates.groupby("post")["gold"].apply(lambda gold: np.sort(gold) @ weight).mean()
    assert found["best_of_128"] == pytest.approx(known, abs=1e-9)
    assert [round(found[name], 4) for name in ("real", "pressed", "lost", "best_n")] == [1, 1, 0, 128]


def test_a_perfect_judge_gets_the_known_values():
    found = judge_track(gold_appeal)
    assert [round(found[name], 4) for name in ("with_gold", "within")] == [1, 1]
    assert np.isnan(found["shared_errors"])  # gold leaves nothing of it
    turned = judge_track(lambda posts, texts: -gold_appeal(posts, texts))
    assert [round(turned[name], 4) for name in ("with_gold", "within")] == [-1, -1]


def test_a_judge_that_is_the_reward_shares_all_its_errors():
    _, reward = read_score(f"{BASELINES}:reward_of_the_run")
    assert judge_track(reward)["shared_errors"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("track", "name", "said"), [
    ("judge", "same", "gives all replies to a post the same number (0.5"), ("reward", "same", "it ranks nothing"),
    ("judge", "popular", "gives all replies to a post the same number"), ("reward", "none", "is no finite number"),
    ("judge", "short", "returned 1 values for"), ("judge", "stops", "ended the program (exit code 0)"),
    ("judge", "word", "did you mean 'words'"), ("deconfounding", "stops_learning", "raised SystemExit: enough"),
    ("deconfounding", "words", "it is called with (train, posts, replies)"), ("judge", "a b", "names no function")])
def test_an_entry_is_refused_with_a_sentence(mine, tmp_path, capsys, track, name, said):
    board = tmp_path / "board.csv"
    assert main(["bench", "--track", track, f"{mine}:{name}", "--board", str(board)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error
    assert error.count("\n") == 1 and not board.exists()


def test_what_an_entry_does_to_its_arguments_changes_nothing(mine):
    plain, changing = (reward_track(read_score(f"{mine}:{name}")[1]) for name in ("words", "changes"))
    assert plain == changing
    print_bench("deconfounding", f"{mine}:takes", board=str(board := mine.with_name("learners.csv")))
    assert len(read_board(board)) == 1


def test_a_row_is_added_once_and_harmless(mine, tmp_path, capsys):
    board = tmp_path / "board 🎩.csv"
    for name in ("=HYPERLINK(\"x\")", "=HYPERLINK(\"x\")"):
        assert main(["bench", "--track", "judge", f"{mine}:words", "--name", name, "--board", str(board)]) == 0
    before = board.read_bytes()
    assert read_board(board)["name"].tolist() == ["'=HYPERLINK(\"x\")"]
    mine.write_text(MINE + "# another\n", encoding="utf-8")
    assert main(["bench", "--track", "judge", f"{mine}:words", "--name", "a\x1b[31m\nb", "--board", str(board)]) == 0
    rows = read_board(board)
    assert rows["name"].tolist() == ["'=HYPERLINK(\"x\")", "a\\x1b[31m\\nb"] and board.read_bytes().startswith(before)
    assert rows["entry"].tolist() == ["my own 🎩.py:words"] * 2 and str(tmp_path) not in board.read_text("utf-8")
    capsys.readouterr()
    assert main(["bench", "--track", "judge", "--board", str(board)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and len(said.splitlines()) == 3


def test_a_leaderboard_that_cannot_be_written_is_said(mine, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    board = tmp_path / "file" / "folder" / "b.csv"
    assert main(["bench", "--track", "judge", f"{mine}:words", "--board", str(board)]) == 1
    assert "a part of its path is a file" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"arm,seed\n", "\n".join(SETS["typography"]).encode()])
def test_a_table_that_is_none_is_refused(tmp_path, capsys, content):
    path = tmp_path / "units.csv"
    path.write_bytes(content)
    assert main(["bench", "--track", "objective", str(path), "--board", str(tmp_path / "board.csv")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and error.count("\n") == 1


def test_the_command_knows_the_tracks(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--track", "nonsense"])
    said = capsys.readouterr().err
    assert [track for track in HEADLINES if track not in said] == []


@pytest.mark.parametrize("track", ["reward", "judge", "deconfounding"])
def test_the_leaderboards_hold_the_baselines(track):
    board = read_board(leaderboard.board_of(track))
    assert len(board) >= 5 and (board["entry"].str.startswith("baselines.py:")).all()
    assert board["entry"].is_unique and set(board["release"]) == {"v1"}
    values = pd.to_numeric(board[HEADLINES[track]])
    assert values.max() - values.min() > 0.2, "the baselines do not span a range"
    if track != "deconfounding":
        assert board.loc[values.idxmax(), "name"] == "gold"
