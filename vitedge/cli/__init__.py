"""The command line: one file per command, loaded only when it runs; the only place that prints or exits."""
