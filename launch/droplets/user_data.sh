# Sets a droplet up at its first start; run again, it does what is not done yet.
# Before this come $repository and $commit.
set -euo pipefail

# cloud-init starts scripts without one.
export HOME=${HOME:-/root}
state=$HOME/.ten-dist
checkout=$HOME/ten_dist
scratch=${SCRATCH:-/scratch}
fstab=${FSTAB:-/etc/fstab}

mkdir -p "$state"
exec > >(tee -a "$state/setup.log") 2>&1

install_packages() {
  export DEBIAN_FRONTEND=noninteractive
  # A fresh machine updates itself at the same time and holds the lock.
  local apt=(apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=5)
  "${apt[@]}" update
  "${apt[@]}" install -y git pdsh g++ python3-venv python3-dev
}

# Disks that hold nothing at all: no partitions, no signature of a file system, of a RAID or
# of anything else that wipefs knows, and not in use. A disk that cannot be read is not one.
empty_disks() {
  local disk type read_only mounted found
  while read -r disk type read_only mounted; do
    [ "$type" = disk ] && [ "$read_only" = 0 ] && [ -z "$mounted" ] || continue
    [ "$(lsblk --noheadings --raw --output NAME "$disk" | wc -l)" -eq 1 ] || continue
    found=$(wipefs --no-act --noheadings "$disk") || continue
    [ -z "$found" ] || continue
    printf '%s\n' "$disk"
  done < <(lsblk --paths --nodeps --noheadings --raw --output NAME,TYPE,RO,MOUNTPOINT)
}

# The first is mounted at /scratch, further ones at /scratch-2 and so on. They are found by
# label, so that a disk which came back empty can be made again.
mount_scratch() {
  local disk number=0 label place
  for disk in $(empty_disks); do
    while :; do
      number=$((number + 1))
      label=ten-scratch-$number
      place=$scratch
      [ "$number" -eq 1 ] || place=$scratch-$number
      [ -n "$(blkid --list-one --output device --match-token "LABEL=$label")" ] || break
    done
    printf 'making a file system on %s for %s\n' "$disk" "$place"
    mkfs.ext4 -q -m 0 -L "$label" "$disk"
    mkdir -p "$place"
    grep -q "^LABEL=$label " "$fstab" ||
      printf 'LABEL=%s %s ext4 defaults,nofail,noatime 0 2\n' "$label" "$place" >>"$fstab"
    mount "$place"
    chmod 1777 "$place"
  done
}

install_environment() {
  [ -d "$checkout/.git" ] || {
    rm -rf "$checkout.part"
    git clone "$repository" "$checkout.part"
    mv "$checkout.part" "$checkout"
  }
  git -C "$checkout" cat-file -e "$commit^{commit}" 2>/dev/null ||
    git -C "$checkout" fetch --tags "$repository"
  git -C "$checkout" checkout --detach "$commit"
  bash "$checkout/launch/environment.sh"
}

install_packages
mount_scratch
install_environment
printf '%s\n' "$commit" >"$state/ready"
