#!/usr/bin/env bash
# Second stage of the Dockerfile: user.sh UID FOLDER... makes folders that the user of the container may write to.
set -euo pipefail
uid="${1:?UID: the number of the user}"
shift
for folder in "$@"; do
  mkdir -p "$folder"
  chown "$uid:$uid" "$folder"
done
