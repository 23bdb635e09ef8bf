# A machine for one test: systemd, booted in namespaces of its own over this machine's files.
#
#     sh boot.sh WORK SHARED FOLDER
#
# WORK is an empty folder. SHARED is the same folder inside and outside; whatever else is written is kept in memory and
# gone at the end. FOLDER, below SHARED, holds units/ (all units that there are), etc/ (/etc/qedfs) and bin/qedfs.
#
# The network is shared: servers of the test are reached, and no unit of this machine is in units/.
set -eu
work=$1
shared=$2
folder=$3
root=$work/root

# A cgroup for systemd to begin in, and to take for the root.
mkdir "$work/cgroup"
mount -t cgroup2 cgroup2 "$work/cgroup"
mkdir "$work/cgroup/qedfs-test-$(basename "$work")"
echo 0 >"$work/cgroup/qedfs-test-$(basename "$work")/cgroup.procs"
umount "$work/cgroup"

mkdir "$work/memory" "$root"
mount -t tmpfs tmpfs "$work/memory"
mkdir "$work/memory/upper" "$work/memory/work"
mount -t overlay -o "lowerdir=/,upperdir=$work/memory/upper,workdir=$work/memory/work" overlay "$root"
mount --bind "$shared" "$root$shared"
mkdir -p "$root/etc/qedfs"
mount --bind "$folder/etc" "$root/etc/qedfs"
rm -f "$root/usr/local/bin/qedfs"
cp "$folder/bin/qedfs" "$root/usr/local/bin/qedfs"

mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for node in null zero full random urandom tty fuse; do
    : >"$root/dev/$node"
    mount --bind "/dev/$node" "$root/dev/$node"
done
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"

exec unshare --cgroup -- sh -euc '
    mount -t cgroup2 cgroup2 "$1/sys/fs/cgroup"
    cd "$1"
    mkdir -p .outside
    pivot_root . .outside
    umount -l .outside
    # As systemd has it where it is not in a container: a mount is one for all namespaces of the machine.
    mount --make-rshared /
    for systemd in /lib/systemd/systemd /usr/lib/systemd/systemd; do
        [ ! -x "$systemd" ] || exec env -i container=qedfs-test SYSTEMD_UNIT_PATH="$2/units" \
            "$systemd" --unit=multi-user.target --show-status=no --log-target=null
    done
' sh "$root" "$folder"
