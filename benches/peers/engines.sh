# Starts a registry and the engines with state of their own, on loopback, and in each engine the same session: sourced by `run`.
# Expects $work (a directory that goes away), $here (where this lies), $base (an OCI layout), $tree (what the session installed).
# Each session_* sets id[ENGINE], pid[ENGINE] of its container, and daemon[ENGINE] where a daemon does the work.
# shellcheck shell=bash disable=SC2154,SC2034 # variables from and for `run`

declare -A id pid daemon
daemons=()
venv=home/researcher/session

# start NAME COMMAND...: in a session of its own, so that an interrupt reaches it only after its containers are gone
start() {
    setsid "${@:2}" > "$work/$1.log" 2>&1 < /dev/null &
    daemon[$1]=$!
    daemons=("$!" "${daemons[@]}")
}

# ready NAME COMMAND...: waits until the command succeeds
ready() {
    local until=$((SECONDS + 30))
    while ! "${@:2}" > "$work/ready.log" 2>&1; do
        if [ $SECONDS -ge $until ] || ! kill -0 "${daemon[$1]}"; then
            tail -n 20 "$work/$1.log" >&2
            fail "$1 does not start"
        fi
        sleep 0.1
    done
}

start_registry() {
    # The port is the kernel's choice; the log names it.
    cat > "$work/registry.yml" << END
version: 0.1
log: {level: info, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $work/registry}, delete: {enabled: true}}
http: {addr: '127.0.0.1:0'}
END
    start registry docker-registry serve "$work/registry.yml"
    ready registry grep -q 'listening on' "$work/registry.log"
    registry=$(grep -oE 'listening on 127\.0\.0\.1:[0-9]+' "$work/registry.log" | grep -oE '[0-9.]+:[0-9]+')
    image=$registry/base:1
    skopeo copy --quiet --preserve-digests --dest-tls-verify=false "oci:$base:latest" "docker://$image"
    base_layers=$(skopeo inspect --raw --tls-verify=false "docker://$image" | python3 -c 'import json, sys; print(len(json.load(sys.stdin)["layers"]))')
}

# What each container runs: the probe, as the only process.
probe() { python=(python3 -c "$(cat "$here/probe.py")" /dev/shm/gaps); }

# fill ENGINE: the tree into the container's own mount, so that it is really in its upper directory
fill() {
    local root=/proc/${pid[$1]}/root
    mkdir "$root/$venv"
    tar -C "$tree" --owner=1000 --group=1000 -cf - . | tar -C "$root/$venv" -xf -
}

session_podman() {
    local dir=$work/podman
    mkdir "$dir"
    # Without CAP_SYS_RESOURCE the default limits are refused; crun refuses hybrid hierarchies; locks in shared memory are
    # those of all Podmans of the machine.
    cat > "$dir/containers.conf" << END
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
tmp_dir = "$dir/tmp"
END
    printf '[storage]\ndriver = "overlay"\ngraphroot = "%s"\nrunroot = "%s"\n' "$dir/root" "$dir/runroot" > "$dir/storage.conf"
    export CONTAINERS_CONF=$dir/containers.conf CONTAINERS_STORAGE_CONF=$dir/storage.conf
    export UPPERDECK_STORAGE_ROOT=$dir/root UPPERDECK_STORAGE_RUNROOT=$dir/runroot
    podman pull --quiet --tls-verify=false "$image" > "$dir/log"
    id[podman]=$(podman run -d --network host --pull never --user 0 "$image" "${python[@]}")
    pid[podman]=$(podman inspect --format '{{.State.Pid}}' "${id[podman]}")
    fill podman
}

session_docker() {
    local dir=$work/docker
    mkdir "$dir"
    # Not the machine's own configuration.
    echo '{}' > "$dir/daemon.json"
    export DOCKER_HOST=unix://$dir/sock UPPERDECK_DOCKER_ROOT=$dir/root
    start docker dockerd --config-file "$dir/daemon.json" --storage-driver overlay2 --bridge none --iptables=false --ip-forward=false \
        --host "$DOCKER_HOST" --data-root "$dir/root" --exec-root "$dir/exec" --pidfile "$dir/pid"
    ready docker docker version
    docker pull --quiet "$image" > "$dir/log"
    id[docker]=$(docker run -d --network none --user 0 "$image" "${python[@]}")
    pid[docker]=$(docker inspect --format '{{.State.Pid}}' "${id[docker]}")
    fill docker
}

session_containerd() {
    local dir=$work/containerd
    mkdir "$dir"
    cat > "$dir/config.toml" << END
version = 2
root = "$dir/root"
state = "$dir/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
address = "$dir/sock"
[ttrpc]
address = "$dir/ttrpc"
[debug]
address = "$dir/debug"
END
    cat > "$dir/nerdctl.toml" << END
address = "$dir/sock"
namespace = "default"
data_root = "$dir/nerdctl"
cni_netconfpath = "$dir/cni"
cgroup_manager = "cgroupfs"
insecure_registry = true
END
    export NERDCTL_TOML=$dir/nerdctl.toml UPPERDECK_CONTAINERD_ROOT=$dir/root UPPERDECK_CONTAINERD_STATE=$dir/state
    start containerd containerd --config "$dir/config.toml"
    ready containerd nerdctl version
    nerdctl pull --quiet "$image" > "$dir/log" 2>&1 || fail "nerdctl pull: $(cat "$dir/log")"
    id[containerd]=$(nerdctl run -d --net host --user 0 "$image" "${python[@]}")
    pid[containerd]=$(nerdctl inspect --format '{{.State.Pid}}' "${id[containerd]}")
    fill containerd
}

# Everything ends: the containers by their engines, then the daemons by their pids.
end_all() {
    [ -z "${id[podman]:-}" ] || podman rm --force --time 0 "${id[podman]}" || true
    [ -z "${id[docker]:-}" ] || docker rm --force "${id[docker]}" || true
    [ -z "${id[containerd]:-}" ] || nerdctl rm --force "${id[containerd]}" || true
    local one
    for one in "${daemons[@]}"; do
        kill "$one" || true
        wait "$one" || true
    done
    # Deepest first.
    awk -v work="$work/" 'index($2, work) == 1 { print $2 }' /proc/mounts | sort -r | xargs --no-run-if-empty umount || true
}
