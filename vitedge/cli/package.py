"""Put the best measured artifact into a zip that runs without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vitedge.cli._output import data_option, device_option, emit_json, json_option, progress_bars, say


@click.command(name="package")
@click.argument("build_dir", type=click.Path(path_type=Path))
@device_option()
@click.option(
    "--artifact", metavar="NAME", help="Ship this artifact.  [default: the fastest measured on the device inside the recipe's limits]"
)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="The zip.  [default: <recipe>-<device>.zip]")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option(
    "--golden",
    type=click.IntRange(1, 100),
    default=4,
    show_default=True,
    help="Golden pictures that travel: train images where the data is at hand.",
)
@data_option
@json_option
def command(
    build_dir: Path, device: str, artifact: str | None, output: Path | None, overwrite: bool, golden: int, data: str | None, as_json: bool
) -> None:
    """Put the best measured artifact of BUILD_DIR into a zip that runs without torch.

    \b
    vitedge package build/deit_tiny_int8 --device cpu
    vitedge package build/deit_tiny_int8 --artifact model.int8_dynamic.onnx -o sign.zip

    The zip holds the model, a manifest (sha256 of every file, preprocessing, instruction sets needed, figures
    with their conditions), the labels, golden pictures with their logits, and run.py, which needs
    only numpy, Pillow and the one runtime. The same inputs give the same bytes. The golden
    pictures are train images where the data set is at hand: they can be seen by who gets the zip.
    """
    from vitedge.device import load_device
    from vitedge.package.bundle import package

    with progress_bars() as bar:
        bundle = package(
            build_dir,
            load_device(device),
            output,
            artifact_name=artifact,
            golden=golden,
            data_option=data,
            overwrite=overwrite,
            bar=bar,
        )
    manifest = bundle.manifest
    if as_json:
        told = {"artifact", "runtime", "provider", "precision", "float_precision", "chosen", "passed_over", "remarks", "measured", "isa"}
        emit_json({
            "schema_version": 1,
            "bundle": str(bundle.path),
            "sha256": bundle.sha256,
            "size_bytes": bundle.size_bytes,
            **manifest.model_dump(mode="json", include=told),
            "golden": manifest.golden.source,
        })  # fmt: skip
        return
    say(manifest.chosen)
    if manifest.measured and manifest.measured.get("top1") is not None:
        say(_quality(manifest.measured))
    for remark in manifest.remarks:
        say(f"note: {remark}")
    say(
        f"golden pictures: {len(manifest.golden.images)}, {manifest.golden.source}; a logit may differ by {manifest.golden.max_abs_err:.3g}"
    )
    say(f"wrote {bundle.path} ({bundle.size_bytes / 2**20:.2f} MiB, sha256 {bundle.sha256}); next: vitedge verify {bundle.path}")


def _quality(row: dict[str, Any]) -> str:
    """Top-1 of what is shipped, with its interval, its images, and the drop below fp32."""
    low, high = row.get("top1_interval") or (None, None)
    text = f"top-1 {row['top1']:.2f} %" + (f" ({low:.2f} to {high:.2f})" if low is not None else "")
    drop = row.get("top1_drop")
    if drop:
        interval = f" ({drop['low']:+.2f} to {drop['high']:+.2f})" if "low" in drop and "high" in drop else ""
        text += f", drop {drop['points']:+.2f} points{interval} below {drop.get('reference', 'fp32')}"
    return text + (f", on {row['top1_images']}" if row.get("top1_images") else "")
