#!/bin/sh
# flash.sh: makes esp32 board into device lamp-0001. Written by muster provision; docs/factory.md tells how to use it.
#
# It can be run again at any time: what is done is not done twice, and a board whose plug was pulled goes on where it was.
# Everything that can be undone comes first. What cannot be undone is marked CANNOT BE UNDONE, and asked for.
set -eu
umask 077
cd "$(dirname "$0")"

DEVICE='lamp-0001'
CHIP='esp32'
WANT_MAC='24:0a:c4:00:00:01' # of the board; empty: the first board that this folder meets

usage() {
  cat <<'TEXT'
usage: ./flash.sh [PORT] [--burn] [--keep] [--check] [--other-board]
  PORT           serial port; else ESPPORT, else the tools look for one
  --burn         do not ask before burning what cannot be undone
  --keep         keep the files with secrets when all is done
  --check        only check this folder with Espressif's tools; needs no board
  --other-board  the board that this folder was for is gone: take another one
environment: ESPPORT ESPBAUD ESPTOOL ESPEFUSE ESPSECURE MUSTER_OPERATOR MUSTER_STATION MUSTER_STATION_LOG
TEXT
}

PORT=${ESPPORT:-}
BURN=ask
KEEP=no
CHECK=no
OTHER=no
while [ $# -gt 0 ]; do
  case $1 in
  --burn) BURN=yes ;;
  --keep) KEEP=yes ;;
  --check) CHECK=yes ;;
  --other-board) OTHER=yes ;;
  -h | --help) usage && exit 0 ;;
  -*) usage >&2 && exit 2 ;;
  *) PORT=$1 ;;
  esac
  shift
done

STATE=.flash
STEP=start
MAC=
LOG=${MUSTER_STATION_LOG:-../station.log}

say() { printf '%s: %s\n' "$DEVICE" "$*"; }

plain() { printf '%s' "$1" | tr -cd 'A-Za-z0-9@._: -'; }

# note appends a line to the station log: who did what to which board.
note() {
  printf '{"at":"%s","station":"%s","who":"%s","device":"%s","mac":"%s","what":"%s","result":"%s"}\n' \
    "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(plain "${MUSTER_STATION:-$(uname -n)}")" "$(plain "${MUSTER_OPERATOR:-$(id -un)}")" \
    "$DEVICE" "$MAC" "$1" "$2" >>"$LOG" || say "the station log $LOG cannot be written"
}

NOTED=no
die() {
  say "$*" >&2
  if [ "$CHECK" = no ]; then
    note "$STEP" failed
  fi
  NOTED=yes
  exit 1
}

ended() {
  code=$?
  if [ "$code" -ne 0 ] && [ "$NOTED" = no ] && [ "$CHECK" = no ]; then
    note "$STEP" failed
    say "stopped at: $STEP. Mend it and run this again: it goes on where it was." >&2
  fi
}
trap ended EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

find_tool() { # NAMES
  for t in "$@"; do
    if command -v "$t" >/dev/null 2>&1; then
      printf '%s' "$t"
      return
    fi
  done
}

ESPTOOL=${ESPTOOL:-$(find_tool esptool esptool.py)}
ESPEFUSE=${ESPEFUSE:-$(find_tool espefuse espefuse.py)}
ESPSECURE=${ESPSECURE:-$(find_tool espsecure espsecure.py)}
[ -n "$ESPTOOL" ] || die "there is no esptool: pip install esptool"
MAJOR=$("$ESPTOOL" version | sed -n '$s/^[^0-9]*\([0-9][0-9]*\)\..*/\1/p')
[ -n "$MAJOR" ] || die "esptool does not say its version"

# spelled runs a tool. Commands and options stand here as version 5 spells them; version 4 has underscores.
spelled() {
  if [ "$MAJOR" -lt 5 ]; then
    n=$#
    while [ "$n" -gt 0 ]; do
      a=$1
      shift
      case $a in
      erase-flash | write-flash | read-mac | burn-key | burn-efuse | write-protect-efuse | no-reset | hard-reset | decrypt-flash-data | signature-info-v2)
        a=$(printf '%s' "$a" | tr - _)
        ;;
      --flash-mode | --flash-freq | --flash-size | --aes-xts | --flash-crypt-conf)
        a="--$(printf '%s' "${a#--}" | tr - _)"
        ;;
      esac
      set -- "$@" "$a"
      n=$((n - 1))
    done
  fi
  "$@"
}

