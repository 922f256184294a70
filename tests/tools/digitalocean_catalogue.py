"""What the DigitalOcean of the tests sells: sizes, regions, images; and the account's keys."""


def _size(slug, price, regions, gpus=0, model="", scratch=0, **others):
    size = {
        "slug": slug,
        "memory": 245760 if gpus else 8192,
        "vcpus": 20 * gpus or 4,
        "disk": 720,
        "transfer": 15.0,
        "price_monthly": price * 730,
        "price_hourly": price,
        "regions": regions,
        "available": True,
        "description": "GPU" if gpus else "Basic",
        "disk_info": [{"type": "local", "size": {"amount": 720, "unit": "gib"}}],
    }
    if gpus:
        vram = {"amount": 80 * gpus, "unit": "gib"}
        size["gpu_info"] = {"count": gpus, "model": model, "vram": vram}
    if scratch:
        disk = {"type": "scratch", "size": {"amount": scratch, "unit": "tib"}}
        size["disk_info"].append(disk)
    return size | others


SIZES = [
    _size("gpu-one", 3.5, ["nyc2", "tor1"], 1, "nvidia_h100", scratch=5),
    _size("gpu-eight", 24.0, ["tor1", "old1"], 8, "nvidia_h100", scratch=40),
    _size("gpu-gone", 2.0, ["tor1"], 1, "amd_mi300x", available=False),
    _size("cpu-four", 0.06, ["nyc2", "tor1", "ams3"]),
    *(_size(f"cpu-{number}", 0.1 * number, ["ams3"]) for number in range(1, 251)),
]
REGIONS = [
    {
        "slug": slug,
        "name": slug,
        "available": slug != "old1",
        "features": [],
        "sizes": [],
    }
    for slug in ("nyc2", "tor1", "ams3", "old1")
]
IMAGES = [
    {"id": 101, "slug": "gpu-base", "name": "AI", "regions": ["nyc2", "tor1"]},
    {"id": 102, "slug": "debian", "name": "13", "regions": ["ams3", "nyc2", "tor1"]},
    {"id": 103, "slug": None, "name": "own", "regions": ["tor1"]},
]
KEYS = [
    {"id": 11, "name": "laptop", "fingerprint": "aa:bb", "public_key": "ssh-ed25519 A"},
    {"id": 12, "name": "same", "fingerprint": "cc:dd", "public_key": "ssh-ed25519 B"},
    {"id": 13, "name": "same", "fingerprint": "ee:ff", "public_key": "ssh-ed25519 C"},
]
