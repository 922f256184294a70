"""ten-dist droplets, through PyDo, against a server that behaves as the API does."""

import logging
import subprocess
import sys
import time

import pytest

from launch.hosts import Host, read_hostfile
from ten_dist.cli import main
from tests.tools.digitalocean import TOKEN, Refusal
from tests.tools.droplet_commands import interrupt
from tests.tools.launching import ROOT


def names(api):
    return sorted(droplet["name"] for droplet in api.droplets.values())


def creations(api):
    return [
        body
        for method, path, body in api.requests
        if method == "POST" and path == "/v2/droplets"
    ]


def test_a_run_from_its_plan_to_its_end(droplets, tmp_path):
    api = droplets.api
    out, _ = droplets(
        "plan",
        *("--size", "gpu-eight", "--region", "tor1"),
        *("--count", 4, "--max_hours", 10),
    )
    assert "4 x gpu-eight in tor1: $96.00 an hour, $960.00 for --max_hours 10" in out
    # What the plan says is what `up` allows.
    out, _ = droplets.up("first", 4, "--max_dollars", 960)
    assert "4 of 4 droplets run" in out
    listed = droplets.status("--run", "first")
    assert [droplet["name"] for droplet in listed] == [
        f"ten-dist-first-{number}" for number in range(4)
    ]
    assert {(d["size"], d["gpus"], d["hourly_price"]) for d in listed} == {
        ("gpu-eight", 8, 24.0)
    }
    hostfile = tmp_path / "hostfile"
    droplets("hostfile", "--run", "first", "--output", hostfile)
    assert read_hostfile(hostfile) == [Host(d["private"], 8) for d in listed]
    api.advance(hours=2.5)
    assert sum(d["cost"] for d in droplets.status()) == pytest.approx(240, rel=0.01)
    out, _ = droplets("status")
    assert "4 droplets, $96.00 an hour, $240." in out and "7.5 h" in out
    droplets.down("first")
    assert not api.droplets and not api.firewalls
    assert droplets.status() == []


def test_the_plan_is_what_the_api_has_at_the_moment(droplets):
    out, _ = droplets("plan", "--count", 2, "--max_hours", 100)
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert list(rows) == ["gpu-gone", "gpu-one", "gpu-eight"]
    assert (
        "8 x nvidia_h100 640 GiB" in rows["gpu-eight"] and "40 TiB" in rows["gpu-eight"]
    )
    assert rows["gpu-eight"].split()[-4:] == ["24.00", "48.00", "4,800.00", "tor1"]
    assert rows["gpu-gone"].endswith("nowhere now")
    droplets.api.sizes[1]["price_hourly"] = 31.0
    out, _ = droplets("plan", "--region", "nyc2")
    assert [line.split()[0] for line in out.splitlines()] == ["size", "gpu-one"]
    out, _ = droplets("plan", "--all_sizes")
    assert len(out.splitlines()) == 1 + len(droplets.api.sizes)
    assert "31.00" in out
    assert droplets.api.changes() == []


def test_a_run_is_planned_with_the_price_of_the_moment(droplets):
    plan = ["plan", "--config", "nano", "--nodes", "2", "--tokens", "1e9"]
    assert main([*plan, "--size", "gpu-eight"]) == 0
    out = droplets.show().out
    assert "gpu-eight: 8 x nvidia_h100 640 GiB, $24.00 an hour now, in tor1" in out
    assert "dollars at 3 a GPU and hour" in out
    for words, message in (
        (["--size", "gpu-two"], "--size gpu-two is unknown to the API"),
        (["--size", "gpu-eight", "--gpus_per_node", "4"], "leave one out"),
    ):
        assert main([*plan, *words]) == 2
        assert message in droplets.show().err


