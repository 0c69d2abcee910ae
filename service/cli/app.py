"""The commands of `arrowquant`. Each imports what it needs when it runs: `--help` must not load an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import keys, webhooks
from service.cli.outcome import FAILED, USAGE, Failed, Json, finish, outcome, print_json

if TYPE_CHECKING:
    from service.cli.local import Means
    from service.settings import Settings

app = typer.Typer(
    help="Quantize model weights, and measure what it cost.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(keys.app, name="keys")
app.add_typer(webhooks.app, name="webhooks")

ServerUrl = Annotated[
    str, typer.Option("--server", envvar="ARROWQUANT_SERVER", metavar="URL", help="Address of the service.")
]
RemoteUrl = Annotated[
    str | None, typer.Option("--server", metavar="URL", help="Let the service at this address do it, not this process.")
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="ARROWQUANT_API_KEY", help="Key for the server; as a variable no `ps` shows it."),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads to compute with; not with --server.")]
BlockBytes = Annotated[
    int | None, typer.Option("--block-bytes", min=1 << 16, help="Bytes of a tensor to hold at once; not with --server.")
]
CalibrationPath = Annotated[
    str | None, typer.Option("--calibration", help="What the layers are fed: safetensors, Parquet or imatrix.gguf.")
]
MinAccuracy = Annotated[
    float | None, typer.Option("--min-accuracy", min=0, max=1, help="Cosine similarity, of each tensor and of all.")
]
BackendName = Annotated[str | None, typer.Option("--backend", help="auto, or a backend's name.")]
ProfileName = Annotated[str, typer.Option("--profile", help="Defaults: edge, local or cloud.")]
LOCAL_SERVER = "http://127.0.0.1:8000"


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where jobs and artifacts are kept.")] = None,
    model_root: Annotated[
        list[Path] | None, typer.Option(help="Folder whose models may be read; can be given again.")
    ] = None,
    remote_root: Annotated[
        list[str] | None,
        typer.Option(help="What addresses in stores begin with, such as s3://models/ or hf://; can be given again."),
    ] = None,
) -> None:
    """Start the HTTP service. What is not given comes from ARROWQUANT_… variables, see `service/settings.py`."""
    with outcome(as_json=False):
        from service.api.server import serve as run

        roots = tuple(root.resolve() for root in model_root) if model_root else None
        run(_settings(host=host, port=port, data_dir=data_dir, model_roots=roots, remote_roots=remote_root or None))


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="Model folder, safetensors file or index; with --server also a URI.")],
    out: Annotated[Path, typer.Option(help="Folder to make; each format gets a folder of its own in it.")],
    bits: Annotated[
        str | None, typer.Option(help="Bits per weight: 2, 3, 4, 5, 6 or 8; or auto, with one of the targets.")
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="With --bits auto: bits per weight on average, scales and all counted.")
    ] = None,
    target_size: Annotated[int | None, typer.Option(help="With --bits auto: bytes of all tensors.")] = None,
    format_: Annotated[
        list[str] | None, typer.Option("--format", help="Output format; can be given again. [compressed-tensors]")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share one scale.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Without or with zeros.")] = None,
    scheme: Annotated[str | None, typer.Option(help="A scheme by name, such as nf4; instead of --bits.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="How scales are found: minmax, mse, hqq, awq, svd, gptq, or auto: by the calibration."),
    ] = None,
    calibration: CalibrationPath = None,
    profile: ProfileName = "local",
    skip: Annotated[list[str] | None, typer.Option(help="Pattern of tensors to copy; replaces the defaults.")] = None,
    min_accuracy: MinAccuracy = None,
    on_failure: Annotated[
        str | None, typer.Option(help="Of a tensor below --min-accuracy: fallback, fail or warn.")
    ] = None,
    backend: BackendName = None,
    server: RemoteUrl = None,
    api_key: ApiKey = None,
    upload: Annotated[
        bool,
        typer.Option("--upload", help="Send SOURCE and --calibration, which are on this disk, to --server first."),
    ] = False,
    webhook: Annotated[
        str | None, typer.Option("--webhook", metavar="URL", help="Have --server tell this address how the job ends.")
    ] = None,
    threads: Threads = None,
    block_bytes: BlockBytes = None,
    as_json: Json = False,
) -> None:
    """Quantize a model into OUT/<format>/, with OUT/report.json beside. Ctrl-C cancels and leaves nothing behind.

    Exit status 1 when the result is below --min-accuracy, which it can be with `--on-failure warn`; it is written then.
    """
    config = _set(
        bit_width=int(bits) if bits is not None and bits.isdecimal() else bits,
        target_bits_per_weight=target_bits,
        target_size_bytes=target_size,
        group_size=group_size,
        symmetric=symmetric,
        scheme=scheme,
        method=method,
        skip=skip,
        min_accuracy=min_accuracy,
        on_failure=on_failure,
        backend=backend,
    )
    outputs = [{"format": name} for name in format_ or ["compressed-tensors"]]
    body = {"kind": "quantize", "profile": profile, "config": config, "outputs": outputs}
    with outcome(as_json=as_json):
        if server is not None:
            from service.cli.client import Server
            from service.cli.remote import quantize_there

            _refuse_means(threads, block_bytes)
            named = {"source": source} | _set(calibration=calibration)
            uploads = {name: _path(given) for name, given in named.items()} if upload else {}
            body |= {name: _source(given) for name, given in named.items() if name not in uploads}
            body |= _set(webhook=webhook and {"url": webhook})
            job = quantize_there(Server(server, api_key), body, out.absolute(), uploads)
        elif upload or webhook:
            name = "--upload" if upload else "--webhook"
            raise Failed({"code": "invalid_request", "detail": f"{name} needs --server"}, status=USAGE)
        else:
            from service.cli.local import quantize_here

            fed = _path(calibration) if calibration is not None else None
            job = quantize_here(body, _path(source), out.absolute(), _means(threads, block_bytes), fed)
        finish(job, as_json=as_json, out=out)


@app.command()
def validate(
    original: Annotated[str, typer.Argument(help="The model as it was.")],
    quantized: Annotated[str, typer.Argument(help="The model as it is now; any format that can be read.")],
    calibration: CalibrationPath = None,
    profile: ProfileName = "local",
    min_accuracy: MinAccuracy = None,
    backend: BackendName = None,
    server: RemoteUrl = None,
    api_key: ApiKey = None,
    threads: Threads = None,
    block_bytes: BlockBytes = None,
    as_json: Json = False,
) -> None:
    """Measure how far one stored model is from another. Exit status 1 when it is below --min-accuracy."""
    body = {"kind": "validate", "profile": profile, "config": _set(min_accuracy=min_accuracy, backend=backend)}
    with outcome(as_json=as_json):
        if server is not None:
            from service.cli.client import Server
            from service.cli.remote import run_there

            _refuse_means(threads, block_bytes)
            named = {"original": original, "quantized": quantized} | _set(calibration=calibration)
            sources = {name: _source(given) for name, given in named.items()}
            job = run_there(Server(server, api_key), body | sources)
        else:
            from service.cli.local import validate_here

            fed = _path(calibration) if calibration is not None else None
            job = validate_here(body, _path(original), _path(quantized), _means(threads, block_bytes), fed)
        finish(job, as_json=as_json)


@app.command()
def watch(job_id: str, server: ServerUrl = LOCAL_SERVER, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Follow a job until it has ended. Ctrl-C stops watching; the job goes on.

    Exit status 1 when it has not succeeded, or is below the accuracy that it was asked for.
    """
    with outcome(as_json=as_json):
        from service.cli.client import Server
        from service.cli.remote import watch_job

        with Server(server, api_key) as client:
            job = watch_job(client, job_id)
        finish(job, as_json=as_json)


