"""Formats of a report, one file each; the folder is the registry.

A format has `SUFFIX`, the ending of its files, and `render(table, width) -> str`: the whole report as text.
`width` is the columns of the terminal, which the formats for files pass over. It imports quickly; what is heavy
is imported by `render`.
"""