def test_droplets_are_created_behind_a_firewall_with_all_that_finds_them(droplets):
    api = droplets.api
    droplets.up("first", 2, "--max_dollars", 500.25)
    (body,) = creations(api)
    assert body["names"] == ["ten-dist-first-0", "ten-dist-first-1"]
    expiry = next(tag for tag in body["tags"] if tag.startswith("ten-dist-expires-"))
    left = int(expiry.rpartition("-")[2]) - api.now()
    assert 10 * 3600 - 30 < left <= 10 * 3600 + 1
    assert {"ten-dist", "ten-dist-run-first", "ten-dist-budget-50025"} < {*body["tags"]}
    assert api.vpcs[body["vpc_uuid"]]["region"] == "tor1"
    assert body["ssh_keys"] == [11] and body["image"] == "gpu-base"
    changes = api.changes()
    assert changes.index(("POST", "/v2/firewalls")) < changes.index(
        ("POST", "/v2/droplets")
    )
    (firewall,) = api.firewalls.values()
    assert firewall["tags"] == ["ten-dist-run-first"]
    ssh, *inside = firewall["inbound_rules"]
    assert (ssh["protocol"], ssh["ports"]) == ("tcp", "22")
    assert ssh["sources"] == {"addresses": ["198.51.100.7", "2001:db8::/32"]}
    assert [rule["protocol"] for rule in inside] == ["tcp", "udp", "icmp"]
    assert all(r["sources"] == {"tags": ["ten-dist-run-first"]} for r in inside)
    # Another place to log in from, later.
    droplets.up("first", 2, "--ssh_from", "192.0.2.1")
    (firewall,) = api.firewalls.values()
    assert firewall["inbound_rules"][0]["sources"] == {"addresses": ["192.0.2.1"]}


def test_many_droplets_are_created_ten_at_a_time_and_listed_by_pages(droplets):
    api = droplets.api
    droplets.up("many", 23)
    assert [len(body["names"]) for body in creations(api)] == [10, 10, 3]
    listed = [droplet["name"] for droplet in droplets.status()]
    assert listed == [f"ten-dist-many-{number}" for number in range(23)]
    # More than a page of other people's droplets is no hindrance.
    mine = dict(api.droplets)
    for number in range(100_000, 100_450):
        copy = {"id": number, "name": f"web-{number}", "tags": ["web"]}
        api.droplets[number] = next(iter(mine.values())) | copy
    assert len(droplets.status()) == 23
    droplets.down("many")
    assert len(api.droplets) == 450


def test_a_dry_run_shows_every_call_and_makes_none(droplets):
    api = droplets.api
    out, _ = droplets.up("first", 12, "--dry_run")
    assert api.changes() == []
    shown = [line.split()[1:3] for line in out.splitlines() if line.startswith("would")]
    droplets.up("first", 12)
    assert shown == [list(change) for change in api.changes()]
    assert '"names": ["ten-dist-first-10", "ten-dist-first-11"]' in out
    assert "ten-dist-expires-" in out and "git clone" in out
    made = len(api.changes())
    out, _ = droplets.down("first", "--dry_run")
    assert out.count("would DELETE /v2/droplets/") == 12
    api.advance(hours=11)
    out, _ = droplets.reap("--dry_run")
    assert out.count("would DELETE /v2/droplets/") == 12
    assert len(api.changes()) == made and len(api.droplets) == 12


def test_one_of_four_fails_and_the_same_command_resumes(droplets, tmp_path):
    api = droplets.api
    api.fail("POST", "/droplets", "errored")
    _, errors = droplets.up("first", 4, status=1)
    assert "run first has 3 of 4 droplets: ten-dist-first-3 could not be" in errors[-1]
    assert "billed until it is destroyed" in errors[0]
    _, errors = droplets(
        "hostfile", "--run", "first", "--output", tmp_path / "hostfile", status=1
    )
    assert "ten-dist-first-3" in errors[0] and not (tmp_path / "hostfile").exists()
    kept = {d["id"] for d in api.droplets.values() if d["status"] == "active"}
    broken = {*api.droplets} - kept
    expiry = {droplet["expires"] for droplet in droplets.status()}
    api.advance(hours=1)
    out, _ = droplets.up("first", 4)
    assert "1 to create and 3 there" in out
    assert len(api.droplets) == 4 and kept < {*api.droplets}
    assert not broken & {*api.droplets}
    # The limits are those of the first call.
    assert {droplet["expires"] for droplet in droplets.status()} == expiry


