#!/usr/bin/env bash
# Process 1 of a test cluster's own namespaces: its network, munged, slurmctld, and then its nodes. All die with it.
#   unshare --net --uts --pid --mount --fork --kill-child --mount-proc head.sh FOLDER NETWORK NODE...
set -euo pipefail
folder=$1 network=$2
shift 2
here=$(dirname "${BASH_SOURCE[0]}")
export SLURM_CONF=$folder/slurm.conf

hostname head
mount --bind "$folder/hosts" /etc/hosts
disk=$(cat "$folder/disk_mib" 2>/dev/null || echo 0)
if ((disk)); then mount -t tmpfs -o "size=${disk}m" tmpfs "$folder/disk"; fi
ip link set lo up
ip link add nodes type bridge
ip addr add "$network.254/24" dev nodes
ip link set nodes up
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --seed-file="$folder/munge.seed" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log"
slurmctld
number=0
for name in "$@"; do
    number=$((number + 1))
    "$here/node.sh" "$folder" "$network" "$name" "$number"
done
sleep infinity &
wait
