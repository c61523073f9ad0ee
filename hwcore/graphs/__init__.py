"""Graphs: capture a step once, replay it without the host.

Import what you need from its module, :mod:`hwcore.graphs.tape` for one; this package itself imports
nothing, so that naming it costs nothing.
"""