def test_what_is_refused_half_way_is_tracked_and_resumed(droplets):
    api = droplets.api
    api.extra_limit = 10
    _, errors = droplets.up("first", 12, status=1)
    assert "this will exceed your droplet limit" in errors[-1]
    assert len(droplets.status("--run", "first")) == 10
    api.extra_limit = None
    droplets.up("first", 12)
    assert len(names(api)) == len(set(names(api))) == 12


@pytest.mark.parametrize("fault", ["lost", "lost 500", "garbled", "half", "drop"])
def test_a_creation_whose_answer_is_lost_is_found_again(droplets, fault):
    api = droplets.api
    api.fail("POST", "/droplets", fault)
    _, errors = droplets.up("first", 4)
    assert "trying again in" in errors[0]
    assert names(api) == [f"ten-dist-first-{number}" for number in range(4)]
    api.fail("POST", "/vpcs", fault if fault != "half" else 503)
    api.fail("POST", "/firewalls", fault if fault != "half" else 503)
    droplets.up("second", 1)
    assert len(api.vpcs) == 2 and len(api.firewalls) == 2


def test_a_droplet_that_is_created_after_all_is_seen_and_can_be_ended(droplets):
    api = droplets.api
    api.fail("POST", "/droplets", "late")
    api.provisioning = 20
    _, errors = droplets.up("first", 1, status=1)
    assert "ten-dist-first-0 is there 2 times, all billed" in errors[-1]
    twins = [droplet["id"] for droplet in droplets.status()]
    droplets.down("first", "--droplet", twins[1])
    droplets.up("first", 1)
    assert list(api.droplets) == twins[:1]
    error = droplets.refusal("down", "--run", "first", "--droplet", 7)
    assert f"--droplet 7 is none of run first, which has {twins[0]}" in error


def test_tags_that_come_late_are_seen_to(droplets):
    api = droplets.api
    api.tag_delay = 10_000
    droplets.up("first", 2)
    assert all("ten-dist-run-first" in d["tags"] for d in api.droplets.values())
    assert all(droplet["expires"] for droplet in droplets.status())


def test_slow_provisioning_is_waited_for_and_given_up(droplets):
    api = droplets.api
    api.provisioning = 40
    out, _ = droplets.up("first", 2)
    assert "0 of 2 droplets run\n2 of 2 droplets run\n" in out
    api.provisioning = 10**9
    _, errors = droplets.up("first", 3, "--wait_minutes", 0.002, status=1)
    assert "ten-dist-first-2 are not there after --wait_minutes 0.002" in errors[-1]
    api.provisioning = 2
    droplets.up("first", 3)


def test_what_has_expired_is_reaped_and_nothing_else(droplets):
    api = droplets.api
    droplets.up("early", 2)
    # Whether a tag that is there is made again or refused is all the same.
    api.fail("POST", "/tags", 422)
    api.advance(hours=4)
    droplets.up("later", 1)
    foreign = next(iter(api.droplets.values())) | {"id": 1, "tags": ["web"]}
    api.droplets[1] = foreign
    out, _ = droplets.reap()
    assert "nothing has expired" in out and len(api.droplets) == 4
    api.advance(hours=6.5)
    assert "overdue" in droplets("status")[0]
    droplets.reap("--run", "later")
    assert len(api.droplets) == 4
    out, _ = droplets.reap()
    assert "ten-dist-early-0" in out and "expired 0.5 hours ago" in out
    assert names(api) == ["ten-dist-early-0", "ten-dist-later-0"]
    assert 1 in api.droplets


def test_a_run_that_has_expired_is_not_added_to(droplets):
    droplets.up("first", 1)
    droplets.api.advance(hours=11)
    error = droplets.refusal("up", "--run", "first", "--count", 2, *droplets.UP)
    assert "run first has expired" in error


def test_a_run_without_droplets_has_no_hosts(droplets, tmp_path):
    path = tmp_path / "hostfile"
    for words in (("setup",), ("hostfile", "--output", path)):
        error = droplets.refusal(*words, "--run", "none")
        assert "--run none has no droplets" in error
    droplets.up("first", 1)
    error = droplets.refusal(
        "hostfile", "--run", "first", "--output", tmp_path / "nowhere" / "hostfile"
    )
    assert "cannot be written: No such file" in error


