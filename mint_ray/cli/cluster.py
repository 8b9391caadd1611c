"""The verbs that speak to a cluster."""

from __future__ import annotations

import json
import random
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mint_ray.cli.group import LAYERS, SPEC_VERBS, cli, load_spec, takes_spec
from mint_ray.telemetry import log_to

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from mint_ray.remote.chaos import What


ADDRESS = click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    help="The cluster's dashboard: http://127.0.0.1:8265 (default: RAY_API_SERVER_ADDRESS).",
)


@cli.command()
@takes_spec
@ADDRESS
@click.option("--verb", type=click.Choice(SPEC_VERBS), default="run", help="What to run there (default: run).")
@click.option("--follow", is_flag=True, help="Print what the job says until it ends, and exit with its code.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent, and send nothing.")
@click.option("--again", is_flag=True, help="Run it again although it has succeeded there.")
@click.option("--shared-disk", is_flag=True, help="Every machine of the cluster sees the disks of this one.")
@click.option("--requirements", type=click.Path(path_type=Path), help="Packages that the cluster's image lacks.")
def submit(
    address: str,
    verb: str,
    follow: bool,
    dry_run: bool,
    again: bool,
    shared_disk: bool,
    requirements: Path | None,
    **given: Any,
) -> None:
    """Run SPEC on a cluster. The same spec twice is one job; one that failed or was stopped is sent again."""
    from mint_ray.config.specs import config_class

    config = load_spec(**given, cls=config_class(verb))
    log_to(None)

    from mint_ray.remote import jobs, package

    packed = package.pack(config, verb, shared_disk=shared_disk, requirements=requirements)
    if dry_run:
        click.echo(f"job: {jobs.name_job(packed)}\ncommand: {packed.entrypoint}\nroot: {packed.root}")
        click.echo(f"runtime_env: {json.dumps(jobs.runtime_env(packed))}")
        for name, content in packed.files.items():
            click.echo(f"file: {name}, {len(content):,} bytes")
        return
    client = jobs.connect(address)
    sent = jobs.submit(client, packed, again=again)
    click.echo(f"job: {sent.job_id}{'' if sent.new else ' (on the cluster already)'}")
    if not sent.same_resources:
        click.echo(f"it asks for other resources than this spec: mint-ray stop {sent.job_id} first to change them")
    if follow:
        _follow(client, sent.job_id)
    elif not sent.new:
        _show_job(client, sent.job_id)


@cli.command()
@ADDRESS
@click.argument("job_id", required=False)
def status(address: str, job_id: str | None) -> None:
    """Say how JOB_ID stands and where its artifacts lie; without it, how every job of the cluster does."""
    from mint_ray.remote import jobs

    client = jobs.connect(address)
    if job_id is not None:
        _show_job(client, job_id)
        return
    for job in jobs.list_jobs(client):
        click.echo(jobs.describe(job))


@cli.command()
@ADDRESS
@click.option("--follow", is_flag=True, help="Go on until the job ends, and exit with its code.")
@click.argument("job_id")
def logs(address: str, job_id: str, follow: bool) -> None:
    """Print what JOB_ID has said."""
    log_to(None)

    from mint_ray.remote import jobs

    client = jobs.connect(address)
    if follow:
        _follow(client, job_id)
    else:
        click.echo(jobs.read_logs(client, job_id), nl=False)


@cli.command()
@ADDRESS
@click.argument("job_id")
def stop(address: str, job_id: str) -> None:
    """End JOB_ID. Submitting its spec again goes on from what it has finished."""
    from mint_ray.remote import jobs

    click.echo(jobs.describe(jobs.stop(jobs.connect(address), job_id)))


@cli.command()
@ADDRESS
@click.option("--root", help="Look at this place instead of the spec's root.")
@click.option("--with", "layers", multiple=True, metavar="FILE", type=click.Path(path_type=Path), help=LAYERS)
@click.argument("spec", required=False, type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[a.b=c ...]")
def doctor(address: str, spec: Path | None, **given: Any) -> None:
    """Look for what is wrong with a cluster, and with what SPEC needs of it; exit code 1 if anything is."""
    config = load_spec(spec, **given) if spec else None

    from mint_ray.remote.doctor import examine

    bad = False
    for finding in examine(address, config):
        click.echo(str(finding))
        bad = bad or finding.state == "bad"
    sys.exit(int(bad))


@cli.command()
@ADDRESS
@click.argument("what", type=click.Choice(["kill-worker", "kill-node", "cut-storage"]))
@click.option("--seed", type=int, help="Draw what is hit with this seed (default: a new one, which is printed).")
@click.option("--root", help="Of cut-storage: the place in storage that cannot be reached: s3://... or gs://...")
@click.option("--seconds", type=click.IntRange(1, 600), default=20, help="Of cut-storage: for how long (default: 20).")
@click.option("--dry-run", is_flag=True, help="Name what would be hit, and hit nothing.")
def chaos(address: str, what: What, seed: int | None, root: str | None, seconds: int, dry_run: bool) -> None:
    """Hit a test cluster, to see that runs recover: kill a worker process of a running job, a machine, or cut a
    machine's storage off for a while.

    Only machines started with --labels=mint-ray-chaos=1 are ever hit, and the head is never killed.
    """
    from mint_ray.remote import jobs
    from mint_ray.remote.chaos import aim, check_root, strike

    if what == "cut-storage":
        root = check_root(root)
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    client = jobs.connect(address)
    target = aim(client, what, random.Random(seed))
    click.echo(f"seed: {seed}\n{what}: {target}")
    if dry_run and what != "cut-storage":
        return
    told = strike(client, what, target, root=root or "", seconds=seconds, dry_run=dry_run)
    if what == "kill-worker":
        click.echo("killed")
    elif what == "kill-node":
        click.echo(f"killed; the cluster missed it after {told['missed_after']:g} s")
    else:
        click.echo(f"{'would cut' if dry_run else 'cut'} {', '.join(told['addresses'])} for {seconds} s")


def _follow(client: JobSubmissionClient, job_id: str) -> None:
    from mint_ray.remote import jobs

    try:
        jobs.follow(client, job_id, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        click.echo(f"\n{job_id} goes on: mint-ray logs --follow {job_id}", err=True)
        raise
    sys.exit(_show_job(client, job_id))


def _show_job(client: JobSubmissionClient, job_id: str) -> int:
    """Print how a job stands and what it made; its exit code."""
    from mint_ray.remote import jobs

    job = jobs.find(client, job_id)
    click.echo(jobs.describe(job))
    outcome = jobs.read_outcome(jobs.read_logs(client, job_id)) if job.status.is_terminal() else {}
    for stage, uri in outcome.get("artifacts", {}).items():
        click.echo(f"{stage}: {uri}")
    return jobs.exit_code(job) if job.status.is_terminal() else 0
