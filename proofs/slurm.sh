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
