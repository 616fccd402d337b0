#!/bin/bash
# A throwaway Slurm on this machine, to try the launchers with: munged, one slurmctld and a slurmd for each pretended
# node. It needs root, systemd and cgroups play no part, every daemon listens on the loopback address only, and
# everything it writes stays under DIR.

set -euo pipefail

usage() {
    cat <<'TEXT'
usage: slurm/local_cluster.sh up DIR [--nodes N]    start a cluster of N nodes (default 2) with its files under DIR
       slurm/local_cluster.sh status DIR            its daemons, nodes and jobs; status 1 when a daemon is gone
       slurm/local_cluster.sh restore DIR           start the nodes again that were lost (kill -9 of a slurmd)
       slurm/local_cluster.sh down DIR              cancel its jobs and stop the daemons that `up` started, no others

After `up`, `. DIR/env.sh` points sbatch, srun and squeue at the cluster. A node pretends to have 128 CPUs and 8 GPUs.
Partitions: `debug` (default), and `urgent`, whose jobs preempt those of `debug`: a signal, 20 s, then requeue.
TEXT
}

fail() {
    echo "local_cluster.sh: $*" >&2
    exit 2
}

# ---------------------------------------------------------------- daemons

# A process id may be given to another program later, a process id with its start time may not.
start_time() { # after the name in brackets, which may hold blanks, the start time is the 20th field
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) && set -- ${stat##*) } && [ "$1" != Z ] && echo "${20}"
}

alive() { [ "$(start_time "$1")" = "$2" ]; }

start() { # NAME COMMAND...
    local name=$1
    shift
    setsid "$@" </dev/null >"$dir/log/$name.out" 2>&1 &
    echo "$! $(start_time $!) $name" >>"$dir/daemons"
}

stop() { # NAME-PATTERN
    local pid began name tries
    while read -r pid began name; do
        [[ $name == $1 ]] && alive "$pid" "$began" && kill "$pid"
    done <"$dir/daemons"
    while read -r pid began name; do
        [[ $name == $1 ]] || continue
        for ((tries = 0; tries < 60; tries++)); do alive "$pid" "$began" && sleep 0.1 || break; done
        if alive "$pid" "$began"; then
            echo "$name does not end, killed" >&2
            kill -9 "$pid"
        fi
    done <"$dir/daemons"
}

# ---------------------------------------------------------------- up

check_host() {
    local program host=$1 address
    for program in munged slurmctld slurmd sbatch srun scontrol; do
        command -v "$program" >/dev/null || fail "$program is missing; install it: apt-get install" \
            "--no-install-recommends slurm-wlm (Debian, Ubuntu), or your distribution's slurm and munge packages"
    done
    [ "$(id -u)" = 0 ] ||
        fail "you are $(id -un); slurmd starts jobs as their owners, which only root may: run this as root"
    # Told not to listen everywhere, the daemons listen where the host's own name leads.
    address=$(getent ahostsv4 "$host" | awk 'NR == 1 {print $1}')
    [[ $address == 127.* ]] || fail "this host's name, $host, leads to '${address:-nothing}', and the cluster keeps" \
        "to the loopback address: put '127.0.0.1 $host' first in /etc/hosts"
    loopback=$address
}

free_ports() { # COUNT: the first of COUNT ports in a row that nobody listens on
    local first port tries
    for ((tries = 0; tries < 100; tries++)); do
        # Below the range that connections take theirs from, above the one that jobs take their MASTER_PORT from.
        first=$((30000 + RANDOM % (2700 - $1)))
        for ((port = first; port < first + $1; port++)); do
            (: <>"/dev/tcp/$loopback/$port") 2>/dev/null && continue 2
        done
        echo "$first"
        return
    done
    fail "found no $1 free ports in a row between 30000 and 32700; close what listens there (ss -ltnp)"
}

configure() { # HOST
    local host=$1 port memory gpu
    port=$(free_ports $((nodes + 1)))
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    mkdir -p "$dir"/{log,run,state}
    # Job ids go on from an earlier cluster in DIR, since its logs are kept; a node that was out of order starts anew.
    rm -f "$dir"/state/node_state*
    chmod 755 "$dir" "$dir/run" # munged refuses a socket that others could not reach or could replace
    (umask 077 && head -c 128 /dev/urandom >"$dir/munge.key")
    echo "export SLURM_CONF=$dir/slurm.conf" >"$dir/env.sh"
    # Any device file passes for a GPU, each under one name only; no job opens these.
    for gpu in {0..7}; do [ -c "$dir/run/gpu$gpu" ] || mknod "$dir/run/gpu$gpu" c 1 3; done
    echo "NodeName=node[1-$nodes] Name=gpu File=$dir/run/gpu[0-7]" >"$dir/gres.conf"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=throwaway
SlurmctldHost=$host($loopback)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log

AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credentials have expired, 120 s by default.
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny

# Nothing that would take cgroups or a second daemon.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimits=NONE

SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
# The CPUs below are pretended: without this a node that has fewer is drained.
SlurmdParameters=config_overrides
ReturnToService=2

# Waits cut short, so that a test of a requeue takes seconds.
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=2,sched_interval=2
KillWait=5
MinJobAge=600
MessageTimeout=30
SlurmctldTimeout=30
SlurmdTimeout=20
InactiveLimit=0

JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal

NodeName=node[1-$nodes] NodeHostname=$host NodeAddr=$loopback Port=[$((port + 1))-$((port + nodes))] \
    CPUs=128 RealMemory=$memory Gres=gpu:8 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
CONF
}

