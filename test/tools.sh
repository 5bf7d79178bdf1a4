#!/usr/bin/env bash
# Installs what tests and demo use beside Go: clients that muster did not write, a linker for the race detector, and
# mmdebstrap for a private RabbitMQ.
# Nothing is installed that is there already.
set -euo pipefail
declare -A package=(
  [mosquitto_pub]=mosquitto-clients
  [openssl]=openssl
  [curl]=curl
  [mmdebstrap]=mmdebstrap
  [unshare]=util-linux
  [pkill]=procps
  [softhsm2-util]=softhsm2 # a PKCS #11 token for the keys of the CA
  [gcc]="gcc libc6-dev" # the race detector is linked by it
  [g++]=g++              # the example client for the ESP32 is compiled for this machine, too
)
missing=()
for tool in "${!package[@]}"; do
  # shellcheck disable=SC2206 # some tools take two packages
  command -v "$tool" >/dev/null 2>&1 || missing+=(${package[$tool]})
done
[ -e /usr/include/mbedtls/ssl.h ] || missing+=(libmbedtls-dev) # what the example client does its cryptography with
[ ${#missing[@]} -eq 0 ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "error: missing on this machine: ${missing[*]}" >&2
  echo "hint: install them, or run as root on Debian, where this is done for you" >&2
  exit 1
fi
echo "installing from Debian: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
  { apt-get update >/dev/null && apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null; }
