#!/usr/bin/env bash
# Boots one node of a test cluster: namespaces with a host name, an address and a slurmd of their own. Killing the
# process in FOLDER/NAME.pid is a power cut: everything on the node dies at once.
#   node.sh FOLDER NETWORK NAME NUMBER      inside the namespaces that head.sh made
set -euo pipefail
folder=$1 network=$2 name=$3 number=$4
export SLURM_CONF=$folder/slurm.conf

# shellcheck disable=SC2016  # the inner shell's own variables
setsid unshare --net --uts --pid --mount --fork --kill-child --mount-proc bash -c '
    hostname "$1"
    until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
    ip link set lo up
    ip addr add "$2/24" dev eth0
    ip link set eth0 up
    slurmd -N "$1"
    sleep infinity &
    wait' bash "$name" "$network.$number" </dev/null >>"$folder/$name.out" 2>&1 &
unshare=$!
init=
until [[ -n "$init" ]]; do
    init=$(tr -d ' ' <"/proc/$unshare/task/$unshare/children")
    sleep 0.01
done
echo "$init" >"$folder/$name.pid"
ip link add "$name" type veth peer name eth0 netns "$init"
ip link set "$name" master nodes up