up() {
    local host node tries
    host=$(hostname)
    check_host "$host"
    [ ! -e "$dir/daemons" ] || fail "a cluster was started in $dir before; end it first: $0 down $dir"
    # A Unix socket's path has 107 characters at most.
    [ ${#dir} -le 90 ] ||
        fail "the path $dir has ${#dir} characters, too long for a socket in it; choose one of 90 or less"
    configure "$host"
    export SLURM_CONF=$dir/slurm.conf
    trap 'down >&2' ERR

    start munged munged --foreground --force --num-threads=2 --key-file="$dir/munge.key" \
        --socket="$dir/run/munge.sock" --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" \
        --seed-file="$dir/run/munged.seed"
    for ((tries = 0; tries < 100; tries++)); do [ -S "$dir/run/munge.sock" ] && break || sleep 0.1; done
    start slurmctld slurmctld -D -i -f "$SLURM_CONF"
    for ((node = 1; node <= nodes; node++)); do
        mkdir -p "$dir/spool.node$node"
        start "slurmd.node$node" slurmd -D -N "node$node" -f "$SLURM_CONF"
    done

    for ((tries = 0; tries < 150; tries++)); do
        if [ "$(timeout 3 sinfo -h -p debug -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = "$nodes" ]; then
            trap - ERR
            echo "$nodes nodes up. Point this shell at them with:  . $dir/env.sh"
            return
        fi
        report_daemons >/dev/null || break
        [ -z "$(timeout 3 sinfo -h -t drain -o %N 2>/dev/null)" ] || break # Slurm found a node out of order
        sleep 0.2
    done
    report_daemons >&2 || true
    timeout 3 sinfo -R >&2 || true
    grep -hE '(error|fatal):' "$dir"/log/*.out | grep -vE 'pmix|MPI:|MailProg|state file|NOTE:' | sort -u |
        head -n 20 >&2 || true
    down >&2
    fail "the cluster did not come up; its logs are in $dir/log"
}

# ---------------------------------------------------------------- status, down

report_daemons() {
    local pid began name gone=0
    while read -r pid began name; do
        if alive "$pid" "$began"; then
            echo "$name runs (pid $pid)"
        else
            echo "$name is gone; see $dir/log/$name.out"
            gone=1
        fi
    done <"$dir/daemons"
    return $gone
}

status() {
    [ -e "$dir/daemons" ] || fail "no cluster was started in $dir; start one: $0 up $dir"
    report_daemons
    SLURM_CONF=$dir/slurm.conf timeout 10 sinfo
    SLURM_CONF=$dir/slurm.conf timeout 10 squeue
}

restore() {
    local pid began name
    [ -e "$dir/daemons" ] || fail "no cluster was started in $dir; start one: $0 up $dir"
    export SLURM_CONF=$dir/slurm.conf
    while read -r pid began name; do
        [[ $name != slurmd.* ]] || alive "$pid" "$began" && continue
        sed -i "/ $name\$/d" "$dir/daemons"
        start "$name" slurmd -D -N "${name#slurmd.}" -f "$SLURM_CONF"
        echo "$name runs again"
    done < <(cat "$dir/daemons") # a copy: the file changes meanwhile
}

down() {
    local tries
    [ -e "$dir/daemons" ] || { echo "no cluster runs in $dir"; return; }
    export SLURM_CONF=$dir/slurm.conf
    # The processes of a job are no daemon's children any more: only Slurm can end them all.
    if timeout 5 scancel --user=root 2>/dev/null; then
        for ((tries = 0; tries < 60; tries++)); do
            [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] && sleep 0.25 || break
        done
    fi
    stop 'slurm*'
    stop munged
    rm "$dir/daemons"
    echo "stopped the cluster in $dir; its logs stay there"
}

# ---------------------------------------------------------------- command line

case ${1:-} in
    -h | --help) usage; exit ;;
    up | status | restore | down) verb=$1 ;;
    '') usage >&2; exit 2 ;;
    *) usage >&2; fail "'$1' is none of up, status, restore, down" ;;
esac
shift
dir='' nodes=2
while [ $# -gt 0 ]; do
    case $1 in
        --nodes=*) set -- --nodes "${1#*=}" "${@:2}"; continue ;;
        --nodes)
            [ "$verb" = up ] || fail "--nodes belongs to 'up', not to '$verb'"
            [[ ${2:-} =~ ^[1-9][0-9]?$ ]] || fail "--nodes: '${2:-}' is not a number from 1 to 99"
            nodes=$2
            shift
            ;;
        -*) usage >&2; fail "unknown option '$1'" ;;
        *) [ -z "$dir" ] || fail "'$1': one DIR only, and it is '$dir'"; dir=$1 ;;
    esac
    shift
done
[ -n "$dir" ] || { usage >&2; fail "$verb: DIR is missing; name the folder the cluster keeps its files in"; }
[ "$verb" = up ] && mkdir -p "$dir"
[ -d "$dir" ] || fail "$dir is no folder"
dir=$(cd "$dir" && pwd)
"$verb"
