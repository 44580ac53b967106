"""Compression techniques, one file each; see CONTRIBUTING.md for the contract."""
