"""Put a trained model into the zoo: `python -m vitedge.models.embed build/<recipe>`, with the recipe's data at hand.

Writes the checkpoint in fp16 and, beside it, the activation ranges that ONNX Runtime's static int8 is
built from where there is no data. The ranges are those of an ordinary build of that very fp16
checkpoint with the scheme's defaults, so they are what a user with the data would measure.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from vitedge import data as datasets
from vitedge import plugins
from vitedge.artifact import hash_files, writing
from vitedge.device import load_device
from vitedge.errors import VitedgeError
from vitedge.models.build import load_checkpoint, save_checkpoint
from vitedge.models.weights import BUILTIN, BUILTIN_RANGES
from vitedge.pipeline import Pipeline
from vitedge.quantize import _ranges
from vitedge.recipe import CalibrationConfig, QuantizeConfig, load_recipe


def embed(folder: Path, target: Path = BUILTIN, ranges: Path = BUILTIN_RANGES) -> None:
    """Write the embedded checkpoint and its activation ranges.

    Args:
        folder: A build folder with a checkpoint in it; its recipe says which data and preprocessing.
        target: Where the checkpoint goes.
        ranges: Where the ranges go.

    Raises:
        InputError: No checkpoint of vitedge's in the folder.
        UsageError: No recipe in it, or its data is not there.
        VitedgeError: The checkpoint cannot be exported or quantized.
        OutputError: A file cannot be written.
    """
    recipe = load_recipe(str(folder / "recipe.yaml"))
    data = datasets.find(recipe.data.name, None)
    model, meta = load_checkpoint(folder / "checkpoint.safetensors")
    with tempfile.TemporaryDirectory(prefix="vitedge-embed-") as temporary:
        staged = Path(temporary) / target.name
        save_checkpoint(staged, model, meta, half=True)
        config = plugins.load("quantize", "onnxruntime").SCHEMES["int8_static"]()
        quantize = QuantizeConfig(calibration=CalibrationConfig(), schemes=(("onnxruntime.int8_static", config),))
        story = recipe.model_copy(update={"steps": (), "quantize": quantize})
        pipeline = Pipeline(story, load_device("cpu"), Path(temporary) / "build", weights_option=str(staged))
        artifact = pipeline.run(pipeline.plan()).artifacts["model.int8_static.onnx"]
        stored = _ranges.StoredRanges(
            checkpoint_sha256=hash_files([staged]),
            made_with=_ranges.asked(story, config),
            calibration=_ranges.Calibration(**{key: value for key, value in artifact.notes["calibration"].items() if key != "stored"}),
            data_sha256=datasets.digest(data),
            tools=artifact.tools,
            ranges=artifact.notes["ranges"],
        )
        with writing(target) as path:
            shutil.copyfile(staged, path)
        _ranges.write(ranges, stored)


if __name__ == "__main__":
    try:
        embed(Path(sys.argv[1]))
    except VitedgeError as error:
        sys.exit(f"error: {error}")
    sys.stderr.write(f"wrote {BUILTIN} and {BUILTIN_RANGES}\n")
