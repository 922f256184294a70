"""No billed droplet is ever untracked, whatever fails and whenever a command is cut off."""

import random

import pytest

from tests.tools.digitalocean import DigitalOcean, Refusal
from tests.tools.droplet_commands import interrupt

SEQUENCES = 200
RUNS = ("one", "two")
REQUESTS = [
    ("POST", "/droplets"),
    ("POST", "/droplets"),
    ("GET", "/droplets"),
    ("GET", "/droplets"),
    ("DELETE", "/droplets/[0-9]+"),
    ("DELETE", "/droplets/[0-9]+"),
    ("POST", "/tags"),
    ("POST", "/vpcs"),
    ("POST", "/firewalls"),
    ("DELETE", "/firewalls/.*"),
    ("GET", "/actions"),
    ("GET", "/sizes"),
]


def draw_fault(draw, request):
    faults = [500, 503, 422, 403, "drop", "garbled", "lost", "lost 500", interrupt]
    faults.append(Refusal(429, "too many requests", {"Retry-After": "0"}))
    if request[0] == "POST":
        faults += ["late", "late"]
    if request == ("POST", "/droplets"):
        faults += ["half", "half", "errored", "errored"]
    return draw.choice(faults)


def tags_of(droplet):
    return droplet["tags"] + droplet.get("coming_tags", [])


def check_all_is_tracked(droplets):
    """Every droplet has its run and expiry, and `status` shows it."""
    api = droplets.api
    for droplet in api.droplets.values():
        run = droplet["name"].split("-")[2]
        assert f"ten-dist-run-{run}" in tags_of(droplet)
        assert any(tag.startswith("ten-dist-expires-") for tag in tags_of(droplet))
    # Those that are going already are billed no more, and those without their tags are
    # shown by the name of the run.
    billed = [d for d in api.droplets.values() if d["dying_at"] is None]
    runs = [()] if all(d["tags"] for d in billed) else [("--run", run) for run in RUNS]
    faults, api.faults = api.faults, []
    shown = {d["id"] for words in runs for d in droplets.status(*words)}
    assert {d["id"] for d in billed} <= shown
    api.faults = faults


def run_a_command(droplets, draw, must_create):
    """A random command among random faults; what it promises holds if it succeeds."""
    api = droplets.api
    for _ in range(draw.randint(0, 2)):
        request = draw.choice(REQUESTS)
        times, skip = draw.choice((1, 1, 2, 9)), draw.choice((0, 0, 1, 3))
        api.fail(*request, draw_fault(draw, request), times, skip)
    run, count = draw.choice(RUNS), draw.randint(1, 4)
    action = draw.choice(("up", "up", "down", "reap", "wait"))
    action = "up" if must_create else action
    if action == "wait":
        api.advance(draw.choice((0.5, 6)))
        return
    words = {
        "up": ("--run", run, "--count", count, *droplets.UP),
        "down": ("--run", run),
        "reap": (),
    }[action]
    few = ("--attempts", 3, "--wait_minutes", 0.0002, "--poll_interval", 0.003)
    status = droplets.run(action, *words, *few)
    assert status in (0, 1, 2, 130)
    if status != 0 or api.late or api.tag_delay:
        return
    there = [d for d in api.droplets.values() if f"ten-dist-run-{run}" in d["tags"]]
    if action == "down":
        assert not there
    elif action == "up":
        names = [d["name"] for d in there if d["status"] == "active"]
        wanted = {f"ten-dist-{run}-{number}" for number in range(count)}
        assert wanted <= set(names) and len(names) == len(set(names))
    else:
        now = api.now()
        for droplet in api.droplets.values():
            tags = [t for t in droplet["tags"] if t.startswith("ten-dist-expires-")]
            assert min(int(tag.rpartition("-")[2]) for tag in tags) > now


@pytest.mark.slow
def test_no_droplet_is_untracked_after_any_faults(droplets):
    counts = {"created": 0, "left": 0}
    for seed in range(SEQUENCES):
        draw = random.Random(seed)
        with DigitalOcean() as api:
            droplets.use(api)
            # A single page of them, as each costs time here.
            del api.sizes[4:]
            api.provisioning = draw.choice((0, 1, 5))
            api.dying = draw.choice((0, 2))
            api.tag_delay = draw.choice((0, 0, 0, 4))
            try:
                for step in range(draw.randint(1, 3)):
                    run_a_command(droplets, draw, must_create=step == 0)
                    check_all_is_tracked(droplets)
                late = bool(api.late)
                api.heal()
                if late:
                    check_all_is_tracked(droplets)
                counts["left"] += len(api.droplets)
                counts["created"] += len(api.actions)
                if draw.random() < 0.5:
                    for run in RUNS:
                        droplets.down(run)
                    assert not api.firewalls
                else:
                    api.advance(hours=11)
                    droplets.reap()
                assert not api.droplets
            except BaseException:
                print(f"sequence {seed}:", *api.requests, sep="\n")
                raise
    # The sequences do come to something.
    assert counts["left"] > SEQUENCES / 2 and counts["created"] > counts["left"]
