"""The bundle: one zip that runs a chosen model on a device without vitedge or torch, and its verification.

choose   which measured artifact is shipped, and why
golden   pictures, their logits and how far another device's may be off
contents what the manifest of a bundle holds
archive  the zip: deterministic bytes out, nothing trusted in
bundle   puts a bundle together
verify   takes one apart and runs it
runner   the program that travels in it as run.py
"""
