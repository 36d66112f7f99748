#!/usr/bin/env bash
# What a container of the image runs:
#
#   pretrain --config FILE ...   one rank, which finds the others by RANK, WORLD_SIZE, MASTER_ADDR, or Slurm's variables
#   PROGRAM ...                  any program of the image: torchrun, deepspeed, python, bash
#   train FILE ...               anything else is a command of `tritrain`
#
# It becomes that program, which gets every signal and whose exit code is the container's.
set -euo pipefail

# A user that the image does not know (docker run --user) has no home and no name, and torch asks for both.
if [[ ! -w "${HOME:-/}" ]]; then
  HOME=$(mktemp --directory)
  export HOME
fi
export USER="${USER:-$(id --user)}"

cores() {
  local count quota period
  count=$(nproc)
  if [[ -r /sys/fs/cgroup/cpu.max ]]; then
    read -r quota period < /sys/fs/cgroup/cpu.max
    if [[ "${quota}" != max ]] && (( quota < count * period )); then
      count=$(( (quota + period - 1) / period ))
    fi
  fi
  echo "${count}"
}

if [[ "${1:-}" == pretrain ]]; then
  shift
  # torchrun and deepspeed see to the threads of their ranks; a rank on its own would take all of the machine's cores.
  if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
    threads=$(( $(cores) / ${LOCAL_WORLD_SIZE:-1} ))
    export OMP_NUM_THREADS=$(( threads > 0 ? threads : 1 ))
  fi
  exec python /opt/tritrain/launcher/pretrain.py "$@"
elif [[ $# -gt 0 && "$1" != -* ]] && type -P "$1" > /dev/null; then
  exec "$@"
else
  exec tritrain "$@"
fi