def test_reaping_goes_on_through_failures_until_it_is_stopped(droplets):
    api = droplets.api
    droplets.up("first", 1)
    api.advance(hours=11)
    api.fail("GET", "/droplets", 404)
    api.fail("GET", "/droplets", interrupt, skip=8)
    out, errors = droplets.reap("--every", 0.0001, status=130)
    assert "status 404" in errors[0] and "nothing has expired" in out
    assert not api.droplets


def test_a_supervisor_reaps_beside_its_job(droplets, tmp_path):
    api = droplets.api
    droplets.up("first", 1)
    api.advance(hours=11)
    reaped = tmp_path / "reaped"
    # The first time fails, and the next does not.
    api.fail("GET", "/droplets", 404)
    api.fail("DELETE", "/droplets/[0-9]+", reaped.touch)
    run = tmp_path / "run"
    script = (
        "import os, sys, time\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.05)\n"
        "os.makedirs(sys.argv[3], exist_ok=True)\n"
        "open(os.path.join(sys.argv[3], 'COMPLETED'), 'w').write('{}')"
    )
    job = [sys.executable, "-c", script, str(reaped), "--output_dir", str(run)]
    assert main(["supervise", "--reap_droplets", "0.001", "--", *job]) == 0
    assert not api.droplets
    assert (
        "reaping droplets failed: GET /v2/droplets: status 404" in droplets.show().err
    )


def test_a_supervisor_that_could_not_reap_does_not_start(
    droplets, monkeypatch, tmp_path
):
    monkeypatch.delenv("DIGITALOCEAN_TOKEN")
    job = ["true", "--output_dir", str(tmp_path / "run")]
    assert main(["supervise", "--reap_droplets", "5", "--", *job]) == 2
    assert "there is no token" in droplets.show().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_cost_its_budget_is_reaped(droplets):
    api = droplets.api
    droplets.up("dear", 2, "--max_dollars", 480)
    api.advance(hours=9)
    droplets.reap()
    assert len(api.droplets) == 2
    # The API's word counts, also when it has become dearer.
    for droplet in api.droplets.values():
        droplet["size"]["price_hourly"] = 30.0
    # What is destroyed first does not make the rest cheap enough to stay.
    api.fail("DELETE", "/droplets/[0-9]+", 422)
    out, _ = droplets.reap()
    assert "run dear has cost $540." in out and not api.droplets


def test_a_droplet_without_an_expiry_is_named(droplets):
    api = droplets.api
    droplets.up("first", 2)
    kept = next(iter(api.droplets))
    api.droplets[kept]["tags"] = ["ten-dist-run-first"]
    api.advance(hours=11)
    _, errors = droplets.reap()
    assert len(errors) == 1
    assert f"ten-dist-first-0 ({kept}) has lost its expiry: it is" in errors[0]
    assert list(api.droplets) == [kept]
    assert "never" in droplets("status")[0]


def test_what_costs_too_much_is_not_created(droplets):
    error = droplets.refusal(
        "up", "--run", "a", "--count", 4, *droplets.UP, "--max_dollars", 959
    )
    assert "would cost $960.00" in error and "--max_dollars 959" in error
    droplets.up("a", 3, "--max_dollars", 800)
    # The budget of the run counts, whatever is said later.
    error = droplets.refusal(
        "up", "--run", "a", "--count", 4, *droplets.UP, "--max_dollars", 2000
    )
    assert "--max_dollars 800" in error


def test_an_interrupted_end_is_continued(droplets):
    api = droplets.api
    droplets.up("first", 4)
    api.fail("DELETE", "/droplets/[0-9]+", interrupt, skip=1)
    _, errors = droplets.down("first", status=130)
    assert "the same command again continues" in errors[-1]
    assert 0 < len(api.droplets) <= 3
    droplets.down("first")
    assert not api.droplets


