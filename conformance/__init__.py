"""The conformance suite: proves edm2_core against SPEC.md in every array library, and ports against edm2_core.

``python -m conformance`` runs it all; ``--port pkg.adapter:PORT`` proves a port of your own, and ``--profile ci`` draws
more examples, the same each time. :mod:`.cases` is the table of what is proved; docs/adding_a_port.md is the way in.
"""
