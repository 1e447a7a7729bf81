"""The over-training study's tests on its own numbers with what they look for taken away (notebook studies/08).

    python proofs/study_nulls.py [--draws 2000] [--out FOLDER]

Reads outputs/published/over_training/units, writes study_nulls.csv: a row for each arm and question. About a minute.
"""

import argparse
from pathlib import Path

import pandas as pd

from grpo_engage.base.core import REPO_ROOT, say, write_csv
from grpo_engage.studies.over_training_answers import ARMS, read_units
from grpo_engage.studies.study_nulls import fall_null, lead_null, looks_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=REPO_ROOT / "proofs")
    given = parser.parse_args()
    units, rows = read_units(REPO_ROOT / "outputs" / "published" / "over_training" / "units"), []
    for arm in ARMS:
        found = fall_null(*looks_of(units, arm, "gold", hot_only=True), given.draws)
        rows.append({"question": "gold falls", "arm": arm, "metric": "gold"} | found)
    for arm in ("baseline", *ARMS):
        for metric in ("pass@10", "pass@10 absolute"):
            found = lead_null(*looks_of(units, arm, metric, hot_only=False), given.draws)
            rows.append({"question": "lead over itself", "arm": arm, "metric": metric} | found)
    table = pd.DataFrame(rows)
    write_csv(given.out / "study_nulls.csv", table.round(4))
    say(f"{given.out / 'study_nulls.csv'}: {len(table)} rows")


if __name__ == "__main__":
    main()