flash_tool() { spelled "$ESPTOOL" --chip "$CHIP" ${PORT:+--port "$PORT"} --baud "${ESPBAUD:-460800}" "$@"; }

forget() { # FILE...
  for f in "$@"; do
    if command -v shred >/dev/null 2>&1; then
      shred -u "$f" 2>/dev/null || rm -f "$f"
    else
      rm -f "$f"
    fi
  done
}

sums() {
  if command -v sha256sum >/dev/null 2>&1; then
    sha256sum -c SHA256SUMS >/dev/null
  else
    shasum -a 256 -c SHA256SUMS >/dev/null
  fi
}

[ -n "$ESPEFUSE" ] || die "there is no espefuse: pip install esptool"

fuse_tool() { spelled "$ESPEFUSE" --chip "$CHIP" ${PORT:+--port "$PORT"} "$@"; }

SUMMARY=
read_efuses() { SUMMARY=$(fuse_tool summary --format json | tr -d '\n') || die "the eFuses cannot be read"; }

# property prints what the summary says of an eFuse: readable, writeable or value.
property() {
  printf '%s' "$SUMMARY" | sed -n "s/.*\"$1\": *{\([^}]*\)}.*/\1/p" | sed -n "s/.*\"$2\": *\"\{0,1\}\([^\",}]*\).*/\1/p" | sed 's/ *$//'
}

# block prints the state of a key block: free, half (written and not protected yet) or shut.
block() {
  case $(property "$1" readable)/$(property "$1" writeable) in
  true/true)
    case $(property "$1" value) in
    '') echo unknown ;;
    *[!0\ ]*) echo half ;;
    *) echo free ;;
    esac
    ;;
  true/false | false/true | false/false) echo shut ;;
  *) echo unknown ;;
  esac
}

# may_burn says whether a key may go into these blocks. A block that is not free is ours only if we had begun.
may_burn() { # STEP BLOCK...
  id=$1
  shift
  for b in "$@"; do
    case $(block "$b") in
    free) ;;
    half | shut)
      [ -e "$STATE/$id.begun" ] || die "eFuse block $b of this board is in use already: it is not a new board, and it was not this folder that burnt it"
      ;;
    *) die "espefuse does not tell the state of eFuse block $b" ;;
    esac
  done
}

all_shut() { # BLOCK...
  for b in "$@"; do
    [ "$(block "$b")" = shut ] || return 1
  done
}

burn() { # STEP ARGUMENTS of espefuse
  STEP=$1
  shift
  : >"$STATE/$STEP.begun"
  fuse_tool --do-not-confirm "$@"
  : >"$STATE/$STEP.done"
  note "$STEP" ok
}

# key burns a key, unless a run that was cut off has burnt it already.
key() { # STEP BLOCKS ARGUMENTS
  if [ -e "$STATE/$1.done" ]; then
    return
  fi
  id=$1
  blocks=$2
  shift 2
  read_efuses
  # shellcheck disable=SC2086 # a list of names
  may_burn "$id" $blocks
  # shellcheck disable=SC2086
  if [ -e "$STATE/$id.begun" ] && all_shut $blocks; then
    say "$id was burnt before the last run was cut off"
    : >"$STATE/$id.done"
    return
  fi
  burn "$id" "$@"
}

fuse() { # STEP ARGUMENTS
  if [ ! -e "$STATE/$1.done" ]; then
    burn "$@"
  fi
}

# consent asks for the name of the device.
consent() {
  if [ "$BURN" = yes ]; then
    return
  fi
  printf 'Type %s to burn, anything else to stop: ' "$DEVICE"
  read -r answer || answer=
  [ "$answer" = "$DEVICE" ] || die "not confirmed: nothing of this was burnt"
}

