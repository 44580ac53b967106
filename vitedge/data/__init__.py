"""Images and labels: CIFAR-10 and CIFAR-100, and anybody's own labelled folders or archives of them.

`find` says where a data set is (option, VITEDGE_DATA, cache, download), `load` reads it. Test images
are for the final figure: calibration and tuning take train and validation images only.
"""

from vitedge.data.fill import fill, wants_data
from vitedge.data.identity import digest
from vitedge.data.loading import load, load_for
from vitedge.data.locate import find
from vitedge.data.records import Dataset, Images, Source, Split

__all__ = ["Dataset", "Images", "Source", "Split", "digest", "fill", "find", "load", "load_for", "wants_data"]
