#!/usr/bin/env bash
# A real Slurm on this machine for the tests: slurmctld, slurmd and munge from Debian, with two GPUs that are files.
# Everything it writes lies under .services/slurm; needs root to install and to run jobs. Idempotent.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
state="$root/.services/slurm"
export SLURM_CONF="$state/slurm.conf"

if [ -f "$SLURM_CONF" ] && timeout 10 sinfo --noheader >/dev/null 2>&1; then
    echo "slurm: runs already"
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo "slurm: not started, it needs root" >&2
    exit 1
fi
if ! { command -v slurmctld && command -v slurmd && command -v munged && command -v sbatch; } >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
fi

rm -rf "$state"
mkdir -p "$state"/{ctld,spool,munge,log}
chmod 755 "$state" "$state"/*

dd if=/dev/urandom of="$state/munge/key" bs=128 count=1 status=none
chmod 400 "$state/munge/key"
# --force: the checkout's parent folders may be writable by others, which is well for a test
munged --force --key-file="$state/munge/key" --socket="$state/munge/socket" --pid-file="$state/munge/pid" \
    --log-file="$state/log/munged.log" --seed-file="$state/munge/seed" 2>/dev/null

# Slurm takes a GPU's number from the name of a character device; these are /dev/null under other names.
for number in 0 1; do mknod "$state/nvidia$number" c 1 3; done

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
host=$(hostname -s)
memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 * 9 / 10))
cat >"$SLURM_CONF" <<EOF
ClusterName=s2cd
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$state/munge/socket
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/spool
SlurmctldPidFile=$state/ctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
KillWait=2
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=$memory Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
echo "NodeName=$host Name=gpu File=$state/nvidia[0-1]" >"$state/gres.conf"

slurmctld -c -f "$SLURM_CONF"
slurmd -c -f "$SLURM_CONF"

for _ in $(seq 60); do
    if sinfo --noheader --format=%T 2>/dev/null | grep -qE 'idle|mixed|allocated'; then
        grep -qs "^SLURM_CONF=" "$root/.services/env" || echo "SLURM_CONF=$SLURM_CONF" >>"$root/.services/env"
        echo "slurm: ready, two GPUs that are files"
        exit 0
    fi
    sleep 0.5
done
echo "slurm: not ready within 30 s:" >&2
for file in "$state"/log/*.log; do tail -n 5 "$file"; done >&2
exit 1