@app.command()
def cancel(job_id: str, server: ServerUrl = LOCAL_SERVER, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Cancel a job, and wait until its files and memory are gone."""
    with outcome(as_json=as_json):
        from service.cli.client import Server

        with Server(server, api_key) as client:
            job = client.cancel(job_id)
        if job["status"] != "cancelled":
            detail = f"job {job_id} had ended before: {job['status']}"
            raise Failed({"code": "job_ended", "detail": detail}, status=FAILED, job=job)
        if as_json:
            print_json(job)
        else:
            print(f"{job_id} cancelled")


@app.command()
def jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="At most so many, newest first.")] = 50,
    server: ServerUrl = LOCAL_SERVER,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """List the newest jobs: id, kind, status, how far, and since when."""
    with outcome(as_json=as_json):
        from service.cli.client import Server

        with Server(server, api_key) as client:
            found = client.jobs(status=status, limit=limit)
        if as_json:
            print_json(found)
            return
        for job in found:
            done = 1.0 if job["status"] == "succeeded" else job.get("progress", {}).get("fraction", 0.0)
            print(f"{job['id']}  {job['kind']:<8}  {job['status']:<10}  {done:4.0%}  {job['created_at']}")


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    artifact_ttl_s: Annotated[
        float | None, typer.Option(min=0, help="How long files are kept after the end of their job.")
    ] = None,
    event_ttl_s: Annotated[float | None, typer.Option(min=0, help="How long the logs of ended jobs are kept.")] = None,
    job_ttl_s: Annotated[float | None, typer.Option(min=0, help="How long ended jobs are kept.")] = None,
    blob_ttl_s: Annotated[float | None, typer.Option(min=0, help="How long uploads are kept unused.")] = None,
    max_total_bytes: Annotated[int | None, typer.Option(min=0, help="Of all files and the database together.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="The server's data folder. [ARROWQUANT_DATA_DIR]")
    ] = None,
    server: RemoteUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Remove what is kept no longer, by the server's settings and by what is given here in their place.

    Where the server of the data folder runs, it does it; if it asks for keys, that takes one with the scope admin.
    """
    asked = {"dry_run": dry_run} | _set(
        artifact_ttl_s=artifact_ttl_s,
        event_ttl_s=event_ttl_s,
        job_ttl_s=job_ttl_s,
        blob_ttl_s=blob_ttl_s,
        max_total_bytes=max_total_bytes,
    )
    with outcome(as_json=as_json):
        from service.cli.gc import collect, collect_there, print_garbage

        if server is not None and data_dir is not None:
            raise Failed({"code": "invalid_request", "detail": "--server or --data-dir, not both"}, status=USAGE)
        if server is not None:
            found = collect_there(server, api_key, asked)
        else:
            found = collect(_settings(data_dir=data_dir).data_dir.absolute(), api_key, asked)
        if as_json:
            print_json(found)
        else:
            print_garbage(found)


@app.command()
def warmup() -> None:
    """Compile what the backends of this machine need, and keep it on disk: then no first call waits for it."""
    with outcome(as_json=False):
        from service.cli.local import warm_up

        for name, seconds in warm_up():
            print(f"{name}: ready after {seconds:.1f} s")


def _refuse_means(threads: int | None, block_bytes: int | None) -> None:
    if threads is not None or block_bytes is not None:
        detail = "--threads and --block-bytes are of this process: with --server the service has its own"
        raise Failed({"code": "invalid_request", "detail": detail}, status=USAGE)


def _means(threads: int | None, block_bytes: int | None) -> Means:
    from service.cli.local import Means

    settings = _settings(threads=threads, block_bytes=block_bytes)
    return Means(settings.threads, settings.device_memory_bytes or 0, settings.block_bytes, settings.config_defaults)


def _settings(**given: Any) -> Settings:
    from service.settings import load_settings

    return load_settings(**given)


def _set(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _path(source: str) -> Path:
    if "://" not in source:
        return Path(source).absolute()
    from service.storage.file import path_of

    return path_of(source)


def _source(source: str) -> dict[str, str]:
    return {"type": "uri", "uri": source if "://" in source else Path(source).absolute().as_uri()}
