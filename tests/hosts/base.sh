# What every host begins with: places of its own for all that a user's program writes. Run by root in private namespaces.
# SHARE: what all hosts see. HOST_UID: the user's id. Afterwards a profile makes of it what its machine is like.
export LC_ALL=C
mount -t tmpfs -o mode=755 host /mnt
mkdir /mnt/share /mnt/etc /mnt/etc.work
mount --bind "$SHARE" /mnt/share
mount -o remount,bind,ro /mnt/share
mount -t overlay -o "lowerdir=/etc,upperdir=/mnt/etc,workdir=/mnt/etc.work" etc /etc
for place in /home /run /srv /opt; do mount -t tmpfs -o mode=755 host $place; done
for place in /tmp /var/tmp; do mount -t tmpfs -o mode=1777 host $place; done
hostname node1

# Of the machine that the tests run on nothing is left that a host could differ in.
rm -f /etc/localtime /etc/resolv.conf /etc/timezone
cp -L /usr/share/zoneinfo/Etc/UTC /etc/localtime
echo 'nameserver 192.0.2.53' >/etc/resolv.conf
echo '127.0.0.1 localhost node1' >/etc/hosts
sed -i '/^anna:/d' /etc/passwd /etc/group /etc/subuid /etc/subgid
echo "anna:x:$HOST_UID:$HOST_UID:Anna:/home/anna:/bin/bash" >>/etc/passwd
echo "anna:x:$HOST_UID:" >>/etc/group
echo 'anna:705000000:65536' | tee -a /etc/subuid >>/etc/subgid

# DIRECTORY [MODE]: one of the user's own.
own() { install -d -o "$HOST_UID" -g "$HOST_UID" -m "${2:-755}" "$1"; }
own /home/anna 700
install -d /run/user
runtime() { # as pam_systemd makes it at a login
    mkdir -p /run/user/$HOST_UID
    mount -t tmpfs -o "mode=700,uid=$HOST_UID,gid=$HOST_UID" run /run/user/$HOST_UID
}
runtime
own /srv/work
# A directory of the host, a file, a link that climbs, as they are bound everywhere.
own /srv/data/sub
echo 'of the host' >/srv/data/file
ln -s ../srv/data /opt/link
chown -R "$HOST_UID:$HOST_UID" /srv/data