def test_what_is_listed_late_is_waited_for_and_destroyed(droplets):
    api = droplets.api
    api.hidden = 3
    droplets.up("first", 2)
    assert len(api.droplets) == 2
    api.fail("POST", "/droplets", interrupt)
    api.hidden = 2
    _, errors = droplets.up("second", 2, status=130)
    assert "ten-dist droplets down --run second" in errors[0]
    assert len(api.droplets) == 4
    droplets.down("second")
    assert names(api) == ["ten-dist-first-0", "ten-dist-first-1"]


def test_survivors_are_reported(droplets):
    api = droplets.api
    droplets.up("first", 3)
    stubborn = list(api.droplets)[1]
    api.fail("DELETE", f"/droplets/{stubborn}", Refusal(422, "a pending event"), 10**9)
    _, errors = droplets.down("first", "--wait_minutes", 0.001, status=1)
    assert f"still there and billed: ten-dist-first-1 ({stubborn})" in errors[-1]
    assert list(api.droplets) == [stubborn] and api.firewalls
    api.advance(hours=11)
    _, errors = droplets.reap("--wait_minutes", 0.001, status=1)
    assert f"still there and billed: ten-dist-first-1 ({stubborn})" in errors[-1]
    api.heal()
    # One that takes its time to go is waited for.
    api.dying = 30
    droplets.down("first")
    assert not api.droplets and not api.firewalls


def test_droplets_without_the_tag_are_left_alone(droplets):
    api = droplets.api
    droplets.up("first", 2)
    kept = next(iter(api.droplets))
    api.droplets[kept]["tags"] = []
    _, errors = droplets.down("first")
    assert f"ten-dist-first-0 ({kept}) has a name of run first but not" in errors[0]
    assert list(api.droplets) == [kept]
    assert droplets.status() == []


def test_rate_limits_and_outages_are_ridden_out(droplets):
    api = droplets.api
    limited = Refusal(429, "API rate limit exceeded", {"Retry-After": "1"})
    api.fail("POST", "/droplets", limited)
    api.fail("GET", "/sizes", 503, times=3)
    api.fail("GET", "/droplets", "drop", times=2)
    api.fail("GET", "/regions", "garbled")
    began = time.monotonic()
    _, errors = droplets.up("first", 2)
    assert time.monotonic() - began >= 1
    assert any("API rate limit exceeded" in e and "in 1.0 s" in e for e in errors)
    assert sum("GET /v2/sizes: status 503" in error for error in errors) == 3
    assert any("no answer (" in error for error in errors)
    # It was refused, so it could be asked for again at once.
    assert len(creations(api)) == 2 and len(api.droplets) == 2
    api.fail("GET", "/droplets", 500, times=10**9)
    _, errors = droplets("status", status=1)
    assert len(errors) == 6 and "attempt 5 of 6" in errors[4]
    api.heal()
    hours = Refusal(429, "too many", {"ratelimit-reset": str(int(api.now()) + 3000)})
    api.fail("GET", "/droplets", hours, times=2)
    _, errors = droplets("status", status=1)
    assert len(errors) == 1 and "too many" in errors[0]
    api.heal()
    api.fail("POST", "/droplets", Refusal(503, "later", {"Retry-After": "3000"}))
    _, errors = droplets.up("first", 3, status=1)
    assert "later" in errors[-1] and len(api.droplets) == 2


