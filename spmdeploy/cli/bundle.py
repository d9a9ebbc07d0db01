"""The commands `inspect`, `verify` and `bundle`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import spmdeploy
from spmdeploy.cli.console import format_db, format_table, log_notes, print_result, progress_bar
from spmdeploy.cli.options import (
    BUILTIN_BUNDLE,
    BackendOption,
    Device,
    Json,
    Overwrite,
    PrecisionOption,
    RequireSignature,
    Url,
    Verbose,
    device_from,
    open_editor_from_options,
    source_and_target,
)
from spmdeploy.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spmdeploy.backends.base import Backend
    from spmdeploy.bench.checks import Check
    from spmdeploy.bundle.bundle import Bundle
    from spmdeploy.bundle.signature import PublicKey, SecretKey

bundle_app = typer.Typer(help="Pack, sign, unpack and slim bundles for devices.", rich_markup_mode=None)


PASSWORD = "SPMDEPLOY_KEY_PASSWORD"
"""Environment variable with the password of a secret key, for use without a terminal."""


SigningKey = Annotated[
    Path | None,
    typer.Option("--sign", metavar="KEY", help=f"Sign with this secret key; its password may be in ${PASSWORD}."),
]


def inspect(
    path: Annotated[
        Path | None, typer.Argument(help="A bundle, an engine or a checkpoint; without it the built-in bundle.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is in a bundle, an engine or a checkpoint.

    Facts are read from the files themselves after checking their hashes. No engine is loaded.
    """
    from spmdeploy.export.inspect import inspect_path

    facts = inspect_path(path or spmdeploy.default_model())
    formatters = {"bundle": _bundle_lines, "engine": _engine_lines, "checkpoint": _checkpoint_lines}
    print_result("inspect", facts, formatters[facts["kind"]](facts), as_json)


