#!/usr/bin/env bash
# Run two hosts on one machine while standard input is open:  two_hosts.sh FOLDER NAME
#
# The hosts NAME1 and NAME2 are network namespaces, each with its own addresses, process ids, host name and sshd. They
# share this machine's files, as hosts of a cluster share a file system. FOLDER gets the keys and `ssh`, which connects
# to the hosts by name from inside them:  ip netns exec NAME1 FOLDER/ssh NAME2 hostname
#
# Needs root, iproute2, openssh and util-linux. Prints "up" when both hosts answer. When standard input ends, also
# because its writer was killed, the hosts end and are removed. They have no connection to anything outside the two
# namespaces: both ends of the cable between them are made inside. ~/.ssh and /etc/ssh are not used.
set -euo pipefail
folder=$1
hosts=("${2}1" "${2}2")
addresses=(10.77.0.1 10.77.0.2) # private to the namespaces, so two of these scripts may run at once

sshd_pids=()
down() {
  local i
  for i in 0 1; do
    # unshare --kill-child: this ends every process of the host.
    [ -z "${sshd_pids[i]:-}" ] || { kill -9 "${sshd_pids[i]}" && wait "${sshd_pids[i]}"; } 2>/dev/null || true
    ip netns del "${hosts[i]}" 2>/dev/null || true
    rm -rf "/etc/netns/${hosts[i]}"
  done
  rmdir /etc/netns 2>/dev/null || true
}
trap down EXIT
trap 'exit 1' INT TERM HUP

mkdir -p "$folder" /run/sshd # sshd needs /run/sshd
ssh-keygen -q -t ed25519 -N '' -f "$folder/key"
ip netns add "${hosts[0]}"
ip netns add "${hosts[1]}"
ip link add eth0 netns "${hosts[0]}" type veth peer name eth0 netns "${hosts[1]}"
for i in 0 1; do
  ip -n "${hosts[i]}" link set lo up
  ip -n "${hosts[i]}" addr add "${addresses[i]}/24" dev eth0
  ip -n "${hosts[i]}" link set eth0 up
  # `ip netns exec` replaces /etc/hosts by this file.
  mkdir -p "/etc/netns/${hosts[i]}"
  printf '127.0.0.1 localhost\n%s %s\n%s %s\n' "${addresses[0]}" "${hosts[0]}" "${addresses[1]}" "${hosts[1]}" \
    >"/etc/netns/${hosts[i]}/hosts"
  ssh-keygen -q -t ed25519 -N '' -f "$folder/hostkey$i"
  printf '%s %s\n' "${hosts[i]}" "$(cut -d' ' -f1,2 "$folder/hostkey$i.pub")" >>"$folder/known_hosts"
  cat >"$folder/sshd$i.conf" <<CONF
ListenAddress ${addresses[i]}:22
HostKey $folder/hostkey$i
PidFile none
AuthorizedKeysFile $folder/key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
CONF
  ip netns exec "${hosts[i]}" unshare --pid --uts --mount --fork --kill-child --mount-proc \
    sh -c "hostname ${hosts[i]}; exec $(command -v sshd || echo /usr/sbin/sshd) -D -e -f $folder/sshd$i.conf" \
    </dev/null >"$folder/sshd$i.log" 2>&1 &
  sshd_pids+=($!)
done
cat >"$folder/ssh" <<CONF
#!/bin/sh
exec ssh -F none -l root -i $folder/key -o IdentitiesOnly=yes -o UserKnownHostsFile=$folder/known_hosts \\
  -o GlobalKnownHostsFile=/dev/null -o StrictHostKeyChecking=yes -o BatchMode=yes "\$@"
CONF
chmod +x "$folder/ssh"

for i in 0 1; do
  for _ in $(seq 100); do
    ! ip netns exec "${hosts[1 - i]}" "$folder/ssh" "${hosts[i]}" hostname </dev/null >"$folder/answer" 2>&1 || break
    sleep 0.2
  done
  [ "$(tail -n1 "$folder/answer")" = "${hosts[i]}" ] || { echo "${hosts[i]} does not answer: $(cat "$folder/answer" "$folder/sshd$i.log")" >&2; exit 1; }
done
echo up
read -r _ || true
