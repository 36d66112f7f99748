#!/usr/bin/env bash
# The compiler that builds DeepSpeed's operations. DeepSpeed compiles for the very processor that it is compiled on;
# an image runs on others, so CPU_ARCH stands in for it. `native` leaves everything as it is.
set -euo pipefail

arguments=()
for argument; do
  if [[ "${CPU_ARCH}" != native ]]; then
    case "${argument}" in
      -march=native) argument="-march=${CPU_ARCH}" ;;
      -D__AVX512__) argument=-D__AVX256__ ;;
    esac
  fi
  arguments+=("${argument}")
done
exec g++ "${arguments[@]}"
