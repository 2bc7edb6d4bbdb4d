#!/bin/busybox sh
# First process of the virtual machine: mounts what a node has, runs the tests that /words names, and switches the machine off.
/bin/busybox mkdir -p /usr/local/bin
/bin/busybox --install -s /usr/local/bin
export PATH=/usr/bin:/usr/sbin:/bin:/sbin:/usr/local/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs devices /dev
mount -t tmpfs temporary /tmp
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing
for module in /lib/modules/*.ko; do insmod "$module"; done
ip link set lo up
# What the kubelet's part of containerd copies into pods.
mkdir -p /etc
echo '127.0.0.1 localhost' > /etc/hosts
echo 'root:x:0:0:root:/root:/bin/sh' > /etc/passwd
touch /etc/group /etc/hostname /etc/resolv.conf
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do echo "+$controller" > /sys/fs/cgroup/cgroup.subtree_control; done
uname -a
export CI=true
. /variables
"$(cat /program)" --test-threads=1 --nocapture $(cat /words) 2>&1
echo "the tests ended with $?"
poweroff -f
