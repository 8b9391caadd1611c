"""Commands for clusters: jobs, diagnosis, fault injection."""

from __future__ import annotations

import json
import random
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mint_ray.cli.group import LAYERS, SPEC_VERBS, load_spec, takes_spec
from mint_ray.telemetry import configure_logging

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from mint_ray.remote.chaos import Fault


ADDRESS = click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    required=True,
    help="Address of the cluster's dashboard, such as http://127.0.0.1:8265 (default: RAY_API_SERVER_ADDRESS).",
)


@click.command()
@takes_spec
@ADDRESS
@click.option("--verb", type=click.Choice(SPEC_VERBS), default="run", help="Command to run (default: run).")
@click.option("--follow", is_flag=True, help="Print the job's output until it ends, and exit with its exit code.")
@click.option("--dry-run", is_flag=True, help="Print the job package and submit nothing.")
@click.option("--again", is_flag=True, help="Run the job again even if it has succeeded.")
@click.option("--shared-disk", is_flag=True, help="Every node of the cluster mounts this machine's disks.")
@click.option(
    "--requirements",
    type=click.Path(path_type=Path),
    help="pip requirements missing from the cluster's image.",
)
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
    """Run SPEC as a job on a cluster.

    Submitting the same spec twice creates one job; a failed or stopped job is submitted again.
    """
    from mint_ray.config.specs import config_class

    config = load_spec(**given, cls=config_class(verb))
    configure_logging(None)

    from mint_ray.remote import jobs
    from mint_ray.remote.package import build_package

    package = build_package(config, verb, shared_disk=shared_disk, requirements=requirements)
    if dry_run:
        click.echo(f"job: {jobs.name_job(package)}\ncommand: {package.entrypoint}\nroot: {package.root}")
        click.echo(f"runtime_env: {json.dumps(jobs.runtime_env(package))}")
        for name, content in package.files.items():
            click.echo(f"file: {name}, {len(content):,} bytes")
        return
    client = jobs.connect(address)
    submission = jobs.submit(client, package, again=again)
    click.echo(f"job: {submission.job_id}{'' if submission.is_new else ' (already on the cluster)'}")
    if not submission.same_resources:
        click.echo(f"its resources differ from this spec's; to change them, first: mint-ray stop {submission.job_id}")
    if follow:
        _follow(client, submission.job_id)
    elif not submission.is_new:
        _print_job(client, submission.job_id)


@click.command()
@ADDRESS
@click.argument("job_id", required=False)
def status(address: str, job_id: str | None) -> None:
    """Print the state of a job, or of all jobs.

    With JOB_ID, prints its artifacts too.
    """
    from mint_ray.remote import jobs

    client = jobs.connect(address)
    if job_id is not None:
        _print_job(client, job_id)
        return
    for job in jobs.list_jobs(client):
        click.echo(jobs.describe(job))


@click.command()
@ADDRESS
@click.option("--follow", is_flag=True, help="Continue until the job ends, and exit with its exit code.")
@click.argument("job_id")
def logs(address: str, job_id: str, follow: bool) -> None:
    """Print the output of a job."""
    configure_logging(None)

    from mint_ray.remote import jobs

    client = jobs.connect(address)
    if follow:
        _follow(client, job_id)
    else:
        click.echo(jobs.read_logs(client, job_id), nl=False)


@click.command()
@ADDRESS
@click.argument("job_id")
def stop(address: str, job_id: str) -> None:
    """Stop a job.

    Submitting the spec of JOB_ID again continues from the completed stages.
    """
    from mint_ray.remote import jobs

    click.echo(jobs.describe(jobs.stop(jobs.connect(address), job_id)))


@click.command()
@ADDRESS
@click.option("--root", help="Root to check instead of the spec's.")
@click.option("--with", "layers", multiple=True, metavar="FILE", type=click.Path(path_type=Path), help=LAYERS)
@click.argument("spec", required=False, type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[a.b=c ...]")
def doctor(address: str, spec: Path | None, **given: Any) -> None:
    """Diagnose a cluster.

    Checks access, versions and clocks; with SPEC also its storage and GPUs. The exit code is 1 if any check fails.
    """
    config = load_spec(spec, **given) if spec else None

    from mint_ray.remote.doctor import diagnose

    failed = False
    for finding in diagnose(address, config):
        click.echo(str(finding))
        failed = failed or finding.status == "fail"
    sys.exit(int(failed))


@click.command()
@ADDRESS
@click.argument("fault", type=click.Choice(["kill-worker", "kill-node", "cut-storage"]))
@click.option("--seed", type=int, help="Seed of the random target (default: a new one, which is printed).")
@click.option("--root", help="For cut-storage: storage to cut off, s3://... or gs://...")
@click.option("--seconds", type=click.IntRange(1, 600), default=20, help="For cut-storage: duration (default: 20).")
@click.option("--dry-run", is_flag=True, help="Print the target and inject nothing.")
def chaos(address: str, fault: Fault, seed: int | None, root: str | None, seconds: int, dry_run: bool) -> None:
    """Inject a fault into a test cluster.

    For verifying that runs recover: kill-worker kills a worker process of a running job, kill-node kills a node,
    cut-storage cuts a node off from its storage for a while. Only nodes started with --labels=mint-ray-chaos=1 are
    targets, and the head is never killed.
    """
    from mint_ray.remote import jobs
    from mint_ray.remote.chaos import check_root, inject_fault, select_target

    if fault == "cut-storage":
        root = check_root(root)
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    client = jobs.connect(address)
    target = select_target(client, fault, random.Random(seed))
    click.echo(f"seed: {seed}\n{fault}: {target}")
    if dry_run and fault != "cut-storage":
        return
    result = inject_fault(client, fault, target, root=root or "", seconds=seconds, dry_run=dry_run)
    if fault == "kill-worker":
        click.echo("killed")
    elif fault == "kill-node":
        click.echo(f"killed; the cluster detected the node failure after {result['detected_after']:g} s")
    else:
        click.echo(f"{'would cut' if dry_run else 'cut'} off {', '.join(result['addresses'])} for {seconds} s")


def _follow(client: JobSubmissionClient, job_id: str) -> None:
    from mint_ray.remote import jobs

    try:
        jobs.follow(client, job_id, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        click.echo(f"\n{job_id} is still running; to follow it again: mint-ray logs --follow {job_id}", err=True)
        raise
    sys.exit(_print_job(client, job_id))


def _print_job(client: JobSubmissionClient, job_id: str) -> int:
    """Print the state of a job and its artifacts, and return its exit code."""
    from mint_ray.remote import jobs

    job = jobs.get_job(client, job_id)
    click.echo(jobs.describe(job))
    outcome = jobs.read_outcome(jobs.read_logs(client, job_id)) if job.status.is_terminal() else {}
    for stage, uri in outcome.get("artifacts", {}).items():
        click.echo(f"{stage}: {uri}")
    return jobs.exit_code(job) if job.status.is_terminal() else 0
