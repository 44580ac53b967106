"""Whether a model file picks tokens by their values, image by image.

Where such a file rounds too, another processor's last bit may become another token, and a logit then differs by more than rounding.
"""

from __future__ import annotations

from xml.etree import ElementTree

import onnx

from vitedge.artifact import Artifact
from vitedge.graph import _run


def chooses_tokens(artifact: Artifact) -> bool:
    """Whether positions that a graph finds by value are read by it."""
    if artifact.format == "onnx":
        return _run.chooses(onnx.load(artifact.path, load_external_data=False))
    root = ElementTree.parse(artifact.path).getroot()
    read = {(edge.attrib["from-layer"], edge.attrib["from-port"]) for edge in root.iter("edge")}
    found = [layer for layer in root.iter("layer") if layer.attrib["type"] == "TopK"]  # ArgMax is one too
    # Values come first, their positions second.
    return any((layer.attrib["id"], port.attrib["id"]) in read for layer in found for port in layer.findall("output/port")[1:])
