"""Proof that edm2_core is what edm2_core/SPEC.md says in every array library, and that a port of it agrees.

``pytest --pyargs conformance`` runs it all, ``--port pkg.adapter:PORT`` proves a port of your own; ``--profile ci`` has
more examples, the same each time. :mod:`.cases` is the table of what is proved, docs/adding_a_port.md the way in.
"""
