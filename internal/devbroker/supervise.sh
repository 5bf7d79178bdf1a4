# Runs one RabbitMQ in namespaces of its own (mounts, processes) and obeys words on standard input. When standard input
# ends, whoever started this is gone: the script ends, and with it, since it is process 1 of its namespace, every process
# and every mount. Nothing is left behind, whatever happened.
#
# Environment: KIND (root, path, docker), DIR (everything the broker keeps), ROOT (for root), SERVER (for path), NAME and
# IMAGE (for docker), BROKER_ENV (lines NAME=value for the broker).
set -u
status=$DIR/status
log=$DIR/rabbitmq.log

env_args=()
docker_env=()
while IFS= read -r line; do
  [ -n "$line" ] || continue
  env_args+=("$line")
  docker_env+=(-e "$line")
done <<<"$BROKER_ENV"

if [ "$KIND" = root ]; then
  # A root of its own, so that the shared one stays as it is: links and /etc are copied, /usr is bound read-only, and DIR
  # has the same path inside.
  new=$DIR/root
  mkdir -p "$new" && mount -t tmpfs -o mode=755 none "$new" || exit 70
  for d in bin sbin lib lib32 lib64; do [ -e "$ROOT/$d" ] && cp -a "$ROOT/$d" "$new/$d"; done
  cp -a "$ROOT/etc" "$new/etc"
  mkdir -p "$new"/{usr,proc,dev,sys,tmp,run,var/lib,var/log,var/tmp,root,"$DIR"}
  chmod 1777 "$new/tmp" "$new/var/tmp"
  mount --bind "$ROOT/usr" "$new/usr" && mount -o remount,ro,bind "$new/usr" &&
    mount --rbind /dev "$new/dev" && mount -t proc proc "$new/proc" || exit 70
  # The broker's files, without the new root that lies among them.
  mkdir -p "$new$DIR" && mount --bind "$DIR" "$new$DIR" || exit 70
  for extra in $BIND; do
    mkdir -p "$new$extra" && mount --bind "$extra" "$new$extra" && mount -o remount,ro,bind "$new$extra" || exit 70
  done
  printf '127.0.0.1 localhost %s\n' "$(hostname)" >"$new/etc/hosts" # without it the boot hangs on name look-ups
  server=$(cd "$ROOT" && ls -d usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server | sort -V | tail -n 1)
  SERVER=/$server
fi

inside() { # runs a program where the broker lives
  case $KIND in
    root) chroot "$new" /usr/bin/env -i "PATH=/usr/sbin:/usr/bin:/sbin:/bin" "${env_args[@]}" "$@" ;;
    path) env -i "PATH=$PATH" "${env_args[@]}" "$@" ;;
    docker) docker exec "$NAME" "$@" ;;
  esac
}

start() {
  case $KIND in
    docker)
      docker run --rm --name "$NAME" --network host --user "$(id -u):$(id -g)" -v "$DIR:$DIR" \
        $(for extra in $BIND; do printf -- '-v %s:%s:ro ' "$extra" "$extra"; done) \
        "${docker_env[@]}" "$IMAGE" rabbitmq-server
      ;;
    *) inside "$SERVER" ;;
  esac >>"$log" 2>&1 </dev/null
  echo "exited $?" >>"$status"
}

signal() {
  case $KIND in
    docker) docker kill --signal "$1" "$NAME" >/dev/null 2>&1 ;;
    *) pkill "-$1" -x beam.smp ;;
  esac
}

trap 'signal KILL' EXIT
while read -r word rest; do
  case $word in
    start) start & ;;
    signal) signal "$rest" ;;
    ctl)
      read -r out args <<<"$rest"
      # shellcheck disable=SC2086 # words of a command line
      inside "$(dirname "${SERVER:-/x/x}")/rabbitmqctl" $args >"$out.part" 2>&1 </dev/null
      echo "exit $?" >>"$out.part"
      mv "$out.part" "$out"
      ;;
  esac
done
exit 0