def verify(
    bundle: Annotated[Path | None, typer.Argument(help=BUILTIN_BUNDLE)] = None,
    backend: BackendOption = "auto",
    device: Device = "auto",
    url: Url = None,
    precision: PrecisionOption = "auto",
    require_signature: RequireSignature = None,
    thorough: Annotated[
        bool,
        typer.Option(
            "--thorough", help="Also check repeatability, batches, cached layouts, a large edit and the GPU's memory."
        ),
    ] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Repeat a bundle's golden edits on this machine.

    All hashes are checked first. Deviation: difference from PyTorch in FP32 under the mask, in gray levels (0..255).
    """
    from spmdeploy.backends.verify import verify as run_golden_edits
    from spmdeploy.bundle.bundle import open_bundle

    device = device_from(backend, device, url)
    opened = open_bundle(bundle or spmdeploy.default_model(), public_key_from(require_signature))
    opened.check_all()
    with open_editor_from_options(
        opened.path, backend, device, precision, require_signature, verbose=verbose
    ) as editor:
        session = editor.session
        results = run_golden_edits(session, opened)
        ran = {key: getattr(session, key) for key in ("backend", "device", "precision", "provider")}
        checks = list(_thorough_checks(opened, session)) if thorough else []
    rows = [
        (
            result.name,
            "ok" if result.passed else "FAILED",
            f"{result.deviation.max_grey}",
            f"{result.deviation.mean_grey:.3f}",
            format_db(result.deviation.to_json()["psnr_db"]),
        )
        for result in results
    ]
    lines = [f"{opened.path}: all hashes match; golden edits on {ran['provider']}, {ran['precision']}"]
    lines += format_table(("golden edit", "", "largest deviation", "mean deviation", "PSNR in mask"), rows)
    if checks:
        lines += ["", *format_table(("check", "", ""), [(it.name, it.status, it.reason or "") for it in checks])]
    payload = {"bundle": str(opened.path), **ran, "golden": [result.to_json() for result in results]}
    payload |= {"checks": [it.to_json() for it in checks]} if thorough else {}
    problems = [f"{result.name}: {problem}" for result in results for problem in result.problems]
    problems += [f"{it.name}: {it.reason}" for it in checks if it.failed]
    failure = VerificationError("; ".join(problems), "do not use this backend with this bundle") if problems else None
    print_result("verify", payload, lines, as_json, failure)


def _thorough_checks(bundle: Bundle, session: Backend) -> Iterator[Check]:
    from spmdeploy.bench.checks import run_thorough

    def reopen() -> Backend:
        return spmdeploy.open_editor(bundle.path, session.backend, session.device, session.precision).session

    return run_thorough(bundle, session, reopen)


@bundle_app.command("pack")
def bundle_pack(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help=BUILTIN_BUNDLE)],
    output: Annotated[Path | None, typer.Argument(metavar="OUTPUT", help="The file to write, NAME.spm.")] = None,
    sign: SigningKey = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Pack a bundle into one file.

    Every hash is checked, and equal bundles give equal files. Engines that this machine built are left out;
    `slim --engine` includes chosen ones.
    """
    from spmdeploy.bundle.bundle import open_bundle
    from spmdeploy.engines.pack import pack

    bundle, output = source_and_target(bundle, output)
    opened, key = open_bundle(bundle), _secret_key(sign)
    log_notes([f"{name} is left out: no hash covers it" for name in opened.unlisted_files])
    with progress_bar("packing") as show:
        packed = open_bundle(pack(opened, output, overwrite, key, show))
    payload = _packed_facts(packed)
    print_result("bundle-pack", payload, [f"{output}: {_pack_summary(payload)}"], as_json)


@bundle_app.command("unpack")
def bundle_unpack(
    file: Annotated[Path, typer.Argument(help="A file written by `pack` or `slim`.")],
    folder: Annotated[Path, typer.Argument(help="The folder to create, NAME.spm.")],
    require_signature: RequireSignature = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Unpack a bundle into a folder.

    All hashes are checked before anything is written. Files are not changed, so a signature stays valid.
    """
    from spmdeploy.bundle.bundle import open_bundle
    from spmdeploy.engines.pack import unpack

    opened = open_bundle(file, public_key_from(require_signature))
    log_notes([f"{name} is left out: no hash covers it" for name in opened.unlisted_files])
    with progress_bar("unpacking") as show:
        unpacked = unpack(opened, folder, overwrite, show)
    signature = None if opened.signature is None else vars(opened.signature)
    size = sum(unpacked.files().values())
    payload = {"output": str(folder), "files": len(unpacked.files()), "bytes": size, "signature": signature}
    print_result("bundle-unpack", payload, [f"{folder}: {len(unpacked.files())} files, {size / 1e6:.1f} MB"], as_json)


@bundle_app.command("slim")
def bundle_slim(
    keep: Annotated[
        list[str],
        typer.Option("--keep", metavar="fp16|fp32|cpu|GRAPH|GRAPH.fp16", help="Graphs to keep; repeat for several."),
    ],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help=BUILTIN_BUNDLE)],
    output: Annotated[Path | None, typer.Argument(metavar="OUTPUT", help="The file to write, NAME.spm.")] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="KEY",
            help="Engines to include, by key or part of a key, such as sm86; repeat for several.",
        ),
    ] = None,
    sign: SigningKey = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Pack only the files that one kind of device needs.

    The result holds the graphs to keep, chosen engines and all other files. Kept files keep their hashes; manifest and
    card no longer list the removed graphs. Included engines become part of the bundle: hashed, and signed with it.
    """
    from spmdeploy.bundle.bundle import open_bundle
    from spmdeploy.engines.pack import extract_subset

    bundle, output = source_and_target(bundle, output)
    opened, key = open_bundle(bundle), _secret_key(sign)
    with progress_bar("packing") as show:
        slimmed = extract_subset(opened, output, keep, engine or (), overwrite, key, show)
    before, after = opened.files(), slimmed.files()
    rows = [
        (name, f"{size / 1e6:.1f} MB", "dropped" if name not in after else "kept" if name in before else "added")
        for name, size in sorted((before | after).items())
    ]
    payload = {
        **_packed_facts(slimmed),
        "bytes_before": sum(before.values()),
        "dropped": sorted(before.keys() - after.keys()),
        "added": sorted(after.keys() - before.keys()),
    }
    lines = [f"{output}: {_pack_summary(payload)}; {payload['bytes_before'] / 1e6:.1f} MB before"]
    print_result("bundle-slim", payload, lines + format_table(("", "", ""), rows)[1:], as_json)


@bundle_app.command("keygen")
def bundle_keygen(
    name: Annotated[Path, typer.Argument(help="Writes NAME.key and NAME.pub.")],
    no_password: Annotated[
        bool, typer.Option("--no-password", help="Leave the secret key unencrypted, for example for a CI job.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a pair of keys for signing bundles.

    The keys have minisign's format: its tools can use them, and --sign accepts keys made by minisign. Keep NAME.key
    secret and install NAME.pub on every device.
    """
    from spmdeploy.bundle.signature import new_key, write_key_pair

    key = new_key()
    secret, public = write_key_pair(name, key, None if no_password else _password(name, new=True))
    payload = {"secret_key": str(secret), "public_key": str(public), "key": key.public.name}
    lines = [f"{secret}: secret, {'not encrypted' if no_password else 'encrypted'}", f"{public}: {key.public.line}"]
    print_result("bundle-keygen", payload, lines, as_json)


def public_key_from(given: str | None) -> PublicKey | None:
    """The key that the option names, a file or base64; None without the option."""
    from spmdeploy.bundle.signature import read_public_key

    return None if given is None else read_public_key(given)


def _secret_key(path: Path | None) -> SecretKey | None:
    from spmdeploy.bundle.signature import read_secret_key

    return None if path is None else read_secret_key(path, lambda: _password(path))


def _password(key: Path, new: bool = False) -> str:
    """The password of a secret key, from the environment or a prompt. Raises UsageError if neither is available."""
    password = os.environ.get(PASSWORD)
    if password is None and sys.stdin.isatty():
        asked: str = typer.prompt(f"password of {key}", hide_input=True, confirmation_prompt=new, err=True)
        return asked
    if not password:
        hint = f"put it into ${PASSWORD}" + (", or pass --no-password" if new else "")
        raise UsageError(f"the key {key} needs a password, and there is no terminal to type it in", hint)
    return password


def _packed_facts(packed: Bundle) -> dict[str, Any]:
    """Facts about a packed bundle; the hash covers the whole file."""
    from spmdeploy.files import os_errors, sha256

    with os_errors(packed.path, "read"), open(packed.path, "rb") as stream:
        digest = sha256(stream)
    return {
        "output": str(packed.path),
        "files": len(packed.files()),
        "bytes": packed.path.stat().st_size,
        "sha256": digest,
        "signed": packed.read_signature() is not None,
    }


def _pack_summary(facts: dict[str, Any]) -> str:
    signed = "signed" if facts["signed"] else "not signed"
    return f"{facts['files']} files, {facts['bytes'] / 1e6:.1f} MB, {signed}, SHA-256 {facts['sha256']}"


def _checkpoint_lines(facts: dict[str, Any]) -> list[str]:
    return [
        f"{facts['path']}: checkpoint, {facts['format']} format, trained in {facts['channel_order']}",
        f"generator   {facts['parameters'] / 1e6:.1f} M parameters, {facts['gflop']:.1f} GFLOP an edit",
        f"shape       {facts['classes']} classes, width {facts['width']}, hidden {facts['hidden']}, "
        f"{facts['modulation']} modulation, stages {facts['stages']}",
    ]


def _bundle_lines(facts: dict[str, Any]) -> list[str]:
    generator, source, classes = facts["generator"], facts["source"], facts["classes"]
    names = ", ".join(f"{entry['id']} {entry['name']}" for entry in classes["classes"][:12])
    more = f", ... {len(classes['classes'])} in all" if len(classes["classes"]) > 12 else ""
    rows = []
    for graph in facts["graphs"]:
        counted = graph["counted"] or graph
        fp32 = ", ".join(f"{count} {name}" for name, count in sorted(counted["fp32_operations"].items()))
        rows.append(
            (
                f"{graph['graph']} {graph['precision']}",
                f"{graph['bytes'] / 1e6:.1f} MB",
                f"{counted['fp16_share']:.0%}",
                format_db(graph["parity"]["psnr_db"]),
                fp32 if graph["precision"] == "fp16" else "all",
            )
        )
    counted_by = (
        "counted in the graphs" if facts["graphs"] and facts["graphs"][0]["counted"] else "as recorded at export"
    )
    return [
        f"{facts['path']}: bundle {facts['name']}, {facts['bytes'] / 1e6:.1f} MB, all hashes match",
        f"generator   {generator['parameters'] / 1e6:.1f} M parameters, {generator['gflop']:.1f} GFLOP an edit, "
        f"{generator['modulation']} modulation, stages {generator['stages']}",
        f"classes     {classes['name']}: {names}{more}",
        f"source      {source['file']} ({source['format']}, {facts['channel_order']}), {facts['created']}",
        f"licence     {facts['licence']}",
        f"signature   {'present; --require-signature PUB checks it' if facts['signed'] else 'none'}",
        f"precision   {counted_by}",
        *format_table(("graph", "size", "FP16 operations", "PSNR in mask", "FP32 operations"), rows),
        *(f"unlisted file, never read: {name}" for name in facts["surplus"]),
        *(line for engine in facts["engines"] for line in _engine_lines(engine)),
    ]


def _engine_lines(engine: dict[str, Any]) -> list[str]:
    status = "fits this machine" if engine["fit"] else "; ".join(engine["faults"] + engine["differences"])
    record = engine["record"]
    if record is None:
        return [f"engine      {engine['path']}", f"            never loaded: {status}"]
    target = f"{record['gpu']['name']}" if record["gpu"] else ", ".join(record["targets"])
    batch, reading, verified = record["batch"], record["computes_in"], record["verification"]
    share = reading["network_fp16_share"] if reading["fp16_share"] is None else reading["fp16_share"]
    read = "read from the typed network" if reading["fp16_share"] is None else "read back from the engine"
    verification = (
        f"golden edits {'passed' if verified['passed'] else 'FAILED'} on {verified['on']}"
        if verified
        else "not yet verified"
    )
    return [
        f"engine      {engine['path']}",
        f"            {record['graph']} {record['precision']}, {record['runtime']} {record['version']} for {target}, "
        f"{record['engine']['bytes'] / 1e6:.1f} MB, batches {batch['min']} to {batch['max']}",
        f"            {share:.0%} FP16, {read}; {verification}",
        f"            {'' if engine['fit'] else 'does not fit: '}{status}",
    ]