if [ -e "$STATE/finished" ]; then
  say "finished already, on board $(cat "$STATE/mac")"
  exit 0
fi

STEP=files
sums || die "a file of this folder is missing or damaged: see SHA256SUMS, or make the folder again"

if [ "$CHECK" = yes ]; then
  [ -n "$ESPSECURE" ] || die "there is no espsecure: pip install esptool"
  same() { # FILE SHA-256
    [ "$(if command -v sha256sum >/dev/null 2>&1; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1)" = "$2" ]
  }
  clear=$(mktemp)
  trap 'rm -f "$clear"' EXIT
  spelled "$ESPSECURE" decrypt-flash-data --flash-crypt-conf 0xf --keyfile efuse/flash-encryption.bin --address 0x1000 --output "$clear" bootloader.bin
  same "$clear" 0000000000000000000000000000000000000000000000000000000000000000 || die "bootloader.bin is not what muster encrypted"
  spelled "$ESPSECURE" signature-info-v2 "$clear"
  spelled "$ESPSECURE" decrypt-flash-data --flash-crypt-conf 0xf --keyfile efuse/flash-encryption.bin --address 0x8000 --output "$clear" partition-table.bin
  same "$clear" 0000000000000000000000000000000000000000000000000000000000000000 || die "partition-table.bin is not what muster encrypted"
  spelled "$ESPSECURE" decrypt-flash-data --flash-crypt-conf 0xf --keyfile efuse/flash-encryption.bin --address 0xe000 --output "$clear" otadata.bin
  same "$clear" 0000000000000000000000000000000000000000000000000000000000000000 || die "otadata.bin is not what muster encrypted"
  spelled "$ESPSECURE" decrypt-flash-data --flash-crypt-conf 0xf --keyfile efuse/flash-encryption.bin --address 0x10000 --output "$clear" app.bin
  same "$clear" 0000000000000000000000000000000000000000000000000000000000000000 || die "app.bin is not what muster encrypted"
  spelled "$ESPSECURE" signature-info-v2 "$clear"
  spelled "$ESPSECURE" decrypt-flash-data --flash-crypt-conf 0xf --keyfile efuse/flash-encryption.bin --address 0x310000 --output "$clear" nvs_key.bin
  same "$clear" 0000000000000000000000000000000000000000000000000000000000000000 || die "nvs_key.bin is not what muster encrypted"
  say "the folder is whole"
  exit 0
fi

mkdir -p "$STATE"

# The last step may have been done when the run was cut off: then the board does not answer any more, and cannot.
if [ -e "$STATE/close.begun" ] && ! flash_tool --after no-reset read-mac >/dev/null 2>&1; then
  MAC=$(cat "$STATE/mac")
  say "the board cannot be read; the step before was to close its download mode. Does it start by itself?"
  printf 'Type yes if it does: '
  read -r answer || answer=
  STEP=close
  [ "$answer" = yes ] || die "board $MAC does not answer: check the plug"
  : >"$STATE/close.done"
fi
if [ ! -e "$STATE/close.done" ]; then

