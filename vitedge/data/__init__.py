"""Images and labels: CIFAR-10 and CIFAR-100, and anybody's own labelled folders or archives of them.

`find` says where a data set is (option, VITEDGE_DATA, cache, download), `load` reads it. Test images
are for the final figure: calibration and tuning take train and validation images only.
"""
