#!/bin/bash
# Makes the images that containers of the tests run on, on the spot, since no registry is within reach of every machine:
#   bases.sh small DIR   busybox in three layers with whatever a tar layer can hold   DIR/oci (OCI), DIR/docker (Docker v2s2)
#   bases.sh big DIR     Debian with Python and pip, as a Jupyter image is             DIR/oci, DIR/docker
#   bases.sh pause DIR   for the sandboxes of pods                                     DIR/oci
set -euo pipefail
umask 022
what=$1 out=$2
mkdir -p "$out"
work=$out/work
mkdir "$work"
trap 'buildah umount --all > "$work/log" || true; umount -q "$work/root/overlay" || true; rm -rf "$work"' EXIT

# A storage of its own: what else is built on this machine is not ours.
buildah() { command buildah --root "$work/root" --runroot "$work/run" --storage-driver overlay "$@"; }

# begin [IMAGE]: a working container; its tree is at $tree
begin() {
    container=$(buildah from "${1:-scratch}")
    tree=$(buildah mount "$container")
}
layer() {
    buildah umount "$container" > "$work/log"
    buildah commit --quiet "$container" "$1" > "$work/log"
    buildah rm "$container" > "$work/log"
    begin "$1"
}
# finish [both]: the last layer, as an OCI layout and with "both" as a Docker image too (where Healthcheck, OnBuild and Shell live)
finish() {
    buildah umount "$container" > "$work/log"
    buildah commit --quiet --disable-compression=false --format oci "$container" "oci:$out/oci:latest" > "$work/log"
    if [ "${1:-}" = both ]; then
        buildah config --healthcheck 'CMD /bin/true' --healthcheck-interval 3600s --shell '/bin/sh -ec' \
            --onbuild 'RUN true' "$container" 2> "$work/log"
        buildah commit --quiet --disable-compression=false --format docker "$container" "dir:$out/docker" > "$work/log"
    fi
}

busybox() {
    mkdir -p "$tree/bin"
    install -m 755 "$(type -P busybox)" "$tree/bin/busybox"
    (cd "$tree/bin" && for applet in "$@"; do ln -f busybox "$applet"; done)
}

pause() {
    begin
    busybox sleep
    buildah config --entrypoint '["/bin/sleep", "2147483647"]' "$container"
    finish
}

small() {
    begin
    busybox sh sleep cat cp rm mv ln ls mkdir rmdir chmod chown touch mkfifo mknod dd echo seq date true stat setfattr find sync tar head id
    # Ordinary content, and everything that a naive differ loses.
    mkdir -p "$tree"/{etc,proc,sys,dev,run,tmp,root,usr/bin,usr/lib/app/plugins,var/log,var/lib/data,srv/share,opt/old/deep,home/researcher}
    chmod 1777 "$tree/tmp"
    chmod 700 "$tree/root"
    echo 'root:x:0:0:root:/root:/bin/sh
researcher:x:1000:1000::/home/researcher:/bin/sh' > "$tree/etc/passwd"
    echo 'root:x:0:
researcher:x:1000:' > "$tree/etc/group"
    chown 1000:1000 "$tree/home/researcher"
    chmod 750 "$tree/home/researcher"
    cp "$tree/bin/busybox" "$tree/usr/bin/su"
    chmod 4755 "$tree/usr/bin/su"
    cp "$tree/bin/busybox" "$tree/usr/bin/ping"
    setcap cap_net_raw+ep "$tree/usr/bin/ping"
    chmod 2775 "$tree/srv/share"
    chown 1000:50 "$tree/srv/share"
    ln -s ../lib/app/main "$tree/usr/bin/app"
    ln -s /nowhere/at/all "$tree/usr/lib/app/dangling"
    echo main > "$tree/usr/lib/app/main"
    ln "$tree/usr/lib/app/main" "$tree/usr/lib/app/main-linked"
    ln "$tree/usr/lib/app/main" "$tree/var/lib/data/main-elsewhere"
    for i in 1 2 3 4 5; do echo "plugin $i" > "$tree/usr/lib/app/plugins/p$i"; done
    setfattr -n user.origin -v base "$tree/usr/lib/app/plugins/p1"
    printf 'name with spaces' > "$tree/srv/share/a b"
    printf 'latin one' > "$tree/srv/share/$(printf 'caf\351')"
    mkdir -p "$tree/srv/dash/a" && echo in > "$tree/srv/dash/a/x" && echo after > "$tree/srv/dash/a-b"
    mkfifo "$tree/var/lib/data/fifo"
    dd if=/dev/zero of="$tree/var/lib/data/hole" bs=1 count=0 seek=1048576 status=none
    head -c 300000 /dev/urandom > "$tree/var/lib/data/noise"
    echo old > "$tree/opt/old/deep/file"
    touch -d '1969-12-31 23:00:00 UTC' "$tree/var/log/before-the-epoch"
    find "$tree" -newermt 2020-01-02 ! -type l -exec touch -d '2020-01-01 00:00:00 UTC' {} +
    layer small-1
    # Deletes, replaces, and hides of the first layer.
    rm -rf "$tree/opt/old"
    rm "$tree/usr/lib/app/plugins/p5"
    mkdir "$tree/opt/new"
    echo new > "$tree/opt/new/file"
    layer small-2
    rm -rf "$tree/var/log"
    mkdir "$tree/var/log"
    echo second > "$tree/var/log/third-layer"
    buildah config --env PATH=/usr/bin:/bin --env LANG=C.UTF-8 --cmd '["/bin/sh", "-c", "while :; do sleep 1; done"]' \
        --label org.example.kind=small --workingdir /root --user 0:0 --port 8888/tcp --volume /data --stop-signal SIGTERM \
        --author 'A. Base <base@example.org>' "$container"
    finish both
}

big() {
    . /etc/os-release
    local debian=$work/debian
    debootstrap --variant=minbase --include=python3,python3-pip,python3-venv "$VERSION_CODENAME" "$debian" > "$work/log" 2>&1 \
        || { tail -n 20 "$work/log" >&2; exit 1; }
    rm -rf "$debian"/var/cache/apt/archives/*.deb "$debian"/var/lib/apt/lists/* "$debian"/dev/*
    # What debootstrap took from this machine.
    rm -f "$debian/etc/resolv.conf" "$debian/etc/hostname"
    begin
    cp -a "$debian/." "$tree/"
    layer big-1
    echo 'researcher:x:1000:1000:,,,:/home/researcher:/bin/bash' >> "$tree/etc/passwd"
    echo 'researcher:x:1000:' >> "$tree/etc/group"
    cp -a "$tree/etc/skel" "$tree/home/researcher"
    echo '# Notebook' > "$tree/home/researcher/first.ipynb"
    chroot "$tree" python3 -m venv /opt/venv
    chown -R 1000:1000 "$tree/home/researcher" "$tree/opt/venv"
    buildah config --env PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --env LANG=C.UTF-8 \
        --env HOME=/home/researcher --cmd '["/bin/sleep", "2147483647"]' --label org.example.kind=big \
        --workingdir /home/researcher --user researcher --port 8888/tcp "$container"
    finish both
}

"$what"
