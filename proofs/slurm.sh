#!/bin/bash
# A run through a real Slurm: sets one up on this machine (munged, slurmctld, slurmd; one node, no accounting), runs a
# tiny preset through it with the profile configs/slurm, shows what each job asked for and what it wrote, kills a
# command in the middle and takes the run up again, and takes Slurm down.
#
# For a machine of one's own (a container): root, and no Slurm that is configured already.
#
#     apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
#     .venv/bin/pip install '.[slurm]'
#     proofs/slurm.sh [PYTHON]         PYTHON (default .venv/bin/python) has the Slurm plugin of Snakemake
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
conf=/etc/slurm/slurm.conf
mark='# of grpo_engage, proofs/slurm.sh'
place=$(mktemp -d /tmp/grpo_engage_slurm_XXXXXX)

stop() { echo "error: $*" >&2; exit 2; }
[ "$(id -u)" = 0 ] || stop "slurmd and munged are started here: this needs root"
for program in munged slurmctld slurmd sbatch; do command -v "$program" >/dev/null || stop "there is no $program: see the top of this file"; done
[ ! -e "$conf" ] || grep -qxF "$mark" "$conf" || stop "$conf is there: this machine has a Slurm, which stays as it is"
"$python" -c 'import snakemake_executor_plugin_slurm' || stop "$python has no Slurm plugin: pip install '.[slurm]'"

started=()
take_down() {
    for process in "${started[@]}"; do kill "$process" 2>/dev/null || true; done
    rm -f "$conf"
    [ -n "${KEEP:-}" ] && echo "kept: $place" || rm -rf "$place"
}
trap take_down EXIT

# --- one node: this machine. Its jobs cannot be confined without cgroups, so memory is booked and not enforced.
mkdir -p "$place"/{spool,state,log} /etc/slurm
cores=$(nproc --all)
memory=$(($(awk '/^MemTotal/ {print $2}' /proc/meminfo) / 1024 * 9 / 10))
cat > "$conf" <<CONF
$mark
ClusterName=trial
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldLogFile=$place/log/slurmctld.log
SlurmdLogFile=$place/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
MinJobAge=600
SchedulerParameters=sched_interval=2
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=trial Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
if ! munge -n >/dev/null 2>&1; then
    mkdir -p /run/munge && chown munge /run/munge /etc/munge /var/lib/munge /var/log/munge
    setpriv --reuid=munge --regid=munge --clear-groups munged --foreground >"$place/log/munged.log" 2>&1 &
    started+=($!)
    for _ in $(seq 50); do munge -n >/dev/null 2>&1 && break; sleep 0.2; done
fi
slurmctld -D -i >"$place/log/slurmctld.out" 2>&1 & started+=($!)
slurmd -D >"$place/log/slurmd.out" 2>&1 & started+=($!)
for _ in $(seq 100); do sinfo -h -o %t 2>/dev/null | grep -q idle && break; sleep 0.3; done
sinfo -h -o %t | grep -q idle || { tail -5 "$place"/log/*; stop "the node did not come up"; }
echo "$(sinfo --version): $(sinfo -h -o '%D node, %c cores, %m MB, partition %P')"

# --- a run through it. The profile is the repository's; this Slurm has no accounts and no accounting.
export GRPO_ENGAGE_RUNS=$place/runs
tiny=(--preset smoke -p n_conversations=120 -p max_steps=2 -p 'arms=[baseline]' -p allow_unvalidated_reward=true
      -p watch_posts=2 -p max_new_tokens=16 --no-estimate)
slurm=(--profile configs/slurm --cores 2
       --snakemake='--slurm-no-account --slurm-status-command squeue --slurm-init-seconds-before-status-checks 5')
run() { "$python" -m grpo_engage run "$@"; }

echo; echo "== up to training, through Slurm"
run train "${tiny[@]}" --run slurm "${slurm[@]}"
echo "jobs as Slurm had them:"
scontrol -o show job | grep -o ' \(Comment\|JobState\|NumCPUs\|TimeLimit\|RunTime\|TRES\)=[^ ]*' | paste -d ' ' - - - - - -

echo; echo "== the same without Slurm: the same bytes?"
OMP_NUM_THREADS=2 run train "${tiny[@]}" --run here
for file in data/pairs.parquet reward_model/labels.parquet train/baseline/seed0/adapter/adapter_model.safetensors; do
    cmp "$GRPO_ENGAGE_RUNS/slurm/$file" "$GRPO_ENGAGE_RUNS/here/$file" && echo "same bytes: $file"
done

echo; echo "== a job that cannot be had is said so"
run data "${tiny[@]}" --run refused "${slurm[@]}" --snakemake='--set-resources data:mem_mb=99000000' && stop "it was not refused"

echo; echo "== the command is killed while its job runs; the job goes on, and the same command takes the run up"
setsid "$python" -m grpo_engage run data "${tiny[@]}" --run killed "${slurm[@]}" & killed=$!
for _ in $(seq 600); do squeue -h -o %T | grep -q RUNNING && break; sleep 0.2; done
kill -9 -- "-$killed"
squeue -h -o 'job %i: %T (%k)'
run data "${tiny[@]}" --run killed "${slurm[@]}" --snakemake=--slurm-keep-successful-logs
cat "$GRPO_ENGAGE_RUNS"/killed/.snakemake/slurm_logs/rule_data/*.log | grep -E '^\[[0-9:]+\] ' | sort
echo; echo "all done"