# Which board is it? Two boards with one identity would lock each other out.
STEP=board
found=$(flash_tool --after no-reset read-mac) || die "no esp32 answers: check plug, port and chip"
MAC=$(printf '%s\n' "$found" | tr 'A-F' 'a-f' | sed -n 's/.*[mM]ac: *\(\([0-9a-f]\{2\}:\)\{5\}[0-9a-f]\{2\}\)[[:space:]]*$/\1/p' | tail -n 1)
[ -n "$MAC" ] || die "esptool does not tell the MAC address"
revision=$(printf '%s\n' "$found" | sed -n 's/.*revision v\([0-9][0-9]*\)\.\([0-9][0-9]*\).*/\1 \2/p' | head -n 1)
[ -n "$revision" ] || die "esptool does not tell the chip's revision, and Secure Boot v2 needs v3.0"
[ $((${revision% *} * 100 + ${revision#* })) -ge 300 ] || die "the chip is too old for Secure Boot v2: it has revision v${revision% *}.${revision#* }, and v3.0 is needed"
if [ -n "$WANT_MAC" ] && [ "$WANT_MAC" != "$MAC" ]; then
  die "this folder is for board $WANT_MAC, and here is $MAC"
fi
if [ -e "$STATE/mac" ] && [ "$(cat "$STATE/mac")" != "$MAC" ]; then
  [ "$OTHER" = yes ] || die "this folder went to board $(cat "$STATE/mac"), and here is $MAC: two boards must not have one identity. If that one is gone for good, say --other-board"
  note "board $(cat "$STATE/mac") given up" ok
  rm -f "$STATE"/*.begun "$STATE"/*.done
fi
printf '%s\n' "$MAC" >"$STATE/mac"

read_efuses
may_burn flash-key BLOCK1
may_burn secure-boot-key-0 BLOCK2

# 1. Flash. All of this can be undone.
if [ ! -e "$STATE/flash.done" ]; then
  STEP=flash
  flash_tool --after no-reset erase-flash
  flash_tool --after no-reset write-flash --flash-mode keep --flash-freq keep --flash-size keep \
    0x1000 bootloader.bin \
    0x8000 partition-table.bin \
    0x9000 nvs.bin \
    0xe000 otadata.bin \
    0x10000 app.bin \
    0x310000 nvs_key.bin
  : >"$STATE/flash.done"
  note flash ok
fi

# 2. eFuses. CANNOT BE UNDONE.
if [ ! -e "$STATE/protect-digest.done" ]; then
  STEP=consent
  cat <<TEXT
$DEVICE, board $MAC: what follows CANNOT BE UNDONE.
  - burn the flash-encryption key; nobody can read it back
  - burn the digest of the Secure Boot key: it can never be changed
  - turn flash encryption on, for good
  - keep the download mode from encrypting, and from reading through the cache
  - turn Secure Boot on: from now on only signed bootloaders start
  - shut JTAG, and starting without the bootloader
  - write-protect these settings
  - see to it that the key digest can always be read; no key can be read-protected any more
TEXT
  consent
fi
# CANNOT BE UNDONE: burn the flash-encryption key; nobody can read it back.
key flash-key 'BLOCK1' burn-key flash_encryption efuse/flash-encryption.bin
# CANNOT BE UNDONE: burn the digest of the Secure Boot key: it can never be changed.
key secure-boot-key-0 'BLOCK2' burn-key secure_boot_v2 efuse/secure-boot-0.bin
# CANNOT BE UNDONE: turn flash encryption on, for good.
fuse encryption burn-efuse FLASH_CRYPT_CONFIG 0xF FLASH_CRYPT_CNT 127
# CANNOT BE UNDONE: keep the download mode from encrypting, and from reading through the cache.
fuse download-encrypt burn-efuse DISABLE_DL_ENCRYPT 1 DISABLE_DL_DECRYPT 1 DISABLE_DL_CACHE 1
# CANNOT BE UNDONE: turn Secure Boot on: from now on only signed bootloaders start.
fuse secure-boot burn-efuse ABS_DONE_1 1
# CANNOT BE UNDONE: shut JTAG, and starting without the bootloader.
fuse jtag burn-efuse JTAG_DISABLE 1
# CANNOT BE UNDONE: write-protect these settings.
fuse protect write-protect-efuse DIS_CACHE
# CANNOT BE UNDONE: see to it that the key digest can always be read; no key can be read-protected any more.
fuse protect-digest write-protect-efuse RD_DIS

# 3. The download mode. CANNOT BE UNDONE.
STEP=consent
cat <<TEXT
$DEVICE, board $MAC: the last step CANNOT BE UNDONE either.
  - shut the download mode for good: esptool cannot reach the chip any more (chip revision v3.0 or later)
TEXT
consent
# CANNOT BE UNDONE: shut the download mode for good: esptool cannot reach the chip any more (chip revision v3.0 or later).
fuse close burn-efuse UART_DOWNLOAD_DIS 1
fi

: >"$STATE/finished"
if [ "$KEEP" = no ]; then
  # The device has them now. Nobody else needs them.
  forget efuse/flash-encryption.bin
fi
note finished ok
say "done: board $MAC is $DEVICE. Switch it off and on"