def test_what_the_api_does_not_have_is_named(droplets):
    def refused(option, value):
        words = list(droplets.UP)
        words[words.index(option) + 1] = value
        return droplets.refusal("up", "--run", "first", *words)

    assert refused("--size", "gpu-nine").endswith(
        "--size gpu-nine is unknown to the API; those with GPUs are gpu-gone, gpu-one, "
        "gpu-eight"
    )
    assert "--region moon is unknown to the API; there are ams3, nyc2, tor1" in refused(
        "--region", "moon"
    )
    assert "--region old1 is closed" in refused("--region", "old1")
    error = refused("--region", "nyc2")
    assert "gpu-eight is not available in --region nyc2, but in tor1" in error
    assert "nyc2 has gpu-one" in error
    error = refused("--size", "gpu-gone")
    assert "no region at the moment" in error
    error = refused("--ssh_key", "desktop")
    assert "--ssh_key desktop is unknown to the account; it has laptop (11)" in error
    assert "--ssh_key same is that of several" in refused("--ssh_key", "same")
    error = refused("--image", "gpu-bass")
    assert "--image gpu-bass is unknown" in error and "debian, gpu-base" in error
    words = ["--size", "gpu-one", "--region", "nyc2", "--image", "103"]
    error = droplets.refusal("up", "--run", "first", *droplets.UP, *words)
    assert "--image 103 is not in --region nyc2, but in tor1" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--count", 0), "--count must be from 1 to 100,000, not 0"),
        (("--run", "Not_a_name"), "--run Not_a_name: a run's name has"),
        (("--max_hours", 0), "--max_hours must be more than 0"),
        (("--max_dollars", "0"), "--max_dollars must be more than 0"),
        (("--ssh_from", "home"), "--ssh_from home is neither"),
        (("--image", ""), "--image is empty"),
        (
            ("--repository", "https://me:pass@git.example/x"),
            "--repository must not hold",
        ),
        (("--pip_index", "https://me@pip.example"), "--pip_index must not hold"),
        (("--repository", "--upload-pack=x"), "--repository --upload-pack=x is not"),
        (("--commit", "-x"), "--commit '-x' is not"),
        (("--endpoint", "http://api.example"), "--endpoint must be a URL"),
        (("--endpoint", "nonsense"), "--endpoint must be a URL"),
        (("--attempts", 0), "--attempts must be 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(droplets, words, message):
    words = [f"{words[0]}={words[1]}"]
    assert message in droplets.refusal("up", "--run=first", *droplets.UP, *words)
    assert droplets.api.requests == []


def test_another_size_or_region_is_no_part_of_the_same_run(droplets):
    droplets.up("first", 1)
    error = droplets.refusal(
        "up", "--run", "first", *droplets.UP, "--size", "gpu-one", "--region", "nyc2"
    )
    assert "run first has ten-dist-first-0 of size gpu-eight in tor1" in error


def test_what_is_sold_out_can_still_be_waited_for(droplets):
    api = droplets.api
    droplets.up("first", 1)
    api.sizes[1]["available"] = False
    droplets.up("first", 1)
    error = droplets.refusal("up", "--run", "first", "--count", 2, *droplets.UP)
    assert "gpu-eight is not available" in error


def test_no_token_and_a_wrong_one_are_refused_in_one_line(droplets, monkeypatch):
    monkeypatch.delenv("DIGITALOCEAN_TOKEN")
    assert "there is no token: set DIGITALOCEAN_TOKEN" in droplets.refusal("plan")
    monkeypatch.setenv("DIGITALOCEAN_ACCESS_TOKEN", TOKEN + "x")
    error = droplets.refusal("plan")
    assert "the API refuses the token (Unable to authenticate you)" in error
    assert TOKEN not in error
    for broken in (TOKEN + "\n", f"Bearer {TOKEN}", TOKEN + "\N{BULLET}"):
        monkeypatch.setenv("DIGITALOCEAN_TOKEN", broken)
        assert "DIGITALOCEAN_TOKEN holds spaces" in droplets.refusal("status")


def test_not_even_an_api_that_repeats_the_token_has_it_shown(droplets):
    droplets.api.fail("GET", "/sizes", Refusal(400, f"bad token {TOKEN}"), times=2)
    _, errors = droplets("plan", status=1)
    assert "bad token ..." in errors[0]


def test_the_token_is_in_no_debug_log(droplets, caplog):
    with caplog.at_level(logging.DEBUG):
        droplets.up("first", 1)
        droplets.api.fail("GET", "/droplets", "drop", times=2)
        droplets("status")
    assert "/v2/droplets" in caplog.text
    assert TOKEN not in caplog.text


def test_the_console_script_ends_as_the_command_does(droplets, monkeypatch):
    monkeypatch.setenv("DIGITALOCEAN_TOKEN", TOKEN + "x")
    command = [sys.executable, "-m", "ten_dist.cli", "droplets", "status"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("ten-dist: the API refuses the token")
    assert len(done.stderr.splitlines()) == 1 and TOKEN not in done.stderr
